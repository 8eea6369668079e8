"""The networks: their numbers, the sizes and channels they take, and the names they go by."""

import math
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F

import model
from lenslet import files
from lenslet.errors import UserError

NAMES = [
    "mobilenetv3_small_100",
    "mobilenetv3_large_100",
    "torchvision/shufflenet_v2_x1_0",
    "tf_efficientnet_b2",
    "seresnext50_32x4d",
    "legacy_xception",
    "vit_tiny_patch16_224",
]
SHAPES = [
    (1, 8, 8),
    (1, 28, 28),
    (3, 32, 32),
    pytest.param((3, 224, 224), marks=pytest.mark.slow),
]


def count(network) -> int:
    return sum(p.numel() for p in network.parameters())


def shapes(network) -> dict:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def test_tutorial_cnn():
    """tutorial_cnn has the parameters of its five layers, counted by hand."""
    layers = [3 * 32 * 25 + 32, 32 * 32 * 25 + 32, 32 * 64 * 25 + 64, 1024 * 64 + 64, 64 * 10 + 10]
    network = model.create_model("tutorial_cnn", 10)
    assert count(network) == sum(layers) == 145_578
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert not [m for m in network if isinstance(m, torch.nn.ReLU)]


def test_lenet():
    """lenet has the parameters of its five layers, counted by hand."""
    layers = [3 * 6 * 25 + 6, 6 * 16 * 25 + 16, 400 * 120 + 120, 120 * 84 + 84, 84 * 10 + 10]
    network = model.create_model("lenet", 10)
    assert count(network) == sum(layers) == 62_006
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", model.NETWORKS)
def test_own_networks_take_channels_classes_and_enlarged_pictures(name):
    """Any number of channels and classes; fed at 32×32 or, to fastnet, 16×16 at least."""
    sizes = {"fastnet": (16, 16), "tutorial_cnn": (32, 32), "lenet": (32, 32)}
    network = model.create_model(name, 7, channels=1, size=(8, 8))
    assert (network.input_size, network.stem_note) == (sizes[name], "")
    assert network(torch.rand(2, 1, *network.input_size)).shape == (2, 7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_training_step(name, shape):
    """Every network trains on every kind of picture, and nothing that is to learn is left out."""
    torch.manual_seed(0)
    network = model.create_model(name, 10, channels=shape[0], size=shape[1:])
    assert network.training
    assert all(have >= asked for have, asked in zip(network.input_size, shape[1:], strict=True))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    images = F.interpolate(torch.rand(2, *shape), network.input_size, mode="bilinear")
    loss = F.cross_entropy(network(images), torch.tensor([1, 2]))
    loss.backward()
    assert torch.isfinite(loss)
    assert [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None] == []
    optimizer.step()
    assert all(p.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "legacy_xception", "resnetblur50"])
def test_weights_fit_the_original(name):
    """A changed stem changes no parameter: the weights load strictly into timm's own network."""
    ours = model.create_model(name, 10)
    original = timm.create_model(name, num_classes=10)
    assert ours.stem_note
    assert shapes(ours) == shapes(original)
    original.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["resnet18", "resnetblur50", "torchvision/shufflenet_v2_x1_0"])
@pytest.mark.parametrize(("side", "cut"), [(32, 4), (48, 2), (72, 1)])
def test_stem_by_size(name, side, cut):
    """Of the 32-fold reduction a factor 4 goes up to 40 px, 2 up to 64 px, and none above."""
    network = model.create_model(name, 10, size=(side, side)).eval()
    sides = []
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda _, __, maps: sides.append(maps.shape[-1]))
    network(torch.rand(1, 3, side, side))
    assert sides[-1] == math.ceil(side * cut / 32)
    assert bool(network.stem_note) == (cut > 1)


def test_resnet18_small():
    """At 32 px ResNet-18 ends in 4×4 maps, both entrance layers are changed, and it says so."""
    network = model.create_model("resnet18", 10).eval()
    assert network.forward_features(torch.rand(1, 3, 32, 32)).shape == (1, 512, 4, 4)
    assert network.stem_note == (
        "Strides changed for pictures of 32×32: conv1 2 to 1, maxpool 2 to 1."
    )


def test_resnet18_native():
    """At 224 px ResNet-18 is timm's own: the same outputs from the same weights."""
    ours = model.create_model("resnet18", 10, size=(224, 224)).eval()
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
    """A picture is fed as it is, or enlarged to the smallest size that keeps the network whole."""
    network = model.create_model(name, 10, size=size).eval()
    assert network.input_size == fed
    with torch.no_grad():
        assert network(torch.rand(1, 3, *fed)).shape == (1, 10)


