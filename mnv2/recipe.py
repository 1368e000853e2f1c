"""How a network is trained: the learning rate of each epoch, and the optimizer."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

import torch
from torch import nn

from .config import TrainConfig

# Sandler et al. 2018, section 6.1, take RMSProp with decay and momentum 0.9; the epsilon is TensorFlow's 1e-3 inside
# the root, which is about sqrt(1e-3) where torch adds it, outside.
_RMSPROP: dict[str, Any] = {"alpha": 0.9, "eps": math.sqrt(1e-3)}


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Learning rate of ``epoch`` (from 0).

    ``warmup_epochs`` rise linearly to the rate that follows them. "cosine_decay_lr" then spans exactly the epochs that
    are left: ``max_lr`` in its first, and it would reach ``min_lr`` in the epoch after the last (Loshchilov and Hutter
    2017, equation 5, without restarts); with ``decay_epoch`` it reaches it in that epoch and stays there.
    "piecewise_constant_lr" takes the first of ``learning_rates`` up to the first of ``milestone``, and so on; the last
    rate stays to the end.
    """
    if epoch < config.warmup_epochs:
        return learning_rate(config, config.warmup_epochs) * (epoch + 1) / (config.warmup_epochs + 1)
    if config.lr_decay_mode == "piecewise_constant_lr":
        rates = config.learning_rates
        return rates[min(bisect_right(config.milestone, epoch), len(rates) - 1)]
    share = min(
        1.0, (epoch - config.warmup_epochs) / ((config.decay_epoch or config.epoch_size) - config.warmup_epochs)
    )
    return config.min_lr + (config.max_lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or RMSprop over the parameters of ``model`` that are trained; its rate is set each epoch.

    Weight decay applies to the weights of convolutions and of the classifier, and not to BatchNorm or biases (He et al.
    2019, "Bag of Tricks for Image Classification", section 3.1).
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    rate = learning_rate(config, 0)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, rate, momentum=config.momentum, **_RMSPROP)
    return torch.optim.SGD(groups, rate, config.momentum, nesterov=config.nesterov)
