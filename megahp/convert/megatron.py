"""Dense GPT models as Megatron-Core has them, both ways: torch_dist, and the legacy torch format.

Both are pickles. They are read by an unpickler that knows tensors, DCP's metadata and an argparse.Namespace; whatever
else they name becomes an object that does nothing, so nothing in them is executed.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from enum import EnumMeta
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megahp.checkpoint.shards import in_files
from megahp.config import Config, with_values
from megahp.config.schema import VOCAB_MULTIPLE
from megahp.convert import sidecar
from megahp.convert.families import ALWAYS, LINEAR, NORMS, Family
from megahp.convert.huggingface import Tensors, export, import_
from megahp.convert.sidecar import Weights, write_json
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
    outside={
        "embedding": "embedding.word_embeddings",
        "positions": "embedding.position_embeddings",
        "final_norm": "decoder.final_layernorm",
        "unembedding": "output_layer",
    },
    blocks="decoder.layers",
    inside={
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
    needs={
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
    absent={"normalization": "layernorm", "qk_layernorm": False, "rotary_base": 10000.0},
    qkv="grouped",
    whole_heads=False,
)
OF_ENGINE = {  # Transformer Engine fuses norms into the products after them
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
PRODUCTS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
POSITIONS = {"rope": "rope", "learned": "learned_absolute", "none": "none"}
SPLIT = (  # over tp, along which dimension
    (re.compile(r"(linear_proj|linear_fc2)\.weight$"), 1),
    (re.compile(r"(linear_qkv|linear_fc1)\.|(word_embeddings|output_layer)\.weight$"), 0),
)
KNOWN = {
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


class Inert:
    """What stands for anything that is not known: it takes everything, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    append = extend = __setitem__ = __call__


def _member(kind: Any, name: str) -> Any:
    return kind[name] if isinstance(kind, EnumMeta) else Inert()


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member  # by which some Pythons pickle an Enum's
        if (module, name) in KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        return Inert


SAFE = SimpleNamespace(Unpickler=Unpickler, __name__="inert")  # as torch.load wants it


class Files(Mapping[str, Tensor]):
    """Tensors by Megatron's names, one layer's at a time, fc1's gate and up apart; `args`: what it was trained with."""

    folder: Path
    args: dict[str, Any]
    names: dict[str, Any]  # as they are when norms are modules of their own

    @property
    def gated(self) -> bool:
        return bool(self.args["activation"] == "silu")

    def whole(self, name: str) -> list[Tensor]:
        """The parts of a tensor, one a tp rank, in order."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> Tensor:
        half = re.search(r"linear_fc1\.(gate|up)\.", name)
        with _guarded(self.folder):  # sizes and offsets of the files' own
            parts = self.whole(name.replace(half[0], "linear_fc1.") if half else name)
        if half and self.gated:
            parts = [part.chunk(2)[half[1] == "up"] for part in parts]
        dim = next((dim for pattern, dim in SPLIT if pattern.search(name)), None)
        tensor = parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)
        rows = self.args["vocab_size"] if name.endswith(("word_embeddings.weight", "output_layer.weight")) else None
        return tensor[:rows]

    def __iter__(self) -> Iterator[str]:
        for name in self.names:
            if "linear_fc1." in name and self.gated:
                yield from (name.replace("linear_fc1.", f"linear_fc1.{half}.") for half in ("gate", "up"))
            else:
                yield name.replace("linear_fc1.", "linear_fc1.up.")

    def __len__(self) -> int:
        return len(list(iter(self)))


class Distributed(Files):
    """torch_dist: DCP's files, the layers of a tensor stacked along its first dimension, in chunks."""

    def __init__(self, folder: Path, given: Mapping[str, Any]) -> None:
        self.folder, self.args = folder, _told(_load(folder / "common.pt"), given, folder)
        self.names = {}
        self.places: dict[tuple[str, tuple[int, ...]], Any] = {}
        with _guarded(folder / ".metadata"):
            refuse_irregular(folder / ".metadata", "list of tensors", "copy it again", LARGEST)
            metadata = Unpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
            for place, info in metadata.storage_data.items():
                if place.offset is not None:  # a tensor's
                    self.places[place.fqn, tuple(place.offset)] = info
            for key, tensor in metadata.state_dict_metadata.items():
                stem, stacked = re.subn(r"^decoder\.layers\.(?!\d)", "", key)
                if key.startswith(("optimizer.", "rng_state", "rerun_state")) or "_extra_state" in key:
                    continue
                for layer in range(tensor.size[0]) if stacked else [None]:
                    name = key if layer is None else f"decoder.layers.{layer}.{stem}"
                    self.names[_apart_from_engine(name)] = (key, layer, tensor)

    def whole(self, name: str) -> list[Tensor]:
        key, layer, tensor = self.names[name]
        size, dtype, filled = list(tensor.size), tensor.properties.dtype, 0
        window = [(0, side) for side in size]
        if layer is not None:
            window[0] = layer, layer + 1
        found = torch.empty([stop - start for start, stop in window], dtype=dtype)
        for chunk in tensor.chunks:
            ends = list(zip(chunk.offsets, chunk.sizes, window, strict=True))
            overlap = [(max(at, start), min(at + length, stop)) for at, length, (start, stop) in ends]
            if all(start < stop for start, stop in overlap):
                part = self._read(key, tuple(chunk.offsets))
                there = tuple(slice(a - at, b - at) for (a, b), at in zip(overlap, chunk.offsets, strict=True))
                here = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(overlap, window, strict=True))
                found[here] = part[there]
                filled += part[there].numel()
        if filled != found.numel():
            raise UserError(f"{self.folder}: {key} is not whole: {filled:,} of {found.numel():,} values are there")
        return [found if layer is None else found[0]]

    def _read(self, key: str, offsets: tuple[int, ...]) -> Tensor:
        info = self.places[key, offsets]
        path = self.folder / Path(info.relative_path).name
        with _guarded(path):
            refuse_irregular(path, "file", "copy it again")
            with path.open("rb") as file:
                file.seek(info.offset)
                return torch.load(io.BytesIO(file.read(info.length)), weights_only=True)


