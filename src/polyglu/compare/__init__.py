"""Variants of a model trained under one budget, and what their held-out losses allow to be said."""
