"""What benchmarks share: rounds, ratios, files of results, fixtures, networks of other libraries with our weights."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import peers, results, timing
from mnv2 import MobileNetV2
from mnv2.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def test_sides_are_timed_in_turns():
    order = []

    def clock(call):
        call()
        return float(len(order))

    calls = {"ours": lambda: order.append("ours"), "theirs": lambda: order.append("theirs")}
    assert timing.alternate(calls, 2, clock) == {"ours": [1.0, 3.0], "theirs": [2.0, 4.0]}
    assert order == ["ours", "theirs", "ours", "theirs"]


def test_a_ratio_is_the_median_of_the_rounds():
    """Not that of the medians, 2 / 4: a round in which the machine was slow for both sides counts as any other."""
    found = timing.ratio_of("name", [1.0, 2.0, 30.0], [4.0, 2.0, 40.0], "ms", scale=10)
    assert found == {
        "name": "name",
        "ours": 20.0,
        "theirs": 40.0,
        "ratio": 0.75,
        "ratio_min_max": [0.25, 1.0],
        "unit": "ms",
    }


def test_a_ratio_wants_as_many_rounds_of_both_sides():
    with pytest.raises(ValueError, match="shorter"):
        timing.ratio_of("name", [1.0, 2.0], [1.0], "ms")


def row(case: str, device: str, ratio: float) -> dict:
    return {"case": case, "device": device, "ratios": [{"name": f"of {case}", "ratio": ratio}]}


def test_results_replace_the_row_of_their_case_and_device(tmp_path):
    path = tmp_path / "suite.json"
    for case, device, ratio in (("a", "cpu", 1), ("b", "cpu", 2), ("a", "gpu", 3), ("a", "cpu", 4)):
        results.merge(path, row(case, device, ratio))
    kept = json.loads(path.read_text())
    assert kept["rows"] == [row("b", "cpu", 2), row("a", "gpu", 3), row("a", "cpu", 4)]
    assert [(ratio["name"], ratio["device"], ratio["ratio"]) for ratio in kept["ratios"]] == [
        ("of b", "cpu", 2),
        ("of a", "gpu", 3),
        ("of a", "cpu", 4),
    ]
    assert results.read(path) == kept["rows"]
    assert results.read(tmp_path / "none.json") == []


def test_results_that_cannot_be_written_leave_the_old(tmp_path):
    path = tmp_path / "suite.json"
    results.merge(path, row("a", "cpu", 1))
    before = path.read_bytes()
    with pytest.raises(TypeError):
        results.merge(path, {**row("a", "cpu", 2), "figure": object()})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["suite.json"]


def test_a_machine_without_git_or_proc_has_results_too(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.setattr("builtins.open", missing)
    assert results.commit() == "unknown"
    assert results.processor_name() == platform.machine()


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"case": "a"}]}', '{"rows": 1}', '{"rows": ["a"]}'])
def test_other_files_are_no_results_and_stay(tmp_path, text):
    path = tmp_path / "suite.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"suite\.json: expected results of benchmarks"):
        results.merge(path, row("a", "cpu", 1))
    assert path.read_text() == text


def test_fixtures_time_and_record(tmp_path):
    """Benchmarks as they are written: ours is what pytest-benchmark reports, and rows go where --record-to says.

    A benchmark that asks for the GPU has its name; the others, where there is one too, that of the processor.
    """
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\n")
    (tmp_path / "bench_tiny.py").write_text(
        "import pytest, torch\n"
        "torch.cuda.is_available, torch.cuda.get_device_name = lambda: True, lambda: 'NVIDIA H100'\n"
        "@pytest.fixture\n"
        "def gpu():\n"
        "    pass\n"
        "def test_on_a_gpu(gpu, record):\n"
        "    record('tiny', {'case': 'two'})\n"
        "def test_tiny(side_by_side, record, benchmark):\n"
        "    order = []\n"
        "    calls = {name: lambda name=name: order.append(name) for name in ('ours', 'theirs')}\n"
        "    seconds = side_by_side(calls, 3, clock=lambda call: call() or len(order))\n"
        "    assert order == ['theirs', 'ours'] * 3\n"
        "    assert seconds == {'ours': [2, 4, 6], 'theirs': [1, 3, 5]}\n"
        "    assert benchmark.stats.stats.rounds == 3\n"
        "    record('tiny', {'case': 'one', 'figure_ms': 2.5})\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "bench.conftest",
        str(tmp_path),
        "--record-to",
        str(tmp_path),
    ]
    # As a worker of xdist pytest-benchmark would take no rounds.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    on_gpu, recorded = results.read(tmp_path / "tiny.json")
    assert (on_gpu["case"], on_gpu["device"]) == ("two", "NVIDIA H100")
    assert (recorded["case"], recorded["figure_ms"], recorded["device"]) == ("one", 2.5, results.processor_name())
    assert recorded["versions"]["torch"] == torch.__version__
    assert {"command", "commit", "device", "cores"} <= set(recorded)


@pytest.mark.parametrize("peer", peers.PEERS)
def test_peers_have_our_weights(peer):
    peers.require(peer)
    x = torch.randn(4, 3, 32, 32)
    model = peers.with_statistics(MobileNetV2(0.35, num_classes=7, norm_eps=1e-3), x)
    network = peers.network(peer, model)
    assert not network.training
    with torch.no_grad():
        got, expected = network(x), model(x)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_a_peer_of_another_shape_is_refused():
    model = MobileNetV2(0.35, num_classes=7)
    with pytest.raises(
        ValueError, match=r"peer: expected classifier\.1\.weight of shape \(7, 1280\) .* got \(8, 1280\)"
    ):
        peers.with_weights(MobileNetV2(0.35, num_classes=8), model)
    with pytest.raises(ValueError, match="peer: expected 314 tensors as in model, got 2"):
        peers.with_weights(torch.nn.Linear(2, 2), model)
