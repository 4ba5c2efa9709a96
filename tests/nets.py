"""Small networks with the shapes that make pruning hard, and random ones."""

import copy

import torch
from hypothesis import strategies as st
from torch import nn

from lightslim.surgery import Cut


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, max(channels // 4, 2), 1)
        self.expand = nn.Conv2d(max(channels // 4, 2), channels, 1)

    def forward(self, x):
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class SENet(nn.Module):
    """Residual blocks gated by squeeze-excite."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.SiLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(_conv_bn(32, 40), nn.SiLU(), _conv_bn(40, 32), SqueezeExcite(32)) for _ in range(2)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu_(x + block(x))
        return self.head(x.mean((2, 3)))


class DenseNet(nn.Module):
    """Every layer reads the concatenation of all before it; batch norm comes before the convolution."""

    def __init__(self, growth: int = 12, layers: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        widths = [24 + growth * i for i in range(layers)]
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, 4 * growth, 1), nn.BatchNorm2d(4 * growth), nn.ReLU(),
                nn.Conv2d(4 * growth, growth, 3, padding=1),
            )
            for w in widths
        )  # fmt: skip
        self.norm = nn.BatchNorm2d(24 + growth * layers)
        self.head = nn.Linear((24 + growth * layers) * 16, 10)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        x = torch.relu(self.norm(torch.cat(features, 1)))
        return self.head(nn.functional.avg_pool2d(x, 2).flatten(1))


def _conv_bn(into: int, out: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(into, out, 3, padding=1, groups=groups), nn.BatchNorm2d(out))


class RandomNet(nn.Module):
    """A chain of blocks drawn by hypothesis: plain, residual, concatenating, depthwise, grouped, split, gated."""

    def __init__(self, kinds: list[str], width: int) -> None:
        super().__init__()
        self.kinds = kinds
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList()
        for kind in kinds:
            block, width = BLOCKS[kind](width)
            self.blocks.append(block)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 12), nn.ReLU(), nn.Linear(12, 5)
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv_bn(width, width + 4), nn.ReLU(), _conv_bn(width + 4, width))

    def forward(self, x):
        out = self.body(x)
        out += x
        return out.relu_()


class Concat(nn.Module):
    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.branch = _conv_bn(width, growth)

    def forward(self, x):
        return torch.cat([x, self.branch(x).relu(), x.flip(-1)], 1)


class Split(nn.Module):
    """Two halves: one is convolved and gates the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(width, 12, 1)
        self.left = _conv_bn(6, 6)

    def forward(self, x):
        a, b = self.widen(x).chunk(2, 1)
        return torch.cat([self.left(a).sigmoid() * b, a], 1)


class Shuffle(nn.Module):
    """A channel shuffle by view, transpose and view, with live sizes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(width, 12, 1)
        self.mix = nn.Conv2d(12, 8, 3, padding=1, groups=2)

    def forward(self, x):
        x = self.widen(x)
        b, c, h, w = x.shape
        return self.mix(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))


BLOCKS = {
    "plain": lambda width: (nn.Sequential(_conv_bn(width, 10), nn.ReLU()), 10),
    "residual": lambda width: (Residual(width), width),
    "concat": lambda width: (Concat(width, 6), 2 * width + 6),
    "depthwise": lambda width: (nn.Sequential(_conv_bn(width, width, groups=width), nn.Conv2d(width, 9, 1)), 9),
    "gated": lambda width: (SqueezeExcite(width), width),
    "split": lambda width: (Split(width), 12),
    "shuffle": lambda width: (Shuffle(width), 8),
    "transposed": lambda width: (nn.Sequential(nn.ConvTranspose2d(width, 7, 2, stride=2), nn.MaxPool2d(2)), 7),
}

random_nets = st.builds(
    RandomNet, st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5), st.integers(min_value=4, max_value=12)
)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and running statistics as after training: nothing is zero, one or shared by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                low = 0.5 if "var" in name else -1.0
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (1.5 - low) + low)
    return model


def masked(original: nn.Module, cut: Cut) -> nn.Module:
    """A copy of the uncut model in which the units that ``cut`` removes are zeroed instead."""
    copied = copy.deepcopy(original)
    parameters = dict(copied.named_parameters())
    with torch.no_grad():
        for item in cut.slices:
            if item.tensor in parameters:
                gone = sorted(set(range(item.size)) - set(item.kept))
                parameters[item.tensor].index_fill_(item.dim, torch.tensor(gone), 0.0)
    return copied


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the model says in evaluation mode, in double precision: rounding is no excuse."""
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(x.double())
