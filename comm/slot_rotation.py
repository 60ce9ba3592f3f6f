"""The order in which collectives use the three slots of a peer buffer.

A collective's input lies in the same slot on every rank, at an address that the host knows before: a GEMM can write it
there. No rank may write into a slot that a slow peer still reads. Only slot 0 costs a wait for this:

- A collective releases slot 0 only when all ranks have read it. Collectives outside of graphs use it, and the first
  collective of each graph: their predecessor is not known.
- The other collectives of a graph use slots 1 and 2 in turn.

Proof. Let w be a write into slot s for collective k, and c the last collective before k that used s. If s is 0, c has
ended on this rank, and it ended only when every rank had read. Otherwise k is not the first of its graph. Since the
slots alternate, c belongs to another replay, or is at least two places earlier in this one. In both cases some
collective m of this replay lies between them: c < m < k. In m this rank has waited until every peer reached m. A peer
reaches m when its c has ended, because its stream is in order. On this rank w is queued after m: every peer has read
before.

This holds for any order of graphs and eager calls, as long as it is the same on all ranks. A graph costs one more
barrier. Within a collective, kernels/csrc/allreduce.cu keeps the order by flags that count on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

NUM_SLOTS = 3


@dataclass
class SlotRotation:
    """The next slot; `capture` is the number of the graph that is being captured, 0 outside of graphs."""

    graph: int = 0
    next_slot: int = 1  # of the next collective of that graph

    def peek(self, capture: int) -> int:
        """Return the slot of the next collective."""
        return self.next_slot if capture != 0 and capture == self.graph else 0

    def take(self, capture: int) -> int:
        """Return the slot of the next collective and move on."""
        slot = self.peek(capture)
        self.graph, self.next_slot = capture, 2 if slot == 1 else 1
        return slot
