"""Generate text from a run's newest checkpoint, or from a given one."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from megahp.errors import UserError
from megahp.files import open_unlinked


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory, or a checkpoint of it")
    add("--prompt", default="", help="text to continue")
    add("--tokens", type=int, default=200, help="tokens to generate (default 200)")
    add("--temperature", type=float, default=0.8, help="0 = always the likeliest token (default 0.8)")
    add("--top-k", type=int, default=50, help="sample from the k likeliest tokens; 0 = all (default 50)")
    add("--seed", type=int, default=1, help="of the sampling (default 1)")
    add("--samples", type=int, default=1, help="texts that continue the prompt, sampled as a batch (default 1)")
    add("--save", action="store_true", help="write the text to RUN/sample.txt, for the report")


def run(options: Namespace, words: Sequence[str]) -> int:
    from megahp.checkpoint import is_checkpoint
    from megahp.evaluate.sample import generate

    if options.save and (is_checkpoint(options.run) or options.run.name == "checkpoints"):
        raise UserError(
            f"--save writes into a run directory, which {options.run} is not; name the run, or remove --save"
        )
    how = options.temperature, options.top_k, options.seed, options.samples
    text = "\n\n---\n\n".join(generate(options.run, options.prompt, options.tokens, *how))
    print(text)
    if options.save:
        with open_unlinked(options.run / "sample.txt", "w") as file:
            file.write(text)
    return 0
