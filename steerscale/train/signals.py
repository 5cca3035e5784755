"""Stop signals: SIGTERM and SIGUSR1 on any rank end the run after the current step, with a checkpoint.

Import this before torch: a signal that arrives during slow imports must not kill the process.
"""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that a stop was asked for. Other ranks learn of it by the step's all-reduce."""

    def __init__(self) -> None:
        self.name: str | None = None

    def install(self) -> None:
        """Take over the stop signals of this process."""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.name is not None
