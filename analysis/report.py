"""The report of an experiment folder: report.json, report.md and figures, from the graded rows alone."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.compare import check_same_problems
from analysis.statistics import compare_rows, summarise
from base.files import read_json, whole, write_json, write_text
from data.rows import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEANING = {
    "base_in_teacher_style": "the student before SFT, made to begin as the teacher does: what is its skill in that "
                             "style?",
    "off_model_in_student_style": "the off-model student, made to begin as it used to: is the skill still there?",
    "control_native": "SFT on the student's own responses to the teacher's prompts: does SFT as such do harm?",
    "control_native_in_teacher_style": "the same, made to begin as the teacher does: is it the style?",
    "control_teacher_in_student_style": "the teacher's responses, made to begin as the student does: is it the source?",
    "control_noise": "Gaussian noise of each matrix's own norm of the SFT's change: is it noise on the weights?",
    "control_more_teacher": "the recovery's steps and prompts with the teacher's responses: is it more training?",
}
INK, MUTED, GRID = "#1b1b1b", "#6b6b6b", "#e3e3e3"
# Okabe and Ito's palette, which colour-blind readers tell apart
COLOURS = {"base": "#0072b2", "teacher": "#6b6b6b", "off_model": "#d55e00", "recovered": "#009e73",
           "control": "#cc79a7"}
CURVE = re.compile(r"(recovered(?:_in_\d+_steps)?)_(\d+)")  # checkpoints by number of native examples
FORCED = ("base_in_teacher_style", "off_model_in_student_style")  # style by --opener, not by training
SOURCE_AND_STYLE = (  # the 2 × 2: whose responses (rows), in whose style (columns)
    ("the student's", "control_native", "control_native_in_teacher_style"),
    ("the teacher's", "control_teacher_in_student_style", "off_model"),
)


def write_report(folder: Path, student: str, teacher: str, checkpoints: Sequence[str], seconds: dict[str, float],
                 openers: Sequence[str] | None = None, note: str = "") -> dict:
    """From evals/<checkpoint> to report.json, report.md and figures/ (contract C5); returns what report.json holds.

    `openers` are what responses in the student's and in the teacher's style begin with; `note` is a paragraph that
    the page begins with.
    """
    rows = read_evaluations(folder / "evals", checkpoints)
    report = {"student": student, "teacher": teacher, "note": note, **build(rows, openers), "seconds": seconds}
    draw_accuracy(report, folder / "figures" / "accuracy.png")
    if curves(report):
        draw_recovery(report, folder / "figures" / "recovery.png")
    if most_lost(report):
        draw_overview(report, most_lost(report), folder / "figures" / "overview.png")
    write_text(folder / "report.md", to_markdown(report))
    write_json(folder / "report.json", report)
    return report


def read_evaluations(folder: Path, checkpoints: Sequence[str]) -> dict[str, dict[str, list[dict]]]:
    """Graded rows by checkpoint and benchmark; all on the same problems as the first checkpoint's."""
    rows = {name: {benchmark: read_rows(folder / name / f"{benchmark}.jsonl")
                   for benchmark in read_json(folder / name / "summary.json")} for name in checkpoints}
    first = checkpoints[0]
    for name in checkpoints:
        for benchmark, first_rows in rows[first].items():
            check_same_problems(benchmark, folder / first, first_rows, folder / name, rows[name].get(benchmark, []))
    return rows


def build(rows: dict[str, dict[str, list[dict]]], openers: Sequence[str] | None = None) -> dict:
    """checkpoints, drop, recovered_fraction and style from graded rows by checkpoint and benchmark."""
    checkpoints = {name: {benchmark: summarise(graded) for benchmark, graded in by_benchmark.items()}
                   for name, by_benchmark in rows.items()}

    report = {"checkpoints": checkpoints, "drop": {}, "lost": {}, "recovered_fraction": {}}
    for benchmark in rows["base"] if "off_model" in rows else ():
        found = compare_rows(rows["base"][benchmark], rows["off_model"][benchmark])
        report["drop"][benchmark] = {name: found[name] for name in ("points", "ci95", "p")}
        report["lost"][benchmark] = found["lost"] | {"gained": found["gained"]}
        base, off = (checkpoints[name][benchmark]["correct"] for name in ("base", "off_model"))
        for curve, counts in curves(report).items():
            # a share of nothing is no number: where SFT lost nothing, there is nothing to bring back
            report.setdefault(f"{curve}_fraction", {})[benchmark] = {
                str(n): (checkpoints[f"{curve}_{n}"][benchmark]["correct"] - off) / (base - off) if base > off else None
                for n in counts
            }
    if openers:
        worded = [benchmark for benchmark, graded in rows["base"].items()
                  if any(len(row["response"].split()) > 1 for row in graded)]  # a letter alone has no style
        report["style"] = {name: {benchmark: style_shares(by_benchmark[benchmark], openers) for benchmark in worded}
                           for name, by_benchmark in rows.items() if worded and name not in FORCED}
    return report


