"""Legend of names, shared types, input checks, and how a kernel is launched.

====================  ==================================================================================
N, H, W, C            batch, height, width, channels; activations are NHWC, which torch calls channels_last
c_in, c_mid, c_out    the three widths of an inverted residual: input, expanded, output
X, E, A, D, B, P, Y   its tensors: input, expanded, relu6(norm(E)), depthwise output, relu6(norm(D)),
                      projected, output (see README.md for the formulas)
x_ptr, offs_c         pointer to the first element of X; offsets along C
BLOCK_C, COLUMNS      sizes in capitals are chosen, not given; constexpr where the compiler must know them
====================  ==================================================================================
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

PADDINGS = ("symmetric", "same")
BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CAPABILITY = (8, 0)  # the oldest GPUs that the kernels are compiled and checked for
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1, which Triton reads where a kernel is defined


class BatchNorm(NamedTuple):
    """What a BatchNorm over C channels is to an operation: its tensors and how they are used.

    ``weight, bias, running_mean, running_var`` are ``[C]`` in fp32 (or fp64), ``num_batches_tracked`` is an int64
    scalar; any of them may be None as in ``nn.BatchNorm2d(affine=False)`` or ``track_running_stats=False``.
    With ``batch_stats`` the batch's own mean and biased variance normalise, and the running statistics, where there
    are any, are updated in place in torch's convention: ``r <- (1 - momentum) r + momentum * batch`` with the unbiased
    variance, ``momentum=None`` meaning the cumulative average. Without it the running statistics are constants.
    ``group`` names the processes whose batches together are the batch (see ``ranks.register``), "" this one alone.

    Source: Ioffe and Szegedy 2015, algorithm 1.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    batch_stats: bool
    momentum: float | None = 0.1
    eps: float = 1e-5
    group: str = ""


