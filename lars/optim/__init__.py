"""Optimizers that a recipe may name, and exact norms over whatever slices an engine keeps. Needs torch alone."""
