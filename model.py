"""The networks: three of our own, and all of timm's and torchvision's, each made by its name.

    python model.py                             our own: parameters, input and output shape
    python model.py 'resnet*' '*mobilenet*'     search all: parameters (1,000 classes), image size
    python model.py fastnet                     a network layer by layer

To bring a network of your own, write its class here and add it to NETWORKS: every command then
takes its name.  All it needs is the arguments `classes` and `channels`.

Importing this needs torch only: timm and torchvision, which take seconds, are imported when one of
their networks is asked for (lenslet/libraries.py), and never for our own.
"""

import copy
import fnmatch
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lenslet import libraries, stems, weights
from lenslet.cli import create_parser, parse
from lenslet.data.prepare import Prepare
from lenslet.errors import UserError, error_context, nearest, one_line, run_main


class TutorialCNN(nn.Sequential):
    """A CIFAR-10 tutorial's network: images [N, channels, 32, 32] -> logits [N, classes].

    The layers of Caffe's cifar10_quick (Jia et al. 2014, arXiv:1408.5093, after Krizhevsky's
    cuda-convnet) as the tutorials build them: 2×2 max-pools in place of overlapping max and average
    pools, and no activation functions, so that only the pools are not linear.
    """

    input_size = (32, 32)

    def __init__(self, classes: int, channels: int = 3):
        super().__init__(
            nn.Conv2d(channels, 32, 5, padding=2),  # [N, 32, 32, 32]
            nn.MaxPool2d(2),  # [N, 32, 16, 16]
            nn.Conv2d(32, 32, 5, padding=2),
            nn.MaxPool2d(2),  # [N, 32, 8, 8]
            nn.Conv2d(32, 64, 5, padding=2),
            nn.MaxPool2d(2),  # [N, 64, 4, 4]
            nn.Flatten(),  # [N, 1024]
            nn.Linear(1024, 64),
            nn.Linear(64, classes),  # [N, classes]
        )


class LeNet(nn.Module):
    """PyTorch's 60-minute tutorial network: images [N, channels, 32, 32] -> logits [N, classes].

    After LeNet-5 (LeCun, Bottou, Bengio, Haffner 1998, "Gradient-based learning applied to document
    recognition", Proc. IEEE 86) with the tutorial's deviations: ReLU, plain max-pools, a second
    convolution that sees all six maps, and linear outputs.  The layers have the tutorial's names,
    so its weights load here.
    """

    input_size = (32, 32)

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
        x = F.relu(self.fc1(x.flatten(1)))  # [N, 400] -> [N, 120]
        x = F.relu(self.fc2(x))  # [N, 84]
        return self.fc3(x)  # [N, classes]


ACTIVATIONS = {"relu": F.relu, "silu": F.silu}


class FastNet(nn.Module):
    """Our network for small images: images [N, channels, H, W] -> logits [N, classes].

    After airbench94 (Jordan 2024, arXiv:2404.00498), itself after Page's ResNet ("How to train your
    ResNet", 2018): a convolution that whitens 2×2 patches, three blocks of two convolutions that
    halve the image, identities as first weights where possible, batch norm without scale, a global
    max-pool, and logits divided by 9.  Deviations: the whitening's bias stays 0, where theirs
    learns for three epochs; SiLU in place of GELU, as accurate and faster on a CPU; batch norm's
    momentum 0.4 and usual epsilon; widths in the ratio 1:4:8 rather than 1:4:4; images of any size
    from 16×16.

    width is the number of channels of the first block; activation a key of ACTIVATIONS; patch 2,
    or 4 for photographs: the whitened patches' side, two steps apart.  Call whiten() once, before
    training.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        size: tuple[int, int] = (32, 32),
        width: int = 32,
        activation: str = "relu",
        patch: int = 2,
    ):
        super().__init__()
        self.input_size = tuple(max(16, side) for side in size)  # smaller ones are enlarged
        # The directions in which patches vary most, and their negatives: of 2×2 patches all there
        # are, of 4×4 patches half.
        filters = 2 * channels * 2 * patch
        self.whitening = nn.Conv2d(channels, filters, patch, stride=patch // 2)
        # whiten() computes it.  Nothing in it learns, so the first block, whose images are the
        # largest, needs no gradient of its input: a tenth more steps in the same time.
        self.whitening.requires_grad_(False)
        widths = [filters, width, 4 * width, 8 * width]
        self.activation = ACTIVATIONS[activation]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.blocks = nn.Sequential(*(FastBlock(*pair, self.activation) for pair in pairs))
        self.head = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.activation(self.whitening(images))  # [N, 8 channels, H - 1, W - 1]
        x = self.blocks(x)  # [N, 8 width, (H - 1) // 8, (W - 1) // 8]
        return self.head(x.amax((2, 3))) / 9  # [N, 8 width] -> [N, classes]

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Set the first layer so that its maps are uncorrelated, with variance 1.

        images float [N, channels, H, W] as the network is fed them.  The filters are eigenvectors
        of the patches' covariance over the roots of their eigenvalues, as in the papers above, and
        their negatives, because the activation cuts most of one half away.
        """
        sides, stride = self.whitening.kernel_size, self.whitening.stride
        patches = F.unfold(images.double(), sides, stride=stride)  # [N, values, patches of one]
        patches = patches.transpose(1, 2).flatten(0, 1)  # [patches, values of one]
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        most = self.whitening.out_channels // 2
        values, vectors = values[-most:], vectors[:, -most:]
        # 5e-4: directions with hardly any variance are noise, and must not be amplified.
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(-1, *self.whitening.weight.shape[1:])
        self.whitening.weight.copy_(torch.cat([filters, -filters]))
        self.whitening.bias.zero_()


