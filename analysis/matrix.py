"""Several pairs beside one another: what SFT on each teacher's responses cost each student.

    python -m analysis.matrix runs/matrix

Gathers the reports of the cells that are there (folders with a report.json), wherever and whenever they were run, into
matrix.md, matrix.json and matrix.png.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from analysis.claims import interval
from analysis.figures import INK, new_figure
from analysis.report import plain, table
from base.errors import UserError, run_script
from base.files import alone, misfit, read_json, whole, write_json, write_text
from base.options import Parser

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHAPE = {"student": str, "teacher": str, "options": {}, "checkpoints": dict,  # what is read of a report.json
         "drop": {str: {"points": float, "ci95": [float] * 2, "p": float}}}


def write_matrix(folder: Path) -> dict[str, dict]:
    """The drop of every cell, {cell: {benchmark: points, ci95, p}}; writes matrix.json, matrix.md and matrix.png."""
    reports = {path.parent.name: read_json(path, SHAPE) for path in sorted(folder.glob("*/report.json"))}
    if not reports:
        raise UserError(f"{folder} has no cell that is done: no folder with a report.json")
    for cell, report in reports.items():
        for name in ("base", "off_model") if report["drop"] else ():
            shape = dict.fromkeys(report["drop"], {"accuracy": float, "n": int})
            if fault := misfit(report["checkpoints"].get(name), shape):
                raise UserError(f"{folder / cell / 'report.json'}: of {name} the field {fault}")
    drops = {cell: report["drop"] for cell, report in reports.items()}
    benchmarks = list(dict.fromkeys(name for drop in drops.values() for name in drop))
    body = [[report["student"], report["teacher"],
             *(_cell(report, benchmark) if benchmark in report["drop"] else "–" for benchmark in benchmarks)]
            for report in reports.values()]
    with whole(folder / "matrix.png") as part:
        draw_matrix(reports, benchmarks).savefig(part, format="png")
    write_text(folder / "matrix.md", "\n".join([
        "# Off-model SFT: pairs of student and teacher", "",
        "Points lost by SFT on the teacher's responses, with 95 % intervals over problems, each by itself; behind it "
        "base's accuracy and the off-model student's, in %, and the number of problems. An interval that covers 0 is "
        "no evidence of a loss.", "",
        table(["student", "teacher", *benchmarks], body), "", *differing_settings(reports),
        "![drops](matrix.png)", "",
        *(f"- [{plain(cell)}]({quote(cell)}/report.md)" for cell in reports), ""]))
    write_json(folder / "matrix.json", drops)
    return drops


def _cell(report: dict, benchmark: str) -> str:
    drop = report["drop"][benchmark]
    base, off = (100 * report["checkpoints"][name][benchmark]["accuracy"] for name in ("base", "off_model"))
    n = report["checkpoints"]["base"][benchmark]["n"]
    return f"{interval(drop['points'], drop['ci95'], 1)}; {base:.1f} → {off:.1f}; n = {n}"


def differing_settings(reports: dict[str, dict]) -> list[str]:
    """Lines that say by which of the options that reports name the cells of a matrix differ: none if by none."""
    lines = []
    for name in sorted({name for report in reports.values() for name in report["options"]}):
        values = {cell: json.dumps(report["options"].get(name), ensure_ascii=False) for cell, report in reports.items()}
        if len(set(values.values())) > 1:
            listing = "; ".join(f"{plain(value)} in {plain(cell)}" for cell, value in values.items())
            lines.append(f"- {plain(name)}: {listing}")
    return ["**The pairs were not run with the same settings**, and are comparable as far as these don't matter:", "",
            *lines, ""] if lines else []


def draw_matrix(reports: dict[str, dict], benchmarks: list[str]) -> "Figure":
    """Pairs × benchmarks, coloured by the size of the drop; bold where its interval is clear of 0."""
    from matplotlib.colors import TwoSlopeNorm

    figure, (axes,) = new_figure(1, 1.0 + 0.45 * len(reports), width=2.2 + 1.3 * len(benchmarks))
    points = [[report["drop"].get(name, {}).get("points", float("nan")) for name in benchmarks]
              for report in reports.values()]
    largest = max([5.0, *(abs(value) for row in points for value in row if value == value)])
    shown = axes.imshow(points, cmap="RdBu_r", norm=TwoSlopeNorm(0, -largest, largest), aspect="auto")
    for y, report in enumerate(reports.values()):
        for x, name in enumerate(benchmarks):
            if name in report["drop"]:
                drop = report["drop"][name]
                clear = drop["ci95"][0] > 0 or drop["ci95"][1] < 0
                dark = abs(drop["points"]) > 0.6 * largest
                axes.text(x, y, f"{drop['points']:.1f}", ha="center", va="center", fontsize=9,
                          color="white" if dark else INK, fontweight="bold" if clear else "normal")
    axes.set_xticks(range(len(benchmarks)), [name.replace("$", r"\$") for name in benchmarks])
    names = [" ← ".join(Path(report[role]).name.replace("$", r"\$") for role in ("student", "teacher"))  # no formulas
             for report in reports.values()]
    axes.set_yticks(range(len(reports)), names, fontsize=8)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.colorbar(shown, ax=axes, label="points lost")
    return figure


def main(argv: list[str] | None = None) -> None:
    """Gather the cells of a matrix."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="that holds the cells")
    folder = parser.parse_args(argv).folder
    with alone(folder / ".lock", wait=True):
        print(f"{len(write_matrix(folder))} pairs: {folder / 'matrix.md'}")


if __name__ == "__main__":
    run_script(main)
