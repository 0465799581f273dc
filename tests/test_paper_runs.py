"""The paper's runs: each shipped config trains two steps on small models of the same classes, through real vLLM."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from stage_ray.cli import main
from stage_ray.config.inputs import hub_inputs, leaves
from stage_ray.config.load import load_config, validate_config
from stage_ray.config.shipped import shipped_configs
from stage_ray.evaluation.base import find_benchmark
from stage_ray.evaluation.suites import resolve_suites
from stage_ray.pipeline.geneval_prompts import geneval_prompts
from stage_ray.records import Prompt
from stage_ray.rewards import build_rewards
from stage_ray.rewards.build import REWARDS
from stage_ray.train import train
from tests.chaos import audited
from tests.pages import README, ROOT, text
from tests.rewards.checkpoints import save_clip, save_git, save_grounding, save_hps, save_mask2former
from tests.runs import lines

RUNS = ("geneval", "hps_gdino_git", "ocr")
NAMES = [f"janus_pro_{size}_{run}" for size in ("7b", "1b") for run in RUNS]
SIZES = {"policy.path", "run_dir", "rollout.workers", "rollout.images_per_batch", "learner.ranks"}
SIZES |= {"rollout.gpu_memory_utilization"}

# Lines in the published formats, about what small random models find in noise: Flow-GRPO's prompts for GenEval (the
# released data have None where a record has no such key), T2I-R1's, Flow-GRPO's with a text to be read.
OBJECTS = [
    {"tag": "counting", "include": [{"class": "laptop", "count": 3}], "prompt": "a photo of three laptops"},
    {"tag": "two_object", "include": [{"class": "laptop", "count": 1, "color": None}, {"class": "book", "count": 1}],
     "prompt": "a photo of a laptop and a book"},
    {"tag": "position", "prompt": "a photo of a laptop left of a book",
     "include": [{"class": "book", "count": 1}, {"class": "laptop", "count": 1, "position": ["left of", 0]}]},
    {"tag": "colors", "prompt": "a photo of a red book",
     "include": [{"class": "book", "count": "1", "color": "red", "position": None}]},
]  # fmt: skip
MIX = [
    {"prompt": "a photo of a car below a zebra", "nouns": ["car", "zebra"], "task_type": "spatial",
     "spatial_info": {"obj1": "car", "obj2": "zebra", "locality": "below"}},
    {"prompt": "a photo of four cups", "nouns": ["cup"], "task_type": "numeracy",
     "numeracy_info": [{"obj_name": "cup", "num": 4}]},
    {"prompt": "a red car and a stuffed teddy bear", "nouns": ["car", "teddy bear"], "task_type": "color",
     "attr_nouns": ["red car", "stuffed teddy bear"]},
    {"prompt": "a zebra", "nouns": ["zebra"], "attr_nouns": None, "spatial_info": None, "task_type": "object"},
]  # fmt: skip
SIGNS = ['A platform sign that reads "1"', 'A bus with "e" on its side, close-up', 'A wall that says "1", graffiti']

SMALL = [
    "steps=2", "rollout.groups_per_step=2", "rollout.group_size=3", "rollout.images_per_batch=6", "rollout.workers=1",
    "rollout.gpus=0", "rollout.dtype=float32", "rollout.cpus=0.5", "rollout.threads=1",
    "rollout.max_prompt_tokens=96", "scoring.workers=1", "scoring.gpus=0", "scoring.cpus=0.5", "learner.ranks=1",
    "learner.gpus=0", "learner.cpus=0.5", "learner.threads=1", "learner.autocast=off", "learner.micro_batch_images=6",
    "evaluation.every=1", "evaluation.images_per_prompt=1", "evaluation.sample_prompts=2",
    "cluster.metrics_port=null", "cluster.object_store_mb=128",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are given: a user's copies of the prompts, where the configs look for them."""
    home = tmp_path_factory.mktemp("home")
    files = {
        "data/geneval_and_t2i_data_final.json": map(json.dumps, MIX),
        "dataset/ocr/train.txt": SIGNS,
        "dataset/ocr/test.txt": SIGNS[:1],
        "train_metadata.jsonl": map(json.dumps, OBJECTS),
        "test_metadata.jsonl": map(json.dumps, geneval_prompts("geneval:test")[::250]),
    }
    for name, content in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("\n".join(content))
    return home


