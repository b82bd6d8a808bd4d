"""The loop. It reads top to bottom: evaluate, save, finish or fetch, step, log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from distdl import errors
from distdl.comm.together import alone
from distdl.engines import Applied, microstep
from distdl.keys import seed_everything
from distdl.record import append_line, put_row
from distdl.tasks import Batch
from distdl.testing.faults import point
from distdl.train.batches import Micro
from distdl.train.evaluate import evaluate, exact_sum
from distdl.train.fusing import joined, passes_of
from distdl.train.saving import begin_save, commit, settle
from distdl.train.schedule import learning_rate
from distdl.train.session import Session, StepBatch


def fit(s: Session) -> int:
    """Collective. Train from where the state stands; returns the exit code of the run.

    DONE when finished; STOPPED (all saved) or STOPPED_BEFORE_START (nothing to save) on request. Raises
    Diverged, DataError, CheckpointError on all ranks together.
    """
    while not isinstance(batch := next_step(s), int):
        train_step(s, batch)
    return batch


def next_step(s: Session) -> StepBatch | int:
    """Collective. What a step boundary has to do, then the step to be made, or the exit code of the run."""
    if s.evaluation_due and not evaluate_and_note(s):
        return stop_here(s)
    if s.save_due:
        write_checkpoint(s)
    if s.finished:
        return finish(s)
    batch = s.next_batch()
    if batch is None:
        return stop_here(s)
    if batch.all_written:
        commit(s)
    return batch


def finish(s: Session) -> int:
    """The end of the run: all steps done, or early stopping satisfied."""
    flush_row(s)
    settle(s)
    s.beat("finished")
    if s.state.step < s.plan.total_steps:
        s.console.say(
            f"stopped early at step {s.state.step}: {s.state.evals_without_gain} evaluations in a row "
            f"without a better {s.recipe.eval.metric} than {s.state.best} (eval.patience)"
        )
    return errors.DONE


def train_step(s: Session, batch: StepBatch) -> None:
    """Collective. One step of the whole world: microbatches, reduction, update, log."""
    begin_step(s)
    losses: list[tuple[Tensor, int]] = []
    if batch.total:
        passes = passes_of(s, batch.micros, apart=batch.apart)
        for i, micros in enumerate(passes):
            tensors, this = joined(s, micros, last=i == len(passes) - 1)
            seed_everything(this.groups[0].key)
            with alone():  # its own data, its own streams: no other rank need fail with it
                loss = microstep(s.engine, loss_of(s, micros[0], tensors), this, batch.total)
            if this.weight:
                losses.append((loss, len(micros)))
        s.fusing.passes_done()
    end_step(s, batch, losses)


def begin_step(s: Session) -> None:
    """Local. Before the first microbatch of a step."""
    flush_row(s)
    s.beat("step")
    point("train.step", s.state.step)


def end_step(s: Session, batch: StepBatch, losses: list[tuple[Tensor, int]]) -> None:
    """Collective. Reduce, update and log. `losses`: of each pass of this rank the loss sum and how many
    microbatches it held.
    """
    step, lr = s.state.step, learning_rate(s.recipe, s.plan, s.state.updates)
    # Where nothing counted in this step there is no gradient, and no update.
    applied = s.engine.apply(lr, s.plan.counts(step)) if batch.total else Applied(False, 0.0)
    norm = applied.grad_norm
    s.state.step += 1
    s.state.samples += s.plan.step_size(step)
    s.state.updates += applied.updated
    diverging = not math.isfinite(norm) and not applied.rescaled
    s.state.nonfinite_in_row = s.state.nonfinite_in_row + 1 if diverging else 0
    s.beat("step")
    if not s.stepped:
        s.stepped = True
        s.event("first_step")
    log(s, batch, losses, lr, norm)
    if applied.rescaled:
        s.event("loss_scale_lowered")
    if diverging:
        note_nonfinite(s, norm)


def loss_of(s: Session, first: Micro, batch: Batch) -> Callable[[nn.Module], Tensor]:
    """The loss of one pass as a function of the model. `first`: its first microbatch, and its only one where
    state is carried.
    """
    if s.carry is not None:
        return s.carry.loss(s.state.step, first.number, first.weight, batch)
    return lambda model: s.task.loss_sum(model, batch)


def log(s: Session, batch: StepBatch, losses: list[tuple[Tensor, int]], lr: float, norm: float) -> None:
    """Collective on logging steps, which are the same on all ranks; nothing on the others.

    `losses`: of each pass of this rank the loss sum and how many microbatches it held.
    """
    step, every = s.state.step, s.recipe.track.every_steps
    if step % every and step not in (1, s.plan.total_steps):
        s.console.step(step, None)
        return
    # One row a microbatch, as all ranks expect: the sum of a pass stands in its first.
    mine = [x for loss, n in losses for x in (float(loss), *[0.0] * (n - 1))]
    rows = torch.tensor(mine, dtype=torch.float64).reshape(-1, 1)
    # A step that counts nothing has run no microbatch on any rank.
    parts = s.world.gather_rows(rows, s.plan.counts(step - 1)).flatten().tolist() if batch.total else []
    # fsum is exact, so the logged loss does not depend on how the microbatches were shared out.
    loss = exact_sum(parts) / batch.total if batch.total else 0.0
    now = time.perf_counter()
    rate = (s.state.samples - s.clock_samples) / max(now - s.clock, 1e-9)
    left = (s.plan.total_steps - step) * s.plan.global_batch
    s.row = {
        "step": step,
        "epoch": step / s.plan.steps_per_epoch,
        "loss": loss,
        "lr": lr,
        "grad_norm": norm,
        "samples": s.state.samples,
        "samples_per_s": rate,
        "time": time.time(),
    }
    s.clock, s.clock_samples = now, s.state.samples
    s.console.step(step, s.row | {"eta_s": left / rate})


def flush_row(s: Session) -> None:
    """Rank 0 appends the waiting row of metrics; it waits so that an evaluation can add to it."""
    if s.row and s.world.is_main:
        resumed = s.row["step"] == s.resumed_step
        (put_row if resumed else append_line)(s.directory.metrics, s.row)
    s.row = {}


def note_nonfinite(s: Session, norm: float) -> None:
    """Report a skipped step; raise Diverged, on all ranks alike, after too many in a row."""
    state, limit = s.state, s.recipe.train.max_nonfinite_steps
    s.console.say(
        f"step {state.step}: gradient norm {norm}; skipped on all ranks ({state.nonfinite_in_row} in a row)"
    )
    s.event("nonfinite", grad_norm=norm, in_row=state.nonfinite_in_row)
    if state.nonfinite_in_row >= limit:
        first = state.step - limit + 1
        raise errors.Diverged(
            f"the gradient was not finite in {limit} steps in a row, {first} to {state.step}"
            f"{' (from the first step on)' if first == 1 else ''}. Check the data and the loss, lower "
            "optim.lr, set optim.clip_norm or a longer schedule.warmup_steps; train.max_nonfinite_steps "
            "sets the limit"
        )


def evaluate_and_note(s: Session) -> bool:
    """Collective. Evaluate, note the metric; False where a stop was asked for before it was finished."""
    s.beat("evaluating")
    begin = time.perf_counter()
    metrics = evaluate(s, s.stop_agreed)
    if metrics is None:
        return False
    best = s.state.note_metric(metrics[s.recipe.eval.metric], s.recipe.eval.mode, s.recipe.eval.min_delta)
    s.state.evaluated_step = s.state.step
    s.row = {"step": s.state.step} | s.row | {f"eval_{k}": v for k, v in metrics.items()}
    text = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items())
    s.console.say(
        f"step {s.state.step}: evaluated {s.plan.eval_rows:,} rows: {text}{' (best)' if best else ''}"
    )
    s.metrics = metrics
    s.not_training(time.perf_counter() - begin)
    return True


def write_checkpoint(s: Session) -> None:
    """Collective. Save at this boundary; the metrics of the step are written before it can be resumed."""
    flush_row(s)
    begin_save(s)


def stop_here(s: Session) -> int:
    """Collective. Leave together on request: save what is not saved yet, and say how it stands."""
    flush_row(s)
    asked = {rank: name for rank, name in enumerate(s.world.gather(s.stop.signal)) if name}
    rank, name = next(iter(asked.items()), (None, None))
    if s.state.step == 0:
        s.event("stop", signal=name, asked_of_rank=rank, saved=None)
        s.console.say("stopped before the first step; there was nothing to save")
        return errors.STOPPED_BEFORE_START
    if s.saved_step != s.state.step:
        write_checkpoint(s)
    settle(s)
    s.event("stop", signal=name, asked_of_rank=rank, saved=s.saved_step)
    s.console.say(f"stopped on request at step {s.state.step}, everything saved; start again to go on")
    return errors.STOPPED
