"""The network: MobileNetV2 in torchvision's module tree, its blocks run by the operations of `kernels`.

Source: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", table 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernels import BatchNorm, DepthwiseConv2d, common, inverted_residual, reference
from kernels.common import BACKENDS, Launch, Traffic, check_choice, check_padding
from kernels.depthwise import every_launch, runs_kernels
from kernels.inverted_residual import SAVES, why_torch
from kernels.inverted_residual_passes import Block, planned
from kernels.sync_batch_norm import batch_norm_of
from kernels.warmup import compile_ahead

if TYPE_CHECKING:
    from .explain import Explanation

# (expand ratio t, output channels c at alpha 1, repeats n, stride s of the first repeat)
BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280

# What was published with accuracies: alpha -> resolutions.
VARIANTS = {
    1.4: (224,),
    1.3: (224,),
    1.0: (224, 192, 160, 128, 96),
    0.75: (224, 192, 160, 128, 96),
    0.5: (224, 192, 160, 128, 96),
    0.35: (224, 192, 160, 128, 96),
}


@dataclass(frozen=True)
class LayerShape:
    """Shapes and cost of one layer for one picture.

    ``kind`` is stem, block, head or classifier. ``height, width`` are the input's, ``height_out, width_out`` the
    output's (1 by 1 for the classifier, whose input is pooled). ``c_mid`` is the expanded width of a block and ``c_in``
    elsewhere. ``expand_macs, depthwise_macs, project_macs`` are a block's; any other layer has ``project_macs`` alone.
    """

    name: str
    kind: str
    c_in: int
    c_mid: int
    c_out: int
    height: int
    width: int
    height_out: int
    width_out: int
    stride: int = 1
    residual: bool = False
    expand_macs: int = 0
    depthwise_macs: int = 0
    project_macs: int = 0

    @property
    def macs(self) -> int:
        """Multiply-adds of the convolutions, or of the matrix product, for one picture."""
        return self.expand_macs + self.depthwise_macs + self.project_macs


def round_channels(channels: float, divisor: int = 8) -> int:
    """Nearest multiple of ``divisor`` that is at least ``divisor`` and not under nine tenths of ``channels``."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def layer_shapes(alpha: float = 1.0, resize: int = 224, num_classes: int = 1000) -> list[LayerShape]:
    """Shapes and multiply-adds of the stem, the 17 blocks, the head and the classifier, in order.

    Args:
        alpha: width multiplier, positive.
        resize: side of the square input in pixels, positive.
        num_classes: outputs of the classifier, positive.
    """
    check_alpha(alpha)
    for name, value in (("resize", resize), ("num_classes", num_classes)):
        if value != int(value) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")

    size, side = resize, math.ceil(resize / 2)
    c_in = round_channels(STEM_CHANNELS * alpha)
    layers = [_dense("features.0", "stem", 3, c_in, size, side, stride=2, taps=9)]
    for ratio, channels, repeats, first_stride in BLOCKS:
        c_out = round_channels(channels * alpha)
        for stride in (first_stride, *[1] * (repeats - 1)):
            size, side = side, math.ceil(side / stride)
            c_mid = c_in * ratio
            layers.append(
                LayerShape(
                    name=f"features.{len(layers)}",
                    kind="block",
                    c_in=c_in,
                    c_mid=c_mid,
                    c_out=c_out,
                    height=size,
                    width=size,
                    height_out=side,
                    width_out=side,
                    stride=stride,
                    residual=stride == 1 and c_in == c_out,
                    expand_macs=0 if ratio == 1 else size * size * c_in * c_mid,
                    depthwise_macs=side * side * c_mid * 9,
                    project_macs=side * side * c_mid * c_out,
                )
            )
            c_in = c_out
    c_head = round_channels(HEAD_CHANNELS * max(1.0, alpha))
    layers.append(_dense(f"features.{len(layers)}", "head", c_in, c_head, side, side))
    layers.append(_dense("classifier.1", "classifier", c_head, num_classes, 1, 1))
    return layers


def _dense(
    name: str, kind: str, c_in: int, c_out: int, size: int, side: int, *, stride: int = 1, taps: int = 1
) -> LayerShape:
    macs = side * side * c_in * c_out * taps
    return LayerShape(name, kind, c_in, c_in, c_out, size, size, side, side, stride, project_macs=macs)


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless ``alpha`` is a positive finite width multiplier."""
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha: expected a positive number such as {', '.join(map(str, VARIANTS))}, got {alpha!r}")


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` without bias or groups whose padding is "symmetric" or TensorFlow's "same"."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, padding: str):
        super().__init__(c_in, c_out, kernel, stride, (kernel - 1) // 2, bias=False)
        self.padding_rule = padding

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``[N, c_in, H, W]`` to ``[N, c_out, ceil(H / stride), ceil(W / stride)]``."""
        return reference.conv2d(x, self.weight, stride=self.stride[0], padding=self.padding_rule)


