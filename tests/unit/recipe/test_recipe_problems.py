"""What is said about a recipe that can be read and is not valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distdl.errors import RecipeError
from distdl.recipe import load_recipe, parse_recipe

BASE = """\
task: {name: image_classification}
model: {name: cnn5}
data: {name: fashion_mnist}
batch: {global: 256, micro: 32}
optim:
  name: sgd
  lr: 0.1
  momentum: 0.9
train: {epochs: 5}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(text: str = BASE, *overrides: str) -> str:
    Path("x.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("x.yaml", overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "momentum: 0.9",
            "momentun: 0.9",
            "x.yaml:8: optim.momentun = 0.9: unknown key; did you mean 'momentum'? "
            "allowed: name, lr, clip_norm, freeze, decay_norms_and_biases, momentum, nesterov, weight_decay",
        ),
        ("lr: 0.1", "lr: abc", 'x.yaml:7: optim.lr = "abc": expected a number greater than 0'),
        ("lr: 0.1", "lr: 0", "x.yaml:7: optim.lr = 0: out of range; expected a number greater than 0"),
        (
            "momentum: 0.9",
            "momentum: 1",
            "x.yaml:8: optim.momentum = 1: out of range; expected a number of at least 0 and less than 1",
        ),
        ("  lr: 0.1\n", "", "x.yaml:5: optim: missing required key 'lr': a number greater than 0"),
        (
            "  name: sgd\n",
            "",
            "x.yaml:5: optim: missing required key 'name'; known: sgd, adamw, lion, lamb, adafactor; "
            "for an optim of your own give its import path, package.module:attribute",
        ),
        (
            "name: sgd",
            "name: adam",
            "x.yaml:6: optim.name = \"adam\": unknown optim; did you mean 'adamw'? known: sgd, adamw",
        ),
        (
            "train:",
            "schedule: {name: 'a:b'}\ntrain:",
            'x.yaml:9: schedule.name = "a:b": unknown schedule; known: constant, cosine, step, one_cycle',
        ),
        (
            "name: cnn5",
            "name: resnett",
            "x.yaml:2: model.name = \"resnett\": unknown model; did you mean 'resnet' or 'conv1d_resnet'? "
            "known: cnn5, ",
        ),
        (
            "name: cnn5",
            "name: 'a/b.py:f'",
            'x.yaml:2: model.name = "a/b.py:f": not an import path; write package.module:attribute',
        ),
        (
            "batch: {global: 256, micro: 32}\n",
            "",
            "x.yaml: missing required section 'batch': a mapping (keys: global, micro)",
        ),
        ("global: 256", "globl: 256", "x.yaml: 2 problems\n  x.yaml:4: batch: missing required key 'global'"),
        ("epochs: 5", "seed: 5", "x.yaml:9: train: give epochs, max_steps, or both"),
        (
            "name: fashion_mnist",
            "shuffle: true",
            "x.yaml:3: data: give exactly one of name (a catalogue name), path (a folder) and mixture",
        ),
        ("{epochs: 5}", "5", "x.yaml:9: train = 5: expected a mapping (keys: epochs, max_steps"),
        ("{name: cnn5}", "cnn5", 'x.yaml:2: model = "cnn5": expected a mapping with a name (cnn5, lstm'),
    ],
)
def test_file_line_key_value_and_what_is_allowed(old: str, new: str, message: str) -> None:
    assert old in BASE
    assert refusal(BASE.replace(old, new)).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=abc", 'override optim.lr=abc: optim.lr = "abc": expected a number greater than 0'),
        ("batch.micro='3'", 'batch.micro = "3": expected a whole number of at least 1'),
        ("batch.micro=true", "batch.micro = true: expected a whole number of at least 1"),
        ("batch.micro=3.0", "batch.micro = 3.0: expected a whole number of at least 1"),
        ("optim.lr=true", "optim.lr = true: expected a number greater than 0"),
        ("data.shuffle=1", "data.shuffle = 1: expected true or false"),
        ("data.shuffle=yes", 'data.shuffle = "yes": expected true or false'),
        ("train.seed=-1", "train.seed = -1: out of range; expected a whole number of at least 0 and at most"),
        ("hardware.threads=0", "expected 'auto' or a whole number of at least 1"),
        ("hardware.channels_last=maybe", "expected 'auto' or true or false"),
        (
            "hardware.engine=fsdpp",
            "hardware.engine = \"fsdpp\": expected one of 'ddp', 'fsdp', 'zero0'",
        ),
        ("train.precision=fp8", "expected one of 'fp32', 'bf16', 'fp16'"),
        ("eval.patience=0", "expected a whole number of at least 1 or null"),
        ("eval.metric=", "eval.metric = null: expected a text that is not empty"),
        ("data.augment.flp=true", "data.augment.flp = true: unknown key; did you mean 'flip'? allowed: flip"),
        (
            "data.augment=3",
            "data.augment = 3: expected a mapping (keys: flip, crop_padding, cutout, token_dropout, "
            "token_dropout_id, jitter)",
        ),
        ("lr=0.1", "override lr=0.1: lr = 0.1: unknown key; did you mean 'optim.lr'? allowed: task,"),
        ("model.cell=lstm", "unknown key; a key of model.name = crnn or image_rnn or crnn_ctc; allowed: "),
        ("train.lr=0.1", "did you mean 'optim.lr'?"),
        ("trian.epochs=3", "unknown key; did you mean 'train' or 'track'? allowed"),
        ("batch.global_=3", "unknown key; did you mean 'global'?"),
        ("schedule={name: step}", "give exactly one of every_epochs and every_steps; neither was given"),
        ("eval={every_epochs: 1, every_steps: 2}", "every_epochs and every_steps exclude each other"),
        ("schedule={name: step, every_epochs: 1, every_steps: 2}", "both were given"),
        (
            "optim={name: adamw, lr: 1, betas: [0.9]}",
            "optim.betas = [0.9]: expected a list of 2, each a number",
        ),
        ("optim={name: adamw, lr: 1, betas: [0.9, 1]}", "out of range; expected a list of 2, each a number"),
        (
            "optim={name: adamw, lr: 1, betas: ['0.9', 0]}",
            "expected a list of 2, each a number of at least 0",
        ),
    ],
)
def test_an_override_is_its_own_source(override: str, message: str) -> None:
    text = refusal(BASE, override)
    assert text.startswith(f"override {override}")
    assert message in text
    assert "\n" not in text


