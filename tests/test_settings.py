"""Settings that have moved are named in errors, kept config.gin stay readable, each source has settings of its own."""

import re
from pathlib import Path

import numpy as np
import pytest
from commands import call_command_line
from helpers import make_model

from conadv_tf import config, data, methods
from conadv_tf.data.record_files import BadRecords
from conadv_tf.data.sources import SOURCES
from conadv_tf.data.streaming import Stream
from conadv_tf.data.subset import Subset
from conadv_tf.errors import ConfigError
from conadv_tf.experiments.study import SCALES, Cell
from conadv_tf.methods import Attack, Mixture
from conadv_tf.models import resnet
from conadv_tf.run import kept_config
from conadv_tf.run.build import TrainSettings
from conadv_tf.run.divergence import DivergenceSettings
from conadv_tf.run.monitor import MonitorSettings
from conadv_tf.training.plan import make_plan

ROOT = Path(__file__).parents[1]
KEPT = sorted(ROOT.glob("results/**/config.gin"))
KEPT_ON = {scale: [path for path in KEPT if path.parts[-5] == scale][:1] for scale in ("digits", "cifar10")}
DATA = (*SOURCES, "data", "stream", "autoaugment", "subset")
# config.gin of an earlier version, streamed TFRecords; what the source does not read stands in it with its default.
STREAMED = """
data.augmentation = 'resized_crop_flip'
data.autoaugment = 'imagenet'
data.autoaugment_mode = 'concat3'
data.cache = 'memory'
data.image_size = 224
data.in_memory = False
data.label_offset = 1
data.max_bad_records = 10
data.name = 'imagenet'
data.num_classes = 1000
data.num_train = 1281167
data.service = None
data.shuffle_buffer = 16384
data.source = 'tfrecords'
data.test_files = ('validation-*', 'test-*')
data.test_split = None
data.tfds_name = None
data.train_files = 'train-*'
data.train_split = 'train'
train.epochs = 90
"""
NOW = {
    "autoaugment.mode": "'concat3'",
    "autoaugment.policy": "'imagenet'",
    "data.max_bad_records": "10",
    "data.source": "'tfrecords'",
    "stream.cache": "'memory'",
    "stream.service": "None",
    "stream.shuffle_buffer": "16384",
    "tfrecords.augmentation": "'resized_crop_flip'",
    "tfrecords.image_feature": "'image/encoded'",
    "tfrecords.image_size": "224",
    "tfrecords.in_memory": "False",
    "tfrecords.label_feature": "'image/class/label'",
    "tfrecords.label_offset": "1",
    "tfrecords.name": "'imagenet'",
    "tfrecords.num_classes": "1000",
    "tfrecords.num_train": "1281167",
    "tfrecords.test_files": "('validation-*', 'test-*')",
    "tfrecords.train_files": "'train-*'",
    "train.epochs": "90",
}


def destinations(name: str) -> list[str]:
    """Where a setting that has moved is now, by the configurables there are."""
    places = {config.MOVED[name].format(source=source) for source in SOURCES}
    return [place for place in places if knows(place)]


def knows(name: str) -> bool:
    try:
        config.configure([], [f"{name} = None"])
    except ConfigError as error:
        return "must be" in str(error)  # a name that is right, of another type
    return True


@pytest.mark.parametrize("name", config.MOVED)
def test_a_setting_that_has_moved_is_named_with_its_new_name(name, tmp_path):
    expected = destinations(name)
    assert expected
    recipe = tmp_path / "old.gin"
    recipe.write_text(f"{name} = 1\n")
    for files, params, place in (([str(recipe)], [], "old.gin"), ([], [f"{name}=1"], f"--gin_param='{name}=1'")):
        with pytest.raises(ConfigError) as caught:
            config.configure(files, params)
        [line] = str(caught.value).splitlines()
        assert place in line
        assert f"{name} is now " in line
        assert all(new in line for new in expected)


