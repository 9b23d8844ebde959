"""The policies by name. Each proposes a batch; BatchScheduler rounds it to what the layout can run."""

from megahp.scaling.batch.policies.constant import Constant
from megahp.scaling.batch.policies.law import Law
from megahp.scaling.batch.policies.measured import Measured
from megahp.scaling.batch.policies.noise_scale import NoiseScale
from megahp.scaling.batch.policies.ramp import Ramp
from megahp.scaling.batch.policies.table import Table

POLICIES = {
    "constant": Constant,
    "ramp": Ramp,
    "table": Table,
    "law": Law,
    "noise-scale": NoiseScale,
    "measured": Measured,
}
