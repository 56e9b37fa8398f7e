"""Checks in processes that can be killed: `judge` calls a module's `check` on each item in a worker.

What a model writes is hostile by accident. 9^{9^{9^9}} keeps a symbolic library busy for years, or takes all memory; a
hundred thousand brackets do the same to a regular expression, and a chat template of a stranger's to the sandbox that
it runs in. So every check has a limit of processor time and of memory, and runs in a process that the kernel kills at
either.

A worker is a process that runs `serve`. It imports what the checks need and then forks a child to do them, so that the
next child, after one was killed, costs a few milliseconds and no import. Items go in and verdicts come out as a JSON
line each.
"""

import importlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

SECONDS = 2.0  # of processor time for one check; the slowest of 2,350 pairs of references took 0.22
ASLEEP = 30.0  # seconds of waiting for one, after which it is killed although it computes nothing
MEMORY = 1 << 30  # bytes of address space of a worker
RAISED = 3  # exit code of a child in which a check raised
SPENT = 300 << 20  # bytes that a child may hold on to before it is replaced: sympy caches what it has seen


def judge(module: str, items: Sequence[tuple[str, ...]], workers: int | None = None) -> list:
    """`check(*item)` of the module for each item; None where it ran past its limits.

    What `check` returns comes back as JSON does: a tuple as a list. If it raises, that is a mistake of ours: the worker
    prints it and ends, and an AssertionError says so.
    """
    items, distinct = list(items), list(dict.fromkeys(items))
    count = min(workers or os.cpu_count() or 1, len(distinct))
    if count == 0:
        return []
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    with ThreadPoolExecutor(count) as pool:  # a thread does nothing but wait for its worker

        def ask(item: tuple[str, ...]) -> object:
            worker = idle.get()
            try:
                return worker.ask(item)
            finally:
                idle.put(worker)

        started = []
        try:
            for _ in range(count):
                started.append(Worker(module))
                idle.put(started[-1])
            verdicts = dict(zip(distinct, pool.map(ask, distinct), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)
            for worker in started:
                worker.close()
    return [verdicts[item] for item in items]


class Worker:
    """A process that does a module's checks, from outside."""

    def __init__(self, module: str) -> None:
        program = f"from base import grading; grading.serve({module!r})"
        self.process = subprocess.Popen([sys.executable, "-c", program], text=True, cwd=Path(__file__).parents[1],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, item: tuple) -> object:
        """What `check(*item)` returns, as JSON does; None where it ran past its limits."""
        line = ""
        with suppress(BrokenPipeError):
            print(json.dumps(item), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        assert line, "a grading process ended; it has said why above"
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # on which it ends
        self.process.wait()
        self.process.stdout.close()


def serve(module: str) -> None:
    """A worker's life: load what the checks need, then hand each line to a child, and start another if it died."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; with it gone, the input ends
    checker = importlib.import_module(module)
    checker.check(*checker.EXAMPLE)  # once here, so that libraries and their tables are there in every child
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    child = None
    for line in sys.stdin:
        child = child or _Child(checker.check)
        answer = child.ask(line)
        verdict, spent = json.loads(answer) if answer else (None, True)
        if spent:
            code, child = child.close(), None
            if code == RAISED:
                sys.exit("a check raised, as above")
        print(json.dumps(verdict), flush=True)


class _Child:
    """A fork of the worker that does the checks, and may die of one."""

    def __init__(self, check: Callable) -> None:
        lines_out, lines_in = os.pipe(), os.pipe()
        self.id = os.fork()
        if self.id == 0:
            os.close(lines_out[1])
            os.close(lines_in[0])
            try:
                _check_lines(check, os.fdopen(lines_out[0]), os.fdopen(lines_in[1], "w"))
            except Exception:  # printed and told to the worker, which ends with it
                traceback.print_exc()
                # in here: behind the block the pipe is closed, at which the worker kills what has not yet ended
                os._exit(RAISED)
        os.close(lines_out[0])
        os.close(lines_in[1])
        self.input, self.output = os.fdopen(lines_out[1], "w"), os.fdopen(lines_in[0])

    def ask(self, line: str) -> str:
        """The verdict's line; an empty one if the child has died of it, or sleeps."""
        with suppress(BrokenPipeError):
            print(line, end="", file=self.input, flush=True)
            ready, _, _ = select.select([self.output], [], [], ASLEEP)
            return self.output.readline() if ready else ""
        return ""

    def close(self) -> int:
        """Kill it, if it is not dead; returns its exit code, negative for a signal."""
        os.kill(self.id, signal.SIGKILL)
        _, status = os.waitpid(self.id, 0)
        self.output.close()
        with suppress(BrokenPipeError):
            self.input.close()
        return os.waitstatus_to_exitcode(status)


def _check_lines(check: Callable, lines: object, verdicts: object) -> None:
    """A child's life. The kernel's clock of processor time ends it if a check runs past its limit."""
    import resource

    for line in lines:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF kills, also in the middle of a long multiplication
        try:
            verdict = check(*json.loads(line))
        except MemoryError:
            os._exit(0)  # what it holds on to would fail the next check
        signal.setitimer(signal.ITIMER_PROF, 0)
        spent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > SPENT
        print(json.dumps([verdict, spent]), file=verdicts, flush=True)
    os._exit(0)
