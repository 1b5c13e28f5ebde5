"""The package version, read by setup.cfg and written into every output."""

__version__ = "0.1.0"
