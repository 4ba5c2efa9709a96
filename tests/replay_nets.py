"""Networks whose steps do all that Python can do besides computing."""

import random

import numpy
import torch
from analyses import Chain, conv
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Convolutions(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "convolution" in str(func)
        return func(*args, **(kwargs or {}))


class InPlace(nn.Module):
    """Adds into its input, rectifies in place, and uses the old names of what was overwritten."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 8), conv(8, 8), conv(8, 8), nn.Linear(8, 2)
        self.norm, self.act = nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x):
        identity = self.act(self.norm(self.stem(x)))
        for layer in (self.a, self.b):
            out = layer(identity)
            out += identity
            identity = self.act(out)
            identity.flatten(2).mul_(0.5)
        return self.head(identity.flatten(2).mean(2))


class Separable(nn.Module):
    """Between two 1x1 convolutions each unit goes its own way, to where a gate asks for all of them."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.depthwise = conv(3, 8), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate, self.mix, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x):
        x = self.depthwise(self.norm(self.stem(x)).sigmoid())
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(self.mix(x).relu().mean((2, 3)))


class Placed(nn.Module):
    """What is added is no weight and differs from place to place, so masked units are not the same everywhere."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 8), conv(8, 2)
        self.register_buffer("places", torch.linspace(-1, 1, 8).expand(1, 8, 8).clone())

    def forward(self, x):
        return self.c((self.b((self.a(x) + self.places).relu()) + self.places).relu())


class Square(nn.Module):
    """A residual stream, in which layers of as many inputs as outputs mix what they give to."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 8), conv(8, 8), conv(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.a(x)
        return self.head((x + self.b(x.relu())).mean((2, 3)))


class Twice(nn.Module):
    """The same layer is called twice, before and after another one."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.other, self.head = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 2)

    def forward(self, x):
        x = self.shared(self.stem(x)).relu()
        return self.head(self.shared(self.other(x).relu()).relu())


class Branching(nn.Module):
    """Which way it goes depends on the values."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down, self.mid, self.head = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 8), conv(8, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.up(x) if x.mean() > 0.3 else self.down(x)
        x = self.mid(x.relu())
        return self.head(x) if x.max() > 0.5 else self.head(x.relu()) * 2


class Remembering(nn.Module):
    """What it does to a batch depends on the last one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 8), conv(8, 2)
        self.last = None

    def forward(self, x):
        x = self.a(x) if self.last is None else self.a(x) + self.last.mean()
        x = self.b(x.relu())
        self.last = self.c(x.relu())
        return self.last


class Counting(nn.Module):
    """Every third call is another one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 8), conv(8, 2)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.a(x * 2 if self.calls % 3 == 0 else x).relu()
        return self.c(self.b(x).relu())


class Part(nn.Module):
    """A module in front of the first masked layer; what else its call does differs."""

    def __init__(self, besides, **attributes):
        super().__init__()
        self.conv = conv(8, 8)
        self.besides = besides
        vars(self).update(attributes)

    def forward(self, x):
        return self.besides(self, self.conv(x))


class Parts(nn.Module):
    """Two such parts; ``around`` calls the second, and knows the batch."""

    def __init__(self, besides, around=lambda net, x, batch: net.part(x), **attributes):
        super().__init__()
        self.a, self.first, self.part = conv(3, 8), Part(besides, **attributes), Part(besides, **attributes)
        self.b, self.c = conv(8, 8), conv(8, 2)
        self.around = around

    def forward(self, x):
        y = self.around(self, self.first(self.a(x).relu()), x)
        return self.c(self.b(y).relu())


class Thing:
    """What no copy of a module's attributes tells of."""

    told = 0.0


def counts(part, x):
    part.count += 1
    return x * (1 + part.count % 3)


def tells(part, x):
    part.thing.told = float(x.mean())
    return x.relu()


def remembers(part, x):
    part.seen.append(float(x.mean()))
    return x * part.seen[-1]


