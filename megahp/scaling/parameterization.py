"""Parameterizations as tables: how init, learning rate, weight decay, eps and forward multipliers of each role follow
from the width multiplier m_N, the depth multiplier m_L and the density multiplier m_rho.

A weight's learning rate is optimizer.lr x the batch rule's factor (scaling/batch/rule.py) x the schedule's
(BatchScheduler.step) x its role's (Rule.lr, by train/optimizer.py: rates).

No other file contains a scaling exponent. Sources: SP, muP and depth-alpha columns of CompleteP (arXiv 2505.01618)
Table 1; SmuPar (arXiv 2405.15743), which is muP with density factors, of a base that is dense; CompleteP with these
(scale_density) is ours. The two papers' muPs differ in the weight decay of hidden matrices: see DECAY.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from megahp.config import Config, ParameterizationConfig

# parameterization.weight_decay where it is empty. CompleteP's Table 1 multiplies hidden weight decay by m_N, in its muP
# column too (its authors' code does so in depth-alpha alone); SmuPar's Table 1 and code leave it as in the base.
DECAY = {"sp": "base", "mup": "width", "completep": "width", "smupar": "base"}


class Role(StrEnum):
    """What a parameter does; the table needs nothing else of it."""

    EMBEDDING = "embedding"  # token and position embeddings: fan-in does not grow with width
    HIDDEN = "hidden"  # matrices between width-sized spaces
    ROUTER = "router"  # from the width to the experts' scores: fan-out does not grow with width
    NORM = "norm"  # gains and biases of the norms inside blocks
    BIAS = "bias"  # biases of hidden matrices
    FINAL_NORM = "final_norm"  # gain and bias of the norm before the unembedding
    UNEMBEDDING = "unembedding"


@dataclass(frozen=True)
class Rule:
    """One role's multipliers of the base hyperparameters. Vectors have no init_std: they start at 1 or 0."""

    init_std: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    spectral_lr: float = 1.0  # of the learning rate of updates made orthogonal (Muon), beside `spectral_scale`


@dataclass(frozen=True)
class Table:
    """One parameterization, filled in for one model."""

    name: str
    rules: Mapping[Role, Rule]
    embedding: float  # multiplies the embedding's output
    residual: float  # multiplies what each branch adds to the residual stream
    logits: float  # multiplies the logits
    attention: float  # softmax scale
    branch_init: float = 1.0  # multiplies the initial standard deviation of each branch's last matrix
    decay: str = "width"  # parameterization.weight_decay
    scale_density: bool = False  # whether hidden matrices have SmuPar's factors

    def rule(self, role: Role, density: float = 1.0) -> Rule:
        """Return the rule of a weight. density: the share of it that is not masked, m_rho.

        A sum over fewer inputs is smaller by sqrt(m_rho), and an update's part of it by m_rho: SmuPar compensates for
        both. (arXiv 2405.15743, table 1) Weight decay stays, so lr x weight_decay grows as 1/m_rho, unless it keeps the
        timescale, which is ours (docs/transfer.md).
        """
        rule = self.rules[role]
        if not self.scale_density or role is not Role.HIDDEN:
            return rule
        decay = rule.weight_decay * (density if self.decay == "timescale" else 1.0)
        return replace(rule, init_std=rule.init_std * density**-0.5, lr=rule.lr / density, weight_decay=decay)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def is_of(self, saved: Mapping[str, Any]) -> bool:
        """Return whether `to_dict` gave this, here or in an older megahp, whose tables lacked the last fields."""
        older = {"branch_init": 1.0, "decay": self.decay, "scale_density": saved["name"] == "smupar"}
        return {**older, **saved} == self.to_dict()


def spectral_scale(fan_out: int, fan_in: int) -> float:
    """Return the spectral norm of an update that moves a hidden matrix's outputs as much at any width:
    sqrt(fan_out / fan_in).

    (A spectral condition for feature learning, arXiv 2310.17813, condition 1; from memory, unverified. For AdamW, whose
    updates have entries of about 1, it gives muP's 1 / fan_in.) That depth enters as for AdamW, since both updates have
    a size of their own whatever the gradient's, is our reading of CompleteP, not the paper's.
    """
    return math.sqrt(fan_out / fan_in)


def table_of(config: Config) -> Table:
    """Return the table for this run's model."""
    model = config.model
    return fill_in(config.parameterization, model.width, model.layers, model.head_size)


def fill_in(rules: ParameterizationConfig, width: int, layers: int, head_size: int) -> Table:
    """Return the table for a model of this width, depth and head size.

    muP and CompleteP scale the attention logits by 1/head_size, SP by its root. AdamW's eps is scaled in the
    residual blocks only, as in the paper's Table 1 (its authors' code scales every group's; at eps <= 1e-12 the
    two are the same to the eye). Norms and biases are not decayed.

    At depth_alpha = 0 there is no depth factor at all, as in the paper's figures, whose alpha = 0 is SP and muP, and in
    its authors' notebook (EleutherAI/nanoGPT-mup@completep, relative_distance_from_linearization.ipynb); the learning
    rate's m_L^(alpha - 1) would be 1/m_L there.

    The router is, in muP's terms, an output matrix (as in arXiv 2508.09752, from memory, unverified) without an output
    multiplier: init and learning rate fall as 1/m_N, and its gradient, unlike a hidden matrix's, does not. That depth
    enters as for any matrix in a residual branch is our reading of CompleteP.
    """
    m_n = width / rules.base_width if rules.name != "sp" else 1.0
    m_l = layers / rules.base_layers if rules.name == "completep" else 1.0
    depth_lr = m_l ** (rules.depth_alpha - 1) if rules.depth_alpha else 1.0
    decay = rules.weight_decay or DECAY[rules.name]
    scaled_decay = {"base": 1.0, "width": m_n, "timescale": m_n / depth_lr}[decay]
    eps = 1 / (m_n * m_l**rules.depth_alpha)
    lr = depth_lr / m_n
    vector = Rule(lr=depth_lr, weight_decay=0.0, eps=eps)
    by_role = {
        Role.EMBEDDING: Rule(),
        Role.HIDDEN: Rule(init_std=m_n**-0.5, lr=lr, weight_decay=scaled_decay, eps=eps, spectral_lr=depth_lr),
        Role.ROUTER: Rule(init_std=1 / m_n, lr=lr, weight_decay=scaled_decay, eps=m_l**-rules.depth_alpha),
        Role.NORM: vector,
        Role.BIAS: vector,
        Role.FINAL_NORM: Rule(weight_decay=0.0),
        Role.UNEMBEDDING: Rule(),
    }
    return Table(
        name=rules.name,
        rules=by_role,
        embedding=rules.embedding_multiplier,
        residual=rules.residual_multiplier * m_l**-rules.depth_alpha,
        logits=rules.output_multiplier / m_n,
        attention=rules.attention_multiplier * (head_size**-0.5 if rules.name == "sp" else 1 / head_size),
        branch_init=(2 * layers) ** -0.5 if rules.residual_init == "gpt2" else 1.0,
        decay=decay,
        scale_density=rules.name == "smupar" or rules.scale_density,
    )
