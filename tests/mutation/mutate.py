"""Defects of the published implementation, and of the science, put into the sources one by one: ``make mutation``.

    *.toml ─► copy of src/ and tests/ ─► old text replaced by new ─► pytest on the named tests ─► all must fail

    python tests/mutation/mutate.py [NAME ...]    run all mutations, or the named ones; exit code 1 if one is unnoticed
    python tests/mutation/mutate.py --table       print docs/defects.md

A test notices a mutation if it passes without it and fails with it, by an assertion: so it has read the mutated copy.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
COPIED = ("src", "tests", "scripts", "configs", "pyproject.toml", "README.md", "requirements.txt", "constraints.txt")
PAGE = """# Defects that must not return

Each row is a defect of the published implementation or, under S, one that would make a finding wrong. `make mutation`
puts it into a copy of the sources, by the named change of `tests/mutation/`, and checks that the tests pass without it
and fail with it. This page is written by
`python tests/mutation/mutate.py --table > docs/defects.md`.

| | how it was wrong | mutation | noticed by |
|---|---|---|---|
"""
NO_SHRINKING = """
from hypothesis import Phase, settings
settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutation")
"""
"""For conftest.py: to find the smallest input that fails takes long, and nobody reads it."""
ASSERTIONS = ("AssertionError", "assert ", "Failed: DID NOT RAISE")
"""How the message of an assertion that failed begins; the last is that of ``pytest.raises``."""


@dataclass(frozen=True)
class Mutation:
    """A defect, as a change of one place of the sources."""

    name: str
    defect: str
    """Key in ``Catalogue.defects``."""
    file: str
    """Relative to the repository."""
    old: str
    """Occurs once in the file."""
    new: str
    tests: tuple[str, ...]
    """Node ids, without parameters; each must notice."""
    fails_with: str | tuple[str, ...] = ASSERTIONS
    """How the failure's message begins."""


@dataclass(frozen=True)
class Catalogue:
    """All that the TOML files say."""

    defects: dict[str, str]
    """Number in the list of known defects, with a letter where it has parts -> how it was wrong."""
    open: dict[str, str]
    """Defect that is not repaired yet, so that no mutation can put it back -> what is missing."""
    mutations: tuple[Mutation, ...]


def catalogue() -> Catalogue:
    """Read all TOML files beside this one."""
    content: dict[str, Any] = {"mutation": []}
    for file in sorted(Path(__file__).parent.glob("*.toml")):
        part = tomllib.loads(file.read_text(encoding="utf-8"))
        content["mutation"] += part.pop("mutation", [])
        content |= part
    mutations = [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in content["mutation"]]
    return Catalogue(content["defects"], content["open"], tuple(mutations))


def table(known: Catalogue) -> str:
    """Text of docs/defects.md: each defect, the mutation that puts it back, the tests that notice."""
    lines = []
    for key, wrong in known.defects.items():
        if key in known.open:
            lines.append(f"| {key} | {wrong} | | not met yet: {known.open[key]} |")
        for mutation in known.mutations:
            if mutation.defect == key:
                tests = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in mutation.tests)
                where = mutation.file.removeprefix("src/polyglu/")
                lines.append(f"| {key} | {wrong} | {mutation.name} (`{where}`) | {tests} |")
    return PAGE + "\n".join(lines) + "\n"


@contextmanager
def copy_of_the_sources() -> Iterator[Path]:
    """A folder with all that the tests read, and no compiled files, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="polyglu-mutation-") as folder:
        for name in COPIED:
            place = ROOT / name
            if place.is_dir():
                shutil.copytree(place, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            else:
                shutil.copy(place, folder)
        (Path(folder) / "conftest.py").write_text(NO_SHRINKING, encoding="utf-8")
        yield Path(folder)


def environment(copy: Path) -> dict[str, str]:
    """Under which this process's children, and theirs, import from the copy: it precedes the installed package."""
    return {**os.environ, "PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def check_that_the_copy_is_imported(copy: Path) -> None:
    """Ask Python, and a Python that it starts elsewhere, where the package comes from."""
    code = "import polyglu, subprocess, sys; print(polyglu.__file__, flush=True)"
    child = f"{code}; sys.argv[1:] and subprocess.run([sys.executable, '-c', sys.argv[1]], cwd='/', check=True)"
    command = [sys.executable, "-c", child, code]
    found = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True, check=True)
    places = [Path(line) for line in found.stdout.splitlines()]
    assert places == [copy / "src/polyglu/__init__.py"] * 2, f"the tests would import {places}, not the copy in {copy}"


def run_tests(copy: Path, tests: Sequence[str]) -> dict[str, list[str]]:
    """Run tests in the copy; node id without parameters -> message of each case that failed, none if all passed."""
    report = copy / "report.xml"
    report.unlink(missing_ok=True)
    options = ["-p", "no:cacheprovider", "--hypothesis-seed=0", "-o", "junit_family=xunit1", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    done = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True, check=False)
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        messages = found.setdefault(f"{case.get('file')}::{(case.get('name') or '').partition('[')[0]}", [])
        for fault in case:  # a failure of the test itself, an error around it, or a reason to skip it
            messages.append(("" if fault.tag == "failure" else f"{fault.tag}: ") + (fault.get("message") or ""))
    for test in tests:
        found.setdefault(test, [f"did not run: {(done.stdout + done.stderr).strip()[-300:]}"])
    return found


def verdict(mutation: Mutation, found: dict[str, list[str]]) -> str:
    """Judge what ``run_tests`` found under a mutation: "noticed", or what is wrong."""
    for test in mutation.tests:
        if not found[test]:
            return f"SURVIVED: {test} passes"
        if not any(message.startswith(mutation.fails_with) for message in found[test]):
            return f"BROKEN: {test} fails otherwise than expected: {' '.join(found[test][0].split())[:300]}"
    return "noticed"


def outcome(mutation: Mutation, copy: Path) -> str:
    """Apply a mutation to the copy, run its tests, take it back."""
    file = copy / mutation.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        return f"DOES NOT APPLY: its old text occurs {text.count(mutation.old)} times in {mutation.file}"
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        return verdict(mutation, run_tests(copy, mutation.tests))
    finally:
        file.write_text(text, encoding="utf-8")


def main(names: Sequence[str]) -> int:
    """Run the named mutations, or all; return the exit code."""
    known = catalogue().mutations
    if unknown := set(names) - {mutation.name for mutation in known}:
        print(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(mutation.name for mutation in known)}")
        return 2
    chosen = [mutation for mutation in known if mutation.name in names or not names]
    with copy_of_the_sources() as copy:
        check_that_the_copy_is_imported(copy)
        tests = sorted({test for mutation in chosen for test in mutation.tests})
        broken = {test: messages for test, messages in run_tests(copy, tests).items() if messages}
        for test, messages in broken.items():
            print(f"without any mutation: {test}: {messages[0]}")
        if broken:
            return 1
        print(f"{len(tests)} tests pass without any mutation", flush=True)
        noticed = 0
        for mutation in chosen:
            start = time.monotonic()
            said = outcome(mutation, copy)
            noticed += said == "noticed"
            print(f"{mutation.defect:4} {mutation.name:36} {time.monotonic() - start:5.0f} s  {said}", flush=True)
    print(f"{noticed} of {len(chosen)} mutations noticed")
    return 0 if noticed == len(chosen) else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        print(table(catalogue()), end="")
    else:
        sys.exit(main(sys.argv[1:]))
