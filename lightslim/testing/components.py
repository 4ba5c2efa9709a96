"""What the parts that strategies use must do: criterions, ranges and distillers."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightslim.distill import DistillationStrategy
from lightslim.distill.distillers import Distiller
from lightslim.quantize.ranges import Range
from lightslim.quantize.transform import FakeQuantize
from lightslim.testing.strategies import assert_trains
from lightslim.testing.tiny import TinyModule


def assert_criterion(criterion: Callable[..., Tensor]) -> None:
    """One finite score for each slice along any axis; a slice of zeros scores least; the weight stays as it is.

    Args:
        criterion: ``f(weight, axis=0) -> scores``; one that reads gradients is given a weight that has one.

    Raises:
        AssertionError: says what does not hold.

    Example:
        >>> assert_criterion(lambda weight, axis=0: weight.movedim(axis, 0).flatten(1).abs().amax(1))
    """
    weight, gradient = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    weight.grad = gradient
    before = weight.clone()
    for axis in range(3):
        scores = criterion(weight, axis=axis)
        expected = (weight.shape[axis],)
        assert scores.shape == expected, f"axis {axis}: the scores are {tuple(scores.shape)}, not {expected}"
        assert bool(torch.isfinite(scores).all()), f"axis {axis}: the scores of finite weights are not finite"
        moved = criterion(_graded(weight.movedim(axis, 0), gradient.movedim(axis, 0)), axis=0)
        assert torch.allclose(scores, moved), f"axis {axis}: the same slices along axis 0 have other scores"
    assert torch.equal(weight, before), "it changes the weight it is given"
    scores = criterion(_graded(torch.cat([weight, torch.zeros(1, 3, 2)]), torch.cat([gradient, gradient[:1]])))
    assert int(scores.argmin()) == 4, f"a slice of zeros is to score least; the scores are {scores.tolist()}"


def _graded(weight: Tensor, gradient: Tensor) -> Tensor:
    weight.grad = gradient
    return weight


def assert_range(make: Callable[..., Range]) -> None:
    """Bounds of the right shape around zero, finite for any tensor; learned in training only; restored by its state.

    What activation checkpointing computes again in the backward pass is the same, and teaches nothing, also where a
    step has called it twice.

    Args:
        make: builds a fresh range: its class, if all arguments have defaults.

    Raises:
        AssertionError: says what does not hold.

    Example:
        >>> from lightslim.quantize import AbsMax
        >>> assert_range(AbsMax)
    """
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    rule = _taught(make, x)
    before = _bounds(rule.eval(), x)
    state = copy.deepcopy(rule.state_dict())
    if not rule.exact:
        assert all(map(torch.equal, before, _bounds(rule, 9 * x))), "its bounds follow the data in evaluation mode"
    again = make()
    again.load_state_dict(state)
    assert all(map(torch.equal, before, _bounds(again.eval(), x))), "another one with its state has other bounds"
    _bounds(_taught(make, torch.zeros(6, 5)), torch.zeros(6, 5))
    if not rule.calibrated:
        _bounds(make(), torch.zeros(0, 5) if rule.axis else x[:, :0])
    once = _trained(make, x, lambda run, inputs: run(inputs))
    twice = _trained(make, x, lambda run, inputs: checkpoint(run, inputs, use_reentrant=False))
    assert all(map(torch.equal, once, twice)), "computed again in the backward pass it differs: see Range.given"


def _trained(make: Callable[..., Range], x: Tensor, call: Callable[..., Any]) -> list[Tensor]:
    """Gradients and state of a range after three steps, in which ``call`` calls what rounds, twice in each."""
    quantizer, found = FakeQuantize(_taught(make, x)), []
    for scale in (1.0, 3.0, 0.5):
        views = [(factor * scale * x).requires_grad_() for factor in (1.0, 0.6)]
        losses = [call(lambda given: quantizer(given).square(), view).sum() for view in views]
        sum(losses).backward()
        found += [view.grad for view in views]
    return [*found, *quantizer.state_dict().values()]


def _taught(make: Callable[..., Range], x: Tensor) -> Range:
    rule = make().train()
    for _ in range(3):
        rule.watch(x)
    return rule


def _bounds(rule: Range, x: Tensor) -> list[Tensor]:
    """The bounds of ``x``, copied, after what all bounds are checked for."""
    found = rule(x)
    shape = torch.Size([]) if rule.axis is None else x.shape[rule.axis : rule.axis + 1]
    assert found.amax.shape == shape, f"amax is {tuple(found.amax.shape)} of axis {rule.axis}, not {tuple(shape)}"
    assert bool(torch.isfinite(found.amax).all()), f"amax is not finite: {found.amax}"
    assert bool((found.amax >= 0).all()), f"amax must be zero or more: {found.amax}"
    if found.amin is None:
        return [found.amax.detach().clone()]
    assert bool((found.amin <= 0).all()), f"amin must be zero or less, so that zero is on the grid: {found.amin}"
    return [found.amax.detach().clone(), found.amin.detach().clone()]


def assert_distiller(make: Callable[[], Distiller]) -> None:
    """A finite loss that sends gradients to the student alone and falls when followed; and it works in a fit.

    Args:
        make: builds a fresh distiller between maps of two :class:`TinyModule`, as ``"net.stem"``.

    Raises:
        AssertionError: says what does not hold.

    Example:
        >>> from lightslim import SoftLabelDistiller
        >>> assert_distiller(SoftLabelDistiller)
    """
    distiller = make()
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(4, 8, 6, 6, generator=generator, requires_grad=True) for _ in distiller.student_maps]
    teacher = [torch.randn(4, 8, 6, 6, generator=generator, requires_grad=True) for _ in distiller.teacher_maps]
    loss = distiller(student, teacher)
    assert loss.numel() == 1, f"the loss is one number, not a tensor of {tuple(loss.shape)}"
    assert bool(torch.isfinite(loss)), f"the loss is {float(loss)}"
    gradients = torch.autograd.grad(loss, [*student, *teacher], allow_unused=True)
    given, rest = gradients[: len(student)], gradients[len(student) :]
    assert all(g is not None and bool(g.any()) for g in given), "no gradient reaches one of the student's maps"
    assert not any(g is not None and bool(g.any()) for g in rest), "a gradient goes to the teacher: detach its maps"
    assert _falls(distiller, student, given, [x.detach() for x in teacher]), "a step along the gradient raises the loss"
    assert_trains(lambda: DistillationStrategy([make()], teacher=TinyModule(), start_epoch=1))


def _falls(distiller: Distiller, student: list[Tensor], gradients: Any, teacher: list[Tensor]) -> bool:
    rate = 1e-2 / max(float(gradient.norm()) for gradient in gradients)
    stepped = [map_.detach() - rate * gradient for map_, gradient in zip(student, gradients, strict=True)]
    return bool(distiller(stepped, teacher) < distiller([x.detach() for x in student], teacher))
