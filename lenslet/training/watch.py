"""What goes on inside a network while it trains, for TensorBoard: `train.py --watch`.

    watch/gradient_norm/<layer>  scalars, and a warning where gradients vanish or explode
    weights/<layer>              histograms of filters and matrices
    activations/<layer>          histograms of the outputs of layers and activation functions
    feature_maps/<layer>         what convolutions make of one image
    the graph                    once

A layer is a module with parameters of its own, called by its name in the network.
"""

import contextlib
import copy
import io
import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lenslet.data.batches import evenly_spaced
from lenslet.distributed.start import device_time

# At most so many layers with histograms of each kind; values in a histogram, and its columns.
LAYERS, VALUES, BINS = 30, 10_000, 64
# At most so many layers with feature maps; maps of each, and their side in pixels, about.
MAP_LAYERS, MAPS, SIDE = 6, 16, 64
# For diagnose(); measured in 20 networks over the first steps with SGD at lr 0.1, AdamW or Muon.
# The first layer has at least 2e-4 of the last one's gradient, but none in step 0 if the last
# matrix starts at zero; six layers with sigmoid have 2e-5, and twelve 5e-10.  The change of the
# loss is at most 63, and 0.01 where the norm is above 1000: that is fastnet on digits, 18,000,
# whose batch norm divides by nearly nothing.  In ReLU networks of 6 to 20 layers, with 3 times He's
# first weights or 5 to 10 times PyTorch's, it is 900 to 4e9, the norm 1500 to 1e10.  Some of the 20
# get there too: VGG-19 when AdamW's first step ruins it, a ViT whose loss SGD drives to 15, and
# Inception-v4 on 4 images of 32 pixels.
VANISHING, EXPLODING, LOSS_CHANGE = 1e-5, 1000, 100
VANISHING_STEPS = 100  # that gradients must have been vanishing before a warning


