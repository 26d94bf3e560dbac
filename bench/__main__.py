"""python -m bench COMMAND [options]: what is measured, and what is checked over minutes, on a GPU or in wheels."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "metadata": "the metadata stage alone, ours beside others: device and host time by batch size",
    "plot": "draw what `metadata` measured",
    "schedules": "one layer's attention by FA3's schedules, by ours and by the best",
    "simulated": "the simulator of schedules against recorded times; no GPU needed",
    "decode-step": "a whole decode step of real models: FA3 per layer, SGLang's precompute, ours",
    "sglang-decode": "decode steps of a real SGLang: without metadata, with its own, with ours",
    "sglang-check": "a real SGLang's logits with and without our metadata, bit for bit",
    "sglang-ranks": "a real SGLang on two GPUs: logits, and the time of a step",
    "vllm-decode": "decode steps of a real vLLM: without metadata, with its own, with ours",
    "vllm-check": "a real vLLM's logits with and without our metadata, bit for bit",
    "install-check": "what install() gives to an sgl-kernel that makes no metadata: every output compared, times",
    "wheel-rules": "our rules against published wheels themselves: tiles, splits, packing; no GPU needed",
    "illustrate": "the pictures and numbers of docs, from the commands beside them; no GPU needed",
    "releases": "the table of supported builds, from what is recorded of each",
    "record": "what an installed wheel's own op makes of random calls, for tests/data",
    "host": "what a call costs the host, beside another commit",
    "combining": "what the bound on splits costs, the splits being the same",
    "stress": "random replays of captured steps, every output compared bitwise",
    "mutate": "whether the tests notice one-line breaks of the code; no GPU needed",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit status. 2: there is no such command, or it cannot run with these arguments or here."""
    arguments = sys.argv[1:] if argv is None else argv
    usage = "\n".join(["python -m bench COMMAND [options]", *(f"  {name:14}{says}" for name, says in COMMANDS.items())])
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage)
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        print(usage, file=sys.stderr)
        return 2
    module = import_module(f"bench.{arguments[0].replace('-', '_')}")  # lazily: each needs other packages
    status: int | None = module.main(arguments[1:])
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
