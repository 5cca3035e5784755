"""One lane of a stream: its cursor, its two blocks, and the passes that fill them."""

from dataclasses import dataclass

from steerscale.activations.buffer import ShuffleBuffer
from steerscale.activations.order import Block, Order
from steerscale.activations.passes import Arrival, Pass, Passes, Stopwatch


@dataclass(frozen=True, kw_only=True)
class Production:
    """What the lanes of a replica share."""

    order: Order
    buffer: ShuffleBuffer
    passes: Passes
    batch_size: int
    """Sequences in a pass."""
    time: Stopwatch

    @property
    def per_block(self) -> int:
        """Passes of a block."""
        return -(-self.order.block_sequences // self.batch_size)


class Lane:
    """The blocks of one lane that are in the buffer, or on their way into it."""

    def __init__(self, number: int, local: int, production: Production) -> None:
        """`number` is over all replicas, `local` in this one."""
        self.number, self.local, self._by = number, local, production
        self.go_to(0, 0)

    def go_to(self, index: int, offset: int) -> None:
        """Set the cursor: the block that is being consumed, and how many vectors of it have been. Nothing is produced yet."""
        self.index, self.offset = index, offset
        self._blocks: dict[int, Block] = {}
        self._begun: dict[int, int] = {}
        self._coming: dict[int, list[Arrival]] = {}

    @property
    def is_begun(self) -> bool:
        """Whether anything was produced since the cursor was set."""
        return bool(self._blocks)

    @property
    def consumed(self) -> float:
        """Share of the current block."""
        return self.offset / max(len(self._blocks[self.index]), 1)

    def begun(self, index: int) -> int:
        """Passes of a block that have begun."""
        return self._begun.get(index, 0)

    def produce(self, index: int, passes: int) -> None:
        """Begin the first `passes` forward passes of a block, if they have not been."""
        if passes <= self.begun(index):
            return
        if index not in self._blocks:
            with self._by.time("data"):
                self._blocks[index] = self._by.order.block(self.number, index)
        for number in range(self.begun(index), passes):
            one = self._pass(self._blocks[index], number)
            # All ranks of a replica know alike that nothing of a pass would be kept.
            arrival = self._by.passes.begin(one) if len(one.kept) else None
            if arrival is not None:
                self._coming.setdefault(index, []).append(arrival)
        self._begun[index] = passes

    def current(self) -> Block:
        """The block that is being consumed, all of it in the buffer."""
        self.produce(self.index, self._by.per_block)
        for arrive in self._coming.pop(self.index, []):
            arrive()
        return self._blocks[self.index]

    def step_on(self) -> None:
        """Leave the current block, whose place is free from now on."""
        del self._blocks[self.index], self._begun[self.index]
        self.index, self.offset = self.index + 1, 0

    def _pass(self, block: Block, number: int) -> Pass:
        begin = number * self._by.batch_size
        end = min(begin + self._by.batch_size, len(block.tokens_KS))
        with self._by.time("shuffle"):
            kept, before = block.rows(begin, end)
            row = self._by.buffer.first_row(block.index, self.local) + before
        return Pass(lane=self.number, tokens_BS=block.tokens_KS[begin:end], kept=kept, row=row)
