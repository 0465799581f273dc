"""A rollout worker of two processes: draws what one draws, lives and dies as one. Real vLLM, Ray and signals."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from stage_ray.engines.vllm.ranks import TensorRanks
from stage_ray.errors import ConfigError
from stage_ray.observability.progress import Progress
from stage_ray.train import train
from tests.runs import lines, tiny_run
from tests.test_async import QUICK, sound
from tests.test_security import is_loopback, is_private

pytest.importorskip("vllm")
ROLLOUT = {"engine": "vllm", "tensor_parallel": 2, "kv_cache_gib": 0.25, "dtype": "float32"}


class SignalsRank(Progress):
    """Sends a signal to the second process of the rollout worker when some steps are done."""

    def __init__(self, signals: dict[int, int]) -> None:
        super().__init__()
        self.signals, self.hit = signals, 0
        self.listening: set[str] = set()
        self.sockets: set[str] = set()

    def step(self, step: int, total: int, metrics) -> None:
        super().step(step, total, metrics)
        if step in self.signals:
            children = psutil.Process().children(recursive=True)
            ranks = [process for process in children if "ray::RolloutWorker" in " ".join(process.cmdline())]
            assert len(ranks) == 2
            for rank in ranks:
                self.listening |= {c.laddr.ip for c in rank.net_connections("inet") if not c.raddr}
                self.sockets |= {c.laddr for c in rank.net_connections("unix") if c.laddr}
            max(ranks, key=lambda process: process.pid).send_signal(self.signals[step])
            self.hit += 1


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()


@pytest.mark.slow
def test_where_one_process_hangs_the_worker_is_replaced_and_draws_its_groups_again(tmp_path, model):
    changes = {
        "steps": 4,
        "rollout": ROLLOUT,
        "learner": {"lr": 1e-3},
        "cluster": {"object_store_mb": 128, "heartbeat_s": 0.5, "heartbeat_deadline_s": 3.0},
        **QUICK,
    }
    signals, before = SignalsRank({2: signal.SIGSTOP}), shared_memory()
    run = train(tiny_run(tmp_path, model, **changes), progress=signals).run_dir
    rows = lines(run / "metrics.jsonl")
    assert signals.hit == 1 and rows[-1]["workers/restarts"] >= 1
    assert sound(run).trained == 8
    # What the learner says of the tokens that the two drew together with its weights, which a step at this rate moves
    # by far more.
    assert all(row["mismatch/abs_logprob"] < 1e-4 for row in rows) and rows[-1]["kl"] > 1e-5
    assert signals.listening and all(is_loopback(address) for address in signals.listening)
    assert signals.sockets and all(is_private(Path(socket)) for socket in signals.sockets)
    logs = {path.stem for path in (run / "logs").glob("rollout-0*.log")}
    assert {"rollout-0-rank-0", "rollout-0-rank-1", "rollout-0-restart-1-rank-1"} <= logs
    deadline = time.monotonic() + 60  # what other tests share meanwhile goes with them
    while left := {name for name in shared_memory() - before if "cpushm" in name or name.startswith("psm_")}:
        assert time.monotonic() < deadline, f"what a killed worker's ranks shared outlives them: {left}"
        time.sleep(0.5)


def test_processes_that_cannot_share_the_heads_are_refused_with_the_numbers_that_can():
    TensorRanks(count=2).check_heads(2, 1)  # one head of keys, on both
    with pytest.raises(ConfigError, match=r"rollout.tensor_parallel = 3 .* 2 attention heads .*; take one of \[1, 2\]"):
        TensorRanks(count=3).check_heads(2, 1)


def test_the_torch_engine_is_one_process(tmp_path):
    with pytest.raises(ConfigError, match=r"rollout.tensor_parallel = 2 needs rollout.engine = vllm"):
        tiny_run(tmp_path, tmp_path / "janus", rollout={"engine": "torch", "tensor_parallel": 2})
