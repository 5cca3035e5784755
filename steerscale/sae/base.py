"""What all sparse autoencoders have in common: parameters cut along the latents, losses, dead latents, unit-norm decoder.

    B vectors of a micro-batch, d_in and d_out widths, n latents of which this tensor rank holds N = n / P, nnz active entries

Rank r of the tensor group owns latents [r N, (r+1) N): rows of W_enc and W_dec, and their biases. Its input is the same on all
ranks. Collectives of a forward pass over the tensor group: what the selection needs, one all-reduce of the partial
reconstructions (2 B d_out with AuxK), and one of a few sums to report; backward, one of b_dec's gradient through the encoder.
Parameters are float32, whatever the matrix products are computed in.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from steerscale.errors import LayoutError
from steerscale.parallel.context import ParallelContext
from steerscale.parallel.megatron import ModelType, TransformerConfig, tensor_parallel
from steerscale.parallel.select import Selection
from steerscale.parallel.shards import Shard
from steerscale.sae.config import SAESpec
from steerscale.sae.sparse import decode, pre_activations, selected_pre_activations

REPORTED = ("squared_error", "variance", "l0", "penalty", "aux_error")
"""Sums over vectors that a forward pass reports beside its loss: |x - x_hat|^2, |x - mean|^2, active latents, the sparsity
penalty, and AuxK's loss."""


class Encoded(NamedTuple):
    """The dense product of an encoder and what it was made of; pre-activations are outside of autograd."""

    x_Bd: torch.Tensor
    """What the encoder multiplied: scaled, less b_dec where that is subtracted."""
    pre_BN: torch.Tensor
    """Pre-activations of this rank's latents."""
    b_enc_N: torch.Tensor
    """b_enc, with b_dec's gradient attached."""


class Losses(NamedTuple):
    """Sums over a micro-batch."""

    total: torch.Tensor
    """To be differentiated: of the penalty it holds this rank's latents only."""
    complete: torch.Tensor
    """The same with all latents' penalty, to be reported."""
    reported: torch.Tensor
    """[len(REPORTED)], complete on every rank."""


@dataclass
class Scales:
    """What activations are multiplied by before anything else, and their mean after that; of the data, not trained."""

    input: torch.Tensor
    """Scalar float32."""
    output: torch.Tensor
    """Scalar float32; another only in a transcoder."""
    mean: torch.Tensor
    """[d_out] float32 mean of the scaled output: what the variance is counted from."""


