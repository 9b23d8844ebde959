"""Convert between our models and Hugging Face's: config.json, and tensors by name.

Its architectures have none of our multipliers, so they are folded into the weights. transformers itself is not needed.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megahp.config import Config, ModelConfig, longest, resolve
from megahp.convert.families import (
    ACTIVATIONS,
    ALWAYS,
    DEFAULTS,
    EXPERTS,
    IRRELEVANT,
    LINEAR,
    REQUIRED,
    Family,
    family_of_type,
    find_family,
    has_bias,
    has_module,
)
from megahp.errors import UserError
from megahp.parallel.parameters import Row
from megahp.scaling.parameterization import Role, table_of

Weights = Mapping[str, Tensor]  # by name; may be lazy, such as a file's: each is looked up once, when it is needed
Tensors = Iterator[tuple[str, Tensor]]
OLD_KEYS = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor", "num_experts": "num_local_experts"}
ROPE_TABLES = ("rope_parameters", "rope_scaling")
OLD_BUFFERS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.inv_freq$")  # early versions saved them


def export(config: Config, weights: Weights, only: Family | None = None) -> tuple[dict[str, Any], Tensors]:
    """Return the config.json and the named tensors of the architecture that computes our model's logits: the first
    that can, or `only` one.

    weights: global, by our names, of any floating dtype, which is kept. Biases that only the architecture has are
    zeros; rows that pad the vocabulary are dropped. Raises UserError where no architecture can represent the model.
    """
    model, read = fold_multipliers(config, weights)
    family = find_family(model, only)
    adds_biases = ALWAYS in family.bias.values() and not model.bias
    model = replace(model, bias=model.bias or adds_biases)
    hf_activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    values = {**vars(model), "activation": hf_activation[model.activation], "sequence_length": longest(config)}
    hf_config = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        **{key: values[setting] for setting, key in family.keys.items()},
        **dict.fromkeys(family.bias_keys, model.bias),
        **{key: value[0] if isinstance(value, tuple) else value for key, value in family.required.items()},
        **family.extra,
        "bos_token_id": None,  # the tokenizer decides; without these keys transformers assumes another tokenizer's
        "eos_token_id": None,
    }

    def tensors() -> Tensors:
        tensor = torch.empty(0)
        for name, module, hf_names in _map_names(family, model, family.bias):
            # an added bias is zeros, as many as its weight, the tensor just before, has rows
            is_added = adds_biases and name.endswith(".bias")
            tensor = tensor.new_zeros(len(tensor)) if is_added else read(name)
            _refuse_nan(name, tensor, "export an earlier checkpoint")
            if not hf_names and tensor.any():
                raise UserError(f"{name} is not 0, and {family.architecture} has no such bias")
            if hf_names:
                for hf_name, part in zip(hf_names, _split(family, model, module, tensor), strict=True):
                    yield hf_name, part.contiguous()

    return hf_config, tensors()


def import_(
    hf_config: Mapping[str, Any], weights: Weights, only: Family | None = None
) -> tuple[dict[str, dict[str, Any]], Tensors]:
    """Return the settings, as a layer for `resolve`, and our named weights of the model that config.json describes.

    The parameterization is SP. Biases that only some modules have are zeros in the others. Rows that pad the vocabulary
    are the mean of the others: exp is convex, so at any hidden state n of them add at most n / vocab_size to the
    softmax's sum. (Zeros would dominate it where the logits of all tokens are far below 0.) Raises UserError for an
    unsupported architecture or setting of one, for a key whose meaning is not known, and for tensors that are missing,
    left over, or contradict config.json.
    """
    family = only or family_of_type(hf_config.get("model_type"))
    given, hf_config = hf_config, {**DEFAULTS, **family.defaults, **_flatten(hf_config)}
    values = _model_settings(family, hf_config)
    if only is None:  # Megatron's args are a whole training's
        _refuse_unknown(family, given)
    data = {"sequence_length": values.pop("sequence_length")}
    layer = {"data": data, "model": values, "parameterization": {"name": "sp"}}
    model = resolve.resolve([("config.json", {"model": values})]).config.model
    # files of a model without its head, such as the first GPT-2's, have names without this prefix
    prefix = family.block_prefix.partition(".")[0] + "."
    prefix = "" if any(name.startswith(prefix) for name in weights) else prefix
    names = list(_map_names(family, model, family.biased(hf_config), prefix))
    found = set(weights)
    missing = {hf_name for *_, hf_names in names for hf_name in hf_names} - found
    extra = found - {hf_name for *_, hf_names in names for hf_name in hf_names}
    extra = {name for name in extra if not OLD_BUFFERS.search(name)}
    head, embedding = f"{family.top_level['unembedding']}.weight", names[0][2][0]
    extra -= {head}  # some files hold the tied one too
    for wrong, problem in ((missing, "are missing"), (extra, "do not belong to it")):
        if wrong:
            raise UserError(f"{len(wrong)} tensors of the {family.model_type} model {problem}, such as {min(wrong)}")
    if model.tied_embeddings and head in found and not weights[head].equal(weights[embedding]):
        # transformers has changed from one reading to the other
        problem = f"{head} differs from {embedding}, and config.json ties them by tie_word_embeddings = True"
        raise UserError(f"{problem}; set it to false, or remove the tensor, whichever is right")

    def tensors() -> Tensors:
        tensor = torch.empty(0)
        for name, module, hf_names in names:
            parts = [weights[hf_name] for hf_name in hf_names]
            for hf_name, part in zip(hf_names, parts, strict=True):
                _refuse_nan(hf_name, part, "get the file again")
            try:  # without parts, a bias of zeros, as many as its weight, the tensor just before, has rows
                tensor = _fuse(family, model, module, parts) if parts else tensor.new_zeros(len(tensor))
            except RuntimeError:
                pairs = zip(hf_names, parts, strict=True)
                shapes = ", ".join(f"{hf_name} {list(part.shape)}" for hf_name, part in pairs)
                problem = f"not the shapes that config.json gives the {family.model_type} model"
                raise UserError(f"{shapes}: {problem}; get the files again") from None
            if tensor.numel():  # shared experts are empty where a model has none
                yield name, tensor.contiguous()

    return layer, tensors()


def fold_multipliers(config: Config, weights: Weights) -> tuple[ModelConfig, Callable[[str], Tensor]]:
    """Return the model that computes the same in SP with all multipliers 1, and a function that reads its weights.

    Of the table, `embedding` goes into the embeddings, which unties a tied head; `residual` into the last matrix of
    each branch; `logits` into the final norm, which is right for a tied head too; `attention`, over SP's, into the
    queries, or their norm. A weight is rounded once, and not at all where a multiplier is a power of two.
    """
    model = config.model

    def read(name: str) -> Tensor:
        module = _module(name)
        if module == "unembedding" and model.tied_embeddings:
            return weights["embedding.weight"]
        if module.startswith("mlp.shared.") and not model.shared_experts:  # transformers expects them, with no rows
            return torch.empty((model.width, 0) if module == "mlp.shared.down" else (0, model.width))
        return _scale(config, name, weights[name], torch.mul)

    return replace(model, tied_embeddings=model.tied_embeddings and table_of(config).embedding == 1), read


def unfold_multipliers(config: Config, weights: Tensors) -> Tensors:
    """Invert `fold_multipliers`: yield the model's own weights.

    Exact where multipliers are powers of two, else within an ulp, since the weights were rounded twice. Raises
    UserError for weights that the model cannot have: a bias it has not, or a head that is no longer tied.
    """
    model, table = config.model, table_of(config)
    was_untied = model.tied_embeddings and table.embedding != 1
    embedding = torch.empty(0)
    for name, weight in weights:
        if name.endswith(".bias") and has_bias(model, _module(name)) and not model.bias:
            if weight.any():
                raise UserError(f"{name} is not 0, and the model had no biases")
        elif was_untied and name == "embedding.weight":
            embedding = weight
        elif model.tied_embeddings and name == "unembedding.weight":  # this one holds the unscaled matrix
            folded = _scale(config, "embedding.weight", weight, torch.mul)
            if not folded[: model.vocab_size].equal(embedding[: model.vocab_size]):
                raise UserError("embedding and unembedding differ, and the model's are tied")
            yield "embedding.weight", weight
        else:
            yield name, _scale(config, name, weight, torch.div)


def _scale(config: Config, name: str, weight: Tensor, operation: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Multiply or divide one of our weights by the multiplier that is folded into it, in float64."""
    table, module, qkv = table_of(config), _module(name), _qkv_row(config.model)
    attention = table.attention / config.model.head_size**-0.5
    factors = {
        **dict.fromkeys(("embedding", "positions"), table.embedding),
        **dict.fromkeys(("attention.out", "mlp.down", "mlp.experts.down", "mlp.shared.down"), table.residual),
        "attention.query_norm": attention,
        "final_norm": table.logits,
    }

    def scaled(tensor: Tensor, factor: float) -> Tensor:
        return tensor if factor == 1 else operation(tensor.double(), factor).to(tensor.dtype)

    if module == "attention.qkv" and not config.model.qk_norm:
        queries, keys, values = qkv.matrices(weight)
        return qkv.fuse([scaled(queries, attention), keys, values])
    return scaled(weight, factors.get(module, 1.0))


