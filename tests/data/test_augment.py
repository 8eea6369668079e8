"""What augmentation draws depends on nothing but its key."""

import numpy as np
import pytest
import torch

from lenslet.data.augment import AUGMENTATIONS, Augment, augment, tta_views
from lenslet.distributed.determinism import derive


def random_images(count, channels=3, height=28, width=28):
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_augment_none():
    """Without augmentation the images are as they were."""
    images = random_images(4)
    assert torch.equal(augment(images, "none", False, 0, 0, torch.arange(4)), images)


def find_shift(image, original, reach):
    """(down, across, mirrored) of the window of the reflected image that `image` is."""
    padded = np.pad(original, [(0, 0), (reach, reach), (reach, reach)], mode="reflect")
    height, width = image.shape[1:]
    for down in range(2 * reach + 1):
        for across in range(2 * reach + 1):
            window = padded[:, down : down + height, across : across + width]
            for mirrored in (False, True):
                if np.array_equal(image, window[..., ::-1] if mirrored else window):
                    return down, across, mirrored
    return None


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "reach"), [(28, 28, 2), (32, 36, 2), (22, 24, 2), (8, 8, 1)]
)
def test_shifts_and_flips(channels, height, width, reach):
    """Every augmented image is a window of its reflected original, mirrored or not."""
    images, index = random_images(200, channels, height, width), torch.arange(200)
    for kind, flips in (("light", {False}), ("standard", {False, True})):
        changed = augment(images, kind, False, 0, 0, index)
        assert changed.dtype == torch.uint8
        assert changed.shape == images.shape
        pairs = zip(changed.numpy(), images.numpy(), strict=True)
        found = [find_shift(image, original, reach) for image, original in pairs]
        assert None not in found
        every = set(range(2 * reach + 1))
        assert {f[0] for f in found} == {f[1] for f in found} == every
        assert {f[2] for f in found} == flips
        if len(flips) == 2:
            assert 60 < sum(f[2] for f in found) < 140
    for kind in ("trivial", "rand"):
        assert torch.equal(augment(images, kind, False, 0, 0, index), changed)


def test_augmentation_computes_where_the_images_are():
    """Nothing is left on the CPU: here on a device that computes shapes only."""
    images, index = random_images(4).to("meta"), torch.arange(4, device="meta")
    assert augment(images, "standard", False, 0, 0, index).device.type == "meta"
    assert {view.device.type for _, view in tta_views(images, "standard", False)} == {"meta"}


def test_what_is_drawn():
    """The same shifts in every version of this code: a run is trained again to the same bits."""
    images, index = random_images(8), torch.arange(100, 108)
    changed = augment(images, "standard", False, 7, 1, index)
    pairs = zip(changed.numpy(), images.numpy(), strict=True)
    shifts = [(2, 1), (3, 0), (1, 4), (1, 4), (0, 1), (0, 1), (2, 0), (0, 3)]
    mirrored = [True, False, False, False, False, True, True, False]
    assert [find_shift(image, original, 2) for image, original in pairs] == [
        (*shift, flip) for shift, flip in zip(shifts, mirrored, strict=True)
    ]


def test_decoded_photographs_are_only_flipped():
    """A photograph, cropped at random by its decoder, is mirrored or left as it is."""
    images = random_images(40)
    changed = augment(images, "standard", True, 0, 0, torch.arange(40))
    mirrored = (changed == images.flip(3)).flatten(1).all(1)
    assert (mirrored | (changed == images).flatten(1).all(1)).all()
    assert 5 < mirrored.sum() < 35
    assert torch.equal(augment(images, "light", True, 0, 0, torch.arange(40)), images)


def test_mirroring_alternates():
    """Two epochs in a row show every image both ways, and then the same again."""
    images, index = random_images(40), torch.arange(40)
    first, *others = (augment(images, "standard", True, 0, e, index) for e in range(5))
    for epoch, other in enumerate(others, 1):
        assert torch.equal(other, first.flip(3) if epoch % 2 else first)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("size", "moves"), [((1, 9), 0), ((9, 1), 0), ((1, 1), 0), ((2, 2), 2)])
