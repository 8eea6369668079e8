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
import shutil
import sys
from pathlib import Path

from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

import _root  # noqa: F401
from lenslet.cli import create_parser
from lenslet.data import sets
from lenslet.errors import UserError, run_main


def main(argv=None):
    parser = create_parser(__doc__)
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="data sets to fetch")
    add("--source", metavar="URL-or-file-or-folder", help="of the archives (default: public ones)")
    add("--export", metavar="FOLDER", type=Path, help="write FOLDER/{train,test}/<class>/*.png")
    args = parser.parse_args(argv)
    if len(args.names) > 1 and (args.source or args.export):
        raise UserError("--source and --export go with one data set")
    target = args.export
    if target and target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"--export {target}: exists and is not an empty folder")
    for name in args.names:
        sets.lookup(name)  # a misspelt name ends the command before any download
    for name in args.names:
        folder = sets.ensure(name, args.source)
        if target:
            export(folder, target)
        counts = {}
        for split in sets.SPLITS:
            with safe_open(folder / f"{split}.safetensors", "pt") as file:
                counts[split], *shape = file.get_slice("images").get_shape()
        print(
            f"{name} is in {target or folder}: {counts['train']} training and {counts['test']} "
            f"test pictures of {'×'.join(map(str, shape))}, "
            f"{len(sets.SETS[name]['classes'])} classes; next: make train DATA={target or name}"
        )


def export(folder: Path, target: Path) -> None:
    """Write the set in folder as target/{train,test}/<class>/<index>.png, all or nothing."""
    target = target.resolve()
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        for split in sets.SPLITS:
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