def remembers_deeper(part, x):
    part.seen[0].append(len(part.seen[0]))
    return x * (1 + part.seen[0][-1] % 3)


def keeps(part, x):
    part.held[0] = x
    return x.relu()


def by_batch(net, x, batch):
    net.part.factor = 2 if batch.mean() > 0 else 3
    return net.part(x)


def hooked(net, x, batch):
    handle = net.part.conv.register_forward_hook(lambda module, given, out: out * batch.mean())
    try:
        return net.part(x)
    finally:
        handle.remove()


def swapped(net, x, batch):
    weight = net.part.conv.weight
    state = {"conv.weight": weight * batch.mean(), "conv.bias": net.part.conv.bias}
    return torch.func.functional_call(net.part, state, (x,))


def counted_by_mode(net, x, batch):
    with Convolutions() as mode:
        x = net.part.conv(x)
    return x * mode.count


PARTS = {
    "a mode of its own": lambda: Parts(lambda part, x: x, counted_by_mode),
    "counts": lambda: Parts(counts, count=0),
    "tells others": lambda: Parts(tells, lambda net, x, _: net.part(x) * net.part.thing.told, thing=Thing()),
    "remembers": lambda: Parts(remembers, seen=[]),
    "keeps its result": lambda: Parts(keeps, lambda net, x, _: net.part(x) + net.part.held[0], held=[None]),
    "told by its parent": lambda: Parts(lambda part, x: x * part.factor, by_batch, factor=1),
    "hooked": lambda: Parts(lambda part, x: x, hooked),
    "other weights": lambda: Parts(lambda part, x: x, swapped),
    "writes into its input": lambda: Parts(lambda part, x: x, lambda net, x, _: net.part(x.mul_(2)) + x),
    "writes into its result": lambda: Parts(lambda part, x: x.relu_(), lambda net, x, _: net.part(x).mul_(2)),
    "returns its input": lambda: Parts(lambda part, x: x, lambda net, x, _: nn.ReLU(inplace=True)(net.part(x))),
    "returns a view": lambda: Parts(lambda part, x: x[:, :], lambda net, x, _: net.part(x) * 2),
    "returns many": lambda: Parts(
        lambda part, x: {"x": x, "of": (x.relu(), 2)},
        lambda net, x, _: (lambda out: out["x"] + out["of"][0] * out["of"][1])(net.part(x["x"])),
    ),
    "by name": lambda: Parts(lambda part, x: x, lambda net, x, _: net.part(x=x)),
}


class Secret(torch.autograd.Function):
    """Reads memory behind torch's back."""

    @staticmethod
    def forward(ctx, x):
        with torch._C.DisableTorchFunction():
            return x * float(x.numpy().sum() > 0)


ODD = {
    "nothing": lambda net, x: x,
    "numpy": lambda net, x: x * float(x.numpy().mean()),
    "from numpy": lambda net, x: x + torch.from_numpy(x.numpy() * 2),
    "numpy in place": lambda net, x: torch.from_numpy(numpy.multiply(x.numpy(), 2, out=x.numpy())) + x,
    "tolist": lambda net, x: x * sum(x.flatten().tolist()),
    "item": lambda net, x: x * x.mean().item(),
    "random": lambda net, x: x + torch.rand_like(x),
    "views kept": lambda net, x: x[:, :4].repeat(1, 2, 1, 1) + x.transpose(2, 3),
    "constant": lambda net, x: x * torch.tensor([1.0, 2.0] * 4).view(1, 8, 1, 1),
    "weights again": lambda net, x: x + net.a.weight.data.mean(),
    "no grad needed": lambda net, x: x.detach().clone().add_(1),
    "out": lambda net, x: torch.add(x, 1, out=torch.empty_like(x)),
    "choice": lambda net, x: x[:, torch.nonzero(x.sum((0, 2, 3)) > -1).flatten()] * 2,
    "sum of parts": lambda net, x: sum(x.chunk(2, 1)).repeat(1, 2, 1, 1),
}
NETS = {
    **PARTS,
    "in place": InPlace,
    "separable": Separable,
    "placed": Placed,
    "square": Square,
    "called twice": Twice,
    "counting": Counting,
    "branching": Branching,
    **{name: lambda between=between: Chain(between) for name, between in ODD.items()},
}
UNPROVABLE = {
    "remembering": Remembering,
    "remembers deeper": lambda: Parts(remembers_deeper, seen=[[]]),
    "draws by Python": lambda: Parts(lambda part, x: x * random.random()),
    "draws by numpy": lambda: Parts(lambda part, x: x * float(numpy.random.rand())),
    "secret": lambda: Chain(lambda net, x: Secret.apply(x)),
}


