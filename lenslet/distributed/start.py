"""Start-up of the commands that run a network: processes, threads and precision.

Accelerate decides nearly all of it; what is here mends where a launcher and a CPU leave it wrong.
"""

import ctypes
import os
import platform
import sys
import time
import warnings
from datetime import timedelta
from importlib.metadata import version

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from joblib import cpu_count  # knows of affinity and of container quotas
from torch import distributed

from interrupts import name_the_lost
from options import UserError


def launch(threads: int | None = None) -> PartialState:
    """Join the other processes of this run, if any, and take this one's share of the cores.

    threads: of this process; None: as many as the user's OMP_NUM_THREADS or its share says.
    Errors: UserError where the launcher started processes that do not find each other.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.accelerator.is_available():
        # Without this each process would believe it is alone and write over the others' files.
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    # The others wait while the first process downloads: an hour, if the source is a slow one.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu, timeout=timedelta(hours=2), **_meeting_point(world))
    if state.num_processes != world:
        raise UserError(
            f"{world} processes were launched, but this one sees {state.num_processes}: on a CPU "
            "start them with `make train PROCESSES=N`"
        )
    if world > 1:
        name_the_lost(state.process_index)
    keep_freed_memory()
    launched = any(k in os.environ for k in ("ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"))
    set_already = os.environ.get("OMP_NUM_THREADS")
    if threads:
        torch.set_num_threads(threads)
    elif set_already is None or (launched and set_already == "1"):  # 1: launchers waste the others
        torch.set_num_threads(cores())
    return state


def _meeting_point(world: int) -> dict:
    """Where processes that torchrun has started again meet: away from what the dead ones left.

    torch 2.15's own meeting point still has the addresses of the first start, and they hang.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if world == 1 or attempt == "0":
        return {}
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.PrefixStore(attempt, distributed.TCPStore(address, port, is_master=False))
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": world}


def from_main(state: PartialState, work):
    """What work() returns on the first process, on all of them.

    Where it fails, the first process raises and the others leave quietly with its exit status:
    nobody waits for a process that is gone.
    """
    result, failure = None, None
    if state.is_main_process:
        try:
            result = work()
        except (UserError, OSError) as error:
            failure = error
    status = getattr(failure, "status", 1) if failure else 0
    result, status = broadcast_object_list([result, status])
    if failure:
        raise failure
    if status:
        sys.exit(status)
    return result


def main_first(state: PartialState, work):
    """What work() returns on each process; the others begin when the first one has succeeded."""
    result = None

    def first():
        nonlocal result
        result = work()

    from_main(state, first)
    return result if state.is_main_process else work()


def circumstances(precision: str) -> dict:
    """What else than the options has a say in the last bits of a result."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"
    found = {name: version(name) for name in ("torch", "torchvision", "accelerate", "timm")}
    return {
        "versions": {"python": platform.python_version(), **found},
        "device": device,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "processes": PartialState().num_processes,
    }


def compute_deterministically() -> None:
    """Have a GPU take the same bits' way every time; before anything has run on it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and nothing reads it
    torch.backends.cudnn.benchmark = False


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, instead of handing it back.

    Otherwise the tensors of every step are faulted in anew, page by page: the tutorial network ran
    at 4,700 images/s with 2,260 page faults a step, and at 6,700 with none; and evaluating pictures
    in batches of 2,048 took fastnet 1.6 times as long as with this.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # other C libraries lack it
        mallopt(-4, 0)  # M_MMAP_MAX: nothing in pages of its own, however large
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-2, 64 << 20)  # M_TOP_PAD


