"""Passes P2 and B2, the walks down an image: numbers against fp64, bytes against their formulas.

The shapes go with the tiles: a program has 8 strips of 4 or 8 columns (in B2 of 2, 4 or 8) by 16, 32 or 64 channels,
and does two rows a step where the height of D is even. It walks down all rows of a small image, unless a test shortens
the walk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_project import assert_moments, assert_near, column, image, tolerance
from test_traffic import assert_counted, interpreted, nhwc
from torch import Tensor

from bench.parity import assert_parity
from kernels import common, reference, training_tiles
from kernels.expand_depthwise import expand_depthwise_bytes, expand_depthwise_launch
from kernels.expand_depthwise_grads import expand_depthwise_grads_bytes, expand_depthwise_grads_launch
from mnv2.model import layer_shapes

pytestmark = pytest.mark.one_type

# N, H, W, c_in, c_mid (None: no expansion), c_out, stride, padding
CASES = {
    "one pixel": (1, 1, 1, 8, 16, 8, 1, "symmetric"),
    "one pixel, stride 2": (1, 1, 1, 8, 16, 8, 2, "symmetric"),
    "two rows of a pixel, same padding": (2, 2, 1, 8, 16, 8, 2, "same"),
    "channels that fill no vector": (1, 3, 5, 7, 33, 5, 1, "symmetric"),  # three blocks add to T
    "odd height, even width, same padding": (2, 5, 6, 7, 21, 5, 2, "same"),
    "even height, odd width, same padding": (1, 4, 9, 8, 16, 40, 2, "same"),
    "odd sides, stride 2": (1, 5, 7, 8, 16, 16, 2, "symmetric"),
    "two rows a step, a tail of columns and strips": (3, 2, 7, 8, 16, 8, 1, "symmetric"),
    "every strip full": (8, 1, 8, 16, 32, 8, 1, "symmetric"),
    "every strip full, stride 2": (4, 2, 16, 8, 32, 8, 2, "same"),
    "no expansion": (1, 4, 5, 17, None, 8, 1, "symmetric"),
    "no expansion, stride 2": (2, 4, 7, 24, None, 8, 2, "same"),
    "several blocks of c_in, dZ1 is stored": (1, 2, 5, 40, 16, 24, 1, "symmetric"),
    "dZ1 is stored, stride 2": (1, 3, 6, 40, 32, 24, 2, "symmetric"),
    "dZ1 is stored, as many channels as X has": (1, 2, 3, 40, 40, 8, 1, "symmetric"),
}
# Images and which of the nine taps touch all pixels alike: others are 0 where they touch some, as a border of its own
# numbers would be most of the variance, and large where they touch none.
STEEP = {
    "stride 2": ((4, 6, 10, 16, None, 8, 2, "symmetric"), [4, 5, 7, 8], []),
    "one row": ((16, 1, 9, 16, None, 8, 1, "symmetric"), [4], [0, 1, 2, 6, 7, 8]),
    "one column": ((16, 9, 1, 16, None, 8, 1, "symmetric"), [4], [0, 2, 3, 5, 6, 8]),
    "one row, stride 2": ((16, 1, 9, 16, None, 8, 2, "symmetric"), [4], [0, 1, 2, 6, 7, 8]),
    "stride 1": ((2, 6, 9, 16, None, 8, 1, "symmetric"), [4], []),
}
SANITIZED = (
    "channels that fill no vector",
    "no expansion",
    "dZ1 is stored, stride 2",
)
WALKS = {
    "stride 1": (1, 5, 6, 8, 16, 8, 1, "symmetric"),  # rows 0 and 1, 2 and 3, 4
    "stride 2": (1, 5, 3, 8, 16, 8, 2, "symmetric"),
    "stride 2, same padding": (1, 6, 4, 8, 16, 8, 2, "same"),
    "no expansion": (1, 6, 3, 8, None, 8, 1, "symmetric"),
}


def network_cases():
    """Every distinct block of the network, on an image so small that the interpreter can."""
    shapes = {}
    for layer in layer_shapes(1.0, 224):
        if layer.kind == "block":
            shape = layer.c_in, layer.c_mid if layer.expand_macs else None, layer.c_out, layer.stride
            shapes.setdefault(shape, min(layer.height, 14))
    for (*widths, stride), side in shapes.items():
        yield 1, 3, side, *widths, stride, "symmetric"


def cases():
    for name, case in CASES.items():
        yield pytest.param(case, id=name)
    for case in network_cases():
        yield pytest.param(case, id="x".join(map(str, case)), marks=pytest.mark.exhaustive)


@pytest.fixture(autouse=True)
def _processors(monkeypatch):
    """As many everywhere, so that programs are what the cases say."""
    monkeypatch.setattr(common, "limits", lambda device: common.Limits(132, 0))


def skip_if_sanitized(request, wanted=False):
    """A sanitizer has time for few cases."""
    if request.config.getoption("--sanitize") and not wanted:
        pytest.skip("the sanitizer takes other cases")


@pytest.fixture
def sampled(request, case):
    """Skips the cases that a sanitizer has no time for."""
    skip_if_sanitized(request, case in [CASES[name] for name in SANITIZED])


class Operands(NamedTuple):
    """What the passes are given, and how; images and weights but Wd in one type."""

    x: Tensor
    d: Tensor
    dp: Tensor
    w1: Tensor | None
    w1_scaled: Tensor | None
    stats1: Tensor | None
    wd: Tensor
    w2_scaled: Tensor
    stats2: Tensor
    coefs2: Tensor
    how: dict[str, Any]


def operands(case, dtype, device, memory):
    """Numbers that fill both clamps' ranges on both sides; D is any."""
    N, H, W, c_in, c_mid, c_out, stride, padding = case
    expands, c_mid = c_mid is not None, c_mid or c_in
    side = -(-H // stride), -(-W // stride)
    w1, w2, wd = torch.randn(c_mid, c_in) / c_in**0.5, torch.randn(c_out, c_mid) / c_mid**0.5, torch.randn(c_mid, 9) / 3
    stats1, stats2, coefs2 = torch.randn(4, c_mid), torch.randn(4, c_mid), torch.randn(3, c_mid)
    stats1[2:] += 1.5
    stats2[2:] += 1.5
    all_of = (
        image((N, c_in, H, W), dtype, 0.5),
        image((N, c_mid, *side), dtype),
        image((N, c_out, *side), dtype),
        w1.to(dtype) if expands else None,
        (w1 * stats1[2, :, None]).to(dtype) if expands and c_in <= training_tiles.THIN else None,
        stats1 if expands else None,
        wd.view(c_mid, 1, 3, 3),
        (w2 * coefs2[0]).to(dtype),
        stats2,
        coefs2,
    )
    placed = (None if tensor is None else memory.place(tensor.to(device)) for tensor in all_of)
    return Operands(*placed, {"stride": stride, "padding": padding})


def activation(o, dtype):
    """A, and where its gradient passes, by torch in ``dtype``."""
    x = o.x.to(dtype)
    if o.w1 is None:
        return x, torch.ones_like(x)
    z = F.conv2d(x, o.w1.to(dtype)[:, :, None, None])
    z = z * column(o.stats1[2].to(dtype)) + column(o.stats1[3].to(dtype))
    return z.clamp(0, 6), (z > 0) & (z < 6)


def forward(o, dtype):
    """D of X, by torch in ``dtype``."""
    return reference.depthwise_conv2d(activation(o, dtype)[0], o.wd.to(dtype), **o.how)


def backward(o, dtype):
    """dZ1 (without an expansion dA) and dWd, by torch in ``dtype``."""
    d, (scale, shift) = o.d.to(dtype), (column(row.to(dtype)) for row in o.stats2[2:])
    z = d * scale + shift
    db = F.conv2d(o.dp.to(dtype), o.w2_scaled.to(dtype).t()[:, :, None, None]) * ((z > 0) & (z < 6))
    dd = db + column(o.coefs2[1].to(dtype)) * d + column(o.coefs2[2].to(dtype))
    a, passes = activation(o, dtype)
    a, wd = a.detach().requires_grad_(), o.wd.to(dtype).requires_grad_()
    da, dwd = torch.autograd.grad(reference.depthwise_conv2d(a, wd, **o.how), (a, wd), dd)
    return da * passes, dwd


def run_forward(o, **keywords):
    """D and its moments' partials, by the kernel."""
    d = common.allocate(tuple(o.d.shape), o.x)
    launch = common.launched(expand_depthwise_launch, o.x, o.w1, o.stats1, o.wd, d, *o.how.values(), **keywords)
    return d, launch.arguments["partials_ptr"]


def check_forward(o, chunks=1, tile=None):
    """Hold D, and its moments before it is rounded, to fp64."""
    truth = forward(o, torch.float64)
    d, partials = run_forward(o, moments=True, tile=tile)
    assert len(partials) >= chunks
    assert_parity("D", d, truth, forward(o, torch.float32).to(o.x.dtype))
    assert_moments(partials, truth, lost=1e-6)


def check_backward(o, chunks=1, tile=None):
    """Hold all that B2 leaves to fp64."""
    thin, dtype = o.w1_scaled is not None, o.x.dtype
    out = common.allocate(tuple((o.x if thin else o.d).shape[:2]) + o.x.shape[2:], o.x)
    given = (*o[:-1], out, *o.how.values())
    at = common.launched(expand_depthwise_grads_launch, *given, tile=tile).arguments
    dz, dwd = backward(o, torch.float64)
    assert len(at["taps_ptr"]) >= chunks
    assert_near("dWd", at["taps_ptr"].double().sum(0).t().reshape(o.wd.shape), dwd, 1e-5)
    if not thin:
        assert_parity("dZ1" if o.w1 is not None else "dA", out, dz, backward(o, torch.float32)[0].to(dtype))
    else:
        dz = dz.float().to(dtype).double()  # as a factor
        t = F.conv2d(dz, o.w1_scaled.double().t()[:, :, None, None])
        assert_near("T", out, t, max(1.5 * torch.finfo(dtype).eps, 1e-6))  # rounded again by each block of channels
        s = torch.einsum("nihw,nehw->ie", o.x.double(), dz)
        assert_near("S", at["s_ptr"].double().sum(0), s, tolerance(dtype))
        # Of dZ1 as it is rounded for S, so that a mean of X cancels.
        assert_near("dbeta1", at["beta_ptr"].double().sum((0, 1)), dz.sum((0, 2, 3)), max(tolerance(dtype), 1e-5))


@pytest.fixture
def half(pytestconfig):
    """The half type that is computed here like on the device."""
    return torch.bfloat16 if pytestconfig.getoption("--sanitize") else torch.float16


@pytest.mark.parametrize("case", [*cases()])
def test_expand_depthwise(case, sampled, half, device, memory):
    check_forward(operands(case, half, device, memory))


@pytest.mark.parametrize("case", [*cases()])
def test_expand_depthwise_grads(case, sampled, half, device, memory):
    check_backward(operands(case, half, device, memory))


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [*cases()])
def test_in_every_type(case, dtype, device, memory, request):
    skip_if_sanitized(request)
    o = operands(case, dtype, device, memory)
    check_forward(o)
    check_backward(o)


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_several_walks_a_column(walk, dtype, device, memory, monkeypatch, request):
    skip_if_sanitized(request, walk == WALKS["stride 1"])
    monkeypatch.setattr(training_tiles, "MIN_ROWS", 2)
    o = operands(walk, dtype, device, memory)
    check_forward(o, chunks=2)
    check_backward(o, chunks=2)


