"""What leaves preparation: shards, catalogues, evaluation sets; the same bytes always, or none after a fault."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset

from dtrain.core.errors import CorruptFile, DataError
from dtrain.data import build, spill
from dtrain.data.catalog import Catalog
from dtrain.data.evalset import EvalSet
from dtrain.data.manifest import Manifest
from dtrain.data.output import open_output
from dtrain.data.platforms import PrepareConfig
from dtrain.data.prepare import prepare
from dtrain.data.shards import ShardReader
from tests.prepare_toys import (
    config_of,
    files_of,
    random_rows,
    samples_of,
    write_shop,
)

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("user_key")


def test_shards_are_what_the_webdataset_library_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.data.shards.BLOCK_SAMPLES", 5)
    monkeypatch.setattr("dtrain.data.samples.SHARD_SAMPLES", 12)
    monkeypatch.setattr("dtrain.data.build.SHARD_SAMPLES", 12)
    manifest = prepare(
        config_of(tmp_path, {"shop": write_shop(tmp_path / "raw", random_rows(4))}, window=10, overlap=2)
    ).manifest
    shop = manifest.platform("shop")
    assert len(shop.train) > 2
    urls = [str(manifest.root / shard.path) for shard in shop.train]
    members = list(webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None))
    assert len(members) == sum(len(shard.blocks) for shard in shop.train)
    assert len({member["__key__"] for member in members}) == len(members)
    rows = [row for member in members for row in pa.ipc.open_file(member["arrow"]).read_all().to_pylist()]
    assert rows == samples_of(manifest, "shop")
    assert len(rows) == shop.train_samples


def test_samples_are_read_at_random_and_damage_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.data.shards.BLOCK_SAMPLES", 4)
    manifest = prepare(
        config_of(tmp_path, {"shop": write_shop(tmp_path / "raw", random_rows(5))}, window=12, overlap=2)
    ).manifest
    every = samples_of(manifest, "shop")
    wanted = [9, 0, 9, len(every) - 1, 5, 4]
    assert ShardReader(manifest, "shop", cached_blocks=1).read(0, wanted).to_pylist() == [every[i] for i in wanted]
    assert ShardReader(manifest, "shop").read(0, []).num_rows == 0
    for shard, row in ((0, len(every)), (0, -1), (1, 0)):
        with pytest.raises(DataError, match=r"no (row|shard)"):
            ShardReader(manifest, "shop").read(shard, [row])
        with pytest.raises(DataError, match=r"no (row|shard)"):
            ShardReader(manifest, "shop").gather(np.array([0, shard]), np.array([0, row]))

    entry = manifest.platform("shop").train[0]
    path = manifest.root / entry.path
    whole = path.read_bytes()
    block = entry.blocks[1]
    for place in (block.offset, block.offset + block.bytes - 20, block.offset + block.bytes // 2):
        path.write_bytes(whole[:place] + b"\xff" * 16 + whole[place + 16 :])
        reader = ShardReader(manifest, "shop")
        assert reader.read(0, [0]).num_rows == 1
        with pytest.raises(CorruptFile, match=rf"train-00000\.tar.*block 1 at byte {block.offset}.*prepare again"):
            reader.read(0, [block.rows])
        assert reader.gather(np.array([0]), np.array([0])).user_B.tolist() == [every[0]["user"]]
        with pytest.raises(CorruptFile, match=rf"train-00000\.tar.*block 1 at byte {block.offset}.*prepare again"):
            reader.gather(np.array([0, 0]), np.array([0, block.rows]))
        assert reader.gather(np.array([0]), np.array([0])).user_B.tolist() == [every[0]["user"]]
        with pytest.raises(CorruptFile, match="SHA-256"):
            manifest.verify()
    path.write_bytes(whole[:-600])
    with pytest.raises(CorruptFile, match=rf"the shard has {len(whole) - 600} bytes, {len(whole)} in the manifest"):
        ShardReader(manifest, "shop").read(0, [0])
    path.unlink()
    with pytest.raises(CorruptFile, match="not on disk"):
        ShardReader(manifest, "shop").read(0, [0])


def test_damaged_catalogue_and_evaluation_set(tmp_path: Path) -> None:
    manifest = prepare(config_of(tmp_path, {"shop": write_shop(tmp_path / "raw", random_rows(5))})).manifest
    shop = manifest.platform("shop")
    for entry, opened in (
        (shop.catalog, lambda: Catalog.open(manifest, "shop")),
        (shop.test, lambda: EvalSet.open(manifest, "shop", "test")),
    ):
        path = manifest.root / entry.path
        whole = path.read_bytes()
        path.write_bytes(whole[:100])
        with pytest.raises(CorruptFile, match="100 bytes on disk"):
            opened()
        path.write_bytes(b"\0" * len(whole))
        with pytest.raises(CorruptFile, match="not readable as an Arrow file"):
            opened()
        path.unlink()
        with pytest.raises(CorruptFile, match="not on disk"):
            opened()
    with pytest.raises(DataError, match=r"'shp' is not in .* Did you mean 'shop'"):
        Catalog.open(manifest, "shp")
    with pytest.raises(DataError, match="must be 'valid' or 'test'"):
        EvalSet.open(manifest, "shop", "train")


def test_the_same_users_in_the_same_order_whatever_the_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = write_shop(tmp_path / "raw", random_rows(6))
    one = prepare(config_of(tmp_path, {"shop": shop}, out=str(tmp_path / "one"))).manifest
    size = (tmp_path / "raw/orders.csv").stat().st_size
    monkeypatch.setattr(spill, "_BUCKET_BYTES", size // 4)
    monkeypatch.setattr(spill, "_FLUSH_BYTES", 1000)
    here = prepare(config_of(tmp_path, {"shop": shop}, out=str(tmp_path / "here"), workers=1)).manifest
    there = prepare(config_of(tmp_path, {"shop": shop}, out=str(tmp_path / "there"), workers=3)).manifest
    assert len(here.platform("shop").train) > 2 > len(one.platform("shop").train)
    assert here.fingerprint == there.fingerprint
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")
    assert samples_of(here, "shop") == samples_of(one, "shop")
    for part in ("valid", "test"):
        tables = [
            pa.ipc.open_file(str(m.root / getattr(m.platform("shop"), part).path)).read_all() for m in (one, here)
        ]
        assert tables[0].equals(tables[1])
    assert here.platform("shop").catalog == one.platform("shop").catalog
    assert here.platform("shop").split_fingerprint == one.platform("shop").split_fingerprint


def test_a_second_run_changes_nothing_and_says_so(tmp_path: Path) -> None:
    shops = {name: write_shop(tmp_path / name, random_rows(n)) for n, name in enumerate(("east", "west"))}
    first = prepare(config_of(tmp_path, shops))
    out = tmp_path / "out"
    stamps = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    second = prepare(config_of(tmp_path, shops))
    assert (first.changed, first.built) == (True, ("east", "west"))
    assert (second.changed, second.built) == (False, ())
    assert "unchanged" in second.summary()
    assert "unchanged" not in first.summary()
    assert stamps == {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in stamps}
    for name in ("east", "west"):
        assert first.manifest.platform(name).split_fingerprint in second.table()

    moved = {**shops, "west": write_shop(tmp_path / "elsewhere", random_rows(1))}
    assert not prepare(config_of(tmp_path, moved)).changed

    old = first.manifest.platform("west").build
    shops["west"] = write_shop(tmp_path / "west", random_rows(9))
    third = prepare(config_of(tmp_path, shops))
    assert third.built == ("west",)
    assert third.manifest.platform("east") == first.manifest.platform("east")
    assert [p.name for p in (out / "west").iterdir()] == [third.manifest.platform("west").build] != [old]
    assert Manifest.load(out) == third.manifest

    fourth = prepare(config_of(tmp_path, {"west": shops["west"]}))
    assert (fourth.changed, fourth.built) == (True, ())
    assert sorted(p.name for p in out.iterdir()) == [".lock", "manifest.json", "west"]


def test_a_damaged_build_is_made_again(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"shop": write_shop(tmp_path / "raw", random_rows(0))})
    first = prepare(config)
    before = files_of(tmp_path / "out")
    path = tmp_path / "out" / first.manifest.platform("shop").valid.path
    path.write_bytes(path.read_bytes()[:-1])
    assert prepare(config).built == ("shop",)
    assert files_of(tmp_path / "out") == before


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Path, dict[str, bytes], PrepareConfig]:
    """A prepared folder with its bytes, and the config of a new version of its only platform."""
    prepare(config_of(tmp_path, {"shop": write_shop(tmp_path / "raw", random_rows(10))}))
    before = files_of(tmp_path / "out")
    return tmp_path / "out", before, config_of(tmp_path, {"shop": write_shop(tmp_path / "raw", random_rows(11))})


def test_disk_full_leaves_the_previous_output(prepared: tuple[Path, dict[str, bytes], PrepareConfig]) -> None:
    out, before, config = prepared
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (1000, 20_000):  # bytes that a file may have: stops among work files, then among the results
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            with pytest.raises(DataError, match=r"out: no space left while preparing.*prepared before is untouched"):
                prepare(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert files_of(out) == before
    assert prepare(config).built == ("shop",)


@pytest.mark.parametrize("phase", ["build_items", "tidy_bucket", "survey_bucket", "write_bucket", "_arrow_file"])
def test_ctrl_c_leaves_the_previous_output(
    prepared: tuple[Path, dict[str, bytes], PrepareConfig], monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    out, before, config = prepared
    fired = []

    def interrupt(*args: Any, **more: Any) -> None:
        fired.append(phase)
        raise KeyboardInterrupt

    monkeypatch.setattr(build, phase, interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    assert fired == [phase]
    assert files_of(out) == before


_KILLED = """
import os, signal, sys
from dtrain.core.config import load_config
from dtrain.data import build, output, prepare as module, platforms

