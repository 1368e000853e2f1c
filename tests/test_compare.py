"""The comparison of two results: what is a cost, what is noise, which rows belong together, command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import compare, results
from bench.timing import ratio_of

AT = {"device": "H200", "cores": 16, "versions": {"torch": "2.13.0", "triton": "3.7.1"}}


def row(case: str = "block", **figures: Any) -> dict[str, Any]:
    return {"case": case, **figures, **AT}


@pytest.fixture
def files(tmp_path):
    """Two files of results, written anew with the rows that they are given."""

    def write(*sides: list[dict[str, Any]]) -> list[str]:
        paths = [tmp_path / f"{name}.json" for name in ("old", "new")]
        for path, rows in zip(paths, sides, strict=True):
            path.unlink(missing_ok=True)
            for one in rows:
                results.merge(path, one)
        return [str(path) for path in paths]

    return write


def lines(capsys) -> list[list[str]]:
    """Cells of the table's rows."""
    out = capsys.readouterr().out.splitlines()
    start = next((i for i, line in enumerate(out) if line.startswith("case ")), len(out) - 2)
    return [line.split() for line in out[start + 1 :] if " figures of " not in line and "only in" not in line]


@pytest.mark.parametrize(
    "name",
    [
        *("ours_us", "step_ms", "epoch_seconds", "ms_an_image", "cpu_milliseconds_per_picture", "speed_ratio"),
        *("peak_mib", "blocks_mb_per_image", "saved_bytes", "bytes"),
        *("spill", "shared", "instructions_an_element", "launches"),
    ],
)
def test_costs_are_worse_when_they_grow(files, capsys, name):
    assert compare.main(files([row(**{name: 100})], [row(**{name: 110})])) == 1
    assert lines(capsys) == [["block", name, "100", "110", "+10.0%", "worse"]]
    assert compare.main(files([row(**{name: 100})], [row(**{name: 90})])) == 0
    assert lines(capsys) == [["block", name, "100", "90", "-10.0%", "better"]]


@pytest.mark.parametrize(
    "name",
    ["pictures_per_second", "ours_images_per_s", "gb_per_s", "gb_s", "read_gb_s", "share", "share_of_copy", "tflops"],
)
def test_gains_are_worse_when_they_fall(files, capsys, name):
    assert compare.main(files([row(**{name: 100})], [row(**{name: 90})])) == 1
    assert lines(capsys) == [["block", name, "100", "90", "-10.0%", "worse"]]
    assert compare.main(files([row(**{name: 100})], [row(**{name: 110})])) == 0
    assert lines(capsys)[0][-1] == "better"


def test_what_has_no_known_unit_is_left_out(files, capsys):
    assert compare.main(files([row(batch=8, compiled=True)], [row(batch=16, compiled=False)])) == 0
    assert capsys.readouterr().out == "0 figures of 1 cases, 0 of them equal\n"


@pytest.mark.parametrize(("tolerance", "verdict"), [("0.05", "worse"), ("0.1", "same"), ("0.2", "same")])
def test_a_change_up_to_the_tolerance_is_none(files, capsys, tolerance, verdict):
    paths = files([row(step_ms=64, wait_ms=1)], [row(step_ms=70, wait_ms=1)])
    assert compare.main([*paths, "--tolerance", tolerance]) == (verdict == "worse")
    assert lines(capsys) == [["block", "step_ms", "64", "70", "+9.4%", verdict]]


def test_from_nothing_is_worse(files, capsys):
    assert compare.main(files([row(spill=0)], [row(spill=4)])) == 1
    assert lines(capsys) == [["block", "spill", "0", "4", "+inf%", "worse"]]


def test_what_ours_is_compared_with_is_not_judged(files, capsys):
    old = row(ours_ms_an_image=1.0, eager_ms_an_image=2.0, peak_mib=7)
    new = row(ours_ms_an_image=1.0, eager_ms_an_image=4.0, peak_mib=7)
    assert compare.main(files([old], [new])) == 0
    assert lines(capsys) == [["block", "eager_ms_an_image", "2", "4", "+100.0%", "theirs"]]


