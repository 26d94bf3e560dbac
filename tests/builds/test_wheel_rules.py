"""Our rules against what published wheels were found to have (tests/data/wheel_rules/), and the tool that found it."""

from __future__ import annotations

import pathlib
import random
import re
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fa3_metadata.triton_kernels import tiles
from fa3_metadata.triton_kernels.builds import RELEASES, FA3Rules, Release, rules_for, version_key
from fa3_metadata.triton_kernels.plan import LaunchPlan, make_plan
from fa3_metadata.triton_kernels.problem import Problem

from bench import wheel_rules
from bench.elf import Elf, demangled
from bench.host_answers import NUM_SPLITS_READS, PACK_GQA_READS, Answers, HostRules, Packing
from bench.host_functions import GET_NUM_SPLITS, GET_PACK_GQA, call, filled, params_dtype
from bench.wheel_facts import CELLS, FORWARD, OP, Cell, Facts, parameters, signature, tile_in_name
from bench.wheel_files import opened
from bench.wheel_problems import as_build_is_asked, draw_problems, load_problems, save_problems
from bench.wheel_recordings import EVIDENCE, Found, Recordings

RECORDED = Recordings.load()
UPSTREAM, SGLANG, VLLM = map(rules_for, ("sgl-kernel-0.3.21", "sglang-kernel-0.4.4", "vllm-0.33.0"))
SGLANG_0_4_5 = rules_for("sglang-kernel-0.4.5")
NOT_PUBLISHED = ("flash-attn-3",)  # built from source; fa3-fwd is the same code
RULES = [pytest.param(rules, id=rules.name) for rules in dict.fromkeys(release.rules for release in RELEASES)]


# --- What was recorded of published wheels.


def recorded_of(rules: FA3Rules) -> Iterator[tuple[str, Found]]:
    """(build, recording) of every recorded wheel that has these rules."""
    for release in RELEASES:
        if release.rules is rules:
            for version in in_range(release, RECORDED.versions(release.package)):
                yield f"{release.package}-{version}", RECORDED.wheels[release.package][version]


def in_range(release: Release, versions: list[str]) -> list[str]:
    oldest, newest = version_key(release.oldest), version_key(release.newest)
    return [version for version in versions if oldest <= version_key(version) <= newest]


def distinct(rules: FA3Rules, key: str) -> dict[str, str]:
    """The hash of everything different that wheels with these rules have -> the first of them."""
    found: dict[str, str] = {}
    for build, recording in recorded_of(rules):
        if (value := recording[key]) is not None:
            found.setdefault(value, build)
    return found


@pytest.mark.parametrize("rules", RULES)
def test_tiles_are_those_of_every_wheel(rules: FA3Rules) -> None:
    recorded = distinct(rules, "tiles")
    assert recorded
    for key, build in recorded.items():
        assert not (check := wheel_rules.check_tiles(RECORDED.tiles[key], rules)).difference, f"{build}:{check}"


@pytest.mark.parametrize("rules", RULES)
def test_splits_and_packing_are_what_every_wheel_answers(rules: FA3Rules) -> None:
    asked, plans = wheel_rules.plans_for(RECORDED.problems, rules)
    assert distinct(rules, "num_splits")
    for name in ("num_splits", "pack_gqa"):
        for key, build in distinct(rules, name).items():
            check = wheel_rules.check_answers(name, RECORDED.answers[key], asked, plans)
            assert not check.difference, f"{build}:{check}"
            assert check.note == "24,000 problems"


TEXTS = (("op", OP), ("forward", FORWARD))


@pytest.mark.parametrize("rules", RULES)
def test_arguments_are_those_of_every_wheel(rules: FA3Rules) -> None:
    for build, found in recorded_of(rules):
        signatures = {op: RECORDED.texts.get(found[f"{what}_signature"] or "") for what, op in TEXTS}
        schemas = {op: RECORDED.texts.get(found[f"{what}_schema"] or "") for what, op in TEXTS}
        check = wheel_rules.check_arguments(signatures, schemas, rules)
        assert not check.difference, f"{build}:{check}"


