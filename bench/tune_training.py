"""What ``bench.tune`` measures of a block in training: its passes, its depthwise convolution, and the paths of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import common, depthwise_conv2d, inverted_residual, inverted_residual_passes, reference, tiles
from kernels.common import BatchNorm, Launch
from kernels.depthwise_passes import depthwise_bwd_launch, depthwise_fwd_launch
from kernels.expand_depthwise import expand_depthwise_launch
from kernels.expand_depthwise_grads import expand_depthwise_grads_launch
from kernels.expand_grads import expand_sums_launch, expand_sums_programs, input_grad_launch
from kernels.inverted_residual_passes import Grads
from kernels.partials import sum_partials_launch
from kernels.project import project_grads_launch, project_launch
from kernels.training_tiles import (
    THIN,
    expand_grad_tile,
    expand_sums_tile,
    expand_tile,
    input_grad_tile,
    project_grad_tile,
    project_tile,
)

from .blocks import Block, images
from .training import passes_of, training_block
from .tune_jobs import Group, Job, PathJob, Prepared, TileJob, by_paths, text_of

Reduced = Callable[[Tensor], tuple[Tensor, ...]]


def training_group(block: Block, count: int, batch: int, like: Tensor) -> Group:
    """The block, of which a network has ``count``, for ``batch`` pictures of ``like``'s type and device."""
    forward, backward = passes_of(block, batch, like.to("meta"))
    value = sum(call.formula.touched for call in (*forward, *backward))

    def jobs() -> Iterator[Job]:
        yield from _depthwise(block, batch, like)  # first, as torch's path of the block has one
        yield from _passes(block, batch, like)
        yield _block_paths(block, batch, like)

    return Group(f"training {text_of(block)}", count * value, jobs)


def _depthwise(block: Block, batch: int, like: Tensor) -> Iterator[Job]:
    C, side, stride = block.c_mid, block.side, block.stride
    x, dx, y = (images(batch, C, size, like) for size in (side, side, common.cdiv(side, stride)))
    dy, weight = torch.empty_like(y).normal_(), like.new_empty(C, 1, 3, 3).normal_(0, 1 / 3)
    x.normal_()
    dw = torch.empty_like(weight)

    def forward(_: Any) -> Prepared:
        return Prepared((depthwise_fwd_launch(x, weight, y, stride, "symmetric"),), (y,), lambda: (y,))

    def backward(_: Any) -> Prepared:
        launch = depthwise_bwd_launch(dy, x, weight, dx, stride, "symmetric")
        total = sum_partials_launch(launch.arguments["partials_ptr"], dw)
        return Prepared((launch, total), (dx, dw), lambda: (dx, dw))

    arguments = (C, stride, y.shape[3], x.element_size(), common.limits(x.device))
    yield TileJob(tiles.depthwise_tile, arguments, forward, {"backward": False})
    yield TileJob(tiles.depthwise_tile, arguments, backward, {"backward": True})
    shape = {"C": C, "H": side, "W": side, "stride": stride}
    op = partial(depthwise_conv2d, x, weight, stride=stride)
    steps = by_paths(partial(op, backend="triton"), partial(op, backend="torch"))
    yield PathJob("depthwise", shape, steps)
    inputs = x.detach().requires_grad_(), weight.detach().requires_grad_()
    op = partial(depthwise_conv2d, *inputs, stride=stride)
    steps = by_paths(
        partial(op, backend="triton"), partial(op, backend="torch"), lambda y: torch.autograd.grad(y, inputs, dy)
    )
    yield PathJob("depthwise training", shape, steps)


