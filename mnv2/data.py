"""Pictures to batches: one DALI pipeline for training and evaluation, on a CPU or a GPU.

A batch is NHWC in memory and is handed to torch without a copy, as a channels_last tensor. The reader's "label" is the
picture's number in our own list, so every sample of every batch is known by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from .distributed import World
from .errors import InputError, RunError
from .integrity import fault

try:
    from nvidia.dali import fn, math, pipeline_def, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    _ABSENT: ImportError | None = None
except ImportError as error:  # networks train and are tested on made-up pictures without it
    _ABSENT = error

IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
_READER = "reader"
_SEARCHED = 64  # files decoded at once in the search for one that fails


class BadFileError(InputError):
    """The file at ``path`` can't be decoded, for the reason ``problem``, though the check before passed it."""

    def __init__(self, path: str, problem: str, remedy: str):
        super().__init__(f"{path} {problem}; {remedy}")
        self.path = path
        self.problem = problem


class LoaderState(TypedDict):
    """Batches of the epoch that are used, and DALI's own state of reader and random numbers (None without DALI)."""

    position: int
    reader: bytes | None


class Batch(NamedTuple):
    """Pictures ``images [B, 3, R, R]`` in channels_last, ``labels [B]`` int64, and ``numbers [B]`` int64 on the CPU.

    A picture's number is its place in the list that the loader was given. Evaluation fills its last batch up, so that
    every batch has one shape; such rows have number -1 and count for nothing.
    """

    images: Tensor
    labels: Tensor
    numbers: Tensor


@dataclass(frozen=True)
class Augmentation:
    """Training: a random crop of the picture resized to ``resize`` by ``resize`` pixels, perhaps mirrored.

    The crop covers a share of the area within ``scale`` at a width over height within ``ratio`` (Szegedy et al. 2015);
    ``hflip`` is the probability of mirroring. ``mean`` and ``std`` are in units of 8-bit pixel values.
    """

    resize: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 1.333)
    hflip: float = 0.5
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD


@dataclass(frozen=True)
class Profile:
    """Evaluation: the short side is resized to ``shorter`` pixels and the centre of ``resize`` by ``resize`` kept.

    Filters are antialiased; ``cubic`` takes the bicubic in place of the bilinear. ``mean`` and ``std`` are in units of
    8-bit pixel values.
    """

    resize: int
    shorter: int
    cubic: bool = False
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.shorter < self.resize:
            raise ValueError(f"shorter: expected at least resize, {self.resize}, got {self.shorter}")


_PROFILES: dict[str, Callable[[int], Profile]] = {
    "reference": lambda resize: Profile(resize, resize + 32),
    "torchvision": lambda resize: Profile(resize, int(resize / 0.875)),
    "torchvision_v2": lambda resize: Profile(resize, round(resize * 232 / 224)),
    "timm": lambda resize: Profile(resize, int(resize / 0.875), cubic=True),
    "tf": lambda resize: Profile(resize, round(resize / 0.875), mean=(127.5,) * 3, std=(127.5,) * 3),
}


def profile(name: str, resize: int) -> Profile:
    """The evaluation profile called ``name``, one of ``config.PREPROCESSING``, at ``resize`` pixels."""
    if name not in _PROFILES:
        raise ValueError(f"name: expected one of {tuple(_PROFILES)}, got {name!r}")
    return _PROFILES[name](resize)


def require_dali() -> None:
    """Raise InputError, which names the extra to install, where DALI is missing."""
    if _ABSENT is not None:
        raise InputError(
            f"the loader needs NVIDIA DALI ({_ABSENT}): install mnv2 with the extra that fits torch's CUDA, `pip "
            "install 'mnv2[cuda13]'` (torch from the package index, CPU builds too) or `pip install 'mnv2[cuda12]'`"
        ) from _ABSENT


def picture_pipeline(*arguments: Any, **keywords: Any) -> Any:
    """DALI's pipeline of ``_pictures``, whose arguments go there, and DALI's own (batch_size, seed) to its constructor.

    Raises:
        InputError: DALI isn't installed.
    """
    require_dali()
    # Checkpointing changes the order of the pictures, so a run that will be resumed must have it on from the start.
    return pipeline_def(enable_checkpointing=True)(_pictures)(*arguments, **keywords)


