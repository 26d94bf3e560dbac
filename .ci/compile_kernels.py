"""Compile every kind of kernel for sm_90, without a GPU and without torch.

    python .ci/compile_kernels.py                  # with the Triton of this Python
    python .ci/compile_kernels.py 3.5.1 newest     # with these: each that is not here in a throw-away environment

Each kernel must also be one that driver.py launches itself: a Triton for which it would not is reported.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any, NamedTuple, get_type_hints

ROOT = pathlib.Path(__file__).resolve().parent.parent
NEWEST = "newest"
PLACES = ((0, 1, 2, 3, 4), (0, 1, -1, 2, 3), (0, 1, -1, -1, 2), (-1, 0, 1, -1, -1))  # of rows: all, unpacked, unsorted


class Variant(NamedTuple):
    """What a kernel is compiled for: of each plan SPLITS, SEMAPHORE, ALIGNMENT, PLACES, WINDOW and SHORT."""

    plans: tuple[tuple[str, str, int, int, bool, bool], ...]
    group: int = 1024
    several: bool = False  # the kernel of several plans, even for one
    lengths: str = "i32"  # dtype
    optional_lengths: bool = False
    contiguous: bool = True
    early: bool = True


_ONE = ("FA3_RULE", "SEMAPHORE_LAST", 4, 1, False, True)
_OTHER = ("SEARCH", "SEMAPHORE_LAST", 4, 2, True, False)
VARIANTS = (
    Variant((("ONE_SPLIT", "NO_SEMAPHORE", 1, 3, False, True),)),
    Variant((("ONE_SPLIT", "SEMAPHORE_FIRST", 4, 2, True, False),)),
    Variant((("FA3_RULE", "SEMAPHORE_FIRST", 1, 0, False, True),)),
    Variant((("FA3_RULE", "SEMAPHORE_LAST", 4, 1, False, False),)),
    Variant((("FA3_RULE", "NO_SEMAPHORE", 4, 1, False, True),), lengths="i64", optional_lengths=True, early=False),
    Variant((("FA3_RULE", "SEMAPHORE_LAST", 4, 1, False, True),), optional_lengths=True, contiguous=False),
    # The search of policy "balanced" is another for up to 64 sequences, up to 128, and more.
    Variant((("SEARCH", "NO_SEMAPHORE", 4, 1, False, True),), group=64),
    Variant((("SEARCH", "SEMAPHORE_LAST", 1, 1, True, True),), group=128, optional_lengths=True),
    Variant((("SEARCH", "SEMAPHORE_FIRST", 4, 0, True, False),)),
    Variant((("LOAD", "SEMAPHORE_LAST", 1, 1, True, True),)),
    Variant((("LOAD", "SEMAPHORE_FIRST", 4, 0, False, False),)),
    Variant((("FIXED", "NO_SEMAPHORE", 1, 2, True, True),)),
    Variant((("FIXED", "SEMAPHORE_LAST", 4, 1, False, False),)),
    Variant((_ONE,), several=True),
    Variant((_ONE, _OTHER), group=256, several=True),
    Variant((("LOAD", "NO_SEMAPHORE", 1, 1, False, True), ("FIXED", "NO_SEMAPHORE", 1, 1, True, True),
             ("ONE_SPLIT", "NO_SEMAPHORE", 1, 2, False, True)), group=128, several=True),
)  # fmt: skip


def compile_variant(variant: Variant) -> str | None:
    """Compile with this Python's Triton; why driver.py would not launch what comes out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from triton_kernels import driver, kernel

    layouts = tuple(_layout(kernel, *plan) for plan in variant.plans)
    constants = {"LAYOUT": layouts[0], "LAYOUTS": layouts, "CONTIGUOUS": variant.contiguous, "EARLY": variant.early}
    constants |= {"SLICE": 4, "GROUP": variant.group}
    pointers = {"out": "*i32", "table": "*i32", "cache_seqlens": f"*{variant.lengths}"}
    optional = ("cu_seqlens_q", "seqused_q", "cu_seqlens_k_new", "leftpad_k")
    pointers |= dict.fromkeys(optional, f"*{variant.lengths}" if variant.optional_lengths else "constexpr")
    floats = [name for name, kind in get_type_hints(kernel.Numbers).items() if kind is float]
    function = kernel.prepare_layer_groups_kernel if variant.several else kernel.prepare_varlen_num_blocks_kernel
    kinds = pointers | dict.fromkeys(constants, "constexpr") | dict.fromkeys(floats, "fp32")
    signature = {parameter.name: kinds.get(parameter.name, "i32") for parameter in function.params}
    values = {
        (parameter.num,): constants.get(parameter.name)
        for parameter in function.params if signature[parameter.name] == "constexpr"
    }  # fmt: skip
    fusion = all(plan[0] in ("ONE_SPLIT", "FA3_RULE") for plan in variant.plans)
    options: dict[str, Any] = {"num_warps": max(1, variant.group // 128), "enable_fp_fusion": fusion}
    options |= {"launch_pdl": True} if variant.early else {}
    source = ASTSource(function, signature, values)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    if variant.early and "griddepcontrol.wait" not in made.asm["ptx"]:
        return "it does not wait for the kernel before"
    given = [kind for kind in signature.values() if kind != "constexpr"]
    num_pointers = sum(kind.startswith("*") for kind in given)
    return driver.refusal(made, num_pointers, len(given) - num_pointers, variant.early)


def _layout(kernel: Any, splits: str, semaphore: str, alignment: int, rows: int, window: bool, short: bool) -> Any:
    """launch.layout_constants of a plan."""
    places, constants = PLACES[rows], (getattr(kernel, semaphore).value, getattr(kernel, splits).value)
    return (*places, max(places) + 1, alignment, *constants, window, short)


def compile_here() -> int:
    """All variants with this Python's Triton; the number of those that are not as they should be."""
    sys.path.insert(0, str(ROOT))  # and not another package of the name triton_kernels
    import triton

    wrong = 0
    for variant in VARIANTS:
        reason = compile_variant(variant)
        wrong += reason is not None
        print("compiled", *("+".join(plan[0] for plan in variant.plans), variant.group, reason or ""))
    print(f"Triton {triton.__version__}: {len(VARIANTS)} kernels, {wrong} of them not as they should be")
    return wrong


def compile_with(version: str) -> tuple[bool, str]:
    """Whether all variants are right with that Triton, nothing of them from a cache, and what was said."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="triton-") as folder:
        python: str | pathlib.Path = sys.executable
        if version != version_here():
            python = pathlib.Path(folder, "bin", "python")
            venv.create(folder, with_pip=False)
            pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-compile", "--no-deps"]
            made = subprocess.run([*pip, f"triton=={version}", "numpy"], capture_output=True, text=True)
            if made.returncode:
                return False, f"triton {version} cannot be installed: {made.stderr}"
        ready = time.perf_counter()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTHON"))}
        environment["TRITON_CACHE_DIR"] = str(pathlib.Path(folder, "cache"))
        made = subprocess.run([python, __file__], capture_output=True, text=True, env=environment)
    took = f"ready in {ready - start:.0f} s, compiled in {time.perf_counter() - ready:.0f} s"
    said = made.stdout.splitlines()[-1:] if made.returncode == 0 else [made.stdout, made.stderr]
    return made.returncode == 0, "\n".join([*said, took])


def version_here() -> str | None:
    try:
        return installed_version("triton")
    except PackageNotFoundError:
        return None


def available_versions() -> list[str]:
    """Of Triton for this Python, the newest first; none where the package index cannot be reached."""
    pip = [sys.executable, "-m", "pip", "index", "versions", "triton", "--retries", "1", "--timeout", "10"]
    found = re.search(r"Available versions: (.*)", subprocess.run(pip, capture_output=True, text=True).stdout)
    return found[1].split(", ") if found else []


def main() -> None:
    if not sys.argv[1:]:
        sys.exit(compile_here() > 0)
    available = available_versions()
    wanted = dict.fromkeys(available[0] if version == NEWEST and available else version for version in sys.argv[1:])
    if missing := set(wanted) - set(available):
        print(f"not compiled with Triton {', '.join(sorted(missing))}: no index in reach has it for this Python")
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(compile_with, [version for version in wanted if version not in missing]))
    for _, said in results:
        print(said)
    sys.exit(not all(good for good, _ in results))


if __name__ == "__main__":
    main()
