"""Chats as token ids: a model's own tokenizer and chat template, and which tokens of a response are trained on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from tokenizers import Tokenizer

from base.errors import UserError
from base.files import read_json, read_text
from model import template
from model.config import ModelConfig

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Conversation:
    """Turns as the model reads them in one piece; each span [first, last) is a response and its end of turn."""

    tokens: list[int]
    spans: tuple[tuple[int, int], ...]

    @property
    def first(self) -> int:
        """Where the first response begins."""
        return self.spans[0][0]

    @property
    def last(self) -> int:
        """Where the last one ends."""
        return self.spans[-1][1]


class Chat:
    """Tokenizer and chat template of a model folder.

    The template (model/template.py) gets a date only when `today` is given: a prompt that says another date tomorrow
    could not be repeated. (Without it Llama 3's templates fall back on a fixed date.)
    """

    def __init__(self, folder: Path, config: ModelConfig, options: dict | None = None,
                 today: str | None = None) -> None:
        """`options` are variables for the template, such as Qwen3's enable_thinking; `today` is YYYY-MM-DD."""
        self.folder, self.options, self.today = folder, options or {}, today
        path = folder / "tokenizer.json"
        if not path.exists():
            raise UserError(f"{folder} has no tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_str(read_text(path))
        except Exception as error:  # the tokenizers library raises bare Exception for a file it can't parse
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is not a tokenizer ({error})") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size = config.vocab_size
        settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        if (folder / "special_tokens_map.json").exists():
            settings = read_json(folder / "special_tokens_map.json") | settings
        self.special = {name: _content(settings[name]) for name in SPECIAL_TOKENS if settings.get(name) is not None}
        self.template = _find_template(folder, settings)
        self.template_sha256 = hashlib.sha256(self.template.encode()).hexdigest()
        self.closing = self._closing()
        self.stop_ids = frozenset(config.eos_ids) | self._end_of_turn_ids(config)
        # What follows the end-of-turn token (often a newline) is the template's, and not supervised. A special token
        # splits the text, so those few tokens are the same whatever stands before them.
        closing = self.encode(self.closing)
        self.behind_end = next((len(closing) - i - 1 for i, token in enumerate(closing) if token in self.stop_ids), 0)

    def prompt(self, user: str, system: str | None = None, opener: str = "") -> list[int]:
        """Token ids up to the point where the model is to answer, or to go on behind `opener`, which it is made to
        begin with."""
        return self.encode(self.render(user, system) + opener)

    def conversation(self, messages: Sequence[dict], ended: bool = True) -> Conversation:
        """Token ids of messages (dicts of role and content; user and assistant by turns, behind a system prompt if
        any), every response supervised.

        `ended` is False where the last response was cut at a length limit: it has no end of turn, and training on one
        would teach the model to stop in mid-sentence.

        Each response stands behind the prompt that the sampler would give. So a template that renders earlier turns
        in another way later (dropping their reasoning, say) is a UserError.
        """
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        said = messages[system is not None :]
        tokens, spans, done = [], [], ""
        for i in range(0, len(said), 2):
            user, response = (message["content"] for message in said[i : i + 2])
            prompt = self.render(user, system, earlier=said[:i])
            text = self._answered(prompt, self.render(user, system, response, said[:i]), response)
            if not prompt.startswith(done):
                raise UserError(f"the chat template of {self.folder} rewrites earlier turns of a conversation, so that "
                                "they can't be trained on together; give each turn as a row of its own")
            cut = not ended and i + 2 == len(said)
            # prompt and response in one piece, as `apply_chat_template` does. The span is found by position, so that
            # nothing a response contains, end-of-turn tokens included, can move it
            turn = self.encode(text[len(done) : len(text) - len(self.closing) * cut])
            last = len(turn) - (0 if cut else self.behind_end)
            # a token that straddles the seam ("\n" of the template, "\n" of the response) is the response's
            opening = self.encode(prompt[len(done) :])
            first = next((j for j, (a, b) in enumerate(zip(opening, turn, strict=False)) if a != b), len(opening))
            spans.append((len(tokens) + min(first, last), len(tokens) + last))
            tokens += turn
            done = text
        # turn by turn, since encoding all that was said for each turn takes time by the square of their number
        if len(spans) > 1 and tokens != self.encode(done if ended else done.removesuffix(self.closing)):
            raise UserError(f"the tokenizer of {self.folder} gives a conversation other tokens than its turns one by "
                            "one, so that they can't be trained on together; give each turn as a row of its own")
        return Conversation(tokens, tuple(spans))

    def turn(self, user: str, response: str, system: str | None = None, ended: bool = True) -> Conversation:
        """A `conversation` of one turn."""
        before = [{"role": "system", "content": system}] if system is not None else []
        return self.conversation([*before, {"role": "user", "content": user},
                                  {"role": "assistant", "content": response}], ended)

    def _answered(self, prompt: str, text: str, response: str) -> str:
        """The template's rendering `text` of prompt and response, or, where it rewrites the response, both as they are.

        Those of reasoning models drop what stands before </think>, or add an empty <think> block. White space aside,
        what is trained on must be what was written, behind the prompt that the sampler uses.
        """
        middle = text[len(prompt) : len(text) - len(self.closing)]
        if text == prompt + middle + self.closing and middle.strip() == response.strip():
            return text
        return prompt + response + self.closing

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text; the template has written the special tokens, none are added."""
        try:
            tokens = self.tokenizer.encode(text, add_special_tokens=False).ids
        except UnicodeEncodeError as error:
            raise UserError(f"the text {text[:60]!r} has a lone surrogate, which is no character") from error
        except Exception as error:  # a bare one: for a word that is unknown where no token stands for such
            raise UserError(f"the tokenizer of {self.folder} fails on {text[:60]!r}: {error}") from error
        if max(tokens, default=0) >= self.vocab_size:
            raise UserError(f"the tokenizer of {self.folder} gives token {max(tokens)}, and the model has "
                            f"{self.vocab_size}: its added tokens were never trained; take a matching tokenizer")
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """The text of a response's tokens, special tokens included; a trailing stop token is dropped."""
        if tokens and tokens[-1] in self.stop_ids:
            tokens = tokens[:-1]
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def render(self, user: str, system: str | None = None, response: str | None = None,
               earlier: Sequence[dict] = ()) -> str:
        """The chat as text: up to the response if there is one, else with the opening of an assistant's turn."""
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages += [*earlier, {"role": "user", "content": user}]
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        text, fault = template.render(self.template, self.today, {
            **self.special, **self.options, "messages": messages, "add_generation_prompt": response is None,
            "tools": None, "documents": None})
        if fault:
            hint = "; it asks for the date: give --today" if "strftime_now" in fault else ""
            raise UserError(f"the chat template of {self.folder} fails on this chat: {fault}{hint}")
        return text

    def _closing(self) -> str:
        """What the template puts after a response."""
        marker = uuid4().hex
        parts = self.render("question", None, marker).split(marker)
        if len(parts) != 2:
            raise UserError(f"the chat template of {self.folder} does not render an assistant's message once, as it is")
        return parts[1]

    def _end_of_turn_ids(self, config: ModelConfig) -> frozenset[int]:
        """The special token with which the template closes a response; generation_config.json need not list it."""
        special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        closing = self.encode(self.closing)
        ends = [token for token in closing if token in special or token in config.eos_ids]
        if not ends and not config.eos_ids:
            raise UserError(f"{self.folder} names no eos_token_id, and its chat template ends a response with none")
        return frozenset(ends[:1])


def _content(token: str | dict) -> str:
    """A special token as text; tokenizer_config.json has it as such or as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _find_template(folder: Path, settings: dict) -> str:
    """The template's source: chat_template.jinja, else in tokenizer_config.json, as a string or a list with names."""
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((entry.get("template") for entry in template
                         if isinstance(entry, dict) and entry.get("name") == "default"), None)
    if not isinstance(template, str):
        raise UserError(f"{folder} has no chat template (chat_template.jinja, or in tokenizer_config.json); "
                        "base models have none: take the instruct or chat version")
    return template
