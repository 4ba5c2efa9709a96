"""Small networks whose Python holds sizes: attention of every kind, windows, gates, recurrent layers."""

import torch
from torch import nn
from torch.nn import functional as F


class FusedAttention(nn.Module):
    """Heads out of one projection, their number and width as plain ints; ``flat`` tells how they are joined again."""

    def __init__(self, dim: int = 32, heads: int = 8, live: bool = True) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.live = heads, dim // heads, live
        self.attn_dim = dim
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(y.reshape(b, n, self.attn_dim if self.live else c))


class GroupedAttention(nn.Module):
    """Separate projections, two query heads to a key head."""

    def __init__(self, dim: int = 32, heads: int = 8, groups: int = 4) -> None:
        super().__init__()
        self.heads, self.groups, self.width = heads, groups, dim // heads
        self.q, self.k = nn.Linear(dim, dim), nn.Linear(dim, groups * self.width)
        self.v, self.o = nn.Linear(dim, groups * self.width), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.width).transpose(1, 2)
        k, v = (p(x).view(b, n, self.groups, self.width).transpose(1, 2) for p in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class WindowAttention(nn.Module):
    """Shifted windows of 2 x 2 tokens on a 4 x 4 map, with a learnt bias by head; scores by hand."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(9, heads))
        self.register_buffer("index", torch.arange(16) % 9)

    def forward(self, x):
        b, _, c = x.shape
        x = torch.roll(x.view(b, 4, 4, c), (-1, -1), (1, 2))
        x = x.view(b, 2, 2, 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        q, k, v = self.qkv(x).view(len(x), 4, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.bias[self.index].view(4, 4, -1).permute(2, 0, 1)
        x = ((q * self.scale) @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        x = self.proj(x.transpose(1, 2).flatten(2)).view(b, 2, 2, 2, 2, c).transpose(2, 3).reshape(b, 4, 4, c)
        return torch.roll(x, (1, 1), (1, 2)).reshape(b, 16, c)


class Gated(nn.Module):
    """A gate and a value out of one layer, split by sizes that the module remembers."""

    def __init__(self, dim: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.sizes = [hidden, hidden]
        self.widen, self.narrow = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.widen(x).split(self.sizes, dim=-1)
        return self.narrow(F.silu(gate) * value)


class Halves(nn.Module):
    """``split`` by half of a number that could also mean the output's width."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.in_features = self.out_features = dim
        self.before = nn.Linear(dim, dim)
        self.left, self.after = nn.Linear(dim // 2, dim), nn.Linear(dim, dim)

    def forward(self, x):
        a, b = self.before(x).relu().split(self.in_features // 2, dim=-1)
        return self.after(self.left(a).relu() + self.left(b).relu())


class Block(nn.Module):
    """Pre-norm residual: attention of some kind, then an MLP."""

    def __init__(self, mixer: nn.Module, mlp: nn.Module | None = None, dim: int = 32) -> None:
        super().__init__()
        self.mixer, self.norm1, self.norm2 = mixer, nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = mlp or nn.Sequential(nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, dim))

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Tokens(nn.Module):
    """Embeds 16 tokens, runs blocks, reads out."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, 32), nn.Parameter(torch.zeros(1, 16, 32))
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x) + self.position).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Linear(8, 16), kind(16, 24, batch_first=True, **options)
        self.head = nn.Linear(48 if options.get("bidirectional") else 24, 5)

    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[0][:, -1])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


NETS = {
    "heads of a fused projection": lambda: Tokens(*(Block(FusedAttention()) for _ in range(3))),
    "heads whose join is fixed": lambda: Tokens(*(Block(FusedAttention(live=False)) for _ in range(3))),
    "grouped queries": lambda: Tokens(*(Block(GroupedAttention()) for _ in range(2))),
    "shifted windows": lambda: Tokens(*(Block(WindowAttention()) for _ in range(2))),
    "gates": lambda: Tokens(Block(Gated(), Gated())),
    "halves": lambda: Tokens(Halves(), Halves()),
    "torch's encoder": lambda: Tokens(encoder()),
    "lstm": lambda: Recurrent(nn.LSTM),
    "lstm, two ways, two layers": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "gru": lambda: Recurrent(nn.GRU),
}
