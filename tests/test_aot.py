"""The ahead-of-time report: reading of code, specialisation as at a launch, judgement, record, command line."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from processes import ROOT, environment
from triton.runtime.jit import JITFunction

from bench import aot, cases, sass, tile_record
from kernels import common, roofline, tiles
from kernels.common import Launch
from mnv2.model import VARIANTS, layer_shapes

FACTS = {
    "warps": 2,
    "registers": 128,
    "spill": 0,
    "shared": 256,
    "tensor_columns": 0,
    "tensor_core": "",
    "instructions": 150,
    "wavefronts": 30,
    "macs": 4096,
    "loop": 100,
    "loop_wavefronts": 20,
    "loop_macs": 2048,
    "loops": 1,
    "inner": 100,
    "inner_wavefronts": 20,
    "inner_macs": 2048,
    "outer": 0,
    "outer_wavefronts": 0,
    "outer_macs": 0,
    "copied": 0,
}


def listing(*lines: str) -> str:
    """As nvdisasm writes it: labels end in a colon, all else are instructions."""
    out, address = [], 0
    for line in lines:
        if line.endswith(":"):
            out.append(line)
            continue
        predicate, _, rest = line.rpartition("  ")
        out.append(f"        /*{address:04x}*/   {predicate:>10} {rest} ;")
        address += 16
    return "\n".join([".text.kernel:", *out])


LOOP = listing(
    "MOV R1, c[0x0][0x28]",
    "@P0  EXIT",
    ".L_x_1:",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    *["FFMA R0, R1, R2, R3"] * 10,
    "@!P1  BRA `(.L_x_2)",  # to a slow path that comes back
    ".L_x_3:",
    "ISETP.GE.AND P0, PT, R18, 0x1, PT",
    "@!P0  BRA `(.L_x_1)",
    "EXIT",
    ".L_x_2:",
    *["IADD3 R0, R0, 0x1, RZ"] * 9,
    "BRA `(.L_x_3)",
    ".L_x_4:",
    "BRA `(.L_x_4)",
    "NOP",
)


def test_a_loop_holds_its_slow_path_and_padding_is_no_code():
    instructions = sass.parse(LOOP)
    reachable, loops = sass.flow(instructions)
    assert len(instructions) == 2 + 14 + 1 + 10 + 2
    assert reachable == set(range(27))
    assert loops == (set(range(2, 16)) | set(range(17, 27)),)


def test_an_outer_loop_holds_the_inner_and_short_ones_are_left_out():
    text = listing(
        ".L_x_0:",
        *["FADD R0, R0, R1"] * 4,
        ".L_x_1:",
        *["FMUL R0, R0, R1"] * 9,
        "@P0  BRA `(.L_x_1)",
        ".L_x_2:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R5], R6",
        "@!P1  BRA `(.L_x_2)",
        "BRA.U UP0, `(.L_x_0)",  # its condition is an operand
        "EXIT",
    )
    assert list(map(len, sass.flow(sass.parse(text)).loops)) == [17, 10]


def test_code_without_a_loop():
    reachable, loops = sass.flow(sass.parse(listing("MOV R1, R2", "BRA.DIV UR4, `(.L_x_0)", "EXIT", ".L_x_0:", "EXIT")))
    assert (reachable, loops) == ({0, 1, 2, 3}, ())
    assert sass.flow([]) == (set(), ())


def test_spills_are_the_bytes_stored_to_local_memory():
    text = listing(
        "STL [R1], R0",
        "STL.64 [R1+0x8], R2",
        "@P0  STL.128 [R1+0x10], R4",
        "STL.U8 [R1+0x20], R4",
        "STL.S16 [R1+0x22], R4",
        "LDL.LU.128 R4, [R1+0x10]",
        "STG.E.128 desc[UR6][R4.64], R4",
    )
    assert sass.spilled_bytes(sass.parse(text)) == 4 + 8 + 16 + 1 + 2


@pytest.mark.parametrize(
    ("opcode", "name"),
    [
        ("HMMA.16816.F32 R4, R8, R12, R4", "HMMA"),
        ("HGMMA.64x64x16.F32 R24, gdesc[UR8], R24", "HGMMA"),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]", "UTCHMMA"),
        ("FFMA R0, R1, R2, R3", ""),
    ],
)
def test_tensor_cores_are_recognised(opcode, name):
    assert sass.tensor_core(sass.parse(listing(opcode, "EXIT"))) == name


@pytest.mark.parametrize(
    ("opcode", "macs"),
    [
        ("HMMA.16816.F32", 16 * 8 * 16),
        ("HMMA.16816.F32.BF16", 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 16 * 8 * 8),
        ("HGMMA.64x128x16.F32", 64 * 128 * 16 // 4),  # four warps
        ("UTCHMMA", 0),
        ("FFMA", 0),
    ],
)
def test_multiply_adds_of_a_warp(opcode, macs):
    assert sass.multiply_adds(opcode) == macs


@pytest.mark.parametrize(
    ("opcode", "passes"),
    [
        ("LDS", 1),
        ("LDS.U16", 1),
        ("STS.64", 2),
        ("LDS.128", 4),
        ("LDSM.16.M88", 1),
        ("LDSM.16.MT88.4", 4),
        ("STSM.16.M88.2", 2),
        ("LDG.E.64.CONSTANT", 2),
        ("LDGSTS.E.BYPASS.LTC128B.128", 4),
        ("STG.E.U16", 1),
        ("LDL.LU.128", 4),
        ("LDC.64", 0),  # constants are elsewhere
        ("HMMA.16816.F32", 0),
    ],
)
def test_passes_of_a_warp_through_shared_memory(opcode, passes):
    assert sass.wavefronts(opcode) == passes


@pytest.mark.parametrize(
    ("inner", "outer", "main"),
    [("FMUL R0, R0, R1", "FADD R0, R0, R1", 23), ("HMMA.16816.F32 R4, R8, R12, R4", "FADD R0, R0, R1", 10)],
    ids=["the-largest", "the-smallest-with-all-products"],
)
def test_which_loop_is_multiplied(inner, outer, main):
    text = listing(
        ".L_x_0:",
        *[outer] * 12,
        ".L_x_1:",
        *[inner] * 9,
        "@P0  BRA `(.L_x_1)",
        "@P1  BRA `(.L_x_0)",
        "EXIT",
    )
    instructions = sass.parse(text)
    assert len(sass.main_loop(instructions, sass.flow(instructions).loops)) == main


@pytest.mark.parametrize(
    ("cap", "registers", "shared", "warps", "share"),
    [
        (90, 32, 0, 4, 1.0),
        (90, 128, 0, 2, 16 / 64),
        (90, 133, 0, 2, 12 / 64),  # 136 a thread, so 3 warps for each of four schedulers
        (86, 128, 0, 2, 16 / 48),
        (86, 32, 0, 1, 16 / 48),  # 16 blocks
        (80, 32, 100 * 1024, 4, 4 / 64),
        (80, 32, 81 * 1024, 4, 8 / 64),  # with 1 KiB reserved, exactly two
        (80, 32, 81 * 1024 + 1, 4, 4 / 64),
        (90, 255, 0, 16, 0.0),
    ],
)
def test_occupancy(cap, registers, shared, warps, share):
    assert sass.occupancy(cap, registers, shared, warps) == pytest.approx(share)


def test_bounds_count_the_loop_for_each_trip():
    clocks = 132 * roofline.DEVICES[90].clock
    found = sass.bounds(90, FACTS, programs=10, trips=7, touched=3_350)
    assert found.hbm == pytest.approx(1e-9)
    assert found.issue == pytest.approx(10 * 2 * (50 + 100 * 7) / (4 * clocks))
    assert found.tensor == pytest.approx(10 * 2 * (2048 + 2048 * 7) / (1024 * clocks))
    assert found.shared == pytest.approx(10 * 2 * (10 + 20 * 7) / clocks)
    straight = sass.bounds(90, {**FACTS, "loop": 0}, programs=10, trips=1, touched=0)
    assert straight.issue == pytest.approx(10 * 2 * 150 / (4 * clocks))
    group = sass.bounds(90, {**FACTS, "tensor_core": "HGMMA"}, programs=10, trips=7, touched=0)
    assert group.tensor == pytest.approx(found.tensor / 2)


@pytest.mark.parametrize(
    ("facts", "macs", "trips"),
    [
        ({}, 0, 7),  # as the launcher says
        ({}, 2 * (2048 + 2048 * 3), 3),  # two warps, 2048 outside the loop: the assembler has put several into one
        ({"loop": 0, "loop_macs": 0}, 2 * 4096, 1),  # all of them
        ({"macs": 0, "loop_macs": 0, "tensor_core": "UTCHMMA"}, 2 * 4096, 1),
    ],
    ids=["unknown", "some", "unrolled", "unreadable"],
)
def test_trips_follow_from_the_products_of_a_program(facts, macs, trips):
    launch = Launch(None, (10,), {}, num_warps=2)
    assert cases.Work(launch, 1000, 7, 1000, macs=macs).compiled_trips({**FACTS, **facts}) == trips


# A warp's code: 30 instructions, around a loop of 120, around one of 100; 0, 2048 and 2048 multiply-adds of its own.
NEST = {"instructions": 150, "macs": 4096, "wavefronts": 30, "outer": 120, "outer_macs": 4096, "outer_wavefronts": 25}


@pytest.mark.parametrize(
    ("facts", "walks", "macs", "instructions"),
    [
        ({}, 0, 0, 50 + 7 * 100),
        (NEST, 3, 0, 30 + 3 * (20 + 7 * 100)),
        (NEST, 3, 2 * 3 * (2048 + 4 * 2048), 30 + 3 * (20 + 4 * 100)),  # an inner loop unrolled to four trips
        ({}, 3, 0, 50 + 3 * 7 * 100),  # one loop is left, of all trips
        ({}, 3, 2 * (2048 + 3 * 2048), 50 + 3 * 100),  # the inner is unrolled whole
        ({"macs": 0, "inner_macs": 0}, 3, 2 * 4096, 50 + 3 * 100),  # at least that
        ({**NEST, "macs": 0, "inner_macs": 0, "outer_macs": 0}, 3, 2 * 4096, 30 + 3 * (20 + 7 * 100)),
    ],
    ids=["no-nest", "nested", "by-products", "flat", "inner-unrolled", "unreadable-flat", "unreadable"],
)
def test_nested_loops_are_counted_for_each_trip_of_both(facts, walks, macs, instructions):
    work = cases.Work(Launch(None, (10,), {}, num_warps=2), 1000, 7, 1000, macs=macs, walks=walks)
    found = work.run_through({**FACTS, **facts})
    assert found["instructions"] == instructions
    assert found["loop"] == found["loop_macs"] == found["loop_wavefronts"] == 0
    row = aot.Row(cases.Case(90, "B2", 144, 56, 1, c_in=24, c_out=24), work, "key")
    issue = 10 * 2 * instructions / (4 * 132 * roofline.DEVICES[90].clock)
    assert aot.bounds(row, {**FACTS, **facts}).issue == pytest.approx(issue)


def test_programs_that_return_at_once_count_as_none():
    found = cases.Work(Launch(None, (10,), {}, num_warps=2), 1000, 0, 1000).run_through(FACTS)
    assert (found["instructions"], found["macs"], found["wavefronts"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("inner", "outer"), [("FMUL R0, R0, R1", 23), ("HMMA.16816.F32 R4, R8, R12, R4", 23)], ids=["long", "products"]
)
def test_the_innermost_loop_that_does_most_and_the_one_around_it(inner, outer):
    text = listing(
        ".L_x_0:",
        *["FADD R0, R0, R1"] * 12,
        ".L_x_1:",
        *[inner] * 9,
        "@P0  BRA `(.L_x_1)",
        "@P1  BRA `(.L_x_0)",
        ".L_x_2:",
        *["IADD3 R0, R0, 0x1, RZ"] * 8,
        "@P2  BRA `(.L_x_2)",
        "EXIT",
    )
    instructions = sass.parse(text)
    assert list(map(len, sass.nest(instructions, sass.flow(instructions).loops))) == [10, outer]
    assert list(map(len, sass.nest(instructions, ()))) == [0, 0]


@pytest.mark.parametrize(
    ("facts", "touched", "name"),
    [
        ({}, 10**6, "HBM"),
        ({}, 0, "issue"),
        ({"macs": 10**6}, 0, "tensor"),
        ({"wavefronts": 10**3}, 0, "shared"),
    ],
)
def test_the_longest_bound_binds(facts, touched, name):
    assert sass.bounds(90, {**FACTS, **facts}, programs=10, trips=1, touched=touched).binds == name


def test_the_limits_and_the_devices_are_of_the_same_capabilities():
    assert sass.CAPABILITIES.keys() == roofline.DEVICES.keys()
    h100 = common.limits(torch.device("cpu"))
    assert h100 == (roofline.DEVICES[90].processors, sass.CAPABILITIES[90].shared_block, False, "")


@pytest.mark.parametrize(
    ("cap", "facts", "declared", "problem"),
    [
        (90, {}, 0, None),
        (90, {"spill": 16}, 16, None),
        (90, {"spill": 16}, 8, "spills 16 bytes a thread, its tile declares 8"),
        (90, {"shared": 227 * 1024}, 0, None),
        (86, {"shared": 100 * 1024}, 0, "shared memory of 102400 bytes"),
        (90, {"warps": 16}, 0, None),
        (90, {"warps": 16, "registers": 129}, 0, "129 registers x 512 threads"),
        (90, {"warps": 64, "registers": 16}, 0, "2048 threads"),
        (100, {"tensor_columns": 1024}, 0, "1024 columns"),
    ],
)
def test_what_a_device_would_refuse(cap, facts, declared, problem):
    found = sass.problems(cap, {**FACTS, **facts}, declared, grid=(2**20, 65535))
    assert [problem in line for line in found] == ([] if problem is None else [True])


def _kernel(a_ptr, b_ptr, c_ptr, n, m, one, big, size, W, BLOCK: tl.constexpr):
    tl.store(a_ptr + n + m + one + big + size + W, BLOCK)


def test_arguments_are_specialised_as_at_a_launch():
    half = torch.empty(8, dtype=torch.bfloat16, device="meta")
    pointers = {"a_ptr": half, "b_ptr": None, "c_ptr": half.float()}
    arguments = {**pointers, "n": 32, "m": 31, "one": 1, "big": 2**31, "size": 32, "W": 1, "BLOCK": 64}
    launch = Launch(JITFunction(_kernel, do_not_specialize=["size", "W"]), (1,), arguments, num_warps=2, num_stages=3)
    signature, constants, attributes, options = sass.source(launch, 90)
    assert list(signature.values()) == [
        *("*bf16", "constexpr", "*fp32", "i32", "i32", "constexpr", "i64", "i32", "i32", "constexpr")
    ]
    assert constants == {(1,): None, (5,): 1, (9,): 64}
    aligned = [["tt.divisibility", 16]]
    assert {at: value for at, value in attributes.items() if value} == dict.fromkeys([(0,), (2,), (3,), (6,)], aligned)
    assert (options["num_warps"], options["num_stages"], options["arch"]) == (2, 3, "sm90")

    def key(cap=90, warps=2, **changes):
        return sass.key(launch._replace(arguments={**arguments, **changes}, num_warps=warps), cap)

    assert key() == key(n=64, m=33, size=33, W=5)  # one kernel serves them all
    others = {key(n=33), key(m=1), key(one=3), key(BLOCK=32), key(a_ptr=half.half()), key(b_ptr=half)}
    assert len(others | {key(), key(cap=80), key(warps=4)}) == 9


def test_a_grid_that_is_too_large():
    assert "a grid of 1 x 65536 programs" in sass.problems(90, FACTS, 0, grid=(1, 65536))[0]


def test_the_sample_and_the_whole():
    sample, every = cases.sample(sass.CAPABILITIES), cases.every(sass.CAPABILITIES)
    assert set(sample) < set(every)
    kernels = {(cap, kernel, stride) for cap in sass.CAPABILITIES for kernel in cases.DEPTHWISE for stride in (1, 2)}
    assert {(case.cap, case.kernel, case.stride) for case in sample if case.kernel in cases.DEPTHWISE} == kernels
    whole = {(case.C, case.side, case.stride) for case in sample if case.cap == 90 and case.kernel == "depthwise_bwd"}
    assert {(32, 112, 1), (96, 112, 2), (960, 7, 1), cases.ODD} < whole
    assert len(whole) == 10 + 12 + 1
    assert cases.Case(80, "depthwise_fwd", 1344, 7, 1) in every  # alpha 1.4
    assert len({case.name for case in every}) == len(every)


def test_the_sample_has_the_network_of_blocks_and_each_kind_of_kernel_on_each_capability():
    sample = cases.sample(sass.CAPABILITIES)
    blocks = cases.blocks_of_network(90)
    assert len([case for case in blocks if case.kernel == "block"]) == 17
    assert set(blocks) < set(sample)
    kernels = {*cases.WORK} - {*cases.TRAINING}
    wanted = {(cap, kernel) for cap in sass.CAPABILITIES for kernel in (*kernels, *cases.WALKS)}
    assert {(case.cap, case.kernel) for case in sample} == wanted | {(90, kernel) for kernel in cases.TRAINING}
    with_blocks = [case for case in sample if case.kernel == "block" and case.cap == 90]
    assert {case.dtype for case in with_blocks} == set(cases.DTYPES)
    assert {case.padding for case in with_blocks} == {"symmetric", "same"}


def test_the_sample_of_training_has_every_type_and_both_paddings():
    walks = [case for case in cases.sample([90]) if case.kernel == "B2"]
    assert {case.dtype for case in walks} == set(cases.DTYPES)
    assert {case.padding for case in walks} == {"symmetric", "same"}
    launches = [cases.WORK["B2"](case).launch for case in walks]
    assert {launch.arguments["t_ptr"] is None for launch in launches} == {False, True}
    (single,) = (at.arguments for case, at in zip(walks, launches, strict=True) if case.dtype == "fp32")
    assert single["walk"].precision == "tf32"


def test_every_pass_of_the_network_in_training_is_compiled():
    passes = cases.training_of_network(90)
    every = {case for case in cases.every([90]) if case.kernel in cases.TRAINING}
    assert set(passes) < every
    assert {case.kernel for case in passes} == set(cases.TRAINING)
    assert len([case for case in passes if case.kernel == "P2"]) == 17
    assert len(passes) == 14 + 16 * 25  # the first block doesn't expand
    assert len({case.name for case in every}) == len(every)


@pytest.mark.parametrize(("c_in", "c_mid", "side", "blocks"), [(24, 144, 56, 5), (64, 384, 14, 1)])
def test_a_walk_back_has_two_loops_where_it_makes_t(c_in, c_mid, side, blocks):
    work = cases.WORK["B2"](cases.Case(90, "B2", c_mid, side, 1, c_in=c_in, c_out=c_in))
    assert work.elements == 256 * side**2 * c_mid
    assert work.walks == blocks
    assert work.trips == work.launch.arguments["ROWS"] // work.launch.arguments["walk"].UNROLL


def test_a_projection_walks_over_channels_for_each_tile_of_pixels():
    work = cases.WORK["P3"](cases.Case(90, "P3", 384, 14, 1, c_in=64, c_out=64))
    at = work.launch.arguments
    assert (work.trips, work.walks) == (384 // at["BLOCK_K"], at["TILES"])
    assert work.macs * work.launch.grid[0] == 256 * 14**2 * 384 * 64
    assert work.touched > 256 * 14**2 * (384 + 64) * 2


def test_every_block_of_all_widths_is_compiled_in_all_tiles():
    every = [case for case in cases.every([90]) if case.kernel == "block" and case.dtype == "fp16"]
    shapes = {
        (layer.c_in, layer.c_mid, layer.c_out, layer.height, layer.stride)
        for alpha in VARIANTS
        for layer in layer_shapes(alpha, 224)
        if layer.kind == "block"
    }
    assert shapes < {(case.c_in, case.C, case.c_out, case.side, case.stride) for case in every}
    one = cases.Case(90, "block", 144, 56, 1, c_in=24, c_out=24)
    narrow = [case for case in every if dataclasses.replace(case, row=0) == one]
    assert [cases.WORK["block"](case).tile[:2] for case in narrow] == [(2, 4), (2, 2)]


def test_a_block_is_launched_with_the_tile_of_the_capability():
    big = cases.Case(90, "block", 576, 14, 2, c_in=96, c_out=160)  # takes 208 KiB on sm_90
    tiles_taken = {cap: cases.WORK["block"](dataclasses.replace(big, cap=cap)).tile for cap in sass.CAPABILITIES}
    assert tiles_taken[90] == tiles_taken[100] != tiles_taken[86] == tiles_taken[120]
    work = cases.WORK["block_project"](cases.Case(90, "block_project", 960, 7, 1, c_in=160, c_out=320))
    assert work.tile.split
    assert work.trips == 30
    assert work.touched == 256 * 49 * (960 + 320) * 2 + 320 * (960 * 2 + 4)


@pytest.mark.parametrize("cap", sass.CAPABILITIES)
def test_the_sample_has_every_tile_at_both_strides_on_each_capability(cap):
    kernel = "depthwise_bwd"  # which has most in registers
    wanted = [case for case in cases.sample([cap]) if case.kernel == kernel and case.dtype == "bf16"]
    found = [(case.stride, cases.WORK[kernel](case).launch.arguments) for case in wanted]
    taken = {(stride, at["BLOCK_M"], at["BLOCK_C"], at["COLUMNS"]) for stride, at in found}
    assert taken == {(stride, *tile[:3]) for stride in (1, 2) for tile in tiles.DEPTHWISE}


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """Three rows, two of which share a kernel, in place of the plan; facts in place of the compiler's."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    launch = Launch(SimpleNamespace(params=[]), (10,), {}, num_warps=2, spill_bytes=8)
    three = [cases.Case(90, "depthwise_fwd", 32, side, 1) for side in (112, 56, 28)]
    rows = [aot.Row(case, cases.Work(launch, 1000, 7, 1000), key) for case, key in zip(three, "abb", strict=True)]
    state = SimpleNamespace(rows=rows, facts={"a": FACTS, "b": FACTS}, stop_after=None, asked=[])
    monkeypatch.setattr(tiles, "RECORD", tmp_path / "kernels" / "tiles.json")
    monkeypatch.setattr(aot, "plan", lambda wanted: state.rows)

    def compile_all(jobs):
        for n, name in enumerate(jobs):
            if n == state.stop_after:
                raise KeyboardInterrupt
            state.asked.append(name)
            yield name, state.facts[name]

    monkeypatch.setattr(aot, "compile_all", compile_all)
    return state


