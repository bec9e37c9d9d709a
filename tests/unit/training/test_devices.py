"""What the process does to its memory on a CPU."""

import subprocess
import sys

FAULTS = """
import resource, torch
{first}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    torch.ones(2**24)
before = faults()
for _ in range(5):
    torch.ones(2**24)
print(faults() - before)
"""
"""Page faults of five tensors of 64 MB, each freed before the next."""
ENGINE = """
from polyglu.model.config import ModelConfig, TrainingSection
from polyglu.model.model import create_model
from polyglu.training.engine import create_engine
from polyglu.training.ranks import Ranks
model = create_model(ModelConfig(vocab_size=8, d_model=8, d_ff=8, n_layers=1, n_q_heads=1, n_kv_heads=1, head_dim=8))
create_engine(model, TrainingSection(), Ranks(torch.device("cpu")))
"""


def page_faults(first: str) -> int:
    command = [sys.executable, "-W", "ignore", "-c", FAULTS.format(first=first)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_training_on_a_cpu_keeps_memory_for_the_next_tensor() -> None:
    """Of itself, glibc gives it back: here pages have 4 KB, or more on other machines."""
    assert page_faults("") > 500 > 50 > page_faults(ENGINE)
