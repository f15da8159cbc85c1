"""What preparation keeps of a platform, and how it is split, weighed and described."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dtrain.core.errors import ConfigError, DataError
from dtrain.core.fingerprint import fingerprint_lines
from dtrain.data.catalog import Catalog
from dtrain.data.evalset import EvalSet
from dtrain.data.prepare import prepare
from dtrain.data.schema import NO_DAY
from dtrain.data.splits import cut_windows
from tests.prepare_toys import (
    DAY,
    config_of,
    expected_histories,
    hashed,
    random_rows,
    samples_of,
    write_shop,
)

pytestmark = pytest.mark.usefixtures("user_key")


def test_leave_last_out_keeps_and_splits_what_the_protocol_says(tmp_path: Path) -> None:
    rows = [*random_rows(1), ("person-x", "no-such-item", DAY), ("", "sku1", DAY), ("person-y", "", DAY)]
    report = prepare(config_of(tmp_path, {"shop": write_shop(tmp_path / "raw", rows)}))
    expected = expected_histories(rows, {f"sku{i}" for i in range(30)})
    shop = report.manifest.platform("shop")
    report.manifest.verify()
    assert shop.split_fingerprint == fingerprint_lines(f"{u}\t{mine[-1][1]}" for u, mine in expected.items())
    train_items = Counter(row[1] for mine in expected.values() for row in mine[:-2])
    assert (shop.users, shop.test_rows, shop.valid_rows) == (len(expected),) * 3
    assert shop.train_rows == sum(train_items.values())
    assert shop.cold_share == pytest.approx(
        sum(mine[-1][1] not in train_items for mine in expected.values()) / len(expected), abs=1e-6
    )
    assert shop.rows_read == len(rows)
    assert shop.rows_read - sum(shop.rejected.values()) == sum(map(len, expected.values()))
    assert (shop.rejected["no user"], shop.rejected["no item"], shop.rejected["no item text"]) == (1, 1, 1)

    catalog = Catalog.open(report.manifest, "shop")
    names = catalog.items.to_pylist()
    assert names == sorted({row[1] for mine in expected.values() for row in mine})
    assert catalog.texts.to_pylist() == [f"title {name[3:]}" for name in names]
    assert catalog.categories.to_pylist() == [f"kind {int(name[3:]) % 3}" for name in names]
    assert catalog.counts.tolist() == [train_items[name] for name in names]
    assert [catalog.index(name) for name in names] == list(range(len(catalog)))
    with pytest.raises(DataError, match="'sku999' is not one of"):
        catalog.index("sku999")

    by_hash = {hashed(user): [(names.index(r[1]), r[2]) for r in mine] for user, mine in expected.items()}
    for part, back in (("valid", 2), ("test", 1)):
        found = EvalSet.open(report.manifest, "shop", part)
        assert found.users.to_pylist() == sorted(by_hash)
        for row, user in enumerate(found.users.to_pylist()):
            mine = by_hash[user]
            assert found.histories[row].tolist() == [item for item, _ in mine[:-back]]
            assert found.targets[row] == mine[-back][0]
        assert [h.tolist() for h in found.histories] == [found.histories[i].tolist() for i in range(len(found))]
        assert [h.tolist() for h in found.histories[2:4]] == [found.histories[2].tolist(), found.histories[3].tolist()]


def test_every_training_row_but_the_first_is_a_target_once(tmp_path: Path) -> None:
    rows = random_rows(2, users=12, items=200, most=300)
    config = config_of(tmp_path, {"shop": write_shop(tmp_path / "raw", rows, items=200)}, window=20, overlap=5)
    report = prepare(config)
    catalog = Catalog.open(report.manifest, "shop")
    targets: dict[str, list[tuple[str, int]]] = {}
    for sample in samples_of(report.manifest, "shop"):
        lengths = {len(sample[name]) for name in ("items", "events", "weights", "times")}
        assert len(lengths) == 1
        assert 2 <= lengths.pop() <= 20
        later = sample["user"] in targets
        assert [w > 0 for w in sample["weights"]].index(True) == (5 if later else 1)
        found = zip(sample["items"], sample["times"], sample["weights"], strict=True)
        targets.setdefault(sample["user"], []).extend((catalog.items[i].as_py(), t) for i, t, w in found if w > 0)
    known = {f"sku{i}" for i in range(200)}
    expected = {hashed(u): [(r[1], r[2]) for r in mine[1:-2]] for u, mine in expected_histories(rows, known).items()}
    assert targets == {user: mine for user, mine in expected.items() if mine}
    assert list(targets) == sorted(targets)


def test_rare_items_go_before_short_users(tmp_path: Path) -> None:
    rows = [(f"u{u}", f"sku{i}", DAY * i) for u in range(4) for i in range(5) if i < 3 or u < i - 1]
    rows += [("u9", "sku7", 0), ("u9", "sku1", 1), ("u9", "sku2", 2)]
    shop = write_shop(tmp_path / "raw", rows)
    report = prepare(config_of(tmp_path, {"shop": {**shop, "min_users_per_item": 2}}))
    entry = report.manifest.platform("shop")
    assert entry.rejected == {"rare item": 1, "short history": 2}
    assert Catalog.open(report.manifest, "shop").items.to_pylist() == ["sku0", "sku1", "sku2", "sku3", "sku4"]


def test_without_times_the_order_of_the_file_stands(tmp_path: Path) -> None:
    (tmp_path / "seq.json").write_text('{"u1": [3, 1, 3, 2, 0], "u2": [0, 1, 2]}')
    (tmp_path / "items.json").write_text(json.dumps({str(i): {"title": f"t{i}"} for i in range(4)}))
    block = {
        "language": "en",
        "interactions": [{"files": [str(tmp_path / "seq.json")], "reader": "json", "history": ["value"]}],
        "columns": {"user": "key", "item": "item"},
        "catalog": {
            "sources": [{"files": [str(tmp_path / "items.json")], "reader": "json"}],
            "id": "key",
            "text": "{title}",
        },
    }
    report = prepare(config_of(tmp_path, {"shop": block}))
    test = EvalSet.open(report.manifest, "shop", "test")
    row = test.users.to_pylist().index(hashed("u1"))
    assert (test.histories[row].tolist(), test.targets[row]) == ([3, 1, 2], 0)
    assert samples_of(report.manifest, "shop")[0]["times"] == [None, None]


def test_texts_from_the_interactions_themselves(tmp_path: Path) -> None:
    lines = [
        "who,what,n,name",
        "u1.0,a,1,Lamp",
        "u1,a,-1,Wrong",
        "1.0,a,1,Lamp",
        "2,a,1,lamp",
        "2,a,1,lamp",
        "1,b,1, Jar ",
    ]
    lines += ["1,c,1,Cup", "2,b,1,Box", "2,c,1,Cup", ",c,1,Never", ",c,1,Never", "2,d,1,"]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    block = {
        "language": "en",
        "interactions": [{"files": [str(tmp_path / "a.csv")]}],
        "columns": {"user": "who", "item": "what", "user_type": "integer"},
        "filters": [{"column": "n", "op": "gt", "value": 0, "name": "returned"}],
        "catalog": {"id": "what", "text": "{name}", "pick": "most_frequent"},
        "on_bad_row": "drop",
    }
    report = prepare(config_of(tmp_path, {"shop": block}))
    catalog = Catalog.open(report.manifest, "shop")
    assert dict(zip(catalog.items.to_pylist(), catalog.texts.to_pylist(), strict=True)) == {
        "a": "lamp",
        "b": "Box",
        "c": "Cup",
    }
    rejected = report.manifest.platform("shop").rejected
    assert rejected == {"filter:returned": 1, "malformed row": 1, "no user": 2, "no item text": 1, "repeat": 1}
    assert EvalSet.open(report.manifest, "shop", "test").users.to_pylist() == sorted([hashed("1"), hashed("2")])


def dated_shop(folder: Path, form: str, dates: dict[str, list[str]], pick: str = "first") -> dict[str, Any]:
    """A shop with one catalogue row for each of an item's dates, those of all items in turn."""
    shop = write_shop(folder, random_rows(5))
    most = max(map(len, dates.values()))
    rows = []
    for turn in range(most):
        for item, cells in dates.items():
            nameless = item == "sku5" and turn == 0 and len(cells) > 1
            if turn < len(cells):
                rows.append(f"{item},{'' if nameless else 'title'},{cells[turn]}")
    (folder / "items.csv").write_text("\n".join(["sku,title,out", *rows]) + "\n", encoding="utf-8")
    shop["catalog"] |= {"category": "", "released": "out", "released_format": form, "pick": pick}
    return shop


