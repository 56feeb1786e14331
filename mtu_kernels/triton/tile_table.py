"""The tiles that are shipped. Written by `python -m benchmarks.tune`; rows without a GPU's name are not measured."""

from mtu_kernels.triton.tiles import TableRow, TileConfig, TileKey

# fmt: off
# ruff: noqa: E501
ROWS: tuple[TableRow, ...] = (
    # sm_80
    TableRow(TileKey("expert_in", "sm_80", 16, False, 0, 0), TileConfig(128, 64, 64, 4, 3, False, 8), "compiled: 254 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in", "sm_80", 16, False, 320, 0), TileConfig(64, 64, 64, 4, 3, False, 8), "compiled: 162 registers, 3 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in", "sm_80", 16, True, 0, 0), TileConfig(128, 64, 64, 4, 3, False, 8), "compiled: 250 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in", "sm_80", 16, True, 320, 0), TileConfig(64, 64, 64, 4, 3, False, 8), "compiled: 168 registers, 3 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_train", "sm_80", 16, False, 0, 0), TileConfig(128, 64, 32, 4, 3, False, 8), "compiled: 254 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_train", "sm_80", 16, True, 0, 0), TileConfig(128, 64, 32, 4, 3, False, 8), "compiled: 254 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_sum", "sm_80", 16, True, 0, 0), TileConfig(128, 64, 64, 4, 3, False, 8), "compiled: 209 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_out_backward", "sm_80", 16, False, 0, 0), TileConfig(64, 32, 64, 4, 3, False, 8), "compiled: 142 registers, 3 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_out_backward", "sm_80", 16, True, 0, 0), TileConfig(64, 32, 64, 4, 3, False, 8), "compiled: 142 registers, 3 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_backward", "sm_80", 16, True, 0, 0), TileConfig(128, 64, 64, 4, 3, False, 8), "compiled: 202 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_weights", "sm_80", 16, True, 0, 0), TileConfig(64, 64, 64, 4, 3, False, 8), "compiled: 168 registers, 3 programs a multiprocessor; not measured"),
    # sm_86
    TableRow(TileKey("expert_in", "sm_86", 16, False, 0, 0), TileConfig(128, 64, 32, 4, 4, False, 8), "compiled: 250 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in", "sm_86", 16, True, 0, 0), TileConfig(128, 64, 32, 4, 4, False, 8), "compiled: 246 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_train", "sm_86", 16, False, 0, 0), TileConfig(128, 64, 32, 4, 3, False, 8), "compiled: 254 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_train", "sm_86", 16, True, 0, 0), TileConfig(128, 64, 32, 4, 3, False, 8), "compiled: 254 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_sum", "sm_86", 16, True, 0, 0), TileConfig(128, 64, 32, 4, 3, False, 8), "compiled: 152 registers, 3 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_out_backward", "sm_86", 16, False, 0, 0), TileConfig(64, 32, 64, 4, 3, False, 8), "compiled: 142 registers, 3 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_out_backward", "sm_86", 16, True, 0, 0), TileConfig(64, 32, 64, 4, 3, False, 8), "compiled: 142 registers, 3 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_backward", "sm_86", 16, True, 0, 0), TileConfig(128, 64, 32, 4, 3, False, 8), "compiled: 152 registers, 3 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_weights", "sm_86", 16, True, 0, 0), TileConfig(64, 64, 64, 4, 3, False, 8), "compiled: 168 registers, 3 programs a multiprocessor; not measured"),
    # sm_89
    TableRow(TileKey("expert_in", "sm_89", 16, False, 0, 0), TileConfig(128, 64, 32, 4, 4, False, 8), "compiled: 250 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in", "sm_89", 16, True, 0, 0), TileConfig(128, 64, 32, 4, 4, False, 8), "compiled: 246 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_train", "sm_89", 16, False, 0, 0), TileConfig(128, 64, 32, 4, 3, False, 8), "compiled: 254 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_train", "sm_89", 16, True, 0, 0), TileConfig(128, 64, 32, 4, 3, False, 8), "compiled: 254 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_sum", "sm_89", 16, True, 0, 0), TileConfig(128, 64, 32, 4, 3, False, 8), "compiled: 152 registers, 3 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_out_backward", "sm_89", 16, False, 0, 0), TileConfig(64, 32, 64, 4, 3, False, 8), "compiled: 142 registers, 3 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_out_backward", "sm_89", 16, True, 0, 0), TileConfig(64, 32, 64, 4, 3, False, 8), "compiled: 142 registers, 3 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_backward", "sm_89", 16, True, 0, 0), TileConfig(128, 64, 32, 4, 3, False, 8), "compiled: 152 registers, 3 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_weights", "sm_89", 16, True, 0, 0), TileConfig(64, 64, 64, 4, 3, False, 8), "compiled: 168 registers, 3 programs a multiprocessor; not measured"),
    # sm_90
    TableRow(TileKey("expert_in", "sm_90", 16, False, 0, 0), TileConfig(128, 64, 64, 4, 3, True, 8), "compiled: 164 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in", "sm_90", 16, True, 0, 0), TileConfig(128, 64, 64, 4, 3, True, 8), "compiled: 162 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_train", "sm_90", 16, False, 0, 0), TileConfig(128, 64, 64, 4, 3, True, 8), "compiled: 166 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_train", "sm_90", 16, True, 0, 0), TileConfig(128, 64, 64, 4, 3, True, 8), "compiled: 164 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_sum", "sm_90", 16, True, 0, 0), TileConfig(128, 128, 64, 8, 3, True, 8), "compiled: 100 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_sum", "sm_90", 16, True, 320, 0), TileConfig(128, 64, 64, 4, 3, True, 8), "compiled: 95 registers, 3 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_out_backward", "sm_90", 16, False, 0, 0), TileConfig(64, 64, 64, 8, 3, False, 8), "compiled: 128 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_out_backward", "sm_90", 16, True, 0, 0), TileConfig(64, 64, 64, 8, 3, False, 8), "compiled: 128 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_backward", "sm_90", 16, True, 0, 0), TileConfig(128, 128, 64, 8, 3, True, 8), "compiled: 90 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_backward", "sm_90", 16, True, 320, 0), TileConfig(128, 64, 64, 4, 3, True, 8), "compiled: 90 registers, 3 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_weights", "sm_90", 16, True, 0, 0), TileConfig(128, 128, 32, 8, 3, False, 8), "compiled: 120 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_weights", "sm_90", 16, True, 320, 0), TileConfig(64, 64, 64, 4, 3, False, 8), "compiled: 114 registers, 4 programs a multiprocessor; not measured"),
    # sm_100
    TableRow(TileKey("expert_in", "sm_100", 16, False, 0, 0), TileConfig(128, 64, 64, 8, 3, True, 8), "compiled: 98 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in", "sm_100", 16, True, 0, 0), TileConfig(128, 64, 64, 8, 3, True, 8), "compiled: 109 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_train", "sm_100", 16, False, 0, 0), TileConfig(128, 64, 64, 8, 3, True, 8), "compiled: 114 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_train", "sm_100", 16, True, 0, 0), TileConfig(128, 64, 64, 8, 3, True, 8), "compiled: 118 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_sum", "sm_100", 16, True, 0, 0), TileConfig(128, 64, 64, 4, 3, True, 8), "compiled: 130 registers, 3 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_out_backward", "sm_100", 16, False, 0, 0), TileConfig(64, 64, 64, 8, 3, False, 8), "compiled: 120 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_out_backward", "sm_100", 16, True, 0, 0), TileConfig(64, 64, 64, 8, 3, False, 8), "compiled: 123 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_backward", "sm_100", 16, True, 0, 0), TileConfig(128, 128, 64, 8, 3, True, 8), "compiled: 70 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_weights", "sm_100", 16, True, 0, 0), TileConfig(128, 128, 32, 8, 3, False, 8), "compiled: 119 registers, 2 programs a multiprocessor; not measured"),
    # sm_120
    TableRow(TileKey("expert_in", "sm_120", 16, False, 0, 0), TileConfig(128, 64, 32, 4, 4, True, 8), "compiled: 193 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in", "sm_120", 16, True, 0, 0), TileConfig(128, 64, 32, 4, 4, True, 8), "compiled: 190 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_train", "sm_120", 16, False, 0, 0), TileConfig(128, 64, 32, 4, 4, True, 8), "compiled: 190 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_train", "sm_120", 16, True, 0, 0), TileConfig(128, 64, 32, 4, 4, True, 8), "compiled: 190 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_sum", "sm_120", 16, True, 0, 0), TileConfig(128, 64, 64, 4, 2, True, 8), "compiled: 122 registers, 3 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_out_backward", "sm_120", 16, False, 0, 0), TileConfig(64, 64, 32, 8, 3, False, 8), "compiled: 119 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_out_backward", "sm_120", 16, True, 0, 0), TileConfig(64, 64, 32, 8, 3, False, 8), "compiled: 121 registers, 2 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_in_backward", "sm_120", 16, True, 0, 0), TileConfig(128, 64, 64, 4, 2, True, 8), "compiled: 167 registers, 3 programs a multiprocessor; not measured"),
    TableRow(TileKey("expert_weights", "sm_120", 16, True, 0, 0), TileConfig(64, 64, 64, 4, 3, False, 8), "compiled: 154 registers, 3 programs a multiprocessor; not measured"),
)
