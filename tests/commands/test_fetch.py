"""Models, scorers and prompts of a hub: pinned to a commit, fetched once, used without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants, hf_api

from stage_ray import train as loop
from stage_ray.cli import main
from stage_ray.commands.job import plan_job
from stage_ray.config.inputs import pin
from stage_ray.config.load import validate_config
from stage_ray.errors import ConfigError
from stage_ray.policies import policy_class
from stage_ray.train import train
from tests.hub import Hub, served
from tests.plain import FAMILY
from tests.runs import PROMPTS

MODEL, DATA = "models/me/plain", "datasets/me/prompts"
TAGGED, NEWEST = "a photo of a red circle\n", "a photo of two rings\n"


@pytest.fixture(scope="module")
def hub(tmp_path_factory, plain) -> Hub:
    """A hub with two commits of a model and of prompts: v1, and a newer main."""
    directory = tmp_path_factory.mktemp("hub")
    newer = Path(shutil.copytree(plain, directory / "plain"))
    (newer / "vocabulary.txt").write_text("new")
    with served() as hub:
        hub.commit(MODEL, plain, "v1")
        hub.commit(MODEL, newer, "main")
        hub.commit("models/me/gated", plain, "main")
        hub.gated.add("models/me/gated")
        for text, name in ((TAGGED, "v1"), (NEWEST, "main")):
            (directory / name).mkdir()
            (directory / name / "train.txt").write_text(text)
            hub.commit(DATA, directory / name, name)
        yield hub


@pytest.fixture
def online(hub, tmp_path, monkeypatch) -> Hub:
    """This process asks that hub and no other, from an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hf_api.api, "endpoint", hub.address)
    hub.asked.clear()
    return hub


