"""How kernels run in the tests, and fixtures that several files share.

Tests that ask for the ``device`` run on a GPU where there is one, else in Triton's interpreter, on CPU tensors. Those
that ask for ``memory`` too run with ``--sanitize`` in ttsem, which executes the code that the compiler makes of a
kernel and stops at a race between programs, an access outside a tensor, a read of what nobody wrote.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

TEST_DATA = "MNV2_TEST_DATA"


def pytest_addoption(parser):
    with suppress(ValueError):  # the benchmarks have it too, where both folders are named
        parser.addoption("--all", action="store_true", help="every case, where the default is a reasoned sample")
    parser.addoption("--sanitize", action="store_true", help="run the tests of kernels' numbers alone, in ttsem")


def pytest_configure(config):
    # Triton reads it where a kernel is defined, so nothing here may import the kernels before.
    if not (config.getoption("--sanitize") or torch.cuda.is_available()):
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ["https_proxy"] = "http://127.0.0.1:9"  # nobody there: no test, and no script that it runs, downloads
    # Tests run side by side and their networks are small: threads that wait for each other take many times longer.
    torch.set_num_threads(1)


def dtypes(config) -> list[torch.dtype]:
    """What the place where kernels run computes like the device; ``one_type`` is the last."""
    if config.getoption("--sanitize"):
        return [torch.bfloat16]
    if torch.cuda.is_available():
        return [torch.float32, torch.float16, torch.bfloat16]
    return [torch.float32, torch.float16]  # the interpreter multiplies bf16 matrices wrongly


def pytest_generate_tests(metafunc):
    """``dtype`` of a test of kernels."""
    if {"dtype", "device"} <= set(metafunc.fixturenames):
        metafunc.parametrize("dtype", dtypes(metafunc.config), ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture
def device(request, monkeypatch):
    """Where the kernels run, torch beside them in IEEE fp32; in ttsem, a CPU that answers to "cuda"."""
    if not request.config.getoption("--sanitize"):
        from bench.parity import ieee

        with ieee():
            yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return
    from ttsem import sanitize

    monkeypatch.setattr("kernels.expand_depthwise_grads.ASSEMBLY", False)  # it interprets no assembly
    with sanitize.session(cc=80) as session:
        yield torch.device("cuda")
        assert session.races_unchecked == 0, (
            "a launch is too large to be checked for races: make the test's shape smaller"
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Tests that aren't for a GPU see none, and what they expect is a CPU's."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("gpu") is None:
            patch.setattr(torch.cuda, "is_available", lambda: False)
        return (yield)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_measured():
    """Whatever was measured on this machine, rules choose tiles, and "auto" takes the kernels where it can."""
    from kernels import measured

    with measured.planted({}):
        yield


@pytest.fixture
def memory(request, monkeypatch):
    """Where a test of kernels places its inputs (``memory.place``) and where the kernels' own buffers lie."""
    from numerics import GuardedMemory

    memory = GuardedMemory(monkeypatch.setattr, **({"band": 0} if request.config.getoption("--sanitize") else {}))
    yield memory
    memory.check()


@pytest.fixture
def clamps_drop_nan(monkeypatch):
    """Minimum and maximum make NaN the other number, as on the device: numpy's, the interpreter's, would keep it.

    Not for every test, as a read outside a tensor, which shows as NaN, would pass a clamp unseen.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    def create_clampf(self, x, low, high, propagate_nan):
        keeps = propagate_nan == tl.PropagateNan.ALL
        return self.ternary_op(x, low, high, np.clip if keeps else lambda x, low, high: np.fmin(np.fmax(x, low), high))

    # What propagates NaN by name, create_minimumf and create_maximumf, does so on the device too.
    monkeypatch.setattr(InterpreterBuilder, "create_minnumf", lambda self, x, y: self.binary_op(x, y, np.fmin))
    monkeypatch.setattr(InterpreterBuilder, "create_maxnumf", lambda self, x, y: self.binary_op(x, y, np.fmax))
    monkeypatch.setattr(InterpreterBuilder, "create_clampf", create_clampf)


@pytest.hookimpl(tryfirst=True)  # before -m picks by marks
def pytest_collection_modifyitems(config, items):
    def marked(item, name):  # a keyword is the name of a folder above it too
        return item.get_closest_marker(name) is not None

    def wanted(item):
        numbers, exhaustive = "memory" in item.fixturenames, marked(item, "exhaustive")
        if marked(item, "one_type") and {"dtype", "device"} <= set(item.fixturenames):
            exhaustive = exhaustive or item.callspec.params["dtype"] != dtypes(config)[-1]
        return (numbers or not config.getoption("--sanitize")) and (not exhaustive or config.getoption("--all"))

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = filter(wanted, items)
    gpu = torch.cuda.is_available()
    for item in items:
        if gpu and "device" in item.fixturenames:
            item.add_marker("gpu")
        elif not gpu and marked(item, "gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA GPU here"))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real photographs, weights and expected logits."""
    folder = os.environ.get(TEST_DATA)
    if folder is None:
        pytest.skip(f"{TEST_DATA} names no folder of real photographs and weights")
    return Path(folder)


@pytest.fixture(scope="session")
def model():
    """A network of the three classes of ``photos``, in evaluation; not to be changed."""
    from samples import CLASSES, settled

    from mnv2 import MobileNetV2

    torch.manual_seed(0)
    return settled(MobileNetV2(0.35, num_classes=len(CLASSES)))


@pytest.fixture(scope="session")
def weights(model, tmp_path_factory) -> Path:
    """A checkpoint of ``model``."""
    from samples import CLASSES, save_weights

    path = tmp_path_factory.mktemp("weights") / "last.pt"
    save_weights(path, model, list(CLASSES))
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A data folder of 23 training and 11 validation pictures in three classes."""
    from samples import write_photos

    root = tmp_path_factory.mktemp("photos with spaces")
    write_photos(root / "train", 23)
    write_photos(root / "val", 11, start=100)
    return root
