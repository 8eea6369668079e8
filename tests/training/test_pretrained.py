"""Weights to start from are found in any file and fitted to the network."""

import argparse
import copy
import json
from collections import OrderedDict

import conftest
import pytest
import timm
import torch
from safetensors.torch import save_file
from served import Server
from torch import nn

import lenslet.files
import model
from lenslet import errors, weights
from lenslet.errors import OutsideError, UserError
from lenslet.training import pretrained

HEADER = conftest.HEADER | {
    "model_args": {"classes": 2, "channels": 3},
    "classes": ["a", "b"],
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
    "data": "letters",
    "epoch": 1,
}


def tiny(channels=3, classes=3, seed=0):
    """images [N, channels, H, W] -> logits [N, classes], by way of conv, bn and fc."""
    torch.manual_seed(seed)
    layers = {
        "conv": nn.Conv2d(channels, 4, 3),
        "bn": nn.BatchNorm2d(4),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "fc": nn.Linear(4, classes),
    }
    return nn.Sequential(OrderedDict(layers))


def trained(**arguments):
    """What tiny() would be after a training: other numbers everywhere, running statistics too."""
    network = tiny(seed=1, **arguments)
    for value in network.state_dict().values():
        value.copy_(torch.rand(value.shape) + 1)
    return network


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class Evil:
    """Writes a file when it is unpickled by an ordinary unpickler."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


# Reading


def wrapped(state):
    """{name: what a training script may have saved}."""
    network = tiny()
    adam = torch.optim.Adam(network.parameters())
    network(torch.rand(2, 3, 8, 8)).sum().backward()
    adam.step()
    rest = {"epoch": 3, "optimizer": adam.state_dict(), "args": argparse.Namespace(lr=0.1)}
    return {
        "bare": state,
        "state_dict": {**rest, "state_dict": state},
        "model": {"model": state, **rest},
        "net": {"net": state, "acc": 93.0},
        "ema": {"model_state": {"ema": {"module": state}}, **rest},
        "parameters": {name: nn.Parameter(v) for name, v in state.items() if v.is_floating_point()},
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", wrapped(tiny().state_dict()))
def test_pickles_of_every_kind(tmp_path, kind, legacy):
    """The network's tensors are found wherever a script put them, an optimizer's never."""
    state = trained().state_dict()
    tree = wrapped(state)[kind]
    path = tmp_path / "weights.pth.tar"
    torch.save(tree, path, _use_new_zipfile_serialization=not legacy)
    tensors, header = pretrained.read_weights(str(path), "lenet")
    if kind == "parameters":
        state = {name: value for name, value in state.items() if name in tree}
    assert same(tensors, state) and header == {}
    assert not any(value.requires_grad for value in tensors.values())


def test_an_optimizer_is_no_network(tmp_path):
    """Three tensors of Adam's for a weight do not pass for a network of two."""
    network = nn.Linear(2, 2)
    adam = torch.optim.Adam(network.parameters())
    network(torch.ones(2)).sum().backward()
    adam.step()
    tree = {"optimizer": adam.state_dict(), "model": network.state_dict()}
    torch.save(tree, tmp_path / "w.pt")
    assert same(pretrained.read_weights(str(tmp_path / "w.pt"), "lenet")[0], network.state_dict())


def test_safetensors_of_others(tmp_path):
    """A .safetensors that train.py did not write is read, and has no header."""
    state = trained().state_dict()
    save_file(state, tmp_path / "x.safetensors", {"format": "pt"})
    tensors, header = pretrained.read_weights(str(tmp_path / "x.safetensors"), "lenet")
    assert same(tensors, state) and header == {}


def test_safetensors_of_ours(tmp_path):
    """One of ours comes with its header; altered or cut off, it is an error and not foreign."""
    state = trained().state_dict()
    path = tmp_path / "model.safetensors"
    data = weights.encode(state, HEADER)
    path.write_bytes(data)
    tensors, header = pretrained.read_weights(str(path), "lenet")
    assert same(tensors, state) and header["classes"] == ["a", "b"]
    altered, cut = r"^the weights are not those", "^not a complete safetensors file"
    for damaged, message in (
        (data[:-1] + bytes([data[-1] ^ 1]), altered),
        (data[:-1], cut),
        (data[:4], cut),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=message) as caught:
            pretrained.read_weights(str(path), "lenet")
        assert caught.value.status == 2


