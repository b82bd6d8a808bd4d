"""The documentation is true: commands exist, examples run, links lead somewhere, tables match the schema.

As a program (`python tests/cli/test_docs.py`) this writes the tables of docs/recipe.md anew.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from PIL import Image

from distdl import errors
from distdl.checkpoint.write import COPIED
from distdl.cli import commands
from distdl.data import CATALOGUE
from distdl.errors import DataError
from distdl.plan import make_plan
from distdl.recipe import Recipe, json_schema, load_recipe, recipe_hash
from distdl.recipe.problems import describe
from distdl.samples import DataInfo, Field
from distdl.topology import Topology
from tests.commands import distdl

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
BASE = "configs/fashion_cnn.yaml"
SECTIONS = tuple(Recipe.model_fields)


# --- reading the pages ---


@dataclass(frozen=True)
class Block:
    """One fenced block: the page and line it stands at, its language, its text, the mark above it if any."""

    page: Path
    line: int
    language: str
    text: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path, text: str) -> Iterator[Block]:
    """The fenced blocks of a page; `<!-- run -->` on the line above marks one."""
    start, language, inside, above = 0, "", [], ""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```") and not start:
            start, language, inside = number, line[3:].strip(), []
        elif line.startswith("```"):
            mark = re.fullmatch(r"<!-- (run.*) -->", above)
            yield Block(page, start, language, "\n".join(inside) + "\n", mark[1] if mark else "")
            start, above = 0, ""
        elif start:
            inside.append(line)
        else:
            above = line
    assert not start, f"{page}: the block at line {start} is not closed"


BLOCKS = [block for page in PAGES for block in read_blocks(page, page.read_text())]


@dataclass(frozen=True)
class Command:
    """One `$ ...` line of a console block and the output shown below it."""

    block: Block
    text: str
    output: str

    def __str__(self) -> str:
        return f"{self.block}: {self.text}"

    @property
    def words(self) -> list[str]:
        """The command's words, without comments, assignments before it and a redirection after it."""
        words = shlex.split(self.text, comments=True)
        words = list(itertools.dropwhile(lambda w: re.match(r"[A-Z_]+=", w), words))
        return list(itertools.takewhile(lambda w: w not in (">", "|", "&&"), words))


def read_commands(block: Block) -> Iterator[Command]:
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        text, _, output = part.partition("\n")
        yield Command(block, text, output)


COMMANDS = [command for block in BLOCKS if block.language == "console" for command in read_commands(block)]
DISTDL = [c for c in COMMANDS if "distdl" in c.words]


def distdl_words(command: Command) -> list[str]:
    """What follows `distdl`: also in `torchrun ... -m distdl train ...`."""
    return command.words[command.words.index("distdl") + 1 :]


def named(items: list[Any]) -> Any:
    return pytest.mark.parametrize("it", items, ids=lambda i: str(i).replace(f"{ROOT}/", ""))


def test_there_is_something_to_check() -> None:
    assert {p.name for p in PAGES} >= {"README.md", "CONTRIBUTING.md", "recipe.md", "errors.md"}
    assert {words[0] for c in DISTDL if (words := distdl_words(c))} == set(click_group().commands)
    assert any(c.words[0] == "torchrun" for c in COMMANDS)
    assert sum(bool(b.mark) for b in BLOCKS) >= 5


def test_the_reader_of_blocks() -> None:
    text = (
        "a\n\n<!-- run -->\n```python\nx\n```\n```console\n$ A=1 distdl plan x > y  # why\nout\n$ ls\n```\n"
    )
    python, console = read_blocks(ROOT / "x.md", text)
    assert (python.language, python.text, python.mark, python.line) == ("python", "x\n", "run", 4)
    first, second = read_commands(console)
    assert (first.words, first.output, console.mark) == (["distdl", "plan", "x"], "out\n", "")
    assert second.words == ["ls"]


# --- commands ---


def click_group() -> Any:
    return typer.main.get_command(commands.app)


