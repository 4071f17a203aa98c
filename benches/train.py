#!/usr/bin/env python3
"""Times training steps beside eager PyTorch and writes a dated record.

    python3 benches/train.py [--parts a,b,c,full] [--threads N] [--repeats N] [--rounds N] [--no-record]

`a`, `b` and `c` are the stages at the size of the bundled emoji model, batch 16; `full` is Stage C at the paper's width
with 8 of its 32 blocks, batch 4 (what fits beside PyTorch in 24 GiB; its model is cut from build/bench-model, which is
made if it is missing). Ours and the rival run in turn, each in a process of its own, the same step from latents and
tokens to changed weights. Memory is what the process needs beyond the weights in training, their gradients and the
optimiser's two moments (ours keeps an average of the weights too, which is counted). See `run.py` for what is shared.
"""

import argparse
import datetime
import os
import platform
import re
import statistics
import subprocess
import sys

import run as bench

BUILD = bench.BUILD
EMOJI = bench.REPOSITORY / "examples" / "models" / "emoji-v1"
FULL = BUILD / "bench-model-8-blocks"
BLOCKS = 8
BLOCK_PARTS = 3  # ResBlock, TimestepBlock, AttnBlock

PARTS = {
    "a": ("Stage A, emoji size, batch 16", EMOJI, "a", 16, 128),
    "b": ("Stage B with its encoder, emoji size, batch 16", EMOJI, "b", 16, 128),
    "c": ("Stage C, emoji size, batch 16", EMOJI, "c", 16, 128),
    "full": ("Stage C, full width, 8 of 32 blocks, batch 4", FULL, "c", 4, 512),
}


def ensure_full():
    """The full-size model with fewer blocks in Stage C."""
    if (FULL / "stage_c" / "model.safetensors").exists():
        return
    whole = bench.GENERATIONS[1]
    bench.ensure_model(whole.model, whole)
    code = f"""
import json, pathlib, os
from safetensors import safe_open
from safetensors.torch import save_file
whole, cut = pathlib.Path({str(whole.model)!r}), pathlib.Path({str(FULL)!r})
(cut / "stage_c").mkdir(parents=True, exist_ok=True)
for entry in whole.iterdir():
    if entry.name != "stage_c" and not (cut / entry.name).exists():
        os.symlink(entry.resolve(), cut / entry.name)
config = json.loads((whole / "stage_c" / "config.json").read_text())
config["depth"] = {BLOCKS}
(cut / "stage_c" / "config.json").write_text(json.dumps(config))
with safe_open(whole / "stage_c" / "model.safetensors", "pt") as file:
    kept = lambda name: not name.startswith("blocks.") or int(name.split(".")[1]) < {BLOCKS * BLOCK_PARTS}
    save_file({{name: file.get_tensor(name) for name in file.keys() if kept(name)}}, cut / "stage_c" / "model.safetensors")
"""
    subprocess.run([bench.python(), "-c", code], check=True)


class Row:
    """All timed steps of a part."""

    def __init__(self, part):
        self.part, self.ours, self.rival = part, [], []

    @staticmethod
    def seconds(reports):
        passes = [s for report in reports for s in report["seconds"]]
        return statistics.median(passes), min(passes)

    @staticmethod
    def beyond(reports):
        """MiB beyond weights, gradients and moments; the weights are there before the first step."""
        report = min(reports, key=lambda r: r["rss_peak_mib"])
        state = 3 * 4 * report["trained_parameters"] / 2**20
        return report["rss_peak_mib"] - report["rss_before_mib"] - state

    def line(self):
        (ours, ours_min), (rival, rival_min) = self.seconds(self.ours), self.seconds(self.rival)
        unprepared = min(report["unprepared_s"] for report in self.ours)
        return (
            f"| {PARTS[self.part][0]} | {ours:.3f} ({ours_min:.3f}) | {rival:.3f} ({rival_min:.3f}) "
            f"| **{ours / rival:.2f}** | {self.beyond(self.ours):.0f} | {self.beyond(self.rival):.0f} "
            f"| {unprepared:.3f} |"
        )

    def other_load(self):
        reports = self.ours + self.rival
        return max(0.0, sum(r["others_s"] for r in reports) / sum(r["wall_s"] for r in reports))


def table(rows):
    return "\n".join([
        "| step | ours: median (min), s | PyTorch: median (min), s | ours / PyTorch | ours: MiB beyond the state "
        "| PyTorch: MiB beyond the state | ours, nothing prepared, s |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *(row.line() for row in rows),
    ])  # fmt: skip


def record(args, rows):
    name, flags = bench.cpu()
    load = max(row.other_load() for row in rows)
    changed = " with uncommitted changes" if bench.first_line("git", "status", "--porcelain", "-uno") else ""
    lines = [
        f"# {datetime.date.today()}, training, {name}",
        "",
        f"- machine: {name}, {args.threads} of {os.cpu_count()} cores; flags {' '.join(flags)}",
        f"- ours: {bench.first_line('git', 'rev-parse', '--short', 'HEAD')}{changed}, "
        f"{bench.first_line('rustc', '--version')}",
        f"- rival: eager PyTorch {rows[0].rival[0]['torch']}, fused AdamW, Python {platform.python_version()}, networks of "
        "`tests/reference/torch_v1.py`",
        f"- method: `benches/train.py`, float32, {args.rounds} rounds of {args.repeats} steps each after one that warms "
        "up, in turn",
    ]
    if load > bench.BUSY_LIMIT:
        lines.append(f"- **other processes used up to {load:.1f} cores meanwhile: not a quiet machine**")
    slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    path = bench.RECORDS / f"{datetime.date.today()}-{slug}-training.md"
    path.write_text("\n".join([*lines, "", table(rows), ""]))
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    binary = bench.build_bench("training")
    if "full" in args.parts:
        ensure_full()
    rows = []
    for part in args.parts:
        _, model, stage, batch, size = PARTS[part]
        row = Row(part)
        common = ["--model", model, "--part", stage, "--batch", batch, "--size", size]
        common += ["--threads", args.threads, "--repeats", args.repeats]
        for _ in range(args.rounds):
            row.ours.append(bench.run([binary, *common]))
            row.rival.append(bench.run([bench.python(), bench.REPOSITORY / "benches" / "rival_training.py", *common]))
        rows.append(row)
        print(table([row]), file=sys.stderr)
    print(table(rows))
    if not args.no_record:
        print(f"\nrecorded in {record(args, rows).relative_to(bench.REPOSITORY)}")


if __name__ == "__main__":
    main()
