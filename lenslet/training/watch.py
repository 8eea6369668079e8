"""A look inside the network while it trains, in TensorBoard: `train.py --watch`.

    gradient_norm/<layer>   scalars, and a warning where gradients vanish or explode
    weights/<layer>         histograms of filters and matrices
    activations/<layer>     histograms of what layers and activation functions put out
    feature_maps/<layer>    what convolutions make of one picture
    the graph               once

A layer is a module with parameters of its own, called by its name in the network.
"""

import contextlib
import copy
import io
import itertools
import math
import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lenslet.distributed.start import device_time

LAYERS, VALUES, BINS = 30, 10_000, 64  # histograms of a kind at most; of each, values and columns
PICTURES, MAPS, SIDE = 6, 16, 64  # layers with feature maps; of each, maps and their pixels, about
# Of judge(); measured in 20 networks over the first steps with SGD at lr 0.1, AdamW or Muon.
# The first layer has at least 2e-4 of the last one's gradient, but none in step 0 where the last
# matrix begins at zero; six layers with sigmoid have 2e-5, and twelve 5e-10.  Along the weights it
# is at most 63, and where its norm is above 1000, 0.01: that is fastnet on digits, 18,000, whose
# batch norm divides by nearly nothing.  In ReLU networks of 6 to 20 layers, with 3 times He's first
# weights or 5 to 10 times PyTorch's, it is 900 to 4e9, the norm 1500 to 1e10.  Of the 20, some come
# there too: VGG-19 when AdamW's first step ruins it, a ViT whose loss SGD drives to 15, and
# Inception-v4 on 4 pictures of 32 pixels.
VANISHING, STEPS, EXPLODING, ALONG = 1e-5, 100, 1000, 100
REMEDIES = {
    "infinite": "lower --lr, or give --clip",
    "exploding": "lower --lr, or give --clip or --warmup",
    "vanishing": "batch norm, residual connections, or ReLU in place of sigmoid may help",
}


