"""A schedule as one page for a browser: timelines to point at, and a slider over the steps of a trace.

The page holds all its data and loads nothing. A tile's facts appear where the mouse is, or are asked for by the
page's address: `page.html#step=2&panel=0&tile=17`.
"""

from __future__ import annotations

import base64
import html
import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .pictures import STRONG, Panel, headline, ranks, subtitle

MOST_BYTES = 1_900_000
_COLUMNS = ("sequence", "head", "query_block", "split", "first_block", "blocks", "sm", "start", "end")
_TICKS = 65535  # the layer's time in the 16 bits of a start or an end


@dataclass(frozen=True, eq=False)
class Slide:
    """What the page shows at one place of the slider."""

    name: str  # "step 12", or what is shown where there is one alone
    panels: Sequence[Panel]
    lengths: Sequence[Sequence[int]]  # keys of each sequence, of each panel
    notes: Sequence[str] = ()  # the diagnosis
    headline: str = ""  # where that of the panels says nothing


def page_of(slides: Sequence[Slide], title: str) -> str:
    """The page. Raises `ValueError` where it would be larger than MOST_BYTES."""
    data = [_slide_data(slide) for slide in slides]
    text = _PAGE.replace("{{title}}", html.escape(title)).replace(
        "{{data}}", json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    )
    if (size := len(text.encode())) > MOST_BYTES:
        tiles = sum(len(panel.simulation.tiles) for slide in slides for panel in slide.panels)
        raise ValueError(f"{tiles:,} tiles make a page of {size:,} bytes, over {MOST_BYTES:,}: draw a .png instead")
    return text


def write_page(slides: Sequence[Slide], path: pathlib.Path, title: str) -> None:
    """Write `page_of`."""
    path.write_text(page_of(slides, title), encoding="utf-8")


