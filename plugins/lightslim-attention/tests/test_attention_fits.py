"""The distiller in fits."""

import torch
from conformity import assert_exports, assert_resumes, assert_trains
from lightslim_attention import AttentionDistiller
from tiny import TinyModule

from lightslim import DistillationStrategy
from lightslim.registry import registry


def make():
    torch.manual_seed(5)
    distiller = AttentionDistiller(["net.stem", "net.body"], ["net.stem", "net.stem"])
    return DistillationStrategy([distiller], teacher=TinyModule(), start_epoch=1)


def test_it_is_known_by_name():
    assert registry().get("distiller", "AttentionDistiller") is AttentionDistiller


def test_it_trains(tmp_path):
    assert_trains(make, tmp_path)


def test_it_resumes(tmp_path):
    assert_resumes(make, tmp_path)


def test_it_exports(tmp_path):
    assert_exports(make, tmp_path)
