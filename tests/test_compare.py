"""Comparing two evaluation folders: the figures, and what is refused."""

import json
from pathlib import Path

import pytest
from conftest import Script

from analysis.compare import compare
from base.errors import UserError
from base.files import write_json
from data.rows import write_rows

RIGHT, WRONG, CUT, SILENT = ((True, "1", "stop"), (False, "2", "stop"), (False, None, "length"), (False, None, "stop"))


def evaluation(folder: Path, verdicts: list[tuple], options: dict | None = None, template: str = "a",
               change: dict | None = None) -> Path:
    """A finished evaluation of `my` with such rows; `change` is made to the last one."""
    rows = [{"id": str(i), "prompt": f"{i}?", "gold": "1", "correct": correct, "extracted": extracted,
             "finish_reason": reason} for i, (correct, extracted, reason) in enumerate(verdicts)]
    rows[-1] |= change or {}
    write_rows(folder / "my.jsonl", rows)
    write_json(folder / "summary.json", {"my": {}})
    conditions = {"system": None, "max_new_tokens": 64, "temperature": 0.0, "seed": 0, "model": folder.name}
    write_json(folder / "config.json", {"options": conditions | (options or {}), "template_sha256": template})
    return folder


def test_what_was_lost_and_how(tmp_path: Path) -> None:
    before = evaluation(tmp_path / "a", [RIGHT] * 6 + [WRONG, CUT, SILENT, RIGHT])
    after = evaluation(tmp_path / "b", [CUT, CUT, CUT, SILENT, WRONG, RIGHT, RIGHT, CUT, WRONG, RIGHT])
    found = compare(before, after)["my"]
    assert found["lost"] == {"truncated": 3, "unparsed": 1, "wrong": 1} and found["gained"] == 1
    assert found["points"] == 40 and found["p"] == pytest.approx((2 * (1 + 6) - 6) / 2**6)
    assert found["ci95"][0] < 40 < found["ci95"][1]


@pytest.mark.parametrize(("change", "named"), [
    ({"options": {"max_new_tokens": 128}}, "max_new_tokens is 64 in the first and 128"),
    ({"options": {"system": "Be brief."}}, "system is null"),
    ({"options": {"temperature": 0.7}}, "temperature"),
    ({"template": "b"}, "template_sha256"),
    ({"change": {"prompt": "Sure: 2?"}}, "the prompt of 2"),
    ({"change": {"gold": "3"}}, "the gold of 2"),
    ({"change": {"id": "9"}}, "the id of 2"),
    ({"verdicts": [RIGHT] * 4}, "has 3 my problems"),
])
def test_what_cant_be_compared(tmp_path: Path, change: dict, named: str) -> None:
    before = evaluation(tmp_path / "a", [RIGHT, RIGHT, WRONG])
    after = evaluation(tmp_path / "b", **{"verdicts": [RIGHT, WRONG, WRONG]} | change)
    with pytest.raises(UserError, match=named):
        compare(before, after)


def test_differences_that_do_not_matter(tmp_path: Path) -> None:
    before = evaluation(tmp_path / "a", [RIGHT, RIGHT, WRONG])
    compare(before, evaluation(tmp_path / "b", [RIGHT] * 3, {"seed": 1, "dtype": "bfloat16"}))  # greedy both
    longer = evaluation(tmp_path / "c", [RIGHT] * 3, {"max_new_tokens": 128})
    assert compare(before, longer, ("max_new_tokens",))["my"]["gained"] == 1
    (tmp_path / "a" / "summary.json").unlink()
    with pytest.raises(UserError, match="no finished evaluation"):
        compare(before, longer)


def test_as_a_program(tmp_path: Path, script: Script) -> None:
    before = evaluation(tmp_path / "a", [RIGHT] * 5)
    after = evaluation(tmp_path / "b", [RIGHT, CUT, CUT, SILENT, RIGHT])
    done = script("analysis.compare", before, after)
    assert done.returncode == 0
    assert "my: -60.0 points" in done.stdout and "3 lost (2 truncated, 1 unparsed, 0 wrong), 0 gained" in done.stdout
    other = evaluation(tmp_path / "c", [RIGHT] * 5, {"max_new_tokens": 128})
    done = script("analysis.compare", before, other)
    assert done.returncode == 2 and "--although max_new_tokens" in done.stderr and not done.stdout
    assert script("analysis.compare", before, other, "--although", "max_new_tokens").returncode == 0
    assert json.loads((after / "summary.json").read_text()) == {"my": {}}
