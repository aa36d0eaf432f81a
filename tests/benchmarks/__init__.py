"""Benchmarks: side by side in one run, as ratios. Not part of `make test`."""