def test_one_digest_of_all_sources(tmp_path):
    """The same tensors have the same digest from a pickle, a safetensors file and one of ours."""
    state = {"one": torch.rand(2, 3), "two": torch.tensor(1.5), "three": torch.ones(3).bfloat16()}
    torch.save(state | {"one": state["one"].t().contiguous().t()}, tmp_path / "a.pth")
    save_file(state, tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(weights.encode(state, HEADER))
    read = [pretrained.read_weights(str(path), "lenet") for path in sorted(tmp_path.glob("?.*"))]
    assert {weights.digest(tensors) for tensors, _ in read} == {read[2][1]["sha256"]}


def test_weights_of_another_network(tmp_path):
    """One of ours says which network it is of; a timm name may differ in what follows the dot."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights.encode(trained().state_dict(), HEADER | {"model": "resnet18.a1_in1k"}))
    assert pretrained.read_weights(str(path), "resnet18")[1]["model"] == "resnet18.a1_in1k"
    with pytest.raises(UserError, match=r"^these weights are for resnet18\.a1_in1k, not for lenet"):
        pretrained.read_weights(str(path), "lenet")


def test_old_names_of_timm(tmp_path, monkeypatch):
    """Weights under an old name of timm's are the present network's, asked for by either name."""
    path = tmp_path / "model.safetensors"
    for stored in ("xception", "legacy_xception"):
        path.write_bytes(weights.encode(trained().state_dict(), HEADER | {"model": stored}))
        for asked in ("xception", "legacy_xception", "legacy_xception.tf_in1k"):
            assert pretrained.read_weights(str(path), asked)[1]["model"] == stored
    monkeypatch.setattr(pretrained, "_from_timm", lambda name: {"name": name})
    assert pretrained.read_weights("timm", "xception")[0] == {"name": "legacy_xception"}


def test_code_is_refused(tmp_path):
    """A pickle that would run code runs none; one line names the code and a way out."""
    path = tmp_path / "evil.pth"
    for harm in (Evil(tmp_path / "ran"), tiny()):
        torch.save({"state_dict": tiny().state_dict(), "extra": harm}, path)
        with pytest.raises(UserError, match=r"^runs code \([\w.]+\).*weights_only") as c:
            pretrained.read_weights(str(path), "lenet")
        assert "\n" not in str(c.value)
    assert not (tmp_path / "ran").exists()


def test_headers_that_are_damaged(tmp_path):
    """A header of ours without its network, or one that declares 10**12 numbers, is one line."""
    path = tmp_path / "m.safetensors"
    header = {key: value for key, value in HEADER.items() if key != "model"}
    path.write_bytes(weights.encode(trained().state_dict(), header))
    with pytest.raises(UserError, match=r"^its header lacks model$"):
        pretrained.read_weights(str(path), "lenet")
    places = (0, 4 * 10**12), (0, 4), (4, 8), (-4, 0), (0,), "x", None
    heads = [{"w": {"dtype": "F32", "shape": [10**12], "data_offsets": p}} for p in places]
    for head in (*heads, {"w": {"dtype": "F32"}}, {"w": 1}, {"__metadata__": 1}, [1], "x", None):
        text = json.dumps(head).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        with pytest.raises(UserError) as caught:
            pretrained.read_weights(str(path), "lenet")
        assert "\n" not in str(caught.value) and len(str(caught.value)) <= 400


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_no_weights_to_read(tmp_path, suffix):
    """Missing, a folder, cut off, something else, or without tensors: one line says which."""
    path = tmp_path / f"w{suffix}"
    with pytest.raises(UserError, match=r"^no such file"):
        pretrained.read_weights(str(path), "lenet")
    with pytest.raises(UserError, match=r"^is a folder"):
        pretrained.read_weights(str(tmp_path), "lenet")
    torch.save(tiny().state_dict(), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>not found</html>", bytes(99), b"\x80\2"):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=r"^(cannot be|is cut off).* damaged .*again$|^not a complete"
        ) as c:
            pretrained.read_weights(str(path), "lenet")
        assert "\n" not in str(c.value) and c.value.status == 2
    torch.save({"epoch": 3, "note": ["x", torch.ones(2)]}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"^holds no tensors"):
        pretrained.read_weights(str(tmp_path / "other.pth"), "lenet")


@pytest.fixture
def serve(monkeypatch):
    """serve({path: content}): a server on this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(files):
        servers.append(Server(files))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_url(serve, tmp_path):
    """A URL is fetched once and then read like a file; two of one name do not meet."""
    files = {}
    for number in range(2):
        torch.save({"w": torch.full((2, 2), number)}, tmp_path / "x")
        files[f"/{number}/w.pth"] = (tmp_path / "x").read_bytes()
    server = serve(files)
    for _ in range(2):
        for number in range(2):
            url = f"{server.url}/{number}/w.pth?download=true"
            tensors, header = pretrained.read_weights(url, "lenet")
            assert (tensors["w"] == number).all() and header == {}
        files["/0/w.pth"] = None  # kept: no longer asked for
    assert len(server.asked) == 2
    assert len(list((lenslet.files.DATA / "weights").glob("*-w.pth"))) == 2
    with pytest.raises(OutsideError, match="answers 404"):
        pretrained.read_weights(f"{server.url}/2/w.pth", "lenet")


def test_damaged_download(serve):
    """A download that holds no weights is named by its place on the disk: there it is deleted."""
    server = serve({"/w.pth": b"<html>log in</html>"})
    with pytest.raises(UserError, match=r"^\S*weights\S*w\.pth: cannot be read .* delete it"):
        pretrained.read_weights(f"{server.url}/w.pth", "lenet")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lenet", "^lenet is not a timm network"),
        ("torchvision/resnet18", "^torchvision/resnet18 is not a timm network"),
        ("botnet50ts_256", "^timm has no weights for botnet50ts_256"),
        (
            "resnet18.no_such_tag",
            r"^unknown model resnet18\.no_such_tag \(did you mean resnet18",
        ),
    ],
)
def test_networks_without_weights_of_timm(name, message):
    """What timm has no weights for is the user's mistake, and nobody is asked."""
    with pytest.raises(UserError, match=message) as caught:
        pretrained.read_weights("timm", name)
    assert caught.value.status == 2


