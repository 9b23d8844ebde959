"""The plain PyTorch baseline of `megahp benchmark training`: a Llama-like model in nanoGPT's style.

It has megahp's default architecture (RMSNorm, rotary positions, SwiGLU, untied embeddings, no biases) and trains as
nanoGPT does: float32 weights, the forward pass under autocast, F.scaled_dot_product_attention, F.cross_entropy over
whole logits, gradients clipped to 1, fused AdamW. No distributed code.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megahp.config import ModelConfig, OptimizerConfig


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x [batch, heads, length, head_size]."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, model: ModelConfig, length: int) -> None:
        super().__init__()
        self.heads, self.head_size = model.heads, model.head_size
        inner = model.heads * model.head_size
        self.qkv = nn.Linear(model.width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, model.width, bias=False)
        frequencies = model.rope_theta ** (-torch.arange(0, model.head_size, 2) / model.head_size)
        angles = torch.outer(torch.arange(length), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        cos, sin = self.cos.to(q.dtype), self.sin.to(q.dtype)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(model.width, model.mlp_width, bias=False)
        self.up = nn.Linear(model.width, model.mlp_width, bias=False)
        self.down = nn.Linear(model.mlp_width, model.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, model: ModelConfig, length: int) -> None:
        super().__init__()
        self.norm_1 = nn.RMSNorm(model.width, model.norm_eps)
        self.attention = Attention(model, length)
        self.norm_2 = nn.RMSNorm(model.width, model.norm_eps)
        self.mlp = MLP(model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """tokens, targets [batch, length] -> mean loss in nats per token."""

    def __init__(self, model: ModelConfig, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(model.padded_vocab, model.width)
        self.blocks = nn.ModuleList(Block(model, length) for _ in range(model.layers))
        self.norm = nn.RMSNorm(model.width, model.norm_eps)
        self.head = nn.Linear(model.width, model.padded_vocab, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


def make_optimizer(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Make nanoGPT's AdamW: matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
