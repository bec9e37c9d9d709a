"""The Hugging Face hub, in one place: commits, and files of a commit that are read as local ones are.

    resolve_revision(dataset) ─► commit ─► dataset_files(dataset, config, split, commit) ─► [DataFile, …]
                                                                                                │ open()
                                          ranged requests, each continued at the byte where it broke off

Which files make up a split is the knowledge of the library ``datasets``; nothing here runs code from the hub. A token
is only ever read by the client library (``HF_TOKEN`` or its login). Failures: ``hub_errors.py``.
"""

import difflib
import io
import logging
import tempfile
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import HfApi, get_session, hf_hub_download, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from polyglu.data.data_file import DataFile
from polyglu.data.hub_errors import (
    ASKING,
    HUB_ERRORS,
    READING,
    HubUnreachable,
    RepositoryKind,
    Retries,
    Target,
    insist,
    wait_or_raise,
)
from polyglu.errors import PolygluError

__all__ = ["HubUnreachable", "Retries", "dataset_files", "download_file", "resolve_revision"]

log = logging.getLogger(__name__)

READ_AHEAD = 4 * 2**20
"""Bytes that a request for a data file asks for at least, and that an open file keeps in memory."""
PATHS_PER_REQUEST = 500
"""Files whose sizes are asked for at once."""
BUILDERS = ("parquet", "json", "text")
"""Kinds of datasets that can be read, by the names that ``datasets`` gives them."""
NAMES_IN_A_SENTENCE = 20


def resolve_revision(
    repository: str, revision: str | None = None, kind: RepositoryKind = "dataset", retries: Retries = ASKING
) -> str:
    """Commit (40 hex digits) that ``revision`` (a branch, tag or commit; the default branch if None) means now.

    Raises:
        HubUnreachable: no network, or the hub does not serve.
        PolygluError: no such repository or revision, or no access to it.
    """
    ask = partial(HfApi().repo_info, repository, repo_type=kind, revision=revision, timeout=retries.timeout)
    return str(insist(ask, Target(repository, kind), retries).sha)


def download_file(repository: str, filename: str, kind: RepositoryKind = "model") -> Path:
    """Download one file at its newest commit, or find it in the local cache if the hub is out of reach.

    Raises:
        HubUnreachable: not cached, and no network or the hub does not serve.
        PolygluError: no such repository or file, or no access to it.
    """
    try:
        revision = resolve_revision(repository, kind=kind)
    except HubUnreachable:
        with suppress(LocalEntryNotFoundError):
            return Path(hf_hub_download(repository, filename, repo_type=kind, local_files_only=True))
        raise
    log.info("%s: %s at commit %s", repository, filename, revision)
    # By the branch, not the commit: only so does the cache know which commit to fall back to.
    download = partial(hf_hub_download, repository, filename, repo_type=kind)
    return Path(insist(download, Target(repository, kind, filename), ASKING))


def dataset_files(
    dataset: str, config: str | None, split: str, revision: str, retries: Retries = READING
) -> list[DataFile]:
    """Data files of a split at a commit, in the order of the library ``datasets``; nothing of them is downloaded yet.

    Each opens as a seekable stream that reads ahead ``READ_AHEAD`` bytes and outlives broken connections. Reading
    raises ``PolygluError`` where access ends, and ``HubUnreachable`` after ``retries.attempts`` failures in a row.

    Raises:
        HubUnreachable: no network, or the hub does not serve.
        PolygluError: no such configuration or split, no files of a known kind, or no access to them.
    """
    target = Target(dataset, "dataset")
    insist(partial(HfApi().auth_check, dataset, repo_type="dataset"), target, retries)
    # The client library retries most of these requests itself: two such layers must not multiply.
    few = replace(retries, attempts=min(retries.attempts, ASKING.attempts))
    paths = insist(partial(_split_paths, dataset, config, split, revision), target, few)
    sizes: dict[str, int] = {}
    for start in range(0, len(paths), PATHS_PER_REQUEST):
        some = paths[start : start + PATHS_PER_REQUEST]
        ask = partial(HfApi().get_paths_info, dataset, some, revision=revision, repo_type="dataset")
        sizes |= {info.path: getattr(info, "size", 0) for info in insist(ask, target, retries)}
    files = []
    for path in paths:
        target = Target(dataset, "dataset", path)
        if path not in sizes:
            raise PolygluError(f"{target} does not exist at commit {revision}; check the dataset's card.")
        files.append(DataFile(path, sizes[path], partial(_open, target, revision, sizes[path], retries)))
        _ = files[-1].kind
    return files


def _open(target: Target, revision: str, size: int, retries: Retries) -> BinaryIO:
    return io.BufferedReader(_HubFile(target, revision, size, retries), READ_AHEAD)


