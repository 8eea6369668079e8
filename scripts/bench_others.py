"""What bench.py compares this code with: loops as others write them, by plain PyTorch.

    tutorial(data)          a CIFAR-10 tutorial's loop, image by image
    airbench94(data)        the fastest published method, from its paper
    resnet18_epoch(…)       timm's ResNet-18 in a bare loop
    image_folder(path)      torchvision's ImageFolder

Nothing of ours is in them but the tutorial's network, the loader that reads the images once, and
the choice of the device and its precision.  They say what they reach; nothing is printed.
"""

import _root  # noqa: F401, I001 (before torch)
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lenslet.data.load import load
from lenslet.distributed.precision import autocast, choose_device, choose_precision
from lenslet.distributed.start import device_time
from lenslet.errors import UserError, error_context
from model import TutorialCNN


def read_images(data: str) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """The number of classes; and to train and to test: uint8 [N, C, 32, 32] and int64 [N].

    Small images of another size are resized.  Errors: UserError for photographs, and without a
    test split.
    """
    found = []
    with error_context(f"--data {data}"):
        opened = load(data, ["train", "test"], val=0)
        for split in ("train", "test"):
            part = opened.splits.get(split)
            if not (part and part.in_memory):
                raise UserError(f"needs {split} images of up to 64 pixels")
            images = part.pixels(torch.arange(len(part)))
            if images.shape[2:] != (32, 32):
                resized = F.interpolate(images.float(), (32, 32), mode="bilinear", antialias=True)
                images = resized.round().to(torch.uint8)
            found.append((images, part.labels))
    return len(opened.classes), found


class Images(Dataset):
    """Images in memory as torchvision's CIFAR10 gives them: one by one, by PIL and ToTensor."""

    def __init__(self, images: Tensor, labels: Tensor, transform):
        self.arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels, self.transform = labels.tolist(), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.arrays[i].squeeze())), self.labels[i]


