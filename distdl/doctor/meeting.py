"""The processes of a job hand what they know to rank 0, through the store at which a run would meet.

No process group is formed for it: where one process is missing, the others still learn which.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

Json = Any
POLL_S = 0.05


class Lost(Exception):
    """Rank 0 does not answer."""


class Meeting:
    """One process's side of it. `members`: the numbers of those that came, of which rank 0 has `number`."""

    def __init__(self, store: Store, *, main: bool, world_size: int, wait_s: float) -> None:
        """Blocks until as many came as there should be, or for `wait_s` seconds. Raises Lost.

        Processes are numbered as they come: two that take themselves for the same rank are both heard.
        """
        self.main = main
        self._store = store
        self._limit = timedelta(seconds=wait_s)
        self.number = self._guarded(lambda: int(store.add("came", 1)))
        self._silent: set[int] = set()
        self.members = [self.number]
        came = 0
        if main:
            end = time.monotonic() + wait_s
            while (came := int(store.add("came", 0))) < world_size and time.monotonic() < end:
                time.sleep(POLL_S)
        self.members = list(range(1, 1 + int(self.share("came-in-time", came))))

    def gather(self, name: str, value: Json) -> dict[int, Json]:
        """On rank 0 the value of each by number, without those that fall silent; elsewhere empty."""
        self._guarded(lambda: self._store.set(f"{name}/{self.number}", json.dumps(value)))
        if not self.main:
            return {}
        found = {}
        for member in self.members:
            heard, told = self._hear(f"{name}/{member}", member)
            if heard:
                found[member] = told
        return found

    def leave_out(self, members: Iterable[int]) -> None:
        """On rank 0: wait for these no more."""
        self._silent.update(members)

    def _hear(self, key: str, member: int) -> tuple[bool, Json]:
        """Whether a process answered in time, and what. Nobody waits a second time for one that did not."""
        if member in self._silent:
            return False, None
        try:
            return True, self._read(key)
        except Lost:
            self._silent.add(member)
            return False, None

    def share(self, name: str, value: Json = None) -> Json:
        """Rank 0's value, on all. The others wait for it; raises Lost."""
        if self.main:
            self._guarded(lambda: self._store.set(name, json.dumps(value)))
            return value
        return self._read(name, times=3)  # rank 0 may be waiting for somebody else first

    def clocks(self) -> dict[int, float]:
        """On rank 0: each one's clock less its own, in seconds, to half the time that an answer takes
        (Cristian 1989, probabilistic clock synchronization). Elsewhere empty.
        """
        if not self.main:
            self._read(f"clock-asked/{self.number}", times=3)
            self._guarded(lambda: self._store.set(f"clock/{self.number}", json.dumps(time.time())))
            return {}
        found = {}
        for member in self.members:
            if member == self.number:
                continue
            before = time.time()
            self._store.set(f"clock-asked/{member}", json.dumps(None))
            heard, told = self._hear(f"clock/{member}", member)
            if heard:
                found[member] = float(told) - (before + time.time()) / 2
        return found

    def _read(self, key: str, times: int = 1) -> Json:
        def read() -> Json:
            self._store.wait([key], self._limit * times)
            return json.loads(self._store.get(key))

        return self._guarded(read)

    @staticmethod
    def _guarded(action: Any) -> Any:
        try:
            return action()
        except RuntimeError as error:  # torch's DistError, for time-outs and lost connections alike
            raise Lost(str(error).partition("\n")[0]) from error
