"""A few rows of each task's data set with the hub's columns, in the layouts that ``--data-dir`` takes."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]
STEM = (
    "abstract_algebra", "anatomy", "astronomy", "college_biology", "college_chemistry", "college_computer_science",
    "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
    "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning",
)  # fmt: skip
MATH = {
    "algebra": "Algebra", "counting_and_probability": "Counting & Probability", "geometry": "Geometry",
    "intermediate_algebra": "Intermediate Algebra", "number_theory": "Number Theory", "prealgebra": "Prealgebra",
    "precalculus": "Precalculus",
}  # fmt: skip
"""Configuration -> as the column ``type`` spells it."""


def gsm8k(index: int) -> Row:
    return {"question": f"{index} + 1 =", "answer": f"One more.\n#### {index + 1}"}


def math(index: int) -> Row:
    return {
        "problem": f"What is ${index}/3$?",
        "solution": f"It is $\\boxed{{\\frac{{{index}}}{{3}}}}$.",
        "level": "Level 1",
    }


def mmlu(index: int) -> Row:
    return {"question": f"{index} + 1 =", "choices": [str(index + k) for k in range(4)], "answer": 1}


def choices(index: int) -> Row:
    return {"text": [str(index + k) for k in range(4)], "label": list("ABCD")}


def hellaswag(index: int) -> Row:
    return {
        "activity_label": "Sums", "ctx_a": f"A child adds {index} and 1.", "ctx_b": "it", "label": "1",
        "endings": [f"says {index + k}." for k in range(4)],
    }  # fmt: skip


def sciq(index: int) -> Row:
    wrong = {f"distractor{k}": str(index - k) for k in (1, 2, 3)}
    return {"support": "Sums.", "question": f"{index} + 1?", "correct_answer": str(index + 1), **wrong}


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows in the format that the name's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def write_all(folder: Path) -> Path:
    """Write data for all tasks of the guide and of the suite ``paper``, some as the hub has them, some plainer."""

    def write(name: str, make: Callable[[int], Row], n: int = 2, **more: Any) -> None:
        write_rows(folder / name, [make(index) | more for index in range(3, 3 + n)])

    write("gsm8k/main/train-00000-of-00001.parquet", gsm8k, 5)
    write("gsm8k/main/test-00000-of-00001.parquet", gsm8k)
    for config in MATH:
        write(f"hendrycks_math/{config}/test-00000-of-00001.parquet", math)
    write("MATH-500/test.jsonl", math)
    for split, n in (("dev", 5), ("test", 2)):
        rows = [mmlu(index) | {"subject": subject} for subject in STEM for index in range(n)]
        write_rows(folder / f"mmlu_stem/{split}.jsonl.gz", rows)
    write("hellaswag/data/validation-00000-of-00001.parquet", hellaswag)
    for config in ("ARC-Easy", "ARC-Challenge"):
        write(f"ai2_arc/{config}/test-00000-of-00001.parquet", lambda k: {
            "question": f"{k} + 1?", "choices": choices(k), "answerKey": "B",
        })  # fmt: skip
    write("piqa/validation.jsonl", lambda k: {"goal": f"{k} + 1?", "sol1": str(k), "sol2": str(k + 1), "label": 1})
    write("winogrande/winogrande_xl/validation/0000.parquet", lambda k: {
        "sentence": f"{k} is less than {k + 1}, as _ is small.",
        "option1": str(k), "option2": str(k + 1), "answer": "1",
    })  # fmt: skip
    write("super_glue/boolq/validation.jsonl", lambda k: {
        "passage": "Sums.", "question": f"is {k} + 1 more than {k}", "label": 1,
    })  # fmt: skip
    write("lambada_openai/data/lambada_test.jsonl", lambda k: {"text": f"After {k} comes {k + 1}"})
    write("openbookqa/main/test.jsonl", lambda k: {
        "question_stem": f"{k} + 1?", "choices": choices(k), "answerKey": "B",
    })  # fmt: skip
    write("sciq/test.jsonl.gz", sciq)
    return folder
