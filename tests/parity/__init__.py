"""Our networks against recorded numbers of the reference: ``python -m tests.parity FOLDER``."""
