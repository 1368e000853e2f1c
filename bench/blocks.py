"""Tensors of an inverted residual and of the head as their launchers at inference take them, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import PackedBlock
from kernels.common import cdiv


@dataclass(frozen=True)
class Block:
    """Shape of an inverted residual; as in the network, one that doesn't expand has as many channels in the middle."""

    c_in: int
    c_mid: int
    c_out: int
    side: int
    stride: int

    @property
    def expands(self) -> bool:
        return self.c_mid != self.c_in

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.c_in == self.c_out


def images(batch: int, channels: int, side: int, like: Tensor) -> Tensor:
    """Zeros of ``[batch, channels, side, side]`` in channels_last."""
    return like.new_zeros(batch, channels, side, side).to(memory_format=torch.channels_last)


def block_tensors(block: Block, batch: int, like: Tensor) -> tuple[Tensor, PackedBlock, Tensor]:
    """Input, weights and output."""
    c_in, c_mid, c_out = block.c_in, block.c_mid, block.c_out
    packed = PackedBlock(
        like.new_zeros(c_mid, c_in) if block.expands else None,
        like.new_zeros(c_mid, dtype=torch.float32) if block.expands else None,
        like.new_zeros(9, c_mid, dtype=torch.float32),
        like.new_zeros(c_mid, dtype=torch.float32),
        like.new_zeros(c_out, c_mid),
        like.new_zeros(c_out, dtype=torch.float32),
    )
    y = images(batch, c_out, cdiv(block.side, block.stride), like)
    return images(batch, c_in, block.side, like), packed, y


def head_tensors(c_in: int, c_out: int, side: int, batch: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, bias and features."""
    weight, bias = like.new_zeros(c_out, c_in, 1, 1), like.new_zeros(c_out, dtype=torch.float32)
    return images(batch, c_in, side, like), weight, bias, like.new_zeros(batch, c_out)
