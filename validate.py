"""Evaluate MobileNetV2.

    python validate.py --alpha 0.75 --resize 192 --pretrained True --data_url ./dataset/imagenet

Under torchrun the pictures are shared out among the processes; the result is the same. `--help` lists the flags.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch

from mnv2 import MobileNetV2
from mnv2.config import RunError, ValidateConfig, check_backend, exit_status, parse
from mnv2.data import Loader, SyntheticLoader
from mnv2.distributed import World, world
from mnv2.engine import Evaluation, evaluate
from mnv2.files import list_pictures, prepare
from mnv2.fold import fold
from mnv2.inference import InferenceNetwork
from mnv2.inputs import evaluation_loader
from mnv2.logs import evaluation_lines
from mnv2.precision import autocast, dtype, numerics
from mnv2.warmup import warm_up
from mnv2.weights import build, find


def validate(config: ValidateConfig, world: World) -> Evaluation:
    """Evaluate as ``config`` says."""
    pictures = None if config.synthetic else list_pictures(config.data_url, "val", config.val_labels)
    trained = find(config.pretrained, config.alpha, config.resize, ema=config.ema)
    loader: Loader | SyntheticLoader
    if pictures is None:
        total, num_classes = config.synthetic, config.num_classes or (trained.num_classes if trained else 1000)
        loader = SyntheticLoader(
            total, num_classes, resize=config.resize, batch_size=config.batch_size, world=world, training=False
        )
    else:
        pictures, index, num_classes = prepare(pictures, config, world, trained)
        total = len(pictures)
        loader = evaluation_loader(config, world, pictures, index)
    torch.manual_seed(config.seed)
    model = build(config, num_classes, trained)
    world.print(
        f"alpha {config.alpha}, {config.resize} px, {num_classes} classes, preprocessing {config.preprocessing}, "
        f"weights: {trained or 'none, the network has learnt nothing'}"
    )
    model = model.to(world.device).eval()
    shape, kind = (config.batch_size, config.resize), dtype(config.precision)
    network = folded(model, kind) if config.fold else None
    if config.explain:
        world.print(model.explain(*shape, kind) if network is None else network.explain(*shape))
    warm_up(partial(model.warmup, *shape, kind) if network is None else partial(network.warmup, *shape), world)
    with autocast(config.precision, world.device):
        return evaluate(model if network is None else network, loader, total, world, config.smooth_factor)


def folded(model: MobileNetV2, kind: torch.dtype) -> InferenceNetwork:
    """The network with BatchNorm folded, in the precision asked for."""
    try:
        return fold(model, kind)
    except ValueError as error:
        raise RunError(f"can't fold BatchNorm (--fold false goes without): {error}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    config = parse(ValidateConfig, argv, "Evaluate MobileNetV2.")

    def action() -> None:
        with numerics(config.deterministic), world(config.device, config.run_distribute) as here:
            check_backend(config.backend, here.device)
            here.print(evaluation_lines(validate(config, here), config.smooth_factor))

    return exit_status("validate.py", action)


if __name__ == "__main__":
    sys.exit(main())
