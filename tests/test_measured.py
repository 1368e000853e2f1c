"""What follows from the tables of what was measured: the tile that a chooser takes, and the path that "auto" takes."""

from __future__ import annotations

import json

import pytest
import torch
from numerics import Calls
from toys import GPU, TOYS, table, toy_row, toy_tile

from kernels import (
    BatchNorm,
    common,
    conv_relu6_mean,
    depthwise_conv2d,
    inverted_residual,
    inverted_residual_inference,
    measured,
    tiles,
)
from kernels.block_inference_passes import chosen_tile
from kernels.pack import PackedBlock
from mnv2 import MobileNetV2, fold
from mnv2.model import layer_shapes


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file of tables, which isn't there yet."""
    with measured.planted({}):
        monkeypatch.setattr(measured, "TABLES", tmp_path / "measured.json")
        monkeypatch.setattr(measured, "_planted", None)
        yield measured.TABLES


def test_where_nothing_was_measured_rules_decide(file):
    assert toy_tile(7, 2, GPU) == TOYS[0]
    assert measured.read(file) == {}


def test_a_tile_goes_by_device_and_shape_and_no_device_without_a_name_has_one(file):
    file.write_text(json.dumps({"GPU 100": table([toy_row(7, 2)])}))
    assert toy_tile(7, 2, GPU) == TOYS[1]
    assert toy_tile(8, 2, GPU) == TOYS[0]
    assert toy_tile(7, 4, GPU) == TOYS[0]
    assert toy_tile(7, 2, GPU._replace(name="GPU 200")) == TOYS[0]
    assert toy_tile(7, 2, GPU._replace(name="")) == TOYS[0]


def test_a_tile_that_is_no_candidate_any_more_is_ignored(file):
    file.write_text(json.dumps({"GPU 100": table([toy_row(7, 99)])}))
    assert toy_tile(7, 2, GPU) == TOYS[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"GPU 100": 3}',
        '{"GPU 100": {"tiles": []}}',
        '{"GPU 100": {"tiles": [{"op": "toy"}], "paths": []}}',
    ],
)
def test_a_file_of_something_else_is_refused_by_name(file, text):
    file.write_text(text)
    with pytest.raises(RuntimeError, match=r"measured\.json: expected what `python -m bench\.tune` writes, got"):
        toy_tile(7, 2, GPU)


def test_a_measured_tile_of_a_block_comes_before_those_of_fewer_pixels():
    how = {"c_in": 64, "c_out": 64, "stride": 1, "H_out": 14, "W_out": 14, "element_size": 2, "expands": True}
    rule = tiles.block_tiles(**how, limits=GPU)
    shape = tiles.block_tile.shape(**how, limits=GPU)
    for best, behind in ((rule[1], [rule[2]]), (rule[2], []), (rule[1]._replace(num_stages=2), [rule[2]])):
        row = {"op": "block", "shape": shape, "tile": measured.fields_of(best)}
        with measured.planted({"GPU 100": table([row])}):
            rows = tiles.block_tiles(**how, limits=GPU)
            assert rows == (best, *behind)
            x = torch.empty(1024, 64, 14, 14, dtype=torch.float16, device="meta")
            packed = meta_pack(64, 384, 64)
            assert chosen_tile(x, packed, 1, GPU) == best
            assert chosen_tile(x[:1], packed, 1, GPU) == rows[-1]  # a batch chooses among rows, as it does without
    assert tiles.block_tiles(**how, limits=GPU) == rule


def meta_pack(c_in, c_mid, c_out, dtype=torch.float16):
    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    first = new(c_mid, c_in, dtype=dtype), new(c_mid)
    return PackedBlock(*first, new(9, c_mid), new(c_mid), new(c_out, c_mid, dtype=dtype), new(c_out))


# What "auto" makes of a table, on tensors of the meta device, where kernels count as there and nothing is run.

SHAPE = {"c_in": 8, "c_mid": 48, "c_out": 8, "H": 6, "W": 6, "stride": 1}
TORCH = {"kernels": 3.0, "torch": 2.0, "compiled": 4.0}
COMPILED = {"kernels": 3.0, "torch": 4.0, "compiled": 2.0}


def new(*shape, dtype=torch.float16):
    like = torch.empty(shape, dtype=dtype, device="meta")
    return like.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else like


def norm(C):
    return BatchNorm(*(new(C, dtype=torch.float32) for _ in range(4)), None, batch_stats=True)


def block_at_inference(**how):
    packed = meta_pack(8, 48, 8)
    return lambda x: inverted_residual_inference(x, packed, stride=1, residual=True, **how)


def head(**how):
    weight, bias = new(16, 8, 1, 1).contiguous(), new(16, dtype=torch.float32)
    return lambda x: conv_relu6_mean(x, weight, bias, **how)


def block_in_training(**how):
    operands = new(48, 8, 1, 1), norm(48), new(48, 1, 3, 3), norm(48), new(8, 48, 1, 1), norm(8)
    return lambda x: inverted_residual(x, *operands, stride=1, residual=True, **how)


def depthwise(**how):
    weight = new(8, 1, 3, 3).contiguous()
    return lambda x: depthwise_conv2d(x, weight, **how)


def depthwise_training(**how):
    weight = new(8, 1, 3, 3).contiguous().requires_grad_()
    return lambda x: depthwise_conv2d(x, weight, **how)


