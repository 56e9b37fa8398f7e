"""300 damaged or hostile files, seeded: each is refused in one sentence, or what comes of it is right."""

import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pytest
from conftest import ONE_THREAD, ROOT, Script
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from test_findings import experiment

from analysis.report import write_report
from base.files import read_json, write_json
from data.rows import GrowingRows, read_rows, write_rows
from model import lora

CASES, QUICK = 320, 40
MEMORY = 2 << 30  # bytes
SECONDS = 10  # of processor time for one case: a guard against hanging, which none comes near
HOSTILE = [
    None, True, -1, 0, 1, 3, 10**3, 2**20, 2**31 - 1, 2**31, 2**63, 10**30, 10**400, 1e308, -0.5, float("nan"),
    float("inf"), "", "x", "\x00",
    "\x1b[31m\u202e", "\ud800", "x" * 100_000, "../../../etc/passwd", "/etc/passwd", "$\\frac$", "(", "2", [], {}, [[]],
    [None], ["default"], {"a": 1}, {"": None},
]
TEMPLATES = [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}", "{{ ''.__class__ }}{{ messages[0].content }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}", "{{ self._TemplateReference__context }}",
    "{{ messages.append(1) }}", "{{ (messages | attr('__class__')).__mro__ }}", "{{ lipsum.__globals__['os'] }}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "{{ range(10**9) | list }}",
    "{% for i in range(10**9) %}a{% endfor %}", "{{ 'a' * 10**9 }}", "{{ 10 ** (10 ** 9) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ '%1000000000d' % 1 }}", "{{ '{:>1000000000}'.format(1) }}", "{{ (['a' * 10**6] * 10**4) | join }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 5 | round(-10**9) }}", "{{ 5 | round(10**9, 'ceil') }}",
    "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s='a') %}{% for i in range(26) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{{ [1] | batch(10**9, 0) | list }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'a' %}",
    "{% if 1 %}" * 500, "{{ " + "(" * 5000, "{{ " + "-" * 5000 + "1 }}", "{{ lipsum(n=10**7) }}",
    "{{ raise_exception('a' * 10**7) }}", "{{ messages[0].content }}{{ 'b' * 10**5 }}", "{{ 1 / 0 }}", "{% for", "",
    "{{ '\ud7ff\U0010ffff\x00\x1b' }}", "{{ [messages[0].content] * 10**5 | join(messages[0].content * 10**5) }}",
]


def bytes_of(rng: random.Random, data: bytes) -> bytes:
    """Any file: cut short, some bytes changed, a piece twice, none, zeros or garbage in it."""
    place, length = rng.randrange(len(data) + 1), rng.randint(1, 200)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 8, 100))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return rng.choice((data[:place], bytes(changed), bytes(changed), data[:place] + data[place - length :], b"",
                       data[:place] + bytes(length) + data[place + length :],
                       data[:place] + rng.randbytes(length) + data[place:]))


