"""Convert between our models and Hugging Face's: config.json, and tensors by name.

Its architectures have none of our multipliers, so they are folded into the weights. transformers itself is not needed.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megahp.config import Config, ModelConfig, longest, resolve
from megahp.config.schema import is_nth
from megahp.convert.families import (
    ALPHAS,
    ALWAYS,
    DEFAULTS,
    EXPERTS,
    IRRELEVANT,
    LINEAR,
    NORMS,
    REQUIRED,
    ROPE_KEYS,
    Family,
    family_of_type,
    find_family,
    folded,
    has_bias,
    has_module,
)
from megahp.errors import UserError
from megahp.parallel.parameters import Row
from megahp.scaling.parameterization import Role, Table, table_of

Weights = Mapping[str, Tensor]  # by name; may be lazy, such as a file's: each is looked up once, when it is needed
Tensors = Iterator[tuple[str, Tensor]]
OLD_KEYS = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor", "num_experts": "num_local_experts"}
ROPE_TABLES = ("rope_parameters", "rope_scaling")
ATTENTION_TYPES = ("full_attention", "sliding_attention")
OLD_BUFFERS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.inv_freq$")  # early versions saved them


def export(config: Config, weights: Weights, only: Family | None = None) -> tuple[dict[str, Any], Tensors]:
    """Return the config.json and the named tensors of the architecture that computes our model's logits: the first
    that can, or `only` one.

    weights: global, by our names, of any floating dtype, which is kept. Biases that only the architecture has are
    zeros; rows that pad the vocabulary are dropped. Raises UserError where no architecture can represent the model.
    """
    family = find_family(config, only)
    kept, multipliers = family.kept_multipliers(table_of(config), config.model)
    model, read = fold_multipliers(config, weights, kept)
    adds_biases = ALWAYS in family.bias.values() and not (model.bias or model.qkv_bias)
    model = replace(model, bias=model.bias or adds_biases)
    hf_activation = {ours: theirs for theirs, ours in family.activations.items()}
    values = {**vars(model), "activation": hf_activation[model.activation], "sequence_length": longest(config)}
    values |= {setting: values[setting] or None for setting in ("window", "attention_softcap", "logits_softcap")}
    hf_config = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        **{key: values[setting] for setting, key in family.keys.items()},
        **dict.fromkeys(family.bias_keys, model.bias or model.qkv_bias),
        **multipliers,
        **{key: value[0] if isinstance(value, tuple) else value for key, value in family.required.items()},
        **family.extra,
        **_layer_keys(family, model),
        "bos_token_id": None,  # the tokenizer decides; without these keys transformers assumes another tokenizer's
        "eos_token_id": None,
        "pad_token_id": None,
    }

    def tensors() -> Tensors:
        tensor = first = torch.empty(0)
        firsts, seconds = ({names[n]: whole for whole, names in family.joined.items()} for n in (0, 1))
        for name, hf_names in _map_names(family, model, family.bias):
            # an added bias is zeros, as many as its weight, the tensor just before, has rows
            is_added = adds_biases and name.endswith(".bias")
            tensor = tensor.new_zeros(len(tensor)) if is_added else read(name)
            _refuse_nan(name, tensor, "export an earlier checkpoint")
            if not hf_names and tensor.any():
                raise UserError(f"{name} is not 0, and {family.architecture} has no such bias")
            for hf_name, part in zip(hf_names, _split(family, model, name, tensor) if hf_names else [], strict=True):
                if any(half in hf_name for half in firsts):
                    first = part
                elif half := next((half for half in seconds if half in hf_name), None):
                    yield hf_name.replace(half, seconds[half]), torch.cat((first, part))
                else:
                    yield hf_name, part.contiguous()
        for layer in range(model.layers):
            for stem, value in family.constants.items():
                yield f"{family.block_prefix}.{layer}.{stem}", torch.tensor(value)

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
    model = resolve.resolve([("config.json", {"model": values})]).config.model
    parameterization = {"name": "sp", **_multipliers(family, hf_config, model)}
    layer = {"data": data, "model": values, "parameterization": parameterization}
    weights = _Halves(weights, family.joined) if family.joined else weights
    # files of a model without its head, such as the first GPT-2's, have names without this prefix
    prefix = family.block_prefix.partition(".")[0] + "."
    prefix = "" if any(name.startswith(prefix) for name in weights) else prefix
    names = list(_map_names(family, model, family.biased(hf_config), prefix))
    _check_names(family, model, weights, names)

    def tensors() -> Tensors:
        tensor = torch.empty(0)
        for name, hf_names in names:
            parts = [weights[hf_name] for hf_name in hf_names]
            for hf_name, part in zip(hf_names, parts, strict=True):
                _refuse_nan(hf_name, part, "get the file again")
            try:  # without parts, a bias of zeros, as many as its weight, the tensor just before, has rows
                tensor = _fuse(family, model, name, parts) if parts else tensor.new_zeros(len(tensor))
            except RuntimeError:
                pairs = zip(hf_names, parts, strict=True)
                shapes = ", ".join(f"{hf_name} {list(part.shape)}" for hf_name, part in pairs)
                problem = f"not the shapes that config.json gives the {family.model_type} model"
                raise UserError(f"{shapes}: {problem}; get the files again") from None
            if tensor.numel():  # shared experts are empty where a model has none
                yield name, tensor.contiguous()

    return layer, tensors()


def fold_multipliers(config: Config, weights: Weights, kept: Table) -> tuple[ModelConfig, Callable[[str], Tensor]]:
    """Return the model that computes the same with the multipliers of another table, and a function that reads its
    weights.

    Of the ratios of the two, `embedding` goes into the embeddings, which unties a tied head; `residual` into the last
    matrix of each branch, or the norm after it; `logits` into the final norm, which is right for a tied head too;
    `attention` into the queries, or their norm. A weight is rounded once, and not at all where a ratio is a power of
    two.
    """
    model = config.model

    def read(name: str) -> Tensor:
        module = _module(name)
        if module == "unembedding" and model.tied_embeddings:
            return weights["embedding.weight"]
        if module.startswith("mlp.shared.") and not model.shared_experts:  # transformers expects them, with no rows
            return torch.empty((model.width, 0) if module == "mlp.shared.down" else (0, model.width))
        return _scale(config, kept, name, weights[name], torch.mul)

    unties = "embedding" in folded(table_of(config), kept)
    return replace(model, tied_embeddings=model.tied_embeddings and not unties), read


def unfold_multipliers(config: Config, weights: Tensors, kept: Table) -> Tensors:
    """Invert `fold_multipliers`: yield the model's own weights.

    Exact where multipliers are powers of two, else within an ulp, since the weights were rounded twice. Raises
    UserError for weights that the model cannot have: a bias it has not, or a head that is no longer tied.
    """
    model = config.model
    was_untied = model.tied_embeddings and "embedding" in folded(table_of(config), kept)
    embedding = torch.empty(0)
    for name, weight in weights:
        module = _module(name)
        if name.endswith(".bias") and module in (*LINEAR, *NORMS) and not has_bias(model, module):
            if weight.any():
                raise UserError(f"{name} is not 0, and the model had no biases")
        elif was_untied and name == "embedding.weight":
            embedding = weight
        elif model.tied_embeddings and name == "unembedding.weight":  # this one holds the unscaled matrix
            scaled = _scale(config, kept, "embedding.weight", weight, torch.mul)
            if not scaled[: model.vocab_size].equal(embedding[: model.vocab_size]):
                raise UserError("embedding and unembedding differ, and the model's are tied")
            yield "embedding.weight", weight
        else:
            yield name, _scale(config, kept, name, weight, torch.div)


def _scale(
    config: Config, kept: Table, name: str, weight: Tensor, operation: Callable[[Tensor, float], Tensor]
) -> Tensor:
    """Multiply or divide one of our weights by the multiplier that is folded into it, in float64."""
    table, module, qkv = table_of(config), _module(name), _qkv_row(config.model)
    ratio = {key: getattr(table, key) / getattr(kept, key) for key in folded(table, kept)}
    attention = ratio.get("attention", 1.0)
    last = ["attention.out", "mlp.down", "mlp.experts.down", "mlp.shared.down"]
    if config.model.norm_placement != "pre":
        last = ["attention_post_norm", "mlp_post_norm"]
    factors = {
        **dict.fromkeys(("embedding", "positions"), ratio.get("embedding", 1.0)),
        **dict.fromkeys(last, ratio.get("residual", 1.0)),
        "attention.query_norm": attention,
        "final_norm": ratio.get("logits", 1.0),
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
) -> Iterator[tuple[str, list[str]]]:
    """Yield for each tensor of ours its name and the names of the tensors it is made of.

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
            yield name, [stem.replace("*", str(index)) for stem in stems for index in range(model.experts)]
        elif module in ("mlp.router.bias", *ALPHAS):
            yield name, stems
        else:
            yield f"{name}.weight", [f"{stem}.weight" for stem in stems]
            if has_bias(model, module):
                yield f"{name}.bias", [f"{stem}.bias" for stem in stems if module in biased]


