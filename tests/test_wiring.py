"""What is rounded between layers: found by one run, and integer operations in the runtime that it is found for."""

import copy

import onnx
import pytest
import torch
from nets import randomize
from test_export_int8 import operators
from tiny import TinyModule, loaders, trainer
from torch import nn
from wired_nets import CASES, ELSEWHERE, Basic, conv, residual

from experiments.models import MobileNetV1, MobileNetV2, ResNet20
from lightslim import CompressionError, QuantizationStrategy, UniformPruneStrategy
from lightslim.export import export
from lightslim.quantize import quantize, quantizers, transform
from lightslim.quantize.plan import quantizable
from lightslim.quantize.transform import quantized_layers, quantized_outputs
from lightslim.quantize.wiring import Between, between

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def found(net, x=X):
    def run(within):
        with within, torch.no_grad():
            net(x)

    return between(net.eval(), run, quantizable(net))


@pytest.mark.parametrize("name", CASES)
def test_values_are_rounded_where_they_are_given(name):
    make, outputs, fed = CASES[name]
    assert found(make()) == Between(tuple(outputs), tuple(fed))


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
    convolutions = sum(isinstance(m, nn.Conv2d) for m in net.modules())
    returned = not isinstance(list(net.modules())[-1], nn.Linear)
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