class _HubFile(io.RawIOBase):
    """A file at a commit, ``size`` bytes long. A read is complete or raises, and then has not moved the position."""

    def __init__(self, target: Target, revision: str, size: int, retries: Retries) -> None:
        assert target.file is not None
        self._url = hf_hub_url(target.repository, target.file, repo_type=target.kind, revision=revision)
        self._target, self._size, self._retries = target, size, retries
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"negative seek position {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(min(len(view), self._size - self._position), 0)
        done = failures = 0
        while done < wanted:
            received, error = self._receive(view[done:wanted], self._position + done)
            done += received
            if error is not None:
                failures = 1 if received else failures + 1
                wait_or_raise(error, failures, self._target, self._retries)
        self._position += done
        return done

    def _receive(self, view: memoryview, start: int) -> tuple[int, Exception | None]:
        """Fill ``view`` from byte ``start`` on; how many bytes came, and what stopped them, if anything did."""
        done = 0
        span = {"Range": f"bytes={start}-{start + len(view) - 1}", "Accept-Encoding": "identity"}
        headers = {**build_hf_headers(library_name="polyglu"), **span}
        try:
            with get_session().stream("GET", self._url, headers=headers, timeout=self._retries.timeout) as response:
                hf_raise_for_status(response)
                stated = response.headers.get("Content-Range")
                if stated and not stated.startswith(f"bytes {start}-"):
                    raise ConnectionError(f"the answer is {stated}, asked for from byte {start}")
                skip = 0 if stated else start  # the whole file, in spite of the range
                for data in response.iter_raw():
                    part = data[skip : skip + len(view) - done]
                    skip -= min(skip, len(data))
                    view[done : done + len(part)] = part
                    done += len(part)
                    if done == len(view):
                        break
        except HUB_ERRORS as error:
            return done, error
        return done, None if done == len(view) else ConnectionError("the answer ended early")


def _split_paths(dataset: str, config: str | None, split: str, revision: str) -> list[str]:
    """Paths within the repository of a split's data files."""
    import datasets  # slow to import, and local files do without it

    # ``datasets`` takes a description that it cannot fetch for one that does not exist; so they are in the cache first.
    names = datasets.config
    for name in (names.REPOCARD_FILENAME, names.REPOYAML_FILENAME, names.DATASETDICT_INFOS_FILENAME):
        with suppress(RemoteEntryNotFoundError):
            hf_hub_download(dataset, name, repo_type="dataset", revision=revision)
    remote = f"hf://datasets/{dataset}"  # never a local folder of that name
    # An empty cache: nothing is prepared here, and data prepared earlier must not stand in for a hub out of reach.
    with tempfile.TemporaryDirectory() as cache:
        try:
            builder = datasets.load_dataset_builder(remote, config, revision=revision, cache_dir=cache)
        except HUB_ERRORS:
            raise
        except Exception as error:  # a dataset's own description may break the library anywhere
            known = []
            with suppress(Exception):
                known = datasets.get_dataset_config_names(remote, revision=revision)
            raise _bad_config(error, dataset, config, known) from None
    if builder.name not in BUILDERS:
        raise PolygluError(
            f"dataset {dataset} is made of {builder.name} files, which cannot be read here; use a dataset of "
            f"{', '.join(BUILDERS[:-1])} or {BUILDERS[-1]} files, or a converted local copy."
        )
    splits = builder.config.data_files
    if split not in splits:
        where = f" in configuration '{builder.config.name}'"
        raise PolygluError(f"dataset {dataset} has no split '{split}'{where}; it has {_listed(split, list(splits))}.")
    prefix = f"{remote}@{revision}/"
    for file in splits[split]:
        if not file.startswith(prefix):
            raise PolygluError(f"dataset {dataset} names a data file outside its commit {revision}; use a local copy.")
    return [file.removeprefix(prefix) for file in splits[split]]


def _bad_config(error: Exception, dataset: str, config: str | None, known: list[str]) -> PolygluError:
    """Say why ``datasets`` cannot make sense of a dataset, whose configurations are ``known``."""
    if known and config is not None and config not in known:
        return PolygluError(f"dataset {dataset} has no configuration '{config}'; it has {_listed(config, known)}.")
    if len(known) > 1 and config is None and "Config name is missing" in str(error):
        return PolygluError(f"dataset {dataset} has several configurations; give one: {_listed('', known)}.")
    reason = " ".join(str(error).split())
    return PolygluError(f"dataset {dataset} cannot be read by the library datasets: {reason}; use a local copy.")


def _listed(wanted: str, names: list[str]) -> str:
    """Names for a sentence; of many, those like ``wanted``."""
    if len(names) <= NAMES_IN_A_SENTENCE:
        return ", ".join(names)
    nearest = difflib.get_close_matches(wanted, names, NAMES_IN_A_SENTENCE, 0.0)
    return f"{', '.join(nearest)} and {len(names) - len(nearest)} more"
