"""What must hold of a training block's arguments for any backend; errors name argument, expectation and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from . import common
from .common import BatchNorm, cdiv

STATISTICS = BatchNorm._fields[:4]  # of C numbers each
LAYOUTS = {
    "expand_weight": "[c_mid, c_in, 1, 1]",
    "depthwise_weight": "[c_mid, 1, 3, 3]",
    "project_weight": "[c_out, c_mid, 1, 1]",
}


def check_block(
    x: Tensor,
    w1: Tensor | None,
    wd: Tensor,
    w2: Tensor,
    norms: tuple[BatchNorm | None, BatchNorm, BatchNorm],
    stride: int,
    residual: bool,
    padding: str,
) -> None:
    """Raise TypeError or ValueError where no backend could run."""
    common.check_nhwc("x", x)
    common.check_padding(padding)
    common.check_stride(stride)
    if (w1 is None) != (norms[0] is None):
        raise ValueError("expand_weight, expand_norm: expected both or neither, got one of them")
    _check_weights(x, w1, wd, w2)
    c_mid, c_out = wd.shape[0], w2.shape[0]
    common.check_residual(residual, stride, x.shape[1], c_out)
    N, _, H, W = x.shape
    outputs = N * cdiv(H, stride) * cdiv(W, stride)
    if norms[0] is not None:
        _check_norm("expand_norm", norms[0], c_mid, x.device, N * H * W)
    _check_norm("depthwise_norm", norms[1], c_mid, x.device, outputs)
    _check_norm("project_norm", norms[2], c_out, x.device, outputs)


def _check_weights(x: Tensor, w1: Tensor | None, wd: Tensor, w2: Tensor) -> None:
    weights = {"depthwise_weight": wd, "project_weight": w2}
    if w1 is not None:
        weights["expand_weight"] = w1
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(weight).__name__}")
        if not weight.is_floating_point() or (weight.dtype != x.dtype and common.autocast_dtype(x) is None):
            raise TypeError(f"{name}: expected x's type {x.dtype} (or autocast), got {weight.dtype}")
        if weight.dim() != 4 or 0 in weight.shape:
            got = f"got shape {tuple(weight.shape)}"
            raise ValueError(f"{name}: expected 4 dimensions {LAYOUTS[name]}, each of at least 1, {got}")
        if weight.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {weight.device}")
    c_in, c_mid, size = x.shape[1], wd.shape[0], wd.shape[2]
    if w1 is None and c_mid != c_in:
        raise ValueError(f"depthwise_weight: expected x's {c_in} channels where nothing expands, got {c_mid}")
    if wd.shape != (c_mid, 1, size, size) or size % 2 == 0:  # of other odd sizes it is torch's
        raise _misshapen("depthwise_weight", (c_mid, 1, 3, 3), wd, x)
    if w1 is not None and w1.shape != (c_mid, c_in, 1, 1):
        raise _misshapen("expand_weight", (c_mid, c_in, 1, 1), w1, x)
    if w2.shape[1:] != (c_mid, 1, 1):
        raise _misshapen("project_weight", (w2.shape[0], c_mid, 1, 1), w2, x)


def _misshapen(name: str, shape: tuple[int, ...], weight: Tensor, x: Tensor) -> ValueError:
    return ValueError(f"{name}: expected {list(shape)} beside x {tuple(x.shape)}, got {tuple(weight.shape)}")


def _check_norm(name: str, norm: BatchNorm, channels: int, device: torch.device, numbers: int) -> None:
    """Raise unless ``norm`` has a number for each of its channels in each tensor, and how they are used makes sense.

    ``numbers`` are those of a channel in the batch.
    """
    if not isinstance(norm, BatchNorm):
        made = "kernels.sync_batch_norm.batch_norm_of makes one of a module"
        raise TypeError(f"{name}: expected a kernels.BatchNorm ({made}), got {type(norm).__name__}")
    for field, tensor in zip(STATISTICS, norm[:4], strict=True):
        if tensor is not None:
            _check_statistic(name, field, tensor, channels, device)
    _, _, mean, var, batches, batch_stats, *_ = norm
    _check_options(name, norm)
    if mean is None or var is None:
        if not batch_stats:
            field = "running_mean" if mean is None else "running_var"
            raise ValueError(f"{name}: expected {field} where the batch's statistics aren't taken, got None")
        if mean is not var:
            raise ValueError(f"{name}: expected both running_mean and running_var or neither, got one of them")
    elif mean.requires_grad or var.requires_grad:
        field = "running_mean" if mean.requires_grad else "running_var"
        raise ValueError(f"{name}: expected {field} without a gradient, got one that requires it")
    if batches is not None:
        _check_count(name, batches, device)
    if batch_stats and numbers == 1 and not norm.group:
        raise ValueError(f"{name}: expected more than one number a channel to take statistics of, got one")


def _check_statistic(name: str, field: str, tensor: Tensor, channels: int, device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected {field} as a tensor or None, got {type(tensor).__name__}")
    if tensor.shape != (channels,) or not tensor.is_contiguous() or not tensor.is_floating_point():
        got = f"{tensor.dtype} of shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        raise ValueError(f"{name}: expected {field} as {channels} contiguous floating-point numbers, got {got}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected {field} on x's device {device}, got {tensor.device}")


def _check_options(name: str, norm: BatchNorm) -> None:
    batch_stats, momentum, eps, group = norm[5:]
    if type(batch_stats) is not bool:
        raise TypeError(f"{name}: expected batch_stats as True or False, got {batch_stats!r}")
    if momentum is not None:
        if not isinstance(momentum, float | int):
            raise TypeError(f"{name}: expected momentum as a number or None, got {momentum!r}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"{name}: expected momentum from 0 to 1, got {momentum!r}")
    if not isinstance(eps, float | int):
        raise TypeError(f"{name}: expected eps as a number, got {eps!r}")
    if not 0 <= eps < float("inf") or (eps == 0 and batch_stats):  # as torch has it
        raise ValueError(f"{name}: expected a positive eps, got {eps!r}")
    if not isinstance(group, str):
        raise TypeError(f"{name}: expected group as a name, got {group!r}")


def _check_count(name: str, batches: Tensor, device: torch.device) -> None:
    if not isinstance(batches, Tensor):
        raise TypeError(f"{name}: expected num_batches_tracked as a tensor or None, got {type(batches).__name__}")
    if batches.dtype != torch.int64 or batches.numel() != 1:
        got = f"{batches.dtype} of shape {tuple(batches.shape)}"
        raise ValueError(f"{name}: expected num_batches_tracked as one number of torch.int64, got {got}")
    if batches.device != device:
        raise ValueError(f"{name}: expected num_batches_tracked on x's device {device}, got {batches.device}")
