"""What a case for a GPU is made of, a job, and how its results are held to the truth.

Results are held to the parity rule with torch's own ("eager") as the yardstick; of a batch of images, the first and the
last ones are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import common
from mnv2.model import LayerShape

from .count import Call
from .gpu_tools import Counted, Tools, counted
from .parity import assert_alike, assert_parity

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
HELD = 4  # images of each end of a batch whose numbers are compared
META = torch.device("meta")

Results = Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class Job:
    """An operation, perhaps which of its kinds, on a layer of the network, and a batch of a type."""

    operation: str
    layer: LayerShape
    dtype: str
    batch: int
    kind: str = ""

    def __str__(self) -> str:
        layer = self.layer
        widths = {"depthwise": (layer.c_mid,), "inference head": (layer.c_in, layer.c_out)}
        channels = "-".join(map(str, widths.get(self.operation, (layer.c_in, layer.c_mid, layer.c_out))))
        shape = f"{channels}x{layer.height}x{layer.width}/{layer.stride}"
        return " ".join(filter(None, (self.operation, self.kind, shape, self.dtype)))

    def name(self, batch: int) -> str:
        """Of the case of ``batch`` pictures."""
        return f"{self}, batch {batch}"

    def like(self, device: torch.device) -> Tensor:
        """No numbers, of the job's type."""
        return torch.empty(0, dtype=DTYPES[self.dtype], device=device)


Plan = Callable[[Job, int, Tensor], list[Call]]  # our launches of a job for so many pictures, like a tensor


def planned(plan: Plan, job: Job, device: torch.device, batch: int | None = None) -> list[Call]:
    """Our launches on ``device`` and their bytes, on meta tensors."""
    with common.planned_for(device):
        return plan(job, batch or job.batch, job.like(META))


def counts(plan: Plan, job: Job, tools: Tools, batch: int) -> Counted:
    """What is counted of our launches."""
    return counted(planned(plan, job, tools.device, batch), tools.device)


def randn(*shape: int, like: Tensor) -> Tensor:
    """Random numbers of like's type and device; images in channels_last."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.randn(shape, device=like.device).to(like.dtype).contiguous(memory_format=layout)


def ends(images: Tensor) -> Tensor:
    """The first and the last images of a batch, all of a small one."""
    if len(images) <= 2 * HELD:
        return images
    joined = torch.cat([images[:HELD], images[-HELD:]])
    return joined.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else joined


def hold(name: str, results: Results, truths: Sequence[Tensor], *, images: bool = True) -> None:
    """Hold all ``results`` to the ``truths``: ours by the largest error, peers by the mean.

    Of ``images`` the truths are those of the ends.
    """
    for number, truth in enumerate(truths):
        found = {side: result[number] for side, result in results.items()}
        for side, tensor in found.items():
            assert tensor.isfinite().all(), f"{name}, {side}: not all of its numbers are finite"
        if images:
            found = {side: ends(tensor) for side, tensor in found.items()}
        for side, tensor in found.items():
            if side.startswith("ours"):
                assert_parity(f"{name}, {side}", tensor, truth, found["eager"])
            else:
                assert_alike(f"{name}, {side}", tensor, truth, found["eager"], truth.abs().max().item())


def one(function: Callable[..., Tensor], *arguments: Any, **keywords: Any) -> tuple[Tensor]:
    """The result of a function that gives one, without gradients."""
    with torch.no_grad():
        return (function(*arguments, **keywords),)
