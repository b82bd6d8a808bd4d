"""Train the recipes of the results table to the end, and write the table, docs/results.md.

    python benchmarks/results.py                 what there is, and what is missing
    python benchmarks/results.py ROW...          train these rows (all: every one that has no figure yet)
    python benchmarks/results.py --write         only write docs/results.md anew from the figures kept

Two processes each. Stopped at any moment, it goes on where it stood when it is started again: runs resume
from their checkpoints under runs/results, and finished ones are kept in benchmarks/results/ROW.json, as long
as their recipe stays as it was. A run is measured on the test rows at its end, with the last weights. While
it trains it is evaluated on its validation rows, where it has some.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import operator
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from distdl.data import Ready, open_split, ready
from distdl.recipe import load_recipe
from distdl.record import write_atomic

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
RUNS = ROOT / "runs" / "results"
PAGE = ROOT / "docs" / "results.md"
DISTDL = [sys.executable, "-m", "distdl"]
EXAMPLES = 8
COMPARE: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True)
class Row:
    """One line of the table: recipes that are trained, and the bound for the mean of their metric."""

    title: str
    bound: tuple[str, float]
    runs: tuple[tuple[str, ...], ...]
    """Each a recipe under configs/ and its overrides."""
    metric: str = "accuracy"
    prepare: tuple[str, ...] = ()
    """The commands that make the data."""
    first: tuple[str, ...] = ()
    """A recipe, and its overrides, whose run the row's begin with (`init.from`)."""
    test_split: str | None = None
    """Split of the figure, where training evaluates on another."""
    known: str = ""
    """A published or simple figure to hold it against, and where it is from."""
    note: str = ""
    """What has to be said of the figure, below the table."""
    picture: bool = False
    """Whether `distdl predict --plot` draws some test rows for the page."""
    examples: str = ""
    """The column that a prediction is to be held against: some test rows are shown below the table."""


def seeds(config: str, count: int) -> tuple[tuple[str, ...], ...]:
    """The same recipe with seeds 1 to `count`."""
    return tuple((config, f"train.seed={seed}") for seed in range(1, count + 1))


def real(name: str) -> tuple[str, ...]:
    """The command that fetches and prepares data/NAME."""
    return (f"bash benchmarks/real_data.sh {name}",)


FULL = ("bash launch/fashion_mnist_full.sh",)
MNIST = ("bash launch/mnist.sh",)
SCENES = (
    *FULL,
    f"{sys.executable} benchmarks/scenes.py --images data/fashion_mnist_full --train 40000 --out data/scenes",
)

BF16 = "train.precision=bf16"
"""For rows whose recipe is of fp32, as for any processor, and that were trained on one that has bf16."""

