"""A study trains what is missing, gives each arm its own best value, and ends with a page."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from stage_ray.cli import main
from stage_ray.config.shipped import shipped_studies
from stage_ray.evaluation.base import find_benchmark
from stage_ray.evaluation.suites import own_suite
from stage_ray.observability.metrics_logger import METRICS_FILE
from stage_ray.observability.progress import Progress
from stage_ray.pipeline.prompt_files import load_prompts
from stage_ray.recipes import RECIPES
from stage_ray.study.config import read_study
from stage_ray.study.places import own_cores
from stage_ray.study.study import Study, follow
from tests.ray_head import free_port
from tests.runs import lines, tiny_run

SEARCH = {"values": [1e-5, 1e-3], "seeds": [1], "set": ["steps=20"]}


@pytest.fixture
def study(tmp_path, plain, monkeypatch) -> Path:
    """A study of two arms and two seeds, one step each on a tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)  # of runs: their scorer
    run = tiny_run(
        tmp_path,
        plain,
        steps=1,
        evaluation={"sample_every": 1000, "images_per_prompt": 1, "benchmark": "tests.run.test_suites.LightBenchmark"},
    )
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    return write(tmp_path / "study.yaml")


def write(path: Path, **changes: object) -> Path:
    arms = {"GRPO": {"set": ["recipe=grpo"]}, "STAGE": {}}
    data = {"config": "base.yaml", "dir": "study", "seeds": [2, 3], "arms": arms} | changes
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


