"""`tune-bisenet VERB` and `python -m tune_bisenet VERB`: one command for all that is done with searches and models."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import Final

from tune_bisenet.errors import OK, WRONG_INPUT, print_problems

VERBS: Final = {
    "run": ("tune_bisenet.run", "train the rows of a space, or search around them"),
    "report": ("tune_bisenet.report.__main__", "write a search's page, and print what became of each row"),
    "export": ("tune_bisenet.inference.export", "write the best network as ONNX, a PyTorch program or safetensors"),
    "evaluate": ("tune_bisenet.inference.evaluate", "score a model on labelled frames"),
    "predict": ("tune_bisenet.inference.predict", "label pictures and videos"),
    "benchmark": ("tune_bisenet.inference.benchmark", "time a model on this machine"),
}
"""Each with its module, which is imported when it is called, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb that the first word names on the other words; return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {verb:<11}{text}" for verb, (_module, text) in VERBS.items()]
        sys.stdout.write("usage: tune-bisenet VERB ...\n\n" + "\n".join(lines) + "\n\nVERB --help says more.\n")
        return OK
    verb, *rest = words
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        print_problems([f"there is no verb {verb}: the verbs are {', '.join(VERBS)}.{hint}"])
        return WRONG_INPUT
    module = importlib.import_module(VERBS[verb][0])
    if verb == "run":
        sys.argv[1:] = rest  # its two processes both read it
        return int(module.command())
    return int(module.main(rest))


if __name__ == "__main__":
    sys.exit(main())