ROWS: dict[str, Row] = {
    "fashion_cnn": Row(
        "Fashion-MNIST, `cnn5` wide",
        (">=", 0.93),
        (("fashion_cnn_full.yaml",),),
        prepare=FULL,
        known="two-convolution figures in the dataset's README: 0.876 to 0.939",
    ),
    "fashion_resnet": Row(
        "Fashion-MNIST, `resnet` of 14 layers",
        (">=", 0.94),
        (("fashion_resnet.yaml",),),
        prepare=FULL,
        note="20 layers, 16 wide, had 0.9395 after 14 epochs (recipe of `a826d27`) and after 20 (that of "
        "`60f7661`); 14 layers, 32 wide, with cutout and crops of two pixels 0.9383 (`08978b6`). It was "
        "changed after those figures of the test rows, to the augmentation and the weight decay of "
        "fashion_cnn_full, and then tried without them: trained on 50,000 of the training images it had "
        "0.9458 of the 10,000 others (`distdl data prepare fashion_mnist --from IDX_FOLDER --holdout "
        "validation=0.16667 --out data/held`, then the recipe with `data.path=data/held "
        "data.eval_split=validation`).",
        picture=True,
    ),
    "mnist_cnn5": Row(
        "MNIST, `cnn5`",
        (">=", 0.994),
        (("mnist_cnn5.yaml",),),
        prepare=MNIST,
        known="LeNet-5: 0.9905 (LeCun et al., 1998)",
    ),
    "reference_cnn5": Row(
        "Fashion-MNIST, reference network `cnn5`", (">", 0.92), (("reference/cnn5.yaml",),), prepare=FULL
    ),
    "reference_cnn20": Row(
        "Fashion-MNIST, reference network `cnn20`", (">", 0.80), (("reference/cnn20.yaml",),), prepare=FULL
    ),
    "reference_cnn20_rnn1": Row(
        "Fashion-MNIST, reference network `cnn20_rnn1`",
        (">", 0.80),
        (("reference/cnn20_rnn1.yaml",),),
        prepare=FULL,
    ),
    "reference_rnn5": Row(
        "Fashion-MNIST, reference network `rnn5`", (">", 0.70), (("reference/rnn5.yaml",),), prepare=FULL
    ),
    "mnist_rows_lstm": Row(
        "MNIST, an image a sequence of 28 rows, `lstm`",
        (">=", 0.985),
        (("mnist_rows_lstm.yaml",),),
        prepare=MNIST,
    ),
    "r8_lstm": Row(
        "Reuters R8, `lstm`, no pretrained vectors",
        (">=", 0.955),
        seeds("r8_lstm.yaml", 3),
        prepare=real("r8"),
        known="LSTM 0.9368, Bi-LSTM with pretrained vectors 0.9631 (Yao et al., 2019)",
    ),
    "r8_from_autoencoder": Row(
        "Reuters R8, encoder pretrained as an autoencoder",
        (">=", 0.94),
        (("r8_from_autoencoder.yaml",),),
        prepare=real("r8"),
        first=("r8_autoencoder.yaml",),
    ),
    "sentiment": Row(
        "sentences of film reviews, mean of 5 folds",
        (">=", 0.76),
        tuple(("sentiment_lstm.yaml", "data.name=", f"data.path=data/sentiment_folds/{n}") for n in range(5)),
        prepare=real("sentiment_folds"),
        known="tf-idf with logistic regression 0.777 on one 90/10",
    ),
    "spam": Row(
        "SpamAssassin, 80/20",
        (">=", 0.985),
        (("spam_lstm.yaml",),),
        prepare=real("spam"),
        known="tf-idf with logistic regression 0.991 on a random 80/20",
    ),
    "help_en_de": Row(
        "software help, English to German, pages kept apart",
        (">=", 18.0),
        (("help_en_de.yaml", BF16),),
        metric="bleu",
        prepare=real("help_en_de"),
        test_split="test",
        examples="de",
        note="the aim beyond the bound is 25; of the validation pages it was 29.1 after 4 epochs of 12. "
        "Sentences of one page of the help are all in one split.",
    ),
    "brown": Row(
        "Brown corpus, Bengio's split and vocabulary rule",
        ("<", 252.0),
        (("brown_lstm_lm.yaml",),),
        metric="perplexity",
        prepare=real("brown"),
        test_split="test",
        known="252 (Bengio et al., 2003)",
        note="as in the paper, words that the whole corpus has three times or fewer are one token, marks "
        "between paragraphs and punctuation are tokens, and documents stand in their order: 800,828 tokens "
        "to train on, 199,816 to validate, 176,215 to test. This edition of the corpus has 17,906 different "
        "tokens so, the paper's has 16,383, which makes the figure here the harder one.",
    ),
    "japanese_vowels": Row(
        "JapaneseVowels, `lstm`",
        (">=", 0.97),
        (("japanese_vowels_lstm.yaml",),),
        prepare=real("japanese_vowels"),
        known="0.941 (Kudo et al., 1999)",
    ),
    "gunpoint": Row(
        "GunPoint, `fcn1d`",
        (">=", 0.98),
        seeds("gunpoint_fcn1d.yaml", 5),
        prepare=real("gunpoint"),
        known="FCN 1.000, ResNet 0.993 (Wang et al., 2017)",
        picture=True,
    ),
    "digits": Row(
        "strings of digits composed from MNIST, `crnn_ctc`",
        (">=", 0.95),
        (("digits_ctc.yaml",),),
        prepare=real("digits"),
        picture=True,
    ),
    "spoken_digits": Row(
        "spoken strings of digits composed from 5 languages' recordings, `crnn_ctc` on log-mel",
        (">=", 0.95),
        (("spoken_digits_ctc.yaml",),),
        prepare=real("spoken_digits"),
    ),
    "sunspots": Row(
        "monthly sunspots, 12 months ahead; below naive, seasonal (132) and lag 12",
        ("<", 1.0),
        (("sunspots_lstm.yaml",),),
        metric="mase_of_best_baseline",
        prepare=real("sunspots"),
        test_split="test",
        picture=True,
    ),
    "mnist_autoencoder": Row(
        "MNIST through 30 numbers and back",
        ("<", 4.0),
        (("mnist_autoencoder.yaml",),),
        metric="squared_error",
        prepare=MNIST,
        known="PCA 13.87, deep autoencoder 3.00 (Hinton and Salakhutdinov, 2006)",
        note="without normalisation between layers 4.292 after 60 epochs (recipe of `ac5073542a`). It was "
        "chosen by the last 5,000 training images, held out for that.",
        picture=True,
    ),
    "scenes_centernet": Row(
        "boxes in scenes composed from Fashion-MNIST",
        (">=", 0.90),
        (("scenes_centernet.yaml", BF16),),
        metric="map_50",
        prepare=SCENES,
        first=(
            "fashion_resnet.yaml",
            BF16,
            "data.augment.crop_padding=2",
            "data.augment.cutout=8",
            "optim.weight_decay=0.0005",
        ),
        note="from an untrained network (18 layers, 7x7 stem, four epochs of the same scenes; recipe of "
        "`b4c02ac`) 0.802 in 29 minutes: the boxes were right (0.789 at an overlap of 0.75), the garments "
        "were not. The recipe was changed after that figure of the test rows.",
        picture=True,
    ),
    "scenes_unet": Row(
        "pixels of scenes composed from Fashion-MNIST",
        (">=", 0.85),
        (("scenes_unet.yaml", BF16),),
        metric="miou",
        prepare=SCENES,
        picture=True,
    ),
}


