"""The `contest` fixture, its options, and the table at the end of a benchmark run."""

import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
# harness.py beside this file, and the oracles that decide whether a contestant is right.
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import harness  # noqa: E402

# By benchmark, then by case.
RESULTS = pytest.StashKey[dict[str, dict[str, list[harness.Row]]]]()
FLOORS = pytest.StashKey[dict[str, dict[str, harness.Floor]]]()
WRITTEN = pytest.StashKey[dict[str, Path]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("segmenter_fast benchmarks")
    group.addoption(
        "--save-results",
        action="store_true",
        help="write benchmarks/results/<machine kind>/<benchmark>.json",
    )
    group.addoption(
        "--with-compile",
        action="store_true",
        help="let torch.compile take part (it takes a minute to compile)",
    )
    group.addoption(
        "--all-peers",
        action="store_true",
        help="time every variant of the other architectures (minutes more)",
    )
    group.addoption(
        "--all-sizes",
        action="store_true",
        help="time Seg-S and Seg-B in bench_model_batch, not Seg-T alone (minutes more)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {}
    config.stash[FLOORS] = {}
    config.stash[WRITTEN] = {}


@pytest.fixture
def with_compile(request: pytest.FixtureRequest) -> bool:
    """Whether torch.compile contestants were asked for."""
    return request.config.getoption("--with-compile")


@pytest.fixture
def compiled(with_compile: bool) -> Callable[..., Callable[[], Any]]:
    """`compiled(function, *args)`: `harness.compiled`, which needs --with-compile to run.

    Without the option its contestants keep their rows, as not run.
    """
    if with_compile:
        return harness.compiled
    return lambda function, *args, **options: harness.not_run("needs --with-compile")


@pytest.fixture
def contest(
    request: pytest.FixtureRequest, benchmark: Any
) -> Iterator[Callable[..., list[harness.Row]]]:
    """`contest(case, contestants, ...)`: `harness.compare`, recorded.

    The rows go into the table at the end and, with --save-results, into a file, with the floor of
    `work`. With `gpu` a last row says where the GPU's times are. pytest-benchmark times the last
    contestant, ours, so that its own reports and comparisons work as well.
    """

    def run(
        case: str,
        contestants: dict[str, Callable[[], Any]],
        check: Callable[[str, Any], None] | None = None,
        rounds: int = 11,
        peers: int = 1,
        work: harness.Work | None = None,
        agreement: Callable[[str, Any], float] | None = None,
        images: int | None = None,
        kind: Callable[[str], str] | None = None,
        yardsticks: Collection[str] = (),
        gpu: bool = False,
    ) -> list[harness.Row]:
        rows = harness.compare(
            contestants | (harness.gpu_row() if gpu else {}),
            check,
            rounds,
            peers,
            agreement,
            images,
            kind,
            yardsticks,
        )
        name = request.path.stem.removeprefix("bench_")
        request.config.stash[RESULTS].setdefault(name, {})[case] = rows
        if work is not None:
            floors = request.config.stash[FLOORS].setdefault(name, {})
            floors[case] = harness.floor_of(work, rows)
        if request.config.getoption("--save-results"):
            # Now, not at the end: the next case may run out of time or memory.
            stash = request.config.stash
            cases, floors = stash[RESULTS][name], stash[FLOORS].get(name)
            stash[WRITTEN][name] = harness.save(name, cases, floors=floors)
        benchmark.extra_info.update(
            {row.contestant: round(row.ratio, 2) for row in rows if row.ratio is not None}
        )
        last = list(contestants)[-1]
        if all(row.not_run is None for row in rows if row.contestant == last):
            benchmark.pedantic(contestants[last], rounds=min(rounds, 5))
        return rows

    yield run
    if "torch._dynamo" in sys.modules:
        # Or cases would add up to the number of recompilations at which PyTorch gives up.
        sys.modules["torch._dynamo"].reset()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if not results:
        return
    terminalreporter.section("contestants (ratio: how many times faster than the quickest peer)")
    for name, cases in results.items():
        floors = config.stash[FLOORS].get(name, {})
        for case, rows in cases.items():
            for line in harness.table(f"{name}: {case}", rows, floors.get(case)):
                terminalreporter.write_line(line)
        if name in config.stash[WRITTEN]:
            terminalreporter.write_line(f"written: {config.stash[WRITTEN][name]}")
