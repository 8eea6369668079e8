"""Running sums are of all processes and lose nothing; what goes wrong is said with what to try."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lenslet.errors import OutsideError, UserError
from lenslet.training.meter import Meter, diverged, explain_errors, largest_gradient

LOGITS = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
TARGETS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.2, 0.8]])  # two of three are right


class Processes(SimpleNamespace):
    """Stands for an Accelerator, whose other processes have what this one has."""

    device = torch.device("cpu")

    def reduce(self, tensor):
        return tensor * self.num_processes

    def gather(self, tensor):
        return tensor.repeat(self.num_processes, 1)


def meter(every=2, world=1, rank=0, objective=""):
    return Meter(Processes(num_processes=world, process_index=rank), every, objective)


def network(**gradients):
    """One whose parameters have gradients of these norms."""
    result = nn.ParameterDict({name: torch.zeros(1) for name in gradients})
    for name, norm in gradients.items():
        result[name].grad = torch.tensor([norm])
    return result


@pytest.mark.parametrize("world", [1, 3])
def test_sums(world):
    """Objective, cross-entropy and correct answers of all parts and processes; steps are counted
    once, repeated images not at all.
    """
    counted = meter(world=world)
    for step in range(3):
        counted.add(torch.tensor(0.5), LOGITS, TARGETS, counts=True)
        counted.add(torch.tensor(1.5), LOGITS, TARGETS, counts=False)
        counted.end_step(network(a=1.0), step)
    loss = F.cross_entropy(LOGITS, TARGETS, reduction="sum").item()  # whatever was minimized
    expected = 1.5 * world, pytest.approx(3 * loss * world), 6 * world, 3
    assert counted.read() == counted.read() == expected
    counted.add_to_epoch(1.5, 2.0, 6, 9)
    assert counted.read() == (0, 0, 0, 0)
    counted.add_to_epoch(0.5, 1.0, 1, 3)
    assert counted.sums.tolist() == [2, 3, 7, 12]


def test_figures():
    """An epoch's means are per image; the objective's is there if it is another than the loss."""
    for name, beside in (("", {}), ("focal:2", {"train_objective": 0.5})):
        counted = meter(objective=name)
        counted.add_to_epoch(2.0, 3.0, 1, 4)
        assert counted.figures() == {"train_loss": 0.75, "train_accuracy": 0.25} | beside


def test_weights_change_no_loss():
    """The cross-entropy is that of the images, whatever they weigh in the objective."""
    plain, weighted = meter(), meter()
    plain.add(torch.tensor(1.0), LOGITS, TARGETS, counts=True)
    weighted.add(torch.tensor(1.0), LOGITS, 3 * TARGETS, counts=True)
    assert plain.read()[1] == pytest.approx(weighted.read()[1])


def test_steps_until_the_loss_is_not_finite():
    """The step in which the loss was lost can be told at any later one, from those before it."""
    counted = meter()
    for step, loss in enumerate((1.0, 2.0, float("nan"), 1.0, float("inf"))):
        counted.add(torch.tensor(loss), LOGITS, TARGETS, counts=True)
        counted.end_step(network(a=1.0), step)
    loss, *_, finite = counted.read()
    assert loss != loss and finite == 2


def test_when_it_is_read():
    """After each of the first steps, and then every so many: also in a run that goes on."""
    counted = meter(every=4)
    due = [counted.end_step(network(a=1.0), step) for step in range(12)]
    assert [step for step, read in enumerate(due) if read] == [0, 1, 2, 3, 7, 11]
    resumed = meter(every=4)
    due = [resumed.end_step(network(a=1.0), step) for step in range(5, 12)]
    assert [step for step, read in enumerate(due, 5) if read] == [5, 7, 11]


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (4, 2), (2, 4), (3, 1)])
def test_state(before, after):
    """A run goes on with the same sums on any number of processes."""
    counted = meter(world=before)
    counted.add(torch.tensor(1.5), LOGITS, TARGETS, counts=True)
    counted.end_step(network(a=1.0), 0)
    counted.add_to_epoch(0.5, 0.25, 1, 3)
    counted.add(torch.tensor(2.5), LOGITS, TARGETS, counts=True)
    state = counted.state()
    total = torch.zeros(4)
    for rank in range(after):
        other = meter(world=after, rank=rank)
        other.load_state(state)
        assert other.sums.tolist() == [0.5, 0.25, 1, 3]
        total += other.recent
    loss = F.cross_entropy(LOGITS, TARGETS, reduction="sum").item()
    assert total.tolist() == [2.5 * before, pytest.approx(loss * before), 2 * before, 0]


def test_largest_gradient():
    """The layer, the norm and the step of the last finite one; a frozen layer has none."""
    found = largest_gradient(network(a=1.0, b=3.0, c=2.0), 1, None)
    assert found == ("b", 3.0, 1)
    inf, nan = float("inf"), float("nan")
    for norms in ({"a": nan, "b": 1.0}, {"a": 1.0, "b": inf}):
        assert largest_gradient(network(**norms), 2, found) == found
        assert largest_gradient(network(**norms), 2, None)[1] == inf
    frozen = network(a=1.0, b=3.0)
    frozen["b"].grad = None
    assert largest_gradient(frozen, 5, found) == ("a", 1.0, 5)


def test_diverged():
    """What the loss is, where, and which layer is the one to blame."""
    said = diverged(float("nan"), "epoch 2 at step 7, lr 0.1", ("conv.weight", 1234.5, 6))
    assert said.startswith("the loss is nan in epoch 2 at step 7, lr 0.1; ")
    assert said.endswith("of conv.weight, 1.2e+03 at step 6")


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (torch.OutOfMemoryError("CUDA …\nTried"), OutsideError, "out of GPU memory: SMALLER"),
        (
            RuntimeError("put_ does not have a deterministic implementation, but you set …\n…"),
            UserError,
            "put_ is not deterministic: LEAVE OUT",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed\nby signal: Killed."),
            OutsideError,
            "DataLoader worker (pid 7) is killed by signal: Killed. FEWER",
        ),
    ],
)
def test_advice(error, kind, said):
    """Each of the three becomes one line with the caller's words; the cause is kept."""
    with pytest.raises(UserError) as caught, explain_errors("SMALLER", "LEAVE OUT", "FEWER"):
        raise error
    assert (type(caught.value), str(caught.value)) == (kind, said)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("of our own"), ValueError(), KeyboardInterrupt()])
def test_no_advice(error):
    """Anything else stays what it is."""
    with pytest.raises(type(error)) as caught, explain_errors("SMALLER", "LEAVE OUT", "FEWER"):
        raise error
    assert caught.value is error
