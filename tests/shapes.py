"""Images of b, d and p in any colours, places and sizes, to train on in seconds.

They are easily confused: d is the mirror image of b, and p is b upside down.
"""

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("b", "d", "p")


def draw_letter(image, letter, left, top, size, colour):
    """A stem with a bowl, `size` pixels high and 0.62 times as wide."""
    draw, width, bar = ImageDraw.Draw(image), 0.62 * size, max(1, round(size / 7))
    stem = left + (width - bar if letter == "d" else 0)
    draw.rectangle((stem, top, stem + bar, top + size), fill=colour)
    bowl = top + (0 if letter == "p" else 0.42 * size)
    draw.ellipse((left, bowl, left + width, bowl + 0.58 * size), outline=colour, width=bar)


def colours(generator):
    """A light and a dark colour, in either order: of the letter and of what is behind it."""
    pair = generator.integers(0, 90, 3), generator.integers(140, 256, 3)
    return [tuple(map(int, pair[k])) for k in generator.permutation(2)]


def noisy(image, generator):
    """The image with each value up to 40 more or less."""
    noise = generator.integers(-40, 41, (*image.size[::-1], 3), dtype=np.int16)
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def small(letter, generator):
    """20 x 24 pixels with one letter anywhere."""
    front, back = colours(generator)
    image, size = Image.new("RGB", (20, 24), back), int(generator.integers(11, 17))
    left, top = generator.uniform(0, 19 - 0.62 * size), generator.uniform(0, 23 - size)
    draw_letter(image, letter, left, top, size, front)
    return noisy(image, generator)


def photograph(letter, generator):
    """About 80 x 130 pixels, upright or lying: the letter near the middle, and what a centre crop
    leaves out: a frame, and at the ends two other letters of any class.
    """
    front, back = colours(generator)
    short, long = generator.integers((70, 120), (90, 140)).tolist()
    size, around = 0.5 * short, generator.uniform(-0.1, 0.1, 2) * short
    lying = generator.random() < 0.5
    image = Image.new("RGB", (long, short) if lying else (short, long), back)
    middle = np.array(image.size) / 2
    left, top = middle + around - (0.31 * size, 0.5 * size)
    draw_letter(image, letter, left, top, size, front)
    for end in (0.02, 0.98):
        place = (end, generator.uniform(0.2, 0.8))
        left, top = np.multiply(place if lying else place[::-1], np.array(image.size) - (14, 22))
        draw_letter(image, CLASSES[generator.integers(3)], left, top, 22, front)
    frame = (0, 0, image.width - 1, image.height - 1)
    ImageDraw.Draw(image).rectangle(frame, outline=front, width=short // 16)
    return noisy(image, generator)


def make_shapes(root, draw, counts):
    """root/<split>/<class>/<number>.png: counts[split] images of each class, drawn by draw().

    In test/ every fifth, from 0.png on, shows the letter of the next class.
    """
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        for k, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                wrong = split == "test" and number % 5 == 0
                draw(CLASSES[(k + wrong) % 3], generator).save(folder / f"{number}.png")
    return root
