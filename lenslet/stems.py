"""Networks made for photographs, fitted to small images by smaller strides in their stem."""

import copy

import torch
from torch import Tensor, nn

from lenslet.errors import UserError


@torch.no_grad()
def fit_stem(
    network: nn.Module, name: str, channels: int, size: tuple[int, int], native: int
) -> None:
    """Set input_size and stem_note, after reducing the strides of the stem for small pictures.

    A network for photographs shrinks them fourfold before it looks closely, which leaves 8×8 of a
    32×32 picture.  So at up to 40 px the first factor of 4 is taken out, at up to 64 px the first
    factor of 2.  The shorter side decides: it is the one that shrinks to nothing.  Where the
    network cannot take the result, larger pictures are tried, up to its native size.
    """
    # Trials run on copies without data: they cost no arithmetic and leave the original whole.
    ghost = copy.deepcopy(network).eval().to("meta")
    layers = _strided(ghost, channels, native)
    entrance = [stride for shrunk, stride in layers.values() if shrunk == 1]
    # A stride above 4, or a single strided layer, is the patch embedding of a ViT, Swin or Mixer;
    # with none at the entrance something unknown shrinks the picture.  Such stems stay, and small
    # pictures are enlarged to the native size.
    rigid = len(layers) < 2 or not entrance or max(entrance) > 4
    steps = [] if rigid else [*range(8, 65, 8), *range(96, native, 32)]
    sizes = [(max(size[0], side), max(size[1], side)) for side in steps if side > min(size)]
    if not rigid or min(size) > 64:
        sizes.insert(0, size)
    for height, width in [*sizes, (native, native)]:
        side = min(height, width)
        cut = 1 if rigid or side > 64 else 2 if side > 40 else 4
        changes = {
            layer: (stride, max(1, stride * shrunk // cut))
            for layer, (shrunk, stride) in layers.items()
            if shrunk < cut
        }
        trial = copy.deepcopy(ghost)
        _restride(trial, changes)
        refusal = _refusal(trial, channels, height, width)
        if cut > 1:  # position embeddings of a fixed size may take 1×1 by broadcasting, not 2×2
            refusal = refusal or _refusal(trial, channels, 2 * height, 2 * width)
        if not refusal:
            break
    else:
        raise UserError(f"{name} takes no picture size up to {native}×{native}: {refusal}")
    _restride(network, changes)
    network.input_size = (height, width)
    network.stem_note = ""
    if changes:
        strides = ", ".join(f"{layer} {old} to {new}" for layer, (old, new) in changes.items())
        network.stem_note = f"Strides changed for pictures of {height}×{width}: {strides}."


def _strided(ghost: nn.Module, channels: int, native: int) -> dict[str, tuple[int, int]]:
    """The convolutions and pools with a stride: name -> (how far the picture had shrunk, stride).

    Found by running the network, so neither the order of registration nor the kind of block
    matters, and parallel branches, which take the picture at one size, are treated alike.
    """
    found = {}
    network = copy.deepcopy(ghost)
    names = {layer: name for name, layer in network.named_modules()}

    def note(layer, inputs):
        stride = max(layer.stride) if isinstance(layer.stride, tuple) else layer.stride
        if stride > 1 and inputs[0].dim() == 4:  # [N, C, H, W]
            found.setdefault(names[layer], (round(native / inputs[0].shape[-1]), stride))

    for layer in names:
        if hasattr(layer, "stride") and not list(layer.children()):
            layer.register_forward_pre_hook(note)
    _refusal(network, channels, native, native)
    return found


def _refusal(ghost: nn.Module, channels: int, height: int, width: int) -> str:
    """Why a network on the meta device cannot take such pictures, in one line; '' if it can."""

    def check(layer, inputs, output):
        # torch 2.11 lets a convolution on the meta device return 0×8 where a real one fails.
        if isinstance(output, Tensor) and output.numel() == 0:
            raise ValueError("nothing is left of the picture")

    for layer in ghost.modules():
        layer.register_forward_hook(check)
    try:
        ghost(torch.empty(1, channels, height, width, device="meta"))
    except Exception as error:  # each network refuses in its own way: assertions, shapes, values
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _restride(network: nn.Module, changes: dict[str, tuple[int, int]]) -> None:
    """Give each named layer its new stride, in place; a pool left with none becomes an identity.

    Neither touches a parameter or its name: pools, timm's blur pools among them, have none.
    """
    for name, (_, stride) in changes.items():
        layer = network.get_submodule(name)
        if stride == 1 and not layer.state_dict():
            network.set_submodule(name, nn.Identity())
        else:
            layer.stride = (stride, stride)