class Legacy(Files):
    """The torch format: a file a rank, its layers counted from the first of its pipeline stage."""

    def __init__(self, folder: Path, given: Mapping[str, Any]) -> None:
        ranks = sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))
        places = [[int(part) for part in path.parent.name.split("_")[2:]] for path in ranks]
        if not ranks or max(map(len, places)) > 2:
            raise UserError(f"{folder} has no mp_rank_TP or mp_rank_TP_PP of a model without experts; name another")
        states = [_load(path) for path in ranks]
        if not all(isinstance(state, dict) and "model" in state for state in states):
            why = "a rank has no 'model', or several (interleaved stages)"
            raise UserError(f"{folder}: {why}; convert it to torch_dist")
        self.folder, self.args, self.names, first = folder, _told(states[0], given, folder), {}, 0
        stages = [place[1] if len(place) > 1 else 0 for place in places]
        for stage in sorted(set(stages)):
            models = [state["model"] for state, its in zip(states, stages, strict=True) if its == stage]
            layers = 0
            for name in (name for name, value in models[0].items() if isinstance(value, Tensor)):
                number = re.match(r"decoder\.layers\.(\d+)\.", name)
                layers = max(layers, int(number[1]) + 1) if number else layers
                ours = f"decoder.layers.{first + int(number[1])}.{name[number.end() :]}" if number else name
                self.names[_apart_from_engine(ours)] = [model[name] for model in models]
            first += layers

    def whole(self, name: str) -> list[Tensor]:
        return self.names[name]


def read(folder: Path, legacy: bool, given: Mapping[str, Any]) -> tuple[Mapping[str, Mapping[str, Any]], Tensors]:
    """Settings, as a layer for `resolve`, and the tensors of a checkpoint by name. given: settings of [model], in place
    of what the files say. Raises UserError."""
    tracker = folder / TRACKER
    tag = read_text(tracker, "number of the newest iteration,", "copy it again").strip() if tracker.exists() else ""
    place = folder / (f"iter_{int(tag):07d}" if tag.isdigit() else tag)
    files = (Legacy if legacy else Distributed)(place, given)
    layer, weights = import_(files.args, files, _family(files.args["normalization"]))
    return sidecar.restored(folder, layer, weights)


def write(folder: Path, config: Config, tensors: Mapping[str, Tensor], legacy: bool, limit: int) -> None:
    """Write a model as Megatron's weights without optimizer; torch_dist a tensor at a time, in files of `limit` bytes,
    the legacy format as one file, from memory. Raises UserError where Megatron does not have the model."""
    rows = with_values(config, {"model.vocab_size": config.model.padded_vocab})  # its softmax is over all
    told, exported = export(rows, Weights(tensors), _family(config.model.norm))
    state = {"args": Namespace(**_args(told, config)), "checkpoint_version": 3.0, "iteration": 0}
    place = folder / "release" / ("mp_rank_00" if legacy else "")
    place.mkdir(parents=True)
    if legacy:
        model = {name: tensor.clone() for name, tensor in _fused(exported)}
        torch.save({**state, "model": model}, place / "model_optim_rng.pt")
    else:
        _write_distributed(place, _fused(exported), config.model.layers, limit)
        torch.save(state, place / "common.pt")
    (folder / TRACKER).write_text("release")
    sidecar.write(folder, config, tensors, limit)