def test_a_key_is_blamed_on_the_file_that_says_it() -> None:
    Path("base.yaml").write_text(BASE.replace("momentum: 0.9", "momentum: 9"))
    assert refusal("extends: base.yaml\noptim: {lr: 1}\n").startswith("base.yaml:8: optim.momentum = 9")
    assert refusal("extends: base.yaml\n\noptim: {momentum: 8}\n").startswith("x.yaml:3: optim.momentum = 8")


def test_all_problems_come_at_once() -> None:
    lines = refusal(BASE, "optim.lr=-1", "batch.micro=0", "train.sed=3").splitlines()
    assert lines[0] == "x.yaml: 3 problems"
    assert [line.strip().split(": ")[1].split(" =")[0] for line in lines[1:]] == [
        "batch.micro",
        "optim.lr",
        "train.sed",
    ]


def test_no_more_than_eight_problems_are_listed() -> None:
    lines = refusal(BASE, *(f"k{i}=1" for i in range(11))).splitlines()
    assert len(lines) == 10
    assert (lines[0], lines[-1]) == ("x.yaml: 11 problems", "  and 3 more")


def test_long_values_are_cut() -> None:
    assert (
        max(map(len, refusal(BASE, "optim.lr=" + "x" * 500).split(": "))) <= len("override optim.lr=") + 500
    )
    assert f'optim.lr = "{"x" * 56}...: expected' in refusal(BASE, "optim.lr=" + "x" * 500)


@pytest.mark.parametrize("value", ["3", True, None, [1], {"a": 1}, 1.5])
def test_values_are_never_converted(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"batch\.micro = .*: expected a whole number"):
        parse_recipe(
            {
                "task": {"name": "image_classification"},
                "model": {"name": "cnn5"},
                "data": {"name": "x"},
                "batch": {"global": 4, "micro": value},
                "optim": {"name": "sgd", "lr": 1},
                "train": {"epochs": 1},
            }
        )
