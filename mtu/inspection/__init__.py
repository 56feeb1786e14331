"""What an upcycled model costs beside its original: parameters and FLOPs, counted on the meta device.

FLOPs are those of one forward of the UNet at batch 1, a multiply-add counting as two: the paper's convention, found by
computing (0.677 T for SD 1.5 at 512², where the paper says 0.67). The two matrix products inside attention, which the
paper leaves out, are reported apart; so are the routers, which run once per call whatever the batch, or never once they
are dropped.
"""

from mtu.inspection.comparison import Comparison, Quantity, compare_with_original, format_comparison
from mtu.inspection.inspected_model import BUILT_IN_UNET_CONFIGS
from mtu.inspection.sweep import LayoutCost, LayoutSweep, format_sweep, sweep_layouts

__all__ = [
    "BUILT_IN_UNET_CONFIGS",
    "Comparison",
    "LayoutCost",
    "LayoutSweep",
    "Quantity",
    "compare_with_original",
    "format_comparison",
    "format_sweep",
    "sweep_layouts",
]
