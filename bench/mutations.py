"""One-line breaks that the tests must notice, as data for `python -m bench mutate`.

To add one: its file, a text that is there exactly once, what takes its place, what would go wrong for a user, and the
tests that should turn red. Where a change to the code moves a text, change it here, too: the command and
tests/bench/test_mutate.py refuse a list that no longer fits.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """A break of one file, and who should notice it."""

    name: str
    file: str  # from the root of the tree
    before: str  # is there exactly once; a part of a line, or a few whole lines
    after: str
    why: str  # what goes wrong with it
    tests: tuple[str, ...]  # as pytest takes them: a file, or file::test

    def applied_to(self, text: str) -> str:
        """The text of the file with the break."""
        return text.replace(self.before, self.after, 1)


_KERNELS = "triton_kernels"
_WHEELS = "tests/builds/test_wheel_rules.py::test_splits_and_packing_are_what_every_wheel_answers"
_ABSURD = "tests/kernels/test_agreement.py::test_absurd_lengths_stay_within_the_tensor"
_GOLDENS = "tests/builds/test_goldens.py::test_triton"
_MODEL = "tests/builds/test_goldens.py::test_reference"

BLOCKS = (
    Mutation(
        "negative-queries",
        f"{_KERNELS}/blocks.py",
        "seqlen_q = tl.maximum(seqlen_q, 0)",
        "seqlen_q = seqlen_q",
        "a negative query length moves a window's first key, and with it the blocks that are split",
        (_ABSURD,),
    ),
    Mutation(
        "keys-beyond-the-limit",
        f"{_KERNELS}/blocks.py",
        "seqlen_k = tl.minimum(seqlen_k, MOST)",
        "seqlen_k = seqlen_k",
        "a row of padding that nobody has set overflows the sort's keys, and metadata is written outside the tensor",
        (_ABSURD,),
    ),
    Mutation(
        "left-padding",
        f"{_KERNELS}/blocks.py",
        "seqlen_k -= load_lengths(leftpad_k",
        "seqlen_k += load_lengths(leftpad_k",
        "keys that are only padding would be scheduled",
        (_GOLDENS,),
    ),
    Mutation(
        "long-division-rounds-up",
        f"{_KERNELS}/blocks.py",
        "return quotient + (remainder >= b).to(tl.int32) - (remainder < 0).to(tl.int32)",
        "return quotient - (remainder < 0).to(tl.int32)",
        "a split too few for long sequences, by the rounding of a float32 reciprocal",
        ("tests/kernels/test_agreement.py::test_keys_at_the_ends_of_their_range", _ABSURD),
    ),
    Mutation(
        "window-start",
        f"{_KERNELS}/blocks.py",
        "first_key = at - n.window_left",
        "first_key = at - n.window_left + 1",
        "at some lengths a block too few is counted under a window, and splits are missing",
        ("tests/kernels/test_window_blocks.py::test_the_kernel_counts_what_the_model_counts",),
    ),
    Mutation(
        "chunk-start",
        f"{_KERNELS}/blocks.py",
        "first_key = tl.maximum(first_key, at - into_chunk)",
        "first_key = first_key",
        "blocks of earlier chunks would be split, which no query of this one reads",
        ("tests/kernels/test_window_blocks.py::test_the_kernel_counts_what_the_model_counts",),
    ),
)

PLAN = (
    Mutation(
        "search-up-to-64",
        f"{_KERNELS}/plan.py",
        "return batch <= 64 or (batch <= 256",
        "return batch <= 63 or (batch <= 256",
        "the largest batch that is searched gets a guess by its load instead",
        ("tests/calls/test_plan_edges.py::test_which_batches_are_searched",),
    ),
    Mutation(
        "search-by-tiles",
        f"{_KERNELS}/plan.py",
        "2 * tiles <= 3 * self.num_sms)",
        "2 * tiles < 3 * self.num_sms)",
        "whether a middle batch is searched changes where tiles fill the SMs one and a half times",
        ("tests/calls/test_plan_edges.py::test_which_batches_are_searched",),
    ),
    Mutation(
        "prefill-is-fa3s",
        f"{_KERNELS}/plan.py",
        "is_decode = 0 <= query_rows <= MAX_BALANCED_M_BLOCKS * block_m",
        "is_decode = query_rows <= MAX_BALANCED_M_BLOCKS * block_m",
        "query rows that have wrapped are a prefill, which the policy must leave to FA3's rule",
        ("tests/calls/test_plan_edges.py::test_more_than_eight_query_blocks_are_a_prefill",),
    ),
    Mutation(
        "forward-that-is-not-told",
        f"{_KERNELS}/plan.py",
        'own_bound = balanced and p.forward_is_told and "num_splits"',
        'own_bound = balanced and "num_splits"',
        "more splits than a forward that is called with 0 has room for: partial outputs out of bounds",
        ("tests/builds/test_bounds.py::test_a_forward_that_finds_its_bound_itself_has_room",),
    ),
    Mutation(
        "own-bound-of-one",
        f"{_KERNELS}/plan.py",
        "num_splits == 1 and not (p.num_splits or own_bound):",
        "num_splits == 1 and not p.num_splits:",
        "a forward of vLLM 0.10.1 to 0.16.0 would come to a bound of its own, and read another layout",
        ("tests/builds/test_bounds.py::test_a_bound_of_one_that_is_ours_is_told",),
    ),
    Mutation(
        "bound-that-depends-on-the-batch",
        f"{_KERNELS}/plan.py",
        "if not (problem.num_splits or problem.batch_invariant):  # a bound that depends on the batch size",
        "if False:",
        "a batch would get the bound of another one, which its forward does not come to",
        ("tests/builds/test_bounds.py::test_what_sizes_share_has_the_same_bound",),
    ),
    Mutation(
        "tma-needs-rows",
        f"{_KERNELS}/plan.py",
        "and query_rows > block_m",
        "and query_rows >= block_m",
        "one tile of query rows would be taken for a call that reads paged KV by TMA: another tile, packing and bound",
        (_WHEELS,),
    ),
    Mutation(
        "window-as-wide-as-the-cache",
        f"{_KERNELS}/plan.py",
        "if left >= p.max_seqlen_k - 1:",
        "if left > p.max_seqlen_k - 1:",
        "a window that hides nothing would be scheduled as one",
        (_WHEELS, _MODEL),
    ),
    Mutation(
        "causal-kernels-of-one-query",
        f"{_KERNELS}/plan.py",
        "causal = causal and 64 < p.headdim <= 128",
        "causal = causal and 64 <= p.headdim <= 128",
        "FA3 drops the causal mask of a single query up to head dim 64, so rows and order would differ",
        (_WHEELS, _MODEL),
    ),
    Mutation(
        "four-blocks-are-not-split",
        f"{_KERNELS}/heuristics.py",
        "if num_n_blocks <= 4:",
        "if num_n_blocks < 4:",
        "short caches would be told splits that FA3 does not make",
        (_WHEELS,),
    ),
    Mutation(
        "bytes-that-wrap",
        f"{_KERNELS}/heuristics.py",
        "kv_head_bytes = int32(max_seqlen_k * (p.headdim + p.value_headdim) * p.element_size)",
        "kv_head_bytes = max_seqlen_k * (p.headdim + p.value_headdim) * p.element_size",
        "FA3 counts the bytes of a KV head in int32: one of 2 GiB is negative and not split",
        ("tests/builds/test_rules.py::test_int32_overflow_of_a_kv_head_is_kept",),
    ),
    Mutation(
        "wrapped-rows-divide-towards-zero",
        f"{_KERNELS}/heuristics.py",
        "return int(int32(rows + block_m - 1) / block_m)",
        "return int32(rows + block_m - 1) // block_m",
        "C++ divides towards zero, Python down: query rows that have wrapped count a block more",
        ("tests/calls/test_plan_edges.py::test_query_rows_that_wrap_divide_towards_zero",),
    ),
    Mutation(
        "appended-keys-are-keys",
        f"{_KERNELS}/plan.py",
        "keys = max_seqlen_k + p.max_seqlen_k_new",
        "keys = max_seqlen_k",
        "a cache near 2^24 tokens that keys are appended to would be cut off",
        ("tests/calls/test_plan_edges.py::test_appended_keys_count_towards_the_longest_sequence",),
    ),
    Mutation(
        "served-before",
        f"{_KERNELS}/plan.py",
        "and max_seqlen_k != served:",
        "and served is None:",
        "a cache of another length, under a window say, would be launched with the numbers of the one before",
        ("tests/calls/test_schedules_again.py", "tests/calls/test_plan_edges.py"),
    ),
    Mutation(
        "served-at-another-batch",
        f"{_KERNELS}/plan.py",
        'max_seqlen_k == served and plan.rules.splits_count == "one_sequence"',
        "max_seqlen_k == served",
        "where FA3's bound on splits counts the batch, another batch would be launched with this one's",
        ("tests/calls/test_schedules_again.py", "tests/calls/test_plan_edges.py", "tests/builds/test_bounds.py"),
    ),
    Mutation(
        "sorted-unless-local",
        f"{_KERNELS}/plan.py",
        '"sort": rules.sorts_batches and not is_local,',
        '"sort": rules.sorts_batches,',
        "a row that FA3 has not under a window: all after it is read from another place",
        (_MODEL,),
    ),
    Mutation(
        "packing-by-fill",
        f"{_KERNELS}/heuristics.py",
        "if float(unpacked) < 0.9 * float(packed):",
        "if float(unpacked) <= 0.9 * float(packed):",
        "the forward would be told another packing than it comes to where tiles are filled to nine tenths",
        (_WHEELS,),
    ),
)

KERNEL = (
    Mutation(
        "kernel-order-of-rounding",
        f"{_KERNELS}/kernel.py",
        "total.to(tl.float32) * 1.1 * n.num_heads.to(tl.float32) * n.load_factor",
        "total.to(tl.float32) * n.num_heads.to(tl.float32) * 1.1 * n.load_factor",
        "FA3 rounds after each product; another order is another number of splits on the boundary",
        (_GOLDENS,),
    ),
    Mutation(
        "kernel-splits-within-the-bound",
        f"{_KERNELS}/kernel.py",
        "splits = tl.maximum(tl.minimum(wanted, num_splits), 1)",
        "splits = tl.maximum(wanted, 1)",
        "more splits than the forward has room for: partial outputs out of bounds",
        (_GOLDENS, "tests/kernels/test_agreement.py::test_no_queries_at_all"),
    ),
    Mutation(
        "kernel-no-queries-one-split",
        f"{_KERNELS}/kernel.py",
        "tl.where(blocks_per_sm > 0, cdiv(num_n_blocks, tl.maximum(blocks_per_sm, 1), SHORT), 1)",
        "cdiv(num_n_blocks, tl.maximum(blocks_per_sm, 1), SHORT)",
        "a batch without queries would be split, and FA3 splits it not",
        ("tests/kernels/test_agreement.py::test_no_queries_at_all",),
    ),
    Mutation(
        "kernel-ties-of-long-batches",
        f"{_KERNELS}/kernel.py",
        "(group_key[:, None] == key[None, :]) & (j[:, None] < i[None, :])",
        "(group_key[:, None] == key[None, :]) & (j[:, None] > i[None, :])",
        "sequences of one length would be in another order than FA3's",
        ("tests/kernels/test_agreement.py::test_keys_at_the_ends_of_their_range",),
    ),
    Mutation(
        "kernel-places-in-the-keys",
        f"{_KERNELS}/kernel.py",
        "group_key * 1024 - (j - group_start)",
        "group_key * 1024",
        "two sequences of one length would have the same place, and another place would not be written",
        (_GOLDENS,),
    ),
    Mutation(
        "kernel-nobody-from-outside",
        f"{_KERNELS}/kernel.py",
        "group_key = tl.where(in_group, group_key, -(1 << 30))",
        "group_key = group_key",
        "what is beyond the batch would come before sequences with fewer keys than queries",
        ("tests/kernels/test_agreement.py::test_keys_at_the_ends_of_their_range", _GOLDENS),
    ),
    Mutation(
        "kernel-padding",
        f"{_KERNELS}/kernel.py",
        "written = i < tl.minimum(group_start + SORT_GROUP, row_stride)",
        "written = mine",
        "a buffer that is used again would keep an earlier batch's numbers in the padding of its rows",
        (_GOLDENS,),
    ),
    Mutation(
        "kernel-semaphore",
        f"{_KERNELS}/kernel.py",
        "tl.store(out + LAYOUT.num_rows * row_stride, 0, mask=first == 0)",
        "pass",
        "FA3's tile scheduler would count on from whatever was there, and leave tiles out",
        (_GOLDENS,),
    ),
    Mutation(
        "kernel-heads-that-just-fit",
        f"{_KERNELS}/kernel.py",
        "blocks * 16 <= n.max_kvblocks_in_l2",
        "blocks * 16 < n.max_kvblocks_in_l2",
        "half as many heads at a time where they fill L2 exactly",
        (_GOLDENS,),
    ),
    Mutation(
        "kernel-start-of-a-group",
        f"{_KERNELS}/kernel.py",
        "out += tl.load(row",
        "start = tl.load(row",
        "all groups of layers would be written to the place of the first",
        ("tests/calls/test_plans.py::test_the_kernel_for_several_groups",),
    ),
    Mutation(
        "kernel-waits",
        f"{_KERNELS}/kernel.py",
        "    if EARLY:  # launched while the kernel before still runs\n"
        "        gdc_wait()\n"
        "    lengths = (cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k)\n"
        "    strides = (1, 1, 1, 1, 1) if CONTIGUOUS else (stride_0, stride_1, stride_2, stride_3, stride_4)\n"
        "    n = Numbers(",
        "    lengths = (cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k)\n"
        "    strides = (1, 1, 1, 1, 1) if CONTIGUOUS else (stride_0, stride_1, stride_2, stride_3, stride_4)\n"
        "    n = Numbers(",
        "the lengths would be read while the kernel before still writes them",
        ("tests/kernels/test_compile.py::test_kernels_compile_for_hopper_anywhere",),
    ),
)

LAUNCH = (
    Mutation(
        "launch-fused-multiply-add",
        f"{_KERNELS}/launch.py",
        "fusion = all(plan.costs is None for plan in plans)",
        "fusion = any(plan.costs is None for plan in plans)",
        "the kernel would round otherwise than the NumPy model, and choose other splits",
        ("tests/kernels/test_driver.py::test_fused_multiply_add_is_said_either_way",),
    ),
    Mutation(
        "launch-early-on-hopper",
        f"{_KERNELS}/launch.py",
        "early = problem.arch >= 90 and not INTERPRETED and",
        "early = not INTERPRETED and",
        "sm_8x has no programmatic dependent launch: the kernel would not compile",
        ("tests/kernels/test_lengths.py::test_only_hopper_starts_early",),
    ),
    Mutation(
        "launch-stride-of-the-padding",
        f"{_KERNELS}/launch.py",
        "and (pad is None or pad.stride(0) == 1)",
        "and True",
        "a column of a matrix would be read as if it were a row",
        ("tests/kernels/test_lengths.py::test_one_tensor_that_is_not_contiguous",),
    ),
    Mutation(
        "launch-dtype-of-the-padding",
        f"{_KERNELS}/launch.py",
        "pad is not None and pad.dtype,",
        "pad is not None,",
        "int64 lengths would be read by a kernel that was compiled for int32",
        ("tests/kernels/test_lengths.py::test_kernels_are_told_apart_by_every_dtype",),
    ),
    Mutation(
        "launch-programs-for-the-padding",
        f"{_KERNELS}/launch.py",
        "slices = -(-min(padded(batch_size), MAX_DYNAMIC_SPLIT_BATCH) // slice_)",
        "slices = -(-min(batch_size, MAX_DYNAMIC_SPLIT_BATCH) // slice_)",
        "a buffer that is used again would keep an earlier batch's numbers in the padding of its rows",
        ("tests/kernels/test_agreement.py::test_slices_of_any_size_give_the_same",),
    ),
    Mutation(
        "launch-multiplier-rounds-up",
        f"{_KERNELS}/launch.py",
        "multiplier = -(-(2**32) // (tile // 16))",
        "multiplier = 2**32 // (tile // 16)",
        "a block too few where a length fills its last one, with tiles like 176",
        (_GOLDENS,),
    ),
)

BUILDS = (
    Mutation(
        "group-of-992",
        f"{_KERNELS}/builds.py",
        "MAX_DYNAMIC_SPLIT_BATCH = 992 ",
        "MAX_DYNAMIC_SPLIT_BATCH = 993 ",
        "batches of 993 would be split and sorted as FA3 does up to 992 alone",
        (_MODEL,),
    ),
    Mutation(
        "a-version-between",
        f"{_KERNELS}/builds.py",
        'Release("sgl-kernel", "0.3.16.post2", "0.3.16.post2", SGL_LEGACY),',
        'Release("sgl-kernel", "0.3.16.post2", "0.3.16.post2", UPSTREAM),',
        "one wheel went back to the old layout, and would be given the new one",
        ("tests/builds/test_wheel_rules.py::test_tiles_are_those_of_every_wheel",),
    ),
    Mutation(
        "post-releases-count",
        f"{_KERNELS}/builds.py",
        "int(version[2] or 0))",
        "0)",
        "0.3.16.post1 would be taken for 0.3.16, which has another layout",
        ("tests/calls/test_api.py::test_any_version_of_a_known_package_has_its_rules",),
    ),
    Mutation(
        "l2-by-q-heads",
        f"{_KERNELS}/builds.py",
        "for step in (1, 2, 4, 8) if q_heads_per_kv_head <= step",
        "for step in (1, 2, 4, 8) if q_heads_per_kv_head < step",
        "vLLM's L2 budget of the head swizzle would be half of what it is",
        (_MODEL,),
    ),
    Mutation(
        "window-without-one-warpgroup",
        f"{_KERNELS}/builds.py",
        "    semaphore_first=False,\n    one_wg_when_local=False,",
        "    semaphore_first=False,\n    one_wg_when_local=True,",
        "vLLM from 0.17 on has no kernels with a single warpgroup under a window: another tile",
        (_WHEELS,),
    ),
    Mutation(
        "bound-that-cannot-be-told",
        f"{_KERNELS}/builds.py",
        'if problem.num_splits and "num_splits" in rules.forward_lacks:',
        "if False:",
        "metadata of a bound that its forward does not know: partial outputs out of bounds",
        ("tests/builds/test_bounds.py::test_a_bound_that_the_forward_cannot_be_told_is_refused",),
    ),
    Mutation(
        "invariant-needs-a-told-forward",
        f"{_KERNELS}/invariance.py",
        "not (problem.forward_is_told or problem.num_splits):",
        "not (problem.forward_is_told or True):",
        "splits that were promised not to depend on the batch would",
        ("tests/builds/test_bounds.py::test_splits_that_do_not_depend_on_the_batch_need_a_bound_that_does_not",),
    ),
    Mutation(
        "metadata-splits-992-alone",
        f"{_KERNELS}/builds.py",
        'return 2**31 - 1 if self.splits_count != "batch_without_dynamic_row"',
        "return 2**31 - 1 if True",
        "above 992 sequences an old forward splits all alike, as many times as our policy told it",
        ("tests/builds/test_bounds.py::test_a_balanced_plan_beyond_what_the_metadata_splits",),
    ),
)

INVARIANCE = (
    Mutation(
        "invariant-batches-of-any-size",
        f"{_KERNELS}/invariance.py",
        "if problem.batch_size <= most or plan.rules.splits_beyond_992 or plan.num_splits == 1:",
        "if True:",
        "a sequence has 11 splits among 992, and one among 993, although the same bits were promised",
        ("tests/kernels/test_invariance.py::test_what_cannot_be_is_refused",),
    ),
    Mutation(
        "invariant-windows-of-any-width",
        f"{_KERNELS}/invariance.py",
        "if plan.is_local == is_local_in_widest_table:",
        "if True:",
        "the longest neighbour would decide whether a window is one",
        ("tests/kernels/test_invariance.py::test_what_cannot_be_is_refused",),
    ),
    Mutation(
        "invariant-beside-prefills",
        f"{_KERNELS}/invariance.py",
        "    if problem.max_seqlen_q <= most:",
        "    if True:",
        "a decode row beside a prefill would run in another kernel",
        ("tests/kernels/test_invariance.py::test_what_cannot_be_is_refused",),
    ),
    Mutation(
        "invariant-bound-of-this-table",
        f"{_KERNELS}/invariance.py",
        "return unchecked_replace(in_widest_table(problem), batch_size=1, max_seqlen_q=1, total_q=None)",
        "return unchecked_replace(problem, batch_size=1, max_seqlen_q=1, total_q=None)",
        "the width of the page table would choose the kernel that combines splits",
        ("tests/kernels/test_invariance.py::test_a_sequence_is_scheduled_alike_in_any_company",),
    ),
    Mutation(
        "invariant-within-steps-alone",
        "integration/wrapper.py",
        "        if scope is None and batch_invariant:",
        "        if False:",
        "a layer outside of step() would have FA3's splits, which depend on the batch",
        ("tests/calls/test_wrapper_invariance.py::test_outside_of_a_step_too",),
    ),
    Mutation(
        "invariant-windows-of-vllm",
        "integration/wrapper.py",
        "                asked = asked.with_its_window()",
        "                pass",
        "every batch of vLLM's with no context longer than the window would lose the promise",
        ("tests/calls/test_wrapper_invariance.py::test_a_window_is_kept_where_a_number_says_the_width",),
    ),
)

LAYOUT = (
    Mutation(
        "alignment-of-rows",
        f"{_KERNELS}/layout.py",
        "return len(self.row_names) * padded(batch_size, self.row_alignment)",
        "return len(self.row_names) * padded(batch_size)",
        "the oldest builds do not align rows, and refuse a tensor of another size",
        (_MODEL,),
    ),
    Mutation(
        "rows-after-the-semaphore",
        f"{_KERNELS}/layout.py",
        "first = int(self.has_semaphore and self.semaphore_first)",
        "first = 0",
        "the tile scheduler's counter would be taken for the splits of the first sequence",
        ("tests/calls/test_api.py::test_layout", _MODEL),
    ),
)

PROBLEM = (
    Mutation(
        "no-total-of-queries",
        f"{_KERNELS}/problem.py",
        "return self.total_q or batch_size * self.max_seqlen_q",
        "return batch_size * self.max_seqlen_q if self.total_q is None else self.total_q",
        "FA3 takes a total of 0 for none; the bound on splits would count no queries at all",
        ("tests/calls/test_plan_edges.py::test_a_total_of_no_queries_is_none_given",),
    ),
    Mutation(
        "one-sm-is-left",
        f"{_KERNELS}/problem.py",
        "if self.sm_margin >= self.num_sms:",
        "if self.sm_margin > self.num_sms:",
        "a schedule for no SM at all divides by zero",
        ("tests/calls/test_errors.py::test_raises_and_writes_nothing",),
    ),
    Mutation(
        "true-is-no-number",
        f"{_KERNELS}/problem.py",
        "if isinstance(value, bool) or not hasattr",
        "if not hasattr",
        "an argument in a wrong place would be taken for the number 1",
        ("tests/calls/test_errors.py::test_raises_and_writes_nothing",),
    ),
)

DRIVER = (
    Mutation(
        "stream-of-a-launch",
        f"{_KERNELS}/driver.py",
        "self._config.stream = stream",
        "pass",
        "the kernel would run on the legacy stream, beside those that it must wait for",
        ("tests/kernels/test_driver.py::test_driver_launches_are_given_what_the_first_one_was",),
    ),
    Mutation(
        "stream-of-a-repeated-launch",
        f"{_KERNELS}/driver.py",
        "made.stream = stream",
        "pass",
        "likewise for calls that come again",
        ("tests/kernels/test_driver.py::test_driver_launches_are_given_what_the_first_one_was",),
    ),
    Mutation(
        "early-as-compiled",
        f"{_KERNELS}/driver.py",
        '"warp_size": _WARP, "launch_pdl": early}',
        '"warp_size": _WARP}',
        "a kernel that does not wait would start before the lengths are written",
        ("tests/kernels/test_driver.py::test_a_kernel_compiled_early_is_launched_early",),
    ),
    Mutation(
        "shared-memory-to-ask-for",
        f"{_KERNELS}/driver.py",
        'if not 0 <= fields["shared"] <= _MOST_SHARED_BYTES:',
        'if not 0 <= fields["shared"]:',
        "a kernel that needs more shared memory than is there without asking fails to launch",
        ("tests/kernels/test_driver.py::test_a_kernel_that_may_need_more_is_left_to_triton",),
    ),
    Mutation(
        "no-context-yet",
        f"{_KERNELS}/driver.py",
        "if error and error != _NO_CONTEXT:",
        "if error:",
        "a thread that has not used the GPU yet would raise instead of letting Triton make its context",
        ("tests/kernels/test_driver.py::test_driver_launches_are_given_what_the_first_one_was",),
    ),
)

TABLES = (
    Mutation(
        "table-of-this-gpu",
        f"{_KERNELS}/tables.py",
        'if table["gpu"] != gpu:',
        "if False:",
        "constants of another GPU would be used, should somebody have renamed a file",
        ("tests/kernels/test_tables.py::test_a_file_that_is_no_table",),
    ),
    Mutation(
        "file-that-was-swapped",
        f"{_KERNELS}/tables.py",
        "_check_regular(os.fstat(file.fileno()))",
        "pass",
        "whatever takes a file's place between the look and the opening would be read",
        ("tests/kernels/test_tables.py::test_a_pipe_does_not_hang",),
    ),
    Mutation(
        "failed-write",
        f"{_KERNELS}/tables.py",
        "beside.unlink(missing_ok=True)",
        "pass",
        "a disk that is full would be left with half a file",
        ("tests/kernels/test_tables.py::test_a_failed_write_leaves_nothing",),
    ),
)

REFERENCE = (
    Mutation(
        "heads-that-just-fit",
        f"{_KERNELS}/reference.py",
        "kv_heads[blocks * np.int32(heads) <= plan.max_kvblocks_in_l2] = heads",
        "kv_heads[blocks * np.int32(heads) < plan.max_kvblocks_in_l2] = heads",
        "half as many heads at a time where they fill L2 exactly",
        (_MODEL,),
    ),
    Mutation(
        "queries-in-use-win",
        f"{_KERNELS}/reference.py",
        "if lengths.seqused_q is not None:",
        "if lengths.seqused_q is not None and lengths.cu_seqlens_q is None:",
        "where both are given FA3 goes by the queries in use",
        (_MODEL,),
    ),
    Mutation(
        "order-of-rounding",
        f"{_KERNELS}/reference.py",
        "load = np.ceil(per_head * np.float32(plan.num_heads) * approximate_reciprocal(plan.num_sms))",
        "load = np.ceil(per_head * (np.float32(plan.num_heads) * approximate_reciprocal(plan.num_sms)))",
        "FA3 rounds after each product; another order is another number of splits on the boundary",
        (_MODEL,),
    ),
)

CALLS = (
    Mutation(
        "softcap-of-a-call",
        "integration/calls.py",
        "self.attention_chunk, self.softcap > 0, self.num_splits,",
        "self.attention_chunk, self.num_splits,",
        "layers with and without a softcap would share a problem, and with it a tile",
        ("tests/calls/test_calls.py::test_calls_that_differ_are_told_apart",),
    ),
    Mutation(
        "head-dim-of-v-of-a-call",
        "integration/calls.py",
        "self.k_cache.shape, self.v_cache.shape[-1],",
        "self.k_cache.shape,",
        "layers of another head dim of v would get the metadata of this one",
        ("tests/calls/test_calls.py::test_calls_that_differ_are_told_apart",),
    ),
    Mutation(
        "queries-that-count",
        "integration/calls.py",
        "total_q=self.q.shape[0] if ragged and counts_queries else None,",
        "total_q=None,",
        "with fewer ragged queries than there may be, the forward comes to fewer splits than the metadata has",
        ("tests/builds/test_bounds.py::test_the_wrapped_forward_asks_what_the_wheels_forward_asks",),
    ),
    Mutation(
        "new-keys-without-keys",
        "integration/calls.py",
        "cu_seqlens_k_new=None if self.k_new is None else self.cu_seqlens_k_new,",
        "cu_seqlens_k_new=self.cu_seqlens_k_new,",
        "engines pass the tensor for purposes of their own, and FA3 ignores it then",
        ("tests/calls/test_wrapper.py::test_ragged_new_keys_count_only_with_new_keys",),
    ),
    Mutation(
        "negative-bound",
        "integration/calls.py",
        "num_splits=max(self.num_splits, 0),",
        "num_splits=self.num_splits,",
        "FA3 takes any number below 1 for its heuristic; the call would be refused instead",
        ("tests/calls/test_calls.py::test_a_bound_below_one_is_the_heuristics",),
    ),
    Mutation(
        "what-is-not-known",
        "integration/calls.py",
        "if others := call.keys() - known:",
        "if others := set():",
        "an argument of a future forward would be ignored, whatever it does to the schedule",
        ("tests/calls/test_wrapper_safety.py::test_what_is_not_known_is_passed_through",),
    ),
)

ARGUMENTS = (
    Mutation(
        "running-sums-have-one-more",
        "integration/arguments.py",
        '_check(name, tensor, batch_size + name.startswith("cu_"), self.cache_seqlens)',
        "_check(name, tensor, batch_size, self.cache_seqlens)",
        "a running sum without its end would be read past it",
        ("tests/calls/test_errors.py::test_raises_and_writes_nothing",),
    ),
    Mutation(
        "overlap-by-the-last-element",
        "integration/arguments.py",
        "tensor.stride(0) + 1) * tensor.itemsize",
        "tensor.stride(0)) * tensor.itemsize",
        "lengths whose last element is the first of the output would be overwritten while they are read",
        ("tests/kernels/test_lengths.py::test_overlap_begins_with_one_element",),
    ),
    Mutation(
        "room-in-out",
        "integration/arguments.py",
        "or not out.is_contiguous() or out.shape[0] < size:",
        "or not out.is_contiguous():",
        "metadata would be written past the end of a buffer",
        ("tests/calls/test_errors.py::test_raises_and_writes_nothing",),
    ),
)

WRAPPER = (
    Mutation(
        "inputs-kept-alive",
        "integration/wrapper.py",
        ", metadata, inputs)",
        ", metadata, ())",
        "other lengths may come to lie at the address of freed ones, and would be taken for them",
        ("tests/calls/test_wrapper_identity.py::test_lengths_live_as_long_as_their_metadata",),
    ),
    Mutation(
        "dtype-of-lengths",
        "integration/call_keys.py",
        "tensor.data_ptr(), tensor.dtype, tensor.shape,",
        "tensor.data_ptr(), tensor.shape,",
        "the same memory read as numbers of another size holds other lengths",
        ("tests/calls/test_wrapper_identity.py::test_the_same_memory_read_otherwise_is_other_lengths",),
    ),
    Mutation(
        "stride-of-lengths",
        "integration/call_keys.py",
        "tensor.shape, tensor.stride(), written",
        "tensor.shape, written",
        "a column and a row that start at the same place would share metadata",
        ("tests/calls/test_wrapper_identity.py::test_the_same_memory_read_otherwise_is_other_lengths",),
    ),
    Mutation(
        "version-of-lengths",
        "integration/call_keys.py",
        "tensor.shape, tensor.stride(), written",
        "tensor.shape, tensor.stride()",
        "lengths that were written since would be taken for those before",
        ("tests/calls/test_wrapper.py::test_lengths_written_by_torch_are_noticed",),
    ),
    Mutation(
        "stream-of-the-maker",
        "integration/wrapper.py",
        "return _Wanted((rules, problem, tuple(map(identity, inputs)), stream),",
        "return _Wanted((rules, problem, tuple(map(identity, inputs))),",
        "a layer on another stream would read metadata that may not have been written yet",
        ("tests/calls/test_wrapper_identity.py::test_each_stream_makes_its_own",),
    ),
    Mutation(
        "stream-of-the-call",
        "integration/wrapper.py",
        "key = keys.of(call, (stream, torch.is_inference_mode_enabled()))",
        "key = keys.of(call, torch.is_inference_mode_enabled())",
        "likewise, of a call that came before on another stream",
        ("tests/calls/test_wrapper_identity.py::test_each_stream_makes_its_own",),
    ),
    Mutation(
        "rules-of-the-maker",
        "integration/wrapper.py",
        "return _Wanted((rules, problem, tuple(map(identity, inputs)), stream),",
        "return _Wanted((problem, tuple(map(identity, inputs)), stream),",
        "the forward of one build would be given the tensor of another",
        ("tests/calls/test_wrapper_safety.py::test_builds_in_one_scope_get_each_its_own",),
    ),
    Mutation(
        "wrapper-of-the-call",
        "integration/call_keys.py",
        "                reader, where, sized[0].dtype,",
        "                where, sized[0].dtype,",
        "the forward of one build would be answered what another has asked",
        ("tests/calls/test_call_keys.py::test_a_wrapper_does_not_answer_for_another",),
    ),
    Mutation(
        "dtype-of-the-call",
        "integration/call_keys.py",
        "                reader, where, sized[0].dtype,",
        "                reader, where,",
        "a layer with fp8 would be given the schedule of one with bf16",
        ("tests/calls/test_call_keys.py::test_every_difference_tells",),
    ),
    Mutation(
        "types-of-the-call",
        "integration/call_keys.py",
        "                types, values,",
        "                values,",
        "what is refused would pass after an equal number of the right type",
        ("tests/calls/test_call_keys.py::test_every_difference_tells",),
    ),
    Mutation(
        "objects-in-a-key",
        "integration/call_keys.py",
        "if not _PLAIN.issuperset(types):",
        "if False:",
        "a step would keep what its layers were given alive",
        ("tests/calls/test_call_keys.py::test_no_object_of_the_callers_is_kept_by_a_key",),
    ),
    Mutation(
        "inference-tensors",
        "integration/wrapper.py",
        "return not (torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in lengths))",
        "return not torch.is_inference_mode_enabled()",
        "lengths from inference mode, written there since, would be taken for those before",
        ("tests/calls/test_wrapper_safety.py::test_inference_mode_within_a_step",),
    ),
    Mutation(
        "layers-that-begin-again",
        "integration/rounds.py",
        "        elif self._others:",
        "        elif self._first < 0:",
        "where something else than torch writes, a second step in one scope would get the metadata of the first",
        ("tests/calls/test_wrapper.py::test_layers_that_begin_again_are_a_new_step",),
    ),
    Mutation(
        "layers-that-share-a-cache",
        "integration/rounds.py",
        "        elif self._others:",
        "        else:",
        "a layer that reads the KV cache of the first one would make metadata of its own",
        ("tests/calls/test_kv_sharing.py::test_a_step_makes_one_of_each_kind",),
    ),
    Mutation(
        "written-in-a-graph",
        "integration/wrapper.py",
        "if nodes is None or may_write(nodes - made.nodes - scope.readers, made.inputs):",
        "if nodes is None:",
        "in a graph of several steps, the later ones would get the metadata of the first",
        ("tests/calls/test_kv_sharing.py::test_a_capture_makes_one_of_each_kind",),
    ),
    Mutation(
        "capture-after-capture",
        "integration/scopes.py",
        "if _captures.scope is None or _captures.scope.capture != capture.number:",
        "if _captures.scope is None:",
        "a graph would read metadata that only the replay of another graph makes",
        ("tests/calls/test_wrapper_identity.py::test_each_capture_makes_its_own",),
    ),
    Mutation(
        "metadata-that-is-brought",
        "integration/wrapper.py",
        'if call.get("scheduler_metadata") is not None or',
        "if",
        "an engine's own metadata would be thrown away",
        ("tests/calls/test_wrapper.py::test_metadata_that_is_brought_is_kept",),
    ),
    Mutation(
        "run-again-with-the-same-batch",
        "integration/engines/sglang_step.py",
        "now = self.latest = EagerStep(now.metadata, now.shares)",
        "pass",
        "a model that is run twice on one batch of SGLang, whose lengths have grown, would get the first metadata",
        ("tests/engines/test_sglang_adapter.py::test_a_model_that_is_run_again_is_a_new_step",),
    ),
    Mutation(
        "layers-only-read",
        "integration/wrapper.py",
        "scope.readers |= after - before",
        "pass",
        "a captured layer would count as one that may have written the lengths: metadata in every layer",
        ("tests/calls/test_wrapper_safety.py::test_kinds_of_layers_share_in_a_capture_in_inference_mode",),
    ),
)

SCOPES = (
    Mutation(
        "a-step-that-has-ended",
        "integration/scopes.py",
        "scope is None or scope.has_ended or",
        "scope is None or",
        "a task that outlives its step would be handed the metadata of old lengths",
        ("tests/calls/test_wrapper_safety.py",),
    ),
    Mutation(
        "a-step-of-another-thread",
        "integration/scopes.py",
        "scope.thread not in (None, threading.get_ident())",
        "scope.thread is Ellipsis",
        "two threads would write one scope, and share what the lengths of one were",
        ("tests/calls/test_wrapper_safety.py",),
    ),
    Mutation(
        "a-model-that-is-run-again",
        "integration/engines/sglang_step.py",
        "if now.layers and layer_of_model is now.first:",
        "if now.layers > 1 and layer_of_model is now.first:",
        "a drafter of one layer that is run again would be handed the metadata of its first lengths",
        ("tests/engines/test_sglang_adapter.py::test_a_model_that_is_run_again_is_a_new_step",),
    ),
    Mutation(
        "combining-costs",
        f"{_KERNELS}/balance.py",
        "costs.combine + rows * _ROW_US / costs.block_us",
        "costs.per_split * 13",
        "on a card whose splits were measured to be cheap, small windows would be split at a loss",
        ("tests/kernels/test_law.py::test_combining_costs_whatever_a_split_costs",),
    ),
    Mutation(
        "spare-rows",
        f"{_KERNELS}/balance.py",
        "return rows % (16 if problem.value_headdim <= 64 else 8) != 0",
        "return False",
        "with four heads a bound of 128 would cost 4 us a layer for nothing",
        ("tests/calls/test_plan_edges.py::test_rows_that_the_combine_kernel_has_to_spare",),
    ),
    Mutation(
        "beside-big-tiles",
        f"{_KERNELS}/balanced_kernel.py",
        "return tl.where(filling > (1.0 - left) * low, time + overhang, time)",
        "return tl.where(filling > (1.0 - left) * height, time + overhang, time)",
        "the kernel would choose other splits than the NumPy model where small tiles do not fit",
        ("tests/kernels/test_balanced.py::test_small_tiles_that_do_not_fit_beside_big_ones",),
    ),
)

INSTALL = (
    Mutation(
        "replaced-since",
        "integration/install.py",
        "if change.namespace.get(change.name, _MISSING) is not change.after:",
        "if False:",
        "what somebody else has put in would be taken out",
        ("tests/calls/test_wrapper.py::test_uninstall_leaves_what_somebody_else_replaced",),
    ),
    Mutation(
        "empty-is-off",
        "integration/settings.py",
        'return os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0")',
        'return os.environ.get(DISABLE_VARIABLE, "0") not in ("0",)',
        "an empty variable, as a shell script sets it, would turn everything off",
        ("tests/calls/test_install.py::test_anything_but_0_turns_it_off",),
    ),
    Mutation(
        "installed-for-another-build",
        "integration/install.py",
        "if installed_for is not None and rules_for(installed_for) is not rules_for(name):",
        "if False:",
        "one build would go on with the function of another, whose tensor is laid out otherwise",
        ("tests/calls/test_wrapper.py::test_install_for_another_build_is_refused",),
    ),
    Mutation(
        "modules-that-imported-it",
        "integration/install.py",
        "for module in loaded if vars(module).get(name) is value]",
        "for module in loaded if False]",
        "what is said would not name the engine whose forward was wrapped, and which to look at",
        ("tests/calls/test_wrapper.py::test_install_wraps_the_forward_where_it_was_imported",),
    ),
    Mutation(
        "objects-that-keep-it",
        "integration/install.py",
        "if type(namespace) is dict and namespace.get(name) is value and id(namespace) not in known:",
        "if False:",
        "an engine's object that has kept the forward would go on with the unwrapped one",
        ("tests/calls/test_install_kept.py::test_objects_and_dicts_that_keep_it",),
    ),
)

ENGINES = (
    Mutation(
        "sglang-balanced-eager",
        "integration/engines/sglang.py",
        'self._asked = asked if self.policy.policy == "fa3" else None',
        "self._asked = asked",
        "eager batches would have FA3's splits whatever policy was asked for",
        ("tests/engines/test_sglang_adapter.py::test_balanced_eager_batches_get_the_bound_of_their_metadata",),
    ),
    Mutation(
        "sglang-page-table",
        "integration/engines/sglang.py",
        '"max_seqlen_k": metadata.page_table.shape[1] * self.backend.page_size,',
        '"max_seqlen_k": asked["max_seqlen_k"],',
        "FA3 goes by the width of the page table, SGLang by the longest sequence: another bound on splits",
        ("tests/engines/test_sglang_adapter.py::test_eager_asks_for_the_page_tables_width",),
    ),
    Mutation(
        "sglang-on-sm8x",
        "integration/engines/sglang.py",
        "if device_facts(metadata.cache_seqlens_int32.device, None, None)[0] < 90:",
        "if False:",
        "on sm_8x the forward, called with 0, refuses a tensor of that size",
        ("tests/engines/test_sglang_adapter.py::test_sm8x_leaves_eager_batches_to_fa3",),
    ),
    Mutation(
        "sglang-layer-of-another-shape",
        "integration/engines/sglang.py",
        "if not fits or (total_q is not None and total_q != q.shape[:-2].numel()):",
        "if total_q is not None and total_q != q.shape[:-2].numel():",
        "a layer with another head dim of v would read a schedule that is not its own",
        ("tests/engines/test_sglang_adapter.py::test_layers_of_another_shape_get_no_eager_metadata",),
    ),
    Mutation(
        "sglang-padded-queries",
        "integration/engines/sglang.py",
        "if not fits or (total_q is not None and total_q != q.shape[:-2].numel()):",
        "if not fits:",
        "the forward counts queries that were added since, and has room for other splits",
        (
            "tests/engines/test_sglang_adapter.py::test_a_batch_padded_with_queries_makes_its_own_where_they_are_counted",
        ),
    ),
    Mutation(
        "sglang-graph-from-before",
        "integration/engines/sglang.py",
        "if metadata is None or metadata.scheduler_metadata is None:",
        "if True:",
        "a graph that was captured before we came would read a buffer that nobody refreshes",
        ("tests/engines/test_sglang_adapter.py::test_a_graph_captured_before_keeps_sglangs_metadata",),
    ),
    Mutation(
        "vllm-tells-its-own",
        "integration/engines/vllm.py",
        "policy=policy, forward_is_told=False,",
        "policy=policy, forward_is_told=True,",
        "vLLM tells the forward its own number of splits: ours would be out of bounds",
        ("tests/builds/test_bounds.py::test_vllms_builder_stays_within_its_forwards_bound",),
    ),
    Mutation(
        "vllm-fa4",
        "integration/engines/vllm.py",
        "if out is None and (headdim > MAX_HEADDIM or isinstance(causal, torch.Tensor)):",
        "if out is None and isinstance(causal, torch.Tensor):",
        "vLLM asks for models that FA4 attends to, too, and would fail to start",
        ("tests/engines/test_vllm_adapter.py::test_other_flash_attention_versions_are_left_alone",),
    ),
    Mutation(
        "vllm-stale-elements",
        "integration/engines/vllm_in_place.py",
        "if size < end:",
        "if False:",
        "what a longer batch has left behind would be read by a captured graph",
        ("tests/engines/test_vllm_adapter.py::test_in_place_leaves_the_buffer_as_vllm_does",),
    ),
)

_AGAIN = "tests/calls/test_schedules_again.py"
_PLANS = "tests/calls/test_plans.py"

SCHEDULES = (
    Mutation(
        "splits-that-cannot-be-told",
        "integration/schedules.py",
        "if reason := untellable_reason(its_rules, problem):",
        "if (reason := untellable_reason(its_rules, problem)) and not reason:",
        "metadata with more splits than the forward has room for is read out of bounds",
        ("tests/builds/test_bounds.py",),
    ),
    Mutation(
        "sizes-of-the-latest-batch",
        "integration/schedules.py",
        "if batch_size != self._sized[0]:",
        "if self._sized[0] < 0:",
        "a batch would get a tensor of another one's size",
        (_AGAIN, _PLANS),
    ),
    Mutation(
        "launch-of-the-latest-batch",
        "integration/schedules.py",
        "if family.latest is None or family.latest[0] != self.batch_size:",
        "if family.latest is None:",
        "a batch would be launched as another one, whose lengths are not there",
        (_AGAIN,),
    ),
    Mutation(
        "families-of-one-batch-size",
        "integration/schedules.py",
        "if not sizes_alone_differ(plan, problem, batch_size, longest, self._served):",
        "if not sizes_alone_differ(plan, problem, problem.batch_size, longest, self._served):",
        "batches with other splits, or of more than 992 sequences, would be launched with this one's numbers",
        ("tests/builds/test_bounds.py", _AGAIN, _PLANS),
    ),
    Mutation(
        "recorded-launches",
        "integration/schedules.py",
        "if trace.current is not None:  # which sees launches that are made the long way\n            return None",
        "pass",
        "a trace would miss the steps of an engine, whose buffers stay where they are",
        (_AGAIN,),
    ),
    Mutation(
        "recorded-updates",
        "integration/plans.py",
        "is not None and trace.current is None and known[0]():",
        "is not None and known[0]():",
        "a trace would miss the steps of a plan whose lengths stay where they are",
        (_AGAIN,),
    ),
    Mutation(
        "a-launch-that-could-not",
        "integration/schedules.py",
        "return known[1] if known is not None and known[0]() else None",
        "return known[1] if known is not None and (known[0](), 1) else None",
        "with another device current nothing is launched, and old metadata would be handed out",
        (_AGAIN,),
    ),
    Mutation(
        "what-is-known-is-bounded",
        "integration/schedules.py",
        "if len(known) >= most:",
        "if len(known) < 0:",
        "a server that runs for weeks would keep every size that ever came",
        (_AGAIN,),
    ),
    *(
        Mutation(
            f"{name}-of-a-plans-lengths",
            "integration/plans.py",
            f"cache_seqlens.{part}{comma}",
            after,
            f"a plan would read lengths at the same address with another {name} as those before",
            (_AGAIN,),
        )
        for name, part, comma, after in (
            ("place", "data_ptr()", ", cache_seqlens.shape", "0, cache_seqlens.shape"),
            ("shape", "shape", ", ", ""),
            ("stride", "stride()", ", ", ""),
        )
    ),
    *(
        Mutation(
            f"{name}-of-a-tensor",
            "integration/schedules.py",
            "return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype",
            after,
            f"lengths at the same address with another {name} would be read as those before",
            (_AGAIN,),
        )
        for name, after in (
            ("place", "return 0, tensor.shape, tensor.stride(), tensor.dtype"),
            ("shape", "return tensor.data_ptr(), tensor.stride(), tensor.dtype"),
            ("stride", "return tensor.data_ptr(), tensor.shape, tensor.dtype"),
            ("dtype", "return tensor.data_ptr(), tensor.shape, tensor.stride()"),
        )
    ),
    Mutation(
        "types-of-a-kind",
        "integration/api.py",
        "known is not None and known[0] == types:",
        "known is not None:",
        "True for 1 is refused by a fresh process, and would be accepted after a good call",
        (_AGAIN,),
    ),
    Mutation(
        "types-of-sizes",
        "integration/api.py",
        "key = backend, batch_size, max_seqlen_k, type(batch_size), type(max_seqlen_k), place(out), places",
        "key = backend, batch_size, max_seqlen_k, place(out), places",
        "1.0 sequences are refused by a fresh process, and would be accepted after a good call",
        (_AGAIN,),
    ),
    Mutation(
        "backend-of-a-call",
        "integration/api.py",
        "key = backend, batch_size, max_seqlen_k, type(",
        "key = batch_size, max_seqlen_k, type(",
        "the NumPy model that somebody asks for would be the kernel after all",
        (_AGAIN,),
    ),
    Mutation(
        "all-tensors-of-a-call",
        "integration/api.py",
        "if cu_seqlens_q is cu_seqlens_k is cu_seqlens_k_new is seqused_q is leftpad_k is None:",
        "if cu_seqlens_q is cu_seqlens_k is None:",
        "other left padding at another place would be taken for that before",
        (_AGAIN,),
    ),
)

PLANS = (
    Mutation(
        "one-bound-for-every-batch",
        "integration/plans.py",
        "            self._bound = served.num_splits\n",
        "            pass\n",
        "batches of a plan would have other bounds on splits than the forward is told when it is captured",
        ("tests/builds/test_bounds.py", _PLANS, "tests/calls/test_plan_edges.py"),
    ),
    Mutation(
        "buffers-of-a-graph",
        "integration/plans.py",
        "_captured.extend(tensor for tensor in (self._buffer, self._tables) if tensor is not None)",
        "_captured.extend(tensor for tensor in (self._tables,) if tensor is not None)",
        "a captured graph would write to freed memory once its plan is gone",
        ("tests/calls/test_captured_buffers.py",),
    ),
    Mutation(
        "tables-of-a-graph",
        "integration/plans.py",
        "_captured.extend(tensor for tensor in (self._buffer, self._tables) if tensor is not None)",
        "_captured.extend(tensor for tensor in (self._buffer,) if tensor is not None)",
        "a captured graph of several groups would read freed memory once their plans are gone",
        ("tests/calls/test_captured_buffers.py",),
    ),
    Mutation(
        "each-group-its-own-part",
        "integration/plans.py",
        "starts.append(starts[-1] + padded(plan.capacity))",
        "starts.append(starts[-1] + 0)",
        "groups of layers would write over each other's metadata",
        (_PLANS,),
    ),
    Mutation(
        "ragged-new-keys-of-a-forward",
        "integration/plans.py",
        'if ragged != ("cu_seqlens_k_new" in self.varying):',
        'if ragged and not ("cu_seqlens_k_new" in self.varying):',
        "a forward without the ragged new keys that its metadata counts would be accepted",
        (_PLANS,),
    ),
    Mutation(
        "device-of-a-forward",
        "integration/plans.py",
        "if metadata.device != call.device:",
        "if metadata.device is None:",
        "metadata on another GPU would be handed to the forward",
        (_PLANS,),
    ),
    Mutation(
        "cache-of-a-forward",
        "integration/plans.py",
        "if asked.max_seqlen_k > made.max_seqlen_k:",
        "if asked.max_seqlen_k > 2 * made.max_seqlen_k:",
        "a forward over a longer cache, with a bound on splits of its own, would be accepted",
        (_PLANS,),
    ),
    Mutation(
        "fields-of-a-forward",
        "integration/plans.py",
        '            if wanted != got:\n                raise ValueError(f"{field.name} must',
        '            if wanted is None:\n                raise ValueError(f"{field.name} must',
        "a forward with other heads or another head dim would be accepted",
        (_PLANS,),
    ),
    Mutation(
        "schedule-of-a-forward",
        "integration/plans.py",
        "            if wanted != got:\n                raise ValueError(\n",
        "            if wanted is None:\n                raise ValueError(\n",
        "a forward with another mask would be accepted",
        (_PLANS,),
    ),
    Mutation(
        "lengths-of-a-forward",
        "integration/plans.py",
        "        lengths.check(batch_size)\n",
        "",
        "a forward over another batch would be accepted",
        (_PLANS,),
    ),
    Mutation(
        "plans-of-two-groups",
        "integration/plans.py",
        "(self.plans.count(plan) > 1 or len(plan._group.plans) > 1)",
        "self.plans.count(plan) > 1",
        "a plan in two groups would serve the metadata of the other one",
        (_PLANS,),
    ),
    Mutation(
        "lengths-in-the-buffer",
        "integration/plans.py",
        "self._buffer.data_ptr() + self._buffer.nbytes\n",
        "self._buffer.data_ptr() + 4\n",
        "lengths would be overwritten by the metadata that is made of them",
        (_PLANS,),
    ),
)

MUTATIONS: tuple[Mutation, ...] = (
    *BLOCKS, *KERNEL, *LAUNCH, *PLAN, *BUILDS, *INVARIANCE, *LAYOUT, *PROBLEM, *DRIVER, *TABLES, *REFERENCE,
    *SCHEDULES, *PLANS, *CALLS, *ARGUMENTS, *WRAPPER, *SCOPES, *INSTALL, *ENGINES,
)  # fmt: skip
