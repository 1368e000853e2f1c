"""The training block, its passes in order: what runs forward and backward, and what is kept between.

    forward    P1  mean and Gram matrix of X, from them BN1          P2  X -> D, and its moments for BN2
               P3  D -> P, and its moments for BN3                   P4  P (, X) -> Y
    backward   B0  dY, P -> sums of BN3; dP                          B1  D, dP -> dW2 and sums of BN2
               B2  X, D, dP -> dWd and T, S, dbeta1 or dZ1           B3  T or dZ1, X (, dY) -> dX

between them the finalisers of ``norms.py``, ``gram_norm.py``, ``norm_grads.py`` and ``expand_finalisers.py``.
``README.md`` derives them.

With statistics over several processes a finaliser runs on this process's partials, its record is gathered from all, and
it runs again on the stack: in rank order, so all processes have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import (
    common,
    expand_finalisers,
    expand_grads,
    gram_norm,
    moments,
    norm_grads,
    norm_passes,
    norms,
    ranks,
    training_tiles,
)
from .common import BatchNorm, Launch, Traffic, cdiv, launched
from .expand_depthwise import expand_depthwise_launch
from .expand_depthwise_grads import expand_depthwise_grads_launch
from .partials import sum_partials_launch
from .project import project_grads_launch, project_launch
from .weights import scaled_launch

Run = Callable[..., Launch]  # of a launcher and its arguments: ``common.launched``, or what records them


class Block(NamedTuple):
    """A block's parameters and what they do: ``w1 [c_mid, c_in, 1, 1]`` (None, as norm1, without an expansion),
    ``wd [c_mid, 1, 3, 3]``, ``w2 [c_out, c_mid, 1, 1]``, each dense in memory, of any floating-point type.
    """

    w1: Tensor | None
    wd: Tensor
    w2: Tensor
    norm1: BatchNorm | None
    norm2: BatchNorm
    norm3: BatchNorm
    stride: int
    padding: str
    residual: bool

    @property
    def c_mid(self) -> int:
        """Channels of the depthwise convolution."""
        return self.wd.shape[0]

    @property
    def c_out(self) -> int:
        """Channels of the output."""
        return self.w2.shape[0]


class Saved(NamedTuple):
    """What the backward needs of the forward, X aside: D and P, perhaps made again, and small statistics.

    ``stats [4, C]`` (fp32) are mean, rstd, scale and shift of each norm. ``gram [1 + c_in + c_in^2]`` are the moments
    of X over all processes and ``local`` this one's, ``count2`` and ``count3`` begin with the numbers behind BN2's and
    BN3's statistics; all fp64. What doesn't exist is an empty tensor, as operations return no None.
    """

    d: Tensor
    p: Tensor
    stats1: Tensor
    stats2: Tensor
    stats3: Tensor
    gram: Tensor
    local: Tensor
    count2: Tensor
    count3: Tensor


class Grads(NamedTuple):
    """Something for each input of a block that may want a gradient; those of a norm are ``[2, C]``: gamma's, beta's."""

    x: Any
    w1: Any
    norm1: Any
    wd: Any
    norm2: Any
    w2: Any
    norm3: Any


def new_saved(x: Tensor, block: Block) -> Saved:
    """Uninitialised, as ``forward`` on ``x [N, c_in, H, W]`` fills it."""
    N, c_in, H, W = x.shape
    H_out, W_out = cdiv(H, block.stride), cdiv(W, block.stride)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return common.allocate(shape, x, dtype)

    def record(length: int, norm: BatchNorm | None) -> Tensor:
        return new(length if norm is not None and norm.batch_stats else 0, dtype=torch.float64)

    c_mid, c_out = block.c_mid, block.c_out
    shared = block.norm1 is not None and block.norm1.group != ""
    return Saved(
        d=common.allocate((N, c_mid, H_out, W_out), x),
        p=common.allocate((N, c_out, H_out, W_out), x),
        stats1=new(4, c_mid) if block.norm1 is not None else new(0),
        stats2=new(4, c_mid),
        stats3=new(4, c_out),
        gram=record(1 + c_in + c_in**2, block.norm1),
        local=record(1 + c_in + c_in**2 if shared else 0, block.norm1),
        count2=record(1 + 2 * c_mid, block.norm2),
        count3=record(1 + 2 * c_out, block.norm3),
    )


def _normalise(
    run: Run, partials: Tensor, norm: BatchNorm, stats: Tensor, record: Tensor, kappa: Tensor | None = None
) -> None:
    """``stats`` and the running statistics of ``norm`` from ``partials [P, 1 + 2 C]``, over its processes."""
    if norm.group:
        run(norms.normalise_launch, partials, norm, stats, record, kappa, update=False)
        partials = ranks.gather(record, norm.group)
    run(norms.normalise_launch, partials, norm, stats, record, kappa)


def _normalise_expanded(run: Run, x: Tensor, w1: Tensor, norm: BatchNorm, saved: Saved) -> None:
    """BN1 of E, from the mean and Gram matrix of X; from E where those would lose too many digits."""
    c_mid, c_in = w1.shape
    partials = common.allocate((moments.gram_programs(x), len(saved.gram)), x, torch.float32)
    run(moments.gram_launch, x, partials)
    if norm.group:
        run(gram_norm.merge_gram_launch, partials, saved.local, c_in)
        partials = ranks.gather(saved.local, norm.group)
    run(gram_norm.merge_gram_launch, partials, saved.gram, c_in)
    kappa = common.allocate((c_mid,), x, torch.float32)
    run(gram_norm.normalise_gram_launch, saved.gram, w1, norm, saved.stats1, kappa)
    # Nobody asks the device whether a channel is flagged: where none is, these two return at once.
    partials = common.allocate((moments.direct_moments_programs(x, w1), 1 + 2 * c_mid), x, torch.float32)
    run(moments.direct_moments_launch, x, w1, saved.stats1, kappa, partials)
    record = common.allocate((1 + 2 * c_mid,), x, torch.float64)
    _normalise(run, partials, norm, saved.stats1, record, kappa)


def _expand_depthwise(
    run: Run, x: Tensor, w1: Tensor | None, block: Block, saved: Saved, *, statistics: bool
) -> Launch:
    return run(
        expand_depthwise_launch,
        x,
        w1,
        None if w1 is None else saved.stats1,
        block.wd,
        saved.d,
        block.stride,
        block.padding,
        moments=statistics,
    )


def rounded(weight: Tensor | None, like: Tensor) -> Tensor | None:
    """``weight [O, I, 1, 1]`` as ``[O, I]`` in the type of ``like``, as products take it: to TF32 where they are."""
    if weight is None:
        return None
    weight = weight.flatten(1).to(like.dtype)
    if common.multiplies_tf32(like):
        bits = weight.view(torch.int32) + 0x1000  # half of the last of TF32's ten bits; what is behind it goes
        weight = bits.bitwise_and_(-0x2000).view(torch.float32)
    return weight


def forward(x: Tensor, block: Block, y: Tensor, saved: Saved, run: Run = launched) -> None:
    """Run the block on ``x`` into ``y`` and ``saved``, and update the running statistics."""
    w1, w2 = rounded(block.w1, x), rounded(block.w2, x)
    assert w2 is not None
    if w1 is not None and block.norm1 is not None:
        if block.norm1.batch_stats:
            _normalise_expanded(run, x, w1, block.norm1, saved)
        else:
            run(norms.frozen_launch, block.norm1, saved.stats1)
    batch2, batch3 = block.norm2.batch_stats, block.norm3.batch_stats
    launch = _expand_depthwise(run, x, w1, block, saved, statistics=batch2)
    if batch2:
        _normalise(run, launch.arguments["partials_ptr"], block.norm2, saved.stats2, saved.count2)
    else:
        run(norms.frozen_launch, block.norm2, saved.stats2)
    launch = run(project_launch, saved.d, saved.stats2, w2, saved.p, moments=batch3)
    if batch3:
        _normalise(run, launch.arguments["partials_ptr"], block.norm3, saved.stats3, saved.count3)
    else:
        run(norms.frozen_launch, block.norm3, saved.stats3)
    run(norm_passes.apply_launch, saved.p, saved.stats3, x if block.residual else None, y)


def with_d_and_p(x: Tensor, block: Block, saved: Saved, run: Run = launched) -> Saved:
    """``saved`` with D and P made again, by its statistics and bit for bit."""
    fresh, w2 = new_saved(x, block), rounded(block.w2, x)
    assert w2 is not None
    saved = saved._replace(d=fresh.d, p=fresh.p)
    batch2 = block.norm2.batch_stats  # D is rounded otherwise where no moments are taken
    _expand_depthwise(run, x, rounded(block.w1, x), block, saved, statistics=batch2)
    run(project_launch, saved.d, saved.stats2, w2, saved.p, moments=False)
    return saved


def _norm_grads(run: Run, partials: Tensor, norm: BatchNorm, stats: Tensor, record: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (gamma's, beta's) ``[2, C]`` and coefs ``[3, C]`` of a norm, from ``partials [P, 2, C]``."""
    C, count = stats.shape[1], record if norm.batch_stats else None
    grads, coefs = common.allocate((2, C), stats), common.allocate((3, C), stats)
    sums = common.allocate((2, C), stats, torch.float64)
    run(norm_grads.norm_grads_launch, partials, stats, count, sums, grads, coefs)
    if norm.group and norm.batch_stats:
        unused = common.allocate_like(sums), common.allocate_like(grads)
        run(norm_grads.norm_grads_launch, ranks.gather(sums, norm.group), stats, count, *unused, coefs)
    return grads, coefs


