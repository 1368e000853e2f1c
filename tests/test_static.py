"""The guard against growth of counted figures: its rule, a planted pass, changed kernels, bad records."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT
from test_aot import FACTS

from bench import aot, cases, sass, static
from bench.static import Verdict, compare
from bench.training import Recorder, norm_of
from kernels import inverted_residual_passes, norms, partials
from kernels.common import Launch, Traffic
from mnv2.errors import RunError

SAVED = {"training with D: blocks": {"saved_bytes": 100}}


def lines(recorded: dict[str, float], now: dict[str, float]) -> Verdict:
    return compare({"case": recorded}, {"case": now}, "record it")


@pytest.mark.parametrize(
    ("old", "new", "fails", "noted"),
    [
        (100, 102, False, False),
        (350, 357, False, False),
        (100, 103, True, False),
        (10_000, 10_201, True, False),
        (100, 98, False, False),
        (100, 97, False, True),
        (0, 0, False, False),
        (0, 4, True, False),
        (4, 0, False, True),
    ],
    ids=str,
)
def test_more_than_two_percent_fails_and_as_much_less_is_noted(old, new, fails, noted):
    failures, notes = lines({"spill": old}, {"spill": new})
    assert (len(failures), len(notes)) == (fails, noted)


def test_a_line_has_name_record_now_and_growth():
    assert lines({"bytes": 2000}, {"bytes": 3000}).failures == ["case bytes: 2,000 on record, 3,000 now, +50.0%"]
    assert lines({"spill": 0}, {"spill": 4}).failures == ["case spill: 0 on record, 4 now, from nothing"]
    assert lines({"bytes": 3000}, {"bytes": 1500}).notes == [
        "case bytes: 3,000 on record, 1,500 now, -50.0%: less, record it: `record it`"
    ]


def test_the_last_digit_of_a_rounded_figure_is_no_growth():
    assert lines({"issue_us": 0.0010}, {"issue_us": 0.0011}) == ([], [])
    assert lines({"issue_us": 0.0010}, {"issue_us": 0.0012}).failures
    assert lines({"instructions_an_element": 0.20}, {"instructions_an_element": 0.19}) == ([], [])


def test_what_is_new_must_be_recorded_and_what_is_gone_is_mentioned():
    verdict = compare({"a": {"bytes": 1}, "old": {"bytes": 1}}, {"a": {"bytes": 1, "launches": 2}, "new": {}}, "how")
    assert verdict.failures == ["a launches: not on record: `how`", "new: not on record: `how`"]
    assert verdict.notes == ["1 on record are no more, record it: `how`: old"]


@pytest.fixture(scope="module")
def counted() -> static.Figures:
    return static.byte_figures()


def test_what_is_counted_is_on_record_and_passes_add_up(counted):
    assert compare(static.read(static.RECORD), counted, "").failures == []
    assert len([case for case in counted if case.endswith(": network")]) == 2 * 22
    total = counted["training, alpha 1.0 at 224: blocks"]
    for name in ("bytes", "requested_bytes"):
        assert sum(found[name] for case, found in counted.items() if case.startswith("training: all ")) == total[name]


@pytest.fixture
def record(counted, tmp_path, monkeypatch):
    """A fresh record of bytes; kernels are as on theirs, and no network is run for what it saves."""
    monkeypatch.setattr(static, "RECORD", tmp_path / "static.json")
    monkeypatch.setattr(static, "saved_figures", lambda: SAVED)
    monkeypatch.setattr(static, "compare_kernels", lambda: Verdict([], []))
    static.write(static.RECORD, {**counted, **SAVED})
    return static.RECORD


def test_a_record_reads_as_it_was_written(record, counted, capsys):
    assert static.read(record) == {**counted, **SAVED}
    text = record.read_text()
    assert text.count("\n") == len(counted) + len(SAVED) + 3  # a line a case
    record.unlink()
    assert static.main(["--record"]) == 0
    assert record.read_text() == text
    assert static.main([]) == 0
    assert "bytes: 0 fail, 0 notes" in capsys.readouterr().out


def test_one_more_pass_over_d_fails_by_name_and_in_the_totals(record, monkeypatch, capsys):
    forward = inverted_residual_passes.forward

    def slower(x, block, y, saved, run):
        forward(x, block, y, saved, run)
        w2 = inverted_residual_passes.rounded(block.w2, x)
        run(inverted_residual_passes.project_launch, saved.d, saved.stats2, w2, saved.p, moments=False)

    monkeypatch.setattr(inverted_residual_passes, "forward", slower)
    assert static.main([]) == 1
    out, err = capsys.readouterr()
    for line in (
        "training, alpha 1.0 at 224: network bytes: ",
        "training, alpha 1.0 at 224: blocks bytes: ",
        "training: all P3 bytes: ",
        "training: features.3 P3 bytes: ",
        "training: features.3 launches: ",
        "training, alpha 0.35 at 96: blocks bytes: ",
    ):
        assert f"  fails: {line}" in out
    assert "inference" not in out
    assert "P2" not in out
    assert err.startswith("bench.static: ")
    assert err.count("\n") == 1


def test_more_saved_bytes_fail(record, monkeypatch, capsys):
    monkeypatch.setattr(static, "saved_figures", lambda: {"training with D: blocks": {"saved_bytes": 103}})
    assert static.main([]) == 1
    assert "training with D: blocks saved_bytes: 100 on record, 103 now, +3.0%" in capsys.readouterr().out


def test_saved_bytes_are_those_of_the_report(monkeypatch):
    def report(module, words, quiet):
        assert module == "bench.memory"
        assert words[:4] == ["--alpha", "1.0", "--resize", "224"]
        mib = {"D": 7.25, "X": 1.5}
        found = {f"{scope}_saved_mib_{mode}": mib[mode] for scope in ("blocks", "network") for mode in mib}
        Path(words[-1]).write_text(json.dumps(found))
        return 0

    monkeypatch.setattr(static, "run_interpreted", report)
    found = static.saved_figures()
    assert found.keys() == {f"training with {mode}: {scope}" for mode in "DX" for scope in ("blocks", "network")}
    assert found["training with D: blocks"] == {"saved_bytes": 7.25 * 2**20}
    monkeypatch.setattr(static, "run_interpreted", lambda *arguments, quiet: 1)
    with pytest.raises(RunError, match="bench.memory has failed"):
        static.saved_figures()


KERNEL = SimpleNamespace(params=[])


def extra_launch(x):
    return Launch(KERNEL, (1,), {"x_ptr": x}, num_warps=1)


def extra_bytes(x):
    return Traffic(x.nbytes, 0, x.nbytes, 0)


def test_a_pass_that_is_not_known_has_its_launchers_name(record, monkeypatch, capsys):
    backward = inverted_residual_passes.backward

    def longer(dy, x, block, saved, need, run):
        run(extra_launch, saved.d)
        return backward(dy, x, block, saved, need, run)

    monkeypatch.setattr(inverted_residual_passes, "backward", longer)
    cases._training_calls.cache_clear()
    passes = [case for case in cases.training_of_network(90) if case.kernel == "extra_launch"]
    assert cases.work_of(passes[0]).launch.kernel is KERNEL
    cases._training_calls.cache_clear()
    assert len(passes) == 17
    assert static.main([]) == 1
    out = capsys.readouterr().out
    assert "fails: training: all extra_launch: not on record: `python -m bench.static --record`" in out
    assert "fails: training: features.17 extra_launch: not on record" in out
    assert "fails: training, alpha 1.0 at 224: blocks bytes: " in out


def test_a_launcher_of_several_passes_names_one_that_is_not_known():
    like = torch.empty(0, dtype=torch.float32, device="meta")
    saved = SimpleNamespace(stats1=None, stats2=None, stats3=None)
    recorder = Recorder(saved)
    recorder(partials.sum_partials_launch, like.new_empty(2, 8, 9), like.new_empty(8, 9))
    recorder(norms.frozen_launch, norm_of(8, like.new_empty), like.new_empty(4, 8))
    assert [call.name for call in recorder.calls] == ["sum_partials_launch", "frozen_launch"]


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """Three launches, of which two share a kernel, as the plan and on record; facts in place of the compiler's."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    three = [cases.Case(90, "depthwise_fwd", 32, side, 1) for side in (112, 56, 28)]
    launch = Launch(SimpleNamespace(params=[]), (10,), {}, num_warps=2)
    rows = [aot.Row(case, cases.Work(launch, 1000, 7, 1000), key) for case, key in zip(three, "abb", strict=True)]
    state = SimpleNamespace(rows=rows, facts={}, asked=[], sample=three)
    monkeypatch.setattr(aot, "RECORD", tmp_path / "aot.json")
    aot.write_record(aot.RECORD, "", rows, {"a": FACTS, "b": FACTS})
    monkeypatch.setattr(aot, "plan", lambda wanted: state.rows)
    monkeypatch.setattr(static, "sample", lambda caps: state.sample)

    def compile_all(jobs):
        state.asked += jobs
        yield from ((name, state.facts[name]) for name in jobs)

    monkeypatch.setattr(aot, "compile_all", compile_all)
    return state