@named(DISTDL)
def test_a_distdl_command_parses(it: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The subcommand and its options exist, and where it takes a recipe, that loads with the changes."""
    monkeypatch.chdir(ROOT)
    name, *arguments = distdl_words(it)
    assert name in click_group().commands
    given = click_group().commands[name].make_context(name, arguments).params
    if given.get("config") and not it.output.startswith("error: "):
        recipe = load_recipe(given["config"], given["overrides"] or [])
        for asked in (recipe.task.name, recipe.model.name):
            module = asked.partition(":")[0] if ":" in asked else None
            assert module is None or (ROOT / f"{module.replace('.', '/')}.py").is_file()


@named([c for c in DISTDL if c.words[:2] == ["distdl", "plan"] and "/path/to" not in c.text])
def test_plan_prints_what_the_page_shows(
    it: Command, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """On a machine with two cores, no GPU and nothing prepared. A page may show no output."""
    for path in ROOT.iterdir():
        if path.name not in ("data", "runs"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTDL_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("distdl.topology.usable_cpus", lambda: 2)
    monkeypatch.setattr(sys, "argv", it.words)
    code = commands.run()
    out, err = capfd.readouterr()
    assert (code == errors.DONE) == (not it.output.startswith("error: "))
    if it.output:
        printed = [line.rstrip() for line in (out + err).rstrip().splitlines()]
        assert printed == it.output.rstrip().splitlines()


@named([c for c in COMMANDS if c.words[:1] == ["bash"]])
def test_a_script_exists_and_is_bash(it: Command) -> None:
    script, arguments = ROOT / it.words[1], it.words[2:]
    subprocess.run(["bash", "-n", str(script)], check=True)
    for option in (a for a in arguments if a.startswith("--")):
        assert option in script.read_text()
    for change in (a for a in arguments if "=" in a):
        load_recipe(ROOT / BASE, [change])


@named([c for c in COMMANDS if c.words[:1] == ["torchrun"]])
def test_a_torchrun_command_parses(it: Command) -> None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(it.words[1:])
    assert (given.module, given.training_script) == (True, "distdl")


def test_a_command_is_one_that_is_checked() -> None:
    plain = {"cat", "tail", "ls", ".", ".venv/bin/pre-commit"}
    others = {c.words[0] for c in COMMANDS} - {"distdl", "bash", "torchrun", "python"}
    assert others <= plain
    for module in (c.words[2] for c in COMMANDS if c.words[0] == "python"):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


@pytest.mark.slow
@named([c for c in DISTDL if c.words[1] == "train" and c.output.startswith("error: ")])
def test_train_ends_with_the_error_shown(it: Command, tmp_path: Path) -> None:
    cache = {"DISTDL_CACHE": str(tmp_path / "cache")}
    arguments = [*it.words[1:], f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-m", "distdl", *arguments],
        cwd=ROOT, env={**os.environ, **cache}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == errors.USAGE
    assert done.stderr.rstrip() == it.output.rstrip()


# --- links and paths ---


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in found}


@named(PAGES)
def test_links_lead_somewhere(it: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", it.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (it.parent / file).resolve() if file else it
        assert there.exists(), f"{it.name}: {target}"
        assert there.is_relative_to(ROOT)
        assert not anchor or anchor in headings(there), f"{it.name}: {target}: has {sorted(headings(there))}"


@named(PAGES)
def test_paths_of_this_repository_exist(it: Path) -> None:
    text = it.read_text()
    for command in COMMANDS:
        if command.block.page == it and command.output.startswith("error: "):
            text = text.replace(command.text, "").replace(command.output, "")
    parts = "distdl|configs|launch|tests|benchmarks|docs|examples"
    words = re.findall(rf"[`\s(]((?:{parts})/[\w./-]*\w)", text)
    assert [word for word in words if not (ROOT / word).exists()] == []


def test_every_page_is_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    pages = sorted((ROOT / "docs").glob("*.md"))
    assert [p.name for p in pages if f"(docs/{p.name})" not in readme] == []


@named(PAGES)
def test_no_figure_is_left_open(it: Path) -> None:
    assert re.findall(r"FIGURE\(\w+\)", it.read_text()) == []


# --- examples in Python and YAML ---


@named([b for b in BLOCKS if b.language == "python"])
def test_python_compiles(it: Block) -> None:
    compile(it.text, str(it), "exec")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the examples run: with the run directory that they speak of."""
    from distdl.checkpoint.manifest import Facts
    from distdl.checkpoint.retention import Keep
    from distdl.checkpoint.store import store_at
    from distdl.checkpoint.write import Saver
    from distdl.comm import World
    from distdl.models.cnn5 import Cnn5
    from distdl.pieces import Piece

    folder = tmp_path_factory.mktemp("stage")
    held = {f"model/{name}": Piece(t, tuple(t.shape)) for name, t in Cnn5(1, 10).state_dict().items()}
    facts = Facts(400, "0" * 16, {}, "0" * 32, {"step": 400}, "ddp")
    Saver(store_at(folder / "runs" / "fashion_cnn" / "checkpoints"), World(), Keep(1)).save(held, facts)
    return folder


@pytest.mark.slow
@named([b for b in BLOCKS if b.mark])
def test_python_runs(it: Block, stage: Path, tmp_path: Path) -> None:
    """In a folder of its own, or at the top of the checkout where the mark says so."""
    file = tmp_path / "example.py"
    file.write_text(it.text)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-W", "error", str(file)],
        cwd=ROOT if it.mark == "run: repository" else stage,
        env={**os.environ, "PATH": path, "DISTDL_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_documented_way_to_read_a_checkpoint_fills_the_model(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distdl.models.cnn5 import Cnn5

    (example,) = (b for b in BLOCKS if "load_file" in b.text)
    monkeypatch.chdir(stage)
    scope: dict[str, Any] = {}
    exec(example.text, scope)
    assert Cnn5(1, 10).load_state_dict(scope["weights"])


@pytest.mark.slow
def test_the_documented_way_to_write_data_makes_a_folder_that_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distdl.data import describe as describe_data

    (example,) = (b for b in BLOCKS if "to_parquet" in b.text)
    subprocess.run([sys.executable, "-c", example.text], cwd=tmp_path, check=True, capture_output=True)
    info = describe_data(None, tmp_path)
    assert info.rows == {"train": 400, "test": 100}
    assert info.fields["image"].shape == (16, 16)
    assert info.fields["label"].num_classes == 2


@named([b for b in BLOCKS if b.language == "yaml"])
def test_yaml_is_a_recipe_or_lies_over_one(it: Block, tmp_path: Path) -> None:
    sections = yaml.safe_load(it.text)
    sections["extends"] = os.path.relpath(ROOT / BASE, tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(sections))
    load_recipe(file)


def test_the_recipe_in_the_readme_is_the_one_that_the_quickstart_runs() -> None:
    shown = [b.text for b in BLOCKS if b.page.name == "README.md" and b.language == "yaml"]
    assert shown == [(ROOT / BASE).read_text()]


@named([p.relative_to(ROOT) for p in [*CONFIGS, *EXAMPLES]])
def test_every_recipe_loads_and_plans(it: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(it)
    assert re.fullmatch(r"[0-9a-f]{16}", recipe_hash(recipe))
    column, splits = recipe.data.sequence or "text", (recipe.data.train_split, recipe.data.eval_split)
    rows = DataInfo(
        "any",
        dict.fromkeys(splits, 1000),
        {column: Field("int32", (None,))},  # for the orders that look at lengths
        "0" * 32,
        elements={split: {column: 10**6} for split in splits},
    )
    assert make_plan(recipe, Topology.of(1, 2, cpus=2), rows).world_size == 2
    if recipe.data.path and not Path(recipe.data.path).exists():  # data that a script fetches
        with pytest.raises(DataError, match="does not exist"):
            commands._plan(recipe, 1, 2)
    elif recipe.data.name and CATALOGUE[recipe.data.name].embedded is None:  # data from a hub
        monkeypatch.setenv("DISTDL_DATA", "/nowhere")
        with pytest.raises(DataError, match="is not prepared"):
            commands._plan(recipe, 1, 2)
    else:
        assert commands._plan(recipe, 1, 2).world_size == 2


@pytest.mark.slow
@named([p.relative_to(ROOT) for p in EXAMPLES if load_recipe(p).data.name])
def test_every_example_trains(it: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose data have to be made first are trained by test_examples."""
    changes = ["train.max_steps=2", f"run.dir={tmp_path / 'run'}", "hardware.threads=1"]
    monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "cache"))
    code, said = distdl("launch", str(it), "--procs", "2", *changes, cwd=ROOT, timeout_s=120)
    assert code == 0, said
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2
    assert f"eval_{load_recipe(ROOT / it).eval.metric}" in last
    if "own_task" in str(it):  # a task of a user's own predicts as the built-in ones do
        check_it_cleans(tmp_path)


def check_it_cleans(folder: Path) -> None:
    """The run in `folder`/run gives a folder of pictures back, and draws them."""
    photos, plot, out = folder / "photos", folder / "clean.png", folder / "clean.jsonl"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 256, (28, 28), np.uint8)).save(photos / f"{name}.png")
    words = ["predict", str(folder / "run" / "recipe.yaml"), "--input", str(photos), "--out", str(out)]
    code, said = distdl(*words, "--plot", str(plot), cwd=ROOT)
    assert code == 0, said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [Path(row["file"]).name for row in rows] == ["a.png", "b.png"]
    cleaned = [np.asarray(Image.open(folder / row["image"])) for row in rows]
    assert cleaned[0].shape == (28, 28)
    assert (cleaned[0] != cleaned[1]).any()
    assert plot.stat().st_size > 10_000


# --- tables ---


def table_rows(page: Path) -> list[list[str]]:
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("page", ["README.md", "docs/errors.md"])
def test_the_exit_codes_listed_are_all_there_are(page: str) -> None:
    listed = {int(row[0]) for row in table_rows(ROOT / page) if row[0].isdigit()}
    known = {value for name, value in vars(errors).items() if name.isupper() and isinstance(value, int)}
    assert listed - {130} == known


def test_each_exit_code_names_its_errors() -> None:
    for code, said, *_ in table_rows(ROOT / "docs" / "errors.md"):
        for name in re.findall(r"`(\w+)`", said) if code.isdigit() else ():
            assert getattr(errors, name).exit_code == int(code)


def test_the_fault_points_listed_are_all_there_are() -> None:
    page = (ROOT / "docs" / "testing-your-own.md").read_text()
    listed = set(re.findall(r"`((?:start|train|eval|save|replica|prepare|stage)\.[a-z_]+)`", page))
    sources = [p.read_text() for p in (ROOT / "distdl").rglob("*.py") if p.name != "faults.py"]
    named_in_code = {n for text in sources for n in re.findall(r"\bpoint\(\s*\"([\w.]+)\"", text)}
    assert listed == {*named_in_code, COPIED}


def test_the_tour_names_functions_that_exist() -> None:
    from distdl.launch.agent import RunAgent
    from distdl.plan import Plan
    from distdl.train.loop import fit, train_step
    from distdl.train.session import Session

    text = (ROOT / "CONTRIBUTING.md").read_text()
    there = {f"{c.__name__}.{n}" for c in (RunAgent, Plan, Session) for n in vars(c)}
    there |= {fit.__name__, train_step.__name__}
    for name in re.findall(r"`((?:RunAgent|Plan|Session)\.\w+)`", text):
        assert name in there


# --- docs/recipe.md ---

BEGIN, END = "<!-- keys: begin -->\n", "<!-- keys: end -->\n"


def default_of(key: str, schema: dict[str, Any], required: list[str]) -> str:
    return "required" if key in required else f"`{json.dumps(schema['default'])}`"


def resolve(schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
    return found


def key_rows(prefix: str, section: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(key, allowed, default, meaning) for each key of a section; sections inside are unfolded."""
    for key, schema in section["properties"].items():
        if "$ref" in schema:
            yield from key_rows(f"{prefix}.{key}", resolve(schema))
            continue
        default = default_of(key, schema, section.get("required", []))
        yield f"{prefix}.{key}", describe(schema), default, schema["description"]


def render_section(name: str, schema: dict[str, Any], required: bool) -> Iterator[str]:
    title = schema.get("description", "")
    for choice in schema.get("oneOf", [schema]):
        section = resolve(choice)
        named = section["properties"].get("name", {})
        what = named.get("const", "") or ", ".join(named.get("enum", ()))
        own = " of your own" if "oneOf" in schema and not what else ""
        yield f"### `{name}`" + (f": {what}" if what and "oneOf" in schema else own)
        text = section.get("description") or title
        yield f"\n{text}{' Required section.' if required else ''}\n"
        yield "| key | allowed | default | meaning |\n|---|---|---|---|"
        for row in key_rows(name, section):
            key, allowed, default, meaning = row
            yield f"| `{key}` | {allowed} | {default} | {meaning} |"
        yield ""


def render_keys() -> str:
    """The tables of docs/recipe.md, from the JSON Schema."""
    whole = json_schema()["else"]
    lines = (
        render_section(name, whole["properties"][name], name in whole["required"])
        for name in whole["properties"]
        if name != "extends"
    )
    return "\n" + "\n".join(itertools.chain.from_iterable(lines)) + "\n"


def split_page() -> tuple[str, str, str]:
    head, _, rest = (ROOT / "docs" / "recipe.md").read_text().partition(BEGIN)
    keys, _, tail = rest.partition(END)
    return head, keys, tail


def test_the_recipe_page_lists_every_key_as_the_schema_has_it() -> None:
    assert split_page()[1] == render_keys(), "write it anew: python tests/cli/test_docs.py"


def test_the_tables_say_what_the_models_do() -> None:
    """Against the classes themselves, in case the writer of the tables is wrong."""
    from distdl.recipe.named import NAMED

    listed = {row[0].strip("`"): row[2] for row in table_rows(ROOT / "docs" / "recipe.md")}
    for section in SECTIONS:
        field = Recipe.model_fields[section].annotation
        for model in NAMED[section].values() if section in NAMED else [field]:
            for name, key in model.model_fields.items():  # type: ignore[union-attr]
                dotted = f"{section}.{key.alias or name}"
                if any(k.startswith(f"{dotted}.") for k in listed):
                    continue
                assert dotted in listed
                assert (listed[dotted] == "required") == key.is_required()
    assert listed["train.seed"] == "`0`"
    assert listed["data.augment.flip"] == "`false`"
    assert listed["optim.betas"] == "`[0.9, 0.999]`"
    assert listed["batch.global"] == "required"


def main() -> None:
    head, _, tail = split_page()
    (ROOT / "docs" / "recipe.md").write_text(head + BEGIN + render_keys() + END + tail)


if __name__ == "__main__":
    main()
