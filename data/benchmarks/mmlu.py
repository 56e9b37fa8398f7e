"""MMLU (arXiv 2009.03300; cais/mmlu, 57 subjects, 14,042 questions) in its single-token form.

Zero-shot in the model's chat template:

    The following is a multiple choice question about abstract algebra. Answer with the letter alone.

    Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.
    A. 0
    B. 4
    C. 2
    D. 6

The answer is the likeliest of the four letters as first token of the response.
"""

from collections import Counter
from collections.abc import Sequence

from data.benchmarks.problem import Benchmark, Problem, Verdict, sample
from data.hub import read_dataset

LETTERS = ("A", "B", "C", "D")
# The authors' four categories (github.com/hendrycks/test, categories.py); all other subjects are "other"
CATEGORIES = {
    "STEM": "abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics "
            "college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics "
            "high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics "
            "high_school_physics high_school_statistics machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
                  "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy "
                  "prehistory professional_law world_religions",
    "social sciences": "econometrics high_school_geography high_school_government_and_politics "
                       "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
                       "professional_psychology public_relations security_studies sociology us_foreign_policy",
}
CATEGORY_OF = {subject: category for category, subjects in CATEGORIES.items() for subject in subjects.split()}


def load(n: int | None, seed: int) -> Benchmark:
    """The test split, or a sample of it stratified by subject; ids are subject/index within the subject."""
    rows, dataset = read_dataset("cais/mmlu", "all/test-00000-of-00001.parquet",
                                 columns={"question": str, "subject": str, "choices": [str] * 4, "answer": range(4)})
    problems, seen = [], Counter()
    for row in rows:
        subject = row["subject"]
        problems.append(Problem(f"{subject}/{seen[subject]}", prompt(row), LETTERS[row["answer"]], stratum=subject,
                                fields={"subject": subject, "category": CATEGORY_OF.get(subject, "other")}))
        seen[subject] += 1
    return Benchmark("mmlu", "choice", sample(problems, n, seed), dataset, choices=LETTERS)


def prompt(row: dict) -> str:
    """The user's message of a question."""
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
    return (f"The following is a multiple choice question about {row['subject'].replace('_', ' ')}. "
            f"Answer with the letter alone.\n\n{row['question'].strip()}\n{options}")


def grade(rows: Sequence[dict]) -> list[Verdict]:
    """A row's response is what was chosen."""
    return [Verdict(row["response"] == row["gold"], row["response"]) for row in rows]
