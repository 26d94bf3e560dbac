"""Where things are in the metadata tensor."""

from __future__ import annotations

from dataclasses import dataclass

ROW_ALIGNMENT = 4  # int32 elements: FA3 aligns every row to 16 bytes


def padded(length: int) -> int:
    """`length` elements rounded up to whole rows' alignment."""
    return -(-length // ROW_ALIGNMENT) * ROW_ALIGNMENT


# Every row an FA3 build may have: int32, one value a sequence.
ROWS = {
    "num_splits_dynamic": "KV splits of the sequence",
    "num_m_blocks": "query blocks of kBlockM rows",
    "packed_seqlen_q": "query rows: tokens, times the q heads per KV head when GQA is packed",
    "varlen_batch_idx": "which sequence of the batch is worked on at this position",
    "num_nheads_in_l2": "heads whose KV blocks of one split fit in L2 together",
}


@dataclass(frozen=True)
class MetadataLayout:
    """Layout of one metadata tensor: int32, contiguous, 1-D, `size` elements.

    `row_names` are the rows in memory order. A row holds `batch_size` values and is padded with zeros to a multiple
    of four (FA3 leaves the padding unwritten, and reads none of it). Where the batch is sorted, rows are indexed by
    sorted position (`varlen_batch_idx` says which sequence that is), otherwise by sequence. The semaphore, a single
    zero that FA3's tile scheduler counts with, follows the last row; FA3 has none on sm_8x without splits.
    `num_splits` and `pack_gqa` are what the metadata is made with: give the forward the same.
    """

    batch_size: int
    row_names: tuple[str, ...]
    has_semaphore: bool
    num_splits: int = 1
    pack_gqa: bool = False

    @property
    def row_stride(self) -> int:
        """Elements from the start of one row to the start of the next."""
        return padded(self.batch_size)

    @property
    def size(self) -> int:
        """Elements in the tensor."""
        return self.size_for(self.batch_size)

    def size_for(self, batch_size: int) -> int:
        """Elements in the tensor of another batch that has the same rows."""
        return len(self.row_names) * padded(batch_size) + self.has_semaphore

    @property
    def rows(self) -> dict[str, slice]:
        """Row name to the slice of its `batch_size` valid elements."""
        starts = (i * self.row_stride for i in range(len(self.row_names)))
        return {name: slice(start, start + self.batch_size) for name, start in zip(self.row_names, starts, strict=True)}

    @property
    def semaphore(self) -> int | None:
        """Index of the semaphore, or None where there is none."""
        return self.size - 1 if self.has_semaphore else None

    @property
    def is_sorted(self) -> bool:
        """Whether rows are indexed by sorted position."""
        return "varlen_batch_idx" in self.row_names
