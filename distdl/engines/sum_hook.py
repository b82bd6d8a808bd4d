"""DDP's communication hook. A file of its own, since DDP reads the annotations as objects, not as strings."""

from typing import Any

import torch
import torch.distributed as dist


def sum_gradients(
    _state: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Sum, where DDP by itself would average: the loss is divided by the step's total count already."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None

    def tensor(future: torch.futures.Future[Any]) -> torch.Tensor:
        reduced: torch.Tensor = future.value()[0]
        return reduced

    summed: torch.futures.Future[torch.Tensor] = work.get_future().then(tensor)
    return summed
