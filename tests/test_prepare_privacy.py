"""User ids leave preparation as keyed hashes only."""

from __future__ import annotations

import logging
import tarfile
from pathlib import Path

import pytest

from dtrain.core.errors import ConfigError
from dtrain.data.evalset import EvalSet
from dtrain.data.prepare import prepare
from dtrain.data.pseudonym import KEY_VARIABLE
from tests.prepare_toys import (
    KEY,
    config_of,
    files_of,
    hashed,
    random_rows,
    write_shop,
)

pytestmark = pytest.mark.usefixtures("user_key")


def test_no_raw_user_id_leaves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    rows = random_rows(7)
    report = prepare(config_of(tmp_path, {"shop": write_shop(tmp_path / "raw", rows)}), progress=True)
    print(report.table(), report.summary())
    captured = capfd.readouterr()
    written = b"".join(files_of(tmp_path / "out").values())
    for path in (tmp_path / "out").rglob("*.tar"):
        with tarfile.open(path) as tar:
            written += b"".join(tar.extractfile(member).read() for member in tar.getmembers())  # type: ignore[union-attr]
    shown = (captured.out + captured.err + caplog.text).encode()
    assert b"shop" in shown
    for user in {row[0] for row in rows}:
        assert user.encode() not in written
        assert user.encode() not in shown
    assert b"person" not in written
    assert KEY.encode() not in written
    assert bytes.fromhex(KEY) not in written
    assert not (tmp_path / "out" / ".work").exists()


def test_one_key_a_company_or_one_a_platform(tmp_path: Path) -> None:
    shops = {name: write_shop(tmp_path / name, random_rows(8)) for name in ("east", "west")}

    def users(**privacy: str) -> list[list[str]]:
        manifest = prepare(config_of(tmp_path, shops, privacy=privacy)).manifest
        return [EvalSet.open(manifest, name, "test").users.to_pylist() for name in ("east", "west")]

    east, west = users(scope="company")
    assert east == west
    assert all(len(user) == 32 and int(user, 16) >= 0 for user in east)
    apart_east, apart_west = users(scope="platform")
    assert len({*east, *apart_east, *apart_west}) == 3 * len(east)


def test_another_key_is_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, {"shop": write_shop(tmp_path / "raw", random_rows(8))})
    first = prepare(config)
    monkeypatch.setenv(KEY_VARIABLE, "77" * 32)
    second = prepare(config)
    assert second.changed
    assert second.manifest.platform("shop").split_fingerprint == first.manifest.platform("shop").split_fingerprint
    users = EvalSet.open(second.manifest, "shop", "test").users.to_pylist()
    assert hashed("person-1") not in users


def test_the_key_file_is_made_once_and_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE)
    path = tmp_path / "secrets" / "user.key"
    config = config_of(
        tmp_path, {"shop": write_shop(tmp_path / "raw", random_rows(8))}, privacy={"key_file": str(path)}
    )
    assert prepare(config).changed
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in path.parent.iterdir()] == ["user.key"]
    assert len(bytes.fromhex(path.read_text())) == 32
    assert not prepare(config).changed
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"user\.key: mode 0640 lets others use the user key; run: chmod 600"):
        prepare(config)


@pytest.mark.parametrize(("key", "message"), [("xyz", "no hexadecimal key"), ("", "0 bytes"), ("ab", "1 bytes")])
def test_keys_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, message: str) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ConfigError, match=f"DTRAIN_USER_KEY: .*{message}"):
        prepare(config_of(tmp_path, {"shop": write_shop(tmp_path / "raw", random_rows(8))}))