class FastBlock(nn.Module):
    """One stage of fastnet: [N, inputs, H, W] -> [N, outputs, H // 2, W // 2]."""

    def __init__(self, inputs: int, outputs: int, activation):
        super().__init__()
        self.activation = activation
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs, momentum=0.4)
        self.norm2 = nn.BatchNorm2d(outputs, momentum=0.4)
        for conv in (self.conv1, self.conv2):  # at first, the first maps are copies of the inputs
            nn.init.dirac_(conv.weight[: conv.in_channels])
        for norm in (self.norm1, self.norm2):
            norm.weight.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)  # [N, outputs, H // 2, W // 2]
        x = self.activation(self.norm1(x))
        return self.activation(self.norm2(self.conv2(x)))


# What train.py makes where no weights say otherwise: the older ones' headers lack it.
NEWEST = {"fastnet": {"activation": "silu"}}
NETWORKS = {"fastnet": FastNet, "tutorial_cnn": TutorialCNN, "lenet": LeNet}


def create_model(
    name: str, classes: int, channels: int = 3, size: int | tuple[int, int] = 32, **arguments
) -> nn.Module:
    """A new network with random weights: images [N, channels, *input_size] -> logits [N, classes].

    name is one of NETWORKS, any timm name, or torchvision/ and a torchvision name; size is the side
    or the (height, width) of the images; arguments are those of our own networks (width).  The
    module has two plain attributes:

        input_size  (height, width) of what it must be fed: size, or the smallest it accepts above
                    that (its native size if it accepts no other)
        stem_note   the strides that were changed for small images, '' for the original stem

    The same arguments always give the same structure; parameter names and shapes are those of the
    library's own network.  Errors: UserError for an unknown name or a network that takes no size.
    """
    name = find_network(name)
    size = (size, size) if isinstance(size, int) else tuple(size)
    network = _construct(name, classes, channels, size, **arguments)
    if name not in NETWORKS:
        stems.fit_stem(network, name, channels, size, network_defaults(name)["image_size"])
        return network
    network.stem_note = ""
    if not hasattr(network, "input_size"):
        network.input_size = size
        if error := stems.forward_error(copy.deepcopy(network).to("meta"), channels, size):
            sides = "×".join(map(str, size))
            reason = f"cannot take images of {sides} ({error}); give its class an input_size"
            raise UserError(f"model {name} {reason}")
    return network


def _construct(name: str, classes: int, channels: int = 3, size=(32, 32), **arguments) -> nn.Module:
    """A network before its stem is fitted to a size, which changes none of its tensors."""
    if name not in NETWORKS:
        return libraries.construct(name, classes, channels)
    if name == "fastnet":  # takes any size
        arguments["size"] = size
    return NETWORKS[name](classes, channels, **arguments)


def load_model(path: str | Path) -> tuple[nn.Module, Prepare, dict]:
    """A trained network in evaluation mode, what prepares images for it, and the file's header.

        model, prepare, header = load_model("runs/latest")
        logits = model(prepare(images))  # images: uint8 [N, C, H, W]

    path is a weights file, or a run folder with its model.safetensors.  The order of the logits is
    header["classes"]; weights.read_header() describes the rest.  No code from the file is run.

    Errors: UserError naming a file that is missing, damaged or not one of ours.
    """
    file = Path(path, "model.safetensors") if Path(path).is_dir() else Path(path)
    with error_context(str(file)):
        try:
            tensors, header = weights.read(file)
        except weights.ForeignError as error:
            hint = "to start a training from it: `train.py --pretrained FILE`"
            raise UserError(f"{error}; {hint}") from error
        try:
            name, arguments = find_network(header["model"]), header["model_args"]
            weights.check_shapes(tensors, partial(_construct, name, **arguments))
            model = create_model(name, **arguments)
            model.load_state_dict(tensors)
            fed = header.get("input_size", model.input_size)
            prepare = Prepare(header["mean"], header["std"], fed)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = one_line(error)
            raise UserError(f"the weights do not fit their header ({reason})") from error
    # Convolutions on a CPU are faster with channels last, and prepare() returns images so.
    return model.eval().to(memory_format=torch.channels_last), prepare, header


