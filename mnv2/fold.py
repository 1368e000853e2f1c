"""Folding: from a trained network to the inference network.

    scale = gamma / sqrt(var + eps),   w' = w scale,   b' = beta - mean scale

in fp64, then rounded once to the type of the network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import pack_inverted_residual
from kernels.common import DTYPES, without_autocast

from .inference import FoldedStem, InferenceNetwork, build, expected_tensors
from .model import InvertedResidual, LayerShape, MobileNetV2, convolution_weight, layer_shapes


@dataclass(frozen=True)
class LayerError:
    """How far a layer's output is from the unfolded network's in fp64: largest difference, and relative L2 norm."""

    name: str
    largest: float
    relative: float


@dataclass(frozen=True)
class Certificate:
    """What folding and rounding did to the outputs for a batch of pictures."""

    layers: tuple[LayerError, ...]
    flips: int
    pictures: int
    dtype: torch.dtype

    def __str__(self) -> str:
        """A line a layer, and the predictions that differ."""
        lines = [f"{'layer':14} {'largest error':>14} {'relative (L2)':>14}"]
        lines += [f"{layer.name:14} {layer.largest:14.3e} {layer.relative:14.3e}" for layer in self.layers]
        kind = str(self.dtype).removeprefix("torch.")
        lines.append(f"{kind}: {self.flips} of {self.pictures} predictions differ from the fp64 network's")
        return "\n".join(lines)


class Convolution(NamedTuple):
    """A convolution of a trained network and the BatchNorm behind it; ``weight`` and ``bias`` are both, in fp64."""

    conv: Any
    norm: Any
    weight: Tensor
    bias: Tensor


@torch.no_grad()
def fold(model: MobileNetV2, dtype: torch.dtype | None = None, *, check: Tensor | None = None) -> InferenceNetwork:
    """The inference network of a trained one, with its backend, padding and device. ``model`` stays as it is.

    Args:
        model: a MobileNetV2 in training or evaluation; what is folded are its running statistics.
        dtype: fp32, fp16 or bf16; None for the type of the model's weights.
        check: pictures ``[N, 3, H, W]``, on the model's device, for a certificate: the result's ``certificate`` then
            tells for each layer how far the outputs are from those of ``model`` in fp64, and how many predictions flip.

    Raises:
        TypeError: ``model`` is no MobileNetV2, a module of it was replaced by something that can't be folded, or
            ``dtype`` is none of the three.
        ValueError: a BatchNorm has no running statistics, or a weight leaves the range of ``dtype``.
    """
    features, linear = convolutions(model), classifier_of(model)
    if dtype is None:
        dtype = next(model.parameters()).dtype
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
    tensors: dict[str, Tensor] = {"classifier.weight": linear.weight, "classifier.bias": linear.bias}
    for shape, parts in features:
        if shape.kind == "block":
            folded = _packed(parts, shape.name, dtype)
        else:
            folded = {"weight": parts[0].weight, "bias": parts[0].bias}
        tensors |= {f"{shape.name}.{name}": tensor for name, tensor in folded.items()}
    layers = layer_shapes(model.alpha, num_classes=linear.out_features)
    wanted = {name: kind for layer in layers for name, (_, kind) in expected_tensors(layer, dtype).items()}
    network = build(
        {name: tensor.detach().to(wanted[name], copy=True) for name, tensor in tensors.items()},
        alpha=model.alpha,
        num_classes=linear.out_features,
        padding=model.padding,
        backend=model.backend,
        dtype=dtype,
    )
    check_finite(network.state_dict())
    if check is not None:
        network.certificate = certify(network, model, check)
    return network


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError, by name, where rounding has left a number in ``state`` that isn't finite."""
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers in the range of {tensor.dtype}, got others")


def convolutions(model: MobileNetV2) -> list[tuple[LayerShape, list[Convolution]]]:
    """Stem, blocks and head in order, each with its convolutions: one, or a block's two or three.

    Raises:
        TypeError, ValueError: as ``fold``.
    """
    if not isinstance(model, MobileNetV2):
        raise TypeError(f"model: expected a MobileNetV2, got {type(model).__name__}")
    *features, _ = layer_shapes(model.alpha)
    if len(model.features) != len(features):
        raise TypeError(f"model: expected {len(features)} features, got {len(model.features)}")
    return [
        (shape, _of_layer(module, shape, model.padding)) for shape, module in zip(features, model.features, strict=True)
    ]


