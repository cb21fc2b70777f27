"""Ahead-of-time compilation of every Triton kernel, for GPUs that need not be present, and the resources that it uses.

    python -m longreach.kernels.compilation [--brief] [op …]

prints the table, and exits with 1 where a kernel does not fit. Its last numbers are the blocks that a multiprocessor
holds at once, and their share of the warps that it can hold. It needs no GPU, but TRITON_INTERPRET must not be set.
With `--brief`, kernels are compiled for sm_90, and for other chips only as they take the most shared memory there.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

OPS = (
    "softmax",
    "block_sparse",
    "select_blocks",
    "chunks",
    "gated_linear",
    "delta_rule",
    "diagonal_scan",
    "selective_scan",
    "wkv",
    "short_conv",
    "grouped_matmul",
    "pointwise",
)

# Shared memory that one block of threads may take, in bytes (CUDA C++ Programming Guide, technical specifications).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Shared memory of a multiprocessor; each block on it takes RESERVED bytes more than it asks for, in units of UNIT.
MULTIPROCESSOR_SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
RESERVED, UNIT = 1024, 128
# The same on these chips: registers of a multiprocessor, which its four parts share evenly and give to warps in units,
# and the most warps and blocks on it.
REGISTERS, PARTS, REGISTER_UNIT = 65_536, 4, 256
MOST_WARPS, MOST_BLOCKS = 64, 32
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@dataclass(frozen=True)
class Compilation:
    """One kernel at one production shape.

    signature: Triton's type of every argument that is not a constant, as "*bf16", "i32". constants: values of the
    constexpr arguments. divisible: arguments known to be multiples of 16 (aligned pointers, strides).
    rows: rows of its matrix tiles, 0 for a kernel without matrix products; from 64 on, wgmma is expected on sm_90
    unless `note` says why not. variant: distinguishes it from the kernel's other compilations.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 2
    rows: int = 0
    note: str = ""
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__name__} {self.variant}".strip()

    @property
    def compiled(self) -> tuple[Any, ...]:
        """What the compiler is given; compilations for which it is the same differ in their names alone."""
        given = (frozenset(self.signature.items()), frozenset(self.constants.items()), frozenset(self.divisible))
        return self.kernel.fn.__name__, *given, self.warps, self.stages


class Report(NamedTuple):
    """What a compiled kernel uses: bytes of shared memory, registers per thread, bytes spilled, matrix instructions."""

    shared: int
    registers: int
    spills: int
    wgmma: int
    mma: int


