"""A model from one format into another: megahp's checkpoints, Hugging Face's folders, Megatron-Core's, with tokenizers.

    python tools/convert_checkpoint.py --from megahp --to huggingface runs/first out/
    python tools/convert_checkpoint.py --from huggingface --to megahp llama/ runs/llama [section.key=value ...]
    python tools/convert_checkpoint.py --from megatron --to megahp gpt/ runs/gpt --tokenizer gpt.model

A megahp SRC is a checkpoint, or a run directory: then its newest. A megahp DST becomes a run directory, for `megahp
sample`, whose config.toml trains on from it: megahp train DST/config.toml 'data.train=["my/data"]' log.name=more.
Settings that follow DST are its own from then on, such as train.dtype=bfloat16, which SRC does not tell.

One tensor after another is read, converted and written: memory holds a few of the largest, and the file being written.

At the end both models compute logits of some real text on this machine's CPU, Hugging Face's through transformers where
it is installed, and their largest difference is printed. Exit code 1 means that it is above 1e-5 of the largest logit,
or that the tokenizers differ; 2 a mistake in what was given.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from command import appearing, exit_code
from torch import Tensor

from megahp import checkpoint, config, launch
from megahp.checkpoint.shards import Damaged, Tensors
from megahp.config import Config, resolve
from megahp.convert import huggingface_folder, megatron
from megahp.data.tokenizer import END_OF_DOCUMENT, META_SPACE, Tokenizer, load_tokenizer
from megahp.errors import UserError
from megahp.evaluate.sample import alone
from megahp.model.build import longest, skeleton
from megahp.parallel.layout import Layout
from megahp.parallel.mesh import make_mesh
from megahp.parallel.parameters import saved, storage
from megahp.train.prepare import with_vocabulary
from megahp.train.run import state_of_weights

FORMATS = ("megahp", "huggingface", "megatron", "megatron-legacy")
RTOL = 1e-5  # of the largest logit, in float32
MOST_TOKENS = 512  # of the text
# what of a converted model's settings its next run cannot choose
FIXED = [key for key in config.names() if config.fixed(key) in ("always", "unless dense")]
KEPT = (*FIXED, "model", "data.sequence_length", "data.lengths")


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 for a model that came out another one, 2 for a mistake of the user's."""
    return exit_code(lambda: convert(parser().parse_args(words)))


def convert(arguments: argparse.Namespace) -> int:
    refuse_mistakes(arguments)
    try:
        with appearing(arguments.target) as partial:
            tokenizer = (send if arguments.source_format == "megahp" else take)(arguments, partial)
    except Damaged as error:
        raise UserError(f"the checkpoint is damaged ({error}); convert another one") from None
    print(f"{arguments.target}: written, in files of up to {arguments.file_size:g} GB")
    return 0 if arguments.no_check else compare(arguments, tokenizer)


def refuse_mistakes(arguments: argparse.Namespace) -> None:
    """Raise UserError for options that cannot be meant."""
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


def refuse_files(arguments: argparse.Namespace) -> None:
    """Raise UserError for files and folders that cannot be meant, of any tool that writes a run directory."""
    if arguments.target.exists():
        raise UserError(f"{arguments.target} exists; name a new folder, or remove it")
    if not 0 < arguments.file_size < float("inf"):
        raise UserError(f"--file-size {arguments.file_size:g} must be above 0; 1 is usual")
    if arguments.text and not (arguments.text.is_file() and arguments.text.stat().st_size):
        raise UserError(f"--text {arguments.text} is no file that holds text; name another")


def send(arguments: argparse.Namespace, partial: Path) -> Tokenizer:
    """Write the model of one of our checkpoints as others have it. Returns its tokenizer. Raises UserError."""
    path, settings = of_checkpoint(arguments.source)
    named = arguments.tokenizer or settings.data.tokenizer
    tokenizer = load_tokenizer(named)
    with_vocabulary(settings, tokenizer)
    if arguments.target_format == "huggingface":
        huggingface_folder.write(partial, settings, Tensors(path), tokenizer.eod, limit(arguments))
        write_tokenizer(partial, named, tokenizer)
        return tokenizer
    legacy = arguments.target_format == "megatron-legacy"
    megatron.write(partial, settings, Tensors(path), legacy, limit(arguments))
    if named != "bytes":
        shutil.copyfile(named, partial / f"tokenizer{Path(named).suffix}")
    return tokenizer


