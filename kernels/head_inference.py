"""Head at inference: 1x1 convolution with folded BatchNorm, ReLU6 and the mean over all pixels, in one kernel.

    f[n, o] = mean over y, x of  relu6(X[n, y, x, :] . w[o, :] + b[o])

The convolution's output is the network's widest tensor and nothing reads it but the mean: it stays in registers. A
program owns one image and BLOCK_O channels, and walks over its pixels BLOCK_P at a time.

Precision: X and w in fp16, bf16 or fp32; bias, sums and the mean in fp32; f is rounded once, to X's type. In fp32 the
products are IEEE or TF32, as torch's convolutions are. The hardware's clamp turns NaN into 0.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, reference, tiles
from .block_inference import refuse_gradient, why_torch
from .common import Launch, Traffic, cdiv


@triton.jit(do_not_specialize=["pixels"])
def _conv_relu6_mean_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    f_ptr,
    pixels,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A program owns an image and BLOCK_O channels.
    n = tl.program_id(0).to(tl.int64)
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_o = offs_o < C_OUT
    bias = tl.load(b_ptr + offs_o, mask=mask_o, other=0.0)[None, :]
    total = tl.zeros([BLOCK_O], tl.float32)
    for p in range(0, pixels, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        mask_p = (offs_p < pixels)[:, None]
        x_ptrs = x_ptr + ((n * pixels + offs_p) * C_IN)[:, None]
        z = tl.zeros([BLOCK_P, BLOCK_O], tl.float32) + bias
        for k in range(0, C_IN, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < C_IN
            x = tl.load(x_ptrs + offs_k[None, :], mask=mask_p & mask_k[None, :], other=0.0)
            w_ptrs = w_ptr + offs_k[:, None] + offs_o[None, :].to(tl.int64) * C_IN
            w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_o[None, :], other=0.0)
            z = tl.dot(x, w, z, input_precision=PRECISION)
        total += tl.sum(tl.where(mask_p, tl.minimum(tl.maximum(z, 0.0), 6.0), 0.0), axis=0)
    tl.store(f_ptr + n * C_OUT + offs_o, (total / pixels).to(f_ptr.dtype.element_ty), mask=mask_o)


def conv_relu6_mean_launch(x: Tensor, weight: Tensor, bias: Tensor, f: Tensor) -> Launch:
    """Features ``f [N, c_out]`` of ``x [N, c_in, H, W]``, ``weight [c_out, c_in, 1, 1]`` and ``bias [c_out]`` (fp32).

    A program owns an image and BLOCK_O channels.
    """
    (N, c_in, H, W), c_out = x.shape, weight.shape[0]
    tile = tiles.head_tile(c_in, c_out, H * W, x.element_size(), common.limits(x.device))
    arguments = dict(
        x_ptr=x,
        w_ptr=weight,
        b_ptr=bias,
        f_ptr=f,
        pixels=H * W,
        C_IN=c_in,
        C_OUT=c_out,
        PRECISION=common.dot_precision(x),
        BLOCK_P=tile.BLOCK_P,
        BLOCK_O=tile.BLOCK_O,
        BLOCK_K=tile.BLOCK_K,
    )
    grid = (N, cdiv(c_out, tile.BLOCK_O))
    steps = cdiv(H * W, tile.BLOCK_P) * cdiv(c_in, tile.BLOCK_K)
    return Launch(_conv_relu6_mean_kernel, grid, arguments, tile.num_warps, tile.num_stages, tile.spill_bytes, steps)


def conv_relu6_mean_bytes(x: Tensor, weight: Tensor, bias: Tensor, f: Tensor) -> Traffic:
    """Bytes of ``conv_relu6_mean_launch``: the weights once for each walk over an image, X for each block of c_out."""
    launch = conv_relu6_mean_launch(x, weight, bias, f)
    walks = cdiv(launch.arguments["pixels"], launch.arguments["BLOCK_P"])
    loaded = x.nbytes * launch.grid[1] + x.shape[0] * (weight.nbytes * walks + bias.nbytes)
    return Traffic(x.nbytes + weight.nbytes + bias.nbytes, f.nbytes, loaded, f.nbytes)


@torch.library.custom_op("mnv2::conv_relu6_mean", mutates_args=())
def _conv_relu6_mean(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    f = common.allocate((x.shape[0], weight.shape[0]), x)
    conv_relu6_mean_launch(x, weight, bias, f).run(x.device)
    return f


@_conv_relu6_mean.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return common.allocate((x.shape[0], weight.shape[0]), x)


def _no_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("conv_relu6_mean has no gradient")


_conv_relu6_mean.register_autograd(_no_backward)  # for exported programs, which hold the operation


def why_torch_head(shape: tuple[int, ...], weight: Tensor, backend: str) -> str | None:
    """``why_torch`` of the head."""
    return why_torch(shape, weight.dtype, weight.device, backend, "head", c_out=weight.shape[0])


def conv_relu6_mean(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """Mean over all pixels of ``relu6(conv1x1(x))``, with folded BatchNorm.

    Args:
        x: ``[N, c_in, H, W]`` in channels_last, of any size.
        weight: ``[c_out, c_in, 1, 1]``, of x's type.
        bias: ``[c_out]`` in fp32.
        backend: as in ``inverted_residual_inference``.

    Returns:
        ``[N, c_out]`` in x's type. Autocast changes nothing. The kernel makes NaN 0, torch keeps it.

    Raises:
        TypeError: x, weight or bias isn't of its type.
        ValueError: shapes, layout or devices don't go together, or ``backend="triton"`` can't run it; the message names
            the argument.
        NotImplementedError: a gradient is asked for.
    """
    common.check_nhwc("x", x)
    common.check_choice("backend", backend, common.BACKENDS)
    if weight.dtype != x.dtype or bias.dtype != torch.float32:
        raise TypeError(f"weight, bias: expected {x.dtype} and torch.float32, got {weight.dtype} and {bias.dtype}")
    if weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 1, 1) or not weight.is_contiguous():
        raise ValueError(f"weight: expected contiguous [c_out, {x.shape[1]}, 1, 1], got shape {tuple(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got shape {tuple(bias.shape)}")
    if weight.device != x.device or bias.device != x.device:
        raise ValueError(f"weight, bias: expected x's device {x.device}, got {weight.device} and {bias.device}")
    refuse_gradient("conv_relu6_mean", x, weight, bias)
    if why_torch_head(tuple(x.shape), weight, backend) is None:
        return _conv_relu6_mean(x, weight, bias)
    return reference.conv_relu6_mean(x, weight, bias)