def report(compilation: Compilation, capability: int) -> Report:
    """Compiles for compute capability 80, 90 or 100; `wgmma` counts the chip's own instruction, `mma` the older one."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = compilation.kernel.arg_names
    signature = {name: compilation.signature.get(name, "constexpr") for name in names}
    missing = [name for name, kind in signature.items() if kind == "constexpr" and name not in compilation.constants]
    if missing:
        raise ValueError(f"{compilation.name} must have a type or a value for each argument; got none for {missing}")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in compilation.divisible}
    log = io.StringIO()
    with contextlib.redirect_stdout(log), knobs.nvidia.scope():
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(
            ASTSource(compilation.kernel, signature, compilation.constants, attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": compilation.warps, "num_stages": compilation.stages},
        )
    ptx = compiled.asm["ptx"]
    # Triton does not assemble a kernel that is in its cache, and so prints no report on it.
    registers, spills = _resources(log.getvalue() or _assemble(ptx, capability))
    own = 0 if capability == 80 else ptx.count(MATRIX_INSTRUCTION[capability])
    return Report(compiled.metadata.shared, registers, spills, own, ptx.count("mma.sync"))


def _assemble(ptx: str, capability: int) -> str:
    """The report of Triton's own assembler on a kernel."""
    import triton

    name = "ptxas-blackwell" if capability >= 100 else "ptxas"
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    target = re.search(r"\.target\s+(\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(assembler), "-v", f"-arch={target[1]}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr + done.stdout


def _resources(text: str) -> tuple[int, int]:
    """Registers per thread and bytes spilled, from the assembler's report."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", text)]
    return max(registers), sum(spills)


def faults(compilation: Compilation, capability: int, used: Report) -> list[str]:
    """What keeps a compiled kernel from production: too much shared memory, spills or plain arithmetic on sm_90."""
    problems = []
    if used.shared > SHARED[capability]:
        problems.append(f"{used.shared} bytes of shared memory exceed {SHARED[capability]}")
    elif not blocks_per_multiprocessor(capability, compilation.warps, used.registers, used.shared):
        problems.append(
            f"{compilation.warps} warps of {used.registers} registers per thread exceed {REGISTERS} registers"
        )
    if capability == 90 and used.spills:
        problems.append(f"{used.spills} bytes spilled")
    if capability == 90 and compilation.rows >= 64 and not used.wgmma and not compilation.note:
        problems.append("no wgmma though its tiles have 64 rows or more")
    if compilation.rows and not used.wgmma and not used.mma:
        problems.append("no tensor-core instruction")
    return problems


def blocks_per_multiprocessor(capability: int, warps: int, registers: int, shared: int) -> int:
    """How many blocks of a kernel a multiprocessor holds at once, as CUDA counts them; 0 if it cannot run the kernel.

    warps: of 32 threads, per block. registers: per thread. shared: bytes per block.
    """
    registers_per_warp = _rounded_up(32 * registers, REGISTER_UNIT)
    if registers_per_warp * _rounded_up(warps, PARTS) > REGISTERS or shared > SHARED[capability]:
        return 0
    by_registers = REGISTERS // PARTS // registers_per_warp * PARTS // warps
    by_shared = MULTIPROCESSOR_SHARED[capability] // _rounded_up(shared + RESERVED, UNIT)
    return min(MOST_BLOCKS, MOST_WARPS // warps, by_registers, by_shared)


def _rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def compilations(op: str) -> list[Compilation]:
    """Those that the `triton.py` of an op's folder, or of `chunks`, lists, and of several that are alike the first."""
    found: dict[tuple[Any, ...], Compilation] = {}
    for each in importlib.import_module(f".{op}.triton", __package__).compilations():
        found.setdefault(each.compiled, each)
    return list(found.values())


class Line(NamedTuple):
    """A line of the table, its kernel's faults, and the shared memory that the kernel takes."""

    text: str
    problems: list[str]
    shared: int


def table(ops: tuple[str, ...], brief: bool = False) -> Iterator[Line]:
    """The head of the table and a line for each kernel and chip; the work is spread over the cores.

    brief: other chips than sm_90 get one compilation of each kernel, that which takes the most shared memory on sm_90.
    """
    numbers = f"{'shared':>8} {'regs':>5} {'spills':>6} {'wgmma':>5} {'mma':>4} {'blocks':>6} {'warps':>5}"
    yield Line(f"{'kernel':58} {'chip':>6} {numbers}  remarks", [], 0)
    listed = {(op, number): each.kernel.fn.__name__ for op in ops for number, each in enumerate(compilations(op))}
    with multiprocessing.get_context("spawn").Pool() as pool:
        if not brief:
            yield from pool.imap(_line, [(*each, chip) for each in listed for chip in SHARED])
            return
        most: dict[tuple[str, str], tuple[int, int]] = {}  # shared memory, and the number of the compilation
        for (op, number), line in zip(listed, pool.imap(_line, [(*each, 90) for each in listed]), strict=True):
            yield line
            kernel = op, listed[op, number]
            most[kernel] = max(most.get(kernel, (-1, 0)), (line.shared, number))
        others = [(op, number) for (op, _), (_, number) in most.items()]
        yield from pool.imap(_line, [(*each, chip) for each in others for chip in SHARED if chip != 90])


def _line(task: tuple[str, int, int]) -> Line:
    op, number, capability = task
    compilation = compilations(op)[number]
    used = report(compilation, capability)
    problems = faults(compilation, capability, used)
    note = compilation.note if capability == 90 and not used.wgmma else ""
    remarks = "; ".join(["FAULT: " + p for p in problems] + ([note] if note else []))
    blocks = blocks_per_multiprocessor(capability, compilation.warps, used.registers, used.shared)
    numbers = f"{used.shared:8} {used.registers:5} {used.spills:6} {used.wgmma:5} {used.mma:4}"
    numbers += f" {blocks:6} {blocks * compilation.warps / MOST_WARPS:5.0%}"
    text = f"{f'{op}/{compilation.name}':58} sm_{capability:<3} {numbers}  {remarks}"
    return Line(text.rstrip(), problems, used.shared)


def main(arguments: list[str]) -> int:
    """Prints the table for the ops named, or all; 1 where a kernel has a fault."""
    brief, arguments = "--brief" in arguments, [each for each in arguments if each != "--brief"]
    unknown = [op for op in arguments if op not in OPS]
    if unknown:
        print(f"ops must be among {', '.join(OPS)}; got {', '.join(unknown)}", file=sys.stderr)
        return 2
    failed = 0
    for line in table(tuple(arguments) or OPS, brief):
        failed += bool(line.problems)
        print(line.text, flush=True)
    if failed:
        print(f"{failed} compilations have faults", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
