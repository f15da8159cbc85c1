"""Prepare all seven platforms and check users, items, train rows, cold share and split fingerprint of each.

    DTRAIN_DATA=... DTRAIN_INPUTS=runs/inputs python -m benchmarks.seven_platforms OUT [NODES]

Exits 1, naming every difference, unless OUT/manifest.json says exactly what it must. With NODES it then prepares them
again on a Ray cluster of so many nodes, into OUT-on-ray, and exits 1 unless every file there has the same bytes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from dtrain.cli.main import main as dtrain
from dtrain.core.config import load_config
from dtrain.core.errors import DtrainError
from dtrain.core.storage import sha256_file
from dtrain.data.platforms import PrepareConfig
from dtrain.data.prepare import prepare
from tests.ray_nodes import nodes

DATA = "configs/data/seven.yaml"

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
    if len(sys.argv) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        config = load_config(PrepareConfig, DATA, [f"out={sys.argv[1]}"])
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
    if len(sys.argv) == 3:
        wrong += on_ray(Path(sys.argv[1]), int(sys.argv[2]))
    return 1 if wrong else 0


def on_ray(here: Path, count: int) -> list[str]:
    """What is wrong with a preparation by `count` nodes, beside the one in the folder `here`."""
    there = here.with_name(f"{here.name}-on-ray")
    with tempfile.TemporaryDirectory() as folder, nodes(count, Path(folder) / "none.json") as cluster:
        began = time.monotonic()
        code = dtrain(["prepare", DATA, f"out={there}", f"cluster.address={cluster.address}"])
        print(f"on {count} Ray nodes: {time.monotonic() - began:.0f} s")
    if code:
        return [f"dtrain prepare on Ray: exit code {code}"]
    one, other = ({p.relative_to(f): sha256_file(p) for p in f.rglob("*") if p.is_file()} for f in (here, there))
    wrong = [f"{path}: other bytes on Ray" for path in sorted({*one, *other}) if one.get(path) != other.get(path)]
    print("\n".join(wrong) or f"the same bytes in all {len(one)} files")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
