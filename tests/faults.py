"""Faults injected into real runs, and what must be left of a run afterwards: used by tests and `make soak`.

Each fault hits a short run of two small shops. What survived is looked at, the run is started again, and it must end
with the weights, moments and ledger of a run that nothing happened to: bit for bit at the same shape.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from dtrain.checkpoint.commits import CommitLog
from dtrain.checkpoint.journal import read_chain
from dtrain.checkpoint.retention import slot_of
from dtrain.checkpoint.store import CheckpointStore
from dtrain.core.errors import CheckpointError
from dtrain.core.failpoints import VARIABLE
from dtrain.core.storage import is_temporary, read_json
from dtrain.data.ledger import read_ledger
from tests.gang import Gang, start
from tests.store_toys import store_in
from tests.train_toys import run_config

__all__ = [
    "LIMIT_S",
    "Arena",
    "Fault",
    "Found",
    "Row",
    "cut_run",
    "damages",
    "differences",
    "injected",
    "play",
    "play_damage",
    "superseded",
]

STEPS, EVERY, AT = 8, 2, 4  # of a run, between checkpoints, where faults strike
LIMIT_S = 60.0  # in which a start must have ended, whatever befell it; a machine full of other work included
SHORT = ("dist.timeout_s=8", "checkpoint.timeout_s=3")  # how long the rest of a run waits for a rank


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that befalls a run, and what must be left."""

    name: str
    rank: int
    phase: str
    do: str
    survives: int  # step of the newest checkpoint after it
    ends: bool = True  # whether the run ends by it; else it goes on to its end
    size: int = 2
    step: int = AT
    overrides: tuple[str, ...] = ()
    shape: tuple[str, ...] = ()  # overrides that decide which run it is compared with


@dataclass(frozen=True)
class Found:
    """What a run left: of its newest whole checkpoint the step, every tensor file's digest, and the ledger."""

    step: int
    tensors: tuple[str, ...]
    ledger: pa.Table


@dataclass(frozen=True)
class Row:
    """How it went. `problems` is empty when everything was as it must be."""

    name: str
    fired: int
    codes: list[int | None]
    survived: int
    resumed: int
    problems: list[str] = field(default_factory=list)


@dataclass
class Arena:
    """Where runs take place: prepared shops, an encoder, and the runs that nothing befalls, each made once."""

    folder: Path
    shops: Path
    encoder: Path
    env: Mapping[str, str] = field(default_factory=dict)  # of the runs
    storage: str = ""  # where checkpoints go: a URL; "": into the run folder
    _references: dict[object, Found] = field(default_factory=dict)

    def config(self, name: str, steps: int = STEPS, every: int = EVERY) -> Path:
        """The config of the run `name`, whose folder is `run` beside it."""
        return run_config(
            self.folder / name,
            self.shops,
            self.encoder,
            model={
                "encoder": {"name": str(self.encoder)},
                "dim": 16,
                "user": {"layers": 1, "heads": 2, "feedforward": 32, "dropout": 0.1, "max_positions": 12},
            },
            schedule={"total_steps": 1000},
            train={"steps": steps, "valid_every": 0, "valid_users": 8, "checkpoint_every": every},
            checkpoint={"path": f"{self.storage}/{name}" if self.storage else ""},
        )

    def start(self, config: Path, size: int, overrides: Sequence[str] = (), env: Mapping[str, str] = {}) -> Gang:
        number = len(list(config.parent.glob("start-*.log")))
        return start(config, size, config.parent / f"start-{number}.log", overrides, {**self.env, **env})

    def store(self, config: Path) -> CheckpointStore:
        return store_in(f"{self.storage}/{config.parent.name}" if self.storage else config.parent / "run/checkpoints")

    def found(self, config: Path) -> Found:
        store = self.store(config)
        commit = store.latest()
        assert commit is not None, f"{config.parent.name}: no whole checkpoint"
        links = read_chain(store.blobs, commit.ledger)
        table = read_ledger(segment for link in links for segment in link.segments)
        return Found(commit.step, tuple(file.sha256 for file in commit.files if file.role == "tensors"), table)

    def reference(self, size: int, shape: Sequence[str] = (), steps: int = STEPS, every: int = EVERY) -> Found:
        key = (size, tuple(shape), steps, every)
        if key not in self._references:
            config = self.config(f"reference-{len(self._references)}", steps, every)
            gang = self.start(config, size, shape)
            codes = gang.wait(10 * LIMIT_S)
            assert codes == [0] * size, gang.said()
            self._references[key] = self.found(config)
        return self._references[key]


