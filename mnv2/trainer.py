"""What changes with each step of training, and the step itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
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
from .precision import autocast
from .recipe import learning_rate, make_optimizer


class AveragedWeights:
    """Exponential moving average of a network's weights and buffers, as the network ``network``.

    After each step every floating-point tensor becomes ``decay * average + (1 - decay) * weight``, from the weights
    before the first step on; counters are copied. (torch's ``AveragedModel`` waits for the GPU at each step and
    averages counters as integers.)
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = deepcopy(network).requires_grad_(False).eval()
        self.decay = decay
        # Found once: both networks keep their tensors, and a walk through the modules takes longer than the average.
        pairs = list(zip(self.network.state_dict().values(), network.state_dict().values(), strict=True))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    def update(self) -> None:
        """Take the weights of the network in, as they are now."""
        averages, weights = zip(*self._floats, strict=True)
        torch._foreach_lerp_(averages, weights, 1 - self.decay)
        for average, counter in self._counters:
            average.copy_(counter)


class Trainer:
    """A network and everything that changes as it is trained; the same in all processes.

    Args:
        network: on its device.
        config: the recipe.
        world: the processes.
    """

    def __init__(self, network: MobileNetV2, config: TrainConfig, world: World):
        if config.freeze == "features":
            network.features.requires_grad_(False)
        if config.sync_bn:
            network = convert_sync_batchnorm(network)
        self.network = network
        self.optimizer = make_optimizer(network, config)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        self.ema = AveragedWeights(network, config.ema_decay) if config.ema_decay else None
        self._config = config
        self._world = world
        self._trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._statistics = [] if config.sync_bn else _statistics(network)
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
                with autocast(config.precision, self._world.device):
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
            self.ema.update()
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
            "optimizer": _on_cpu(self.optimizer.state_dict()),
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


def _on_cpu(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _on_cpu(value) for name, value in state.items()}
    return state.cpu() if isinstance(state, Tensor) else state


def _statistics(network: nn.Module) -> list[Tensor]:
    """Running statistics of the BatchNorms that are trained: those of frozen ones must stay to the bit."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    trained = [norm for norm in norms if any(parameter.requires_grad for parameter in norm.parameters())]
    return [buffer for norm in trained for buffer in norm.buffers() if buffer.is_floating_point()]


def _distributed(network: MobileNetV2, world: World) -> nn.Module:
    """``network``, or over several processes the wrapper that averages gradients."""
    if world.size == 1:
        return network
    # BatchNorm's running statistics are averaged at each step instead, so that they come from all processes.
    model = DistributedDataParallel(
        network, device_ids=[world.device] if world.device.type == "cuda" else None, forward_sync_buffers=False
    )
    _settle_buckets(model, world)
    return model


def _settle_buckets(model: DistributedDataParallel, world: World) -> None:
    """Let the wrapper see gradients once.

    It sums the first ones in other pieces than all later ones, so a run that goes on would round differently from one
    that went through. In eval mode nothing is changed by this.
    """
    model.eval()
    model(torch.zeros(1, 3, 32, 32, device=world.device)).sum().backward()
    model.zero_grad(set_to_none=True)