def take(arguments: argparse.Namespace, partial: Path) -> Tokenizer:
    """Write a model of others as a run directory of ours. Returns its tokenizer. Raises UserError."""
    said = resolve.parse_overrides(arguments.overrides)
    tree, tensors = read(arguments.source_format, arguments.source, said.get("model", {}))
    named = arguments.tokenizer or tokenizer_in(arguments.source, tree.get("data", {}).get("tokenizer", ""))
    return write_run(arguments, partial, tree, said, named, tensors)


def write_run(
    arguments: argparse.Namespace,
    partial: Path,
    tree: Mapping[str, Mapping[str, Any]],
    said: Mapping[str, Mapping[str, Any]],
    named: str,
    tensors: Iterable[tuple[str, Tensor]],
) -> Tokenizer:
    """Write a run directory, the named tokenizer in it, that has these tensors and, of the tree's settings, those its
    next run cannot choose. said: further settings. Returns the tokenizer. Raises UserError."""
    layer = {
        section: {key: value for key, value in values.items() if f"{section}.{key}".startswith(KEPT)}
        for section, values in tree.items()
    }
    tokenizer = load_tokenizer(named)
    partial.mkdir(parents=True)
    if named != "bytes":
        name = f"tokenizer{Path(named).suffix}"
        shutil.copyfile(named, partial / name)
        named = str(arguments.target / name)
    origin = str(arguments.source)
    resolved = resolve.resolve([(origin, layer), (origin, {"data": {"tokenizer": named}}), ("command line", said)])
    settings = with_vocabulary(resolved.config, tokenizer)
    place = checkpoint.path(partial / "checkpoints", 0)
    fitted = fitting(tensors, shapes_of(settings))
    checkpoint.write(place, fitted, state_of_weights(settings), limit(arguments))
    settings = config.with_values(settings, {"train.start_from": str(arguments.target)})
    (partial / "config.toml").write_text(config.to_toml(settings, resolved.origins), encoding="utf-8")
    return tokenizer


def shapes_of(settings: Config) -> dict[str, torch.Size]:
    """Of the weights by name, of a model that is not made."""
    if not dist.is_initialized():
        launch.join(launch.World(), cuda=False)
    mesh = make_mesh(Layout(), torch.device("cpu"))
    model = skeleton(replace(settings, parallel=config.Parallel()), mesh)
    return {name: weight.shape for name, weight in saved(model).items()}


