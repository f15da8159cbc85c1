"""Hosts with a network between them: jobs on Ray, a host cut off, and the deepspeed launcher over a hostfile."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.train.runfolder import read_timeline
from tests.hosts import Hosts, why_not
from tests.jobs import Job
from tests.test_ray_train import config_of, ledger, same_run, unbroken  # noqa: F401 (a fixture)
from tests.train_toys import ROOT

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"hosts in network namespaces: {WHY_NOT}")
SUBMIT = [sys.executable, "-m", "dtrain.cli", "submit"]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 2}


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with tempfile.TemporaryDirectory(prefix="h", dir="/tmp") as folder, Hosts(3, Path(folder)) as found:
        yield found


def test_a_submitted_job_goes_on_without_the_host_that_was_cut_off(
    tmp_path: Path,
    shops: Path,
    tiny_encoder: Path,
    hosts: Hosts,
    unbroken: Path,  # noqa: F811
) -> None:
    for number in (1, 2, 3):
        hosts.start_ray(number, **TOKEN)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("dtrain", "launch"):
        (checkout / name).symlink_to(ROOT / name)
    config = config_of(checkout / "configs", shops, tiny_encoder)
    short = ["dist.timeout_s=15", "checkpoint.timeout_s=15", "cluster.hang_s=15", "cluster.grow_every_s=0"]
    room = ["cluster.workers.min=1", "cluster.workers.max=2", "cluster.placement=spread", f"run={tmp_path / 'run'}"]
    job = hosts.job(1, [*SUBMIT, str(config), "--working-dir", str(checkout), *short, *room], **TOKEN)
    job.until("checkpoint of step 10")
    hosts.cut(3)
    assert job.end() == 0, job.lines
    assert not any(TOKEN["RAY_AUTH_TOKEN"] in line for line in job.lines)
    first, second = read_timeline(tmp_path / "run")
    assert first["machines"] == [hosts.address(2), hosts.address(3)]
    assert (second["ranks"], second["machines"]) == (1, [hosts.address(2)])
    assert second["cause"].startswith("lost: ")
    same_run(tmp_path / "run", unbroken)


def test_the_deepspeed_launcher_runs_over_a_hostfile(
    tmp_path: Path,
    shops: Path,
    tiny_encoder: Path,
    hosts: Hosts,
    unbroken: Path,  # noqa: F811
) -> None:
    config = config_of(tmp_path, shops, tiny_encoder)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{hosts.address(number)} slots=1\n" for number in (1, 2)))
    common = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", hosts.address(1), "--master_port", "29500"]
    started: list[Job] = []
    for rank, number in enumerate((1, 2)):
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *common, "--node_rank", str(rank)]
        started.append(hosts.job(number, [*launcher, "launch/train.py", str(config)]))
    assert [job.end() for job in started] == [0, 0], started[0].lines
    assert ledger(tmp_path / "run").equals(ledger(unbroken))
    same_run(tmp_path / "run", unbroken)