def _sum(run: Run, partials: Tensor, like: Tensor) -> Tensor:
    """``partials [P, R, C]`` added over P, as ``like``: C filters of R numbers each."""
    out = common.allocate_like(like)
    run(sum_partials_launch, partials, out)
    return out


def _scaled(run: Run, weight: Tensor, factor: Tensor, *, rows: bool) -> Tensor:
    """``weight [O, I]``, as the forward has rounded it, times a factor for each row or column; in its type."""
    out = common.allocate(tuple(weight.shape), weight)
    run(scaled_launch, weight, factor, out, rows=rows)
    return out


def backward(dy: Tensor, x: Tensor, block: Block, saved: Saved, need: Grads, run: Run = launched) -> Grads:
    """Gradients that ``need`` asks for, from ``dy`` like Y; None for others, but where they are there anyway."""
    found = Grads(*[None] * len(Grads._fields))
    partials = common.allocate((norm_passes.sums_programs(saved.p), 2, block.c_out), x, torch.float32)
    run(norm_passes.sums_launch, dy, saved.p, saved.stats3, partials)
    grads3, coefs3 = _norm_grads(run, partials, block.norm3, saved.stats3, saved.count3)
    found = found._replace(norm3=grads3)
    front = need.x or need.w1 or need.norm1 or need.wd
    if not (front or need.norm2 or need.w2):
        return found
    dp, w2 = common.allocate(tuple(saved.p.shape), x), rounded(block.w2, x)
    assert w2 is not None
    run(norm_passes.projected_grad_launch, dy, saved.p, coefs3, dp)
    sums = run(project_grads_launch, saved.d, dp, w2, saved.stats2).arguments
    grads2, coefs2 = _norm_grads(run, sums["sums_ptr"], block.norm2, saved.stats2, saved.count2)
    found = found._replace(norm2=grads2, w2=_sum(run, sums["dw_ptr"], block.w2) if need.w2 else None)
    return _front(run, dy, dp, x, w2, block, saved, need, found, coefs2) if front else found


