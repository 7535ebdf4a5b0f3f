"""The other architectures of the paper's figure, and other engines that run ours."""

import importlib
from types import ModuleType

from harness import NotRun

__all__ = ["need"]


def need(name: str) -> ModuleType:
    """Import a package that benchmarks can do without.

    Raises:
        NotRun: it is absent; says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotRun(f'needs {name}: pip install "segmenter_fast[bench]"') from error
