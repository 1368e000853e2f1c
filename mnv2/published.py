"""Published weights of MobileNetV2: who offers them, under which names, and how well they do.

Everything here is what publishers say on the pages that are named; nothing was measured by this project, and what isn't
said is None. Left out are timm's 110d and 120d, which are deeper than MobileNetV2, and d-li14's 0.1, whose channels are
rounded otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from .labels import BACKGROUND_FIRST, IMAGENET, LAST_UNUSED


class Accuracy(NamedTuple):
    """Shares of ImageNet's validation pictures in percent."""

    top1: float
    top5: float


@dataclass(frozen=True)
class File:
    """A file to download.

    ``sha256`` are the hexadecimal digits of its checksum, all or the first eight, None where the publisher tells none.
    """

    name: str
    url: str
    sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """Weights that somebody offers.

    Args:
        origin: whose format the files have; for Google's weights, whose port it is.
        alpha: width multiplier.
        resize: side in pixels of the pictures that it was trained with.
        name: in the weights folder, of the file, or of the folder that holds all of ``files``.
        files: what is downloaded; the weights are in the last one.
        accuracy: as told on ``page``.
        page: where.
        megabytes: size of the weights as the publisher rounds it, in 10^6 bytes.
        licence: of the weights as the publisher states it.
        preprocessing: evaluation's profile (``data.profile``).
        padding: as in ``MobileNetV2``.
        norm_eps: epsilon of every BatchNorm.
        classes: order of the outputs, one of ``labels.imagenet_orders``.
        package: what must be installed to read it, beside mnv2.
        conversion: what makes weights of it that can be read, where it can't be.
    """

    origin: str
    alpha: float
    resize: int
    name: str
    files: tuple[File, ...]
    accuracy: Accuracy
    page: str
    megabytes: float | None = None
    licence: str | None = None
    preprocessing: str = "torchvision"
    padding: str = "symmetric"
    norm_eps: float = 1e-5
    classes: str = IMAGENET
    package: str | None = None
    conversion: str | None = None

    @property
    def weights(self) -> File:
        """The file that holds the weights."""
        return self.files[-1]

    @property
    def is_folder(self) -> bool:
        """Whether ``name`` is that of a folder."""
        return len(self.files) > 1


# alpha, resize: Google's accuracy and MindSpore's.
_ACCURACIES = {
    (1.4, 224): (Accuracy(75.0, 92.5), Accuracy(75.43, 92.5)),
    (1.3, 224): (Accuracy(74.4, 92.1), Accuracy(74.7, 92.3)),
    (1.0, 224): (Accuracy(71.8, 91.0), Accuracy(72.4, 90.8)),
    (1.0, 192): (Accuracy(70.7, 90.1), Accuracy(71.3, 90.2)),
    (1.0, 160): (Accuracy(68.8, 89.0), Accuracy(69.7, 89.1)),
    (1.0, 128): (Accuracy(65.3, 86.9), Accuracy(67.1, 86.9)),
    (1.0, 96): (Accuracy(60.3, 83.2), Accuracy(61.9, 83.6)),
    (0.75, 224): (Accuracy(69.8, 89.6), Accuracy(70.3, 89.4)),
    (0.75, 192): (Accuracy(68.7, 88.9), Accuracy(69.2, 88.7)),
    (0.75, 160): (Accuracy(66.4, 87.3), Accuracy(67.3, 87.4)),
    (0.75, 128): (Accuracy(63.2, 85.3), Accuracy(64.5, 85.4)),
    (0.75, 96): (Accuracy(58.8, 81.6), Accuracy(59.4, 81.6)),
    (0.5, 224): (Accuracy(65.4, 86.4), Accuracy(66.1, 86.3)),
    (0.5, 192): (Accuracy(63.9, 85.4), Accuracy(64.7, 85.2)),
    (0.5, 160): (Accuracy(61.0, 83.2), Accuracy(61.9, 83.4)),
    (0.5, 128): (Accuracy(57.7, 80.8), Accuracy(58.7, 80.9)),
    (0.5, 96): (Accuracy(51.2, 75.8), Accuracy(52.9, 76.3)),
    (0.35, 224): (Accuracy(60.3, 82.9), Accuracy(61.9, 83.2)),
    (0.35, 192): (Accuracy(58.2, 81.2), Accuracy(59.5, 81.6)),
    (0.35, 160): (Accuracy(55.7, 79.1), Accuracy(57.6, 79.8)),
    (0.35, 128): (Accuracy(50.8, 75.0), Accuracy(52.8, 76.3)),
    (0.35, 96): (Accuracy(45.5, 70.4), Accuracy(47.5, 71.3)),
}

