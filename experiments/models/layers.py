"""What the networks share."""

from torch import nn


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, at least one."""
    return max(1, round(channels * width))


def he_init(network: nn.Module) -> None:
    """He et al.'s normal initialisation for every convolution, which keeps the variance through ReLU layers."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
