"""The inverted residual in training, the operation: what torch sees of the passes in ``inverted_residual_passes.py``.

Saved for the backward: X, D, P and small statistics; or X alone, and D and P are made again. The expanded tensor is
never stored. Sums have a fixed order: two runs give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import common, measured, reference
from . import inverted_residual_passes as passes
from .block_checks import check_block
from .common import BatchNorm, cdiv
from .depthwise import depthwise_conv2d
from .inverted_residual_passes import Block, Grads, Saved
from .norms import count_batch

SAVES = ("D", "X")
Norm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # the tensors of a BatchNorm
NOTHING: Norm = (None, None, None, None, None)
# Of X and Y, those of alpha 1.4: products over them are unrolled, and with more a program's weights would not fit.
MAX_IN, MAX_OUT = 224, 448


def _block(
    w1: Tensor | None,
    wd: Tensor,
    w2: Tensor,
    norms: tuple[Norm, Norm, Norm],
    stride: int,
    residual: bool,
    padding: str,
    batch_stats: list[bool],
    momentum: list[float],
    eps: list[float],
    group1: str,
    group2: str,
    group3: str,
) -> Block:
    """A block from arguments of the operations below, where a momentum of NaN is None."""
    norm1, norm2, norm3 = (
        BatchNorm(*tensors, batch, None if rate != rate else rate, epsilon, group)
        for tensors, batch, rate, epsilon, group in zip(
            norms, batch_stats, momentum, eps, (group1, group2, group3), strict=True
        )
    )
    return Block(w1, wd, w2, None if w1 is None else norm1, norm2, norm3, stride, padding, residual)


def _new_output(x: Tensor, c_out: int, stride: int) -> Tensor:
    N, _, H, W = x.shape
    return common.allocate((N, c_out, cdiv(H, stride), cdiv(W, stride)), x)


def _split(norms: Sequence[BatchNorm]) -> tuple[list[Tensor | None], list[Tensor], list[bool]]:
    """All tensors of ``norms``; but those running statistics that a forward updates apart, and whose they are.

    Only what is written may be declared so: autograd refuses what it has saved of a tensor that was written since.
    """
    kept: list[Tensor | None] = []
    running: list[Tensor] = []
    tracked = []
    for weight, bias, mean, var, batches, batch_stats, *_ in norms:
        tracked.append(False)
        if batch_stats and mean is not None and var is not None:
            tracked[-1] = True
            running += [mean, var]
            mean = var = None
        kept += [weight, bias, mean, var, batches]
    return kept, running, tracked


def _together(
    kept: Sequence[Tensor | None], running: Sequence[Tensor], tracked: Sequence[bool]
) -> tuple[Norm, Norm, Norm]:
    """What ``_split`` has made two of."""
    updated = iter(running)

    def norm(i: int) -> Norm:
        weight, bias, mean, var, batches = kept[5 * i : 5 * i + 5]
        if tracked[i]:
            mean, var = next(updated), next(updated)
        return weight, bias, mean, var, batches

    return norm(0), norm(1), norm(2)


# An operation that changes some of its inputs may return a tuple, but no list: torch.compile can't trace it else.
_YAndSaved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _forward(
    x: Tensor,
    w1: Tensor | None,
    wd: Tensor,
    w2: Tensor,
    norms: Sequence[Tensor | None],
    running: list[Tensor],
    tracked: list[bool],
    stride: int,
    residual: bool,
    padding: str,
    batch_stats: list[bool],
    momentum: list[float],
    eps: list[float],
    group1: str,
    group2: str,
    group3: str,
) -> _YAndSaved:
    """Y and what ``Saved`` names; updates ``running``. It and ``norms`` and ``tracked`` are as ``_split`` has them."""
    there = _together(norms, running, tracked)
    block = _block(w1, wd, w2, there, stride, residual, padding, batch_stats, momentum, eps, group1, group2, group3)
    y, saved = _new_output(x, block.c_out, stride), passes.new_saved(x, block)
    passes.forward(x, block, y, saved)
    return y, *saved


_fwd = torch.library.custom_op("mnv2::inverted_residual_fwd", _forward, mutates_args=("running",))


@_fwd.register_fake
def _(
    x: Tensor,
    w1: Tensor | None,
    wd: Tensor,
    w2: Tensor,
    norms: Sequence[Tensor | None],
    running: list[Tensor],
    tracked: list[bool],
    *how: Any,
) -> _YAndSaved:
    block = _block(w1, wd, w2, (NOTHING, NOTHING, NOTHING), *how)
    return _new_output(x, block.c_out, block.stride), *passes.new_saved(x, block)


@torch.library.custom_op("mnv2::inverted_residual_bwd", mutates_args=())
def _bwd(
    dy: Tensor,
    x: Tensor,
    w1: Tensor | None,
    wd: Tensor,
    w2: Tensor,
    saved: list[Tensor],
    needs: list[bool],
    stride: int,
    residual: bool,
    padding: str,
    batch_stats: list[bool],
    momentum: list[float],
    eps: list[float],
    group1: str,
    group2: str,
    group3: str,
) -> list[Tensor]:
    """Gradients that ``needs`` asks for, in the order of ``Grads``; D and P are made again where they are empty."""
    norms = (NOTHING, NOTHING, NOTHING)  # what a forward has made of them is in ``saved``
    block = _block(w1, wd, w2, norms, stride, residual, padding, batch_stats, momentum, eps, group1, group2, group3)
    state = Saved(*saved)
    if not state.d.numel():
        state = passes.with_d_and_p(x, block, state)
    found = passes.backward(dy, x, block, state, Grads(*needs))
    return [grad if need else x.new_empty(0) for grad, need in zip(found, needs, strict=True)]


@_bwd.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    w1: Tensor | None,
    wd: Tensor,
    w2: Tensor,
    saved: list[Tensor],
    needs: list[bool],
    *how: Any,
) -> list[Tensor]:
    mid, out = (x.new_empty((2, channels), dtype=torch.float32) for channels in (wd.shape[0], w2.shape[0]))
    found = Grads(x, x if w1 is None else w1, mid, wd, mid, w2, out)
    return [torch.empty_like(grad) if need else x.new_empty(0) for grad, need in zip(found, needs, strict=True)]


def _no_double_backward(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "inverted_residual: its gradients can't be differentiated again; take backend='torch' for second derivatives"
    )


_bwd.register_autograd(_no_double_backward)


class _InvertedResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        save: str,
        running: list[Tensor],
        tracked: list[bool],
        how: tuple[Any, ...],
        x: Tensor,
        w1: Tensor | None,
        wd: Tensor,
        w2: Tensor,
        *norms: Tensor | None,
    ) -> Tensor:
        if common.dispatched(x, wd, w2):
            y, *saved = _fwd(x, w1, wd, w2, norms, running, tracked, *how)
        else:  # torch's way to an operation that changes its inputs takes the host as long as the passes do
            y, *saved = _forward(x, w1, wd, w2, norms, running, tracked, *how)
            torch.autograd.graph.increment_version(running)
        if save == "X":
            state = Saved(*saved)
            saved = [*state._replace(d=x.new_empty(0), p=x.new_empty(0))]
        ctx.how = how
        ctx.types = [None if tensor is None else tensor.dtype for tensor in norms]
        ctx.save_for_backward(x, w1, wd, w2, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, wd, w2, *saved = ctx.saved_tensors
        x, *saved = map(_nhwc, (x, *saved))
        need_x, need_w1, need_wd, need_w2, *need = ctx.needs_input_grad[4:]
        affine = [need[i] or need[i + 1] for i in (0, 5, 10)]
        needs = [need_x, need_w1, affine[0], need_wd, affine[1], need_w2, affine[2]]
        dy = grads[0].contiguous(memory_format=torch.channels_last)  # autograd's to choose: sum() sends one number
        found = Grads(*_bwd(dy, x, w1, wd, w2, saved, needs, *ctx.how))
        norms: list[Tensor | None] = [None] * 15
        for first, pair in zip((0, 5, 10), (found.norm1, found.norm2, found.norm3), strict=True):
            for i in (0, 1):
                if need[first + i]:
                    norms[first + i] = pair[i].to(ctx.types[first + i])
        front = (found.x, found.w1, found.wd, found.w2)
        asked = (need_x, need_w1, need_wd, need_w2)
        return None, None, None, None, *(g if n else None for g, n in zip(front, asked, strict=True)), *norms


def _nhwc(tensor: Tensor) -> Tensor:
    """A saved tensor as it was: hooks for saved tensors, as ``save_on_cpu``, may give another layout back."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)