@dataclass
class Result:
    """What one run came to."""

    run: list[str]
    value: float
    minutes: float
    commit: str
    machine: str
    metrics: dict[str, float] = field(default_factory=dict)
    recipe: str = ""
    """`recipe_of` the row's run, when it was trained."""
    examples: list[dict[str, str]] = field(default_factory=list)


def recipe_of(row: Row, run: tuple[str, ...]) -> str:
    """A hash of the keys that its recipes give, but for where and how they run: defaults that are added to
    the schema later leave it as it is.
    """
    found = []
    for config, *overrides in (row.first, run) if row.first else (run,):
        recipe = load_recipe(ROOT / "configs" / config, overrides)
        keys = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
        found.append({k: v for k, v in keys.items() if k not in ("run", "hardware", "checkpoint", "track")})
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]


def kept(name: str) -> list[Result]:
    """The finished runs of a row, as far as they are those that the row asks for now."""
    path = KEPT / f"{name}.json"
    found = [Result(**r) for r in json.loads(path.read_text())] if path.exists() else []
    row = ROWS[name]
    return [r for r in found if tuple(r.run) in row.runs and r.recipe == recipe_of(row, tuple(r.run))]


def train_row(name: str) -> None:
    """Train what the row has no figure of yet. Raises CalledProcessError, SystemExit where a run fails."""
    row, done = ROWS[name], kept(name)
    for command in row.prepare if len(done) < len(row.runs) else ():
        subprocess.run(shlex.split(command), cwd=ROOT, check=True)
    begin, before = [], first_of(name)
    if row.first and len(done) < len(row.runs):
        config, *overrides = row.first
        launched([str(ROOT / "configs" / config), *overrides, *QUIET, f"run.dir={before}"], before)
        begin = [f"init.from={before}"]
    for number, run in enumerate(row.runs):
        if not any(tuple(r.run) == run for r in done):
            folder = folder_of(name, number)
            result = train(row, run, folder, begin)
            if row.first:
                result.minutes += minutes_of(before) / len(row.runs)
            done.append(result)
            KEPT.mkdir(exist_ok=True)
            write_atomic(KEPT / f"{name}.json", json.dumps([vars(r) for r in done], indent=2) + "\n")
            if row.picture and number == 0 and find_spec("matplotlib"):
                draw(row, run, folder, PICTURES / f"{name}.png")


def folder_of(name: str, number: int) -> Path:
    """Where a run of a row is trained: one whose recipe changes does not go on from what it was before."""
    row = ROWS[name]
    return RUNS / f"{name}-{number}-{recipe_of(row, row.runs[number])}"


