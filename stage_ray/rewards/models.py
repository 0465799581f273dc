"""How scorers load models of transformers: checked before a run, whole, finite, without code that comes with them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer

from stage_ray.config.hub import PROCESSOR_FILES, cached, download, hub_uri
from stage_ray.config.paths import resolve_path
from stage_ray.errors import ConfigError
from stage_ray.pretrained import check_directory, check_finite, check_tensors, local_checkpoint, located, read_object

Dtype = Literal["float32", "bfloat16"]
PICKLED = (".pt", ".pth", ".bin")


def device_of(device: str | None) -> torch.device:
    """A torch device by its name; by default a GPU where this process sees one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_model(*kinds: Any, path: str, dtype: Dtype = "float32", device: str | None = None) -> tuple[Any, Path]:
    """The model of a checkpoint, one of the classes ``kinds``, for inference, and the directory it is in.

    ``path``: a directory, ``package:MODULE/DIR``, or a hub id, ``OWNER/NAME[@REVISION]``.

    Raises:
        ConfigError: the checkpoint is of another model, incomplete or damaged, or holds values that are not finite.
    """
    location = local_checkpoint(path, [kind.config_class.model_type for kind in kinds], "path")
    kind = _kind_at(location, kinds)
    try:
        model, report = kind.from_pretrained(location, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"path {path!r} is not a {kind.__name__}: {' '.join(str(error).split())}") from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(f"path: {location} lacks {len(missing)} tensors, the first is {missing[0]}")
    for name, parameter in model.named_parameters():
        check_finite(name, parameter, location, "path")
    return model.eval().to(device_of(device)), location


def check_model(*kinds: Any, path: str, tensors: bool = True) -> Path | None:
    """Check a checkpoint that lies here; None where it would be downloaded first.

    Down to the shapes of its ``tensors``, unless transformers gives them other names as it loads them; then a missing
    one is refused when the model is loaded.

    Raises:
        ConfigError: as `load_model`.
    """
    location = located(path)
    if location is not None:
        check_directory(location, [kind.config_class.model_type for kind in kinds], "path")
        kind = _kind_at(location, kinds)
        with torch.device("meta"):  # shapes alone, no memory
            expected = kind(kind.config_class.from_pretrained(location)).state_dict() if tensors else {}
        check_tensors(location, {name: tensor.shape for name, tensor in expected.items()}, "path")
    return location


def processor_directory(processor: str) -> Path:
    """The directory that holds a tokenizer and the like; of a hub's repository no weights are downloaded.

    Raises:
        ConfigError: there is no such directory or repository.
    """
    uri = hub_uri(processor)
    if uri is None:
        return resolve_path(processor)
    return cached(uri, PROCESSOR_FILES) or download(uri, PROCESSOR_FILES, "processor")


def load_tokenizer(location: Path, key: str = "path") -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ConfigError: it is missing or damaged.
    """
    return _processor(AutoTokenizer, "tokenizer", location, key)


def load_image_processor(location: Path, key: str = "path") -> Any:
    """The image processor of a checkpoint, in its PIL version; errors as `load_tokenizer`."""
    return _processor(AutoImageProcessor, "image processor", location, key, backend="pil")


def read_state(path: str, key: str = "path") -> dict[str, Tensor]:
    """The tensors of one file by name: safetensors, or a ``.pt``, ``.pth`` or ``.bin`` that holds tensors alone.

    What stands around them (``state_dict``, ``module.``) is taken off. Large files are mapped, not read.

    Raises:
        ConfigError: there is no such file, it cannot be read as tensors, or holds something else.
    """
    file = resolve_path(path)
    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        elif file.suffix in PICKLED:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        else:
            raise ConfigError(f"{key}: {file} is no file of weights; it should end in .safetensors, .pt, .pth or .bin")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"{key}: {file} cannot be read as weights ({why}); download it again") from error
    for wrapper in ("state_dict", "model"):
        state = state.get(wrapper, state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise ConfigError(f"{key}: {file} holds something other than named tensors")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def fill(module: nn.Module, state: Mapping[str, Tensor], where: str, *, check: bool = False, key: str = "path") -> None:
    """Put tensors by their names into a module, those that it does not know left out; with ``check`` only look.

    Raises:
        ConfigError: one is missing, has another shape, or holds values that are not finite.
    """
    for name, own in module.state_dict().items():
        given = state.get(name)
        if given is None:
            raise ConfigError(f"{key}: {where} lacks tensor {name}; it is another model, or was cut short")
        if given.shape != own.shape:
            raise ConfigError(f"{key}: {where}: tensor {name} is {list(given.shape)}, not {list(own.shape)}")
        if not check:
            check_finite(name, given, where, key)
    if not check:
        module.load_state_dict({name: state[name] for name in module.state_dict()})


def _kind_at(location: Path, kinds: tuple[Any, ...]) -> Any:
    found = read_object(location / "config.json", "path").get("model_type")
    return next(kind for kind in kinds if kind.config_class.model_type == found)


def _processor(kind: Any, what: str, location: Path, key: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(location, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{key}: {location} has no usable {what}: {' '.join(str(error).split())}") from error
