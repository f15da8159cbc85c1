"""Addresses of blobs: which are understood, and which are refused without showing a secret."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dtrain.core.blobs import open_blobs
from dtrain.core.errors import ConfigError
from tests.blob_toys import put


@pytest.mark.parametrize("url", ["gs://bucket/run", "memory://run", "simplecache::s3://bucket", "s3:/bucket/run"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix") as raised:
        open_blobs(url)
    assert "hidden" not in str(raised.value)


def test_a_url_that_went_through_a_path_makes_no_folder() -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix"):
        open_blobs(Path("s3://bucket/run"))


@pytest.mark.parametrize("url", ["s3://", "s3:///run", "s3://bucket/run?X-Amz-Signature=hidden", "s3://bucket/run#1"])
def test_broken_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix"):
        open_blobs(url)


@pytest.mark.parametrize("secret", ["hidden", "hid/hidden"])
def test_credentials_in_urls_are_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY") as raised:
        open_blobs(f"s3://key:{secret}@bucket/run")
    assert "hidden" not in str(raised.value)


def test_urls_of_folders(tmp_path: Path) -> None:
    put(open_blobs(f"file://{tmp_path}/run"), "file", b"1")
    assert open_blobs(str(tmp_path / "run")).read("file") == b"1"
    assert open_blobs(tmp_path / "run").url == str(tmp_path / "run")


def test_without_its_package_s3_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for module in ("dtrain.core.object_blobs", "dtrain.core.s3_calls"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ConfigError, match=r"s3fs.*pip install 'dtrain\[s3\]'"):
        open_blobs("s3://bucket/run")
