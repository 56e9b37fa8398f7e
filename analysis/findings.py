"""What an experiment folder says: every figure of its report, from the row files alone, and what each control means.

Nothing is remembered from the run: `python -m analysis.report DIR` finds the same after `evaluate.py --rescore`.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.compare import check_same_problems
from analysis.statistics import (
    between,
    by_group,
    compare_rows,
    correlation,
    paired_difference,
    quarters,
    ratio,
    recovery,
    summarise,
)
from base.errors import UserError
from base.files import read_json
from data.rows import read_rows

Rows = dict[str, dict[str, list[dict]]]  # graded rows by checkpoint and benchmark
# In this order, by the beginning of their names; numbers in names count as numbers
ORDER = ("base", "teacher", "off_model_step", "off_model", "recovered", "scaled", "base_in", "off_model_in",
         "base_under", "off_model_under", "control")
CURVE = re.compile(r"(recovered(?:_in_\d+_steps)?(?:_seed_\d+)?)_(\d+)")  # an arm of the recovery, and N
FORCED = ("base_in_teacher_style", "off_model_in_student_style")
SOURCE_AND_STYLE = ("control_native", "control_native_in_teacher_style", "control_teacher_in_student_style")


LEAST_PATH = 6  # checkpoints, below which a correlation says nothing


def find(folder: Path) -> dict:
    """All figures of the experiment in `folder`, as report.json holds them (contract C5)."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is no experiment: it has no config.json")
    record = read_json(folder / "config.json")
    options = record.get("options", {})
    rows = read_evaluations(folder / "evals")
    stages = read_json(folder / "stages.json") if (folder / "stages.json").exists() else {}
    report = {"student": options.get("student"), "teacher": options.get("teacher"), "note": record.get("note", ""),
              "options": {name: options.get(name) for name in ("n_train", "max_new_tokens", "rank", "lr", "epochs",
                          "steps", "batch_tokens", "seed", "temperature", "eval_system", "levels", "dtype")},
              "revision": record.get("git_revision"),
              "checkpoints": {name: {benchmark: summarise(graded) for benchmark, graded in of.items()}
                              for name, of in rows.items()}}
    report |= losses(rows) | recoveries(rows)
    report["difficulty"] = difficulty(rows) if "off_model" in rows else {}
    report["style"] = styles(folder, rows, options.get("openers"))
    report |= measures(folder)
    report["together"] = together(report, rows)
    report["claims"] = claims(report, rows)
    report["seconds"] = {place: stage["seconds"] for place, stage in stages.items()}
    return report


def read_evaluations(folder: Path) -> Rows:
    """Graded rows of every finished evaluation, in ORDER; all on the same problems as the first checkpoint's."""
    names = sorted((path.parent.name for path in folder.glob("*/summary.json")), key=_place)
    if "base" not in names:
        raise UserError(f"{folder} has no evaluation of base: there is nothing to compare with")
    rows = {name: {benchmark: read_rows(folder / name / f"{benchmark}.jsonl")
                   for benchmark in read_json(folder / name / "summary.json")} for name in names}
    for name in names:
        for benchmark, first in rows["base"].items():
            check_same_problems(benchmark, folder / "base", first, folder / name, rows[name].get(benchmark, []))
    return rows


def _place(name: str) -> tuple:
    kind = max((beginning for beginning in ORDER if name.startswith(beginning)), key=len, default="")
    parts = tuple((0, float(part), "") if re.fullmatch(r"[\d.]+", part) else (1, 0.0, part)
                  for part in re.split(r"(\d+(?:\.\d+)?)", name) if part)
    return ORDER.index(kind) if kind else len(ORDER), parts


def verdicts(rows: Sequence[dict]) -> list[bool]:
    """Which rows are right."""
    return [row["correct"] for row in rows]


