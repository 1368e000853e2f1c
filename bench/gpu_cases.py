"""Depthwise convolution, block and head at inference as cases for a GPU: ours, torch's own in channels_last ("eager"),
and that through ``torch.compile``. The truth is fp64.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import (
    PackedBlock,
    block_inference_passes,
    common,
    conv_relu6_mean,
    depthwise,
    depthwise_conv2d,
    depthwise_passes,
    head_inference,
    inverted_residual_inference,
    pack_inverted_residual,
    partials,
    reference,
    tiles,
)
from mnv2.model import LayerShape

from .blocks import block_tensors, head_tensors
from .count import Call
from .executions import block_of
from .gpu_jobs import META, Job, Results, counts, ends, hold, one, planned, randn
from .gpu_tools import Case, Counted, Tools, counted

GRADIENTS = {"input gradient": (True, False), "weight gradient": (False, True), "both gradients": (True, True)}
KINDS = ("forward", *GRADIENTS)


def torch_gradients(dy: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: tuple[bool, bool]) -> Any:
    """As autograd computes them, without its overhead."""
    geometry = ([stride, stride], [1, 1], [1, 1], False, [0, 0], x.shape[1])
    found = torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, [*wanted, False])
    return tuple(grad for grad, want in zip(found[:2], wanted, strict=True) if want)


def our_gradients(dy: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: tuple[bool, bool]) -> tuple[Tensor, ...]:
    """By the operations that the backward calls."""
    if wanted == (True, True):
        return depthwise.depthwise_grads(dy, x, weight, stride, "symmetric")
    if wanted == (True, False):
        return (depthwise.depthwise_input_grad(dy, weight, *x.shape[2:], stride, "symmetric"),)
    return (depthwise.depthwise_weight_grad(dy, x, weight, stride, "symmetric"),)


def depthwise_case(job: Job, tools: Tools, batch: int) -> Case:
    """The convolution's forward, or gradients of it."""
    like, layer, stride = job.like(tools.device), job.layer, job.layer.stride
    x = randn(batch, layer.c_mid, layer.height, layer.width, like=like)
    weight = randn(layer.c_mid, 1, 3, 3, like=like).contiguous()
    if job.kind == "forward":
        twin = partial(reference.depthwise_conv2d, stride=stride)
        compiled = tools.compiled(twin)
        calls = {
            "ours": partial(one, depthwise_conv2d, x, weight, stride=stride, backend="triton"),
            "eager": partial(one, twin, x, weight),
            "compiled": partial(one, compiled, x, weight),
        }

        def check(results: Results) -> None:
            hold("Y", results, one(twin, ends(x).double(), weight.double()))

        return Case(job.name(batch), batch, calls, check, counts(depthwise_plan, job, tools, batch))
    wanted = GRADIENTS[job.kind]
    dy = randn(batch, layer.c_mid, layer.height_out, layer.width_out, like=like)
    gradients = partial(torch_gradients, stride=stride, wanted=wanted)
    compiled = tools.compiled(gradients)
    calls = {
        "ours": partial(our_gradients, dy, x, weight, stride, wanted),
        "eager": partial(gradients, dy, x, weight),
        "compiled": partial(compiled, dy, x, weight),
    }

    def check_gradients(results: Results) -> None:
        if wanted[0]:
            first = {side: result[:1] for side, result in results.items()}
            truth = torch_gradients(ends(dy).double(), ends(x).double(), weight.double(), stride, (True, False))
            hold("dX", first, truth)
        if wanted[1]:
            last = {side: result[-1:] for side, result in results.items()}
            truth = torch_gradients(dy.double(), x.double(), weight.double(), stride, (False, True))
            hold("dW", last, truth, images=False)

    return Case(job.name(batch), batch, calls, check_gradients, counts(depthwise_plan, job, tools, batch))


def depthwise_plan(job: Job, batch: int, like: Tensor) -> list[Call]:
    """Launches of one kind."""
    layer, how = job.layer, (job.layer.stride, "symmetric")
    x = common.allocate((batch, layer.c_mid, layer.height, layer.width), like)
    y = common.allocate((batch, layer.c_mid, layer.height_out, layer.width_out), like)
    weight = like.new_empty((layer.c_mid, 1, 3, 3))
    if job.kind == "forward":
        operands = (x, weight, y, *how)
        launch = depthwise_passes.depthwise_fwd_launch(*operands)
        return [Call("forward", launch, depthwise_passes.depthwise_fwd_bytes(*operands))]
    needs_x, needs_weight = GRADIENTS[job.kind]
    operands = (y, x if needs_weight else None, weight, x if needs_x else None, *how)
    launch = depthwise_passes.depthwise_bwd_launch(*operands)
    found = [Call("gradients", launch, depthwise_passes.depthwise_bwd_bytes(*operands))]
    if needs_weight:
        sums = launch.arguments["partials_ptr"], weight.view(-1, 9)
        found.append(Call("sum", partials.sum_partials_launch(*sums), partials.sum_partials_bytes(*sums)))
    return found


