"""Fetch a named data set, once, into data/<name>/{train,test}.safetensors.

    python scripts/download.py cifar10
    python scripts/download.py cifar10 --source ~/Downloads/cifar-10-python.tar.gz
    python scripts/download.py mnist --export pictures/mnist

Sets: cifar10, cifar100, mnist, fashion-mnist, digits.  What an interrupted download has brought
is kept, and the next call resumes from there.
"""

import os
import re
import shlex
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import _root  # noqa: F401
from lenslet.cli import create_parser, parse
from lenslet.errors import UserError, error_context, run_main


def main(argv=None):
    parser = create_parser(__doc__)
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="data sets to fetch")
    add("--source", metavar="URL-or-file-or-folder", help="of the archives (default: public ones)")
    help = "write FOLDER/{train,val,test}/<class>/*.png, with the images that training validates on"
    add("--export", metavar="FOLDER", type=Path, help=help)
    args = parse(parser, argv)
    target = args.export
    if len(args.names) > 1 and (args.source or target):
        raise UserError("--source and --export go with one data set")
    if target and target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"--export {target}: exists and is not an empty folder")

    # torch takes a second or two to import, which --help and a misspelt option need not wait for.
    from lenslet.data import sets
    from lenslet.data.layout import SPLITS
    from lenslet.data.load import load, recipe_for
    from lenslet.training import options

    for name in args.names:
        with error_context(name):  # a misspelt name ends the command before any download
            sets.lookup(name)
    for name in args.names:
        with error_context(f"--source {args.source}") if args.source else nullcontext():
            folder = sets.ensure(name, args.source)
        # Exported, the images that training would validate on are apart.
        val = options.complete({}, name, recipe_for(name)).val if target else 0
        data = load(name, SPLITS, val=val)
        if target:
            export(data, target)
        said = ", ".join(f"{len(data.splits[s])} {s}" for s in SPLITS if s in data.splits)
        shape = "×".join(map(str, (data.channels, *data.image_size)))
        print(
            f"{name} is in {target or folder}: {said} images of "
            f"{shape}, {len(data.classes)} classes; "
            f"next: make train DATA={shlex.quote(str(target or name))}"
        )


def export(data, target: Path) -> None:
    """Write a set's images as target/<split>/<class>/<index>.png, all or nothing."""
    from tqdm import tqdm

    from lenslet.grid import encode_png

    target = target.resolve()
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        for split, part in data.splits.items():
            # "T-shirt/top" would be a folder in a folder.
            names = [re.sub(r'[<>:"/\\|?*]', "-", name) for name in data.classes]
            for name in names:
                (aside / split / name).mkdir(parents=True)
            for i in tqdm(range(len(part)), split, leave=False, disable=None):
                path = aside / split / names[part.labels[i]] / f"{int(part.names[i]):05d}.png"
                path.write_bytes(encode_png(part.pixels(i)))
        if target.exists():
            target.rmdir()  # an empty folder, which only POSIX lets a rename replace
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
