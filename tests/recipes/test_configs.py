"""Every shipped config trains: its own engine, scorers and recipe on ShapeWorld, two steps in this process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from stage_ray.config import RewardConfig
from stage_ray.config.load import load_config
from stage_ray.engines import build_engine
from stage_ray.engines.base import ImageEngine
from stage_ray.learner.learner import Learner
from stage_ray.pipeline.prompt_files import load_prompts
from stage_ray.recipes import RECIPES
from stage_ray.records import RolloutRequest, image_seeds
from stage_ray.rewards import build_rewards, score_groups

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/*_shapeworld.yaml"))
CONFIGS = [path for path in CONFIGS if not path.name.startswith("study_")]
SMALL = ["rollout.engine=torch", "rollout.groups_per_step=2", "rollout.group_size=4", "learner.micro_batch_images=8"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def engine() -> Iterator[ImageEngine]:
    run = load_config(CONFIGS[0], SMALL)
    engine = build_engine(run.policy, run.rollout, worker="test")
    yield engine
    engine.close()


@cache
def scorer(reward: str) -> object:
    """Built once for all configs, from its JSON."""
    return build_rewards([RewardConfig.model_validate_json(reward)])[0]


def test_every_recipe_has_a_config() -> None:
    assert [path.name.removesuffix("_shapeworld.yaml") for path in CONFIGS] == RECIPES.names()


def test_the_table_of_recipes_names_each_with_its_options_and_defaults() -> None:
    text = (Path(__file__).parents[2] / "stage_ray/recipes/README.md").read_text()
    rows = {cells[1].strip(" `"): cells[4] for line in text.splitlines() if len(cells := line.split("|")) == 7}
    assert sorted(rows.keys() - {"recipe", "---"}) == RECIPES.names()
    for name in RECIPES.names():
        fields = RECIPES.find(name, "recipe").Options.model_fields
        above = RECIPES.find("stage", "recipe").Options.model_fields if "those of `stage`" in rows[name] else {}
        for option, field in fields.items():
            default = {"None": "null", "True": "true", "False": "false", str(1 / 3): "1/3"}.get(
                str(field.default), field.default
            )
            assert option in above or f"`{option}` {default}" in rows[name], name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_two_steps(config: Path, engine: ImageEngine) -> None:
    run = load_config(config, SMALL)
    assert run.recipe == config.name.removesuffix("_shapeworld.yaml") and run.run_dir == f"runs/{config.stem}"
    scorers = [scorer(reward.model_dump_json()) for reward in run.rewards]
    learner, prompts = Learner(run), load_prompts(run.prompts.train)
    moved = []
    for step in range(2):
        engine.load_weights(step, learner.weights())
        asked = [RolloutRequest(2 * step + i, prompts[7 * step + i], image_seeds(run.seed, i, 4)) for i in range(2)]
        groups = engine.generate(asked)
        metrics = learner.update(groups, score_groups(scorers, groups))  # type: ignore[arg-type]
        assert metrics["mismatch/abs_logprob"] < 1e-3 and metrics["groups/dropped"] == 0
        moved.append(metrics["grad_norm"])
    assert learner.version == 2 and max(moved) > 0
