"""Statistics of a batch, the passes: moments of E = X W1 from the thin X, so that E is never stored.

    mean(E) = mean(X) W1,   var(E)_e = w_e^T Cov(X) w_e

so one pass over X gives its mean and its centred Gram matrix ``sum (x - mean) (x - mean)^T``, from which
``gram_norm.py`` has the statistics of every channel of E. Where columns of X nearly cancel in a channel
of E, that loses digits: about 2^-25 kappa of the variance, with

    kappa_e = |w_e|^T |Cov| |w_e| / (w_e^T Cov w_e)

and a channel of kappa above ``KAPPA_MAX`` is flagged. A second pass over X computes and sums blocks of channels in
which one is flagged, a launch whose programs look at kappa and return where none of theirs is: the host waits for
nothing.

Each program leaves a record, and records merge: ``norms.py`` says what is in a gram record and in a moments record.

Sums are taken about a shift s, which cancels: of the Gram matrix the mean of the program's own first pixels, rounded to
X's type, where that is more than four of their standard deviations, else 0. Then x - s is exact for nearly every x
(Sterbenz). A small shift would be worse than none, as x lies on its type's grid and x - s would be rounded again, by an
error that is a function of x and doesn't average out.

Precision: X and W1 in one type, fp16, bf16 or fp32. x - s is rounded to X's type, and
products (IEEE in fp32 for the Gram matrix, as convolutions are for E) are summed in fp32, as are the records.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import common, training_tiles
from .common import Launch, Traffic, cdiv, covered

KAPPA_MAX = 3e4  # the variance from the Gram matrix is safe to 1e-3


@triton.jit
def _owned(M, ROWS):
    """First pixel of this program, 64-bit, and how many are its own: none behind the last of M."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    return first, tl.maximum(tl.minimum(M - first, ROWS), 0).to(tl.int32)


