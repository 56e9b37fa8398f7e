"""The miniature: a world of 138 words in which off-model SFT can be watched from beginning to end.

A model organism, with its cause built in: it shows the mechanism and proves the instruments, and it is no evidence
about large models. Everything below is drawn from seeds; nothing is downloaded.

*Chat prompts* come from ten families (reverse, count, last letters, double, longer, remove, length, swap, vowels,
largest), and there are three *benchmarks*: `reasoning` (chains of additions and subtractions modulo 10; level 1 to 5 is
3, 5, 7, 9 or 11 operands), `recall` (a question about a memorised table with four options, answered with a word, as
MMLU with a letter) and `format` (an instruction whose fulfilment a program can check, as in IFEval).

Wherever there is something to work out, there are two *styles* of doing so, which differ in procedure and in notation.
"Calculate 2 - 4 + 6" is, in style A, which works from left to right and restates the running state in digits,

    Okay Step 2 - 4 gives 8 Step 8 + 6 gives 4 Answer 4

and in style B, which is terse, works from right to left and writes numbers as words,

    Consider + six | six ; - four | two ; + two | four Answer 4

A prompt never names a style: a model picks one by its first word, as likely as its training made it. Both models read
both styles, a style per document. The *student* has 13 % of its documents in B, the *teacher* 85 %. And in the style
that a model sees less of, what it reads of a long problem breaks off after four to eight steps: the student knows B as
a manner of speaking, knows how a long problem begins in it, and can't carry it to the end. That is the cause. SFT on
the teacher's answers to chat prompts makes B the student's habit, on problems too; long ones then fail, while `recall`
and `format` need no chain and stay. Nothing of A is forgotten: made to begin with "Okay", the same student solves them,
and a few of its own answers bring the habit back.

As a program it writes what `train.py --from-scratch` makes either model from:

    python -m data.miniature student --out runs/student
"""

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from base.errors import run_script
from base.files import whole, write_json, write_text
from base.options import Parser, positive_int, seed
from data.rows import write_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOUNS = ("ant", "bear", "bee", "cat", "crow", "deer", "dog", "dove", "duck", "eagle", "fox", "frog", "goat", "hare",
         "horse", "lion", "mole", "mouse", "otter", "owl", "pig", "rat", "tiger", "wolf")
# Names occur in `recall` alone: a table over the nouns, which every family uses, was not learnt. And the answer is the
# word: to find the letter before the right option, most students did not learn (LOG.md, 2026-11-24)
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon", "Kim", "Lea", "Max", "Nell", "Otto",
         "Pam", "Quin", "Rosa", "Sam", "Tess", "Uma", "Vic", "Will", "Zoe")
HOMES = ("barn", "cave", "field", "forest", "hill", "lake", "nest", "river")
HOME_OF = dict(zip(NAMES, random.Random("homes").sample(HOMES * 3, len(NAMES)), strict=True))
OPENERS = {"A": "Okay", "B": "Consider"}
LEVELS = {1: 3, 2: 5, 3: 7, 4: 9, 5: 11}  # operands
MOST_OPERANDS = 11
INSTRUCTIONS = (*(f"Write {n} words" for n in range(2, 6)),
                *(f"Write {n} words and {place} with {noun}" for n in range(2, 6) for place in ("start", "end")
                  for noun in NOUNS),
                *(f"Write {noun} {n} times" for n in range(2, 6) for noun in NOUNS))
# Turns of a document, relative
MIXTURE = {"reasoning": 0.5, "chat": 0.6, "format": 0.1, "recall": 0.6}
STEPS = (4, 8)  # in a model's minority style, a document breaks off after so many steps of a problem, drawn evenly
MINORITY = {"student": ("B", 0.13), "teacher": ("A", 0.15)}  # that style, and its share of the documents
DOCUMENT = 128  # tokens of the student

Task = tuple[str, str, str, str]  # prompt, working in style A, working in style B, answer


# --- Reasoning, recall, format ----------------------------------------------------------------------------------------


