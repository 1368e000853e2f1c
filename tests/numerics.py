"""The one parity rule of the kernels' tests, and the memory that they are given.

A result is compared with torch's in fp64. Shape, type and finiteness come first; then its largest error may be twice
that of torch's own operation in the same type, plus a floor of one rounding of the largest value of the scale:

    max |got - truth| <= 2 max |torch's - truth| + eps(dtype) max |scale|

where the scale is the truth itself or, for the gradients of one block, the largest of them (a gradient that is zero in
truth would compare noise with noise). In half precision the mean error of a large result is held closer, to 1.15 times
torch's: sums that are rounded on the way hide under the largest error, but not in the mean. Outputs start as NaN,
between guard bands that must come back as they were, and inputs lie between bands of NaN, so that what is never
written, written outside or read outside shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import common

LARGE = 512  # elements, from which a mean says something


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


class Calls(TorchDispatchMode):
    """Names of the project's operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mnv2":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


class GuardedMemory:
    """Where a test's tensors lie: inputs that it places, and the kernels' own buffers, which start as NaN.

    ``patch`` is ``monkeypatch.setattr``; ``band`` is the guard in elements, 0 for a sanitizer that knows itself where
    each tensor ends.
    """

    def __init__(self, patch: Callable[[object, str, object], None], band: int = 64):
        self.band = band  # 64 keeps a kernel's 16-byte loads aligned
        self.buffers: list[Tensor] = []
        patch(common, "allocate", self.allocate)
        patch(common, "allocate_like", lambda x: self.place(torch.full_like(x, float("nan"))))

    def place(self, x: Tensor) -> Tensor:
        """A copy of ``x``, in its layout."""
        channels_last = x.dim() == 4 and x.stride() == x.contiguous(memory_format=torch.channels_last).stride()
        return self._between_bands(tuple(x.shape), x.dtype, x.device, channels_last).copy_(x)

    def allocate(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """In place of ``kernels.common.allocate``."""
        return self._between_bands(shape, dtype or like.dtype, like.device, len(shape) == 4)

    def check(self) -> None:
        """Fail if a kernel wrote outside its buffers."""
        for buffer in self.buffers:
            for part in (buffer[: self.band], buffer[buffer.numel() - self.band :]):
                assert part.isnan().all(), (
                    f"a kernel wrote outside a buffer of {buffer.numel() - 2 * self.band} elements"
                )

    def _between_bands(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, channels_last: bool
    ) -> Tensor:
        if channels_last:
            N, C, H, W = shape
            shape = (N, H, W, C)
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * self.band,), float("nan"), dtype=dtype, device=device)
        self.buffers.append(buffer)
        inner = buffer[self.band : self.band + size].view(shape)
        return inner.permute(0, 3, 1, 2) if channels_last else inner
