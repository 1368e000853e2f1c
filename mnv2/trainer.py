"""What changes with each step of training, and the step itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import TrainConfig
from .data import Batch
from .distributed import World, convert_sync_batchnorm
from .model import MobileNetV2
from .recipe import learning_rate, make_optimizer

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(precision: str, world: World) -> AbstractContextManager[Any]:
    """Where the network computes in ``precision``: "fp32" as it is, "fp16" or "bf16" by ``torch.autocast``."""
    return torch.autocast(world.device.type, _DTYPES[precision], enabled=precision != "fp32")


def input_dtype(precision: str) -> torch.dtype:
    """What the loader hands over: half of the bytes where the first convolution would round them anyway."""
    return torch.float16 if precision == "fp16" else torch.float32


@contextmanager
def numerics(deterministic: bool) -> Iterator[None]:
    """Algorithms that give the same bits each time, or the fastest that cuDNN finds, inside the ``with`` statement."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


class AveragedWeights:
    """Exponential moving average of a network's weights and buffers, as the network ``network``.

    After each step every floating-point tensor becomes ``decay * average + (1 - decay) * weight``, from the weights
    before the first step on; counters are copied. (torch's ``AveragedModel`` waits for the GPU at each step and
    averages counters as integers.)
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = deepcopy(network).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take the weights of ``network`` in."""
        pairs = list(zip(_tensors(self.network), _tensors(network), strict=True))
        floats = [(average, current) for average, current in pairs if average.is_floating_point()]
        torch._foreach_lerp_([average for average, _ in floats], [current for _, current in floats], 1 - self.decay)
        for average, current in pairs:
            if not average.is_floating_point():
                average.copy_(current)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*(parameter.detach() for parameter in network.parameters()), *network.buffers()]


class Trainer:
    """A network and everything that changes as it is trained; the same in all processes.

    Args:
        network: on its device.
        config: the recipe.
        world: the processes.

    Raises:
        InputError: ``--sync_bn`` can't run here.
    """

    def __init__(self, network: MobileNetV2, config: TrainConfig, world: World):
        if config.freeze == "features":
            network.features.requires_grad_(False)
        if config.sync_bn:
            network = convert_sync_batchnorm(network, world)
        self.network = network
        self.optimizer = make_optimizer(network, config)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        self.ema = AveragedWeights(network, config.ema_decay) if config.ema_decay else None
        self._config = config
        self._world = world
        self._trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        self._model = _distributed(network, world)

    def start_epoch(self, epoch: int) -> float:
        """Set and return the learning rate of ``epoch``, and put what is trained into training mode."""
        rate = learning_rate(self._config, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._model.train()
        for part in (self.network.features, self.network.classifier):
            part.train(any(parameter.requires_grad for parameter in part.parameters()))
        return rate

    def step(self, batches: Iterator[Batch]) -> Tensor:
        """Train on the next ``grad_accum_steps`` of ``batches``: one step down the mean of their gradients.

        Returns:
            This process's mean loss, a scalar on the device, so that no step waits for it.
        """
        config = self._config
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for number, batch in enumerate(islice(batches, config.grad_accum_steps), 1):
            with self._reducing(number == config.grad_accum_steps):
                with autocast(config.precision, self._world):
                    logits = self._model(batch.images)
                loss = F.cross_entropy(logits.float(), batch.labels, label_smoothing=config.smooth_factor)
                self.scaler.scale(loss / config.grad_accum_steps).backward()
            losses.append(loss.detach())
        if config.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._trained, config.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._world.average_(self._statistics)
        if self.ema is not None:
            self.ema.update(self.network)
        return torch.stack(losses).mean()

    def _reducing(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over the processes with a step's last batch alone."""
        if isinstance(self._model, DistributedDataParallel) and not last:
            return self._model.no_sync()
        return nullcontext()

    def state(self) -> dict[str, Any]:
        """Weights under ``model`` and ``ema`` (None without), and the states of ``optimizer`` and ``scaler``."""
        return {
            "model": weights_of(self.network),
            "ema": weights_of(self.ema.network) if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, with the optimizer's settings (momentum, weight decay) as they are now."""
        self.network.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.network.load_state_dict(state["ema"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """State dict of ``network`` on the CPU, in torch's own layout."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}


def _distributed(network: MobileNetV2, world: World) -> nn.Module:
    """``network``, or over several processes the wrapper that averages gradients."""
    if world.size == 1:
        return network
    # BatchNorm's running statistics are averaged at each step instead, so that they come from all processes.
    model = DistributedDataParallel(
        network, device_ids=[world.device] if world.device.type == "cuda" else None, forward_sync_buffers=False
    )
    # The wrapper sums the first gradients in other pieces than all later ones, so a run that goes on would round
    # differently than one that went through: let it see the first here. In eval mode this changes nothing.
    model.eval()
    model(torch.zeros(1, 3, 32, 32, device=world.device)).sum().backward()
    network.zero_grad(set_to_none=True)
    return model
