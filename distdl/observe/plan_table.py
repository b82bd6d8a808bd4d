"""A plan in words."""

from __future__ import annotations

from distdl.plan import Plan
from distdl.samples import PACKED


def plan_rows(p: Plan) -> dict[str, str]:
    """Name -> value, in the order a person asks: where, how the batch is shared, how long, how often."""
    shares = sorted(set(p.shares), reverse=True)
    each = " or ".join(map(str, shares))
    balance = f" ({p.balance:.0%} of the processes' time is used)" if p.balance < 1 else ""
    rows = {
        "processes": f"{p.world_size} on {p.nodes} node(s), engine {p.engine}",
        "device": f"{p.device}, {p.precision}, {p.threads} CPU thread(s) a process",
        "step": f"{p.global_batch} samples = {p.microbatches} microbatches of {p.micro_batch}",
        "each process": f"{each} microbatches a step{balance}",
        "a pass": _pass(p),
        "epoch": f"{p.train_rows:,} rows = {p.steps_per_epoch} steps",
        "order": p.order + (f" by {p.sequence}" if p.order in ("length_bucketed", *PACKED) else ""),
        "last step of an epoch": f"{p.last_batch} samples",
        "run": f"{p.total_steps:,} steps ({p.total_steps / p.steps_per_epoch:.2f} epochs)",
        "evaluation": f"{p.eval_rows:,} rows, {_every(p.eval_every)}",
        "checkpoint": _every(p.save_every),
    }
    if p.dropped_rows:
        why = "as many in each lane" if p.order == "lanes" else "data.drop_last"
        rows["dropped"] = f"{p.dropped_rows} rows an epoch ({why})"
    return rows


def _pass(p: Plan) -> str:
    """What one forward and backward holds."""
    if p.fuse > 1:
        return f"up to {p.fuse} microbatches as one forward and backward"
    return "1 microbatch" + (f" ({p.separate})" if p.separate else "")


def _every(steps: int | None) -> str:
    return f"every {steps} steps and at the end" if steps else "at the end"
