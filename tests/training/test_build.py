"""What a training starts from follows from the options, the images and the weights."""

from types import SimpleNamespace

import pytest
import torch
from conftest import HEADER

from lenslet import weights
from lenslet.data.batches import Split
from lenslet.errors import UserError
from lenslet.training import build

IMAGENET = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
HALF = [[0.5] * 3, [0.5] * 3]


@pytest.fixture
def data():
    """Two small images in colour: black and white."""
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    split = Split(images, torch.tensor([0, 1]), ["0", "1"])
    return SimpleNamespace(splits={"train": split}, channels=3)


def options(model="lenet", pretrained=None, mean=None, std=None):
    return SimpleNamespace(model=model, pretrained=pretrained, mean=mean, std=std)


@pytest.mark.parametrize("source", ["timm", "weights.pth", "https://example.org/weights.pth"])
def test_weights_of_others_bring_the_statistics_of_their_network(data, source):
    """Wherever weights of others come from, images are normalised as their network's were."""
    assert build.choose_statistics(options(), data, {}) == HALF  # the images' own
    for model in ("lenet", "resnet18"):
        assert build.choose_statistics(options(model, source), data, {}) == IMAGENET
    assert build.choose_statistics(options("tf_efficientnet_b0.ap_in1k", source), data, {}) == HALF


def test_statistics_in_order(data):
    """Those given come before those of weights of ours, and these before the images' own."""
    ours = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    args = options(pretrained="model.safetensors")
    assert build.choose_statistics(args, data, ours) == list(ours.values())
    args.mean = [0.7]
    for known, deviations in ((ours, ours["std"]), ({}, IMAGENET[1])):
        assert build.choose_statistics(args, data, known) == [[0.7] * 3, deviations]
    args.mean = [0.7, 0.8]
    with pytest.raises(UserError, match="--mean: 2 numbers for 3 channels"):
        build.choose_statistics(args, data, ours)


def test_the_steps_of_a_network_under_its_old_name(tmp_path):
    """--plan takes the steps of a run of the same network, under the name it had in timm then."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        weights.encode({"a": torch.zeros(1)}, HEADER | {"model": "xception", "plan": [[0, 0.0, 9]]})
    )
    assert build._read_planned(SimpleNamespace(plan=path, model="legacy_xception"))["plan"]
    with pytest.raises(UserError, match="is of xception, not of lenet"):
        build._read_planned(SimpleNamespace(plan=path, model="lenet"))


def test_new_networks_and_those_of_weights():
    """A new fastnet is the newest kind; one that starts from weights, or repeats their steps, is
    of their kind and width, but for --width.
    """

    def arguments(pretrained=None, planned=None, model="fastnet", cropped=False, **given):
        splits = {"train": SimpleNamespace(is_cropped=cropped)}
        data = SimpleNamespace(classes=["a", "b"], channels=1, image_size=(20, 30), splits=splits)
        inputs = SimpleNamespace(data=data, pretrained_header=pretrained or {}, planned=planned)
        args = SimpleNamespace(**{"model": model, "image_size": None, "width": None} | given)
        found = build._network_arguments(args, inputs)
        size = (given["image_size"],) * 2 if "image_size" in given else (20, 30)
        assert {"classes": 2, "channels": 1, "size": size}.items() <= found.items()
        return {key: found[key] for key in found if key in ("width", "activation", "patch")}

    old = {"model": "fastnet", "model_args": {"classes": 3, "size": [8, 8], "width": 24}}
    assert arguments() == {"activation": "silu"}
    assert arguments(width=8) == {"activation": "silu", "width": 8}
    assert arguments(pretrained=old) == arguments(planned=old) == {"width": 24}
    assert arguments(pretrained=old, width=8) == {"width": 8}
    assert arguments(pretrained=old | {"model": "lenet"}) == {"activation": "silu"}
    assert arguments(model="lenet") == {}
    assert arguments(cropped=True, image_size=64) == {"activation": "silu", "patch": 4}
    assert arguments(cropped=True) == arguments(image_size=64) == {"activation": "silu"}
