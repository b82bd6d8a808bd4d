"""Reading recipes: YAML, extends, overrides, and the errors for what cannot be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distdl.errors import RecipeError
from distdl.recipe import load_recipe, parse_recipe

BASE = """\
task: {name: image_classification}
model: {name: cnn5, width: 16}
data: {name: fashion_mnist, augment: {flip: true}}
batch: {global: 256, micro: 32}
optim: {name: sgd, lr: 0.1, momentum: 0.9}
schedule: {name: cosine, warmup_steps: 100}
train: {epochs: 5, seed: 7}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()


def write(text: str, name: str = "x.yaml") -> str:
    path = Path("configs", name)
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(path: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_a_recipe_holds_what_was_written_and_the_defaults() -> None:
    recipe = load_recipe(write(BASE))
    assert (recipe.batch.global_, recipe.batch.micro) == (256, 32)
    assert recipe.model.options() == {"width": 16, "norm": "batch", "dropout": 0.0, "hidden": 128}
    assert recipe.schedule.name == "cosine"
    assert recipe.eval.every_epochs == 1
    assert recipe.checkpoint.keep == 3


def test_the_schedule_is_constant_unless_said() -> None:
    recipe = load_recipe(write(BASE.replace("schedule: {name: cosine, warmup_steps: 100}\n", "")))
    assert (recipe.schedule.name, recipe.schedule.options()) == ("constant", {"warmup_steps": 0})


def test_the_run_directory_defaults_to_the_stem_of_the_file() -> None:
    assert load_recipe(write(BASE, "fashion_cnn.yaml")).run.dir == "runs/fashion_cnn"
    assert load_recipe(write(BASE + "run: {dir: elsewhere}\n")).run.dir == "elsewhere"


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-3", 0.001), ("1E2", 100.0), ("+.5", 0.5), ("1.", 1.0), ("3", 3.0), ("017", 17.0), ("0x10", 16.0)],
)
def test_numbers_are_those_of_yaml_1_2(written: str, value: float) -> None:
    assert load_recipe(write(BASE), [f"optim.lr={written}"]).optim.lr == value


@pytest.mark.parametrize("written", ["no", "on", "2001-01-01", "1:30", "1_000", "'3'", "=", "<<"])
def test_words_that_yaml_1_1_converts_stay_texts(written: str) -> None:
    recipe = load_recipe(write(BASE), ["model.name=my.mod:make", f"model.option={written}"])
    assert recipe.model.options() == {"option": written.strip("'")}


def test_a_model_of_your_own_gets_its_extra_keys() -> None:
    recipe = load_recipe(write(BASE), ["model={name: 'a.b:C.make', depth: 3, name_of: [x, null], copy: 1.5}"])
    assert recipe.model.options() == {"depth": 3, "name_of": ["x", None], "copy": 1.5}


def test_a_resolved_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(write(BASE)).train.seed = 3  # type: ignore[misc]


# extends


def test_extends_merges_key_by_key_along_a_chain() -> None:
    write(BASE, "a.yaml")
    write("extends: a.yaml\noptim: {lr: 0.2}\n", "b.yaml")
    (Path("configs") / "sub").mkdir()
    recipe = load_recipe(write("extends: ../b.yaml\noptim: {momentum: 0.5}\n", "sub/c.yaml"))
    assert recipe.optim.options() | {"lr": 0.2, "momentum": 0.5} == recipe.optim.options()
    assert recipe.model.options()["width"] == 16
    assert recipe.run.dir == "runs/c"


def test_a_section_that_changes_its_name_replaces_the_one_below() -> None:
    write(BASE, "a.yaml")
    recipe = load_recipe(write("extends: a.yaml\noptim: {name: adamw, lr: 1e-3}\n"))
    assert recipe.optim.name == "adamw"
    assert "momentum" not in recipe.optim.options()
    kept = load_recipe(write("extends: a.yaml\noptim: {name: sgd, lr: 1}\n"))
    assert kept.optim.options()["momentum"] == 0.9


def test_a_replaced_section_says_what_it_replaced() -> None:
    text = refusal(write(BASE), "optim.name=adamw")
    assert text.startswith("override optim.name=adamw (replaces configs/x.yaml:5): optim: missing")


