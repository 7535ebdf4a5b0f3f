"""Everything that only a GPU can answer, in one command that needs no network:

    python -m benchmarks.device                # nine minutes, most important rows first
    python -m benchmarks.device --minutes 3 --only numerics
    python -m benchmarks.device --dry-run      # toy sizes in Triton's interpreter, no GPU

It writes benchmarks/results/<gpu>/: device.md to read, device_kernels.json and device_models.json
as `python -m benchmarks.compare` takes them, and checks/device.json with every verdict. A part that
the minutes do not reach is reported so. Exit status 1 if any result was wrong.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import NotRun, ceilings, compare, machine, machine_kind, not_run
from records import RESULTS, Floor, Record, Work, percent, ratio, write

PARTS = ("numerics", "kernels", "models", "sanitizer")
SANITIZERS = ("memcheck", "racecheck")
WRONG = 86  # the exit status that compute-sanitizer is asked for


@dataclasses.dataclass
class Session:
    """One run of the command: where, how long, and what it has found.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        folder: where results go.
        deadline: in `clock`'s seconds.
        seed: of all inputs.
        toy: toy sizes, one round.
        only: names of operations; empty is all.
    """

    device: str
    folder: Path
    deadline: float
    seed: int
    toy: bool = False
    only: tuple[str, ...] = ()
    clock: Callable[[], float] = time.monotonic
    verdicts: list[Any] = dataclasses.field(default_factory=list)
    kernels: Record = dataclasses.field(default_factory=lambda: Record("device_kernels", {}, {}))
    models: Record = dataclasses.field(default_factory=lambda: Record("device_models", {}, {}))
    sanitizer: dict[str, str] = dataclasses.field(default_factory=dict)
    missed: list[str] = dataclasses.field(default_factory=list)

    def has_time(self, what: str) -> bool:
        """Whether to go on to `what`; if not, it is noted down."""
        if self.clock() < self.deadline:
            return True
        self.missed.append(what)
        return False

    @property
    def faults(self) -> list[str]:
        """Everything that is wrong, a line each."""
        wrong = [
            f"{v.operation} {v.dtype} configuration {v.configuration}, {v.part} ({v.case}): "
            + v.fault
            for v in self.verdicts
            if v.fault
        ]
        return wrong + [
            f"compute-sanitizer {tool}: {result}"
            for tool, result in self.sanitizer.items()
            if result.startswith("failed")
        ]

    def write(self) -> None:
        """Replace the result files by what is known now."""
        about = machine()
        for record in (self.kernels, self.models):
            if record.cases:
                path = self.folder / f"{record.benchmark}.json"
                write(dataclasses.replace(record, machine=about), path)
        checks = {
            "machine": about,
            "seed": self.seed,
            "verdicts": [dataclasses.asdict(verdict) for verdict in self.verdicts],
            "sanitizer": self.sanitizer,
            "not_reached": self.missed,
        }
        _replace(self.folder / "checks" / "device.json", json.dumps(checks, indent=1) + "\n")
        _replace(self.folder / "device.md", "\n".join(summary(self, about)) + "\n")


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def find_operations(session: Session) -> list[Any]:
    """Those declared, or those asked for."""
    from segmenter_fast.ops._triton import operations

    named = {operation.name.removesuffix("_triton"): operation for operation in operations()}
    unknown = set(session.only) - named.keys()
    if unknown:
        raise typer.BadParameter(
            f"no operation {', '.join(sorted(unknown))}; there are {', '.join(named)}"
        )
    return [named[name] for name in (session.only or named)]


# ------------------------------------------------------------------------------------- numerics
def run_numerics(session: Session) -> None:
    """Every operation in its first configuration at all sizes, then in the others."""
    from device_numerics import check

    operations = find_operations(session)
    for others in (False, True):
        for operation in operations:
            cases = [operation.toy] if session.toy else [*operation.checks, _smaller(operation)]
            # In the interpreter types differ only in how they are loaded and stored.
            dtypes = operation.dtypes[:2] if session.toy else operation.dtypes
            for dtype in dtypes:
                what = f"numerics of {operation.name}, {dtype}"
                if others:
                    what += ", further configurations"
                if not session.has_time(what):
                    continue
                for case in cases[: 1 if others else None]:
                    session.verdicts += check(
                        operation, case, dtype, session.device, session.seed, others
                    )
        session.write()


def _smaller(operation: Any) -> dict[str, Any]:
    """The case that is timed, with a batch that float64 has room for."""
    case = dict(operation.case)
    if "batch" in case:
        case["batch"] = min(2, case["batch"])
    return case


def run_sanitizer(session: Session) -> None:
    """A small set of numerics under compute-sanitizer, in processes of their own."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if session.device != "cuda" or not Path(found).is_file():
        session.sanitizer["memcheck"] = "not run: no compute-sanitizer here"
        return
    for tool in SANITIZERS:
        if not session.has_time(f"compute-sanitizer {tool}"):
            continue
        command = [found, "--tool", tool, "--error-exitcode", str(WRONG)]
        # No --target-processes all: ptxas and the like are not to be watched.
        command += [sys.executable, "-m", "benchmarks.device", "--smallest"]
        for name in session.only:
            command += ["--operation", name]
        # PyTorch's cache would hide a read past the end of a tensor.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        seconds = max(20, session.deadline - session.clock())
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, env=environment
            )
        except subprocess.TimeoutExpired:
            session.sanitizer[tool] = f"not finished in {seconds:.0f} s"
            continue
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        outcome = "clean" if done.returncode == 0 else f"failed with status {done.returncode}"
        session.sanitizer[tool] = f"{outcome}: {last}"
        session.write()


