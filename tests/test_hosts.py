"""Hosts with a network between them: jobs on Ray, a host cut off, and the deepspeed launcher over a hostfile."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.train.runfolder import read_timeline
from tests.hosts import TOKEN, Hosts, why_not
from tests.ray_runs import OVERRIDES, config_of, ledger, same_run
from tests.train_toys import ROOT

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"hosts in network namespaces: {WHY_NOT}")
SUBMIT = [sys.executable, "-m", "dtrain.cli", "submit"]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with tempfile.TemporaryDirectory(prefix="h", dir="/tmp") as folder, Hosts(3, Path(folder)) as found:
        yield found


def test_a_submitted_job_goes_on_without_the_host_that_was_cut_off(
    tmp_path: Path, shops: Path, tiny_encoder: Path, hosts: Hosts, unbroken: Path
) -> None:
    for number in (1, 2, 3):
        hosts.start_ray(number)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("dtrain", "launch"):
        (checkout / name).symlink_to(ROOT / name)
    config = config_of(checkout / "configs", shops, tiny_encoder)
    more = [f"run={tmp_path / 'run'}", "cluster.placement=spread"]
    with hosts.job(1, [*SUBMIT, str(config), "--working-dir", str(checkout), *OVERRIDES, *more]) as job:
        job.until("checkpoint of step 10")
        hosts.cut(3)
        assert job.end() == 0, job.lines
    assert not any(TOKEN in line for line in job.lines)
    first, second = read_timeline(tmp_path / "run")
    assert first["machines"] == [hosts.address(2), hosts.address(3)]
    assert (second["ranks"], second["machines"]) == (1, [hosts.address(2)])
    assert second["cause"].startswith("lost: ")
    same_run(tmp_path / "run", unbroken)


def test_the_deepspeed_launcher_runs_over_a_hostfile(
    tmp_path: Path, shops: Path, tiny_encoder: Path, hosts: Hosts, unbroken: Path
) -> None:
    config = config_of(tmp_path, shops, tiny_encoder)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{hosts.address(number)} slots=1\n" for number in (1, 2)))
    # A port of the first host's own network, which nothing else is in. Both hosts are told to start their part: ssh,
    # which the launcher takes otherwise, does the same.
    common = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", hosts.address(1), "--master_port", "29500"]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *common]
    train = ["launch/train.py", str(config)]
    with (
        hosts.job(1, [*launcher, "--node_rank", "0", *train]) as first,
        hosts.job(2, [*launcher, "--node_rank", "1", *train]) as second,
    ):
        assert (first.end(), second.end()) == (0, 0), first.lines
    assert [start["ranks"] for start in read_timeline(tmp_path / "run")] == [2]
    assert ledger(tmp_path / "run").equals(ledger(unbroken))
    same_run(tmp_path / "run", unbroken)
