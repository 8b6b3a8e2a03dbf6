"""Benchmarks: one file per question, ``python -m bench.NAME --json FILE``."""
