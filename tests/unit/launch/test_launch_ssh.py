"""Starting launchers over ssh: the hostfile, the commands, and that every value arrives as it was given."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distdl.cli.ssh import launch_over_ssh
from distdl.errors import PlanError
from distdl.launch.place import Endpoint, Nodes
from distdl.launch.ssh.command import Launch, command_lines, environment
from distdl.launch.ssh.hostfile import Host, parse_hosts, read_hosts
from distdl.launch.ssh.run import explain
from distdl.recipe import load_recipe

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
GOLDEN = Path(__file__).parent / "golden" / "ssh.txt"

LAUNCH = Launch(
    config="configs/fashion_cnn.yaml",
    overrides=("optim.lr=0.05",),
    hosts=(Host("ann@node01", 8), Host("2001:db8::2")),
    procs=4,
    rendezvous=Endpoint("node01"),
    python="/opt/py/bin/python",
    directory="/home/ann/my runs",
    env={"NCCL_DEBUG": "INFO", "NOTE": "it's $(data)"},
)


# --- the hostfile ---


def test_a_hostfile() -> None:
    text = (
        "# ours\nnode01 slots=8\n\n  ann@node02\tslots=4  # the small one\n[2001:db8::2]\n10.0.0.7 slots=1\n"
    )
    hosts = parse_hosts(text, "hosts")
    assert hosts == [Host("node01", 8), Host("ann@node02", 4), Host("2001:db8::2"), Host("10.0.0.7", 1)]
    assert [host.name for host in hosts] == ["node01", "node02", "2001:db8::2", "10.0.0.7"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("node01 slots=2", "hosts:3: node01 stands in line 1 already"),
        ("bob@node01", "hosts:3: node01 stands in line 1 already"),
        ("b slots=0", "hosts:3: 'slots=0': expected slots=N"),
        ("b slots=2 slots=2", "hosts:3: 'slots=2': expected slots=N after the host, once"),
        ("b max_slots=2", "hosts:3: 'max_slots=2': expected slots=N"),
        ("-oProxyCommand=x slots=1", "hosts:3: '-oProxyCommand=x' is no host"),
        ("a@-b", "hosts:3: 'a@-b' is no host"),
        ("b;c", "hosts:3: 'b;c' is no host"),
    ],
)
def test_a_line_at_fault_is_named(line: str, said: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_hosts(f"node01 slots=8\n\n{line}\n", "hosts")
    assert said in str(caught.value)


def test_all_lines_at_fault_are_named_at_once() -> None:
    with pytest.raises(PlanError, match=r"(?s)hosts:1: .*hosts:2: "):
        parse_hosts("a slots=x\nb slots=y\n", "hosts")


def test_no_hosts(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no host in it"):
        parse_hosts("# none\n", "hosts")
    with pytest.raises(PlanError, match="cannot be read"):
        read_hosts(str(tmp_path / "hosts"))


# --- the commands ---


def test_the_commands() -> None:
    assert [shlex.join(words) for words in command_lines(LAUNCH)] == GOLDEN.read_text().splitlines()


def test_the_number_of_processes_may_be_left_to_the_host() -> None:
    first, second = command_lines(replace(LAUNCH, procs=None))
    assert "--procs 8" in first[-1]
    assert "--procs" not in second[-1]


def test_which_variables_go_along() -> None:
    here = {"NCCL_DEBUG": "INFO", "HOME": "/home/ann", "nccl_x": "1"}
    assert environment(here, ["NCCL_*"], {"A": "1"}) == {"NCCL_DEBUG": "INFO", "A": "1"}
    assert environment(here, ["*"], {"HOME": "/"})["HOME"] == "/"


# --- through a shell, as sshd hands the command to one ---


@pytest.fixture(scope="module")
def stubs() -> Iterator[Path]:
    """An ssh that runs the command here, and a Python that says what reached it."""
    with tempfile.TemporaryDirectory() as folder:
        ssh, python = Path(folder) / "ssh", Path(folder) / "py thon"
        ssh.write_text('#!/bin/sh\nfor command; do :; done\nexec sh -c "$command"\n')
        python.write_text(
            f"#!{sys.executable} -ISs\n"
            "import json, os, sys\n"
            "print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))\n"
        )
        for stub in (ssh, python):
            stub.chmod(0o755)
        yield Path(folder)


TEXT = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20
) | st.sampled_from(
    [
        "$(touch x)",
        "`id`",
        "a b",
        "'",
        '"',
        "\\",
        "\n",
        "--",
        "-e",
        "!!",
        "*",
        "~",
        "%s",
        "a\r\nb",
        "#",
        ";&|<>",
    ]
)
NAME = TEXT.filter(lambda text: text and "=" not in text)
FOLDER = TEXT.filter(
    lambda text: text not in ("", ".", "..") and "/" not in text and len(text.encode()) < 200
)


@settings(max_examples=40)
@given(
    env=st.dictionaries(NAME, TEXT, max_size=3),
    config=TEXT,
    overrides=st.lists(TEXT, max_size=3),
    name=FOLDER,
)
def test_everything_arrives_as_it_was_given(
    stubs: Path, env: dict[str, str], config: str, overrides: list[str], name: str
) -> None:
    env = {n: v for n, v in env.items() if n not in ("PWD", "OLDPWD", "SHLVL", "_", "PATH", "LC_CTYPE")}
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / name
        folder.mkdir()
        launch = replace(
            LAUNCH,
            config=config,
            overrides=tuple(overrides),
            env=env,
            directory=str(folder),
            python=str(stubs / "py thon"),
            client=(str(stubs / "ssh"),),
        )
        for words in command_lines(launch):
            done = subprocess.run(words, capture_output=True, check=True)
            arguments, reached, where = json.loads(done.stdout)
            assert arguments[:3] == ["-m", "distdl", "launch"]
            assert arguments[arguments.index("--heed-stdin") + 1 :] == ["--", config, *overrides]
            assert {n: reached.get(n) for n in env} == env
            assert where == str(folder.resolve())
        assert list(folder.iterdir()) == []


def test_a_folder_that_is_not_there_is_told_and_ends_with_3(stubs: Path, tmp_path: Path) -> None:
    launch = replace(LAUNCH, directory=str(tmp_path / "none"), client=(str(stubs / "ssh"),))
    done = subprocess.run(command_lines(launch)[0], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert str(tmp_path / "none") in done.stderr


# --- what an end means ---

REFUSED = "ssh: connect to host node01 port 22: Connection refused"


@pytest.mark.parametrize(
    ("code", "said", "meant", "words"),
    [
        (255, REFUSED, 3, "no ssh server listens there"),
        (255, "ann@node01: Permission denied (publickey).", 3, "`ssh-copy-id ann@node01` installs it"),
        (255, "No ED25519 host key is known\nHost key verification failed.", 3, "is not known here"),
        (
            255,
            "REMOTE HOST IDENTIFICATION HAS CHANGED!\nHost key verification failed.",
            3,
            "another than before",
        ),
        (255, "ssh: Could not resolve hostname node01: Name or service not known", 3, "check the spelling"),
        (255, "step 10/60", 70, "the connection to node 1 (node01) was lost"),
        (-9, "", 70, "the connection to node 1 (node01) was lost"),
        (127, "env: '/p': No such file or directory", 3, "no Python at /p"),
        (1, "/p: No module named distdl", 3, "install it there"),
        (137, "", 70, "was ended by SIGKILL"),
        (70, "error: [rank 1", 70, "failed first, with exit code 70"),
        (75, "", 75, ""),
        (143, "", 143, ""),
    ],
)
def test_what_an_end_means(code: int, said: str, meant: int, words: str) -> None:
    found: tuple[int, Any] = explain(Host("ann@node01"), 1, code, said, "/p")
    assert found[0] == meant
    assert words in found[1] if words else found[1] == ""


@pytest.mark.parametrize("asked", [Nodes(4, 1), None])
def test_a_range_of_hosts_is_refused(asked: Nodes | None, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node01\nnode02\n")
    recipe = load_recipe(CONFIGS / "fashion_cnn.yaml", ["launch.nodes=4", "launch.min_nodes=1"])
    with pytest.raises(PlanError, match=r"--nodes 1:4 .*all hosts are needed"):
        launch_over_ssh(
            recipe,
            "recipe.yaml",
            [],
            hostfile=str(tmp_path / "hosts"),
            nodes=asked,
            procs=1,
            rendezvous=None,
            dry_run=True,
            allow_changed=False,
        )
