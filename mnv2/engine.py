"""One epoch of training, and evaluation that counts every picture once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import RunError
from .data import Batch
from .distributed import World


@dataclass(frozen=True)
class TrainedEpoch:
    """An epoch's ``steps``, the loss of its last step and its mean, over all processes, and its seconds."""

    steps: int
    last_loss: float
    mean_loss: float
    seconds: float


def train_epoch(
    model: nn.Module, batches: Iterable[Batch], optimizer: torch.optim.Optimizer, world: World, smooth_factor: float
) -> TrainedEpoch:
    """Train ``model`` on ``batches`` once, with cross-entropy smoothed by ``smooth_factor``.

    Raises:
        RunError: the loss or a weight is no longer finite.
    """
    model.train()
    start = time.perf_counter()
    losses: list[Tensor] = []  # they stay on the device, so that no step waits for it
    for batch in batches:
        loss = F.cross_entropy(model(batch.images), batch.labels, label_smoothing=smooth_factor)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    means = world.sum(torch.stack(losses).double()) / world.size
    if not means.isfinite().all():
        step = int((~means.isfinite()).nonzero()[0])
        raise RunError(f"the loss of step {step + 1} is {means[step]}: try a lower --max_lr or a warm-up")
    # The loss was taken before the last update.
    if not torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all():
        raise RunError("a weight is no longer finite: try a lower --max_lr or a warm-up")
    return TrainedEpoch(len(losses), float(means[-1]), float(means.mean()), time.perf_counter() - start)


@dataclass(frozen=True)
class Evaluation:
    """How many of ``pictures`` were right at first (``top1``) or among the first five (``top5``).

    ``loss`` is the mean over the pictures. ``pictures_per_second`` counts all processes, from the moment that the first
    batch is ready.
    """

    pictures: int
    top1: int
    top5: int
    loss: float
    pictures_per_second: float


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], pictures: int, world: World, smooth_factor: float = 0.0
) -> Evaluation:
    """Evaluate ``model``, in eval mode, on the ``pictures`` that the processes' ``batches`` hold together.

    Each process fills a table with a row a picture; the tables are disjoint, so their sum is exact, and the result is
    the same to the last digit for any number of processes.

    Raises:
        RunError: a picture wasn't seen exactly once, or the network gives NaN.
    """
    model.eval()
    start = time.perf_counter()
    numbers: list[Tensor] = []
    results: list[Tensor] = []
    for batch in batches:
        logits = model(batch.images).float()
        loss = F.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=smooth_factor)
        numbers.append(batch.numbers)
        results.append(torch.stack([ranks(logits, batch.labels).double(), loss.double()]))
    table = torch.zeros(3, pictures, dtype=torch.float64)  # times seen, rank of the true class, loss
    if numbers:
        number = torch.cat(numbers)
        rows = torch.cat([torch.ones(1, len(number)), torch.cat(results, 1).cpu()])
        table.index_add_(1, number[number >= 0], rows[:, number >= 0])
    seen, rank, losses = world.sum(table)
    if not bool((seen == 1).all()):
        missed, repeated = int((seen == 0).sum()), int((seen > 1).sum())
        raise RunError(
            f"no accuracy: of {pictures} pictures listed, {missed} were not seen and {repeated} seen more than once"
        )
    undefined = int(losses.isnan().sum())
    if undefined:
        raise RunError(f"no accuracy: the network gives NaN for {undefined} of {pictures} pictures")
    seconds = time.perf_counter() - start
    return Evaluation(
        pictures=pictures,
        top1=int((rank < 1).sum()),
        top5=int((rank < 5).sum()),
        loss=math.fsum(losses.tolist()) / pictures,
        pictures_per_second=pictures / seconds,
    )


def ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes each row of ``logits [B, C]`` puts before the class in ``labels [B]``.

    Of equal logits the lower class comes first, as ``argmax`` has it. NaN comes before everything.
    """
    true = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    before = ~(logits < true) & ~((logits == true) & (classes >= labels[:, None]))
    return before.sum(1)


def wilson_interval(right: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a proportion of which ``right`` of ``total`` were seen (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)
