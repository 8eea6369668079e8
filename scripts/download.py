"""Fetch a named data set, once, into data/<name>/{train,test}.safetensors.

    python scripts/download.py cifar10
    python scripts/download.py cifar10 --source ~/Downloads/cifar-10-python.tar.gz
    python scripts/download.py mnist --export pictures/mnist

Sets: cifar10, cifar100, mnist, fashion-mnist, digits.  What an interrupted download has brought
is kept, and the next call goes on from there.
"""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import _root  # noqa: F401
from lenslet.cli import Parser, create_parser, parse
from lenslet.errors import UserError, run_main


def build_parser() -> Parser:
    parser = create_parser(__doc__)
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="data sets to fetch")
    add("--source", metavar="URL-or-file-or-folder", help="of the archives (default: public ones)")
    add("--export", metavar="FOLDER", type=Path, help="write FOLDER/{train,test}/<class>/*.png")
    return parser


def main(argv=None):
    args = parse(build_parser(), argv)
    target = args.export
    if len(args.names) > 1 and (args.source or target):
        raise UserError("--source and --export go with one data set")
    if target and target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"--export {target}: exists and is not an empty folder")

    # torch takes a second or two to import, which --help and a misspelt option need not wait for.
    from lenslet.data import sets

    for name in args.names:
        sets.lookup(name)  # a misspelt name ends the command before any download
    for name in args.names:
        folder = sets.ensure(name, args.source)
        if target:
            export(folder, target)
        (train, *shape), (test, *_) = (stored_shape(folder, split) for split in ("train", "test"))
        print(
            f"{name} is in {target or folder}: {train} training and {test} test pictures of "
            f"{'×'.join(map(str, shape))}, {len(sets.SETS[name]['classes'])} classes; "
            f"next: make train DATA={shlex.quote(str(target or name))}"
        )


def stored_shape(folder: Path, split: str) -> list[int]:
    """[N, C, H, W] of a set's images, from the head of its file."""
    from safetensors import safe_open

    with safe_open(folder / f"{split}.safetensors", "pt") as file:
        return file.get_slice("images").get_shape()


def export(folder: Path, target: Path) -> None:
    """Write the set in folder as target/{train,test}/<class>/<index>.png, all or nothing."""
    from PIL import Image
    from safetensors import safe_open
    from tqdm import tqdm

    target = target.resolve()
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        for split in ("train", "test"):
            with safe_open(folder / f"{split}.safetensors", "pt") as file:
                images, labels = file.get_tensor("images"), file.get_tensor("labels")
                names = json.loads(file.metadata()["classes"])
            # "T-shirt/top" would be a folder in a folder.
            folders = [aside / split / re.sub(r'[<>:"/\\|?*]', "-", name) for name in names]
            for path in folders:
                path.mkdir(parents=True)
            images = images.permute(0, 2, 3, 1).squeeze(3).numpy()  # [N, H, W(, 3)]: modes L, RGB
            for index in tqdm(range(len(images)), split, leave=False, disable=None):
                path = folders[labels[index]] / f"{index:05d}.png"
                Image.fromarray(images[index]).save(path)
        if target.exists():
            target.rmdir()  # an empty folder, which only POSIX lets a rename replace
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
