"""`python -m benchmarks.training.step_ratio`: a training step of the upcycled UNet beside that of the stock UNet.

All contenders get the same latents, text and targets, and make the same step by the trainer's own `TrainingState`:
forward pass, loss, backward pass, norm of the gradients, clipping and AdamW. The stock UNet trains its feed-forward
networks, as fine-tuning for one task would; in a second variant it also trains the norms before them and the input
convolution, which the upcycled UNet has for each task. The upcycled UNet starts as the same function, which is asserted
before timing.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

import mtu
from benchmarks.harness.arguments import names_parser, parse_count, parse_counts, parse_rounds
from benchmarks.harness.commands import (
    CommandContext,
    add_common_options,
    exit_on_usage_errors,
    make_parser,
    parse_arguments,
    start_command,
)
from benchmarks.harness.contenders import Contender
from benchmarks.harness.correctness import WrongResult
from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.recording import Figures, Log, record_groups
from benchmarks.harness.report import Target, make_ratios, pair_rows, report_lines
from benchmarks.harness.rows import TIMES, CsvTable, Row
from benchmarks.harness.timing import Call, time_interleaved, warm_up
from benchmarks.harness.workloads import Entry, Group, Setting, Workload
from benchmarks.models.unet_models import (
    LATENT_FACTOR,
    MODELS,
    TASKS,
    Batch,
    UNetFamily,
    default_num_experts,
    draw_batch,
    select_rows,
)
from mtu.training.distributed import gradient_norm
from mtu.training.objective import Objective, PartialLoss
from mtu.training.trainer_config import TrainerConfig
from mtu.training.training_state import TrainingState

TABLE = CsvTable(
    "benchmarks.training.step_ratio",
    ("group", "contender", "device", "model", "size", "B", "dtype", *TIMES, "rounds"),
    time_format=".0f",
)
FILE = "training_step_{device}.csv"
UPCYCLED, STOCK, STOCK_WITH_NORMS = "mtu", "stock", "stock-norms"
# Steps are seconds on a CPU, and other processes disturb some of them.
_ROUNDS = 10
# The weights must not leave the range of the first steps while they are timed.
_LEARNING_RATE = 1e-7
# The outputs of two float32 models that compute one function in another order differ by this at the most.
_LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}


class NoiseObjective(Objective):
    """The mean squared error of a UNet's prediction on one batch.

    Args:
        unet: the UNet.
        inputs: the arguments of its call.
        target: what it should predict.
        autocast_dtype: the compute dtype; None: that of the parameters.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        inputs: Mapping[str, Any],
        target: Tensor,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self._inputs, self._target, self._autocast_dtype = dict(inputs), target, autocast_dtype

    def forward(self, batch: Any = None) -> PartialLoss:
        """The loss of the batch."""
        device = self._target.device.type
        with torch.autocast(device, self._autocast_dtype, enabled=self._autocast_dtype is not None):
            predicted = self.unet(**self._inputs, return_dict=False)[0]
        return PartialLoss(F.mse_loss(predicted.float(), self._target))

    def row_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters with one row per task."""
        if not isinstance(self.unet, mtu.MTUUNet2DConditionModel):
            return []
        modules = self.unet.per_task_modules_by_name().values()
        return [parameter for module in modules for parameter in module.parameters()]

    def trained_rows(self, step: int) -> list[int]:
        """The tasks of the batch."""
        task_ids = self._inputs.get("task_ids")
        return [] if task_ids is None else sorted(set(task_ids.tolist()))


def build_upcycled(family: UNetFamily) -> UNet2DConditionModel:
    """The original upcycled to four tasks, with routers."""
    unet = family.new_upcycled(Setting(default_num_experts(family.model)), "auto", routers=True)
    unet.freeze_stock_parameters_()
    return unet


def build_stock(family: UNetFamily, *, with_norms: bool) -> UNet2DConditionModel:
    """The original, which trains its feed-forward networks, and perhaps the layers that tasks have of their own."""
    unet = family.new_original()
    for name, parameter in unet.named_parameters():
        of_tasks = ".norm3." in name or name.startswith("conv_in.")
        parameter.requires_grad_(".ff.net." in name or (with_norms and of_tasks))
    return unet


CONTENDERS: dict[str, Contender] = {
    UPCYCLED: Contender("the upcycled UNet: experts, routers, task norms and input convolutions", build_upcycled),
    STOCK: Contender("the stock UNet: feed-forward networks", functools.partial(build_stock, with_norms=False)),
    STOCK_WITH_NORMS: Contender(
        "the stock UNet: feed-forward networks, the norms before them, the input convolution",
        functools.partial(build_stock, with_norms=True),
    ),
}


def _over(other: str) -> Callable[[Sequence[Row], str], list]:
    return lambda rows, tested: make_ratios(pair_rows(rows, tested, other, lambda setting: setting))


_TARGETS = (
    Target("step / of fine-tuning the same FFNs of the stock UNet", 1.05, _over(STOCK)),
    Target("step / of fine-tuning them with their norms and conv_in", None, _over(STOCK_WITH_NORMS)),
)


def make_objective(unet: UNet2DConditionModel, batch: Batch, dtype: str) -> NoiseObjective:
    """The objective of a contender; the stock UNet takes the latents alone."""
    rows = range(len(batch.task_of_row))
    inputs = select_rows(batch, rows, unet.conv_in.in_channels)
    if isinstance(unet, mtu.MTUUNet2DConditionModel):
        inputs["task_ids"] = torch.tensor(batch.task_of_row, device=inputs["sample"].device)
    target = inputs["sample"][:, :4].flip(0)
    return NoiseObjective(unet, inputs, target, None if dtype == "fp32" else DTYPES[dtype]).train()


def make_step(objective: NoiseObjective) -> Call:
    """A step of training, as the trainer makes it."""
    config = TrainerConfig(steps=1, learning_rate=_LEARNING_RATE)
    state = TrainingState(objective, config)

    def step() -> None:
        objective(None).loss.backward()
        state.take_gradients()
        state.optimizer_step(gradient_norm(list(state.gradients().values())))

    return step


def check_losses(losses: Mapping[str, float], dtype: str) -> None:
    """Raises WrongResult unless all contenders start from the same loss."""
    expected = losses[STOCK]
    for name, loss in losses.items():
        if not abs(loss - expected) <= _LOSS_TOLERANCE[dtype] * abs(expected):
            raise WrongResult(f"{name} must start from the loss of {STOCK}, {expected:.6g}, but got {loss:.6g}.")


def measure_group(group: Group, log: Log, family: UNetFamily, rounds: int, checkpointing: bool) -> Figures:
    """Yields the contenders of one batch with their times, which are interleaved."""
    workload = group.workload
    # Parameters are float32, and bf16 stands for autocast.
    batch = draw_batch(workload._replace(dtype="fp32"), family.device, TASKS)
    objectives = {}
    for entry in group.entries:
        unet = CONTENDERS[entry.contender].implementation(family)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        objectives[entry.contender] = make_objective(unet, batch, workload.dtype)
    with torch.no_grad():
        check_losses({name: objective(None).loss.item() for name, objective in objectives.items()}, workload.dtype)
    calls = [[make_step(objective)] for objective in objectives.values()]
    for call in calls:
        warm_up(call, family.device)
    update = functools.partial(log.bar.update, 1)
    timings = time_interleaved(calls, [False] * len(calls), family.device, 0.0, rounds, update)
    for entry, timing in zip(group.entries, timings, strict=True):
        yield entry, timing._asdict()


def measure(context: CommandContext, options: Any) -> list[Row]:
    """Measures all groups: weights are float32, and each dtype is that of autocast."""
    family = UNetFamily(options.model, "fp32", context.device)
    entries = tuple(Entry(name, Setting()) for name in options.contenders)
    workloads = [
        Workload(B=B, dtype=dtype, direction="forward+backward", model=options.model, size=options.size)
        for dtype in options.dtypes
        for B in options.batches
    ]
    run = functools.partial(
        measure_group, family=family, rounds=options.runs, checkpointing=options.gradient_checkpointing
    )
    rows, _ = record_groups(context, [Group(workload, entries) for workload in workloads], run, unit="step")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = make_parser(TABLE.module, "A training step of the upcycled UNet beside that of the stock one.", CONTENDERS)
    add_common_options(parser, FILE.format(device="DEVICE"), dtype=False)
    add = parser.add_argument
    add("--model", choices=tuple(MODELS), default="sd15", help="(default: %(default)s)")
    add("--size", type=parse_count, default=256, help="edge of the images in pixels (default: %(default)s)")
    add("--batches", type=parse_counts, default=(1, 4), help="examples of a step (default: 1,4)")
    add("--dtypes", type=names_parser(("fp32", "bf16"), "dtype"), default=("bf16",), help="(default: bf16)")
    names = names_parser(CONTENDERS, "contender")
    add("--contenders", type=names, default=tuple(CONTENDERS), help="(default: all)")
    add("--runs", type=parse_rounds, default=_ROUNDS, help="timed steps of each contender (default: %(default)s)")
    add("--gradient-checkpointing", action="store_true", help="compute blocks again in the backward pass")
    add("--quick", action="store_true", help="tiny steps of the same code, which say nothing about the model's")
    argv, options = parse_arguments(parser, argv)
    if options.quick:
        options.model, options.size, options.batches, options.runs = "tiny", 64, (4,), 2
    if options.size % LATENT_FACTOR:
        parser.error(f"--size must be a multiple of {LATENT_FACTOR} pixels, got {options.size}.")
    with exit_on_usage_errors(parser):
        context = start_command(TABLE, options, argv, FILE)
    rows = measure(context, options)
    targets = {context.device.type: _TARGETS}
    print("\n".join(report_lines(rows, targets, {context.device.type: UPCYCLED})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
