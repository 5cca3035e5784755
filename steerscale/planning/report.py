"""A plan as text: the ranked layouts, the best one's memory and time by part, and why the others are out."""

from collections.abc import Sequence
from dataclasses import fields
from textwrap import fill

from steerscale.planning.layouts import Plan, Planned, sharding_name
from steerscale.planning.memory import GIB
from steerscale.planning.search import Task

COLUMNS = ("#", "layout", "recompute", "optimizer", "s/iter", "tok/s/GPU", "TFLOP/s", "MFU", "bubble", "comm.", "GiB")


def format_plan(task: Task, planned: Planned, *, top: int, rejected: bool, assumptions: Sequence[str] = ()) -> str:
    """The whole answer; `assumptions` are sentences about figures that nobody gave."""
    lines = [*_header(task), *(f"assumed    {sentence}" for sentence in assumptions), ""]
    if planned.plans:
        lines += _table(planned.plans[:top])
        hidden = len(planned.plans) - top
        lines += [f"and {hidden:,} more that fit: --top {len(planned.plans)}"] if hidden > 0 else []
        lines += ["", *_best(planned.plans[0])]
    else:
        lines += _nothing(planned)
    lines += ["", f"rejected   {len(planned.rejections):,}"]
    lines += [f"  {count:>6,}  {reason}" for reason, count in planned.reasons().items()]
    if rejected:
        lines += ["", *(f"{entry.what}: {entry.text}" for entry in planned.rejections)]
    elif planned.rejections:
        lines += ["  each with its numbers: --rejected"]
    return "\n".join(lines)


def _header(task: Task) -> list[str]:
    model, machine = task.model, task.machine
    return [
        f"model      {model.num_parameters() / 1e9:,.2f} B parameters: {model.num_layers} layers of width "
        f"{model.d_model:,}, {model.seq_len:,} tokens, vocabulary {model.tokens:,}; {task.engine.precision}",
        f"machine    {task.gpus:,} x {machine.name} of {machine.memory_gib:g} GiB, {machine.gpus_per_node} a node; "
        f"{machine.intra_node_gb_per_second:g} GB/s within, {machine.inter_node_gb_per_second:g} GB/s between nodes "
        "(a GPU, one direction)",
        f"batch      {task.global_batch_size:,} sequences = {task.global_batch_size * model.seq_len:,} tokens a step",
    ]


def _table(plans: Sequence[Plan]) -> list[str]:
    rows = [COLUMNS, *(_row(number, plan) for number, plan in enumerate(plans, start=1))]
    widths = [max(map(len, column)) for column in zip(*rows)]
    left = {1, 2, 3}
    lines = []
    for row, plan in zip(rows, [None, *plans]):
        cells = (
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        )
        notes = "  ".join(plan.notes) if plan is not None else ""
        lines.append(f"{'  '.join(cells)}  {notes}".rstrip())
    return lines


def _row(number: int, plan: Plan) -> tuple[str, ...]:
    time, rates = plan.time, plan.throughput
    communication = time.tensor_communication + time.pipeline_communication + time.data_communication
    return (
        str(number),
        str(plan.layout),
        plan.engine.recompute,
        sharding_name(plan.engine),
        f"{time.total:.3g}",
        f"{rates.tokens_per_second_per_gpu:,.0f}",
        f"{rates.model_tflops_per_gpu:.3g}",
        "-" if rates.mfu is None else f"{rates.mfu:.1%}",
        f"{time.bubble / time.total:.1%}",
        f"{communication / time.total:.1%}",
        f"{plan.fit.memory.total / GIB:.1f}",
    )


def _best(plan: Plan) -> list[str]:
    parts = plan.fit.parts_gib()
    seconds = [(spec.name.replace("_", " "), getattr(plan.time, spec.name)) for spec in fields(plan.time)]
    spent = ", ".join(f"{name} {value / plan.time.total:.0%}" for name, value in seconds if value > 0)
    return [
        f"best       {plan}",
        f"time       {plan.time.total:.3g} s: {spent}",
        f"memory     GiB of the fullest rank, {sum(parts.values()):.1f} of {plan.fit.device_gib:g}:",
        *(f"  {name:<12}{gib:>8.2f}" for name, gib in parts.items()),
        *(
            [f"  and {plan.fit.memory.host / GIB:.2f} of the host's memory for its optimizer"]
            if plan.fit.memory.host
            else []
        ),
        "to run it",
        fill(
            f"  python -m launch.train {' '.join(plan.overrides())}",
            width=118,
            subsequent_indent="    ",
            break_on_hyphens=False,
            break_long_words=False,
        ).replace("\n", " \\\n"),
    ]


def _nothing(planned: Planned) -> list[str]:
    over = [entry for entry in planned.rejections if "GiB over" in entry.text]
    if not over:
        return ["no layout is possible, whatever memory there is: another number of GPUs or sequences, or fewer limits"]
    nearest = min(over, key=lambda entry: float(entry.text.split(" ")[0].replace(",", "")))
    return [
        "nothing fits: more GPUs, larger ones, or a smaller model, sequence or micro-batch",
        f"nearest    {nearest.what}: {nearest.text}",
    ]
