"""Start-up of the commands that run a network: processes, threads and precision.

Accelerate decides nearly all of it; this corrects what launchers and CPUs get wrong.
"""

import atexit
import ctypes
import os
import platform
import sys
import time
import warnings
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from joblib import cpu_count
from torch import distributed

from lenslet.distributed.interrupts import end_workers, name_lost_processes
from lenslet.distributed.launchers import check_launcher
from lenslet.distributed.precision import choose_device, choose_precision
from lenslet.errors import OutsideError, UserError, one_line


def start_processes(threads: int | None = None) -> PartialState:
    """Join the other processes of this run, if any, and take this one's share of the cores.

    threads: of this process; None: as many as the user's OMP_NUM_THREADS or its share says.
    Errors: UserError for a way of launching that is not supported, and where the launcher started
    processes that do not find each other.
    """
    check_launcher()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.accelerator.is_available():
        # Without this each process would train by itself and overwrite the others' files.
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    # The others wait while the first process downloads: an hour, if the source is a slow one.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu, timeout=timedelta(hours=2), **_meeting_point(world))
    if state.num_processes != world:
        raise UserError(
            f"{world} processes were launched, but this one sees {state.num_processes}: on a CPU "
            "start them with `make train PROCESSES=N`"
        )
    kind = state.distributed_type.name
    if kind != "NO" and not kind.startswith("MULTI_"):  # XLA
        raise UserError(f"Accelerate's distributed type {kind}: only MULTI_… are supported")
    if world > 1:
        name_lost_processes(state.process_index)
    keep_freed_memory()
    atexit.register(end_workers)
    launched = any(k in os.environ for k in ("ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"))
    given = os.environ.get("OMP_NUM_THREADS")
    if threads or given is None or (launched and given == "1"):  # launchers waste the other cores
        torch.set_num_threads(threads or cores())
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


def from_main_process(state: PartialState | Accelerator, work):
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


def main_process_first(state: PartialState | Accelerator, work):
    """What work() returns on each process; the others begin when the first one has succeeded.

    Where it fails on another one, on a machine with other files, the first says so for it.
    """
    results, failure = [], None
    from_main_process(state, lambda: results.append(work()))
    if not results:
        try:
            results.append(work())
        except (UserError, OSError) as error:
            failure = error
    said = (platform.node(), str(failure), getattr(failure, "status", 1)) if failure else None
    for host, message, status in filter(None, gather_object([said])):
        if not state.is_main_process:
            sys.exit(status)
        raise (UserError if status == 2 else OutsideError)(f"on {host}: {message}")
    return results[0]


def first_difference(value: dict) -> tuple[str, str] | None:
    """Where a process has another value than the first one: the first key that differs, and the
    machine; None where all are equal.
    """
    (_, first), *others = gather_object([(platform.node(), value)])
    pairs = ((key, host) for host, other in others for key in first if other[key] != first[key])
    return next(pairs, None)


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, instead of handing it back.

    Otherwise the tensors of every step are faulted in anew, page by page: the tutorial network ran
    at 4,700 images/s with 2,260 page faults a step, and at 6,700 with none; and evaluating images
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


def decoding_workers(asked: int | None) -> int:
    """Processes to decode photographs with; more than 8 to a training process do not pay."""
    return min(8, cores()) if asked is None else asked


def use_device(asked: str) -> None:
    """Have start_processes() take a device, see choose_device().  Errors: UserError."""
    if choose_device(asked).index is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("each process has a GPU of its own: leave out the number")
    if asked != "auto":
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        os.environ["ACCELERATE_USE_CPU"] = "true" if asked == "cpu" else "false"


def create_accelerator(asked: str, otherwise: str = "auto") -> Accelerator:
    """The Accelerator for a precision, after start_processes(); see choose_precision().

    Errors: UserError where the device cannot compute in that precision.
    """
    precision = choose_precision(asked, PartialState().device.type, otherwise)
    try:
        # Buffers are averaged once an epoch (Net.average_buffers), not sent at every step.  The
        # newer name of this setting, which the warning asks for, is not in torch 2.11.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
        plain = DistributedDataParallelKwargs(broadcast_buffers=False)
        return Accelerator(mixed_precision=precision, kwargs_handlers=[plain])
    except (ValueError, ImportError) as error:
        raise UserError(f"precision {precision}: {one_line(error)}; try auto") from error


def device_time(device: torch.device) -> float:
    """The time in seconds when the device has done all it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()
