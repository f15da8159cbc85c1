"""`dtrain checkpoint ls`, `show` and `verify`, over stores made here."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from dtrain.checkpoint.ballot import Ballot
from dtrain.checkpoint.store import CheckpointStore
from dtrain.checkpoint.tensorfile import write_tensors
from dtrain.core.blobs import open_blobs
from dtrain.core.world import World
from tests.conftest import Cli
from tests.s3_server import s3_server
from tests.store_toys import ALL, as_run, fill, forge, fragments, save, snapshot, store_in, tensors_of
from tests.train_toys import ROOT, environment

pytestmark = pytest.mark.usefixtures("filled")  # so `root` is a store with checkpoints


def forge_file(root: Path, number: int, path: Path) -> None:
    """Make the record of a checkpoint say that the content of one of its files is what was committed."""

    def change(raw: dict[str, Any]) -> None:
        for file in raw["files"]:
            if file["path"] == path.relative_to(root).as_posix():
                file |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    forge(root, number, change)


def test_ls_has_a_line_for_each_checkpoint(root: Path, cli: Cli) -> None:
    code, out = cli("ls", root)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["number", "step", "kind", "ranks", "when", "size", "files", "tags", "state"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["1", "10", "full"],
        ["2", "20", "full"],
        ["3", "25", "weights"],
        ["4", "30", "full"],
    ]
    assert [line.split()[-1] for line in lines[1:]] == ["unknown"] * 4
    assert "best=0.5" in lines[2]
    assert [line.split()[-1] for line in cli("ls", root, "--verify")[1].splitlines()[1:]] == ["whole"] * 4


def test_ls_for_scripts_and_damaged_records(root: Path, cli: Cli) -> None:
    tensors_of(root, 10).unlink()
    (root / "commits/000002.json").write_text("{", encoding="utf-8")
    code, out = cli("ls", root, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["store"] == str(root)
    assert [row["state"] for row in found["checkpoints"]] == ["damaged", "unknown", "unknown"]
    first = found["checkpoints"][0]
    assert first["problems"] == [f"{tensors_of_gone(root)} is missing"]
    assert (first["number"], first["step"], first["world_size"], first["files"], first["tags"]) == (1, 10, 1, 3, {})
    assert ["000002.json" in problem for problem in found["unreadable"]] == [True]
    assert "000002.json" in cli("ls", root)[1]


def tensors_of_gone(root: Path) -> Path:
    return root / "step-00000010-000001/rank-00000-of-00001.safetensors"


def test_a_run_folder_leads_to_its_store(root: Path, tmp_path: Path, cli: Cli) -> None:
    run = as_run(tmp_path / "run", root)
    assert cli("ls", run) == cli("ls", root)
    inside = as_run(tmp_path / "inside", Path())
    (inside / "config.yaml").write_text("run: x", encoding="utf-8")
    root.rename(inside / "checkpoints")
    assert cli("verify", inside)[0] == 0


def test_show_says_what_the_record_and_the_headers_say(root: Path, cli: Cli) -> None:
    code, out = cli("show", root)
    assert code == 0
    for words in ("checkpoint 4 of", "30", "manifest=ab12", "ledger/000004.json", "master", "rng", "F32", "U8"):
        assert words in out
    found = json.loads(cli("show", root, "best", "--json")[1])
    assert found["record"]["step"] == 20
    assert found["record"]["state"] == {"step": 20}
    assert found["tensors"] == [
        {"kind": "master", "dtype": "F32", "tensors": 1, "fragments": 1, "elements": 35, "bytes": 140},
        {"kind": "rng", "dtype": "U8", "tensors": 1, "fragments": 1, "elements": 2, "bytes": 2},
    ]
    assert json.loads(cli("show", root, 25, "--json")[1])["record"]["kind"] == "weights"
    tensors_of(root, 30).write_bytes(b"")
    code, out = cli("show", root)
    assert code == 0
    assert "DAMAGED" in out


def test_verify_of_whole_checkpoints(root: Path, cli: Cli) -> None:
    code, out = cli("verify", root)
    assert code == 0
    assert out.count(": whole") == 5  # the ledger too
    assert "ledger, 3 links" in out
    assert "4 of 4 checkpoints whole" in out
    for which, step in (("latest", 30), ("best", 20), ("25", 25)):
        code, out = cli("verify", root, which)
        assert code == 0
        assert f"step {step}," in out
        assert "1 of 1" in out


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing"])
@pytest.mark.parametrize("kind", ["tensors", "segment", "link"])
def test_verify_names_every_damage(root: Path, cli: Cli, kind: str, damage: str) -> None:
    path = {
        "tensors": tensors_of(root, 20),
        "segment": root / "ledger/000002/rank-00000.arrow",
        "link": root / "ledger/000002.json",
    }[kind]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-1])
    code, out = cli("verify", root)
    assert code == 4
    assert out.count(str(path)) == 1
    assert "3 of 4 checkpoints whole" in out
    assert cli("verify", root, 20)[0] == 4
    assert cli("verify", root, 10)[0] == 0
    code, out = cli("verify", root, "latest")  # its own files are whole, and the ledger before it is not
    assert code == (0 if kind == "tensors" else 4)
    assert ("ledger, 1 links: DAMAGED" in out or "ledger, 3 links: DAMAGED" in out) == (kind != "tensors")


def test_verify_checks_the_ledger_of_checkpoints_that_are_gone(root: Path, cli: Cli) -> None:
    assert cli("prune", root, "--keep-last", 1)[0] == 0
    assert cli("verify", root)[0] == 0
    (root / "ledger/000001/rank-00000.arrow").write_bytes(b"rows of 11")
    code, out = cli("verify", root)
    assert code == 4
    assert "ledger/000001/rank-00000.arrow" in out


def test_verify_counts_records_that_cannot_be_read(root: Path, cli: Cli) -> None:
    (root / "commits/000004.json").write_text("{}", encoding="utf-8")
    for which in ("all", "latest"):
        code, out = cli("verify", root, which)
        assert code == 4
        assert "000004.json" in out
    assert cli("verify", root, 20)[0] == 0


def test_verify_checks_structure_and_not_digests_alone(root: Path, cli: Cli) -> None:
    path = tensors_of(root, 10)
    store = store_in(root)
    first, rng = fragments(10)
    whole = path.read_bytes()

    def verdict() -> str:
        forge_file(root, 1, path)
        code, out = cli("verify", root, 10)
        assert code == 4
        assert str(path) in out
        return out

    name = path.relative_to(root).as_posix()
    write_tensors(store.blobs, name, [rng, type(first)(**{**parts(first), "tensor": first.tensor[:34]})])
    assert "master/w in all files do not cover it once" in verdict()
    path.write_bytes(whole + b"more")
    assert f"end at byte {len(whole)} of {len(whole) + 4}" in verdict()
    path.write_bytes(whole.replace(b"[0, 140]", b"[1, 141]"))
    assert "begins at byte" in verdict()
    path.write_bytes(b"pickle")
    assert "no readable file of fragments" in verdict()


def parts(fragment: Any) -> dict[str, Any]:
    return {name: getattr(fragment, name) for name in ("kind", "name", "shape", "offset", "tensor")}


def test_verify_wants_the_files_of_all_ranks(tmp_path: Path, cli: Cli) -> None:
    root, mail = tmp_path / "two", HashStore()
    worlds = [World(rank=rank, size=2) for rank in range(2)]
    stores = [CheckpointStore(open_blobs(root), Ballot(world, mail, 60)) for world in worlds]
    with ThreadPoolExecutor(2) as ranks:
        list(ranks.map(lambda store, world: store.save(snapshot(1, world)), stores, worlds))
    assert cli("verify", root)[0] == 0
    assert json.loads(cli("show", root, "--json")[1])["tensors"][0]["fragments"] == 2
    forge(root, 1, lambda raw: raw.update(files=[file for file in raw["files"] if file["rank"] == 0]))
    code, out = cli("verify", root)
    assert code == 4
    assert "names 1 files of fragments, world size 2" in out


def test_bad_usage_is_exit_code_2_and_says_what_there_is(root: Path, tmp_path: Path, cli: Cli) -> None:
    for arguments, words in (
        (("verify", root, 11), "10, 20, 25 (weights only), 30"),
        (("show", root, 11), "10, 20, 25 (weights only), 30"),
        (("verify", root, "lastest"), "Did you mean 'latest'?"),
        (("ls", tmp_path), "neither a run folder"),
        (("verify", tmp_path / "absent"), "neither a run folder"),
        (("ls", "ftp://x/y"), "ftp://"),
        (("prune", root), "--keep-last"),
        (("prune", root, "--keep-last", 0), "keep_last=0"),
        (("to-hf", root, "--out", tmp_path / "out"), "give the run folder"),
    ):
        code, out = cli(*arguments)
        assert (code, words in out) == (2, True), out
        assert "Traceback" not in out
    with pytest.raises(SystemExit) as error:
        cli("prune", root, "--keep-last", "two")
    assert error.value.code == 2


def test_a_store_without_a_checkpoint_is_an_error(tmp_path: Path, cli: Cli) -> None:
    store_in(tmp_path / "store").begin()
    for action in ("verify", "show"):
        code, out = cli(action, tmp_path / "store")
        assert code == 4
        assert "no checkpoint" in out
    code, out = cli("verify", as_run(tmp_path / "run", tmp_path / "nothing"))
    assert code == 4
    assert str(tmp_path / "nothing") in out
    save(store_in(tmp_path / "store"), 5, kind="weights")
    assert cli("verify", tmp_path / "store")[0] == 0
    code, out = cli("show", tmp_path / "store")
    assert code == 4
    assert "by its step: 5" in out


def test_object_storage(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        url = f"{server.url}/some/run"
        fill(store_in(url, config=ALL))
        assert cli("verify", url)[0] == 0
        assert cli("ls", as_run(tmp_path / "run", url))[1].count("unknown") == 4  # type: ignore[arg-type]
        assert cli("prune", url, "--keep-last", 1)[0] == 0
        key = next(key for key in server.objects() if "step-00000030" in key)
        server.client.put_object(Bucket=server.bucket, Key=key, Body=b"x")
        code, out = cli("verify", url)
        assert code == 4
        assert key in out
        assert cli("verify", f"{server.url}/some/other")[0] == 2


def test_looking_at_checkpoints_needs_no_torch(root: Path, tmp_path: Path) -> None:
    """So that it starts at once, and on machines without one."""
    program = """
import sys
from dtrain.cli.main import main
codes = [main(["checkpoint", *line.split()]) for line in sys.argv[1:]]
heavy = {"torch", "transformers", "deepspeed", "numpy", "pyarrow"} & set(sys.modules)
assert codes == [0] * len(codes) and not heavy, (codes, heavy)
"""
    run = as_run(tmp_path / "run", root)
    lines = [f"verify {run}", f"ls {run}", f"show {run} best", f"prune {root} --keep-last 1", f"verify {root}"]
    done = subprocess.run(
        [sys.executable, "-c", program, *lines],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
