"""Labels in CUDA C++, called directly so that no other code can stand in for the kernel."""

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from checks import assert_labels
from cuda_cases import if_built, if_no_gpu, on_gpu
from dense_cases import STRIDED_LAYOUTS, bad_geometry, noise, shapes, strided_as
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_cases import dtypes

from segmenter_fast import _C
from segmenter_fast.backend import BackendError
from segmenter_fast.ops import _cuda

ARGMAX = torch.ops.segmenter_fast.upsample_argmax_cuda
CSRC = Path(__file__).parents[1] / "csrc"


def labels_of(logits, size, crop=None):
    return ARGMAX(logits.cuda(), size, crop or (0, 0, *size)).cpu()


def native_labels(logits, size, crop=None):
    return torch.ops.segmenter_fast.upsample_argmax(logits, size, crop or (0, 0, *size))


# ------------------------------------------------------------------------------- on a GPU
@on_gpu
@dtypes
@shapes
def test_matches_reference(case, dtype):
    shape, size, crop = case
    logits = noise(shape, dtype)
    labels = labels_of(logits, size, crop)
    assert_labels(labels, logits, size, crop)
    assert torch.equal(labels, native_labels(logits, size, crop))


@on_gpu
@shapes
def test_float64_is_as_exact_as_its_input(case):
    shape, size, crop = case
    logits = noise(shape, torch.float64) * 1e-9 + 1  # all equal in float32
    labels = labels_of(logits, size, crop)
    assert_labels(labels, logits, size, crop)
    assert torch.equal(labels, native_labels(logits, size, crop))


@on_gpu
@pytest.mark.parametrize("n_cls", [31, 32, 33, 600, 1500, 5000, 40_000])
def test_many_classes(n_cls):
    """Fewer cells share a block's memory, and from some number on none fits."""
    logits = noise((1, n_cls, 3, 4))
    assert torch.equal(labels_of(logits, (21, 34)), native_labels(logits, (21, 34)))


@on_gpu
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("k", [0, 36])
def test_special_values_as_on_the_cpu(value, k):
    logits = noise((1, 37, 3, 9))
    logits[0, k, 1, 2] = value
    for size in ((40, 50), (3, 50), (40, 9), (3, 9)):
        assert torch.equal(labels_of(logits, size), native_labels(logits, size))


@on_gpu
def test_the_first_class_wins_ties():
    logits = torch.zeros(1, 40, 2, 2)
    assert (labels_of(logits, (20, 20)) == 0).all()
    logits[:, 33:] = 1.0  # in the second round of lanes
    assert (labels_of(logits, (20, 20)) == 33).all()


@on_gpu
def test_every_class_wins_somewhere():
    logits = torch.eye(96).reshape(1, 96, 8, 12) * 9
    labels = labels_of(logits, (128, 192))
    assert set(labels.unique().tolist()) == set(range(96))
    assert torch.equal(labels, native_labels(logits, (128, 192)))