def style_shares(rows: Sequence[dict], openers: Sequence[str]) -> dict[str, float]:
    """Share of the responses that begin as the student's style does, and as the teacher's."""
    return {whose: sum(row["response"].lstrip().startswith(opener) for row in rows) / len(rows)
            for whose, opener in zip(("student", "teacher"), openers, strict=True)}


def curves(report: dict) -> dict[str, list[int]]:
    """The recovery curves, "recovered" and perhaps "recovered_in_S_steps", with their numbers of native examples."""
    found: dict[str, list[int]] = {}
    for name in report["checkpoints"]:
        if match := CURVE.fullmatch(name):
            found.setdefault(match[1], []).append(int(match[2]))
    return found


def to_markdown(report: dict) -> str:
    """The report as a page of tables."""
    checkpoints, benchmarks = report["checkpoints"], list(report["checkpoints"]["base"])
    most = max(checkpoints["base"][benchmark]["n"] for benchmark in benchmarks)
    lines = [
        f"# Off-model SFT: {_plain(report['student'])} on responses of {_plain(report['teacher'])}", "",
        *([report["note"], ""] if report["note"] else []),
        f"Accuracy in % with its 95 % Wilson interval, on the same problems for every checkpoint (n ≤ {most}).", "",
        _table(["checkpoint", *benchmarks],
               [[name, *(_accuracy(entry[benchmark]) for benchmark in benchmarks)]
                for name, entry in checkpoints.items()]),
    ]
    notes = [f"- `{name}`: {meaning}" for name, meaning in MEANING.items() if name in checkpoints]
    lines += [*notes, ""] if notes else []
    lines += ["![accuracy](figures/accuracy.png)", ""]
    if most_lost(report):
        lines += ["![lost by level, and recovered](figures/overview.png)", ""]
    if report["drop"]:
        lines += [
            "## What SFT on the teacher's responses cost", "",
            "Points lost from base to off_model: bootstrap interval over problems, exact McNemar p. Then what became "
            "of the problems that base had right: cut at the limit, ended without an answer, answered wrong. Where "
            "most are cut, a higher --max-new-tokens may show that nothing was lost.", "",
            _table(["benchmark", "lost, points", "95 %", "p", "cut", "no answer", "wrong", "gained",
                    "all cut, base → off", "all without an answer"],
                   [_drop_row(benchmark, report) for benchmark in benchmarks]),
        ]
    if curves(report):
        lines += ["## What native examples brought back", "",
                  "Share of the drop that SFT on N of the student's own responses recovered; – where nothing was lost. "
                  "By epochs, more examples are more steps too.", ""]
        for curve, counts in curves(report).items():
            lines.append(_table([curve.replace("_", " "), *(f"N = {n}" for n in counts)],
                                [[benchmark, *(_share(report[f"{curve}_fraction"][benchmark][str(n)]) for n in counts)]
                                 for benchmark in benchmarks]))
        lines += ["![recovery](figures/recovery.png)", ""]
    if all(name in checkpoints for _, *names in SOURCE_AND_STYLE for name in names):
        lines += ["## Source or style", "", "Accuracy in % after SFT on the same prompts' responses, whoever gave them "
                  "and in whichever style.", "",
                  _table(["responses", *(f"{benchmark}, {whose} style" for benchmark in benchmarks
                                         for whose in ("the student's", "the teacher's"))],
                         [[source, *(_accuracy(checkpoints[name][b]) for b in benchmarks for name in names)]
                          for source, *names in SOURCE_AND_STYLE])]
    if report.get("style"):
        shown = list(report["style"]["base"])
        lines += ["## Style", "", "Responses in % that begin as the student's style does / as the teacher's does.", "",
                  _table(["checkpoint", *shown],
                         [[name, *(f"{100 * by[b]['student']:.0f} / {100 * by[b]['teacher']:.0f}" for b in shown)]
                          for name, by in report["style"].items()])]
    for benchmark in benchmarks:
        levels = list(checkpoints["base"][benchmark]["by_level"])
        if levels:
            lines += [f"## {_plain(benchmark)} by level", "", "Correct of n.", "", _table(
                ["checkpoint", *(f"level {_plain(level)}" for level in levels)],
                [[name, *(f"{cell['correct']} of {cell['n']}" for cell in entry[benchmark]["by_level"].values())]
                 for name, entry in checkpoints.items()])]
    times = [[name, f"{spent:.0f}"] for name, spent in report["seconds"].items()]
    lines += ["## Time", "", _table(["stage", "seconds"], times)]
    return "\n".join(lines)


