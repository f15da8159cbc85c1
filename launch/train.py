"""Train, however it is started: `python launch/train.py C`, or the same behind `torchrun ...` or `deepspeed ...`.

Takes the same arguments as `dtrain train`.
"""

import sys

from dtrain.cli.main import main

if __name__ == "__main__":
    # The deepspeed launcher adds --local_rank=N; the environment says the same.
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    sys.exit(main(["train", *arguments]))