class SparseAutoencoder(torch.nn.Module, ABC):
    """An SAE of any architecture; see the module's docstring."""

    b_dec: torch.nn.Parameter

    def __init__(self, spec: SAESpec, context: ParallelContext, *, dtype: torch.dtype = torch.float32) -> None:
        """Parameters on the context's device, still to be initialised.

        Args:
            context: a world without pipeline; `parallel.context.stage_context`.
            dtype: of the encoder's product; everything else is float32.
        Raises LayoutError if the tensor ranks do not divide the latents.
        """
        super().__init__()
        if spec.width % context.layout.tensor:
            raise LayoutError(
                f"parallel.tensor must divide the latents: {context.layout.tensor} does not divide the {spec.width} of "
                f"{spec.name}; change sae.width or sae.expansion"
            )
        self.spec, self.context, self.compute_dtype = spec, context, dtype
        self.config = megatron_config(spec, context)
        self.model_type = ModelType.encoder_or_decoder
        device, local = context.device, spec.width // context.layout.tensor
        self.W_enc = self.latent_parameter(local, spec.d_in)
        self.b_enc = self.latent_parameter(local)
        self.W_dec = self.latent_parameter(local, spec.d_out)
        self.b_dec = torch.nn.Parameter(torch.zeros(spec.d_out, device=device))
        one = torch.ones((), device=device)
        self.scales = Scales(input=one, output=one.clone(), mean=torch.zeros(spec.d_out, device=device))
        self.unused_steps = torch.zeros(local, device=device)
        """[N] steps since each latent was last active; whole numbers, exact in float32 for 16 million steps."""
        self.fired = torch.zeros(local, dtype=torch.bool, device=device)
        """[N] whether each was in this step."""
        self.num_dead = 0
        """Dead latents of the whole SAE, as of the last update."""
        self.sparsity = spec.config.sparsity
        """The weight of the penalty in this step."""
        self.into_main_grad = True
        """Whether all gradients of W_enc and W_dec come by the sparse products, which then add them to `main_grad` in place."""
        self._pre: torch.Tensor | None = None
        self.averages: dict[str, torch.Tensor] = {}
        """Moving averages of the parameters by name, where config.ema asks for them."""

    # What an architecture adds.

    @abstractmethod
    def losses(self, encoded: Encoded, target_Bd: torch.Tensor) -> Losses:
        """Losses of a micro-batch, from the encoder's product and the scaled target."""

    @abstractmethod
    def features(self, pre_BN: torch.Tensor) -> tuple[Selection, torch.Tensor]:
        """Active latents and their values [nnz] at inference: of one vector, whatever else is in the batch."""

    @property
    def latent_state(self) -> dict[str, torch.Tensor]:
        """[N] tensors beside the parameters that a resume needs, by name."""
        return {"unused_steps": self.unused_steps}

    @property
    def scalar_state(self) -> dict[str, torch.Tensor]:
        """Replicated tensors beside the parameters that a resume needs, by name."""
        return {"input_scale": self.scales.input, "output_scale": self.scales.output, "mean": self.scales.mean}

    # What all share.

    def latent_parameter(self, *shape: int, fill: float = 0.0) -> torch.nn.Parameter:
        """A parameter of this rank's latents, cut along dimension 0."""
        parameter = torch.nn.Parameter(torch.full(shape, fill, device=self.context.device))
        marks: Any = parameter  # what gradient norms and checkpoints read
        marks.tensor_model_parallel, marks.partition_dim, marks.partition_stride = True, 0, 1
        return parameter

    def shards(self) -> Iterator[tuple[Shard, torch.nn.Parameter]]:
        """Every parameter with its place in the whole SAE."""
        for name, parameter in self.named_parameters():
            yield Shard(name=f"{self.spec.name}.{name}", dim=None if name == "b_dec" else 0), parameter

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The tensor group; None: of one rank."""
        return self.context.groups.tp if self.context.layout.tensor > 1 else None

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The data group; None: of one rank."""
        return self.context.groups.dp if self.context.layout.data > 1 else None

    @property
    def first_latent(self) -> int:
        """Number of this rank's first latent in the whole SAE."""
        return self.context.at.tensor * len(self.W_enc)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by Megatron-Core's schedules for later pipeline stages, of which an SAE has none."""

    def forward(self, input_Bd: torch.Tensor, target_Bd: torch.Tensor) -> Losses:
        """Losses of a micro-batch of raw activations [B, d_in] and what is to be reconstructed [B, d_out]."""
        return self.losses(self.encode(input_Bd), target_Bd.float() * self.scales.output)

    def encode(self, input_Bd: torch.Tensor) -> Encoded:
        """The encoder's product, 2 B d_in N FLOPs."""
        x_Bd, b_enc = input_Bd.float() * self.scales.input, self.b_enc
        if self.spec.subtracts_b_dec:
            x_Bd = x_Bd - self.b_dec.detach()
            b_dec = self.b_dec
            if self.group is not None:
                b_dec = tensor_parallel.copy_to_tensor_model_parallel_region(b_dec, group=self.group)
            b_enc = _ThroughEncoder.apply(b_enc, b_dec, self.W_enc)
        x_Bd = x_Bd.to(self.compute_dtype)
        dtype = self.compute_dtype
        pre_BN = pre_activations(
            x_Bd, self.W_enc.to(dtype), self.b_enc.to(dtype), out=self._buffer(len(x_Bd)) if self.training else None
        )
        return Encoded(x_Bd=x_Bd, pre_BN=pre_BN, b_enc_N=b_enc)

    def _buffer(self, vectors: int) -> torch.Tensor:
        """[B, N] for pre-activations, the same at each training step: nothing of them is needed later."""
        if self._pre is None or len(self._pre) != vectors:
            shape = (vectors, len(self.W_enc))
            self._pre = torch.empty(shape, dtype=self.compute_dtype, device=self.context.device)
        return self._pre

    def values(self, encoded: Encoded, selection: Selection) -> torch.Tensor:
        """[nnz] float32 pre-activations at the entries of `selection`, differentiable."""
        return selected_pre_activations(
            encoded.pre_BN,
            selection,
            x_BD=encoded.x_Bd,
            W_enc_ND=self.W_enc,
            b_enc_N=encoded.b_enc_N,
            into_main_grad=self.into_main_grad,
        ).float()

    def partial(self, values: torch.Tensor, selection: Selection) -> torch.Tensor:
        """[B, d_out] what this rank's latents add to the reconstruction."""
        project = self.spec.config.unit_norm_decoder
        return decode(values, selection, self.W_dec, project=project, into_main_grad=self.into_main_grad)

    def sum_over_shards(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of all tensor ranks' parts; each rank's part gets the whole gradient."""
        if self.group is None:
            return partial
        return tensor_parallel.reduce_from_tensor_model_parallel_region(partial, group=self.group)

    def note_active(self, selection: Selection, values: torch.Tensor) -> None:
        """Remember which latents were active; entries of value 0 are not."""
        if self.training:
            # A mask would make the host wait for the number of active ones: the others go to a place of their own instead.
            latents = self.fired.shape[0]
            seen = self.fired.new_zeros(latents + 1)
            seen[torch.where(values.detach() > 0, selection.latents, latents)] = True
            self.fired |= seen[:latents]

    def report(
        self,
        total: torch.Tensor,
        *,
        error_Bd: torch.Tensor,
        target_Bd: torch.Tensor,
        values: torch.Tensor,
        penalty: torch.Tensor | None = None,
        aux_error: torch.Tensor | None = None,
    ) -> Losses:
        """The losses with everything that is reported; `values` and `penalty` are of this rank's latents."""
        with torch.no_grad():
            zero = total.new_zeros(())
            local_penalty = zero if penalty is None else penalty.detach()
            local = torch.stack([(values > 0).sum().to(total.dtype), local_penalty])
            if self.group is not None:
                dist.all_reduce(local, group=self.group)
            reported = torch.stack(
                [
                    error_Bd.detach().square().sum(),
                    (target_Bd - self.scales.mean).square().sum(),
                    *local,
                    zero if aux_error is None else aux_error.detach(),
                ]
            )
            complete = total.detach() + (reported[3] - local_penalty)
        return Losses(total=total, complete=complete, reported=reported)

    def reconstruct(self, input_Bd: torch.Tensor) -> torch.Tensor:
        """[B, d_out] reconstruction of raw activations, at inference, in their own scale; all ranks of the group together."""
        return self.decode(*self.features(self.encode(input_Bd).pre_BN)).to(input_Bd.dtype)

    def decode(self, selection: Selection, values: torch.Tensor) -> torch.Tensor:
        """[B, d_out] float32 reconstruction from active latents of all shards, in the activations' own scale."""
        total = self.sum_over_shards(decode(values.float(), selection, self.W_dec))
        return (total + self.b_dec) / self.scales.output

    def before_step(self, step: int) -> None:
        """Step number `step`, counted from 0, begins."""
        self.fired.zero_()
        warmup, weight = self.spec.config.sparsity_warmup_steps, self.spec.config.sparsity
        self.sparsity = weight * min(1.0, (step + 1) / warmup) if warmup else weight

    @torch.no_grad()
    def after_update(self) -> None:
        """The optimizer has taken its step: what follows from that.

        Collectives: an all-reduce of N bytes over the replicas, one of a number over the tensor group.
        """
        config = self.spec.config
        if config.unit_norm_decoder:
            normalize_rows(self.W_dec)
        if self.replicas is not None:
            fired = self.fired.to(torch.uint8)
            dist.all_reduce(fired, op=dist.ReduceOp.MAX, group=self.replicas)
            self.fired = fired.bool()
        self.unused_steps += 1
        self.unused_steps[self.fired] = 0
        self.count_dead()
        for name, parameter in self.named_parameters():
            if config.ema:
                average = self.averages.setdefault(name, parameter.detach().clone())
                average.lerp_(parameter, 1 - config.ema)

    @property
    def dead(self) -> torch.Tensor:
        """[N] which latents are dead, taking all steps to have been of this size."""
        return self.unused_steps * self.context.layout.global_batch_size >= self.spec.config.dead_after

    def count_dead(self) -> None:
        """Bring `num_dead` up to date."""
        count = self.dead.sum()
        if self.group is not None:
            dist.all_reduce(count, group=self.group)
        self.num_dead = int(count)


class _ThroughEncoder(torch.autograd.Function):
    """b_enc as it is, with a gradient for b_dec: subtracting it from the input is subtracting W_enc b_dec from b_enc.

    One product of a vector with W_enc, instead of the gradient of the whole [B, d] input.
    """

    @staticmethod
    def forward(ctx: Any, b_enc_N: torch.Tensor, b_dec_d: torch.Tensor, W_enc_Nd: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(W_enc_Nd)
        return b_enc_N.view_as(b_enc_N)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (W_enc_Nd,), (grad_N,) = ctx.saved_tensors, grads
        return grad_N, -(grad_N @ W_enc_Nd), None


def normalize_rows(W_Nd: torch.Tensor) -> None:
    """Scale each row to norm 1, in place."""
    W_Nd.div_(torch.linalg.vector_norm(W_Nd, dim=1, keepdim=True).clamp_min(1e-30))


def megatron_config(spec: SAESpec, context: ParallelContext) -> TransformerConfig:
    """What Megatron-Core's data parallelism and optimizer want to know of any model."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=spec.d_in,
        num_attention_heads=context.layout.tensor,  # there are none, but it wants a multiple of the ranks
        tensor_model_parallel_size=context.layout.tensor,
        # All micro-batches are of one size, so the mean of their means is the mean: no pass over the gradients to scale them.
        calculate_per_token_loss=False,
        gradient_accumulation_fusion=False,
    )
