"""Times or trains an exported step program on the JAX device at hand; needs jax and numpy, no TensorFlow.

    conadv-step-program --out=DIR --save_data        where TensorFlow is: makes DIR
    python benchmarks/xla_step.py --program=DIR                   ms an update and images/s
    python benchmarks/xla_step.py --program=DIR --data=DIR/data.npz [--epochs=90] [--weights=FILE]

The first prints a Markdown table of warm repeats and writes xla_step.json. The second makes a whole run: prints the
means of each epoch and the final top-1 over exactly every image, writes xla_run.json and weights.npz, every variable by
name: what --weights goes on from, and step_export.load_weights takes. Images are shuffled and augmented by numpy's
generator: as the recipe says, though not in the recipe's very order (--in_order: as they lie, not augmented). Variables
stay on the device; an update takes over the memory of the old ones. Files go to --out.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax import export
from jax.extend.mlir.dialects import stablehlo

# TensorFlow's counters are int64.
jax.config.update("jax_enable_x64", True)

PADDING = {"none": 0, "flip": 0, "crop_flip": 4}


class Program:
    """A program of DIR, compiled for the device at its first call.

    Args:
      folder: DIR.
      name: "update", "evaluate" or "begin".
      description: program.json.
    """

    def __init__(self, folder: str, name: str, description: dict):
        about = description["programs"][name]
        self.data, self.assigns, self._returns = about["data"], about["assigns"], about["returns"]
        self._kept = [variable for variable in about["reads"] if variable not in set(self.assigns)]
        order = {variable: i for i, variable in enumerate([*self.assigns, *self._kept])}
        self._order = [order[variable] for variable in about["reads"]]
        with open(os.path.join(folder, about["file"]), encoding="utf-8") as file:
            self._text = file.read()
        self._compiled = None

    def __call__(self, variables: dict, **data) -> dict:
        """Runs on a batch, assigns to `variables` in place, and returns the named values; all stay on the device."""
        inputs = [data[name] for name in self.data]
        assigned = [variables[name] for name in self.assigns]
        kept = [variables[name] for name in self._kept]
        if self._compiled is None:
            self._compiled = self._compile(inputs, assigned, kept)
        results = self._compiled(inputs, assigned, kept)
        variables.update(zip(self.assigns, results[len(self._returns) :], strict=True))
        return dict(zip(self._returns, results, strict=False))

    def _compile(self, inputs: list, assigned: list, kept: list):
        variables = [*assigned, *kept]
        like = [*inputs, *(variables[i] for i in self._order)]
        exported = exported_program(self._text, like, [np.zeros((), np.float32)] * len(self._returns) + assigned)

        def run(inputs, assigned, kept):
            variables = [*assigned, *kept]
            return exported.call(*inputs, *(variables[i] for i in self._order))

        # Donated in the order of the results that replace them: JAX pairs equal shapes first to first.
        return jax.jit(run, donate_argnums=1).lower(inputs, assigned, kept).compile()


def exported_program(text: str, arguments: list, results: list) -> export.Exported:
    """StableHLO as a function for JAX; `arguments` and `results` are arrays of the program's shapes and dtypes."""
    shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in results]

    def placeholder(*_):
        return [jax.numpy.zeros(shape.shape, shape.dtype) for shape in shapes]

    like = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in arguments]
    # JAX fills in what belongs to a program of this signature; the program itself is ours.
    signature = export.export(jax.jit(placeholder, keep_unused=True))(*like)
    artifact = stablehlo.serialize_portable_artifact_str(text, stablehlo.get_current_version())
    return dataclasses.replace(signature, mlir_module_serialized=artifact)


