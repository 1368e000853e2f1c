"""The walk down an image that passes P2 and B2 share: which pixels a program has, and how it makes A of X.

A program owns BLOCK_S *strips*, each an image and COLUMNS columns of D with the COLUMNS times stride columns of X that
belong to them, for a block of channels, and goes down ROWS rows of D. Strips cut an image from the left; where it has
more than one, a strip reads 3 - stride columns beside its own, the *halo*. How pixels lie in registers:
``register_tiles.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from . import common, tiles
from .common import cdiv, front_padding
from .register_tiles import blocks, identity, load_channels, load_exact, load_weight, product
from .training_tiles import WalkTile


@dataclass(frozen=True)
class Walk:
    """What a program knows at compile time, and the kernels' last argument."""

    H: int  # of X
    W: int
    c_in: int
    c_mid: int
    c_out: int  # of dP; 0 forward
    expands: bool
    stride: int
    pad_h: int
    pad_w: int
    whole: bool  # whether strips fill every program
    precision: str
    BLOCK_S: int
    BLOCK_E: int
    BLOCK_K: int  # channels of X in a product
    BLOCK_O: int  # channels of dP in a product
    COLUMNS: int
    WIDE: int  # columns of X that are loaded and multiplied at once
    WIDE_OUT: int  # columns of D that are stored at once
    UNROLL: int  # rows of D in a step

    @property
    def H_out(self) -> int:
        """Rows of D."""
        return -(-self.H // self.stride)

    @property
    def W_out(self) -> int:
        """Columns of D."""
        return -(-self.W // self.stride)

    @property
    def per_image(self) -> int:
        """Strips side by side."""
        return -(-self.W_out // self.COLUMNS)

    @property
    def own(self) -> int:
        """Columns of X that belong to a strip."""
        return self.COLUMNS * self.stride

    @property
    def halo(self) -> int:
        """Columns beside a strip's that it reads: forward of X, backward of D."""
        return 0 if self.per_image == 1 else 3 - self.stride

    @property
    def c_x(self) -> int:
        """Channels of X."""
        return self.c_in if self.expands else self.c_mid

    @property
    def mask_e(self) -> bool:
        """Whether the last block of channels isn't full."""
        return self.c_mid % self.BLOCK_E != 0

    @property
    def check(self) -> bool:
        """Whether some own column of X lies outside."""
        return self.per_image * self.own != self.W or not self.whole

    @property
    def check_out(self) -> bool:
        """Whether some own column of D lies outside."""
        return self.per_image * self.COLUMNS != self.W_out or not self.whole


def walk_of(
    x: Tensor,
    c_mid: int,
    c_out: int,
    stride: int,
    padding: str,
    tile: WalkTile,
    *,
    expands: bool,
) -> Walk:
    """The walk over ``x [N, c_in, H, W]`` by this tile: backward from c_out channels, or forward with a c_out of 0."""
    N, c_in, H, W = x.shape
    # A program whose last strips are missing must mask them, so the compiler is told whether there is one.
    return Walk(
        H=H,
        W=W,
        c_in=c_in,
        c_mid=c_mid,
        c_out=c_out,
        expands=expands,
        stride=stride,
        pad_h=front_padding(H, stride, padding),
        pad_w=front_padding(W, stride, padding),
        whole=N * cdiv(cdiv(W, stride), tile.COLUMNS) % tile.BLOCK_S == 0,
        precision=common.dot_precision(x),
        BLOCK_S=tile.BLOCK_S,
        BLOCK_E=tile.BLOCK_E,
        BLOCK_K=tiles.block_k(c_in),
        BLOCK_O=tiles.block_k(c_out) if c_out else 0,
        COLUMNS=tile.COLUMNS,
        WIDE=tile.WIDE,
        WIDE_OUT=tile.WIDE_OUT,
        UNROLL=tile.UNROLL,
    )


@triton.jit
def strip_columns(first, strips, column, step, walk: tl.constexpr):
    """Image, column of the image and whether it is there, of ``column`` (0 is a strip's first) of a program's strips.

    Pixels are in the order of the tiles: the program's BLOCK_S strips, column after column. Strips begin ``step``
    columns apart. Beyond the last strip it is the last strip again.
    """
    strip = first + tl.arange(0, column.shape[0]) % walk.BLOCK_S
    there = tl.minimum(strip, strips - 1)
    return there // walk.per_image, (there % walk.per_image) * step + column, strip < strips


@triton.jit
def load_expansion(w1_ptr, stats_ptr, offs_e, mask_e, offs_k, dtype: tl.constexpr, walk: tl.constexpr):
    """What makes A / 6 of X: W1 as tiles [BLOCK_E, BLOCK_K], scale and shift of BN1; the identity without expansion.

    A tuple of these and of what addresses the channels: ``offs_k`` and ``mask_e``.
    """
    if walk.expands:
        pieces: tl.constexpr = blocks(walk.c_in, walk.BLOCK_K)
        weights = load_weight(
            w1_ptr, offs_e, walk.c_in, offs_k, 1, walk.c_in, mask_e, walk.mask_e, pieces, walk.BLOCK_K
        )
        scale = load_channels(stats_ptr + 2 * walk.c_mid, offs_e, mask_e, walk.mask_e) * (1 / 6)
        shift = load_channels(stats_ptr + 3 * walk.c_mid, offs_e, mask_e, walk.mask_e) * (1 / 6)
    else:
        weights = (identity(walk.BLOCK_E, dtype),)
        scale = 0.0
        shift = 0.0
    return weights, scale, shift, offs_k, mask_e


@triton.jit
def load_taps(wd_ptr, offs_e, mask_e, factor: tl.constexpr, walk: tl.constexpr):
    """The nine taps of Wd [c_mid, 9] as columns [BLOCK_E, 1]."""
    taps = ()
    for t in tl.static_range(9):
        taps = taps + (load_channels(wd_ptr + t, offs_e * 9, mask_e, walk.mask_e) * factor,)
    return taps


@triton.jit
def activation(
    ptrs,
    inside,
    columns,
    row,
    expansion,
    walk: tl.constexpr,
    n: tl.constexpr,
    CHECK: tl.constexpr,
    CHECK_COLUMNS: tl.constexpr,
):
    """A / 6 of n columns of X, 0 where they aren't ``inside``; A itself without an expansion.

    There X is loaded as 0, and the shift is multiplied by 0: ``columns`` and ``row`` say where for itself each, and
    ``row`` is None where all rows lie in the image or ``columns`` knows those that don't.
    """
    weights, scale, shift, offs_k, mask_e = expansion
    if walk.expands:
        if row is not None:
            shift = shift * row.to(tl.float32)
        PIXELS: tl.constexpr = n * walk.BLOCK_S
        a = product(weights, ptrs, inside, offs_k, walk.c_in, walk.BLOCK_K, walk.BLOCK_E, PIXELS, CHECK, walk.precision)
        shift = tl.broadcast_to(shift, a.shape)
        if CHECK_COLUMNS:
            shift = shift * columns.to(tl.float32)[None, :]
        a = tl.minimum(tl.maximum(tl.fma(a, tl.broadcast_to(scale, a.shape), shift), 0.0), 1.0)
    else:
        a = load_exact(weights[0], ptrs, mask_e, inside, walk.mask_e, CHECK)
    return a
