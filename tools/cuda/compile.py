#!/usr/bin/env python3
"""Compiles every CUDA kernel with NVIDIA's own compiler, which needs no GPU, for every architecture of
src/device/cuda/options.txt, and looks at what became of it.

    python tools/cuda/compile.py --nvrtc "$(tools/cuda/toolkit.sh nvrtc)" \
        --cuobjdump "$(tools/cuda/toolkit.sh cuobjdump)" [--sources src] [--all]

Each file with each architecture is one test. It fails

  - when the file does not compile, as the library would compile it: with these options, with no include path, and
    with the .cuh files of the sources as headers in memory,
  - when a kernel that a line `// hot: NAME` of the file names keeps something in local memory, that is in DRAM:
    registers that were spilled, or an array whose index is not known to the compiler (the stack),
  - when the machine code of a kernel that a line `// tensor cores: NAME` names has no instruction of theirs. This
    holds from sm_80 on, since there are none for bf16 before.

Prints registers, bytes of stack, spilled bytes, bytes of static shared memory and, where it was looked for, the number
of instructions of the tensor cores, for the kernels with local memory (--all: for every kernel);
build/cuda/kernels.txt always holds all of them. Results are kept in build/cuda by the hash of all that they depend on,
so that only what changed is compiled again.
"""

import argparse
import ctypes
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
OPTIONS = TOP / "src/device/cuda/options.txt"
OUTPUT = TOP / "build/cuda"
COLUMNS = ["registers", "stack", "spilled", "shared", "mma"]


class Nvrtc:
    """The few calls of libnvrtc that compiling takes."""

    COMPILATION = 6  # the status of a source that is wrong

    def __init__(self, path):
        # NVRTC opens it by its bare name, which only finds what is loaded already.
        for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins))
        self.library = ctypes.CDLL(path)
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        status = getattr(self.library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: {self.library.nvrtcGetErrorString(status).decode()}")

    def version(self):
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def compile(self, name, source, headers, options):
        """The machine code, empty when it does not compile, and the log, which has the figures of ptxas."""
        program, strings = ctypes.c_void_p(), ctypes.c_char_p * max(len(headers), 1)
        names = strings(*[header.encode() for header in headers])
        texts = strings(*[text.encode() for text in headers.values()])
        self.call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names)
        words = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        status = self.library.nvrtcCompileProgram(program, len(options), words)
        if status not in (0, self.COMPILATION):
            raise RuntimeError(f"nvrtcCompileProgram: {self.library.nvrtcGetErrorString(status).decode()}")
        size = ctypes.c_size_t()
        self.call("nvrtcGetProgramLogSize", program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self.call("nvrtcGetProgramLog", program, log)
        code = ctypes.create_string_buffer(0)
        if status == 0:
            self.call("nvrtcGetCUBINSize", program, ctypes.byref(size))
            code = ctypes.create_string_buffer(size.value)
            self.call("nvrtcGetCUBIN", program, code)
        self.call("nvrtcDestroyProgram", ctypes.byref(program))
        return code.raw, log.value.decode(errors="replace")


def lines_of(path, prefix):
    return [line.strip() for line in path.read_text().splitlines() if line.startswith(prefix)]


def resources(log):
    """{kernel: figures}, out of the log of ptxas -v."""
    kernels, kernel = {}, None
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = kernels.setdefault(found[1], dict.fromkeys(["registers", "stack", "spilled", "shared"], 0))
        elif found := re.search(r"Function properties for (\w+)", line):
            # A function that was not inlined has lines of its own, without a number of registers.
            kernel = kernels.get(found[1])
        elif kernel is None:
            continue
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernel["stack"], kernel["spilled"] = int(found[1]), int(found[2]) + int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            kernel["registers"] = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernel["shared"] = int(shared[1]) if shared else 0
    return kernels


def marked(source, mark):
    """The kernels that lines `// MARK: NAME` name."""
    return re.findall(rf"^\s*// {mark}: *(\w+)", source, re.MULTILINE)


def count_mma(code, cuobjdump, kernels):
    """Sets the number of instructions of the tensor cores in each kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        # It calls nvdisasm, which lies beside it.
        paths = os.pathsep.join([str(Path(cuobjdump).parent), os.environ.get("PATH", "")])
        command = [cuobjdump, "-sass", file.name]
        listing = subprocess.run(
            command, env={**os.environ, "PATH": paths}, capture_output=True, text=True, check=True
        ).stdout
    kernel = {}
    for line in listing.splitlines():
        if found := re.search(r"Function : (\w+)", line):
            kernel = kernels.get(found[1], {})
            kernel["mma"] = 0
        # HMMA, and HGMMA of a whole warp group.
        elif kernel and re.search(r"\b[A-Z]+MMA\b", line):
            kernel["mma"] += 1


def compile_one(job):
    """One file for one architecture: {"compiles", "log", "kernels": {name: figures}}, out of the cache where it can be."""
    kept = OUTPUT / "compiled" / f"{job['key']}.json"
    try:
        return json.loads(kept.read_text())
    except (OSError, ValueError):
        pass
    code, log = Nvrtc(job["nvrtc"]).compile(job["name"], job["source"], job["headers"], job["options"])
    result = {"compiles": bool(code), "log": log, "kernels": resources(log)}
    if code and job["cuobjdump"] and marked(job["source"], "tensor cores"):
        count_mma(code, job["cuobjdump"], result["kernels"])
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(result))
    return result


def jobs(arguments):
    """What there is to compile."""
    sources = arguments.sources.resolve()
    headers = {path.name: path.read_text() for path in sorted(sources.rglob("*.cuh"))}
    options = [*lines_of(OPTIONS, "--"), "--ptxas-options=-v"]
    version = Nvrtc(arguments.nvrtc).version()
    for path in sorted(sources.rglob("*.cu")):
        for architecture in lines_of(OPTIONS, "sm_"):
            job = {
                "name": str(path.relative_to(sources)),
                "source": path.read_text(),
                "headers": headers,
                "options": [f"--gpu-architecture={architecture}", *options],
            }
            text = json.dumps([job, version, bool(arguments.cuobjdump), Path(__file__).read_text()])
            key = hashlib.sha256(text.encode()).hexdigest()[:24]
            tools = {"nvrtc": arguments.nvrtc, "cuobjdump": arguments.cuobjdump}
            yield {**job, **tools, "architecture": architecture, "key": key}


def faults(job, result, kernels):
    """What is wrong, for the reader; nothing when the test passes. `kernels` are the file's, of all architectures."""
    if not result["compiles"]:
        errors = [line for line in result["log"].splitlines() if line.strip() and not line.startswith("ptxas info")]
        return "\n    ".join(["does not compile", *errors])
    hot, tensor = marked(job["source"], "hot"), marked(job["source"], "tensor cores")
    # A kernel may be left out for an old architecture, but not misspelled.
    found = [f"marked kernel {name}: there is none of that name" for name in sorted({*hot, *tensor} - kernels)]
    for name, figures in result["kernels"].items():
        if name in hot and (figures["spilled"] or figures["stack"]):
            found.append(f"hot kernel {name}: {figures['spilled']} bytes spilled, {figures['stack']} bytes of stack")
        if name in tensor and figures.get("mma") == 0 and job["architecture"] != "sm_75":
            found.append(f"kernel {name}: no instruction of the tensor cores")
    return "\n    ".join(found)


def warnings(result):
    """The compiler's warnings, each in its lines; of a file that does not compile the log is shown anyway."""
    blocks = re.split(r"\n(?=\S)", result["log"]) if result["compiles"] else []
    return [block.rstrip() for block in blocks if re.search(r": warning\b", block)]


def say(title, found):
    """Prints {(file, message): architectures}."""
    for (name, message), architectures in found.items():
        print(f"{title} {name} for {' '.join(architectures)}:\n    {message}")


def table(rows):
    """Rows of equal width. Architectures with the same figures share one."""
    merged = {}
    for name, kernel, architecture, figures in rows:
        key = (name, kernel, *(str(figures.get(column, "-")) for column in COLUMNS))
        merged.setdefault(key, []).append(architecture.removeprefix("sm_"))
    lines = [("file", "kernel", *COLUMNS, "sm")]
    lines += [(*key, " ".join(architectures)) for key, architectures in sorted(merged.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS) + 2)]
    return ["  ".join([*(word.ljust(width) for word, width in zip(line, widths)), line[-1]]) for line in lines]