def _split(family: Family, model: ModelConfig, name: str, tensor: Tensor) -> Sequence[Tensor]:
    """Return the family's tensors for one of ours."""
    module = _module(name)
    if family.norm_offset and name.endswith("norm.weight"):
        return [(tensor.double() - family.norm_offset).to(tensor.dtype)]
    if module in ("embedding", "unembedding"):
        return [tensor[: model.vocab_size]]
    if module in EXPERTS:
        return tensor.unbind()
    parts = [tensor]
    if module == "attention.qkv" and family.qkv != "grouped":  # which is our own layout
        parts = _qkv_row(model).matrices(tensor)
        parts = [torch.cat(parts)] if family.qkv == "stacked" else parts
    return [part.t() for part in parts] if family.transposed and module in LINEAR else parts


def _fuse(family: Family, model: ModelConfig, name: str, parts: Sequence[Tensor]) -> Tensor:
    """Invert `_split`. Raises RuntimeError for parts whose shapes do not match."""
    module = _module(name)
    if family.norm_offset and name.endswith("norm.weight"):  # in half precision the sum would lose the weight's bits
        return (parts[0].double() + family.norm_offset).to(torch.promote_types(parts[0].dtype, torch.float32))
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
        sizes = [count * model.head_size for count in (model.heads, model.kv_heads, model.kv_heads)]
        return _qkv_row(model).fuse(parts[0].split(sizes) if family.qkv == "stacked" else parts)
    return parts[0]


