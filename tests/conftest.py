"""Where there is no GPU, Triton's kernels run in its interpreter, which is chosen at import."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _interpreter_is_for_its_own_tests(request, monkeypatch):
    """Outside tests marked `interpreted` the backend is as users have it: not on a CPU."""
    if request.node.get_closest_marker("interpreted") is None:
        monkeypatch.setattr("segmenter_fast.ops._triton.INTERPRETED", False)
