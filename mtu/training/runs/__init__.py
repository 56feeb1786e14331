"""Complete trainings from a configuration, and what is known about them before they start.

- `peak_memory`: the memory that a step of a training takes, computed without weights.
"""
