"""Compiles launches for GPUs that need not be here, and counts the programs that share a multiprocessor."""

from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from benchmarks.kernels.sass import MachineCode, disassemble
from mtu_kernels.triton.launch import Launch, is_interpreted

_KB = 1024
_REGISTERS = 65536
_TENSOR_MEMORY = 512


class ProcessorLimits(NamedTuple):
    """Limits of one streaming multiprocessor.

    Source: CUDA C++ programming guide, technical specifications by compute capability.

    Attributes:
        shared_bytes: bytes of shared memory, of which each program takes 1 KB more than it asks for.
        max_threads: that are resident at most.
        max_programs: that are resident at most.
        static_shared_bytes: bytes of shared memory of a program that Triton does not ask for.
    """

    shared_bytes: int
    max_threads: int
    max_programs: int
    static_shared_bytes: int = 0

    @property
    def max_shared_bytes_per_program(self) -> int:
        return self.shared_bytes - _KB


CHIPS = {
    "sm_80": ProcessorLimits(164 * _KB, 2048, 32),
    "sm_86": ProcessorLimits(100 * _KB, 1536, 16),
    "sm_89": ProcessorLimits(100 * _KB, 1536, 24),
    "sm_90": ProcessorLimits(228 * _KB, 2048, 32, static_shared_bytes=_KB),
    "sm_100": ProcessorLimits(228 * _KB, 2048, 32, static_shared_bytes=_KB),
    "sm_120": ProcessorLimits(100 * _KB, 1536, 24, static_shared_bytes=_KB),
}
# All that are compiled for. AMD's are compiled only: nothing here reads their machine code.
ARCHITECTURES = (*CHIPS, "gfx942")


class CompiledLaunch(NamedTuple):
    """A launch, compiled.

    Attributes:
        shared_bytes: bytes of shared memory of a program, the static part included.
        tensor_memory_columns: columns of tensor memory of a program (sm_100).
        machine_code: ``None`` for AMD.
    """

    launch: Launch
    shared_bytes: int
    tensor_memory_columns: int
    machine_code: MachineCode | None

    def require_code(self) -> MachineCode:
        """The machine code. Raises ValueError for an AMD architecture, whose code nothing here reads."""
        if self.machine_code is None:
            raise ValueError("This needs code for an NVIDIA architecture, got a kernel compiled for AMD.")
        return self.machine_code


class CompilerInput(NamedTuple):
    """The compiler's input for a launch. Launches of equal keys are one kernel."""

    key: tuple[str, ...]
    source: ASTSource
    options: dict[str, Any]


def check_not_interpreted() -> None:
    """Raises ValueError where kernels were defined for Triton's interpreter."""
    if is_interpreted():
        raise ValueError("TRITON_INTERPRET must be unset, since interpreted kernels cannot be compiled; it is set.")


def gpu_target(arch: str) -> GPUTarget:
    """Triton's name for an architecture."""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def compiler_input_of(launch: Launch, arch: str) -> CompilerInput:
    """The kernel that Triton's JIT would compile at this launch: its own code decides on types, divisors and ones.

    Raises:
        ValueError: kernels were defined for Triton's interpreter.
    """
    check_not_interpreted()
    kernel = launch.kernel
    backend = make_backend(gpu_target(arch))
    named = launch.constant_arguments | launch.compiler_options
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, **named)
    options, signature, constants, attributes = kernel._pack_args(backend, named, bound, specialization, options)
    key = (kernel.__name__, arch, str(signature), str(constants), str(attributes), str(options))
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return CompilerInput(key, source(kernel, signature, constants, attributes), options.__dict__)


def compile_launch(launch: Launch, arch: str, *, listed: bool = True) -> CompiledLaunch:
    """Compiles the kernel of a launch for an architecture.

    Without `listed` the code is not disassembled, so that only its registers and its stack are known.
    """
    _, source, options = compiler_input_of(launch, arch)
    compiled = triton.compile(source, target=gpu_target(arch), options=options)
    code = disassemble(compiled.asm["cubin"], listed=listed) if "cubin" in compiled.asm else None
    static = CHIPS[arch].static_shared_bytes if arch in CHIPS else 0
    return CompiledLaunch(
        launch, compiled.metadata.shared + static, getattr(compiled.metadata, "tmem_size", 0) or 0, code
    )


def compile_once(launch: Launch, arch: str, done: dict[tuple[str, ...], CompiledLaunch]) -> CompiledLaunch:
    """The compiled launch; a kernel that is among those that are done is not compiled again."""
    key = compiler_input_of(launch, arch).key
    if key not in done:
        done[key] = compile_launch(launch, arch)
    return done[key]._replace(launch=launch)


def programs_per_processor(compiled: CompiledLaunch, chip: ProcessorLimits) -> int:
    """The number of programs that fit on one multiprocessor at once.

    Registers go to warps in units of 256, and warps to the four quarters of the processor.
    """
    warps = compiled.launch.num_warps
    per_warp = -(-compiled.require_code().num_registers * 32 // 256) * 256
    limits = [
        _REGISTERS // 4 // per_warp * 4 // warps,
        chip.shared_bytes // (-(-(compiled.shared_bytes - chip.static_shared_bytes + _KB) // 128) * 128),
        chip.max_threads // (32 * warps),
        chip.max_programs,
    ]
    if compiled.tensor_memory_columns:
        limits.append(_TENSOR_MEMORY // compiled.tensor_memory_columns)
    return min(limits)
