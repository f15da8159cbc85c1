"""The model's parts one by one: objectives, encoder, user encoder, cross-encoder, config."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

from dtrain.core.config import load_config, to_dict
from dtrain.core.errors import ConfigError
from dtrain.data.batch import ItemTexts, PairBatch, Pairs
from dtrain.model.build import build_cross_encoder, describe, parameter_roles, train_flops_per_token
from dtrain.model.config import AdapterConfig, EncoderConfig, FreezeConfig, ModelConfig, UserConfig
from dtrain.model.cross import CrossEncoder
from dtrain.model.encoder import Encoder
from dtrain.model.items import ItemTower, Standardize
from dtrain.model.layers import PlatformAdapters, Temperature, recomputed
from dtrain.model.objectives import pointwise_bce
from dtrain.model.user import LastItem, UserEncoder
from tests.model_toys import tokens, toy_model


def test_adapters_take_platforms_in_any_order() -> None:
    torch.manual_seed(0)
    adapters = PlatformAdapters(3, 4, 2)
    x = torch.randn(5, 4)
    platform = torch.tensor([2, 0, 2, 0, 0])
    assert torch.equal(adapters(x, platform), x)
    torch.nn.init.normal_(adapters.up_PRD)
    out = adapters(x, platform)
    for row, p in enumerate(platform.tolist()):
        torch.testing.assert_close(out[row], adapters(x[row : row + 1], torch.tensor([p]))[0])
    assert not torch.allclose(out, adapters(x, torch.zeros(5, dtype=torch.int64)))
    assert adapters(x[:0], platform[:0]).shape == (0, 4)


def test_what_is_computed_again_is_shown_the_tensors_within(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda _, *args, **more: shown.extend(args))
    texts = ItemTexts(ids_NT=torch.zeros(1, 2), mask_NT=torch.ones(1, 2))
    recomputed(len, (texts, 3))
    assert [float(tensor.sum()) for tensor in shown] == [0, 2]


def test_temperature_is_bounded_and_comes_back() -> None:
    fixed = Temperature(0.05, learned=False)
    assert fixed(torch.device("cpu")).item() == pytest.approx(20)
    assert not list(fixed.parameters())
    learned = Temperature(0.05, learned=True)
    assert learned(torch.device("cpu")).item() == pytest.approx(20)
    with torch.no_grad():
        learned.offset += 10
    scale = learned(torch.device("cpu"))
    assert scale.item() == pytest.approx(100)
    scale.backward()
    assert float(learned.offset.grad) > 0


def user_encoder(**changes: int) -> UserEncoder:
    torch.manual_seed(0)
    user = UserConfig(heads=2, feedforward=16, dropout=0.0, max_positions=6, **changes)
    encoder = UserEncoder(ModelConfig(encoder=EncoderConfig(name="unused"), dim=8, user=user), [2, 3])
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return encoder.eval()


@pytest.mark.parametrize("layers", [1, 2])
def test_the_future_does_not_change_the_past(layers: int) -> None:
    encoder = user_encoder(layers=layers)
    item, event, platform = torch.randn(2, 6, 8), torch.randint(0, 2, (2, 6)), torch.tensor([0, 1])
    every = torch.arange(12)
    out = encoder(item.flatten(0, 1), event.flatten(), platform, [(2, 6)], every).view(2, 6, 8)
    changed = item.clone()
    changed[:, 4:] = torch.randn(2, 2, 8)
    other = encoder(changed.flatten(0, 1), event.flatten(), platform, [(2, 6)], every).view(2, 6, 8)
    torch.testing.assert_close(other[:, :4], out[:, :4])
    assert not torch.allclose(other[:, 4], out[:, 4])


@pytest.mark.parametrize("layers", [1, 2])
def test_the_last_vector_is_that_of_the_last_real_position(layers: int) -> None:
    encoder = user_encoder(layers=layers)
    item, event, platform = torch.randn(3, 6, 8), torch.randint(0, 2, (3, 6)), torch.tensor([0, 1, 1])
    mask = torch.arange(6) < torch.tensor([6, 1, 4])[:, None]
    at = torch.tensor([5, 6, 12 + 3])
    every = encoder(item.flatten(0, 1), event.flatten(), platform, [(3, 6)], at)
    torch.testing.assert_close(encoder.last(item, event, mask, platform), every)
    # The same in two buckets: one history of four positions, and two of six.
    order, four = [2, 0, 1], slice(4)
    item_Z = torch.cat([item[2, four], item[0], item[1]])
    event_Z = torch.cat([event[2, four], event[0], event[1]])
    bucketed = encoder(item_Z, event_Z, platform[order], [(1, 4), (2, 6)], torch.tensor([3, 4 + 5, 10]))
    torch.testing.assert_close(bucketed, every[order])
    cut = encoder.last(item[2:, :4], event[2:, :4], mask[2:, :4], platform[2:])
    torch.testing.assert_close(cut, encoder.last(item, event, mask, platform)[2:])


def test_without_layers_a_history_is_its_last_item() -> None:
    encoder = LastItem(ModelConfig(encoder=EncoderConfig(name="unused"), dim=8, user=UserConfig(layers=0)))
    item, event, platform = torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1])
    found = encoder(item.flatten(0, 1), event.flatten(), platform, [(2, 3)], torch.tensor([1, 5]))
    torch.testing.assert_close(found, item[[0, 1], [1, 2]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    torch.testing.assert_close(encoder.last(item, event, mask, platform), item[[0, 1], [1, 2]])
    assert not list(encoder.parameters())


def test_without_a_projection_items_are_their_texts() -> None:
    config = ModelConfig(
        encoder=EncoderConfig(name="unused"),
        dim=8,
        project=False,
        id_vectors=False,
        item_bias=False,
        adapter=AdapterConfig(enabled=False),
    )
    tower, text = ItemTower(config, hidden=8, items=5, platforms=1, normalize=True), torch.randn(5, 8)
    vector, bias = tower(text, torch.arange(5), torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(vector, torch.nn.functional.normalize(text))
    assert not bias.any()
    assert not list(tower.parameters())
    with pytest.raises(ConfigError, match=r"set model.dim=12"):
        ItemTower(config, hidden=12, items=5, platforms=1, normalize=True)


def test_order_matters_and_where_a_window_begins_does_not() -> None:
    encoder = user_encoder(layers=1)
    item, event, platform = torch.randn(1, 4, 8), torch.zeros(1, 4, dtype=torch.int64), torch.tensor([0])
    full = torch.ones(1, 4, dtype=torch.bool)
    out = encoder.last(item, event, full, platform)
    assert not torch.allclose(encoder.last(item[:, [1, 0, 2, 3]], event, full, platform), out)
    with torch.no_grad():  # a first item too far away to be seen
        encoder.blocks[0].attention.distance.weight[4] = -1e9
    longer = torch.cat([torch.randn(1, 1, 8), item], 1)
    five = torch.ones(1, 5, dtype=torch.bool)
    torch.testing.assert_close(encoder.last(longer, five.long() * 0, five, platform), out)


def test_a_history_beyond_the_limit_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"7 items exceeds user.max_positions=6"):
        user_encoder()(torch.zeros(7, 8), torch.zeros(7).long(), torch.tensor([0]), [(1, 7)], torch.tensor([0]))


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_text_padding_changes_no_vector_and_empty_texts_stay_finite(
    tiny_encoder: Path, pooling: str, attention: str
) -> None:
    config = EncoderConfig(name=str(tiny_encoder), pooling=pooling, attention=attention)
    encoder = Encoder(config, pretrained=True).eval()
    ids, mask = tokens([0, 3, -1])
    out = encoder(ids, mask)
    torch.testing.assert_close(encoder(ids[:1, :3], mask[:1, :3])[0], out[0], rtol=1e-4, atol=1e-5)
    assert bool(out.isfinite().all())
    hidden = encoder.model(input_ids=ids[:1, :3]).last_hidden_state[0]
    expected = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0)}[pooling]
    torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-5)


def test_other_families_of_encoders(tmp_path: Path) -> None:
    small = {"vocab_size": 120, "max_position_embeddings": 40}
    roberta = RobertaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, type_vocab_size=1, **small
    )
    RobertaModel(roberta).save_pretrained(tmp_path / "roberta")
    DistilBertModel(DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=16, **small)).save_pretrained(
        tmp_path / "distilbert"
    )
    ids, mask = tokens([0, 3])
    for family in ("roberta", "distilbert"):
        encoder = Encoder(EncoderConfig(name=str(tmp_path / family)), pretrained=True)
        encoder.freeze(FreezeConfig(policy="all_but_top", top_layers=1))
        cross = CrossEncoder(encoder)
        cross(pair_batch(ids, mask)).sum().backward()
        trained = {n for n, p in cross.named_parameters() if p.requires_grad}
        assert {n for n, p in cross.named_parameters() if p.grad is not None} == trained
        assert encoder.hidden == 16
        assert all(".layer.1." in n or n.startswith("head.") for n in trained)


def test_dropout_is_the_configs(tiny_encoder: Path) -> None:
    ids, mask = tokens([1, 2])
    off = Encoder(EncoderConfig(name=str(tiny_encoder)), pretrained=True).train()
    assert torch.equal(off(ids, mask), off(ids, mask))
    on = Encoder(EncoderConfig(name=str(tiny_encoder), dropout=0.5), pretrained=True).train()
    assert not torch.allclose(on(ids, mask), on(ids, mask))


def test_activation_checkpointing_gives_the_same_gradients(tiny_encoder: Path) -> None:
    grads = []
    for again in (False, True):
        config = EncoderConfig(name=str(tiny_encoder), activation_checkpointing=again)
        encoder = Encoder(config, pretrained=True).train()
        encoder(*tokens([0, 1, 2])).pow(2).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[1], grads[0])


def test_a_shape_without_weights_is_made_from_the_config_alone(tiny_encoder: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_encoder / "config.json", tmp_path)
    made = Encoder(EncoderConfig(name=str(tmp_path)), pretrained=False)
    loaded = Encoder(EncoderConfig(name=str(tiny_encoder)), pretrained=True)
    made.load_state_dict(loaded.state_dict())
    torch.testing.assert_close(made.eval()(*tokens([1])), loaded.eval()(*tokens([1])))
    with pytest.raises(ConfigError, match="safetensors"):
        Encoder(EncoderConfig(name=str(tmp_path)), pretrained=True)


def test_a_pickled_checkpoint_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_encoder / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ConfigError, match="safetensors"):
        Encoder(EncoderConfig(name=str(tmp_path)), pretrained=True)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere"])
def test_a_missing_encoder_says_what_to_give(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no such folder; give one with config.json"):
        Encoder(EncoderConfig(name=name), pretrained=True)


def test_a_checkpoint_that_lacks_weights_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    deeper = (tiny_encoder / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    shutil.copytree(tiny_encoder, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text(deeper)
    with pytest.raises(ConfigError, match=r"lacks \d+ weights .*layer\.2"):
        Encoder(EncoderConfig(name=str(tmp_path / "copy")), pretrained=True)


def test_texts_beyond_the_encoders_positions_name_the_limit(tiny_encoder: Path) -> None:
    encoder = Encoder(EncoderConfig(name=str(tiny_encoder)), pretrained=True)
    with pytest.raises(ConfigError, match=r"65 tokens exceeds the encoder's 64"):
        encoder(torch.ones(1, 65, dtype=torch.int64), torch.ones(1, 65, dtype=torch.int64))


def test_freeze_policies_and_roles(tiny_encoder: Path) -> None:
    def trained(**policy: object) -> set[str]:
        roles = parameter_roles(toy_model(tiny_encoder, freeze=FreezeConfig(**policy)))  # type: ignore[arg-type]
        assert "head" in roles.values()
        return {name for name, role in roles.items() if role == "encoder"}

    everything = trained()
    assert any(".embeddings." in name for name in everything)
    assert not any("pooler" in name for name in everything)
    top = trained(policy="all_but_top", top_layers=1)
    assert top
    assert all("encoder.layer.1." in name for name in top)
    assert trained(policy="all_but_heads") == set()
    with pytest.raises(ConfigError, match=r"^model.freeze.top_layers=3 exceeds the encoder's 2 layers"):
        trained(policy="all_but_top", top_layers=3)


def test_description_counts_every_weight_once(tiny_encoder: Path) -> None:
    model = toy_model(tiny_encoder, freeze=FreezeConfig(policy="all_but_heads"))
    told = describe(model)
    assert told["parameters"] == sum(p.numel() for p in model.parameters())
    assert told["trainable"] == told["parameters"] - told["parts"]["encoder"]["parameters"]
    assert sum(part["parameters"] for part in told["parts"].values()) == told["parameters"]
    # Memory, mean and scale of the text vectors, and four weights a platform.
    own = model.memory.vector_IH.numel() + sum(weights.numel() for weights in model.blend.buffers())
    assert told["buffer_floats"] == own + 2 * model.encoder.hidden
    frozen = train_flops_per_token(model.encoder, 16)
    assert train_flops_per_token(toy_model(tiny_encoder).encoder, 16) > 2.5 * frozen


def pair_batch(ids: torch.Tensor, mask: torch.Tensor, chunks: int = 1) -> PairBatch:
    count = len(ids)
    label = torch.arange(count).remainder(2).float()
    weight = 1.0 + torch.arange(count)
    platform = torch.arange(count).remainder(3).clamp(max=1)
    columns = (ids, mask, torch.zeros_like(ids), label, weight, platform)
    names = ("ids_NT", "mask_NT", "type_NT", "label_N", "weight_N", "platform_N")
    pairs = tuple(Pairs(**dict(zip(names, part))) for part in zip(*(c.chunk(chunks) for c in columns)))
    weight_P = torch.ones(2, dtype=torch.float64)
    return PairBatch(step=0, pairs=pairs, target_weight_P=weight_P, tokens=0, padded_tokens=0, sample_ids=())


def cross_encoder(folder: Path) -> CrossEncoder:
    torch.manual_seed(0)
    config = ModelConfig(encoder=EncoderConfig(name=str(folder)))
    return build_cross_encoder(config, pretrained=True)


def test_cross_encoder_loss_is_the_weighted_bce_of_its_scores(tiny_encoder: Path) -> None:
    model = cross_encoder(tiny_encoder)
    ids, mask = tokens(range(6))
    batch = pair_batch(ids, mask)
    pairs = batch.pairs[0]
    loss_N = pointwise_bce(model.score(ids, mask, pairs.type_NT), pairs.label_N) * pairs.weight_N
    expected = [float(loss_N[pairs.platform_N == p].sum()) for p in (0, 1)]
    assert model(batch).tolist() == pytest.approx(expected, rel=1e-5)
    assert model(pair_batch(ids, mask, chunks=3)).tolist() == pytest.approx(expected, rel=1e-5)


def test_cross_encoder_sees_segments(tiny_encoder: Path) -> None:
    model = cross_encoder(tiny_encoder)
    ids, mask = tokens([3, 7])
    types = torch.zeros_like(ids)
    types[:, 3:] = 1
    assert not torch.allclose(model.score(ids, mask, types), model.score(ids, mask, types * 0))


def test_cross_encoder_learns_a_toy_set(tiny_encoder: Path) -> None:
    model = cross_encoder(tiny_encoder)
    batch = pair_batch(*tokens(range(6)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = model(batch).sum().item()
    for _ in range(40):
        optimizer.zero_grad()
        model(batch).sum().backward()
        optimizer.step()
    assert model(batch).sum().item() < 0.2 * first


def test_config_reads_from_overrides_and_names_what_is_wrong() -> None:
    config = load_config(ModelConfig, None, ["encoder.name=x", "encoder.pooling=cls", "user.heads=8"])
    assert config.encoder.pooling == "cls"
    assert to_dict(config)["user"]["heads"] == 8
    for override, message in (
        ("encoder.pooling=maen", r"^model.encoder.pooling='maen'.*Did you mean 'mean'"),
        ("encoder.attention=flash", r"^model.encoder.attention='flash'"),
        ("user.dropout=1.0", r"^model.user.dropout=1.0"),
        ("user.heads=3", r"^model.dim=128 is not a multiple of model.user.heads=3"),
        ("freeze.policy=top", r"^model.freeze.policy='top'"),
        ("freeze.top_layers=0", r"^model.freeze.top_layers=0"),
        ("adapter.rank=0", r"^model.adapter.rank=0"),
        ("blend.texts=-1", r"^model.blend.texts=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(ModelConfig, None, ["encoder.name=x", override])


def test_standardised_texts_have_mean_0_and_deviation_1_also_after_a_cast() -> None:
    torch.manual_seed(0)
    text_NH = torch.randn(200, 6) * torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 3.0]) + 5
    module = Standardize(6)
    torch.testing.assert_close(module(text_NH), text_NH)  # until it is fitted
    module.fit(text_NH)
    module.bfloat16()
    made_NH = module(text_NH)
    assert made_NH.dtype == torch.float32
    torch.testing.assert_close(made_NH.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    varied = [0, 1, 2, 3, 5]
    torch.testing.assert_close(made_NH.std(0, unbiased=False)[varied], torch.ones(5), atol=1e-4, rtol=0)
    assert float(made_NH[:, 4].abs().max()) < 1e-3  # a constant dimension is not blown up
