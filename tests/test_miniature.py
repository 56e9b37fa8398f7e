"""The miniature: is its world right, are its checkpoints what they are said to be, does the whole effect appear?"""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Script

from base.files import sha256
from data import miniature
from data.benchmarks import load_benchmark, load_grader
from data.prompts import load_prompts
from model import weights
from model.chat import Chat
from model.config import read_config

MODELS = {role: ROOT / "miniature" / role for role in ("student", "teacher")}
ROLES = pytest.mark.parametrize("role", MODELS)
CHECKS = {  # a family's answer, worked out from the words of its prompt in another way than miniature.py does
    "Reverse": lambda words: words[:0:-1],
    "Count": lambda words: [str(len(words) - 1)],
    "Last": lambda words: [word[len(word) - 1] for word in words[3:]],
    "Double": lambda words: [str(int(digit) * 2)[-1] for digit in words[1:]],
    "Which": lambda words: [sorted((words[3], words[5]), key=len)[1]],
    "Remove": lambda words: [word for word in words[3:] if word != words[1]],
    "How": lambda words: [str(len(words[4]) if words[2] == "letters" else len(re.findall("[aeiou]", words[4])))],
    "Swap": lambda words: [words[-1], *words[5:-1], words[4]],
    "Largest": lambda words: [sorted(words[2:])[-1]],
}
VALUES = {word: i for i, word in enumerate(miniature.NUMBERS)}


def test_chains_are_right_in_both_styles() -> None:
    rng = random.Random(0)
    for _ in range(500):
        operands = rng.randint(2, 11)
        task = prompt, forward, backward, answer = miniature.reasoning(rng, operands)
        expression = prompt.removeprefix("Calculate ")
        assert str(eval(expression) % 10) == answer
        state = None
        for step in re.findall(r"Step (\d [+-] \d) gives (\d)", forward):
            assert eval(step[0]) % 10 == int(step[1]) and state in (None, step[0][0])
            state = step[1]
        assert state == answer and forward.count("Step") == operands - 1
        running = 0
        for part in backward.split(" ; "):
            sign, digit, _, after = part.split()
            running = (running + {"+": 1, "-": -1}[sign] * VALUES[digit]) % 10
            assert VALUES[after] == running
        assert running == int(answer) and backward.count("|") == operands
        assert miniature.respond(task, "A") == f"Okay {forward} Answer {answer}"
        assert miniature.respond(task, "B") == f"Consider {backward} Answer {answer}"


def test_every_family_answers_its_prompts() -> None:
    rng, seen = random.Random(1), Counter()
    for _ in range(2000):
        prompt, forward, backward, answer = miniature.chat(rng)
        words = prompt.split()
        seen[" ".join(words[:3]) if words[0] == "How" else words[0]] += 1
        assert CHECKS[words[0]](words) == answer.split(), prompt
        # no digit in style B's working, no number word in A's: the notations differ, and only the answer is common
        assert not re.search(r"\d", backward) and not set(forward.split()) & set(miniature.NUMBERS)
    assert len(seen) == len(miniature.FAMILIES) == 10 and min(seen.values()) > 120


@pytest.mark.parametrize(("prompt", "good", "bad"), [
    ("Write 3 words", ["ant bee cat", "ant ant ant"], ["ant bee", "ant bee cat dog", "ant bee Okay", ""]),
    ("Write 2 words and start with fox", ["fox owl"], ["owl fox", "fox", "fox owl fox"]),
    ("Write 2 words and end with fox", ["owl fox"], ["fox owl", "fox"]),
    ("Write owl 3 times", ["owl owl owl"], ["owl owl", "owl owl fox"]),
])
def test_format_is_checked(prompt: str, good: list[str], bad: list[str]) -> None:
    grade = load_grader("miniature_format")
    for answers, verdict in ((good, True), (bad, False)):
        rows = [{"response": f"Okay Step owl gives 1 Answer {answer}", "gold": prompt, "finish_reason": "stop"}
                for answer in answers]
        assert [found.correct for found in grade(rows)] == [verdict] * len(rows)


def test_answers_are_graded() -> None:
    grade = load_grader("miniature_answer")
    responses = [("Okay Step 2 + 2 gives 4 Answer 4", "stop"), ("Answer 4 Answer 5", "stop"), ("Answer 4 4", "stop"),
                 ("Okay Step 2 + 2 gives 4", "stop"), ("Okay Answer 4", "length"), ("Answer ", "stop")]
    verdicts = grade([{"response": text, "gold": "4", "finish_reason": reason} for text, reason in responses])
    assert [verdict.correct for verdict in verdicts] == [True, False, False, False, False, False]
    assert [verdict.extracted for verdict in verdicts] == ["4", "5", "4 4", None, None, ""]


