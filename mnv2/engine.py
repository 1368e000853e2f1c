"""The steps of an epoch of training, and evaluation that counts every picture once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Batch
from .distributed import World
from .errors import RunError
from .predictions import Predictions, first_classes
from .trainer import Trainer


class NotFiniteError(RunError):
    """The network gives NaN where an evaluation wanted numbers; all processes agree on it."""


@dataclass
class Progress:
    """Where a run stands: ``step`` steps of ``epoch`` (from 0) are done, in ``seconds``.

    ``losses`` are those of these steps, means over all processes; ``pending`` holds this process's share of those that
    are not fetched yet. ``best_top1`` is the best share of right pictures so far, after ``best_epoch`` epochs; None
    before the first evaluation.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    best_top1: float | None = None
    best_epoch: int | None = None
    pending: list[Tensor] = field(default_factory=list)

    @property
    def mean_loss(self) -> float:
        """Mean of ``losses``."""
        return math.fsum(self.losses) / len(self.losses)

    def next_epoch(self) -> None:
        """The epoch is over, the next one begins."""
        self.epoch, self.step, self.seconds, self.losses = self.epoch + 1, 0, 0.0, []

    def state(self) -> dict[str, Any]:
        """Plain values by name, for ``Progress(**state)``."""
        assert not self.pending
        return {name: value for name, value in vars(self).items() if name != "pending"}


def train_steps(trainer: Trainer, batches: Iterable[Batch], progress: Progress, steps: int) -> Iterator[int]:
    """Train on ``batches`` up to step ``steps`` of the epoch; the number of each step comes after it."""
    remaining = iter(batches)
    while progress.step < steps:
        start = time.perf_counter()
        progress.pending.append(trainer.step(remaining))
        progress.step += 1
        progress.seconds += time.perf_counter() - start
        yield progress.step


def settle(progress: Progress, trainer: Trainer, world: World) -> None:
    """Fetch the pending losses from the device, for which the host waits until the steps are done.

    Raises:
        RunError: a loss or a weight is no longer finite.
    """
    if not progress.pending:
        return
    start = time.perf_counter()
    means = world.sum(torch.stack(progress.pending).double()) / world.size
    if not means.isfinite().all():
        bad = int((~means.isfinite()).nonzero()[0])
        step = progress.step - len(means) + bad + 1
        raise RunError(f"the loss of step {step} is {means[bad]}: try a lower learning rate or a warm-up")
    # The loss was taken before the last update.
    if not torch.stack([parameter.isfinite().all() for parameter in trainer.network.parameters()]).all():
        raise RunError("a weight is no longer finite: try a lower learning rate or a warm-up")
    progress.losses += means.tolist()
    progress.pending.clear()
    progress.seconds += time.perf_counter() - start


@dataclass(frozen=True)
class Evaluation:
    """How many of ``pictures`` were right at first (``top1``) or among the first five (``top5``).

    ``loss`` is the mean over the pictures. ``pictures_per_second`` counts all processes, from the moment that the first
    batch is ready. ``predictions`` are there where they were asked for.
    """

    pictures: int
    top1: int
    top5: int
    loss: float
    pictures_per_second: float
    predictions: Predictions | None = field(default=None, compare=False, repr=False)


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], pictures: int, world: World, smooth_factor: float = 0.0, keep: int = 0
) -> Evaluation:
    """Evaluate ``model``, in eval mode, on the ``pictures`` that the processes' ``batches`` hold together.

    Each process fills a table with a row a picture; the tables are disjoint, so their sum is exact, and the result is
    the same to the last digit for any number of processes. ``keep`` is how many classes, at most those of the network,
    the predictions hold for each picture; 0 for no predictions.

    Raises:
        RunError: a picture wasn't seen exactly once.
        NotFiniteError: the network gives NaN.
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
        if keep:
            results[-1] = torch.cat([results[-1], *_kept(logits, batch.labels, keep)])
    # Times seen, rank of the true class, loss; label, classes, probabilities.
    table = torch.zeros(3 + (1 + 2 * keep if keep else 0), pictures, dtype=torch.float64)
    if numbers:
        number = torch.cat(numbers)
        rows = torch.cat([torch.ones(1, len(number)), torch.cat(results, 1).cpu()])
        table.index_add_(1, number[number >= 0], rows[:, number >= 0])
    seen, rank, losses, *kept = world.sum(table)
    if not bool((seen == 1).all()):
        missed, repeated = int((seen == 0).sum()), int((seen > 1).sum())
        raise RunError(
            f"no accuracy: of {pictures} pictures listed, {missed} were not seen and {repeated} seen more than once"
        )
    undefined = int(losses.isnan().sum())
    if undefined:
        raise NotFiniteError(f"no accuracy: the network gives NaN for {undefined} of {pictures} pictures")
    seconds = time.perf_counter() - start
    return Evaluation(
        pictures=pictures,
        top1=int((rank < 1).sum()),
        top5=int((rank < 5).sum()),
        loss=math.fsum(losses.tolist()) / pictures,
        pictures_per_second=pictures / seconds,
        predictions=_predictions(torch.stack(kept), keep) if keep else None,
    )


def _kept(logits: Tensor, labels: Tensor, keep: int) -> list[Tensor]:
    """What ``_predictions`` takes apart, a column a picture; fp64 holds class numbers and fp32 exactly."""
    classes, probabilities = first_classes(logits, keep)
    return [labels[None].double(), classes.t().double(), probabilities.t().double()]


def _predictions(rows: Tensor, keep: int) -> Predictions:
    label, classes, probabilities = rows.split([1, keep, keep])
    return Predictions(label[0].long(), classes.t().long(), probabilities.t())


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