def network_defaults(name: str) -> dict:
    """How images are prepared for a network, where neither the data nor loaded weights say it.

    image_size     side in pixels; 32 for our own networks
    mean, std      three floats each, 0..1 scale
    crop           share of the resized image's side that the centre crop keeps, 0..1
    """
    name = find_network(name)
    usual = {  # on ImageNet
        "image_size": 32 if name in NETWORKS else 224,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "crop": 0.875,
    }
    if name in NETWORKS or name.startswith("torchvision/"):  # timm has no configuration of these
        return usual
    return usual | libraries.defaults(name)


def head_of(network: nn.Module) -> list[str]:
    """The names of the layers that make the logits: what has to be new for other classes."""
    if hasattr(network, "get_classifier"):  # timm's; distilled networks have two
        found = network.get_classifier()
        found = list(found) if isinstance(found, tuple | list | nn.ModuleList) else [found]
    else:
        found = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1:]
    return [name for name, m in network.named_modules() if any(m is head for head in found)]


def add_dropout(network: nn.Module, share: float) -> None:
    """Dropout before the last layer, in training only (Srivastava et al. 2014, JMLR 15).

    share (0..1) of the values is zeroed.  It is a hook and not a layer, so that the parameters keep
    their names and the weights load without it.
    """

    def drop(layer, inputs):
        return F.dropout(inputs[0], share, layer.training), *inputs[1:]

    for name in head_of(network) if share else ():
        network.get_submodule(name).register_forward_pre_hook(drop)


def find_network(name: str) -> str:
    """A network's name as it is stored, see libraries.find().  Errors: UserError for no network."""
    return libraries.find(name, NETWORKS)


def find_models(patterns: list[str]) -> list[str]:
    """The networks whose names match a shell pattern, sorted; torchvision/ may be left out.

    Errors: UserError for a pattern that matches nothing.
    """
    known, found = [*NETWORKS, *libraries.names()], set()
    for pattern in patterns:
        matching = fnmatch.filter(known, pattern) + fnmatch.filter(known, f"torchvision/{pattern}")
        if not matching:
            hint = nearest(pattern.strip("*"), known)
            raise UserError(f"no network's name matches {pattern}{hint}")
        found.update(matching)
    return sorted(found)


def count_parameters(name: str, classes: int) -> str:
    """The number of a network's parameters, '-' where only real tensors could tell."""
    try:
        with torch.device("meta"):  # shapes without values take no memory and hardly any time
            network = _construct(name, classes)
    except RuntimeError:  # torchvision's RegNets copy values while they are made
        return "-"
    return f"{sum(p.numel() for p in network.parameters()):,}"


def main(argv=None) -> None:
    parser = create_parser(__doc__)
    parser.add_argument("pattern", nargs="*", help="a name, or patterns in quotes: 'resnet*'")
    patterns = parse(parser, argv).pattern
    if len(patterns) == 1 and not set("*?[") & set(patterns[0]):
        name = find_network(patterns[0])
        network = create_model(name, classes=10, size=network_defaults(name)["image_size"])
        images = torch.zeros(1, 3, *network.input_size)
        print(libraries.layer_table(network, images))
        print(f"{name}: {count_parameters(name, 10)} parameters for 10 classes")
        return
    for name in find_models(patterns) if patterns else NETWORKS:
        count = count_parameters(name, classes=1000 if patterns else 10)  # 1000: ImageNet's
        if patterns:
            side = network_defaults(name)["image_size"]
            print(f"{name:44}{count:>14} parameters   {side:>3}×{side}")
        else:
            network = create_model(name, classes=10)
            images = torch.zeros(1, 3, *network.input_size)
            shapes = f"{list(images.shape)} -> {list(network(images).shape)}"
            print(f"{name:14}{count:>12} parameters   {shapes}")
    for usual, name in libraries.USUAL.items() if not patterns else ():
        print(f"{usual:28} is taken for {name}")


if __name__ == "__main__":
    sys.exit(run_main(main))
