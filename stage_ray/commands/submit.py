"""`stage-ray submit`: a training as a job of a Ray cluster that runs elsewhere, through Ray's own Jobs API.

A job's name comes from its run directory and config, so the same command means the same job: it starts it, follows it
if it runs, starts its next attempt if the last one failed or was stopped, and says so if it is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import yaml
from typer import Exit, Option

from stage_ray.commands.job import Job, plan_job, stage_files
from stage_ray.commands.train import ConfigArgument, SetOption
from stage_ray.errors import ConfigError, Interrupted, RunError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

RUN_DIR, DIGEST = "stage_ray_run_dir", "stage_ray_digest"  # keys of a job's metadata: where it writes, `Job.digest`
PATIENCE_S = 60.0  # the cluster may be out of reach for so long: a head's restart, a cut port-forward
ACTIVE = ("PENDING", "RUNNING")
LOCAL = "http://127.0.0.1:8265"
PASSED_ON = "Pass this variable of yours on; may be repeated. The cluster's token lets others read it"


def submit(
    config: ConfigArgument,
    address: Annotated[str, Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard")] = LOCAL,
    overrides: SetOption = None,
    run_dir: Annotated[Path | None, Option(help="Absolute, on the cluster's shared storage")] = None,
    scratch: Annotated[bool, Option("--scratch", help="Take a relative run directory: lost with the job")] = False,
    auto_resume: Annotated[bool, Option(help="Go on if there is a run, else begin; without, begin or fail")] = True,
    job_id: Annotated[str | None, Option("--id", help="Name; by default made of run directory and config")] = None,
    wait: Annotated[bool, Option(help="Follow the log until the job ends; its exit code is ours")] = True,
    working_dir: Annotated[Path | None, Option(metavar="DIR", help="Send DIR minus .gitignore, not our code")] = None,
    image_has_code: Annotated[bool, Option("--image-has-code", help="Send no code: stage_ray is there")] = False,
    env: Annotated[list[str] | None, Option(metavar="NAME", help=PASSED_ON)] = None,
    runtime_env: Annotated[Path | None, Option(metavar="FILE", help="YAML of Ray's runtime_env: pip, env_vars")] = None,
    entrypoint_cpus: Annotated[float, Option(help="CPUs of the driver; above 0 it may leave the head", min=0)] = 0.0,
    entrypoint_resources: Annotated[
        str | None, Option(metavar="MAPPING", help="For the driver, as {driver: 1}")
    ] = None,
) -> None:
    """Train as a job of a Ray cluster: start it, or follow it if it runs, or go on with it if it failed.

    The config is checked here before anything is sent. The exit code is that of the run. Ctrl-C stops following, not
    the job. A cluster that demands a token gets it from RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH
    or ~/.ray/auth_token.

    Example: stage-ray submit stage_shapeworld --run-dir /shared/runs/first
    """
    job = plan_job(
        config,
        overrides or [],
        run_dir,
        auto_resume=auto_resume,
        name=job_id,
        working_dir=working_dir,
        image_has_code=image_has_code,
        scratch=scratch,
        env=env or [],
        runtime_env=runtime_env,
    )
    driver = {"entrypoint_num_cpus": entrypoint_cpus or None, "entrypoint_resources": _resources(entrypoint_resources)}
    raise Exit(submit_job(job, address, driver, wait=wait))


def submit_job(job: Job, address: str, driver: Mapping[str, Any] | None = None, *, wait: bool = True) -> int:
    """Start the job, or its next attempt, or attach to it; follow its log on stdout; the exit code of its driver.

    ``driver`` is what Ray reserves for it. Without ``wait`` it returns 0 as soon as the cluster has the job.

    Raises:
        ConfigError: the address is not that of a dashboard.
        RunError: the cluster refuses or does not answer, or another job has the run directory or the name.
        Interrupted: Ctrl-C; the job goes on.
    """
    if not re.fullmatch(r"https?://[^/\s]+/?", address):
        raise ConfigError(f"--address {address!r} is not the address of a Ray dashboard, such as http://127.0.0.1:8265")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # else RAY_ADDRESS would go before what was asked for
    _ask_directly(address)
    name = job.name
    try:
        from ray.job_submission import JobSubmissionClient

        for module in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
            logging.getLogger(module).setLevel(logging.ERROR)  # else they say what they upload where, and leave out
        with _one_sentence(address):
            client = JobSubmissionClient(address)
            last = _last_attempt(job, client.list_jobs(), address)
            if last is not None and last.status == "SUCCEEDED":
                _note(f"job {last.submission_id} has succeeded already ({job.run_dir}); a new --id runs it again")
                return 0
            if last is not None and last.status in ACTIVE:
                name = last.submission_id
                _note(f"job {name} is {last.status.lower()} already; attached to it")
            else:
                attempt = (job.attempt(last.submission_id) or 0) + 1 if last else 1
                name = _start(client, job, attempt, driver or {})
        if not wait:
            _note(f"follow it: ray job logs --follow {name} --address {address}, or this command without --no-wait")
            return 0
        return _exit_code(_follow(client, name, address))
    except KeyboardInterrupt:
        again = f"Follow it again: the same command. Stop it: ray job stop {name} --address {address}"
        raise Interrupted(f"stopped following; job {name} goes on if it was started. {again}", 130) from None


def _resources(text: str | None) -> dict[str, float] | None:
    try:
        value = yaml.safe_load(text or "{}")
        return {str(name): float(amount) for name, amount in value.items()} or None
    except (AttributeError, TypeError, ValueError, yaml.YAMLError) as error:
        why = "is not a mapping of names to numbers, such as {driver: 1}"
        raise ConfigError(f"--entrypoint-resources {text!r} {why}") from error


def _ask_directly(address: str) -> None:
    """Ask a cluster in a private network, or on this machine, without the proxy that variables name for the rest."""
    host = urlsplit(address).hostname or ""
    try:
        found = {ip_address(item[4][0]) for item in socket.getaddrinfo(host, None)}
    except (OSError, ValueError):  # a name that only the proxy knows
        return
    if all(not one.is_global for one in found):
        exempt = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        os.environ["no_proxy"] = f"{exempt},{host}" if exempt else host


def _by_proxy(address: str) -> str:
    """What an error adds where requests go through a proxy: which variable names it. Its value may hold a password."""
    from requests.utils import get_environ_proxies

    url = urlsplit(address)
    names = [name for scheme in (url.scheme, "all") for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper())]
    name = next((name for name in names if os.environ.get(name)), "")
    through = name and get_environ_proxies(address)
    return f" by way of the proxy that {name} names (NO_PROXY={url.hostname} asks it directly)" if through else ""


def _note(sentence: str) -> None:
    print(f"stage-ray: {sentence}", file=sys.stderr)


def _last_attempt(job: Job, jobs: Iterable[JobDetails], address: str) -> JobDetails | None:
    """The newest attempt at this job that the cluster knows of.

    Raises a `RunError` where another job is writing into the run directory, or this name stands for another config.
    """
    attempts: dict[int, JobDetails] = {}
    for other in jobs:
        attempt = job.attempt(other.submission_id)
        writes_there = Path(job.run_dir).is_absolute() and (other.metadata or {}).get(RUN_DIR) == job.run_dir
        if attempt is not None:
            attempts[attempt] = other
        elif writes_there and other.status in ACTIVE:
            raise RunError(
                f"job {other.submission_id} is writing into {job.run_dir} with another config or name; stop it first "
                f"(ray job stop {other.submission_id} --address {address}), or name another --run-dir"
            )
    if not attempts:
        return None
    last = attempts[max(attempts)]
    known = last.metadata or {}
    if known.get(DIGEST, job.digest) != job.digest:
        where = "config" if known.get(RUN_DIR) == job.run_dir else f"run directory ({known.get(RUN_DIR)})"
        raise RunError(
            f"--id {job.name}: job {last.submission_id} ({last.status.lower()}) had another {where}; name a new --id, "
            "or leave it out: the run directory alone decides which run goes on"
        )
    return last


def _start(client: JobSubmissionClient, job: Job, attempt: int, driver: Mapping[str, Any]) -> str:
    """Send the files and hand the job over; its submission id."""
    name = job.name if attempt == 1 else f"{job.name}.{attempt}"
    with tempfile.TemporaryDirectory(prefix="stage-ray-") as directory:
        working_dir = str(stage_files(job, Path(directory)))
        try:
            client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=name,
                runtime_env=job.runtime_env | {"working_dir": working_dir},
                metadata={RUN_DIR: job.run_dir, DIGEST: job.digest},
                **driver,
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            _last_attempt(job, client.list_jobs(), client.get_address())  # raises unless it is this very job
            _note(f"job {name} was started by another command at this moment; attached to it")
            return name
    _note(f"job {name} was given to the cluster: {job.entrypoint}")
    return name


def _follow(client: JobSubmissionClient, name: str, address: str) -> JobDetails:
    """Print a job's log from its beginning until it has ended, over cut connections."""
    from ray.exceptions import AuthenticationError

    shown, heard = 0, time.monotonic()

    async def print_log() -> None:
        nonlocal shown, heard
        # Ctrl-C wakes a loop that has a handler of its own; one that sleeps until the next line may miss Python's.
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, signal.default_int_handler, signal.SIGINT, None)
        position = 0  # after a cut the log begins anew
        async for text in client.tail_job_logs(name):
            position += len(text)
            if position > shown:
                print(text[shown - position :], end="", flush=True)
                shown = position
            heard = time.monotonic()

    while True:
        try:
            with _one_sentence(address):
                asyncio.run(print_log())
                details = client.get_job_info(name)  # outside the loop, so that Ctrl-C ends a call without an answer
            if details.status not in ACTIVE:
                return details
            heard = time.monotonic()
        except RunError as error:
            final = isinstance(error.__cause__, AuthenticationError | KeyError | TypeError)  # no cut connection
            if final or time.monotonic() - heard > PATIENCE_S:
                raise RunError(f"{error}; job {name} may go on: the same command follows it again") from error
        time.sleep(0.5)