def run_smallest(session: Session) -> None:
    """Every operation once, at its toy size: what compute-sanitizer watches."""
    from device_numerics import check

    for operation in find_operations(session):
        for dtype in operation.dtypes[:2]:
            session.verdicts += check(operation, operation.toy, dtype, session.device, session.seed)


# ------------------------------------------------------------------------------------- kernels
def guarded(function: Callable[[], Any]) -> Callable[[], Any]:
    """A contestant whose first failure is a reason not to run."""

    def call() -> Any:
        try:
            return function()
        except NotRun:
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            raise NotRun(text[:120]) from error

    return call


def run_kernels(session: Session) -> None:
    """Each operation against its contestants: forward, and with its gradient where it has one."""
    from device_numerics import convert

    for operation in find_operations(session):
        for dtype in operation.dtypes[:1] if session.toy else operation.dtypes[:2]:
            for backward in (False, True)[: 1 + (operation.backward_work is not None)]:
                name = f"{operation.name.removesuffix('_triton')}, {_short(dtype)}"
                name += " and gradient" * backward
                if not session.has_time(f"times of {name}"):
                    continue
                torch.manual_seed(session.seed)
                case = operation.toy if session.toy else operation.case
                inputs = convert(operation.make_inputs(dtype, **case), session.device)
                _time_one(session, operation, name, inputs, dtype, backward)
                session.write()