_TF_SLIM = "https://github.com/tensorflow/models/blob/master/research/slim/nets/mobilenet/README.md"
_GOOGLE: dict[str, Any] = {"preprocessing": "tf", "padding": "same", "norm_eps": 1e-3}  # what its ports share


def _torchvision() -> Iterator[Source]:
    page = "https://pytorch.org/vision/stable/models/generated/torchvision.models.mobilenet_v2.html"
    whole = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
    for name, sha256, accuracy, megabytes, preprocessing in (
        ("mobilenet_v2-b0353104.pth", whole, Accuracy(71.878, 90.286), 14.2, "torchvision"),  # IMAGENET1K_V1
        ("mobilenet_v2-7ebf99e0.pth", "7ebf99e0", Accuracy(72.154, 90.822), 14.3, "torchvision_v2"),  # IMAGENET1K_V2
    ):
        files = (File(name, f"https://download.pytorch.org/models/{name}", sha256),)
        yield Source("torchvision", 1.0, 224, name, files, accuracy, page, megabytes, preprocessing=preprocessing)


def _timm() -> Iterator[Source]:
    page = "https://github.com/huggingface/pytorch-image-models/blob/main/results/results-imagenet.csv"
    more: dict[str, Any] = {"licence": "Apache-2.0", "preprocessing": "timm"}  # the licence is in the models' cards
    of_100 = Accuracy(72.976, 91.010)
    hub = File(
        "mobilenetv2_100.ra_in1k.safetensors",
        "https://huggingface.co/timm/mobilenetv2_100.ra_in1k/resolve/f3ff81ba89de0bc46b546568ebeab2edef6b9d49/"
        "model.safetensors",
        "55ea4fb3a96010b933710ebf44fc965b070d5cd054d3f35e44f2d1320b4a714e",
    )
    yield Source("timm", 1.0, 224, hub.name, (hub,), of_100, page, 14.2, **more)
    releases = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights"
    for alpha, name, accuracy in (  # on the hub mobilenetv2_140.ra_in1k, _100.ra_in1k and _050.lamb_in1k
        (1.4, "mobilenetv2_140_ra-21a4e913.pth", Accuracy(76.520, 92.986)),
        (1.0, "mobilenetv2_100_ra-b33bc2c4.pth", of_100),
        (0.5, "mobilenetv2_050-3d30d450.pth", Accuracy(65.950, 86.088)),
    ):
        yield Source("timm", alpha, 224, name, (_named_by_checksum(releases, name),), accuracy, page, **more)


def _d_li14() -> Iterator[Source]:
    page = "https://github.com/d-li14/mobilenetv2.pytorch/blob/master/README.md"
    folder = (
        "https://raw.githubusercontent.com/d-li14/mobilenetv2.pytorch/1733532bd43743442077326e1efc556d7cfd025d/"
        "pretrained"
    )
    for alpha, resize, name, accuracy in (
        (1.0, 224, "mobilenetv2-c5e733a8.pth", Accuracy(72.834, 91.060)),  # trained for longer than the next
        (1.0, 224, "mobilenetv2_1.0-0c6065bc.pth", Accuracy(72.192, 90.534)),
        (1.0, 192, "mobilenetv2_192x192-e423d99e.pth", Accuracy(71.076, 89.760)),
        (1.0, 160, "mobilenetv2_160x160-64dc7fa1.pth", Accuracy(69.504, 88.848)),
        (1.0, 128, "mobilenetv2_128x128-fd66a69d.pth", Accuracy(66.740, 86.952)),
        (1.0, 96, "mobilenetv2_96x96-ff0e83d8.pth", Accuracy(62.696, 84.046)),
        (0.75, 224, "mobilenetv2_0.75-dace9791.pth", Accuracy(69.952, 88.986)),
        (0.5, 224, "mobilenetv2_0.5-eaa6f9ad.pth", Accuracy(64.592, 85.392)),
        (0.35, 224, "mobilenetv2_0.35-b2e15951.pth", Accuracy(60.092, 82.172)),
        (0.25, 224, "mobilenetv2_0.25-b61d2159.pth", Accuracy(52.352, 75.932)),
    ):
        files = (_named_by_checksum(folder, name),)
        # The licence is the repository's, which holds the weights.
        yield Source("d-li14", alpha, resize, name, files, accuracy, page, licence="Apache-2.0")


def _named_by_checksum(folder: str, name: str) -> File:
    """A file whose name ends in the first digits of its checksum, as torch.hub has it."""
    return File(name, f"{folder}/{name}", os.path.splitext(name)[0].rpartition("-")[2])


