"""Weights as the passes of training multiply by them: scaled a channel, then rounded once to the activations' type."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import Launch, Traffic, cdiv

BLOCK = 1024


@triton.jit(do_not_specialize=["numbers", "c_in"])
def _scaled_kernel(w_ptr, factor_ptr, out_ptr, numbers, c_in, OF_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # OF_ROWS says whether a factor belongs to a row of W [numbers / c_in, c_in] or to a column.
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numbers
    channel = offs // c_in if OF_ROWS else offs % c_in
    factor = tl.load(factor_ptr + channel, mask=mask, other=0.0)
    w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, (w * factor).to(out_ptr.dtype.element_ty), mask=mask)


def scaled_launch(weight: Tensor, factor: Tensor, out: Tensor, *, rows: bool) -> Launch:
    """Multiply each row or column of ``weight [c_out, c_in]``, dense in memory, by its ``factor`` (fp32).

    The product is made in fp32 and rounded to the type of ``out``, of the weight's shape.
    """
    sizes = dict(numbers=weight.numel(), c_in=weight.shape[1], OF_ROWS=rows, BLOCK=BLOCK)
    arguments = dict(w_ptr=weight, factor_ptr=factor, out_ptr=out, **sizes)
    return Launch(_scaled_kernel, (cdiv(weight.numel(), BLOCK),), arguments, num_warps=4)


def scaled_bytes(weight: Tensor, factor: Tensor, out: Tensor, *, rows: bool) -> Traffic:
    """Bytes of ``scaled_launch``, whose programs request a factor for each number."""
    requested = weight.nbytes + weight.numel() * factor.element_size()
    return Traffic(weight.nbytes + factor.nbytes, out.nbytes, requested, out.nbytes)
