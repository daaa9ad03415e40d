"""An update of a model lowered to XLA programs, with what they read and write by name; see step_program.py."""

import dataclasses
import json
import os
import re
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from conadv_tf.errors import ConfigError, RunError
from conadv_tf.models import xla
from conadv_tf.models.network import Network
from conadv_tf.preflight.hlo_text import without_copies
from conadv_tf.run import report
from conadv_tf.run.build import Run
from conadv_tf.training import metrics
from conadv_tf.training.trainer import ConAdvModel

FORMAT = 1
Values = dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Program:
    """One program, and how to call it.

    Attributes:
      text: StableHLO; its arguments are `data`, then the variables of `reads`; its results `returns`, then the new
        values of the variables of `assigns`.
      data: by name, what a caller feeds.
      returns: names of the values it returns, float32 scalars.
      reads, assigns: names of variables.
      constants: tensors that it reads like variables, by name.
    """

    text: str
    data: dict[str, tf.TensorSpec]
    returns: list[str]
    reads: list[str]
    assigns: list[str]
    constants: dict[str, np.ndarray]


def named_variables(model: ConAdvModel) -> dict[str, tf.Variable]:
    """The variables that an update reads or assigns, by names such as network/…, shadow0/…, optimizer/…, carry/…."""
    networks = {"network": model.network, **{f"shadow{i}": shadow for i, shadow in enumerate(model.shadows)}}
    groups = {
        # Where the rate is a number and no schedule, it is a variable, which Keras does not list.
        "optimizer": [*model.optimizer.variables(), *_hyperparameters(model.optimizer)],
        "metric": model.metrics[0].variables,
    }
    named = {f"{part}/{path}": v for part, network in networks.items() for path, v in network.named_variables().items()}
    for group, variables in groups.items():
        for variable in variables:
            named[f"{group}/{_short_name(variable)}"] = variable
    return named | {f"carry/{name}": variable for name, variable in model.carry.variables.items()}


def _short_name(variable: tf.Variable) -> str:
    """The name of a variable of an optimizer or a metric without the network's, which a slot's begins with.

    Of "network/stem/conv/kernel/momentum:0" it is "stem/conv/kernel/momentum", of "iter:0" it is "iter".
    """
    return variable.name.split(":")[0].split("/", 1)[-1]


def _hyperparameters(optimizer) -> list[tf.Variable]:
    return [value for value in optimizer._hyper.values() if isinstance(value, tf.Variable)]


def _programs(model: ConAdvModel, images: tf.TensorSpec) -> dict[str, Program]:
    rows = images.shape[0]
    batch = {
        "images": tf.TensorSpec((model.microbatches, *images.shape), images.dtype),
        "labels": tf.TensorSpec((model.microbatches, rows), tf.int32),
    }
    evaluated = {
        "images": tf.TensorSpec((rows, *model.network.image_shape), tf.uint8),
        "labels": tf.TensorSpec((rows,), tf.int32),
        "weights": tf.TensorSpec((rows,), tf.float32),
    }
    lowered = {
        "update": _lower(model, "update", _update, batch),
        "evaluate": _lower(model, "evaluate", _evaluate, evaluated),
    }
    if model.method.batches_ahead:
        lowered["begin"] = _lower(model, "begin", _begin, batch)
    return lowered


def export(model: ConAdvModel, images: tf.TensorSpec, folder: str, facts: dict) -> None:
    """Writes the programs and the initial values of a model of one replica to a folder; see the module.

    Args:
      model: compiled, built outside of any strategy; a carry begins empty, as at the start of a run.
      images: uint8 [rows, H, W, C] (or [rows, 2, H, W, C]) of a micro-batch.
      folder: made where there is none.
      facts: what else program.json should say; xla_step.py wants "recipe", "epochs", "steps_per_epoch", "seed",
        "augmentation" and "num_classes".

    Raises:
      ConfigError: for a method whose adversarial half begins later than the run, which would be two programs.
      RunError: if TensorFlow lowers a program to something else than is known here, or the folder cannot be written.
    """
    if model.method.start_epoch:
        raise ConfigError(
            f"adversarial.start_epoch={model.method.start_epoch} changes the program during the run: "
            "export it with adversarial.start_epoch=0"
        )
    model.create_optimizer_variables()
    own_carry = model.carry
    try:
        model.create_carry(images)
        found = _programs(model, images)
        values = {name: variable.numpy() for name, variable in named_variables(model).items()}
    finally:
        model.carry = own_carry  # of a run in progress, or none: fit then begins its own
    for program in found.values():
        values |= program.constants
    description = {
        "format": FORMAT,
        **facts,
        "microbatches": model.microbatches,
        "rows": images.shape[0],
        "updates_per_batch": model.method.updates_per_batch,
        "programs": {name: _describe(name, program) for name, program in found.items()},
    }
    try:
        os.makedirs(folder, exist_ok=True)
        for name, program in found.items():
            _write(os.path.join(folder, f"{name}.mlir"), program.text)
        np.savez(os.path.join(folder, "initial.npz"), **values)
        _write(os.path.join(folder, "program.json"), json.dumps(description, indent=1))
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror}): choose another folder") from error


