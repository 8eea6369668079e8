"""The networks: what they are made of and take, their names, and loading their weights."""

import contextlib
import re
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import HEADER
from torch import nn

import model
from lenslet import files, weights
from lenslet.errors import UserError, run_main
from lenslet.header import NEEDED
from model import ACTIVATIONS, create_model, load_model

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


def test_tutorial_cnn():
    """tutorial_cnn has the parameters of its five layers, counted by hand."""
    layers = [3 * 32 * 25 + 32, 32 * 32 * 25 + 32, 32 * 64 * 25 + 64, 1024 * 64 + 64, 64 * 10 + 10]
    network = create_model("tutorial_cnn", 10)
    assert count(network) == sum(layers) == 145_578
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert not [m for m in network if isinstance(m, torch.nn.ReLU)]


def test_lenet():
    """lenet has the parameters of its five layers, counted by hand."""
    layers = [3 * 6 * 25 + 6, 6 * 16 * 25 + 16, 400 * 120 + 120, 120 * 84 + 84, 84 * 10 + 10]
    network = create_model("lenet", 10)
    assert count(network) == sum(layers) == 62_006
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", model.NETWORKS)
def test_own_networks_take_channels_classes_and_enlarged_images(name):
    """Any number of channels and classes; fed at 32×32 or, to fastnet, 16×16 at least."""
    sizes = {"fastnet": (16, 16), "tutorial_cnn": (32, 32), "lenet": (32, 32)}
    network = create_model(name, 7, channels=1, size=(8, 8))
    assert (network.input_size, network.stem_note) == (sizes[name], "")
    assert network(torch.rand(2, 1, *network.input_size)).shape == (2, 7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_training_step(name, shape):
    """Every network trains on every kind of image, and all that should learn gets a gradient."""
    torch.manual_seed(0)
    network = create_model(name, 10, channels=shape[0], size=shape[1:])
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


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lennet", "lenet"),
        ("resnet-18x", "resnet18"),
        ("resnet18.no_such_weights", "resnet18"),
        ("googlenet", "torchvision/googlenet"),
        ("shufflenet_v2_x1_0", "torchvision/shufflenet_v2_x1_0"),
        ("torchvision/shuflenet_v2_x1_0", "torchvision/shufflenet_v2_x1_0"),
    ],
)
def test_unknown_name(wrong, right):
    """A misspelt name is answered with the nearest known one and where to find the others."""
    for call in (lambda: create_model(wrong, 10), lambda: model.network_defaults(wrong)):
        with pytest.raises(UserError, match=r"python model\.py") as caught:
            call()
        assert f"(did you mean {right}" in str(caught.value)


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18", "hf_hub:timm/resnet18", "local-dir:/tmp"])
def test_hub_names_are_refused(name):
    """No name makes timm fetch a network, nor read one from a folder."""
    with pytest.raises(UserError, match="hub"):
        create_model(name, 10)


def test_torchvision_makes_no_noise(recwarn):
    """GoogLeNet and Inception come without auxiliary outputs and without warnings."""
    for name in ("torchvision/googlenet", "torchvision/inception_v3"):
        assert create_model(name, 10, channels=1).stem_note
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


OLD = timm.models.get_deprecated_models()


@pytest.mark.filterwarnings("error")
def test_old_names_are_translated():
    """Each name that timm has given up stands for the present one, with its configuration; the few
    whose weights timm no longer has are refused.
    """
    assert model.network_defaults("xception")["image_size"] == 299
    assert model.network_defaults("tf_efficientnet_b0_ap")["mean"] == [0.5] * 3
    gone = []
    for old, present in OLD.items():
        try:
            assert model.find_network(old) == present
        except UserError:
            gone.append(present)
            continue
        assert timm.is_model(present) and present not in OLD
        assert model.network_defaults(old) == model.network_defaults(present)
        assert "." not in present or timm.is_model_pretrained(present)
    assert not any(map(timm.is_model_pretrained, gone)) and len(gone) < len(OLD) / 20


