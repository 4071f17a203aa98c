#!/usr/bin/env python3
"""Writes `tests/fixtures/lpips/`: LPIPS over VGG16 with few channels and random weights, two batches of pictures, their
distance and its gradient by the first, computed by PyTorch in float64.

    python3 tests/reference/make_lpips.py

Written from Zhang et al. 2018 (arXiv:1801.03924) and the constants of the `lpips` package 0.1.4. Needs torch and
safetensors.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parent.parent / "fixtures" / "lpips"
BLOCKS = [[4, 4], [6, 6], [8, 7, 8], [10, 10, 10], [12, 12, 12]]
HEIGHT, WIDTH = 21, 34


def weights(generator):
    tensors, number, inputs = {}, 0, 3
    for block, widths in enumerate(BLOCKS):
        for outputs in widths:
            scale = (2 / (9 * inputs)) ** 0.5
            tensors[f"features.{number}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) * scale
            tensors[f"features.{number}.bias"] = torch.randn(outputs, generator=generator) * 0.1
            number, inputs = number + 2, outputs
        number += 1
        tensors[f"lin{block}.model.1.weight"] = torch.rand(1, inputs, 1, 1, generator=generator)
    return tensors


def lpips(w, x, y):
    """The distance of each pair of pictures in -1..1."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=x.dtype).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=x.dtype).view(1, 3, 1, 1)
    x, y = (x - shift) / scale, (y - shift) / scale
    number, total = 0, 0
    for block, widths in enumerate(BLOCKS):
        if block > 0:
            x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
        for _ in widths:
            layer = w[f"features.{number}.weight"], w[f"features.{number}.bias"]
            x, y = (F.relu(F.conv2d(v, *layer, padding=1)) for v in (x, y))
            number += 2
        number += 1
        a, b = (v / (v.square().sum(1, keepdim=True).sqrt() + 1e-10) for v in (x, y))
        total = total + F.conv2d((a - b).square(), w[f"lin{block}.model.1.weight"]).mean((1, 2, 3))
    return total


def main():
    generator = torch.Generator().manual_seed(20)
    stored = weights(generator)
    x, y = (torch.rand(2, 3, HEIGHT, WIDTH, generator=generator) for _ in range(2))
    wide = {name: tensor.double() for name, tensor in stored.items()}
    tracked = x.double().requires_grad_()
    each = lpips(wide, 2 * tracked - 1, 2 * y.double() - 1)
    each.mean().backward()
    assert tracked.grad.isfinite().all()
    FOLDER.mkdir(exist_ok=True)
    save_file(stored, FOLDER / "weights.safetensors")
    case = {"x": x, "y": y, "each": each.detach().float(), "loss": each.mean().detach().float().view(1)}
    case["grad.x"] = tracked.grad.float()
    save_file({name: tensor.contiguous() for name, tensor in case.items()}, FOLDER / "case.safetensors")
    facts = {
        "case": "lpips",
        "description": "LPIPS (random weights) of pictures in 0..1, the mean over both samples, and its gradient by x",
        "made_by": "tests/reference/make_lpips.py",
        "settings": {"torch": torch.__version__},
    }
    (FOLDER / "case.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