def test_views_of_tiny_pictures(size, moves, count):
    """An image of one line has nowhere to move; one of two has."""
    images = random_images(count, 1, *size)
    assert len(tta_views(images, "light", False)) == 1 + moves
    assert len(tta_views(images, "standard", False)) == 2 * (1 + moves)


def test_views():
    """Views weigh 1 together and are what training may have shown: the image is half of them."""
    images = random_images(3)
    assert [(w, x is images) for w, x in tta_views(images, "none", False)] == [(1, True)]
    assert [w for w, _ in tta_views(images, "light", True)] == [1]
    for kind, decoded, count in (
        ("light", False, 3),
        ("standard", False, 6),
        ("standard", True, 2),
    ):
        shown = tta_views(images, kind, decoded)
        assert len(shown) == count
        assert sum(weight for weight, _ in shown) == 1
        met = set()
        for weight, view in shown:
            offsets = [
                find_shift(a, b, 1) for a, b in zip(view.numpy(), images.numpy(), strict=True)
            ]
            down, across, _ = offsets[0]
            assert set(offsets) == {offsets[0]}
            assert down == across
            met.add(offsets[0])
            if count == 6:
                assert weight == (0.25 if down == 1 else 0.125)
        assert len(met) == count  # no view twice


def test_augment_is_keyed():
    """An image is changed alike in any batch, and otherwise in the next epoch."""
    images, index = random_images(16), torch.arange(100, 116)
    whole = augment(images, "standard", False, 5, 2, index)
    some = torch.tensor([11, 3, 7])
    assert torch.equal(augment(images[some], "standard", False, 5, 2, index[some]), whole[some])
    assert not torch.equal(augment(images, "standard", False, 5, 3, index), whole)
    assert not torch.equal(augment(images, "standard", False, 6, 2, index), whole)


@pytest.mark.parametrize("size", [(1, 1), (1, 20), (2, 2)])
def test_augment_takes_tiny_pictures(size):
    """An image of one pixel or one line is augmented too."""
    images = random_images(8, 1, *size)
    assert augment(images, "standard", False, 0, 0, torch.arange(8)).shape == images.shape


