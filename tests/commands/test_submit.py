"""What `stage-ray submit` decides and packs before it talks to a cluster; tests/commands/test_jobs.py has one."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, create_package, get_uri_for_directory
from ray.job_submission import JobDetails

from stage_ray.cli import main
from stage_ray.commands.job import CAP_MIB, Job, plan_job, stage_files
from stage_ray.commands.submit import _exit_code, _last_attempt, submit_job
from stage_ray.errors import ConfigError, Interrupted, RunError
from tests.ray_head import free_port

CONFIG = Path(__file__).parents[2] / "configs" / "stage_shapeworld.yaml"
SHARED = Path("/shared/runs/first")


def job(name: str, status: str, run_dir: str = "/shared/first", digest: str = "", **more: object) -> JobDetails:
    """What the Jobs API says of a job."""
    metadata = {"stage_ray_run_dir": run_dir, "stage_ray_digest": digest}
    return JobDetails(type="SUBMISSION", submission_id=name, status=status, entrypoint="", metadata=metadata, **more)


def package(job: Job, target: Path) -> Path:
    """The zip that Ray's client makes of a job's files and uploads."""
    with tempfile.TemporaryDirectory() as directory:
        staged = stage_files(job, Path(directory))
        excludes = [".git", ".venv", "venv", "__pycache__", *job.runtime_env["excludes"]]
        create_package(str(staged), target, include_gitignore=True, excludes=excludes)
    return target


def sent(job: Job) -> set[str]:
    """Names of the files that a job carries."""
    names = zipfile.ZipFile(package(job, Path(tempfile.mkdtemp()) / "sent.zip")).namelist()
    return {name for name in names if name != "submission" and not name.endswith("/")}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a config of its own, prompts, and much that no job needs."""
    text = CONFIG.read_text().replace("package:stage_ray/shapeworld/assets/prompts/train.jsonl", "prompts/mine.txt")
    for name, content in {
        "configs/mine.yaml": text,
        "prompts/mine.txt": "a photo of a red circle\n",
        "prompts/other.txt": "a photo of a ring\n",
        "my_scorer.py": "",
        ".git/config": "",
        ".env": "SECRET=1",
        "env/pyvenv.cfg": "",
        "env/lib/big.py": "",
        "runs/old/metrics.jsonl": "",
        "tests/test_it.py": "",
        "lib/tests/kept.py": "",
        "lib/__pycache__/a.pyc": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_same_run_has_the_same_name_and_another_one_another():
    first = plan_job(CONFIG, ["steps=5"], SHARED).name
    assert first == plan_job(CONFIG, ["steps=5"], SHARED).name
    assert first.startswith("stage-ray-first-") and len(first) == len("stage-ray-first-") + 8
    others = {
        plan_job(CONFIG, ["steps=6"], SHARED).name,
        plan_job(CONFIG, ["steps=5"], Path("/elsewhere/first")).name,
        plan_job(CONFIG, ["steps=5"], Path("/shared/Ü b/")).name,
    }
    assert first not in others and len(others) == 3


def test_the_driver_gets_the_overrides_as_they_were_written():
    overrides = ["learner.lr=1e-5", "rewards.0.name=it's $HOME"]
    words = shlex.split(plan_job(CONFIG, overrides, SHARED).entrypoint)
    assert words[:4] == ["python", "-m", "stage_ray", "train"] and words[4].endswith("stage_shapeworld.yaml")
    assert words[5:] == ["--set", overrides[0], "--set", overrides[1], "--run-dir", str(SHARED), "--auto-resume"]
    assert "--auto-resume" not in plan_job(CONFIG, run_dir=SHARED, auto_resume=False).entrypoint


def test_a_stopped_job_has_time_to_save():
    assert int(plan_job(CONFIG, run_dir=SHARED).runtime_env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "run_dir = 'runs/stage_shapeworld' is relative"),
        (["--run-dir", "mine"], "name shared storage, such as --run-dir /shared/runs/first, or add --scratch"),
        (["--run-dir", "/s/a", "--set", "learner.lrr=1"], "did you mean 'learner.lr'?"),
        (["--run-dir", "/s/a", "--id", "a.2"], "--id 'a.2': use up to 100 letters"),
        (["--run-dir", "/s/a", "--env", "NOT_SET_HERE"], "--env NOT_SET_HERE: no such variable is set here"),
        (["--run-dir", "/s/a", "--working-dir", "/nowhere"], "--working-dir /nowhere is not a directory"),
        (["--run-dir", "/s/a", "--working-dir", ".", "--image-has-code"], "exclude each other"),
        (["--run-dir", "/s/a", "--entrypoint-resources", "driver"], "is not a mapping of names to numbers"),
        (["--run-dir", "/s/a", "--runtime-env", "none.yaml"], "--runtime-env none.yaml is not readable YAML"),
        (["--run-dir", "/s/a", "--address", "auto"], "--address 'auto' is not the address of a Ray dashboard"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(arguments, sentence, here, capsys):
    assert main(["submit", str(CONFIG), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("stage-ray: ") and error.count("\n") == 1 and sentence in error, error


def test_a_value_that_was_given_with_its_name_is_refused_and_not_repeated(capsys):
    assert main(["submit", str(CONFIG), "--run-dir", "/s/a", "--env", "HF_TOKEN=hush-hush"]) == 2
    error = capsys.readouterr().err
    assert "--env HF_TOKEN=...: give the name alone" in error and "hush" not in error


def test_a_variable_is_taken_by_its_name_and_never_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hush-hush")
    planned = plan_job(CONFIG, run_dir=SHARED, env=["HF_TOKEN"])
    assert planned.runtime_env["env_vars"]["HF_TOKEN"] == "hush-hush" and "hush" not in repr(planned)


def test_without_a_dashboard_one_sentence_names_the_address(capsys):
    assert main(["submit", str(CONFIG), "--run-dir", "/s/a", "--address", "http://127.0.0.1:9"]) == 1
    assert "no Ray dashboard answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_a_relative_run_directory_is_taken_when_it_is_wanted():
    planned = plan_job(CONFIG, run_dir=Path("my own"), scratch=True)
    assert planned.run_dir == "my own" and planned.entrypoint.endswith(""" --auto-resume --run-dir "$PWD"/'my own'""")


def test_the_package_holds_the_config_the_files_it_names_and_the_code(here):
    files = sent(plan_job(Path("configs/mine.yaml"), run_dir=SHARED))
    assert {"configs/mine.yaml", "prompts/mine.txt", "stage_ray/train.py"} <= files
    assert {name for name in files if not name.startswith("stage_ray")} == {"configs/mine.yaml", "prompts/mine.txt"}
    assert not [name for name in files if "__pycache__" in name]


def test_an_image_that_has_the_code_is_sent_the_config_alone(here):
    planned = plan_job(Path("configs/mine.yaml"), run_dir=SHARED, image_has_code=True)
    assert sent(planned) == {"configs/mine.yaml", "prompts/mine.txt"}


def test_a_shipped_config_is_sent_by_its_name_with_its_base(here):
    planned = plan_job(Path("gcpo_shapeworld"), run_dir=SHARED, image_has_code=True)
    assert sent(planned) == {"gcpo_shapeworld.yaml", "grpo_shapeworld.yaml"}
    assert shlex.split(planned.entrypoint)[4] == "gcpo_shapeworld.yaml"
    planned = plan_job(Path("gcpo_shapeworld"), run_dir=SHARED, working_dir=Path("lib"))
    assert sent(planned) == {"gcpo_shapeworld.yaml", "grpo_shapeworld.yaml", "tests/kept.py"}


def test_a_base_that_ships_is_in_the_code_that_is_sent(here):
    assert main(["init", "gcpo_shapeworld", "--out", "configs/gcpo.yaml"]) == 0
    files = sent(plan_job(Path("configs/gcpo.yaml"), run_dir=SHARED))
    assert {"configs/gcpo.yaml", "stage_ray/configs/grpo_shapeworld.yaml"} <= files
    assert not [name for name in files if name.startswith("configs/") and name != "configs/gcpo.yaml"]


def test_a_working_directory_is_sent_without_what_is_hidden_and_what_its_ignore_files_name(here):
    (here / ".gitignore").write_text("data/\n*.bin\n!keep.bin\n/runs/\n/env/\n")
    (here / "lib" / ".rayignore").write_text("notes.txt\n")
    for name in ("data/a.txt", "a.bin", "keep.bin", "lib/notes.txt", "lib/b.bin", "notes.txt"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text("")
    own = {"configs/mine.yaml", "prompts/mine.txt", "prompts/other.txt", "my_scorer.py", "lib/tests/kept.py"}
    planned = plan_job(Path("configs/mine.yaml"), run_dir=SHARED, working_dir=Path("."))
    assert sent(planned) == own | {"tests/test_it.py", "keep.bin", "notes.txt"}


def test_files_among_a_scorers_options_are_sent(here):
    (here / "vocabulary").mkdir()
    for name in ("words.txt", "vocabulary/a.txt"):
        (here / name).write_text("")
    options = "rewards.0.options={detector: a.B, path: ./words.txt, more: [{below: vocabulary}], size: soft}"
    planned = plan_job(Path("configs/mine.yaml"), [options], SHARED, image_has_code=True)
    assert sent(planned) == {"configs/mine.yaml", "prompts/mine.txt", "words.txt", "vocabulary/a.txt"}


def test_every_one_of_several_prompt_files_is_sent(here):
    files = "prompts.train=[{path: prompts/mine.txt, weight: 3}, {path: prompts/other.txt}]"
    planned = plan_job(Path("configs/mine.yaml"), [files], SHARED, image_has_code=True)
    assert sent(planned) == {"configs/mine.yaml", "prompts/mine.txt", "prompts/other.txt"}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("prompts.train=../outside.txt", "prompts.train = '../outside.txt' leads out of"),
        ("prompts.train=[{path: none.txt}]", "prompts.train.0.path = 'none.txt' is no file in"),
        ("policy.path=../models/mine", "policy.path = '../models/mine' leads out of"),
        ("rewards.0.options.words=[../outside.txt]", "rewards.0.options.words.0 = '../outside.txt' leads out of"),
        ("prompts.heldout=prompts/none.txt", "prompts.heldout = 'prompts/none.txt' is no file in"),
    ],
)
@pytest.mark.parametrize("where", [[], ["--working-dir", "."]], ids=["the files it names", "a directory"])
def test_a_file_that_the_job_would_not_find_is_refused_by_key_and_name(override, sentence, where, here, capsys):
    (here / "deeper" / "prompts").mkdir(parents=True)
    (here / "deeper" / "prompts" / "mine.txt").write_text("a photo of a ring\n")
    (here / "models" / "mine").mkdir(parents=True)
    (here / "outside.txt").write_text("a photo of a ring\n")
    os.chdir(here / "deeper")
    assert main(["submit", "../configs/mine.yaml", "--run-dir", "/s/a", "--set", override, *where]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "give its absolute path" in error and error.count("\n") == 1, error


def test_more_of_rays_environment_comes_from_a_file(here, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hush-hush")
    (here / "more.yaml").write_text("{env_vars: {MODE: fast}, py_modules: [lib], config: {setup_timeout_seconds: 60}}")
    planned = plan_job(Path("configs/mine.yaml"), run_dir=SHARED, env=["HF_TOKEN"], runtime_env=Path("more.yaml"))
    variables = planned.runtime_env.pop("env_vars")
    assert planned.runtime_env == {"excludes": [], "py_modules": ["lib"], "config": {"setup_timeout_seconds": 60}}
    assert variables.keys() == {"MODE", "HF_TOKEN", "RAY_JOB_STOP_WAIT_TIME_S"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[pip]", "holds no mapping; known in it: conda"),
        ("{working_dir: .}", "working_dir is set by this command; use --working-dir DIR"),
        ("{excludes: [a]}", "excludes is set by this command"),
        ("{pipp: [nltk]}", "unknown key 'pipp'; known in it: conda, config, env_vars, pip"),
        ("{env_vars: {A: 1234}}", 'env_vars is no mapping of names to texts, such as {DEBUG: "1"}'),
        ("{env_vars: {PATH: /bin}}", "PATH is given by --env and by env_vars"),
        ("{pip: [nltk], conda: mine}", "cannot be specified at the same time"),
        ("{pip: [nltk", "is not readable YAML"),
    ],
)
def test_an_environment_that_is_not_one_is_refused(content, sentence, here):
    (here / "more.yaml").write_text(content)
    with pytest.raises(ConfigError) as refused:
        plan_job(Path("configs/mine.yaml"), run_dir=SHARED, env=["PATH"], runtime_env=here / "more.yaml")
    assert str(refused.value).startswith(("--runtime-env", "PATH")) and sentence in str(refused.value)
    assert "1234" not in str(refused.value), "it may be a secret"


def test_a_config_from_elsewhere_takes_no_other_files_name(here, tmp_path):
    (here / "stage_shapeworld.yaml").write_text("steps: 1")
    with pytest.raises(ConfigError, match="holds another stage_shapeworld.yaml"):
        plan_job(CONFIG, run_dir=SHARED, working_dir=here)


def test_unpacked_first_on_the_path_it_is_the_package_with_its_plugin(tmp_path):
    zipfile.ZipFile(package(plan_job(CONFIG, run_dir=SHARED), tmp_path / "a.zip")).extractall(tmp_path / "there")
    there = tmp_path / "there"
    code = (
        "import stage_ray, importlib.metadata as m; print(stage_ray.__file__)\n"
        "(plugin,) = m.entry_points(group='vllm.general_plugins', name='stage_ray_janus')\n"
        "print(plugin.dist.locate_file('')); plugin.load()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(there)},  # as Ray sets it
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert [str(there) in line for line in done.stdout.splitlines()] == [True, True], done.stdout


def test_no_two_submissions_share_a_package_that_ray_deletes_with_the_first_of_them(here):
    job = plan_job(Path("configs/mine.yaml"), run_dir=SHARED, image_has_code=True)
    names = []
    for directory in (here / "first", here / "second"):
        directory.mkdir()
        names.append(get_uri_for_directory(str(stage_files(job, directory)), include_gitignore=True))
    assert names[0] != names[1]


def test_a_named_file_above_rays_limit_is_refused_by_its_key(here):
    with (here / "big.txt").open("wb") as file:
        file.truncate((CAP_MIB + 1) * 2**20)
    with pytest.raises(ConfigError, match=r"prompts\.train = 'big\.txt' has 101 MiB and Ray takes 100 at most"):
        plan_job(Path("configs/mine.yaml"), ["prompts.train=big.txt"], SHARED)


def test_the_limit_is_that_of_rays_dashboard_and_the_head_could_keep_as_much():
    assert CAP_MIB * 2**20 == DASHBOARD_CLIENT_MAX_SIZE < GCS_STORAGE_MAX_SIZE


def test_attempts_are_counted_as_numbers():
    mine = Job("first", "/shared/first", "", {})
    jobs = [job("first", "FAILED"), job("first.10", "RUNNING"), job("first.9", "FAILED"), job("firsts", "FAILED")]
    last = _last_attempt(mine, jobs, "http://here")
    assert last is not None and mine.attempt(last.submission_id) == 10


def test_two_jobs_never_write_into_one_run_directory():
    mine = Job("first", "/shared/first", "", {})
    assert (
        _last_attempt(mine, [job("other", "FAILED"), job("third", "RUNNING", "/shared/third")], "http://here") is None
    )
    with pytest.raises(
        RunError, match="job other is writing into /shared/first.*ray job stop other --address http://here"
    ):
        _last_attempt(mine, [job("other", "RUNNING")], "http://here")


@pytest.mark.parametrize("status", ["SUCCEEDED", "RUNNING", "FAILED"])
def test_a_name_that_is_given_again_for_another_config_is_refused(status):
    mine = Job("first", "/shared/first", "", {}, digest="new")
    assert _last_attempt(mine, [job("first", "FAILED", digest="old"), job("first.2", status, digest="new")], "http://a")
    with pytest.raises(RunError, match=r"--id first: job first\.2 .* had another config; name a new --id, or leave it"):
        _last_attempt(mine, [job("first", "FAILED"), job("first.2", status, digest="old")], "http://a")
    with pytest.raises(RunError, match=r"had another run directory \(/shared/second\)"):
        _last_attempt(mine, [job("first", status, "/shared/second", digest="old")], "http://a")


def test_what_a_job_is_known_by_changes_with_config_and_run_directory_and_not_with_the_code():
    plain = plan_job(CONFIG, ["steps=5"], SHARED, name="a")
    assert plain.digest == plan_job(CONFIG, ["steps=5"], SHARED, name="b", image_has_code=True).digest
    others = {plan_job(CONFIG, ["steps=6"], SHARED).digest, plan_job(CONFIG, ["steps=5"], Path("/s/a")).digest}
    assert len(others) == 2 and plain.digest not in others


def test_the_exit_code_is_the_drivers_own():
    assert _exit_code(job("a", "SUCCEEDED", driver_exit_code=0)) == 0
    assert [_exit_code(job("a", "FAILED", driver_exit_code=code)) for code in (1, 2, 130, 143, -9)] == [
        1,
        2,
        130,
        143,
        137,
    ]
    with pytest.raises(Interrupted) as stopped:
        _exit_code(job("a", "STOPPED"))
    assert stopped.value.exit_code == 143
    with pytest.raises(RunError, match="no node has the package"):
        _exit_code(job("a", "FAILED", message="no node has the package"))


def test_an_option_that_the_recipe_or_the_sampler_does_not_have_is_refused_before_anything_is_sent():
    with pytest.raises(ConfigError, match=r"algorithm\.betta.*algorithm\.beta"):
        plan_job(CONFIG, ["algorithm.betta=1"], SHARED)
    with pytest.raises(ConfigError, match=r"rollout\.sampler_options\.a = 1 is no option of sampler guided"):
        plan_job(CONFIG, ["rollout.sampler_options.a=1"], SHARED)


@contextlib.contextmanager
def silent_dashboard(*, log_ends: bool) -> Iterator[str]:
    """A dashboard whose job ``first`` runs. While it owes an answer it interrupts this process; its address."""
    loop, over = asyncio.new_event_loop(), asyncio.Event()

    async def version(_: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})

    async def jobs(_: web.Request) -> web.Response:
        found = {"type": "SUBMISSION", "submission_id": "first", "status": "RUNNING", "entrypoint": ""}
        return web.json_response([found])

    async def log(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str("step 1\n")
        if not log_ends:
            await asyncio.sleep(1)
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # another thread than the one that waits
            await asyncio.wait_for(over.wait(), 120)
        return socket

    async def status(_: web.Request) -> web.Response:
        await asyncio.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(over.wait(), 120)
        return web.Response()

    app = web.Application()
    handlers = {"version": version, "jobs/": jobs, "jobs/first/logs/tail": log, "jobs/first": status}
    app.add_routes([web.get(f"/api/{path}", handler) for path, handler in handlers.items()])
    runner = web.AppRunner(app, shutdown_timeout=0)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
    server = threading.Thread(target=loop.run_forever, daemon=True)
    server.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        loop.call_soon_threadsafe(over.set)
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        server.join(30)
        loop.close()


@pytest.mark.parametrize("log_ends", [False, True], ids=["the next line", "the status"])
def test_ctrl_c_ends_a_wait_for_a_cluster_that_says_nothing_at_once(log_ends, capsys, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # the command sets it
    with silent_dashboard(log_ends=log_ends) as address:
        began = time.monotonic()
        with pytest.raises(Interrupted, match=f"ray job stop first --address {address}") as stopped:
            submit_job(Job("first", "/shared/first", "", {}), address)
        assert time.monotonic() - began < 60 and stopped.value.exit_code == 130
    assert "step 1\n" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Proxy(http.server.BaseHTTPRequestHandler):
    """Answers nothing, and remembers what it was asked for."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(502)

    def log_message(self, *text: object) -> None:
        """Say nothing."""


@pytest.fixture
def proxy(monkeypatch) -> Iterator[str]:
    """The address of a proxy that the environment does not name yet."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "RAY_API_SERVER_ADDRESS"):
        for spelled in (name, name.upper()):
            monkeypatch.setenv(spelled, "")
            monkeypatch.delenv(spelled)
    monkeypatch.setattr(Proxy, "asked", [])
    server = http.server.HTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize("exempt", [None, "example.com"])
def test_a_cluster_in_a_private_network_is_asked_without_the_proxy(variable, exempt, proxy, monkeypatch):
    monkeypatch.setenv(variable, proxy)
    if exempt:
        monkeypatch.setenv("NO_PROXY", exempt)
    for host in ("127.0.0.1", "localhost", "[::1]"):
        with pytest.raises(RunError, match="no Ray dashboard answers at http://[^ ]+; name it"):
            submit_job(Job("first", "/shared/first", "", {}), f"http://{host}:{free_port()}")
    assert not Proxy.asked and os.environ["no_proxy"].split(",")[: bool(exempt)] == [exempt] * bool(exempt)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_what_goes_through_a_proxy_and_fails_names_the_variable_and_not_its_value(variable, proxy, monkeypatch):
    address = f"http://cluster.invalid:{free_port()}"  # a name that no resolver knows
    monkeypatch.setenv(variable, proxy.replace("//", "//user:secret@"))
    said = rf"by way of the proxy that {variable} names \(NO_PROXY=cluster.invalid asks it directly\)"
    with pytest.raises(RunError, match=said) as found:
        submit_job(Job("first", "/shared/first", "", {}), address)
    assert Proxy.asked[0].startswith(address) and "secret" not in str(found.value)
    monkeypatch.setenv("NO_PROXY", "cluster.invalid")
    with pytest.raises(RunError, match=f"no Ray dashboard answers at {address}; name it"):
        submit_job(Job("first", "/shared/first", "", {}), address)
    assert len(Proxy.asked) == 1
