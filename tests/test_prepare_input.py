"""Bad input and bad config are refused with the thing, the rule and the fix; the configs in the repository work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dtrain.core.config import load_config
from dtrain.core.errors import ConfigError, DataError
from dtrain.data.platforms import PrepareConfig
from dtrain.data.prepare import prepare
from tests.prepare_toys import (
    config_of,
    random_rows,
    write_shop,
)

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("user_key")


def refused(tmp_path: Path, **changes: Any) -> str:
    shop = write_shop(tmp_path / "raw", random_rows(0)) | changes
    with pytest.raises(DataError) as caught:
        prepare(config_of(tmp_path, {"shop": shop}))
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert "person-" not in str(caught.value)
    return str(caught.value)


def test_wrong_column(tmp_path: Path) -> None:
    message = refused(tmp_path, columns={"user": "woh", "item": "what"})
    assert "platform 'shop'" in message
    assert "orders.csv: no column 'woh'; it has 'who', 'what', 'when'. Did you mean 'who'?" in message


def test_time_column_that_holds_users_shows_none_of_them(tmp_path: Path) -> None:
    message = refused(tmp_path, columns={"user": "when", "item": "what", "time": "who"})
    assert "orders.csv: row 1, column 'who': a time must be iso" in message


def test_empty_platform(tmp_path: Path) -> None:
    assert "nothing to train or to test on: of " in refused(
        tmp_path, filters=[{"column": "who", "op": "eq", "value": "nobody"}]
    )
    message = refused(tmp_path, min_items_per_user=31)
    assert "0 are left, of 0 users" in message
    assert "short history" in message


def test_catalogue_without_text_or_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("sku,title\nsku1,\nsku2, \n")
    (tmp_path / "none.csv").write_text("sku,title\n")
    for name, count in (("empty", 2), ("none", 0)):
        catalog = {"sources": [{"files": [str(tmp_path / f"{name}.csv")]}], "id": "sku", "text": "{title}"}
        assert f"the catalogue has {count} items and none with text" in refused(tmp_path, catalog=catalog)


def test_catalogue_of_other_ids(tmp_path: Path) -> None:
    catalog = write_shop(tmp_path / "raw", [])["catalog"] | {"id": "title"}
    assert "no item text" in refused(tmp_path, catalog=catalog)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes("who,what,when\nperson-1,sku1,5\nperson-é,sku2,6\n".encode("latin-1"))
    message = refused(tmp_path, interactions=[{"files": [str(path)]}])
    assert "latin.csv: row 2, column 'who': an id is UTF-8 text" in message
    assert "on_bad_row: drop" in message


def test_malformed_rows_can_be_dropped_and_are_counted(tmp_path: Path) -> None:
    rows = random_rows(0)
    clean = prepare(config_of(tmp_path, {"shop": write_shop(tmp_path / "raw", rows)})).manifest.platform("shop")
    with open(tmp_path / "raw/orders.csv", "ab") as file:
        file.write(b"person-1,sku1\nperson-1,sku1,noon\nperson-1,\xff,5\nperson-1,sku1,5,6\n")
    shop = config_of(
        tmp_path,
        {
            "shop": write_shop(tmp_path / "other", [])
            | {"interactions": [{"files": [str(tmp_path / "raw/orders.csv")]}], "on_bad_row": "drop"}
        },
    )
    dirty = prepare(shop).manifest.platform("shop")
    assert dirty.rejected.pop("malformed row") == 4
    assert dirty.rejected == clean.rejected
    assert (dirty.rows_read, dirty.split_fingerprint) == (clean.rows_read + 4, clean.split_fingerprint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interactions": []}, r"platforms\.shop\.interactions: is empty"),
        ({"interactions": [{"files": []}]}, r"interactions\[0\]\.files: is empty"),
        ({"interactions": [{"files": ["x"], "reader": "csvv"}]}, "Did you mean 'csv'"),
        ({"interactions": [{"files": ["x"], "separator": "ab"}]}, "must be one ASCII character"),
        (
            {"interactions": [{"files": ["x"], "seperator": ","}]},
            r"platforms\.shop\.interactions\[0\]\.seperator.*Did you mean 'separator'",
        ),
        (
            {"columns": {"user": "u", "item": "i", "time_format": "unix"}},
            r"columns\.time_format: 'unix' must be one of",
        ),
        ({"catalog": {"id": "sku", "text": "title"}}, "names no field"),
        ({"catalog": {"id": "sku", "text": "{title"}}, "unmatched brace"),
        ({"catalog": {"id": "sku", "text": "{}"}}, "empty field name"),
        ({"min_items_per_user": 2}, "min_items_per_user at least 3"),
        ({"event_weights": {"buy": 1}}, r"columns\.event and event_weights"),
        ({"weight_by_value": True}, r"weight_by_value: needs columns\.value"),
        ({"split": {"test_share": 0.6, "valid_share": 0.5}}, "together below 1"),
        ({"split": {"protocol": "random"}}, "must be one of leave_last_out, by_time"),
    ],
)
def test_config_rules(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, {"shop": write_shop(tmp_path / "raw", []) | change})


def test_config_rules_of_the_whole(tmp_path: Path) -> None:
    shop = write_shop(tmp_path / "raw", [])
    for more, message in (
        ({"window": 10, "overlap": 10}, "overlap < window"),
        ({"privacy": {"scope": "world"}}, "must be one of company, platform"),
        ({"workers": -1}, "workers=-1: must be 0 .* or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_of(tmp_path, {"shop": shop}, **more)
    with pytest.raises(ConfigError, match=r"platforms\.\.\./x: a name is made of"):
        config_of(tmp_path, {"../x": shop})
    with pytest.raises(ConfigError, match="platforms: is empty"):
        config_of(tmp_path, {})


def test_the_configs_load_and_say_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_DATA", "/data")
    configs = {path.stem: load_config(PrepareConfig, path) for path in (ROOT / "configs/data").glob("*.yaml")}
    assert len(configs["seven"].platforms) == 7
    assert list(configs["demo"].platforms) == ["movielens", "grocery"]
    for name, config in configs.items():
        assert config.out == f"runs/data/{name}"
        for platform, block in config.platforms.items():
            assert block == configs[platform].platforms[platform]
    monkeypatch.delenv("DTRAIN_DATA")
    assert load_config(PrepareConfig, ROOT / "configs/data/demo.yaml") == configs["demo"]
    with pytest.raises(ConfigError, match="DTRAIN_DATA"):
        load_config(PrepareConfig, ROOT / "configs/data/seven.yaml")


def test_movielens_comes_out_as_published(tmp_path: Path) -> None:
    inputs = Path(os.environ.get("DTRAIN_INPUTS", ROOT / "runs/inputs"))
    if not (inputs / "recbole/dataset_example/ml-100k").is_dir():
        pytest.skip("the MovieLens files are not there; `make demo` fetches them, or set DTRAIN_INPUTS")
    os.environ.setdefault("DTRAIN_INPUTS", str(inputs))
    config = load_config(PrepareConfig, ROOT / "configs/data/movielens.yaml", [f"out={tmp_path / 'out'}"])
    entry = prepare(config).manifest.platform("movielens")
    assert (entry.users, entry.items, entry.train_rows) == (943, 1682, 98114)
    assert entry.split_fingerprint == "7aca07d9172f63b9"
    assert round(100 * entry.cold_share, 2) == 0.21


def test_the_example_in_the_documentation_is_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_DATA", "/shop")
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    (tmp_path / "example.yaml").write_text(text.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    config = load_config(PrepareConfig, tmp_path / "example.yaml")
    assert config.platforms["shop"].interactions[0].files == ["/shop/orders-*.csv.gz"]
    assert config.platforms["shop"].events == ("buy", "view", "other")