def test_an_undeclared_spill_fails_and_names_its_rows(rows, capsys):
    assert aot.main([]) == 0
    rows.facts = {"a": {**FACTS, "spill": 8}, "b": {**FACTS, "spill": 12}}
    assert aot.main([]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f"depthwise_fwd 32x{side}x{side}/1 fp16 sm_90: spills 12 bytes a thread, its tile declares 8"
        for side in (56, 28)
    ]
    assert "3 rows, of which 3 spill and 2 fail; 2 kernels compiled" in out


def test_an_interrupted_record_is_taken_up_again(rows, tmp_path, capsys):
    file = tmp_path / "aot.json"
    command = ["--all", "--json", str(file)]
    rows.stop_after = 1
    assert aot.main(command) == 130
    assert capsys.readouterr().err == f"interrupted: 1 of 2 kernels compiled, kept in {file}\n"
    assert [row["key"] for row in json.loads(file.read_text())["rows"]] == ["a"]

    rows.stop_after, rows.asked = None, []
    assert aot.main(command) == 0
    assert rows.asked == ["b"]
    record = file.read_text()
    assert sorted(row["key"] for row in json.loads(record)["rows"]) == ["a", "b", "b"]

    assert aot.main(command) == 0
    assert (rows.asked, file.read_text()) == (["b"], record)

    rows.rows = rows.rows[1:]  # "a" is wanted no more
    assert aot.main([*command, "--only", "28x28"]) == 0
    assert json.loads(file.read_text())["compiled"].keys() == {"b"}
    assert len(json.loads(file.read_text())["rows"]) == 2
    assert os.listdir(tmp_path) == ["aot.json"]


