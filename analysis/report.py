"""The report of an experiment folder: report.json, figures and report.md, a paper of two pages.

    python -m analysis.report runs/mini

Every figure comes from the row files (analysis/findings.py), every sentence from the figures (analysis/claims.py);
below each part stand the files that it was made from.
recover.py writes the report at its end; as a program this writes it again, after `evaluate.py --rescore`, say.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from analysis.claims import chat_files, claims, effect, files, spread
from analysis.figures import draw_all, main_benchmark
from analysis.findings import Rows, arms, find, kind_of, lost_benchmarks
from analysis.style import FEATURES
from base.errors import printable, run_script
from base.files import alone, write_json, write_text
from base.options import Parser

MEANING = {
    "off_model_step": "on the way to off_model, after so many steps of SFT",
    "recovered_in": "with N native examples, in the same number of steps whatever N",
    "recovered_seed": "the same with other native examples, in another order",
    "recovered": "off_model, trained on N of the student's own responses to other prompts",
    "scaled": "off_model's adapter, its effect multiplied",
    "base_in_teacher_style": "the student before SFT, made to respond as the teacher does: its skill in that style",
    "off_model_in_student_style": "the off-model student, made to respond as it used to: is the skill still there?",
    "base_under": "under another system prompt", "off_model_under": "under another system prompt",
    "control_native_in_teacher_style": "SFT on the student's own responses in the teacher's style",
    "control_native": "SFT on the student's own responses to the teacher's prompts",
    "control_teacher_in_student_style": "SFT on the teacher's responses in the student's style",
    "control_noise": "Gaussian noise of each matrix's own norm of the SFT's change",
    "control_more_teacher": "the recovery's steps and prompts with the teacher's responses",
    "control_matched_nll": "SFT on the student's own responses, at a temperature that makes them as unlikely as the "
                           "teacher's",
}
OVERVIEW = ("base", "off_model", "base_in_teacher_style", "off_model_in_student_style", "control_more_teacher")
SHOWN = 700  # characters of a response in a transcript, around the place where it parts from base's


def write_report(folder: Path) -> dict:
    """From the rows in `folder` to report.json, report.md and figures/ (contract C5); returns report.json's content."""
    report, rows = find(folder)
    report["claims"] = claims(report, rows)
    drawn = draw_all(report, folder / "figures")
    write_text(folder / "report.md", to_markdown(report, rows, drawn))
    write_json(folder / "report.json", report)
    return report


class Page:
    """Markdown that grows part by part, each with the names of the files that its figures were computed from."""

    def __init__(self, title: str, figures: Sequence[str]) -> None:
        """`figures`: names of those that have been drawn."""
        self.lines, self.figures = [f"# {title}", ""], figures

    def add(self, title: str, *paragraphs: str, sources: Sequence[str] = (), figure: str | None = None) -> None:
        """A part; an empty paragraph is left out, and so is a figure that was not drawn."""
        self.lines += [f"## {title}", ""]
        for paragraph in filter(None, paragraphs):
            self.lines += [paragraph, ""]
        if figure in self.figures:
            self.lines += [f"![{figure}](figures/{figure}.png)", ""]
        if sources:
            self.lines += [f"<sub>From {', '.join(f'`{name}`' for name in sources)}.</sub>", ""]


