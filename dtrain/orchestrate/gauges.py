"""What Prometheus sees of a training: Ray's metrics agent on rank 0's node serves these beside Ray's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

__all__ = ["Gauges"]

#: Name in log.jsonl -> name and help for Prometheus, which writes `ray_` before it.
_SHOWN = {
    "loss": ("dtrain_loss", "Training loss since the last log line"),
    "step_s": ("dtrain_step_seconds", "Seconds of a step, checkpoints and validations left out"),
    "tokens_per_s": ("dtrain_tokens_per_second", "Tokens of all ranks a second"),
    "targets_per_s": ("dtrain_targets_per_second", "Targets of all ranks a second"),
    "padding": ("dtrain_padding_ratio", "Share of padding in the tokens computed"),
    "data_wait": ("dtrain_data_wait_ratio", "Share of the time spent waiting for data"),
    "checkpoint_s": ("dtrain_checkpoint_seconds", "Seconds that the last checkpoint held up the training"),
}


class Gauges:
    """Shows each log line of a run. `attempt` counts the starts of this job, from 1."""

    def __init__(self, run: str, attempt: int) -> None:
        self._tags = {"run": run}
        self._gauges = {key: Gauge(name, text, tag_keys=("run",)) for key, (name, text) in _SHOWN.items()}
        self._step = Gauge("dtrain_step", "Optimizer steps taken", tag_keys=("run",))
        self._samples = Counter("dtrain_samples", "Samples trained on", tag_keys=("run", "platform"))
        self._restarts = Gauge("dtrain_restarts", "Starts of this job beyond the first", tag_keys=("run",))
        self._attempt = attempt

    def show(self, step: int, line: Mapping[str, Any]) -> None:
        """Take one line of log.jsonl."""
        self._step.set(step, self._tags)
        self._restarts.set(self._attempt - 1, self._tags)  # each time: the agent forgets what is not set again
        for key, gauge in self._gauges.items():
            if line.get(key) is not None:
                gauge.set(float(line[key]), self._tags)
        for platform, count in line.get("samples_per_platform", {}).items():
            if count:
                self._samples.inc(count, {**self._tags, "platform": platform})