def name(side: int) -> str:
    return f"depthwise_fwd 32x{side}x{side}/1 fp16 sm_90"


def test_code_on_record_is_not_compiled_again(kernels):
    assert static.compare_kernels() == ([], [])
    assert kernels.asked == []


def test_code_that_is_not_on_record_is_compared_by_its_case(kernels):
    kernels.rows = [*kernels.rows[:2], kernels.rows[2]._replace(key="c")]
    kernels.facts = {"c": {**FACTS, "registers": 140, "spill": 4, "loop": 110, "instructions": 160}}
    failures, notes = static.compare_kernels()
    assert kernels.asked == ["c"]
    assert [line.partition(" on record")[0] for line in failures] == [
        f"{name(28)} registers: 128",
        f"{name(28)} spill: 0",
        f"{name(28)} instructions_an_element: {32 * 10 * 2 * 100 * 7 / 1000:g}",
    ]
    assert notes == []
    kernels.facts = {"c": {**FACTS, "registers": 128 - 16}}
    assert static.compare_kernels().notes[0].startswith(f"{name(28)} registers: 128 on record, 112 now, -12.5%")


def test_the_same_code_in_more_programs_fails(kernels):
    work = kernels.rows[0].work
    longer = work._replace(launch=work.launch._replace(grid=(11,)))
    kernels.rows = [kernels.rows[0]._replace(work=longer), *kernels.rows[1:]]
    (failure,) = static.compare_kernels().failures
    assert failure.startswith(f"{name(112)} instructions_an_element: ")
    assert failure.endswith("+10.0%")


