"""The mutations of ``make mutation`` still apply, name tests that exist, cover all defects, and are documented."""

import ast
from pathlib import Path

import pytest
from mutation.mutate import COPIED, ROOT, Mutation, catalogue, outcome, run_tests, table, verdict

CATALOGUE = catalogue()
SPECIFIED = {1: 1, 2: 1, 3: 3, 4: 4, 5: 3, 6: 4, 7: 4, 8: 1, 9: 2, 10: 5, 11: 2, 12: 3} | {
    f"S{number}": 1 for number in range(1, 12)
}
"""Number of a defect in the specification, or of one of the science -> its parts."""


@pytest.mark.parametrize("mutation", CATALOGUE.mutations, ids=lambda mutation: mutation.name)
def test_a_mutation_applies_and_its_tests_exist(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text()
    assert text.count(mutation.old) == 1 and mutation.new != mutation.old
    assert mutation.file.startswith(COPIED)
    if mutation.file.endswith(".py"):
        ast.parse(text.replace(mutation.old, mutation.new))
    assert mutation.tests
    for test in mutation.tests:
        file, name = test.split("::")
        functions = [
            node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
        ]
        assert functions.count(name) == 1, test


def test_names_are_distinct() -> None:
    names = [mutation.name for mutation in CATALOGUE.mutations]
    assert len(names) == len(set(names))


def test_each_part_of_each_defect_is_put_back_or_openly_not_met() -> None:
    parts = {f"{number}{letter}" for number, n in SPECIFIED.items() for letter in ("abcde"[:n] if n > 1 else [""])}
    assert set(CATALOGUE.defects) == parts
    mutated = {mutation.defect for mutation in CATALOGUE.mutations}
    assert mutated | set(CATALOGUE.open) == parts and not mutated & set(CATALOGUE.open)


def test_the_table_is_up_to_date() -> None:
    assert (ROOT / "docs/defects.md").read_text() == table(CATALOGUE), "run: python tests/mutation/mutate.py --table"


KINDS = """
import pytest
@pytest.mark.parametrize("value", [1, 2])
def test_assertion(value):
    assert value == 1
def test_without_message():
    assert not print
def test_nothing_raised():
    with pytest.raises(ValueError):
        pass
def test_fine(): ...
def test_import():
    import no_such_module
def test_of_a_broken_fixture(broken): ...
@pytest.mark.skip
def test_skipped(): ...
@pytest.fixture
def broken():
    assert False
"""


def test_only_assertions_of_tests_count_as_noticing(tmp_path: Path) -> None:
    (tmp_path / "test_kinds.py").write_text(KINDS)
    found = run_tests(tmp_path, ["test_kinds.py"])

    def said(test: str, **changes: str) -> str:
        mutation = Mutation("name", "1", "kinds.py", "old", "new", (f"test_kinds.py::test_{test}",), **changes)
        return verdict(mutation, found).partition(":")[0]

    assert {said(test) for test in ("assertion", "without_message", "nothing_raised")} == {"noticed"}
    assert said("fine") == "SURVIVED"
    assert {said(test) for test in ("import", "of_a_broken_fixture", "skipped")} == {"BROKEN"}
    assert said("import", fails_with="ModuleNotFoundError: No module named 'no_such_module'") == "noticed"


def test_a_text_that_is_not_there_once_does_not_apply(tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text("one, one")
    for old in ("one", "two"):
        assert outcome(Mutation("name", "1", "twice.py", old, "three", ()), tmp_path).startswith("DOES NOT APPLY")
    assert (tmp_path / "twice.py").read_text() == "one, one"
