"""What ``bench.tune`` measures of a shape at inference: the tiles of its kernels, and the paths of its operation.

A group are the jobs of a shape, which share their tensors. It says what it is worth, the bytes that the kernels move,
before any of these is made. Training's groups are in ``tune_training.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import PackedBlock, common, conv_relu6_mean, inverted_residual_inference, tiles
from kernels.block_inference_passes import inverted_residual_bytes, inverted_residual_launches
from kernels.common import Launch
from kernels.head_inference import conv_relu6_mean_bytes, conv_relu6_mean_launch
from kernels.measured import Choice

from .blocks import Block, block_tensors, head_tensors

Step = Callable[[], tuple[Tensor, ...]]


class Prepared(NamedTuple):
    """Launches with one tile, the tensors that they write, and what of these must be the same with every tile."""

    launches: tuple[Launch, ...]
    written: tuple[Tensor, ...]
    results: Step


@dataclass(frozen=True)
class TileJob:
    """A choice of tiles at some arguments; ``prepare`` takes a tile while that is planted as the measured one."""

    choice: Choice[..., Any]
    arguments: tuple[Any, ...]
    prepare: Callable[[Any], Prepared]
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> dict[str, int]:
        return self.choice.shape(*self.arguments, **self.keywords)

    @property
    def candidates(self) -> tuple[Any, ...]:
        return self.choice.candidates(*self.arguments, **self.keywords)

    @property
    def name(self) -> str:
        return name_of(self.choice.op, self.shape)


@dataclass(frozen=True)
class PathJob:
    """An operation of some shape by each of its paths; a step returns what must be the same by all."""

    op: str
    shape: Mapping[str, int]
    steps: Mapping[str, Step]

    @property
    def name(self) -> str:
        return name_of(self.op, self.shape)


Job = TileJob | PathJob


@dataclass(frozen=True)
class Group:
    """Jobs of a shape, in order: first those of tiles, as the paths take the tiles that were found."""

    name: str
    value: int
    jobs: Callable[[], Iterator[Job]]


def name_of(op: str, shape: Mapping[str, int]) -> str:
    """As lines and tables have it."""
    return f"{op}: " + ", ".join(f"{name} {int(size)}" for name, size in shape.items() if name != "element_size")


def text_of(block: Block) -> str:
    return f"{block.c_in}-{block.c_mid}-{block.c_out}x{block.side}x{block.side}/{block.stride}"


def by_paths(kernels: Callable[[], Any], torchs: Callable[[], Any], gradients: Any = None) -> dict[str, Step]:
    """Steps of an operation by the kernels, by torch's operations, and by what torch.compile makes of those.

    ``gradients`` is a function from the output to them; without it no step has any.
    """
    compiled = torch.compile(lambda: torchs(), fullgraph=True, dynamic=False)
    calls = {"torch": torchs, "kernels": kernels, "compiled": compiled}  # torch's result is what others are held to

    def step(call: Callable[[], Any]) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(gradients is not None):
            y = call()
            return (y.detach(), *(gradients(y) if gradients is not None else ()))

    return {name: partial(step, call) for name, call in calls.items()}


def _fill(x: Tensor, packed: PackedBlock) -> None:
    """Numbers of which the clamps reach both ends."""
    x.normal_()
    for weight in packed:
        if weight is not None:
            weight.normal_(0, 0.5 if weight.dim() == 1 else weight.shape[1] ** -0.5)
    packed.depthwise_weight.normal_(0, 0.5)


def inference_group(block: Block, count: int, batch: int, like: Tensor) -> Group:
    """The block, of which a network has ``count``, for ``batch`` pictures of ``like``'s type and device."""
    how = (block.stride, block.residual, "symmetric")
    value = sum(moved.touched for moved in inverted_residual_bytes(*block_tensors(block, batch, like.to("meta")), *how))

    def jobs() -> Iterator[Job]:
        x, packed, y = block_tensors(block, batch, like)
        _fill(x, packed)
        yield from _block_tiles(block, x, packed, y)
        keywords = {"stride": block.stride, "residual": block.residual, "relu6_input": not block.expands}
        op = partial(inverted_residual_inference, x, packed, **keywords)
        shape = {"c_in": block.c_in, "c_mid": block.c_mid, "c_out": block.c_out, "H": block.side, "W": block.side}
        shape["stride"] = block.stride
        steps = by_paths(partial(op, backend="triton"), partial(op, backend="torch"))
        yield PathJob("inference block", shape, steps)

    return Group(f"inference {text_of(block)}", count * value, jobs)


def _block_tiles(block: Block, x: Tensor, packed: PackedBlock, y: Tensor) -> Iterator[TileJob]:
    how = (block.stride, block.residual, "symmetric")
    limits, size = common.limits(x.device), x.element_size()

    def launches(tile: Any) -> tuple[Launch, ...]:
        return inverted_residual_launches(x, packed, y, *how, relu6_input=not block.expands, tile=tile)

    def whole(tile: Any) -> Prepared:
        made = launches(tile)
        return Prepared(made, tuple(launch.arguments["y_ptr"] for launch in made), lambda: (y,))

    arguments = (block.c_in, block.c_out, block.stride, *y.shape[2:], size, limits)
    job = TileJob(tiles.block_tile, arguments, whole, {"expands": block.expands})
    split = next((tile for tile in job.candidates if tile.split), None)

    def projection(_: Any) -> Prepared:
        first, second = launches(split)
        first.run(x.device)
        return Prepared((second,), (y,), lambda: (y,))

    if split is not None:  # before the block, whose tiles that store B run it
        yield TileJob(tiles.project_tile, (block.c_mid, block.c_out, size, limits), projection)
    yield job


def head_group(c_in: int, c_out: int, side: int, count: int, batch: int, like: Tensor) -> Group:
    """The head, as ``inference_group``."""
    value = conv_relu6_mean_bytes(*head_tensors(c_in, c_out, side, batch, like.to("meta"))).touched

    def jobs() -> Iterator[Job]:
        x, weight, bias, f = head_tensors(c_in, c_out, side, batch, like)
        x.normal_()
        weight.normal_(0, c_in**-0.5)

        def prepare(_: Any) -> Prepared:
            return Prepared((conv_relu6_mean_launch(x, weight, bias, f),), (f,), lambda: (f,))

        arguments = (c_in, c_out, side * side, x.element_size(), common.limits(x.device))
        yield TileJob(tiles.head_tile, arguments, prepare)
        op = partial(conv_relu6_mean, x, weight, bias)
        steps = by_paths(partial(op, backend="triton"), partial(op, backend="torch"))
        yield PathJob("head", {"c_in": c_in, "c_out": c_out, "H": side, "W": side}, steps)

    return Group(f"head {c_in}-{c_out}x{side}x{side}", count * value, jobs)
