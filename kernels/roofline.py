"""How long a launch takes at least: bytes, instructions, products of matrices, shared memory, over what a device can.

These are bounds from counts, not timings.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Device(NamedTuple):
    """What a device can do at most."""

    name: str
    processors: int
    clock: float  # Hz
    bandwidth: float  # bytes a second
    macs: int  # half-precision multiply-adds of the tensor cores, a clock and multiprocessor, by a warp's instructions
    group_macs: int  # and by those of a warp group (wgmma), where there are any


SCHEDULERS = 4  # a multiprocessor; each issues an instruction a clock
# NVIDIA's data sheets and architecture white papers. The clock is the boost clock; for the B200 it follows from the
# data sheet's 75 TFLOPS in fp32; for the H100 it is assumed, under its boost of 1.98 GHz.
DEVICES = {
    80: Device("A100 SXM 80GB", 108, 1.410e9, 2.039e12, 1024, 1024),
    86: Device("RTX A6000", 84, 1.800e9, 0.768e12, 512, 512),
    90: Device("H100 SXM", 132, 1.755e9, 3.350e12, 1024, 2048),
    100: Device("B200", 148, 1.980e9, 8.000e12, 1024, 1024),
    120: Device("RTX 5090", 170, 2.407e9, 1.792e12, 512, 512),
}


class Bounds(NamedTuple):
    """Seconds that a launch takes at least, by what it takes them for."""

    hbm: float
    issue: float
    tensor: float
    shared: float

    @property
    def binds(self) -> str:
        """What the largest is for."""
        return {"hbm": "HBM"}.get(name := max(self._fields, key=lambda field: getattr(self, field)), name)


def bounds(device: Device, facts: Mapping[str, Any] | None, programs: int, trips: int, touched: int) -> Bounds:
    """Bounds of a launch of ``programs`` that touches that many bytes, of a compiled kernel's ``facts`` if known.

    ``facts`` count warps, and of one warp the instructions, multiply-adds (``macs``) and passes through L1 and shared
    memory (``wavefronts``): all, and those of the loop (``loop``, ``loop_macs``, ``loop_wavefronts``), which runs
    ``trips`` times. Conflicts of banks are not counted, nor is what a device can't overlap.
    """

    def total(name: str, loop: str) -> int:
        if facts is None:
            return 0
        return programs * facts["warps"] * (facts[name] + facts[loop] * (trips - 1))

    wgmma = facts is not None and "HGMMA" in facts["tensor_core"]
    macs = device.group_macs if wgmma else device.macs
    clocks = device.processors * device.clock
    return Bounds(
        hbm=touched / device.bandwidth,
        issue=total("instructions", "loop") / (clocks * SCHEDULERS),
        tensor=total("macs", "loop_macs") / (clocks * macs),
        shared=total("wavefronts", "loop_wavefronts") / clocks,
    )


@functools.cache
def device_of(device: torch.device) -> Device:
    """What ``device`` can do; an H100 where it is no GPU."""
    if device.type != "cuda":
        return DEVICES[90]
    about = torch.cuda.get_device_properties(device)
    capability = 10 * about.major + about.minor
    like = DEVICES[max((known for known in DEVICES if known <= capability), default=80)]
    return Device(
        about.name,
        about.multi_processor_count,
        1e3 * about.clock_rate,
        2 * 1e3 * about.memory_clock_rate * about.memory_bus_width / 8,
        like.macs,
        like.group_macs,
    )
