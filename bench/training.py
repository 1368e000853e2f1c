"""The passes of the block in training, one by one: launches and their bytes, in the order in which they run.

`kernels.inverted_residual_passes` makes each pass through a function that it is given. What stands here in place of
`common.launched` takes the launch, the bytes of the formula beside its launcher, and a name; it runs nothing but where
it is asked to. Names are those of the passes in ``kernels/README.md``, and for a finaliser what it makes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import (
    common,
    expand_depthwise,
    expand_depthwise_grads,
    expand_finalisers,
    expand_grads,
    gram_norm,
    inverted_residual_passes,
    moments,
    norm_grads,
    norm_passes,
    norms,
    partials,
    project,
    weights,
)
from kernels.common import BatchNorm, Launch
from kernels.inverted_residual_passes import Grads, Saved

from .blocks import Block
from .count import Call

PASSES: dict[Callable[..., Launch], str] = {
    moments.gram_launch: "P1",
    gram_norm.merge_gram_launch: "P1 merge",
    gram_norm.normalise_gram_launch: "BN1",
    moments.direct_moments_launch: "P1 direct",
    expand_depthwise.expand_depthwise_launch: "P2",
    project.project_launch: "P3",
    norm_passes.apply_launch: "P4",
    norm_passes.sums_launch: "B0 sums",
    norm_passes.projected_grad_launch: "B0 dP",
    project.project_grads_launch: "B1",
    expand_depthwise_grads.expand_depthwise_grads_launch: "B2",
    expand_grads.expand_sums_launch: "S",
    expand_finalisers.expand_weight_grad_launch: "dW1",
    expand_finalisers.pull_back_launch: "M, v",
    expand_grads.input_grad_launch: "B3",
}
# A launcher that serves several passes: whose statistics it takes, and which sums.
NORMS = {norms.normalise_launch: "BN", norm_grads.norm_grads_launch: "BN grads", norms.frozen_launch: "BN frozen"}
SUMS = {"taps_ptr": "dWd", "dw_ptr": "dW2", "beta_ptr": "dbeta1", "s_ptr": "S sum", "partials_ptr": "S sum"}


class Passes(NamedTuple):
    """Launches of a block in training, forward and backward."""

    forward: list[Call]
    backward: list[Call]


class Recorder:
    """Stands in for ``common.launched``: keeps launches in ``calls`` and shows each to ``visit``, which may run it."""

    def __init__(self, saved: Saved, visit: Callable[[Call], object] | None = None):
        self.calls: list[Call] = []
        self._saved = saved
        self._visit = visit

    def __call__(self, launcher: Callable[..., Launch], *arguments: Any, **keywords: Any) -> Launch:
        launch = launcher(*arguments, **keywords)
        call = Call(self._name(launcher, launch), launch, common.bytes_of(launcher)(*arguments, **keywords))
        if self._visit is not None:
            self._visit(call)
        self.calls.append(call)
        return launch

    def _name(self, launcher: Callable[..., Launch], launch: Launch) -> str:
        at = launch.arguments
        unknown = launcher.__name__  # a pass that is new here is one all the same
        if launcher in NORMS:
            stats = (self._saved.stats1, self._saved.stats2, self._saved.stats3)
            flagged = " flagged" if at.get("kappa_ptr") is not None else ""
            names = [NORMS[launcher].replace("BN", f"BN{i}") + flagged for i in (1, 2, 3)]
            return next((name for name, of in zip(names, stats, strict=True) if of is at["stats_ptr"]), unknown)
        if launcher is partials.sum_partials_launch:
            found = (SUMS[name] for call in self.calls for name in SUMS if self._shares(call, name, launch))
            return next(found, unknown)
        if launcher is weights.scaled_launch:
            return "W1 scaled" if at["OF_ROWS"] else "W2 scaled"
        return PASSES.get(launcher, unknown)

    @staticmethod
    def _shares(call: Call, name: str, launch: Launch) -> bool:
        return call.launch.arguments.get(name) is launch.arguments["partials_ptr"]


def norm_of(channels: int, new: Callable[..., Tensor]) -> BatchNorm:
    """BatchNorm of a network in training."""
    weight, bias, mean, var = (new(channels) for _ in range(4))
    return BatchNorm(weight, bias, mean, var.abs(), None, batch_stats=True)


def training_block(block: Block, new: Callable[..., Tensor], padding: str) -> inverted_residual_passes.Block:
    """Parameters of the block in fp32, each made by ``new(*shape)``."""
    c_in, c_mid, c_out = block.c_in, block.c_mid, block.c_out
    return inverted_residual_passes.Block(
        new(c_mid, c_in, 1, 1) if block.expands else None,
        new(c_mid, 1, 3, 3),
        new(c_out, c_mid, 1, 1),
        norm_of(c_mid, new) if block.expands else None,
        norm_of(c_mid, new),
        norm_of(c_out, new),
        block.stride,
        padding,
        block.residual,
    )


def passes_of(
    block: Block, batch: int, like: Tensor, padding: str = "symmetric", visit: Callable[[Call], object] | None = None
) -> Passes:
    """Passes of ``block`` on pictures of ``like``'s type and device, with fp32 parameters and all gradients.

    Each is shown to ``visit``, which must run it where numbers are wanted: values are random then.
    """

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.empty(shape, dtype=torch.float32, device=like.device)
        return (values if like.is_meta else values.normal_()).to(dtype)

    N, c_in, side = batch, block.c_in, block.side
    parameters = training_block(block, new, padding)
    x = new(N, c_in, side, side, dtype=like.dtype).to(memory_format=torch.channels_last)
    saved = inverted_residual_passes.new_saved(x, parameters)
    y = common.allocate_like(saved.p)
    dy = new(*y.shape, dtype=like.dtype).to(memory_format=torch.channels_last)
    forward, backward = Recorder(saved, visit), Recorder(saved, visit)
    inverted_residual_passes.forward(x, parameters, y, saved, forward)
    inverted_residual_passes.backward(dy, x, parameters, saved, Grads(*[True] * len(Grads._fields)), backward)
    return Passes(forward.calls, backward.calls)
