"""Convert a model between megahp's checkpoints, Hugging Face's folders and Megatron-Core's, with its tokenizer.

    megahp convert --from megahp --to huggingface runs/first out/
    megahp convert --from huggingface --to megahp llama/ runs/llama [section.key=value ...]
    megahp convert --from megatron --to megahp gpt/ runs/gpt --tokenizer gpt.model

A megahp SRC is a checkpoint, or a run directory: its newest. A megahp DST becomes a run directory, for `megahp sample`,
and its config.toml continues training: megahp train DST/config.toml 'data.train=["my/data"]' log.name=more. Settings
after DST, such as train.dtype=bfloat16, are fixed in it from then on.

Tensors are read, converted and written one by one: memory holds a few of the largest, and the file being written.

At the end both models compute logits of some real text on this machine's CPU, Hugging Face's through transformers if
it is installed, and you see the largest difference. Exit code 1: it is above 1e-5 of the largest logit, the
tokenizers differ, or nothing could be compared, and DST is written all the same; 2: invalid input, and no DST.
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
from megahp.commands.output import atomic_folder
from megahp.config import Config, longest, resolve, with_values
from megahp.convert import huggingface_folder, megatron
from megahp.convert.run_directory import check_files, check_shapes, file_limit, find_checkpoint, write_run
from megahp.convert.tokenizers import find_tokenizer, write_tokenizer
from megahp.data.tokenizer import Tokenizer, tokenizer_of
from megahp.errors import UserError, complain, in_one_line
from megahp.evaluate.sample import single_rank_model
from megahp.parallel.parameters import model_state, storage
from megahp.train.prepare import with_vocabulary

FORMATS = ("megahp", "huggingface", "megatron", "megatron-legacy")
RTOL = 1e-5  # of the largest logit, in float32
MAX_TOKENS = 512  # of the text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", dest="source_format", choices=FORMATS, required=True)
    add("--to", dest="target_format", choices=FORMATS, required=True)
    add("source", type=Path, metavar="SRC")
    add("target", type=Path, metavar="DST")
    add("overrides", nargs="*", metavar="section.key=value", help="with --to megahp")
    add("--tokenizer", metavar="FILE", help="instead of SRC's")
    add("--file-size", type=float, default=1, metavar="GB", help="maximum size of a file (default 1)")
    add("--text", type=Path, metavar="FILE", help="for the check (default: a source file of Python's)")
    add("--allow-pickle", action="store_true", help="read Megatron's legacy format, which is a pickle")
    add("--no-check", action="store_true", help="do not compare logits")


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    formats = arguments.source_format, arguments.target_format
    if formats.count("megahp") != 1:
        raise UserError(f"--from {formats[0]} --to {formats[1]}: one of the two must be megahp; convert twice")
    if arguments.overrides and formats[0] == "megahp":
        raise UserError(f"{arguments.overrides[0]}: settings are for --to megahp; omit it")
    if formats[0] == "megatron-legacy" and not arguments.allow_pickle:
        raise UserError(f"{arguments.source} is a pickle; --allow-pickle reads it, without executing what it names")
    if arguments.allow_pickle and formats[0] != "megatron-legacy":
        raise UserError("--allow-pickle is for --from megatron-legacy; omit it")
    if arguments.text and arguments.no_check:
        raise UserError(f"--text {arguments.text} is for the check; omit it or --no-check")
    check_files(arguments)
    with atomic_folder(arguments.target) as partial:
        tokenizer = (export if formats[0] == "megahp" else import_)(arguments, partial)
    print(f"{arguments.target}: written, in files of up to {arguments.file_size:g} GB")
    if arguments.no_check:
        return 0
    try:
        return compare(arguments, tokenizer)
    except UserError as error:  # not 2, after which there is no output
        complain(f"{arguments.target} is there, and not checked: {error}")
        return 1


def export(arguments: argparse.Namespace, partial: Path) -> Tokenizer:
    """Write the model of one of our checkpoints in another format. Returns its tokenizer. Raises UserError."""
    path, config = find_checkpoint(arguments.source)
    name = arguments.tokenizer or config.data.tokenizer
    tokenizer, limit = tokenizer_of(config.data, name), file_limit(arguments)
    with_vocabulary(config, tokenizer)  # raises where the tokenizer is another one than the model's
    if arguments.target_format == "huggingface":
        huggingface_folder.write(partial, config, Tensors(path), tokenizer.eod, limit)
        write_tokenizer(partial, name, tokenizer)
        return tokenizer
    megatron.write(partial, config, Tensors(path), arguments.target_format == "megatron-legacy", limit)
    if name != "bytes":
        shutil.copyfile(name, partial / f"tokenizer{Path(name).suffix}")
    return tokenizer


def import_(arguments: argparse.Namespace, partial: Path) -> Tokenizer:
    """Write a model of another format as a run directory. Returns its tokenizer. Raises UserError."""
    overrides = resolve.parse_overrides(arguments.overrides)
    settings, tensors = read(arguments.source_format, arguments.source, overrides.get("model", {}))
    original = settings.get("data", {}).get("tokenizer", "")
    name = arguments.tokenizer or find_tokenizer(arguments.source, original)
    return write_run(arguments, partial, settings, overrides, name, tensors)


def read(form: str, folder: Path, overrides: Mapping[str, Any]) -> tuple[Any, Iterator[tuple[str, Tensor]]]:
    """Return the settings, as a layer for `resolve`, and tensors of another format; overrides: settings of [model]."""
    if form == "huggingface":
        return huggingface_folder.read(folder)
    return megatron.read(folder, form == "megatron-legacy", overrides)


def compare(arguments: argparse.Namespace, tokenizer: Tokenizer) -> int:
    """Print the largest difference between the two models' logits. Returns the exit code."""
    file = arguments.text or Path(argparse.__file__)
    text = file.read_text(encoding="utf-8", errors="replace")
    exporting = arguments.source_format == "megahp"
    ours, theirs = (arguments.source, arguments.target)[:: 1 if exporting else -1]
    path, config = find_checkpoint(ours)
    ids = tokenizer.encode(text)
    if not ids:
        raise UserError(f"--text {file} holds no text; name another file")
    tokens = torch.tensor([ids[: min(MAX_TOKENS, longest(config))]])
    our = our_logits(config, weights_of(Tensors(path).items()), tokens)
    library, their = their_logits(arguments, theirs, tokens)
    difference, largest = (our - their).abs().max().item(), our.abs().max().item()
    relative = f"largest difference {difference:.3g}, {difference / largest:.2g} of the largest logit"
    print(f"logits: {relative}, on {tokens.numel()} tokens of {file}, through megahp and {library}")
    if not difference <= RTOL * largest:  # also true of NaN
        complain(f"more than {RTOL:g}: {arguments.target} is another model")
        return 1
    if exporting and library == "transformers":
        from transformers import AutoTokenizer

        encode = AutoTokenizer.from_pretrained(theirs, local_files_only=True)
        if encode(text, add_special_tokens=False)["input_ids"] != ids:
            complain(f"transformers encodes {file} to other tokens; convert with another --tokenizer")
            return 1
    return 0


