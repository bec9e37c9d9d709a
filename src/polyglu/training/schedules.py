"""Learning rate and routing temperature as pure functions of the step (SPEC: paper, section 4)."""

import math


def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Rate of the update after ``step`` updates: linear warm-up to ``peak``, then a cosine to 0 at ``total_steps``."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def temperature(step: int, total_steps: int, tau_max: float, tau_min: float) -> float:
    """Routing temperature after ``step`` updates: linear from ``tau_max`` to ``tau_min`` at ``total_steps``."""
    return max(tau_min, tau_max - (tau_max - tau_min) * step / total_steps)
