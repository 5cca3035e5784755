"""Other libraries' kernels in our layers. For a library that cannot run stands what has its signature and computes the same."""

import ast
import importlib
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from steerscale.accelerators import TORCH, KernelChoice
from steerscale.models import core_attention, layer_spec
from steerscale.models.core_attention import CoreAttention, TEAttention, VarlenAttention, document_begins
from steerscale.models.gpt import GPT, document_mask, transformer_config
from steerscale.models.kv_cache import cached
from steerscale.models.sharding import initialize_parameters, named_shards
from steerscale.parallel.context import ParallelContext, initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.parallel.megatron import AttnMaskType, tensor_parallel
from steerscale.testing.ranks import RankPool
from tests.models.gpts import GPT2, LLAMA

REPOSITORY = Path(__file__).parent.parent.parent
DOCUMENTS_BS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 10, [0] * 16])
TE = KernelChoice(norm="te", linear="te", attention="te")
TE_MODULES = (layer_spec, core_attention)
"""Those that ask for Transformer Engine's layers."""


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> Iterator[None]:
    yield
    layer_spec.normalization.cache_clear()
    core_attention.varlen.cache_clear()


@pytest.fixture
def context() -> Iterator[ParallelContext]:
    with initialize(ParallelLayout(micro_batch_size=2)) as one:
        yield one


def gpt_of(model: Any, context: ParallelContext, kernels: KernelChoice, **settings: Any) -> GPT:
    chunk = GPT(model, transformer_config(model, context, kernels=kernels, **settings), context)
    initialize_parameters([chunk], context, seed=3)
    return chunk


def losses_and_grads(chunk: GPT, *batch: torch.Tensor | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    chunk.train()
    losses = chunk(*batch)
    (losses * torch.linspace(0.5, 1.5, losses.numel()).view_as(losses)).sum().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in chunk.named_parameters() if p.grad is not None}


def assert_same(actual: Any, expected: Any) -> None:
    assert list(actual[1]) == list(expected[1]), "parameters have the same names in the same order"
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)


def tokens_of(model: Any) -> torch.Tensor:
    return torch.randint(0, model.tokens, (2, 17), generator=torch.Generator().manual_seed(0))


# --- documents by where they begin -----------------------------------------------------------------------------------


