from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polyglu.errors import PolygluError
from polyglu.interpretability.evolution import Snapshot, find_checkpoints, persistence, persistence_in_words
from polyglu.interpretability.statistics import Interval


def snapshots(changes: list[torch.Tensor]) -> list[Snapshot]:
    """Of a run whose alpha changed so, step by step."""
    nothing = Interval(torch.zeros(4), torch.zeros(4), torch.zeros(4))
    alphas = torch.stack(changes).cumsum(0)
    return [Snapshot(Path("x.pt"), step + 1, 1.0, alpha, 1.0, nothing, nothing) for step, alpha in enumerate(alphas)]


def noise(seed: int, n_layers: int = 5) -> torch.Tensor:
    return torch.randn(n_layers, 300, 4, generator=torch.Generator().manual_seed(seed))


def test_drift_of_noise_is_not_called_a_preference() -> None:
    run = snapshots([noise(1), noise(2), noise(3)])
    found = persistence(run)
    assert found is not None and abs(found.estimate) < 0.05 and found.low <= 0 <= found.high
    assert "is not shown" in persistence_in_words(run)


def test_what_goes_on_the_same_way_is() -> None:
    trend = noise(0)
    run = snapshots([trend + noise(1), trend + noise(2), trend + noise(3)])
    found = persistence(run)
    assert found is not None and found.estimate.item() == pytest.approx(0.5, abs=0.03) and found.low > 0
    assert "keep moving the same way" in persistence_in_words(run)


def test_what_neurons_or_activations_have_in_common_does_not_count() -> None:
    shared = torch.tensor([5.0, -5, 1, 0]) + 100 * noise(9)[..., :1]
    found = persistence(snapshots([shared + noise(1), shared + noise(2)]))
    assert found is not None and abs(found.estimate) < 0.05


def test_too_little_says_nothing() -> None:
    assert persistence(snapshots([noise(1)])) is None
    assert persistence(snapshots([torch.zeros(2, 3, 4)] * 2)) is None
    assert "no interval" in persistence_in_words(snapshots([noise(1, 1), noise(2, 1)]))
    alone = persistence_in_words(snapshots([noise(1)]))
    assert alone.startswith("All checkpoints are of step 1:") and "does not show" in alone
    assert persistence_in_words(snapshots([torch.zeros(2, 3, 4)] * 2)) == ""


@pytest.mark.parametrize(
    ("steps", "intervals", "alone"),
    [
        ((200, 1200, 2200), "from step 0 to step 2,200 in 3 intervals of 200 to 1,000 steps", "noisy updates alone"),
        ((0, 500, 1000, 1500), "from step 0 to step 1,500 in 3 intervals of 500 steps", "noisy updates alone"),
        ((1000, 1010, 1020), "from step 0 to step 1,020 in 3 intervals of 10 to 1,000 steps", "momentum alone may"),
    ],
)
def test_the_sentence_says_between_which_steps(steps: tuple[int, ...], intervals: str, alone: str) -> None:
    run = snapshots([noise(0) + noise(seed) for seed in range(len(steps))])
    if steps[0] == 0:
        run[0] = replace(run[0], alpha=torch.zeros_like(run[0].alpha))
    said = persistence_in_words([replace(one, step=step) for one, step in zip(run, steps, strict=True)])
    assert intervals in said and "between these steps their preferences" in said and alone in said


def test_checkpoints_are_found_by_file_folder_and_pattern(tmp_path: Path) -> None:
    for name in ("run [1]/portable_step2.pt", "run [1]/portable_final.pt", "run [1]/other.pt", "b/step_1.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    run = tmp_path / "run [1]"
    given = [str(run), str(run / "other.pt"), str(tmp_path / "b/*.pt"), str(run / "portable_final.pt")]
    names = [path.name for path in find_checkpoints(given)]
    assert names == ["portable_final.pt", "portable_step2.pt", "other.pt", "step_1.pt"]
    for nothing in ("none.pt", str(tmp_path / "b"), str(tmp_path / "*.bin")):
        with pytest.raises(PolygluError, match="no checkpoint is there"):
            find_checkpoints([nothing])
