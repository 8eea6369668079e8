"""The networks, and create_model() which makes one by name, fitted to the size of the pictures.

    python model.py     # each of our own networks: parameters and output shape

Importing this needs torch only.  timm and torchvision take seconds to import, so they are imported
when one of their networks is asked for, and never for our own.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lenslet.data.prepare import Prepare
from lenslet.errors import UserError, nearest
from lenslet.stems import fit_stem
from lenslet.weights import read_weights_file


def load_model(path: str | Path) -> tuple[nn.Module, Prepare, dict]:
    """The trained network in evaluation mode, what prepares pictures for it, and the header.

    Errors: UserError, see load().
    """
    tensors, header = read_weights_file(path)
    try:
        model = create_model(header["model"], **header["model_args"])
        model.load_state_dict(tensors)
        prepare = Prepare(header["mean"], header["std"], model.input_size)
    except (RuntimeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: does not fit its header ({reason})") from error
    return model.eval().to(memory_format=torch.channels_last), prepare, header


class TutorialCNN(nn.Sequential):
    """A CIFAR-10 tutorial's network: images [N, channels, 32, 32] -> logits [N, classes].

    The layers of Caffe's cifar10_quick (Jia et al. 2014, arXiv:1408.5093, after Krizhevsky's
    cuda-convnet) as the tutorials build them: 2×2 max-pools in place of overlapping max and average
    pools, and no activation anywhere, so that the pools are all that is not linear.  The numbers
    of input channels and of classes are arguments.
    """

    input_size = (32, 32)
    stem_note = ""

    def __init__(self, classes: int, channels: int = 3):
        super().__init__(
            nn.Conv2d(channels, 32, 5, padding=2),
            nn.MaxPool2d(2),  # [N, 32, 16, 16]
            nn.Conv2d(32, 32, 5, padding=2),
            nn.MaxPool2d(2),  # [N, 32, 8, 8]
            nn.Conv2d(32, 64, 5, padding=2),
            nn.MaxPool2d(2),  # [N, 64, 4, 4]
            nn.Flatten(),
            nn.Linear(1024, 64),
            nn.Linear(64, classes),
        )


class LeNet(nn.Module):
    """PyTorch's 60-minute tutorial network: images [N, channels, 32, 32] -> logits [N, classes].

    After LeNet-5 (LeCun, Bottou, Bengio, Haffner 1998, "Gradient-based learning applied to document
    recognition", Proc. IEEE 86) with the tutorial's deviations: ReLU, plain max-pools, a second
    convolution that sees all six maps, and linear outputs.  Layer names are the tutorial's, so
    its weights fit.  The numbers of input channels and of classes are arguments.
    """

    input_size = (32, 32)
    stem_note = ""

    def __init__(self, classes: int, channels: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)  # [N, 6, 14, 14]
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # [N, 16, 5, 5]
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


class FastNet(nn.Module):
    """Our network for small pictures: images [N, channels, H, W] -> logits [N, classes].

    After airbench94 (Jordan 2024, arXiv:2404.00498), which is after Page's ResNet ("How to train
    your ResNet", 2018): a convolution that whitens 2×2 patches, three blocks of two convolutions
    that halve the picture, identities as first weights where that is possible, batch norm without
    scale, the largest activation of each map, and logits divided by 9.  Deviations: ReLU in place
    of GELU, as accurate here and a quarter faster on a CPU; batch norm's momentum 0.4 and usual
    epsilon; widths in the ratio 1:4:8 rather than 1:4:4; any size of picture from 16×16 on.

    width is the number of channels of the first block.  whiten() is called once, before training.
    """

    stem_note = ""

    def __init__(
        self, classes: int, channels: int = 3, size: tuple[int, int] = (32, 32), width: int = 32
    ):
        super().__init__()
        self.input_size = tuple(max(16, side) for side in size)
        filters = 2 * channels * 2 * 2
        self.whitening = nn.Conv2d(channels, filters, 2)
        self.whitening.weight.requires_grad = False
        widths = [filters, width, 4 * width, 8 * width]
        self.blocks = nn.Sequential(*map(FastBlock, widths[:-1], widths[1:]))
        self.head = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.whitening(images))  # [N, 8 channels, H - 1, W - 1]
        x = self.blocks(x)  # [N, 8 width, H // 8 - 1, W // 8 - 1] or so
        return self.head(x.amax((2, 3))) / 9

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Have the first layer see patches without correlations, and their negatives.

        images [N, channels, H, W] as the network is fed them.  Eigenvectors of the patches'
        covariance over the roots of their eigenvalues, as in the papers above.
        """
        patches = (
            F.unfold(images, 2).transpose(1, 2).flatten(0, 1).double()
        )  # [patches, 4 channels]
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(-1, *self.whitening.weight.shape[1:])
        self.whitening.weight.copy_(torch.cat([filters, -filters]))
        self.whitening.bias.zero_()


class FastBlock(nn.Module):
    """[N, inside, H, W] -> [N, outside, H // 2, W // 2], all at least 0."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside, momentum=0.4)
        self.norm2 = nn.BatchNorm2d(outside, momentum=0.4)
        for conv in (self.conv1, self.conv2):
            nn.init.dirac_(conv.weight[: conv.in_channels])
        for norm in (self.norm1, self.norm2):
            norm.weight.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.relu(self.norm2(self.conv2(x)))


NETWORKS = {"fastnet": FastNet, "tutorial_cnn": TutorialCNN, "lenet": LeNet}


def create_model(
    name: str, classes: int, channels: int = 3, size: tuple[int, int] = (32, 32), **arguments
) -> nn.Module:
    """A new network with random weights: images [N, channels, *input_size] -> logits [N, classes].

    name is one of NETWORKS, any timm name, or torchvision/ and a torchvision name; size is the
    (height, width) of the pictures; arguments are those of our own networks (width).  The module
    carries two plain attributes:

        input_size  (height, width) it must be fed: size, or the smallest it accepts above that
                    (its native size where it accepts no other)
        stem_note   the strides that were changed for small pictures, '' for the original stem

    The same arguments always give the same structure; parameter names and shapes are those of the
    library's own network.  UserError: an unknown name, or a network that accepts no size.
    """
    library = _library(name)
    if library == "own":
        if name == "fastnet":
            arguments["size"] = size
        return NETWORKS[name](classes, channels, **arguments)
    if library == "timm":
        import timm

        network = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
    else:
        network = _torchvision(name.removeprefix("torchvision/"), classes, channels)
    fit_stem(network, name, channels, size, network_defaults(name)["image_size"])
    return network


def head_of(network: nn.Module) -> list[str]:
    """The names of the layers that make the logits: what is new for other classes."""
    if hasattr(network, "get_classifier"):  # timm's, where distilled ones have two
        found = network.get_classifier()
        found = list(found) if isinstance(found, tuple | list | nn.ModuleList) else [found]
    else:
        found = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1:]
    return [name for name, m in network.named_modules() if any(m is head for head in found)]


def add_dropout(network: nn.Module, share: float) -> None:
    """Zero that share of what the last layer is fed while training (Srivastava et al. 2014, JMLR).

    A hook and no layer, so that the parameters keep their names.
    """

    def drop(layer, inputs):
        return F.dropout(inputs[0], share, layer.training), *inputs[1:]

    for name in head_of(network) if share else ():
        network.get_submodule(name).register_forward_pre_hook(drop)


def network_defaults(name: str) -> dict:
    """How photographs are prepared for a network, where neither data nor weights say it.

    image_size     side in pixels; 32 for our own networks
    mean, std      three floats each, 0..1 scale
    crop           the share of the resized picture's side that the centre crop keeps

    timm's networks have a configuration of their own; the others take what is usual on ImageNet.
    """
    library = _library(name)
    defaults = {
        "image_size": 32 if library == "own" else 224,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "crop": 0.875,
    }
    if library == "timm":
        import timm

        if config := timm.get_pretrained_cfg(name):
            defaults = {
                "image_size": config.input_size[-1],
                "mean": list(config.mean),
                "std": list(config.std),
                "crop": config.crop_pct,
            }
    return defaults


def _library(name: str) -> str:
    """'own', 'timm' or 'torchvision': where a network comes from; UserError if it is unknown."""
    if name in NETWORKS:
        return "own"
    if ":" in name:  # hf-hub:, hf_hub: and local-dir: let timm fetch whatever the name says
        raise UserError(f"model {name}: give a plain timm name; no hub is looked up")
    import torchvision

    others = ["torchvision/" + x for x in torchvision.models.list_models(torchvision.models)]
    if name in others:
        return "torchvision"
    import timm

    # What follows a dot names pretrained weights, whose configuration is then used.
    if timm.is_model(name) and ("." not in name or timm.is_model_pretrained(name)):
        return "timm"
    if f"torchvision/{name}" in others:
        hint = f" (did you mean torchvision/{name}?)"
    else:
        hint = nearest(name.partition(".")[0], [*NETWORKS, *timm.list_models(), *others])
    raise UserError(
        f"unknown model {name}{hint}; `python model.py` lists our own, timm.list_models() timm's"
    )


def _torchvision(name: str, classes: int, channels: int) -> nn.Module:
    """A torchvision network; with other than 3 channels its first convolution is made anew."""
    import torchvision

    extra = {}
    if name in ("googlenet", "inception_v3"):  # without auxiliary outputs, and without the warning
        extra = {"aux_logits": False, "init_weights": True}
    network = torchvision.models.get_model(name, weights=None, num_classes=classes, **extra)
    first = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    if channels != first.in_channels:
        first.in_channels = channels
        weight = first.weight.new_empty(first.out_channels, channels, *first.kernel_size)
        first.weight = nn.Parameter(weight)
        first.reset_parameters()
    return network


if __name__ == "__main__":
    for name in NETWORKS:
        network = create_model(name, classes=10)
        parameters = sum(p.numel() for p in network.parameters())
        shape = list(network(torch.zeros(1, 3, 32, 32)).shape)
        print(f"{name:14}{parameters:>12,} parameters   [1, 3, 32, 32] -> {shape}")
