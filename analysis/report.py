"""The report of an experiment folder: report.json, figures and report.md, a paper of two pages.

    python -m analysis.report runs/mini

Every figure comes from the row files (analysis/findings.py); below each part stand the files that it was made from.
recover.py writes the report at its end; as a program this writes it again, after `evaluate.py --rescore`, say.
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from analysis.figures import draw_all, main_benchmark
from analysis.findings import SOURCE_AND_STYLE, Rows, arms, effect, find, read_evaluations
from base.errors import run_script
from base.files import write_json, write_text
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
SHOWN = 700  # characters of a response in a transcript, around the place where it parts from base's


def write_report(folder: Path) -> dict:
    """From the rows in `folder` to report.json, report.md and figures/ (contract C5); returns what report.json holds."""
    report = find(folder)
    drawn = draw_all(report, folder / "figures")
    write_text(folder / "report.md", to_markdown(report, read_evaluations(folder / "evals"), drawn))
    write_json(folder / "report.json", report)
    return report


def to_markdown(report: dict, rows: Rows, figures: Sequence[str] = ()) -> str:
    """The report as a page."""
    checkpoints, benchmarks = report["checkpoints"], list(report["checkpoints"]["base"])
    student, teacher = plain(report["student"]), plain(report["teacher"])
    lines = [f"# Off-model SFT: {student} on responses of {teacher}", ""]
    lines += [report["note"], ""] if report["note"] else []

    def part(title: str, *paragraphs: str, rows: Iterable[str] = (), figure: str | None = None) -> None:
        lines.extend([f"## {title}", ""])
        for paragraph in paragraphs:
            lines.extend([paragraph.rstrip("\n"), ""])
        if figure in figures:
            lines.extend([f"![{figure}](figures/{figure}.png)", ""])
        if rows:
            lines.extend([f"<sub>From {', '.join(f'`{name}`' for name in rows)}.</sub>", ""])

    def files(names: Sequence[str], stems: Sequence[str] = benchmarks) -> list[str]:
        return [f"evals/{braces(names)}/{braces(stems)}.jsonl"]

    part("Question", *_abstract(report))
    part("Set-up", _setup(report))
    part("Accuracy", f"In %, with 95 % Wilson intervals; the same problems for every checkpoint "
         f"(n = {', '.join(str(checkpoints['base'][b]['n']) for b in benchmarks)}).",
         table(["checkpoint", *benchmarks],
               [[name, *(_accuracy(entry[benchmark]) for benchmark in benchmarks)]
                for name, entry in checkpoints.items()]),
         "\n".join(f"- `{kind}`: {meaning}" for kind, meaning in MEANING.items()
                   if any(_kind(name) == kind for name in checkpoints)),
         rows=files(list(checkpoints)), figure="accuracy")
    if report["drop"]:
        _losses(report, part, files)
    if arms(list(checkpoints)):
        _recovered(report, part, files)
    if report["claims"]:
        part("Why: what each control says", "\n".join(f"- **{plain(one['about'])}.** {plain(one['text'])} "
             f"<sub>{', '.join(f'`{name}`' for name in one['rows'])}</sub>" for one in report["claims"]))
    if all(name in checkpoints for _, *names in SOURCE_AND_STYLE for name in names):
        part("Source or style", "Accuracy in % after SFT on the same prompts' responses, whoever gave them and in "
             "whichever style.", table(
                 ["responses", *(f"{benchmark}, {whose} style" for benchmark in benchmarks
                                 for whose in ("the student's", "the teacher's"))],
                 [[source, *(_accuracy(checkpoints[name][b]) for b in benchmarks for name in names)]
                  for source, *names in SOURCE_AND_STYLE]),
             rows=files([name for _, *names in SOURCE_AND_STYLE for name in names]))
    _style(report, part, files)
    if "off_model" in rows:
        _transcripts(rows, main_benchmark(report), part)
    part("Limits", "\n".join(f"- {limit}" for limit in _limits(report)))
    part("Time", table(["stage", "seconds"], [[name, f"{spent:.0f}"] for name, spent in report["seconds"].items()]),
         rows=["stages.json"])
    return "\n".join(lines)


def _abstract(report: dict) -> list[str]:
    """The question, and the answer in sentences that the intervals allow."""
    asked = (f"What does LoRA SFT on the responses of {plain(report['teacher'])} to chat prompts cost "
             f"{plain(report['student'])}, why, and what brings it back?")
    said = [f"On {plain(benchmark)} there is {effect(drop)}." for benchmark, drop in report["drop"].items()]
    there = arms(list(report["checkpoints"])).get("recovered")
    for benchmark in report["drop"]:
        share = report["recovered_fraction"].get(benchmark, {}).get(str(there[-1])) if there else None
        if share is not None and report["drop"][benchmark]["ci95"][0] > 0:
            low, high = report["recovered_ci95"][benchmark][str(there[-1])]
            said.append(f"SFT on {there[-1]} of its own responses to other prompts brought back {100 * share:.0f} % "
                        f"({_percent(low)} to {_percent(high)}) of what {plain(benchmark)} lost.")
    return [asked, " ".join(said)] if said else [asked]


def _setup(report: dict) -> str:
    had = report["options"]
    length = f"{had['steps']} steps" if had.get("steps") else f"{had['epochs']} epochs"
    levels = f" (problems of level {', '.join(map(plain, had['levels']))} where there are levels)" if had["levels"] else ""
    return (f"{had['n_train']} responses of the teacher, sampled at temperature {had['temperature']} and at most "
            f"{had['max_new_tokens']} tokens long; LoRA of rank {had['rank']} on all linear layers, {length} of at most "
            f"{had['batch_tokens']} tokens, peak learning rate {had['lr']:g}, weights in {had['dtype']}, seed "
            f"{had['seed']}. Benchmarks are answered greedily{levels}. Everything else is in config.json; the commands "
            f"are in stages.json; code revision {report['revision'] or 'unknown'}.")


def _losses(report: dict, part: object, files: object) -> None:
    benchmarks = list(report["drop"])
    part("What SFT on the teacher's responses cost",
         "Points lost from base to off_model: bootstrap interval over problems, McNemar's mid-p. Then what became of the "
         "problems that base had right: cut at the limit, ended without an answer, answered wrong. Where most are cut, a "
         "higher --max-new-tokens may show that nothing was lost.",
         table(["benchmark", "lost, points", "95 %", "p", "cut", "no answer", "wrong", "gained",
                "all cut, base → off", "all without an answer"], [_drop_row(name, report) for name in benchmarks]),
         rows=files(["base", "off_model"]), figure="overview")
    sentences, body = [], []
    for benchmark, kinds in report["difficulty"].items():
        for kind, found in kinds.items():
            p, slope = found["trend"]["p"], found["trend"]["slope"]
            of = {"level": "level", "length": "the length of the base model's own response (quarters)"}[kind]
            grows = f"the loss {'grows' if slope > 0 else 'shrinks'} with" if p < 0.05 else (
                "there is no evidence that the loss depends on")
            sentences.append(f"On {plain(benchmark)} {grows} {of} ({slope:+.1f} points a step, p = {_p(p)}).")
            body += [[benchmark, kind, str(group["group"]), str(group["n"]), f"{group['points']:.1f}",
                      f"{group['ci95'][0]:.1f} to {group['ci95'][1]:.1f}"] for group in found["groups"]]
    if body:
        part("By difficulty", " ".join(sentences) + " (Permutation test over problems.)",
             table(["benchmark", "by", "group", "n", "lost, points", "95 %"], body),
             rows=files(["base", "off_model"], list(report["difficulty"])))


def _recovered(report: dict, part: object, files: object) -> None:
    paragraphs = ["Share of the drop that SFT on N of the student's own responses brought back, seeds taken together; "
                  "95 % bootstrap intervals over problems and seeds; – where nothing was lost. By epochs, more examples "
                  "are more steps too. Last, the N that brings back 80 %, by a log-logistic curve through the shares."]
    there = arms(list(report["checkpoints"]))
    for arm, counts in there.items():
        prefix = "" if arm == "recovered" else f"{arm}_"
        if "_seed_" in arm:
            continue
        shares, bounds = (report[f"{prefix or 'recovered_'}{kind}"] for kind in ("fraction", "ci95"))
        paragraphs.append(table(
            [arm.replace("_", " "), *(f"N = {n}" for n in counts), "N for 80 %"],
            [[name, *(_share(shares[name][str(n)], bounds[name][str(n)]) for n in counts),
              _needed(report[f"{prefix}n80"][name], counts)] for name in shares]))
    names = [f"{arm}_{n}" for arm, counts in there.items() for n in counts]
    part("What native examples brought back", *paragraphs, rows=files(["base", "off_model", *names]), figure="recovery")


def _style(report: dict, part: object, files: object) -> None:
    style = report["style"]
    shares, features = style["teacher_share"], style["features"]
    benchmarks = list(features.get("base", {}))
    if not benchmarks:
        return
    held = "" if style["held_out"] is None else (
        f" A classifier of character n-grams, trained on {style['responses']['student']} chat responses of the student "
        f"and {style['responses']['teacher']} of the teacher (held-out accuracy {100 * style['held_out']:.1f} %), says "
        "which share of the benchmark responses is in the teacher's style.")
    heads = ["checkpoint"]
    for benchmark in benchmarks:
        heads += [f"{benchmark}: teacher's style, %"] * bool(shares) + [
            f"begin as student's / teacher's, %"] * bool(style["openers"]) + [  # noqa: F541
            "words", "steps", "markdown", "formulas", "self-corrections", "most begin"]
    body = []
    for name in features:
        cells = [name]
        for benchmark in benchmarks:
            one = features[name][benchmark]
            begun = style["openers"].get(name, {}).get(benchmark)
            if shares:
                cells.append(f"{100 * shares[name][benchmark]:.0f}")
            if style["openers"]:
                cells.append(f"{100 * begun['student']:.0f} / {100 * begun['teacher']:.0f}" if begun else "–")
            cells += [f"{one[kind]:.1f}" for kind in ("words", "steps", "markdown", "formulas", "self-corrections")]
            cells.append(f"{one['opening'][:24]} ({100 * one['opening_share']:.0f} %)")
        body.append(cells)
    part("Style", f"Means per response.{held}", table(heads, body),
         rows=["teacher.jsonl", "native.jsonl", *files(list(features), benchmarks)], figure="style")
    if report["kl"]:
        stems = list(next(iter(report["kl"].values())))
        part("Distance", "KL(base ‖ checkpoint) per token, in nats, on the base model's own responses to chat prompts "
             "(native) and to the benchmarks.",
             table(["checkpoint", *stems], [[name, *(_measure(of.get(stem)) for stem in stems)]
                                            for name, of in report["kl"].items()]),
             rows=[f"measures/{braces(list(report['kl']))}/{braces(stems)}.jsonl"], figure="distance")
    if report["ratio"]:
        stems = list(next(iter(report["ratio"].values())))
        part("Whose responses", "Log-likelihood under the original student minus under the teacher, nats per token: above "
             "0 a checkpoint's responses are more the student's.",
             table(["checkpoint", *stems], [[name, *(_measure(of.get(stem)) for stem in stems)]
                                            for name, of in report["ratio"].items()]),
             rows=[f"measures/{braces([f'{name}_under_{role}' for name in report['ratio'] for role in roles])}/"
                   f"{braces(stems)}.jsonl" for roles in (("student", "teacher"),)])


def _transcripts(rows: Rows, benchmark: str | None, part: object) -> None:
    """A problem that base had right and off_model has not, with the last recovered checkpoint's response if it is
    right again: what each wrote, and where they part."""
    there = arms(list(rows)).get("recovered")
    names = ["base", "off_model", *([f"recovered_{there[-1]}"] if there else [])]
    if benchmark is None:
        return
    found = [responses for responses in zip(*(rows[name][benchmark] for name in names), strict=True)
             if responses[0]["correct"] and not responses[1]["correct"]]
    found.sort(key=lambda responses: not responses[-1]["correct"])  # one that came back, where there is one
    if not found:
        return
    chosen = found[0]
    parting = next((i for i, (a, b) in enumerate(zip(chosen[0]["response"], chosen[1]["response"], strict=False))
                    if a != b), min(len(one["response"]) for one in chosen[:2]))
    paragraphs = [f"Problem {plain(chosen[0]['id'])} of {plain(benchmark)}, the right answer being "
                  f"{plain(chosen[0]['gold'])}. The base model's and the off-model response part after {parting} "
                  "characters, at ⟪⟫.", fence(chosen[0]["prompt"])]
    for name, row in zip(names, chosen, strict=True):
        said = "right" if row["correct"] else "wrong" if row["extracted"] is not None else "no answer"
        text = row["response"]
        if name != names[-1] or len(names) == 2:
            text = f"{text[:parting]}⟪⟫{text[parting:]}"
        start = max(0, parting - SHOWN // 2)
        shown = ("…" if start else "") + text[start : start + SHOWN] + ("…" if len(text) > start + SHOWN else "")
        paragraphs += [f"{name} ({said}):", fence(shown)]
    part("The same problem, before and after", *paragraphs,
         rows=[f"evals/{braces(names)}/{benchmark}.jsonl"])


def _limits(report: dict) -> list[str]:
    limits = [f"One pair of models, one SFT run (seed {report['options']['seed']}): intervals are over problems, and "
              "over native examples where there are several seeds, not over SFT runs."]
    for benchmark, drop in report["drop"].items():
        half = (drop["ci95"][1] - drop["ci95"][0]) / 2
        limits.append(f"On {plain(benchmark)} (n = {report['checkpoints']['base'][benchmark]['n']}) losses below about "
                      f"{half:.0f} points can't be seen.")
        entry = report["checkpoints"]["off_model"][benchmark]
        if entry["truncated"] > 0.2 * entry["n"]:
            limits.append(f"On {plain(benchmark)} {entry['truncated']} of {entry['n']} off-model responses were cut at "
                          "the limit.")
    if not any(drop["ci95"][0] > 0 for drop in report["drop"].values()):
        limits.append("No benchmark has a loss that is clear of 0, so the controls have nothing to explain.")
    return limits


def summary_table(report: dict) -> str:
    """Checkpoints × benchmarks for a terminal."""
    benchmarks = list(report["checkpoints"]["base"])
    body = [[name, *(_accuracy(entry[benchmark]) for benchmark in benchmarks)]
            for name, entry in report["checkpoints"].items()]
    rows = [["accuracy, % (95 %)", *benchmarks], *body]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


# --- Markdown ---------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(map(plain, row))} |" for row in rows)


def plain(text: str) -> str:
    """Text that Markdown shows as it is: no link, image, HTML or new cell can come out of it."""
    escaped = "".join(f"\\{c}" if c in "\\`*[]<>|!&#" else c for c in _printable(text))
    return " ".join(escaped.split())


def fence(text: str) -> str:
    """Text as a block of code that it can't end: the fence is longer than any run of backticks in it."""
    ticks = "`" * (1 + max([2, *map(len, re.findall(r"`+", text))]))
    return f"{ticks}text\n{_printable(text)}\n{ticks}"


