"""Checks in processes that can be killed: `judge` calls a module's `check` on each item in a worker.

What a model writes is hostile by accident. 9^{9^{9^9}} keeps a symbolic library busy for years, or takes all memory; a
hundred thousand brackets do the same to a regular expression, and a chat template of a stranger's to the sandbox that
it runs in. So every check has a limit of processor time and of memory, and runs in a process that the kernel kills at
either.

A worker is a process that runs `serve`. It imports what the checks need and then forks a child to do them, so that the
next child, after one was killed, costs a few milliseconds and no import. (A child for each check would make sympy and
its parser learn everything anew: seven times as slow.) Items go in and verdicts come out as a JSON line each, through
pipes that a child has from its worker.
"""

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

SECONDS = 2.0  # of processor time for one check; the slowest of 2,350 pairs of references took 0.22
ASLEEP = 30.0  # seconds after which one is killed although it computes nothing
MEMORY = 1 << 30  # bytes of address space of a worker
SPENT = 300 << 20  # bytes that a child may hold on to before it is replaced: sympy caches what it has seen
DONE, DIED, RAISED, FULL = range(4)  # exit codes of a child: no more input; out of memory; a check raised; SPENT


def judge(module: str, items: Sequence[tuple[str, ...]], workers: int | None = None) -> list:
    """`check(*item)` of the module for each item; None where it ran past its limits.

    What `check` returns comes back as JSON does: a tuple as a list. If it raises, that is a mistake of ours: the worker
    prints it and ends, and an AssertionError says so.
    """
    from tqdm import tqdm

    distinct = list(dict.fromkeys(items))
    if not distinct:
        return []
    # those that this process may use, where the system tells: more workers would wait, and ASLEEP counts that
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or cores, len(distinct))
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()

    def ask(item: tuple[str, ...]) -> object:
        worker = idle.get()
        try:
            return worker.ask(item)
        finally:
            idle.put(worker)

    with ExitStack() as ends, ThreadPoolExecutor(count) as pool:  # a thread does nothing but wait for a worker
        for _ in range(count):
            idle.put(worker := Worker(module))
            ends.callback(worker.close)
        found = tqdm(pool.map(ask, distinct), f"{module}.check", len(distinct), leave=False, disable=None)
        verdicts = dict(zip(distinct, found, strict=True))
    return [verdicts[item] for item in items]


class Worker:
    """A process that does a module's checks, from outside."""

    def __init__(self, module: str) -> None:
        program = f"from base import grading; grading.serve({module!r})"
        # in a group of its own: Ctrl-C is for the parent; with it gone, the input ends. OpenBLAS, which nltk brings in,
        # reserves 40 MB of addresses a thread: on many cores none would be left for the checks
        self.process = subprocess.Popen([sys.executable, "-c", program], text=True, cwd=Path(__file__).parents[1],
                                        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, process_group=0)

    def ask(self, item: Sequence) -> object:
        """What `check(*item)` returns, as JSON does; None where it ran past its limits."""
        line = ""
        with suppress(BrokenPipeError):
            print(json.dumps(item), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        assert line, "a grading process ended; it has said why above"
        return json.loads(line)

    def close(self) -> None:
        """Close its input, on which it ends, and wait for that."""
        self.process.communicate()


def serve(module: str) -> None:
    """A worker's life: load what the checks need, then fork a child that does them, and another if that has died."""
    import resource

    checker = importlib.import_module(module)
    checker.check(*checker.EXAMPLE)  # once here, so that libraries and their tables are there in every child
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = FULL
    while code != DONE:
        child = os.fork()
        if child == 0:
            os._exit(_check_lines(checker.check))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code in (RAISED, -signal.SIGKILL, -signal.SIGTERM):  # these two can hit an idle child: whose verdict is it?
            sys.exit("a check raised, as above, or was killed from outside")
        if code not in (DONE, FULL):
            print("null", flush=True)  # it died of the item that it had


def _check_lines(check: Callable) -> int:
    """A child's life, up to its exit code. It never holds more than one line: the next comes when that is answered."""
    import resource

    clocks = {signal.ITIMER_PROF: SECONDS, signal.ITIMER_REAL: ASLEEP}
    for line in sys.stdin:
        for clock, seconds in clocks.items():
            signal.setitimer(clock, seconds)  # its signal kills, also in the middle of a long multiplication
        try:
            verdict = json.dumps(check(*json.loads(line)))
        except MemoryError:
            return DIED  # what it holds on to would fail the next check
        except Exception:  # printed and told to the worker, which ends with it
            traceback.print_exc()
            return RAISED
        for clock in clocks:
            signal.setitimer(clock, 0)
        print(verdict, flush=True)
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > SPENT:
            return FULL
    return DONE