def _pictures(
    paths: Sequence[str],
    transform: Augmentation | Profile,
    *,
    gpu: bool,
    dtype: torch.dtype = torch.float32,
    shard: int = 0,
    shards: int = 1,
    order_seed: int = 0,
) -> tuple[Any, Any]:
    """Batches of (pictures ``[R, R, 3]`` normalised in ``dtype``, their places in ``paths`` ``[1]`` int32).

    With ``gpu`` JPEGs are decoded by CPU and GPU together and everything after runs on the GPU. An ``Augmentation``
    shuffles all pictures anew each epoch, the same on every shard for one ``order_seed``; a ``Profile`` keeps their
    order. A shard's last batch is filled up with its last picture.
    """
    order: dict[str, Any] = {}
    if isinstance(transform, Augmentation):
        order = {"shuffle_after_epoch": True, "shuffle_after_epoch_seed": order_seed}
    encoded, places = fn.readers.file(
        name=_READER,
        files=list(paths),
        labels=list(range(len(paths))),
        shard_id=shard,
        num_shards=shards,
        pad_last_batch=True,
        **order,
    )
    return prepared(decoded(encoded, transform, gpu=gpu), transform, dtype), places


def decoded(encoded: Any, transform: Augmentation | Profile, *, gpu: bool) -> Any:
    """RGB pixels of encoded pictures; of a random crop alone in training. With ``gpu`` CPU and GPU share the work."""
    decoding: dict[str, Any] = {
        "device": "mixed" if gpu else "cpu",
        "output_type": types.RGB,
        "adjust_orientation": False,  # as torchvision and PIL
        "jpeg_fancy_upsampling": True,  # the GPU's decoder upsamples chroma as the CPU's does
    }
    if isinstance(transform, Augmentation):
        return fn.decoders.image_random_crop(
            encoded, random_area=transform.scale, random_aspect_ratio=transform.ratio, **decoding
        )
    return fn.decoders.image(encoded, **decoding)


def prepared(pictures: Any, transform: Augmentation | Profile, dtype: torch.dtype) -> Any:
    """Inputs of the network from decoded pictures: resized, cropped in evaluation, perhaps mirrored, normalised."""
    mirror = fn.random.coin_flip(probability=transform.hflip) if isinstance(transform, Augmentation) else 0
    return normalised(resized(pictures, transform), transform, dtype, mirror)


def resized(pictures: Any, transform: Augmentation | Profile) -> Any:
    """8-bit pixels ``[R, R, 3]``: of the whole picture in training, of its centre in evaluation."""
    region: dict[str, Any] = {}
    if isinstance(transform, Profile):
        region["roi_start"], region["roi_end"] = _centre(pictures.shape(), transform)
    return fn.resize(
        pictures,
        size=(transform.resize, transform.resize),
        interp_type=types.INTERP_CUBIC if isinstance(transform, Profile) and transform.cubic else types.INTERP_LINEAR,
        antialias=True,
        **region,
    )


def normalised(pictures: Any, transform: Augmentation | Profile, dtype: torch.dtype, mirror: Any = 0) -> Any:
    """Mean and standard deviation taken out of 8-bit pixels, which are mirrored where ``mirror`` is 1."""
    return fn.crop_mirror_normalize(
        pictures,
        mean=list(transform.mean),
        std=list(transform.std),
        mirror=mirror,
        dtype=types.FLOAT16 if dtype == torch.float16 else types.FLOAT,
        output_layout="HWC",
    )


def _centre(shape: Any, transform: Profile) -> tuple[Any, Any]:
    """Corners, (down, across), of what the centre crop of the resized picture shows of the picture itself.

    So no pixel is made that the crop leaves out. The crop is to the pixel where torchvision has it: the long side is
    rounded down, and half a pixel of the crop's corner goes to the even neighbour, as in Python's round.
    """
    shape = fn.cast(shape, dtype=types.INT64)
    starts, ends = [], []
    for axis in (0, 1):
        side = shape[axis] * transform.shorter // math.min(shape[0], shape[1])
        margin = side - transform.resize
        corner = margin // 2
        corner = corner + (margin & 1) * (corner & 1)
        scale = fn.cast(shape[axis], dtype=types.FLOAT) / fn.cast(side, dtype=types.FLOAT)
        starts.append(corner * scale)
        ends.append((corner + transform.resize) * scale)
    return fn.stack(*starts), fn.stack(*ends)


