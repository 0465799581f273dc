"""PARM and PARM++ over a real engine and real scorers, against the rule written out for each image by itself."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stage_ray.cli import main
from stage_ray.config import PolicyConfig, RewardConfig, RolloutConfig, SuiteConfig
from stage_ray.engines import build_engine
from stage_ray.engines.base import GREY, ImageEngine
from stage_ray.errors import ConfigError, RunError
from stage_ray.evaluation.loop import EngineBackend
from stage_ray.evaluation.searching import SearchBackend, check_search
from stage_ray.evaluation.suites import resolve_suites
from stage_ray.records import JudgedGroup, Prompt, RolloutRequest, image_seeds
from stage_ray.run.preflight import preflight
from stage_ray.samplers import ImageSearch, load_search
from stage_ray.samplers.parm import CLARITY, POTENTIAL, ParmSearch
from stage_ray.samplers.parm_plus import REFLECTION, ParmPlusSearch
from tests.plain import FAMILY
from tests.runs import tiny_run
from tests.scorers import Brightness, ShowsMuch

pytestmark = pytest.mark.usefixtures("one_thread")

REQUESTS = [RolloutRequest(i, Prompt(i, text), (10 * i + 1, 10 * i + 2)) for i, text in enumerate(["a ring", "a cube"])]
LOOKS = (0.25, 0.75)


@pytest.fixture(scope="module")
def engine(plain: Path) -> Iterator[ImageEngine]:
    config = RolloutConfig.model_validate({"engine": "torch", "dtype": "float32", "gpus": 0, "guidance_scale": 3.0})
    engine = build_engine(PolicyConfig(path=str(plain), family=FAMILY), config, worker="test")
    yield engine
    engine.close()


def judge(name: str, **options: object) -> RewardConfig:
    return RewardConfig(type=f"tests.scorers.{name}", options=options)


def searched(engine: ImageEngine, search: ImageSearch, requests: list[RolloutRequest] = REQUESTS) -> list[JudgedGroup]:
    backend = SearchBackend(EngineBackend(engine, [("Brightness", Brightness())]), search)
    return asyncio.run(backend.judge(requests, images=True))


def picture(engine: ImageEngine, prompt: str, seed: int) -> np.ndarray:
    (group,) = engine.generate([RolloutRequest(0, Prompt(0, prompt), (seed,))])
    return group.images[0]


def score(scorer: Any, image: np.ndarray) -> float:
    return float(scorer.score(image[None], []).scores[0])


@pytest.mark.parametrize(("over", "enough"), [(0.5, 0.5), (0.5, 0.55), (2.0, 0.5), (-1.0, 0.9)])
def test_kept_is_the_best_of_those_with_potential_else_the_one_with_most(
    engine: ImageEngine, over: float, enough: float
) -> None:
    clarity = judge("ShowsMuch", over=over, rows=16)
    search = ParmSearch(candidates=4, clarity=clarity, potential=judge("Brightness"), looks=LOOKS, enough=enough)
    for group in searched(engine, search):
        for place, seed in enumerate(group.request.seeds):
            images = [picture(engine, group.request.prompt.text, one) for one in search.candidate_seeds(seed)]
            clear_at, potential = [None] * 4, [math.nan] * 4
            for number, image in enumerate(images):
                for shown in LOOKS:
                    seen = image.copy()
                    seen[int(32 * shown) :] = GREY
                    if clear_at[number] is None and score(ShowsMuch(over, 16), seen) >= enough:
                        clear_at[number], potential[number] = shown, score(Brightness(), seen)  # type: ignore[call-overload]
            outcome = [score(Brightness(), image) for image in images]
            promise = [number for number in range(4) if potential[number] >= enough]
            asked = [number for number in range(4) if not math.isnan(potential[number])]
            if promise:
                best = max(promise, key=outcome.__getitem__)
            else:
                best = max(asked, key=potential.__getitem__) if asked else 0
            said = group.scored.details[place]["search"]
            assert said["seed"] == search.candidate_seeds(seed)[best]
            assert (said["clear_at"], said["promise"], said["failed"]) == (clear_at[best], len(promise), 0)
            assert said["potential"] == (None if not asked else pytest.approx(potential[best], abs=1e-6))
            assert group.images is not None and (group.images[place] == images[best]).all()
            assert group.scored.scores[place, 0] == pytest.approx(outcome[best], abs=1e-6)


def test_what_is_kept_for_an_image_depends_on_no_other_and_looks_are_asked_in_vain_of_none(engine: ImageEngine) -> None:
    search = ParmSearch(candidates=3, potential=judge("Brightness"), looks=(0.5,), enough=0.5)
    both, (alone,) = searched(engine, search), searched(engine, search, REQUESTS[1:])
    assert both[1].scored.details == alone.scored.details
    assert all(said["search"]["clear_at"] == 0.5 for said in alone.scored.details), "without clarity all are clear"


def test_a_judge_that_fails_says_no_and_one_that_is_down_ends_the_search(engine: ImageEngine) -> None:
    kept = searched(engine, ParmSearch(candidates=2, potential=judge("Raises"), looks=(0.5,)))
    assert all(said["search"]["potential"] is None for group in kept for said in group.scored.details)
    assert [group.scored.details[0]["search"]["seed"] for group in kept] == [1, 11], "the first, as none is promising"
    with pytest.raises(
        RunError, match="search_options.potential: service unavailable: nobody is at home; start it again"
    ):
        searched(engine, ParmSearch(candidates=2, potential=judge("Down"), looks=(0.5,)))


def test_an_image_that_is_not_right_is_drawn_again_with_what_is_wrong_and_never_becomes_worse(
    engine: ImageEngine,
) -> None:
    options: dict[str, Any] = {"candidates": 2, "potential": judge("Brightness"), "looks": (0.5,), "enough": 0.0}
    first = searched(engine, ParmSearch(**options))
    right = float(np.median([1 - group.scored.scores[place, 0] for group in first for place in range(2)]))
    search = ParmPlusSearch(**options, reflection=judge("Dims"), right=right, rounds=2, words=4)
    kept, rounds = searched(engine, search), set[int]()
    for group, before in zip(kept, first, strict=True):
        text = f"{group.request.prompt.text}. much too bright, use"
        for place, seed in enumerate(group.request.seeds):
            best, said = before.scored.scores[place, 0], {"round": 0, "drawn": group.request.prompt.text}
            for number in (1, 2):
                if 1 - best >= right:
                    break
                seeds = image_seeds(f"reflection:{seed}", number, 1)
                request = RolloutRequest(0, Prompt(0, group.request.prompt.text, drawn=text), seeds)
                (again,) = searched(engine, ParmSearch(**options), [request])
                if again.scored.scores[0, 0] > best:
                    best, said = again.scored.scores[0, 0], {"round": number, "drawn": text}
            assert group.scored.scores[place, 0] == best >= before.scored.scores[place, 0]
            found = group.scored.details[place]["search"]
            assert {key: found[key] for key in said} == said
            assert group.images is not None and group.images[place].mean() / 255 == pytest.approx(best, abs=1e-5)
            rounds.add(found["round"])
    assert 0 in rounds and len(rounds) > 1


def test_a_vlm_judge_is_asked_the_papers_questions_unless_it_has_its_own() -> None:
    vlm, own = (
        {"type": "vlm_judge", "options": {"model": "m"}},
        {"type": "vlm_judge", "options": {"question": "{prompt}?"}},
    )
    options = {"clarity": vlm, "potential": vlm, "reflection": vlm}
    search = load_search(RolloutConfig(search="parm_plus", search_options=options), ["clip"])
    assert search is not None
    asked = {name: it.options for name, it in search.judges().items()}
    assert asked["clarity"] == {"mode": "yes_no", "model": "m", "question": CLARITY}
    assert asked["potential"] == {"mode": "yes_no", "model": "m", "question": POTENTIAL}
    assert asked["reflection"] == {"mode": "points", "model": "m", "question": REFLECTION}
    assert ParmSearch.model_validate({"potential": own}).judges()["potential"].options == own["options"]
    assert all("{prompt}" in question for question in (CLARITY, POTENTIAL, REFLECTION))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "rollout.search_options.potential is missing: search over images parm needs it"),
        ({"potential": {"type": "clop"}}, "rollout.search_options.potential.type = 'clop' is no known scorer; did you"),
        (
            {"potential": {"type": "tests.scorers.ShowsMuch", "options": {"ovr": 1}}},
            "rollout.search_options.potential.options.ovr is no option",
        ),
        ({"potential": {"typ": 1}}, "rollout.search_options.potential.type is missing"),
        ({"potential": {"type": "none"}, "looks": [0.5, 0.5]}, "looks must grow"),
        ({"potential": {"type": "geneval"}}, "potential: geneval cannot judge 'a ring'"),
    ],
)
def test_judges_and_options_that_cannot_be_are_named(options: dict[str, object], sentence: str) -> None:
    detector = {"detector": "stage_ray.shapeworld.detector.ShapeDetector"}
    if options.get("potential") == {"type": "geneval"}:
        options = {"potential": {"type": "geneval", "options": detector}}
    with pytest.raises(ConfigError) as error:
        check_search(RolloutConfig(search="parm", search_options=options), [], [Prompt(0, "a ring")], "rollout")
    assert sentence in str(error.value)


def test_evaluate_and_suites_take_both_and_their_details_are_kept(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a ring")
    dark = "{type: tests.scorers.Dims}"
    looks = "candidates: 2, potential: {type: tests.scorers.Brightness}, looks: [0.5], enough: 0"
    settings = [f"policy.family={FAMILY}", "rewards=[{type: tests.scorers.Bright}]", "rollout.search=parm_plus"]
    settings.append(f"rollout.search_options={{{looks}, reflection: {dark}, rounds: 1}}")
    words = ["evaluate", str(plain), "--engine", "torch", "--prompts", str(tmp_path / "prompts.txt")]
    words += ["--images-per-prompt", "2", "--json", str(tmp_path / "out.json")]
    assert main([*words, *(part for one in settings for part in ("--set", one))]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["conditions"]["rollout.search_options"]["potential"]["type"] == "tests.scorers.Brightness"
    assert {"clear_at", "potential", "round", "drawn"} <= result["images"][0]["details"]["search"].keys()
    suite = SuiteConfig(
        benchmark="shapeworld",
        name="again",
        prompts=str(tmp_path / "prompts.txt"),
        rewards=[judge("Bright")],
        search="parm_plus",
        search_options={"potential": judge("Brightness").model_dump(), "reflection": judge("Dims").model_dump()},
    )
    run = resolve_suites(tiny_run(tmp_path, plain, evaluation={"suites": [suite.model_dump()]}))
    assert preflight(run).longest is None, "no one knows how long its texts will be"
