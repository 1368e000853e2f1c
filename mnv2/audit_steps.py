"""A batch of pictures through both ways of preparing them, the loader's (DALI) and PIL's, step by step.

DALI's side is what the loader's own pipeline is made of (``data.decoded``, ``resized``, ``normalised``, ``prepared``).
A step is compared on the same input for both sides, so that no other step's difference mixes in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from . import pil_pictures
from .audit_result import ALL, DECODE, NORMALISE, PIL, RESIZE, Batch
from .data import Profile, decoded, normalised, prepared, require_dali, resized

if TYPE_CHECKING:
    from PIL.Image import Image


class Opened(NamedTuple):
    """A picture as PIL sees it: what it is called, its file, what kind of file that is, its pixels in RGB."""

    name: str
    path: str
    content: bytes
    kind: str
    rgb: Image

    @property
    def pixels(self) -> NDArray[Any]:
        """``[H, W, 3]`` uint8."""
        return np.asarray(self.rgb)


class Made(NamedTuple):
    """DALI's decoded pixels, a batch of each compared profile, and DALI's inputs ``[B, R, R, 3]`` of each other one."""

    pixels: list[NDArray[Any]]
    batches: dict[Profile, Batch]
    others: dict[Profile, NDArray[Any]]


class Steps:
    """DALI's and PIL's steps for the profiles ``compared``, and DALI's inputs alone for the ``others``.

    ``run`` raises RuntimeError where DALI can't decode a picture; the others can then be run again.

    Raises:
        InputError: DALI isn't installed.
    """

    def __init__(
        self,
        compared: Sequence[Profile],
        others: Sequence[Profile],
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        threads: int,
    ):
        require_dali()
        self._compared, self._others = list(compared), list(others)
        self._device, self._dtype = device, dtype
        self._settings: dict[str, Any] = {
            "batch_size": batch_size,
            "num_threads": threads,
            "device_id": device.index if device.type == "cuda" else None,
            "prefetch_queue_depth": 1,
        }
        self._pipeline: Any = None

    def run(self, pictures: Sequence[Opened]) -> Made:
        """What both make of ``pictures``."""
        crops = [[np.asarray(pil_pictures.centre(one.rgb, t)) for one in pictures] for t in self._compared]
        if self._pipeline is None:
            self._pipeline = self._build()
        feeds = {"encoded": [np.frombuffer(one.content, np.uint8) for one in pictures]}
        feeds["pixels"] = [one.pixels for one in pictures]
        feeds |= {f"crops{number}": some for number, some in enumerate(crops)}
        try:
            for name, arrays in feeds.items():
                self._pipeline.feed_input(name, arrays)
            outputs = [_arrays(output) for output in self._pipeline.run()]
        except RuntimeError:
            self._pipeline = None  # DALI can't go on with it
            raise
        pixels, rest = outputs[0], iter(outputs[1:])
        batches = {
            transform: self._batch(transform, pictures, pixels, theirs, ours=[next(rest) for _ in range(3)])
            for transform, theirs in zip(self._compared, crops, strict=True)
        }
        return Made(pixels, batches, {transform: np.stack(next(rest)) for transform in self._others})

    def _batch(
        self,
        transform: Profile,
        pictures: Sequence[Opened],
        pixels: list[NDArray[Any]],
        crops: list[NDArray[Any]],
        ours: list[list[NDArray[Any]]],
    ) -> Batch:
        dali_crops, dali_normalised, dali_inputs = ours
        decoded_by_dali = [
            crop if np.array_equal(one.pixels, mine) else np.asarray(pil_pictures.centre(_image(mine), transform))
            for one, mine, crop in zip(pictures, pixels, crops, strict=True)
        ]
        inputs = {
            PIL: self._normalised(crops, transform),
            DECODE: self._normalised(decoded_by_dali, transform),
            RESIZE: self._normalised(dali_crops, transform),
            NORMALISE: np.stack(dali_normalised),
            ALL: np.stack(dali_inputs),
        }
        return Batch(crops, dali_crops, inputs)

    def _normalised(self, crops: Iterable[NDArray[Any]], transform: Profile) -> NDArray[Any]:
        values = np.stack([pil_pictures.normalised(_image(crop), transform) for crop in crops])
        return values.astype(np.float16) if self._dtype == torch.float16 else values

    def _build(self) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        gpu = self._device.type == "cuda"

        def pictures(name: str) -> Any:
            source = fn.external_source(name=name, dtype=types.UINT8, ndim=3, layout="HWC")
            return source.gpu() if gpu else source

        @pipeline_def(**self._settings)
        def steps() -> tuple[Any, ...]:
            transforms = [*self._compared, *self._others]
            ours = decoded(fn.external_source(name="encoded", dtype=types.UINT8, ndim=1), transforms[0], gpu=gpu)
            theirs = pictures("pixels")
            outputs = [ours]
            for number, transform in enumerate(self._compared):
                outputs.append(resized(theirs, transform))
                outputs.append(normalised(pictures(f"crops{number}"), transform, self._dtype))
                outputs.append(prepared(ours, transform, self._dtype))
            outputs += [prepared(ours, transform, self._dtype) for transform in self._others]
            return tuple(outputs)

        return steps()


def _image(pixels: NDArray[Any]) -> Image:
    from PIL import Image

    return Image.fromarray(pixels)


def _arrays(output: Any) -> list[NDArray[Any]]:
    """Copies, since the pipeline writes to the same memory again."""
    on_host = output.as_cpu() if hasattr(output, "as_cpu") else output
    return [np.array(on_host.at(number)) for number in range(len(on_host))]
