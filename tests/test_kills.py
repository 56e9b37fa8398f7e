"""Killed anywhere, continued by the same command: the same files. Full disks, folders that turn read-only, two at once.
"""

import ctypes
import importlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ONE_THREAD, ROOT, Script, run_process

from base.errors import UserError, run_script
from base.files import alone
from data.rows import read_rows

MINI = ROOT / "miniature"
EXPERIMENT = ["recover.py", "--preset", "mini", "--n-train", 12, "--n", 4, "--benchmarks", "reasoning", "recall",
              "--recover-with", 2, "--recover-seeds", 1, "--recover-steps", 2, "--epochs", 1, "--keep-every", 2,
              "--measure-n", 4, "--max-new-tokens", 24, "--controls"]
SCRIPTS = ("generate", "train", "evaluate", "measure")
KILLS = 9  # of each folder, of which there are six


def contents(folder: Path) -> dict[str, object]:
    """Every file and folder below `folder`, but for the names of a folder's own path and for what a clock says."""
    found = {}
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes() if path.is_file() else None
        name = str(path.relative_to(folder))
        if path.name in ("stages.json", "report.json", "config.json") or path.name.endswith(".config.json"):
            data = json.loads(data.decode().replace(str(folder), "OUT"))
            data.pop("seconds", None)
            for stage in data.values() if path.name == "stages.json" else ():
                stage.pop("seconds")
        elif path.name == "metrics.jsonl":
            data = [json.loads(line) for line in data.decode().splitlines()]
            for row in data:
                for measured in ("seconds", "tokens_per_second", "peak_memory_mb"):
                    row.pop(measured)
        elif path.name == "report.md":
            data = re.sub(rb"[\d.]+ minutes in (\d+) stages; the longest: .*", rb"\1 stages", data)
        found[name] = data
    return found


def start(command: list) -> subprocess.Popen:
    """A script as its own process group, as a shell would start it; Ctrl-C in a terminal goes to the whole group."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler) if (
        threading.current_thread() is threading.main_thread()) else None
    process = subprocess.Popen([sys.executable, "-u", *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=os.environ | ONE_THREAD, process_group=0)
    if handler:
        signal.signal(signal.SIGINT, handler)
    return process


def stop(process: subprocess.Popen, ready: Callable[[str], bool], delay: float, how: int) -> tuple[int, str]:
    """Send `how` to a process's group, `delay` seconds after ready(a line of its output); its exit code and stderr."""
    for line in process.stdout:
        if ready(line):
            break
    time.sleep(delay)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, how)
    _, stderr = process.communicate(timeout=300)
    return process.returncode, stderr


