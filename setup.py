"""Builds the compiled kernels: csrc/ becomes segmenter_fast._C by way of CMake and ninja.

Everything else about the package is in pyproject.toml.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")


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


class CMakeBuild(build_ext):
    """Hands each extension to CMake; setuptools then puts it where wheel or editable need it."""

    def build_extension(self, ext: Extension) -> None:
        """Configures and builds the CMake project of `ext`."""
        # Build requirements, so absent when setup.py only answers questions.
        import cmake
        import ninja
        import pybind11

        compiler = find_cxx_compiler(os.environ)
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
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake_program, "--build", build_dir], check=True)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("segmenter_fast._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )
