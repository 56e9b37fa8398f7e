"""What the figures mean: of each control a sentence or two, which claim no more than the intervals allow.

A loss is one whose 95 % interval is clear of 0. A control "is not the cause" where it lost less than off-model SFT, by
an interval clear of 0, and itself at most a quarter of what off-model SFT has lost at the least; where its own
interval leaves more open, it is "a part of it at most".
"""

import re
from collections.abc import Callable, Iterable, Sequence

from analysis.findings import FORCED, Rows, arms, in_words, lost_benchmarks, verdicts
from analysis.statistics import paired_difference

SOURCE_AND_STYLE = ("control_native", "control_native_in_teacher_style", "control_teacher_in_student_style")


def claims(report: dict, rows: Rows) -> list[dict]:
    """What each control says, as {"about", "text", "rows"}: sentences made from the figures, and the evaluations or
    measures that they are computed from. On the benchmarks that lost something; on all where none did."""
    if not report["drop"]:
        return []
    drops, index, nll = report["drops"], report["style"]["index"], report["nll"]
    lost = lost_benchmarks(report)
    where = lost or list(report["drop"])
    found: list[dict] = []

    def claim(about: str, names: Sequence[str], say: Callable[[str], str] = lambda benchmark: "", opening: str = "",
              closing: str = "", measured: Sequence[str] = (), on: Sequence[str] = where) -> None:
        """What there is to `say` on each benchmark, if the evaluations `names` are there."""
        text = " ".join(filter(None, [opening, *map(say, on), closing])) if all(name in rows for name in names) else ""
        if text:
            sources = files("evals", ["base", "off_model", *names], on) if names else []
            found.append({"about": about, "text": text, "rows": [*sources, *measured]})

    def versus(name: str, benchmark: str, other: str = "off_model") -> dict:
        """How much less a control lost than off_model, or another, did."""
        return paired_difference(verdicts(rows[name][benchmark]), verdicts(rows[other][benchmark]))

    def weigh(name: str, benchmark: str, conclude: bool = True) -> str:
        """Whether SFT (or noise) of another kind cost as much as off-model SFT did."""
        own, less = drops[name][benchmark], versus(name, benchmark)
        text = f"On {benchmark} {effect(own)}"
        if benchmark not in lost or not conclude:
            return f"{text}."
        if less["ci95"][1] < 0:
            return f"{text}, more than off-model SFT cost: enough to be the cause."
        if less["ci95"][0] <= 0:
            return f"{text}: not told apart from off-model SFT's, so this may be the cause."
        part = own["ci95"][1] > report["drop"][benchmark]["ci95"][0] / 4
        return (f"{text}, {_points(less)} less than off-model SFT cost: "
                f"{'a part of it at most' if part else 'this is not the cause'}.")

    claim("SFT as such (own responses to the same prompts)", ["control_native"],
          lambda benchmark: weigh("control_native", benchmark))
    noises = [name for name in rows if name.startswith("control_noise")]
    if noises:
        claim(f"H3, noise on the weights (of {len(noises)} draws, the one that lost most)", noises,
              lambda benchmark: weigh(max(noises, key=lambda name: drops[name][benchmark]["points"]), benchmark))

    def imitated(benchmark: str) -> str:
        to_teacher, below = drops["teacher"][benchmark], versus("teacher", benchmark)
        accuracy = 100 * report["checkpoints"]["teacher"][benchmark]["accuracy"]
        if benchmark not in lost:
            verdict = ""
        elif below["ci95"][0] > 0:
            verdict = f"; off-model is {_points(below)} below its own teacher, which imitation does not explain"
            if to_teacher["ci95"][0] > 0:
                verdict += "; what the teacher itself is below base, it may"
        elif to_teacher["ci95"][0] <= 0:
            verdict = ", so there is no evidence that its answers are worse"
        else:
            verdict = "; no evidence that off-model is below it: imitating a weaker model may be the cause"
        return (f"On {benchmark} the teacher has {accuracy:.1f} %: against base {effect(to_teacher, 'lower score')}"
                f"{verdict}.")

    claim("H1, a weak teacher", ["teacher"], imitated)

    if "teacher" in nll and "native" in nll:
        said = [f"Per token the teacher's responses cost the student {_nats(nll['teacher'])}, its own to the same "
                f"prompts {_nats(nll['native'])}."]
        names, close = [], True
        measured = ["measures/teacher_data/teacher.jsonl", "measures/own_data/native.jsonl"]
        if "matched_nll" in nll and "control_matched_nll" in rows:
            share = nll["matched_nll"]["mean"] / nll["teacher"]["mean"]
            names, close = ["control_matched_nll"], abs(share - 1) < 0.15
            said.append(f"Its own at the temperature that comes nearest cost {_nats(nll['matched_nll'])}, {share:.2f} "
                        "times the teacher's. SFT on these:")
            measured.append("measures/own_data/matched_nll.jsonl")
        claim("H2, data that is unlikely under the student", names,
              lambda benchmark: weigh("control_matched_nll", benchmark, close), " ".join(said),
              "" if close else "No close match: of data as unlikely as the teacher's it says nothing.", measured,
              where if names else [])

    most = max(arms(list(rows)).get("recovered", [0]))
    native, more = f"recovered_{most}", "control_more_teacher"
    claim("More training of any kind", [more, native], lambda benchmark: (
        f"On {benchmark}, {most} native examples: {effect(versus(native, benchmark), 'gain')}; as many of the "
        f"teacher's in the same steps: {effect(versus(more, benchmark), 'gain')}; the first over the second: "
        f"{effect(versus(native, benchmark, more), 'gain')}."))

    def switched(benchmark: str) -> str:
        if not in_words(rows["base"][benchmark]):
            return ""
        placed = [index[name][benchmark] for name in FORCED if index.get(name, {}).get(benchmark)]
        numbers = " and ".join(f"{one['mean']:.2f}" for one in placed)
        said = f" (style index {numbers})" if placed else ""
        return (f"On {benchmark} the teacher's style, asked of the base model without any training, is "
                f"{effect(drops['base_in_teacher_style'][benchmark])}; the student's own, asked of the off-model "
                f"student likewise, {effect(versus('off_model_in_student_style', benchmark), 'gain')}{said}.")

    claim("H4, the style, switched without training", FORCED, switched)
    claim("Source or style", SOURCE_AND_STYLE, lambda benchmark: (
        f"On {benchmark}, against SFT on the student's own responses in its own style, the teacher's in the student's "
        f"style are {effect(versus('control_native', benchmark, 'control_teacher_in_student_style'))}, the student's "
        f"in the teacher's style {effect(versus('control_native', benchmark, 'control_native_in_teacher_style'))}."))
    for benchmark, one in report["together"].items():
        if benchmark in where:
            away = {name: versus(name, benchmark) for name in report["kl"] if name not in one["path"]}
            claim("H4 and H5, style and distance", [*one["path"], "teacher", *away],
                  lambda benchmark, one=one, away=away: " ".join(_moves(benchmark, one, report, away)),
                  measured=[*chat_files(report), *files("measures", report["kl"], [benchmark])], on=[benchmark])
    for name in rows:
        if name.startswith("off_model_under_system"):
            systems = report["options"]["eval_system"] or []
            which = dict(zip(map(str, range(1, 1 + len(systems))), systems, strict=True)).get(name.rpartition("_")[2])
            claim(f"Another system prompt: {which}", [name.replace("off_model", "base"), name],
                  lambda benchmark, name=name: (
                      f"On {benchmark} {effect(drops[name][benchmark])}, against base under the same prompt; without "
                      f"it {_points(report['drop'][benchmark])}."))
    return found


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
        off, last = (spread(index[name], 2) for name in (tuned[-1], one["path"][-1]))
        said.append(f"On {benchmark}, with base's style 0 and the teacher's 1, {tuned[-1]} is at {off} and "
                    f"{one['path'][-1]} at {last}; of {len(tuned)} checkpoints of SFT " + (
                        f"the first with an interval clear of 0 is {moved[0]}." if moved else
                        "none has an interval clear of 0: there is no evidence that the style has moved."))
    if benchmark not in lost_benchmarks(report):
        return said
    parts = [f"{spread(one[f'accuracy_and_{kind}'], 2)} with {what}" for kind, what in
             (("style", "the style index"), ("kl", "the KL from the base model")) if one[f"accuracy_and_{kind}"]]
    if parts:
        said.append(f"Along SFT and recovery ({len(one['path'])} checkpoints) accuracy has the correlation "
                    f"{' and '.join(parts)} (intervals over problems, with style and KL as they are).")
    if len(parts) == 2 and all(one[f"accuracy_and_{kind}"]["ci95"][1] < 0 for kind in ("style", "kl")):
        said.append("Both fall as accuracy rises, as either explanation predicts: this path does not separate them.")
    # checkpoints off the path may: at least as far from base as off_model, and less lost
    distance = {name: of[benchmark]["ci95"] for name, of in report["kl"].items() if benchmark in of}
    far = [name for name, less in away.items() if {name, "off_model"} <= distance.keys()
           and distance[name][0] >= distance["off_model"][1] and less["ci95"][0] > 0]
    if far:
        said.append(f"But {', '.join(far)} moved at least as far and lost less: distance alone is not the cause.")
    return said


