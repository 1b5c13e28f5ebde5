"""Matchers behind one two-phase interface."""
