"""Pages of TensorBoard beside the curves: charts that belong together, a table of runs, the run's settings.

    Custom Scalars   clean and adversarial images in one chart, training against test, the leak
    HParams          a row a run: HYPERPARAMETERS against test top-1
    Text             config.gin

Each is an event of its plugin, written to the default writer. TensorBoard merges equal pages of several runs.
"""

import textwrap
import time
from collections.abc import Mapping, Sequence

import tensorflow as tf
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalars
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams

# Columns of the table of runs and what they hold; the values are report.hyperparameters.
HYPERPARAMETERS: dict[str, type] = {
    "method": str,
    "schedule": str,
    "epsilon": float,
    "goal": str,
    "label": str,
    "rate": float,
    "batch": float,
    "seed": float,
}
# Tags that the table shows beside them, and their heads.
RESULTS = {"test/top1": "test top-1", "conadv/leak": "leak"}

# Charts by category, and the tags whose curves they show.
CHARTS: dict[str, dict[str, Sequence[str]]] = {
    "clean and adversarial": {
        "top-1": ("clean/top1", "augmented/top1", "adversarial/top1"),
        "loss": ("clean/loss", "augmented/loss", "adversarial/loss"),
        "leak: adversarial minus clean top-1": ("conadv/leak",),
    },
    "training and test": {
        "top-1": ("clean/top1", "test/top1"),
        "loss": ("clean/loss", "test/loss"),
    },
}

_TYPES = {str: api_pb2.DATA_TYPE_STRING, float: api_pb2.DATA_TYPE_FLOAT64}


def write(values: Mapping[str, str | float], config: str) -> None:
    """Writes all pages of a run that begins or goes on.

    Args:
      values: the run's HYPERPARAMETERS, without those that its method lacks.
      config: the operative configuration, as gin text.
    """
    layout = tf.constant(_layout().SerializeToString())
    metadata = custom_scalars.create_summary_metadata()
    tf.summary.write(custom_scalars.CONFIG_SUMMARY_TAG, layout, step=0, metadata=metadata)
    _write_table(hparams.EXPERIMENT_TAG, experiment=_experiment())
    _write_table(hparams.SESSION_START_INFO_TAG, session_start_info=_session(values))
    tf.summary.text("config", textwrap.indent(config, "    "), step=0)  # four spaces: a code block in Markdown


def write_end() -> None:
    """Writes into the table that the run has finished."""
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    _write_table(hparams.SESSION_END_INFO_TAG, session_end_info=end)


def _layout() -> layout_pb2.Layout:
    return layout_pb2.Layout(
        category=[
            layout_pb2.Category(title=title, chart=[_chart(name, tags) for name, tags in charts.items()])
            for title, charts in CHARTS.items()
        ]
    )


def _chart(title: str, tags: Sequence[str]) -> layout_pb2.Chart:
    # Each is a regular expression, matched from the beginning of a tag.
    lines = layout_pb2.MultilineChartContent(tag=[f"{tag}$" for tag in tags])
    return layout_pb2.Chart(title=title, multiline=lines)


def _experiment() -> api_pb2.Experiment:
    """The heads of the table, the same for every run."""
    return api_pb2.Experiment(
        hparam_infos=[api_pb2.HParamInfo(name=name, type=_TYPES[kind]) for name, kind in HYPERPARAMETERS.items()],
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=head) for tag, head in RESULTS.items()
        ],
    )


def _session(values: Mapping[str, str | float]) -> plugin_data_pb2.SessionStartInfo:
    """The row of a run, which has a row of its own also where another run has the same values."""
    session = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, value in values.items():
        if isinstance(value, str):
            session.hparams[name].string_value = value
        else:
            session.hparams[name].number_value = value
    return session


def _write_table(tag: str, **content) -> None:
    """Writes an event of the table, which is all metadata: `content` is the one field of HParamsPluginData."""
    metadata = hparams.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content))
    tf.summary.write(tag, tf.zeros([0]), step=0, metadata=metadata)
