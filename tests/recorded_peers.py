"""What other libraries' MobileNetV2 make of made-up weights and pictures, on record.

`peer_logits/PEER.json` holds a peer's names, and for each of its variants shapes, settings, and the logits that its own
code gave. Weights and pictures aren't on record: both sides make them by name and shape, of integers whose sequence
NumPy guarantees and of exact operations, so that they are the same bits everywhere. `record_peers.py` records anew,
`write` makes files as the peers do.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mindspore_bytes
import numpy as np

FOLDER = Path(__file__).parent / "peer_logits"
HEIGHT, WIDTH = 64, 65  # so that padding meets even and odd sides, and no side can stand for the other
KEPT = 50  # logits of a picture that are recorded

Shapes = Mapping[str, Sequence[int]]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Variant:
    """A network of a peer: what it was made with, ``shapes`` by its own names, and ``logits`` [2, KEPT].

    ``config`` is what a file of the peer says beside its tensors.
    """

    alpha: float
    classes: int
    padding: str
    norm_eps: float
    config: dict[str, Any] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=dict)
    logits: list[list[float]] = field(default_factory=list)

    def __str__(self) -> str:
        """For a test's name."""
        return f"{self.alpha}-{self.padding}"


@dataclass(frozen=True)
class Peer:
    """A library, the versions of what recorded it, its variants, and the tensors' names in other containers."""

    name: str
    versions: dict[str, str]
    variants: list[Variant]
    aliases: dict[str, list[str]] = field(default_factory=dict)

    def save(self) -> None:
        """Write the record; names, which the variants share, stand in it once."""
        names = list(self.variants[0].shapes)
        if any(list(variant.shapes) != names for variant in self.variants):
            raise ValueError(f"{self.name}: expected the same names in each variant")
        variants = [asdict(variant) | {"shapes": list(variant.shapes.values())} for variant in self.variants]
        content = {"versions": self.versions, "names": names, "aliases": self.aliases}
        lines = [f"{json.dumps(name)}: {json.dumps(value)}," for name, value in content.items()]
        lines += ['"variants": [', ",\n".join(map(json.dumps, variants)), "]"]
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / f"{self.name}.json").write_text("\n".join(["{", *lines, "}", ""]))


def recorded(name: str) -> Peer:
    """The record of the peer ``name``."""
    content = json.loads((FOLDER / f"{name}.json").read_text())
    variants = [
        Variant(**variant | {"shapes": dict(zip(content["names"], variant["shapes"], strict=True))})
        for variant in content["variants"]
    ]
    return Peer(name, content["versions"], variants, content["aliases"])


def weights(shapes: Shapes, seed: int = 0) -> Arrays:
    """Weights by name, in fp32 but for torch's counters of batches.

    Norms are far from doing nothing; activations meet both ends of ReLU6, and logits are about 1.
    """
    return {name: _weight(name, tuple(shape), seed) for name, shape in shapes.items()}


def pictures(seed: int = 0) -> np.ndarray:
    """Two normalised pictures ``[2, 3, HEIGHT, WIDTH]``."""
    return 2 * _uniform("pictures", (2, 3, HEIGHT, WIDTH), seed)


def _weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.array(7)
    uniform = _uniform(name, shape, seed)
    if name.endswith(("running_var", "moving_variance")):
        return np.float32(1.5) + uniform
    if name.endswith(("running_mean", "moving_mean", "beta", "bias")):
        return np.float32(0.5) * uniform
    if len(shape) == 1:  # a norm's scale
        return np.float32(1.25) + np.float32(0.75) * uniform
    return np.float32(math.sqrt(4 / _fan_in(name, shape))) * uniform


def _fan_in(name: str, shape: tuple[int, ...]) -> int:
    """Inputs of one output, in torch's order of dimensions or in Keras's."""
    if "/" not in name:
        return math.prod(shape[1:])
    return math.prod(shape[:2] if "depthwise" in name else shape[:-1])


def _uniform(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Numbers from -1 to 1 in fp32, which hold 24 bits of PCG64's 64."""
    bits = np.random.PCG64(zlib.crc32(f"{seed} {name}".encode())).random_raw(math.prod(shape))
    return ((bits >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)


def write(peer: Peer, variant: Variant, container: str, folder: Path, seed: int = 0) -> Path:
    """A file, or for transformers a folder, of made-up weights as the peer writes it."""
    import torch
    from safetensors.torch import save_file

    path = folder / f"weights{container}"
    arrays = weights(variant.shapes, seed)
    if container == ".ckpt":
        path.write_bytes(mindspore_bytes.checkpoint(arrays.items()))
    elif container.endswith(".h5"):
        _write_h5(peer, arrays, container, path)
    elif container == ".keras":
        inner = folder / "model.weights.h5"
        _write_h5(peer, arrays, ".weights.h5", inner)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("metadata.json", json.dumps({"keras_version": peer.versions["keras"]}))
            archive.write(inner, inner.name)
    else:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if container == ".pth":
            torch.save(tensors, path)
        elif container == ".safetensors":
            save_file(tensors, path)
        else:
            path.mkdir()
            save_file(tensors, path / "model.safetensors", {"format": "pt"})
            (path / "config.json").write_text(json.dumps(variant.config | {"id2label": _labels()}))
    return path


def _labels() -> dict[str, str]:
    """The classes of Google's weights as their configuration names them."""
    from mnv2.labels import imagenet_classes

    return dict(enumerate(["background", *(names for _, names in imagenet_classes())]))


def _write_h5(peer: Peer, arrays: Arrays, container: str, path: Path) -> None:
    """Keras's file of weights, its saved model, `.weights.h5`, or a file like those that it downloads."""
    import h5py

    places = {
        ".h5": [f"{_layer(name)}/{name}" for name in arrays],
        ".model.h5": [f"model_weights/{_layer(name)}/{name}" for name in arrays],
        ".weights.h5": peer.aliases.get(".weights.h5", []),
        ".published.h5": [f"{_layer(name)}/{name}:0" for name in map(published_name, arrays)],
    }[container]
    with h5py.File(path, "w") as file:
        for place, array in zip(places, arrays.values(), strict=True):
            file[place] = array


def _layer(name: str) -> str:
    return name.partition("/")[0]


def published_name(name: str) -> str:
    """What the files that keras.applications downloads call a variable: its first version's name."""
    layer, _, variable = name.partition("/")
    if match := re.fullmatch(r"(?:expanded_conv|block_(\d+))_([a-z]+)(_BN)?", layer):
        number, step, norm = match.groups(default="")
        number = number or "0"
        layer = f"bn{number}_conv_{number}_bn_{step}" if norm else f"mobl{number}_conv_{number}_{step}"
        if step == "depthwise" and not norm:
            variable = "depthwise_kernel"
    return f"{'Logits' if layer == 'predictions' else layer}/{variable}"
