"""What a compiled kernel is made of: registers, spills, shared memory and instructions, read from its cubin.

Triton's own ``nvdisasm`` and ``cuobjdump`` do the reading, so no GPU is needed. The limits of each capability turn
registers and shared memory into an occupancy, and one representative device a capability (``kernels/roofline.py``)
turns counts into bounds.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from kernels.roofline import Bounds

Facts = dict[str, Any]  # of a compiled kernel: see ``examine``
READING = 2  # raised where ``examine`` reads a kernel differently, so that recorded facts are read afresh

THREADS = 1024  # a block, on every capability
GRID = (2**31 - 1, 65535, 65535)
TENSOR_COLUMNS = 512  # of tensor memory, from sm_100 on
SCHEDULERS = 4  # a multiprocessor; each issues an instruction a clock and owns a quarter of the registers
REGISTERS = 65536  # a multiprocessor
RESERVED_SHARED = 1024  # bytes that the driver adds to each block
MIN_LOOP = 9  # instructions; what is shorter spins on a barrier or traps


class Capability(NamedTuple):
    """Limits of a multiprocessor (CUDA C++ programming guide, "Compute capabilities")."""

    shared: int  # bytes
    threads: int
    blocks: int

    @property
    def shared_block(self) -> int:
        """Bytes of shared memory that a block may ask for."""
        return self.shared - RESERVED_SHARED


CAPABILITIES = {
    80: Capability(164 * 1024, 2048, 32),
    86: Capability(100 * 1024, 1536, 16),
    90: Capability(228 * 1024, 2048, 32),
    100: Capability(228 * 1024, 2048, 32),
    120: Capability(100 * 1024, 1536, 24),
}

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.x]*)\s*([^;]*);")
_LABEL = re.compile(r"\s*(\.L_\w+):")
_TARGET = re.compile(r"\.L_\w+")
_TENSOR_CORE = re.compile(r"HGMMA|IGMMA|QGMMA|UTC\w*MMA|[HIQOD]MMA")
_SHAPE = re.compile(r"HMMA\.(168\d+)|HGMMA\.64x(\d+)x(\d+)")
_MEMORY_SASS = re.compile(r"(LDG|STG|LDGSTS)(\.|$)")
_MEMORY_PTX = re.compile(r"\b(ld|st)\.(\w+\.)*?global\b|\bcp\.async\.c[ag]\.")
_RESOURCES = re.compile(r"REG:(\d+) STACK:\d+ SHARED:(\d+)")


class Instruction(NamedTuple):
    """One line of a listing. ``target`` is the index of the instruction that it may jump to."""

    predicate: str
    opcode: str
    operands: str
    target: int | None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        name, *kind = self.opcode.split(".")
        if name not in ("BRA", "BRX", "JMP", "EXIT", "RET") or "DIV" in kind:  # BRA.DIV asks whether threads diverge
            return True
        return self.predicate not in ("", "PT") or bool(re.match(r"!?U?P\d", self.operands))


def parse(listing: str) -> list[Instruction]:
    """Instructions of ``nvdisasm -c``."""
    lines, labels = [], {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif found := _INSTRUCTION.search(line):
            lines.append(found.groups())
    instructions = []
    for _, predicate, opcode, operands in lines:
        jump = _TARGET.search(operands) if opcode.split(".")[0] in ("BRA", "JMP", "CALL") else None
        target = labels.get(jump[0]) if jump else None
        instructions.append(Instruction(predicate or "", opcode, operands.strip(), target))
    return instructions


def _successors(instructions: Sequence[Instruction]) -> list[list[int]]:
    out = []
    for i, instruction in enumerate(instructions):
        after = [] if instruction.target is None or instruction.target >= len(instructions) else [instruction.target]
        if instruction.falls_through and i + 1 < len(instructions):
            after.append(i + 1)
        out.append(after)
    return out


def _reverse_postorder(successors: list[list[int]]) -> list[int]:
    """Reachable instructions, each before what follows it except along back edges."""
    order, seen, stack = [], {0}, [(0, iter(successors[0]))]
    while stack:
        here, rest = stack[-1]
        following = next((i for i in rest if i not in seen), None)
        if following is None:
            order.append(here)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors[following])))
    return order[::-1]


def _dominators(order: list[int], predecessors: dict[int, list[int]]) -> dict[int, int]:
    """Immediate dominator of each instruction (Cooper, Harvey and Kennedy 2001)."""
    number = {i: n for n, i in enumerate(order)}
    dominator = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for i in order[1:]:
            known = [p for p in predecessors[i] if p in dominator]
            best = known[0]
            for p in known[1:]:
                while p != best:
                    while number[p] > number[best]:
                        p = dominator[p]
                    while number[best] > number[p]:
                        best = dominator[best]
            changed |= dominator.get(i) != best
            dominator[i] = best
    return dominator


class Flow(NamedTuple):
    """Indices of the instructions that can run, and of those in each loop, by the loop's first instruction."""

    reachable: frozenset[int]
    loops: tuple[frozenset[int], ...]


