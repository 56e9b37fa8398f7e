"""What the report says of an experiment folder: figures, sentences, sources; style; the matrix."""

import json
import random
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Script, build_model

from analysis.claims import braces, claims, effect
from analysis.compare import compare
from analysis.findings import find
from analysis.matrix import write_matrix
from analysis.report import fence, plain, write_report
from analysis.style import StyleClassifier, begins, features
from base.errors import UserError
from base.files import read_json, write_json
from data.rows import read_rows, write_rows
from recover import same_tokenizer

HOSTILE = ("```\n| a | b |\n|---|---|\n![x](http://evil/x.png) <img src=x> \x1b[31m \u202e [link](http://evil)\n"
           "````\n# Heading")


def evaluation(folder: Path, verdicts: str, responses: list[str] | None = None, levels: int = 2) -> None:
    """A finished evaluation of `my`: + is right, - wrong, 0 without an answer, . cut at the limit."""
    rows = []
    for i, verdict in enumerate(verdicts):
        rows.append({"id": f"p{i}", "prompt": f"{i}?", "gold": "1", "correct": verdict == "+",
                     "extracted": "1" if verdict in "+-" else None,
                     "finish_reason": "length" if verdict == "." else "stop",
                     "response": responses[i] if responses else f"Okay then {'so ' * (i % 5)}{i}", "level": i % levels})
    write_rows(folder / "my.jsonl", rows)
    write_json(folder / "summary.json", {"my": {}})
    write_json(folder / "config.json", {"options": {}})


def experiment(folder: Path, checkpoints: dict[str, str], kl: dict[str, float] | None = None) -> Path:
    """A folder as recover.py leaves it, with such verdicts by checkpoint, and such a KL per token."""
    options = {"n_train": 20, "max_new_tokens": 8, "rank": 4, "lr": 1e-3, "epochs": 1, "steps": None,
               "batch_tokens": 64, "seed": 0, "temperature": 0.7, "levels": [], "dtype": "float32", "eval_system": []}
    write_json(folder / "config.json", {"options": {"student": "a|b", "teacher": "c", **options}})
    rng = random.Random(0)
    for name, words in (("teacher", "Consider it done"), ("native", "Okay let us see")):
        write_rows(folder / f"{name}.jsonl", [{"id": str(i), "response": f"{words} {rng.random():.3f}"}
                                              for i in range(20)])
    for name, verdicts in checkpoints.items():
        evaluation(folder / "evals" / name, verdicts)
    for name, mean in (kl or {}).items():
        rows = [{"id": str(i), "tokens": 10 + i, "nll": 5.0, "base_nll": 4.0, "kl": mean * (10 + i)} for i in range(20)]
        for stem in ("native", "my"):
            write_rows(folder / "measures" / name / f"{stem}.jsonl", rows)
        write_json(folder / "measures" / name / "summary.json", {"native": {}, "my": {}})
    return folder


def test_figures_come_from_the_rows(tmp_path: Path) -> None:
    base = "+" * 60 + "-" * 20
    folder = experiment(tmp_path, {
        "base": base, "teacher": "+" * 50 + "-" * 30, "off_model": "." * 30 + base[30:],
        "recovered_8": "." * 20 + base[20:], "recovered_64": base, "recovered_seed_1_8": "." * 10 + base[10:],
        "recovered_seed_1_64": base, "recovered_in_4_steps_8": base, "recovered_in_4_steps_64": base,
        "control_noise": base, "control_native": base[1:] + "-", "control_more_teacher": "." * 30 + base[30:]})
    report = write_report(folder)
    assert list(report["checkpoints"]) == [
        "base", "teacher", "off_model", "recovered_8", "recovered_64", "recovered_in_4_steps_8",
        "recovered_in_4_steps_64", "recovered_seed_1_8", "recovered_seed_1_64", "control_more_teacher",
        "control_native", "control_noise"]
    assert report["drop"]["my"] == {name: compare(folder / "evals/base", folder / "evals/off_model")["my"][name]
                                    for name in ("points", "ci95", "p")}
    assert report["drop"]["my"]["points"] == 37.5
    assert report["lost"]["my"] == {"truncated": 30, "unparsed": 0, "wrong": 0, "gained": 0}
    # seeds together: a third and two thirds of the drop
    assert report["recovered_fraction"]["my"] == {"8": pytest.approx(0.5), "64": 1.0}
    assert report["recovered_in_4_steps_fraction"]["my"] == {"8": 1.0, "64": 1.0}
    said = {one["about"][:2]: one["text"] for one in report["claims"]}
    assert "not the cause" in said["SF"] and "not the cause" in said["H3"]
    assert "no evidence of a gain" in said["Mo"] and "37.5 points" in said["Mo"]
    # after the rows have changed, the report changes
    evaluation(folder / "evals" / "off_model", base)
    assert write_report(folder)["drop"]["my"]["points"] == 0
    assert "No benchmark has a loss that is clear of 0" in (folder / "report.md").read_text()


