"""The command line: `fa3-metadata demo`, `fa3-metadata explain`, `fa3-metadata measure` and `fa3-metadata tune`."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from .. import __version__, trace
from ..triton_kernels.problem import POLICIES
from .call_options import ENGINES, Call, add_explain_options, add_shape_options, call_of, joined, where
from .cards import CARDS, find_card
from .demo import MismatchError, allow_interpreter, checks
from .doctor import add_options as add_doctor_options
from .doctor import run as run_doctor
from .measure import add_options as add_measure_options
from .measure import run as run_measure
from .page import Slide, write_page
from .pictures import MissingExtraError, Panel, check_picture, headline
from .plot import draw_timelines
from .report import Explanation, explain, predicted
from .terminal import check_terminal, print_timelines
from .trace_report import run as run_trace
from .tune import add_options as add_tune_options
from .tune import run as run_tune

_DEMO_LENGTHS = "64k,16k,2x8k,4x4k,8x1k,16x300"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        sys.exit(2)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--all", action="store_true", help="print every sequence of a long batch")
    parser.add_argument(
        "--plot", type=pathlib.Path, metavar="FILE", help="draw the timeline: .png, .svg, .pdf or .html"
    )
    parser.add_argument("--timeline", action="store_true", help="draw it in the terminal")
    parser.add_argument(
        "--against", action="append", default=[], metavar="WHAT",
        help="the same by another policy, build or card beside it: balanced, vllm-0.33.0, h20; may be repeated",
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fa3-metadata", description="FlashAttention-3 scheduler metadata: make, explain and check it."
    )
    parser.add_argument("--version", action="version", version=f"fa3-metadata {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    doctor = commands.add_parser("doctor", help="what is installed, attached and switched off here, and why")
    add_doctor_options(doctor)
    demo = commands.add_parser("demo", help="a realistic decode batch, explained, checked and timed")
    add_shape_options(demo)
    _add_output_options(demo)
    demo.set_defaults(
        model="llama-3.1-70b", tp=8, cache_seqlens=_DEMO_LENGTHS, page_size=64, causal=True, engine=None, input=None
    )
    explain_ = commands.add_parser("explain", help="the same for lengths and shapes given here or in a JSON file")
    add_shape_options(explain_)
    add_explain_options(explain_)
    _add_output_options(explain_)
    explain_.add_argument("--no-check", action="store_true", help="do not run the checks")
    explain_.add_argument("--trace", type=pathlib.Path, help="sum up what FA3_METADATA_TRACE recorded of an engine")
    measure = commands.add_parser("measure", help="what a model's decode step gains here, measured")
    add_measure_options(measure)
    tune = commands.add_parser("tune", help="measure this machine's GPU, once, for what is tuned to a GPU")
    add_tune_options(tune, _Parser)
    return parser


def _explained(call: Call) -> Explanation:
    return explain(call.arguments, call.reason, call.card.name if call.card else None)


def _others(options: argparse.Namespace) -> list[tuple[str, str, Explanation]]:
    """(label of the first, label, explanation) of each thing to compare with."""
    found = []
    for what in options.against:
        changed, first = argparse.Namespace(**vars(options)), ""
        call = call_of(options)
        if what in POLICIES:
            changed.policy = what
            first, label = f"policy {call.arguments.get('policy', 'fa3')}", f"policy {what}"
            if what == "fa3":
                changed.batch_invariant = None
        elif what.lower() in CARDS:
            changed.gpu, card = what, find_card(what)
            first, label = call.card.short_name if call.card else "H200", card.short_name
        elif "-" in what:
            changed.build = label = what
            first = call.arguments["build"]
        else:
            raise ValueError(f"--against must be a policy, a build or a card ({', '.join(CARDS)}), got {what!r}")
        found.append((first, label, _explained(call_of(changed))))
    return found


def _panels(explanation: Explanation, others: list[tuple[str, str, Explanation]]) -> list[Panel]:
    firsts = list(dict.fromkeys(first for first, _, _ in others))
    label = ", ".join(firsts) or f"policy {explanation.problem.policy}, {explanation.build}"
    return [Panel(label, explanation.simulation), *(Panel(name, other.simulation) for _, name, other in others)]


def draw(panels: list[Panel], lengths: list[list[int]], path: pathlib.Path, title: str, notes: list[str]) -> None:
    """Draw timelines to a file of any kind that `check_picture` lets pass."""
    if path.suffix.lower() == ".html":
        write_page([Slide("", panels, lengths, notes)], path, title)
    else:
        draw_timelines(panels, lengths, path, title)


def _show(options: argparse.Namespace, call: Call, explanation: Explanation) -> None:
    others = _others(options)
    panels, lengths = _panels(explanation, others), [one.seqlens_k for one in (explanation, *(o[2] for o in others))]
    p = explanation.problem
    model = f"{options.model}, tensor parallel {options.tp}: " if options.model else ""
    shape = f"{model}{p.num_heads}/{p.num_heads_k} q/KV heads, head dim {p.headdim}/{p.value_headdim}, {p.qkv_dtype}"
    check: Callable[[], Any] = lambda: checks(explanation, call.arguments)  # noqa: E731
    if getattr(options, "no_check", False):
        check = lambda: []  # noqa: E731
    elif call.card is not None and p.policy != "fa3":
        check = lambda: ["skipped     the checks: they go by what is known of the GPU here"]  # noqa: E731
    if options.plot:
        draw(
            panels, lengths, options.plot, f"{shape}; {p.batch_size} sequences", [f.text for f in explanation.findings]
        )
    if options.json:
        compared = [{"label": panel.label} | predicted(panel.simulation) for panel in panels[1:]]
        print(json.dumps(explanation.as_json() | {"against": compared, "checks": list(check())}))
        return
    print(f"runs on     {where(call)}")
    print(f"batch       {shape}")
    if options.command == "explain" and options.engine:
        print(f"engine      {options.engine}: {ENGINES[options.engine].words}, unless given")
    print(explanation.as_text(options.all))
    for panel in panels[1:]:
        print(f"\nagainst     {headline([panels[0], panel])}", end="")
    print()
    if others:
        print()
    if options.timeline:
        print_timelines(panels, lengths)
        print()
    if options.plot:
        print(f"drawn       {options.plot}\n")
    for line in check():
        print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0, or 1 where a check failed, or 2 with one line on stderr for what cannot be done."""
    parser = _parser()
    options = parser.parse_args(joined(sys.argv[1:] if argv is None else argv))
    allow_interpreter()
    trace.stop()  # what is asked here is no step of an engine
    say: Callable[[str], None] = lambda line: print(line, flush=True)  # noqa: E731
    try:
        if getattr(options, "plot", None):
            check_picture(options.plot)
        if getattr(options, "timeline", False):
            check_terminal()
        if options.command == "doctor":
            run_doctor(options, say)
        elif options.command == "tune":
            run_tune(options, say)
        elif options.command == "measure":
            run_measure(options, say)
        elif getattr(options, "trace", None):
            run_trace(options, say)
        else:
            call = call_of(options)
            _show(options, call, _explained(call))
        sys.stdout.flush()
    except MismatchError as error:
        sys.stderr.write(f"fa3-metadata: check failed: {error}\n")
        return 1
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, RuntimeError, OSError, MissingExtraError) as error:
        parser.error(_one_line(error))
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
