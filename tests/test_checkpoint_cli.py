"""`dtrain checkpoint ...` over stores made here; a small trained run for what needs a model."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from torch._C._distributed_c10d import HashStore
from transformers import AutoModel, AutoTokenizer

from dtrain.checkpoint.ballot import Ballot
from dtrain.checkpoint.commits import Commit
from dtrain.checkpoint.config import CheckpointConfig
from dtrain.checkpoint.store import CheckpointStore
from dtrain.checkpoint.tensorfile import write_tensors
from dtrain.cli.main import main
from dtrain.core.blobs import open_blobs
from dtrain.core.storage import read_json, write_json
from dtrain.core.world import World
from tests.s3_server import s3_server
from tests.store_toys import forge, fragments, save, snapshot, store_in
from tests.train_toys import ROOT, call, command, environment, run_config, write_shops

Cli = Callable[..., tuple[int, str]]

ALL = CheckpointConfig(keep_last=9)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """`dtrain checkpoint ARGUMENTS`: exit code and everything it printed."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["checkpoint", *map(str, arguments)])
        return code, "".join(capsys.readouterr())

    return run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store: steps 10, 20 (best), 25 (weights alone) and 30, with a ledger."""
    fill(store_in(tmp_path / "store", config=ALL))
    return tmp_path / "store"


def fill(store: CheckpointStore) -> list[Commit]:
    made: list[Commit] = []
    for step in (10, 20, 30):
        about = {"ledger": f"rows of {step}".encode(), "ledger_after": made[-1].ledger if made else None}
        tags = {"best": 0.5} if step == 20 else {}
        made.append(save(store, step, tags=tags, fingerprints={"manifest": "ab12"}, **about))
        if step == 20:
            save(store, 25, kind="weights")
    return made


def as_run(folder: Path, store: Path, **checkpoint: Any) -> Path:
    """A run folder whose checkpoints are in `store`."""
    folder.mkdir()
    config = {"run": str(folder), "data": {"path": "gone"}, "checkpoint": {"path": str(store), **checkpoint}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


def tensors_of(root: Path, step: int) -> Path:
    return next(root.glob(f"step-{step:08d}-*/*.safetensors"))


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


def steps(root: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in root.glob("step-*"))


def test_prune_keeps_what_is_said_and_the_best(root: Path, cli: Cli) -> None:
    (root / "step-00000015-000009").mkdir()  # of a later slot: perhaps being written
    size = tensors_of(root, 10).stat().st_size
    before = sorted(root.rglob("*"))
    code, out = cli("prune", root, "--keep-last", 1, "--dry-run")
    assert code == 0
    assert "step 10" in out
    assert f"1 checkpoints to be removed, 3 stay (keep_last=1, keep_every=0, keep_weights=0); {size} B" in out
    assert sorted(root.rglob("*")) == before
    code, out = cli("prune", root, "--keep-last", 1)
    assert code == 0
    assert f"{size} B freed" in out
    assert steps(root) == [15, 20, 25, 30]
    assert [commit.step for commit in store_in(root).commits()] == [20, 25, 30]
    assert "nothing to remove" in cli("prune", root, "--keep-last", 1)[1]
    assert cli("verify", root)[0] == 0


def test_prune_takes_the_run_s_own_retention(root: Path, tmp_path: Path, cli: Cli) -> None:
    save(store_in(root, config=ALL), 40, kind="weights")
    run = as_run(tmp_path / "run", root, keep_last=1, keep_every=10, keep_weights=1)
    assert cli("prune", run)[0] == 0
    assert steps(root) == [10, 20, 30, 40]
    assert cli("prune", run, "--keep-every", 15)[0] == 0
    assert steps(root) == [20, 30, 40]


def test_prune_takes_folders_that_no_record_names(root: Path, cli: Cli) -> None:
    (root / "commits/000001.json").unlink()
    code, out = cli("prune", root, "--keep-last", 9)
    assert code == 0
    assert "step-00000010-000001, which no record names" in out
    assert steps(root) == [20, 25, 30]


def test_prune_refuses_while_the_run_is_running(root: Path, tmp_path: Path, cli: Cli) -> None:
    run = as_run(tmp_path / "run", root, keep_last=1)
    alive = {"status": "running", "host": socket.gethostname(), "pid": os.getpid()}
    alive["created"] = psutil.Process().create_time()
    for outcome in (alive, {**alive, "host": "elsewhere", "created": 0.0}):  # there, nobody can look from here
        write_json(run / "outcome.json", outcome)
        code, out = cli("prune", run)
        assert code == 2
        assert "running" in out
        assert "--force" in out
        assert steps(root) == [10, 20, 25, 30]
    assert cli("prune", run, "--dry-run")[0] == 0
    assert cli("prune", run, "--force")[0] == 0
    assert steps(root) == [20, 25, 30]


@pytest.mark.parametrize("outcome", [{"status": "completed"}, {"status": "running", "created": 0.0}])
def test_prune_of_a_run_that_ended_or_was_killed(root: Path, tmp_path: Path, cli: Cli, outcome: dict[str, Any]) -> None:
    run = as_run(tmp_path / "run", root, keep_last=1)
    write_json(run / "outcome.json", {"host": socket.gethostname(), "pid": os.getpid(), **outcome})
    assert cli("prune", run)[0] == 0
    assert steps(root) == [20, 25, 30]


@pytest.mark.parametrize("step", [20, 30])
def test_prune_refuses_when_the_newest_or_best_that_stays_is_damaged(root: Path, cli: Cli, step: int) -> None:
    path = tensors_of(root, step)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, out = cli("prune", root, "--keep-last", 1)
    assert code == 4
    assert str(path) in out
    assert "nothing was removed" in out
    assert steps(root) == [10, 20, 25, 30]


def test_prune_refuses_beside_a_record_that_cannot_be_read(root: Path, cli: Cli) -> None:
    (root / "commits/000001.json").write_text("{", encoding="utf-8")
    code, out = cli("prune", root, "--keep-last", 1)
    assert code == 4
    assert "000001.json" in out
    assert steps(root) == [10, 20, 25, 30]


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """A run with checkpoints of steps 2 and 4 (weights alone), 3 and 6."""
    folder = tmp_path_factory.mktemp("cli")
    config = run_config(
        folder,
        write_shops(folder / "data", users=20),
        tiny_encoder,
        train={"steps": 6, "valid_every": 3, "checkpoint_every": 3},
        checkpoint={"weights_every": 2},
        evaluate={"resamples": 1000},
    )
    done = call(command("train", str(config)))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The encoder's tensors in the checkpoint of `step`."""
    store = store_in(run / "checkpoints")
    commit = store.find(str(step))
    assert commit is not None
    source = store.open(commit)
    prefix = "encoder.model."
    names = [name for name in source.names("master") if name.startswith(prefix)]
    return {n.removeprefix(prefix): source.read("master", n).view(source.shape("master", n)) for n in names}


