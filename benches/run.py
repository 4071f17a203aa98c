#!/usr/bin/env python3
"""Times the library beside eager PyTorch, part by part, and writes a dated record.

    python3 benches/run.py [--model DIR] [--parts text,c,b,a] [--threads 1,2] [--repeats N] [--rounds N] [--no-record]

Per part and thread count the two run in turn (ours, rival, ours, rival), each in a process of its own, on the same
weights. The table gives the median and the minimum of all timed passes; the ratio is ours / rival of the medians,
below 1 where the library is faster. Other load on the machine during each process is measured and shown: a record
with much of it says so.

The model folder (random weights at the paper's size) is made under build/bench-model if it is missing. The Python
side needs `pip install -r benches/requirements.txt`; build/venv is used where it exists.
"""

import argparse
import datetime
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BUILD = REPOSITORY / "build"
RECORDS = REPOSITORY / "benches" / "record"
# What each part times, for the table.
PARTS = {
    "text": "Text tower, 2 prompts",
    "c": "Stage C, one step",
    "b": "Stage B, one step",
    "a": "Stage A, decoding",
}
BUSY_LIMIT = 0.1  # cores of other load above which a record is marked


def python():
    venv = BUILD / "venv" / "bin" / "python"
    return str(venv) if venv.exists() else sys.executable


def build_bench(name):
    """The path of the compiled bench."""
    # Without the library's own global allocator, so that stages.rs can have one that counts.
    command = ["cargo", "bench", "--bench", name, "--no-default-features", "--no-run", "--message-format=json"]
    lines = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    for message in map(json.loads, lines):
        if message.get("executable") and message["target"]["name"] == name:
            return message["executable"]
    sys.exit(f"cargo built no bench {name}")


