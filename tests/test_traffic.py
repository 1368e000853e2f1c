"""Byte formulas beside the launchers, held to what the interpreter counts; the traffic report and its models."""

from __future__ import annotations

import json

import pytest
import torch
import triton
import triton.language as tl

from bench import executions, traffic
from bench.blocks import Block
from bench.count import Counter, count
from bench.training import passes_of
from kernels import block_inference_passes, common, depthwise_passes, norm_passes, partials, tiles
from kernels.common import Launch, Traffic
from mnv2.model import VARIANTS, layer_shapes

interpreted = pytest.mark.skipif(not common.INTERPRETED, reason="bytes are counted in Triton's interpreter")
CPU = torch.device("cpu")

# N, C, H, W, stride, padding. A program has 16, 8 or 4 strips of 4 or 2 columns, 16, 32 or 64 channels, about 8 rows.
CASES = {
    "one-pixel": (1, 1, 1, 1, 1, "symmetric"),
    "every-mask-partial": (3, 33, 5, 7, 1, "symmetric"),
    "three-chunks-of-rows": (1, 8, 17, 4, 1, "symmetric"),
    "two-groups-of-strips-two-blocks-of-channels": (3, 120, 3, 8, 1, "symmetric"),
    "stride-2": (2, 24, 6, 12, 2, "symmetric"),
    "stride-2-odd": (2, 24, 5, 7, 2, "symmetric"),
    "stride-2-one-pixel": (1, 3, 1, 1, 2, "symmetric"),
    "stride-2-two-chunks-two-groups": (8, 8, 18, 18, 2, "symmetric"),
    "same-even": (2, 33, 4, 12, 2, "same"),
    "same-odd": (2, 50, 5, 7, 2, "same"),
    "same-even-by-odd": (1, 8, 6, 7, 2, "same"),
    "same-two-chunks-two-groups": (2, 50, 18, 18, 2, "same"),
}


def nhwc(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16).to(memory_format=torch.channels_last)


def assert_counted(launch: Launch, formula: Traffic) -> None:
    counter = count(launch)
    assert counter.outside == 0
    assert counter.total == formula, counter.by_tensor


