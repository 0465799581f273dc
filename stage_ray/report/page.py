"""A self-contained HTML page from one of ``templates/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from stage_ray.files import atomic_write


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a template and write it, whole or not at all."""
    loader = PackageLoader("stage_ray.report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    atomic_write(path, environment.get_template(template).render(**values))