def not_recorded(releases: tuple[Release, ...], recordings: Recordings) -> list[str]:
    """What the releases name that has no recording: their first and last versions, and all published between."""
    missing = []
    for release in releases:
        if release.package not in NOT_PUBLISHED:
            published = in_range(release, recordings.published.get(release.package, []))
            needed = dict.fromkeys([release.oldest, *published, release.newest])
            recorded = recordings.versions(release.package)
            missing += [f"{release.package}-{version}" for version in needed if version not in recorded]
    return missing


def test_every_version_of_every_release_is_recorded() -> None:
    missing = not_recorded(RELEASES, RECORDED)
    assert not missing, f"python -m bench wheel-rules --record {' '.join(missing)}"


@pytest.mark.parametrize(("oldest", "newest"), [("0.3.99", "0.4.4"), ("0.4.0", "0.4.99"), ("0.0.1", "0.4.4")])
def test_a_range_beyond_what_is_recorded_is_found(oldest: str, newest: str) -> None:
    missing = not_recorded((Release("sglang-kernel", oldest, newest, SGLANG),), RECORDED)
    assert missing == [f"sglang-kernel-{end}" for end in (oldest, newest) if end not in ("0.4.0", "0.4.4")]


def test_a_published_version_without_a_recording_is_found() -> None:
    wheels = {"sglang-kernel": {v: f for v, f in RECORDED.wheels["sglang-kernel"].items() if v != "0.4.2.post1"}}
    assert not_recorded(RELEASES, replace(RECORDED, wheels=RECORDED.wheels | wheels)) == ["sglang-kernel-0.4.2.post1"]
    nothing = not_recorded(RELEASES[:1], Recordings())
    assert nothing == [f"{RELEASES[0].package}-{end}" for end in (RELEASES[0].oldest, RELEASES[0].newest)]


def test_recordings_are_whole() -> None:
    for versions in RECORDED.wheels.values():
        for found in versions.values():
            assert list(found) == list(EVIDENCE)
            assert found["tiles"] in RECORDED.tiles
            assert {found["num_splits"], found["pack_gqa"]} <= {*RECORDED.answers, None}
            texts = {value for key, value in found.items() if key.endswith(("signature", "schema"))}
            assert texts <= {*RECORDED.texts, None}
    sizes = [path.stat().st_size for path in RECORDED.folder.iterdir()]
    assert sum(sizes) < 1.5e6


def test_recorded_wheels_have_every_kernel_but_for_known_exceptions() -> None:
    """A reader of names that finds too little would compare too little."""
    partial = {
        (package, len(RECORDED.tiles[found["tiles"] or ""]))
        for package, versions in RECORDED.wheels.items()
        for found in versions.values()
    } - {(package, len(CELLS)) for package in RECORDED.wheels}
    # Built without windows, paged KV and float16; and vLLM 0.10.1 to 0.11.0 without unequal head dims.
    assert partial == {("fa3-fwd", 56), ("vllm", 216)}


