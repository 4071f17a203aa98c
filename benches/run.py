#!/usr/bin/env python3
"""Times the library beside its rival, part by part, and writes a dated record.

    python3 benches/run.py [--generation 1|2] [--model DIR] [--parts text,c,b,a] [--threads 1,2] [--repeats N]
                           [--rounds N] [--weights f32|bf16] [--dtype f32,i8] [--no-record]

The rival is eager PyTorch: for v1 the networks of `tests/reference/torch_v1.py`, for v2 diffusers' own. Per part and
thread count the two run in turn (ours, rival, ours, rival), each in a process of its own, on the same weights. The
table gives the median and the minimum of all timed passes; the ratio is ours / rival of the medians, below 1 where the
library is faster. --weights is the type of the weights on disk, in which the rival computes as well; --dtype has one or
more types that the library computes in, each timed beside the one rival. Other load on the machine during each process
is measured and shown: where it is much, the record says so. For v2 a decoder step that computes everything itself is timed too, beside what is computed once.

The model folder (random weights at the published size) is made under build/bench-model or build/bench-model-v2 if it
is missing; one that is given with --model says itself of which generation it is. The Python side needs `pip install -r
benches/requirements.txt`, for v2 `-r tests/reference/requirements.txt`; build/venv is used where it exists.
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

from flops import generation, gflop

REPOSITORY = Path(__file__).resolve().parent.parent
BUILD = REPOSITORY / "build"
EMOJI = REPOSITORY / "examples" / "models" / "emoji-v1"
RECORDS = REPOSITORY / "benches" / "record"


class Generation:
    """What is measured of a generation of the model, and beside whom. `parts` has their names for the table."""

    def __init__(self, model, size, maker, rival, rival_name, networks, parts):
        self.model, self.size, self.maker = BUILD / model, size, REPOSITORY / "tests" / "reference" / maker
        self.rival, self.rival_name, self.networks = REPOSITORY / "benches" / rival, rival_name, networks
        self.parts = parts


GENERATIONS = {
    1: Generation(
        "bench-model", "9 GB", "make_full_size.py", "rival_torch.py", "PyTorch", "networks of "
        "`tests/reference/torch_v1.py`",
        {
            "text": "Text tower, 2 prompts", "c": "Stage C, one step", "b": "Stage B, one step",
            "a": "Stage A, decoding",
        },
    ),
    2: Generation(
        "bench-model-v2", "12 GB", "make_full_size_v2.py", "rival_diffusers.py", "diffusers", "diffusers' own modules",
        {
            "text": "v2: the prior's text tower, 2 prompts", "text-b": "v2: the decoder's text tower, 2 prompts",
            "c": "v2: prior, one step", "b": "v2: decoder, one step", "a": "v2: VQGAN, decoding",
        },
    ),
}  # fmt: skip
RIVAL_DTYPES = {"f32": "float32", "bf16": "bfloat16"}  # by --weights
DTYPES = ["f32", "bf16", "i8"]
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


def ensure_model(model, about, dtype):
    if not (model / "model_index.json").exists():
        print(f"making {model} ({about.size})", file=sys.stderr)
        subprocess.run([python(), about.maker, model, "--dtype", dtype], check=True, stdout=sys.stderr)


class Row:
    """All timed passes of a part at a thread count: the library's in one type, and the rival's."""

    def __init__(self, part, threads, dtype, rival_reports):
        self.part, self.threads, self.dtype = part, threads, dtype
        self.reports = {"ours": [], "rival": rival_reports}

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


def measure(args, about, stages):
    rows = []
    for threads in args.threads:
        for part in args.parts:
            rival_reports = []
            these = [Row(part, threads, dtype, rival_reports) for dtype in args.dtype]
            common = ["--model", args.model, "--part", part, "--threads", threads, "--repeats", args.repeats]
            for _ in range(args.rounds):
                for row in these:
                    row.reports["ours"].append(run([stages, *common, "--dtype", row.dtype]))
                rival_reports.append(run([python(), about.rival, *common, "--dtype", RIVAL_DTYPES[args.weights]]))
            rows += these
            print(table(these, args.model, about), file=sys.stderr, flush=True)
    return rows


def table(rows, model, about):
    counts, name = gflop(model), about.rival_name
    lines = [
        f"| part | threads | ours in | ours: median (min), s | {name}: median (min), s | ours / {name} "
        f"| ours, GFLOP/s | {name}, GFLOP/s | ours: peak, MiB | {name}: peak, MiB | other load, cores |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        (ours, ours_min), (rival, rival_min) = row.seconds("ours"), row.seconds("rival")
        whole, spared = counts[row.part]
        lines.append(
            f"| {about.parts[row.part]} | {row.threads} | {row.dtype} | {ours:.3f} ({ours_min:.3f}) | {rival:.3f} ({rival_min:.3f}) "
            f"| **{ours / rival:.2f}** | {(whole - spared) / ours_min:.0f} | {whole / rival_min:.0f} "
            f"| {row.peak('ours'):.0f} | {row.peak('rival'):.0f} | {row.other_load():.2f} |"
        )
    return "\n".join(lines)


def memory_section(args, stages):
    """Opening, and what a generation needs; ours alone, in the first of the types."""
    opened = run([stages, "--model", args.model, "--part", "open"])
    threads = max(args.threads)
    made = run([stages, "--model", args.model, "--part", "generate", "--threads", threads, "--dtype", args.dtype[0]])
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


def first_picture_section(args, stages):
    """The bundled model, from the start of a process to a PNG on disk; ours alone."""
    threads = max(args.threads)
    told = [run([stages, "--model", EMOJI, "--part", "first", "--threads", threads]) for _ in range(9)]
    whole = statistics.median(report["wall_s"] for report in told)
    parts = {name: statistics.median(report["parts"][name] for report in told) for name in told[0]["parts"]}
    return (
        f"- the bundled model, from the start of a process to a PNG on disk ({threads} threads, its default steps, median "
        f"of {len(told)}): {whole:.3f} s; within it " + ", ".join(f"{name} {s * 1e3:.1f} ms" for name, s in parts.items())
    )


def hoisting_section(args, stages):
    """v2: what computing once what stays the same between steps gains; ours alone."""
    threads = max(args.threads)
    told = run([stages, "--model", args.model, "--part", "hoist", "--threads", threads, "--repeats", args.repeats])
    return (
        f"- a decoder step with everything that stays the same computed before: {told['median_s']:.3f} s; with it "
        f"computed in the step: {told['whole_s']:.3f} s, of it the text's keys and values {told['text_s']:.3f} s, the "
        f"image embedding at every level, with its layers folded, {told['injection_s']:.3f} s, the timestep "
        f"modulations {told['modulations_s']:.3f} s ({threads} threads)\n"
        f"- the first layers of its blocks that the image embedding joins, per step: "
        f"{told['layers_folded_s']:.3f} s with the embedding's mapping folded into them once per picture, "
        f"{told['layers_unfolded_s']:.3f} s over the mapped embedding, as diffusers computes them"
    )


def gemm_peak():
    """What `benches/gemm.rs` says about the machine's peak, if it is there."""
    if not (REPOSITORY / "benches" / "gemm.rs").exists():
        return []
    command = ["cargo", "bench", "--bench", "gemm"]
    output = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True).stdout
    return [line.strip() for line in output.splitlines() if line.startswith("multiply-add peak")]


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


