"""Transformer blocks with the official module and parameter names (segm/model/blocks.py)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segmenter_fast.backend import resolve_backend
from segmenter_fast.ops.attention import attention, attention_weights
from segmenter_fast.ops.layer_norm import layer_norm
from segmenter_fast.ops.layer_norm_linear import layer_norm_linear
from segmenter_fast.ops.linear_residual import linear_residual
from segmenter_fast.ops.mlp import mlp


class DropPath(nn.Module):
    """Stochastic depth: zero a sample's residual branch with some probability, scale the others.

    Args:
        drop_prob: probability of dropping, in [0, 1).

    Source: Huang et al. 2016; Strudel et al. 2021, section 4.2.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = float(drop_prob)

    def factors(self, x: Tensor) -> Tensor | None:
        """(B,) factors of the samples' branches; None outside training, when all are 1."""
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep = 1.0 - self.drop_prob
        return x.new_empty(x.shape[0]).bernoulli_(keep) / keep

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the same shape."""
        factors = self.factors(x)
        return x if factors is None else x * factors.view(-1, *(1,) * (x.ndim - 1))

    def extra_repr(self) -> str:
        """The rate, for `print(model)`."""
        return f"drop_prob={self.drop_prob:g}"


class FeedForward(nn.Module):
    """fc2(gelu(fc1(x))) with dropout after both, exact (erf) GELU."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(nn.Module):
    """Multi-head self-attention over the packed projection; `backend` is set by the model."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)
        self.backend = "auto"

    def _packed(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        return self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        dropout = self.attn_drop.p if self.training else 0.0
        y = attention(self._packed(x), dropout_p=dropout, backend=self.backend)
        return self.proj_drop(self.proj(y))

    def weights(self, x: Tensor) -> Tensor:
        """(B, heads, N, N) softmax probabilities, with dropout in training as officially."""
        return self.attn_drop(attention_weights(self._packed(x)))


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)), each branch under stochastic depth.

    `recompute`, which the model sets, keeps the input alone for backward, which runs the block
    again with the random numbers it had.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_dim: int,
        dropout: float,
        drop_path: float,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, heads, dropout)
        self.mlp = FeedForward(dim, mlp_dim, dropout)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.recompute = False

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor:
        """(B, N, D) to (B, N, D), or to the (B, heads, N, N) attention weights."""
        if return_attention:
            return self.attn.weights(self.norm1(x))
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, x, use_reentrant=False)
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        if resolve_backend(self.attn.backend, x.device) == "triton" and self._is_plain():
            return self._fused(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _is_plain(self) -> bool:
        """Whether the fused operations do what the modules would.

        They do not where a layer was exchanged, as adapters do, or has hooks, or where a dropout
        stands between two layers; the modules are called then, and attention alone is fused.
        """
        attn, mlp = self.attn, self.mlp
        layers = (self.norm1, self.norm2, attn.qkv, attn.proj, mlp.fc1, mlp.fc2, mlp.act)
        known = all(type(layer) in (nn.Linear, nn.LayerNorm, nn.GELU) for layer in layers)
        hooked = any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            for m in (*layers, attn, mlp, self.drop_path)
        )
        return known and not hooked and not (self.training and mlp.drop.p > 0)

    def _fused(self, x: Tensor) -> Tensor:
        norm, attn, backend = self.norm1, self.attn, self.attn.backend
        depth = self.drop_path if isinstance(self.drop_path, DropPath) else None
        qkv = layer_norm_linear(
            x, norm.weight, norm.bias, attn.qkv.weight, attn.qkv.bias, norm.eps, backend
        )
        y = attention(qkv.unflatten(-1, (3, attn.heads, -1)), backend=backend)
        scale = depth.factors(x) if depth else None
        x = linear_residual(y, attn.proj.weight, attn.proj.bias, x, scale, backend)
        norm, fc1, fc2 = self.norm2, self.mlp.fc1, self.mlp.fc2
        weights = (norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return mlp(x, *weights, norm.eps, depth.factors(x) if depth else None, backend)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` of the last dimension by `backend`, which is set by the model."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__(dim, eps)
        self.backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        if resolve_backend(self.backend, x.device) == "triton":
            return layer_norm(x, self.weight, self.bias, self.eps, "triton")
        return super().forward(x)


def make_blocks(
    n_layers: int,
    dim: int,
    heads: int,
    mlp_dim: int,
    dropout: float,
    drop_path_rate: float,
    eps: float = 1e-5,
) -> nn.ModuleList:
    """`n_layers` blocks whose stochastic depth rises linearly from 0 to `drop_path_rate`."""
    rates = [drop_path_rate * i / max(1, n_layers - 1) for i in range(n_layers)]
    return nn.ModuleList(Block(dim, heads, mlp_dim, dropout, rate, eps) for rate in rates)


def layer_inputs(blocks: nn.ModuleList, x: Tensor) -> Iterator[tuple[Block, Tensor]]:
    """Each block with the (B, N, D) tokens that enter it; a block runs when the next is asked for.

    What looks into one layer after another holds the tokens of one layer this way.
    """
    for block in blocks:
        yield block, x
        x = block(x)


def attention_map(blocks: nn.ModuleList, x: Tensor, layer_id: int) -> Tensor:
    """Run the blocks before `layer_id`, return that block's (B, heads, N, N) attention."""
    if not 0 <= layer_id < len(blocks):
        raise ValueError(f"layer_id must be in [0, {len(blocks)}), got {layer_id}")
    for block in blocks[:layer_id]:
        x = block(x)
    return blocks[layer_id](x, return_attention=True)


def init_weights(module: nn.Module) -> None:
    """Truncated normal (std 0.02) for linear weights, zeros for biases, ones for norm weights.

    The cut is at +-2, a hundred standard deviations: timm's default, which the official code takes.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
