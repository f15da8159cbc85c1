"""Which checkpoint a person means: "latest", "best", or a step."""

from __future__ import annotations

from collections.abc import Sequence

from dtrain.checkpoint.commits import Commit
from dtrain.core.config import nearest
from dtrain.core.errors import ConfigError

__all__ = ["candidates", "check_choice"]

_NAMES = ("latest", "best")
_LISTED = 40  # steps that an error names at most


def check_choice(what: str, choice: str) -> None:
    """Raise ConfigError unless `choice` can name a checkpoint; `what` is the option that it was given for."""
    if choice not in _NAMES and not (choice.isascii() and choice.isdigit()):
        raise ConfigError(
            f"{what}={choice}: a checkpoint is named by its step, latest or best.{nearest(choice, _NAMES)}"
        )


def candidates(commits: Sequence[Commit], choice: str, url: str) -> list[Commit]:
    """The checkpoints that `choice` names, newest first; the first of them that is whole is meant.

    `latest`: the full ones; `best`: the full ones tagged best, [] where there are none; a step: those of that step,
    weights-only ones too (a run that went back may have made a step twice). `commits` are all of the store `url`,
    oldest first. Raises ConfigError for a step that there is no checkpoint of.
    """
    check_choice("checkpoint", choice)
    newest_first = list(reversed(commits))
    full = [commit for commit in newest_first if commit.kind == "full"]
    if choice == "latest":
        return full
    if choice == "best":
        return [commit for commit in full if "best" in commit.tags]
    found = [commit for commit in newest_first if commit.step == int(choice)]
    if not found:
        raise ConfigError(f"{url} has no checkpoint of step {int(choice)}; {_steps(commits, int(choice))}")
    return found


def _steps(commits: Sequence[Commit], wanted: int) -> str:
    kinds = {commit.step: commit.kind for commit in commits}
    if not kinds:
        return "it has none at all"
    near = sorted(sorted(kinds, key=lambda step: abs(step - wanted))[:_LISTED])
    listed = ", ".join(f"{step}" if kinds[step] == "full" else f"{step} ({kinds[step]} only)" for step in near)
    return f"there are {listed}" if len(near) == len(kinds) else f"of {len(kinds)} steps the nearest are {listed}"
