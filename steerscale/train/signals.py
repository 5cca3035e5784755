"""Stop signals: SIGTERM, SIGUSR1 and Ctrl-C on any rank end the run after the current step, with a checkpoint.

Import this before torch: a signal that arrives during slow imports must not kill the process.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers that a stop was asked for. Other ranks learn of it by the step's all-reduce."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._interactive = False
        self._elsewhere: Callable[[], str | None] = lambda: None

    def install(self) -> None:
        """Take over the stop signals of this process."""
        for number in SIGNALS:
            signal.signal(number, self._remember)
        # The launcher starts ranks with these held back: one that came during start-up arrives now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    @contextlib.contextmanager
    def interactive(self) -> Iterator[None]:
        """Take over the stop signals in this context, for a run in the user's own process: a second Ctrl-C interrupts."""
        old = {number: signal.getsignal(number) for number in SIGNALS}
        self._interactive = True
        self.install()
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._interactive and self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def ask_also(self, elsewhere: Callable[[], str | None]) -> None:
        """Another place to look at, which gives the name of a signal that came there, or None."""
        self._elsewhere = elsewhere

    def __bool__(self) -> bool:
        if self.name is None:
            self.name = self._elsewhere()
        return self.name is not None
