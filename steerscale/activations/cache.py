"""Activations kept on disk, for small cases: several SAEs on one layer of a small model over little text.

    DIR/<model>/<hook>/<key>.safetensors    one forward pass: x [B, S, d] in the model's precision

The key is a digest of the pass's tokens, so the files serve any order, seed, layout and number of epochs, as long as the same
sequences stand together in a pass.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from steerscale.activations.source import ActivationSource
from steerscale.errors import DataError
from steerscale.models.hooks import HookFunction
from steerscale.parallel.context import ParallelContext


class CachedSource:
    """A source that runs its model only on batches it has not seen; the directory must be shared by all ranks."""

    def __init__(self, source: ActivationSource, directory: Path, context: ParallelContext) -> None:
        self._source, self._context = source, context
        self._directories = {hook: directory / source.identity / hook for hook in source.owned}
        try:
            for path in self._directories.values():
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"stream.cache={directory} cannot be written: {error.strerror}") from error
        self.widths, self.owned, self.dtype, self.seq_len = source.widths, source.owned, source.dtype, source.seq_len
        self.special_ids, self.tokenizer_hash = source.special_ids, source.tokenizer_hash
        self.vocab_size, self.identity, self.in_order = source.vocab_size, source.identity, source.in_order

    def run(self, batches: Iterable[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """See `ActivationSource.run`."""
        for tokens_BS in batches:
            shape = "x".join(map(str, tokens_BS.shape))
            key = hashlib.blake2b(tokens_BS.cpu().numpy().tobytes(), digest_size=16).hexdigest()
            files = {hook: path / f"{shape}-{key}.safetensors" for hook, path in self._directories.items()}
            if self._all_agree(all(file.is_file() for file in files.values())):
                yield {hook: self._load(file) for hook, file in files.items()}
                continue
            (activations,) = self._source.run([tokens_BS])
            if self._context.at.tensor == 0:
                for hook, x_BSd in activations.items():
                    _save(files[hook], x_BSd)
            yield activations

    def losses(
        self, tokens_BS: torch.Tensor, labels_BS: torch.Tensor, functions: Mapping[str, HookFunction]
    ) -> torch.Tensor | None:
        """See `ActivationSource.losses`; nothing of it is kept."""
        return self._source.losses(tokens_BS, labels_BS, functions)

    def close(self) -> None:
        """Wait for messages that are on their way."""
        self._source.close()

    def _all_agree(self, there: bool) -> bool:
        # One integer over the replica: its ranks run the model together or not at all, whatever each of them sees on disk.
        answer = torch.tensor(int(there), device=self._context.device)
        dist.all_reduce(answer, op=dist.ReduceOp.MIN, group=self._context.groups.mp)
        return bool(answer.item())

    def _load(self, file: Path) -> torch.Tensor:
        try:
            return load_file(file, device=str(self._context.device))["x"]
        except (SafetensorError, OSError, KeyError) as error:
            raise DataError(f"{file} in stream.cache is damaged ({error}): remove it") from error


def _save(file: Path, x_BSd: torch.Tensor) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file({"x": x_BSd.contiguous()}, temporary)
        temporary.replace(file)  # never half-written where a reader looks
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{file} in stream.cache cannot be written: {error}") from error
