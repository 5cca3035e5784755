"""A conversation as one text for the model to go on from.

With the tokenizer's own chat template, a Jinja program that comes with the model and runs in a sandbox. Without one, plainly:

    The system's text

    User: What is a package?
    Assistant: A file with software.
    User: And a repository?
    Assistant:

and the model's next "User:" at the beginning of a line ends its answer.
"""

import datetime
import functools
import json
from collections.abc import Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from steerscale.serve.errors import RequestError
from steerscale.serve.request import Message
from steerscale.tokenizers.base import Tokenizer

NAMES = {"user": "User", "assistant": "Assistant"}
PLAIN_STOP = "\nUser:"


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[str, tuple[str, ...]]:
    """The text, and stop strings that belong to it. Raises RequestError if the template refuses the messages."""
    if tokenizer.chat_template is None:
        return _plain(messages), (PLAIN_STOP,)
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    special = {name: tokenizer.piece(token) for name, token in ids.items() if token is not None}
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        template = _compiled(tokenizer.chat_template)
        return template.render(messages=turns, add_generation_prompt=True, **special), ()
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise RequestError(f"the model's chat template refuses these messages: {error}", param="messages") from error


def _plain(messages: Sequence[Message]) -> str:
    system = [message.content for message in messages if message.role == "system"]
    turns = [f"{NAMES[message.role]}: {message.content}" for message in messages if message.role != "system"]
    return "\n\n".join([*system, "\n".join([*turns, "Assistant:"])])


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks what the assistant says, for training. Here it is text like any other."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja's own extensions have it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    # The settings and functions that templates are written for, as transformers' apply_chat_template has them.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
