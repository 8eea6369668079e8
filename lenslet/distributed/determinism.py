"""What makes results bitwise reproducible: every seed formula, and what else affects numerics."""

import os
import platform
import re
from importlib.metadata import version

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from lenslet.distributed.precision import read_cpuinfo


def derive(seed: int, *counters: int) -> int:
    """A seed for what happens at these counts (epoch, step, image): 0..2^63 - 1."""
    for counter in counters:
        seed = seed * 1_000_003 + counter
    return seed % 2**63


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """What the order of an epoch's images is drawn from."""
    return torch.Generator().manual_seed(derive(seed, epoch))


def uniform(seed: int, epoch: int, index: Tensor, draws: int) -> Tensor:
    """Random numbers in [0, 1), float32 [B, draws], that depend on nothing but the arguments.

    index int64 [B].  A counter-based generator on Wellons' 32-bit hash ("lowbias32").
    """
    mask = 0xFFFFFFFF
    x = (index[:, None] * draws + torch.arange(draws, device=index.device)) & mask
    for key in (0, epoch + 1, seed + 1):
        x = x ^ (key * 0x9E3779B9 & mask)
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) & mask
        x = ((x ^ (x >> 15)) * 0xD35A2D97) & mask
        x = x ^ (x >> 15)
    return (x >> 8).float() / (1 << 24)


def describe_processor() -> dict:
    """The processor's model, and its units for bf16, which change the speed and the last bits.

    bf16: of avx512_bf16 and amx_bf16 (AMX) those that it has; [] where the system does not say.
    """
    text = read_cpuinfo()
    named = re.search(r"model name\s*: (.*)", text)
    return {
        "processor": named[1] if named else platform.processor() or platform.machine(),
        "bf16": [name for name in ("avx512_bf16", "amx_bf16") if name in text.split()],
    }


def environment(precision: str) -> dict:
    """What affects the last bits of a result besides the options."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        processor, bf16 = describe_processor().values()
        vectors = torch.backends.cpu.get_cpu_capability()
        device = f"{processor} with {', '.join([vectors, *bf16])}"
    found = {name: version(name) for name in ("torch", "torchvision", "accelerate", "timm")}
    return {
        "versions": {"python": platform.python_version(), **found},
        "device": device,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "processes": PartialState().num_processes,
    }


def environment_changes(before: dict, precision: str) -> list[str]:
    """A line for each difference between an earlier environment() and today's."""
    return [
        f"{key} was {before[key]}, is {now}: the last bits may differ"
        for key, now in environment(precision).items()
        if now != before[key]
    ]


def compute_deterministically() -> None:
    """Make a GPU compute the same bits every time; call it before anything has run there."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and nothing reads it
    torch.backends.cudnn.benchmark = False


def fix_reduction_order(
    model: torch.nn.Module, images: torch.Tensor, accelerator: Accelerator
) -> None:
    """Make several processes add up gradients in the same order from the first step on.

    DistributedDataParallel rearranges its buckets once, after its first backward pass, and with
    more than two processes the order of a sum shows in its last bits: a resumed run would differ.
    images: as the network is fed them; nothing is learned from them.
    """
    if accelerator.num_processes > 1:
        buffers = [buffer.clone() for buffer in model.buffers()]
        accelerator.backward(0 * model(images).sum())
        model.zero_grad()
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)


def seed_step(seed: int, step: int, accelerator: Accelerator) -> None:
    """Make what dropout draws depend on the step and the process, and on nothing before."""
    world, rank = accelerator.num_processes, accelerator.process_index
    key = (derive(seed, step) * world + rank) % 2**63
    torch.default_generator.manual_seed(key)  # torch.manual_seed is 0.1 ms slower without a GPU
    if accelerator.device.type != "cpu":
        torch.get_device_module(accelerator.device).manual_seed(key)
