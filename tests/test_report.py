"""The report: tables and plots of made-up results, what may be wrong with them, and that the README is up to date."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from bench import counted, report, results, tables
from bench.gpu_jobs import Job
from mnv2.errors import InputError, RunError
from mnv2.model import VARIANTS, layer_shapes

NAMES = ("loader", "evaluation", "host", "gpu", "traffic", "memory", "bounds")
EPYC, XEON, H200 = "AMD EPYC", "Intel Xeon", "NVIDIA H200"


def row(case: str, *ratios: dict, device: str = EPYC, commit: str = "4ecc9fac3ab33b2d", **figures) -> dict:
    about = {"command": "pytest bench --record", "commit": commit, "versions": {}, "device": device, "cores": 2}
    return {"case": case, **figures, "ratios": list(ratios), **about}


def ratio(name: str, ours: float, theirs: float, unit: str = "ms an image") -> dict:
    middle = ours / theirs
    spread = [0.9 * middle, 1.2 * middle]
    return {"name": name, "ours": ours, "theirs": theirs, "ratio": middle, "ratio_min_max": spread, "unit": unit}


LOADER = [row("training", ratio("training: PIL", 2, 4)), row("evaluation", pil_ms=1)]
del LOADER[1]["ratios"]  # as rows once were
EVALUATION = [
    row("batch 1", ratio("batch 1: eager", 7.375, 18.53), device=XEON),
    row("batch 16", ratio("batch 16: compiled", 639.4, 6470), device=XEON),
    row(
        "batch 16", ratio("batch 16: compiled", 6.39, 6.47), ratio("batch 16: eager", 6.39, 16), commit="12345678-dirty"
    ),
    row("batch 16", ratio("batch 16: eager", 0.05, 0.2), device=H200),
]
BLOCK = f"{Job('inference block', layer_shapes()[2], 'fp16', 256)}, batch 256"
KERNELS = [
    row(BLOCK, ratio(f"{BLOCK}: eager", 60, 240, "us"), device=H200, ours_us=60.0, gb_per_s=2400.0, counted_mb=144.0),
    row(f"pass P1 of {BLOCK}", device=H200, ours_us=10.0, gb_per_s=100.0, counted_mb=1.0),
    row(BLOCK.replace("fp16", "bf16"), device=H200, ours_us=61.0, gb_per_s=2400.0, counted_mb=144.0),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Results made up of two CPUs and no GPU, and the records of what is counted."""
    root = tmp_path / "results"
    root.mkdir()
    for name in ("aot.json", "memory.json"):
        shutil.copy(results.RESULTS / name, root)
    for suite, rows in {"loader": LOADER, "evaluation": EVALUATION[:3]}.items():
        put(root / f"{suite}.json", rows)
    return root


def put(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps({"rows": rows, "ratios": []}))


@pytest.fixture
def readme(tmp_path) -> Path:
    path = tmp_path / "README.md"
    path.write_text("\n".join(["# Title", *(f"{name}:\n\n{markers(name)}" for name in NAMES), "The end.", ""]))
    return path


def markers(name: str, inside: str = "old\n") -> str:
    return f"<!-- bench.report: {name} -->\n{inside}<!-- /bench.report -->"


def run(folder: Path, readme: Path, *words: str) -> int:
    return report.main(["--results", str(folder), "--readme", str(readme), *words])


def between(text: str, name: str) -> str:
    return re.search(f"<!-- bench.report: {name} -->\n(.*?)\n<!-- /bench.report -->", text, re.DOTALL)[1]


def assert_one_line(capsys, *parts: str) -> None:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for part in ("bench.report: ", *parts):
        assert part in error


def test_measured_tables(folder, readme):
    assert run(folder, readme, "--tables") == 0
    text = readme.read_text()
    assert text.startswith("# Title\nloader:\n\n<!--")
    assert text.endswith("-->\nThe end.\n")
    assert "old" not in text
    assert between(text, "loader").splitlines() == [
        "| ms an image | ours | theirs | ours / theirs (min to max) |",
        "|---|---|---|---|",
        "| training: PIL | 2.00 | 4.00 | 0.50 (0.45 to 0.60) |",
        "",
        "AMD EPYC, 2 cores; `pytest bench --record` at commit `4ecc9fa`.",
    ]
    assert between(text, "host") == "No ratios have been recorded: `pytest bench/bench_host.py --record` does it."
    assert between(text, "gpu") == tables.NO_GPU


