"""BatchNorm whose statistics are those of the batches of several processes together, in torch's operations.

    mean, var of all n numbers of a channel, merged from every process's own (n_r, mean_r, M_r = sum (x - mean_r)^2):
    n = sum n_r,   mean = sum n_r mean_r / n,   n var = sum M_r + sum n_r (mean_r - mean)^2
    y = scale (x - mean) + beta,   rstd = 1 / sqrt(var + eps),   scale = gamma rstd
    dbeta = sum dy,   dgamma = rstd sum dy (x - mean)              of this process's numbers: DDP averages them
    dx = scale (dy - DBETA / n - (x - mean) rstd DGAMMA / n)       with their sums DBETA and DGAMMA over the processes

Saved for the backward: X, gamma and the merged record. Each direction gathers one record, ``[1 + 2 C]`` forwards and
``[2, C]`` backwards, and merges it in the order of ranks, so all processes have the same bits. Processes may have
batches of different sizes, or none.

Precision: sums over pixels are fp32 (fp64 of fp64), in two passes about the mean; records and what is computed of them
are fp64; running statistics are rounded to their own type.

Source: Ioffe and Szegedy 2015, algorithm 1; merging: Chan, Golub and LeVeque 1983.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import common, ranks
from .common import BatchNorm

_PIXELS = (0, 2, 3)


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wide(values: Tensor, x: Tensor) -> Tensor:
    """``values [C]`` beside the pixels of ``x``, in the type of its sums."""
    return values.to(_sum_type(x))[:, None, None]


def _moments(x: Tensor) -> Tensor:
    """Record ``[1 + 2 C]`` of the channels of ``x``: count, mean, sum of squares about it."""
    n = x.numel() // x.shape[1]
    mean = x.sum(_PIXELS, dtype=_sum_type(x)) / max(n, 1)
    d = x - mean[:, None, None]
    rest = d.sum(_PIXELS).double() / max(n, 1)  # what the mean's rounding left
    second = d.square_().sum(_PIXELS).double() - n * rest.square()
    return torch.cat([second.new_full((1,), n), mean.double() + rest, second.clamp_min_(0)])


def _split(record: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and second moment of records ``[..., 1 + 2 C]``."""
    C = record.shape[-1] // 2
    count, mean, second = record.split([1, C, C], -1)
    return count, mean, second


def _merge(records: Tensor) -> Tensor:
    """One record of ``records [R, 1 + 2 C]``."""
    count, mean, second = _split(records)
    total = count.sum(0)
    merged = (count * mean).sum(0) / total.clamp_min(1)
    return torch.cat([total, merged, (second + count * (mean - merged).square()).sum(0)])


def _variance(record: Tensor) -> Tensor:
    count, _, second = _split(record)
    return second / count.clamp_min(1)


@torch.library.custom_op("mnv2::sync_batch_norm_fwd", mutates_args=())
def sync_batch_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    """``x [N, C, H, W]`` normalised, and the record ``[1 + 2 C]`` of all processes."""
    record = _merge(ranks.gather(_moments(x), group))
    dtype = _sum_type(x)
    constants = [None if t is None else t.to(dtype) for t in (_split(record)[1], _variance(record), weight, bias)]
    mean, variance, weight, bias = constants
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), record


@torch.library.custom_op("mnv2::sync_batch_norm_grads", mutates_args=())
def sync_batch_norm_grads(
    dy: Tensor, x: Tensor, weight: Tensor | None, record: Tensor, eps: float, group: str, needs_dx: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of x (of no elements unless ``needs_dx``), and this process's of the weight and bias, ``[2, C]``."""
    count, mean, _ = _split(record)
    rstd = (_variance(record) + eps).rsqrt()
    d = x - _wide(mean, x)
    grads = torch.stack([(d * dy).sum(_PIXELS).double() * rstd, dy.sum(_PIXELS, dtype=d.dtype).double()])
    if not needs_dx:
        return x.new_empty(0), grads
    dgamma, dbeta = ranks.gather(grads, group).sum(0) / count.clamp_min(1)
    scale = rstd if weight is None else rstd * weight
    dx = d.mul_(_wide(-scale * rstd * dgamma, x)).add_(_wide(-scale * dbeta, x)).add_(dy * _wide(scale, x))
    return dx.to(x.dtype), grads


@sync_batch_norm_fwd.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(1 + 2 * x.shape[1], dtype=torch.float64)


@sync_batch_norm_grads.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, record: Tensor, eps: float, group: str, needs_dx: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x) if needs_dx else x.new_empty(0), record.new_empty(2, x.shape[1])


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "sync_batch_norm: its gradients can't be differentiated again; take nn.BatchNorm2d for second derivatives"
    )


sync_batch_norm_grads.register_autograd(_no_double_backward)


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: str
    ) -> tuple[Tensor, Tensor]:
        y, record = sync_batch_norm_fwd(x, weight, bias, eps, group)
        ctx.save_for_backward(x, weight, record)
        ctx.eps, ctx.group = eps, group
        ctx.bias_type = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(record)
        return y, record

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, record = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        dx, of_parameters = sync_batch_norm_grads(grads[0], x, weight, record, ctx.eps, ctx.group, needs_dx)
        dweight = of_parameters[0].to(weight.dtype) if needs_dw else None
        dbias = of_parameters[1].to(ctx.bias_type) if needs_db else None
        return dx if needs_dx else None, dweight, dbias, None, None


