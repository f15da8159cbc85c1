"""Prepare all seven platforms and check users, items, train rows, cold share and split fingerprint of each.

    DTRAIN_DATA=... DTRAIN_INPUTS=runs/inputs python benchmarks/seven_platforms.py OUT

Exits 1, naming every difference, unless OUT/manifest.json says exactly what it must.
"""

from __future__ import annotations

import sys

from dtrain.core.config import load_config
from dtrain.core.errors import DtrainError
from dtrain.data.platforms import PrepareConfig
from dtrain.data.prepare import prepare

# users, items, train rows, test targets never seen in train (percent), fingerprint of the test split
EXPECTED = {
    "online_retail": (4189, 3659, 257647, 0.21, "e0f5ee30ee2170e6"),
    "amazon_games": (50546, 16859, 339172, 0.21, "fab5057a991315de"),
    "amazon_scientific": (8317, 4344, 41858, 0.88, "a44ef12ab1024073"),
    "steam": (5316, 1947, 12763, 10.65, "8ec3e8a33b6e3e0b"),
    "amazon_cn": (6437, 96, 28961, 0.00, "b2944371dc9bc9c9"),
    "grocery": (2435, 10425, 641995, 0.00, "b1b5ceb97109830e"),
    "movielens": (943, 1682, 98114, 0.21, "7aca07d9172f63b9"),
}


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        config = load_config(PrepareConfig, "configs/data/seven.yaml", [f"out={sys.argv[1]}"])
        report = prepare(config)
    except DtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(report.table())
    print(report.summary())
    found = {
        name: (p.users, p.items, p.train_rows, round(100 * p.cold_share, 2), p.split_fingerprint)
        for name, p in report.manifest.platforms.items()
    }
    wrong = [
        f"{name}: {found.get(name)}, must be {numbers}"
        for name, numbers in EXPECTED.items()
        if found.get(name) != numbers
    ]
    print("\n".join(wrong) or "all seven as they must be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
