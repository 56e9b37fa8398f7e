"""Our own parsers on whatever hypothesis thinks of; `EXAMPLES=100000 pytest tests/test_fuzz.py` looks for longer."""

import json
import os
import re
from inspect import signature
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from analysis.report import fence, plain
from base.errors import UserError
from base.files import misfit, parse_object
from data.benchmarks import ifeval, mathematics, miniature
from data.packing import Example, group, micro_batches, pack, plan_steps
from data.rows import ANSWERED, GRADED, MEASURED, GrowingRows, format_row, read_rows, write_rows

EXAMPLES = os.environ.get("EXAMPLES")
fuzz = settings(max_examples=int(EXAMPLES or 50), derandomize=not EXAMPLES, database=None, deadline=None,
                suppress_health_check=list(HealthCheck))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)
words = st.text(alphabet="ab A.,*-\n\t'\"[]<>{}#`1!?é\u2028\x1cß", max_size=60)
texts = words | st.text(max_size=40)


# --- Rows -------------------------------------------------------------------------------------------------------------


@fuzz
@given(st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=3), min_size=1, max_size=4))
@example([{"a": "\u2028\x85\x0b\x0c\x1c\r"}])
@example([{"a": "\ud800"}])
def test_rows_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [row | {"id": str(i)} for i, row in enumerate(rows)]
    try:
        write_rows(path, rows)
    except UserError:  # a lone surrogate, which no row that was read has
        assert re.search(r"[\ud800-\udfff]", repr(rows)) or "\\ud" in repr(rows)
        return
    assert repr(read_rows(path)) == repr(rows)  # NaN is not equal to itself


@fuzz
@given(st.binary(max_size=60) | st.lists(json_values.map(json.dumps), max_size=3).map("\n".join).map(str.encode))
@example(b'{"id": 1}\n{"id": "1"}')
@example(b'{"id": 1e999}')
@example(b"\xef\xbb\xbf{}")
def test_any_bytes_are_rows_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    for name in (path, path.with_name("rows.partial.jsonl")):
        name.write_bytes(data)
    for shape in ({}, ANSWERED, GRADED, MEASURED):
        try:
            rows = read_rows(path, shape)
        except UserError as error:
            assert str(path) in str(error)
        else:
            assert len({row["id"] for row in rows}) == len(rows) > 0
            assert all(set(shape) <= set(row) | {key for key in shape if misfit(None, shape[key]) is None}
                       for row in rows)
        try:
            with GrowingRows(path, shape) as growing:
                assert all(isinstance(key, str) for key in growing.rows)
        except UserError as error:
            assert growing_name(path) in str(error)


def growing_name(path: Path) -> str:
    return str(path.with_name(f"{path.stem}.partial.jsonl"))


@fuzz
@given(st.dictionaries(st.text(max_size=3), json_values, max_size=4))
def test_a_value_has_the_shape_that_it_has(value: dict) -> None:
    def shape_of(part: object) -> object:
        if isinstance(part, dict):
            return {key: shape_of(one) for key, one in part.items()}
        if isinstance(part, list):
            return [shape_of(one) for one in part] if len(part) != 1 else [shape_of(part[0])]
        return type(part)

    try:
        value = parse_object(format_row(value), "here")
    except UserError:
        return
    odd = re.search(r"\bnan\b|\binf\b|\d{19}|e\+", repr(value))
    assert misfit(value, shape_of(value)) is None or odd
    assert misfit(value, {**shape_of(value), "missing one": str}) or "missing one" in value


# --- IFEval -----------------------------------------------------------------------------------------------------------

ARGUMENTS = {int: st.integers(0, 5), str: st.sampled_from(["a", "A b", "at least", "en", "P.S.", "é", "x*", " "])}


@st.composite
def instructions(draw: st.DrawFn) -> list:
    """One or two instructions of any type, with arguments as the data set has them."""
    chosen = []
    for name in draw(st.lists(st.sampled_from(sorted(ifeval.CHECKS)), min_size=1, max_size=2)):
        arguments = {}
        for key, parameter in list(signature(ifeval.CHECKS[name]).parameters.items())[1:]:
            kind = parameter.annotation
            arguments[key] = draw(st.sampled_from(ifeval.RELATIONS) if "relation" in key else
                                  ARGUMENTS.get(kind, st.lists(ARGUMENTS[str], max_size=2)))
        chosen.append([name, arguments])
    return chosen


