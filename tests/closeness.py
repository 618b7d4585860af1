"""The one way tests compare tensors."""

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """RMS(actual − expected) / RMS(expected), in float64; RMS(actual) when the expected is all zero."""
    assert actual.shape == expected.shape, f"{[*actual.shape]} against {[*expected.shape]}"
    difference = (actual.detach().double() - expected.detach().double()).pow(2).mean().sqrt()
    scale = expected.detach().double().pow(2).mean().sqrt()
    return float(difference / scale) if scale > 0 else float(difference)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Fail with ``what`` and the figure unless :func:`relative_error` is at most ``tolerance``."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: RMS-relative error {error:.3g} > {tolerance:.3g}"
