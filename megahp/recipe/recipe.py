"""Derive a run file from what is known of a run. rows.py lists where its numbers come from.

Learning rate and init are transferred from a tuned base by the parameterization, weight decay and batch come from Power
Lines; or learning rate and batch come from another rule, and what that does not say is megahp's default. Every law is
named in the result, and none is silently replaced by another.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megahp.config import Auto, BatchConfig, Config, ModelConfig, get_setting, resolve, with_values
from megahp.config.resolve import Resolved
from megahp.errors import UserError, nearest_multiples
from megahp.log.progress import human_count
from megahp.recipe.hyperparameter_laws import Choice, deepseek, nanochat, olmo_ladder, step_law
from megahp.recipe.sizing import Given, outside_embeddings, refuse_mistakes, shaped, tokens_for
from megahp.scaling import flops, power_laws
from megahp.scaling.batch import BatchScheduler, Progress, noise_forecast, sizes
from megahp.scaling.laws import ErrorLaw, LossLaw, PowerLaw
from megahp.scaling.parameterization import Role, Table, table_of

MIN_SAVES, SAVE_SECONDS = 20, 1800.0  # at least so many checkpoints of a run, and at most so long between two
MAX_SHARED = 8  # without --gpus, round the batch so that up to this many data-parallel ranks can share it
RULES = ("power-lines", "step-law", "deepseek")


@dataclass(frozen=True)
class Base:
    """The tuned run that hyperparameters are transferred from: its settings as given, {section: {key: value}}."""

    name: str
    tree: Mapping[str, Mapping[str, Any]]
    source: str
    confidence: str
    preset: str = ""  # of the model that replaces its own
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # on the command line
    tokens: int = 0  # the horizon it was tuned at; 0: the laws are known at its horizon
    layout: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # settings that a plan found for the GPUs
    planned: str = ""  # that layout in words
    mfu: float | None = None  # that it reaches, where nobody gave one

    @property
    def model(self) -> Mapping[str, Any]:
        return {**({"preset": self.preset} if self.preset else self.tree["model"]), **self.overrides.get("model", {})}

    def get(self, section: str, key: str) -> Any:
        """Return a setting of the base, or its default."""
        given = {**self.tree.get(section, {}), **self.overrides.get(section, {}), **self.layout.get(section, {})}
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
        "train": {"dtype": "auto"},
    },
    "Power Lines' muP proxy, width 256, 24 layers (Scaling with Collapse, Table 5)",
    "verified in source text; that it is CompleteP's base, as at that shape the two are one: derived",
)


@dataclass(frozen=True)
class Laws:
    """The laws of one recipe. rule: whose learning rate and batch, one of RULES."""

    loss: LossLaw
    timescale: PowerLaw = power_laws.TAU
    optimal_batch: PowerLaw = power_laws.OPTIMAL_BATCH
    critical_batch: PowerLaw = power_laws.CRITICAL_BATCH
    task_error: ErrorLaw | None = None
    rule: str = "power-lines"


@dataclass(frozen=True)
class Recipe:
    """A run file, and what it was derived from."""

    resolved: Resolved
    given: Given
    base: Base
    laws: Laws
    choice: Choice | None  # of the rule; None for Power Lines
    parameters: int  # active ones, which is what the laws' N is taken to be where there are experts
    outside_embeddings: int
    sized: tuple[str, str]  # formulas of parameters and tokens
    ranks: int  # data-parallel
    steps: int
    last_batch: int

    @property
    def seconds(self) -> float:
        """Training time on the cluster; 0 if none is given."""
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
        """The peak learning rate, as applied to hidden matrices."""
        return self.run.optimizer.lr * self.table.rules[Role.HIDDEN].lr

    @property
    def weight_decay(self) -> float:
        """The weight decay at the first batch, as applied to hidden matrices."""
        return self.run.optimizer.weight_decay * self.table.rules[Role.HIDDEN].weight_decay

    @property
    def least_tokens(self) -> float:
        """D_min of a run with one batch throughout and as many steps."""
        return power_laws.least_tokens(self.tokens, self.tokens / self.steps, self.laws.critical_batch)


def make_recipe(given: Given, base: Base, laws: Laws, name: str = "") -> Recipe:
    """Derive the run file of a run. name: by default its size and tokens.

    Raises UserError for options that determine no run, and for a run that the laws or the run file do not cover.
    """
    refuse_mistakes(given, laws.loss)
    template = resolve.resolve([(base.name, {"model": base.model})]).config.model
    if laws.rule == "power-lines" and base.get("parameterization", "name") == "sp":
        raise UserError(f"parameterization.name = 'sp' ({base.name}) transfers nothing; tune a base with completep")
    if (quantize := template.quantize) != "none":
        raise UserError(
            f"model.quantize = {quantize!r} ({base.name}): the laws are of full precision; remove it from the base, "
            "and add it to the run file, or to a branch"
        )
    if (method := base.get("sparsity", "method")) != "none":
        raise UserError(
            f"sparsity.method = {method!r} ({base.name}): the laws are of dense models; remove it from the base, and "
            "add it to the run file, or plan pruning with --density"
        )
    if given.target_loss and given.target_loss >= (guessing := math.log(template.vocab_size)):
        raise UserError(
            f"--target-loss {given.target_loss:g} is not below ln {template.vocab_size} = {guessing:.4g}, the loss of "
            "guessing among the vocabulary; give a lower one"
        )
    length = base.get("data", "sequence_length")
    model, size_formula = shaped(template, given, laws.loss, length)
    n = flops.parameters(model, length, active=True)
    tokens, tokens_formula = tokens_for(n, flops.training_flops(model, length), given, laws.loss)
    choice = next((other for other in rules(model, length, tokens) if other.rule == laws.rule), None)
    name = name or f"{human_count(given.params or n)}-{human_count(tokens)}"
    tree = _tree(base, model, round(tokens), name, choice)
    if given.density and given.density < 1:
        tree[-1][1]["sparsity"] = {"method": "gradual", "density": given.density}
    draft = resolve.resolve(tree).config
    replica = draft.parallel.tp * draft.parallel.pp * draft.parallel.cp  # ranks of one
    if given.gpus and given.gpus % replica:
        raise UserError(
            f"--gpus {given.gpus} is not a multiple of tp x pp x cp = {replica} ({base.name}); "
            f"the nearest are {nearest_multiples(replica, given.gpus)}"
        )
    ranks = (given.gpus or replica) // replica
    tree[-1][1].update(_batch_settings(draft, given, laws, choice, n, ranks, base.get("batch", "micro_batch")))
    resolved = resolve.resolve(tree)
    steps, last_batch = steps_of(resolved.config, ranks)
    hidden = outside_embeddings(model, length)
    formulas = size_formula, tokens_formula
    recipe = Recipe(resolved, given, base, laws, choice, n, hidden, formulas, ranks, steps, last_batch)
    if base.get("checkpoint", "every"):
        return recipe
    # Only now are the steps known, which the batch schedule decides.
    tree[-1][1]["checkpoint"] = {"every": saving_interval(steps, recipe.seconds)}
    return replace(recipe, resolved=resolve.resolve(tree))


def saving_interval(steps: int, seconds: float) -> int:
    """Return the steps between checkpoints: a twentieth of the run, or 30 minutes if that is less, in two digits.

    seconds: of the whole run, 0 = unknown. A judgement: little is lost in a crash, and little time spent saving.
    """
    every = max(1, min(steps // MIN_SAVES, int(steps * SAVE_SECONDS / seconds) if seconds else steps))
    unit = 10 ** max(0, len(str(every)) - 2)
    return every // unit * unit


def rules(model: ModelConfig, length: int, tokens: float) -> list[Choice]:
    """Return what the published rules choose for this model and these tokens."""
    hidden = outside_embeddings(model, length)
    # DeepSeek's C counts all of attention, and no embeddings.
    per_token = flops.training_flops(model, length, causal=False) - 6 * model.width * model.padded_vocab
    return [step_law(hidden, tokens), deepseek(per_token * tokens), nanochat(tokens), olmo_ladder(hidden)]


def _tree(
    base: Base, model: ModelConfig, tokens: int, name: str, choice: Choice | None
) -> list[tuple[str, dict[str, Any]]]:
    """Return the layers of the run file, without the batch: the base less what belongs to its own run, the command
    line's settings, and the derived ones, which win."""
    shape = ("width", "layers", "heads", "kv_heads", "head_size", "mlp_width", *["expert_width"] * (model.experts > 0))
    dropped = {"model": shape, "train": ("tokens", "steps", "start_from", "weights"), "log": ("name",)}
    kept: dict[str, Any] = {
        name: {key: value for key, value in section.items() if key not in dropped.get(name, ())}
        for name, section in {**base.tree, "model": base.model}.items()
        if name not in ("schedule", "batch", "distill")
    }
    derived: dict[str, Any] = {
        "model": {key: getattr(model, key) for key in shape},
        "schedule": {"name": "decay-to-zero", "warmup": 0.1},  # Scaling with Collapse; verified in source text
        "batch": {"global_batch": 1, "micro_batch": 1},  # a placeholder that any layout accepts; see _batch_settings
        "train": {"tokens": tokens},
        "log": {"name": name},
    }
    if choice:
        kept["parameterization"], derived["parameterization"] = {}, {"name": "sp"}
        kept["optimizer"], derived["optimizer"] = {}, {"lr": choice.lr}
    layers = [(base.name, kept), ("command line", dict(base.overrides)), ("megahp plan", dict(base.layout))]
    return [*layers, ("megahp recipe", derived)]


