"""Other libraries' MobileNetV2 as they are, run with weights by their own names.

Each function makes a peer's network for a variant. torchvision, timm, transformers and Keras install together; MindCV
and MindSpore Vision (``mindvision``) want MindSpore, which wants NumPy 1.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from recorded_peers import HEIGHT, WIDTH, Arrays, Shapes, Variant


@dataclass(frozen=True)
class Network:
    """A peer's network.

    Args:
        shapes: of its tensors by name.
        run: maps weights and pictures [N, 3, H, W] to logits [N, classes].
        save: write the weights that were run last to a path, by the ending that it has.
        config: what a file of the peer says beside its tensors.
        aliases: the tensors' names in other containers, in the order of ``shapes``.
    """

    shapes: Shapes
    run: Callable[[Arrays, np.ndarray], np.ndarray]
    save: Mapping[str, Callable[[str], object]]
    config: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)


def torchvision(variant: Variant) -> Network:
    from bench.peers import import_torchvision

    import_torchvision()
    from torchvision.models import mobilenet_v2

    return _of_torch(mobilenet_v2(weights=None, width_mult=variant.alpha, num_classes=variant.classes))


def timm(variant: Variant) -> Network:
    from bench.peers import import_torchvision

    import_torchvision()
    import timm

    return _of_torch(timm.create_model(f"mobilenetv2_{round(100 * variant.alpha):03}", pretrained=False))


def transformers(variant: Variant) -> Network:
    from bench.peers import transformers_network

    module = transformers_network(variant.alpha, variant.padding, variant.norm_eps, variant.classes)
    kept = {name: value for name, value in module.config.to_dict().items() if name not in ("id2label", "label2id")}
    return replace(_of_torch(module, lambda out: out.logits), save={"": module.save_pretrained}, config=kept)


def _of_torch(module: Any, logits: Callable[[Any], Any] = lambda out: out) -> Network:
    import torch

    def run(weights: Arrays, pictures: np.ndarray) -> np.ndarray:
        module.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        with torch.no_grad():
            return logits(module.eval()(torch.from_numpy(pictures))).numpy()

    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return Network(shapes, run, {".pth": lambda path: torch.save(module.state_dict(), path)})


def keras(variant: Variant) -> Network:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    model = keras.applications.MobileNetV2(
        weights=None,
        alpha=variant.alpha,
        classes=variant.classes,
        classifier_activation=None,
        input_shape=(HEIGHT, WIDTH, 3),
    )
    variables = {variable.path: variable for variable in model.weights}

    def run(weights: Arrays, pictures: np.ndarray) -> np.ndarray:
        for name, variable in variables.items():
            variable.assign(weights[name])
        return np.asarray(model.predict(pictures.transpose(0, 2, 3, 1), verbose=0))

    shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
    save = {".h5": model.save, ".keras": model.save, ".weights.h5": model.save_weights}
    return Network(shapes, run, save, aliases={".weights.h5": _places(variables, model.save_weights)})


def _places(variables: dict[str, Any], save_weights: Callable[[str], None]) -> list[str]:
    """Where each variable lies in a file that Keras writes, found by a number of its own in it."""
    import h5py

    for number, variable in enumerate(variables.values()):
        variable.assign(np.full(variable.shape, number))
    places: dict[int, str] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            places[int(item[()].flat[0])] = name

    with tempfile.TemporaryDirectory() as folder:
        save_weights(f"{folder}/model.weights.h5")
        with h5py.File(f"{folder}/model.weights.h5") as file:
            file.visititems(note)
    return [places[number] for number in range(len(variables))]


def mindcv(variant: Variant) -> Network:
    from mindcv.models.mobilenetv2 import MobileNetV2

    return _of_mindspore(MobileNetV2(alpha=variant.alpha, num_classes=variant.classes))


def mindvision(variant: Variant) -> Network:
    _without_packages("classification", "classification.models", "engine", "utils")
    models = "mindvision.classification.models"
    blocks = _without_packages("classification.models.blocks")
    blocks.ConvNormActivation = importlib.import_module(f"{models}.blocks.blocks").ConvNormActivation
    _without_packages("classification.models.backbones")
    backbone = importlib.import_module(f"{models}.backbones.mobilenet_v2").MobileNetV2(alpha=variant.alpha)
    classifier = importlib.import_module(f"{models}.classifiers").BaseClassifier
    head = importlib.import_module(f"{models}.head.conv_head").ConvHead
    pool = importlib.import_module(f"{models}.neck").GlobalAvgPooling
    channels = max(1280, round(1280 * variant.alpha))
    return _of_mindspore(classifier(backbone, pool(keep_dims=True), head(channels, variant.classes)))


def _without_packages(*names: str) -> Any:
    """Make packages of mindvision without what they import, which MindSpore 2 doesn't have; the last one."""
    found = importlib.util.find_spec("mindvision")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("mindvision")
    for name in names:
        package: Any = types.ModuleType(f"mindvision.{name}")
        package.__path__ = [str(Path(found.origin).parent.joinpath(*name.split(".")))]
        sys.modules[package.__name__] = package
    return package


def _of_mindspore(cell: Any) -> Network:
    import mindspore

    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    parameters = {parameter.name: parameter for parameter in cell.get_parameters()}

    def run(weights: Arrays, pictures: np.ndarray) -> np.ndarray:
        for name, parameter in parameters.items():
            parameter.set_data(mindspore.Tensor(weights[name]))
        return cell.set_train(False)(mindspore.Tensor(pictures)).asnumpy()

    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return Network(shapes, run, {".ckpt": lambda path: mindspore.save_checkpoint(cell, path)})
