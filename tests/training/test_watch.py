"""Watching a network changes nothing in its training, keeps to its time, and names bad layers."""

import copy
import warnings
from io import BytesIO

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

from lenslet.runs.tensorboard import TensorBoard
from lenslet.training import watch
from lenslet.training.watch import Watch
from model import create_model

ALWAYS = 1e9  # a share of the time that makes everything due at once
REMEDIES = {"infinite": "lower the rate", "exploding": "clip", "vanishing": "add batch norm"}


class Notes:
    """In place of a TensorBoard: what was added, (kind, tag) -> value, and the warnings."""

    def __init__(self):
        self.added, self.lines, self.calls = {}, [], []

    def add(self, kind, tag, value, *rest):
        self.added[kind, tag] = value
        self.calls.append(kind)

    def flush(self, step):
        pass

    def tags(self, start):
        return [tag.removeprefix(start) for _, tag in self.added if str(tag).startswith(start)]


def make_watch(network, images, share=ALWAYS, **more):
    notes = Notes()
    return Watch(network, notes, images, REMEDIES, share, notes.lines.append, **more), notes


class Sampled(nn.Module):
    """Draws random numbers in training and in evaluation, as networks ought not to."""

    def forward(self, x):
        return F.dropout(x, 0.3)


def small_network():
    """With all that a second forward pass might change; its first batch norm stays as it is."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), Sampled()]
    layers += [nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.5)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 8 * 8, 5))
    network[1].eval()
    return network


def train(network, steps=4, watched=None, inside=False, size=12, lr=0.1, batch=8):
    """SGD on noise; the steps are numbered 0, 100, 200, ...  inside: watch that in each, too."""
    generator = torch.Generator().manual_seed(1)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr)
    for step in range(0, 100 * steps, 100):
        images = torch.randn(batch, 3, size, size, generator=generator)
        labels = torch.randint(0, 5, (batch,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        if watched:
            watched.gradients(step, step)
        optimizer.step()
        if inside:
            watched.inside(step, step)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_no_bit_of_training_changes(layout, tmp_path):
    """Weights, buffers, gradients, random numbers and modes are those of unwatched training."""
    torch.manual_seed(3)
    plain = small_network().to(memory_format=layout)
    seen = copy.deepcopy(plain)
    torch.manual_seed(4)
    train(plain)
    expected = torch.get_rng_state()
    torch.manual_seed(4)
    images, lines = torch.randn(6, 3, 12, 12, generator=torch.Generator()), []
    board = TensorBoard(tmp_path, 0)
    watched = Watch(seen, board, images, REMEDIES, ALWAYS, lines.append)
    train(seen, 4, watched, inside=True)
    board.close()
    assert not lines and set(EventAccumulator(str(tmp_path)).Reload().Tags()["histograms"])
    assert torch.equal(torch.get_rng_state(), expected)
    for (name, a), b in zip(plain.state_dict().items(), seen.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(plain.parameters(), seen.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad) and b.requires_grad
    for a, b in zip(plain.modules(), seen.modules(), strict=True):
        assert a.training == b.training and a.__dict__.keys() == b.__dict__.keys()
        assert not (b._forward_hooks or b._forward_pre_hooks or b._backward_hooks)


@pytest.fixture
def clock(monkeypatch):
    """watch.device_time() is `clock.time`, in seconds."""

    class Clock:
        time = 0.0

    monkeypatch.setattr(watch, "device_time", lambda device: Clock.time)
    return Clock


@pytest.mark.parametrize("start", [0.0, 5000.0])
def test_the_budget_is_kept(clock, start):
    """Both kinds of work take no more than the share, apart from the first time of each, also in a
    resumed run, which does not catch up on what it missed; and they go on to the end.
    """
    watched, _ = make_watch(nn.Linear(2, 2), torch.zeros(1, 2), share=0.04)
    costs, spent, done = {"gradients": 0.3, "inside": 5.0}, [], []

    def fake(kind):
        def work(step):
            clock.time += costs[kind]
            spent.append(costs[kind])
            done.append((clock.time, kind))

        return work

    for kind in costs:
        setattr(watched, f"_{kind}", fake(kind))
    watched.due = {watched._gradients: 0.0, watched._inside: 0.0}
    for step in range(20_000):
        clock.time += 0.1  # what a step takes
        watched.gradients(step, start + clock.time)
        if step % 100 == 99:
            watched.inside(step, start + clock.time)
        assert sum(spent) <= 0.04 * clock.time + sum(costs.values())
    assert sum(spent) > 0.03 * clock.time
    times = [time for time, kind in done if kind == "gradients"]
    assert max(b - a for a, b in zip(times, times[1:], strict=False)) < 1.2 * (0.3 / 0.02 + 5)
    assert min(b - a for a, b in zip(times, times[1:], strict=False)) > 0.3 / 0.02


def test_a_curve_has_few_points(clock):
    """However cheap it is, a curve gets thousands of points in a day, and not millions."""
    watched, notes = make_watch(nn.Linear(2, 2), torch.zeros(1, 2))
    watched.network(torch.ones(1, 2)).sum().backward()
    for second in range(86_400):
        watched.gradients(second, second)
    assert 3_000 < len(notes.calls) < 9_000


def test_norms():
    """A scalar for each layer with gradients: the norm of all of them, unscaled in fp16."""
    network = small_network()
    network[0].weight.requires_grad = False  # its bias is left
    network[1].requires_grad_(False)
    network[4].requires_grad_(False).weight.grad = torch.ones(8, 8, 3, 3)  # from before
    network.unused = nn.Linear(3, 3)
    F.cross_entropy(network[:-1](torch.randn(4, 3, 12, 12)), torch.arange(4)).backward()
    scaler = type("Scaler", (), {"get_scale": lambda self: 1024.0})()
    for scale, more in ((1.0, {}), (1024.0, {"scaler": scaler})):
        watched, notes = make_watch(network, torch.zeros(1, 3, 12, 12), **more)
        watched.gradients(7, 0.0)
        assert notes.tags("watch/gradient_norm/") == ["0", "5", "9"]
        for name in ("0", "5", "9"):
            own = [p.grad.flatten() for p in network[int(name)].parameters() if p.requires_grad]
            expected = torch.cat(own).norm().item() / scale
            found = notes.added["scalar", f"watch/gradient_norm/{name}"]
            assert found == pytest.approx(expected, rel=1e-5)


def deep(function, convolutions=False, depth=12, factor=None):
    """Layers with a function after each; factor: of the first weights that would suit ReLU."""
    layers, width = ([], 3) if convolutions else ([nn.Flatten()], 3 * 12 * 12)
    for _ in range(depth - 1):
        new = nn.Conv2d(width, 16, 3, padding=1) if convolutions else nn.Linear(width, 32)
        layers += [new, function()]
        width = 16 if convolutions else 32
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if convolutions else []
    network = nn.Sequential(*layers, *pool, nn.Linear(width, 5))
    for layer in network.modules() if factor else ():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            layer.weight.data *= factor
    return network


@pytest.mark.parametrize("convolutions", [False, True])
def test_vanishing(convolutions):
    """A deep network with sigmoid: one line, that names the first layer, and only after a while."""
    torch.manual_seed(0)
    network = deep(nn.Sigmoid, convolutions)
    first = "0" if convolutions else "1"
    watched, notes = make_watch(network, torch.zeros(1, 3, 12, 12))
    train(network, 1, watched)
    assert not notes.lines
    train(network, 4, watched)
    (line,) = notes.lines
    assert line.startswith(f"vanishing gradient: {first} and ") and "at step 100, norm " in line
    assert line.endswith(": add batch norm")


def test_silent_relus():
    """Layers before one whose ReLUs are all silent have no gradient at all: a warning."""
    network = deep(nn.ReLU, depth=4, factor=1.0)
    network[3].bias.data -= 1e3
    watched, notes = make_watch(network, torch.zeros(1, 3, 12, 12))
    train(network, 2, watched)
    (line,) = notes.lines
    assert line.startswith("vanishing gradient: 1 and ") and "norm 0:" in line


def test_a_last_layer_that_begins_at_zero():
    """No warning where the last matrix starts at zero, and nothing else has a gradient yet."""
    network = small_network()
    nn.init.zeros_(network[-1].weight)
    watched, notes = make_watch(network, torch.zeros(2, 3, 12, 12))
    train(network, 4, watched)
    assert not notes.lines


@pytest.mark.parametrize("factor", [3, 10])
@pytest.mark.parametrize("convolutions", [False, True])
def test_exploding(factor, convolutions):
    """Weights that are much too large: one line at once, which names the largest gradient."""
    torch.manual_seed(0)
    network = deep(nn.ReLU, convolutions, factor=factor)
    watched, notes = make_watch(network, torch.zeros(1, 3, 12, 12))
    train(network, 1, watched, lr=1e-12)
    train(network, 2, watched, lr=1e-12)
    (line,) = notes.lines
    named = line.removeprefix("exploding gradient: ").split()[0]
    norms = {tag: value for (kind, tag), value in notes.added.items() if kind == "scalar"}
    assert norms[f"watch/gradient_norm/{named}"] == max(norms.values()) > 1000
    assert "at step 0" in line and line.endswith(": clip")


def test_large_gradients_across_the_weights():
    """Tiny weights before a batch norm have huge gradients, which are no explosion."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-30))
    network.extend([nn.ReLU(), nn.Flatten(), nn.Linear(800, 5)])
    network[0].weight.data *= 1e-6
    watched, notes = make_watch(network, torch.zeros(2, 3, 12, 12))
    train(network, 1, watched)
    assert notes.added["scalar", "watch/gradient_norm/0"] > 1000 and not notes.lines


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_infinite(value):
    """A warning names the last layer, where infinite gradients start; in fp16, where the scaler
    skips such a step, there is none.
    """
    network = small_network()
    F.cross_entropy(network(torch.randn(4, 3, 12, 12)), torch.arange(4)).backward()
    for p in network.parameters():
        p.grad *= value
    watched, notes = make_watch(network, torch.zeros(2, 3, 12, 12))
    watched.gradients(5, 0.0)
    watched.gradients(6, 1.0)
    (line,) = notes.lines
    assert line.startswith("infinite gradient: 9 and 4 more at step 5, norm ")
    assert line.endswith(": lower the rate")
    watched, notes = make_watch(network, watched.images, scaler=torch.amp.GradScaler("cpu"))
    watched.gradients(5, 0.0)
    assert not notes.lines