def test_a_case_of_several_cpus_is_that_of_the_last_and_each_gpu_has_a_table(folder, readme):
    put(folder / "evaluation.json", EVALUATION)
    put(folder / "kernels.json", KERNELS)
    assert run(folder, readme, "--tables") == 0
    text = readme.read_text()
    found = between(text, "evaluation")
    assert [line.partition(";")[0] for line in found.splitlines() if "pytest" in line] == [
        f"{XEON}, 2 cores",
        f"{EPYC}, 2 cores",
        H200,
    ]
    assert "| batch 1: eager | 7.38 | 18.5 | 0.40 (0.36 to 0.48) |" in found
    assert "| compiled | 6.39 | 6.47 | 0.99 (0.89 to 1.19) |\n| eager" in found  # of batch 16 both
    assert "639" not in found
    assert "at commit `1234567` with changes (dirty)." in found
    found = between(text, "gpu")
    assert found.startswith(f"<details><summary>3 cases of kernels on {H200}</summary>\n\n|")
    assert "|  | ours, µs | GB/s | counted, MB |" in found
    assert f"| {BLOCK} | 60.0 | 2,400 | 144 |" in found
    assert f"| {BLOCK}: eager | 60.0 | 240 | 0.25 (0.23 to 0.30) |" in found
    assert tables.NO_GPU not in text


def test_counted_tables(folder, readme):
    assert run(folder, readme, "--tables") == 0
    text = readme.read_text()
    assert "| inference, 17 blocks | 3.67 | 3.07 | 26.1 | 50.9 | 74.4 |" in between(text, "traffic")
    assert "| network | 37.3 | 9.40 | 3.92 |" in between(text, "memory")
    bound = json.loads((folder / "aot.json").read_text())["blocks_bound_us"]["90"]
    cells = next(line for line in between(text, "bounds").splitlines() if line.startswith("| inference")).split(" | ")
    assert cells[1] == tables.number(bound["ours"])
    assert cells[4].startswith(tables.number(bound["separate"]))


@pytest.mark.parametrize("mode", counted.MODES)
def test_the_bounds_of_blocks_add_up_to_the_networks(mode):
    path = results.RESULTS / "aot.json"
    points = counted.points(path, mode)
    assert len(points) == 17
    assert 1e6 * sum(point.seconds for point in points) == pytest.approx(counted.bounds(path)[mode].ours, rel=1e-3)
    macs = sum(layer.macs for layer in layer_shapes() if layer.kind == "block")
    assert sum(point.macs for point in points) == macs * (3 if mode == "training" else 1)


def test_every_published_variant_has_its_accuracy():
    variants = {(variant.alpha, variant.resize): variant for variant in counted.variants()}
    assert set(variants) == {(alpha, resize) for alpha, resolutions in VARIANTS.items() for resize in resolutions}
    assert variants[1.0, 224].macs == 300774272
    assert variants[0.75, 192].top1 == 68.7  # Google's


