"""What a schedule means, as data and as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..api import get_scheduler_metadata, plan_call, unpack_metadata
from ..resolved import host_lengths
from ..triton_kernels.balance import constants_of
from ..triton_kernels.builds import MAX_DYNAMIC_SPLIT_BATCH
from ..triton_kernels.plan import LaunchPlan
from ..triton_kernels.problem import Problem
from ..triton_kernels.reference import sequence_lengths

_SHOWN = 12  # sequences printed from each end of a long batch


@dataclass(frozen=True, eq=False)
class Explanation:
    """A call, its launch plan, and the rows that came out."""

    build: str
    build_reason: str
    rules: str
    problem: Problem
    plan: LaunchPlan
    seqlens_q: list[int]  # query tokens of every sequence
    seqlens_k: list[int]  # keys that every sequence attends to, appended ones included
    metadata: torch.Tensor
    rows: dict[str, list[int]]

    def sequences(self) -> list[dict[str, int]]:
        """One entry a position of the schedule, first to run first."""
        order = self.rows.get("varlen_batch_idx", list(range(self.problem.batch_size)))
        splits = self.rows.get("num_splits_dynamic", [1] * len(order))
        nheads = self.rows.get("num_nheads_in_l2")
        result = []
        for position, sequence in enumerate(order):
            query_rows = self.seqlens_q[sequence] * self.plan.q_heads_per_row
            key_blocks = -(-self.seqlens_k[sequence] // self.plan.block_n)
            entry = {
                "sequence": sequence,
                "query_tokens": self.seqlens_q[sequence],
                "query_blocks": -(-query_rows // self.plan.block_m),
                "keys": self.seqlens_k[sequence],
                "key_blocks": key_blocks,
                "splits": splits[position],
                "blocks_per_split": -(-key_blocks // splits[position]),
            }
            result.append(entry | ({"heads_in_l2": nheads[position]} if nheads else {}))
        return result

    def totals(self) -> dict[str, int]:
        """Sums over the batch. A work tile is one split of one query block of one scheduler head."""
        sequences = self.sequences()
        return {
            "sequences": len(sequences),
            "keys": sum(entry["keys"] for entry in sequences),
            "key_blocks": sum(entry["key_blocks"] for entry in sequences),
            "split_sequences": sum(entry["splits"] > 1 for entry in sequences),
            "work_tiles": self.plan.num_heads * sum(e["splits"] * e["query_blocks"] for e in sequences),
            "sms": self.plan.num_sms,
        }

    def as_json(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        plan, layout = self.plan, self.plan.layout
        return {
            "build": {"name": self.build, "rules": self.rules, "reason": self.build_reason},
            "tile": {"block_m": plan.block_m, "block_n": plan.block_n, "one_mma_warpgroup": plan.uses_one_wg},
            "mask": {"causal": plan.is_causal, "local": plan.is_local, "window_size": list(plan.window_size)},
            "paged_kv_tma": plan.paged_kv_tma,
            "num_splits": {"value": plan.num_splits, "reason": plan.num_splits_reason},
            "pack_gqa": {"value": plan.pack_gqa, "reason": plan.pack_gqa_reason},
            "scheduler_heads": plan.num_heads,
            "layout": {
                "size": layout.size,
                "rows": {name: [row.start, row.stop] for name, row in layout.rows.items()},
                "semaphore": layout.semaphore,
                "sorted": layout.is_sorted,
            },
            "totals": self.totals(),
            "sequences": self.sequences(),
        } | ({} if self.problem.policy == "fa3" else {"policy": self._policy()})

    def as_text(self, show_all: bool = False) -> str:
        """The same for a terminal; long batches are shortened unless `show_all`."""
        plan, layout, t = self.plan, self.plan.layout, self.totals()
        mask = "causal" if plan.is_causal else f"local, window {plan.window_size}" if plan.is_local else "none"
        warpgroup = " (one MMA warpgroup)" if plan.uses_one_wg else ""
        split_note = "" if plan.dynamic_splits or plan.num_splits == 1 else (
            f"; unused: over {MAX_DYNAMIC_SPLIT_BATCH} sequences FA3 does not split"
        )  # fmt: skip
        lines = [
            f"build       {self.build}, rules of {self.rules}: {self.build_reason}",
            f"tile        kBlockM {plan.block_m} x kBlockN {plan.block_n}{warpgroup}; mask: {mask}; "
            f"KV by {'TMA' if plan.paged_kv_tma or self.problem.page_size is None else 'cp.async'}",
            f"num_splits  at most {plan.num_splits}: {plan.num_splits_reason}{split_note}",
            f"pack_gqa    {plan.pack_gqa}: {plan.pack_gqa_reason}",
            f"scheduler   {plan.num_heads} heads on {plan.num_sms} SMs",
            f"tensor      int32[{layout.size}]: {', '.join(layout.row_names)}"
            f"{'; sorted, longest first' if layout.is_sorted else '; batch order'}",
            f"totals      {t['sequences']} sequences, {t['keys']} keys, {t['key_blocks']} key blocks; "
            f"{t['split_sequences']} sequences split; {t['work_tiles']} work tiles",
            "",
        ]
        if self.problem.policy != "fa3":
            lines.insert(1, f"policy      {self._policy_text()}")
        return "\n".join(lines + self._table(show_all))

    def _policy(self) -> dict[str, Any]:
        """The policy and its constants; of these, none where it leaves the call to FA3's rule."""
        costs, policy = self.plan.costs, {"name": self.problem.policy, "batch_invariant": self.problem.batch_invariant}
        if costs is None:
            return policy | {"constants": None}
        constants = {
            "gpu": constants_of(self.problem.gpu)["gpu"],
            "tile": costs.tile,
            "alone": costs.alone,
            "per_split": costs.per_split,
            "fixed_blocks": costs.fixed_blocks or None,
        }
        return policy | {"constants": constants}

    def _policy_text(self) -> str:
        costs, policy = self.plan.costs, self.problem.policy
        if costs is None:
            return f"{policy}: many query tokens, left to FA3's rule"
        invariant = f"; batch invariant, {costs.fixed_blocks} key blocks a split" if costs.fixed_blocks else ""
        return (
            f"{policy}{invariant}; in key blocks at full bandwidth, on {constants_of(self.problem.gpu)['gpu']}: "
            f"a tile {costs.tile:.2f}, a block alone {costs.alone:.2f}, combining a split {costs.per_split:.3f}"
        )

    def _table(self, show_all: bool) -> list[str]:
        sequences = self.sequences()
        if not sequences:
            return ["(an empty batch)"]
        names = ["position", *sequences[0]]
        rows = [[str(position), *map(str, entry.values())] for position, entry in enumerate(sequences)]
        widths = [max(len(name), *(len(row[i]) for row in rows)) for i, name in enumerate(names)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [names, *rows]
        ]
        if show_all or len(rows) <= 2 * _SHOWN:
            return lines
        return [*lines[: _SHOWN + 1], f"... {len(rows) - 2 * _SHOWN} more (--all shows them)", *lines[-_SHOWN:]]


def explain(arguments: dict[str, Any], build_reason: str) -> Explanation:
    """Run `get_scheduler_metadata(**arguments)` and explain it; `arguments["build"]` must be a name."""
    tensors, problem, rules, plan = plan_call(arguments)
    metadata = get_scheduler_metadata(**arguments)
    assert tensors is not None  # or the call would have raised
    seqlens_q, seqlens_k = sequence_lengths(problem, host_lengths(tensors))
    return Explanation(
        build=arguments["build"],
        build_reason=build_reason,
        rules=rules.name,
        problem=problem,
        plan=plan,
        seqlens_q=seqlens_q.tolist(),
        seqlens_k=seqlens_k.tolist(),
        metadata=metadata,
        rows={name: row.tolist() for name, row in unpack_metadata(metadata, plan.layout).items()},
    )