HEALTHY = [
    ("lenet", 32),
    ("tutorial_cnn", 32),
    ("fastnet", 32),
    ("resnet18", 16),
    ("mobilenetv3_small_100", 16),
    ("vit_tiny_patch16_224", 224),
]


@pytest.mark.parametrize(("name", "size"), HEALTHY)
def test_healthy_networks(name, size):
    """No warning about networks that train, at first or later, and every kind of tag is there."""
    torch.manual_seed(0)
    network = create_model(name, 5, 3, (size, size)).train()
    watched, notes = make_watch(network, torch.randn(2, 3, *network.input_size))
    train(network, 2, watched, size=size, batch=2 if size > 32 else 8, lr=0.1)
    watched.inside(200, 0.0)
    assert not notes.lines
    owners = {
        layer or type(network).__name__: list(module.parameters(recurse=False))
        for layer, module in network.named_modules()
    }
    trained = [layer for layer, own in owners.items() if any(p.requires_grad for p in own)]
    assert notes.tags("watch/gradient_norm/") == trained
    matrices = [layer for layer, own in owners.items() if any(p.dim() > 1 for p in own)]
    shown = notes.tags("weights/")
    assert len(shown) == min(30, len(matrices)) and set(shown) <= set(matrices)
    assert {matrices[0], matrices[-1]} <= set(shown)
    assert 5 <= len(notes.tags("activations/")) <= 30
    assert 1 <= len(notes.tags("feature_maps/")) <= 6
    watched.inside(300, 1.0)
    assert notes.calls.count("graph") == 1


