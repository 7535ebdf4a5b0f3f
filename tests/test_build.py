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
    spec.loader.exec_module(module)
    return module


def test_build_info():
    info = _C.build_info()
    assert info["version"] == version("segmenter_fast")
    assert info["compiler"] and re.match(r"\d+\.", info["compiler_version"])
    assert info["build_type"] == "Release"
    assert info["cxx_standard"] == 17
    assert info["cuda"] is False
    if platform.machine() in {"x86_64", "AMD64"} and sys.platform != "darwin":
        assert info["simd_levels"] == ["generic", "avx2", "avx512"]
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
    with pytest.raises(ValueError, match='must be generic, avx2 or avx512, got "sse9"'):
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
