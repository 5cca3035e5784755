"""The HTTP side: routes, limits, streams, clients that go away."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from steerscale.language_model import LanguageModel
from steerscale.serve.answer import Answer
from steerscale.serve.catalogue import Catalogue
from steerscale.serve.chat import chat_prompt
from steerscale.serve.errors import RequestError
from steerscale.serve.guard import Guard
from steerscale.serve.request import Asked, read_request
from steerscale.serve.worker import Event, Failed, Finished, Job, ModelThread, Piece

MOST_BYTES = 2 * 2**20
"""Of a request's body."""
BODY_SECONDS = 30.0
"""In which a body must have come."""
MOST_TOKENS = 2**16
"""Prompts and new tokens of a request together, whose keys and values are in memory at once; one text may fill the context."""
COMPLETION_TOKENS, CHAT_TOKENS = 16, 256
"""New tokens where the client does not say how many."""


def make_app(
    lm: LanguageModel, catalogue: Catalogue, *, hosts: frozenset[str] | None = None, most_waiting: int | None = None
) -> Guard:
    """The application. Its model thread lives from startup to shutdown.

    Args:
        hosts: names the server may be called by; None: any.
        most_waiting: requests in the queue; None: as many as `worker.MOST_WAITING`.
    """
    model = ModelThread(lm) if most_waiting is None else ModelThread(lm, most_waiting=most_waiting)
    service = _Service(lm, catalogue, model)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        model.start()
        try:
            yield
        finally:
            await asyncio.to_thread(model.stop)

    app = Starlette(
        routes=[
            Route("/health", service.health),
            Route("/v1/models", service.models),
            Route("/v1/models/{name}", service.one_model),
            Route("/v1/completions", partial(service.generate, chat=False), methods=["POST"]),
            Route("/v1/chat/completions", partial(service.generate, chat=True), methods=["POST"]),
        ],
        exception_handlers={
            RequestError: _on_request_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
            Exception: _on_defect,
        },
        lifespan=lifespan,
    )
    return Guard(app, hosts=hosts)


class _Service:
    """What the routes do."""

    def __init__(self, lm: LanguageModel, catalogue: Catalogue, model: ModelThread) -> None:
        self._lm, self._catalogue, self._model = lm, catalogue, model
        self._created = int(time.time())

    async def health(self, request: Request) -> Response:
        """Whether the model answers."""
        alive = self._model.is_alive
        return JSONResponse({"status": "ok" if alive else "ending"}, status_code=200 if alive else 503)

    async def models(self, request: Request) -> Response:
        """What may stand in `model`."""
        return JSONResponse({"object": "list", "data": [self._model_card(name) for name in self._catalogue.names]})

    async def one_model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        self._catalogue.recipe_of(name, None, None)
        return JSONResponse(self._model_card(name))

    async def generate(self, request: Request, *, chat: bool) -> Response:
        """`/v1/completions` and `/v1/chat/completions`."""
        asked = read_request(await _body(request), chat=chat)
        recipe = self._catalogue.recipe_of(asked.model, asked.recipe, asked.strength)
        strength = 1.0 if asked.strength is None else asked.strength
        # A megabyte of text takes a while to tokenize.
        prompts, stop = await asyncio.to_thread(self._encode, asked)
        events: asyncio.Queue[Event] = asyncio.Queue()
        job = Job(
            prompts=[prompt for prompt in prompts for _ in range(asked.n)],
            sampling=asked.sampling,
            max_tokens=self._max_tokens(asked, len(prompts) * asked.n, longest=max(map(len, prompts))),
            stop=(*asked.stop, *stop),
            functions=partial(self._catalogue.functions, recipe, strength),
            logprobs=asked.logprobs,
            tell=_teller(events),
        )
        self._model.submit(job)
        answer = Answer.to(asked, self._lm.tokenizer)
        if asked.stream:
            return EventStream(job, events, answer)
        async with _following(job, events, request.receive) as following:
            async for event in following:
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    return JSONResponse(answer.whole(event, job.prompts))
        raise AssertionError("a job ends by Finished or Failed")

    def _model_card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "steerscale"}

    def _encode(self, asked: Asked) -> tuple[list[list[int]], tuple[str, ...]]:
        """Token ids of the prompts, and stop strings that come with a chat."""
        if asked.is_chat:
            text, stop = chat_prompt(self._lm.tokenizer, asked.messages)
            if stop:
                return [self._lm.encode(text)], stop
            return [self._lm.tokenizer.encode(text)], stop  # a template puts what is to come first itself
        known = min(self._lm.model.tokens, self._lm.tokenizer.vocab_size)
        for one in asked.prompts:
            if not isinstance(one, str) and not all(0 <= token < known for token in one):
                raise RequestError(f"prompt has token ids outside of the model's 0 to {known - 1}", param="prompt")
        return [self._lm.encode(one) if isinstance(one, str) else list(one) for one in asked.prompts], ()

    def _max_tokens(self, asked: Asked, rows: int, *, longest: int) -> int:
        room = self._lm.seq_len - longest
        wanted = asked.max_tokens
        if wanted is None:
            wanted = max(1, min(room, CHAT_TOKENS if asked.is_chat else COMPLETION_TOKENS))
        if wanted > room:
            raise RequestError(
                f"the model's context is {self._lm.seq_len} tokens: the prompt has {longest}, {wanted} were asked for",
                param="messages" if asked.is_chat else "prompt",
                code="context_length_exceeded",
            )
        if rows > 1 and rows * (longest + wanted) > MOST_TOKENS:
            raise RequestError(
                f"at most {MOST_TOKENS} tokens a request: {rows} texts of up to {longest + wanted} were asked for",
                param="max_tokens",
            )
        return wanted