_HUB_SETTINGS = ("config.json", "preprocessor_config.json")
_HUB_140 = "a5c7f052fbbaf60880d9f9dbc12550e5ddb4375f9b8a96cc1d488103689b6ec6"
_HUB_100 = "94f61c6902b411e6b730cfe2443c8b2d983a2d50d289c4bd7083e0583ccdfe76"
_HUB_075 = "963ae7c2b05f7ead5130bcc8d28e67bb5bafaf44bc51312f94e62c2d9e20cc66"
_HUB_035 = "639728f97c1f86fcba4a0b7e3f6ba415cc3dbb3cbd2c467b029a7ce811ae2334"


def _transformers() -> Iterator[Source]:
    """The four that are in the namespace google/, where the model cards say that the licence is "other".

    The last one's safetensors file is the hub's own conversion, which was proposed there and not merged.
    """
    for alpha, resize, commit, name, sha256, megabytes in (
        (1.4, 224, "main", "pytorch_model.bin", _HUB_140, 24.7),
        (1.0, 224, "5e58f27900895c96ce19c9acf60d0f30220c3424", "model.safetensors", _HUB_100, 14.2),
        (0.75, 160, "358326189ec7ed5f470163c13cd2806049a067b0", "pytorch_model.bin", _HUB_075, 10.8),
        (0.35, 96, "5d96f9d4a2d8dfc954023eeaa456d88c1503ea1f", "model.safetensors", _HUB_035, 6.81),
    ):
        folder = f"mobilenet_v2_{alpha}_{resize}"
        url = f"https://huggingface.co/google/{folder}/resolve/{commit}"
        settings = (File(file, f"{url}/{file}") for file in _HUB_SETTINGS)
        files = (*settings, File(name, f"{url}/{name}", sha256))
        google, _ = _ACCURACIES[alpha, resize]
        more = _GOOGLE | {"licence": "other", "classes": BACKGROUND_FIRST}
        yield Source("transformers", alpha, resize, folder, files, google, _TF_SLIM, megabytes, **more)


def _mindspore() -> Iterator[Source]:
    page = "https://gitee.com/mindspore/vision/blob/master/examples/classification/mobilenetv2/README.md"
    for (alpha, resize), (_, accuracy) in _ACCURACIES.items():
        name = f"mobilenet_v2_{alpha}_{resize}.ckpt"
        files = (File(name, f"https://download.mindspore.cn/vision/classification/{name}"),)
        more: dict[str, Any] = {"preprocessing": "reference", "classes": LAST_UNUSED}
        yield Source("mindspore", alpha, resize, name, files, accuracy, page, **more)


def _keras() -> Iterator[Source]:
    """Google's weights without the background's; the licence is that of Keras's documentation."""
    page = "https://www.tensorflow.org/versions/r2.11/api_docs/python/tf/keras/applications/mobilenet_v2"
    folder = "https://storage.googleapis.com/tensorflow/keras-applications/mobilenet_v2"
    for (alpha, resize), (google, _) in _ACCURACIES.items():
        name = f"mobilenet_v2_weights_tf_dim_ordering_tf_kernels_{alpha}_{resize}.h5"
        files = (File(name, f"{folder}/{name}"),)
        more = _GOOGLE | {"licence": "Apache-2.0", "package": "h5py"}
        if (alpha, resize) == (1.0, 224):  # the one that Keras has measured
            measured = Accuracy(71.3, 90.1)
            yield Source("keras", 1.0, 224, name, files, measured, "https://keras.io/api/applications/", 14, **more)
        else:
            yield Source("keras", alpha, resize, name, files, google, page, **more)


def _tf_slim() -> Iterator[Source]:
    for (alpha, resize), (google, _) in _ACCURACIES.items():
        name = f"mobilenet_v2_{alpha}_{resize}.tgz"
        files = (File(name, f"https://storage.googleapis.com/mobilenet_v2/checkpoints/{name}"),)
        conversion = "convert_original_tf_checkpoint_to_pytorch.py of transformers 4, beside TensorFlow"
        more = _GOOGLE | {"classes": BACKGROUND_FIRST, "conversion": conversion}
        yield Source("tf-slim", alpha, resize, name, files, google, _TF_SLIM, **more)


SOURCES = (*_torchvision(), *_timm(), *_d_li14(), *_transformers(), *_mindspore(), *_keras(), *_tf_slim())


def _published() -> dict[tuple[float, int], dict[str, Accuracy]]:
    """Accuracies of each variant by who trained it."""
    found = {
        variant: {"Google": google, "MindSpore": reference} for variant, (google, reference) in _ACCURACIES.items()
    }
    for source in SOURCES:
        if source.origin == "d-li14" and (source.alpha, source.resize) in found:
            # Of two at 1.0 and 224 px the second counts, which was trained like the others.
            found[source.alpha, source.resize][source.origin] = source.accuracy
    return found


PUBLISHED = _published()
