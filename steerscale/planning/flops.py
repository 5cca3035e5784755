"""Floating-point operations of training a dense decoder: exact by its shape, and by the formulas of papers.

Symbols: B sequences of s tokens (`model.seq_len`), L layers, h d_model, a heads of width d, g key/value groups, f FFN
width, k matrices of the MLP (2, gated 3), V vocabulary. A multiply-add counts two; a backward pass costs two forwards.

Model FLOPs are what the mathematics asks for, whatever the implementation does: the true vocabulary, and each token
attends to its own past only. Hardware FLOPs are what the devices execute: the padded vocabulary and, on top, what
recomputation repeats. Neither counts norms, activation functions, softmax, biases, rotary embeddings, the embedding
look-up, the loss, the optimizer, nor the scores that a fused attention kernel rebuilds inside its own backward.
Documents packed into one sequence count as one document, though attention between them is masked.
"""

from dataclasses import dataclass

from steerscale.models.config import ModelConfig, Recompute


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """Forward FLOPs of one token, averaged over the sequence."""

    matrices: int
    """QKV, attention output and MLP of all layers: `2L [h (a+2g) d + a d h + k h f]`."""
    attention: int
    """Scores and weighted values of all layers: `2L a d s`; the causal half, s/2 tokens on average."""
    logits: int
    """The output head: `2 h V`."""

    @property
    def total(self) -> int:
        """All parts."""
        return self.matrices + self.attention + self.logits


def forward_flops_per_token(model: ModelConfig, *, vocab_size: int) -> ForwardFlops:
    """Forward FLOPs of one token, the output head taken over `vocab_size` rows (the true or the padded vocabulary)."""
    h, d, f = model.d_model, model.head_width, model.ffn_width
    a, g, k = model.num_heads, model.kv_groups, 3 if model.gated else 2
    return ForwardFlops(
        matrices=2 * model.num_layers * (h * (a + 2 * g) * d + a * d * h + k * h * f),
        attention=2 * model.num_layers * a * d * model.seq_len,
        logits=2 * h * vocab_size,
    )


def model_flops_per_token(model: ModelConfig) -> int:
    """Exact FLOPs that one trained token asks for; with h = a d: `6L [h^2 (2 + 2g/a) + k h f] + 6L h s + 6 h V`.

    V is the true vocabulary. Raises ConfigError while it is unknown.
    """
    return 3 * forward_flops_per_token(model, vocab_size=model.tokens).total


def hardware_flops_per_token(model: ModelConfig, *, recompute: Recompute) -> int:
    """FLOPs executed for one trained token: three forward passes over the padded vocabulary, and what is recomputed.

    Selective repeats the core attention, full every block; neither repeats the logits, and what pointwise repeats is not
    counted. That attention skips the masked half is true of fused kernels; PyTorch's unfused path executes it too, which
    is not counted.
    """
    forward = forward_flops_per_token(model, vocab_size=model.padded_vocab)
    repeated = {
        "none": 0,
        "pointwise": 0,
        "selective": forward.attention,
        "full": forward.matrices + forward.attention,
    }[recompute]
    return 3 * forward.total + repeated


def model_flops(model: ModelConfig, *, batch_size: int) -> int:
    """Exact FLOPs of one iteration over `batch_size` sequences; see `model_flops_per_token`."""
    return batch_size * model.seq_len * model_flops_per_token(model)


def hardware_flops(model: ModelConfig, *, batch_size: int, recompute: Recompute) -> int:
    """FLOPs executed in one iteration over `batch_size` sequences; see `hardware_flops_per_token`."""
    return batch_size * model.seq_len * hardware_flops_per_token(model, recompute=recompute)


def sae_flops_per_vector(*, d_in: int, d_out: int, width: int, l0: float) -> float:
    """What training an SAE asks of one vector: `2 d_in n` for the encoder, and for each active latent `6 d_out + 2 d_in`.

    n latents. An active latent costs its decoder row three times (reconstruction, derivative by its value, gradient) and its
    encoder row once (gradient): 2 FLOPs an element each. Selection, norms and the optimizer are not counted.
    """
    return 2.0 * d_in * width + l0 * (6 * d_out + 2 * d_in)