class Launch(NamedTuple):
    """One launch of a kernel: what a launcher decides, apart from running it.

    The ahead-of-time report compiles the same thing for GPUs that are not there, from tensors on the meta device.
    ``arguments`` are the kernel's by name, compile-time ones included.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    spill_bytes: int = 0  # what the tile's row declares, a thread
    trips: int = 1  # times that a program runs its loop

    def run(self, device: torch.device) -> None:
        """Launch on ``device`` (Triton does on the current one). An empty grid does nothing."""
        if 0 in self.grid:
            return
        with torch.cuda.device(device.index if device.type == "cuda" else -1):  # -1 changes nothing
            self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


def launched(launcher: Callable[..., Launch], *arguments: Any, **keywords: Any) -> Launch:
    """Run what ``launcher`` makes of its arguments, on the device of the first tensor among them."""
    launch = launcher(*arguments, **keywords)
    launch.run(next(value.device for value in launch.arguments.values() if isinstance(value, Tensor)))
    return launch


def bytes_of(launcher: Callable[..., Launch]) -> Callable[..., Traffic]:
    """The function of bytes that stands beside ``launcher`` and has its arguments."""
    return getattr(sys.modules[launcher.__module__], launcher.__name__.removesuffix("_launch") + "_bytes")


@dataclass(frozen=True)
class Traffic:
    """Bytes of one launch: ``read`` and ``written`` count each address once (what device memory must move if caches
    are perfect within the launch; so what it reads of its own isn't read), ``loaded`` and ``stored`` each request of
    each program (what L1 and L2 see).
    """

    read: int
    written: int
    loaded: int
    stored: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def touched(self) -> int:
        """Bytes read plus bytes written."""
        return self.read + self.written


def allocate(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised tensor of ``shape`` on ``like``'s device, channels_last where it has four dimensions.

    Every output and scratch buffer of the kernels is made here or by ``allocate_like``.
    """
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def allocate_like(x: Tensor) -> Tensor:
    """Uninitialised tensor of x's shape, type and strides: DDP wants a gradient's to be its parameter's."""
    return torch.empty_like(x)


class Limits(NamedTuple):
    """What a choice of tiles must know of a device: multiprocessors, and a program's bytes of shared memory.

    ``tensor_memory`` says that products go through a memory of 512 columns, which must hold all those of a program.
    ``name`` is the device's, by which what was measured on it is found; "" for one that is only planned for.
    """

    processors: int
    shared: int
    tensor_memory: bool = False
    name: str = ""


_planned: torch.device | Limits | None = None


@contextmanager
def planned_for(target: torch.device | Limits) -> Iterator[None]:
    """Inside, launches on meta tensors are what they would be on a device, or on a GPU of these limits."""
    global _planned
    before, _planned = _planned, target
    try:
        yield
    finally:
        _planned = before


def limits(device: torch.device) -> Limits:
    """Limits of ``device``; those of an H100 where it is no GPU, for reports made without one."""
    if device.type == "meta" and _planned is not None:
        return _planned if isinstance(_planned, Limits) else _limits(_planned)
    return _limits(device)


@functools.cache
def _limits(device: torch.device) -> Limits:
    if device.type != "cuda":
        return Limits(132, 232448)
    properties = torch.cuda.get_device_properties(device)
    reserved = 1024  # the driver's, a block; without them one block may have all of a multiprocessor's
    shared = properties.shared_memory_per_multiprocessor - reserved
    memory = properties.major in (10, 11)
    return Limits(properties.multi_processor_count, shared, memory, torch.cuda.get_device_name(device))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result  # what torch.compile can't trace it runs, once
def unsupported_device(device: torch.device) -> str | None:
    """Why kernels can't run on tensors of ``device``, or None."""
    if INTERPRETED and device.type == "cpu":
        return None
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"expected an NVIDIA GPU (or a CPU with TRITON_INTERPRET=1), got {device}"
    if torch.version.hip is not None:
        return f"expected an NVIDIA GPU, got {torch.cuda.get_device_name(device)}"
    capability = _capability(device)
    if capability < CAPABILITY:
        wanted, got = (".".join(map(str, pair)) for pair in (CAPABILITY, capability))
        return (
            f"expected a GPU of compute capability {wanted} or newer, got {got} ({torch.cuda.get_device_name(device)})"
        )
    return None


@torch.compiler.assume_constant_result
def tf32_allowed() -> bool:
    """Whether torch's convolutions in fp32 may be TF32, by whichever of its two switches it was said."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]  # made at run time


def dot_precision(x: Tensor) -> str:
    """How matrices in fp32 are multiplied: as torch's convolutions are. It means nothing to other types."""
    planned = x.device.type == "meta" and (isinstance(_planned, Limits) or getattr(_planned, "type", "") == "cuda")
    return "ieee" if x.dtype == torch.float32 and not ((x.is_cuda or planned) and tf32_allowed()) else "tf32"


def multiplies_tf32(x: Tensor) -> bool:
    """Whether products of ``x`` are TF32's: in fp32, of ten bits behind the leading one."""
    return x.dtype == torch.float32 and dot_precision(x) == "tf32"


def why_torch(backend: str, device: torch.device, unsupported: Callable[[], str | None], name: str = "") -> str | None:
    """Why torch runs an operation on ``device`` where ``backend`` is asked for, or None where the kernels do.

    Raises:
        ValueError: ``backend`` is "triton", and ``unsupported()`` says why the kernels can't; ``name`` goes before it.
    """
    if backend == "torch":
        return "asked for"
    if backend == "auto" and device.type == "cpu":  # the interpreter is for tests
        return "on a CPU"
    problem = unsupported()
    if problem and backend == "triton":
        raise ValueError(name + problem)
    return problem


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that autocast wants for an operation on ``x``, or None outside autocast (fp64 is left alone)."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def dispatched(*tensors: Tensor) -> bool:
    """Whether torch must see an operation on ``tensors`` as one of its own.

    So it is while something traces or compiles, where a mode or the profiler is to know of it, and for tensors that
    are none of torch's two plain classes.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Where autocast changes nothing on ``device``; it costs and exports nothing where autocast is off."""
    kind = device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_padding(padding: str) -> None:
    """Raise ValueError unless ``padding`` is one of ``PADDINGS``."""
    check_choice("padding", padding, PADDINGS)


def check_stride(stride: int) -> None:
    """Raise ValueError unless ``stride`` is a block's, and an integer."""
    if type(stride) is not int or stride not in (1, 2):
        raise ValueError(f"stride: expected 1 or 2, got {stride!r}")


def check_residual(residual: bool, stride: int, c_in: int, c_out: int) -> None:
    """Raise where ``residual`` is no answer, or the input of a block can't be added to its output."""
    if type(residual) is not bool:
        raise TypeError(f"residual: expected True or False, got {residual!r}")
    if residual and (stride != 1 or c_in != c_out):
        raise ValueError(
            "residual: expected stride 1 and as many outputs as inputs, "
            f"got stride {stride}, {c_in} inputs and {c_out} outputs"
        )


def check_image(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is a floating-point ``[N, C, H, W]`` tensor of some channels and pixels."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions [N, C, H, W], got shape {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name}: expected C, H and W of at least 1, got shape {tuple(x.shape)}")


def not_nhwc(x: Tensor) -> str | None:
    """What is wrong with the layout of ``x [N, C, H, W]`` if its memory is not NHWC (``channels_last``)."""
    if x.is_contiguous(memory_format=torch.channels_last) or x.numel() == 0:  # torch lays an empty output out anyhow
        return None
    return (
        f"expected channels_last memory (NHWC), got strides {x.stride()} for shape {tuple(x.shape)}; "
        "convert once with x.contiguous(memory_format=torch.channels_last)"
    )


def check_nhwc(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is a floating-point ``[N, C, H, W]`` tensor whose memory is NHWC (``channels_last``)."""
    check_image(name, x)
    if problem := not_nhwc(x):
        raise ValueError(f"{name}: {problem}")


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def front_padding(size: int, stride: int, padding: str) -> int:
    """Zeros in front of ``size`` pixels for a filter of three."""
    return 0 if padding == "same" and stride == 2 and size % 2 == 0 else 1


def covered(starts: range, length: int, end: int) -> int:
    """Pixels of [0, end) in windows of ``length`` from each of ``starts`` on, counted once for each window."""
    return sum(max(0, min(start + length, end) - max(start, 0)) for start in starts)