def test_numbers_have_three_digits():
    numbers = (0.0, 0.05, 1.0, 9.996, 99.96, 100.4, 1437.0, 27592.3)
    assert [*map(tables.number, numbers)] == ["0.00", "0.0500", "1.00", "10.0", "100", "100", "1,437", "27,592"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (markers("gpu"), "", "expected <!-- bench.report: gpu -->, got none"),
        (markers("gpu"), markers("gpus"), "expected a table among gpu, traffic, memory, bounds, each once, got 'gpus'"),
        (markers("gpu"), markers("gpu") * 2, "each once, got 'gpu'"),
        ("<!-- /bench.report -->\ngpu", "gpu", "expected <!-- /bench.report --> behind that of host"),
        ("# Title", "<!-- /bench.report -->", "line 1: expected the beginning of a table, got <!-- /bench.report -->"),
        ("<!-- /bench.report -->\nThe end.", "", "behind that of bounds, got the file's end"),
    ],
    ids=["missing", "unknown", "twice", "no end", "no beginning", "no last end"],
)
def test_wrong_markers_are_one_line_and_change_nothing(folder, readme, before, after, message, capsys):
    wrong = readme.read_text().replace(before, after)
    readme.write_text(wrong)
    assert run(folder, readme, "--tables") == 1
    assert_one_line(capsys, str(readme), message)
    assert readme.read_text() == wrong


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("host.json", "{"),
        ("host.json", '{"rows": [{"case": "a"}]}'),
        ("host.json", json.dumps({"rows": [{**row("a"), "ratios": [{"name": "b"}]}]})),
        ("host.json", json.dumps({"rows": [row("a", {**ratio("b", 1, 2), "ratio_min_max": 1})]})),
        ("kernels.json", json.dumps({"rows": [{"case": "a", "device": "b"}]})),
        ("memory.json", "[]"),
        ("memory.json", "no"),
        ("aot.json", "{}"),
        ("aot.json", "["),
    ],
)
def test_a_bad_file_of_results_is_named_and_nothing_written(folder, readme, name, content, capsys):
    (folder / name).write_text(content)
    before = readme.read_text()
    assert run(folder, readme, "--tables") == 1
    assert_one_line(capsys, str(folder / name))
    assert readme.read_text() == before


def test_a_missing_folder_or_file_is_one_line(folder, readme, tmp_path, capsys):
    assert run(tmp_path / "none", readme) == 1
    assert_one_line(capsys, "--results: expected a folder")
    (folder / "aot.json").unlink()
    assert run(folder, readme) == 1
    assert_one_line(capsys, "aot.json")


def test_check_writes_nothing_and_fails_where_something_would_change(folder, readme, capsys):
    assert run(folder, readme, "--tables", "--check") == 1
    assert_one_line(capsys, f"{readme}: not what {folder} makes of it")
    assert "old" in readme.read_text()
    assert run(folder, readme, "--tables") == 0
    capsys.readouterr()
    assert run(folder, readme, "--tables", "--check") == 0
    assert capsys.readouterr().out == ""
    put(folder / "host.json", [row("call", ratio("torch", 34, 35, "us"))])
    assert run(folder, readme, "--tables", "--check") == 1


def test_the_readme_is_what_the_results_make_of_it():
    assert report.main(["--tables", "--check"]) == 0


def stale(folder: Path) -> Path:
    path = folder / "memory.json"
    path.write_text(re.sub(r'"torch": "[^"]*"', '"torch": "1.0"', path.read_text()))
    return path


def test_a_stale_record_of_memory_is_made_again(folder, readme, monkeypatch):
    path, commands = stale(folder), []

    def again(module: str, words: list[str]) -> int:
        commands.append((module, words))
        shutil.copy(results.RESULTS / "memory.json", words[-1])
        return 0

    monkeypatch.setattr(counted, "run_interpreted", again)
    with pytest.raises(RunError, match=r"memory\.json: of torch 1\.0, here is 2"):
        counted.memory(path, refresh=False)
    assert run(folder, readme, "--tables") == 0
    path.unlink()
    assert run(folder, readme, "--tables") == 0
    assert [(module, words[:-1]) for module, words in commands] == [
        ("bench.memory", ["--alpha", "1.0", "--resize", "224", "--json"])
    ] * 2


def test_a_record_of_memory_that_cannot_be_made_again_is_one_line(folder, readme, monkeypatch, capsys):
    stale(folder)
    monkeypatch.setattr(counted, "run_interpreted", lambda module, words: 3)
    assert run(folder, readme, "--tables") == 1
    assert_one_line(capsys, "memory.json", "failed with status 3")


