"""The benchmarks for a GPU without one: cases on tiny shapes in the interpreter, their rows, and what is refused."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forks import ROOT
from processes import finish, fork

from bench import bench_kernels, compare, gpu_cases, gpu_tools, gpu_training, network_cases, tables, timing
from bench.gpu_jobs import Job, planned
from bench.gpu_tools import Case, Counted, Tools, checked, timed
from bench.network_cases import NetworkJob
from bench.parity import ieee
from kernels import DepthwiseConv2d, common, roofline
from mnv2 import MobileNetV2
from mnv2.errors import RunError
from mnv2.model import LayerShape

pytestmark = pytest.mark.skipif(not common.INTERPRETED, reason="cases on CPU tensors run in the interpreter alone")
CPU = torch.device("cpu")
SECONDS = 2e-3
TOOLS = Tools(
    device=CPU,
    clock=lambda call: SECONDS,
    bandwidth=1e9,
    rounds=3,
    compiled=lambda function: function,
    graphed=lambda call: call,
    peak=lambda call: 3 * 2**20,
)


def block(c_in: int, c_mid: int, c_out: int, side: int, stride: int = 1) -> LayerShape:
    out = -(-side // stride)
    residual, expand = stride == 1 and c_in == c_out, int(c_mid != c_in)
    return LayerShape("a block", "block", c_in, c_mid, c_out, side, side, out, out, stride, residual, expand)


THIN, SMALL, FIRST = block(8, 24, 8, 4), block(8, 16, 8, 2), block(16, 16, 8, 5, 2)
HEAD = LayerShape("head", "head", 16, 16, 24, 3, 3, 3, 3)
JOBS = [
    *[Job("depthwise", THIN, "fp16", 2, kind) for kind in gpu_cases.KINDS],
    Job("depthwise", FIRST, "fp16", 2, "both gradients"),
    Job("inference block", SMALL, "fp16", 10),  # more images than are compared
    Job("inference block", FIRST, "fp16", 1),
    Job("inference head", HEAD, "fp16", 2),
    Job("training block", THIN, "fp16", 2),
]


def built(job: Job) -> Case:
    build, _ = bench_kernels.CASES[job.operation]
    return build(job, TOOLS, job.batch)


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_a_case_is_right_and_gives_a_row(job):
    row = timed(checked(lambda batch: built(job), job.batch), TOOLS, timing.alternate)
    plan = bench_kernels.CASES[job.operation][1]
    touched = sum(call.formula.touched for call in planned(plan, job, CPU))
    sides = ["ours", "eager", "compiled"]
    pairs = [("ours", "eager"), ("ours", "compiled")]
    if job.operation == "training block":
        sides += [f"{side}_graph" for side in sides]
        pairs += [("ours_graph", "eager_graph"), ("ours_graph", "compiled_graph")]
    assert row["case"] == f"{job}, batch {job.batch}"
    assert [name for name in row if name.endswith("_us")] == [*(f"{side}_us" for side in sides), "bound_us"]
    assert all(row[f"{side}_us"] == 1e6 * SECONDS for side in sides)
    assert row["counted_mb"] == pytest.approx(touched / 1e6, rel=1e-3)
    assert row["gb_per_s"] == pytest.approx(touched / SECONDS / 1e9, rel=1e-3)
    assert row["share_of_copy"] == pytest.approx(touched / SECONDS / TOOLS.bandwidth, rel=1e-3)
    assert row["bound_us"] >= 1e6 * touched / roofline.DEVICES[90].bandwidth * 0.999
    assert [ratio["name"].split(": ")[1] for ratio in row["ratios"]] == [f"time of {a} over {b}" for a, b in pairs]
    assert all(ratio["ratio"] == 1 and ratio["unit"] == "us" for ratio in row["ratios"])


def signs(row) -> dict[str, int]:
    """How ``bench.compare`` judges the figures of a row: 1 a cost, -1 a gain, 0 not ours."""
    return {name: figure.sign for name, figure in compare.figures_of({**row, "ratios": []}).items()}


def test_figures_of_a_kernel_are_judged_and_shown_as_what_they_are():
    row = timed(built(JOBS[0]), TOOLS, timing.alternate)
    costs, gains, others = {"ours_us", "counted_mb"}, {"gb_per_s", "share_of_copy"}, {"eager_us", "compiled_us"}
    others |= {"copy_gb_per_s", "bound_us"}
    assert signs(row) == {**dict.fromkeys(costs, 1), **dict.fromkeys(gains, -1), **dict.fromkeys(others, 0)}
    assert [*map(tables.heading, ("ours_us", "copy_gb_per_s"))] == ["ours, µs", "copy, GB/s"]


def test_a_block_on_record_is_bound_by_more_than_bytes():
    layer = bench_kernels.BLOCKS[2]
    job = Job("inference block", layer, "fp16", 256)
    found = gpu_cases.on_record(job, TOOLS, 256)
    assert found.binds != "bytes alone"
    assert found.seconds > found.touched / roofline.DEVICES[90].bandwidth


@pytest.mark.parametrize("layer", [THIN, FIRST], ids=["with", "without"])
def test_each_pass_has_a_case_and_the_finalisers_one(layer):
    job = Job("training block", layer, "fp16", 1)
    cases = gpu_training.pass_cases(job, TOOLS, 1)
    assert list(cases) == list(gpu_training.pass_names(layer))
    assert ("P1" in cases) == (layer is THIN)
    everything = sum(call.formula.touched for call in planned(gpu_training.training_plan, job, CPU))
    assert sum(case.counted.touched for case in cases.values()) == everything
    row = timed(cases["P4"], TOOLS, timing.alternate)
    assert row["case"] == f"pass P4 of {job}, batch 1"
    assert row["ratios"] == []
    cases[gpu_training.FINALISERS].calls["ours"]()


@pytest.mark.parametrize("job", [JOBS[3], JOBS[6], JOBS[-1]], ids=str)
def test_a_wrong_result_is_refused(job):
    case = built(job)
    results = {side: list(case.calls[side]()) for side in ("eager", "ours", "compiled")}
    case.check(results)

    def check(side, number, wrong):
        case.check({**results, side: [*results[side][:number], wrong, *results[side][number + 1 :]]})

    for side in results:
        for number, right in enumerate(results[side]):
            with pytest.raises(AssertionError, match=f", {side}: not all of its numbers are finite"):
                check(side, number, right / 0)
            if side != "eager":  # the yardstick, which itself says what is allowed
                with pytest.raises(AssertionError, match=f", {side}: .*error"):
                    check(side, number, right + right.abs().max())


def test_nothing_is_timed_or_recorded_where_a_result_is_wrong(monkeypatch, benchmark_parts):
    side_by_side, rows, timings = benchmark_parts
    right = gpu_cases.depthwise_conv2d
    monkeypatch.setattr(gpu_cases, "depthwise_conv2d", lambda *operands, **how: right(*operands, **how) * 1.1)
    measure = bench_kernels.measure.__wrapped__(TOOLS, None, side_by_side, lambda suite, row: rows.append(row))
    with pytest.raises(AssertionError, match="Y, ours: error"):
        measure(JOBS[0])
    assert (rows, timings) == ([], [])
    monkeypatch.undo()
    measure(JOBS[0])
    assert len(rows) == len(timings) == 1


@pytest.fixture
def benchmark_parts():
    timings: list[object] = []

    def side_by_side(*arguments):
        timings.append(arguments)
        return timing.alternate(*arguments)

    return side_by_side, [], timings


def test_a_batch_that_fills_memory_is_halved_and_gone():
    tensors: list[weakref.ref] = []

    def build(batch: int) -> Case:
        assert not any(tensor() is not None for tensor in tensors)
        if batch > 6:
            raise torch.OutOfMemoryError("no memory\nat all")
        x = torch.zeros(batch)
        tensors.append(weakref.ref(x))

        def check(results: object) -> None:
            if batch > 3:
                raise torch.OutOfMemoryError("no memory for the truth")

        return Case(f"batch {batch}", batch, {"ours": lambda: x}, check, Counted(1, 1.0, "HBM"))

    assert checked(build, 12).batch == 3
    tensors.clear()
    with pytest.raises(RunError, match="one picture takes more memory than there is: no memory$"):
        checked(lambda batch: build(7), 12)


@pytest.mark.parametrize("job", [JOBS[0], JOBS[3], JOBS[6], JOBS[7], JOBS[8]], ids=str)
def test_torch_compile_takes_the_peers_whole(job):
    tools = replace(TOOLS, compiled=lambda function: torch.compile(function, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    build, _ = bench_kernels.CASES[job.operation]
    case = build(job, tools, job.batch)
    case.check({name: case.calls[name]() for name in ("eager", "compiled")})


def test_without_a_gpu_all_is_skipped_with_the_reason():
    words = ["-q", "-p", "no:cacheprovider", *(ROOT / "bench" / f"bench_{name}.py" for name in ("kernels", "network"))]
    (ran,) = finish([fork(Path(pytest.__file__).with_name("__main__.py"), *words)])
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0, ran.stdout
    assert all("needs a CUDA GPU, torch sees none" in line for line in lines if line.startswith("SKIPPED"))
    assert "passed" not in lines[-1]
    assert "skipped" in lines[-1]


def test_an_old_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_tools.missing_gpu() == "needs compiled kernels, TRITON_INTERPRET=1 is set"
    monkeypatch.setattr(common, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(common, "_capability", lambda device: (7, 5))
    problem = gpu_tools.missing_gpu()
    assert problem.startswith(
        "needs another GPU: expected a GPU of compute capability 8.0 or newer, got 7.5 (Tesla T4)"
    )


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_network_is_right_and_gives_a_row(training, monkeypatch):
    monkeypatch.setattr(network_cases, "OURS", "auto")  # torch's operations: the interpreter would take minutes
    monkeypatch.setattr(network_cases, "LOSS_SCALE", 1.0)  # of so few pictures gradients are large
    job = NetworkJob(0.1, 32, 4, training)
    case = checked(lambda batch: network_cases.network_case(job, TOOLS, batch), job.batch)
    seconds = timing.alternate(case.calls, 2, TOOLS.clock)
    row = network_cases.row_of(case, seconds, TOOLS)
    sides = [f"{side}{graph}" for graph in ("", "_graph") for side in ("ours", "eager", "compiled")]
    assert row["case"] == f"{job}, fp16, batch 4"
    assert [name for name in row if name.endswith("_images_per_s")] == [
        *(f"{side}_images_per_s" for side in sides),
        "bound_images_per_s",
    ]
    assert all(row[f"{side}_images_per_s"] == 4 / SECONDS for side in sides)
    assert [row[f"{side}_peak_mib"] for side in sides[:3]] == [3, 3, 3]
    assert len(row["ratios"]) == 6
    judged = {f"{name}_images_per_s": -name.startswith("ours") for name in (*sides, "bound")}
    judged |= {f"{name}_peak_mib": int(name.startswith("ours")) for name in sides if f"{name}_peak_mib" in row}
    assert signs(row) == {**judged, "counted_mb_per_image": 1, "copy_gb_per_s": 0}
    headings = ["ours graph, images/s", "counted, MB/image"]
    assert [*map(tables.heading, ("ours_graph_images_per_s", "counted_mb_per_image"))] == headings
    assert row["bound_images_per_s"] == pytest.approx(3.35e12 / 1e6 / row["counted_mb_per_image"], rel=2e-3)
    results = {side: call() for side, call in case.calls.items()}
    for number in (0, -1):
        wrong = list(results["ours"])
        wrong[number] = wrong[number] * 9
        with pytest.raises(AssertionError, match="(logits|loss|gradient .*), ours: "):
            case.check({**results, "ours": wrong})


def test_the_peer_of_a_network_is_the_network_and_compiles_whole():
    torch.manual_seed(0)
    model = MobileNetV2(0.1, 4, dropout=0.0)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    network_cases.settle(model, x)
    plain = network_cases.Plain(model)
    assert not any(isinstance(module, DepthwiseConv2d) for module in plain.modules())
    assert [*map(torch.Tensor.data_ptr, plain.parameters())] != [*map(torch.Tensor.data_ptr, model.parameters())]
    torch._dynamo.reset()
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(plain(x), compiled(x))
        assert torch.allclose(plain(x), model(x), atol=1e-5 * model(x).abs().max().item())
        assert model(x).abs().max() > 1e-3


def test_fp32_is_ieee_by_cudnn_inside_and_as_it_was_after():
    products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, common.tf32_allowed(), cudnn.enabled, cudnn.benchmark
    products.allow_tf32 = True
    try:
        with ieee(benchmark=True):
            inside = products.allow_tf32, common.tf32_allowed(), cudnn.enabled, cudnn.benchmark
        assert inside == (False, False, True, True)
        assert products.allow_tf32
    finally:
        products.allow_tf32 = before[0]
    assert before == (products.allow_tf32, common.tf32_allowed(), cudnn.enabled, cudnn.benchmark)
