#!/usr/bin/env python3
"""The rival: times eager PyTorch on one part of a v1 model, in float32 on the CPU.

    python3 benches/rival_torch.py --model DIR --part c|b|a|text [--threads N] [--repeats N]

    text   the text tower on two prompts
    c      one Stage C step of one picture: the network on the conditional and unconditional half, guidance, DDPM update
    b      one Stage B step of one picture: both halves to logits, guidance, softmax, multinomial, renoising
    a      tokens of one picture to pixels

One warm-up, then `--repeats` timed passes. Prints one line of JSON. The networks are `tests/reference/torch_v1.py`.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 1
STAGE_C_GUIDANCE, STAGE_B_GUIDANCE, TEMPERATURE = 4.0, 2.0, 0.7
# A middle step: the cosine schedule's cumulative alphas before and after.
T, ALPHA_BAR, ALPHA_BAR_NEXT = 0.5, 0.49, 0.52


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


def step_of(part, network, sizes, torch):
    """A closure that runs one pass and returns its result."""
    import torch_v1

    generator = torch.Generator().manual_seed(SEED)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    width = sizes.config("text_encoder")["hidden_size"]
    text = random(2, sizes.text_length, width)
    t = torch.full((1,), T)

    if part == "text":
        ids = torch.randint(0, 2048, (2, sizes.text_length), generator=generator)
        mask = (torch.arange(sizes.text_length) < torch.tensor([[12], [2]])).long()
        return lambda: network(ids, mask)

    if part == "c":
        x = random(1, 16, sizes.latent, sizes.latent)

        def step_c():
            noise, uncond = network(torch.cat([x, x]), t.expand(2), text).chunk(2)
            noise = torch.lerp(uncond, noise, STAGE_C_GUIDANCE)
            alpha = ALPHA_BAR / ALPHA_BAR_NEXT
            mean = (x - (1 - alpha) / (1 - ALPHA_BAR) ** 0.5 * noise) / alpha**0.5
            sigma = ((1 - alpha) * (1 - ALPHA_BAR_NEXT) / (1 - ALPHA_BAR)) ** 0.5
            return mean + sigma * torch.randn_like(mean)

        return step_c

    labels = sizes.config("stage_b")["num_labels"]
    tokens = torch.randint(0, labels, (1, sizes.tokens, sizes.tokens), generator=generator)
    if part == "a":
        return lambda: network.decode_indices(tokens).clamp(0, 1)

    latents = random(1, 16, sizes.latent, sizes.latent)
    latents = torch.cat([latents, torch.zeros_like(latents)])

    def step_b():
        logits = network(torch.cat([tokens, tokens]), t.expand(2), latents, text)
        sampled = torch_v1.sample_tokens(logits, STAGE_B_GUIDANCE, TEMPERATURE)
        return torch.where(torch.rand(tokens.shape) <= T - 1 / 8, tokens, sampled)

    return step_b


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--part", choices=["text", "c", "b", "a"], required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read when torch is imported
    sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "reference")]
    import torch
    import torch_v1
    from flops import Sizes, gflop

    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    start = time.perf_counter()
    network = torch_v1.load_part(args.part, args.model)
    load_s = time.perf_counter() - start
    load_memory = memory_mib()
    reset_peak()

    step = step_of(args.part, network, Sizes(args.model), torch)
    seconds, cpu_seconds = [], []
    with torch.inference_mode():
        for _ in range(1 + args.repeats):
            start, cpu_start = time.perf_counter(), time.process_time()
            result = step()
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
    if not torch.isfinite(result).all():
        sys.exit(f"part {args.part}: the result is not finite")

    timed = seconds[1:]
    flop, _ = gflop(args.model)[args.part]
    print(
        json.dumps({
            "who": "torch", "part": args.part, "threads": args.threads, "repeats": args.repeats,
            "median_s": statistics.median(timed), "min_s": min(timed), "seconds": timed, "warm_up_s": seconds[0],
            "cpu_seconds": cpu_seconds[1:],
            "gflop": flop, "gflop_per_s": flop / min(timed), "load_s": load_s,
            "rss_loaded_mib": load_memory["now"], "rss_peak_loading_mib": load_memory["peak"],
            "rss_peak_mib": memory_mib()["peak"], "torch": torch.__version__,
            "instruction_set": torch.backends.cpu.get_cpu_capability(), "mkldnn": torch.backends.mkldnn.is_available(),
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