def test_data_by_path_replaces_data_by_name_and_back() -> None:
    by_path = load_recipe(write(BASE), ["data.path=/mnt/f"])
    assert (by_path.data.name, by_path.data.path, by_path.data.augment.flip) == (None, "/mnt/f", False)
    by_name = load_recipe(write(BASE.replace("name: fashion_mnist", "path: /x")), ["data.name=fashion_mnist"])
    assert (by_name.data.name, by_name.data.path) == ("fashion_mnist", None)
    other = load_recipe(write(BASE), ["data.name=mnist"])
    assert (other.data.name, other.data.augment.flip) == ("mnist", True)


@pytest.mark.parametrize("section", ["eval", "checkpoint"])
def test_a_period_in_steps_turns_the_one_in_epochs_off(section: str) -> None:
    def periods(*overrides: str, text: str = "") -> tuple[int | None, int | None]:
        part = getattr(load_recipe(write(BASE + text), overrides), section)
        return part.every_epochs, part.every_steps

    assert periods() == (1, None)
    assert periods(text=f"{section}: {{every_steps: 50}}\n") == (None, 50)
    assert periods(f"{section}.every_steps=9", text=f"{section}: {{every_epochs: 2}}\n") == (None, 9)
    assert periods(f"{section}.every_epochs=2", text=f"{section}: {{every_steps: 50}}\n") == (2, None)
    assert periods(f"{section}.every_epochs=null") == (None, None)


def test_periods_are_free_names_for_a_model_of_your_own() -> None:
    write(BASE.replace("{name: cnn5, width: 16}", "{name: 'a:b', every_epochs: 2}"), "a.yaml")
    recipe = load_recipe(write("extends: a.yaml\nmodel: {every_steps: 3}\n"))
    assert recipe.model.options() == {"every_epochs": 2, "every_steps": 3}


def test_extends_in_a_circle_shows_the_chain() -> None:
    write("extends: b.yaml", "a.yaml")
    write("extends: ../configs/a.yaml", "b.yaml")
    assert "configs/a.yaml -> configs/b.yaml -> configs/a.yaml" in refusal("configs/a.yaml")


def test_another_name_of_the_same_file_closes_the_circle() -> None:
    write("extends: link.yaml", "a.yaml")
    Path("configs/link.yaml").symlink_to("a.yaml")
    assert refusal("configs/a.yaml").endswith("circle: configs/a.yaml -> configs/link.yaml")


def test_extends_of_a_missing_file_names_the_line_and_the_nearest() -> None:
    write(BASE, "fashion.yaml")
    text = refusal(write("# first line\nextends: fashon.yaml\n", "a.yaml"))
    assert text.startswith("configs/a.yaml:2: extends: configs/fashon.yaml: no such file")
    assert "'fashion.yaml'" in text


@pytest.mark.parametrize("written", ["3", "[a.yaml]", "''"])
def test_extends_must_be_a_path(written: str) -> None:
    assert "expected the path of another recipe" in refusal(write(f"extends: {written}\n"))


# overrides


def test_overrides_are_typed_by_the_rules_of_a_file() -> None:
    overrides = ["optim.lr=0.05", "optim.clip_norm=1", "data.augment.crop_padding=2", "data.shuffle=false"]
    recipe = load_recipe(write(BASE), [*overrides, "run.dir=a=b"])
    assert (recipe.optim.lr, recipe.optim.clip_norm, recipe.data.shuffle) == (0.05, 1.0, False)
    assert (recipe.data.augment.crop_padding, recipe.data.augment.flip) == (2, True)
    assert recipe.run.dir == "a=b"


def test_an_override_without_a_value_is_null() -> None:
    assert load_recipe(write(BASE), ["train.max_steps=9", "train.epochs="]).train.epochs is None


def test_the_order_of_overrides_matters_only_for_the_same_key() -> None:
    path = write(BASE)
    assert load_recipe(path, ["optim.lr=1", "optim.lr=2"]).optim.lr == 2
    overrides = ["optim.eps=1e-6", "optim.name=adamw", "optim.lr=1e-3"]
    assert load_recipe(path, overrides) == load_recipe(path, overrides[::-1])


@pytest.mark.parametrize("text", ["optim.lr", "=3", "optim.=3", ".lr=3", ""])
def test_an_override_of_the_wrong_form_is_shown_the_right_one(text: str) -> None:
    assert refusal(write(BASE), text) == f"override {text}: expected section.key=value, such as optim.lr=0.05"


def test_overrides_cannot_extend() -> None:
    assert "in a recipe file only" in refusal(write(BASE), "extends=a.yaml")


# what cannot be read


