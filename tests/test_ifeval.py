"""IFEval: a passing, a failing and an edge response of each type; agreement with the authors' code."""

import json
import os
import random
import sys
from pathlib import Path

import pytest

from analysis.statistics import summarise
from data.benchmarks import ifeval, load_benchmark
from data.hub import read_dataset
from data.prompts import ALPACA
from data.rows import read_rows

AT_LEAST, LESS = "at least", "less than"
# type, arguments, responses that follow, responses that don't
CASES = [
    ("keywords:existence", {"keywords": ["cat", "dog"]}, ["Concatenate DOGS"], ["a cat", ""]),
    ("keywords:frequency", {"keyword": "it", "frequency": 2, "relation": AT_LEAST}, ["It is with me"], ["it"]),
    ("keywords:frequency", {"keyword": "it ", "frequency": 2, "relation": LESS}, ["it", "no"], ["it, it"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, ["concatenate", "cats"], ["A Cat.", "cat-like"]),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 2, "let_relation": AT_LEAST}, ["Ee"], ["e"]),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": LESS}, ["!"], ["!!"]),
    ("language:response_language", {"language": "de"}, ["Das ist ein schöner Tag, und wir gehen in den Wald.", "1"],
     ["This is a fine day, and all of us will go to the woods."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": AT_LEAST},
     ["Mr. Smith came. He left."], ["Mr. Smith came at 3 p.m. sharp."]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a *** b", "***\na\n***\nb\n***", "a***b"],
     ["a", "a *** *** b", "a\n\nb"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, ["one two", "..."], ["it's me"]),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Yes"},
     ["a\n\nyes, b", "a\n\n'\"YES\" b\n\n"], ["yes\n\nno", "yes", "a\n\n\n\nyes"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b]", "[a][]"], ["[a", "[a\n] [b]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["x\nP. S. y", "p.s."], ["PS y", "P.S"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S", "p. p. s"], ["P.S."]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n- b", "  * a\n\n* b\ntext"],
     ["* a", "** a\n* b", "* a\n* b\n---"]),
    ("detectable_format:constrained_response", {}, ["Well: My answer is maybe."],
     ["My answer is yes", "my answer is no."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* *b*", "**a** *b*"],
     ["*a*", "**a**", "** ** *a\nb*"]),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}, ["Day 1 a\nDay2 b"],
     ["Day 1", "DAY 1 DAY 2", "Day one Day two"]),
    ("detectable_format:json_format", {}, ['{"a": 1}', "```json\n[1]\n```", "3"],
     ["{a: 1}", "Here: {}", "[" * 100_000]),
    ("detectable_format:title", {}, ["<<a>>", "x <<< b >>"], ["<a>", "<<\n>>", "<< >>"]),
    ("combination:two_responses", {}, ["a******b", "******a******b"], ["a", "a******a", "a************b", "a***b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Do it. "}, [" do IT. Done"], ["I do it.", "Do"]),
    ("startend:end_checker", {"end_phrase": " The End"}, ["x the end", '"... the END" '], ["the end.", "the end?"]),
    ("startend:quotation", {}, ['"a"', ' "a" b "c"\n'], ['"a', '"', "'a'"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": AT_LEAST},
     ["THE END", "I am X-RAY"], ["The END", "U.S."]),
    ("change_case:english_capital", {}, ["THIS IS A FINE DAY FOR ALL OF US"], ["This IS A FINE DAY FOR ALL OF US"]),
    ("change_case:english_lowercase", {}, ["this is a fine day for all of us"],
     ["This is a fine day for all of us", "das ist ein schöner tag für uns alle"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b", " "]),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES)
def test_each_type(name: str, arguments: dict, good: list[str], bad: list[str]) -> None:
    for response in good:
        assert ifeval.follows(name, response, **arguments), response
    for response in bad:
        assert not ifeval.follows(name, response, **arguments), response


def test_all_types_are_tried() -> None:
    assert {case[0] for case in CASES} == set(ifeval.CHECKS) and len(ifeval.CHECKS) == 25


def test_strict_and_loose() -> None:
    gold = json.dumps([("punctuation:no_comma", {}), ("startend:end_checker", {"end_phrase": "bye"})])
    rows = [{"gold": gold, "response": response} for response in ("a bye", "Sure, here:\na bye", "a, *bye*", "")]
    verdicts = ifeval.grade(rows)
    assert [verdict.correct for verdict in verdicts] == [True, False, False, False]
    neither, second, both = [False, False], [False, True], [True, True]
    assert [verdict.fields["strict"] for verdict in verdicts] == [both, second, neither, neither]
    assert [verdict.fields["loose"] for verdict in verdicts] == [both, both, second, neither]
    assert verdicts[1].extracted == "startend:end_checker"


def test_a_response_that_keeps_a_check_busy_is_wrong() -> None:
    gold = json.dumps([("detectable_content:number_placeholders", {"num_placeholders": 1})])
    verdicts = ifeval.grade([{"gold": gold, "response": "[" * 200_000}, {"gold": gold, "response": "[a]"}])
    assert [(verdict.correct, verdict.note) for verdict in verdicts] == [(False, "grader timed out"), (True, None)]
    assert verdicts[0].fields == {"strict": [False], "loose": [False]}


@pytest.mark.real
def test_the_data_set() -> None:
    problems = load_benchmark("ifeval", None, 0).problems
    instructions = [pair for problem in problems for pair in json.loads(problem.gold)]
    assert len(problems) == 541 and len(instructions) == 834
    assert {name for name, _ in instructions} == set(ifeval.CHECKS)
    assert problems[0].id == "1000"
    for name, arguments in instructions:  # the arguments are those that the checks take
        ifeval.follows(name, "A word. Another, and *more*.", **arguments)


@pytest.mark.real
@pytest.mark.peers
def test_verdicts_equal_the_authors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every strict and loose verdict on every instruction, against the authors' code as lm-eval ships it.

    On texts at hand (the prompts themselves, Alpaca's answers, one after the other, whole and with lines added), and on
    the responses in the evaluation folders that OFFMODEL_EVALS names, separated by colons.
    """
    pytest.importorskip("lm_eval")
    _hand_nltk_the_english_model(tmp_path, monkeypatch)
    import langdetect
    from lm_eval.tasks.ifeval import utils

    langdetect.DetectorFactory.seed = 0
    rows, _ = read_dataset("google/IFEval", "ifeval_input_data.jsonl", columns={"key": int})
    by_key = {str(row["key"]): row for row in rows}
    rng = random.Random(0)
    answers = [text for text in _alpaca_answers() if len(text) > 40]
    responses = []
    for key, row in by_key.items():
        pieces = rng.sample(answers, 3)
        responses += [(key, text) for text in (
            row["prompt"], pieces[0], "\n\n".join(pieces), "Sure!\n" + pieces[1] + "\nP.S. *Anything* else?",
            "\n***\n".join(pieces[:2]), f'"{pieces[2].upper()}"', pieces[1].lower().replace(",", ""),
            "\n".join(f"* {line}" for line in pieces[0].split(". ")),
            f"<<Title>>\n```json\n{json.dumps(pieces[0])}\n```")]
    for folder in filter(None, os.environ.get("OFFMODEL_EVALS", "").split(":")):
        responses += [(row["id"], row["response"]) for row in read_rows(Path(folder) / "ifeval.jsonl")]
    gold = {problem.id: problem.gold for problem in load_benchmark("ifeval", None, 0).problems}
    verdicts = ifeval.grade([{"gold": gold[key], "response": response} for key, response in responses])
    counts = {"strict": [0, 0], "loose": [0, 0]}
    for (key, response), verdict in zip(responses, verdicts, strict=True):
        row = by_key[key]
        example = utils.InputExample(row["key"], row["instruction_id_list"], row["prompt"], row["kwargs"])
        for kind, judge in (("strict", utils.test_instruction_following_strict),
                            ("loose", utils.test_instruction_following_loose)):
            theirs = judge(example, response).follow_instruction_list
            # asked for "#" and "!", the authors' code counts a letter drawn at random instead
            judged = [i for i, given in enumerate(row["kwargs"]) if given.get("letter") not in ("#", "!")]
            ours, theirs = ([verdicts[i] for i in judged] for verdicts in (verdict.fields[kind], theirs))
            assert ours == theirs, (key, kind, row["instruction_id_list"], response)
            counts[kind][0] += sum(theirs)
            counts[kind][1] += len(theirs)
    print(f"\n{len(responses)} responses, the same verdicts: {counts}", file=sys.stderr)
    for right, all_of_them in counts.values():
        assert 0.1 < right / all_of_them < 0.9  # both verdicts occur


def _alpaca_answers() -> list[str]:
    rows, _ = read_dataset(*ALPACA, columns={"output": str})
    return [row["output"] for row in rows[:5000]]


def _hand_nltk_the_english_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NLTK would download its sentence model; the punkt package has the same one."""
    import nltk
    import punkt
    from nltk.tokenize.punkt import save_punkt_params

    place = folder / "tokenizers" / "punkt_tab" / "english"
    place.mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(folder)])
    save_punkt_params(punkt.load_model("english"), dir=str(place))


def test_summary_has_four_accuracies() -> None:
    row = {"id": "a", "level": None, "extracted": "", "finish_reason": "stop"}
    found = summarise([row | {"correct": True, "strict": [True, True], "loose": [True, True]},
                       row | {"correct": False, "strict": [False], "loose": [True]},
                       row | {"correct": False, "strict": [False, True, False], "loose": [False, True, False]}])
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["instructions"] == pytest.approx({"prompt_strict": 1 / 3, "instruction_strict": 3 / 6,
                                                   "prompt_loose": 2 / 3, "instruction_loose": 4 / 6})
