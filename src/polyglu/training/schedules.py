"""Learning rate and routing temperature as pure functions of the step (SPEC: paper, section 4)."""

import math

from polyglu.model.config import TrainingSection


def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Rate of the update after ``step`` updates: linear warm-up to ``peak``, then a cosine to 0 at ``total_steps``."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def temperature(step: int, settings: TrainingSection) -> float:
    """Routing temperature after ``step`` updates, from ``tau_max`` at 0 to ``tau_min`` at ``total_steps``.

    ``linear`` is the paper's; ``cosine`` falls slowly, fast, and slowly again; ``constant`` stays at ``tau_max``.
    """
    high, low = settings.tau_max, settings.tau_min
    if settings.tau_schedule == "constant":
        return high
    progress = step / settings.total_steps
    if settings.tau_schedule == "cosine":
        return low + (high - low) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return max(low, high - (high - low) * step / settings.total_steps)
