"""Parallel degrees, batch sizes and rank arithmetic. Torch-free: planners, launchers and workers share it.

Ranks are numbered as Megatron-Core does by default (tensor fastest, then data, then pipeline):
`rank = tensor_rank + tensor * (data_rank + data * pipeline_rank)`. DeepSpeed's pipe/data/model axes agree with it.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from steerscale.config import require
from steerscale.errors import LayoutError
from steerscale.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """What a user writes under `parallel:`; `ParallelLayout.resolve` turns it into a checked layout."""

    tensor: int = 1
    """Tensor-parallel ranks (TP): each matrix is split over this many."""
    pipeline: int = 1
    """Pipeline stages (PP)."""
    virtual_pipeline: int = 1
    """Model chunks a stage (interleaved 1F1B); 1: plain 1F1B."""
    data: int = 1
    """Data-parallel replicas (DP)."""
    sequence: bool = False
    """Sequence parallelism: norms, dropouts and residuals are split along the sequence over the TP group."""
    micro_batch_size: int = 1
    """Sequences in one forward/backward pass of one replica (MBS)."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches a replica accumulates in one optimizer step (GAS)."""
    global_batch_size: int | None = None
    """Sequences in one optimizer step, over all replicas; give this or gradient_accumulation_steps."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "virtual_pipeline", "data", "micro_batch_size"):
            require(getattr(self, name) >= 1, f"parallel.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("gradient_accumulation_steps", "global_batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"parallel.{name} must be at least 1 or null, got {value}")


class Coordinates(NamedTuple):
    """Where a rank stands on the mesh."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """A checked layout: every degree and every batch size is known and they fit each other."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    data: int = 1
    sequence: bool = False
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 1

    @classmethod
    def resolve(cls, config: ParallelConfig, *, world_size: int | None = None) -> "ParallelLayout":
        """Derive the missing batch size and check the degrees against each other and, if given, the number of ranks.

        Raises LayoutError naming the numbers that do not fit.
        """
        per_step = config.micro_batch_size * config.data
        accumulation, total = config.gradient_accumulation_steps, config.global_batch_size
        if total is not None and total % per_step:
            raise LayoutError(
                f"parallel.global_batch_size={total} is not divisible by micro_batch_size x data = "
                f"{config.micro_batch_size} x {config.data} = {per_step}; nearest that is: "
                f"{max(round(total / per_step), 1) * per_step}"
            )
        if accumulation is None:
            accumulation = total // per_step if total is not None else 1
        elif total is not None and accumulation * per_step != total:
            raise LayoutError(
                f"parallel.gradient_accumulation_steps={accumulation} and parallel.global_batch_size={total} disagree: "
                f"GAS x MBS x DP = {accumulation} x {config.micro_batch_size} x {config.data} = "
                f"{accumulation * per_step}; set one of them to null"
            )
        layout = cls(
            tensor=config.tensor,
            pipeline=config.pipeline,
            virtual_pipeline=config.virtual_pipeline,
            data=config.data,
            sequence=config.sequence,
            micro_batch_size=config.micro_batch_size,
            gradient_accumulation_steps=accumulation,
        )
        layout._check_degrees()
        if world_size is not None and world_size != layout.world_size:
            raise LayoutError(
                f"{world_size} ranks are there, but tensor x pipeline x data = {layout.tensor} x {layout.pipeline} x "
                f"{layout.data} = {layout.world_size}; change parallel.* or the number of ranks"
            )
        return layout

    def _check_degrees(self) -> None:
        if self.sequence and self.tensor == 1:
            raise LayoutError("parallel.sequence=true needs parallel.tensor > 1: it splits along the tensor group")
        if self.virtual_pipeline > 1:
            if self.pipeline == 1:
                raise LayoutError(
                    f"parallel.virtual_pipeline={self.virtual_pipeline} needs parallel.pipeline > 1: "
                    "it interleaves the chunks of several stages"
                )
            if self.gradient_accumulation_steps % self.pipeline:
                raise LayoutError(
                    f"the interleaved schedule needs a number of micro-batches divisible by parallel.pipeline: "
                    f"GAS={self.gradient_accumulation_steps} is not divisible by {self.pipeline}"
                )

    def check_model(self, model: ModelConfig) -> None:
        """Check that `model` can be split this way. Raises LayoutError naming the numbers."""
        t = self.tensor
        for count, name in (
            (model.num_heads, "model.num_heads"),
            (model.kv_groups, "model.num_kv_groups"),
            (model.ffn_width, "model.d_ff"),
        ):
            if count % t:
                raise LayoutError(f"parallel.tensor must divide {name}: {t} does not divide {count}")
        if model.vocab_size is not None and model.padded_vocab % t:
            raise LayoutError(
                f"parallel.tensor must divide the padded vocabulary: {t} does not divide {model.padded_vocab} "
                f"(model.vocab_size={model.vocab_size} padded to a multiple of model.pad_vocab_to="
                f"{model.pad_vocab_to}); make model.pad_vocab_to a multiple of {t}"
            )
        if self.sequence and model.seq_len % t:
            raise LayoutError(
                f"parallel.tensor must divide model.seq_len under parallel.sequence: {t} does not divide {model.seq_len}"
            )
        chunks = self.pipeline * self.virtual_pipeline
        if model.num_layers % chunks:
            raise LayoutError(
                f"parallel.pipeline x parallel.virtual_pipeline must divide model.num_layers: {self.pipeline} x "
                f"{self.virtual_pipeline} = {chunks} does not divide {model.num_layers}"
            )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tensor * self.pipeline * self.data

    @property
    def global_batch_size(self) -> int:
        """Sequences in one optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.data

    @property
    def bubble_fraction(self) -> float:
        """Idle share of the pipeline over the ideal time, (p-1)/(v m) (Narayanan et al. 2021, section 2.2)."""
        return (self.pipeline - 1) / (self.virtual_pipeline * self.gradient_accumulation_steps)

    def coordinates(self, rank: int) -> Coordinates:
        """Place of a global rank on the (pipeline, data, tensor) mesh."""
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} does not exist: the layout has ranks 0 to {self.world_size - 1}")
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(pipeline=pipeline, data=data, tensor=tensor)

    def with_global_batch(self, size: int) -> "ParallelLayout":
        """The same layout accumulating to another global batch size, for ramp-up. Raises LayoutError if it cannot."""
        per_step = self.micro_batch_size * self.data
        if size < per_step or size % per_step:
            raise LayoutError(f"a global batch of {size} is not a positive multiple of MBS x DP = {per_step}")
        layout = replace(self, gradient_accumulation_steps=size // per_step)
        layout._check_degrees()
        return layout

    def __str__(self) -> str:
        virtual = f"x{self.virtual_pipeline}" if self.virtual_pipeline > 1 else ""
        sequence = "+SP" if self.sequence else ""
        return (
            f"TP{self.tensor}{sequence} PP{self.pipeline}{virtual} DP{self.data} "
            f"MBS{self.micro_batch_size} GAS{self.gradient_accumulation_steps}"
        )
