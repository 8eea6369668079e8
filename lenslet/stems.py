"""Networks made for photographs, fitted to small images by smaller strides in their stem."""

import copy

import torch
from torch import Tensor, nn

from lenslet.errors import UserError


@torch.no_grad()
def fit_stem(
    network: nn.Module, name: str, channels: int, size: tuple[int, int], native: int
) -> None:
    """Set input_size and stem_note, after reducing the strides of the stem for small images.

    A network for photographs reduces them fourfold before its first blocks, which leaves 8×8 of a
    32×32 image.  So for images up to 40 px a factor of 4 is taken out of the strides, up to 64 px a
    factor of 2.  The shorter side decides: it is the first to be reduced to nothing.  If the
    network cannot take the result, larger inputs are tried, up to its native size.

    size (height, width) and native (side) in pixels.  Parameters keep their names and shapes.
    Errors: UserError where the network takes no size.
    """
    # Trials run on copies without data: they compute nothing and leave the original untouched.
    meta = copy.deepcopy(network).eval().to("meta")
    layers = _strided_layers(meta, channels, native)
    first = [stride for reduction, stride in layers.values() if reduction == 1]
    # A stride above 4, or a single strided layer, is the patch embedding of a ViT, Swin or Mixer;
    # without a strided layer at the input something unknown reduces the image.  Such stems stay,
    # and small images are enlarged to the native size.
    fixed = len(layers) < 2 or not first or max(first) > 4
    steps = [] if fixed else [*range(8, 65, 8), *range(96, native, 32)]
    sizes = [(max(size[0], side), max(size[1], side)) for side in steps if side > min(size)]
    if not fixed or min(size) > 64:
        sizes.insert(0, size)
    for height, width in [*sizes, (native, native)]:
        side = min(height, width)
        factor = 1 if fixed or side > 64 else 2 if side > 40 else 4
        changes = {
            layer: (stride, max(1, stride * reduction // factor))
            for layer, (reduction, stride) in layers.items()
            if reduction < factor
        }
        trial = copy.deepcopy(meta)
        _set_strides(trial, changes)
        error = forward_error(trial, channels, (height, width))
        if factor > 1:  # position embeddings of a fixed size may broadcast to 1×1, but not to 2×2
            error = error or forward_error(trial, channels, (2 * height, 2 * width))
        if not error:
            break
    else:
        raise UserError(f"{name} takes no image size up to {native}×{native}: {error}")
    _set_strides(network, changes)
    network.input_size = (height, width)
    network.stem_note = ""
    if changes:
        strides = ", ".join(f"{layer} {old} to {new}" for layer, (old, new) in changes.items())
        network.stem_note = f"strides changed for images of {height}×{width}: {strides}"


def _strided_layers(meta: nn.Module, channels: int, native: int) -> dict[str, tuple[int, int]]:
    """The convolutions and pools with a stride: {name: (reduction of the image so far, stride)}.

    Found by running the network, so neither the order of registration nor the kind of block
    matters, and parallel branches, which see the image at the same size, are treated alike.
    """
    found = {}
    network = copy.deepcopy(meta)
    names = {layer: name for name, layer in network.named_modules()}

    def note(layer, inputs):
        stride = max(layer.stride) if isinstance(layer.stride, tuple) else layer.stride
        if stride > 1 and inputs[0].dim() == 4:  # [N, C, H, W]
            found.setdefault(names[layer], (round(native / inputs[0].shape[-1]), stride))

    for layer in names:
        if hasattr(layer, "stride") and not list(layer.children()):
            layer.register_forward_pre_hook(note)
    forward_error(network, channels, (native, native))
    return found


def forward_error(meta: nn.Module, channels: int, size: tuple[int, int]) -> str:
    """Why a network on the meta device cannot take images of a size (height, width), in one line;
    '' if it can.
    """

    def check(layer, inputs, output):
        # torch 2.11 lets a convolution on the meta device return 0×8 where a real one fails.
        if isinstance(output, Tensor) and output.numel() == 0:
            raise ValueError("nothing is left of the image")

    for layer in meta.modules():
        layer.register_forward_hook(check)
    try:
        meta(torch.empty(1, channels, *size, device="meta"))
    except Exception as error:  # each network fails in its own way: assertions, shapes, values
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _set_strides(network: nn.Module, changes: dict[str, tuple[int, int]]) -> None:
    """Give each named layer its new stride, in place; a pool left with none becomes an identity.

    Neither touches a parameter or its name: pools, timm's blur pools among them, have none.
    """
    for name, (_, stride) in changes.items():
        layer = network.get_submodule(name)
        if stride == 1 and not layer.state_dict():
            network.set_submodule(name, nn.Identity())
        else:
            layer.stride = (stride, stride)
