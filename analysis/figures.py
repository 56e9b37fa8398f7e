"""The report's figures, in one style, legible at the width of a README."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.findings import arms
from base.files import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1b1b1b", "#6b6b6b", "#e3e3e3"
# Okabe and Ito's palette, which colour-blind readers tell apart
COLOURS = {"base": "#0072b2", "teacher": "#6b6b6b", "off_model": "#d55e00", "recovered": "#009e73",
           "control": "#cc79a7", "scaled": "#e69f00"}


def draw_all(report: dict, folder: Path) -> list[str]:
    """Write every figure that the report has the numbers for; returns their names."""
    benchmark = main_benchmark(report)
    path = report["together"].get(benchmark)
    there = arms(list(report["checkpoints"]))
    figures = {
        "accuracy": (draw_accuracy, True),
        "overview": (draw_overview, benchmark and report["checkpoints"]["base"][benchmark]["by_level"] and there),
        "recovery": (draw_recovery, there),
        "style": (draw_style, path and path["style"] and len(path["path"]) > 2),
        "distance": (draw_distance, benchmark and report["kl"]),
    }
    drawn = []
    for name, (draw, there) in figures.items():
        if there:
            with whole(folder / f"{name}.png") as part:
                draw(report).savefig(part, format="png")
            drawn.append(name)
    return drawn


def main_benchmark(report: dict) -> str | None:
    """The benchmark answered in words that lost most: of those with levels, where there are such."""
    worded = list(report["style"]["features"].get("base", {}))
    there = [name for name in worded if len(report["checkpoints"]["base"][name]["by_level"]) > 1] or worded
    return max(there, key=lambda name: report["drop"][name]["points"]) if there and report["drop"] else None


def colour(checkpoint: str) -> str:
    """A checkpoint's colour, by its kind."""
    return COLOURS[next((kind for kind in COLOURS if checkpoint.startswith(kind)), "teacher")]