def test_errors_end_a_command_in_one_line(capsys):
    """The statuses: 2 for what a user can mend, 1 for what failed outside."""
    for source, status in (("http://127.0.0.1:9/x.pth", 1), ("nowhere.pth", 2)):

        def main(_, source=source):
            with errors.error_context(f"--pretrained {source}"):
                pretrained.read_weights(source, "lenet")

        assert errors.run_main(main) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --pretrained {source}: ")


# Fitting


PREFIXES = "module. model. _orig_mod. module.model. backbone. pretrain_ state/model/".split()


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_prefixes(prefix):
    """Whatever stands before all names is removed, with a note."""
    network, state = tiny(), trained().state_dict()
    named = {prefix + name: value for name, value in state.items()}
    first, *_ = pretrained.fit(network, named, ["fc"], True)
    assert same(network.state_dict(), state)
    assert first == "9 of 9 tensors, 135 parameters" + (
        f", without their prefix {prefix}" if prefix else ""
    )


def test_names_beside_the_prefix():
    """Names with no prefix are used too; of two for one tensor, the one with the prefix."""
    network, state = tiny(), trained().state_dict()
    mixed = {f"net.{k}" if k.startswith(("conv", "bn")) else k: v for k, v in state.items()}
    mixed["conv.weight"] = torch.zeros(4, 3, 3, 3)
    lines = pretrained.fit(network, mixed, ["fc"], True)
    assert same(network.state_dict(), state)
    assert lines[1:] == ["1 in the file but unused: conv.weight"]


def test_prefix_needs_the_shapes():
    """Two networks in a file: the one whose shapes agree is taken, whichever comes first."""
    network, right = tiny(), trained().state_dict()
    state = {f"big.{name}": torch.stack([value] * 2) for name, value in right.items()}
    state |= {f"small.{name}": value for name, value in right.items()}
    pretrained.fit(network, state, ["fc"], True)
    assert same(network.state_dict(), right)


