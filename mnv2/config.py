"""What a run is asked to do, as frozen dataclasses whose fields are the flags of the commands (see ``flags``)."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kernels import measured
from kernels.common import BACKENDS, PADDINGS, unsupported_device
from kernels.inverted_residual import SAVES

from .errors import InputError
from .flags import option, parse_pretrained, parse_resume
from .model import check_alpha

DEFAULT_DATA = "./dataset/imagenet"
SYNTHETIC_PICTURES = 1024
PREPROCESSING = ("reference", "torchvision", "torchvision_v2", "timm", "tf")
# What the weights decide where the user doesn't (``pretrained.follow``), and what is usual without weights.
OPEN: dict[str, Any] = {"alpha": 1.0, "padding": "symmetric", "norm_eps": 1e-5, "preprocessing": "reference"}


def check_backend(backend: str, device: torch.device) -> None:
    """Raise InputError where ``backend`` is "triton" and ``device`` can run no kernels, or its tables can't be read."""
    if backend == "triton" and (problem := unsupported_device(device)):
        raise InputError(f"--backend triton: {problem}")
    if backend != "torch" and device.type == "cuda":
        try:
            measured.read(measured.TABLES)
        except RuntimeError as error:
            raise InputError(str(error)) from None


def _pretrained(default: bool) -> Any:
    return option(
        default,
        "a file or folder of weights, True for what is published of this variant, an origin for that one's "
        "(torchvision, timm, d-li14, ...), or False",
        parse=parse_pretrained,
        const=True,
        metavar="FILE|NAME|BOOL",
    )