def places(value: object) -> Iterator[tuple[object, object]]:
    """Every (container, key) of a JSON value."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def json_of(rng: random.Random, data: bytes) -> bytes:
    """A JSON object with a value of another kind, or one less, or not JSON any more."""
    if rng.random() < 0.2:
        return rng.choice((bytes_of(rng, data), b"[" * 100_000, b"[1]", b'{"a": ' + b"9" * 5000 + b"}"))
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 3))):
        container, key = rng.choice(list(places(value)) or [(value, "a")])
        if rng.random() < 0.2 and isinstance(container, dict):
            container.pop(key, None)
        elif rng.random() < 0.15 and isinstance(container, dict):
            container[rng.choice(("../../up", "", "a/b", "x" * 300, "<img src=x>"))] = container.pop(key, None)
        else:
            container[key] = rng.choice(HOSTILE)
    return json.dumps(value).encode()


def lines_of(rng: random.Random, data: bytes) -> bytes:
    """JSONL: one of the rows changed, twice or without its end, or all of the file as any other."""
    lines = data.splitlines()
    i = rng.randrange(len(lines))
    return rng.choice((
        lambda: bytes_of(rng, data), lambda: b"\n".join([*lines, lines[i]]), lambda: data[: -rng.randint(1, 30)],
        *[lambda: b"\n".join([*lines[:i], json_of(rng, lines[i]), *lines[i + 1 :]])] * 4))()


def safetensors_of(rng: random.Random, data: bytes) -> bytes:
    """A header whose length, offsets, dtypes, shapes or names lie; or values that are no numbers."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = rng.choice([name for name in header if name != "__metadata__"])
    first, last = header[name]["data_offsets"]

    def packed(text: bytes, length: int | None = None, more: bytes = body) -> bytes:
        return struct.pack("<Q", len(text) if length is None else length) + text + more

    def changed(**fields: object) -> bytes:
        return packed(json.dumps(header | {name: header[name] | fields}).encode())

    text = json.dumps(header).encode()
    shape = header[name]["shape"]
    return rng.choice((
        lambda: bytes_of(rng, data), lambda: packed(text, more=body[: rng.randrange(len(body))]),
        lambda: packed(text, rng.choice((0, 1, len(text) - 1, len(text) + 8, 10**8 - 1, 2**40, 2**64 - 1))),
        lambda: changed(data_offsets=rng.choice(([first, last + 4], [0, last - first], [last, first], [-4, last - 4],
                                                 [2**63, 2**64 - 1], [first + 1, last + 1], [first], "x"))),
        lambda: changed(dtype=rng.choice(("F64", "I32", "U8", "BOOL", "F16", "F8_E4M3", "C64", "F4", "", 7))),
        lambda: changed(shape=rng.choice((shape[::-1], [*shape, 1], [], [0], [2**40, 2**40], [-1], [1.5], None,
                                          [*shape[1:], *shape[:1]], [2, *shape]))),
        lambda: packed(text[:-1] + b', "' + name.encode() + b'": ' + json.dumps(header[name]).encode() + b"}"),
        lambda: packed(text[:-1] + b', "' + name.encode() + b'": ' + json.dumps(
            header[name] | {"data_offsets": [0, last - first]}).encode() + b"}"),
        lambda: packed(json.dumps({key + "x" * (key == name): value for key, value in header.items()}).encode()),
        lambda: packed(json.dumps({key: value for key, value in header.items() if key != name}).encode()),
        lambda: packed(json.dumps(header | {"__metadata__": rng.choice(HOSTILE[:8])}).encode()),
        lambda: packed(text, more=body[:first] + b"\xff" * (last - first) + body[last:]),
        lambda: packed(text, more=body[:first] + rng.randbytes(last - first) + body[last:]),
        lambda: packed(json_of(rng, text)), lambda: packed(b"[" * 10**6), lambda: packed(b""),
    ))()


def template_of(rng: random.Random, data: bytes) -> bytes:
    """A hostile template, alone or behind the good one, or a damaged one."""
    if rng.random() < 0.2:
        return bytes_of(rng, data)
    hostile = rng.choice(TEMPLATES).encode()
    return rng.choice((hostile, data + hostile))


def parquet_of(rng: random.Random, data: bytes) -> bytes:
    """A damaged table, or a good one of other columns, values and sizes."""
    if rng.random() < 0.6:
        return bytes_of(rng, data)
    rows = parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    name = rng.choice(list(rows[0]))
    value = rng.choice((None, "", 7, -1, ["a"], ["a", "b", "c", None], [], {"a": 1}, 0.5, b"\xff", "x" * 10**6))
    rows = rng.choice(([], [{key: one for key, one in row.items() if key != name} for row in rows],
                       [row | {name: value} for row in rows], [*rows, rows[0] | {name: None}],
                       rows * 10**5 if len(rows) < 4 else []))
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def index_of(rng: random.Random, data: bytes) -> bytes:
    """An index that leads elsewhere."""
    index = json.loads(data)
    name = rng.choice(list(index["weight_map"]))
    index["weight_map"][name] = rng.choice(("../model/model.safetensors", "/etc/passwd", "a\0b", "", ".", "..", 7, {},
                                            "no.safetensors", "config.json", "x" * 5000, "sub/../../x"))
    return rng.choice((json.dumps(index).encode(), json_of(rng, data)))


Mutator = Callable[[random.Random, bytes], bytes]
# What is copied, which of its files are damaged how, and the command that reads them, run in that folder
MODEL = ("--model", "model", "--prompts", "prompts.jsonl", "--max-new-tokens", 4)
GENERATE = ("generate", *MODEL, "--out", "out.jsonl")
HALF = ("generate", *MODEL, "--out", "half.jsonl")
TRAIN = ("train", "--model", "model", "--data", "rows.jsonl", "--rank", 2, "--steps", 3, "--batch-tokens", 64,
         "--out", "trained")
