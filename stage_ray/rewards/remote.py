"""What scorers share that ask a service: pictures on the wire, and what is said of a service that is down."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import Image

from stage_ray.errors import ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")


def png_base64(image: np.ndarray, longest_side: int | None = None) -> str:
    """An image, uint8 [H, W, 3], as base64 of a PNG (JPEG would change scores), made smaller where it is larger."""
    picture = Image.fromarray(image)
    if longest_side is not None and max(picture.size) > longest_side:
        picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def at_once(ask: Callable[[Item], Result], items: Iterable[Item], number: int) -> list[Result]:
    """What ``ask`` answers about each item, in order, with so many requests under way; the first error is raised."""
    with ThreadPoolExecutor(number) as threads:
        return list(threads.map(ask, items))


def secret(variable: str | None) -> str | None:
    """The value of an environment variable that holds a key; None without one. A config never holds the key itself.

    Raises:
        ConfigError: the variable is not set.
    """
    if variable is None:
        return None
    if not (value := os.environ.get(variable)):
        raise ConfigError(
            f"api_key_env: the environment variable {variable} is not set here; export it, or leave it out"
        )
    return value


def require_url(url: str) -> None:
    """Raise a ConfigError where it is no address of a service."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"url = {url!r} is no address; it should be like http://127.0.0.1:8000")


def finite(values: Sequence[float | None]) -> np.ndarray:
    """Scores, float32 [B], NaN where there is None."""
    return np.asarray([np.nan if value is None else value for value in values], np.float32)
