"""Prompt files as users write them, well and badly."""

import json

import pytest

from stage_ray.errors import ConfigError
from stage_ray.pipeline.prompts import PromptCursor, load_prompts
from stage_ray.records import image_seeds


def test_json_lines_keep_the_whole_record(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a photo of a ring", "tag": "single_object"}) + "\n\n")
    (prompt,) = load_prompts(str(path))
    assert (prompt.text, prompt.record["tag"]) == ("a photo of a ring", "single_object")


def test_plain_text_is_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \n")
    assert [p.text for p in load_prompts(str(path))] == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not a JSON object"),
        ("p.jsonl", '{"text": "a"}\n', 'line 1: needs a non-empty "prompt"'),
        ("p.jsonl", '{"prompt": " "}\n', 'line 1: needs a non-empty "prompt"'),
        ("p.jsonl", "[1]\n", "line 1: needs"),
    ],
)
def test_a_bad_prompt_file_is_refused_by_line(tmp_path, name, text, sentence):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_prompts(str(path))


def test_a_missing_prompt_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.txt does not exist"):
        load_prompts("nowhere.txt")


def test_every_epoch_draws_every_prompt_once_and_a_position_is_enough_to_go_on(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("\n".join("abcdefg"))
    prompts = load_prompts(str(path))
    cursor = PromptCursor(prompts, seed=3)
    drawn = [cursor.draw().text for _ in range(21)]
    assert [sorted(drawn[i : i + 7]) for i in (0, 7, 14)] == [list("abcdefg")] * 3
    assert drawn[:7] != drawn[7:14]
    later = PromptCursor(prompts, seed=3, position=10)
    assert [later.draw().text for _ in range(11)] == drawn[10:]


def test_image_seeds_differ_between_runs_groups_and_images():
    seeds = {seed for run in (0, 1) for group in range(50) for seed in image_seeds(run, group, 8)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)