class _Halves(Mapping[str, Tensor]):
    """Another mapping's tensors, those that hold the rows of two modules as two."""

    def __init__(self, tensors: Weights, joined: Mapping[str, tuple[str, str]]) -> None:
        self.tensors, self.joined = tensors, joined

    def __getitem__(self, name: str) -> Tensor:
        for whole, halves in self.joined.items():
            for number, half in enumerate(halves):
                if half in name:
                    return self.tensors[name.replace(half, whole)].chunk(2)[number]
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        for name in self.tensors:
            whole = next((whole for whole in self.joined if whole in name), "")
            yield from (name.replace(whole, half) for half in self.joined[whole]) if whole else (name,)

    def __len__(self) -> int:
        return len(list(iter(self)))


def _check_names(
    family: Family, model: ModelConfig, weights: Weights, names: Sequence[tuple[str, Sequence[str]]]
) -> None:
    """Raise UserError for tensors that are missing, left over, or contradict config.json. names: ours, and theirs."""
    found, known = set(weights), {hf_name for _, hf_names in names for hf_name in hf_names}
    head, embedding = f"{family.top_level['unembedding']}.weight", names[0][1][0]
    missing = known - found  # a tied model's head may be stored too
    extra = {name for name in found - known - {head} if not OLD_BUFFERS.search(name)}
    for name in [name for name in extra if name.endswith(tuple(family.constants))]:
        (value,) = (value for stem, value in family.constants.items() if name.endswith(stem))
        if not math.isclose(weights[name].item(), value, rel_tol=0.01):  # they may be of half precision
            raise UserError(f"{name} is {weights[name].item()}, and not {value}, as in megahp's xIELU")
        extra.remove(name)
    for wrong, problem in ((missing, "are missing"), (extra, "do not belong to it")):
        if wrong:
            raise UserError(f"{len(wrong)} tensors of the {family.model_type} model {problem}, such as {min(wrong)}")
    if model.tied_embeddings and head in found and not weights[head].equal(weights[embedding]):
        # transformers has changed from one reading to the other
        problem = f"{head} differs from {embedding}, and config.json ties them by tie_word_embeddings = True"
        raise UserError(f"{problem}; set it to false, or remove the tensor, whichever is right")


def _refuse_nan(name: str, tensor: Tensor, remedy: str) -> None:
    """Raise UserError for a tensor that is not finite."""
    if not tensor.isfinite().all():
        raise UserError(f"{name} holds NaN or infinity; {remedy}")


