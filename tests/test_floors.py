"""The house: which floor may import which, and which third-party package may be imported where."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "core": 0,
    "data": 1,
    "batches": 2,
    "model": 2,
    "engine": 3,
    "checkpoint": 3,
    "train": 4,
    "orchestrate": 5,
    "export": 5,
    "serve": 5,
    "cli": 6,
}
ONLY_IN = {
    "deepspeed": ("dtrain/engine/deepspeed_engine.py",),
    "ray": ("dtrain/orchestrate/", "dtrain/serve/"),
    "webdataset": ("dtrain/data/shards.py",),
    "peft": ("dtrain/model/lora.py",),
    "omegaconf": ("dtrain/core/config.py",),
    "fsspec": ("dtrain/data/sources.py",),  # inputs, from wherever it reaches
    "s3fs": ("dtrain/core/s3_calls.py",),
    "botocore": ("dtrain/core/s3_calls.py",),
    "aiobotocore": (),
    "boto3": (),
    "pickle": (),
    "dill": (),
    "cloudpickle": (),
}


def modules() -> list[Path]:
    return sorted((ROOT / "dtrain").rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def test_imports_go_down_and_never_sideways() -> None:
    wrong = []
    for path in modules():
        parts = path.relative_to(ROOT).parts
        if len(parts) < 3:
            continue
        for name in imports(path):
            target = name.split(".")
            if target[0] != "dtrain" or len(target) < 2 or target[1] == parts[1]:
                continue
            if FLOORS[target[1]] >= FLOORS[parts[1]]:
                wrong.append(f"{'/'.join(parts)} imports {name}")
    assert not wrong, wrong


def test_third_party_packages_stay_where_they_belong() -> None:
    wrong = []
    for path in modules():
        place = path.relative_to(ROOT).as_posix()
        for name in imports(path):
            allowed = ONLY_IN.get(name.split(".")[0])
            if allowed is not None and not place.startswith(tuple(allowed) or ("nowhere",)):
                wrong.append(f"{place} imports {name}")
    assert not wrong, wrong


def test_preparing_does_not_import_torch() -> None:
    """`dtrain prepare` runs on machines and workers that need no torch; importing it would also cost 150 MB each."""
    names = [f"dtrain.data.{p.stem}" for p in sorted((ROOT / "dtrain/data").glob("[a-z]*.py")) if p.stem != "batch"]
    code = f"import importlib, sys; [importlib.import_module(n) for n in {names}]; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_modules_stay_readable() -> None:
    long = {p.name: n for p in modules() if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long, long


def test_every_module_lists_its_public_names() -> None:
    for path in modules():
        if path.name in ("__init__.py", "__main__.py"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        listed = [
            ast.literal_eval(n.value)
            for n in tree.body
            if isinstance(n, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in n.targets)
        ]
        assert listed, f"{path}: no __all__"  # ruff keeps its order