@triton.jit
def truncated(x, TF32: tl.constexpr):
    """``x`` in fp32, where TF32 as its products take it: tensor cores leave out the last 13 bits."""
    x = x.to(tl.float32)
    if TF32:
        x = (x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _load_pixels(x_ptr, offs_m, offs_c, n, C: tl.constexpr, TF32: tl.constexpr):
    """Pixels of n from x_ptr on as fp32 [BLOCK_M, BLOCK_C], zero behind the last, and the mask of what there is."""
    mask = (offs_m < n)[:, None] & (offs_c < C)[None, :]
    x = tl.load(x_ptr + offs_m.to(tl.int64)[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
    return truncated(x, TF32), mask


@triton.jit
def _shift(x_ptr, offs_m, offs_c, n, C: tl.constexpr, TF32: tl.constexpr, BLOCK_M: tl.constexpr):
    """About what to sum: [BLOCK_C] in fp32, numbers of X's type."""
    x, mask = _load_pixels(x_ptr, offs_m, offs_c, n, C, TF32)
    count = tl.maximum(tl.minimum(n, BLOCK_M), 1).to(tl.float32)
    mean = tl.sum(x, axis=0) / count
    centred = tl.where(mask, x - mean[None, :], 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, axis=0) / count)
    shift = tl.where(tl.abs(mean) > 4 * deviation, mean, 0.0)
    return shift.to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _load_shifted(x_ptr, shift, offs_m, offs_c, n, C: tl.constexpr, TF32: tl.constexpr):
    """Pixels less the shift as fp32 [BLOCK_M, BLOCK_C], zero behind the last pixel."""
    x, mask = _load_pixels(x_ptr, offs_m, offs_c, n, C, TF32)
    return tl.where(mask, x - shift[None, :], 0.0)


@triton.jit(do_not_specialize=["M", "ROWS"])
def _gram_kernel(
    x_ptr,
    partials_ptr,
    M,
    ROWS,
    C: tl.constexpr,
    TF32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # The matrix is symmetric: programs under the diagonal of blocks have nothing to do.
    bi, bj = tl.program_id(1), tl.program_id(2)
    if bj < bi:
        return
    first, n = _owned(M, ROWS)
    x_ptr += first * C
    offs_m = tl.arange(0, BLOCK_M)
    offs_i = bi * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_j = bj * BLOCK_C + tl.arange(0, BLOCK_C)
    shift_i = _shift(x_ptr, offs_m, offs_i, n, C, TF32, BLOCK_M)
    sum_i = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if C > BLOCK_C:
        shift_j = _shift(x_ptr, offs_m, offs_j, n, C, TF32, BLOCK_M)
        sum_j = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    gram = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    for m in range(0, n, BLOCK_M):
        x_i = _load_shifted(x_ptr, shift_i, m + offs_m, offs_i, n, C, TF32)
        sum_i += x_i
        factor = x_i.to(x_ptr.dtype.element_ty)
        if C > BLOCK_C:
            x_j = _load_shifted(x_ptr, shift_j, m + offs_m, offs_j, n, C, TF32)
            sum_j += x_j
            gram = tl.dot(tl.trans(factor), x_j.to(x_ptr.dtype.element_ty), gram, input_precision="ieee")
        else:
            gram = tl.dot(tl.trans(factor), factor, gram, input_precision="ieee")

    out = partials_ptr + tl.program_id(0).to(tl.int64) * (1 + C + C * C)
    count = tl.maximum(n, 1).to(tl.float32)
    total_i = tl.sum(sum_i, axis=0)
    total_j = total_i
    if C > BLOCK_C:
        total_j = tl.sum(sum_j, axis=0)
    second = gram - total_i[:, None] * (total_j / count)[None, :]
    mask_i, mask_j = offs_i < C, offs_j < C
    tl.store(out, n.to(tl.float32), mask=bj == 0)
    tl.store(out + 1 + offs_i, shift_i + total_i / count, mask=mask_i & (bi == bj))
    out += 1 + C
    mask = mask_i[:, None] & mask_j[None, :]
    tl.store(out + offs_i[:, None] * C + offs_j[None, :], second, mask=mask)
    if C > BLOCK_C:
        tl.store(out + offs_j[None, :] * C + offs_i[:, None], second, mask=mask & (bi != bj))


@triton.jit(do_not_specialize=["M", "ROWS", "c_mid"])
def _direct_moments_kernel(
    x_ptr,
    w_ptr,
    mean_ptr,
    kappa_ptr,
    partials_ptr,
    M,
    ROWS,
    c_mid,
    c_in: tl.constexpr,
    KAPPA_MAX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first, n = _owned(M, ROWS)
    out = partials_ptr + tl.program_id(0).to(tl.int64) * (1 + 2 * c_mid)
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < c_mid
    tl.store(out, n.to(tl.float32), mask=tl.program_id(1) == 0)
    kappa = tl.load(kappa_ptr + offs_e, mask=mask_e, other=0.0)
    if tl.max(kappa, axis=0) <= KAPPA_MAX:
        return
    x_ptr += first * c_in
    offs_m, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + offs_e[None, :] * c_in
    mean = tl.load(mean_ptr + offs_e, mask=mask_e, other=0.0)
    sums = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for m in range(0, n, BLOCK_M):
        rows = m + offs_m
        mask_m = (rows < n)[:, None]
        x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * c_in
        e = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
        for k in range(0, c_in, BLOCK_K):
            channels = k + offs_k
            mask_k = channels < c_in
            x = tl.load(x_ptrs + channels[None, :], mask=mask_m & mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs + channels[:, None], mask=mask_k[:, None] & mask_e[None, :], other=0.0)
            e = tl.dot(x, w, e, input_precision=PRECISION)
        centred = tl.where(mask_m, e - mean[None, :], 0.0)
        sums += centred
        squares += centred * centred
    count = tl.maximum(n, 1).to(tl.float32)
    total = tl.sum(sums, axis=0)
    tl.store(out + 1 + offs_e, mean + total / count, mask=mask_e)
    tl.store(out + 1 + c_mid + offs_e, tl.sum(squares, axis=0) - total * (total / count), mask=mask_e)


def _pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _rows(x: Tensor, programs: int, tile: training_tiles.MomentsTile) -> int:
    """Pixels for each of ``programs``: whole tiles."""
    return cdiv(max(cdiv(_pixels(x), programs), 1), tile.BLOCK_M) * tile.BLOCK_M


def gram_programs(x: Tensor) -> int:
    """Gram records that ``gram_launch`` had best leave of ``x [N, C, H, W]``.

    As many as fill the device, but a record is C^2 numbers: with 16 C pixels behind each, all of them are an eighth of
    X in half precision at most.
    """
    M, C = _pixels(x), x.shape[1]
    tile = training_tiles.gram_tile(C, x.element_size())
    blocks = cdiv(C, tile.BLOCK_C)
    rows = training_tiles.moments_rows(M, blocks * (blocks + 1) // 2, tile, 16 * C, common.limits(x.device).processors)
    return max(cdiv(M, rows), 1)


def gram_launch(x: Tensor, partials: Tensor) -> Launch:
    """Gram records of ``x [N, C, H, W]`` (channels_last) into ``partials [P, 1 + C + C C]``, fp32, of any P.

    A program owns an equal share of the pixels in order, a block of rows of the matrix, and one of its columns.
    """
    C = x.shape[1]
    tile = training_tiles.gram_tile(C, x.element_size())
    blocks, programs = cdiv(C, tile.BLOCK_C), len(partials)
    sizes = dict(M=_pixels(x), ROWS=_rows(x, programs, tile), C=C, BLOCK_M=tile.BLOCK_M, BLOCK_C=tile.BLOCK_C)
    arguments = dict(x_ptr=x, partials_ptr=partials, TF32=common.multiplies_tf32(x), **sizes)
    return Launch(_gram_kernel, (programs, blocks, blocks), arguments, tile.num_warps, tile.num_stages)


def gram_bytes(x: Tensor, partials: Tensor) -> Traffic:
    """Bytes of ``gram_launch``: a program reads its pixels, the first tile twice, for both of its blocks."""
    launch = gram_launch(x, partials)
    at = launch.arguments
    programs, blocks, _ = launch.grid
    rows = at["M"] + covered(range(0, programs * at["ROWS"], at["ROWS"]), at["BLOCK_M"], at["M"])
    again = 1 if blocks == 1 else blocks + 1
    return Traffic(x.nbytes, partials.nbytes, rows * at["C"] * x.element_size() * again, partials.nbytes)


def direct_moments_programs(x: Tensor, weight: Tensor) -> int:
    """Moments records that ``direct_moments_launch`` had best leave of ``x [N, c_in, H, W]``."""
    tile = training_tiles.direct_tile(x.element_size())
    blocks = cdiv(weight.shape[0], tile.BLOCK_C)
    rows = training_tiles.moments_rows(_pixels(x), blocks, tile, 4 * tile.BLOCK_M, common.limits(x.device).processors)
    return max(cdiv(_pixels(x), rows), 1)


def direct_moments_launch(x: Tensor, weight: Tensor, stats: Tensor, kappa: Tensor, partials: Tensor) -> Launch:
    """Moments records of ``E = X W1`` into ``partials [P, 1 + 2 c_mid]``, fp32, of any P, where ``kappa`` flags it.

    ``x`` is ``[N, c_in, H, W]`` (channels_last), ``weight [c_mid, c_in]`` of its type, ``stats [4, c_mid]`` of which
    the mean is the shift, ``kappa [c_mid]`` fp32. A program owns an equal share of the pixels in order and BLOCK_E
    channels of E. Means and sums of a block with no flagged channel are not written.
    """
    c_mid, c_in = weight.shape
    tile = training_tiles.direct_tile(x.element_size())
    programs = len(partials)
    arguments = dict(
        x_ptr=x,
        w_ptr=weight,
        mean_ptr=stats,
        kappa_ptr=kappa,
        partials_ptr=partials,
        M=_pixels(x),
        ROWS=_rows(x, programs, tile),
        c_mid=c_mid,
        c_in=c_in,
        KAPPA_MAX=KAPPA_MAX,
        PRECISION=common.dot_precision(x),
        BLOCK_M=tile.BLOCK_M,
        BLOCK_E=tile.BLOCK_C,
        BLOCK_K=tile.BLOCK_K,
    )
    grid = (programs, cdiv(c_mid, tile.BLOCK_C))
    return Launch(_direct_moments_kernel, grid, arguments, tile.num_warps, tile.num_stages)


def direct_moments_bytes(
    x: Tensor, weight: Tensor, stats: Tensor, kappa: Tensor, partials: Tensor, *, flagged: bool = False
) -> Traffic:
    """Bytes of ``direct_moments_launch``: kappa and the counts; where all is ``flagged``, X for each block of E and
    all of W1 for each tile of pixels.
    """
    launch = direct_moments_launch(x, weight, stats, kappa, partials)
    programs, blocks = launch.grid
    counts = programs * partials.element_size()
    looks = Traffic(kappa.nbytes, counts, programs * kappa.nbytes, counts)
    if not flagged:
        return looks
    mean, sums = stats[0].nbytes, partials.nbytes - counts
    loaded = blocks * x.nbytes + cdiv(_pixels(x), launch.arguments["BLOCK_M"]) * weight.nbytes + programs * mean
    return looks + Traffic(x.nbytes + weight.nbytes + mean, sums, loaded, sums)
