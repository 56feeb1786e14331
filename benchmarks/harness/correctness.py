"""The check that a contender passes before it is timed: its result is compared with one of a wider dtype."""

import torch
from torch import Tensor


class WrongResult(AssertionError):
    """A contender does not compute the result of the reference."""


def check_close(label: str, actual: Tensor, user: Tensor, exact: Tensor, dtype: torch.dtype, ulp: float) -> None:
    """Asserts ``max|actual − exact| <= 2 · max|user − exact| + ulp · max|exact|``, and the dtype.

    Args:
        label: names the tensor in the error.
        actual: computed by the contender.
        user: computed by the code whose error sets the tolerance.
        exact: computed in a wider dtype.
        dtype: that `actual` must have.
        ulp: of the compute dtype.

    Raises:
        WrongResult: one sentence with the error and the tolerance.
    """
    error, allowed = _max_abs(actual - exact), 2 * _max_abs(user - exact) + ulp * _max_abs(exact)
    # Not "error > allowed", which NaN would pass.
    if actual.dtype != dtype or not error <= allowed:
        wide = str(exact.dtype).removeprefix("torch.")
        raise WrongResult(
            f"{label} must be {dtype} within {allowed:.3g} of {wide}, got {actual.dtype} off by {error:.3g}."
        )


def _max_abs(tensor: Tensor) -> float:
    return tensor.abs().max().item()
