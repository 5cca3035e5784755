"""What a user writes under `stream:`. Torch-free."""

from dataclasses import dataclass
from typing import Literal

from steerscale.config import require
from steerscale.parallel.layout import ParallelConfig, ParallelLayout


@dataclass(frozen=True, kw_only=True)
class ProducersConfig:
    """Ranks of their own for the language model, beside those of `parallel`, which train; its layout on them."""

    tensor: int = 1
    """Tensor-parallel ranks."""
    pipeline: int = 1
    """Pipeline stages."""
    data: int = 1
    """Replicas; each makes the vectors of its part of the lanes, so it must divide stream.lanes."""
    sequence: bool = False
    """Sequence parallelism over the tensor group."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "data"):
            require(getattr(self, name) >= 1, f"stream.producers.{name} must be at least 1, got {getattr(self, name)}")
        require(
            not self.sequence or self.tensor > 1,
            "stream.producers.sequence=true needs stream.producers.tensor > 1: it splits along the tensor group",
        )

    def layout(self) -> ParallelLayout:
        """The producers' layout."""
        degrees = {"tensor": self.tensor, "pipeline": self.pipeline, "data": self.data}
        return ParallelLayout.resolve(ParallelConfig(**degrees, sequence=self.sequence))


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Where activations come from, and how they are shuffled."""

    lm: str
    """The language model: a run directory of ours, or a Hugging Face model directory."""
    lm_kind: Literal["auto", "gpt", "transformers"] = "auto"
    """gpt: our GPT, sharded over the run's layout, hooks like blocks.3.hook_resid_post; transformers: any model transformers
    can load, whole on every tensor rank, hooks are module paths like model.layers.3; auto: gpt wherever that is possible."""
    checkpoint: str | None = None
    """Checkpoint directory of the run; null: its newest."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the language model, whatever the SAE trains in; auto: the run's own, or the one its Hugging Face files are in."""
    seq_len: int | None = None
    """Tokens of a sequence the model reads; null: as long as it was made for."""
    micro_batch_size: int = 8
    """Sequences in one forward pass of the language model on one replica; at most a lane's block is run at once."""
    lanes: int = 16
    """Independent sequences of blocks that batches are dealt from, in equal parts. A multiple of parallel.data, and a divisor
    of the global batch. Part of the order: runs with another number see the vectors in another order."""
    buffer_gib: float = 1.0
    """Size of the shuffle buffer in GiB, all ranks of the run together, all hooks; half of it is being consumed while the
    other half is filled. Part of the order."""
    buffer_vectors: int = 262144
    """At most so many vectors in it: half of them are made before the first step. Part of the order."""
    buffer_device: Literal["device", "host"] = "device"
    """Whose memory holds the buffer."""
    buffer_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the buffered vectors; auto: the language model's."""
    drop_special: bool = True
    """Leave out begin, end, padding and unknown tokens: their activations are outliers that no feature explains."""
    drop_first: int = 0
    """Leave out so many first positions of each sequence."""
    overlap: bool = True
    """On CUDA, run the language model on a stream of its own beside training."""
    producers: ProducersConfig | None = None
    """Ranks apart for the language model, started beside those of `parallel`; null: it lives on the ranks that train."""
    cache: str | None = None
    """Directory that keeps activations between runs; for small cases: every token takes its width times its bytes."""

    def __post_init__(self) -> None:
        require(bool(self.lm.strip()), "stream.lm must name a run directory or a Hugging Face model directory, got ''")
        for name in ("micro_batch_size", "lanes", "buffer_vectors"):
            require(getattr(self, name) >= 1, f"stream.{name} must be at least 1, got {getattr(self, name)}")
        require(self.seq_len is None or self.seq_len >= 1, f"stream.seq_len must be positive, got {self.seq_len}")
        require(self.buffer_gib > 0, f"stream.buffer_gib must be positive, got {self.buffer_gib}")
        require(self.drop_first >= 0, f"stream.drop_first must not be negative, got {self.drop_first}")
