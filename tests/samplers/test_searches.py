"""Searches over images: seeds by counter, the best candidate by a scorer, and failures that are no scores."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage_ray.cli import main
from stage_ray.config import RolloutConfig
from stage_ray.errors import ConfigError
from stage_ray.evaluation.loop import requests_for
from stage_ray.evaluation.suites import resolve_suites
from stage_ray.records import JudgedGroup, Prompt, RolloutRequest, ScoredGroup
from stage_ray.run.preflight import preflight
from stage_ray.samplers import SEARCHES, ImageSearch, load_search
from stage_ray.samplers.best_of import BestOfSearch
from tests.plain import FAMILY
from tests.rules import Middle
from tests.runs import tiny_run

pytestmark = pytest.mark.usefixtures("one_thread")

REQUESTS = [RolloutRequest(i, Prompt(i, text), (10 * i + 1, 10 * i + 2)) for i, text in enumerate(["a ring", "a cube"])]


def light(seed: int) -> float:
    """What the second scorer says of the picture of a seed."""
    return seed % 97 / 97


async def judge(requests: Sequence[RolloutRequest], failed: Sequence[int] = ()) -> list[JudgedGroup]:
    """Pictures that show their seed, scored by "other", which says 1 of all, and "light"; some of the latter fail."""
    groups = []
    for request in requests:
        bad = np.isin(request.seeds, failed)
        said = np.where(bad, np.nan, [light(seed) for seed in request.seeds])
        scores = np.stack([np.ones(len(bad)), said], axis=1).astype(np.float32)
        details = tuple({"light": {"error": "dark"}} if one else {} for one in bad)
        features = {"light": np.asarray(request.seeds, np.float32)[:, None]}
        scored = ScoredGroup(request.group_id, ("other", "light"), scores, np.isfinite(scores), details, 0.1, features)
        images = np.stack([np.full((2, 2, 3), seed % 251, np.uint8) for seed in request.seeds])
        groups.append(JudgedGroup(request, scored, images))
    return groups


def test_candidates_have_seeds_by_counter_of_which_fewer_are_the_first() -> None:
    four, two = BestOfSearch(), BestOfSearch(candidates=2)
    assert four.candidate_seeds(7)[0] == 7 and four.candidate_seeds(7)[:2] == two.candidate_seeds(7)
    everything = [one for seed in range(50) for one in four.candidate_seeds(seed)]
    assert len(set(everything)) == 200 and all(0 <= seed < 2**63 for seed in everything)


def test_the_best_candidate_of_each_image_is_kept_with_its_scores_and_its_seed() -> None:
    search = BestOfSearch(candidates=5, scorer="light")
    kept = asyncio.run(search.search(REQUESTS, judge))
    assert [group.request for group in kept] == REQUESTS
    for group in kept:
        for image, seed in enumerate(group.request.seeds):
            best = max(search.candidate_seeds(seed), key=light)
            assert group.scored.scores[image].tolist() == pytest.approx([1, light(best)])
            assert group.scored.details[image]["search"] == {"seed": best, "candidates": 5, "failed": 0}
            assert (group.images[image] == best % 251).all() and group.scored.features["light"][image] == np.float32(
                best
            )
    (alone,) = asyncio.run(search.search(REQUESTS[1:], judge))
    assert (alone.images == kept[1].images).all(), "it does not depend on the other requests"
    (first,) = asyncio.run(BestOfSearch().search(REQUESTS[:1], judge))
    assert first.scored.details[0]["search"]["seed"] == 1, "of equals, by the first scorer, the first"


def test_a_candidate_whose_score_failed_is_not_kept_and_an_image_without_another_has_failed() -> None:
    search = BestOfSearch(candidates=3, scorer="light")
    mine, all_of_it = search.candidate_seeds(1), search.candidate_seeds(2)
    best = max(mine, key=light)

    async def failing(requests: Sequence[RolloutRequest]) -> list[JudgedGroup]:
        return await judge(requests, failed=[best, *all_of_it])

    (group,) = asyncio.run(search.search(REQUESTS[:1], failing))
    kept = group.scored.details[0]["search"]
    assert kept["seed"] == max((seed for seed in mine if seed != best), key=light) and kept["failed"] == 1
    assert group.scored.valid.tolist() == [[True, True], [True, False]] and np.isnan(group.scored.scores[1, 1])
    assert group.scored.details[1] == {
        "light": {"error": "dark"},
        "search": {"seed": 2, "candidates": 3, "failed": 3},
    }


@pytest.mark.parametrize(
    ("rollout", "sentence"),
    [
        ({"search": "bestof"}, "rollout.search = 'bestof' is no known search over images; did you mean 'best_of'?"),
        ({"search": "tests.rules.NoRepeats"}, "is no class that derives from stage_ray.samplers.ImageSearch"),
        ({"search": "best_of", "search_options": {"candidates": 0}}, "rollout.search_options.candidates = 0: "),
        (
            {"search": "best_of", "search_options": {"n": 2}},
            "search_options.n = 2 is no option of search over images be",
        ),
        (
            {"search": "best_of", "search_options": {"scorer": "clap"}},
            "scorer = 'clap' is no scorer here; did you mean 'cl",
        ),
    ],
)
def test_a_search_or_option_that_cannot_be_is_named(rollout: dict[str, object], sentence: str) -> None:
    assert SEARCHES.names() == ["best_of", "parm", "parm_plus"] and load_search(RolloutConfig(), ["clip"]) is None
    with pytest.raises(ConfigError) as error:
        load_search(RolloutConfig(**rollout), ["clip"])
    assert sentence in str(error.value)


def command(name: str, model: Path, tmp_path: Path, *settings: str) -> list[str]:
    (tmp_path / "prompts.txt").write_text("a ring\na cube")
    words = [name, str(model), "--engine", "torch", "--prompts", str(tmp_path / "prompts.txt")]
    options = [f"policy.family={FAMILY}", "rewards=[{type: tests.scorers.Bright}]", *settings]
    return [*words, *(part for option in options for part in ("--set", option))]


@pytest.mark.parametrize(("name", "pick"), [("best_of", max), ("tests.rules.Middle", np.median)])
def test_evaluate_keeps_what_the_search_says_and_a_search_may_come_from_outside(
    plain: Path, tmp_path: Path, name: str, pick: object
) -> None:
    searching = (f"rollout.search={name}", "rollout.search_options.candidates=3")
    for label, settings in (("plain", ()), ("kept", searching)):
        words = command("evaluate", plain, tmp_path, *settings)
        assert main([*words, "--images-per-prompt", "2", "--json", str(tmp_path / f"{label}.json")]) == 0
    before, after = (json.loads((tmp_path / f"{label}.json").read_text()) for label in ("plain", "kept"))
    assert after["conditions"]["rollout.search"] == name and "rollout.search" not in before["conditions"]
    scores = [image["scores"]["Bright"] for image in after["images"]]
    search: ImageSearch = BestOfSearch(candidates=3) if name == "best_of" else Middle()
    seeds = [seed for request in requests_for(REQUESTS_PROMPTS, 2, 20) for seed in request.seeds]
    drawn = brightness([one for seed in seeds for one in search.candidate_seeds(seed)], plain)
    assert scores == pytest.approx([pick(drawn[i : i + 3]) for i in range(0, 12, 3)])  # type: ignore[operator]


REQUESTS_PROMPTS = [Prompt(0, "a ring"), Prompt(1, "a cube")]


def brightness(seeds: Sequence[int], model: Path) -> list[float]:
    """Of pictures of the two prompts, half of the seeds each."""
    from stage_ray.config import PolicyConfig
    from stage_ray.engines import build_engine

    rollout = RolloutConfig.model_validate({"engine": "torch", "guidance_scale": 3.0, "gpus": 0})
    engine = build_engine(PolicyConfig(path=str(model), family=FAMILY), rollout, worker="test")
    half = len(seeds) // 2
    groups = engine.generate(
        [RolloutRequest(i, REQUESTS_PROMPTS[i], tuple(seeds[i * half : (i + 1) * half])) for i in range(2)]
    )
    return [float(image.mean() / 255) for group in groups for image in group.images]


def test_generate_needs_a_scorer_to_search_with(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command("generate", plain, tmp_path, "rollout.search=best_of")
    assert main([*words, "--images", "1", "--out", str(tmp_path / "out")]) == 0
    assert main([*command("generate", plain, tmp_path), "--images", "1", "--out", str(tmp_path / "first")]) == 0
    pairs = [
        (np.asarray(Image.open(tmp_path / label / f"{i:04d}-0.png")).mean() for label in ("out", "first"))
        for i in (0, 1)
    ]
    assert all(kept >= first for kept, first in pairs)
    capsys.readouterr()
    assert main([*words, "--set", "rewards=[{type: none}]", "--images", "1", "--out", str(tmp_path / "none")]) == 2
    assert "rollout.search = 'best_of' chooses by a scorer; name one in rewards" in capsys.readouterr().err


def test_training_refuses_a_search_and_a_suite_has_its_own(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout.search = 'best_of' would train on images that a scorer chose"):
        preflight(tiny_run(tmp_path, plain, rollout={"search": "best_of"}))
    suite = {"benchmark": "shapeworld", "name": "best", "prompts": str(tmp_path / "prompts.txt"), "search": "best_of"}
    suite["rewards"] = [{"type": "tests.scorers.Bright"}]  # type: ignore[assignment]
    run = resolve_suites(tiny_run(tmp_path, plain, evaluation={"suites": [suite]}))
    assert len(preflight(run).suites["best"]) == 4
    wrong = suite | {"search_options": {"scorer": "Dark"}}
    run = resolve_suites(tiny_run(tmp_path, plain, evaluation={"suites": [wrong]}))
    with pytest.raises(ConfigError, match=r"evaluation.suites.0.search_options.scorer = 'Dark' is no scorer here"):
        preflight(run)