def test_what_does_not_compile_fails(kernels):
    kernels.rows = [kernels.rows[0]._replace(key="c"), *kernels.rows[1:]]
    kernels.facts = {"c": {"error": "CompilationError: at 3:4"}}
    assert static.compare_kernels() == ([f"{name(112)}: does not compile: CompilationError: at 3:4"], [])


def test_changed_code_outside_the_sample_is_only_counted(kernels):
    kernels.sample = []
    kernels.rows = [kernels.rows[0], *(row._replace(key="c") for row in kernels.rows[1:])]
    failures, notes = static.compare_kernels()
    assert (failures, kernels.asked) == ([], [])
    assert notes == ["2 other launches have changed and were not compiled: `python -m bench.aot --all`"]
    new = cases.Case(90, "depthwise_fwd", 64, 14, 1)
    kernels.rows.append(kernels.rows[0]._replace(case=new, key="d"))
    assert static.compare_kernels() == ([f"{new.name}: not on record: `python -m bench.aot --all`"], notes)


def test_a_new_launch_must_be_recorded_and_one_that_is_gone_is_mentioned(kernels):
    new = cases.Case(90, "depthwise_fwd", 64, 14, 1)
    kernels.rows = [kernels.rows[0]._replace(case=new), *kernels.rows[1:]]
    failures, notes = static.compare_kernels()
    assert failures == [f"{new.name}: not on record: `python -m bench.aot --all`"]
    assert notes == [f"1 on record are no more, record it: `python -m bench.aot --all`: {name(112)}"]


def test_names_of_rows_on_record_are_those_of_their_cases():
    _, figures = static.read_kernels(ROOT / "bench" / "results" / "aot.json")
    assert {case.name for case in cases.sample(sass.CAPABILITIES)} <= figures.keys()


@pytest.mark.parametrize("text", [None, "{", "[]", '{"rows": [{}]}', '{"rows": [{"case": "a", "bytes": "few"}]}'])
def test_a_bad_record_of_bytes_is_one_line(record, capsys, text):
    if text is None:
        record.unlink()
    else:
        record.write_text(text)
    assert static.main([]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"bench.static: {record}: expected a record")
    assert err.count("\n") == 1


@pytest.mark.parametrize("text", [None, "{", "[]", '{"rows": [{}]}', '{"rows": []}'])
def test_a_bad_record_of_kernels_is_one_line(kernels, monkeypatch, capsys, text):
    monkeypatch.setattr(static, "compare_bytes", lambda: Verdict([], []))
    aot.RECORD.unlink()
    if text is not None:
        aot.RECORD.write_text(text)
    assert static.main([]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"bench.static: {aot.RECORD}: expected a record")
    assert err.count("\n") == 1


def test_the_interpreter_is_refused_where_kernels_are_compiled(kernels, monkeypatch, capsys):
    monkeypatch.setattr(static, "compare_bytes", lambda: Verdict([], []))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert static.main([]) == 1
    assert capsys.readouterr().err.startswith("bench.static: TRITON_INTERPRET: unset it")
