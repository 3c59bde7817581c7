"""Label errors found by the weights beside those found by cleanlab, on the same out-of-sample probabilities.

    python -m venv .venv-studies && .venv-studies/bin/pip install -r tools/studies/requirements.txt
    .venv-studies/bin/python tools/studies/cleanlab_peer.py runs/conll04_uniform_noise

The probabilities are those of the cross-fitted reference over the label set (``label_set_*`` in the score shards).
Writes for ``arms.*.drop_ids`` the ids that cleanlab's confident-learning filter would remove (RUN/cleanlab_issues.txt)
and those whose label is known to be wrong (RUN/wrong_labels.txt), to see what weights would give that know them all.
Imports nothing of atlantis_ds: its environment is its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.metrics import roc_auc_score


def main() -> None:
    run = Path(sys.argv[1])
    labels = json.loads((run / "examples" / "examples.json").read_text())["labels"]
    with pa.ipc.open_file(run / "examples" / "train.arrow") as file:
        examples = {row["id"]: row for row in file.read_all().to_pylist()}
    shards = pa.concat_tables([pq.read_table(path) for path in sorted((run / "scores").glob("shard-*.parquet"))])
    ids = shards["id"].to_pylist()
    log_likelihood = np.add(
        np.array(shards["label_set_logp_reference"].to_pylist()),
        np.array(shards["label_set_eos_reference"].to_pylist()),
    )
    chances = np.exp(log_likelihood - np.logaddexp.reduce(log_likelihood, axis=1, keepdims=True))
    given = np.array([labels.index(examples[id]["target"]) for id in ids])
    right = np.array([examples[id]["target"] == examples[id]["gold"] for id in ids])
    weights = dict(zip(*(pq.read_table(run / "weights.parquet")[name].to_pylist() for name in ("id", "weight"))))
    rankings = {"weights of this run": np.array([weights[id] for id in ids])}
    for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
        rankings[f"cleanlab {method}"] = get_label_quality_scores(given, chances, method=method)
    issues = find_label_issues(given, chances)
    for name, listed in (("cleanlab_issues.txt", issues), ("wrong_labels.txt", ~right)):
        (run / name).write_text("".join(f"{id}\n" for id, is_listed in zip(ids, listed) if is_listed))

    print(f"{len(ids)} examples, {1 - right.mean():.1%} of the labels wrong")
    if right.all():
        print(f"nothing to rank; cleanlab's filter names {issues.sum()} examples: {run / 'cleanlab_issues.txt'}")
        return
    print("| ranking | AUROC | within class | precision of the lowest tenth |\n|---|---|---|---|")
    tenth = max(1, round(0.1 * len(ids)))
    for name, score in rankings.items():
        within, sizes = [], []
        for label in np.unique(given):
            rows = given == label
            if 0 < right[rows].sum() < rows.sum():
                within.append(roc_auc_score(right[rows], score[rows]))
                sizes.append(rows.sum())
        lowest = ~right[np.argsort(score, kind="stable")[:tenth]]
        cells = roc_auc_score(right, score), np.average(within, weights=sizes), lowest.mean()
        print(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    found = issues & ~right
    print(
        f"cleanlab's filter: {issues.sum()} examples, precision {found.sum() / max(1, issues.sum()):.3f}, "
        f"recall {found.sum() / max(1, (~right).sum()):.3f}; ids in {run / 'cleanlab_issues.txt'}"
    )


if __name__ == "__main__":
    main()