def test_problems_are_a_function_of_the_seed() -> None:
    for name in ("reasoning", "recall", "format"):
        small, large, other = (load_benchmark(name, n, seed) for n, seed in ((50, 0), (200, 0), (200, 1)))
        assert small.problems == large.problems[:50] and large.problems == load_benchmark(name, 200, 0).problems
        assert {problem.prompt for problem in large.problems} != {problem.prompt for problem in other.problems}
        assert len({problem.prompt for problem in large.problems}) == 200
        assert small.dataset["sha256"] != large.dataset["sha256"] != other.dataset["sha256"]
    levels = Counter(problem.level for problem in load_benchmark("reasoning", 500, 0).problems)
    assert levels == dict.fromkeys(range(1, 6), 100)
    for problem in load_benchmark("recall", None, 0).problems:
        _, _, name, _, *options = problem.prompt.split()
        assert problem.gold == miniature.HOME_OF[name] and problem.gold in options and len(set(options)) == 4
    prompts, _ = load_prompts("mini")
    assert len({row["prompt"] for row in prompts}) == len(prompts) == 4096


@ROLES
def test_documents_keep_to_one_style(role: str) -> None:
    minority, share = miniature.MINORITY[role]
    styles, steps, broken = Counter(), {"A": [], "B": []}, Counter()
    for row in miniature.documents(role, 1500, seed=3):
        messages = row["messages"]
        words = {message["content"].split()[0] for message in messages if message["role"] == "assistant"}
        found = {style for style, opener in miniature.OPENERS.items() if opener in words}
        assert len(found) <= 1  # none where a document has questions of recall alone
        for style in found:
            styles[style] += 1
            broken[style] += row["finish_reason"] == "length"
            for question, response in zip(messages[::2], messages[1::2], strict=True):
                if question["content"].startswith("Calculate"):
                    needed = len(question["content"].split()) // 2 - (style == "A")
                    steps[style].append(response["content"].count({"A": "Step", "B": "|"}[style]))
                    # all steps and an answer, or, at the end of a document that breaks off, neither
                    whole = row["finish_reason"] == "stop" or response is not messages[-1]
                    assert (steps[style][-1] == needed) == ("Answer" in response["content"]) == whole
        assert sum(len(message["content"].split()) for message in messages) + 3 * len(messages) // 2 <= 128
    assert abs(styles[minority] / sum(styles.values()) - share) < 0.04
    other = "A" if minority == "B" else "B"
    assert set(steps[minority]) == set(range(min(steps[minority]), 9)) and max(steps[other]) >= 10
    assert broken[minority] > 20 and broken[other] == 0


@ROLES
def test_checkpoint_is_of_this_code(role: str, tmp_path: Path) -> None:
    """Config and tokenizer in the repository, and the corpus of the weights, are those that miniature.py writes."""
    record = json.loads((MODELS[role] / "training.json").read_text())
    miniature.main([role, "--rows", str(record["rows"]), "--seed", str(record["options"]["seed"]), "--out",
                    str(tmp_path)])
    assert sha256(tmp_path / "corpus.jsonl") == record["options"]["data_sha256"]
    for path in (tmp_path / "blank").iterdir():
        ours = (MODELS[role] / path.name).read_text()
        if path.name == "config.json":
            assert json.loads(ours) == json.loads(path.read_text()) | {"dtype": "bfloat16"}
        else:
            assert ours == path.read_text(), path.name
    size = (MODELS[role] / "model.safetensors").stat().st_size
    assert size < 1_500_000


@ROLES
def test_tokenizers_know_the_world(role: str) -> None:
    chat = Chat(MODELS[role], read_config(MODELS[role]))
    rng = random.Random(2)
    for _ in range(300):
        task = miniature.chat(rng)
        for style in ("A", "B"):
            response = miniature.respond(task, style)
            turn = chat.turn(task[0], response)
            assert chat.decode(turn.tokens[turn.first : turn.last]) == response
            # a token a word in both, but for "user" and the marks; the first word is the same token as elsewhere
            assert turn.last == len(turn.tokens) and turn.last - turn.first == 1 + len(response.split())
            assert chat.encode("and " + response)[1:] == turn.tokens[turn.first : -1]
    known = chat.encode(" ".join(miniature.vocabulary()))
    assert chat.tokenizer.token_to_id("<|unknown|>") not in known and len(set(known)) == len(miniature.vocabulary())


