"""Measured claims: ``python -m benchmarks`` (or ``make bench``) runs every entry, one claim to a file."""
