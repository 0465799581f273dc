"""What all tests share: one tiny checkpoint, and the order in which files run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.plain import plain_checkpoint

if TYPE_CHECKING:
    from tests.ray_head import Head


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Janus checkpoint. No test writes into it."""
    from tests.tiny import tiny_janus  # late: transformers' models, which few processes need

    return tiny_janus(tmp_path_factory.mktemp("model") / "janus")


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `tests.plain`, for runs that are about the machine around the model. No test writes into it."""
    return plain_checkpoint(tmp_path_factory.mktemp("model") / "plain")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products on several threads wait for each other longer than they compute, on a busy machine above all."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def session_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A Ray for as long as tests run: the start of one takes as long as a tiny run."""
    from tests.ray_head import ray_head

    with ray_head(tmp_path_factory.mktemp("ray"), jobs=False) as head:
        yield head


@pytest.fixture(scope="module")
def one_ray(session_head: Head) -> Iterator[None]:
    """One Ray for the runs of a file that say nothing about how Ray starts and ends."""
    from tests.ray_head import joining

    with joining(session_head):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests first: a long one that begins last would keep one process busy alone."""
    slow: dict[Path, int] = {}
    for item in items:
        slow[item.path] = slow.get(item.path, 0) + (item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -slow[item.path])  # stable: a file's tests keep their order and stay together
