"""A small language model with recipes, served in this process."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
import yaml

from steerscale.language_model import LanguageModel, load_language_model
from steerscale.models.hf.export import export_hf
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.sae.formats import write_sae
from steerscale.serve.app import make_app
from steerscale.serve.catalogue import Catalogue, open_recipes
from steerscale.serve.run import LOOPBACK_NAMES, listen
from steerscale.tokenizers.registry import load_tokenizer
from tests.interp.saes import random_sae
from tests.models.gpts import LLAMA, build_random

MODEL = replace(LLAMA, seq_len=1536, vocab_size=1000, init_std=0.4)


@pytest.fixture(scope="session")
def lm_directory(german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a random model with a German tokenizer."""
    directory = tmp_path_factory.mktemp("serve") / "tiny"
    with initialize(ParallelLayout()) as context:
        export_hf(build_random(MODEL, context), context, directory)
    load_tokenizer(german_data / "tokenizer").save(directory)
    return directory


@pytest.fixture(scope="session")
def recipes(lm_directory: Path) -> Path:
    """Two recipes of one SAE."""
    directory = lm_directory.parent / "recipes"
    directory.mkdir()
    write_sae(random_sae(MODEL.d_model), directory / "sae")
    for name, latent in (("formal", 3), ("polite.v2", 41)):
        recipe: dict[str, Any] = {
            "saes": [{"path": str(directory / "sae"), "edits": [{"latent": latent, "target": 9.0}]}]
        }
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return directory


@dataclass
class Served:
    """A running server, and what it serves."""

    lm: LanguageModel
    catalogue: Catalogue
    port: int
    client: openai.OpenAI
    """OpenAI's own."""

    def send(
        self, path: str, body: bytes | None = None, *, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a raw request; with a body a POST of JSON, unless headers say otherwise."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=500)
        try:
            chosen = {"Content-Type": "application/json", **(headers or {})}
            connection.request("GET" if body is None else "POST", path, body=body, headers=chosen)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()


@pytest.fixture(scope="module")
def served(lm_directory: Path, recipes: Path) -> Iterator[Served]:
    """The server in a thread; with the end of the tests it has to end."""
    torch.manual_seed(0)
    with initialize(ParallelLayout()) as context, listen("127.0.0.1", 0) as listening:
        lm = load_language_model(lm_directory, context)
        catalogue = Catalogue(lm, "tiny", open_recipes([recipes], lm_directory))
        app = make_app(lm, catalogue, hosts=LOOPBACK_NAMES)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=10))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        port = listening.getsockname()[1]
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300
        ) as client:
            yield Served(lm, catalogue, port, client)
        server.should_exit = True
        thread.join(timeout=60)
        assert not thread.is_alive()
