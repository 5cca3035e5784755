"""All latents of an SAE as one self-contained HTML page that needs no network: density, values, contexts, tokens, neighbours.

The page holds one compressed block: a JSON head and little-endian arrays. No text of a model, a tokenizer or a corpus stands in
the page as markup: it is in the block, and the scripts make text nodes of it. The content security policy admits the page's own
script by its hash, and no connection.
"""

import base64
import gzip
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch

from steerscale.html_page import fill_template, script_hash
from steerscale.interp.best import Contexts
from steerscale.interp.features import TokenEffects
from steerscale.interp.latent_index import BINS_PER_OCTAVE, OCTAVES, LatentIndex
from steerscale.tokenizers.base import Tokenizer
from steerscale.tokenizers.display import token_texts

SCRIPTS = ("data.js", "search.js", "list.js", "latent.js", "main.js")
_NONE = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Heading:
    """What the page says about the whole."""

    name: str
    """Of the SAE."""
    model: str
    """Of the language model."""
    hook: str
    architecture: str
    text: str
    """Name of what was read."""


def latent_page(
    heading: Heading,
    index: LatentIndex,
    effects: tuple[TokenEffects, TokenEffects],
    neighbours: tuple[torch.Tensor, torch.Tensor],
    tokenizer: Tokenizer,
) -> str:
    """The page. `index` is of all latents in their order, `effects` and `neighbours` likewise."""
    assert index.latents == list(range(len(index.latents)))
    rows, length = index.tokens_RS.shape
    promoted, suppressed = effects
    histogram, first, last = _used_octaves(index)
    meta = {
        **asdict(heading),
        "num_latents": len(index.latents),
        "num_tokens": index.num_tokens,
        "seq_len": length,
        "width": index.width,
        "num_top": index.top.value_GK.shape[1],
        "num_drawn": index.drawn.value_GK.shape[1] // OCTAVES,
        "drawn": list(range(last - first)),
        "num_effects": promoted.tokens_JC.shape[1],
        "num_neighbours": neighbours[0].shape[1],
        "num_bins": histogram.shape[1],
        "bins_per_octave": BINS_PER_OCTAVE,
        "lowest_exponent": index.lowest_exponent + first,
    }
    assert rows * length < _NONE
    arrays = {
        "text": index.tokens_RS.flatten().numpy().astype("<u4"),
        "active": index.active_J.numpy().astype("<u4"),
        "mean": (index.total_J / index.active_J.clamp_min(1)).numpy().astype("<f4"),
        "largest": index.largest_J.numpy().astype("<f4"),
        "histogram": histogram.numpy().astype("<u4"),
        **_contexts("top", index.top, index),
        **_contexts("drawn", _octaves(index.drawn, first, last), index),
        **_tokens("promoted", promoted),
        **_tokens("suppressed", suppressed),
        "neighbour": neighbours[0].numpy().astype("<u4"),
        "cosine": neighbours[1].numpy().astype("<f4"),
    }
    size = max(tokenizer.vocab_size, int(index.tokens_RS.max()) + 1)
    texts = token_texts(tokenizer, range(size))
    special = [token for token, (_, is_text) in enumerate(texts) if not is_text]
    return _page(_pack({"meta": meta, "vocabulary": [text for text, _ in texts], "special": special}, arrays))


def _used_octaves(index: LatentIndex) -> tuple[torch.Tensor, int, int]:
    """The histogram of the octaves that any latent uses, the first of them, and the one after the last."""
    octaves = index.counts_JH.sum(dim=0).view(OCTAVES, BINS_PER_OCTAVE).sum(dim=1)
    used = octaves.nonzero().flatten().tolist() or [0]
    first, last = used[0], used[-1] + 1
    return index.counts_JH[:, first * BINS_PER_OCTAVE : last * BINS_PER_OCTAVE].contiguous(), first, last


def _octaves(contexts: Contexts, first: int, last: int) -> Contexts:
    kept = contexts.value_GK.shape[1] // OCTAVES
    return Contexts(*(part[:, first * kept : last * kept] for part in contexts))


def _contexts(name: str, contexts: Contexts, index: LatentIndex) -> dict[str, np.ndarray]:
    """Positions, values, and windows as shares of each latent's largest value in 255 steps."""
    largest = index.largest_J.clamp_min(torch.finfo(torch.float32).tiny).view(-1, 1, 1)
    shares = (contexts.window_GKW.float() / largest).clamp(0, 1) * 255
    there = contexts.position_GK >= 0
    # The smallest value still shows.
    levels = torch.where((contexts.window_GKW > 0) & there.unsqueeze(-1), shares.round().clamp_min(1), 0)
    return {
        f"{name}_position": np.where(there, contexts.position_GK, _NONE).astype("<u4"),
        f"{name}_value": torch.where(there, contexts.value_GK, 0).numpy().astype("<f4"),
        f"{name}_window": levels.to(torch.uint8).numpy(),
    }


def _tokens(name: str, effects: TokenEffects) -> dict[str, np.ndarray]:
    return {
        f"{name}_token": effects.tokens_JC.numpy().astype("<u4"),
        f"{name}_logit": effects.logits_JC.numpy().astype("<f4"),
    }


def _pack(head: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Length of the head, the head with each array's (type, offset, elements), the arrays: compressed, as base64."""
    places: dict[str, tuple[str, int, int]] = {}
    fixed = 0
    for name, array in arrays.items():
        places[name] = (array.dtype.str[1:], fixed, array.size)
        fixed += -(-array.nbytes // 8) * 8
    # Offsets have a width of their own, so that the head's length does not depend on where it ends.
    text = json.dumps({**head, "arrays": {name: [kind, 0, size] for name, (kind, _, size) in places.items()}})
    begin = -(-(4 + len(text.encode()) + 16 * len(places)) // 8) * 8
    described = {name: [kind, begin + offset, size] for name, (kind, offset, size) in places.items()}
    head_bytes = json.dumps({**head, "arrays": described}).encode().ljust(begin - 4)
    parts = [struct.pack("<I", len(head_bytes)), head_bytes]
    parts += [array.tobytes().ljust(-(-array.nbytes // 8) * 8, b"\0") for array in arrays.values()]
    return base64.b64encode(gzip.compress(b"".join(parts), compresslevel=6, mtime=0)).decode()


def _page(data: str) -> str:
    script = "\n".join(_part(name) for name in SCRIPTS)
    policy = (
        f"default-src 'none'; script-src {script_hash(script)}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {"POLICY": policy, "STYLE": _part("page.css"), "DATA": data, "SCRIPT": script}
    return fill_template(_part("page.html"), parts)


def _part(name: str) -> str:
    return resources.files("steerscale.interp").joinpath("browser", name).read_text(encoding="utf-8")
