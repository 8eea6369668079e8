"""Networks made for photographs take small images, and their weights stay those of the original."""

import math

import pytest
import timm
import torch
from torch import nn

from lenslet.errors import UserError
from lenslet.stems import fit_stem
from model import create_model


def shapes(network) -> dict:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "legacy_xception", "resnetblur50"])
def test_weights_fit_the_original(name):
    """A changed stem changes no parameter: the weights load strictly into timm's own network."""
    ours = create_model(name, 10)
    original = timm.create_model(name, num_classes=10)
    assert ours.stem_note
    assert shapes(ours) == shapes(original)
    original.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["resnet18", "resnetblur50", "torchvision/shufflenet_v2_x1_0"])
@pytest.mark.parametrize(("side", "cut"), [(32, 4), (48, 2), (72, 1)])
def test_stem_by_size(name, side, cut):
    """Of the 32-fold reduction a factor 4 goes up to 40 px, 2 up to 64 px, and none above."""
    network = create_model(name, 10, size=(side, side)).eval()
    sides = []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, maps: sides.append(maps.shape[-1]))
    network(torch.rand(1, 3, side, side))
    assert sides[-1] == math.ceil(side * cut / 32)
    assert bool(network.stem_note) == (cut > 1)


def test_resnet18_small():
    """At 32 px ResNet-18 ends in 4×4 maps, both entrance layers are changed, and it says so."""
    network = create_model("resnet18", 10).eval()
    assert network.forward_features(torch.rand(1, 3, 32, 32)).shape == (1, 512, 4, 4)
    assert network.stem_note == (
        "strides changed for images of 32×32: conv1 2 to 1, maxpool 2 to 1"
    )


def test_resnet18_native():
    """At 224 px ResNet-18 is timm's own: the same outputs from the same weights."""
    ours = create_model("resnet18", 10, size=(224, 224)).eval()
    original = timm.create_model("resnet18", num_classes=10).eval()
    original.load_state_dict(ours.state_dict())
    images = torch.rand(1, 3, 224, 224)
    assert (ours.input_size, ours.stem_note) == ((224, 224), "")
    assert torch.equal(ours(images), original(images))


@pytest.mark.parametrize(
    ("name", "size", "fed"),
    [
        ("convnext_atto", (8, 8), (16, 16)),
        ("convnext_atto", (28, 28), (28, 28)),
        ("convnext_atto", (8, 40), (16, 40)),
        ("resnet18", (20, 60), (20, 60)),
        ("vit_tiny_patch16_224", (32, 32), (224, 224)),
        ("vit_tiny_patch16_224", (100, 300), (224, 224)),
        ("test_vit3", (32, 32), (160, 160)),
        ("pit_ti_224", (8, 8), (224, 224)),
        ("volo_d1_224", (8, 8), (224, 224)),
        ("tresnet_m", (32, 32), (224, 224)),
    ],
)
def test_input_size(name, size, fed):
    """An image is fed as it is, or enlarged to the smallest size that keeps the network whole."""
    network = create_model(name, 10, size=size).eval()
    assert network.input_size == fed
    with torch.no_grad():
        assert network(torch.rand(1, 3, *fed)).shape == (1, 10)


def test_same_arguments_same_structure():
    """What a weights file relies on: made twice, a network is the same; and it is untouched."""
    first, second = (create_model("legacy_xception", 10, channels=1) for _ in range(2))
    assert str(first) == str(second)
    assert first.stem_note == second.stem_note
    assert all(t.device.type == "cpu" for t in first.state_dict().values())
    assert first.bn1.num_batches_tracked == 0


def test_a_network_that_takes_no_size():
    """Where every size fails, one line names the network and says why."""

    class Impossible(nn.Module):
        def forward(self, images):
            raise ValueError("I take no images")

    line = "odd takes no image size up to 64×64: ValueError: I take no images"
    with pytest.raises(UserError, match=f"^{line}$"):
        fit_stem(Impossible(), "odd", 3, (32, 32), 64)