def _exit_code(details: JobDetails) -> int:
    """The driver's own exit code, as a shell would give it; a `RunError` where it has none."""
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        raise Interrupted(f"job {details.submission_id} was stopped; the same command goes on with it", 143)
    code = details.driver_exit_code
    if code is None:
        raise RunError(f"job {details.submission_id} failed before or beside its driver: {details.message}")
    return code if code > 0 else 128 - code  # -9: killed by signal 9


@contextlib.contextmanager
def _one_sentence(address: str) -> Iterator[None]:
    """What Ray's client raises, as one sentence with the fix."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except RunError:
        raise
    except AuthenticationError as error:
        fault = "refuses this token" if "failed" in error.message.partition("\n")[0] else "wants a token"
        fix = "set RAY_AUTH_MODE=token, and the cluster's token as RAY_AUTH_TOKEN or in ~/.ray/auth_token"
        raise RunError(f"the Ray cluster at {address} {fault}: {fix}") from error
    except (aiohttp.ClientError, requests.RequestException, OSError) as error:
        raise RunError(
            f"no Ray dashboard answers at {address}{_by_proxy(address)}; name it with --address or "
            "RAY_API_SERVER_ADDRESS (on Kubernetes after: kubectl port-forward service/NAME-head-svc 8265)"
        ) from error
    except (RuntimeError, KeyError, TypeError) as error:
        # Of a server's error page the last line alone, which is the exception of a traceback.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise RunError(f"the Ray cluster at {address} answered{_by_proxy(address)}: {lines[-1]}") from error
