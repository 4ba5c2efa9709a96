"""The schedule, the ranking and the pattern against their formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightslim_gradual import cubic, masks_for, sparsify
from lightslim_gradual.layers import Choice
from lightslim_gradual.masks import spared
from torch import nn

from lightslim import CompressionError

seeds, shares = st.integers(0, 2**16), st.floats(0, 0.99)


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    # Coarse values, so that there are ties and zeros
    return {name: (4 * torch.randn(shape, generator=generator)).round()
            for name, shape in (("a", (6, 8)), ("b", (4, 8, 3, 3)), ("c", (3, 4)))}  # fmt: skip


@pytest.mark.parametrize(("initial", "final"), [(0.0, 0.9), (0.25, 0.5)])
def test_the_schedule_is_the_papers(initial, final):
    steps = [final + (initial - final) * (1 - t / 10) ** 3 for t in range(11)]
    assert [cubic(t / 10, initial, final) for t in range(11)] == steps
    assert steps == sorted(steps)


@settings(max_examples=40, deadline=None)
@given(seeds, shares)
def test_each_layer_loses_its_share_of_least_weights(seed, share):
    found = weights(seed)
    for name, mask in masks_for(found, share).items():
        gone, stays = found[name][mask].abs(), found[name][~mask].abs()
        assert len(gone) == min(round(share * mask.numel()), mask.numel() - 1)
        assert not len(gone) or gone.max() <= stays.min()


@settings(max_examples=40, deadline=None)
@given(seeds, shares)
def test_globally_the_least_of_all_go_and_no_layer_dies(seed, share):
    found = weights(seed)
    masks = masks_for(found, share, "global")
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == min(round(share * total), total - len(masks))
    bar = max((found[name][mask].abs().max().item() for name, mask in masks.items() if mask.any()), default=0.0)
    for name, mask in masks.items():
        stays = found[name][~mask].abs().flatten().sort().values
        assert len(stays) == 1 or stays[0] >= bar or stays[-1] < bar or (stays >= bar).sum() >= len(stays) - 1


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(0, 1), st.sampled_from([(2, 4), (1, 4), (1, 2), (4, 8)]))
def test_a_pattern_keeps_the_largest_of_each_group_of_neighbours(seed, axis, pattern):
    kept, of = pattern
    weight = torch.randn(16, 8, 3, generator=torch.Generator().manual_seed(seed))
    mask = spared(weight, kept, of, axis)
    groups = weight.abs().movedim(axis, -1).reshape(-1, of)
    flags = mask.movedim(axis, -1).reshape(-1, of)
    assert (flags.sum(1) == kept).all()
    for group, flag in zip(groups, flags, strict=True):
        assert group[flag].min() >= group[~flag].max()


@settings(max_examples=30, deadline=None)
@given(seeds, shares, st.sampled_from(["layer", "global"]))
def test_what_is_gone_stays_gone_when_more_goes(seed, share, ranking):
    found = weights(seed)
    first = masks_for(found, share / 2, ranking)
    for name, mask in first.items():
        found[name][mask] = 0.0
    then = masks_for(found, share, ranking, before=first)
    assert all(bool((then[name] | ~mask).all()) for name, mask in first.items())


@pytest.mark.parametrize("progress", [0.2, 0.6, 1.0])
def test_on_the_way_to_a_pattern_no_group_loses_more_than_it_will(progress):
    net = nn.Sequential(nn.Conv2d(8, 4, 3), nn.ConvTranspose2d(8, 4, 3), nn.Linear(8, 6))
    choice = Choice(pattern="2:4")
    chosen, _ = choice.select(net)
    for name, mask in choice.masks(chosen, progress).items():
        counts = mask.movedim(chosen[name][1], -1).reshape(-1, 4).sum(1)
        assert counts.max() <= 2
        assert int(mask.sum()) == round(cubic(progress, 0, 0.5) * mask.numel())


def test_a_model_is_sparsified_in_place_and_what_does_not_fit_stays_dense():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 4, 3), nn.Linear(8, 2))
    assert sparsify(net, pattern="2:4").keys() == {"2.weight", "3.weight"}
    assert [(layer.weight == 0).float().mean().item() for layer in net] == [0, 0, 0.5, 0.5]
    groups = (net[2].weight == 0).movedim(0, -1).reshape(-1, 4).sum(1)
    assert (groups == 2).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity 1.0"),
        ({"initial": 0.6}, "initial_sparsity is 0.6"),
        ({"ranking": "globl"}, "did you mean 'global'"),
        ({"pattern": "4:2"}, "pattern is '4:2'"),
        ({"pattern": "2:4", "sparsity": 0.5}, "give one"),
        ({"ignore": ["("]}, "ignore"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(CompressionError, match=message):
        Choice(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"min_size": 99}, "no layer is left"), ({"pruned_params": "conv*"}, "nearest: 0.weight"),
     ({"pattern": "2:4"}, "3 inputs do not divide into groups of 4")],
)  # fmt: skip
def test_a_model_with_nothing_to_prune_is_refused(arguments, message):
    with pytest.raises(CompressionError, match=message):
        Choice(**arguments).check(nn.Sequential(nn.Linear(3, 2)))
