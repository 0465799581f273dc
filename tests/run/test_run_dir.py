"""Who may write into a run directory: a new run, or the same one that goes on, and one driver at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from stage_ray.errors import ConfigError
from stage_ray.run import digests
from stage_ray.run import run_dir as room
from stage_ray.run.run_dir import open_run_dir
from tests.runs import tiny_run

HOLDER = """
import sys, time
from pathlib import Path
from stage_ray.run.run_dir import run_dir_lock
with run_dir_lock(Path(sys.argv[1]), 0):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    return tiny_run(tmp_path, tmp_path / "janus")


@pytest.fixture
def trained(run):
    """A directory in which a run has done a step."""
    with open_run_dir(run, resume=False) as directory:
        (directory / "metrics.jsonl").write_text('{"step": 1}\n')
    return directory


@pytest.fixture
def other(trained):
    """Another driver, which holds that directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(trained)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()


def opened(run, resume) -> Path:
    with open_run_dir(run, resume) as directory:
        return directory


def test_a_run_is_not_written_over(run, trained):
    with pytest.raises(ConfigError, match="already holds a run; add --resume to go on with it"):
        opened(run, resume=False)
    assert opened(run, resume=True) == opened(run, resume="auto") == trained


def test_a_run_may_go_on_with_other_workers_of_a_scorer_and_not_with_another_weight(tmp_path, run, trained):
    own = {"workers": 3, "groups_per_call": 2, "resources": {"reward": 1}, "runtime_env": {"env_vars": {"DEBUG": "1"}}}
    more = run.rewards[0].model_dump() | own
    assert opened(tiny_run(tmp_path, tmp_path / "janus", rewards=[more]), resume=True) == trained
    with pytest.raises(ConfigError, match=r"--resume: rewards.0.weight was 1.0 in .* and is 2.0 now"):
        opened(tiny_run(tmp_path, tmp_path / "janus", rewards=[more | {"weight": 2}]), resume=True)


def test_adapters_may_be_exported_otherwise_in_the_end_and_have_the_rank_that_they_began_with(tmp_path):
    def began(resume, **lora) -> Path:
        return opened(tiny_run(tmp_path, tmp_path / "janus", policy={"lora": lora}), resume)

    (began(False, rank=4) / "metrics.jsonl").write_text('{"step": 1}\n')
    assert began(True, rank=4, export="adapters") == began(True, rank=4)
    with pytest.raises(ConfigError, match=r"--resume: policy.lora.rank was 4 in .* and is 8 now"):
        began(True, rank=8)


def test_resuming_with_another_learning_rate_names_the_key(tmp_path, trained):
    with pytest.raises(ConfigError, match=r"--resume: learner.lr was 0.0001 in .* and is 1.0 now"):
        opened(tiny_run(tmp_path, tmp_path / "janus", learner={"lr": 1.0}), resume=True)


def test_a_run_may_be_extended_and_not_shortened_or_changed_otherwise(tmp_path, trained):
    def again(resume="extend", **changes) -> Path:
        return opened(tiny_run(tmp_path, tmp_path / "janus", **changes), resume)

    with pytest.raises(ConfigError, match="steps was 4 .* is 8 now; use the same value, or --extend"):
        again(resume=True, steps=8)
    assert again(steps=8) == trained
    with pytest.raises(ConfigError, match="steps was 8 .* and is 4 now"):
        again(steps=4)
    with pytest.raises(ConfigError, match="rollout.group_size was 4"):
        again(steps=8, rollout={"group_size": 2})
    assert again(steps=9, learner={"lr": 1e-5, "schedule": "constant"}) == trained


def test_a_config_of_before_a_key_was_added_is_read_with_todays_default(run, trained):
    file = trained / "config.yaml"
    saved = yaml.safe_load(file.read_text())
    del saved["prompts"]["too_long"], saved["pipeline"], saved["learner"]["betas"]
    file.write_text(yaml.safe_dump(saved))
    assert opened(run, resume=True) == trained
    file.write_text("steps: [")
    with pytest.raises(ConfigError, match="--resume: .*config.yaml is not readable YAML"):
        opened(run, resume=True)


def test_of_several_prompt_files_each_is_known_again_and_so_is_its_weight(tmp_path):
    def mixed(second: str, weight: float = 1.0):
        files = [{"path": str(tmp_path / "first.txt")}, {"path": str(tmp_path / second), "weight": weight}]
        return tiny_run(tmp_path, tmp_path / "janus", prompts={"train": files})

    for name, text in (("first.txt", "a ring"), ("second.txt", "a cross"), ("moved.txt", "a cross")):
        (tmp_path / name).write_text(text)
    directory = opened(mixed("second.txt"), resume=False)
    (directory / "metrics.jsonl").write_text('{"step": 1}\n')
    assert {"prompts.train.0.path", "prompts.train.1.path"} <= json.loads((directory / "inputs.json").read_text())[
        "digests"
    ].keys()
    assert opened(mixed("moved.txt"), resume=True) == directory
    with pytest.raises(ConfigError, match=r"--resume: prompts.train.1.weight was 1.0 in .* and is 2.0 now"):
        opened(mixed("moved.txt", 2.0), resume=True)
    with pytest.raises(ConfigError, match=r"--resume: prompts.train.1.path = .* holds other prompts"):
        opened(mixed("first.txt"), resume=True)


def test_the_same_prompts_may_lie_elsewhere_and_others_in_their_place_are_refused(tmp_path, run, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (tmp_path / "prompts.txt").read_text()
    (tmp_path / "moved.txt").write_text(text)
    for train in ("./prompts.txt", "moved.txt"):
        other = tiny_run(tmp_path, tmp_path / "janus", prompts={"train": train, "heldout": "prompts.txt"})
        assert opened(other, resume=True) == trained
    (tmp_path / "others.txt").write_text("a photo of a circle")
    other = tiny_run(tmp_path, tmp_path / "janus", prompts={"train": "others.txt", "heldout": "prompts.txt"})
    with pytest.raises(ConfigError, match="--resume: prompts.train = 'others.txt' holds other prompts"):
        opened(other, resume=True)
    (tmp_path / "prompts.txt").write_text(text + "one more\n")
    with pytest.raises(ConfigError, match="--resume: prompts.* holds other prompts than when the run began"):
        opened(run, resume="auto")
    (tmp_path / "prompts.txt").write_text(text)
    assert opened(run, resume="auto") == trained


@pytest.fixture
def with_model(tmp_path, plain):
    """A run of a model, a scorer's directory and a scorer's file that lie here: key -> where, and how to begin it."""
    places = {"policy.path": tmp_path / "plain", "rewards.0.options.path": tmp_path / "clip"}
    for place in places.values():
        shutil.copytree(plain, place)
        (place / "tokenizer.json").write_text("{}")
    places["rewards.0.options.head"] = tmp_path / "head.npz"
    places["rewards.0.options.head"].write_bytes(b"one")

    def begin(resume, **moved: Path) -> Path:
        where = {
            key.rpartition(".")[2] if "options" in key else "model": place for key, place in places.items()
        } | moved
        options = {"path": str(where["path"]), "head": str(where["head"]), "cache": str(tmp_path / "cache")}
        return opened(tiny_run(tmp_path, where["model"], options=options), resume)

    (tmp_path / "cache").mkdir()
    (begin(False) / "metrics.jsonl").write_text('{"step": 1}\n')
    return places, begin


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("policy.path", "model.safetensors"),
        ("policy.path", "tokenizer.json"),
        ("policy.path", "added.jinja"),
        ("rewards.0.options.path", "config.json"),
        ("rewards.0.options.head", ""),
    ],
)
def test_other_files_in_the_place_of_a_model_or_a_scorer_are_refused_by_the_key(with_model, key, file):
    places, begin = with_model
    path = places[key] / file
    before = path.read_bytes() if path.exists() else b""
    path.write_bytes(before + b" ")
    with pytest.raises(
        ConfigError, match=f"--resume: {key} = '{places[key]}' holds other files than when the run began"
    ):
        begin(True)


def test_the_same_models_may_lie_elsewhere_and_what_a_scorer_writes_may_change(with_model, tmp_path):
    places, begin = with_model
    moved = {name: tmp_path / f"moved-{name}" for name in ("model", "path")}
    for place in moved.values():
        shutil.copytree(places["policy.path"], place / "plain")
        (place / "plain" / "README.md").write_text("a card")
        (place / "plain" / ".cache").mkdir()
        (place / "plain" / ".cache" / "lock").touch()
    (tmp_path / "cache" / "scores").write_text("1")
    begin(True, **{name: place / "plain" for name, place in moved.items()})


def test_a_long_read_is_announced(run, monkeypatch):
    said = []
    monkeypatch.setattr(digests, "NOTED_BYTES", 10)
    with open_run_dir(run, resume=False, note=said.append):
        assert said and said[0].startswith("reading 0.0 GiB of models and prompts")


@pytest.mark.parametrize("name", ["lost+found", ".snapshot", ".nfs0001", ".lock", "config.yaml.tmp"])
def test_what_is_nobodys_does_not_make_a_directory_used(tmp_path, run, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).touch()
    assert opened(run, resume=False) == tmp_path / "run"


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for path, why in {"file/run": "cannot be written: Not a directory", "link": "is a link to nothing"}.items():
        run = tiny_run(tmp_path, tmp_path / "janus", run_dir=str(tmp_path / path))
        with pytest.raises(ConfigError, match=f"run_dir .*{why}"):
            opened(run, resume=False)


def test_a_directory_on_a_read_only_disk_is_one_sentence(run, monkeypatch):
    def refuses(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(room.tempfile, "TemporaryFile", refuses)
    with pytest.raises(ConfigError, match="cannot be written: Read-only file system"):
        opened(run, resume=False)


def test_home_is_written_out_and_a_variable_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert tiny_run(tmp_path, tmp_path / "janus", run_dir="~/runs/x").run_dir == "/home/me/runs/x"
    for text in ("$HOME/x", "/data/${USER}/x"):
        with pytest.raises(ConfigError, match=r"run_dir = .*: \$ is no variable here"):
            tiny_run(tmp_path, tmp_path / "janus", run_dir=text)


def test_resuming_where_there_is_no_run_is_refused_unless_it_may_begin_one(tmp_path, run):
    with pytest.raises(ConfigError, match="holds no run; leave --resume out to begin one, or use --auto-resume"):
        opened(run, resume=True)
    assert not (tmp_path / "run").exists()
    assert opened(run, resume="auto") == tmp_path / "run"


def test_a_directory_of_something_else_is_left_as_it_is(tmp_path, run):
    thesis = tmp_path / "run" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.touch()
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        opened(run, resume="auto")
    assert list(thesis.parent.iterdir()) == [thesis]


def test_a_run_that_another_driver_holds_is_refused_and_the_driver_named(run, trained, other):
    before = (trained / "config.yaml").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=f"in use by process {other.pid} on .*; let that end first"):
        opened(run, resume=True)
    assert (trained / "config.yaml").stat().st_mtime_ns == before


def test_a_driver_that_was_killed_holds_nothing(run, trained, other):
    other.kill()
    other.wait()
    assert opened(run, resume=True) == trained
    assert (trained / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_storage_that_knows_no_locks_is_used_with_a_warning(run, trained, monkeypatch, caplog):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert opened(run, resume=True) == trained
    assert f"{trained} cannot be locked" in caplog.text and "let no second run write into it" in caplog.text


def test_a_job_that_is_started_again_waits_for_the_one_before_it_to_leave(run, trained, other, monkeypatch):
    with pytest.raises(ConfigError, match="in use by"):
        monkeypatch.setattr(room, "RETRY_WAIT_S", 0.7)
        opened(run, resume="auto")
    monkeypatch.setattr(room, "RETRY_WAIT_S", 30.0)
    threading.Timer(0.7, other.send_signal, [signal.SIGKILL]).start()
    assert opened(run, resume="auto") == trained
