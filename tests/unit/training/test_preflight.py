"""Checks before a run that need no run; the others are tested through the command (integration/test_dry_run.py)."""

from pathlib import Path

import pytest

from polyglu.model.config import WandbSection
from polyglu.training.dry_run import bytes_in_words, duration
from polyglu.training.preflight import wandb_fault
from polyglu.training.trial import place_for_trial

KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("mode", "key", "said"),
    [
        ("auto", None, None),
        ("auto", KEY, None),
        ("online", KEY, None),
        ("online", f"local-{KEY}", None),
        ("online", f"{KEY}0123", None),
        ("online", "header.pay-load.sign_ature", None),
        ("online", None, "no key is there"),
        ("online", "", "of 0 characters"),
        ("auto", "secret-key", "of 10 characters"),
        ("auto", f"{KEY}\n", "of 41 characters"),
        ("auto", f'"{KEY}"', "of 42 characters"),
        ("offline", "secret-key", None),
        ("disabled", None, None),
    ],
)
def test_wandb_key(
    mode: str, key: str | None, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    fault = wandb_fault(WandbSection(mode=mode))  # type: ignore[arg-type]
    if said is None:
        assert fault is None
    else:
        assert fault is not None and said in fault
        assert not key or key.strip() not in fault


def test_a_key_of_wandb_login_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert wandb_fault(WandbSection(mode="online")) is None
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_fault(WandbSection(mode="online")) is not None


def test_the_trial_is_beside_the_checkpoints_and_never_among_them(tmp_path: Path) -> None:
    assert place_for_trial(tmp_path / "runs/one/checkpoints") == tmp_path
    (tmp_path / "runs/one/checkpoints").mkdir(parents=True)
    assert place_for_trial(tmp_path / "runs/one/checkpoints") == tmp_path / "runs/one"


def test_words() -> None:
    assert [duration(seconds) for seconds in (1.0, 300.0, 10_800.0, 864_000.0)] == [
        "1.0 seconds", "5.0 minutes", "3.0 hours", "10.0 days",
    ]  # fmt: skip
    assert [bytes_in_words(count) for count in (12, 3_400_000, 7_170_000_000)] == ["0.01 kB", "3.40 MB", "7.17 GB"]