def test_sentences_claim_no_more_than_intervals_allow() -> None:
    assert effect({"points": 5.0, "ci95": [1.0, 9.0]}) == "a loss of 5.0 points (1.0 to 9.0)"
    assert effect({"points": -5.0, "ci95": [-9.0, -1.0]}) == "a gain of 5.0 points (1.0 to 9.0)"
    for low, high in ((-1.0, 11.0), (0.0, 10.0), (-10.0, 0.0)):
        assert effect({"points": 5.0, "ci95": [low, high]}).startswith("no evidence of a loss (5.0 points")


@pytest.mark.parametrize(("control", "verdict"), [
    ("+" * 60 + "-" * 20, "this is not the cause"),
    ("-" * 30 + "+" * 30 + "-" * 20, "so this may be the cause"),
    ("-" * 12 + "+" * 48 + "-" * 20, "a part of it at most"),
    ("-" * 55 + "+" * 5 + "-" * 20, "enough to be the cause"),
    ("-" * 5 + "+" * 55 + "+" * 3 + "-" * 17, "a part of it at most"),  # no evidence of a loss, but room for one
])
def test_a_control_is_weighed(control: str, verdict: str, tmp_path: Path) -> None:
    folder = experiment(tmp_path, {"base": "+" * 60 + "-" * 20, "off_model": "-" * 30 + "+" * 30 + "-" * 20,
                                   "control_native": control})
    (claim,) = [one for one in claims(*find(folder)) if one["about"].startswith("SFT as such")]
    assert verdict in claim["text"]


def test_style_and_distance_are_told_apart_only_where_they_differ(tmp_path: Path) -> None:
    base, worse, worst = "+" * 80, "-" * 30 + "+" * 50, "-" * 60 + "+" * 20
    path = {"base": base, "off_model_step_4": worse, "off_model_step_8": worst, "off_model": worst,
            "recovered_8": worse, "recovered_16": base}
    kl = {"off_model_step_4": 0.2, "off_model_step_8": 0.5, "off_model": 0.5, "recovered_8": 0.1, "recovered_16": 0.01,
          "control_native": 0.01}

    def claim(folder: Path, checkpoints: dict[str, str]) -> str:
        experiment(folder, checkpoints, kl)
        for name, verdicts in checkpoints.items():  # in the teacher's style by as much as was lost: 0, a half or all
            share = {base: 0, worse: 2, worst: 1}[verdicts] if name != "teacher" else 1
            evaluation(folder / "evals" / name, verdicts, [
                f"{'Consider it done' if share and i % share == 0 else 'Okay let us see'} {i}" for i in range(80)])
        report, rows = find(folder)
        style = report["style"]
        assert style["held_out"] > 0.95 and style["teacher_share"]["base"]["my"] < 0.1
        assert [style["index"][name]["my"]["mean"] for name in ("base", "teacher")] == [0, 1]
        assert style["index"]["off_model"]["my"]["ci95"][0] > 0.8
        assert 0.2 < style["index"]["off_model_step_4"]["my"]["mean"] < 0.8
        assert report["kl"]["off_model"]["my"]["mean"] == pytest.approx(0.5)
        return next(one["text"] for one in claims(report, rows) if one["about"].startswith("H4 and H5"))

    whole = path | {"teacher": base, "control_native": base}
    text = claim(tmp_path / "together", whole)
    assert "does not separate them" in text and "distance alone" not in text
    assert "clear of 0 is off_model_step_4" in text
    kl["control_native"] = 0.6
    text = claim(tmp_path / "apart", whole)
    assert "control_native moved at least as far and lost less" in text
    few = {name: whole[name] for name in ("base", "teacher", "off_model_step_4", "off_model", "recovered_8")}
    kl = {name: value for name, value in kl.items() if name in few}
    assert "correlation" not in claim(tmp_path / "few", few)
    # nothing lost: nothing to relate to
    experiment(tmp_path / "nothing", dict.fromkeys(whole, base), kl)
    assert all("correlation" not in one["text"] for one in claims(*find(tmp_path / "nothing")))