def to_markdown(report: dict, rows: Rows, figures: Sequence[str] = ()) -> str:
    """The report as a page."""
    checkpoints = report["checkpoints"]
    benchmarks, recovered = list(checkpoints["base"]), arms(list(checkpoints)).get("recovered", [])
    page = Page(f"Off-model SFT: {plain(report['student'])} on responses of {plain(report['teacher'])}", figures)
    page.lines += [plain(report["note"]), ""] if report["note"] else []
    page.add("Question", *_abstract(report, recovered))
    page.add("Set-up", _setup(report))
    main = [name for name in ("base", "teacher", "off_model", *(f"recovered_{n}" for n in recovered))
            if name in checkpoints]
    counts = ", ".join(str(checkpoints["base"][benchmark]["n"]) for benchmark in benchmarks)
    page.add("Accuracy",
             f"In %, with 95 % Wilson intervals; the same problems for every checkpoint (n = {counts}). "
             "recovered_N is off_model, trained on N of the student's own responses to other prompts. The table at the "
             "end has every checkpoint.",
             table(["checkpoint", *benchmarks], _accuracies({name: checkpoints[name] for name in main})),
             sources=files("evals", main, benchmarks))
    if report["drop"]:
        _add_losses(page, report, benchmarks)
    if recovered:
        _add_recovery(page, report, benchmarks)
    if report["claims"]:
        page.add("Why: what each control says", "\n".join(
            f"- **{plain(one['about'])}.** {plain(one['text'])} <sub>{', '.join(f'`{name}`' for name in one['rows'])}"
            "</sub>" for one in report["claims"]), sources=files("evals", checkpoints, benchmarks), figure="accuracy")
    _add_style(page, report, main)
    if "off_model" in rows and main_benchmark(report):
        _add_transcripts(page, rows, main_benchmark(report), recovered)
    page.add("Limits", "\n".join(f"- {limit}" for limit in _limits(report)))
    _add_appendix(page, report, benchmarks)
    return "\n".join(page.lines)


def _abstract(report: dict, recovered: Sequence[int]) -> list[str]:
    """The question, and the answer in sentences that the intervals allow."""
    asked = (f"What does LoRA SFT on the responses of {plain(report['teacher'])} to chat prompts cost "
             f"{plain(report['student'])}, why, and what brings it back?")
    said = [f"On {plain(benchmark)} there is {effect(drop)}." for benchmark, drop in report["drop"].items()]
    for benchmark in lost_benchmarks(report) if recovered else ():
        share, bounds = (report[f"recovered_{kind}"][benchmark][str(recovered[-1])] for kind in ("fraction", "ci95"))
        shown, after = _share(share, bounds), f"SFT on {recovered[-1]} of its own responses to other prompts"
        back = bounds and bounds[0] is not None and bounds[0] > 0
        said.append(f"{after} brought back {shown} of what {plain(benchmark)} lost." if back else
                    f"There is no evidence that {after} brought back any of what {plain(benchmark)} lost ({shown}).")
    return [asked, " ".join(said)]


def _setup(report: dict) -> str:
    had = report["options"]
    length = f"{had['steps']} steps" if had.get("steps") else f"{had['epochs']} epochs"
    levels = f" (of level {', '.join(map(plain, had['levels']))}, where there are levels)" if had.get("levels") else ""
    return (f"{had['n_train']} responses of the teacher, sampled at temperature {had['temperature']} and at most "
            f"{had['max_new_tokens']} tokens long; LoRA of rank {had['rank']}, {length}, steps of at "
            f"most {had['batch_tokens']} tokens, peak learning rate {had['lr']:g}, weights in {plain(had['dtype'])}, "
            f"seed {had['seed']}. Benchmarks{levels} are answered greedily. All options, checksums of the data and "
            "package versions are in config.json, the commands and their times in stages.json; code revision "
            f"{plain(report['revision'] or 'unknown')}.")


def _add_losses(page: Page, report: dict, benchmarks: Sequence[str]) -> None:
    """What was lost, what became of it, and on which problems."""
    base, off = (report["checkpoints"][name] for name in ("base", "off_model"))
    page.add("What SFT on the teacher's responses cost",
             "Points lost from base to off_model: 95 % interval over problems (Agresti and Min), McNemar's mid-p. Then "
             "what became of the problems that base had right: cut at the limit, ended without an answer, answered "
             "wrong. Where most are cut, a higher --max-new-tokens may show that nothing was lost.",
             table(["benchmark", "lost, points", "95 %", "p", "cut", "no answer", "wrong", "gained",
                    "all cut, base → off", "all without an answer"],
                   [[name, *_points(drop), _p(drop["p"]),
                     *(str(report["lost"][name][fate]) for fate in ("truncated", "unparsed", "wrong", "gained")),
                     *(f"{base[name][fate]} → {off[name][fate]}" for fate in ("truncated", "unparsed"))]
                    for name, drop in report["drop"].items()]),
             sources=files("evals", [name for name in report["checkpoints"]
                             if name in OVERVIEW or name.startswith("recovered")], benchmarks), figure="overview")
    sentences, body, lost = [], [], lost_benchmarks(report)
    for benchmark, kinds in report["difficulty"].items():
        for kind, found in kinds.items():
            if found["trend"] and benchmark in lost:
                of = {"level": "level", "length": "the length of the base model's own solution (quarters)"}[kind]
                slope, p = found["trend"]["slope"], found["trend"]["p"]
                verb = "there is no evidence that the loss grows or shrinks with" if p >= 0.05 else (
                    f"the loss {'grows' if slope > 0 else 'shrinks'} with")
                sentences.append(f"On {plain(benchmark)} {verb} {of} ({slope:+.1f} points a step, p = {_p(p)}; "
                                 "permutation test over problems).")
            body += [[benchmark, kind, str(group["group"]), str(group["n"]), *_points(group)]
                     for group in found["groups"]]
    if body:
        page.add("By difficulty", " ".join(sentences), "By level: all problems that have one. By length: those that "
                 "base solved, some of which it would not solve again, so that a part of the loss there is chance.",
                 table(["benchmark", "by", "group", "n", "lost, points", "95 %"], body),
                 sources=files("evals", ["base", "off_model"], report["difficulty"]))


