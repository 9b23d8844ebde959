"""Convert a model between megahp's checkpoints, Hugging Face's folders and Megatron-Core's, with its tokenizer.

    megahp convert --from megahp --to huggingface runs/first out/
    megahp convert --from huggingface --to megahp llama/ runs/llama [section.key=value ...]
    megahp convert --from megatron --to megahp gpt/ runs/gpt --tokenizer gpt.model

A megahp SRC is a checkpoint, or a run directory: its newest. A megahp DST becomes a run directory, for `megahp sample`,
and its config.toml continues training: megahp train DST/config.toml 'data.train=["my/data"]' log.name=more. Settings
after DST, such as train.dtype=bfloat16, are fixed in it from then on.

Tensors are read, converted and written one by one: memory holds a few of the largest, and the file being written.

Before DST appears both models compute the logits of some real text in float64 on this machine's CPU, Hugging Face's
through transformers (pip install 'megahp[huggingface]'), and you see the largest difference. Exit code 1: it is above
1e-5 of the largest logit, or an exported tokenizer makes other tokens, and there is no DST; 2: invalid input, and no
DST; 3: DST is there, but not checked, since transformers is missing or cannot load the model, or the other format is
Megatron's, of which we have no second reader. --no-check asks for that, and ends with 0.
"""

import argparse
import importlib.util
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megahp.checkpoint.shards import Tensors
from megahp.commands.output import atomic_folder
from megahp.config import Config, longest, resolve, with_values
from megahp.convert import huggingface_folder, megatron
from megahp.convert.families import FAMILIES
from megahp.convert.run_directory import check_files, check_shapes, find_checkpoint, write_run
from megahp.convert.tokenizers import KEPT, OF_A_MODEL, find_tokenizer, keep_files, special_tokens, write_tokenizer
from megahp.data.tokenizer import Tokenizer, tokenizer_of
from megahp.errors import Fault, UserError, in_one_line
from megahp.evaluate.sample import single_rank_model
from megahp.exit_codes import FINISHED, NOT_CHECKED
from megahp.parallel.device import memory_here
from megahp.parallel.parameters import model_state, storage
from megahp.scaling.flops import parameters as parameter_count
from megahp.train.prepare import with_vocabulary

FORMATS = ("megahp", "huggingface", "megatron", "megatron-legacy")
RTOL = 1e-5  # of the largest logit
RTOL_MOST = 1e-3  # where transformers' own float32 is far from its float64
MAX_TOKENS = 512  # of the text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", dest="source_format", choices=FORMATS, required=True)
    add("--to", dest="target_format", choices=FORMATS, required=True)
    add("source", type=Path, metavar="SRC")
    add("target", type=Path, metavar="DST")
    add("overrides", nargs="*", metavar="section.key=value", help="with --to megahp")
    add("--tokenizer", metavar="FILE", help="instead of SRC's")
    types = [family.model_type for family in FAMILIES]
    add("--architecture", choices=types, metavar="TYPE", help="with --to huggingface (default: the first that fits)")
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
    if arguments.architecture and formats[1] != "huggingface":
        raise UserError(f"--architecture {arguments.architecture} is for --to huggingface; omit it")
    if arguments.text and arguments.no_check:
        raise UserError(f"--text {arguments.text} is for the check; omit it or --no-check")
    check_files(arguments)
    unchecked = "--no-check"
    with atomic_folder(arguments.target) as partial:  # removed where the check finds a difference
        tokenizer = (export if formats[0] == "megahp" else import_)(arguments, partial)
        if not arguments.no_check:
            unchecked = compare(arguments, partial, tokenizer)
    print(f"{arguments.target}: written, in files of up to {arguments.file_size:g} GB")
    if unchecked:
        print(f"not checked: {unchecked}")
    return NOT_CHECKED if unchecked and not arguments.no_check else FINISHED