@pytest.fixture(scope="module")
def scorers(home: Path) -> dict[str, list[str]]:
    """By a scorer, the overrides of its options that lead to small checkpoints, in which it finds something."""
    file, architecture, _ = save_hps(home / "hps")
    clip, mask2former = save_clip(home / "clip"), save_mask2former(home / "mask2former")
    detector = f"path={mask2former} clip={clip} min_confidence=0.008".split()
    return {
        "geneval": [
            *(f"detector_options.{option}" for option in detector),
            "threshold=0.0083",
            "counting_threshold=0.0083",
        ],
        "hps": [f"path={file}", f"processor={architecture}"],
        "grounding": [f"path={save_grounding(home / 'grounding')}", "threshold=0.05"],
        "git_vqa": [f"path={save_git(home / 'git')}"],
        "ocr": ["text_score=0"],
        "clip": [f"path={clip}"],
    }


def at(key: str, rewards, scorers: dict[str, list[str]]) -> list[str]:
    """Overrides of the options of every scorer in the list at a key."""
    return [
        f"{key}.{number}.options.{option}" for number, reward in enumerate(rewards) for option in scorers[reward.type]
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
@pytest.mark.parametrize("name", [f"janus_pro_7b_{run}" for run in RUNS])
def test_a_run_of_the_paper_trains_two_steps(name, home, scorers, model, tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.chdir(home)
    written = load_config(name)
    overrides = [*SMALL, f"policy.path={model}", *at("rewards", written.rewards, scorers)]
    if written.prompts.train == "geneval:train":
        overrides += ["prompts.train=train_metadata.jsonl", "prompts.heldout=test_metadata.jsonl"]
    if written.evaluation.suites:
        suite, rewards = "evaluation.suites.0", find_benchmark(written.evaluation.suites[0].benchmark).rewards
        overrides += [f"{suite}.prompts=test_metadata.jsonl", f"{suite}.images_per_prompt=1"]
        overrides += [f"{suite}.rewards=[{{type: {reward.type}}}]" for reward in rewards]
        overrides += at(f"{suite}.rewards", rewards, scorers)
    run = load_config(name, overrides, run_dir=tmp_path / "run")
    assert run.rollout.engine == "vllm"
    summary = train(run)

    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert all(math.isfinite(row[f"reward/{reward.column}"]) for reward in run.rewards)
        assert row["groups/dropped"] == 0 and row["mismatch/abs_logprob"] < 1e-3 and row["staleness/max"] == 0
    assert max(row["grad_norm"] for row in rows) > 0 and max(row["reward/std"] for row in rows) > 0
    audit = audited(tmp_path / "run", ended=True)
    assert audit.sound and audit.trained == 4
    assert None not in (summary.before, summary.after, summary.best)  # evaluated before, after and between
    assert (tmp_path / "run" / "best" / "model.safetensors").exists() and summary.report.exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_accepted_by_a_dry_run_where_its_prompts_lie(name, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    few = ["--set", "prompts.train=geneval:train:50"] if name.endswith("geneval") else []
    assert main(["train", name, "--dry-run", *few]) == 0
    said, run = capsys.readouterr().out, resolve_suites(load_config(name))
    wanted = [key for key in hub_inputs(run) if key != "policy.reference"]
    assert len(wanted) == {"geneval": 3, "hps_gdino_git": 7, "ocr": 1}[name[13:]]  # so fetch gets them
    assert all(f"would be fetched: {key} = " in said for key in wanted)


@pytest.mark.parametrize("run", RUNS)
def test_the_small_model_differs_in_what_its_size_asks_for(run):
    large, small = (leaves(load_config(f"janus_pro_{size}_{run}").model_dump(mode="json")) for size in ("7b", "1b"))
    assert large.keys() == small.keys()
    assert {key for key in large if large[key] != small[key]} <= SIZES


@pytest.mark.parametrize(
    ("name", "lr", "beta", "images", "entropy"),
    [("geneval", 5e-6, 0.03, 64, 0.4), ("hps_gdino_git", 1e-6, 0.01, 128, 0.0), ("ocr", 1e-6, 0.01, 64, 0.0)],
)
def test_hyper_parameters_are_the_papers(name, lr, beta, images, entropy):
    for size in ("7b", "1b"):
        run = load_config(f"janus_pro_{size}_{name}")
        rollout, learner, algorithm = run.rollout, run.learner, run.algorithm.model_dump()
        assert (learner.lr, algorithm["beta"], algorithm["entropy_reward"]) == (lr, beta, entropy)
        assert rollout.group_size == 8 and rollout.group_size * rollout.groups_per_step == images
        assert (run.steps, run.seed, run.checkpoint.every, run.recipe) == (1600, 20, 100, "stage")
        assert (rollout.guidance_scale, rollout.temperature, rollout.top_k, rollout.top_p) == (5.0, 1.0, 0, 1.0)
        assert (learner.betas, learner.schedule, learner.warmup_steps) == ((0.9, 0.999), "linear", 0)
        assert (learner.max_grad_norm, learner.weight_decay, run.algorithm.advantage_eps) == (1.0, 0.0, 1e-4)
        assert algorithm["reweight_advantage"] and algorithm["reweight_kl"] and run.policy.template == "paper"
        assert {reward.weight for reward in run.rewards} == {1.0} and run.pipeline.max_staleness == 0
        assert run.algorithm.drop_constant == (name != "hps_gdino_git")


@pytest.mark.parametrize("name", NAMES)
def test_the_split_of_gpus_is_the_one_that_plan_computes(name, capsys):
    run = load_config(name)
    machine = ["--gpu", "h100", "--gpus", "8"] if "7b" in name else ["--gpu", "a100-40gb", "--gpus", "4"]
    groups = ["--groups-per-step", str(run.rollout.groups_per_step)]
    assert main(["plan", "--model", name[:12].replace("_", "-"), *machine, *groups, "--yaml"]) == 0
    plan = validate_config(yaml.safe_load(capsys.readouterr().out))
    spare = plan.scoring.workers * (run.scoring.gpus == 0)  # where no scorer has a GPU, rollout takes it
    assert run.rollout.workers == plan.rollout.workers + spare and run.learner.ranks == plan.learner.ranks
    assert run.rollout.images_per_batch <= plan.rollout.images_per_batch
    assert run.rollout.gpu_memory_utilization <= plan.rollout.gpu_memory_utilization
    assert run.learner.micro_batch_images == plan.learner.micro_batch_images
    assert {run.rollout.gpus, run.learner.gpus, plan.rollout.gpus, plan.learner.gpus} == {1.0}
    asked = run.rollout.workers + run.scoring.workers * run.scoring.gpus + run.learner.ranks
    assert f"# Needs {asked:g} GPUs of {'80' if '7b' in name else '40'} GB, as `stage-ray plan`" in (
        shipped_configs()[name].read_text()
    )


def test_the_table_of_scorers_names_each():
    rows = re.findall(r"^\| `(\w+)`", (ROOT / "stage_ray/rewards/README.md").read_text(), flags=re.MULTILINE)
    assert sorted({*rows} - {"type"}) == REWARDS.names()


def test_clip_hps_and_geneval_of_the_readme_score_a_picture_together(home, scorers, monkeypatch, capsys):
    (block,) = [block for block in re.findall(r"```yaml\n(.*?)```", text(README), flags=re.DOTALL) if "hps" in block]
    (home / "mine.yaml").write_text(block)
    monkeypatch.chdir(home)
    assert main(["train", "mine.yaml", "--dry-run", "--set", "prompts.train=geneval:train:50"]) == 0
    assert "scorers geneval, hps, clip\n" in capsys.readouterr().out
    rewards = load_config("mine.yaml").rewards
    rewards = load_config("mine.yaml", at("rewards", rewards, scorers)).rewards
    record = geneval_prompts("geneval:test")[0]
    image = np.random.default_rng(0).integers(256, size=(1, 32, 32, 3), dtype=np.uint8)
    for _, scorer in build_rewards(rewards):
        assert scorer.score(image, [Prompt(0, record["prompt"], record)]).valid.all()
