"""What a client asks for: `/v1/completions` and `/v1/chat/completions`, read from JSON and checked."""

import secrets
from dataclasses import dataclass
from typing import Any

from steerscale.errors import ConfigError
from steerscale.sampling import Sampling
from steerscale.serve.errors import RequestError
from steerscale.serve.fields import Fields, wrong_type

MOST_CHOICES = 64
"""Texts of one request: prompts times n."""
MOST_STOPS = 16
MOST_TOP_LOGPROBS = 20
MOST_STRENGTH = 1000.0
"""Up or down."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user or assistant."""
    content: str


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request."""

    model: str
    recipe: str | None
    """As the extra field has it; the model's name may say one too."""
    strength: float | None
    """Factor of the recipe's changes."""
    prompts: tuple[str | tuple[int, ...], ...]
    """Texts or token ids; empty in a chat."""
    messages: tuple[Message, ...]
    """Empty but in a chat."""
    sampling: Sampling
    n: int
    """Texts for each prompt."""
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    """Whether a stream ends by saying how many tokens there were."""
    logprobs: int | None
    """How many alternatives to name for each token; None: no logprobs at all."""

    @property
    def is_chat(self) -> bool:
        """Whether it is a conversation."""
        return bool(self.messages)


def read_request(body: bytes, *, chat: bool) -> Asked:
    """Read a request's body. Raises RequestError that names the field."""
    fields = Fields(body)
    model = fields.text("model")
    if not model:
        raise RequestError("model must be given: GET /v1/models lists what there is", param="model")
    prompts = () if chat else _prompts(fields.take("prompt"))
    messages = _messages(fields.take("messages")) if chat else ()
    n = fields.integer("n", least=1, most=MOST_CHOICES) or 1
    if n * max(len(prompts), 1) > MOST_CHOICES:
        raise RequestError(f"at most {MOST_CHOICES} texts a request, {len(prompts)} prompts times n = {n}", param="n")
    max_tokens = fields.integer("max_tokens", least=1, most=2**31)
    if chat:
        max_tokens = fields.integer("max_completion_tokens", least=1, most=2**31) or max_tokens
    stream = fields.boolean("stream")
    asked = Asked(
        model=model,
        recipe=fields.text("recipe"),
        strength=fields.number("strength", None, least=-MOST_STRENGTH, most=MOST_STRENGTH),
        prompts=prompts,
        messages=messages,
        sampling=_sampling(fields),
        n=n,
        max_tokens=max_tokens,
        stop=_stop(fields.take("stop")),
        stream=stream,
        include_usage=_include_usage(fields.take("stream_options"), stream=stream),
        logprobs=_chat_logprobs(fields) if chat else fields.integer("logprobs", least=0, most=MOST_TOP_LOGPROBS),
    )
    if stream and asked.logprobs is not None:
        raise RequestError(
            "logprobs are computed when a text is complete: leave out stream or logprobs",
            param="logprobs",
            code="unsupported_parameter",
        )
    _refuse_others(fields, n=n)
    return asked


def _refuse_others(fields: Fields, *, n: int) -> None:
    """The rest of OpenAI's fields: without effect they may be there."""
    for name in ("presence_penalty", "frequency_penalty"):
        fields.unsupported(name, 0, 0.0)
    fields.unsupported("logit_bias", {})
    fields.unsupported("best_of", n)
    fields.unsupported("echo", False)
    fields.unsupported("suffix", "")
    fields.unsupported("store", False)
    fields.unsupported("tools", [])
    fields.unsupported("tool_choice", "none", "auto")
    fields.unsupported("parallel_tool_calls", False, True)
    fields.unsupported("functions", [])
    fields.unsupported("response_format", {"type": "text"})
    fields.unsupported("modalities", ["text"])
    fields.take("user")  # who asks makes no difference here
    fields.take("metadata")
    fields.end()


def _sampling(fields: Fields) -> Sampling:
    seed = fields.integer("seed", least=-(2**63), most=2**63 - 1)
    values: dict[str, Any] = {
        "temperature": fields.number("temperature", 1.0, least=0, most=2),
        "top_p": fields.number("top_p", 1.0, least=0, most=1),
        "top_k": fields.integer("top_k", least=1, most=2**31),
        "min_p": fields.number("min_p", 0.0, least=0, most=1),
        "repetition_penalty": fields.number("repetition_penalty", 1.0, least=0, most=10),
        # Room above it: each text of a batch adds to it.
        "seed": secrets.randbelow(2**31) if seed is None else seed % 2**62,
    }
    try:
        return Sampling(**values)
    except ConfigError as error:
        raise RequestError(str(error), param=str(error).split(" ", 1)[0]) from error


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    if value is None:
        raise RequestError("prompt must be given", param="prompt")
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return tuple(value)
        if _are_tokens(value):
            return (tuple(value),)
        if all(isinstance(one, list) and one and _are_tokens(one) for one in value):
            return tuple(tuple(one) for one in value)
    raise RequestError(
        "prompt must be a text, a list of texts, token ids, or a list of lists of them, and none empty",
        param="prompt",
        code="invalid_type",
    )


def _are_tokens(values: list[Any]) -> bool:
    return all(isinstance(one, int) and not isinstance(one, bool) for one in values)


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RequestError("messages must be a list of at least one message", param="messages", code="invalid_type")
    return tuple(_message(one, f"messages[{index}]") for index, one in enumerate(value))


def _message(value: Any, at: str) -> Message:
    if not isinstance(value, dict):
        raise wrong_type(at, "an object with role and content", value)
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"{at}.role must be one of {', '.join(ROLES)}", param=f"{at}.role")
    others = {key for key, other in value.items() if other is not None} - {"role", "content", "name"}
    if others:
        name = min(others)[:100]
        raise RequestError(f"{at}.{name} is not supported here", param=f"{at}.{name}", code="unsupported_parameter")
    if isinstance(content, list):
        content = "".join(_part(part, f"{at}.content[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise wrong_type(f"{at}.content", "a string or a list of parts", content)
    return Message(role=ROLES[role], content=content)


def _part(value: Any, at: str) -> str:
    if not isinstance(value, dict) or value.get("type") != "text" or not isinstance(value.get("text"), str):
        raise RequestError(f'{at} must be {{"type": "text", "text": ...}}: the model reads text', param=at)
    return value["text"]


def _stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise RequestError("stop must be a string or a list of strings, none empty", param="stop", code="invalid_type")
    if len(stops) > MOST_STOPS:
        raise RequestError(f"stop must have at most {MOST_STOPS} strings, it has {len(stops)}", param="stop")
    return tuple(stops)


def _include_usage(value: Any, *, stream: bool) -> bool:
    if value is None:
        return False
    wrong = not isinstance(value, dict) or set(value) - {"include_usage"}
    if wrong or not isinstance(value.get("include_usage", False), bool):
        raise RequestError('stream_options must be {"include_usage": true or false}', param="stream_options")
    if not stream:
        raise RequestError("stream_options go with stream=true", param="stream_options")
    return value.get("include_usage", False)


def _chat_logprobs(fields: Fields) -> int | None:
    wanted, count = fields.boolean("logprobs"), fields.integer("top_logprobs", least=0, most=MOST_TOP_LOGPROBS)
    if count is not None and not wanted:
        raise RequestError("top_logprobs go with logprobs=true", param="top_logprobs")
    return (count or 0) if wanted else None
