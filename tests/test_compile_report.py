"""The compile report: what is read from binaries, what counts as a fault, and that there is none.

Triton cannot compile where its interpreter was chosen, so compilation happens in other processes.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from segmenter_fast import cubin
from segmenter_fast.backend import BackendError
from segmenter_fast.cli import app
from segmenter_fast.compile_report import (
    HEADINGS,
    Floor,
    Job,
    Pointer,
    Row,
    Specialisation,
    _launches,
    compile_all,
    find_jobs,
    make_report,
    make_rows,
)
from segmenter_fast.cubin import LIMITS, Usage, occupancy, parse
from segmenter_fast.ops import _triton
from segmenter_fast.ops._triton import Config, operations

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "benchmarks" / "results" / "compile_report.md"

# No kernel of ours there: nothing stands around the products, or the dtype has no tensor cores.
GRADIENT_BY_CUBLAS = {"linear_residual"}
BY_CUBLAS = {("linear_residual", "float32")}

USAGE = Usage(
    registers=64, spilled=0, shared=2048, threads=128, instructions=500, tensor_core=(), tma=0
)


def names():
    return [operation.name.removesuffix("_triton") for operation in operations()]


def python(*arguments, **environ):
    """Run Python in a process of its own, in the repository."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environ = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200", **environ}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)


# ------------------------------------------------------------------------------- the command
def test_every_kernel_compiles_without_faults(tmp_path):
    page = tmp_path / "report.md"
    command = ["-m", "segmenter_fast", "kernels", "--arch", "sm_90", "--arch", "80"]
    dtypes = ["--dtype", "float32", "--dtype", "bfloat16"]
    # With the interpreter chosen, too: the command starts itself again without.
    done = python(*command, *dtypes, "--output", str(page), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    text = page.read_text()
    assert "## Problems\n\nNone.\n" in text
    table = f"| {' | '.join(HEADINGS)} |"
    for operation in operations():
        name = operation.name.removesuffix("_triton")
        assert f"\n## {name}\n\n{table}\n" in text, f"{name} is not in the report"
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for arch in ("sm_80", "sm_90"):
            assert f"| {arch} | " in section, f"{name} was not compiled for {arch}"
        floors = text.split("\n## Floors")[1]
        for dtype in operation.dtypes:
            dtype = str(dtype).removeprefix("torch.")
            if dtype != "float16":
                assert dtype in section or (name, dtype) in BY_CUBLAS
                assert f"| {name} | {dtype} | " in floors
    assert "sm_86" not in text and "| float16" not in text


def test_the_committed_page_is_complete():
    text = PAGE.read_text()
    command = f"segmenter-fast kernels --output {PAGE.relative_to(ROOT)}"
    for name in names():
        assert f"\n## {name}\n" in text, f"{PAGE.name} lacks {name}: run '{command}'"
    assert "## Problems\n\nNone.\n" in text


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--arch", "sm_75"], 2, "expected one of sm_80, sm_86"),
        (["--dtype", "float64"], 2, "float64"),
        (["attention_is"], 1, "no operation is called 'attention_is'; there are "),
    ],
    ids=["architecture", "dtype", "name"],
)
def test_wrong_usage(words, status, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["kernels", *words])
    assert (result.exit_code, message in result.output) == (status, True), result.output


@pytest.mark.interpreted
def test_nothing_is_compiled_where_kernels_are_interpreted():
    if _triton.INTERPRETED:
        with pytest.raises(BackendError, match="TRITON_INTERPRET"):
            make_report()


