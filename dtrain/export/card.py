"""The model card of an export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["model_card"]


def model_card(name: str, facts: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> str:
    """Markdown with YAML front matter: what the encoder is, what it was trained on, how well it ranks.

    `facts` are the run's (encoder, platforms with language and split fingerprint, seed, steps, versions); `metrics` is
    the run's metrics.json, None when it was not evaluated.
    """
    platforms: Mapping[str, Mapping[str, Any]] = facts["platforms"]
    languages = sorted({str(p["language"]) for p in platforms.values() if p["language"]})
    lines = ["---", "library_name: sentence-transformers", "pipeline_tag: sentence-similarity"]
    lines += ["tags: [dtrain, recommendation, bert]"]
    lines += [f"language: [{', '.join(languages)}]"] if languages else []
    lines += ["---", "", f"# {name}", ""]
    lines += [
        f"`{facts['encoder']}`, fine-tuned by dtrain {facts['versions']['dtrain']} jointly on the interactions of "
        f"{len(platforms)} platforms: {', '.join(platforms)}. The encoder turns an item's text into a vector; "
        "`recommender/` holds the rest of the model (id vectors, adapters, user encoder) and every item's vector.",
        "",
        "| platform | language | users | items | training rows | split fingerprint |",
        "|---|---|---|---|---|---|",
    ]
    for platform, p in platforms.items():
        lines.append(
            f"| {platform} | {p['language']} | {p['users']:,} | {p['items']:,} | {p['train_rows']:,} "
            f"| `{p['split_fingerprint']}` |"
        )
    lines += [
        "",
        f"Checkpoint of step {facts['step']}, seed {facts['seed']}; manifest `{facts['manifest_fingerprint']}`, "
        f"tokenizer `{facts['tokenizer_fingerprint']}`.",
        "",
        "## Test metrics",
        "",
    ]
    return "\n".join(lines + _metrics(metrics)) + _USE.format(name=name)


def _metrics(metrics: Mapping[str, Any] | None) -> list[str]:
    if metrics is None:
        return ["Not evaluated: run `dtrain evaluate` on the run, then export again."]
    platforms = metrics["platforms"]
    baselines = sorted({b for p in platforms.values() for b in p["baselines"]})
    lines = [
        "NDCG@10, full catalogue, seen items excluded, ties against the target.",
        "",
        "| platform | this model | " + " | ".join(baselines) + " | recall@10 |",
        "|---|---|" + "---|" * (len(baselines) + 1),
    ]
    for name, platform in platforms.items():
        others = [platform["baselines"].get(b, {}).get("test", {}).get("ndcg@10") for b in baselines]
        cells = [_number(platform["test"]["ndcg@10"]), *map(_number, others), _number(platform["test"]["recall@10"])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


_USE = """

## Use

```python
from transformers import AutoModel
encoder = AutoModel.from_pretrained("{name}")           # the text encoder alone

import dtrain
model = dtrain.load("{name}")
model.recommend("PLATFORM", history=["ITEM", "ITEM"], k=10)
```
"""
