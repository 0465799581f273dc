"""A rank writes a safetensors file, piece by piece while the process goes on; what an older writer left is read."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
import xxhash
from safetensors.torch import load, load_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from stage_ray.learner.batch import LearnerError
from stage_ray.learner.shards import Part, read_parts, write_parts


def state() -> dict[str, torch.Tensor]:
    """As a learner's: weights, moments, and a scalar."""
    torch.manual_seed(0)
    weights = {"a.weight": torch.randn(5, 3), "b.weight": torch.randn(4)}
    return weights | {f"exp_avg/{name}": torch.randn_like(weight) for name, weight in weights.items()}


def parameters() -> dict[str, nn.Parameter]:
    return {"a.weight": nn.Parameter(torch.zeros(5, 3)), "b.weight": nn.Parameter(torch.zeros(4))}


def test_other_threads_run_while_tensors_are_written_one_after_the_other(tmp_path):
    """The file is a pipe: it takes 64 KiB, and no more until another thread of this interpreter reads on."""
    tensors = {str(i): torch.full((2**18,), float(i)) for i in range(4)}  # 1 MiB each
    pipe, found = tmp_path / "pipe", bytearray()
    os.mkfifo(pipe)

    def read() -> None:
        with pipe.open("rb", buffering=0) as file:
            found.extend(file.read(1000))
            tensors["3"].fill_(9.0)  # its turn has not come, so this is what is written
            while piece := file.read(2**20):
                found.extend(piece)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    written = write_parts(pipe, {name: (tensor, [0]) for name, tensor in tensors.items()})
    reader.join()
    assert (written.bytes, written.xxh3) == (len(found), xxhash.xxh3_64_hexdigest(bytes(found)))
    values = {name: tensor.unique().tolist() for name, tensor in load(bytes(found)).items()}
    assert values == {"0": [0.0], "1": [1.0], "2": [2.0], "3": [9.0]}


def test_parts_of_any_ranks_are_read_as_the_whole(tmp_path):
    whole = state()
    first: dict[str, Part] = {name: (tensor[:3], [0] * tensor.dim()) for name, tensor in whole.items()}
    second: dict[str, Part] = {name: (tensor[3:], [3] + [0] * (tensor.dim() - 1)) for name, tensor in whole.items()}
    first["step/a.weight"] = torch.tensor(7.0), []
    for rank, parts in enumerate((first, second)):
        write_parts(tmp_path / f"{rank}.safetensors", parts)
    found = read_parts(tmp_path, parameters(), alone=True)
    assert found.pop("step/a.weight") == 7.0
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert load_file(tmp_path / "1.safetensors")["a.weight"].shape == (2, 3)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torchs_own_writer_wrote_is_read(tmp_path):
    """As checkpoints of earlier versions are."""
    writer = HuggingFaceStorageWriter(path=str(tmp_path), save_distributed=True)
    checkpoint.save(state() | {"step/a.weight": torch.tensor(7.0)}, storage_writer=writer, no_dist=True)
    found = read_parts(tmp_path, parameters(), alone=True)
    assert found.pop("step/a.weight") == 7.0
    assert all(torch.equal(found[name], tensor) for name, tensor in state().items())


@pytest.mark.parametrize("other", ["c.weight", "exp_avg/c.weight"])
def test_a_tensor_of_another_model_is_named(tmp_path: Path, other: str):
    write_parts(tmp_path / "0.safetensors", {name: (torch.zeros(5, 3), [0, 0]) for name in ("a.weight", other)})
    with pytest.raises(LearnerError, match=f"holds '{other}', which this model does not train"):
        read_parts(tmp_path, parameters(), alone=True)
