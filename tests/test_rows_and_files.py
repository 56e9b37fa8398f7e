"""Rows, whole files, run records, options: what stands between a mistake and a lost evening."""

import json
import os
import signal
from pathlib import Path

import pytest
from conftest import run_process

from base.errors import UserError
from base.files import alone, inside, misfit, read_json, same_run, same_run_folder, whole, write_record, write_text
from base.hub import fingerprint, model_folder, revision
from data.prompts import load_prompts
from data.rows import GrowingRows, read_rows, write_rows


def test_rows_survive_every_kind_of_line_break(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": f"a{c}b"} for i, c in enumerate("\u2028\u2029\x85\x0b\x0c\x1c\r\n\x00🙂")]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    raw = b'{"id": "1", "text": "a\xe2\x80\xa8b"}\r\n\n{"id": 2}\n'  # U+2028 unescaped, CRLF, an empty line, a number
    (tmp_path / "raw.jsonl").write_bytes(raw)
    assert read_rows(tmp_path / "raw.jsonl") == [{"id": "1", "text": "a\u2028b"}, {"id": "2"}]


BROKEN = {
    "broken": ('{"id": "a"}\n{"id": "b\u2028c"}\n{"id": \n', "line 3"),
    "no object": ('{"id": "a"}\n[1]\n', "line 2"),
    "no id": ('{"id": "a"}\n{"name": "b"}\n', "line 2"),
    "null": ('{"id": null}\n', "line 1"),
    "twice": ('{"id": "a"}\n{"id": "b"}\n{"id": "a"}\n', "line 3.*line 1"),
    "surrogate": ('{"id": "a"}\n{"id": "\\ud800"}\n', "line 2"),
    "deep": ("[" * 100_000, "line 1"),
    "digits": ('{"id": "a", "n": ' + "1" * 5000 + "}", "line 1"),
    "empty": ("\n\n", "no rows"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows_are_named(case: str, tmp_path: Path) -> None:
    text, message = BROKEN[case]
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_rows(path)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'{"id": "\xe9"}')
    for path, message in ((tmp_path / "none", "can't be read"), (tmp_path, "folder"), (tmp_path / "latin", "UTF-8")):
        with pytest.raises(UserError, match=message):
            read_rows(path)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match="object"):
        read_json(tmp_path / "list.json")


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with pytest.raises(ZeroDivisionError), whole(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert list(path.parent.iterdir()) == []
    write_text(path, "all")
    with pytest.raises(ZeroDivisionError), whole(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "all" and len(list(path.parent.iterdir())) == 1


def test_what_a_kill_leaves_is_gone_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    # safetensors names its temporary file at random, and leaves it if killed: it must not lie beside the final files
    code = ("import os, signal, sys, pathlib, base.files, threading, torch, time\n"
            "from safetensors.torch import save_file\n"
            "def kill():\n"
            "    while not list(pathlib.Path(sys.argv[1]).parent.rglob('.tmp*')): time.sleep(0.0005)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "threading.Thread(target=kill, daemon=True).start()\n"
            "while True:\n"
            "    with base.files.whole(pathlib.Path(sys.argv[1])) as part:\n"
            "        save_file({'a': torch.zeros(20_000_000)}, part)\n")
    assert run_process("-c", code, path).returncode == -signal.SIGKILL
    assert list(tmp_path.rglob(".tmp*"))
    write_text(path, "all")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_growing_rows_drop_a_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with GrowingRows(path) as rows:
        rows.append({"id": "b", "text": "\u2028"})
        rows.append({"id": "a", "text": ""})
    assert not path.exists()
    rows.partial.write_bytes(rows.partial.read_bytes() + '{"id": "c", "text": "ü'.encode()[:-1])
    with GrowingRows(path) as rows:
        assert list(rows.rows) == ["b", "a"]
        rows.append({"id": "c", "text": "new"})
        rows.finish(rows.rows[id] for id in "abc")
    assert [row["id"] for row in read_rows(path)] == ["a", "b", "c"]
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_a_record_tells_runs_apart(tmp_path: Path) -> None:
    record = tmp_path / "run" / "config.json"
    assert not same_run_folder(record, {"seed": 1})
    write_record(record, {"seed": 1, "layers": ("a", "b")}, {"rows": 5})
    assert same_run(record, {"seed": 1, "layers": ("a", "b")})
    with pytest.raises(UserError, match="its seed is 1, here it is 2"):
        same_run(record, {"seed": 2, "layers": ("a", "b")})
    with pytest.raises(UserError, match="its extra is None"):
        same_run(record, {"seed": 1, "layers": ["a", "b"], "extra": 3})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="other files"):
        same_run_folder(tmp_path / "full" / "config.json", {})
    with pytest.raises(UserError, match="is a file"), alone(record / ".lock"):
        pass


def test_fingerprint_notices_other_weights_and_not_another_record(tiny: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(tiny)
    path = tmp_path / "copy" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert fingerprint(tmp_path / "copy") != fingerprint(tiny)
    for name in ("a", "b"):  # a folder called snapshots is not the hub's cache
        shutil.copytree(tiny if name == "a" else tmp_path / "copy", tmp_path / "snapshots" / "experiment" / name)
    assert fingerprint(tmp_path / "snapshots" / "experiment" / "a") != fingerprint(
        tmp_path / "snapshots" / "experiment" / "b")
    assert revision(Path(f"/x/models--a--b/snapshots/{'0' * 39}1/model.safetensors")) == "0" * 39 + "1"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    before = fingerprint(adapter)
    (adapter / "config.json").write_text('{"seconds": 5}')  # the training run's record
    assert fingerprint(adapter) == before


def test_a_network_that_fails_in_a_download_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    def fail(*arguments: object, **options: object) -> None:
        raise errors.HTTPError("the connection was reset")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match="nobody/nothing could not be fetched from the hub: the connection was reset"):
        model_folder("nobody/nothing")


def test_a_name_in_a_file_stays_in_its_folder(tmp_path: Path) -> None:
    assert inside(tmp_path, "evals/base") == tmp_path / "evals/base"
    for name in ("../x", "/etc/passwd", "a/../../x", "", ".", "a\0b"):
        with pytest.raises(UserError, match="no place in that folder"):
            inside(tmp_path, name)


def test_shapes_in_words() -> None:
    shape = {"a": [float] * 2, "b": {str: (str, None)}, "n": range(1, 9), "o": (int, None)}
    good = {"a": [1, 0.5], "b": {"x": None, "y": "z"}, "n": 8, "more": 1}
    assert misfit(good, shape) is None
    for changes, fault in (({"a": [1]}, "a has not 2 items"), ({"a": [1, float("nan")]}, "a.1 is not a number"),
                           ({"a": [1, True]}, "a.1 is not a number"), ({"a": None}, "a is not a list"),
                           ({"b": {"x": 1}}, "b.x is not text"), ({"n": 9}, "n is not a whole number in its range"),
                           ({"n": 1.0}, "n is not a whole number in its range"),
                           ({"o": "1"}, "o is not a whole number"),
                           ({"o": 2**63}, "o is not a whole number"), ({"a": [10**400, 1]}, "a.0 is not a number")):
        assert misfit(good | changes, shape) == fault
    assert misfit({key: good[key] for key in "ab"}, shape) == "n is missing"


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": f"p{i}"}) + "\n" for i in range(5)))
    rows, _ = load_prompts(str(path), skip=1, n=2)
    assert rows == [{"id": "1", "prompt": "p1", "system": None}, {"id": "2", "prompt": "p2", "system": None}]
    with pytest.raises(UserError, match="5 prompts, and 7 are asked for"):
        load_prompts(str(path), skip=3, n=4)
    path.write_text('{"id": "a", "prompt": "  "}')
    with pytest.raises(UserError, match="empty"):
        load_prompts(str(path))
    with pytest.raises(UserError, match="neither 'alpaca', 'mini' nor a file"):
        load_prompts("alpacca")
