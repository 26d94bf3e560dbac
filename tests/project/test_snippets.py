"""The Python on the pages runs, and does what the page says: on a CPU, with stand-ins for what an engine has.

A block that cannot run has a comment above it that says why, "not run: ..."; there are few. Of commands, the options
must exist.
"""

from __future__ import annotations

import ast
import contextlib
import io
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import fa3_metadata
import pytest
import torch
from fa3_metadata import trace
from fa3_metadata.engines import sglang
from fa3_metadata.tools import cli

from bench.__main__ import COMMANDS

from ..helpers.attention_reference import attention
from ..helpers.sglang_stand_in import Batch, Sglang
from ..helpers.vllm_stand_in import stand_in

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BUILD = "sglang-kernel-0.4.2"
MOST_NOT_RUN = 2
_FENCE = re.compile(r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_PAGES_OF_A_CACHE = 200  # so many pages of 64 tokens has a sequence at most


class Block(NamedTuple):
    kind: str
    text: str
    line: int  # of the page, on which the text begins
    reason: str | None  # why it is not run


def blocks(page: pathlib.Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(found["kind"], found["text"], text[: found.start("text")].count("\n"), found["reason"])
        for found in _FENCE.finditer(text)
    ]


def pages_with_python() -> list[pathlib.Path]:
    return [page for page in PAGES if any(block.kind == "python" and not block.reason for block in blocks(page))]


class Calls:
    """A forward of sgl_kernel's that computes attention, and what it was called with."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def forward(self) -> Any:
        def flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=None, page_table=None, causal=False, window_size=(-1, -1),
            scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
        ):  # fmt: skip
            self.all.append(dict(locals()))
            return attention(self.all[-1])

        return flash_attn_with_kvcache


def an_engine(calls: Calls) -> dict[str, Any]:
    """What the pages say is the engine's: tensors of a decode step, two layers' caches, and the forward."""
    generator = torch.Generator().manual_seed(20)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    caches = [(random(9, 64, 1, 128), random(9, 64, 1, 128)) for _ in range(2)]
    table = torch.zeros(3, _PAGES_OF_A_CACHE, dtype=torch.int32)
    table[:, :3] = torch.arange(9).view(3, 3)
    lengths = torch.tensor([190, 7, 64], dtype=torch.int32)
    call = {
        "q": random(3, 1, 8, 128), "k_cache": caches[0][0], "v_cache": caches[0][1], "page_table": table,
        "cache_seqlens": lengths, "causal": True,
    }  # fmt: skip
    return {
        **call, "call": call, "caches": caches, "flash_attn_with_kvcache": calls.forward(),
    }  # fmt: skip


def run_blocks(page: pathlib.Path, names: dict[str, Any]) -> None:
    """All Python of a page, in its order and in one namespace, as who reads it would."""
    for block in blocks(page):
        if block.kind == "python" and block.reason is None:
            code = compile("\n" * block.line + block.text, str(page), "exec")
            exec(code, names)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[Calls]:
    """sgl_kernel is importable, and there is a folder to write to."""
    made = Calls()
    package, module = ModuleType("sgl_kernel"), ModuleType("sgl_kernel.flash_attn")
    module.flash_attn_with_kvcache = made.forward()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sgl_kernel", package)
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", module)
    monkeypatch.setenv("FA3_METADATA_BUILD", BUILD)
    monkeypatch.delitem(vars(fa3_metadata), "flash_attn_with_kvcache", raising=False)
    monkeypatch.chdir(tmp_path)
    yield made
    fa3_metadata.uninstall()
    trace.stop()


WITH_ENGINES = {"sglang.md", "vllm.md"}


@pytest.mark.parametrize(
    "page", [page for page in pages_with_python() if page.name not in WITH_ENGINES], ids=lambda page: page.stem
)
def test_the_python_of_a_page_runs(page: pathlib.Path, calls: Calls) -> None:
    names = an_engine(calls)
    run_blocks(page, names)
    policy = names["plan"].problem.policy if "plan" in names else "fa3"
    for call in calls.all:
        asked = {
            "batch_size": 3, "max_seqlen_q": 1, "max_seqlen_k": 64 * _PAGES_OF_A_CACHE, "num_heads": 8,
            "num_heads_k": 1, "headdim": 128, "page_size": 64, "causal": True, "window_size": call["window_size"],
            "cache_seqlens": call["cache_seqlens"], "num_splits": call["num_splits"], "policy": policy,
        }  # fmt: skip
        assert torch.equal(call["scheduler_metadata"], fa3_metadata.get_scheduler_metadata(**asked))
    if "out" in names:
        torch.testing.assert_close(names["out"], attention(calls.all[-1]))


def test_the_readmes_plan_hands_over_the_bound_that_fa3_comes_to(calls: Calls) -> None:
    names = an_engine(calls)
    run_blocks(ROOT / "README.md", names)
    (call,) = calls.all
    asked = {
        "batch_size": 3, "max_seqlen_q": 1, "max_seqlen_k": 131072, "num_heads": 8, "num_heads_k": 1, "headdim": 128,
        "page_size": 64, "causal": True,
    }  # fmt: skip
    assert call["num_splits"] == fa3_metadata.metadata_layout(**asked).num_splits


def test_a_recording_that_a_page_makes_is_one(calls: Calls) -> None:
    run_blocks(ROOT / "docs" / "pictures.md", an_engine(calls))
    (step,) = trace.read("steps.trace")
    assert step.problem.batch_size == 3


def test_the_script_for_an_older_sglang_attaches_new_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA3_METADATA_BUILD", BUILD)
    world = Sglang(monkeypatch, "0.5.10")
    try:
        run_blocks(ROOT / "docs" / "sglang.md", {"__name__": "serve"})  # as a spawned process imports it
        backend = world.backend()
        backend.init_forward_metadata(Batch([190, 7, 64]))
        backend.decode_layer()
        assert world.calls[0]["scheduler_metadata"] is not None
    finally:
        if sglang._new_backends is not None:
            sglang._new_backends.undo()


def test_vllm_is_attached_to_and_detached_from(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in(tmp_path, monkeypatch):
        names: dict[str, Any] = {}
        run_blocks(ROOT / "docs" / "vllm.md", names)
        assert "vllm.vllm_flash_attn" in sys.modules
        assert names["attached"].build
        from fa3_metadata.engines import vllm

        assert vllm._attached is None, "vLLM as it was"


def test_few_blocks_are_not_run() -> None:
    left = [block for page in PAGES for block in blocks(page) if block.reason]
    assert len(left) <= MOST_NOT_RUN
    for block in left:
        assert block.kind == "python"
        ast.parse(block.text)


def test_blocks_are_found(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```python\na = 1\n```\n\n<!-- not run: why -->\n```python\nb\n```\n```\n$ c\n```\n")
    assert blocks(page) == [
        Block("python", "a = 1\n", 3, None), Block("python", "b\n", 8, "why"), Block("", "$ c\n", 11, None)
    ]  # fmt: skip
    page.write_text("```python\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError):
        run_blocks(page, {})


def commands() -> Iterator[tuple[str, list[str]]]:
    """The commands of the pages that are ours: where, and their words."""
    for page in PAGES:
        for block in blocks(page):
            if block.kind:
                continue
            for line in block.text.splitlines():
                found = re.search(r"(?:^|\$ |\d )(fa3-metadata|python -m bench|python -m fa3_metadata\S*) .*", line)
                if found and not line.startswith(" "):
                    yield page.name, shlex.split(found[0].removeprefix("$ "), comments=True)


def help_of(words: list[str]) -> str:
    """What a command says of its options."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        if words[0] == "fa3-metadata":
            last = 3 if words[1] == "tune" else 2
            cli.main([*words[1:last], "--help"])
        else:
            from bench.__main__ import main

            main([words[3], "--help"])
    return out.getvalue()


SEEN = list(commands())


@pytest.mark.parametrize(("page", "words"), SEEN, ids=[f"{page}: {' '.join(words)[:60]}" for page, words in SEEN])
def test_commands_have_the_options_that_pages_give_them(page: str, words: list[str]) -> None:
    if words[0] != "fa3-metadata" and len(words) > 3:
        assert words[3] in COMMANDS or words[3].isupper()
    said = help_of(words)
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", said), word
    if words[0] == "fa3-metadata":
        assert words[1] in ("doctor", "demo", "explain", "measure", "tune")


def literals(path: pathlib.Path) -> list[str]:
    """The texts in a source, a NUL for each value that is put into one."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.sub(r"%[sdr]", "\0", node.value))
    return found


def messages() -> list[str]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    return re.findall(r"^\| `([^`]+)` \|", page, re.M)


SOURCES = [*ROOT.glob("integration/**/*.py"), *ROOT.glob("triton_kernels/*.py")]
TEXTS = [text for path in SOURCES for text in literals(path)]


@pytest.mark.parametrize("message", messages())
def test_messages_that_are_explained_are_messages_of_the_code(message: str) -> None:
    parts = [re.escape(part) for part in message.split("...")]
    pattern = re.compile(".*".join(parts), re.S)
    assert any(pattern.search(text) for text in TEXTS)


def test_messages_are_found() -> None:
    assert len(messages()) > 15
