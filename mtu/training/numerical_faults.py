"""The search for what made a step not finite, and its description for the user."""

import math
from collections.abc import Mapping, Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from mtu.training.distributed import names_of_infinite_tensors
from mtu.training.objective import BatchPart, Objective, PartialLoss
from mtu.training.step_totals import StepTotals

__all__ = ["describe_fault"]

# So many examples are named. A longer list would hide the message.
_NAMED_EXAMPLES = 8


def describe_fault(
    accelerator: Accelerator,
    objective: Objective,
    losses: Sequence[tuple[BatchPart, PartialLoss]],
    totals: StepTotals,
    gradients: Mapping[str, Tensor],
) -> str:
    """Describe what is not finite in a step, and the examples that are at fault; all processes call this together.

    Args:
        accelerator: tells the processes.
        objective: names the examples.
        losses: the losses of the parts that this process computed.
        totals: the sums over all processes.
        gradients: the gradients, by the names of their parameters.

    Returns:
        A sentence without its full stop.
    """
    step = losses[0][0].step
    if not math.isfinite(totals.loss):
        fault = f"The loss of step {step} is {totals.loss}"
    else:
        wrong = names_of_infinite_tensors(gradients)
        others = f" and {len(wrong) - 1} other parameters" if len(wrong) > 1 else ""
        fault = (
            f"The gradient of step {step} is not finite in {wrong[0]}{others}"
            if wrong
            else f"The norm of the gradient of step {step} is {totals.norm}"
        )
    own = [_describe_examples(objective, part, partial) for part, partial in losses]
    at_fault, of_step = (gather_object([x for pair in own for x in pair[i]]) for i in (0, 1))
    if at_fault:
        return f"{fault}, because the loss of {_listed(at_fault)} is not finite"
    return f"{fault} with the examples {_listed(of_step)}" if of_step else fault


def _describe_examples(
    objective: Objective, part: BatchPart, partial: PartialLoss
) -> tuple[Sequence[str], Sequence[str]]:
    """The examples of a part whose loss is not finite, and all of its examples."""
    examples = objective.describe_examples(part)
    if partial.example_losses is None or len(partial.example_losses) != len(examples):
        return [], examples
    finite = partial.example_losses.isfinite().tolist()
    return [name for name, is_finite in zip(examples, finite, strict=True) if not is_finite], examples


def _listed(examples: Sequence[str]) -> str:
    more = len(examples) - _NAMED_EXAMPLES
    return "; ".join(examples[:_NAMED_EXAMPLES]) + (f"; and {more} more" if more > 0 else "")
