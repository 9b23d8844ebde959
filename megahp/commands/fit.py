"""Fit scaling laws to finished runs."""

import importlib.util
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from megahp.commands.output import begins_with, check_folder, check_replaceable
from megahp.errors import UserError

LAWS = {
    "loss": "L(N, D)",
    "timescale": "tau_opt(D / N)",
    "optimal-batch": "B_opt(D)",
    "critical-batch": "B_crit(D_min)",
    "task-error": "downstream error(L)",
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory, or .jsonl table of runs")
    for name, law in LAWS.items():
        key = name.replace("-", "_")
        parser.add_argument(f"--{name}", action="append_const", dest="laws", const=key, help=f"fit {law}")
    parser.add_argument("--tied-exponents", action="store_true", help="alpha = beta in L(N, D)")
    parser.add_argument("--draws", type=int, default=200, metavar="K", help="bootstrap draws (default 200)")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default 1)")
    parser.add_argument("--out", type=Path, required=True, metavar="LAW.toml", help="law file to write")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot fits and residuals: .svg, .png or .pdf")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: Namespace, words: Sequence[str]) -> int:
    if importlib.util.find_spec("scipy") is None:
        raise UserError("megahp fit needs scipy, which is not installed; pip install 'megahp[fit]'")

    from megahp.recipe import fit_runs
    from megahp.recipe.law_file import HEADING, LawFile, write

    check_folder(options.out)
    check_replaceable("--out", {options.out: begins_with(HEADING.encode())}, filter(Path.is_file, options.runs))

    runs, notes = fit_runs.read_runs(options.runs)
    try:
        fits, refused = fit_runs.fit_laws(runs, options.laws, options.tied_exponents, options.draws, options.seed)
    except UserError as error:
        raise UserError("\n".join([str(error), *notes])) from None  # the notes tell which runs were skipped, and why
    try:
        write(options.out, LawFile(**{name: fitted.law for name, fitted in fits.items()}))
        if options.plot:
            fit_runs.plot(options.plot, fits)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written ({error.strerror}); name another file") from None
    laws = {name: fit_runs.summary(name, fitted) for name, fitted in fits.items()}
    notes += refused
    print(json.dumps({"laws": laws, "notes": notes}, indent=2) if options.json else fit_runs.text(laws, notes))
    return 0