def test_a_missing_file_names_the_nearest() -> None:
    write(BASE, "fashion_cnn.yaml")
    text = refusal("configs/fashon_cnn.yaml")
    assert text == "configs/fashon_cnn.yaml: no such file; did you mean 'fashion_cnn.yaml'?"
    assert refusal("configs/zzz.yaml").endswith("recipes there: fashion_cnn.yaml")
    assert "its folder nowhere" in refusal("nowhere/x.yaml")


def test_a_folder_is_not_a_recipe() -> None:
    assert refusal("configs").startswith("configs: cannot be read: Is a directory")


def test_bytes_that_are_not_text_are_refused() -> None:
    Path("configs/x.yaml").write_bytes(b"task: \xff\xfe")
    assert "not UTF-8 text (byte 6)" in refusal("configs/x.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "configs/x.yaml: the file is empty"),
        ("# nothing\n", "configs/x.yaml: the file is empty"),
        ("\n- task\n", "configs/x.yaml:2: expected sections such as task, model and data, got a list"),
        ("hello\n", "configs/x.yaml:1: expected sections such as task, model and data, got a single value"),
        ("a: 1\nb: [1, 2\n", "configs/x.yaml:3: not valid YAML: while parsing a flow sequence"),
        ("a: 1\n---\nb: 2\n", "configs/x.yaml:2: not valid YAML: expected a single document"),
        ("a: 1\n\nb: 2\na: 3\n", "configs/x.yaml:4: the key 'a' was already given at configs/x.yaml:1"),
        (
            "optim:\n  lr: 1\n  lr: 2\n",
            "configs/x.yaml:3: the key 'lr' was already given at configs/x.yaml:2",
        ),
        ("a: \x00\n", "configs/x.yaml:1: not valid YAML: unacceptable character"),
        ("3: 4\n", "configs/x.yaml:1: the key '3' is not a text"),
        ("a: 1\nb: .nan\n", "configs/x.yaml:2: '.nan' is not a finite number"),
        ("b: 1e999\n", "configs/x.yaml:1: '1e999' is not a finite number"),
        ("a: !!int x\n", "configs/x.yaml:1: 'x' is not of type int"),
        ("a: !!python/name:os.system\n", "configs/x.yaml:1: the tag !!python/name:os.system is not allowed"),
        ("a: !!binary aGk=\n", "configs/x.yaml:1: the tag !!binary is not allowed"),
        ("a: !!set {x}\n", "configs/x.yaml:1: the tag !!set is not allowed"),
        ("a: &a\n  b: *a\n", "more than 32 levels"),
        ("a: &a [*a, *a]\n", "aliases included"),
        ("[" * 3000, "configs/x.yaml:1: not valid YAML: nested too deeply"),
        ('a: "\\ud800"\n', "is not a text in Unicode"),
    ],
)
def test_what_is_not_a_recipe_is_refused_with_its_line(text: str, message: str) -> None:
    assert message in refusal(write(text))


def test_aliases_cannot_blow_up() -> None:
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 12))
    assert "20000 values, aliases included" in refusal(write(f"l0: &l0 [1]\n{levels}"))


# programs


def test_a_mapping_is_a_recipe_too() -> None:
    recipe = parse_recipe(
        {
            "task": {"name": "pkg.mod:Task", "weights": (1, 2.5)},
            "model": {"name": "cnn5"},
            "data": {"path": "/data"},
            "batch": {"global": 8, "micro": 4},
            "optim": {"name": "adamw", "lr": 1, "betas": (0.5, 0.9)},
            "train": {"max_steps": 3},
        }
    )
    assert recipe.task.options() == {"weights": [1, 2.5]}
    assert recipe.optim.options()["betas"] == [0.5, 0.9]
    assert recipe.run.dir is None


@pytest.mark.parametrize("value", [object(), float("nan"), {1: 2}, b"x"])
def test_a_mapping_holds_json_types_only(value: object) -> None:
    with pytest.raises(RecipeError, match=r"^mine: (model|the recipe)"):
        parse_recipe({"model": {"name": "a:b", "option": value}}, source="mine")


def test_a_mapping_is_needed() -> None:
    with pytest.raises(RecipeError, match="expected sections such as"):
        parse_recipe([1])  # type: ignore[arg-type]


def test_importing_recipes_does_not_import_torch() -> None:
    code = "import sys, distdl.recipe; sys.exit(any(m.split('.')[0] == 'torch' for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0
