"""Passes of the inverted residual block of MobileNetV2, usable without the rest of mnv2.

The operations are functions of tensors in torch's shapes with NHWC memory; ``reference`` holds their torch twins.
"""

from . import reference
from .block_inference import inverted_residual_inference
from .common import BatchNorm
from .depthwise import depthwise_conv2d
from .head_inference import conv_relu6_mean
from .inverted_residual import inverted_residual
from .modules import DepthwiseConv2d, Replacement, replace_depthwise
from .pack import PackedBlock, pack_inverted_residual
from .sync_batch_norm import SyncBatchNorm2d, convert_sync_batchnorm

__all__ = [
    "BatchNorm",
    "DepthwiseConv2d",
    "PackedBlock",
    "Replacement",
    "SyncBatchNorm2d",
    "conv_relu6_mean",
    "convert_sync_batchnorm",
    "depthwise_conv2d",
    "inverted_residual",
    "inverted_residual_inference",
    "pack_inverted_residual",
    "reference",
    "replace_depthwise",
]

# Another distribution installs a package named `kernels` too; mnv2 checks for this name before it uses ours.
DISTRIBUTION = "mnv2"
