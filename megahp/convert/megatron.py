"""Read and write Megatron-Core's dense GPT models: torch_dist, and the legacy torch format.

Both are pickles. The unpickler knows tensors, DCP's metadata and argparse.Namespace; every other name becomes an object
that does nothing, so nothing in a file is executed.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from enum import EnumMeta
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megahp.checkpoint.shards import in_files
from megahp.config import Config, with_values
from megahp.config.schema import VOCAB_MULTIPLE
from megahp.convert import sidecar
from megahp.convert.families import ALWAYS, LINEAR, NORMS, Family
from megahp.convert.huggingface import Tensors, export, import_
from megahp.convert.sidecar import ModelWeights, write_json
from megahp.errors import UserError
from megahp.files import LARGEST, read_text, refuse_irregular

TRACKER = "latest_checkpointed_iteration.txt"
MEGATRON = Family(
    "megatron",
    "Megatron-Core's GPTModel",
    keys={
        "layers": "num_layers",
        "width": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_query_groups",
        "head_size": "kv_channels",
        "mlp_width": "ffn_hidden_size",
        "activation": "activation",
        "norm": "normalization",
        "norm_eps": "norm_epsilon",
        "positions": "position_embedding_type",
        "rope_theta": "rotary_base",
        "qk_norm": "qk_layernorm",
        "tied_embeddings": "tied",
        "vocab_size": "vocab_size",
        "sequence_length": "max_position_embeddings",
    },
    values={"positions": ("rope", "learned", "none")},
    top_level={
        "embedding": "embedding.word_embeddings",
        "positions": "embedding.position_embeddings",
        "final_norm": "decoder.final_layernorm",
        "unembedding": "output_layer",
    },
    block_prefix="decoder.layers",
    per_block={
        "attention_norm": "input_layernorm",
        "attention.qkv": "self_attention.linear_qkv",
        "attention.query_norm": "self_attention.q_layernorm",
        "attention.key_norm": "self_attention.k_layernorm",
        "attention.out": "self_attention.linear_proj",
        "mlp_norm": "pre_mlp_layernorm",
        "mlp.gate": "mlp.linear_fc1.gate",  # the first half of its rows
        "mlp.up": "mlp.linear_fc1.up",
        "mlp.down": "mlp.linear_fc2",
    },
    bias=dict.fromkeys(LINEAR, "add_bias_linear"),
    required={
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "apply_layernorm_1p": False,
        "multi_latent_attention": False,
        "num_experts": None,
        "use_rope_scaling": False,
        "rotary_seq_len_interpolation_factor": None,
        "no_rope_freq": None,
        "window_size": None,
        "qk_l2_norm": False,
        "softmax_type": "vanilla",
        "use_mup": False,
        "activation_func_clamp_value": None,
        "glu_linear_offset": 0.0,
    },
    defaults={"normalization": "layernorm", "qk_layernorm": False, "rotary_base": 10000.0},
    qkv="grouped",
    heads_divide_width=False,
)
ENGINE_NAMES = {  # Transformer Engine fuses a norm into the linear layer after it; local layers do not
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
LINEAR_LAYERS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
POSITIONS = {"rope": "rope", "learned": "learned_absolute", "none": "none"}
SHARD_DIMS = (  # the dimension that tensor parallelism shards
    (re.compile(r"(linear_proj|linear_fc2)\.weight$"), 1),
    (re.compile(r"(linear_qkv|linear_fc1)\.|(word_embeddings|output_layer)\.weight$"), 0),
)
TRUSTED = {
    ("argparse", "Namespace"),
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex")
    ),
}


class _MeanPadded(ModelWeights):
    """Weights whose rows that pad the vocabulary are the mean of the others: Megatron's softmax is over them, and n of
    them add at most n / vocab_size to its sum, as in huggingface.import_."""

    def __init__(self, tensors: Mapping[str, Tensor], config: Config) -> None:
        super().__init__(tensors)
        self.vocabulary = config.model.vocab_size

    def __getitem__(self, name: str) -> Tensor:
        weight = super().__getitem__(name)
        if name not in sidecar.VOCABULARY:
            return weight
        rows = weight[: self.vocabulary]
        return torch.cat((rows, rows.mean(0, keepdim=True).expand(len(weight) - len(rows), -1)))


class Inert:
    """Stand in for any class or function of a pickle that is not trusted: accept every call, and do nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    append = extend = __setitem__ = __call__


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # some Pythons pickle an Enum member as a getattr call
            return lambda kind, member: kind[member] if isinstance(kind, EnumMeta) else Inert()
        if (module, name) in TRUSTED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        return Inert


