"""What a bit-exact resume needs of the learner: weights, AdamW's moments, version and random state. No pickle.

One rank and many write the same files: tensors as safetensors through torch's distributed checkpoint, each rank its own
shards, of which the file's header says where they belong. Any number of ranks reads them again.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as checkpoint
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from stage_ray.learner.batch import LearnerError
from stage_ray.learner.ranks import Ranks

FORMAT = 2
SHARDS, RANDOM, METADATA = "shards", "random.safetensors", "learner.json"


@dataclass(frozen=True, slots=True)
class LearnerParts:
    """The parts of a learner that its state is made of, whole or sharded, and its reference's `fingerprint`."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    reference: str
    ranks: Ranks = field(default_factory=Ranks)


def save_state(directory: Path, version: int, parts: LearnerParts) -> None:
    """Write this rank's shards of weights and optimizer moments (``<moment>/<name>``); the first rank also the rest.

    Every rank must call it. The rest are random states, the first rank's for all, and metadata as JSON. The learning
    rate is a function of the version and the config, so there is no scheduler to store.

    Raises:
        LearnerError: a rank could not write its shards (a full disk, say).
    """
    shards = directory / SHARDS
    shards.mkdir(parents=True, exist_ok=True)
    tensors = {name: parameter.detach() for name, parameter in parts.parameters.items()}
    states = parts.optimizer.state_dict()["state"]  # by the position of a parameter
    for index, name in enumerate(parts.parameters):
        tensors |= {f"{moment}/{name}": value.detach() for moment, value in states.get(index, {}).items()}
    writer = HuggingFaceStorageWriter(path=str(shards), save_distributed=True)
    try:
        with _alone_without_a_warning():
            checkpoint.save(tensors, storage_writer=writer, no_dist=parts.ranks.count == 1)
    except CheckpointException as error:  # names the ranks that failed; the reason is in what they raised
        reason, _ = next(iter(error.failures.values()))
        raise LearnerError(
            f"learner state {shards} cannot be written: {str(reason).strip() or repr(reason)}"
        ) from error
    if parts.ranks.first:
        save_file(_random_states(), directory / RANDOM)
        files = {path.name: path.stat().st_size for path in sorted(shards.iterdir())}
        metadata = {"format": FORMAT, "version": version, "reference": parts.reference, "shards": files}
        (directory / METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    parts.ranks.wait()


def load_state(directory: Path, parts: LearnerParts) -> int:
    """Read what `save_state` wrote into a freshly built learner; returns the version. Checks all before it changes any.

    Every rank must call it.

    Raises:
        LearnerError: a file is missing or damaged, or it is the state of another model or reference.
    """
    metadata, random = _read_metadata(directory, parts.reference), _read_random(directory / RANDOM)
    tensors = _load_shards(directory / SHARDS, parts)
    state: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(parts.parameters):
        # Moments are saved as moment/name, the weight itself as name.
        moments = {key.partition("/")[0]: value for key, value in tensors.items() if key.partition("/")[2] == name}
        if moments:  # a state saved before the first update has none
            state[index] = moments
    groups = parts.optimizer.state_dict()["param_groups"]
    parts.optimizer.load_state_dict({"state": state, "param_groups": groups})
    with torch.no_grad():
        for name, parameter in parts.parameters.items():
            parameter.copy_(tensors[name])
    _restore_random(random)
    return int(metadata["version"])


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """xxh3-64 over names and bytes of whole tensors, in order: tells two models apart."""
    digest = xxhash.xxh3_64()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return str(digest.hexdigest())


def _read_metadata(directory: Path, reference: str) -> dict[str, Any]:
    """The metadata of a state of this base model, every file that it lists there in full size."""
    try:
        metadata: dict[str, Any] = json.loads((directory / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LearnerError(f"learner state {directory / METADATA} cannot be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise LearnerError(f"learner state {directory / METADATA} has format {metadata.get('format')}, not {FORMAT}")
    if metadata["reference"] != reference:
        raise LearnerError(f"learner state {directory} was trained from another base model; set policy.path back to it")
    for name, size in metadata["shards"].items():
        path = directory / SHARDS / name
        if not path.is_file():
            raise LearnerError(f"learner state {path} cannot be read: it is missing")
        if path.stat().st_size != size:
            raise LearnerError(f"learner state {path} cannot be read: it has {path.stat().st_size} bytes, not {size}")
    return metadata


def _load_shards(directory: Path, parts: LearnerParts) -> dict[str, Tensor]:
    """Every saved tensor in new memory, sharded as this rank's parameters are now; scalars on the CPU."""
    reader = HuggingFaceStorageReader(path=str(directory))
    try:
        saved = reader.read_metadata().state_dict_metadata
        sizes = {key: torch.Size(getattr(metadata, "size", ())) for key, metadata in saved.items()}  # of a scalar: none
        found = _empty_tensors(directory, sizes, parts.parameters)
        with _alone_without_a_warning():
            checkpoint.load(found, storage_reader=reader, no_dist=parts.ranks.count == 1)
    except (OSError, SafetensorError, CheckpointException, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, LearnerError):  # it is a RuntimeError that says already what is wrong
            raise
        reason = str(error).strip().splitlines()
        raise LearnerError(f"learner state {directory} cannot be read: {reason[-1] if reason else error!r}") from error
    return found


def _empty_tensors(
    directory: Path, sizes: Mapping[str, torch.Size], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """A tensor to read into for each saved one, whose names and sizes must be this model's."""
    empty = {}
    for key, size in sizes.items():
        parameter = parameters.get(key.partition("/")[2] or key)  # a moment has its parameter's name after the slash
        if parameter is None:
            raise LearnerError(f"learner state {directory} holds {key!r}, which this model does not train")
        if size and size != parameter.shape:
            shapes = f"{list(size)}, this model's is {list(parameter.shape)}"
            raise LearnerError(f"learner state {directory}: tensor {key!r} is {shapes}")
        empty[key] = torch.zeros_like(parameter.detach()) if size else torch.zeros(())  # AdamW's step is a scalar
    for name in parameters:
        if name not in empty:
            raise LearnerError(f"learner state {directory} is of another model: it lacks tensor {name!r}")
    return empty


@contextmanager
def _alone_without_a_warning() -> Iterator[None]:
    """torch warns a single rank that it saves or loads as one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _read_random(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise LearnerError(f"learner state {path} cannot be read: {error}") from error


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states.update({f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    return states


def _restore_random(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda:{index}" in states:  # the state may come from a machine with fewer GPUs
            torch.cuda.set_rng_state(states[f"cuda:{index}"], index)