def test_the_error_says_with_which_source(capsys):
    with pytest.raises(SystemExit) as ended:
        call_command_line("--gin_param=data.label_offset=1")
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: --gin_param='data.label_offset=1': data.label_offset is now tfrecords.label_offset, with "
        "data.source='tfrecords'; none for digits, tfds, synthetic: write that\n"
    )


def test_no_recipe_has_a_setting_that_has_moved():
    for path in Path(config.recipe_folder()).rglob("*.gin"):
        assert not [name for name in config.MOVED if f"{name} " in path.read_text()], path


def test_a_kept_configuration_is_read_under_the_names_of_now():
    assert kept_config.kept_settings(STREAMED) == NOW
    again = "\n".join(f"{name} = {value}" for name, value in NOW.items())
    assert kept_config.kept_settings(again) == NOW
    assert kept_config.difference(STREAMED, again) is None
    assert kept_config.difference(STREAMED, again.replace("label_offset = 1", "label_offset = 0")) == (
        "tfrecords.label_offset",
        "1",
        "0",
    )
    assert kept_config.difference(STREAMED, again.replace("cache = 'memory'", "cache = 'none'")) is None


def test_a_label_that_was_left_to_the_schedule_keeps_its_meaning():
    """attack.label=None was "smoothed" for the untargeted attack of "paired" and "phased", else "hard"."""
    text = "attack.label = {}\nattack.goal = {}\nconadv.schedule = {}\ntrain.method = 'conadv'\n"
    old = text.replace("{}", "None", 1).format
    for schedule in ("'paired'", "'phased'"):
        kept, now = old("'untargeted'", schedule), text.format("'smoothed'", "'untargeted'", schedule)
        assert kept_config.difference(kept, now) is None
        automatic = text.format("'auto'", "'untargeted'", schedule)
        assert kept_config.difference(kept, automatic) == ("attack.label", "'smoothed'", "'auto'")
        assert kept_config.contradiction(kept, {"attack.label": "smoothed"}) is None
        assert kept_config.contradiction(kept, {"attack.label": "predicted"}) is not None
    for goal, schedule in (("'untargeted'", "'shadow'"), ("'random_target'", "'paired'")):
        assert kept_config.difference(old(goal, schedule), text.format("'auto'", goal, schedule)) is None


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        ("digits", {"augmentation"}),
        ("synthetic", {"augmentation", "name", "num_classes", "image_size", "num_train"}),
        ("tfds", set(NOW)),
    ],
)
def test_settings_that_the_kept_source_does_not_have_are_left_out(source, kept):
    text = STREAMED.replace("'tfrecords'", f"'{source}'").replace("tfds_name = None", "tfds_name = 'mnist'")
    found = kept_config.kept_settings(text)
    own = {name for name in found if name.startswith(f"{source}.")}
    if source == "tfds":
        assert found["tfds.dataset"] == "'mnist'"
        assert {"tfds.train_split", "tfds.test_split", "stream.cache"} <= found.keys()
        assert not {"tfds.label_offset", "tfds.train_files"} & found.keys()
    else:
        assert own == {f"{source}.{name}" for name in kept}
        assert not [name for name in found if name.startswith(("stream.", "tfrecords.", "tfds."))]
    config.configure([], [f"{name} = {value}" for name, value in found.items() if name != "autoaugment.mode"])


def test_images_in_memory_were_not_streamed():
    found = kept_config.kept_settings(STREAMED.replace("in_memory = False", "in_memory = True"))
    assert not [name for name in found if name.startswith("stream.")]


def test_a_kept_source_may_be_a_macro():
    text = STREAMED.replace("data.source = 'tfrecords'", "SOURCE = 'tfrecords'\ndata.source = %SOURCE")
    assert kept_config.kept_settings(text) == {**NOW, "SOURCE": "'tfrecords'", "data.source": "%SOURCE"}


NAME = re.compile(r"(?P<row>.+)_lr(?P<rate>[\d.]+)(_e(?P<epsilon>[\d.]+))?(_tau(?P<tau>\d+))?_s(?P<seed>\d+)")


