"""What an Emu3 checkpoint and its prompts may not be, and how large the published one is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import Emu3Config, Emu3ForConditionalGeneration

from stage_ray.cli import main
from stage_ray.commands.plan import model_sizes
from stage_ray.config import PolicyConfig
from stage_ray.config.model_sizes import KNOWN
from stage_ray.errors import ConfigError
from stage_ray.policies.emu3 import Emu3Policy
from stage_ray.policies.emu3.sizes import config_sizes
from tests.policies.emu3 import COLUMNS, NAMES, ROWS, VOCABULARY, change_config, tiny_emu3
from tests.runs import tiny_run


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_emu3(tmp_path_factory.mktemp("files") / "emu3")


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "model"))


def config(path: Path) -> PolicyConfig:
    return PolicyConfig(family="emu3", path=str(path))


SWAPPED = VOCABULARY | {"<|visual token 000000|>": VOCABULARY["<|visual token 000001|>"]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocabulary_map": None}, "vocabulary_map has 0 image tokens for a codebook of 48"),
        ({"vocabulary_map": SWAPPED}, "one after the other"),
        ({"vocabulary_map": {k: v for k, v in VOCABULARY.items() if k != "<|extra_200|>"}}, "closes a row"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ({"image_area": 11 * 11 * 64, "ratio": "1:1"}, "leave no prompt room; lower image_area"),
        ({"image_area": 1}, "are no picture; give pixels and width:height, such as 518400 and '1:1'"),
        ({"ratio": "square"}, "ratio = 'square' are no picture"),
    ],
)
def test_a_config_that_no_emu3_has_is_refused_with_its_key(
    checkpoint: Path, changes: dict[str, Any], said: str
) -> None:
    change_config(checkpoint, **changes)
    with pytest.raises(ConfigError, match=r"policy\.path: .*config\.json") as refused:
        Emu3Policy.check(config(checkpoint))
    assert said in str(refused.value)


def test_a_tensor_that_lacks_or_has_another_shape_is_named_as_the_file_names_it(checkpoint: Path) -> None:
    file, name = checkpoint / "model.safetensors", "text_model.model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    for changed in ({name: tensors[name][1:].clone()}, {}):
        save_file({k: v for k, v in tensors.items() if k != name} | changed, file, metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            Emu3Policy.check(config(checkpoint))


def test_a_tokenizer_without_image_tokens_is_refused(checkpoint: Path) -> None:
    file = checkpoint / "tokenizer_config.json"
    file.write_text(file.read_text().replace("image_wrapper_token", "wrapper"))
    with pytest.raises(ConfigError, match="needs image_token, boi_token, eoi_token, image_wrapper_token"):
        Emu3Policy.check(config(checkpoint))


def test_a_prompt_that_begins_an_image_stops_a_dry_run_with_its_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.txt"
    files = {"train": str(mine), "heldout": str(mine)}
    run = tiny_run(tmp_path, checkpoint, policy={"family": "emu3"}, prompts=files)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    mine.write_text("two rings\n")
    assert main(["train", str(tmp_path / "run.yaml"), "--dry-run"]) == 0
    mine.write_text(f"two rings\na {NAMES['image_wrapper_token']} of rings\n")
    assert main(["train", str(tmp_path / "run.yaml"), "--dry-run"]) == 2
    said = f"{mine}, line 2: prompt 'a {NAMES['image_wrapper_token']} of rings' holds the token that begins an image"
    assert said in capsys.readouterr().err


def test_the_published_model_has_as_many_parameters_as_its_modules_and_8190_positions_with_the_last_row_end() -> None:
    published = Emu3Config(vocabulary_map={})
    found = config_sizes(published, (90, 90), "emu3-gen", "BAAI/Emu3-Gen-hf")
    assert found == KNOWN["emu3-gen"] and found.image_positions + 1 == 8190
    with torch.device("meta"):
        assert found.total == sum(p.numel() for p in Emu3ForConditionalGeneration(published).parameters())


def test_a_directory_can_be_planned_from_its_config(written: Path) -> None:
    found = model_sizes(str(written))
    model = Emu3ForConditionalGeneration.from_pretrained(written)
    assert found.trained == sum(p.numel() for p in model.model.text_model.parameters())
    assert (found.image_tokens, found.forced) == (ROWS * COLUMNS, ROWS - 1)
