"""A benchmark from outside the package: its own prompts, scorer, table with errors, and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stage_ray.cli import main
from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError
from stage_ray.evaluation import Benchmark
from stage_ray.evaluation.base import find_benchmark, read_result
from stage_ray.evaluation.suites import resolve_suites
from stage_ray.pipeline.prompt_files import load_prompts
from stage_ray.records import Prompt, ScoredGroup
from stage_ray.run.preflight import preflight
from tests.plain import FAMILY
from tests.runs import tiny_run

pytestmark = pytest.mark.usefixtures("one_thread")

MINE = "tests.evaluation.test_benchmarks.LampBenchmark"
HERE = {"dark": ["a black cat", "a dark room"], "light": ["a lamp"]}


class LampBenchmark(Benchmark):
    """Two kinds of prompts, each in a file of its own, judged by how bright their pictures are."""

    name = "lamps"
    headline = "lamp score"
    source = "https://example.org/lamps"
    files = {"dark": "dark.txt", "light": "light.txt"}
    counts = {"dark": 2, "light": 1}
    category_key = "kind"
    images_per_prompt = 3
    rewards = (RewardConfig(type="tests.scorers.Brightness"),)
    aside = ("mean brightness",)

    def values(
        self, prompt: Prompt, scores: Mapping[str, float | None], details: Mapping[str, Mapping[str, Any]]
    ) -> Mapping[str, float]:
        score = scores["Brightness"]
        if score is None:
            return {}
        kind = self.category(prompt)
        return {kind: float((score > 0.5) == (kind == "light")), "mean brightness": score}

    def picture(self, prompt: Prompt, image: int) -> str:
        return f"{prompt.record['kind']}/{prompt.text}.png"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What a user downloaded."""
    (tmp_path / "lamps").mkdir()
    for kind, texts in HERE.items():
        (tmp_path / "lamps" / f"{kind}.txt").write_text("\n".join(texts))
    return tmp_path / "lamps"


def scored(group_id: int, scores: list[float]) -> ScoredGroup:
    column = np.asarray(scores, np.float32)[:, None]
    return ScoredGroup(group_id, ("Brightness",), column, np.isfinite(column), ({},) * len(scores), 0.0)


def test_the_table_has_categories_with_errors_then_the_headline_then_what_stands_aside(copy: Path) -> None:
    benchmark = find_benchmark(MINE)
    prompts = benchmark.load(str(copy), load_prompts)
    assert [(p.index, p.record["kind"], p.text) for p in prompts] == [
        (0, "dark", "a black cat"),
        (1, "dark", "a dark room"),
        (2, "light", "a lamp"),
    ]
    metrics = benchmark.aggregate(prompts, [scored(0, [0.1, 0.9]), scored(1, [0.2, np.nan]), scored(2, [0.9, 0.9])])
    assert list(metrics) == ["dark", "light", "lamp score", "mean brightness"]
    assert metrics["dark"].value == pytest.approx(2 / 3) and metrics["dark"].images == 3  # one score failed
    assert metrics["dark"].error == pytest.approx(np.std([0.5, 1.0], ddof=1) / np.sqrt(2))  # of prompts
    assert metrics["lamp score"].value == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["lamp score"].parts == ("dark", "light")
    assert metrics["mean brightness"].value == pytest.approx(0.6)
    failed = benchmark.aggregate(prompts[2:], [scored(0, [np.nan])])
    assert failed == {}, "never a number where nothing was judged"


def test_a_copy_that_is_not_the_whole_benchmark_is_refused_with_where_to_get_it(copy: Path) -> None:
    (copy / "dark.txt").write_text("a black cat")
    with pytest.raises(ConfigError, match=r"has 1 of category 'dark' and not 2, .* from https://example.org/lamps"):
        find_benchmark(MINE).load(str(copy), load_prompts)
    with pytest.raises(ConfigError, match=r"lamps ships no prompts; get the whole from .* evaluate --prompts"):
        find_benchmark(MINE).load("", load_prompts)
    (copy / "light.txt").unlink()
    with pytest.raises(ConfigError, match=r"light.txt does not exist"):
        find_benchmark(MINE).load(str(copy), load_prompts)


def test_evaluate_runs_it_by_its_dotted_path_and_lays_the_pictures_out_as_it_says(
    copy: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, file = tmp_path / "pictures", tmp_path / "lamps.json"
    command = ["evaluate", str(plain), "--suite", MINE, "--prompts", str(copy), "--engine", "torch"]
    command += ["--set", f"policy.family={FAMILY}", "--json", str(file), "--pictures", str(pictures)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert all(f"{metric} " in printed for metric in ("dark", "light", "lamp score", "mean brightness"))
    result = read_result(file)
    assert result is not None and result.benchmark == "lamps" and len(result.images) == 9
    assert result.headline_value == result.metrics["lamp score"].value
    assert sorted(path.name for path in pictures.rglob("*.png")) == ["a black cat.png", "a dark room.png", "a lamp.png"]
    sheet = np.asarray(Image.open(pictures / "light" / "a lamp.png"))  # three images in a square of four
    size = sheet.shape[0] // 2
    first = [image["scores"]["Brightness"] for image in result.images if image["prompt"] == "a lamp"][0]
    assert sheet[:size, :size].mean() / 255 == pytest.approx(first, abs=1e-4) and not sheet[size:, size:].any()
    assert main(command) == 2 and f"--pictures {pictures} is not empty" in capsys.readouterr().err


def test_geneval_writes_what_its_official_code_reads(tmp_path: Path) -> None:
    prompt = Prompt(7, "a photo of a ring", {"tag": "single_object", "prompt": "a photo of a ring"})
    benchmark = find_benchmark("geneval")
    assert not benchmark.has_pictures(tmp_path, prompt, 2)
    benchmark.save_pictures(tmp_path, prompt, np.zeros((2, 4, 4, 3), np.uint8))
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert found == ["00007/metadata.jsonl", "00007/samples/00000.png", "00007/samples/00001.png"]
    assert json.loads((tmp_path / "00007" / "metadata.jsonl").read_text()) == prompt.record
    assert benchmark.has_pictures(tmp_path, prompt, 2)


def test_a_run_has_it_as_a_suite_by_its_name_and_the_users_copy(copy: Path, plain: Path, tmp_path: Path) -> None:
    run = resolve_suites(tiny_run(tmp_path, plain, evaluation={"suites": [{"benchmark": MINE, "prompts": str(copy)}]}))
    (suite,) = run.evaluation.suites
    assert (suite.name, suite.images_per_prompt, suite.rewards) == ("lamps", 3, list(LampBenchmark.rewards))
    assert [prompt.text for prompt in preflight(run).suites["lamps"]] == [*HERE["dark"], *HERE["light"]]
    bare = resolve_suites(tiny_run(tmp_path, plain, evaluation={"suites": [MINE]}))
    with pytest.raises(ConfigError, match="ships no prompts"):
        preflight(bare)
