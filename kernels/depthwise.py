"""Depthwise 3x3 convolution, the operation: what torch sees of the passes in ``depthwise_passes.py``.

Saved for the backward: X only where w needs a gradient, and w. Where both gradients are needed they are one pass; where
only one is, only that is computed. Weight sums have a fixed order, so two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import common, measured, reference
from .common import Launch, cdiv
from .depthwise_passes import depthwise_bwd_launch, depthwise_fwd_launch
from .partials import sum_partials, sum_partials_launch

MAX_CHANNELS = 65535 * 16  # what a GPU's grid has in its second dimension, of the narrowest tile


def _new_output(x: Tensor, stride: int) -> Tensor:
    N, C, H, W = x.shape
    return common.allocate((N, C, cdiv(H, stride), cdiv(W, stride)), x)


@torch.library.custom_op("mnv2::depthwise_fwd", mutates_args=())
def depthwise_fwd(x: Tensor, weight: Tensor, stride: int, padding: str) -> Tensor:
    """Output ``[N, C, ceil(H / stride), ceil(W / stride)]`` of ``x [N, C, H, W]`` and ``weight [C, 1, 3, 3]``."""
    y = _new_output(x, stride)
    depthwise_fwd_launch(x, weight, y, stride, padding).run(x.device)
    return y


@torch.library.custom_op("mnv2::depthwise_input_grad", mutates_args=())
def depthwise_input_grad(dy: Tensor, weight: Tensor, H: int, W: int, stride: int, padding: str) -> Tensor:
    """Gradient of the input ``[N, C, H, W]``, in dY's type."""
    dx = common.allocate((*dy.shape[:2], H, W), dy)
    depthwise_bwd_launch(dy, None, weight, dx, stride, padding).run(dy.device)
    return dx


@torch.library.custom_op("mnv2::depthwise_weight_grad", mutates_args=())
def depthwise_weight_grad(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: str) -> Tensor:
    """Gradient of the weight ``[C, 1, 3, 3]``, in the weight's type."""
    launch = depthwise_bwd_launch(dy, x, weight, None, stride, padding)
    launch.run(dy.device)
    return sum_partials(launch.arguments["partials_ptr"], weight)


