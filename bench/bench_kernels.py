"""The kernels on a GPU beside torch's own operations: cuDNN in channels_last, and ``torch.compile`` of the same.

    pytest bench/bench_kernels.py [--all] [--quick] [--record]

Each test answers a question about one shape: results are compared first, then all sides are timed in turns with cold
caches. Beside each time stand the rate at which the operation's bytes, by our formulas, have moved, its share of what a
copy reaches on the same GPU, and a bound that is counted. Shapes are the distinct ones of alpha 1.0 at 224.

By default fp16 has every shape of the depthwise convolution's forward and of both its gradients, and of the block and
head at inference. Five blocks stand for the others where cases are many or take long to compile, for single gradients
and in training, and in bf16: the one without an expansion, that at stride 2 on the largest image, one whose backward
makes T, one whose backward stores dZ1 (in training the only one in bf16), and the broadest. ``--all`` takes every shape
in both types. The finalisers of a block in training, of a few microseconds each, are timed as one graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from bench import gpu_cases, gpu_training
from bench.gpu_jobs import DTYPES, Job, planned
from bench.gpu_tools import Case, checked, timed
from kernels.warmup import compile_ahead
from mnv2.model import LayerShape, layer_shapes

INFERENCE_BATCH, TRAINING_BATCH = 256, 128
LAYERS = layer_shapes(1.0, 224)
HEAD = LAYERS[-2]
CASES = {
    "depthwise": (gpu_cases.depthwise_case, gpu_cases.depthwise_plan),
    "inference block": (gpu_cases.inference_case, gpu_cases.inference_plan),
    "inference head": (gpu_cases.head_case, gpu_cases.inference_plan),
    "training block": (gpu_training.training_case, gpu_training.training_plan),
}


def distinct(*fields: str) -> list[LayerShape]:
    """The first block of each shape by these fields."""
    blocks = [layer for layer in LAYERS if layer.kind == "block"]
    return list({tuple(getattr(layer, name) for name in fields): layer for layer in reversed(blocks)}.values())[::-1]


BLOCKS = distinct("c_in", "c_mid", "c_out", "stride", "height")
CHOSEN = {"features.1", "features.2", "features.3", "features.12", "features.15"}


def jobs(operation: str, batch: int, *, kind: str = "", whole: bool = True) -> Iterator[pytest.param]:
    """A job for each shape and type; by default the chosen blocks in both types, and all in fp16 where ``whole``."""
    layers = distinct("c_mid", "height", "stride") if operation == "depthwise" else BLOCKS
    for layer in [HEAD] if operation == "inference head" else layers:
        for dtype in DTYPES:
            default = layer.name in CHOSEN or layer is HEAD or (whole and dtype == "fp16")
            default = default and (dtype == "fp16" or operation != "training block" or layer.name == "features.12")
            job = Job(operation, layer, dtype, batch, kind)
            yield pytest.param(job, id=str(job), marks=[] if default else [pytest.mark.exhaustive])


def depthwise_jobs() -> Iterator[pytest.param]:
    """Every kind of the depthwise convolution."""
    for kind in gpu_cases.KINDS:
        yield from jobs("depthwise", TRAINING_BATCH, kind=kind, whole=kind in ("forward", "both gradients"))


def pass_jobs() -> Iterator[pytest.param]:
    """Each pass of the blocks in training."""
    for parameter in jobs("training block", TRAINING_BATCH, whole=False):
        (job,) = parameter.values
        for name in gpu_training.pass_names(job.layer):
            yield pytest.param(job, name, id=f"{name} of {job}", marks=parameter.marks)


@pytest.fixture(scope="session")
def kernels_ready(request, gpu) -> None:
    """Our kernels of all tests that will run, compiled on all cores: one by one they would take minutes."""
    callspecs = (getattr(item, "callspec", None) for item in request.session.items)
    given = {callspec.params.get("job") for callspec in callspecs if callspec is not None}
    chosen = [job for job in given if isinstance(job, Job)]
    launches = [call.launch for job in chosen for call in planned(CASES[job.operation][1], job, gpu)]
    compile_ahead(launches, gpu, ignore_errors=True)  # one that doesn't compile fails where it is measured


@pytest.fixture
def measure(tools, kernels_ready, side_by_side, record):
    """Check a job's case, time it, and record its figures."""

    def run(job: Job) -> None:
        build = functools.partial(CASES[job.operation][0], job, tools)
        record("kernels", timed(checked(build, job.batch), tools, side_by_side))

    return run


@pytest.mark.benchmark(group="Is the depthwise convolution faster than torch's?")
@pytest.mark.parametrize("job", [*depthwise_jobs()])
def test_depthwise(job, measure):
    measure(job)


@pytest.mark.benchmark(group="Is a block at inference faster as one operation than as torch's convolutions?")
@pytest.mark.parametrize("job", [*jobs("inference block", INFERENCE_BATCH)])
def test_inference_block(job, measure):
    measure(job)


@pytest.mark.benchmark(group="Is the head at inference faster with its mean in the same kernel?")
@pytest.mark.parametrize("job", [*jobs("inference head", INFERENCE_BATCH)])
def test_inference_head(job, measure):
    measure(job)


@pytest.mark.benchmark(group="Is a block in training faster, forward and backward, than torch's operations?")
@pytest.mark.parametrize("job", [*jobs("training block", TRAINING_BATCH, whole=False)])
def test_training_block(job, measure):
    measure(job)


@pytest.fixture(scope="module", autouse=True)
def _forget_passes():
    yield
    passes_of_block.cache_clear()


@functools.lru_cache(maxsize=1)  # of one block at a time, as its tensors stay
def passes_of_block(job: Job, tools) -> dict[str, Case]:
    """Cases of the passes of a block whose results have been checked as a whole."""
    build = functools.partial(gpu_training.training_case, job, tools, alone=True)
    batch = checked(build, job.batch).batch
    return gpu_training.pass_cases(job, tools, batch)


@pytest.mark.benchmark(group="Which pass of a block in training is far from what a copy reaches?")
@pytest.mark.parametrize(("job", "name"), [*pass_jobs()])
def test_training_pass(job, name, tools, kernels_ready, side_by_side, record):
    record("kernels", timed(passes_of_block(job, tools)[name], tools, side_by_side))