def load_weights(network: Network, path: str) -> None:
    """Loads the weights and moving statistics that xla_step.py wrote, or initial.npz, into a network.

    Raises:
      RunError: if the file lacks one of the network's variables, or has it in another shape; nothing is loaded then.
    """
    own = {f"network/{path}": variable for path, variable in network.named_variables().items()}
    with np.load(path) as saved:
        for name, variable in own.items():
            shape = saved[name].shape if name in saved else None
            if shape != tuple(variable.shape):
                raise RunError(
                    f"{path} has {name} of shape {shape}, the network of shape {tuple(variable.shape)}: "
                    "build the network that was exported"
                )
        for name, variable in own.items():
            variable.assign(saved[name])


def _update(model: ConAdvModel, images: tf.Tensor, labels: tf.Tensor) -> Values:
    """One update from a batch of micro-batches; logs are means since the metric was reset."""
    if model.microbatches == 1:
        model.train_step((images[0], labels[0]))
        return model.train_logs()
    update = model.update_by(model.method)

    def add(index, *sums):
        shares = update.contribute((images[index], labels[index]), index)
        return index + 1, *(total + value for total, value in zip(sums, shares, strict=True))

    zeros = [tf.zeros(shape) for shape in update.contribution_shapes]
    _, *sums = tf.while_loop(lambda index, *_: index < model.microbatches, add, (0, *zeros), parallel_iterations=1)
    update.apply(sums)
    return model.train_logs()


def _evaluate(model: ConAdvModel, images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor) -> Values:
    """The weighted sums over the rows of a batch: loss, top1, images."""
    logits = model.network(images, training=False)
    losses = model.example_losses(labels, logits)
    return {
        "loss": tf.reduce_sum(weights * losses),
        "top1": tf.reduce_sum(weights * metrics.top(1, labels, logits)),
        "images": tf.reduce_sum(weights),
    }


def _begin(model: ConAdvModel, images: tf.Tensor, labels: tf.Tensor) -> Values:
    """The carry into the update whose batch this is."""
    for index in range(model.microbatches):
        model.update_by(model.method).begin((images[index], labels[index]), tf.constant(index))
    return {}


def _lower(model: ConAdvModel, name: str, function: Callable[..., Values], data: dict[str, tf.TensorSpec]) -> Program:
    compiled = tf.function(lambda *values: function(model, *values), jit_compile=True, autograph=False)
    specs = list(data.values())
    with xla.compiling(True):
        concrete = compiled.get_concrete_function(*specs)
        text = compiled.experimental_get_compiler_ir(*specs)(stage="stablehlo")
    reads, constants = _captures(model, name, concrete.captured_inputs)
    returns = sorted(concrete.structured_outputs)
    # Arguments are the function's and what it captures; results the function's and the new value of each variable it
    # assigns, of which XLA notes the argument whose memory it may take.
    replaced = re.findall(r"parameter_number = (\d+) : i64}, output_index = array<i64: (\d+)>", text)
    by_result = {int(result) - len(returns): int(argument) - len(data) for argument, result in replaced}
    sizes = len(data) + len(reads), len(returns) + len(by_result)
    if sorted(by_result) != list(range(len(by_result))) or _signature(text) != sizes:
        raise RunError(
            f"this TensorFlow ({tf.__version__}) orders the inputs and outputs of an XLA program in a way that is not "
            "known here: use the version in setup.cfg"
        )
    return Program(_plain(text), data, returns, reads, [reads[by_result[i]] for i in sorted(by_result)], constants)


def _captures(model: ConAdvModel, program: str, captured: list[tf.Tensor]) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of the tensors that a function captures, and the values of those that are no variables."""
    by_handle = {id(variable.handle): name for name, variable in named_variables(model).items()}
    names, constants = [], {}
    for index, tensor in enumerate(captured):
        name = by_handle.get(id(tensor))
        if name is None:
            if tensor.dtype == tf.resource:
                raise RunError(f"the program {program!r} reads a variable that is not the model's: report this line")
            name = f"{program}/constant{index}"
            constants[name] = tensor.numpy()
        names.append(name)
    return names, constants


def _signature(text: str) -> tuple[int, int]:
    """The numbers of arguments and of results of a program."""
    line = next(line for line in text.splitlines() if "func.func" in line and "@main(" in line)
    arguments, results = line.split(" -> ", 1)
    return arguments.count("%arg"), results.count("tensor<")


def _plain(text: str) -> str:
    """The program in StableHLO alone, without XLA's own dialect and without the places in TensorFlow it came from."""
    text = re.sub(r"^module @\S+ attributes \{.*\} \{$", "module {", text, count=1, flags=re.MULTILINE)
    text = re.sub(r" ?\{mhlo\.frontend_attributes = \{[^}]*\}\}", "", text)
    return without_copies(text)


def _describe(name: str, program: Program) -> dict:
    data = {key: {"shape": list(spec.shape), "dtype": spec.dtype.name} for key, spec in program.data.items()}
    return {
        "file": f"{name}.mlir",
        "data": data,
        "returns": program.returns,
        "reads": program.reads,
        "assigns": program.assigns,
    }


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def facts(built: Run) -> dict:
    """What program.json says of a run beside its programs."""
    augmentation = built.data.augmentation
    return {
        **report.facts(built),
        "num_classes": built.data.num_classes,
        "steps_per_epoch": built.plan.steps_per_epoch,
        # None: what xla_step.py has no counterpart of.
        "augmentation": augmentation.crop if augmentation.policy == "none" else None,
    }


def save_data(built: Run, path: str) -> None:
    """Writes the images and labels of both splits, not augmented, as an .npz file."""
    train, test = (built.data.examples(split, built.data.sizes[split]) for split in ("train", "test"))
    np.savez(path, train_images=train[0], train_labels=train[1], test_images=test[0], test_labels=test[1])
