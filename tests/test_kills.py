"""Killed anywhere, continued by the same command: the same files. Full disks, folders that turn read-only, two at once.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ONE_THREAD, ROOT, run_process

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
        for stage in sorted(rng.randint(0, stages) for _ in range(KILLS)):  # 0: before the first
            seen = iter(range(stages))
            moment = stop(start([*EXPERIMENT, "--out", out]),
                          lambda line, stage=stage, seen=seen: stage == 0 or (
                              line.startswith("$ ") and next(seen) + 1 == stage),
                          rng.uniform(0, 5 if stage in (0, stages) else 0.5), signal.SIGKILL)
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


def assert_same(found: dict, expected: dict) -> None:
    """The same files with the same contents, and no others."""
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.slow
def test_stopped_in_every_kind_of_stage(undisturbed: Path, tmp_path: Path) -> None:
    out, command = tmp_path / "run", [*EXPERIMENT, "--out", tmp_path / "run"]
    for script in (*SCRIPTS, "report"):
        for how, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            # each at a stage of its own, that the run before has not come to
            def ready(line: str, script: str = script) -> bool:
                return line.startswith(f"$ python {script}.py") and not Path(line.split()[-1]).exists()

            process = start(command)
            if script == "report":
                threading.Thread(target=process.stdout.read, daemon=True).start()
                while not (out / "figures").exists() and process.poll() is None:
                    time.sleep(0.01)
                os.killpg(process.pid, how)
                stderr, returncode = process.stderr.read(), process.wait()
            else:
                returncode, stderr = stop(process, ready, 0.05, how)
            assert returncode == code, stderr
            assert_stopped(stderr, command)
            assert not (out / "report.json").exists()
    finish(command)
    assert_same(contents(out), contents(undisturbed))


def assert_stopped(stderr: str, command: list) -> None:
    """One sentence: what is kept, and the command that goes on."""
    assert "Traceback" not in stderr and len(stderr.strip().split("\n")) == 1
    assert stderr.startswith("stopped: ") and " kept; to go on from there: " in stderr
    assert stderr.strip().endswith(" ".join(map(str, command)))


# --- One script at a time, between any two of its changes to the file system ------------------------------------------


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def die_before(change: int) -> None:
    """SIGKILL this process when it is about to change the file system for the `change`-th time."""
    left = [change]

    def hook(event: str, arguments: tuple) -> None:
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def in_fork(script: str, arguments: list[str], change: int = 0) -> int:
    """Run a script in a fork of this process, which dies before its `change`-th change; its exit code."""
    import importlib

    from base.errors import run_script

    id = os.fork()
    if id == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if change:
                die_before(change)
            run_script(lambda: importlib.import_module(script).main(arguments))
            os._exit(0)
        except SystemExit as ended:
            os._exit(ended.code)
    return os.waitstatus_to_exitcode(os.waitpid(id, 0)[1])


def kill_between_changes(folder: Path, scripts: dict[str, list[str]], every: int) -> None:
    """Each script once undisturbed in folder/undisturbed, then in folder/KILLED… once for every `every`-th change.

    `scripts`: their arguments, with OUT in place of the folder. Prints how many changes each makes.
    """
    import shutil

    for script, arguments in scripts.items():
        def run(out: Path, change: int = 0, script: str = script, arguments: list[str] = arguments) -> int:
            return in_fork(script, [argument.replace("OUT", str(out)) for argument in arguments], change)

        whole, change = folder / script / "undisturbed", 1 + random.Random(script).randrange(every)
        assert run(whole) == 0
        expected = contents(whole)
        while True:
            out = folder / script / "killed"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            if run(out, change) == 0:
                break  # it makes fewer changes
            assert run(out) == 0, (script, change)
            assert_same(contents(out), expected)
            change += every
        print(f"{script}: killed before every {every}. of {change} changes")


def kill_each_script(tmp_path: Path, every: int) -> str:
    """`kill_between_changes` in a process with one thread, of the four scripts on the miniature."""
    student, base = MINI / "student", tmp_path / "base.jsonl"
    finish(["generate.py", "--model", student, "--prompts", "mini", "--n", 8, "--max-new-tokens", 24, "--out", base])
    finish(["train.py", "--model", student, "--data", base, "--n", 2, "--steps", 1, "--out", tmp_path / "adapter"])
    scripts = {
        "generate": ["--model", student, "--prompts", "mini", "--n", 4, "--max-new-tokens", 24,
                     "--out", "OUT/rows.jsonl"],
        "train": ["--model", student, "--data", base, "--batch-tokens", 100, "--epochs", 1, "--keep-every", 2,
                  "--validate", 2, "--out", "OUT"],
        "evaluate": ["--model", student, "--adapter", tmp_path / "adapter", "--benchmarks", "reasoning", "recall",
                     "--n", 3, "--max-new-tokens", 24, "--out", "OUT"],
        "measure": ["--model", student, "--adapter", tmp_path / "adapter", "--responses", base, "--out", "OUT"],
    }
    scripts = {name: list(map(str, arguments)) for name, arguments in scripts.items()}
    code = ("import json, pathlib, sys; sys.path.append('tests'); import test_kills, torch; torch.set_num_threads(1)\n"
            "import evaluate, measure  # once here, not in every fork\n"
            "test_kills.kill_between_changes(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))")
    return finish(["-c", code, tmp_path, json.dumps(scripts), every])


def test_killed_at_a_few_moments(tmp_path: Path) -> None:
    kill_each_script(tmp_path, every=12)


@pytest.mark.slow
def test_killed_between_any_two_changes(tmp_path: Path) -> None:
    print(kill_each_script(tmp_path, every=1))

