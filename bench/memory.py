"""Bytes that training saves for its backward, in MiB (2^20 bytes) an image: eager, and ours in both of its modes.

    python -m bench.memory --alpha A --resize R [--batch 8] [--variants] [--json FILE]

eager   every block by torch's operations, one after the other
D       our blocks with ``save="D"``: X, D and P
X       our blocks with ``save="X"``: X alone

Stem, head and classifier are torch's in all of them. Saved tensors are those that autograd packs
(``torch.autograd.graph.saved_tensors_hooks``) in the forward of the network under autocast in half precision, on fake
tensors, so no kernel runs. Each storage counts once. Of a forward of twice the batch the same is taken, and the
difference is what images need: parameters, their casts and statistics a channel are in neither figure.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import common
from mnv2.errors import exit_status
from mnv2.flags import option, parse
from mnv2.model import VARIANTS, MobileNetV2

from .figures import check_sizes, run_interpreted, write

MIB = 2**20
MODES = {"eager": ("torch", "D"), "D": ("triton", "D"), "X": ("triton", "X")}  # backend and what is saved


@dataclass(frozen=True)
class MemoryConfig:
    """What is measured."""

    alpha: float = option(1.0, "width multiplier")
    resize: int = option(224, "side of the network's input in pixels")
    batch: int = option(8, "pictures in a batch")
    variants: bool = option(False, "all published variants too")
    json: str | None = option(None, "write the figures there", metavar="FILE")

    def __post_init__(self) -> None:
        check_sizes(self.alpha, resize=self.resize, batch=self.batch)


class Saved:
    """Storages that autograd saves inside a ``with``: of the network, and of the modules from ``first`` to ``last``."""

    def __init__(self, first: torch.nn.Module, last: torch.nn.Module):
        self._kept: list[Tensor] = []  # a storage that was freed could have its address taken
        self._inside = False
        self._sizes: dict[str, dict[int, int]] = {"blocks": {}, "network": {}}
        first.register_forward_pre_hook(lambda *_: self._enter(True))
        last.register_forward_hook(lambda *_: self._enter(False))

    def _enter(self, inside: bool) -> None:
        self._inside = inside

    def pack(self, tensor: Tensor) -> Tensor:
        """Count what autograd saves."""
        self._kept.append(tensor)
        storage = tensor.untyped_storage()
        for scope in ("blocks", "network") if self._inside else ("network",):
            self._sizes[scope][storage._cdata] = storage.nbytes()
        return tensor

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes by scope."""
        return {scope: sum(sizes.values()) for scope, sizes in self._sizes.items()}


def saved_bytes(config: MemoryConfig, name: str, batch: int) -> dict[str, int]:
    """Bytes that a forward of ``batch`` pictures leaves for the backward: the blocks' and the network's."""
    backend, save = MODES[name]
    network = MobileNetV2(config.alpha, backend=backend, save=save)
    saved = Saved(network.features[1], network.features[-2])
    with FakeTensorMode() as mode:
        state = {name: mode.from_tensor(tensor) for name, tensor in network.state_dict(keep_vars=True).items()}
        pictures = torch.empty(batch, 3, config.resize, config.resize).to(memory_format=torch.channels_last)
        with (
            torch.autocast("cpu", torch.float16),
            torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor),
        ):
            torch.func.functional_call(network, state, (pictures,))
    return saved.nbytes


def saved_mib(config: MemoryConfig) -> dict[str, float]:
    """MiB an image by scope and mode, as the record has them."""
    found = {}
    for mode in MODES:
        once, twice = (saved_bytes(config, mode, times * config.batch) for times in (1, 2))
        for scope in once:
            found[f"{scope}_saved_mib_{mode}"] = (twice[scope] - once[scope]) / config.batch / MIB
    return dict(sorted(found.items(), key=lambda item: not item[0].startswith("blocks")))


def report(config: MemoryConfig) -> dict[str, Any]:
    """Figures of the network, and of all variants where they are asked for."""
    shape = {"alpha": config.alpha, "resize": config.resize}
    figures = {**shape, "batch": config.batch, "dtype": "float16", **saved_mib(config)}
    if config.variants:
        figures["variants"] = [
            {"alpha": alpha, "resize": resize, **saved_mib(MemoryConfig(alpha, resize, config.batch))}
            for alpha, sides in VARIANTS.items()
            for resize in sides
        ]
    return figures


def table(figures: dict[str, Any]) -> Iterator[str]:
    """Lines for a reader: a network a line, its blocks and then all of it."""
    yield "saved for the backward, {dtype}: MiB an image, of the blocks and then of the network".format(**figures)
    yield f"{'alpha':>5} {'px':>4}" + "".join(f" {mode:>8}" for mode in [*MODES] * 2)
    for one in [figures, *figures.get("variants", [])]:
        cells = [one[f"{scope}_saved_mib_{mode}"] for scope in ("blocks", "network") for mode in MODES]
        yield f"{one['alpha']:5} {one['resize']:4}" + "".join(f" {cell:8.2f}" for cell in cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = parse(MemoryConfig, words, "Bytes that training saves for its backward.")
    if not common.INTERPRETED:  # without a GPU kernels count as there in the interpreter alone
        return run_interpreted("bench.memory", words)

    def action() -> None:
        figures = report(config)
        print("\n".join(table(figures)))
        if config.json is not None:
            write(config.json, "bench.memory", words, figures)

    return exit_status("bench.memory", action)


if __name__ == "__main__":
    sys.exit(main())