class Watch:
    """Logs what goes on inside a network, and changes no bit of its training.

    network: without wrappers, on its device.  images float [B, C, H, W], B up to 32: as it is fed
    them, and there too; feature maps are the first one's.  share: of the time of training that
    looking may take, but for a first look.  say: is given warnings, a line each.  scaler: the
    GradScaler of fp16, whose multiple the gradients are.  Nothing waits for another process.
    """

    def __init__(self, network, curves, images: Tensor, share=0.04, say=print, scaler=None):
        self.network, self.curves, self.images = network, curves, images
        self.share, self.say, self.scaler = share, say, scaler
        self.due = {self._gradients: 0.0, self._inside: 0.0}  # in seconds of training
        self.said, self.arrived, self.has_graph = set(), None, False

    def gradients(self, step: int, seconds: float) -> None:
        """The norm of each layer's gradient, and judge()'s warnings, one for each layer and kind.

        For after the backward pass of each step, before gradients are clipped and applied.
        seconds: of training so far, looks counted in.  What is frozen or has no gradient is left
        out.
        """
        self._look(self._gradients, step, seconds)

    def inside(self, step: int, seconds: float) -> None:
        """Histograms and feature maps, and the first time the graph.  For the end of each epoch.

        A copy of the network computes them, which evaluates in the precision of its parameters.
        """
        self._look(self._inside, step, seconds)

    def _look(self, work, step: int, seconds: float) -> None:
        """Work, and then pause until it took half of `share`, as there are two kinds of work."""
        if seconds >= self.due[work]:
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
        every = [p.grad for own in layers.values() for p in own]
        norms = torch.stack(torch._foreach_norm(every, 2, torch.float32))
        norms = iter(norms.tolist())  # the one time that the device is waited for
        scale = self.scaler.get_scale() if self.scaler else 1.0
        norm, rms = {}, {}
        for name, own in layers.items():
            norm[name] = math.hypot(*(next(norms) for _ in own)) / scale
            rms[name] = norm[name] / math.sqrt(sum(p.numel() for p in own))
            self.curves.add("scalar", f"gradient_norm/{name}", norm[name], step)

        def along(name: str) -> float:
            return abs(sum((p.detach() * p.grad).sum().item() for p in layers[name])) / scale

        found = judge(norm, rms, along)
        if self.arrived is None or not found["vanishing"]:
            self.arrived = step
        if step < self.arrived + STEPS:
            found["vanishing"] = []
        if self.scaler:  # leaves such a step out by itself
            found["infinite"] = []
        for kind, names in found.items():
            if names and (kind, names[0]) not in self.said:
                self.said.add((kind, names[0]))
                more = f" and {len(names) - 1} more" if names[1:] else ""
                line = f"{kind} gradient: {names[0]}{more} at step {step}"
                self.say(f"{line}, norm {norm[names[0]]:.2g}: {REMEDIES[kind]}")

    @torch.no_grad()
    def _inside(self, step: int) -> None:
        values, maps = {}, {}  # by tag, of any shape; by layer, [maps, h, w]
        with self._survive("look inside"):
            network = self._copy()
            _attach(network, values, maps)
            network(self.images)
        values |= {f"feature_maps/{name}": maps[name] for name in _spread(maps, PICTURES)}
        if values:
            parts = [part.flatten().float() for part in values.values()]
            # The one time that the device is waited for.
            parts = torch.cat(parts).cpu().split([len(part) for part in parts])
            for tag, part in zip(values, parts, strict=True):
                if tag.startswith("feature_maps/"):
                    self.curves.add("image", tag, _grid(part.view(values[tag].shape)), step)
                elif len(part := part[part.isfinite()]):
                    self.curves.add("histogram", tag, part, step, BINS)
        if not self.has_graph:
            self.has_graph = True
            with self._survive("graph"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TensorBoard needs tracing, which is deprecated
                with contextlib.redirect_stdout(io.StringIO()):  # where failures are printed too
                    self.curves.add("graph", self._copy().cpu(), self.images[:1].cpu())
        self.curves.flush(step)  # writing takes time too

    def _copy(self) -> nn.Module:
        """The network's twin, which evaluates: what is done to it does not touch the training."""
        network = copy.deepcopy(self.network).eval()  # leaves out what was compiled
        network.__dict__.pop("forward", None)  # Accelerate's, with autocast
        return network

    @contextlib.contextmanager
    def _survive(self, what: str):
        """Say once what an unusual network does not allow, and go on with the old random state."""
        try:
            with torch.random.fork_rng([self.images.device] if self.images.is_cuda else []):
                yield
        except Exception as error:
            if what not in self.said:
                reason = str(error).strip().partition("\n")[0]
                self.say(f"no {what} of this network: {type(error).__name__}: {reason}")
            self.said.add(what)


def judge(norm: dict[str, float], rms: dict[str, float], along) -> dict[str, list[str]]:
    """What is wrong with gradients: the layers, the worst first, by kind.

    Given the norm and the root mean square of each layer's gradient, in the layers' order, and a
    function that says how much the loss would change, to first order, were a layer's weights zero.

    infinite    or not a number; then nothing else is judged
    exploding   the norm is above 1000, and the loss would change by more than 100; batch norm makes
                gradients as large across the weights, which does no harm
    vanishing   the root mean square, and those of all layers before, are at most 1e-5 of the last
                layer's; said when it was so for 100 steps
    """
    # What is infinite spreads from the last layer to the first.
    found = {"infinite": [name for name in norm if not math.isfinite(norm[name])][::-1]}
    found |= {"exploding": [], "vanishing": []}
    if not found["infinite"]:
        large = sorted((name for name in norm if norm[name] > EXPLODING), key=norm.get)
        found["exploding"] = [name for name in large[::-1] if along(name) > ALONG]
        # Not every layer on its own: those in a residual block that begins as nothing have no
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
    """Have values and maps filled: with weights at once, with outputs when the network runs."""
    for name, layer in _layers(network).items():
        weight = max(layer.parameters(recurse=False), key=Tensor.numel)
        if weight.dim() > 1:
            values[f"weights/{name}"] = _few(weight)
    for tag in set(values) - set(_spread(values, LAYERS)):
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
    for name in _spread(layers, LAYERS):
        layers[name].register_forward_hook(partial(note, tag=f"activations/{name}"))
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(partial(note_maps, name=name))


def _spread(names, most: int) -> list[str]:
    """At most so many of the names, evenly spaced, the first and the last among them."""
    names, count = list(names), min(most, len(names))
    return [names[i * (len(names) - 1) // max(1, count - 1)] for i in range(count)]


def _few(values: Tensor) -> Tensor:
    """A copy of at most VALUES evenly spaced values of any tensor, [N]."""
    count = min(VALUES, values.numel())
    places = torch.arange(count, device=values.device) * (values.numel() - 1) // max(1, count - 1)
    return values.take(places)


def _grid(maps: Tensor) -> Tensor:
    """Float [N, h, w] side by side, each from black to white, as uint8 [1, H, W]; gaps are white.

    Small ones are enlarged, each pixel to a square.  A map of one value is black.
    """
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    maps = ((maps - low) / (high - low).clamp_min(1e-30)).nan_to_num(0, 0, 0)
    scale = max(1, SIDE // max(maps.shape[1:]))
    maps = maps.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    across = math.ceil(math.sqrt(len(maps)))
    maps = F.pad(maps, (0, 2, 0, 2, 0, -len(maps) % across), value=1.0)
    rows = maps.unflatten(0, (-1, across)).transpose(1, 2)  # [down, h, across, w]
    return (255 * rows.flatten(2).flatten(0, 1)).to(torch.uint8)[None]
