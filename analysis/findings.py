"""Every figure of an experiment's report, from the row files in its folder (and names, from the records).

Nothing is remembered from the run: `python -m analysis.report DIR` finds what is there after `evaluate.py --rescore`.
"""

import re
from collections.abc import Iterable, Sequence
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
from analysis.style import StyleClassifier, begins, features
from base.errors import UserError
from base.files import read_json
from data.rows import GRADED, MEASURED, read_rows

Rows = dict[str, dict[str, list[dict]]]  # graded rows by checkpoint and benchmark
# In this order, by the beginning of their names; numbers in names count as numbers
ORDER = ("base", "teacher", "off_model_step", "off_model", "recovered", "scaled", "base_in", "off_model_in",
         "base_under", "off_model_under", "control")
CURVE = re.compile(r"(recovered(?:_in_\d+_steps)?(?:_seed_\d+)?)_(\d+)")  # an arm of the recovery, and N
FORCED = ("base_in_teacher_style", "off_model_in_student_style")
# Of an experiment's config.json: what the report says of it
OPTIONS = {"n_train": int, "max_new_tokens": int, "rank": int, "lr": float, "epochs": int, "steps": (int, None),
           "batch_tokens": int, "seed": int, "temperature": float, "eval_system": ([str], None),
           "levels": ([str], None), "dtype": str}
RECORD = {"options": {**OPTIONS, "student": str, "teacher": str, "openers": ([str] * 2, None)}, "note": (str, None),
          "git_revision": (str, None)}
LEAST_SOLVED = 20  # problems, below which their quarters say nothing
LEAST_PATH = 6  # checkpoints, below which a correlation says nothing


def find(folder: Path) -> tuple[dict, Rows]:
    """All figures of the experiment in `folder`, as report.json holds them (contract C5), and its graded rows."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is no experiment: it has no config.json")
    record = read_json(folder / "config.json", RECORD)
    options = record["options"]
    rows = read_evaluations(folder / "evals")
    stages = read_json(folder / "stages.json", {str: {"seconds": float}}) if (folder / "stages.json").exists() else {}
    report = {"student": options["student"], "teacher": options["teacher"], "note": record.get("note") or "",
              "options": {name: options.get(name) for name in OPTIONS},
              "revision": record.get("git_revision"),
              "checkpoints": {name: {benchmark: summarise(graded) for benchmark, graded in of.items()}
                              for name, of in rows.items()}}
    report |= losses(rows) | recoveries(rows)
    report["difficulty"] = difficulty(rows) if "off_model" in rows else {}
    report["style"] = styles(folder, rows, options.get("openers"))
    report |= measures(folder, rows)
    report["together"] = together(report, rows)
    report["seconds"] = {place: stage["seconds"] for place, stage in stages.items()}
    return report, rows


def read_evaluations(folder: Path) -> Rows:
    """Graded rows of every finished evaluation, in ORDER; all on the same problems as the first checkpoint's."""
    names = sorted((path.parent.name for path in folder.glob("*/summary.json")), key=_place)
    if "base" not in names:
        raise UserError(f"{folder} has no evaluation of base: there is nothing to compare with")
    rows = {name: {benchmark: read_rows(folder / name / f"{benchmark}.jsonl", GRADED)
                   for benchmark in _summarised(folder / name)} for name in names}
    for name in names:
        for benchmark, first in rows["base"].items():
            check_same_problems(benchmark, folder / "base", first, folder / name, rows[name].get(benchmark, []))
    return rows


def kind_of(name: str, kinds: Iterable[str]) -> str:
    """The longest of `kinds` that a checkpoint's name begins with, or nothing."""
    return max((kind for kind in kinds if name.startswith(kind)), key=len, default="")


def _summarised(folder: Path) -> list[str]:
    """The files of rows that a folder's summary.json names. Such names, and the folder's own, go into the report's
    Markdown and figures as they are."""
    names = list(read_json(folder / "summary.json"))
    if not names:
        raise UserError(f"{folder / 'summary.json'} names no rows")
    for name in (folder.name, *names):
        if not re.fullmatch(r"[\w.+-]+", name):
            raise UserError(f"{folder}: {name!r} is no name for a report: letters, digits and . + - _ would do")
    return names


def _place(name: str) -> tuple:
    kind = kind_of(name, ORDER)
    parts = tuple((0, float(part), "") if re.fullmatch(r"[\d.]+", part) else (1, 0.0, part)
                  for part in re.split(r"(\d+(?:\.\d+)?)", name) if part)
    return ORDER.index(kind) if kind else len(ORDER), parts


