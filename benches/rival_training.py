#!/usr/bin/env python3
"""The rival of training: times steps of eager PyTorch, in float32 on the CPU.

    python3 benches/rival_training.py --model DIR --part a|b|c [--batch N] [--size PX] [--threads N] [--repeats N]

The same step as `training.rs` beside it: from latents and tokens of frozen networks to changed weights. The frozen
text tower runs without gradients, then forward, backward, `clip_grad_norm_` and `AdamW` (PyTorch's fused one, which is
its fastest). The networks are `tests/reference/torch_v1.py`. Prints one line of JSON.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import rival

LABEL_SMOOTHING, KEPT_WEIGHT = 0.1, 0.3


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--part", choices=["a", "b", "c"], required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    return args


def alpha_bar(t):
    import torch

    s = torch.tensor(0.008)
    squared = lambda x: torch.cos(x / (1 + s) * torch.pi / 2) ** 2  # noqa: E731
    return (squared(t + s) / squared(s)).clamp(1e-4, 0.9999)


def loss_of(args, torch_v1):
    """The networks in training, and a closure that computes the loss of one batch."""
    import torch
    import torch.nn.functional as F

    index = json.loads((args.model / "model_index.json").read_text())
    config = lambda part: json.loads((args.model / part / "config.json").read_text())  # noqa: E731
    trained = lambda part: torch_v1.load_part(part, args.model).requires_grad_(True).train()  # noqa: E731
    n = args.batch
    encoder_side = args.size * index["image_encoder_size"] // index["image_size"]
    latent_side = encoder_side // 32

    if args.part == "a":
        network = trained("a")
        pixels = torch.rand(n, 3, args.size, args.size)

        def loss_a():
            z = network.down_blocks(network.in_block(pixels)).permute(0, 2, 3, 1)
            codes, _ = network.vquantizer(z)
            codebook = (codes - z.detach()).square().mean() + 0.25 * (z - codes.detach()).square().mean()
            passed = (z + (codes - z).detach()).permute(0, 3, 1, 2)
            decoded = network.out_block(network.up_blocks(passed))
            return F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels) + codebook

        return [network], loss_a

    tower = torch_v1.load_part("text", args.model)
    length = index.get("text_length", config("text_encoder")["max_position_embeddings"])
    ids = torch.randint(0, config("text_encoder")["vocab_size"] - 2, (n, length))
    mask = torch.ones_like(ids)
    times = torch.rand(n)
    if args.part == "c":
        network = trained("c")
        latents = torch.randn(n, 16, latent_side, latent_side)

        def loss_c():
            with torch.no_grad():
                text = tower(ids, mask)
            noise, share = torch.randn_like(latents), alpha_bar(times)[:, None, None, None]
            predicted = network(share.sqrt() * latents + (1 - share).sqrt() * noise, times, text)
            weights = (1 - alpha_bar(times)) / (1 + alpha_bar(times))
            return ((predicted - noise).square().mean(dim=[1, 2, 3]) * weights).mean()

        return [network], loss_c

    network = trained("b")
    encoder = trained("image")
    codes, side = config("stage_b")["num_labels"], args.size // 4
    tokens = torch.randint(0, codes, (n, side, side))
    pixels = torch.randn(n, 3, encoder_side, encoder_side)

    def loss_b():
        with torch.no_grad():
            text = tower(ids, mask)
        replaced = torch.rand(tokens.shape) <= times[:, None, None]
        noised = torch.where(replaced, torch.randint(0, codes, tokens.shape), tokens)
        logits = network(noised, times, encoder(pixels), text)
        entropy = F.cross_entropy(logits, tokens, label_smoothing=LABEL_SMOOTHING, reduction="none")
        weights = 1 - (1 - replaced.float()) * (1 - times[:, None, None]) * (1 - KEPT_WEIGHT)
        return ((entropy * weights).sum(dim=[1, 2]) / weights.sum(dim=[1, 2])).mean()

    return [network, encoder], loss_b


def main():
    args = arguments()
    sys.path.append(str(rival.HERE.parent / "tests" / "reference"))
    import torch
    import torch_v1

    torch.set_num_threads(args.threads)
    torch.manual_seed(rival.SEED)
    networks, loss_of_batch = loss_of(args, torch_v1)
    parameters = [p for network in networks for p in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)
    before = rival.memory_mib()["now"]
    rival.reset_peak()
    seconds = []
    for _ in range(1 + args.repeats):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    timed = seconds[1:]
    print(
        json.dumps({
            "who": "torch", "part": args.part, "batch": args.batch, "median_s": statistics.median(timed),
            "min_s": min(timed), "seconds": timed, "warm_up_s": seconds[0], "loss": loss.item(),
            "trained_parameters": sum(p.numel() for p in parameters), "rss_before_mib": before,
            "rss_peak_mib": rival.memory_mib()["peak"], "torch": torch.__version__,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
