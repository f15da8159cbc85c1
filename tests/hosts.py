"""Hosts on one machine: network namespaces with addresses of their own, whose cables a test may pull."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path

import psutil

from tests.jobs import Job

__all__ = ["TOKEN", "Hosts", "why_not"]

#: Without it nobody may speak to the Ray cluster of these hosts.
TOKEN = secrets.token_hex(32)

_NET = "10.88.0"  # seen inside of the namespaces alone
_STORE = 80 << 20  # bytes of a node's object store, about the least that Ray takes
_TRIES = 3  # a raylet gives up when its agents take 15 s to start, which a busy machine may need

#: Lets the head notice a host that answers no more in about 10 seconds.
_IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


def why_not() -> str:
    """Why hosts can't be made here, "" where they can."""
    if shutil.which("ip") is None:
        return "needs the command ip (iproute2)"
    name = f"dtrain{os.getpid()}"
    if _ip("netns", "add", name, check=False):
        return "may not make network namespaces (needs root)"
    _ip("netns", "del", name)
    return ""


def _ip(*arguments: str, check: bool = True) -> int:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True).returncode


class Hosts:
    """`count` hosts, numbered from 1, joined by a bridge that stands in a namespace of its own. Use as a context."""

    def __init__(self, count: int, folder: Path) -> None:
        self._names = [f"d{os.getpid()}h{number}" for number in range(count + 1)]  # the first has the bridge
        self._folder = folder

    def __enter__(self) -> Hosts:
        bridge, *hosts = self._names
        _ip("netns", "add", bridge)
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "br0", "up")
        for number, host in enumerate(hosts, 1):
            _ip("netns", "add", host)
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", bridge, "link", "add", f"p{number}", "type", "veth", "peer", "name", "eth0", "netns", host)
            _ip("-n", bridge, "link", "set", f"p{number}", "master", "br0", "up")
            _ip("-n", host, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "eth0", "up")
            _ip("-n", host, "route", "add", "default", "via", f"{_NET}.254")  # Ray asks the routes for its own address
        return self

    def __exit__(self, *error: object) -> None:
        for number in range(1, len(self._names)):
            self.kill(number)
        for name in self._names:
            _ip("netns", "del", name, check=False)

    def address(self, number: int) -> str:
        return f"{_NET}.{number}"

    def job(self, number: int, arguments: list[str]) -> Job:
        """A command on a host."""
        return Job(["ip", "netns", "exec", self._names[number], *arguments], **self._env(number))

    def start_ray(self, number: int) -> None:
        """The Ray node of a host, with room for one worker; the first host's is the head, with none."""
        role = ["--head", "--port=6379", "--dashboard-host=127.0.0.1", "--num-cpus=0"]
        if number != 1:
            role = [f"--address={self.address(1)}:6379", "--num-cpus=1"]
        own = [f"--node-ip-address={self.address(number)}", f"--temp-dir={self._temp(number)}"]
        command = ["ray", "start", *role, *own, f"--object-store-memory={_STORE}", "--disable-usage-stats"]
        for _ in range(_TRIES):
            started = self.job(number, command)
            if started.end() == 0:
                return
            self.kill(number)
        raise AssertionError("".join(started.lines))

    def cut(self, number: int) -> None:
        """Pull a host's cable: packets to and from it vanish."""
        _ip("-n", self._names[0], "link", "set", f"p{number}", "down")

    def kill(self, number: int) -> None:
        """Kill all that runs on a host."""
        listed = subprocess.run(["ip", "netns", "pids", self._names[number]], capture_output=True, text=True)
        found = [psutil.Process(int(pid)) for pid in listed.stdout.split() if psutil.pid_exists(int(pid))]
        for process in found:
            process.kill()
        psutil.wait_procs(found, timeout=30)

    def _temp(self, number: int) -> str:
        return str(self._folder / f"h{number}")  # short: sockets' paths have 107 characters at most

    def _env(self, number: int) -> dict[str, str]:
        """Gloo would ask the host's name for an address, which all of them share."""
        ray = {"RAY_TMPDIR": self._temp(number), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        return {**ray, **_IMPATIENT, "RAY_worker_niceness": "0", "GLOO_SOCKET_IFNAME": "eth0"}
