"""Inverted residual at inference, the operation: what torch sees of the passes in ``block_inference_passes.py``.

It has no gradient: a block that trains, or that passes gradients on, is ``inverted_residual.py``'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import common, measured, reference
from .block_inference_passes import inverted_residual_launches
from .common import cdiv
from .pack import PackedBlock


def _new_output(x: Tensor, c_out: int, stride: int) -> Tensor:
    N, _, H, W = x.shape
    return common.allocate((N, c_out, cdiv(H, stride), cdiv(W, stride)), x)


@torch.library.custom_op("mnv2::inverted_residual_inference", mutates_args=())
def _inverted_residual_inference(
    x: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    stride: int,
    residual: bool,
    padding: str,
    relu6_input: bool,
) -> Tensor:
    packed = PackedBlock(expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias)
    y = _new_output(x, packed.c_out, stride)
    for launch in inverted_residual_launches(x, packed, y, stride, residual, padding, relu6_input=relu6_input):
        launch.run(x.device)
    return y


@_inverted_residual_inference.register_fake
def _(
    x: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    stride: int,
    residual: bool,
    padding: str,
    relu6_input: bool,
) -> Tensor:
    return _new_output(x, project_weight.shape[0], stride)


def _no_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("inverted_residual_inference has no gradient")


_inverted_residual_inference.register_autograd(_no_backward)  # for exported programs, which hold the operation


def unsupported(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels can't run on an input of ``shape [N, c_in, H, W]``, or None."""
    if problem := common.unsupported_device(device):
        return problem
    if dtype not in common.DTYPES:
        return f"expected float16, bfloat16 or float32, got {dtype}"
    N, _, H, W = shape
    if N * H * W >= 2**31:
        return f"expected fewer than 2^31 pixels, got shape {shape}"
    return None


def run_kernels(x: Tensor, packed: PackedBlock, stride: int, residual: bool, padding: str, relu6_input: bool) -> Tensor:
    """``inverted_residual_inference`` by the kernels, for arguments that have been checked."""
    return _inverted_residual_inference(x, *packed, stride, residual, padding, relu6_input)


def refuse_gradient(operation: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError where autograd would want a gradient of ``operation`` on these tensors."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise NotImplementedError(
            f"{operation} has no gradient: run it under torch.no_grad() or torch.inference_mode(), "
            "or train the network before it is folded"
        )


def why_torch(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, backend: str, op: str, **sizes: int
) -> str | None:
    """Why torch runs an input of ``shape [N, c_in, H, W]`` where ``backend`` is asked for, or None.

    ``op`` and its ``sizes`` beside those of the input are what its paths were measured by.

    Raises:
        ValueError: ``backend`` is "triton", and the kernels can't.
    """
    why = common.why_torch(backend, device, lambda: unsupported(shape, dtype, device), "x: ")
    if why is None and backend == "auto" and dtype == torch.float32 and not common.tf32_allowed():
        return "IEEE fp32 has no tensor cores"  # hundreds of instructions an element
    if why is None and backend == "auto":
        _, c_in, H, W = shape
        return measured.why_torch(op, device, dtype, c_in=c_in, H=H, W=W, **sizes)
    return why


def why_torch_block(shape: tuple[int, ...], packed: PackedBlock, stride: int, backend: str) -> str | None:
    """``why_torch`` of a block."""
    sizes = dict(c_mid=packed.c_mid, c_out=packed.c_out, stride=stride)
    return why_torch(shape, packed.dtype, packed.device, backend, "inference block", **sizes)


def inverted_residual_inference(
    x: Tensor,
    packed: PackedBlock,
    *,
    stride: int,
    residual: bool,
    padding: str = "symmetric",
    relu6_input: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Inverted residual with folded BatchNorm: expand 1x1, ReLU6, depthwise 3x3, ReLU6, project 1x1, perhaps + x.

    Args:
        x: ``[N, c_in, H, W]`` in channels_last, of any size and of the pack's type and device.
        packed: the block's weights, from ``pack_inverted_residual``.
        stride: 1 or 2, of the depthwise convolution.
        residual: add ``x`` to the result; needs stride 1 and c_in equal to c_out.
        padding: "symmetric" or TensorFlow's "same", as in ``depthwise_conv2d``.
        relu6_input: x is a convolution's output that ReLU6 is yet to be applied to, which is done as it is read; for
            expand ratio 1 alone.
        backend: "triton" runs the kernels or says why it can't; "torch" runs torch's convolutions; "auto" runs the
            kernels on NVIDIA GPUs from compute capability 8.0 on, fp32 only where torch's convolutions may be TF32
            (``torch.backends.cudnn``), and torch's convolutions elsewhere, and where ``python -m bench.tune`` has
            measured them to be faster on this device.

    Returns:
        ``[N, c_out, ceil(H / stride), ceil(W / stride)]`` in channels_last, in x's type. Autocast changes nothing.

    NaN: the clamp of the kernels makes an expanded or depthwise value of NaN 0, where torch's keeps it.

    Raises:
        TypeError: x isn't of the pack's type.
        ValueError: shapes, layout, devices, stride, residual or padding make no such block, or ``backend="triton"``
            can't run it; the message names the argument.
        NotImplementedError: a gradient is asked for.

    Source: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", table 1.
    """
    _check(x, packed, stride, residual, padding, relu6_input, backend)
    if why_torch_block(tuple(x.shape), packed, stride, backend) is None:
        return run_kernels(x, packed, stride, residual, padding, relu6_input)
    return reference.inverted_residual_inference(
        x, packed, stride=stride, residual=residual, padding=padding, relu6_input=relu6_input
    )


def _check(
    x: Tensor, packed: PackedBlock, stride: int, residual: bool, padding: str, relu6_input: bool, backend: str
) -> None:
    """Raise where no backend could run."""
    common.check_nhwc("x", x)
    common.check_padding(padding)
    common.check_choice("backend", backend, common.BACKENDS)
    if not isinstance(packed, PackedBlock):
        raise TypeError(f"packed: expected what pack_inverted_residual returns, got {type(packed).__name__}")
    common.check_stride(stride)
    if x.dtype != packed.dtype:
        raise TypeError(f"x: expected the pack's type {packed.dtype}, got {x.dtype}")
    if x.device != packed.device:
        raise ValueError(f"x: expected the pack's device {packed.device}, got {x.device}")
    if x.shape[1] != packed.c_in:
        raise ValueError(f"x: expected {packed.c_in} channels, got shape {tuple(x.shape)}")
    common.check_residual(residual, stride, packed.c_in, packed.c_out)
    if relu6_input and packed.expand_weight is not None:
        raise ValueError("relu6_input: expected False for a block with an expansion, got True")
    refuse_gradient("inverted_residual_inference", x, *packed)
