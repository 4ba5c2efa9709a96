"""One fake quantization, forward and backward, against torch's own: ``python -m experiments.bench.fake_quant``.

Every variant runs once per round, in an order drawn anew, so that a slow moment of the machine hits all alike. Figures
are ratios within a round; the first line is a control of two equal variants, whose distance from 1 is noise.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lightslim.kernels import fake_quant

Step = Callable[[], None]
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
    ("torch tensor", "tensor"),
    ("torch tensor", "tensor, nothing clipped"),
    ("torch channel", "channel"),
    ("torch channel", "channel, nothing clipped"),
    ("tensor", "clone"),
    ("channel", "clone"),
    ("torch tensor", "clone"),
    ("torch channel", "clone"),
]


def measure(steps: dict[str, Step], rounds: int, repeats: int) -> list[dict[str, float]]:
    """Seconds of each step in each round, after one round that doesn't count."""
    names, found = list(steps), []
    for _ in range(rounds + 1):
        random.shuffle(names)
        found.append({name: _seconds(steps[name], repeats) for name in names})
    return found[1:]


def _seconds(step: Step, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """A bootstrap 95 % interval of the median."""
    medians = sorted(statistics.median(random.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws // 40], medians[-draws // 40]


def main() -> None:
    """Print a table of ratios for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random.seed(0)
    for count, repeats in ((2**20, 5), (2**24, 1)):
        times = measure(variants(count), options.rounds, repeats)
        print(f"\n{count / 2**20:.0f} Mi floats, forward + backward, {options.rounds} rounds")
        for slow, fast in PAIRS:
            ratios = [each[slow] / each[fast] for each in times]
            low, high = interval(ratios)
            print(f"  {slow + ' / ' + fast:42} {statistics.median(ratios):6.2f}  [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