def rated(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    return row(ratios=[ratio_of("cudnn", ours, theirs, "us")])


def test_a_change_where_spreads_overlap_is_noise(files, capsys):
    assert compare.main(files([rated([8, 10, 12], [10] * 3)], [rated([9, 11, 13], [10] * 3)])) == 0
    assert [line[1:] for line in lines(capsys)] == [
        ["cudnn:", "ratio", "1", "1.1", "+10.0%", "noise"],
        ["cudnn:", "ours,", "us", "10", "11", "+10.0%", "noise"],
    ]
    assert compare.main(files([rated([8, 10, 12], [10] * 3)], [rated([11, 13, 15], [10] * 3)])) == 1
    assert [line[-1] for line in lines(capsys)] == ["worse", "worse"]
    assert compare.main(files([rated([9, 10, 11], [10] * 3)], [rated([7, 8, 9], [10] * 3)])) == 0
    assert [line[-1] for line in lines(capsys)] == ["better", "better"]


def test_rows_are_paired_by_device_and_else_by_case(files, capsys):
    h100 = {**row(step_ms=200), "device": "H100"}
    assert compare.main(files([row(step_ms=100), h100], [row(step_ms=100), h100])) == 0
    assert capsys.readouterr().out == "2 figures of 2 cases, 2 of them equal\n"
    newer = {**h100, "cores": 8, "versions": {"torch": "2.14.0", "triton": "3.7.1"}}
    assert compare.main(files([row(step_ms=100)], [newer])) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "not alike: device H200 -> H100; cores 16 -> 8; torch 2.13.0 -> 2.14.0"


def test_cases_of_one_side_are_listed(files, capsys):
    old, new = files([row("a", step_ms=1), row("gone", step_ms=1)], [row("a", step_ms=1), row("come", step_ms=1)])
    assert compare.main([old, new]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"only in {old}: gone, H200", f"only in {new}: come, H200"]


def test_folders_are_compared_file_by_file(tmp_path, capsys):
    folders = [tmp_path / name for name in ("before", "after")]
    for folder, step in zip(folders, (100, 200), strict=True):
        folder.mkdir()
        results.merge(folder / "blocks.json", row(step_ms=step))
        results.merge(folder / f"{folder.name}.json", row(step_ms=1))
        (folder / "memory.json").write_text('{"saved_mib": 1.0}')  # of another form
    assert compare.main([str(folder) for folder in folders]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["blocks:", "block", "step_ms", "100", "200", "+100.0%", "worse"]
    assert out[3:] == [f"only in {folder}: {folder.name}, block, H200" for folder in folders]


def test_records_of_counted_figures_are_results_too(tmp_path, capsys):
    old = json.loads((results.RESULTS / "static.json").read_text())
    new = json.loads(json.dumps(old))
    new["rows"][0]["bytes"] *= 2
    (tmp_path / "static.json").write_text(json.dumps(new))
    assert compare.main([str(results.RESULTS / "static.json"), str(tmp_path / "static.json")]) == 1
    assert lines(capsys)[0][-2:] == ["+100.0%", "worse"]

    old = json.loads((results.RESULTS / "aot.json").read_text())
    few = {"versions": old["versions"], "rows": old["rows"][:3]}
    paths = [tmp_path / f"{name}.json" for name in ("old", "new")]
    paths[0].write_text(json.dumps(few))
    few["rows"][1]["registers"] *= 2
    paths[1].write_text(json.dumps(few))
    assert compare.main(list(map(str, paths))) == 1
    (line,) = lines(capsys)
    assert line[-5] == "registers"
    assert line[-6] == "sm_80"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"rows": 1}', '{"rows": [{}]}', '{"rows": [{"case": "a", "ratios": [1]}]}']
)
def test_another_file_is_one_line(tmp_path, capsys, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    assert compare.main([str(path), str(path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"bench.compare: {path}: expected results of benchmarks, got ")
    assert err.count("\n") == 1


def test_what_can_not_be_compared_is_one_line(files, tmp_path, capsys):
    old, new = files([row("a", step_ms=1)], [row("b", step_ms=1)])
    folder = tmp_path / "empty"
    folder.mkdir()
    for words, message in (
        ((old, new), f"new: expected cases that {old} has, got none in {new}"),
        ((old, str(Path(new).with_name("missing"))), "missing: expected a file or a folder of results, there is none"),
        ((old, str(folder)), f"new: expected two files or two folders, got {old} and {folder}"),
        ((str(folder), str(folder)), f"{folder}: expected a folder with results, found no .json in it"),
    ):
        assert compare.main(words) == 1
        err = capsys.readouterr().err
        assert err.startswith("bench.compare: ")
        assert err.endswith(f"{message}\n")
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "the following arguments are required: NEW"),
        (["a", "b", "--tolerance", "-1"], "tolerance: expected a number from 0 up, got -1.0"),
        (["a", "b", "--tolerance", "nan"], "tolerance: expected a number from 0 up, got nan"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main(words)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
