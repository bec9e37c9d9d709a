"""When the hub fails: a failure that may pass is waited out, any other becomes one sentence that says what to do.

    insist(ask, target, retries) ─► ask() ─► answer
                                     └─ error ─► wait_or_raise ─► a while later: ask again
                                                             └──► PolygluError | HubUnreachable

No sentence or log line quotes a URL or the text of an answer: URLs of the hub's file store are signed.
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, TypeVar

from huggingface_hub import set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # of its HTTP client
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]
from huggingface_hub.utils._http import default_client_factory

from polyglu.errors import PolygluError

log = logging.getLogger(__name__)

RepositoryKind = Literal["model", "dataset"]
T = TypeVar("T")

LONGEST_SILENCE = 60.0
"""Seconds without an answer that end a request which the client library would let wait forever."""
UNAUTHORIZED, NOT_FOUND, TIMED_OUT, THROTTLED, SERVER_ERROR = (401, 403), 404, 408, 429, 500
INVALID_TOKEN = "Invalid credentials in Authorization header"
HUB_ERRORS = (TransportError, HFValidationError, LocalEntryNotFoundError, ConnectionError, TimeoutError)
"""What the hub's libraries raise when it cannot be asked, or refuses."""


class HubUnreachable(PolygluError):
    """No answer from the hub, or one that passes with time: no network, offline mode, throttling, out of order."""


@dataclass(frozen=True)
class Retries:
    """How long to insist when the hub does not answer as it should."""

    attempts: int = 10
    """Failures in a row, without a byte in between, after which to give up."""
    first_wait: float = 1.0
    """Seconds before the second attempt; doubled for each one after it."""
    longest_wait: float = 60.0
    """Seconds at which the doubling stops."""
    longest_asked: float = 600.0
    """Seconds that the hub may ask for when it throttles; if it wants more, that is the end."""
    timeout: float = 30.0
    """Seconds without a byte after which a connection counts as broken."""


ASKING = Retries(attempts=3, first_wait=0.5, timeout=10.0)
"""For the first question, so that a machine without network says so soon, and where the client library retries too."""
READING = Retries()


@dataclass(frozen=True)
class Target:
    """What is asked of the hub, as sentences name it."""

    repository: str
    kind: RepositoryKind
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.repository}" + (f", file {self.file}" if self.file else "")

    @property
    def page(self) -> str:
        """Where a person sees it."""
        return f"https://huggingface.co/{'datasets/' if self.kind == 'dataset' else ''}{self.repository}"


def insist(ask: Callable[[], T], target: Target, retries: Retries) -> T:
    """Ask until there is an answer.

    Raises:
        PolygluError: a refusal, or ``retries.attempts`` failures; one sentence.
    """
    for failures in count(1):
        try:
            return ask()
        except HUB_ERRORS as error:
            wait_or_raise(error, failures, target, retries)
    raise AssertionError("count ends never")


def wait_or_raise(error: Exception, failures: int, target: Target, retries: Retries) -> None:
    """Wait, after ``failures`` in a row, for as long as the hub asks and longer each time.

    Raises:
        PolygluError: waiting is of no use, or no longer; one sentence.
    """
    error = _root(error)
    asked = _asked_wait(error)
    if not _may_pass(error) or failures >= retries.attempts or asked > retries.longest_asked:
        raise _explain(error, target) from None
    backoff = min(retries.first_wait * 2 ** (failures - 1), retries.longest_wait)
    # Not the generator that a run seeds: how often the network fails must not change what is drawn from it.
    wait = asked + backoff * random.SystemRandom().uniform(0.5, 1.0)
    log.warning("%s: %s; attempt %d of %d in %.1f s", target, _what(error), failures + 1, retries.attempts, wait)
    time.sleep(wait)


def _root(error: Exception) -> Exception:
    """Look behind the client library's "not in the cache either" for the hub's own failure."""
    cause = error.__cause__
    return cause if isinstance(error, LocalEntryNotFoundError) and isinstance(cause, HUB_ERRORS) else error


def _explain(error: Exception, target: Target) -> PolygluError:
    """One sentence for what the hub's libraries raise."""
    if isinstance(error, HFValidationError):
        return PolygluError(f"'{target.repository}' is not a hub name of the form owner/name: {error}")
    if isinstance(error, HfHubHTTPError):
        return _explain_answer(error, target)
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachable(
            f"{target} needs the Hugging Face hub, but HF_HUB_OFFLINE is set; unset it, or use a local copy."
        )
    return HubUnreachable(
        f"{target} needs the Hugging Face hub, which cannot be reached ({_what(error)}); check the network and "
        f"HF_HUB_OFFLINE, or use a local copy{_later(target)}."
    )


def _explain_answer(error: HfHubHTTPError, target: Target) -> PolygluError:
    """One sentence for an answer that is a refusal."""
    status = error.response.status_code
    accept = f"accept its licence at {target.page} and set HF_TOKEN to a token of that account"
    if isinstance(error, GatedRepoError):
        return PolygluError(f"{target} is gated: {accept}.")
    if isinstance(error, RepositoryNotFoundError):
        # The hub answers the same for a private repository and for one that does not exist.
        return PolygluError(
            f"{target} was not found on the hub: check the name, or, if it is private or gated, {accept}."
        )
    if isinstance(error, RevisionNotFoundError):
        return PolygluError(f"{target} has no such revision; its history is at {target.page}/commits/main.")
    if error.response.headers.get("X-Error-Message") == INVALID_TOKEN:
        return PolygluError(
            f"{target}: the hub does not accept the token it was given ({status}); set HF_TOKEN to one from "
            f"https://huggingface.co/settings/tokens, or log out where none is needed."
        )
    if status in UNAUTHORIZED:
        return PolygluError(f"{target}: access denied ({status}): {accept}.")
    if status == NOT_FOUND:
        return PolygluError(f"{target} is not on the hub; see {target.page}/tree/main for what is.")
    if status == THROTTLED:
        wait = _asked_wait(error)
        return HubUnreachable(
            f"{target}: the hub throttles this machine ({status}); wait {f'{wait:.0f} s' if wait else 'some minutes'}, "
            f"or set HF_TOKEN, which raises the limit{_later(target)}."
        )
    return HubUnreachable(f"the hub could not serve {target} (status {status}); try again later{_later(target)}.")


def _later(target: Target) -> str:
    return "; the same command continues where this one stopped" if target.file else ""


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (TIMED_OUT, THROTTLED) or status >= SERVER_ERROR
    return not isinstance(error, HFValidationError | OfflineModeIsEnabled)


def _asked_wait(error: Exception) -> float:
    """Seconds that the hub asks to wait."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    limit = parse_ratelimit_headers(error.response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    after = error.response.headers.get("Retry-After", "")
    return float(after) if after.isdecimal() else 0.0


def _what(error: Exception) -> str:
    """Name a failure, without what an answer says: it may quote a signed URL."""
    if isinstance(error, HfHubHTTPError):
        return f"status {error.response.status_code}"
    return str(error) or type(error).__name__


def _client_with_time_limits() -> Any:
    client = default_client_factory()
    client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], _limit_time]}
    return client


def _limit_time(request: Any) -> None:
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {key: LONGEST_SILENCE if limits[key] is None else limits[key] for key in limits}


# The client library asks without a time limit in places: a hub that accepts the question and never answers would hang.
set_client_factory(_client_with_time_limits)
