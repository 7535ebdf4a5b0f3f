"""The benchmark harness: what it refuses, what it measures, what it writes and reads."""

import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
MODULES = ("records", "harness", "compare", "report")


@pytest.fixture(scope="module")
def modules():
    """The benchmarks' modules, imported as the benchmarks do; gone afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(FOLDER), *sys.path])
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        yield {name: importlib.import_module(name) for name in MODULES}
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def harness(modules):
    return modules["harness"]


@pytest.fixture(scope="module")
def records(modules):
    return modules["records"]


@pytest.fixture
def floor(records):
    # 4 ms of arithmetic, 1 ms of memory.
    return records.Floor(records.Work(4e6, 2e6), records.Ceilings(1e9, 2e9))


def run(function, *args):
    app = Typer()
    app.command()(function)
    # Rich folds a table into 80 columns where there is no terminal; names are to stay whole.
    return CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "200"})


# ------------------------------------------------------------------------------------- contests
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
    assert [row.peer for row in rows] == [True, True, False]
    assert quick.ratio == quick.ratio_p20 == quick.ratio_p80 == 1.0
    assert slow.ratio < 1.0 < ours.ratio
    assert ours.ratio_p20 <= ours.ratio <= ours.ratio_p80
    assert quick.ms >= 10.0
    assert quick.ms_p20 <= quick.ms <= quick.ms_p80


def test_ratio_is_against_the_quickest_peer_of_its_kind(harness):
    rows = harness.compare(
        {
            "slow peer, half": lambda: time.sleep(0.02),
            "peer, half": lambda: time.sleep(0.01),
            "peer, full": lambda: time.sleep(0.03),
            "ours, full": lambda: time.sleep(0.02),
            "ours, half": lambda: time.sleep(0.02),
            "ours, other": lambda: time.sleep(0.001),
        },
        rounds=3,
        peers=3,
        kind=lambda name: name.split(", ")[1],
    )
    ratios = {row.contestant: row.ratio for row in rows}
    assert ratios["peer, half"] == ratios["peer, full"] == 1.0
    assert ratios["ours, half"] < 1.0 < ratios["ours, full"] and ratios["slow peer, half"] < 1.0
    assert ratios["ours, other"] is None and rows[-1].ms is not None


@pytest.mark.parametrize("arguments", [{"peers": 0}, {"peers": 2}, {"rounds": 0}])
def test_rejects_bad_input(harness, arguments):
    with pytest.raises(ValueError, match="need at least one round"):
        harness.compare({"only": lambda: 1}, **arguments)


@pytest.mark.parametrize("name", ["peer", "absent"])
def test_a_yardstick_is_no_peer(harness, name):
    with pytest.raises(ValueError, match=f"behind the peers, got .*{name}"):
        harness.compare({"peer": lambda: 1, "ours": lambda: 1}, yardsticks=[name])
    rows = harness.compare(
        {"peer": lambda: 1, "fill": lambda: 1, "none": harness.not_run("no"), "ours": lambda: 1},
        rounds=1,
        yardsticks=["fill", "none"],
    )
    assert [row.yardstick for row in rows] == [False, True, True, False]
    assert [row.peer for row in rows] == [True, False, False, False]
    assert rows[1].ratio is not None


def test_rounds_have_orders_of_their_own(harness, monkeypatch):
    called, slept = [], []
    monkeypatch.setattr(harness, "_seconds", lambda function, calls: function() or 0.01)
    monkeypatch.setattr(harness, "peak_mib", lambda *_: None)
    monkeypatch.setattr(harness.time, "sleep", slept.append)
    monkeypatch.setattr(harness, "_settle", lambda *_: None)
    names = "abcd"

    def orders():
        called.clear()
        harness.compare({name: lambda name=name: called.append(name) for name in names}, rounds=20)
        return ["".join(called[i : i + 4]) for i in range(8, len(called), 4)]  # after two calls

    first = orders()
    assert len(first) == 20 and {"".join(sorted(order)) for order in first} == {names}
    assert len({order[order.index("a") - 1] for order in first if order[0] != "a"}) == 3
    assert first == orders()
    assert slept == [harness.PAUSE] * 160


def test_quick_contestants_settle_before_they_are_timed(harness, monkeypatch):
    settled = []
    monkeypatch.setattr(harness, "SETTLING", 0.01)
    settle = harness._settle
    monkeypatch.setattr(harness, "_settle", lambda function: settled.append(function))
    slow, quick = (lambda: time.sleep(0.02)), (lambda: None)
    harness.compare({"slow": slow, "quick": quick}, rounds=3)
    assert settled == [quick] * 3

    called, before = [], time.perf_counter()
    settle(lambda: called.append(1))
    assert called and time.perf_counter() - before >= harness.SETTLING


def test_the_gpu_has_a_row(harness, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = harness.compare({"peer": lambda: 1} | harness.gpu_row(), rounds=1)
    assert rows[1].contestant == "Triton, GPU" and rows[1].peer is False
    reason = "no CUDA device; python -m benchmarks.device measures it there"
    assert rows[1].not_run == reason


def test_what_does_not_run_keeps_its_row(harness):
    checked = []
    rows = harness.compare(
        {
            "absent": harness.not_run("needs a compiler"),
            "peer": lambda: time.sleep(0.002),
            "ours": lambda: None,
        },
        check=lambda name, result: checked.append(name),
        rounds=2,
        peers=2,
    )
    absent, peer, ours = rows
    assert checked == ["peer", "ours"]
    assert absent == harness.Row(
        "absent", None, None, None, None, None, peer=True, not_run="needs a compiler"
    )
    assert peer.ratio == 1.0 < ours.ratio
    assert "absent  not run: needs a compiler" in "\n".join(harness.table("case", rows))


def test_without_any_peer_there_is_no_ratio(harness):
    rows = harness.compare({"peer": harness.not_run("absent"), "ours": lambda: 1}, rounds=1)
    assert rows[1].ratio is None and rows[1].ms is not None
    rows = harness.compare({"peer": harness.not_run("absent")}, rounds=1)
    assert [row.not_run for row in rows] == ["absent"]


def test_other_errors_are_not_swallowed(harness):
    with pytest.raises(ZeroDivisionError):
        harness.compare({"peer": lambda: 1 / 0})


def test_agreement_and_images_stand_in_the_rows(harness):
    rows = harness.compare(
        {"peer": lambda: 1.0, "absent": harness.not_run("no"), "ours": lambda: 0.99996},
        agreement=lambda name, result: result,
        images=4,
        rounds=1,
    )
    assert [row.agreement for row in rows] == [1.0, None, 0.99996]
    peer, absent, ours = rows
    assert ours.images == 4 and ours.images_per_s == pytest.approx(4e3 / ours.ms)
    assert absent.images_per_s is None
    lines = harness.table("case", [peer, absent, replace(ours, ms=16.0)])
    assert lines[1].split()[-3:] == ["images/s", "same", "labels"]
    # Rounded down: 100 % are all labels.
    assert lines[-1].split()[-3:] == ["250", "99.99", "%"] and lines[2].endswith("100.00 %")


def test_a_prepared_contestant_is_built_once(harness, monkeypatch):
    built, measured, given_back = [], [], []

    def fresh():
        given_back.append(1)
        return 2

    def build():
        built.append(1)

        def kept():
            return 1

        kept.fresh = fresh
        return kept

    prepared = harness.Prepared(build)
    assert not built
    monkeypatch.setattr(
        harness, "peak_mib", lambda function, *_: measured.append(function()) or 3.0
    )
    rows = harness.compare({"kept": prepared, "plain": harness.Prepared(lambda: lambda: 5)})
    assert built == [1] and prepared() == 1
    # Memory is that of the function which keeps none, once what others kept has been given back.
    assert measured == [2, 5] and given_back == [1, 1]
    assert [row.peak_mib for row in rows] == [3.0, 3.0]


def test_device_of_a_result(harness):
    row = harness.compare({"nested": lambda: {"a": [None, (torch.ones(1),)]}}, rounds=1)[0]
    assert row.device == "cpu"
    assert harness._device_of({"a": [None, (torch.ones(1, device="meta"),)]}) == "meta"
    assert harness._device_of(["text", 1]) is None


# ------------------------------------------------------------------------------------- compilation
def test_compiled_is_lazy_and_static(harness, monkeypatch):
    options = {}
    compilations = []

    def fake(function, **given):
        options.update(given)

        def call(*args):
            compilations.append(args)
            return function(*args)

        return call

    monkeypatch.setattr(torch, "compile", fake)
    contestant = harness.compiled(lambda x, y: x + y, 1, 2, mode="max-autotune")
    assert not compilations
    assert contestant() == 3
    assert options == {"mode": "max-autotune", "fullgraph": True, "dynamic": False}


def test_freezing_lasts_as_long_as_compilation(harness, monkeypatch):
    from torch._inductor import config

    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    contestant = harness.compiled(lambda: seen.append(config.freezing), freezing=True)
    contestant()
    contestant()
    assert seen == [True, False]


def test_compilation_that_fails_is_not_run(harness, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no C++ compiler found\nmore about it")

    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, mode, **options: compile_(f, backend=backend, **options)
    )
    rows = harness.compare(
        {
            "eager": lambda: torch.ones(3) + 1,
            "compiled": harness.compiled(lambda x: x + 1, torch.ones(3)),
        },
        rounds=1,
        peers=2,
    )
    assert rows[0].not_run is None
    # The name of what wraps the error depends on the version of PyTorch.
    assert "no C++ compiler found" in rows[1].not_run
    assert "\n" not in rows[1].not_run


def test_an_error_after_compilation_is_an_error(harness, monkeypatch):
    answers = iter([1])
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    contestant = harness.compiled(lambda: next(answers))
    assert contestant() == 1
    with pytest.raises(StopIteration):
        contestant()


def test_long_reasons_are_cut(harness):
    assert harness._first_line(ValueError("")) == "no message"
    assert harness._first_line(ValueError("\n  backend='inductor' raised:\n why\n")) == "why"
    assert len(harness._first_line(ValueError("x" * 500))) == 120


# ------------------------------------------------------------------------------------- memory
def test_peak_memory_of_one_call(harness):
    peak = harness.peak_mib(lambda: torch.full((64 << 20,), 1, dtype=torch.uint8))
    if peak is None:
        pytest.skip("the system does not tell")
    assert 60 < peak < 80


def test_memory_that_the_c_library_kept_counts(harness):
    def eight_mebibytes():
        return sum(len(piece) for piece in [bytearray(1 << 16) for _ in range(128)])

    if harness.peak_mib(lambda: None) is None:
        pytest.skip("the system does not tell")
    if not hasattr(harness.ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("the C library cannot give memory back")
    # Above the pieces lies a block that stays, so that the C library keeps them when freed.
    pieces = [bytearray(1 << 16) for _ in range(128)]
    above = bytearray(1 << 16)
    del pieces
    assert 7 < harness.peak_mib(eight_mebibytes) < 10
    assert len(above) == 1 << 16


def test_hardly_any_memory_is_not_called_none(harness, records):
    peak = harness.peak_mib(lambda: bytearray(10))
    if peak is None:
        pytest.skip("the system does not tell")
    assert records.mebibytes(peak) == "<0.5"
    assert records.mebibytes(None) == ""
    assert records.mebibytes(12.34) == "12.3"


# ------------------------------------------------------------------------------------- floors
@pytest.mark.parametrize("numbers", [(-1, 1), (1, float("inf")), (0, 0), (float("nan"), 1)])
def test_work_must_be_something(records, numbers):
    with pytest.raises(ValueError, match="expected FLOP and bytes"):
        records.Work(*numbers)


def test_the_longer_of_two_binds(records, floor):
    assert (floor.arithmetic_ms, floor.memory_ms) == (4, 1)
    assert (floor.ms, floor.binds) == (4, "arithmetic")
    other = replace(floor, work=records.Work(0, 4e7))
    assert (other.ms, other.binds) == (20, "memory")
    assert floor.share(records.Row("ours", 8, 8, 8, 1, None)) == 0.5
    assert floor.share(records.Row("ours", *[None] * 5, not_run="absent")) is None


def test_ceilings_are_measured_once(harness, monkeypatch):
    # Smaller than a real run's, whose copy has to pass the last-level cache.
    sizes = []
    monkeypatch.setattr(harness, "_copy_bytes", lambda device: sizes.append(device) or 1 << 20)
    rates = {torch.float32: 1e9, torch.bfloat16: 8e9}
    monkeypatch.setattr(harness, "_flop_per_s", lambda device, dtype: rates[dtype])
    instructions = {"float32": 2e9, "bfloat16": 0.0, "int8": 0.0}
    monkeypatch.setattr(harness, "instruction_rate", instructions.get)
    for cached in (harness._ceilings, harness._copy_rate):
        cached.cache_clear()
    try:
        first = harness.ceilings()
        assert first == harness.ceilings("cpu")
        assert first.bytes_per_s > 1e7
        assert (first.flop_per_s, first.rate_of) == (2e9, "instructions, float32")
        rows = [harness.Row("peer", 1, 1, 1, 1, None, device="cpu")]
        floor = harness.floor_of(harness.Work(2e6, 1), rows)
        assert (floor.device, floor.ms) == ("cpu", 1.0)
        # Where there is no such instruction, what a matrix product reaches.
        floor = harness.floor_of(harness.Work(8e6, 1, "bfloat16"), rows)
        assert (floor.ms, floor.ceilings.rate_of) == (1.0, "matrix product, bfloat16")
        with pytest.raises(ValueError, match="no rate of int8"):
            harness.floor_of(harness.Work(8e6, 1, "int8"), rows)
        assert sizes == ["cpu"]
    finally:
        for cached in (harness._ceilings, harness._copy_rate):
            cached.cache_clear()


@pytest.mark.parametrize("module", ["absent", "old", "new"])
def test_rate_of_the_instructions(harness, monkeypatch, module):
    from segmenter_fast import backend

    measured = iter([2.0, 3.0, 1.0])

    def native_module():
        if module == "absent":
            raise backend.BackendError("not built")
        peak = {"peak": lambda kind, threads, seconds: next(measured)} if module == "new" else {}
        return SimpleNamespace(**peak)

    monkeypatch.setattr(backend, "native_module", native_module)
    harness._instruction_rate.cache_clear()
    try:
        assert harness.instruction_rate("float32") == (3.0 if module == "new" else 0.0)
        assert harness.instruction_rate("float16") == 0.0
    finally:
        harness._instruction_rate.cache_clear()


def test_flop_rate_is_of_full_precision(harness, monkeypatch):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    seen = []

    def seconds(function, repeats=4):
        seen.append((torch.get_float32_matmul_precision(), function().shape[0]))
        return 0.02  # the second size is then the last

    monkeypatch.setattr(harness, "_best_seconds", seconds)
    try:
        assert harness._flop_per_s("cpu", torch.float32) == 2 * 512**3 / 0.02
        assert seen == [("highest", 512)]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_last_level_caches_add_up(harness, tmp_path):
    for cpu, level, size, shared in (
        (0, 2, "2048K", "0"),
        (1, 2, "2048K", "1"),
        (0, 3, "32768K", "0-1"),
        (1, 3, "32768K", "0-1"),
        (2, 3, "32768K", "2-3"),
    ):
        folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{level}"
        folder.mkdir(parents=True)
        for name, text in (("size", size), ("level", level), ("shared_cpu_list", shared)):
            (folder / name).write_text(f"{text}\n")
    assert harness._last_level_cache_bytes(tmp_path) == 64 << 20
    assert harness._last_level_cache_bytes(tmp_path / "absent") == 0
    assert harness._copy_bytes("cpu") >= 1 << 20


def test_the_table_shows_floor_and_share(records, floor):
    rows = [records.Row("ours", 8.0, 7.0, 9.0, 2.5, 0.0)]
    text = "\n".join(records.table("case", rows, floor))
    assert "floor 4.0 ms, arithmetic binds: 4.0 MFLOP at 1.0 GFLOP/s (matrix product" in text
    assert "float32), 2.0 MB at 2.0 GB/s" in text
    assert "50 %" in text and "<0.5" in text
    assert "floor" not in "\n".join(records.table("case", rows))


# ------------------------------------------------------------------------------------- fixtures
TOY = """
import harness
from harness import Work