@torch.no_grad()
def our_logits(config: Config, weights: Iterable[tuple[str, Tensor]], tokens: Tensor) -> Tensor:
    """Return logits [1, s, vocabulary], float32 (float64 for a float64 model), of tokens [1, s]. Raises UserError for
    weights that are not the model's."""
    dtype = "float64" if config.train.dtype == "float64" else "float32"
    model = single_rank_model(with_values(config, {"train.dtype": dtype, "train.device": "cpu"}))
    parameters = model_state(model)
    for name, weight in check_shapes(weights, {name: parameter.shape for name, parameter in parameters.items()}):
        storage(parameters[name]).copy_(weight)
    return model(tokens)[..., : config.model.vocab_size]


@torch.no_grad()
def their_logits(arguments: argparse.Namespace, folder: Path, tokens: Tensor) -> tuple[str, Tensor]:
    """Return the logits of a model in another format, and what computed them: transformers or our own import."""
    form = next(form for form in (arguments.source_format, arguments.target_format) if form != "megahp")
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
        except Exception as error:  # a config.json from elsewhere may raise any kind
            why = f"transformers cannot load {folder} ({in_one_line(error)})"
            raise UserError(f"{why}; mend its config.json, or skip the check with --no-check") from None
        dtype = torch.promote_types(model.dtype, torch.float32)
        return "transformers", model.to(dtype)(tokens).logits


def weights_of(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in tensors if name.startswith("model."))