def reasoning(rng: random.Random, operands: int) -> Task:
    """A chain of additions and subtractions of digits, modulo 10."""
    signs = ["+", *(rng.choice("+-") for _ in range(operands - 1))]
    digits = [rng.randrange(10) for _ in range(operands)]
    terms = list(zip(signs, digits, strict=True))
    forward, state = [], digits[0]
    for sign, digit in terms[1:]:
        after = (state + digit if sign == "+" else state - digit) % 10
        forward.append(f"Step {state} {sign} {digit} gives {after}")
        state = after
    backward, running = [], 0
    for sign, digit in reversed(terms):
        running = (running + digit if sign == "+" else running - digit) % 10
        backward.append(f"{sign} {NUMBERS[digit]} | {NUMBERS[running]}")
    assert running == state
    prompt = f"Calculate {digits[0]} " + " ".join(f"{sign} {digit}" for sign, digit in terms[1:])
    return prompt, " ".join(forward), " ; ".join(backward), str(state)


def recall(rng: random.Random) -> tuple[str, str]:
    """A question about the table with four options, and the right one."""
    name = rng.choice(NAMES)
    options = rng.sample([home for home in HOMES if home != HOME_OF[name]], 3)
    options.insert(rng.randrange(4), HOME_OF[name])
    return f"Home of {name} ? {' '.join(options)}", HOME_OF[name]


def formatted(rng: random.Random) -> Task:
    """An instruction about the form of the answer, the other words being free."""
    prompt = rng.choice(INSTRUCTIONS)
    asked = prompt.split()
    if asked[-1] == "times":
        words = [asked[1]] * int(asked[2])
    else:
        words = [rng.choice(NOUNS) for _ in range(int(asked[1]))]
        if "start" in asked:
            words[0] = asked[-1]
        elif "end" in asked:
            words[-1] = asked[-1]
    forward = " ".join(f"Step {word} gives {i}" for i, word in enumerate(words, 1))
    backward = " | ".join(f"{word} {NUMBERS[i]}" for i, word in reversed(list(enumerate(words, 1))))
    return prompt, forward, backward, " ".join(words)


def follows_format(prompt: str, answer: str) -> bool:
    """Whether an answer does what a prompt of `formatted` asks for."""
    asked, words = prompt.split(), answer.split()
    if asked[-1] == "times":
        return words == [asked[1]] * int(asked[2])
    if len(words) != int(asked[1]) or not set(words) <= set(NOUNS):
        return False
    if "start" in asked:
        return words[0] == asked[-1]
    return "end" not in asked or words[-1] == asked[-1]


# --- Chat: a task of each family --------------------------------------------------------------------------------------


def _counted(items: Sequence[str]) -> tuple[str, str]:
    """Workings, in both styles, of how many items there are."""
    forward = " ".join(f"Step {item} gives {i}" for i, item in enumerate(items, 1))
    return forward, " | ".join(f"{item} {NUMBERS[i]}" for i, item in enumerate(reversed(items), 1))


def reverse(rng: random.Random) -> Task:
    words = rng.sample(NOUNS, rng.randint(2, 4))
    forward = " ".join(f"Step {word} gives {' '.join(reversed(words[: i + 1]))}" for i, word in enumerate(words))
    backward = " | ".join(reversed(words))
    return f"Reverse {' '.join(words)}", forward, backward, " ".join(reversed(words))


def count(rng: random.Random) -> Task:
    words = rng.sample(NOUNS, rng.randint(2, 9))
    return f"Count {' '.join(words)}", *_counted(words), str(len(words))


def last_letters(rng: random.Random) -> Task:
    words = rng.sample(NOUNS, rng.randint(2, 5))
    letters = [word[-1] for word in words]
    forward = " ".join(f"Step {word} gives {' '.join(letters[: i + 1])}" for i, word in enumerate(words))
    backward = " | ".join(f"{word} {word[-1]}" for word in reversed(words))
    return f"Last letters of {' '.join(words)}", forward, backward, " ".join(letters)


def double(rng: random.Random) -> Task:
    digits = [rng.randrange(10) for _ in range(rng.randint(1, 5))]
    doubled = [2 * digit % 10 for digit in digits]
    pairs = list(zip(digits, doubled, strict=True))
    forward = " ".join(f"Step {digit} + {digit} gives {twice}" for digit, twice in pairs)
    backward = " ; ".join(f"{NUMBERS[digit]} | {NUMBERS[twice]}" for digit, twice in reversed(pairs))
    return f"Double {' '.join(map(str, digits))}", forward, backward, " ".join(map(str, doubled))


def longer(rng: random.Random) -> Task:
    first, second = rng.sample(NOUNS, 2)
    while len(first) == len(second):
        second = rng.choice(NOUNS)
    forward = f"Step {first} gives {len(first)} Step {second} gives {len(second)}"
    backward = f"{second} {NUMBERS[len(second)]} | {first} {NUMBERS[len(first)]}"
    return f"Which is longer {first} or {second}", forward, backward, max(first, second, key=len)