def losses(rows: Rows) -> dict:
    """What each checkpoint has lost against base: "drops", and of off_model alone "drop" and "lost", as in C5."""
    drops = {name: {benchmark: paired_difference(verdicts(first), verdicts(rows[name][benchmark]))
                    for benchmark, first in rows["base"].items()} for name in rows if name != "base"}
    # under another system prompt, against base under the same
    for name in drops:
        if (other := name.replace("off_model", "base")) != name and other in rows and "_under_" in name:
            drops[name] = {benchmark: paired_difference(verdicts(rows[other][benchmark]), verdicts(graded))
                           for benchmark, graded in rows[name].items()}
    found = {"drops": drops, "drop": drops.get("off_model", {}), "lost": {}}
    for benchmark in found["drop"]:
        one = compare_rows(rows["base"][benchmark], rows["off_model"][benchmark])
        found["lost"][benchmark] = one["lost"] | {"gained": one["gained"]}
    return found


def arms(names: Sequence[str]) -> dict[str, list[int]]:
    """The arms of the recovery ("recovered", "recovered_in_S_steps", "recovered_seed_K") with their numbers N."""
    found: dict[str, list[int]] = {}
    for name in names:
        if match := CURVE.fullmatch(name):
            found.setdefault(match[1], []).append(int(match[2]))
    return found


def recoveries(rows: Rows) -> dict:
    """What native examples brought back, seeds taken together: for the arm by epochs "recovered_fraction" {benchmark:
    {N: share}}, "recovered_ci95" and "recovered_n80"; for the one of S steps the same behind "recovered_in_S_steps"."""
    found: dict[str, dict] = {"recovered_fraction": {}, "recovered_ci95": {}, "recovered_n80": {}}
    there = arms(list(rows))
    for arm in there:
        if "_seed_" in arm or "off_model" not in rows:
            continue
        runs = [arm, *(other for other in there if other.startswith(f"{arm}_seed_"))]
        names = [f"{arm}_{kind}" for kind in ("fraction", "ci95", "n80")]
        for benchmark, base in rows["base"].items():
            back = {n: [verdicts(rows[f"{run}_{n}"][benchmark]) for run in runs if f"{run}_{n}" in rows]
                    for n in there[arm]}
            fewest = min(map(len, back.values()))  # a run that is only half there is left out
            one = recovery(verdicts(base), verdicts(rows["off_model"][benchmark]),
                           {n: some[:fewest] for n, some in back.items()})
            for name, part in zip(names, (one["share"], one["ci95"], one["n80"]), strict=True):
                keyed = {str(key): value for key, value in part.items()}
                found.setdefault(name, {})[benchmark] = keyed
    return found


def difficulty(rows: Rows) -> dict:
    """The drop by level, and by the length of the base model's own solutions (its right responses, in quarters of
    their length), with a test for trend; "trend" is None where levels have no order (text)."""
    found: dict[str, dict] = {}
    for benchmark, base in rows["base"].items():
        pairs, kinds = list(zip(base, rows["off_model"][benchmark], strict=True)), {}
        levelled = [pair for pair in pairs if pair[0].get("level") is not None]
        levels = [str(one["level"]) for one, _ in levelled]
        if len(set(levels)) > 1:
            ordered = all(level.isdigit() for level in levels)
            names = sorted(set(levels), key=int if ordered else None)
            kinds["level"] = by_group(*zip(*levelled, strict=True), [names.index(level) for level in levels])
            for group, name in zip(kinds["level"]["groups"], names, strict=True):
                group["group"] = name
            if not ordered:
                kinds["level"]["trend"] = None
        solved = [pair for pair in pairs if pair[0]["correct"]]
        if _in_words(base) and len(solved) >= 8:
            lengths = [len(one["response"]) for one, _ in solved]
            kinds["length"] = by_group(*zip(*solved, strict=True), quarters(lengths))
        if kinds:
            found[benchmark] = kinds
    return found


def _in_words(rows: Sequence[dict]) -> bool:
    """Whether a benchmark is answered in more than a letter or a word, so that there is style."""
    return any(len(row["response"].split()) > 1 for row in rows)