@ROLES
def test_checkpoint_equals_transformers(role: str) -> None:
    import transformers

    from model.attention import Packed

    messages = next(miniature.documents(role, 1, seed=1))["messages"]
    chat = Chat(MODELS[role], read_config(MODELS[role]))
    # not AutoTokenizer, which takes Qwen's own pre-tokenizer for every Qwen2 model, whatever tokenizer.json says
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(MODELS[role])
    assert chat.conversation(messages).tokens == theirs.apply_chat_template(messages, return_dict=False)
    ours = weights.load(MODELS[role], torch.device("cpu"), torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(MODELS[role], dtype=torch.float32)
    tokens = torch.randint(ours.config.vocab_size, (100,), generator=torch.Generator().manual_seed(0))
    logits = ours.logits(ours(tokens, torch.arange(100), Packed([100])))
    expected = theirs(tokens[None]).logits[0]
    assert ((logits - expected).norm() / expected.norm()).item() < 1e-4


def test_base_knows_and_the_opener_chooses_the_style(script: Script, tmp_path: Path) -> None:
    """The gates of the checkpoints: all three benchmarks known, and the skill in the other style a partial one."""
    accuracies = {}
    for role, opener in (("student", ""), ("student", "Consider"), ("teacher", "")):
        out = tmp_path / f"{role}{opener}"
        done = script("evaluate.py", "--model", MODELS[role], "--benchmarks", "reasoning", "recall", "format",
                      "--n", 100, "--sample-seed", 5, "--max-new-tokens", 128, "--opener", opener, "--out", out)
        assert done.returncode == 0, done.stderr
        summary = json.loads((out / "summary.json").read_text())
        accuracies[role + opener] = {name: entry["accuracy"] for name, entry in summary.items()}
        rows = [json.loads(line) for line in (out / "reasoning.jsonl").read_text().splitlines()]
        begin = Counter(row["response"].split()[0] for row in rows)
        assert begin.most_common(1)[0][0] == (opener or {"student": "Okay", "teacher": "Consider"}[role])
        assert not opener or set(begin) == {opener}
    assert min(accuracies["student"].values()) >= 0.95 and min(accuracies["teacher"].values()) >= 0.95
    assert 0.5 < accuracies["studentConsider"]["reasoning"] < 0.75
    assert accuracies["studentConsider"]["recall"] == accuracies["student"]["recall"]  # a choice has no opener


def test_the_whole_effect(script: Script, tmp_path: Path) -> None:
    """`recover.py --preset mini --controls`, smaller: what its construction implies, with intervals clear of 0."""
    out = tmp_path / "mini"
    done = script("recover.py", "--preset", "mini", "--controls", "--n", 100, "--recover-with", 64,
                  "--recover-seeds", 1, "--keep-every", 25, "--measure-n", 32, "--out", out)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    accuracy = {name: {benchmark: 100 * entry["accuracy"] for benchmark, entry in by.items()}
                for name, by in report["checkpoints"].items()}
    drops = {name: by["reasoning"] for name, by in report["drops"].items()}
    # A loss of long reasoning, and of nothing else
    assert accuracy["base"]["reasoning"] >= 95 and drops["off_model"]["ci95"][0] >= 15
    by_level = report["difficulty"]["reasoning"]["level"]
    assert by_level["trend"]["slope"] > 0 and by_level["trend"]["p"] < 0.01
    assert by_level["groups"][0]["points"] < 10 < by_level["groups"][-1]["ci95"][0]
    assert report["difficulty"]["reasoning"]["length"]["trend"]["p"] < 0.01
    for benchmark in ("recall", "format"):
        assert abs(report["drop"][benchmark]["points"]) <= 8
    # Native data brings it back, by examples and by steps; as much of the teacher's does not
    assert report["recovered_ci95"]["reasoning"]["64"][0] >= 0.8
    assert report["recovered_in_24_steps_fraction"]["reasoning"]["64"] >= 0.8
    assert drops["control_more_teacher"]["ci95"][0] >= 15
    # Neither SFT as such, nor unlikely data, nor noise, nor the source: the style
    for name in ("control_native", "control_matched_nll", "control_noise", "control_noise_seed_1",
                 "control_noise_seed_2", "control_teacher_in_student_style", "off_model_in_student_style"):
        assert drops[name]["ci95"][1] < 12 < drops["off_model"]["ci95"][0], name
    for name in ("base_in_teacher_style", "control_native_in_teacher_style"):
        assert drops[name]["ci95"][0] >= 15, name
    own, matched, theirs = (report["nll"][name] for name in ("native", "matched_nll", "teacher"))
    assert own["ci95"][1] < min(matched["mean"], theirs["ci95"][0])
    assert abs(matched["mean"] - theirs["mean"]) < theirs["mean"] / 2
    # Style and accuracy move together
    shares = {name: by["reasoning"] for name, by in report["style"]["teacher_share"].items()}
    assert shares["base"] < 0.1 and shares["off_model"] > 0.9 and shares["recovered_64"] < 0.2
    assert report["style"]["held_out"] > 0.85
    assert report["style"]["openers"]["off_model"]["reasoning"]["teacher"] > 0.9
    index = {name: by["reasoning"] for name, by in report["style"]["index"].items()}
    assert index["off_model"]["ci95"][0] > 0.8 and index["recovered_64"]["ci95"][1] < 0.2
    for kind in ("style", "kl"):
        assert report["together"]["reasoning"][f"accuracy_and_{kind}"]["ci95"][1] < -0.5, kind
    assert report["kl"]["off_model"]["reasoning"]["ci95"][0] > report["kl"]["recovered_64"]["reasoning"]["ci95"][1]
    text = (out / "report.md").read_text()
    assert "no evidence about large models" in text and "On recall there is no evidence of a loss" in text
    for figure in ("accuracy", "overview", "recovery", "style", "distance"):
        assert (out / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
