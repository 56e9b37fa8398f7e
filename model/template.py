"""Chat templates: programs of strangers', run in Jinja's immutable sandbox, in a process that can be killed.

The sandbox keeps a template from Python and its files, but not from a loop in a loop, 'a' * 10**9 or 10**10**9: those
are for the limits of base/grading.py. The environment is the one that transformers' `apply_chat_template` gives to
templates: whitespace control, loop controls, `tojson`, `raise_exception`, `strftime_now`.
"""

import json
from datetime import datetime
from functools import cache, lru_cache

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from base.grading import MEMORY, SECONDS, Worker

LONGEST = 1 << 24  # characters of a chat
EXAMPLE = ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", None, {"messages": [{"content": "a"}]})


class GenerationBlock(jinja2.ext.Extension):
    """{% generation %}…{% endgeneration %}, with which some templates mark what the assistant said: here, its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Drop the tags, keep what is between them."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(source: str, today: str | None, variables: dict) -> tuple[str | None, str]:
    """The chat as text and "", or None and what is wrong with the template, or with this chat for it.

    `strftime_now` is there only with `today` (YYYY-MM-DD), and gives that.
    """
    return _render(source, today, json.dumps(variables))


@lru_cache(maxsize=4_096)  # a benchmark's prompts come again with the next checkpoint
def _render(source: str, today: str | None, variables: str) -> tuple[str | None, str]:
    return tuple(_worker().ask((source, today, json.loads(variables))) or (
        None, f"it takes more than {SECONDS:g} seconds or {MEMORY >> 30} GiB"))


@cache
def _worker() -> Worker:
    return Worker(__name__)


def check(source: str, today: str | None, variables: dict) -> tuple[str | None, str]:
    """`render`, in the worker."""
    try:
        text = _compile(source, today).render(variables)
    except MemoryError:
        raise
    except jinja2.TemplateSyntaxError as error:
        return None, f"it is not valid Jinja: {error}"
    except Exception as error:  # a template may raise anything
        return None, str(error)[:1000]
    return (text, "") if len(text) <= LONGEST else (None, f"it writes {len(text)} characters")


@lru_cache
def _compile(source: str, today: str | None) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[GenerationBlock, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    if today is not None:
        environment.globals["strftime_now"] = datetime.fromisoformat(today).strftime
    return environment.from_string(source)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, **layout: object) -> str:
    """The tojson filter of chat templates; Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)
