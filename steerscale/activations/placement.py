"""Who makes whose vectors where producer ranks stand apart from trainer ranks: arithmetic, torch-free.

Trainers come first, then producers. Lanes are dealt to the producers' replicas as they are to the trainers': in equal parts,
one after the other.
"""

from dataclasses import dataclass

from steerscale.errors import LayoutError
from steerscale.parallel.layout import ParallelLayout

TRAINERS, PRODUCERS = "trainers", "producers"
"""The worlds' names."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Ranks, among all of the run, and which of them belong together."""

    trainers: ParallelLayout
    producers: ParallelLayout
    lanes: int

    def __post_init__(self) -> None:
        if self.trainers.pipeline > 1:
            raise LayoutError(
                f"parallel.pipeline={self.trainers.pipeline} cuts the language model, which stream.producers gives ranks of its"
                " own: leave it at 1, and set stream.producers.pipeline"
            )
        for name, layout in (("parallel.data", self.trainers), ("stream.producers.data", self.producers)):
            if self.lanes % layout.data:
                raise LayoutError(
                    f"{name} must divide stream.lanes: {layout.data} does not divide {self.lanes}; each replica streams whole "
                    "lanes"
                )

    def producer_of(self, lane: int) -> int:
        """The producers' replica that makes a lane's vectors."""
        return lane * self.producers.data // self.lanes

    def producers_of(self, trainer: int) -> list[int]:
        """The producers' replicas that serve a replica of the trainers. The first one evaluates for it."""
        own = self.lanes // self.trainers.data
        return sorted({self.producer_of(lane) for lane in range(trainer * own, (trainer + 1) * own)})

    def clients_of(self, producer: int) -> list[int]:
        """The trainers' replicas that a replica of the producers serves."""
        return [trainer for trainer in range(self.trainers.data) if producer in self.producers_of(trainer)]

    def trainer_rank(self, replica: int, tensor: int) -> int:
        """Rank of a trainer."""
        return self.trainers.tensor * replica + tensor

    def producer_rank(self, replica: int, stage: int, tensor: int) -> int:
        """Rank of a producer."""
        layout = self.producers
        return self.trainers.world_size + tensor + layout.tensor * (replica + layout.data * stage)

    def ranks_of_producer(self, replica: int) -> list[int]:
        """All ranks of a replica of the producers, its leader first."""
        layout = self.producers
        return [
            self.producer_rank(replica, stage, tensor)
            for stage in range(layout.pipeline)
            for tensor in range(layout.tensor)
        ]

    def tensor_receivers(self, tensor: int) -> range:
        """Tensor ranks of a trainers' replica that this tensor rank of the producers sends to."""
        return range(tensor, self.trainers.tensor, self.producers.tensor)

    def tensor_sender(self, tensor: int) -> int:
        """The tensor rank of the producers that this tensor rank of the trainers receives from."""
        return tensor % self.producers.tensor
