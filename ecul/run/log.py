"""What the log says of an epoch: counts, label-free scores, monitors, and one line of text."""

import numpy as np
import torch

from ecul import MODALITIES
from ecul.run.scores import adjusted_rand, mutual_rate, separation

LEGEND = (
    "clusters and outliers: visible/infrared, then of both together; score: separation of the clusters, "
    "without identities; loss: the sum of the stage's terms, of which stage 2 has more"
)
PARTS = ("extract", "labels", "train")  # of an epoch's seconds


def label_scores(features, labels, previous):
    """Scores of the weights that an epoch starts from, without identities; each is higher for better.

    stability: adjusted Rand index with the previous epoch's labels; separation: simplified silhouette, mean
    of the modalities; mutual: share of mutual nearest neighbours across modalities. `score` is the one that
    `keep="score"` selects by: separation, which follows test mAP in scripts/ablation.
    """
    pairs = [(labels.own[m].cpu(), previous[m].cpu()) for m in MODALITIES] if previous else []
    stability = float(np.mean([adjusted_rand(a, b) for a, b in pairs])) if pairs else float("nan")
    separations = [separation(features[m], labels.own[m]) for m in MODALITIES]
    mutual = mutual_rate(*(features[m] for m in MODALITIES))
    row = {"score_separation": float(np.mean(separations)), "score_mutual": mutual}
    row["score"] = row["score_separation"]
    return row if np.isnan(stability) else {"score_stability": stability, **row}


def monitors(labels, piles):
    """Adjusted Rand index of the labels with the identities, where they are known: for the reader alone."""
    if any(piles[m].identities is None for m in MODALITIES):
        return {}
    row = {f"monitor_ari_{m}": adjusted_rand(labels.own[m].cpu(), piles[m].identities) for m in MODALITIES}
    if labels.joint is not None:
        joint = torch.cat([labels.joint[m] for m in MODALITIES]).cpu()
        row["monitor_ari_joint"] = adjusted_rand(
            joint, np.concatenate([piles[m].identities for m in MODALITIES])
        )
    return {k: v for k, v in row.items() if not np.isnan(v)}


def describe(row):
    """One line of text for one epoch."""
    clusters, outliers = (_joined(row, kind, "d") for kind in ("clusters_", "outliers_"))
    text = f"epoch {row['epoch'] + 1:3d} stage {row['stage']} clusters {clusters} outliers {outliers}"
    text += f" score {row['score']:.3f}"
    losses = [v for k, v in row.items() if k.startswith("loss_")]
    if losses:
        shares = "/".join(f"{100 * row[f'seconds_{part}'] / row['seconds']:.0f}" for part in PARTS)
        text += f" loss {sum(losses):.3f} {row['seconds']:.1f} s ({'/'.join(PARTS)} {shares} %)"
        text += f" {row['images_per_second']:.0f} images/s"
    monitored = _joined(row, "monitor_", ".2f")
    return text + (f" (monitor: ARI {monitored})" if monitored else "")


def _joined(row, kind, form):
    return "/".join(format(v, form) for k, v in row.items() if k.startswith(kind))