def _time_one(
    session: Session,
    operation: Any,
    name: str,
    inputs: dict[str, Any],
    dtype: torch.dtype,
    backward: bool,
) -> None:
    def contestant(function: Callable[..., Any]) -> Callable[[], Any]:
        if not backward:

            def forward() -> Any:
                with torch.no_grad():
                    return function(**inputs)

            return guarded(forward)
        leaves = {key: inputs[key].detach().requires_grad_() for key in operation.gradient_of}
        upstream: list[torch.Tensor] = []

        def both() -> Any:
            result = function(**{**inputs, **leaves})
            if not upstream:
                upstream.append(torch.randn_like(result))
            return torch.autograd.grad(result, list(leaves.values()), upstream[0])

        return guarded(both)

    if session.toy:
        autotuned = not_run("a dry run")
    else:
        tuned = torch.compile(operation.reference, mode="max-autotune-no-cudagraphs")
        autotuned = contestant(tuned)
    contestants = {
        "PyTorch, eager": contestant(operation.reference),
        "torch.compile, max-autotune": autotuned,
        **{label: contestant(other) for label, other in operation.contestants.items()},
        "Triton": contestant(operation.run),
    }
    rows = compare(contestants, rounds=1 if session.toy else 7, peers=2)
    session.kernels.cases[name] = rows
    flops, moved = operation.work(inputs)
    if backward:
        more = operation.backward_work(inputs)
        flops, moved = flops + more[0], moved + more[1]
    matrix = dtype if operation.matrix else torch.float32
    limits = ceilings(session.device, matrix)
    session.kernels.floors[name] = Floor(Work(flops, moved), limits, session.device)
    torch._dynamo.reset()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------- models
def run_models(session: Session) -> None:
    """Images to labels, and a training step: the plain algorithm, compiled, and ours."""
    from segmenter_fast import create_model

    n_cls = 7 if session.toy else 150
    if session.toy:
        plans = [("Seg-T-Mask/16", 32, 1)]
    else:
        variants = ("Seg-B-Mask/16", "Seg-T-Mask/16", "Seg-S-Mask/16")
        plans = [(variant, 512, batch) for variant in variants for batch in (1, 32)]
    for variant, side, batch in plans:
        for training in (False, True):
            name = f"{variant}, {side} x {side}, batch {batch}, bfloat16"
            name += ", training step" if training else ", images to labels"
            if not session.has_time(f"times of {name}"):
                continue
            torch.manual_seed(session.seed)
            model = create_model(variant, num_classes=n_cls, image_size=side)
            model = model.to(session.device)
            model.train(training)
            contestants = dict(_model_contestants(session, model, side, batch, training))
            rows = compare(contestants, rounds=1 if session.toy else 7, peers=2)
            session.models.cases[name] = rows
            session.write()
            del model, contestants
            torch._dynamo.reset()


