"""The card of a model on Hugging Face's hub: what it was trained on, how, and how well. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from distdl.checkpoint.manifest import Manifest

_PIPELINES = {"image_classification": "image-classification", "text_classification": "text-classification"}


def render_card(manifest: Manifest, *, ema: bool) -> str:
    """README.md of the folder: metadata that the hub reads, then text. From the manifest alone."""
    said = manifest.mathematics
    data, task = said.get("data", {}), said.get("task", {}).get("name", "")
    lines = ["---", "library_name: pytorch", "tags: [distdl]"]
    if task in _PIPELINES:
        lines.append(f"pipeline_tag: {_PIPELINES[task]}")
    if data.get("name"):
        lines.append(f"datasets: [{json.dumps(data['name'])}]")
    metric = said.get("eval", {}).get("metric")
    if metric:
        lines.append(f"metrics: [{json.dumps(metric)}]")
    weights = "an average of the weights over training (EMA)" if ema else "the weights"
    lines += [
        "---",
        "",
        f"# {said.get('model', {}).get('name', 'model')} on {data.get('name') or 'a dataset of its own'}",
        "",
        f"Trained with distdl {manifest.versions.get('distdl', '')} to step {manifest.step}; "
        f"`model.safetensors` has {weights}, by the names of the model's `state_dict`.",
        "",
        "| | |",
        "|---|---|",
        *_rows(manifest, said, metric),
        "",
        "```python",
        "from safetensors.torch import load_file",
        "",
        'model.load_state_dict(load_file("model.safetensors"))',
        "```",
        "",
        "## The recipe's mathematics",
        "",
        "```json",
        json.dumps(said, indent=1),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _rows(manifest: Manifest, said: Mapping[str, Any], metric: str | None) -> list[str]:
    state = manifest.train_state
    facts = {
        "task": said.get("task", {}).get("name"),
        "split trained on": said.get("data", {}).get("train_split"),
        "fingerprint of the data": manifest.data_fingerprint,
        "recipe hash": manifest.recipe_hash,
        "seed": said.get("train", {}).get("seed"),
        "samples seen": state.get("samples"),
        f"best {metric} (step {state.get('best_step')})": state.get("best"),
    }
    return [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