def test_what_tensorboard_shows(tmp_path):
    """Curves, histograms, images and the graph are read back from the file, at their steps."""
    board = TensorBoard(tmp_path, 0)
    network, lines = small_network(), []
    watched = Watch(network, board, torch.randn(4, 3, 12, 12), REMEDIES, ALWAYS, lines.append)
    train(network, 3, watched, inside=True)
    board.close()
    events = EventAccumulator(str(tmp_path), {"scalars": 0, "histograms": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    layers = ["0", "1", "4", "5", "9"]
    assert set(tags["scalars"]) == {f"watch/gradient_norm/{layer}" for layer in layers}
    functions = {f"activations/{layer}" for layer in [*layers, "2", "6"]}
    assert set(tags["histograms"]) == {"weights/0", "weights/4", "weights/9"} | functions
    assert set(tags["images"]) == {"feature_maps/0", "feature_maps/4"} and tags["graph"]
    for kind, tag in (("Scalars", "watch/gradient_norm/0"), ("Histograms", "weights/0")):
        assert [event.step for event in getattr(events, kind)(tag)] == [0, 100, 200]
    weights = events.Histograms("weights/0")[0].histogram_value
    assert weights.num == network[0].weight.numel() and len(weights.bucket) <= 66
    image = Image.open(BytesIO(events.Images("feature_maps/0")[-1].encoded_image_string))
    assert image.size == (186, 186)  # 3x3 maps of 10 pixels, each 6x6, and gaps of 2
    assert not lines


def test_feature_maps():
    """Maps stand in a grid as they are in the image, each from black to white, on its own."""
    network = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.ReLU(inplace=True))
    network[0].weight.data = torch.tensor([1.0, -1000.0, 0.0]).view(3, 1, 1, 1)
    images = torch.linspace(-1, 1, 20).view(1, 1, 4, 5).repeat(2, 1, 1, 1)
    images[1] = 9.0  # the second image's are not shown
    watched, notes = make_watch(network, images)
    watched.inside(1, 0.0)
    grid = notes.added["image", "feature_maps/0"]
    assert grid.dtype == torch.uint8 and grid.shape == (1, 2 * (48 + 2), 2 * (60 + 2))
    expected = torch.linspace(0, 255, 20).view(4, 5)
    maps = [grid[0, :48:12, :60:12], grid[0, :48:12, 62:122:12], grid[0, 50:98:12, :60:12]]
    assert (maps[0] - expected).abs().max() <= 1 and (
        maps[1] - expected.flip(0, 1)
    ).abs().max() <= 1
    assert not maps[2].any() and (grid[0, 50:, 62:] == 255).all() and (grid[0, 48:50] == 255).all()
    before = notes.added["histogram", "activations/0"]  # in place, the function changes it later
    assert not before.requires_grad  # no activation was kept for a backward pass
    assert before.min() == -9000 and notes.added["histogram", "activations/1"].min() == 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_histograms_are_of_few_values(layout):
    """10,000 values stand for all of a large tensor, in any layout; a small one is whole."""
    values = torch.arange(8 * 64 * 28 * 28.0).view(8, 64, 28, 28).to(memory_format=layout)
    few = watch._few(values)
    assert len(few) == 10_000 and few[0] == 0 and few[-1] == values.numel() - 1
    assert few.diff().min() >= 40 and few.diff().max() <= 41
    small = torch.randn(3, 4, 5)
    assert torch.equal(watch._few(small), small.flatten())


def test_a_deep_network_is_shown_in_parts():
    """Of 400 layers at most 30 have histograms, at most 6 feature maps: the first and last too."""
    layers = [nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()) for _ in range(200)]
    watched, notes = make_watch(nn.Sequential(*layers), torch.randn(1, 2, 4, 4))
    watched.has_graph = True
    watched.inside(1, 0.0)
    for start, most, last in (("weights/", 30, "199.0"), ("activations/", 30, "199.1")):
        found = notes.tags(start)
        assert len(found) == most and {found[0], found[-1]} == {"0.0", last}
        gaps = np.diff([int(name.split(".")[0]) for name in found])
        assert gaps.min() >= 6 and gaps.max() <= 7
    assert len(notes.tags("feature_maps/")) == 6


