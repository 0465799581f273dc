"""What `import stage_ray` offers: four functions, imported when they are asked for."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import stage_ray
from stage_ray.errors import ConfigError
from stage_ray.inference.evaluate import evaluate
from stage_ray.inference.generate import generate


def test_importing_the_package_and_reading_a_config_is_light() -> None:
    code = (
        "import sys, stage_ray\n"
        "assert len(sys.modules) < 200, len(sys.modules)\n"
        "assert stage_ray.load_config('stage_shapeworld', ['steps=3']).steps == 3\n"
        "sys.exit(', '.join({'torch', 'ray', 'vllm', 'transformers', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", stage_ray.__all__)
def test_each_function_has_an_example(name: str) -> None:
    function = getattr(stage_ray, name)
    assert callable(function) and name in dir(stage_ray)
    function = getattr(function, name, function)  # `train` is its module too
    assert f"Example:\n    {name}(" in inspect.getdoc(function)  # type: ignore[operator]


def test_another_name_is_none() -> None:
    with pytest.raises(AttributeError, match="module 'stage_ray' has no attribute 'fit'"):
        getattr(stage_ray, "fit")  # noqa: B009  it is the access that is tested


def test_train_is_called_whichever_import_came_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import stage_ray.train as module
    from stage_ray import train

    monkeypatch.setattr(module, "train", lambda run, resume, progress: (run.steps, resume))
    run = stage_ray.load_config("stage_shapeworld", ["steps=3"])
    assert train(run) == (3, False) and stage_ray.train(run, resume=True) == (3, True)


def test_an_evaluation_returns_its_metrics(model: Path, tmp_path: Path) -> None:
    ring = {"tag": "single_object", "include": [{"class": "ring", "count": 1}], "prompt": "a photo of a ring"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(ring))
    result = evaluate(model, prompts=tmp_path / "prompts.jsonl", images_per_prompt=2, engine="torch")
    assert result.headline == "GenEval" and result.headline_value is not None
    assert len(result.images) == 2 and result.conditions["evaluation.images_per_prompt"] == 2


def test_drawing_returns_the_files_in_the_order_of_the_prompts(model: Path, tmp_path: Path) -> None:
    files = generate(model, ["a photo of a ring", "a photo of a square"], tmp_path / "out", images=2, engine="torch")
    assert [file.name for file in files] == ["0000-0.png", "0000-1.png", "0001-0.png", "0001-1.png"]
    assert all(file.is_file() for file in files)


def test_no_images_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 images are asked for"):
        generate(model, "a photo of a ring", tmp_path / "out", images=0, engine="torch")
    with pytest.raises(ConfigError, match="0 images are asked for"):
        evaluate(model, images_per_prompt=0, engine="torch")
