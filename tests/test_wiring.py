"""What is rounded between layers: found by one run, and integer operations in the runtime that it is found for."""

import copy
import types

import onnx
import pytest
import torch
from nets import randomize
from test_export_int8 import operators
from tiny import TinyModule, loaders, trainer
from torch import nn
from torch.nn import functional as F

from experiments.models import MobileNetV1, MobileNetV2, ResNet20
from lightslim import CompressionError, QuantizationStrategy, UniformPruneStrategy
from lightslim.export import export
from lightslim.quantize import quantize, quantizers, transform
from lightslim.quantize.plan import quantizable
from lightslim.quantize.transform import quantized_layers, quantized_outputs
from lightslim.quantize.wiring import Between, between

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


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


def found(net, x=X):
    def run(within):
        with within, torch.no_grad():
            net(x)

    return between(net.eval(), run, quantizable(net))


@pytest.mark.parametrize("name", CASES)
def test_values_are_rounded_where_they_are_given(name):
    make, outputs, fed = CASES[name]
    assert found(make()) == Between(tuple(outputs), tuple(fed))


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


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_what_can_be_had_unrounded_is_rounded_where_it_is_read(name):
    quantized = quantize(ELSEWHERE[name](), [X], outputs="auto")
    assert hasattr(quantized.b, "input_quantizer")
    assert hasattr(quantized.a, "input_quantizer") == (name not in ("preactivated", "from the module"))


def test_a_traced_block_is_not_touched():
    net = nn.Sequential(conv(3, 8), nn.ReLU(), torch.fx.symbolic_trace(Basic(8, 8)), conv(8, 4), nn.Conv2d(4, 4, 1))
    quantized = quantize(net, [X], outputs="auto")
    assert "2" not in quantized_outputs(quantized)
    assert torch.equal(copy.deepcopy(quantized)(X), quantized(X))


@pytest.mark.parametrize(
    "end",
    [lambda x: x[:, :1].squeeze(1), lambda x: x.unsqueeze(1), lambda x: x.chunk(2, 1), lambda x: (x.flatten(1), x)],
)
def test_what_the_model_returns_stays_as_it_is(end):
    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.head = conv(3, 8), conv(8, 4)

        def forward(self, x):
            return end(self.head(self.one(x)))

    assert found(Headed()) == Between()


def test_parts_that_the_model_returns_keep_their_names_and_types(tmp_path):
    class Parted(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.last = conv(3, 8), conv(8, 8), conv(8, 4)

        def forward(self, x):
            x = self.one(x)
            first, second = (self.two(x) + x).chunk(2, 1)
            return self.last(torch.cat([first, second], 1)), second

    quantized = quantize(Parted(), [X], weight_bits=7, outputs=["one", "two"])
    export(quantized, X, tmp_path / "net.onnx", format="int8", deploy="x86")
    onnx.checker.check_model(str(tmp_path / "net.onnx"), full_check=True)


def test_quantizers_lie_where_the_model_does():
    net = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)).to("meta")
    transform(net, outputs=["1"])
    assert {buffer.device.type for buffer in net.buffers()} == {"meta"}


def test_settings_may_change_before_a_checkpoint_is_evaluated(tmp_path):
    module, before = TinyModule("adam"), auto()
    fit = trainer(tmp_path, before)
    fit.fit(module, *loaders())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    fresh = trainer(tmp_path, auto(skip=["net.body.0"]))
    assert fresh.validate(TinyModule(), loaders()[1], ckpt_path=tmp_path / "x.ckpt", verbose=False)[0]["val_loss"] > 0


