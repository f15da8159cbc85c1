"""The Arrow schemas of a prepared folder. Item columns hold rows of the platform's catalogue."""

from __future__ import annotations

import pyarrow as pa

__all__ = ["CATALOG", "DAY", "EVAL", "NO_DAY", "SAMPLE", "SHARDS"]

DAY = 86_400  # seconds
NO_DAY = -(2**31)  # the day of what has no time

#: `catalog.arrow`, one row an item, ordered by item id. `count` is the item's number of training rows, `released` the
#: UTC day, counted from 1970, from which it is to be had, null where nobody knows.
CATALOG = pa.schema(
    [
        ("item", pa.string()),
        ("text", pa.string()),
        ("category", pa.string()),
        ("count", pa.int64()),
        ("released", pa.int32()),
    ]
)

#: A training sample: one window of one user's training history, oldest first; all four lists have equal length.
#: `weight[t] > 0` makes position t a target (predicted from the positions before it); 0 makes it context only.
#: `time` is Unix seconds, or null for platforms without times. `user` is the keyed hash of the user id.
SAMPLE = pa.schema(
    [
        ("user", pa.string()),
        ("items", pa.list_(pa.int32())),
        ("events", pa.list_(pa.int8())),
        ("weights", pa.list_(pa.float32())),
        ("times", pa.list_(pa.int64())),
    ]
)

#: `valid.arrow` and `test.arrow`, one row a user: the whole history before the target, oldest first.
EVAL = pa.schema(
    [
        ("user", pa.string()),
        ("items", pa.list_(pa.int32())),
        ("events", pa.list_(pa.int8())),
        ("times", pa.list_(pa.int64())),
        ("target", pa.int32()),
        ("target_event", pa.int8()),
        ("target_time", pa.int64()),
    ]
)

#: `train.arrow`, one row a shard, in one batch. Lists are of the shard's blocks: the tar's members, Arrow files each.
SHARDS = pa.schema(
    [
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.binary(32)),
        ("samples", pa.int64()),
        ("block_offset", pa.list_(pa.int64())),
        ("block_bytes", pa.list_(pa.int32())),
        ("block_rows", pa.list_(pa.int32())),
        ("block_crc32", pa.list_(pa.uint32())),
    ]
)
