"""The checks for authors fail on components that are broken."""

import pytest
import torch

from lightslim import CompressionStrategy, L2Distiller, UniformPruneStrategy
from lightslim.quantize import AbsMax, Bounds
from lightslim.testing import (
    assert_criterion,
    assert_distiller,
    assert_exports,
    assert_range,
    assert_resumes,
    assert_trains,
)


class Noise(CompressionStrategy):
    """Draws from a generator that no checkpoint holds."""

    generator = torch.Generator()

    def begin(self, trainer, pl_module):
        with torch.no_grad():
            pl_module.net.stem[0].weight.add_(torch.randn(1, generator=self.generator))
        return {"act": "noise"}


class Replaces(CompressionStrategy):
    """Puts a new parameter in place of one, which no optimizer knows."""

    def begin(self, trainer, pl_module):
        pl_module.net.stem[0].weight = torch.nn.Parameter(pl_module.net.stem[0].weight.detach().clone())
        return {"act": "replace"}


class FollowsData(AbsMax):
    exact = False


class Negative(AbsMax):
    def forward(self, x):
        return Bounds(-self.magnitude(x) - 1)


class TeachesTheTeacher(L2Distiller):
    def forward(self, student, teacher):
        return (student[0] - teacher[0]).square().mean()


class Climbs(L2Distiller):
    def forward(self, student, teacher):
        return (
            -super().forward(student, teacher)
            if torch.is_grad_enabled() and student[0].requires_grad
            else (super().forward(student, teacher))
        )


def test_strategies(tmp_path):
    with pytest.raises(AssertionError, match="act first at epoch 1"):
        assert_trains(lambda: UniformPruneStrategy(target_ratio=0.5, start_epoch=2))
    with pytest.raises(AssertionError, match=r"net\.stem\.0\.weight is in 0 optimizer groups"):
        assert_trains(lambda: Replaces(start_epoch=1))
    with pytest.raises(AssertionError, match="differs from the run without interruption"):
        assert_resumes(lambda: Noise(start_epoch=1), tmp_path)


def test_exports(tmp_path, monkeypatch):
    monkeypatch.setattr("lightslim.testing.strategies.export", lambda *_, **__: {"rel_diff": 0.5})
    with pytest.raises(AssertionError, match=r"the float file's outputs are 0\.5 from the module's"):
        assert_exports(lambda: UniformPruneStrategy(target_ratio=0.5, start_epoch=1), tmp_path)


@pytest.mark.parametrize(
    ("criterion", "reason"),
    [
        (lambda w, axis=0: w.sum(), r"scores are \(\), not"),
        (lambda w, axis=0: -w.movedim(axis, 0).flatten(1).abs().sum(1), "zeros is to score least"),
        (lambda w, axis=0: w.movedim(axis, 0).flatten(1).abs().sum(1) * float("nan"), "not finite"),
        (lambda w, axis=0: w.movedim(axis, 0).flatten(1).abs().sum(1) + axis, "have other scores"),
    ],
)
def test_criterions(criterion, reason):
    with pytest.raises(AssertionError, match=reason):
        assert_criterion(criterion)


@pytest.mark.parametrize(("make", "reason"), [(FollowsData, "follow the data"), (Negative, "zero or more")])
def test_ranges(make, reason):
    with pytest.raises(AssertionError, match=reason):
        assert_range(make)


@pytest.mark.parametrize(("make", "reason"), [(TeachesTheTeacher, "goes to the teacher"), (Climbs, "raises the loss")])
def test_distillers(make, reason):
    with pytest.raises(AssertionError, match=reason):
        assert_distiller(lambda: make("net.stem", "net.stem"))
