"""The command line teaches, answers at once, and ends with the right exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from stage_ray.cli import main
from stage_ray.commands.tools import PretrainStage
from stage_ray.config.load import load_config
from stage_ray.recipes import resolve_recipe
from tests.fake_run import write_fake_run
from tests.tiny import tiny_janus

COMMANDS = (
    "configs",
    "gpu-check",
    "init",
    "train",
    "fetch",
    "convert",
    "submit",
    "evaluate",
    "generate",
    "pretrain",
    "bench",
    "plan",
    "report",
    "metrics",
    "doctor",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_janus(directory)
    return directory


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    """A config whose files all exist."""
    (tmp_path / "prompts.txt").write_text("a photo of a red circle\n\na photo of two blue squares\n")
    prompts = str(tmp_path / "prompts.txt")
    data = {
        "steps": 2,
        "run_dir": str(tmp_path / "run"),
        "prompts": {"train": prompts, "heldout": prompts},
        "policy": {"path": str(model)},
        "rewards": [{"type": "tests.scorers.Brightness"}],
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on stderr."""
    error = capsys.readouterr().err
    assert error.startswith("stage-ray: ") and error.count("\n") == 1, error
    return error


def test_help_answers_without_importing_what_is_heavy() -> None:
    code = (
        "import sys; from stage_ray.cli import main; main(['--help'])\n"
        "sys.exit(', '.join({'torch', 'ray', 'vllm', 'transformers', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f" {command} " in done.stdout for command in COMMANDS)


def test_python_dash_m_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stage_ray", "train", "nowhere.yaml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "stage-ray: config file nowhere.yaml does not exist\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Example: stage-ray {command}" in shown


@pytest.mark.parametrize("arguments", [[], ["train"], ["generate"]])
def test_a_bare_command_shows_its_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert "Usage: stage-ray" in printed.out + printed.err and "stage-ray: " not in printed.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "a.yaml", "--steps", "3"], "No such option: --steps"),
        (["train", "a.yaml", "b.yaml"], "b.yaml"),
        (["evaluate", "model", "--guidance", "0.5"], "--guidance"),
        (["evaluate", "model", "--suite", "genevall"], "did you mean 'geneval'"),
        (["generate", "model", "--out", "pictures"], "nothing to draw"),
        (["generate", "model", "--out", "pictures", "--prompt", " "], "nothing to draw"),
        (
            ["generate", "model", "--out", "pictures", "--prompt", "a", "--engine", "gan"],
            "'gan' is not one of 'vllm', 'torch'",
        ),
        (
            ["generate", "./nowhere", "--out", "pictures", "--prompt", "a", "--engine", "torch"],
            "./nowhere does not exist",
        ),
        (["report", "nowhere"], "nowhere holds no run"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_a_dry_run_prints_the_resolved_config_and_starts_nothing(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--set", "learner.lr=1e-3", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    (config.parent / "resolved.yaml").write_text(printed)
    assert load_config(config.parent / "resolved.yaml") == resolve_recipe(load_config(config, ["learner.lr=1e-3"]))
    assert "2 to train on, 2 held out" in printed and "8 groups x 8 images = 64 images a step" in printed
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("policy.path=./nowhere", "./nowhere does not exist"),
        ("policy.path=package:no_such_package/x", "no package 'no_such_package'"),
        ("prompts.train=nowhere.txt", "nowhere.txt does not exist"),
    ],
)
def test_a_dry_run_finds_what_is_missing(
    override: str, sentence: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--set", override, "--dry-run"]) == 2
    assert sentence in said(capsys)


@pytest.mark.parametrize(("content", "sentence"), [("", "holds no prompts"), ('{"prompt": "a"}\n{"prompt"', "line 2")])
def test_a_dry_run_reads_the_prompt_files(
    content: str, sentence: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "broken.jsonl").write_text(content)
    assert main(["train", str(config), "--set", f"prompts.heldout={config.parent}/broken.jsonl", "--dry-run"]) == 2
    assert sentence in said(capsys)


def test_a_mistyped_benchmark_is_refused_before_anything_starts(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--set", "evaluation.benchmark=genval", "--dry-run"]) == 2
    assert "evaluation.benchmark = 'genval' is no known benchmark; did you mean 'geneval'" in said(capsys)


def test_training_into_a_used_run_directory_is_refused_and_overwrites_nothing(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = config.parent / "run"
    write_fake_run(run_dir, steps=1)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert main(["train", str(config)]) == 2
    assert "already holds a run; add --resume" in said(capsys)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_failed_run_is_one_sentence_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fake_run(tmp_path / "run", steps=1)
    (tmp_path / "run" / "evaluation" / "before.json").write_text("{")
    assert main(["report", str(tmp_path / "run")]) == 1
    assert "before.json is not readable JSON" in said(capsys)


def test_a_bug_shows_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run_dir: Path) -> Path:
        raise ZeroDivisionError

    monkeypatch.setattr("stage_ray.report.report.write_report", broken)
    with pytest.raises(ZeroDivisionError):
        main(["report", str(tmp_path)])


def test_report_prints_the_path_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fake_run(tmp_path / "run", steps=2)
    assert main(["report", str(tmp_path / "run")]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text().startswith("<!doctype html>")


def test_pretrain_offers_every_stage_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    from stage_ray.shapeworld.pretrain import STAGES

    assert tuple(PretrainStage) == STAGES
    assert main(["pretrain", "--out", "world", "--stage", "clop"]) == 2
    assert "'clop' is not one of" in said(capsys)


def test_generate_draws_prompts_and_files_of_prompts_and_overwrites_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more.txt").write_text("two blue squares\n")
    arguments = [
        "generate",
        str(model),
        "--prompt",
        "a red circle",
        "--prompts",
        str(tmp_path / "more.txt"),
        "--engine",
        "torch",
    ]
    assert main([*arguments, "--images", "2", "--out", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["0000-0.png", "0000-1.png", "0001-0.png", "0001-1.png", "sheet.png"]
    with Image.open(tmp_path / "out" / "0001-1.png") as image:
        assert (image.size, image.mode) == ((32, 32), "RGB")
    capsys.readouterr()
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "not an empty directory" in said(capsys)


def test_evaluate_writes_the_verdicts_that_its_table_sums_up(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(record) + "\n")
    options = ["--prompts", str(tmp_path / "prompts.jsonl"), "--images-per-prompt", "3", "--engine", "torch"]
    assert main(["evaluate", str(model), *options, "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["benchmark"], result["headline"], len(result["images"])) == ("shapeworld", "GenEval", 3)
    assert f"GenEval        {result['metrics']['GenEval']['value']:.3f}" in capsys.readouterr().out