def _model_contestants(
    session: Session, model: Any, side: int, batch: int, training: bool
) -> Iterable[tuple[str, Callable[[], Any]]]:
    from segmenter_fast.blocks import Attention

    images = torch.randn(batch, 3, side, side, device=session.device)
    target = torch.randint(0, model.n_cls, (batch, side, side), device=session.device)

    def plain(images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = model(images)
        if training:
            return torch.nn.functional.cross_entropy(logits, target, ignore_index=255)
        return logits.softmax(1).argmax(1)

    def ours(images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return model(images, target) if training else model.labels(images)

    def step(function: Callable[..., torch.Tensor], backend: str) -> Callable[[], Any]:
        def call() -> Any:
            model.backend = backend
            for module in model.modules():
                if isinstance(module, Attention):
                    module.backend = "auto"  # PyTorch's fused attention, its best form
            with torch.autocast(session.device, torch.bfloat16):
                if not training:
                    with torch.inference_mode():
                        return function(images, target)
                loss = function(images, target)
            model.zero_grad(set_to_none=True)
            loss.backward()
            return loss.detach()

        return guarded(call)

    yield "PyTorch, eager", step(plain, "reference")
    if session.toy:
        yield "torch.compile, max-autotune", not_run("a dry run")
    else:
        tuned = torch.compile(plain, mode="max-autotune-no-cudagraphs")
        yield "torch.compile, max-autotune", step(tuned, "reference")
    yield "segmenter_fast, triton", step(ours, "triton")


# ------------------------------------------------------------------------------------- the page
def summary(session: Session, about: dict[str, Any]) -> list[str]:
    """device.md, line by line."""
    where = about["gpu"] or "Triton's interpreter, a dry run at toy sizes: its times mean nothing"
    lines = [f"# {where}", "", "Written by `python -m benchmarks.device`.", ""]
    lines += [
        f"PyTorch {about['torch']}, Python {about['python']}, commit {about['commit']}, "
        f"seed {session.seed}.",
        "",
        "## Right or wrong",
        "",
    ]
    faults = session.faults
    lines.append(f"{len(session.verdicts)} results held to float64, {len(faults)} faults.")
    lines += [f"- {fault}" for fault in faults]
    lines += [f"- compute-sanitizer {tool}: {said}" for tool, said in session.sanitizer.items()]
    for title, record in (("Kernels", session.kernels), ("Models", session.models)):
        if record.cases:
            lines += ["", f"## {title}", ""]
            lines += _rows_table(record)
    if session.missed:
        lines += ["", "## Not reached in the time given", ""]
        lines += [f"- {what}" for what in session.missed]
    return lines


def _rows_table(record: Record) -> list[str]:
    lines = [
        "| case | contestant | ms | ratio to the quickest peer | share of the floor | MiB |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for case, rows in record.cases.items():
        floor = record.floors.get(case)
        for row in rows:
            if row.not_run is not None:
                lines.append(f"| {case} | {row.contestant} | | not run: {row.not_run} | | |")
                continue
            share = percent(floor.share(row)) if floor else ""
            memory = "" if row.peak_mib is None else f"{row.peak_mib:,.1f}"
            lines.append(
                f"| {case} | {row.contestant} | {row.ms:.3f} | {ratio(row.ratio)} | {share} "
                f"| {memory} |"
            )
    return lines


# ------------------------------------------------------------------------------------- command
def main(
    minutes: Annotated[float, typer.Option(help="Stop after this long, with what there is.")] = 9,
    only: Annotated[
        str, typer.Option(help=f"Parts to run, by commas, of {', '.join(PARTS)}.")
    ] = ",".join(PARTS),
    operation: Annotated[
        list[str] | None, typer.Option(help="Only this operation; may be given several times.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for results; benchmarks/results/<gpu> if not given.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the inputs; the clock's if not given.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Toy sizes in Triton's interpreter, where there is no GPU.")
    ] = False,
    smallest: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Check and time every Triton kernel on this GPU, and the models that use them."""
    parts = [part.strip() for part in only.split(",") if part.strip()]
    if not parts or set(parts) - set(PARTS):
        raise typer.BadParameter(f"--only takes {', '.join(PARTS)}, got {only!r}")
    if dry_run:
        # Read when the kernels are imported, which has not happened yet.
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        typer.echo(
            "no GPU that PyTorch can use was found; try --dry-run, which runs toy sizes in "
            "Triton's interpreter",
            err=True,
        )
        raise typer.Exit(2)
    folder = output or (RESULTS / machine_kind() if not dry_run else None)
    if folder is None:
        typer.echo("a dry run needs --output FOLDER: its figures are no results", err=True)
        raise typer.Exit(2)
    session = Session(
        device="cpu" if dry_run else "cuda",
        folder=folder,
        deadline=time.monotonic() + 60 * minutes,
        seed=int(time.time()) % 2**31 if seed is None else seed,
        toy=dry_run,
        only=tuple(operation or ()),
    )
    raise typer.Exit(run(session, parts, smallest))


def run(session: Session, parts: Iterable[str], smallest: bool = False) -> int:
    """Run the parts in their order; exit status 1 if anything was wrong."""
    runners = {
        "numerics": run_numerics,
        "kernels": run_kernels,
        "models": run_models,
        "sanitizer": run_sanitizer,
    }
    if smallest:
        run_smallest(session)
    else:
        for part in PARTS:
            if part in parts:
                typer.echo(f"{part} ...")
                runners[part](session)
        session.write()
        typer.echo(f"written: {session.folder / 'device.md'}")
    for fault in session.faults:
        typer.echo(fault, err=True)
    return 1 if session.faults else 0


if __name__ == "__main__":
    typer.run(main)
