"""Folders made by `save_to_disk` of Hugging Face `datasets`, read without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distdl.data.folders import Splits
from distdl.errors import DataError

STATE_FILE = "state.json"
DICT_FILE = "dataset_dict.json"


def is_saved(folder: Path) -> bool:
    """Whether `folder` is a Dataset or DatasetDict that `save_to_disk` wrote."""
    return (folder / STATE_FILE).is_file() or (folder / DICT_FILE).is_file()


def saved_splits(folder: Path) -> Splits:
    """The Arrow files of each split. A single Dataset has the split it was saved with, or "train".

    Raises DataError for a folder that is not whole.
    """
    if (folder / DICT_FILE).is_file():
        names = _read(folder / DICT_FILE).get("splits")
        if not isinstance(names, list) or not names:
            raise DataError(f"{folder / DICT_FILE} is damaged: no list of splits")
        return {str(name): _files(folder / str(name)) for name in names}
    split = _read(folder / STATE_FILE).get("_split")
    # A slice such as "train[:10%]" is written as it was asked for.
    return {str(split or "train").partition("[")[0]: _files(folder)}


def _files(folder: Path) -> list[Path]:
    state = _read(folder / STATE_FILE)
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder} was saved with an indices mapping, by an old version of datasets; load it, call "
            "flatten_indices(), and save it again"
        )
    try:
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / STATE_FILE} is damaged: no list of data files") from error
    lost = [file.name for file in files if not file.is_file()]
    if lost or not files:
        raise DataError(
            f"{folder} has lost {', '.join(lost[:8]) or 'all of its files'}; save the dataset again"
        )
    return files


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}. Save the dataset again.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged: not a JSON object. Save the dataset again.")
    return found
