"""Evaluate on all ranks of a launcher: `torchrun --nproc-per-node 2 launch/evaluate.py RUN`.

Takes the same arguments as `dtrain evaluate`.
"""

import sys

from dtrain.cli.main import main

if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    sys.exit(main(["evaluate", *arguments]))
