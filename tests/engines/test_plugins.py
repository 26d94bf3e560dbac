"""The plugins, by the loaders of the engines' published wheels: installing fa3-metadata is switching it on.

A loader runs in a process of its own, where the rest of its engine is a stand-in; with FA3_METADATA_WHEELS as
tests/helpers/published.py says.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import subprocess
import sys
import zipfile
from typing import Any

import pytest
from fa3_metadata.engines import once, plugins, sglang
from fa3_metadata.settings import Settings

from ..helpers.published import wheel_or_skip
from ..helpers.vllm_stand_in import FILES, OLDER_FILES

ROOT = pathlib.Path(__file__).parents[2]
GROUPS = {"sglang.srt.plugins": "sglang", "vllm.general_plugins": "vllm"}
SGLANG_VERSIONS, VLLM_VERSIONS = ("0.5.11", "0.5.23"), ("0.17.0", "0.33.0")  # the first and the last that have them


def entry_points() -> str:
    """Those of pyproject.toml, as an installed package has them."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    found = []
    for group in GROUPS:
        start = lines.index(f'[project.entry-points."{group}"]')
        name, _, target = lines[start + 1].partition(" = ")
        found += [f"[{group}]", f"{name} = {target.strip(chr(34))}"]
    return "\n".join(found) + "\n"


def test_the_package_declares_both() -> None:
    assert entry_points() == (
        "[sglang.srt.plugins]\nfa3_metadata = fa3_metadata.engines.plugins:sglang\n"
        "[vllm.general_plugins]\nfa3_metadata = fa3_metadata.engines.plugins:vllm\n"
    )


BACKENDS = """
class FlashAttentionMetadata:
    cache_seqlens_int32 = cu_seqlens_q = page_table = scheduler_metadata = None

def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=None, scheduler_metadata=None, num_splits=0, ver=3):
    return scheduler_metadata

class FlashAttentionBackend:
    def __init__(self, fa_impl_ver=3):
        self.fa_impl_ver, self.page_size, self.decode_cuda_graph_metadata = fa_impl_ver, 16, {}
        self.forward_metadata = self._get_scheduler_metadata = None
    def init_forward_metadata(self, forward_batch): pass
    def forward_decode(self, q, k, v, layer, forward_batch): pass
    def forward_extend(self, q, k, v, layer, forward_batch): pass
    def _compute_scheduler_metadata(self, batch_size, max_seq_len_k, cache_seqlens, cu_seqlens_q): pass
"""
START = """
import json, logging, sys
records = []
class Handler(logging.Handler):
    def emit(self, record):
        records.append([record.levelname, record.getMessage()])
logging.basicConfig(level=logging.INFO, handlers=[Handler()])
from fa3_metadata.engines import plugins
if has_cuda: plugins.no_cuda = lambda: None
"""
SGLANG = """
from sglang.srt.plugins import load_plugins
load_plugins()
load_plugins()
name = "sglang.srt.layers.attention.flashattention_backend"
early = name in sys.modules
from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
marks = [hasattr(FlashAttentionBackend(*version), "_fa3_metadata_attached") for version in ((), (4,), ())]
print(json.dumps({"early": early, "attached": marks, "log": records}))
"""
VLLM = """
from vllm.plugins import load_general_plugins
load_general_plugins()
load_general_plugins()
from vllm.v1.attention.backends import fa_utils
from fa3_metadata.engines import vllm
print(json.dumps({
    "attached": [vllm._attached is not None, fa_utils.get_scheduler_metadata is vllm.get_scheduler_metadata],
    "in_place": getattr(vllm._attached, "in_place", None), "log": records,
}))
"""


