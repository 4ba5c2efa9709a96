"""The criterion by itself, and in runs."""

import pytest
import torch
from lightslim_taylor import taylor
from torch import nn

from lightslim import CompressionError, SensitivePruneStrategy, StructurePruner, UniformPruneStrategy
from lightslim.prune import prune
from lightslim.testing import assert_criterion, assert_exports, assert_resumes, assert_trains


def uniform():
    return UniformPruneStrategy(StructurePruner(criterions={"*": "taylor"}), start_epoch=1, target_ratio=0.5)


def sensitive():
    pruner = StructurePruner(criterions={"*": "taylor"})
    return SensitivePruneStrategy(pruner, start_epoch=1, target_ratio=0.5, metric_name="val_acc")


def test_it_is_a_criterion():
    assert_criterion(taylor)


@pytest.mark.parametrize("make", [uniform, sensitive])
def test_it_works_in_a_fit(make, tmp_path):
    assert_trains(make)
    assert_resumes(make, tmp_path)


def test_what_it_cut_is_exported(tmp_path):
    assert_exports(uniform, tmp_path)


def test_it_is_the_change_of_the_loss_to_first_order():
    """Shrinking a unit by a little changes the loss by that share of its score."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(20, 5).double(), torch.arange(20) % 3
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    scores = taylor(net[2].weight, axis=1)
    for unit, score in enumerate(scores):
        with torch.no_grad():
            net[2].weight[:, unit] *= 1 - 1e-6
            change = nn.functional.cross_entropy(net(x), y) - loss
            net[2].weight[:, unit] /= 1 - 1e-6
        torch.testing.assert_close(change.abs() / 1e-6, score, rtol=1e-3, atol=1e-7)


def test_a_plain_module_is_ranked_by_its_own_gradients_or_refused():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(CompressionError, match=r"0\.weight cannot be ranked by taylor: .* loss\.backward\(\)"):
        prune(net, torch.zeros(2, 4), criterion="taylor")
    assert net[0].out_features == 8
    net(torch.randn(16, 4)).square().sum().backward()
    best = taylor(net[0].weight).topk(4).indices.sort().values
    expected = net[0].weight[best].clone()
    prune(net, torch.zeros(2, 4), criterion="taylor")
    assert torch.equal(net[0].weight, expected)
