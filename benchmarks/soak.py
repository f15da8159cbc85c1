"""Everything that may befall a run, for real: `make soak`.

    [SOAK_KILLS=100] [SOAK_SEED=0] [SOAK_PARTS=injected,damage,...] python -m benchmarks.soak [OUT.md]

Each row is a run of two small shops that something befell: a process killed or frozen at a named place of a step or a
save, a full disk, a damaged file, a second start. The run is then started again, and must end with the weights, moments
and ledger of a run that nothing befell, bit for bit. At the end runs are killed at SOAK_KILLS random moments; every
other run changes its number of ranks at every start, and there the ledgers alone are compared. Prints a table, writes
it to OUT.md, and ends with exit code 1 when any row failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dtrain.core.failpoints import VARIABLE
from tests.conftest import make_tiny_encoder
from tests.faults import (
    AT,
    EVERY,
    LIMIT_S,
    SHORT,
    Arena,
    Row,
    again,
    cut_run,
    damages,
    differences,
    injected,
    newest,
    play,
    play_damage,
    superseded,
)
from tests.s3_server import s3_server
from tests.train_toys import ROOT, environment, free_port, write_shops

KILLS = int(os.environ.get("SOAK_KILLS", "100"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
KILLED_STEPS, KILLED_EVERY = 40, 3  # of a run that is killed at random moments, between its checkpoints
STEPPING_S = 3.0  # after the first step of a start, at the latest, its kill comes
STARTING_S = 2.0  # or of a quarter of them after the start itself
DISK_KIB = 1300  # holds two checkpoints and not three
LAUNCHER_S = 150.0  # torchrun gives a frozen rank 30 s before it kills it


def faults(arena: Arena) -> Iterator[Row]:
    for number, fault in enumerate(injected()):
        yield play(arena, fault, f"injected-{number}")


def damage(arena: Arena) -> Iterator[Row]:
    cut = cut_run(arena)
    for kind, how in damages():
        yield play_damage(arena, cut, kind, how)


def starts(arena: Arena) -> Iterator[Row]:
    yield superseded(arena, "two-starts")


def disk(arena: Arena) -> Iterator[Row]:
    """A disk that is really full: the third checkpoint does not fit beside two."""
    mount = arena.folder / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "tmpfs", str(mount)], check=False, capture_output=True
    )
    if made.returncode:
        print("a full disk: not tried, since mounting one needs root", flush=True)
        return
    try:
        small = Arena(arena.folder, arena.shops, arena.encoder, arena.env, str(mount), arena._references)
        config = small.config("full-disk")
        gang = small.start(config, 2, SHORT)
        codes = gang.wait(LIMIT_S)
        survived = newest(small, config)
        problems = [] if codes == [4, 4] else [f"ended with {codes}"]
        if survived != 2 * EVERY:
            problems.append(f"step {survived} survived, not {2 * EVERY}")
        if "No space left on device" not in gang.said():
            problems.append("it does not say why")
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        row = Row("a full disk (tmpfs)", 1, codes, survived, 0, problems)
        yield again(small, row, config, arena.reference(2), SHORT, 2)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def storage(arena: Arena) -> Iterator[Row]:
    """The same with checkpoints behind a server that speaks S3."""
    wanted = [f for f in injected() if f.name in ("SIGKILL of rank 1, writing", "SIGKILL of rank 0, writing")]
    wanted += [f for f in injected() if f.phase in ("record", "recorded") and f.do == "kill" and not f.shape]
    with s3_server() as server:
        os.environ.update(server.env)
        remote = Arena(arena.folder, arena.shops, arena.encoder, server.env, server.url, arena._references)
        for number, fault in enumerate(wanted):
            row = play(remote, fault, f"storage-{number}")
            if server.uploads():
                row.problems.append(f"unfinished uploads: {server.uploads()}")
            yield Row(f"object storage: {row.name}", row.fired, row.codes, row.survived, row.resumed, row.problems)


def launchers(arena: Arena) -> Iterator[Row]:
    """A rank that is killed and one that freezes under torchrun, which must end the others."""
    for what, code in (("kill", "SIGKILL"), ("stop", "SIGSTOP")):
        config = arena.config(f"torchrun-{what}")
        points = config.with_name("failpoints.json")
        points.write_text(json.dumps([{"rank": 1, "step": AT + 1, "phase": "step", "do": what}]), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--master-port", str(free_port()), "launch/train.py", str(config), *SHORT]
        env = {**environment(), VARIABLE: str(points)}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=False, timeout=LAUNCHER_S)
        survived, fired = newest(arena, config), len(list(config.parent.glob("*.fired.*")))
        problems = [] if done.returncode and fired == 1 else [f"ended with {done.returncode}, fired {fired} times"]
        row = Row(f"torchrun: {code} of rank 1 in a step", fired, [done.returncode], survived, 0, problems)
        yield again(arena, row, config, arena.reference(2), SHORT, 2)


def kills(arena: Arena) -> Iterator[Row]:
    """Runs killed at random moments, one after another, until there were KILLS."""
    chance, done, number = random.Random(SEED), 0, 0
    reference = arena.reference(2, (), KILLED_STEPS, KILLED_EVERY)
    while done < KILLS:
        same = number % 2 == 0
        config = arena.config(f"kills-{number}", KILLED_STEPS, KILLED_EVERY)
        problems: list[str] = []
        before = killed = resumed = 0
        while True:
            size = 2 if same else chance.choice((1, 2, 3))
            overrides = (*SHORT, f"checkpoint.async={chance.choice(('true', 'false'))}")
            gang = arena.start(config, size, overrides)
            if done < KILLS:
                starting = chance.random() < 0.25
                if not starting:
                    gang.until(lambda gang=gang: "step/s" in gang.said(), LIMIT_S)
                gang.wait(chance.uniform(0.0, STARTING_S if starting else STEPPING_S))
                victims = chance.choice([[rank] for rank in range(size)] + [list(range(size))])
                if gang.running():
                    gang.signal(signal.SIGKILL, victims)
                    gang.wait(chance.uniform(0.0, 0.5))  # as long a launcher may take to notice
                    gang.end()
                    done, killed = done + 1, killed + 1
            codes = gang.wait(5 * LIMIT_S)
            gang.end()
            if codes == [0] * size:
                break
            if -signal.SIGKILL not in codes:
                problems.append(f"ended with {codes}: {gang.said()[-2000:]}")
                break
            now = newest(arena, config)
            if now < before:
                problems.append(f"step {before} was saved, {now} after the next kill")
            before, resumed = now, resumed + (now > 0)
        problems += differences(arena, config, reference, exact=same)
        ranks = "2 ranks" if same else "1 to 3 ranks, drawn at every start"
        yield Row(f"{killed} kills at random moments, {ranks}", killed, [], before, resumed, problems)
        number += 1


def out_of(about: str | None) -> Path | None:
    """The command line of a soak, described by `about`: where its table goes, too."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT.md", help="file to write the table to")
    out: Path | None = parser.parse_args().out
    return out