def styles(folder: Path, rows: Rows, openers: Sequence[str] | None) -> dict:
    """How much of the teacher's style is in each checkpoint's benchmark responses, {checkpoint: {benchmark: …}}.

    "index": where a classifier of chat responses places them between base's own (0) and the teacher's own (1) to the
    same problems, so that it matters little that mathematics is not chat; None where it can't tell these two apart.
    "teacher_share": the share that it calls the teacher's, as they are. "features" and, with openers, "openers".
    "held_out" is the classifier's accuracy on chat.
    """
    from analysis.style import StyleClassifier, begins, features

    worded = [benchmark for benchmark, graded in rows["base"].items() if _in_words(graded)]
    chats = {"student": [folder / "native.jsonl", folder / "controls" / "native.jsonl"],
             "teacher": [folder / "teacher.jsonl"]}
    texts = {role: {str(path.relative_to(folder)): [row["response"] for row in read_rows(path)]
                    for path in paths if path.exists()} for role, paths in chats.items()}
    classifier = StyleClassifier.fit(*(sum(texts[role].values(), []) for role in ("student", "teacher")))
    found: dict = {"held_out": classifier.accuracy if classifier else None,
                   "responses": {role: {name: len(some) for name, some in of.items()} for role, of in texts.items()},
                   "index": {}, "teacher_share": {}, "features": {}, "openers": {}}
    for benchmark in worded:
        responses = {name: [row["response"] for row in of[benchmark]] for name, of in rows.items()}
        scores = {name: classifier.scores(some) for name, some in responses.items()} if classifier else {}
        for name, some in responses.items():
            found["features"].setdefault(name, {})[benchmark] = features(some)
            if scores:
                found["teacher_share"].setdefault(name, {})[benchmark] = sum(s > 0 for s in scores[name]) / len(some)
            if "teacher" in scores:
                placed = between(scores[name], scores["base"], scores["teacher"])
                found["index"].setdefault(name, {})[benchmark] = placed
            if openers and name not in FORCED:
                found["openers"].setdefault(name, {})[benchmark] = begins(some, openers)
    return found


def measures(folder: Path) -> dict:
    """From measures/: "nll" of the training data under the student, "kl" {checkpoint: {rows: …}} from the base model,
    and "ratio", the log-likelihood ratio of the two models for a checkpoint's responses; in nats per token."""
    found: dict[str, dict] = {"nll": {}, "kl": {}, "ratio": {}}
    for record in sorted((folder / "measures").glob("*/summary.json"), key=lambda path: _place(path.parent.name)):
        name = record.parent.name
        for stem in read_json(record):
            rows = read_rows(record.with_name(f"{stem}.jsonl"))
            tokens = [row["tokens"] for row in rows]
            if name in ("teacher_data", "own_data"):
                found["nll"][stem] = ratio([row["nll"] for row in rows], tokens)
            elif name.endswith("_under_teacher"):
                checkpoint = name.removesuffix("_under_teacher")
                others = {row["id"]: row["nll"] for row in read_rows(
                    folder / "measures" / f"{checkpoint}_under_student" / f"{stem}.jsonl")}
                both = [row for row in rows if row["id"] in others]  # a response may be too long for one of the two
                found["ratio"].setdefault(checkpoint, {})[stem] = ratio(
                    [row["nll"] - others[row["id"]] for row in both], [row["tokens"] for row in both])
            elif "kl" in rows[0]:
                found["kl"].setdefault(name, {})[stem] = ratio([row["kl"] for row in rows], tokens)
    return found


def together(report: dict, rows: Rows) -> dict:
    """Along SFT and recovery: {benchmark: the path's checkpoints, their accuracy, style index and KL on the base
    model's own responses (None where there is none), and the correlations of accuracy with both}."""
    index, kls, found = report["style"]["index"], report["kl"], {}
    path = [name for name in rows if name == "base" or name.startswith("off_model_step") or name == "off_model"
            or (CURVE.fullmatch(name) or [None, None])[1] == "recovered"]
    for benchmark in report["style"]["features"].get("base", {}):
        style = [(index.get(name, {}).get(benchmark) or {}).get("mean") for name in path]
        kl = [0.0 if name == "base" else kls.get(name, {}).get(benchmark, {}).get("mean") for name in path]
        graded = np.array([verdicts(rows[name][benchmark]) for name in path], float)  # (C, P)
        one = {"path": path, "accuracy": graded.mean(-1).tolist(), "style": None if None in style else style,
               "kl": None if None in kl else kl}
        for name, values in (("style", one["style"]), ("kl", one["kl"])):
            one[f"accuracy_and_{name}"] = correlation(graded, values) if values and len(path) >= LEAST_PATH else None
        found[benchmark] = one
    return found