def _add_recovery(page: Page, report: dict, benchmarks: Sequence[str]) -> None:
    """The share of the drop that came back, over N, arm by arm."""
    there, tables, lost = arms(list(report["checkpoints"])), [], lost_benchmarks(report)
    for arm, counts in there.items():
        if "_seed_" in arm:
            continue
        shares, bounds, needed = (report[f"{arm}_{kind}"] for kind in ("fraction", "ci95", "n80"))
        tables.append(table(
            [arm.replace("_", " "), *(f"N = {n}" for n in counts), "N for 80 %"],
            [[name, *(_share(shares[name][str(n)], bounds[name][str(n)]) for n in counts),
              _needed(needed[name], counts) if name in lost else "–"] for name in benchmarks]))
    page.add("What native examples brought back",
             "Share of the drop that SFT on N of the student's own responses brought back, the mean of all seeds; 95 % "
             "bootstrap intervals over problems (and over seeds, from three on); – where nothing was lost. By epochs, "
             "more examples are more steps too. Last, the N that brings back 80 %, by a log-logistic curve through "
             "three shares or more, where the loss is clear of 0.", *tables,
             sources=files("evals", [name for name in report["checkpoints"]
                             if name in ("base", "off_model", "control_more_teacher") or name.startswith("recovered")],
                            benchmarks),
             figure="recovery")


def _add_style(page: Page, report: dict, main: Sequence[str]) -> None:
    """How responses are written, and how far the model has moved."""
    style, features = report["style"], report["style"]["features"]
    benchmarks = list(features.get("base", {}))
    if not benchmarks:
        return
    student, teacher = (sum(style["responses"][role].values()) for role in ("student", "teacher"))
    held = "" if style["held_out"] is None else (
        f" A classifier of character n-grams, trained on {student} chat responses of the student and {teacher} of "
        f"the teacher (held-out accuracy {100 * style['held_out']:.1f} %), was shown no benchmark response. Index: "
        "where its mean score for a checkpoint lies between base's (0) and the teacher's (1) on the same problems; – "
        "where it can't tell these apart. Then the share that it calls the teacher's outright.")
    names = [name for name in features if name in main or name.startswith("off_model_step")]
    body = []
    for benchmark in benchmarks:
        for name in names:
            one, share = features[name][benchmark], style["teacher_share"].get(name, {}).get(benchmark)
            begun = style["openers"].get(name, {}).get(benchmark)
            index = style["index"].get(name, {}).get(benchmark)
            accuracy = report["checkpoints"][name][benchmark]["accuracy"]
            body.append([benchmark, name, f"{100 * accuracy:.1f}", _measure(index, 2),
                         "–" if share is None else f"{100 * share:.0f}",
                         f"{100 * begun['student']:.0f} / {100 * begun['teacher']:.0f}" if begun else "–",
                         *(f"{one[kind]:.1f}" for kind in FEATURES),
                         f"{one['opening'][:24]} ({100 * one['opening_share']:.0f} %)"])
    heads = ["benchmark", "checkpoint", "accuracy, %", "style index", "called the teacher's, %",
             "begin as student's / teacher's, %", *FEATURES, "most begin"]
    scaled = [name for name in features if name.startswith("scaled")]
    page.add("Style", f"Means per response.{held}", table(heads, body),
             sources=[*chat_files(report), *files("evals", [*names, *scaled], benchmarks)], figure="style")
    if report["kl"]:
        page.add("Distance", "KL(base ‖ checkpoint), nats per token, on the base model's own responses to chat prompts "
                 "(native) and to benchmarks; the figures are in the last table.",
                 sources=[*files("measures", report["kl"], next(iter(report["kl"].values()))),
                          *files("evals", report["kl"], benchmarks)], figure="distance")
    if report["ratio"]:
        stems = list(next(iter(report["ratio"].values())))
        page.add("Whose responses", "Log-likelihood under the original student minus that under the teacher, nats per "
                 "token: above 0 the responses are more the student's.",
                 table(["checkpoint", *stems], [[name, *(_measure(of.get(stem)) for stem in stems)]
                                                for name, of in report["ratio"].items()]),
                 sources=files("measures", [f"{name}_under_{role}" for name in report["ratio"]
                                            for role in ("student", "teacher")], stems))


