"""Are two mathematical answers equal? math-verify says so, in worker processes that can be killed.

What a model writes is hostile by accident: 9^{9^{9^9}} or a matrix 2,000 deep make a symbolic library run for years or
take all memory. So the comparison runs in a process with a memory limit, which is killed at a time limit and replaced.
A worker is this file, run as a program: it reads a JSON pair a line on stdin and writes a JSON verdict a line.
"""

import json
import os
import queue
import select
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

SECONDS = 10.0  # for one comparison
START_SECONDS = 120.0  # for a worker to import sympy, on a machine under load
MEMORY = 1 << 30  # bytes of address space of a worker
SPENT = 300 << 20  # bytes that a worker may hold on to before it is replaced: sympy caches what it has seen
LONGEST = 2_000  # characters of an answer; the longest reference of the benchmarks has about 150


class _Worker:
    """One grading process."""

    def __init__(self) -> None:
        # -P: this folder stays off the module path, where its file names could hide a library's
        self.process = subprocess.Popen([sys.executable, "-P", __file__], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.alive = True
        ready = self._line(START_SECONDS)
        assert ready == b"ready\n", f"a grading process did not start ({ready!r}); try `python -c 'import math_verify'`"

    def ask(self, gold: str, answer: str) -> bool | None:
        """Whether they are equal; None if the process ran past its limits. Ask again only while it is `alive`."""
        try:
            self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            self.process.stdin.flush()
            line = self._line(SECONDS)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            self.close()
            return None
        equal, spent = json.loads(line)
        if spent:
            self.close()
        return equal

    def _line(self, seconds: float) -> bytes:
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else b""

    def close(self) -> None:
        """Kill the process."""
        self.alive = False
        self.process.kill()
        self.process.communicate()


def equal_answers(pairs: Sequence[tuple[str, str]], workers: int | None = None) -> list[bool | None]:
    """For each (gold, answer) in LaTeX whether they are equal; None where the comparison ran past its limits."""
    if not pairs:
        return []
    count = min(workers or os.cpu_count() or 1, len(pairs))
    idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
    for _ in range(count):
        idle.put(None)  # a place for a worker; the process is started when it is first needed

    def grade(pair: tuple[str, str]) -> bool | None:
        gold, answer = pair
        if gold.strip() == answer.strip():
            return True  # and no need to ask: a reference that math-verify can't parse equals itself
        if len(answer) > LONGEST:
            return False
        worker = idle.get()
        try:
            worker = worker or _Worker()
            return worker.ask(gold, answer)
        finally:
            idle.put(worker if worker and worker.alive else None)

    with ThreadPoolExecutor(count) as pool:
        try:
            return list(pool.map(grade, pairs))
        finally:
            pool.shutdown(cancel_futures=True)
            for worker in (idle.get() for _ in range(count)):
                if worker is not None:
                    worker.close()


def _serve() -> None:
    """A worker's life: limit the memory, import, then answer line by line."""
    import resource
    import signal

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        # The parent holds the clock; this ends a worker whose parent was killed. math-verify's own time limit would
        # raise in the middle of sympy, and is off.
        signal.alarm(int(3 * SECONDS))
        try:
            expected = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
            found = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
            equal = bool(verify(expected, found, timeout_seconds=None))
        except MemoryError:
            os._exit(1)  # past its limit, and what it holds on to would fail the next answer
        except Exception:  # a symbolic library raises anything on such input: not equal
            equal = False
        signal.alarm(0)
        spent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > SPENT
        print(json.dumps([equal, spent]), flush=True)


if __name__ == "__main__":
    _serve()
