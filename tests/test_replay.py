"""What an analysis of sensitivity computes once changes no bit."""

import contextlib
import copy
import random

import pytest
import torch
from analyses import Chain, Wrapped, analysis_of, conv, loader
from nets import randomize
from replay_nets import NETS, ODD, UNPROVABLE, WAYS, Convolutions, InPlace, Parts, Separable
from torch import nn

from lightslim.prune.prefix import Blank
from lightslim.prune.sources import equal
from lightslim.prune.unitwise import chains
from lightslim.untouched import untouched

pytestmark = pytest.mark.filterwarnings("ignore:.*val_dataloader.*")


@pytest.mark.parametrize("kind", [*NETS, *UNPROVABLE])
def test_what_is_computed_once_changes_no_bit(kind):
    module, data = Wrapped(randomize({**NETS, **UNPROVABLE}[kind]())), loader(40)
    once, plain = analysis_of(module, data), analysis_of(module, data)
    plain.evaluation.replaying = False
    state = copy.deepcopy(module.state_dict())
    assert plain.run()[0] == once.run()[0]
    assert once.evaluation.replaying == (kind in NETS), "only what cannot be proved is computed whole"
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert not module.training or module.net.training


KINDS = [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.int8, torch.bool]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("lying", [lambda x: x, lambda x: x[1:], lambda x: x[:, 1:], torch.t], ids=range(4))
def test_content_is_compared_to_the_last_bit_however_it_lies(dtype, lying):
    one = torch.randn(5, 7).mul(9).to(dtype)
    for at in range(one.numel()):
        other = one.clone()
        other.view(-1).view(torch.uint8)[at * one.element_size()] ^= 1
        seen = lying(torch.arange(35).view(5, 7) == at).any()
        assert equal(lying(one), lying(other)) != seen
        assert equal(lying(one), lying(one).clone())


def test_what_a_step_resumes_from_is_shared_until_it_is_written_to():
    content = torch.randn(2, 3)
    before, blank = content.clone(), Blank((2, 3), (3, 1), content.dtype, content.device)
    shared = blank.copy(content.untyped_storage())
    assert torch._C._data_address(shared) == torch._C._data_address(content)
    shared.mul_(2)
    assert torch.equal(content, before)
    assert torch.equal(shared, 2 * before)


def test_memory_that_knows_no_copy_on_write_is_copied(monkeypatch):
    def refuse(self):
        raise RuntimeError("no copy on write")

    module, data = Wrapped(randomize(InPlace())), loader(40)
    shared = analysis_of(module, data).run()[0]
    monkeypatch.setattr(torch.Tensor, "_lazy_clone", refuse)
    copied = analysis_of(module, data)
    assert copied.run()[0] == shared
    assert copied.evaluation.replaying


def test_units_are_not_computed_again_before_they_are_mixed():
    """Of each of the four layers but the last, the next one's inputs are known for all three shares."""
    net = nn.Sequential(*(nn.Sequential(conv(3 if not i else 8, 8), nn.BatchNorm2d(8), nn.ReLU()) for i in range(4)))
    net.append(nn.Conv2d(8, 2, 1))
    counts = {}
    for known in (True, False):
        analysis = analysis_of(Wrapped(randomize(net)), loader(64, 16))
        analysis.evaluation.replaying = known
        with Convolutions() as mode:
            analysis.run()
        counts[known] = mode.count
    batches, shares, layers = 4, 3, 5
    assert counts[False] == batches * layers * (1 + 4 * shares)
    rest = batches * shares * (4 + 3 + 2 + 1)  # what comes after the masked layer
    assert counts[True] <= batches * layers + rest + batches * layers + 30  # all once, and the trial of one batch


def test_a_module_of_torch_before_the_mask_is_not_called_again(monkeypatch):
    """What its forward calls is counted where nothing looks."""
    calls, own = [0], nn.functional.conv2d

    def counted(*args, **kwargs):
        calls[0] += 1
        return own(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "conv2d", counted)
    net = nn.Sequential(*(nn.Sequential(conv(3 if not i else 8, 8), nn.BatchNorm2d(8), nn.ReLU()) for i in range(4)))
    analysis = analysis_of(Wrapped(randomize(net.append(conv(8, 2)))), loader(64, 16))
    evaluation, ways, counts = analysis.evaluation, chains(analysis.graph, analysis.groups), []
    cuts = {name: analysis._cuts(name, [0.5])[0] for name in analysis.groups}
    for name, cut in cuts.items():
        evaluation.prepare(analysis._weights(cut), cut, ways[name])
        calls[0] = 0
        evaluation.masked(cut)
        counts.append(calls[0])
    batches, first = 4, 1  # that is given the batch, which is none of the step's own
    assert counts == [batches * (first + behind) for behind in (4, 3, 2, 1)]