def injected() -> list[Fault]:
    """One fault for every rank and phase of a save, and some of a step."""
    kills = [("claim", AT - EVERY), ("write", AT - EVERY), ("writing", AT - EVERY), ("vote", AT - EVERY)]
    kills += [("committed", AT)]
    found = [
        Fault(name=f"SIGKILL of rank {rank}, {phase}", rank=rank, phase=phase, do="kill", survives=survives)
        for phase, survives in kills
        for rank in (0, 1)
    ]
    found += [
        Fault(name=f"SIGKILL of rank {rank} in a step", rank=rank, phase="step", do="kill", survives=AT - EVERY)
        for rank in (0, 1)
    ]
    found += [
        Fault(name="SIGKILL before the record", rank=0, phase="record", do="kill", survives=AT - EVERY),
        Fault(name="SIGKILL after the record", rank=0, phase="recorded", do="kill", survives=AT),
        Fault(
            name="SIGKILL during prune",
            rank=0,
            phase="prune",
            do="kill",
            survives=AT,
            overrides=("checkpoint.keep_last=1",),
        ),
    ]
    asynchronous = ("checkpoint.async=true",)
    for phase, rank in (("writing", 0), ("writing", 1), ("record", 0)):
        name = f"SIGKILL of rank {rank}, {phase}, asynchronous"
        survives = AT - EVERY
        found.append(Fault(name=name, rank=rank, phase=phase, do="kill", survives=survives, overrides=asynchronous))
    found += [
        Fault(
            name=f"disk full on rank {rank}, {phase}{', asynchronous' if overrides else ''}",
            rank=rank,
            phase=phase,
            do="enospc",
            survives=STEPS,
            ends=False,
            overrides=overrides,
        )
        for rank, phase, overrides in (
            (0, "write", ()),
            (1, "writing", ()),
            (0, "record", ()),
            (1, "writing", asynchronous),
        )
    ]
    found += [
        Fault(name=f"SIGSTOP of rank {rank}, {phase}", rank=rank, phase=phase, do="stop", survives=AT - EVERY)
        for phase in ("writing", "step")
        for rank in (0, 1)
    ]
    for stage, phase, rank, do in ((1, "step", 1, "stop"), (2, "writing", 1, "kill"), (3, "record", 0, "kill")):
        found.append(
            Fault(
                name=f"SIG{do.upper()} of rank {rank}, {phase}, DeepSpeed stage {stage}",
                rank=rank,
                phase=phase,
                do=do,
                survives=AT - EVERY,
                shape=("engine.name=deepspeed", f"engine.zero_stage={stage}"),
            )
        )
    return found


def play(arena: Arena, fault: Fault, name: str) -> Row:
    """Let `fault` befall the run `name`, start that again, and see what came of it."""
    reference = arena.reference(fault.size, fault.shape)
    config = arena.config(name)
    points = config.with_name("failpoints.json")
    points.write_text(
        json.dumps([{"rank": fault.rank, "step": fault.step, "phase": fault.phase, "do": fault.do}]), encoding="utf-8"
    )
    overrides, env = (*SHORT, *fault.shape, *fault.overrides), {VARIABLE: str(points)}
    gang = arena.start(config, fault.size, overrides, env)
    codes = gang.wait(LIMIT_S, but=[fault.rank] if fault.do == "stop" else ())
    gang.end()
    problems = []
    fired = len(list(config.parent.glob("failpoints.json.fired.*")))
    if fired != 1:
        problems.append(f"fired {fired} times")
    problems += _codes_as_expected(fault, codes)
    survived = newest(arena, config)
    if survived != fault.survives:
        problems.append(f"step {survived} survived, not {fault.survives}")
    return again(
        arena, Row(fault.name, fired, codes, survived, 0, problems), config, reference, overrides, fault.size, env
    )


def _codes_as_expected(fault: Fault, codes: list[int | None]) -> list[str]:
    expected = {"kill": -signal.SIGKILL, "stop": None, "enospc": 0}[fault.do]
    problems = []
    for rank, code in enumerate(codes):
        if rank == fault.rank and code != expected:
            problems.append(f"rank {rank} ended with {code}, not {expected}")
        elif rank != fault.rank and (code is None or (code == 0) == fault.ends):
            problems.append(f"rank {rank} ended with {code}")
    return problems


def newest(arena: Arena, config: Path) -> int:
    """Step of the newest checkpoint that is whole; 0 where there is none."""
    commit = arena.store(config).latest()
    return commit.step if commit else 0


def again(
    arena: Arena,
    row: Row,
    config: Path,
    reference: Found,
    overrides: Sequence[str],
    size: int,
    env: Mapping[str, str] = {},
) -> Row:
    """Start the run again, and compare its end with `reference`."""
    problems = list(row.problems)
    gang = arena.start(config, size, overrides, env)
    codes = gang.wait(LIMIT_S)
    gang.end()
    if codes != [0] * size:
        problems.append(f"started again, it ended with {codes}: {gang.said()[-2000:]}")
    resumed = row.survived
    if row.survived and f"checkpoint of step {row.survived}" not in gang.said():
        resumed = -1
        problems.append(f"did not resume from step {row.survived}")
    problems += differences(arena, config, reference)
    return Row(row.name, row.fired, row.codes, row.survived, resumed, problems)