@interpreted
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_moves_the_bytes_of_its_formula(case):
    N, C, H, W, stride, padding = case
    x, y = nhwc(N, C, H, W), nhwc(N, C, -(-H // stride), -(-W // stride))
    arguments = (x, torch.zeros(C, 1, 3, 3, dtype=torch.float16), y, stride, padding)
    assert_counted(depthwise_passes.depthwise_fwd_launch(*arguments), depthwise_passes.depthwise_fwd_bytes(*arguments))


@interpreted
@pytest.mark.parametrize("wanted", ["both", "input-only", "weight-only"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_move_the_bytes_of_their_formulas(case, wanted):
    N, C, H, W, stride, padding = case
    dy, weight = nhwc(N, C, -(-H // stride), -(-W // stride)), torch.zeros(C, 1, 3, 3)
    x = None if wanted == "input-only" else nhwc(N, C, H, W)
    dx = None if wanted == "weight-only" else nhwc(N, C, H, W)
    arguments = (dy, x, weight, dx, stride, padding)
    launch = depthwise_passes.depthwise_bwd_launch(*arguments)
    assert_counted(launch, depthwise_passes.depthwise_bwd_bytes(*arguments))
    if x is not None:
        sums = (launch.arguments["partials_ptr"], weight.view(C, 9))
        assert_counted(partials.sum_partials_launch(*sums), partials.sum_partials_bytes(*sums))


@interpreted
@pytest.mark.parametrize(("P", "R", "C"), [(1, 9, 1), (300, 9, 5), (513, 1, 8)], ids=["one", "two-steps", "no-tail"])
def test_sum_of_partials_moves_the_bytes_of_its_formula(P, R, C):
    sums = torch.zeros(P, R, C), torch.zeros(C, R, dtype=torch.float16)
    assert_counted(partials.sum_partials_launch(*sums), partials.sum_partials_bytes(*sums))


def test_the_cases_have_every_tile_and_several_programs_in_each_direction():
    launches = [
        depthwise_passes.depthwise_fwd_launch(
            nhwc(N, C, H, W), torch.zeros(C, 1, 3, 3), nhwc(N, C, H, W), stride, padding
        )
        for N, C, H, W, stride, padding in CASES.values()
    ]
    assert max(launch.arguments["chunks"] for launch in launches) == 3
    assert max(launch.grid[0] // launch.arguments["chunks"] for launch in launches) == 2
    assert max(launch.grid[1] for launch in launches) == 3
    names = ("BLOCK_M", "BLOCK_C", "COLUMNS")
    assert {tuple(map(launch.arguments.get, names)) for launch in launches} == {tile[:3] for tile in tiles.DEPTHWISE}


@triton.jit
def _shift_kernel(x_ptr, y_ptr, total_ptr, n, BLOCK: tl.constexpr):
    # Every program reads n elements from its own on; one element lies behind the last.
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, x, mask=offs < n)
    tl.atomic_add(total_ptr, tl.sum(x))


@interpreted
def test_counter_tells_touched_from_requested_and_what_lies_outside():
    memory = torch.zeros(32)
    arguments = {"x_ptr": memory[:8], "y_ptr": memory[16:24], "total_ptr": torch.zeros(1), "n": 7, "BLOCK": 8}
    counter = count(Launch(_shift_kernel, (3,), arguments, num_warps=1))
    assert counter.by_tensor == {
        "x_ptr": Traffic(8 * 4, 0, (3 * 7 - 1) * 4, 0),
        "y_ptr": Traffic(0, 7 * 4, 0, 3 * 7 * 4),
        "total_ptr": Traffic(4, 4, 3 * 4, 3 * 4),
    }
    assert counter.outside == 4
    assert counter.total == Traffic(8 * 4 + 4, 7 * 4 + 4, 20 * 4 + 12, 21 * 4 + 12)


@interpreted
def test_counter_counts_only_inside_its_with():
    x, y = nhwc(1, 1, 2, 2), nhwc(1, 1, 2, 2)
    launch = depthwise_passes.depthwise_fwd_launch(x, torch.zeros(1, 1, 3, 3), y, 1, "symmetric")
    with pytest.raises(KeyError), Counter({"x": x}) as counter:
        raise KeyError
    launch.run(CPU)
    assert counter.total == Traffic(0, 0, 0, 0)


def network(name: str, training: bool) -> dict[str, float]:
    execution = {"ours": executions.ours, **executions.executions(training)}[name]
    return executions.totals(executions.rows_of(execution, layer_shapes(1.0, 224), 256, training), 256)


@pytest.mark.parametrize(
    ("mode", "name", "scope", "published"),
    [
        ("inference", "ours", "blocks", 3.67),
        ("inference", "ours", "network", 4.83),
        ("inference", "compulsory", "blocks", 3.06),
        ("inference", "compulsory", "network", 4.48),
        ("inference", "epilogue", "network", 27.5),
        ("inference", "compiled", "network", 54.2),
        ("inference", "eager", "network", 79.5),
        ("training", "ours", "blocks", 46.9),
        ("training", "ours", "network", 63.85),
        ("training", "compiled", "network", 188),
        ("training", "eager_least", "network", 210),
        ("training", "eager", "network", 275),
    ],
    ids=lambda value: str(value),
)
def test_models_give_the_published_figures(mode, name, scope, published):
    assert network(name, mode == "training")[scope] == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_executions_are_ordered(training):
    figures = [network(name, training)["blocks"] for name in executions.executions(training)]
    assert figures == sorted(figures)


def test_at_inference_ours_is_as_compulsory_but_for_b_where_blocks_are_split():
    ours, compulsory = network("ours", False), network("compulsory", False)
    assert ours["blocks"] <= 3.8
    assert ours["network"] <= 5.1
    rows = executions.rows_of(executions.ours, layer_shapes(1.0, 224), 256, False)
    assert [row.op for row in rows] == (
        ["stem conv", *["block"] * 14, *["block", "block project"] * 3, "head", "linear"]  # no pool, no norm
    )
    b = 3 * 2 * 960 * 49 * 2  # written and read
    again = 2 * 160 * 49 * 2  # the residual of a split block, by its second kernel
    assert (ours["blocks"] - compulsory["blocks"]) * 1e6 == pytest.approx(b + again, rel=0.01)


def test_alone_the_depthwise_kernels_save_the_gradients_second_read():
    # One pass over dY in place of two, for partial sums written and read; weights in fp32 are the rest.
    layers = layer_shapes(1.0, 224)
    dy = sum(layer.c_mid * layer.height_out**2 * 2 for layer in layers if layer.kind == "block") / 1e6
    rows = executions.rows_of(executions.executions(True)["depthwise"], layers, 256, True)
    sums = sum(row.read for row in rows if row.op == "depthwise sum partials") / 256 / 1e6
    saved = network("eager", True)["blocks"] - network("depthwise", True)["blocks"]
    assert saved == pytest.approx(dy - 2 * sums, rel=0.001)
    assert 2 * sums < dy / 6


def test_in_training_ours_is_the_passes_of_each_block():
    layers = layer_shapes(1.0, 224)
    rows = executions.rows_of(executions.ours, layers, 256, True)
    ops = {layer.name: [row.op for row in rows if row.block == layer.name] for layer in layers}
    back = ["B0 sums", "BN3 grads", "B0 dP", "B1", "BN2 grads", "dW2"]
    forward = ["P2", "BN2", "P3", "BN3", "P4"]
    assert ops["features.1"] == [*forward, *back, "W2 scaled", "B2", "dWd"]
    forward = ["P1", "P1 merge", "BN1", "P1 direct", "BN1 flagged", *forward]
    rest = ["S sum", "dbeta1", "dW1", "M, v", "B3"]
    assert ops["features.3"] == [*forward, *back, "W1 scaled", "W2 scaled", "B2", "dWd", *rest]
    assert ops["features.9"] == [*forward, *back, "W2 scaled", "B2", "dWd", "S", *rest]
    passes = executions.totals_of_passes(rows, 256)
    assert sum(passes.values()) == pytest.approx(network("ours", True)["blocks"])
    assert max(passes, key=passes.get) == "B2"


def test_a_thin_pass_moves_its_tensors_and_little_else():
    # Y is written once, from P and where there is one from the residual.
    layers = [layer for layer in layer_shapes(1.0, 224) if layer.kind == "block"]
    rows = executions.rows_of(executions.ours, layer_shapes(1.0, 224), 256, True)
    y = sum((2 + layer.residual) * layer.c_out * layer.height_out**2 * 2 for layer in layers)
    assert executions.totals_of_passes(rows, 256)["P4"] == pytest.approx(y / 1e6, rel=0.001)


PASSES = {
    "residual-with-T": Block(16, 96, 16, 9, 1),
    "stride-2-dZ1-stored": Block(40, 48, 24, 7, 2),
    "no-expansion": Block(8, 8, 8, 6, 1),
}


@interpreted
@pytest.mark.parametrize("block", PASSES.values(), ids=PASSES)
def test_passes_move_the_bytes_of_their_formulas(block):
    seen = []

    def check_pass(call):
        assert_counted(call.launch, call.formula)
        seen.append(call.name)

    passes = passes_of(block, 2, torch.empty(0, dtype=torch.float16), visit=check_pass)
    assert seen == [call.name for calls in passes for call in calls]
    assert len(set(seen)) == len(seen)


def test_a_residual_of_a_block_that_does_not_expand_has_its_sum_and_its_gradient():
    first = layer_shapes(0.25, 32)[1]  # 8 channels in and out
    assert first.residual
    passes = executions.eager(first, 1, True)
    assert [row.op for row in passes.forward][-1] == "project add"
    assert [row.op for row in passes.backward][-1] == "depthwise add grads"


def test_json_has_its_keys_and_totals_are_sums_of_rows(tmp_path, capsys):
    path = tmp_path / "traffic.json"
    words = ["--mode", "training", "--alpha", "0.35", "--resize", "97", "--batch", "3", "--json", str(path)]
    assert traffic.main(words) == 0
    figures = json.loads(path.read_text())
    assert {"mode": "training", "alpha": 0.35, "resize": 97, "batch": 3, "dtype": "float16"}.items() <= figures.items()
    assert list(figures["beside"]) == ["compulsory", "epilogue", "compiled", "eager_least", "depthwise", "eager"]
    assert all(set(total) == {"blocks", "network"} for total in figures["beside"].values())
    assert figures["command"] == "python -m bench.traffic " + " ".join(words)
    assert {"torch", "triton"} <= set(figures["versions"])

    rows = figures["rows"]
    assert sum(row["mb_per_image"] for row in rows) == pytest.approx(figures["network_mb_per_image"])
    blocks = sum(row["read"] + row["written"] for row in rows if row["kind"] == "block")
    assert blocks / 3 / 1e6 == pytest.approx(figures["blocks_mb_per_image"])
    assert all((row["by"] == "triton") == (row["requested"] is not None) for row in rows)
    assert {row["block"] for row in rows if row["by"] == "triton"} == {f"features.{i}" for i in range(1, 18)}
    assert sum(figures["passes_mb_per_image"].values()) == pytest.approx(figures["blocks_mb_per_image"])
    printed = capsys.readouterr().out
    assert printed.count("BN2 grads") == 17 + 1
    assert f"{figures['network_mb_per_image']:.2f}" in printed


def test_variants_are_one_table_and_in_the_json(tmp_path, capsys):
    path = tmp_path / "traffic.json"
    assert traffic.main(["--variants", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    variants = figures["variants"]
    assert [(one["alpha"], one["resize"]) for one in variants] == [
        (alpha, resize) for alpha, sides in VARIANTS.items() for resize in sides
    ]
    assert len(variants) == 22
    assert all(one["ours"]["blocks"] < one["epilogue"]["blocks"] / 5 for one in variants)
    (whole,) = (one for one in variants if (one["alpha"], one["resize"]) == (1.0, 224))
    assert whole["ours"] == {
        "blocks": figures["blocks_mb_per_image"],
        "network": figures["network_mb_per_image"],
    }
    assert {name: whole[name] for name in figures["beside"]} == figures["beside"]
    table = capsys.readouterr().out.partition("all variants")[2].splitlines()
    assert len(table) == 2 + 22


@interpreted
def test_count_finds_a_formula_of_blocks_that_is_off(monkeypatch, capsys):
    words = ["--alpha", "0.1", "--resize", "8", "--count"]
    assert traffic.main(words) == 0
    assert "features.18 head " in capsys.readouterr().out
    right = block_inference_passes.inverted_residual_bytes

    def wrong(x, packed, y, stride, *others, **more):
        first, *rest = right(x, packed, y, stride, *others, **more)
        return (first + Traffic(0, 0, 2 if stride == 2 else 0, 0), *rest)

    monkeypatch.setattr(executions, "inverted_residual_bytes", wrong)
    assert traffic.main(words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "formula and count differ: features.2 block " in error
    assert "features.1 " not in error


@pytest.fixture
def two_blocks(monkeypatch):
    """The stem, two blocks, head and classifier in place of the network."""
    monkeypatch.setattr(
        traffic, "layer_shapes", lambda alpha, side: [*(s := layer_shapes(alpha, side))[:2], s[4], *s[-2:]]
    )


@interpreted
def test_count_finds_formulas_of_training_that_are_off(two_blocks, monkeypatch, capsys):
    words = ["--mode", "training", "--alpha", "0.1", "--resize", "8", "--count"]
    assert traffic.main(words) == 0
    right = depthwise_passes.depthwise_fwd_bytes

    def wrong(x, *others):
        row = x.shape[3] * x.shape[1] * x.element_size()
        return right(x, *others) + Traffic(0, 0, row if x.shape[2] == 4 else 0, 0)

    monkeypatch.setattr(depthwise_passes, "depthwise_fwd_bytes", wrong)
    monkeypatch.setattr(norm_passes, "sums_bytes", lambda *arguments: Traffic(0, 0, 0, 0))
    capsys.readouterr()
    assert traffic.main(words) == 1
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert "formula and count differ: features.1 depthwise conv 8x4x4 -> 8x4x4; features.1 8-8-8x4x4/1 B0 sums; " in (
        output.err
    )
    assert output.err.endswith("features.4 8-48-8x2x2/2 B0 sums\n")
    assert output.out.count("DIFFERS") == 3


@interpreted
def test_count_does_not_write_figures_of_wrong_formulas(two_blocks, monkeypatch, tmp_path):
    monkeypatch.setattr(depthwise_passes, "depthwise_fwd_bytes", lambda *arguments: Traffic(0, 0, 0, 0))
    path = tmp_path / "traffic.json"
    words = ["--mode", "training", "--alpha", "0.1", "--resize", "2", "--count"]
    assert traffic.main([*words, "--json", str(path)]) == 1
    assert not path.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--alpha", "0"], "alpha: expected a positive number"),
        (["--alpha", "nan"], "alpha: expected a positive number"),
        (["--resize", "0"], "resize: expected a positive integer, got 0"),
        (["--batch", "0"], "batch: expected a positive integer, got 0"),
        (["--mode", "dreaming"], "argument --mode: invalid choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        traffic.main(words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert message in error


def test_a_file_that_can_not_be_written_is_one_line(tmp_path, capsys):
    assert traffic.main(["--resize", "32", "--json", str(tmp_path / "missing" / "traffic.json")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("bench.traffic: ")
    assert error.count("\n") == 1
    assert "missing" in error
