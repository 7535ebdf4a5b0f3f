"""What compiled GPU code uses, read from the binary: registers, spills, instructions, occupancy.

Needs `cuobjdump` and `nvdisasm`, which Triton's wheel carries, but neither a GPU nor a driver.
"""

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from segmenter_fast.backend import BackendError, native_module
from segmenter_fast.ops._triton import find_tool


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor has. Sizes of shared memory in bytes."""

    warps: int
    blocks: int
    shared: int
    shared_per_block: int
    registers: int = 65536


LIMITS = {
    80: Limits(warps=64, blocks=32, shared=164 << 10, shared_per_block=163 << 10),
    86: Limits(warps=48, blocks=16, shared=100 << 10, shared_per_block=99 << 10),
    89: Limits(warps=48, blocks=24, shared=100 << 10, shared_per_block=99 << 10),
    90: Limits(warps=64, blocks=32, shared=228 << 10, shared_per_block=227 << 10),
    100: Limits(warps=64, blocks=32, shared=228 << 10, shared_per_block=227 << 10),
}
"""By compute capability. Source: CUDA C++ Programming Guide, "Compute Capabilities", table
"Technical Specifications per Compute Capability"."""

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
NVCC_OPTIONS = ("-std=c++17", "--fmad=false")  # as in CMakeLists.txt

WARP = 32
# How they are handed out since sm_80, as in NVIDIA's occupancy calculator: registers to a warp, in
# 256s, from four equal parts of the register file; shared memory to a block, in 128s, of which the
# system takes 1024 bytes.
REGISTER_UNIT, PARTITIONS = 256, 4
SHARED_UNIT, SHARED_BY_SYSTEM = 128, 1024

# HMMA, IMMA, ... are mma.sync; HGMMA, ... Hopper's wgmma; UTCHMMA, ... Blackwell's tcgen05.mma.
TENSOR_CORE = re.compile(r"[BDHIOQ]MMA|[BHIQ]GMMA|UTC[A-Z]*MMA")
TMA = re.compile(r"UTMALDG|UTMASTG|UTMAREDG|UBLKCP|UBLKRED")
# Instructions that read or write local memory, which is where spilled registers go.
LOCAL = re.compile(r"LDL|STL")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)")


@dataclass(frozen=True)
class Usage:
    """What one kernel uses.

    Args:
        registers: of a thread.
        spilled: bytes that a thread moves to and from local memory, each instruction counted once.
        shared: bytes of a block.
        threads: most that a block may have.
        instructions: how many there are.
        tensor_core: those that multiply matrices, counted by name.
        tma: copies by the tensor memory accelerator.
    """

    registers: int
    spilled: int
    shared: int
    threads: int
    instructions: int
    tensor_core: tuple[tuple[str, int], ...]
    tma: int

    def with_dynamic(self, shared: int) -> "Usage":
        """The same with shared memory that is asked for at launch."""
        return replace(self, shared=self.shared + shared)


def occupancy(usage: Usage, arch: int) -> float:
    """Share of a multiprocessor's warps that can be in flight; 0.0 if not even one block fits."""
    limits = LIMITS[arch]
    warps = -(-usage.threads // WARP)
    of_warp = _round_up(usage.registers * WARP, REGISTER_UNIT)
    by_registers = limits.registers // PARTITIONS // of_warp * PARTITIONS // warps
    by_shared = limits.shared // _round_up(usage.shared + SHARED_BY_SYSTEM, SHARED_UNIT)
    blocks = min(limits.blocks, limits.warps // warps, by_registers, by_shared)
    return blocks * warps / limits.warps


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def read_cubin(path: Path, arch: int) -> dict[str, Usage]:
    """Usage of every kernel in a cubin, by its (mangled) name.

    Args:
        path: of the file.
        arch: compute capability that it was compiled for, 90 for sm_90.

    Raises:
        BackendError: the tools are absent, or cannot read the file.
    """
    return parse(
        _output("cuobjdump", "-res-usage", path),
        _output("cuobjdump", "-elf", path),
        _output("nvdisasm", "-c", path),
        arch,
    )


def parse(resources: str, elf: str, code: str, arch: int) -> dict[str, Usage]:
    """`read_cubin` of what the tools print.

    Args:
        resources: of `cuobjdump -res-usage`.
        elf: of `cuobjdump -elf`.
        code: of `nvdisasm -c`.
        arch: compute capability.
    """
    threads = {
        name: int(value, 16)
        for name, info in re.findall(r"^\.nv\.info\.(\S+)\n(.*?)(?=^\.|\Z)", elf, re.M | re.S)
        for value in re.findall(
            r"EIATTR_(?:MAX_THREADS|REQNTID)\n.*\n\s*Value:\s*(0x[0-9a-f]+)", info
        )
    }
    listings = dict(
        re.findall(r"\.section\s+\.text\.(\S+?),.*?\n(.*?)(?=\.section\s|\Z)", code, re.S)
    )
    usages = {}
    for name, registers, shared in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", resources
    ):
        instructions = INSTRUCTION.findall(listings[name])
        names = Counter(opcode for opcode, _ in instructions)
        usages[name] = Usage(
            registers=int(registers),
            spilled=sum(_width(suffix) for opcode, suffix in instructions if LOCAL.match(opcode)),
            # Since sm_90 the figure includes what the system takes.
            shared=max(0, int(shared) - (SHARED_BY_SYSTEM if arch >= 90 else 0)),
            # A kernel without bounds may be launched with the most that there can be.
            threads=threads.get(name, 1024),
            instructions=names.total(),
            tensor_core=tuple(sorted((n, c) for n, c in names.items() if TENSOR_CORE.fullmatch(n))),
            tma=sum(count for opcode, count in names.items() if TMA.fullmatch(opcode)),
        )
    return usages


def _width(suffix: str) -> int:
    """Bytes that an instruction with this suffix moves."""
    bits = re.search(r"\.[USF]?(8|16|64|128)\b", suffix)
    return int(bits[1]) // 8 if bits else 4


def extract(path: Path, folder: Path) -> dict[int, list[Path]]:
    """Cubins in a library or fatbin, by compute capability; they are written to `folder`."""
    _output("cuobjdump", "-xelf", "all", path, cwd=folder)
    found: dict[int, list[Path]] = {}
    for cubin in sorted(folder.glob("*.cubin")):
        if arch := re.search(r"\.sm_(\d+)[af]?\.cubin$", cubin.name):
            found.setdefault(int(arch[1]), []).append(cubin)
    return found


def _output(tool: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    program = find_tool(tool)
    done = subprocess.run([program, *arguments], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        problem = (done.stderr or done.stdout).strip()
        raise BackendError(f"{program} cannot read {arguments[-1]}: {problem}")
    return done.stdout


# --------------------------------------------------------------------------- CUDA C++
def cuda_cubins(archs: Sequence[int], folder: Path) -> dict[int, list[Path]]:
    """Cubins of the kernels in CUDA C++, by compute capability; they are written to `folder`.

    They come out of the compiled module, or out of the nvcc at hand if the module has none.

    Raises:
        BackendError: there is neither, or nvcc fails.
    """
    module = _cuda_module()
    return _compile(archs, folder) if module is None else extract(module, folder)


def _cuda_module() -> Path | None:
    """The compiled module, if it has CUDA C++."""
    try:
        module = native_module()
    except BackendError:
        return None
    return Path(module.__file__) if module.build_info()["cuda"] else None


def _compile(archs: Sequence[int], folder: Path) -> dict[int, list[Path]]:
    home = os.environ.get("CUDA_HOME")
    candidates = (os.environ.get("CUDACXX"), "nvcc", home and os.path.join(home, "bin", "nvcc"))
    nvcc = next(filter(None, (shutil.which(name) for name in candidates if name)), None)
    sources = sorted(SOURCES.glob("*.cu"))
    if nvcc is None or not sources:
        raise BackendError(
            "CUDA C++ is not in this report: the compiled module segmenter_fast._C was built "
            "without it, and " + ("no nvcc was found" if sources else "its sources are not here")
        )
    targets = {arch: "90a" if arch == 90 else str(arch) for arch in archs}
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in targets.values()]
    cubins: dict[int, list[Path]] = {}
    for source in sources:
        fatbin = folder / source.with_suffix(".fatbin").name
        options = [*NVCC_OPTIONS, f"--threads={os.cpu_count()}", *codes]
        command = [nvcc, *options, "-fatbin", "-o", str(fatbin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BackendError(f"{nvcc} cannot compile {source}:\n{done.stderr.strip()}")
        extracted = folder / source.stem
        extracted.mkdir()
        for arch, paths in extract(fatbin, extracted).items():
            cubins.setdefault(arch, []).extend(paths)
    return cubins


def demangle(mangled: str) -> tuple[str, str]:
    """(source file, kernel) of a mangled name, such as ("confusion.cu", "count<true>")."""
    file = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]+", mangled)
    program = shutil.which("c++filt")
    name = mangled
    if program:
        name = subprocess.run([program, mangled], capture_output=True, text=True).stdout.strip()
        name = re.sub(r"^void |\(anonymous namespace\)::|[\w]+::|\(.*\)$", "", name)
    return f"{file[1]}.cu" if file else "CUDA C++", name
