"""An update on a GPU, without one: TensorFlow's list of its kernels has one for every operation."""

import functools

import pytest
import tensorflow as tf
from helpers import fit, make_model, random_batches, some_of
from tensorflow.python.framework import kernels

from conadv_tf import methods
from conadv_tf.methods import Attack, Mixture
from conadv_tf.training import lars
from conadv_tf.training.replica_state import index_dtype

ROWS = 4
# What is no operation of a device, or belongs to the host that drives it.
ANYWHERE = {"Const", "NoOp", "PartitionedCall", "Placeholder", "StatefulPartitionedCall"}
METHODS = {
    "shadow": methods.conadv(Attack(8)),
    "paired": methods.conadv(Attack(8), schedule="paired"),
    "phased": methods.conadv(Attack(8), schedule="phased"),
    "lookahead, exchanged": methods.conadv(Attack(8), Mixture(shuffle=True), schedule="lookahead"),
    "noise": methods.noise(),
    "sam": methods.sam(),
}


@functools.cache
def gpu_kernels(op: str) -> list:
    found = kernels.get_registered_kernels_for_op(op).kernel
    return [kernel for kernel in found if kernel.device_type in ("GPU", "DEFAULT")]


def has_gpu_kernel(node) -> bool:
    def allowed(constraint) -> bool:
        value = node.attr[constraint.name]
        return set(value.list.type or [value.type]) <= set(constraint.allowed_values.list.type)

    return any(all(map(allowed, kernel.constraint)) for kernel in gpu_kernels(node.op))


def without_gpu_kernel(function) -> set[tuple]:
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
    assert len(nodes) > 20
    return {
        (node.op, *(tf.as_dtype(value.type).name for value in node.attr.values() if value.type))
        for node in nodes
        if node.op not in ANYWHERE and not has_gpu_kernel(node)
    }


@pytest.fixture(autouse=True)
def with_cuda():
    if not gpu_kernels("MatMul"):
        pytest.skip("this TensorFlow is built without kernels for GPUs")


@pytest.mark.parametrize("name", some_of(METHODS, "lookahead, exchanged", otherwise="long"))
def test_every_operation_of_an_update_has_one(name):
    model = make_model(METHODS[name], lars.LARS(0.1), microbatches=2, run_eagerly=True)
    images, labels = random_batches(4, ROWS)
    fit(model, images, labels, 1)  # makes what is carried
    update = tf.function(lambda data: model.train_step(data))
    specs = tuple(tf.TensorSpec(values.shape[1:], values.dtype) for values in (images, labels))
    assert without_gpu_kernel(update.get_concrete_function(specs)) == set()


def test_one_that_has_none_is_seen():
    """Variables of int32 have no such kernels: what a schedule carries is not held in them."""
    variable = tf.Variable(tf.zeros([4, 3], tf.int32))

    @tf.function
    def write(places):
        tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=places, updates=tf.ones([20, 3], tf.int32))
        return [tf.gather(places, place) for place in range(20)]

    found = without_gpu_kernel(write.get_concrete_function(tf.TensorSpec([20], tf.int32)))
    assert ("ResourceScatterUpdate", "int32", "int32") in found


def test_indices_count_as_many_elements_as_a_carry_may_have():
    """Its kernels for GPUs multiply an index by the size of a slot in the dtype of the index."""
    slot = 64 * 224 * 224 * 3
    assert index_dtype(tf.TensorShape([222, slot])) == tf.int32
    assert index_dtype(tf.TensorShape([223, slot])) == tf.int64
