"""What distillation refuses, or says, before the first step."""

import pytest
import torch
from test_distill_fit import OneByHand, Twice, Wide, assert_same, data, distil, student, weights, wide
from test_fit import Manual
from tiny import TinyModule, trainer
from torch import nn
from torch.nn.functional import cross_entropy

from lightslim import CompressionError, L2Distiller, SoftLabelDistiller


class Direct(OneByHand):
    def training_step(self, batch, batch_idx):
        cross_entropy(self(batch[0]), batch[1]).backward()


class Before(OneByHand):
    """The backward comes before what is compared."""

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.net.stem(batch[0]).mean())
        self(batch[0])


class Logs(TinyModule):
    def training_step(self, batch, batch_idx):
        self.log("l2", 1.0)
        self.log("student_loss", 2.0)
        return super().training_step(batch, batch_idx)


class Inside(TinyModule):
    def __init__(self):
        super().__init__("sgd")
        self.teacher = Wide()


L2 = L2Distiller("", "fc", name="l2")
Tiny = TinyModule
BAD = {
    "no teacher": (lambda: distil(teacher=None), Tiny, "there is no teacher"),
    "no module": (lambda: distil(teacher=3), Tiny, "is a int; a teacher is a module, or 'self'"),
    "student map": (lambda: distil(L2Distiller("net.had", "fc")), Tiny, r"student map: 'net.had' matches none.*net\.h"),
    "teacher map": (lambda: distil(L2Distiller("", "fx")), Tiny, "teacher map: 'fx' matches none.*nearest: fc"),
    "two maps": (lambda: distil(L2Distiller("net.*.3", "fc")), Tiny, r"matches 2 modules, net\.body\.3, net\.he"),
    "shapes": (lambda: distil(L2Distiller("net.stem", "stem")), Tiny, r"\(8, 16, 8, 8\).*\(8, 24, 8, 8\).*project"),
    "no optimizer": (lambda: distil(L2Distiller("net.stem", "stem", project=True)), Tiny, "give a distiller_optimizer"),
    "other input size": (lambda: distil(SoftLabelDistiller(), teacher=nn.Sequential(nn.Flatten(), nn.Linear(48, 4))),
                         Tiny, r"teacher cannot be called as the student is, with \[\(8, 3, 8, 8\)\]: RuntimeError"),
    "classes": (lambda: distil(SoftLabelDistiller(), teacher=Wide(classes=7)), Tiny, r"\(8, 4\).*\(8, 7\)"),
    "which teacher": (lambda: distil(L2, teacher=[wide(), wide()]), Tiny, "several teachers; say which.*teacher_0"),
    "unknown teacher": (lambda: distil(L2Distiller(teacher="big")), Tiny, "there is no teacher 'big': teacher"),
    "direct backward": (lambda: distil(L2), Direct, "no self.manual_backward comes after"),
    "early backward": (lambda: distil(L2), Before, "no self.manual_backward comes after"),
    "count": (lambda: distil(L2, distiller_optimizer=torch.optim.SGD), Manual, "makes 1.*by hand with 2"),
    "name taken": (lambda: distil(L2), Logs, "the module logs 'l2', too"),
    "called twice": (lambda: distil(L2), Twice, "called 2 times in a step; say which"),
    "inside": (lambda: distil(L2, teacher=SHARED.teacher), lambda: SHARED, "share teacher.stem.0.weight"),
    "input": (lambda: distil(L2, teacher_input="net.sten"), Tiny, "teacher_input: 'net.sten' matches none"),
    "output": (lambda: distil(L2Distiller("", "fc", name="a"), teacher=nn.ModuleDict({"fc": nn.Linear(1, 1)})),
               Tiny, "cannot be called as the student is.*forward"),
    "never reached": (lambda: distil(L2Distiller("spare", "fc")), lambda: Spare(), "called 0 times"),
    "self": (lambda: distil(L2Distiller("net.head.3", "net.head.9"), teacher="self"), Tiny, "teacher map: .*none"),
}  # fmt: skip


class Spare(TinyModule):
    def __init__(self):
        super().__init__("sgd")
        self.spare = nn.Linear(2, 2)


SHARED = Inside()


@pytest.mark.parametrize(("strategy", "kind", "message"), BAD.values(), ids=BAD)
def test_what_cannot_work_fails_before_the_first_step(tmp_path, strategy, kind, message):
    module = kind()
    before = weights(module)
    with pytest.raises(CompressionError, match=message):
        trainer(tmp_path, strategy()).fit(module, *data())
    assert_same(before, weights(module))
    assert "training_step" not in vars(module)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_two_phases_at_once_are_refused(tmp_path):
    both = distil(end_epoch=2, name="one"), distil(start_epoch=1, name="two")
    with pytest.raises(CompressionError, match="one and two distil at once"):
        trainer(tmp_path, *both).fit(student(), *data())


def test_a_name_of_ours_that_the_module_logs_is_its_own(tmp_path):
    fit = trainer(tmp_path, distil(L2Distiller(name="other")), max_epochs=1)
    fit.fit(Logs(), *data())
    assert float(fit.callback_metrics["student_loss"]) == 2.0


def test_an_end_past_the_end_of_training_is_said_and_distils_to_the_end(tmp_path):
    strategy = distil(end_epoch=9)
    fit = trainer(tmp_path, strategy, max_epochs=2)
    with pytest.warns(UserWarning, match="end_epoch is 9, but training ends after 2 epochs, still distilling"):
        fit.fit(student(), *data())
    assert [record["act"] for record in strategy.history] == ["distil"]
    assert "distillation_loss" in fit.callback_metrics


def test_frozen_maps_are_said(tmp_path):
    module = student()
    module.net.stem.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"no gradient goes back from \['net.stem'\]: frozen"):
        trainer(tmp_path, distil(L2Distiller("net.stem", "stem"), teacher=wide(width=16)), max_epochs=1).fit(
            module, *data()
        )
