"""The seconds and the memory of a step, by formulas alone: thousands of layouts in seconds. Imports no torch."""

from __future__ import annotations

from megahp.config import Config
from megahp.plan.formulas import rank_works
from megahp.plan.machine import Machine
from megahp.plan.rank import MEGAHP, Stack
from megahp.plan.step_time import Estimate, step_time


def estimate(config: Config, ranks: int, machine: Machine, stack: Stack | None = None) -> Estimate:
    """Return the estimate of the first step, by default of megahp's own.

    config: resolved, with its vocabulary. Raises UserError for a layout that these ranks cannot run.
    """
    return step_time(rank_works(config, ranks, stack), config, ranks, machine, stack or MEGAHP)
