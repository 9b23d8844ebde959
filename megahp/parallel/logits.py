"""How many logits are held at a time. Imports no torch: a plan counts what the loss does."""

KEPT = 2**28  # bytes of a microbatch's logits on this rank; more are computed again in the backward pass
LOGITS_AT_ONCE = 2**21  # 8 MiB of fp32, which fits a CPU's cache (measured: docs/benchmarks/loss.md)


def rows_at_once(tokens: int, width: int) -> int:
    """Return the number of vocabulary rows whose logits are held at a time.

    At least `width`: the logits are then as large as x's gradient, and adding to that once a slice costs little beside
    the products.
    """
    return max(width, LOGITS_AT_ONCE // max(tokens, 1))
