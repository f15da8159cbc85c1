"""The exception tree. Every error that a user can cause or cure is one of these; the rest are bugs.

DtrainError                 exit code 1
|- ConfigError              2   a config key, value or command line that can't be used
|- DataError                3   an input file, row or prepared folder that can't be used
|  `- CorruptFile           3   a file whose content does not match its recorded size or digest
|- CheckpointError          4   a checkpoint that is damaged, missing or can't be written
|  |- StateMismatch         4   a checkpoint or model that belongs to other data, tokenizer or config
|  `- Superseded            4   a later start of the run has taken over: this one may save no more
|- TrainError               5   a run that can't go on (non-finite losses)
|  `- LostRank              5   another rank has died, hung or can't be reached any more
|- ExportError              6   an export that does not reproduce the run
`- Interrupted              130 Ctrl-C, at once: a second one where the first asked a training to stop
   |- Stopped               75  asked to stop (signal or `dtrain stop`), saved and ended; EX_TEMPFAIL of sysexits.h:
   |                            the same command goes on from there
   `- StopOverdue           76  asked to stop, but not there within checkpoint.grace_s (or `dtrain stop --timeout`)

A message names the thing, its value, the rule it breaks and the fix, in that order.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CorruptFile",
    "DataError",
    "DtrainError",
    "ExportError",
    "Interrupted",
    "LostRank",
    "StateMismatch",
    "StopOverdue",
    "Stopped",
    "Superseded",
    "TrainError",
]


class DtrainError(Exception):
    """Base of all errors raised on purpose. `exit_code` is the process exit code it leads to."""

    exit_code = 1


class ConfigError(DtrainError):
    exit_code = 2


class DataError(DtrainError):
    exit_code = 3


class CorruptFile(DataError):
    pass


class CheckpointError(DtrainError):
    exit_code = 4


class StateMismatch(CheckpointError):
    pass


class Superseded(CheckpointError):
    pass


class TrainError(DtrainError):
    exit_code = 5


class LostRank(TrainError):
    pass


class ExportError(DtrainError):
    exit_code = 6


class Interrupted(DtrainError):
    exit_code = 130


class Stopped(Interrupted):
    exit_code = 75


class StopOverdue(Interrupted):
    exit_code = 76