# ------------------------------------------------------------------------------- faults
@pytest.fixture(scope="module")
def problems():
    """Faults that are found in report_cases.py, and the figures of what has none."""
    script = (
        "import json, report_cases\n"
        "from segmenter_fast.compile_report import make_report\n"
        "if __name__ == '__main__':\n"
        "    report = make_report(\n"
        "        operations=report_cases.OPERATIONS, archs=[90], processes=2, with_cuda=False\n"
        "    )\n"
        "    print(json.dumps({r.operation: [r.problems(), r.cells()] for r in report.rows}))\n"
    )
    done = python("-c", script, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_faults_are_found(problems):
    found = {name: "; ".join(texts) for name, (texts, _) in problems.items()}
    assert found["good"] == ""
    assert found["upcast"] == "multiplies 16-bit matrices without HGMMA (has none at all)"
    assert found["small"] == "multiplies 16-bit matrices without HGMMA (has HMMA)"
    assert found["spilling"].startswith("spills registers (")
    assert f"needs {4 * 256**2} bytes of shared memory; there are {227 << 10}" in found["large"]
    assert found["broken"] == "does not compile: CompileTimeAssertionFailure: only for three"


def test_figures_of_a_compiled_kernel(problems):
    cells = dict(zip(HEADINGS, problems["good"][1], strict=True))
    assert cells["kernel"] == "product" and cells["GPU"] == "sm_90"
    assert cells["configuration"] == "BLOCK 64, 4 warps, 2 stages"
    assert cells["tensor cores"].endswith(" HGMMA") and cells["TMA"] == "-"
    # Both operands, 64 x 64 in 16 bits, wait in shared memory.
    assert int(cells["shared"]) == 2 * 64 * 64 * 2
    assert 0 < int(cells["registers"]) <= 255 and cells["spilled"] == "0"


def row(**changes):
    dtypes = ("float16",)
    return replace(Row("op", "kernel", 90, dtypes, "BLOCK 64", USAGE, matrix=False), **changes)


def with_mma(name):
    return replace(USAGE, tensor_core=((name, 8),))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (row(), None),
        (row(usage=replace(USAGE, spilled=8)), "spills registers (8 bytes)"),
        (row(matrix=True), "without HGMMA (has none at all)"),
        (row(matrix=True, arch=80), "without tensor cores"),
        (row(matrix=True, arch=80, usage=with_mma("HMMA")), None),
        (row(matrix=True, usage=with_mma("HMMA")), "without HGMMA (has HMMA)"),
        (row(matrix=True, usage=with_mma("HGMMA")), None),
        (row(matrix=True, arch=100, usage=with_mma("UTCHMMA")), None),
        # float32 is multiplied in float32.
        (row(matrix=True, dtypes=("float32",)), None),
        (row(matrix=True, dtypes=("float32", "bfloat16")), "without HGMMA"),
        (row(usage=replace(USAGE, shared=227 << 10)), None),
        (row(usage=replace(USAGE, shared=(227 << 10) + 1)), "shared memory"),
        (row(usage=replace(USAGE, shared=100 << 10), arch=89), "shared memory"),
        (row(usage=replace(USAGE, registers=255, threads=1024)), "more registers"),
        (row(usage="ValueError: no"), "does not compile: ValueError: no"),
    ],
)
def test_what_counts_as_a_fault(row, problem):
    found = row.problems()
    assert len(found) == (problem is not None)
    assert all(problem in text for text in found)
    assert len(row.cells()) == len(HEADINGS)


def test_a_crash_of_the_compiler_is_a_fault_of_one_kernel():
    crashing = Specialisation("report_cases", "crashing", 90, (), ())
    missing = Specialisation("report_cases", "absent", 90, (), ())
    seen = []
    results = compile_all([missing, crashing, missing], 2, lambda: seen.append(None))
    assert results[1] == "the compiler crashed" and len(seen) == 3
    assert results[0] == results[2] and results[0].startswith("AttributeError")


# ------------------------------------------------------------------------------- what is compiled
@pytest.mark.parametrize("operation", operations(), ids=lambda operation: operation.name)
def test_every_launch_of_an_operation_is_a_job(operation):
    dtype = operation.dtypes[-1]
    jobs = find_jobs([operation], [80, 90], [dtype])
    assert {job.dtype for job in jobs} == {dtype}
    assert {job.specialisation.arch for job in jobs} == {80, 90}
    name = operation.name.removesuffix("_triton")
    backward = operation.backward_work is not None and name not in GRADIENT_BY_CUBLAS
    assert {job.backward for job in jobs} == ({False, True} if backward else {False})
    # Every configuration of every kernel, and the backward pass from where forward ends.
    inputs = operation.make_inputs(dtype, **operation.case)
    with _triton.Recorder(90) as recorder:
        operation.run(**inputs)
    kernels = [launch.kernel for launch in recorder.launches]
    expected = {repr(config) for kernel in kernels for config in kernel.candidates(90)}
    forward = [job for job in jobs if not job.backward and job.specialisation.arch == 90]
    assert {repr(job.config) for job in forward} == expected
    flags = [backward for backward, _ in _launches(operation, inputs, 90)]
    assert not any(flags[: len(kernels)])
    assert not backward or flags[len(kernels)]


