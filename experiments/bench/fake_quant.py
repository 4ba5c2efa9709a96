"""One fake quantization, forward and backward, against torch's own."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from experiments.bench.paired import Row, Step, measure, row
from lightslim.kernels import fake_quant

CHANNELS = 1024


def variants(count: int) -> dict[str, Step]:
    """What is compared: each step quantizes ``count`` floats and takes the gradient."""
    x = torch.randn(count).view(CHANNELS, -1).requires_grad_()
    grad, amax, rows = torch.randn(x.shape), torch.tensor(2.0), torch.full((CHANNELS,), 2.0)
    zeros = torch.zeros(CHANNELS, dtype=torch.int32)

    def step(run: Callable[[Tensor], Tensor]) -> Step:
        def forward_and_backward() -> None:
            torch.autograd.grad(run(x), x, grad)

        return forward_and_backward

    def torch_tensor(x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, 2.0 / 127, 0, -127, 127)

    def torch_channel(x: Tensor) -> Tensor:
        return torch.fake_quantize_per_channel_affine(x, rows / 127, zeros, 0, -127, 127)

    return {
        "clone": step(lambda x: x.clone()),
        "clone again": step(lambda x: x.clone()),
        "tensor": step(lambda x: fake_quant(x, amax)),
        "tensor, nothing clipped": step(lambda x: fake_quant(x, amax, clips=False)),
        "torch tensor": step(torch_tensor),
        "channel": step(lambda x: fake_quant(x, rows, axis=0)),
        "channel, nothing clipped": step(lambda x: fake_quant(x, rows, axis=0, clips=False)),
        "torch channel": step(torch_channel),
    }


PAIRS = [
    ("clone again", "clone"),
    ("tensor", "torch tensor"),
    ("tensor, nothing clipped", "torch tensor"),
    ("channel", "torch channel"),
    ("channel, nothing clipped", "torch channel"),
    ("tensor", "clone"),
    ("channel", "clone"),
]


def rows(rounds: int, quick: bool) -> Iterator[Row]:
    """Ours beside torch's, and beside a copy of as many floats."""
    for count, repeats, faster in ((2**14, 1, 1.0),) if quick else ((2**20, 5, 5.0), (2**24, 1, 2.2)):
        seconds = measure(variants(count), rounds, repeats)
        for ours, other in PAIRS:
            goal = 1 / faster if other.startswith("torch") else None
            yield row(f"{count:,} floats, {ours} / {other}", seconds, ours, other, goal, control=ours == "clone again")
