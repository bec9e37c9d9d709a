"""Pre-training: loop, engines, optimiser, schedules, checkpoints, metrics."""
