"""The queue before the model, chat templates, recipes by name, sockets, and the command from start to signal."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import transformers

from steerscale.cli import main
from steerscale.errors import ConfigError, DataError, SteerscaleError
from steerscale.language_model import load_language_model
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.sampling import GREEDY
from steerscale.serve.catalogue import Catalogue, open_recipes
from steerscale.serve.chat import chat_prompt
from steerscale.serve.errors import RequestError
from steerscale.serve.request import Message
from steerscale.serve.run import LOOPBACK_NAMES, hosts_of, is_loopback, listen
from steerscale.serve.worker import Event, Failed, Finished, Job, ModelThread
from steerscale.testing.smollm2 import smollm2_directory
from steerscale.tokenizers.registry import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:::megatron")


def job(events: list[Event], *, wait: threading.Event | None = None, begun: threading.Event | None = None) -> Job:
    """Eight tokens; before them it says that it has begun, and waits."""

    def functions() -> dict[str, Any]:
        if begun is not None:
            begun.set()
        if wait is not None:
            assert wait.wait(60)
        return {}

    return Job(
        prompts=[[5, 6]],
        sampling=GREEDY,
        max_tokens=8,
        stop=(),
        functions=functions,
        logprobs=None,
        tell=events.append,
    )


def test_queue_has_an_end_and_jobs_run_in_their_order(lm_directory: Path) -> None:
    found: list[Event] = []
    with initialize(ParallelLayout()) as context:
        model = ModelThread(load_language_model(lm_directory, context), most_waiting=2)
        with pytest.raises(RequestError, match="ending") as early:
            model.submit(job(found))
        assert early.value.status == 503
        model.start()
        gate, begun = threading.Event(), threading.Event()
        model.submit(job(found, wait=gate, begun=begun))
        assert begun.wait(60)
        cancelled = job(found)
        model.submit(cancelled)
        model.submit(job(found))
        with pytest.raises(RequestError, match="2 requests are waiting") as full:
            model.submit(job(found))
        assert (full.value.status, full.value.code) == (503, "overloaded")
        cancelled.cancelled.set()
        model.submit(job(found))  # in the place of the one whose client has gone
        with pytest.raises(RequestError, match="2 requests are waiting"):
            model.submit(job(found))
        gate.set()
        while sum(isinstance(event, Finished) for event in found) < 3:
            assert model.is_alive
            time.sleep(0.005)  # the model's thread needs the interpreter
        model.stop()
    assert not any(isinstance(event, Failed) for event in found)
    assert sum(isinstance(event, Finished) for event in found) == 3


def test_stopping_turns_away_what_waits_and_ends_what_runs(lm_directory: Path) -> None:
    running: list[Event] = []
    waiting: list[Event] = []
    with initialize(ParallelLayout()) as context:
        model = ModelThread(load_language_model(lm_directory, context), most_waiting=1)
        model.start()
        gate, begun = threading.Event(), threading.Event()
        model.submit(job(running, wait=gate, begun=begun))
        assert begun.wait(60)
        model.submit(job(waiting))
        ending = threading.Thread(target=model.stop)
        ending.start()
        while model.is_alive:
            time.sleep(0.005)
        gate.set()
        ending.join(60)
        assert not ending.is_alive()
        with pytest.raises(RequestError, match="ending"):
            model.submit(job(waiting))
    for events in (running, waiting):
        assert isinstance(events[-1], Failed)
        assert events[-1].error.status == 503


def test_a_failing_job_does_not_end_the_thread(lm_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    found: list[Event] = []

    def fail() -> dict[str, Any]:
        raise ZeroDivisionError("a secret")

    with initialize(ParallelLayout()) as context:
        model = ModelThread(load_language_model(lm_directory, context))
        model.start()
        broken = job(found)
        broken.functions = fail
        model.submit(broken)
        model.submit(job(found))
        while not found or not isinstance(found[-1], Finished):
            assert model.is_alive
            time.sleep(0.005)
        model.stop()
    assert isinstance(found[0], Failed)
    assert (found[0].error.status, str(found[0].error)) == (500, "the generation failed")
    assert "a secret" in caplog.text


MESSAGES = [
    Message(role="system", content="Be brief."),
    Message(role="user", content="What is {{ 7 * 7 }}?"),
    Message(role="assistant", content="A question."),
    Message(role="user", content="Ja \u00fc <|im_end|>"),
]


def test_chat_template_is_rendered_as_transformers_does(lm_directory: Path) -> None:
    try:
        directory = smollm2_directory()
    except DataError as error:
        pytest.skip(str(error))
    theirs: Any = transformers.AutoTokenizer.from_pretrained(directory)
    ours = load_tokenizer(directory)
    for messages in (MESSAGES, MESSAGES[1:2]):
        turns = [{"role": message.role, "content": message.content} for message in messages]
        prompt, stop = chat_prompt(ours, messages)
        assert stop == ()
        assert prompt == theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ours.encode(prompt) == ids


def test_templates_can_refuse_and_cannot_get_out(lm_directory: Path) -> None:
    tokenizer = load_tokenizer(lm_directory)
    for template, message in (
        ("{{ raise_exception('no system') }}", "no system"),
        ("{% for m in messages %}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ messages[0]['content'] + 1 }}", "refuses"),
        ("{{ 1 / 0 }}", "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(RequestError, match=message) as caught:
            chat_prompt(tokenizer, MESSAGES)
        assert (caught.value.status, caught.value.param) == (400, "messages")
    tokenizer.chat_template = "{{ messages | tojson }}{{ eos_token }}{{ strftime_now('%Y')[:2] }}"
    assert chat_prompt(tokenizer, [Message(role="user", content="<ü>")])[0] == (
        '[{"role": "user", "content": "<ü>"}]' + tokenizer.piece(tokenizer.eos_id) + "20"
    )
    tokenizer.chat_template = "{% for m in messages %}{% generation %}<{{ m.content }}>{% endgeneration %}{% endfor %}."
    assert chat_prompt(tokenizer, MESSAGES[:2])[0] == "<Be brief.><What is {{ 7 * 7 }}?>."
    tokenizer.chat_template = "{{ messages[0] | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}"
    assert chat_prompt(tokenizer, [Message(role="user", content="ü")])[0] == r'{"content":"\u00fc","role":"user"}'


def test_recipes_have_names_that_can_be_asked_for(lm_directory: Path, recipes: Path, tmp_path: Path) -> None:
    one = recipes / "formal.yaml"
    assert list(open_recipes([one], lm_directory)) == ["formal"]
    (tmp_path / "formal.yml").write_text(one.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "no good.yml").write_text(one.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for paths, message in (
        ([recipes, tmp_path / "formal.yml"], "two recipes called formal"),
        ([tmp_path / "no good.yml"], "letters, digits"),
        ([tmp_path / "empty"], "holds no .yaml"),
        ([tmp_path / "none.yaml"], "none.yaml"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_recipes(paths, lm_directory)
    with initialize(ParallelLayout()) as context:
        lm = load_language_model(lm_directory, context)
        with pytest.raises(ConfigError, match="--name"):
            Catalogue(lm, "a:b")


def test_only_loopback_addresses_are_loopback() -> None:
    with listen("127.0.0.1", 0) as one, listen("localhost", 0) as two, listen("0.0.0.0", 0) as open_to_all:
        assert is_loopback(one)
        assert is_loopback(two)
        assert not is_loopback(open_to_all)
        assert hosts_of(open_to_all) is None
    with listen("127.0.0.2", 0) as another:  # what a machine's own name may be
        assert hosts_of(another) == {*LOOPBACK_NAMES, "127.0.0.2"}
    with listen("127.0.0.1", 0) as one, pytest.raises(SteerscaleError, match="choose another"):
        listen("127.0.0.1", one.getsockname()[1])
    with pytest.raises(SteerscaleError, match="cannot be used"):
        listen("no.such.host.invalid", 0)


def test_serve_command_refuses_what_it_cannot_do(
    lm_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, message in (
        ([str(lm_directory), "--port", "70000"], "--port must be"),
        ([str(lm_directory), "--recipes", str(tmp_path)], "holds no"),
        ([str(tmp_path / "none")], "none"),
    ):
        assert main(["serve", *arguments]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["serve", str(lm_directory)]) == 2
    assert "without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_command_answers_and_lets_what_runs_end_after_a_signal(
    number: signal.Signals, lm_directory: Path, recipes: Path
) -> None:
    command = [sys.executable, "-c", "import sys; from steerscale.cli import main; sys.exit(main())"]
    command += ["serve", str(lm_directory), "--recipes", str(recipes), "--port", "0"]
    # A shell's background jobs ignore Ctrl-C, and so would the server.
    restore = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **restore
    ) as server:  # type: ignore[call-overload]
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            found = re.match(r"(http://127\.0\.0\.1:\d+/v1)  tiny, tiny:formal, tiny:polite\.v2  ", line)
            assert found is not None, server.stderr.read() if server.stderr else ""
            with openai.OpenAI(base_url=found[1], api_key="none", max_retries=0, timeout=60) as client:
                settings: dict[str, Any] = {
                    "model": "tiny:formal",
                    "prompt": "Das",
                    "max_tokens": 150,
                    "temperature": 0,
                }
                whole = client.completions.create(**settings).choices[0].text
                stream = client.completions.create(**settings, stream=True)
                text = next(stream).choices[0].text
                server.send_signal(number)
                text += "".join(chunk.choices[0].text for chunk in stream)
            assert text == whole
            assert server.wait(timeout=60) == 0
            assert server.stderr is not None
            assert "Traceback" not in server.stderr.read()
        finally:
            server.kill()
