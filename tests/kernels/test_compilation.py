"""Every Triton kernel compiles for GPUs that are not here: shared memory, spills and matrix instructions in order."""

import os
import subprocess
import sys

import pytest

from longreach.kernels.compilation import OPS, Compilation, Report, blocks_per_multiprocessor, compilations, faults


def table(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "longreach.kernels.compilation", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment, cwd="/")


@pytest.fixture(scope="module")
def brief(request):
    """The brief table of all ops that are tested here, by one process."""
    tests = [item for item in request.session.items if item.name.startswith("test_kernels_compile[")]
    return table("--brief", *(item.callspec.params["op"] for item in tests))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_kernels_compile(brief, op):
    """Every one for sm_90, and for other chips that which takes the most shared memory."""
    assert brief.returncode == 0 or "FAULT" in brief.stdout, brief.stderr
    lines = [line for line in brief.stdout.splitlines() if line.startswith(f"{op}/")]
    compiled = {(line[:58].rstrip(), line[58:].split()[0]) for line in lines}
    assert {name for name, chip in compiled if chip == "sm_90"} == {f"{op}/{each.name}" for each in compilations(op)}
    kernels = {each.kernel.fn.__name__ for each in compilations(op)}
    for chip in ("sm_80", "sm_90", "sm_100"):
        assert {name.split()[0] for name, other in compiled if other == chip} == {f"{op}/{each}" for each in kernels}
    assert not [line for line in lines if "FAULT" in line]


@pytest.mark.many
@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_for_every_chip(op):
    done = table(op)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1 + 3 * len(compilations(op))


def named(**settings):
    return Compilation(kernel=None, signature={}, constants={}, **settings)


@pytest.mark.parametrize(
    ("compilation", "capability", "found", "said"),
    [
        (named(rows=64), 90, Report(1000, 200, 0, 8, 0), []),
        (named(), 80, Report(163 * 1024 + 1, 32, 0, 0, 0), ["exceed 166912"]),
        (named(rows=128), 90, Report(1000, 255, 16, 8, 0), ["16 bytes spilled"]),
        (named(rows=128), 80, Report(1000, 255, 16, 0, 8), []),
        (named(rows=64), 90, Report(1000, 200, 0, 0, 8), ["no wgmma"]),
        (named(rows=64, note="16 columns"), 90, Report(1000, 200, 0, 0, 8), []),
        (named(rows=16), 90, Report(1000, 200, 0, 0, 0), ["no tensor-core"]),
        (named(warps=16), 90, Report(1000, 168, 0, 0, 0), ["16 warps of 168 registers per thread exceed 65536"]),
    ],
)
def test_what_keeps_a_kernel_from_production(compilation, capability, found, said):
    problems = faults(compilation, capability, found)
    assert len(problems) == len(said)
    assert all(part in problem for part, problem in zip(said, problems, strict=True))


@pytest.mark.parametrize(
    ("capability", "warps", "registers", "shared", "blocks"),
    [
        (80, 8, 32, 0, 8),  # all 64 warps
        (80, 1, 32, 0, 32),  # no more blocks
        (90, 4, 128, 0, 4),  # 4,096 registers a warp, four warps in each of four parts
        (90, 4, 168, 0, 3),
        (90, 4, 170, 0, 2),  # the last unit of 256 registers is begun
        (100, 8, 255, 0, 1),
        (90, 5, 200, 0, 1),  # eight warps have room, of which five are a block
        (80, 4, 32, 100 * 1024, 1),
        (90, 4, 32, 100 * 1024, 2),
        (80, 4, 32, 163 * 1024, 1),
        (90, 4, 32, 113 * 1024, 2),
        (90, 4, 32, 113 * 1024 + 1, 1),  # a block takes 1 KiB more than it asks for
        (100, 8, 64, 40 * 1024, 4),  # by registers; shared memory has room for five
        (90, 4, 32, 227 * 1024 + 1, 0),
        (90, 32, 255, 0, 0),
        (90, 9, 160, 0, 1),
        (90, 9, 184, 0, 0),  # CUDA reserves registers for twelve warps
    ],
)
def test_blocks_that_a_multiprocessor_holds(capability, warps, registers, shared, blocks):
    assert blocks_per_multiprocessor(capability, warps, registers, shared) == blocks


def test_unknown_ops_are_refused():
    done = subprocess.run(
        [sys.executable, "-m", "longreach.kernels.compilation", "softmix"], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 2
    assert "ops must be among softmax, block_sparse" in done.stderr
