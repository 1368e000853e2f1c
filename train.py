"""Train MobileNetV2.

    torchrun --nproc_per_node 8 train.py --alpha 1.0 --resize 224 --data_url ./dataset/imagenet

Plain `python train.py` trains in one process, `mpirun -n 8 python train.py` in eight. `--help` lists the flags.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch

from mnv2 import MobileNetV2, checkpoint
from mnv2.checkpoint import Saved
from mnv2.config import TrainConfig, check_backend
from mnv2.distributed import StopSignals, World, world
from mnv2.engine import Progress
from mnv2.errors import InputError, exit_status
from mnv2.flags import parse
from mnv2.inputs import TrainingData, evaluation_loader, find_training_data, training_loader
from mnv2.logs import RunLog
from mnv2.precision import dtype, numerics
from mnv2.pretrained import build, find, follow
from mnv2.session import Session
from mnv2.trainer import Trainer
from mnv2.warmup import warm_up
from mnv2.weights import Weights


def train(config: TrainConfig, world: World) -> str:
    """Train as ``config`` says and return the path of the checkpoint, which is written after each epoch.

    Raises:
        InputError: something that ``config`` names is wrong.
        RunError: training has diverged, or a checkpoint can't be written.
        Stopped: a signal came; everything is saved.
    """
    saved = checkpoint.resume(config, world)
    if saved is not None:
        config = follow(config, saved.weights())
        saved.check_run(config, world)
        if saved.epochs >= config.epoch_size:
            world.print(f"{saved.path} has done {saved.epochs} epochs of {config.epoch_size}: nothing is left to do")
            return saved.path
    with checkpoint.open_folder(config) if world.rank == 0 else nullcontext():
        run(config, world, saved)
    return os.path.join(config.ckpt_save_dir, checkpoint.LAST)


def run(config: TrainConfig, world: World, saved: Saved | None) -> None:
    """Train to the end, from ``saved`` on where there is something."""
    start = saved.weights() if saved is not None else find(config, world)
    if start is None and config.freeze != "none":
        raise InputError("--freeze: expected --pretrained FILE with features that have learnt something, got none")
    config = follow(config, start, world.print)
    data = find_training_data(config, world, start)
    if saved is not None:
        saved.check_data(data)
    loader = training_loader(config, world, data, saved.loader_state(world) if saved is not None else None)
    validation = None
    if data.validation is not None and data.index is not None:
        validation = evaluation_loader(config, world, data.validation, data.index)
    steps = len(loader) * config.repeat_num // config.grad_accum_steps
    world.print(
        f"alpha {config.alpha}, {config.resize} px, {data.num_classes} classes, {steps} steps an epoch of "
        f"{config.batch_size * config.grad_accum_steps} x {world.size} pictures on {world.device.type}"
    )
    network = make_network(config, world, data)
    if start is not None and saved is None:
        load(start, network, data, world)
    warm_up(partial(network.warmup, config.batch_size, config.resize, dtype(config.precision)), world)
    trainer = Trainer(network, config, world)
    progress = saved.restore(trainer, config, data, world) if saved is not None else Progress()
    log = RunLog(config, world, progress, steps=steps, num_classes=data.num_classes)
    if world.rank == 0 and not (saved is not None and saved.own):
        earlier = checkpoint.set_aside(config.ckpt_save_dir, saved.path if saved is not None else None)
        if earlier is not None:
            world.print(f"the checkpoints of an earlier run are in {earlier} now")
    with log, StopSignals(world) as stop:
        session = Session(
            config=config,
            world=world,
            data=data,
            trainer=trainer,
            loader=loader,
            validation=validation,
            progress=progress,
            steps=steps,
            log=log,
            stop=stop,
        )
        while progress.epoch < config.epoch_size:
            session.epoch()


def make_network(config: TrainConfig, world: World, data: TrainingData) -> MobileNetV2:
    """The network as initialised, on its device."""
    torch.manual_seed(config.seed)
    network = build(config, data.num_classes, None, dropout=config.dropout, save=config.save_activations)
    *_, head, _ = network.layer_shapes(config.resize)
    if config.batch_size * head.height * head.width == 1 and config.freeze == "none":
        raise InputError(
            f"--batch_size: expected 2 or more at --resize {config.resize}, for BatchNorm's statistics, got 1"
        )
    torch.manual_seed(config.seed + world.rank)  # a dropout of its own for each process
    return network.to(world.device)


def load(start: Weights, network: MobileNetV2, data: TrainingData, world: World) -> None:
    """Begin with the weights ``start``, without their classifier where it is of other classes."""
    fits = start.num_classes == data.num_classes and start.classes in (None, data.classes)
    start.load_into(network, classifier=fits)
    world.print(
        f"weights: {start.about()}"
        + ("" if fits else f"; a new classifier of {data.num_classes} classes in place of its {start.num_classes}")
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    config = parse(TrainConfig, argv, "Train MobileNetV2.")

    def action() -> None:
        with numerics(config.deterministic), world(config.device, config.run_distribute) as here:
            check_backend(config.backend, here.device)
            here.print(f"checkpoint: {train(config, here)}")

    return exit_status("train.py", action)


if __name__ == "__main__":
    sys.exit(main())
