"""The scripts as a user runs them, on tiny models: whole runs, taken up again after a kill, and on bad input."""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ONE_THREAD, ROOT, Finished, Script, build_model, run_process

import recover
import train
from base.grading import judge
from data.benchmarks import mathematics
from data.rows import read_rows, write_rows
from model import lora, weights
from model.chat import Chat
from model.loss import response_logprobs
from model.sampler import Sampler
from model.weights import read_tensors


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    write_rows(path, [{"id": f"p{i}", "prompt": f"the question number {i}\u2028and more"} for i in range(24)])
    return path


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    write_rows(path, [{"id": f"s{i}", "problem": f"{i} + {i}?", "answer": str(2 * i), "level": i % 3}
                      for i in range(6)])
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    write_rows(path, [{"id": str(i), "prompt": f"question {i}", "response": f"answer {i} " * (1 + i % 5),
                       "finish_reason": "length" if i == 3 else "stop"} for i in range(20)])
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` but the records, which hold times."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in ("stages.json", "metrics.jsonl", "report.json", "report.md")}


def read_metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_when(arguments: list, ready: object, how: int = signal.SIGKILL) -> int:
    """Start a script, send it `how` as soon as ready() holds, and return its exit code."""
    # In a shell's background job Ctrl-C is ignored, and a process started there would inherit that
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=os.environ | ONE_THREAD)
    signal.signal(signal.SIGINT, handler)
    deadline = time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(how)
    return process.wait()


def test_generate(script: Script, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    common = ("--model", tiny, "--prompts", prompts, "--max-new-tokens", 12, "--seed", 5, "--system", "Be brief.")
    done = script("generate.py", *common, "--n", 10, "--skip", 2, "--out", tmp_path / "a.jsonl")
    assert done.returncode == 0, done.stderr
    found = read_rows(tmp_path / "a.jsonl")
    assert [row["id"] for row in found] == [f"p{i}" for i in range(2, 12)]
    assert set(found[0]) == {"id", "prompt", "system", "response", "finish_reason", "prompt_tokens", "response_tokens",
                             "logprob"}
    assert all(row["system"] == "Be brief." and row["logprob"] < 0 and row["response_tokens"] <= 12 for row in found)
    assert {row["finish_reason"] for row in found} <= {"stop", "length"}
    # the same file whatever the batch, and nothing to do the second time
    few = script("generate.py", *common, "--n", 10, "--skip", 2, "--slots", 3, "--out", tmp_path / "b.jsonl")
    assert few.returncode == 0, few.stderr
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    before = (tmp_path / "a.jsonl").stat().st_mtime_ns
    again = script("generate.py", *common, "--n", 10, "--skip", 2, "--out", tmp_path / "a.jsonl")
    assert "done already" in again.stdout and (tmp_path / "a.jsonl").stat().st_mtime_ns == before
    other = script("generate.py", *common, "--n", 10, "--skip", 2, "--top-p", 0.5, "--out", tmp_path / "a.jsonl")
    assert other.returncode == 2 and "top_p" in other.stderr


def test_generate_continues_after_a_kill(script: Script, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    common = ["generate.py", "--model", tiny, "--prompts", prompts, "--max-new-tokens", 100, "--slots", 1]
    assert script(*common, "--out", tmp_path / "whole.jsonl").returncode == 0
    partial = tmp_path / "cut.partial.jsonl"
    codes = [kill_when([*common, "--out", tmp_path / "cut.jsonl"],
                       lambda lines=lines: count_lines(partial) >= lines, how)
             for lines, how in ((3, signal.SIGKILL), (6, signal.SIGTERM), (9, signal.SIGINT))]
    assert codes == [-signal.SIGKILL, 143, 130]
    assert 9 <= count_lines(partial) < 24 and not (tmp_path / "cut.jsonl").exists()
    assert script(*common, "--out", tmp_path / "cut.jsonl").returncode == 0
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()


def train_arguments(model: Path, rows: Path, *more: object) -> list:
    return ["train.py", "--model", model, "--data", rows, "--rank", 4, "--lr", 1e-2, "--batch-tokens", 100,
            "--dropout", 0.1, "--epochs", 3, *more]


def test_train(script: Script, tiny: Path, rows: Path, tmp_path: Path) -> None:
    done = script(*train_arguments(tiny, rows, "--out", tmp_path / "a"))
    assert done.returncode == 0, done.stderr
    assert "1 cut at a limit" in done.stdout and "⟦answer" in done.stdout
    metrics = read_metrics(tmp_path / "a" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, len(metrics) + 1))
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    assert {"loss", "lr", "grad_norm", "tokens", "supervised_tokens", "seconds", "peak_memory_mb"} < set(metrics[0])
    record = json.loads((tmp_path / "a" / "config.json").read_text())
    assert record["options"]["rank"] == 4 and record["versions"]["torch"] == torch.__version__
    assert sorted(os.listdir(tmp_path / "a")) == ["adapter_config.json", "adapter_model.safetensors", "config.json",
                                                  "metrics.jsonl"]
    # the adapter loads, by itself and for more training
    model = weights.load(tiny, torch.device("cpu"), torch.float32)
    assert lora.load(model, str(tmp_path / "a")).rank == 4
    more = script("train.py", "--model", tiny, "--adapter", tmp_path / "a", "--data", rows, "--n", 4, "--steps", 3,
                  "--out", tmp_path / "b")
    assert more.returncode == 0, more.stderr
    first = read_metrics(tmp_path / "b" / "metrics.jsonl")[0]
    assert first["loss"] < 0.8 * metrics[0]["loss"]


def test_which_rows_are_trained_on(script: Script, tiny: Path, rows: Path, tmp_path: Path) -> None:
    """--skip and --n are the rows between; --no-system is the rows without theirs."""
    some = [row | {"system": f"You are {row['id']}."} for row in read_rows(rows)]
    files = {"all": some, "middle": some[4:8], "bare": [row | {"system": None} for row in some[4:8]]}
    adapters = {}
    for name, given in files.items():
        write_rows(tmp_path / f"{name}.jsonl", given)
    for name, *options in (("all", "--skip", 4, "--n", 4), ("middle",), ("bare",), ("all", "--n", 4),
                           ("all", "--skip", 4, "--n", 4, "--no-system")):
        out = tmp_path / f"out{len(adapters)}"
        done = script(*train_arguments(tiny, tmp_path / f"{name}.jsonl", *options, "--out", out))
        assert done.returncode == 0, done.stderr
        adapters[len(adapters)] = (out / "adapter_model.safetensors").read_bytes()
    between, middle, bare, first, without = adapters.values()
    assert between == middle and without == bare and len({middle, bare, first}) == 3


def test_micro_batches_change_nothing(script: Script, tiny: Path, rows: Path, tmp_path: Path) -> None:
    losses = []
    for micro in (30, 100):
        out = tmp_path / str(micro)
        assert script("train.py", "--model", tiny, "--data", rows, "--rank", 4, "--lr", 1e-3, "--batch-tokens", 100,
                      "--micro-batch-tokens", micro, "--out", out).returncode == 0
        losses.append([row["loss"] for row in read_metrics(out / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("what", ["adapter", "from scratch"])
def test_train_continues_after_a_kill_to_the_same_bits(what: str, script: Script, tiny: Path, rows: Path,
                                                       tmp_path: Path) -> None:
    arguments = train_arguments(tiny, rows, "--epochs", 40)
    if what == "from scratch":
        arguments = ["train.py", "--from-scratch", "--model", tiny, "--data", rows, "--optimizer", "muon", "--lr", 1e-2,
                     "--batch-tokens", 100, "--prompt-loss-weight", 0.1, "--weight-decay", 0.01, "--epochs", 40]
    assert script(*arguments, "--out", tmp_path / "whole").returncode == 0
    partial = tmp_path / "cut" / "metrics.partial.jsonl"
    for lines in (5, 25):
        code = kill_when([*arguments, "--out", tmp_path / "cut"], lambda lines=lines: count_lines(partial) >= lines)
        assert code == -signal.SIGKILL
        assert not list((tmp_path / "cut").glob("*model.safetensors"))
    assert script(*arguments, "--out", tmp_path / "cut").returncode == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    losses = [[row["loss"] for row in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("cut", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) > 40


def test_train_killed_at_ten_random_moments(script: Script, tiny: Path, rows: Path, tmp_path: Path) -> None:
    """With a state, an adapter to keep and a validation every step, so that kills hit while files are written."""
    arguments = train_arguments(tiny, rows, "--epochs", 40, "--validate", 2, "--validate-every", 1, "--keep-every", 1)
    assert script(*arguments, "--out", tmp_path / "whole").returncode == 0
    partial, moments = tmp_path / "cut" / "metrics.partial.jsonl", random.Random(0)
    for i in range(10):
        def ready(after: int = 4 * i, wait: float = moments.uniform(0, 0.03)) -> bool:
            reached = count_lines(partial) > after
            time.sleep(wait if reached else 0)
            return reached

        assert kill_when([*arguments, "--out", tmp_path / "cut"], ready) == -signal.SIGKILL
    assert script(*arguments, "--resume", "--out", tmp_path / "cut").returncode == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    exact = ("step", "loss", "lr", "grad_norm", "supervised_tokens", "validation_loss", "validation_loss_before")
    rows_of = [[{name: row[name] for name in exact if name in row} for row in
                read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("cut", "whole")]
    assert rows_of[0] == rows_of[1] and len(rows_of[0]) > 40


def test_checkpoints_and_validation(script: Script, tiny: Path, rows: Path, tmp_path: Path) -> None:
    """What --keep-every keeps is what a shorter run ends with; the held-out rows are not trained on."""
    arguments = [*train_arguments(tiny, rows), "--schedule", "constant", "--warmup", 0, "--dropout", 0]
    validating = [*arguments, "--validate", 3, "--validate-every", 4, "--keep-every", 4]
    assert script(*validating, "--steps", 10, "--out", tmp_path / "long").returncode == 0
    assert script(*validating, "--steps", 4, "--checkpoint-activations", "--out", tmp_path / "short").returncode == 0
    kept = tmp_path / "long" / "steps"
    assert sorted(os.listdir(kept)) == ["4", "8"]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (kept / "4" / name).read_bytes() == (tmp_path / "short" / name).read_bytes()
    metrics = read_metrics(tmp_path / "long" / "metrics.jsonl")
    assert [row["step"] for row in metrics if "validation_loss" in row] == [4, 8, 10]
    # by hand: the mean over the supervised tokens of the last three rows, before training and behind step 4
    model = weights.load(tiny, torch.device("cpu"), torch.float32)
    chat, held = Chat(tiny, model.config), read_rows(rows)[-3:]

    def loss() -> float:
        found = []
        for row in held:
            turn = chat.turn(row["prompt"], row["response"])
            found.append(response_logprobs(model, turn.tokens, turn.first, turn.last))
        return -torch.cat(found).mean().item()

    assert metrics[0]["validation_loss_before"] == pytest.approx(loss(), rel=1e-5)
    lora.load(model, str(kept / "4"))
    assert metrics[3]["validation_loss"] == pytest.approx(loss(), rel=1e-5)
    write_rows(tmp_path / "first.jsonl", read_rows(rows)[:-3])
    without = ["train.py", "--model", tiny, "--data", tmp_path / "first.jsonl", *arguments[5:], "--steps", 4]
    assert script(*without, "--out", tmp_path / "without").returncode == 0
    assert contents(tmp_path / "without")["adapter_model.safetensors"] == (
        tmp_path / "short" / "adapter_model.safetensors").read_bytes()


def test_dry_run_writes_nothing(script: Script, tiny: Path, rows: Path, tmp_path: Path) -> None:
    done = script(*train_arguments(tiny, rows, "--dry-run", "--out", tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "20 rows - 0 dropped = 20 conversations" in done.stdout and "⟦answer" in done.stdout
    assert "longest: 14 (" in done.stdout and "MB and the libraries" in done.stdout
    assert not (tmp_path / "out").exists()
    # of 20 rows the fourth was cut; held out, it is not among those that are trained on
    write_rows(tmp_path / "four.jsonl", read_rows(rows)[:4])
    held = script(*train_arguments(tiny, tmp_path / "four.jsonl", "--validate", 1, "--dry-run", "--out",
                                   tmp_path / "out"))
    assert "4 rows - 0 dropped - 1 held out = 3 conversations (0 cut" in held.stdout
    other = script(*train_arguments(tiny, rows, "--resume", "--out", tmp_path / "out"))
    assert other.returncode == 2 and "no run of this command to continue" in other.stderr
    assert not (tmp_path / "out").exists()


def test_full_training_writes_a_model(script: Script, tiny: Path, rows: Path, tmp_path: Path) -> None:
    import transformers

    done = script("train.py", "--full", "--model", tiny, "--data", rows, "--lr", 1e-3, "--dtype", "float32",
                  "--batch-tokens", 100, "--weight-decay", 0.01, "--out", tmp_path / "full")
    assert done.returncode == 0, done.stderr
    losses = [row["loss"] for row in read_metrics(tmp_path / "full" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    before, after = read_tensors(tiny / "model.safetensors"), read_tensors(tmp_path / "full" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    again = script("generate.py", "--model", tmp_path / "full", "--prompts", rows, "--n", 2, "--max-new-tokens", 3,
                   "--out", tmp_path / "g.jsonl")
    assert again.returncode == 0, again.stderr
    assert "done already" in script("train.py", "--full", "--model", tiny, "--data", rows, "--lr", 1e-3, "--dtype",
                                    "float32", "--batch-tokens", 100, "--weight-decay", 0.01, "--out",
                                    tmp_path / "full").stdout


def test_training_from_scratch_on_conversations(script: Script, tiny: Path, tmp_path: Path) -> None:
    """A few steps over conversations of two turns, whose second answer can be known from the first alone."""
    rows = [{"id": str(i), "messages": [
        {"role": "user", "content": "a number"}, {"role": "assistant", "content": f"{i % 10}"},
        {"role": "user", "content": "again"}, {"role": "assistant", "content": f"{i % 10}"}]} for i in range(200)]
    write_rows(tmp_path / "rows.jsonl", rows)
    done = script("train.py", "--from-scratch", "--model", tiny, "--data", tmp_path / "rows.jsonl", "--lr", 1e-2,
                  "--optimizer", "muon", "--batch-tokens", 1000, "--epochs", 8, "--save-dtype", "bfloat16", "--out",
                  tmp_path / "new")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("⟦") == 2  # both answers are supervised
    metrics = read_metrics(tmp_path / "new" / "metrics.jsonl")
    assert metrics[0]["loss"] > 3 and metrics[-1]["loss"] < 1
    saved = read_tensors(tmp_path / "new" / "model.safetensors").values()
    assert {tensor.dtype for tensor in saved} == {torch.bfloat16}
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"


def test_options_are_handed_on_as_they_would_be_typed() -> None:
    args = argparse.Namespace(a_b=True, c=False, d=0.0, e=None, f={}, g=[1, 2])
    assert recover.as_arguments(args, ("a_b", "c", "d", "e", "f", "g")) == ["--a-b", "--d", "0.0", "--g", "1", "2"]


def test_recover_hands_every_training_option_on() -> None:
    """One that was not would be taken, recorded, and without effect."""
    parser = argparse.ArgumentParser()
    train.training_options(parser)
    by_stage = {"lr", "epochs", "steps", "batch_tokens"}  # recovery has its own
    assert set(vars(parser.parse_args([]))) == set(recover.TRAINING) | set(train.NEW_ADAPTER) | by_stage


def test_styles_that_are_given_come_before_the_presets_openers() -> None:
    given = recover.parse(["--preset", "mini", "--style-systems", "Be plain.", "Be brief."])
    assert given.openers is None and recover.parse(["--preset", "mini"]).openers is not None


def test_an_opener_is_part_of_the_response(script: Script, tiny: Path, prompts: Path, problems: Path,
                                           tmp_path: Path) -> None:
    """What is sampled behind an opener is what is sampled behind the same text in the prompt."""
    common = ("--model", tiny, "--max-new-tokens", 8, "--temperature", 0)
    assert script("generate.py", *common, "--prompts", prompts, "--n", 4, "--opener", "Okay, a", "--out",
                  tmp_path / "a.jsonl").returncode == 0
    model = weights.load(tiny, torch.device("cpu"), torch.float32)
    chat = Chat(tiny, model.config)
    for row in read_rows(tmp_path / "a.jsonl"):
        prompt = chat.encode(chat.render(row["prompt"]) + "Okay, a")
        (expected,) = Sampler(model, chat.stop_ids, max_new_tokens=8).generate([("x", prompt)])
        assert row["response"] == "Okay, a" + chat.decode(expected.tokens)
        assert row["response_tokens"] == len(expected.tokens) and row["prompt_tokens"] == len(prompt)
    assert script("evaluate.py", *common, "--benchmarks", problems, "--opener", "Okay, a", "--out",
                  tmp_path / "e").returncode == 0
    assert all(row["response"].startswith("Okay, a") for row in read_rows(tmp_path / "e" / "sums.jsonl"))
    assert "opener is 'Okay, a'" in script("evaluate.py", *common, "--benchmarks", problems, "--out",
                                           tmp_path / "e").stderr


def test_bfloat16(script: Script, tiny: Path, rows: Path, problems: Path, tmp_path: Path) -> None:
    """The GPU's dtype, on the CPU: sampling, LoRA with float32 adapters, full training under autocast."""
    dtype = ("--model", tiny, "--dtype", "bfloat16")
    train = ("train.py", "--data", rows, "--batch-tokens", 100)
    for command in (("generate.py", "--prompts", rows, "--max-new-tokens", 8, "--out", tmp_path / "g.jsonl"),
                    (*train, "--rank", 4, "--lr", 1e-2, "--out", tmp_path / "a"),
                    (*train, "--full", "--lr", 1e-3, "--out", tmp_path / "f"),
                    ("evaluate.py", "--adapter", tmp_path / "a", "--benchmarks", problems, "--max-new-tokens", 8,
                     "--out", tmp_path / "e")):
        done = script(*command, *dtype)
        assert done.returncode == 0, done.stderr
    for name in ("a", "f"):
        losses = [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        assert losses[-1] < losses[0]
    assert all(tensor.dtype == torch.float32 for tensor in read_tensors(tmp_path / "a" / lora.TENSORS).values())
    assert all(tensor.dtype == torch.bfloat16 for tensor in read_tensors(tmp_path / "f" / weights.SINGLE).values())


def test_merge_as_a_program(tiny: Path, rows: Path, script: Script, tmp_path: Path) -> None:
    assert script(*train_arguments(tiny, rows, "--out", tmp_path / "a")).returncode == 0
    done = run_process("-m", "model.lora", "--model", tiny, "--adapter", tmp_path / "a", "--adapter-scale", 0.5,
                       "--dtype", "float32", "--out", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    merged = weights.load(tmp_path / "merged", torch.device("cpu"), torch.float32)
    model = weights.load(tiny, torch.device("cpu"), torch.float32)
    lora.load(model, str(tmp_path / "a"), 0.5)
    lora.merge(model)
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), model.parameters(), strict=True))


def test_evaluate_and_rescore(script: Script, tiny: Path, problems: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    common = ("evaluate.py", "--model", tiny, "--benchmarks", problems, "--n", 4, "--max-new-tokens", 16, "--system",
              "Be brief.", "--out", out)
    done = script(*common)
    assert done.returncode == 0, done.stderr
    found = read_rows(out / "sums.jsonl")
    assert [row["system"] for row in found] == ["Be brief."] * 4  # measure.py reads it
    assert {"id", "correct", "response", "extracted", "gold", "finish_reason", "level"} <= set(found[0])
    summary = json.loads((out / "summary.json").read_text())["sums"]
    assert (summary["n"], summary["correct"], summary["unparsed"]) == (4, 0, 4)
    assert {"accuracy", "ci95", "truncated", "by_level", "dataset"} <= set(summary)
    assert summary["dataset"]["sha256"]
    # a better response, and the saved rows are graded again
    found[1]["response"] = f"So it is \\boxed{{{found[1]['gold']}.0}}"
    write_rows(out / "sums.jsonl", found)
    again = script("evaluate.py", "--rescore", out)
    assert again.returncode == 0 and "was 0 correct" in again.stdout, again.stderr
    summary = json.loads((out / "summary.json").read_text())["sums"]
    assert (summary["correct"], summary["unparsed"]) == (1, 3)
    assert read_rows(out / "sums.jsonl")[1]["correct"] is True
    assert "done already" in script(*common).stdout


def test_evaluate_continues_after_a_kill(script: Script, tiny: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "many.jsonl", [{"id": str(i), "problem": f"{i}?", "answer": "1"} for i in range(30)])
    common = ["evaluate.py", "--model", tiny, "--benchmarks", tmp_path / "many.jsonl", "--max-new-tokens", 80,
              "--temperature", 1.0, "--slots", 1]
    assert script(*common, "--out", tmp_path / "whole").returncode == 0
    partial = tmp_path / "cut" / "many.partial.jsonl"
    kill_when([*common, "--out", tmp_path / "cut"], lambda: count_lines(partial) >= 4)
    assert not (tmp_path / "cut" / "many.jsonl").exists() and not (tmp_path / "cut" / "summary.json").exists()
    assert script(*common, "--out", tmp_path / "cut").returncode == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def recover_arguments(tiny: Path, teacher: Path, prompts: Path, problems: Path, out: Path) -> list:
    return ["recover.py", "--student", tiny, "--teacher", teacher, "--prompts", prompts, "--n-train", 10,
            "--benchmarks", problems, "--n", 4, "--max-new-tokens", 16, "--recover-with", 4, 2, "--controls",
            "--rank", 4, "--out", out]


def test_recover(script: Script, tiny: Path, tiny_teacher: Path, prompts: Path, problems: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = recover_arguments(tiny, tiny_teacher, prompts, problems, out)
    done = script(*arguments)
    assert done.returncode == 0, done.stderr
    assert "sampler and trainer agree" in done.stdout
    for name in ("config.json", "teacher.jsonl", "native.jsonl", "off_model/adapter_model.safetensors",
                 "recovered/2/adapter_model.safetensors", "recovered/4/metrics.jsonl", "evals/base/summary.json",
                 "figures/accuracy.png", "figures/recovery.png", "report.md", "report.json"):
        assert (out / name).exists(), name
    report = json.loads((out / "report.json").read_text())
    assert list(report["checkpoints"]) == [
        "base", "teacher", "off_model", "recovered_2", "recovered_4", "scaled_0.25", "scaled_0.5", "scaled_0.75",
        "scaled_1.25", "control_matched_nll", "control_more_teacher", "control_native", "control_noise",
        "control_noise_seed_1", "control_noise_seed_2"]
    assert set(report["recovered_fraction"]["sums"]) == {"2", "4"}
    assert {"points", "ci95", "p"} == set(report["drop"]["sums"])
    assert report["seconds"]["off_model"] > 0
    # SFT and recovery are on different prompts, and the recovered adapters come from the off-model one
    teacher, native = ({row["id"] for row in read_rows(out / f"{name}.jsonl")} for name in ("teacher", "native"))
    assert len(teacher) == 10 and len(native) == 4 and not teacher & native
    record = json.loads((out / "recovered/2/config.json").read_text())
    assert record["adapter"] == str(out / "off_model") and record["rows"] == 2
    # the second call does nothing; another one is refused
    before = contents(out)
    again = script(*arguments)
    assert again.returncode == 0 and "done already" in again.stdout and contents(out) == before
    other = script(*arguments, "--lr", 1e-3)
    assert other.returncode == 2 and "its lr is 0.0002, here it is 0.001" in other.stderr
    assert contents(out) == before


def test_recover_continues_after_kills(script: Script, tiny: Path, tiny_teacher: Path, prompts: Path, problems: Path,
                                       tmp_path: Path) -> None:
    whole, cut = (recover_arguments(tiny, tiny_teacher, prompts, problems, tmp_path / run) for run in ("whole", "cut"))
    assert script(*whole).returncode == 0
    for moment in ("teacher.partial.jsonl", "off_model/training_state.safetensors", "evals/recovered_2/config.json"):
        kill_when(cut, (tmp_path / "cut" / moment).exists)
        assert not (tmp_path / "cut" / "report.json").exists()
    assert script(*cut).returncode == 0
    kept = [{name: data for name, data in contents(tmp_path / run).items() if not name.endswith("config.json")}
            for run in ("whole", "cut")]
    assert kept[0] == kept[1]
    reports = [json.loads((tmp_path / run / "report.json").read_text()) for run in ("whole", "cut")]
    for report in reports:
        assert min(report.pop("seconds").values()) > 0
    assert reports[0] == reports[1]


def test_help_is_quick_and_shows_defaults(script: Script) -> None:
    for name in ("generate.py", "train.py", "evaluate.py", "measure.py", "recover.py"):
        done = script(name, "--help")
        assert done.returncode == 0 and "(default:" in done.stdout
        # no torch before the arguments are read
        code = (f"import runpy, sys; sys.argv = ['{name}', '--help']\n"
                f"try: runpy.run_path('{name}', run_name='__main__')\n"
                "except SystemExit: pass\nassert 'torch' not in sys.modules")
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_out_of_memory_names_what_lowers_it(tiny: Path, prompts: Path, rows: Path, tmp_path: Path) -> None:
    """Each script as a program, with a model that memory does not hold."""
    model, out = ["--model", str(tiny)], ["--out", str(tmp_path / "out")]
    commands = {
        "generate.py": [*model, "--prompts", str(prompts), "--out", str(tmp_path / "out.jsonl")],
        "train.py": [*model, "--data", str(rows), *out],
        "evaluate.py": [*model, "--benchmarks", "recall", *out],
        "measure.py": [*model, "--responses", str(rows), *out],
        "recover.py": ["--preset", "mini", *out],
    }
    code = ("import json, runpy, sys; from model import weights\n"
            "def load(*arguments, **options): raise MemoryError\n"
            "weights.load = load\n"
            "for script, arguments in json.loads(sys.argv[1]).items():\n"
            "    sys.argv = [script, *arguments]\n"
            "    try: runpy.run_path(script, run_name='__main__')\n"
            "    except SystemExit as ended: assert ended.code == 2")
    done = run_process("-c", code, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.split("\n") if line]
    assert len(said) == 5 and all(line.startswith("error: out of memory; ") for line in said)
    for line, options in zip(said, (("--slots", "--kv-memory"), ("--micro-batch-tokens", "--checkpoint-activations"),
                                    ("--slots", "--kv-memory"), ("--n",),
                                    ("--slots", "--kv-memory", "--micro-batch-tokens")), strict=True):
        assert all(option in line for option in options)
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_gets_progress_bars_and_a_file_none(script: Script, tiny: Path, prompts: Path, problems: Path,
                                                       rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capfd: pytest.CaptureFixture) -> None:
    model, adapter = ("--model", tiny), ("--adapter", tmp_path / "file" / "adapter")
    stages = [("generate.py", *model, "--prompts", prompts, "--n", 2, "--max-new-tokens", 2, "--out", "rows.jsonl"),
              ("train.py", *model, "--data", rows, "--steps", 2, "--validate", 2, "--out", "adapter"),
              ("evaluate.py", *model, "--benchmarks", problems, "recall", "--n", 2, "--max-new-tokens", 2, "--out",
               "evals"),
              ("measure.py", *model, *adapter, "--responses", rows, "--out", "measures")]
    bars = [["rows.jsonl"], ["adapter", "validation"], ["evals/sums", "recall"], ["measures/", "base"]]
    for where in ("file", "terminal"):
        monkeypatch.setattr(sys.stderr, "isatty", lambda where=where: where == "terminal")
        for (name, *arguments), titles in zip(stages, bars, strict=True):
            done = script(name, *arguments[:-1], tmp_path / where / arguments[-1])
            assert done.returncode == 0, done.stderr
            assert where == "terminal" or done.stderr == ""
            with_eta = [part for part in done.stderr.split("\r") if re.search(r"\d/\d+ \[\d\d:\d\d<[\d?]", part)]
            for title in titles if where == "terminal" else ():
                assert any(title in part for part in with_eta), (name, title)
    judge(mathematics.__name__, [mathematics.EXAMPLE])
    assert "data.benchmarks.mathematics.check: 100%" in capfd.readouterr().err


def damaged(tiny: Path, folder: Path, name: str, change: object) -> Path:
    """A copy of the model with one file changed."""
    shutil.copytree(tiny, folder)
    path = folder / name
    change(path)
    return folder


DAMAGE = {
    "no config": ("config.json", Path.unlink, "config.json"),
    "config lacks a field": ("config.json", lambda p: p.write_text(p.read_text().replace("hidden_size", "h")),
                             "hidden_size"),
    "broken config": ("config.json", lambda p: p.write_text("{"), "not valid JSON"),
    "truncated weights": ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-100]), "truncated"),
    "corrupt weights": ("model.safetensors", lambda p: p.write_bytes(b"\xff" * 1000), "truncated or not"),
    "no weights": ("model.safetensors", Path.unlink, "model.safetensors"),
    "no tokenizer": ("tokenizer.json", Path.unlink, "tokenizer.json"),
    "broken tokenizer": ("tokenizer.json", lambda p: p.write_text('{"version": "1.0"}'), "not a tokenizer"),
    "no token for unknown words": ("tokenizer.json", lambda p: p.write_text(json.dumps(json.loads(p.read_text()) | {
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<none>"}})), "fails on"),
    "no template": ("chat_template.jinja", Path.unlink, "chat template"),
    "a template that refuses a row": ("chat_template.jinja", lambda p: p.write_text(
        "{% if 'number 7' in messages[0].content %}{{ raise_exception('not this') }}{% endif %}" + p.read_text()),
        "error: p7: the chat template"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_models(case: str, script: Script, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    name, change, message = DAMAGE[case]
    model = damaged(tiny, tmp_path / "model", name, change)
    done = script("generate.py", "--model", model, "--prompts", prompts, "--out", tmp_path / "out" / "rows.jsonl")
    assert_refused(done, message)
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


def assert_refused(done: Finished | subprocess.CompletedProcess, message: str) -> None:
    """Exit code 2 and one sentence on stderr, with `message` in it."""
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def write_long_rows(path: Path) -> None:
    """Four rows, of which the last two are longer than the tiny model's context."""
    write_rows(path, [{"id": f"r{i}", "prompt": "x", "response": "word " * 10**i} for i in range(4)])


def test_bad_input(script: Script, tiny: Path, prompts: Path, problems: Path, rows: Path, tmp_path: Path) -> None:
    """Each ends with exit code 2 and one sentence, and nothing is written."""
    out = tmp_path / "out"
    build_model(tmp_path / "wide", hidden_size=64)
    made = script(*train_arguments(tmp_path / "wide", rows, "--steps", 1, "--out", tmp_path / "adapter"))
    assert made.returncode == 0, made.stderr
    (tmp_path / "broken.jsonl").write_text('{"id": "a", "prompt": "x\u2028y", "response": "z"}\n{"id": "b", \n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"id": "a", "prompt": "x", "response": " "}\n')
    write_long_rows(tmp_path / "long.jsonl")
    shutil.copy(problems, tmp_path / "sums.jsonl")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    spoken = tmp_path / "spoken.jsonl"
    write_rows(spoken, [{"id": str(i), "prompt": "x", "system": "Be brief."} for i in range(6)])
    generate = ("generate.py", "--out", out / "rows.jsonl", "--prompts")
    train = ("train.py", "--out", out, "--model", tiny, "--data")
    evaluate = ("evaluate.py", "--model", tiny, "--benchmarks")
    measure = ("measure.py", "--model", tiny, "--out", out, "--responses", rows.with_name(f"{rows.stem}.partial.jsonl"))
    cases = [
        ((*generate, prompts, "--model", tmp_path / "nowhere"), "nowhere"),
        ((*generate, prompts, "--model", prompts), "is a file"),
        ((*generate, tmp_path / "empty.jsonl", "--model", tiny), "no rows"),
        ((*generate, tmp_path / "broken.jsonl", "--model", tiny), "line 2"),
        ((*generate, prompts, "--model", tiny, "--n", 25), "24 prompts"),
        ((*generate, prompts, "--model", tiny, "--n", "many"), "--n"),
        ((*generate, prompts, "--model", tiny, "--temperature", -1), "--temperature"),
        ((*generate, prompts, "--model", tiny, "--temperature", "nan"), "--temperature"),
        ((*generate, prompts, "--model", tiny, "--device", "abacus"), "abacus"),
        ((*generate, prompts, "--model", tiny, "--adapter", tmp_path / "adapter"), "another model's"),
        ((*generate, prompts, "--model", tiny, "--adapter", tiny), "not an adapter"),
        ((*generate, prompts), "--model"),
        ((*train, tmp_path / "broken.jsonl"), "line 2"),
        ((*train, tmp_path / "empty.jsonl"), "no rows"),
        ((*train, prompts), "the field response is missing"),
        ((*train, tmp_path / "blank.jsonl"), "1 have an empty response"),
        ((*train, tmp_path / "long.jsonl"), "2 of 4 conversations are longer than 256 tokens (r2, r3)"),
        ((*train, tmp_path / "long.jsonl", "--max-length", 5, "--drop-long"), "4 are longer than 5"),
        ((*train, rows, "--n", 21), "20 rows"),
        ((*train, rows, "--validate", 20), "leaves none to train on"),
        ((*train, rows, "--validate-every", 2), "--validate-every needs"),
        ((*train, rows, "--resume"), "no run of this command"),
        ((*train, tmp_path / "long.jsonl", "--drop-long", "--validate", 2), "2 are left to train on and 0 to validate"),
        ((*train, rows, "--max-length", 300), "context of 256"),
        ((*train, rows, "--seed", 2**64), "--seed"),
        ((*train, rows, "--out", rows / "x"), str(rows)),
        ((*generate, prompts, "--model", tiny, "--device", "meta"), "--device meta"),
        ((*generate, prompts, "--model", tiny, "--temperature", 1e-39), "too small"),
        ((*generate, prompts, "--model", tiny, "--adapter-scale", 2), "--adapter-scale needs"),
        ((*generate, prompts, "--model", tiny, "--adapter", ""), "the name is empty"),
        ((*generate, prompts, "--model", tiny, "--skip", 24), "24 prompts, and 25 are asked for"),
        ((*generate, prompts, "--model", tiny, "--template-options", '{"x": "\\ud800"}'), "lone surrogate"),
        ((*generate, prompts, "--model", tiny, "--today", "tomorrow"), "--today"),
        ((*generate, prompts, "--model", tiny, "--template-options", "[" * 5000), "--template-options"),
        ((*evaluate, problems, tmp_path / "sums.jsonl", "--out", out), "same name"),
        ((*evaluate, problems, "--rescore", tmp_path), "--rescore takes nothing"),
        ((*train, rows, "--rank", 40), "--rank 16"),
        ((*train, rows, "--adapter", tmp_path / "adapter"), "another model's"),
        ((*train, rows, "--adapter", tmp_path / "adapter", "--rank", 8), "--rank is of a new adapter"),
        ((*train, rows, "--full", "--dropout", 0), "--dropout is of a new adapter"),
        ((*train, rows, "--from-scratch", "--rank", 4), "--rank is of a new adapter"),
        ((*train, rows, "--from-scratch", "--adapter", tmp_path / "adapter"), "give one of them"),
        ((*train, rows, "--dtype", "float16"), "--dtype"),
        ((*train, rows, "--save-dtype", "bfloat16"), "--save-dtype is of a whole model"),
        ((*train, rows, "--prompt-loss-weight", 2), "--prompt-loss-weight"),
        ((*train, rows, "--targets", "lm_head"), "lm_head"),
        ((*train, rows, "--out", tmp_path / "thesis"), "other files"),
        ((*train, rows, "--out", rows), "is a file"),
        ((*evaluate, "gsm8k", "--out", out), "gsm8k"),
        ((*evaluate, tmp_path / "none.jsonl", "--out", out), "none.jsonl"),
        ((*evaluate, rows, "--out", out), "the field problem is missing"),
        (("evaluate.py", "--rescore", tmp_path / "thesis"), "no summary.json"),
        (("evaluate.py", "--rescore", tmp_path / "thesys"), "there is no folder"),
        (("evaluate.py", "--model", tiny), "--benchmarks"),
        ((*measure, rows), "--responses are told apart"),
        (("recover.py", "--student", tiny, "--out", out), "required: --teacher (or --preset mini)"),
        (("recover.py", "--preset", "maxi"), "maxi"),
        (("recover.py", "--student", "", "--teacher", tiny, "--out", out), "the name is empty"),
        (("recover.py", "--preset", "mini", "--recover-epochs", 10**9, "--out", out), "--recover-epochs"),
        (("recover.py", "--preset", "mini", "--openers", "Okay", "Okay so", "--out", out), "can't be told apart"),
        (("recover.py", "--preset", "mini", "--style-systems", "A", "B", "--prompts", spoken, "--n-train", 2,
          "--recover-with", 2, "--out", out), "brings its own"),
    ]
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    for messages in ([], "q", [user], [user, user], [assistant, user], [user, assistant, user], [user, {"role": "x"}],
                     {"role": "user"}, [user, {"role": "assistant", "content": None}],
                     [user, assistant | {"role": ["assistant"]}]):
        path = tmp_path / f"messages{len(cases)}.jsonl"
        write_rows(path, [{"id": "good", "messages": [user, assistant]}, {"id": "bad", "messages": messages}])
        cases.append(((*train, path), "the messages of row bad"))
    for arguments, message in cases:
        assert_refused(script(*arguments), message)
        assert not out.exists() or os.listdir(out) == [], arguments
    assert os.listdir(tmp_path / "thesis") == ["thesis.tex"] and not (tmp_path / "thesys").exists()


def test_as_a_process(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    """What tests in this process can't show: the exit code, a hub that is offline, an argument that is no number."""
    generate = ("generate.py", "--prompts", prompts, "--out", tmp_path / "rows.jsonl", "--model")
    assert_refused(run_process(*generate, "nobody/nothing", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set")
    assert_refused(run_process(*generate, tiny, "--n", "many"), "--n")
    assert os.listdir(tmp_path) == []
    assert run_process(*generate, tiny, "--n", 2, "--max-new-tokens", 2).returncode == 0


def test_rows_of_nobody_are_not_adopted(script: Script, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.partial.jsonl", [{"id": "p0", "response": "foreign"}])
    done = script("generate.py", "--model", tiny, "--prompts", prompts, "--out", tmp_path / "a.jsonl")
    assert_refused(done, "a.partial.jsonl is there already")


def test_a_folder_that_was_killed_before_its_record(script: Script, tiny: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / ".config.json.part").mkdir(parents=True)
    (tmp_path / "a" / ".config.json.part" / "config.json").write_text("{")
    done = script("train.py", "--model", tiny, "--data", rows, "--rank", 4, "--steps", 1, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("temperature", [0, 1])
def test_damaged_weights_are_noticed(temperature: int, script: Script, tiny: Path, prompts: Path, problems: Path,
                                     tmp_path: Path) -> None:
    def spoil(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        save_file(load_file(path) | {"model.norm.weight": torch.full((32,), float("nan"))}, path)

    model = damaged(tiny, tmp_path / "model", "model.safetensors", spoil)
    common = ("--model", model, "--temperature", temperature, "--max-new-tokens", 4, "--out")
    assert_refused(script("generate.py", "--prompts", prompts, *common, tmp_path / "a.jsonl"), "not finite")
    assert_refused(script("evaluate.py", "--benchmarks", problems, *common, tmp_path / "e"), "not finite")
    assert not (tmp_path / "a.jsonl").exists() and not (tmp_path / "e" / "sums.jsonl").exists()


def test_a_closed_pipe_is_not_success(tiny: Path, rows: Path, tmp_path: Path) -> None:
    """`train.py … | true`: its first print fails long before it is done."""
    arguments = [sys.executable, "train.py", "--model", str(tiny), "--data", str(rows), "--rank", "4", "--out",
                 str(tmp_path / "a")]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(arguments, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True,
                          env=os.environ | ONE_THREAD | {"PYTHONUNBUFFERED": "1"})
    os.close(writer)
    assert done.returncode == 141 and "Traceback" not in done.stderr and done.stderr.startswith("stopped")


def test_diverging_training_names_step_and_rows(script: Script, tiny: Path, rows: Path, tmp_path: Path) -> None:
    done = script("train.py", "--model", tiny, "--data", rows, "--rank", 4, "--lr", 1e20, "--out", tmp_path / "out")
    assert done.returncode == 2 and "at step" in done.stderr and "--lr" in done.stderr
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_dropped_rows_are_listed(script: Script, tiny: Path, tmp_path: Path) -> None:
    write_long_rows(tmp_path / "long.jsonl")
    done = script("train.py", "--model", tiny, "--data", tmp_path / "long.jsonl", "--rank", 4, "--drop-long",
                  "--steps", 1, "--out", tmp_path / "out")
    assert done.returncode == 0 and "4 rows - 2 dropped (r2, r3) = 2 conversations" in done.stdout, done.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dropped"] == ["r2", "r3"]
