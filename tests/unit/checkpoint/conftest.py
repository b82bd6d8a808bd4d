"""What the checkpoint tests share: a way to save one step in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_support import SaveStep, save_at


@pytest.fixture
def save_step(tmp_path: Path) -> SaveStep:
    """`save_at` in tmp_path, with a path for its answer."""

    def run(step: int, *args: object, **named: object) -> Path:
        path = save_at(tmp_path, step, *args, **named)  # type: ignore[arg-type]
        assert isinstance(path, Path)
        return path

    return run
