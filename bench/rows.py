"""Measurements as rows: a CSV file with what they were made on in its first lines, and tables to print."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from fa3_metadata.tools.timing import summary

_COLUMNS = ("batch", "peer", "metric", "p20_us", "p50_us", "p80_us", "samples", "equal", "note")


@dataclass(frozen=True)
class Row:
    """One peer, batch size and metric: microseconds a call, None where it could not be measured.

    `equal`: whether its output is ours, None where it has none.
    """

    batch: int
    peer: str
    metric: str
    p20: float | None
    p50: float | None
    p80: float | None
    samples: int
    equal: bool | None = None
    note: str = ""


def row_of(
    batch: int, peer: str, metric: str, times: Sequence[float], equal: bool | None = None, note: str = ""
) -> Row:
    """The row of these samples; of none, an empty one."""
    p20, p50, p80 = summary(times) if times else (None, None, None)
    return Row(batch, peer, metric, p20, p50, p80, len(times), equal, note)


def write_csv(path: pathlib.Path, made_on: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Long format, one line a row; `made_on` as lines `# name: value` before the names of the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in made_on.items())
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(_COLUMNS)
        for row in rows:
            values = asdict(row)
            for name in ("p20", "p50", "p80"):
                values[name] = "" if values[name] is None else f"{values[name]:.3f}"
            values["equal"] = {True: "yes", False: "no", None: ""}[row.equal]
            lines.writerow(values.values())


def capture_lines(
    named: Sequence[object], times: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], digits: int = 1
) -> list[list[object]]:
    """Lines of `write_captures` for samples by metric, variant and capture; `named` come first in each."""
    return [
        [*named, variant, capture, metric, *(f"{us:.{digits}f}" for us in summary(samples))]
        for metric, captured in times.items()
        for variant, captures in captured.items()
        for capture, samples in enumerate(captures, 1)
    ]


def write_captures(path: pathlib.Path, names: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    """A CSV file of `capture_lines`; `names` of the columns that come first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        columns = [*names, "variant", "capture", "metric", "p20_us", "p50_us", "p80_us"]
        csv.writer(file).writerows([columns, *lines])


def read_csv(path: pathlib.Path) -> tuple[dict[str, str], list[Row]]:
    """What `write_csv` wrote. Raises `ValueError` for another file."""
    lines = path.read_text().splitlines()
    head = [line for line in lines if line.startswith("# ")]
    made_on = dict(line[2:].split(": ", 1) for line in head if ": " in line)
    table = csv.DictReader(lines[len(head) :])
    if tuple(table.fieldnames or ()) != _COLUMNS:
        raise ValueError(f"{path} has not the columns {', '.join(_COLUMNS)}")
    return made_on, [_read(line) for line in table]


def _read(line: Mapping[str, str]) -> Row:
    p20, p50, p80 = (float(line[name]) if line[name] else None for name in ("p20_us", "p50_us", "p80_us"))
    equal = {"yes": True, "no": False, "": None}[line["equal"]]
    return Row(
        int(line["batch"]), line["peer"], line["metric"], p20, p50, p80, int(line["samples"]), equal, line["note"]
    )


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Lines of a table whose columns are flush right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)
    return "\n".join(padded)


def metric_table(rows: Sequence[Row], metric: str, titles: Mapping[str, str], ours: str, floor: str) -> str:
    """Medians of one metric: a line a batch, a column a peer; in brackets over `ours`; last, ours over the floor.

    No ratio is given for a peer whose output differs from ours, nor any in a batch where ours itself is wrong.
    """
    by_batch: dict[int, dict[str, Row]] = {}
    for row in rows:
        if row.metric == metric:
            by_batch.setdefault(row.batch, {})[row.peer] = row
    peers = [name for name in titles if any(name in found for found in by_batch.values())]
    cells = [["batch", *(titles[name] for name in peers), "ours/floor"]]
    for batch, found in by_batch.items():
        base = found[ours]
        line = [str(batch), *(_cell(found.get(name), base) for name in peers)]
        cells.append([*line, _ratio(base, found.get(floor), base)])
    return aligned(cells)


def _cell(row: Row | None, base: Row) -> str:
    if row is None or row.p50 is None:
        return "-"
    if row is base:
        return f"{row.p50:.2f}" + (" (wrong)" if row.equal is False else "")
    if row.equal is None:  # makes nothing that is worth a ratio
        return f"{row.p50:.2f}"
    return f"{row.p50:.2f} ({_ratio(row, base, base)})"


def _ratio(over: Row, under: Row | None, base: Row) -> str:
    if under is None or not over.p50 or not under.p50:
        return "-"
    if False in (over.equal, under.equal, base.equal):
        return "differs"
    return f"{over.p50 / under.p50:.2f}x"
