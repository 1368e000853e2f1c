"""A trained network in torch's own modules, for files that other runtimes read: nn.Conv2d, nn.BatchNorm2d, nn.ReLU6.

Names and shapes are torchvision's; where BatchNorm is folded a convolution has its bias, and there is no norm.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from kernels.reference import pad_same

from .fold import Convolution, check_finite, classifier_of, convolutions
from .model import MobileNetV2


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME, for which ``nn.Conv2d`` has no padding of its own at stride 2."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``[N, c_in, H, W]`` to ``[N, c_out, ceil(H / stride), ceil(W / stride)]``."""
        return super().forward(pad_same(x, self.kernel_size[0], self.stride[0]))


class PlainBlock(nn.Module):
    """An inverted residual."""

    def __init__(self, conv: nn.Sequential, residual: bool):
        super().__init__()
        self.conv = conv
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, c_in, H, W]`` to ``[N, c_out, ceil(H / stride), ceil(W / stride)]``."""
        y = self.conv(x)
        return x + y if self.residual else y


class PlainNetwork(nn.Module):
    """MobileNetV2 in evaluation, as ``plain`` makes it."""

    def __init__(self, features: nn.Sequential, classifier: nn.Sequential):
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of ``pictures [N, 3, H, W]``, both of the type of the weights."""
        return self.classifier(self.features(pictures).mean((2, 3)))


@torch.no_grad()
def plain(model: MobileNetV2, dtype: torch.dtype = torch.float32, *, fold: bool = True) -> PlainNetwork:
    """The network of ``model``, which stays as it is, for evaluation in torch's own modules.

    Args:
        model: what has been trained.
        dtype: of weights and activations, to which each weight is rounded once.
        fold: fold BatchNorm into the convolutions, in fp64; else it is kept.

    Raises:
        TypeError, ValueError: as ``mnv2.fold``: it is another network, or a weight leaves the range of ``dtype``.
    """
    features: list[nn.Module] = []
    for shape, parts in convolutions(model):
        *first, last = (_layers(part, model.padding, fold) for part in parts)
        if shape.kind == "block":
            activated = [nn.Sequential(*layers, nn.ReLU6()) for layers in first]
            features.append(PlainBlock(nn.Sequential(*activated, *last), shape.residual))
        else:
            features.append(nn.Sequential(*last, nn.ReLU6()))
    classifier = nn.Sequential(nn.Identity(), copy.deepcopy(classifier_of(model)))
    network = PlainNetwork(nn.Sequential(*features), classifier).to(dtype).eval().requires_grad_(False)
    check_finite(network.state_dict())
    return network


def _layers(part: Convolution, padding: str, fold: bool) -> list[nn.Module]:
    """The convolution with its bias, or without one and the norm behind it."""
    old = part.conv
    same = padding == "same" and old.stride != (1, 1)
    kind, zeros = (SameConv2d, 0) if same else (nn.Conv2d, old.kernel_size[0] // 2)
    conv = kind(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        old.stride,
        zeros,
        groups=old.groups,
        bias=fold,
        device="meta",  # without random numbers
    )
    weight = part.weight if fold else old.weight
    conv.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if not fold:
        return [conv, copy.deepcopy(part.norm)]
    conv.bias = nn.Parameter(part.bias)
    return [conv]
