"""`distdl ckpt ...`: look at, check, compare, convert and clear away checkpoints. `ls` imports no torch.

What reads checkpoints is imported inside the commands, so that the others do not wait for it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from distdl import errors
from distdl.errors import CheckpointError

if TYPE_CHECKING:
    from distdl.checkpoint.convert.overview import Row
    from distdl.checkpoint.folders import Place

ckpt_app = typer.Typer(
    no_args_is_help=True, help="Look at, check, compare, convert and clear away checkpoints."
)

_Texts = Optional[list[str]]  # noqa: UP045 - typer reads these at run time on Python 3.10
_Number = Optional[int]  # noqa: UP045
_Seconds = Optional[float]  # noqa: UP045
_Path = Optional[Path]  # noqa: UP045

Run = Annotated[
    str, typer.Argument(metavar="RUN", help="A run directory, or the folder or URL of its checkpoints.")
]
Ckpt = Annotated[
    str, typer.Argument(metavar="CKPT", help="A checkpoint; or a RUN, for its newest valid one.")
]
Ckpts = Annotated[list[str], typer.Argument(metavar="CKPT...", help="Checkpoints, or RUNs.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Map = Annotated[_Texts, typer.Option("--map", help="old=new; * stands for any text; repeatable.")]
Ignore = Annotated[
    _Texts, typer.Option("--ignore", help="Tensors left as the model has them; * as in --map; repeatable.")
]
NewCkpt = Annotated[
    str, typer.Option("--out", help="A run directory, a folder of checkpoints, or the new one's own name.")
]


@ckpt_app.command("ls")
def ls_command(run: Run, as_json: AsJson = False) -> int:
    """List a run's checkpoints, newest first. Sizes are compared, no hashes: `verify` does that."""
    from distdl.checkpoint.convert.locate import checkpoints_of
    from distdl.checkpoint.convert.overview import overview
    from distdl.checkpoint.folders import shown

    folder = checkpoints_of(run)
    rows = overview(folder)
    if as_json:
        _json({"checkpoints": shown(folder), "rows": [row.as_dict() for row in rows]})
    elif rows:
        _table(("step", "saved", "size", "engine", "world", "valid"), map(_ls_cells, rows))
    else:
        _print([f"{shown(folder)}: no checkpoints"])
    return errors.DONE


@ckpt_app.command("show")
def show_command(
    checkpoint: Ckpt,
    norms: Annotated[bool, typer.Option(help="Also the 2-norm of each tensor, which reads them all.")] = True,
    as_json: AsJson = False,
) -> int:
    """Print what a checkpoint holds: every tensor with its type, shape and norm."""
    from distdl.checkpoint.convert.compare import describe
    from distdl.checkpoint.convert.locate import find_checkpoint
    from distdl.checkpoint.folders import shown
    from distdl.checkpoint.open import open_checkpoint

    found = open_checkpoint(find_checkpoint(checkpoint))
    tensors = list(describe(found, norms=norms))
    said = found.manifest
    head = {
        "checkpoint": shown(found.path),
        "step": said.step,
        "saved_at": said.saved_at,
        "engine": said.engine,
        "world_size": said.world_size,
        "recipe_hash": said.recipe_hash,
        "bytes": said.nbytes,
        "versions": said.versions,
    }
    if as_json:
        _json(head | {"train_state": said.train_state, "tensors": [vars(t) for t in tensors]})
        return errors.DONE
    _print([f"{k}: {v}" for k, v in head.items() if k != "versions"])
    _print([f"versions: {', '.join(f'{k} {v}' for k, v in said.versions.items())}"])
    cells = (
        (t.name, t.dtype, str(t.shape), "" if t.norm is None else f"{t.norm:.6g}", _size(t.bytes))
        for t in tensors
    )
    _table(("tensor", "dtype", "shape", "norm", "size"), cells)
    return errors.DONE


@ckpt_app.command("verify")
def verify_command(checkpoints: Ckpts, as_json: AsJson = False) -> int:
    """Read and hash every file; says what is damaged and ends with 4 if anything is.

    Of a RUN all checkpoints are verified, not the newest alone.
    """
    from distdl.checkpoint.folders import shown
    from distdl.checkpoint.read import verify

    verdicts: dict[str, str] = {}
    for place in (place for text in checkpoints for place in _all_of(text)):
        try:
            verify(place)
            verdicts[shown(place)] = ""
        except CheckpointError as error:  # noqa: PERF203 - hashing takes far longer than a try
            verdicts[shown(place)] = str(error)
    damaged = any(verdicts.values())
    if as_json:
        _json({"valid": not damaged, "checkpoints": {k: v or None for k, v in verdicts.items()}})
    else:
        _print([wrong or f"{place}: whole" for place, wrong in verdicts.items()])
    return errors.CHECKPOINT if damaged else errors.DONE


@ckpt_app.command("diff")
def diff_command(before: Ckpt, after: Ckpt, as_json: AsJson = False) -> int:
    """Print in what two checkpoints differ: keys of the recipe, tensors, largest absolute differences."""
    from distdl.checkpoint.convert.compare import compare
    from distdl.checkpoint.convert.locate import find_checkpoint
    from distdl.checkpoint.folders import shown
    from distdl.checkpoint.open import open_checkpoint
    from distdl.recipe import differences

    a, b = (open_checkpoint(find_checkpoint(text)) for text in (before, after))
    recipe = differences(a.manifest.mathematics, b.manifest.mathematics)
    found = compare(a, b, recipe)
    if as_json:
        _json({"a": shown(a.path), "b": shown(b.path)} | found.as_dict())
        return errors.DONE
    _print([f"{shown(a.path)} -> {shown(b.path)}"])
    _print([f"recipe: {line}" for line in found.recipe])
    _print([f"added: {name}" for name in found.added] + [f"removed: {name}" for name in found.removed])
    cells = ((c.name, "" if c.largest is None else f"{c.largest:.6g}", c.what) for c in found.changed)
    if found.changed:
        _table(("changed", "largest difference", ""), cells)
    _print([f"{found.same} tensors are the same"])
    return errors.DONE


