"""A judge behind HTTP that goes away in the middle of a run, and comes back or not. Real Ray, a real service."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from stage_ray.errors import RunError
from stage_ray.train import train
from tests.ray_head import free_port
from tests.rewards.services import brightness, service
from tests.runs import lines, tiny_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_ray")]


class Heard(logging.Handler):
    """Sets ``event`` once the driver says that it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.event = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "the run waits for it" in record.getMessage():
            self.event.set()


@pytest.fixture
def waits() -> Iterator[threading.Event]:
    heard = Heard()
    logging.getLogger("stage_ray.cluster.scorers").addHandler(heard)
    yield heard.event
    logging.getLogger("stage_ray.cluster.scorers").removeHandler(heard)


def test_a_run_waits_for_a_judge_that_is_down_and_loses_no_group(tmp_path, plain, waits):
    addresses: queue.Queue[str] = queue.Queue()
    third, finished = threading.Event(), threading.Event()
    calls = []

    def answer(request):
        calls.append(request)
        if len(calls) == 3:
            third.set()
        return brightness(request)

    def keep() -> None:
        """The service: up for three calls, then down until the run says that it waits."""
        with service(answer, free_port()) as url:
            addresses.put(url)
            third.wait()
        waits.wait()
        with service(answer, int(url.rpartition(":")[2])):
            finished.wait()

    threading.Thread(target=keep, daemon=True).start()
    rewards = [{"type": "http", "options": {"url": addresses.get(), "tries": 1}}]
    try:
        train(tiny_run(tmp_path, plain, rewards=rewards, evaluation={"enabled": False}))
    finally:
        finished.set()
    events = Counter(row["event"] for row in lines(tmp_path / "run" / "ledger.jsonl"))
    assert waits.is_set() and events == {"admitted": 8, "generated": 8, "scored": 8, "trained": 8}


def test_a_judge_that_stays_away_ends_the_run_with_its_name_and_the_fix(tmp_path, plain):
    rewards = [{"type": "http", "options": {"url": f"http://127.0.0.1:{free_port()}", "tries": 1}}]
    run = tiny_run(tmp_path, plain, rewards=rewards, scoring={"outage_s": 0.5}, evaluation={"enabled": False})
    with pytest.raises(RunError, match=r"http: 4 of 4 scores failed .*does not answer.*start the service again"):
        train(run)