def effect(found: dict, what: str = "loss") -> str:
    """A difference in words that its interval allows: a loss, a gain, or no evidence of either."""
    opposite = {"loss": "gain", "gain": "loss", "lower score": "higher score"}[what]
    points, (low, high) = found["points"], found["ci95"]
    if low > 0:
        return f"a {what} of {_points(found)}"
    if high < 0:
        return f"a {opposite} of {interval(-points, (-high, -low), 1, ' points')}"
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


def chat_files(report: dict) -> list[str]:
    """The files that the style classifier has learnt from."""
    return [name for role in ("teacher", "student") for name in report["style"]["responses"][role]]


def files(place: str, names: Iterable[str], stems: Iterable[str]) -> list[str]:
    """The row files of some checkpoints in evals/ or measures/, as one entry; of none, none."""
    names, stems = list(names), list(stems)
    return [f"{place}/{braces(names)}/{braces(stems)}.jsonl"] if names else []


def interval(value: float, ci95: Sequence[float], digits: int, unit: str = "") -> str:
    """A value with its 95 % interval."""
    low, high = ci95
    return f"{value:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def _points(found: dict) -> str:
    return interval(found["points"], found["ci95"], 1, " points")


def _nats(found: dict) -> str:
    return interval(found["mean"], found["ci95"], 3, " nats")


def spread(found: dict, digits: int = 4) -> str:
    """A mean with its interval."""
    return interval(found["mean"], found["ci95"], digits)