def unsupported(x: Tensor, w1: Tensor | None, wd: Tensor, w2: Tensor) -> str | None:
    """Why the kernels can't run a block on ``x``, naming the argument, or None if they can."""
    if problem := common.unsupported_device(x.device):
        return f"x: {problem}"
    dtype = common.autocast_dtype(x) or x.dtype
    if dtype not in common.DTYPES:
        return f"x: expected float16, bfloat16 or float32, got {dtype}"
    if problem := common.not_nhwc(x):
        return f"x: {problem}"
    if x.shape[0] * x.shape[2] * x.shape[3] >= 2**31:
        return f"x: expected fewer than 2^31 pixels, got shape {tuple(x.shape)}"
    if w1 is not None and x.shape[1] > MAX_IN:
        return f"x: expected at most {MAX_IN} channels, got {x.shape[1]}"
    if w2.shape[0] > MAX_OUT:
        return f"project_weight: expected at most {MAX_OUT} channels, got {w2.shape[0]}"
    if wd.shape[2:] != (3, 3):
        return f"depthwise_weight: expected a kernel of 3 x 3, got {wd.shape[2]} x {wd.shape[3]}"
    for name, weight in (("expand_weight", w1), ("depthwise_weight", wd), ("project_weight", w2)):
        if weight is not None and not _dense(weight):
            return f"{name}: expected dense memory, got strides {weight.stride()} for shape {tuple(weight.shape)}"
    return None


