"""Mobile files: the codes in them, what they compute, and which kernels run them."""

import warnings
from collections import Counter

import pytest
import torch
from export_nets import EXACT, NETS, trained
from tiny import TinyNet
from torch import nn

from lightslim import CompressionError
from lightslim.export.mobile import mobile_file, open_in_executorch, pte_file
from lightslim.quantize import quantize, transform
from lightslim.quantize.integers import weight_codes


class Blocks(nn.Module):
    """Plain, depthwise and residual: batch norms everywhere, some gammas negative, one zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.point, self.norm3 = nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12)
        self.last, self.head = nn.Conv2d(12, 8, 3, stride=2), nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm1(self.stem(x)).relu()
        y = nn.functional.relu6(self.norm2(self.depthwise(x)))
        x = torch.relu(x + self.norm3(self.point(y)))
        return self.head(self.last(x).relu_().mean((2, 3)))


class Chain(nn.Sequential):
    """Each layer's output is rounded by the next: transposed, grouped, one-dimensional."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 2, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 3, padding="same"), nn.Hardtanh(), nn.Flatten(2),
            nn.Conv1d(6, 4, 3), nn.Conv1d(4, 4, 1), nn.Flatten(), nn.Linear(4 * 254, 3),
        )  # fmt: skip


def seen_data(net, channels, **settings):
    """The network, quantized, its ranges and statistics those of some data, and inputs for it."""
    torch.manual_seed(0)
    for child in net.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.normal_(child.weight)
            nn.init.normal_(child.bias)
            child.weight.data[0] = 0.0
    transform(net, **settings)
    for _ in range(4):
        net(torch.randn(32, channels, 8, 8))
    return net.eval(), torch.randn(64, channels, 8, 8)


@pytest.fixture
def write(tmp_path):
    """Writes a file and says what its manifest says and what is in it."""
    pytest.importorskip("executorch")

    def run(net, x, **options):
        manifest = mobile_file(net, x, tmp_path / "net.pte", **options)
        return manifest, (tmp_path / "net.pte").read_bytes()

    return run


@pytest.fixture
def layers(monkeypatch):
    """Counts the layers that XNNPACK is told of, by the types of their inputs and outputs."""
    pytest.importorskip("executorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # executorch's own
        from executorch.backends.xnnpack import xnnpack_preprocess

    found, serialize = Counter(), xnnpack_preprocess.serialize_xnnpack_binary

    def spy(graph, data):
        tensors = [getattr(value.xvalue_union, "tensor_value", value.xvalue_union) for value in graph.xvalues]
        types = {one.id_out: one.datatype.name.removeprefix("xnn_datatype_") for one in tensors}
        for union in (node.xnode_union for node in graph.xnodes):
            if hasattr(union, "filter_id"):
                found[types[union.input1_id], types[union.output_id]] += 1
        return serialize(graph, data)

    monkeypatch.setattr(xnnpack_preprocess, "serialize_xnnpack_binary", spy)
    return found


def stored(layer, norm=None, ends=True):
    """The codes of a layer as the file holds them: signs of its batch norm taken in, channels last."""
    codes = weight_codes(layer).values
    if norm is not None:
        codes = codes * norm.weight.sign().char().view(-1, 1, 1, 1)
    if ends:
        codes = torch.cat([codes, codes.new_zeros(len(codes), 2, *codes.shape[2:])], 1)
    elif codes.shape[1] == 1:
        codes = codes.transpose(0, 1)
    return codes.movedim(1, -1).contiguous().numpy().tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NETS if name != "transposed"])
def test_outputs_are_the_fake_quantized_ones(write, name):
    affine = list(NETS).index(name) % 2
    ranges = "moving_average_min_max" if affine else "moving_average_abs_max"
    manifest, _ = write(*trained(name, activation_quantize_type=ranges))
    assert manifest["rel_diff"] < EXACT
    assert manifest["argmax_differs"] == 0


def test_a_rounded_value_may_be_read_by_integers_and_in_float(write):
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8)
    quantized = quantize(TinyNet(), [x], outputs="auto", activation_quantize_type="moving_average_min_max")
    manifest, _ = write(quantized, x)
    assert manifest["rel_diff"] < EXACT


def test_exact_files_hold_the_codes_and_keep_biases_in_float(write, layers):
    net, x = seen_data(Blocks(), 3)
    manifest, content = write(net, x)
    assert manifest["rel_diff"] < EXACT
    for layer, norm in ((net.stem, net.norm1), (net.point, net.norm3), (net.last, None), (net.head, None)):
        assert stored(layer, norm) in content
    # Each of the four has a layer for its ends
    assert layers == {("qdint8", "fp32"): 4, ("qint8", "qint8"): 4, ("fp32", "fp32"): 1}