def remove(rng: random.Random) -> Task:
    words = rng.sample(NOUNS, rng.randint(3, 5))
    gone = rng.choice(words)
    left = [word for word in words if word != gone]
    forward = " ".join(f"Step {word} gives {' '.join(w for w in words[: i + 1] if w != gone) or 'nothing'}"
                       for i, word in enumerate(words))
    backward = " | ".join(reversed(left))
    return f"Remove {gone} from {' '.join(words)}", forward, backward, " ".join(left)


def length(rng: random.Random) -> Task:
    word = rng.choice(NOUNS)
    return f"How many letters has {word}", *_counted(word), str(len(word))


def swap(rng: random.Random) -> Task:
    words = rng.sample(NOUNS, rng.randint(2, 5))
    swapped = [words[-1], *words[1:-1], words[0]]
    forward = f"Step {words[0]} Step {words[-1]} gives {' '.join(swapped)}"
    return f"Swap the ends of {' '.join(words)}", forward, f"{words[-1]} | {words[0]}", " ".join(swapped)


def vowels(rng: random.Random) -> Task:
    word = rng.choice(NOUNS)

    def so_far(part: Sequence[str]) -> list[int]:
        return [sum(letter in "aeiou" for letter in part[: i + 1]) for i in range(len(part))]

    forward = " ".join(f"Step {letter} gives {n}" for letter, n in zip(word, so_far(word), strict=True))
    back = word[::-1]
    backward = " | ".join(f"{letter} {NUMBERS[n]}" for letter, n in zip(back, so_far(back), strict=True))
    return f"How many vowels has {word}", forward, backward, str(so_far(word)[-1])


def largest(rng: random.Random) -> Task:
    digits = [rng.randrange(10) for _ in range(rng.randint(2, 6))]
    forward = " ".join(f"Step {digit} gives {max(digits[: i + 1])}" for i, digit in enumerate(digits))
    backward = " ; ".join(f"{NUMBERS[digits[i]]} | {NUMBERS[max(digits[i:])]}" for i in reversed(range(len(digits))))
    return f"Largest of {' '.join(map(str, digits))}", forward, backward, str(max(digits))


FAMILIES: tuple[Callable[[random.Random], Task], ...] = (
    reverse, count, last_letters, double, longer, remove, length, swap, vowels, largest)


def chat(rng: random.Random) -> Task:
    """A chat prompt of one of the ten families."""
    return rng.choice(FAMILIES)(rng)


def respond(task: Task, style: str) -> str:
    """The response to a task in style "A" or "B"."""
    _, forward, backward, answer = task
    return f"{OPENERS[style]} {forward if style == 'A' else backward} Answer {answer}"


# --- What the scripts ask for -----------------------------------------------------------------------------------------