@torch.library.custom_op("mnv2::depthwise_grads", mutates_args=())
def depthwise_grads(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: str) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the weight, in one pass over dY and X."""
    dx = common.allocate(tuple(x.shape), dy)
    launch = depthwise_bwd_launch(dy, x, weight, dx, stride, padding)
    launch.run(dy.device)
    return dx, sum_partials(launch.arguments["partials_ptr"], weight)


@depthwise_fwd.register_fake
def _(x: Tensor, weight: Tensor, stride: int, padding: str) -> Tensor:
    return _new_output(x, stride)


@depthwise_input_grad.register_fake
def _(dy: Tensor, weight: Tensor, H: int, W: int, stride: int, padding: str) -> Tensor:
    return common.allocate((*dy.shape[:2], H, W), dy)


@depthwise_weight_grad.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: str) -> Tensor:
    return common.allocate_like(weight)


@depthwise_grads.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: str) -> tuple[Tensor, Tensor]:
    return common.allocate(tuple(x.shape), dy), common.allocate_like(weight)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "depthwise_conv2d: its gradients can't be differentiated again; take backend='torch' for second derivatives"
    )


for _op in (depthwise_input_grad, depthwise_weight_grad, depthwise_grads):
    _op.register_autograd(_no_double_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.stride, ctx.padding = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight = ctx.saved_tensors
    needs_dx, needs_dw = ctx.needs_input_grad[:2]
    dy = dy.contiguous(memory_format=torch.channels_last)  # autograd's to choose: sum() sends one number
    dx = dw = None
    if needs_dx and needs_dw:
        dx, dw = depthwise_grads(dy, x, weight, ctx.stride, ctx.padding)
    elif needs_dx:
        dx = depthwise_input_grad(dy, weight, *ctx.size, ctx.stride, ctx.padding)
    elif needs_dw:
        dw = depthwise_weight_grad(dy, x, weight, ctx.stride, ctx.padding)
    return dx, dw, None, None


depthwise_fwd.register_autograd(_backward, setup_context=_save)  # for exported programs, which hold the operation


class _DepthwiseConv2d(torch.autograd.Function):
    """The same, with less host time than through the operation's own registration."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: str) -> Tensor:
        y = depthwise_fwd(x, weight, stride, padding)
        _save(ctx, (x, weight, stride, padding), y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        return _backward(ctx, *grads)


def every_launch(x: Tensor, weight: Tensor, stride: int, padding: str, *, gradients: bool) -> list[Launch]:
    """One launch of each kernel that inputs of x's height, width and type take; batches of any size share them."""
    y = _new_output(x, stride)
    launches = [depthwise_fwd_launch(x, weight, y, stride, padding)]
    if gradients:
        backward = depthwise_bwd_launch(y, x, weight, common.allocate_like(x), stride, padding)
        launches += [backward, sum_partials_launch(backward.arguments["partials_ptr"], common.allocate_like(weight))]
    return launches


def unsupported(x: Tensor, weight: Tensor, stride: int = 1) -> str | None:
    """Why the kernels can't convolve ``x`` with ``weight``, naming the argument, or None if they can."""
    if problem := common.unsupported_device(x.device):
        return f"x: {problem}"
    dtype = common.autocast_dtype(x) or x.dtype
    if dtype not in common.DTYPES:
        return f"x: expected float16, bfloat16 or float32, got {dtype}"
    if problem := common.not_nhwc(x):
        return f"x: {problem}"
    if x.shape[1] > MAX_CHANNELS:
        return f"x: expected at most {MAX_CHANNELS} channels, got {x.shape[1]}"
    if weight.shape[2:] != (3, 3):
        return f"weight: expected a kernel of 3 x 3, got {weight.shape[2]} x {weight.shape[3]}"
    if not weight.is_contiguous():
        return f"weight: expected contiguous memory, got strides {weight.stride()} for shape {tuple(weight.shape)}"
    if stride not in (1, 2):
        return f"stride: expected 1 or 2, got {stride!r}"
    return None


def why_torch(x: Tensor, weight: Tensor, stride: int, backend: str) -> str | None:
    """Why torch convolves ``x`` where ``backend`` is asked for, or None; raises ValueError as ``runs_kernels``."""
    why = common.why_torch(backend, x.device, lambda: unsupported(x, weight, stride))
    if why is None and backend == "auto":
        _, C, H, W = x.shape
        gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        op, dtype = "depthwise training" if gradients else "depthwise", common.autocast_dtype(x) or x.dtype
        return measured.why_torch(op, x.device, dtype, C=C, H=H, W=W, stride=stride)
    return why


def runs_kernels(x: Tensor, weight: Tensor, stride: int, backend: str) -> bool:
    """Whether ``backend`` means the kernels here; raises ValueError where "triton" asks for what they can't run."""
    return why_torch(x, weight, stride, backend) is None


def depthwise_conv2d(
    x: Tensor, weight: Tensor, *, stride: int = 1, padding: str = "symmetric", backend: str = "auto"
) -> Tensor:
    """Depthwise 3x3 convolution without bias, of any size and batch and up to a million channels; differentiable once.

    Args:
        x: ``[N, C, H, W]`` in channels_last; fp16, bf16 or fp32. Under autocast it is cast to autocast's type.
        weight: ``[C, 1, 3, 3]``, contiguous, of x's type, or under autocast of any floating-point type: the kernel
            rounds it to x's type, and its gradient is returned in its own, never rounded to x's on the way.
        stride: 1 or 2.
        padding: "symmetric" puts one row and column of zeros on every side; "same" is TensorFlow's SAME, which at
            stride 2 and an even size puts none in front and one behind.
        backend: "triton" runs the kernels or says why it can't; "torch" runs torch's convolution; "auto" runs the
            kernels on NVIDIA GPUs from compute capability 8.0 on, and torch's convolution wherever "triton" would
            refuse (another layout, type, kernel size, stride or device), and where ``python -m bench.tune`` has
            measured it to be faster on this device.

    Returns:
        ``[N, C, ceil(H / stride), ceil(W / stride)]`` in channels_last, in x's type.

    Raises:
        TypeError: x is not floating-point, or weight's type is not x's outside autocast.
        ValueError: shapes, devices, stride or padding make no depthwise convolution, or ``backend="triton"`` can't
            run this one; the message names the argument.
        NotImplementedError: a gradient of a gradient is asked for.

    ``torch.func``'s transforms (vmap, grad, jvp) want ``backend="torch"``.

    Source: Chollet 2017, "Xception: Deep Learning with Depthwise Separable Convolutions"; the two gradients are those
    of any convolution (Dumoulin and Visin 2016, sections 2 and 4).
    """
    _check(x, weight, stride, padding, backend)
    if not runs_kernels(x, weight, stride, backend):
        return reference.depthwise_conv2d(x, weight, stride=stride, padding=padding)
    dtype = common.autocast_dtype(x)
    return _DepthwiseConv2d.apply(x if dtype is None else x.to(dtype), weight, stride, padding)


def _check(x: Tensor, weight: Tensor, stride: int, padding: str, backend: str) -> None:
    """Raise where no backend could run."""
    common.check_image("x", x)
    common.check_padding(padding)
    common.check_choice("backend", backend, common.BACKENDS)
    if type(stride) is not int or stride < 1:
        raise ValueError(f"stride: expected 1 or 2, got {stride!r}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor, got {type(weight).__name__}")
    C, shape = x.shape[1], tuple(weight.shape)
    if weight.dim() != 4 or shape[:2] != (C, 1) or shape[2] != shape[3] or shape[2] % 2 == 0:
        raise ValueError(f"weight: expected [{C}, 1, 3, 3], one filter for each channel of x, got shape {shape}")
    if weight.device != x.device:
        raise ValueError(f"weight: expected x's device {x.device}, got {weight.device}")
    if not weight.is_floating_point() or (weight.dtype != x.dtype and common.autocast_dtype(x) is None):
        raise TypeError(f"weight: expected x's type {x.dtype} (or autocast), got {weight.dtype}")
