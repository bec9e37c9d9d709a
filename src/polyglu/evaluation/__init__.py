"""Evaluation with lm-evaluation-harness, and held-out perplexity."""