def test_without_moments(dtype, device, memory, request):
    skip_if_sanitized(request)
    o = operands(CASES["two rows a step, a tail of columns and strips"], dtype, device, memory)
    d, partials = run_forward(o, moments=False)
    assert partials is None
    assert_parity("D", d, forward(o, torch.float64), forward(o, torch.float32).to(dtype))


@pytest.mark.parametrize(("case", "alike", "none"), STEEP.values(), ids=STEEP)
def test_moments_of_a_mean_of_a_thousand_sigma(case, alike, none, dtype, device, memory, request):
    skip_if_sanitized(request)
    o = operands(case, dtype, device, memory)
    o.x.copy_(3 + 0.003 * torch.randn(o.x.shape))
    taps = o.wd.view(-1, 9)
    others = [t for t in range(9) if t not in alike]
    taps[:, alike] = taps[:, alike].abs() + 0.1
    taps[:, others] = 0
    taps[:, none] = 100
    truth = forward(o, torch.float64)
    _, partials = run_forward(o, moments=True)
    assert_moments(partials, truth)


@pytest.mark.parametrize("value", [torch.inf, 6e4], ids=str)
def test_without_moments_a_number_stays_where_it_is(value, dtype, device, memory, request):
    skip_if_sanitized(request)
    o = operands((1, 8, 12, 8, None, 8, 1, "symmetric"), dtype, device, memory)
    o.x[:, :, 0, 0] = value
    d, _ = run_forward(o, moments=False)
    reached = torch.zeros(8, 12, dtype=torch.bool, device=device)
    reached[:2, :2] = True
    truth, twin = forward(o, torch.float64), forward(o, torch.float32).to(dtype)
    assert_parity("D", d[..., ~reached], truth[..., ~reached], twin[..., ~reached])
    assert torch.equal(d[..., reached].isfinite(), twin[..., reached].isfinite())