PARTS: dict[str, Callable[[Arena], Iterator[Row]]] = {
    "injected": faults,
    "damage": damage,
    "starts": starts,
    "disk": disk,
    "storage": storage,
    "launchers": launchers,
    "kills": kills,
}


def main() -> int:
    out = out_of(__doc__)
    names = os.environ.get("SOAK_PARTS", ",".join(PARTS)).split(",")
    rows: list[tuple[Row, float]] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        arena = Arena(folder, write_shops(folder / "shops"), make_tiny_encoder(folder / "tiny-bert"))
        for name in names:
            last = time.monotonic()
            for row in PARTS[name](arena):
                now = time.monotonic()
                rows.append((row, now - last))
                print(f"{row.name}: {'; '.join(row.problems) or 'ok'} ({now - last:.0f} s)", flush=True)
                last = now
    table = [
        "| befell the run | fired | exit codes | step that survived | resumed | equal |",
        "|---|---|---|---|---|---|",
    ]
    for row, _ in rows:
        codes = " ".join("frozen" if code is None else str(code) for code in row.codes)
        equal = "NO: " + "; ".join(row.problems) if row.problems else "yes"
        table.append(f"| {row.name} | {row.fired} | {codes} | {row.survived} | {row.resumed} | {equal} |")
    failed = sum(bool(row.problems) for row, _ in rows)
    minutes = (time.monotonic() - began) / 60
    took = f"{len(rows)} rows, {failed} failed, {minutes:.1f} minutes on {os.cpu_count()} cores ({platform.machine()})"
    text = "\n".join([*table, "", took]) + "\n"
    print(f"\n{text}", end="")
    if out is not None:
        out.write_text(text, encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
