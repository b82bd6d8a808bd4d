"""Try again what a network or a server failed at, until it works, it cannot work, or the time is up.

Delays are 0.1 s, 0.2 s, 0.4 s and so on up to 15 s, without chance in them. What will not change by waiting
(a file that is not there, a refused key) is named at once.
"""

from __future__ import annotations

import errno
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from distdl.errors import DataError, Stopped
from distdl.stores import scrub

__all__ = ["CutShort", "Missing", "Patience", "Stopped", "TooLong", "never", "reason", "scrub"]

T = TypeVar("T")

RETRY_S = 300.0
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 15.0
_GLANCE_S = 0.1
"""How often a wait looks whether it should end."""

_LOCAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_BUGS = (TypeError, AttributeError, NameError, AssertionError, LookupError, MemoryError, ImportError)
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}
_PASSING_STATUS = {408, 409, 425, 429}

_log = logging.getLogger(__name__)


class Missing(DataError):
    """What was asked for is not on the server (404)."""


class CutShort(Exception):
    """A body ended before the length that the server stated. Passes, like a reset connection."""


class TooLong(Exception):
    """More bytes came than the index says the file has. Trying again does not help."""


def never() -> bool:
    """The `stopped` of somebody who waits to the end."""
    return False


class _Outage:
    """The pieces of work that fail at this moment. A server that is gone fails many; a person hears once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failing: set[object] = set()

    def join(self, work: object) -> bool:
        """Whether `work` is the first to fail."""
        with self._lock:
            self._failing.add(work)
            return len(self._failing) == 1

    def leave(self, work: object) -> bool:
        """Whether nothing fails any more."""
        with self._lock:
            self._failing.discard(work)
            return not self._failing


@dataclass(frozen=True)
class Patience:
    """How long to try, whom to tell, and when to give up early. May be used by several threads at once.

    `notice` hears of the first failure of an outage and of its end, not of each piece of work; `stopped` is
    looked at ten times a second while waiting. `since` (time.monotonic) is when the waiting began, where that
    was before the first try. In another process it is a patience of as many seconds, with no one to tell.
    """

    total_s: float = RETRY_S
    notice: Callable[[str], None] = _log.warning
    stopped: Callable[[], bool] = never
    since: float | None = None
    _outage: _Outage = field(default_factory=_Outage, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.total_s,)

    def call(self, what: str, action: Callable[[], T]) -> T:
        """`action()`, tried for up to `total_s` seconds; `what` ("shard s3://...") names it to people.

        Raises Missing for what is not there, DataError for what is refused or never came, Stopped, and
        unchanged any error of the local machine (a full disk) or of the program.
        """
        began = time.monotonic() if self.since is None else self.since
        work = object()
        try:
            for tries in itertools.count(1):
                outcome = _attempt(what, action)
                if not isinstance(outcome, _Failed):
                    if tries > 1 and self._outage.leave(work):
                        self.notice(f"{what}: came at try {tries}, after {time.monotonic() - began:.1f} s")
                    return outcome
                self._again(what, outcome.error, tries, began, self._outage.join(work))
        finally:
            self._outage.leave(work)
        raise AssertionError("unreachable")

    def wait(self, seconds: float = _GLANCE_S) -> None:
        """Sleep. Raises Stopped at most 0.1 s after `stopped()` turns true."""
        end = time.monotonic() + seconds
        while True:
            if self.stopped():
                raise Stopped
            left = end - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, _GLANCE_S))

    def _again(self, what: str, error: Exception, tries: int, began: float, first: bool) -> None:
        """Wait before try `tries` + 1, or raise DataError because the time is up."""
        spent = time.monotonic() - began
        if spent >= self.total_s:
            raise DataError(
                f"{what} did not come: {tries} tries in {spent:.1f} s, the last ended with: {reason(error)}. "
                "Check the server and the network between here and there, then start again: what is in the "
                f"cache is kept. Tries go on for {self.total_s:g} s (hardware.retry_s)."
            ) from error
        if tries == 1 and first:
            self.notice(f"{what} did not come: {reason(error)}. Trying again for up to {self.total_s:g} s.")
        self.wait(min(_FIRST_DELAY_S * 2 ** min(tries - 1, 20), _LONGEST_DELAY_S, self.total_s - spent))


@dataclass(frozen=True)
class _Failed:
    error: Exception


def _attempt(what: str, action: Callable[[], T]) -> T | _Failed:
    """What came of one try: the result, or an error that may pass. Raises any other."""
    try:
        return action()
    except Exception as error:
        _raise_if_final(what, error)
        return _Failed(error)


def reason(error: BaseException) -> str:
    """One line for a person about an exception that a library raised."""
    text = " ".join(str(error).split()) or "no message"
    return scrub(f"{type(error).__name__}: {text}"[:400])


def _raise_if_final(what: str, error: Exception) -> None:
    """Raise for an error that a second try would meet again. Libraries differ; so many signs are read."""
    if isinstance(error, (DataError, Stopped, TooLong)) or getattr(error, "errno", None) in _LOCAL:
        raise error
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        raise Missing(f"{what} is not there (404): {reason(error)}") from error
    names = {type(e).__name__ for e in _chain(error)}
    if isinstance(error, PermissionError) or status in (401, 403) or names & _NO_CREDENTIALS:
        raise DataError(
            f"{what} may not be read (403): {reason(error)}. Check the credentials that this process sees "
            "(S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or FSSPEC_S3_ANON=true for a "
            "public bucket; hf: HF_TOKEN)."
        ) from error
    if status is not None and 400 <= status < 500 and status not in _PASSING_STATUS:
        raise DataError(f"{what} was refused with status {status}: {reason(error)}") from error
    if isinstance(error, _BUGS) and not isinstance(error, OSError) and status is None:
        raise error
    if isinstance(error, (IsADirectoryError, NotADirectoryError, ValueError)):
        raise DataError(f"{what} cannot be read: {reason(error)}") from error


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an exception of botocore, aiohttp, httpx, requests or huggingface_hub."""
    for cause in _chain(error):
        response = getattr(cause, "response", None)
        if isinstance(response, Mapping):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            found = getattr(response, "status_code", None) or getattr(cause, "status", None)
        if isinstance(found, int) and found >= 400:
            return found
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
