"""The Hugging Face hub, in one place: commits, files and streamed rows; every failure becomes one sentence.

Nothing here runs code from the hub, and a token is only ever read by the client library (``HF_TOKEN`` or its login).
The commit is resolved first: one quick request, without retries, that says at once when the hub is out of reach.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # of its HTTP client

from polyglu.errors import PolygluError

log = logging.getLogger(__name__)

RepositoryKind = Literal["model", "dataset"]
REQUEST_TIMEOUT = 10.0
"""Seconds to wait for the hub's answer about a repository."""
UNAUTHORIZED = (401, 403)


class HubUnreachable(PolygluError):
    """No answer from the hub: no network, or offline mode."""


def resolve_revision(repository: str, revision: str | None = None, kind: RepositoryKind = "dataset") -> str:
    """Commit (40 hex digits) that ``revision`` (a branch, tag or commit; the default branch if None) means now.

    Raises:
        PolygluError: no network, no such repository or revision, or no access to it.
    """
    with _hub_errors(repository, kind):
        info = HfApi().repo_info(repository, repo_type=kind, revision=revision, timeout=REQUEST_TIMEOUT)
        return str(info.sha)


def download_file(repository: str, filename: str, kind: RepositoryKind = "model") -> Path:
    """Download one file at its newest commit, or find it in the local cache if the hub is out of reach.

    Raises:
        PolygluError: not cached and no network, no such repository or file, or no access to it.
    """
    try:
        revision = resolve_revision(repository, kind=kind)
    except HubUnreachable:
        try:
            return Path(hf_hub_download(repository, filename, repo_type=kind, local_files_only=True))
        except LocalEntryNotFoundError:
            pass
        raise
    log.info("%s: %s at commit %s", repository, filename, revision)
    with _hub_errors(repository, kind):
        return Path(hf_hub_download(repository, filename, repo_type=kind, revision=revision))


def stream_rows(dataset: str, config: str | None, split: str, revision: str, skip: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of a hub dataset at a commit, in order, from row ``skip`` on, without downloading it as a whole.

    Access and the first row are checked before this returns: a caller whose request fails has written nothing yet.

    Raises:
        PolygluError: no network, no such dataset, configuration or split, or no access to it.
    """
    with _hub_errors(dataset, "dataset"):
        HfApi().auth_check(dataset, repo_type="dataset")
    rows = _rows(dataset, config, split, revision, skip)
    first = next(rows, None)
    return iter(()) if first is None else chain([first], rows)


def _rows(dataset: str, config: str | None, split: str, revision: str, skip: int) -> Iterator[dict[str, Any]]:
    import datasets  # slow to import, and local files do without it

    what = f"dataset {dataset} (config {config}, split {split}, revision {revision})"
    with _hub_errors(dataset, "dataset"):
        try:
            yield from datasets.load_dataset(dataset, config, split=split, revision=revision, streaming=True).skip(skip)
        except (ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            raise PolygluError(f"{what} cannot be read: {error}") from error


@contextmanager
def _hub_errors(repository: str, kind: RepositoryKind) -> Iterator[None]:
    """Turn what the hub's libraries raise into one sentence that says what to do."""
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
    try:
        yield
    except GatedRepoError:
        raise PolygluError(f"{kind} {repository} is gated: {_accept(page)}.") from None
    except RepositoryNotFoundError:
        # The hub answers the same for a private repository and for one that does not exist.
        raise PolygluError(
            f"{kind} {repository} was not found on the hub: check the name, or, if it is private or gated, "
            f"{_accept(page)}."
        ) from None
    except RevisionNotFoundError:
        raise PolygluError(
            f"{kind} {repository} has no such revision; its history is at {page}/commits/main."
        ) from None
    except HFValidationError as error:
        raise PolygluError(f"'{repository}' is not a hub name of the form owner/name: {error}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in UNAUTHORIZED:
            raise PolygluError(f"{kind} {repository}: access denied ({status}): {_accept(page)}.") from None
        if isinstance(error, EntryNotFoundError):
            raise PolygluError(f"{kind} {repository} has no such file: {error}") from None
        raise HubUnreachable(f"the hub could not serve {kind} {repository} ({error}); try again later.") from None
    except (TransportError, ConnectionError, TimeoutError, LocalEntryNotFoundError) as error:
        raise HubUnreachable(
            f"{kind} {repository} needs the Hugging Face hub, which cannot be reached ({error}); check the network and "
            f"HF_HUB_OFFLINE, or use a local copy."
        ) from None


def _accept(page: str) -> str:
    return f"accept its licence at {page} and set HF_TOKEN to a token of that account"