def finish(command: list) -> str:
    """Run a script to its end; returns its stdout."""
    done = run_process(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment's folder."""
    out = tmp_path_factory.mktemp("kills") / "undisturbed"
    finish([*EXPERIMENT, "--out", out])
    return out


# --- The whole experiment ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 2, 4])
def test_killed_at_random_moments(first: int, undisturbed: Path, tmp_path: Path) -> None:
    """Two folders at a time; in all 54 moments, drawn over all stages and the report."""
    stages = len(json.loads((undisturbed / "stages.json").read_text()))

    def one(seed: int) -> tuple[Path, list]:
        rng, out, moments = random.Random(seed), tmp_path / str(seed), []
        for stage in sorted(rng.randint(0, stages + 1) for _ in range(KILLS)):  # 0: before the first; last: the report
            seen = iter(range(stages + 1))
            moment = stop(start([*EXPERIMENT, "--out", out]),
                          lambda line, stage=stage, seen=seen: stage == 0 or (
                              line.startswith("$ ") and next(seen) + 1 == stage),
                          rng.uniform(0, 3 if stage in (0, stages + 1) else 0.5), signal.SIGKILL)
            moments.append((stage, moment[0]))
        finish([*EXPERIMENT, "--out", out])
        return out, moments

    expected = contents(undisturbed)
    with ThreadPoolExecutor(2) as pool:
        for out, moments in pool.map(one, (first, first + 1)):
            print(f"{out.name}: killed in stages {[stage for stage, _ in moments]} of {stages}")
            assert {code for _, code in moments} <= {-signal.SIGKILL, 0}
            assert sum(code != 0 for _, code in moments) >= KILLS - 1  # the last may come too late
            assert_same(contents(out), expected)


@pytest.mark.slow
def test_same_seed_same_run(undisturbed: Path, tmp_path: Path) -> None:
    """Twice the same command; then other slots, which change nothing, and two threads, which change no row of a model
    that was not trained here (a gradient's sums may round otherwise)."""
    finish([*EXPERIMENT, "--out", tmp_path / "again"])
    assert_same(contents(tmp_path / "again"), contents(undisturbed))
    finish([*EXPERIMENT, "--slots", 3, "--kv-memory", 0.001, "--out", tmp_path / "slots"])
    found, expected = contents(tmp_path / "slots"), contents(undisturbed)
    assert_same({**found, "stages.json": None}, {**expected, "stages.json": None})  # which has the commands
    done = run_process(*EXPERIMENT, "--no-controls", "--out", tmp_path / "threads", OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    for name in ("teacher.jsonl", "native.jsonl", "evals/base/reasoning.jsonl", "evals/teacher/reasoning.jsonl"):
        rows = [[row["response"] for row in read_rows(folder / name)] for folder in (tmp_path / "threads", undisturbed)]
        assert rows[0] == rows[1]


def assert_same(found: dict, expected: dict, where: object = None) -> None:
    """The same files with the same contents, and no others."""
    assert found.keys() ^ expected.keys() == set(), where
    assert [name for name in expected if found[name] != expected[name]] == [], where


@pytest.mark.slow
def test_stopped_in_every_kind_of_stage(undisturbed: Path, tmp_path: Path) -> None:
    out, command = tmp_path / "run", [*EXPERIMENT, "--out", tmp_path / "run"]
    for script in (*SCRIPTS, "report"):
        for how, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            # each at a stage of its own, that the run before has not come to
            before = {str(path) for path in out.rglob("*")}

            def ready(line: str, script: str = script, before: set[str] = before) -> bool:
                if script == "report":
                    return line.startswith("$ python -m analysis.report")
                return line.startswith(f"$ python {script}.py") and line.split()[-1] not in before

            returncode, stderr = stop(start(command), ready, 0.05, how)
            assert returncode == code, (script, how, stderr)
            assert_stopped(stderr, command)
            assert not (out / "report.json").exists()
    finish(command)
    assert_same(contents(out), contents(undisturbed))


def assert_stopped(stderr: str, command: list) -> None:
    """One sentence: what is kept, and the command that goes on."""
    assert "Traceback" not in stderr and len(stderr.strip().split("\n")) == 1
    assert stderr.startswith("stopped: ") and " kept; to go on from there: " in stderr
    assert stderr.strip().endswith(" ".join(map(str, command)))


# --- One script at a time, and a disaster between any two of its changes to the file system ---------------------------


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def kill(out: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk(out: Path) -> None:
    """From here on no file can grow over 64 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))


def make_read_only(out: Path) -> None:
    """No permission to change a folder, which root's capabilities would pass over: without them it is like anybody."""
    version_3, none = (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(version_3, none) == 0
    for folder in (out, *(path for path in out.rglob("*") if path.is_dir())):
        folder.chmod(0o555)


def let_write(out: Path) -> None:
    for path in (out, *out.rglob("*")):
        path.chmod(0o755)


DISASTERS = {kill: -signal.SIGKILL, fill_the_disk: 2, make_read_only: 2}  # and what a script then exits with


def in_fork(script: str, arguments: list[str], change: int = 0, disaster: Callable[[Path], None] = kill,
            out: Path | None = None) -> tuple[int, str]:
    """Run a script in a fork of this process, the disaster coming before its `change`-th change; exit code, stderr."""
    left = [change]

    def hook(event: str, found: tuple) -> None:
        if event in CHANGES or (event == "open" and isinstance(found[2], int) and found[2] & WRITING):
            left[0] -= 1
            if left[0] == 0:
                disaster(out)

    (read, write), id = os.pipe(), os.fork()
    if id == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(write, 2)
        try:
            sys.addaudithook(hook)
            run_script(lambda: importlib.import_module(script).main(arguments))
            os._exit(0)
        except SystemExit as ended:
            os._exit(ended.code)
    os.close(write)
    with os.fdopen(read) as stderr:
        said = stderr.read()
    return os.waitstatus_to_exitcode(os.waitpid(id, 0)[1]), said


def meet_disasters(folder: Path, scripts: dict[str, list[str]], hit: str, every: int) -> None:
    """Each script once undisturbed, in folder/SCRIPT; then, if `hit` has its name, once for every `every`-th of its
    changes with a disaster before it and then continued; disasters take turns.

    `scripts`: their arguments, with OUT in place of the folder. Prints how many moments there were.
    """
    for script, arguments in scripts.items():
        def run(out: Path, *more: object, script: str = script, arguments: list[str] = arguments) -> tuple[int, str]:
            return in_fork(script, [argument.replace("OUT", str(out)) for argument in arguments], *more)

        whole, out = folder / script, folder / "disturbed"
        code, said = run(whole)
        assert code == 0, said
        code, said = run(whole, 1, make_read_only, whole)
        assert code == 0, said  # there is nothing left to write
        let_write(whole)
        if script not in hit:
            continue
        expected, moments = contents(whole), Counter()
        for i, change in enumerate(itertools.count(1 + random.Random(script).randrange(every), every)):
            disaster = list(DISASTERS)[i % 3]
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            code, said = run(out, change, disaster, out)
            let_write(out)
            if code == 0 and disaster is kill:
                break  # it makes fewer changes
            if code == 0:  # the last change is the lock's end, which nothing depends on
                continue
            moments[disaster.__name__] += 1
            assert code == DISASTERS[disaster], (script, change, said)
            if code == 2:
                assert said.startswith("error: ") and str(out) in said and len(said.strip().split("\n")) == 1, said
            found = contents(out)
            assert [name for name in found.keys() & expected.keys() if found[name] != expected[name]] == []
            assert run(out)[0] == 0, (script, change)
            assert_same(contents(out), expected, (script, change, disaster.__name__))
        print(f"{script}: {change} changes; {dict(moments)}")


def disturb(folder: Path, hit: str, every: int) -> None:
    """`meet_disasters` in a process with one thread, on the miniature: generate, and the others from its rows."""
    student, rows = MINI / "student", folder / "generate" / "rows.jsonl"
    scripts = {
        "generate": ["--model", student, "--prompts", "mini", "--n", 6, "--max-new-tokens", 24,
                     "--out", "OUT/rows.jsonl"],
        "train": ["--model", student, "--data", rows, "--steps", 3, "--keep-every", 2, "--validate", 2, "--out", "OUT"],
        "evaluate": ["--model", student, "--adapter", folder / "train", "--benchmarks", "reasoning", "recall",
                     "--n", 3, "--max-new-tokens", 24, "--out", "OUT"],
        "measure": ["--model", student, "--adapter", folder / "train", "--responses", rows, "--out", "OUT"],
    }
    scripts = {name: list(map(str, arguments)) for name, arguments in scripts.items()}
    code = ("import json, pathlib, sys; sys.path.append('tests'); import test_kills, torch; torch.set_num_threads(1)\n"
            "import evaluate, measure  # once here, not in every fork\n"
            "test_kills.meet_disasters(pathlib.Path(sys.argv[1]), *map(json.loads, sys.argv[2:]))")
    print(finish(["-c", code, folder, *map(json.dumps, (scripts, hit, every))]))


def test_a_few_disasters(tmp_path: Path) -> None:
    disturb(tmp_path, " ".join(SCRIPTS), every=16)


@pytest.mark.slow
@pytest.mark.parametrize("hit", SCRIPTS)
def test_a_disaster_between_any_two_changes(hit: str, tmp_path: Path) -> None:
    disturb(tmp_path, hit, every=1)


# --- Two at once ------------------------------------------------------------------------------------------------------


def test_one_process_writes_a_folder(tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".lock"
    with alone(lock):
        with pytest.raises(UserError, match=f"^process {os.getpid()} on {socket.gethostname()} is"), alone(lock):
            pass
        with alone(tmp_path / "run" / "rows.lock"):  # which is another output
            pass
    assert not lock.parent.exists()  # nothing was written
    with alone(lock):
        (lock.parent / "file").write_text("")
    assert [path.name for path in lock.parent.iterdir()] == ["file"]


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    process = start(["-c", "import pathlib, sys, time; from base.files import alone\n"
                           "with alone(pathlib.Path(sys.argv[1])): print('held'); time.sleep(60)", lock])
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"^process {process.pid} on"), alone(lock):
        pass
    waiting = start(["-c", "import pathlib, sys; from base.files import alone\n"
                           "with alone(pathlib.Path(sys.argv[1]), wait=True): print('held')", lock])
    process.kill()
    assert waiting.communicate(timeout=60)[0] == "held\n" and process.wait() == -signal.SIGKILL
    lock.write_text("what a kill leaves")
    with alone(lock):
        pass
    assert not lock.exists()


def test_the_second_refuses(script: Script, tmp_path: Path) -> None:
    student, teacher, rows, run = MINI / "student", MINI / "teacher", tmp_path / "rows.jsonl", tmp_path / "run"
    run.mkdir()
    row = {"id": "a", "prompt": "Calculate 2 + 2", "response": "Okay Answer 4"}
    rows.write_text(json.dumps(row) + "\n")
    cell = tmp_path / "matrix" / "student--teacher"
    for lock, *command in (
            (tmp_path / "new.lock", "generate.py", "--model", student, "--prompts", "mini", "--out",
             tmp_path / "new.jsonl"),
            (run / ".lock", "train.py", "--model", student, "--data", rows, "--out", run),
            (run / ".lock", "evaluate.py", "--model", student, "--benchmarks", "recall", "--out", run),
            (run / ".lock", "evaluate.py", "--rescore", run),
            (run / ".lock", "measure.py", "--model", student, "--responses", rows, "--out", run),
            (run / ".lock", "recover.py", "--preset", "mini", "--out", run),
            (run / ".lock", "analysis.report", run),
            (cell / ".lock", "recover.py", "--preset", "mini", "--student", student, teacher, "--teacher", teacher,
             "--out", cell.parent)):
        with alone(lock):
            before = contents(tmp_path)
            done = script(*command)
            assert done.returncode == 2, command
            assert f"error: process {os.getpid()} on " in done.stderr and str(lock) in done.stderr
            assert len(done.stderr.strip().split("\n")) == 1 and contents(tmp_path) == before


@pytest.mark.slow
def test_processes_share_a_matrix_pair_by_pair(tmp_path: Path) -> None:
    """Two at once in one folder, each with a student; then the whole matrix finds both pairs done."""
    few = ["recover.py", "--preset", "mini", "--n-train", 4, "--n", 2, "--benchmarks", "recall", "--recover-with", 2,
           "--recover-seeds", 1, "--recover-steps", 1, "--epochs", 1, "--max-new-tokens", 8, "--out", tmp_path / "all"]
    models = [MINI / "student", MINI / "teacher"]
    both = [start([*few, "--student", models[i], "--teacher", *models]) for i in (0, 1)]
    for process in both:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    before = contents(tmp_path / "all")
    said = finish([*few, "--student", *models, "--teacher", *models])
    assert said.count("done already") == 2
    assert_same(contents(tmp_path / "all"), before)
    assert {path.name for path in (tmp_path / "all").iterdir()} == {
        "student--teacher", "teacher--student", "matrix.md", "matrix.json", "matrix.png"}