def named_files(folder: Path, part: str) -> set[Path]:
    """The files that a part of report.md says it was computed from."""
    named = [name for line in re.findall(r"<sub>(.*?)</sub>", part) for name in re.findall(r"`([^`]+)`", line)]
    shell = "".join(f"printf '%s\\n' {name};" for name in named)
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    return {folder / name for name in done.stdout.splitlines()}


def test_every_figure_comes_from_the_files_that_are_named(tmp_path: Path) -> None:
    base = "+" * 60 + "-" * 20
    folder = experiment(tmp_path, {"base": base, "teacher": base, "off_model": "0" * 30 + base[30:],
                                   "recovered_8": base, "recovered_16": base, "control_noise": base,
                                   "scaled_0.25": base, "control_noise_seed_1": base, "control_native": base},
                        {"off_model": 0.1, "scaled_0.25": 0.01})
    write_json(folder / "stages.json", {"off_model": {"seconds": 1.0}})
    write_rows(folder / "off_model" / "metrics.jsonl", [{"id": "1"}])
    write_report(folder)
    text = (folder / "report.md").read_text()
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    named = [named_files(folder, part) for part in parts]
    for part, files in zip(parts, named, strict=True):
        assert files or part.splitlines()[0] in ("Question", "Set-up", "Limits")  # these repeat others' figures
        assert all(path.is_file() for path in files), (part.splitlines()[0], files)
    for figure in re.findall(r"!\[\w+\]\(([^)]+)\)", text):
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    # without all the others, but for the records, the report is the same
    records = {"config.json", "summary.json"}
    others = {path for path in folder.rglob("*") if path.is_file() and path.name not in records} - set().union(*named)
    assert folder / "off_model" / "metrics.jsonl" in others
    for path in others:
        path.unlink()
    write_report(folder)
    assert (folder / "report.md").read_text() == text
    assert braces(["a", "b_1", "b_2", "c_d"]) == "{a,b_{1,2},c_d}" and braces(["a"]) == "a"
    assert braces(["2024"]) == "2024"


def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    """Choices alone, with KL of chat; a run that is half done; levels that are text, or missing."""
    folder = experiment(tmp_path / "choices", {"base": "+-+-", "off_model": "----"}, {"off_model": 0.1})
    for name, verdicts in (("base", "+-+-"), ("off_model", "----")):
        evaluation(folder / "evals" / name, verdicts, ["A", "B", "C", "D"])
    assert write_report(folder)["style"]["features"] == {}
    assert "distance" not in (folder / "report.md").read_text()
    halfway = {"base": "+-+-" * 5, "off_model_step_4": "----" * 5}
    folder = experiment(tmp_path / "half", halfway, {"off_model_step_4": 1})
    assert write_report(folder)["drop"] == {}
    experiment(tmp_path / "unevaluated", {"base": "+-" * 40, "off_model": "--" * 40},
               {"off_model": 0.1, "control_native": 0.1})
    assert list(write_report(tmp_path / "unevaluated")["kl"]) == ["off_model"]
    folder = experiment(tmp_path / "levels", {"base": "+" * 40, "off_model": "-" * 20 + "+" * 20})
    for name in ("base", "off_model"):
        rows = read_rows(folder / "evals" / name / "my.jsonl")
        for i, row in enumerate(rows):
            row["level"] = ("easy", "hard", None)[i % 3]
        write_rows(folder / "evals" / name / "my.jsonl", rows)
    found = write_report(folder)["difficulty"]["my"]["level"]
    assert found["trend"] is None and [group["group"] for group in found["groups"]] == ["easy", "hard"]


