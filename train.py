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

from mnv2 import MobileNetV2, checkpoint, layer_shapes
from mnv2.config import InputError, TrainConfig, exit_status, parse
from mnv2.data import Augmentation, Loader, SyntheticLoader
from mnv2.distributed import World, world
from mnv2.engine import train_epoch
from mnv2.files import list_pictures, prepare
from mnv2.logs import RunLog, epoch_lines, with_progress
from mnv2.recipe import learning_rate, make_optimizer
from mnv2.weights import Weights, find


def train(config: TrainConfig, world: World) -> str:
    """Train as ``config`` says and return the path of the checkpoint, which is written after each epoch."""
    if world.rank == 0:
        checkpoint.prepare(config.ckpt_save_dir)
    path = os.path.join(config.ckpt_save_dir, "last.pt")
    start = find(config.pretrained, config.alpha, config.resize)
    loader, num_classes, classes = make_loader(config, world, start)
    model = make_model(config, num_classes, world, start)
    optimizer = make_optimizer(model, config)
    world.print(
        f"alpha {config.alpha}, {config.resize} px, {num_classes} classes, {len(loader)} steps an epoch of "
        f"{config.batch_size} x {world.size} pictures on {world.device.type}"
    )
    with RunLog(config, world, steps=len(loader), num_classes=num_classes) as log:
        for epoch in range(config.epoch_size):
            began = time.perf_counter()
            lr = learning_rate(config, epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batches = with_progress(loader, len(loader), f"epoch {epoch}", world)
            result = train_epoch(model, batches, optimizer, world, config.smooth_factor)
            seconds = time.perf_counter() - began
            world.print(epoch_lines(epoch, config.epoch_size, result, lr, seconds))
            log.epoch(epoch, result, lr, seconds, result.steps * config.batch_size * world.size)
            if world.rank == 0:
                network = model.module if isinstance(model, DistributedDataParallel) else model
                checkpoint.save(path, network, config=config, classes=classes, epoch=epoch + 1)
    return path


def make_loader(
    config: TrainConfig, world: World, start: Weights | None
) -> tuple[Loader | SyntheticLoader, int, list[str] | None]:
    """The batches of an epoch, the outputs of the network and, where there are folders, the names of its classes."""
    if config.synthetic:
        num_classes = config.num_classes or (start.num_classes if start else 1000)
        shape = {"resize": config.resize, "batch_size": config.batch_size}
        return SyntheticLoader(config.synthetic, num_classes, **shape, world=world, training=True), num_classes, None
    pictures, index, num_classes = prepare(list_pictures(config.data_url, "train"), config, world, start)
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


def make_model(config: TrainConfig, num_classes: int, world: World, start: Weights | None) -> nn.Module:
    """The network on its device, wrapped for several processes where there are several."""
    *_, head, _ = layer_shapes(config.alpha, config.resize)
    if config.batch_size * head.height * head.width == 1:
        raise InputError(
            f"--batch_size: expected 2 or more at --resize {config.resize}, for BatchNorm's statistics, got 1"
        )
    torch.manual_seed(config.seed)
    model = MobileNetV2(config.alpha, num_classes, config.dropout, config.backend, config.padding, config.norm_eps)
    torch.manual_seed(config.seed + world.rank)  # a dropout of its own for each process
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
