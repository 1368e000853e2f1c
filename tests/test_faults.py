"""The test bed finds what it is there to find: kernels with a planted fault fail the depthwise op's own check."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from test_depthwise import check

from kernels import depthwise_passes

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


def with_fault(name: str, old: str, new: str, folder: Path):
    """The depthwise kernel ``name`` with ``new`` in place of ``old``, from a file as jit wants it."""
    source = Path(depthwise_passes.__file__).read_text()
    source = source[source.index("_SIZES =") : source.index("def _front")]
    assert old in source, f"the fault's place is gone from {depthwise_passes.__file__}: {old}"
    path = folder / "faulty.py"
    path.write_text("import triton\nimport triton.language as tl\n\n" + source.replace(old, new))
    spec = importlib.util.spec_from_file_location("faulty", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, request, device, memory, tmp_path, monkeypatch):
    sanitize = request.config.getoption("--sanitize")
    name, old, new, found, found_in_ttsem = FAULTS[fault]
    monkeypatch.setattr(depthwise_passes, name, with_fault(name, old, new, tmp_path))
    with pytest.raises(Exception, match=found_in_ttsem if sanitize else found):
        check(SHAPE, STRIDE, PADDING, torch.bfloat16 if sanitize else torch.float16, device, memory)
    memory.buffers.clear()  # what the fault did to them is known


def test_the_same_without_a_fault(device, memory):
    check(SHAPE, STRIDE, PADDING, torch.float16, device, memory)
