"""What dead runs leave of Ray is removed by the next one; what lives, or is not ours, stays."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from stage_ray.cluster.runtime import lock_session, remove_dead_sessions

HOLDS = """
import sys
from pathlib import Path
from stage_ray.cluster.runtime import lock_session
held = lock_session(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def session(directory: Path, name: str) -> Path:
    path = directory / f"session_{name}"
    (path / "logs").mkdir(parents=True)
    (path / "logs" / "raylet.out").write_text("hello")
    return path


def test_sessions_of_runs_that_ended_are_removed_and_no_others(tmp_path):
    ended, foreign, mine, killed = (session(tmp_path, name) for name in ("ended", "foreign", "mine", "killed"))
    (tmp_path / "session_latest").symlink_to(killed)
    lock_session(ended).close()
    with lock_session(mine):
        command = [sys.executable, "-c", HOLDS, str(killed)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None and run.stdout.readline() == "locked\n"
            remove_dead_sessions(tmp_path)
            assert not ended.exists() and killed.exists() and foreign.exists()
            run.send_signal(signal.SIGKILL)
        remove_dead_sessions(tmp_path)
        assert not killed.exists() and mine.exists() and foreign.exists()
        assert [path.name for path in tmp_path.glob("*.lock")] == ["session_mine.lock"]
    remove_dead_sessions(tmp_path)
    assert not mine.exists() and foreign.exists()
    remove_dead_sessions(tmp_path / "nowhere")