def test_plain_names_before_others():
    """Two copies of a network in a file: the one with the plain names is taken."""
    network, right = tiny(), trained().state_dict()
    state = {f"start.{name}": torch.zeros_like(value) for name, value in right.items()} | right
    pretrained.fit(network, state, ["fc"], True)
    assert same(network.state_dict(), right)


def test_prefix_ends_with_a_name():
    """Layer 10 is not layer 0 behind a 1."""
    state = {f"10.{name}": value for name, value in nn.Linear(4, 4).state_dict().items()}
    with pytest.raises(UserError, match="nothing fits"):
        pretrained.fit(nn.Sequential(nn.Linear(4, 4)), state, [], False)


def test_many_and_long_names():
    """The time for a shared prefix grows with the names' lengths and number, not their squares."""
    network, state = tiny(), trained().state_dict()
    long = {"a." * 500_000 + name: value for name, value in state.items()}
    pretrained.fit(network, long, ["fc"], True)
    assert same(network.state_dict(), state)
    many = {f"{i}.{i}.weight": state["fc.weight"] for i in range(100_000)}
    with pytest.raises(UserError, match=r"^nothing fits") as caught:
        pretrained.fit(network, many | {"x" * 10**6: torch.ones(9, 9)}, ["fc"], True)
    assert len(str(caught.value)) <= 400


def test_head_stays_new():
    """Without keep_head the last layer stays new even where its shape agrees, with a note."""
    network, state = tiny(), trained().state_dict()
    before = copy.deepcopy(network.state_dict())
    lines = pretrained.fit(network, state, ["fc"], False)
    after = network.state_dict()
    for name in after:
        assert torch.equal(after[name], (before if name.startswith("fc.") else state)[name])
    assert lines == [
        "7 of 9 tensors, 120 parameters",
        "2 new: fc.weight, fc.bias",
        "2 in the file but unused: fc.weight, fc.bias",
    ]
    other = trained(classes=7).state_dict()
    lines = pretrained.fit(network, other, ["fc"], True)
    assert "2 new: fc.weight, fc.bias" in lines
    assert (
        "2 of a different shape, not loaded: fc.weight [7, 4] in the file, [3, 4] here, "
        "fc.bias [7] in the file, [3] here" in lines
    )


@pytest.mark.parametrize(("before", "now"), [(3, 1), (1, 3), (4, 1), (1, 2)])
def test_grey_and_colour(before, now):
    """Adapted to other channels, a network answers to a grey image as it did before."""
    old, network = trained(channels=before).eval(), tiny(channels=now)
    lines = pretrained.fit(network, old.state_dict(), ["fc"], True)
    grey = torch.rand(2, 1, 8, 8)
    assert torch.allclose(
        network.eval()(grey.expand(-1, now, -1, -1)), old(grey.expand(-1, before, -1, -1))
    )
    assert lines[1] == f"1 adapted: conv.weight from {before} to {now} input channels"


@pytest.mark.parametrize("now", [4, 2, 7])
def test_other_channels_as_timm_does(now):
    """From 3 channels to any other number: timm's adapt_input_conv()."""
    state, network = trained().state_dict(), tiny(channels=now)
    expected = timm.models.adapt_input_conv(now, state["conv.weight"])
    pretrained.fit(network, state, ["fc"], True)
    assert torch.allclose(network.conv.weight, expected)


def test_channels_are_added_in_full_precision():
    """Half-precision weights are added up as float32, not rounded in between."""
    state = {name: value.half() for name, value in trained().state_dict().items()}
    network = tiny(channels=1)
    pretrained.fit(network, state, ["fc"], True)
    assert torch.equal(network.conv.weight, state["conv.weight"].float().sum(1, keepdim=True))


def test_two_convolutions_that_see_the_image():
    """Where branches take the image in parallel, both are adapted; other layers never are."""

    def network(channels, inner):
        layers = {"a": nn.Conv2d(channels, 4, 3), "b": nn.Conv2d(channels, 4, 1)}
        return nn.ModuleDict(layers | {"c": nn.Conv2d(inner, 8, 1)})

    there, here = network(3, 4), network(1, 2)
    lines = pretrained.fit(here, there.state_dict(), [], False)
    assert torch.allclose(here["b"].weight, there["b"].weight.sum(1, keepdim=True))
    assert lines[1].startswith("2 adapted: a.weight")
    assert lines[2] == (
        "1 of a different shape, not loaded: c.weight [8, 4, 1, 1] in the file, [8, 2, 1, 1] here"
    )