# --- What it means ----------------------------------------------------------------------------------------------------


def effect(found: dict, what: str = "loss") -> str:
    """A difference in words that its interval allows: a loss, a gain, or no evidence of either."""
    opposite = {"loss": "gain", "lower score": "higher score"}[what]
    points, (low, high) = found["points"], found["ci95"]
    if low > 0:
        return f"a {what} of {points:.1f} points ({low:.1f} to {high:.1f})"
    if high < 0:
        return f"a {opposite} of {-points:.1f} points ({-high:.1f} to {-low:.1f})"
    return f"no evidence of a {what} ({points:.1f} points, {low:.1f} to {high:.1f})"


def braces(names: Sequence[str]) -> str:
    """Names as a shell would expand them, those that differ in a last number together:
    {base,recovered_{8,32}}."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        stem, mark, last = name.rpartition("_")
        groups.setdefault(f"{stem}_" if mark and re.fullmatch(r"[\d.]+", last) else name, []).append(last)
    parts = [stem if not stem.endswith("_") else stem + (last[0] if len(last) == 1 else f"{{{','.join(last)}}}")
             for stem, last in groups.items()]
    return parts[0] if len(parts) == 1 else f"{{{','.join(parts)}}}"


def lost_benchmarks(report: dict) -> list[str]:
    """Those on which off_model's loss has an interval clear of 0."""
    return [benchmark for benchmark, drop in report["drop"].items() if drop["ci95"][0] > 0]


