"""Calling an FA3 extension's own host rules on any machine: `get_num_splits` and `get_pack_gqa`.

Both take `Flash_fwd_params const&` (hopper/flash.h), of which they read about twenty members. A struct is a row of a
NumPy array whose dtype has the members' names and their places in C++; those that neither function reads are lumped
together (`q_strides` and so on). The functions run in a child process (this module's `main`), from a copy that loads
without CUDA and torch (`Elf.write_loadable`).
"""

from __future__ import annotations

import ctypes
import pathlib
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

GET_NUM_SPLITS = "_Z14get_num_splitsRK16Flash_fwd_params"
GET_PACK_GQA = "_Z12get_pack_gqaRK16Flash_fwd_params"
POISON = 0x5A
_ROOT = pathlib.Path(__file__).resolve().parent.parent

_POINTER, _INT64, _INT, _FLOAT, _BOOL = "u8", "i8", "i4", "f4", "?"
_Member = tuple[str, str] | tuple[str, str, int]


def params_dtype(has_attention_chunk: bool, sorts: bool) -> np.dtype[np.void]:
    """`Flash_fwd_params` of a build, up to the last member that its host rules read.

    `has_attention_chunk`: upstream since April 2025, not in vLLM's fork. `sorts`: since the prepare kernel can sort
    (August 2025), with more members between num_splits_dynamic_ptr and arch.
    """
    chunk: list[_Member] = [("attention_chunk", _INT)] if has_attention_chunk else []
    scheduler: list[_Member] = [("num_splits_dynamic_ptr", _POINTER), ("skip_metadata", _BOOL)]
    if sorts:
        scheduler = [
            ("prepared", _POINTER),  # num_m_blocks_ptr or prepare_seqlen_q_ptr
            ("num_splits_dynamic_ptr", _POINTER),
            ("prepared_order", _POINTER, 2),
            ("skip_metadata", _BOOL),
            ("varlen_sort_batches", _BOOL),
            ("semaphore_offset", _INT),
            ("head_swizzle", _BOOL),
            ("prepare_varlen_pdl", _BOOL),
        ]
    members: list[_Member] = [
        ("q_k_v", _POINTER, 3),
        ("q_k_v_strides", _INT64, 10),
        *((name, _INT) for name in ("h", "h_k")),
        ("o_oaccum", _POINTER, 2),
        ("o_strides", _INT64, 3),
        ("lse", _POINTER, 2),
        ("descale", _POINTER, 3),
        ("descale_strides", _INT64, 6),
        *((name, _INT) for name in ("b", "seqlen_q", "seqlen_k", "seqlen_knew", "d")),
        ("seqlens_rounded", _INT, 2),
        *((name, _INT) for name in ("d_rounded", "rotary_dim", "total_q", "total_k", "total_knew", "b_k")),
        *((name, _INT) for name in ("dv", "dv_rounded")),
        ("softmax_scale", _FLOAT),
        ("softcap", _FLOAT),
        *((name, _POINTER) for name in ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_knew", "leftpad_k")),
        *((name, _POINTER) for name in ("seqused_q", "seqused_k")),
        ("accum_strides", _INT64, 7),
        ("knew_ptr", _POINTER),
        ("vnew_ptr", _POINTER),
        ("knew_strides", _INT64, 6),
        ("qv_ptr", _POINTER),
        ("qv_strides", _INT64, 3),
        ("rotary", _POINTER, 3),
        ("kv_batch_idx", _POINTER),
        ("page_table", _POINTER),
        ("page_table_stride", _INT64),
        ("page_size", _INT),
        ("num_pages", _INT),
        ("pagedkv_tma", _BOOL),
        ("p_dropout", _FLOAT),
        ("p_dropout_uint8", "u1"),
        ("rp_dropout", _FLOAT),
        ("window_size_left", _INT),
        ("window_size_right", _INT),
        *chunk,
        ("rng_state", _POINTER),
        *((name, _BOOL) for name in ("is_bf16", "is_fp32", "is_e4m3", "is_causal", "is_local", "rotary_interleaved")),
        ("num_splits", _INT),
        ("pack_gqa", _BOOL),
        ("semaphore", _POINTER),
        *scheduler,
        ("arch", _INT),
        ("num_sm", _INT),
        ("rest", "u1", 64),  # other members, differing by build, that are not read
    ]
    return np.dtype([(name, kind, *count) for name, kind, *count in members], align=True)


def filled(dtype: np.dtype[np.void], members: Mapping[str, NDArray[np.generic]], poison: int = 0) -> NDArray[np.void]:
    """Structs with these members; every other byte is `poison`."""
    count = len(next(iter(members.values())))
    structs = np.full(count * dtype.itemsize, poison, np.uint8).view(dtype)
    for name, values in members.items():
        structs[name] = values
    return structs


def call(library: pathlib.Path, function: str, structs: NDArray[np.void]) -> NDArray[np.int32]:
    """What `function` of a loadable copy answers for each struct; bool as 0 or 1. Raises `RuntimeError` if it dies."""
    command = [sys.executable, "-m", "bench.host_functions", str(library), function, str(structs.itemsize)]
    done = subprocess.run(command, cwd=_ROOT, input=structs.tobytes(), capture_output=True)
    if done.returncode or len(done.stdout) != 4 * len(structs):
        what = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"calling {function}: {what[-1]}")
    return np.frombuffer(done.stdout, np.int32)


def main(library: str, function: str, size: str) -> None:
    """Reads structs from standard input, writes int32 answers to standard output."""
    structs = ctypes.create_string_buffer(data := sys.stdin.buffer.read(), len(data))
    callee = getattr(ctypes.CDLL(library), function)
    callee.argtypes, callee.restype = [ctypes.c_void_p], ctypes.c_int if "num_splits" in function else ctypes.c_bool
    start, step = ctypes.addressof(structs), int(size)
    answers = [callee(start + offset) for offset in range(0, len(data), step)]
    sys.stdout.buffer.write(np.array(answers, np.int32).tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
