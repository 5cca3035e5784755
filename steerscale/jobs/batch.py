"""What a job's script asks: `python -m steerscale.jobs.batch begin|term|end|chained RUN_DIR --job JOB ...`. Torch-free.

Exit codes of ranks tell nothing (srun reports the highest one, after it has killed the others): what counts is what the
ranks left in the run directory. `end` prints one word for the script:

    finished    the run is done                      ended    it was cancelled, or the time limit has ended it
    go_on       a checkpoint is there: requeue       failed   see status.json
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from steerscale.checkpoint.integrity import checkpoints, step_of
from steerscale.config import from_mapping
from steerscale.errors import LaunchError, SteerscaleError
from steerscale.jobs.journal import Journal, read_journal, record
from steerscale.jobs.slurm import nodes_down, query
from steerscale.planning.cluster import ClusterConfig
from steerscale.rundir import Status, read_config, read_errors, read_status, write_status

KILLED = 128 + 9
"""What srun answers if a task was ended by SIGKILL."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is to become of a run whose ranks have ended, and the status that says so."""

    word: Literal["finished", "go_on", "ended", "failed"]
    status: Status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 1 if the run must not begin."""
    args = _parse(argv)
    try:
        return {"begin": _begin, "term": _term, "end": _end, "chained": _chained}[args.command](args)
    except SteerscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def decide(
    status: Status,
    journal: Journal,
    *,
    step: int,
    srun_status: int,
    errors: Sequence[dict[str, Any]] = (),
    down: Sequence[str] = (),
    max_restarts: int,
) -> Decision:
    """What to do after the ranks have ended.

    Args:
        status: as the ranks left it.
        step: of the newest checkpoint.
        srun_status: srun's exit status.
        errors: what ranks wrote of their failures, the earliest first.
        down: nodes of the job that are down.
        max_restarts: as in the configuration.
    """
    if status.state == "finished":
        return Decision(word="finished", status=status)
    stopped = status.state == "stopped"
    asked = "cancelled" if journal.cancelled else journal.ended_by
    if asked is not None:
        text = {"cancelled": "it was cancelled", "timeout": "the job's time limit ended it"}[asked]
        where = f"a checkpoint of step {step} is there" if step else "there is no checkpoint"
        ended = replace(
            status, state="stopped" if stopped else "failed", cause=asked, reason=f"{text}; {where}", step=step
        )
        return Decision(word="ended", status=ended)
    if not stopped and not down:
        return Decision(word="failed", status=_failure(status, srun_status, errors))
    if (reason := refusal(journal, step=step, max_restarts=max_restarts)) is not None:
        return Decision(word="failed", status=replace(status, state="failed", cause="restarts", reason=reason))
    why = status.reason.split(";")[0] if stopped else f"{', '.join(down)} failed"
    return Decision(
        word="go_on", status=replace(status, state="stopped", reason=f"{why}; goes on by itself", step=step)
    )


def refusal(journal: Journal, *, step: int, max_restarts: int) -> str | None:
    """Why a run that stands at `step` must not be started once more, or None if it may be."""
    starts = journal.starts
    if len(starts) > max_restarts:
        return f"it was started again as often as cluster.max_restarts={max_restarts} allows: submit the run again, or raise it"
    if len(starts) >= 2 and starts[-1].get("step") == starts[-2].get("step") == step:
        return (
            f"no progress: two starts in a row began and ended at step {step}; a job must get through its start and a "
            "checkpoint: raise cluster.time, or lower checkpoint.interval if nodes fail, then submit again"
        )
    return None


def newest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint; 0 if there is none."""
    found = checkpoints(run_dir / "checkpoints")
    return step_of(found[-1]) if found else 0


def _failure(status: Status, srun_status: int, errors: Sequence[dict[str, Any]]) -> Status:
    """The status of a run of which a rank failed: of want of memory if any rank says so, else of the first error."""
    memory = [error for error in errors if error.get("oom")]
    first = (memory or [*errors, None])[0]
    if first is not None:
        reason = f"rank {first['rank']} {first['type']}: {first['message']}".splitlines()[0]
    else:
        reason = f"srun ended with status {srun_status} and no rank left word: see the output in slurm/ and logs/"
    if srun_status == KILLED and not memory:
        reason += "; a rank was killed (SIGKILL), most likely because the job's memory ran out (cluster.memory)"
    return replace(status, state="failed", cause="oom" if memory else "", reason=reason)


def _begin(args: argparse.Namespace) -> int:
    """Note the start and forget the last one's errors, unless it would be one too many."""
    run_dir: Path = args.run_dir
    journal, status = read_journal(run_dir), read_status(run_dir)
    step = newest_step(run_dir)
    reason = refusal(journal, step=step, max_restarts=_cluster(run_dir).max_restarts) if journal.starts else None
    if reason is not None:
        record(run_dir, "end", args.job, decision="failed", step=step, reason=reason)
        write_status(run_dir, replace(status, state="failed", cause="restarts", reason=reason, step=step))
        print(f"not started: {reason}", file=sys.stderr)
        return 1
    for path in (run_dir / "logs").glob("rank_*.error.json"):
        path.unlink()
    record(run_dir, "start", args.job, restart=args.restart, nodes=args.nodes, step=step)
    write_status(run_dir, Status(state="running", step=step, steps=status.steps, reason="the ranks are starting"))
    return 0


def _term(args: argparse.Namespace) -> int:
    """Slurm ends the job, and in some seconds this process: note why, unless a node failed and the job begins again."""
    if nodes_down(args.nodes):
        return 0
    try:
        job = query([args.job]).get(args.job)
    except LaunchError:
        job = None
    cause = "timeout" if job is not None and job.reason == "TimeLimit" else "cancelled"
    record(args.run_dir, "term", args.job, cause=cause)
    return 0


def _end(args: argparse.Namespace) -> int:
    """Decide, leave word of it, and tell the script."""
    run_dir: Path = args.run_dir
    decision = decide(
        read_status(run_dir),
        read_journal(run_dir),
        step=newest_step(run_dir),
        srun_status=args.status,
        errors=read_errors(run_dir),
        down=nodes_down(args.nodes) if args.status else [],
        max_restarts=_cluster(run_dir).max_restarts,
    )
    status = decision.status
    record(run_dir, "end", args.job, decision=decision.word, step=status.step, reason=status.reason)
    if decision.word != "finished":
        write_status(run_dir, status)
        print(f"{decision.word}: {status.reason}", file=sys.stderr)
    print(decision.word)
    return 0


def _chained(args: argparse.Namespace) -> int:
    record(args.run_dir, "chained", args.next, after=args.job)
    return 0


def _cluster(run_dir: Path) -> ClusterConfig:
    return from_mapping(ClusterConfig, read_config(run_dir)["cluster"], at="cluster")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m steerscale.jobs.batch", description=__doc__)
    parser.add_argument("command", choices=["begin", "term", "end", "chained"])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--job", required=True, help="NUMBER or NUMBER_INDEX")
    parser.add_argument("--restart", type=int, default=0, help="begin: Slurm's own count of restarts")
    parser.add_argument("--nodes", default="", help="begin, term, end: SLURM_JOB_NODELIST")
    parser.add_argument("--status", type=int, default=0, help="end: srun's exit status")
    parser.add_argument("--next", help="chained: the job that was submitted")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
