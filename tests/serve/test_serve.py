"""The server by OpenAI's own client: texts as `generate` makes them, recipes, streams, errors, many at once."""

import json
import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch

from steerscale.generation import generate
from steerscale.sampling import GREEDY, Sampling
from steerscale.tokenizers.display import token_texts
from tests.serve.conftest import MODEL, Served

# `initialize` quiets these while it lasts; pytest sets all filters anew for every test.
pytestmark = pytest.mark.filterwarnings("ignore:::megatron")

PROMPT = "Das Paket"


def expected(
    served: Served, prompt: str = PROMPT, recipe: str | None = None, strength: float = 1.0, max_tokens: int = 12
) -> str:
    """Greedy text."""
    functions = served.catalogue.functions(recipe, strength)
    return generate(served.lm, [served.lm.encode(prompt)], GREEDY, max_tokens=max_tokens, functions=functions)[0].text


def complete(served: Served, **more: Any) -> Any:
    """A completion of 12 tokens, greedy unless asked otherwise."""
    chosen = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **more}
    return served.client.completions.create(**chosen)


def test_models_are_the_model_and_its_recipes(served: Served) -> None:
    names = [model.id for model in served.client.models.list()]
    assert names == ["tiny", "tiny:formal", "tiny:polite.v2"]
    assert served.client.models.retrieve("tiny:formal").id == "tiny:formal"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("tiny:rude")
    assert served.send("/health") == (200, {"status": "ok"})


def test_completion_is_what_generate_makes(served: Served) -> None:
    found = complete(served)
    assert found.choices[0].text == expected(served)
    assert found.choices[0].finish_reason == "length"
    assert found.object == "text_completion"
    tokens = served.lm.encode(PROMPT)
    assert found.usage.prompt_tokens == len(tokens)
    assert (found.usage.completion_tokens, found.usage.total_tokens) == (12, len(tokens) + 12)
    assert complete(served, prompt=tokens).choices[0].text == found.choices[0].text
    both = complete(served, prompt=[PROMPT, "Die Datei"], n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices] == [expected(served)] * 2 + [expected(served, "Die Datei")] * 2
    assert both.usage.completion_tokens == 48
    assert both.usage.prompt_tokens == len(tokens) + len(served.lm.encode("Die Datei"))
    assert served.client.completions.create(model="tiny", prompt=PROMPT).usage.completion_tokens <= 16  # type: ignore[union-attr]


def test_sampling_settings_and_seeds_reach_the_model(served: Served) -> None:
    settings = {"temperature": 1.3, "top_p": 0.9, "seed": 5}
    one, same = complete(served, n=3, **settings), complete(served, n=3, **settings)
    texts = [choice.text for choice in one.choices]
    assert texts == [choice.text for choice in same.choices]
    assert len(set(texts)) == 3
    sampling = Sampling(temperature=1.3, top_p=0.9, seed=5, top_k=30, min_p=0.01, repetition_penalty=1.2)
    (own,) = generate(served.lm, [served.lm.encode(PROMPT)], sampling, max_tokens=12)
    extra = {"top_k": 30, "min_p": 0.01, "repetition_penalty": 1.2}
    assert complete(served, **settings, extra_body=extra).choices[0].text == own.text
    unseeded = {complete(served, temperature=1.3).choices[0].text for _ in range(4)}
    assert len(unseeded) > 1


def test_stop_strings_end_a_text(served: Served) -> None:
    whole = expected(served)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    found = complete(served, stop=["\0never", stop])
    assert found.choices[0].text == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    assert complete(served, stop=stop).choices[0].text == found.choices[0].text


