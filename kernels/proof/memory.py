"""Global and shared memory of the PTX machine, with the checks that hardware does not make.

Refused are: an access outside every buffer, a misaligned one, a write to a read-only buffer, a read of shared memory
that nothing has written or that a ``cp.async`` not waited for is still writing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kernels.proof.ptx import PtxError
from kernels.proof.semantics import Array


@dataclass(slots=True)
class Traffic:
    """Bytes that threads asked for, and which bytes those were.

    Attributes:
        moved: Bytes of all accesses.
        touched: By a buffer's address, which of its 16-byte pieces were accessed at least once.
    """

    moved: int = 0
    touched: dict[int, Array] = field(default_factory=dict)

    def count(self, buffer: Array, offsets: Array, size: int) -> None:
        """Accesses of ``size`` bytes at each offset into a buffer."""
        self.moved += len(offsets) * size
        pieces = self.touched.setdefault(buffer.ctypes.data, np.zeros(-(-buffer.size // 16), bool))
        pieces[offsets // 16] = True

    def compulsory(self, buffer: Array) -> int:
        """Bytes of a buffer's pieces that were accessed."""
        pieces = self.touched.get(buffer.ctypes.data)
        return 0 if pieces is None else 16 * int(pieces.sum())


@dataclass(slots=True)
class GlobalMemory:
    """Buffers at their real addresses: contiguous uint8 arrays that views of tensors give.

    Attributes:
        buffers: What addresses may point into.
        traffic: Counts what is read and written, if given.
    """

    buffers: Sequence[Array]
    traffic: Traffic | None = None

    def read(self, addresses: Array, size: int) -> Array:
        """``size`` bytes from each address.

        Returns:
            uint8 [addresses, size].

        Raises:
            PtxError: an address is misaligned or outside every buffer.
        """
        out = np.empty((len(addresses), size), np.uint8)
        for chosen, buffer, offsets in self._locate(addresses, size, "read"):
            out[chosen] = buffer[offsets[:, None] + np.arange(size)]
        return out

    def write(self, addresses: Array, data: Array) -> None:
        """Write ``data`` (uint8 [addresses, size]); where addresses repeat, the last one stays.

        Raises:
            PtxError: as :meth:`read`, or the buffer is read-only.
        """
        size = data.shape[1]
        for chosen, buffer, offsets in self._locate(addresses, size, "write"):
            if not buffer.flags.writeable:
                raise PtxError("write to a read-only buffer")
            buffer[offsets[:, None] + np.arange(size)] = data[chosen]

    def add_f32(self, addresses: Array, values: Array) -> None:
        """Add a float32 to the one at each address, one after the other, each sum rounded.

        Raises:
            PtxError: as :meth:`write`.
        """
        for chosen, buffer, offsets in self._locate(addresses, 4, "write"):
            if not buffer.flags.writeable:
                raise PtxError("write to a read-only buffer")
            floats = buffer[: buffer.size // 4 * 4].view(np.float32)
            np.add.at(floats, offsets // 4, values[chosen])

    def _locate(self, addresses: Array, size: int, what: str) -> list[tuple[Array, Array, Array]]:
        if (addresses % size).any():
            raise PtxError(f"misaligned global {what} of {size} bytes")
        found, missing = [], np.ones(len(addresses), bool)
        for buffer in self.buffers:
            base = buffer.ctypes.data
            inside = missing & (addresses >= base) & (addresses + size <= base + buffer.size)
            if inside.any():
                found.append((inside, buffer, addresses[inside] - base))
                if self.traffic is not None:
                    self.traffic.count(buffer, found[-1][2], size)
                missing &= ~inside
                if not missing.any():
                    break
        if missing.any():
            raise PtxError(f"global {what} out of bounds by {int(missing.sum())} threads")
        return found


@dataclass(slots=True)
class _Copy:
    """One ``cp.async`` of some lanes: where it lands, what, and after how many commits of its lane."""

    lanes: Array
    targets: Array
    data: Array
    group: Array


@dataclass(slots=True)
class SharedMemory:
    """Shared memory of all blocks that run at once; addresses are within a lane's own block."""

    bytes_per_block: int
    blocks: int
    threads: int
    _bytes: Array = field(init=False)
    _written: Array = field(init=False)
    _groups: Array = field(init=False)
    _copies: list[_Copy] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._bytes = np.full(self.bytes_per_block * self.blocks, 0xFF, np.uint8)
        self._written = np.zeros(self._bytes.size, bool)
        self._groups = np.zeros(self.blocks * self.threads, np.int64)

    def read(self, lanes: Array, addresses: Array, size: int, width: int | None = None) -> Array:
        """``size`` bytes for each of ``lanes``, aligned to ``width``; uint8 [lanes, size].

        Raises:
            PtxError: misaligned, out of bounds, never written, or still being copied.
        """
        at = self._at(lanes, addresses, size, width or size)
        if not self._written[at].all():
            raise PtxError("read of shared memory that is not written yet, or still being copied")
        return self._bytes[at]

    def write(self, lanes: Array, addresses: Array, data: Array) -> None:
        """Write ``data`` (uint8 [lanes, size])."""
        at = self._at(lanes, addresses, data.shape[1], data.shape[1])
        self._bytes[at] = data
        self._written[at] = True

    def copy_async(self, lanes: Array, addresses: Array, data: Array) -> None:
        """Begin a copy; its target is unreadable until the lane has waited for the group that it commits next."""
        at = self._at(lanes, addresses, data.shape[1], data.shape[1])
        self._written[at] = False
        self._bytes[at] = 0xFF
        self._copies.append(_Copy(lanes, at, data, self._groups[lanes]))

    def commit(self, lanes: Array) -> None:
        """Close the lanes' groups of copies."""
        self._groups[lanes] += 1

    def wait(self, active: Array, pending: int) -> None:
        """Finish the active lanes' groups but for the last ``pending``."""
        left = []
        for copy in self._copies:
            done = active[copy.lanes] & (copy.group < self._groups[copy.lanes] - pending)
            self._bytes[copy.targets[done]] = copy.data[done]
            self._written[copy.targets[done]] = True
            if not done.all():
                keep = ~done
                left.append(_Copy(copy.lanes[keep], copy.targets[keep], copy.data[keep], copy.group[keep]))
        self._copies = left

    def _at(self, lanes: Array, addresses: Array, size: int, width: int) -> Array:
        if (addresses % width).any():
            raise PtxError(f"misaligned access to shared memory of {width} bytes")
        if (addresses < 0).any() or (addresses + size > self.bytes_per_block).any():
            raise PtxError("access to shared memory out of bounds")
        start = addresses + lanes // self.threads * self.bytes_per_block
        at: Array = start[:, None] + np.arange(size)
        return at
