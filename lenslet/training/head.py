"""The last layer of a pretrained network, fitted before training: what the frozen rest computes is
computed once, for a few views of every image, so this takes a fraction of training it for epochs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lenslet.data.batches import on_device
from lenslet.errors import UserError
from model import head_of

DECAY = 0.01  # of the squared weights, for features of variance 1


def fit_head(network: nn.Module, prepare, loader: DataLoader, augment, views: int, accelerator):
    """Fit a network's last layer to the images of a loader by logistic regression, in place.

    prepare makes the network's input of them, and augment the views of each, as in so many epochs.
    Errors: UserError where the last layer is not one linear layer.
    """
    names = head_of(network)
    head = network.get_submodule(names[0]) if len(names) == 1 else None
    if not isinstance(head, nn.Linear):
        raise UserError("its last layer is not linear, so it cannot be fitted by itself")
    seen = []
    hook = head.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    features, labels = [], []
    network.eval().to(accelerator.device, memory_format=torch.channels_last)
    prepare.to(accelerator.device)
    for view in range(views):
        loader.sampler.epoch = view
        for batch in on_device(loader, accelerator.device):
            images, ours = augment(batch.images, batch.labels, view, batch.index)
            with torch.inference_mode(), accelerator.autocast():
                logits = network(prepare(images)).float()
            inputs, output = (part.float() for part in seen.pop())
            features.append(inputs)
            labels.append(ours)
    hook.remove()
    network.train()  # as on the other processes, where synchronized batch norm waits for this one
    # The logits may be a multiple of what the layer gives, as fastnet's are.
    scale = (logits * output).sum() / output.square().sum()
    weight, bias = _fit(torch.cat(features), torch.cat(labels), head)
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        if head.bias is not None:
            head.bias.copy_(bias / scale)


def _fit(features: Tensor, labels: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
    """The weights [classes, F] and biases [classes] of logistic regression on features [N, F]."""
    deviation, mean = torch.std_mean(features, 0)
    mean = mean if head.bias is not None else torch.zeros_like(mean)
    deviation = deviation.clamp(min=1e-3 * deviation.mean().item())
    features = (features - mean) / deviation
    weight = torch.zeros_like(head.weight, requires_grad=True)
    bias = torch.zeros(len(weight), device=weight.device, requires_grad=head.bias is not None)
    parameters = [p for p in (weight, bias) if p.requires_grad]
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(features, weight, bias), labels)
        value = value + DECAY / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight = weight.detach() / deviation
    return weight, bias.detach() - weight @ mean
