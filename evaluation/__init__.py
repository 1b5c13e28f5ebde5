"""Evaluation of reconstructions and matchers."""