def test_nothing_is_watched_any_more_once_the_known_part_is_over():
    """Also if it ends among functions, which cannot leave by themselves."""
    net, modes = Functions(), []
    net.last.register_forward_pre_hook(
        lambda *_: modes.append((torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()))
    )
    analysis = analysis_of(Wrapped(randomize(net)), loader(32))
    evaluation, ways = analysis.evaluation, chains(analysis.graph, analysis.groups)
    for name in analysis.groups:
        cut = analysis._cuts(name, [0.5])[0]
        evaluation.prepare(analysis._weights(cut), cut, ways[name])
        modes.clear()
        evaluation.masked(cut)
        assert evaluation.replaying
        assert modes == [(0, 0)] * 2


class Functions(nn.Module):
    """Calls no module between the first and the last layer."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = conv(3, 8), conv(8, 8), conv(8, 2)

    def forward(self, x):
        x = nn.functional.relu(self.first(x))
        x = nn.functional.conv2d(x, self.middle.weight, self.middle.bias, padding=1)
        return self.last(nn.functional.relu(x))


@pytest.mark.parametrize("kind", WAYS)
def test_no_bit_changes_whatever_way_a_step_takes(kind):
    module, data = Wrapped(randomize(WAYS[kind]())), loader(44)  # batches of 16, 16 and 12
    once, plain = analysis_of(module, data), analysis_of(module, data)
    plain.evaluation.replaying = False
    assert plain.run()[0] == once.run()[0]


def test_random_numbers_go_on_where_they_were_even_after_an_error():
    net = Wrapped(Parts(lambda part, x: x * random.random()))
    before = random.getstate()
    with contextlib.suppress(KeyboardInterrupt), untouched(net):
        net.net(torch.zeros(1, 3, 8, 8))
        raise KeyboardInterrupt
    assert random.getstate() == before


def test_masks_may_come_in_any_order():
    """Also a larger one than was prepared for: what reads masked units is masked as well."""
    module, data = Wrapped(randomize(Separable())), loader(40)
    analysis, plain = analysis_of(module, data), analysis_of(module, data)
    plain.evaluation.replaying = False
    (name, *_), ways = analysis.groups, chains(analysis.graph, analysis.groups)
    small, middle, large = analysis._cuts(name, [0.25, 0.5, 0.75])
    analysis.evaluation.prepare(analysis._weights(middle), middle, ways[name])
    for cut in (middle, small, large, middle):
        assert analysis.evaluation.masked(cut) == plain.evaluation.masked(cut)
    assert analysis.evaluation.replaying


def test_a_share_may_be_of_no_unit():
    module, data = Wrapped(randomize(Separable())), loader(40)
    found, baseline = analysis_of(module, data, ratios=(0.01,)).run()
    assert baseline > 0
    assert all(curve["loss"] == [0.0] for curve in found.values())


def test_memory_is_bounded_and_beyond_it_steps_run_whole():
    module, data = Wrapped(randomize(Chain(ODD["nothing"]))), loader(64)
    size = 16 * (3 * 64 + 1) * 4 + 16 * 4  # a batch, its labels being longer
    most = 0
    for batches in (0, 1.5, 30):
        analysis = analysis_of(module, data, memory=batches * size / 2**30)
        evaluation = analysis.evaluation
        before = evaluation._room.left + sum(map(_size, evaluation.samples[0].kept))
        cuts = {name: analysis._cuts(name, [0.5])[0] for name in analysis.groups}
        weights = {name: analysis._weights(cut) for name, cut in cuts.items()}
        for name in evaluation.order(weights) if evaluation.samples[0].kept else ():
            evaluation.prepare(weights[name], cuts[name], chains(analysis.graph, analysis.groups).get(name))
            held = sum(prefix.bytes for prefix in evaluation._prefixes.values())
            assert held + evaluation._room.left + sum(map(_size, evaluation.samples[0].kept)) == before
            assert evaluation._room.left >= 0
            most = max(most, held)
        assert analysis.run()[0] == analysis_of(module, data, memory=0).run()[0]
    assert most > 0


def _size(batch):
    return sum(tensor.numel() * tensor.element_size() for tensor in batch)
