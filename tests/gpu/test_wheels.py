"""The compiled kernel against the installed FA3 wheel: fresh cases, captured graphs, and the forward itself."""

from __future__ import annotations

import functools
import pathlib
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import fa3_metadata
import pytest
import torch
from fa3_metadata.installed import BUILD_VARIABLE, SEARCH_ORDER, installed_version, native_op
from fa3_metadata.tools.decode_batch import DecodeBatch, attend, has_paged_kernels, make_decode_batch
from fa3_metadata.triton_kernels.builds import package_of

from ..conftest import HAS_GPU
from ..helpers.cases import POISON, Case, boundary_case, crowded_case, random_case

pytestmark = pytest.mark.gpu

WHEEL = next((f"{name}-{version}" for name in SEARCH_ORDER if (version := installed_version(name))), None)
PACKAGE = package_of(WHEEL) if WHEEL else None
HAS_PAGED_AND_LOCAL = WHEEL is None or has_paged_kernels(WHEEL)
PARTS, RANDOM_CASES, BOUNDARY_CASES, CROWDED_CASES = 20, 2400, 1200, 600  # of every build; spread over the parts


def _why_no_op() -> str | None:
    if WHEEL is None:
        return f"no FA3 wheel is installed (none of {', '.join(SEARCH_ORDER)})"
    try:
        native_op(WHEEL)
    except RuntimeError as error:
        return str(error)
    return None


NO_OP = _why_no_op() if HAS_GPU else "no CUDA GPU on this machine"
needs_op = pytest.mark.skipif(NO_OP is not None, reason=str(NO_OP))
needs_wheel = pytest.mark.skipif(WHEEL is None, reason="no FA3 wheel is installed")
needs_paged_and_local = pytest.mark.skipif(
    not HAS_PAGED_AND_LOCAL, reason=f"{WHEEL} has no kernels for paged KV and sliding windows"
)


@pytest.fixture(scope="module")
def num_sms() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def against_wheel(case: Case, **tensor_kind: object) -> None:
    rows = case.run("triton", "cuda", **tensor_kind)
    case.check(rows, case.run("native", "cuda"), f"Triton kernel against {case.build} {tensor_kind or ''}")


