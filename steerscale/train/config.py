"""The configuration of a whole run: what `config.yaml` of a run directory holds. Torch-free."""

from dataclasses import dataclass, field, replace
from typing import Literal

from steerscale.activations.config import StreamConfig
from steerscale.activations.placement import Placement
from steerscale.checkpoint.config import CheckpointConfig
from steerscale.config import require
from steerscale.data.config import DataConfig
from steerscale.engines.config import EngineConfig, check_engine
from steerscale.engines.fp8 import check_fp8_shapes
from steerscale.errors import ConfigError, LayoutError
from steerscale.models.config import ModelConfig
from steerscale.optim import OptimConfig
from steerscale.parallel.layout import ParallelConfig, ParallelLayout
from steerscale.planning.cluster import ClusterConfig
from steerscale.sae.config import SAEConfig
from steerscale.train.profile_config import ProfileConfig
from steerscale.train.sae_layout import check_producers, check_sae_layout


@dataclass(frozen=True, kw_only=True)
class RampUpConfig:
    """Growing global batch size: from `start` by `increment` until parallel.global_batch_size, over `samples`."""

    start: int
    """First global batch size, in sequences."""
    increment: int
    """Growth at each stage, in sequences."""
    samples: int
    """Sequences over which the batch grows, in equal stages."""

    def __post_init__(self) -> None:
        for name in ("start", "increment", "samples"):
            require(getattr(self, name) > 0, f"train.ramp_up.{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    steps: int
    """Optimizer steps of the whole run."""
    ramp_up: RampUpConfig | None = None
    """Batch-size ramp-up; null: the full global batch from the first step."""
    eval_interval: int = 1000
    """Steps between evaluations on the held-out split; 0: none. The end of the run evaluates as well."""
    eval_samples: int | None = None
    """Held-out sequences an evaluation reads; null: all."""
    max_skipped_in_row: int = 10
    """Steps in a row with a loss or gradient that is not finite after which the run stops."""
    init_from: str | None = None
    """Hugging Face directory with the weights to start from; null: random ones."""

    def __post_init__(self) -> None:
        require(self.steps > 0, f"train.steps must be positive, got {self.steps}")
        require(self.eval_interval >= 0, f"train.eval_interval must not be negative, got {self.eval_interval}")
        require(
            self.eval_samples is None or self.eval_samples > 0,
            f"train.eval_samples must be positive or null, got {self.eval_samples}",
        )
        require(
            self.max_skipped_in_row > 0, f"train.max_skipped_in_row must be positive, got {self.max_skipped_in_row}"
        )


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is written down while training."""

    interval: int = 10
    """Steps between lines on the console, in metrics.jsonl and in TensorBoard."""
    warmup_steps: int = 3
    """First steps of each start that do not count in throughput: allocation, autotuning and page faults are in them."""
    tensorboard: bool = True
    """Write event files to run_dir/tb."""
    wandb_project: str | None = None
    """Weights & Biases project; needs the extra `wandb`."""
    peak_tflops: float | None = None
    """Dense peak of one device in 1e12 FLOP/s, for MFU; null takes it from the device's name, if that is known."""

    def __post_init__(self) -> None:
        require(self.interval > 0, f"metrics.interval must be positive, got {self.interval}")
        require(self.warmup_steps >= 0, f"metrics.warmup_steps must not be negative, got {self.warmup_steps}")
        require(
            self.peak_tflops is None or self.peak_tflops > 0,
            f"metrics.peak_tflops must be positive or null, got {self.peak_tflops}",
        )


@dataclass(frozen=True, kw_only=True)
class LauncherConfig:
    """How ranks are started."""

    name: Literal["local", "slurm", "dry_run"] = "local"
    """local: on this machine; slurm: as a job on `cluster`; dry_run: start nothing, build the shards on no device and print
    the plan."""
    dry_run: bool = False
    """slurm: print the script and the command that would submit it, with the reason for each number; write nothing."""
    threads_per_rank: int | None = None
    """OMP_NUM_THREADS of each rank; null divides the machine's cores among the ranks."""
    timeout_minutes: float = 10.0
    """A collective that takes longer ends the run: a rank has died or hangs."""
    grace_seconds: float = 120.0
    """After a stop signal, time for the ranks to finish the step and write a checkpoint before they are killed."""
    force: bool = False
    """Start a run although the planner says that it does not fit the GPUs' memory."""
    preflight: bool | None = None
    """Measure devices and links before the first step and name the slow ones (docs/sweeps.md); null: on GPUs and on several
    nodes; false: never."""
    preflight_least: float | None = None
    """Share of the median, e.g. 0.5, below which the preflight ends the run; null: it only warns."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """dry_run: global ranks whose shard is built and shown."""

    def __post_init__(self) -> None:
        require(
            self.threads_per_rank is None or self.threads_per_rank > 0,
            f"launcher.threads_per_rank must be positive or null, got {self.threads_per_rank}",
        )
        for name in ("timeout_minutes", "grace_seconds"):
            require(getattr(self, name) > 0, f"launcher.{name} must be positive, got {getattr(self, name)}")
        require(
            self.preflight_least is None or 0 < self.preflight_least < 1,
            f"launcher.preflight_least must be between 0 and 1 or null, got {self.preflight_least}",
        )
        require(
            not self.dry_run or self.name == "slurm",
            f"launcher.dry_run=true shows a Slurm job and has no meaning with launcher={self.name}: add launcher=slurm, or "
            "use launcher=dry_run to look at a layout",
        )


FREE_MODEL_KEYS = ("dropout", "attention_dropout", "init_std")
"""Model settings that no tensor of a checkpoint depends on."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about one run."""

    name: str
    """Name of the run."""
    run_dir: str
    """Its directory; starting again with the same one resumes it."""
    model: ModelConfig
    """The model."""
    train: TrainConfig
    """The loop."""
    data: DataConfig | None = None
    """The datasets; only a dry run can do without."""
    sae: SAEConfig | None = None
    """Train sparse autoencoders on the activations of a frozen `model` instead of the model; see docs/sae.md."""
    stream: StreamConfig | None = None
    """With `sae`: the language model and how its activations are streamed."""
    seed: int = 1234
    """Initial weights, order of samples and dropout follow from it."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Degrees and batch sizes."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Megatron-Core or DeepSpeed, precision, recompute, optimizer sharding."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW and its schedule."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """Measurements."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Traces of single steps."""
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    """Starting ranks."""
    cluster: ClusterConfig | None = None
    """The cluster, chosen with cluster=NAME; launcher=slurm needs one."""

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), "name must not be empty: the run's directory and records are called after it")
        require(bool(self.run_dir.strip()), "run_dir must not be empty: leave it out for runs/<name>")
        require(0 <= self.seed < 2**63, f"seed must be in [0, 2^63), got {self.seed}")
        check_schedule(self.optim, self.train.steps)
        require(
            (self.sae is None) == (self.stream is None),
            "sae and stream belong together: begin with --config-name train_sae, and name the language model as stream.lm=PATH",
        )

    def layout(self) -> ParallelLayout:
        """The checked layout of the ranks that train. Raises LayoutError if it does not fit itself or the model."""
        layout = ParallelLayout.resolve(self.parallel)
        placement = self.placement()
        if placement is None:
            layout.check_model(self.model)
        else:
            check_producers(placement.producers, self.model)
        check_engine(self.engine, layout, sae=self.sae is not None)
        if self.sae is None:
            check_fp8_shapes(self.engine.fp8, self.model, layout)
            check_compile(self.engine, self.model)
        else:
            require(
                self.engine.compile == "none",
                f"engine.compile={self.engine.compile} is for GPTs: leave it out where SAEs train",
            )
            require(
                self.engine.fp8 == "none", f"engine.fp8={self.engine.fp8} is for GPTs: leave it out where SAEs train"
            )
        self.profile.check(steps=self.train.steps, ranks=layout.world_size)
        if self.sae is not None and self.stream is not None:
            check_sae_layout(self.sae, self.stream, self.model, layout)
        return layout

    def placement(self) -> Placement | None:
        """Which ranks are the language model's, where it has ranks of its own. Raises LayoutError if they do not fit."""
        if self.stream is None or self.stream.producers is None:
            return None
        trainers = ParallelLayout.resolve(self.parallel)
        return Placement(trainers=trainers, producers=self.stream.producers.layout(), lanes=self.stream.lanes)

    def num_ranks(self) -> int:
        """All ranks of the run: those that train, and the language model's own if it has any."""
        placement = self.placement()
        return self.layout().world_size + (0 if placement is None else placement.producers.world_size)


