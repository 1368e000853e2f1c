"""Sums of per-program partials in a fixed order, in place of floating-point atomics: two runs give the same bits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import Launch, Traffic


@triton.jit
def store_moments(partials_ptr, program, count, mean, second, offs_c, mask, C):
    """A program's moments record (see ``norms.py``); ``offs_c`` are the channels of this block."""
    record = partials_ptr + program.to(tl.int64) * (1 + 2 * C)
    tl.store(record + tl.zeros_like(offs_c), tl.zeros_like(mean) + count, mask=offs_c == 0)
    tl.store(record + 1 + offs_c, mean, mask=mask)
    tl.store(record + 1 + C + offs_c, second, mask=mask)


@triton.jit(do_not_specialize=["P", "R", "C"])
def _sum_partials_kernel(partials_ptr, out_ptr, P, R, C, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    # A program owns BLOCK_N of the R x C sums and walks over the partials, which it adds in fp64.
    offs_p = tl.arange(0, BLOCK_P)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < R * C
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float64)
    for p in range(0, P, BLOCK_P):
        offs = (p + offs_p).to(tl.int64)[:, None] * R * C + offs_n[None, :]
        mask = (p + offs_p < P)[:, None] & mask_n[None, :]
        total += tl.load(partials_ptr + offs, mask=mask, other=0.0).to(tl.float64)
    out = tl.sum(total, axis=0)
    if out_ptr.dtype.element_ty != tl.float64:
        out = out.to(tl.float32).to(out_ptr.dtype.element_ty)  # the interpreter has no fp64 to bf16
    tl.store(out_ptr + (offs_n % C) * R + offs_n // C, out, mask=mask_n)


def partial_blocks(P: int) -> dict[str, int]:
    """BLOCK_P partials by BLOCK_N numbers a program, by name: as tall as P, up to a limit.

    P is in the thousands where the numbers are few, and the walk over it is serial.
    """
    BLOCK_P = next(block for block in (4, 16, 64, 256) if block >= min(P, 256))
    return dict(BLOCK_P=BLOCK_P, BLOCK_N=2048 // BLOCK_P)


def sum_partials_launch(partials: Tensor, out: Tensor) -> Launch:
    """Sum ``partials [P, R, C]`` (fp32) over P into ``out``, C filters of R numbers each in memory."""
    P, R, C = partials.shape
    blocks = partial_blocks(P)
    arguments = dict(partials_ptr=partials, out_ptr=out, P=P, R=R, C=C, **blocks)
    return Launch(_sum_partials_kernel, (common.cdiv(R * C, blocks["BLOCK_N"]),), arguments, num_warps=4)


def sum_partials_bytes(partials: Tensor, out: Tensor) -> Traffic:
    """Bytes of ``sum_partials_launch``: each partial is read once, each sum written once."""
    read, written = partials.nbytes, out.nbytes
    return Traffic(read, written, read, written)


def sum_partials(partials: Tensor, like: Tensor) -> Tensor:
    """Sums of ``partials [P, R, C]`` (fp32) over P, in fp64 and in an order that depends on P alone.

    The result has the type, shape and strides of ``like``, a weight of C filters with R numbers each.
    """
    out = common.allocate_like(like)
    sum_partials_launch(partials, out).run(partials.device)
    return out