def _front(
    run: Run,
    dy: Tensor,
    dp: Tensor,
    x: Tensor,
    w2: Tensor,
    block: Block,
    saved: Saved,
    need: Grads,
    found: Grads,
    coefs2: Tensor,
) -> Grads:
    """The rest of ``backward``: from dP through the depthwise convolution and the expansion."""
    w1, residual = rounded(block.w1, x), dy if block.residual else None
    out, sums = _walk_back(run, x, dp, w1, w2, block, saved, coefs2)
    if need.wd:
        found = found._replace(wd=_sum(run, sums["taps_ptr"], block.wd))
    if w1 is None or block.norm1 is None:
        dx = out
        if residual is not None and need.x:
            dx = common.allocate_like(x)
            run(expand_grads.input_grad_launch, dx, out, dy=residual)
        return found._replace(x=dx)
    s, dbeta = sums["s_ptr"], sums["beta_ptr"]
    t, dz = (None, out) if s is None else (out, None)
    if s is None:
        programs, (c_mid, c_in) = expand_grads.expand_sums_programs(x, out), w1.shape
        s, dbeta = (common.allocate((programs, rows, c_mid), x, torch.float32) for rows in (c_in, 1))
        run(expand_grads.expand_sums_launch, x, out, s, dbeta)
    grads1, pull, dw1 = _expand_grads(run, s, dbeta, w1, block, saved)
    found = found._replace(w1=dw1, norm1=grads1)
    return found._replace(x=_input_grad(run, x, t, dz, w1, pull, residual, block.norm1, saved)) if need.x else found


