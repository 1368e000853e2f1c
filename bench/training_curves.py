"""Training through the kernels beside training through torch: the same loss, within what another order changes.

    python -m bench.training_curves [--steps 200] [--alpha 0.35] [--resize 64] [--batch 64] [--json FILE]

Three runs of ``mnv2.trainer`` from the same weights on the same made-up pictures, a pattern a class under noise: torch,
the kernels, and torch with the batches in another order, whose distance from the first is the yardstick. With means
over the last quarter of the steps it must hold that

    |kernels - torch| <= 2 |other order - torch| + 0.02 x the first loss

and that each run ends under its first loss.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F

from kernels.common import BACKENDS
from mnv2 import MobileNetV2
from mnv2.config import TrainConfig, check_backend
from mnv2.data import Batch
from mnv2.distributed import World
from mnv2.errors import InputError, RunError, exit_status
from mnv2.flags import option, parse
from mnv2.precision import dtype
from mnv2.trainer import Trainer
from mnv2.warmup import warm_up

from .figures import check_sizes, device_called
from .results import surroundings
from .timing import significant

CLASSES = 10
RATE = 0.02  # without a warm-up the recipe's own would first raise the loss
FLOOR = 0.02  # of the first loss
TORCH, KERNELS, OTHER_ORDER = "torch", "kernels", "torch, other order"


@dataclass(frozen=True)
class CurvesConfig:
    """What is trained."""

    steps: int = option(200, "steps of each run")
    alpha: float = option(0.35, "width multiplier")
    resize: int = option(64, "side of the pictures in pixels")
    batch: int = option(64, "pictures in a batch")
    precision: str = option("fp16", "fp32, or fp16 or bf16 by autocast", choices=("fp32", "fp16", "bf16"))
    backend: str = option("triton", "that is held to torch", choices=BACKENDS)
    device: str = option("cuda", "where all is trained", choices=("cuda", "cpu"))
    json: str | None = option(None, "write the curves there", metavar="FILE")

    def __post_init__(self) -> None:
        check_sizes(self.alpha, steps=self.steps, resize=self.resize, batch=self.batch)
        if self.steps < 8:
            raise InputError(f"steps: expected at least 8, got {self.steps}")


def pictures(config: CurvesConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """32 batches of pictures, a coarse pattern a class under as much noise, and their labels; the same each time."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=generator)
    labels = torch.randint(CLASSES, (32 * config.batch,), generator=generator)
    images = F.interpolate(patterns, size=(config.resize, config.resize), mode="bilinear")[labels]
    images += torch.randn(images.shape, generator=generator)
    return images.to(device, memory_format=torch.channels_last), labels.to(device)


def batches(config: CurvesConfig, images: torch.Tensor, labels: torch.Tensor, seed: int) -> Iterator[Batch]:
    """Batches without end, each pass over the pictures in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for numbers in torch.randperm(len(labels), generator=generator).split(config.batch):
            here = numbers.to(labels.device)
            chosen = images[here].contiguous(memory_format=torch.channels_last)
            yield Batch(chosen, labels[here], numbers)


def losses(config: CurvesConfig, device: torch.device, backend: str, order: int) -> list[float]:
    """Loss of each step."""
    torch.manual_seed(0)
    network = MobileNetV2(config.alpha, CLASSES, dropout=0.0, backend=backend).to(device)
    world = World(device=device)
    training = TrainConfig(
        alpha=config.alpha, resize=config.resize, batch_size=config.batch, precision=config.precision, max_lr=RATE
    )
    warm_up(partial(network.warmup, config.batch, config.resize, dtype(config.precision)), world)
    trainer = Trainer(network, training, world)
    trainer.start_epoch(0)
    stream = batches(config, *pictures(config, device), order)
    return torch.stack([trainer.step(stream) for _ in range(config.steps)]).tolist()


def verdict(curves: dict[str, list[float]]) -> dict[str, Any]:
    """Means over the last quarter, and the difference that is allowed.

    Raises:
        RunError: the curves don't hold what the head of this file says.
    """
    last = {name: fmean(curve[-(len(curve) // 4) :]) for name, curve in curves.items()}
    for name, curve in curves.items():
        if not last[name] < curve[0]:
            raise RunError(f"{name}: expected a last loss under the first, {curve[0]:.4f}, got {last[name]:.4f}")
    difference = abs(last[KERNELS] - last[TORCH])
    allowed = 2 * abs(last[OTHER_ORDER] - last[TORCH]) + FLOOR * curves[TORCH][0]
    figures = {
        "first_loss": significant(curves[TORCH][0]),
        "last_losses": {name: significant(value) for name, value in last.items()},
        "difference": significant(difference),
        "allowed": significant(allowed),
    }
    if not difference <= allowed:
        raise RunError(f"kernels and torch end {difference:.4f} apart, allowed {allowed:.4f}: {figures}")
    return figures


def run(config: CurvesConfig, words: Sequence[str]) -> None:
    """Train three times, and tell; ``words`` are the command's."""
    device = device_called(config.device)
    check_backend(config.backend, device)
    runs = {TORCH: ("torch", 1), KERNELS: (config.backend, 1), OTHER_ORDER: ("torch", 2)}
    curves = {name: losses(config, device, backend, order) for name, (backend, order) in runs.items()}
    if config.json is not None:
        path = Path(config.json)
        about = surroundings(["python", "-m", "bench.training_curves", *words], on_gpu=device.type == "cuda")
        record = {**about, "curves": curves}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
    figures = verdict(curves)
    print(
        f"{config.steps} steps, {config.precision}: " + ", ".join(f"{name} {value}" for name, value in figures.items())
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = parse(CurvesConfig, words, "Train through the kernels and through torch, and compare the losses.")
    return exit_status("bench.training_curves", lambda: run(config, words))


if __name__ == "__main__":
    sys.exit(main())