def classifier_of(model: MobileNetV2) -> nn.Linear:
    """The classifier's product of matrices; TypeError where there is more to it."""
    layers: list[Any] = list(model.classifier) if isinstance(model.classifier, nn.Sequential) else [model.classifier]
    linear = layers[-1] if len(layers) in (1, 2) else None
    dropped = all(isinstance(layer, nn.Dropout | nn.Identity) for layer in layers[:-1])
    if not dropped or not isinstance(linear, nn.Linear) or linear.bias is None:
        raise TypeError(f"model: expected nn.Linear with bias, behind nn.Dropout or alone, as classifier, got {layers}")
    return linear


def _check_geometry(layers: Any, shape: LayerShape, padding: str) -> None:
    """Raise unless the convolution of the stem or head is the network's own."""
    conv = layers[0]
    got = conv.stride, conv.dilation, conv.groups, getattr(conv, "padding_rule", None)
    if got != ((shape.stride,) * 2, (1, 1), 1, padding):
        raise TypeError(f"model: expected stride {shape.stride} and {padding} padding in {shape.name}, got {conv}")


def _of_layer(module: nn.Module, shape: LayerShape, padding: str) -> list[Convolution]:
    if shape.kind != "block":
        parts = [_folded(module, shape.name, relu6=True)]
        _check_geometry(module, shape, padding)
        return parts
    if not isinstance(module, InvertedResidual):
        raise TypeError(f"model: expected InvertedResidual as {shape.name}, got {type(module).__name__}")
    *normed, last, norm = module.conv
    layers: list[Any] = [*normed, (last, norm)]
    return [
        _folded(part, f"{shape.name}.conv.{index}", relu6=part is not layers[-1]) for index, part in enumerate(layers)
    ]


def _packed(parts: list[Convolution], name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    weights: list[Any] = [tensor for part in parts for tensor in (part.weight, part.bias)]
    if len(parts) == 2:
        weights = [None, None, *weights]
    try:
        packed = pack_inverted_residual(*weights, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return {field: tensor for field, tensor in packed._asdict().items() if tensor is not None}


def _folded(layers: Any, name: str, *, relu6: bool) -> Convolution:
    """A convolution followed by BatchNorm and, if so, ReLU6."""
    found: list[Any] = list(layers) if isinstance(layers, nn.Sequential | tuple) else [layers]
    if len(found) != 2 + relu6:
        wanted = "a convolution, BatchNorm" + " and ReLU6" * relu6
        raise TypeError(f"model: expected {wanted} in {name}, got {[type(layer).__name__ for layer in found]}")
    conv, norm, *activation = found
    try:
        weight = convolution_weight(conv, *activation).detach().double()
    except TypeError as error:
        raise TypeError(f"model: {name}: {error}") from None
    if not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
        raise TypeError(f"model: expected BatchNorm behind the convolution of {name}, got {type(norm).__name__}")
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            f"model: expected running statistics in the BatchNorm of {name}, got track_running_stats=False"
        )
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return Convolution(conv, norm, weight * scale[:, None, None, None], shift)


@torch.no_grad()
def certify(network: InferenceNetwork, model: MobileNetV2, pictures: Tensor) -> Certificate:
    """Run ``pictures [N, 3, H, W]`` through both, ``model`` in fp64 and evaluation, and compare after each layer."""
    exact = copy.deepcopy(model).double().eval()
    exact.backend = "torch"
    stem, *others, head = exact.features
    # As the folded layers end: the stem's ReLU6 comes with the block behind it, the mean with the head.
    originals: list[Callable[[Tensor], Tensor]] = [stem, *others, lambda x: head(x).mean((2, 3)), exact.classifier]
    truth = pictures.double().contiguous(memory_format=torch.channels_last)
    got = pictures.to(network.dtype, memory_format=torch.channels_last)
    errors = []
    with without_autocast(pictures.device):
        for (name, layer), original in zip(network.layers(), originals, strict=True):
            truth, got = original(truth), layer(got)
            shown = F.relu6(got) if isinstance(layer, FoldedStem) else got
            difference = shown.double() - truth
            relative = difference.norm() / truth.norm().clamp_min(torch.finfo(torch.float64).tiny)
            errors.append(LayerError(name, difference.abs().max().item(), relative.item()))
    flips = int((truth.argmax(1) != got.argmax(1)).sum())
    return Certificate(tuple(errors), flips, len(pictures), network.dtype)
