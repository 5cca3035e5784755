"""Answers in the forms of OpenAI's interface: whole, or in chunks."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steerscale.generation import Completion
from steerscale.serve.request import Asked
from steerscale.serve.worker import Finished, TokenScore
from steerscale.tokenizers.base import Tokenizer
from steerscale.tokenizers.display import token_texts

_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Makes what is sent back to one request."""

    asked: Asked
    tokenizer: Tokenizer
    id: str
    created: int
    """Seconds since 1970."""

    @classmethod
    def to(cls, asked: Asked, tokenizer: Tokenizer) -> "Answer":
        """An answer with a new id."""
        kind = "chatcmpl" if asked.is_chat else "cmpl"
        return cls(asked=asked, tokenizer=tokenizer, id=f"{kind}-{uuid.uuid4().hex}", created=int(time.time()))

    def whole(self, finished: Finished, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """All at once."""
        scores = finished.scores or [None] * len(finished.completions)
        choices = [
            self._choice(row, completion, score)
            for row, (completion, score) in enumerate(zip(finished.completions, scores))
        ]
        kind = "chat.completion" if self.asked.is_chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage(finished.completions, prompts)}

    def first(self, row: int) -> dict[str, Any] | None:
        """What a stream begins with, for each text: who speaks."""
        if not self.asked.is_chat:
            return None
        return self._chunk([{"index": row, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])

    def piece(self, row: int, text: str) -> dict[str, Any]:
        """Some more text."""
        said: dict[str, Any] = {"delta": {"content": text}} if self.asked.is_chat else {"text": text}
        return self._chunk([{"index": row, **said, "logprobs": None, "finish_reason": None}])

    def last(self, row: int, completion: Completion) -> dict[str, Any]:
        """Why a text ends."""
        said: dict[str, Any] = {"delta": {}} if self.asked.is_chat else {"text": ""}
        reason = _REASONS[completion.end]
        return self._chunk([{"index": row, **said, "logprobs": None, "finish_reason": reason}])

    def total(self, completions: Sequence[Completion], prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The end of a stream that is to tell how many tokens there were."""
        return {**self._chunk([]), "usage": self.usage(completions, prompts)}

    def usage(self, completions: Sequence[Completion], prompts: Sequence[Sequence[int]]) -> dict[str, int]:
        """Tokens; each prompt counts once, however many texts go on from it."""
        before = sum(map(len, prompts[:: self.asked.n]))
        after = sum(len(completion.tokens) for completion in completions)
        return {"prompt_tokens": before, "completion_tokens": after, "total_tokens": before + after}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.asked.is_chat else "text_completion"
        return {**self._head(kind), "choices": choices, **({"usage": None} if self.asked.include_usage else {})}

    def _choice(self, row: int, completion: Completion, scores: list[TokenScore] | None) -> dict[str, Any]:
        reason = _REASONS[completion.end]
        if self.asked.is_chat:
            message = {"role": "assistant", "content": completion.text, "refusal": None}
            logprobs = None if scores is None else {"content": self._chat_scores(scores), "refusal": None}
            return {"index": row, "message": message, "logprobs": logprobs, "finish_reason": reason}
        logprobs = None if scores is None else self._text_scores(scores)
        return {"index": row, "text": completion.text, "logprobs": logprobs, "finish_reason": reason}

    def _texts(self, tokens: Sequence[int]) -> list[str]:
        return [text for text, _ in token_texts(self.tokenizer, tokens)]

    def _chat_scores(self, scores: list[TokenScore]) -> list[dict[str, Any]]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            (text,) = self._texts([token])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        return [
            {**entry(score.token, score.logprob), "top_logprobs": [entry(*one) for one in score.best]}
            for score in scores
        ]

    def _text_scores(self, scores: list[TokenScore]) -> dict[str, Any]:
        texts = self._texts([score.token for score in scores])
        # Two tokens may be one text, a letter and its byte: the more probable one, which comes first, says how probable it is.
        best = [
            dict(zip(reversed(self._texts([token for token, _ in score.best])), [v for _, v in reversed(score.best)]))
            for score in scores
        ]
        offsets = [sum(map(len, texts[:index])) for index in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": best if self.asked.logprobs else None,
            "text_offset": offsets,
        }
