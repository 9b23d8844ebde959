"""Search the data weights under which small proxy runs learn the validation sets best.

    megahp mix RUN.toml [section.key=value ...] --out FOLDER [--trials 24] [--shares 0.11,0.33,1]
        [--set REAL.toml] [--json FILE]

RUN.toml is a proxy of the run that the weights are for: its sources, a small model, few tokens. data.validation names
the sets, held out from what the model is for; the mean of their losses is minimised. The first two mixtures are in
proportion to the sources' tokens, and equal; the others come from optuna's tree-structured Parzen estimator. Each is
trained on a share of train.tokens, and on the next larger one only if it is in the best third of those trained so far
(successive halving). That is multi-fidelity Bayesian optimisation, as in ADMIRE-BayesOpt (2025; its abstract was read).

Start the same command several times, such as by `sbatch --array=1-8 --wrap "megahp mix ..."`: each is a worker, and
takes the next mixture until there are --trials of them. Workers share FOLDER, on a file system whose locks all nodes
see. After an interruption the same command resumes, and continues unfinished runs. You see a line per mixture, then the
best. --set writes data.weights into the run file that they are for, of the same data.train.
"""

import argparse
import contextlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megahp.commands.arguments import check_minimum
from megahp.commands.output import provenance, write_json
from megahp.config import Config, config_to_dict, resolve, with_values
from megahp.config.edit import edited
from megahp.data.indexed import IndexedDataset
from megahp.diagnose.child_runs import check_same_config, claimed, for_search, loss_of
from megahp.errors import UserError
from megahp.files import read_text, read_toml, replace_text
from megahp.log.progress import human_duration
from megahp.parallel.layout import fit
from megahp.train.prepare import prepare

KEPT = 3  # a mixture is trained on the next share if it is in the best 1/KEPT
LEAST = 0.001  # of a source, before the weights are made to add up to 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN.toml")
    add("overrides", nargs="*", metavar="section.key=value", help="override the file's settings, in every run")
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder of the runs and of the search's state")
    add("--trials", type=int, default=24, metavar="N", help="mixtures to try (default 24)")
    add(
        "--shares",
        type=parse_shares,
        default=[1 / 9, 1 / 3, 1.0],
        metavar="S,S,...",
        help="of train.tokens, the last 1",
    )
    add("--ranks", type=int, default=1, metavar="N", help="ranks of each run (default 1)")
    add("--seed", type=int, default=1, metavar="N", help="of the search; runs have train.seed (default 1)")
    add("--set", type=Path, metavar="REAL.toml", help="write the best weights into this run file")
    add("--json", type=Path, metavar="FILE", help="write every mixture and its losses")


def parse_shares(text: str) -> list[float]:
    """Parse 0.1,0.3,1 as an option's value. Raises ValueError."""
    return [float(word) for word in text.split(",")]


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    config = checked(options)
    study = open_study(options, config)
    began, before = time.monotonic(), len(ended(study))
    while trial := try_next(study, options, config):
        done = len(ended(study))
        left = (time.monotonic() - began) / max(1, done - before) * max(0, options.trials - done)
        print(f"[{done}/{options.trials}] {describe(trial, config)}; ETA {human_duration(left)}", flush=True)
    if (others := options.trials - len(ended(study))) > 0:
        print(f"{others} mixtures are being trained by other workers")
    whole = sorted((trial for trial in ended(study) if trial.state.name == "COMPLETE"), key=lambda trial: trial.value)
    if not whole:
        raise UserError(f"all {options.trials} mixtures diverged or were pruned; lower optimizer.lr, or raise --trials")
    print("\nthe best, then the sources' own proportions:")
    own = [trial for trial in ended(study) if np.allclose(weights_of(trial), proportions(config))]
    for trial in [*whole[:5], *own[:1]]:
        print(describe(trial, config))
    best = [round(weight, 4) for weight in weights_of(whole[0])]
    print(f"data.weights = {best}")
    if options.set:
        text = read_text(options.set, "run file")
        replace_text(options.set, edited(text, {"data.weights": best}))
    found = [{"weights": weights_of(trial), "losses": trial.intermediate_values} for trial in ended(study)]
    write_json(options.json, {**provenance(words), "sources": config.data.train, "mixtures": found})
    return 0


def checked(options: argparse.Namespace) -> Config:
    """Return the settings of every run, but for weights, tokens and name. Raises UserError."""
    check_minimum(options, trials=1, ranks=1, seed=0)
    shares = options.shares
    if not all(0 < a < b for a, b in zip(shares, shares[1:], strict=False)) or not 0 < shares[0] <= shares[-1] == 1:
        raise UserError(f"--shares {shares} must be ascending, above 0, and end at 1")
    config = resolve.load(options.run, options.overrides).config
    if len(config.data.train) < 2:
        raise UserError(f"data.train = {list(config.data.train)} is one source; name those to be mixed")
    if config.data.weights or config.data.mixtures:
        raise UserError("data.weights and data.mixtures are what is searched; remove them from the proxy's run file")
    if not config.data.validation:
        raise UserError("data.validation is empty; name the sets whose losses are to be lowest, as name:prefix")
    if config.train.steps:
        raise UserError(f"train.steps = {config.train.steps} would end all shares alike; lower train.tokens instead")
    real = read_toml(options.set, "run file").get("data", {}).get("train") if options.set else None
    if options.set and real != [*config.data.train]:
        raise UserError(f"--set {options.set} has data.train = {real}, and the proxy {[*config.data.train]}; give one")
    config = for_search(config, options.out)
    for share in shares:  # all checks of `megahp train`, before anything trains
        of_share(config, [1.0] * len(config.data.train), share, options.ranks)
    return config


