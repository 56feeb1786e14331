"""Training: one loop for every model of the library."""

from mtu.training.fit import FitConfig, LogEntry, fit

__all__ = ["FitConfig", "LogEntry", "fit"]
