"""Convolutions on a CPU by oneDNN as a compiled network has them: weights in its own layout, the clamp or sum inside.

torch's own convolution arranges the weights anew at each call, and ReLU6 is another pass. These operations are what
torch.compile with freezing calls; where this build of torch or the CPU lacks them, torch's convolution is taken.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference


@functools.cache
def _types() -> tuple[torch.dtype, ...]:
    """Types that it can convolve here."""
    ops = torch.ops.mkldnn
    names = ("_reorder_convolution_weight", "_convolution_pointwise")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(ops, name) for name in names):
        return ()
    half = [(torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported")]
    return (torch.float32, *(dtype for dtype, asks in half if hasattr(ops, asks) and getattr(ops, asks)()))


def serves(x: Tensor) -> bool:
    """Whether ``x`` can be convolved so; what is compiled, traced or exported keeps torch's own operations."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and x.device.type == "cpu" and x.dtype in _types() and len(x) > 0


@dataclass(frozen=True)
class Convolution:
    """A convolution whose weight is in oneDNN's layout, and the clamp to [0, ``ceiling``] behind it if there is one."""

    weight: Tensor
    bias: Tensor
    kernel: int
    stride: int
    groups: int
    padding: str
    ceiling: float | None

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor,
        x: Tensor,
        *,
        stride: int = 1,
        groups: int = 1,
        padding: str = "symmetric",
        ceiling: float | None = None,
    ) -> Convolution:
        """The convolution of ``reference.conv2d``, its weight arranged for inputs like ``x``; others are served too."""
        kernel = weight.shape[-1]
        zeros = 0 if padding == "same" and stride == 2 else (kernel - 1) // 2
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            weight, [zeros] * 2, [stride] * 2, [1, 1], groups, list(x.shape)
        )
        return cls(packed, bias, kernel, stride, groups, padding, ceiling)

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """Output for ``x`` in channels_last, and ``plus`` added to it."""
        if padded := self.padding == "same" and self.stride == 2:
            x = reference.pad_same(x, self.kernel, self.stride)
        zeros = 0 if padded else (self.kernel - 1) // 2
        how = ([zeros] * 2, [self.stride] * 2, [1, 1], self.groups)
        if plus is not None:
            return torch.ops.mkldnn._convolution_pointwise.binary(
                x, plus, self.weight, self.bias, *how, "add", 1.0, None, [], None
            )
        clamp = ("none", []) if self.ceiling is None else ("hardtanh", [0.0, self.ceiling])
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *how, *clamp, "")