def first_of(name: str) -> Path:
    """Where the run is trained that the row's begin with: that of the row which trains it anyway, if any."""
    for other, row in ROWS.items():
        if row.runs == (ROWS[name].first,) and not row.test_split:
            return folder_of(other, 0)
    return RUNS / f"{name}-first-{recipe_of(ROWS[name], ROWS[name].runs[0])}"


QUIET = ("eval.every_epochs=null",)
"""Evaluated at the end alone: where there are no validation rows, the test rows are left alone until then."""


def launched(recipe: list[str], folder: Path) -> None:
    """Train a recipe to its end, or on from where it was stopped; its time is added to FOLDER.seconds."""
    begin, before = time.monotonic(), 60 * minutes_of(folder)
    with subprocess.Popen([*DISTDL, "launch", *recipe, "--procs", "2"], cwd=ROOT) as run:
        try:
            code = run.wait()
        except BaseException:  # asked to stop: so is the run, which saves
            run.terminate()
            raise
        finally:
            folder.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(folder.with_suffix(".seconds"), f"{before + time.monotonic() - begin:.1f}\n")
    if code:
        raise SystemExit(f"{' '.join(recipe)}: exit code {code}")


def minutes_of(folder: Path) -> float:
    """How long `launched` has taken with this run so far."""
    clock = folder.with_suffix(".seconds")
    return float(clock.read_text()) / 60 if clock.exists() else 0.0


