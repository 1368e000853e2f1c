"""The one parity rule, of tests and benchmarks alike.

A result is compared with torch's in fp64. Shape, type and finiteness come first; then its largest error may be twice
that of torch's own operation in the same type, plus a floor of one rounding of the largest value of the scale:

    max |got - truth| <= 2 max |torch's - truth| + eps(dtype) max |scale|

where the scale is the truth itself or, for the gradients of one block, the largest of them (a gradient that is zero in
truth would compare noise with noise). In half precision the mean error of a large result is held closer, to 1.15 times
torch's: sums that are rounded on the way hide under the largest error, but not in the mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

LARGE = 512  # elements, from which a mean says something


@contextmanager
def ieee(*, benchmark: bool = False) -> Iterator[None]:
    """Inside, torch computes fp32 on a GPU without TF32: convolutions, by cuDNN, and products of matrices.

    An environment's variable may have allowed it for these. ``benchmark`` has cuDNN look for the fastest algorithm.
    """
    products = torch.backends.cuda.matmul
    before, products.allow_tf32 = products.allow_tf32, False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=False):
            yield
    finally:
        products.allow_tf32 = before


def assert_parity(
    name: str, got: Tensor, truth: Tensor, torchs: Tensor, scale: float | None = None, times: float = 2
) -> None:
    """Hold ``got`` to ``truth`` (fp64) by the rule above, with ``torchs`` the same operation by torch in got's type.

    ``times`` is how much larger than torch's error its own may be.
    """
    assert truth.dtype == torch.float64
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert got.dtype == torchs.dtype, f"{name}: type {got.dtype}, expected {torchs.dtype}"
    if truth.numel() == 0:
        return
    got64, torchs64, truth = got.detach().cpu().double(), torchs.detach().cpu().double(), truth.detach().cpu()
    assert got64.isfinite().all(), f"{name}: {(~got64.isfinite()).sum()} of {got64.numel()} values are not finite"
    assert torchs64.isfinite().all(), f"{name}: torch's own result isn't finite, so nothing can be held to it"
    error = (got64 - truth).abs()
    allowed = (torchs64 - truth).abs().max().item() * times
    allowed += torch.finfo(got.dtype).eps * (truth.abs().max().item() if scale is None else scale)
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert error.max() <= allowed, (
        f"{name}: error {error.max():.3e} at {worst} (got {got64[worst]:.6g}, truth {truth[worst]:.6g}), "
        f"allowed {allowed:.3e}"
    )
    if got.dtype != torch.float32 and got.numel() >= LARGE:
        rms, torchs_rms = error.square().mean().sqrt(), (torchs64 - truth).square().mean().sqrt()
        assert rms <= 1.15 * torchs_rms, f"{name}: mean error {rms:.3e}, torch's {torchs_rms:.3e}"


def assert_alike(name: str, got: Tensor, truth: Tensor, torchs: Tensor, scale: float) -> None:
    """The parity rule for the mean error: a number that rounding moves over an edge of ReLU6 moves a whole gradient."""
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert got.dtype == torchs.dtype, f"{name}: type {got.dtype}, expected {torchs.dtype}"
    truth = truth.detach().cpu()
    error, torchs_error = ((one.detach().cpu().double() - truth).square().mean().sqrt().item() for one in (got, torchs))
    allowed = 2 * torchs_error + torch.finfo(torch.float16).eps * scale
    assert error <= allowed, f"{name}: mean error {error:.3e}, allowed {allowed:.3e}"