MORE = ("train", "--model", "model", "--data", "rows.jsonl", "--adapter", "adapter", "--steps", 1, "--out",
        "more")
EVALUATE = ("evaluate", "--model", "model", "--n", 3, "--max-new-tokens", 4, "--out", "evaluated", "--benchmarks")
MEASURE = ("measure", "--model", "model", "--adapter", "adapter", "--responses", "rows.jsonl", "--out",
           "measured")
REPORT, MATRIX = ("analysis.report", "experiment"), ("analysis.matrix", "matrix")
RESCORE = ("evaluate", "--rescore", "evals/base")
COMPARE = ("analysis.compare", "evals/base", "evals/off_model")
KINDS: list[tuple[str, Mutator, tuple[tuple, ...], int]] = [  # files, how, commands of which one is drawn, cases
    ("model/model.safetensors", safetensors_of, (GENERATE, TRAIN, (*EVALUATE, "recall")), 48),
    ("model/config.json", json_of, (GENERATE, TRAIN, (*TRAIN, "--dry-run")), 28),
    ("model/generation_config.json", json_of, (GENERATE,), 6),
    ("model/tokenizer.json", json_of, (GENERATE, TRAIN), 28),
    ("model/tokenizer_config.json", json_of, (GENERATE,), 8),
    ("model/chat_template.jinja", template_of, (GENERATE, TRAIN), 28),
    ("sharded/model.safetensors.index.json", index_of,
     (("generate", "--model", "sharded", *MODEL[2:], "--out", "out.jsonl"),), 14),
    ("adapter/adapter_model.safetensors", safetensors_of, ((*GENERATE, "--adapter", "adapter"), MORE, MEASURE), 18),
    ("adapter/adapter_config.json", json_of, (
        (*GENERATE, "--adapter", "adapter"), MORE,
        ("model.lora", "--model", "model", "--adapter", "adapter", "--out", "merged")), 14),
    ("prompts.jsonl", lines_of, (GENERATE,), 12),
    ("rows.jsonl", lines_of, (TRAIN, MEASURE), 16),
    ("problems.jsonl", lines_of, ((*EVALUATE, "problems.jsonl"),), 8),
    ("alpaca.parquet", parquet_of, (("generate", *MODEL[:2], "--prompts", "alpaca", *MODEL[4:], "--n", 3, "--out",
                                     "out.jsonl"),), 10),
    ("mmlu.parquet", parquet_of, (("evaluate", "--model", "bytes", *EVALUATE[3:], "mmlu"),), 12),
    ("ifeval.jsonl", lines_of, ((*EVALUATE, "ifeval"),), 8),
    ("half.partial.jsonl", lines_of, (HALF,), 6),
    ("half.config.json", json_of, (HALF,), 4),
    ("trained/config.json", json_of, (TRAIN,), 4),
    ("trained/metrics.partial.jsonl", lines_of, (TRAIN,), 6),
    ("trained/training_state.safetensors", safetensors_of, (TRAIN,), 12),
    ("evals/base/*.json*", lambda rng, data: (json_of if data.startswith(b"{\n") else lines_of)(rng, data),
     (RESCORE, COMPARE), 16),
    ("experiment/**/*.json*", lambda rng, data: (json_of if data.startswith(b"{\n") else lines_of)(rng, data),
     (REPORT,), 18),
    ("matrix/*/report.json", json_of, (MATRIX,), 10),
]


