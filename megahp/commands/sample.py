"""Generate text from a run's newest checkpoint."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from megahp.files import open_unlinked


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory")
    add("--prompt", default="", help="text to go on from")
    add("--tokens", type=int, default=200, help="tokens to generate (default 200)")
    add("--temperature", type=float, default=0.8, help="0 = the likeliest token (default 0.8)")
    add("--top-k", type=int, default=50, help="choose among so many likeliest tokens; 0 = all (default 50)")
    add("--seed", type=int, default=1, help="of the choices (default 1)")
    add("--save", action="store_true", help="keep it in the run directory, for the report")


def run(options: Namespace, words: Sequence[str]) -> int:
    from megahp.evaluate.sample import generate

    text = generate(options.run, options.prompt, options.tokens, options.temperature, options.top_k, options.seed)
    print(text)
    if options.save:
        with open_unlinked(options.run / "sample.txt", "w") as file:
            file.write(text)
    return 0
