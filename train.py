"""Train MobileNetV2.

    torchrun --nproc_per_node 8 train.py --alpha 1.0 --resize 224 --data_url ./dataset/imagenet

Plain `python train.py` trains in one process. `--help` lists the flags.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mnv2 import MobileNetV2, checkpoint, layer_shapes, weights
from mnv2.config import InputError, TrainConfig, exit_status, parse
from mnv2.data import Augmentation, Loader, SyntheticLoader
from mnv2.distributed import World, world
from mnv2.engine import train_epoch
from mnv2.files import list_pictures, prepare
from mnv2.logs import epoch_lines
from mnv2.recipe import learning_rate, make_optimizer


def train(config: TrainConfig, world: World) -> str:
    """Train as ``config`` says and return the path of the checkpoint."""
    torch.manual_seed(config.seed)
    if world.rank == 0:
        checkpoint.prepare(config.ckpt_save_dir)
    loader, num_classes, classes = make_loader(config, world)
    model = make_model(config, num_classes, world)
    optimizer = make_optimizer(model, config)
    world.print(
        f"alpha {config.alpha}, {config.resize} px, {num_classes} classes, {len(loader)} steps an epoch of "
        f"{config.batch_size} x {world.size} pictures on {world.device.type}"
    )
    for epoch in range(config.epoch_size):
        start = time.perf_counter()
        lr = learning_rate(config, epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        result = train_epoch(model, loader, optimizer, world, config.smooth_factor)
        world.print(epoch_lines(epoch, config.epoch_size, result, lr, time.perf_counter() - start))
    path = os.path.join(config.ckpt_save_dir, "last.pt")
    if world.rank == 0:
        network = model.module if isinstance(model, DistributedDataParallel) else model
        checkpoint.save(path, network, config=config, classes=classes, epoch=config.epoch_size)
    return path


def make_loader(config: TrainConfig, world: World) -> tuple[Loader | SyntheticLoader, int, list[str] | None]:
    """The batches of an epoch, the number of classes and, where there are folders, their names by number."""
    if config.synthetic:
        num_classes = config.num_classes or 1000
        shape = {"resize": config.resize, "batch_size": config.batch_size}
        return SyntheticLoader(config.synthetic, num_classes, **shape, world=world, training=True), num_classes, None
    pictures, index = prepare(list_pictures(config.data_url, "train"), config, world, outputs=config.num_classes)
    num_classes = config.num_classes or len(index)
    loader = Loader(
        pictures.paths,
        index.labels(pictures.names),
        Augmentation(config.resize, config.crop_scale, config.crop_ratio, config.hflip),
        batch_size=config.batch_size,
        world=world,
        threads=config.threads,
        seed=config.seed,
    )
    return loader, num_classes, index.names(num_classes)


def make_model(config: TrainConfig, num_classes: int, world: World) -> nn.Module:
    """The network on its device, wrapped for several processes where there are several."""
    *_, head, _ = layer_shapes(config.alpha, config.resize)
    if config.batch_size * head.height * head.width == 1:
        raise InputError(
            f"--batch_size: expected 2 or more at --resize {config.resize}, for BatchNorm's statistics, got 1"
        )
    start = weights.find(config.pretrained, config.alpha, config.resize)
    model = MobileNetV2(config.alpha, num_classes, config.dropout, config.backend, config.padding)
    if start is not None:
        start.load_into(model)
        world.print(f"weights: {start.path}")
    model.to(world.device)
    if world.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    config = parse(TrainConfig, argv, "Train MobileNetV2.")

    def action() -> None:
        with world(config.device) as here:
            here.print(f"checkpoint: {train(config, here)}")

    return exit_status("train.py", action)


if __name__ == "__main__":
    sys.exit(main())
