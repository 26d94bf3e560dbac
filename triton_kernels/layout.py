"""Where things are in the metadata tensor."""

from __future__ import annotations

from dataclasses import dataclass


def padded(length: int, alignment: int = 4) -> int:
    """`length` elements rounded up to whole rows' alignment; FA3 aligns rows to 16 bytes in all but its oldest."""
    return -(-length // alignment) * alignment


# Every row an FA3 build may have: int32, one value a sequence. kernel.py and reference.py write each of them.
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
    of `row_alignment` (FA3 leaves the padding unwritten, and reads none of it). Where the batch is sorted, rows are
    indexed by sorted position (`varlen_batch_idx` says which sequence that is), otherwise by sequence. The semaphore,
    a single zero that FA3's tile scheduler counts with, comes after the last row, or before the first one where
    `semaphore_first`; FA3 has none on sm_8x without splits.
    `num_splits` and `pack_gqa` are what the metadata is made for: give the forward the same.

    Three sequences of 9,000, 100 and 4,000 keys, 8 q heads over 1 KV head, head dim 128, causal, one query each:

        sglang-kernel 0.4.2, sorted:  num_splits_dynamic  62  28   1   0 | num_m_blocks  1  1  1  0
                                      varlen_batch_idx     0   2   1   0 | num_nheads_in_l2  1  1  1  0 | semaphore  0
        vLLM 0.10.0, the oldest layout:  semaphore  0 | num_splits_dynamic  62   1  28
    """

    batch_size: int
    row_names: tuple[str, ...]
    has_semaphore: bool
    num_splits: int = 1  # 0: the build's forward comes to one split by itself, and another layout if told so
    pack_gqa: bool = False
    row_alignment: int = 4  # elements
    semaphore_first: bool = False

    @property
    def row_stride(self) -> int:
        """Elements from the start of one row to the start of the next."""
        return padded(self.batch_size, self.row_alignment)

    @property
    def size(self) -> int:
        """Elements in the tensor."""
        return self.size_for(self.batch_size)

    def size_for(self, batch_size: int) -> int:
        """Elements in the tensor of another batch that has the same rows."""
        return len(self.row_names) * padded(batch_size, self.row_alignment) + int(self.has_semaphore)

    @property
    def rows(self) -> dict[str, slice]:
        """Row name to the slice of its `batch_size` valid elements."""
        first = int(self.has_semaphore and self.semaphore_first)
        starts = (first + i * self.row_stride for i in range(len(self.row_names)))
        return {name: slice(start, start + self.batch_size) for name, start in zip(self.row_names, starts, strict=True)}

    @property
    def semaphore(self) -> int | None:
        """Index of the semaphore, or None where there is none."""
        if not self.has_semaphore:
            return None
        return 0 if self.semaphore_first else self.size - 1

    @property
    def is_sorted(self) -> bool:
        """Whether rows are indexed by sorted position."""
        return "varlen_batch_idx" in self.row_names