def _batch_settings(
    run: Config, given: Given, laws: Laws, choice: Choice | None, n: int, ranks: int, micro: int | Auto
) -> dict[str, dict[str, Any]]:
    """Return the first batch, B_opt rounded to what the ranks can run, and its weight decay.

    B_opt(D) and lambda = B / (eta D tau_opt(D / N)): Power Lines, eq. 5 and 4, from secondary sources; or the rule's
    batch, which leaves the weight decay open.
    """
    length, tokens = run.data.sequence_length, run.train.tokens
    grows = not (given.batch or choice or cannot_measure(run))
    target = given.batch or (choice.batch if choice else laws.optimal_batch(tokens)) / length
    draft = with_values(run, {"batch.micro_batch": micro})
    unit, least = sizes.batch_multiple(draft, ranks), sizes.least_batch(draft, ranks)
    # A smaller microbatch allows a given batch exactly, and B_opt to within an eighth.
    coarse = target < 4 * unit
    if given.gpus:  # these ranks alone have to divide it
        coarse = abs(max(1, round(target / unit)) * unit / target - 1) > 1 / 8
    if isinstance(micro, int) and micro > 1 and (target % unit if given.batch else coarse):
        return _batch_settings(run, given, laws, choice, n, ranks, micro // 2)
    if given.batch and (given.batch % unit or given.batch < least):
        near = nearest_multiples(unit, max(given.batch, least))
        problem = f"--batch {given.batch} cannot be divided over {ranks} data-parallel ranks"
        raise UserError(f"{problem}; the nearest that can are {near}")
    if not (given.gpus or given.batch) and target >= 4 * unit:  # at most a quarter from B_opt, whose optimum is flat
        unit *= min(MAX_SHARED, max(2, 2 ** int(math.log2(target / (4 * unit)))))
    batch = max(least, round(target / unit) * unit)
    policy = "measured" if grows else "constant"
    config: dict[str, Any] = {"policy": policy, "global_batch": batch, "micro_batch": micro}
    # A calibration costs one microbatch per rank, so steps of more microbatches can afford it more often; in a pipeline
    # it costs a whole step.
    if grows and run.parallel.pp == 1 and isinstance(micro, int):
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
    """Return the setting that rules out measuring the noise scale; "" if none does."""
    if run.optimizer.name != "adamw":
        return f"optimizer.name = {run.optimizer.name!r}"
    return "" if run.train.noise_scale else "train.noise_scale = false"


def steps_of(run: Config, ranks: int) -> tuple[int, int]:
    """Simulate a run's BatchScheduler on the forecast noise scale; return its steps and last batch.

    All steps between two decisions are taken at once. batch.policy: constant or measured.
    """
    scheduler, progress, forecast = BatchScheduler(run, ranks), Progress(), noise_forecast(run, Progress(), None)
    while step := scheduler.step(progress):
        left = (run.train.tokens - progress.tokens) // step.tokens
        steps = min(left, scheduler.steps_to_decision(progress.step))
        progress = Progress(progress.step + steps, progress.samples, progress.tokens + steps * step.tokens)
        scheduler.update(progress, forecast(progress.tokens))
    return progress.step, scheduler.batch