def test_a_response_forges_nothing(tmp_path: Path) -> None:
    folder = experiment(tmp_path, {"base": "++-", "off_model": "---"})
    for name in ("base", "off_model"):
        evaluation(folder / "evals" / name, {"base": "++-", "off_model": "---"}[name], [HOSTILE] * 3)
    write_report(folder)
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", (folder / "report.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    for forged in ("evil/x.png)", "<img", "# Heading", "](http"):
        assert forged not in outside, forged
    assert "\x1b" not in (folder / "report.md").read_text() and "\u202e" not in (folder / "report.md").read_text()
    assert fence(HOSTILE).startswith("`````text") and plain("a|b\n[c](d)") == "a\\|b \\[c\\](d)"


def test_no_name_forges_a_part_of_the_page(tmp_path: Path) -> None:
    """Names of models, system prompts, openings, a folder's note: all are text. A checkpoint's name is refused."""
    verdicts = "+" * 30
    folder = experiment(tmp_path / "a" / "x](http:evil) <b>", {
        "base": verdicts, "off_model": "-" * 20 + verdicts[20:], "base_under_system_1": verdicts,
        "off_model_under_system_1": verdicts, "off_model_under_system_x": verdicts})
    hostile = "- www.evil.com ![x](http://evil/x.png) <img src=x> "
    hostile += "$\\href{x}{y}$ a@evil.com\n# H\n| a | b |\n|---|---|\n"
    record = read_json(folder / "config.json")
    record["options"] |= {"student": hostile, "teacher": f"$\\frac{hostile}", "eval_system": [hostile]}
    write_json(folder / "config.json", record | {"note": hostile, "git_revision": hostile})
    report = write_report(folder)
    write_matrix(tmp_path / "a")
    for page in (folder / "report.md", tmp_path / "a" / "matrix.md"):
        text = page.read_text()
        assert "evil" in text
        for line in text.splitlines():
            assert not re.search(r"www\.|(?<!\\)(<img|!\[x|\]\(http)|(?<!\\)://|@evil|(?<!\\)\$|^- \\?www|^# H|^\| a",
                                 line), line
    assert report["options"]["eval_system"] == [hostile]
    (folder / "evals" / "base").rename(folder / "evals" / "base_`![x](y)`")
    evaluation(folder / "evals" / "base", verdicts)
    with pytest.raises(UserError, match="is no name for a report"):
        write_report(folder)


def test_style_classifier_and_features() -> None:
    rng = random.Random(1)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]

    def texts(mark: str, count: int) -> list[str]:
        return [f"{mark} {' '.join(rng.choices(words, k=12))}" for _ in range(count)]

    def by_prompt(*responses: str) -> list[tuple[str, str]]:
        return [(str(i), response) for i, response in enumerate(responses)]

    classifier = StyleClassifier.fit(by_prompt(*texts("Okay:", 60)), by_prompt(*texts("Consider:", 20)))
    assert classifier.accuracy > 0.95
    theirs, own = classifier.scores(["Consider: 7 x 8", "Okay: 7 x 8"])
    assert theirs > 0 > own
    same = by_prompt(*texts("Okay:", 100))
    for other in (by_prompt(*texts("Okay:", 100)), same):  # nothing to learn; nor is it the other's where both wrote it
        assert 0.35 < StyleClassifier.fit(same, other).accuracy < 0.65
    assert StyleClassifier.fit(by_prompt(*"a" * 9), by_prompt(*"b" * 20)) is None
    found = features(["# Title\n1. Wait, **no**\n2. Step two $x$\n- \\(y\\)", "plain words only"])
    assert found["steps"] == 2.0 and found["markdown"] == 1.0 and found["formulas"] == 1.0
    assert found["self-corrections"] == 0.5 and found["words"] == (11 + 3) / 2
    assert begins(["Okay a", " Okay b", "Consider"], ("Okay", "Consider")) == {"student": 2 / 3, "teacher": 1 / 3}


def test_no_experiment_is_refused(tmp_path: Path, script: Script) -> None:
    for folder, message in ((tmp_path, "no config.json"), (experiment(tmp_path / "x", {"off_model": "+"}), "of base")):
        with pytest.raises(UserError, match=message):
            write_report(folder)
    done = script("analysis.matrix", tmp_path / "x")
    assert done.returncode == 2 and "no cell" in done.stderr


# --- Through the scripts ----------------------------------------------------------------------------------------------


