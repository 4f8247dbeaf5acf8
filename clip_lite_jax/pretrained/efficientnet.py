"""Names that other projects give to the weights of EfficientNet-Lite0."""

from functools import partial

from clip_lite_jax.models.efficientnet import STAGES, EfficientNetLite
from clip_lite_jax.pretrained.names import CONVOLUTION, Naming, linear_links, norm_links

_convolution = partial(linear_links, layout=CONVOLUTION, bias=False)
_norm = partial(norm_links, running=True)


def efficientnet_namings(module: EfficientNetLite) -> tuple[Naming, ...]:
    """Of the PyPI package efficientnet-lite-pytorch, after EfficientNet-PyTorch."""
    links = [*_convolution("conv_stem", "_conv_stem"), *_norm("bn0", "_bn0")]
    expansions = [stage[3] for stage in STAGES for _ in range(stage[0])]
    for number, expansion in enumerate(expansions):
        ours, theirs = f"blocks_{number}", f"_blocks.{number}"
        if expansion > 1:
            links += _convolution(f"{ours}/expand_conv", f"{theirs}._expand_conv")
            links += _norm(f"{ours}/bn0", f"{theirs}._bn0")
        links += _convolution(f"{ours}/depthwise_conv", f"{theirs}._depthwise_conv")
        links += _norm(f"{ours}/bn1", f"{theirs}._bn1")
        links += _convolution(f"{ours}/project_conv", f"{theirs}._project_conv")
        links += _norm(f"{ours}/bn2", f"{theirs}._bn2")
    links += [*_convolution("conv_head", "_conv_head"), *_norm("bn1", "_bn1")]
    unused = r"^_fc\.|\.num_batches_tracked$"
    return (Naming("efficientnet-lite-pytorch", tuple(links), unused),)
