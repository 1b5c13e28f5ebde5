"""Command lines, one module a command; every flag is a field of the options it fills."""