MIXES = [
    {"kind": kind, "erase": erase, "mixup": mixup, "cutmix": cutmix}
    for kind, erase, mixup, cutmix in [
        *((kind, 0.0, 0.0, 0.0) for kind in AUGMENTATIONS),
        ("none", 0.7, 0.0, 0.0),
        ("none", 0.0, 0.5, 0.0),
        ("none", 0.0, 0.0, 1.0),
        ("rand", 0.5, 0.2, 1.0),
    ]
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("changes", MIXES, ids=lambda c: " ".join(map(str, c.values())))
def test_every_augmentation_is_keyed(changes, decoded, channels):
    """Batches of 8 bits of any kind follow from seed, epoch and indices, and from nothing else;
    another epoch, or another seed, gives others.
    """
    torch.manual_seed(3)
    images = torch.randint(0, 256, (12, channels, 20, 16), dtype=torch.uint8)
    targets, index = torch.eye(12), torch.arange(12) * 5
    make = Augment(decoded=decoded, seed=7, fill=[0.4] * channels, **changes)
    one, mixed = make(images, targets, 2, index)
    assert one.dtype == torch.uint8 and one.shape == images.shape
    torch.testing.assert_close(mixed.sum(1), torch.ones(12))
    torch.rand(5)
    again, same = make(images, targets, 2, index)
    assert torch.equal(one, again) and torch.equal(mixed, same)
    random = changes["kind"] != "none" or any(list(changes.values())[1:])
    other, _ = make(images, targets, 3, index)
    seeded, _ = Augment(decoded=decoded, seed=8, fill=[0.4] * channels, **changes)(
        images, targets, 2, index
    )
    assert torch.equal(one, images) == (not random) or decoded
    assert torch.equal(one, other) == (not random) or decoded
    assert torch.equal(one, seeded) == (not random) or decoded
    if changes["kind"] in ("trivial", "rand"):
        assert not torch.equal(one, augment(images, "standard", decoded, 7, 2, index))
    if not changes["mixup"] and not changes["cutmix"]:  # an image's change is its own
        few, _ = make(images[3:5], targets[3:5], 2, index[3:5])
        assert torch.equal(few, one[3:5])


@pytest.mark.parametrize("kind", ["trivial", "rand"])
def test_uncovered_parts(kind):
    """What a rotation or a shear uncovers shows the fill."""
    images = torch.full((60, 3, 16, 16), 200, dtype=torch.uint8)
    changed, _ = Augment(kind, True, 0, fill=[0.1, 0.2, 0.3])(
        images, torch.eye(60), 0, torch.arange(60)
    )
    corners = changed[..., ::15, ::15].permute(0, 2, 3, 1).reshape(-1, 3)
    assert (corners == torch.tensor([26, 51, 76])).all(1).sum() > 20


def test_erasing():
    """The share of the images that lose a rectangle, which shows the fill."""
    images = torch.full((400, 3, 16, 16), 200, dtype=torch.uint8)
    make = Augment("none", False, 0, erase=0.3, fill=[0.1, 0.2, 0.3])
    erased, _ = make(images, torch.eye(400), 0, torch.arange(400))
    hit = (erased != images).any(1)  # [400, 16, 16]
    share = hit.any(2).any(1).float().mean().item()
    assert 0.2 < share < 0.4
    for image, mask in zip(erased, hit, strict=True):
        if mask.any():
            assert (image[:, mask] == torch.tensor([[26], [51], [76]])).all()
            rows, columns = mask.any(1), mask.any(0)
            assert torch.equal(mask, rows[:, None] & columns)
    erased, _ = Augment("none", False, 0, erase=1)(images[:9], torch.eye(9), 0, torch.arange(9))
    assert set(erased.unique().tolist()) == {0, 200}  # black, where nothing is said


def test_mixing_is_told_by_the_targets():
    """Each image is what its targets say: so much of one image, and the rest of another."""
    values = torch.arange(8) * 30
    images = values.to(torch.uint8)[:, None, None, None].expand(8, 1, 20, 20).contiguous()
    for kind in ("mixup", "cutmix"):
        make = Augment("none", False, 5, **{kind: 1.0})
        for epoch in range(5):
            mixed, targets = make(images, torch.eye(8), epoch, torch.arange(8))
            told = targets @ values.float()
            torch.testing.assert_close(mixed.float().mean((1, 2, 3)), told, atol=0.51, rtol=0)
            assert (targets > 0).sum(1).max() <= 2
        if kind == "cutmix":
            assert set(mixed.unique().tolist()) <= set(values.tolist())


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_how_evenly_images_are_mixed(kind):
    """A small alpha leaves most of one image, a large one takes half of each, if there are two."""
    images, index = random_images(2), torch.arange(2)

    def smaller_share(alpha):
        make = Augment("none", False, 0, **{kind: alpha})
        return sum(make(images, torch.eye(2), e, index)[1].min().item() for e in range(40)) / 40

    assert smaller_share(0.05) < 0.2 and smaller_share(50.0) > 0.3


def test_a_batch_has_a_draw_of_its_own():
    """How a batch is mixed follows from its first image, and is not what that one draws itself."""
    make = Augment("none", False, 7, mixup=1.0)
    make.mixers = [lambda images, targets: (images, torch.rand(1))]

    def draw(*index):
        images = random_images(len(index), height=4, width=4)
        return make(images, None, 2, torch.tensor(index))[1].item()

    assert draw(4, 5) == draw(4, 9, 2) != draw(5, 4)
    torch.default_generator.manual_seed(derive(7, 2, 4))
    assert torch.randint(1, ()) == 0 and torch.rand(1) != draw(4, 5)
