"""A whole suite, tiny, its runs inside this process: made, resumed, failed, refused, stopped."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from support import random_documents, write_token_source

from polyglu.compare import member
from polyglu.compare import run as run_module
from polyglu.compare.budget import CALIBRATION_STEPS
from polyglu.compare.processes import LOG, Process
from polyglu.compare.report import build_page
from polyglu.compare.run import compare, pick_devices, run_folder
from polyglu.compare.suite import load_suite
from polyglu.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, Interrupted, PolygluError
from polyglu.files import exclusive
from polyglu.page import render
from polyglu.training import fit

SHAPE = {
    "vocab_size": 64, "d_model": 16, "d_ff": 24, "n_layers": 1, "n_q_heads": 2, "n_kv_heads": 1, "head_dim": 8,
    "seq_length": 32,
}  # fmt: skip
STEPS, STEP_TOKENS = 10, 4 * 32


class Ended:
    """A process that has ended."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code

    def wait(self) -> int:
        return self.code

    def send_signal(self, number: int) -> None:
        pass


class Starter:
    """Makes runs in this process, in the way of ``start_process``; notes which.

    Args:
        before: called with the folder of each run.
    """

    def __init__(self, before: Callable[[Path], Any] = lambda folder: None) -> None:
        self.started: list[str] = []
        self.before = before

    def __call__(self, folder: Path, device: str | None) -> Process:
        self.started.append("/".join(folder.parts[-2:]))
        try:
            self.before(folder)
            member.main(folder)
        except Interrupted:
            return Ended(EXIT_INTERRUPTED)
        except PolygluError as error:
            (folder / LOG).write_text(f"error: {error}\n")
            return Ended(EXIT_BAD_INPUT)
        return Ended(0)