def load(folder: str, weights: str | None) -> tuple[dict, dict[str, Program], dict]:
    """program.json, the programs, and the variables on the device."""
    if not os.path.isfile(os.path.join(folder, "program.json")):
        sys.exit(f"error: {folder} holds no program.json: make it with conadv-step-program --out={folder}")
    with open(os.path.join(folder, "program.json"), encoding="utf-8") as file:
        description = json.load(file)
    if description["format"] != 1:
        sys.exit(f"error: {folder} has format {description['format']}, this reads 1: export it with this checkout")
    programs = {name: Program(folder, name, description) for name in description["programs"]}
    with np.load(os.path.join(folder, "initial.npz")) as initial:
        values = dict(initial)
    if weights:
        with np.load(weights) as saved:
            values |= dict(saved)
    return description, programs, {name: jax.device_put(value) for name, value in values.items()}


# Data


def stream(images: np.ndarray, labels: np.ndarray, count: int, seed: int, crop: str, in_order: bool) -> Iterator:
    """Endless batches of `count` examples; what fills no batch opens the next epoch, so each has every image once."""
    indices, epoch = np.zeros(0, np.int64), 0
    for number in itertools.count():
        while len(indices) < count:
            order = np.random.default_rng([seed, 0, epoch]).permutation(len(images))
            indices, epoch = np.concatenate([indices, np.arange(len(images)) if in_order else order]), epoch + 1
        chosen, indices = indices[:count], indices[count:]
        random = np.random.default_rng([seed, 1, number])
        yield crop_flip(images[chosen], crop, random), labels[chosen].astype(np.int32)


def crop_flip(images: np.ndarray, crop: str, random: np.random.Generator) -> np.ndarray:
    """Pads with black, crops back to size at random and mirrors every other image; [n, H, W, C]."""
    if crop == "none":
        return images
    padding = PADDING[crop]
    count, height, width, _ = images.shape
    padded = np.pad(images, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    top, left = random.integers(0, 2 * padding + 1, (2, count, 1))
    columns = np.where(random.random((count, 1)) < 0.5, np.arange(width), np.arange(width)[::-1])
    rows = top + np.arange(height)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], (left + columns)[:, None, :]]


def shaped(data: dict, images: np.ndarray, labels: np.ndarray) -> dict:
    """On the device, as the update takes them: [micro-batches, rows, ...]."""
    both = {"images": images, "labels": labels}
    return {name: jax.device_put(value.reshape(data[name]["shape"])) for name, value in both.items()}


# Training


def train(arguments: argparse.Namespace) -> dict:
    """A whole run; returns its result."""
    description, programs, variables = load(arguments.program, arguments.weights)
    with np.load(arguments.data) as file:
        splits = {name: (file[f"{name}_images"], file[f"{name}_labels"]) for name in ("train", "test")}
    crop = "none" if arguments.in_order else description["augmentation"]
    if crop not in PADDING:
        sys.exit(f"error: the recipe's augmentation ({crop}) is TensorFlow's: feed augmented images with --in_order")
    epochs, steps = arguments.epochs or description["epochs"], description["steps_per_epoch"]
    seed = description["seed"] if arguments.seed is None else arguments.seed
    count = description["microbatches"] * description["rows"]
    batches = stream(*splits["train"], count, seed, crop, arguments.in_order)
    update = programs["update"]
    if "begin" in programs:
        programs["begin"](variables, **shaped(update.data, *next(batches)))
    start, history, made = time.perf_counter(), [], 0
    for epoch in range(epochs):
        variables |= {name: jax.numpy.zeros_like(v) for name, v in variables.items() if name.startswith("metric/")}
        began = time.perf_counter()
        for _ in range(steps):
            if made % description["updates_per_batch"] == 0:
                batch = shaped(update.data, *next(batches))
            logs = update(variables, **batch)
            made += 1
        means = {name: float(value) for name, value in logs.items()}
        seconds = time.perf_counter() - began
        rate = steps * count / description["updates_per_batch"] / seconds
        history.append({"epoch": epoch + 1, **means, "seconds": seconds, "images_per_second": rate})
        print(f"epoch {epoch + 1:3}  loss {means['loss']:.4f}  clean {means['clean_loss']:.4f}  {rate:,.0f} images/s")
    wall = time.perf_counter() - start
    np.savez(os.path.join(arguments.out, "weights.npz"), **{name: np.asarray(v) for name, v in variables.items()})
    tops = {f"{name}_top1": evaluate(programs["evaluate"], variables, *splits[name]) for name in splits}
    result = {**facts(description), **tops, "updates": made, "wall_seconds": wall, "epochs": history}
    print(f"{description['recipe']}: test top-1 {tops['test_top1']:.2f} %   train top-1 {tops['train_top1']:.2f} %")
    return result


