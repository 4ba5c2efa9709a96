"""MobileNet V1 (Howard et al. 2017) and V2 (Sandler et al. 2018), with fewer strides for images of about 28 by 28."""

from torch import Tensor, nn
from torch.nn.functional import relu, relu6

from experiments.models.layers import he_init, scaled


class SeparableBlock(nn.Module):
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution that mixes them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, inputs, h, w]`` to ``[n, outputs, h / stride, w / stride]``."""
        return relu(self.bn2(self.pointwise(relu(self.bn1(self.depthwise(x))))))


class MobileNetV1(nn.Module):
    """Thirteen separable blocks; their 1x1 convolutions are ``blocks.0.pointwise.weight`` and so on.

    The paper divides 224 pixels by 32. Here the stem and the first 128 channels keep their resolution, so that 28
    pixels are divided by 8 and the last blocks still see 4 by 4.

    Args:
        in_channels: of the images.
        num_classes: scores to return.
        width: scales all channels, 32 to 1024.

    Example:
        >>> import torch
        >>> MobileNetV1(width=0.25)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    PLAN = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 1), (1024, 1))

    def __init__(self, in_channels: int = 1, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled(32, width)
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential()
        for wide, stride in self.PLAN:
            self.blocks.append(SeparableBlock(channels, scaled(wide, width), stride))
            channels = scaled(wide, width)
        self.fc = nn.Linear(channels, num_classes)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images to the scores of each class."""
        x = self.blocks(relu(self.bn(self.stem(images))))
        return self.fc(x.mean(dim=(2, 3)))


class InvertedResidual(nn.Module):
    """Widen by a 1x1 convolution, filter each channel, narrow again; the narrow ends are added where they agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = nn.Conv2d(inputs, inner, 1, bias=False) if expansion > 1 else None
        self.bn1 = nn.BatchNorm2d(inner) if expansion > 1 else None
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.project = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """``[n, inputs, h, w]`` to ``[n, outputs, h / stride, w / stride]``."""
        out = x if self.expand is None else relu6(self.bn1(self.expand(x)))
        out = self.bn3(self.project(relu6(self.bn2(self.depthwise(out)))))
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """Seventeen inverted residuals; 28 pixels are divided by 8.

    Args:
        in_channels: of the images.
        num_classes: scores to return.
        width: scales all channels, 16 to 1280.

    Example:
        >>> import torch
        >>> MobileNetV2(width=0.25)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    # expansion, channels, blocks, stride of the first
    PLAN = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 1), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, in_channels: int = 1, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled(32, width)
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential()
        for expansion, wide, count, first_stride in self.PLAN:
            for stride in [first_stride] + [1] * (count - 1):
                self.blocks.append(InvertedResidual(channels, scaled(wide, width), stride, expansion))
                channels = scaled(wide, width)
        self.head = nn.Conv2d(channels, scaled(1280, width), 1, bias=False)
        self.bn2 = nn.BatchNorm2d(scaled(1280, width))
        self.fc = nn.Linear(scaled(1280, width), num_classes)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images to the scores of each class."""
        x = self.blocks(relu6(self.bn1(self.stem(images))))
        x = relu6(self.bn2(self.head(x)))
        return self.fc(x.mean(dim=(2, 3)))
