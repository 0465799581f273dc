"""Prompt files: text, JSON Lines, JSON, CSV, Parquet, compressed or not, or a directory of texts, into prompts.

What has a plain meaning is read; everything else is refused with the file, the line and what is wanted there.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stage_ray.config import PromptsConfig
from stage_ray.config.paths import resolve_path
from stage_ray.errors import ConfigError
from stage_ray.pipeline.geneval_prompts import SCHEME, geneval_prompts
from stage_ray.records import Prompt
from stage_ray.registry import require_extra

TEXT_KEYS = ("prompt", "caption", "text", "prompts", "prompt_en", "class")  # the first that a record or a header has
EXAMPLE = '{"prompt": "a photo of a circle"}'
PARQUET = ".parquet"
GZIP_MAGIC = b"\x1f\x8b"

Record = tuple[str, dict[str, Any]]  # where it stands ("p.jsonl, line 3"), and the whole of it, with "prompt"


def load_prompts(location: str) -> list[Prompt]:
    """Read prompts, in the order of the file (of a directory: of its files' names).

    ``.jsonl``, ``.ndjson``: an object or a text a line. ``.json``: the same, or one array of them. ``.csv``, ``.tsv``:
    a header with ``prompt``, ``caption``, ``text`` or ``class``. ``.parquet``: such a column. ``.txt`` or no
    suffix: a prompt a line. Each may be compressed (``.gz``). A directory: each ``.txt`` in it is one prompt. ``\\n``
    and ``\\r\\n`` alone end a line; a byte order mark is no part of anything. ``geneval:test``, ``geneval:train``: see
    `geneval_prompts`.

    Raises:
        ConfigError: a missing, empty or malformed file; names the line.
    """
    if location.startswith(SCHEME):
        made = enumerate(geneval_prompts(location))
        return [Prompt(index, record["prompt"], record, f"{location}, {index + 1}") for index, record in made]
    path = resolve_path(location)
    records = list(_directory(path) if path.is_dir() else _file(path))
    if not records:
        raise ConfigError(f"prompt file {location} holds no prompts; give it at least one line")
    return [Prompt(index, record["prompt"], record, where) for index, (where, record) in enumerate(records)]


def load_mix(prompts: PromptsConfig, without: Collection[str] = ()) -> list[Prompt]:
    """Read every file of ``prompts.train``, numbered on from one to the next, but those of the keys ``without``.

    Raises:
        ConfigError: as `load_prompts`.
    """
    found: list[Prompt] = []
    for source, (key, file) in enumerate(prompts.files.items()):
        own = load_prompts(file.path) if key not in without else []
        found += [replace(prompt, index=index, source=source) for index, prompt in enumerate(own, start=len(found))]
    return found


def _directory(path: Path) -> Iterator[Record]:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".txt")
    if not files:
        raise ConfigError(f"prompts: {path} is a directory without .txt files; each of them would be one prompt")
    for file in files:
        text = " ".join(_read(file).split())
        yield str(file), _record({"prompt": text}, str(file))


def _file(path: Path) -> Iterator[Record]:
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix == PARQUET:
        yield from _parquet(path)
        return
    if suffix not in READERS:
        known = ", ".join([*filter(None, READERS), PARQUET])
        raise ConfigError(f"prompt file {path} ends in {suffix}, which is not read here; save it as one of {known}")
    yield from READERS[suffix](_read(path), path)


def _read(path: Path) -> str:
    """The text of a file, unpacked, without a byte order mark."""
    try:
        data = path.read_bytes()
        if data.startswith(GZIP_MAGIC):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"prompt file {path} cannot be read: {error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}, line {line}: prompt file is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    if "\0" in text:
        raise ConfigError(f"prompt file {path} is not UTF-8 text: it holds NUL bytes; save it as UTF-8")
    return text


def _lines(text: str, path: Path) -> Iterator[tuple[str, str]]:
    """Where each line stands and what is on it, empty ones left out."""
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        line = line.strip("\ufeff").strip()  # files that were laid one after another bring their marks along
        if line:
            yield f"{path}, line {number}", line


def _text(text: str, path: Path) -> Iterator[Record]:
    for where, line in _lines(text, path):
        yield where, _record({"prompt": line}, where)


def _json_lines(text: str, path: Path) -> Iterator[Record]:
    if text.lstrip().startswith("["):  # an array under the name of lines
        yield from _json(text, path)
        return
    for where, line in _lines(text, path):
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise ConfigError(f"{where}: not a JSON object ({reason}); a line should be like {EXAMPLE}") from error
        yield where, _record(value, where)


def _json(text: str, path: Path) -> Iterator[Record]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data" and not text.lstrip().startswith("["):
            yield from _json_lines(text, path)  # lines under the name of one object
            return
        line = getattr(error, "lineno", 1)
        raise ConfigError(f"{path}, line {line}: not JSON ({getattr(error, 'msg', error)})") from error
    for number, item in enumerate(value if isinstance(value, list) else [value], start=1):
        where = f"{path}, item {number}" if isinstance(value, list) else str(path)
        yield where, _record(item, where)


def _table(text: str, path: Path) -> Iterator[Record]:
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in rows.fieldnames or []]
        rows.fieldnames = header
        column = next((name for key in TEXT_KEYS for name in header if name.lower() == key), None)
        if column is None:
            raise ConfigError(
                f"{path}, line 1: no column is called {', '.join(TEXT_KEYS[:-2])}; its columns are {', '.join(header)}"
            )
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if None in row or None in row.values():
                raise ConfigError(f"{where}: {len(header)} columns are in the header and not as many in this line")
            yield where, _record({**row, "prompt": row[column]}, where)
    except csv.Error as error:
        raise ConfigError(f"{path}, line {rows.line_num}: not CSV ({error})") from error


def _parquet(path: Path) -> Iterator[Record]:
    require_extra("parquet", "pyarrow")
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"prompt file {path} cannot be read: {' '.join(str(error).split())}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", _record(row, f"{path}, row {number}")


def _record(value: Any, where: str) -> dict[str, Any]:
    """One prompt's record with its text under ``prompt``."""
    if isinstance(value, str):
        value = {"prompt": value}
    named = {str(key).lower(): item for key, item in value.items()} if isinstance(value, Mapping) else {}
    text = next((named[key] for key in TEXT_KEYS if key in named), None)
    if isinstance(text, int) and text == named.get("class"):
        text = str(text)  # a class by its number is a whole prompt for some models
    if not isinstance(text, str) or not text.strip():
        found = f"has {', '.join(map(str, value)) or 'nothing'}" if isinstance(value, Mapping) else f"is {value!r:.60}"
        raise ConfigError(
            f'{where}: needs a non-empty "prompt" (or "caption", "text"), for example {EXAMPLE}; it {found}'
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: half a character (a lone surrogate) stands at {error.start} of its text"
        ) from error
    return {**value, "prompt": text.strip()}


READERS: Mapping[str, Callable[[str, Path], Iterator[Record]]] = {
    "": _text,
    ".txt": _text,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
}