@dataclass(frozen=True)
class NetworkConfig:
    """What every run of a network on pictures has: the network, what becomes of a picture, and where it runs."""

    arch: str = option("mobilenetv2", "network", choices=("mobilenetv2",), fixed=True)
    alpha: float | None = option(
        None,
        "width multiplier; 1.4, 1.3, 1.0, 0.75, 0.5 and 0.35 are published; None for the weights' own, without weights "
        "1.0",
        fixed=True,
    )
    resize: int = option(224, "side of the network's input in pixels", fixed=True)
    pretrained: bool | str = _pretrained(False)
    weights_dir: str | None = option(
        None, "folder of published weights; None for $MNV2_WEIGHTS, else ~/.cache/mnv2", metavar="DIR"
    )
    backend: str = option("auto", "how blocks run: Triton kernels, PyTorch, or what the GPU allows", choices=BACKENDS)
    padding: str | None = option(
        None,
        "zeros at stride 2: torchvision's or TensorFlow's; None for the weights' own, without weights symmetric",
        choices=PADDINGS,
        fixed=True,
    )
    norm_eps: float | None = option(
        None,
        "epsilon of every BatchNorm; None for the weights' own, without weights 1e-5",
        also=("--eps",),
        fixed=True,
    )
    batch_size: int = option(64, "pictures a process and forward pass", fixed=True)
    num_parallel_workers: int = option(8, "decoding threads a process, at most one a core")
    preprocessing: str | None = option(
        None,
        "evaluation's resize and crop: short side + 32, torchvision's 256 or 232 for 224, timm's bicubic, or "
        "tf's with inputs in [-1, 1]; None for the weights' own, without weights reference",
        choices=PREPROCESSING,
    )
    precision: str = option(
        "fp32",
        "of the network's arithmetic; fp16 and bf16 through torch.autocast",
        choices=("fp32", "fp16", "bf16"),
        fixed=True,
    )
    device: str = option("auto", "where the network runs", choices=("auto", "cuda", "cpu"))
    deterministic: bool = option(False, "algorithms that give the same bits each time, also on a GPU, where slower")

    def __post_init__(self) -> None:
        """Check every value that doesn't need the data to be looked at."""
        if self.alpha is not None:
            _check(self, "alpha", check_alpha)
            _require(self, "alpha", lambda value: value <= 100, "at most 100")
        _require(self, "resize", lambda value: 1 <= value <= 8192, "an integer from 1 to 8192")
        for name in ("batch_size", "num_parallel_workers"):
            _require(self, name, lambda value: 1 <= value <= 65536, "an integer from 1 to 65536")
        _require(self, "norm_eps", lambda value: value is None or 0 < value < 1, "a number over 0 and under 1")
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), str):
                _require(self, field.name, lambda value: value, "some text")
            choices = field.metadata.get("choices")
            if choices and getattr(self, field.name) is not None:
                _require(self, field.name, choices.__contains__, " or ".join(choices))

    @property
    def threads(self) -> int:
        """Decoding threads: as many as asked for, at most one a core."""
        return min(self.num_parallel_workers, len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class RunConfig(NetworkConfig):
    """What training and evaluation share."""

    data_url: str = option(DEFAULT_DATA, "folder that holds train/ and val/, each with one folder of pictures a class")
    num_classes: int | None = option(None, "outputs of the network; None for what the weights or the data have")
    class_index: str = option(
        "auto", "a class's number: auto, folders (sorted), imagenet, or a FILE of one class a line", metavar="RULE"
    )
    val_labels: str | None = option(
        None, "file of names and classes for a flat val/ (Kaggle's LOC_val_solution.csv too)", metavar="FILE"
    )
    bad_files: str = option("error", "stop at a damaged file, or leave it out", choices=("error", "skip"))
    synthetic: int = option(0, "this many made-up pictures instead of --data_url", const=SYNTHETIC_PICTURES, fixed=True)
    smooth_factor: float = option(0.1, "label smoothing of the loss, 0 for none")
    run_distribute: bool = option(True, "False refuses a launcher that has started several processes")
    seed: int = option(0, "seed of weights, order and augmentation", fixed=True)

    def __post_init__(self) -> None:
        """Check every value that doesn't need the data to be looked at."""
        super().__post_init__()
        _require(
            self, "num_classes", lambda value: value is None or 1 <= value <= 10**6, "an integer from 1 to 1000000"
        )
        _require(self, "synthetic", lambda value: 0 <= value <= 10**9, "a number of pictures from 0 to 1000000000")
        _require(self, "smooth_factor", lambda value: 0 <= value < 1, "a number from 0 up to, but not, 1")
        _require(self, "seed", lambda value: 0 <= value < 2**31, "an integer from 0 up to, but not, 2^31")


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A training run; the defaults are the reference's recipe."""

    epoch_size: int = option(200, "epochs")
    repeat_num: int = option(1, "times that an epoch goes through the pictures", fixed=True)
    grad_accum_steps: int = option(1, "batches whose gradients are averaged for one step of the optimizer", fixed=True)
    lr_decay_mode: str = option(
        "cosine_decay_lr", "course of the learning rate", choices=("cosine_decay_lr", "piecewise_constant_lr")
    )
    max_lr: float = option(0.1, "learning rate at its highest, of the cosine")
    min_lr: float = option(0.0, "learning rate that the cosine falls to")
    decay_epoch: int | None = option(None, "epochs by which the cosine has fallen; None for epoch_size")
    milestone: tuple[int, ...] = option((), "epochs at which the piecewise constant rate changes", metavar="EPOCH")
    learning_rates: tuple[float, ...] = option(
        (), "piecewise constant rates, one before each milestone and perhaps one after the last", metavar="RATE"
    )
    warmup_epochs: int = option(0, "epochs of linear rise at the start")
    optimizer: str = option("sgd", "SGD or RMSprop", choices=("sgd", "rmsprop"), fixed=True)
    momentum: float = option(0.9, "momentum of the optimizer")
    nesterov: bool = option(False, "Nesterov's momentum in SGD")
    weight_decay: float = option(0.0, "of convolutions and classifier, not of BatchNorm and biases")
    clip_grad_norm: float = option(0.0, "largest norm of all gradients together, 0 for no limit")
    ema_decay: float = option(0.0, "share that stays in the average of the weights at each step, 0 for no average")
    sync_bn: bool = option(False, "BatchNorm's statistics over all processes", fixed=True)
    save_activations: str = option(
        "D", "what the blocks' kernels keep for the backward: D, or X, less memory for more traffic", choices=SAVES
    )
    freeze: str = option(
        "none",
        "what isn't trained: none, or features to train the classifier alone",
        choices=("none", "features"),
        fixed=True,
    )
    dropout: float = option(0.2, "probability of dropping a pooled feature")
    crop_scale: tuple[float, float] = option((0.08, 1.0), "share of a picture's area that a random crop covers")
    crop_ratio: tuple[float, float] = option((0.75, 1.333), "width over height of a random crop")
    hflip: float = option(0.5, "probability of a mirrored picture")
    ckpt_save_dir: str = option("./mobilenet_v2", "folder of the checkpoints and of log.jsonl")
    keep_checkpoint_max: int = option(10, "checkpoints of past epochs that are kept beside last.pt and best.pt")
    save_every: int = option(0, "steps between checkpoints within an epoch, 0 for its end alone")
    resume: str | None = option(
        None,
        "go on from last.pt in ckpt_save_dir where there is one (auto), or from a FILE",
        parse=parse_resume,
        const="auto",
        metavar="auto|FILE",
    )
    eval_every: int = option(1, "epochs between evaluations on val/, the last one evaluated too; 0 for none")
    log_every: int = option(100, "steps between lines of log.jsonl")
    tensorboard: bool = option(False, "write TensorBoard's files too (extra: tensorboard)")

    def __post_init__(self) -> None:
        """Check every value that doesn't need the data to be looked at."""
        super().__post_init__()
        for name in ("epoch_size", "repeat_num", "grad_accum_steps", "log_every"):
            _require(self, name, lambda value: 1 <= value <= 10**9, "a positive integer")
        for name in ("keep_checkpoint_max", "save_every", "eval_every"):
            _require(self, name, lambda value: 0 <= value <= 10**9, "an integer from 0 up")
        _require(
            self,
            "decay_epoch",
            lambda value: value is None or value > self.warmup_epochs,
            f"an integer over warmup_epochs {self.warmup_epochs}",
        )
        _require(self, "max_lr", lambda value: 0 < value <= 1e30, "a positive number")
        _require(self, "min_lr", lambda value: 0 <= value <= self.max_lr, f"a number from 0 to max_lr {self.max_lr}")
        _require(
            self,
            "warmup_epochs",
            lambda value: 0 <= value < self.epoch_size,
            f"an integer from 0 up to, but not, epoch_size {self.epoch_size}",
        )
        _require(self, "weight_decay", lambda value: 0 <= value < math.inf, "a number from 0 up")
        self._check_pieces()
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise InputError(f"--nesterov: expected SGD with momentum, got {self.optimizer}, momentum {self.momentum}")
        _require(self, "clip_grad_norm", lambda value: 0 <= value < math.inf, "a number from 0 up")
        for name in ("momentum", "dropout", "ema_decay"):
            _require(self, name, lambda value: 0 <= value < 1, "a number from 0 up to, but not, 1")
        _require(self, "hflip", lambda value: 0 <= value <= 1, "a probability")
        _require(self, "crop_scale", lambda value: 0 < value[0] <= value[1] <= 1, "two rising numbers, over 0 to 1")
        _require(self, "crop_ratio", lambda value: 0 < value[0] <= value[1] < math.inf, "two rising positive numbers")

    def _check_pieces(self) -> None:
        milestones, rates = self.milestone, self.learning_rates
        if self.lr_decay_mode == "cosine_decay_lr":
            for name in ("milestone", "learning_rates"):
                _require(self, name, lambda value: not value, "none with cosine_decay_lr")
            return
        rising = all(low < high for low, high in zip((0, *milestones), milestones, strict=False))
        _require(self, "milestone", lambda value: value and rising, "rising positive epochs, such as 30,60,90")
        _require(
            self,
            "learning_rates",
            lambda value: len(value) in (len(milestones), len(milestones) + 1) and all(0 < r <= 1e30 for r in value),
            f"{len(milestones)} or {len(milestones) + 1} positive rates for as many pieces",
        )
        if len(rates) == len(milestones) and milestones[-1] < self.epoch_size:
            raise InputError(
                f"--learning_rates: expected a rate for the epochs from {milestones[-1]} to {self.epoch_size}, "
                f"got {len(rates)} for {len(milestones)} milestones"
            )


@dataclass(frozen=True)
class TrainedConfig(NetworkConfig):
    """What runs a network that has learnt something."""

    pretrained: bool | str = _pretrained(True)
    ema: bool = option(True, "take a checkpoint's averaged weights where it has them")


@dataclass(frozen=True)
class ValidateConfig(TrainedConfig, RunConfig):
    """An evaluation."""

    fold: bool = option(True, "fold BatchNorm into the convolutions and run each block as one operation")
    explain: bool = option(False, "print first which path each layer takes and why, its bytes, and what bounds it")
    results: str | None = option(
        None, "write a row of CSV there for each picture: the classes put first", metavar="FILE"
    )
    per_class: bool = option(False, "print the accuracy of each class too, the worst first")
    expect: float | None = option(None, "share of right pictures (top-1); exit with 1 at another one")
    tolerance: float = option(0.0, "by how much it may differ from --expect")
    sweep: tuple[str, ...] | None = option(
        None,
        "evaluate these variants, such as 0.75_192, in place of --alpha and --resize, and print a table of them; all "
        "22 that are published where none is named",
        nargs="*",
        metavar="VARIANT",
    )

    def __post_init__(self) -> None:
        """Check every value that doesn't need the data to be looked at."""
        super().__post_init__()
        for name in ("results", "per_class"):
            _require(
                self, name, lambda value: not (value and self.synthetic), "none with --synthetic, which has no files"
            )
        if self.sweep is not None:
            for name in ("results", "per_class", "expect"):
                _require(self, name, lambda value: value in (None, False), "none with --sweep")
            _require(self, "pretrained", lambda value: value is not False, "weights with --sweep")
        _require(self, "expect", lambda value: value is None or 0 <= value <= 1, "a share from 0 to 1")
        _require(self, "tolerance", lambda value: 0 <= value <= 1, "a share from 0 to 1")
        if self.expect is None:
            _require(self, "tolerance", lambda value: value == 0, "none without --expect")


def _check(config: NetworkConfig, name: str, check: Callable[[Any], None]) -> None:
    try:
        check(getattr(config, name))
    except ValueError as error:
        raise InputError(f"--{error}") from None


def _require(config: NetworkConfig, name: str, holds: Callable[[Any], object], expected: str) -> None:
    value = getattr(config, name)
    if not holds(value):
        raise InputError(f"--{name}: expected {expected}, got {value if value != '' else 'nothing'}")