PICKLE = SimpleNamespace(Unpickler=Unpickler, __name__="inert")  # torch.load expects a module


class Files(Mapping[str, Tensor]):
    """Tensors by Megatron's names, one layer's at a time, fc1 split into gate and up.

    args: the training arguments; entries: by the names that local layers have, where norms are modules of their own;
    shards: an entry -> its tensors, in the order of the tensor-parallel ranks.
    """

    def __init__(
        self, folder: Path, args: dict[str, Any], entries: Mapping[str, Any], shards: Callable[[Any], list[Tensor]]
    ) -> None:
        self.folder, self.args, self.entries, self.shards = folder, args, entries, shards
        self.gated = args["activation"] == "silu"

    def __getitem__(self, name: str) -> Tensor:
        half = re.search(r"linear_fc1\.(gate|up)\.", name)
        with _guarded(self.folder):  # the files' own sizes and offsets may be wrong
            parts = self.shards(self.entries[name.replace(half[0], "linear_fc1.") if half else name])
        if half and self.gated:  # each rank holds its own half of the gate and of up
            parts = [part.chunk(2)[half[1] == "up"] for part in parts]
        dim = next((dim for pattern, dim in SHARD_DIMS if pattern.search(name)), None)
        tensor = parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)
        rows = self.args["vocab_size"] if name.endswith(("word_embeddings.weight", "output_layer.weight")) else None
        return tensor[:rows]

    def __iter__(self) -> Iterator[str]:
        for name in self.entries:
            if "linear_fc1." in name and self.gated:
                yield from (name.replace("linear_fc1.", f"linear_fc1.{half}.") for half in ("gate", "up"))
            else:
                yield name.replace("linear_fc1.", "linear_fc1.up.")

    def __len__(self) -> int:
        return len(list(iter(self)))


def open_distributed(folder: Path, overrides: Mapping[str, Any]) -> Files:
    """Open torch_dist: DCP's files, the layers of a tensor stacked along its first dimension, in chunks."""
    args = _model_args(_load(folder / "common.pt"), overrides, folder)
    entries: dict[str, tuple[str, int | None, Any]] = {}
    storage: dict[tuple[str, tuple[int, ...]], Any] = {}  # of a chunk, by its tensor and offsets
    with _guarded(folder / ".metadata"):
        refuse_irregular(folder / ".metadata", "list of tensors", "copy it again", LARGEST)
        metadata = Unpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
        for index, info in metadata.storage_data.items():
            if index.offset is not None:  # without one it is an object, not a tensor
                storage[index.fqn, tuple(index.offset)] = info
        for key, tensor in metadata.state_dict_metadata.items():
            if key.startswith(("optimizer.", "rng_state", "rerun_state")) or "_extra_state" in key:
                continue
            stem, is_stacked = re.subn(r"^decoder\.layers\.(?!\d)", "", key)
            for layer in range(tensor.size[0]) if is_stacked else [None]:
                name = key if layer is None else f"decoder.layers.{layer}.{stem}"
                entries[_local_name(name)] = (key, layer, tensor)

    def read_chunk(key: str, offsets: tuple[int, ...]) -> Tensor:
        info = storage[key, offsets]
        path = folder / Path(info.relative_path).name  # the name alone: a path could leave the folder
        with _guarded(path):
            refuse_irregular(path, "file", "copy it again")
            with path.open("rb") as file:
                file.seek(info.offset)
                return torch.load(io.BytesIO(file.read(info.length)), weights_only=True)

    def shards(entry: tuple[str, int | None, Any]) -> list[Tensor]:
        key, layer, tensor = entry
        window = [(0, side) for side in tensor.size]
        if layer is not None:
            window[0] = layer, layer + 1
        starts = [start for start, _ in window]
        target = torch.empty([stop - start for start, stop in window], dtype=tensor.properties.dtype)
        filled = 0
        for chunk in tensor.chunks:
            ranges = zip(chunk.offsets, chunk.sizes, window, strict=True)
            overlap = [(max(at, start), min(at + length, stop)) for at, length, (start, stop) in ranges]
            if all(start < stop for start, stop in overlap):
                in_chunk = tuple(slice(a - at, b - at) for (a, b), at in zip(overlap, chunk.offsets, strict=True))
                in_target = tuple(slice(a - at, b - at) for (a, b), at in zip(overlap, starts, strict=True))
                source = read_chunk(key, tuple(chunk.offsets))[in_chunk]
                target[in_target] = source
                filled += source.numel()
        if filled != target.numel():
            missing = f"only {filled:,} of {target.numel():,} values are in the files"
            raise UserError(f"{folder}: {key} is incomplete: {missing}; copy it again")
        return [target if layer is None else target[0]]

    return Files(folder, args, entries, shards)


