"""Prompt files as users write them, well and badly."""

import gzip
import json

import pytest

from stage_ray.config import PromptsConfig
from stage_ray.errors import ConfigError
from stage_ray.pipeline.prompt_files import load_mix, load_prompts
from stage_ray.pipeline.prompts import PromptCursor
from stage_ray.records import Prompt, image_seeds


def test_json_lines_keep_the_whole_record(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a photo of a ring", "tag": "single_object"}) + "\n\n")
    (prompt,) = load_prompts(str(path))
    assert (prompt.text, prompt.record["tag"]) == ("a photo of a ring", "single_object")


def test_plain_text_is_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \n")
    assert [p.text for p in load_prompts(str(path))] == ["a cat", "a dog"]


RING, RINGS = '{"prompt": "a ring", "tag": "x"}', '{"prompt": "two rings"}'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", f"{RING}\n\n{RINGS}\n"),
        ("p.JSONL", f"{RING}\r\n{RINGS}"),
        ("p.ndjson", f"\ufeff{RING}\n{RINGS}"),
        ("p.json", f"{RING}\n{RINGS}"),
        ("p.json", f"[{RING},\n {RINGS}]"),
        ("p.jsonl", f"[{RING}, {RINGS}]"),
        ("p.json", '["a ring", "two rings"]'),
        ("p.jsonl", '"a ring"\n{"caption": "two rings"}\n'),
        ("p.jsonl", '{"text": "a ring"}\n{"text": "two rings", "id": 2}\n'),
        ("p.csv", 'Prompts,Category\r\n"a ring",x\r\n"two rings",y\r\n'),
        ("p.tsv", "id\tcaption\n1\ta ring\n2\ttwo rings\n"),
        ("p.csv", 'index,prompt_en,sub_dims_en\n1,a ring,"{""Testpoints"": []}"\n2,two rings,{}\n'),  # UniGenBench
        ("p.json", '[{"Prompt": "a ring", "Category": "x", "prompt_id": 1}, {"Prompt": "two rings"}]'),  # WISE
        ("p.json", '[{"prompt": "a ring", "nouns": ["ring"]}, {"prompt": "two rings"}]'),  # T2I-R1
        ("p.txt", "a ring\n\n  two rings \n"),
        ("p", "\ufeffa ring\n\ufefftwo rings"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_the_same_prompts_are_read_from_every_form_they_come_in(tmp_path, name, text, compressed):
    path = tmp_path / (name + ".gz" * compressed)
    data = text.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if compressed else data)
    first, second = load_prompts(str(path))
    assert (first.text, second.text) == ("a ring", "two rings") and first.record["prompt"] == "a ring"
    assert first.where.startswith(str(path)) and second.where != first.where


def test_each_text_of_a_directory_is_a_prompt_in_the_order_of_names(tmp_path):
    (tmp_path / "b.txt").write_text("two\nrings\n")
    (tmp_path / "a.TXT").write_text("\ufeffa ring")
    (tmp_path / "a.png").write_bytes(b"no prompt")
    assert [prompt.text for prompt in load_prompts(str(tmp_path))] == ["a ring", "two rings"]


@pytest.mark.parametrize("break_", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_nothing_but_a_newline_ends_a_line(tmp_path, break_):
    (tmp_path / "p.txt").write_text(f"a ring{break_}in a park\ntwo rings", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": f"a ring{break_}in a park"}, ensure_ascii=False))
    first, second = load_prompts(str(tmp_path / "p.txt"))
    assert (first.text, second.text) == (f"a ring{break_}in a park", "two rings")
    if break_ > "\x1f":  # JSON itself forbids the others within a text
        assert load_prompts(str(tmp_path / "p.jsonl"))[0].text == first.text


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.json", "[]", "holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not a JSON object"),
        ("p.jsonl", '{"txt": "a"}\n', 'line 1: needs a non-empty "prompt".*it has txt'),
        ("p.jsonl", '{"prompt": " "}\n', 'line 1: needs a non-empty "prompt"'),
        ("p.jsonl", '{"prompt": null, "text": "a"}\n', 'line 1: needs a non-empty "prompt"'),
        ("p.jsonl", "3\n", "line 1: needs.*it is 3"),
        ("p.json", "[1]\n", "item 1: needs"),
        ("p.json", '[{"prompt": "a"},\n{]', "line 2: not JSON"),
        ("p.jsonl", '{"prompt": "\\ud83d"}', "line 1: half a character"),
        (
            "p.csv",
            "title,tag\na ring,x\n",
            "line 1: no column is called prompt, caption, text, prompts; its columns are title",
        ),
        ("p.csv", "prompt,tag\na ring,x\na, b, c\n", "line 3: 2 columns"),
        ("p.csv", 'prompt\n"a ring\n', "not CSV"),
        ("p.arrow", "ARROW1", "ends in .arrow.*save it as one of .txt"),
        ("p.txt", "a\0b", "holds NUL bytes"),
    ],
)
def test_a_bad_prompt_file_is_refused_by_line(tmp_path, name, text, sentence):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_prompts(str(path))


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("p.txt", "a ring\ncaf\u00e9".encode("latin-1"), "line 2: prompt file is not UTF-8 text"),
        ("p.txt", "a ring".encode("utf-16"), "not UTF-8 text"),
        ("p.txt.gz", gzip.compress(b"a ring" * 99, mtime=0)[:-20], "cannot be read"),
        ("p.txt", b"", "holds no prompts"),
    ],
)
def test_bytes_that_are_no_text_are_refused(tmp_path, name, data, sentence):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=sentence):
        load_prompts(str(path))