@ckpt_app.command("export")
def export_command(
    checkpoint: Ckpt,
    to: Annotated[
        Literal["safetensors", "torch", "onnx", "torch_export", "hf_dataset_card"],
        typer.Option(help="What to make of it."),
    ],
    out: Annotated[_Path, typer.Option(help="What to write; default: a name from the step, here.")] = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="Averaged weights in the place of the last ones.")
    ] = False,
    recipe: Annotated[
        _Path, typer.Option(help="For graphs: the recipe; default: that of the checkpoint's run directory.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Write the model's weights, nothing else, for others to read. A graph is checked against the model."""
    from distdl.cli.convert import export

    facts = export(checkpoint, to, out, ema, recipe)
    difference = facts.get("largest_difference")
    checked = "" if difference is None else f"; differs from the model by {difference:.3g} at most"
    _tell(as_json, facts, f"{facts['out']}: {facts['tensors']} tensors{checked}")
    return errors.DONE


@ckpt_app.command("import")
def import_command(
    source: Annotated[Path, typer.Argument(help="A file or a folder of another library.")],
    recipe: Annotated[Path, typer.Option(help="The recipe whose model it is.")],
    out: NewCkpt,
    renamings: Map = None,
    ignore: Ignore = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Load pickles, which can run any code.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Make a checkpoint, at step 0, of what torch, DCP, DeepSpeed, Accelerate or Lightning wrote."""
    from distdl.cli.convert import import_

    facts = import_(source, recipe, out, dict(_pair(t) for t in renamings or ()), ignore or (), trust_pickle)
    made = f"{facts['checkpoint']}: {facts['weights']} weights and {facts['slots']} optimiser tensors"
    _tell(as_json, facts, made, f"from {facts['kind']}", *facts["notes"])
    return errors.DONE


@ckpt_app.command("average")
def average_command(checkpoints: Ckpts, out: NewCkpt, as_json: AsJson = False) -> int:
    """Make a checkpoint with the mean of the weights of several; step and recipe are the last one's."""
    from distdl.cli.convert import average

    facts = average(checkpoints, out)
    _tell(as_json, facts, f"{facts['checkpoint']}: the mean of {len(checkpoints)}")
    return errors.DONE


@ckpt_app.command("prune")
def prune_command(
    run: Run,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")
    ] = False,
    keep: Annotated[_Number, typer.Option(min=1, help="Newest to keep; default: the recipe's.")] = None,
    keep_best: Annotated[_Number, typer.Option(min=0, help="Best by eval.metric to keep.")] = None,
    keep_every_steps: Annotated[_Number, typer.Option(min=1, help="Keep steps divisible by it.")] = None,
    keep_every_s: Annotated[_Seconds, typer.Option(min=0, help="Keep one each so many seconds.")] = None,
    as_json: AsJson = False,
) -> int:
    """Remove checkpoints that section checkpoint would not keep. Refused while the run is active."""
    from distdl.checkpoint.convert.overview import removable

    asked = {
        "last": keep,
        "best": keep_best,
        "every_steps": keep_every_steps,
        "every_s": keep_every_s,
    }
    removed = removable(run, {k: v for k, v in asked.items() if v is not None}, remove=not dry_run)
    if as_json:
        _json({"dry_run": dry_run, "removed": removed})
    else:
        word = "would remove" if dry_run else "removed"
        _print([f"{word} {place}" for place in removed] or ["nothing to remove"])
    return errors.DONE


def _all_of(text: str) -> list[Place]:
    """The one checkpoint that is named, or all of a run's."""
    from distdl.checkpoint.convert.locate import checkpoints_of, find_checkpoint, is_one
    from distdl.checkpoint.read import step_directories

    if is_one(text):
        return [find_checkpoint(text)]
    places = step_directories(checkpoints_of(text))
    if not places:
        raise CheckpointError(f"{text}: there is no checkpoint in it (step-NNNNNNNN)")
    return places


def _ls_cells(row: Row) -> tuple[str, ...]:
    if row.manifest is None:
        return str(row.step), "", "", "", "", row.verdict
    said = row.manifest
    age = f"{said.saved_at} ({_age(row.age_s)})" if row.age_s is not None else said.saved_at
    return str(row.step), age, _size(said.nbytes), said.engine, str(said.world_size), row.verdict


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _pair(text: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not (left and equals and right):
        raise typer.BadParameter(f"--map {text}: expected old=new")
    if right.count("*") > left.count("*"):
        raise typer.BadParameter(f"--map {text}: the new name has more * than the old one")
    return left, right


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Columns as wide as they need to be: a name is never cut, so that it can be copied."""
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    _print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _tell(as_json: bool, facts: dict[str, Any], *lines: str) -> None:
    if as_json:
        _json(facts)
    else:
        _print(lines)


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)  # noqa: T201


def _json(value: Any) -> None:
    json.dump(_plain(value), sys.stdout, indent=2, allow_nan=False)
    print()  # noqa: T201


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: as texts."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
