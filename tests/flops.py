"""Multiply-adds of one example in the forward pass, by hand: what plans are compared with.

Products with the zeros that a convolution adds around an image are left out, as XLA does.
"""


def places(side: int, size: int, stride: int) -> int:
    """Pixels under a kernel of odd `size`, padded by its half, on one axis of even `side`."""
    half = size // 2
    positions = range(0, side, stride)
    return sum(0 <= p + k < side for p in positions for k in range(-half, half + 1))


def resnet50(side: int) -> dict[str, int]:
    """By layer type; ``stem`` is the one without a gradient by its input."""
    found = {"stem": 3 * 64 * places(side, 7, 2) ** 2, "1×1": 0, "3×3": 0, "shortcut": 0}
    side, inputs = side // 4, 64
    for width, layers, first in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for layer in range(layers):
            stride = first if layer == 0 else 1
            after = side // stride
            found["1×1"] += inputs * width * side**2 + width * 4 * width * after**2
            found["3×3"] += width**2 * places(side, 3, stride) ** 2
            if layer == 0:
                found["shortcut"] += inputs * 4 * width * after**2
            inputs, side = 4 * width, after
    return found


def transformer(layers: int, width: int, tokens: int) -> dict[str, int]:
    """Blocks whose perceptron is four times as wide, with attention to all tokens."""
    return {
        "attention's and perceptron's weights": layers * tokens * (4 + 8) * width**2,
        "attention": layers * 2 * tokens**2 * width,
    }


def head(inputs: int, hidden: int, width: int) -> int:
    """One side of the dot critic: a hidden layer, and a shortcut around it."""
    return inputs * hidden + hidden * width + inputs * width