def cores() -> int:
    """Cores that each process of this run may use."""
    return max(1, cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def workers(asked: int | None) -> int:
    """Processes to decode photographs with; more than 8 to a training process do not pay."""
    return min(8, cores()) if asked is None else asked


def accelerator(asked: str, otherwise: str = "auto") -> Accelerator:
    """The Accelerator for --precision, after launch(); see choose_precision().

    Errors: UserError where the device cannot compute in that precision.
    """
    device = PartialState().device.type
    precision = choose_precision(asked, device, otherwise)
    if (precision, device) == ("fp16", "cpu"):  # Accelerate would silently compute in float32
        raise UserError("fp16 is not for a CPU: give --precision no, or launch without it")
    try:
        # Buffers are averaged once an epoch (see sync_buffers), not sent at every step.  The newer
        # name of this setting, which the warning asks for, is not in torch 2.10.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
        plain = DistributedDataParallelKwargs(broadcast_buffers=False)
        return Accelerator(mixed_precision=precision, kwargs_handlers=[plain])
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--precision {precision}: {reason}; try --precision auto") from error


def choose_precision(asked: str, device: str, otherwise: str = "auto") -> str:
    """'no', 'fp16', 'bf16' or 'fp8': a `no` that was asked for, what `accelerate launch` was given,
    what else was asked for, the recipe's (otherwise), and at last what the device has natively.
    """
    given = os.environ.get("ACCELERATE_MIXED_PRECISION")  # 'no' also where nothing was asked
    if asked == "no":
        return "no"
    if given in ("fp16", "bf16", "fp8"):
        return given
    if asked == "auto":
        asked = otherwise
    if asked != "auto":
        return asked
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device == "cpu" and cpu_has_bf16() else "no"


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself: emulated, it is slower than float32."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = {flag for line in file if ":" in line for flag in line.split(":")[1].split()}
    except OSError:
        return False  # not Linux
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})  # the last one is Arm's


def settle_order(model: torch.nn.Module, images: torch.Tensor, accelerator: Accelerator) -> None:
    """Have several processes add gradients up in the same order from the first step on.

    DistributedDataParallel rearranges them once, after its first backward pass, and with more than
    two processes the order of a sum shows in its last bits: a run that goes on would differ.
    images: what the network is fed; nothing is learned from them.
    """
    if accelerator.num_processes > 1:
        buffers = [buffer.clone() for buffer in model.buffers()]
        accelerator.backward(0 * model(images).sum())
        model.zero_grad()
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)


def wrap_again(model, images: torch.Tensor, accelerator: Accelerator) -> torch.nn.Module:
    """A prepared model for the parameters that are trained now: others than when it was prepared.

    DistributedDataParallel only ever exchanges the gradients that there were at first.
    """
    if accelerator.num_processes > 1:
        devices = model.device_ids
        model = type(model)(model.module, device_ids=devices, broadcast_buffers=False)
        settle_order(model, images, accelerator)
    return model


def seed_step(seed: int, step: int, rank: int, world: int, device: torch.device) -> None:
    """Have what dropout draws depend on the step and the process, and on nothing before."""
    key = ((seed * 1_000_003 + step) * world + rank) % 2**63
    torch.default_generator.manual_seed(key)  # torch.manual_seed is 0.1 ms slower without a GPU
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(key)


def now(device: torch.device) -> float:
    """The time in seconds when the device has done all it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


def speed(network: torch.nn.Module, images, labels, accelerator: Accelerator) -> float:
    """Pictures a second that this process trains a network on; nothing is learned.

    images [B, C, H, W] as it is fed them, labels [B].
    """
    network.to(accelerator.device, memory_format=torch.channels_last)
    for step in range(3):
        if step == 1:  # libraries choose their ways in the first one
            began = now(accelerator.device)
        with accelerator.autocast():
            loss = torch.nn.functional.cross_entropy(network(images), labels)
        loss.backward()
    return 2 * len(labels) / (now(accelerator.device) - began)


def sync_buffers(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Average batch-norm statistics over the processes: each has seen its own pictures only.

    In double precision, which leaves equal ones as they are.
    """
    for buffer in model.buffers():
        if accelerator.num_processes > 1 and buffer.is_floating_point():
            buffer.copy_(accelerator.reduce(buffer.double(), "mean"))