def cell_of(path: Path) -> Cell:
    """The recipe and settings of a run in results/, by its folder's name."""
    scale, _, batch, name, _ = path.parts[-5:]
    found = NAME.fullmatch(name)
    epsilon = found["epsilon"] and float(found["epsilon"])
    return Cell(scale, batch, found["row"], int(found["seed"]), float(found["rate"]), epsilon, int(found["tau"] or 1))


@pytest.mark.long
def test_every_kept_run_is_the_run_of_its_recipe():
    assert len(KEPT) > 300
    for path in KEPT:
        cell = cell_of(path)
        assert f"{path.parts[-3]}/{path.parts[-2]}" == cell.name
        assert cell.scale in SCALES
        config.configure(cell.gin_files(), cell.gin_params())
        text = path.read_text()
        assert kept_config.contradiction(text, config.bindings(cell.gin_files(), cell.gin_params())) is None, path
        kept = kept_config.kept_settings(text)
        assert not config.MOVED.keys() & kept.keys(), path
        assert kept_config.difference(text, "\n".join(f"{name} = {value}" for name, value in kept.items())) is None
        config.configure([], [f"{name} = {value}" for name, value in kept.items()])


def of_data(settings: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in settings.items() if name.split(".")[0] in DATA}


def test_a_kept_run_on_digits_goes_on_with_its_recipe():
    """Every setting that loading the data writes stands in a config.gin of an earlier version, with its value."""
    [path] = KEPT_ON["digits"]
    cell = cell_of(path)
    config.configure(cell.gin_files(), cell.gin_params())
    data.load()
    assert of_data(kept_config.kept_settings(path.read_text())) == of_data(
        config.parse_settings(config.operative_config())
    )


def test_a_kept_run_on_files_has_all_settings_of_its_source():
    [path] = KEPT_ON["cifar10"]
    kept = kept_config.kept_settings(path.read_text())
    assert {name for name in kept if name.startswith("tfrecords.")} == {
        f"tfrecords.{name}" for name in config.parameters("tfrecords")
    }
    assert of_data(kept).keys() == {
        *(f"{name}.{parameter}" for name in ("data", "autoaugment", "subset") for parameter in config.parameters(name)),
        *(f"tfrecords.{parameter}" for parameter in config.parameters("tfrecords")),
    }


@pytest.mark.parametrize("source", SOURCES)
def test_an_unknown_setting_is_named_with_those_of_the_source(source):
    folder = "/" if SOURCES[source].needs_data_dir else None
    with pytest.raises(ConfigError) as caught:
        data.load(source, data_dir=folder, colour="red")
    [line] = str(caught.value).splitlines()
    assert line.startswith(f"colour='red' is no setting of data.source={source!r}: choose from ")
    assert "augmentation, " in line
    assert ("train_files" in line, "dataset" in line) == (source == "tfrecords", source == "tfds")
    assert ("shuffle_buffer" in line) == SOURCES[source].reads_files


@pytest.mark.parametrize(
    ("recipe", "params", "remedy"),
    [
        ("digits_conadv.gin", ["tfrecords.label_offset=1"], "set data.source='tfrecords'"),
        ("digits_conadv.gin", [" stream.cache = 'memory'"], "stream files, with in_memory=False"),
        ("cifar10_conadv.gin", ["data.source='digits'", "tfrecords.image_size=32"], "set data.source='tfrecords'"),
        ("digits_conadv.gin", ["sgd.momentum=0.5"], "choose what uses it"),
    ],
)
def test_a_flag_that_the_run_does_not_use_is_refused(recipe, params, remedy, capsys):
    sizes = ["train.global_batch_size=110", "train.microbatch_size=110", "model.name='digits_resnet'"]
    with pytest.raises(SystemExit) as ended:
        call_command_line(f"--gin_file={recipe}", *(f"--gin_param={param}" for param in (*sizes, *params)))
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    name = params[-1].split("=")[0].strip()
    assert line == (f"error: --gin_param={params[-1]!r} sets {name}, which this run does not use: drop it, or {remedy}")


