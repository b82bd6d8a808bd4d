"""Keys for everything random: (seed, purpose, numbers) -> 64 bits, the same on every rank and machine."""

from __future__ import annotations

import hashlib
import random


def key(seed: int, purpose: str, *numbers: int) -> int:
    """A 64-bit key for one random choice.

    `purpose` keeps uses apart ("dropout", "augment", "order"); `numbers` say which one (step, microbatch).
    No rank, worker or process id ever enters here: that is what makes a run independent of them.
    """
    text = f"{seed}/{purpose}/" + "/".join(map(str, numbers))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def seed_everything(value: int) -> None:
    """Seed every stream that a model may draw from: torch's on all devices, numpy's, Python's."""
    import numpy as np
    import torch

    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)