@pytest.mark.filterwarnings("error")
def test_weights_under_an_old_name(tmp_path):
    """A weights file whose header has an old name of timm's loads, and gives the same logits."""
    arguments = {"classes": 3, "channels": 3, "size": [64, 96]}
    network = create_model("tf_efficientnet_b0.ap_in1k", **arguments).eval()
    path = tmp_path / "model.safetensors"
    header = HEADER | {"model": "tf_efficientnet_b0_ap", "model_args": arguments}
    path.write_bytes(weights.encode(network.state_dict(), header))
    loaded, prepare, _ = load_model(path)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    assert loaded.input_size == network.input_size == (64, 96)
    with torch.no_grad():
        torch.testing.assert_close(loaded(prepare(images)), network(prepare(images)))


def test_own_networks_need_torch_only():
    """`import model` and our own networks take hardly longer than torch's own start-up."""
    program = (
        "import sys, model\n"
        "for name in model.NETWORKS: model.create_model(name, 10), model.network_defaults(name)\n"
        "slow = {'timm', 'torchvision', 'accelerate', 'PIL'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=files.ROOT, check=True)


def test_command_prints_own_networks():
    """`python model.py` shows each own network with its parameters, input and output shape."""
    command = [sys.executable, files.ROOT / "model.py"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert shown.splitlines()[:3] == [
        "fastnet          1,089,720 parameters   [1, 3, 32, 32] -> [1, 10]",
        "tutorial_cnn       145,578 parameters   [1, 3, 32, 32] -> [1, 10]",
        "lenet               62,006 parameters   [1, 3, 32, 32] -> [1, 10]",
    ]
    assert "shufflenetv2                 is taken for torchvision/shufflenet_v2_x1_0" in shown


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("mobilenetv3", "mobilenetv3_large_100"),
        ("MobileNetV3", "mobilenetv3_large_100"),
        ("shufflenetv2", "torchvision/shufflenet_v2_x1_0"),
        ("adv-efficientnet-b2", "tf_efficientnet_b2.ap_in1k"),
        ("se_resnext50", "seresnext50_32x4d"),
        ("se_resnext50_32x4d", "seresnext50_32x4d"),
        ("ResNet-18", "resnet18"),
        ("torchvision/ResNet18", "torchvision/resnet18"),
        ("FastNet", "fastnet"),
    ],
)
def test_names_as_people_type_them(typed, meant):
    """Case, hyphens and the usual names of papers and tutorials are understood."""
    assert model.find_network(typed) == meant


@pytest.mark.parametrize(("wrong", "near"), [("convnext", "convnext_"), ("vgg", "vgg11")])
def test_hints_are_of_the_same_family(wrong, near):
    """A name that many networks begin with hints at one of them."""
    with pytest.raises(UserError, match=re.escape(f"(did you mean {near}")):
        model.find_network(wrong)


class Plain(nn.Module):
    """A network as a user writes it: nothing but layers."""

    def __init__(self, classes, channels):
        super().__init__()
        self.linear = nn.Linear(channels * 32 * 32, classes)

    def forward(self, images):
        return self.linear(images.flatten(1))


def test_a_network_of_ones_own(monkeypatch):
    """A module in NETWORKS needs nothing else; a size that it cannot take is one line."""
    monkeypatch.setitem(model.NETWORKS, "plain", Plain)
    network = create_model("plain", 5, 1)
    assert network.input_size == (32, 32) and network.stem_note == ""
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 5)
    with pytest.raises(UserError, match="plain cannot take images of 28×28"):
        create_model("plain", 5, 1, size=(28, 28))


def test_size_is_a_side_too():
    """One number is the side of a square."""
    assert create_model("resnet18", 5, size=64).input_size == (64, 64)
    assert create_model("fastnet", 5, size=24).input_size == (24, 24)