def that_fit(slides: Sequence[Slide], keep: int = 0) -> list[Slide]:
    """As many of the slides as fit a page, evenly spread; number `keep` is among them."""
    costs = [sum(2 * 4 / 3 * len(_COLUMNS) * len(p.simulation.tiles) + 40 * len(k) + 1500
                 for p, k in zip(slide.panels, slide.lengths, strict=True)) for slide in slides]  # fmt: skip
    chosen = list(range(len(slides)))
    while len(chosen) > 1 and sum(costs[i] for i in chosen) > 0.9 * MOST_BYTES:
        count = max(1, len(chosen) * 3 // 4)
        spread = np.linspace(0, len(slides) - 1, count).round().astype(int).tolist()
        chosen = sorted({*spread, keep} if count > 1 else {keep})
    return [slides[i] for i in chosen]


def _slide_data(slide: Slide) -> dict[str, Any]:
    panels = [_panel_data(panel, keys) for panel, keys in zip(slide.panels, slide.lengths, strict=True)]
    return {
        "name": slide.name,
        "headline": slide.headline or headline(slide.panels),
        "notes": list(slide.notes),
        "panels": panels,
    }


def _panel_data(panel: Panel, keys: Sequence[int]) -> dict[str, Any]:
    s, tiles = panel.simulation, panel.simulation.tiles
    ticks = _TICKS / s.time_us
    columns = (
        tiles.sequence, tiles.head, tiles.query_block, tiles.split, tiles.first_block, tiles.blocks, s.sm,
        np.floor(s.start * ticks), np.floor(s.end * ticks),
    )  # fmt: skip
    if any(int(column.max(initial=0)) > _TICKS for column in columns):
        raise ValueError("a page counts sequences and key blocks up to 65,535: draw a .png instead")
    packed = np.stack([np.asarray(column, "<u2") for column in columns]).tobytes()
    splits = np.ones(len(keys), np.int64)
    splits[s.schedule.order] = s.schedule.splits
    return {
        "label": panel.label, "facts": subtitle(s), "sms": s.num_sms, "time": s.time_us, "launch": s.costs.launch,
        "attention": s.attention_us, "blockN": s.plan.block_n, "packed": s.plan.pack_gqa, "keys": list(keys),
        "splits": splits.tolist(), "ranks": ranks(s).tolist(), "count": len(tiles),
        "tiles": base64.b64encode(packed).decode(),
    }  # fmt: skip


_PAGE = (
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>
:root { color-scheme: light dark; --ink: #222; --soft: #666; --paper: #fff; --launch: #e4e4e4; --idle: #c4c4c4;
  --combine: #9a9a9a; --card: #fffffff2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --soft: #a0a0a0; --paper: #16181b; --launch: #2c2f33;
  --idle: #4a4d52; --combine: #6a6d72; --card: #22252af2; } }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 18px auto;
  max-width: 1160px; padding: 0 14px; }
h1 { font-size: 17px; margin: 0 0 2px; } h2 { font-size: 14px; margin: 18px 0 0; } p { margin: 2px 0; }
.soft { color: var(--soft); } canvas { width: 100%; height: 330px; display: block; margin-top: 4px; }
#pick { margin: 10px 0; display: flex; gap: 10px; align-items: center; } #pick input { flex: 1; }
#tip { position: fixed; pointer-events: none; background: var(--card); border: 1px solid var(--soft);
  border-radius: 5px; padding: 5px 9px; font-size: 12.5px; white-space: pre; display: none; z-index: 2; }
.legend span { display: inline-block; margin-right: 14px; white-space: nowrap; font-size: 12.5px; }
.legend i { display: inline-block; width: 11px; height: 11px; margin-right: 5px; vertical-align: -1px; }
ul { margin: 8px 0 0; padding-left: 20px; }
</style></head><body>
<h1>{{title}}</h1><p id="headline"></p>
<div id="pick"><label for="step" id="stepname"></label><input id="step" type="range" min="0" value="0"></div>
<div id="panels"></div><ul id="notes"></ul><div id="tip" role="status"></div>
<noscript>This page draws with JavaScript.</noscript>
<script>
"use strict";
const SLIDES = {{data}};
const STRONG = """
    + json.dumps(STRONG)
    + """, PALE = ["#AFC3D2", "#C9D6DF", "#98B0C2", "#BCCAD6"];
const COLUMNS = """
    + json.dumps(_COLUMNS)
    + """;
const at = (id) => document.getElementById(id), number = (n) => n.toLocaleString("en-US");
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
let shown = [], current = 0;

function unpacked(panel) {
  if (panel.columns) return panel.columns;
  const text = atob(panel.tiles), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const view = new DataView(bytes.buffer), n = panel.count, columns = {};
  COLUMNS.forEach((name, c) => {
    columns[name] = Array.from({length: n}, (_, i) => view.getUint16(2 * (c * n + i), true));
  });
  columns.start = columns.start.map((t) => t * panel.time / 65535);
  columns.end = columns.end.map((t) => t * panel.time / 65535);
  return panel.columns = columns;
}
function colour(panel, sequence, split) {
  const rank = panel.ranks[sequence], hex = rank < STRONG.length ? STRONG[rank] : PALE[rank % PALE.length];
  if (split % 2 === 0) return hex;
  const part = (i) => { const v = parseInt(hex.slice(i, i + 2), 16); return v + Math.floor((255 - v) / 3); };
  return `rgb(${part(1)},${part(3)},${part(5)})`;
}
function facts(panel, i) {
  const t = unpacked(panel), s = t.sequence[i], from = t.first_block[i] * panel.blockN;
  const splits = panel.splits[s] > 1 ? `split ${t.split[i] + 1} of ${panel.splits[s]}` : "not split";
  const upto = Math.min((t.first_block[i] + t.blocks[i]) * panel.blockN, panel.keys[s]);
  const keys = t.blocks[i] ? `keys ${number(from)} to ${number(upto - 1)}` : "no keys";
  return `sequence ${s}: ${number(panel.keys[s])} keys, ${splits}\\n`
    + `${panel.packed ? "KV head" : "q head"} ${t.head[i]}, query block ${t.query_block[i]}\\n`
    + `${t.blocks[i]} key blocks: ${keys}\\n`
    + `SM ${t.sm[i]}, ${t.start[i].toFixed(2)} to ${t.end[i].toFixed(2)} us (${(t.end[i] - t.start[i]).toFixed(2)} us)`;
}
function draw(canvas, panel, longest, marked) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * ratio; canvas.height = height * ratio;
  const c = canvas.getContext("2d"), t = unpacked(panel), left = 46, bottom = 34;
  c.scale(ratio, ratio);
  const x = (us) => left + us * (width - left - 8) / longest, row = (height - bottom - 6) / panel.sms;
  const y = (sm) => 4 + sm * row;
  canvas.where = (px, py) => {
    const us = (px - left) * longest / (width - left - 8), sm = Math.floor((py - 4) / row);
    for (let i = 0; i < panel.count; i++)
      if (t.sm[i] === sm && t.start[i] <= us && us < t.end[i]) return i;
    return -1;
  };
  c.fillStyle = style("--launch"); c.fillRect(x(0), y(0), x(panel.launch) - x(0), y(panel.sms) - y(0));
  c.save(); c.beginPath(); c.rect(x(panel.launch), y(0), x(panel.attention) - x(panel.launch), y(panel.sms) - y(0));
  c.clip(); c.strokeStyle = style("--idle"); c.lineWidth = 0.7; c.beginPath();
  for (let d = -height; d < width; d += 7) { c.moveTo(d, height); c.lineTo(d + height, 0); }
  c.stroke(); c.restore();
  for (let i = 0; i < panel.count; i++) {
    const a = x(t.start[i]), w = Math.max(x(t.end[i]) - a - 0.7, 0.5);
    c.fillStyle = style("--paper"); c.fillRect(a, y(t.sm[i]), w + 0.7, row);
    c.fillStyle = colour(panel, t.sequence[i], t.split[i]); c.fillRect(a, y(t.sm[i]), w, row + 0.15);
  }
  if (panel.time > panel.attention) {
    c.fillStyle = style("--combine");
    c.fillRect(x(panel.attention), y(0), x(panel.time) - x(panel.attention), y(panel.sms) - y(0));
  }
  if (marked >= 0) {
    c.strokeStyle = style("--ink"); c.lineWidth = 1.6;
    c.strokeRect(x(t.start[marked]), y(t.sm[marked]) - 1, x(t.end[marked]) - x(t.start[marked]), row + 2);
  }
  c.fillStyle = style("--soft"); c.font = "11px system-ui, sans-serif"; c.textAlign = "center";
  const raw = longest / 8, power = 10 ** Math.floor(Math.log10(raw));
  const tick = [1, 2, 5, 10].map((m) => m * power).find((m) => m >= raw);
  for (let us = 0; us <= longest * 1.0001; us += tick)
    c.fillText(`${+us.toPrecision(6)}`, x(us), height - bottom + 13);
  c.fillText("us from the start of the layer", (left + width) / 2, height - 5);
  c.textAlign = "right";
  for (let sm = 0; sm < panel.sms; sm += panel.sms > 60 ? 20 : 10) c.fillText(sm, left - 6, y(sm) + 8);
  c.save(); c.translate(11, height / 2 - 10); c.rotate(-Math.PI / 2); c.textAlign = "center"; c.fillText("SM", 0, 0);
  c.restore();
}
function legend(panel) {
  const order = panel.ranks.map((rank, s) => [rank, s]).sort((a, b) => a[0] - b[0]).map((pair) => pair[1]);
  const box = document.createElement("p"); box.className = "legend";
  const add = (fill, words) => {
    const one = document.createElement("span"), mark = document.createElement("i");
    mark.style.background = fill; one.append(mark, words); box.append(one);
  };
  order.slice(0, STRONG.length).forEach((s) => add(colour(panel, s, 0),
    `sequence ${s}: ${number(panel.keys[s])} keys` + (panel.splits[s] > 1 ? `, ${panel.splits[s]} splits` : "")));
  if (order.length > STRONG.length) add(PALE[0], `${number(order.length - STRONG.length)} more`);
  add("var(--combine)", "combining"); add("var(--launch)", "launch");
  return box;
}
function tip(text, px, py) {
  const box = at("tip");
  box.textContent = text; box.style.display = text ? "block" : "none";
  box.style.left = Math.min(px + 14, window.innerWidth - box.offsetWidth - 8) + "px";
  box.style.top = Math.min(py + 14, window.innerHeight - box.offsetHeight - 8) + "px";
}
function show(index) {
  current = index;
  const slide = SLIDES[index], longest = Math.max(...slide.panels.map((p) => p.time)) * 1.015;
  at("headline").textContent = slide.headline; at("stepname").textContent = slide.name; at("step").value = index;
  at("panels").replaceChildren();
  shown = slide.panels.map((panel) => {
    const title = document.createElement("h2"), line = document.createElement("p");
    const canvas = document.createElement("canvas");
    title.textContent = panel.label; line.className = "soft"; line.textContent = panel.facts;
    canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", `${panel.label}: ${panel.facts}`);
    at("panels").append(title, line, canvas, legend(panel));
    draw(canvas, panel, longest, -1);
    canvas.onmousemove = (event) => {
      const i = canvas.where(event.offsetX, event.offsetY);
      if (i !== canvas.marked) draw(canvas, panel, longest, canvas.marked = i);
      tip(i < 0 ? "" : facts(panel, i), event.clientX, event.clientY);
    };
    canvas.onmouseleave = () => { tip("", 0, 0); draw(canvas, panel, longest, canvas.marked = -1); };
    return {canvas, panel, longest};
  });
  at("notes").replaceChildren(...slide.notes.map((note) => {
    const one = document.createElement("li"); one.textContent = note; return one;
  }));
}
function address() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const index = Math.min(Math.max(Number(asked.get("step")) || 0, 0), SLIDES.length - 1);
  show(index);
  const one = shown[Number(asked.get("panel")) || 0];
  if (asked.has("tile") && one) {
    const i = Number(asked.get("tile"));
    if (!(i >= 0 && i < one.panel.count)) return;
    draw(one.canvas, one.panel, one.longest, one.canvas.marked = i);
    const box = one.canvas.getBoundingClientRect();
    tip(facts(one.panel, i), box.left + 80, box.top + 40);
  }
}
at("step").max = SLIDES.length - 1;
at("pick").style.display = SLIDES.length > 1 ? "flex" : "none";
at("step").oninput = () => { tip("", 0, 0); show(Number(at("step").value)); };
window.onresize = () => show(current);
window.onhashchange = address;
address();
</script></body></html>
"""
)