def with_gradients(net, x, batch):
    with torch.enable_grad():
        out = net.part.conv(x.detach().requires_grad_())
        return x + torch.autograd.grad(out.square().sum(), net.part.conv.bias)[0].mean()


def vectorized(net, x, batch):
    return torch.vmap(net.part.conv)(x)


def seeded(part, x):
    torch.manual_seed(0)
    return x


class Uneven(nn.Module):
    """A batch of another size has one more operation in front of the masked layers."""

    def __init__(self, first):
        super().__init__()
        self.stem, self.a, self.b, self.c, self.first = conv(3, 4), conv(4, 8), conv(8, 8), conv(8, 2), first

    def forward(self, x):
        more = 8 < len(x) < 16
        x = self.stem(x * 1.5 if more and self.first else x)
        x = x * 1.5 if more and not self.first else x
        return self.c(self.b(self.a(x).relu()).relu())


class Weighed(nn.Module):
    """Units are weighed by a vector that stays alive."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.weights = conv(3, 8), conv(8, 2), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        weights = self.weights.sigmoid()
        return self.b((self.a(x) * weights.view(1, -1, 1, 1)).relu()) + 0 * weights.sum()


class Turned(nn.Module):
    """The end of a step changes a layer of torch's for the next one."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b, self.c = conv(3, 8), nn.LeakyReLU(0.1), conv(8, 8), conv(8, 2)

    def forward(self, x):
        x = self.c(self.b(self.act(self.a(x))).relu())
        self.act.negative_slope = 0.5
        return x


class Flat(nn.Module):
    """A layer of torch's returns a view, which is written to."""

    def __init__(self):
        super().__init__()
        self.a, self.flat, self.b, self.c = conv(3, 8), nn.Flatten(2), conv(8, 8), conv(8, 2)

    def forward(self, x):
        x = self.a(x)
        self.flat(x).mul_(2)
        return self.c(self.b(x).relu())


TOLD: dict[str, float] = {}
KEPT: list[torch.Tensor] = []


def keeps_elsewhere(part, x):
    KEPT[:] = [x]
    return x.relu()


class Telling(nn.Module):
    """Nothing in its attributes says that it tells."""

    def __init__(self):
        super().__init__()
        self.conv = conv(8, 8)

    def forward(self, x):
        x = self.conv(x)
        TOLD["mean"] = float(x.mean())
        return x


class Told(Parts):
    """What a module told is used behind the last layer."""

    def __init__(self):
        super().__init__(lambda part, x: x)
        self.part = Telling()

    def forward(self, x):
        return super().forward(x) * TOLD["mean"]


WAYS = {
    "tells everybody": Told,
    "keeps elsewhere": lambda: Parts(keeps_elsewhere, lambda net, x, _: net.part(x) + KEPT[0]),
    "turned": Turned,
    "flat": Flat,
    "gradients": lambda: Parts(lambda part, x: x, with_gradients),
    "vmap": lambda: Parts(lambda part, x: x, vectorized),
    "seeds": lambda: Parts(seeded, lambda net, x, batch: net.part(x) + torch.rand(1)),
    "one operation more": lambda: Uneven(first=False),
    "one operation more at first": lambda: Uneven(first=True),
    "a vector of weights": Weighed,
}
