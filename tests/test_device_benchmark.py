"""`python -m benchmarks.device`: a dry run in the interpreter, and how it takes failures."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton_cases import DEVICE, on_device

from segmenter_fast.ops._triton import operations

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("records", "harness", "device_numerics", "device")
OPERATIONS = {operation.name.removesuffix("_triton"): operation for operation in operations()}

each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


@pytest.fixture(scope="module")
def modules():
    """The benchmarks' modules, imported as the benchmarks do; gone afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        yield {name: importlib.import_module(name) for name in MODULES}
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def make_session(modules, tmp_path):
    def make(**options):
        return modules["device"].Session(
            **{"device": "cpu", "folder": tmp_path, "deadline": 1e30, "seed": 0, "toy": True},
            **options,
        )

    return make


def checks_of(folder: Path) -> dict:
    return json.loads((folder / "checks" / "device.json").read_text())


# ------------------------------------------------------------------------------------- declarations
@on_device
@each_operation
def test_every_operation_is_right_at_its_toy_size(modules, operation):
    check = modules["device_numerics"].check
    verdicts = list(check(operation, operation.toy, operation.dtypes[0], DEVICE, 0))
    parts = {verdict.part for verdict in verdicts} - operation.contestants.keys()
    expected = {"forward"}
    if operation.backward_work is not None:
        expected |= {f"gradient of {name}" for name in operation.gradient_of}
    assert parts == expected
    assert not [verdict.fault for verdict in verdicts if verdict.fault]
    assert all(verdict.error is not None for verdict in verdicts)


@on_device
def test_every_configuration_is_checked(modules):
    operation = OPERATIONS["mask_product"]
    verdicts = list(
        modules["device_numerics"].check(operation, operation.toy, torch.float32, DEVICE, 0, True)
    )
    assert {verdict.configuration for verdict in verdicts} == {1}
    assert not [verdict.fault for verdict in verdicts if verdict.fault]


@each_operation
def test_declared_work(operation):
    """What floors stand on: more for more classes or tokens, and no gradient for nothing."""
    inputs = operation.make_inputs(operation.dtypes[0], **operation.toy)
    size = next(name for name in ("n_cls", "height", "n", "rows") if name in operation.toy)
    more = operation.make_inputs(
        operation.dtypes[0], **{**operation.toy, size: 2 * operation.toy[size]}
    )
    assert all(isinstance(number, (int, float)) for number in operation.work(inputs))
    assert operation.work(inputs)[1] > 0
    assert sum(operation.work(more)) > sum(operation.work(inputs))
    if operation.backward_work is not None:
        assert sum(operation.backward_work(inputs)) > 0
        assert set(operation.gradient_of) <= inputs.keys()


# ------------------------------------------------------------------------------------- the command
@pytest.mark.interpreted
def test_dry_run(tmp_path):
    """All parts, in a process of its own, with one operation that has contestants."""
    command = [sys.executable, "-m", "benchmarks.device", "--dry-run", "--seed", "3"]
    command += ["--output", str(tmp_path), "--operation", "upsample_argmax"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    checks = checks_of(tmp_path)
    assert checks["seed"] == 3 and not checks["not_reached"]
    assert {verdict["configuration"] for verdict in checks["verdicts"]} == {0, 1}
    assert {verdict["dtype"] for verdict in checks["verdicts"]} == {"float32", "bfloat16"}
    kernels = json.loads((tmp_path / "device_kernels.json").read_text())
    rows = {row["contestant"]: row for row in kernels["cases"]["upsample_argmax, float32"]}
    assert rows["Triton"]["ms"] > 0 and rows["PyTorch, eager"]["ratio"] == 1
    assert rows["CUDA C++"]["not_run"].startswith("NotImplementedError")
    assert kernels["floors"]["upsample_argmax, float32"]["floor_ms"] > 0
    models = json.loads((tmp_path / "device_models.json").read_text())
    assert len(models["cases"]) == 2
    assert all(rows[-1]["ms"] > 0 for rows in models["cases"].values())
    page = (tmp_path / "device.md").read_text()
    assert "a dry run at toy sizes" in page and "0 faults" in page
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "numerics,speed"], "--only takes numerics, kernels"),
        (["--dry-run"], "needs --output"),
        (["--dry-run", "--output", "{}", "--operation", "convolution"], "there are attention, "),
    ],
)
def test_bad_arguments(arguments, text, tmp_path):
    arguments = [argument.format(tmp_path) for argument in arguments]
    command = [sys.executable, "-m", "benchmarks.device", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert text in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.skipif(DEVICE == "cuda", reason="there is one")
def test_without_a_gpu():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.device"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no GPU that PyTorch can use was found; try --dry-run" in done.stderr


# ------------------------------------------------------------------------------------- failures
@pytest.mark.interpreted
def test_a_wrong_result_is_reported(modules, make_session, monkeypatch, capsys):
    operation = OPERATIONS["mask_product"]

    def wrong(**inputs):
        return operation.run(**inputs) * 1.01

    broken = replace(operation, run=wrong, dtypes=(torch.float32,))
    monkeypatch.setattr(modules["device"], "find_operations", lambda session: [broken])
    session = make_session()
    assert modules["device"].run(session, ["numerics"]) == 1
    assert "forward" in capsys.readouterr().err
    assert all(verdict["fault"] for verdict in checks_of(session.folder)["verdicts"])
    assert "exceeds" in (session.folder / "device.md").read_text()


@pytest.mark.interpreted
def test_a_kernel_that_fails_stops_nothing(modules, make_session, monkeypatch):
    operation = OPERATIONS["confusion_matrix"]

    def fail(**inputs):
        raise RuntimeError("out of resource: shared memory")

    broken = replace(operation, run=fail, contestants={"another": fail}, dtypes=(torch.uint8,))
    operations = [broken, replace(operation, dtypes=(torch.uint8,))]
    monkeypatch.setattr(modules["device"], "find_operations", lambda session: operations)
    session = make_session()
    assert modules["device"].run(session, ["numerics", "kernels"]) == 1
    faults = [verdict.fault for verdict in session.verdicts]
    # The kernel and its contestant, but not the operation after.
    assert faults.count("RuntimeError: out of resource: shared memory") == 2 and "" in faults
    (rows,) = session.kernels.cases.values()
    assert rows[-1].ms is not None  # of the second, under the same name


@pytest.mark.interpreted
def test_contestants_that_raise_have_no_figures(modules, make_session, monkeypatch):
    def fail(**inputs):
        raise RuntimeError("cannot\nat all")

    operation = replace(OPERATIONS["confusion_matrix"], contestants={"another": fail})
    monkeypatch.setattr(modules["device"], "find_operations", lambda session: [operation])
    session = make_session()
    assert modules["device"].run(session, ["kernels"]) == 0
    rows = {row.contestant: row for row in session.kernels.cases["confusion_matrix, uint8"]}
    assert rows["another"].not_run == "RuntimeError: cannot"
    assert rows["Triton"].ms is not None
    assert "not run: RuntimeError: cannot |" in (session.folder / "device.md").read_text()


def test_it_stops_when_its_minutes_are_over(modules, make_session):
    session = make_session(clock=lambda: 2e30)
    assert modules["device"].run(session, modules["device"].PARTS) == 0
    assert not session.verdicts and not session.kernels.cases and not session.models.cases
    missed = checks_of(session.folder)["not_reached"]
    assert any(what.startswith("numerics of mask_product_triton") for what in missed)
    assert any(what.startswith("times of Seg-T-Mask/16") for what in missed)
    assert "Not reached in the time given" in (session.folder / "device.md").read_text()