def why_torch(x: Tensor, w1: Tensor | None, wd: Tensor, w2: Tensor, stride: int, backend: str) -> str | None:
    """Why torch runs a block on ``x`` where ``backend`` is asked for, or None.

    What was measured is forward and backward together, and counts without gradients too: so all processes, and a
    forward that is made again, take one path.

    Raises:
        ValueError: ``backend`` is "triton", and the kernels can't.
    """
    why = common.why_torch(backend, x.device, lambda: unsupported(x, w1, wd, w2))
    dtype = common.autocast_dtype(x) or x.dtype
    if why is None and backend == "auto" and dtype == torch.float32 and not common.tf32_allowed():
        return "IEEE fp32 has no tensor cores"  # hundreds of instructions an element
    if why is None and backend == "auto":
        _, c_in, H, W = x.shape
        sizes = dict(c_in=c_in, c_mid=wd.shape[0], c_out=w2.shape[0], H=H, W=W, stride=stride)
        return measured.why_torch("training block", x.device, dtype, **sizes)
    return why


def inverted_residual(
    x: Tensor,
    expand_weight: Tensor | None,
    expand_norm: BatchNorm | None,
    depthwise_weight: Tensor,
    depthwise_norm: BatchNorm,
    project_weight: Tensor,
    project_norm: BatchNorm,
    *,
    stride: int,
    residual: bool,
    padding: str = "symmetric",
    backend: str = "auto",
    save: str = "D",
) -> Tensor:
    """Inverted residual in training: expand 1x1, depthwise 3x3, project 1x1, each with BatchNorm, ReLU6 between.

    Forward, nothing of c_mid channels is written but D, the depthwise convolution's output; backward, where c_in is
    more than 32, a gradient of them. Differentiable once.

    Args:
        x: ``[N, c_in, H, W]`` in channels_last; fp16, bf16 or fp32. Under autocast it is cast to autocast's type.
        expand_weight: ``[c_mid, c_in, 1, 1]``, or None (with ``expand_norm``) for expand ratio 1, where c_mid is c_in.
        expand_norm: BatchNorm over c_mid channels, by the batch's statistics or by the running ones.
        depthwise_weight: ``[c_mid, 1, 3, 3]``.
        depthwise_norm: BatchNorm over c_mid channels.
        project_weight: ``[c_out, c_mid, 1, 1]``.
        project_norm: BatchNorm over c_out channels.
        stride: 1 or 2, of the depthwise convolution.
        residual: add ``x`` to the result; needs stride 1 and c_in equal to c_out.
        padding: of the depthwise convolution, "symmetric" or TensorFlow's "same".
        backend: "triton" runs the kernels or says why it can't; "torch" runs torch's operations; "auto" runs the
            kernels on NVIDIA GPUs from compute capability 8.0 on, fp32 only where torch's convolutions may be TF32
            (``torch.backends.cudnn``), and elsewhere torch's operations around ``depthwise_conv2d``, and where
            ``python -m bench.tune`` has measured those to be faster on this device.
        save: what the backward has of the forward: "D" keeps X, D and P; "X" keeps X and makes the others again.

    Weights have x's type, or under autocast any floating-point type, norms always any: the kernels round W1 and W2 to
    x's, and gradients are returned in their own. Statistics are fp32 (fp64 where they are merged), BN1's of E as the
    rounded W1 makes it.

    Returns:
        ``[N, c_out, ceil(H / stride), ceil(W / stride)]`` in channels_last, in x's type or autocast's.

    Processes whose norms share their statistics must all take the same path: give them one ``backend`` other than
    "auto" where their GPUs differ.

    NaN: the kernels' clamp makes an expanded or depthwise value of NaN 0, where torch's keeps it.

    Raises:
        TypeError: an argument is of another type, or x or a weight not floating-point.
        ValueError: shapes, layout, stride, residual or padding make no such block, a norm over the batch has one number
            of each channel, or ``backend="triton"`` can't run it; both messages name the argument.
        NotImplementedError: a gradient of a gradient is asked for.

    ``torch.func``'s transforms want ``backend="torch"``.

    Source: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", table 1; the passes and their
    derivation are in ``kernels/README.md``.
    """
    common.check_choice("backend", backend, common.BACKENDS)
    common.check_choice("save", save, SAVES)
    norms = (expand_norm, depthwise_norm, project_norm)
    check_block(x, expand_weight, depthwise_weight, project_weight, norms, stride, residual, padding)
    dtype = common.autocast_dtype(x)
    x = x if dtype is None else x.to(dtype)
    if why_torch(x, expand_weight, depthwise_weight, project_weight, stride, backend) is not None:
        return reference.inverted_residual(
            x,
            expand_weight,
            expand_norm,
            depthwise_weight,
            depthwise_norm,
            project_weight,
            project_norm,
            stride=stride,
            residual=residual,
            padding=padding,
            depthwise=functools.partial(depthwise_conv2d, backend=backend),
        )
    there = [norm or BatchNorm(None, None, None, None, None, False) for norm in norms]
    for norm in there:
        count_batch(norm)
    how = (
        stride,
        residual,
        padding,
        [norm.batch_stats for norm in there],
        [float("nan") if norm.momentum is None else float(norm.momentum) for norm in there],
        [float(norm.eps) for norm in there],
        *(norm.group if norm.batch_stats else "" for norm in there),
    )
    kept, running, tracked = _split(there)
    weights = (expand_weight, depthwise_weight, project_weight)
    return _InvertedResidual.apply(save, running, tracked, how, x, *weights, *kept)
