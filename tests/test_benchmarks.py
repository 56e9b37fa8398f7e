"""Graders, samples of problems, statistics."""

import resource
import time
from pathlib import Path

import pytest
from conftest import QWEN, SMOLLM2

from analysis.statistics import summarise
from base.errors import UserError
from base.grading import MEMORY, judge
from data.benchmarks import ifeval, load_benchmark, mathematics, mmlu
from data.benchmarks.problem import Problem, sample


def test_boxed_answers() -> None:
    cases = {
        r"so \boxed{42}.": "42", r"\boxed{1} then \boxed{ \frac{1}{2} }": r"\frac{1}{2}", "no answer": None,
        r"\boxed{\text{a \} b}}": r"\text{a \} b}", r"\boxed{1} and \boxed{2": "1", r"\fbox{7}": "7",
        r"\boxed{\left\{1,2\right\}}": r"\left\{1,2\right\}", r"\boxed{}": "", r"\boxed 5": None,
        r"\\boxed{3}": "3", r"\boxed{1 \boxed{2}}": "2", r"\boxed{1} {\boxed{2}": "2",
        r"} \boxed{\\{5}}": r"\\{5}",
    }
    for text, answer in cases.items():
        assert mathematics.extract_boxed(text) == answer


def test_extraction_is_quick_on_hostile_text() -> None:
    start = time.perf_counter()
    for text in (r"\boxed{" * 20_000, "{" * 200_000, r"\boxed{" + "{" * 200_000, "\\" * 200_000,
                 r"\boxed{1}" + r"\boxed{" * 90_000):
        mathematics.extract_boxed(text)
    assert time.perf_counter() - start < 60  # quadratic it would be hours; this is no timing of speed


def test_equal_answers() -> None:
    pairs = {
        ("1/2", "0.5"): True, (r"\frac{1}{2}", r"\dfrac12"): True, ("x+1", "1+x"): True, ("2", "3"): False,
        (r"(3, \frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"): True, ("1,-2", "-2, 1"): True,
        (r"\text{Evelyn}", "Evelyn"): True, ("10", r"10^\circ"): True, ("p - q", "q - p"): False,
        ("1,000", "1000"): True, ("5", ""): False,
    }
    assert dict(zip(pairs, judge(mathematics.__name__, list(pairs)), strict=True)) == pairs


HOSTILE = [  # each is wrong, whatever the reference
    r"\boxed{9^{9^{9^9}}}", r"\boxed{10**10**10}", r"\boxed{(10^{10^{10}})!}", r"\boxed{100000000!}",
    r"\boxed{((9!)!)!}",
    "\\boxed{" + "\\frac{" * 2000 + "1" + "}{2}" * 2000 + "}", "\\boxed{" + "\\frac{" * 150 + "1" + "}{2}" * 150 + "}",
    "\\boxed{" + "\\begin{pmatrix}" * 2000 + "1" + "\\end{pmatrix}" * 2000 + "}",
    "\\boxed{" + "\\begin{pmatrix}" * 15 + "1" + "\\end{pmatrix}" * 15 + "}", "\\boxed{" + "9" * 200_000 + "}",
    "\\boxed{" + "9" * 1900 + "}", "\\boxed{" + "{" * 100_000, "\\boxed{{{{}", "\\boxed{" + "(" * 1500 + "}",
    "\\boxed{\x00}", "\\boxed{\ud800}", "\\boxed{7\x00\ud800}", "a" * 100_000, "\\boxed{" + "a" * 1500 + "}",
    "\\boxed{__import__('os').system('true')}", r"\boxed{\sqrt{\sqrt{\sqrt{2^{2^{2^{2^{2^{2}}}}}}}}}",
    r"\boxed{\int_0^1 e^{e^{e^{x^{x}}}} dx}", r"\boxed{\sum_{n=1}^{10^{100}} n!}", r"\boxed{(x+y+z)^{100000}}",
    "\\boxed{}",
]


def test_hostile_responses_are_wrong_and_nothing_hangs() -> None:
    """100 of them, with references by turns, so that none is answered from memory; no process above its limit."""
    golds = ["7", r"\frac{1}{2}", "x^2+1", "(1, 2)"]
    rows = [{"response": response, "gold": gold} for gold in golds for response in HOSTILE]
    assert len(rows) == 100
    verdicts = mathematics.grade([*rows, {"response": r"\boxed{7.0}", "gold": "7"}])
    assert not any(verdict.correct for verdict in verdicts[:-1])
    assert 4 <= sum(verdict.note == "grader timed out" for verdict in verdicts) < 60
    assert verdicts[-1].correct  # and the graders still work
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 <= MEMORY