class ConvNormAct(nn.Sequential):
    """Convolution, BatchNorm, ReLU6: torchvision's ``Conv2dNormActivation`` with its names 0, 1, 2."""

    def __init__(self, conv: nn.Conv2d, norm_eps: float):
        super().__init__(conv, nn.BatchNorm2d(conv.out_channels, eps=norm_eps), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """A block of the network; ``conv`` holds its parameters under torchvision's names.

    The block runs as one operation over those parameters, so hooks on the block itself fire and hooks on the modules
    inside ``conv`` do not.
    """

    def __init__(self, shape: LayerShape, *, padding: str, norm_eps: float, backend: str, save: str):
        super().__init__()
        self.shape = shape
        self.padding = padding
        self.save = save
        c_mid = shape.c_mid
        layers: list[nn.Module] = []
        if shape.expand_macs:
            layers.append(ConvNormAct(Conv2d(shape.c_in, c_mid, 1, 1, padding), norm_eps))
        zeros = 1 if padding == "symmetric" else padding
        depthwise = DepthwiseConv2d(c_mid, c_mid, 3, shape.stride, zeros, groups=c_mid, bias=False, backend=backend)
        layers.append(ConvNormAct(depthwise, norm_eps))
        layers.append(Conv2d(c_mid, shape.c_out, 1, 1, padding))
        layers.append(nn.BatchNorm2d(shape.c_out, eps=norm_eps))
        self.conv = nn.Sequential(*layers)

    def operands(self) -> tuple[Any, ...]:
        """Weights and norms in the order of ``kernels.inverted_residual``: None for an expansion that isn't there."""
        layers: list[Any] = list(self.conv)
        *expand, depthwise, project, project_norm = layers
        return (
            convolution_weight(expand[0][0], expand[0][2]) if expand else None,
            _batch_norm(expand[0][1]) if expand else None,
            convolution_weight(depthwise[0], depthwise[2]),
            _batch_norm(depthwise[1]),
            convolution_weight(project),
            _batch_norm(project_norm),
        )

    def why_torch(self, layer: LayerShape, dtype: torch.dtype | None = None) -> str | None:
        """Why torch runs the block on pictures of ``layer`` rather than the kernels, or None; ``dtype`` is autocast's.

        Raises:
            ValueError: the kernels are asked for and can't.
        """
        w1, _, wd, _, w2, _ = self.operands()
        x = common.allocate((1, layer.c_in, layer.height, layer.width), wd, dtype)
        return why_torch(x, w1, wd, w2, layer.stride, self.backend)

    def planned(
        self, batch: int, layer: LayerShape, dtype: torch.dtype | None, *, training: bool
    ) -> list[tuple[Launch, Traffic]]:
        """What the kernels launch for ``batch`` pictures of ``layer`` and its bytes, with gradients in ``training``."""
        w1, norm1, wd, norm2, w2, norm3 = map(_on_meta, self.operands())

        def alone(norm: BatchNorm) -> BatchNorm:
            return norm._replace(group="", batch_stats=norm.batch_stats and (training or norm.running_mean is None))

        norm1, norm2, norm3 = norm1 and alone(norm1), alone(norm2), alone(norm3)
        x = common.allocate((batch, layer.c_in, layer.height, layer.width), wd, dtype)
        block = Block(w1, wd, w2, norm1, norm2, norm3, layer.stride, self.padding, layer.residual)
        return planned(x, block, gradients=training, save=self.save)

    def launches(self, batch: int, layer: LayerShape, dtype: torch.dtype | None) -> list[Launch]:
        """What kernels launch for ``batch`` pictures of ``layer``, with gradients in training.

        ``dtype`` is autocast's.
        """
        if self.why_torch(layer, dtype) is None:
            return [launch for launch, _ in self.planned(batch, layer, dtype, training=self.training)]
        weight: Any = self.operands()[2]
        x = common.allocate((1, layer.c_mid, layer.height, layer.width), weight, dtype)
        if not runs_kernels(x, weight, layer.stride, self.backend):
            return []
        return every_launch(x, weight, layer.stride, self.padding, gradients=self.training)

    @property
    def backend(self) -> str:
        """How the block runs: its depthwise convolution's backend."""
        layers: list[Any] = list(self.conv)
        return layers[-3][0].backend

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, c_in, H, W]`` in channels_last to ``[N, c_out, ceil(H / stride), ceil(W / stride)]``."""
        layers: list[Any] = list(self.conv)
        if isinstance(layers[-1], nn.SyncBatchNorm):  # statistics of other processes, module by module
            return x + self.conv(x) if self.shape.residual else self.conv(x)
        return inverted_residual(
            x,
            *self.operands(),
            stride=self.shape.stride,
            residual=self.shape.residual,
            padding=self.padding,
            backend=self.backend,
            save=self.save,
        )


def _on_meta(value: Any) -> Any:
    """A tensor, or the tensors of a norm, on the meta device."""
    if isinstance(value, BatchNorm):
        return BatchNorm._make(map(_on_meta, value))
    return value.detach().to("meta") if isinstance(value, Tensor) else value


def convolution_weight(conv: nn.Module, activation: nn.Module | None = None) -> Tensor:
    """Weight of ``conv``, unless the operation would ignore what a user has put in its place or behind it."""
    if not isinstance(conv, Conv2d | DepthwiseConv2d) or conv.bias is not None:
        raise TypeError(f"conv: expected Conv2d without bias for each convolution of the block, got {conv}")
    if not (activation is None or isinstance(activation, nn.ReLU6)):
        raise TypeError(f"conv: expected nn.ReLU6 for each activation of the block, got {type(activation).__name__}")
    return conv.weight


def _batch_norm(module: nn.Module) -> BatchNorm:
    if not isinstance(module, nn.BatchNorm2d):
        raise TypeError(f"conv: expected nn.BatchNorm2d for each norm of the block, got {type(module).__name__}")
    return batch_norm_of(module)


class MobileNetV2(nn.Module):
    """MobileNetV2 for ``[N, 3, H, W]`` pictures, returning ``[N, num_classes]`` logits.

    Modules and state dict are torchvision's ``mobilenet_v2``, whose checkpoints load with ``strict=True``; so is the
    initialisation. Weights and activations are channels_last; an input in another layout is converted once at the door.

    Args:
        alpha: width multiplier; the published ones are ``VARIANTS``, any other positive number works.
        num_classes: outputs of the classifier.
        dropout: probability of dropping a pooled feature in training.
        backend: how the blocks run, as in ``kernels.inverted_residual``: "auto" by Triton kernels on NVIDIA GPUs of
            compute capability 8.0 and newer and by PyTorch elsewhere, "triton" by the kernels or with an error that
            says why not, "torch" by PyTorch. The numbers are the same within rounding.
        padding: "symmetric" (torchvision) or "same" (TensorFlow's, asymmetric at stride 2).
        norm_eps: epsilon of every BatchNorm; TensorFlow's weights want 1e-3.
        save: what the kernels of a block keep for its backward: "D" its input and two more tensors, "X" its input
            alone, a quarter of the memory for a quarter more traffic.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        num_classes: int = 1000,
        dropout: float = 0.2,
        backend: str = "auto",
        padding: str = "symmetric",
        norm_eps: float = 1e-5,
        save: str = "D",
    ):
        super().__init__()
        check_choice("backend", backend, BACKENDS)
        check_choice("save", save, SAVES)
        check_padding(padding)
        if not (math.isfinite(norm_eps) and norm_eps > 0):
            raise ValueError(f"norm_eps: expected a positive number, got {norm_eps!r}")
        stem, *blocks, head, classifier = layer_shapes(alpha, num_classes=num_classes)

        self.alpha = alpha
        self.num_classes = num_classes
        self.padding = padding
        self.norm_eps = norm_eps
        self.features = nn.Sequential(
            ConvNormAct(Conv2d(3, stem.c_out, 3, 2, padding), norm_eps),
            *[
                InvertedResidual(shape, padding=padding, norm_eps=norm_eps, backend=backend, save=save)
                for shape in blocks
            ],
            ConvNormAct(Conv2d(head.c_in, head.c_out, 1, 1, padding), norm_eps),
        )
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(classifier.c_in, num_classes))
        self._initialise()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs

    @property
    def backend(self) -> str:
        """How the blocks run; may be set at any time."""
        return self._depthwise()[0].backend

    @backend.setter
    def backend(self, backend: str) -> None:
        check_choice("backend", backend, BACKENDS)
        for conv in self._depthwise():
            conv.backend = backend

    def _blocks(self) -> list[InvertedResidual]:
        return [module for module in self.features if isinstance(module, InvertedResidual)]

    def _depthwise(self) -> list[DepthwiseConv2d]:
        return [module for module in self.modules() if isinstance(module, DepthwiseConv2d)]

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of pictures ``[N, 3, H, W]``, best given in channels_last."""
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"x: expected pictures [N, 3, H, W], got shape {tuple(x.shape)}")
        x = self.features(x.contiguous(memory_format=torch.channels_last))
        return self.classifier(x.mean((2, 3)))

    def warmup(
        self, batch: int = 64, resize: int = 224, dtype: torch.dtype | None = None, *, progress: bool = True
    ) -> int:
        """Compile every kernel that pictures of side ``resize`` run, gradients' in training; how many there were.

        ``dtype`` is autocast's, None for the type of the weights. In training a batch of another size may need a few
        more, as those kernels leave out masks where their programs divide it.
        """
        launches: list[Launch] = []
        device = next(self.parameters()).device
        with common.planned_for(device):
            for block, layer in zip(self._blocks(), self.layer_shapes(resize)[1:-2], strict=True):
                launches += block.launches(batch, layer, dtype)
        return compile_ahead(launches, device, progress=progress)

    def explain(self, batch: int = 64, resize: int = 224, dtype: torch.dtype | None = None) -> Explanation:
        """Which path each layer takes in evaluation and why, and its bytes; its text is a table (``mnv2.explain``).

        ``dtype`` is autocast's, None for the type of the weights.
        """
        from .explain import explain_unfolded  # which knows this class

        return explain_unfolded(self, batch, resize, dtype)

    def layer_shapes(self, resize: int = 224) -> Sequence[LayerShape]:
        """Shapes and multiply-adds of this network's layers for a square picture of side ``resize``."""
        return layer_shapes(self.alpha, resize, self.num_classes)
