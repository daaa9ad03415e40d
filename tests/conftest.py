"""Eight logical CPUs in every test process, so that replicas can be tested without an accelerator."""

import gc
import logging
import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # as conadv_tf does; here TensorFlow comes first
# Test processes share the machine with each other; more threads in each would only wait.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

# A suite in the background (`nohup make test &`) ignores SIGINT, and so would the programs that tests end with Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import gin
import pytest
import tensorflow as tf

LOGICAL_CPUS = 8

# TensorFlow counts the tracings of a function over all models of a process and warns of the fifth: what a test finds in
# the log would depend on the tests before it. That one model is traced once is held by tests/test_step.py.
logging.getLogger("tensorflow").addFilter(lambda record: "triggered tf.function retracing" not in record.getMessage())

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * LOGICAL_CPUS
)


@pytest.fixture(autouse=True)
def _no_state_between_tests():
    gin.clear_config()
    yield
    gin.clear_config()


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
    """A cache of compiled programs in the place of the user's; what tests of a module share is compiled once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def pytest_itemcollected(item):
    """Tests that share what a module makes once, such as a trained run, go to one process: else each would make it."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    if any(definitions[-1].scope == "module" for definitions in fixtures):
        item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish(session):
    """Spares Python's collector what stays: it would walk through all of TensorFlow again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def pytest_collection_modifyitems(config, items):
    """Leaves the tests marked long to `make test-all`, and those marked torture to `make torture`.

    A long one shows what only a whole run can; a torture is a further case of what others test already, or takes hours.
    """
    left_out = [mark for mark in ("long", "torture") if not os.environ.get(f"CONADV_{mark.upper()}")]
    left = [item for item in items if any(item.get_closest_marker(mark) for mark in left_out)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]
