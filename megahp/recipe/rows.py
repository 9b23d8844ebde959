"""List the numbers of a recipe, each with formula, source and confidence; warnings; and what other rules choose."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megahp.config import resolve
from megahp.log.progress import human_count
from megahp.recipe import loss_laws
from megahp.recipe.hyperparameter_laws import Choice
from megahp.recipe.recipe import Recipe, cannot_measure, rules
from megahp.recipe.sizing import MFU, RATIO
from megahp.scaling import flops, power_laws, sparsity
from megahp.scaling.batch import sizes
from megahp.scaling.laws import PowerLaw
from megahp.scaling.parameterization import Role

GIVEN = ("the command line", "given")
TABLE = ("CompleteP, arXiv 2505.01618, Table 1", "verified in source text")
COUNTED = ("megahp: counted, megahp/scaling/flops.py and batch/scheduler.py", "exact")
FORECAST = ("megahp: counted, megahp/scaling/batch, at the noise scale that B_crit's law forecasts", "forecast")
HYPERBOLA = ("McCandlish et al., arXiv 1812.06162; Power Lines, eq. 6", "secondary source; identity derived")
COLLAPSE = ("Scaling with Collapse (Power Lines' sibling)", "verified in source text")
JOURNEY = ("The Journey Matters, arXiv 2501.12486", "schedule verified in code; closed form derived")
BUBBLE = ("Narayanan et al., arXiv 2104.04473: idle over busy time of (interleaved) 1F1B", "secondary source: many")
OURS = ("megahp", "judgement")
PLANNED = ("megahp plan", "formulas held against published measurements: docs/plan.md")
# Factors from a base up to which no note is given, a judgement: transfer over tokens was not tried here, over size from
# 2 to 16 layers.
NEAR = {"tokens": 2.0, "parameters": 8.0}
LEFT_OPEN = ("megahp/config/schema.py: the rule leaves it open", "default")


@dataclass(frozen=True)
class RecipeRow:
    """One number of a recipe."""

    name: str
    value: float | str
    formula: str
    source: str
    confidence: str


def rows(recipe: Recipe) -> list[RecipeRow]:
    """Return the numbers of a recipe, in the order of their derivation."""
    return [*_size(recipe), *_rates(recipe), *_batches(recipe), *_outcome(recipe)]


def _size(recipe: Recipe) -> Iterator[RecipeRow]:
    model, given, loss = recipe.run.model, recipe.given, _by(recipe.laws.loss)
    size, tokens = recipe.sized
    size = "nearest shape to those given" if size == "given" else size
    by_size = loss if "L(" in size else GIVEN
    active = f"; active: {model.experts_per_token} of {model.experts} experts" * (model.experts > 0)
    yield RecipeRow("parameters", recipe.parameters, f"{size}; exact, with embeddings{active}", *by_size)
    if model.experts:
        total = flops.parameters(model, recipe.run.data.sequence_length)
        yield RecipeRow("all parameters", total, "all experts", *COUNTED)
    yield RecipeRow(
        "tokens", recipe.tokens, tokens, *(OURS if "the default" in tokens else loss if "L(" in tokens else GIVEN)
    )
    yield RecipeRow("tokens per parameter", recipe.tokens / recipe.parameters, "D / N", *COUNTED)
    ratio = f"width / layers near {RATIO(recipe.outside_embeddings):.3g}; size near the target"
    shape = ("given", *GIVEN) if given.width and given.layers else (ratio, *_by(RATIO))
    yield RecipeRow("width x layers", f"{model.width} x {model.layers}", *shape)
    yield RecipeRow("heads x head size", f"{model.heads} x {model.head_size}", "the head size of base or preset", *OURS)
    yield RecipeRow(
        "MLP width", model.mlp_width, f"{model.mlp_width / model.width:.3g} widths, of base or preset", *OURS
    )


def _rates(recipe: Recipe) -> Iterator[RecipeRow]:
    optimizer, base, table, choice = recipe.run.optimizer, recipe.run.parameterization, recipe.table, recipe.choice
    rule, model = table.rules[Role.HIDDEN], recipe.run.model
    m_n = 1.0 if choice else model.width / base.base_width
    m_l = model.layers / base.base_layers if base.name == "completep" else 1.0
    rate, other = _by(choice or recipe.base), LEFT_OPEN if choice else _by(recipe.base)
    tuned = "left open" if choice else "tuned on the base"
    yield RecipeRow("width, depth multiplier", f"{m_n:.4g}, {m_l:.4g}", "m_N, m_L: over the base's", *TABLE)
    yield RecipeRow("peak LR, base", optimizer.lr, "the rule's" if choice else tuned, *rate)
    yield RecipeRow("peak LR, hidden matrices", recipe.lr, "eta m_N^-1 m_L^(alpha - 1)", *TABLE)
    yield RecipeRow("init std, base", base.init_std, tuned, *other)
    yield RecipeRow("init std, hidden matrices", base.init_std * rule.init_std, "sigma m_N^-1/2", *TABLE)
    yield RecipeRow("embedding multiplier", table.embedding, tuned, *other)
    yield RecipeRow("logits multiplier", table.logits, f"{base.output_multiplier:g} m_N^-1", *TABLE)
    yield RecipeRow("residual multiplier", table.residual, "m_L^-alpha", *TABLE)
    yield RecipeRow("softmax scale", table.attention, "head size^-1 (sp: ^-1/2)", *TABLE)
    yield RecipeRow("beta1, beta2", f"{optimizer.beta1:g}, {optimizer.beta2:g}", tuned, *other)
    yield RecipeRow("eps, base", optimizer.eps, tuned, *other)
    yield RecipeRow("eps, hidden matrices", optimizer.eps * rule.eps, "eps m_N^-1 m_L^-alpha", *TABLE)
    law, batch = recipe.laws.timescale, recipe.run.step_tokens
    if choice:
        tau = power_laws.timescale(recipe.lr, recipe.weight_decay, batch, recipe.tokens)
        yield RecipeRow(
            "tau", tau, "B / (eta lambda D), eta and lambda of hidden matrices", "Power Lines, eq. 2", "derived"
        )
        yield RecipeRow("weight decay", optimizer.weight_decay, "left open", *LEFT_OPEN)
    else:
        yield RecipeRow("tau_opt", law(recipe.tokens / recipe.parameters), _formula(law, "TPP"), *_by(law))
        yield RecipeRow(
            "weight decay, hidden", recipe.weight_decay, "B / (eta D tau_opt), B the first batch", *_by(law)
        )
        factor = {"base": "", "width": " / m_N", "timescale": " x the learning rate's factor"}[table.decay]
        yield RecipeRow("weight decay, base", optimizer.weight_decay, f"as set: hidden{factor}", *TABLE)


def _batches(recipe: Recipe) -> Iterator[RecipeRow]:
    run, tokens, length = recipe.run, recipe.tokens, recipe.run.data.sequence_length
    optimal, critical, first = recipe.laws.optimal_batch, recipe.laws.critical_batch, run.batch.global_batch
    yield RecipeRow("B_opt, sequences", optimal(tokens) / length, f"{_formula(optimal, 'D')} tokens", *_by(optimal))
    least = recipe.least_tokens
    yield RecipeRow("D_min, tokens", least, "D = D_min (1 + B / B_crit(D_min)), B = D / steps", *HYPERBOLA)
    yield RecipeRow(
        "B_crit, sequences", critical(least) / length, f"{_formula(critical, 'D_min')} tokens", *_by(critical)
    )
    measured = run.batch.policy == "measured"
    counted = FORECAST if measured else COUNTED
    if measured:
        bound = f"{run.batch.noise_share:g} x the noise scale; forecast: B_crit along the run, (1 + p) a t^p"
        growth = f"B_opt x peak LR / LR once the LR decays, up to {bound}"
        yield RecipeRow("batch, sequences", f"{first:,} to {recipe.last_batch:,}", growth, *_by(critical))
    elif recipe.choice:
        yield RecipeRow("batch, sequences", first, "the rule's, rounded to what the ranks can run", *_by(recipe.choice))
    elif recipe.given.batch:
        yield RecipeRow("batch, sequences", first, "given", *GIVEN)
    else:
        yield RecipeRow("batch, sequences", first, "B_opt, rounded to what the ranks can run", *_by(optimal))
    fixed = max(1, tokens // (max(1, round(optimal(tokens) / length)) * length))
    yield RecipeRow("steps", recipe.steps, "of this batch schedule", *counted)
    overhead = tokens / power_laws.least_tokens(tokens, tokens / fixed, critical) - 1
    of_fixed = f"of the {fixed:,} at B_opt throughout, with {overhead:.1%} data overhead"
    saved = f"{1 - recipe.steps / fixed:.1%}" if recipe.steps < fixed else "none"
    yield RecipeRow("steps saved", saved, of_fixed, *counted)
    yield RecipeRow(
        "data overhead", f"{tokens / least - 1:.1%}", "D / D_min - 1, of one batch and as many steps", *HYPERBOLA
    )
    yield RecipeRow("warm-up, tokens", round(run.schedule.warmup * tokens), "10 % of D, then linearly to 0", *COLLAPSE)


def _outcome(recipe: Recipe) -> Iterator[RecipeRow]:
    law, tokens, given = recipe.laws.loss, recipe.tokens, recipe.given
    weights: float = recipe.parameters
    if given.density and given.density < 1:
        average, (begin, end) = sparsity.average_density(given.density), sparsity.pruning_span(given.density)
        weights -= recipe.outside_embeddings * (1 - average)
        yield RecipeRow("pruning", f"{begin:.1%} to {end:.1%} of D", "25 % to 75 % of compute, geometric", *JOURNEY)
        yield RecipeRow("N_avg", weights, f"embeddings, and {average:.4f} of the rest", *JOURNEY)
    if beyond := beyond_loss_law(recipe):
        yield RecipeRow("loss, nats per token", "unknown", beyond, *_by(law))
    else:
        interval, kind = loss_laws.interval(law, weights, tokens)
        value = f"{law(weights, tokens):.4f}" + (f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else "")
        terms = f"{law.floor:.4g} + {law.a:.4g} N^-{law.alpha:.4g} + {law.b:.4g} D^-{law.beta:.4g}"
        yield RecipeRow("loss, nats per token", value, f"{terms} at a batch near B_opt; {kind}", *_by(law))
        if of_tasks := recipe.laws.task_error:
            loss = law(weights, tokens)
            interval = of_tasks.interval(loss)
            value = f"{of_tasks(loss):.4f}" + (f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else "")
            formula = f"{of_tasks.most:.4g} - {of_tasks.scale:.4g} exp(-{of_tasks.exponent:.4g} L), L as it is above"
            yield RecipeRow("downstream error", value, formula, *_by(of_tasks))
    exact = flops.training_flops(recipe.run.model, recipe.run.data.sequence_length) * tokens
    yield RecipeRow("FLOPs, 6 N D", 6 * weights * tokens, "6 N D", "Hoffmann et al., arXiv 2203.15556", "convention")
    yield RecipeRow("FLOPs, exact", exact, "all matrix products, half of attention; dense", *COUNTED)
    if given.speed:
        by_mfu = GIVEN if given.mfu else (f"MFU of {MFU:g} assumed; measure it, or give --mfu", "assumption")
        by_mfu = PLANNED if recipe.base.mfu else by_mfu
        formula = f"exact FLOPs / ({given.gpus} GPUs x {given.peak_flops:.3g} x {given.mfu or MFU:g} MFU)"
        yield RecipeRow("days", recipe.seconds / 86400, formula, *by_mfu)
    if not recipe.base.get("checkpoint", "every"):
        formula = "a twentieth of the run" + ", or 30 minutes if that is less" * bool(recipe.seconds)
        yield RecipeRow("steps per checkpoint", recipe.run.checkpoint.every, formula, *OURS)
    if recipe.base.planned:
        yield RecipeRow("layout", recipe.base.planned, "the fastest that fits, by formulas", *PLANNED)
    parallel, batch = recipe.run.parallel, recipe.run.batch
    if parallel.pp > 1 and parallel.schedule in ("1f1b", "interleaved"):
        largest = sizes.largest_micro_batch(recipe.run, recipe.run.data.sequence_length)
        microbatches = batch.global_batch // (recipe.ranks * largest)
        idle = flops.pipeline_bubble(parallel.pp, microbatches, parallel.local_stages)
        yield RecipeRow(
            "pipeline bubble", f"{idle:.1%}", f"(p - 1) / (v m), m = {microbatches} at the first batch", *BUBBLE
        )


def beyond_loss_law(recipe: Recipe) -> str:
    """Explain why the loss law does not hold here, where it predicts more than guessing loses; "" if it holds."""
    predicted, vocabulary = recipe.laws.loss(recipe.parameters, recipe.tokens), recipe.run.model.vocab_size
    if predicted < math.log(vocabulary):
        return ""
    guessing = f"guessing {math.log(vocabulary):.4g} = ln {vocabulary:,}"
    return f"the law gives {predicted:.4g}, and {guessing}: too small a run for it"


def notes(recipe: Recipe) -> list[str]:
    """Return warnings: what is outside the range of a law, and what the base was not tuned for."""
    laws, tokens, choice = recipe.laws, recipe.tokens, recipe.choice
    loss, critical = laws.loss, laws.critical_batch
    shape = [("shape", "N without embeddings", float(recipe.outside_embeddings), RATIO.fitted, RATIO)]
    tau = [("tau_opt", "TPP", tokens / recipe.parameters, laws.timescale.fitted, laws.timescale)]
    used: list[tuple[str, str, float, tuple[float, float], Any]] = [
        ("loss", "N", recipe.parameters, loss.parameters, loss),
        ("loss", "D", tokens, loss.tokens, loss),
        *([] if recipe.given.width and recipe.given.layers else shape),
        *([] if choice else tau),
        ("B_opt", "D", tokens, laws.optimal_batch.fitted, laws.optimal_batch),
        ("B_crit", "D_min", recipe.least_tokens, critical.fitted, critical),
    ]
    if laws.task_error:
        used.append(("downstream error", "L", loss(recipe.parameters, tokens), laws.task_error.fitted, laws.task_error))
    warnings = [
        f"{name}: {symbol} = {value:.3g} is outside {low:.3g} to {high:.3g}, where the law was fitted ({law.source})"
        for name, symbol, value, (low, high), law in used
        if not 0.99 * low <= value <= 1.01 * high  # 20 TPP are 19.9 of the exact parameters
    ]
    if beyond := beyond_loss_law(recipe):
        warnings.insert(0, f"loss: {beyond}; the other laws are as doubtful here: fit your own (megahp fit)")
    if (mean := tokens / recipe.steps) > (limit := critical(recipe.least_tokens)):
        warnings.append(f"batch: a mean of {mean:.3g} tokens is above B_crit = {limit:.3g}, up to which the laws hold")
    target = (choice.batch if choice else laws.optimal_batch(tokens)) / recipe.run.data.sequence_length
    batch = recipe.run.batch
    if not recipe.given.batch and abs(batch.global_batch / target - 1) > 0.05:
        ranks = f"{recipe.ranks} data-parallel ranks with" if recipe.given.gpus else "an even number of ranks, with"
        rounded = f"{batch.global_batch}, which {ranks} batch.micro_batch = {batch.micro_batch} can run"
        warnings.append(f"batch: {'its law' if choice else 'B_opt'} gives {target:.3g} sequences; rounded to {rounded}")
    if (why := cannot_measure(recipe.run)) and not choice and not recipe.given.batch:
        warnings.append(f"batch: the base has {why}, so the noise scale is not measured; the batch stays at B_opt")
    if choice:
        warnings.append(f"{choice.rule} is for {choice.rate}; schedule, init and weight decay are not its own")
        warnings += [f"{choice.rule}: {choice.outside}"] if choice.outside else []
    if experts := recipe.run.model.experts:
        warnings.append(
            f"the laws are of dense models: N is the active parameters here, which is ours; with {experts} experts the "
            "loss is lower than the law says, and weight decay and batch are untried: fit your own (megahp fit)"
        )
    warnings += beyond_base(recipe)
    if recipe.base.preset and not choice:
        tuned = resolve.resolve([(recipe.base.name, {"model": recipe.base.tree["model"]})]).config.model
        ours, theirs = ([m.activation, m.norm, m.positions, f"bias={m.bias}"] for m in (recipe.run.model, tuned))
        if ours != theirs:
            warnings.append(f"the base was tuned on {' '.join(theirs)}, and {recipe.base.preset} is {' '.join(ours)}")
    return warnings


def beyond_base(recipe: Recipe) -> list[str]:
    """Return warnings where the run is further from the user's own base, in tokens or size, than transfer was tried."""
    base, warnings = recipe.base, list[str]()
    if not base.tokens or recipe.choice:
        return warnings
    tree = [(base.name, {"model": base.tree["model"]}), ("its vocabulary", {"model": base.overrides.get("model", {})})]
    size = flops.parameters(resolve.resolve(tree).config.model, recipe.run.data.sequence_length, active=True)
    for what, target, tuned in (("tokens", recipe.tokens, base.tokens), ("parameters", recipe.parameters, size)):
        if 1 / NEAR[what] <= target / tuned <= NEAR[what]:
            continue
        times = f"{target / tuned:,.3g} times" if target > tuned else f"1/{tuned / target:,.3g}"
        by, tried = {
            "tokens": ("tau_opt and B_opt", "not tried here at all"),
            "parameters": ("the parameterization", "tried here on 2 to 16 layers of width 64 alone (docs/transfer.md)"),
        }[what]
        warnings.append(
            f"{base.name} was tuned at {human_count(tuned)} {what}, and {human_count(target)} are {times} as many: "
            f"transfer over {what} is {by}'s extrapolation, {tried}; tune a base nearer to it, or check with megahp "
            "transfer-sweep"
        )
    return warnings


def choices(recipe: Recipe) -> list[Choice]:
    """Return this recipe's choice, at the batch of a run with one batch and as many steps, then the other rules'."""
    run, batch, decay = recipe.run, recipe.tokens / recipe.steps, recipe.weight_decay
    if not recipe.choice:
        decay = decay * batch / run.step_tokens
    by, beta2 = _by(recipe.choice or recipe.base), run.optimizer.beta2
    rule, kind = f"megahp, {recipe.laws.rule}", f"AdamW, {run.parameterization.name}"
    own = Choice(rule, recipe.lr, kind, batch, decay, beta2, *by)
    others = rules(run.model, run.data.sequence_length, recipe.tokens)
    return [own, *(other for other in others if other.rule != recipe.laws.rule)]


def _formula(law: PowerLaw, symbol: str) -> str:
    return f"{law.scale:.4g} {symbol}^{law.exponent:.4g}"


def _by(law: Any) -> tuple[str, str]:
    return law.source, law.confidence
