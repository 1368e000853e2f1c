"""A training run as it goes: epochs, their evaluation, checkpoints, and stopping where a signal asks for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice

from torch import nn

from . import checkpoint
from .config import TrainConfig
from .data import Batch, Loader, SyntheticLoader
from .distributed import StopSignals, World
from .engine import NotFiniteError, Progress, evaluate, settle, train_steps
from .errors import Stopped
from .inputs import TrainingData
from .logs import RunLog, epoch_lines, evaluation_line, with_progress
from .precision import autocast
from .trainer import Trainer


@dataclass
class Session:
    """Everything that a run needs while it goes on.

    ``validation`` is None where nothing is evaluated; ``steps`` are those of an epoch.
    """

    config: TrainConfig
    world: World
    data: TrainingData
    trainer: Trainer
    loader: Loader | SyntheticLoader
    validation: Loader | None
    progress: Progress
    steps: int
    log: RunLog
    stop: StopSignals

    def epoch(self) -> None:
        """Train the epoch that ``progress`` is in to its end, evaluate, save, and go to the next.

        Raises:
            Stopped: a signal came; everything is saved.
        """
        config, progress = self.config, self.progress
        began = time.perf_counter() - progress.seconds
        rate = self.trainer.start_epoch(progress.epoch)
        self._train(rate)
        seconds = time.perf_counter() - began
        ended = progress.epoch + 1
        due = config.eval_every and (ended % config.eval_every == 0 or ended == config.epoch_size)
        evaluated = self.validation if due else None
        if evaluated is not None:
            self.save()  # evaluation may take longer than a signal leaves time for
        self.world.print(epoch_lines(progress, config.epoch_size, rate, seconds))
        self.log.epoch(progress, rate, seconds, self._pictures(self.steps))
        best = self._evaluate(evaluated) if evaluated is not None else False
        progress.next_epoch()
        self.save(ended=True, best=best)
        if progress.epoch < config.epoch_size:
            self._stop_if(self.stop.poll())

    def _train(self, rate: float) -> None:
        config, progress = self.config, self.progress
        passes = config.repeat_num - progress.step * config.grad_accum_steps // len(self.loader)
        batches = chain.from_iterable(self.loader for _ in range(passes))
        steps = train_steps(self.trainer, batches, progress, self.steps)
        logged, logged_seconds = progress.step, progress.seconds
        for step in with_progress(steps, self.steps, f"epoch {progress.epoch}", self.world, done=progress.step):
            if step % config.log_every == 0:
                settle(progress, self.trainer, self.world)
                count, seconds = step - logged, progress.seconds - logged_seconds
                self.log.steps(progress, count, rate, seconds, self._pictures(count))
                logged, logged_seconds = step, progress.seconds
            number = self.stop.poll()
            if number or (config.save_every and step % config.save_every == 0 and step < self.steps):
                self.save()
            self._stop_if(number)
        settle(progress, self.trainer, self.world)

    def _evaluate(self, validation: Loader) -> bool:
        """Evaluate the network, and the average of its weights where there is one; whether it is the best so far."""
        networks: dict[str, nn.Module] = {"model": self.trainer.network}
        if self.trainer.ema is not None:
            networks["ema"] = self.trainer.ema.network
        share = None
        for name, network in networks.items():
            batches = self._stoppable(validation)
            try:
                with autocast(self.config.precision, self.world.device):
                    result = evaluate(network, batches, validation.pictures, self.world, self.config.smooth_factor)
            except NotFiniteError as error:  # training may recover from what gives NaN at its start
                self.world.print(f"Evaluation:[{self.progress.epoch}/{self.config.epoch_size}], {name}: {error}")
                share = None
                continue
            self.world.print(evaluation_line(self.progress.epoch, self.config.epoch_size, name, result))
            self.log.evaluation(self.progress, result, name)
            share = result.top1 / result.pictures  # that of the average where there is one
        best = self.progress.best_top1
        if share is None or (best is not None and share <= best):
            return False
        self.progress.best_top1, self.progress.best_epoch = share, self.progress.epoch + 1
        return True

    def _stoppable(self, validation: Loader) -> Iterator[Batch]:
        """The batches of an evaluation, with a look for a signal at each that all processes have."""
        common = -(-(validation.pictures // self.world.size) // self.config.batch_size)
        batches = iter(validation)
        for batch in islice(batches, common):
            self._stop_if(self.stop.poll())
            yield batch
        yield from batches

    def _pictures(self, steps: int) -> int:
        return steps * self.config.batch_size * self.config.grad_accum_steps * self.world.size

    def save(self, *, ended: bool = False, best: bool = False) -> None:
        """Write ``last.pt``; after an epoch that has ``ended`` keep it as that epoch's, and as the ``best``."""
        settle(self.progress, self.trainer, self.world)
        loader = self.world.gather(self.loader.state())
        random = self.world.gather(checkpoint.random_state(self.world))
        if self.world.rank == 0:
            content = {
                **self.trainer.state(),
                "loader": loader,
                "random": random,
                "progress": self.progress.state(),
                "config": asdict(self.config),
                "classes": self.data.classes,
                "listing": self.data.listing,
                "validation": self.data.validation_listing,
                "device": self.world.device.type,
            }
            epoch = self.progress.epoch if ended else 0
            keep_max = self.config.keep_checkpoint_max
            checkpoint.save(self.config.ckpt_save_dir, content, epoch=epoch, best=best, keep_max=keep_max)
        self.world.wait()

    def _stop_if(self, number: int) -> None:
        if not number:
            return
        path = os.path.join(self.config.ckpt_save_dir, checkpoint.LAST)
        message = (
            f"stopped by {signal.Signals(number).name}, {self.progress.epoch} epochs and {self.progress.step} steps "
            f"are done and saved in {path}; --resume auto goes on from there"
        )
        raise Stopped(message if self.world.rank == 0 else "", number)
