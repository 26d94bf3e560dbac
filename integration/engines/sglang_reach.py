"""Which layers of the installed SGLang get our metadata, in full CUDA graphs and run eagerly, and why.

python -m fa3_metadata.engines.sglang_reach    # the table of docs/sglang.md, for the installed SGLang
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..installed import installed_version, resolve_build
from ..settings import DISABLE_VARIABLE, is_disabled
from .reach import NONE, OURS, THEIRS, Reach, coverage_table
from .sglang_names import (
    ALL_LAYOUTS,
    DUAL_CHUNK_LAYOUTS,
    FORWARD,
    LAYOUTS,
    MINICPM_LAYOUTS,
    SPARSE_LAYOUTS,
    SGLangNames,
)
from .source_facts import installed_source

CallersOf = Callable[[str], list[str] | None]  # of a module: see `callers`; None: there is no such module


@dataclass(frozen=True)
class Site:
    """A kind of layer, and what it gets from a SGLang whose method `called_in` calls FA3's forward."""

    layers: str
    in_graph: str
    eagerly: str
    because: str
    layouts: tuple[SGLangNames, ...] = LAYOUTS
    called_in: tuple[str, ...] = ("FlashAttentionBackend.forward_decode",)
    theirs: bool = False  # SGLang makes it itself, from 0.5.11 on
    invariant: str = "yes"  # with batch_invariant

    def callers(self, layout: SGLangNames) -> Iterator[str]:
        """As `Class.method` of the layout's module."""
        if self.called_in:
            yield from self.called_in
        else:
            method = layout.forward_called_in
            yield method if "." in method else f"{layout.backend}.{method}"


_EXTEND = ("FlashAttentionBackend.forward_extend",)
_FIRST_LAYER = "the first layer of a kind makes it, the others share it"
_MAKER = f"in a graph {_FIRST_LAYER}; eagerly SGLang asks our maker"
_FEW_QUERIES = "up to the queries with which FA3 has the kernel of one; beyond, one split, and a warning"
SITES = (
    Site("decode, full attention", OURS, OURS, _MAKER, theirs=True),
    Site("decode, full attention, under attention data parallelism or prefill context parallelism", OURS, OURS,
         _FIRST_LAYER),
    Site("decode: chunks, MLA, cross attention", OURS, OURS, _FIRST_LAYER),
    Site("decode: sliding windows", OURS, OURS, _FIRST_LAYER,
         invariant="where the page table is wider than the window: eagerly it is as wide as the longest context"),
    Site("drafts of several layers", OURS, OURS, _FIRST_LAYER),
    Site("drafts of one layer", OURS, "none; ours under `balanced`", "it has nobody to share with"),
    Site("verification, draft extension, prefill, mixed batches", OURS, OURS, _FIRST_LAYER, called_in=_EXTEND,
         invariant=_FEW_QUERIES),
    Site("cascade attention of drafts in a tree: the prefix, and the rest of each sequence", OURS, OURS, _FIRST_LAYER,
         called_in=("FlashAttentionBackend.forward_decode", *_EXTEND), invariant=_FEW_QUERIES),
    Site("sparse MLA (DeepSeek-V3.2, GLM-5), where it attends by FA3", OURS, OURS,
         "each layer picks keys of its own, of the same number: lengths are shared", SPARSE_LAYOUTS, ()),
    Site("sparse attention of MiniCPM (`minicpm_flashattn`)", OURS, OURS,
         "each layer picks keys of its own, of the same number: lengths are shared", MINICPM_LAYOUTS, ()),
    Site("dual chunk attention: decode", OURS, OURS, _FIRST_LAYER, DUAL_CHUNK_LAYOUTS, ()),
)  # fmt: skip
OTHERS = (
    Reach("a call with `only_qv` (heads without rotary dims)", NONE, NONE, "what it schedules is not known: FA3's own",
          "not known: one split, and a warning"),
    Reach("what calls `flash_attn_varlen_func`: MLA and dual chunk prefill, embeddings without a cache, vision", NONE,
          NONE, "their keys are ragged and in no cache: FA3's own stage, left alone"),
    Reach("FA4, FlashInfer, FlashMLA, Triton, TRT-LLM, XPU, MUSA, NPU", NONE, NONE, "they are other kernels"),
)  # fmt: skip


def callers(source: str) -> list[str]:
    """The functions of a module that call FA3's forward by its name, as `Class.method`."""
    found = []
    for kind in ast.parse(source).body:
        if isinstance(kind, ast.ClassDef):
            found += [
                f"{kind.name}.{one.name}" for one in kind.body if isinstance(one, ast.FunctionDef) and _calls(one)
            ]
        elif isinstance(kind, ast.FunctionDef) and _calls(kind):
            found.append(kind.name)
    return found


def _calls(function: ast.FunctionDef) -> bool:
    calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    return any(FORWARD in (getattr(name, "id", ""), getattr(name, "attr", "")) for name in calls)


def installed_callers(module: str) -> list[str] | None:
    source = installed_source(module)
    return None if source is None else callers(source)


def why_not(version: str | None, build: str | None = None) -> str | None:
    """Why a process with this version of SGLang would not get our metadata, as far as can be told without importing it.

    `build`: the FA3 build behind it; None: the detected one.
    """
    if is_disabled():
        return f"{DISABLE_VARIABLE} is set"
    if version is None:
        return "SGLang is not installed"
    if (reason := unknown_version(version)) is not None:
        return reason
    try:
        resolve_build(build)
    except ValueError as error:
        return str(error)
    return None


def unknown_version(version: str) -> str | None:
    """Why a version of SGLang is left alone, whatever its names are; None: it is one that was read."""
    if any(names.covers(version) for names in ALL_LAYOUTS):
        return None
    ranges = f"{LAYOUTS[-1].versions.split(' to ')[0]} to {LAYOUTS[0].versions.split(' to ')[1]}"
    return f"SGLang must be {ranges}, got {version}"


def reach(
    callers_of: CallersOf = installed_callers, version: str | None = None, build: str | None = None
) -> list[Reach]:
    """For each kind of layer what it gets in a process that is attached to; what it has without, if that cannot be.

    Read from SGLang's source, without importing it.

    Args:
        callers_of: of a module of SGLang; those of the installed one.
        version, build: as for `why_not`; None: what is installed.
    """
    version = installed_version("sglang") if version is None else version
    return [*(_reach(site, callers_of, version, why_not(version, build)) for site in SITES), *OTHERS]


def _reach(site: Site, callers_of: CallersOf, version: str | None, reason: str | None) -> Reach:
    layouts = [layout for layout in site.layouts if version is not None and layout.covers(version)]
    if not any(set(site.callers(layout)) <= set(callers_of(layout.where) or ()) for layout in layouts):
        return Reach(site.layers, NONE, NONE, reason or "this SGLang has no such layers")
    if reason is not None:
        theirs = THEIRS if site.theirs and layouts[0].maker_keywords else NONE
        return Reach(site.layers, theirs, theirs, reason)
    by_the_forward = site.theirs and not layouts[0].maker_keywords
    because = _FIRST_LAYER if by_the_forward else site.because
    return Reach(site.layers, site.in_graph, site.eagerly, because, site.invariant)


if __name__ == "__main__":
    print(coverage_table(reach()))
