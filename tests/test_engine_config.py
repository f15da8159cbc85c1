"""Engine configuration: what is refused, learning rates, parameter groups, memory."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dtrain.core.config import load_config
from dtrain.core.cpu import cpu_has_fast_bf16
from dtrain.core.errors import ConfigError
from dtrain.engine.config import EngineConfig, OptimizerConfig, ScheduleConfig
from dtrain.engine.deepspeed_keys import FREE, OWNED, check_keys
from dtrain.engine.memory import estimate
from dtrain.engine.optimizer import make_optimizer, set_lr
from dtrain.engine.precision import resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("config", "values", "says"),
    [
        (EngineConfig, {"name": "deepsped"}, "Did you mean 'deepspeed'"),
        (EngineConfig, {"zero_stage": 4}, "none of 0, 1, 2, 3"),
        (EngineConfig, {"precision": "fp8"}, "fp32, bf16, fp16"),
        (EngineConfig, {"clip_norm": -1.0}, "at least 0"),
        (EngineConfig, {"offload": "optimizer", "zero_stage": 0}, "needs ZeRO stage 1"),
        (EngineConfig, {"offload": "parameters", "zero_stage": 2}, "needs ZeRO stage 3"),
        (EngineConfig, {"name": "torch", "precision": "fp16"}, "engine.name=deepspeed"),
        (OptimizerConfig, {"name": "adam"}, "Did you mean 'adamw'"),
        (OptimizerConfig, {"lr": float("nan")}, "optimizer.lr"),
        (OptimizerConfig, {"beta2": 1.0}, "below 1"),
        (ScheduleConfig, {"final": 2.0}, "between 0 and 1"),
        (ScheduleConfig, {"warmup_steps": 11, "total_steps": 10}, "exceeds the run's 10 steps"),
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_rule(config: type, values: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(**values)


def test_configs_read_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("zero_stage: 2\ndeepspeed: {zero_optimization: {reduce_bucket_size: 1000}}\n")
    config = load_config(EngineConfig, tmp_path / "c.yaml", ["precision=fp32"])
    assert (config.zero_stage, config.precision) == (2, "fp32")
    assert config.deepspeed == {"zero_optimization": {"reduce_bucket_size": 1000}}
    assert load_config(OptimizerConfig, None, ["encoder_lr=1e-5"]).encoder_lr == 1e-5


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"gradient_clippping": 1.0},
            "not a key that dtrain passes through to DeepSpeed. Did you mean 'gradient_clipping'",
        ),
        ({"train_batch_size": 8}, "train_batch_size: this key is dtrain's"),
        ({"optimizer": {"type": "Adam"}}, r"set optimizer\.\* instead"),
        ({"bf16": {"enabled": True}}, "bf16.enabled: this key is dtrain's; set engine.precision"),
        ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow: .* a step that is not finite is skipped"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage: this key is dtrain's; set engine.zero_stage"),
    ],
)
def test_unknown_and_owned_deepspeed_keys_are_refused(keys: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_keys(keys)


def test_free_and_owned_keys_are_those_that_this_deepspeed_reads() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    read: set[str] = set()

    class Recorder(dict):  # type: ignore[type-arg]
        def __contains__(self, key: object) -> bool:
            read.add(str(key))
            return super().__contains__(key)

        def get(self, key: object, default: object = None) -> object:
            read.add(str(key))
            return super().get(key, default)

        def keys(self) -> Recorder:  # type: ignore[override]
            return self

        def __copy__(self) -> Recorder:
            return self

    DeepSpeedConfig(Recorder(train_batch_size=1))
    ours = FREE | {key for key in OWNED if "." not in key}
    assert ours - read == set(), "dtrain lists a key that DeepSpeed does not read"
    assert check_keys({key: {} for key in FREE}) is None


def test_linear_schedule_warms_up_decays_and_stays_at_its_end() -> None:
    schedule = ScheduleConfig(name="linear", warmup_steps=4, total_steps=14, final=0.1)
    factors = [schedule.lr_factor(step) for step in range(16)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[9] == pytest.approx(0.55)
    assert factors[14:] == pytest.approx([0.1, 0.1])
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_cosine_and_constant_schedules() -> None:
    cosine = ScheduleConfig(name="cosine", total_steps=10)
    assert [cosine.lr_factor(step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    assert ScheduleConfig(name="constant", warmup_steps=2).lr_factor(1000) == 1.0
    with pytest.raises(ConfigError, match=r"needs schedule\.total_steps"):
        ScheduleConfig(name="cosine").lr_factor(0)


@pytest.mark.parametrize(("flags", "fast"), [("avx2 fma", False), ("avx2 amx_bf16", True), ("avx512_bf16", True)])
def test_auto_precision_reads_the_cpu(tmp_path: Path, flags: str, fast: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: fpu {flags}\n")
    assert cpu_has_fast_bf16(tmp_path / "cpuinfo") is fast
    assert resolve_precision("auto", CPU, cpu_bf16=fast) == ("bf16" if fast else "fp32")


def test_fp16_without_cuda_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fp16 needs CUDA.*set bf16, fp32 or auto"):
        resolve_precision("fp16", CPU)
    assert not cpu_has_fast_bf16(Path("/nonexistent"))


def model() -> nn.Module:
    return nn.ModuleDict({"encoder": nn.Linear(3, 3), "table": nn.Embedding(4, 3), "head": nn.Linear(3, 1)})


def test_groups_have_their_roles_rate_and_spare_vectors_and_embeddings_from_decay() -> None:
    roles = {"encoder.weight": "encoder", "encoder.bias": "encoder"}
    m = model()
    optimizer = make_optimizer(OptimizerConfig(lr=1.0, encoder_lr=0.1, weight_decay=0.5), m, roles)
    names = {id(p): name for name, p in m.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == {
        "encoder.weight": (0.1, 0.5),
        "encoder.bias": (0.1, 0.0),
        "table.weight": (1.0, 0.0),
        "head.weight": (1.0, 0.5),
        "head.bias": (1.0, 0.0),
    }
    assert set_lr(optimizer, 0.5) == 0.05
    assert {g["lr"] for g in optimizer.param_groups} == {0.05, 0.5}


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        make_optimizer(OptimizerConfig(), model().requires_grad_(False), {})


def test_memory_estimate_follows_the_stages() -> None:
    def total(stage: int, precision: str = "bf16", **values: str) -> dict[str, int]:
        config = EngineConfig(zero_stage=stage, **values)  # type: ignore[arg-type]
        return estimate(config, OptimizerConfig(), precision, trainable=1000, frozen=0, world_size=4)

    # 2 weights + 2 gradients + 4 masters + 8 moments bytes a parameter, cut step by step (arXiv:1910.02054, figure 1),
    # and from stage 1 on a buffer of 2
    assert [total(stage)["device"] for stage in range(4)] == [16000, 9000, 7500, 6000]
    assert total(0, "fp32")["masters"] == 0
    assert total(2, offload="optimizer") | {"device": 4500, "host": 3000} == total(2, offload="optimizer")


FAULTS = """
import resource, sys
from dtrain.core.cpu import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
block = bytearray(1 << 26); del block
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = bytearray(1 << 26); del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_kept_for_what_is_allocated_next() -> None:
    faults = {how: int(subprocess.check_output([sys.executable, "-c", FAULTS, how])) for how in ("keep", "give")}
    assert faults["keep"] < 100  # of 16,384 pages
    assert faults["give"] > 10 * max(1, faults["keep"])


HUGE = """
import sys
from pathlib import Path
from dtrain.core.cpu import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
block = bytearray(b"x") * (1 << 26)
lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
print(next(line for line in lines if line.startswith("AnonHugePages")).split()[1])
"""


_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not _PAGES.exists() or "[madvise]" not in _PAGES.read_text(),
    reason="huge pages come here without being asked for, or never",
)
def test_what_is_allocated_lies_in_huge_pages() -> None:
    huge = {how: int(subprocess.check_output([sys.executable, "-c", HUGE, how])) for how in ("keep", "give")}
    assert huge["keep"] >= 60 << 10 > huge["give"]  # KiB, of 64 MiB