WRONG: dict[str, tuple[FA3Rules, dict[str, Any]]] = {
    "whole batch": (UPSTREAM, {"splits_count": "batch"}),
    "one sequence": (SGLANG_0_4_5, {"splits_count": "one_sequence"}),
    "packs narrow windows": (UPSTREAM, {"packs_narrow_windows": True}),
    "packs equal head dims": (UPSTREAM, {"packs_equal_headdims": True}),
    "packs with splits": (UPSTREAM, {"packs_with_splits": "also"}),
    "windows by TMA": (SGLANG, {"paged_tma_when_local": True}),
    "one warpgroup": (SGLANG, {"one_wg_headdims": (128,)}),
    "one warpgroup for windows": (SGLANG, {"one_wg_when_local": False}),
    "tiles": (UPSTREAM, {"sm90_tiles": {2: tiles.LEGACY_16, 1: tiles.UPSTREAM_8}}),
    "tiles of e4m3": (VLLM, {"sm90_tiles": {2: tiles.VLLM_16, 1: tiles.SGLANG_8}}),
    "tiles on sm_8x": (UPSTREAM, {"sm8x_tiles": {2: tiles.SM8X_16[3:], 1: tiles.SM8X_8}}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_recorded_answers_tell_wrong_rules(wrong: str) -> None:
    right, changes = WRONG[wrong]
    rules = replace(right, **changes)
    asked = [as_build_is_asked(problem, rules) for problem in RECORDED.problems[::3]]
    right_plans, wrong_plans = ([make_plan(problem, one) for problem in asked] for one in (right, rules))
    differing = [
        wheel_rules.check_answers(
            name, np.array([getattr(plan, name) for plan in right_plans]), asked, wrong_plans
        ).difference
        for name in ("num_splits", "pack_gqa")
    ]
    assert any(differing)


# --- What is reported where rules are wrong.


def test_a_wrong_tile_is_reported() -> None:
    key = next(iter(distinct(UPSTREAM, "tiles")))
    found = RECORDED.tiles[key]
    assert not wheel_rules.check_tiles(found, UPSTREAM).difference
    check = wheel_rules.check_tiles(found, replace(UPSTREAM, sm90_tiles={2: tiles.VLLM_16, 1: tiles.UPSTREAM_8}))
    assert str(check) == "  tiles          DIFFERS  float16 64/64, local: the wheel has 192x128, we say 192x160"
    assert wheel_rules.check_tiles({}, UPSTREAM).difference == "no forward kernel for sm_90 was found"
    cell = Cell("bfloat16", 128, 128, "causal", False, False)
    assert wheel_rules.check_tiles({cell: frozenset({(128, 128)})}, SGLANG).difference == (
        "bfloat16 128/128, causal: the wheel has 128x128, we say 64x128 and 128x128"
    )
    assert not wheel_rules.check_tiles({cell: frozenset({(128, 128), (64, 128)})}, SGLANG).difference


def test_a_wrong_answer_is_reported_with_its_problem() -> None:
    problems = [Problem(1, 1, 8192, 8, 1, 128), Problem(64, 1, 8192, 8, 1, 128, page_size=64, causal=True)]
    plans = [make_plan(problem, SGLANG) for problem in problems]
    theirs = np.array([plans[0].num_splits, 15], np.uint8)
    check = wheel_rules.check_answers("num_splits", theirs, problems, plans)
    assert check.difference == (
        f"1 of 2, first: the wheel says 15, we say {plans[1].num_splits}: Problem(batch_size=64, max_seqlen_q=1, "
        "max_seqlen_k=8192, num_heads=8, num_heads_k=1, headdim=128, page_size=64, causal=True)"
    )
    assert wheel_rules.check_answers("pack_gqa", np.array([True, False]), problems, plans).difference
    assert wheel_rules.check_answers("pack_gqa", np.array([True, True]), problems, plans).difference is None
    assert wheel_rules.check_answers("pack_gqa", None, problems, plans).note == "not exported"


FORWARD_OP = "(Tensor q, Tensor? scheduler_metadata, int attention_chunk) -> Tensor"


FORWARD_ARGUMENTS = "q, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0"


@pytest.mark.parametrize(
    ("forward", "forward_op", "op_signature", "rules", "says"),
    [
        (FORWARD_ARGUMENTS, FORWARD_OP, None, UPSTREAM, None),
        (None, None, None, UPSTREAM, "takes no scheduler_metadata"),
        ("q, num_splits=0", FORWARD_OP, None, UPSTREAM, "takes no scheduler_metadata"),
        (FORWARD_ARGUMENTS, "(Tensor q) -> Tensor", None, UPSTREAM, "takes no scheduler_metadata"),
        ("q, scheduler_metadata=None", FORWARD_OP, None, UPSTREAM, "the forward lacks ('num_splits', 'pack_gqa', "),
        (FORWARD_ARGUMENTS, FORWARD_OP, None, VLLM, "attention_chunk: the rules say False"),
        (FORWARD_ARGUMENTS, FORWARD_OP, "batch_size", UPSTREAM, "not both"),
    ],
)
def test_wrong_arguments_are_reported(
    forward: str | None, forward_op: str | None, op_signature: str | None, rules: FA3Rules, says: str | None
) -> None:
    signatures, schemas = {OP: op_signature, FORWARD: forward}, {OP: None, FORWARD: forward_op}
    difference = wheel_rules.check_arguments(signatures, schemas, rules).difference
    assert difference is None if says is None else says in (difference or "")


def test_whatever_differs_from_the_recording_is_reported() -> None:
    version = "0.4.10"
    found = RECORDED.wheels["sglang-kernel"][version]
    check = wheel_rules.check_recorded
    assert check("sglang-kernel", version, found, RECORDED, True).difference is None
    assert check("sglang-kernel", "0.4.11", found, RECORDED, True).note == "of 0.4.10, the nearest"
    for key, meaning in EVIDENCE.items():
        changed = found | {key: "another"}
        assert meaning in (check("sglang-kernel", version, changed, RECORDED, True).difference or "")
        later = check("sglang-kernel", "0.4.11", changed, RECORDED, True).difference
        assert (later is None) == key.endswith("_code")
        others_asked = check("sglang-kernel", version, changed, RECORDED, False).difference
        assert (others_asked is None) == (key in ("num_splits", "pack_gqa"))
    inlined = found | {"pack_gqa": None, "pack_gqa_code": None}
    assert check("sglang-kernel", "0.4.11", inlined, RECORDED, True).difference is None
    assert check("sglang-kernel", version, inlined, RECORDED, True).difference
    assert "nothing is recorded" in check("unheard-of", "1.0", found, RECORDED, True).note


# --- Reading and calling.


def test_problems_survive_being_stored(tmp_path: pathlib.Path) -> None:
    problems = draw_problems(random.Random(5), 300)
    save_problems(tmp_path / "problems.npz", problems)
    assert load_problems(tmp_path / "problems.npz") == problems
    assert any(p.total_q for p in problems[150:])
    assert not any(p.total_q for p in problems[:150])


def test_recordings_survive_being_stored(tmp_path: pathlib.Path) -> None:
    copy = replace(RECORDED, folder=tmp_path)
    copy.save(RECORDED.problems[:10])
    again = Recordings.load(tmp_path)
    assert again.problems == RECORDED.problems[:10]
    assert (again.published, again.wheels) == (RECORDED.published, RECORDED.wheels)
    assert (again.tiles, again.texts) == (RECORDED.tiles, RECORDED.texts)
    assert all(np.array_equal(again.answers[key], values) for key, values in RECORDED.answers.items())
    assert (tmp_path / "wheels.json").read_text() == (RECORDED.folder / "wheels.json").read_text()


def test_tile_of_a_kernel_name() -> None:
    assert tile_in_name(demangled(KERNEL)) == (Cell("bfloat16", 128, 128, "causal", False, False), (64, 128))
    with pytest.raises(ValueError, match="not the name of a forward kernel"):
        tile_in_name("void flash::something_else()")
    with pytest.raises(ValueError, match="not a mangled C"):
        demangled("printf")


def test_signature_of_a_function() -> None:
    source = "def one(a: int, b: str = 'x', *, c=(-1, -1)) -> None: ...\nclass C:\n    def two(self): ...\n"
    assert signature(source, "one") == "a, b='x', *, c=(-1, -1)"
    assert parameters("a, b='x', *, c=(-1, -1)") == ["a", "b", "c"]
    assert signature(source, "two") is None


def places(has_attention_chunk: bool, sorts: bool, *names: str) -> list[int]:
    fields = params_dtype(has_attention_chunk, sorts).fields
    assert fields is not None
    return [fields[name][1] for name in names]


def test_members_lie_where_the_code_reads_them() -> None:
    """Offsets in the machine code of get_num_splits in sgl-kernel 0.3.21 and sglang-kernel 0.4.5, vLLM 0.11.1."""
    common = ("b", "total_q", "cu_seqlens_q", "page_table", "pagedkv_tma", "window_size_left")
    flags = ("is_e4m3", "is_causal", "is_local", "num_splits_dynamic_ptr", "arch", "num_sm")
    for build in ((True, True), (False, True), (False, False)):
        assert places(*build, *common) == [0xF0, 0x114, 0x138, 0x220, 0x238, 0x248]
    assert places(True, True, *flags) == [0x262, 0x263, 0x264, 0x280, 0x2A4, 0x2A8]
    assert places(False, False, *flags) == [0x25A, 0x25B, 0x25C, 0x270, 0x27C, 0x280]


@pytest.mark.parametrize(
    ("package", "version", "packing"),
    [
        ("sglang-kernel", "0.4.5", Packing()),
        ("vllm", "0.10.0", Packing(first=True, with_splits="exactly")),
        ("vllm", "0.10.1", Packing(with_splits="always")),
        ("vllm", "0.16.0", Packing(with_splits="always")),
        ("vllm", "0.17.0", Packing(with_splits="always", equal_headdims=True)),
    ],
)
def test_packing_of_an_op(package: str, version: str, packing: Packing) -> None:
    assert Packing.of(package, version) == packing


KERNEL = (
    "_ZN7cutlass13device_kernelIN5flash25CollectiveMainloopFwdSm90ILi2EN4cute5tupleIJNS3_1CILi1EEES6_S6_EEENS4_IJNS5_"
    "ILi64EEENS5_ILi128EEES9_EEELi128ENS_10bfloat16_tEfNS_4arch4Sm90ELb1ELb0ELb0ELb1ELb0EEEEEvv"
)
OTHER_KERNEL = KERNEL.replace("IJNS5_ILi64EEENS5_ILi128EEES9_EE", "IJNS5_ILi128EEES8_S8_EE")
SCHEMAS = (
    "fwd(Tensor   q,    Tensor?  scheduler_metadata,int attention_chunk) -> (Tensor, Tensor)",
    "get_scheduler_metadata(    int  batch_size) -> Tensor",
)
# Answers to every member that the real ones read, and to no other.
FAKE = """
#include <stdint.h>
extern int of_a_missing_library(int);
__attribute__((constructor)) static void initialise(void) {{ of_a_missing_library(1); }}
static const char *const texts[] = {{{texts}}};
const char *text(int i) {{ return texts[i]; }}
int get_num_splits(const char *) __asm__("_Z14get_num_splitsRK16Flash_fwd_params");
int get_num_splits(const char *p) {{ uint64_t sum = 0; {sum_num_splits} return sum % 97 + 2; }}
_Bool get_pack_gqa(const char *) __asm__("_Z12get_pack_gqaRK16Flash_fwd_params");
_Bool get_pack_gqa(const char *p) {{ uint64_t sum = 0; {sum_pack_gqa} return sum % 7 > 2; }}
__asm__(".section .nv_fatbin, \\"a\\"\\n.incbin \\"fatbin\\"\\n.previous");
"""
MIXED = "sum = sum * 1000003 + (sum >> 29) + *(const {type} *)(p + {place});"
TYPES = {"i4": "int32_t", "u8": "uint64_t", "b1": "uint8_t"}


def fake_extension(folder: pathlib.Path, kernels: tuple[str, ...] = (KERNEL, OTHER_KERNEL)) -> pathlib.Path:
    """A shared library that has the parts of an extension, and needs a library that is not there."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    members_of = params_dtype(True, True).fields
    assert members_of is not None
    code = {}
    for function, members in (("num_splits", NUM_SPLITS_READS), ("pack_gqa", PACK_GQA_READS)):
        fields = [members_of[name] for name in members]
        code[f"sum_{function}"] = "".join(MIXED.format(type=TYPES[kind.str[1:]], place=at) for kind, at, *_ in fields)
    texts = ", ".join(f'"{text}"' for text in (*kernels, *SCHEMAS))
    (folder / "prepare.c").write_text('__attribute__((section(".text.prepare_varlen_num_blocks_kernelILi1E")))\n'
                                      "int kernel(int x) { return x * 3; }\n")  # fmt: skip
    run(folder, "gcc", "-c", "prepare.c", "-o", "prepare.o")
    image = (folder / "prepare.o").read_bytes()
    entry = struct.pack("<HHIQ12xI32x", 2, 0, 64, len(image), 90)
    other = struct.pack("<HHIQ12xI32x", 2, 0, 64, 8, 80) + b"not read"
    header = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(other) + len(entry) + len(image))
    (folder / "fatbin").write_bytes(bytes(8) + header + other + entry + image + bytes(64))
    (folder / "missing.c").write_text("int of_a_missing_library(int x) { return x; }")
    (folder / "extension.c").write_text(FAKE.format(texts=texts, **code))
    run(folder, "gcc", "-shared", "-fPIC", "missing.c", "-o", "libmissing.so")
    run(folder, "gcc", "-O1", "-shared", "-fPIC", "extension.c", "-L.", "-lmissing", "-o", "extension.so")
    (folder / "libmissing.so").unlink()
    return folder / "extension.so"


def run(folder: pathlib.Path, *command: str) -> None:
    subprocess.run(command, cwd=folder, check=True)


@pytest.fixture
def extension(tmp_path: pathlib.Path) -> pathlib.Path:
    return fake_extension(tmp_path)


def test_an_elf_file_is_read(extension: pathlib.Path) -> None:
    elf = Elf(extension.read_bytes())
    assert elf.section(".text").size > 0
    with pytest.raises(KeyError, match=r"no section \.nowhere"):
        elf.section(".nowhere")
    assert KERNEL.encode() in elf.content(elf.section(".rodata"))
    assert 100 < len(elf.code_of(GET_NUM_SPLITS) or b"") < 2000
    assert elf.code_of("of_a_missing_library") is None
    assert elf.code_of("nothing") is None
    assert [image.arch for image in elf.gpu_images()] == [80, 90]
    gpu = elf.image(list(elf.gpu_images())[1])
    assert any("prepare_varlen_num_blocks" in section.name for section in gpu.sections)
    with pytest.raises(ValueError, match="not a 64-bit little-endian ELF"):
        elf.image(next(iter(elf.gpu_images())))


def test_a_copy_loads_without_its_libraries_and_leaves_out_gpu_code(extension: pathlib.Path) -> None:
    structs = filled(params_dtype(True, True), {"h": np.arange(1, 50)})
    with pytest.raises(RuntimeError, match=r"libmissing\.so"):
        call(extension, GET_NUM_SPLITS, structs)
    copy = extension.with_name("copy.so")
    Elf(extension.read_bytes()).write_loadable(copy)
    assert len(set(call(copy, GET_NUM_SPLITS, structs).tolist())) > 20
    with pytest.raises(RuntimeError, match="undefined symbol: no_such_function"):
        call(copy, "no_such_function", structs)
    section = Elf(copy.read_bytes()).section(".nv_fatbin")
    assert not any(Elf(copy.read_bytes()).content(section))


def test_a_wrong_layout_is_doubted(extension: pathlib.Path) -> None:
    copy = extension.with_name("copy.so")
    Elf(extension.read_bytes()).write_loadable(copy)
    problems = draw_problems(random.Random(3), 400)
    plans = [make_plan(problem, UPSTREAM) for problem in problems]

    def answers(has_chunk: bool, sorts: bool) -> str | None:
        rules = HostRules(copy, True, Packing(), params_dtype(has_chunk, sorts), True)
        return rules.answers(problems, plans).layout_doubt

    assert answers(True, True) is None
    assert f"{GET_NUM_SPLITS} reads what is not filled in" in (answers(False, True) or "")
    assert f"{GET_NUM_SPLITS} answers the same whatever arch, num_sm is" in (answers(True, False) or "")


def fake_wheel(folder: pathlib.Path, extension: pathlib.Path, version: str = "0.4.4") -> str:
    path = folder / f"sglang_kernel-{version}+cu130-cp310-abi3-manylinux2014_x86_64.whl"
    front_end = "def get_scheduler_metadata(batch_size): ...\n"
    front_end += (
        "def flash_attn_with_kvcache(q, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0): ...\n"
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(extension, "sgl_kernel/flash_ops.abi3.so")
        archive.writestr("sgl_kernel/flash_attn.py", front_end)
    return str(path)


def test_a_wheel_is_checked_from_end_to_end(
    tmp_path: pathlib.Path,
    extension: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(wheel_rules, "FOLDER", tmp_path / "recordings")
    monkeypatch.setattr(wheel_rules, "NUM_PROBLEMS", 400)
    monkeypatch.setattr(wheel_rules, "published_versions", lambda _package: ["0.4.4"])
    wheel = fake_wheel(tmp_path, extension)
    assert wheel_rules.main([wheel, "--record"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sglang-kernel 0.4.4, rules sglang"
    says = dict(zip(("tiles", "num_splits", "pack_gqa", "struct", "arguments", "recorded"), lines[1:], strict=True))
    assert says["tiles"].split()[1:] == ["ok", "1", "of", "264", "cells,", "2", "tiles"]
    assert says["struct"].split()[2] == says["arguments"].split()[1] == says["recorded"].split()[2] == "ok"
    assert "DIFFERS" in says["num_splits"]
    assert " of 400, first: the wheel says " in says["num_splits"]
    assert "DIFFERS" in says["pack_gqa"]

    recorded = Recordings.load(tmp_path / "recordings")
    found = recorded.wheels["sglang-kernel"]["0.4.4"]
    assert recorded.texts[found["forward_schema"] or ""] == (
        "(Tensor q, Tensor? scheduler_metadata, int attention_chunk) -> (Tensor, Tensor)"
    )
    assert recorded.texts[found["op_schema"] or ""] == "(int batch_size) -> Tensor"
    assert recorded.texts[found["op_signature"] or ""] == "batch_size"
    assert (len(recorded.problems), recorded.published) == (400, {"sglang-kernel": ["0.4.4"]})

    # A release that is not known yet, with another tile: the rules of the newest one, and what is recorded before it.
    (tmp_path / "next").mkdir()
    later = fake_extension(
        tmp_path / "next", (KERNEL, OTHER_KERNEL.replace("ILi128EEES8_S8_E", "ILi128EEENS5_ILi176EEES8_E"))
    )
    assert wheel_rules.main([fake_wheel(tmp_path, later, "0.4.99")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sglang-kernel 0.4.99, rules sglang-0.4.5 (of the newest release known)"
    assert "bfloat16 128/128, causal: the wheel has 64x128 and 128x176, we say 64x128 and 128x128" in lines[1]
    assert lines[6].split(maxsplit=3)[2:] == [
        "DIFFERS",
        "tile shapes, from what is recorded of 0.4.4, the nearest",
    ]


def test_a_wheel_that_agrees_ends_in_exit_code_0(
    tmp_path: pathlib.Path,
    extension: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its facts are what we say; of them, one answer is then another."""
    found = RECORDED.wheels["sglang-kernel"]["0.4.4"]
    forward, forward_op = (RECORDED.texts[found[key] or ""] for key in ("forward_signature", "forward_schema"))
    wrong: list[int] = []

    def facts_of(_wheel: object, _problems: object, plans: list[LaunchPlan]) -> Facts:
        num_splits = np.array([plan.num_splits for plan in plans], np.uint8)
        num_splits[wrong] += 1
        answers = Answers(num_splits, np.array([plan.pack_gqa for plan in plans]), None)
        texts = {OP: None, FORWARD: forward}, {OP: None, FORWARD: forward_op}
        code = {GET_NUM_SPLITS: None, GET_PACK_GQA: None}
        return Facts(RECORDED.tiles[found["tiles"] or ""], answers, *texts, "kernel", code)

    monkeypatch.setattr(wheel_rules, "facts_of", facts_of)
    monkeypatch.setattr(wheel_rules, "NUM_PROBLEMS", 400)
    arguments = [fake_wheel(tmp_path, extension), "--seed", "4"]
    monkeypatch.setattr(wheel_rules, "FOLDER", tmp_path / "nothing recorded")
    assert wheel_rules.main(arguments) == 0
    assert "DIFFERS" not in capsys.readouterr().out
    wrong.append(7)
    assert wheel_rules.main(arguments) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "DIFFERS" in line]
    assert [line.split()[:5] for line in lines] == [["num_splits", "DIFFERS", "1", "of", "400,"]]
    assert wheel_rules.main([*arguments, "--like", "vllm-0.33.0"]) == 1
    assert "sglang-kernel 0.4.4, rules vllm\n  tiles          DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--record", "--seed", "1"], ["--like", "vllm-0.1"], ["--frobnicate"], []])
def test_mistakes_end_in_exit_code_2(options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        wheel_rules.main(["sglang-kernel==0.4.4", *options] if options else [])


@pytest.mark.parametrize(
    ("wheel", "says"),
    [
        ("sglang-kernel", "a wheel must be a .whl file or a name such as sglang-kernel==0.4.5"),
        ("numpy-1.0-py3-none-any.whl", "is not a wheel of sgl-kernel, "),
        ("nowhere/vllm-0.33.0-cp38-abi3-linux_x86_64.whl", "No such file"),
        ("sglang_kernel-0.4.5-cp310-abi3-linux_x86_64.whl", "There is no item named 'sgl_kernel/flash_ops.abi3.so'"),
    ],
)
def test_what_is_no_wheel_of_ours_ends_in_exit_code_2(
    wheel: str, says: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if wheel.endswith(".whl"):
        if "/" not in wheel:
            with zipfile.ZipFile(tmp_path / wheel, "w") as archive:
                archive.writestr("readme", "")
        wheel = str(tmp_path / wheel)
    assert wheel_rules.main([wheel]) == 2
    assert says in capsys.readouterr().err
    with pytest.raises(ValueError, match=re.escape(says)), opened(wheel):
        pass