@pytest.mark.parametrize("step", [2, 3])
def test_to_hf_writes_the_encoder_of_any_checkpoint(trained: Path, tmp_path: Path, cli: Cli, step: int) -> None:
    out = tmp_path / "hf"
    assert "warmup_steps=2" in cli("show", trained)[1]  # of the binding settings
    code, text = cli("to-hf", trained, step, "--out", out)
    assert code == 0, text
    assert f"step {step} ({'weights' if step == 2 else 'full'})" in text
    model = AutoModel.from_pretrained(out, use_safetensors=True)
    wanted = saved(trained, step)
    assert wanted
    assert {name for name, _ in model.named_parameters()} == set(wanted)
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in model.named_parameters())
    assert AutoTokenizer.from_pretrained(out)("red lamp")["input_ids"][0] == 2  # [CLS]
    assert read_json(out / "checkpoint.json")["step"] == step
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_to_hf_replaces_only_its_own_folders_and_leaves_no_half_ones(trained: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "hf"
    assert cli("to-hf", trained, "latest", "--out", out)[0] == 0
    assert cli("to-hf", trained, 2, "--out", out)[0] == 0
    assert read_json(out / "checkpoint.json")["step"] == 2
    for arguments, expected, words in (
        ((trained, 5, "--out", out), 2, "2 (weights only), 3, 4 (weights only), 6"),
        ((trained, "--out", trained), 6, "no earlier export"),
        ((trained, "newest", "--out", tmp_path / "new"), 2, "checkpoint=newest"),
    ):
        code, text = cli("to-hf", *arguments)
        assert (code, words in text) == (expected, True), text
    assert read_json(out / "checkpoint.json")["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_another_checkpoint_than_the_best_is_evaluated_and_exported(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(trained), "evaluate.checkpoint=2"]) == 0
    assert "checkpoint of step 2, written to metrics-step-2.json" in capsys.readouterr().out
    assert not (trained / "metrics.json").exists()
    assert main(["evaluate", str(trained)]) == 0
    own = read_json(trained / "metrics.json")
    assert own["step"] in (3, 6)
    assert main(["evaluate", str(trained), "evaluate.checkpoint=latest", "evaluate.split=valid"]) == 0
    assert read_json(trained / "metrics-valid-step-6.json")["step"] == 6
    assert read_json(trained / "metrics.json") == own
    early = read_json(trained / "metrics-step-2.json")
    assert early["step"] == 2
    assert early["platforms"].keys() == own["platforms"].keys()
    for wrong, words in (("5", "2 (weights only), 3"), ("last", "evaluate.checkpoint=last")):
        assert main(["evaluate", str(trained), f"evaluate.checkpoint={wrong}"]) == 2
        assert words in capsys.readouterr().err
    assert main(["export", str(trained), "--out", str(tmp_path / "out"), "--checkpoint", "2"]) == 0
    assert read_json(tmp_path / "out/metrics.json") == early
    exported = AutoModel.from_pretrained(tmp_path / "out", use_safetensors=True)
    wanted = saved(trained, 2)
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in exported.named_parameters())