def test_operations_are_found():
    assert {"upsample_argmax_triton", "upsample_cross_entropy_triton"} <= {
        operation.name for operation in operations()
    }


def make_job(dtype, arch=90, backward=False, **blocks):
    specialisation = Specialisation("m", "f", arch, (), (("x_ptr", Pointer(dtype, True)),))
    return Job("op", backward, dtype, "kernel", False, False, Config(blocks), specialisation)


def test_dtypes_with_the_same_figures_share_a_row():
    jobs = [
        make_job(torch.float32, BLOCK=64),
        make_job(torch.float16, BLOCK=64),
        make_job(torch.float16, BLOCK=128),
        make_job(torch.bfloat16, BLOCK=64),
        make_job(torch.bfloat16, arch=80, BLOCK=64),
        make_job(torch.bfloat16, backward=True, BLOCK=64),
    ]
    other = replace(USAGE, registers=65)
    rows = make_rows(jobs, [USAGE, other, USAGE, other, USAGE, USAGE])
    assert [(r.kernel, r.arch, r.dtypes, r.usage.registers) for r in rows] == [
        ("kernel", 80, ("bfloat16",), 64),
        ("kernel", 90, ("float32",), 64),
        ("kernel", 90, ("float16", "bfloat16"), 65),
        ("kernel", 90, ("float16",), 64),
        ("kernel (backward)", 90, ("bfloat16",), 64),
    ]


def test_floors():
    memory = Floor("op", "bfloat16", flop=1e9, bytes=4.3e9, matrix=False)
    assert memory.seconds == pytest.approx(1e-3)
    assert memory.cells() == ("op", "bfloat16", "1.00", "4300.00", "1000.0", "memory")
    for dtype, matrix, rate in (
        ("float32", True, 67e12),
        ("bfloat16", False, 67e12),
        ("bfloat16", True, 790e12),
    ):
        floor = Floor("op", dtype, flop=rate, bytes=1.0, matrix=matrix)
        assert floor.seconds == pytest.approx(1.0) and floor.cells()[-1] == "arithmetic"


# ------------------------------------------------------------------------------- reading binaries
RESOURCES = """
Resource usage:
 Common:
  GLOBAL:0
 Function first:
  REG:40 STACK:16 SHARED:1072 LOCAL:0 CONSTANT[0]:648 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function second:
  REG:255 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:648 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
ELF = """
.nv.info
\t<0x1>
\tAttribute:\tEIATTR_REGCOUNT
\tFormat:\tEIFMT_SVAL
\tValue:\tfunction: first(0x8)\tregister count: 40

.nv.info.first
\t<0x1>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0xe0 0x1 0x1 

.nv.info.second
\t<0x1>
\tAttribute:\tEIATTR_CUDA_API_VERSION
\tFormat:\tEIFMT_SVAL
\tValue:\t0x82
"""  # noqa: W291
CODE = """
\t.section\t.text.first,"ax",@progbits
first:
.text.first:
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*0010*/                   HFMA2.MMA R6, -RZ, RZ, 0, 0 ;
        /*0020*/              @!P0 STL [R1], R4 ;
        /*0030*/              @UP1 STL.64 [R1+0x8], R4 ;
        /*0040*/                   LDL.LU.128 R4, [R1] ;
        /*0050*/                   LDL.U8 R4, [R1] ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
.L_x_1:
        /*0070*/                   EXIT ;
\t.section\t.text.second,"ax",@progbits
.text.second:
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0010*/              @!PT HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0030*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10] ;
        /*0040*/                   UTMAREDG.2D.ADD [UR8], [UR4] ;
        /*10050*/                  EXIT ;
