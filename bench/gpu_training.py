"""The block in training as cases for a GPU: forward and backward beside torch's, and each of our passes by itself.

The truth is fp32 (IEEE), as the block's tensors in fp64 would fill a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import BatchNorm, inverted_residual, reference
from mnv2.model import LayerShape

from .count import Call
from .executions import block_of
from .gpu_jobs import META, Job, Results, counts, ends, hold, planned, randn
from .gpu_tools import Case, Tools, counted, with_graphs
from .parity import assert_alike
from .training import passes_of

PASSES = ("P1", "P2", "P3", "P4", "B0 sums", "B0 dP", "B1", "B2", "S", "B3")  # over whole tensors
FINALISERS = "finalisers"  # all other launches of a block in training, together


def parameters(layer: LayerShape, like: Tensor) -> list[Any]:
    """Weights and norms in the order of ``inverted_residual``, in fp32; weights that ``like``'s type can hold."""

    def weight(*shape: int) -> Tensor:
        fan_in = torch.Size(shape[1:]).numel()
        values = torch.randn(shape, device=like.device) * (2 / fan_in) ** 0.5
        return values.to(like.dtype).float().requires_grad_()

    def norm(channels: int) -> BatchNorm:
        new = partial(torch.randn, channels, device=like.device)
        gamma, beta = (1 + 0.3 * new()).requires_grad_(), (0.5 + 0.5 * new()).requires_grad_()
        mean, var = torch.zeros(channels, device=like.device), torch.ones(channels, device=like.device)
        return BatchNorm(gamma, beta, mean, var, None, batch_stats=True)

    c_in, c_mid, c_out = layer.c_in, layer.c_mid, layer.c_out
    expand = [weight(c_mid, c_in, 1, 1), norm(c_mid)] if layer.expand_macs else [None, None]
    return [*expand, weight(c_mid, 1, 3, 3), norm(c_mid), weight(c_out, c_mid, 1, 1), norm(c_out)]


def leaves_of(x: Tensor, operands: Sequence[Any]) -> list[Tensor]:
    """What has a gradient: X, weights, and the weight and bias of each norm."""
    flat = [x]
    for value in operands:
        flat += value[:2] if isinstance(value, BatchNorm) else [] if value is None else [value]
    return flat


def exact(x: Tensor, operands: Sequence[Any]) -> tuple[Tensor, list[Any]]:
    """The same in fp32, the parameters as leaves of their own."""

    def fresh(value: Any) -> Any:
        if isinstance(value, BatchNorm):
            return value._replace(**{name: fresh(getattr(value, name)) for name in BatchNorm._fields[:4]})
        return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    return x.detach().float().requires_grad_(), [fresh(value) for value in operands]


def forward_backward(operation: Callable[..., Tensor], x: Tensor, operands: Sequence[Any], dy: Tensor) -> Any:
    """Y and all gradients, under autocast in dY's type, or in fp32 as it is."""
    with torch.autocast(x.device.type, dy.dtype, enabled=dy.dtype != torch.float32, cache_enabled=False):
        y = operation(x, *operands)
    return y.detach(), *torch.autograd.grad(y, leaves_of(x, operands), dy)


def training_case(job: Job, tools: Tools, batch: int, *, alone: bool = False) -> Case:
    """A block's forward and backward under autocast; ``alone`` leaves out what only takes part for its time."""
    like, layer = job.like(tools.device), job.layer
    operands = parameters(layer, like)
    x = randn(batch, layer.c_in, layer.height, layer.width, like=like).requires_grad_()
    dy = randn(batch, layer.c_out, layer.height_out, layer.width_out, like=like)
    how: dict[str, Any] = {"stride": layer.stride, "residual": layer.residual}

    def twin(*arguments: Any) -> Tensor:
        return reference.inverted_residual(*arguments, **how)

    ours = partial(inverted_residual, **how, backend="triton")
    operations = {"ours": ours, "eager": twin}
    if not alone:
        operations["compiled"] = tools.compiled(twin)
    calls = {name: partial(forward_backward, operation, x, operands, dy) for name, operation in operations.items()}

    def check(results: Results) -> None:
        x32, operands32 = exact(x, operands)
        y, dx, *grads = (value.double() for value in forward_backward(twin, x32, operands32, dy.float()))
        hold("Y", results, [ends(y)])
        scale = max(grad.abs().max().item() for grad in (dx, *grads))
        for number, truth in enumerate((dx, *grads), 1):
            found = {side: result[number] for side, result in results.items()}
            for side, tensor in found.items():
                assert tensor.isfinite().all(), f"gradient {number}, {side}: not all of its numbers are finite"
            if number == 1:
                truth, found = ends(truth), {side: ends(tensor) for side, tensor in found.items()}
            for side, tensor in found.items():
                assert_alike(f"gradient {number}, {side}", tensor, truth, found["eager"], scale)

    plan = counts(training_plan, job, tools, batch)
    return Case(job.name(batch), batch, calls if alone else with_graphs(calls, tools), check, plan)


def training_plan(job: Job, batch: int, like: Tensor) -> list[Call]:
    """Every launch of a block, forward and backward."""
    forward, backward = passes_of(block_of(job.layer), batch, like)
    return [*forward, *backward]


def pass_cases(job: Job, tools: Tools, batch: int) -> dict[str, Case]:
    """A case for each pass of a block in training, by its name, and one for all finalisers together.

    They have no peers. They are what the block is made of, whose parity must have been checked.
    """
    like = job.like(tools.device)
    forward, backward = passes_of(block_of(job.layer), batch, like, visit=lambda call: call.launch.run(like.device))
    launches = [*forward, *backward]

    def case(name: str, calls: Sequence[Call], call: Callable[[], Any]) -> Case:
        return Case(f"pass {name} of {job.name(batch)}", batch, {"ours": call}, _nothing, counted(calls, tools.device))

    found = {
        call.name: case(call.name, [call], partial(call.launch.run, like.device))
        for call in launches
        if call.name in PASSES
    }
    others = [call for call in launches if call.name not in PASSES]

    def finalise() -> None:
        for call in others:
            call.launch.run(like.device)

    found[FINALISERS] = case(FINALISERS, others, tools.graphed(finalise))  # of a few microseconds each
    return found


def _nothing(results: Mapping[str, Any]) -> None:
    """Nothing to compare with."""


def pass_names(layer: LayerShape) -> Iterator[str]:
    """Names of the cases that ``pass_cases`` makes."""
    job = Job("training block", layer, "fp16", 1)
    yield from (call.name for call in planned(training_plan, job, META) if call.name in PASSES)
    yield FINALISERS
