"""What the worker asks of an engine: the graphs of one bundle on one device.

Must not know scheduling, gRPC or profiles. All methods are called from the worker thread only.

Legend: N texts, T text length, C chunk length, E event_dim, Q queries, Z embedding_dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from qanchor.bundle.packing import PackedSuffix

ByteArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
SlotT = TypeVar("SlotT")
ReadSlotT = TypeVar("ReadSlotT", contravariant=True)


SuffixRun: TypeAlias = tuple[PackedSuffix, Sequence[SlotT]]
"""Packed users and the slots that hold their prefixes."""
RunsDone: TypeAlias = Callable[[list[FloatArray] | Exception], None]
"""Takes the embeddings [Q, Z] of each run, or what one of them raised. Must not raise itself."""


@dataclass(frozen=True, slots=True)
class PrefixChunk:
    """Consecutive prefix positions: `token_ids_C`, `adapter_C` int64, `vectors_CE` float32.

    Dense, C-order. `start` positions of the prefix are already in the slot.
    """

    token_ids_C: IntArray
    adapter_C: IntArray
    vectors_CE: FloatArray
    start: int


class SideBySide(Protocol[ReadSlotT]):
    """Runs of the suffix graph that go on at the same time, beside whatever the caller does."""

    @property
    def num_lanes(self) -> int:
        """Runs at once."""
        ...

    def begin(self, runs: Sequence[SuffixRun[ReadSlotT]], done: RunsDone) -> None:
        """Have runs, at least one, computed behind those begun before, and return at once.

        Each as `Engine.suffix` would; `done` is called on another thread. Until then the slots must
        stay as they are; a slot may be in several runs.
        """
        ...


class Engine(Protocol[SlotT]):
    """Runs event encoder, prefix and suffix graph; owns the slots' tensors."""

    @property
    def side_by_side(self) -> SideBySide[SlotT] | None:
        """Quicker for more than one run of a small model; None where the device is one."""
        ...

    def encode_events(self, token_ids_NT: IntArray) -> FloatArray:
        """Event vectors [N, E] of texts padded with the manifest's event_pad.

        Raises Retryable when the device has no memory left now.
        """
        ...

    def allocate_slot(self, capacity: int) -> SlotT:
        """A zeroed slot for `capacity` positions. Raises Retryable when out of memory."""
        ...

    def clear_slot(self, slot: SlotT) -> None:
        """Overwrite a slot with zeros."""
        ...

    def clear_working(self) -> None:
        """Overwrite working copies of any slot with zeros."""
        ...

    def free_slot(self, slot: SlotT) -> None:
        """Give a slot's memory back; the slot must not be used again."""
        ...

    @property
    def slot_layout(self) -> str:
        """Element type and dimensions of a slot's numbers: equal layouts, equal meaning of bytes.

        An exported prefix of T positions is T * the pool's bytes per token long.
        """
        ...

    def host_arena(self, num_bytes: int) -> ByteArray:
        """Uninitialised host memory [num_bytes] that exports go to and imports come from.

        Called once. A device engine pins it. Raises MemoryError.
        """
        ...

    def export_slot(self, slot: SlotT, num_tokens: int, out: ByteArray) -> None:
        """Copy the slot's first positions to host memory, dense; the padding is left out.

        `out`: contiguous bytes of host_arena, complete on return. One copy call, strided on the
        slot's side. Raises Retryable.
        """
        ...

    def import_slot(self, slot: SlotT, num_tokens: int, source: ByteArray) -> None:
        """Copy an export back into the slot's first positions, to the bit.

        `source` may be reused on return. Positions beyond keep finite numbers. Raises Retryable.
        """
        ...

    def prefill(self, slot: SlotT, chunk: PrefixChunk) -> None:
        """Write keys and values of a chunk into the slot. Raises Retryable when out of memory."""
        ...

    def runs(self, num_tokens: Sequence[int]) -> list[list[int]]:
        """Which users of a step to pack into one run, to be quick; every user once.

        `num_tokens`: suffix tokens of each user.
        """
        ...

    def suffix(self, packed: PackedSuffix, slots: Sequence[SlotT]) -> FloatArray:
        """L2-normalised embeddings [Q, Z]; `slots[b]` holds the prefix of packed user b.

        Reads the slots only. Raises Retryable when out of memory.
        """
        ...