def _module(name: str) -> str:
    """Return the module, within a block or the model, that a tensor of ours belongs to."""
    return re.sub(r"^blocks\.\d+\.|\.(weight|bias)$", "", name)


def _qkv_row(model: ModelConfig) -> Row:
    """Return the row that splits our fused matrix into queries, keys and values: per KV head, its queries first."""
    size = model.head_size
    return Row(Role.HIDDEN, fused=(model.heads // model.kv_heads * size, size, size))


def _map_names(
    family: Family, model: ModelConfig, biased: Collection[str], prefix: str = ""
) -> Iterator[tuple[str, str, list[str]]]:
    """Yield for each tensor of ours its name, its module within a block, and the names of the tensors it is made of.

    biased: the family's modules that have a bias; a bias of ours in other modules is made of none. prefix: removed from
    the family's names.
    """
    modules = [(name, name, hf_names) for name, hf_names in family.top_level.items() if has_module(model, name)]
    for layer in range(model.layers):
        for module, hf_names in family.per_block.items():
            if has_module(model, module, layer):
                in_block = " ".join(f"{family.block_prefix}.{layer}.{hf_name}" for hf_name in hf_names.split())
                modules.append((f"blocks.{layer}.{module}", module, in_block))
    for name, module, hf_names in modules:
        stems = [hf_name.removeprefix(prefix) for hf_name in hf_names.split()]
        if module in EXPERTS:
            yield name, module, [stem.replace("*", str(index)) for stem in stems for index in range(model.experts)]
        elif module == "mlp.router.bias":
            yield name, module, stems
        else:
            yield f"{name}.weight", module, [f"{stem}.weight" for stem in stems]
            if model.bias and has_bias(model, module):
                yield f"{name}.bias", module, [f"{stem}.bias" for stem in stems if module in biased]


def _split(family: Family, model: ModelConfig, module: str, tensor: Tensor) -> Sequence[Tensor]:
    """Return the family's tensors for one of ours."""
    if module in ("embedding", "unembedding"):
        return [tensor[: model.vocab_size]]
    if module in EXPERTS:
        return tensor.unbind()
    parts = [tensor]
    if module == "attention.qkv" and family.qkv != "grouped":  # which is our own layout
        parts = _qkv_row(model).matrices(tensor)
        parts = [torch.cat(parts)] if family.qkv == "stacked" else parts
    return [part.t() for part in parts] if family.transposed and module in LINEAR else parts


def _fuse(family: Family, model: ModelConfig, module: str, parts: Sequence[Tensor]) -> Tensor:
    """Invert `_split`. Raises RuntimeError for parts whose shapes do not match."""
    if module in ("embedding", "unembedding"):
        rows = parts[0][: model.vocab_size]  # of tokens; some files have more, which pad them
        if len(rows) < model.vocab_size:
            short = f"the {module} has {len(rows)} rows, and vocab_size is {model.vocab_size}"
            raise UserError(f"{short}; get the missing files, or set it to {len(rows)} if there are no more tokens")
        return torch.cat((rows, rows.mean(0, keepdim=True).expand(model.padded_vocab - model.vocab_size, -1)))
    if module in EXPERTS:
        return torch.stack(tuple(parts))
    parts = [part.t() for part in parts] if family.transposed and module in LINEAR else parts
    if module == "attention.qkv" and family.qkv != "grouped":
        return _qkv_row(model).fuse(parts[0].chunk(3) if family.qkv == "stacked" else parts)
    return parts[0]


def _refuse_nan(name: str, tensor: Tensor, remedy: str) -> None:
    """Raise UserError for a tensor that is not finite."""
    if not tensor.isfinite().all():
        raise UserError(f"{name} holds NaN or infinity; {remedy}")


def _refuse_unknown(family: Family, hf_config: Mapping[str, Any]) -> None:
    """Raise UserError for a key, also of a table, that is neither used nor known to be irrelevant."""
    irrelevant = {key for keys in (*IRRELEVANT.values(), family.irrelevant) for key in keys.split()}
    used = {*REQUIRED, *family.required, *family.extra, *family.defaults, *family.keys.values(), *family.bias_keys}
    used |= {*OLD_KEYS, *OLD_KEYS.values(), *ROPE_TABLES, "rope_type", "rope_theta", "type"}
    levels = [("", hf_config, used), *((f"{table}.", hf_config.get(table), used) for table in ROPE_TABLES)]
    tables = {key: table for key, table in family.required.items() if isinstance(table, dict)}
    levels += [(f"{key}.", hf_config.get(key), {*table, *REQUIRED}) for key, table in tables.items()]
    for where, table, known in levels:
        for key, value in table.items() if isinstance(table, Mapping) else ():
            if key not in known and key not in irrelevant:
                problem = (
                    f"config.json: {where}{key} = {resolve.shown(value)} is not known of {family.model_type} models"
                )
                raise UserError(f"{problem}; remove it if you know that it does not change what the model computes")


def _flatten(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Lift the rotary embeddings' table to the top level, and add newer keys under their older names. Raises
    UserError."""
    for key in ROPE_TABLES:
        if not isinstance(hf_config.get(key) or {}, Mapping):
            raise UserError(f"config.json: {key} = {hf_config[key]!r} is not a table; get the file again")
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    flat = {**hf_config, **rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    return flat | {old: flat[new] for old, new in OLD_KEYS.items() if new in flat}


def _model_settings(family: Family, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of [model], with sequence_length. Raises UserError for what our model cannot compute."""
    if missing := [key for key in (*family.keys.values(), *family.bias_keys) if key not in hf_config]:
        raise UserError(f"config.json of a {family.model_type} model lacks {', '.join(missing)}; get the file again")
    for key, required in {"rope_type": "default", **REQUIRED, **family.required}.items():
        if key in hf_config and not _matches(hf_config[key], required):
            value = resolve.shown(hf_config[key])
            raise UserError(f"config.json: {key} = {value} is not supported; megahp has {required!r}")
    values: dict[str, Any] = {
        setting: 0 if hf_config[key] is None else hf_config[key] for setting, key in family.keys.items()
    }
    if "activation" in values:
        values["activation"] = ACTIVATIONS.get(str(values["activation"]), values["activation"])
    for setting, allowed in family.values.items():
        if values.setdefault(setting, allowed[0]) not in allowed:
            key = family.keys[setting]
            raise UserError(f"config.json: {key} = {hf_config[key]!r} is not supported; megahp has {allowed}")
    return {**values, "bias": bool(family.biased(hf_config))}


def _matches(value: Any, required: Any) -> bool:
    """Return whether a value is the required one, or one of a tuple; a table is where it is for each required key that
    it has, and a list of layers where all are the one required."""
    if isinstance(required, tuple):
        return any(_matches(value, one) for one in required)
    if isinstance(required, list) and required:
        return isinstance(value, list) and all(one in required for one in value)
    if isinstance(required, dict) and required:
        table = value or {}
        return isinstance(table, Mapping) and all(_matches(table.get(key, v), v) for key, v in required.items())
    return bool(value == required)