def forget(used):
    """Empties the cache of what no source has any more."""
    for path in (OUTPUT / "compiled").glob("*.json"):
        if path.stem not in used:
            path.unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--nvrtc", required=True, help="the path of libnvrtc.so")
    parser.add_argument("--cuobjdump", help="its path; without it no machine code is looked at")
    parser.add_argument("--sources", type=Path, default=TOP / "src")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="print the figures of every kernel")
    arguments = parser.parse_args()

    todo = list(jobs(arguments))
    with ProcessPoolExecutor(arguments.processes) as pool:
        done = list(zip(todo, pool.map(compile_one, todo)))
    kernels = {}
    for job, result in done:
        kernels.setdefault(job["name"], set()).update(result["kernels"])

    passed, failed, rows = 0, 0, []
    wrong, warned = {}, {}
    for job, result in done:
        name, architecture = job["name"], job["architecture"]
        fault = faults(job, result, kernels[name])
        passed, failed = passed + (not fault), failed + bool(fault)
        if fault:
            wrong.setdefault((name, fault), []).append(architecture)
        for warning in warnings(result):
            warned.setdefault((name, warning), []).append(architecture)
        rows += [(name, kernel, architecture, figures) for kernel, figures in result["kernels"].items()]
    say("warning in", warned)
    say("FAILED", wrong)

    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "kernels.txt").write_text("\n".join(table(rows)) + "\n")
    shown = [row for row in rows if arguments.all or row[3]["spilled"] or row[3]["stack"]]
    if shown:
        print(*table(shown), sep="\n")
    print(f"{sum(map(len, kernels.values()))} kernels; the figures of all are in build/cuda/kernels.txt")
    forget({job["key"] for job in todo})
    print(f"{passed} passed, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
