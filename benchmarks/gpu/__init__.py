"""The steps of `python -m benchmarks.gpu_run`, their processes, their state, and their results."""
