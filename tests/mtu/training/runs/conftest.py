from .small_runs import small_base

__all__ = ["small_base"]
