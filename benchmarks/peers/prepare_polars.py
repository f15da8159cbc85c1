"""The preparation that benchmarks/prepare_speed.py compares with: a plain Polars script, everything in memory.

    python prepare_polars.py CONFIG.json

One JSON object on the last line of stdout: per platform its counts. Written as its users would: lazy scans, its
expressions, one process, Polars' own threads. Python is called where Polars has no expression: for the keyed hash of
each distinct user, and for the SHA-256 that orders rows of equal time (`"ties": "hash"`). With `"ties": "item"` equal
times go by item id instead, as a script would that needn't give the same samples.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
from pathlib import Path
from typing import Any

import polars as pl


def interactions(platform: dict[str, Any]) -> pl.LazyFrame:
    """Columns user, item (text), time (datetime), row (order of the files)."""
    columns = platform["columns"]
    if platform["reader"] == "csv":
        frame = pl.scan_csv(platform["files"], infer_schema=False)
        time = pl.col(columns["time"]).str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False, time_unit="us")
    else:
        frame = pl.scan_parquet(platform["files"])
        time = pl.col(columns["time"])
    return frame.select(
        user=pl.col(columns["user"]).cast(pl.String), item=pl.col(columns["item"]).cast(pl.String), time=time
    ).drop_nulls()


def catalog(platform: dict[str, Any]) -> pl.LazyFrame:
    """Columns item, text, category of items that have text."""
    source = platform["catalog"]
    scan = pl.scan_csv(source["file"], infer_schema=False) if platform["reader"] == "csv" else None
    frame = scan if scan is not None else pl.scan_parquet(source["file"])
    text = pl.concat_str([pl.col(name).cast(pl.String) for name in source["text"]], separator=" ", ignore_nulls=True)
    frame = frame.select(
        item=pl.col(source["id"]).cast(pl.String), text=text.str.strip_chars(), category=pl.col(source["category"])
    )
    return frame.filter(pl.col("text") != "").unique("item", keep="first", maintain_order=True)


def tie_digests(rows: pl.DataFrame) -> pl.DataFrame:
    """`rows` with a column `tie`: the SHA-256 of `user TAB item` where the user has another row of that time."""
    tied = pl.len().over("user", "time") > 1
    lines = pl.when(tied).then(pl.concat_str("user", "item", separator="\t"))
    digest = lines.map_batches(
        lambda column: pl.Series(
            [None if line is None else hashlib.sha256(line.encode()).digest() for line in column], dtype=pl.Binary
        ),
        return_dtype=pl.Binary,
    )
    return rows.with_columns(tie=digest)


def user_hashes(users: pl.Series, key: bytes) -> pl.DataFrame:
    """Columns user, hash (32 hex digits) of the distinct `users`."""
    distinct = users.unique()
    hashes = [hmac.digest(key, user.encode(), "sha256")[:16].hex() for user in distinct]
    return pl.DataFrame({"user": distinct, "hash": hashes})


def histories(platform: dict[str, Any], ties: str, key: bytes) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(rows kept, in order of user hash and age, with `item_row` and `at` within the user; catalogue)."""
    items = catalog(platform).collect()
    rows = interactions(platform).join(items.lazy().select("item"), on="item", how="semi").collect()
    # the first row of a user and an item counts: of the lowest time
    rows = rows.group_by("user", "item").agg(pl.col("time").min())
    rows = rows.filter(pl.len().over("item") >= platform["min_users_per_item"])
    rows = rows.filter(pl.len().over("user") >= platform["min_items_per_user"])
    rows = tie_digests(rows) if ties == "hash" else rows.with_columns(tie=pl.col("item"))
    rows = rows.join(user_hashes(rows["user"], key), on="user")
    rows = rows.sort("hash", "time", "tie").drop("tie")
    met = items.join(rows.select("item").unique(), on="item", how="semi").sort("item").with_row_index("item_row")
    rows = rows.join(met.select("item", "item_row"), on="item", maintain_order="left")
    rows = rows.with_columns(at=pl.int_range(pl.len()).over("hash"), count=pl.len().over("hash"))
    return rows, met


def windows(train: pl.DataFrame, window: int, overlap: int) -> pl.DataFrame:
    """One row a training sample: user hash and lists of items, weights and times."""
    stride = window - overlap
    counts = train.filter(pl.col("at") == 0).select(
        "hash",
        rows=pl.col("count") - 2,
        samples=1 + ((pl.col("count").cast(pl.Int64) - 2 - window) / stride).ceil().clip(0),
    )
    counts = counts.filter(pl.col("rows") >= 2)
    starts = counts.with_columns(number=pl.int_ranges(0, pl.col("samples").cast(pl.Int64))).explode("number")
    lists = train.group_by("hash", maintain_order=True).agg("item_row", pl.col("time").dt.epoch("s"))
    start = pl.col("number") * stride
    context = pl.when(pl.col("number") == 0).then(1).otherwise(overlap)
    cut = starts.join(lists, on="hash", maintain_order="left").with_columns(
        items=pl.col("item_row").list.slice(start, window), times=pl.col("time").list.slice(start, window)
    )
    weights = pl.concat_list(
        pl.lit(0.0, pl.Float32).repeat_by(context),
        pl.lit(1.0, pl.Float32).repeat_by(pl.col("items").list.len() - context),
    )
    events = pl.lit(0, pl.Int8).repeat_by(pl.col("items").list.len())
    return cut.select(user="hash", items="items", events=events, weights=weights, times="times")


def targets(rows: pl.DataFrame, before: int) -> pl.DataFrame:
    """One row a user: the history before the row that is `before` the last, and that row as target."""
    at = pl.col("count").cast(pl.Int64) - 1 - before
    history = (
        rows.filter(pl.col("at") < at)
        .group_by("hash", maintain_order=True)
        .agg(items="item_row", times=pl.col("time").dt.epoch("s"))
    )
    target = rows.filter(pl.col("at") == at).select("hash", target="item_row", target_time=pl.col("time").dt.epoch("s"))
    return history.join(target, on="hash", maintain_order="left")


def prepare(name: str, platform: dict[str, Any], config: dict[str, Any]) -> dict[str, int]:
    """Write one platform's Parquet files; its counts."""
    out = Path(config["out"]) / name
    out.mkdir(parents=True, exist_ok=True)
    rows, items = histories(platform, config["ties"], bytes.fromhex(config["key"]))
    train = rows.filter(pl.col("at").cast(pl.Int64) < pl.col("count").cast(pl.Int64) - 2)
    samples = windows(train, config["window"], config["overlap"])
    samples.write_parquet(out / "train.parquet")
    for part, before in (("valid", 1), ("test", 0)):
        targets(rows, before).write_parquet(out / f"{part}.parquet")
    counted = items.join(train.group_by("item").len("count"), on="item", how="left").with_columns(
        pl.col("count").fill_null(0)
    )
    counted.sort("item_row").drop("item_row").write_parquet(out / "catalog.parquet")
    return {
        "users": rows["hash"].n_unique(),
        "items": items.height,
        "train_rows": train.height,
        "train_samples": samples.height,
    }


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text())
    found = {name: prepare(name, platform, config) for name, platform in config["platforms"].items()}
    print(json.dumps({"platforms": found, "versions": {"polars": pl.__version__}}))


if __name__ == "__main__":
    main()
