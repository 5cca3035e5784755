"""Bad configurations, and what the one line about each has to hold."""

RUN = "data.path={good} train.steps=10"
"""What every run needs; a case adds what is wrong."""
SAE_ALONE = "--config-name train_sae data.path={good} train.steps=200 parallel.micro_batch_size=64"
ON_LM = f"{SAE_ALONE} stream.lm=other_run"
SAE = f"{ON_LM} sae.hooks=[blocks.1.hook_resid_post]"
"""What a run of SAEs needs, on a model of four layers of width 64."""
FAR_APART = "sae.hooks=[blocks.0.hook_resid_post,blocks.3.hook_resid_post]"

# (arguments, parts of the message). {name} is one of the datasets in conftest.py.
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    # --- groups and keys
    "engine unknown": (f"{RUN} engine=deepsped", ("engine=deepsped", "did you mean engine=deepspeed?")),
    "model unknown": (f"{RUN} model=7b", ("model=7b", "configs/model/7b.yaml", "7b_gqa_swiglu")),
    "launcher unknown": (f"{RUN} launcher=dryrun", ("launcher=dryrun", "did you mean launcher=dry_run?")),
    "experiment unknown": ("experiment=german", ("experiment=german", "did you mean experiment=german_demo?")),
    "group unknown": (
        f"{RUN} cluster/gpu=a100",
        ("cluster/gpu=a100", "groups are cluster, engine, experiment, launcher"),
    ),
    "two options": (f"{RUN} model=[demo,125m]", ("model=[demo,125m]: choose one of 1.3b",)),
    "package": (f"{RUN} model@teacher=demo", ("model@teacher=demo", "no such config group")),
    "section as a choice": (f"{RUN} optim=adam", ("optim=adam", "optim is a section", "optim.lr=...")),
    "dataset as a choice": ("data=german train.steps=10", ("data=german", "data.path=...")),
    "top-level typo": (f"{RUN} optimm.lr=1", ("unknown key 'optimm'", "did you mean 'optim'?")),
    "nested typo": (f"{RUN} optim.lrr=1", ("unknown key 'optim.lrr'", "did you mean 'lr'?")),
    "nested typo with plus": (f"{RUN} +parallel.tensr=2", ("unknown key 'parallel.tensr'", "'tensor'")),
    "no idea": (f"{RUN} metrics.zzz=1", ("unknown key 'metrics.zzz'", "known keys: interval")),
    "deep typo": (f"{RUN} train.ramp_up.strat=1", ("unknown key 'train.ramp_up.strat'", "did you mean 'start'?")),
    "deep typo in a mapping": (
        f"{RUN} train.ramp_up={{{{start:1,increment:1,sampels:2}}}}",
        ("unknown key 'train.ramp_up.sampels'", "did you mean 'samples'?"),
    ),
    "key below a value": (f"{RUN} optim.lr.max=1", ("unknown key 'optim.lr.max'", "optim.lr=VALUE")),
    "key missing below": (f"{RUN} train.ramp_up.start=4", ("train.ramp_up.increment is missing",)),
    "deletion": (f"{RUN} ~optim.lr", ("~optim.lr", "cannot be deleted")),
    "hydra setting": (f"{RUN} hydra.run.dir=x", ("hydra.run.dir=x", "no effect here", "run_dir=...")),
    "steps missing": ("data.path={good}", ("train.steps must be set", "train.steps=VALUE")),
    "no model": (f"{RUN} model=null", ("model=null: choose one of 1.3b", "leave model out for the default")),
    "interpolation": (
        f"{RUN} name='a_${{{{tensor}}}}'",
        ("name refers to ${{tensor}}", "does not exist", "${{parallel.tensor}}"),
    ),
    # --- syntax and options
    "no value": (f"{RUN} model", ("'model' is no override", "key=value")),
    "unclosed list": (f"{RUN} launcher.ranks=[1", ("'launcher.ranks=[1' cannot be read", "close what is opened")),
    "parentheses": (f"{RUN} name='a (b)'", ("'name=a (b)' cannot be read", "quotes")),
    "quoted key": (
        "train.steps=1 \"data.blend={{{{'/a b':1}}}}\"",
        ("cannot be read", "keys inside {{}} stand without quotes"),
    ),
    "option typo": (f"{RUN} --cgf", ("unknown option --cgf", "did you mean --cfg?")),
    "option cut short": (f"{RUN} --config", ("unknown option --config", "did you mean --config-name?")),
    "key as option": (f"{RUN} --parallel.tensor=2", ("--parallel.tensor=2", "like parallel.tensor=2")),
    "group as option": (f"{RUN} --model 7b", ("unknown option --model", "like model=VALUE")),
    "option without value": (f"{RUN} --config-name", ("--config-name", "expected one argument")),
    "config name": (f"{RUN} --config-name trian", ("--config-name trian", "which has train")),
    "config file": (f"{RUN} --config-name runs/x/config.yaml", ("runs/x/config.yaml", "no such file")),
    # --- values of the wrong type
    "text for a number": (f"{RUN} train.steps=ten", ("train.steps must be a whole number, got 'ten'",)),
    "fraction": (f"{RUN} parallel.tensor=1.5", ("parallel.tensor must be a whole number, got 1.5",)),
    "bool for a number": (f"{RUN} model.num_layers=true", ("model.num_layers must be a whole number, got True",)),
    "nothing": (f"{RUN} optim.lr=", ("optim.lr must be a number, got ''",)),
    "null": (f"{RUN} model.d_model=null", ("model.d_model must be a whole number, got None",)),
    "number for a bool": (f"{RUN} model.bias=1", ("model.bias must be true or false, got 1",)),
    "list for text": (f"{RUN} name=[a]", ("name must be text, got ['a']",)),
    "number for a list": (f"{RUN} launcher.ranks=5", ("launcher.ranks must be a list, got 5",)),
    "text in a list": (f"{RUN} launcher.ranks=[a]", ("launcher.ranks[0] must be a whole number, got 'a'",)),
    "list for a mapping": ("data.blend=[1] train.steps=10", ("data.blend must be a mapping, got [1]",)),
    "not finite": (f"{RUN} optim.lr=inf", ("optim.lr must be a finite number, got inf",)),
    "not a number": (f"{RUN} optim.clip=nan", ("optim.clip must be a finite number, got nan",)),
    "position": (f"{RUN} model.position=rope", ("model.position must be one of learned | rotary, got 'rope'",)),
    "precision": (f"{RUN} engine.precision=fp8", ("engine.precision must be one of fp32 | bf16 | fp16, got 'fp8'",)),
    "schedule": (f"{RUN} optim.schedule=linear", ("optim.schedule must be one of cosine | wsd", "'linear'")),
    "engine": (f"{RUN} engine.name=deepsped", ("engine.name must be one of", "'deepsped'")),
    # --- values out of range
    "no steps": (f"{RUN} train.steps=0", ("train.steps must be positive, got 0",)),
    "negative width": (f"{RUN} model.d_ff=-4", ("model.d_ff must be positive or null, got -4",)),
    "negative degree": (f"{RUN} parallel.data=-1", ("parallel.data must be at least 1, got -1",)),
    "negative interval": (f"{RUN} train.eval_interval=-1", ("train.eval_interval must not be negative, got -1",)),
    "checkpoint interval": (f"{RUN} checkpoint.interval=0", ("checkpoint.interval must be positive, got 0",)),
    "negative seed": (f"{RUN} seed=-1", ("seed must be in [0, 2^63), got -1",)),
    "dropout": (f"{RUN} model.dropout=1", ("model.dropout must be in [0, 1), got 1.0",)),
    "timeout": (f"{RUN} launcher.timeout_minutes=0", ("launcher.timeout_minutes must be positive, got 0.0",)),
    "empty name": (f"{RUN} name=''", ("name must not be empty",)),
    "empty run_dir": (f"{RUN} run_dir=''", ("run_dir must not be empty",)),
    # --- model
    "heads": (f"{RUN} model.num_heads=5", ("model.num_heads must divide model.d_model", "5 does not divide 128")),
    "key/value groups": (f"{RUN} model.num_kv_groups=3", ("model.num_kv_groups must divide", "3 does not divide 4")),
    "odd head": (f"{RUN} model.d_head=3", ("model.position=rotary", "even head width", "3")),
    # --- layout
    "tensor, heads": (f"{RUN} parallel.tensor=3", ("parallel.tensor must divide model.num_heads", "3 does not")),
    "tensor, groups": (
        f"{RUN} parallel.tensor=4 model.num_kv_groups=2",
        ("parallel.tensor must divide model.num_kv_groups", "4 does not divide 2"),
    ),
    "tensor, d_ff": (f"{RUN} parallel.tensor=4 model.d_ff=390", ("parallel.tensor must divide model.d_ff", "390")),
    "tensor, vocabulary": (
        f"{RUN} parallel.tensor=4 model.pad_vocab_to=1001",
        ("parallel.tensor must divide the padded vocabulary", "4 does not divide 1001", "multiple of 4"),
    ),
    "layers": (f"{RUN} parallel.pipeline=3", ("parallel.pipeline x", "model.num_layers", "does not divide 4")),
    "chunks": (
        f"{RUN} parallel.pipeline=2 parallel.virtual_pipeline=3 parallel.gradient_accumulation_steps=2",
        ("2 x 3 = 6 does not divide 4",),
    ),
    "sequence alone": (f"{RUN} parallel.sequence=true", ("parallel.sequence=true needs parallel.tensor > 1",)),
    "sequence length": (
        f"{RUN} parallel.sequence=true parallel.tensor=2 model.seq_len=127",
        ("parallel.tensor must divide model.seq_len", "2 does not divide 127"),
    ),
    "interleaving alone": (
        f"{RUN} parallel.virtual_pipeline=2",
        ("parallel.virtual_pipeline=2 needs parallel.pipeline > 1",),
    ),
    "interleaving, accumulation": (
        f"{RUN} parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.gradient_accumulation_steps=3",
        ("divisible by parallel.pipeline", "GAS=3 is not divisible by 2"),
    ),
    "global batch": (
        f"{RUN} parallel.global_batch_size=10 parallel.micro_batch_size=4 parallel.data=1",
        ("parallel.global_batch_size=10", "not divisible", "nearest that is: 8"),
    ),
    "contradicting batches": (
        f"{RUN} parallel.global_batch_size=8 parallel.gradient_accumulation_steps=3",
        ("parallel.gradient_accumulation_steps=3 and parallel.global_batch_size=8 disagree", "set one"),
    ),
    "too many local ranks": (
        f"{RUN} parallel.data=100000",
        ("launcher=local would start all 100,000 ranks", "launcher=dry_run"),
    ),
    "rank out of range": (
        f"{RUN} launcher=dry_run launcher.ranks=[0,2] parallel.data=2",
        ("launcher.ranks=[0, 2]: there is no rank 2", "ranks 0 to 1"),
    ),
    "negative rank": (f"{RUN} launcher=dry_run launcher.ranks=[-1]", ("there is no rank -1",)),
    "ZeRO-2 with a pipeline": (
        f"{RUN} engine=deepspeed engine.zero_stage=2 parallel.pipeline=2",
        ("engine.zero_stage=2 with parallel.pipeline=2", "engine.zero_stage=1 or 0"),
    ),
    "ZeRO stage of Megatron": (f"{RUN} engine.zero_stage=2", ("engine.zero_stage=2", "choose engine=deepspeed")),
    "interleaving with DeepSpeed": (
        f"{RUN} engine=deepspeed parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.gradient_accumulation_steps=2",
        ("parallel.virtual_pipeline=2", "plain 1F1B", "engine=megatron"),
    ),
    # --- batch-size ramp-up
    "ramp-up above": (
        f"{RUN} train.ramp_up.start=8 train.ramp_up.increment=4 train.ramp_up.samples=9 parallel.global_batch_size=8",
        ("train.ramp_up.start=8 must be below the global batch size 8", "train.ramp_up=null"),
    ),
    "ramp-up between": (
        f"{RUN} train.ramp_up={{{{start:4,increment:3,samples:9}}}} parallel.global_batch_size=16 parallel.data=4",
        ("train.ramp_up passes a global batch of 7", "multiple of MBS x DP = 4", "increment (now 4, 3)"),
    ),
    "ramp-up interleaved": (
        f"{RUN} train.ramp_up={{{{start:1,increment:1,samples:9}}}} parallel.global_batch_size=4 parallel.pipeline=2 "
        "parallel.virtual_pipeline=2",
        ("train.ramp_up passes a global batch of 1", "GAS=1 is not divisible by 2"),
    ),
    "ramp-up negative": (
        f"{RUN} train.ramp_up={{{{start:1,increment:-1,samples:9}}}}",
        ("train.ramp_up.increment must be positive, got -1",),
    ),
    # --- learning rate
    "negative rate": (f"{RUN} optim.lr=-1", ("optim.lr must be positive, got -1.0",)),
    "rates crossed": (f"{RUN} optim.lr=1e-5", ("optim.min_lr must be between 0 and optim.lr=1e-05, got 3e-05",)),
    "warm-up": (f"{RUN} optim.warmup_steps=10", ("optim.warmup_steps=10 must be below train.steps=10",)),
    "decay too long": (
        f"{RUN} optim.schedule=wsd optim.decay_steps=11",
        ("optim.decay_steps=11 do not fit into train.steps=10", "wsd"),
    ),
    "warm-up and decay": (
        f"{RUN} optim.schedule=wsd optim.warmup_steps=5 optim.decay_steps=6",
        ("optim.warmup_steps=5", "optim.decay_steps=6", "train.steps=10"),
    ),
    "warm-up and a tenth": (
        "data.path={good} train.steps=100 optim.schedule=wsd optim.warmup_steps=95",
        ("optim.warmup_steps=95", "optim.decay_steps=10", "train.steps=100"),
    ),
    "cosine ends in warm-up": (
        f"{RUN} optim.warmup_steps=5 optim.decay_steps=5",
        ("optim.decay_steps=5 must be above optim.warmup_steps=5",),
    ),
    # --- data
    "no data": ("train.steps=10", ("data.path (or data.blend) must be given", "steerscale data prepare")),
    "no data at all": ("train.steps=10 data=null", ("data.path (or data.blend) must be given",)),
    "data missing": ("data.path=nowhere train.steps=10", ("data.path: there is no dataset directory", "nowhere")),
    "data is a file": (f"{RUN} data.path={{good}}/train.bin", ("there is no dataset directory", "train.bin")),
    "no dataset": ("data.path={no_manifest} train.steps=10", ("is not a dataset: it has no manifest.json",)),
    "home unknown": ("data.path=\"'~nobody_here/x'\" train.steps=10", ("data.path=~nobody_here/x", "home directory")),
    "name too long": (f"{RUN} run_dir={'x' * 300}", ("run_dir=xxx", "File name too long")),
    "manifest garbage": ("data.path={garbage} train.steps=10", ("manifest.json cannot be read as the manifest",)),
    "manifest a list": ("data.path={list} train.steps=10", ("manifest.json has format_version None",)),
    "manifest newer": ("data.path={newer} train.steps=10", ("format_version 2", "update steerscale")),
    "manifest strange": ("data.path={strange} train.steps=10", ("not a valid manifest", "unknown key 'colour'")),
    "data truncated": ("data.path={cut} train.steps=10", ("train.bin has 100 bytes where the manifest expects",)),
    "data damaged": ("data.path={header} train.steps=10", ("train.idx has another header", "prepare")),
    "index missing": ("data.path={no_index} train.steps=10", ("valid.idx is missing: copy the whole",)),
    "split missing": ("data.path={no_train} train.steps=10", ("has no split 'train', only valid",)),
    "path and blend": (f"{RUN} data.blend={{{{x:1}}}}", ("exactly one of data.path and data.blend",)),
    "blend missing one": (
        "data.blend={{'{good}':1,nowhere:2}} train.steps=10",
        ("data.blend: there is no dataset directory", "nowhere"),
    ),
    "blend negative": ("data.blend={{'{good}':-1}} train.steps=10", ("data.blend[", "must be positive, got -1.0")),
    "blend tiny": ("data.blend={{a:1,b:1e-9}} train.steps=10", ("data.blend[", "below the resolution of 1/4096")),
    "tokenizers differ": (
        "data.blend={{'{good}':1,'{other}':1}} train.steps=10",
        ("data.blend mixes tokenizers", "hash 000000000000", "same tokenizer directory"),
    ),
    "too short": (
        f"{RUN} model.seq_len=1000000",
        ("split 'train'", "fewer than one sequence", "model.seq_len=1000000"),
    ),
    "held-out too short": (
        f"{RUN} model.seq_len={{held_out}} train.eval_interval=0",
        ("split 'valid'", "fewer than one sequence", "model.seq_len=", "--split 1,0,0"),
    ),
    "vocabulary": (f"{RUN} model.vocab_size=999", ("model.vocab_size=999 is smaller", "1000 tokens", "null")),
    "skip flat": (f"{RUN} data.skip=[5,3]", ("data.skip[0] must be a list, got 5",)),
    "skip backwards": (f"{RUN} data.skip=[[5,3]]", ("data.skip[0] must be [start, end)", "got [5, 3]")),
    "skip of three": (f"{RUN} data.skip=[[1,2],[1,2,3]]", ("data.skip[1] must be [start, end)", "[1, 2, 3]")),
    # --- run directory and initial weights
    "run_dir a file": (f"{RUN} run_dir=a_file", ("run_dir=", "a_file exists and is a file", "run_dir=...")),
    "run_dir taken": (f"{RUN} run_dir=notes", ("notes exists and is no run directory", "name=...")),
    "run_dir a dangling link": (f"{RUN} run_dir=dangling", ("dangling exists and is a dangling link",)),
    "run_dir under a file": (f"{RUN} run_dir=a_file/run", ("a_file/run cannot be made", "a_file is a file")),
    "run of another model": (
        f"{RUN} run_dir=other_run",
        ("holds checkpoints of another model", "model.d_model was 64, is 128", "choose another run_dir"),
    ),
    "initial weights missing": (f"{RUN} train.init_from=nowhere", ("train.init_from=", "nowhere", "does not exist")),
    "initial weights elsewhere": (f"{RUN} train.init_from=notes", ("notes is no Hugging Face model", "no config.json")),
    # --- sweeps
    "sweep without -m": (f"{RUN} optim.lr=1e-4,3e-4", ("optim.lr=1e-4,3e-4 lists several values", "add -m")),
    "sweep of bad points": (
        f"-m {RUN} parallel.tensor=3,6",
        ("parallel.tensor=3: parallel.tensor must divide model.num_heads",),
    ),
    "sweep setting without -m": (f"{RUN} sweep.gpus=2", ("sweep.gpus=2 is about sweeps", "add -m")),
    "sweep with a bad option": (f"-m {RUN} model=demo,dmeo", ("model=dmeo", "did you mean model=demo?")),
    "sweep over an interval": (f"-m {RUN} optim.lr=interval(0,1)", ("optim.lr=interval(0,1)", "range(...)")),
    "sweep over files of no group": (f"-m {RUN} data.path=glob(*)", ("data.path=glob(*)", "config group")),
    "sweep over nothing": (f"-m {RUN} model=glob(xyz*)", ("model=glob(xyz*) stands for no value",)),
    # --- dry runs
    "dry run without vocabulary": ("launcher=dry_run train.steps=10", ("needs model.vocab_size", "=51200")),
    "dry run, data missing": ("launcher=dry_run train.steps=10 data.path=nowhere", ("no dataset directory", "nowhere")),
    "dry run, data damaged": (
        "launcher=dry_run train.steps=10 data.path={cut} model.vocab_size=5000",
        ("train.bin has 100 bytes",),
    ),
    "dry run, vocabulary": (f"launcher=dry_run {RUN} model.vocab_size=10", ("model.vocab_size=10 is smaller",)),
    # --- SAEs
    "SAE without model": (
        f"{SAE_ALONE} sae.hooks=[blocks.1.hook_resid_post]",
        ("stream.lm must be set", "stream.lm=VALUE"),
    ),
    "SAE, model missing": (
        f"{SAE_ALONE} stream.lm=nowhere sae.hooks=[blocks.1.hook_resid_post]",
        ("stream.lm=", "nowhere is neither a run directory", "nor a Hugging Face model"),
    ),
    "SAE without hooks": (ON_LM, ("sae.hooks must be set",)),
    "SAE without stream": (
        f"{RUN} +sae.hooks=[blocks.1.hook_resid_post]",
        ("sae and stream belong together", "--config-name train_sae", "stream.lm=PATH"),
    ),
    "SAE, hook unknown": (
        f"{ON_LM} sae.hooks=[blocks.1.hook_resid]",
        ("no hook point 'blocks.1.hook_resid'", "did you mean 'blocks.1.hook_resid_pre'?"),
    ),
    "SAE, layer unknown": (
        f"{ON_LM} sae.hooks=[blocks.9.hook_mlp_out]",
        ("'blocks.9.hook_mlp_out'", "blocks.0 to blocks.3"),
    ),
    "SAE, hook twice": (f"{ON_LM} sae.hooks=[a,a]", ("sae.hooks must differ",)),
    "SAE preset unknown": (f"{SAE} sae=topk_32x", ("sae=topk_32x", "did you mean sae=topk_16x?")),
    "SAE architecture": (
        f"{SAE} sae.architecture=vanilla",
        ("sae.architecture must be one of relu | gated", "'vanilla'"),
    ),
    "SAE, k": (f"{SAE} sae.width=64 sae.k=100", ("sae.k=100 must be at most the number of latents 64",)),
    "SAE, k of a variant": (
        f"{SAE} sae.variants=[{{{{k:8}}}},{{{{k:2000}}}}]",
        ("sae.k=2000 must be at most the number of latents 1024",),
    ),
    "SAE variants alike": (f"{SAE} sae.variants=[{{{{k:8}}}},{{{{k:8}}}}]", ("sae.variants must differ",)),
    "SAE, tensor": (
        f"{SAE} sae.width=1001 parallel.tensor=2",
        ("parallel.tensor must divide the latents", "2 does not divide the 1001", "sae.width or sae.expansion"),
    ),
    "SAE, lanes and replicas": (
        f"{SAE} parallel.data=3",
        ("parallel.data must divide stream.lanes", "3 does not divide 16"),
    ),
    "SAE, lanes and batch": (
        f"{SAE} parallel.micro_batch_size=40",
        ("stream.lanes must divide the global batch", "16 does not divide 40 vectors"),
    ),
    "SAE, lanes and ramp-up": (
        f"{SAE} parallel.micro_batch_size=8 parallel.global_batch_size=96 train.ramp_up={{{{start:64,increment:8,samples:9}}}}",
        ("train.ramp_up passes a global batch of 72", "no multiple of stream.lanes=16", ".increment (now 64, 8)"),
    ),
    "crosscoder over stages": (
        f"{ON_LM} {FAR_APART} sae.crosscoder=true parallel.pipeline=2",
        ("blocks.0.hook_resid_post+blocks.3.hook_resid_post lie on several of the 2 pipeline stages",),
    ),
    "crosscoder alone": (f"{SAE} sae.crosscoder=true", ("sae.crosscoder=true needs several sae.hooks",)),
    "transcoder over stages": (
        f"{ON_LM} sae.hooks=[blocks.0.hook_mlp_out] sae.targets=[blocks.3.hook_mlp_out] parallel.pipeline=2",
        ("lie on several of the 2 pipeline stages",),
    ),
    "transcoder backwards": (
        f"{ON_LM} sae.hooks=[blocks.1.hook_mlp_out] sae.targets=[blocks.1.hook_resid_pre]",
        ("sae.targets: blocks.1.hook_resid_pre comes before blocks.1.hook_mlp_out",),
    ),
    "transcoder, targets missing": (f"{ON_LM} {FAR_APART} sae.targets=[a]", ("one hook point for each", "1 for 2")),
    "SAE, interleaved": (
        f"{SAE} parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.gradient_accumulation_steps=2",
        ("parallel.virtual_pipeline=2", "leave it at 1"),
    ),
    "SAE, another model": (
        f"{SAE} model=125m",
        ("stream.lm=other_run is another model", "model.d_model=768 is not 64"),
    ),
    "SAE, model's width": (f"{SAE} model.d_model=128", ("stream.lm=other_run is another model", "128 is not 64")),
    "SAE, transformers on a run": (f"{SAE} stream.lm_kind=transformers", ("is a run directory", "use gpt")),
    "SAE, checkpoint missing": (
        f"{SAE} stream.checkpoint=other_run/checkpoints/step_00000099",
        ("stream.checkpoint=", "step_00000099 is no whole checkpoint", "manifest.json cannot be read"),
    ),
    "SAE, nothing trained": (f"{SAE} stream.lm=untrained", ("untrained holds no whole checkpoint", "train it first")),
    "SAE, buffer too small": (
        f"{SAE} stream.buffer_gib=0.0001",
        ("stream.buffer_gib=0.0001 holds less than a sequence", "stream.lanes=16", "must be at least"),
    ),
    "SAE, beyond learned positions": (
        f"{SAE} stream.lm=learned stream.seq_len=4096",
        ("stream.seq_len=4096 is longer than the model's 128 learned positions",),
    ),
    # --- producers apart
    "producers, typo": (f"{SAE} stream.producers.tensr=2", ("unknown key 'stream.producers.tensr'", "'tensor'")),
    "producers, none": (f"{SAE} stream.producers.data=0", ("stream.producers.data must be at least 1, got 0",)),
    "producers, heads": (
        f"{SAE} stream.producers.tensor=3",
        ("stream.producers.tensor must divide model.num_heads", "3 does not divide 4"),
    ),
    "producers, layers": (f"{SAE} stream.producers.pipeline=3", ("stream.producers.pipeline x", "does not divide 4")),
    "producers, lanes": (
        f"{SAE} stream.producers.data=3",
        ("stream.producers.data must divide stream.lanes: 3 does not divide 16",),
    ),
    "producers, trainers' pipeline": (
        f"{SAE} stream.producers.tensor=2 parallel.pipeline=2",
        ("parallel.pipeline=2 cuts the language model", "set stream.producers.pipeline"),
    ),
    "producers, sequence": (
        f"{SAE} stream.producers.sequence=true",
        ("stream.producers.sequence=true needs stream.producers.tensor > 1",),
    ),
    "producers, nodes": (
        f"{SAE} stream.producers.tensor=4 parallel.tensor=2 parallel.data=4 launcher=slurm cluster=alpha "
        "cluster.account=p",
        ("8 ranks that train and 4 producers are 12", "do not fill whole nodes of alpha", "for 8 or 16 together"),
    ),
    "SAE into another architecture's run": (
        f"{SAE} run_dir=sae_run sae.architecture=jumprelu",
        ("sae_run holds checkpoints of another model", "architecture: topk", "architecture: jumprelu"),
    ),
    "SAE into a narrower one's run": (f"{SAE} run_dir=sae_run sae.expansion=8", ("width: 1024", "width: 512")),
    "one SAE more": (
        f"{ON_LM} {FAR_APART.replace('0', '1', 1)} run_dir=sae_run",
        ("sae.blocks.3.hook_resid_post was null",),
    ),
    "SAE into a GPT's run": (f"{SAE} run_dir=other_run", ("other_run holds checkpoints of another model",)),
}
