"""How responses are written: a classifier of teacher against student, and plain features.

The classifier learns from chat responses alone and is applied to benchmark responses, which neither it nor SFT has
seen: what it then calls the teacher's is style that was carried over, not content.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

LEAST = 10  # responses of either kind, below which a held-out accuracy means nothing
FEATURES = {  # per response: how often
    "words": re.compile(r"\S+"),
    "steps": re.compile(r"^\s*(?:\d+[.)]|[-*•]) |\bstep\b", re.IGNORECASE | re.MULTILINE),
    "markdown": re.compile(r"^#{1,6} |\*\*[^*\n]+\*\*|^```|^\|.*\|$", re.MULTILINE),
    "formulas": re.compile(r"\\[(\[]|\$[^$\n]+\$"),
    "self-corrections": re.compile(r"\b(?:wait|hmm+|actually|let me (?:re-?check|try again|reconsider)|my mistake|"
                                   r"on second thought|correction|oops)\b", re.IGNORECASE),
}


@dataclass(frozen=True)
class StyleClassifier:
    """Character n-grams (1 to 4, tf-idf) and logistic regression, which tells two models' responses apart."""

    model: "Pipeline"
    accuracy: float  # held out, in 5-fold cross-validation by prompt: the mean of the classes' shares of right ones

    @classmethod
    def fit(cls, student: Sequence[tuple[str, str]], teacher: Sequence[tuple[str, str]]) -> "StyleClassifier | None":
        """From both models' (prompt's id, response) to chat prompts; None where there are fewer than LEAST of either.

        What both wrote to a prompt is held out together: else a held-out response would find its own words among the
        other model's, and be taken for theirs.
        """
        if min(len(student), len(teacher)) < LEAST:
            return None
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import balanced_accuracy_score
        from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline

        (prompts, texts), labels = zip(*student, *teacher, strict=True), [0] * len(student) + [1] * len(teacher)
        # lower-casing and accents are style too; counts of n-grams grow slower than the text
        model = make_pipeline(
            TfidfVectorizer(analyzer="char", ngram_range=(1, 4), min_df=2, lowercase=False, sublinear_tf=True,
                            max_features=50_000),
            LogisticRegression(C=10.0, class_weight="balanced", max_iter=1_000))
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
        accuracy = balanced_accuracy_score(labels, cross_val_predict(model, texts, labels, groups=prompts, cv=folds))
        return cls(model.fit(texts, labels), float(accuracy))

    def scores(self, responses: Sequence[str]) -> list[float]:
        """For each response the log-odds that it is the teacher's: above 0 it is more like the teacher's chat."""
        return [float(score) for score in self.model.decision_function(list(responses))]


def features(responses: Sequence[str]) -> dict[str, float | str]:
    """Means of FEATURES, and the two words that most responses begin with, with their share."""
    found: dict[str, float | str] = {
        name: sum(len(pattern.findall(text)) for text in responses) / len(responses)
        for name, pattern in FEATURES.items()}
    openings = Counter(" ".join(text.split()[:2]) for text in responses)
    opening, count = openings.most_common(1)[0]
    return found | {"opening": opening, "opening_share": count / len(responses)}


def begins(responses: Sequence[str], openers: Sequence[str]) -> dict[str, float]:
    """Share of the responses that begin with the student's opener, and with the teacher's."""
    return {whose: sum(response.lstrip().startswith(opener) for response in responses) / len(responses)
            for whose, opener in zip(("student", "teacher"), openers, strict=True)}
