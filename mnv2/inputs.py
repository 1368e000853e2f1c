"""What a run reads: its pictures, the numbers of their classes, and the loaders that give them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .config import NetworkConfig, RunConfig, TrainConfig
from .data import Augmentation, Loader, LoaderState, SyntheticLoader, profile
from .distributed import World
from .files import Pictures, check_pictures, list_pictures, prepare
from .labels import ClassIndex
from .precision import input_dtype
from .weights import Weights


@dataclass(frozen=True)
class TrainingData:
    """The ``pictures`` to train on and those of val/, None where there are none.

    ``index`` numbers their classes (None for made-up pictures); ``num_classes`` are the outputs that the network needs.
    """

    pictures: Pictures | None
    validation: Pictures | None
    index: ClassIndex | None
    num_classes: int

    @cached_property
    def classes(self) -> list[str] | None:
        """Names by number."""
        return self.index.names(self.num_classes) if self.index else None

    @cached_property
    def listing(self) -> dict[str, Any]:
        """What tells these pictures from others (see ``Pictures.listing``)."""
        return self.pictures.listing() if self.pictures else {"pictures": 0, "sha256": ""}

    @cached_property
    def validation_listing(self) -> dict[str, Any] | None:
        """The same of the pictures that are evaluated."""
        return self.validation.listing() if self.validation else None


def find_training_data(config: TrainConfig, world: World, start: Weights | None) -> TrainingData:
    """List and check the pictures of train/ and, where it is there and evaluation asked for, of val/.

    Classes have the numbers that the weights ``start`` recorded where these are of as many classes, and the data's are
    among them.

    Raises:
        InputError: see ``files.list_pictures`` and ``files.prepare``.
    """
    if config.synthetic:
        return TrainingData(None, None, None, config.num_classes or (start.num_classes if start else 1000))
    pictures = list_pictures(config.data_url, "train")
    recorded = start.classes if start else None
    same = recorded is not None and (config.num_classes or len(pictures.classes)) == len(recorded)
    same = same and set(pictures.classes) <= set(recorded or ())
    pictures, index, num_classes = prepare(pictures, config, world, start if same else None)
    validation = None
    if config.eval_every and not os.path.isdir(os.path.join(config.data_url, "val")):
        world.print(f"no folder val/ in {config.data_url}: nothing is evaluated, and there is no best.pt")
    elif config.eval_every:
        validation = list_pictures(config.data_url, "val", config.val_labels)
        index.check(validation.classes)
        validation = check_pictures(validation, config.bad_files, world)
    return TrainingData(pictures, validation, index, num_classes)


def training_loader(
    config: TrainConfig, world: World, data: TrainingData, state: LoaderState | None
) -> Loader | SyntheticLoader:
    """Batches for training on ``data``, from ``state`` on where a run goes on."""
    settings: Any = {
        "batch_size": config.batch_size,
        "accumulate": config.grad_accum_steps,
        "world": world,
        "state": state,
    }
    if data.pictures is None or data.index is None:
        return SyntheticLoader(config.synthetic, data.num_classes, resize=config.resize, training=True, **settings)
    assert config.preprocessing is not None, "pretrained.follow decides"
    evaluated = profile(config.preprocessing, config.resize)  # whose normalisation the network is to learn
    return Loader(
        data.pictures.paths,
        data.index.labels(data.pictures.names),
        Augmentation(
            config.resize,
            config.crop_scale,
            config.crop_ratio,
            config.hflip,
            mean=evaluated.mean,
            std=evaluated.std,
        ),
        dtype=input_dtype(config.precision),
        threads=config.threads,
        seed=config.seed,
        **settings,
    )


def evaluation_loader(config: RunConfig, world: World, pictures: Pictures, index: ClassIndex) -> Loader:
    """Batches that hold each of ``pictures`` once."""
    return files_loader(config, world, pictures.paths, index.labels(pictures.names))


def files_loader(config: NetworkConfig, world: World, paths: Sequence[str], labels: Sequence[int]) -> Loader:
    """Batches that hold the picture of each file once, prepared as for an evaluation."""
    assert config.preprocessing is not None, "pretrained.follow decides"
    return Loader(
        paths,
        labels,
        profile(config.preprocessing, config.resize),
        batch_size=config.batch_size,
        world=world,
        dtype=input_dtype(config.precision),
        threads=config.threads,
    )
