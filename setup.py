"""Builds the compiled kernels: csrc/ becomes segmenter_fast._C by way of CMake and ninja.

Everything else about the package is in pyproject.toml.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")

CUDA_ARCHITECTURES = ("80", "86", "89", "90a", "100")
"""GPUs to compile CUDA C++ for, as far as nvcc knows them: 90a for sm_90a."""

CUDA_TRIAL = """
#include <cmath>
__global__ void trial(float* x) { *x = std::floor(*x); }
int launch(float* x) { trial<<<1, 1>>>(x); return cudaGetLastError(); }
"""


def find_cxx_compiler(environ: Mapping[str, str]) -> list[str]:
    """Finds a C++ compiler that starts.

    Args:
        environ: environment variables; CXX, which may carry arguments, comes before the compilers
            on PATH.

    Returns:
        The command as a list, its first entry an absolute path.

    Raises:
        CompileError: none was found; says what was looked for and what to install.
    """
    path = environ.get("PATH", "")
    cxx = shlex.split(environ.get("CXX", ""))
    candidates = [cxx] if cxx else [[name] for name in COMPILERS]
    for program, *arguments in candidates:
        found = shutil.which(program, path=path)
        # On macOS c++ exists without the developer tools, and only says that they are missing.
        if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
            return [os.path.abspath(found), *arguments]
    looked_for = f"CXX={environ['CXX']}" if cxx else ", ".join(COMPILERS) + " (CXX is not set)"
    raise CompileError(
        "segmenter_fast compiles its CPU kernels when it is installed, and no working C++ compiler "
        f"was found.\n"
        f"  looked for: {looked_for}\n"
        f"  on PATH:    {path or '(empty)'}\n"
        "Install one and run the same command again:\n"
        "  Debian, Ubuntu:  sudo apt install g++\n"
        "  Fedora, RHEL:    sudo dnf install gcc-c++\n"
        "  macOS:           xcode-select --install\n"
        "or set CXX to a compiler that supports C++17."
    )


@dataclass(frozen=True)
class Cuda:
    """A CUDA compiler and what to compile for.

    Args:
        nvcc: absolute path.
        architectures: such as "80" or "90a".
    """

    nvcc: str
    architectures: tuple[str, ...]


def find_cuda(environ: Mapping[str, str], cxx: str) -> Cuda | None:
    """Finds an nvcc that works with the C++ compiler, as SEGMENTER_FAST_CUDA asks.

    Args:
        environ: environment variables. SEGMENTER_FAST_CUDA is "auto" (the default: CUDA C++ is
            compiled if such an nvcc is found), "1" (required) or "0" (left out).
            SEGMENTER_FAST_CUDA_ARCHS lists architectures, such as "80;90a"; the default is those of
            CUDA_ARCHITECTURES that nvcc knows. CUDACXX comes before PATH, and that before
            CUDA_HOME.
        cxx: the C++ compiler.

    Returns:
        What to compile with; None if CUDA C++ is left out.

    Raises:
        CompileError: a variable has a value that makes no sense, nvcc is required and none was
            found, it does not know an architecture that was asked for.
    """
    mode = environ.get("SEGMENTER_FAST_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise CompileError(f'SEGMENTER_FAST_CUDA must be "auto", "0" or "1", got {mode!r}')
    if mode == "0":
        return None
    wanted = _wanted_architectures(environ)
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        for source, nvcc in _nvcc_candidates(environ):
            found = shutil.which(nvcc, path=environ.get("PATH", ""))
            problem = _try_nvcc(found, cxx, folder) if found else "not found"
            if problem is None:
                known = [a for a in wanted or CUDA_ARCHITECTURES if _knows(found, a, folder)]
                unknown = [a for a in wanted if a not in known]
                if unknown:
                    raise CompileError(
                        f"{found} does not know sm_{', sm_'.join(unknown)}, which "
                        f"SEGMENTER_FAST_CUDA_ARCHS={environ['SEGMENTER_FAST_CUDA_ARCHS']} asks "
                        "for; take another list or a newer CUDA toolkit"
                    )
                if known:
                    return Cuda(os.path.abspath(found), tuple(known))
                problem = f"knows none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}"
            problems.append(f"{nvcc} ({source}): {problem}")
    looked_for = "\n".join(f"  looked for: {problem}" for problem in problems)
    if mode == "1":
        raise CompileError(
            "SEGMENTER_FAST_CUDA=1 asks for CUDA C++, and no nvcc was found that works with the "
            f"C++ compiler {cxx}.\n{looked_for}\n"
            "Install a CUDA toolkit (https://developer.nvidia.com/cuda-downloads) that supports "
            "this compiler,\n"
            "point CUDACXX at its nvcc or CUDA_HOME at its folder, or set CXX to another compiler;"
            "\nor build without CUDA C++: SEGMENTER_FAST_CUDA=0"
        )
    print(f"segmenter_fast is built without CUDA C++: no nvcc that works.\n{looked_for}")
    return None


def _wanted_architectures(environ: Mapping[str, str]) -> list[str]:
    text = environ.get("SEGMENTER_FAST_CUDA_ARCHS", "")
    wanted = list(dict.fromkeys(re.split(r"[;,\s]+", text.strip(";, ")))) if text else []
    for architecture in wanted:
        if not re.fullmatch(r"\d{2,3}[af]?", architecture):
            raise CompileError(
                "SEGMENTER_FAST_CUDA_ARCHS must list architectures such as 80;90a, got "
                f"{architecture!r} in {text!r}"
            )
    return wanted


def _nvcc_candidates(environ: Mapping[str, str]) -> Sequence[tuple[str, str]]:
    """(where it comes from, name or path), in the order in which they are tried."""
    if environ.get("CUDACXX"):
        return [("CUDACXX", environ["CUDACXX"])]
    candidates = [("PATH", "nvcc")]
    if environ.get("CUDA_HOME"):
        candidates.append(("CUDA_HOME", os.path.join(environ["CUDA_HOME"], "bin", "nvcc")))
    else:
        candidates.append(("CUDA_HOME is not set", "$CUDA_HOME/bin/nvcc"))
    return candidates


def _try_nvcc(nvcc: str, cxx: str, folder: str) -> str | None:
    """Compiles and links a kernel; returns what went wrong, or None."""
    source = Path(folder) / "trial.cu"
    source.write_text(CUDA_TRIAL)
    options = ["-std=c++17", "-shared", "-Xcompiler=-fPIC", "-cudart=static", "-ccbin", cxx]
    command = [nvcc, *options, str(source), "-o", str(source.with_suffix(".so"))]
    try:
        tried = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return f"does not start ({error})"
    if tried.returncode == 0:
        return None
    lines = (tried.stderr or tried.stdout).strip().splitlines()
    errors = [line for line in lines if "error" in line.lower()] or lines[-1:]
    return f"cannot compile with {cxx}: {errors[0] if errors else f'status {tried.returncode}'}"


def _knows(nvcc: str, architecture: str, folder: str) -> bool:
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, "-gencode", code, "--dryrun", "-c", str(Path(folder) / "trial.cu")]
    return subprocess.run(command, capture_output=True).returncode == 0


class CMakeBuild(build_ext):
    """Hands each extension to CMake; setuptools then puts it where wheel or editable need it."""

    def build_extension(self, ext: Extension) -> None:
        """Configures and builds the CMake project of `ext`."""
        # Build requirements, so absent when setup.py only answers questions.
        import cmake
        import ninja
        import pybind11

        compiler = find_cxx_compiler(os.environ)
        cuda = find_cuda(os.environ, compiler[0])
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / "cmake"
        cmake_program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
        ninja_program = Path(ninja.BIN_DIR) / "ninja"
        configure = [
            cmake_program,
            # pip builds in a new environment each time: no path of the last one may be remembered.
            "--fresh",
            *("-S", ROOT, "-B", build_dir, "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={ninja_program}",
            f"-DCMAKE_CXX_COMPILER={';'.join(compiler)}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSEGMENTER_VERSION={self.distribution.get_version()}",
            f"-DSEGMENTER_SANITIZE={os.environ.get('SEGMENTER_FAST_SANITIZE', '')}",
            f"-DSEGMENTER_CUDA_COMPILER={cuda.nvcc if cuda else ''}",
            f"-DSEGMENTER_CUDA_ARCHS={';'.join(cuda.architectures if cuda else ())}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake_program, "--build", build_dir], check=True)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("segmenter_fast._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )
