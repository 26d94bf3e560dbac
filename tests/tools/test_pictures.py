"""Pictures of schedules: files that can be opened, a page that works in a browser, lines for a terminal."""

from __future__ import annotations

import builtins
import io
import pathlib
import re
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
from fa3_metadata.tools import cli, page, pictures, terminal
from fa3_metadata.tools.page import Slide, page_of
from fa3_metadata.tools.pictures import Panel, headline, legend

from .test_simulator import played

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (apt-get install chromium)")
EXPLAIN = ["explain", "--num-heads", "8", "--num-heads-k", "1", "--headdim", "128", "--page-size", "64", "--causal",
           "--build", "sglang-kernel-0.4.2", "--no-check", "--cache-seqlens"]  # fmt: skip


def panels(lengths: list[int], **more: Any) -> list[Panel]:
    return [Panel(f"policy {policy}", played(lengths, policy=policy, **more)) for policy in ("fa3", "balanced")]


def slide(name: str, lengths: list[int]) -> Slide:
    return Slide(name, panels(lengths), [lengths, lengths], (f"a note of {name}",))


def browsed(path: pathlib.Path, fragment: str = "") -> str:
    """The page's document after its scripts have run."""
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1180,1000",
               "--virtual-time-budget=3000", "--dump-dom", f"{path.as_uri()}{fragment}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def shown(dom: str, element: str) -> str:
    found = re.search(rf'id="{element}"[^>]*>(.*?)</(?:div|p|label|ul)>', dom, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_timeline_as_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"out{suffix}"
    assert cli.main([*EXPLAIN, "60000,40x900", "--plot", str(path), "--against", "balanced"]) == 0
    assert f"drawn       {path}" in capsys.readouterr().out
    start = path.read_bytes()[:8]
    assert start.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])
    if suffix == ".svg":
        text = path.read_text()
        for expected in ("policy balanced", "us from the start of the layer", "key blocks", "sequence 0: 60,000 keys"):
            assert expected in text
        assert "x faster, predicted on H200" in text


def test_a_picture_of_many_tiles_stays_small(tmp_path: pathlib.Path) -> None:
    plot = pytest.importorskip("fa3_metadata.tools.plot")
    pytest.importorskip("matplotlib")
    lengths = np.random.default_rng(0).integers(1, 9000, 3000).tolist()
    panel = Panel("many", played(lengths, num_heads=32, num_heads_k=8))
    plot.draw_timelines([panel], [lengths], tmp_path / "many.svg", "")
    assert (tmp_path / "many.svg").stat().st_size < 2_000_000


def test_what_is_missing_is_said_before_anything_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    honest = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.partition(".")[0] in ("matplotlib", "rich"):
            raise ImportError(f"No module named {name!r}")
        return honest(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    for option, missing in ((["--plot", str(tmp_path / "out.png")], "matplotlib"), (["--timeline"], "rich")):
        with pytest.raises(SystemExit) as exit_:
            cli.main([*EXPLAIN, "500", *option])
        assert exit_.value.code == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert f"pip install {missing}" in said.err
        assert said.err.count("\n") == 1
    assert cli.main([*EXPLAIN, "500", "--plot", str(tmp_path / "out.html")]) == 0, "which needs none of them"


def test_the_headline() -> None:
    both = panels([512])
    assert re.fullmatch(
        r"policy balanced \d\.\d us a layer, policy fa3 \d+\.\d us: 1\.\d\d x faster, predicted on H200", headline(both)
    )
    assert "slower" in headline(both[::-1])
    assert "no difference" in headline([both[0], both[0]])
    assert re.fullmatch(r"\d+\.\d us a layer predicted on H200; the SMs work \d+% of the time", headline(both[:1]))


def test_sequences_with_the_most_work_have_colours_of_their_own() -> None:
    s = played([100, 9000, *[200] * 20, 4000])
    found = pictures.colours(s)
    assert (found[1], found[22]) == pictures.STRONG[:2]
    assert found.count(pictures.STRONG[0]) == 1
    said = legend(s, [100, 9000, *[200] * 20, 4000])
    assert said[0][1].startswith("sequence 1: 9,000 keys, ")
    assert said[-1][1] == "15 more sequences"


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing() -> None:
    text = page_of([slide("step 1", [5000, 300]), slide("step 2", [100])], "A <title> & more")
    assert not re.findall(r"https?:|//[a-z]|\bsrc\s*=|\bhref\s*=|url\(|@import|fetch\(|XMLHttp", text)
    assert "<title>A &lt;title&gt; &amp; more</title>" in text
    assert len(text.encode()) < 100_000


def test_text_cannot_end_the_script() -> None:
    odd = Slide("</script><b>", panels([100]), [[100], [100]], ("</script>",))
    assert page_of([odd], "x").count("</script>") == 1


def test_a_page_has_a_limit() -> None:
    many = [5000] * 3000
    with pytest.raises(ValueError, match=r"tiles make a page of .* bytes, over .* draw a \.png"):
        page_of([Slide("", [Panel("", played(many, num_heads=64, num_heads_k=32))], [many])], "x")
    steps = [slide(f"step {i}", [900 + i] * 64) for i in range(300)]
    chosen = page.that_fit(steps, keep=77)
    assert 20 < len(chosen) < 300
    assert "step 77" in [one.name for one in chosen]
    assert len(page_of(chosen, "x").encode()) < 2_000_000


@needs_browser
def test_the_page_in_a_browser(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "page.html"
    page.write_page([slide("step 1", [5000, 300]), slide("step 2", [60000, 100])], path, "Steps")
    dom = browsed(path)
    assert shown(dom, "headline").startswith("policy balanced ")
    assert shown(dom, "stepname") == "step 1"
    assert "a note of step 1" in shown(dom, "notes")
    assert dom.count("<canvas") == 2
    assert "sequence 0: 5,000 keys" in dom.partition("<script>")[0]
    assert 'id="tip" role="status">' in dom, "no tile was asked for"

    s = played([60000, 100])
    dom = browsed(path, "#step=1&tile=3")
    assert shown(dom, "stepname") == "step 2"
    facts = shown(dom, "tip")
    assert "sequence 0: 60,000 keys, split 4 of " in facts
    assert f"{s.tiles.blocks[3]} key blocks: keys {int(s.tiles.first_block[3]) * 128:,} to " in facts
    assert f"SM 3, {s.start[3]:.2f} to " in facts


@needs_browser
def test_pointing_and_sliding(tmp_path: pathlib.Path) -> None:
    """Real events, as a mouse and a slider send them."""
    path = tmp_path / "page.html"
    page.write_page([slide("step 1", [5000, 300]), slide("step 2", [60000, 100])], path, "Steps")
    acts = """<script>
      const slider = document.getElementById("step");
      slider.value = 1; slider.dispatchEvent(new Event("input"));
      const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect();
      canvas.dispatchEvent(new MouseEvent("mousemove", {clientX: box.left + box.width / 2, clientY: box.top + 6}));
    </script></body>"""
    path.write_text(path.read_text().replace("</body>", acts))
    dom = browsed(path)
    assert shown(dom, "stepname") == "step 2"
    assert "a note of step 2" in shown(dom, "notes")
    assert "sequence 0: 60,000 keys, split 1 of " in shown(dom, "tip")
    assert "SM 0, " in shown(dom, "tip")


# ---- the terminal ----------------------------------------------------------------------------------------------------


def test_the_timeline_in_a_terminal() -> None:
    console_of = pytest.importorskip("rich.console").Console
    written = io.StringIO()
    console = console_of(file=written, force_terminal=True, width=90, color_system="truecolor")
    both = panels([60000, *[900] * 40])
    terminal.print_timelines(both, [[60000, *[900] * 40]] * 2, console)
    text = re.sub(r"\x1b\[[0-9;]*m", "", written.getvalue())
    rows = [line for line in text.splitlines() if line.startswith("SM ")]
    assert len(rows) == 2 * 22
    assert all("▀" in row and len(row) <= 90 for row in rows)
    for expected in ("policy fa3", "policy balanced", "sequence 0: 60,000 keys", "idle", "x faster"):
        assert expected in text


def test_cells_of_the_terminal() -> None:
    panel = panels([60000, *[900] * 40])[0]
    s = panel.simulation
    cells = terminal.grid(panel, 100, 44)
    assert cells.shape == (44, 100)
    assert set(cells[:, 0].tolist()) == {-2}, "launching"
    assert set(cells[:, -1].tolist()) == {-3}, "combining"
    working = round(100 * (s.costs.launch + 0.5) / s.time_us)
    assert cells[0, working] == s.tiles.sequence[np.flatnonzero(s.sm == 1)[0]]
    idle = terminal.grid(Panel("", played([300])), 50, 44)
    assert set(idle[5].tolist()) <= {-1, -2}