def test_a_worker_that_was_filled_up_does_not_fail_the_next_answer() -> None:
    """sympy keeps what it has seen: without replacing workers, the last pair came out as not equal."""
    greedy = [("7", f"2^{{10^{{{n}}}}}") for n in (7, 8, 9)] + [("7", r"(10^{5})!")] * 2
    pairs = [*greedy, ("(x+1)^{12}", "(x^2+2x+1)^6"), ("0.5", r"\frac{1}{2}")]
    assert judge(mathematics.__name__, pairs, workers=1)[-2:] == [True, True]


def test_a_mistake_of_ours_is_no_verdict() -> None:
    """A check that raises, and a module that can't be imported, end the evaluation; they make no response wrong."""
    for module, item in ((ifeval.__name__, ('[["punctuation:no_such", {}]]', "a")), ("no_such_module", ("a",))):
        with pytest.raises(AssertionError, match="a grading process ended"):
            judge(module, [item, item])


def test_units_and_tolerances() -> None:
    rows = [({"gold": "$166$", "unit": "$cm^2$"},
             [r"166\ cm^2", r"166 \text{ cm}^2", "166", r"166\,\mathrm{cm^2}", "166 cm^{2}", r"166~\mathrm{cm}^{2}"],
             ["165 cm^2", "166 cm^3"]),
            ({"gold": r"\frac{600}{7}", "unit": "km/h"}, [r"600/7\text{ km/h}", r"\frac{600}{7} km/h"], ["85.7 km/h"]),
            ({"gold": "8", "unit": "min"}, [r"8\text{ min}", "8"], ["8.1"]),
            ({"gold": "4.2", "unit": "%", "tolerance": "1e-1"}, ["4.25", r"4.1\%", "4.25%", "4.3"], ["4.4", "4", "x"])]
    for row, good, bad in rows:
        verdicts = mathematics.grade([row | {"response": f"\\boxed{{{answer}}}"} for answer in (*good, *bad)])
        assert [verdict.correct for verdict in verdicts] == [True] * len(good) + [False] * len(bad), row


def test_grading_rows() -> None:
    rows = [{"response": r"\boxed{0.5}", "gold": r"\frac12"}, {"response": "I think 3", "gold": "3"},
            {"response": r"\boxed{4}", "gold": "3"}]
    verdicts = mathematics.grade(rows)
    assert [(one.correct, one.extracted) for one in verdicts] == [(True, "0.5"), (False, None), (False, "4")]
    letters = mmlu.grade([{"response": "A", "gold": "A"}, {"response": "B", "gold": "A"}])
    assert [one.correct for one in letters] == [True, False]


