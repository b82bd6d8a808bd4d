"""`distdl data ...`: prepare, look at, check and copy datasets. Imports no torch, and what reads data inside
the commands, so that the others do not wait for it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distdl import errors
from distdl.testing.faults import arm_from_environment

data_app = typer.Typer(no_args_is_help=True, help="Prepare, look at, check and copy datasets.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A dataset made by `distdl data prepare`.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
_Texts = Optional[list[str]]  # noqa: UP045 - typer reads these at run time on Python 3.10
_Number = Optional[int]  # noqa: UP045
_Text = Optional[str]  # noqa: UP045
_Path = Optional[Path]  # noqa: UP045


@data_app.command("prepare")
def prepare_command(
    source: Annotated[
        str, typer.Argument(help="A catalogue name, a hub id (owner/name), a file or a folder.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    local: Annotated[_Path, typer.Option("--from", help="Read these files instead of the hub's.")] = None,
    config: Annotated[_Text, typer.Option(help="Configuration of a dataset on the hub.")] = None,
    shards: Annotated[_Number, typer.Option(min=1, help="Shards of the largest split.")] = None,
    max_shard_bytes: Annotated[
        _Number, typer.Option(min=1, help="About how large a shard is; default: 256 MiB.")
    ] = None,
    columns: Annotated[_Text, typer.Option(help="Columns to keep: a,b,c.")] = None,
    rename: Annotated[_Texts, typer.Option(help="old=new; repeatable.")] = None,
    image_size: Annotated[_Text, typer.Option(help="Resize images: N or HxW pixels.")] = None,
    masks: Annotated[
        _Texts, typer.Option(help="Image column whose pixels are class numbers; repeatable.")
    ] = None,
    boxes: Annotated[
        _Texts, typer.Option(help="Column of boxes, resized as the images are; repeatable.")
    ] = None,
    sample_rate: Annotated[int, typer.Option(help="Hz; sound is read up to half of it.")] = 16_000,
    mels: Annotated[int, typer.Option(help="Bands of sound in a frame (log-mel).")] = 80,
    classes: Annotated[_Texts, typer.Option(help="Text column to number; repeatable.")] = None,
    tokenize: Annotated[_Texts, typer.Option(help="Text column to tokenise; repeatable.")] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            help="bpe, word or space (trained on split train), a tokenizer.json, a hub id, or none."
        ),
    ] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="Tokens of a trained tokenizer, at most.")] = 16_000,
    min_count: Annotated[int, typer.Option(help="Words seen less often do not enter.")] = 2,
    max_tokens: Annotated[_Number, typer.Option(min=1, help="Cut rows to this many tokens.")] = None,
    holdout: Annotated[_Texts, typer.Option(help="NAME=FRACTION of train to keep apart; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the rows of --holdout.")] = 0,
    workers: Annotated[_Number, typer.Option(min=1, help="Processes; default: one a core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a prepared dataset.")] = False,
) -> int:
    """Turn a dataset into memory-mappable shards with an index. Run again after a kill, it goes on."""
    from distdl.data.prepare.inspect import summary, summary_lines
    from distdl.data.prepare.options import MAX_SHARD_BYTES, Options
    from distdl.data.prepare.run import prepare

    arm_from_environment(0)
    options = Options(
        config=config,
        shards=shards,
        max_shard_bytes=max_shard_bytes or MAX_SHARD_BYTES,
        columns=_names(columns),
        rename=dict(_pair(text, "--rename") for text in rename or ()),
        image_size=_size(image_size),
        masks=tuple(masks or ()),
        boxes=tuple(boxes or ()),
        sample_rate=sample_rate,
        mels=mels,
        classes=tuple(classes or ()),
        tokenize=tuple(tokenize or ()),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        min_count=min_count,
        max_tokens=max_tokens,
        holdout={name: _fraction(value) for name, value in (_pair(t, "--holdout") for t in holdout or ())},
        seed=seed,
        workers=workers or _cores(),
        overwrite=overwrite,
    )
    with Bar("rows") as bar:
        prepare(source, out, options, local=local, progress=bar, say=bar.say)
    _print(summary_lines(summary(out)))
    return errors.DONE


@data_app.command("info")
def info_command(folder: Folder, as_json: AsJson = False) -> int:
    """Rows, columns, shards, bytes and lengths, from the index alone."""
    from distdl.data.prepare.inspect import summary, summary_lines

    found = summary(folder)
    _print([json.dumps(found, indent=2)] if as_json else summary_lines(found))
    return errors.DONE


@data_app.command("verify")
def verify_command(folder: Folder) -> int:
    """Read every byte and compare it with the index; lists all that is wrong and ends with 5."""
    from distdl.data.prepare.inspect import unchecked, verify

    index = verify(folder)
    files = len(list(index.files()))
    rows = sum(s.rows for s in index.splits.values())
    if away := unchecked(folder, index):
        _print([f"{folder}: {files - away} of {files} files are whole; {away} lie behind URLs: not checked"])
    else:
        _print([f"{folder} is whole: {files} files, {rows:,} rows"])
    return errors.DONE


@data_app.command("head")
def head_command(
    folder: Folder,
    rows: Annotated[int, typer.Option("-n", min=1, help="How many rows.")] = 5,
    split: Annotated[str, typer.Option(help="Which split.")] = "train",
) -> int:
    """Print the first rows of a split."""
    from distdl.data.prepare.inspect import head

    _print(head(folder, split, rows))
    return errors.DONE


@data_app.command("stage")
def stage_command(
    folder: Folder,
    to: Annotated[Path, typer.Option(help="A folder on this node's own disk.")],
    node: Annotated[int, typer.Option(min=0, help="This node's number, from 0.")] = 0,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that share the shards out.")] = 1,
) -> int:
    """Copy a dataset to this node's disk, once, every file checked."""
    from distdl.data.prepare.stage import stage

    arm_from_environment(0)
    with Bar("bytes") as bar:
        stage(folder, to, node, nodes, progress=bar, say=bar.say)
    _print([str(to)])
    return errors.DONE


class Bar:
    """A progress bar on a terminal; elsewhere a line on standard error at every tenth."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._tenth = -1
        self._console = Console(file=sys.stderr)
        self._progress: Progress | None = None
        if sys.stderr.isatty():
            columns = (MofNCompleteColumn(), BarColumn(), TextColumn(unit), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task("", total=None)

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total)
            return
        tenth = 10 * done // max(total, 1)
        if tenth > self._tenth:
            self._tenth = tenth
            print(f"{done:,} of {total:,} {self._unit}", file=sys.stderr, flush=True)  # noqa: T201

    def say(self, text: str) -> None:
        """One line for the person at the keyboard."""
        if self._progress is not None:
            self._console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)  # noqa: T201

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self._progress is not None:
            self._progress.stop()


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)  # noqa: T201


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else None


def _pair(text: str, option: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not (left and equals and right):
        raise typer.BadParameter(f"{option} {text}: expected two parts with '=' between them")
    return left, right


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(
            f"--holdout: {text!r} is no number; expected a fraction such as 0.1"
        ) from error


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise typer.BadParameter(f"--image-size {text}: expected N, or HxW such as 224x224")
    return int(match[1]), int(match[2] or match[1])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
