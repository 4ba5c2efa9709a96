"""The distiller in fits."""

import torch
from lightslim_attention import AttentionDistiller

from lightslim import DistillationStrategy
from lightslim.registry import registry
#from lightslim.testing import TinyModule, assert_exports, assert_resumes, assert_trains


def make():
    torch.manual_seed(5)
    distiller = AttentionDistiller(["net.0", "net.3"], ["net.0", "net.0"])
    return DistillationStrategy([distiller], teacher=TinyModule(), start_epoch=1)


def test_it_is_known_by_name():
    assert registry().get("distiller", "AttentionDistiller") is AttentionDistiller


def test_it_trains():
    assert_trains(make)


def test_it_resumes(tmp_path):
    assert_resumes(make, tmp_path)


def test_it_exports(tmp_path):
    assert_exports(make, tmp_path)
