"""The distiller in fits."""

from lightslim_attention import AttentionDistiller

from lightslim import DistillationStrategy
from lightslim.registry import registry
from lightslim.testing import TinyModule, assert_distiller, assert_exports, assert_resumes


def distiller():
    return AttentionDistiller(["net.stem", "net.body"], ["net.stem", "net.stem"])


def make():
    return DistillationStrategy([distiller()], teacher=TinyModule(), start_epoch=1)


def test_it_is_known_by_name():
    assert registry().get("distiller", "AttentionDistiller") is AttentionDistiller


def test_it_is_a_distiller_and_trains():
    assert_distiller(distiller)


def test_it_resumes(tmp_path):
    assert_resumes(make, tmp_path)


def test_it_exports(tmp_path):
    assert_exports(make, tmp_path)