def differences(arena: Arena, config: Path, reference: Found, *, exact: bool = True) -> list[str]:
    """What of a finished run is not as in `reference`; not `exact`: in its ledger alone, whichever rank was to read."""
    found, problems = arena.found(config), []
    if found.step != reference.step:
        problems.append(f"ended at step {found.step}")
    if exact and found.tensors != reference.tensors:
        problems.append("other weights or moments")
    one, two = ((t if exact else t.drop_columns(["rank"])) for t in (found.ledger, reference.ledger))
    if not one.equals(two):
        problems.append("another ledger")
    return problems + rubbish(arena, config)


def rubbish(arena: Arena, config: Path) -> list[str]:
    """What lies in the store and belongs to no checkpoint."""
    store = arena.store(config)
    kept = {
        file.path.partition("/")[0] for commit in store.commits() for file in commit.files if file.role == "tensors"
    }
    damaged = CommitLog(store.blobs).numbers()[1]  # their files stay: the reason may pass
    left = [name for name in store.blobs.names("") if (slot := slot_of(name)) and not (name in kept or slot in damaged)]
    if not arena.storage:
        left += [path.name for path in (config.parent / "run").rglob("*") if is_temporary(path.name)]
    return [f"left over: {', '.join(left)}"] if left else []


def damages() -> list[tuple[str, str]]:
    """Kinds of files and what happens to them."""
    kinds = ("record", "claim", "attempt", "tensors", "ledger", "link")
    return [(kind, how) for kind in kinds for how in ("flip", "truncate", "delete")]


def cut_run(arena: Arena, size: int = 2) -> Path:
    """A run that was killed after its second checkpoint; its folder is there to be copied."""
    config = arena.config("cut")
    points = config.with_name("failpoints.json")
    kill = [{"rank": rank, "step": AT + 1, "phase": "step", "do": "kill"} for rank in range(size)]
    points.write_text(json.dumps(kill), encoding="utf-8")
    gang = arena.start(config, size, SHORT, {VARIABLE: str(points)})
    assert gang.wait(LIMIT_S) == [-signal.SIGKILL] * size, gang.said()
    return config


def play_damage(arena: Arena, cut: Path, kind: str, how: str, size: int = 2) -> Row:
    """Damage a file of the newest checkpoint of the run `cut`, in a copy of it, and go on."""
    name = f"damage-{kind}-{how}"
    config = arena.config(name)
    shutil.copytree(cut.parent / "run", config.parent / "run")
    root = config.parent / "run/checkpoints"
    store = store_in(root)
    commit = store.commits()[-1]
    if kind in ("tensors", "ledger", "link"):
        path = root / next(file.path for file in commit.files if file.role == kind)
    else:
        path = {
            "record": root / f"commits/{commit.number:06d}.json",
            "claim": root / f"claims/{commit.number:06d}",
            "attempt": root / f"attempts/{commit.attempt:06d}",
        }[kind]
    damage(path, how)
    survived = newest(arena, config)
    expected = AT if kind in ("claim", "attempt") else AT - EVERY
    problems = [] if survived == expected else [f"step {survived} survived, not {expected}"]
    row = Row(f"{how} of a file: {kind}", 1, [], survived, 0, problems)
    return again(arena, row, config, arena.reference(size), SHORT, size)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()


def superseded(arena: Arena, name: str, size: int = 2) -> Row:
    """A start is frozen, the run started again, the first start thawed: it must give way and leave the other alone."""
    reference = arena.reference(size)
    config = arena.config(name)
    points = config.with_name("failpoints.json")
    stops = [{"rank": rank, "step": AT + 1, "phase": "step", "do": "stop"} for rank in range(size)]
    points.write_text(json.dumps(stops), encoding="utf-8")
    older = arena.start(config, size, ("dist.timeout_s=600",), {VARIABLE: str(points)})
    marks = [points.with_name(f"{points.name}.fired.{rank}") for rank in range(size)]
    older.until(lambda: all(mark.exists() for mark in marks), LIMIT_S)
    survived = newest(arena, config)
    problems = [] if survived == AT else [f"step {survived} survived, not {AT}"]
    younger = arena.start(config, size)
    younger.until(lambda: newest(arena, config) > AT, LIMIT_S)
    older.signal(signal.SIGCONT)
    codes = older.wait(LIMIT_S)
    if codes != [CheckpointError.exit_code] * size:
        problems.append(f"the older start ended with {codes}")
    if "start 2 of this run has taken over from start 1" not in older.said():
        problems.append("the older start does not say why it ended")
    later = younger.wait(LIMIT_S)
    if later != [0] * size:
        problems.append(f"the younger start ended with {later}")
    for gang in (older, younger):
        gang.end()
    outcome = read_json(config.parent / "run/outcome.json")
    if outcome["status"] != "completed":
        problems.append(f"outcome.json says {outcome['status']}")
    problems += differences(arena, config, reference)
    return Row("two starts of one run", size, codes, survived, survived, problems)