def test_same_arguments_same_structure():
    """What a weights file relies on: made twice, a network is the same; and it is untouched."""
    first, second = (model.create_model("legacy_xception", 10, channels=1) for _ in range(2))
    assert str(first) == str(second)
    assert first.stem_note == second.stem_note
    assert all(t.device.type == "cpu" for t in first.state_dict().values())
    assert first.bn1.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lennet", "lenet"),
        ("resnet-18", "resnet18"),
        ("resnet18.no_such_weights", "resnet18"),
        ("googlenet", "torchvision/googlenet"),
        ("shufflenet_v2_x1_0", "torchvision/shufflenet_v2_x1_0"),
        ("torchvision/shuflenet_v2_x1_0", "torchvision/shufflenet_v2_x1_0"),
    ],
)
def test_unknown_name(wrong, right):
    """A misspelt name is answered with the nearest known one and where to find the others."""
    for call in (lambda: model.create_model(wrong, 10), lambda: model.network_defaults(wrong)):
        with pytest.raises(UserError, match=r"python model\.py") as caught:
            call()
        assert f"(did you mean {right}" in str(caught.value)


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18", "hf_hub:timm/resnet18", "local-dir:/tmp"])
def test_hub_names_are_refused(name):
    """No name makes timm fetch a network, nor read one from a folder."""
    with pytest.raises(UserError, match="hub"):
        model.create_model(name, 10)


def test_torchvision_makes_no_noise(recwarn):
    """GoogLeNet and Inception come without auxiliary outputs and without warnings."""
    for name in ("torchvision/googlenet", "torchvision/inception_v3"):
        assert model.create_model(name, 10, channels=1).stem_note
    assert not recwarn.list


def test_network_defaults():
    """Photographs are prepared as the network's own configuration says."""
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop": 0.875}
    common = imagenet
    assert model.network_defaults("lenet") == {**common, "image_size": 32}
    assert model.network_defaults("torchvision/resnet18") == {**common, "image_size": 224}
    assert model.network_defaults("tf_efficientnet_b2")["image_size"] == 260
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop": 0.9}
    assert model.network_defaults("vit_tiny_patch16_224") == {**half, "image_size": 224}


def test_own_networks_import_neither_timm_nor_torchvision():
    """Our own networks are there within torch's own start-up time."""
    program = (
        "import sys, model\n"
        "for name in model.NETWORKS: model.create_model(name, 10), model.network_defaults(name)\n"
        "assert not {'timm', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=files.ROOT, check=True)


def test_command_prints_own_networks():
    """`python model.py` shows each own network with its parameters and output shape."""
    command = [sys.executable, files.ROOT / "model.py"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name, parameters in (("tutorial_cnn", "145,578"), ("lenet", "62,006")):
        line = next(line for line in shown.splitlines() if line.startswith(name))
        assert parameters in line
        assert "[1, 10]" in line


@pytest.mark.parametrize("channels", [1, 3])
def test_whitening(channels):
    """After whiten() the first layer's maps of those pictures have no correlation, variance 1."""
    torch.manual_seed(0)
    smooth = F.avg_pool2d(torch.randn(200, channels, 34, 34), 3, stride=1)  # neighbours are alike
    images = smooth + (smooth.mean(1, keepdim=True) if channels > 1 else 0)  # and channels
    network = model.create_model("fastnet", 10, channels)
    network.whiten(images)
    maps = network.whitening(images).transpose(0, 1).flatten(1)
    half = len(maps) // 2
    assert half == 4 * channels
    assert torch.allclose(maps[:half], -maps[half:])
    product = maps[:half] @ maps[:half].T / maps.shape[1]
    assert torch.allclose(product, torch.eye(half), atol=0.05)


@pytest.mark.parametrize("side", [16, 28, 32, 64])
def test_fastnet_takes_any_size_and_width(side):
    """One set of weights serves every size of picture; the width is the first block's channels."""
    network = model.create_model("fastnet", 10, size=(side, side), width=16).eval()
    assert network.input_size == (side, side)
    assert network.blocks[0].conv1.out_channels == 16
    assert network(torch.rand(2, 3, side, side)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("fastnet", ["head"]),
        ("lenet", ["fc3"]),
        ("tutorial_cnn", ["8"]),
        ("resnet10t", ["fc"]),
        ("mobilenetv3_small_050", ["classifier"]),
        ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
        ("torchvision/squeezenet1_0", ["classifier.1"]),
        ("torchvision/mobilenet_v3_small", ["classifier.3"]),
    ],
)
def test_head(name, head):
    """The last layers are found by name, and their outputs are the classes'."""
    network = model.create_model(name, 7, 3, (224, 224) if "deit" in name else (32, 32))
    assert model.head_of(network) == head
    assert all(next(network.get_submodule(h).parameters()).shape[0] == 7 for h in head)


def test_dropout():
    """What the last layer is fed loses its share in training, and nothing in evaluation; no name
    of a parameter changes.
    """
    torch.manual_seed(0)
    network, images = model.create_model("lenet", 3), torch.randn(4, 3, 32, 32)
    names, before = list(network.state_dict()), network.eval()(images)
    model.add_dropout(network, 0.5)
    fed = []
    network.fc3.register_forward_pre_hook(lambda layer, inputs: fed.append(inputs[0]))
    assert list(network.state_dict()) == names
    assert torch.equal(network(images), before)
    network.train()(images)
    plain, dropped = fed
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * plain[kept])
    assert 0.3 < (kept & (plain > 0)).sum() / (plain > 0).sum() < 0.7