def _refuse_unknown(family: Family, hf_config: Mapping[str, Any]) -> None:
    """Raise UserError for a key, also of a table, that is neither used nor known to be irrelevant."""
    irrelevant = {key for keys in (*IRRELEVANT.values(), family.irrelevant) for key in keys.split()}
    used = {*REQUIRED, *family.required, *family.extra, *family.defaults, *family.keys.values(), *family.bias_keys}
    used |= {*OLD_KEYS, *OLD_KEYS.values(), *ROPE_TABLES, "rope_type", "rope_theta", "type", *family.multipliers}
    used |= {"sliding_window_pattern", "_sliding_window_pattern"} if family.period else set()
    rope = {*used, *(key for keys in ROPE_KEYS.values() for key in keys.values()), "mscale", "mscale_all_dim"}
    levels: list[tuple[str, Any, set[str]]] = [("", hf_config, used)]
    for where in ROPE_TABLES:
        keys = hf_config.get(where) or {}
        levels += [(f"{where}.", keys, {*rope, "truncate", *(ATTENTION_TYPES if family.local_theta else ())})]
        levels += [(f"{where}.{kind}.", keys.get(kind), {*rope, "truncate"}) for kind in ATTENTION_TYPES]
    tables = {key: table for key, table in family.required.items() if isinstance(table, dict)}
    levels += [(f"{key}.", hf_config.get(key), {*table, *REQUIRED}) for key, table in tables.items()]
    for where, table, known in levels:
        for key, value in table.items() if isinstance(table, Mapping) else ():
            if key not in known and key not in irrelevant:
                problem = f"{where}{key} = {resolve.shown(value)} is not known of {family.model_type} models"
                remedy = "remove it if you know that it does not change what the model computes"
                raise UserError(f"config.json: {problem}; {remedy}")


