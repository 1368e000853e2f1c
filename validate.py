"""Evaluate MobileNetV2.

    python validate.py --alpha 0.75 --resize 192 --pretrained True --data_url ./dataset/imagenet

Under torchrun the pictures are shared out among the processes; the result is the same. `--help` lists the flags.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import torch
from torch import nn

from mnv2 import MobileNetV2
from mnv2.config import ValidateConfig, check_backend
from mnv2.data import Loader, SyntheticLoader
from mnv2.distributed import World, world
from mnv2.engine import Evaluation, evaluate
from mnv2.errors import RunError, exit_status
from mnv2.files import list_pictures, prepare
from mnv2.flags import parse
from mnv2.fold import fold
from mnv2.inference import InferenceNetwork
from mnv2.inputs import evaluation_loader
from mnv2.logs import evaluation_lines
from mnv2.precision import autocast, dtype, numerics
from mnv2.predictions import FIRST, check_place, write
from mnv2.pretrained import build, find, follow
from mnv2.warmup import warm_up
from mnv2.weights import Weights


def validate(config: ValidateConfig, world: World) -> Evaluation:
    """Evaluate as ``config`` says, and print what came out."""
    if config.results and world.rank == 0:
        check_place(config.results)
    pictures = None if config.synthetic else list_pictures(config.data_url, "val", config.val_labels)
    trained = find(config, world)
    config = follow(config, trained, world.print)
    loader: Loader | SyntheticLoader
    classes = None
    if pictures is None:
        total, num_classes = config.synthetic, config.num_classes or (trained.num_classes if trained else 1000)
        loader = SyntheticLoader(
            total, num_classes, resize=config.resize, batch_size=config.batch_size, world=world, training=False
        )
    else:
        pictures, index, num_classes = prepare(pictures, config, world, trained)
        total = len(pictures)
        loader = evaluation_loader(config, world, pictures, index)
        classes = index.names(num_classes) if config.per_class else None
    network = make_network(config, world, trained, num_classes)
    keep = min(FIRST, num_classes) if config.results or config.per_class else 0
    with autocast(config.precision, world.device):
        result = evaluate(network, loader, total, world, config.smooth_factor, keep=keep)
    if config.results and world.rank == 0:
        assert pictures is not None
        assert result.predictions is not None
        write(config.results, pictures.paths_below(), result.predictions)
    world.print(evaluation_lines(result, config.smooth_factor, classes))
    return result


def make_network(config: ValidateConfig, world: World, trained: Weights | None, num_classes: int) -> nn.Module:
    """The network on its device, with its weights, folded and compiled as ``config`` says."""
    torch.manual_seed(config.seed)
    model = build(config, num_classes, trained)
    world.print(
        f"alpha {config.alpha}, {config.resize} px, {num_classes} classes, preprocessing {config.preprocessing}, "
        f"weights: {trained.about() if trained else 'none, the network has learnt nothing'}"
    )
    model = model.to(world.device).eval()
    shape, kind = (config.batch_size, config.resize), dtype(config.precision)
    network = folded(model, kind) if config.fold else None
    if config.explain:
        world.print(model.explain(*shape, kind) if network is None else network.explain(*shape))
    warm_up(partial(model.warmup, *shape, kind) if network is None else partial(network.warmup, *shape), world)
    return model if network is None else network


def folded(model: MobileNetV2, kind: torch.dtype) -> InferenceNetwork:
    """The network with BatchNorm folded, in the precision asked for."""
    try:
        return fold(model, kind)
    except ValueError as error:
        raise RunError(f"can't fold BatchNorm (--fold false goes without): {error}") from None


def check_accuracy(config: ValidateConfig, result: Evaluation) -> None:
    """Raise RunError where top-1 isn't what ``config`` expects."""
    if config.expect is None:
        return
    # In decimal as typed: 0.7197 lies within 0.001 of 0.7187, which binary fractions don't.
    expect, tolerance = Fraction(str(config.expect)), Fraction(str(config.tolerance))
    if abs(Fraction(result.top1, result.pictures) - expect) > tolerance:
        raise RunError(
            f"--expect: top-1 is {result.top1 / result.pictures:.6g} ({result.top1} of {result.pictures}), expected "
            f"{config.expect:g} to within {config.tolerance:g}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    config = parse(ValidateConfig, argv, "Evaluate MobileNetV2.")

    def action() -> None:
        with numerics(config.deterministic), world(config.device, config.run_distribute) as here:
            check_backend(config.backend, here.device)
            result = validate(config, here)
        if here.rank == 0:  # all have parted, so that no other tells it again
            check_accuracy(config, result)

    return exit_status("validate.py", action)


if __name__ == "__main__":
    sys.exit(main())