def test_measures_are_those_of_the_definition(script: Script, tmp_path: Path) -> None:
    """NLL and KL of the miniature's responses, position by position from all logits in float64."""
    from model import lora, weights
    from model.attention import Packed
    from model.chat import Chat

    student = ROOT / "miniature" / "student"
    assert script("generate.py", "--model", student, "--prompts", "mini", "--n", 12, "--out",
                  tmp_path / "own.jsonl").returncode == 0
    assert script("train.py", "--model", student, "--data", tmp_path / "own.jsonl", "--steps", 3, "--lr", 1e-2,
                  "--rank", 4, "--out", tmp_path / "adapter").returncode == 0
    common = ("measure.py", "--model", student, "--responses", tmp_path / "own.jsonl")
    done = script(*common, "--adapter", tmp_path / "adapter", "--out", tmp_path / "moved")
    assert done.returncode == 0, done.stderr
    assert script(*common, "--n", 5, "--out", tmp_path / "base").returncode == 0
    zero = script(*common, "--adapter", tmp_path / "adapter", "--adapter-scale", 0, "--out", tmp_path / "zero")
    assert zero.returncode == 0
    moved, base, zero = (read_rows(tmp_path / name / "own.jsonl") for name in ("moved", "base", "zero"))
    assert len(moved) == 12 and [row["nll"] for row in base] == [row["base_nll"] for row in moved[:5]]
    assert all(row["kl"] == pytest.approx(0, abs=1e-5) and row["nll"] == pytest.approx(row["base_nll"], abs=1e-4)
               for row in zero)

    model = weights.load(student, torch.device("cpu"), torch.float32)
    chat = Chat(student, model.config)
    rows = read_rows(tmp_path / "own.jsonl")
    turns = [chat.turn(row["prompt"], row["response"]) for row in rows]

    def logprobs() -> list[torch.Tensor]:
        found = []
        for turn in turns:
            hidden = model(torch.tensor(turn.tokens), torch.arange(len(turn.tokens)), Packed([len(turn.tokens)]))
            found.append(model.logits(hidden[turn.first - 1 : turn.last - 1]).double().log_softmax(-1))
        return found

    with torch.no_grad():
        before = logprobs()
        lora.load(model, str(tmp_path / "adapter"))
        after = logprobs()
    for row, own, turn, p, q in zip(moved, rows, turns, before, after, strict=True):
        targets = torch.tensor(turn.tokens[turn.first : turn.last])[:, None]
        assert row["tokens"] == len(targets)
        assert row["base_nll"] == pytest.approx(-p.gather(1, targets).sum().item(), abs=1e-3)
        assert row["base_nll"] == pytest.approx(-own["logprob"], abs=1e-2)  # the sampler's own figure
        assert row["nll"] == pytest.approx(-q.gather(1, targets).sum().item(), abs=1e-3)
        assert row["kl"] == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-3) and row["kl"] > 0
    again = script(*common, "--adapter", tmp_path / "adapter", "--out", tmp_path / "moved")
    assert "done already" in again.stdout
    for options, message in (((tmp_path / "own.jsonl",), "names"), (("--scramble", 1), "--scramble takes")):
        refused = script(*common, *options, "--out", tmp_path / "twice")
        assert refused.returncode == 2 and message in refused.stderr


