"""A self-contained HTML page from one of ``templates/``."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from stage_ray.errors import ConfigError
from stage_ray.files import atomic_write


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a template and write it, whole or not at all."""
    loader = PackageLoader("stage_ray.report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    atomic_write(path, environment.get_template(template).render(**values))


def config_of(run_dir: Path) -> str:
    """The text of a run's config; a ConfigError where the directory holds no run."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run_dir} holds no run: there is no config.yaml in it")
    return file.read_text(encoding="utf-8")


def pictures(captions: Mapping[Path, str]) -> dict[str, str]:
    """Caption -> data URI of each PNG file that exists."""
    return {
        caption: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        for path, caption in captions.items()
        if path.is_file()
    }
