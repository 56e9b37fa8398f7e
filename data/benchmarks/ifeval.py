"""IFEval (arXiv 2311.07911; google/IFEval, 541 prompts): instructions whose fulfilment a program can check.

A prompt has one to three instructions of 25 types ("at least 300 words", "no commas", "end with this phrase"). It
counts as right if the response follows all of them, taken as it is (prompt-level strict, *the* accuracy). A row keeps
the verdict on each instruction, strict and loose; loose takes the response also without its first line, its last line,
both, and all of these without asterisks, and is content if one of the eight follows the instruction.

The verdicts are those of the authors' code, oddities included: keywords are regular expressions and may be part of a
word, unless forbidden; a text whose language can't be told is in the right one. Two things differ on purpose. Languages
are found with a fixed seed, and the letters "#" and "!" (prompts 1122 and 1129) are counted as the prompt asks, where
the authors' code puts a random letter in their place.
"""

import json
import re
from collections.abc import Callable, Sequence
from inspect import signature
from itertools import zip_longest

from base.errors import UserError
from base.files import misfit
from base.grading import judge
from data.benchmarks.problem import Benchmark, Problem, Verdict, sample
from data.hub import read_dataset

# for `check`, before the first real one: sentences, tokens and languages each need tables of their own
EXAMPLE = (json.dumps([("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}),
                       ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "at least"}),
                       ("language:response_language", {"language": "en"})]), "The sun ROSE. It was a bright morning.")

RELATIONS = ("less than", "at least")
KINDS = {int: range(2**63), str: str, Sequence[str]: [str]}  # of arguments: what they are in JSON
PATTERNS = {"keywords", "keyword", "forbidden_words", "section_spliter", "postscript_marker"}


def load(n: int | None, seed: int) -> Benchmark:
    """The prompts, or a sample of them; the gold is a JSON list of (type, arguments)."""
    rows, dataset = read_dataset("google/IFEval", "ifeval_input_data.jsonl",
                                 columns={"key": (int, str), "prompt": str, "instruction_id_list": [str],
                                          "kwargs": [dict]})
    problems = []
    for row in rows:
        instructions = list(zip_longest(row["instruction_id_list"], row["kwargs"]))
        problems.append(Problem(str(row["key"]), row["prompt"], json.dumps(instructions)))
        read_gold(problems[-1].id, problems[-1].gold)
    return Benchmark("ifeval", "instructions", sample(problems, n, seed), dataset)


def grade(rows: Sequence[dict]) -> list[Verdict]:
    """Check each row's instructions, in worker processes: a response can keep a regular expression busy for hours."""
    golds = [read_gold(row.get("id", ""), row["gold"]) for row in rows]
    answers = judge(__name__, [(row["gold"], row["response"]) for row in rows])
    verdicts = []
    for gold, answer in zip(golds, answers, strict=True):
        types = [name for name, _ in gold]
        strict, loose = answer or [[False] * len(types)] * 2
        followed = ", ".join(name for name, follows in zip(types, strict, strict=True) if follows)
        verdicts.append(Verdict(all(strict), followed, None if answer else "grader timed out",
                                {"strict": strict, "loose": loose}))
    return verdicts


def read_gold(id: str, gold: str) -> list[tuple[str, dict]]:
    """The instructions (type, arguments) of a gold; a UserError where `CHECKS` has no such, or not with these."""
    try:
        instructions = json.loads(gold)
        fault = misfit(instructions, [[str, dict]])
        for name, arguments in [] if fault else instructions:
            wanted = dict(list(signature(CHECKS[name]).parameters.items())[1:])
            shape = {key: KINDS[parameter.annotation] for key, parameter in wanted.items()}
            fault = fault or misfit(arguments, shape) or (arguments.keys() != shape.keys() and "has others")
            for key in PATTERNS & shape.keys() if not fault else ():
                for pattern in [arguments[key]] if shape[key] is str else arguments[key]:
                    re.compile(pattern)
            if any(value not in RELATIONS for key, value in arguments.items() if "relation" in key):
                fault = f"relation is none of {RELATIONS}"
    except (ValueError, KeyError, RecursionError, re.error) as error:
        fault = str(error)
    if fault:
        raise UserError(f"the IFEval problem {id} has instructions that can't be checked: {fault}")
    return instructions


def check(gold: str, response: str) -> tuple[list[bool], list[bool]]:
    """Whether the response follows each instruction: strictly, loosely. What a worker of `grade` runs."""
    instructions = json.loads(gold)
    return tuple([any(follows(name, text, **arguments) for text in texts) for name, arguments in instructions]
                 for texts in ([response], loosened(response)))


def loosened(response: str) -> list[str]:
    """The response, and without its first line, its last line, both; the same without asterisks."""
    lines = response.split("\n")
    texts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*texts, *(text.replace("*", "") for text in texts)]


def follows(name: str, response: str, **arguments: object) -> bool:
    """Whether a response follows an instruction of the type `name`; an empty one follows none."""
    return bool(response.strip()) and CHECKS[name](response, **arguments)


# --- The 25 types: a check each, of the response and the data set's own arguments -------------------------------------


