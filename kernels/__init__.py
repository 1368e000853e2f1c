"""Passes of the inverted residual block of MobileNetV2, usable without the rest of mnv2.

The operations are functions of tensors in torch's shapes with NHWC memory; ``reference`` holds their torch twins.
"""

from . import reference
from .common import BatchNorm
from .depthwise import depthwise_conv2d
from .modules import DepthwiseConv2d, Replacement, replace_depthwise

__all__ = ["BatchNorm", "DepthwiseConv2d", "Replacement", "depthwise_conv2d", "reference", "replace_depthwise"]

# Another distribution installs a package named `kernels` too; mnv2 checks for this name before it uses ours.
DISTRIBUTION = "mnv2"