def test_a_network_without_maps():
    """A network of matrices has no feature maps, and is otherwise shown like any other."""
    watched, notes = make_watch(deep(nn.ReLU, depth=3), torch.randn(3, 3, 12, 12))
    watched.inside(1, 0.0)
    assert not notes.tags("feature_maps/") and not notes.lines
    assert len(notes.tags("weights/")) == 3 and len(notes.tags("activations/")) == 5


def test_weights_that_are_not_finite():
    """Of weights that are not finite the others are shown, if there are any."""
    network = small_network()
    network[0].weight.data[0] = float("nan")
    network[9].weight.data[:] = float("inf")
    watched, notes = make_watch(network, torch.randn(3, 3, 12, 12))
    watched.inside(1, 0.0)
    assert len(notes.added["histogram", "weights/0"]) == 7 * 27 and not notes.lines
    assert ("histogram", "weights/9") not in notes.added


class Untraceable(nn.Module):
    def forward(self, x):
        if torch.jit.is_tracing():
            raise RuntimeError("not to be traced\nat all")
        return x


class Failing(nn.Module):
    def forward(self, x):
        if not self.training:
            raise ValueError("not to be evaluated")
        return x


@pytest.mark.parametrize("odd", [Untraceable, Failing])
def test_unusual_networks(odd, capsys, tmp_path):
    """What a network does not allow is one line, once; the rest is shown."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), odd())
    lines = []
    board = TensorBoard(tmp_path, 0)
    watched = Watch(network, board, torch.randn(2, 3, 8, 8), REMEDIES, ALWAYS, lines.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # tracing warns, which the user must not see
        watched.inside(1, 0.0)
        watched.inside(2, 1.0)
    board.close()
    reasons = {
        Untraceable: ["TensorBoard gets no graph: RuntimeError: not to be traced"],
        Failing: [
            "TensorBoard gets no activations: ValueError: not to be evaluated",
            "TensorBoard gets no graph: ValueError: not to be evaluated",
        ],
    }
    assert lines == reasons[odd] and capsys.readouterr() == ("", "")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"weights/0", "activations/0"} <= set(events.Tags()["histograms"])


class Noting(nn.Module):
    """Notes what it is given, and whether it was compiled."""

    seen = []  # noqa: RUF012

    def forward(self, x):
        self.seen.append((x.dtype, torch.compiler.is_compiling()))
        return x


@pytest.mark.parametrize("compiled", [False, True])
def test_its_own_precision(compiled):
    """A network that trains in bfloat16, compiled or not, is watched in its own precision."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Noting(), nn.Flatten(), nn.Linear(400, 5))
    if compiled:
        network.compile(backend="eager")
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    network = accelerator.unwrap_model(accelerator.prepare(network))
    train(network, 1)
    forward = network.forward
    Noting.seen.clear()
    watched, notes = make_watch(network, torch.randn(2, 3, 12, 12))
    watched.inside(1, 0.0)
    assert set(Noting.seen) == {(torch.float32, False)} and not notes.lines
    assert notes.tags("activations/") == ["0", "3"] and network.forward == forward