def summary_table(report: dict) -> str:
    """Checkpoints × benchmarks for a terminal."""
    benchmarks = list(report["checkpoints"]["base"])
    body = [[name, *(_accuracy(entry[benchmark]) for benchmark in benchmarks)]
            for name, entry in report["checkpoints"].items()]
    rows = [["accuracy, % (95 %)", *benchmarks], *body]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, followed by an empty line."""
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(map(_plain, row))} |" for row in rows) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no link, image, HTML or new cell can come out of it."""
    escaped = "".join(f"\\{c}" if c in "\\`*[]<>|!&#" else c for c in text)
    return " ".join(escaped.split())


def _accuracy(entry: dict) -> str:
    low, high = entry["ci95"]
    return f"{100 * entry['accuracy']:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def _drop_row(benchmark: str, report: dict) -> list[str]:
    drop = report["drop"][benchmark]
    base, off = (report["checkpoints"][name][benchmark] for name in ("base", "off_model"))
    return [benchmark, f"{drop['points']:.1f}", f"{drop['ci95'][0]:.1f} to {drop['ci95'][1]:.1f}", f"{drop['p']:.3g}",
            *(str(report["lost"][benchmark][fate]) for fate in ("truncated", "unparsed", "wrong", "gained")),
            f"{base['truncated']} → {off['truncated']}", f"{base['unparsed']} → {off['unparsed']}"]


def _share(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.0f} %"


def _figure(columns: int, height: float) -> tuple:
    """A matplotlib figure and its axes in the house style, `columns` panels wide."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 3.4 * columns, height), dpi=150, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(MUTED)
        axes.tick_params(colors=INK, labelsize=9)
        axes.set_axisbelow(True)
    return figure, panels


def _save(figure: object, path: Path) -> None:
    with whole(path) as part:
        figure.savefig(part, format="png")


def draw_accuracy(report: dict, path: Path) -> None:
    """A panel per benchmark: each checkpoint's accuracy with its interval."""
    checkpoints = report["checkpoints"]
    benchmarks, names = list(checkpoints["base"]), list(checkpoints)[::-1]
    figure, panels = _figure(len(benchmarks), 0.9 + 0.33 * len(names))
    for axes, benchmark in zip(panels, benchmarks, strict=True):
        for y, name in enumerate(names):
            entry = checkpoints[name][benchmark]
            colour = COLOURS[next(key for key in COLOURS if name.startswith(key))]
            low, high = (100 * bound for bound in entry["ci95"])
            axes.plot([low, high], [y, y], color=colour, linewidth=2, alpha=0.45, solid_capstyle="round")
            axes.plot(100 * entry["accuracy"], y, "o", color=colour, markersize=6)
        base = 100 * checkpoints["base"][benchmark]["accuracy"]
        axes.axvline(base, color=COLOURS["base"], linewidth=1, linestyle=":")
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names] if axes is panels[0] else [])
        axes.set_xlim(-2, 102)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.grid(axis="x", color=GRID)
        axes.set_title(f"{benchmark} (n = {checkpoints['base'][benchmark]['n']})", fontsize=10, color=INK, loc="left")
        axes.set_xlabel("accuracy, %", fontsize=9, color=MUTED)
    _save(figure, path)


