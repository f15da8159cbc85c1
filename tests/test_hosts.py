"""Hosts with a network between them: the deepspeed launcher over a hostfile. See also `make soak-cluster`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.train.runfolder import read_timeline
from tests.hosts import Hosts, why_not
from tests.ray_runs import config_of, same_run

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"hosts in network namespaces: {WHY_NOT}")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with tempfile.TemporaryDirectory(prefix="h", dir="/tmp") as folder, Hosts(2, Path(folder)) as found:
        yield found


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
    same_run(tmp_path / "run", unbroken)