def _write_distributed(folder: Path, tensors: Tensors, layers: int, limit: int) -> None:
    described: dict[str, Any] = {}
    places: dict[MetadataIndex, Any] = {}
    for number, together in enumerate(in_files(tensors, limit)):
        file = f"__0_{number}.distcp"
        with (folder / file).open("wb") as out:
            for name, tensor in together.items():
                layer = re.match(r"decoder\.layers\.(\d+)\.", name)
                key = f"decoder.layers.{_as_engine(name[layer.end() :])}" if layer else name
                part, offsets = (tensor[None], [int(layer[1])]) if layer else (tensor, [])
                at = torch.Size(offsets + [0] * (part.dim() - len(offsets)))
                begin = out.tell()
                torch.save(part.clone(), out)
                size = torch.Size([layers, *tensor.shape]) if layer else tensor.shape
                new = TensorStorageMetadata(TensorProperties(dtype=part.dtype), size, [])
                described.setdefault(key, new).chunks.append(ChunkStorageMetadata(at, part.shape))
                places[MetadataIndex(key, at)] = _StorageInfo(file, begin, out.tell() - begin)
    blank = folder / "__1_0.distcp"  # each product asks for its engine's state, and for one without any finds this
    torch.save([None], blank)
    for name, shard in product(PRODUCTS, range(layers)):
        key = f"decoder.layers.{name}._extra_state/shard_{shard}_{layers}"
        described[key] = BytesStorageMetadata()
        places[MetadataIndex(key)] = _StorageInfo(blank.name, 0, blank.stat().st_size)
    with (folder / ".metadata").open("wb") as out:
        pickle.dump(Metadata(described, storage_data=places), out)
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    write_json(folder / "metadata.json", {**backends, "common_backend": "torch", "common_backend_version": 1})


def _fused(tensors: Tensors) -> Tensors:
    """Gates and ups as one."""
    gates = {}
    for name, tensor in tensors:
        whole = re.sub(r"linear_fc1\.(gate|up)\.", "linear_fc1.", name)
        if ".gate." in name:
            gates[whole] = tensor
        else:
            yield whole, torch.cat((gates.pop(whole), tensor)) if whole in gates else tensor


def _family(norm: str) -> Family:
    """LayerNorms always have biases there; RMSNorms none, also those of queries and keys."""
    if norm == "rmsnorm":
        return replace(MEGATRON, values={**MEGATRON.values, "norm": ("rmsnorm",)})
    bias = {**MEGATRON.bias, **dict.fromkeys(NORMS, ALWAYS)}
    return replace(MEGATRON, bias=bias, values={**MEGATRON.values, "norm": ("layernorm",), "qk_norm": (False,)})


def _told(state: Any, given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The model's settings under our family's keys, from the arguments of a training script."""
    args = dict(vars(state["args"])) if isinstance(state, dict) and isinstance(state.get("args"), Namespace) else {}
    position = args.get("position_embedding_type", "learned_absolute")
    gelu = "gelu_new" if args.get("openai_gelu") or args.get("bias_gelu_fusion") else "gelu"
    args |= {
        "activation": "silu" if args.get("swiglu") else "relu2" if args.get("squared_relu") else gelu,
        "normalization": str(args.get("normalization", "LayerNorm")).lower(),
        "position_embedding_type": {theirs: ours for ours, theirs in POSITIONS.items()}.get(position, position),
        "tied": not args.get("untie_embeddings_and_output_weights", False),
    }
    args |= {} if args.get("group_query_attention", False) else {"num_query_groups": None}
    args |= {MEGATRON.keys[key]: value for key, value in given.items() if key in MEGATRON.keys}
    args["vocab_size"] = args.get("vocab_size") or args.get("padded_vocab_size")
    needed = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
    if missing := [key for key in needed if not args.get(key)]:
        config = [f"model.{ours}=" for ours, theirs in MEGATRON.keys.items() if theirs in missing]
        raise UserError(f"{folder} does not say its {', '.join(missing)}; add {' '.join(config)}")
    return args


def _args(told: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The inverse of `_told`."""
    return {
        **{key: told[key] for key in told if key in (*MEGATRON.keys.values(), *MEGATRON.needs, "add_bias_linear")},
        "group_query_attention": config.model.kv_heads != config.model.heads,
        "swiglu": told["activation"] == "silu",
        "squared_relu": told["activation"] == "relu2",
        "openai_gelu": told["activation"] == "gelu_pytorch_tanh",
        "bias_gelu_fusion": False,
        "normalization": {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[config.model.norm],
        "position_embedding_type": POSITIONS[config.model.positions],
        "untie_embeddings_and_output_weights": not told["tied"],
        "seq_length": told["max_position_embeddings"],
        "vocab_size": config.model.vocab_size,
        "padded_vocab_size": config.model.padded_vocab,
        "make_vocab_size_divisible_by": VOCAB_MULTIPLE,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }


def _apart_from_engine(name: str) -> str:
    for fused, local in OF_ENGINE.items():
        name = name.replace(fused, local)
    return name


def _as_engine(name: str) -> str:
    for fused, local in OF_ENGINE.items():
        name = re.sub(f"^{re.escape(local)}", fused, name)
    return name


def _load(path: Path) -> Any:
    """A file of torch.save, without executing any of it; tensors stay on the disk until they are used."""
    with _guarded(path):
        refuse_irregular(path, "file", "copy it again")
        if any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
            raise ValueError("a TorchScript program")  # which torch.load would hand to its interpreter
        state = torch.load(path, "cpu", SAFE, weights_only=False, mmap=True)
    return state


@contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """Raises UserError for whatever goes wrong while a file is read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what a damaged pickle raises is anything
        raise UserError(f"{path} cannot be read ({_line(error)}); name a folder of Megatron's that has it") from None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