def export(arguments: argparse.Namespace, partial: Path) -> Tokenizer:
    """Write the model of one of our checkpoints in another format. Returns its tokenizer. Raises UserError."""
    path, config = find_checkpoint(arguments.source)
    name = arguments.tokenizer or config.data.tokenizer
    tokenizer, limit = tokenizer_of(config.data, name), int(1e9 * arguments.file_size)
    with_vocabulary(config, tokenizer)  # raises where the tokenizer is another one than the model's
    if config.model.quantize != "none":
        print(f"weights are written as trained, and the run reads them in {config.model.quantize}; quantize the result")
    if arguments.target_format == "huggingface":
        special = special_tokens(name, tokenizer.eod)
        huggingface_folder.write(partial, config, Tensors(path), special, limit, arguments.architecture)
        write_tokenizer(partial, name, tokenizer)
        return tokenizer
    megatron.write(partial, config, Tensors(path), arguments.target_format == "megatron-legacy", limit)
    if found := megatron.padding(config):
        print(found)
    if name != "bytes":
        shutil.copyfile(name, partial / f"tokenizer{Path(name).suffix}")
    return tokenizer


def import_(arguments: argparse.Namespace, partial: Path) -> Tokenizer:
    """Write a model of another format as a run directory. Returns its tokenizer. Raises UserError."""
    overrides = resolve.parse_overrides(arguments.overrides)
    settings, tensors = read(arguments.source_format, arguments.source, overrides.get("model", {}))
    original = settings.get("data", {}).get("tokenizer", "")
    name = arguments.tokenizer or find_tokenizer(arguments.source, original)
    tokenizer = write_run(arguments, partial, settings, overrides, name, tensors)
    if arguments.source_format == "huggingface" and name != "bytes":
        keep_files(arguments.source, partial, OF_A_MODEL)
        if Path(name).stem == "tokenizer":  # the usual name, so that what is beside it belongs to it
            keep_files(Path(name).parent, partial, KEPT)
    return tokenizer


def read(form: str, folder: Path, overrides: Mapping[str, Any]) -> tuple[Any, Iterator[tuple[str, Tensor]]]:
    """Return the settings, as a layer for `resolve`, and tensors of another format; overrides: settings of [model]."""
    if form == "huggingface":
        return huggingface_folder.read(folder)
    return megatron.read(folder, form == "megatron-legacy", overrides)


def compare(arguments: argparse.Namespace, written: Path, tokenizer: Tokenizer) -> str:
    """Compare the logits of the source and of what was written, and print their largest difference.

    Returns why the model is not checked, "" if it is. Raises Fault for another model, or other tokens, and UserError
    for a text without tokens.
    """
    file = arguments.text or Path(argparse.__file__)
    text = file.read_text(encoding="utf-8", errors="replace")
    exporting = arguments.source_format == "megahp"
    ours, theirs = (arguments.source, written) if exporting else (written, arguments.source)
    path, config = find_checkpoint(ours)
    ids = tokenizer.encode(text)
    if not ids:
        raise UserError(f"--text {file} holds no text; name another file")
    needed, memory = 8 * parameter_count(config.model, longest(config)), memory_here()
    if needed > memory:
        return f"its weights take {needed / 1e9:,.0f} GB in float64, and this machine has {memory / 1e9:,.0f} GB"
    tokens = torch.tensor([ids[: min(MAX_TOKENS, longest(config))]])
    form = arguments.target_format if exporting else arguments.source_format
    is_independent = form == "huggingface" and importlib.util.find_spec("transformers") is not None
    our = our_logits(config, weights_of(Tensors(path).items()), tokens)
    try:
        their = their_logits(theirs, tokens) if is_independent else reread_logits(arguments, form, theirs, tokens)
        their = their[..., : config.model.vocab_size]  # without rows that pad it
        difference, largest = (our - their).abs().max().item(), our.abs().max().item()
        limit = RTOL * largest
        if is_independent and limit < difference:
            # where a multiplier was folded, weights are rounded, which a deep model may amplify as much as the
            # rounding of a computation in float32
            rounded = their_logits(theirs, tokens, torch.float32)[..., : config.model.vocab_size]
            limit = max(limit, 4 * (rounded - their).abs().max().item())
        same = encodes(theirs, text, ids) if exporting and is_independent else True
    except NotLoaded as error:
        return str(error)
    relative = f"largest difference {difference:.3g}, {difference / largest:.2g} of the largest logit"
    library = "transformers" if is_independent else f"its own import of {form}"
    print(f"logits: {relative}, on {tokens.numel()} tokens of {file}, through megahp and {library}")
    if not difference <= min(limit, RTOL_MOST * largest):  # also true of NaN
        raise Fault(f"{arguments.target} would be another model, by more than {RTOL:g}: not written")
    if not same:
        remedy = "convert with another --tokenizer"
        raise Fault(f"transformers encodes {file} to other tokens; {arguments.target} is not written; {remedy}")
    if is_independent:
        return ""
    remedy = "pip install 'megahp[huggingface]'" if form == "huggingface" else "Megatron's formats have no other here"
    return f"megahp alone has read it, which finds damage, but not what it misunderstands; {remedy}"


