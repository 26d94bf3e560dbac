"""What a schedule means, as data and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import metadata as distributions
from typing import Any

import torch

from ..api import get_scheduler_metadata, plan_call, unpack_metadata
from ..schedules import host_lengths
from ..triton_kernels.balance import constants_of
from ..triton_kernels.builds import MAX_DYNAMIC_SPLIT_BATCH, FA3Rules
from ..triton_kernels.plan import LaunchPlan, make_plan
from ..triton_kernels.problem import Problem
from ..triton_kernels.reference import Lengths, blocks_read, reference_metadata, sequence_lengths
from .diagnosis import Case, Finding, diagnose
from .lengths import in_words
from .pictures import card_name
from .simulator import Simulation, kernel_of, schedule_of, simulate

_SHOWN = 12  # sequences printed from each end of a long batch
_NAME = 12  # characters in front of what a line says


@dataclass(frozen=True, eq=False)
class Explanation:
    """A call, its launch plan, and the rows that came out."""

    build: str
    build_reason: str
    rules: FA3Rules
    problem: Problem
    plan: LaunchPlan
    lengths: Lengths
    seqlens_q: list[int]  # query tokens of every sequence
    seqlens_k: list[int]  # keys that every sequence attends to, appended ones included
    metadata: torch.Tensor
    rows: dict[str, list[int]]

    def sequences(self) -> list[dict[str, int]]:
        """One entry a position of the schedule, first to run first."""
        schedule = self.simulation.schedule
        splits, nheads = schedule.splits.tolist(), self.rows.get("num_nheads_in_l2")
        read = blocks_read(self.problem, self.plan, self.lengths).tolist()
        result = []
        for position, sequence in enumerate(schedule.order.tolist()):
            query_rows = self.seqlens_q[sequence] * self.plan.q_heads_per_row
            key_blocks = -(-self.seqlens_k[sequence] // self.plan.block_n)
            entry = {
                "sequence": sequence,
                "query_tokens": self.seqlens_q[sequence],
                "query_blocks": -(-query_rows // self.plan.block_m),
                "keys": self.seqlens_k[sequence],
                "key_blocks": key_blocks,
                "blocks_read": read[sequence],
                "splits": splits[position],
                "blocks_per_split": -(-read[sequence] // splits[position]),
            }
            result.append(entry | ({"heads_in_l2": nheads[position]} if nheads else {}))
        return result

    @cached_property
    def simulation(self) -> Simulation:
        """The schedule played onto the SMs of `problem.gpu`."""
        return simulate(self.problem, self.plan, self.lengths, schedule_of(self.plan, self.metadata.cpu().numpy()))

    @cached_property
    def findings(self) -> list[Finding]:
        """What there is to know about the schedule."""
        s = self.simulation
        return diagnose(Case(self.problem, self.rules, self.lengths, s.costs, s))

    def totals(self) -> dict[str, int]:
        """Sums over the batch. A work tile is one split of one query block of one scheduler head.

        `blocks_read`: by the last query block of every sequence, for one head; `blocks_read_by_tiles`: by all tiles.
        """
        sequences = self.sequences()
        return {
            "sequences": len(sequences),
            "keys": sum(entry["keys"] for entry in sequences),
            "key_blocks": sum(entry["key_blocks"] for entry in sequences),
            "blocks_read": sum(entry["blocks_read"] for entry in sequences),
            "blocks_read_by_tiles": self.simulation.blocks_read,
            "split_sequences": sum(entry["splits"] > 1 for entry in sequences),
            "work_tiles": self.plan.num_heads * sum(e["splits"] * e["query_blocks"] for e in sequences),
            "sms": self.plan.num_sms,
        }

    def as_json(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        plan, layout = self.plan, self.plan.layout
        return {
            "version": distributions.version("fa3-metadata"),
            "build": {"name": self.build, "rules": self.rules.name, "reason": self.build_reason},
            "gpu": {"name": self.problem.gpu, "arch": self.problem.arch, "num_sms": self.problem.num_sms},
            "call": asdict(self.problem),
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
            "predicted": predicted(self.simulation),
            "costs": _costs(self.simulation),
            "findings": [asdict(finding) for finding in self.findings],
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
            f"build       {self.build}, rules of {self.rules.name}: {self.build_reason}",
            f"tile        kBlockM {plan.block_m} x kBlockN {plan.block_n}{warpgroup}; mask: {mask}; "
            f"KV by {'TMA' if plan.paged_kv_tma or self.problem.page_size is None else 'cp.async'}",
            f"num_splits  at most {plan.num_splits}: {plan.num_splits_reason}{split_note}",
            f"pack_gqa    {plan.pack_gqa}: {plan.pack_gqa_reason}",
            f"scheduler   {plan.num_heads} heads on {plan.num_sms} SMs",
            f"tensor      int32[{layout.size}]: {', '.join(layout.row_names)}"
            f"{'; sorted, longest first' if layout.is_sorted else '; batch order'}",
            f"lengths     {in_words(self.lengths.cache_seqlens.tolist())}",
            f"totals      {t['sequences']} sequences, {t['keys']} keys, {t['key_blocks']} key blocks; "
            f"{t['split_sequences']} sequences split; {t['work_tiles']} work tiles",
            *self._predicted_text(),
            "",
        ]
        if self.problem.policy != "fa3":
            lines.insert(1, f"policy      {self._policy_text()}")
        return "\n".join(lines + self._table(show_all))

    def _predicted_text(self) -> list[str]:
        """What the simulation says, in lines."""
        s = self.simulation
        if not len(s.tiles):
            return []
        idle = f", {s.idle_sms} without work" if s.idle_sms else ""
        tile = s.longest_tile
        tiles_us = s.attention_us - s.costs.launch
        lines = [
            f"predicted   {s.time_us:.1f} us a layer on {card_name(s)}: launch {s.costs.launch:.1f}, tiles "
            f"{tiles_us:.1f}, combining {s.combine_us:.1f}; reading alone {s.floor_us - s.costs.launch:.1f}",
            f"            {s.waves:.2f} waves, SMs at work {s.busy_share:.0%}{idle}; {s.bytes_read / 1e6:,.1f} MB of "
            f"KV; longest tile {s.tiles.blocks[tile]} key blocks, {s.end[tile] - s.start[tile]:.1f} us",
        ]
        return lines + [
            f"{'to know' if i == 0 else '':{_NAME}}{finding.text}" for i, finding in enumerate(self.findings)
        ]

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
            "combine": costs.combine,
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


def predicted(s: Simulation) -> dict[str, Any]:
    """What a simulation comes to, in JSON's types. Times in us."""
    return {
        "time_us": round(s.time_us, 3), "launch_us": s.costs.launch,
        "tiles_us": round(s.attention_us - s.costs.launch, 3), "combine_us": round(s.combine_us, 3),
        "reading_alone_us": round(s.floor_us - s.costs.launch, 3), "own_metadata_us": round(s.own_metadata_us, 3),
        "waves": round(s.waves, 3), "busy_share": round(s.busy_share, 4), "idle_sms": s.idle_sms,
        "bytes_read": s.bytes_read, "partial_bytes": s.partial_bytes, "partial_bytes_allocated": s.allocated_bytes,
    }  # fmt: skip