def new_figure(columns: int, height: float, width: float = 3.4) -> tuple["Figure", Sequence["Axes"]]:
    """A figure in the house style and its axes, `columns` panels wide."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + width * columns, height), dpi=150, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(MUTED)
        axes.tick_params(colors=INK, labelsize=9)
        axes.set_axisbelow(True)
    return figure, panels


def _label(axes: "Axes", title: str, x: str = "", y: str = "") -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(x, fontsize=9, color=MUTED)
    axes.set_ylabel(y, fontsize=9, color=MUTED)


def draw_accuracy(report: dict) -> "Figure":
    """A panel per benchmark: the accuracy of base, teacher, off_model, the last recovered checkpoint, and of whatever
    is on no curve (the controls), with its interval."""
    checkpoints = report["checkpoints"]
    there = arms(list(checkpoints)).get("recovered", [])
    curves = ("off_model_step", "recovered", "scaled")
    last = f"recovered_{max(there, default=0)}"
    names = [name for name in checkpoints if not name.startswith(curves) or name == last]
    benchmarks = list(checkpoints["base"])
    figure, panels = new_figure(len(benchmarks), 0.9 + 0.27 * len(names), width=2.6)
    for axes, benchmark in zip(panels, benchmarks, strict=True):
        for y, name in enumerate(reversed(names)):
            entry = checkpoints[name][benchmark]
            axes.plot([100 * bound for bound in entry["ci95"]], [y, y], color=colour(name), linewidth=2, alpha=0.45,
                      solid_capstyle="round")
            axes.plot(100 * entry["accuracy"], y, "o", color=colour(name), markersize=5)
        axes.axvline(100 * checkpoints["base"][benchmark]["accuracy"], color=COLOURS["base"], linewidth=1,
                     linestyle=":")
        labels = [name.replace("_", " ") for name in reversed(names)] if axes is panels[0] else []
        axes.set_yticks(range(len(names)) if labels else [], labels)
        axes.set_xlim(-2, 102)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.grid(axis="x", color=GRID)
        _label(axes, f"{benchmark} (n = {checkpoints['base'][benchmark]['n']})", "accuracy, %")
    return figure


def draw_recovery(report: dict) -> "Figure":
    """A panel per benchmark: accuracy over the number of native examples, from the off-model student on."""
    benchmarks = list(report["checkpoints"]["base"])
    figure, panels = new_figure(len(benchmarks), 2.8)
    for axes, benchmark in zip(panels, benchmarks, strict=True):
        _draw_arms(report, benchmark, axes)
        _label(axes, benchmark, "native examples", "accuracy, %" if axes is panels[0] else "")
    panels[-1].legend(fontsize=8, frameon=False)
    return figure


def _draw_arms(report: dict, benchmark: str, axes: "Axes") -> None:
    checkpoints = report["checkpoints"]
    base, off = (checkpoints[name][benchmark] for name in ("base", "off_model"))
    axes.axhline(100 * base["accuracy"], color=COLOURS["base"], linewidth=1.5, linestyle=":", label="base")
    there = arms(list(checkpoints))
    for arm, counts in there.items():
        entries = [off, *(checkpoints[f"{arm}_{n}"][benchmark] for n in counts)]
        places = range(len(entries))  # evenly spaced: the Ns are chosen by doubling or so
        again, in_steps = "_seed_" in arm, arm.startswith("recovered_in_")
        if not again:
            low, high = ([100 * entry["ci95"][i] for entry in entries] for i in (0, 1))
            axes.fill_between(places, low, high, color=COLOURS["recovered"], alpha=0.12, linewidth=0)
        line = ("-." if in_steps else ":") if again else "--s" if in_steps else "-o"
        axes.plot(places, [100 * entry["accuracy"] for entry in entries], line, color=COLOURS["recovered"],
                  markersize=5, label=arm.replace("_", " "))
        axes.set_xticks(places, ["0", *map(str, counts)])
    more = checkpoints.get("control_more_teacher")
    if more:  # as many examples as the last point's, of the teacher's
        axes.plot(len(there["recovered"]), 100 * more[benchmark]["accuracy"], "D", color=COLOURS["control"],
                  markersize=6, label="more teacher data")
    axes.plot(0, 100 * off["accuracy"], "o", color=COLOURS["off_model"], markersize=7, label="off model")
    axes.set_ylim(-2, 105)
    axes.grid(axis="y", color=GRID)


def draw_overview(report: dict) -> "Figure":
    """What was lost by level, and what came back."""
    benchmark, checkpoints = main_benchmark(report), report["checkpoints"]
    figure, (left, right) = new_figure(2, 4.2)
    most = arms(list(checkpoints))["recovered"][-1]
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
        cells = checkpoints[name][benchmark]["by_level"] if name in checkpoints else {}
        if cells:
            left.plot(list(cells), [100 * cell["correct"] / cell["n"] for cell in cells.values()], label=label, **style)
    left.set_ylim(-2, 105)
    left.grid(axis="y", color=GRID)
    _label(left, f"{benchmark}: what was lost, by level", "level", "accuracy, %")
    _draw_arms(report, benchmark, right)
    _label(right, "what came back", "native examples")
    for axes in (left, right):
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    return figure


def draw_style(report: dict) -> "Figure":
    """Along SFT and recovery, and over the adapter's scale: accuracy beside the style index."""
    benchmark = main_benchmark(report)
    one, index = report["together"][benchmark], report["style"]["index"]
    scaled = {0.0: "base", 1.0: "off_model"} | {
        float(name.removeprefix("scaled_")): name for name in report["checkpoints"] if name.startswith("scaled_")}
    names = [scaled[scale] for scale in sorted(scaled)]
    curves = [(range(len(one["path"])), one["accuracy"], one["style"]),
              (sorted(scaled), [report["checkpoints"][name][benchmark]["accuracy"] for name in names],
               [index[name][benchmark]["mean"] for name in names])]
    figure, panels = new_figure(2 if len(scaled) > 2 else 1, 3.2, width=4.6)
    for axes, (places, accuracies, style) in zip(panels, curves, strict=False):
        axes.plot(places, [100 * value for value in accuracies], "-o", color=COLOURS["base"], markersize=5,
                  label="accuracy")
        axes.plot(places, [100 * value for value in style], "--s", color=COLOURS["off_model"], markersize=5,
                  label="style: 0 base's, 100 the teacher's")
        axes.set_ylim(min(0, *(100 * value for value in style)) - 2, max(105, *(100 * value + 5 for value in style)))
        axes.grid(axis="y", color=GRID)
    short = [name.replace("off_model_step_", "").replace("recovered_", "+") for name in one["path"]]
    panels[0].set_xticks(curves[0][0], short, rotation=60, fontsize=8)
    _label(panels[0], f"{benchmark}: SFT, then recovery", "steps of SFT, then + native examples", "%")
    if len(panels) > 1:
        _label(panels[1], "the off-model adapter, scaled", "scale")
    panels[-1].legend(fontsize=8, frameon=False)
    return figure


def draw_distance(report: dict) -> "Figure":
    """Accuracy over the KL from the base model, on its own responses to the benchmark and to chat prompts."""
    benchmark = main_benchmark(report)
    figure, panels = new_figure(2, 3.6, width=4.2)
    for axes, stem in zip(panels, (benchmark, "native"), strict=True):
        shown, controls = set(), 0
        for name, of in report["kl"].items():
            if stem not in of or of[stem]["mean"] <= 0:
                continue
            kind = next((kind for kind in COLOURS if name.startswith(kind)), "teacher")
            place = (of[stem]["mean"], 100 * report["checkpoints"][name][benchmark]["accuracy"])
            axes.plot(*place, "o", color=colour(name), markersize=6,
                      label=kind.replace("_", " ") if kind not in shown else None)
            shown.add(kind)
            if kind == "control":  # each another thing; below one another, since many have the same accuracy
                controls += 1
                axes.annotate(name.removeprefix("control_").replace("_", " "), place, fontsize=7, color=MUTED,
                              xytext=(0, -8 - 9 * (controls % 3)), textcoords="offset points", ha="center")
        axes.axhline(100 * report["checkpoints"]["base"][benchmark]["accuracy"], color=COLOURS["base"], linewidth=1,
                     linestyle=":")
        axes.set_xscale("log")
        axes.set_ylim(-2, 105)
        axes.grid(color=GRID)
        _label(axes, f"{benchmark} accuracy over KL",
               f"nats per token, on base's {'chat' if stem == 'native' else stem} responses", "accuracy, %")
    panels[-1].legend(fontsize=8, frameon=False, loc="lower left")
    return figure