def test_streams_say_the_same_as_whole_answers(served: Served) -> None:
    settings: dict[str, Any] = {"prompt": [PROMPT, "Die Datei"], "temperature": 1.0, "seed": 3, "n": 2}
    chunks = list(complete(served, stream=True, stream_options={"include_usage": True}, **settings))
    whole = complete(served, **settings)
    texts, ends = ["", "", "", ""], {}
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 15
    without = list(complete(served, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in without)


def test_chat_without_a_template_is_the_plain_format(served: Served) -> None:
    turns: list[Any] = [
        {"role": "system", "content": "Sei kurz."},
        {"role": "user", "content": [{"type": "text", "text": "Was ist "}, {"type": "text", "text": "das?"}]},
        {"role": "assistant", "content": "Ein Paket."},
        {"role": "user", "content": "Und das?"},
    ]
    prompt = "Sei kurz.\n\nUser: Was ist das?\nAssistant: Ein Paket.\nUser: Und das?\nAssistant:"
    ask: dict[str, Any] = {"model": "tiny", "messages": turns, "temperature": 0}
    found = served.client.chat.completions.create(**ask, max_completion_tokens=12)
    assert found.choices[0].message.content == expected(served, prompt)
    assert found.choices[0].message.role == "assistant"
    assert found.usage.prompt_tokens == len(served.lm.encode(prompt))
    chunks = list(served.client.chat.completions.create(**ask, max_tokens=12, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected(served, prompt)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_recipes_are_chosen_by_name_or_field(served: Served) -> None:
    steered = expected(served, recipe="formal")
    assert steered != expected(served)
    assert complete(served, model="tiny:formal").choices[0].text == steered
    assert complete(served, extra_body={"recipe": "formal"}).choices[0].text == steered
    assert complete(served, model="tiny:formal", extra_body={"recipe": "formal"}).choices[0].text == steered
    assert complete(served, model="tiny:formal", extra_body={"strength": 0}).choices[0].text == expected(served)
    strong = complete(served, model="tiny:polite.v2", extra_body={"strength": -3.5}).choices[0].text
    assert strong == expected(served, recipe="polite.v2", strength=-3.5)
    for strength in range(40):  # more than are kept
        complete(served, max_tokens=1, extra_body={"recipe": "formal", "strength": strength / 8})
    assert complete(served, model="tiny:formal").choices[0].text == steered
    assert complete(served).choices[0].text == expected(served)


@pytest.mark.parametrize("recipe", [None, "formal"])
def test_logprobs_are_the_models_own(served: Served, recipe: str | None) -> None:
    model = "tiny" if recipe is None else f"tiny:{recipe}"
    found = complete(served, model=model, logprobs=3).choices[0].logprobs
    functions = served.catalogue.functions(recipe, 1.0)
    prompt = served.lm.encode(PROMPT)
    (own,) = generate(served.lm, [prompt], GREEDY, max_tokens=12, functions=functions)
    text = torch.tensor([[*prompt, *own.tokens]])
    losses_1S = served.lm.losses(text[:, :-1].contiguous(), text[:, 1:].contiguous(), functions)
    assert losses_1S is not None
    assert found.token_logprobs == pytest.approx((-losses_1S[0, len(prompt) - 1 :]).tolist(), abs=1e-4)
    # Greedy: every token is the most probable one.
    assert [max(best.values()) for best in found.top_logprobs] == found.token_logprobs
    assert max(len(best) for best in found.top_logprobs) == 3
    assert found.tokens == [text for text, _ in token_texts(served.lm.tokenizer, own.tokens)]
    assert found.text_offset == [len("".join(found.tokens[:index])) for index in range(12)]
    turns: list[Any] = [{"role": "user", "content": "Hallo"}]
    chat = served.client.chat.completions.create(
        model=model, messages=turns, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert [entry.logprob for entry in content] == [entry.top_logprobs[0].logprob for entry in content]
    assert bytes(content[0].bytes or []).decode() == content[0].token


CHAT = [{"role": "user", "content": "x"}]
BAD: list[tuple[bytes | dict[str, Any], int, str | None]] = [
    (b"", 400, None),
    (b"{", 400, None),
    (b"[1]", 400, None),
    (b'"x"', 400, None),
    (b"\xff\xfe{}", 400, None),
    (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400, None),
    (b'{"model": "tiny", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", 400, None),
    (b"[" * 100_000, 400, None),
    (b'{"model": "tiny", "prompt": "half a character: \\ud800"}', 400, None),
    (b'{"model": "tiny", "prompt": "x", "\\udfff": 1}', 400, None),
    ({"prompt": "x"}, 400, "model"),
    ({"model": 5, "prompt": "x"}, 400, "model"),
    ({"model": "gpt-4", "prompt": "x"}, 404, "model"),
    ({"model": "tiny:", "prompt": "x"}, 404, "model"),
    ({"model": "tiny:../formal", "prompt": "x"}, 404, "model"),
    ({"model": "tiny"}, 400, "prompt"),
    ({"model": "tiny", "prompt": []}, 400, "prompt"),
    ({"model": "tiny", "prompt": [[]]}, 400, "prompt"),
    ({"model": "tiny", "prompt": [1, "x"]}, 400, "prompt"),
    ({"model": "tiny", "prompt": [1.5]}, 400, "prompt"),
    ({"model": "tiny", "prompt": [99999]}, 400, "prompt"),
    ({"model": "tiny", "prompt": [-1]}, 400, "prompt"),
    ({"model": "tiny", "prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    ({"model": "tiny", "prompt": "x", "max_tokens": 1e3}, 400, "max_tokens"),
    ({"model": "tiny", "prompt": "x", "max_tokens": True}, 400, "max_tokens"),
    ({"model": "tiny", "prompt": "x", "max_tokens": 10**30}, 400, "max_tokens"),
    ({"model": "tiny", "prompt": "x", "max_tokens": MODEL.seq_len}, 400, "prompt"),
    ({"model": "tiny", "prompt": "wort " * 1600}, 400, "prompt"),
    ({"model": "tiny", "prompt": ["x"] * 64, "max_tokens": 1200}, 400, "max_tokens"),
    ({"model": "tiny", "prompt": "x", "temperature": -1}, 400, "temperature"),
    ({"model": "tiny", "prompt": "x", "temperature": 1e308}, 400, "temperature"),
    ({"model": "tiny", "prompt": "x", "temperature": "1"}, 400, "temperature"),
    ({"model": "tiny", "prompt": "x", "top_p": 0}, 400, "top_p"),
    ({"model": "tiny", "prompt": "x", "repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"model": "tiny", "prompt": "x", "n": 65}, 400, "n"),
    ({"model": "tiny", "prompt": ["x"] * 33, "n": 2}, 400, "n"),
    ({"model": "tiny", "prompt": "x", "stop": [""]}, 400, "stop"),
    ({"model": "tiny", "prompt": "x", "stop": ["x"] * 17}, 400, "stop"),
    ({"model": "tiny", "prompt": "x", "seed": 2**63}, 400, "seed"),
    ({"model": "tiny", "prompt": "x", "logprobs": 21}, 400, "logprobs"),
    ({"model": "tiny", "prompt": "x", "logprobs": 2, "stream": True}, 400, "logprobs"),
    ({"model": "tiny", "prompt": "x", "stream": "yes"}, 400, "stream"),
    ({"model": "tiny", "prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"model": "tiny", "prompt": "x", "logit_bias": {"5": 3}}, 400, "logit_bias"),
    ({"model": "tiny", "prompt": "x", "presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"model": "tiny", "prompt": "x", "best_of": 3}, 400, "best_of"),
    ({"model": "tiny", "prompt": "x", "max_token": 3}, 400, "max_token"),
    ({"model": "tiny", "prompt": "x", "recipe": "rude"}, 400, "recipe"),
    ({"model": "tiny", "prompt": "x", "recipe": "/etc/passwd"}, 400, "recipe"),
    ({"model": "tiny:formal", "prompt": "x", "recipe": "polite.v2"}, 400, "recipe"),
    ({"model": "tiny", "prompt": "x", "strength": 2}, 400, "strength"),
    ({"model": "tiny:formal", "prompt": "x", "strength": 1e9}, 400, "strength"),
    ({"model": "tiny", "messages": []}, 400, "messages"),
    ({"model": "tiny", "messages": ["x"]}, 400, "messages[0]"),
    ({"model": "tiny", "messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role"),
    ({"model": "tiny", "messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
    (
        {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0].content[0]",
    ),
    ({"model": "tiny", "messages": [*CHAT, {"role": "assistant", "tool_calls": [1]}]}, 400, "messages[1].tool_calls"),
    ({"model": "tiny", "messages": CHAT, "tools": [{"type": "function"}]}, 400, "tools"),
    ({"model": "tiny", "messages": CHAT, "top_logprobs": 3}, 400, "top_logprobs"),
    ({"model": "tiny", "messages": CHAT, "response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"model": "tiny", "messages": CHAT, "prompt": "x"}, 400, "prompt"),
]


def check_error(served: Served, body: bytes | dict[str, Any], status: int, param: str | None) -> None:
    chat = isinstance(body, dict) and "messages" in body
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    found, answer = served.send("/v1/chat/completions" if chat else "/v1/completions", raw)
    assert found == status
    assert set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert 0 < len(error["message"]) < 400


@pytest.mark.parametrize(("body", "status", "param"), BAD, ids=[str(body)[:70] for body, *_ in BAD])
def test_bad_requests_get_errors_that_name_the_field(
    served: Served, body: bytes | dict[str, Any], status: int, param: str | None
) -> None:
    check_error(served, body, status, param)


def test_errors_reach_the_client_as_its_own(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature must be from 0 to 2") as caught:
        complete(served, temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="tiny:polite"):
        complete(served, model="gpt-4")


def test_values_without_effect_are_taken(served: Served) -> None:
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "best_of": 1, "echo": False}
    assert complete(served, user="me", suffix="", **neutral).choices[0].text == expected(served)


def test_requests_that_are_not_for_it_are_refused(served: Served) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 1}).encode()
    for headers, status in (
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Host": f"localhost:{served.port}", "Content-Type": "application/json; charset=utf-8"}, 200),
    ):
        assert served.send("/v1/completions", body, headers=headers)[0] == status
    assert served.send("/v1/engines")[0] == 404
    assert served.send("/v1/completions")[0] == 405


def test_steering_that_leaves_no_numbers_is_an_error_that_says_so(served: Served) -> None:
    functions = {"blocks.1.hook_resid_post": lambda x_BSM: x_BSM * float("inf")}
    key = ("formal", 999.0)
    served.catalogue._kept[key] = functions
    for more in ({}, {"logprobs": 2}, {"temperature": 1}):
        body = json.dumps({"model": "tiny:formal", "strength": 999, "prompt": PROMPT, "temperature": 0, **more})
        status, answer = served.send("/v1/completions", body.encode())
        assert (status, "not finite" in answer["error"]["message"]) == (400, True)
    del served.catalogue._kept[key]
    assert complete(served, temperature=1e-40).choices[0].text == expected(served)


def test_large_bodies_are_refused_whether_they_say_so_or_not(served: Served) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x" * 3_000_000}).encode()
    status, answer = served.send("/v1/completions", body)
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as raw:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        for _ in range(33):
            raw.sendall(piece)
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_hundred_requests_at_once_with_malformed_ones_among_them(served: Served) -> None:
    # One process has the server and a hundred clients: it is short of time, not of patience.
    client, wanted = served.client.with_options(timeout=500), {}
    for recipe in (None, "formal", "polite.v2"):
        wanted[recipe] = expected(served, recipe=recipe, max_tokens=4)

    def ask(number: int) -> None:
        recipe = [None, "formal", "polite.v2"][number % 3]
        settings: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        settings["extra_body"] = {"recipe": recipe}
        if number % 5 == 0:
            check_error(served, *BAD[number // 5])
        elif number % 5 == 1:
            chunks = client.completions.create(**settings, stream=True)
            assert "".join(chunk.choices[0].text for chunk in chunks) == wanted[recipe]
        else:
            assert client.completions.create(**settings).choices[0].text == wanted[recipe]

    with ThreadPoolExecutor(100) as threads:
        list(threads.map(ask, range(100)))
    assert complete(served).choices[0].text == expected(served)


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_generation(
    served: Served, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    body = json.dumps({"model": "tiny", "prompt": ["x"] * 64, "max_tokens": 185, "stream": stream, "seed": 1})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with caplog.at_level(logging.INFO, logger="steerscale.serve"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as raw:
            raw.sendall(f"{head}\r\n\r\n{body}".encode())
            if stream:
                assert raw.recv(100).startswith(b"HTTP/1.1 200 ")
            wait_for(lambda: "a generation begins" in caplog.text)
        wait_for(lambda: "a generation was cancelled" in caplog.text)
    assert complete(served).choices[0].text == expected(served)