@torch.no_grad()
def _update_running(norm: BatchNorm, record: Tensor) -> None:
    """Count the batch, and move the running statistics towards it."""
    factor: Any = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if factor is None:  # without a counter torch's factor is 0
        factor = 0.0 if norm.num_batches_tracked is None else 1 / norm.num_batches_tracked.double()
    count, mean, second = _split(record)
    for running, batch in ((norm.running_mean, mean), (norm.running_var, second / (count - 1).clamp_min(1))):
        if running is not None:
            running.copy_(torch.lerp(running.double(), batch, factor))


def sync_batch_norm(x: Tensor, norm: BatchNorm) -> Tensor:
    """BatchNorm of ``x [N, C, H, W]`` over N, H and W in all processes of ``norm.group``; differentiable once.

    All of them must come here, forwards and backwards; a batch may be empty. The running statistics are updated as
    ``norm`` says, by all processes alike. Numbers that are alone in their channel, in all processes, become the bias.

    Args:
        x: floating-point, in any layout.
        norm: with ``batch_stats`` and a ``group``; its tensors may be of other floating-point types than x.

    Returns:
        As ``x``, in its type and layout.

    Raises:
        RuntimeError: there is no such group, or no longer.
        NotImplementedError: a gradient of a gradient is asked for.
    """
    common.check_image("x", x)
    if not (norm.batch_stats and norm.group):
        raise ValueError(f"norm: expected batch_stats and a group, got {norm.batch_stats} and {norm.group!r}")
    for name, tensor in zip(norm._fields[:4], norm[:4], strict=True):
        if tensor is not None and tensor.shape != x.shape[1:2]:
            raise ValueError(f"norm.{name}: expected x's {x.shape[1]} channels, got shape {tuple(tensor.shape)}")
    y, record = _SyncBatchNorm.apply(x, norm.weight, norm.bias, norm.eps, norm.group)
    _update_running(norm, record)
    return y


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that in training takes its statistics over all processes of ``group``.

    Arguments, parameters, buffers and state dict are ``nn.BatchNorm2d``'s. Unlike ``nn.SyncBatchNorm`` it runs on CPUs
    too. Where the group has no other process, or is the default one and ``torch.distributed`` isn't initialised, it is
    ``nn.BatchNorm2d``.
    """

    group: str  # by name: modules are copied and pickled, process groups can't be

    def __init__(self, *arguments: Any, group: dist.ProcessGroup | None = None, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.group = ranks.register(group)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``[N, C, H, W]``."""
        norm = batch_norm_of(self)
        return sync_batch_norm(input, norm) if norm.group else super().forward(input)


def batch_norm_of(module: nn.BatchNorm2d) -> BatchNorm:
    """What ``module`` is to an operation, in its present mode."""
    tracked = not module.training or module.track_running_stats
    return BatchNorm(
        module.weight,
        module.bias,
        module.running_mean if tracked else None,
        module.running_var if tracked else None,
        module.num_batches_tracked if tracked else None,
        batch_stats=module.training or module.running_mean is None,
        momentum=module.momentum,
        eps=module.eps,
        group=ranks.active(module.group) if isinstance(module, SyncBatchNorm2d) and module.training else "",
    )


def convert_sync_batchnorm(module: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Swap every ``nn.BatchNorm2d`` and ``nn.SyncBatchNorm`` inside ``module`` for a ``SyncBatchNorm2d``, in place.

    The new module holds the same parameters, buffers, hooks and training flag under the same name. Classes derived
    from ``nn.BatchNorm2d`` are left alone, as are modules whose forward has been replaced or compiled.

    Args:
        module: any network, or such a norm.
        group: the processes; None for the group that a norm has already, else the default one.

    Returns:
        ``module``, or what replaces it if it is itself such a norm.
    """
    made: dict[nn.Module, SyncBatchNorm2d] = {}  # a module that stands in two places is swapped for one
    for name, norm in list(module.named_modules(remove_duplicate=False)):
        if isinstance(norm, SyncBatchNorm2d):
            norm.group = norm.group if group is None else ranks.register(group)
        elif _is_plain(norm):
            if norm not in made:
                made[norm] = _with_group(norm, group)
            if norm is not module:
                module.set_submodule(name, made[norm])
    return made.get(module, module)


def _is_plain(module: nn.Module) -> bool:
    known = type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm)
    return known and "forward" not in module.__dict__ and module._compiled_call_impl is None


def _with_group(norm: nn.Module, group: dist.ProcessGroup | None) -> SyncBatchNorm2d:
    """A ``SyncBatchNorm2d`` that shares everything ``norm`` is: parameters, buffers, hooks, flags."""
    module = SyncBatchNorm2d.__new__(SyncBatchNorm2d)
    module.__dict__ = norm.__dict__.copy()
    own = module.__dict__.pop("process_group", None)  # nn.SyncBatchNorm's
    module.group = ranks.register(own if group is None else group)
    return module
