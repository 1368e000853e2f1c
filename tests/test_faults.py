"""The test bed finds what it is there to find: kernels with a planted fault fail the operations' own checks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import test_expand_depthwise as walks
import test_project as products
import torch
from numerics import GuardedMemory
from test_block_inference import check as check_block
from test_depthwise import check

from kernels import (
    block_inference_kernels,
    block_inference_passes,
    common,
    depthwise_passes,
    expand_depthwise,
    expand_depthwise_grads,
    project,
)

# fault: (kernel, what its source says, what it says with the fault, how the check fails, how it fails in ttsem)
FAULTS = {
    "wrong tap": (
        "_depthwise_fwd_kernel",
        "r0[j * STRIDE + k] * w[k]",
        "r0[j * STRIDE + k] * w[2 - k]",
        "y: error .* at .* allowed",
        "y: error .* at .* allowed",
    ),
    "sum in half precision": (
        "_depthwise_fwd_kernel",
        "r2[j * STRIDE + k] * w[6 + k]\n",
        "r2[j * STRIDE + k] * w[6 + k]\n                total = total.to(y_ptr.dtype.element_ty).to(tl.float32)\n",
        "y: mean error .* torch's",
        "y: mean error .* torch's",
    ),
    "unwritten output": (
        "_depthwise_fwd_kernel",
        "mask=mask & (x_out + j < W_out)[:, None]",
        "mask=mask & (x_out + j < W_out - 1)[:, None]",
        "y: .* values are not finite",
        "y: .* values are not finite",
    ),
    "unwritten gradient": (
        "_depthwise_bwd_kernel",
        "tl.store(out + t * C, tl.sum(sums[t], axis=0), mask=offs_c < C)",
        "tl.store(out + t * C, tl.sum(sums[t], axis=0), mask=offs_c < C - 1)",
        "dw: .* values are not finite",
        "dw: .* values are not finite",
    ),
    "read past the end": (
        "_depthwise_fwd_kernel",
        "inside = mask & (y >= 0) & (y < H)",
        "inside = mask & (y >= 0)",
        "y: .* values are not finite",
        "reads .* past the end of the tensor passed as `x_ptr`",
    ),
    "write before the start": (
        "_depthwise_bwd_kernel",
        "ok = mask & (y >= 0) & (y < H)",
        "ok = mask & (y < H)",
        "wrote outside a buffer",
        "before the start of the tensor passed as `dx_ptr`",
    ),
    "race": (
        "_depthwise_bwd_kernel",
        "out = partials_ptr + tl.program_id(0).to(tl.int64) * 9 * C",
        "out = partials_ptr + tl.program_id(0).to(tl.int64) * 0",
        "dw: .* values are not finite",
        "program instances .* both touch element .* of `partials_ptr`",
    ),
}
# even, TensorFlow's padding: the backward's first row lies before the image; and more than one chunk of rows
SHAPE, STRIDE, PADDING = (4, 8, 20, 6), 2, "same"


# fault of the block at inference: (what the source says, what it says with the fault, how the check fails, in ttsem)
BLOCK_FAULTS = {
    "wrong tap": ("wd[3 * ky + kx] * a", "wd[3 * kx + ky] * a", "Y: error .* allowed", "Y: error .* allowed"),
    "bias outside the image": (
        "zeros + inside, zeros",
        "zeros + 1.0, zeros",
        "Y: error .* allowed",
        "Y: error .* allowed",
    ),
    "unwritten output": (
        "(y < g.H_out)",
        "(y < g.H_out - 1)",
        "Y: .* values are not finite",
        "Y: .* values are not finite",
    ),
    "read past the end": (
        "inside = inside & (y + r < g.H)",
        "inside = inside & (y + r < g.H + 1)",
        "Y: (.* values are not finite|error .* allowed)",
        "reads .* past the end of the tensor passed as `x_ptr`",
    ),
}


# fault of the training block's passes: (module and kernel, what the source says, what it says with the fault, how the
# check fails)
P2 = expand_depthwise, "_expand_depthwise_kernel"
B2 = expand_depthwise_grads, "_expand_depthwise_grads_kernel"
P3, B1 = (project, "_project_kernel"), (project, "_project_grads_kernel")
PASS_FAULTS = {
    "BN1's shift left and right of the image": (
        *P2,
        "halo & row, halo, row",
        "halo & row, halo >= 0, row",
        "D: error",
    ),
    "BN1's shift above the image": (*P2, "columns[b], row, expansion", "columns[b], None, expansion", "D: error"),
    "moments of columns outside": (*P2, "b * WIDE_OUT + j < own_columns", "own_columns >= 0", "mean: error"),
    "the right column of the halo for the left": (
        *P2,
        "walk.own + 1 if c > 0 and",
        "walk.own + 1 if c < 0 and",
        "D: error",
    ),
    "T begun again by each block of channels": (*B2, "block == 0,", "block >= 0,", "T: error"),
    "the left column of the halo for the right": (
        *B2,
        "if x > 0 or walk.halo == 1",
        "if x < 0 or walk.halo == 1",
        "dWd: error",
    ),
    "dD's constant outside the image": (
        *B2,
        "constant = constant * inside.to(tl.float32)[None, :]",
        "constant = constant * 1.0",
        "dWd: error",
    ),
    "ReLU6's gradient where it has none": (
        *B2,
        "tl.abs(a[j] - 0.5) < 0.5",
        "tl.abs(a[j] - 0.5) <= 0.5",
        "T: error",
    ),
    "D not centred": (*B1, "MASK_E, not WHOLE) - mean", "MASK_E, not WHOLE)", "dbeta2: error"),
    "moments merged without their distance": (*P3, "delta * delta * (count * share)", "0.0", "variance: error"),
}


def with_fault(name: str, source: str, old: str, new: str, folder: Path, monkeypatch):
    """The kernel ``name`` of ``source`` with ``new`` in place of ``old``, from a file as jit wants it."""
    assert old in source, f"the fault's place is gone: {old}"
    path = folder / "faulty.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("faulty", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return getattr(module, name)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, request, device, memory, tmp_path, monkeypatch):
    sanitize = request.config.getoption("--sanitize")
    name, old, new, found, found_in_ttsem = FAULTS[fault]
    source = Path(depthwise_passes.__file__).read_text()
    source = source[source.index("_SIZES =") : source.index("@functools.lru_cache")]
    source = "import triton\nimport triton.language as tl\n\n" + source
    monkeypatch.setattr(depthwise_passes, name, with_fault(name, source, old, new, tmp_path, monkeypatch))
    with pytest.raises(Exception, match=found_in_ttsem if sanitize else found):
        check(SHAPE, STRIDE, PADDING, torch.bfloat16 if sanitize else torch.float16, device, memory)
    memory.buffers.clear()  # what the fault did to them is known


@pytest.mark.parametrize("fault", BLOCK_FAULTS)
def test_a_fault_in_the_block_is_found(fault, request, device, memory, tmp_path, monkeypatch):
    sanitize = request.config.getoption("--sanitize")
    old, new, found, found_in_ttsem = BLOCK_FAULTS[fault]
    source, name = Path(block_inference_kernels.__file__).read_text(), "inverted_residual_kernel"
    monkeypatch.setattr(block_inference_passes, name, with_fault(name, source, old, new, tmp_path, monkeypatch))
    with pytest.raises(Exception, match=found_in_ttsem if sanitize else found):
        check_block(1, 3, 4, 8, 24, 8, 1, "symmetric", torch.bfloat16 if sanitize else torch.float32, device, memory)
    memory.buffers.clear()


@pytest.mark.parametrize("fault", PASS_FAULTS)
def test_a_fault_in_the_training_passes_is_found(fault, device, tmp_path, monkeypatch):
    module, name, old, new, found = PASS_FAULTS[fault]
    source = Path(module.__file__).read_text().replace("from . import", "from kernels import")
    source = source.replace("\nfrom .", "\nfrom kernels.")
    monkeypatch.setattr(module, name, with_fault(name, source, old, new, tmp_path, monkeypatch))
    with pytest.raises(AssertionError, match=found):
        check_passes(module, device, monkeypatch)


def check_passes(module, device, monkeypatch):
    """All checks of a module's passes, on a case where each of the faults matters."""
    monkeypatch.setattr(common, "limits", lambda device: common.Limits(1, 0))  # so that programs have more than a tile
    memory, dtype = GuardedMemory(monkeypatch.setattr), torch.float32
    if module is project:
        o = products.operands(products.WALK, dtype, device, memory)
        products.check_project(o)
        products.check_grads(o)
        return
    o = walks.operands((1, 2, 10, 8, 33, 8, 1, "symmetric"), dtype, device, memory)
    (walks.check_forward if module is expand_depthwise else walks.check_backward)(o)


@pytest.mark.parametrize("module", [expand_depthwise, expand_depthwise_grads, project], ids=lambda m: m.__name__)
def test_the_training_passes_without_a_fault(module, device, monkeypatch):
    check_passes(module, device, monkeypatch)


def test_the_same_without_a_fault(device, memory):
    check(SHAPE, STRIDE, PADDING, torch.float16, device, memory)