"""


def test_what_the_tools_print_is_understood():
    usages = parse(RESOURCES, ELF, CODE, 90)
    assert usages == {
        "first": Usage(
            registers=40,
            spilled=4 + 8 + 16 + 1,
            shared=48,  # since sm_90 the tool counts the system's 1024 bytes
            threads=224,
            instructions=8,
            tensor_core=(("HMMA", 1),),
            tma=0,
        ),
        "second": Usage(
            registers=255,
            spilled=0,
            shared=0,
            threads=1024,
            instructions=6,
            tensor_core=(("HGMMA", 2), ("UTCHMMA", 1)),
            tma=2,
        ),
    }
    assert parse(RESOURCES, ELF, CODE, 80)["first"].shared == 1072


def test_occupancy():
    """Against the rules of NVIDIA's occupancy calculator, worked out by hand."""
    for arch, registers, threads, shared, expected in (
        (80, 32, 256, 0, 1.0),
        (80, 64, 128, 0, 0.5),
        (80, 65, 128, 0, 28 / 64),  # a warp takes 72 x 32; four parts hold 7 warps each
        (80, 255, 256, 0, 8 / 64),
        (80, 32, 128, 40 << 10, 4 * 4 / 64),  # 41 KB with the system's, four times in 164
        (80, 32, 128, (40 << 10) + 1, 3 * 4 / 64),
        (86, 40, 128, 0, 1.0),
        (86, 40, 64, 0, 16 * 2 / 48),  # 16 blocks
        (89, 40, 64, 0, 1.0),
        (90, 168, 384, 100 << 10, 12 / 64),
        (90, 92, 224, 0, 2 * 7 / 64),  # 21 warps' registers, but only 5 in each of four parts
        (90, 32, 32, 0, 0.5),  # 32 blocks
        (90, 32, 100, 0, 1.0),  # 100 threads are four warps
        (100, 128, 1024, 0, 0.0),
    ):
        usage = replace(USAGE, registers=registers, threads=threads, shared=shared)
        got = occupancy(usage, arch)
        assert got == pytest.approx(expected), (arch, registers, threads, shared, got)


def test_limits_are_known_for_every_architecture():
    assert set(LIMITS) == set(_triton.ARCHITECTURES)
    for limits in LIMITS.values():
        assert limits.shared - limits.shared_per_block == cubin.SHARED_BY_SYSTEM


def test_missing_and_failing_tools(tmp_path, monkeypatch):
    empty = tmp_path / "empty.cubin"
    empty.write_bytes(b"nothing")
    with pytest.raises(BackendError, match=r"cuobjdump cannot read .*empty\.cubin"):
        cubin.read_cubin(empty, 90)
    monkeypatch.setattr(cubin, "find_tool", lambda name: _triton.find_tool(f"no-{name}"))
    with pytest.raises(BackendError, match=r"no-cuobjdump was found neither .* CUDA toolkit"):
        cubin.read_cubin(empty, 90)


# ------------------------------------------------------------------------------- CUDA C++
class _WithoutCuda:
    @staticmethod
    def build_info():
        return {"cuda": None}


def test_without_cuda_the_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(cubin, "native_module", lambda: _WithoutCuda)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(BackendError, match="built without it, and no nvcc was found"):
        cubin.cuda_cubins([90], tmp_path)
    monkeypatch.setattr(cubin, "SOURCES", tmp_path)
    with pytest.raises(BackendError, match="its sources are not here"):
        cubin.cuda_cubins([90], tmp_path)


def test_nvcc_is_asked_for_every_architecture(tmp_path, monkeypatch):
    nvcc, sources = tmp_path / "nvcc", tmp_path / "sources"
    nvcc.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/command\necho no such luck >&2\nexit 1\n')
    nvcc.chmod(0o755)
    sources.mkdir()
    (sources / "one.cu").touch()
    monkeypatch.setattr(cubin, "native_module", lambda: _WithoutCuda)
    monkeypatch.setattr(cubin, "SOURCES", sources)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    with pytest.raises(BackendError, match=r"cannot compile .*one\.cu:\nno such luck"):
        cubin.cuda_cubins([80, 90], tmp_path)
    command = (tmp_path / "command").read_text()
    assert "arch=compute_80,code=sm_80" in command and "arch=compute_90a,code=sm_90a" in command
    assert "--fmad=false" in command


def test_names_of_cuda_kernels():
    mangled = (
        "_ZN9segmenter4cuda51_GLOBAL__N__cbdf8014_18_upsample_argmax_cu_ebfe3a0811label_cellsIf"
        "EEvNS1_4ViewE"
    )
    source, kernel = cubin.demangle(mangled)
    assert source == "upsample_argmax.cu"
    assert kernel in ("label_cells<float>", mangled)
    assert cubin.demangle("plain") == ("CUDA C++", "plain")
