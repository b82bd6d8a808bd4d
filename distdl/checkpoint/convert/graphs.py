"""A model as a graph: ONNX, checked with onnxruntime, and torch.export, checked by running it."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distdl.errors import CheckpointError, EnvironmentProblem

TOLERANCE = 1e-4
"""Largest absolute difference between model and graph, for outputs of about 1; of larger ones, relative."""

_LESS = "needs {missing}, which cannot be imported ({error}): pip install 'distdl[onnx]'"


def to_onnx(
    model: nn.Module, export_args: tuple[Tensor, ...], check_args: tuple[Tensor, ...]
) -> Callable[[Path], float]:
    """Writes an ONNX file and returns the largest difference between its outputs, by onnxruntime, and the
    model's, on `check_args`: as `export_args`, but for another number of rows, which is free in the graph.

    Raises EnvironmentProblem without the libraries, CheckpointError where it cannot be exported or differs.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch needs it
    except ImportError as error:
        raise EnvironmentProblem(
            f"--to onnx {_LESS.format(missing='onnx, onnxscript and onnxruntime', error=error)}"
        ) from error

    def write(out: Path) -> float:
        with _quiet(), _explained("ONNX"):
            program = torch.onnx.export(
                model, export_args, dynamo=True, dynamic_shapes=_free_rows(export_args), verbose=False
            )
            assert program is not None
            program.save(str(out), external_data=False)
        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        given = {i.name: a.numpy() for i, a in zip(session.get_inputs(), check_args, strict=True)}
        return _compare([torch.from_numpy(o) for o in session.run(None, given)], model, check_args)

    return write


def to_program(
    model: nn.Module, export_args: tuple[Tensor, ...], check_args: tuple[Tensor, ...]
) -> Callable[[Path], float]:
    """Writes what `torch.export.load` reads; otherwise as `to_onnx`."""

    def write(out: Path) -> float:
        with _quiet(), _explained("torch.export"):
            program = torch.export.export(model, export_args, dynamic_shapes=_free_rows(export_args))
            buffer = io.BytesIO()  # torch wants the name to end in .pt2
            torch.export.save(program, buffer)
            out.write_bytes(buffer.getbuffer())
            buffer.seek(0)
            found = torch.export.load(buffer).module()(*check_args)
        return _compare(_flat(found), model, check_args)

    return write


def _free_rows(args: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Any number of rows (dimension 0), and for tokens, and series that come with lengths, any length, where
    the model allows it.
    """
    auto = torch.export.Dim.AUTO
    with_lengths = any(arg.ndim == 1 for arg in args)
    long = [arg.ndim == 2 or (arg.ndim == 3 and with_lengths) for arg in args]
    return tuple(dict.fromkeys(range(2 if is_long else 1), auto) for is_long in long)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say about themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _explained(kind: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # exporters raise what they like; the first line says what it was
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{kind} cannot express this model: {first}. Export the weights with --to safetensors instead"
        ) from error


@torch.no_grad()
def _compare(found: list[Tensor], model: nn.Module, args: tuple[Tensor, ...]) -> float:
    worst = 0.0
    expected = _flat(model(*args))
    for ours, theirs in zip(expected, found, strict=True):
        gap = float((ours - theirs).abs().max())
        worst = max(worst, gap)
        allowed = TOLERANCE * max(1.0, float(ours.abs().max()))
        if not gap <= allowed:
            raise CheckpointError(
                f"the graph differs from the model by {gap:.3g}; at most {allowed:.3g} is float noise"
            )
    return worst


def _flat(outputs: Any) -> list[Tensor]:
    return [t.detach() for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
