"""The benchmark harness: what it refuses, what it measures, what it writes."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).resolve().parent.parent / "benchmarks" / "harness.py"


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("benchmark_harness", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_nothing_wrong_is_timed(harness):
    calls = []

    def check(name: str, result: int) -> None:
        assert result == 1, f"{name} is wrong"

    with pytest.raises(AssertionError, match="ours is wrong"):
        harness.compare({"peer": lambda: 1, "ours": lambda: calls.append(1)}, check)
    assert len(calls) == 1


def test_ratio_is_against_the_quickest_peer(harness):
    rows = harness.compare(
        {
            "slow peer": lambda: time.sleep(0.03),
            "quick peer": lambda: time.sleep(0.01),
            "ours": lambda: None,
        },
        rounds=3,
        peers=2,
    )
    slow, quick, ours = rows
    assert [row.contestant for row in rows] == ["slow peer", "quick peer", "ours"]
    assert quick.ratio == 1.0
    assert slow.ratio < 1.0 < ours.ratio
    assert quick.ms >= 10.0
    assert quick.ms_p20 <= quick.ms <= quick.ms_p80


@pytest.mark.parametrize("arguments", [{"peers": 0}, {"peers": 2}, {"rounds": 0}])
def test_rejects_bad_input(harness, arguments):
    with pytest.raises(ValueError, match="need at least one round"):
        harness.compare({"only": lambda: 1}, **arguments)


def test_peak_memory_of_one_call(harness):
    peak = harness.peak_mib(lambda: torch.full((64 << 20,), 1, dtype=torch.uint8))
    if peak is None:
        pytest.skip("the system does not tell")
    assert 60 < peak < 200


def test_written_rows_can_be_read_back(harness, tmp_path):
    rows = [harness.Row("ours", 1.0, 0.5, 2.0, 3.0, None)]
    path = harness.save("upsample", {"noise": rows}, tmp_path / "results")
    content = json.loads(path.read_text())
    assert [harness.Row(**row) for row in content["cases"]["noise"]] == rows
    assert content["machine"]["torch"] == torch.__version__
    assert [p.name for p in path.parent.iterdir()] == ["upsample.json"]
    assert "ours" in "\n".join(harness.table("noise", rows))