def tutorial(data: str, epochs: int, seed: int) -> dict:
    """The loop as the CIFAR-10 tutorials write it: seconds of training, accuracy, and the same
    after each epoch.

    The images are shuffled: those of a folder come sorted by class.
    """
    from torchvision.transforms import ToTensor

    torch.manual_seed(seed)
    classes, parts = read_images(data)
    train, test = (Images(*part, ToTensor()) for part in parts)
    train_loader, test_loader = DataLoader(train, 64, shuffle=True), DataLoader(test, 64)
    network = TutorialCNN(classes, channels=parts[0][0].shape[1])
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    seconds, curve = 0.0, []
    for _ in range(epochs):
        began = time.perf_counter()
        network.train()
        for images, labels in train_loader:
            loss = loss_fn(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds += time.perf_counter() - began
        network.eval()
        with torch.no_grad():
            hits = sum((network(x).argmax(1) == y).sum().item() for x, y in test_loader)
        curve.append({"train_seconds": seconds, "accuracy": hits / len(test)})
    return curve[-1] | {"curve": curve}


BATCH = 1024  # of airbench94


class Airbench94(nn.Sequential):
    """The network of airbench94: images [N, C, 32, 32] -> logits [N, classes].

    Written from its paper (Keller Jordan 2024, arXiv:2404.00498), as is all that trains it below.
    The first layer whitens 2×2 patches, its filters computed from `images` as they are fed.
    """

    def __init__(self, classes: int, images: Tensor):
        channels = images.shape[1]
        patches = F.unfold(images, 2).transpose(1, 2).flatten(0, 1)  # [patches, 4 C]
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (directions / (variances + 5e-4).sqrt()).T.reshape(-1, channels, 2, 2)
        whitening = nn.Conv2d(channels, 8 * channels, 2)
        whitening.weight = nn.Parameter(torch.cat([filters, -filters]), requires_grad=False)
        nn.init.zeros_(whitening.bias)
        widths, layers = [8 * channels, 64, 256, 256], [whitening, nn.GELU()]
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            layers += [_conv(inputs, outputs), nn.MaxPool2d(2), _norm(outputs), nn.GELU()]
            layers += [_conv(outputs, outputs), _norm(outputs), nn.GELU()]
        head = nn.Linear(256, classes, bias=False)
        super().__init__(*layers, nn.MaxPool2d(3), nn.Flatten(), head)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) / 9


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    """A convolution whose first maps are at first copies of its inputs."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:inputs])
    return conv


def _norm(maps: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(maps, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad = False
    return norm


def airbench94(data: str, epochs: float, seed: int) -> dict:
    """Train airbench94 for 9.9 epochs, or so many: seconds of training, and test accuracies.

    In bf16 where the device has it.  The seconds are those from the first look at the images to
    the last step.  Fewer images than the batch of 1,024 are one batch.
    """
    torch.manual_seed(seed)
    classes, parts = read_images(data)
    device = choose_device()
    (images, labels), test = (tuple(x.to(device) for x in part) for part in parts)
    began = device_time(device)
    some = images[torch.randperm(len(images))[:5000].to(device)]
    pixels = some.float() / 255
    mean, std = pixels.mean((0, 2, 3), True), pixels.std((0, 2, 3), keepdim=True).clamp(min=1e-3)

    def normalized(images):
        images = (images.float() / 255 - mean) / std
        return images.contiguous(memory_format=torch.channels_last)

    network = Airbench94(classes, normalized(some))
    network.to(device, memory_format=torch.channels_last).train()
    batch = min(BATCH, len(images))
    total = math.ceil(len(images) // batch * epochs)
    optimizer, lookahead = Optimizer(network, batch, total), Lookahead(network, total)
    mirrored, step = torch.rand(len(images), device=device) < 0.5, 0
    precise = autocast(device, choose_precision("auto", device.type))
    for epoch in range(math.ceil(epochs)):
        network[0].bias.requires_grad = epoch < 3
        order = torch.randperm(len(images), device=device)
        for index in order[: len(images) // batch * batch].split(batch)[: total - step]:
            x = moved(normalized(images[index]), mirrored[index] ^ (epoch % 2 == 1))
            with precise:
                logits = network(x)
            smoothed = {"label_smoothing": 0.2, "reduction": "sum"}
            F.cross_entropy(logits.float(), labels[index], **smoothed).backward()
            optimizer.step(step)
            step += 1
            lookahead.step(network, step)
    seconds = device_time(device) - began
    network.eval()
    hits = torch.zeros(2)
    for x, y in zip(test[0].split(2000), test[1].split(2000), strict=True):
        with torch.inference_mode(), precise:
            views = [(weight, network(view).float()) for weight, view in six_views(normalized(x))]
        for k, logits in enumerate((views[0][1], sum(w * found for w, found in views))):
            hits[k] += (logits.argmax(1) == y).sum().item()
    plain, averaged = (hits / len(test[1])).tolist()
    return {"train_seconds": seconds, "accuracy": plain, "tta_accuracy": averaged}


class Optimizer:
    """SGD of Nesterov's kind on a summed loss, with a learning rate that rises and falls.

    The paper's rate 11.5 and decay 0.0153 are those of 1,024 images, whatever the batch, and
    decoupled: from each other, and from momentum, which makes each gradient count 1 / (1 - 0.85)
    times in steps to come, and once at once.  Batch norm's biases learn 64 times as fast.
    """

    def __init__(self, network: nn.Module, batch: int, total: int):
        images = 1024 * (1 + 1 / (1 - 0.85))
        lr, decay, groups = 11.5 / images, 0.0153 * batch / images, ([], [])
        for module in network:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    groups[isinstance(module, nn.BatchNorm2d)].append(parameter)
        self.rates = [lr, 64 * lr]
        rows = zip(groups, self.rates, strict=True)
        # PyTorch multiplies the decay by the rate.
        settings = [{"params": g, "lr": rate, "weight_decay": decay / rate} for g, rate in rows]
        self.sgd = torch.optim.SGD(settings, momentum=0.85, nesterov=True)
        self.total, self.peak = total, math.floor(0.23 * total)

    def step(self, step: int) -> None:
        """From 0.2 of the rate up to all of it after 23 % of the steps, and down to 0.07."""
        rising = step < self.peak
        share = step / self.peak if rising else (step - self.peak) / (self.total - self.peak)
        scale = 0.2 + 0.8 * share if rising else 1 - 0.93 * share
        for group, rate in zip(self.sgd.param_groups, self.rates, strict=True):
            group["lr"] = rate * scale
        self.sgd.step()
        self.sgd.zero_grad()


class Lookahead:
    """Slow weights, which every five steps follow the fast ones, and are then theirs too.

    They follow less and less: they keep a share of 0.95^5, times the cube of the progress; at the
    end all.  (Zhang et al. 2019, arXiv:1907.08610, with the paper's schedule.)
    """

    def __init__(self, network: nn.Module, total: int):
        self.slow, self.total = [t.clone() for t in self.tensors(network)], total

    @staticmethod
    def tensors(network: nn.Module) -> list[Tensor]:
        return [t for t in network.state_dict().values() if t.is_floating_point()]

    @torch.no_grad()
    def step(self, network: nn.Module, step: int) -> None:
        """Call it after so many steps."""
        kept = [0.95**5 * (step / self.total) ** 3] if step % 5 == 0 else []
        for share in [*kept, 1.0] if step == self.total else kept:
            for slow, fast in zip(self.slow, self.tensors(network), strict=True):
                fast.copy_(slow.lerp_(fast, 1 - share))


def moved(images: Tensor, mirrored: Tensor) -> Tensor:
    """Images [B, C, 32, 32], mirrored where bool [B] says so, and shifted at random by up to 2
    pixels in each direction, the border reflected.

    Each image is mirrored in every other epoch, beginning with a random one: the caller's doing.
    """
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (2, 2, 2, 2), "reflect")
    each, side = (torch.arange(n, device=images.device) for n in (len(images), 32))
    rows, columns = torch.randint(5, (2, len(images), 1), device=images.device) + side
    # The sliced dimension comes last: [B, 32, 32, C], which is channels_last once it is moved.
    return padded[each[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def six_views(images: Tensor) -> list[tuple[float, Tensor]]:
    """Weights and images [B, C, 32, 32]: as they are, a pixel to the upper left, and one to the
    lower right; each mirrored too.
    """
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    shifted = padded[:, :, 2:, 2:], padded[:, :, :-2, :-2]
    views = [(0.5, images), *((0.25, view) for view in shifted)]
    return [(weight / 2, x) for weight, view in views for x in (view, view.flip(3))]


def resnet18_epoch(images: Tensor, labels: Tensor, batch: int, like: nn.Module, precise):
    """A function that trains timm's ResNet-18 for an epoch on images in memory, in a bare loop.

    images uint8 [N, C, H, W], labels int64 [N], on the device; precise(): the autocast to use;
    like: ours, which says the classes and the first layers' strides.  timm's own are those for
    photographs, and leave 1×1 of 32×32 pixels: a sixteenth of the work.
    """
    import timm

    settings = {"num_classes": like.num_classes, "in_chans": images.shape[1]}
    network = timm.create_model("resnet18", **settings)
    network.conv1.stride, network.maxpool = like.conv1.stride, like.maxpool
    network.to(images.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def epoch():
        for index in torch.randperm(len(images), device=images.device).split(batch):
            x = (images[index].float() / 255 - 0.5) / 0.25
            with precise():
                logits = network(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def image_folder(path: Path):
    """Photographs path/<class>/* by torchvision, as usual for ImageNet: float [3, 224, 224]."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

    return ImageFolder(path, Compose([Resize(256), CenterCrop(224), ToTensor()]))


def generate_photos(folder: Path, count: int = 24) -> str:
    """12-megapixel JPEG files with the detail of photographs, in two classes."""
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (60, 80, 3), np.uint8))
        large = np.asarray(coarse.resize((4000, 3000), Image.Resampling.BICUBIC), np.int16)
        grain = generator.normal(0, 6, large.shape).astype(np.int16)
        path = folder / "train" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((large + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return str(folder)
