"""Benchmarks that compare in one run, on one machine."""
