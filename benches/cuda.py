#!/usr/bin/env python3
"""Times the library on a GPU beside PyTorch on the same GPU, part by part, and writes a dated record.

    python3 benches/cuda.py [--generation 1|2] [--model DIR] [--parts text,c,b,a] [--repeats N] [--stages PROGRAM]
                            [--batches 1,16] [--no-record]

Ours in bf16. Rivals, in the same run: eager in float16, and `torch.compile(mode="max-autotune")` in float16; for v2
diffusers' own modules, for v1 the networks of `tests/reference/torch_v1.py`. One after the other, each in a process of
its own, on the same weights. Whole pictures are ours alone. Predictions stand in
`benches/record/2026-11-23-cuda-predictions.md`.

A machine without cargo is given the compiled bench with --stages (`tools/bench-cuda.sh --prepare` makes it).
"""

import argparse
import datetime
import re
import statistics
import subprocess
import sys

import run
from flops import generation, gflop

RIVALS = {"eager": [], "compiled": ["--compile", "max-autotune"]}
WHO = {"ours": "ours, bf16", "eager": "eager, fp16", "compiled": "compiled, fp16"}


def milliseconds(report):
    """(median, minimum)."""
    return 1e3 * statistics.median(report["seconds"]), 1e3 * min(report["seconds"])


def measure(args, about):
    """Per part, the report of each."""
    rows = {}
    for part in args.parts:
        common = ["--model", args.model, "--part", part, "--repeats", args.repeats, "--device", "cuda"]
        row = {"ours": run.run([args.stages, *common, "--dtype", "bf16"])}
        for name, more in RIVALS.items():
            try:
                row[name] = run.run([run.python(), about.rival, *common, "--dtype", "float16", *more])
            except subprocess.CalledProcessError as error:
                print(f"{part}, {name}: {error}", file=sys.stderr)
        rows[part] = row
        print(table({part: row}, args.model, about), file=sys.stderr)
    return rows


def table(rows, model, about):
    counts = gflop(model)
    lines = [
        f"| part | {' | '.join(f'{who}: median (min), ms' for who in WHO.values())} | ours / eager | ours / compiled "
        "| ours, TFLOP/s | eager: device peak, MiB |",
        "|---|" + "--:|" * 7,
    ]
    for part, row in rows.items():
        times = {who: milliseconds(row[who]) for who in WHO if who in row}
        cells = [f"{times[who][0]:.2f} ({times[who][1]:.2f})" if who in times else "-" for who in WHO]
        ratios = [f"**{times['ours'][0] / times[who][0]:.2f}**" if who in times else "-" for who in RIVALS]
        whole, spared = counts[part]
        peak = row["eager"]["device_peak_mib"] if "eager" in row else 0
        lines.append(
            f"| {about.parts[part]} | {' | '.join(cells)} | {' | '.join(ratios)} "
            f"| {(whole - spared) / times['ours'][1]:.0f} | {peak:.0f} |"
        )
    return "\n".join(lines)


def pictures(args):
    """Whole pictures of ours, one and several at a time."""
    lines = []
    for batch in args.batches:
        options = ["--part", "picture", "--batch", batch, "--repeats", args.repeats]
        report = run.run([args.stages, "--model", args.model, "--device", "cuda", "--dtype", "bf16", *options])
        median, best = milliseconds(report)
        lines.append(
            f"- {batch} at a time, the model's own steps: {median / batch:.1f} ms a picture (best {best / batch:.1f}), "
            f"the first call {report['warm_up_s']:.2f} s; {report['device_bytes'] / 2**20:.0f} MiB on the device"
        )
    return "\n".join(lines)


def gpu():
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return run.first_line(*query)


def record(args, about, text):
    name, changed = gpu(), " with uncommitted changes" if run.first_line("git", "status", "--porcelain", "-uno") else ""
    lines = [
        f"# {datetime.date.today()}, {name}",
        "",
        f"- GPU, driver, memory: {name}",
        f"- ours: {run.first_line('git', 'rev-parse', '--short', 'HEAD')}{changed}, activations in bf16",
        f"- rivals: PyTorch, {about.networks}, float16, eager and compiled with max-autotune",
        f"- method: `benches/cuda.py`, {args.repeats} passes after a warm-up; a step of ours is the difference of two "
        "walks of different length, divided by the steps between them",
        "",
        text,
        "",
    ]
    slug = re.sub("[^a-z0-9]+", "-", name.split(",")[0].lower()).strip("-")
    path = run.RECORDS / f"{datetime.date.today()}-{slug}-v{args.generation}.md"
    path.write_text("\n".join(lines))
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generation", type=int, choices=run.GENERATIONS, default=2)
    parser.add_argument("--model", type=run.Path)
    parser.add_argument("--parts", type=lambda text: text.split(","))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16])
    parser.add_argument("--stages", help="the compiled bench; cargo builds it otherwise")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    if args.model and (args.model / "model_index.json").exists():
        args.generation = generation(args.model)
    about = run.GENERATIONS[args.generation]
    args.model, args.parts = args.model or about.model, args.parts or list(about.parts)
    args.stages = args.stages or run.build_bench("stages")
    run.ensure_model(args.model, about)
    text = "\n\n".join([table(measure(args, about), args.model, about), pictures(args)])
    print(text)
    if not args.no_record:
        print(f"\nrecorded in {record(args, about, text)}")


if __name__ == "__main__":
    main()