@fuzz
@given(instructions(), texts)
@example([["length_constraints:nth_paragraph_first_word",
           {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "a"}]], "'\n\n\x1c")
def test_every_instruction_has_a_verdict(asked: list, response: str) -> None:
    gold = json.dumps(asked)
    assert ifeval.read_gold("x", gold) == asked
    strict, loose = ifeval.check(gold, response)
    assert len(strict) == len(loose) == len(asked)
    assert all(isinstance(verdict, bool) for verdict in (*strict, *loose))
    assert all(also for one, also in zip(strict, loose, strict=True) if one)  # what is strictly right is loosely right


@fuzz
@given(st.lists(st.tuples(st.sampled_from([*ifeval.CHECKS, "none"]), json_values), max_size=2).map(json.dumps)
       | instructions().map(json.dumps).flatmap(lambda gold: st.integers(0, len(gold)).map(lambda i: gold[:i])) | texts)
@example('[["keywords:frequency", {"keyword": "(", "frequency": 1, "relation": "at least"}]]')
@example('[["length_constraints:number_words", {"num_words": 1, "relation": "more than"}]]')
@example('[["punctuation:no_comma", {"more": 1}]]')
@example('[["punctuation:no_comma", null]]')
def test_any_text_is_a_gold_or_refused(gold: str) -> None:
    try:
        asked = ifeval.read_gold("x", gold)
    except UserError:
        return
    strict, _ = ifeval.check(gold, "a text")
    assert len(strict) == len(asked)


# --- Answers ----------------------------------------------------------------------------------------------------------

boxes = st.lists(st.sampled_from(["\\boxed{", "\\fbox{", "{", "}", "\\", "\\\\", "\\{", "\\}", "a", " ", "\n"]),
                 max_size=14).map("".join)
balanced = st.recursive(st.sampled_from(["a", "1", " ", "\\frac", "\\{", "\\}", "\n"]),
                        lambda inner: st.lists(inner, max_size=3).map("".join) | inner.map("{{{}}}".format))


def boxed_slowly(text: str) -> str | None:
    """`extract_boxed` from its definition: of all boxes whose braces close, the one that begins last."""
    tokens = list(re.finditer(r"\\{1,2}(?:boxed|fbox)\{|\\.|[{}]", text, re.DOTALL))
    for i in reversed(range(len(tokens))):
        if tokens[i][0].endswith(("boxed{", "fbox{")):
            depth = 1
            for token in tokens[i + 1 :]:
                depth += (token[0] != "\\{" and token[0].endswith("{")) - (token[0] == "}")
                if depth == 0:
                    return text[tokens[i].end() : token.start()].strip()
    return None


@fuzz
@given(boxes)
@example("\\boxed{1} {\\boxed{2}")
@example("} \\boxed{\\\\{5}}")
def test_boxes_are_found_as_defined(text: str) -> None:
    assert mathematics.extract_boxed(text) == boxed_slowly(text)


@fuzz
@given(boxes, balanced)
@example("\\", "a")
@example("\\boxed{", "{\\}}")
def test_the_last_box_is_the_answer(before: str, answer: str) -> None:
    assume(not (len(before) - len(before.rstrip("\\"))) % 2)  # "\" before "\boxed" makes a line break of it
    assert mathematics.extract_boxed(f"{before}\\boxed{{{answer}}}") == answer.strip()


@fuzz
@given(texts | boxes, st.sampled_from(["cm^2", "%", "km/h", "$", "", "^", "\\circ", "a^{-1}", "[("]) | texts)
def test_units_and_answers_are_any_text(answer: str, unit: str) -> None:
    assert answer.startswith(mathematics._without(unit, answer))
    mathematics._could_be(answer)
    row = {"response": f"Answer {answer}", "gold": "1", "finish_reason": "stop"}
    assert miniature.grade_answer([row])[0].extracted == answer.rpartition("Answer ")[2].strip()


