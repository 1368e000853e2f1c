"""MobileNetV2: the network, its ImageNet loader, training and exact evaluation."""

import kernels

if getattr(kernels, "DISTRIBUTION", None) != "mnv2":
    place = getattr(kernels, "__file__", None) or list(kernels.__path__)
    raise ImportError(
        "mnv2 needs its own package 'kernels', but Python found another of that name (Hugging Face publishes one) at "
        f"{place}: run `pip uninstall kernels`, then reinstall mnv2"
    )

from .fold import fold
from .inference import InferenceNetwork
from .model import MobileNetV2, layer_shapes

__version__ = "0.1.0"
__all__ = ["InferenceNetwork", "MobileNetV2", "fold", "layer_shapes"]