@pytest.mark.parametrize("pick", ["first", "most_frequent"])
def test_an_item_is_released_on_the_earliest_date_that_its_rows_give(tmp_path: Path, pick: str) -> None:
    dates = {f"sku{i}": [""] for i in range(30)}
    dates |= {"sku3": ["2014-05-02", "2014-05-01T23:59:00", "2015-01-01"], "sku4": ["", "2016-02-29"]}
    dates |= {"sku5": ["2010-01-01", "2012-01-01"]}  # its first row has no text
    dates |= {"sku7": ["Jul 2014"], "sku8": ["1969-12-31"], "sku9": ["9999-01-01"]}
    report = prepare(config_of(tmp_path, {"shop": dated_shop(tmp_path / "raw", "iso", dates, pick)}))
    catalog = Catalog.open(report.manifest, "shop")
    found = dict(zip(catalog.items.to_pylist(), catalog.released.tolist()))
    assert found.get("sku5") == (14_610 if pick == "most_frequent" else None)
    assert (found["sku3"], found["sku4"], found["sku8"]) == (16_191, 16_860, -1)
    assert {found[name] for name in ("sku7", "sku9", "sku0")} == {NO_DAY}  # no date, a date that is none, no cell
    dated, items = (4, 30) if pick == "most_frequent" else (3, 29)
    assert report.manifest.platform("shop").dated_items == dated
    assert f"shop: a release date is known of {dated} of {items} items" in report.table()
    assert catalog.texts.to_pylist() == ["title"] * items