@pytest.mark.parametrize("row", [2, 3], ids=["scale", "shift"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_statistics_that_are_no_numbers_make_their_channels_none(row, dtype, device, memory, request, clamps_drop_nan):
    skip_if_sanitized(request, row == 2)
    o = operands(CASES["channels that fill no vector"], dtype, device, memory)
    o.stats1[row, 3] = o.stats1[row, 20] = torch.nan
    d, partials = run_forward(o, moments=True)
    lost = torch.zeros(len(o.wd), dtype=torch.bool, device=device)
    lost[[3, 20]] = True
    assert torch.equal(d.isnan(), column(lost).expand_as(d))
    assert torch.equal(partials[:, 1:].isnan(), torch.cat([lost, lost]).expand(len(partials), -1))


LIMITS = common.Limits(132, 0)


def every_tile(choose):
    """Each tile that ``choose`` may take in half precision, at a stride of its own."""
    found = {}
    for stride in (1, 2):
        for c_in, c_mid in [(c_in, c_mid) for c_in in (8, 40) for c_mid in range(8, 300, 4)]:
            for W_out in range(1, 20):
                for expands in (True, False):
                    found.setdefault((choose(c_in, c_mid, stride, W_out, expands), stride))
    return [
        pytest.param(*key, id=f"stride {key[1]}, {tuple(key[0])}", marks=[pytest.mark.exhaustive] * (i % 4 > 0))
        for i, key in enumerate(found)
    ]


def forward_tile(c_in, c_mid, stride, W_out, expands):
    return training_tiles.expand_tile.default(c_in, c_mid, stride, W_out, 2, LIMITS)


def backward_tile(c_in, c_mid, stride, W_out, expands):
    return training_tiles.expand_grad_tile.default(c_in, c_mid, 8, stride, W_out, 2, LIMITS, expands=expands)


def tile_operands(stride, device, memory):
    """A block that leaves a part of every tile idle."""
    return operands((1, 2 * stride, 9 * stride, 8, 24, 8, stride, "same"), torch.float16, device, memory)


@pytest.mark.parametrize(("tile", "stride"), every_tile(forward_tile))
def test_each_tile(tile, stride, device, memory, request):
    skip_if_sanitized(request)
    check_forward(tile_operands(stride, device, memory), tile=tile)


@pytest.mark.parametrize(("tile", "stride"), every_tile(backward_tile))
def test_each_tile_of_the_gradients(tile, stride, device, memory, request):
    skip_if_sanitized(request)
    check_backward(tile_operands(stride, device, memory), tile=tile)


BYTES = {
    "channels that fill no vector": 8,
    "even height, odd width, same padding": 8,
    "odd sides, stride 2": 2,  # walks of two rows
    "two rows a step, a tail of columns and strips": 2,
    "every strip full, stride 2": 8,
    "no expansion": 2,
    "no expansion, stride 2": 8,
    "several blocks of c_in, dZ1 is stored": 8,
    "dZ1 is stored, stride 2": 8,
}


@interpreted
@pytest.mark.parametrize(("name", "rows"), BYTES.items(), ids=BYTES)
def test_launches_move_the_bytes_of_their_formulas(name, rows, monkeypatch):
    monkeypatch.setattr(training_tiles, "MIN_ROWS", rows)
    N, H, W, c_in, c_mid, c_out, stride, padding = CASES[name]
    expands, c_mid = c_mid is not None, c_mid or c_in
    side, thin = (-(-H // stride), -(-W // stride)), expands and c_in <= training_tiles.THIN
    x, d, dp, out = (nhwc(N, C, *size) for C, size in ((c_in, (H, W)), (c_mid, side), (c_out, side), (c_mid, (H, W))))
    w1, scaled = (torch.zeros(c_mid, c_in, dtype=torch.float16) if expands else None for _ in range(2))
    stats1, stats2, coefs2 = (torch.zeros(rows, c_mid) for rows in (4, 4, 3))
    w2, wd = torch.zeros(c_out, c_mid, dtype=torch.float16), torch.zeros(c_mid, 1, 3, 3)
    arguments = x, w1, stats1 if expands else None, wd, d, stride, padding
    launch = expand_depthwise_launch(*arguments, moments=rows == 8)
    assert_counted(launch, expand_depthwise_bytes(*arguments, moments=rows == 8))
    first = w1, scaled if thin else None, stats1 if expands else None
    out = nhwc(N, c_in, H, W) if thin else out
    arguments = x, d, dp, *first, wd, w2, stats2, coefs2, out, stride, padding
    assert_counted(expand_depthwise_grads_launch(*arguments), expand_depthwise_grads_bytes(*arguments))
