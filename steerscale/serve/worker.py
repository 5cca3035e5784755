"""The one thread that runs the model, and the queue before it: one request after the other, in their order."""

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from steerscale.errors import SteerscaleError
from steerscale.generation import Completion, generate
from steerscale.interp.combine import chained
from steerscale.interp.interventions import capture
from steerscale.language_model import LanguageModel
from steerscale.models.hooks import HookFunction
from steerscale.sampling import Sampling
from steerscale.serve.errors import RequestError, overloaded

logger = logging.getLogger(__name__)

MOST_WAITING = 512
_FIRST = "blocks.0.hook_resid_pre"
"""Where every model's forward pass begins."""
_POSITIONS = 128
"""Whose logits are computed at once for logprobs."""


class TokenScore(NamedTuple):
    """How probable a token of a text was to the model as it was steered, at temperature 1 and without filters."""

    token: int
    logprob: float
    """nats"""
    best: list[tuple[int, float]]
    """The most probable tokens there, with their logprobs."""


class Piece(NamedTuple):
    """Text that has become certain."""

    row: int
    text: str


class Finished(NamedTuple):
    """All texts are complete."""

    completions: list[Completion]
    scores: list[list[TokenScore]] | None


class Failed(NamedTuple):
    """Nothing comes any more."""

    error: RequestError


Event = Piece | Finished | Failed


@dataclass(kw_only=True, eq=False)
class Job:
    """A request for the model."""

    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    max_tokens: int
    stop: Sequence[str]
    functions: Callable[[], Mapping[str, HookFunction]]
    """Makes the hook functions, on the model's thread."""
    logprobs: int | None
    """Alternatives to name for each token; None: no scores."""
    tell: Callable[[Event], None]
    """Called on the model's thread; Finished or Failed is the last, and comes once unless the job was cancelled."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set by whoever does not want it any more."""


class _Cancelled(Exception):
    """Not an error: it ends a generation that nobody waits for."""


class ModelThread:
    """Runs jobs. The language model is its own as long as it lives."""

    def __init__(self, lm: LanguageModel, *, most_waiting: int = MOST_WAITING) -> None:
        """`most_waiting`: jobs in the queue; a further one is turned away."""
        self._lm = lm
        self._queue: queue.Queue[Job | None] = queue.Queue(most_waiting + 1)  # and a place for the end
        self._most_waiting = most_waiting
        self._stopping = threading.Event()
        self._current: Job | None = None
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Begin to take jobs."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether jobs are being run."""
        return self._thread.is_alive() and not self._stopping.is_set()

    def submit(self, job: Job) -> None:
        """Put a job into the queue. Raises RequestError if that is full, or the server is ending."""
        if not self.is_alive:
            raise overloaded("the server is ending")
        if self._queue.qsize() >= self._most_waiting:
            self._forget_cancelled()
        if self._queue.qsize() >= self._most_waiting:
            raise overloaded(f"{self._most_waiting} requests are waiting already: try again later")
        self._queue.put(job)

    def stop(self) -> None:
        """Cancel what runs, turn away what waits, and wait for the thread to end."""
        self._stopping.set()
        if (current := self._current) is not None:
            current.cancelled.set()
        self._queue.put(None)  # what stands before it is turned away
        self._thread.join()

    def _forget_cancelled(self) -> None:
        """Those whose clients have gone take no place from others."""
        with self._queue.mutex:
            wanted = [job for job in self._queue.queue if job is None or not job.cancelled.is_set()]
            self._queue.queue.clear()
            self._queue.queue.extend(wanted)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            self._current = job  # before the question, so that `stop` sees it or it sees `stop`
            if self._stopping.is_set():
                self._turn_away(job)
            elif not job.cancelled.is_set():
                self._run_job(job)
            self._current = None

    def _run_job(self, job: Job) -> None:
        try:
            job.tell(self._generate(job))
        except _Cancelled:
            logger.info("a generation was cancelled")
            if self._stopping.is_set():
                self._turn_away(job)
        except RequestError as error:
            job.tell(Failed(error))
        except SteerscaleError as error:
            job.tell(Failed(RequestError(str(error))))
        except Exception:
            # Whatever it was, the next request may go well; what it was is for the log, not for the client.
            logger.exception("a generation failed")
            job.tell(Failed(RequestError("the generation failed", status=500, type="server_error")))

    def _generate(self, job: Job) -> Finished:
        logger.info("a generation begins")
        functions = _watched(job.functions(), job.cancelled)
        completions = generate(
            self._lm,
            job.prompts,
            job.sampling,
            max_tokens=job.max_tokens,
            stop=job.stop,
            functions=functions,
            on_text=lambda row, text: job.tell(Piece(row, text)),
        )
        if job.logprobs is None:
            return Finished(completions, None)
        scores = [
            score(self._lm, prompt, completion.tokens, functions, count=job.logprobs)
            for prompt, completion in zip(job.prompts, completions)
        ]
        return Finished(completions, scores)

    def _turn_away(self, job: Job | None) -> None:
        if job is not None:
            job.tell(Failed(overloaded("the server is ending")))


def _watched(functions: Mapping[str, HookFunction], cancelled: threading.Event) -> dict[str, HookFunction]:
    """The same, and every forward pass begins by asking whether anybody still wants it."""

    def watch(x_BSM: torch.Tensor) -> None:
        if cancelled.is_set():
            raise _Cancelled

    own = functions.get(_FIRST)
    return {**functions, _FIRST: watch if own is None else chained([watch, own])}


@torch.no_grad()
def score(
    lm: LanguageModel,
    prompt: Sequence[int],
    tokens: Sequence[int],
    functions: Mapping[str, HookFunction],
    *,
    count: int,
) -> list[TokenScore]:
    """How probable each of `tokens` was after `prompt` and those before it, with the `count` best at each place.

    One more forward pass over both, in one process; they must not be longer than the model looks back.
    """
    last = f"blocks.{lm.model.num_layers - 1}.hook_resid_post"
    text_1S = torch.tensor([[*prompt, *tokens][:-1]], device=lm.context.device)
    x_SM = capture(lm, text_1S, [last], functions)[last][0, len(prompt) - 1 :]
    found = []
    for begin in range(0, len(tokens), _POSITIONS):
        logprobs_NV = lm.unembed(lm.final_norm(x_SM[begin : begin + _POSITIONS])).log_softmax(dim=-1)
        best = logprobs_NV.topk(min(count, logprobs_NV.shape[-1]), dim=-1)
        for row, token in enumerate(tokens[begin : begin + _POSITIONS]):
            pairs = list(zip(best.indices[row].tolist(), best.values[row].tolist()))
            found.append(TokenScore(token, float(logprobs_NV[row, token]), pairs))
    return found
