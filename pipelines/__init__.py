"""The order of the steps: what a user runs."""