@pytest.mark.slow
def test_a_study_that_was_stopped_goes_on_gives_an_arm_the_value_that_its_search_found_and_is_done(study, capsys):
    command = [
        sys.executable,
        "-m",
        "stage_ray",
        "study",
        str(write(study, arms={"STAGE": {}}, seeds=[2], search=SEARCH)),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        metrics = Path("study/search/stage/1e-05/seed-1/metrics.jsonl")
        while not (metrics.exists() and metrics.stat().st_size):  # the first run has done a step
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in said
    assert "stopped by SIGTERM after step" in Path("study/configs/search/stage/1e-05/seed-1.log").read_text()
    assert "steps of 2 runs, 1 at a time (40) ..." in said
    assert "STAGE, steps=20, learner.lr=1e-05, seed 1: what it says is in study/configs/" in said
    capsys.readouterr()
    assert main(["study", str(study)]) == 0
    assert "STAGE, steps=20, learner.lr=0.001, seed 1: done\n" in capsys.readouterr().out
    assert [row["step"] for row in lines(metrics)] == [*range(1, 21)]
    found = json.loads(Path("study/search.json").read_text())["STAGE"]
    assert found["value"] == float(max(found["found"], key=found["found"].get))
    config = yaml.safe_load(Path("study/stage/seed-2/config.yaml").read_text())
    assert config["learner"]["lr"] == found["value"] and config["seed"] == 2
    assert "<h1>STAGE</h1>" in Path("study/study.html").read_text()
    files = {path: path.stat().st_mtime_ns for path in Path("study").rglob("metrics.jsonl")}
    assert len(files) == 2 + 1
    capsys.readouterr()
    assert main(["study", str(study), "--dry-run"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["done"] * 3
    assert main(["study", str(study), "--export", "small"]) == 0
    assert Path("small/stage/seed-2/evaluation/after.json").is_file() and Path("small/search.json").is_file()
    assert main(["study", str(study)]) == 0
    assert files == {path: path.stat().st_mtime_ns for path in Path("study").rglob("metrics.jsonl")}
    numbers = Path("study/study.json").read_text()
    shutil.rmtree("study")
    assert main(["study", str(study), "--kept", "small"]) == 0  # trains nothing, and finds the same
    assert Path("study/study.json").read_text() == numbers and not [*Path("study").rglob("final")]
    assert main(["study", str(study), "--arm", "STAGE", "--seed", "2"]) == 0  # a part has a page of its own
    assert Path("study/study-stage-seed-2.json").read_text() == numbers
    capsys.readouterr()
    assert main(["train", "base.yaml", "--run-dir", "study/stage/seed-2", "--auto-resume"]) == 2
    assert "holds a small copy of a run, without weights" in " ".join(capsys.readouterr().err.split())
    assert main(["study", str(study), "--kept", "study/configs"]) == 2
    assert "holds no small copy of a run; name what --export wrote" in " ".join(capsys.readouterr().err.split())


def test_a_bar_follows_the_steps_of_runs_and_back_where_one_goes_on_after_a_checkpoint(study, monkeypatch):
    monkeypatch.setattr("stage_ray.study.study.LOOK_EVERY_S", 0)
    runs = Study(read_study(study), Progress()).reported["STAGE"]
    moves, recorded = [], [(3, 0), (3, 2), (1, 2)]  # steps of the first and second run, at each look but the first

    def advance(steps: int) -> None:
        moves.append(steps)
        if not recorded:
            raise asyncio.CancelledError
        for run, count in zip(runs, recorded.pop(0), strict=True):
            run.directory.mkdir(parents=True, exist_ok=True)
            (run.directory / METRICS_FILE).write_text('{"step": 1}\n' * count)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(follow(runs, advance))
    assert moves == [0, 3, 2, -2]


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_log(study, capsys):
    write(study, seeds=[2], set=["prompts.train=nothing.txt"])
    assert main(["study", str(study)]) == 1
    assert not Path("study/study.html").exists()
    said = " ".join(capsys.readouterr().err.split())
    assert "the run of GRPO, seed 2 ended with exit code" in said and "study/configs/grpo/seed-2.log" in said


def test_the_example_of_the_rooms_page_is_a_study(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "stage_ray/study/README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL).group(1))
    assert main(["study", "study.yaml", "--dry-run"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 3 * 3 + 3 * 3 and "STAGE without KL, seed 33" in rows[-1]


@pytest.mark.parametrize("name", shipped_studies())
def test_a_shipped_study_reports_2400_images_of_each_arm_and_shares_its_runs_of_stage(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = Study(read_study(name), Progress(), name)
    turn = Study(read_study("study_shapeworld_turn"), Progress())
    shared = name.removeprefix("study_shapeworld_") in ("turn", "ablations", "neighbours")
    assert (study.reported["STAGE"] == turn.reported["STAGE"]) == shared == (study.directory == turn.directory)
    assert bool(study.searched) == (name == "study_shapeworld")
    for runs in study.reported.values():
        suite = own_suite(runs[0].config)
        assert len(runs) * len(load_prompts(suite.prompts)) * suite.images_per_prompt == 2400
        assert runs[0].config.steps == 400 and runs[0].config.recipe in RECIPES.names()
        assert {judge.type for judge in find_benchmark(suite.benchmark).rewards} <= {it.type for it in suite.rewards}


def test_gpus_need_a_cluster_and_a_cluster_must_answer(study, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["study", str(write(study, gpus_per_run=1))]) == 2
    assert "gpus_per_run = 1 needs a Ray cluster" in capsys.readouterr().err
    assert main(["study", str(write(study, address=f"127.0.0.1:{free_port()}"))]) == 1
    assert "no Ray cluster answers at address = '127.0.0.1:" in " ".join(capsys.readouterr().err.split())
    assert not Path("study").exists()


def test_runs_side_by_side_have_cores_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)))
    monkeypatch.setattr("stage_ray.study.places.private_directory", lambda: tmp_path)
    with own_cores(2) as first, own_cores(2) as second, own_cores(3) as of_another_study, own_cores(2) as third:
        assert (first, second, third) == ({0, 1}, {2, 3}, {4, 5})
        assert of_another_study == {*range(7)}, "cores 0 to 2 and 3 to 5 are not all free, one is left: all are shared"
    with own_cores(2) as again:
        assert again == {0, 1}


def test_a_dry_run_lists_what_is_to_do_and_starts_nothing(study, capsys):
    assert main(["study", str(study), "--dry-run"]) == 0
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows] == ["GRPO, seed 2", "STAGE, seed 2", "GRPO, seed 3", "STAGE, seed 3"]
    assert {row[0] for row in rows} == {"to do"} and not Path("study").exists()


@pytest.mark.parametrize(
    ("chosen", "runs"),
    [
        (["--seed", "3"], ["GRPO, seed 3", "STAGE, seed 3"]),
        (["--arm", "STAGE"], ["STAGE, seed 2", "STAGE, seed 3"]),
        (["--arm", "stage", "--arm", "GRPO", "--seed", "2"], ["GRPO, seed 2", "STAGE, seed 2"]),
    ],
)
def test_a_part_of_a_study_has_the_runs_of_its_arms_and_seeds_in_the_order_of_the_file(study, capsys, chosen, runs):
    assert main(["study", str(study), *chosen, "--dry-run"]) == 0
    assert [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()] == runs


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["--seed", "4"], "--seed 4 is none of this study, whose seeds are [2, 3]"),
        (["--arm", "STAG"], "--arm 'STAG' is no arm of this study; did you mean 'STAGE'?"),
        (["--arm", "else"], "--arm 'else' is no arm of this study; known here: GRPO, STAGE"),
    ],
)
def test_an_arm_or_seed_that_a_study_lacks_is_refused(study, capsys, chosen, message):
    assert main(["study", str(study), *chosen]) == 2
    assert message in " ".join(capsys.readouterr().err.split()) and not Path("study").exists()


