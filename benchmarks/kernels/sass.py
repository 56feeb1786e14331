"""Reads machine code: the registers and the stack of a kernel, and the instructions of its main loop."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import triton

_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"(\.L_\w+):")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_TO_LABEL = re.compile(r"`\((\.L_\w+)\)")
_TO_ADDRESS = re.compile(r"0x([0-9a-f]+)\s*$")
# HMMA up to Ada and on consumer Blackwell, HGMMA on Hopper, UTCHMMA (tcgen05 in PTX) on data-centre Blackwell.
_TENSOR_CORE = re.compile(r"H?G?MMA|UTC\w*MMA")


class Instruction(NamedTuple):
    """One instruction: its address, its name with modifiers, and where it jumps if it is a branch."""

    address: int
    name: str
    branch_target: int | None

    @property
    def name_without_modifiers(self) -> str:
        return self.name.partition(".")[0]


class MachineCode(NamedTuple):
    """A kernel as the GPU gets it.

    Attributes:
        num_registers: per thread.
        stack_bytes: bytes per thread. Anything but 0 is memory that registers spill to.
        instructions: in the order of their addresses; empty if they were not listed.
        main_loop: those of the innermost loop around the matrix product.
        epilogue: those between the main loop and the last exit.
    """

    num_registers: int
    stack_bytes: int
    instructions: tuple[Instruction, ...]
    main_loop: tuple[Instruction, ...]
    epilogue: tuple[Instruction, ...]


def count_instructions(instructions: Sequence[Instruction], *bases: str) -> int:
    """The number of instructions with one of the names, modifiers aside."""
    return sum(instruction.name_without_modifiers in bases for instruction in instructions)


def count_tensor_core(instructions: Sequence[Instruction]) -> int:
    """The number of products on tensor cores."""
    return sum(bool(_TENSOR_CORE.fullmatch(instruction.name_without_modifiers)) for instruction in instructions)


def count_waits(instructions: Sequence[Instruction]) -> int:
    """The number of instructions that wait for Hopper's tensor cores, which run asynchronously.

    A main loop needs one wait. Where the compiler cannot tell products from other uses of their registers, it waits
    after each product: products are serialised, and the tensor cores idle in between.
    """
    return sum(instruction.name.startswith("WARPGROUP.DEPBAR") for instruction in instructions)


def disassemble(cubin: bytes, *, listed: bool = True) -> MachineCode:
    """Reads machine code with the tools that come with Triton; listing its instructions takes nearly all the time."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _USAGE.search(_run("cuobjdump", "-res-usage", file.name))
        instructions = parse_listing(_run("nvdisasm", "-ndf", "-c", file.name)) if listed else ()
    if usage is None:
        raise ValueError("cuobjdump must name REG and STACK of a kernel, got a report without them.")
    loop = find_main_loop(instructions)
    return MachineCode(int(usage[1]), int(usage[2]), instructions, loop, _epilogue(instructions, loop))


def parse_listing(listing: str) -> tuple[Instruction, ...]:
    """Instructions from the text of nvdisasm, whose branches go to labels, or of cuobjdump, whose go to addresses."""
    labels: dict[str, int] = {}
    waiting: list[str] = []
    lines = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif found := _LINE.match(line):
            address = int(found[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
            lines.append((address, found[2], found[3]))
    return tuple(Instruction(address, name, _target(name, operands, labels)) for address, name, operands in lines)


def find_main_loop(instructions: Sequence[Instruction]) -> tuple[Instruction, ...]:
    """The shortest loop around a product on tensor cores, else around FFMA; empty where nothing loops.

    The shortest: waits for barriers lie behind the end and jump back, so all of the kernel looks like a loop, too.
    """
    works = count_tensor_core if count_tensor_core(instructions) else _count_plain
    loops = []
    for branch in instructions:
        if branch.branch_target is not None and branch.branch_target < branch.address:
            body = tuple(i for i in instructions if branch.branch_target <= i.address <= branch.address)
            if works(body):
                loops.append(body)
    return min(loops, key=len, default=())


def _count_plain(instructions: Sequence[Instruction]) -> int:
    return count_instructions(instructions, "FFMA", "FFMA2")


def _epilogue(instructions: Sequence[Instruction], loop: Sequence[Instruction]) -> tuple[Instruction, ...]:
    if not loop:
        return ()
    end = max((i.address for i in instructions if i.name_without_modifiers == "EXIT"), default=0)
    return tuple(i for i in instructions if loop[-1].address < i.address <= end)


def _target(name: str, operands: str, labels: dict[str, int]) -> int | None:
    if not name.startswith("BRA"):
        return None
    if label := _TO_LABEL.search(operands):
        return labels.get(label[1])
    address = _TO_ADDRESS.search(operands)
    return int(address[1], 16) if address else None


def _run(tool: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