class EventStream(Response):
    """Server-sent events: a JSON object each, then [DONE]. An error after the first byte is an event too."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, events: "asyncio.Queue[Event]", answer: Answer) -> None:
        super().__init__(headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._job, self._events, self._answer = job, events, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what comes, as it comes."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def write(value: dict[str, Any] | None) -> None:
            if value is not None:
                body = f"data: {json.dumps(value)}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})

        with contextlib.suppress(ClientDisconnect):
            async with _following(self._job, self._events, receive) as following:
                for row in range(len(self._job.prompts)):
                    await write(self._answer.first(row))
                async for event in following:
                    for chunk in self._chunks(event):
                        await write(chunk)
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    def _chunks(self, event: Event) -> list[dict[str, Any]]:
        if isinstance(event, Piece):
            return [self._answer.piece(event.row, event.text)]
        if isinstance(event, Failed):
            return [event.error.body]
        ends = [self._answer.last(row, completion) for row, completion in enumerate(event.completions)]
        usage = self._answer.total(event.completions, self._job.prompts)
        return [*ends, usage] if self._answer.asked.include_usage else ends


@contextlib.asynccontextmanager
async def _following(job: Job, events: "asyncio.Queue[Event]", receive: Receive) -> AsyncIterator[AsyncIterator[Event]]:
    """A job's events to its last. Whoever stops following, for whatever reason, does not want the rest.

    Iterating raises ClientDisconnect once the client is gone.
    """
    gone = asyncio.create_task(_until_gone(receive))

    async def iterate() -> AsyncGenerator[Event, None]:
        while True:
            coming = asyncio.create_task(events.get())
            await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                raise ClientDisconnect
            event = coming.result()
            yield event
            if not isinstance(event, Piece):
                return

    try:
        async with contextlib.aclosing(iterate()) as following:
            yield following
    finally:
        job.cancelled.set()
        gone.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _teller(events: "asyncio.Queue[Event]") -> Callable[[Event], None]:
    loop = asyncio.get_running_loop()

    def tell(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever would listen
            loop.call_soon_threadsafe(events.put_nowait, event)

    return tell


async def _body(request: Request) -> bytes:
    """The body. Raises RequestError if it is too large, too slow, or said to be something else than JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Pages of other sites can send forms and plain text here without being asked; JSON they cannot.
        raise RequestError("the Content-Type must be application/json", status=415)
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > MOST_BYTES:
                    raise RequestError(
                        f"the body must have at most {MOST_BYTES} bytes", status=413, code="request_too_large"
                    )
                parts.append(part)
    except TimeoutError as error:
        raise RequestError(f"the body did not come within {BODY_SECONDS:g} s", status=408) from error
    return b"".join(parts)


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"Connection": "close"} if error.status in (408, 413) else None  # the rest of the body is not read
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(RequestError(text).body, status_code=error.status_code, headers=error.headers)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_defect(request: Request, error: Exception) -> Response:
    body = RequestError("the server failed", type="server_error").body
    return JSONResponse(body, status_code=500)