def draw_recovery(report: dict, path: Path) -> None:
    """A panel per benchmark: accuracy over the number of native examples, from the off-model student on."""
    benchmarks = list(report["checkpoints"]["base"])
    figure, panels = _figure(len(benchmarks), 2.8)
    for axes, benchmark in zip(panels, benchmarks, strict=True):
        _draw_curves(report, benchmark, axes)
        axes.set_title(benchmark, fontsize=10, color=INK, loc="left")
    panels[0].set_ylabel("accuracy, %", fontsize=9, color=MUTED)
    panels[-1].legend(fontsize=8, frameon=False)
    _save(figure, path)


def _draw_curves(report: dict, benchmark: str, axes: "Axes") -> None:
    checkpoints = report["checkpoints"]
    base, off = (checkpoints[name][benchmark] for name in ("base", "off_model"))
    axes.axhline(100 * base["accuracy"], color=COLOURS["base"], linewidth=1.5, linestyle=":", label="base")
    for (curve, counts), line in zip(curves(report).items(), ("-o", "--s"), strict=False):
        entries = [off, *(checkpoints[f"{curve}_{n}"][benchmark] for n in counts)]
        places = range(len(entries))  # evenly spaced: the Ns are chosen by doubling or so
        low, high = ([100 * entry["ci95"][i] for entry in entries] for i in (0, 1))
        axes.fill_between(places, low, high, color=COLOURS["recovered"], alpha=0.12, linewidth=0)
        axes.plot(places, [100 * entry["accuracy"] for entry in entries], line, color=COLOURS["recovered"],
                  markersize=5, label=curve.replace("_", " "))
        axes.set_xticks(places, ["0", *map(str, counts)])
    more = checkpoints.get("control_more_teacher")
    if more:  # as many examples as the last point's, of the teacher's
        axes.plot(places[-1], 100 * more[benchmark]["accuracy"], "D", color=COLOURS["control"], markersize=6,
                  label="more teacher data")
    axes.plot(0, 100 * off["accuracy"], "o", color=COLOURS["off_model"], markersize=7, label="off model")
    axes.set_ylim(-2, 105)
    axes.grid(axis="y", color=GRID)
    axes.set_xlabel("native examples", fontsize=9, color=MUTED)


def most_lost(report: dict) -> str | None:
    """The benchmark with levels that lost most; None if there is none, or no recovery to show with it."""
    levelled = [name for name in report["drop"] if len(report["checkpoints"]["base"][name]["by_level"]) > 1]
    return max(levelled, key=lambda name: report["drop"][name]["points"]) if levelled and curves(report) else None


def draw_overview(report: dict, benchmark: str, path: Path) -> None:
    """What was lost by level, and what came back."""
    checkpoints = report["checkpoints"]
    figure, (left, right) = _figure(2, 4.2)
    most = curves(report)["recovered"][-1]
    lines = {  # those that often lie on one another are told apart by width and marks
        "base": ("base", {"color": COLOURS["base"], "linewidth": 6, "alpha": 0.3}),
        f"recovered_{most}": (f"recovered, N = {most}",
                              {"color": COLOURS["recovered"], "marker": "o", "markersize": 4}),
        "off_model": ("off model", {"color": COLOURS["off_model"], "marker": "o", "markersize": 5}),
        "base_in_teacher_style": ("base, in teacher's style",
                                  {"color": COLOURS["base"], "linestyle": "--", "marker": "s", "markersize": 5}),
        "off_model_in_student_style": ("off model, in student's style",
                                       {"color": COLOURS["off_model"], "linestyle": "", "marker": "s", "markersize": 9,
                                        "markerfacecolor": "none"}),
    }
    for name, (label, style) in lines.items():
        if name in checkpoints:
            cells = checkpoints[name][benchmark]["by_level"]
            left.plot(list(cells), [100 * cell["correct"] / cell["n"] for cell in cells.values()], label=label, **style)
    left.set_ylim(-2, 105)
    left.grid(axis="y", color=GRID)
    left.set_title(f"{benchmark}: what was lost, by level", fontsize=10, color=INK, loc="left")
    left.set_xlabel("level", fontsize=9, color=MUTED)
    left.set_ylabel("accuracy, %", fontsize=9, color=MUTED)
    _draw_curves(report, benchmark, right)
    right.set_title("what came back", fontsize=10, color=INK, loc="left")
    for axes in (left, right):
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    _save(figure, path)
