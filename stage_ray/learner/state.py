"""What a bit-exact resume needs of the learner: weights, AdamW's moments, version and random state. No pickle.

One rank and many write the same files, each rank its own shard (`stage_ray.learner.shards`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stage_ray.files import FileDigest
from stage_ray.learner.batch import LearnerError
from stage_ray.learner.ranks import Ranks
from stage_ray.learner.shards import read_parts, write_parts

FORMAT = 2
SHARDS, RANDOM, METADATA = "shards", "random.safetensors", "learner.json"
REFERENCE = "reference"  # before a slash and the name of a weight, as a moment's name is
FAILED = FileDigest(0, "0" * 16)  # of a shard that was not written: none is empty


@dataclass(frozen=True, slots=True)
class LearnerParts:
    """The parts of a learner that its state is made of, whole or sharded.

    Attributes:
        reference: `fingerprint` of the reference that the run began with.
        reference_parameters: those of the reference, which are saved where it was refreshed.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    reference: str
    reference_parameters: Mapping[str, nn.Parameter]
    ranks: Ranks = field(default_factory=Ranks)


def save_state(directory: Path, version: int, parts: LearnerParts, *, refreshed: bool = False) -> dict[str, FileDigest]:
    """Write this rank's shards of weights and optimizer moments (``<moment>/<name>``); what all ranks wrote, by path.

    Every rank must call it. The first also writes random states, its own for all, and metadata as JSON. The learning
    rate is a function of the version and the config, so there is no scheduler to store. A reference that was
    ``refreshed`` is no longer the checkpoint it came from, so its weights are saved too (``reference/<name>``).

    Raises:
        LearnerError: this rank could not write (a full disk, say). The others return without an error.
    """
    tensors = {name: parameter.detach() for name, parameter in parts.parameters.items()}
    states = parts.optimizer.state_dict()["state"]  # by the position of a parameter
    for index, name in enumerate(parts.parameters):
        tensors |= {f"{moment}/{name}": value.detach() for moment, value in states.get(index, {}).items()}
    if refreshed:
        tensors |= {f"{REFERENCE}/{name}": value.detach() for name, value in parts.reference_parameters.items()}
    own = {name: part for name, tensor in tensors.items() if (part := parts.ranks.part(tensor)) is not None}
    path, failure = directory / _shard(parts.ranks.rank), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = write_parts(path, own)
        if parts.ranks.first:
            save_file(_random_states(), directory / RANDOM)
    except (OSError, SafetensorError) as error:
        written, failure = FAILED, error
    # No rank leaves while others write: a group of which one rank has failed is soon given up.
    # Less 2^63 a checksum fits an int64.
    row = torch.tensor([[written.bytes, int(written.xxh3, 16) - 2**63]], device=next(iter(tensors.values())).device)
    rows = parts.ranks.all_gather(row).tolist()  # [ranks, 2]
    if failure is not None:
        raise LearnerError(f"learner state {path} cannot be written: {failure}") from failure
    files = {_shard(rank): FileDigest(size, f"{digest + 2**63:016x}") for rank, (size, digest) in enumerate(rows)}
    if FAILED in files.values():
        return {}  # the rank that failed says why
    try:
        if parts.ranks.first:
            sizes = {Path(name).name: file.bytes for name, file in files.items()}
            metadata = {"format": FORMAT, "version": version, "reference": parts.reference, "shards": sizes}
            metadata |= {"refreshed": True} if refreshed else {}
            (directory / METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    finally:
        parts.ranks.wait()
    return files


def load_state(directory: Path, parts: LearnerParts) -> tuple[int, bool]:
    """Read what `save_state` wrote into a freshly built learner; the version, and whether the reference was refreshed.

    Checks all before it changes any. Every rank must call it.

    Raises:
        LearnerError: a file is missing or damaged, or it is the state of another model or reference.
    """
    metadata = _read_metadata(directory, parts.reference)
    try:
        random = load_file(directory / RANDOM)
    except (OSError, SafetensorError) as error:
        raise LearnerError(f"learner state {directory / RANDOM} cannot be read: {error}") from error
    tensors = read_parts(directory / SHARDS, parts.parameters, alone=parts.ranks.count == 1)
    state: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(parts.parameters):
        # Moments are saved as moment/name, the weight itself as name.
        found = {key.partition("/")[0]: value for key, value in tensors.items() if key.partition("/")[2] == name}
        if moments := {
            moment: value for moment, value in found.items() if moment != REFERENCE
        }:  # a state saved before the first update has none
            state[index] = moments
    groups = parts.optimizer.state_dict()["param_groups"]
    parts.optimizer.load_state_dict({"state": state, "param_groups": groups})
    with torch.no_grad():
        for name, parameter in parts.parameters.items():
            parameter.copy_(tensors[name])
        for name, parameter in parts.reference_parameters.items() if metadata.get("refreshed") else ():
            parameter.copy_(tensors[f"{REFERENCE}/{name}"])
    torch.set_rng_state(random["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda:{index}" in random:  # the state may come from a machine with fewer GPUs
            torch.cuda.set_rng_state(random[f"cuda:{index}"], index)
    return int(metadata["version"]), bool(metadata.get("refreshed"))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """xxh3-64 over names and bytes of whole tensors, in order: tells two models apart."""
    digest = xxhash.xxh3_64()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return str(digest.hexdigest())


def _shard(rank: int) -> str:
    return f"{SHARDS}/shard-{rank + 1:05d}.safetensors"


def _read_metadata(directory: Path, reference: str) -> dict[str, Any]:
    """The metadata of a state of this base model, every file that it lists there in full size."""
    try:
        metadata: dict[str, Any] = json.loads((directory / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LearnerError(f"learner state {directory / METADATA} cannot be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise LearnerError(f"learner state {directory / METADATA} has format {metadata.get('format')}, not {FORMAT}")
    if metadata["reference"] != reference:
        raise LearnerError(
            f"learner state {directory} was trained against another reference; set policy.reference (or policy.path, "
            "where that is null) back to it"
        )
    for name, size in metadata["shards"].items():
        path = directory / SHARDS / name
        there = path.stat().st_size if path.is_file() else None
        if there != size:
            wrong = "is missing" if there is None else f"has {there} bytes, not {size}"
            raise LearnerError(f"learner state {path} cannot be read: it {wrong}")
    return metadata


def _random_states() -> dict[str, Tensor]:
    gpus = {f"cuda:{index}": torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())}
    return {"cpu": torch.get_rng_state()} | gpus