def _add_appendix(page: Page, report: dict, benchmarks: Sequence[str]) -> None:
    """Every checkpoint, and where the time went."""
    checkpoints, index, kl = report["checkpoints"], report["style"]["index"], report["kl"]
    worded, stems = list(index.get("base", {})), list(next(iter(kl.values()), {}))
    body = [[*cells, *(_measure(index[cells[0]][benchmark], 2) for benchmark in worded),
             *(_measure(kl.get(cells[0], {}).get(stem)) for stem in stems)] for cells in _accuracies(checkpoints)]
    page.add("Every checkpoint", "Accuracy in %; style index: 0 is base's, 1 the teacher's; KL in nats per token.",
             table(["checkpoint", *benchmarks, *(f"{name}: style" for name in worded),
                    *(f"KL on {stem}" for stem in stems)], body),
             "\n".join(f"- `{kind}`: {meaning}" for kind, meaning in MEANING.items()
                       if kind in {kind_of(name, MEANING) for name in checkpoints}),
             sources=[*files("evals", checkpoints, benchmarks), *chat_files(report), *files("measures", kl, stems)])
    if report["seconds"]:
        longest = sorted(report["seconds"].items(), key=lambda item: -item[1])[:5]
        page.add("Time", f"{sum(report['seconds'].values()) / 60:.1f} minutes in {len(report['seconds'])} stages; the "
                 f"longest: {', '.join(f'{plain(name)} {spent:.0f} s' for name, spent in longest)}.",
                 sources=["stages.json"])


