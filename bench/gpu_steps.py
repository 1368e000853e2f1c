"""The steps of ``python -m bench.gpu``: their commands, shares of the time, and what to do where one fails."""

from __future__ import annotations

import importlib.util
import sys

import torch

from .steps import ROOT, Step, shown

FOLDER = ROOT / "build" / "gpu"
WHOLE = 30.0  # minutes from which everything runs whole
# Parts of the time. Compiling is most of it: of the kernels in the tests, by torch of its own in the benchmarks.
SHARES = {
    "environment": 1,
    "tests": 5,
    "dali": 1,
    "tune": 6,
    "bench": 12,
    "training": 2,
    "two-ranks": 2,
    "report": 1,
}
BENCHMARKS = ("bench/bench_network.py", "bench/bench_kernels.py")  # the others measure a CPU
IN_PARALLEL = ("-n", "logical", "--maxprocesses", "16", "--dist", "worksteal")  # compiling takes the CPU's cores


def steps(minutes: float) -> list[Step]:
    """All steps, to end within ``minutes``."""
    seconds = {name: 60 * minutes * share / sum(SHARES.values()) for name, share in SHARES.items()}
    whole = minutes >= WHOLE
    extent = "whole" if whole else "quick"
    folder = shown(FOLDER)
    gpus, no_dali = torch.cuda.device_count(), "" if installed("nvidia.dali") else "DALI isn't installed"
    tuning = f"{0.8 * seconds['tune'] / 60:.1f}"  # the rest is for the job begun last, which compiles
    return [
        Step(
            "environment",
            (module("environment", f"{folder}/environment.json"),),
            seconds["environment"],
            "see {log}; `nvidia-smi` must list the GPU, and torch's CUDA must be one that its driver supports",
        ),
        Step(
            "tests",
            (tests(whole),),
            seconds["tests"],
            "see {log}; run the test that it names last by itself, with `python -m pytest -x`",
            extent=extent,
        ),
        Step(
            "dali",
            (module("dali_gpu"),),
            seconds["dali"],
            "see {log}; `python -m bench.dali_gpu` again; DALI's package must be the one for torch's CUDA",
            why_not=no_dali,
        ),
        Step(
            "tune",
            (module("tune", "--minutes", tuning),),
            seconds["tune"],
            "see {log}; `python -m bench.tune` again, which says what it is about to measure",
        ),
        Step(
            "bench",
            (pytest(*BENCHMARKS, "--record", *([] if whole else ["--quick"])),),
            seconds["bench"],
            "see {log}; run the benchmark that it names by itself, with `python -m pytest -x -s bench/FILE -k NAME`",
            extent=extent,
        ),
        Step(
            "training",
            (module("training_curves", "--json", f"{folder}/training.json"),),
            seconds["training"],
            f"see {{log}}; the curves are in {folder}/training.json",
        ),
        Step(
            "two-ranks",
            (module("two_ranks", f"{folder}/two-ranks"),),
            seconds["two-ranks"],
            "see {log}; `NCCL_DEBUG=INFO python -m bench.two_ranks build/gpu/two-ranks` says more",
            why_not=f"it needs two GPUs, torch sees {gpus}" if gpus < 2 else no_dali,
        ),
        Step("report", (module("report"),), seconds["report"], "see {log}; `python -m bench.report` again"),
    ]


def installed(name: str) -> bool:
    """Whether there is a module of that name."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # nor what it would be in
        return False


def tests(whole: bool) -> tuple[str, ...]:
    """Those that run on the GPU; every case where there is time for them. All others see none, as without one."""
    words = ["-x", *(["--all"] if whole else []), *(IN_PARALLEL if installed("xdist") else ())]
    return pytest("tests", "-m", "gpu", *words)


def pytest(*words: str) -> tuple[str, ...]:
    """A command of pytest."""
    return sys.executable, "-m", "pytest", *words


def module(name: str, *words: str) -> tuple[str, ...]:
    """A command of a module of the benchmarks."""
    return sys.executable, "-m", f"bench.{name}", *words
