"""Prompt transforms: engines draw from what they make, the learner knows it, scorers judge what was asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from stage_ray.config import RolloutConfig
from stage_ray.engines import build_engine
from stage_ray.errors import ConfigError
from stage_ray.learner.learner import Learner
from stage_ray.records import Prompt, RolloutRequest, ScoredGroup
from stage_ray.rewards import score_groups
from stage_ray.rewards.base import RewardOutput
from stage_ray.run.preflight import preflight
from stage_ray.samplers import TRANSFORMS, load_transform
from stage_ray.workers.group_files import group_file, load_group, save_group
from tests.learner_case import PROMPTS, score, tiny_run
from tests.rules import Adjective
from tests.runs import tiny_run as whole_run

OWN = {"prompt_transform": "tests.rules.Adjective"}
TEMPLATE = {"prompt_transform": "template"}


def test_the_template_frames_a_prompt_and_is_off_unless_it_is_named() -> None:
    assert TRANSFORMS.names() == ["template", "tpso"] and load_transform(RolloutConfig()) is None
    transform = load_transform(RolloutConfig(**TEMPLATE))
    assert transform is not None
    framed = transform.apply(Prompt(0, "two {rings}"), seed=1)
    assert (framed.text, framed.drawn) == ("two {rings}", "a photo of two {rings}, high quality")
    assert framed.drawn_text == framed.drawn and Prompt(0, "a ring").drawn_text == "a ring"


@pytest.mark.parametrize(
    ("rollout", "sentence"),
    [
        ({"prompt_transform": "templat"}, "rollout.prompt_transform = 'templat' is no known prompt transform; did you"),
        ({"prompt_transform": "json.loads"}, "is no class that derives from stage_ray.samplers.PromptTransform"),
        ({"prompt_transform": "tests.rules.NoRepeats"}, "is no class that derives from stage_ray.samplers.PromptTr"),
        (
            TEMPLATE | {"prompt_transform_options": {"text": "x"}},
            "rollout.prompt_transform_options.text = 'x' is no op",
        ),
        (TEMPLATE | {"prompt_transform_options": {"template": "a"}}, "prompt_transform_options.template = 'a': "),
        (
            {"prompt_transform_options": {"template": "a"}},
            "prompt_transform_options.template is set, and rollout.prompt",
        ),
    ],
)
def test_a_transform_or_option_that_cannot_be_is_named(rollout: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_transform(RolloutConfig(**rollout))
    assert sentence in str(error.value)


class Reads:
    """A scorer that keeps the texts it was asked about."""

    texts: list[str] = []

    def score(self, images: np.ndarray, prompts: list[Prompt]) -> RewardOutput:
        self.texts += [prompt.text for prompt in prompts]
        return RewardOutput(np.ones(len(images), np.float32), np.ones(len(images), bool), ({},) * len(images))


def test_the_learner_scores_under_what_the_engine_drew_and_scorers_judge_what_was_asked_for(
    model: Path, tmp_path: Path
) -> None:
    rollout = {"engine": "torch", "dtype": "float32", "guidance_scale": 3.0}
    run = tiny_run(model, rollout=rollout | OWN, algorithm={"correction": "none"}, pipeline={"max_staleness": 1})
    requests = [RolloutRequest(i, Prompt(i, text), (i, 20, 30)) for i, text in enumerate(PROMPTS)]
    engine = build_engine(run.policy, run.rollout, worker="test")
    groups = engine.generate(requests)
    assert [group.prompt.drawn.split()[0] for group in groups] == ["bright", "dark", "old"]  # by the first seed
    assert [group.prompt.text for group in groups] == list(PROMPTS)
    plain = build_engine(run.policy, RolloutConfig.model_validate(rollout), worker="test")
    texts = [group.prompt.drawn for group in groups]
    literal = plain.generate([RolloutRequest(i, Prompt(i, text), (i, 20, 30)) for i, text in enumerate(texts)])
    assert all((a.tokens == b.tokens).all() for a, b in zip(groups, literal, strict=True))
    score_groups([("reads", Reads())], groups)
    assert Reads.texts == [text for text in PROMPTS for _ in range(3)]
    scored: list[ScoredGroup] = score(groups)
    for group, said in zip(groups, scored, strict=True):  # as it is recorded for a replay
        save_group(tmp_path, group, said)
        assert load_group(group_file(tmp_path, group.group_id))[0].prompt == group.prompt
    learner = Learner(run)
    metrics = learner.update(groups, scored)
    assert metrics["mismatch/abs_logprob"] == pytest.approx(0.0, abs=1e-4)
    learner = Learner(run)
    asked = [dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, drawn="")) for group in groups]
    assert learner.update(asked, scored)["mismatch/abs_logprob"] > 1e-2


@pytest.mark.parametrize(
    ("rollout", "prompts", "sentence"),
    [
        (OWN, ["a ring", "a secret ring"], "line 2: Adjective makes an empty prompt of 'a secret ring'"),
        (
            TEMPLATE | {"prompt_transform_options": {"template": "{prompt}" + " and a ring" * 100}},
            ["a ring"],
            "which template makes of 'a ring'",
        ),
    ],
)
def test_preflight_names_the_prompt_that_was_made_empty_or_too_long(
    plain: Path, tmp_path: Path, rollout: dict[str, object], prompts: list[str], sentence: str
) -> None:
    run = whole_run(tmp_path, plain, rollout=rollout)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    with pytest.raises(ConfigError) as error:
        preflight(run)
    assert sentence in str(error.value)


def test_an_engine_refuses_a_prompt_that_was_made_empty(plain: Path, tmp_path: Path) -> None:
    run = whole_run(tmp_path, plain, rollout=OWN)
    engine = build_engine(run.policy, run.rollout, worker="test")
    with pytest.raises(ValueError, match="Adjective makes an empty prompt of 'a secret ring'"):
        engine.generate([RolloutRequest(0, Prompt(0, "a secret ring"), (1, 2))])
    assert Adjective(words=("new",)).rewrite(Prompt(0, "ring"), 5) == "new ring"
