"""Torch twins of the public operations, with the same arguments: cuDNN on a GPU, oneDNN on a CPU.

They are the truth of every parity test (in fp64), the baseline of every benchmark, and the path of every device that
the kernels do not serve. Precision is torch's own, autocast included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import BatchNorm, check_nhwc, check_padding, check_residual, check_stride, without_autocast
from .pack import PackedBlock
from .sync_batch_norm import sync_batch_norm


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    groups: int = 1,
    padding: str = "symmetric",
) -> Tensor:
    """Convolution of ``x [N, C, H, W]`` whose output is ``ceil(H / stride)`` by ``ceil(W / stride)``.

    ``weight`` is ``[C_out, C / groups, K, K]`` with K odd. ``padding="symmetric"`` puts (K - 1) / 2 zeros on every
    side (torchvision); ``padding="same"`` puts what TensorFlow's SAME does, the odd one at the bottom and right.
    """
    check_padding(padding)
    kernel = weight.shape[-1]
    if padding == "symmetric" or stride == 1:
        return F.conv2d(x, weight, bias, stride, (kernel - 1) // 2, 1, groups)
    return F.conv2d(pad_same(x, kernel, stride), weight, bias, stride, 0, 1, groups)


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """``x [N, C, H, W]`` with the zeros of TensorFlow's SAME around it."""
    rows, columns = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def depthwise_conv2d(x: Tensor, weight: Tensor, *, stride: int = 1, padding: str = "symmetric") -> Tensor:
    """Depthwise convolution of ``x [N, C, H, W]`` with ``weight [C, 1, K, K]``; padding as in ``conv2d``."""
    return conv2d(x, weight, stride=stride, groups=x.shape[1], padding=padding)


def batch_norm(x: Tensor, norm: BatchNorm) -> Tensor:
    """BatchNorm of ``x [N, C, H, W]`` over N, H and W; updates the running statistics where ``norm`` says so."""
    if norm.batch_stats and norm.group:
        return sync_batch_norm(x, norm)
    momentum = norm.momentum
    if norm.batch_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    return F.batch_norm(
        x,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.batch_stats,
        0.0 if momentum is None else momentum,
        norm.eps,
    )


def inverted_residual(
    x: Tensor,
    expand_weight: Tensor | None,
    expand_norm: BatchNorm | None,
    depthwise_weight: Tensor,
    depthwise_norm: BatchNorm,
    project_weight: Tensor,
    project_norm: BatchNorm,
    *,
    stride: int,
    residual: bool,
    padding: str = "symmetric",
    depthwise: Callable[..., Tensor] = depthwise_conv2d,
) -> Tensor:
    """Inverted residual: expand 1x1, depthwise 3x3, project 1x1, each with BatchNorm, ReLU6 after the first two.

    Args:
        x: ``[N, c_in, H, W]`` in channels_last.
        expand_weight: ``[c_mid, c_in, 1, 1]``, or None (with ``expand_norm``) for expand ratio 1, where c_mid is c_in.
        expand_norm: BatchNorm over c_mid channels.
        depthwise_weight: ``[c_mid, 1, 3, 3]``.
        depthwise_norm: BatchNorm over c_mid channels.
        project_weight: ``[c_out, c_mid, 1, 1]``.
        project_norm: BatchNorm over c_out channels.
        stride: 1 or 2, of the depthwise convolution.
        residual: add ``x`` to the result; needs stride 1 and c_in equal to c_out.
        padding: of the depthwise convolution, ``"symmetric"`` or TensorFlow's ``"same"``.
        depthwise: the operation of the depthwise convolution, with the arguments of ``depthwise_conv2d``.

    Returns:
        ``[N, c_out, ceil(H / stride), ceil(W / stride)]`` in channels_last.

    Source: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", table 1.
    """
    check_nhwc("x", x)
    check_padding(padding)
    check_stride(stride)
    if (expand_weight is None) != (expand_norm is None):
        raise ValueError("expand_weight, expand_norm: expected both or neither, got one of them")
    check_residual(residual, stride, x.shape[1], project_weight.shape[0])
    a = x
    if expand_weight is not None and expand_norm is not None:
        a = F.relu6(batch_norm(conv2d(x, expand_weight), expand_norm), inplace=True)
    d = depthwise(a, depthwise_weight, stride=stride, padding=padding)
    b = F.relu6(batch_norm(d, depthwise_norm), inplace=True)
    y = batch_norm(conv2d(b, project_weight), project_norm)
    return torch.add(x, y) if residual else y


class FoldedWeights(NamedTuple):
    """Weights of a packed block, still scaled, as torch's convolutions take them: ``unpacked`` makes it."""

    expand_weight: Tensor | None
    expand_bias: Tensor | None
    depthwise_weight: Tensor
    depthwise_bias: Tensor
    project_weight: Tensor
    project_bias: Tensor


def unpacked(packed: PackedBlock) -> FoldedWeights:
    """Weights of ``packed`` in torch's layouts, biases in the type of the activations too."""
    expand, project = packed.expand_weight, packed.project_weight
    return FoldedWeights(
        None if expand is None else expand[:, :, None, None],
        None if packed.expand_bias is None else packed.expand_bias.to(packed.dtype),
        packed.depthwise_weight.t().reshape(packed.c_mid, 1, 3, 3).to(packed.dtype),
        packed.depthwise_bias.to(packed.dtype),
        project[:, :, None, None],
        packed.project_bias.to(packed.dtype),
    )


def folded_block(x: Tensor, weights: FoldedWeights, *, stride: int, residual: bool, padding: str) -> Tensor:
    """Inverted residual of ``x [N, c_in, H, W]`` with folded BatchNorm, expanded values held at a sixth."""
    expand, expand_bias, depthwise, depthwise_bias, project, project_bias = weights
    a = x if expand is None else F.hardtanh_(conv2d(x, expand, expand_bias), 0.0, 1.0)
    d = conv2d(a, depthwise, depthwise_bias, stride=stride, groups=len(depthwise), padding=padding)
    y = conv2d(F.hardtanh_(d, 0.0, 1.0), project, project_bias)
    return y.add_(x) if residual else y


def inverted_residual_inference(
    x: Tensor,
    packed: PackedBlock,
    *,
    stride: int,
    residual: bool,
    padding: str = "symmetric",
    relu6_input: bool = False,
) -> Tensor:
    """Inverted residual with folded BatchNorm; arguments as in ``kernels.inverted_residual_inference``.

    Expanded and depthwise values are held at a sixth of themselves, as ``packed`` has it; NaN stays NaN.
    """
    check_nhwc("x", x)
    check_padding(padding)
    with without_autocast(x.device):
        x = F.relu6(x) if relu6_input else x
        return folded_block(x, unpacked(packed), stride=stride, residual=residual, padding=padding)


def conv_relu6_mean(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean over all pixels of ``relu6(conv1x1(x))``; arguments as in ``kernels.conv_relu6_mean``; NaN stays NaN."""
    check_nhwc("x", x)
    with without_autocast(x.device):
        return F.relu6(conv2d(x, weight, bias.to(x.dtype)), inplace=True).mean((2, 3))