THIN = {name: SHAPE[name] for name in ("H", "W", "stride")} | {"C": 8}
OPERATIONS = {
    "inference block": (block_at_inference, SHAPE, "inverted_residual_inference"),
    "head": (head, {"c_in": 8, "c_out": 16, "H": 6, "W": 6}, "conv_relu6_mean"),
    "training block": (block_in_training, SHAPE, "inverted_residual_fwd"),
    "depthwise": (depthwise, THIN, "depthwise_fwd"),
    "depthwise training": (depthwise_training, THIN, "depthwise_fwd"),
}


@pytest.fixture
def served(monkeypatch):
    """Kernels that can run everywhere."""
    monkeypatch.setattr(common, "unsupported_device", torch.compiler.assume_constant_result(lambda device: None))
    torch.compiler.reset()


def path_row(op, us, **change):
    return {"op": op, "shape": {**OPERATIONS[op][1], **change}, "dtype": "float16", "us_an_image": us}


def runs_kernels(op, batch=2, **how):
    make, _, kernel = OPERATIONS[op]
    with Calls() as calls:
        make(**how)(new(batch, 8, 6, 6))
    return kernel in calls.names


def compiles_kernels(op, dynamic=False):
    """Whether torch.compile, without a break, finds the kernels in the operation."""
    make, _, kernel = OPERATIONS[op]
    targets = []

    def backend(graph, inputs):
        modules = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        targets.extend(str(node.target) for module in modules for node in module.graph.nodes)
        return graph

    torch.compiler.reset()
    torch.compile(make(), backend=backend, fullgraph=True, dynamic=dynamic)(new(2, 8, 6, 6))
    return any(kernel in target for target in targets)


@pytest.mark.parametrize("op", OPERATIONS)
def test_auto_takes_the_fastest_of_what_can_run(op, served):
    other_size = path_row(op, TORCH, H=7)
    other_type = {**path_row(op, TORCH), "dtype": "bfloat16"}
    for row, kernels in (
        (path_row(op, TORCH), False),
        (path_row(op, COMPILED), True),
        (path_row(op, {"kernels": 3.0}), True),
        (path_row(op, {"torch": 2.0}), True),
        (other_size, True),
        (other_type, True),
    ):
        with measured.planted({"": table(paths=[row])}):
            assert runs_kernels(op) == runs_kernels(op, batch=5) == kernels  # whatever the batch
            assert runs_kernels(op, backend="triton")
            assert not runs_kernels(op, backend="torch")
    assert runs_kernels(op)


@pytest.mark.parametrize("op", OPERATIONS)
def test_while_torch_compile_traces_what_it_compiles_is_what_can_run(op, served):
    with measured.planted({"": table(paths=[path_row(op, TORCH)])}):
        assert compiles_kernels(op)
    with measured.planted({"": table(paths=[path_row(op, COMPILED)])}):
        assert not compiles_kernels(op)


def test_sizes_that_torch_compile_leaves_open_count_as_not_measured(served):
    with measured.planted({"": table(paths=[path_row("head", COMPILED)])}):
        assert compiles_kernels("head", dynamic=True)


def explained(network, us, **how):
    layer = layer_shapes(0.35, 32)[2]
    shape = {"c_in": layer.c_in, "c_mid": layer.c_mid, "c_out": layer.c_out, "stride": layer.stride}
    shape |= {"H": layer.height, "W": layer.width}
    rows = [
        {"op": op, "shape": shape, "dtype": "float32", "us_an_image": us}
        for op in ("inference block", "training block")
    ]
    with measured.planted({"": table(paths=rows)}):
        explanation = network.explain(1, 32)
        assert "Tiles and paths: measured on this device by `python -m bench.tune`." in str(explanation)
        assert explanation.plans[2].why in str(explanation)
    return explanation.plans[2], explanation.plans[3]


def test_explain_says_what_was_measured(served):
    network = fold(MobileNetV2(0.35).eval()).to("meta")
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert "Tiles and paths: not measured on this device, defaults." in str(network.explain(1, 32))
        there, other = explained(network, {"kernels": 15.61, "torch": 12.3, "compiled": 14.0})
        reason = "torch's convolutions are faster here, 12.3 us an image against 15.6 (measured)"
        assert (there.path, there.why) == ("torch", reason)
        assert (other.path, other.why) == ("kernels", "")
        advice = "torch.compile is faster: 9.1 us an image against 12.3; compile the network"
        there, _ = explained(network, {"kernels": 15.61, "torch": 12.3, "compiled": 9.1})
        assert (there.path, there.why) == ("torch", f"{reason}; {advice}")
        there, _ = explained(network, {"kernels": 12.3, "torch": 15.0, "compiled": 9.1})
        assert (there.path, there.why) == ("kernels", advice)
        network = MobileNetV2(0.35).eval().to("meta")
        there, other = explained(network, {"kernels": 12.3, "torch": 15.0, "compiled": 9.1})
        assert (there.path, there.why) == ("kernels, unfolded", f"in training {advice}")
        assert (other.path, other.why) == ("kernels, unfolded", "")


def test_explain_plans_with_the_measured_tile(served):
    network = fold(MobileNetV2(0.35).eval(), torch.float16).to("meta")
    head = layer_shapes(0.35, 32)[-2]
    arguments = head.c_in, head.c_out, head.height * head.width, 2, GPU
    best = tiles.head_tile.candidates(*arguments)[1]
    row = {"op": "head", "shape": tiles.head_tile.shape(*arguments), "tile": measured.fields_of(best)}
    with measured.planted({"": table([row])}):
        assert f"{best.BLOCK_O} channels" in network.explain(1, 32).plans[-2].tile
    assert f"{best.BLOCK_O} channels" not in network.explain(1, 32).plans[-2].tile