class Watch:
    """Logs what goes on inside a network, and changes no bit of its training.

    network: without wrappers, on its device.  board: a TensorBoard.  images: float [B, C, H, W], B
    up to 32, as the network is fed them, on its device; feature maps are the first one's.
    remedies: the advice in a warning, for gradients that are infinite, exploding and vanishing.
    share: of the training time that this may take, not counting the first time.  say: is given
    warnings, a line each.  scaler: fp16's GradScaler, by whose scale gradients are multiplied.
    Nothing here waits for another process.
    """

    def __init__(self, network, board, images, remedies, share=0.04, say=print, scaler=None):
        self.network, self.board, self.images = network, board, images
        self.remedies, self.share, self.say, self.scaler = remedies, share, say, scaler
        self.due = {self._gradients: 0.0, self._inside: 0.0}  # when next, in seconds of training
        self.warned = set()  # of (kind, layer), and of what cannot be shown
        self.healthy = None  # the last step, of those watched, without vanishing gradients
        self.has_graph = False

    def gradients(self, step: int, seconds: float) -> None:
        """The norm of each layer's gradient, and diagnose()'s warnings, once a layer and kind.

        Call it after the backward pass of each step, before gradients are clipped and applied.
        seconds: of training so far, including the time spent here.  What is frozen or has no
        gradient is left out.
        """
        self._do_if_due(self._gradients, step, seconds)

    def inside(self, step: int, seconds: float) -> None:
        """Histograms and feature maps, and the first time the graph.  Call it after each epoch.

        A copy of the network computes them, in evaluation mode and its parameters' precision.
        """
        self._do_if_due(self._inside, step, seconds)

    def _do_if_due(self, work, step: int, seconds: float) -> None:
        """Do the work, unless it would take more than half of share; there are two kinds of it."""
        if seconds < self.due[work]:
            return
        began = device_time(self.images.device)
        work(step)
        cost = device_time(self.images.device) - began
        # A curve of more than some thousand points shows no more, and its file grows.
        self.due[work] = seconds + max(2 * cost / self.share, seconds / 1000)

    def _gradients(self, step: int) -> None:
        layers = {}
        for name, layer in _layers(self.network).items():
            own = layer.parameters(recurse=False)
            if own := [p for p in own if p.requires_grad and p.grad is not None]:
                layers[name] = own
        if not layers:
            return
        gradients = [p.grad for own in layers.values() for p in own]
        norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))
        norms = iter(norms.tolist())  # one transfer: this is where the CPU waits for the device
        scale = self.scaler.get_scale() if self.scaler else 1.0
        norm, rms = {}, {}
        for name, own in layers.items():
            norm[name] = math.hypot(*(next(norms) for _ in own)) / scale
            rms[name] = norm[name] / math.sqrt(sum(p.numel() for p in own))
            self.board.add("scalar", f"watch/gradient_norm/{name}", norm[name], step)

        def loss_change(name: str) -> float:
            return abs(sum((p.detach() * p.grad).sum().item() for p in layers[name])) / scale

        self._warn(diagnose(norm, rms, loss_change), norm, step)

    def _warn(self, found: dict[str, list[str]], norm: dict[str, float], step: int) -> None:
        """Say what diagnose() found, once a kind and layer, and vanishing ones when that lasts."""
        if self.healthy is None or not found["vanishing"]:
            self.healthy = step
        if step < self.healthy + VANISHING_STEPS:
            found["vanishing"] = []
        if self.scaler:  # skips a step with infinite gradients by itself
            found["infinite"] = []
        for kind, names in found.items():
            if names and (kind, names[0]) not in self.warned:
                self.warned.add((kind, names[0]))
                more = f" and {len(names) - 1} more" if names[1:] else ""
                line = f"{kind} gradient: {names[0]}{more} at step {step}"
                self.say(f"{line}, norm {norm[names[0]]:.2g}: {self.remedies[kind]}")

    @torch.no_grad()
    def _inside(self, step: int) -> None:
        values, maps = {}, {}  # by tag, of any shape; by layer, [maps, h, w]
        with self._survive("activations"):
            network = self._copy()
            _attach(network, values, maps)
            network(self.images)
        for name in _pick(maps, MAP_LAYERS):
            values[f"feature_maps/{name}"] = maps[name]
        if values:
            self._add_values(values, step)
        if not self.has_graph:
            self.has_graph = True
            with self._survive("graph"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TensorBoard needs tracing, which is deprecated
                with contextlib.redirect_stdout(io.StringIO()):  # where failures are printed too
                    self.board.add("graph", self._copy().cpu(), self.images[:1].cpu())
        self.board.flush(step)  # writing takes time too

    def _add_values(self, values: dict[str, Tensor], step: int) -> None:
        """Feature maps as images, the others as histograms of what is finite in them."""
        parts = [part.flatten().float() for part in values.values()]
        # One transfer for all of them: this is where the CPU waits for the device.
        parts = torch.cat(parts).cpu().split([len(part) for part in parts])
        for tag, part in zip(values, parts, strict=True):
            if tag.startswith("feature_maps/"):
                self.board.add("image", tag, _grid(part.view(values[tag].shape)), step)
            elif len(part := part[part.isfinite()]):
                self.board.add("histogram", tag, part, step, BINS)

    def _copy(self) -> nn.Module:
        """A copy of the network in evaluation mode: hooks on it do not touch the training."""
        network = copy.deepcopy(self.network).eval()  # leaves out what was compiled
        network.__dict__.pop("forward", None)  # Accelerate's, with autocast
        return network

    @contextlib.contextmanager
    def _survive(self, what: str):
        """Report once what an unusual network does not allow, and restore the random state."""
        try:
            with torch.random.fork_rng([self.images.device] if self.images.is_cuda else []):
                yield
        except Exception as error:
            if what not in self.warned:
                reason = str(error).strip().partition("\n")[0]
                self.say(f"TensorBoard gets no {what}: {type(error).__name__}: {reason}")
            self.warned.add(what)


def diagnose(
    norm: dict[str, float], rms: dict[str, float], loss_change: Callable[[str], float]
) -> dict[str, list[str]]:
    """What is wrong with the gradients: {kind: layers}, the worst layer first.

    norm, rms: of each layer's gradient, in the layers' order; rms is the root mean square.
    loss_change: by how much the loss would change, to first order, if a layer's weights were zero.

    infinite    or not a number; then nothing else is checked
    exploding   the norm is above 1000, and the loss would change by more than 100; batch norm makes
                gradients as large across the weights, which does no harm
    vanishing   the root mean square, and those of all layers before, are at most 1e-5 of the last
                layer's
    """
    # What is infinite spreads from the last layer to the first.
    found = {"infinite": [name for name in norm if not math.isfinite(norm[name])][::-1]}
    found |= {"exploding": [], "vanishing": []}
    if not found["infinite"]:
        large = sorted((name for name in norm if norm[name] > EXPLODING), key=norm.get)
        found["exploding"] = [name for name in large[::-1] if loss_change(name) > LOSS_CHANGE]
        # Not every layer on its own: those in a residual block that starts as zero have no
        # gradient at first, and those before it learn.
        if small := VANISHING * list(rms.values())[-1]:
            found["vanishing"] = list(itertools.takewhile(lambda name: rms[name] <= small, rms))
    return found


def _layers(network: nn.Module, functions: bool = False) -> dict[str, nn.Module]:
    """The layers in order, the network itself by its class; functions: activation functions too."""
    return {
        name or type(network).__name__: layer
        for name, layer in network.named_modules()
        if next(layer.parameters(recurse=False), None) is not None
        or (functions and "activation" in type(layer).__module__)  # torch's and timm's
    }


def _attach(network: nn.Module, values: dict, maps: dict) -> None:
    """Fill values with the weights now, and values and maps with outputs when the network runs."""
    for name, layer in _layers(network).items():
        weight = max(layer.parameters(recurse=False), key=Tensor.numel)
        if weight.dim() > 1:
            values[f"weights/{name}"] = _few(weight)
    for tag in set(values) - set(_pick(values, LAYERS)):
        del values[tag]

    def note(layer, inputs, output, tag):
        if isinstance(output, Tensor):
            values[tag] = _few(output)

    def note_maps(layer, inputs, output, name):  # output [B, C, H, W]
        if output[0, 0].numel() > 1:
            few = output[:1, :: max(1, output.shape[1] // MAPS)][:, :MAPS]
            smaller = -(-max(few.shape[2:]) // SIDE)
            maps[name] = F.avg_pool2d(few, smaller, ceil_mode=True)[0]

    layers = _layers(network, functions=True)
    for name in _pick(layers, LAYERS):
        layers[name].register_forward_hook(partial(note, tag=f"activations/{name}"))
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(partial(note_maps, name=name))


def _pick(names, most: int) -> list[str]:
    """At most so many of the names, evenly spaced, the first and the last included."""
    names = list(names)
    return [names[i] for i in evenly_spaced(len(names), most)]


def _few(values: Tensor) -> Tensor:
    """A copy of at most VALUES evenly spaced values of any tensor, [N]."""
    count = min(VALUES, values.numel())
    # In integers: evenly_spaced() computes in float32, which ends at 16 million values.
    places = torch.arange(count, device=values.device) * (values.numel() - 1) // max(1, count - 1)
    return values.take(places)


def _grid(maps: Tensor) -> Tensor:
    """Maps, float [N, h, w], side by side as uint8 [1, H, W], each from black to white.

    Gaps are white.  Small maps are enlarged, each pixel to a square.  A map of one value is black.
    """
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    maps = ((maps - low) / (high - low).clamp_min(1e-30)).nan_to_num(0, 0, 0)
    scale = max(1, SIDE // max(maps.shape[1:]))
    maps = maps.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    across = math.ceil(math.sqrt(len(maps)))
    maps = F.pad(maps, (0, 2, 0, 2, 0, -len(maps) % across), value=1.0)
    rows = maps.unflatten(0, (-1, across)).transpose(1, 2)  # [down, h, across, w]
    return (255 * rows.flatten(2).flatten(0, 1)).to(torch.uint8)[None]
