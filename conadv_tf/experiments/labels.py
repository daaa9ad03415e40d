"""Labels of ConAdv's schedules in tables and figures; study.METHOD_ROWS has those of the methods."""

# Rows of Table 3's estimates, by the beginning of a method's name in preflight.json.
TABLE3_ESTIMATES = {
    "vanilla": "ResNet",
    "disadv": "+ DisAdv",
    "conadv, shadow": "+ ConAdv, shadow",
    "conadv, paired": "+ ConAdv, paired",
    "conadv, phased": "+ ConAdv, phased",
}
# Curves of Figure 4, by the kind of a method (methods.Method.kind).
FIGURE4 = {
    "vanilla": "vanilla",
    "disadv": "DisAdv",
    "shadow": "ConAdv, shadow",
    "paired": "ConAdv, paired",
    "phased": "ConAdv, phased (twice the cores)",
}
