"""Kinds of files that a trained network is exported to: how each is written, and run again as others will run it."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import __version__
from .errors import InputError, RunError
from .fold import classifier_of, fold
from .inference import InferenceNetwork
from .model import MobileNetV2
from .plain import plain
from .weights import Weights, read

INPUT, OUTPUT = "pictures", "logits"
OPSET = 18  # the lowest that the exporter writes without a conversion, for the sake of older runtimes
# Side in pixels from which pictures of any size go. Smaller ones leave the last features a side of 1, a case of its own
# for torch.export.
SMALLEST = 33
ABOUT = "mnv2.json"  # of a .pt2: what ONNX calls metadata

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """A network and what becomes of it.

    Args:
        model: in evaluation, on the CPU.
        resize: side of the pictures in pixels.
        fold: fold BatchNorm into the convolutions.
        dtype: of weights, pictures and logits.
        dynamic_size: pictures of any size, from ``SMALLEST`` pixels a side, in place of ``resize``.
        about: what the file tells of itself besides, by name, in values that JSON has.
    """

    model: MobileNetV2
    resize: int
    fold: bool
    dtype: torch.dtype
    dynamic_size: bool
    about: Mapping[str, Any]

    def told(self) -> dict[str, Any]:
        """All that the file tells of itself."""
        return {
            **self.about,
            "alpha": self.model.alpha,
            "padding": self.model.padding,
            "norm_eps": self.model.norm_eps,
            "resize": self.resize,
            "fold": self.fold,
            "dtype": str(self.dtype).removeprefix("torch."),
            "mnv2_version": __version__,
        }


class Format(NamedTuple):
    """A kind of file: its extension, what it holds, who runs it, and ``write``, which makes one and gives its run."""

    extension: str
    content: str
    runtime: str
    write: Callable[[Exported, str], Run]


def program(exported: Exported) -> torch.export.ExportedProgram:
    """The network as a graph of torch's own operations, for any number of pictures."""
    network = plain(exported.model, exported.dtype, fold=exported.fold)
    sizes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if exported.dynamic_size:
        sizes |= {2: torch.export.Dim("height", min=SMALLEST), 3: torch.export.Dim("width", min=SMALLEST)}
    pictures = torch.zeros(2, 3, exported.resize, exported.resize, dtype=exported.dtype)
    made = torch.export.export(network, (pictures,), dynamic_shapes=(sizes,))
    made.example_inputs = None  # as large as the weights are
    for node in made.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of files of this machine
    return made


def onnx_packages() -> tuple[Any, Any, Any]:
    """The modules onnx, onnxruntime and onnxscript.optimizer; InputError where one is missing."""
    try:
        import onnx
        import onnxruntime
        from onnxscript import optimizer
    except ImportError as error:
        raise InputError(
            f"--format onnx: needs onnx, onnxscript and onnxruntime ({error}): pip install 'mnv2[export]'"
        ) from error
    return onnx, onnxruntime, optimizer


def write_onnx(exported: Exported, path: str) -> Run:
    """ONNX's standard operators, weights inside; onnxruntime runs it."""
    onnx, onnxruntime, optimizer = onnx_packages()
    converted = _converted(exported, optimizer)
    for name, value in exported.told().items():
        converted.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    converted.save(path, external_data=False)
    try:
        onnx.checker.check_model(path, full_check=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # of classes that differ by version
        raise RunError(f"what the exporter made is no ONNX file: {str(error).partition(chr(10))[0]}") from error

    def run(pictures: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: pictures.numpy()})[0])

    return run


def _converted(exported: Exported, optimizer: Any) -> Any:
    """The program as a ``torch.onnx.ONNXProgram``, its sizes named, without the exporter's notes for itself."""
    made = program(exported)
    with _quiet():
        converted: Any = torch.onnx.export(
            made,
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            optimize=exported.fold,  # which would fold BatchNorm too, in fp32
            verbose=False,
        )
    graph = converted.model.graph
    if not exported.fold:
        optimizer.fold_constants(converted.model)
        optimizer.remove_unused_nodes(converted.model)
    sizes = graph.inputs[0].shape
    names = {0: "batch", 2: "height", 3: "width"} if exported.dynamic_size else {0: "batch"}
    converted.rename_axes({sizes[axis]: name for axis, name in names.items()})
    values = [value for node in graph for value in node.outputs]
    for noted in (graph, *graph, *graph.inputs, *graph.initializers.values(), *values):
        noted.metadata_props.clear()
    return converted


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's words on packages that it could use and on its own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def write_torch(exported: Exported, path: str) -> Run:
    """What ``torch.export.load`` reads, with or without mnv2."""
    made = program(exported)
    content = io.BytesIO()  # a disk that is full would end the process within torch
    torch.export.save(made, content, extra_files={ABOUT: json.dumps(exported.told())})
    with open(path, "wb") as file:
        file.write(content.getbuffer())
    with open(path, "rb") as file:
        return torch.export.load(file).module()


def write_safetensors(exported: Exported, path: str) -> Run:
    """Weights for mnv2: folded those that ``InferenceNetwork.load`` reads, else those that ``--pretrained`` takes."""
    model = exported.model
    if exported.fold:
        fold(model, exported.dtype).save(path, exported.told())
        return InferenceNetwork.load(path, backend="torch")
    _weights(exported, path).save(path)
    network = MobileNetV2(
        model.alpha,
        classifier_of(model).out_features,
        backend="torch",
        padding=model.padding,
        norm_eps=model.norm_eps,
    )
    try:
        read(path).load_into(network)
    except InputError as error:
        if not str(error).startswith(f"{path}: "):
            raise
        # The tensors are fine: it is the record, and all but what the network itself has is the caller's.
        raise InputError(f"about: {str(error).removeprefix(f'{path}: ')}") from None
    return network.eval()


def _weights(exported: Exported, path: str) -> Weights:
    """The network as weights, with what they record; of the resolution that is what they were trained at."""
    weights = Weights(path, exported.model.state_dict())
    told = {**exported.told(), "resize": exported.about.get("trained_at")}
    return dataclasses.replace(weights, **{name: told[name] for name in weights.record() if name in told})


FORMATS = {
    "onnx": Format(".onnx", f"ONNX of opset {OPSET}", "onnxruntime", write_onnx),
    "torch": Format(".pt2", "a program of torch.export", "torch", write_torch),
    "safetensors": Format(".safetensors", "weights for mnv2", "mnv2", write_safetensors),
}


def check_format(
    name: str, *, padding: str | None, fold: bool, dtype: torch.dtype, dynamic_size: bool, resize: int
) -> None:
    """Raise InputError where there is no such format, or none with these settings."""
    if name not in FORMATS:
        raise InputError(f"--format: expected {' or '.join(FORMATS)}, got {name}")
    if dtype not in (torch.float32, torch.float16):
        raise InputError(f"--precision: expected fp32 or fp16, got {dtype}")
    if name == "safetensors" and dynamic_size:
        raise InputError("--dynamic_size: expected False for safetensors, whose networks take any size, got True")
    if name == "safetensors" and not fold and dtype != torch.float32:
        raise InputError("--precision: expected fp32 for unfolded safetensors, which training reads, got fp16")
    if dynamic_size and padding == "same":
        raise InputError(
            "--dynamic_size: expected False with padding same, whose zeros depend on which sides are odd, got True; "
            "export a file for each --resize"
        )
    if dynamic_size and resize < SMALLEST:
        raise InputError(f"--resize: expected at least {SMALLEST} with --dynamic_size, got {resize}")
