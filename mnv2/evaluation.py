"""An evaluation as a run asks for it: pictures, network, and what is printed and written."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from .config import ValidateConfig
from .data import Loader, SyntheticLoader
from .distributed import World
from .engine import Evaluation, evaluate
from .files import Pictures, prepare
from .inputs import evaluation_loader
from .logs import evaluation_lines
from .precision import autocast, dtype
from .predictions import FIRST, by_imagenets_numbers, write
from .pretrained import build, follow
from .serving import folded
from .warmup import warm_up
from .weights import Weights


def evaluation(config: ValidateConfig, world: World, pictures: Pictures | None, trained: Weights | None) -> Evaluation:
    """Evaluate the weights ``trained`` on ``pictures``, made-up ones for None, and print what came out."""
    config = follow(config, trained, world.print)
    loader: Loader | SyntheticLoader
    classes, names = None, []
    if pictures is None:
        total, num_classes = config.synthetic, config.num_classes or (trained.num_classes if trained else 1000)
        loader = SyntheticLoader(
            total, num_classes, resize=config.resize, batch_size=config.batch_size, world=world, training=False
        )
    else:
        pictures, index, num_classes = prepare(pictures, config, world, trained)
        total = len(pictures)
        loader = evaluation_loader(config, world, pictures, index)
        names = index.names(num_classes)
        classes = names if config.per_class else None
    network = make_network(config, world, trained, num_classes)
    keep = min(FIRST, num_classes) if config.results or config.per_class else 0
    with autocast(config.precision, world.device):
        result = evaluate(network, loader, total, world, config.smooth_factor, keep=keep)
    world.print(evaluation_lines(result, config.smooth_factor, classes))
    if config.results and world.rank == 0:
        assert pictures is not None
        assert result.predictions is not None
        write(config.results, pictures.paths_below(), by_imagenets_numbers(result.predictions, names))
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
    network = folded(model, kind, " (--fold false goes without)") if config.fold else None
    if config.explain:
        world.print(model.explain(*shape, kind) if network is None else network.explain(*shape))
    warm_up(partial(model.warmup, *shape, kind) if network is None else partial(network.warmup, *shape), world)
    return model if network is None else network
