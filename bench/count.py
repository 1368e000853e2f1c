"""Bytes that a launch moves, counted while Triton's interpreter runs it.

    counter = count(launch)
    counter.total, counter.by_tensor["x_ptr"], counter.outside

Needs kernels that were defined with TRITON_INTERPRET=1 in the environment, and tensors of the CPU. Every load, store
and atomic of every program passes through the interpreter's builder, whose methods are wrapped while it counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, astuple
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from kernels import common
from kernels.common import Launch, Traffic

# The builder's methods that touch memory (all others call these) -> whether they read, whether they write.
_ACCESSES = {
    "create_masked_load": (True, False),
    "create_masked_store": (False, True),
    "create_atomic_rmw": (True, True),
    "create_atomic_cas": (True, True),
}


class _Span:
    """The bytes of a tensor in memory, from its first element to its last, and what has been done to them."""

    def __init__(self, tensor: Tensor):
        self.start = tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.nbytes = (last + 1) * tensor.element_size() if tensor.numel() else 0
        self.read = np.zeros(self.nbytes, bool)
        self.written = np.zeros(self.nbytes, bool)
        self.loaded = self.stored = 0

    def inside(self, addresses: np.ndarray, width: int) -> np.ndarray:
        return (addresses >= self.start) & (addresses + width <= self.start + self.nbytes)

    def touch(self, addresses: np.ndarray, width: int, reads: bool, writes: bool) -> None:
        touched = (addresses - self.start)[:, None] + np.arange(width)
        if reads:
            self.read[touched] |= ~self.written[touched]  # what the launch has written is in the caches
            self.loaded += touched.size
        if writes:
            self.written[touched] = True
            self.stored += touched.size

    def traffic(self) -> Traffic:
        return Traffic(int(self.read.sum()), int(self.written.sum()), self.loaded, self.stored)


class Counter:
    """Counts what is done to ``tensors`` inside a ``with``; ``outside`` is the bytes accessed in none of them.

    Where two tensors share memory, the first is charged.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._spans = {name: _Span(tensor) for name, tensor in tensors.items()}
        self._originals: dict[str, Any] = {}
        self.outside = 0

    @property
    def by_tensor(self) -> dict[str, Traffic]:
        return {name: span.traffic() for name, span in self._spans.items()}

    @property
    def total(self) -> Traffic:
        return sum(self.by_tensor.values(), Traffic(0, 0, 0, 0))

    def __enter__(self) -> Counter:
        for name, (reads, writes) in _ACCESSES.items():
            self._originals[name] = getattr(InterpreterBuilder, name)
            setattr(InterpreterBuilder, name, self._counting(self._originals[name], reads, writes))
        return self

    def __exit__(self, *exception: object) -> None:
        for name, original in self._originals.items():
            setattr(InterpreterBuilder, name, original)

    def _counting(self, original: Callable[..., Any], reads: bool, writes: bool) -> Callable[..., Any]:
        names = list(inspect.signature(original).parameters)
        pointers_at = next(index for index, name in enumerate(names) if name in ("ptr", "ptrs"))
        mask_at = names.index("mask") if "mask" in names else None

        def access(*arguments: Any, **keywords: Any) -> Any:
            given = (*arguments, *(keywords[name] for name in names[len(arguments) :]))
            self._record(given[pointers_at], None if mask_at is None else given[mask_at], reads, writes)
            return original(*arguments, **keywords)

        return access

    def _record(self, pointers: Any, mask: Any, reads: bool, writes: bool) -> None:
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = np.asarray(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        addresses = addresses.reshape(-1).astype(np.int64)
        for span in self._spans.values():
            if not addresses.size:
                return
            inside = span.inside(addresses, width)
            if inside.any():
                span.touch(addresses[inside], width, reads, writes)
                addresses = addresses[~inside]
        self.outside += addresses.size * width


def count(launch: Launch) -> Counter:
    """Run ``launch``, whose tensors are on the CPU, and count; tensors have the names of the kernel's arguments."""
    if not common.INTERPRETED:
        raise ValueError("launch: expected an interpreted kernel; set TRITON_INTERPRET=1 before kernels is imported")
    tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, Tensor)}
    with Counter(tensors) as counter:
        launch.run(torch.device("cpu"))
    return counter


class Call(NamedTuple):
    """A launch and what the formula beside its launcher says of it."""

    name: str
    launch: Launch
    formula: Traffic


def differs(call: Call) -> bool:
    """Run ``call``, print counted beside formula, and say whether they differ."""
    counter = count(call.launch)
    pairs = zip(asdict(counter.total).items(), astuple(call.formula), strict=True)
    figures = ", ".join(f"{kind} {counted} / {wanted}" for (kind, counted), wanted in pairs)
    equal = counter.total == call.formula and not counter.outside
    print(f"{call.name}: {figures}, outside {counter.outside}{'' if equal else '  DIFFERS'}", flush=True)
    return not equal


def differing(calls: Iterable[Call]) -> list[str]:
    """Names of those of ``calls``, run in order, whose formula and count differ."""
    return [call.name for call in calls if differs(call)]
