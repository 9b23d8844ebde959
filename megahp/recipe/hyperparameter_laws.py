"""Published rules for learning rate and batch, unchanged: Step Law, DeepSeek, nanochat, OLMo's ladder.

Each was tuned for one parameterization, optimizer and schedule, so none is mixed with another. Batches are in tokens,
learning rates are the peak's as applied to hidden matrices.
"""

import math
from dataclasses import dataclass

SP = "AdamW, standard parameterization"


@dataclass(frozen=True)
class Choice:
    """The hyperparameters that one rule gives for a run; None: the rule does not say."""

    rule: str
    lr: float
    rate: str  # the optimizer and parameterization that lr is for
    batch: float  # tokens
    weight_decay: float | None
    beta2: float | None
    source: str
    confidence: str
    outside: str = ""  # how the run exceeds the range the rule was fitted on; "" if it does not


def step_law(hidden: float, tokens: float) -> Choice:
    """Return eta = 1.79 N^-0.713 D^0.307 and B = 0.58 D^0.571, N without embeddings.

    (Step Law, arXiv 2503.04715; several secondary sources, and the authors' released data; N without embeddings:
    unverified)
    """
    lr, batch = 1.79 * hidden**-0.713 * tokens**0.307, 0.58 * tokens**0.571
    source = "Step Law, arXiv 2503.04715; N without embeddings from memory, unverified"
    confidence = "secondary source: several; verified in data: step-law/steplaw"
    beyond = "its largest runs had 1e9 parameters and 1e11 tokens" if hidden > 1e9 or tokens > 1e11 else ""
    return Choice("step-law", lr, SP, batch, None, None, source, confidence, beyond)


def deepseek(flops: float) -> Choice:
    """Return eta = 0.3118 C^-0.125 and B = 0.292 C^0.3271.

    flops: C, of training without the embeddings, with all of attention, not the causal half. (DeepSeek LLM, arXiv
    2401.02954, a secondary source; its range of C: unverified)
    """
    lr, batch = 0.3118 * flops**-0.1250, 0.2920 * flops**0.3271
    source, confidence = "DeepSeek LLM, arXiv 2401.02954", "secondary source"
    beyond = "" if 1e17 <= flops <= 2e19 else "fitted on 1e17 to 2e19 FLOPs (from memory, unverified)"
    return Choice("deepseek", lr, SP, batch, None, None, source, confidence, beyond)


def nanochat(tokens: float) -> Choice:
    """Return B = 2^19 (D / D_12)^0.383, rounded to a power of two, eta growing as its root, and lambda so that B / (eta
    lambda D) is constant.

    D_12 is 12 tokens for each of the 110.1 M matrix weights of nanochat's model of depth 12. (karpathy/nanochat,
    scripts/base_train.py, verified in code; the 110.1 M: a secondary source)
    """
    at_depth_12, reference = 12 * 110.1e6, 2**19
    batch = 2 ** round(math.log2(reference * (tokens / at_depth_12) ** 0.383))
    root = math.sqrt(batch / reference)
    rate, decay = "Muon's, in spectral norm: not comparable", 0.28 * root * at_depth_12 / tokens
    source = "karpathy/nanochat, scripts/base_train.py at 00255c1; D_12 for a vocabulary of 32,768"
    confidence = "verified in code; its size at depth 12: secondary source"
    return Choice("nanochat-like", 0.02 * root, rate, batch, decay, None, source, confidence)


def olmo_ladder(hidden: float) -> Choice:
    """Return eta = 0.0047 (N / 108e6)^(-1/3) / 2 and B = 2048 x 160 (N / 108e6)^(2/3), whatever the tokens.

    (allenai/OLMo-core's model ladder, verified in code; that N is without embeddings: unverified)
    """
    ratio = hidden / 108e6
    lr, batch = 0.0047 * ratio ** (-1 / 3) / 2, 2048 * 160 * ratio ** (2 / 3)
    beta2 = 0.95 if batch >= 524_288 else 0.99
    source = "allenai/OLMo-core, model_ladder/wsds_chinchilla_run_configurator.py; N without embeddings, unverified"
    return Choice("olmo-ladder", lr, SP, batch, 0.1, beta2, source, "verified in code")
