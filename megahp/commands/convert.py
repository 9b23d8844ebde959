"""A model from one format into another: megahp's checkpoints, Hugging Face's folders, Megatron-Core's, with tokenizers.

    megahp convert --from megahp --to huggingface runs/first out/
    megahp convert --from huggingface --to megahp llama/ runs/llama [section.key=value ...]
    megahp convert --from megatron --to megahp gpt/ runs/gpt --tokenizer gpt.model

A megahp SRC is a checkpoint, or a run directory: then its newest. A megahp DST becomes a run directory, for `megahp
sample`, whose config.toml trains on from it: megahp train DST/config.toml 'data.train=["my/data"]' log.name=more.
Settings that follow DST are its own from then on, such as train.dtype=bfloat16, which SRC does not tell.

One tensor after another is read, converted and written: memory holds a few of the largest, and the file being written.

At the end both models compute logits of some real text on this machine's CPU, Hugging Face's through transformers where
it is installed, and their largest difference is printed. Exit code 1 means that it is above 1e-5 of the largest logit,
or that the tokenizers differ; 2 a mistake in what was given.
"""

import argparse
import importlib.util
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megahp.checkpoint.shards import Tensors
from megahp.commands.output import appearing
from megahp.config import Config, resolve, with_values
from megahp.convert import huggingface_folder, megatron
from megahp.convert.run_directory import fitting, limit, of_checkpoint, refuse_files, write_run
from megahp.convert.tokenizers import tokenizer_in, write_tokenizer
from megahp.data.tokenizer import Tokenizer, load_tokenizer
from megahp.errors import UserError, complain, in_one_line
from megahp.evaluate.sample import alone
from megahp.model.build import longest
from megahp.parallel.parameters import saved, storage
from megahp.train.prepare import with_vocabulary

FORMATS = ("megahp", "huggingface", "megatron", "megatron-legacy")
RTOL = 1e-5  # of the largest logit, in float32
MOST_TOKENS = 512  # of the text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", dest="source_format", choices=FORMATS, required=True)
    add("--to", dest="target_format", choices=FORMATS, required=True)
    add("source", type=Path, metavar="SRC")
    add("target", type=Path, metavar="DST")
    add("overrides", nargs="*", metavar="section.key=value", help="with --to megahp")
    add("--tokenizer", metavar="FILE", help="in place of SRC's")
    add("--file-size", type=float, default=1, metavar="GB", help="of one file at most (default 1)")
    add("--text", type=Path, metavar="FILE", help="for the check (default: a source file of Python's)")
    add("--allow-pickle", action="store_true", help="read what Megatron's legacy format is")
    add("--no-check", action="store_true", help="do not compare logits")


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    formats = arguments.source_format, arguments.target_format
    if formats.count("megahp") != 1:
        raise UserError(f"--from {formats[0]} --to {formats[1]}: one of the two must be megahp; convert twice")
    if arguments.overrides and formats[0] == "megahp":
        raise UserError(f"{arguments.overrides[0]}: settings are for --to megahp; leave it out")
    if formats[0] == "megatron-legacy" and not arguments.allow_pickle:
        raise UserError(f"{arguments.source} is a pickle; --allow-pickle reads it, without executing what it names")
    if arguments.allow_pickle and formats[0] != "megatron-legacy":
        raise UserError("--allow-pickle is for --from megatron-legacy; leave it out")
    if arguments.text and arguments.no_check:
        raise UserError(f"--text {arguments.text} is for the check; leave it or --no-check out")
    refuse_files(arguments)
    with appearing(arguments.target) as partial:
        tokenizer = (send if arguments.source_format == "megahp" else take)(arguments, partial)
    print(f"{arguments.target}: written, in files of up to {arguments.file_size:g} GB")
    return 0 if arguments.no_check else compare(arguments, tokenizer)


def send(arguments: argparse.Namespace, partial: Path) -> Tokenizer:
    """Write the model of one of our checkpoints as others have it. Returns its tokenizer. Raises UserError."""
    path, config = of_checkpoint(arguments.source)
    named = arguments.tokenizer or config.data.tokenizer
    tokenizer = load_tokenizer(named)
    with_vocabulary(config, tokenizer)
    if arguments.target_format == "huggingface":
        huggingface_folder.write(partial, config, Tensors(path), tokenizer.eod, limit(arguments))
        write_tokenizer(partial, named, tokenizer)
        return tokenizer
    megatron.write(partial, config, Tensors(path), arguments.target_format == "megatron-legacy", limit(arguments))
    if named != "bytes":
        shutil.copyfile(named, partial / f"tokenizer{Path(named).suffix}")
    return tokenizer