def die(*args, **more):
    os.kill(os.getpid(), signal.SIGKILL)

owner, name = {"write": (build, "write_bucket"), "finish": (output.OutputFolder, "finish"),
               "commit": (output.OutputFolder, "commit"), "save": (output.Manifest, "save"),
               "clear": (output.shutil, "rmtree")}[sys.argv[2]]
config = load_config(platforms.PrepareConfig, sys.argv[1])
if name == "rmtree":
    output.Manifest.save = lambda self, save=output.Manifest.save: (save(self), setattr(output.shutil, name, die))
else:
    setattr(owner, name, die)
module.prepare(config)
"""


@pytest.mark.parametrize("phase", ["write", "finish", "commit", "save", "clear"])
def test_a_kill_leaves_one_whole_output(prepared: tuple[Path, dict[str, bytes], PrepareConfig], phase: str) -> None:
    out, before, config = prepared
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(out.parent / "prepare.yaml"), phase],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = Manifest.load(out)
    left.verify()
    assert (before["manifest.json"] == (out / "manifest.json").read_bytes()) == (phase != "clear")
    again = prepare(config)
    assert again.built == (() if phase in ("commit", "save", "clear") else ("shop",))
    assert again.changed == (phase != "clear")
    fresh = prepare(
        config_of(out.parent, {"shop": write_shop(out.parent / "raw", random_rows(11))}, out=str(out.parent / "new"))
    )
    assert fresh.manifest.to_json() == again.manifest.to_json()
    assert files_of(out) == files_of(out.parent / "new")


def test_two_preparations_do_not_mix(prepared: tuple[Path, dict[str, bytes], PrepareConfig]) -> None:
    out, before, config = prepared
    with open_output(out) as other:
        (other.work / "half").write_text("of the other preparation")
        with pytest.raises(DataError, match="another preparation is writing there"):
            prepare(config)
        assert (other.work / "half").exists()
    assert files_of(out) == before
    assert prepare(config).changed


def test_out_that_can_not_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shop = write_shop(tmp_path / "raw", random_rows(0))
    with pytest.raises(DataError, match="can't be written"):
        prepare(config_of(tmp_path, {"shop": shop}, out=str(tmp_path / "file" / "out")))


def test_a_table_of_shards_that_is_another_one_is_refused(tmp_path: Path) -> None:
    manifest = prepare(config_of(tmp_path, {"shop": write_shop(tmp_path / "raw", random_rows(5))})).manifest
    path = manifest.root / manifest.platform("shop").shards.path
    assert Manifest.load(manifest.root) == manifest
    whole = path.read_bytes()
    for damaged in (whole[:-1], b"", whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFile, match=r"train\.arrow: its size or SHA-256 is not the .*prepare again"):
            Manifest.load(manifest.root)
    path.unlink()
    with pytest.raises(CorruptFile, match=r"train\.arrow: in the manifest, not on disk"):
        Manifest.load(manifest.root)
    again = prepare(config_of(tmp_path, {"shop": write_shop(tmp_path / "raw", random_rows(5))})).manifest
    assert again == manifest
    assert path.read_bytes() == whole
