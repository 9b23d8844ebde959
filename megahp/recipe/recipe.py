"""The plan of a run: from what is known of it to its run file. What its numbers come from is in recipe_rows.py.

Learning rate and init come from a tuned base by the parameterization, weight decay and batch from Power Lines; or
learning rate and batch from another rule, which then leaves open what it says nothing about. Laws are named, and none
stands in for another unsaid.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megahp.config import BatchConfig, Config, ModelConfig, get_setting, resolve, with_values
from megahp.config.resolve import Resolved
from megahp.errors import UserError, nearest_multiples
from megahp.log.progress import human_count
from megahp.recipe.hyperparameter_laws import Choice, deepseek, nanochat, olmo_ladder, step_law
from megahp.recipe.sizing import Given, outside_embeddings, refuse_mistakes, shaped, tokens_for
from megahp.scaling import flops, power_laws
from megahp.scaling.batch import BatchScheduler, Progress, noise_forecast, sizes
from megahp.scaling.laws import LossLaw, PowerLaw
from megahp.scaling.parameterization import Role, Table, table_of

SAVES, LONG = 20, 1800.0  # checkpoints of a run at least; seconds between two at most
SHARED = 8  # data-parallel ranks, at most, that a batch can be shared out over where no cluster is given
RULES = ("power-lines", "step-law", "deepseek")


@dataclass(frozen=True)
class Base:
    """The tuned run that hyperparameters are taken from: its settings as given, {section: {key: value}}."""

    name: str
    tree: Mapping[str, Mapping[str, Any]]
    source: str
    confidence: str
    preset: str = ""  # whose model takes the place of its own
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # settings given beside it
    tokens: int = 0  # that it was tuned over; 0 where the laws are known at its horizon

    @property
    def model(self) -> Mapping[str, Any]:
        return {**({"preset": self.preset} if self.preset else self.tree["model"]), **self.overrides.get("model", {})}

    def get(self, section: str, key: str) -> Any:
        """The value it gives or leaves to the default."""
        given = {**self.tree.get(section, {}), **self.overrides.get(section, {})}
        return given.get(key, get_setting(Config(), f"{section}.{key}"))


PROXY = Base(
    "Power Lines' proxy",
    {
        "model": {
            **{"width": 256, "layers": 24, "heads": 4, "activation": "swiglu", "norm": "layernorm"},
            **{"positions": "alibi", "bias": True, "tied_embeddings": True, "vocab_size": 50257},
        },
        "parameterization": {
            **{"name": "completep", "base_width": 256, "base_layers": 24},
            **{"init_std": 0.0867, "embedding_multiplier": 9.17, "output_multiplier": 1.095},
        },
        "optimizer": {"lr": 1.62e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip": 1.0},
        "data": {"sequence_length": 2048},
        "train": {"dtype": "bfloat16"},
    },
    "Power Lines' muP proxy, width 256, 24 layers (Scaling with Collapse, Table 5)",
    "verified in source text; that it is CompleteP's base, as at that shape the two are one: derived",
)


@dataclass(frozen=True)
class Laws:
    """The laws of one plan. rule: whose learning rate and batch."""

    loss: LossLaw
    timescale: PowerLaw = power_laws.TAU
    optimal_batch: PowerLaw = power_laws.OPTIMAL_BATCH
    critical_batch: PowerLaw = power_laws.CRITICAL_BATCH
    rule: str = "power-lines"


@dataclass(frozen=True)
class Recipe:
    """A plan, and what it was made from."""

    resolved: Resolved
    given: Given
    base: Base
    laws: Laws
    choice: Choice | None  # of the rule, where that is not Power Lines
    parameters: int
    outside_embeddings: int
    sized: tuple[str, str]  # formulas of parameters and tokens
    ranks: int  # data-parallel ones
    steps: int
    last_batch: int

    @property
    def seconds(self) -> float:
        """Of training on the cluster; 0 where none is given."""
        exact = flops.training_flops(self.run.model, self.run.data.sequence_length) * self.tokens
        return exact / self.given.speed if self.given.speed else 0.0

    @property
    def run(self) -> Config:
        return self.resolved.config

    @property
    def tokens(self) -> int:
        return self.run.train.tokens

    @property
    def table(self) -> Table:
        return table_of(self.run)

    @property
    def lr(self) -> float:
        """The peak, as applied to hidden matrices."""
        return self.run.optimizer.lr * self.table.rules[Role.HIDDEN].lr

    @property
    def weight_decay(self) -> float:
        """At the first batch, as applied to hidden matrices."""
        return self.run.optimizer.weight_decay * self.table.rules[Role.HIDDEN].weight_decay

    @property
    def least_tokens(self) -> float:
        """D_min, of a run with one batch and as many steps."""
        return power_laws.least_tokens(self.tokens, self.tokens / self.steps, self.laws.critical_batch)


def make_recipe(given: Given, base: Base, laws: Laws, name: str = "") -> Recipe:
    """The plan of a run of this name, by default its size. Raises UserError for what is no plan, or one that no run
    file can hold."""
    refuse_mistakes(given, laws.loss)
    template = resolve.resolve([(base.name, {"model": base.model})]).config.model
    if laws.rule == "power-lines" and base.get("parameterization", "name") == "sp":
        raise UserError(f"parameterization.name = 'sp' ({base.name}) transfers nothing; tune a base under completep")
    if template.experts:
        raise UserError(f"model.experts = {template.experts} ({base.name}): the laws here are of dense models")
    if (method := base.get("sparsity", "method")) != "none":
        raise UserError(
            f"sparsity.method = {method!r} ({base.name}): the laws here are of dense models; leave it out of the base, "
            "and put it into the run file, or plan pruning with --density"
        )
    if given.target_loss and given.target_loss >= (guessing := math.log(template.vocab_size)):
        raise UserError(
            f"--target-loss {given.target_loss:g} is not below ln {template.vocab_size} = {guessing:.4g}, the loss of "
            "guessing among the vocabulary; aim lower"
        )
    length = base.get("data", "sequence_length")
    model, of_size = shaped(template, given, laws.loss, length)
    n = flops.parameters(model, length)
    tokens, of_tokens = tokens_for(n, flops.training_flops(model, length), given, laws.loss)
    choice = next((each for each in rules(model, length, tokens) if each.rule == laws.rule), None)
    name = name or f"{human_count(given.params or n)}-{human_count(tokens)}"
    tree = _tree(base, model, round(tokens), name, choice)
    if given.density and given.density < 1:
        tree[-1][1]["sparsity"] = {"method": "gradual", "density": given.density}
    draft = resolve.resolve(tree).config
    copy = draft.parallel.tp * draft.parallel.pp * draft.parallel.cp
    if given.gpus and given.gpus % copy:
        raise UserError(
            f"--gpus {given.gpus} is no multiple of the {copy} that tp x pp x cp of {base.name} need; "
            f"nearest that are: {nearest_multiples(copy, given.gpus)}"
        )
    ranks = (given.gpus or copy) // copy
    tree[-1][1].update(_batch_settings(draft, given, laws, choice, n, ranks, base.get("batch", "micro_batch")))
    resolved = resolve.resolve(tree)
    steps, last_batch = steps_of(resolved.config, ranks)
    hidden = outside_embeddings(model, length)
    made = Recipe(resolved, given, base, laws, choice, n, hidden, (of_size, of_tokens), ranks, steps, last_batch)
    if base.get("checkpoint", "every"):
        return made
    tree[-1][1]["checkpoint"] = {"every": saving_interval(steps, made.seconds)}
    return replace(made, resolved=resolve.resolve(tree))


def saving_interval(steps: int, seconds: float) -> int:
    """Steps from one checkpoint to the next: a twentieth of the run, or 30 minutes of it where that is less, in two
    digits. seconds: of the run, 0 = unknown."""
    every = max(1, min(steps // SAVES, int(steps * LONG / seconds) if seconds else steps))
    unit = 10 ** max(0, len(str(every)) - 2)
    return every // unit * unit


def rules(model: ModelConfig, length: int, tokens: float) -> list[Choice]:
    """What other people's rules would choose."""
    hidden = outside_embeddings(model, length)
    per_token = flops.training_flops(model, length, causal=False) - 6 * model.width * model.padded_vocab
    return [step_law(hidden, tokens), deepseek(per_token * tokens), nanochat(tokens), olmo_ladder(hidden)]


