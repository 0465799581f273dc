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
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stage_ray.commands.job import Job, attempt_of
from stage_ray.commands.job_package import write_package
from stage_ray.errors import ConfigError, Interrupted, RunError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

RUN_DIR = "stage_ray_run_dir"
"""Key of a job's metadata: where it writes."""
DIGEST = "stage_ray_digest"
"""Key of a job's metadata: `Job.digest`, by which a name that is given again for something else is found out."""
PATIENCE_S = 60.0
"""So long the cluster may be out of reach while a job is followed (a head's restart, a cut port-forward)."""
ACTIVE = ("PENDING", "RUNNING")


def submit_job(job: Job, address: str, *, wait: bool = True, note: Callable[[str], None] | None = None) -> int:
    """Start the job, or its next attempt, or attach to it; follow its log on stdout; the exit code of its driver.

    Args:
        job: of `plan_job`.
        address: of the cluster's dashboard, such as ``http://127.0.0.1:8265``.
        wait: False returns 0 as soon as the cluster has the job.
        note: takes our own sentences; stderr by default.

    Raises:
        ConfigError: the address is not one, or the package is too large.
        RunError: the cluster does not answer, wants another token, another job writes into the run directory, or the
            name is that of a job with another config.
        Interrupted: Ctrl-C; the job goes on.
    """
    note = note or (lambda sentence: print(f"stage-ray: {sentence}", file=sys.stderr))
    name = job.name
    try:
        client = connect(address)
        with _one_sentence(address):
            last = _last_attempt(job, client.list_jobs(), address)
            if last is not None and last.status == "SUCCEEDED":
                note(
                    f"job {last.submission_id} has succeeded already ({job.run_dir}); to run it again, name a new --id"
                )
                return 0
            if last is not None and last.status in ACTIVE:
                name = last.submission_id
                note(f"job {name} is {last.status.lower()} already; attached to it")
            else:
                name = _start(client, job, (attempt_of(job, last.submission_id) or 0) + 1 if last else 1, note)
        if not wait:
            note(f"follow it: ray job logs --follow {name} --address {address}, or this command without --no-wait")
            return 0
        return _exit_code(asyncio.run(_follow(client, name, address)))
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped following; job {name} goes on if it was started. Follow it again: the same command. "
            f"Stop it: ray job stop {name} --address {address}",
            130,
        ) from None


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's Jobs API that has been answered.

    Raises:
        ConfigError: not the address of a dashboard.
        RunError: nobody answers there, or not with this token.
    """
    if not re.fullmatch(r"https?://[^/\s]+/?", address):
        raise ConfigError(f"--address {address!r} is not the address of a Ray dashboard, such as http://127.0.0.1:8265")
    logging.getLogger("ray").setLevel(logging.ERROR)  # says where it uploads what, and what it leaves out
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # else RAY_ADDRESS would go before what was asked for
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules").setLevel(logging.ERROR)
    for name in ("job.sdk", "dashboard_sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
    with _one_sentence(address):
        return JobSubmissionClient(address)


def _last_attempt(job: Job, jobs: Iterable[JobDetails], address: str) -> JobDetails | None:
    """The newest attempt at this job that the cluster knows of.

    Raises:
        RunError: another job, which may compute something else, is writing into the same run directory, or had this
            name.
    """
    attempts: dict[int, JobDetails] = {}
    for other in jobs:
        attempt = attempt_of(job, other.submission_id)
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


def _start(client: JobSubmissionClient, job: Job, attempt: int, note: Callable[[str], None]) -> str:
    """Upload the package and hand the job over; its submission id."""
    name = job.name if attempt == 1 else f"{job.name}.{attempt}"
    with tempfile.TemporaryDirectory(prefix="stage-ray-") as directory:
        package = write_package(job.files, Path(directory) / "package.zip")
        note(f"sending {len(job.files)} files, {package.stat().st_size / 2**20:.1f} MiB")
        try:
            client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=name,
                runtime_env=job.environment | {"working_dir": str(package), "env_vars": job.variables},
                metadata={RUN_DIR: job.run_dir, DIGEST: job.digest},
                entrypoint_num_cpus=job.cpus or None,
                entrypoint_resources=job.resources or None,
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            _last_attempt(job, client.list_jobs(), client.get_address())
            note(f"job {name} was started by somebody else in this moment; attached to it")
            return name
    note(f"job {name} was given to the cluster: {job.entrypoint}")
    return name


async def _follow(client: JobSubmissionClient, name: str, address: str) -> JobDetails:
    """Print a job's log from its beginning until it has ended, over cut connections."""
    import aiohttp
    import requests

    shown, heard = 0, time.monotonic()
    while True:
        position = 0
        try:
            with _one_sentence(address):
                async for text in client.tail_job_logs(name):
                    position += len(text)
                    if position > shown:  # after a cut the log begins anew
                        print(text[shown - position :], end="", flush=True)
                        shown = position
                    heard = time.monotonic()
                details = client.get_job_info(name)
                heard = time.monotonic()
                if details.status not in ACTIVE:
                    return details
        except RunError as error:
            cut = isinstance(error.__cause__, aiohttp.ClientError | requests.RequestException | OSError | RuntimeError)
            if not cut or time.monotonic() - heard > PATIENCE_S:
                raise RunError(f"{error}; job {name} may go on: the same command follows it again") from error
        await asyncio.sleep(0.5)


def _exit_code(details: JobDetails) -> int:
    """The driver's own exit code, as a shell would give it.

    Raises:
        RunError: the job failed without a driver that could have had one.
    """
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
    """What Ray's client raises, as one sentence with the mend."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    mend = "set RAY_AUTH_MODE=token, and the cluster's token as RAY_AUTH_TOKEN or in ~/.ray/auth_token"
    try:
        yield
    except AuthenticationError as error:
        fault = "refuses this token" if "failed" in error.message.partition("\n")[0] else "wants a token"
        raise RunError(f"the Ray cluster at {address} {fault}: {mend}") from error
    except (aiohttp.ClientError, requests.RequestException, OSError) as error:
        raise RunError(
            f"no Ray dashboard answers at {address}; name it with --address or RAY_API_SERVER_ADDRESS "
            "(on Kubernetes after: kubectl port-forward service/NAME-head-svc 8265)"
        ) from error
    except (RuntimeError, KeyError, TypeError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"the Ray cluster at {address} answered: {_gist(error)}") from error


def _gist(error: Any) -> str:
    """What a server's error page says: its last line, which is the exception of a traceback."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
