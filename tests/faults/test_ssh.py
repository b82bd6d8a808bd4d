"""`--on ssh` with a real sshd on loopback, started by the test: it trains, it stops, nobody stays behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distdl.testing import assert_same_bits
from tests.faults.support import Launched, command_of, events, tensors_of, wait_for_event, write_recipe
from tests.runs import train_here

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        SSHD is None or shutil.which("ssh") is None or os.getuid() != 0,
        reason="needs root and OpenSSH: apt-get install openssh-server openssh-client",
    ),
]

CONFIG = """
Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {folder}/host
AuthorizedKeysFile {folder}/me.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
"""
SEPARATION = Path("/run/sshd")
"""Debian's sshd wants this folder for its unprivileged half."""


@dataclass(frozen=True)
class Server:
    """A running sshd; `client`: the words of an ssh that it lets in."""

    folder: Path
    port: int

    @property
    def client(self) -> list[str]:
        known = ["-o", f"UserKnownHostsFile={self.folder}/known", "-o", "StrictHostKeyChecking=yes"]
        return ["ssh", "-F", "none", "-p", str(self.port), "-i", f"{self.folder}/me", *known]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "me"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "config").write_text(CONFIG.format(port=port, folder=folder))
    key = (folder / "host.pub").read_text()
    (folder / "known").write_text("".join(f"[127.0.0.{n}]:{port} {key}" for n in (1, 2)))
    ours = not SEPARATION.exists()
    SEPARATION.mkdir(exist_ok=True)
    process = subprocess.Popen([str(SSHD), "-D", "-e", "-f", folder / "config"], stderr=subprocess.DEVNULL)
    try:
        _wait_until_it_listens(process, port)
        yield Server(folder, port)
    finally:
        process.terminate()
        process.wait()
        if ours:
            SEPARATION.rmdir()


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        assert process.poll() is None, "sshd has ended"
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.2", port)):
            return
        time.sleep(0.02)
    raise AssertionError("sshd does not listen")


def start(server: Server, folder: Path, *hosts: str, **changes: Any) -> Launched:
    """Launch on those hosts, one process on each."""
    ssh = {"client": server.client, "pass_env": ["DISTDL_*", "PYTHONPATH"]}
    recipe = write_recipe(folder, launch={"ssh": {**ssh, **changes.pop("ssh", {})}}, **changes)
    (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    return Launched(["launch", str(recipe), "--on", "ssh", "--hostfile", str(folder / "hosts")])


TWO = ("127.0.0.1", "127.0.0.2")
ENDLESS = {"max_steps": 100000}


def test_two_hosts_train_what_one_process_trains(server: Server, tmp_path: Path) -> None:
    exact = {"max_steps": 40, "seed": 1, "reduction": "exact"}
    with start(server, tmp_path / "ssh", *TWO, train=exact) as command:
        assert command.finish() == 0, command.output
        command.assert_nobody_left()
    assert "127.0.0.1: step 40/40" in command.output
    here = write_recipe(tmp_path / "here", train=exact)
    train_here(here, 1)
    assert_same_bits(tensors_of(tmp_path / "ssh" / "run"), tensors_of(tmp_path / "here" / "run"))


def test_a_stop_reaches_all_hosts(server: Server, tmp_path: Path) -> None:
    with start(server, tmp_path, *TWO, train=ENDLESS) as command:
        wait_for_event(tmp_path / "run", "first_step")
        os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does it
        assert command.finish() == 75, command.output
        command.assert_nobody_left()
    (stop,) = events(tmp_path / "run", "stop")
    assert stop["saved"] == stop["step"]


@pytest.mark.parametrize("victim", [pytest.param("client", marks=pytest.mark.campaign), "launcher"])
def test_hosts_notice_when_ssh_or_the_launcher_dies(victim: str, server: Server, tmp_path: Path) -> None:
    with start(server, tmp_path, *TWO, train=ENDLESS) as command:
        wait_for_event(tmp_path / "run", "first_step")
        clients = [pid for pid in command.pids() if command_of(pid).startswith("ssh ")]
        assert len(clients) == 2
        os.kill(clients[1] if victim == "client" else command.process.pid, signal.SIGKILL)
        code = command.finish()
        command.assert_nobody_left(within_s=20)
    assert code == (70 if victim == "client" else -signal.SIGKILL), command.output
    assert events(tmp_path / "run", "stop")[-1]["saved"] > 0
    if victim == "client":
        assert "error: the connection to node 1 (127.0.0.2) was lost" in command.output


@pytest.mark.parametrize(
    ("ssh", "said"),
    [
        ({"client": ["ssh", "-F", "none", "-p", "1"]}, "cannot be reached by ssh: no ssh server listens"),
        ({"client": ["no-such-ssh"]}, "no-such-ssh cannot be started: No such file"),
        ({"python": "/none/python"}, "has no Python at /none/python"),
        ({"directory": "/none"}, "/none"),
    ],
)
def test_what_is_in_the_way_is_told(ssh: dict[str, Any], said: str, server: Server, tmp_path: Path) -> None:
    with start(server, tmp_path, "127.0.0.1", ssh=ssh) as command:
        assert command.finish() == 3, command.output
    assert said in command.output


def test_keys_that_do_not_fit_are_told(server: Server, tmp_path: Path) -> None:
    unknown = [*server.client[:-3], f"UserKnownHostsFile={tmp_path}/none", *server.client[-2:]]
    without = [word.replace(f"{server.folder}/me", f"{server.folder}/host") for word in server.client]
    for client, said in ((unknown, "its host key is not known here"), (without, "does not accept your key")):
        with start(server, tmp_path, "127.0.0.1", ssh={"client": client}) as command:
            assert command.finish() == 3, command.output
        assert said in command.output
