"""Chat prompts to generate responses to: Alpaca's instructions, the miniature's, or a file of one's own."""

from pathlib import Path

from base.errors import UserError
from base.files import sha256
from data import miniature
from data.hub import read_dataset
from data.rows import PROMPT, read_rows

ALPACA = ("tatsu-lab/alpaca", "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet")


def load_prompts(source: str, skip: int = 0, n: int | None = None) -> tuple[list[dict], dict]:
    """Prompts skip … skip + n of `source` (all if n is None) as dicts of id, prompt and system, and their provenance.

    `source` is "alpaca", "mini" or a JSONL file with `id`, `prompt` and, if any, `system`.
    """
    if source == "mini":
        rows = [{"id": f"mini/{i}", "prompt": prompt, "system": None} for i, prompt in enumerate(miniature.prompts())]
        dataset = miniature.provenance("prompts", rows)
    elif source == "alpaca":
        raw, dataset = read_dataset(*ALPACA, columns={"instruction": str, "input": str})
        rows = [{"id": f"alpaca/{i}", "prompt": alpaca_prompt(row), "system": None} for i, row in enumerate(raw)]
    elif Path(source).exists():
        rows = [{"id": row["id"], "prompt": row["prompt"], "system": row.get("system")}
                for row in read_rows(Path(source), PROMPT)]
        dataset = {"name": source, "sha256": sha256(Path(source))}
    else:
        raise UserError(f"--prompts {source} is neither 'alpaca', 'mini' nor a file")
    for row in rows:
        if not row["prompt"].strip():
            raise UserError(f"{source}: the prompt of {row['id']} is empty")
    end = skip + (n or 1)
    if end > len(rows):
        raise UserError(f"{source} has {len(rows)} prompts, and {end} are asked for; lower --n (or --n-train, --skip)")
    return rows[skip : end if n else None], dataset


def alpaca_prompt(row: dict) -> str:
    """The user's message of an Alpaca row: the instruction and, where there is one, the input below it.

    The headings of the original (### Instruction: …) were for a base model; a chat model has its template.
    """
    return f"{row['instruction']}\n\n{row['input']}" if row["input"].strip() else row["instruction"]
