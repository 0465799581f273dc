"""`make chaos`: a run with faults injected for minutes, by a seeded schedule, and the count of what it lost.

A real `stage-ray train` (tiny model, two rollout and two reward workers, two steps ahead in order of arrival) loses
workers to SIGKILL and SIGSTOP, and its driver to SIGTERM, SIGINT and SIGKILL, alone or with everything else; then it
goes on with ``--auto-resume``. At the end the ledger is audited and compared with what the learner itself wrote.
Exit code 0 only if no group was lost and none trained twice, the run never stood still, and all records agree.

Only processes of the run are signalled: those of the session (setsid) that the driver was started in.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from stage_ray.run.checkpoint import Checkpoint, CheckpointStore
from tests.audit import Audit, audit, read_ledger

ROOT = Path(__file__).parents[1]
WORKERS = {"rollout": "RolloutWorker", "reward": "RewardWorker", "learner": "LearnerWorker"}
FAULTS = [(role, number) for role in WORKERS for number in (signal.SIGKILL, signal.SIGSTOP)] * 2 + [
    ("driver", signal.SIGKILL),
    ("driver", signal.SIGTERM),
    ("driver", signal.SIGINT),
    ("everything", signal.SIGKILL),
]
GAP_S = (0.5, 9.0)
"""Between two faults, also before the run has recovered from the one before."""
STILL_S = 180.0
"""A run that trains nothing for this time stands still, even on a busy machine and with a worker to replace."""
ENDS = {1, 128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGKILL}
"""Exit codes of a driver: it gave up, with a sentence; it was asked to leave; it was killed."""
STEPS = 1_000_000  # more than fit into any soak: SIGTERM ends it


# What the records of a run say, each written by another part of it.


def audited(run_dir: Path, *, ended: bool) -> Audit:
    """Audit a run's ledger and hold it against checkpoint, recordings and metrics; what disagrees is a fault.

    Args:
        run_dir: of a run whose processes are gone.
        ended: it saved and left by itself, so its last checkpoint must hold every group that is still open.
    """
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    rules: Any = {
        "groups_per_step": config["rollout"]["groups_per_step"],
        "max_staleness": config["pipeline"]["max_staleness"],
    }
    events = read_ledger(run_dir / "ledger.jsonl")
    saved = CheckpointStore(run_dir / "checkpoints", keep=1).latest()
    held = saved.metadata["groups"] if saved and ended else None
    found = audit(events, **rules, held=held)
    faults = [*found.faults, *_recorded_otherwise(run_dir, events, rules["groups_per_step"])]
    if saved is not None:
        faults += _saved_otherwise(run_dir, saved, rules)
    if ended and (saved is None or saved.step != found.steps):
        faults.append(f"{found.steps} steps were trained, and the last checkpoint is {saved}")
    return replace(found, faults=tuple(faults))


def _saved_otherwise(run_dir: Path, saved: Checkpoint, rules: Any) -> list[str]:
    """The weights of a checkpoint have the version, and its groups the state, that the ledger says at its byte."""
    text = (run_dir / "ledger.jsonl").read_bytes()[: saved.metadata["ledger_bytes"]].decode()
    then = audit([json.loads(line) for line in text.splitlines()], **rules)
    version = json.loads((saved.path / "learner.json").read_text())["version"]
    unknown = set(saved.metadata["groups"]) - set(then.open)
    faults = [f"checkpoint of step {saved.step}: weights of version {version}"] * (version != saved.step)
    faults += [f"checkpoint of step {saved.step}: ledger of step {then.steps}"] * (then.steps != saved.step)
    faults += [f"checkpoint of step {saved.step}: holds {unknown}, which are not on their way"] * bool(unknown)
    return faults


def _recorded_otherwise(run_dir: Path, events: list[dict[str, Any]], groups_per_step: int) -> list[str]:
    """Where the run was recorded: the learner wrote the very groups that the ledger says were trained, step by step."""
    trained: dict[int, set[int]] = {}
    for event in events:
        if event["event"] == "trained":
            trained.setdefault(event["step"] + 1, set()).add(event["group_id"])
    faults = []
    for directory in sorted((run_dir / "groups").glob("step-*")):
        step = int(directory.name.removeprefix("step-"))
        groups = {int(path.stem.removeprefix("group-")) for path in directory.glob("group-*.safetensors")}
        whole = len(trained.get(step, ())) == groups_per_step and step < max(trained)  # a kill may cut the last one
        if whole and groups != trained[step]:
            faults.append(f"step {step} trained {sorted(trained[step])} by the ledger, {sorted(groups)} by recording")
    return faults


# Processes of one run, and no others.


def start_driver(command: list[str], **more: Any) -> subprocess.Popen[str]:
    """A driver with a Ray and a session of its own: all processes stay in the session, whatever their parent is."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, text=True, **more)


