"""What was built, and what a machine without a compiler is told."""

import importlib.util
import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from segmenter_fast import _C

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.fixture(scope="module")
def setup_script():
    if not SETUP.exists():
        pytest.skip("only in a source tree")
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("segmenter_fast_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def test_build_info():
    info = _C.build_info()
    assert info["version"] == version("segmenter_fast")
    assert info["compiler"] and re.match(r"\d+\.", info["compiler_version"])
    assert info["build_type"] == "Release"
    assert info["cxx_standard"] == 17
    # A version where CUDA C++ was compiled in, and then what for.
    assert info["cuda"] is None or re.match(r"\d+\.\d+", info["cuda"])
    assert bool(info["cuda_architectures"]) == (info["cuda"] is not None) == hasattr(_C, "cuda")
    assert all(re.fullmatch(r"\d{2,3}[af]?", name) for name in info["cuda_architectures"])
    if platform.machine() in {"x86_64", "AMD64"} and sys.platform != "darwin":
        assert info["simd_levels"] == [
            "generic",
            "avx2",
            "avx512",
            "avx512_vnni",
            "avx512_bf16",
        ]
    else:
        assert info["simd_levels"][0] == "generic"


def test_simd_level_is_the_best_this_cpu_has(monkeypatch):
    monkeypatch.delenv("SEGMENTER_FAST_SIMD", raising=False)
    chosen = _C.simd_level()
    levels = _C.build_info()["simd_levels"]
    monkeypatch.setenv("SEGMENTER_FAST_SIMD", "generic")
    assert _C.simd_level() == "generic"
    for better in levels[levels.index(chosen) + 1 :]:
        monkeypatch.setenv("SEGMENTER_FAST_SIMD", better)
        with pytest.raises(RuntimeError, match="this CPU lacks that level"):
            _C.simd_level()


def test_unknown_simd_level_is_refused(monkeypatch):
    monkeypatch.setenv("SEGMENTER_FAST_SIMD", "sse9")
    with pytest.raises(ValueError, match=r'one of generic, avx2, avx512, .*; got "sse9"'):
        _C.simd_level()


def test_no_compiler_says_what_to_install(setup_script):
    with pytest.raises(setup_script.CompileError) as caught:
        setup_script.find_cxx_compiler({"PATH": ""})
    message = str(caught.value)
    for part in (
        "c++, g++, clang++",
        "CXX is not set",
        "apt install g++",
        "dnf install gcc-c++",
        "xcode-select --install",
    ):
        assert part in message


def test_missing_cxx_is_named(setup_script):
    with pytest.raises(setup_script.CompileError, match="looked for: CXX=no-such-compiler -m64"):
        setup_script.find_cxx_compiler({"CXX": "no-such-compiler -m64", "PATH": os.defpath})


def test_compiler_that_does_not_start_is_not_taken(setup_script, tmp_path):
    def program(name, status):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\nexit {status}\n")
        path.chmod(0o755)
        return str(path)

    program("c++", 1)
    works = program("clang++", 0)
    assert setup_script.find_cxx_compiler({"PATH": str(tmp_path)}) == [works]
    assert setup_script.find_cxx_compiler({"PATH": "", "CXX": f"{works} -m64"}) == [works, "-m64"]


# ------------------------------------------------------------------------------- CUDA C++
KNOWS_TWO = """case "$*" in
  *gencode*80* | *gencode*90a*) exit 0 ;;
  *gencode*) exit 1 ;;
esac"""


@pytest.fixture
def make_nvcc(tmp_path):
    """make_nvcc(folder) writes one that compiles anything, but for sm_80 and sm_90a alone."""

    def make(
        folder,
        script='case "$*" in *gencode*) case "$*" in *_80*|*_90a*) ;; *) exit 1;; esac;; esac',
    ):
        nvcc = tmp_path / folder / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\n{script}\n")
        nvcc.chmod(0o755)
        return str(nvcc)

    return make


def test_nvcc_is_found(setup_script, make_nvcc, tmp_path):
    on_path, other = make_nvcc("path"), make_nvcc("home/bin")
    cuda_home = str(tmp_path / "home")
    for environ, expected in (
        ({"PATH": str(tmp_path / "path")}, on_path),
        ({"PATH": "", "CUDA_HOME": cuda_home}, other),
        ({"PATH": str(tmp_path / "path"), "CUDA_HOME": cuda_home}, on_path),
        ({"PATH": str(tmp_path / "path"), "CUDACXX": other}, other),
        ({"PATH": "", "CUDACXX": on_path, "SEGMENTER_FAST_CUDA": "1"}, on_path),
    ):
        found = setup_script.find_cuda(environ, "g++")
        assert (found.nvcc, found.architectures) == (expected, ("80", "90a"))


def test_cuda_architectures(setup_script, make_nvcc):
    nvcc = make_nvcc("path")

    def find(text):
        environ = {"PATH": "", "CUDACXX": nvcc, "SEGMENTER_FAST_CUDA_ARCHS": text}
        return setup_script.find_cuda(environ, "g++").architectures

    assert find("90a") == ("90a",)
    assert find("90a; 80,90a ") == ("90a", "80")
    with pytest.raises(setup_script.CompileError, match=r"does not know sm_89, sm_100.*=80;89;100"):
        find("80;89;100")
    with pytest.raises(setup_script.CompileError, match="such as 80;90a, got 'sm_80'"):
        find("sm_80")


def test_cuda_is_left_out(setup_script, make_nvcc, capfd):
    broken = make_nvcc("broken", "echo 'error: unsupported GNU version!' >&2; exit 1")
    knows_nothing = make_nvcc("old", 'case "$*" in *gencode*) exit 1;; esac')
    assert setup_script.find_cuda({"PATH": ""}, "g++") is None
    assert "nvcc (PATH): not found" in capfd.readouterr().out
    assert setup_script.find_cuda({"PATH": "", "CUDACXX": broken}, "g++") is None
    assert "cannot compile with g++: error: unsupported GNU" in capfd.readouterr().out
    assert setup_script.find_cuda({"PATH": "", "CUDACXX": knows_nothing}, "g++") is None
    assert "knows none of sm_80, sm_86, sm_89, sm_90a, sm_100" in capfd.readouterr().out
    off = {"PATH": "", "CUDACXX": make_nvcc("good"), "SEGMENTER_FAST_CUDA": "0"}
    assert setup_script.find_cuda(off, "g++") is None


def test_required_cuda_says_what_was_looked_for(setup_script, make_nvcc):
    broken = make_nvcc("broken", "echo 'error: unsupported GNU version!' >&2; exit 1")
    for environ, parts in (
        ({}, ("nvcc (PATH): not found", "CUDA_HOME is not set", "SEGMENTER_FAST_CUDA=0")),
        ({"CUDA_HOME": "/nowhere"}, ("nvcc (CUDA_HOME): not found", "Install a CUDA toolkit")),
        ({"CUDACXX": "no-nvcc"}, ("no-nvcc (CUDACXX): not found", "point CUDACXX")),
        ({"CUDACXX": broken}, ("(CUDACXX): cannot compile with /bin/g++-99", "unsupported GNU")),
    ):
        with pytest.raises(setup_script.CompileError) as caught:
            setup_script.find_cuda(
                {"PATH": "", "SEGMENTER_FAST_CUDA": "1"} | environ, "/bin/g++-99"
            )
        for part in parts:
            assert part in str(caught.value)


@pytest.mark.parametrize("value", ["", "yes", "2", "ON"])
def test_unknown_cuda_choice_is_refused(setup_script, value):
    with pytest.raises(setup_script.CompileError, match=f'"auto", "0" or "1", got {value!r}'):
        setup_script.find_cuda({"PATH": "", "SEGMENTER_FAST_CUDA": value}, "g++")
