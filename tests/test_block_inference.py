"""The inverted residual at inference: every number against fp64, its bytes, and what can be asked of it wrongly.

Each case names what it is for. Sizes go with the tiles: micro-tiles of 2 x 4 or 2 x 2 pixels at c_out of at most 32, of
a row or a part of it above, of all of a small image where B is stored.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.count import count
from bench.parity import assert_parity
from kernels import (
    PackedBlock,
    block_inference_passes,
    common,
    conv_relu6_mean,
    head_inference,
    inverted_residual_inference,
    pack_inverted_residual,
    reference,
    tiles,
)
from kernels.block_inference import why_torch
from mnv2.model import layer_shapes


def nhwc(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


# N, H, W, c_in, c_mid (None: expand ratio 1), c_out, stride, padding
CASES = {
    "one pixel": (1, 1, 1, 16, 32, 16, 1, "symmetric"),
    "one pixel, stride 2": (1, 1, 1, 16, 32, 16, 2, "symmetric"),
    "one row": (1, 1, 3, 16, 32, 16, 2, "symmetric"),
    "one column": (1, 9, 1, 8, 16, 8, 1, "symmetric"),
    "odd sides, tail in all directions": (3, 5, 7, 8, 48, 16, 1, "symmetric"),
    "odd sides, stride 2": (2, 9, 7, 8, 48, 24, 2, "symmetric"),
    "even sides, stride 2": (1, 8, 8, 16, 96, 24, 2, "symmetric"),
    "even sides, same padding": (1, 8, 6, 16, 96, 24, 2, "same"),
    "even and odd side, same padding": (2, 6, 5, 8, 48, 16, 2, "same"),
    "residual, three pieces of c_out": (1, 6, 8, 24, 144, 24, 1, "symmetric"),
    "no expansion": (1, 5, 7, 32, None, 16, 1, "symmetric"),
    "no expansion, stride 2, same padding": (1, 6, 7, 16, None, 8, 2, "same"),
    "no expansion, residual, partial channels": (1, 5, 7, 24, None, 24, 1, "symmetric"),
    "no expansion, broad": (1, 3, 4, 40, None, 48, 1, "symmetric"),
    "channels that fill no vector": (2, 4, 5, 7, 21, 5, 1, "symmetric"),
    "several programs": (5, 8, 8, 8, 24, 8, 1, "symmetric"),
    "several blocks of c_in": (1, 3, 5, 72, 144, 24, 1, "symmetric"),
    "middle: whole rows": (1, 3, 14, 24, 80, 48, 1, "symmetric"),
    "middle, stride 2": (1, 6, 14, 32, 64, 64, 2, "symmetric"),
    "broad: half rows": (1, 2, 14, 32, 72, 96, 1, "symmetric"),
    "shrinking": (1, 4, 7, 48, 136, 136, 2, "same"),
    "split, whole images, residual": (2, 7, 7, 136, 80, 136, 1, "symmetric"),
    "split, a row of parts": (1, 3, 8, 40, 72, 168, 1, "symmetric"),
    "split, stride 2": (1, 5, 6, 112, 72, 200, 2, "symmetric"),
    "split, no expansion": (1, 4, 3, 136, None, 136, 1, "symmetric"),
    "looped over c_in": (1, 3, 4, 300, 40, 72, 1, "symmetric"),
    "looped, residual": (1, 2, 2, 264, 40, 264, 1, "symmetric"),
}


def network_cases():
    """Every distinct block of all alphas, on a picture so small that the interpreter can."""
    shapes = {}
    for alpha in (1.4, 1.3, 1.0, 0.75, 0.5, 0.35):
        for layer in layer_shapes(alpha, 32):
            if layer.kind == "block":
                c_mid = layer.c_mid if layer.expand_macs else None
                shape = (layer.c_in, c_mid, layer.c_out, layer.stride)
                shapes.setdefault(shape, min(layer.height, 8))
    for (c_in, c_mid, c_out, stride), side in shapes.items():
        yield 1, side, side + 1, c_in, c_mid, c_out, stride, "symmetric"


def cases():
    for number, (name, case) in enumerate(CASES.items()):  # every third in each type
        yield pytest.param(*case, id=name, marks=[pytest.mark.one_type] if number % 3 else [])
    for case in network_cases():
        yield pytest.param(*case, id="x".join(map(str, case)), marks=pytest.mark.exhaustive)


def operands(N, H, W, c_in, c_mid, c_out, stride, padding, dtype, device):
    """x, packed weights whose values fill the clamp's range on both sides, and the operation's keywords."""
    scale = 1.0 if c_mid else 3.0
    x = (scale * torch.randn(N, c_in, H, W)).to(dtype)
    middle = c_mid or c_in
    expand = (torch.randn(middle, c_in, 1, 1) * 2 / c_in**0.5, torch.randn(middle) + 0.5) if c_mid else (None, None)
    packed = pack_inverted_residual(
        *expand,
        torch.randn(middle, 1, 3, 3) * 0.6,
        torch.randn(middle) * 0.5 + 0.3,
        torch.randn(c_out, middle, 1, 1) / middle**0.5,
        torch.randn(c_out),
        dtype=dtype,
    )
    keywords = {"stride": stride, "residual": stride == 1 and c_in == c_out, "padding": padding}
    return x.to(device, memory_format=torch.channels_last), packed.to(device), keywords


def truth(x, packed, keywords):
    exact = PackedBlock(*(None if tensor is None else tensor.double() for tensor in packed))
    return reference.inverted_residual_inference(x.double(), exact, **keywords)


def placed(packed, memory):
    return PackedBlock(*(None if tensor is None else memory.place(tensor) for tensor in packed))


def check(N, H, W, c_in, c_mid, c_out, stride, padding, dtype, device, memory):
    """Hold the block on fresh inputs to fp64."""
    x, packed, keywords = operands(N, H, W, c_in, c_mid, c_out, stride, padding, dtype, device)
    x, packed = memory.place(x), placed(packed, memory)
    with torch.no_grad():
        y = inverted_residual_inference(x, packed, backend="triton", **keywords)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_parity("Y", y, truth(x, packed, keywords), reference.inverted_residual_inference(x, packed, **keywords))


@pytest.mark.parametrize(("N", "H", "W", "c_in", "c_mid", "c_out", "stride", "padding"), [*cases()])
def test_block(N, H, W, c_in, c_mid, c_out, stride, padding, dtype, device, memory):
    check(N, H, W, c_in, c_mid, c_out, stride, padding, dtype, device, memory)


def every_row():
    """A block for each row of the tables that the choice above leaves for another grid or device."""
    small = {"N": 1, "H": 5, "W": 6}
    for group, c_in, c_mid, c_out in (("NARROW", 8, 24, 16), ("UNEXPANDED", 16, None, 8), ("MIDDLE", 16, 80, 40)):
        for row in getattr(tiles, group):
            yield pytest.param(row, *small.values(), c_in, c_mid, c_out, 1, "symmetric", id=f"{group} {row[:4]}")
    for group, c_out in (("BROAD", 72), ("BROADER", 104), ("SHRINKING", 136), ("SPLIT", 40)):
        for row in getattr(tiles, group):
            yield pytest.param(row, *small.values(), 16, 80, c_out, 2, "same", id=f"{group} {row[:4]}")
    yield pytest.param(tiles.LOOPED, *small.values(), 40, 40, 24, 1, "symmetric", id="LOOPED")


@pytest.mark.parametrize(("row", "N", "H", "W", "c_in", "c_mid", "c_out", "stride", "padding"), [*every_row()])
def test_each_row_and_its_bytes(row, N, H, W, c_in, c_mid, c_out, stride, padding, memory):
    """Every tile of the tables, and the formulas of its launches against what the interpreter counts."""
    if not common.INTERPRETED:
        pytest.skip("bytes are counted in Triton's interpreter")
    x, packed, keywords = operands(N, H, W, c_in, c_mid, c_out, stride, padding, torch.float32, "cpu")
    tile = row.fitted(-(-H // stride), -(-W // stride))
    y = common.allocate((N, c_out, -(-H // stride), -(-W // stride)), x)
    how = tuple(keywords.values())
    launches = block_inference_passes.inverted_residual_launches(x, packed, y, *how, tile=tile)
    formulas = block_inference_passes.inverted_residual_bytes(x, packed, y, *how, tile=tile)
    assert len(launches) == len(formulas) == 1 + row.split
    for launch, formula in zip(launches, formulas, strict=True):
        counter = count(launch)
        assert counter.total == formula
        assert counter.outside == 0
    assert_parity("Y", y, truth(x, packed, keywords), reference.inverted_residual_inference(x, packed, **keywords))


@pytest.mark.parametrize("c_out", [8, 16, 40], ids=["plain", "residual", "split"])
def test_a_stem_whose_relu6_is_the_blocks(c_out, dtype, device, memory):
    c_in = 40 if c_out == 40 else 16
    x, packed, keywords = operands(2, 5, 6, c_in, None, c_out, 1, "symmetric", dtype, device)
    x, keywords = memory.place(5 * x), {**keywords, "relu6_input": True}
    y = inverted_residual_inference(x, packed, backend="triton", **keywords)
    assert_parity("Y", y, truth(x, packed, keywords), reference.inverted_residual_inference(x, packed, **keywords))
    clamped = inverted_residual_inference(x.clamp(0, 6), packed, backend="triton", **{**keywords, "relu6_input": False})
    assert torch.equal(y, clamped)


@pytest.mark.parametrize(
    ("N", "c_in", "H", "W", "c_out"),
    [(2, 16, 4, 4, 128), (1, 24, 1, 1, 40), (3, 40, 5, 5, 136), (1, 72, 9, 13, 32)],
    ids=["full blocks", "one pixel", "partial blocks", "several walks"],
)
def test_head(N, c_in, H, W, c_out, dtype, device, memory):
    x = memory.place(torch.randn(N, c_in, H, W).to(device, dtype, memory_format=torch.channels_last))
    weight = memory.place((torch.randn(c_out, c_in, 1, 1) * 3 / c_in**0.5).to(device, dtype).contiguous())
    bias = memory.place(torch.randn(c_out).to(device) + 0.5)
    f = conv_relu6_mean(x, weight, bias, backend="triton")
    exact = reference.conv_relu6_mean(x.double(), weight.double(), bias.double())
    assert_parity("f", f, exact, reference.conv_relu6_mean(x, weight, bias))


def test_the_heads_bytes():
    if not common.INTERPRETED:
        pytest.skip("bytes are counted in Triton's interpreter")
    x = torch.randn(2, 40, 9, 9).to(memory_format=torch.channels_last)
    arguments = x, torch.randn(136, 40, 1, 1), torch.randn(136), torch.empty(2, 136)
    counter = count(head_inference.conv_relu6_mean_launch(*arguments))
    assert counter.total == head_inference.conv_relu6_mean_bytes(*arguments)
    assert counter.outside == 0


def test_packing_is_exact_but_for_one_rounding():
    """The packed block in fp64 arithmetic is the block of the unscaled weights, within the rounding of fp32."""
    c_in, c_mid, c_out = 8, 48, 16
    weights = [torch.randn(c_mid, c_in, 1, 1), torch.randn(c_mid), torch.randn(c_mid, 1, 3, 3), torch.randn(c_mid)]
    weights = [tensor.double() for tensor in (*weights, torch.randn(c_out, c_mid, 1, 1), torch.randn(c_out))]
    x = torch.randn(2, c_in, 6, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    for expands in (True, False):
        expand, expand_bias, depthwise, depthwise_bias, project, project_bias = weights
        a = F.relu6(F.conv2d(x, expand, expand_bias))
        z = x if expands else a.contiguous(memory_format=torch.channels_last)
        d = F.relu6(F.conv2d(a, depthwise, depthwise_bias, 2, 1, 1, c_mid))
        expected = F.conv2d(d, project, project_bias)
        given = weights if expands else [None, None, *weights[2:]]
        packed = pack_inverted_residual(*given, dtype=torch.float32)
        got = truth(z, packed, {"stride": 2, "residual": False})
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": torch.float64}, TypeError, "dtype: expected one of torch.float16"),
        ({"expand_bias": None}, ValueError, "expand_weight, expand_bias: expected both or neither"),
        ({"depthwise_weight": torch.ones(6, 1, 5, 5)}, ValueError, r"depthwise_weight: expected \[6, 1, 3, 3\]"),
        ({"project_bias": torch.ones(4)}, ValueError, r"project_bias: expected \[3\]"),
        ({"project_weight": torch.ones(3, 6)}, ValueError, r"project_weight: expected \[c_out, c_mid, 1, 1\]"),
        ({"expand_weight": torch.ones(6, 2, 1, 1).int()}, TypeError, "expand_weight: expected a floating-point"),
        ({"depthwise_bias": [0.0] * 6}, TypeError, "depthwise_bias: expected a floating-point tensor, got list"),
        ({"project_weight": torch.full((3, 6, 1, 1), 2e4)}, ValueError, "project_weight: expected finite .* 120000"),
        ({"expand_weight": torch.full((6, 2, 1, 1), torch.nan)}, ValueError, "expand_weight: expected finite .* nan"),
    ],
)
def test_weights_that_cant_be_packed(change, error, message):
    good = {
        "expand_weight": torch.ones(6, 2, 1, 1),
        "expand_bias": torch.ones(6),
        "depthwise_weight": torch.ones(6, 1, 3, 3),
        "depthwise_bias": torch.ones(6),
        "project_weight": torch.ones(3, 6, 1, 1),
        "project_bias": torch.ones(3),
        "dtype": torch.float16,
    }
    pack_inverted_residual(**good)
    with pytest.raises(error, match=message):
        pack_inverted_residual(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(1, 8, 4, 4)}, ValueError, "x: expected channels_last"),
        ({"x": nhwc(1, 8, 4, 4).half()}, TypeError, "x: expected the pack's type torch.float32, got torch.float16"),
        ({"x": nhwc(1, 7, 4, 4)}, ValueError, "x: expected 8 channels"),
        ({"x": nhwc(1, 8, 4, 4).to("meta")}, ValueError, "x: expected the pack's device cpu, got meta"),
        ({"x": nhwc(1, 8, 4, 4).requires_grad_()}, NotImplementedError, "inverted_residual_inference has no gradient"),
        ({"packed": None}, TypeError, "packed: expected what pack_inverted_residual returns, got NoneType"),
        ({"stride": 3}, ValueError, "stride: expected 1 or 2, got 3"),
        ({"stride": True}, ValueError, "stride: expected 1 or 2, got True"),
        ({"stride": 1.0}, ValueError, "stride: expected 1 or 2, got 1.0"),
        ({"residual": 1}, TypeError, "residual: expected True or False, got 1"),
        ({"stride": 2, "residual": True}, ValueError, "residual: expected stride 1"),
        ({"padding": "valid"}, ValueError, "padding: expected one of"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
        ({"relu6_input": True}, ValueError, "relu6_input: expected False"),
    ],
)
def test_what_no_backend_can_run(change, error, message):
    _, packed, _ = operands(1, 4, 4, 8, 24, 8, 1, "symmetric", torch.float32, "cpu")
    good = {"x": nhwc(1, 8, 4, 4), "packed": packed, "stride": 1, "residual": True}
    inverted_residual_inference(**good)
    with pytest.raises(error, match=message):
        inverted_residual_inference(**{**good, **change})


def test_auto_leaves_to_torch_what_kernels_cant_or_shouldnt_run(monkeypatch):
    half, single, cpu, gpu = torch.float16, torch.float32, torch.device("cpu"), torch.device("cuda")
    shape = (1, 8, 4, 4)
    assert why_torch(shape, half, cpu, "auto", "head", c_out=8) == "on a CPU"
    assert why_torch(shape, half, cpu, "torch", "head", c_out=8) == "asked for"
    monkeypatch.setattr(common, "unsupported_device", lambda device: None)
    monkeypatch.setattr(common, "_limits", lambda device: common.Limits(132, 232448))
    assert why_torch(shape, half, gpu, "auto", "head", c_out=8) is None
    assert "2^31 pixels" in why_torch((2**20, 8, 64, 64), half, gpu, "auto", "head", c_out=8)
    with pytest.raises(ValueError, match=r"x: expected fewer than 2\^31 pixels"):
        why_torch((2**20, 8, 64, 64), half, gpu, "triton", "head", c_out=8)
    assert "float64" in why_torch(shape, torch.float64, gpu, "auto", "head", c_out=8)
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert why_torch(shape, single, gpu, "auto", "head", c_out=8) == "IEEE fp32 has no tensor cores"
        assert why_torch(shape, single, gpu, "triton", "head", c_out=8) is None
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert why_torch(shape, single, gpu, "auto", "head", c_out=8) is None
    monkeypatch.setattr(common, "unsupported_device", lambda device: "expected another GPU")
    assert why_torch(shape, half, gpu, "auto", "head", c_out=8) == "expected another GPU"
    with pytest.raises(ValueError, match="x: expected another GPU"):
        why_torch(shape, half, gpu, "triton", "head", c_out=8)


def test_the_clamp_makes_nan_zero_where_torch_keeps_it(dtype, device, memory, clamps_drop_nan):
    x, packed, keywords = operands(1, 5, 5, 8, 24, 16, 1, "symmetric", dtype, "cpu")
    x[0, 3, 2, 2] = torch.nan
    x, packed = memory.place(x.to(device)), placed(packed.to(device), memory)
    assert inverted_residual_inference(x, packed, backend="triton", **keywords).isfinite().all()
    assert inverted_residual_inference(x, packed, backend="torch", **keywords).isnan().any()


def test_an_empty_batch(device):
    x, packed, keywords = operands(0, 5, 5, 8, 24, 8, 1, "symmetric", torch.float32, device)
    assert inverted_residual_inference(x, packed, backend="triton", **keywords).shape == (0, 8, 5, 5)


def test_autocast_changes_nothing(device):
    x, packed, keywords = operands(1, 4, 4, 8, 24, 8, 1, "symmetric", torch.float32, device)
    expected = inverted_residual_inference(x, packed, backend="torch", **keywords)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(inverted_residual_inference(x, packed, backend="torch", **keywords), expected)


def test_the_operations_are_well_formed(device):
    x, packed, keywords = operands(1, 4, 4, 8, 24, 8, 1, "symmetric", torch.float32, device)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.mnv2.inverted_residual_inference, (x, *packed, *keywords.values(), False), test_utils=tests
    )
    head = x, torch.randn(16, 8, 1, 1, device=device), torch.randn(16, device=device)
    torch.library.opcheck(torch.ops.mnv2.conv_relu6_mean, head, test_utils=tests)


def test_a_tile_is_chosen_by_how_full_the_grid_is_and_what_fits():
    large, small = common.Limits(132, 232448), common.Limits(84, 101376)
    how = {"c_in": 64, "c_out": 64, "stride": 1, "H_out": 14, "W_out": 14, "element_size": 2, "expands": True}
    rows = tiles.block_tiles(**how, limits=large)
    assert [row.TILE_W for row in rows] == [14, 7, 2]
    assert tiles.pick(rows, 1024, 384, 14, 14, large) == rows[0]
    assert tiles.pick(rows, 1, 384, 14, 14, large) == rows[-1]
    assert [row.TILE_W for row in tiles.block_tiles(**how, limits=small)] == [7, 2]  # 99 KB hold no row of 14
    assert tiles.block_tiles(**{**how, "c_in": 300}, limits=large) == (tiles.LOOPED,)
    for alpha in (1.4, 1.3, 1.0, 0.75, 0.5, 0.35):
        for layer in layer_shapes(alpha, 224):
            if layer.kind != "block":
                continue
            for limits in (large, small):
                arguments = (layer.c_in, layer.c_out, layer.stride, layer.height_out, layer.width_out, 2, limits)
                rows = tiles.block_tiles(*arguments, expands=layer.expand_macs > 0)
                assert rows
                assert not any(row.looped for row in rows)
                single = tiles.block_tiles(*arguments[:5], 4, limits, expands=layer.expand_macs > 0)
                assert len(single) == 1  # fp32 takes the smallest
                assert all(row.shared_bytes(layer.c_in, layer.c_out, layer.stride, 2) <= limits.shared for row in rows)
