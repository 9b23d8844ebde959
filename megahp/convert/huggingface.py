"""Models as Hugging Face's transformers has them, both ways: what stands in config.json, and tensors by its names.

Its architectures have none of our multipliers, so they are folded into the weights. transformers itself is not needed.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megahp.config import Config, ModelConfig, resolve
from megahp.convert.families import ABSENT, ACTIVATIONS, EXPERTS, LINEAR, Family, family_named, family_of, has, has_bias
from megahp.errors import UserError
from megahp.model.build import longest
from megahp.parallel.parameters import Row
from megahp.scaling.parameterization import Role, table_of

Weights = Mapping[str, Tensor]  # by name; one is looked up when it is its turn, so they may lie in files
Tensors = Iterator[tuple[str, Tensor]]
OLDER = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor", "num_experts": "num_local_experts"}
OLD_BUFFERS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.inv_freq$")  # early versions saved them


def export(config: Config, weights: Weights, family: Family | None = None) -> tuple[dict[str, Any], Tensors]:
    """What config.json says, and the tensors by name, of the architecture that computes our model's logits, the first
    that does where none is given.

    weights: the global ones by our names, of any floating dtype, which theirs then have. Biases that only they have are
    zeros, and the rows that pad the vocabulary are left out. Raises UserError where no architecture has the model.
    """
    model, read = without_multipliers(config, weights)
    family = family_of(model, family)
    lacking = family.always_biased and not model.bias
    model = replace(model, bias=model.bias or lacking)
    written = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    values = {**vars(model), "activation": written[model.activation], "sequence_length": longest(config)}
    hf_config = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        **{key: values[setting] for setting, key in family.keys.items()},
        **dict.fromkeys(family.bias_keys, model.bias),
        **family.needs,
        **family.writes,
        "bos_token_id": None,  # the tokenizer's affair; left out they would be those of another one
        "eos_token_id": None,
    }
    return hf_config, _exported(family, model, read, lacking)


def _exported(family: Family, model: ModelConfig, read: Callable[[str], Tensor], lacking: bool) -> Tensors:
    tensor = torch.empty(0)
    for name, module, theirs in _names(family, model, family.bias):
        zeros = lacking and name.endswith(".bias")  # as many as its weight, which came just before, has rows
        tensor = tensor.new_zeros(len(tensor)) if zeros else read(name)
        if not theirs:
            if tensor.any():
                raise UserError(f"{name} is not 0, and {family.architecture} has no such bias")
            continue
        for their_name, part in zip(theirs, _apart(family, model, module, tensor), strict=True):
            yield their_name, part.contiguous()


def import_(
    hf_config: Mapping[str, Any], weights: Weights, family: Family | None = None
) -> tuple[dict[str, dict[str, Any]], Tensors]:
    """Settings, as a layer for `resolve`, and our weights by name, of the model that config.json and tensors describe.

    The parameterization is SP. Biases that only some modules have are zeros in the others. Rows that pad the vocabulary
    are the mean of the others: exp is convex, so at any hidden state n of them add at most n / vocab_size to the
    softmax's sum. (Zeros would rule it where the logits of all tokens are far below 0.) Raises UserError for an
    architecture, or a setting of one, that we do not have, and for tensors that are missing or left over.
    """
    family = family or family_named(hf_config.get("model_type"))
    hf = {**ABSENT, **family.absent, **_flat(hf_config)}
    values = _settings(family, hf)
    data = {"sequence_length": values.pop("sequence_length")}
    layer = {"data": data, "model": values, "parameterization": {"name": "sp"}}
    model = resolve.resolve([("config.json", {"model": values})]).config.model
    # what names lack in files of a model without its head, such as the first GPT-2's
    stem = family.blocks.partition(".")[0] + "."
    stem = "" if any(name.startswith(stem) for name in weights) else stem
    names = list(_names(family, model, family.biased(hf), stem))
    needed, found = {name for *_, theirs in names for name in theirs}, set(weights)
    left = {name for name in found - needed if not OLD_BUFFERS.search(name)}
    left -= {f"{family.outside['unembedding']}.weight"}  # a tied one, which some write all the same
    for wrong, words in ((needed - found, "are missing"), (left, "are not of its architecture")):
        if wrong:
            raise UserError(f"{len(wrong)} tensors of the {family.model_type} model {words}, such as {min(wrong)}")
    return layer, _imported(family, model, weights, names)


def _imported(
    family: Family, model: ModelConfig, weights: Weights, names: Sequence[tuple[str, str, list[str]]]
) -> Tensors:
    tensor = torch.empty(0)
    for name, module, theirs in names:
        parts = [weights[each] for each in theirs]
        try:  # without any, a bias of zeros: as many as its weight, which came just before, has rows
            tensor = _together(family, model, module, parts) if parts else tensor.new_zeros(len(tensor))
        except RuntimeError:
            shapes = ", ".join(f"{each} {list(part.shape)}" for each, part in zip(theirs, parts, strict=True))
            raise UserError(f"{shapes}: not the shapes of the {family.model_type} model that is described") from None
        if tensor.numel():  # not so are shared experts where there are none
            yield name, tensor.contiguous()


def without_multipliers(config: Config, weights: Weights) -> tuple[ModelConfig, Callable[[str], Tensor]]:
    """The model that computes the same in SP with all multipliers 1, and what reads its weights by name.

    Of the table, `embedding` goes into the embeddings, which unties a tied head; `residual` into the last matrix of
    each branch; `logits` into the final norm, which is right for a tied head too; `attention`, over SP's, into the
    queries, or their norm. A weight is rounded once, and not at all where a multiplier is a power of two.
    """
    model = config.model

    def read(name: str) -> Tensor:
        module = _module(name)
        if module == "unembedding" and model.tied_embeddings:
            return weights["embedding.weight"]
        if module.startswith("mlp.shared.") and not model.shared_experts:  # they have it all the same, with no rows
            return torch.empty((model.width, 0) if module == "mlp.shared.down" else (0, model.width))
        return _scaled(config, name, weights[name], torch.mul)

    return replace(model, tied_embeddings=model.tied_embeddings and table_of(config).embedding == 1), read


def with_multipliers(config: Config, weights: Tensors) -> Tensors:
    """The inverse of `without_multipliers`: the model's own weights, the same to the bit where multipliers are powers
    of two, else within an ulp, since they were rounded twice. Raises UserError for weights that cannot have come of it:
    a bias the model does not have, or a head that is no longer tied."""
    model, table = config.model, table_of(config)
    embedding = torch.empty(0)
    for name, weight in weights:
        if name.endswith(".bias") and has_bias(model, _module(name)) and not model.bias:
            if weight.any():
                raise UserError(f"{name} is not 0, and the model had no biases")
        elif model.tied_embeddings and table.embedding != 1 and name == "embedding.weight":
            embedding = weight
        elif model.tied_embeddings and name == "unembedding.weight":  # which is the embedding as it was
            folded = _scaled(config, "embedding.weight", weight, torch.mul)
            if not folded[: model.vocab_size].equal(embedding[: model.vocab_size]):
                raise UserError("embedding and unembedding have parted, and the model's are tied")
            yield "embedding.weight", weight
        else:
            yield name, _scaled(config, name, weight, torch.div)


def _scaled(config: Config, name: str, weight: Tensor, by: Callable[[Tensor, float], Tensor]) -> Tensor:
    """A weight of ours times the multipliers that are folded into it, or over them."""
    table, qkv = table_of(config), _qkv(config.model)
    attention = table.attention / config.model.head_size**-0.5
    factors = {
        **dict.fromkeys(("embedding", "positions"), table.embedding),
        **dict.fromkeys(("attention.out", "mlp.down", "mlp.experts.down", "mlp.shared.down"), table.residual),
        "attention.query_norm": attention,
        "final_norm": table.logits,
    }
    if _module(name) == "attention.qkv" and not config.model.qk_norm:
        queries, *others = qkv.matrices(weight)
        return qkv.fuse([_rounded(queries, attention, by), *others])
    return _rounded(weight, factors.get(_module(name), 1.0), by)


def _rounded(weight: Tensor, factor: float, by: Callable[[Tensor, float], Tensor]) -> Tensor:
    return weight if factor == 1 else by(weight.double(), factor).to(weight.dtype)


def _module(name: str) -> str:
    """Which of a block's, or of the model's, modules a tensor of ours belongs to."""
    return re.sub(r"^blocks\.\d+\.|\.(weight|bias)$", "", name)


def _qkv(model: ModelConfig) -> Row:
    """What takes our fused matrix apart into all queries, all keys and all values."""
    size = model.head_size
    return Row(Role.HIDDEN, fused=(model.heads // model.kv_heads * size, size, size))


def _names(
    family: Family, model: ModelConfig, biased: Collection[str], stem: str = ""
) -> Iterator[tuple[str, str, list[str]]]:
    """Our tensors: name, module within a block, and their names, without the stem, for what it is made of.

    biased: the modules that have a bias there; ours has none of theirs to be made of where another has.
    """
    modules = [(name, name, theirs) for name, theirs in family.outside.items() if has(model, name)]
    for layer in range(model.layers):
        for module, theirs in family.inside.items():
            if has(model, module, layer):
                places = " ".join(f"{family.blocks}.{layer}.{each}" for each in theirs.split())
                modules.append((f"blocks.{layer}.{module}", module, places))
    for name, module, theirs in modules:
        found = [each.removeprefix(stem) for each in theirs.split()]
        if module in EXPERTS:
            yield name, module, [each.replace("*", str(number)) for each in found for number in range(model.experts)]
        elif module == "mlp.router.bias":
            yield name, module, found
        else:
            yield f"{name}.weight", module, [f"{each}.weight" for each in found]
            if model.bias and has_bias(model, module):
                yield f"{name}.bias", module, [f"{each}.bias" for each in found if module in biased]


def _apart(family: Family, model: ModelConfig, module: str, ours: Tensor) -> Sequence[Tensor]:
    """What they have for one of our tensors."""
    if module in ("embedding", "unembedding"):
        return [ours[: model.vocab_size]]
    if module in EXPERTS:
        return ours.unbind()
    parts = [ours]
    if module == "attention.qkv" and family.qkv != "grouped":
        parts = _qkv(model).matrices(ours)
        parts = [torch.cat(parts)] if family.qkv == "stacked" else parts
    return [part.t() for part in parts] if family.transposed and module in LINEAR else parts


def _together(family: Family, model: ModelConfig, module: str, theirs: Sequence[Tensor]) -> Tensor:
    """The inverse of `_apart`."""
    if module in ("embedding", "unembedding"):
        padding = theirs[0].mean(0, keepdim=True).expand(model.padded_vocab - model.vocab_size, -1)
        return torch.cat((theirs[0], padding))
    if module in EXPERTS:
        return torch.stack(tuple(theirs))
    parts = [part.t() for part in theirs] if family.transposed and module in LINEAR else theirs
    if module == "attention.qkv" and family.qkv != "grouped":
        return _qkv(model).fuse(parts[0].chunk(3) if family.qkv == "stacked" else parts)
    return parts[0]


def _flat(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without a table of its own for rotary embeddings, newer keys also by their older names. Raises
    UserError."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(hf_config.get(key) or {}, Mapping):
            raise UserError(f"config.json: {key} = {hf_config[key]!r} is no table; get the file again")
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    flat = {**hf_config, **rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    return flat | {older: flat[newer] for older, newer in OLDER.items() if newer in flat}


def _settings(family: Family, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The model's settings, and its sequence length. Raises UserError for what makes it another model than ours."""
    if missing := [key for key in (*family.keys.values(), *family.bias_keys) if key not in hf]:
        raise UserError(f"config.json: a {family.model_type} model has {', '.join(missing)}, and this has not")
    for key, needed in {"rope_type": "default", **family.needs}.items():
        if not _agrees(hf.get(key, needed), needed):
            raise UserError(f"config.json: {key} = {hf[key]!r} makes another model than ours; we have {needed!r}")
    values: dict[str, Any] = {setting: 0 if hf[key] is None else hf[key] for setting, key in family.keys.items()}
    if "activation" in values:
        values["activation"] = ACTIVATIONS.get(str(values["activation"]), values["activation"])
    for setting, allowed in family.values.items():
        if values.setdefault(setting, allowed[0]) not in allowed:
            key = family.keys[setting]
            raise UserError(f"config.json: {key} = {hf[key]!r} makes another model than ours; we have {allowed}")
    return {**values, "bias": bool(family.biased(hf))}


def _agrees(found: Any, needed: Any) -> bool:
    """Whether a value is the needed one; of a table, in what it says of the needed keys."""
    if isinstance(needed, dict):
        table = found or {}
        return isinstance(table, Mapping) and all(_agrees(table.get(key, want), want) for key, want in needed.items())
    return bool(found == needed)
