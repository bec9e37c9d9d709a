"""Evaluation: tasks of the lm-evaluation-harness and held-out perplexity."""
