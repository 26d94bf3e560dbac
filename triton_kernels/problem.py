"""The question: everything about one decode call that its schedule depends on, except the lengths."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import SupportsIndex, TypeVar

ELEMENT_SIZE = {"float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}  # bytes
MAX_HEADDIM, MAX_HEADDIM_V, MAX_NUM_SPLITS, MAX_NUM_SMS = 256, 512, 256, 1024
ARCHS = (80, 86, 89, 90)
POLICIES = ("fa3", "balanced")
DEFAULT_GPU = "NVIDIA H200"
SHORT_LIMIT = 2**24 - 512  # tokens or query rows with which keys and divisions are cheap: plan.is_short
DEFAULT_PARTIAL_BYTES = 256 * 1024 * 1024
_INT32_MAX = 2**31 - 1
_T = TypeVar("_T")


def checked_int(name: str, value: SupportsIndex, low: int, high: int = _INT32_MAX) -> int:
    """`value` as an int in [low, high]; a TypeError or ValueError that names the argument otherwise."""
    if type(value) is int and low <= value <= high:  # nearly always
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    number = operator.index(value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {number}")
    return number


def checked_choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """`value` if it is allowed; a ValueError that names the argument otherwise."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def checked_bool(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def unchecked_replace(instance: _T, **changes: object) -> _T:
    """dataclasses.replace without the checks, which take most of its time: for changes known to be good."""
    made = object.__new__(type(instance))
    vars(made).update(vars(instance), **changes)
    return made


@dataclass(frozen=True)
class Problem:
    """One call of FA3's `mha_fwd_get_scheduler_metadata` (hopper/flash_api.cpp) without its tensors.

    Names and meaning are those of `fa3_metadata.get_scheduler_metadata`; lengths are in tokens. Of the
    tensors only their presence is kept (`has_...`), since that is all the host-side rules look at.
    Construction checks every field and raises `TypeError` or `ValueError` naming the one that is wrong.
    """

    batch_size: int
    max_seqlen_q: int
    max_seqlen_k: int
    num_heads: int
    num_heads_k: int
    headdim: int
    headdim_v: int | None = None  # None: the same as headdim
    qkv_dtype: str = "bfloat16"  # a key of ELEMENT_SIZE
    has_cu_seqlens_q: bool = False
    has_seqused_q: bool = False
    has_leftpad_k: bool = False
    page_size: int | None = None  # None: KV is not paged
    max_seqlen_k_new: int = 0
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)  # (left, right) in tokens, both ends inclusive; -1: unlimited
    attention_chunk: int = 0  # 0: off
    has_softcap: bool = False
    num_splits: int = 0  # upper bound on the KV splits of a sequence; 0: FA3's heuristic picks it
    pack_gqa: bool | None = None  # None: FA3's heuristic decides
    sm_margin: int = 0  # SMs left to other kernels
    arch: int = 90  # compute capability, major * 10 + minor
    num_sms: int = 132  # SMs on the device, before sm_margin
    policy: str = "fa3"  # one of POLICIES
    batch_invariant: bool = False  # "balanced": see invariance.py
    max_partial_bytes: int = DEFAULT_PARTIAL_BYTES  # "balanced": of the forward's partial outputs
    # Query tokens of the whole batch, which some builds' bound on splits counts: q.shape[0] of a forward with ragged
    # queries. None: batch_size * max_seqlen_q, as FA3's own op takes it.
    total_q: int | None = None
    forward_is_told: bool = True  # num_splits; False: it is called with 0 and comes to a bound of its own
    gpu: str = DEFAULT_GPU  # its name, for what was measured on it: launch shapes, and the constants of "balanced"

    def __post_init__(self) -> None:
        if self.qkv_dtype not in ELEMENT_SIZE:
            raise TypeError(f"qkv_dtype must be one of {', '.join(ELEMENT_SIZE)}, got {self.qkv_dtype!r}")
        values = vars(self)
        for name, low, high in _INTEGER_FIELDS:
            if type(value := values[name]) is not int or not low <= value <= high:
                values[name] = checked_int(name, value, low, high)
        for name in _BOOLEAN_FIELDS:
            checked_bool(name, getattr(self, name))
        checked_choice("policy", self.policy, POLICIES)
        checked_int("max_partial_bytes", self.max_partial_bytes, 0, 2**63 - 1)
        if self.batch_invariant and self.policy != "balanced":
            raise ValueError(f'batch_invariant needs policy "balanced", got {self.policy!r}')
        if self.headdim_v is None:
            values["headdim_v"] = self.headdim
        checked_int("headdim_v", self.value_headdim, 1, MAX_HEADDIM_V)
        if self.page_size is not None:
            checked_int("page_size", self.page_size, 1)
        if self.total_q is not None:
            values["total_q"] = checked_int("total_q", self.total_q, 0)
        if self.pack_gqa is not None:
            checked_bool("pack_gqa", self.pack_gqa)
        if self.num_heads % self.num_heads_k:
            raise ValueError(
                f"num_heads must be a multiple of num_heads_k, got {self.num_heads} and {self.num_heads_k}"
            )
        values["window_size"] = _checked_window(self.window_size)
        if self.arch not in ARCHS:
            raise ValueError(f"arch must be one of {', '.join(map(str, ARCHS))} (FA3's GPUs), got {self.arch}")
        if self.sm_margin >= self.num_sms:
            raise ValueError(
                f"sm_margin must leave at least one SM: it must be under {self.num_sms}, got {self.sm_margin}"
            )

    @property
    def value_headdim(self) -> int:
        return self.headdim if self.headdim_v is None else self.headdim_v

    @property
    def query_tokens(self) -> int:
        """Query tokens of the whole batch."""
        return self.query_tokens_in(self.batch_size)

    def query_tokens_in(self, batch_size: int) -> int:
        """The same for another batch size. To FA3 a total of 0 is none."""
        return self.total_q or batch_size * self.max_seqlen_q

    @property
    def element_size(self) -> int:
        return ELEMENT_SIZE[self.qkv_dtype]

    @property
    def q_heads_per_kv_head(self) -> int:
        return self.num_heads // self.num_heads_k


_BOOLEAN_FIELDS = (
    "has_cu_seqlens_q", "has_seqused_q", "has_leftpad_k", "causal", "has_softcap", "batch_invariant", "forward_is_told",
)  # fmt: skip
_INTEGER_FIELDS = (
    ("batch_size", 0, _INT32_MAX),
    ("max_seqlen_q", 0, _INT32_MAX),
    ("max_seqlen_k", 0, _INT32_MAX),
    ("num_heads", 1, _INT32_MAX),
    ("num_heads_k", 1, _INT32_MAX),
    ("headdim", 1, MAX_HEADDIM),
    ("max_seqlen_k_new", 0, _INT32_MAX),
    ("attention_chunk", 0, _INT32_MAX),
    ("num_splits", 0, MAX_NUM_SPLITS),
    ("num_sms", 1, MAX_NUM_SMS),
    ("sm_margin", 0, _INT32_MAX),
)


def _checked_window(window_size: tuple[int, int]) -> tuple[int, int]:
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise TypeError(f"window_size must be a pair (left, right), got {window_size!r}") from None
    return checked_int("window_size[0]", left, -1), checked_int("window_size[1]", right, -1)
