"""`fa3-metadata doctor`, `status()` and `python -m fa3_metadata`."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import fa3_metadata
import pytest
from fa3_metadata import settings
from fa3_metadata.tools import cli, doctor

from ..conftest import HAS_GPU
from ..engines.test_plugins import site, taken
from ..helpers.published import wheel_or_skip

status_module = sys.modules["fa3_metadata.status"]  # the function of that name hides it


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["doctor", *arguments]) == 0
    return capsys.readouterr().out


def test_the_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA3_METADATA_BUILD", "sglang-kernel-0.4.5")
    monkeypatch.setenv("FA3_METADATA_POLICY", "fast")
    printed = run(capsys)
    assert f"installed   fa3-metadata {fa3_metadata.__version__}, torch " in printed
    assert "build       sglang-kernel-0.4.5, rules of sglang-0.4.5: the environment variable" in printed
    assert "setting     FA3_METADATA_BUILD=sglang-kernel-0.4.5 (default: what is installed)" in printed
    assert "problem     FA3_METADATA_POLICY must be fa3 or balanced, got 'fast'" in printed
    assert "equal       the Triton kernel " in printed
    assert ("on the GPU" in printed) == HAS_GPU
    assert "equal" not in run(capsys, "--no-check")


def test_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA3_METADATA_DISABLE", "1")
    found = json.loads(run(capsys, "--json"))
    assert found["disabled"] == "FA3_METADATA_DISABLE"
    assert {facts["because"] for facts in found["engines"].values()} == {"FA3_METADATA_DISABLE is set"}
    assert found["check"]["equal"] is True
    assert [one["name"] for one in found["settings"]] == [one.name for one in settings.VARIABLES]
    unchecked = fa3_metadata.status()
    changes = (
        "gpu",
        "engines",
    )  # CUDA is initialised by then; other tests have left attached backends to the collector
    assert unchecked == found | {"check": None} | {name: unchecked[name] for name in changes}


def test_a_build_that_is_not_supported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA3_METADATA_BUILD", "vllm-0.99.0")
    printed = run(capsys)
    assert "build       vllm-0.99.0, not supported: " in printed
    assert "skipped     nothing but the NumPy model" in printed


def test_a_kernel_that_differs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = status_module.get_scheduler_metadata  # type: ignore[attr-defined]

    def wrong(**arguments: Any) -> Any:
        made = honest(**arguments)
        if arguments["backend"] == "triton":
            made[0] += 1
        return made

    monkeypatch.setattr(status_module, "get_scheduler_metadata", wrong)
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr()
    assert "DIFFERENT   the Triton kernel" in printed.out
    assert "check failed: " in printed.err


def test_python_m_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "fa3_metadata", "--version"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout == f"fa3-metadata {fa3_metadata.__version__}\n"
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert (exit_.value.code, capsys.readouterr().out) == (0, ran.stdout)


def test_gpu_facts_in_words() -> None:
    facts = {"name": "NVIDIA H100", "driver": "580.1", "arch": 90, "num_sms": None}
    assert doctor._gpu(facts) == "NVIDIA H100, sm_90, driver 580.1"
    assert doctor._gpu(dict.fromkeys(facts)) == "a GPU"


@pytest.mark.parametrize(
    ("version", "plugin"), [("0.5.9", "no: sglang 0.5.9 has no plugins"), ("0.5.23", "yes")], ids=["0.5.9", "0.5.23"]
)
def test_a_published_sglang(tmp_path: pathlib.Path, version: str, plugin: str) -> None:
    """Its source is read where it is installed; nothing of it is imported."""
    wheel = wheel_or_skip("sglang", version)
    files = taken(wheel, "sglang/srt/layers/attention/") | {"sglang/__init__.py": "raise ImportError\n"}
    files[f"sglang-{version}.dist-info/METADATA"] = f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n"
    folder = site(tmp_path, files)
    command = [sys.executable, "-m", "fa3_metadata", "doctor", "--json", "--no-check"]
    environ = {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | environ, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    facts = found["engines"]["sglang"]
    assert (facts["version"], facts["would_attach"], facts["attached"]) == (version, False, None)
    assert facts["plugin"].startswith(plugin)
    assert "CUDA" in facts["because"]
    layers = {one["layers"]: one for one in found["layers"]["sglang"]}
    assert layers["decode, full attention"]["in_graph"] == "ours"
    assert layers["dual chunk attention: decode"]["in_graph"] == ("ours" if version == "0.5.9" else "none")
    text = "\n".join(doctor.report(found))
    assert f"engine      SGLang {version} would be left alone: " in text
    assert "layers      of a process with a CUDA GPU:" in text
    assert "verification, draft extension, prefill, mixed batches" in text


def test_plugins_that_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = status_module._plugin  # type: ignore[attr-defined]
    named = [type("Point", (), {"name": "fa3_metadata"})]
    monkeypatch.setattr(status_module.metadata, "entry_points", lambda group: named)  # type: ignore[attr-defined]
    for engine, variable, version in (("sglang", "SGLANG_PLUGINS", "0.5.11rc1"), ("vllm", "VLLM_PLUGINS", "0.33.0")):
        assert plugin(engine, version) == "yes"
        monkeypatch.setenv(variable, "one, fa3_metadata")
        assert plugin(engine, version) == "yes"
        monkeypatch.setenv(variable, "another")
        assert plugin(engine, version) == f"no: {variable} does not name fa3_metadata"
        monkeypatch.setenv(variable, "")  # SGLang takes it for none, vLLM for a list of none
        assert plugin(engine, version).startswith("yes" if engine == "sglang" else "no")
        monkeypatch.delenv(variable)
    named.clear()
    assert "pip install it again" in plugin("vllm", "0.33.0")