def of_session(session: int, title: str = "") -> list[psutil.Process]:
    """Living processes of a session whose command line holds ``title``."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess, ProcessLookupError):
            if os.getsid(process.pid) == session and title in " ".join(process.cmdline()):
                found.append(process)
    return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def end_session(session: int) -> int:
    """Kill whatever a dead driver left, and wait until it is gone; how many processes that were."""
    left = of_session(session)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=60)
    return len(left)


# The soak.


@dataclass
class Soak:
    """One run, its driver of the moment, and what happened to both."""

    directory: Path
    choice: random.Random
    injected: Counter[tuple[str, str]] = field(default_factory=Counter)
    resumed: int = 0
    gave_up: int = 0
    problems: list[str] = field(default_factory=list)
    driver: subprocess.Popen[str] | None = None
    began: float = field(default_factory=time.monotonic)
    seen: int = 0
    moved: float = 0.0
    trains: bool = False
    reissued: set[str] = field(default_factory=set)
    asked: bool = False  # to save and leave

    @property
    def run_dir(self) -> Path:
        """Where the run writes."""
        return self.directory / "run"

    def say(self, text: str) -> None:
        """One line, with the clock."""
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        print(f"[{minutes}:{seconds:02d}] {text}", flush=True)

    def steps(self) -> int:
        """Updates in the metrics now."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def start(self) -> None:
        """Start the driver."""
        command = [sys.executable, "-m", "stage_ray", "train", str(self.directory / "config.yaml"), "--auto-resume"]
        again = self.driver is not None
        self.resumed += again
        with (self.directory / "driver.log").open("a") as log:
            self.driver = start_driver(command, stdout=log, stderr=log)
        self.seen, self.moved = self.steps(), time.monotonic()
        self.trains = self.asked = False

    def inject(self, role: str, number: int) -> None:
        """Send a signal to one process of a role, to the driver, or to everything."""
        assert self.driver is not None
        if role in WORKERS:
            targets = of_session(self.driver.pid, f"ray::{WORKERS[role]}")
            targets = [self.choice.choice(sorted(targets, key=lambda p: p.pid))] if targets else []
        else:
            targets = of_session(self.driver.pid)
            targets = targets if role == "everything" else [p for p in targets if p.pid == self.driver.pid]
        for process in targets:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if targets:
            self.asked = self.asked or number in (signal.SIGTERM, signal.SIGINT)
            self.injected[role, signal.Signals(number).name] += 1
            self.say(f"{signal.Signals(number).name} to {role} at step {self.steps()}")

    def collect(self) -> None:
        """The driver is gone: look at what it left, end the rest of it, and check its records."""
        assert self.driver is not None
        code = self.driver.wait()
        left = end_session(self.driver.pid)
        self.gave_up += code == 1
        last = (self.directory / "driver.log").read_text().strip().rpartition("\n")[2]
        if code not in ENDS or (code == 1 and not last.startswith("stage-ray: ")):
            self.problems.append(f"driver {self.resumed} ended with {code}: {last}")
        note = f"driver ended with {code}, {left} processes after it"
        if (self.run_dir / "ledger.jsonl").exists():
            found = audited(self.run_dir, ended=False)
            note += f"; {found.trained} groups trained, {len(found.open)} on their way"
            self.problems += [f"after driver {self.resumed}: {fault}" for fault in _complaints(found)]
        self.say(note)

    def wait(self, seconds: float) -> None:
        """Let the run go on for ``seconds``, or until its driver ends."""
        assert self.driver is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.driver.wait(seconds)

    def soak(self, minutes: float) -> Audit:
        """Inject faults until the time is up, then let the run save and leave; the audit of all of it."""
        deadline = self.began + 60 * minutes
        self.start()
        while time.monotonic() < deadline:
            assert self.driver is not None
            self.wait(self.choice.uniform(*GAP_S))
            self.look()
            if self.driver.poll() is not None:
                self.collect()
                self.start()
            elif time.monotonic() - self.moved > STILL_S:
                self.problems.append(f"stood still at step {self.seen}")
                self.inject("everything", signal.SIGKILL)
            elif self.trains or self.choice.random() < 0.1:  # seldom while it starts: it would never get to train
                self.inject(*self.choice.choice(FAULTS))
        return self.finish()

    def look(self) -> None:
        """Notice whether it trained since the last look; a resume and a rewind only take steps back."""
        now = self.steps()
        if now > self.seen:
            self.moved, self.trains = time.monotonic(), True
        self.seen = now
        ledger = self.run_dir / "ledger.jsonl"
        if ledger.exists():  # a rewind cuts off what came after the checkpoint: count it while it is there
            self.reissued |= {line for line in ledger.read_text().splitlines() if '"reissued"' in line}

    def finish(self) -> Audit:
        """Make the run save and leave by itself, so that every open group must be in its last checkpoint."""
        for _ in range(5):
            if self.leaves():
                break
            self.collect()
            self.start()
        else:
            self.problems.append("the run did not save and leave in five attempts")
        self.collect()
        return audited(self.run_dir, ended=True)

    def leaves(self) -> bool:
        """Let it train a step, ask it to save and leave, and see whether it does."""
        assert self.driver is not None
        limit, asked_before = time.monotonic() + STILL_S, self.asked
        if asked_before:
            self.wait(STILL_S)
        self.trains = False
        while not self.trains and time.monotonic() < limit and self.driver.poll() is None:
            self.wait(0.2)
            self.look()
        self.inject("driver", signal.SIGTERM)
        self.wait(STILL_S)
        if self.driver.poll() is None:
            self.problems.append("did not leave after SIGTERM")
            self.inject("everything", signal.SIGKILL)
        return self.driver.wait() == 128 + signal.SIGTERM and not asked_before