def take(arguments: argparse.Namespace, partial: Path) -> Tokenizer:
    """Write a model of others as a run directory of ours. Returns its tokenizer. Raises UserError."""
    said = resolve.parse_overrides(arguments.overrides)
    tree, tensors = read(arguments.source_format, arguments.source, said.get("model", {}))
    named = arguments.tokenizer or tokenizer_in(arguments.source, tree.get("data", {}).get("tokenizer", ""))
    return write_run(arguments, partial, tree, said, named, tensors)


def read(form: str, folder: Path, given: Mapping[str, Any]) -> tuple[Any, Iterator[tuple[str, Tensor]]]:
    """Settings, as a layer for `resolve`, and tensors of a model of others; given: what is said of [model]."""
    if form == "huggingface":
        return huggingface_folder.read(folder)
    return megatron.read(folder, form == "megatron-legacy", given)


def compare(arguments: argparse.Namespace, tokenizer: Tokenizer) -> int:
    """Print how far the two models' logits are apart. Returns the exit code."""
    file = arguments.text or Path(argparse.__file__)
    text = file.read_text(encoding="utf-8", errors="replace")
    sending = arguments.source_format == "megahp"
    ours, theirs = (arguments.source, arguments.target)[:: 1 if sending else -1]
    path, config = of_checkpoint(ours)
    ids = tokenizer.encode(text)
    tokens = torch.tensor([ids[: min(MOST_TOKENS, longest(config))]])
    if not ids:
        raise UserError(f"--text {file} holds no text; name another file")
    logits = our_logits(config, weights_of(Tensors(path).items()), tokens)
    through, others = their_logits(arguments, theirs, tokens)
    difference, largest = (logits - others).abs().max().item(), logits.abs().max().item()
    apart = f"at most {difference:.3g} apart, {difference / largest:.2g} of the largest"
    print(f"logits: {apart}, on {tokens.numel()} tokens of {file}, through megahp and {through}")
    if not difference <= RTOL * largest:
        complain(f"more than {RTOL:g}: {arguments.target} is another model")
        return 1
    if sending and through == "transformers":
        from transformers import AutoTokenizer

        theirs_of = AutoTokenizer.from_pretrained(theirs, local_files_only=True)
        if theirs_of(text, add_special_tokens=False)["input_ids"] != ids:
            complain(f"transformers makes other tokens of {file}: convert with another --tokenizer")
            return 1
    return 0


@torch.no_grad()
def our_logits(config: Config, weights: Iterable[tuple[str, Tensor]], tokens: Tensor) -> Tensor:
    """[1, s, vocabulary] in float32 (float64 for a model of float64) from tokens [1, s]. Raises UserError for weights
    that are not the model's."""
    dtype = "float64" if config.train.dtype == "float64" else "float32"
    model = alone(with_values(config, {"train.dtype": dtype, "train.device": "cpu"}))
    places = saved(model)
    for name, weight in fitting(weights, {name: place.shape for name, place in places.items()}):
        storage(places[name]).copy_(weight)
    return model(tokens)[..., : config.model.vocab_size]


@torch.no_grad()
def their_logits(arguments: argparse.Namespace, folder: Path, tokens: Tensor) -> tuple[str, Tensor]:
    """Through what, and the logits of a folder of theirs."""
    form = next(each for each in (arguments.source_format, arguments.target_format) if each != "megahp")
    if form != "huggingface" or importlib.util.find_spec("transformers") is None:
        layer, tensors = read(form, folder, resolve.parse_overrides(arguments.overrides).get("model", {}))
        config = resolve.resolve([(str(folder), layer)]).config
        return f"its own import of {folder}", our_logits(config, weights_of(tensors), tokens)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as bare:
        huggingface_folder.link_without_code(folder, Path(bare))
        try:
            model = AutoModelForCausalLM.from_pretrained(
                bare, local_files_only=True, trust_remote_code=False, use_safetensors=True, attn_implementation="eager"
            ).eval()
        except Exception as error:  # of a config.json that others wrote it raises many kinds
            why = f"transformers cannot load {folder} ({in_one_line(error)})"
            raise UserError(f"{why}; mend its config.json, or leave the check out with --no-check") from None
        wide = torch.promote_types(model.dtype, torch.float32)
        return "transformers", model.to(wide)(tokens).logits


def weights_of(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in tensors if name.startswith("model."))