def open_legacy(folder: Path, overrides: Mapping[str, Any]) -> Files:
    """Open the torch format: a file per rank, in which layers count from the first of its pipeline stage."""
    paths = sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))
    ranks = [[int(part) for part in path.parent.name.split("_")[2:]] for path in paths]  # (tp,) or (tp, pp)
    if not paths or max(map(len, ranks)) > 2:
        raise UserError(f"{folder} has no mp_rank_TP or mp_rank_TP_PP of a model without experts; name another")
    states = [_load(path) for path in paths]
    if not all(isinstance(state, dict) and "model" in state for state in states):
        why = "a rank has no 'model', or several (interleaved stages)"
        raise UserError(f"{folder}: {why}; convert it to torch_dist")
    args, entries = _model_args(states[0], overrides, folder), {}
    stages = [rank[1] if len(rank) > 1 else 0 for rank in ranks]
    first_layer = 0
    for stage in sorted(set(stages)):
        models = [state["model"] for state, pp_rank in zip(states, stages, strict=True) if pp_rank == stage]
        layers = 0
        for name in (name for name, value in models[0].items() if isinstance(value, Tensor)):
            global_name = name
            if match := re.match(r"decoder\.layers\.(\d+)\.", name):
                layers = max(layers, int(match[1]) + 1)
                global_name = f"decoder.layers.{first_layer + int(match[1])}.{name[match.end() :]}"
            entries[_local_name(global_name)] = [model[name] for model in models]
        first_layer += layers
    return Files(folder, args, entries, lambda tensors: tensors)


def read(folder: Path, legacy: bool, overrides: Mapping[str, Any]) -> tuple[Mapping[str, Mapping[str, Any]], Tensors]:
    """Return the settings, as a layer for `resolve`, and the named tensors of a checkpoint. overrides: settings of
    [model], which take precedence over the files' args. Raises UserError."""
    tracker = folder / TRACKER
    tag = read_text(tracker, "number of the newest iteration,", "copy it again").strip() if tracker.exists() else ""
    iteration = folder / (f"iter_{int(tag):07d}" if tag.isdigit() else tag)
    files = (open_legacy if legacy else open_distributed)(iteration, overrides)
    layer, weights = import_(files.args, files, _family(files.args["normalization"]))
    return sidecar.restore(folder, layer, weights)


def padding(config: Config) -> str:
    """Return what `write` does with the rows that pad the vocabulary, "" if there are none."""
    model = config.model
    if not (rows := model.padded_vocab - model.vocab_size):
        return ""
    if model.padding == "included":
        return f"{rows} rows pad the vocabulary: Megatron's softmax is over them, as the run's was"
    of_run = "the run's softmax was not over them"
    return f"{rows} rows pad the vocabulary: {of_run}, and Megatron's is, so each is the mean of the others there"


