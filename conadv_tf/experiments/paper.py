"""Numbers that the paper (arXiv 2106.00221) reports, for printing beside measured ones.

Accuracies are top-1 in percent, ResNet-50 on ImageNet, 90 epochs. Methods have the names of study.METHOD_ROWS.
"""

BATCHES = ("1k", "4k", "8k", "16k", "32k", "64k", "96k", "128k", "256k")
IMAGENET_TRAIN = 1_281_167

Values = dict[str, float]


def _by_batch(batches: tuple[str, ...], *values: float) -> Values:
    return dict(zip(batches, values, strict=True))


_TABLE = BATCHES[:7]
# Tables 1 and 2.
TOP1: dict[str, Values] = {
    "vanilla": _by_batch(_TABLE, 76.9, 76.9, 76.6, 76.6, 76.6, 75.3, 74.3),
    "aa": _by_batch(_TABLE, 77.5, 77.5, 77.4, 77.1, 76.9, 75.6, 74.3),
    "disadv": _by_batch(_TABLE, 77.4, 77.4, 77.4, 77.4, 77.3, 76.2, 75.3),
    "conadv": _by_batch(_TABLE, 77.4, 77.4, 77.4, 77.4, 77.3, 76.2, 75.3),
    "conadv_aa": _by_batch(_TABLE, 78.5, 78.5, 78.5, 78.5, 78.3, 77.3, 76.2),
}
# Figure 2: the tables, and two larger batches.
FIGURE2: dict[str, Values] = {
    "vanilla": {**TOP1["vanilla"], "128k": 73.2, "256k": 64.7},
    "aa": {**TOP1["aa"], "128k": 72.9, "256k": 62.5},
}
# Table 3: seconds of 90 epochs.
SECONDS: dict[str, Values] = {
    "vanilla": {"16k": 1194, "32k": 622},
    "disadv": {"16k": 1657, "32k": 1191, "64k": 592},
    "conadv": {"16k": 1277, "32k": 677, "64k": 227},
}
# Table 4: accuracy on clean training images; the test accuracies are those of Tables 1 and 2.
_GAP = BATCHES[3:7]
TRAIN_TOP1: dict[str, Values] = {
    "vanilla": _by_batch(_GAP, 81.4, 82.5, 79.6, 78.9),
    "conadv": _by_batch(_GAP, 80.3, 80.8, 78.2, 78.0),
    "conadv_aa": _by_batch(_GAP, 81.6, 81.7, 79.6, 78.4),
}
GAP: dict[str, Values] = {
    "vanilla": _by_batch(_GAP, 4.8, 5.9, 4.3, 4.6),
    "conadv": _by_batch(_GAP, 2.9, 3.5, 2.0, 2.7),
    "conadv_aa": _by_batch(_GAP, 3.1, 3.4, 2.3, 2.2),
}
# Table 5: by epsilon in pixel levels.
EPSILONS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12)
BY_EPSILON: dict[tuple[str, str], dict[float, float]] = {
    (method, batch): dict(zip(map(float, EPSILONS), values, strict=True))
    for method, batch, values in (
        ("conadv", "32k", (76.8, 77.2, 77.3, 77.4, 77.3, 77.3, 77.3, 77.3, 77.3, 77.3, 77.2, 77.2)),
        ("conadv_aa", "32k", (77.8, 78.0, 78.1, 78.1, 78.0, 78.3, 78.2, 78.2, 78.2, 78.2, 78.2, 78.1)),
        ("conadv", "64k", (75.7, 76.2, 76.3, 76.3, 76.4, 76.7, 76.4, 76.4, 76.4, 76.4, 76.4, 76.3)),
        ("conadv_aa", "64k", (76.8, 77.0, 76.8, 77.0, 77.1, 77.1, 77.2, 77.4, 77.2, 77.1, 77.1, 77.1)),
        ("conadv", "96k", (74.6, 75.1, 75.1, 75.1, 75.3, 75.1, 75.1, 75.1, 75.3, 75.2, 75.1, 75.1)),
        ("conadv_aa", "96k", (75.8, 75.9, 75.8, 76.0, 76.0, 76.0, 76.0, 76.1, 76.2, 76.2, 76.0, 76.0)),
    )
}
# Figure 4: images/ms in the text of section 4.2, by panel, images of a batch and method. ConAdv in (a): "about 1.5x" of
# DisAdv.
FIGURE4: dict[str, dict[int, Values]] = {
    "a": {4 * 1024: {"disadv": 10.3, "conadv": 1.5 * 10.3}, 32 * 1024: {"disadv": 81.7, "conadv": 1.5 * 81.7}},
    "b": {2 * 1024: {"vanilla": 75.7, "disadv": 36.1, "conadv": 71.3}},
}