def _complaints(found: Audit) -> list[str]:
    lost = [f"group {group} was lost" for group in found.lost]
    return lost + [f"group {group} was trained twice" for group in found.repeated] + list(found.faults)


def write_config(directory: Path, seed: int) -> None:
    """The run of the soak: `tests.plain`'s model, so that steps are short and most time goes into recoveries."""
    from tests.plain import plain_checkpoint
    from tests.runs import tiny_run

    run = tiny_run(
        directory,
        plain_checkpoint(directory / "plain"),
        steps=STEPS,
        seed=seed,
        rollout={"workers": 2, "images_per_batch": 1},  # slow, so that a fault hits a rollout worker at work
        scoring={"workers": 2, "timeout_s": 20.0},
        pipeline={"max_staleness": 2, "order": "arrival", "record": True},
        checkpoint={"every": 5, "keep": 3},
        evaluation={"enabled": False, "sample_every": STEPS},
        cluster={"heartbeat_s": 1.0, "heartbeat_deadline_s": 5.0},
    )
    (directory / "config.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))


def table(soak: Soak, found: Audit) -> str:
    """The tally."""
    rows = [(f"{name} to {role}", count) for (role, name), count in sorted(soak.injected.items())]
    rows += [("runs resumed", soak.resumed), ("of which gave up with a sentence", soak.gave_up)]
    rows += [("steps trained", found.steps), ("groups admitted", found.admitted), ("groups trained", found.trained)]
    rows += [("groups on their way", len(found.open)), ("groups dropped with a reason", found.dropped)]
    rows += [("groups issued again", len(soak.reissued)), ("groups lost", len(found.lost))]
    rows += [("groups repeated", len(found.repeated)), ("other problems", len(soak.problems) + len(found.faults))]
    return "\n".join(f"{name:36} {count:6d}" for name, count in rows)


def main() -> int:
    """Run a soak; 0 if nothing was lost, repeated or otherwise wrong."""
    parser = argparse.ArgumentParser(description="Inject faults into a run for minutes and count what it lost")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="fixes model, prompts, and the schedule of faults")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="stage-ray-chaos-"))
    write_config(directory, options.seed)
    soak = Soak(directory, random.Random(options.seed))
    soak.say(f"seed {options.seed}, {options.minutes:g} minutes, everything in {directory}")
    try:
        found = soak.soak(options.minutes)
    finally:
        if soak.driver is not None:
            end_session(soak.driver.pid)
    problems = soak.problems + _complaints(found)
    print(table(soak, found), *problems, sep="\n")
    if problems:
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