class NotLoaded(Exception):
    """transformers cannot load or run a model or its tokenizer, for a reason in one line."""


class InFloat64(TorchFunctionMode):
    """Compute in float64 also what asks for float32: norms, softmax and rotary embeddings, of transformers and ours."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        function = Tensor.double if function is Tensor.float else function
        return function(*map(widened, args), **{key: widened(value) for key, value in (kwargs or {}).items()})


@torch.no_grad()
def our_logits(config: Config, weights: Iterable[tuple[str, Tensor]], tokens: Tensor) -> Tensor:
    """Return logits [1, s, vocabulary], float64, of tokens [1, s], by the weights as they are stored, not quantized.
    Raises UserError for weights that are not the model's."""
    values = {"train.dtype": "float64", "train.device": "cpu", "model.quantize": "none"}
    model = single_rank_model(with_values(config, values))
    parameters = model_state(model)
    for name, weight in check_shapes(weights, {name: parameter.shape for name, parameter in parameters.items()}):
        storage(parameters[name]).copy_(weight)
    with InFloat64():
        return model(tokens)[..., : config.model.vocab_size]


def reread_logits(arguments: argparse.Namespace, form: str, folder: Path, tokens: Tensor) -> Tensor:
    """Return the logits of a model in another format through our own import."""
    layer, tensors = read(form, folder, resolve.parse_overrides(arguments.overrides).get("model", {}))
    config = resolve.resolve([(str(folder), layer)]).config
    return our_logits(config, weights_of(tensors), tokens)


@torch.no_grad()
def their_logits(folder: Path, tokens: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the logits of a Hugging Face folder through transformers, float64. Raises NotLoaded."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    options |= {"attn_implementation": "eager", "experts_implementation": "eager"}  # which compute in any dtype
    with tempfile.TemporaryDirectory() as bare, InFloat64() if dtype == torch.float64 else nullcontext():
        huggingface_folder.link_without_code(folder, Path(bare))
        try:
            model = AutoModelForCausalLM.from_pretrained(bare, dtype=dtype, **options).eval()
            return model(tokens).logits.double()
        except Exception as error:  # a config.json from elsewhere may raise any kind
            raise NotLoaded(f"transformers cannot load {folder.name} ({in_one_line(error)})") from None


def encodes(folder: Path, text: str, ids: Sequence[int]) -> bool:
    """Return whether transformers encodes a text to these ids with a folder's tokenizer. Raises NotLoaded."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return tokenizer.encode(text, add_special_tokens=False) == list(ids)
    except Exception as error:
        raise NotLoaded(f"transformers cannot load {folder.name}'s tokenizer ({in_one_line(error)})") from None


def weights_of(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in tensors if name.startswith("model."))
