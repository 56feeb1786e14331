"""Parameters and FLOPs of an upcycled model beside its original, counted on the meta device without any weights.

- `comparison`: one upcycled model beside its original.
- `sweep`: all expert layouts within a budget of parameters, and the paper's recipe for choosing one.
- `inspected_model`: the models to inspect, from a name, a folder or a UNet.
- `counting`: the counting itself, and the formatting of numbers and tables.

FLOPs are those of one forward of the UNet at batch 1, and a multiply-add counts as two. This is the paper's convention:
its 0.67 TFLOPs for SD 1.5 at 512² are 0.677 here. The two matrix products inside attention, which the paper leaves out,
are reported apart. So are the routers, which run once per call at any batch size, or not at all once they are dropped.
"""

from mtu.inspection.comparison import Comparison, Quantity, compare_with_original
from mtu.inspection.inspected_model import BUILT_IN_UNET_CONFIGS
from mtu.inspection.reports import Report
from mtu.inspection.sweep import LayoutCost, LayoutSweep, sweep_layouts

__all__ = [
    "BUILT_IN_UNET_CONFIGS",
    "Comparison",
    "LayoutCost",
    "LayoutSweep",
    "Quantity",
    "Report",
    "compare_with_original",
    "sweep_layouts",
]
