"""Every config that cannot be used is one sentence naming key, value and fix, and exit code 2."""

from pathlib import Path

import pytest
import yaml

from stage_ray.cli import main
from stage_ray.config import RunConfig
from stage_ray.config.load import load_config
from stage_ray.errors import ConfigError

SMALLEST = {
    "steps": 3,
    "prompts": {"train": "train.txt", "heldout": "heldout.txt"},
    "policy": {"path": "model"},
    "rewards": [{"type": "geneval"}],
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    return path


def test_the_smallest_config_is_whole(config: Path) -> None:
    run = load_config(config)
    assert (run.steps, run.rollout.group_size, run.recipe, run.rewards[0].column) == (3, 8, "stage", "geneval")


def test_overrides_reach_sections_and_lists_and_are_yaml(config: Path) -> None:
    overrides = [
        "learner.lr=1e-5",
        "rewards.0.weight=2",
        "algorithm.clip=null",
        "evaluation.enabled=false",
        "run_dir=a b",
    ]
    run = load_config(config, overrides, run_dir=Path("elsewhere"))
    assert (run.learner.lr, run.rewards[0].weight, run.algorithm.clip, run.evaluation.enabled) == (
        1e-5,
        2.0,
        None,
        False,
    )
    assert run.run_dir == "elsewhere", "--run-dir is stronger than --set"


def test_the_weight_of_a_prompt_file_is_a_key_like_any_other(config: Path) -> None:
    run = load_config(config, ["prompts.train=[{path: a}, {path: b, weight: 3}]", "prompts.train.0.weight=2"])
    assert {key: (file.path, file.weight) for key, file in run.prompts.files.items()} == {
        "prompts.train.0.path": ("a", 2.0),
        "prompts.train.1.path": ("b", 3.0),
    }
    assert RunConfig.model_validate(run.model_dump(mode="json")) == run


def test_a_resolved_config_reads_back_the_same(config: Path, tmp_path: Path) -> None:
    run = load_config(config, ["learner.lr=3e-7"])
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    assert load_config(tmp_path / "resolved.yaml") == run


def test_the_shipped_configs_are_valid_and_differ_only_in_the_algorithm() -> None:
    stage, grpo = (load_config(Path(f"configs/{name}_shapeworld.yaml")) for name in ("stage", "grpo"))
    differ = {key for key in RunConfig.model_fields if getattr(stage, key) != getattr(grpo, key)}
    assert differ == {"recipe", "algorithm", "run_dir"}
    assert (stage.recipe, grpo.recipe) == ("stage", "grpo")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("leaner.lr=1e-5", "unknown key 'leaner': did you mean 'learner'?"),
        ("learner.learning_rat=1", "unknown key 'learner.learning_rat': known here: "),
        ("rollout.group_sise=4", "unknown key 'rollout.group_sise': did you mean 'rollout.group_size'?"),
        ("rewards.0.wieght=4", "unknown key 'rewards.0.wieght': did you mean 'rewards.0.weight'?"),
        ("rollout.images_per_wave=8", "'rollout.images_per_wave': it is called 'rollout.images_per_batch' now"),
        ("xyzzy=1", "unknown key 'xyzzy': known here: "),
        ("steps=0", "steps = 0: input should be greater than or equal to 1"),
        ("steps=many", "steps = 'many': input should be a valid integer"),
        ("rollout.group_size=1", "rollout.group_size = 1: input should be greater than or equal to 2"),
        ("rollout.guidance_scale=0.5", "rollout.guidance_scale = 0.5: input should be greater than or equal to 1"),
        ("rollout.top_p=1.5", "rollout.top_p = 1.5: input should be less than or equal to 1"),
        ("rollout.engine=sglang", "rollout.engine = 'sglang': input should be 'vllm' or 'torch'"),
        ("learner.lr=.nan", "learner.lr = nan: "),
        ("learner.lr=-1", "learner.lr = -1: input should be greater than 0"),
        ("learner=fast", "learner = 'fast': "),
        ("pipeline.max_staleness=-1", "pipeline.max_staleness = -1: "),
        ("cluster.metrics_port=70000", "cluster.metrics_port = 70000: input should be less than or equal to 65535"),
        ("rewards=[]", "rewards = []: list should have at least 1 item"),
        ("rewards=[{type: clip}, {type: clip}]", "rewards: the name 'clip' is used twice"),
        ("rewards.0.weight=0", "rewards: every weight is 0"),
        (
            "rewards=[{type: clip, workers: 4, max_workers: 2}]",
            "rewards.0.max_workers = 2 is less than rewards.0.workers",
        ),
        ("rewards.0.runtime_env={conda: x}", "unknown key 'rewards.0.runtime_env.conda': known here: "),
        (
            "rewards.0.runtime_env={env_vars: {DEBUG: 1}}",
            "rewards.0.runtime_env.env_vars.DEBUG = 1: input should be",
        ),
        ("prompts.heldout=null", "prompts.heldout is not set"),
        ("prompts.train=[]", "prompts.train = []: list should have at least 1 item"),
        ("prompts.train=3", "prompts.train = 3: input should be a valid list"),
        ("prompts.train=[{path: a, weight: 0}]", "prompts.train.0.weight = 0: input should be greater than 0"),
        ("prompts.train=[{path: a}, {path: b, weight: -1}]", "prompts.train.1.weight = -1: input should be greater"),
        ("prompts.train=[{path: a, weight: .inf}]", "prompts.train.0.weight = inf: "),
        ("prompts.train=[{path: a, wieght: 1}]", "'prompts.train.0.wieght': did you mean 'prompts.train.0.weight'?"),
        ("prompts.train=[{weight: 1}]", "prompts.train.0.path is missing"),
        ("prompts.train.0.weight=2", "--set prompts.train.0.weight: there is no '0' here"),
        ("policy={}", "policy.path is missing"),
        ("learner.lr", "--set 'learner.lr' is not KEY=VALUE"),
        ("=3", "--set '=3' is not KEY=VALUE"),
        ("learner.lr=[1", "'[1' is not a YAML value"),
        ("rewards.7.weight=1", "there is no '7' here"),
        ("rewards.first.weight=1", "lists are indexed from 0"),
        ("steps.every=3", "steps is a value, not a section"),
        ("steps.every.other=3", "there is no 'every' here"),
    ],
)
def test_an_override_that_cannot_be_is_named(
    override: str, said: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(config, [override])
    assert said in str(raised.value)
    assert main(["train", str(config), "--set", override]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("stage-ray: ") and said in printed.err
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        (b"", "holds no mapping"),
        (b"- a\n- b\n", "holds no mapping"),
        (b"steps: [1\n", "is not readable YAML"),
        (b"\xff\xfe\x00", "is not readable YAML"),
        (b"steps: 3\n", "prompts is missing; policy is missing; rewards is missing"),
    ],
)
def test_a_file_that_is_no_config_is_named(
    content: bytes | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.yaml"
    if content is not None:
        path.write_bytes(content)
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert "broken.yaml" in error and said in error and error.count("\n") == 1


def test_a_bare_off_is_not_taken_for_a_boolean():
    config = load_config(Path("configs/stage_shapeworld.yaml"), ["learner.autocast=off"])
    assert config.learner.autocast == "off"


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["mean"], "reward/mean is a metric of its own"),
        (["std"], "reward/std is a metric of its own"),
        (["a-b", "a b"], "'a-b' and 'a b' would share one metric"),
        (["a", "a"], "the name 'a' is used twice"),
        ([" "], "give the scorer another name"),
    ],
)
def test_scorers_whose_names_would_hide_a_metric_are_refused(config: Path, names: list[str], sentence: str) -> None:
    rewards = ", ".join(f"{{type: geneval, name: '{name}'}}" for name in names)
    with pytest.raises(ConfigError, match=sentence):
        load_config(config, [f"rewards=[{rewards}]"])


def test_a_config_goes_on_top_of_its_base_section_by_section(tmp_path: Path) -> None:
    base, middle, top = (tmp_path / name for name in ("base.yaml", "middle.yaml", "sub/top.yaml"))
    base.write_text(Path("configs/grpo_shapeworld.yaml").read_text())
    middle.write_text("base: base.yaml\nlearner:\n  lr: 3.0e-4\n")
    top.parent.mkdir()
    top.write_text("base: ../middle.yaml\nrecipe: gcpo\nrewards:\n  - type: tests.scorers.Brightness\n")
    run, below = load_config(top, ["steps=3"]), load_config(base)
    assert (run.learner.lr, run.recipe, run.steps, len(run.rewards)) == (3e-4, "gcpo", 3, 1)
    assert run.learner.model_copy(update={"lr": below.learner.lr}) == below.learner and run.rollout == below.rollout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: other.yaml", r"config file .*other.yaml, the base of .*top.yaml, does not exist"),
        ("base: top.yaml", r"base = 'top.yaml' is based on it in turn"),
        ("base: 3", r"base = 3 must be the name of a config beside it"),
    ],
)
def test_a_base_that_leads_nowhere_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "top.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "top.yaml")
