"""`dtrain submit`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dtrain.core.config import load_config

__all__ = ["submit_job"]

_LOCAL = "http://127.0.0.1:8265"  # where Ray's dashboard listens unless told otherwise


def submit_job(arguments: argparse.Namespace) -> int:
    """Send the training that `arguments` describe, or say what would be sent. Returns the exit code."""
    from dtrain.orchestrate.submit import plan, submit, use_token
    from dtrain.train.config import RunConfig

    token = use_token()
    config = load_config(RunConfig, arguments.config, arguments.overrides)
    job = plan(arguments.config, arguments.overrides, config, Path(arguments.working_dir))
    address = arguments.address or os.environ.get("RAY_ADDRESS", _LOCAL)
    if arguments.dry_run:
        print(job.describe(address))
        print(f"token       {'sent, not shown' if token else 'none found'}")
        return 0
    return submit(job, address, follow=not arguments.detach)
