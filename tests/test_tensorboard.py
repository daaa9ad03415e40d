"""The pages of TensorBoard, read back from event files by TensorBoard's own classes."""

import json
from pathlib import Path

import pytest
import tensorflow as tf
import tf_keras
from tensorboard import context as request_context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups
from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin
from tensorboard.plugins.text.text_plugin import TextPlugin

from conadv_tf import ConAdvModel, config, methods, split
from conadv_tf.run import report, tensorboard, tensorboard_pages
from conadv_tf.run.build import Run, build
from conadv_tf.run.folder import RunFolder

REQUEST = request_context.RequestContext()
SETTINGS = {
    "vanilla": ["train.method='vanilla'", "train.seed=1"],
    "paired": ["conadv.schedule='paired'", "attack.epsilon_pixels=4", "learning_rate.peak_learning_rate=2.5"],
}
TOP1 = {"vanilla": 0.75, "paired": 0.5}


def built(name: str) -> Run:
    config.configure([config.DEFAULT_RECIPE], SETTINGS[name])
    return build("digits_conadv", tf.distribute.get_strategy(), None)


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    """The event files of two runs, the first finished, each begun twice as after a preemption, with a few scalars."""
    logs = tmp_path_factory.mktemp("logs")
    for name, top1 in TOP1.items():
        run = built(name)
        folder = RunFolder(str(logs / name))
        folder.make()
        folder.write_config(config.operative_config())
        for _ in range(2):
            callback = tensorboard.TensorBoard(folder, run.plan, None, report.hyperparameters(run))
            callback.set_model(run.model)
        epoch = {tag: 0.0 for tag in callback.GROUPS if name == "paired" or not tag.startswith(("adv", "aug", "leak"))}
        callback.on_epoch_end(0, {**epoch, "val_top1": top1})
        if name == "vanilla":
            callback.on_train_end()
    return logs


def test_noise_has_neither_goal_nor_label():
    config.configure([config.DEFAULT_RECIPE], ["train.method='noise'", "attack.epsilon_pixels=4"])
    values = report.hyperparameters(build("digits", tf.distribute.get_strategy(), None))
    assert (values["method"], values["epsilon"]) == ("noise", 4.0)
    assert not {"goal", "label"} & values.keys()


def test_a_network_without_batch_norm_has_its_curves(tmp_path):
    image = tf_keras.Input((8, 8, 1))
    logits = tf_keras.layers.Dense(10)(tf_keras.layers.Flatten()(image))
    model = ConAdvModel(split(tf_keras.Model(image, logits), ("main",)), methods.vanilla())
    run, folder = built("vanilla"), RunFolder(str(tmp_path))
    callback = tensorboard.TensorBoard(folder, run.plan, None, report.hyperparameters(run))
    callback.set_model(model)
    callback.on_epoch_end(0, {"loss": 2.5})
    [events] = (tmp_path / "tensorboard").glob("events*")
    written = [value.tag for event in tf.compat.v1.train.summary_iterator(str(events)) for value in event.summary.value]
    assert "train/loss" in written


@pytest.fixture(scope="module")
def shown(logs) -> base_plugin.TBContext:
    """What TensorBoard knows of these files."""
    found = plugin_event_multiplexer.EventMultiplexer(size_guidance={"tensors": 0})
    found.AddRunsFromDirectory(str(logs))
    found.Reload()
    provider = data_provider.MultiplexerDataProvider(found, str(logs))
    context = base_plugin.TBContext(data_provider=provider, logdir=str(logs), plugin_name_to_instance={})
    context.plugin_name_to_instance["scalars"] = ScalarsPlugin(context)
    return context


def test_clean_and_adversarial_are_in_one_chart(shown):
    plugin = CustomScalarsPlugin(shown)
    layout = json.loads(plugin.layout_impl(REQUEST, "all"))
    charts = {
        (category["title"], chart["title"]): chart["multiline"]["tag"]
        for category in layout["category"]
        for chart in category["chart"]
    }
    assert len(charts) == sum(len(category["chart"]) for category in layout["category"]) == 5
    drawn = {
        place: {
            tag
            for pattern in patterns
            for tag in plugin.scalars_impl(REQUEST, "paired/tensorboard", pattern, "all")["tag_to_events"]
        }
        for place, patterns in charts.items()
    }
    for curve in ("loss", "top1"):
        name = {"top1": "top-1"}.get(curve, curve)
        both = {f"clean/{curve}", f"adversarial/{curve}"}
        assert drawn["clean and adversarial", name] == both | {f"augmented/{curve}"}
        assert drawn["training and test", name] == {f"clean/{curve}", f"test/{curve}"}
    assert drawn["clean and adversarial", "leak: adversarial minus clean top-1"] == {"conadv/leak"}


def test_the_table_of_runs_has_their_settings_beside_test_top1(shown):
    context = backend_context.Context(shown)
    heads = get_experiment.Handler(REQUEST, context, "all", api_pb2.GetExperimentRequest()).run()
    assert {info.name for info in heads.hparam_infos} == set(tensorboard_pages.HYPERPARAMETERS)
    assert [info.name.tag for info in heads.metric_infos] == ["test/top1", "conadv/leak"]
    asked = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING, api_pb2.STATUS_UNKNOWN],
        slice_size=10,
        include_metrics=True,
    )
    groups = list_session_groups.Handler(REQUEST, context, "all", asked).run().session_groups
    rows = {group.sessions[0].name.split("/")[0]: group for group in groups}
    assert len(groups) == len(rows) == 2
    values = {
        name: {key: value.string_value or value.number_value for key, value in group.hparams.items()}
        for name, group in rows.items()
    }
    assert values["vanilla"] == {"method": "vanilla", "rate": 10.0, "batch": 110.0, "seed": 1.0}
    assert values["paired"] == {
        "method": "conadv",
        "schedule": "paired",
        "epsilon": 4.0,
        "goal": "untargeted",
        "label": "predicted",
        "rate": 2.5,
        "batch": 110.0,
        "seed": 0.0,
    }
    for name, group in rows.items():
        top1 = {metric.name.tag: metric.value for metric in group.metric_values}["test/top1"]
        assert top1 == pytest.approx(TOP1[name])
    status = {name: group.sessions[0].status for name, group in rows.items()}
    assert status["vanilla"] == api_pb2.STATUS_SUCCESS != status["paired"]


def test_the_configuration_is_a_page_of_text(shown, logs):
    (event, *_) = TextPlugin(shown).text_impl(REQUEST, "paired/tensorboard", "config", "all", enable_markdown=True)
    kept = (logs / "paired" / "config.gin").read_text()
    assert "conadv.schedule = 'paired'" in kept
    written = event["text"]
    assert written.startswith("<pre><code>")
    assert written.replace("&#39;", "'").split("<code>")[1].split("</code>")[0].strip() == kept.strip()