@needs_op
@pytest.mark.parametrize("part", range(PARTS))
def test_fresh_random_cases(part: int, num_sms: int) -> None:
    rng = random.Random(f"random {part}")
    for _ in range(RANDOM_CASES // PARTS):
        case = random_case(rng, str(WHEEL), num_sms)
        if case.args["batch_size"]:  # the wheels launch an empty grid for an empty batch, which is an error
            against_wheel(case)


@needs_op
@pytest.mark.parametrize("part", range(PARTS))
def test_fresh_boundary_cases(part: int, num_sms: int) -> None:
    rng = random.Random(f"boundary {part}")
    for _ in range(BOUNDARY_CASES // PARTS):
        against_wheel(boundary_case(rng, str(WHEEL), num_sms))


@needs_op
@pytest.mark.parametrize("part", range(PARTS))
def test_fresh_cases_in_which_the_wheels_own_bound_decides(part: int, num_sms: int) -> None:
    rng = random.Random(f"crowded {part}")
    for _ in range(CROWDED_CASES // PARTS):
        against_wheel(crowded_case(rng, str(WHEEL), num_sms))


@needs_op
@pytest.mark.parametrize("part", range(PARTS))
def test_int64_and_strided_lengths(part: int, num_sms: int) -> None:
    rng = random.Random(f"kinds {part}")
    for _ in range(4):
        case = random_case(rng, str(WHEEL), num_sms, largest_batch=64)
        if case.args["batch_size"]:
            for kind in ({"dtype": torch.int64}, {"stride": 5}, {"dtype": torch.int64, "stride": 2}):
                against_wheel(case, **kind)


@needs_op
def test_reference_matches_the_wheel(num_sms: int) -> None:
    rng = random.Random("reference")
    for _ in range(300):
        case = random_case(rng, str(WHEEL), num_sms)
        if case.args["batch_size"]:
            case.check(case.run("reference", "cuda"), case.run("native", "cuda"), "NumPy model against the wheel")


@needs_op
@pytest.mark.parametrize("batch", [1, 33, 992, 1500])
@pytest.mark.parametrize("causal", [False, True])
def test_replays_of_a_captured_launch_follow_the_lengths(batch: int, causal: bool, num_sms: int) -> None:
    rng = random.Random(batch)
    args = {
        "batch_size": batch, "max_seqlen_q": 1, "max_seqlen_k": 70000, "num_heads": 8, "num_heads_k": 1,
        "headdim": 128, "page_size": 64, "causal": causal, "num_splits": 32, "cache_seqlens": [1] * batch,
    }  # fmt: skip
    case = Case(str(WHEEL), args, num_sms=num_sms)
    arguments = case.arguments("cuda")
    layout = fa3_metadata.metadata_layout(**arguments)
    out = torch.full((layout.size,), POISON, dtype=torch.int32, device="cuda")
    made = fa3_metadata.get_scheduler_metadata(**arguments, out=out)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fa3_metadata.get_scheduler_metadata(**arguments, out=out)
    for _ in range(10):
        lengths = [rng.randint(0, 70000) for _ in range(batch)]
        arguments["cache_seqlens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(POISON)
        graph.replay()
        expected = fa3_metadata.get_scheduler_metadata(**arguments, backend="native")
        rows, wanted = (fa3_metadata.unpack_metadata(t, layout) for t in (made, expected))
        for name in rows:
            assert torch.equal(rows[name], wanted[name]), name
        assert layout.semaphore is not None
        assert out[layout.semaphore] == 0


LENGTHS: dict[str, list[int]] = {
    "one": [513],
    "short": [511, 512, 1, 130],
    "skewed": [30000] + [500] * 30,
    "many": [((i * 7919) % 3000) + 1 for i in range(200)],
    "beyond_992": [((i * 104729) % 600) + 1 for i in range(1003)],
}
MASKS = {"causal": (True, (-1, -1)), "full": (False, (-1, -1)), "window": (True, (300, 0))}
NUM_SPLITS = (0, 7, 1)  # FA3's heuristic, a bound of the caller's, none


def attend_unpaged(batch: DecodeBatch, metadata: torch.Tensor | None, num_splits: int) -> torch.Tensor:
    """The output over the same keys and values, laid out as a cache that is not paged and holds as many a sequence."""
    k, v = (cache[batch.page_table].flatten(1, 2) for cache in (batch.k_cache, batch.v_cache))
    return attend(str(WHEEL), replace(batch, k_cache=k, v_cache=v, page_table=None), metadata, num_splits)


@needs_wheel
@pytest.mark.parametrize("heads", [(8, 1), (32, 8), (7, 7)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_forward_gives_the_same_bits_with_our_metadata_as_without(
    lengths: str, mask: str, heads: tuple[int, int]
) -> None:
    """The wheel's output with our metadata must have the bits of its output without any."""
    causal, window = MASKS[mask]
    if window != (-1, -1) and not HAS_PAGED_AND_LOCAL:
        pytest.skip(f"{WHEEL} has no kernels for sliding windows")
    for seqlen_q in (1, 4):
        batch = make_decode_batch(
            LENGTHS[lengths], *heads, 128, max_seqlen_q=seqlen_q, causal=causal, window_size=window, seed=seqlen_q
        )
        problem = batch.problem_arguments()
        run: Callable[..., torch.Tensor] = functools.partial(attend, str(WHEEL))
        if not HAS_PAGED_AND_LOCAL:
            problem["page_size"], run = None, attend_unpaged
        for num_splits in NUM_SPLITS:
            metadata = fa3_metadata.get_scheduler_metadata(**problem, num_splits=num_splits, build=WHEEL)
            expected = run(batch, None, num_splits)
            for layer in range(2):  # the semaphore must be zero again after each use
                got = run(batch, metadata, num_splits)
                assert torch.equal(got, expected), f"num_splits {num_splits}, q length {seqlen_q}, layer {layer}"


@pytest.mark.skipif(PACKAGE not in ("sgl-kernel", "sglang-kernel"), reason="needs an installed sgl_kernel")
def test_install_check() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "bench", "install-check", "--quick"]
    run = subprocess.run(command, cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "every output equal" in run.stdout


@needs_wheel
def test_the_wheel_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BUILD_VARIABLE, raising=False)
    assert fa3_metadata.detect_build().build == WHEEL