def write_suite(folder: Path, **changes: Any) -> Path:
    rng = np.random.default_rng(0)
    if not (folder / "data").exists():
        for name, size in (("train", 4000), ("heldout", 900)):
            write_token_source(folder / "data" / name, random_documents(rng, size))
    base = {
        "model": SHAPE,
        "data": {"sources": {"a": {"path": str(folder / "data/train"), "mix": 1.0, "mix_end": 1.0}}},
        "training": {
            "micro_batch_size": 4, "grad_accum_steps": 1, "precision": "fp32", "log_every": 2, "warmup_steps": 2,
            "learning_rate": 0.01, "checkpoint_every": 4,
        },
    }  # fmt: skip
    suite = {
        "base": str(folder / "base.yaml"),
        "variants": {"swiglu": {"model": {"ffn": "swiglu"}}, "sequence": {}},
        "seeds": [0, 1],
        "budget": {"tokens": STEPS * STEP_TOKENS + 1},
        "validation": {"h": str(folder / "data/heldout")},
        "validation_tokens": 640,
    } | changes
    (folder / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    return folder / "suite.yaml"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished suite's folder, its output in ``out``; not to be changed."""
    folder = tmp_path_factory.mktemp("suite")
    compare(load_suite(write_suite(folder)), folder / "out", [None], Starter())
    return folder


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time."""
    monkeypatch.setattr(run_module, "write_report", lambda results, output: None)


def copy_of(whole: Path, folder: Path) -> Path:
    """Output of the finished suite, to be changed; configs still name the original's data and runs."""
    shutil.copytree(whole / "out", folder / "out")
    return folder / "out"


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


def test_every_run_is_an_ordinary_one_with_its_result(whole: Path) -> None:
    for name, ffn in (("swiglu", "swiglu"), ("sequence", "polyglu")):
        for seed in (0, 1):
            folder = run_folder(whole / "out", name, seed)
            config = yaml.safe_load((folder / "config.yaml").read_text())
            assert config["model"]["ffn"] == ffn and config["training"]["seed"] == seed
            assert config["training"]["total_steps"] == STEPS and config["training"]["resume_from"] == "auto"
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            assert [row["step"] for row in rows] == [1, 2, 4, 6, 8, 10]
            left = sorted(path.name for path in (folder / "checkpoints").iterdir())
            assert left == ["portable_final.pt"]  # no resume files of what is finished


def test_results_pair_the_seeds_and_state_the_leak(whole: Path) -> None:
    found = results(whole / "out")
    rows = {row["name"]: row for row in found["variants"]}
    losses = {name: row["loss"]["by_seed"] for name, row in rows.items()}
    difference = rows["sequence"]["difference"]
    pairs = [losses["sequence"][seed] - losses["swiglu"][seed] for seed in "01"]
    assert difference["mean"] == pytest.approx(np.mean(pairs)) and difference["n"] == 2
    assert rows["swiglu"]["difference"] is None and rows["swiglu"]["tokens"] == STEPS * STEP_TOKENS
    assert all(2 < loss < 5 for row in losses.values() for loss in row.values())  # ln 64 is 4.16
    assert rows["sequence"]["parameters"] > rows["swiglu"]["parameters"] > 0
    assert all(row["tokens_per_second"] > 0 and row["peak_memory_gb"] > 0 for row in rows.values())
    (leak,) = found["leaks"]
    assert leak["name"] == "sequence" and leak["training"]["difference"]["n"] == 2
    assert leak["training"]["difference"]["mean"] == pytest.approx(
        leak["training"]["honest"]["mean"] - leak["training"]["as_trained"]["mean"]
    )
    assert leak["heldout"]["honest"]["mean"] == pytest.approx(rows["sequence"]["loss"]["mean"])
    assert found["leak_sentences"][0].startswith("sequence: ")


def test_the_report_is_one_page_with_pictures_beside_it(whole: Path) -> None:
    output = whole / "out"
    page = (output / "report.html").read_text()
    assert results(output)["verdict"].split(",")[0] in page and "Comparison: suite" in page
    assert len(re.findall(r'<img [^>]*alt="[^"]{40,}"', page)) >= 2
    for name in ("curves.png", "differences.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("without_pictures")
def test_finished_runs_are_not_repeated(whole: Path) -> None:
    again = Starter()
    assert compare(load_suite(whole / "suite.yaml"), whole / "out", [None], again)["failed"] == {}
    assert again.started == []


@pytest.mark.usefixtures("without_pictures")
def test_what_is_missing_is_made_again_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    suite, output = load_suite(write_suite(tmp_path)), tmp_path / "out"
    with pytest.raises(Interrupted, match="3 of 4 runs are to be made or finished"):
        compare(suite, output, [None], stopping := Starter(stop_in_the_second_run()))
    assert stopping.started == ["swiglu/seed_0", "sequence/seed_0"]
    saved = [path.name for path in (run_folder(output, "sequence", 0) / "checkpoints/ds_checkpoint").iterdir()]
    assert "step_00000003" in saved and not (run_folder(output, "sequence", 0) / "result.json").exists()
    again = Starter()
    compare(suite, output, [None], again)
    assert again.started == ["sequence/seed_0", "swiglu/seed_1", "sequence/seed_1"]
    for name in ("swiglu", "sequence"):
        ours, theirs = (run_folder(folder, name, 0) / "result.json" for folder in (output, whole / "out"))
        for key in ("heldout", "train_loss", "curve"):
            assert json.loads(ours.read_text())[key] == json.loads(theirs.read_text())[key]


def stop_in_the_second_run() -> Callable[[Path], None]:
    """SIGTERM, as a process of its own would be sent it when the command is stopped: both notice."""

    def before(folder: Path) -> None:
        if folder.parts[-2:] != ("sequence", "seed_0"):
            return
        os.kill(os.getpid(), signal.SIGTERM)  # the command's
        train = member.train

        def stopped(config: Any) -> Path:
            batches = fit._next_batch

            def asked(feed: Any, state: Any, plan: Any) -> Any:
                if state.step == 3:
                    os.kill(os.getpid(), signal.SIGTERM)  # the run's
                return batches(feed, state, plan)

            with patch.object(fit, "_next_batch", asked):
                return train(config)

        member.train, undo = stopped, member.train
        try:
            member.main(folder)
        finally:
            member.train = undo

    return before


@pytest.mark.usefixtures("without_pictures")
def test_a_failed_run_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        if folder.parts[-2:] == ("sequence", "seed_0"):
            raise PolygluError("training failed at step 7: bad numbers.")

    suite = load_suite(write_suite(tmp_path))
    found = compare(suite, tmp_path / "out", [None], Starter(fail))
    assert list(found["failed"]) == ["sequence, seed 0"] and "bad numbers" in found["failed"]["sequence, seed 0"]
    row = next(row for row in found["variants"] if row["name"] == "sequence")
    assert (row["runs"], row["failed"], row["difference"]["n"], row["difference"]["p"]) == (1, 1, 1, None)
    assert found["verdict"].startswith("Nothing can be said") and "1 of the runs failed" in found["verdict"]
    assert "bad numbers" in render(build_page(found, []))
    again = Starter()
    assert compare(suite, tmp_path / "out", [None], again)["failed"] == {} and again.started == ["sequence/seed_0"]


def test_nothing_that_ended_well_is_one_sentence(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise PolygluError("no.")

    with pytest.raises(PolygluError, match=r"no run of suite ended well; the first: no. \(exit code 2; .*log.txt\)"):
        compare(load_suite(write_suite(tmp_path)), tmp_path / "out", [None], Starter(fail))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": [0, 1, 2]}, "settings.seeds"),
        ({"budget": {"tokens": 999}}, "settings.budget.tokens"),
        ({"training": {"learning_rate": 0.5}}, "variants.sequence.training.learning_rate"),
    ],
)
def test_the_folder_of_another_suite_is_refused(
    whole: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    output, before = copy_of(whole, tmp_path), (whole / "suite.yaml").read_text()
    try:
        suite = load_suite(write_suite(whole, **changes))
    finally:
        (whole / "suite.yaml").write_text(before)
    with pytest.raises(PolygluError, match=f"has runs of another suite: it differs in .*{said}") as refused:
        compare(suite, output, [None], Starter())
    assert "Give another --output, or remove the folder." in str(refused.value)


def test_other_data_is_another_suite(whole: Path, tmp_path: Path) -> None:
    output = copy_of(whole, tmp_path)
    held_out = whole / "data/heldout"
    shutil.move(held_out, tmp_path / "kept")
    try:
        write_token_source(held_out, random_documents(np.random.default_rng(9), 900))
        with pytest.raises(PolygluError, match="another suite: it differs in data.validation.h"):
            compare(load_suite(whole / "suite.yaml"), output, [None], Starter())
    finally:
        shutil.rmtree(held_out)
        shutil.move(tmp_path / "kept", held_out)


def test_a_warm_up_as_long_as_the_run_is_refused(tmp_path: Path) -> None:
    suite = load_suite(write_suite(tmp_path, budget={"tokens": 2 * STEP_TOKENS}))
    with pytest.raises(PolygluError, match="pays for 2 steps, and training.warmup_steps is 2"):
        compare(suite, tmp_path / "out", [None], Starter())
    assert not (tmp_path / "out").exists()  # a corrected suite may have it


@pytest.mark.usefixtures("without_pictures")
def test_wall_time_becomes_steps_by_measured_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = load_suite(write_suite(tmp_path, budget={"seconds": 0.5}, seeds=[3]))
    speeds = {"swiglu": 8.0 * STEP_TOKENS, "sequence": 12.0 * STEP_TOKENS}
    described = member.describe

    def describe(config: Any, rows: Any) -> dict[str, Any]:
        measured = speeds.get(Path(config.training.run_dir).name, 1.0)
        return {**described(config, rows), "tokens_per_second": measured}

    monkeypatch.setattr(member, "describe", describe)
    starter = Starter()
    found = compare(suite, tmp_path / "out", [None], starter)
    assert starter.started == ["calibration/swiglu", "calibration/sequence", "swiglu/seed_3", "sequence/seed_3"]
    assert {row["name"]: row["steps"] for row in found["variants"]} == {"swiglu": 4, "sequence": 6}
    measured = yaml.safe_load((tmp_path / "out/calibration/swiglu/config.yaml").read_text())
    assert measured["training"]["total_steps"] == CALIBRATION_STEPS
    assert found["verdict"].startswith("Nothing can be said of any variant against swiglu")
    again = Starter()
    compare(suite, tmp_path / "out", [None], again)
    assert again.started == []


def test_devices_without_a_gpu() -> None:
    assert pick_devices(None) == [None]
    with pytest.raises(PolygluError, match="got '0,1', there is none; leave it out, to use the CPU"):
        pick_devices("0,1")


def test_devices_are_those_that_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert pick_devices(None) == ["0"] and pick_devices("0, 2") == ["0", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert pick_devices("0,2") == ["4", "7"]
    for bad in ("3", "0,0", "a", "", "²"):
        with pytest.raises(PolygluError, match="must name GPUs, each once"):
            pick_devices(bad)


def test_runs_do_not_outlive_a_killed_command(tmp_path: Path) -> None:
    """Killed in the middle of a run of about a minute, it leaves no process that would hold the run's folder."""
    suite, output = write_suite(tmp_path, budget={"tokens": 20_000 * STEP_TOKENS}), tmp_path / "out"
    folder = run_folder(output, "swiglu", 0)
    with subprocess.Popen(
        [sys.executable, "-m", "polyglu.compare.run", str(suite), "--output", str(output)]
    ) as command:
        wait_for(lambda: (folder / "metrics.jsonl").exists())
        command.kill()
    wait_for(lambda: is_free(folder), 20)
    assert is_free(output) and not (folder / "result.json").exists()


def wait_for(holds: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.1)


def is_free(folder: Path) -> bool:
    try:
        with exclusive(folder):
            return True
    except PolygluError:
        return False
