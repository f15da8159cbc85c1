"""`dtrain submit`: pack the code and the configs, hand them to a cluster as a job, and follow it."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.core.errors import ConfigError, TrainError
from dtrain.orchestrate.paths import check_shared
from dtrain.train.config import RunConfig

__all__ = ["Submission", "plan", "submit", "use_token"]

#: What a job needs of the working directory, beside the folder of its config.
_CODE = (("dtrain", "*.py"), ("launch", "*.py"))

_AGAIN_S = 2.0  # between two tries to follow a job whose connection broke
_TRIES = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job, ready to be sent."""

    id: str
    entrypoint: tuple[str, ...]
    folder: Path  # that `files` are relative to
    files: tuple[Path, ...]
    env: dict[str, str]  # of the job's processes; shown to everyone who may see the job, so no secrets

    @property
    def bytes(self) -> int:
        return sum((self.folder / file).stat().st_size for file in self.files)

    def describe(self, address: str) -> str:
        """What would be sent, for people."""
        folders: dict[str, list[int]] = {}
        for file in self.files:
            folders.setdefault(file.parts[0], []).append((self.folder / file).stat().st_size)
        parts = [f"  {name}: {len(sizes)} files, {sum(sizes) / 1e6:.2f} MB" for name, sizes in sorted(folders.items())]
        return "\n".join(
            [
                f"to          {address}",
                f"job         {self.id}",
                f"entrypoint  {shlex.join(self.entrypoint)}",
                f"environment {', '.join(f'{key}={value}' for key, value in sorted(self.env.items()))}",
                f"working directory, {self.bytes / 1e6:.2f} MB of {self.folder}:",
                *parts,
            ]
        )


def plan(config_path: str, overrides: Sequence[str], config: RunConfig, folder: Path) -> Submission:
    """The job that trains `config`, which is what `config_path` and `overrides` say, with the code below `folder`.

    Raises ConfigError when `folder` is no checkout of dtrain, the config lies outside it, or a path of the config would
    be another place on each node.
    """
    folder, path = folder.resolve(), Path(config_path).resolve()
    if not (folder / "launch/ray_train.py").is_file():
        raise ConfigError(
            f"{folder}: has no launch/ray_train.py; submit from a checkout of dtrain, or give --working-dir"
        )
    if not path.is_relative_to(folder):
        raise ConfigError(f"{path}: is outside of {folder}, of which a copy is sent; move it there")
    check_shared(config)
    relative = path.relative_to(folder)
    found = {file for name, pattern in _CODE for file in (folder / name).rglob(pattern)}
    found |= set((folder / relative.parts[0]).rglob("*.yaml") if len(relative.parts) > 1 else folder.glob("*.yaml"))
    return Submission(
        id=f"dtrain-{Path(config.run).name}-{time.strftime('%Y%m%d-%H%M%S')}",
        entrypoint=("python", "launch/ray_train.py", str(relative), *overrides),
        folder=folder,
        files=tuple(sorted(file.relative_to(folder) for file in found)),
        # `ray job stop` kills a job's driver after that many seconds, by default 3: too few to save.
        env={"RAY_JOB_STOP_WAIT_TIME_S": str(int(config.checkpoint.grace_s))},
    )


def use_token() -> bool:
    """Have Ray send this user's token, where there is one. To be called before Ray is imported."""
    known = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    found = known or (Path.home() / ".ray/auth_token").is_file()
    if found:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    return found


def submit(job: Submission, address: str, *, follow: bool) -> int:
    """Send `job`, show its log to the end, and return its exit code (0 at once without `follow`).

    Ctrl-C stops following, not the job. Raises ConfigError when the cluster can't be reached or refuses, TrainError
    when the job was stopped or lost.
    """
    from ray.job_submission import JobSubmissionClient

    with tempfile.TemporaryDirectory(prefix="dtrain-submit-") as packed:
        for file in job.files:
            (Path(packed) / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(job.folder / file, Path(packed) / file)
        try:
            client = JobSubmissionClient(address)
            client.submit_job(
                entrypoint=shlex.join(job.entrypoint),
                submission_id=job.id,
                runtime_env={"working_dir": packed, "env_vars": job.env},
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{address}: does not take the job ({error}). Is it the address of the cluster's dashboard, and is the "
                "token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token?"
            ) from error
    where = f"--address {shlex.quote(address)} {job.id}"
    hints = f"follow: ray job logs --follow {where}\nstop:   ray job stop {where}"
    print(f"submitted {job.id}\n{hints}", file=sys.stderr, flush=True)
    if not follow:
        return 0
    try:
        return _follow(client, job.id)
    except KeyboardInterrupt:
        print(f"\nleft; {job.id} goes on\n{hints}", file=sys.stderr, flush=True)
        return 130


def _follow(client: Any, job_id: str) -> int:
    shown = tries = 0
    while True:
        try:
            shown = asyncio.run(_show(client, job_id, shown))
            info = client.get_job_info(job_id)
        except (ConnectionError, RuntimeError, OSError) as error:
            tries += 1
            if tries > _TRIES:
                raise TrainError(
                    f"{job_id}: its cluster can't be reached any more ({error}); the job may go on"
                ) from error
            time.sleep(_AGAIN_S)
            continue
        if not info.status.is_terminal():
            time.sleep(_AGAIN_S)
            continue
        if info.driver_exit_code is not None:
            return int(info.driver_exit_code)
        if str(info.status) == "SUCCEEDED":
            return 0
        raise TrainError(f"{job_id}: {str(info.status).lower()} ({info.message or 'no more is known'})")


async def _show(client: Any, job_id: str, shown: int) -> int:
    """Print what the job has logged beyond the first `shown` characters, until it ends or the connection does."""
    place = 0
    async for text in client.tail_job_logs(job_id):
        fresh = text[max(0, shown - place) :]
        place += len(text)
        if fresh:
            print(fresh, end="", flush=True)
            shown = max(shown, place)
    return shown