def _add_transcripts(page: Page, rows: Rows, benchmark: str, recovered: Sequence[int]) -> None:
    """A problem that base had right and off_model has not (and the last recovered checkpoint has again, where there
    is such a one): what each wrote, and where they part."""
    names = ["base", "off_model", *(f"recovered_{n}" for n in recovered[-1:])]
    found = [responses for responses in zip(*(rows[name][benchmark] for name in names), strict=True)
             if responses[0]["correct"] and not responses[1]["correct"]]
    if not found:
        return
    chosen = max(found, key=lambda responses: responses[-1]["correct"])  # the first of these
    texts = [row["response"] for row in chosen]
    parting = next((i for i, (a, b) in enumerate(zip(*texts[:2], strict=False)) if a != b), min(map(len, texts[:2])))
    start = max(0, parting - SHOWN // 2)
    paragraphs = [f"Problem {plain(chosen[0]['id'])} of {plain(benchmark)}, chosen among those that base solved and "
                  f"off_model did not; the reference is {plain(chosen[0]['gold'])}. The first two responses part at "
                  f"⟪⟫, after {parting} characters.",
                  fence(chosen[0]["prompt"])]
    for i, (name, row) in enumerate(zip(names, chosen, strict=True)):
        said = "right" if row["correct"] else "no answer" if row.get("extracted") is None else "wrong"
        text = texts[i] if i == 2 else f"{texts[i][:parting]}⟪⟫{texts[i][parting:]}"
        shown = ("…" if start else "") + text[start : start + SHOWN] + ("…" if len(text) > start + SHOWN else "")
        paragraphs += [f"{name} ({said}):", fence(shown)]
    page.add("The same problem, before and after", *paragraphs, sources=files("evals", names, [benchmark]))


def _limits(report: dict) -> list[str]:
    limits = [f"One pair of models, one SFT run (seed {report['options']['seed']}): intervals are over problems, not "
              "over SFT runs."]
    for benchmark, drop in report["drop"].items():
        half = (drop["ci95"][1] - drop["ci95"][0]) / 2
        limits.append(f"On {plain(benchmark)} (n = {report['checkpoints']['base'][benchmark]['n']}) losses below about "
                      f"{half:.1f} points are missed more often than not.")
        entry = report["checkpoints"]["off_model"][benchmark]
        if entry["truncated"] > 0.2 * entry["n"]:
            limits.append(f"On {plain(benchmark)} {entry['truncated']} of {entry['n']} off-model responses were cut at "
                          "the limit.")
    if report["drop"] and not lost_benchmarks(report):
        limits.append("No benchmark has a loss that is clear of 0, so the controls have nothing to explain.")
    return limits


def summary_table(report: dict) -> str:
    """Checkpoints × benchmarks for a terminal."""
    rows = [["accuracy, % (95 %)", *report["checkpoints"]["base"]], *_accuracies(report["checkpoints"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


# --- Markdown ---------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(map(plain, row))} |" for row in rows)


def plain(text: str) -> str:
    """Text that Markdown shows as it is: no link, image, formula, HTML, list or new cell can come out of it."""
    escaped = re.sub(r"[\\`*\[\]<>|!&#~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", " ".join(printable(text).split()))
    # Addresses are links without any mark: a backslash parts them, but for @, which only a character does (WORD JOINER)
    escaped = re.sub(r"(?i)(?<=www)\.|:(?=//)", r"\\\g<0>", escaped).replace("@", "@\u2060")
    return re.sub(r"^(\d*)([-+=.)])(?=[-+=]*( |$))", r"\1\\\2", escaped)


def fence(text: str) -> str:
    """Text as a block of code that it can't end: the fence is longer than any run of backticks in it."""
    ticks = "`" * (1 + max([2, *map(len, re.findall(r"`+", text))]))
    return f"{ticks}text\n{printable(text)}\n{ticks}"


def _accuracies(checkpoints: dict) -> list[list[str]]:
    """A row for each checkpoint: its name, and its accuracy on each benchmark."""
    def cell(entry: dict) -> str:
        low, high = entry["ci95"]
        return f"{100 * entry['accuracy']:.1f} ({100 * low:.0f} to {100 * high:.0f})"

    return [[name, *(cell(of[benchmark]) for benchmark in checkpoints["base"])] for name, of in checkpoints.items()]


def _points(found: dict) -> tuple[str, str]:
    """Points lost, and their interval, each for a column of its own."""
    return f"{found['points']:.1f}", f"{found['ci95'][0]:.1f} to {found['ci95'][1]:.1f}"


def _p(value: float) -> str:
    return f"{value:.3g}" if value >= 1e-4 else f"{value:.0e}"


def _share(share: float | None, bounds: Sequence[float | None] | None) -> str:
    if share is None:
        return "–"
    low, high = ("no bound" if bound is None else f"{100 * bound:.0f}" for bound in bounds)
    return f"{100 * share:.0f} % ({low} to {high})"


def _needed(found: dict, counts: Sequence[int]) -> str:
    def number(n: float) -> str:
        return f"> {counts[-1]}" if n > counts[-1] else f"< {counts[0]}" if n < counts[0] else f"{n:.0f}"

    if found["n"] is None:
        return "–"
    low, high = map(number, found["ci95"])
    return number(found["n"]) if low == high == number(found["n"]) else f"{number(found['n'])} ({low} to {high})"


def _measure(found: dict | None, digits: int = 4) -> str:
    return "–" if found is None else spread(found, digits)


def main(argv: list[str] | None = None) -> None:
    """Write the report of a folder."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="of an experiment (recover.py --out)")
    folder = parser.parse_args(argv).folder
    with alone(folder / ".lock"):
        print(f"{summary_table(write_report(folder))}\n{folder / 'report.md'}")


if __name__ == "__main__":
    run_script(main)
