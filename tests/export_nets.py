"""Networks for exports: what each runtime spells in its own way, and a quantized one that has seen some data."""

import torch
from nets import DenseNet, SENet
from tiny import TinyNet
from torch import nn

from lightslim.quantize import transform

EXACT = 1e-2
"""How far a file may be off, of the norm: a value between two codes may go either way."""


class Linears(nn.Module):
    """Batch norm behind a linear layer, a bias-free one, and inputs of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.plain, self.wide = nn.Linear(16, 12, bias=False), nn.Linear(6, 5)

    def forward(self, x):
        x = self.plain(self.norm(self.first(x.flatten(2).mean(2))).relu())
        return self.wide(x.view(-1, 2, 6)).flatten(1)


class Transposed(nn.Module):
    """Transposed convolutions, one of them grouped, each with its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.down_norm = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.up, self.up_norm = nn.ConvTranspose2d(12, 8, 4, stride=2, padding=1), nn.BatchNorm2d(8)
        self.grouped, self.grouped_norm = nn.ConvTranspose2d(8, 12, 3, padding=1, groups=2), nn.BatchNorm2d(12)
        self.out = nn.Conv2d(12, 4, 3, padding=1, groups=4)

    def forward(self, x):
        x = self.down_norm(self.down(x)).relu()
        x = nn.functional.relu6(self.up_norm(self.up(x)))
        return self.out(self.grouped_norm(self.grouped(x)).relu()).mean((2, 3))


class Block(nn.Module):
    """Attention and two linear layers, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(),
                                                                  nn.Linear(2 * width, width))  # fmt: skip

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.proj(attended)
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """Patches, a class token, two blocks and torch's own attention module."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(8, width, 4, stride=4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(Block(width, 2), Block(width, 4))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = self.blocks(x)
        return self.head(x[:, 0] + self.attention(x, x, x)[0][:, 0])


class Odd(nn.Module):
    """What does not fold: one layer used twice, a batch norm that is not alone, a pool and a ReLU with more readers."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.pooled, self.last = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 5, 1)

    def forward(self, x):
        x = self.norms[0](self.twice(x)).relu()
        y = self.norms[1](self.twice(x))
        z = y + self.norms[2](y)
        x = nn.functional.max_pool2d(self.pooled(x + z).relu(), 2)
        return self.last(x).mean((2, 3))


NETS = {
    "tiny": (TinyNet, 3),
    "squeeze_excite": (SENet, 3),
    "dense": (DenseNet, 3),
    "linears": (Linears, 8),
    "transposed": (Transposed, 8),
    "vit": (TinyViT, 8),
    "odd": (Odd, 8),
}


def trained(name: str, **settings) -> tuple[nn.Module, torch.Tensor]:
    """A quantized network whose ranges and batch norms have seen data, and inputs for it."""
    make, channels = NETS[name]
    torch.manual_seed(0)
    net = make()
    for child in net.modules():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(child.weight)  # half of them negative
            nn.init.normal_(child.bias)
    transform(net, **settings)
    for _ in range(4):
        net(torch.randn(32, channels, 8, 8))
    return net.eval(), torch.randn(64, channels, 8, 8)