def record(args, about, rows, memory, peak):
    name, flags = cpu()
    rival = rows[0].reports["rival"][0]
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
        f"Python {platform.python_version()}, {about.networks}",
        f"- method: `benches/run.py`, weights {args.weights}, rival {RIVAL_DTYPES[args.weights]}, {args.rounds} rounds of "
        f"{args.repeats} passes each after a warm-up, in turn; GFLOP/s from the minimum, by the formulas of "
        "`benches/flops.py`; a step of ours does not "
        "repeat what stays the same between steps, and is credited only with what it does",
        *(f"- {line}" for line in peak),
        *(
            [f"- **other processes used up to {load:.1f} cores meanwhile: not a quiet machine**"]
            if load > BUSY_LIMIT
            else []
        ),
        "",
        table(rows, args.model, about),
        "",
        memory,
        "",
    ]
    RECORDS.mkdir(exist_ok=True)
    slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    kind = ("" if args.generation == 1 else f"-v{args.generation}") + ("" if args.weights == "f32" else f"-{args.weights}")
    path = RECORDS / f"{datetime.date.today()}-{slug}{kind}.md"
    path.write_text("\n".join(lines))
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generation", type=int, choices=GENERATIONS, help="1 by default, else the model's own")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--parts", type=lambda text: text.split(","))
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--weights", choices=list(RIVAL_DTYPES), default="f32")
    parser.add_argument("--dtype", type=lambda text: text.split(","), default=DTYPES)
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()

    if args.model and (args.model / "model_index.json").exists():
        found = generation(args.model)
        if args.generation not in (None, found):
            parser.error(f"--generation {args.generation}: {args.model} is of generation {found}")
        args.generation = found
    args.generation = args.generation or 1
    about = GENERATIONS[args.generation]
    made = about.model.with_name(about.model.name + "-bf16") if args.weights == "bf16" else about.model
    args.model, args.parts = args.model or made, args.parts or list(about.parts)
    if unknown := set(args.parts) - set(about.parts):
        parser.error(f"--parts: expected some of {','.join(about.parts)}, found {','.join(sorted(unknown))}")
    if unknown := set(args.dtype) - set(DTYPES):
        parser.error(f"--dtype: expected some of {','.join(DTYPES)}, found {','.join(sorted(unknown))}")

    stages = build_bench("stages")
    ensure_model(args.model, about, args.weights)
    peak = gemm_peak()
    rows = measure(args, about, stages)
    memory = memory_section(args, stages)
    memory += "\n" + first_picture_section(args, stages)
    if args.generation == 2:
        memory += "\n" + hoisting_section(args, stages)
    print("\n".join(["", table(rows, args.model, about), "", memory, *peak]))
    if not args.no_record:
        print(f"\nrecorded in {record(args, about, rows, memory, peak).relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
