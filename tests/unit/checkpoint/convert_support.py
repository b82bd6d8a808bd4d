"""A small model after a few steps, what its state is called here, and the same by other libraries' hands."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distdl.checkpoint.convert.build import Imported, import_source
from distdl.checkpoint.convert.sources import open_source
from distdl.comm import World
from distdl.errors import CheckpointError
from distdl.models.cnn5 import Cnn5


def fresh(seed: int = 0) -> Cnn5:
    torch.manual_seed(seed)
    return Cnn5(1, 10, width=4, hidden=6)


def images(seed: int = 1) -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def trained(steps: int = 2) -> tuple[Cnn5, torch.optim.AdamW]:
    """With one group of parameters, as most people have it."""
    model = fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        model(images(step)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {f"model/{name}": t.detach().clone() for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state[parameter].items():
            found[f"optim/{slot}/{name}"] = value.clone()
    return found


def brought_in(path: Path, *, trust: bool = True, **more: Any) -> Imported:
    """`path` imported into a model whose own weights are others."""
    source = open_source(path, trust_pickle=trust)
    return import_source(source, fresh(seed=9), more.get("renamings", {}), more.get("ignore", ()))


def write_with_others(world: World, folder: str) -> dict[str, dict[str, Tensor]]:
    """Collective. DCP with FSDP2, DeepSpeed at stages 1 to 3: their files in `folder`, and for each the whole
    state as the library itself tells it; of DeepSpeed's, which does not tell all of its optimiser's, the
    weights. All have made one step, on one batch.
    """
    warnings.simplefilter("ignore")  # theirs, about themselves
    told = {"dcp": _write_dcp(Path(folder) / "dcp")}
    for stage in (1, 2, 3):
        told[f"zero{stage}"] = _write_zero(Path(folder) / f"zero{stage}", stage, world)
    return told


def _write_dcp(folder: Path) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fresh()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(images()).square().mean().backward()
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": state, "epoch": 3}, checkpoint_id=folder)
    weights, state = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    return {f"model/{n}": t.clone() for n, t in weights.items()} | {
        f"optim/{slot}/{n}": t.clone()
        for n, slots in state["state"].items()  # type: ignore[union-attr]
        for slot, t in slots.items()  # type: ignore[union-attr]
    }


def _write_zero(folder: Path, stage: int, world: World) -> dict[str, Tensor]:
    from distdl.engines.zero_library import load_deepspeed, start

    device = torch.device("cpu")
    library = load_deepspeed(f"zero{stage}", device)
    from deepspeed.utils import safe_get_full_fp32_param

    model = fresh()
    wide, narrow = ([p for p in model.parameters() if (p.ndim > 1) == yes] for yes in (True, False))
    optimizer = torch.optim.AdamW([{"params": wide}, {"params": narrow}], lr=0.01)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine = start(library, model, optimizer, config, device)
    engine.backward(engine(images()).square().mean())
    engine.step()
    engine.save_checkpoint(str(folder))
    told = {f"model/{name}": t.clone() for name, t in model.named_buffers()}
    weights = {f"model/{name}": safe_get_full_fp32_param(p).clone() for name, p in model.named_parameters()}
    return told | weights


def read_others(world: World, folder: str) -> dict[str, tuple[dict[str, Tensor], list[str]]]:
    """What was imported of each, and the notes. Not in the process of the tests: to read its pickles is to
    import DeepSpeed.
    """
    found = {path.name: brought_in(path) for path in sorted(Path(folder).iterdir())}
    return {name: (one.tensors, one.notes) for name, one in found.items()}


def read_error(world: World, path: str) -> str:
    """What is said of a folder that cannot be read."""
    try:
        brought_in(Path(path))
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return ""