def evaluate(program: Program, variables: dict, images: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 in percent over exactly every image: the last batch is filled up with images of weight 0."""
    rows, correct, seen = program.data["labels"]["shape"][0], 0.0, 0.0
    for first in range(0, len(images), rows):
        own = {"images": images[first : first + rows], "labels": labels[first : first + rows].astype(np.int32)}
        own["weights"] = np.ones(len(own["labels"]), np.float32)
        missing = rows - len(own["labels"])
        filled = {name: np.pad(v, [(0, missing)] + [(0, 0)] * (v.ndim - 1)) for name, v in own.items()}
        sums = program(variables, **filled)
        correct, seen = correct + float(sums["top1"]), seen + float(sums["images"])
    if seen != len(images):
        sys.exit(f"error: {seen:g} of {len(images)} images were evaluated: report this line")
    return 100 * correct / seen


# Timing


def time_updates(arguments: argparse.Namespace) -> dict:
    """Milliseconds of updates in warm repeats, on random images."""
    description, programs, variables = load(arguments.program, arguments.weights)
    update, random = programs["update"], np.random.default_rng(0)
    shape, count = update.data["images"]["shape"], description["microbatches"] * description["rows"]
    images = random.integers(0, 256, shape, dtype=np.uint8)
    batch = shaped(update.data, images, random.integers(0, description["num_classes"], count).astype(np.int32))
    start = time.perf_counter()
    jax.block_until_ready(update(variables, **batch))
    first = time.perf_counter() - start
    repeats = []
    for turn in range(arguments.repeats + 1):
        start = time.perf_counter()
        for _ in range(arguments.steps):
            values = update(variables, **batch)
        jax.block_until_ready(values)
        repeats += [1000 * (time.perf_counter() - start) / arguments.steps] if turn else []
    images_an_update = count / description["updates_per_batch"]
    low, middle, high = statistics.quantiles(repeats, n=4)
    finite = all(np.isfinite(float(value)) for value in values.values())
    result = {
        **facts(description),
        "first_update_seconds": first,
        "milliseconds": repeats,
        "median_milliseconds": middle,
        "quartiles": [low, high],
        "images_per_second": 1000 * images_an_update / middle,
        "finite": finite,
    }
    print("| program | device | images an update | ms an update (quartiles) | images/s |\n|---|---|---|---|---|")
    print(
        f"| {description['recipe']} | {result['device']} | {images_an_update:g} | "
        f"{middle:.3f} ({low:.3f} to {high:.3f}) | {result['images_per_second']:,.0f} |"
    )
    return result


def facts(description: dict) -> dict:
    """What a result says of the program and the device."""
    known = {name: value for name, value in description.items() if name not in ("programs", "epochs", "format")}
    return {**known, "device": jax.devices()[0].device_kind, "jax": jax.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True, help="folder that conadv-step-program wrote")
    parser.add_argument("--out", default=".", help="folder of the result")
    parser.add_argument("--weights", help="weights.npz to begin with")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="updates of a repeat")
    parser.add_argument("--data", help="npz of train_images, train_labels, test_images, test_labels")
    parser.add_argument("--epochs", type=int, help="the recipe's unless given; its learning rate does not change")
    parser.add_argument("--seed", type=int, help="of order and augmentation")
    parser.add_argument("--in_order", action="store_true")
    arguments = parser.parse_args()
    os.makedirs(arguments.out, exist_ok=True)
    name, work = ("xla_run.json", train) if arguments.data else ("xla_step.json", time_updates)
    result = work(arguments)
    with open(os.path.join(arguments.out, name), "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
