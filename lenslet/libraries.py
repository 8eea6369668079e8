"""timm's and torchvision's networks, by their names and by those that people use for them.

Both libraries take seconds to import, so that happens when one of their networks is asked for.
"""

import functools

import torch
from torch import nn

from lenslet.errors import UserError, nearest

# What tutorials and papers call a network that its library calls otherwise.
USUAL = {
    "adv_efficientnet_b2": "tf_efficientnet_b2.ap_in1k",
    "mobilenetv3": "mobilenetv3_large_100",
    "se_resnext50": "seresnext50_32x4d",
    "se_resnext50_32x4d": "seresnext50_32x4d",
    "shufflenetv2": "torchvision/shufflenet_v2_x1_0",
}


@functools.cache
def names() -> list[str]:
    """Every network of timm's, and torchvision's for classification as --model takes them."""
    import timm
    from torchvision import models

    return [*timm.list_models(), *(f"torchvision/{name}" for name in models.list_models(models))]


def find(name: str, own) -> str:
    """The present name of a network: one of own, timm's, or torchvision/ and torchvision's.

    Upper case, hyphens, timm's old names and the USUAL ones are understood.
    Errors: UserError for an unknown name, with the nearest.
    """
    if name in own:
        return name
    if ":" in name:  # hf-hub:, hf_hub: and local-dir: let timm fetch whatever the name says
        raise UserError(f"model {name}: give a plain timm name; names on a hub are not looked up")
    plain = name.lower().replace("-", "_")
    for word in dict.fromkeys((name, plain, plain.replace("_", ""))):
        if found := _find(word, own):
            return found
    known = [*own, *names()]
    hint = f" (did you mean torchvision/{plain}?)" if f"torchvision/{plain}" in known else ""
    raise UserError(
        f"unknown model {name}{hint or _nearest(plain.partition('.')[0], known)}; "
        "`python model.py` lists our own, `python model.py 'resnet*'` searches timm's and "
        "torchvision's"
    )


def _find(name: str, own) -> str | None:
    name = USUAL.get(name, name)
    if name in own or (name.startswith("torchvision/") and name in names()):
        return name
    import timm

    # timm makes networks by their old names too, but has no configuration or weights for those.
    name = timm.models.get_deprecated_models().get(name) or name
    # What follows a dot names pretrained weights, whose configuration is then used.
    known = timm.is_model(name) and ("." not in name or timm.is_model_pretrained(name))
    return name if known else None


def _nearest(word: str, known: list[str]) -> str:
    """A hint at a network of the same family, if there is one: the shortest name that begins so."""
    letters = word.replace("_", "")
    family = [name for name in known if name.replace("_", "").startswith(letters)]
    return f" (did you mean {min(family, key=len)}?)" if family else nearest(word, known)


def defaults(name: str) -> dict:
    """What timm's configuration says of a network: see model.network_defaults(); {} if nothing."""
    import timm

    if not (config := timm.get_pretrained_cfg(name)):
        return {}
    found = {"image_size": config.input_size[-1], "crop": config.crop_pct}
    return found | {"mean": list(config.mean), "std": list(config.std)}


def construct(name: str, classes: int, channels: int) -> nn.Module:
    """A network as its library makes it, with the stem it was published with."""
    if not name.startswith("torchvision/"):
        import timm

        return timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
    from torchvision import models

    name, extra = name.removeprefix("torchvision/"), {}
    if name in ("googlenet", "inception_v3"):  # without auxiliary outputs, and without the warning
        extra = {"aux_logits": False, "init_weights": True}
    network = models.get_model(name, weights=None, num_classes=classes, **extra)
    # torchvision takes no number of channels: its first convolution is changed.
    first = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    if channels != first.in_channels:
        first.in_channels = channels
        weight = first.weight.new_empty(first.out_channels, channels, *first.kernel_size)
        first.weight = nn.Parameter(weight)
        first.reset_parameters()
    return network


def layer_table(network: nn.Module, images: torch.Tensor) -> str:
    """A network layer by layer: name, kind, shape of the output, parameters; a line each."""
    rows = []

    def note(name, kind, count):
        def hook(layer, inputs, output):
            shape = list(output.shape) if isinstance(output, torch.Tensor) else ""
            rows.append((name, kind, str(shape), f"{count:,}" if count else ""))

        return hook

    for name, layer in network.named_modules():
        if not list(layer.children()):
            count = sum(p.numel() for p in layer.parameters())
            layer.register_forward_hook(note(name, type(layer).__name__, count))
    with torch.no_grad():
        network.eval()(images)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False))
        + row[3].rjust(widths[3] + 2)
        for row in rows
    )