def _costs(s: Simulation) -> dict[str, Any]:
    """The constants that a prediction goes by."""
    kernel = kernel_of(s.problem, s.plan)
    alone, tile = s.costs.of_kernel(kernel)
    names = ("measured_on", "bandwidth_gb_s", "softness", "launch", "combine", "split", "partial", "rows", "many")
    constants = {name: getattr(s.costs, name) for name in names}
    return constants | {"kernel": list(kernel), "alone": alone, "tile": tile}


def explain(arguments: dict[str, Any], build_reason: str, gpu: str | None = None) -> Explanation:
    """Run `get_scheduler_metadata(**arguments)` and explain it; `arguments["build"]` must be a name.

    `gpu`: the name of the GPU that it is for; None: that of the tensors' device.
    """
    tensors, problem, rules, plan = plan_call(arguments)
    assert tensors is not None  # or the call would have raised
    if gpu is None or gpu == problem.gpu:
        metadata = get_scheduler_metadata(**arguments)
    else:  # with what is known of that GPU
        problem = replace(problem, gpu=gpu)
        plan = make_plan(problem, rules)
        metadata = torch.from_numpy(reference_metadata(problem, plan, host_lengths(tensors)))
    lengths = host_lengths(tensors)
    seqlens_q, seqlens_k = sequence_lengths(problem, lengths)
    return Explanation(
        build=arguments["build"],
        build_reason=build_reason,
        rules=rules,
        problem=problem,
        plan=plan,
        lengths=lengths,
        seqlens_q=seqlens_q.tolist(),
        seqlens_k=seqlens_k.tolist(),
        metadata=metadata,
        rows={name: row.tolist() for name, row in unpack_metadata(metadata, plan.layout).items()},
    )