def test_dates_that_are_all_of_another_format_are_an_error_that_names_the_column(tmp_path: Path) -> None:
    shop = dated_shop(tmp_path / "raw", "%d/%m/%Y", {f"sku{i}": ["2014-05-02"] for i in range(30)})
    with pytest.raises(DataError, match=r"column 'out': none of the 30 items .*'%d/%m/%Y'; correct catalog"):
        prepare(config_of(tmp_path, {"shop": shop}))
    shop["catalog"]["released_format"] = "isso"
    with pytest.raises(ConfigError, match=r"catalog\.released_format: 'isso' must be one of iso"):
        prepare(config_of(tmp_path, {"shop": shop}))
    shop["catalog"] |= {"released_format": "iso", "released": "outt"}
    with pytest.raises(DataError, match="outt"):
        prepare(config_of(tmp_path, {"shop": shop}))


def test_events_and_values_weigh_targets(tmp_path: Path) -> None:
    lines = ["u,i,t,e,v"]
    for n, (event, value) in enumerate(
        [("buy", 1), ("view", 2), ("", 3), ("odd", 4), ("buy", 5), ("buy", 6), ("buy", 7)]
    ):
        lines.append(f"u,sku{n},{n},{event},{value}")
    (tmp_path / "raw.csv").write_text("\n".join(lines) + "\n")
    shop = write_shop(tmp_path / "raw", [])
    shop |= {
        "interactions": [{"files": [str(tmp_path / "raw.csv")]}],
        "columns": {"user": "u", "item": "i", "time": "t", "event": "e", "value": "v", "time_format": "seconds"},
        "event_weights": {"buy": 1.0, "view": 0.25},
        "other_event_weight": 0.0,
        "weight_by_value": True,
    }
    report = prepare(config_of(tmp_path, {"shop": shop}))
    (sample,) = samples_of(report.manifest, "shop")
    assert report.manifest.platform("shop").events == ("buy", "view", "other")
    assert sample["events"] == [0, 1, 2, 2, 0]
    assert sample["weights"] == [0, 0.5, 0, 0, 5]


def test_by_time_trains_on_nothing_from_the_future(tmp_path: Path) -> None:
    rows = random_rows(3, users=60, items=60, most=60)
    split = {"protocol": "by_time", "test_share": 0.2, "valid_share": 0.1}
    report = prepare(config_of(tmp_path, {"shop": write_shop(tmp_path / "raw", rows, items=60) | {"split": split}}))
    entry = report.manifest.platform("shop")
    names = Catalog.open(report.manifest, "shop").items.to_pylist()
    kept = expected_histories(rows, {f"sku{i}" for i in range(60)})
    every = [row[2] for mine in kept.values() for row in mine]
    end = max(every) + 1
    for part, share in (("test", 0.2), ("valid", 0.1)):
        found = EvalSet.open(report.manifest, "shop", part)
        path = report.manifest.root / getattr(entry, part).path
        cut = min(pa.ipc.open_file(str(path)).read_all()["target_time"].to_pylist()) // DAY * DAY
        assert sum(cut <= t < end for t in every) / len(every) == pytest.approx(share, abs=0.02)
        expected = {}
        for user, mine in kept.items():
            before, inside = [r for r in mine if r[2] < cut], [r for r in mine if cut <= r[2] < end]
            if before and inside:
                expected[hashed(user)] = ([names.index(r[1]) for r in before], names.index(inside[0][1]))
        users = found.users.to_pylist()
        assert users == sorted(expected)
        for user, history, target in zip(users, found.histories, found.targets, strict=True):
            assert (history.tolist(), target) == expected[user]
        end = cut
    trained = [t for sample in samples_of(report.manifest, "shop") for t in sample["times"]]
    assert max(trained) < end
    assert entry.train_rows == sum(t < end for t in every)


def test_by_time_needs_days_and_times(tmp_path: Path) -> None:
    shop = write_shop(tmp_path / "raw", [("u", f"sku{i}", i) for i in range(5)]) | {"split": {"protocol": "by_time"}}
    with pytest.raises(DataError, match="platform 'shop': split by_time needs rows of at least 3 days; these span 1"):
        prepare(config_of(tmp_path, {"shop": shop}))
    shop["columns"] = {"user": "who", "item": "what"}
    with pytest.raises(ConfigError, match=r"platforms\.shop\.split\.protocol: by_time needs columns\.time"):
        config_of(tmp_path, {"shop": shop})


def test_windows_of_many_lengths() -> None:
    lengths = np.arange(400)
    found = cut_windows(lengths, 50, 10)
    for user in lengths.tolist():
        mine = found.user == user
        targets = [
            row
            for start, stop, context in zip(found.start[mine], found.stop[mine], found.context[mine], strict=True)
            for row in range(start + context, stop)
        ]
        assert targets == list(range(1, user))
        assert (found.stop[mine] - found.start[mine] <= 50).all()
