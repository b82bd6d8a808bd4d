"""Cut a long series into windows for task `forecasting`: a history of so many steps, and the steps after it.

Monthly sunspots, 1749 to 1983:

    pip download --no-deps pmdarima==2.1.1
    python -m zipfile -e pmdarima-2.1.1-*.whl unpacked
    python benchmarks/windows.py --series unpacked/pmdarima/datasets/data/sunspots.txt.gz \
        --history 132 --horizon 12 --validation 282 --test 564 --out data/sunspots

A series of your own: --series FILE.csv --column NAME. Weekly CO2 lies in the wheel of statsmodels
(statsmodels/datasets/co2/co2.csv, column co2), and needs --fill.

The last `test` steps are the test part, the `validation` steps before them the validation part. A row belongs
to a part if its future lies wholly in it: nothing that is measured on was trained on. The history of a test
row may reach back into the other parts, as that of a real forecast does. `scale` is the mean absolute error
of the naive forecast on the training part.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distdl.errors import DataError

Series = npt.NDArray[np.float64]


def read_series(file: Path, column: str | None) -> Series:
    """A column of a CSV file, an empty field as NaN; without `column`, all numbers of a text, by rows."""
    if column is None:
        return np.asarray(np.loadtxt(file)).ravel()
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or column not in rows[0]:
        raise DataError(
            f"{file} has no column {column!r}; it has {', '.join(rows[0]) if rows else 'no rows'}"
        )
    return np.array([float(row[column] or "nan") for row in rows])


def filled(series: Series) -> Series:
    """The series with missing values on the line between their neighbours."""
    known = np.flatnonzero(np.isfinite(series))
    return np.interp(np.arange(len(series)), known, series[known])


def windows(series: Series, history: int, horizon: int, start: int, stop: int) -> tuple[Series, Series]:
    """(histories [n, history], futures [n, horizon]) of all windows whose future lies in [start, stop)."""
    first = np.arange(max(start, history), stop - horizon + 1)
    return (
        series[first[:, None] + np.arange(-history, 0)],
        series[first[:, None] + np.arange(horizon)],
    )


def table(histories: Series, futures: Series, scale: float) -> pa.Table:
    """Columns `history`, `future` (lists of one length) and `scale`, float32."""
    columns = {}
    for name, values in (("history", histories), ("future", futures)):
        flat = pa.array(values.astype(np.float32).reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    columns["scale"] = pa.array(np.full(len(histories), scale, np.float32))
    return pa.table(columns)


def make(series: Series, history: int, horizon: int, validation: int, test: int, out: Path) -> None:
    """Write OUT/{train,validation,test}.parquet. Raises DataError where a part has no window."""
    if not np.isfinite(series).all():
        raise DataError(f"{(~np.isfinite(series)).sum()} values are missing: fill them, or give --fill")
    ends = [0, len(series) - validation - test, len(series) - test, len(series)]
    scale = float(np.abs(np.diff(series[: max(ends[1], 0)])).mean()) if ends[1] > 1 else 0.0
    out.mkdir(parents=True, exist_ok=True)
    for split, start, stop in zip(("train", "validation", "test"), ends, ends[1:], strict=False):
        histories, futures = windows(series, history, horizon, start, stop)
        if not len(histories):
            raise DataError(
                f"no window of {history} + {horizon} steps fits into the {split} part, steps {start} to "
                f"{stop} of {len(series)}"
            )
        pq.write_table(table(histories, futures, scale), out / f"{split}.parquet")
        print(f"{split}: {len(histories)} windows")
    print(f"scale: {scale:.4f}, the mean absolute error of the naive forecast on the training part")


def main(arguments: list[str] | None = None) -> int:
    """Parse, convert, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--series", type=Path, required=True, metavar="FILE", help="numbers, or CSV")
    parser.add_argument("--column", help="the column of a CSV file")
    parser.add_argument("--fill", action="store_true", help="fill in missing values by straight lines")
    for name, what in (
        ("history", "read"),
        ("horizon", "forecast"),
        ("validation", "kept"),
        ("test", "kept"),
    ):
        parser.add_argument(f"--{name}", type=int, required=True, metavar="STEPS", help=f"steps {what}")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the dataset goes")
    given = parser.parse_args(arguments)
    try:
        series = read_series(given.series, given.column)
        series = filled(series) if given.fill else series
        make(series, given.history, given.horizon, given.validation, given.test, given.out)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
