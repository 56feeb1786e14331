"""Measurements: each module writes CSV rows with their provenance into `benchmarks/results`."""
