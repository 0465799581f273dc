"""The Slurm scripts, run by a real bash beside stand-ins for Slurm's own programs: who starts where and how it ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.deploy.charts import ROOT

SLURM = ROOT / "deploy" / "slurm"
SCRIPTS = sorted(SLURM.glob("*.sbatch"))
SAYS = '#!/usr/bin/env bash\necho "$(basename "$0") $*" >> "$CALLS"\n'
PROGRAMS = {
    # it trains until it is told to stop, as the real one: then it saves and ends with 128 + the signal's number
    "stage-ray": """
trap 'echo saved >> "$CALLS"; exit 138' USR1
trap 'echo saved >> "$CALLS"; exit 143' TERM
if [ -n "${ENDS:-}" ]; then exit "$ENDS"; fi
echo trains >> "$CALLS"
while true; do sleep 0.05; done
""",
    "srun": """
while [ "${1#--}" != "$1" ]; do [ "${1#--nodelist=}" = "$1" ] || node=${1#--nodelist=}; shift; done
[ "$1" = hostname ] && { echo "10.0.0.7 fe80::1"; exit; }
NODE=$node exec "$@"
""",
    "scontrol": '[ "$1" != show ] || printf "%s\\n" node-a node-b node-c\n',
    "ray": """
[ "$1" = start ] && { echo "on ${NODE:-here}" >> "$CALLS"; exec sleep 60; }
exit 0
""",
    "apptainer": 'shift; while [ "${1#-}" != "$1" ]; do shift; done; shift; exec "$@"\n',
}


@pytest.fixture
def slurm(tmp_path):
    """Starts a script as Slurm would; its process, and what was called so far."""
    (tmp_path / "bin").mkdir()
    for name, body in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(SAYS + body)
        (tmp_path / "bin" / name).chmod(0o755)
    calls, started = tmp_path / "calls", []
    calls.touch()
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    plain |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), "CALLS": str(calls)}
    plain |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node-[a-c]"}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")

    def start(script: str, *arguments: str, **variables: str) -> tuple[subprocess.Popen[str], Path]:
        command = ["bash", str(SLURM / script), *arguments]
        process = subprocess.Popen(
            command, env=plain | variables, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process, calls

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(calls: Path, text: str) -> str:
    deadline = time.monotonic() + 60
    while text not in calls.read_text():
        assert time.monotonic() < deadline, calls.read_text()
        time.sleep(0.02)
    return calls.read_text()


@pytest.mark.parametrize("script", [*SCRIPTS, SLURM / "common.sh"], ids=lambda path: path.name)
def test_a_script_is_one_that_bash_reads(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, check=True).stderr == b""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_is_asked_for_a_warning_and_a_place_in_the_queue(script):
    options = re.findall(r"^#SBATCH (.*)$", script.read_text(), flags=re.MULTILINE)
    assert {"--signal=B:USR1@600", "--requeue", "--open-mode=append"} <= set(options)


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_before_its_time_is_up_the_training_saves_and_the_job_is_queued_again(slurm, script):
    job, calls = slurm(script, "my.yaml", "/shared/runs/first", "--set", "steps=9")
    wait_for(calls, "stage-ray train my.yaml --run-dir /shared/runs/first --set steps=9 --auto-resume\n")
    wait_for(calls, "trains")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 138
    said = calls.read_text()
    assert 0 < said.index("saved\n") < said.index("scontrol requeue 12345\n")


def test_a_job_that_is_cancelled_saves_and_is_not_queued_again(slurm):
    job, calls = slurm("one-node.sbatch", "my.yaml", "/shared/runs/first")
    wait_for(calls, "trains")
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 143
    assert calls.read_text().endswith("saved\n") and "requeue" not in calls.read_text()


@pytest.mark.parametrize("code", ["0", "1", "2"])
def test_the_job_ends_as_its_training_does(slurm, code):
    job, calls = slurm("one-node.sbatch", "my.yaml", "/shared/runs/first", ENDS=code)
    assert job.wait(60) == int(code) and "requeue" not in calls.read_text()


def test_ray_is_on_every_node_and_the_head_on_the_first(slurm):
    job, calls = slurm("several-nodes.sbatch", "my.yaml", "/shared/runs/first", SLURM_CPUS_PER_TASK="16")
    for node in ("node-a", "node-b", "node-c"):
        wait_for(calls, f"on {node}\n")
    wait_for(calls, "trains")
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 143
    starts = re.findall(r"^ray (start .*)$", calls.read_text(), flags=re.MULTILINE)
    head, *others = sorted(starts, key=lambda line: "--head" not in line)
    common = "start --block --disable-usage-stats --num-cpus=16"
    assert head == f"{common} --head --node-ip-address=10.0.0.7 --port=22345 --dashboard-host=127.0.0.1"
    assert others == [f"{common} --address=10.0.0.7:22345"] * 2


def test_in_an_image_everything_runs_inside_of_it(slurm):
    job, calls = slurm("one-node.sbatch", "my.yaml", "/runs/first", IMAGE="stage-ray.sif", BIND="/shared", ENDS="0")
    assert job.wait(60) == 0
    assert "apptainer exec --nv --bind=/shared stage-ray.sif stage-ray train my.yaml" in calls.read_text()


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_without_a_config_and_a_directory_it_says_how_it_is_called(slurm, script):
    job, _ = slurm(script, "my.yaml")
    assert job.wait(60) == 2
    assert job.stderr is not None and job.stderr.read().startswith("usage: sbatch ")