class _Kept:
    """Stands in for ``common.launched``: runs launches, and keeps the arguments of each launcher's first call."""

    def __init__(self) -> None:
        self.calls: dict[Callable[..., Launch], tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def __call__(self, launcher: Callable[..., Launch], *arguments: Any, **keywords: Any) -> Launch:
        self.calls.setdefault(launcher, (arguments, keywords))
        return common.launched(launcher, *arguments, **keywords)


def _same(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


def _sum(partials: Tensor) -> tuple[Tensor, ...]:
    return (partials.sum(0, dtype=torch.float64),)


def _moments(partials: Tensor) -> tuple[Tensor, ...]:
    """Mean and second moment over all of ``partials [P, 1 + 2 C]``."""
    C = partials.shape[1] // 2
    count, means, seconds = partials.double().split([1, C, C], dim=1)
    mean = (count * means).sum(0) / count.sum()
    return mean, seconds.sum(0) + (count * (means - mean).square()).sum(0)


def _expand_sums(x: Tensor, dz: Tensor, *_: Tensor) -> Launch:
    """``expand_sums_launch`` with as many partials as its tile leaves."""
    programs = expand_sums_programs(x, dz)
    partials, beta = (common.allocate((programs, rows, dz.shape[1]), x, torch.float32) for rows in (x.shape[1], 1))
    return expand_sums_launch(x, dz, partials, beta)


# What a pass writes, and what of it doesn't depend on the tile.
WRITTEN: dict[Callable[..., Launch], dict[str, Reduced]] = {
    expand_depthwise_launch: {"d_ptr": _same, "partials_ptr": _moments},
    project_launch: {"p_ptr": _same, "partials_ptr": _moments},
    project_grads_launch: {"sums_ptr": _sum, "dw_ptr": _sum},
    expand_depthwise_grads_launch: {
        "t_ptr": _same,
        "dz_ptr": _same,
        "s_ptr": _sum,
        "beta_ptr": _sum,
        "taps_ptr": _sum,
    },
    expand_sums_launch: {"partials_ptr": _sum, "beta_ptr": _sum},
    input_grad_launch: {"dx_ptr": _same},
}


def _prepared(launcher: Callable[..., Launch], arguments: Any, keywords: Any, _: Any) -> Prepared:
    launch = (_expand_sums if launcher is expand_sums_launch else launcher)(*arguments, **keywords)
    outputs = {name: launch.arguments[name] for name in WRITTEN[launcher] if launch.arguments[name] is not None}

    def results() -> tuple[Tensor, ...]:
        return tuple(part for name, tensor in outputs.items() for part in WRITTEN[launcher][name](tensor))

    return Prepared((launch,), tuple(outputs.values()), results)


def _normal(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, device=like.device)


def _passes(block: Block, batch: int, like: Tensor) -> Iterator[TileJob]:
    """The passes that have tiles to choose from, on what a forward and a backward hand to them."""
    parameters = training_block(block, partial(_normal, like), "symmetric")
    x = images(batch, block.c_in, block.side, like).normal_()
    saved = inverted_residual_passes.new_saved(x, parameters)
    dy, kept = torch.empty_like(saved.p).normal_(), _Kept()
    inverted_residual_passes.forward(x, parameters, torch.empty_like(dy), saved, kept)
    inverted_residual_passes.backward(dy, x, parameters, saved, Grads(*[True] * len(Grads._fields)), kept)
    c_in, c_mid, c_out, W_out = block.c_in, block.c_mid, block.c_out, saved.d.shape[3]
    there = x.element_size(), common.limits(x.device)
    stored = c_mid if block.expands and c_in > THIN else 0  # channels of dZ1
    choices: Mapping[Callable[..., Launch], Any] = {
        expand_depthwise_launch: (expand_tile, (c_in, c_mid, block.stride, W_out)),
        project_launch: (project_tile, (c_mid, c_out)),
        project_grads_launch: (project_grad_tile, (c_mid, c_out)),
        expand_depthwise_grads_launch: (expand_grad_tile, (c_in, c_mid, c_out, block.stride, W_out)),
        expand_sums_launch: (expand_sums_tile, (c_in, c_mid)),
        input_grad_launch: (input_grad_tile, (c_in, stored)),
    }
    for launcher, (choice, sizes) in choices.items():
        if launcher in kept.calls:
            keywords = {"expands": block.expands} if choice is expand_grad_tile else {}
            yield TileJob(choice, (*sizes, *there), partial(_prepared, launcher, *kept.calls[launcher]), keywords)


def _block_paths(block: Block, batch: int, like: Tensor) -> PathJob:
    """The block forward and backward; torch's operations go around ``depthwise_conv2d``, as they do under "auto"."""
    parameters = training_block(block, partial(_normal, like), "symmetric")
    w1, wd, w2, *norms = parameters[:6]
    x = images(batch, block.c_in, block.side, like).normal_().requires_grad_()
    weights = [weight.requires_grad_() for weight in (w1, wd, w2) if weight is not None]
    affine = [tensor.requires_grad_() for norm in norms if norm is not None for tensor in norm[:2]]
    dy = images(batch, block.c_out, common.cdiv(block.side, block.stride), like).normal_()
    norm1, norm2, norm3 = norms
    operands: tuple[Tensor | BatchNorm | None, ...] = (x, w1, norm1, wd, norm2, w2, norm3)
    how = {"stride": block.stride, "residual": block.residual}

    def under_autocast(op: Callable[..., Tensor], **keywords: Any) -> Tensor:
        with torch.autocast(like.device.type, like.dtype):
            return op(*operands, **how, **keywords)

    steps = by_paths(
        partial(under_autocast, inverted_residual, backend="triton"),
        partial(under_autocast, reference.inverted_residual, depthwise=depthwise_conv2d),
        lambda y: torch.autograd.grad(y, [x, *weights, *affine], dy),
    )
    shape = {"c_in": block.c_in, "c_mid": block.c_mid, "c_out": block.c_out, "H": block.side, "W": block.side}
    return PathJob("training block", {**shape, "stride": block.stride}, steps)
