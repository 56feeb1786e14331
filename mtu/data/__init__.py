"""Data sets: the icon font as four image tasks with true targets."""

from mtu.data.icons import IconExample, Icons

__all__ = ["IconExample", "Icons"]