def of_share(config: Config, weights: Sequence[float], share: float, ranks: int) -> Config:
    """Return the config of one run, as `megahp train` resolves it. Raises UserError."""
    name = "-".join(f"{100 * weight:.4g}" for weight in weights)
    tokens = round(share * config.train.tokens)
    values = {"data.weights": tuple(weights), "train.tokens": tokens, "log.name": f"{name}/{tokens}"}
    config = resolve.from_dict(config_to_dict(with_values(config, values)), "mixture")  # checks the tokens anew
    resolved = prepare(config, fit(config.parallel, ranks), ranks, resume=True)
    check_same_config(resolved)
    return resolved


def open_study(options: argparse.Namespace, config: Config) -> Any:
    """Open or begin the search, which workers share through a file. Raises UserError for another one's folder."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise UserError(f"optuna is not installed ({error}); pip install 'megahp[mix]'") from None

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options.out.mkdir(parents=True, exist_ok=True)
    file = JournalFileBackend(str(options.out.resolve() / "search.log"))  # its lock is a link, from inside the folder
    settings = json.loads(json.dumps({"config": config_to_dict(config), "shares": options.shares}))
    with claimed(options.out / "search.lock", wait=True):  # or two workers would begin it
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(file),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=KEPT),
            study_name="mix",
            load_if_exists=True,
        )
        if not study.user_attrs:
            study.set_user_attr("settings", settings)
            equal = [1 / len(config.data.train)] * len(config.data.train)
            for weights in dict.fromkeys(map(tuple, (proportions(config), equal))):
                study.enqueue_trial({f"source {n}": weight for n, weight in enumerate(weights)})
    if study.user_attrs["settings"] != settings:
        raise UserError(f"{options.out} holds a search with other settings or shares; name another --out")
    return study


def proportions(config: Config) -> list[float]:
    """Return the sources' shares of all tokens."""
    tokens = np.array([IndexedDataset(prefix).total_tokens for prefix in config.data.train], np.float64)
    return (tokens / tokens.sum()).tolist()


def try_next(study: Any, options: argparse.Namespace, config: Config) -> Any:
    """Train the next mixture, on more and more tokens while it is among the best: one whose worker was ended, if there
    is any. Returns it; None if there are enough."""
    import optuna

    states = optuna.trial.TrialState
    with contextlib.ExitStack() as claim:
        with claimed(options.out / "search.lock", wait=True):  # from finding what is left to claiming what is taken
            for left in study.get_trials(states=[states.RUNNING]):
                with claimed(options.out / f"claims/{left.number}") as is_left:
                    if is_left:  # its worker's lock ended with it; the runs that it finished are found by their weights
                        study.tell(left.number, state=states.FAIL)
                        if params := left.params or left.system_attrs.get("fixed_params"):
                            study.enqueue_trial(params)
            trials = study.get_trials()
            if sum(trial.state.name in ("COMPLETE", "PRUNED", "RUNNING") for trial in trials) >= options.trials:
                return None
            # another seed for every mixture, or all workers would draw the same; others' unfinished ones count as bad
            seed = options.seed + len(trials)
            study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
            trial = study.ask()
            claim.enter_context(claimed(options.out / f"claims/{trial.number}", wait=True))
            raw = [trial.suggest_float(f"source {n}", LEAST, 1) for n in range(len(config.data.train))]
        weights = [value / sum(raw) for value in raw]
        for rung, share in enumerate(options.shares):
            proxy = of_share(config, weights, share, options.ranks)
            loss = loss_of(proxy, options.ranks)
            shutil.rmtree(proxy.directory / "checkpoints", ignore_errors=True)
            trial.report(loss, KEPT**rung)
            if loss == math.inf or (share < 1 and trial.should_prune()):
                return study.tell(trial, state=states.PRUNED)
        return study.tell(trial, loss)


def ended(study: Any) -> list[Any]:
    """Return the mixtures that were trained, on all tokens or pruned, in the order in which they ended."""
    trials = [trial for trial in study.get_trials() if trial.state.name in ("COMPLETE", "PRUNED")]
    return sorted(trials, key=lambda trial: trial.datetime_complete)


def weights_of(trial: Any) -> list[float]:
    """Return a mixture's weights, which add up to 1."""
    raw = [trial.params[f"source {n}"] for n in range(len(trial.params))]
    return [value / sum(raw) for value in raw]


def describe(trial: Any, config: Config) -> str:
    """Return a line of a mixture's weights and losses."""
    parts = zip(weights_of(trial), config.data.train, strict=True)
    losses = " -> ".join(f"{loss:.4f}" for _, loss in sorted(trial.intermediate_values.items()))
    return f"{', '.join(f'{100 * weight:.1f} % {prefix}' for weight, prefix in parts)}: {losses}"
