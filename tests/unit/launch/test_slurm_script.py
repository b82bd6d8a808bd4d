"""The text of a job: golden files, the examples in slurm/, and values that stay data whatever they hold.

As a program (`python tests/unit/launch/test_slurm_script.py`) this writes the files anew.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distdl.errors import PlanError, RecipeError
from distdl.launch.place import Nodes
from distdl.launch.slurm.profile import SHIPPED, find_profile, load_with_profile
from distdl.launch.slurm.script import Job, directives, doctor_command, program, sbatch_text
from distdl.recipe import load_recipe, recipe_hash
from distdl.recipe.slurm import Slurm, seconds_of

ROOT = Path(__file__).resolve().parents[3]
CONFIG = "configs/fashion_cnn.yaml"
EXAMPLES: dict[str, tuple[str, int, list[str]]] = {
    "single_node": ("1", 4, ["launch.slurm.gpus=4", "launch.slurm.cpus=32", "launch.slurm.time=2:00:00"]),
    "multi_node": ("2", 4, ["launch.slurm.gpus=4", "launch.slurm.cpus=32", "launch.slurm.time=8:00:00"]),
    "seeds": (
        "1",
        1,
        [
            "launch.slurm.gpus=1",
            "launch.slurm.cpus=8",
            "launch.slurm.array=1-6%3",
            "launch.slurm.time=1:00:00",
        ],
    ),
    "elastic": ("1:4", 4, ["launch.slurm.gpus=4", "launch.slurm.cpus=32", "launch.slurm.time=8:00:00"]),
    "preemptible": (
        "1",
        4,
        [
            "launch.slurm.gpus=4",
            "launch.slurm.cpus=32",
            "launch.slurm.partition=preempt",
            "launch.slurm.warn_s=300",
        ],
    ),
}
"""slurm/NAME.sbatch: nodes, processes a node, overrides."""
EVERYTHING: dict[str, Any] = {
    "partition": "gpu,long",
    "account": "alpha",
    "qos": "high",
    "gpus": 4,
    "gpu_type": "a100",
    "gpu_option": "gres",
    "cpus": 32,
    "memory": "64G",
    "time": "1-12:00:00",
    "constraint": "[rack1|rack2]",
    "exclude": "node[03-05]",
    "mail_user": "somebody@example.org",
    "mail_type": "END,FAIL",
    "dependency": "afterok:12:13",
    "array": "0-5",
    "array_key": "optim.lr",
    "extra": ("--reservation=night", "--exclusive"),
    "modules": ("cuda/12.4", "it's $HOME"),
    "setup": ("ulimit -n 65536", "for x in 1 2; do\n  true\ndone"),
    "env": {"NCCL_DEBUG": "WARN", "ODD": "a 'b' \"c\" $(id) `id`\n#SBATCH --nodes=99"},
    "container": ("apptainer", "exec", "--nv", "my image.sif"),
    "warn_s": 90,
    "idle_attempts": 5,
}


def example(name: str) -> str:
    nodes, procs, overrides = EXAMPLES[name]
    overrides = [*overrides, "launch.slurm.python=python"]
    recipe = load_recipe(ROOT / CONFIG, overrides)
    return sbatch_text(Job.of(recipe, CONFIG, overrides, Nodes.parse(nodes), procs, "python"))


def everything(**changes: Any) -> Job:
    overrides = ("optim.lr=0.1", "run.dir=runs/a 'name' 100%")
    said = {"python": "/opt/python", "slurm": Slurm(**EVERYTHING), **changes}
    return Job(CONFIG, overrides, "runs/a 'name' 100%", Nodes(2), 4, **said)


def files() -> dict[Path, str]:
    found = {ROOT / "slurm" / f"{name}.sbatch": example(name) for name in EXAMPLES}
    return {**found, Path(__file__).parent / "golden" / "everything.sbatch": sbatch_text(everything())}


@pytest.mark.parametrize("path", files(), ids=lambda p: p.name)
def test_the_text_is_that_of_the_file(path: Path) -> None:
    assert path.read_text() == files()[path], f"write it anew: python {Path(__file__).relative_to(ROOT)}"
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_every_example_is_kept_in_step() -> None:
    assert {p.stem for p in (ROOT / "slurm").glob("*.sbatch")} == set(EXAMPLES)


def test_a_recipe_has_the_same_hash_whatever_is_asked_of_slurm() -> None:
    plain = load_recipe(ROOT / CONFIG)
    assert recipe_hash(plain) == recipe_hash(load_recipe(ROOT / CONFIG, ["launch.slurm.gpus=4"]))


# --- values are data ---

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=20)
HARD = st.sampled_from(
    ["$(touch X)", "`touch X`", "'; touch X; '", "a\nb", '"', "\\", "-n", "~", "*", "!x", "\n#SBATCH -N9"]
)
VALUE = TEXT | HARD
LINE = VALUE.filter(str.isprintable)

STUB = """#!/bin/bash
printf '%s\\0' "$@" > "$ARGUMENTS"
printf '%s\\0' "$A" "$B_2" > "$VARIABLES"
"""


def words_in(file: Path) -> list[str]:
    return file.read_bytes().decode().split("\0")[:-1]


@settings(max_examples=60)
@given(
    config=VALUE,
    overrides=st.lists(VALUE, max_size=3),
    a=VALUE | st.just(""),
    b=VALUE,
    words=st.lists(VALUE, max_size=2),
    run=LINE,
    module=LINE,
)
def test_values_arrive_as_they_were_given(
    config: str, overrides: list[str], a: str, b: str, words: list[str], run: str, module: str
) -> None:
    """bash runs the text; in the place of Python and of `module` are stubs that write down what they got."""
    with tempfile.TemporaryDirectory(prefix="a b $(c) '") as folder:
        stub = Path(folder) / "py thon"
        stub.write_text(STUB)
        stub.chmod(0o700)
        slurm = Slurm(env={"A": a, "B_2": b}, container=tuple(words), modules=(module,))
        job = Job(config, tuple(overrides), run, Nodes(2), 4, str(stub), slurm)
        took, variables, loaded = (Path(folder) / name for name in ("took", "variables", "loaded"))
        head = f"module() {{ printf '%s\\0' \"$@\" > {shlex.quote(str(loaded))}; }}\n"
        environment = {**os.environ, "ARGUMENTS": str(took), "VARIABLES": str(variables)}
        subprocess.run(["bash", "-c", head + sbatch_text(job)], check=True, cwd=folder, env=environment)
        assert words_in(took) == program(job)[1:]
        assert words_in(variables) == [a, b]
        assert words_in(loaded) == ["load", module]
        assert {p.name for p in Path(folder).iterdir()} == {"py thon", "took", "variables", "loaded"}


@settings(max_examples=30)
@given(config=VALUE, overrides=st.lists(VALUE, max_size=3), a=VALUE, b=VALUE, module=LINE)
def test_the_doctor_s_values_too(config: str, overrides: list[str], a: str, b: str, module: str) -> None:
    """What srun would start on a node, started here."""
    with tempfile.TemporaryDirectory(prefix="a b $(c) '") as folder:
        stub = Path(folder) / "py thon"
        stub.write_text(STUB)
        stub.chmod(0o700)
        slurm = Slurm(env={"A": a, "B_2": b}, modules=(module,), gpus=2, setup=("true",))
        job = Job(config, tuple(overrides), "runs/x", Nodes(2), 1, str(stub), slurm)
        words = doctor_command(job, 30.0, as_json=False)
        assert {"srun", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2"} <= set(words)
        took, variables = (Path(folder) / name for name in ("took", "variables"))
        environment = {**os.environ, "ARGUMENTS": str(took), "VARIABLES": str(variables)}
        shell = words[words.index("bash") :]
        shell[2] = "module() { :; }\n" + shell[2]
        subprocess.run(shell, check=True, cwd=folder, env=environment)
        assert words_in(took)[-len(overrides) - 2 :] == ["--", config, *overrides]
        assert words_in(variables) == [a, b]
        assert {p.name for p in Path(folder).iterdir()} == {"py thon", "took", "variables"}


def read_directive(text: str) -> list[str]:
    """The words of a directive as sbatch takes them: quotes of both kinds, and a backslash everywhere."""
    words: list[str] = []
    word, quote, escaped = "", "", False
    for character in text + " ":
        if escaped:
            word, escaped = word + character, False
        elif character == "\\":
            escaped = True
        elif quote:
            word, quote = (word, "") if character == quote else (word + character, quote)
        elif character in "\"'":
            quote = character
        elif character == "#":
            break
        elif character.isspace():
            words += [word] if word else []
            word = ""
        else:
            word += character
    return words


@given(account=LINE, constraint=LINE, run=LINE.filter(lambda t: "\\" not in t))
def test_a_directive_holds_one_value(account: str, constraint: str, run: str) -> None:
    job = Job(CONFIG, (), run, Nodes(1), 1, "python", Slurm(account=account, constraint=constraint))
    lines = sbatch_text(job).split("\n")
    said = [read_directive(line.removeprefix("#SBATCH ")) for line in lines if line.startswith("#SBATCH ")]
    assert len(said) == len(list(directives(job)))
    assert [f"--account={account}"] in said
    assert [f"--constraint={constraint}"] in said
    assert [f"--output={run.replace('%', '%%')}/slurm/%j.log"] in said


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ('launch.slurm.partition="a\\n#SBATCH --nodes=9"', "expected one line"),
        ('launch.slurm.modules=["a\\nb"]', "expected one line"),
        ("launch.slurm.extra=[reservation=x]", "expected a directive as sbatch has it"),
        ("launch.slurm.array=1-6;x", "expected tasks as Slurm writes them"),
        ("launch.slurm.env={A-B: x}", "expected a name of letters"),
        ("launch.slurm.partitoin=gpu", "did you mean 'partition'"),
        ("launch.slurm.profile=nowhere", "no such profile; known: cpu"),
        ("launch.slurm.time='2'", "asked to save 120 s before a limit of 120 s"),
    ],
)
def test_what_slurm_could_not_be_told_is_refused(override: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=says):
        load_with_profile(str(ROOT / CONFIG), [override], {"XDG_CONFIG_HOME": str(tmp_path)})


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("1-12:30:01", 131_401),
        ("UNLIMITED", None),
    ],
)
def test_a_time_limit_as_slurm_reads_it(time: str, seconds: int | None) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rendezvous", "a:1"], "--rendezvous goes with --on here or --on ssh"),
        (["--node-rank", "0"], "--node-rank goes with --on here"),
        (["--hostfile", "hosts"], "--hostfile goes with --on ssh"),
    ],
)
def test_options_that_would_mean_nothing_are_refused(words: list[str], says: str, tmp_path: Path) -> None:
    code, said = on_login_node("--dry-run", *words, tmp_path=tmp_path)
    assert code == 2
    assert says in " ".join(said.split())


@pytest.mark.parametrize("name", ["a\nb", "a\\b"])
def test_a_run_directory_that_slurm_cannot_log_to_is_refused(name: str) -> None:
    recipe = load_recipe(ROOT / CONFIG)
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": name})})
    with pytest.raises(PlanError, match="Slurm cannot write logs there"):
        Job.of(recipe, CONFIG, [], Nodes(1), 1, "python")


# --- profiles ---


def test_recipe_over_profile_and_command_line_over_recipe(tmp_path: Path) -> None:
    own = tmp_path / "distdl" / "profiles"
    own.mkdir(parents=True)
    (own / "default.yaml").write_text("partition: gpu\naccount: alpha\nenv: {A: '1', B: '1'}\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"extends: {ROOT / CONFIG}\nlaunch: {{slurm: {{account: beta, env: {{B: '2', C: '2'}}}}}}\n"
    )
    found, file = load_with_profile(str(recipe), ["launch.slurm.env.C=3"], {"XDG_CONFIG_HOME": str(tmp_path)})
    assert (found.launch.slurm.partition, found.launch.slurm.account) == ("gpu", "beta")
    assert found.launch.slurm.env == {"A": "1", "B": "2", "C": 3}
    assert file == own / "default.yaml"


def test_a_mistake_in_a_profile_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# ours\npartition: gpu\ngpu: 4\n")
    with pytest.raises(RecipeError, match=rf"{file}:3: launch.slurm.gpu = 4: unknown key"):
        load_with_profile(str(ROOT / CONFIG), [f"launch.slurm.profile={file}"], {"HOME": str(tmp_path)})


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_profile_loads(file: Path, tmp_path: Path) -> None:
    assert find_profile(file.stem, tmp_path) == file
    found, _ = load_with_profile(str(ROOT / CONFIG), [f"launch.slurm.profile={file.stem}"], {"HOME": "/none"})
    assert found.launch.slurm.partition


# --- the command ---

LOGIN_NODE = """
import sys
from distdl.cli.commands import run
code = run()
assert "torch" not in sys.modules
sys.exit(code)
"""


def on_login_node(*arguments: str, tmp_path: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", LOGIN_NODE, "launch", CONFIG, "--on", "slurm", *arguments],
        cwd=ROOT,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_dry_run_needs_neither_slurm_nor_torch(tmp_path: Path) -> None:
    nodes, procs, overrides = EXAMPLES["multi_node"]
    words = [
        "--nodes",
        str(nodes),
        "--procs",
        str(procs),
        "--dry-run",
        *overrides,
        "launch.slurm.python=python",
    ]
    assert on_login_node(*words, tmp_path=tmp_path) == (0, example("multi_node"))
    assert not list(tmp_path.iterdir())


def test_where_there_is_no_slurm_that_is_said(tmp_path: Path) -> None:
    code, said = on_login_node("--test-only", tmp_path=tmp_path)
    assert code == 3
    assert "sbatch is not here: this machine has no Slurm" in said


def test_what_the_plan_refuses_is_refused_before_the_queue(tmp_path: Path) -> None:
    code, said = on_login_node("--dry-run", "--nodes", "3", "--procs", "4", tmp_path=tmp_path)
    assert code == 2
    assert "12 processes for 8 microbatches" in said


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
