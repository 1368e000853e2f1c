"""MobileNetV2, trained and served by fused kernels."""

import kernels

if getattr(kernels, "DISTRIBUTION", None) != "mnv2":
    raise ImportError(
        f"mnv2 needs its own package 'kernels', but Python found Hugging Face's package of that name at "
        f"{kernels.__path__[0]}: run `pip uninstall kernels`, then reinstall mnv2"
    )

from .model import MobileNetV2, layer_shapes

__version__ = "0.1.0"
__all__ = ["MobileNetV2", "layer_shapes"]
