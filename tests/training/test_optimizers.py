"""An optimizer does what its name says, and goes on from a checkpoint, or is refused."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lenslet.errors import UserError
from lenslet.runs import checkpoint
from lenslet.training import optimizers
from model import create_model


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_optimizers_learn(name):
    """Each optimizer holds every trainable parameter once, and lowers a loss."""
    torch.manual_seed(0)
    model = create_model("fastnet", 3, 1, width=8)
    lr = {"adabelief": 0.005, "ranger": 0.05}.get(name, 0.02)
    optimizer = optimizers.create_optimizer(name, model, lr, 0.6, 0.01)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {p for p in model.parameters() if p.requires_grad}
    images, labels = torch.randn(30, 1, 32, 32), torch.arange(30) % 3
    trace = []
    for _ in range(12):
        loss = F.cross_entropy(model(images), labels)
        trace.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert trace[-1] < 0.9 * trace[0]


def test_biases_and_norms_are_not_decayed():
    """Without gradients, weight decay shrinks matrices and filters, and nothing else."""
    for name in optimizers.OPTIMIZERS:
        torch.manual_seed(0)
        model = create_model("resnet10t", 3)
        before = {key: p.detach().clone() + 0 for key, p in model.named_parameters()}
        optimizer = optimizers.create_optimizer(name, model, 0.1, 0.0, 0.5)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for _ in range(6):  # ranger's slow weights move in the sixth step
            optimizer.step()
        for key, p in model.named_parameters():
            moved = not torch.equal(p, before[key])
            # muon's last layer is AdamW's, without decay
            assert moved == (p.ndim > 1 and not (name == "muon" and key == "fc.weight")), (
                name,
                key,
            )


def test_sgd_has_nesterov_momentum():
    """--nesterov gives the steps of torch.optim.SGD's, and without it the plain ones."""
    for nesterov in (False, True):
        torch.manual_seed(0)
        ours, theirs = create_model("lenet", 2), create_model("lenet", 2)
        theirs.load_state_dict(ours.state_dict())
        one = optimizers.create_optimizer("sgd", ours, 0.1, 0.9, 0.0, nesterov)
        other = torch.optim.SGD(theirs.parameters(), 0.1, 0.9, nesterov=nesterov)
        for _ in range(3):
            for model, optimizer in ((ours, one), (theirs, other)):
                model(torch.ones(2, 3, 32, 32)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q)


def trained(name, folder, stop):
    """The parameters of a tiny network after 10 steps, of which a checkpoint may be after 6."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    optimizer = optimizers.create_optimizer(name, network, 0.01, 0.9, 0.01)
    for step in range(10):
        if stop and step == 6:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            path = checkpoint.save_checkpoint(folder / name, step, state)
            state = checkpoint.load_checkpoint(path)
            network.load_state_dict(state["network"])
            optimizer = optimizers.create_optimizer(name, network, 0.01, 0.9, 0.01)
            optimizer.load_state_dict(state["optimizer"])
        network(torch.linspace(-1, 1, 16).view(1, 1, 4, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in network.parameters()]


SECOND, RANDOM = "it needs second derivatives, ", "it draws random numbers of its own, "


def why_not(name):
    """What timm's own description and source of an optimizer say against it; '' if nothing."""
    from timm.optim import get_optimizer_info

    info = get_optimizer_info(name.removeprefix("lookahead_"))
    if info.second_order:
        return SECOND
    source = inspect.getsource(info.opt_class) if inspect.isclass(info.opt_class) else ""
    return RANDOM if "random.Random(" in source or ".Generator(" in source else ""


@pytest.mark.filterwarnings("ignore")
def test_every_name_of_timm(tmp_path):
    """Any optimizer of timm's is made, or refused in one line for what it needs; what is made goes
    on from a checkpoint to the same bits.  Those with second derivatives, or a generator of their
    own, are refused for that, and no others.
    """
    from timm.optim import list_optimizers

    made, refused = [], {}
    for name in [*list_optimizers(), "lookahead_adam", "lookahead_kron", "lookahead_adahessian"]:
        optimizers.check_optimizer(name)
        try:
            ends = [trained(name, tmp_path, stop) for stop in (False, True)]
        except UserError as error:
            refused[name] = str(error)
        else:
            made.append(name)
            assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True)), name
    assert len(made) > 80
    for name in made:
        assert not why_not(name), name
    for name, said in refused.items():
        assert "\n" not in said
        assert said.startswith(why_not(name) or "cannot be used here: "), (name, said)
        # All others need a package or a GPU.
        assert why_not(name) or name.startswith(("bnb", "fused")), (name, said)
    reasons = [said.partition("which")[0] for said in refused.values()]
    assert reasons.count(SECOND) >= 2 and reasons.count(RANDOM) >= 4


@pytest.mark.parametrize("name", ["adamww", "lookahead_adamww", "", "lookahead_", "SGD"])
def test_unknown_optimizers(name):
    """A name that neither timm nor we have is refused, with the nearest and those tested."""
    with pytest.raises(UserError, match=f"^no optimizer '{name}'") as caught:
        optimizers.check_optimizer(name)
    assert ", ".join(optimizers.OPTIMIZERS) in str(caught.value)
    assert name != "adamww" or "did you mean adamw?" in str(caught.value)


def test_muon_orthogonalises_filters():
    """A filter's step has equal singular values; the last layer goes by AdamW."""
    torch.manual_seed(0)
    model = create_model("fastnet", 3, 1, width=8)
    optimizer = optimizers.create_optimizer("muon", model, 1.0, 0.0, 0.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    F.cross_entropy(model(torch.randn(30, 1, 32, 32)), torch.arange(30) % 3).backward()
    optimizer.step()
    steps = {name: p - before[name] for name, p in model.named_parameters()}
    values = torch.linalg.svdvals(steps["blocks.1.conv2.weight"].flatten(1))
    assert values.min() > 0.5 * values.max()  # Newton-Schulz gives them within bounds
    head = steps[
        "head.weight"
    ].abs()  # Adam's first step is the same for all, whatever the gradient
    assert head.std() < 0.01 * head.mean()
    assert not steps["whitening.weight"].any()


def test_l1_is_of_the_decayed_weights():
    """The penalty's gradient is the sign of each weight, and none of a bias."""
    model = create_model("lenet", 2)
    optimizers.l1_penalty(model, 0.3)().backward()
    for p in model.parameters():
        if p.ndim > 1:
            assert torch.equal(p.grad, 0.3 * p.sign())
        else:
            assert p.grad is None
    assert optimizers.l1_penalty(model, 0.0)() == 0
