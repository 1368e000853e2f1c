"""Weights of an inverted residual, BatchNorm folded, as the inference kernels read them.

ReLU6 is a clamp to [0, 6]. With every expanded and depthwise value held at a sixth of itself it is a clamp to [0, 1],
which the hardware does inside an addition. So the expand weight and bias, and the depthwise bias, are divided by 6, and
the project weight multiplied; without an expansion the depthwise weight carries the division. The factors go in before
the one rounding to the type of the activations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .common import DTYPES


class PackedBlock(NamedTuple):
    """What ``pack_inverted_residual`` makes; ``inverted_residual_inference`` takes it.

    ``expand_weight [c_mid, c_in]`` and ``project_weight [c_out, c_mid]`` have the type of the activations,
    ``depthwise_weight [9, c_mid]`` and the biases ``[c_mid], [c_mid], [c_out]`` are fp32; all contiguous, and scaled.
    Without an expansion ``expand_weight`` and ``expand_bias`` are None.
    """

    expand_weight: Tensor | None
    expand_bias: Tensor | None
    depthwise_weight: Tensor
    depthwise_bias: Tensor
    project_weight: Tensor
    project_bias: Tensor

    @property
    def c_in(self) -> int:
        """Channels of the input."""
        return self.c_mid if self.expand_weight is None else self.expand_weight.shape[1]

    @property
    def c_mid(self) -> int:
        """Channels of the depthwise convolution."""
        return self.project_weight.shape[1]

    @property
    def c_out(self) -> int:
        """Channels of the output."""
        return self.project_weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the activations."""
        return self.project_weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.project_weight.device

    def to(self, device: torch.device | str) -> PackedBlock:
        """The same on ``device``."""
        return PackedBlock._make(None if tensor is None else tensor.to(device) for tensor in self)


def pack_inverted_residual(
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    *,
    dtype: torch.dtype,
) -> PackedBlock:
    """Scale, transpose and round the folded weights of a block, once.

    Args:
        expand_weight: ``[c_mid, c_in, 1, 1]``, or None with ``expand_bias`` for expand ratio 1, where c_mid is c_in.
        expand_bias: ``[c_mid]``.
        depthwise_weight: ``[c_mid, 1, 3, 3]``.
        depthwise_bias: ``[c_mid]``.
        project_weight: ``[c_out, c_mid, 1, 1]``.
        project_bias: ``[c_out]``.
        dtype: of the activations: fp16, bf16 or fp32.

    Weights may have any floating-point type, each its own, and any layout; they are best given unrounded.

    Raises:
        TypeError: an argument is no floating-point tensor, or ``dtype`` is none of the three.
        ValueError: shapes or devices don't go together, or a weight leaves the range of ``dtype``; the message names
            the argument.
    """
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if (expand_weight is None) != (expand_bias is None):
        raise ValueError("expand_weight, expand_bias: expected both or neither, got one of them")
    weights = dict(
        expand_weight=expand_weight,
        expand_bias=expand_bias,
        depthwise_weight=depthwise_weight,
        depthwise_bias=depthwise_bias,
        project_weight=project_weight,
        project_bias=project_bias,
    )
    given = {name: value for name, value in weights.items() if value is not None}
    _check(given)
    exact = {name: value.detach().double() for name, value in given.items()}
    c_out, c_mid = exact["project_weight"].shape[:2]
    taps = exact["depthwise_weight"].view(c_mid, 9).t()
    scaled = dict(
        expand_weight=exact["expand_weight"].view(c_mid, -1) / 6 if "expand_weight" in exact else None,
        expand_bias=exact["expand_bias"] / 6 if "expand_bias" in exact else None,
        depthwise_weight=taps if "expand_weight" in exact else taps / 6,
        depthwise_bias=exact["depthwise_bias"] / 6,
        project_weight=exact["project_weight"].view(c_out, c_mid) * 6,
        project_bias=exact["project_bias"],
    )
    return PackedBlock._make(_rounded(name, scaled[name], dtype) for name in PackedBlock._fields)


def _rounded(name: str, value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if value is None:
        return None
    out = value.to(dtype if name in ("expand_weight", "project_weight") else torch.float32).contiguous()
    if not out.isfinite().all():
        worst = value.abs().max().item()
        raise ValueError(f"{name}: expected finite numbers in the range of {out.dtype}, got {worst:g} once scaled")
    return out


def _check(given: dict[str, Tensor]) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
        device = given["project_weight"].device
        if value.device != device:
            raise ValueError(f"{name}: expected project_weight's device {device}, got {value.device}")
    project = given["project_weight"]
    if project.dim() != 4 or project.shape[2:] != (1, 1) or 0 in project.shape:
        raise ValueError(f"project_weight: expected [c_out, c_mid, 1, 1], got shape {tuple(project.shape)}")
    c_out, c_mid = project.shape[:2]
    shapes: dict[str, tuple[int, ...]] = {
        "expand_bias": (c_mid,),
        "depthwise_weight": (c_mid, 1, 3, 3),
        "depthwise_bias": (c_mid,),
        "project_bias": (c_out,),
    }
    if (expand := given.get("expand_weight")) is not None:
        c_in = expand.shape[1] if expand.dim() > 1 else 0
        shapes["expand_weight"] = (c_mid, max(c_in, 1), 1, 1)
    for name, shape in shapes.items():
        if name in given and tuple(given[name].shape) != shape:
            wanted = ", ".join(map(str, shape))
            raise ValueError(
                f"{name}: expected [{wanted}] beside project_weight {tuple(project.shape)}, "
                f"got shape {tuple(given[name].shape)}"
            )
