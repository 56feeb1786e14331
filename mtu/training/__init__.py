"""Training: one loop for every model of the library."""

from mtu.training.fit import FitConfig, fit
from mtu.training.loss_log import LogEntry

__all__ = ["FitConfig", "LogEntry", "fit"]
