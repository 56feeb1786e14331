"""The tiles that are shipped. Written by `python -m benchmarks.tune`; rows without a GPU's name are not measured."""

from mtu_kernels.triton.tiles import TableRow

ROWS: tuple[TableRow, ...] = ()
