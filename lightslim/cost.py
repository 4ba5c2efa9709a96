"""What a model costs: FLOPs, parameters, bytes."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightslim.steps import Probe, forward_probe


@dataclass(frozen=True)
class Cost:
    """FLOPs of one run (2 per multiply-add), number of parameters, bytes of parameters and buffers."""

    flops: int
    params: int
    bytes: int


def cost(model: nn.Module, example_inputs: Any) -> Cost:
    """The cost of a plain module; FLOPs are those of running it once on ``example_inputs``.

    Args:
        model: any module; it is left as it was.
        example_inputs: a tensor, a tuple of arguments or a dict of them.

    Example:
        >>> import torch
        >>> cost(nn.Linear(4, 2), torch.zeros(1, 4))
        Cost(flops=16, params=10, bytes=40)
    """
    return probe_cost(forward_probe(model, example_inputs))


def probe_cost(probe: Probe) -> Cost:
    """The cost of the model behind a probe; FLOPs are those of its evaluation step, per sample."""
    counter = FlopCounterMode(display=False)
    probe.run(within=counter)
    parameters = list(probe.module.parameters())
    stored = [*parameters, *probe.module.buffers()]
    return Cost(
        counter.get_total_flops() // probe.batch_size,
        sum(parameter.numel() for parameter in parameters),
        sum(tensor.numel() * tensor.element_size() for tensor in stored),
    )
