"""Transformer blocks with the official module and parameter names (segm/model/blocks.py)."""

from torch import Tensor, nn

from segmenter_fast.ops.attention import attention, attention_weights


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: zero a sample's residual branch with probability `rate`, scale the others.

    Args:
        x: (B, ...) the residual branch.
        rate: probability of dropping, in [0, 1).
        training: identity when False.

    Source: Huang et al. 2016; Strudel et al. 2021, section 4.2.
    """
    if rate == 0.0 or not training:
        return x
    keep = 1.0 - rate
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    return x * (mask / keep)


class DropPath(nn.Module):
    """`drop_path` as a module, so that `print(model)` shows the rate."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = float(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the same shape."""
        return drop_path(x, self.drop_prob, self.training)

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
    """x + attn(norm1(x)), then x + mlp(norm2(x)), each branch under stochastic depth."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, dropout: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, dropout)
        self.mlp = FeedForward(dim, mlp_dim, dropout)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor:
        """(B, N, D) to (B, N, D), or to the (B, heads, N, N) attention weights."""
        if return_attention:
            return self.attn.weights(self.norm1(x))
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def make_blocks(
    n_layers: int, dim: int, heads: int, mlp_dim: int, dropout: float, drop_path_rate: float
) -> nn.ModuleList:
    """`n_layers` blocks whose stochastic depth rises linearly from 0 to `drop_path_rate`."""
    rates = [drop_path_rate * i / max(1, n_layers - 1) for i in range(n_layers)]
    return nn.ModuleList(Block(dim, heads, mlp_dim, dropout, rate) for rate in rates)


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
