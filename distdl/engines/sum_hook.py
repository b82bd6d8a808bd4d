"""DDP's communication hook. A file of its own, since DDP reads the annotations as objects, not as strings."""

from typing import Any

import torch
import torch.distributed as dist


class Reduction:
    """State of the hook: whether the last bucket of this step has been sent on its way."""

    def __init__(self) -> None:
        self.complete = False


def sum_gradients(
    state: Reduction,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Sum, where DDP by itself would average: the loss is divided by the step's total count already."""
    state.complete = state.complete or bucket.is_last()
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None

    def tensor(future: torch.futures.Future[Any]) -> torch.Tensor:
        reduced: torch.Tensor = future.value()[0]
        return reduced

    summed: torch.futures.Future[torch.Tensor] = work.get_future().then(tensor)
    return summed