def machine_seconds():
    """Core-seconds that all processes have used since the machine started."""
    user, nice, system, _idle, _wait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def child_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(command):
    """Runs a process that prints a line of JSON last; adds wall time and core-seconds of others."""
    start, machine, child = time.monotonic(), machine_seconds(), child_seconds()
    output = subprocess.run(
        list(map(str, command)), cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    wall = time.monotonic() - start
    report = json.loads(output.splitlines()[-1])
    report["wall_s"] = wall
    report["others_s"] = machine_seconds() - machine - (child_seconds() - child)
    return report


def ensure_model(model):
    if not (model / "model_index.json").exists():
        print(f"making {model} (9 GB)", file=sys.stderr)
        subprocess.run(
            [python(), REPOSITORY / "tests" / "reference" / "make_full_size.py", model], check=True, stdout=sys.stderr
        )


class Row:
    """All timed passes of a part at a thread count."""

    def __init__(self, part, threads):
        self.part, self.threads = part, threads
        self.reports = {"wuerstchen": [], "torch": []}

    def seconds(self, who):
        """(median, minimum) of the timed passes of all rounds."""
        passes = []
        for report in self.reports[who]:
            passes += report["seconds"]
        return statistics.median(passes), min(passes)

    def peak(self, who):
        return max(report["rss_peak_mib"] for report in self.reports[who])

    def other_load(self):
        """Cores that other processes used on average."""
        reports = [report for reports in self.reports.values() for report in reports]
        return max(0.0, sum(r["others_s"] for r in reports) / sum(r["wall_s"] for r in reports))


def measure(args, stages):
    rows = []
    for threads in args.threads:
        for part in args.parts:
            row = Row(part, threads)
            common = ["--model", args.model, "--part", part, "--threads", threads, "--repeats", args.repeats]
            for _ in range(args.rounds):
                row.reports["wuerstchen"].append(run([stages, *common]))
                row.reports["torch"].append(run([python(), REPOSITORY / "benches" / "rival_torch.py", *common]))
            rows.append(row)
            print(table([row], args.model), file=sys.stderr)
    return rows


def table(rows, model):
    sys.path.insert(0, str(REPOSITORY / "benches"))
    from flops import gflop

    counts = gflop(model)
    lines = [
        "| part | threads | ours: median (min), s | PyTorch: median (min), s | ours / PyTorch "
        "| ours, GFLOP/s | PyTorch, GFLOP/s | ours: peak, MiB | PyTorch: peak, MiB | other load, cores |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        (ours, ours_min), (rival, rival_min) = row.seconds("wuerstchen"), row.seconds("torch")
        whole, invariant = counts[row.part]
        lines.append(
            f"| {PARTS[row.part]} | {row.threads} | {ours:.3f} ({ours_min:.3f}) | {rival:.3f} ({rival_min:.3f}) "
            f"| **{ours / rival:.2f}** | {(whole - invariant) / ours_min:.0f} | {whole / rival_min:.0f} "
            f"| {row.peak('wuerstchen'):.0f} | {row.peak('torch'):.0f} | {row.other_load():.2f} |"
        )
    return "\n".join(lines)


def memory_section(args, stages):
    """Opening, and what a generation needs; ours alone."""
    opened = run([stages, "--model", args.model, "--part", "open"])
    threads = max(args.threads)
    made = run([stages, "--model", args.model, "--part", "generate", "--threads", threads])
    tokenizer = opened["tokenizer_s"]
    second = made["second"]
    return "\n".join([
        f"- opening: {opened['median_s'] * 1e3:.1f} ms (first time {opened['first_s'] * 1e3:.1f} ms"
        + (f"; reading the tokenizer alone {tokenizer * 1e3:.1f} ms" if tokenizer else "")
        + f"); resident after it {opened['rss_after_mib']:.0f} MiB, of it {opened['anonymous_after_mib']:.0f} MiB not "
        f"mapped from files; weights on disk {opened['weights_on_disk_mib']:.0f} MiB",
        f"- a picture ({made['stage_c_steps']} Stage C and {made['stage_b_steps']} Stage B steps, {threads} threads): "
        f"peak resident {made['rss_peak_mib']:.0f} MiB, {made['anonymous_after_mib']:.0f} MiB not mapped from files",
        f"- allocations of the second picture: {second['allocations']} of {second['bytes']} bytes in all; of at least "
        f"4 KiB: {second['large']}, of them outputs {second['large_outputs']}"
        + ("" if made["second_allocates_only_the_output"] else f"; others (bytes): {second['large_others']}"),
    ])  # fmt: skip


def gemm_peak():
    """What `benches/gemm.rs` says about the machine's peak, if it is there."""
    if not (REPOSITORY / "benches" / "gemm.rs").exists():
        return []
    command = ["cargo", "bench", "--bench", "gemm"]
    output = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True).stdout
    return [line.strip() for line in output.splitlines() if re.search("peak", line, re.IGNORECASE)]


def cpu():
    """(name, flags that matter)."""
    facts = dict(
        map(str.strip, line.split(":", 1)) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    )
    name = (
        f"{facts.get('model name', platform.machine())} (family {facts.get('cpu family')}, model {facts.get('model')})"
    )
    flags = [flag for flag in facts.get("flags", "").split() if re.match("avx|fma|amx", flag)]
    return name, flags


def first_line(*command):
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout.split("\n")[0]


def record(args, rows, memory, peak):
    name, flags = cpu()
    rival = rows[0].reports["torch"][0]
    changed = " with uncommitted changes" if first_line("git", "status", "--porcelain", "-uno") else ""
    load = max(row.other_load() for row in rows)
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    lines = [
        f"# {datetime.date.today()}, {name}",
        "",
        f"- machine: {name}, {os.cpu_count()} cores, {memory_gib} GiB; "
        f"flags {' '.join(flags)}; {platform.system()} {platform.release()}",
        f"- ours: {first_line('git', 'rev-parse', '--short', 'HEAD')}{changed}, {first_line('rustc', '--version')}",
        f"- rival: eager PyTorch {rival['torch']} ({rival['instruction_set']}, oneDNN {rival['mkldnn']}), "
        f"Python {platform.python_version()}, networks of `tests/reference/torch_v1.py`",
        f"- method: `benches/run.py`, float32, {args.rounds} rounds of {args.repeats} passes each after a warm-up, in "
        "turn; GFLOP/s from the minimum, by the formulas of `benches/flops.py`; a step of ours does not "
        "repeat what stays the same between steps, and is credited only with what it does",
        *(f"- {line}" for line in peak),
        *(
            [f"- **other processes used up to {load:.1f} cores meanwhile: not a quiet machine**"]
            if load > BUSY_LIMIT
            else []
        ),
        "",
        table(rows, args.model),
        "",
        memory,
        "",
    ]
    RECORDS.mkdir(exist_ok=True)
    slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    path = RECORDS / f"{datetime.date.today()}-{slug}.md"
    path.write_text("\n".join(lines))
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUILD / "bench-model")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()

    stages = build_bench("stages")
    ensure_model(args.model)
    peak = gemm_peak()
    rows = measure(args, stages)
    memory = memory_section(args, stages)
    print("\n".join(["", table(rows, args.model), "", memory, *peak]))
    if not args.no_record:
        print(f"\nrecorded in {record(args, rows, memory, peak).relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