def check_compile(engine: EngineConfig, model: ModelConfig) -> None:
    """Whether the layers can be compiled. Raises ConfigError naming what stands against it."""
    for key, dropout in (("dropout", model.dropout), ("attention_dropout", model.attention_dropout)):
        require(
            engine.compile == "none" or dropout == 0,
            f"engine.compile={engine.compile} with model.{key}={dropout}: dropout draws from Megatron-Core's generators, which "
            f"torch.compile cannot follow; use engine.compile=none or model.{key}=0",
        )


def batch_size_at(ramp_up: RampUpConfig | None, layout: ParallelLayout, consumed_samples: int) -> int:
    """Global batch size of the step that begins after `consumed_samples` sequences."""
    full = layout.global_batch_size
    if ramp_up is None or consumed_samples >= ramp_up.samples:
        return full
    stages = -(-(full - ramp_up.start) // ramp_up.increment)
    stage = consumed_samples * stages // ramp_up.samples
    return min(ramp_up.start + stage * ramp_up.increment, full)


def check_schedule(optim: OptimConfig, steps: int) -> None:
    """Warm-up and decay must lie within the run. Raises ConfigError otherwise."""
    warmup, decay = optim.warmup_steps, optim.decay_steps
    if warmup >= steps:
        raise ConfigError(
            f"optim.warmup_steps={warmup} must be below train.steps={steps}: the learning rate would never reach "
            "optim.lr; use a shorter warm-up (0: none) or more steps"
        )
    if optim.schedule == "wsd" and warmup + wsd_decay_steps(optim, steps) > steps:
        raise ConfigError(
            f"optim.warmup_steps={warmup} and the decay of optim.decay_steps={wsd_decay_steps(optim, steps)} do not fit "
            f"into train.steps={steps}: optim.schedule=wsd decays over the last optim.decay_steps (null: a tenth of the run)"
        )
    if optim.schedule == "cosine" and decay is not None and decay <= warmup:
        raise ConfigError(
            f"optim.decay_steps={decay} must be above optim.warmup_steps={warmup}: with optim.schedule=cosine it is the "
            "step, counted from the start, at which optim.min_lr is reached"
        )


def wsd_decay_steps(optim: OptimConfig, steps: int) -> int:
    """Steps of the final decay under wsd, as `optim.learning_rate` counts them."""
    return optim.decay_steps or max(steps // 10, 1)


def total_samples(ramp_up: RampUpConfig | None, layout: ParallelLayout, steps: int) -> int:
    """Sequences that `steps` optimizer steps from the beginning consume."""
    consumed = done = 0
    while ramp_up is not None and consumed < ramp_up.samples and done < steps:
        consumed += batch_size_at(ramp_up, layout, consumed)
        done += 1
    return consumed + (steps - done) * layout.global_batch_size


def check_ramp_up(ramp_up: RampUpConfig | None, layout: ParallelLayout, *, lanes: int = 1) -> None:
    """Every batch size of the ramp must be one the layout can run, and a multiple of a stream's lanes.

    Raises LayoutError or ConfigError otherwise.
    """
    if ramp_up is None:
        return
    full = layout.global_batch_size
    if ramp_up.start >= full:
        raise ConfigError(
            f"train.ramp_up.start={ramp_up.start} must be below the global batch size {full} that it grows to: start "
            "lower, raise parallel.global_batch_size, or set train.ramp_up=null"
        )
    for size in range(ramp_up.start, full, ramp_up.increment):
        try:
            layout.with_global_batch(size)
        except LayoutError as error:
            raise LayoutError(
                f"train.ramp_up passes a global batch of {size}, which cannot be run: {error}; change train.ramp_up.start "
                f"or .increment (now {ramp_up.start}, {ramp_up.increment})"
            ) from error
        if size % lanes:
            raise LayoutError(
                f"train.ramp_up passes a global batch of {size}, which is no multiple of stream.lanes={lanes}: change "
                f"train.ramp_up.start or .increment (now {ramp_up.start}, {ramp_up.increment})"
            )


def with_vocabulary(config: RunConfig, vocab_size: int) -> RunConfig:
    """The configuration with the dataset's vocabulary; raises ConfigError if the model was given another one."""
    given = config.model.vocab_size
    if given is not None and given < vocab_size:
        raise ConfigError(
            f"model.vocab_size={given} is smaller than the dataset's vocabulary of {vocab_size} tokens: leave it null to "
            "take the dataset's, or prepare the dataset with the model's tokenizer"
        )
    return config if given is not None else replace(config, model=replace(config.model, vocab_size=vocab_size))