def test_a_directory_without_texts_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="directory without .txt files"):
        load_prompts(str(tmp_path))


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


@pytest.fixture
def mixed(tmp_path):
    """Of six and of two prompts, of which the first is drawn three times as often."""
    (tmp_path / "a.txt").write_text("\n".join("abcdef"))
    (tmp_path / "b.txt").write_text("\nx\ny")
    paths = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    return PromptsConfig.model_validate({"train": [{"path": paths[0], "weight": 3}, {"path": paths[1]}]})


def test_prompts_of_several_files_are_numbered_through_and_name_their_file_and_line(mixed, tmp_path):
    prompts = load_mix(mixed)
    assert [(p.index, p.source, p.text) for p in prompts[4:]] == [(4, 0, "e"), (5, 0, "f"), (6, 1, "x"), (7, 1, "y")]
    assert prompts[6].where == f"{tmp_path / 'b.txt'}, line 2"
    assert load_mix(PromptsConfig(train=mixed.train[0].path)) == load_prompts(mixed.train[0].path)
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(ConfigError, match=r"prompt file .*b\.txt holds no prompts"):
        load_mix(mixed)


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0), (0.2, 0.7)])
def test_files_are_drawn_by_their_weights_each_in_epochs_of_its_own_and_a_position_is_enough(mixed, weights):
    prompts = load_mix(mixed)
    cursor = PromptCursor(prompts, seed=3, weights=weights)
    drawn = [cursor.draw() for _ in range(120)]
    for count in range(1, 121):
        share = count * weights[0] / sum(weights)
        assert abs(sum(prompt.source == 0 for prompt in drawn[:count]) - share) < 1, "at any time"
    for source, size in ((0, 6), (1, 2)):
        own = [prompt.text for prompt in drawn if prompt.source == source]
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1 < len({tuple(epoch) for epoch in epochs})
    for position in (1, 10, 61):
        later = PromptCursor(prompts, seed=3, weights=weights, position=position)
        assert [later.draw() for _ in range(20)] == drawn[position : position + 20]


def test_two_files_of_one_length_are_not_shuffled_alike_and_one_file_as_ever():
    prompts = [Prompt(index, str(index), source=index // 50) for index in range(100)]
    both, alone = PromptCursor(prompts, 3, weights=(1.0, 1.0)), PromptCursor(prompts[:50], 3)
    drawn = [both.draw().index for _ in range(100)]
    first = [index for index in drawn if index < 50]
    assert first == [alone.draw().index for _ in range(50)] != [index - 50 for index in drawn if index >= 50]
    assert first[:5] == [27, 47, 39, 31, 6], "or runs that go on would draw other prompts"


def test_image_seeds_differ_between_runs_groups_and_images():
    seeds = {seed for run in (0, 1) for group in range(50) for seed in image_seeds(run, group, 8)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)
