"""The report of what training saves: its figures at 224, their order at another size, bad flags."""

from __future__ import annotations

import json

import pytest

from bench import memory
from bench.results import RESULTS
from kernels import common
from mnv2.model import layer_shapes

KEYS = [f"{scope}_saved_mib_{mode}" for scope in ("blocks", "network") for mode in ("eager", "D", "X")]
interpreted = pytest.mark.skipif(not common.INTERPRETED, reason="without a GPU kernels are there in the interpreter")


@interpreted
def test_the_network_at_224_saves_no_more_than_was_promised(tmp_path, capsys):
    path = tmp_path / "memory.json"
    words = ["--batch", "2", "--json", str(path)]
    assert memory.main(words) == 0
    figures = json.loads(path.read_text())
    assert {"alpha": 1.0, "resize": 224, "batch": 2, "dtype": "float16"}.items() <= figures.items()
    assert [key for key in figures if "saved" in key] == KEYS
    assert figures["command"] == "python -m bench.memory " + " ".join(words)
    assert {"torch", "triton"} <= set(figures["versions"])
    assert figures["blocks_saved_mib_D"] <= 7.4
    assert figures["blocks_saved_mib_X"] <= 1.9
    assert figures["network_saved_mib_eager"] == pytest.approx(37.3, rel=0.01)
    recorded = json.loads((RESULTS / "memory.json").read_text())
    assert [figures[key] for key in KEYS] == pytest.approx([recorded[key] for key in KEYS], rel=1e-3)
    printed = capsys.readouterr().out
    assert all(f"{figures[key]:.2f}" in printed for key in KEYS)


@interpreted
def test_a_small_network_saves_x_and_with_d_what_it_says():
    found = memory.saved_mib(memory.MemoryConfig(0.35, 33, 1))
    assert list(found) == KEYS
    for scope in ("blocks", "network"):
        eager, d, x = (found[f"{scope}_saved_mib_{mode}"] for mode in ("eager", "D", "X"))
        assert 0 < x < d < eager
    layers = [layer for layer in layer_shapes(0.35, 33) if layer.kind == "block"]
    inputs = sum(layer.c_in * layer.height**2 for layer in layers) * 2
    outputs = sum((layer.c_mid + layer.c_out) * layer.height_out**2 for layer in layers) * 2
    assert found["blocks_saved_mib_X"] * memory.MIB == inputs
    assert found["blocks_saved_mib_D"] * memory.MIB == inputs + outputs


def test_variants_are_all_in_the_table(monkeypatch, capsys):
    monkeypatch.setattr(memory, "saved_mib", lambda config: dict.fromkeys(KEYS, config.alpha))
    monkeypatch.setattr(common, "INTERPRETED", True)
    assert memory.main(["--variants"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1 + 22


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--alpha", "nan"], "alpha: expected a positive number"),
        (["--resize", "0"], "resize: expected a positive integer, got 0"),
        (["--batch", "0"], "batch: expected a positive integer, got 0"),
        (["--mode", "training"], "unrecognized arguments: --mode training"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        memory.main(words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert message in error