def _flatten(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Lift the rotary embeddings' table to the top level, and add newer keys under their older names. Raises
    UserError."""
    for key in ROPE_TABLES:
        if not isinstance(hf_config.get(key) or {}, Mapping):
            raise UserError(f"config.json: {key} = {hf_config[key]!r} is not a table; get the file again")
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    full, local = (rope.get(kind) for kind in ATTENTION_TYPES)
    if isinstance(full, Mapping):  # each type of attention has its own
        if isinstance(local, Mapping) and local.get("rope_type", "default") != "default" and local != full:
            raise UserError(f"config.json: rope_parameters.sliding_attention = {resolve.shown(local)} is not supported")
        rope = dict(full)
        if isinstance(local, Mapping):  # 0: as the others
            rope["rope_local_base_freq"] = 0 if local == full else local.get("rope_theta")
    flat = {**hf_config, **rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    return flat | {old: flat[new] for old, new in OLD_KEYS.items() if new in flat}


def _model_settings(family: Family, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of [model], with sequence_length. Raises UserError for what our model cannot compute."""
    needed = (*family.keys.values(), *family.bias_keys, *family.multipliers)
    if missing := [key for key in needed if key not in hf_config]:
        raise UserError(f"config.json of a {family.model_type} model lacks {', '.join(missing)}; get the file again")
    _require(hf_config, {**REQUIRED, **family.required})
    values: dict[str, Any] = {
        setting: 0 if hf_config[key] is None else hf_config[key] for setting, key in family.keys.items()
    }
    if "activation" in values:
        values["activation"] = family.activations.get(str(values["activation"]), values["activation"])
    for setting, allowed in family.values.items():
        if values.setdefault(setting, allowed[0]) not in allowed:
            key = family.keys[setting]
            raise UserError(f"config.json: {key} = {hf_config[key]!r} is not supported; megahp has {allowed}")
    biased = family.biased(hf_config)
    values |= {"qkv_bias": True, "bias": False} if biased == ["attention.qkv"] else {"bias": bool(biased)}
    values |= _rope_settings(family, hf_config, values["sequence_length"])
    return values | _layer_settings(family, hf_config, values)


def _rope_settings(family: Family, hf_config: Mapping[str, Any], length: Any) -> dict[str, Any]:
    """Return how rotary wavelengths are stretched. length: of the longest sequences. Raises UserError."""
    kind, kinds = hf_config["rope_type"], [*ROPE_KEYS] if "rope_scaling" in family.free else []
    if kind == "default":
        return {}
    if kind not in kinds or hf_config.get("truncate", True) is not True:
        known = ", ".join(["default", *kinds]) + ", with truncate = True" * (kind in kinds)
        raise UserError(f"config.json: rope_type = {resolve.shown(kind)} is not supported; megahp has {known}")
    values = {setting: hf_config[key] for setting, key in ROPE_KEYS[kind].items() if hf_config.get(key) is not None}
    if "rope_original_length" in ROPE_KEYS[kind]:
        values.setdefault("rope_original_length", length)
    scales: list[Any] = [hf_config.get(key) for key in ("mscale", "mscale_all_dim")]
    if kind == "yarn" and "rope_magnitude" not in values and all(scales):
        if not all(isinstance(each, int | float) and each > 0 for each in (*scales, values.get("rope_factor"))):
            raise UserError(
                "config.json: factor, mscale and mscale_all_dim must be numbers above 0; get the file again"
            )
        over, under = (0.1 * scale * math.log(values["rope_factor"]) + 1 for scale in scales)
        values["rope_magnitude"] = over / under
    return {"rope_scaling": kind, **values}


def _layer_settings(family: Family, hf_config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return which layers have a window or no positions. Raises UserError."""
    layers, found = values["layers"], dict[str, Any]()
    if not isinstance(layers, int):  # `resolve` refuses it
        return found
    if "no_rope_every" in family.keys and isinstance(rotated := hf_config.get("no_rope_layers"), list):
        found["no_rope_every"] = _every_nth([not one for one in rotated[:layers]], "no_rope_layers")
    if family.period:
        types = hf_config.get("layer_types")
        if types is None:
            period = hf_config.get("sliding_window_pattern") or family.period
            if not isinstance(period, int):
                raise UserError(f"config.json: sliding_window_pattern = {resolve.shown(period)} is no whole number")
            full = [is_nth(block, period) for block in range(layers)]
        else:
            full = [kind == "full_attention" for kind in types[:layers]]
        found["full_attention_every"] = _every_nth(full, "layer_types")
        if all(full):
            found |= {"window": 0, "full_attention_every": 0}
        theta = hf_config["rope_theta"]
        local = hf_config.get("rope_local_base_freq", theta)
        if family.local_theta and not all(full) and (local, hf_config["rope_type"]) != (theta, "default"):
            found["window_rope_theta"] = local
    return found


def _every_nth(chosen: list[bool], key: str) -> int:
    """Return n where every n-th of the blocks is chosen, 0 where none is. Raises UserError."""
    n = chosen.index(True) + 1 if any(chosen) else 0
    if chosen != [is_nth(block, n) for block in range(len(chosen))]:
        raise UserError(f"config.json: {key} is not supported: megahp has other blocks only as every n-th one")
    return n


def _layer_keys(family: Family, model: ModelConfig) -> dict[str, Any]:
    """Return the keys of rotary wavelengths and of layers that differ, the opposite of the settings read from them."""
    keys: dict[str, Any] = {}
    rope = {key: getattr(model, setting) for setting, key in ROPE_KEYS.get(model.rope_scaling, {}).items()}
    rope = {"rope_type": model.rope_scaling, **rope} if rope else {"rope_type": "default"}
    if family.local_theta:
        full = {**rope, "rope_theta": model.rope_theta}
        local = {"rope_type": "default", "rope_theta": model.window_rope_theta} if model.window_rope_theta else full
        keys["rope_parameters"] = dict(zip(ATTENTION_TYPES, (full, local), strict=True))
    elif model.rope_scaling != "none":
        keys["rope_scaling"] = rope
    blocks = range(model.layers)
    if family.period:
        keys["layer_types"] = [ATTENTION_TYPES[model.window_of(block) > 0] for block in blocks]
    if "no_rope_every" in family.keys:
        keys["no_rope_layers"] = [int(model.rotates(block)) for block in blocks]
    return keys


def _multipliers(family: Family, hf_config: Mapping[str, Any], model: ModelConfig) -> dict[str, float]:
    """Return the settings of [parameterization] for the multipliers of an architecture. Raises UserError."""
    for key in family.multipliers:
        if not isinstance(value := hf_config[key], int | float) or not value > 0:
            raise UserError(f"config.json: {key} = {resolve.shown(value)} is not a number above 0; get the file again")
    table = family.own_table(hf_config, model)
    settings = {
        "embedding_multiplier": table.embedding,
        "residual_multiplier": table.residual,
        "output_multiplier": table.logits,
        "attention_multiplier": table.attention * model.head_size**0.5,
    }
    return {key: value for key, value in settings.items() if not math.isclose(value, 1, rel_tol=1e-12)}


def _require(hf_config: Mapping[str, Any], required: Mapping[str, Any], where: str = "") -> None:
    """Raise UserError for a key, also of a table, whose value is not the required one."""
    for key, wanted in required.items():
        value = hf_config.get(key)
        if isinstance(wanted, dict) and isinstance(value, Mapping):
            _require(value, wanted, f"{where}{key}.")
        elif key in hf_config and not _matches(value, wanted):
            shown = resolve.shown(value)
            raise UserError(f"config.json: {where}{key} = {shown} is not supported; megahp has {wanted!r}")


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
