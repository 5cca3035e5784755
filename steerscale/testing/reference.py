"""A plain PyTorch GPT, without Megatron-Core, without parallelism: what the engine's numbers are compared with.

It shares no model or engine code with the rest of steerscale, only the configuration, the learning-rate function and the
parameters' global names, so the initial weights of one load into the other. Shapes: B batch, S sequence, M d_model, V
vocabulary, H heads, G key/value groups, D head width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from steerscale.data.loader import MicroBatch
from steerscale.models.config import ModelConfig
from steerscale.optim import OptimConfig, learning_rate


class Attention(nn.Module):
    """Causal attention with grouped key/value heads; QKV interleaved by group: [its query heads, key, value] x G."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.groups, self.head_width = model.kv_groups, model.head_width
        self.heads_per_group = model.num_heads // model.kv_groups
        width = model.num_heads * model.head_width
        self.linear_qkv = nn.Linear(
            model.d_model, width + 2 * model.kv_groups * model.head_width, bias=model.has_qkv_bias
        )
        self.linear_proj = nn.Linear(width, model.d_model, bias=model.bias)

    def forward(
        self, x_BSM: torch.Tensor, mask: torch.Tensor | None, rotation: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        batch, length, _ = x_BSM.shape
        qkv = self.linear_qkv(x_BSM).view(batch, length, self.groups, self.heads_per_group + 2, self.head_width)
        q, k, v = qkv.split([self.heads_per_group, 1, 1], dim=3)
        q, k, v = (part.reshape(batch, length, -1, self.head_width).transpose(1, 2) for part in (q, k, v))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.heads_per_group > 1
        )
        return self.linear_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """Two matrices around an activation; under SwiGLU the first is [gate; up]."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.activation = model.activation
        self.linear_fc1 = nn.Linear(model.d_model, model.ffn_width * (2 if model.gated else 1), bias=model.bias)
        self.linear_fc2 = nn.Linear(model.ffn_width, model.d_model, bias=model.bias)

    def forward(self, x_BSM: torch.Tensor) -> torch.Tensor:
        hidden = self.linear_fc1(x_BSM)
        if self.activation == "swiglu":
            gate, up = hidden.chunk(2, dim=-1)
            return self.linear_fc2(F.silu(gate) * up)
        return self.linear_fc2(F.gelu(hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class Layer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm, self.self_attention = make_norm(model), Attention(model)
        self.pre_mlp_layernorm, self.mlp = make_norm(model), MLP(model)

    def forward(
        self, x_BSM: torch.Tensor, mask: torch.Tensor | None, rotation: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        x_BSM = x_BSM + self.self_attention(self.input_layernorm(x_BSM), mask, rotation)
        return x_BSM + self.mlp(self.pre_mlp_layernorm(x_BSM))


class ReferenceGPT(nn.Module):
    """The decoder; `load_state_dict` takes what `models.sharding.gather_parameters` gives. Without dropout."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(model.padded_vocab, model.d_model)})
        if model.position == "learned":
            self.embedding["position_embeddings"] = nn.Embedding(model.seq_len, model.d_model)
        self.decoder = nn.ModuleDict(
            {
                "layers": nn.ModuleList(Layer(model) for _ in range(model.num_layers)),
                "final_layernorm": make_norm(model),
            }
        )
        if not model.tie_embeddings:
            self.output_layer = nn.Linear(model.d_model, model.padded_vocab, bias=False)

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Logits [B, S, V] without the columns that pad the vocabulary."""
        tokens_BS, positions, mask, rotation = batch.tokens_BS, batch.positions_BS, None, None
        if positions is None:
            positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).unsqueeze(0)
        if batch.documents_BS is not None:
            same = batch.documents_BS[:, :, None] == batch.documents_BS[:, None, :]
            mask = same.tril().unsqueeze(1)
        x_BSM = self.embedding["word_embeddings"](tokens_BS)
        if self.model.position == "learned":
            x_BSM = x_BSM + self.embedding["position_embeddings"](positions)
        else:
            rotation = rotation_of(positions, self.model.head_width, self.model.rope_theta)
        for layer in self.decoder["layers"]:  # type: ignore[attr-defined]
            x_BSM = layer(x_BSM, mask, rotation)
        head = self.embedding["word_embeddings"] if self.model.tie_embeddings else self.output_layer
        return F.linear(self.decoder["final_layernorm"](x_BSM), head.weight[: self.model.tokens])  # type: ignore[index]


def make_norm(model: ModelConfig) -> nn.Module:
    """LayerNorm or RMSNorm over d_model."""
    return (nn.LayerNorm if model.norm == "layernorm" else nn.RMSNorm)(model.d_model, eps=model.norm_eps)


def rotation_of(positions_BS: torch.Tensor, head_width: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [B, 1, S, D / 2] of position x theta^(-2i / D) (Su et al. 2021)."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions_BS.device) / head_width
    angles = positions_BS[:, None, :, None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x_BHSD: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (i, i + D / 2), the layout of GPT-NeoX and Llama."""
    cosines, sines = cosines.to(x_BHSD.dtype), sines.to(x_BHSD.dtype)
    first, second = x_BHSD.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


def make_adamw(model: ReferenceGPT, optim: OptimConfig) -> torch.optim.AdamW:
    """torch's AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def reference_step(
    model: ReferenceGPT,
    adamw: torch.optim.AdamW,
    micro_batches: Sequence[MicroBatch],
    optim: OptimConfig,
    *,
    lr: float,
) -> tuple[float, float]:
    """One optimizer step; (mean loss a token in nats, gradient norm before clipping)."""
    adamw.zero_grad(set_to_none=True)
    tokens = sum(float(batch.loss_mask_BS.sum()) for batch in micro_batches)
    loss_sum = 0.0
    for batch in micro_batches:
        losses = F.cross_entropy(model(batch).flatten(0, 1), batch.labels_BS.flatten(), reduction="none")
        loss = (losses * batch.loss_mask_BS.flatten()).sum()
        (loss / tokens).backward()
        loss_sum += loss.item()
    limit = optim.clip if optim.clip > 0 else float("inf")
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), limit).item()
    for group in adamw.param_groups:
        group["lr"] = lr
    adamw.step()
    return loss_sum / tokens, grad_norm


def train_reference(
    model: ReferenceGPT, steps: Sequence[Sequence[MicroBatch]], optim: OptimConfig, *, total_steps: int
) -> list[tuple[float, float]]:
    """Train on `steps`, a list of micro-batches each; (loss, gradient norm) of every step."""
    adamw = make_adamw(model, optim)
    return [
        reference_step(model, adamw, batches, optim, lr=learning_rate(optim, step, total_steps))
        for step, batches in enumerate(steps)
    ]