@on_gpu
def test_any_geometry():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        draw = torch.randint(1, 40, (8,), generator=generator).tolist()
        h, w, H, W = draw[0], draw[1], draw[2] * 3, draw[3] * 3
        crop = (draw[4] % H, draw[5] % W)
        crop = (*crop, max(1, (H - crop[0]) // 2), W - crop[1])
        logits = noise((2, draw[6], h, w)) * (draw[7] % 3)
        assert torch.equal(labels_of(logits, (H, W), crop), native_labels(logits, (H, W), crop))


@on_gpu
@pytest.mark.parametrize("layout", STRIDED_LAYOUTS)
def test_strided_inputs(layout):
    shown = strided_as(layout, noise((2, 5, 4, 3)).cuda())
    assert torch.equal(
        labels_of(shown, (30, 22)), native_labels(shown.cpu().contiguous(), (30, 22))
    )


@on_gpu
def test_empty():
    assert labels_of(noise((2, 3, 2, 2))[:0], (8, 8)).shape == (0, 8, 8)


@on_gpu
def test_opcheck():
    logits = noise((1, 5, 2, 3)).cuda()
    torch.library.opcheck(ARGMAX, (logits, (9, 14), (1, 2, 5, 7)))


@on_gpu
def test_compile_fullgraph():
    logits = noise((1, 5, 2, 3)).cuda()
    function = torch.compile(
        lambda x: ARGMAX(x * 2, (9, 14), (0, 0, 9, 14)), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(function(logits).cpu(), labels_of(logits, (9, 14)))


@on_gpu
def test_graph_capture_and_streams():
    logits = noise((1, 5, 6, 7)).cuda()
    expected = labels_of(logits, (60, 70))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        labels = ARGMAX(logits, (60, 70), (0, 0, 60, 70))
    labels.zero_()
    graph.replay()
    assert torch.equal(labels.cpu(), expected)


@on_gpu
@bad_geometry
def test_rejects_bad_input(logits, size, crop, error, text):
    if not isinstance(logits, torch.Tensor) or size == 8 or 8.0 in size:
        pytest.skip("refused by the operator's schema")
    with pytest.raises(error, match=text):
        ARGMAX(logits.cuda(), size, crop or (0, 0, *size))


# ------------------------------------------------------------------------------- without a GPU
@pytest.mark.parametrize(("n_cls", "dtype"), [(256, torch.uint8), (257, torch.int16)])
def test_fake(n_cls, dtype):
    with FakeTensorMode():
        logits = torch.empty(2, n_cls, 3, 4, device="cuda", dtype=torch.float16)
        labels = ARGMAX(logits, (9, 14), (1, 2, 5, 7))
    assert (labels.shape, labels.dtype) == ((2, 5, 7), dtype)
    assert labels.device.type == "cuda"


def test_is_for_gpus_alone():
    with pytest.raises(NotImplementedError, match="'CPU' backend"):
        ARGMAX(noise((1, 5, 2, 3)), (9, 14), (0, 0, 9, 14))


def test_build_without_cuda_says_how_to_build(monkeypatch):
    monkeypatch.setattr(_cuda, "native_module", lambda: object())
    with pytest.raises(BackendError, match="SEGMENTER_FAST_CUDA=1 pip install -e"):
        _cuda.cuda_module()


GOOD = {
    "logits_ptr": 16, "dtype": "float32", "shape": (1, 3, 2, 2), "strides": (12, 4, 2, 1),
    "size": (8, 8), "crop": (0, 0, 8, 8), "out_ptr": 16, "out_dtype": "uint8", "device": 0,
    "stream": 0,
}  # fmt: skip


@if_built
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtype": "int8"}, '"bfloat16", "float16", "float32", "float64", got "int8"'),
        ({"out_dtype": "int64"}, 'out_dtype: expected one of .*, got "int64"'),
        ({"shape": (1, 0, 2, 2)}, r"K, h, w >= 1, got \(1, 0, 2, 2\)"),
        ({"shape": (1, 257, 2, 2)}, "at most 256 classes for this type of label, got 257"),
        ({"size": (0, 8)}, "size .* >= 1"),
        ({"size": (8, 2**30)}, r"sides below 2\^30, got \(2, 2, 8, 1073741824\)"),
        ({"crop": (0, 0, 9, 8)}, r"inside size \(8, 8\), got \(0, 0, 9, 8\)"),
        ({"logits_ptr": 0}, "pointer to logits, got null"),
        ({"out_ptr": 0}, "pointer to labels, got null"),
    ],
)
def test_kernel_rejects_bad_input(change, text):
    with pytest.raises(ValueError, match=text):
        _C.cuda.upsample_argmax(**(GOOD | change))


@if_built
def test_empty_output_needs_no_gpu():
    _C.cuda.upsample_argmax(**(GOOD | {"shape": (0, 3, 2, 2), "out_ptr": 0, "logits_ptr": 0}))


@if_built
@if_no_gpu
def test_failed_launch_says_what_cuda_says():
    with pytest.raises(RuntimeError, match=r'upsample_argmax: CUDA says ".+" \(cudaError\w+\)'):
        _C.cuda.upsample_argmax(**GOOD)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.skipif(not CSRC.exists(), reason="only in a source tree")
def test_geometry_compiled_by_nvcc_is_the_cpus(tmp_path):
    """The header that both include gives the same bits, on the host; and device code takes it."""
    source = tmp_path / "geometry.cu"
    source.write_text(
        f"""
        #include <cstdio>
        #include "{CSRC}/cell.h"
        using namespace segmenter;
        template <typename T>
        __global__ void on_device(T* x) {{
          const Source<T> s = source_index<T>(threadIdx.x, 7, 113);
          *x = keep_ties(blend(s.w0, s.w1, *x, *x), 4, T(1e-7), T(1e-30));
        }}
        template __global__ void on_device(float*);
        template __global__ void on_device(double*);
        template <typename T>
        void print(long in, long out) {{
          for (long i = 0; i < out; ++i) {{
            const Source<T> s = source_index<T>(i, in, out);
            std::printf("%ld %ld %a %a\\n", long(s.i0), long(s.i1), double(s.w0), double(s.w1));
          }}
        }}
        int main() {{
          print<float>(7, 113), print<float>(32, 512), print<float>(40, 11);
          print<double>(7, 113), print<double>(9, 9);
        }}"""
    )
    program = tmp_path / "geometry"
    built = subprocess.run(
        ["nvcc", "-std=c++17", "-cudart=static", "-Xcompiler=-ffp-contract=off", str(source),
         "-o", str(program)],
        capture_output=True, text=True,
    )  # fmt: skip
    if built.returncode and re.search(r"unsupported|host compiler", built.stderr):
        pytest.skip("nvcc does not work with this machine's compiler")
    assert built.returncode == 0, built.stderr
    lines = subprocess.run([program], capture_output=True, text=True).stdout.splitlines()
    expected = [
        f"{i0} {i1} {float(w0).hex()} {float(w1).hex()}"
        for dtype, sides in (
            ("float32", ((7, 113), (32, 512), (40, 11))),
            ("float64", ((7, 113), (9, 9))),
        )
        for side in sides
        for i0, i1, w0, w1 in _C.source_indices(*side, dtype)
    ]

    def numbers(line):
        return [float.fromhex(word) for word in line.split()]

    assert [numbers(line) for line in lines] == [numbers(line) for line in expected]