def write(folder: Path, config: Config, tensors: Mapping[str, Tensor], legacy: bool, limit: int) -> None:
    """Write a model as Megatron's weights without optimizer. Raises UserError where Megatron lacks the model.

    torch_dist: a tensor at a time, in files of `limit` bytes; the legacy format: as one file, from memory.
    """
    # its softmax is over padding rows too
    padded = with_values(config, {"model.vocab_size": config.model.padded_vocab})
    weights = ModelWeights(tensors) if config.model.padding == "included" else _MeanPadded(tensors, config)
    hf_config, exported = export(padded, weights, _family(config.model.norm))
    state = {"args": Namespace(**_training_args(hf_config, config)), "checkpoint_version": 3.0, "iteration": 0}
    target = folder / "release" / ("mp_rank_00" if legacy else "")
    target.mkdir(parents=True)
    if legacy:
        model = {name: tensor.clone() for name, tensor in _fuse_gates(exported)}
        _save({**state, "model": model}, target / "model_optim_rng.pt")
    else:
        _write_distributed(target, _fuse_gates(exported), config.model.layers, limit)
        _save(state, target / "common.pt")
    (folder / TRACKER).write_text("release")
    sidecar.write(folder, config, tensors, limit)


def _write_distributed(folder: Path, tensors: Tensors, layers: int, limit: int) -> None:
    described: dict[str, Any] = {}
    storage: dict[dcp.MetadataIndex, Any] = {}
    for index, group in enumerate(in_files(tensors, limit)):
        file = f"__0_{index}.distcp"
        with (folder / file).open("wb") as out:
            for name, tensor in group.items():
                layer, key = re.match(r"decoder\.layers\.(\d+)\.", name), name
                if layer:
                    stem = name[layer.end() :]
                    for engine, local in ENGINE_NAMES.items():
                        stem = re.sub(f"^{re.escape(local)}", engine, stem)
                    key = f"decoder.layers.{stem}"
                chunk, offsets = (tensor[None], [int(layer[1])]) if layer else (tensor, [])
                at = torch.Size(offsets + [0] * (chunk.dim() - len(offsets)))
                begin = out.tell()
                _save(chunk.clone(), out)
                size = torch.Size([layers, *tensor.shape]) if layer else tensor.shape
                new = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=chunk.dtype), size, [])
                described.setdefault(key, new).chunks.append(dcp.ChunkStorageMetadata(at, chunk.shape))
                storage[dcp.MetadataIndex(key, at)] = _StorageInfo(file, begin, out.tell() - begin)
    # each linear layer asks for its engine's state; this empty one is what a layer without an engine finds
    blank = folder / "__1_0.distcp"
    _save([None], blank)
    for name, shard in product(LINEAR_LAYERS, range(layers)):
        key = f"decoder.layers.{name}._extra_state/shard_{shard}_{layers}"
        described[key] = dcp.BytesStorageMetadata()
        storage[dcp.MetadataIndex(key)] = _StorageInfo(blank.name, 0, blank.stat().st_size)
    with (folder / ".metadata").open("wb") as out:
        pickle.dump(dcp.Metadata(described, storage_data=storage), out)
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    write_json(folder / "metadata.json", {**backends, "common_backend": "torch", "common_backend_version": 1})


def _save(value: Any, file: Any) -> None:
    """Write a pickle to a path or an open file. Raises UserError: what torch says of a full disk is no OSError."""
    try:
        torch.save(value, file)
    except RuntimeError as error:
        path = file if isinstance(file, Path) else file.name
        raise UserError(f"{path} cannot be written ({error}); make room") from None


def _fuse_gates(tensors: Tensors) -> Tensors:
    """Concatenate each gate and the up that follows it into fc1."""
    gates = {}
    for name, tensor in tensors:
        fused = re.sub(r"linear_fc1\.(gate|up)\.", "linear_fc1.", name)
        if ".gate." in name:
            gates[fused] = tensor
        else:
            yield fused, torch.cat((gates.pop(fused), tensor)) if fused in gates else tensor


