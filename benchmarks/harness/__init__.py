"""The machinery of all benchmarks: times, memory, the check before timing, CSV rows, their provenance."""