def test_folded_stem_is_left():
    """A stem that folds pixels into channels (48 of 3 colours, 16 of one) is not taken apart."""
    here = nn.Sequential(nn.Conv2d(16, 4, 3), nn.Conv2d(4, 4, 3))
    there = nn.Sequential(nn.Conv2d(48, 4, 3), nn.Conv2d(4, 4, 3))
    before = here[0].weight.clone()
    lines = pretrained.fit(here, there.state_dict(), [], False)
    assert torch.equal(here[0].weight, before) and torch.equal(here[1].weight, there[1].weight)
    assert "0.weight [4, 48, 3, 3] in the file, [4, 16, 3, 3] here" in lines[1]


def test_other_shapes_are_skipped():
    """A tensor of another shape is left out and named with both shapes; the others are loaded."""
    network, state = tiny(), trained().state_dict()
    before = network.bn.weight.clone()
    state["bn.weight"] = torch.ones(9)
    lines = pretrained.fit(network, state, ["fc"], True)
    assert torch.equal(network.bn.weight, before)
    assert torch.equal(network.conv.weight, state["conv.weight"])
    assert lines[1:] == ["1 of a different shape, not loaded: bn.weight [9] in the file, [4] here"]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_types_layout_and_gradients_stay(kind):
    """Types, channels_last and requires_grad stay the network's; the very parameters are kept."""
    network = tiny().to(memory_format=torch.channels_last)
    network.bn.weight.requires_grad = False
    parameters = dict(network.named_parameters())
    state = {name: value.to(kind) for name, value in trained().state_dict().items()}
    pretrained.fit(network, state, ["fc"], True)
    for name, parameter in network.named_parameters():
        assert parameter is parameters[name]
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad == (name != "bn.weight")
        assert torch.equal(parameter.detach(), state[name].float())
    assert network.bn.num_batches_tracked.dtype == torch.int64
    assert network.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_notes_about_the_rest():
    """What the file has too much and what it lacks is counted, and three of each are named."""
    network, state = tiny(), trained().state_dict()
    state = {name: value for name, value in state.items() if not name.startswith("bn.")}
    state |= {f"extra.{number}": torch.ones(3, 3) for number in range(5)}
    assert pretrained.fit(network, state, ["fc"], True)[1:] == [
        "5 in the file but unused: extra.0, extra.1, extra.2 and 2 more",
        "4 missing from the file: bn.weight, bn.bias, bn.running_mean and 1 more",
    ]


@pytest.mark.parametrize("other", ["biases", "names", "head"])
def test_nothing_fits(other):
    """With no weights but the head's that fit, one line says what is there and what is needed."""
    network, state = tiny(), trained().state_dict()
    state = {
        "biases": {k: v if v.dim() < 2 else torch.ones(9, 9) for k, v in state.items()},
        "names": {f"layer{i}.kernel": v for i, v in enumerate(state.values())},
        "head": {k: v for k, v in state.items() if k.startswith("fc.")},
    }[other]
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(UserError, match=r"^nothing fits: the file has ") as caught:
        pretrained.fit(network, state, ["fc"], True)
    line = str(caught.value)
    assert next(iter(state)) in line and "conv.weight [4, 3, 3, 3]" in line and "\n" not in line
    assert same(network.state_dict(), before)


def test_a_network_of_timms():
    """With its head's names from model.py, a timm network takes another's body, whole."""
    old = timm.create_model("test_resnet", num_classes=5)
    network = model.create_model("test_resnet", 2, channels=1)
    lines = pretrained.fit(network, old.state_dict(), model.head_of(network), False)
    loaded, state = network.state_dict(), old.state_dict()
    different = {name for name in state if not torch.equal(loaded[name], state[name])}
    assert different == {"conv1.0.weight", "fc.weight", "fc.bias"}
    assert len(lines) == 4 and not any("missing from" in line for line in lines)