def test_what_does_not_compile_fails_alone_and_is_tried_again(rows, tmp_path, capsys):
    file = tmp_path / "aot.json"
    rows.facts = {"a": {"error": "CompilationError: at 3:4"}, "b": FACTS}
    assert aot.main(["--all", "--json", str(file)]) == 1
    assert "32x112x112/1 fp16 sm_90: does not compile: CompilationError: at 3:4\n" in capsys.readouterr().err
    assert json.loads(file.read_text())["compiled"].keys() == {"b"}


@pytest.fixture
def blocks(rows, monkeypatch):
    """The blocks of alpha 1.0 on sm_90 in place of the rows, and one in bf16; each launch has a kernel of its own."""
    tiles.RECORD.parent.mkdir()
    tiles.record.cache_clear()
    wanted = [*cases.blocks_of_network(90), cases.Case(90, "block", 144, 56, 1, "bf16", c_in=24, c_out=24)]
    rows.rows = [aot.Row(case, cases.WORK[case.kernel](case), case.name) for case in dict.fromkeys(wanted)]
    rows.facts = {row.key: FACTS for row in rows.rows}
    yield rows
    tiles.record.cache_clear()


def test_what_blocks_are_made_of_is_recorded_for_their_bounds(blocks, tmp_path, capsys):
    assert aot.main(["--all", "--json", str(tmp_path / "aot.json")]) == 0
    text = tiles.RECORD.read_text()
    record = json.loads(text)
    assert record.keys() == {"command", "versions", "rows"}
    assert text.count("\n") == len(record["rows"]) + 2
    assert len(record["rows"]) == 14  # 12 blocks, of which 2 are split; fp16 alone
    case = cases.Case(90, "block_project", 960, 7, 1, c_in=160, c_out=320)
    key = tiles.record_key("block_project", 160, 960, 320, 1, cases.WORK["block_project"](case).tile)
    assert FACTS.items() >= {name: tiles.record()[key][name] for name in tile_record.KEPT}.items()
    assert tiles.record()[key]["trips"] == 1 + (64 * 64 * 960 // FACTS["warps"] - FACTS["macs"]) // FACTS["loop_macs"]
    assert sorted(os.listdir(tiles.RECORD.parent)) == ["tiles.json"]


def test_a_block_that_is_not_as_recorded_fails_and_names_its_row(blocks, tmp_path, capsys):
    assert aot.main([]) == 0  # nothing is recorded
    assert aot.main(["--all", "--json", str(tmp_path / "aot.json")]) == 0
    assert aot.main([]) == 0
    name = "block 24-144-24x56x56/1 fp16 sm_90"
    blocks.facts[name] = {**FACTS, "registers": 130, "instructions": 151}
    capsys.readouterr()
    assert aot.main([]) == 1
    assert capsys.readouterr().err == (
        f"{name}: registers 130, not 128; instructions 151, not 150 as in tiles.json: "
        "`python -m bench.aot --all` anew\n"
    )


def test_a_record_of_tiles_is_written_whole_or_not(blocks, tmp_path, capsys):
    blocks.facts[blocks.rows[0].key] = {"error": "CompilationError"}
    assert aot.main(["--all", "--json", str(tmp_path / "aot.json")]) == 1
    assert not tiles.RECORD.exists()


def test_blocks_of_the_network_are_summed_where_all_are_there(blocks, tmp_path, capsys):
    file = tmp_path / "aot.json"
    assert aot.main(["--json", str(file)]) == 0
    out = capsys.readouterr().out
    (found,) = json.loads(file.read_text())["blocks_bound_us"].items()
    assert found[0] == "90"
    largest = {
        row["shape"] + row["kernel"]: max(row[f"{kind}_us"] for kind in ("hbm", "issue", "tensor", "shared"))
        for row in json.loads(file.read_text())["rows"]
    }
    counted = sum(largest[case.shape + case.kernel] for case in cases.blocks_of_network(90))
    assert found[1]["ours"] == pytest.approx(counted, abs=0.01)
    assert found[1]["separate"] == pytest.approx(26.07e6 / 3.35e12 * 1e6, rel=0.001)
    assert f"17 blocks of alpha 1.0 at 224 take at least {found[1]['ours']:.2f} us" in out
    assert aot.main(["--only", "960"]) == 0
    assert "17 blocks" not in capsys.readouterr().out


def test_long_compilations_come_first(blocks):
    assert aot.main([]) == 0
    assert blocks.asked[0] == "block 160-960-160x7x7/1 fp16 sm_90"
    assert blocks.asked[-1].startswith("block_project ")


def test_passes_of_training_are_summed_where_all_are_there(rows, tmp_path, capsys):
    wanted = dict.fromkeys(cases.training_of_network(90))
    rows.rows = [aot.Row(case, cases.WORK[case.kernel](case), case.name) for case in wanted]
    rows.facts = {row.key: FACTS for row in rows.rows}
    file = tmp_path / "aot.json"
    assert aot.main(["--json", str(file)]) == 0
    out = capsys.readouterr().out
    (found,) = json.loads(file.read_text())["training_bound_us"].values()
    limits = {row.case: aot.bounds(row, FACTS) for row in rows.rows}
    largest = sum(max(limits[case]) for case in cases.training_of_network(90)) / 256 * 1e6
    assert found["ours"] == pytest.approx(largest, abs=0.001)
    assert max(found["issue"], found["hbm"]) < found["ours"]
    assert found["compiled"] == pytest.approx(178.08e6 / 3.35e12 * 1e6, rel=0.001)
    assert f"sm_90: training: 17 blocks take at least {found['issue']:.2f} us an image by issue" in out
    assert aot.main(["--only", "P2"]) == 0
    assert "training: 17 blocks" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}'])