# --- Packing ----------------------------------------------------------------------------------------------------------


@fuzz
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 40), st.integers(0, 5), st.integers(1, 3))
def test_steps_hold_every_example_once_an_epoch(lengths: list[int], budget: int, seed: int, epochs: int) -> None:
    steps = plan_steps(lengths, budget, seed, epochs)
    order = [i for step in steps for i in step]
    for epoch in range(epochs):
        part = order[epoch * len(lengths) : (epoch + 1) * len(lengths)]
        assert sorted(part) == list(range(len(lengths)))
        assert list(group(part, lengths, budget)) == steps[: len(list(group(part, lengths, budget)))]
        steps = steps[len(list(group(part, lengths, budget))) :]
    assert not steps
    for step in plan_steps(lengths, budget, seed, epochs):
        assert len(step) == 1 or sum(lengths[i] for i in step) <= budget
    examples = [Example(str(i), [0] * length, ()) for i, length in enumerate(lengths)]
    parts = micro_batches(examples, budget)
    assert sorted(example.id for part in parts for example in part) == sorted(example.id for example in examples)
    assert all(len(part) == 1 or sum(len(example.tokens) for example in part) <= budget for part in parts)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """A conversation of any tokens, with spans that don't touch its first token's place and follow one another."""
    tokens = draw(st.lists(st.integers(0, 99), min_size=2, max_size=12))
    cuts = sorted(draw(st.sets(st.integers(1, len(tokens)), min_size=2, max_size=4)))
    return Example("x", tokens, tuple(zip(cuts[::2], cuts[1::2], strict=False)))


@fuzz
@given(st.lists(examples(), min_size=1, max_size=4), st.sampled_from([0.0, 0.25, 1.0]))
def test_a_packed_batch_predicts_what_it_should(conversations: list[Example], weight: float) -> None:
    batch = pack(conversations, torch.device("cpu"), weight)
    stream = [(i, place) for i, one in enumerate(conversations)
              for place in range(batch.shared if i else 0, len(one.tokens))]
    assert batch.tokens.tolist() == [conversations[i].tokens[place] for i, place in stream]
    assert batch.positions.tolist() == [place for _, place in stream]
    assert batch.lengths == [sum(i == j for j, _ in stream) for i in range(len(conversations))]
    expected = []
    for i, one in enumerate(conversations):
        assert one.tokens[: batch.shared] == conversations[0].tokens[: batch.shared]
        for place in range(1, len(one.tokens)):
            inside = any(first <= place < last for first, last in one.spans)
            if inside or weight:
                source = stream.index((0 if place <= batch.shared else i, place - 1))
                expected.append((source, one.tokens[place], 1.0 if inside else weight))
    found = zip(batch.sources.tolist(), batch.targets.tolist(), batch.token_weights.tolist(), strict=True)
    assert list(found) == expected
    assert sum(one.weight(weight) for one in conversations) == pytest.approx(batch.token_weights.sum().item())


# --- Markdown ---------------------------------------------------------------------------------------------------------


@fuzz
@given(texts | st.text(alphabet="\\`*_[]()<>|!&#~$@:/w.-+= 1a\n", max_size=20))
@example(":://")
@example("https://a.b www.a.b WWW.a.b a@b.c")
@example("1. a")
@example("--- ")
@example("_a_ a_b __")
def test_plain_text_has_no_marks(text: str) -> None:
    shown = plain(text)
    assert shown.replace("@\u2060", "@").isprintable()
    bare = re.sub(r"\\[!-/:-@\[-`{-~]", ",", shown)  # what is escaped is text
    assert not re.search(r"[\\`*\[\]<>|!&#~$]|://|(?i:www\.)|@[^\u2060]|\b_\B|\B_\b", bare), bare
    assert not re.match(r"(?:[-+]|\d+[.)])(?: |$)|---|=+$", shown), shown
    unescaped = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", shown).replace("@\u2060", "@")
    assert unescaped == " ".join("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text).split())
    lines = fence(text).split("\n")
    ticks = re.match("`+", lines[0])[0]
    assert not any(line.strip().startswith(ticks) for line in lines[1:-1]) and lines[-1] == ticks
