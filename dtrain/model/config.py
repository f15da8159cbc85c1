"""What a model is, as config. Everything here binds a checkpoint, except dropouts and `activation_checkpointing`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dtrain.core.config import nearest
from dtrain.core.errors import ConfigError
from dtrain.data.neighbours import NeighbourConfig
from dtrain.data.trends import TrendConfig

__all__ = [
    "AdapterConfig",
    "BlendConfig",
    "EncoderConfig",
    "FreezeConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "UserConfig",
]


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(known)}.{nearest(value, known)}")


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise ConfigError(f"{name}={value} is below {low}; use at least {low}")


def _probability(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{name}={value} is no dropout probability; use 0 <= p < 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """The text encoder: any BERT-like model that `AutoModel` opens from safetensors."""

    name: str  # Hugging Face name, or a folder with config.json and model.safetensors
    pooling: str = "mean"  # how token vectors become a text's vector: mean | cls | max, over real tokens
    attention: str = "auto"  # attention kernel: eager | sdpa | auto, the faster one for each call (docs/model.md)
    dropout: float = 0.0  # probability; overrides every hidden and attention dropout of the encoder
    activation_checkpointing: bool = False  # recompute each layer in backward: less memory, one more forward

    def __post_init__(self) -> None:
        _one_of("model.encoder.pooling", self.pooling, ("mean", "cls", "max"))
        _one_of("model.encoder.attention", self.attention, ("auto", "eager", "sdpa"))
        _probability("model.encoder.dropout", self.dropout)


@dataclass(frozen=True, slots=True, kw_only=True)
class UserConfig:
    """The user encoder: a causal Transformer over item vectors."""

    layers: int = 2  # 0: no encoder, a history's vector is that of its last item; then the rest here has no effect
    heads: int = 4  # attention heads; must divide the model's `dim`
    feedforward: int = 256  # width of the hidden layer of each block
    dropout: float = 0.1  # probability, after the input, attention weights and each residual branch
    max_positions: int = 50  # longest history it reads, in items; ranking takes the last ones of longer histories

    def __post_init__(self) -> None:
        for name, low in (("layers", 0), ("heads", 1), ("feedforward", 1), ("max_positions", 1)):
            _at_least(f"model.user.{name}", getattr(self, name), low)
        _probability("model.user.dropout", self.dropout)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Per-platform bottleneck adapters on item and user vectors."""

    enabled: bool = True
    rank: int = 32  # width of the bottleneck

    def __post_init__(self) -> None:
        _at_least("model.adapter.rank", self.rank, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezeConfig:
    """What of the encoder stays as pretrained. Heads and adapters always train."""

    policy: str = "nothing"  # nothing | all_but_top (train the top layers only) | all_but_heads (encoder fixed)
    top_layers: int = 2  # trained encoder layers under all_but_top

    def __post_init__(self) -> None:
        _one_of("model.freeze.policy", self.policy, ("nothing", "all_but_top", "all_but_heads"))
        _at_least("model.freeze.top_layers", self.top_layers, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendConfig:
    """What goes into a score beside the model's own, item-to-item statistics (`neighbours`) and `trend`."""

    texts: int = 5  # last items of a history whose texts an item's text is compared with; 0: none
    cold_weight: float = 5.0  # as how many others a user counts whose next item is new, see `train.headstart`
    cold_cost: float = 0.02  # share of a platform's valid metric that new items may cost all of its users at most

    def __post_init__(self) -> None:
        _at_least("model.blend.texts", self.texts, 0)
        if not 0 < self.cold_weight < float("inf"):
            raise ConfigError(
                f"model.blend.cold_weight={self.cold_weight} is no weight; use e.g. 1 (all users alike) or 5"
            )
        if not 0 <= self.cold_cost < 1:
            raise ConfigError(
                f"model.blend.cold_cost={self.cold_cost} is no share; use 0 (it may cost nothing) <= cost < 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank changes of the encoder's linear maps, of attention and feed-forward layers: W + alpha / rank * B A."""

    rank: int = 8  # columns of B, rows of A
    alpha: float = 16.0  # the factor times the rank

    def __post_init__(self) -> None:
        _at_least("train.lora.rank", self.rank, 1)
        if not self.alpha > 0:
            raise ConfigError(f"train.lora.alpha={self.alpha} is not positive; use e.g. twice train.lora.rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The whole model."""

    encoder: EncoderConfig
    dim: int = 128  # size of item and user vectors
    standardize: bool = True  # give text vectors mean 0 and deviation 1, by statistics of the pretrained encoder
    project: bool = True  # a learned linear map of text vectors to `dim`; without it `dim` is the encoder's own size
    id_vectors: bool = True  # add a learned vector of each item to its text's vector
    item_bias: bool = True  # add a learned, popularity-like score of each item
    memory: bool = True  # remember each item's last text vector ([items, hidden] fp32); steps may encode fewer items
    user: UserConfig = field(default_factory=UserConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    neighbours: NeighbourConfig = field(default_factory=NeighbourConfig)
    trend: TrendConfig = field(default_factory=TrendConfig)
    blend: BlendConfig = field(default_factory=BlendConfig)

    def __post_init__(self) -> None:
        _at_least("model.dim", self.dim, 1)
        if self.dim % self.user.heads:
            raise ConfigError(
                f"model.dim={self.dim} is not a multiple of model.user.heads={self.user.heads}; change one of them"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """Next item by InfoNCE over contrast blocks."""

    temperature: float = 0.07  # divides user-item products; the start value where it is learned
    learned_temperature: bool = True
    logq: bool = True  # correct for the probability with which an item becomes a candidate
    normalize: bool = True  # cosine (unit vectors) instead of the dot product; with False, start near temperature 1

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"objective.temperature={self.temperature} is not positive; use e.g. 0.07")