def test_a_directory_with_another_run_is_refused_by_its_name_and_the_key(study, capsys):
    run = Study(read_study(study), Progress()).reported["STAGE"][0]
    run.directory.mkdir(parents=True)
    (run.directory / "config.yaml").write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
    (run.directory / METRICS_FILE).write_text('{"step": 1}\n')
    assert main(["study", str(write(study, set=["learner.lr=0.5"])), "--dry-run"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "study/stage/seed-2 holds another run than STAGE, seed 2 of this study; move it away" in said
    assert f"learner.lr was {run.config.learner.lr!r} in" in said


def test_a_study_replaces_the_keys_of_its_base_and_adds_to_its_set(study, tmp_path):
    write(study, set=["steps=5", "learner.lr=0.5"], search=SEARCH)
    other = tmp_path / "other.yaml"
    other.write_text("{base: study.yaml, seeds: [4], search: null, set: [steps=7], arms: {GCPO: {}}}")
    (run,) = Study(read_study(other), Progress()).reported["GCPO"]
    assert (run.config.seed, run.config.steps, run.config.learner.lr) == (4, 7, 0.5)
    assert read_study(other).search is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus_per_run": -1}, "gpus_per_run"),
        ({"sedes": [1]}, "unknown key 'sedes': did you mean 'seeds'"),
        ({"arms": {"A": {"sett": []}}}, "unknown key 'arms.A.sett': did you mean 'arms.A.set'"),
        ({"arms": {}}, "arms"),
        ({"arms": {"A b": {}, "a-b": {}}}, "'A b' and 'a-b' would share a directory"),
        ({"seeds": []}, "seeds"),
        ({"search": SEARCH | {"seeds": [2]}}, "seed 2 is in search.seeds and in seeds"),
        ({"arms": {"A": {"set": ["recipee=grpo"]}}}, "arm 'A': .*did you mean 'recipe'"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml does not exist"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml, the base of .*study.yaml, does not exist"),
    ],
)
def test_a_mistake_in_the_file_is_refused_before_anything_starts(study, capsys, changes, message):
    assert main(["study", str(write(study, **changes))]) == 2
    assert re.search(message, capsys.readouterr().err) and not Path("study").exists()