def test_samples_are_seeded_stratified_and_nested() -> None:
    problems = [Problem(str(i), "", "", stratum="abc"[min(i % 10 // 4, 2)]) for i in range(200)]  # 40 %, 40 %, 20 %
    chosen = sample(problems, 50, seed=0)
    assert chosen == sample(list(problems), 50, seed=0) != sample(problems, 50, seed=1)
    assert [sum(problem.stratum == name for problem in chosen) for name in "abc"] == [20, 20, 10]
    assert [int(problem.id) for problem in chosen] == sorted(int(problem.id) for problem in chosen)
    assert set(chosen) < set(sample(problems, 100, seed=0))
    assert len(sample(problems, 7, seed=0)) == 7
    assert sample(problems, 500, seed=0) == tuple(problems) == sample(problems, None, seed=0)


def test_a_file_as_a_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text('{"id": "a", "problem": "1+1?", "answer": "2", "level": 3}\n'
                    '{"id": "b", "problem": "?", "answer": "x"}')
    benchmark = load_benchmark(str(path), None, 0)
    assert (benchmark.name, benchmark.problems[0].gold, benchmark.problems[0].level) == ("my", "2", 3)
    assert benchmark.problems[0].prompt.startswith("1+1?")
    path.write_text('{"id": "a", "problem": "1+1?"}')
    with pytest.raises(UserError, match="line 1: the field answer is missing"):
        load_benchmark(str(path), None, 0)
    for name in ("gsm8k", str(tmp_path / "mmlu.jsonl")):
        with pytest.raises(UserError, match="--benchmarks"):
            load_benchmark(name, None, 0)


def test_summary() -> None:
    def row(correct: bool, extracted: str | None, reason: str, level: int | None) -> dict:
        return {"correct": correct, "extracted": extracted, "finish_reason": reason, "level": level}

    rows = [row(True, "1", "stop", 2), row(False, None, "length", 2), row(False, "3", "stop", 10),
            row(False, None, "stop", 1)]
    found = summarise(rows)
    assert (found["n"], found["correct"], found["accuracy"]) == (4, 1, 0.25)
    assert (found["unparsed"], found["truncated"]) == (2, 1)
    assert list(found["by_level"].items()) == [("1", {"n": 1, "correct": 0}), ("2", {"n": 2, "correct": 1}),
                                               ("10", {"n": 1, "correct": 0})]


@pytest.mark.real
def test_reference_solutions_of_math500_are_graded_correct() -> None:
    """The published solutions end in \\boxed{answer}: the extraction finds it, and it equals itself."""
    from data.hub import read_dataset

    rows, _ = read_dataset("HuggingFaceH4/MATH-500", "test.jsonl", columns={"solution": str, "answer": str})
    verdicts = mathematics.grade([{"response": row["solution"], "gold": row["answer"]} for row in rows])
    wrong = [row["unique_id"] for row, verdict in zip(rows, verdicts, strict=True) if not verdict.correct]
    assert wrong == []


@pytest.mark.real
@pytest.mark.parametrize("name", ["math500", "olympiads"])
def test_references_are_graded_correct_and_other_problems_answers_are_not(name: str) -> None:
    """Each reference in another form equals itself; the reference of another problem is right only if it is equal."""
    problems = load_benchmark(name, None, 0).problems
    # asked directly, since `grade` does not ask about an answer that is the reference word for word
    same = judge(mathematics.__name__, [(problem.gold, problem.gold) for problem in problems])
    assert [problem.id for problem, equal in zip(problems, same, strict=True) if not equal] == []
    others = [problems[(i + 7) % len(problems)].gold for i in range(len(problems))]
    rows = [{"response": f"\\boxed{{{other}}}", "gold": problem.gold, **problem.fields}
            for problem, other in zip(problems, others, strict=True)]
    found = {(row["gold"], verdict.extracted) for row, verdict in zip(rows, mathematics.grade(rows), strict=True)
             if verdict.correct and verdict.extracted != row["gold"]}
    assert found == set()  # no two of these are equal without being the same text


@pytest.mark.real
def test_samples_of_the_real_benchmarks() -> None:
    found = load_benchmark("mmlu", 114, 0)
    assert len(found.problems) == 114 and len({problem.stratum for problem in found.problems}) > 50
    assert len(load_benchmark("mmlu", None, 0).problems) == 14_042
    found = load_benchmark("math500", 200, 0)
    assert [sum(problem.level == level for problem in found.problems) for level in range(1, 6)] == [17, 36, 42, 51, 54]
    assert found.dataset["revision"] and len(found.dataset["sha256"]) == 64


@pytest.mark.real
@pytest.mark.parametrize("n", [16, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [SMOLLM2, QWEN])
def test_mmlu_choices_equal_transformers(name: str, n: int) -> None:
    """The letter picked by one packed prefill is the argmax that transformers computes, question by question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from base.hub import model_folder
    from model import weights
    from model.chat import Chat
    from model.sampler import Sampler

    ours = weights.load(model_folder(name), torch.device("cpu"), torch.float32)
    chat = Chat(model_folder(name), ours.config)
    theirs = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    problems = load_benchmark("mmlu", n, 0).problems
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in mmlu.LETTERS]
    prompts = [chat.prompt(problem.prompt) for problem in problems]
    sampler = Sampler(ours, chat.stop_ids, max_new_tokens=1)
    numbered = [(problem.id, prompt) for problem, prompt in zip(problems, prompts, strict=True)]
    scores = {id: row for ids, rows in sampler.score(numbered, letters) for id, row in zip(ids, rows, strict=True)}
    for problem in problems:
        found = scores[problem.id]
        turns = [chat.turn(problem.prompt, letter) for letter in mmlu.LETTERS]
        assert [turn.tokens[turn.first] for turn in turns] == letters
        ids = tokenizer.apply_chat_template([{"role": "user", "content": problem.prompt}], add_generation_prompt=True,
                                            return_dict=False)
        with torch.inference_mode():
            logits = theirs(torch.tensor([ids])).logits[0, -1]
        assert torch.allclose(found, logits.log_softmax(-1)[letters], atol=1e-3)
        assert found.argmax() == logits[letters].argmax()
