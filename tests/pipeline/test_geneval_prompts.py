"""GenEval's prompts as they are made here."""

import hashlib
import json
from collections import Counter

import pytest

from stage_ray.cli import main
from stage_ray.errors import ConfigError
from stage_ray.pipeline.geneval_prompts import geneval_prompts
from stage_ray.pipeline.prompt_files import load_prompts
from stage_ray.records import Prompt
from stage_ray.rewards.coco import COLORS, OBJECTS
from stage_ray.rewards.geneval_rules import requirements

OFFICIAL = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
"""SHA-256 of ``prompts/evaluation_metadata.jsonl`` of github.com/djghosh13/geneval."""


def test_the_test_prompts_are_the_official_file_to_the_byte(tmp_path):
    out = tmp_path / "geneval.jsonl"
    assert main(["prompts", "geneval:test", "--out", str(out)]) == 0
    assert hashlib.sha256(out.read_bytes()).hexdigest() == OFFICIAL


def test_training_prompts_are_mixed_by_task_and_hold_no_test_prompt():
    tested = {record["prompt"] for record in geneval_prompts("geneval:test")}
    train = geneval_prompts("geneval:train:1700")
    assert Counter(record["tag"] for record in train) == {
        "position": 700,
        "counting": 500,
        "color_attr": 300,
        "colors": 100,
        "two_object": 100,
    }
    assert not tested & {record["prompt"] for record in train}
    assert train == geneval_prompts("geneval:train:1700")
    assert [record["tag"] for record in train[:50]] != sorted(record["tag"] for record in train[:50])  # shuffled
    for record in train:  # all of it can be judged, in the words of GenEval
        assert {need.label for need in requirements(record)} <= set(OBJECTS)
        assert {need.color for need in requirements(record)} <= {None, *COLORS}


def test_they_stand_for_a_prompt_file():
    first = load_prompts("geneval:test")[0]
    assert isinstance(first, Prompt) and first.where == "geneval:test, 1" and first.record["tag"] == "single_object"
    assert len(load_prompts("geneval:train:30")) == 30


@pytest.mark.parametrize(
    "location", ["geneval:", "geneval:test:5", "geneval:train:0", "geneval:train:many", "geneval:val"]
)
def test_another_set_is_refused_by_name(location):
    with pytest.raises(ConfigError, match=f"{location} is no set of prompts; there are geneval:test"):
        load_prompts(location)


def test_parquet_is_read_with_all_its_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet  # noqa: F811

    include = [[{"class": "ring", "count": 1}], [{"class": "dog", "count": 2}]]
    table = pyarrow.table({"caption": ["a ring", "two dogs"], "include": include, "tag": [None, "counting"]})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    ring, dogs = load_prompts(str(tmp_path / "p.parquet"))
    assert (ring.text, dogs.text, dogs.record["tag"]) == ("a ring", "two dogs", "counting")
    assert requirements(dogs.record)[0].count == 2
    (tmp_path / "p.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(ConfigError, match=r"prompt file .*p\.parquet cannot be read"):
        load_prompts(str(tmp_path / "p.parquet"))


def test_the_command_says_what_a_file_holds(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text, "tag": "x"}) + "\n" for text in ("a", "a")))
    assert main(["prompts", str(tmp_path / "p.jsonl")]) == 0
    assert capsys.readouterr().out == "2 prompts, 1 different; the first: a\nx 2\n"
    assert main(["prompts", str(tmp_path / "missing.txt")]) == 2
