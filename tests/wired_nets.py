"""Networks whose values go many ways, and what is rounded in them between layers."""

import types

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs, outputs, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class Basic(nn.Module):
    """A residual block that clips in place and, as many do, with one module for both times."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.skip = (
            nn.Identity() if inputs == outputs else nn.Sequential(conv(inputs, outputs, 1), nn.BatchNorm2d(outputs))
        )

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.skip(x)
        return self.relu(out)


def residual():
    """Pooled at first, and twice more, with and without a layer in the shortcut."""
    stem = conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)
    return nn.Sequential(*stem, Basic(8, 8), Basic(8, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))


class Branches(nn.Module):
    """Layers side by side on one value, their results put together; a pool among them."""

    def __init__(self):
        super().__init__()
        self.stem, self.relu = conv(3, 8), nn.ReLU()
        self.a, self.b, self.c = nn.Sequential(conv(8, 4, 1), nn.ReLU6()), conv(8, 6), conv(8, 2, 1)
        self.last = conv(12, 4)

    def forward(self, x):
        x = self.relu(self.stem(x))
        pooled = F.max_pool2d(x, 3, 1, padding=1)
        return self.last(torch.cat([self.a(x), self.b(x), self.c(pooled)], 1))


class Unnamed(nn.Module):
    """What is clipped is no module's, so that it is rounded before, and what is added in float."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = conv(3, 8), conv(8, 8), conv(8, 4)

    def forward(self, x):
        x = self.one(x).relu()
        return self.last(self.two(x).relu() + x)


class Down(nn.Module):
    """Up again, beside what was there before."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Sequential(conv(3, 8), nn.ReLU()), nn.Sequential(conv(8, 8), nn.ReLU())
        self.last = conv(16, 4)

    def forward(self, x):
        x = self.inner(x)
        low = self.outer(F.max_pool2d(x, 2))
        return self.last(torch.cat([x, F.interpolate(low, scale_factor=2.0)], 1))


class Smooth(nn.Module):
    """Functions that are no clipping, a gate, a mean and an addition of a constant."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.gate, self.mix = conv(3, 8, bias=False), nn.BatchNorm2d(8), conv(8, 8, 1), conv(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.silu(self.bn(self.stem(x)))
        x = self.mix(x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()) + 1
        return self.head(x.mean((2, 3)))


class Features(nn.Module):
    """What it returns is also read."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Sequential(conv(3, 8), nn.ReLU()), conv(8, 8)

    def forward(self, x):
        x = self.one(x)
        return x, self.two(x) + x


class Shuffled(nn.Module):
    """Half of the channels go on as they are."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), nn.ReLU())
        self.other, self.last = nn.Sequential(conv(4, 4), nn.ReLU()), conv(8, 4)

    def forward(self, x):
        a, b = self.stem(x).chunk(2, 1)
        x = torch.cat([a, self.other(b)], 1).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        return self.last(x)


class Children(nn.ModuleDict):
    """Runs all its children, so that it must not get one more, and puts together what they give."""

    def forward(self, x):
        for child in self.values():
            x = torch.cat([x, child(x)], 1)
        return x


class Swish(nn.Module):
    """What is added is no convolution's, but has a name."""

    def __init__(self):
        super().__init__()
        self.stem, self.swish, self.conv, self.last = conv(3, 8), nn.Hardswish(), conv(8, 8), conv(8, 4)

    def forward(self, x):
        x = self.swish(self.stem(x))
        return self.last(self.conv(x) + x)


class Passed(nn.Module):
    """What passes a module that does nothing, or is read before it is returned, can be had from elsewhere, too."""

    def __init__(self):
        super().__init__()
        self.skip, self.one, self.two, self.inner, self.last = nn.Identity(), conv(3, 8), conv(8, 8), Read(), conv(8, 4)

    def forward(self, x):
        x = self.one(x).relu()
        skip = self.skip(x)
        return self.last(self.inner(self.two(x)) + skip)


class Read(nn.Module):
    """Reads what it returns."""

    def __init__(self):
        super().__init__()
        self.side = conv(8, 8, 1)

    def forward(self, x):
        x = x.relu()
        self.seen = self.side(x)
        return x


class Attention(nn.Module):
    """Only products of matrices are added here."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.one(x)
        return self.two(x).relu() + x


CASES = {
    "residual": (residual, ["3", "4.bn2", "4", "5.bn2", "5.skip.1", "5"], ["4.conv1", "5.conv1", "5.skip.0"]),
    "branches": (Branches, ["relu", "a.1", "b", "c"], ["a.0", "b"]),
    "unnamed": (Unnamed, ["one", "two"], []),
    "down": (Down, ["inner.1", "outer.1"], []),
    "smooth": (Smooth, ["bn", "gate", "mix"], []),
    "features": (Features, ["two"], []),
    "attention": (Attention, [], []),
    "shuffled": (Shuffled, ["stem.1", "other.1"], []),
    "children": (
        lambda: nn.Sequential(conv(3, 4), Children({"a": conv(4, 4), "b": conv(8, 4)}), conv(12, 4)),
        ["0", "1.a", "1.b"],
        ["1.a"],
    ),
    "passed": (Passed, ["one", "two"], []),
    "swish": (Swish, ["stem", "conv", "swish"], ["conv"]),
}


class Elsewhere(nn.Module):
    """What its layers read is not what ``act`` returns, or no longer."""

    def __init__(self, way, act=None):
        super().__init__()
        self.way, self.stem, self.act = way, conv(3, 8), act or nn.ReLU()
        self.a, self.b, self.last = conv(8, 8), conv(8, 8), conv(8, 4)

    def forward(self, x):
        x = self.stem(x)
        a, b = self.way(self.act, x)
        return self.last(self.a(a) + self.b(b))


def sliced(act, x):
    x = act(x)
    x[:, :4] *= torch.sigmoid(x[:, 4:])
    return x, x


def viewed(act, x):
    x = act(x)
    x.flatten(2).mul_(0.7)
    return x, x


def ignored(act, x):
    act(x)
    return x, x


def preactivated(act, x):
    return act(x), x


def plainly(act, x):
    x = act(x)
    return x, x


class Kept(nn.ReLU):
    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


def from_the_module(act, x):
    return act(x), act.kept


def hooked():
    net = Elsewhere(plainly)
    net.act.register_forward_hook(lambda _, __, output: output * torch.sigmoid(output))
    return net


def patched():
    net = Elsewhere(plainly)
    net.act.forward = types.MethodType(lambda self, x: torch.relu(x), net.act)
    return net


ELSEWHERE = {
    "sliced": lambda: Elsewhere(sliced),
    "viewed": lambda: Elsewhere(viewed),
    "ignored": lambda: Elsewhere(ignored, nn.ReLU(inplace=True)),
    "preactivated": lambda: Elsewhere(preactivated, nn.ReLU(inplace=True)),
    "from the module": lambda: Elsewhere(from_the_module, Kept()),
    "hooked": hooked,
    "patched": patched,
    "scripted": lambda: Elsewhere(plainly, torch.jit.script(nn.ReLU())),
}
