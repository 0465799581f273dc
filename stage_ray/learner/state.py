"""What a bit-exact resume needs of the learner: weights, AdamW's moments, version and random state. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stage_ray.learner.batch import LearnerError
from stage_ray.learner.ranks import Ranks
from stage_ray.learner.shards import load_shards, save_shards, sharded_like

FORMAT = 1
WEIGHTS, OPTIMIZER, RANDOM, METADATA = (
    "trained.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "learner.json",
)
SHARDS = "shards"


@dataclass(frozen=True, slots=True)
class LearnerParts:
    """The parts of a learner that its state is made of, whole or sharded, and its reference's `fingerprint`."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    reference: str
    ranks: Ranks = field(default_factory=Ranks)


def save_state(directory: Path, version: int, parts: LearnerParts) -> None:
    """Write four files: trained weights, optimizer moments (``<moment>/<name>``), random states, and facts as JSON.

    Several ranks write their shards of the first two into ``shards/`` instead, every rank its own file, together; any
    number of ranks reads them again. The learning rate is a function of the version and the config, so there is no
    scheduler to store, and the random states of the first rank are those of all.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach() for name, parameter in parts.parameters.items()}
    states = parts.optimizer.state_dict()["state"]
    moments = {
        f"{moment}/{name}": value.detach()
        for index, name in enumerate(parts.parameters)
        for moment, value in states.get(index, {}).items()
    }
    if parts.ranks.count > 1:
        save_shards(directory / SHARDS, weights | moments)
    else:
        save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, directory / WEIGHTS)
        save_file({name: tensor.cpu().contiguous() for name, tensor in moments.items()}, directory / OPTIMIZER)
    if parts.ranks.first:
        save_file(_random_states(), directory / RANDOM)
        metadata = {"format": FORMAT, "version": version, "reference": parts.reference}
        (directory / METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    parts.ranks.wait()


def load_state(directory: Path, parts: LearnerParts) -> int:
    """Read what `save_state` wrote into a freshly built learner; returns the version. Checks all before it changes any.

    Raises:
        LearnerError: a file is missing or damaged, or it is the state of another model or reference.
    """
    random = _read(directory / RANDOM)
    try:
        metadata = json.loads((directory / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LearnerError(f"learner state {directory / METADATA} cannot be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise LearnerError(f"learner state {directory / METADATA} has format {metadata.get('format')}, not {FORMAT}")
    if metadata["reference"] != parts.reference:
        raise LearnerError(f"learner state {directory} was trained from another base model; set policy.path back to it")
    if (directory / SHARDS).is_dir():
        where = directory / SHARDS
        found = load_shards(where, lambda key: parts.parameters.get(key.partition("/")[2] or key))
        weights = {key: tensor for key, tensor in found.items() if "/" not in key}
        moments = {key: tensor for key, tensor in found.items() if "/" in key}
    else:
        where = directory / WEIGHTS
        weights, moments = _read(where), _read(directory / OPTIMIZER)
    _check_shapes(where, weights, parts.parameters)
    state: dict[int, dict[str, Tensor]] = {}
    indices = {name: index for index, name in enumerate(parts.parameters)}
    for key, value in moments.items():
        moment, _, name = key.partition("/")
        if name not in indices:
            raise LearnerError(f"learner state {directory / OPTIMIZER} holds {key!r}, which this model does not train")
        state.setdefault(indices[name], {})[moment] = sharded_like(value, parts.parameters[name])
    groups = parts.optimizer.state_dict()["param_groups"]
    parts.optimizer.load_state_dict({"state": state, "param_groups": groups})
    with torch.no_grad():
        for name, parameter in parts.parameters.items():
            parameter.copy_(sharded_like(weights[name], parameter))
    _restore_random(random)
    return int(metadata["version"])


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """xxh3-64 over names and bytes of whole tensors, in order: tells two models apart."""
    digest = xxhash.xxh3_64()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return str(digest.hexdigest())


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise LearnerError(f"learner state {path} cannot be read: {error}") from error


def _check_shapes(path: Path, weights: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())[0]
        raise LearnerError(f"learner state {path} is of another model: they differ in tensor {odd!r}")
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            shapes = f"{list(weights[name].shape)}, this model's is {list(parameter.shape)}"
            raise LearnerError(f"learner state {path}: tensor {name!r} is {shapes}")


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states.update({f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    return states


def _restore_random(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda:{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{index}"], index)
