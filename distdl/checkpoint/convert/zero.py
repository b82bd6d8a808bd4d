"""Folders that DeepSpeed wrote at ZeRO stages 0 to 3: fp32 weights and optimiser state by name.

    latest                                              the newest tag
    TAG/mp_rank_00_model_states.pt                      names, shapes, buffers (stage 3: one a rank)
    TAG/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt    a rank's part of the flat fp32 weights and state

The layout is that of deepspeed/utils/zero_to_fp32.py (0.19.8), which reads the weights alone. Stages 1 and 2
cut each group's flat vector, all parameters end to end, into one part a rank. Stage 3 cuts each parameter,
filled up to a multiple of the ranks, so that rank r has the rth part of every parameter, end to end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distdl.checkpoint.convert.pickles import load_pickle
from distdl.errors import CheckpointError, Corrupt, Incomplete

_WHAT = "DeepSpeed's files are made by torch.save"
State = dict[str, dict[str, Tensor]]


def folder_of(path: Path) -> Path | None:
    """The folder with the model states: `path`, or what its `latest` names. None: not DeepSpeed's."""
    if _ranked(path, "model"):
        return path
    latest = path / "latest"
    if not latest.is_file():
        return None
    tag = latest.read_text().strip()
    if Path(tag).name != tag or not (path / tag).is_dir():
        raise Incomplete(f"{latest} names {tag!r}, and {path} has no such folder")
    return path / tag


def read(path: Path, trusted: bool) -> tuple[dict[str, Tensor], State, int]:
    """Weights (fp32), optimiser state by parameter, and the stage, of one tag's folder.

    Raises CheckpointError where pickles are not trusted; Incomplete where a rank's file is missing; Corrupt.
    """
    models = [load_pickle(file, _WHAT, trusted) for file in _ranked(path, "model")]
    parts = [load_pickle(file, _WHAT, trusted)["optimizer_state_dict"] for file in _ranked(path, "optim")]
    if not models:
        raise Incomplete(f"{path}: no *_model_states.pt")
    model = models[0]
    if not parts:  # stage 0 keeps whole tensors, and the optimiser beside them
        return dict(model["module"]), {}, 0
    stage, ranks = int(parts[0]["zero_stage"]), _ranks(parts[0]["partition_count"])
    if len(parts) != ranks:
        raise Incomplete(f"{path}: {ranks} ranks wrote it, and files of {len(parts)} are there")
    try:
        weights, state = (_stage3 if stage == 3 else _stage12)(model["param_shapes"], parts)
    except (KeyError, RuntimeError, IndexError) as error:
        raise Corrupt(f"{path}: its parts do not make up the parameters: {error}") from error
    weights |= _frozen(models, stage)
    weights |= {name: model["module"][name] for name in model["buffer_names"]}
    for name, same in model.get("shared_params", {}).items():
        if same in weights:
            weights[name] = weights[same]
    return weights, state, stage


def _ranked(path: Path, which: str) -> list[Path]:
    """The files of one kind in the order of their ranks."""
    found = {f: re.search(r"zero_pp_rank_(\d+)_", f.name) for f in path.glob(f"*_{which}_states.pt")}
    if any(re.search(r"mp_rank_0*[1-9]", f.name) for f in found):
        raise CheckpointError(f"{path}: saved with model parallelism, which is not read here")
    return sorted(found, key=lambda f: int(match[1]) if (match := found[f]) else -1)


def _ranks(count: Any) -> int:
    return max(count) if isinstance(count, list) else int(count)


def _stage12(groups: list[Mapping[str, Any]], parts: list[Any]) -> tuple[dict[str, Tensor], State]:
    weights: dict[str, Tensor] = {}
    state: State = {}
    paddings = parts[0].get("param_alignment_paddings")
    for g, shapes in enumerate(groups):
        gaps = paddings[g] if paddings is not None else [0] * len(shapes)
        spans, at = [], 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            spans.append((name, shape, at))
            at += math.prod(shape) + gap
        flat = torch.cat([part["single_partition_of_fp32_groups"][g] for part in parts])
        weights |= {name: _cut(flat, begin, shape) for name, shape, begin in spans}
        for slot, values in _slots([part["base_optimizer_state"]["state"].get(g, {}) for part in parts]):
            whole = torch.cat(values) if values[0].ndim else values[0]
            for name, shape, begin in spans:
                state.setdefault(name, {})[slot] = _cut(whole, begin, shape) if whole.ndim else whole
    return weights, state


def _stage3(groups: list[Mapping[str, Any]], parts: list[Any]) -> tuple[dict[str, Tensor], State]:
    shapes = {name: shape for group in groups for name, shape in group.items()}
    weights = _stage3_cut(shapes, [torch.cat(list(part["fp32_flat_groups"])) for part in parts])
    state: State = {name: {} for name in shapes}
    bases = [part["optimizer_state_dict"]["state"] for part in parts]
    for slot, firsts in _slots([base.get(0, {}) for base in bases]):
        if firsts[0].ndim == 0:
            whole = dict.fromkeys(shapes, firsts[0])
        else:
            whole = _stage3_cut(shapes, [torch.cat([base[g][slot] for g in sorted(base)]) for base in bases])
        for name in shapes:
            state[name][slot] = whole[name]
    return weights, {name: slots for name, slots in state.items() if slots}


def _stage3_cut(shapes: Mapping[str, Any], flats: list[Tensor]) -> dict[str, Tensor]:
    result, at = {}, 0
    for name, shape in shapes.items():
        each = -(-math.prod(shape) // len(flats))
        result[name] = _cut(torch.cat([flat.narrow(0, at, each) for flat in flats]), 0, shape)
        at += each
    return result


def _cut(flat: Tensor, begin: int, shape: Any) -> Tensor:
    return flat.narrow(0, begin, math.prod(shape)).view(*shape)


def _slots(states: list[Mapping[str, Any]]) -> Iterator[tuple[str, list[Tensor]]]:
    """Each slot, and every rank's value; a number (a step count) becomes a tensor without a dimension."""
    for slot, value in states[0].items():
        if isinstance(value, Tensor | int | float):
            yield slot, [torch.as_tensor(s[slot], dtype=_dtype(s[slot])) for s in states]


def _dtype(value: Any) -> torch.dtype:
    return value.dtype if isinstance(value, Tensor) else torch.float32


def _frozen(models: list[Any], stage: int) -> dict[str, Tensor]:
    shapes = models[0].get("frozen_param_shapes") or {}
    if stage < 3:
        return {name: models[0]["frozen_param_fragments"][name] for name in shapes}
    fragments = [model["frozen_param_fragments"] for model in models]
    return {name: _cut(torch.cat([f[name] for f in fragments]), 0, s) for name, s in shapes.items()}
