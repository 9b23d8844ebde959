"""The global batch along a run: when it changes (scheduler), the batch a policy proposes (policies), the batches a
layout can run (sizes), and what follows for the optimizer (rule)."""

from megahp.scaling.batch.forecast import noise_forecast
from megahp.scaling.batch.rule import Hyperparameters, follow, rule_of
from megahp.scaling.batch.scheduler import BatchScheduler, Change, Progress, StepPlan
from megahp.scaling.batch.sizes import batch_multiple, largest_micro_batch, least_batch, micro_batch, runnable