def claims(report: dict, rows: Rows) -> list[dict]:
    """What each control says, as {"about", "text", "rows"}: sentences made from the figures, and the evaluations or
    measures that they are computed from. On the benchmarks that lost something; on all where none did."""
    if not report["drop"]:
        return []
    lost = lost_benchmarks(report)
    where = lost or list(report["drop"])
    found: list[dict] = []

    def claim(about: str, sentences: Sequence[str], names: Sequence[str], measured: Sequence[str] = (),
              on: Sequence[str] = where) -> None:
        if sentences:
            sources = [f"evals/{braces(['base', 'off_model', *names])}/{braces(on)}.jsonl"] if names else []
            found.append({"about": about, "text": " ".join(sentences), "rows": [*sources, *measured]})

    def versus(name: str, benchmark: str) -> dict:
        """How much less a control lost than off_model did."""
        return paired_difference(verdicts(rows[name][benchmark]), verdicts(rows["off_model"][benchmark]))

    def weigh(name: str) -> list[str]:
        """Whether SFT (or noise) of another kind cost as much as off-model SFT did."""
        sentences = []
        for benchmark in where:
            own, less, drop = report["drops"][name][benchmark], versus(name, benchmark), report["drop"][benchmark]
            text = f"On {benchmark} {effect(own)}"
            if benchmark not in lost:
                sentences.append(f"{text}.")
            elif less["ci95"][1] < 0:
                sentences.append(f"{text}, more than off-model SFT cost: enough to be the cause.")
            elif less["ci95"][0] <= 0:
                sentences.append(f"{text}: not told apart from off-model SFT's, so this may be the cause.")
            elif own["ci95"][1] > drop["ci95"][0] / 4:
                sentences.append(f"{text}, {_points(less)} less than off-model SFT cost: a part of it at most.")
            else:
                sentences.append(f"{text}, {_points(less)} less than off-model SFT cost: this is not the cause.")
        return sentences

    if "control_native" in rows:
        claim("SFT as such (own responses to the same prompts)", weigh("control_native"), ["control_native"])
    noises = [name for name in rows if name.startswith("control_noise")]
    if noises:
        worst = max(noises, key=lambda name: sum(report["drops"][name][benchmark]["points"] for benchmark in where))
        claim(f"H3, noise on the weights (of {len(noises)} draws, the one that lost most)", weigh(worst), noises)

    if "teacher" in rows:
        sentences = []
        for benchmark in where:
            to_teacher = report["drops"]["teacher"][benchmark]
            below = paired_difference(verdicts(rows["teacher"][benchmark]), verdicts(rows["off_model"][benchmark]))
            accuracy = 100 * report["checkpoints"]["teacher"][benchmark]["accuracy"]
            said = f"On {benchmark} the teacher has {accuracy:.1f} %: against base {effect(to_teacher, 'lower score')}"
            if benchmark in lost:
                if below["ci95"][0] > 0:
                    said += f"; off-model is {_points(below)} below its own teacher, which imitation does not explain"
                elif to_teacher["ci95"][0] <= 0:
                    said += ", so there is no evidence that its answers are worse"
                else:
                    said += "; no evidence that off-model is below it: imitating a weaker model may be the cause"
            sentences.append(f"{said}.")
        claim("H1, a weak teacher", sentences, ["teacher"])

    nll = report["nll"]
    if "teacher" in nll and "native" in nll:
        text = [f"Per token the teacher's responses cost the student {_nats(nll['teacher'])}, its own to the same "
                f"prompts {_nats(nll['native'])}."]
        names, measured = [], ["measures/teacher_data/teacher.jsonl", "measures/own_data/native.jsonl"]
        if "matched_nll" in nll and "control_matched_nll" in rows:
            share = nll["matched_nll"]["mean"] / nll["teacher"]["mean"]
            close = "" if abs(share - 1) < 0.15 else ", which is no close match"
            text += [f"Its own at the temperature that comes nearest cost {_nats(nll['matched_nll'])}, {share:.2f} "
                     f"times the teacher's{close}. SFT on these:", *weigh("control_matched_nll")]
            names = ["control_matched_nll"]
            measured.append("measures/own_data/matched_nll.jsonl")
        claim("H2, data that is unlikely under the student", text, names, measured)

    there = arms(list(rows)).get("recovered", [])
    if there and "control_more_teacher" in rows:
        sentences = []
        for benchmark in where:
            names = (f"recovered_{there[-1]}", "control_more_teacher")
            native, more = (versus(name, benchmark) for name in names)
            sentences.append(f"On {benchmark} {there[-1]} native examples bring {_gain(native)}, as many of the "
                             f"teacher's in the same steps {_gain(more)}.")
        claim("More training of any kind", sentences, ["control_more_teacher", f"recovered_{there[-1]}"])

    if all(name in rows for name in FORCED):
        sentences = []
        for benchmark in where:
            if not _in_words(rows["base"][benchmark]):
                continue
            forced = report["drops"]["base_in_teacher_style"][benchmark]
            back = versus("off_model_in_student_style", benchmark)
            index = report["style"]["index"]
            placed = [index[name][benchmark] for name in FORCED if index.get(name, {}).get(benchmark)]
            numbers = " and ".join(f"{one['mean']:.2f}" for one in placed)
            said = f" (style index {numbers})" if placed else ""
            sentences.append(f"On {benchmark} the teacher's style, asked of the base model without any training, is "
                             f"{effect(forced)}; the student's own, asked of the off-model student without any "
                             f"training, brings {_gain(back)}{said}.")
        claim("H4, the style, switched without training", sentences, FORCED)
    if all(name in rows for name in SOURCE_AND_STYLE):
        sentences = []
        for benchmark in where:
            source, style = (paired_difference(verdicts(rows["control_native"][benchmark]),
                                               verdicts(rows[f"control_{name}"][benchmark]))
                             for name in ("teacher_in_student_style", "native_in_teacher_style"))
            sentences.append(f"On {benchmark}, against SFT on the student's own responses in its own style, the "
                             f"teacher's in the student's style are {effect(source)}, the student's in the teacher's "
                             f"style {effect(style)}.")
        claim("Source or style", sentences, SOURCE_AND_STYLE)

    for benchmark, one in report["together"].items():
        if benchmark in where:
            away = {name: versus(name, benchmark) for name in report["kl"] if name not in one["path"]}
            claim("H4 and H5, style and distance", _moves(benchmark, one, report, away),
                  [*one["path"], "teacher", *away],
                  [*chat_files(report), *_measured(report["kl"], [benchmark])], [benchmark])
    for name in rows:
        if name.startswith("off_model_under_system"):
            base, system = name.replace("off_model", "base"), report["options"]["eval_system"][int(name[-1]) - 1]
            claim(f"Another system prompt: {system}",
                  [f"On {benchmark} {effect(report['drops'][name][benchmark])}, against base under the same prompt; "
                   f"without it {_points(report['drop'][benchmark])}." for benchmark in where], [base, name])
    return found


