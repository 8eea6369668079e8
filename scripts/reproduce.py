"""Train a run again from what its weights say, and tell whether the bits are the same.

    make reproduce RUN=runs/digits-lenet
    python scripts/reproduce.py runs/digits-lenet/model.safetensors --data moved/pictures

Only the header of model.safetensors is read.  The new run is a run like any other, beside the old
one.  Exit status 0 for identical bits, 1 for others.
"""

import json
import sys
import tempfile
from pathlib import Path

import _root  # noqa: F401
from lenslet.cli import as_yaml, create_parser, parse
from lenslet.errors import OutsideError, UserError, error_context, run_main


def words_for(weights: Path, header: dict, args, config: Path) -> list:
    """The options that train again with the options and threads of a header."""
    words = ["--config", config, "--output", args.output, "--threads", header["threads"]]
    if header["precision"] in ("no", "fp16", "bf16"):
        words += ["--precision", header["precision"]]
    if args.data:
        words += ["--data", args.data]
    if header["options"].get("time") or header["options"].get("plan"):
        words += ["--plan", weights.resolve()]
    return words


def main(argv=None) -> int:
    parser = create_parser(__doc__)
    help = "a run, or its model.safetensors (default: newest)"
    parser.add_argument("weights", nargs="?", help=help)
    help = "a folder with the same images (default: where they were)"
    parser.add_argument("--data", metavar="DIR", help=help)
    help = "run folder (default: <the run's>-reproduced)"
    parser.add_argument("--output", metavar="DIR", help=help)
    args = parse(parser, argv)

    # These import torch, which takes a second.
    from lenslet.distributed.determinism import environment_changes
    from lenslet.distributed.start import cores, start_processes
    from lenslet.runs.folder import newest_finished, weights_path
    from lenslet.runs.launch import run_training
    from lenslet.weights import read_header

    weights = weights_path(args.weights)
    with error_context(str(weights)):
        header = read_header(weights)
        if "digests" not in header:
            raise UserError("has no digests to compare with, as it was written before them")
    args.output = args.output or f"{weights.resolve().parent}-reproduced"

    # What may make a difference, said before the training.
    start_processes(header["threads"])
    for change in environment_changes(header | {"processes": 1}, header["precision"]):
        print(change)  # the number of processes is set below
    if header["threads"] > cores():
        print(f"{header['threads']} threads, as then, though there are {cores()} cores")

    # Train.
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "options.yaml"
        config.write_text(as_yaml(header["options"]))
        words = words_for(weights, header, args, config)
        status = run_training(words, header["processes"], header["threads"])
    if status in (2, 130, 143):  # it has said why
        return status
    if status and not header["options"].get("overfit"):  # where 1 is a verdict
        raise OutsideError(f"training again ended with status {status}; run the same command again")
    again = newest_finished(args.output)
    records = json.loads((again / "metrics.json").read_text())["epochs"]

    # Compare.
    equal = 0
    for (step, digest), record in zip(header["digests"], records, strict=False):
        if (step, digest) != (record["step"], record["weights_sha256"]):
            where = f"after step {step}, the end of epoch {record['epoch']}"
            print(f"the weights are equal after step {equal}, and differ {where}")
            return 1
        equal = step
    print(f"identical bits: {weights} and epoch {len(header['digests'])} of {again}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
