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
    found = persistence(snapshots([noise(1), noise(2), noise(3)]))
    assert found is not None and abs(found.estimate) < 0.05 and found.low <= 0 <= found.high
    assert "is not shown" in persistence_in_words(found)


def test_what_goes_on_the_same_way_is() -> None:
    trend = noise(0)
    found = persistence(snapshots([trend + noise(1), trend + noise(2), trend + noise(3)]))
    assert found is not None and found.estimate.item() == pytest.approx(0.5, abs=0.03) and found.low > 0
    assert "keep moving the same way" in persistence_in_words(found)


def test_what_neurons_or_activations_have_in_common_does_not_count() -> None:
    shared = torch.tensor([5.0, -5, 1, 0]) + 100 * noise(9)[..., :1]
    found = persistence(snapshots([shared + noise(1), shared + noise(2)]))
    assert found is not None and abs(found.estimate) < 0.05


def test_too_little_says_nothing() -> None:
    assert persistence(snapshots([noise(1)])) is None
    assert persistence(snapshots([torch.zeros(2, 3, 4)] * 2)) is None
    one_layer = persistence(snapshots([noise(1, 1), noise(2, 1)]))
    assert "no interval" in persistence_in_words(one_layer)


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
