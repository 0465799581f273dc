"""``stage-ray index``: the pictures of a directory as tokens of a model's image tokenizer, to retrieve from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import xxhash
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stage_ray.config import PolicyConfig
from stage_ray.errors import ConfigError, RunError
from stage_ray.evaluation.pictures import SUFFIXES, read_picture
from stage_ray.files import name_disk_errors, require_writable, sync_path
from stage_ray.observability.progress import Progress
from stage_ray.policies import family_of, policy_class
from stage_ray.policies.codec import ImageCodec
from stage_ray.pretrained import located
from stage_ray.registry import require_extra
from stage_ray.run.stop import stops_at_once
from stage_ray.samplers.patch_index import EXTRA, PatchIndex

Kind = Literal["auto", "exact", "ivfpq"]
EXACT_PATCHES = 1_000_000  # up to which `auto` compares all of them: more take longer than the model
PART = 256  # pictures of a part, which is what an interrupt can cost
ENCODED_AT_ONCE = 16
SHOWN = 10  # unreadable pictures that are named


def index_pictures(
    model: str,
    pictures: Path,
    out: Path,
    *,
    kind: Kind = "auto",
    family: str | None = None,
    progress: Progress | None = None,
) -> PatchIndex:
    """Encode every picture below a directory and write the index; each argument is an option of `stage-ray index`.

    A picture is scaled until its shorter side fits, and cut at the middle. One that cannot be read is left out, by its
    name. What is encoded is kept in ``OUT.parts``, where the same call goes on.

    Raises:
        ConfigError: a wrong argument, no pictures, a family that encodes none, or parts of something else.
        RunError: no picture can be read.
        Interrupted: by a signal.
    """
    if out.exists():
        raise ConfigError(f"--out {out} exists; name another file, or remove it")
    require_writable(out.parent, "--out")
    files = sorted(path for path in pictures.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ConfigError(f"{pictures} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    codec = _codec(model, family)
    rows, columns = codec.grid
    if rows < 2 or columns < 3:
        raise ConfigError(f"{model} draws {rows} x {columns} tokens, none of which has four neighbours")
    lists = kind == "ivfpq" or (kind == "auto" and len(files) * (rows - 1) * (columns - 2) > EXACT_PATCHES)
    if lists:
        require_extra(*EXTRA)
    go_on = "the same command goes on after the pictures that are done"
    with progress or Progress() as shown, stops_at_once(go_on), name_disk_errors(out, go_on):
        parts = out.with_name(out.name + ".parts")
        tokens, skipped = _encoded(codec, pictures, files, parts, shown)
        for name, why in list(skipped.items())[:SHOWN]:
            shown.note(f"left out: {name}: {why}")
        if not len(tokens):
            name, why = next(iter(skipped.items()))
            raise RunError(f"none of {len(files)} pictures of {pictures} can be read; the first, {name}: {why}")
        index = PatchIndex(tokens, codec.codebook().cpu())
        if lists:
            shown.stage(f"training faiss on {len(index.codes)} patches")
            index = index.with_lists()
        index.save(out)
        shutil.rmtree(parts)
        left_out = f", {len(skipped)} left out" if skipped else ""
        shown.note(f"{out}: {len(index.codes)} patches of {len(tokens)} pictures{left_out}")
    return index


def _codec(model: str, family: str | None) -> ImageCodec:
    directory = located(model)
    family = family or (family_of(directory, "MODEL") if directory else None)
    policy = PolicyConfig(path=model, **({"family": family} if family else {}))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return policy_class(policy).load_codec(policy, device=device)


def _encoded(
    codec: ImageCodec, pictures: Path, files: Sequence[Path], parts: Path, progress: Progress
) -> tuple[Tensor, dict[str, str]]:
    """Tokens int32 [P, rows, columns], and why each other picture was left out; part by part, those there first."""
    size = codec.decode(torch.zeros(1, codec.image_tokens, dtype=torch.int64)).shape[1:3]  # H, W
    names = [str(file.relative_to(pictures)) for file in files]
    whole = json.dumps([names, [file.stat().st_size for file in files], codec.grid]).encode()
    of = xxhash.xxh3_64_hexdigest(whole + codec.codebook().cpu().numpy().tobytes())
    found, skipped = [], dict[str, str]()
    parts.mkdir(exist_ok=True)
    with progress.bar("encoding pictures", len(files)) as advance:
        for start in range(0, len(files), PART):
            file, chosen = parts / f"{start:09d}.safetensors", slice(start, start + PART)
            if not file.is_file():
                _encode_part(codec, files[chosen], names[chosen], size, file, of)
            tokens, why = _read_part(file, of)
            found.append(tokens)
            skipped |= why
            advance(len(files[chosen]))
    return torch.cat(found), skipped


def _encode_part(
    codec: ImageCodec, files: Sequence[Path], names: Sequence[str], size: Sequence[int], out: Path, of: str
) -> None:
    skipped = dict[str, str]()

    def read(file: Path, name: str) -> np.ndarray | None:
        try:
            return np.asarray(ImageOps.fit(read_picture(file), (size[1], size[0]), Image.Resampling.BILINEAR))
        except OSError as error:
            skipped[name] = str(error)
            return None

    with ThreadPoolExecutor() as threads:
        images = [image for image in threads.map(read, files, names) if image is not None]
    empty = torch.empty((0, *codec.grid), dtype=torch.int32)
    batches = (images[first : first + ENCODED_AT_ONCE] for first in range(0, len(images), ENCODED_AT_ONCE))
    encoded = [codec.encode(torch.from_numpy(np.stack(batch))).int().unflatten(1, codec.grid) for batch in batches]
    scratch = out.with_suffix(".tmp")
    save_file({"tokens": torch.cat([empty, *encoded])}, scratch, metadata={"of": of, "skipped": json.dumps(skipped)})
    sync_path(scratch)
    scratch.replace(out)


def _read_part(file: Path, of: str) -> tuple[Tensor, dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
            if about.get("of") != of:
                raise ConfigError(f"{file.parent} holds a part of other pictures or another model; remove it")
            return opened.get_tensor("tokens"), json.loads(about["skipped"])
    except SafetensorError as error:
        raise RunError(f"{file} is damaged ({error}); remove it to encode its pictures again") from error
