"""A command in processes of its own, whose output a test reads as it comes."""

from __future__ import annotations

import os
import signal
import subprocess

import psutil

from tests.train_toys import ROOT, environment, free_port

__all__ = ["Job"]


class Job:
    """Runs `arguments`, with a free port for PORT in them. As a context, it ends with the block."""

    def __init__(self, arguments: list[str], **env: str) -> None:
        self.process = subprocess.Popen(
            [part.replace("PORT", str(free_port())) for part in arguments],
            cwd=ROOT,
            env={**environment(), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it for us
        )
        self.lines: list[str] = []

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def until(self, *words: str) -> None:
        """Read until each of `words` was in a line, in whatever order."""
        assert self.process.stdout is not None
        missing = list(words)
        for line in self.process.stdout:
            self.lines.append(line)
            missing = [each for each in missing if each not in line]
            if not missing:
                return
        raise AssertionError(f"ended without {missing}:\n{''.join(self.lines[-40:])}")

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes below a launcher that hold a rank."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if "launch/train.py" in child.cmdline() and "RANK" in child.environ() and not child.children():
                found[int(child.environ()["RANK"])] = child
        return found

    def end(self) -> int:
        """Read to the end; the exit code."""
        assert self.process.stdout is not None
        self.lines += self.process.stdout.readlines()
        return self.process.wait(timeout=120)

    def kill(self) -> None:
        """End it, whatever it does, and its ranks."""
        if self.process.poll() is None:
            for process in self.ranks().values():  # a launcher puts them into sessions of their own
                process.kill()
            os.killpg(self.process.pid, signal.SIGKILL)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process.wait(timeout=60)
