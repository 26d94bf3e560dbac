"""Which layers of the installed vLLM get our metadata, in full CUDA graphs and run eagerly, and why.

python -m fa3_metadata.engines.vllm_reach    # the table of docs/vllm.md, for the installed vLLM
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .reach import NONE, OURS, THEIRS, Reach, coverage_table
from .source_facts import installed_facts
from .vllm import why_not
from .vllm_names import CASCADE, FA_UTILS, FORWARD, GQA, MLA_SPARSE, FactsOf


@dataclass(frozen=True)
class Site:
    """A kind of layer, and what it gets from an attached vLLM that has this fact about this module."""

    layers: str
    theirs: str  # what it has from vLLM
    in_graph: str
    eagerly: str
    because: str
    module: str = GQA
    fact: str = f"from {FA_UTILS} import {FORWARD}"


_BY_FORWARD = "the forward makes it, once for each kind of layer of a step"
SITES = (
    Site(
        "GQA and MHA, all with one window or none; prefill, mixed batches and verification of drafts too",
        THEIRS, OURS, OURS, "its builder asks our function, once a step for a group of layers",
    ),
    Site(
        "models that mix windows (Gemma, gpt-oss), with vLLM's hybrid KV cache", NONE, OURS, OURS,
        "its builders, which vLLM turns off, are told the window of their layers, and turned on",
    ),
    Site("models that mix windows within a group of layers, since that cache is turned off", NONE, OURS, OURS,
         _BY_FORWARD),
    Site("cascade attention: the common prefix, and the rest of each sequence", THEIRS, OURS, OURS,
         "its builder asks our function for both", GQA, CASCADE),
    Site("decode context parallelism: attention to the cache", THEIRS, OURS, OURS, "its builder asks our function"),
    Site(
        "drafts that vLLM builds with `fast_build`", NONE, OURS, "ours, of several layers",
        f"{_BY_FORWARD}; a layer alone has nobody to share with",
    ),
    Site(
        "GQA and MHA under `VLLM_BATCH_INVARIANT`: one split", NONE, OURS, OURS,
        f"{_BY_FORWARD}. FA3 still takes another tile for a decode row beside a prefill, and a window for none in a "
        "short batch, so that bits differ there, as without us",
    ),
    Site("MLA decode", THEIRS, OURS, OURS, "its builder asks our function, once a step"),
    Site(
        "sparse MLA (`FLASH_ATTN_MLA_SPARSE`)", NONE, "ours, one a layer", NONE,
        "each layer picks keys of its own, so that lengths are shared by no two: there is nothing to make once a step",
        MLA_SPARSE, f"from vllm.vllm_flash_attn.flash_attn_interface import {FORWARD}",
    ),
    Site(
        "encoders, MLA prefill, the new keys under context parallelism", NONE, NONE, NONE,
        "their keys are ragged and in no cache: FA3's own stage, left alone",
    ),
    Site("FA2, FA4, FlashInfer, FlashMLA, Triton, ROCm, XPU", NONE, NONE, NONE, "they are other kernels"),
)  # fmt: skip


def reach(facts_of: FactsOf = installed_facts, build: str | None = None, in_place: bool = False) -> list[Reach]:
    """For each kind of layer what `attach` gives it, in a process that attaches; what it would have without, if not.

    Read from vLLM's source, without importing it. Arguments are those of `vllm.why_not`.
    """
    reason = why_not(facts_of, build, in_place)[1]
    return list(_reach(facts_of, reason))


def _reach(facts_of: FactsOf, reason: str | None) -> Iterator[Reach]:
    for site in SITES:
        facts = facts_of(site.module)
        if facts is None and reason is not None:
            yield Reach(site.layers, NONE, NONE, reason.splitlines()[0])
        elif facts is None or site.fact not in facts:
            yield Reach(site.layers, NONE, NONE, "this vLLM has no such layers")
        elif reason is not None and (site.theirs, site.in_graph, site.eagerly) != (NONE, NONE, NONE):
            yield Reach(site.layers, site.theirs, site.theirs, reason.splitlines()[0])
        else:
            yield Reach(site.layers, site.in_graph, site.eagerly, site.because)


if __name__ == "__main__":
    print(coverage_table(reach()))
