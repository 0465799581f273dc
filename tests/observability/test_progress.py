"""Progress is lively on a terminal and a few plain lines elsewhere."""

import io
import shlex
import subprocess
import sys

from rich.console import Console

from stage_ray.observability.progress import Progress


def plain() -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(Console(file=out, force_terminal=False, width=200, highlight=False)), out


def test_without_a_terminal_every_tenth_step_and_the_last_are_lines_without_control_codes() -> None:
    progress, out = plain()
    with progress:
        progress.stage("starting workers")
        for step in range(1, 26):
            progress.step(step, 25, {"reward/mean": 0.5, "kl": 0.001, "entropy/policy": None, "images_per_s": 12.0})
    lines = out.getvalue().splitlines()
    assert [line.split()[2] for line in lines if "step" in line] == ["1/25", "11/25", "21/25", "25/25"]
    assert "reward 0.500  KL 0.0010  12.0 images/s" in lines[2] and "ETA" in lines[2]
    assert "\x1b" not in out.getvalue()


def test_a_bar_yields_a_counter_and_says_when_it_is_done() -> None:
    progress, out = plain()
    with progress.bar("evaluating", total=4) as advance:
        advance(3)
        advance()
    assert "evaluating (4) ..." in out.getvalue() and "evaluating: done in 0:00" in out.getvalue()


def test_without_a_terminal_hours_of_work_are_a_few_dozen_lines_and_each_says_how_long_is_left(monkeypatch) -> None:
    out, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("stage_ray.observability.progress.time.monotonic", lambda: clock[0])
    console = Console(file=out, force_terminal=False, width=200, highlight=False, get_time=lambda: clock[0])
    progress = Progress(console)
    with progress.bar("training", total=1000) as advance:
        for _ in range(1000):
            clock[0] += 5
            advance()
    lines = [line for line in out.getvalue().splitlines() if " of 1000" in line]
    assert lines[:2] == ["[0:10] training: 2 of 1000  ETA 1:23:10", "[0:20] training: 4 of 1000  ETA 1:23:00"]
    assert 60 < len(lines) < 90, lines


def test_brackets_in_a_prompt_are_text_not_markup() -> None:
    progress, out = plain()
    progress.note("drew [bold]a [red circle]")
    progress.alarm("kl_blowup", "[/nothing] is wrong")
    assert "drew [bold]a [red circle]" in out.getvalue() and "ALARM kl_blowup: [/nothing] is wrong" in out.getvalue()


def test_on_a_terminal_the_display_ends_with_the_last_numbers() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=100)) as progress:
        progress.stage("starting workers")
        with progress.bar("evaluating", total=2) as advance:
            advance(2)
        progress.step(1, 2, {"reward/mean": 0.25})
        progress.step(2, 2, {"reward/mean": 0.75})
    assert "reward 0.750" in out.getvalue() and "2/2" in out.getvalue()
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1, "the cursor comes back"


def test_work_goes_on_when_nobody_reads_its_output_any_more():
    code = "from stage_ray.observability.progress import Progress\nimport sys\n"
    code += "with Progress() as progress:\n for i in range(3000):\n  progress.note('x' * 100)\n"
    code += "print('more'); sys.stdout.flush(); sys.stderr.write('done\\n')"
    script = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stderr == "stage-ray: nobody reads stdout any more; the work goes on without it\ndone\n"