def _walk_back(
    run: Run, x: Tensor, dp: Tensor, w1: Tensor | None, w2: Tensor, block: Block, saved: Saved, coefs2: Tensor
) -> tuple[Tensor, Mapping[str, Any]]:
    """B2: T or dZ1 (without an expansion dA), and the arguments of its launch, which have the partials of its sums."""
    thin = w1 is not None and w1.shape[1] <= training_tiles.THIN
    out = common.allocate(tuple(x.shape) if thin else (x.shape[0], block.c_mid, *x.shape[2:]), x)
    launch = run(
        expand_depthwise_grads_launch,
        x,
        saved.d,
        dp,
        w1,
        _scaled(run, w1, saved.stats1[2], rows=True) if thin and w1 is not None else None,
        None if w1 is None else saved.stats1,
        block.wd,
        _scaled(run, w2, coefs2[0], rows=False),
        saved.stats2,
        coefs2,
        out,
        block.stride,
        block.padding,
    )
    return out, launch.arguments


def _input_grad(
    run: Run,
    x: Tensor,
    t: Tensor | None,
    dz: Tensor | None,
    w1: Tensor,
    pull: Tensor,
    residual: Tensor | None,
    norm1: BatchNorm,
    saved: Saved,
) -> Tensor:
    """``x``'s, from T or dZ1 and from what BN1's statistics take back."""
    if t is not None and not norm1.batch_stats and residual is None:
        return t
    c_in = w1.shape[1]
    back: tuple[Tensor | None, ...] = (None, None, None, None)
    if norm1.batch_stats:
        matrix, scale = common.allocate((c_in, c_in), x), common.allocate((c_in,), x, torch.float32)
        vector = common.allocate((c_in,), x, torch.float32)
        run(expand_finalisers.pull_back_launch, w1, pull, saved.gram, matrix, scale, vector)
        back = (x, matrix, scale, vector)
    dx = common.allocate_like(x)
    run(expand_grads.input_grad_launch, dx, t, dz, w1, saved.stats1, *back, residual)
    return dx


def _expand_grads(
    run: Run, s: Tensor, dbeta: Tensor, w1: Tensor, block: Block, saved: Saved
) -> tuple[Tensor, Tensor, Tensor]:
    """Of partials of S and dbeta1: BN1's gradients ``[2, c_mid]``, what dX takes back of its statistics, and dW1."""
    assert block.w1 is not None
    assert block.norm1 is not None
    norm, (c_mid, c_in) = block.norm1, w1.shape
    s = _sum(run, s, s.new_empty((c_mid, c_in), dtype=torch.float64))
    dbeta = _sum(run, dbeta, s.new_empty((c_mid, 1))).flatten()
    gram = saved.gram if norm.batch_stats else None
    local = saved.local if norm.group and norm.batch_stats else None
    sums, pull = common.allocate((2, c_mid), s), common.allocate((2, c_mid), s)
    grads, dw1 = common.allocate((2, c_mid), s, torch.float32), common.allocate_like(block.w1)
    known = (s, dbeta, saved.stats1, w1, gram, local)
    over_ranks = None
    if local is not None:
        run(expand_finalisers.expand_weight_grad_launch, *known, None, None, sums, grads, None)
        over_ranks = ranks.gather(sums, norm.group).sum(0)
    run(expand_finalisers.expand_weight_grad_launch, *known, over_ranks, dw1, sums, grads, pull)
    return grads, pull, dw1


def planned(x: Tensor, block: Block, *, gradients: bool, save: str = "D") -> list[tuple[Launch, Traffic]]:
    """Launches of a block on ``x [N, c_in, H, W]`` and their bytes, the backward's too with ``gradients``.

    Nothing is run: tensors are best on the meta device.
    """
    found: list[tuple[Launch, Traffic]] = []

    def record(launcher: Callable[..., Launch], *arguments: Any, **keywords: Any) -> Launch:
        launch = launcher(*arguments, **keywords)
        found.append((launch, common.bytes_of(launcher)(*arguments, **keywords)))
        return launch

    N, _, H, W = x.shape
    y = common.allocate((N, block.c_out, cdiv(H, block.stride), cdiv(W, block.stride)), x)
    saved = new_saved(x, block)
    forward(x, block, y, saved, record)
    if gradients:
        if save == "X":
            with_d_and_p(x, block, saved, record)
        backward(y, x, block, saved, Grads(*[True] * len(Grads._fields)), record)
    return found
