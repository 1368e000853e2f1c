"""What a test of kernels watches: the project's operations that run, and the memory that kernels are given.

Outputs start as NaN, between guard bands that must come back as they were, and inputs lie between bands of NaN, so that
what is never written, written outside or read outside shows. The rule for numbers is ``bench.parity``'s.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import common


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
