"""Known model shapes, which `model.preset` fills in. Settings given in the run file or on the command line win."""

_LLAMA = {"activation": "swiglu", "norm": "rmsnorm", "positions": "rope", "bias": False, "tied_embeddings": False}
_GPT2 = {"activation": "gelu", "norm": "layernorm", "positions": "learned", "bias": True, "tied_embeddings": True}
_CEREBRAS = {"activation": "swiglu", "norm": "layernorm", "positions": "alibi", "bias": True, "tied_embeddings": True}


def _shape(layers: int, width: int, heads: int, mlp_width: int, **more: object) -> dict[str, object]:
    return {"layers": layers, "width": width, "heads": heads, "mlp_width": mlp_width, **more}


PRESETS: dict[str, dict[str, object]] = {
    "debug": _shape(2, 64, 4, 128, **_LLAMA),
    "gpt2-124m": _shape(12, 768, 12, 3072, vocab_size=50257, **_GPT2),
    "gpt2-355m": _shape(24, 1024, 16, 4096, vocab_size=50257, **_GPT2),
    "gpt2-774m": _shape(36, 1280, 20, 5120, vocab_size=50257, **_GPT2),
    "gpt2-1.5b": _shape(48, 1600, 25, 6400, vocab_size=50257, **_GPT2),
    # The models of Power Lines (arXiv 2505.13738) and its sibling "Scaling with Collapse": head size 64.
    "power-lines-111m": _shape(10, 768, 12, 2048, vocab_size=50257, **_CEREBRAS),
    "power-lines-266m": _shape(32, 768, 12, 2048, vocab_size=50257, **_CEREBRAS),
    "power-lines-610m": _shape(10, 2048, 32, 5461, vocab_size=50257, **_CEREBRAS),
    "power-lines-1.7b": _shape(32, 2048, 32, 5461, vocab_size=50257, **_CEREBRAS),
    "power-lines-3.3b": _shape(64, 2048, 32, 5461, vocab_size=50257, **_CEREBRAS),
    "llama-2-7b": _shape(32, 4096, 32, 11008, vocab_size=32000, norm_eps=1e-5, **_LLAMA),
    "llama-3-8b": _shape(32, 4096, 32, 14336, kv_heads=8, rope_theta=500000.0, vocab_size=128256, **_LLAMA),
    "llama-3-70b": _shape(80, 8192, 64, 28672, kv_heads=8, rope_theta=500000.0, vocab_size=128256, **_LLAMA),
}