def flow(instructions: Sequence[Instruction]) -> Flow:
    """Natural loops: back edges whose head dominates their tail, so that slow paths behind EXIT are none."""
    if not instructions:
        return Flow(frozenset(), ())
    successors = _successors(instructions)
    order = _reverse_postorder(successors)
    predecessors: dict[int, list[int]] = {i: [] for i in order}
    for i in order:
        for j in successors[i]:
            predecessors[j].append(i)
    dominator = _dominators(order, predecessors)
    loops: dict[int, set[int]] = {}
    for tail in order:
        for head in successors[tail]:
            above = tail
            while above not in (head, order[0]):
                above = dominator[above]
            if above != head:
                continue
            body = loops.setdefault(head, {head})
            work = [tail]
            while work:
                if (i := work.pop()) not in body:
                    body.add(i)
                    work += predecessors[i]
    return Flow(frozenset(order), tuple(frozenset(body) for _, body in sorted(loops.items()) if len(body) >= MIN_LOOP))


def spilled_bytes(instructions: Sequence[Instruction]) -> int:
    """Bytes that a thread stores to local memory."""
    widths = (re.search(r"\.(128|64|[US]16|[US]8)\b", i.opcode) for i in instructions if i.opcode.startswith("STL"))
    return sum(int(width[1].lstrip("US")) // 8 if width else 4 for width in widths)


def tensor_core(instructions: Sequence[Instruction]) -> str:
    """Name of the tensor cores' instruction, or an empty string."""
    names = {found[0] for i in instructions if (found := _TENSOR_CORE.match(i.opcode))}
    return "+".join(sorted(names))


def multiply_adds(opcode: str) -> int:
    """Multiply-adds of a warp in one instruction of the tensor cores; a warp group of four shares an HGMMA.

    Those of sm_100's UTC.MMA are not in its name, and count as none.
    """
    found = _SHAPE.match(opcode)
    if not found:
        return 0
    if found[1]:
        return 16 * 8 * int(found[1][3:])
    return 16 * int(found[2]) * int(found[3])


def wavefronts(opcode: str) -> int:
    """Passes of a warp through L1 and shared memory in one instruction: 128 bytes each, as if no bank had a conflict.

    It is taken that each lane has an address of its own: where lanes read the same, fewer passes do.
    """
    name, *kind = opcode.split(".")
    if name in ("LDSM", "STSM"):
        return next((int(part) for part in kind if part in ("2", "4")), 1)
    if name not in ("LDS", "STS", "LDG", "STG", "LDGSTS", "LDL", "STL"):
        return 0
    return next((int(part) // 32 for part in kind if part in ("64", "128")), 1)


def main_loop(instructions: Sequence[Instruction], loops: Sequence[frozenset[int]]) -> list[Instruction]:
    """Instructions of the largest loop; where loops hold tensor-core instructions, of the smallest with all of them."""

    def rank(loop: frozenset[int]) -> tuple[int, int]:
        products = sum(bool(_TENSOR_CORE.match(instructions[i].opcode)) for i in loop)
        return products, -len(loop) if products else len(loop)

    return [instructions[i] for i in sorted(max(loops, key=rank, default=frozenset()))]


def nest(instructions: Sequence[Instruction], loops: Sequence[frozenset[int]]) -> tuple[frozenset[int], frozenset[int]]:
    """The innermost loop that does most, by products and then by length, and the loop around it, each perhaps empty."""

    def rank(loop: frozenset[int]) -> tuple[int, int]:
        return sum(bool(_TENSOR_CORE.match(instructions[i].opcode)) for i in loop), len(loop)

    inner = max((a for a in loops if not any(b < a for b in loops)), key=rank, default=frozenset())
    return inner, min((loop for loop in loops if inner < loop), key=len, default=frozenset())


def _registers_of_warp(registers: int) -> int:
    return -(-registers * 32 // 256) * 256  # allocated 256 at a time


def occupancy(cap: int, registers: int, shared: int, warps: int) -> float:
    """Share of the warps that a multiprocessor can hold."""
    limits = CAPABILITIES[cap]
    a_block = -(-(shared + RESERVED_SHARED) // 128) * 128
    by_registers = REGISTERS // SCHEDULERS // _registers_of_warp(max(registers, 1)) * SCHEDULERS // warps
    blocks = min(by_registers, limits.shared // a_block, limits.threads // (32 * warps), limits.blocks)
    return blocks * warps * 32 / limits.threads


def problems(cap: int, facts: Facts, declared_spill: int, grid: Sequence[int]) -> list[str]:
    """Why the launch would not run on a device of this capability, or not as its tile declares."""
    if "error" in facts:
        return [f"does not compile: {facts['error']}"]
    threads, shared, found = facts["warps"] * 32, CAPABILITIES[cap].shared_block, []
    if any(programs > limit for programs, limit in zip(grid, GRID, strict=False)):
        found.append(f"a grid of {' x '.join(map(str, grid))} programs, at most {' x '.join(map(str, GRID))}")
    if facts["spill"] > declared_spill:
        found.append(f"spills {facts['spill']} bytes a thread, its tile declares {declared_spill}")
    if facts["shared"] > shared:
        found.append(f"shared memory of {facts['shared']} bytes, a block may have {shared}")
    if threads > THREADS:
        found.append(f"{threads} threads, a block may have {THREADS}")
    busiest = -(-facts["warps"] // SCHEDULERS)  # warps that share a scheduler's registers
    if busiest * _registers_of_warp(facts["registers"]) > REGISTERS // SCHEDULERS:
        found.append(f"{facts['registers']} registers x {threads} threads, a multiprocessor has {REGISTERS}")
    if facts["tensor_columns"] > TENSOR_COLUMNS:
        found.append(f"{facts['tensor_columns']} columns of tensor memory, a multiprocessor has {TENSOR_COLUMNS}")
    return found


def remarks(facts: Facts, *, known: bool = False, nested: bool = False) -> list[str]:
    """What may make a bound wrong; ``known`` says that the products of a program are, from which its trips follow.

    ``nested`` says that the loop around the one that does most is counted too.
    """
    notes = []
    unrolled = facts.get("copied") and facts.get("loops")  # a loop that is unrolled whole is counted as it is
    if unrolled and not (known and facts["loop_macs"]):
        notes.append("the assembler has copied loads or stores, so its loop may stand for several trips")
    if facts.get("loops", 0) > (2 if nested else 1):
        counted = "two alone are multiplied by their trips" if nested else "one alone is multiplied by its trips"
        notes.append(f"{facts['loops']} loops, of which {counted}")
    if "UTC" in facts.get("tensor_core", ""):
        notes.append(f"multiply-adds of {facts['tensor_core']} can't be read: none are counted, and the loop once")
    return notes


def bounds(cap: int, facts: Facts, programs: int, trips: int, touched: int) -> Bounds:
    """Seconds that the capability's representative device takes at least, with the loop counted ``trips`` times."""
    from kernels import roofline

    return roofline.bounds(roofline.DEVICES[cap], facts, programs, trips, touched)


def _tool(name: str, option: str, file: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, option, file], capture_output=True, text=True, check=True).stdout


def examine(compiled: Any, cap: int) -> Facts:
    """Facts of a kernel that ``triton.compile`` returned.

    ``instructions`` are all that can run and ``loop`` those of the ``main_loop``, ``loops`` how many loops there are;
    ``macs`` and ``wavefronts`` are a warp's in all of them and ``loop_macs`` and ``loop_wavefronts`` in the loop's.
    ``inner`` and ``outer``, with ``_macs`` and ``_wavefronts`` too, are of the loops that ``nest`` finds.
    ``copied`` are the global loads and stores that the assembler has added to those of the PTX: it copies them when it
    unrolls a loop, whose ``loop`` then stands for several trips.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing, resources = _tool("nvdisasm", "-c", file.name), _tool("cuobjdump", "--dump-resource-usage", file.name)
    everything = parse(listing)
    reachable, loops = flow(everything)
    instructions = [everything[i] for i in sorted(reachable)]
    registers, static = map(int, _RESOURCES.search(resources).groups())
    body = [instruction.opcode for instruction in main_loop(everything, loops)]
    opcodes = [instruction.opcode for instruction in instructions]
    moves = sum(bool(_MEMORY_SASS.match(i.opcode)) for i in instructions)
    return {
        "warps": compiled.metadata.num_warps,
        "registers": registers,
        "spill": spilled_bytes(instructions),
        "shared": max(compiled.metadata.shared, 0) + (static if cap < 90 else 0),  # later ones list the reserved bytes
        "tensor_columns": getattr(compiled.metadata, "tmem_size", None) or 0,
        "tensor_core": tensor_core(instructions),
        "instructions": len(opcodes),
        "wavefronts": sum(map(wavefronts, opcodes)),
        "macs": sum(map(multiply_adds, opcodes)),
        "loop": len(body),
        "loop_wavefronts": sum(map(wavefronts, body)),
        "loop_macs": sum(map(multiply_adds, body)),
        "loops": len(loops),
        **_of_nest(everything, loops),
        "copied": max(0, moves - len(_MEMORY_PTX.findall(compiled.asm["ptx"]))),
    }


def _of_nest(instructions: Sequence[Instruction], loops: Sequence[frozenset[int]]) -> Facts:
    """What the innermost loop and the one around it hold, the inner included."""
    found = {}
    for name, loop in zip(("inner", "outer"), nest(instructions, loops), strict=True):
        body = [instructions[i].opcode for i in loop]
        found |= {name: len(body), f"{name}_wavefronts": sum(map(wavefronts, body))}
        found[f"{name}_macs"] = sum(map(multiply_adds, body))
    return found


class Source(NamedTuple):
    """What ``triton.compile`` takes for a launch."""

    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


def source(launch: Any, cap: int) -> Source:
    """Types, constants and specialisations of a launch, by the functions that Triton's own launches go through."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(GPUTarget("cuda", cap, 32))
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(**launch.arguments, **options)
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    return Source(signature, constants, attributes, vars(options))


def key(launch: Any, cap: int) -> str:
    """Hash of all that the facts of the compiled kernel depend on."""
    import triton

    signature, constants, attributes, options = source(launch, cap)
    options = {name: value for name, value in options.items() if name != "extern_libs"}  # a path; the version covers it
    parts = (launch.kernel.cache_key, signature, constants, attributes, options, cap, triton.__version__, READING)
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def compile_launch(launch: Any, cap: int) -> Facts:
    """Facts of the launch's kernel; "error" alone where the compiler refuses it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes, options = source(launch, cap)
    try:
        ast = ASTSource(launch.kernel, signature, constants, attributes)
        return examine(triton.compile(ast, target=GPUTarget("cuda", cap, 32), options=options), cap)
    except Exception as error:  # whatever the compiler raises is this kernel's alone: the others go on
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[-1].strip()}"}