def train(row: Row, run: tuple[str, ...], folder: Path, begin_with: list[str]) -> Result:
    """Train one run to its end, or on from where it was stopped, and measure it."""
    config, *overrides = run
    quiet = () if row.test_split else QUIET
    recipe = [str(ROOT / "configs" / config), *overrides, *quiet, *begin_with, f"run.dir={folder}"]
    launched(recipe, folder)
    split = [f"data.eval_split={row.test_split}"] if row.test_split else []
    measured = subprocess.run(
        [*DISTDL, "eval", *recipe, *split, "--json"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    metrics = json.loads(measured.stdout)
    if "naive_mase" in metrics:
        baselines = [value for key, value in metrics.items() if key.endswith("_mase")]
        metrics["mase_of_best_baseline"] = metrics["mase"] / min(baselines)
    return Result(
        list(run),
        metrics[row.metric],
        minutes_of(folder),
        commit(),
        machine(),
        _numbers(metrics),
        recipe_of(row, run),
        examples(row, recipe, folder) if row.examples else [],
    )


def draw(row: Row, run: tuple[str, ...], folder: Path, picture: Path) -> None:
    """Some test rows and what the finished run in `folder` says of them."""
    config, *overrides = run
    recipe = [str(ROOT / "configs" / config), *overrides, f"run.dir={folder}"]
    predict(recipe, row, folder / "predictions.jsonl", "--plot", str(picture))


def predict(recipe: list[str], row: Row, out: Path, *options: str) -> Ready:
    """Ask a finished run for all test rows; returns their dataset."""
    data = load_recipe(recipe[0], recipe[1:]).data
    opened = ready(data.name, str(ROOT / data.path) if data.path else None)
    given = ["--input", str(opened.folder), "--split", row.test_split or data.eval_split, "--out", str(out)]
    subprocess.run([*DISTDL, "predict", *recipe, *given, *options], cwd=ROOT, check=True)
    return opened


def examples(row: Row, recipe: list[str], folder: Path) -> list[dict[str, str]]:
    """Some test rows, spread over the split: what the model was given, what it says, and what was wanted."""
    out = folder / "predictions.jsonl"
    opened = predict(recipe, row, out)
    decode = opened.info.decode
    if decode is None:
        raise SystemExit(f"{opened.folder} has no tokenizer, with which the examples would be read")
    with out.open(encoding="utf-8") as lines:
        said = [json.loads(line) for line in lines]
    chosen = np.linspace(0, len(said) - 1, EXAMPLES + 2).astype(np.int64)[1:-1]
    split = row.test_split or load_recipe(recipe[0], recipe[1:]).data.eval_split
    wanted = open_split(opened, split, [row.examples]).gather(chosen)[row.examples].tolist()
    return [
        {"given": said[i]["input"], "said": said[i]["text"], "wanted": decode(tokens)}
        for i, tokens in zip(chosen, wanted, strict=True)
    ]


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def commit() -> str:
    """The commit that is checked out, with a + where files differ from it that this script does not write."""
    short = _git("rev-parse", "--short=10", "HEAD").strip()
    written = [f":!{path.relative_to(ROOT)}" for path in (KEPT, PICTURES, PAGE)]
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return short + ("+" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def machine() -> str:
    """Processor, as far as the system says."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.machine()


def state(name: str) -> tuple[str, str]:
    """(figure with its spread, "reached" or what else) of a row, for the list and for the page."""
    row, done = ROWS[name], kept(name)
    if len(done) < len(row.runs):
        return "-", f"{len(done)} of {len(row.runs)} runs"
    values = [r.value for r in done]
    figure = f"{statistics.mean(values):.4g}"
    if len(values) > 1:
        figure += f" ({min(values):.4g} to {max(values):.4g})"
    way, bound = row.bound
    return figure, "reached" if COMPARE[way](statistics.mean(values), bound) else "not reached"


HEAD = (
    "# What the recipes reach",
    "",
    "Every figure was trained by `.venv/bin/python benchmarks/results.py ROW`, which also writes this page:",
    "two processes on two CPU cores, from the recipe named, measured on the test rows at the end, with the",
    "last weights. Figures of several runs are the mean, with the least and the largest. Recipes of data",
    "that have a validation split (`data.eval_split: validation`) were chosen by it; the others are what is",
    "usual for such networks.",
)
COLUMNS = (
    "row",
    "task, data",
    "metric",
    "bound",
    "reached",
    "minutes a run",
    "recipe",
    "commit",
    "for comparison",
)


def page() -> str:
    """docs/results.md."""
    lines = [*HEAD, "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, row in ROWS.items():
        done, (figure, how) = kept(name), state(name)
        minutes = f"{statistics.mean(r.minutes for r in done):.0f}" if done else "-"
        commits = ", ".join(sorted({f"`{r.commit}`" for r in done})) or "-"
        recipe = ", after ".join(map(_linked, (row.runs[0], row.first) if row.first else (row.runs[0],)))
        bound = f"{row.bound[0]} {row.bound[1]:g}"
        shown = figure if how == "reached" else f"{figure} ({how})"
        cells = (f"`{name}`", row.title, row.metric, bound, shown, minutes, recipe, commits, row.known or "-")
        lines.append(f"| {' | '.join(cells)} |")
    for name, row in ROWS.items():
        if row.note:
            lines += ["", f"`{name}`: {row.note}"]
    for name, row in ROWS.items():
        if kept(name) and (PICTURES / f"{name}.png").exists():
            lines += ["", f"## `{name}`: the first test rows", "", f"![{row.title}](pictures/{name}.png)"]
        lines += _example_lines(name)
    return "\n".join(lines) + "\n"


def _linked(run: tuple[str, ...]) -> str:
    """A recipe, and what of it was changed, but for the seed and the folder of each of several runs."""
    config, *overrides = run
    shown = [f"`{one}`" for one in overrides if not one.startswith(("train.seed", "data.path", "data.name"))]
    return " ".join([f"[{config}](../configs/{config})", *shown])


def _example_lines(name: str) -> list[str]:
    """A table of what was said of some test rows, chosen by their numbers alone."""
    shown = [one for result in kept(name)[:1] for one in result.examples]
    if not shown:
        return []
    head = ["", f"## `{name}`: {len(shown)} of the test rows, at equal distances", "", "| | |", "|---|---|"]
    cells = [
        (key, html.escape(one[key]).replace("|", "&#124;"))
        for one in shown
        for key in ("given", "said", "wanted")
    ]
    return [*head, *(f"| {key} | {text} |" for key, text in cells)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", nargs="*", choices=[*ROWS, "all", []], metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--write", action="store_true", help="write docs/results.md and do nothing else")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    rows = list(ROWS) if "all" in options.rows else options.rows
    for name in rows:
        train_row(name)
        write_atomic(PAGE, page())
    if options.write:
        write_atomic(PAGE, page())
    for name, row in ROWS.items():
        figure, how = state(name)
        print(f"{name:24} {row.metric:12} {row.bound[0]} {row.bound[1]:<7g} {figure:28} {how}")


if __name__ == "__main__":
    main()