def _compare(count: int, relation: str, threshold: int) -> bool:
    assert relation in RELATIONS
    return count < threshold if relation == "less than" else count >= threshold


def existence(response: str, keywords: Sequence[str]) -> bool:
    """Every keyword is there, in whatever case, also within a word."""
    return all(re.search(keyword, response, re.IGNORECASE) for keyword in keywords)


def frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    """So many times, also within a word."""
    return _compare(len(re.findall(keyword.strip(), response, re.IGNORECASE)), relation, frequency)


def forbidden_words(response: str, forbidden_words: Sequence[str]) -> bool:
    """None of them is there as a word."""
    return not any(re.search(rf"\b{word}\b", response, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """So many of a letter, in both cases."""
    return _compare(response.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(response: str, language: str) -> bool:
    """In the language with this ISO 639-1 code, by langdetect, seeded; without letters it is in every one."""
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(response) == language
    except langdetect.LangDetectException:
        return True


def number_sentences(response: str, num_sentences: int, relation: str) -> bool:
    """So many sentences, as Punkt divides them (Kiss and Strunk 2006)."""
    import punkt

    return _compare(len(punkt.sent_tokenize(response)), relation, num_sentences)


def number_paragraphs(response: str, num_paragraphs: int) -> bool:
    """Exactly so many, divided by ***; only before the first and behind the last *** there may be nothing."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", response)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def number_words(response: str, num_words: int, relation: str) -> bool:
    r"""So many runs of \w."""
    return _compare(len(re.findall(r"\w+", response)), relation, num_words)


def nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many, divided by empty lines, of which the nth begins with that word.

    Blank ones do not count towards the number, but do towards n.
    """
    paragraphs = [part.strip() for part in response.split("\n\n")]
    number = sum(map(bool, paragraphs))
    if number != num_paragraphs or nth_paragraph > number or not paragraphs[nth_paragraph - 1]:
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def number_placeholders(response: str, num_placeholders: int) -> bool:
    """At least so many [placeholders]."""
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


def postscript(response: str, postscript_marker: str) -> bool:
    """The marker is somewhere, blanks between its letters or not."""
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(known.get(postscript_marker.strip(), postscript_marker.strip().lower()), response.lower()))


def number_bullet_lists(response: str, num_bullets: int) -> bool:
    """Exactly so many lines that begin with one * or with -."""
    stars = re.findall(r"^\s*\*[^\*].*$", response, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", response, re.MULTILINE)) == num_bullets


def constrained_response(response: str) -> bool:
    """One of three sentences is in it."""
    return any(f"My answer is {word}." in response for word in ("yes", "no", "maybe"))


def number_highlighted_sections(response: str, num_highlights: int) -> bool:
    """At least so many *highlights* or **highlights**."""
    single = re.findall(r"\*[^\n\*]*\*", response)
    double = re.findall(r"\*\*[^\n\*]*\*\*", response)
    found = [*(text.strip("*") for text in single), *(text[2:-2] for text in double)]
    return sum(bool(text.strip()) for text in found) >= num_highlights


def multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many headings such as "Section 1"."""
    return len(re.findall(rf"{section_spliter.strip()}\s?\d+", response)) >= num_sections


def json_format(response: str) -> bool:
    """JSON and nothing else, in a code block or not."""
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(response: str) -> bool:
    """There is a <<title>>."""
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", response))


def two_responses(response: str) -> bool:
    """Two different ones, divided by ******."""
    parts = [part.strip() for part in response.split("******")]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    """The request comes first, word for word, in whatever case."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(response: str, end_phrase: str) -> bool:
    """It ends with this phrase, in whatever case, in quotation marks or not."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def capital_word_frequency(response: str, capital_frequency: int, capital_relation: str) -> bool:
    """So many tokens in capitals, by NLTK's tokenizer, sentence by sentence."""
    import punkt
    from nltk.tokenize import NLTKWordTokenizer

    words = [word for sentence in punkt.sent_tokenize(response) for word in NLTKWordTokenizer().tokenize(sentence)]
    return _compare(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def english_capital(response: str) -> bool:
    """English, without a small letter."""
    return response.isupper() and response_language(response, "en")


def english_lowercase(response: str) -> bool:
    """English, without a capital letter."""
    return response.islower() and response_language(response, "en")


def no_comma(response: str) -> bool:
    """Without a comma."""
    return "," not in response


def quotation(response: str) -> bool:
    """In double quotation marks."""
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


GROUPS = {
    "keywords": (existence, frequency, forbidden_words, letter_frequency),
    "language": (response_language,),
    "length_constraints": (number_sentences, number_paragraphs, number_words, nth_paragraph_first_word),
    "detectable_content": (number_placeholders, postscript),
    "detectable_format": (number_bullet_lists, constrained_response, number_highlighted_sections, multiple_sections,
                          json_format, title),
    "combination": (two_responses, repeat_prompt),
    "startend": (end_checker, quotation),
    "change_case": (capital_word_frequency, english_capital, english_lowercase),
    "punctuation": (no_comma,),
}
CHECKS: dict[str, Callable[..., bool]] = {  # by the data set's name of the type
    f"{group}:{check.__name__}": check for group, checks in GROUPS.items() for check in checks}
