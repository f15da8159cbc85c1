"""Train on a Ray cluster: `ray job submit --working-dir . -- python launch/ray_train.py CONFIG [a.b=c ...]`.

Takes the config and overrides of `dtrain train`; the section `cluster` says on how many workers. `dtrain submit` does
it all.
"""

import sys

from dtrain.cli.ray_train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
