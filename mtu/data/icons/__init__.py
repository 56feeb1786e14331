"""The icon font as four image tasks with true targets. It needs the extra `train`, which installs the font."""

from mtu.data.icons.examples import IconDataset, IconExample

__all__ = ["IconDataset", "IconExample"]
