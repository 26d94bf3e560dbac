"""What a wheel shows of itself: tile shapes, arguments of its functions, code and answers of its host rules.

Read from its extension and its front end; nothing of it runs but the two host rules (host_answers.py).
"""

from __future__ import annotations

import ast
import hashlib
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from tempfile import TemporaryDirectory

from fa3_metadata.triton_kernels.plan import LaunchPlan
from fa3_metadata.triton_kernels.problem import Problem

from .elf import Elf, demangled
from .host_answers import Answers, HostRules, Packing
from .host_functions import GET_NUM_SPLITS, GET_PACK_GQA, params_dtype
from .wheel_files import Wheel

PREPARE_KERNEL = "prepare_varlen_num_blocks"
OP, FORWARD = "get_scheduler_metadata", "fwd"
MASKS = ("causal", "local", "none")
_DTYPES = {"half_t": "float16", "bfloat16_t": "bfloat16", "float_e4m3_t": "float8_e4m3fn"}
_HEADDIMS = ((64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256))


@dataclass(frozen=True, order=True)
class Cell:
    """What a kernel is compiled for, as far as its tile depends on it; head dims as FA3 rounds them."""

    dtype: str
    headdim: int
    headdim_v: int
    mask: str  # one of MASKS
    softcap: bool
    paged_non_tma: bool

    def __str__(self) -> str:
        flags = ["softcap"] * self.softcap + ["paged without TMA"] * self.paged_non_tma
        return ", ".join([f"{self.dtype} {self.headdim}/{self.headdim_v}", self.mask, *flags])


Texts = Mapping[str, str | None]  # by OP and FORWARD; None: the wheel has no such function
Tiles = dict[Cell, frozenset[tuple[int, int]]]  # kBlockM x kBlockN; several where one has a single MMA warpgroup
CELLS = tuple(
    Cell(dtype, headdim, headdim_v, mask, softcap, paged)
    for dtype in _DTYPES.values()
    for headdim, headdim_v in (*_HEADDIMS, *([] if dtype == "float8_e4m3fn" else [(64, 256), (64, 512)]))
    for mask, softcap, paged in product(MASKS, (False, True), (False, True))
)


@dataclass(frozen=True)
class Facts:
    """All that is looked at."""

    tiles: Tiles
    answers: Answers
    signatures: Texts  # of the Python functions
    schemas: Texts  # of the torch ops
    prepare_kernel: str  # hash of its machine code on sm_90
    host_code: Mapping[str, str | None]  # function -> size and hash of its machine code; None: not exported


def tiles_of(extension: Elf) -> Tiles:
    """The tile shapes of all forward kernels for sm_90, by their names."""
    found: dict[Cell, set[tuple[int, int]]] = {}
    content = extension.content(extension.section(".rodata"))
    for name in set(re.findall(rb"_ZN7cutlass13device_kernelI[^\0]*CollectiveMainloopFwdSm90[^\0]*", content)):
        cell, tile = tile_in_name(demangled(name.decode()))
        found.setdefault(cell, set()).add(tile)
    return {cell: frozenset(found[cell]) for cell in sorted(found)}


def tile_in_name(kernel: str) -> tuple[Cell, tuple[int, int]]:
    """What a kernel is compiled for, and its tile, by its template arguments. Raises `ValueError` for other names."""
    cute = r"cute::tuple<cute::C<(\d+)>, cute::C<(\d+)>, cute::C<(\d+)> ?>"
    flags = ", ".join(["(true|false)"] * 5)
    found = re.search(
        rf"CollectiveMainloopFwdSm90<\d+, {cute}, {cute}, (\d+), cutlass::(\w+), float, cutlass::arch::Sm90, {flags}",
        kernel,
    )
    if not found:
        raise ValueError(f"not the name of a forward kernel for sm_90: {kernel}")
    block_m, block_n, headdim, headdim_v, dtype, *is_true = found.groups()[3:]
    causal, local, softcap, _varlen, paged_non_tma = (text == "true" for text in is_true)
    mask = "causal" if causal else "local" if local else "none"
    cell = Cell(_DTYPES[dtype], int(headdim), int(headdim_v), mask, softcap, paged_non_tma)
    return cell, (int(block_m), int(block_n))


def signature(source: str, function: str) -> str | None:
    """The parameters of a function at a module's top level, without annotations; None if there is none."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
            return ast.unparse(node.args)
    return None


def parameters(text: str) -> list[str]:
    """The names in a signature, in order."""
    arguments = ast.parse(f"def function({text}): ...").body[0].args  # type: ignore[attr-defined]
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def schema(extension: Elf, op: str) -> str | None:
    """The schema string with which the extension registers a torch op, spaces evened out."""
    content = extension.content(extension.section(".rodata"))
    found = re.search(rb"\0" + op.encode() + rb"(\([^\0]*\) *-> *[^\0]+)\0", content)
    return re.sub(r" *, *", ", ", " ".join(found[1].decode().split()).replace("( ", "(")) if found else None


def prepare_kernels(extension: Elf) -> Iterator[tuple[str, bytes]]:
    """(mangled name, machine code) of the metadata kernels for sm_90."""
    for image in extension.gpu_images():
        place = extension.data.find(PREPARE_KERNEL.encode(), image.offset, image.offset + image.size)
        if image.arch == 90 and place >= 0:
            elf = extension.image(image)
            for section in elf.sections:
                if section.name.startswith(".text.") and PREPARE_KERNEL in section.name:
                    yield section.name.removeprefix(".text."), elf.content(section)


def short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _size_and_hash(code: bytes | None) -> str | None:
    return None if code is None else f"{len(code)} bytes, {short_hash(code)}"


def facts_of(wheel: Wheel, problems: Sequence[Problem], plans: Sequence[LaunchPlan]) -> Facts:
    """Everything about a wheel that is asked `problems`. Raises `ValueError` where it has no metadata kernel.

    `plans` are ours: what the op works out before it asks its host rules is taken from them.
    """
    extension = wheel.extension
    kernels = sorted(prepare_kernels(extension))
    if not kernels:
        raise ValueError(f"{wheel.build} has no {PREPARE_KERNEL} kernel for sm_90")
    code = {name: extension.code_of(name) for name in (GET_NUM_SPLITS, GET_PACK_GQA)}
    schemas = {op: schema(extension, op) for op in (OP, FORWARD)}
    sorts = any("kernelILi" in name for name, _ in kernels)  # a template since it can sort
    with TemporaryDirectory(prefix="wheel-rules-") as folder:
        library = pathlib.Path(folder) / "extension.so"
        extension.write_loadable(library)
        host_rules = HostRules(
            library,
            exports_pack_gqa=code[GET_PACK_GQA] is not None,
            packing=Packing.of(wheel.package, wheel.version),
            params=params_dtype("attention_chunk" in (schemas[FORWARD] or ""), sorts),
            always_dynamic=sorts,
        )
        answers = host_rules.answers(problems, plans)
    return Facts(
        tiles=tiles_of(extension),
        answers=answers,
        signatures={OP: signature(wheel.front_end, OP), FORWARD: signature(wheel.front_end, wheel.forward)},
        schemas=schemas,
        prepare_kernel=short_hash(b"".join(code for _, code in kernels)),
        host_code={name: _size_and_hash(found) for name, found in code.items()},
    )
