"""Other libraries' MobileNetV2 with our weights, so that benchmarks beside them compare the same arithmetic.

timm's and transformers' networks have the layers of ours in the same order and under other names, so weights go over by
their order; each must have its counterpart's shape, and who measures compares logits first.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mnv2 import MobileNetV2

from .network_cases import settle

NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_torchvision: torch.library.Library | None = None  # what it defines goes with it


def require(name: str) -> None:
    """Skip the test where the library ``name`` isn't installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} isn't installed: pip install -e '.[bench]'")


def network(name: str, model: MobileNetV2) -> nn.Module:
    """The network of the library ``name`` with the weights of ``model``, in evaluation and torch's default layout."""
    made = PEERS[name](model)
    return with_weights(made, model).to(memory_format=torch.contiguous_format).eval()


def with_weights(peer: nn.Module, model: MobileNetV2) -> nn.Module:
    """``peer`` with the weights and statistics of ``model``, whose layers must come in the same order."""
    ours, theirs = model.state_dict(), peer.state_dict()
    if len(ours) != len(theirs):
        raise ValueError(f"peer: expected {len(ours)} tensors as in model, got {len(theirs)}")
    for (our_name, our), (their_name, their) in zip(ours.items(), theirs.items(), strict=True):
        if our.shape != their.shape:
            raise ValueError(
                f"peer: expected {their_name} of shape {tuple(our.shape)} as {our_name}, got {tuple(their.shape)}"
            )
    peer.load_state_dict(dict(zip(theirs, ours.values(), strict=True)))
    return peer


def with_statistics(model: MobileNetV2, pictures: Tensor) -> MobileNetV2:
    """A copy of ``model`` in evaluation, random scales and shifts in its norms and the statistics of ``pictures``.

    As initialised, BatchNorm changes nothing in evaluation, and logits are about 1e-9, where any two look alike.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.5)
    settle(model, pictures)
    return model


class _Logits(nn.Module):
    """A network of transformers that returns logits alone, as the others do."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).logits


def _timm(model: MobileNetV2) -> nn.Module:
    import_torchvision()
    import timm

    name, padding = f"mobilenetv2_{round(100 * model.alpha):03}", "same" if model.padding == "same" else ""
    return timm.create_model(
        name, pretrained=False, num_classes=model.num_classes, bn_eps=model.norm_eps, pad_type=padding
    )


def transformers_network(alpha: float, padding: str, norm_eps: float, num_classes: int) -> nn.Module:
    """Transformers' network, which returns logits among other things."""
    if importlib.util.find_spec("torchvision") is not None:  # it takes it where it is there
        import_torchvision()
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(
        depth_multiplier=alpha, tf_padding=padding == "same", layer_norm_eps=norm_eps, num_labels=num_classes
    )
    return MobileNetV2ForImageClassification(config)


def _transformers(model: MobileNetV2) -> nn.Module:
    return _Logits(transformers_network(model.alpha, model.padding, model.norm_eps, model.num_classes))


PEERS: dict[str, Callable[[MobileNetV2], nn.Module]] = {"timm": _timm, "transformers": _transformers}


def import_torchvision() -> None:
    """Import torchvision, which timm does.

    That of the package index is made for CUDA. Beside torch's CPU build its library doesn't load, and the import fails
    where it describes operators that the library would have defined: they are defined here then, and do nothing.
    """
    global _torchvision
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _torchvision = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _torchvision.define(name + NMS)
        import torchvision  # noqa: F401
