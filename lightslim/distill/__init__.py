"""Distillation: a student learns from the maps and scores of trained teachers, inside its own fit."""

from lightslim.distill.distillers import Distiller, FSPDistiller, L2Distiller, SoftLabelDistiller
from lightslim.distill.losses import fsp_loss, fsp_matrix, l2_loss, soft_label_loss
from lightslim.distill.strategy import DistillationStrategy

__all__ = [
    "DistillationStrategy",
    "Distiller",
    "FSPDistiller",
    "L2Distiller",
    "SoftLabelDistiller",
    "fsp_loss",
    "fsp_matrix",
    "l2_loss",
    "soft_label_loss",
]
