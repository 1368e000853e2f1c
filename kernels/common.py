"""Legend of names, shared types and input checks.

====================  ==================================================================================
N, H, W, C            batch, height, width, channels; activations are NHWC, which torch calls channels_last
c_in, c_mid, c_out    the three widths of an inverted residual: input, expanded, output
X, E, A, D, B, P, Y   its tensors: input, expanded, relu6(norm(E)), depthwise output, relu6(norm(D)),
                      projected, output (see README.md for the formulas)
====================  ==================================================================================
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PADDINGS = ("symmetric", "same")


class BatchNorm(NamedTuple):
    """What a BatchNorm over C channels is to an operation: its tensors and how they are used.

    ``weight, bias, running_mean, running_var`` are ``[C]`` in fp32 (or fp64), ``num_batches_tracked`` is an int64
    scalar; any of them may be None as in ``nn.BatchNorm2d(affine=False)`` or ``track_running_stats=False``.
    With ``batch_stats`` the batch's own mean and biased variance normalise, and the running statistics, where there
    are any, are updated in place in torch's convention: ``r <- (1 - momentum) r + momentum * batch`` with the unbiased
    variance, ``momentum=None`` meaning the cumulative average. Without it the running statistics are constants.

    Source: Ioffe and Szegedy 2015, algorithm 1.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    batch_stats: bool
    momentum: float | None = 0.1
    eps: float = 1e-5


def check_padding(padding: str) -> None:
    """Raise ValueError unless ``padding`` is one of ``PADDINGS``."""
    if padding not in PADDINGS:
        raise ValueError(f"padding: expected one of {PADDINGS}, got {padding!r}")


def check_nhwc(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is a floating-point ``[N, C, H, W]`` tensor whose memory is NHWC (``channels_last``)."""
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions [N, C, H, W], got shape {tuple(x.shape)}")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{name}: expected channels_last memory (NHWC), got strides {x.stride()} for shape {tuple(x.shape)}; "
            "convert once with x.contiguous(memory_format=torch.channels_last)"
        )
