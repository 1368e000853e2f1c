"""The inference network: BatchNorm folded, each block one operation; saved and loaded as safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kernels import PackedBlock, common, conv_relu6_mean, reference
from kernels.block_inference import refuse_gradient, run_kernels, why_torch_block
from kernels.block_inference_passes import every_launch
from kernels.common import BACKENDS, Launch, check_choice, check_padding
from kernels.head_inference import conv_relu6_mean_launch, why_torch_head
from kernels.warmup import compile_ahead

from . import onednn
from .atomic import write_safetensors
from .errors import InputError
from .model import LayerShape, layer_shapes

if TYPE_CHECKING:
    from .explain import Explanation
    from .fold import Certificate

FORMAT = "mnv2 inference network, 1"
# Of an expanded tensor on a CPU. What is freed of more than 32 MiB the C library gives back to the system, and the next
# one's pages are made anew as they are written, which takes longer than the convolution does; half of it was fastest.
LARGEST_BYTES = 16 * 2**20


class _Folded(nn.Module):
    """A layer whose weights are buffers; what oneDNN wants them to be is made once, and anew where they change."""

    _kept: tuple[Any, Any, Any] | None = None

    def _prepared(self, make: Callable[[], Any]) -> Any:
        buffers = [tensor for tensor in self._buffers.values() if tensor is not None]
        key = [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in buffers]
        if self._kept is None or self._kept[0] != key:
            self._kept = key, buffers, make()  # while they are kept, no other tensor takes their place in memory
        return self._kept[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


class FoldedStem(_Folded):
    """The first convolution with its bias. Its ReLU6 is the first block's, which applies it as it reads.

    oneDNN clamps inside the convolution for nothing, so on a CPU the output has been through ReLU6 already.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, shape: LayerShape, padding: str):
        super().__init__()
        self.shape = shape
        self.padding = padding
        self.register_buffer("weight", weight.clone(memory_format=torch.channels_last))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 3, H, W]`` to ``[N, c_out, ceil(H / 2), ceil(W / 2)]``, both channels_last."""
        how: dict[str, Any] = {"stride": self.shape.stride, "padding": self.padding}
        if not onednn.serves(x):
            return reference.conv2d(x, self.weight, self.bias, **how)
        return self._prepared(lambda: onednn.Convolution.of(self.weight, self.bias, x, ceiling=6.0, **how))(x)


class FoldedBlock(_Folded):
    """A block as ``kernels.inverted_residual_inference`` runs it.

    On a CPU the same by oneDNN, with weights that are prepared once.
    """

    def __init__(self, packed: PackedBlock, shape: LayerShape, padding: str, backend: str, *, relu6_input: bool):
        super().__init__()
        self.shape = shape
        self.padding = padding
        self.backend = backend
        self.relu6_input = relu6_input
        for name, tensor in packed._asdict().items():
            self.register_buffer(name, tensor)

    @property
    def packed(self) -> PackedBlock:
        """The weights as the kernels read them."""
        return PackedBlock._make(self._buffers[name] for name in PackedBlock._fields)

    def why_torch(self, shape: tuple[int, ...]) -> str | None:
        """Why torch runs an input of ``shape``, or None where the kernels do."""
        return why_torch_block(shape, self.packed, self.shape.stride, self.backend)

    def launches(self, shape: tuple[int, ...]) -> list[Launch]:
        """What inputs of ``shape`` and smaller batches may launch."""
        how = self.shape.stride, self.shape.residual, self.padding
        return every_launch(self.packed, shape, *how, relu6_input=self.relu6_input)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, c_in, H, W]`` in channels_last to ``[N, c_out, ceil(H / stride), ceil(W / stride)]``."""
        common.check_nhwc("x", x)
        packed, shape = self.packed, self.shape
        if why_torch_block(tuple(x.shape), packed, shape.stride, self.backend) is None:
            return run_kernels(x, packed, shape.stride, shape.residual, self.padding, self.relu6_input)
        if onednn.serves(x):  # and so the stem's ReLU6 is done
            return self._by_onednn(x)
        if self.relu6_input:
            x = F.relu6(x)
        weights = reference.unpacked(packed)
        return reference.folded_block(x, weights, stride=shape.stride, residual=shape.residual, padding=self.padding)

    def _by_onednn(self, x: Tensor) -> Tensor:
        """As ``reference.folded_block``, some pictures at a time where the expanded ones would be too large."""
        expand, depthwise, project = self._prepared(lambda: self._convolutions(x))

        def run(x: Tensor) -> Tensor:
            b = depthwise(x if expand is None else expand(x))
            return project(b, plus=x if self.shape.residual else None)

        expanded = self.packed.c_mid * x.shape[2] * x.shape[3] * x.element_size()
        pictures = max(1, LARGEST_BYTES // expanded)
        return run(x) if len(x) <= pictures else torch.cat([run(part) for part in x.split(pictures)])

    def _convolutions(self, x: Tensor) -> tuple[onednn.Convolution | None, onednn.Convolution, onednn.Convolution]:
        weights, prepare = reference.unpacked(self.packed), onednn.Convolution.of
        expand, a = None, x
        if weights.expand_weight is not None and weights.expand_bias is not None:
            expand = prepare(weights.expand_weight, weights.expand_bias, x, ceiling=1.0)
            a = expand(x)
        depthwise = prepare(
            weights.depthwise_weight,
            weights.depthwise_bias,
            a,
            stride=self.shape.stride,
            groups=self.packed.c_mid,
            padding=self.padding,
            ceiling=1.0,
        )
        return expand, depthwise, prepare(weights.project_weight, weights.project_bias, depthwise(a))


class FoldedHead(_Folded):
    """The last convolution, ReLU6 and the mean over all pixels, as ``kernels.conv_relu6_mean`` runs them."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, shape: LayerShape, backend: str):
        super().__init__()
        self.shape = shape
        self.backend = backend
        self.register_buffer("weight", weight.clone(memory_format=torch.channels_last))
        self.register_buffer("bias", bias)

    def why_torch(self, shape: tuple[int, ...]) -> str | None:
        """Why torch runs an input of ``shape``, or None where the kernel does."""
        return why_torch_head(shape, self.weight, self.backend)

    def launches(self, shape: tuple[int, ...]) -> list[Launch]:
        """What inputs of ``shape`` launch."""
        x = common.allocate((1, *shape[1:]), self.weight)
        return [conv_relu6_mean_launch(x, self.weight, self.bias, common.allocate((1, self.shape.c_out), x))]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, c_in, H, W]`` in channels_last to ``[N, c_out]``."""
        if self.why_torch(tuple(x.shape)) is None or not onednn.serves(x):
            return conv_relu6_mean(x, self.weight, self.bias, backend=self.backend)
        convolution = self._prepared(lambda: onednn.Convolution.of(self.weight, self.bias.to(x.dtype), x, ceiling=6.0))
        return convolution(x).mean((2, 3))


class FoldedClassifier(nn.Module):
    """The classifier."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, c_in]`` to ``[N, num_classes]``."""
        return F.linear(x, self.weight, self.bias)


class InferenceNetwork(nn.Module):
    """MobileNetV2 with folded BatchNorm, made by ``fold`` or read by ``load``: ``[N, 3, H, W]`` to logits.

    Pictures of any floating-point type are converted at the door, and so is another layout than channels_last. Logits
    have the network's type. Weights are buffers, and nothing has a gradient. The type was chosen when the network was
    folded: ``half()`` and ``to(dtype)`` are refused, any device is taken. Autocast changes nothing.

    The kernels make NaN inside a block 0 (``kernels.inverted_residual_inference``); ``explain(..., check=pictures)``
    tells where one arises.
    """

    certificate: Certificate | None = None

    def __init__(
        self,
        layers: list[nn.Module],
        *,
        alpha: float,
        num_classes: int,
        padding: str,
        backend: str,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.alpha = alpha
        self.num_classes = num_classes
        self.padding = padding
        self.dtype = dtype
        *features, classifier = layers
        self.features = nn.Sequential(*features)
        self.classifier = classifier
        self.backend = backend
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.buffers()).device

    @property
    def backend(self) -> str:
        """How blocks and head run; may be set at any time."""
        return self._on_kernels()[0].backend

    @backend.setter
    def backend(self, backend: str) -> None:
        check_choice("backend", backend, BACKENDS)
        for module in self._on_kernels():
            module.backend = backend

    def _on_kernels(self) -> list[FoldedBlock | FoldedHead]:
        return [module for module in self.features if isinstance(module, FoldedBlock | FoldedHead)]

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Stem, blocks, head and classifier by the names of ``layer_shapes``, in order."""
        yield from ((f"features.{index}", module) for index, module in enumerate(self.features))
        yield "classifier.1", self.classifier

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of pictures ``[N, 3, H, W]``, best given in channels_last and this type."""
        with common.without_autocast(x.device):
            return self.classifier(self.features(self.prepared(x)))

    def prepared(self, x: Tensor) -> Tensor:
        """Pictures ``[N, 3, H, W]`` as the stem wants them: channels_last, of the network's type."""
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"x: expected pictures [N, 3, H, W], got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x: expected floating-point pictures, got {x.dtype}")
        if x.device != self.device:
            raise ValueError(f"x: expected pictures on the network's device {self.device}, got {x.device}")
        refuse_gradient("InferenceNetwork", x)
        return x.to(self.dtype, memory_format=torch.channels_last)

    def warmup(self, batch: int = 64, resize: int = 224, *, progress: bool = True) -> int:
        """Compile every kernel that batches of up to ``batch`` pictures of side ``resize`` run; how many there were.

        Else the first batch, and later the first small one, would wait for it: minutes where Triton's cache is empty.
        """
        launches: list[Launch] = []
        for module, layer in zip(self.features, layer_shapes(self.alpha, resize), strict=False):
            shape = batch, layer.c_in, layer.height, layer.width
            if isinstance(module, FoldedBlock | FoldedHead) and module.why_torch(shape) is None:
                launches += module.launches(shape)
        return compile_ahead(launches, self.device, progress=progress)

    def explain(self, batch: int = 64, resize: int = 224, *, check: Tensor | None = None) -> Explanation:
        """Which path each layer takes and why, its tile, bytes, and bounds; its text is a table (``mnv2.explain``)."""
        from .explain import explain  # which knows this class

        return explain(self, batch, resize, check=check)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InferenceNetwork:
        for kept in (self.dtype, torch.float32):  # weights, and biases
            dtype = fn(torch.empty(0, dtype=kept, device=self.device)).dtype
            if dtype != kept:
                raise TypeError(
                    f"dtype: this network was rounded to {self.dtype} when it was folded, with biases in fp32, got "
                    f"{dtype}; fold the trained network again with fold(model, dtype=...)"
                )
        return super()._apply(fn, recurse)

    def save(self, path: str, about: Mapping[str, Any] | None = None) -> None:
        """Write weights, type, shapes, padding and backend to the safetensors file ``path``, all of it or nothing.

        ``about`` is anything else that its metadata should tell, under that name, in values that JSON has.

        Raises:
            RunError: it can't be written; what was there before still is.
        """
        network = {
            "alpha": self.alpha,
            "num_classes": self.num_classes,
            "padding": self.padding,
            "backend": self.backend,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        metadata = {"format": FORMAT, "network": json.dumps(network)}
        if about is not None:
            metadata["about"] = json.dumps(about)
        write_safetensors(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: str, *, backend: str | None = None) -> InferenceNetwork:
        """The network that ``save`` wrote to ``path``, on the CPU; ``backend`` replaces what it was saved with.

        Raises:
            InputError: the file can't be read, is damaged or something else; the message says which.
        """
        if os.path.isdir(path):
            raise InputError(f"{path}: expected a file, got a folder")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise InputError(f"{path}: expected a file of InferenceNetwork.save ({FORMAT}), got another one")
                about = json.loads(metadata["network"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            network = build(tensors, dtype=getattr(torch, about.pop("dtype")), **about)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from None
        except InputError:
            raise
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: damaged ({str(error).partition(chr(10))[0]})") from None
        if backend is not None:
            network.backend = backend
        return network


def expected_tensors(layer: LayerShape, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each tensor of a layer, by its name in the state dict."""
    if layer.kind == "classifier":
        return {
            "classifier.weight": ((layer.c_out, layer.c_in), dtype),
            "classifier.bias": ((layer.c_out,), dtype),
        }
    if layer.kind == "stem":
        weight = (layer.c_out, layer.c_in, 3, 3)
        return {f"{layer.name}.weight": (weight, dtype), f"{layer.name}.bias": ((layer.c_out,), dtype)}
    if layer.kind == "head":
        weight = (layer.c_out, layer.c_in, 1, 1)
        return {f"{layer.name}.weight": (weight, dtype), f"{layer.name}.bias": ((layer.c_out,), torch.float32)}
    expand = {"expand_weight": ((layer.c_mid, layer.c_in), dtype), "expand_bias": ((layer.c_mid,), torch.float32)}
    others = {
        "depthwise_weight": ((9, layer.c_mid), torch.float32),
        "depthwise_bias": ((layer.c_mid,), torch.float32),
        "project_weight": ((layer.c_out, layer.c_mid), dtype),
        "project_bias": ((layer.c_out,), torch.float32),
    }
    tensors = {**expand, **others} if layer.expand_macs else others
    return {f"{layer.name}.{name}": expected for name, expected in tensors.items()}


def build(
    tensors: Mapping[str, Tensor], *, alpha: float, num_classes: int, padding: str, backend: str, dtype: torch.dtype
) -> InferenceNetwork:
    """The network of these tensors, by their names in the state dict; ValueError names the first that doesn't fit."""
    check_padding(padding)
    shapes = layer_shapes(alpha, num_classes=num_classes)
    wanted = {name: expected for layer in shapes for name, expected in expected_tensors(layer, dtype).items()}
    for name, (shape, kind) in wanted.items():
        if name not in tensors:
            raise ValueError(f"lacks {name}")
        got = tuple(tensors[name].shape), tensors[name].dtype
        if got != (shape, kind):
            raise ValueError(f"expected {name} of shape {shape} in {kind}, got {got[0]} in {got[1]}")
    if extra := sorted(tensors.keys() - wanted.keys()):
        raise ValueError(f"holds {extra[0]}, which the network doesn't have")

    def layer(shape: LayerShape) -> nn.Module:
        if shape.kind == "classifier":
            return FoldedClassifier(tensors["classifier.weight"], tensors["classifier.bias"])
        if shape.kind == "block":
            packed = PackedBlock._make(tensors.get(f"{shape.name}.{name}") for name in PackedBlock._fields)
            return FoldedBlock(packed, shape, padding, backend, relu6_input=shape is shapes[1])
        weight, bias = tensors[f"{shape.name}.weight"], tensors[f"{shape.name}.bias"]
        return (
            FoldedStem(weight, bias, shape, padding) if shape is shapes[0] else FoldedHead(weight, bias, shape, backend)
        )

    layers = [layer(shape) for shape in shapes]
    return InferenceNetwork(layers, alpha=alpha, num_classes=num_classes, padding=padding, backend=backend, dtype=dtype)
