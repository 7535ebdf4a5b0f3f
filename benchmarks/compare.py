"""Compare two result files of one benchmark by their ratios, case by case.

    python -m benchmarks.compare old/upsample_argmax.json new/upsample_argmax.json

A ratio (how many times faster than the quickest peer of its own run) survives a change of clock or
machine better than a time does. A change counts as one when the two ranges from the 20th to the
80th percentile do not overlap; anything less may be chance.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))

from records import PACKAGES, Record, Row, ratio, read

STYLES = {"faster": "green", "slower": "red"}
MACHINE_KEYS = ("cpu", "cores", "threads", "gpu", "torch_simd", "system", "python", "torch")
MACHINE_KEYS += PACKAGES


@dataclass(frozen=True)
class Change:
    """One contestant of one case in two files; a row is None in the file that lacks it."""

    contestant: str
    old: Row | None
    new: Row | None

    @property
    def factor(self) -> float | None:
        """New ratio / old ratio; None unless both have one."""
        if None in (self.old, self.new) or None in (self.old.ratio, self.new.ratio):
            return None
        return self.new.ratio / self.old.ratio

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" beyond the spread, "" within it, or what cannot be compared."""
        if self.old is None or self.new is None:
            return "new" if self.old is None else "gone"
        if self.factor is None:
            return "" if self.old.ratio == self.new.ratio else "not comparable"
        (old_low, old_high), (new_low, new_high) = spread(self.old), spread(self.new)
        return "faster" if new_low > old_high else "slower" if new_high < old_low else ""


def spread(row: Row) -> tuple[float, float]:
    """20th and 80th percentile of a row's ratio.

    Files that lack them have those of the time, from which it follows if the peer kept still.
    """
    if row.ratio_p20 is not None and row.ratio_p80 is not None:
        return row.ratio_p20, row.ratio_p80
    return row.ratio * row.ms / row.ms_p80, row.ratio * row.ms / row.ms_p20


def changes(old: Record, new: Record) -> dict[str, list[Change]]:
    """By case, those of the new file first; contestants in the new file's order."""
    result = {}
    for case in [*new.cases, *(case for case in old.cases if case not in new.cases)]:
        before = {row.contestant: row for row in old.cases.get(case, [])}
        after = {row.contestant: row for row in new.cases.get(case, [])}
        result[case] = [
            Change(name, before.get(name), after.get(name)) for name in {**after, **before}
        ]
    return result


def quickest_peers(rows: Sequence[Row]) -> list[str]:
    """Names of the contestants that ratios are against, one for each kind of which a peer ran."""
    return [row.contestant for row in rows if row.ratio == 1 and row.peer is not False]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return "not run" if row.not_run is not None else ratio(row.ratio)


def compare(
    old: Annotated[Path, typer.Argument(help="Result file of the earlier run.")],
    new: Annotated[Path, typer.Argument(help="Result file of the later run.")],
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if anything became slower.")
    ] = False,
) -> None:
    """Compare two result files by their ratios, and mark changes beyond the spread of the rounds.

    A change is marked when the ranges from the 20th to the 80th percentile do not overlap.
    """
    console = Console()
    try:
        before, after = read(old), read(new)
        if before.benchmark != after.benchmark:
            raise ValueError(f"two benchmarks: {before.benchmark} and {after.benchmark}")
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    for key in MACHINE_KEYS:
        # Older files lack some.
        values = before.machine.get(key), after.machine.get(key)
        if values[0] != values[1] and {key} <= before.machine.keys() & after.machine.keys():
            console.print(f"{key} differs: {values[0]} and {values[1]}", style="yellow")

    counts = dict.fromkeys(STYLES, 0)
    for case, found in changes(before, after).items():
        table = Table(title=escape(case), title_justify="left", box=None, pad_edge=False)
        table.add_column("contestant")
        for heading in ("old", "new", "new / old"):
            table.add_column(heading, justify="right")
        table.add_column("")
        for change in found:
            verdict = change.verdict
            if verdict in counts:
                counts[verdict] += 1
            table.add_row(
                escape(change.contestant),
                _cell(change.old),
                _cell(change.new),
                ratio(change.factor),
                verdict,
                style=STYLES.get(verdict),
            )
        console.print(table)
        peers = [quickest_peers(record.cases.get(case, [])) for record in (before, after)]
        if all(peers) and peers[0] != peers[1]:
            # A comparison of unlike things, such as when only one run let torch.compile take part.
            text = f"ratios are against other peers: {' and '.join(map(', '.join, peers))}"
            console.print(text, style="yellow", markup=False)
        console.print()
    console.print(f"{counts['faster']} faster, {counts['slower']} slower beyond the spread")
    if strict and counts["slower"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(compare)
