"""The loss against its formula, and its invariances."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightslim_attention import AttentionDistiller, attention_loss, attention_map

from lightslim import CompressionError

seeds = st.integers(0, 2**16)


def maps(seed, student=(2, 3, 4, 6), teacher=(2, 5, 4, 6)):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (student, teacher))


def by_hand(student, teacher, power):
    """The paper's formula, sample by sample."""
    total = 0.0
    for f, g in zip(student, teacher, strict=True):
        q, r = ((x.abs() ** power).sum(0) / x.shape[0] for x in (f, g))
        total += float(((q / q.square().sum().sqrt() - r / r.square().sum().sqrt()) ** 2).sum())
    return total / len(student)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(1, 4))
def test_the_loss_is_the_papers_formula(seed, power):
    student, teacher = maps(seed)
    assert attention_loss(student, teacher, power).item() == pytest.approx(by_hand(student, teacher, power), abs=1e-12)
    single = attention_loss(student.float(), teacher.float(), power).item()
    assert single == pytest.approx(by_hand(student, teacher, power), abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0.01, 100))
def test_scale_sign_and_order_of_channels_do_not_matter(seed, scale):
    student, teacher = maps(seed)
    loss = attention_loss(student, teacher)
    torch.testing.assert_close(attention_loss(-scale * student.flip(1), teacher), loss)
    assert 0 <= loss <= 2
    assert attention_loss(student, scale * student) < 1e-20


def test_the_finer_map_is_averaged_to_the_coarser_whoever_has_it():
    student, teacher = maps(0, (2, 3, 8, 8), (2, 5, 4, 2))
    coarse = attention_map(student).unfold(1, 2, 2).unfold(2, 4, 4).mean((-1, -2))
    expected = by_hand(coarse.sqrt().unsqueeze(1), teacher, 2.0)
    assert attention_loss(student, teacher).item() == pytest.approx(expected)
    assert attention_loss(teacher, student).item() == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 6), (2, 3, 2, 3, 4)])
def test_gradients_are_right_and_reach_the_student_only(shape):
    student, teacher = maps(1, shape, shape)
    student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention_loss(x, teacher.detach()), student)
    attention_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_a_map_of_zeros_gives_no_nan():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    attention_loss(student, torch.rand(2, 3, 4, 4)).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "names 0 maps"),
        ({"student_maps": ["a"]}, "1 maps, teacher_maps 0"),
        ({"student_maps": ["a"], "teacher_maps": ["a"], "power": 0.5}, "power is 0.5"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(CompressionError, match=message):
        AttentionDistiller(**arguments)


def test_maps_without_positions_are_refused():
    with pytest.raises(CompressionError, match=r"'a' is \(2, 3\)"):
        AttentionDistiller(["a"], ["b"]).mapped([torch.Size((2, 3))], [torch.Size((2, 3))])