def test_without_matplotlib_there_are_tables_alone(folder, readme, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(folder, readme) == 1
    assert_one_line(capsys, "pip install -e '.[bench]'", "--tables")
    assert "old" in readme.read_text()
    assert run(folder, readme, "--tables") == 0


@pytest.fixture
def plots():
    """The module, where matplotlib is there."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib, of the extra bench")
    from bench import plots

    return plots


def drawn(plots, folder):
    return plots.figures(folder, tables.measured(folder), refresh=False)


def looks(figure) -> dict[tuple, int]:
    """Points by mark: the shape, and whether it is filled."""
    found: dict[tuple, int] = {}
    for axes in figure.axes:
        for line in axes.lines:
            if line.get_marker() not in (None, "None", ""):
                look = line.get_marker(), line.get_markerfacecolor() != "none"
                found[look] = found.get(look, 0) + len(line.get_xdata())
    return found


def texts(figure) -> str:
    legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return "\n".join([text.get_text() for axes in figure.axes for text in axes.texts] + legends)


def test_bounds_and_measurements_never_share_a_mark(plots, folder):
    bound, measurement = ("o", False), ("D", True)
    figures = drawn(plots, folder)
    assert looks(figures["roofline"]) == {bound: 34}
    assert texts(figures["roofline"]).count("No GPU has been measured yet") == 2
    assert looks(figures["ratios"]) == {measurement: 4}
    put(folder / "kernels.json", KERNELS)
    figures = drawn(plots, folder)
    assert looks(figures["roofline"]) == {bound: 34, measurement: 1}  # neither a pass nor bf16
    written = texts(figures["roofline"])
    assert written.count("No GPU has been measured yet") == 1  # in training
    assert f"measured: {H200}, batch 256" in written
    assert "bound of a block, counted" in written
    assert not {bound, measurement} & looks(figures["accuracy"]).keys()


def test_a_measured_block_is_where_its_row_says(plots):
    (point,) = plots.measured_points(KERNELS)["inference"][f"{H200}, batch 256"]
    macs = next(layer.macs for layer in layer_shapes() if layer.c_in == 16 and layer.c_mid == 96)
    assert point.intensity == pytest.approx(256 * macs / 144e6)
    assert point.throughput == pytest.approx(256 * macs / 60e-6)


def test_accuracy_has_a_line_for_each_alpha(plots, folder):
    for axes in drawn(plots, folder)["accuracy"].axes:
        assert {line.get_label(): len(line.get_xdata()) for line in axes.lines} == {
            str(alpha): len(sides) for alpha, sides in VARIANTS.items()
        }


def test_plots_of_the_same_results_have_the_same_bytes(plots, folder):
    import matplotlib

    first = plots.render(drawn(plots, folder))
    assert set(first) == {
        f"{name}.{kind}" for name in ("traffic", "memory", "roofline", "accuracy", "ratios") for kind in ("svg", "png")
    }
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None}):  # a user's configuration
        assert plots.render(drawn(plots, folder)) == first


def test_plots_are_written_and_checked(plots, folder, readme, monkeypatch, capsys):
    monkeypatch.setattr(plots, "figures", lambda *_, **__: {})
    monkeypatch.setattr(plots, "render", lambda _: {"some.svg": b"svg"})
    assert run(folder, readme) == 0
    plot = folder / "plots" / "some.svg"
    assert plot.read_bytes() == b"svg"
    assert run(folder, readme, "--check") == 0
    plot.write_bytes(b"other")
    assert run(folder, readme, "--check") == 1
    assert_one_line(capsys, str(plot))


def test_replacing_keeps_what_is_around():
    text = f"a {markers('one')} b\n{markers('two', '')} c"
    wanted = {"one": "1", "two": "2"}
    once = report.replaced(text, wanted, Path("README"))
    assert once == f"a {markers('one', '1' + chr(10))} b\n{markers('two', '2' + chr(10))} c"
    assert report.replaced(once, wanted, Path("README")) == once
    with pytest.raises(InputError, match="README"):
        report.replaced("", wanted, Path("README"))


def test_what_all_names_of_a_table_begin_with_is_not_said():
    names = ("loader, training: time", "loader, training: CPU time", "loader, evaluation: time")
    assert tables.common_words(names) == len("loader, ")
    assert tables.common_words(names[:2]) == len("loader, training: ")
    assert tables.common_words(names[:1]) == tables.common_words(("a", "b")) == 0