def fitting(tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, masks among them. Raises UserError unless the weights are those of a model of these shapes."""
    lacking = dict(shapes)
    for name, tensor in tensors:
        if name.startswith("model.") and lacking.pop(name, None) != tensor.shape:
            wanted = f"its {list(shapes[name])}" if name in shapes else "the model's"
            raise UserError(f"{name} of shape {list(tensor.shape)} is not {wanted}; give the sizes the weights have")
        yield name, tensor
    if lacking:
        raise UserError(f"{len(lacking)} tensors are missing, such as {min(lacking)}; give the sizes the weights have")


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
    path, settings = of_checkpoint(ours)
    ids = tokenizer.encode(text)
    tokens = torch.tensor([ids[: min(MOST_TOKENS, longest(settings))]])
    if not ids:
        raise UserError(f"--text {file} holds no text; name another file")
    logits, (through, others) = (
        our_logits(settings, weights_of(Tensors(path).items()), tokens),
        their_logits(arguments, tokens),
    )
    difference, largest = (logits - others).abs().max().item(), logits.abs().max().item()
    print(
        f"logits: at most {difference:.3g} apart, {difference / largest:.2g} of the largest, on {tokens.numel()} "
        f"tokens of {file}, through megahp and {through}"
    )
    if not difference <= RTOL * largest:
        print(f"error: more than {RTOL:g}: {arguments.target} is another model", file=sys.stderr)
        return 1
    if sending and through == "transformers" and their_ids(theirs, text) != ids:
        print(f"error: transformers makes other tokens of {file}: convert with another --tokenizer", file=sys.stderr)
        return 1
    return 0


def of_checkpoint(place: Path) -> tuple[Path, Config]:
    """A checkpoint, and the settings it was written under."""
    path = checkpoint.find(place)
    return path, resolve.from_dict(checkpoint.read_state(path)["config"], str(path))


def limit(arguments: argparse.Namespace) -> int:
    return int(arguments.file_size * 1e9)


@torch.no_grad()
def our_logits(settings: Config, weights: Iterable[tuple[str, Tensor]], tokens: Tensor) -> Tensor:
    """[1, s, vocabulary] in float32 (float64 for a model of float64) from tokens [1, s]. Raises UserError for weights
    that are not the model's."""
    dtype = "float64" if settings.train.dtype == "float64" else "float32"
    model = alone(config.with_values(settings, {"train.dtype": dtype, "train.device": "cpu"}))
    places = saved(model)
    for name, weight in fitting(weights, {name: place.shape for name, place in places.items()}):
        storage(places[name]).copy_(weight)
    return model(tokens)[..., : settings.model.vocab_size]


@torch.no_grad()
def their_logits(arguments: argparse.Namespace, tokens: Tensor) -> tuple[str, Tensor]:
    """Through what, and the logits of a folder of theirs."""
    sending = arguments.source_format == "megahp"
    form = arguments.target_format if sending else arguments.source_format
    folder = arguments.target if sending else arguments.source
    if form != "huggingface" or importlib.util.find_spec("transformers") is None:
        layer, tensors = read(form, folder, resolve.parse_overrides(arguments.overrides).get("model", {}))
        settings = resolve.resolve([(str(folder), layer)]).config
        return f"its own import of {folder}", our_logits(settings, weights_of(tensors), tokens)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    wide = torch.promote_types(model.dtype, torch.float32)
    return "transformers", model.to(wide)(tokens).logits


def weights_of(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in tensors if name.startswith("model."))


def their_ids(folder: Path, text: str) -> list[int]:
    """What transformers makes of a text."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)(text, add_special_tokens=False)["input_ids"]


def tokenizer_in(folder: Path, named: str) -> str:
    """The tokenizer of a folder of theirs; named: the one we once wrote it from. Raises UserError."""
    if named == "bytes":
        return named
    found = [file for file in (folder / "tokenizer.json", folder / "tokenizer.model") if file.exists()]
    alike = [file for file in found if file.suffix == Path(named).suffix]
    if not found:
        raise UserError(f"{folder} has neither tokenizer.json nor tokenizer.model; name a tokenizer by --tokenizer")
    return str((alike or found)[0])


def write_tokenizer(folder: Path, named: str, tokenizer: Tokenizer) -> None:
    """Have transformers make the same tokens of a text."""
    file = folder / f"tokenizer{'.json' if named == 'bytes' else Path(named).suffix}"
    told: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if named == "bytes":
        file.write_text(json.dumps(bytes_tokenizer(tokenizer.eod)), encoding="utf-8")
    else:
        shutil.copyfile(named, file)
    if file.suffix == ".model":
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=named)
        told |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": False, "legacy": False}
        told |= {"add_prefix_space": pieces.encode("a", out_type=str)[0].startswith(META_SPACE), "bos_token": None}
        told |= {"unk_token": pieces.id_to_piece(pieces.unk_id()), "eos_token": pieces.id_to_piece(tokenizer.eod)}
    else:
        from tokenizers import Tokenizer as Fast

        told["eos_token"] = Fast.from_file(str(file)).id_to_token(tokenizer.eod)
    (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def bytes_tokenizer(eod: int) -> dict[str, Any]:
    """tokenizer.json of our bytes: a byte-level BPE without merges."""
    letters = byte_letters()
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [{"id": eod, "content": END_OF_DOCUMENT[0], "special": True, **flags}],
        "pre_tokenizer": plain,
        "decoder": plain,
        "model": {"type": "BPE", "vocab": {letter: byte for byte, letter in letters.items()}, "merges": []},
    }


def byte_letters() -> dict[int, str]:
    """The letter of each byte in byte-level tokenizers: one that cannot be shown has a letter above 255, as GPT-2 has
    it."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in shown}
    return letters | {byte: chr(256 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in letters)}


def parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(description=__doc__, formatter_class=plain, allow_abbrev=False)
    options.add_argument("--from", dest="source_format", choices=FORMATS, required=True)
    options.add_argument("--to", dest="target_format", choices=FORMATS, required=True)
    options.add_argument("source", type=Path, metavar="SRC")
    options.add_argument("target", type=Path, metavar="DST")
    options.add_argument("overrides", nargs="*", metavar="section.key=value", help="with --to megahp")
    options.add_argument("--tokenizer", metavar="FILE", help="in place of SRC's")
    options.add_argument("--file-size", type=float, default=1, metavar="GB", help="of one file at most (default 1)")
    options.add_argument("--text", type=Path, metavar="FILE", help="for the check (default: a source file of Python's)")
    options.add_argument("--allow-pickle", action="store_true", help="read what Megatron's legacy format is")
    options.add_argument("--no-check", action="store_true", help="do not compare logits")
    return options


if __name__ == "__main__":
    sys.exit(main())
