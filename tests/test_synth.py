"""Synthetic exports: what was asked for, the same bytes from the same config, and readable by preparation."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from dtrain.cli.main import main
from dtrain.core.config import load_config
from dtrain.core.errors import ConfigError, DataError
from dtrain.data.catalog import Catalog
from dtrain.data.evalset import EvalSet
from dtrain.data.manifest import PlatformManifest
from dtrain.data.platforms import PrepareConfig
from dtrain.data.prepare import prepare
from dtrain.data.synth import CHUNK_ROWS, SynthConfig, SynthPlatform, interactions
from dtrain.data.synth_files import synthesise
from tests.prepare_toys import files_of

pytestmark = pytest.mark.usefixtures("user_key")


def config(out: Path, **more: Any) -> SynthConfig:
    return SynthConfig(**({"out": str(out), "rows": 30_000, "file_rows": 4_000, "workers": 1} | more))


def prepared(out: Path, **more: Any) -> dict[str, PlatformManifest]:
    report = synthesise(config(out, **more))
    return dict(prepare(load_config(PrepareConfig, report.config, ["workers=1"])).manifest.platforms)


def test_equal_configs_give_equal_bytes(tmp_path: Path) -> None:
    written = []
    for name, more in (("a", {}), ("b", {"workers": 2}), ("c", {"seed": 2})):
        synthesise(config(tmp_path / name, **more))
        written.append({k: v for k, v in files_of(tmp_path / name).items() if k != "prepare.yaml"})
    assert written[0] == written[1]
    assert len(written[0]) == 3 + 3 + 3 + 3
    assert all(written[0][name] != written[2][name] for name in written[0])


def test_every_row_is_there_and_read(tmp_path: Path) -> None:
    found = prepared(tmp_path / "out")
    assert {name: p.rows_read for name, p in found.items()} == {"gifts": 9000, "games": 9000, "grocery": 12_000}
    assert not any({"malformed row", "no time", "no item text"} & set(p.rejected) for p in found.values())
    files = sorted((tmp_path / "out/games").glob("interactions-*"))
    assert [pq.read_metadata(path).num_rows for path in files] == [4000, 4000, 1000]
    times = np.concatenate([pq.read_table(path)["at"].to_numpy() for path in files])
    assert (np.diff(times) >= np.timedelta64(0)).all()
    lines = pacsv.read_csv(tmp_path / "out/gifts/interactions-00000.csv")
    assert lines.column_names == ["customer", "sku", "ordered"]


def test_texts_and_their_groups(tmp_path: Path) -> None:
    report = synthesise(config(tmp_path / "out"))
    manifest = prepare(load_config(PrepareConfig, report.config, ["workers=1"])).manifest
    catalog = Catalog.open(manifest, "gifts")
    texts, categories = ([str(text) for text in column] for column in (catalog.texts, catalog.categories))
    assert len(set(texts)) == len(texts) > 100
    assert all(category in text.split() for text, category in zip(texts, categories, strict=True))
    assert len(set(categories)) == 50
    rows = EvalSet.open(manifest, "gifts", "test")
    path = manifest.root / manifest.platform("gifts").test.path
    histories = pa.ipc.open_file(str(path)).read_all()["items"].to_pylist()
    assert len(rows) == len(histories)
    most = [Counter(categories[item] for item in items).most_common(1)[0][1] / len(items) for items in histories]
    assert np.mean(most) > 0.2  # by chance about a tenth; all of a small group soon is a repeat


def test_malformed_and_unknown_rows(tmp_path: Path) -> None:
    found = prepared(tmp_path / "out", malformed=0.02, unknown=0.05)
    for name, reason in (("gifts", "malformed row"), ("games", "no time"), ("grocery", "no time")):
        share = found[name].rejected[reason] / found[name].rows_read
        assert 0.01 < share < 0.03
        share = found[name].rejected["no item text"] / found[name].rows_read
        assert 0.03 < share < 0.07


def _drawn(platform: SynthPlatform, rows: int = 2 * CHUNK_ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    made = SynthConfig(out="-", rows=rows, platforms={"one": platform})
    chunks = list(interactions(made, "one", 0, rows))
    user, item, time = (np.concatenate([getattr(c, n) for c in chunks]) for n in ("user", "item", "time"))
    assert len(user) == rows
    assert item.min() >= 0
    assert item.max() < made.items_of("one")
    return user, item, time


def test_users_and_items_are_as_skewed_as_asked() -> None:
    plain = SynthPlatform(user_rows=50, user_sigma=1.0, items=1000, item_exponent=1.0, item_shift=0.01, affinity=0)
    user, item, _ = _drawn(plain)
    length = np.bincount(user)
    assert len(length) == round(2 * CHUNK_ROWS / 50)
    assert np.median(length) == pytest.approx(50 * np.exp(-0.5), rel=0.1)  # a log-normal's median and mean
    rank = np.arange(1000) + 0.5
    share = 1 / (rank + 10)
    count = np.sort(np.bincount(item, minlength=1000))[::-1]
    assert count[:10].sum() / count.sum() == pytest.approx((share / share.sum())[:10].sum(), rel=0.05)
    even, _, _ = _drawn(dataclasses.replace(plain, user_sigma=0.0))
    assert np.bincount(even).std() < 0.25 * length.std()


def test_repeats_baskets_and_groups() -> None:
    def repeated(user: np.ndarray, item: np.ndarray) -> float:
        return 1 - len(np.unique(user * 10**6 + item)) / len(user)

    plain = SynthPlatform(user_rows=50, items=100_000, item_exponent=0.5, affinity=0, basket=1)
    often = dataclasses.replace(plain, repeats=0.5, basket=10)
    user, item, time = _drawn(plain)
    user_2, item_2, time_2 = _drawn(often)
    assert repeated(user, item) < 0.02
    assert 0.3 < repeated(user_2, item_2) < 0.5

    def same_moment(user: np.ndarray, time: np.ndarray) -> float:
        return float(((np.diff(user) == 0) & (np.diff(time) == 0)).mean())

    assert same_moment(user, time) < 0.01
    assert same_moment(user_2, time_2) == pytest.approx(0.9, abs=0.02)


def test_days_differ_and_are_all_there() -> None:
    _, _, time = _drawn(SynthPlatform(days=100))
    assert (np.diff(time) >= 0).all()
    per_day = np.bincount((time - time[0]) // 86_400)
    assert len(per_day) == 100
    assert per_day.max() > 2 * np.median(per_day)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["synth", "--rows", "30000", "--out", str(out), "workers=1", "seed=3"]) == 0
    assert "30,000 rows" in capsys.readouterr().out
    assert main(["prepare", str(out / "prepare.yaml"), "workers=1"]) == 0
    capsys.readouterr()
    before = files_of(out)
    assert main(["synth", "--rows", "3000", "--out", str(out)]) == DataError.exit_code
    assert "is not empty" in capsys.readouterr().err
    assert files_of(out) == before
    (tmp_path / "mine.yaml").write_text("platforms: {one: {format: csv, items: 50}}\n")
    assert main(["synth", str(tmp_path / "mine.yaml"), "--rows", "500", f"out={tmp_path / 'new'}", "workers=1"]) == 0
    assert sorted(os.listdir(tmp_path / "new" / "one")) == ["interactions-00000.csv", "items.csv"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows: 0 must be at least one"),
        ({"malformed": 1.0}, "malformed: 1.0 must be within 0 to 1"),
        ({"platforms": {"a": SynthPlatform(format="json")}}, r"platforms.a.format: 'json' must be parquet or csv"),
        ({"platforms": {"a": SynthPlatform(basket=0.5)}}, r"platforms.a.basket: 0.5 must be 1 or more"),
    ],
)
def test_config_rules(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **change)
