"""What cpu_suite.py runs: settings that fit, and the figures, references and limits in each benchmark's JSON."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]
WEAK_SCALING_IMAGE = "benchmarks/results/weak_scaling.png"


@dataclass(frozen=True)
class Row:
    """One figure of a benchmark."""

    figure: str
    ours: float | None
    reference: float | None = None
    ratio: float | None = None
    """What is held against the limit, unless there is none."""
    limit: float | None = None
    at_most: bool = False

    def cells(self) -> list[str]:
        """As text: figure, ours, reference, ratio, limit, whether it is met."""
        held = self.ratio if self.ratio is not None else self.ours
        met = ""
        if self.limit is not None:
            met = "unknown"
            if held is not None:
                met = "met" if (held <= self.limit if self.at_most else held >= self.limit) else "**not met**"
        limit = "none" if self.limit is None else f"{'≤' if self.at_most else '≥'} {self.limit:g}"
        return [self.figure, _number(self.ours), _number(self.reference), _number(self.ratio), limit, met]


@dataclass(frozen=True)
class Part:
    """A benchmark as it is run here."""

    script: str
    arguments: tuple[str, ...]
    seconds: int
    """About what it takes on two cores that nobody else uses."""
    rows: Callable[[Result], Iterator[Row]]
    threads: int = 2
    quick: tuple[str, ...] | None = ("--quick",)
    """Arguments that show whether it runs; None: it has none that are short."""

    @property
    def limit(self) -> int:
        """Seconds after which it is stopped."""
        return 2 * self.seconds + 30

    def expected(self, *, quick: bool) -> int:
        """Seconds it is likely to take."""
        return min(self.seconds, 15) if quick else self.seconds

    def command(self, *, quick: bool) -> list[str]:
        """Arguments of Python."""
        return [f"benchmarks/{self.script}.py", *((self.quick or ()) if quick else self.arguments)]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _tokenize(result: Result) -> Iterator[Row]:
    figure = f"tokens/s, {result['text_mb']} MB, {result['type']} {result['vocab_size']:,}; bare sentencepiece"
    ours, theirs = result["ours_tokens_per_s"], result["reference_tokens_per_s"]
    yield Row(figure, ours, theirs, result["ratio"], 0.9)
    yield Row("the same by CPU time", None, None, result["cpu_ratio"], 0.9)


def _morph_bpe(result: Result) -> Iterator[Row]:
    seconds = result["seconds"]
    ours = max(seconds["ours, bias 0"], seconds["ours, bias 0.9"])
    yield Row("seconds of training; sentencepiece's BPE", ours, seconds["sentencepiece"], result["ratio"], 0.5)


def _gpt_overhead(result: Result) -> Iterator[Row]:
    for name, size in result["sizes"].items():
        speed = size["tokens_per_second"]
        yield Row(f"tokens/s, {name}; plain PyTorch", speed["ours"], speed["reference"], size["ratio"], 0.95)
        yield Row(f"{name} by CPU time", None, None, size["cpu_ratio"], 0.95)
        yield Row(f"share of Python and calls, {name}", size["overhead"], limit=0.03, at_most=True)


_GPT_CPU = (
    ("Trainer", "ours", "transformers", "to_transformers", 1.1),
    ("Trainer, ours compiled", "ours_compiled", "transformers", "compiled_to_transformers", 1.1),
    ("Trainer, both compiled", "ours_compiled", "transformers_compiled", "compiled_to_transformers_compiled", 1.1),
    ("litgpt, both compiled", "ours_compiled", "litgpt_compiled", "compiled_to_litgpt_compiled", 1.1),
    ("GEMMs of its linear layers", "ours", "gemm", "to_gemm_bound", 0.9),
    ("GEMMs of its linear layers, ours compiled", "ours_compiled", "gemm", "compiled_to_gemm_bound", 0.9),
    ("all its GEMMs, attention's too", "ours", "gemm_attention", "to_gemm_attention_bound", 0.9),
    ("all its GEMMs, ours compiled", "ours_compiled", "gemm_attention", "compiled_to_gemm_attention_bound", 0.9),
)


def _gpt_cpu(result: Result) -> Iterator[Row]:
    for name, size in result["sizes"].items():
        speed, ratios = size["tokens_per_second"], size["ratios"]
        for what, ours, theirs, ratio, limit in _GPT_CPU:
            if ratio in ratios:
                yield Row(f"tokens/s, {name}; {what}", speed[ours], speed[theirs], ratios[ratio], limit)


def _engines(result: Result) -> Iterator[Row]:
    for name, layout in result["layouts"].items():
        seconds = layout["seconds_per_step"]
        yield Row(f"s a step, {name}; DeepSpeed", seconds["megatron"], seconds["deepspeed"], layout["ratio"])


def _planner_accuracy(result: Result) -> Iterator[Row]:
    for name in ("time", "memory"):
        yield Row(f"mean error of {name} against published runs", result[f"{name}_mean"], limit=0.10, at_most=True)


def _sae_step(result: Result) -> Iterator[Row]:
    for name, width in result["widths"].items():
        speed = width["tokens_per_second"]
        for side, goal in (("torch", None), ("eai-sparsify", 1.4), ("sae-lens", 5.0)):
            if side in width["speedup"]:
                yield Row(f"vectors/s, {name}; {side}", speed["ours"], speed[side], width["speedup"][side], goal)
            elif goal is not None:
                yield Row(f"vectors/s, {name}; {side} is not installed", None, limit=goal)
        over = width["ours_over_gemm"]
        yield Row(f"a step in products of the encoder, {name}", None, None, over, 1.5, at_most=True)


def _sae_scaling(result: Result) -> Iterator[Row]:
    yield Row("bytes by formula / bytes sent, least", None, None, result["ratio"])
    most = max(result["by_ranks"], key=int)
    memory = {ranks: result["by_ranks"][ranks]["memory_mib"] for ranks in ("1", most)}
    ratio = round(memory["1"] / memory[most], 2)
    yield Row(f"MiB a rank, TP{most}; one rank", round(memory[most]), round(memory["1"]), ratio)


def _stream(result: Result) -> Iterator[Row]:
    both, bound = (result[f"{name}_vectors_per_second"] for name in ("both", "bound"))
    yield Row("vectors/s, streaming and training; both one after the other", both, bound, result["ratio"], 0.9)
    yield Row("the same by CPU time", None, None, result["cpu_ratio"], 0.9)
    yield Row("share of the time for shuffling", result["shuffle_share"], limit=0.03, at_most=True)


def _dashboard(result: Result) -> Iterator[Row]:
    for what, of in (("report", "to the report"), ("page", "until the page answers")):
        ours, theirs, limit = result[f"{what}_s"], result[f"reference_{what}_s"], result[f"{what}_goal_s"]
        yield Row(f"seconds {of}, {result['runs']} runs; Plotly as it is", ours, theirs, None, limit, at_most=True)


def _scaling_fit(result: Result) -> Iterator[Row]:
    ours, theirs = result["ours"]["seconds"], result["reference"]["seconds"]
    yield Row("seconds of a fit; finite differences", ours, theirs, result["ratio"])


def _cpu_kernels(result: Result) -> Iterator[Row]:
    for name, case in result["cases"].items():
        yield Row(f"ms forward and backward, {name}; torch", case["ours_ms"], case["torch_ms"], case["ratio"])


def _weak_scaling(result: Result) -> Iterator[Row]:
    for axis, points in result["measured"].items():
        last, first = points[-1], points[0]
        figure = f"tokens/s, {axis}{last['ranks']}; one rank; ratio: CPU efficiency"
        yield Row(figure, last["tokens_per_second"], first["tokens_per_second"], last["cpu_efficiency"])


PARTS = {
    part.script: part
    for part in (
        Part("planner_accuracy", (), 4, _planner_accuracy, threads=1, quick=()),
        Part("scaling_fit", (), 8, _scaling_fit, threads=1, quick=()),
        Part("cpu_kernels", (), 15, _cpu_kernels, quick=()),
        Part("gpt_overhead", ("--sizes", "50m", "--rounds", "3", "--no-profile"), 80, _gpt_overhead),
        Part("gpt_cpu", ("--sizes", "50m-llama", "--rounds", "3"), 330, _gpt_cpu),
        Part("sae_step", ("--widths", "768", "--rounds", "3"), 60, _sae_step),
        Part("stream", ("--rounds", "2"), 150, _stream),
        Part("engines", ("--rounds", "2"), 105, _engines, threads=1),
        Part("weak_scaling", ("--rounds", "3", "-o", WEAK_SCALING_IMAGE), 110, _weak_scaling, threads=1),
        Part("sae_scaling", ("--steps", "2"), 70, _sae_scaling, threads=1, quick=None),
        Part("tokenize", ("--repeats", "1"), 50, _tokenize, threads=1, quick=None),
        Part("morph_bpe", ("--repeats", "1"), 40, _morph_bpe, threads=1, quick=None),
        Part("dashboard", ("--repeats", "1"), 90, _dashboard, threads=1, quick=None),
    )
}
