"""The ssh clients of a run: their output, requests to stop, and what their ends mean."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from types import FrameType

from distdl import errors
from distdl.errors import EnvironmentProblem
from distdl.launch.heed import NAMES
from distdl.launch.ssh.command import Launch, command_lines
from distdl.launch.ssh.hostfile import Host

_PATIENCE_S = 5.0
"""Once one node has failed, the others may find out by themselves for so long, and are then told to stop."""
_GRACE_S = 60.0
_CONNECTION = 255  # what ssh exits with when it is ssh that failed


class Client:
    """The ssh client of one node."""

    def __init__(self, node: int, host: Host, words: Sequence[str]) -> None:
        self.node = node
        self.host = host
        self.last: deque[str] = deque(maxlen=20)
        try:
            # A session of its own: a terminal's Ctrl-C would end ssh, and not what it has started.
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise EnvironmentProblem(
                f"{shlex.join(words[:1])} cannot be started: {error.strerror}. Install OpenSSH's client, or "
                "name it with launch.ssh.client"
            ) from error
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode(errors="replace").rstrip("\r\n")
            self.last.append(text)
            with contextlib.suppress(OSError):  # whoever read along may have gone away
                os.write(1, f"{self.host.name}: {text}\n".encode())

    def send(self, name: str) -> None:
        """Have the node's launcher take the signal of that name."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            os.write(self.process.stdin.fileno(), f"{name}\n".encode())

    def end(self) -> None:
        """End the client, if it still runs; the launcher that it started sees that and stops."""
        self.process.kill()
        self.process.wait()
        self._reader.join(2.0)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


class Crew:
    """All clients, and requests to stop that come here."""

    def __init__(self, launch: Launch) -> None:
        self.clients: list[Client] = []
        self.interrupts = 0
        self.failed: list[tuple[Client, int]] = []
        for number in (signal.Signals[f"SIG{name}"] for name in NAMES):
            signal.signal(number, self._on_request)
        for node, words in enumerate(command_lines(launch)):
            self.clients.append(Client(node, launch.hosts[node], words))

    def _on_request(self, number: int, _frame: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        for client in self.clients:
            client.send(signal.Signals(number).name.removeprefix("SIG"))

    def wait(self) -> None:
        """Blocks until all have ended. Where one fails and the others stay, they are stopped."""
        left, told, since = list(self.clients), False, 0.0
        while left:
            for client in [c for c in left if c.process.poll() is not None]:
                left.remove(client)
                if client.process.returncode != 0:
                    since = since or time.monotonic()
                    self.failed.append((client, client.process.returncode))
            waited = time.monotonic() - since if since else 0.0
            if waited > _PATIENCE_S and not told:
                told = True
                for client in left:
                    client.send("TERM")
            if waited > _GRACE_S or (self.interrupts > 1 and waited > _PATIENCE_S):
                return
            time.sleep(0.05)

    def close(self) -> None:
        """End what is still there."""
        for client in self.clients:
            client.end()


def run(launch: Launch) -> int:
    """Start a launcher on every host and stay until all have ended; returns the exit code of the run.

    Prints what each says behind the name of its host, and on standard error who failed first and what to do.
    Raises EnvironmentProblem where there is no ssh.
    """
    crew = None
    try:
        crew = Crew(launch)
        crew.wait()
    finally:
        if crew is not None:
            crew.close()
    if crew.interrupts > 1:
        return 130
    if not crew.failed:
        return errors.DONE
    client, code = crew.failed[0]
    meant, why = explain(client.host, client.node, code, "\n".join(client.last), launch.python)
    if why:
        print(f"error: {why}", file=sys.stderr, flush=True)  # noqa: T201
    return meant


def explain(host: Host, node: int, code: int, said: str, python: str) -> tuple[int, str]:
    """(the run's exit code, what to tell) for a node whose client ended with `code`; nothing of a stop."""
    who, login = f"node {node} ({host.name})", shlex.quote(host.login)
    if code in errors.STOPS:
        return code, ""
    if code == _CONNECTION:
        for sign, advice in _ADVICE.items():
            if sign in said:
                return errors.ENVIRONMENT, f"{who} cannot be reached by ssh: {advice.format(login=login)}"
    if code == _CONNECTION or code < 0:
        return errors.RANK_FAILED, (
            f"the connection to {who} was lost; its launcher stops when it notices. Start the same command "
            "again: it goes on from the last checkpoint"
        )
    if code in (126, 127):
        return errors.ENVIRONMENT, (
            f"{who} has no Python at {python}: name the one with distdl there, launch.ssh.python=PATH"
        )
    if "No module named distdl" in said:
        return errors.ENVIRONMENT, (
            f"{who} has no distdl in {python}: install it there, or name another with launch.ssh.python=PATH"
        )
    if code > 128:
        return errors.RANK_FAILED, f"the launcher of {who} was ended by {signal.Signals(code - 128).name}"
    return code, f"{who} failed first, with exit code {code}: see what it says above"


_ADVICE = {
    "Permission denied": (
        "it does not accept your key; `ssh-copy-id {login}` installs it, `ssh {login} true` tries it"
    ),
    "REMOTE HOST IDENTIFICATION HAS CHANGED": (
        "its host key is another than before. If the machine was installed anew, `ssh-keygen -R` its name "
        "and connect once by hand with `ssh {login}`; else somebody may be in between"
    ),
    "Host key verification failed": (
        "its host key is not known here; connect once by hand with `ssh {login}` and compare the fingerprint"
    ),
    "Could not resolve hostname": (
        "its name is not known here; check the spelling in the hostfile, DNS, and ~/.ssh/config"
    ),
    "Connection refused": (
        "no ssh server listens there; is sshd running, at the port that launch.ssh.client gives?"
    ),
    "timed out": "no answer; is the machine up, and does a firewall let ssh through? Try `ssh {login} true`",
    "No route to host": "there is no way to it; is the machine up, and in the same network?",
    "Network is unreachable": "there is no way to its network from here",
}
"""What ssh says -> what to do."""