def _family(norm: str) -> Family:
    """Return Megatron's family for this norm: a LayerNorm always has biases; an RMSNorm never, nor do QK norms."""
    if norm == "rmsnorm":
        return replace(MEGATRON, values={**MEGATRON.values, "norm": ("rmsnorm",)})
    bias = {**MEGATRON.bias, **dict.fromkeys(NORMS, ALWAYS)}
    return replace(MEGATRON, bias=bias, values={**MEGATRON.values, "norm": ("layernorm",), "qk_norm": (False,)})


def _model_args(state: Any, overrides: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the model's settings under our family's keys, from the training arguments in a file's state."""
    args = dict(vars(state["args"])) if isinstance(state, dict) and isinstance(state.get("args"), Namespace) else {}
    position = args.get("position_embedding_type", "learned_absolute")
    # Megatron's own and its fused GELU are the tanh approximation, torch's default is exact
    gelu = "gelu_new" if args.get("openai_gelu") or args.get("bias_gelu_fusion") else "gelu"
    args |= {
        "activation": "silu" if args.get("swiglu") else "relu2" if args.get("squared_relu") else gelu,
        "normalization": str(args.get("normalization", "LayerNorm")).lower(),
        "position_embedding_type": {theirs: ours for ours, theirs in POSITIONS.items()}.get(position, position),
        "tied": not args.get("untie_embeddings_and_output_weights", False),
    }
    if not args.get("group_query_attention", False):
        args["num_query_groups"] = None  # Megatron ignores the argument then
    args |= {MEGATRON.keys[setting]: value for setting, value in overrides.items() if setting in MEGATRON.keys}
    # the padded size where the file has no other: then the padding rows count as tokens
    args["vocab_size"] = args.get("vocab_size") or args.get("padded_vocab_size")
    required = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
    if missing := [key for key in required if not args.get(key)]:
        settings = [f"model.{setting}=" for setting, key in MEGATRON.keys.items() if key in missing]
        raise UserError(f"{folder} does not say its {', '.join(missing)}; add {' '.join(settings)}")
    return args


def _training_args(hf_config: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Invert `_model_args`."""
    kept = {*MEGATRON.keys.values(), *MEGATRON.required, "add_bias_linear"}
    return {
        **{key: value for key, value in hf_config.items() if key in kept},
        "group_query_attention": config.model.kv_heads != config.model.heads,
        "swiglu": hf_config["activation"] == "silu",
        "squared_relu": hf_config["activation"] == "relu2",
        "openai_gelu": hf_config["activation"] == "gelu_pytorch_tanh",
        "bias_gelu_fusion": False,
        "normalization": {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[config.model.norm],
        "position_embedding_type": POSITIONS[config.model.positions],
        "untie_embeddings_and_output_weights": not hf_config["tied"],
        "seq_length": hf_config["max_position_embeddings"],
        "vocab_size": config.model.vocab_size,
        "padded_vocab_size": config.model.padded_vocab,
        "make_vocab_size_divisible_by": VOCAB_MULTIPLE,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }


def _local_name(name: str) -> str:
    """Return the name that local layers have for a tensor of Transformer Engine's, or the name itself."""
    for engine, local in ENGINE_NAMES.items():
        name = name.replace(engine, local)
    return name


def _load(path: Path) -> Any:
    """Load a file of torch.save without executing any of it; tensors stay on disk until they are used."""
    with _guarded(path):
        refuse_irregular(path, "file", "copy it again")
        # torch.load would hand a TorchScript program to its interpreter
        if any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
            raise ValueError("a TorchScript program")
        return torch.load(path, "cpu", PICKLE, weights_only=False, mmap=True)


@contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """Raise UserError for whatever goes wrong while a file is read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise any kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read ({reason}); name a Megatron checkpoint that has it") from None
