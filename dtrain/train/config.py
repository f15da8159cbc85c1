"""The config of a training run: every section in one place, and what one takes from another."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from dtrain.batches.config import BatchConfig
from dtrain.checkpoint.choice import check_choice
from dtrain.checkpoint.config import CheckpointConfig
from dtrain.core.cluster import ClusterConfig
from dtrain.core.config import nearest
from dtrain.core.errors import ConfigError
from dtrain.data.cache import CacheConfig
from dtrain.data.mixture import MixtureConfig
from dtrain.data.plan import PlanConfig
from dtrain.data.stream import StreamConfig
from dtrain.engine.config import EngineConfig, OptimizerConfig, ScheduleConfig
from dtrain.model.config import LoraConfig, ModelConfig, ObjectiveConfig
from dtrain.train.evaluate import EvaluateConfig
from dtrain.train.stopping import AGGREGATES

__all__ = ["DataConfig", "DistConfig", "RunConfig", "TrainConfig"]

TASKS = ("recommend", "rank", "pretrain")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What to train on."""

    path: str  # prepared folder, the `out` of `dtrain prepare`, or s3://bucket/prefix of a copy
    platforms: list[str] = field(default_factory=list)  # names to use, in this order; empty: all
    cache: CacheConfig = field(default_factory=CacheConfig)  # of what lies elsewhere, on each node

    def __post_init__(self) -> None:
        twice = [name for name in dict.fromkeys(self.platforms) if self.platforms.count(name) > 1]
        if twice:
            raise ConfigError(f"data.platforms=[{', '.join(self.platforms)}]: {twice[0]} is named twice; name it once")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistConfig:
    """Processes of one run."""

    timeout_s: float = 600.0  # no collective waits longer
    threads: int = 0  # CPU threads of a rank; 0: this machine's cores shared evenly by its ranks

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ConfigError(f"dist.timeout_s={self.timeout_s}: must be above 0; 600 suits most networks")
        if self.threads < 0:
            raise ConfigError(f"dist.threads={self.threads}: must be at least 0, which shares the cores evenly")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The loop."""

    task: str = "recommend"  # recommend: retriever with InfoNCE; rank: cross-encoder with binary cross-entropy;
    # pretrain: the encoder alone, by masked language modelling of item texts
    steps: int = 1000  # optimizer steps
    resume: str = "auto"  # auto: from the newest whole checkpoint of the run folder; never: refuse a used folder
    resume_data: str = "same"  # same: refuse changed data or settings; continue: take them from here on; restart: begin
    # the data again too. docs/checkpoints.md says which setting may change how
    log_every: int = 10  # steps between log lines
    valid_every: int = 200  # steps between validations; 0: at the end only
    valid_users: int = 0  # users of each platform to validate on, a fixed random sample; 0: all
    valid_remembered: bool = False  # validate with remembered item vectors instead of encoding every item again
    checkpoint_every: int = 200  # steps between checkpoints; every new best is one too; 0: those and the end only
    metric: str = "ndcg@10"  # validated metric that stops the run and picks the best checkpoint; pretrain: accuracy
    aggregate: str = "macro"  # over platforms: macro (mean), worst or geometric (mean, to which ratios count alike)
    patience: int = 0  # validations without a new best before the run stops; 0: never
    platform_patience: int = 0  # validations without a new best of its own before a platform rests: it keeps
    # mixture.rest_share of its share, the others take the rest, and when all have come to that the run stops; 0: never
    max_skipped: int = 10  # non-finite steps in a row that end the run
    init_from: str = ""  # run folder or URL whose weights a new run begins with; empty: the pretrained encoder's alone
    init_checkpoint: str = "best"  # of that run: best (the latest where none is) | latest | a step
    adapt: str = "all"  # what trains after init_from: all (by model.freeze) | adapters (what each platform has of its
    # own) | lora (the same and low-rank changes of the encoder); docs/transfer.md
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        for key, allowed in (
            ("task", TASKS),
            ("resume", ("auto", "never")),
            ("resume_data", ("same", "continue", "restart")),
            ("aggregate", AGGREGATES),
            ("adapt", ("all", "adapters", "lora")),
            ("metric", ("recall@10", "recall@50", "ndcg@10", "ndcg@50", "mrr", "accuracy")),
        ):
            value = getattr(self, key)
            if value not in allowed:
                raise ConfigError(f"train.{key}={value!r} is none of {', '.join(allowed)}.{nearest(value, allowed)}")
        for key, low in (
            ("steps", 1),
            ("log_every", 1),
            ("valid_every", 0),
            ("valid_users", 0),
            ("patience", 0),
            ("platform_patience", 0),
            ("checkpoint_every", 0),
            ("max_skipped", 1),
        ):
            if getattr(self, key) < low:
                raise ConfigError(f"train.{key}={getattr(self, key)}: must be at least {low}")
        if (self.task == "pretrain") != (self.metric == "accuracy"):
            raise ConfigError(
                f"train.metric={self.metric!r} is not measured by train.task={self.task}; accuracy, the share of "
                "hidden tokens that are told, is pretrain's only metric and of no other task"
            )
        for key in ("patience", "platform_patience"):
            if getattr(self, key) and not self.valid_every:
                raise ConfigError(
                    f"train.{key}={getattr(self, key)} counts validations, of which train.valid_every=0 makes one, "
                    f"at the end; set train.valid_every, or train.{key}=0"
                )
        check_choice("train.init_checkpoint", self.init_checkpoint)
        if self.init_from and self.task != "recommend":
            raise ConfigError(f"train.init_from={self.init_from}: is for train.task=recommend, not {self.task}")
        if self.adapt != "all" and not self.init_from:
            raise ConfigError(
                f"train.adapt={self.adapt} leaves most weights as train.init_from gives them, which names none; name a "
                "run, or train all"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that `launch/train.py` takes."""

    run: str  # run folder, or s3://bucket/prefix of one
    data: DataConfig
    model: ModelConfig
    plan: PlanConfig = field(default_factory=PlanConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    dist: DistConfig = field(default_factory=DistConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        if self.batch.fresh_items is not None and self.train.task == "recommend" and not self.model.memory:
            raise ConfigError(
                f"batch.fresh_items={self.batch.fresh_items} takes the other items from memory; set model.memory=true "
                "or batch.fresh_items=null"
            )
        if self.batch.accumulation > self.plan.samples:
            raise ConfigError(
                f"batch.accumulation={self.batch.accumulation} cuts the plan.samples={self.plan.samples} samples of a "
                "step into more micro-batches than there are samples; lower it"
            )

    @property
    def counts_on_memory(self) -> bool:
        """Whether a step or a validation may take the remembered vector of any item."""
        remembers = self.train.task == "recommend" and self.model.memory
        return remembers and (self.batch.fresh_items is not None or self.train.valid_remembered)

    def completed(self) -> RunConfig:
        """With what one section takes from another filled in: the schedule spans the run."""
        if self.schedule.total_steps:
            return self
        return dataclasses.replace(self, schedule=dataclasses.replace(self.schedule, total_steps=self.train.steps))