def test_another_file_is_no_record(rows, tmp_path, capsys, text):
    file = tmp_path / "aot.json"
    file.write_text(text)
    assert aot.main(["--all", "--json", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"{file}: expected a record of bench.aot, got ")
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--cap", "75"], "--cap: expected some of 80,86,90,100,120, got '75'"),
        (["--json", "/nowhere/aot.json"], "--json: expected a file in a folder that exists, got '/nowhere/aot.json'"),
    ],
)
def test_bad_arguments(words, cause, capsys):
    with pytest.raises(SystemExit, match="2"):
        aot.main(words)
    assert cause in capsys.readouterr().err


def test_no_row_of_that_name(rows, capsys):
    assert aot.main(["--only", "pointwise"]) == 2
    assert capsys.readouterr().err == "--only: expected a part of a row's name, got 'pointwise'\n"


def run_aot(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
    variables = environment(**more)
    if "TRITON_INTERPRET" not in more:
        variables.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "bench.aot", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=variables)


def test_the_interpreter_is_refused():
    done = run_aot(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr.startswith("TRITON_INTERPRET: unset it")
    assert (done.stderr.count("\n"), done.stdout) == (1, "")


def test_two_kernels_are_compiled_and_recorded(tmp_path):
    file = tmp_path / "aot.json"
    done = run_aot("--cap", "80,90", "--only", "sum_partials 32x112x112/1 fp16", "--json", file, TMPDIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert aot.NOTE in done.stdout
    assert "2 rows, of which 0 spill and 0 fail; 2 kernels compiled, 0 reused;" in done.stdout
    record = json.loads(file.read_text())
    assert record.keys() == {"command", "note", "versions", "blocks_bound_us", "training_bound_us", "compiled", "rows"}
    assert record["blocks_bound_us"] == {}  # not all blocks are there
    assert record["versions"].keys() == {"torch", "triton"}
    assert [row["cap"] for row in record["rows"]] == [80, 90]
    for row in record["rows"]:
        facts = record["compiled"][row["key"]]
        assert facts.keys() == FACTS.keys()
        assert facts["loops"] == 1
        assert facts["instructions"] > facts["loop"] > 16  # a load for each of 256 x 8 partials to 128 threads
        assert row["tile"] == {"num_warps": 4, "BLOCK_P": 256, "BLOCK_N": 8}
        assert row["registers"] > 16
        assert 0 < row["occupancy"] < 1
        assert 0 < row["issue_us"] < 1
        assert 0 < row["hbm_us"] < 1
        assert row["instructions_an_element"] * 16 > facts["loop"]  # sixteen elements a thread and trip, some of none
    assert os.listdir(tmp_path) == ["aot.json"]  # no cache is left behind


SPILL = """
from bench import aot, cases, sass
case = cases.Case(90, "depthwise_dw", 32, 14, 1)
launch = cases.WORK[case.kernel](case).launch
launch = launch._replace(arguments={**launch.arguments, "BLOCK_M": 32}, num_warps=2)
row = aot.Row(case, cases.Work(launch, 1, 1, 1), "key")
print(*aot.failures([row], {"key": sass.compile_launch(launch, 90)}))
"""


def test_a_tile_too_large_for_the_registers_spills(tmp_path):
    variables = environment(TRITON_CACHE_DIR=str(tmp_path))
    variables.pop("TRITON_INTERPRET", None)
    words = [sys.executable, "-c", SPILL]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=ROOT, env=variables)
    assert done.stdout.startswith("depthwise_dw 32x14x14/1 fp16 sm_90: spills "), done.stderr