def _printable(text: str) -> str:
    """Without what a terminal or a browser would obey: escapes, overrides of direction, odd line ends."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def braces(names: Sequence[str]) -> str:
    """Several names as a shell would expand them: {base,off_model}."""
    return names[0] if len(names) == 1 else f"{{{','.join(names)}}}"


def _kind(checkpoint: str) -> str | None:
    return max((kind for kind in MEANING if checkpoint.startswith(kind)), key=len, default=None)


def _accuracy(entry: dict) -> str:
    low, high = entry["ci95"]
    return f"{100 * entry['accuracy']:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def _drop_row(benchmark: str, report: dict) -> list[str]:
    drop = report["drop"][benchmark]
    base, off = (report["checkpoints"][name][benchmark] for name in ("base", "off_model"))
    return [benchmark, f"{drop['points']:.1f}", f"{drop['ci95'][0]:.1f} to {drop['ci95'][1]:.1f}", _p(drop["p"]),
            *(str(report["lost"][benchmark][fate]) for fate in ("truncated", "unparsed", "wrong", "gained")),
            f"{base['truncated']} → {off['truncated']}", f"{base['unparsed']} → {off['unparsed']}"]


def _p(value: float) -> str:
    return f"{value:.3g}" if value >= 1e-4 else f"{value:.0e}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if abs(share) < float("inf") else "∞" if share > 0 else "-∞"


def _share(share: float | None, bounds: Sequence[float] | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} % ({_percent(bounds[0])} to {_percent(bounds[1])})"


def _needed(found: dict, counts: Sequence[int]) -> str:
    def number(n: float) -> str:
        return f"> {counts[-1]}" if n > counts[-1] else f"< {counts[0]}" if n < counts[0] else f"{n:.0f}"

    if found["n"] is None:
        return "–"
    low, high = map(number, found["ci95"])
    return number(found["n"]) if low == high == number(found["n"]) else f"{number(found['n'])} ({low} to {high})"


def _measure(found: dict | None) -> str:
    return "–" if found is None else f"{found['mean']:.4f} ({found['ci95'][0]:.4f} to {found['ci95'][1]:.4f})"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="of an experiment (recover.py --out)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write the report of a folder."""
    folder = parse(argv).folder
    print(f"{summary_table(write_report(folder))}\n{folder / 'report.md'}")


if __name__ == "__main__":
    run_script(main)
