"""Small image classifiers in plain torch, and the LightningModule that trains any of them."""

from experiments.models.classifier import NETWORKS, ImageClassifier
from experiments.models.mobilenet import MobileNetV1, MobileNetV2
from experiments.models.resnet import ResNet20

__all__ = ["NETWORKS", "ImageClassifier", "MobileNetV1", "MobileNetV2", "ResNet20"]
