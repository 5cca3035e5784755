"""What trainers need to know of a language model that is elsewhere."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from steerscale.activations.config import StreamConfig
from steerscale.activations.source import ActivationSource
from steerscale.parallel.context import ParallelContext
from steerscale.parallel.link import Link

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def buffer_dtype(config: StreamConfig, source: ActivationSource) -> torch.dtype:
    """Precision of the buffered vectors."""
    return source.dtype if config.buffer_dtype == "auto" else DTYPES[config.buffer_dtype]


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """Of an `ActivationSource`, as its attributes of the same names; JSON-able."""

    widths: dict[str, int]
    stages: dict[str, int]
    """The pipeline stage of each hook, in the order a forward pass comes by them."""
    dtype: str
    seq_len: int
    special_ids: list[int]
    tokenizer_hash: str | None
    vocab_size: int
    identity: str

    @classmethod
    def of(cls, source: ActivationSource, context: ParallelContext) -> "SourceFacts":
        """A collective of the ranks that hold it: a few names a rank."""
        owned: list = [None] * context.layout.world_size
        dist.all_gather_object(owned, (context.at.pipeline, sorted(source.owned)))
        stages = {hook: stage for stage, hooks in owned for hook in hooks}
        return cls(
            widths=source.widths,
            stages={hook: stages[hook] for hook in source.in_order},
            dtype=next(name for name, dtype in DTYPES.items() if dtype == source.dtype),
            seq_len=source.seq_len,
            special_ids=sorted(source.special_ids),
            tokenizer_hash=source.tokenizer_hash,
            vocab_size=source.vocab_size,
            identity=source.identity,
        )

    def send(self, link: Link, ranks: Iterable[int]) -> None:
        """Tell these ranks: the length in bytes, then JSON."""
        text = torch.frombuffer(bytearray(json.dumps(asdict(self)).encode()), dtype=torch.uint8)
        for rank in ranks:
            link.send(torch.tensor([len(text)]), to=rank)
            link.send(text, to=rank)

    @classmethod
    def receive(cls, link: Link, source: int) -> "SourceFacts":
        """Wait for the word of a rank, however long it takes to load the model."""
        (length,) = link.receive((1,), torch.int64, source=source).tolist()
        return cls(**json.loads(bytes(link.receive((length,), torch.uint8, source=source).tolist())))
