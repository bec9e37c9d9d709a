"""Mathematics with worked solutions: problems from reasoning-gym, solutions written out step by step.

Two-operand sums and differences are split into training and held-out problems by a hash of the problem itself, in which
the order of the operands does not count (37 - 42 is solved through 42 - 37). ``mentions_held_out`` finds a held-out
problem in any text, so that nothing which contains one is trained on.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import reasoning_gym

HELD_OUT_SHARE = 10
"""One two-operand problem in so many is held out."""
MAX_WORD_PROBLEM = 600
"""Longest word problem with its solution, in characters."""
MAX_DRAWS = 200_000
"""Problems drawn from one generator before it ends."""

_EXPRESSION = re.compile(r"(?<!\d)(?=(\d\d)\s*([+\-\u2212\u2013])\s*(\d\d)(?!\d))")
_GSM_ENDINGS = re.compile(r"\s*(Give (the result|your answer)|Do not include)[^.]*\.", re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """A question, its solution in steps (without the result line), and the result."""

    question: str
    steps: str
    answer: str

    @property
    def solution(self) -> str:
        """Steps and result, as a model should write them."""
        return f"{self.steps}\n#### {self.answer}"

    @property
    def document(self) -> str:
        """Question and solution, as pre-training text."""
        return f"Question: {self.question}\nAnswer: {self.solution}"


def is_held_out(first: int, operator: str, second: int) -> bool:
    """Whether a sum or difference of two two-digit numbers is kept out of all training text; either order."""
    sign = "+" if operator == "+" else "-"
    key = f"{min(first, second)} {sign} {max(first, second)}"
    return hashlib.sha256(key.encode()).digest()[0] * HELD_OUT_SHARE < 256


def mentions_held_out(text: str) -> bool:
    """Whether ``text`` contains a held-out sum or difference in either order, with or without blanks."""
    return any(is_held_out(int(a), operator, int(b)) for a, operator, b in _EXPRESSION.findall(text))


def arithmetic(seed: int, held_out: bool) -> Iterator[Problem]:
    """Generate distinct sums and differences of two numbers of one or two digits.

    Either the held-out ones (two digits each) or those that may be trained on.
    """
    seen: set[str] = set()
    for entry in _entries("chain_sum", seed, min_terms=2, max_terms=2, min_digits=1, max_digits=2):
        first, operator, second = entry["metadata"]["expression"].split()
        two_digits = len(first) == len(second) == 2
        if entry["question"] in seen or held_out != (two_digits and is_held_out(int(first), operator, int(second))):
            continue
        seen.add(entry["question"])
        yield Problem(entry["question"], _steps(int(first), operator, int(second)), entry["answer"])


def other_mathematics(seed: int) -> Iterator[Problem]:
    """Word problems, chains of sums, products, equations, divisors and angles, in turn."""
    kinds = [_word_problems, _chains, _word_problems, _equations, _word_problems, _products, _divisors, _angles]
    streams = [kind(seed + index) for index, kind in enumerate(kinds)]
    while True:
        for stream in streams:
            yield next(stream)


def _word_problems(seed: int) -> Iterator[Problem]:
    for entry in _entries("gsm_symbolic", seed):
        steps = entry["metadata"]["answer_cot"].rpartition("\n#### ")[0]
        question = _GSM_ENDINGS.sub("", entry["question"])
        if len(question) + len(steps) <= MAX_WORD_PROBLEM:
            yield Problem(question, steps, entry["answer"])


def _chains(seed: int) -> Iterator[Problem]:
    """Three or four small numbers, added up from the left."""
    for entry in _entries("chain_sum", seed, min_terms=3, max_terms=4, min_digits=1, max_digits=2):
        first, *rest = entry["metadata"]["expression"].split()
        total, steps = int(first), []
        for operator, number in zip(rest[::2], rest[1::2], strict=True):
            result = total + int(number) if operator == "+" else total - int(number)
            steps.append(f"{total} {operator} {number} = {result}")
            total = result
        yield Problem(entry["question"], "\n".join(steps), entry["answer"])


def _products(seed: int) -> Iterator[Problem]:
    """Products of two small numbers, one digit of the second at a time."""
    for entry in _entries("products", seed, max_digits=2):
        first, second = (int(number) for number in entry["metadata"]["expression"].split(" * "))
        parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(second))) if digit != "0"]
        steps = [f"{first} * {part} = {first * part}" for part in parts]
        total = " + ".join(str(first * part) for part in parts)
        question = entry["question"].partition(" Give only")[0]
        yield Problem(question, "\n".join([*steps, f"{total} = {entry['answer']}"]), entry["answer"])


def _equations(seed: int) -> Iterator[Problem]:
    """Linear equations, the solution put in as a check."""
    for entry in _entries("simple_equations", seed):
        variable, equation = entry["metadata"]["variable"], entry["metadata"]["equation"]
        check = equation.replace(f"*{variable}", f"*{entry['answer']}")
        steps = f"The solution is {variable} = {entry['answer']}.\nCheck: {check}"
        yield Problem(entry["question"], steps, entry["answer"])


def _divisors(seed: int) -> Iterator[Problem]:
    """Greatest common divisors by Euclid's algorithm."""
    for entry in _entries("gcd", seed):
        larger, smaller = sorted(entry["metadata"]["numbers"], reverse=True)
        steps = []
        while smaller:
            steps.append(f"{larger} = {larger // smaller} * {smaller} + {larger % smaller}")
            larger, smaller = smaller, larger % smaller
        yield Problem(entry["question"].partition(" Give only")[0], "\n".join(steps), entry["answer"])


def _angles(seed: int) -> Iterator[Problem]:
    """The last angle of a polygon."""
    for entry in _entries("simple_geometry", seed):
        facts = entry["metadata"]
        total, known = facts["total_interior_sum"], round(facts["sum_of_known_angles"])
        rule = f"The angles of a polygon with {facts['n_sides']} sides sum to {total}."
        question = entry["question"].partition("Return only")[0].replace(".0°", "°")
        yield Problem(question, f"{rule}\n{total} - {known} = {entry['answer']}", entry["answer"])


def _steps(first: int, operator: str, second: int) -> str:
    """Column by column, ones first. Sums show two digits, the left one is the carry; a borrowed ten is written out."""
    if operator == "+":
        ones = first % 10 + second % 10
        tens = first // 10 + second // 10 + ones // 10
        return f"{first % 10}+{second % 10}={ones:02d}, {first // 10}+{second // 10}+{ones // 10}={tens:02d}"
    larger, smaller = max(first, second), min(first, second)
    borrow = int(larger % 10 < smaller % 10)
    ones = larger % 10 + 10 * borrow - smaller % 10
    tens = larger // 10 - smaller // 10 - borrow
    order = f"{first}{'<' if first < second else '>='}{second}"
    return f"{order}, {borrow}{larger % 10}-{smaller % 10}={ones}, {larger // 10}-{smaller // 10}-{borrow}={tens}"


def _entries(name: str, seed: int, **settings: Any) -> Iterator[dict[str, Any]]:
    yield from reasoning_gym.create_dataset(name, seed=seed, size=MAX_DRAWS, **settings)
