import pytest

from polyglu.model.config import TrainingSection
from polyglu.training.schedules import learning_rate, temperature


def test_paper_learning_rate() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, peak=1e-4, warmup_steps=2000, total_steps=19531)

    assert rate(0) == pytest.approx(1e-4 / 2000)
    assert rate(999) == pytest.approx(0.5e-4)
    assert rate(2000) == pytest.approx(1e-4)
    assert rate((2000 + 19531) // 2) == pytest.approx(0.5e-4, rel=1e-3)
    assert rate(19531) == pytest.approx(0, abs=1e-12)
    rates = [rate(step) for step in range(19531)]
    assert max(rates) <= 1e-4 and min(rates) > 0
    assert all(first < second for first, second in zip(rates[:1999], rates[1:2000], strict=True))
    assert all(first > second for first, second in zip(rates[2000:], rates[2001:], strict=False))


def test_run_shorter_than_its_warm_up() -> None:
    assert learning_rate(99, peak=1e-4, warmup_steps=2000, total_steps=100) == pytest.approx(5e-6)
    assert learning_rate(0, peak=1.0, warmup_steps=0, total_steps=10) == 1.0


def test_paper_temperature() -> None:
    def tau(step: int) -> float:
        return temperature(step, TrainingSection())

    assert tau(0) == 1.0
    assert tau(10_000) == pytest.approx(1.0 - 0.9 * 10_000 / 19531)
    assert tau(19531) == pytest.approx(0.1)
    assert tau(30_000) == 0.1


def test_other_temperatures_have_the_same_ends() -> None:
    cosine = TrainingSection(total_steps=100, tau_max=2.0, tau_min=0.5, tau_schedule="cosine")
    found = [temperature(step, cosine) for step in (0, 25, 50, 75, 100, 130)]
    assert found == pytest.approx([2.0, 0.5 + 1.5 * 0.8535534, 1.25, 0.5 + 1.5 * 0.1464466, 0.5, 0.5])
    constant = TrainingSection(total_steps=100, tau_max=0.7, tau_schedule="constant")
    assert {temperature(step, constant) for step in (0, 50, 100)} == {0.7}