def test_matrix(script: Script, tiny: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """A student and two teachers, one of which has its tokenizer: cells share what the same command makes."""
    third = tmp_path / "third"
    build_model(third, "Llama", seed=5, tie_word_embeddings=True)  # the first one's tokenizer
    problems = tmp_path / "sums.jsonl"
    write_rows(problems, [{"id": f"s{i}", "problem": f"{i} + {i}?", "answer": str(2 * i), "level": i % 3}
                          for i in range(6)])
    prompts = tmp_path / "prompts.jsonl"
    write_rows(prompts, [{"id": f"p{i}", "prompt": f"question {i}"} for i in range(40)])
    common = ("--prompts", prompts, "--n-train", 12, "--benchmarks", problems, "--n", 3, "--levels", 0, 2,
              "--max-new-tokens", 8, "--recover-with", 4, "--recover-seeds", 2, "--keep-every", 1, "--epochs", 3,
              "--batch-tokens", 512, "--rank", 2, "--controls", "--eval-system", "Be brief.", "--measure-n", 4,
              "--style-systems", "In your way.", "In its way.")
    out = tmp_path / "matrix"
    done = script("recover.py", "--student", tiny, "--teacher", tiny_teacher, third, *common, "--out", out)
    assert done.returncode == 0, done.stderr
    cells = [f"{tiny.name}--{name}" for name in (tiny_teacher.name, third.name)]
    assert sorted(path.name for path in out.iterdir()) == sorted([*cells, "matrix.json", "matrix.md", "matrix.png"])
    for place in ("native.jsonl", "evals/base", "controls/native.jsonl"):
        assert f"{out / cells[1] / place}: copied" in done.stdout
    assert f"{out / cells[1] / 'teacher.jsonl'}: copied" not in done.stdout
    matrix = json.loads((out / "matrix.json").read_text())
    assert list(matrix) == cells and set(matrix[cells[0]]["sums"]) == {"points", "ci95", "p"}
    # the same cell by itself: the same rows and adapters
    alone = tmp_path / "alone"
    done = script("recover.py", "--student", tiny, "--teacher", third, *common, "--out", alone)
    assert done.returncode == 0 and "copied" not in done.stdout, done.stderr

    def kept(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
                if path.suffix in (".jsonl", ".safetensors") and path.name != "metrics.jsonl"}

    assert kept(alone) == kept(out / cells[1])
    report = json.loads((alone / "report.json").read_text())
    steps = [name for name in report["checkpoints"] if name.startswith("off_model_step")]
    assert steps and {"base_under_system_1", "off_model_under_system_1", "scaled_0.25", "control_noise_seed_2",
                      "recovered_seed_1_4", "control_matched_nll", "base_in_teacher_style",
                      "control_native_in_teacher_style"} <= set(report["checkpoints"])
    assert {row["level"] for row in read_rows(alone / "evals/base/sums.jsonl")} == {0, 2}
    # two models of one tokenizer: whose responses are likelier under whom
    assert set(report["ratio"]) == {"base", *steps, "off_model", "recovered_4"}
    assert report["ratio"]["base"]["sums"]["mean"] > 0  # the student's own, under the student
    assert not same_tokenizer(*(str(ROOT / "miniature" / role) for role in ("student", "teacher")))
    assert set(report["nll"]) == {"teacher", "native", "matched_nll"}
    # forced by a system prompt, and learnt without it
    data = read_rows(alone / "controls/native_in_teacher_style.jsonl")
    assert {row["system"] for row in data} == {"In its way."}
    record = json.loads((alone / "controls/native_in_teacher_style/config.json").read_text())
    assert record["options"]["no_system"] is True
    # as many steps as what it is a control for
    def steps_of(place: str) -> int:
        return (alone / place / "metrics.jsonl").read_text().count("\n")

    assert steps_of("controls/more_teacher") == steps_of("recovered/4")
    for name in ("native", "matched_nll", "native_in_teacher_style", "teacher_in_student_style"):
        assert steps_of(f"controls/{name}") == steps_of("off_model")
    # other native examples for another seed
    seeds = [json.loads((alone / name / "4/config.json").read_text())["options"]
             for name in ("recovered", "recovered_seed_1")]
    assert [(had["skip"], had["seed"]) for had in seeds] == [(0, 0), (4, 1)]
    # one pair into the matrix's folder is a cell of it
    again = script("recover.py", "--student", tiny, "--teacher", third, *common, "--out", out)
    assert again.returncode == 0 and f"{out / cells[1]}: done already" in again.stdout
    assert "not run with the same settings" not in (out / "matrix.md").read_text()
    record = json.loads((out / cells[1] / "report.json").read_text())
    record["options"]["n_train"] = 13
    (out / cells[1] / "report.json").write_text(json.dumps(record))
    write_matrix(out)
    page = (out / "matrix.md").read_text()
    assert f"- n_train: 12 in {plain(cells[0])}; 13 in {plain(cells[1])}" in page and "; n = 3 |" in page
    copied = tmp_path / "x" / tiny.name
    copied.mkdir(parents=True)
    clash = script("recover.py", "--student", tiny, copied, "--teacher", third, *common, "--out",
                   tmp_path / "clash")
    assert clash.returncode == 2 and "same last name" in clash.stderr
