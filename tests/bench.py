"""What the benchmarks have in common: how sections are chosen and printed, processes of their own, memory."""

import argparse
import json
import multiprocessing
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

SMOLLM2, QWEN = "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct"


def run_sections(parser: argparse.ArgumentParser, sections: dict[str, Callable[[argparse.Namespace], dict]]) -> None:
    """Run the sections that the command line asks for, each by its function of the options; print what they return, and
    all of it as a line of JSON."""
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(sections)}; default: all")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(sections):
        parser.error(f"no section {', '.join(unknown)}")
    sys.stdout.reconfigure(line_buffering=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    results = {}
    for section in args.sections or sections:
        results[section] = sections[section](args)
        for name, value in results[section].items():
            print(f"{section:10} {name:48} {value:>12,}")
    print(json.dumps(results))


def in_fresh_process(function: Callable, *arguments: object) -> object:
    """The function's result from a process that has imported its module and done nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory() -> int:
    """This process's, in bytes. Not by ru_maxrss, which a child starts with its parent's."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