def test_settings_of_a_source_that_a_later_file_replaces_are_no_news(capsys):
    """The recipe's CIFAR-10 files are replaced by digits; what else lies idle is said."""
    sizes = ["train.global_batch_size=110", "train.microbatch_size=110"]
    files = ["--gin_file=cifar10_conadv.gin", "--gin_file=data/digits.gin", "--gin_file=method/vanilla.gin"]
    call_command_line(*files, *(f"--gin_param={size}" for size in sizes), "--preflight")
    [line] = [line for line in capsys.readouterr().out.splitlines() if "not used" in line]
    assert line == "  not used by this run: conadv.schedule, conadv.tau, attack.epsilon_pixels, attack.label"


def test_without_files_their_settings_count_as_used():
    params = ["tfrecords.image_size=32", "stream.cache='memory'", "tfrecords.train_files='photos-*'"]
    config.configure_without_files(["96k_conadv.gin"], params)
    loaded = data.load()
    assert (loaded.name, loaded.num_train, loaded.num_classes) == ("imagenet", 1_281_167, 1000)
    assert loaded.image_shape == (32, 32, 3)
    unused = config.bindings_without_effect()
    assert not [name for name in unused if name.split(".")[0] in (*SOURCES, "stream", "data", "autoaugment")]


def test_without_files_what_the_files_would_not_use_is_unused():
    config.configure_without_files(["cifar10_conadv.gin"], ["stream.cache='memory'", "tfds.name='other'"])
    data.load()
    assert {"stream.cache", "tfds.name"} <= set(config.bindings_without_effect())


def test_without_files_the_images_must_be_counted():
    with pytest.raises(ConfigError, match=r"cannot count the images: set tfds.num_train"):
        config.configure_without_files(["cifar10_conadv.gin", "data/tfds.gin"], [])


def test_arguments_go_over_gin():
    config.configure(["data/synthetic.gin"], ["synthetic.image_size=16", "synthetic.num_classes=7"])
    loaded = data.load(image_size=8)
    assert (loaded.image_shape, loaded.num_classes) == ((8, 8, 3), 7)


WHOLE = {
    "attack.steps": lambda value: Attack(steps=value).steps,
    "adversarial.start_epoch": lambda value: Mixture(start_epoch=value).start_epoch,
    "conadv.tau": lambda value: methods.conadv(tau=value).tau,
    "model.width": lambda value: resnet.ARCHITECTURES["digits_resnet"].widened(value).widths[0] // 16,
    "microbatches": lambda value: make_model(methods.vanilla(), microbatches=value, branches=("main",)).microbatches,
    "train.microbatch_size": lambda value: make_plan(4, value, 1, 8, 1).rows,
    "train.epochs": lambda value: make_plan(4, 4, 1, 8, value).epochs,
    "train.checkpoint_every_epochs": lambda value: TrainSettings(checkpoint_every_epochs=value).checkpoint_every_epochs,
    "subset.train_images": lambda value: Subset(value).train_images,
    "subset.downscale": lambda value: Subset(downscale=value).downscale,
    "stream.shuffle_buffer": lambda value: Stream(value).shuffle_buffer,
    "data.max_bad_records": lambda value: BadRecords(value).limit,
    "monitor.images": lambda value: MonitorSettings(images=value).images,
    "divergence.retries": lambda value: DivergenceSettings(value).retries,
}


@pytest.mark.parametrize("setting", WHOLE)
def test_a_whole_number_is_one_of_any_kind_but_no_truth(setting):
    """Seen to fail: numbers of NumPy's were refused, and True and 2.5 were let through, each in some places."""
    number = WHOLE[setting](np.int64(2))
    assert (number, type(number)) == (2, int)
    for value in (True, np.True_, 2.5, -1, "2"):
        said = f"^{setting}={re.escape(repr(value))} must be a whole number of at least"
        with pytest.raises(ConfigError, match=said):
            WHOLE[setting](value)