def site(folder: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    """A folder of packages: these files, and fa3-metadata as it is installed."""
    files["fa3_metadata-0.1.0.dist-info/METADATA"] = "Metadata-Version: 2.1\nName: fa3-metadata\nVersion: 0.1.0\n"
    files["fa3_metadata-0.1.0.dist-info/entry_points.txt"] = entry_points()
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def run(folder: pathlib.Path, code: str, has_cuda: bool = True, **environ: str) -> dict[str, Any]:
    environ = {"PYTHONPATH": str(folder), "FA3_METADATA_BUILD": "sglang-kernel-0.4.2", **environ}
    command = [sys.executable, "-W", "ignore", "-c", f"has_cuda = {has_cuda}\n{START}\n{code}"]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | environ, cwd=folder)
    assert ran.returncode == 0, ran.stderr[-3000:]
    printed: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    printed["log"] = [line for line in printed["log"] if "fa3_metadata:" in line[1] or "attached to" in line[1]
                      or "fa3_metadata makes" in line[1]]  # fmt: skip
    return printed


def taken(wheel: pathlib.Path, *names: str) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        paths = [path for path in archive.namelist() if path.endswith(".py") and path.startswith(names)]
        return {path: archive.read(path).decode() for path in paths}


@pytest.fixture(params=SGLANG_VERSIONS)
def sglang_site(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    """SGLang's own loader, hooks and environment, and a stand-in for its backend."""
    wheel = wheel_or_skip("sglang", request.param)
    files = taken(wheel, "sglang/srt/plugins/", "sglang/srt/environ.py")
    stubs = dict.fromkeys(("sglang/__init__.py", "sglang/srt/debug_utils/cuda_coredump.py"), "")
    return site(tmp_path, files | stubs | {"sglang/srt/layers/attention/flashattention_backend.py": BACKENDS})


@pytest.fixture(params=VLLM_VERSIONS)
def vllm_site(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> tuple[pathlib.Path, str]:
    """vLLM's own loader and environment, and a stand-in for the rest."""
    wheel = wheel_or_skip("vllm", request.param)
    files = {
        f"vllm/{path}": text for path, text in (FILES | (OLDER_FILES if request.param == "0.17.0" else {})).items()
    }
    build = f"vllm-{request.param}"
    return site(tmp_path, files | taken(wheel, "vllm/plugins/__init__.py", "vllm/envs.py")), build


def test_sglang(sglang_site: pathlib.Path) -> None:
    """The backend's module is left for SGLang to import; FA4 beside FA3 is left alone."""
    ran = run(sglang_site, SGLANG)
    assert (ran["early"], ran["attached"]) == (False, [True, False, True])
    levels, lines = zip(*ran["log"], strict=True)
    assert levels == ("INFO", "WARNING")
    assert lines[0] == "scheduler metadata: attached to the FlashAttentionBackend of SGLang 0.5.11 to 0.5.23"
    assert "SGLang is left alone" in lines[1]
    assert "FlashAttention 3 (fa_impl_ver), got 4" in lines[1]


def test_sglang_by_the_environment(sglang_site: pathlib.Path) -> None:
    balanced = run(sglang_site, SGLANG, FA3_METADATA_POLICY="balanced", FA3_METADATA_BATCH_INVARIANT="1")
    assert balanced["log"][0][1].endswith("SGLang 0.5.11 to 0.5.23, policy balanced, batch invariant")
    for off in ({"FA3_METADATA_DISABLE": "1"}, {"SGLANG_PLUGINS": "another"}):
        assert run(sglang_site, SGLANG, **off)["attached"] == [False] * 3
    without = run(sglang_site, SGLANG, has_cuda=False, CUDA_VISIBLE_DEVICES="")
    assert without["attached"] == [False] * 3
    assert [level for level, _ in without["log"]] == ["WARNING"], "once"
    assert "CUDA" in without["log"][0][1]
    assert "FA3_METADATA_DISABLE=1 turns fa3-metadata off" in without["log"][0][1]


def test_vllm(vllm_site: tuple[pathlib.Path, str]) -> None:
    folder, build = vllm_site
    ran = run(folder, VLLM, FA3_METADATA_BUILD=build)
    assert ran["attached"] == [True, True], ran["log"]
    assert [level for level, _ in ran["log"]] == ["INFO"]
    assert "fa3_metadata makes the FA3 scheduler metadata from now on" in ran["log"][0][1]
    assert run(folder, VLLM, FA3_METADATA_BUILD=build, FA3_METADATA_IN_PLACE="1")["in_place"] is True


def test_a_vllm_that_cannot_be_attached_to_starts_all_the_same(vllm_site: tuple[pathlib.Path, str]) -> None:
    folder, build = vllm_site
    unknown = run(folder, VLLM, FA3_METADATA_BUILD="vllm-0.99.0")
    invariant = {"FA3_METADATA_POLICY": "balanced", "FA3_METADATA_BATCH_INVARIANT": "1"}
    for ran, said in (
        (unknown, "cannot attach to this vLLM"),
        (run(folder, VLLM, FA3_METADATA_BUILD=build, **invariant), "VLLM_BATCH_INVARIANT=1 is vLLM's own"),
        (run(folder, VLLM, FA3_METADATA_BUILD=build, VLLM_PLUGINS="another"), None),
        (run(folder, VLLM, FA3_METADATA_BUILD=build, FA3_METADATA_DISABLE="1"), "FA3_METADATA_DISABLE is set"),
    ):
        assert ran["attached"] == [False, False]
        assert len(ran["log"]) == (said is not None)
        assert said is None or said in ran["log"][0][1]


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "_said", set())


@pytest.mark.parametrize("plugin", [plugins.sglang, plugins.vllm])
def test_what_cannot_be_attached_to_is_said_once(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither engine is installed here, or this process has no CUDA."""
    monkeypatch.setattr(plugins, "no_cuda", lambda: "no CUDA GPU is visible to this process")
    caplog.set_level(logging.INFO)
    for _ in range(2):
        plugin()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "left alone, which works as without fa3-metadata: no CUDA GPU is visible" in caplog.text
    monkeypatch.setenv("FA3_METADATA_STRICT", "1")
    with pytest.raises(RuntimeError, match="no CUDA GPU is visible"):
        plugin()


def test_anything_that_goes_wrong_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(**_: Any) -> None:
        raise AttributeError("a name that is not there")

    monkeypatch.setattr(plugins, "no_cuda", lambda: None)
    monkeypatch.setattr(sglang, "attach_new_backends", fails)
    plugins.sglang()
    assert "a name that is not there" in caplog.text
    monkeypatch.setenv("FA3_METADATA_STRICT", "1")
    with pytest.raises(AttributeError):
        plugins.sglang()


def test_a_bad_value_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(plugins, "no_cuda", lambda: None)
    monkeypatch.setattr(sglang, "attach_new_backends", lambda **how: asked.append(how))
    monkeypatch.setenv("FA3_METADATA_POLICY", "fast")
    plugins.sglang()
    assert asked == [{"policy": "fa3", "batch_invariant": False, "strict": False}]
    assert "FA3_METADATA_POLICY must be fa3 or balanced, got 'fast'" in caplog.text
    monkeypatch.setenv("FA3_METADATA_STRICT", "1")
    with pytest.raises(ValueError, match="FA3_METADATA_POLICY must be fa3 or balanced, got 'fast'"):
        plugins.sglang()


def test_a_plugin_initialises_no_cuda() -> None:
    """An engine may fork its workers later."""
    code = (
        "import torch; from fa3_metadata.engines import plugins; plugins.no_cuda(); print(torch.cuda.is_initialized())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False"]
    assert Settings() == Settings("fa3", False, False, False)


def test_a_sglang_that_nobody_has_read_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Though its names may be those of one that was: what they mean may have changed."""
    monkeypatch.setattr(plugins, "installed_version", lambda _: "0.5.24")
    monkeypatch.setattr(plugins, "no_cuda", lambda: None)
    plugins.sglang()
    assert "SGLang is left alone" in caplog.text
    assert "SGLang must be 0.5.7 to 0.5.23, got 0.5.24" in caplog.text
    monkeypatch.setenv("FA3_METADATA_STRICT", "1")
    with pytest.raises(RuntimeError, match=r"SGLang must be 0\.5\.7 to 0\.5\.23, got 0\.5\.24"):
        plugins.sglang()