class Loader:
    """Iterates over the batches of an epoch; ``len()`` is their number, ``pictures`` that of all processes' pictures.

    Training (an ``Augmentation``) shuffles, shares the pictures out among the processes and drops the tail, so that
    every process has floor(pictures / (batch_size * accumulate * world size)) * accumulate batches and no picture comes
    twice. Evaluation (a ``Profile``) sees every picture once: process r has pictures r, r + world size, ..., whatever
    their number, none included, and its last batch is filled up (see ``Batch``).

    Args:
        paths: files of the pictures.
        labels: class number of each.
        transform: how a picture becomes an input.
        batch_size: pictures a batch and process.
        world: the processes; a CUDA device takes the GPU pipeline.
        dtype: of the images, float32 or float16.
        threads: decoding threads.
        seed: of order and augmentation.
        accumulate: batches of one training step.
        state: what ``state()`` gave in an earlier run of the same pictures, batch size, place and world size: goes on
            from there.

    Raises:
        InputError: there are too few pictures for one training step, or a file can't be decoded (a BadFileError).
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int],
        transform: Augmentation | Profile,
        *,
        batch_size: int,
        world: World,
        dtype: torch.dtype = torch.float32,
        threads: int = 2,
        seed: int = 0,
        accumulate: int = 1,
        state: LoaderState | None = None,
    ):
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(f"dtype: expected torch.float32 or torch.float16, got {dtype}")
        if len(paths) != len(labels):
            raise ValueError(f"labels: expected one for each of {len(paths)} paths, got {len(labels)}")
        self.pictures = len(paths)
        self._world = world
        self._threads = threads
        self._labels = torch.tensor(labels, dtype=torch.int64)
        self._training = isinstance(transform, Augmentation)
        # Evaluation shares the list out here, since DALI's readers can't have fewer pictures than shards.
        self._paths = list(paths) if self._training else list(paths[world.rank :: world.size])
        if self._training:
            self._batches = accumulate * steps_per_epoch(len(paths), batch_size, world.size, accumulate)
        else:
            self._batches = -(-len(self._paths) // batch_size)
        self._iterator: DALIGenericIterator | None = None
        self._position = self._start = state["position"] if state else 0
        if self._batches == 0:
            return
        gpu = world.device.type == "cuda"
        with self._naming_bad_files() if state is None else _naming_the_state():
            pipeline = picture_pipeline(
                self._paths,
                transform,
                gpu=gpu,
                dtype=dtype,
                shard=world.rank if self._training else 0,
                shards=world.size if self._training else 1,
                order_seed=seed,
                batch_size=batch_size,
                num_threads=threads,
                device_id=world.device.index if gpu else None,
                seed=seed * world.size + world.rank,
                checkpoint=state["reader"] if state else None,
            )
            self._iterator = DALIGenericIterator(
                [pipeline],
                ["images", "places"],
                reader_name=_READER,
                last_batch_policy=LastBatchPolicy.FILL,
                auto_reset=True,
            )

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        if self._iterator is None:
            return
        if self._position != self._start:
            raise ValueError(
                f"the epoch before was left after {self._position} of {self._batches} batches, and DALI can't go back: "
                "make a new Loader"
            )
        for position in range(self._start + 1, self._batches + 1):
            with self._naming_bad_files():
                outputs = next(self._iterator)[0]
                batch = self._batch(outputs["images"], outputs["places"].flatten().long(), position)
                if position == self._batches:
                    # Read what the tail drops, up to ``accumulate`` batches: at its end the reader starts anew.
                    while next(self._iterator, None) is not None:
                        pass
            self._position = position % self._batches
            if self._position == 0:
                self._start = 0
            yield batch

    def state(self) -> LoaderState:
        """Where the loader is after the last batch that it gave; it restores with weights only."""
        assert self._iterator is not None
        return {"position": self._position, "reader": self._iterator.checkpoints()[0]}

    def _batch(self, images: Tensor, places: Tensor, position: int) -> Batch:
        numbers = places if self._training else places * self._world.size + self._world.rank
        labels = self._labels[numbers].to(images.device, non_blocking=True)
        if not self._training:
            rows = torch.arange(len(places)) + (position - 1) * len(places)
            numbers = torch.where(rows < len(self._paths), numbers, -1)
        return Batch(images.permute(0, 3, 1, 2), labels, numbers)

    @contextmanager
    def _naming_bad_files(self) -> Iterator[None]:
        """DALI doesn't say which file it failed at: look for it."""
        try:
            yield
        except RuntimeError as error:
            print(f"the loader failed; looking for the file among {len(self._paths)}", file=sys.stderr, flush=True)
            # A file may have changed since it was checked.
            for path in self._paths:
                if problem := fault(path):
                    raise BadFileError(path, f"{problem} by now", "mend or remove it") from error
            if bad := first_undecodable(self._paths, self._threads):
                remedy = "mend or remove it (--bad_files can't find such a file)"
                raise BadFileError(bad, "looks whole but can't be decoded", remedy) from error
            raise RunError(f"the loader failed at no single file: {failure(error)}") from error


