"""Keys and values of the positions that a model has seen, so that the next token costs one position instead of all.

Our attention asks the cache; Megatron-Core's own inference contexts differ between its versions and know one length for a
whole batch. A position's slot is its number: texts of different lengths share a batch, padded on the right, and what padding
left in a slot is overwritten by the token that comes there.

Shapes: B texts, S new positions, L slots, G key/value heads of this rank, D head width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from steerscale.models.gpt import GPT


class KeyValueCache:
    """What all layers of a rank share: the positions of the forward pass that runs, and who may attend where."""

    def __init__(self, batch_size: int, length: int) -> None:
        self.batch_size, self.length = batch_size, length
        self.positions_BS = torch.zeros(batch_size, 0, dtype=torch.int64)
        self.mask_B1SL = torch.zeros(batch_size, 1, 0, 0, dtype=torch.bool)

    def begin(self, positions_BS: torch.Tensor) -> None:
        """A forward pass over these positions comes; all before them have been run."""
        used = int(positions_BS.max()) + 1
        assert used <= self.length, (used, self.length)
        self.positions_BS = positions_BS
        slots_L = torch.arange(used, device=positions_BS.device)
        self.mask_B1SL = (slots_L <= positions_BS.unsqueeze(2)).unsqueeze(1)


class LayerCache:
    """Keys and values of one layer."""

    def __init__(self, shared: KeyValueCache) -> None:
        self._shared = shared
        self._keys_BGLD: torch.Tensor | None = None
        self._values_BGLD: torch.Tensor | None = None

    @property
    def mask(self) -> torch.Tensor:
        """bool [B, 1, S, L], True where a new position may attend to a slot."""
        return self._shared.mask_B1SL

    def extend(self, k_BGSD: torch.Tensor, v_BGSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep new keys and values; those of all slots in use, [B, G, L, D]."""
        if self._keys_BGLD is None or self._values_BGLD is None:
            batch_size, heads, _, width = k_BGSD.shape
            # Zeros: slots between a short text's end and the longest one's are masked, but nan times 0 is nan.
            self._keys_BGLD = k_BGSD.new_zeros(batch_size, heads, self._shared.length, width)
            self._values_BGLD = torch.zeros_like(self._keys_BGLD)
        slots_B1SD = self._shared.positions_BS[:, None, :, None].expand_as(k_BGSD)
        self._keys_BGLD.scatter_(2, slots_B1SD, k_BGSD)
        self._values_BGLD.scatter_(2, slots_B1SD, v_BGSD)
        used = self._shared.mask_B1SL.shape[-1]
        return self._keys_BGLD[:, :, :used], self._values_BGLD[:, :, :used]


@contextmanager
def cached(chunks: Sequence[GPT], batch_size: int, length: int) -> Iterator[KeyValueCache]:
    """Let the layers of `chunks` keep keys and values of up to `length` positions, until the context ends."""
    shared = KeyValueCache(batch_size, length)
    layers: list[Any] = [layer for chunk in chunks for layer in chunk.decoder.layers]
    attentions = [layer.self_attention.core_attention for layer in layers]
    for attention in attentions:
        attention.cache = LayerCache(shared)
    try:
        yield shared
    finally:
        for attention in attentions:
            attention.cache = None