def packed_block(layer: LayerShape, like: Tensor) -> PackedBlock:
    """Weights whose expanded and depthwise values lie on both sides of the clamp's range."""
    c_in, c_mid, c_out = layer.c_in, layer.c_mid, layer.c_out
    expand = (torch.randn(c_mid, c_in, 1, 1) * 2 / c_in**0.5, torch.randn(c_mid) + 0.5)
    packed = pack_inverted_residual(
        *(expand if layer.expand_macs else (None, None)),
        torch.randn(c_mid, 1, 3, 3) * 0.6,
        torch.randn(c_mid) * 0.5 + 0.3,
        torch.randn(c_out, c_mid, 1, 1) / c_mid**0.5,
        torch.randn(c_out),
        dtype=like.dtype,
    )
    return packed.to(like.device)


def inference_case(job: Job, tools: Tools, batch: int) -> Case:
    """A block with folded BatchNorm; the network's first applies the ReLU6 of the stem, in eager by an operation."""
    like, layer = job.like(tools.device), job.layer
    packed = packed_block(layer, like)
    x = 3 * randn(batch, layer.c_in, layer.height, layer.width, like=like)
    how: dict[str, Any] = {"stride": layer.stride, "residual": layer.residual, "padding": "symmetric"}
    relu6 = not layer.expand_macs

    def twin(x: Tensor, weights: reference.FoldedWeights) -> Tensor:
        return reference.folded_block(F.relu6(x) if relu6 else x, weights, **how)

    weights = reference.unpacked(packed)
    compiled = tools.compiled(twin)
    calls = {
        "ours": partial(one, inverted_residual_inference, x, packed, **how, relu6_input=relu6, backend="triton"),
        "eager": partial(one, twin, x, weights),
        "compiled": partial(one, compiled, x, weights),
    }

    def check(results: Results) -> None:
        exact = PackedBlock(*(None if tensor is None else tensor.double() for tensor in packed))
        hold("Y", results, one(twin, ends(x).double(), reference.unpacked(exact)))

    return Case(job.name(batch), batch, calls, check, on_record(job, tools, batch))


def head_case(job: Job, tools: Tools, batch: int) -> Case:
    """The last convolution with ReLU6 and the mean over all pixels."""
    like, layer = job.like(tools.device), job.layer
    x = randn(batch, layer.c_in, layer.height, layer.width, like=like)
    weight = (randn(layer.c_out, layer.c_in, 1, 1, like=like) * 2 / layer.c_in**0.5).contiguous()
    bias = torch.randn(layer.c_out, device=like.device)
    compiled = tools.compiled(reference.conv_relu6_mean)
    calls = {
        "ours": partial(one, conv_relu6_mean, x, weight, bias, backend="triton"),
        "eager": partial(one, reference.conv_relu6_mean, x, weight, bias),
        "compiled": partial(one, compiled, x, weight, bias),
    }

    def check(results: Results) -> None:
        truth = one(reference.conv_relu6_mean, ends(x).double(), weight.double(), bias.double())
        hold("features", results, truth)

    return Case(job.name(batch), batch, calls, check, on_record(job, tools, batch))


def inference_plan(job: Job, batch: int, like: Tensor) -> list[Call]:
    """Launches of a block, one or two, or of the head."""
    layer = job.layer
    if layer.kind == "head":
        tensors = head_tensors(layer.c_in, layer.c_out, layer.height, batch, like)
        launch = head_inference.conv_relu6_mean_launch(*tensors)
        return [Call("head", launch, head_inference.conv_relu6_mean_bytes(*tensors))]
    block = block_of(layer)
    tensors = block_tensors(block, batch, like)
    how = (block.stride, block.residual, "symmetric")
    launches = block_inference_passes.inverted_residual_launches(*tensors, *how, relu6_input=not block.expands)
    formulas = block_inference_passes.inverted_residual_bytes(*tensors, *how)
    return [Call(*call) for call in zip(("block", "block_project"), launches, formulas, strict=False)]


def on_record(job: Job, tools: Tools, batch: int) -> Counted:
    """Counts with the facts of the kernels that were compiled for the record beside the tiles."""
    layer, calls = job.layer, planned(inference_plan, job, tools.device, batch)
    if layer.kind == "head":
        c_mid, limits = layer.height * layer.width, common.limits(tools.device)
        tile: Any = tiles.head_tile(layer.c_in, layer.c_out, c_mid, job.like(META).element_size(), limits)
    else:
        x, packed, _ = block_tensors(block_of(layer), batch, job.like(META))
        tile = block_inference_passes.chosen_tile(x, packed, layer.stride, common.limits(tools.device))
        c_mid = layer.c_mid
    keys = [tiles.record_key(call.name, layer.c_in, c_mid, layer.c_out, layer.stride, tile) for call in calls]
    return counted(calls, tools.device, [tiles.record().get(key) for key in keys])