def verdicts(rows: Sequence[dict]) -> list[bool]:
    """Which rows are right."""
    return [row["correct"] for row in rows]


def losses(rows: Rows) -> dict:
    """What each checkpoint has lost against base: "drops", and of off_model alone "drop" and "lost", as in C5."""
    # under another system prompt, against base under the same
    against = {name: before for name in rows if name.startswith("off_model_under")
               and (before := name.replace("off_model", "base")) in rows}
    drops = {name: {benchmark: paired_difference(verdicts(first), verdicts(rows[name][benchmark]))
                    for benchmark, first in rows[against.get(name, "base")].items()} for name in rows if name != "base"}
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
        if in_words(base) and len(solved) >= LEAST_SOLVED:
            lengths = [len(one["response"]) for one, _ in solved]
            kinds["length"] = by_group(*zip(*solved, strict=True), quarters(lengths))
        if kinds:
            found[benchmark] = kinds
    return found


def in_words(rows: Sequence[dict]) -> bool:
    """Whether a benchmark is answered in more than a letter or a word, so that there is style."""
    return any(len(row["response"].split()) > 1 for row in rows)


def styles(folder: Path, rows: Rows, openers: Sequence[str] | None) -> dict:
    """How much of the teacher's style is in each checkpoint's benchmark responses, {checkpoint: {benchmark: …}}.

    "index": where a classifier of chat responses places them between base's own (0) and the teacher's own (1) to the
    same problems, so that it matters little that mathematics is not chat; None where it can't tell these two apart.
    "teacher_share": the share that it calls the teacher's, as they are. "features" and, with openers, "openers".
    "held_out" is the classifier's accuracy on chat.
    """
    worded = [benchmark for benchmark, graded in rows["base"].items() if in_words(graded)]
    chats = {"student": [folder / "native.jsonl", folder / "controls" / "native.jsonl"],
             "teacher": [folder / "teacher.jsonl", folder / "controls" / "more_teacher.jsonl"]}
    texts = {role: {str(path.relative_to(folder)): [(row["id"], row["response"])
                                                    for row in read_rows(path, {"response": str})]
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


def measures(folder: Path, evaluated: Rows) -> dict:
    """From measures/: "nll" of the training data under the student, "kl" {checkpoint: {rows: …}} from the base model
    of those that were `evaluated`, and "ratio", the log-likelihood ratio of the two models for a checkpoint's
    responses; in nats per token."""
    found: dict[str, dict] = {"nll": {}, "kl": {}, "ratio": {}}
    for record in sorted((folder / "measures").glob("*/summary.json"), key=lambda path: _place(path.parent.name)):
        name = record.parent.name
        for stem in _summarised(record.parent):
            rows = read_rows(record.with_name(f"{stem}.jsonl"), MEASURED)
            tokens = [row["tokens"] for row in rows]
            if name in ("teacher_data", "own_data"):
                found["nll"][stem] = ratio([row["nll"] for row in rows], tokens)
            elif name.endswith("_under_teacher"):
                checkpoint = name.removesuffix("_under_teacher")
                others = {row["id"]: row["nll"] for row in read_rows(
                    folder / "measures" / f"{checkpoint}_under_student" / f"{stem}.jsonl", MEASURED)}
                both = [row for row in rows if row["id"] in others]  # a response may be too long for one of the two
                found["ratio"].setdefault(checkpoint, {})[stem] = ratio(
                    [row["nll"] - others[row["id"]] for row in both], [row["tokens"] for row in both])
            elif name in evaluated and all(row.get("kl") is not None for row in rows):
                found["kl"].setdefault(name, {})[stem] = ratio([row["kl"] for row in rows], tokens)
    return found


def together(report: dict, rows: Rows) -> dict:
    """Along SFT and recovery: {benchmark: the path's checkpoints, their accuracy, style index and KL on the base
    model's own responses (None where there is none), and the correlations of accuracy with both}."""
    index, kls, found = report["style"]["index"], report["kl"], {}
    path = [name for name in rows if name in ("base", "off_model") or name.startswith("off_model_step")]
    path += [f"recovered_{n}" for n in arms(list(rows)).get("recovered", [])]
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


def lost_benchmarks(report: dict) -> list[str]:
    """Those on which off_model's loss has an interval clear of 0."""
    return [benchmark for benchmark, drop in report["drop"].items() if drop["ci95"][0] > 0]