def test_command_prints_layers(capsys):
    """`python model.py NAME` shows a network layer by layer, with shapes and parameters."""
    model.main(["lenet"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["conv1", "Conv2d", "[1,", "6,", "28,", "28]", "456"],
        ["conv2", "Conv2d", "[1,", "16,", "10,", "10]", "2,416"],
    ]
    assert lines[-1] == "lenet: 62,006 parameters for 10 classes"
    model.main(["resnet18"])
    assert "layer4.1.conv2" in capsys.readouterr().out


def test_command_searches_all_networks(capsys):
    """Shell patterns find timm's, torchvision's and our own; the names are those --model takes."""
    assert run_main(model.main, ["resnet18*", "len?t", "torchvision/regnet_x_8gf"]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["lenet", "146,156", "parameters", "32×32"] in shown
    assert ["resnet18", "11,689,512", "parameters", "224×224"] in shown
    assert ["torchvision/resnet18", "11,689,512", "parameters", "224×224"] in shown
    # Made only with real tensors: counting them would take a second for each.
    assert ["torchvision/regnet_x_8gf", "-", "parameters", "224×224"] in shown
    names = [name for name, *_ in shown]
    assert names == sorted(set(names)) and len(names) == 5


@pytest.mark.parametrize("name", ["fastnet", "resnet10t", "torchvision/googlenet"])
def test_counting_without_memory(name):
    """Parameters counted on the meta device are those of the real network."""
    assert model.count_parameters(name, 7) == f"{count(create_model(name, 7)):,}"


def test_command_finds_nothing(capsys):
    """A pattern that matches nothing is one line with the nearest name, and nothing is listed."""
    assert run_main(model.main, ["resnet18", "resnte18*"]) == 2
    out, err = capsys.readouterr()
    line = "error: no network's name matches resnte18* (did you mean resnet18?)\n"
    assert (out, err) == ("", line)


@pytest.mark.parametrize("channels", [1, 3])
def test_whitening(channels):
    """After whiten() the first layer's maps of those images are uncorrelated, with variance 1.

    Nothing in it learns, so that a step computes no gradient of these maps, the largest ones.
    """
    torch.manual_seed(0)
    smooth = F.avg_pool2d(torch.randn(200, channels, 34, 34), 3, stride=1)  # neighbours are alike
    images = smooth + (smooth.mean(1, keepdim=True) if channels > 1 else 0)  # and channels
    network = create_model("fastnet", 10, channels)
    network.whiten(images)
    maps = network.whitening(images)
    assert not maps.requires_grad
    maps = maps.transpose(0, 1).flatten(1)
    half = len(maps) // 2
    assert half == 4 * channels
    assert torch.allclose(maps[:half], -maps[half:])
    product = maps[:half] @ maps[:half].T / maps.shape[1]
    assert torch.allclose(product, torch.eye(half), atol=0.05)


def test_fastnet_begins_with_identities():
    """The first maps of a new block's convolutions are copies of what the convolution is fed."""
    network = create_model("fastnet", 10, width=32)
    for block in network.blocks:
        for conv in (block.conv1, block.conv2):
            images = torch.randn(2, conv.in_channels, 8, 8)
            assert torch.equal(conv(images)[:, : conv.in_channels], images)


@pytest.mark.parametrize("name", [None, *ACTIVATIONS])
def test_fastnet_logits(name):
    """They are a linear layer's of each map's largest value, divided by 9; an older file, which
    does not say its activation, has ReLU.
    """
    given, activation = ({"activation": name} if name else {}), ACTIVATIONS[name or "relu"]
    network, x = create_model("fastnet", 10, width=8, **given).eval(), torch.rand(2, 3, 32, 32)
    maps = activation(network.whitening(x))
    for block in network.blocks:
        maps = activation(block.norm1(F.max_pool2d(block.conv1(maps), 2)))
        maps = activation(block.norm2(block.conv2(maps)))
    torch.testing.assert_close(network(x), maps.amax((2, 3)) @ network.head.weight.T / 9)


@pytest.mark.parametrize("side", [16, 28, 32, 64])
def test_fastnet_takes_any_size_and_width(side):
    """One set of weights serves every image size; the width is the first block's channels."""
    network = create_model("fastnet", 10, size=(side, side), width=16).eval()
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
    network = create_model(name, 7, 3, (224, 224) if "deit" in name else (32, 32))
    assert model.head_of(network) == head
    assert all(next(network.get_submodule(h).parameters()).shape[0] == 7 for h in head)


def test_dropout():
    """What the last layer is fed loses its share in training, and nothing in evaluation; no name
    of a parameter changes.
    """
    torch.manual_seed(0)
    network, images = create_model("lenet", 3), torch.randn(4, 3, 32, 32)
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


@pytest.fixture
def trained(tmp_path):
    """A weights file of a network for three classes, in a run folder."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights.encode(create_model("lenet", 3).state_dict(), HEADER))
    return path


def refuse(path, *parts):
    """The file is refused in one line that begins with its name."""
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert all(part in str(caught.value) for part in parts)
    assert "\n" not in str(caught.value)


def test_use_from_python(trained, monkeypatch):
    """README's three lines: a run folder, or the link to it, is enough to classify images."""
    monkeypatch.chdir(trained.parent)
    (trained.parent / "runs").mkdir()
    (trained.parent / "runs/latest").symlink_to(trained.parent)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    model, prepare, header = load_model("runs/latest")
    logits = model(prepare(images))
    assert logits.shape == (2, 3) and header["model"] == "lenet" and not model.training
    for path in (trained, str(trained), trained.parent):
        model, prepare, _ = load_model(path)
        assert torch.equal(model(prepare(images)), logits)


def test_loaded_network(trained):
    """The loaded network answers as the saved one, with the preparation that the header says."""
    model, prepare, header = load_model(trained)
    original = create_model("lenet", 3)
    original.load_state_dict(weights.read(trained)[0])
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert not model.training
    assert torch.allclose(prepare.mean.flatten() / 255, torch.tensor(header["mean"]))
    assert torch.allclose(model(prepare(images)), original(prepare(images)), atol=1e-5)


def test_weights_of_an_earlier_version():
    """A file that was written before the code became a package still loads and predicts the same.

    fastnet with one channel; the logits are what that code gave for the same images.
    """
    model, prepare, header = load_model(files.ROOT / "tests" / "weights-1.safetensors")
    images = (torch.arange(2 * 64) ** 2 * 5 % 251).to(torch.uint8).view(2, 1, 8, 8)
    expected = [
        [-0.9281, 0.6061, -0.57, -0.3128, -0.2248, 0.5071, -0.0595, 0.0443, 0.125, 0.7822],
        [-0.5934, 0.4313, -0.4459, -0.2125, -0.0927, 0.2864, -0.0945, 0.0112, 0.0791, 0.4913],
    ]
    with torch.no_grad():
        torch.testing.assert_close(
            model(prepare(images)), torch.tensor(expected), atol=1e-4, rtol=1e-4
        )
    assert header["classes"] == list("0123456789") and header["data"] == "digits"
    assert header["model_args"] == {"classes": 10, "channels": 1, "size": [8, 8], "width": 1}
    assert header["options"]["optimizer"] == "adamw"


def test_files_that_are_no_model(tmp_path, trained):
    """What is missing, damaged, or a folder without weights is refused by its name."""
    refuse(tmp_path / "none.safetensors", "no such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"^{tmp_path}/empty/model.safetensors: no such"):
        load_model(tmp_path / "empty")
    trained.write_bytes(trained.read_bytes()[:-1])
    refuse(trained)


def test_incomplete_header(trained):
    """A header without what is needed to use the weights, or of an unknown network, is refused."""
    state = create_model("lenet", 3).state_dict()
    for missing in NEEDED:
        header = {key: value for key, value in HEADER.items() if key != missing}
        trained.write_bytes(weights.encode(state, header))
        refuse(trained, f"lacks {missing}")
    trained.write_bytes(weights.encode(state, HEADER | {"model": "lennet"}))
    refuse(trained, "unknown model lennet")


def test_other_number_of_classes(tmp_path):
    """Weights for ten classes under a header of three are refused."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(weights.encode(create_model("lenet", 10).state_dict(), HEADER))
    refuse(path, "do not fit their header")


def test_altered_header(trained):
    """A changed bit in the header gives a refusal, if it is found out, and never a traceback."""
    content = trained.read_bytes()
    for place in range(8, 8 + int.from_bytes(content[:8], "little"), 3):
        altered = bytearray(content)
        altered[place] ^= 1
        trained.write_bytes(altered)
        with contextlib.suppress(UserError):
            load_model(trained)


def test_timm_loads_our_file(tmp_path):
    """A timm network with its own stem loads unchanged into timm, every tensor of it."""
    network = create_model("resnet18", 3, 3, (224, 224))
    assert network.stem_note == ""
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights.encode(network.state_dict(), {**HEADER, "model": "resnet18"}))
    theirs = timm.create_model("resnet18", num_classes=3, checkpoint_path=str(path)).state_dict()
    ours = network.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