def failure(error: Exception) -> str:
    """The line of a message, such as DALI's of many lines, that says what failed."""
    lines = [line for line in str(error).splitlines() if line.strip() and "pipeline" not in line]
    return lines[0] if lines else str(error) or type(error).__name__


@contextmanager
def _naming_the_state() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        cause = next((line for line in str(error).splitlines() if line.strip()), "no word why")
        raise InputError(
            f"--resume: DALI can't go on from the state of its reader that the checkpoint holds ({cause}); was it of "
            "another version?"
        ) from error


def steps_per_epoch(pictures: int, batch_size: int, processes: int, accumulate: int = 1) -> int:
    """Training steps of an epoch: floor(pictures / (batch_size * accumulate * processes)).

    Raises:
        InputError: there is not one.
    """
    steps = pictures // (batch_size * accumulate * processes)
    if steps == 0:
        most = pictures // (processes * accumulate)
        fewer = f" with --grad_accum_steps {accumulate}" if accumulate > 1 else ""
        if most == 0:
            fewer += ", and fewer of these"
        raise InputError(
            f"--batch_size: expected at most {max(most, 1)} for {pictures} pictures and {processes} "
            f"process{'es' * (processes > 1)}{fewer}, got {batch_size}: an epoch would have no step"
        )
    return steps


def first_undecodable(paths: Sequence[str], threads: int = 1) -> str | None:
    """The first file among ``paths`` that DALI's CPU decoder fails at; None if there is none."""
    for start in range(0, len(paths), _SEARCHED):
        block = list(paths[start : start + _SEARCHED])
        if not _decodes(block, threads):
            return next((path for path in block if not _decodes([path], 1)), None)
    return None


def _decodes(paths: list[str], threads: int) -> bool:
    require_dali()

    @pipeline_def(batch_size=len(paths), num_threads=threads, device_id=None, prefetch_queue_depth=1)
    def decoding() -> Any:
        encoded, _ = fn.readers.file(files=paths, labels=list(range(len(paths))))
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)

    try:
        decoding().run()
    except RuntimeError:
        return False
    return True


class SyntheticLoader:
    """Made-up pictures in place of a ``Loader``: noise of ``resize`` by ``resize`` pixels with random labels.

    One batch is made and given again and again, so nothing but the network takes time.
    """

    def __init__(
        self,
        pictures: int,
        num_classes: int,
        *,
        resize: int,
        batch_size: int,
        world: World,
        training: bool,
        accumulate: int = 1,
        state: LoaderState | None = None,
    ):
        self._numbers = range(pictures)[world.rank :: world.size]
        self._position = state["position"] if state else 0
        if training:
            self._batches = accumulate * steps_per_epoch(pictures, batch_size, world.size, accumulate)
        else:
            self._batches = -(-len(self._numbers) // batch_size)
        generator = torch.Generator().manual_seed(world.rank)
        images = torch.randn(batch_size, resize, resize, 3, generator=generator)
        self._images = images.to(world.device).permute(0, 3, 1, 2)
        self._labels = torch.randint(num_classes, (batch_size,), generator=generator).to(world.device)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        size = len(self._labels)
        for step in range(self._position, self._batches):
            numbers = torch.full((size,), -1)
            real = self._numbers[step * size : (step + 1) * size]
            numbers[: len(real)] = torch.tensor(real)
            self._position = (step + 1) % self._batches
            yield Batch(self._images, self._labels, numbers)

    def state(self) -> LoaderState:
        """As ``Loader.state``."""
        return {"position": self._position, "reader": None}
