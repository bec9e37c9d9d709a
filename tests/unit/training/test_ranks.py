"""The processes of a run; several of them meet in tests/integration/test_bad_numbers.py."""

from unittest.mock import patch

import pytest
import torch

from polyglu.errors import PolygluError
from polyglu.training.ranks import Ranks, connect, launched_distributed

CPU = torch.device("cpu")


def test_one_rank_is_alone() -> None:
    alone = Ranks(CPU)
    tensor = torch.ones(3)
    alone.add_up(tensor)
    assert (alone.rank, alone.world_size, alone.sum([1, 2.5]), alone.gather("a")) == (0, 1, [1, 2.5], ["a"])
    assert tensor.tolist() == [1.0] * 3 and alone.agree(lambda: "decided") == "decided"
    alone.close()


def test_what_one_rank_refuses_is_refused() -> None:
    with pytest.raises(PolygluError, match="too small"):
        Ranks(CPU).agree(refuse)


def refuse() -> None:
    raise PolygluError("too small")


def test_another_rank_decides_nothing_and_leaves_without_a_word() -> None:
    sent: list[object] = []

    def broadcast(answer: list[object], device: torch.device) -> None:
        if rank == 0:
            sent[:] = answer
        answer[:] = sent

    with patch("torch.distributed.broadcast_object_list", broadcast):
        for rank in (0, 1):
            assert Ranks(CPU, rank, 2).agree(refuse if rank else lambda: "decided") == "decided"
        for rank, error in enumerate((PolygluError, SystemExit)):
            with pytest.raises(error) as raised:
                Ranks(CPU, rank, 2).agree(refuse)
    assert raised.value.args == (2,)


@pytest.mark.parametrize(
    ("names", "launched"), [([], False), (["RANK"], False), (["WORLD_SIZE"], False), (["RANK", "WORLD_SIZE"], True)]
)
def test_a_launcher_is_known_by_what_it_sets(names: list[str], launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in names:
        monkeypatch.setenv(name, "1")
    assert launched_distributed() == launched


def test_a_process_that_nobody_launched_connects_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    ranks = connect()
    assert (ranks.rank, ranks.world_size) == (0, 1) and not torch.distributed.is_initialized()
