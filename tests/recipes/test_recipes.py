"""A config names a recipe; its options are checked before anything starts; a recipe from elsewhere trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stage_ray.cli import main
from stage_ray.config import RunConfig
from stage_ray.config.load import load_config, validate_config
from stage_ray.errors import ConfigError
from stage_ray.learner.learner import Learner
from stage_ray.recipes import RECIPES, load_recipe, resolve_recipe
from stage_ray.recipes.grpo import GrpoRecipe
from stage_ray.recipes.stage import StageRecipe
from stage_ray.registry import Registry
from tests.learner_case import PROMPTS, sample_groups, score, tiny_run

MINE = "tests.recipes.mine.UncertainRecipe"
SWITCHES_OFF = {"reweight_advantage": False, "reweight_kl": False, "entropy_reward": 0.0}


pytestmark = pytest.mark.usefixtures("one_thread")


def run_with(recipe: str = "stage", **algorithm: Any) -> RunConfig:
    return tiny_run(Path("unused"), recipe=recipe, algorithm=algorithm)


def update(run: RunConfig, groups: list[Any]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The metrics of one update, clocks apart, and the weights after it."""
    learner = Learner(run)
    metrics = learner.update(groups, score(groups))
    weights = {name: tensor.clone() for name, tensor in learner.weights()}
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}, weights


def test_a_recipe_is_a_file_of_its_room_and_stage_is_the_default() -> None:
    assert {"grpo", "stage"} <= set(RECIPES.names())
    assert type(load_recipe(run_with())) is StageRecipe and type(load_recipe(run_with("grpo"))) is GrpoRecipe


def test_a_recipe_that_builds_on_another_is_found_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = tmp_path / "room_of_recipes"
    room.mkdir()
    (room / "__init__.py").touch()
    (room / "plain.py").write_text("class PlainRecipe: ...\n")
    (room / "better.py").write_text(
        "from room_of_recipes.plain import PlainRecipe\n\nclass BetterRecipe(PlainRecipe): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("room_of_recipes", "Recipe", "recipe")
    assert registry.names() == ["better", "plain"]
    assert registry.find("better", "recipe").__name__ == "BetterRecipe"


def test_the_options_of_a_recipe_have_its_defaults_and_are_numbers_whatever_yaml_made_of_them() -> None:
    assert load_recipe(run_with()).options.model_dump() == {
        "beta": 0.03,
        "reweight_advantage": True,
        "reweight_kl": True,
        "entropy_reward": 0.4,
        "entropy_best_only": True,
        "kl_floor": 0.5,
        "kl_slope": 0.5,
        "weight_cap": None,
        "progressive": False,
        "drop_silent_kl": False,
        "kl_follows_lr": False,
        "entropy_penalty": 0.0,
    }
    assert load_recipe(run_with("grpo", beta="1e-3")).options.model_dump() == {"beta": 0.001}


def test_a_resolved_run_names_every_option_and_resolves_to_itself() -> None:
    resolved = resolve_recipe(run_with(beta=0.1))
    algorithm = resolved.model_dump(mode="json")["algorithm"]
    assert (algorithm["beta"], algorithm["entropy_reward"], algorithm["drop_constant"]) == (0.1, 0.4, True)
    assert resolve_recipe(validate_config(yaml.safe_load(yaml.safe_dump(resolved.model_dump(mode="json"))))) == resolved


@pytest.mark.parametrize(
    ("recipe", "algorithm", "said"),
    [
        ("stage", {"betta": 0.1}, "algorithm.betta = 0.1 is no option of recipe stage: did you mean 'algorithm.beta'?"),
        (
            "grpo",
            {"ratio_cup": 2},
            "algorithm.ratio_cup = 2 is no option of recipe grpo: did you mean 'algorithm.ratio_c",
        ),
        (
            "grpo",
            {"xyzzy": 1},
            "algorithm.xyzzy = 1 is no option of recipe grpo: known here: advantage_eps, beta, clip",
        ),
        (
            "grpo",
            {"entropy_reward": 0.4},
            "algorithm.entropy_reward = 0.4 is no option of recipe grpo: it belongs to recipe stage; remove it, or set "
            "recipe=stage",
        ),
        ("stage", {"beta": -1}, "algorithm.beta = -1: input should be greater than or equal to 0"),
        ("stage", {"beta": "much"}, "algorithm.beta = 'much': input should be a valid number"),
        ("grpo", {"beta": float("nan")}, "algorithm.beta = nan: input should be a finite number"),
        ("grppo", {}, "recipe = 'grppo' is no known recipe; did you mean 'grpo'?"),
        ("tests.recipes.mine.UncertainOptions", {}, "is no class that derives from stage_ray.recipes.base.Recipe"),
        (MINE, {"share": 2}, "algorithm.share = 2: input should be less than or equal to 1"),
        (MINE, {"beta": 0.1}, "it belongs to recipe ar_grpo and eg_grpo and gcpo and grpo; remove it, or set"),
    ],
)
def test_what_a_recipe_does_not_take_is_refused_by_name_and_value(recipe: str, algorithm: dict, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(run_with(recipe, **algorithm))
    assert said in str(caught.value)


@pytest.mark.parametrize("dry_run", [["--dry-run"], []])
@pytest.mark.parametrize("override", ["algorithm.betta=1", "algorithm.beta=-1", "recipe=grppo"])
def test_a_run_with_an_impossible_recipe_ends_with_code_2_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, dry_run: list[str]
) -> None:
    run_dir = tmp_path / "run"
    command = ["train", "configs/stage_shapeworld.yaml", "--set", override, "--run-dir", str(run_dir), *dry_run]
    assert main(command) == 2
    assert override.partition("=")[0] in capsys.readouterr().err.splitlines()[-1]
    assert not run_dir.exists()


def test_the_shipped_configs_name_their_recipe() -> None:
    for name in ("stage", "grpo"):
        run = load_config(Path(f"configs/{name}_shapeworld.yaml"))
        assert run.recipe == name and load_recipe(run).options.beta == 0.03


def test_grpo_is_stage_with_every_switch_off_bit_for_bit(model: Path) -> None:
    groups = sample_groups(Learner(tiny_run(model)).policy, PROMPTS, 4)
    grpo, weights = update(tiny_run(model, recipe="grpo"), groups)
    stage, same = update(tiny_run(model, algorithm=SWITCHES_OFF), groups)
    assert grpo == stage
    assert all(torch.equal(weights[name], same[name]) for name in weights)


@pytest.mark.parametrize("images", [12, 5])
def test_a_recipe_from_outside_the_package_trains(model: Path, images: int) -> None:
    changes = {"rollout": {"guidance_scale": 3.0}, "learner": {"micro_batch_images": images}}
    run = tiny_run(model, recipe=MINE, algorithm={"share": 0.25}, **changes)
    groups = sample_groups(Learner(run).policy, PROMPTS, 4)
    metrics, _ = update(run, groups)
    assert metrics["uncertain/share"] == pytest.approx(0.25, abs=0.02) and metrics["uncertain/step"] == 0.0
    assert 0 < metrics["uncertain/bonus"] < 4 and metrics["grad_norm"] > 0
    whole, _ = update(run.model_copy(update={"learner": tiny_run(model).learner}), groups)
    assert metrics == pytest.approx(whole, rel=1e-4, abs=1e-5)  # any cut into micro-batches is the same update