def _tree(
    base: Base, model: ModelConfig, tokens: int, name: str, choice: Choice | None
) -> list[tuple[str, dict[str, Any]]]:
    """The layers of the run file but for the batch: the base without what belonged to its own run, and the plan."""
    shape = ("width", "layers", "heads", "kv_heads", "head_size", "mlp_width")
    old = {"model": shape, "train": ("tokens", "steps", "start_from", "weights"), "log": ("name",)}
    kept: dict[str, Any] = {
        name: {key: value for key, value in section.items() if key not in old.get(name, ())}
        for name, section in {**base.tree, "model": base.model}.items()
        if name not in ("schedule", "batch")
    }
    plan: dict[str, Any] = {
        "model": {key: getattr(model, key) for key in shape},
        "schedule": {"name": "decay-to-zero", "warmup": 0.1},
        "batch": {"global_batch": 1, "micro_batch": 1},
        "train": {"tokens": tokens},
        "log": {"name": name},
    }
    if choice:
        kept["parameterization"], plan["parameterization"] = {}, {"name": "sp"}
        kept["optimizer"], plan["optimizer"] = {}, {"lr": choice.lr}
    return [(base.name, kept), ("command line", dict(base.overrides)), ("megahp recipe", plan)]


def _batch_settings(
    run: Config, given: Given, laws: Laws, choice: Choice | None, n: int, ranks: int, micro: int
) -> dict[str, dict[str, Any]]:
    """The batch, which is one the ranks can run, and the weight decay that goes with it."""
    length, tokens = run.data.sequence_length, run.train.tokens
    grows = not (given.batch or choice or cannot_measure(run))
    wanted = given.batch or (choice.batch if choice else laws.optimal_batch(tokens)) / length
    laid = with_values(run, {"batch.micro_batch": micro})
    unit, least = sizes.unit(laid, ranks), sizes.least_batch(laid, ranks)
    if micro > 1 and (wanted % unit if given.batch else wanted < 4 * unit):
        return _batch_settings(run, given, laws, choice, n, ranks, micro // 2)
    if given.batch and (given.batch % unit or given.batch < least):
        near = nearest_multiples(unit, max(given.batch, least))
        why = f"--batch {given.batch} cannot be shared out over {ranks} data-parallel ranks"
        raise UserError(f"{why}; nearest that can be: {near}")
    if not (given.gpus or given.batch) and wanted >= 4 * unit:  # at most a quarter from B_opt, a flat optimum
        unit *= min(SHARED, max(2, 2 ** int(math.log2(wanted / (4 * unit)))))
    batch = max(least, round(wanted / unit) * unit)
    config: dict[str, Any] = {
        "policy": "measured" if grows else "constant",
        "global_batch": batch,
        "micro_batch": micro,
    }
    if grows and run.parallel.pp == 1:  # a microbatch each, of a step that has so many; a pipeline takes a step's time
        config["calibrate_every"] = math.ceil(BatchConfig.calibrate_every * ranks * micro / batch)
    if grows and laws.critical_batch is not power_laws.CRITICAL_BATCH:
        config["critical_batch"] = [laws.critical_batch.scale, laws.critical_batch.exponent]
    if choice:
        return {"batch": config}
    rule = table_of(run).rules[Role.HIDDEN]
    lr, law = run.optimizer.lr * rule.lr, laws.timescale
    decay = power_laws.optimal_weight_decay(lr, batch * length, tokens, n, law)  # of hidden matrices
    return {"batch": config, "optimizer": {"weight_decay": decay / rule.weight_decay}}


def cannot_measure(run: Config) -> str:
    """Return what of the base keeps its batch from being measured; "" if nothing does."""
    if run.optimizer.name != "adamw":
        return f"optimizer.name = {run.optimizer.name!r}"
    return "" if run.train.noise_scale else "train.noise_scale = false"


def steps_of(run: Config, ranks: int) -> tuple[int, int]:
    """Return the steps of a run whose batch is constant or measured, and its last batch: BatchScheduler's own, driven
    by the forecast noise scale, with all steps between two decisions taken at once."""
    plan, progress, forecast = BatchScheduler(run, ranks), Progress(), noise_forecast(run, Progress(), None)
    while step := plan.step(progress):
        left = (run.train.tokens - progress.tokens) // step.tokens
        every = run.batch.look_every if run.batch.policy == "measured" else left
        many = min(left, every - progress.step % every)
        progress = Progress(progress.step + many, progress.samples, progress.tokens + many * step.tokens)
        plan.look(progress, forecast(progress.tokens))
    return progress.step, plan.batch
