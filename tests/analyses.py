"""An analysis of sensitivity of any network, and small networks for it."""

import pytorch_lightning as pl
import torch
from tiny import images, trainer
from torch import nn
from torch.utils.data import DataLoader

from lightslim import StructurePruner
from lightslim.graph import record
from lightslim.prune.analysis import Analysis, Measure, parameter_names
from lightslim.steps import step_probe

INFINITE = [float("inf")]


def loader(count=48, batch_size=16, channels=3):
    data = images(count, seed=2)
    return DataLoader([(x[:channels], y) for x, y in data], batch_size=batch_size)


def analysis_of(module, data, metric="val_loss", ratios=(0.25, 0.5, 0.75), memory=1.0, rate=None, mode="min"):
    graph = record(step_probe(module, next(iter(data)), None))
    pruner = StructurePruner()
    groups = parameter_names(pruner.selected(graph, "*"), pruner, graph.parameters)
    measure = Measure(metric, mode, ratios, rate, memory)
    return Analysis(trainer("."), module, graph, groups, pruner, measure, ([data], INFINITE))


class Wrapped(pl.LightningModule):
    """Logs the mean of what a network gives."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).square().mean())


def conv(a, b):
    return nn.Conv2d(a, b, 3, padding=1)


class Chain(nn.Module):
    """Four convolutions; what lies between the second and the third differs."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 4)
        self.between = between

    def forward(self, x):
        x = torch.relu_(self.b(self.a(x).relu()))
        x = self.between(self, x)
        return self.d(torch.relu(self.c(x)))
