"""Which device computes, and in which precision: one rule for every command that uses a network."""

import os
from pathlib import Path

import torch

from lenslet.errors import UserError

CPUINFO = Path("/proc/cpuinfo")
# What autocast computes in; for fp8, Accelerate too leaves all but its own layers in bf16.
KINDS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def choose_device(asked: str = "auto") -> torch.device:
    """The device that was asked for; auto: the GPU if there is one, else the CPU.

    asked: cpu, cuda, cuda:1, mps, …; where it has a number, that becomes the current device of its
    kind.  Errors: UserError for a device that is not there, with those that are.
    """
    gpu, count = torch.accelerator.current_accelerator(True), torch.accelerator.device_count()
    if asked == "auto":
        return gpu or torch.device("cpu")
    numbered = [f"{gpu.type}:{i}" for i in range(count)] if gpu else []
    if asked not in ("cpu", *numbered) and (not gpu or asked != gpu.type):
        raise UserError(f"no such device here, only {', '.join(['cpu', *numbered])}")
    device = torch.device(asked)
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)
    return device


def choose_precision(asked: str, device: str, otherwise: str = "auto") -> str:
    """'no', 'fp16', 'bf16' or 'fp8': the first of these that says one.  A `no` in asked; the choice
    of `accelerate launch`; asked; otherwise (the recipe's, or the weights'); native().

    Errors: UserError for fp16 on a CPU, where Accelerate would silently compute in float32.
    """
    given = os.environ.get("ACCELERATE_MIXED_PRECISION")  # 'no' also where nothing was asked
    if asked == "no" or given not in ("fp16", "bf16", "fp8"):
        given = next((x for x in (asked, otherwise) if x != "auto"), None) or native(device)
    if (given, device) == ("fp16", "cpu"):
        raise UserError("fp16 does not run on a CPU: choose the precision no or bf16")
    return given


def native(device: str) -> str:
    """The precision below float32 that a type of device has natively; 'no' for none."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device == "cpu" and cpu_has_bf16() else "no"


def as_trained(precision: str, device: str) -> str:
    """The precision that weights were trained in, where the device has it natively; else 'no'."""
    has = precision == native(device) or (precision, device) == ("fp16", "cuda")
    return precision if has else "no"


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself: emulated, it is slower than float32."""
    known = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is Arm's
    return not known.isdisjoint(read_cpuinfo().split())


def read_cpuinfo() -> str:
    """What Linux says of the processor; '' elsewhere."""
    try:
        return CPUINFO.read_text()
    except OSError:
        return ""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """What to run a network in: Accelerator.autocast() without Accelerate, which imports slowly."""
    return torch.autocast(device.type, KINDS.get(precision), enabled=precision != "no")