@pytest.fixture
def offline(monkeypatch):
    """From its call on, as with HF_HUB_OFFLINE=1, which is read when the library is imported."""
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def config(tmp_path) -> Path:
    """A run whose model and prompts come from the hub, at v1."""
    data = {
        "steps": 2,
        "run_dir": str(tmp_path / "run"),
        "policy": {"path": "me/plain@v1", "family": FAMILY},
        "prompts": {"train": "hf://datasets/me/prompts@v1/train.txt"},
        "rewards": [{"type": "tests.scorers.Brightness"}],
        "rollout": {"engine": "torch"},
        "evaluation": {"enabled": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture
def trained(monkeypatch):
    """Runs a config up to the start of Ray: the config as the workers would get it."""
    seen = []

    async def no_steps(run, run_dir, *_: object) -> tuple[None, None]:
        (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
        seen.append(run)
        return None, None

    monkeypatch.setattr(loop, "_train", no_steps)
    monkeypatch.setattr("stage_ray.report.report.write_report", lambda run_dir: run_dir / "report.html")

    def run(config: Path, *overrides: str, resume=False):
        train(validate_config(yaml.safe_load(config.read_text()), list(overrides)), resume=resume)
        return seen[-1]

    return run


def dry_run(config: Path, *overrides: str) -> int:
    return main(["train", str(config), "--dry-run", "--strict", *(part for o in overrides for part in ("--set", o))])


def commit(hub: Hub, repository: str, name: str) -> str:
    return hub.revisions[repository, name]


def test_what_was_fetched_serves_a_run_without_a_network(online, offline, config, trained, capsys):
    assert main(["fetch", str(config)]) == 0
    said = capsys.readouterr().out
    for key, repository in (("policy.path = me/plain@v1", MODEL), ("prompts.train = me/prompts@v1", DATA)):
        assert f"{key}: commit {commit(online, repository, 'v1')}, " in said
    online.asked.clear()
    offline()
    assert dry_run(config) == 0
    printed = capsys.readouterr().out
    assert "1 to train on" in printed and f"snapshots/{commit(online, MODEL, 'v1')}" in printed
    run = trained(config)
    assert policy_class(run.policy).load_codec(run.policy, device=None).location.name == commit(online, MODEL, "v1")
    assert not online.asked


def test_one_of_several_prompt_files_may_come_from_the_hub(online, config, trained, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("a photo of a cross")
    files = f"prompts.train=[{{path: {tmp_path / 'own.txt'}}}, {{path: 'hf://datasets/me/prompts@v1/train.txt'}}]"
    assert dry_run(config, files) == 2
    assert "would be fetched: prompts.train.1.path = me/prompts@v1;" in capsys.readouterr().err
    assert main(["fetch", str(config), "--set", files]) == 0
    assert f"prompts.train.1.path = me/prompts@v1: commit {commit(online, DATA, 'v1')}" in capsys.readouterr().out
    assert dry_run(config, files) == 0
    assert "(weight 1), 1 of hf://" in capsys.readouterr().out
    pinned = f"hf://datasets/me/prompts@{commit(online, DATA, 'v1')}/train.txt"
    assert [file.path for file in trained(config, files).prompts.train] == [str(tmp_path / "own.txt"), pinned]


def test_the_command_reads_the_variables_of_the_hub(hub, config, tmp_path):
    env = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "stage_ray", "fetch", str(config), "--set", "policy.path=me/plain"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"policy.path = me/plain: commit {commit(hub, MODEL, 'main')}" in done.stdout
    assert (tmp_path / "hub/models--me--plain/refs/main").read_text() == commit(hub, MODEL, "main")


def test_a_config_of_local_files_has_nothing_to_fetch(capsys):
    assert main(["fetch", str(Path(__file__).parents[2] / "configs/stage_shapeworld.yaml")]) == 0
    assert "nothing to fetch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("policy.path=me/gated", "policy.path: me/gated is gated: accept its terms at http"),
        ("policy.path=me/nothing", "me/nothing is no directory here and was not found on the hub"),
        ("policy.path=me/plain@v9", "me/plain has no revision 'v9' on the hub"),
        ("prompts.train=hf://datasets/me/prompts/other.txt", "the repository has no other.txt"),
        ("prompts.train=hf://datasets/me/prompts@v9/train.txt", "prompts.train: me/prompts has no revision 'v9'"),
    ],
)
def test_what_the_hub_does_not_give_is_one_sentence(online, config, trained, override, sentence, capsys):
    assert main(["fetch", str(config), "--set", override]) == 1
    said = capsys.readouterr().err
    assert sentence in said and ("HF_TOKEN" in said) == ("gated" in said or "nothing" in said)
    with pytest.raises(ConfigError) as caught:
        trained(config, override)
    assert sentence in str(caught.value) and not (config.parent / "run").exists()


@pytest.mark.parametrize("value", ["hf://buckets/me/things", "hf://me", "hf://datasets/me/prompts@/train.txt"])
def test_a_location_that_names_no_repository_is_refused(config, value, capsys):
    assert dry_run(config, f"prompts.train={value}") == 2
    assert value in capsys.readouterr().err


def test_offline_and_not_in_the_cache_names_key_id_and_what_to_do(online, offline, config, trained):
    offline()
    for override, name in (("steps=2", "me/plain@v1"), ("policy.path=me/plain@" + "0" * 40, "me/plain@000")):
        with pytest.raises(ConfigError) as caught:
            trained(config, override, "prompts.train=package:stage_ray/shapeworld/assets/prompts/train.jsonl")
        assert str(caught.value).startswith(f"policy.path: {name}") and "`stage-ray fetch CONFIG`" in str(caught.value)


def test_what_is_not_in_the_cache_is_listed_with_its_revision_and_nothing_is_asked(online, config, capsys):
    assert dry_run(config, "policy.path=me/plain") == 2
    said = capsys.readouterr().err
    assert "would be fetched: prompts.train = me/prompts@v1; policy.path = me/plain (newest)" in said
    assert not online.asked


def test_a_cache_that_holds_a_part_of_a_model_is_completed(online, config, trained, capsys):
    huggingface_hub.hf_hub_download("me/plain", "config.json", revision="v1")  # as transformers' AutoConfig leaves it
    assert dry_run(config) == 2
    assert "policy.path = me/plain@v1" in capsys.readouterr().err
    trained(config)
    assert dry_run(config) == 0


def test_on_a_cluster_elsewhere_its_nodes_fetch_the_model_and_the_driver_only_its_commit(
    online, config, trained, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    assert trained(config).policy.path == f"me/plain@{commit(online, MODEL, 'v1')}"
    assert not list((tmp_path / "cache/models--me--plain").rglob("*.safetensors"))


def test_every_worker_gets_the_commit_with_which_the_run_began(online, config, trained, tmp_path, plain):
    newest, tagged = commit(online, MODEL, "main"), commit(online, MODEL, "v1")
    unpinned = ("policy.path=me/plain", "prompts.train=hf://datasets/me/prompts/train.txt")
    run = trained(config, *unpinned)
    assert run.policy.path == f"me/plain@{newest}"
    assert run.prompts.train == f"hf://datasets/me/prompts@{commit(online, DATA, 'main')}/train.txt"
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["policy"]["path"] == run.policy.path
    assert json.loads((tmp_path / "run/inputs.json").read_text())["commits"]["me/plain"] == newest

    online.revisions[MODEL, "main"] = tagged  # the branch moves
    try:
        assert trained(config, *unpinned, resume=True).policy.path == f"me/plain@{newest}", "it goes on with its own"
        assert (
            trained(config, f"policy.path=me/plain@{newest}", unpinned[1], resume=True).policy.path == run.policy.path
        )
        with pytest.raises(
            ConfigError, match=f"--resume: policy.path was 'me/plain@{newest}' .* 'me/plain@{tagged}' now"
        ):
            trained(config, "policy.path=me/plain@v1", unpinned[1], resume=True)
        with pytest.raises(ConfigError, match=r"--resume: prompts.train = .* holds other prompts"):
            trained(config, unpinned[0], resume=True)
    finally:
        online.revisions[MODEL, "main"] = newest


def test_a_scorer_of_the_users_own_gets_its_text_as_it_is_unless_it_names_a_revision(online, config):
    data = yaml.safe_load(config.read_text())

    def pinned(kind: str, path: str) -> str:
        rewards = [{"type": kind, "options": {"path": path}}]
        return pin(validate_config(data | {"rewards": rewards}), {})[0].rewards[0].options["path"]

    newest = f"me/plain@{commit(online, MODEL, 'main')}"
    assert pinned("my.Scorer", "me/plain") == "me/plain"
    assert pinned("my.Scorer", "me/plain@main") == pinned("clip", "me/plain") == newest


def test_pictures_are_drawn_by_a_model_at_its_revision_and_of_prompts_at_theirs(online, tmp_path):
    options = ["--set", f"policy.family={FAMILY}", "--set", "rollout.dtype=float32", "--set", "rollout.engine=torch"]
    options += ["--images", "1", "--out", str(tmp_path / "out")]
    prompts = "hf://datasets/me/prompts@v1/train.txt"
    assert main(["generate", "me/plain@v1", "--prompts", prompts, *options]) == 0
    assert (tmp_path / "out" / "0000-0.png").exists()
    revisions = {MODEL: commit(online, MODEL, "v1"), DATA: commit(online, DATA, "v1")}
    for repository, used in revisions.items():
        folder = tmp_path / "cache" / repository.replace("/", "--") / "snapshots"
        assert [path.name for path in folder.iterdir()] == [used]


def test_a_job_is_sent_without_what_its_nodes_fetch(config, tmp_path):
    job = plan_job(config, run_dir=tmp_path / "run", image_has_code=True)
    assert job.files == {config.name: config}


def test_a_revision_as_a_key_of_its_own_is_refused_with_its_place(config, capsys):
    for key in ("policy.revision=v1", "rewards=[{type: clip, options: {path: me/clip, revision: v1}}]"):
        assert dry_run(config, key, "prompts.train=package:stage_ray/shapeworld/assets/prompts/train.jsonl") == 2
        assert "stands behind the name of a repository: OWNER/NAME@REVISION" in capsys.readouterr().err


def test_a_directory_goes_before_a_repository_of_the_same_name(online, config, tmp_path, plain, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(plain, tmp_path / "me" / "plain@v1")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    assert dry_run(config, f"prompts.train={prompts}") == 0
    assert not online.asked