def varlen_by_loop(
    q: Any, k: Any, v: Any, begins_q: Any, begins_k: Any, longest_q: int, longest_k: int, **how: Any
) -> Any:
    """What flash-attention computes, document by document."""
    assert begins_q.dtype == begins_k.dtype == torch.int32
    assert all(x.is_contiguous() for x in (q, k, v))
    assert how in ({"causal": True}, {"window_size": (-1, 0), "enable_gqa": q.shape[1] != k.shape[1]})
    parts, ends = [], begins_q.tolist()
    for begin, end in pairwise(ends):
        assert end - begin <= min(longest_q, longest_k)
        if end == begin:
            continue
        heads = [x[begin:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        parts.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture(params=["flash", "torch"])
def varlen_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = varlen_by_loop  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    torchs = types.ModuleType("torch.nn.attention.varlen")
    torchs.varlen_attn = varlen_by_loop  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", torchs)
    return request.param


def test_document_begins() -> None:
    assert document_begins(DOCUMENTS_BS).tolist() == [0, 5, 6, 16, *[32] * 28]
    assert document_begins(DOCUMENTS_BS).dtype == torch.int32
    # The same number on either side of a row's end is no document that goes on.
    assert document_begins(torch.zeros(3, 4, dtype=torch.int32)).tolist() == [0, 4, 8, *[12] * 29]
    for documents, length in ((31, 32), (32, 64), (63, 64), (64, 128)):
        begins = document_begins(torch.arange(documents).unsqueeze(0))
        assert begins.tolist() == [*range(documents), *[documents] * (length - documents)]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_varlen_attention_equals_a_mask(
    model: Any, recompute: Any, varlen_library: Any, context: ParallelContext
) -> None:
    tokens = tokens_of(model)
    batch = (tokens[:, :-1], None)
    masked = losses_and_grads(gpt_of(model, context, TORCH), *batch, DOCUMENTS_BS, tokens[:, 1:])
    kernels = replace(TORCH, attention=varlen_library, varlen=True)
    chunk = gpt_of(model, context, kernels, recompute=recompute)
    assert type(chunk.decoder.layers[0].self_attention.core_attention) is VarlenAttention
    assert_same(losses_and_grads(chunk, *batch, document_begins(DOCUMENTS_BS), tokens[:, 1:]), masked)
    apart = losses_and_grads(gpt_of(model, context, TORCH), *batch, None, tokens[:, 1:])
    assert (apart[0] - masked[0]).abs().max() > 1e-3, "the documents make a difference"


def test_varlen_attention_takes_masks_and_caches_as_ever(varlen_library: Any, context: ParallelContext) -> None:
    tokens = tokens_of(LLAMA)[:, :-1]
    plain = gpt_of(LLAMA, context, TORCH).eval()
    chunk = gpt_of(LLAMA, context, replace(TORCH, attention=varlen_library, varlen=True)).eval()
    with torch.no_grad():
        assert torch.equal(chunk(tokens, None, DOCUMENTS_BS), plain(tokens, None, DOCUMENTS_BS))
        assert torch.equal(chunk(tokens), plain(tokens))
        positions = torch.arange(16).expand(2, 16)
        with cached([chunk], 2, 16) as cache:
            cache.begin(positions[:, :9])
            first = chunk(tokens[:, :9], positions[:, :9])
            cache.begin(positions[:, 9:])
            rest = chunk(tokens[:, 9:], positions[:, 9:])
        torch.testing.assert_close(torch.cat((first, rest)), plain(tokens), rtol=1e-5, atol=1e-5)


# --- Apex's and Liger's norms ----------------------------------------------------------------------------------------


def rms_norm_affine(
    input: Any, weight: Any, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False
) -> Any:
    return F.rms_norm(input, normalized_shape, weight, eps) + 0.0


def layer_norm_affine(
    input: Any, weight: Any, bias: Any, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False
) -> Any:
    return F.layer_norm(input, normalized_shape, weight, bias, eps) + 0.0


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_apex_norms_by_its_signatures(model: Any, monkeypatch: pytest.MonkeyPatch, context: ParallelContext) -> None:
    calls = []
    module = types.ModuleType("apex.normalization.fused_layer_norm")
    for name, function in (("fused_rms_norm_affine", rms_norm_affine), ("fused_layer_norm_affine", layer_norm_affine)):
        setattr(module, name, partial(_counted, calls, function))
    for name in ("apex", "apex.normalization"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tokens = tokens_of(model)
    batch = (tokens[:, :-1], None, None, tokens[:, 1:])
    expected = losses_and_grads(gpt_of(model, context, TORCH), *batch)
    chunk = gpt_of(model, context, replace(TORCH, norm="apex"))
    assert_same(losses_and_grads(chunk, *batch), expected)
    assert len(calls) == 2 * model.num_layers + 1
    assert set(calls) == {rms_norm_affine if model is LLAMA else layer_norm_affine}


def _counted(calls: list[Any], function: Any, *args: Any, **settings: Any) -> Any:
    calls.append(function)
    return function(*args, **settings)


def test_liger_kernels_under_the_interpreter() -> None:
    """Triton's interpreter has to be chosen before Triton is imported: a process of its own."""
    pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    chosen = ["tests/gpu/test_kernels.py", "-k", "liger_norms or liger_swiglu or liger_in_a_model"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


# --- Transformer Engine's layers -------------------------------------------------------------------------------------


def parameters_of(name: str, function: str = "__init__") -> tuple[list[str], set[str], set[str]]:
    """Positional, keyword and required keyword parameters of Megatron-Core's wrapper, read off its source.

    Without Transformer Engine the classes themselves are hollow.
    """
    path = importlib.import_module("megatron.core.extensions.transformer_engine").__file__
    assert path is not None
    (class_,) = [
        node
        for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    (init,) = [node for node in class_.body if isinstance(node, ast.FunctionDef) and node.name == function]
    positional = [argument.arg for argument in init.args.args[1:]]
    keywords = {argument.arg for argument in init.args.kwonlyargs}
    optional = {
        argument.arg for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults) if default is not None
    }
    without_default = set(positional[: len(positional) - len(init.args.defaults)])
    return positional, keywords | set(positional), (keywords - optional) | without_default


def check_call(name: str, args: tuple[Any, ...], settings: dict[str, Any], function: str = "__init__") -> None:
    positional, allowed, required = parameters_of(name, function)
    given = {*positional[: len(args)], *settings}
    assert len(args) <= len(positional), name
    assert given <= allowed, (name, given - allowed)
    assert required <= given, (name, required - given)


class StandInTE:
    """Megatron-Core's wrappers by their arguments, which are checked against its source; inside, its own layers.

    As Transformer Engine's do, the linear layers say themselves how their weights are cut, and are no ColumnParallelLinear.
    """

    def __init__(self) -> None:
        self.attended: list[Any] = []

    def TENorm(self, *args: Any, **settings: Any) -> torch.nn.Module:
        check_call("TENorm", args, settings, "__new__")
        config, size = settings["config"], settings["hidden_size"]
        if config.normalization == "RMSNorm":
            return torch.nn.RMSNorm(size, eps=settings["eps"], dtype=config.params_dtype)
        return torch.nn.LayerNorm(size, eps=settings["eps"], dtype=config.params_dtype)

    def TEColumnParallelLinear(self, *args: Any, **settings: Any) -> torch.nn.Module:
        check_call("TEColumnParallelLinear", args, settings)
        assert not settings["gather_output"]
        return _Linear(tensor_parallel.ColumnParallelLinear(*args, **_known(settings)), dim=0)

    def TERowParallelLinear(self, *args: Any, **settings: Any) -> torch.nn.Module:
        check_call("TERowParallelLinear", args, settings)
        assert settings["input_is_parallel"]
        return _Linear(tensor_parallel.RowParallelLinear(*args, **_known(settings)), dim=1)

    def TEDotProductAttention(self, *args: Any, **settings: Any) -> Any:
        check_call("TEDotProductAttention", args, settings)
        plain = CoreAttention(settings["config"], settings["layer_number"], settings["attn_mask_type"])

        def attend(*tensors: Any, **how: Any) -> torch.Tensor:
            check_call("TEDotProductAttention", tensors, how, "forward")
            assert tensors[3] is None
            assert how["attn_mask_type"] is AttnMaskType.causal
            self.attended.append(how)
            return plain(*tensors)

        return attend


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "name"}


class _Linear(torch.nn.Module):
    def __init__(self, inner: Any, *, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = inner.weight, inner.bias
        self.weight.tensor_model_parallel, self.weight.partition_dim, self.weight.partition_stride = True, dim, 1
        self._inner = [inner]  # in a list: its parameters are not to be registered twice

    def forward(self, x: torch.Tensor) -> Any:
        return self._inner[0](x)


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_transformer_engine_by_its_signatures(
    model: Any, monkeypatch: pytest.MonkeyPatch, context: ParallelContext
) -> None:
    te = StandInTE()
    for module in TE_MODULES:
        monkeypatch.setattr(module, "te_layers", lambda: te)
    tokens = tokens_of(model)
    batch = (tokens[:, :-1], None, None, tokens[:, 1:])
    plain, chunk = gpt_of(model, context, TORCH), gpt_of(model, context, TE)
    assert_same(losses_and_grads(chunk, *batch), losses_and_grads(plain, *batch))
    assert len(te.attended) == model.num_layers
    assert [shard for shard, _ in named_shards([chunk])] == [shard for shard, _ in named_shards([plain])]


def test_transformer_engine_never_sees_a_mask_or_a_cache(
    monkeypatch: pytest.MonkeyPatch, context: ParallelContext
) -> None:
    te = StandInTE()
    for module in TE_MODULES:
        monkeypatch.setattr(module, "te_layers", lambda: te)
    chunk = gpt_of(LLAMA, context, replace(TORCH, attention="te")).eval()
    plain = gpt_of(LLAMA, context, TORCH).eval()
    assert type(chunk.decoder.layers[0].self_attention.core_attention) is TEAttention
    tokens = tokens_of(LLAMA)[:, :-1]
    positions = torch.arange(16).expand(2, 16)
    with torch.no_grad():
        assert torch.equal(chunk(tokens, None, DOCUMENTS_BS), plain(tokens, None, DOCUMENTS_BS))
        with cached([chunk], 2, 16) as cache:
            cache.begin(positions)
            torch.testing.assert_close(chunk(tokens, positions), plain(tokens, positions), rtol=1e-5, atol=1e-5)
        assert not te.attended
        assert torch.equal(chunk(tokens), plain(tokens))
    assert len(te.attended) == LLAMA.num_layers
    assert document_mask(DOCUMENTS_BS).shape == (2, 1, 16, 16)


def _sequence_parallel_norms(library: str) -> tuple[list[bool], list[tuple[str, Any]]]:
    te = StandInTE()
    for module in TE_MODULES:
        module.te_layers = lambda: te  # type: ignore[attr-defined]
    try:
        with initialize(ParallelLayout(tensor=2, sequence=True, micro_batch_size=2)) as context:
            tensor_parallel.model_parallel_cuda_manual_seed(0)
            chunk = gpt_of(LLAMA, context, TE if library == "te" else TORCH)
            norms = [p.sequence_parallel for name, p in chunk.named_parameters() if "norm" in name]  # type: ignore[attr-defined]
            return norms, [(shard.name, shard.dim) for shard, _ in named_shards([chunk])]
    finally:
        for module in TE_MODULES:
            module.te_layers = importlib.import_module("steerscale.parallel.megatron").te_layers  # type: ignore[attr-defined]


def test_norms_of_every_library_are_reduced_under_sequence_parallelism(pool: RankPool) -> None:
    torchs = pool.run(_sequence_parallel_norms, "torch", ranks=2)
    tes = pool.run(_sequence_parallel_norms, "te", ranks=2)
    assert torchs == tes
    assert all(torchs[0][0])
    assert len(torchs[0][0]) == 2 * LLAMA.num_layers + 1
