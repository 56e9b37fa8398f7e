"""MMLU questions per minute against lm-eval with its HF model: SmolLM2-135M-Instruct, the same 500 prompts, same dtype.

    python tests/bench_evaluate.py

lm-eval gets the prompts as token ids with one token as continuation, for which it computes each prompt once for all
four letters, at the best of the batch sizes tried. The two sides take turns, 100 questions each. Needs
requirements-peers.txt and the hub cache.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from base.hub import model_folder
from data.benchmarks import load_benchmark
from model import weights
from model.chat import Chat
from model.sampler import Sampler

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTIONS, PART, BATCH_SIZES = 500, 100, (1, 2, 4, 8, 16, 32)


def main() -> None:
    """Measure and print."""
    from lm_eval.models.huggingface import HFLM

    ours = weights.load(model_folder(MODEL), torch.device("cpu"), torch.float32)
    chat = Chat(model_folder(MODEL), ours.config)
    benchmark = load_benchmark("mmlu", QUESTIONS, 0)
    prompts = [chat.prompt(problem.prompt) for problem in benchmark.problems]
    sampler = Sampler(ours, chat.stop_ids, max_new_tokens=1)
    turns = [chat.turn(benchmark.problems[0].prompt, letter) for letter in benchmark.choices]
    letters = [turn.tokens[turn.first] for turn in turns]
    theirs = HFLM(pretrained=MODEL, device="cpu", dtype="float32", batch_size=1)

    def ask_ours(part: list[list[int]]) -> list[int]:
        """As evaluate.py does; what questions begin with in common is computed once."""
        numbered = [(str(i), prompt) for i, prompt in enumerate(part)]
        return [choice for _, scores in sampler.score(numbered, letters) for choice in scores.argmax(-1).tolist()]

    def ask_theirs(part: list[list[int]], batch_size: int) -> list[int]:
        requests = [((str(i), str(letter)), prompt, [letter]) for i, prompt in enumerate(part) for letter in letters]
        found = theirs._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=batch_size)
        scores = torch.tensor([score for score, _ in found]).view(len(part), len(letters))
        return scores.argmax(-1).tolist()

    def timed(ask: object, *arguments: object) -> tuple[list[int], float]:
        start = time.perf_counter()
        chosen = ask(*arguments)
        return chosen, time.perf_counter() - start

    some = prompts[:: len(prompts) // 48][:48]
    seconds = {size: timed(ask_theirs, some, size)[1] for size in BATCH_SIZES}
    best = min(seconds, key=seconds.get)
    print("lm-eval, questions/min by batch size:", {size: round(60 * len(some) / s) for size, s in seconds.items()})
    timed(ask_ours, some)
    ratios, totals, same = [], [0.0, 0.0], 0
    for start in range(0, QUESTIONS, PART):
        part = prompts[start : start + PART]
        mine, a = timed(ask_ours, part)
        other, b = timed(ask_theirs, part, best)
        same += sum(x == y for x, y in zip(mine, other, strict=True))
        ratios.append(b / a)
        totals = [totals[0] + a, totals[1] + b]
        print(f"questions {start} to {start + PART}: offmodel {60 * PART / a:.0f} per minute, lm-eval "
              f"{60 * PART / b:.0f}, ratio {b / a:.2f}")
    print(f"median ratio {statistics.median(ratios):.2f}; in all offmodel {60 * QUESTIONS / totals[0]:.0f} and lm-eval "
          f"{60 * QUESTIONS / totals[1]:.0f} questions per minute (batch size {best}); the same choice in {same}")


if __name__ == "__main__":
    main()