harness._ceilings = lambda device, threads, dtype: harness.Ceilings(1e9, 1e9)


def test_toy(contest, compiled):
    rows = contest(
        "toy",
        {"eager": lambda: 1, "torch.compile": compiled(abs, -1), "ours": lambda: 1},
        check=lambda name, result: None,
        rounds=1,
        peers=2,
        work=Work(flops=1e3, bytes=1),
        gpu=True,
    )
    assert [row.peer for row in rows] == [True, True, False, False]


def test_without_work_and_without_ours(contest):
    contest("bare", {"eager": lambda: 1, "ours": harness.not_run("absent")})
"""


@pytest.mark.parametrize("changed", [False, True], ids=["no commit", "changes to a commit"])
def test_a_benchmark_run_from_fixture_to_file(records, tmp_path, monkeypatch, capsys, changed):
    for name in ("conftest.py", "harness.py", "records.py"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    (tmp_path / "bench_toy.py").write_text(TOY)
    if changed:
        git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "a"], check=True)
    for name in ("conftest", *MODULES):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ["-q", "-p", "no:cacheprovider", "--benchmark-only", "--save-results"]
    # Another folder as root: no settings of this repository, and no file of it is touched.
    status = pytest.main([*arguments, f"--rootdir={tmp_path}", str(tmp_path / "bench_toy.py")])
    for name in ("conftest", "bench_toy", *MODULES):
        sys.modules.pop(name, None)
    output = capsys.readouterr().out
    assert status == 0, output
    assert "toy: toy" in output and "floor 0.001 ms, arithmetic binds" in output
    assert "torch.compile  not run: needs --with-compile" in output
    (path,) = tmp_path.glob("results/*/toy.json")
    record = records.read(path)
    names = ["eager", "torch.compile", "ours", "Triton, GPU"]
    assert [row.contestant for row in record.cases["toy"]] == names
    assert set(record.cases) == {"toy", "bare"} and set(record.floors) == {"toy"}
    assert record.cases["bare"][1].not_run == "absent"
    assert str(record.machine["commit"]).endswith("+changes") == changed


# ------------------------------------------------------------------------------------- files
def test_written_rows_can_be_read_back(harness, records, floor, tmp_path):
    rows = [
        harness.Row("peer", *[None] * 5, peer=True, not_run="absent"),
        harness.Row("ours", 1.0, 0.5, 2.0, 3.0, None, 2.5, 3.5, False, "cpu"),
        harness.Row("half", 1.0, 0.5, 2.0, 3.0, None, agreement=0.98, images=2),
        harness.Row("fill", 1.0, 0.5, 2.0, 3.0, None, peer=False, yardstick=True),
    ]
    path = harness.save("upsample", {"noise": rows}, tmp_path / "results", {"noise": floor})
    record = records.read(path)
    assert record.benchmark == "upsample"
    assert record.cases == {"noise": rows}
    assert record.floors == {"noise": floor}
    assert record.machine["torch"] == torch.__version__
    assert set(records.PACKAGES) <= set(record.machine)
    written = json.loads(path.read_text())["floors"]["noise"]
    assert (written["floor_ms"], written["binds"]) == (4.0, "arithmetic")
    assert written["work"] == {"flops": 4e6, "bytes": 2e6, "dtype": "float32"}
    rate_of = "matrix product, float32"
    assert written["ceilings"] == {"flop_per_s": 1e9, "bytes_per_s": 2e9, "rate_of": rate_of}
    assert [p.name for p in path.parent.iterdir()] == ["upsample.json"]


@pytest.mark.parametrize(("commit", "kept"), [("abc", True), (None, True), ("abc+changes", False)])
def test_cases_of_an_equal_run_stay(harness, records, floor, tmp_path, monkeypatch, commit, kept):
    monkeypatch.setattr(harness, "_commit", lambda: commit)
    first, second = ([harness.Row(name, *[None] * 5)] for name in ("first", "second"))
    harness.save("toy", {"a": first, "b": first}, tmp_path, {"a": floor})
    path = harness.save("toy", {"b": second}, tmp_path)
    assert records.read(path).cases == ({"a": first, "b": second} if kept else {"b": second})
    assert records.read(path).floors == ({"a": floor} if kept else {})

    monkeypatch.setattr(harness, "_commit", lambda: "another")
    assert records.read(harness.save("toy", {"c": first}, tmp_path)).cases == {"c": first}
    path.write_text("no JSON")
    assert records.read(harness.save("toy", {"a": second}, tmp_path)).cases == {"a": second}


def test_versions_of_packages(harness):
    assert harness._version("pytest") == pytest.__version__
    assert harness._version("no-such-package-at-all") is None


def test_floors_of_older_files_are_of_a_matrix_product(records, tmp_path):
    floor = {"work": {"flops": 4e6, "bytes": 2e6}, "device": "cpu"}
    floor |= {"ceilings": {"flop_per_s": 1e9, "bytes_per_s": 2e9}, "floor_ms": 4.0, "binds": "a"}
    content = {"benchmark": "b", "machine": {}, "cases": {}, "floors": {"case": floor}}
    (tmp_path / "old.json").write_text(json.dumps(content))
    (read,) = records.read(tmp_path / "old.json").floors.values()
    assert (read.ms, read.work.dtype) == (4.0, "float32")
    assert read.ceilings.rate_of == "matrix product, float32"


def test_files_without_floors_can_be_read(records, tmp_path):
    row = {"contestant": "a", "ms": 2, "ms_p20": 1, "ms_p80": 4, "ratio": 3, "peak_mib": 0}
    path = tmp_path / "old.json"
    content = {"benchmark": "b", "machine": {}, "cases": {"case": [row | {"unknown": 1}]}}
    path.write_text(json.dumps(content))
    record = records.read(path)
    assert record.cases["case"] == [records.Row(**row)]
    assert record.floors == {}


# results.json is what trainings write, see test_ablations.py.
TIMED = sorted(p for p in FOLDER.glob("results/*/*.json") if p.name != "results.json")


@pytest.mark.parametrize("path", TIMED, ids=lambda p: p.stem)
def test_committed_results_can_be_read(records, path):
    assert any(records.read(path).cases.values())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cases": {"a": [{"ms": 1}]}}', '{"cases": 1}'])
def test_other_files_are_refused(records, tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"not a result file.*other\.json"):
        records.read(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ms_p20": "1"},
        {"ms_p80": None},
        {"ms": None},
        {"ms_p20": True},
        {"ratio": float("nan")},
        {"ms": 0},
        {"ratio_p20": 1.0},
        {"contestant": 3},
        {"peer": "yes"},
        {"machine": None},
        {"benchmark": 7},
        {"floors": {"case": {"work": {"flops": 1, "bytes": 1}, "device": "cpu", "ceilings": 0}}},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_rows_of_other_kinds_are_refused(modules, records, tmp_path, wrong):
    row = {"contestant": "a", "ms": 2, "ms_p20": 1, "ms_p80": 4, "ratio": 3, "peak_mib": 0}
    content = {"benchmark": "b", "machine": {}, "cases": {"case": [row]}, "floors": {}}
    if wrong.keys() <= content.keys():
        content |= wrong
    else:
        content["cases"] = {"case": [row | wrong]}
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"not a result file.*wrong\.json"):
        records.read(path)
    result = run(modules["compare"].compare, path, path)
    assert result.exit_code == 2 and "not a result file" in result.output


def test_numbers_keep_their_digits(records):
    assert [records.milliseconds(v) for v in (None, 0.0412, 0.6971, 2.379, 99.96, 1642.4)] == [
        "",
        "0.0412",
        "0.697",
        "2.38",
        "100",
        "1,642",
    ]
    assert [records.ratio(v) for v in (None, 0.19, 1, 12.34, 197.4)] == [
        "",
        "0.190x",
        "1.00x",
        "12.3x",
        "197x",
    ]
    assert [records.percent(v) for v in (0.00019, 0.0306, 0.98, 1.1)] == [
        "0.019 %",
        "3.1 %",
        "98 %",
        "110 %",
    ]


# ------------------------------------------------------------------------------------- comparison
def write(records, path, ratios, **others):
    """A file whose contestants have these (p20, ratio, p80)."""
    rows = [records.Row("peer", 10, 9, 11, 1, 0, 1, 1, True)]
    rows += [
        records.Row(name, 10 / ratio, 9 / ratio, 11 / ratio, ratio, 0, low, high, False)
        for name, (low, ratio, high) in ratios.items()
    ]
    rows += [records.Row(name, *[None] * 5, not_run=reason) for name, reason in others.items()]
    records.write(records.Record("toy", {"torch": path.stem}, {"case [1]": rows}), path)
    return path


def test_comparison_marks_what_leaves_the_spread(modules, records, tmp_path):
    old = write(
        records,
        tmp_path / "old.json",
        {"up": (9, 10, 11), "down": (9, 10, 11), "same": (9, 10, 11), "left": (1, 2, 3)},
        compiled="no compiler",
    )
    new = write(
        records,
        tmp_path / "new.json",
        {"up": (12, 13, 14), "down": (6, 7, 8), "same": (10, 12, 14), "fresh": (1, 2, 3)},
        compiled="no compiler",
    )
    changes = modules["compare"].changes(records.read(old), records.read(new))["case [1]"]
    assert {change.contestant: change.verdict for change in changes} == {
        "peer": "",
        "up": "faster",
        "down": "slower",
        "same": "",
        "fresh": "new",
        "compiled": "",
        "left": "gone",
    }
    assert {c.contestant: c.factor for c in changes}["up"] == 1.3

    result = run(modules["compare"].compare, old, new)
    assert result.exit_code == 0, result.output
    assert "1 faster, 1 slower beyond the spread" in result.output
    assert "torch differs: old and new" in result.output
    lines = {line.split()[0]: line.split() for line in result.output.splitlines() if line.split()}
    assert lines["up"] == ["up", "10.0x", "13.0x", "1.30x", "faster"]
    assert lines["compiled"] == ["compiled", "not", "run", "not", "run"]
    assert "case [1]" in result.output
    assert run(modules["compare"].compare, old, new, "--strict").exit_code == 1
    assert run(modules["compare"].compare, old, old, "--strict").exit_code == 0


def test_comparison_of_two_benchmarks(modules, records, tmp_path):
    old = write(records, tmp_path / "old.json", {"ours": (9, 10, 11)})
    new = tmp_path / "new.json"
    records.write(replace(records.read(old), benchmark="other"), new)
    result = run(modules["compare"].compare, old, new)
    assert result.exit_code == 2 and "two benchmarks: toy and other" in result.output


def test_comparison_against_another_peer_says_so(modules, records, tmp_path):
    old = write(records, tmp_path / "old.json", {"ours": (9, 10, 11)})
    record = records.read(old)
    (rows,) = record.cases.values()
    compiled = [replace(rows[0], contestant="compiled"), rows[0], rows[1]]
    compiled[1:] = [replace(row, ratio=row.ratio / 2) for row in compiled[1:]]
    new = tmp_path / "new.json"
    records.write(replace(record, cases={"case [1]": compiled}), new)
    text = "ratios are against other peers"
    assert f"{text}: peer and compiled" in run(modules["compare"].compare, old, new).output
    assert text not in run(modules["compare"].compare, old, old).output


def test_comparison_with_a_contestant_that_no_longer_runs(modules, records):
    ran = records.Row("a", 1, 1, 1, 2, None)
    absent = records.Row("a", *[None] * 5, not_run="absent")
    change = modules["compare"].Change("a", ran, absent)
    assert (change.factor, change.verdict) == (None, "not comparable")


def test_spread_of_files_that_have_it_of_times_only(modules, records):
    row = records.Row("a", ms=2, ms_p20=1, ms_p80=4, ratio=3, peak_mib=None)
    assert modules["compare"].spread(row) == (1.5, 6)


def test_comparison_of_what_is_no_result(modules, tmp_path):
    (tmp_path / "a.json").write_text("{}")
    result = run(modules["compare"].compare, tmp_path / "a.json", tmp_path / "absent.json")
    assert result.exit_code == 2
    assert "not a result file" in result.output


# ------------------------------------------------------------------------------------- the page
def test_the_page_has_every_figure(modules, records, floor, tmp_path):
    folder = tmp_path / "my-machine"
    machine = {"cpu": "A CPU", "gpu": None, "torch": "2.13", "commit": "abc"}
    rows = [
        records.Row("eager | plain", 20, 18, 22, 1, 150.04, 1, 1, True, "cpu"),
        records.Row("compiled", *[None] * 5, peer=True, not_run="no <compiler>"),
        records.Row("fill", 9, 8, 10, 2.2, 0.1, 2, 3, False, "cpu", yardstick=True),
        records.Row("ours", 8, 7, 9, 2.5, 0.1, 2, 3, False, "cpu"),
    ]
    halves = [
        replace(floor, ceilings=records.Ceilings(rate, 2e9, "instructions, bfloat16"))
        for rate in (5e9, 6e9)
    ]
    floors = {"case": floor} | dict(zip(("a", "b"), halves, strict=True))
    first = records.Record("first", machine, {"case": rows}, floors)
    records.write(first, folder / "first.json")
    second = replace(first, benchmark="second", machine=machine | {"commit": "def"}, floors={})
    records.write(second, folder / "second.json")

    result = run(modules["report"].report, folder, "--no-plot")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "first.json", "second.json"]
    text = (folder / "README.md").read_text()
    assert text.startswith("# my-machine\n")
    assert "| processor | A CPU |" in text and "GPU" not in text
    assert "| cpu, copy, read + write | 2 GB/s |" in text
    assert "| cpu, matrix product, float32 | 1 GFLOP/s |" in text
    assert "| cpu, instructions, bfloat16 | 5 to 6 GFLOP/s |" in text
    assert "| fill | 9.00 | 8.00 to 10.0 | *2.20x* |" in text
    assert "## first\n\ncommit `abc`." in text and "## second\n\ncommit `def`." in text
    assert "| eager \\| plain | 20.0 | 18.0 to 22.0 | 1.00x | 150.0 | 20 % |" in text
    assert "| compiled | not run: no &lt;compiler> |  |  |  |  |" in text
    assert "| ours | 8.00 | 7.00 to 9.00 | **2.50x** | &lt;0.5 | 50 % |" in text
    assert "| ours | 8.00 | 7.00 to 9.00 | **2.50x** | &lt;0.5 |\n" in text  # without floors
    assert "Floor 4.0 ms, arithmetic binds" in text


def test_the_page_has_the_columns_of_its_rows(modules, records, tmp_path):
    rows = [
        records.Row("peer", 20, 18, 22, 1, 1, peer=True, agreement=1.0, images=1),
        records.Row("absent", *[None] * 5, not_run="no engine"),
        records.Row("ours", 8, 7, 9, 2.5, 1, peer=False, agreement=0.9876, images=1),
    ]
    records.write(records.Record("model", {}, {"case": rows}), tmp_path / "model.json")
    result = run(modules["report"].report, tmp_path, "--no-plot")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "README.md").read_text()
    assert "|  | ms | p20 to p80 | ratio | MiB | images/s | same labels |" in text
    assert "| peer | 20.0 | 18.0 to 22.0 | 1.00x | 1.0 | 50.0 | 100.00 % |" in text
    assert "| absent | not run: no engine |  |  |  |  |  |" in text
    assert "| ours | 8.00 | 7.00 to 9.00 | **2.50x** | 1.0 | 125 | 98.76 % |" in text


def test_the_picture(modules, records, tmp_path):
    pytest.importorskip("matplotlib")
    write(records, tmp_path / "toy.json", {"ours": (9, 10, 11), "ours, slower": (2, 3, 4)})
    record = records.read(tmp_path / "toy.json")
    pictures = [tmp_path / "a.svg", tmp_path / "b.svg"]
    assert all(modules["report"].draw([record], path) for path in pictures)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    peer, ours, slower = record.cases["case [1]"]
    assert modules["report"].is_ours(ours)
    # A yardstick is not ours, even if it is the quickest of all.
    yardstick = replace(ours, contestant="fill", ratio=99, yardstick=True)
    assert not modules["report"].is_ours(yardstick)
    beside = replace(record, cases={"case": [peer, yardstick, slower]})
    assert modules["report"].draw([beside], tmp_path / "d.svg")
    text = (tmp_path / "d.svg").read_text()
    assert "yardsticks" in text and "99.0x" not in text and "3.00x" in text
    assert "yardsticks" not in pictures[0].read_text()
    nothing = replace(record, cases={"case": [peer, yardstick]})
    assert modules["report"].draw([nothing], tmp_path / "c.svg") is False
    assert not (tmp_path / "c.svg").exists()


def test_the_picture_of_whole_models(modules, records, tmp_path):
    """Beside model.json alone, of what has images per second."""
    pytest.importorskip("matplotlib")
    rows = [
        records.Row("PyTorch, float32", 20, 18, 22, 1, 1, peer=True, images=1),
        records.Row("absent, float32", *[None] * 5, not_run="no engine", images=1),
        records.Row("ours, int8", 8, 7, 9, 2.5, 1, peer=False, images=1),
    ]
    record = records.Record("model", {}, {"Seg-T, 512": rows, "Seg-B, 512": rows[:1]})
    records.write(record, tmp_path / "model.json")
    records.write(replace(record, benchmark="other"), tmp_path / "other.json")
    result = run(modules["report"].report, tmp_path)
    assert result.exit_code == 0, result.output
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".md", ".svg", ".png"}
    assert (tmp_path / "models.png").stat().st_size > 5_000
    untimed = replace(record, cases={"case": [replace(rows[0], images=None)]})
    assert modules["report"].draw_models(untimed, tmp_path / "none.png") is False


def test_no_page_without_results(modules, tmp_path):
    result = run(modules["report"].report, tmp_path, "--no-plot")
    assert result.exit_code == 2
    assert "no result files" in result.output
