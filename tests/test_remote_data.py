"""Prepared data in object storage, read through the cache of a node, by real processes from a server that speaks S3."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.retries.standard
import numpy as np
import pytest
from transformers import AutoTokenizer

from dtrain.batches.tokens import TokenCache
from dtrain.cli.main import main
from dtrain.core.blobs import Blobs, open_blobs
from dtrain.core.comm import Comm
from dtrain.core.config import load_config
from dtrain.core.errors import ConfigError, CorruptFile, DataError
from dtrain.core.failpoints import VARIABLE
from dtrain.data import files
from dtrain.data.cache import CacheConfig, FileCache
from dtrain.data.catalog import Catalog
from dtrain.data.files import CachedFiles
from dtrain.data.manifest import Manifest
from dtrain.data.platforms import PrepareConfig
from dtrain.data.shards import ShardReader
from dtrain.train.config import RunConfig
from dtrain.train.job import run_job
from tests.prepare_toys import samples_of
from tests.ranks import SERVER, run_ranks
from tests.s3_server import Fault, S3Server, s3_server
from tests.stream_toys import prepared
from tests.train_toys import losses, run_config

CHUNK = 1500
WAIT_S = 120


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server("prepared") as server:
        yield server


@dataclass(frozen=True)
class Remote:
    """A prepared folder and its copy in object storage."""

    local: Manifest
    server: S3Server
    url: str
    cache: Path

    def load(self, **cache: Any) -> Manifest:
        return Manifest.load(self.url, CacheConfig(path=str(self.cache), **cache))

    def shards(self) -> list[str]:
        """Copies in the cache, without those of the tables of shards, which come with the manifest."""
        tables = {f"sha256-{platform.shards.sha256}" for platform in self.local.platforms.values()}
        return [path.name for path in self.cache.glob("*sha256-*") if path.name not in tables]

    def key(self, path: str) -> str:
        return f"{self.url.removeprefix(f'{self.server.url}/')}/{path}"

    def change(self, path: str, content: bytes) -> None:
        self.server.client.put_object(Bucket=self.server.bucket, Key=self.key(path), Body=content)

    def gets(self, path: str) -> int:
        """Requests for a file's content so far."""
        return sum(method == "GET" and place.endswith(self.key(path)) for method, place, _ in self.server.requests)


def upload(server: S3Server, folder: Path, prefix: str) -> str:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            key = f"{prefix}/{path.relative_to(folder).as_posix()}"
            server.client.put_object(Bucket=server.bucket, Key=key, Body=path.read_bytes())
    return f"{server.url}/{prefix}"