@pytest.fixture(scope="module")
def good(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each: models, data, adapter, half a run of each kind, an experiment, a matrix."""
    from generate import main as generate
    from train import main as train

    folder = tmp_path_factory.mktemp("good")
    shutil.copytree(ROOT / "miniature" / "student", folder / "model")
    shutil.copytree(tiny, folder / "bytes")
    shutil.copytree(folder / "model", folder / "sharded")
    (folder / "sharded" / "model.safetensors").unlink()
    tensors = load_file(folder / "model" / "model.safetensors")
    shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, folder / "sharded" / shard)
    write_json(folder / "sharded" / "model.safetensors.index.json", {"metadata": {}, "weight_map": shards})
    ask = ("Count red blue", "Calculate 2 - 4 + 6", "Reverse cat dog")
    write_rows(folder / "prompts.jsonl", [{"id": f"p{i}", "prompt": text} for i, text in enumerate(ask)])
    write_rows(folder / "rows.jsonl", [{"id": f"r{i}", "prompt": text, "response": "Okay Answer 2", "system": None,
                                        "finish_reason": "stop"} for i, text in enumerate(ask)])
    write_rows(folder / "problems.jsonl", [{"id": f"q{i}", "problem": text, "answer": "2", "level": i}
                                           for i, text in enumerate(ask)])
    write_rows(folder / "ifeval.jsonl", [
        {"key": i, "prompt": text, "instruction_id_list": ["punctuation:no_comma", "keywords:frequency"],
         "kwargs": [{}, {"keyword": "a", "frequency": 2, "relation": "at least"}]} for i, text in enumerate(ask)])
    for name, row in (("alpaca", {"instruction": "Count red blue", "input": ""}),
                      ("mmlu", {"question": "?", "subject": "logic", "choices": ["1", "2", "3", "4"], "answer": 2})):
        parquet.write_table(pyarrow.Table.from_pylist([row] * 3), folder / f"{name}.parquet")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train([*map(str, TRAIN[1:-1]), "adapter"])
        patch.setattr(GrowingRows, "finish", stop)  # when all but the last is done
        with pytest.raises(KeyboardInterrupt):
            generate([str(word) for word in HALF[1:]])
        patch.setattr(lora, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train([str(word) for word in TRAIN[1:]])
    experiment(folder, {"base": "++--", "off_model": "+---"})
    shutil.copytree(folder / "evals", folder / "experiment" / "evals")
    base = "+" * 30
    experiment(folder / "experiment", {
        "base": base, "teacher": base[1:] + "-", "off_model": "-" * 20 + base[20:], "recovered_8": "-" * 9 + base[9:],
        "recovered_16": base, "control_noise": base, "off_model_under_system_1": base, "base_under_system_1": base,
    }, {"control_noise": 0.1, "off_model": 0.5})
    record = read_json(folder / "experiment" / "config.json")
    record["options"] |= {"eval_system": ["Be brief."], "openers": ["Okay", "Consider"]}
    write_json(folder / "experiment" / "config.json", record)
    for name in ("base", "off_model"):
        summary = {"my": {"grader": "mathematics", "correct": 1}}
        write_json(folder / "evals" / name / "summary.json", summary)
    write_report(folder / "experiment")
    for cell in ("a--b", "c--b"):
        (folder / "matrix" / cell).mkdir(parents=True)
        shutil.copy(folder / "experiment" / "report.json", folder / "matrix" / cell)
    return folder


def stop(*arguments: object) -> None:
    raise KeyboardInterrupt


class Hang(BaseException):
    """More than SECONDS of processor time."""


def plan(seed: int = 0) -> list[tuple[str, str, Mutator, tuple]]:
    """All cases, in an order in which the first QUICK have every kind of file."""
    rng = random.Random(seed)
    cases = [(files, mutate, rng.choice(commands), i) for files, mutate, commands, count in KINDS for i in range(count)]
    cases.sort(key=lambda case: (case[3] > 0, rng.random()))
    return [(f"{seed}/{i}", *case[:3]) for i, case in enumerate(cases)]


def damage(good: Path, folder: Path, case: tuple) -> tuple[list[str], str]:
    """Put a copy of what is good, with one file damaged, into `folder`; the command to run, and that file."""
    number, pattern, mutate, command = case
    rng = random.Random(f"bad files {number}")
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(good, folder, dirs_exist_ok=True)
    if "trained" in command and not pattern.startswith("trained"):
        shutil.rmtree(folder / "trained")
    path = rng.choice(sorted(path for path in folder.glob(pattern) if path.is_file() and path.name != "report.json"
                             or "report.json" in pattern))
    for report in (folder / "experiment").glob("report.*"):
        report.unlink()
    path.write_bytes(mutate(rng, path.read_bytes()))
    return [str(word) for word in command], str(path)


# What says that a stage is done
FINAL = ("out.jsonl", "half.jsonl", "trained/metrics.jsonl", "trained/adapter_model.safetensors", "more/metrics.jsonl",
         "evaluated/summary.json", "measured/summary.json", "merged", "experiment/report.json", "matrix/matrix.json")


def fault_of(code: object, stderr: str, folder: Path, command: list[str], codes: tuple[int, ...]) -> str | None:
    """Why an ending is not as it should be."""
    final = [name for name in FINAL if (folder / name).exists()]
    if code not in codes:
        return f"exit code {code}: {stderr[-3000:]}"
    if code == 2:
        if not stderr.startswith("error: ") or stderr.count("\n") != 1 or not stderr.rstrip("\n").isprintable():
            return f"not one sentence: {stderr[:2000]!r}"
        return f"{final} left behind" if final else "out of memory" if "out of memory" in stderr else None
    for name in final:
        path = folder / name
        if path.suffix == ".jsonl":
            read_rows(path) if "metrics" not in name else path.read_text()
        elif path.suffix == ".json":
            assert "NaN" not in path.read_text(), name
            read_json(path)
    return None if final or "--dry-run" in command or "evals" in command[-1] else "nothing was made"


def run_cases(cases: list[tuple], good: Path, folder: Path, script: Script, monkeypatch: pytest.MonkeyPatch,
              codes: tuple[int, ...] = (0, 2)) -> dict[int, int]:
    """Run them in this process; how many ended how. Faults are collected, so that one run shows all."""
    def hang(signum: int, frame: object) -> None:
        raise Hang

    data = {"tatsu-lab/alpaca": "alpaca.parquet", "cais/mmlu": "mmlu.parquet", "google/IFEval": "ifeval.jsonl"}
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("data.hub.dataset_file", lambda repo, name: (folder / data[repo], "0" * 40))
    handler = signal.signal(signal.SIGPROF, hang)
    faults, endings = [], {0: 0, 2: 0}
    for case in cases:
        command, path = damage(good, folder, case)
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            done = script(*command)
            signal.setitimer(signal.ITIMER_PROF, 0)
            fault = fault_of(done.returncode, done.stderr, folder, command, codes)
            endings[done.returncode] = endings.get(done.returncode, 0) + 1
        except BaseException as error:  # tokenizers' panics are no Exceptions
            signal.setitimer(signal.ITIMER_PROF, 0)
            if isinstance(error, KeyboardInterrupt):
                raise
            fault = "".join(traceback.format_exception(error)[-4:])
        if fault:
            faults.append(f"case {case[0]}, {path}\n{' '.join(command)}\n{fault}")
    signal.signal(signal.SIGPROF, handler)
    assert not faults, f"{len(faults)} faults\n" + "\n\n".join(faults)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 <= MEMORY
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 <= MEMORY
    return endings


def test_good_files(good: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Undamaged, each is right, so that it is the damage that is refused."""
    cases = [("", files, lambda rng, data: data, command) for files, _, commands, _ in KINDS for command in commands]
    assert run_cases(cases, good, tmp_path / "case", script, monkeypatch, (0,)) == {0: len(cases), 2: 0}


def test_bad_files(good: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each kind, and some more."""
    endings = run_cases(plan()[:QUICK], good, tmp_path / "case", script, monkeypatch)
    assert endings[2] >= QUICK // 2, endings


@pytest.mark.slow
def test_bad_files_as_processes(good: Path, tmp_path: Path) -> None:
    """A sample of them as a user meets them: a process with limits of memory and of processor time."""
    cases = [case for case in plan() if not case[1].endswith(("parquet", "ifeval.jsonl"))][::25]  # from the hub
    faults = []
    for case in cases:
        command, path = damage(good, tmp_path, case)
        script = ("-m", command[0]) if "." in command[0] else (str(ROOT / f"{command[0]}.py"),)
        limited = ("bash", "-c", f'ulimit -d {MEMORY >> 10} -t {SECONDS} && exec "$@"', "-", sys.executable, *script)
        done = subprocess.run([*limited, *command[1:]], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT)}, timeout=600)
        if fault := fault_of(done.returncode, done.stderr, tmp_path, command, (0, 2)):
            faults.append(f"{path}: {' '.join(command)}\n{fault}")
    assert not faults, "\n\n".join(faults)


@pytest.mark.slow
def test_all_bad_files(good: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them."""
    cases = plan()
    assert len(cases) >= 300
    endings = run_cases(cases, good, tmp_path / "case", script, monkeypatch)
    print(endings)
    assert endings[2] >= 150 and endings[0] >= 10, endings
