"""The one parity rule of the kernels' tests, and the memory that they are given.

A result is compared with torch's in fp64. Shape, type and finiteness come first; then its largest error may be twice
that of torch's own operation in the same type, plus a floor of one rounding of the largest value of the scale:

    max |got - truth| <= 2 max |torch's - truth| + eps(dtype) max |scale|

where the scale is the truth itself or, for the gradients of one block, the largest of them (a gradient that is zero in
truth would compare noise with noise). Outputs start as NaN, between guard bands that must come back as they were, and
inputs lie between bands of NaN, so that what is never written, written outside or read outside shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels import common

GUARD = 64  # elements on each side: a kernel's 16-byte loads stay aligned


def assert_parity(name: str, got: Tensor, truth: Tensor, torchs: Tensor, scale: float | None = None) -> None:
    """Hold ``got`` to ``truth`` (fp64) by the rule above, with ``torchs`` the same operation by torch in got's type."""
    assert truth.dtype == torch.float64
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert got.dtype == torchs.dtype, f"{name}: type {got.dtype}, expected {torchs.dtype}"
    if truth.numel() == 0:
        return
    got64, torchs64, truth = got.detach().cpu().double(), torchs.detach().cpu().double(), truth.detach().cpu()
    assert got64.isfinite().all(), f"{name}: {(~got64.isfinite()).sum()} of {got64.numel()} values are not finite"
    error = (got64 - truth).abs()
    allowed = (torchs64 - truth).abs().max().item() * 2
    allowed += torch.finfo(got.dtype).eps * (truth.abs().max().item() if scale is None else scale)
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert error.max() <= allowed, (
        f"{name}: error {error.max():.3e} at {worst} (got {got64[worst]:.6g}, truth {truth[worst]:.6g}), "
        f"allowed {allowed:.3e}"
    )


def guarded(x: Tensor) -> Tensor:
    """A copy of ``x`` in its layout between two bands of NaN."""
    y = _between_bands(tuple(x.shape), x.dtype, x.device, x.dim() == 4 and not x.is_contiguous())[0]
    return y.copy_(x)


def _between_bands(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """A tensor of NaN and the buffer in whose middle it lies."""
    if channels_last:
        N, C, H, W = shape
        shape = (N, H, W, C)
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
    inner = buffer[GUARD : GUARD + size].view(shape)
    return (inner.permute(0, 3, 1, 2) if channels_last else inner), buffer


@contextmanager
def guarded_allocations(patch: Callable[[object, str, object], None]) -> Iterator[None]:
    """Outputs and scratch of the kernels start as NaN between guard bands, which are looked at in the end.

    ``patch`` is ``monkeypatch.setattr``.
    """
    buffers: list[Tensor] = []

    def allocate(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        inner, buffer = _between_bands(shape, dtype or like.dtype, like.device, len(shape) == 4)
        buffers.append(buffer)
        return inner

    patch(common, "allocate", allocate)
    yield
    for buffer in buffers:
        for band in (buffer[:GUARD], buffer[-GUARD:]):
            assert band.isnan().all(), f"a kernel wrote outside a buffer of {buffer.numel() - 2 * GUARD} elements"