NETWORKS = {
    **{name: (make, X) for name, (make, *_) in CASES.items() if name != "attention"},
    "ResNet-20": (lambda: ResNet20(width=0.25), X[:, :1]),
    "MobileNet V1": (lambda: MobileNetV1(width=0.25), X[:, :1]),
    "MobileNet V2": (lambda: MobileNetV2(width=0.25), X[:, :1]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_that_do_not_round_read_what_was_rounded(name):
    make, x = NETWORKS[name]
    quantized = quantize(make(), [x], outputs="auto")
    given, read = [], {}
    for module in quantized_outputs(quantized).values():
        module.output_quantizer.register_forward_hook(lambda _, __, output: given.append((output, output._version)))
    fed = {n: m for n, m in quantized_layers(quantized).items() if not hasattr(m, "input_quantizer")}
    for layer, module in fed.items():
        module.register_forward_pre_hook(lambda _, inputs, layer=layer: read.update({layer: inputs[0]}))
    quantized(x)
    assert read.keys() == fed.keys()
    assert all(any(x is y and x._version == version for y, version in given) for x in read.values())


def test_a_look_leaves_no_trace():
    net = residual()
    before = copy.deepcopy(net.state_dict())
    found(net)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("name", "integers"),
    [
        ("residual", {"QLinearAdd": 2}),
        ("branches", {"QLinearConcat": 1, "Concat": 0}),
        ("smooth", {}),
        ("unnamed", {}),
        ("down", {}),
        ("shuffled", {"QLinearConcat": 1, "Concat": 0}),
        ("children", {}),
        ("swish", {"QLinearAdd": 1}),
    ],
)
def test_what_is_found_runs_in_integers(tmp_path, name, integers):
    net = randomize(CASES[name][0]())
    ranges = {"weight_bits": 7, "activation_quantize_type": "moving_average_min_max"}
    quantized = quantize(net, [X] * 3, outputs="auto", **ranges)
    assert set(quantized_outputs(quantized)) == set(CASES[name][1])
    assert export(quantized, X, tmp_path / "net.onnx", format="int8", deploy="x86")["rel_diff"] < 2e-2
    ops = operators(tmp_path / "net.onnx", optimized=True)
    convolutions, returned = (
        sum(isinstance(m, nn.Conv2d) for m in net.modules()),
        not isinstance(list(net.modules())[-1], nn.Linear),
    )
    assert (ops["QLinearConv"], ops["Conv"]) == (convolutions - returned, returned), ops
    assert {op: ops[op] for op in integers} == integers


def auto(**arguments):
    ranges = {"weight_bits": 7, "activation_quantize_type": "moving_average_min_max"}
    return QuantizationStrategy(**{"start_epoch": 1, "outputs": "auto", **ranges, **arguments})


def test_a_fit_finds_them_and_its_file_is_of_integers(tmp_path):
    module, options = TinyModule("adam"), {"int8": {"deploy": "x86"}}
    strategy = auto(start_epoch=2, int8_model_save_path="net.onnx", export_options=options)
    trainer(tmp_path, UniformPruneStrategy(target_ratio=0.5, start_epoch=1), strategy).fit(module, *loaders())
    rounded = {name for name in strategy.ranges() if "output" in name}
    assert rounded == {f"net.{name}.output_quantizer" for name in ("stem.2", "body.3", "depthwise")}
    assert "net.body.0.input_quantizer" not in strategy.ranges()
    ops = operators(tmp_path / "net.onnx", optimized=True)
    assert (ops["QLinearConv"], ops["Conv"], ops["QLinearAdd"]) == (4, 0, 0)
    assert strategy.history[-1]["files"]["int8"]["rel_diff"] < 2e-2


def test_another_process_evaluates_with_them(tmp_path):
    module = TinyModule("adam")
    fit = trainer(tmp_path, auto())
    fit.fit(module, *loaders())
    fit.save_checkpoint(tmp_path / "x.ckpt")

    def loss(**arguments):
        fresh = trainer(tmp_path, auto(**arguments))
        return fresh.validate(TinyModule(), loaders()[1], ckpt_path=tmp_path / "x.ckpt", verbose=False)[0]["val_loss"]

    expected = fit.validate(module, loaders()[1], ckpt_path=tmp_path / "x.ckpt", verbose=False)[0]["val_loss"]
    assert loss() == expected != loss(outputs=())


def test_a_checkpoint_of_before_knows_of_none():
    strategy = auto()
    state = {name: value for name, value in strategy.state_dict().items() if name != "between"}
    strategy.load_state_dict(state)
    assert strategy.state_dict()["between"] == {"outputs": [], "fed": []}


def test_a_layer_with_bits_of_its_own_rounds_again():
    net = residual()
    quantized = quantize(net, [X], outputs="auto", overrides={"5.conv1": {"activation_bits": 16}})
    bits = {name: quantizer.bits for name, quantizer in quantizers(quantized)}
    assert bits["5.conv1.input_quantizer"] == 16
    assert "5.skip.0.input_quantizer" not in bits


def test_what_stays_in_float_reads_what_was_rounded():
    quantized = quantize(residual(), [X], outputs="auto", skip=["4.conv1"])
    assert set(quantized_outputs(quantized)) == {"3", "4.bn2", "4", "5.bn2", "5.skip.1", "5"}
    assert set(quantized_layers(quantized)) == {"0", "4.conv2", "5.conv1", "5.conv2", "5.skip.0", "8"}


def test_steps_that_never_call_forward_say_nothing(tmp_path):
    class Inward(TinyModule):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    with pytest.raises(CompressionError, match="never call its forward"):
        trainer(tmp_path, auto()).fit(Inward(), *loaders())


def test_a_one_way_loader_gives_each_batch_once():
    given = []

    class Count(nn.Linear):
        def forward(self, x):
            given.append(float(x[0, 0]))
            return super().forward(x)

    quantize(Count(2, 2), (torch.full((1, 2), float(i)) for i in range(1, 6)), batches=3, outputs="auto")
    assert given == [1, 1, 1, 2, 3], "two looks, then each batch"


@pytest.mark.parametrize(
    ("outputs", "said"), [((), "4 of 7 layers run in float (0, 4.conv2, 5.conv2, ...)"), ("auto", "")]
)
def test_what_runs_in_float_is_told(tmp_path, caplog, outputs, said):
    quantized = quantize(randomize(residual()), [X], weight_bits=7, outputs=outputs)
    with caplog.at_level("INFO"):
        export(quantized, X, tmp_path / "net.onnx", format="int8", deploy="x86")
    assert said in caplog.text
    assert ("run in float" in caplog.text) == bool(said)
