"""What holds for every recipe: the hash, the resolved copy, overrides, the JSON Schema."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distdl.errors import RecipeError
from distdl.recipe import (
    Recipe,
    differences,
    json_schema,
    load_recipe,
    mathematics,
    parse_recipe,
    recipe_hash,
    to_yaml,
)
from distdl.recipe.named import NAMED
from distdl.recipe.tree import dump_yaml, parse_yaml, plain

quick = settings(database=None, deadline=None, max_examples=40)

counts = st.integers(1, 10**6)
naturals = st.integers(0, 10**6)
fractions = st.floats(0, 1, exclude_max=True)
positives = st.floats(1e-12, 1e6)
texts = st.text(min_size=1, max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
paths = st.sampled_from(["a:b", "pkg.mod:Thing", "pkg.mod:Thing.make"])


def some(required: dict[str, Any], **optional: Any) -> Any:
    return st.fixed_dictionaries(required, optional=optional)


def imported() -> Any:
    extra = st.dictionaries(texts.filter(lambda key: key != "name"), json_values, max_size=3)
    return st.builds(lambda name, rest: {"name": name, **rest}, paths, extra)


def every() -> Any:
    return st.sampled_from([{}, {"every_steps": 5}, {"every_epochs": 2}, {"every_epochs": None}])


def with_every(part: Any) -> Any:
    return st.builds(lambda a, b: {**a, **b}, every(), part)


optimiser = {
    "lr": positives,
    "weight_decay": st.floats(0, 1),
    "clip_norm": st.none() | positives,
    "decay_norms_and_biases": st.booleans(),
}
sections: dict[str, Any] = {
    "task": some({"name": st.just("image_classification")}, label_smoothing=fractions)
    | some({"name": st.just("text_classification")}, vocabulary=st.none() | counts)
    | imported(),
    "model": some({"name": st.just("cnn5")}, width=counts, norm=st.sampled_from(["group", "none"]))
    | some({"name": st.sampled_from(["lstm", "gru", "rnn"])}, layers=counts, bidirectional=st.booleans())
    | imported(),
    "data": some({"name": texts}, shuffle=st.booleans(), drop_last=st.booleans(), train_split=texts)
    | some({"path": texts}, augment=some({}, flip=st.booleans(), crop_padding=naturals)),
    "batch": some({"global": counts, "micro": counts}),
    "optim": some({"name": st.just("sgd"), **optimiser}, momentum=fractions, nesterov=st.booleans())
    | some(
        {"name": st.sampled_from(["adamw", "lion", "lamb"]), **optimiser},
        betas=st.lists(fractions, min_size=2, max_size=2),
    )
    | some({"name": paths, **optimiser}, elementwise=st.booleans(), alpha=fractions),
    "schedule": some({"name": st.sampled_from(["constant", "cosine"])}, warmup_steps=naturals)
    | some({"name": st.just("step"), "every_steps": counts})
    | some({"name": st.just("one_cycle")}, peak_at=st.floats(0.01, 0.99)),
    "train": some({"epochs": counts}, max_steps=counts, seed=naturals, precision=st.just("bf16"))
    | some({"max_steps": counts}),
    "eval": with_every(some({}, metric=texts, mode=st.just("min"), patience=counts)),
}
machinery: dict[str, Any] = {
    "hardware": some({}, device=st.sampled_from(["cpu", "cuda"]), threads=counts, prefetch_steps=naturals),
    "launch": some({}, procs=counts, max_restarts=naturals, timeout_s=positives),
    "checkpoint": with_every(some({}, keep=counts)),
    "run": some({"dir": texts}),
    "track": some({}, every_steps=counts),
}
maths = st.fixed_dictionaries(sections)
machines = st.fixed_dictionaries(machinery)
recipes = st.builds(lambda a, b: parse_recipe({**a, **b}), maths, machines)

BASE: dict[str, Any] = {
    "task": {"name": "image_classification"},
    "model": {"name": "cnn5"},
    "data": {"name": "fashion_mnist"},
    "batch": {"global": 256, "micro": 32},
    "optim": {"name": "sgd", "lr": 0.1},
    "train": {"epochs": 5},
}


def base(**sections: dict[str, Any]) -> Recipe:
    return parse_recipe({**BASE, **{key: {**BASE.get(key, {}), **value} for key, value in sections.items()}})


@quick
@given(maths, machines, machines)
def test_where_and_how_it_runs_does_not_enter_the_hash(what: Any, here: Any, there: Any) -> None:
    a, b = parse_recipe({**what, **here}), parse_recipe({**what, **there})
    assert recipe_hash(a) == recipe_hash(b)
    assert differences(mathematics(a), mathematics(b)) == []


@quick
@given(recipes, recipes)
def test_hashes_differ_exactly_where_there_are_differences(a: Recipe, b: Recipe) -> None:
    found = differences(mathematics(a), mathematics(b))
    assert (recipe_hash(a) == recipe_hash(b)) == (found == [])
    assert json.loads(json.dumps(mathematics(a))) == mathematics(a)


def test_keys_that_came_later_are_no_part_of_the_hash_until_they_are_given() -> None:
    """Runs that were begun without them go on."""
    plain = {**BASE, "task": {"name": "transcription"}}
    given = {**BASE, "task": {"name": "transcription", "vocabulary": 9}}
    assert mathematics(parse_recipe(plain))["task"] == {"name": "transcription", "standardise": True}
    assert mathematics(parse_recipe(given))["task"]["vocabulary"] == 9


CHANGES: dict[str, Any] = {
    "task.label_smoothing": 0.1,
    "task.mixup": 0.2,
    "task.cutmix": 1.0,
    "model.width": 64,
    "model.norm": "group",
    "model.dropout": 0.5,
    "model.hidden": 64,
    "data.name": "mnist",
    "data.train_split": "a",
    "data.eval_split": "b",
    "data.shuffle": False,
    "data.drop_last": True,
    "data.order": "block",
    "data.block_window": 7,
    "data.bucket_batches": 7,
    "data.sequence": "tokens",
    "data.columns": ["image"],
    "data.transform": "my.module:function",
    "data.augment.cutout": 4,
    "data.augment.token_dropout": 0.1,
    "data.augment.token_dropout_id": 3,
    "data.augment.jitter": 0.1,
    "data.augment.flip": True,
    "data.augment.crop_padding": 2,
    "batch.global": 128,
    "batch.micro": 16,
    "optim.lr": 0.2,
    "optim.momentum": 0.9,
    "optim.nesterov": True,
    "optim.weight_decay": 0.1,
    "optim.clip_norm": 1.0,
    "optim.decay_norms_and_biases": True,
    "optim.freeze": ["head.*"],
    "schedule.warmup_steps": 10,
    "train.epochs": 6,
    "train.max_steps": 9,
    "train.seed": 8,
    "train.precision": "bf16",
    "train.reduction": "exact",
    "train.ema_decay": 0.999,
    "train.max_nonfinite_steps": 3,
    "eval.every_epochs": 2,
    "eval.every_steps": 5,
    "eval.metric": "loss",
    "eval.mode": "min",
    "eval.patience": 2,
    "eval.min_delta": 0.1,
}
TOGETHER = {"data.mixture", "data.pack_length", "data.eval_pack_length", "data.epoch_rows"}
"""Keys that need another to change with them: tried in a test of their own."""
FIXED = {"task.name", "model.name", "optim.name", "schedule.name"}


def leaves(value: Any, path: str = "") -> Iterator[str]:
    if not isinstance(value, dict):
        yield path
        return
    for key, item in value.items():
        yield from leaves(item, f"{path}.{key}".lstrip("."))


def test_every_key_of_the_mathematics_is_tried() -> None:
    assert set(leaves(mathematics(base()))) == set(CHANGES) | TOGETHER | FIXED


@pytest.mark.parametrize("key", CHANGES)
def test_every_key_of_the_mathematics_enters_the_hash(key: str) -> None:
    before = parse_recipe(BASE)
    mapping = copy.deepcopy(json.loads(to_json(before)))
    *parents, last = key.split(".")
    inside = mapping
    for parent in parents:
        inside = inside[parent]
    inside[last] = CHANGES[key]
    if key == "eval.every_steps":
        inside["every_epochs"] = None
    after = parse_recipe(mapping)
    assert recipe_hash(before) != recipe_hash(after)
    line = differences(mathematics(before), mathematics(after))[-1]
    assert line.startswith(f"{key}: ")
    assert line.endswith(f" -> {json.dumps(CHANGES[key])}")


def to_json(recipe: Recipe) -> str:
    return recipe.model_dump_json(by_alias=True)


def test_the_name_enters_the_hash() -> None:
    hashes = {recipe_hash(base(schedule={"name": name})) for name in ("constant", "cosine", "one_cycle")}
    assert len(hashes) == 3
    assert recipe_hash(base(optim={"name": "adamw"})) != recipe_hash(base())


def test_the_place_of_the_data_does_not_enter_the_hash() -> None:
    here, there = base(data={"name": None, "path": "/a"}), base(data={"name": None, "path": "/b"})
    assert here != there
    assert recipe_hash(here) == recipe_hash(there) != recipe_hash(base())


def test_keys_that_go_together_enter_the_hash() -> None:
    packed = [
        base(data={"order": "packed", "pack_length": n, "eval_pack_length": m})
        for n, m in ((32, None), (64, None), (64, 99))
    ]
    mixed = [
        base(data={"name": None, "mixture": {"a": w, "b": 1 - w}, "epoch_rows": n})
        for w, n in ((0.25, 10), (0.5, 10), (0.5, 20))
    ]
    assert len({recipe_hash(r) for r in [base(), *packed, *mixed]}) == 7
    moved = base(data={"name": None, "mixture": {"/x/a": 0.5, "/x/b": 0.5}, "epoch_rows": 20})
    assert recipe_hash(moved) == recipe_hash(mixed[-1])


def test_the_hash_is_that_of_the_values_not_of_how_they_are_written() -> None:
    assert recipe_hash(base(optim={"lr": 1})) == recipe_hash(base(optim={"lr": 1.0}))
    assert recipe_hash(base(optim={"momentum": -0.0})) == recipe_hash(base())
    turned = dict(reversed([(key, dict(reversed(list(value.items())))) for key, value in BASE.items()]))
    assert recipe_hash(parse_recipe(turned)) == recipe_hash(base())


def test_the_hash_stays_what_it_was() -> None:
    # Checkpoints name the hash: a change of it makes every earlier run another run.
    assert recipe_hash(base()) == "2d7376be32ba6995"


def test_differences_read_well() -> None:
    a = mathematics(base())
    b = mathematics(base(optim={"lr": 0.05}, model={"name": "a:b", "width": 32, "depth": {"x": 1}}))
    assert differences(a, b) == [
        'model.name: "cnn5" -> "a:b"',
        'model.norm: "batch" -> (absent)',
        "model.dropout: 0.0 -> (absent)",
        "model.hidden: 128 -> (absent)",
        "optim.lr: 0.1 -> 0.05",
        "model.depth.x: (absent) -> 1",
    ]
    assert differences({"x": {"a.b": 1}}, {"x": {"a": {"b": 1}}}) != []


@quick
@given(recipes)
def test_the_resolved_copy_loads_back_to_an_equal_recipe(recipe: Recipe) -> None:
    text = to_yaml(recipe)
    assert recipe_hash(recipe) in text.splitlines()[0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "recipe.yaml")
        file.write_bytes(text.encode())
        again = load_recipe(file)
    assert again == recipe
    assert to_yaml(again) == text


@pytest.mark.parametrize(
    "text", ["1e-3", "null", "", "true", " a", "a\x85b", "a\u2028b", "a\r\nb", "\x7f", "😀"]
)
def test_the_resolved_copy_keeps_any_text(text: str) -> None:
    recipe = base(model={"name": "a:b", "text": text})
    assert parse_recipe(plain_of(to_yaml(recipe))) == recipe


def plain_of(text: str) -> Any:
    tree = parse_yaml(text, str)
    assert tree is not None
    return plain(tree)


@quick
@given(maths)
def test_overrides_say_what_a_file_would(mapping: dict[str, Any]) -> None:
    overrides = [f"{key}={dump_yaml(value)}" for key, value in flat(mapping)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.yaml")
        file.write_text(json.dumps({section: {} for section in mapping}))
        recipe = load_recipe(file, overrides)
    assert mathematics(recipe) == mathematics(parse_recipe(mapping))


def flat(mapping: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, value in mapping.items():
        if section in ("task", "model"):  # their extra keys may hold dots and equals signs
            yield section, value
        else:
            yield from ((f"{section}.{key}", item) for key, item in value.items())


@quick
@given(st.dictionaries(st.sampled_from([*sections, *machinery, "x"]), json_values, max_size=8), st.data())
def test_whatever_is_wrong_is_a_recipe_error(junk: dict[str, Any], data: st.DataObject) -> None:
    mapping: dict[str, Any] = {**BASE, **junk}
    section = data.draw(st.sampled_from([key for key in mapping if isinstance(mapping[key], dict)] or ["x"]))
    if section in mapping:
        keys = st.sampled_from(["name", "lr", "global", "epochs", "every_steps", "augment", "betas"])
        mapping[section] = {**mapping[section], data.draw(keys): data.draw(json_values)}
    with suppress(RecipeError):
        parse_recipe(mapping)


# The JSON Schema


def test_the_schema_describes_every_key() -> None:
    schema = json_schema()
    for name, definition in schema["$defs"].items():
        assert definition.get("description"), name
        for key, option in definition["properties"].items():
            assert option.get("description"), (name, key)
    assert set(schema["else"]["properties"]) == {*Recipe.model_fields, "extends"}


def test_the_schema_knows_every_name_and_range() -> None:
    definitions = json_schema()["$defs"]
    for members in NAMED.values():
        assert {member.__name__ for member in members.values()} <= set(definitions)
    assert definitions["Sgd"]["properties"]["momentum"]["exclusiveMaximum"] == 1
    assert definitions["Batch"]["required"] == ["global", "micro"]
    assert definitions["Train"]["additionalProperties"] is False
    assert definitions["ImportedModel"]["additionalProperties"] is True


def test_a_file_that_extends_may_leave_keys_out() -> None:
    schema = json_schema()
    assert schema["if"] == {"required": ["extends"]}
    assert "batch" in schema["else"]["required"]
    assert '"required"' not in json.dumps(schema["then"])
    assert "required" not in schema["$defs"]["BatchPartial"]
    assert set(re.findall(r'"#/\$defs/([^"]*)"', json.dumps(schema["then"]))) == {
        f"{name}Partial" for name in re.findall(r'"#/\$defs/([^"]*)"', json.dumps(schema["else"]))
    }
    text = json.dumps(schema)
    for reference in {part.split('"')[0] for part in text.split('"#/$defs/')[1:]}:
        assert reference in schema["$defs"]