@pytest.fixture
def remote(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(botocore.retries.standard.ExponentialBackoff, "delay_amount", lambda *_: 0)
    monkeypatch.setattr(files, "CHUNK", CHUNK)
    local = prepared(tmp_path / "data")
    (tmp_path / "data/unused").touch()  # the toys' valid and test set
    url = upload(server, tmp_path / "data", f"shops/{tmp_path.name}")
    server.requests.clear()
    yield Remote(local, server, url, tmp_path / "cache")
    server.faults.clear()


def _read_all(env: dict[str, str], url: str, cache: str, together: Any, results: Any) -> None:
    os.environ.update(env)
    files.CHUNK = CHUNK
    manifest = Manifest.load(url, CacheConfig(path=cache))
    together.wait(WAIT_S)
    results.put([samples_of(manifest, name) for name in manifest.platforms])


def test_the_ranks_of_a_node_fetch_each_file_once(remote: Remote) -> None:
    together, results = SERVER.Barrier(3), SERVER.Queue()
    args = (remote.server.env, remote.url, str(remote.cache), together, results)
    ranks = [SERVER.Process(target=_read_all, args=args, daemon=True) for _ in range(3)]
    for rank in ranks:
        rank.start()
    wanted = [samples_of(remote.local, name) for name in remote.local.platforms]
    for _ in ranks:
        assert results.get(timeout=WAIT_S) == wanted
    for rank in ranks:
        rank.join(WAIT_S)
    for platform in remote.local.platforms.values():
        for shard in platform.train:
            assert shard.bytes > 2 * CHUNK
            assert remote.gets(shard.path) == -(-shard.bytes // CHUNK)


def test_a_fetch_that_was_killed_midway_is_made_anew(remote: Remote, tmp_path: Path) -> None:
    points = tmp_path / "failpoints.json"
    points.write_text(json.dumps([{"rank": 0, "step": 0, "phase": "fetching", "do": "kill"}]), encoding="utf-8")
    env = {**remote.server.env, VARIABLE: str(points), "RANK": "0"}
    remote.load()  # so that a shard is the first to be fetched
    results = SERVER.Queue()
    args = (env, remote.url, str(remote.cache), SERVER.Barrier(1), results)
    rank = SERVER.Process(target=_read_all, args=args, daemon=True)
    rank.start()
    rank.join(WAIT_S)
    assert rank.exitcode == -signal.SIGKILL
    assert Path(f"{points}.fired.0").exists()
    shard = remote.local.platform("left").train[0]
    assert 0 < remote.gets(shard.path) < -(-shard.bytes // CHUNK)
    assert [path.name[:8] for path in remote.cache.glob(".*.part")] == [".sha256-"]
    assert samples_of(remote.load(), "left") == samples_of(remote.local, "left")
    assert list(remote.cache.glob(".*.part")) == []


def test_a_disk_that_fills_up_midway_leaves_nothing(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = tmp_path / "failpoints.json"
    points.write_text(json.dumps([{"rank": 0, "step": 0, "phase": "fetching", "do": "enospc"}]), encoding="utf-8")
    remote.load()  # so that a shard is the first to be fetched
    monkeypatch.setenv(VARIABLE, str(points))
    monkeypatch.setenv("RANK", "0")
    shard = remote.local.platform("left").train[0]
    with pytest.raises(DataError, match=rf"{remote.cache} can't be written \(no space left for s3://.*{shard.path}"):
        samples_of(remote.load(), "left")
    assert remote.shards() == []
    assert samples_of(remote.load(), "left") == samples_of(remote.local, "left")


def test_a_byte_changed_on_the_server_is_named_and_never_kept(remote: Remote) -> None:
    manifest = remote.load()
    for entry, opened in (
        (remote.local.platform("left").train[1], lambda: ShardReader(manifest, "left").read(1, [0])),
        (remote.local.platform("left").catalog, lambda: Catalog.open(manifest, "left")),
    ):
        whole = (Path(remote.local.root) / entry.path).read_bytes()
        remote.change(entry.path, whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CorruptFile, match=rf"{remote.url}/{entry.path}: its SHA-256 is not the manifest's"):
            opened()
        with pytest.raises(CorruptFile, match=rf"{remote.url}/{entry.path}: its SHA-256 is not the manifest's"):
            manifest.files.check([entry], digests=True)
        assert remote.shards() == []
        remote.change(entry.path, whole[:-1])
        with pytest.raises(CorruptFile, match=rf"{entry.path} is shorter"):
            opened()
        remote.change(entry.path, whole)
        opened()
        shutil.rmtree(remote.cache)


def test_a_copy_that_was_damaged_is_fetched_again_once(remote: Remote, caplog: pytest.LogCaptureFixture) -> None:
    manifest, local = remote.load(), remote.local.platform("left")
    copies = {entry.path: remote.cache / f"sha256-{entry.sha256}" for entry in (local.train[0], local.catalog)}
    reader = ShardReader(manifest, "left")
    wanted = reader.read(0, [3, 5])
    Catalog.open(manifest, "left")
    for path, copy in copies.items():
        before, content = remote.gets(path), copy.read_bytes()
        for damaged in (content[:100], b"", content[: local.train[0].blocks[0].offset] + bytes(len(content))):
            copy.chmod(0o600)
            copy.write_bytes(damaged[: len(content)])
            assert reader.read(0, [3, 5]).equals(wanted)
            assert Catalog.open(manifest, "left").items.equals(Catalog.open(remote.local, "left").items)
            assert copy.read_bytes() == content
        assert remote.gets(path) - before == 3 * -(-len(content) // CHUNK)
    entry = local.train[0]
    copies[entry.path].write_bytes(b"x" * entry.bytes)
    remote.change(entry.path, b"y" * entry.bytes)
    with pytest.raises(CorruptFile, match=rf"{remote.url}/{entry.path}: its SHA-256 is not the manifest's"):
        reader.read(0, [3])


def test_training_shards_that_no_longer_fit_come_again(remote: Remote) -> None:
    largest = max(shard.bytes for platform in remote.local.platforms.values() for shard in platform.train)
    manifest = remote.load(gb=2 * largest / 1e9)
    for _ in range(2):
        for name in manifest.platforms:
            assert samples_of(manifest, name) == samples_of(remote.local, name)
            assert sum(path.stat().st_size for path in remote.cache.glob("sha256-*")) <= 2 * largest


def test_a_folder_is_read_in_place_unless_copies_are_asked_for(remote: Remote) -> None:
    root = remote.local.root
    cache = CacheConfig(path=str(remote.cache))
    assert samples_of(Manifest.load(root, cache), "left") == samples_of(remote.local, "left")
    assert not remote.cache.exists()
    shared = Manifest.load(root, CacheConfig(path=str(remote.cache), shared=True))
    assert shared == remote.local
    shutil.move(f"{root}/left/0.tar", f"{root}/left/moved")
    with pytest.raises(CorruptFile, match=rf"{root}/left/0.tar: in the manifest, not there"):
        samples_of(shared, "left")
    shutil.move(f"{root}/left/moved", f"{root}/left/0.tar")
    wanted = samples_of(remote.local, "left")
    assert samples_of(shared, "left") == wanted
    shutil.rmtree(f"{root}/left")
    assert samples_of(shared, "left") == wanted
    assert shared.files.origin == str(Path(root).resolve())


def test_what_is_missing_is_named_before_it_is_needed(remote: Remote) -> None:
    remote.load().verify(digests=False)
    entry = remote.local.platform("right").train[1]
    remote.server.client.delete_object(Bucket=remote.server.bucket, Key=remote.key(entry.path))
    with pytest.raises(CorruptFile, match=rf"{remote.url}/{entry.path}: in the manifest, not there; copy the prepared"):
        remote.load().verify(digests=False)
    with pytest.raises(CorruptFile, match=rf"{remote.url}/{entry.path}: in the manifest, not there"):
        ShardReader(remote.load(), "right").gather(np.array([1]), np.array([0]))
    with pytest.raises(DataError, match=rf"{remote.url}/left/manifest.json: no manifest, so this is no .* prepared"):
        Manifest.load(f"{remote.url}/left")
    with pytest.raises(ConfigError, match=r"gs:// is no storage that dtrain works with"):
        Manifest.load("gs://bucket/shops")


def test_a_server_that_fails_is_an_error_of_data(remote: Remote) -> None:
    manifest = remote.load()
    remote.server.faults.append(Fault(lambda method, path, query: path.endswith(".tar")))
    with pytest.raises(DataError, match=r"get_object .*left/0.tar failed .* the server failed 5 times"):
        ShardReader(manifest, "left").read(0, [0])
    remote.server.faults.append(Fault(lambda *_: True))
    for look in (lambda: Manifest.load(remote.url), lambda: manifest.verify(digests=False)):
        with pytest.raises(DataError, match="the server failed 5 times"):
            look()


def test_token_ids_of_remote_items_lie_in_the_cache(remote: Remote, tiny_encoder: Path) -> None:
    tokenizer, before = AutoTokenizer.from_pretrained(tiny_encoder), remote.server.objects()
    ours = TokenCache.open(remote.load(gb=1e-3), "left", tokenizer, 8)
    theirs = TokenCache.open(remote.local, "left", tokenizer, 8)
    assert ours.path.parent == remote.cache
    assert ours.path.name == theirs.path.stem
    assert ours.path.stat().st_size == theirs.path.stat().st_size
    assert (ours.values_T == theirs.values_T).all()
    assert (ours.offset_N == theirs.offset_N).all()
    made = ours.path.stat()
    again = TokenCache.open(remote.load(gb=1e-3), "left", tokenizer, 8)
    assert again.path.stat().st_ino == made.st_ino
    assert remote.server.objects() == before
    with pytest.raises(ConfigError, match=r"data\.cache\.gb=5e-06: tokens-.* has 9,960 bytes"):
        TokenCache.open(remote.load(gb=5e-6), "left", tokenizer, 9)


class Together:
    """Blobs of which so many must be read at the same time."""

    def __init__(self, inner: Blobs, count: int) -> None:
        self.inner, self.barrier, self.reads_at_once, self.url = inner, threading.Barrier(count), count, inner.url

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        self.barrier.wait(WAIT_S)
        self.inner.read_into(path, offset, buffer)


def test_the_shards_of_a_window_are_fetched_side_by_side(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK", 1 << 20)
    together: Any = Together(open_blobs(remote.url), 4)
    cached = CachedFiles(together, FileCache(CacheConfig(path=str(tmp_path / "cache"))))
    manifest = Manifest(
        schema_version=remote.local.schema_version, platforms=remote.local.platforms, root=remote.url, cached=cached
    )
    found = ShardReader(manifest, "left").gather(np.arange(4), np.zeros(4, np.int64))
    assert found.user_B.tolist() == [f"left-{shard}-0" for shard in range(4)]


def _trained(comm: Comm, config: Path, env: dict[str, str], overrides: list[str]) -> str:
    os.environ.update(env)
    return run_job(load_config(RunConfig, config, overrides), comm.world)


def _called(_: Comm, env: dict[str, str], run: str, commands: list[list[str]]) -> tuple[list[int], list[str | None]]:
    """Exit codes of these commands on a run, and metrics.json after each."""
    os.environ.update(env)
    codes, metrics = [], []
    for command, *more in commands:
        codes.append(main([command, run, *more]))
        found = Path(run, "metrics.json")
        metrics.append(found.read_text(encoding="utf-8") if found.is_file() else None)
        found.unlink(missing_ok=True)
    return codes, metrics


def test_training_from_object_storage_is_training_from_the_folder(
    remote: Remote, shops: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    """With a cache too small for all of it; then audited, evaluated and exported."""
    env, url = remote.server.env, upload(remote.server, shops, f"trained/{tmp_path.name}")
    sizes = [entry.bytes for platform in Manifest.load(shops).platforms.values() for entry in platform.files()]
    limit = sum(sizes) * 2 // 3
    assert max(sizes) < limit
    train = {"steps": 6, "valid_every": 3, "checkpoint_every": 0}
    here, there = (run_config(tmp_path / name, shops, tiny_encoder, train=train) for name in ("here", "there"))
    remote.server.requests.clear()
    assert run_ranks(2, tmp_path, _trained, here, env, []) == ["completed"] * 2
    assert remote.server.requests == []
    keys = [f"data.path={url}", f"data.cache.path={tmp_path / 'cache'}", f"data.cache.gb={limit / 1e9:.9f}"]
    assert run_ranks(2, tmp_path, _trained, there, env, keys) == ["completed"] * 2
    assert len(losses(tmp_path / "there/run")) == 6
    assert losses(tmp_path / "there/run") == losses(tmp_path / "here/run")
    assert {method for method, _, _ in remote.server.requests} == {"GET"}
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*-*")) <= limit

    run = tmp_path / "there/run"
    commands = (["audit"], ["evaluate"], ["export", "--out", str(tmp_path / "out")], ["evaluate", f"data.path={shops}"])
    codes, metrics = run_ranks(1, tmp_path, _called, env, str(run), commands)[0]
    assert codes == [0] * 4
    assert metrics[1] == metrics[3] is not None


def test_data_is_prepared_into_folders_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out=s3://\.\.\.: data is prepared into a folder; .* `aws s3 cp"):
        PrepareConfig(out="s3://key:secret@bucket/x", platforms={"a": None})  # type: ignore[dict-item]