def chat_files(report: dict) -> list[str]:
    """The files that the style classifier has learnt from."""
    return [name for role in ("teacher", "student") for name in report["style"]["responses"][role]]


def _measured(kl: dict[str, dict], stems: Sequence[str]) -> list[str]:
    """The files of KL rows, if there are any."""
    return [f"measures/{braces(list(kl))}/{braces(stems)}.jsonl"] if kl else []


def _moves(benchmark: str, one: dict, report: dict, away: dict[str, dict]) -> list[str]:
    """Has the style moved; do style and accuracy move together, do KL and accuracy; can the two be told apart?

    `away`: how much less than off_model each checkpoint lost that is not on the path but has a KL.
    """
    said = []
    if one["style"] is None:
        said.append(f"On {benchmark} the classifier can't tell base's responses from the teacher's: of style along SFT "
                    "nothing can be said.")
    else:
        index = {name: of[benchmark] for name, of in report["style"]["index"].items()}
        tuned = [name for name in one["path"] if name.startswith("off_model")]
        moved = [name for name in tuned if index[name]["ci95"][0] > 0 or index[name]["ci95"][1] < 0]
        off, last = (_measure(index[name], 2) for name in (tuned[-1], one["path"][-1]))
        said.append(f"On {benchmark}, with base's style 0 and the teacher's 1, {tuned[-1]} is at {off} and "
                    f"{one['path'][-1]} at {last}; of {len(tuned)} checkpoints of SFT " + (
                        f"the first with an interval clear of 0 is {moved[0]}." if moved else
                        "none has an interval clear of 0: there is no evidence that the style has moved."))
    if benchmark not in lost_benchmarks(report):
        return said
    parts = [f"{_measure(one[f'accuracy_and_{kind}'], 2)} with {what}" for kind, what in
             (("style", "the style index"), ("kl", "the KL from the base model")) if one[f"accuracy_and_{kind}"]]
    if parts:
        said.append(f"Along SFT and recovery ({len(one['path'])} checkpoints) accuracy has the correlation "
                    f"{' and '.join(parts)}.")
    if len(parts) == 2 and all(one[f"accuracy_and_{kind}"]["ci95"][1] < 0 for kind in ("style", "kl")):
        said.append("Both fall as accuracy rises: along this path style and distance predict the same, and it does not "
                    "separate them.")
    # checkpoints off the path may: as far from base as off_model, and less lost
    off_kl = report["kl"].get("off_model", {}).get(benchmark, {}).get("mean", float("inf"))
    far = [name for name, less in away.items() if report["kl"][name].get(benchmark, {}).get("mean", 0) >= 0.8 * off_kl
           and less["ci95"][0] > 0]
    if far:
        said.append(f"But {', '.join(far)} moved at least 0.8 times as far and lost less: distance alone is not the "
                    "cause.")
    return said


def _points(found: dict) -> str:
    low, high = found["ci95"]
    return f"{found['points']:.1f} points ({low:.1f} to {high:.1f})"


def _gain(found: dict) -> str:
    low, high = found["ci95"]
    return f"{_points(found)} back" if low > 0 else f"no evidence of a gain ({_points(found)})"


def _nats(found: dict) -> str:
    low, high = found["ci95"]
    return f"{found['mean']:.3f} nats ({low:.3f} to {high:.3f})"


def _measure(found: dict, digits: int) -> str:
    mean, low, high = (f"{value:.{digits}f}" for value in (found["mean"], *found["ci95"]))
    return f"{mean} ({low} to {high})"