def test_fast_files_go_from_integer_to_integer_where_they_can(write, layers):
    net, x = seen_data(Blocks(), 3)
    manifest, content = write(net, x, deploy="fast")
    assert manifest["rel_diff"] < 2e-2
    assert stored(net.depthwise, net.norm2, ends=False) in content
    for layer, norm in ((net.stem, net.norm1), (net.point, net.norm3), (net.last, None), (net.head, None)):
        assert stored(layer, norm) in content  # what is added, averaged or returned is not rounded
    assert layers == {("qdint8", "fp32"): 4, ("qint8", "qint8"): 5}


@pytest.mark.parametrize("deploy", ["exact", "fast"])
def test_layers_of_every_kind_and_weights_with_one_step(write, layers, deploy):
    net, x = seen_data(Chain(), 4, weight_quantize_type="abs_max", weight_bits=7, activation_bits=6)
    manifest, _ = write(net, x, deploy=deploy)
    assert manifest["rel_diff"] < 2e-2
    assert layers["qint8", "qint8"] + layers["qdint8", "fp32"] >= 8


def test_layers_left_out_stay_in_float(write, layers):
    net, x = seen_data(Blocks(), 3, skip=["stem", "head"])
    manifest, content = write(net, x)
    assert manifest["rel_diff"] < EXACT
    assert stored(net.point, net.norm3) in content
    assert layers == {("qdint8", "fp32"): 2, ("qint8", "qint8"): 2, ("fp32", "fp32"): 3}


def test_an_input_that_was_always_zero_gives_zeros(write):
    net = transform(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    net(torch.zeros(2, 4))
    assert write(net, torch.randn(8, 4))[0]["max_abs_diff"] < 1e-30


def test_more_samples_than_a_program_takes_go_through_in_pieces(write, tmp_path):
    net = transform(nn.Sequential(nn.Linear(4, 3)))
    net(torch.randn(8, 4))
    write(net, torch.randn(8, 4), batch_size=2)
    run, x = open_in_executorch(tmp_path / "net.pte", threads=1), torch.randn(5, 4)
    assert torch.allclose(run(x)[0], net.eval()(x), atol=1e-5)
    assert run(x[:1])[0].shape == (1, 3)


def test_float_programs_compute_what_the_model_does_without_fake_quantization(tmp_path):
    pytest.importorskip("executorch")
    net, x = seen_data(Blocks(), 3)
    manifest = pte_file(net, x, tmp_path / "net.pte", batch_size=None)
    assert 1e-6 < manifest["rel_diff"] < 1e-1


def test_what_is_no_program_is_refused(tmp_path):
    pytest.importorskip("executorch")
    with pytest.raises(CompressionError, match=r"net\.pte: there is no such file"):
        open_in_executorch(tmp_path / "net.pte")
    (tmp_path / "net.pte").write_bytes(b"no program" * 100)
    with pytest.raises(CompressionError, match=r"net\.pte cannot be opened"):
        open_in_executorch(tmp_path / "net.pte")


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (
            {"activation_quantize_type": "abs_max"},
            {},
            r"the input of 0 has the range of the tensor at hand \(abs_max\)",
        ),
        ({"activation_bits": 9}, {}, "the input of 0 has 9 bits"),
        ({"weight_bits": 12}, {}, "the weight of 0 has 12 bits"),
        ({}, {"deploy": "fats"}, "did you mean 'fast'"),
        ({}, {"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({}, {"batch_size": 9}, "batch_size is 9, but the example inputs hold 2"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_before_any_work(tmp_path, settings, options, message):
    net = transform(nn.Sequential(nn.Linear(4, 3)), **settings)
    with pytest.raises(CompressionError, match=message):
        mobile_file.write(net, (torch.zeros(2, 4),), tmp_path / "net.pte", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_fake_quantization_is_refused(tmp_path):
    with pytest.raises(CompressionError, match="transform the model first"):
        mobile_file.write(nn.Linear(4, 3), (torch.zeros(2, 4),), tmp_path / "net.pte")


def test_what_torch_cannot_export_is_named(tmp_path):
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    net = transform(Branching())
    net(torch.ones(2, 4))
    with pytest.raises(CompressionError, match="torch cannot export this model: "):
        mobile_file.write(net, (torch.ones(2, 4),), tmp_path / "net.pte")


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CompressionError, match=r"pip install 'lightslim\[mobile\]'"):
        mobile_file.check_available()
