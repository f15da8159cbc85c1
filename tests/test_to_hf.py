"""`dtrain checkpoint to-hf`, and evaluation and export of another checkpoint than the best, of a small trained run."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from dtrain.cli.main import main, run
from dtrain.core.storage import read_json
from tests.conftest import Cli
from tests.store_toys import store_in
from tests.train_toys import call, command, run_config, write_shops


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


def test_a_place_that_takes_no_folder_is_named_and_not_traced(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("run: x")
    for arguments, told in (
        (["checkpoint", "to-hf", str(trained), "--out", f"{taken}/hf"], f"{taken}/hf: Not a directory; a file is in"),
        (
            ["checkpoint", "to-hf", str(trained), "--out", "/proc/hf"],
            "/proc/hf: No such file or directory; give a path",
        ),
        (["train", str(trained / "config.yaml"), f"run={taken}"], f"{taken}: File exists; something else is there"),
    ):
        assert main(arguments) == 3
        assert f"dtrain: error: {told}" in capsys.readouterr().err


def test_an_error_of_the_system_that_names_no_path_is_no_users_mistake() -> None:
    def command() -> int:
        raise PermissionError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        run(command)
