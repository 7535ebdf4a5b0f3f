"""What the Triton kernels share, and the facts about Triton that it rests on."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from triton_cases import DEVICE, DTYPES, dtypes, on_device

from segmenter_fast.backend import BackendError, resolve_backend
from segmenter_fast.ops import _triton
from segmenter_fast.ops._triton import (
    Config,
    Kernel,
    Recorder,
    check_kind,
    dot,
    launch,
    load_as,
    next_power_of_2,
    store_as,
    tl,
    triton,
    use_candidate,
)

ROOT = Path(__file__).resolve().parent.parent

in_interpreter = [
    pytest.mark.interpreted,
    pytest.mark.skipif(DEVICE != "cpu", reason="kernels are compiled here"),
]


def facts(test):
    """Mark a test of the interpreter's own behaviour."""
    for mark in in_interpreter:
        test = mark(test)
    return test


# ------------------------------------------------------------------------------- kernels
@triton.jit
def _cast_kernel(x_ptr, y_ptr, N, DTYPE: tl.constexpr, BLOCK: tl.constexpr):  # (N,), (N,)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < N).to(DTYPE), mask=at < N)


@triton.jit
def _copy_kernel(
    x_ptr,  # (N,)
    y_ptr,  # (N,)
    N,
    limit,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    store_as(y_ptr + at, load_as(x_ptr + at, at < limit, -1.0, DTYPE), at < N)


@triton.jit
def _add_kernel(x_ptr, y_ptr, sum_ptr, BLOCK: tl.constexpr):  # three times (BLOCK,)
    at = tl.arange(0, BLOCK)
    tl.store(sum_ptr + at, tl.load(x_ptr + at) + tl.load(y_ptr + at))


@triton.jit
def _product_kernel(
    a_ptr,  # (M, K)
    b_ptr,  # (K, N)
    c_ptr,  # (M, N), added to
    ACCUMULATOR: tl.constexpr,
    PLAIN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a, b = tl.load(a_ptr + m * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n)
    if PLAIN:
        c = tl.dot(a, b)
    else:
        c = dot(a, b, tl.load(c_ptr + m * N + n).to(ACCUMULATOR))
    tl.store(c_ptr + m * N + n, c.to(c_ptr.dtype.element_ty))


BLOCK = 256
COPY = Kernel(_copy_kernel, {"default": (Config({"BLOCK": BLOCK}),)})


def copied(x, dtype, via=tl.float32, limit=None):
    """`x` stored as `dtype`; from `limit` on -1 was read."""
    y = torch.empty(x.shape, dtype=dtype, device=DEVICE)
    n = x.numel()
    arguments = (x.to(DEVICE), y, n, n if limit is None else limit)
    launch(COPY, (-(-n // BLOCK),), COPY.config(y), *arguments, DTYPE=via)
    return y.cpu()


def bits(x):
    return x.view(torch.int16)


def product(a, b, c, accumulator=tl.float32, plain=False):
    a, b, c = a.to(DEVICE), b.to(DEVICE), c.to(DEVICE)
    (m, k), n = a.shape, b.shape[1]
    _product_kernel[(1,)](a, b, c, ACCUMULATOR=accumulator, PLAIN=plain, M=m, N=n, K=k)
    return c.cpu()


# ------------------------------------------------------------------------------- the interpreter
@facts
def test_fact_the_interpreter_truncates_to_bfloat16():
    x = torch.tensor([1 + 3 * 2.0**-9, -1 - 3 * 2.0**-9])  # three quarters up to the next bfloat16
    y = torch.empty(2, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, y, 2, DTYPE=tl.bfloat16, BLOCK=2)
    assert y.tolist() == [1.0, -1.0], "Triton rounds now: store_as need not do it by hand"
    assert x.bfloat16().tolist() == [1 + 2.0**-7, -1 - 2.0**-7]


@facts
def test_fact_the_interpreter_gets_subnormal_bfloat16_wrong():
    x = torch.tensor([2.0**-127, 3 * 2.0**-128])
    y, back = torch.empty(2, dtype=torch.bfloat16), torch.empty(2)
    _cast_kernel[(1,)](x, y, 2, DTYPE=tl.bfloat16, BLOCK=2)
    assert not torch.equal(y.float(), x), "Triton converts them now: store_as can truncate"
    _cast_kernel[(1,)](x.bfloat16(), back, 2, DTYPE=tl.float32, BLOCK=2)
    assert not torch.equal(back, x), "Triton converts them now: load_as can leave it to Triton"


@facts
def test_fact_the_interpreter_cannot_add_bfloat16():
    x = torch.linspace(1, 2, 16, dtype=torch.bfloat16)
    total = torch.zeros(16, dtype=torch.bfloat16)
    _add_kernel[(1,)](x, x, total, BLOCK=16)
    assert not torch.equal(total, x + x), "bfloat16 arithmetic works now: load_as need not convert"


@facts
def test_fact_the_interpreter_cannot_multiply_bfloat16_matrices():
    a = torch.randn(16, 16).bfloat16()
    wrong = product(a, a, torch.zeros(16, 16), plain=True)
    assert not torch.allclose(wrong, a.float() @ a.float(), rtol=0.1), "dot need not convert now"


@facts
def test_fact_the_interpreter_knows_no_libdevice_and_no_assembly(tmp_path):
    script = textwrap.dedent("""
        import torch, triton, triton.language as tl
        from triton.language.extra import libdevice

        @triton.jit
        def with_libdevice(x_ptr):
            tl.store(x_ptr, libdevice.tanh(tl.load(x_ptr)))

        @triton.jit
        def with_assembly(x_ptr):
            x = tl.load(x_ptr)
            tl.store(x_ptr, tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1))

        for kernel in (with_libdevice, with_assembly):
            try:
                kernel[(1,)](torch.ones(1))
            except Exception:
                continue
            print(kernel, "works")
    """)
    # From a file: Triton reads the source of kernels.
    path = tmp_path / "script.py"
    path.write_text(script)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@facts
def test_fact_the_choice_is_made_at_import():
    assert type(_copy_kernel).__name__ == "InterpretedFunction"
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = (
        "import os; from segmenter_fast.ops import _triton; os.environ['TRITON_INTERPRET'] = '1'; "
        "print(_triton.INTERPRETED, type(_triton.load_as).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environ, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "JITFunction"], done.stderr


# ------------------------------------------------------------------------------- inside kernels
@on_device
@dtypes
def test_load_as_converts_exactly(dtype):
    x = torch.randn(1000).to(dtype)
    if dtype.itemsize == 2:  # every number that there is
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(dtype)
        x = x[~x.isnan()]
    assert torch.equal(copied(x, torch.float32), x.float())
    assert torch.equal(copied(x, torch.float64, via=tl.float64), x.double())


@on_device
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_what_is_masked_is_neither_read_nor_written(dtype):
    x = torch.randn(300).to(dtype)
    got = copied(x, dtype, via=_triton.accumulator(dtype), limit=200)
    assert torch.equal(got[:200], x[:200]) and bool((got[200:] == -1).all())


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store_as_rounds_to_nearest_even(dtype):
    torch.manual_seed(0)
    upper = torch.randint(-(2**31), 2**31 - 1, (3000,), dtype=torch.int32)
    ties = (upper & -65536) | 0x8000
    near = torch.cat([ties - 1, ties, ties + 1])
    x = torch.cat([upper, near]).view(torch.float32)
    limits = torch.finfo(dtype)
    special = [0.0, -0.0, float("inf"), -float("inf"), limits.max, limits.tiny, limits.tiny / 2]
    x = torch.cat([x[~x.isnan()], torch.tensor(special, dtype=torch.float32), torch.randn(100)])
    if dtype == torch.float16:
        x = x[(x.abs() < 65520) | x.isinf()]  # NumPy warns of those that round to infinity
    assert torch.equal(copied(x, dtype), x.to(dtype))


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store_as_keeps_nan(dtype):
    # Quiet, signalling, negative, and with a payload in the lowest bit alone.
    patterns = torch.tensor([0x7FC00000, 0x7FA00000, -1, 0x7F800001, 0x7FFFFFFF])
    x = patterns.to(torch.int32).view(torch.float32)
    assert bool(copied(x, dtype).isnan().all())


@on_device
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_dot_adds_to_the_accumulator(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(16, 64).to(dtype), torch.randn(64, 32).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    c = torch.randn(16, 32, dtype=wide)
    expected = c.double() + a.double() @ b.double()
    got = product(a, b, c, _triton.accumulator(dtype))
    error = (got.double() - expected).abs().max()
    # Products of 16-bit numbers are exact in float32, and float32 is not cut to TF32.
    assert error < 64 * 8 * torch.finfo(wide).eps


def test_accumulators():
    for dtype in DTYPES:
        assert _triton.accumulator(dtype) == tl.float32
    assert _triton.accumulator(torch.float64) == tl.float64


def test_next_power_of_2():
    sizes = (0, 1, 2, 3, 4, 5, 127, 128, 129, 2**20 + 1)
    assert [next_power_of_2(n) for n in sizes] == [1, 1, 2, 4, 4, 8, 128, 128, 256, 2**21]


# ------------------------------------------------------------------------------- configurations
def test_launch_options():
    options = Config({"BLOCK": 64}, num_warps=8, num_stages=3).options()
    # Newer Tritons fuse multiply-adds only when asked.
    assert options == {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    assert Config(maxnreg=128).options()["maxnreg"] == 128
    assert Config({"BLOCK": 64})["BLOCK"] == 64


SMALL, LARGE, HOPPER = (Config({"BLOCK": size}) for size in (64, 128, 512))
TABLE = Kernel(_copy_kernel, {"default": (SMALL, LARGE), 90: (HOPPER,)}, matrix=True)


def test_configurations_by_architecture():
    assert TABLE.candidates(90) == (HOPPER,)
    assert TABLE.candidates(80) == TABLE.candidates(120) == (SMALL, LARGE)
    assert TABLE.config(torch.ones(1)) is SMALL
    for arch, expected in ((90, HOPPER), (100, SMALL)):
        with Recorder(arch):
            assert TABLE.config(torch.ones(1)) is expected


def test_use_candidate():
    x = torch.ones(1)
    with use_candidate(1):
        assert TABLE.config(x) is LARGE
        with Recorder(90):
            assert TABLE.config(x) is HOPPER, "a kernel with fewer takes its last"
        with use_candidate(0):
            assert TABLE.config(x) is SMALL
        assert TABLE.config(x) is LARGE
    with pytest.raises(KeyError), use_candidate(5):
        assert TABLE.config(x) is LARGE
        raise KeyError
    assert TABLE.config(x) is SMALL


# ------------------------------------------------------------------------------- launches
def test_the_recorder_writes_launches_down():
    x, y = torch.zeros(3), torch.full((3,), 7.0)
    with Recorder(90) as recorder:
        launch(TABLE, (2, 3), TABLE.config(x), x, y, 3, 2, DTYPE=tl.float32)
    assert bool((y == 7).all()), "nothing runs"
    (made,) = recorder.launches
    assert (made.kernel, made.config, made.grid) == (TABLE, HOPPER, (2, 3))
    names = ["x_ptr", "y_ptr", "N", "limit", "DTYPE", "BLOCK"]
    assert sorted(made.arguments) == sorted(names)
    assert made.arguments["x_ptr"] is x and made.arguments["y_ptr"] is y
    values = {name: made.arguments[name] for name in names[2:]}
    assert values == {"N": 3, "limit": 2, "DTYPE": tl.float32, "BLOCK": 512}


def test_one_recorder_at_a_time():
    with Recorder(90), pytest.raises(RuntimeError, match="already"), Recorder(80):
        pass
    # An error ends the recording.
    with pytest.raises(KeyError), Recorder(90):
        raise KeyError
    with Recorder(80) as recorder:
        assert _triton._recorder is recorder
    assert _triton._recorder is None


@pytest.mark.parametrize("grid", [(0,), (0, 3), (3, 0), (1, 1, 0)])
def test_an_empty_grid_launches_nothing(grid):
    # Not even on a device that has no Triton.
    x = torch.ones(1)
    launch(TABLE, grid, SMALL, x, x, 1, 1, DTYPE=tl.float32)
    with Recorder(90) as recorder:
        launch(TABLE, grid, SMALL, x, x, 1, 1, DTYPE=tl.float32)
    assert not recorder.launches


@on_device
def test_launches_run():
    x = torch.randn(1000)
    assert torch.equal(copied(x, torch.float32), x)


def test_kernels_do_not_run_on_a_cpu_uninterpreted():
    x = torch.ones(1)
    with pytest.raises(BackendError, match=r"runs on a GPU; the input is on 'cpu'.*\.cuda\(\)"):
        launch(TABLE, (1,), SMALL, x, x, 1, 1, DTYPE=tl.float32)


def test_check_kind(monkeypatch):
    check_kind("cuda")
    for kind in ("cpu", "mps"):
        with pytest.raises(BackendError, match=f"the input is on '{kind}'"):
            check_kind(kind)
        with Recorder(90):
            check_kind(kind)
    monkeypatch.setattr(_triton, "INTERPRETED", True)
    check_kind("cpu")
    with pytest.raises(BackendError, match="the input is on 'mps'"):
        check_kind("mps")
    with pytest.raises(BackendError, match="the input is on 'mps'"):
        resolve_backend("triton", "mps")


# ------------------------------------------------------------------------------- without Triton
def test_without_triton_the_package_imports_and_says_what_to_install():
    script = textwrap.dedent("""
        import sys
        sys.modules["triton"] = None  # as if it were not installed

        import torch
        from segmenter_fast.backend import BackendError
        from segmenter_fast.ops import _triton
        from segmenter_fast.ops.upsample_argmax import upsample_argmax

        logits = torch.randn(1, 3, 2, 2)
        assert upsample_argmax(logits, (8, 8), backend="reference").shape == (1, 8, 8)
        for call in (
            lambda: upsample_argmax(logits, (8, 8), backend="triton"),
            lambda: torch.ops.segmenter_fast.upsample_argmax_triton(logits, (8, 8), (0, 0, 8, 8)),
            lambda: _triton.find_tool("cuobjdump"),
        ):
            try:
                call()
            except BackendError as error:
                assert "pip install triton" in str(error), error
            else:
                raise AssertionError("no error")
        assert len(_triton.operations()) >= 2
    """)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_line_says_what_to_install():
    script = (
        "import sys; sys.modules['triton'] = None; from segmenter_fast.cli import main; "
        "main(['kernels'])"
    )
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environ, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("error: backend 'triton' needs")
    assert "pip install triton" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------- the compiler
@pytest.fixture
def make_ptxas(tmp_path):
    """make_ptxas("13.0") writes a program that says it is that version."""

    def make(version, name="ptxas", folder="bin"):
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        text = f"Cuda compilation tools, release {version}, V{version}.88"
        path.write_text(
            f"#!/bin/sh\necho 'ptxas: NVIDIA (R) Ptx optimizing assembler'\necho '{text}'\n"
        )
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def without_ptxas(monkeypatch):
    """No ptxas on PATH, and none asked for."""
    monkeypatch.setenv("PATH", "")
    for variable in _triton.PTXAS_VARIABLES:
        # Set, then deleted: so that what check_ptxas sets is undone.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)


def check(arch=90):
    """`check_ptxas` without its memory."""
    _triton.check_ptxas.__wrapped__(arch)


def test_ptxas_versions(make_ptxas, tmp_path):
    assert _triton.ptxas_version(make_ptxas("12.8")) == (12, 8)
    assert _triton.ptxas_version(str(tmp_path / "absent")) == (0, 0)
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\n")
    silent.chmod(0o755)
    assert _triton.ptxas_version(str(silent)) == (0, 0)


@pytest.mark.parametrize(
    ("version", "good"),
    [("12.8", False), ("12.9", False), ("13.0", False), ("13.1", True), ("14.0", True)],
)
def test_ptxas_that_miscompiles_is_refused(version, good, make_ptxas, without_ptxas, monkeypatch):
    chosen = make_ptxas(version)
    monkeypatch.setattr(_triton, "ptxas_of_triton", lambda arch: chosen)
    # Only Hopper has the instructions.
    for arch in (80, 86, 89, 100):
        check(arch)
    if good:
        check()
    else:
        with pytest.raises(BackendError) as caught:
            check()
        for part in (
            f"ptxas {version} ({chosen})",
            "13.1 or newer",
            "triton >= 3.9",
            "TRITON_PTXAS_PATH",
        ):
            assert part in str(caught.value)


@pytest.mark.parametrize("where", ["beside", "on PATH"])
def test_a_good_ptxas_is_found_and_taken(where, make_ptxas, without_ptxas, monkeypatch):
    old = make_ptxas("12.8")
    if where == "beside":
        good = make_ptxas("13.2", "ptxas-blackwell")
    else:
        make_ptxas("13.0", "ptxas-blackwell")
        good = make_ptxas("13.2", folder="toolkit")
        monkeypatch.setenv("PATH", str(Path(good).parent))
    monkeypatch.setattr(_triton, "ptxas_of_triton", lambda arch: old)
    check()
    assert os.environ["TRITON_PTXAS_PATH"] == good


@pytest.mark.parametrize(("version", "good"), [("13.0", False), ("13.1", True)])
def test_the_ptxas_that_was_asked_for_is_checked(
    version, good, make_ptxas, without_ptxas, monkeypatch
):
    asked = make_ptxas(version)
    # A good one on PATH does not count: what the user chose is used, or refused.
    monkeypatch.setenv("PATH", str(Path(make_ptxas("13.4", folder="toolkit")).parent))
    for variable in _triton.PTXAS_VARIABLES:
        monkeypatch.setenv(variable, asked)
    assert _triton.ptxas_of_triton(90) == asked, "Triton reads the variables"
    if good:
        check()
    else:
        with pytest.raises(BackendError, match=r"ptxas 13\.0"):
            check()
    assert os.environ["TRITON_PTXAS_PATH"] == asked


def test_tools_are_found(monkeypatch):
    for name in ("cuobjdump", "nvdisasm"):
        assert os.access(_triton.find_tool(name), os.X_OK)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BackendError, match=r"no-tool was found neither .* CUDA toolkit"):
        _triton.find_tool("no-tool")
