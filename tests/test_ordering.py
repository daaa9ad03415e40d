"""Reading a variable comes before overwriting it, also in the program that TensorFlow's graph optimizer makes.

The attack reads γ and β that the update of the clean half overwrites, and no data flow from the one to the other
orders them: only the control edge from read to write does. An optimizer pass that loses it leaves a race, which shows
as rare steps with another x̂ on a busy machine. Here the optimized programs themselves are inspected.
"""

import os
import pathlib
import subprocess
import sys
from collections import defaultdict

import pytest
from google.protobuf import text_format
from helpers import some_of
from tensorflow.core.framework import graph_pb2

WRITES = ("AssignVariableOp", "AssignSubVariableOp", "AssignAddVariableOp")
PASSED_ON = ("Identity", "Enter", "Switch", "Merge")
SETTINGS = ["disadv 1 1", "conadv 2 1", "disadv 1 2"]  # method, micro-batches, replicas
STEP = """
import sys
from helpers import fit, make_model, mirrored, random_batches
from conadv_tf import methods
method, microbatches, replicas = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = make_model(methods.make_method(method), microbatches=microbatches, strategy=mirrored(replicas))
images, labels = random_batches(microbatches, 4 * replicas)
fit(model, images, labels, 1)
"""


@pytest.mark.long
@pytest.mark.parametrize("setting", some_of(SETTINGS, "disadv 1 2"))
def test_the_optimized_program_keeps_every_reading_before_the_writing(tmp_path, setting):
    names = setting.split()
    environment = {**os.environ, "TF_CPP_VMODULE": "meta_optimizer=4", "TF_DUMP_GRAPH_PREFIX": str(tmp_path)}
    folder = pathlib.Path(__file__).parent
    command = [sys.executable, "-c", f"import conftest\n{STEP}", *names]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    checked, unordered = 0, []
    for path in tmp_path.glob("after_MetaOptimizer_*.pbtxt"):
        if "_iteration_" not in path.name:
            graph = text_format.Parse(path.read_text(), graph_pb2.GraphDef())
            for nodes in (graph.node, *(function.node_def for function in graph.library.function)):
                pairs = reads_and_writes({node.name: node for node in nodes})
                checked += len(pairs)
                unordered += [(read, write) for read, write, ordered in pairs if not ordered]
    assert checked > 100
    assert not unordered


def reads_and_writes(nodes: dict) -> list[tuple[str, str, bool]]:
    """(read, write, whether one of them waits for the other) for each pair on one variable."""
    reads, pairs = defaultdict(list), []
    for node in nodes.values():
        if node.op == "ReadVariableOp":
            reads[variable(nodes, node.input[0])].append(node.name)
    before = {node.name: ancestors(nodes, node.name) for node in nodes.values() if node.op in WRITES}
    for write, earlier in before.items():
        for read in reads[variable(nodes, nodes[write].input[0])]:
            pairs.append((read, write, read in earlier or write in ancestors(nodes, read)))
    return pairs


def variable(nodes: dict, source: str) -> str:
    name = node_name(source)
    while name in nodes and nodes[name].op in PASSED_ON:
        name = node_name(nodes[name].input[0])
    return name


def ancestors(nodes: dict, name: str) -> set[str]:
    """What surely ran before: of a loop around it this iteration alone, of a loop that it waits for all of them."""
    found: set[tuple[str, int]] = set()
    open_ends = [(source, 0) for source in nodes[name].input]
    while open_ends:
        source, loops_behind = open_ends.pop()
        end = (node_name(source), loops_behind)
        if end[0] not in nodes or end in found:
            continue
        node = nodes[end[0]]
        if node.op == "NextIteration" and loops_behind < 1:
            continue
        found.add(end)
        loops_behind += (node.op == "Exit") - (node.op == "Enter")
        open_ends += [(source, loops_behind) for source in node.input]
    return {name for name, _ in found}


def node_name(source: str) -> str:
    return source.lstrip("^").split(":")[0]
