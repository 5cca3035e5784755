"""What becomes of a run whose ranks have ended."""

from collections.abc import Sequence
from typing import Any

import pytest

from steerscale.jobs.batch import Decision, decide, refusal
from steerscale.jobs.journal import Journal
from steerscale.rundir import Status

STOPPED = Status(state="stopped", step=20, steps=100, reason="stopped by SIGUSR1; start again to go on")
RUNNING = Status(state="running", step=20, steps=100)
SUBMIT = {"event": "submit", "job": "7", "time": 1.0}
CANCEL = {"event": "cancel", "job": "7", "time": 3.0}


def starts(*steps: int) -> list[dict[str, Any]]:
    """Starts at these checkpoints' steps."""
    return [{"event": "start", "job": "7", "time": 2.0, "step": step} for step in steps]


def term(cause: str) -> dict[str, Any]:
    """Slurm asked the job to end."""
    return {"event": "term", "job": "7", "time": 3.0, "cause": cause}


def decided(status: Status, events: Sequence[dict[str, Any]], **facts: Any) -> Decision:
    """The decision with usual facts."""
    return decide(status, Journal([SUBMIT, *events]), **{"step": 20, "srun_status": 0, "max_restarts": 3, **facts})


def error(rank: int, *, oom: bool = False, message: str = "Connection closed by peer") -> dict[str, Any]:
    """A rank's own word."""
    return {"rank": rank, "type": "RuntimeError", "message": message, "oom": oom, "time": float(rank)}


@pytest.mark.parametrize(
    ("status", "events", "facts", "word", "cause"),
    [
        (Status(state="finished", step=100, steps=100), starts(0), {"srun_status": 143}, "finished", ""),
        (STOPPED, starts(0), {}, "go_on", ""),
        (STOPPED, starts(0), {"srun_status": 1}, "go_on", ""),
        (STOPPED, starts(0, 5, 10), {}, "go_on", ""),
        (STOPPED, starts(0, 5, 10, 15), {}, "failed", "restarts"),
        (STOPPED, starts(0), {"max_restarts": 0}, "failed", "restarts"),
        (STOPPED, starts(20), {}, "go_on", ""),
        (STOPPED, starts(20, 20), {}, "failed", "restarts"),
        (STOPPED, [*starts(0, 5), CANCEL], {}, "ended", "cancelled"),
        (STOPPED, [*starts(0), term("timeout")], {"srun_status": 143}, "ended", "timeout"),
        (STOPPED, [*starts(0), term("timeout"), *starts(10)], {}, "go_on", ""),
        (RUNNING, [*starts(0), term("cancelled")], {"srun_status": 143}, "ended", "cancelled"),
        (RUNNING, starts(0), {"srun_status": 1, "down": ["n2"]}, "go_on", ""),
        (RUNNING, starts(20, 20), {"srun_status": 1, "down": ["n2"]}, "failed", "restarts"),
        (RUNNING, starts(0), {"srun_status": 1, "errors": [error(1)]}, "failed", ""),
        (RUNNING, starts(0), {"srun_status": 1, "errors": [error(1), error(2, oom=True)]}, "failed", "oom"),
        (RUNNING, starts(0), {"srun_status": 0}, "failed", ""),
    ],
)
def test_decision(status: Status, events: list[dict[str, Any]], facts: dict[str, Any], word: str, cause: str) -> None:
    decision = decided(status, events, **facts)
    assert (decision.word, decision.status.cause) == (word, cause)
    assert (
        decision.status.state
        == {
            "finished": "finished",
            "go_on": "stopped",
            "failed": "failed",
            "ended": status.state if status is STOPPED else "failed",
        }[word]
    )


def test_a_submission_by_hand_counts_anew() -> None:
    journal = Journal([SUBMIT, *starts(20, 20, 20), SUBMIT, *starts(20)])
    assert refusal(journal, step=20, max_restarts=1) is None
    assert "no progress" in (refusal(Journal([*journal.events, *starts(20)]), step=20, max_restarts=5) or "")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            {"srun_status": 1, "errors": [error(1), error(2, oom=True, message="CUDA out of memory")]},
            "rank 2 RuntimeError: CUDA",
        ),
        ({"srun_status": 137, "errors": [error(1)]}, "a rank was killed (SIGKILL)"),
        ({"srun_status": 9}, "srun ended with status 9 and no rank left word"),
    ],
)
def test_failure_says_what_is_known(facts: dict[str, Any], words: str) -> None:
    assert words in decided(RUNNING, starts(0), **facts).status.reason