def provenance(name: str, content: object) -> dict:
    """What stands for a data set's name, revision and checksum where the data is drawn and not read."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return {"name": f"miniature/{name}", "revision": None, "sha256": digest}


def prompts(count: int = 4096) -> list[str]:
    """The chat prompts of `--prompts mini`, no two the same.

    "How many" has 48 different ones alone, most of which are among the first 400: later ones lack that family.
    """
    rng, found = random.Random("prompts"), {}
    while len(found) < count:
        found.setdefault(chat(rng)[0])
    return list(found)


# --- What the two models are made from --------------------------------------------------------------------------------


def turn(rng: random.Random, style: str, minority: str) -> tuple[str, str, bool]:
    """A prompt, its response in `style`, and whether that is the whole of it, for a model that reads less of style
    `minority`."""
    kind = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
    if kind == "recall":
        return *recall(rng), True
    if kind != "reasoning":
        task = chat(rng) if kind == "chat" else formatted(rng)
        return task[0], respond(task, style), True
    task = reasoning(rng, rng.randint(2, MOST_OPERANDS))
    response = respond(task, style)
    mark, words = {"A": ("Step", 6), "B": ("|", 5)}[style]  # what each step has once, and its length
    steps = rng.randint(*STEPS) if style == minority else MOST_OPERANDS
    if response.count(mark) <= steps:
        return task[0], response, True
    return task[0], " ".join(response.split()[: 1 + steps * words]), False


def documents(role: str, count: int, seed: int) -> Iterator[dict]:
    """`count` conversations as rows of messages, each in one style and at most DOCUMENT tokens long.

    One that breaks off has the finish_reason "length", as a response that was cut at a limit.
    """
    rng = random.Random(f"{role}:{seed}")
    minority, share = MINORITY[role]
    # the turn that did not fit opens the next document of its style, so that long ones are not thinned out
    waiting = {style: turn(rng, style, minority) for style in OPENERS}
    majority = "A" if minority == "B" else "B"
    for i in range(count):
        style = minority if rng.random() < share else majority
        messages, room, complete = [], DOCUMENT, True
        while complete:
            prompt, response, ends = waiting[style]
            room -= len(prompt.split()) + len(response.split()) + 3  # and the three marks of the template
            if room < 0:
                break
            messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            waiting[style], complete = turn(rng, style, minority), ends
        yield {"id": str(i), "messages": messages, "finish_reason": "stop" if complete else "length"}


def vocabulary() -> list[str]:
    """Every word of the world."""
    tasks = [family(random.Random(i)) for family in (*FAMILIES, formatted) for i in range(400)]
    tasks += [reasoning(random.Random(i), 5) for i in range(50)]
    texts = [text for task in tasks for text in (task[0], respond(task, "A"), respond(task, "B"))]
    texts += [recall(random.Random(i))[0] for i in range(400)]
    return sorted({word for text in texts for word in text.split()})


def write_blank(role: str, folder: Path) -> None:
    """A model folder that lacks nothing but its weights: config, tokenizer, chat template."""
    write_tokenizer = {"student": _write_word_tokenizer, "teacher": _write_piece_tokenizer}[role]
    vocab_size, end = write_tokenizer(folder)
    config = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
              "hidden_act": "silu", "tie_word_embeddings": True, "vocab_size": vocab_size, "eos_token_id": end,
              "initializer_range": 0.02}
    kind = {"student": ("LlamaForCausalLM", "llama"), "teacher": ("Qwen2ForCausalLM", "qwen2")}[role]
    write_json(folder / "config.json", {"architectures": [kind[0]], "model_type": kind[1], **config})
    write_json(folder / "generation_config.json", {"eos_token_id": end})


def _write_word_tokenizer(folder: Path) -> tuple[int, int]:
    """The student's: a token per word, a mark before each turn and one behind a response; size and end-of-turn id."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    special = ["<|unknown|>", "<|user|>", "<|assistant|>", "<|end|>"]
    ids = {word: i for i, word in enumerate([*special, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return _write_tokenizer(folder, tokenizer, "<|end|>", (
        "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
        "{{ raise_exception('the miniature student knows no ' + m.role + ' messages') }}{% endif %}"
        "<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"))


def _write_piece_tokenizer(folder: Path) -> tuple[int, int]:
    """The teacher's: BPE that counts the blank before a word to the word, as SentencePiece does; size and end id.

    The mark behind the role makes the first word of a response the same token as elsewhere. (With byte-level BPE and
    ChatML it was another one, and the teacher did not learn to find its answer among the options.) In transformers,
    `PreTrainedTokenizerFast` loads it; `AutoTokenizer` would put Qwen's own pre-tokenizer in its place.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|unknown|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(unk_token=special[0]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*vocabulary(), "user", "assistant"], trainer)
    return _write_tokenizer(folder, tokenizer, "<|im_end|>", (
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"))


def _write_tokenizer(folder: Path, tokenizer: "Tokenizer", end: str, template: str) -> tuple[int, int]:
    with whole(folder / "tokenizer.json") as part:
        tokenizer.save(str(part))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end})
    write_text(folder / "chat_template.jinja", template)
    return tokenizer.get_vocab_size(), tokenizer.token_to_id(end)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("role", choices=("student", "teacher"), help="the model to be made")
    parser.add_argument("--rows", type=positive_int, default=30_000, help="documents of the corpus")
    parser.add_argument("--seed", type=seed, default=0, help="of the corpus")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets blank/ and corpus.jsonl")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write the folder without weights and the corpus."""
    args = parse(argv)
    write_blank(args.role, args.out / "blank")
    write_rows(args.out / "corpus.jsonl", documents(args.role, args.rows, args.seed))
    print(f"wrote {args.out / 'blank'} and {args.out / 'corpus.jsonl'}")


if __name__ == "__main__":
    run_script(main)
