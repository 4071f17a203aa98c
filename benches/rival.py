"""What the rivals of `benches/run.py` and `benches/cuda.py` share: how a part is timed, and the line of JSON that tells of it."""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 1
# Of the prompts that the text towers are timed on: how many tokens are not padding.
PROMPT_LENGTHS = (12, 2)


def memory_mib():
    """Resident memory now and its peak since the last `reset_peak`, in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: round(int(status[field].split()[0]) / 1024) for key, field in (("now", "VmRSS"), ("peak", "VmHWM"))}


def reset_peak():
    """Makes the kernel's peak start again at the present size."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # then the peak includes loading


def arguments(description, parts):
    """The command line. Call it before torch is imported: the number of threads is read then."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--part", choices=parts, required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--compile", metavar="MODE", help="torch.compile's mode; eager without")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    return args


def prompts(length):
    """Token numbers and the attention mask of the text towers' prompts."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, 2048, (len(PROMPT_LENGTHS), length), generator=generator)
    return ids, (torch.arange(length) < torch.tensor(PROMPT_LENGTHS)[:, None]).long()


def placed(network):
    """A function that brings inputs to where the network is; floats in its type."""
    like = next(network.parameters())
    return lambda x: x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device)


def prepared(args, network):
    """The network on the asked device, in the asked type, compiled if asked."""
    import torch

    network = network.to(args.device, getattr(torch, args.dtype))
    if args.compile:
        network.forward = torch.compile(network.forward, mode=args.compile)
        if hasattr(network, "decode"):
            network.decode = torch.compile(network.decode, mode=args.compile)
    return network


def time_part(args, who, load, step_of):
    """Loads with `load()`, runs `step_of(network)` once and `--repeats` times more, and prints the report."""
    import torch

    from flops import gflop

    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    start = time.perf_counter()
    network = prepared(args, load())
    load_s = time.perf_counter() - start
    load_memory = memory_mib()
    reset_peak()

    step = step_of(network)
    on_gpu = args.device != "cpu"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    seconds, cpu_seconds = [], []
    with torch.inference_mode():
        # A compiled network is recorded in its first calls.
        for _ in range(3 if args.compile else 0):
            step()
        for _ in range(1 + args.repeats):
            wait()
            start, cpu_start = time.perf_counter(), time.process_time()
            result = step()
            wait()
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
    if not torch.isfinite(result).all():
        sys.exit(f"part {args.part}: the result is not finite")

    timed = seconds[1:]
    flop, _ = gflop(args.model)[args.part]
    print(
        json.dumps({
            "who": who, "part": args.part, "threads": args.threads, "repeats": args.repeats,
            "median_s": statistics.median(timed), "min_s": min(timed), "seconds": timed, "warm_up_s": seconds[0],
            "cpu_seconds": cpu_seconds[1:],
            "gflop": flop, "gflop_per_s": flop / min(timed), "load_s": load_s,
            "rss_loaded_mib": load_memory["now"], "rss_peak_loading_mib": load_memory["peak"],
            "rss_peak_mib": memory_mib()["peak"], "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu", "dtype": args.dtype, "compile": args.compile,
            "device_peak_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0,
            "instruction_set": torch.backends.cpu.get_cpu_capability(), "mkldnn": torch.backends.mkldnn.is_available(),
        })
    )  # fmt: skip