# The formulas of papers and tools, for comparison with the figures they publish. Except PaLM's, all take f = 4h, g = a
# and h = a d for granted, and all count the whole attention square: elsewhere they answer a question nobody asked.


def narayanan_2021_hardware_flops(model: ModelConfig, *, batch_size: int, recompute: bool = True) -> float:
    """Narayanan et al. 2021 (SC21), equation 3, of one iteration: `96 B s L h^2 (1 + s/6h + V/16Lh)`, V padded.

    Each block runs forward twice, the logits once. Without recomputation 72 stands for 96, as it is commonly applied
    although the logits then weigh 3/4 of what they cost.
    """
    h, s, layers = model.d_model, model.seq_len, model.num_layers
    coefficient = 96 if recompute else 72
    return coefficient * batch_size * s * layers * h**2 * (1 + s / (6 * h) + model.padded_vocab / (16 * layers * h))


def korthikanti_2022_model_flops(model: ModelConfig, *, batch_size: int) -> float:
    """Korthikanti et al. 2022 (arXiv 2205.05198), of one iteration: `72 B L s h^2 (1 + s/6h + V/12hL)`, V padded."""
    h, s, layers = model.d_model, model.seq_len, model.num_layers
    return 72 * batch_size * s * layers * h**2 * (1 + s / (6 * h) + model.padded_vocab / (12 * h * layers))


def korthikanti_2022_hardware_flops(model: ModelConfig, *, batch_size: int, recompute: Recompute) -> float:
    """Korthikanti et al. 2022 (arXiv 2205.05198), hardware FLOPs of one iteration.

    None, pointwise: the model FLOPs. Selective: `72 B L s h^2 (1 + s/3h + V/12hL)`, as printed: it adds the attention
    square, s/6h, a second time, where repeating one forward pass in three would add s/18h. Full: SC21's equation 3.
    """
    if recompute == "full":
        return narayanan_2021_hardware_flops(model, batch_size=batch_size)
    flops = korthikanti_2022_model_flops(model, batch_size=batch_size)
    if recompute == "selective":
        flops += 12 * batch_size * model.seq_len**2 * model.num_layers * model.d_model
    return flops


def legacy_flops(model: ModelConfig, *, batch_size: int, recompute: Recompute) -> float:
    """What the tag `iteration-time/TFLOPs per gpu (estimated)` of OpenGPT-X's Megatron fork divides by time and GPUs.

    `c r B s L h^2 (1 + s/6h + V/16Lh)`, c = 24 or, gated, 32; r = 3 or, selective or full, 4; V padded. It reports too
    much: hardware FLOPs under the name of TFLOPs, r = 4 for selective as well, c = 32 on attention and logits too, all
    keys and values though they are shared, the whole attention square. Kept to compare with old runs, nothing else.
    """
    h, s, layers = model.d_model, model.seq_len, model.num_layers
    coefficient = (32 if model.gated else 24) * (3 if recompute in ("none", "pointwise") else 4)
    return coefficient * batch_size * s * layers * h**2 * (1 + s / (6 * h) + model.padded_vocab / (16 * layers * h))


def palm_flops_per_token(model: ModelConfig) -> int:
    """PaLM's appendix B as torchtitan logs it: `6 (N - N_emb) + 6L a (d_qk + d_v) s`, here with d_qk = d_v = d.

    N - N_emb counts the parameters that take part in a product: all but the token and position look-ups, the output
    head (padded) once even where it shares the embedding's weight. The attention square is not halved for causality.
    """
    computing = model.num_parameters(embeddings=False) + model.d_model * model.padded_vocab
    return 6 * computing + 12 * model.num_layers * model.num_heads * model.head_width * model.seq_len
