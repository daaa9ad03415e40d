"""Images a second and core of the input pipeline beside tf-models' classification parser, on the same records.

    python benchmarks/input_pipeline.py --data_dir=DIR [--images=512] [--rounds=7]

DIR holds ImageNet TFRecords (train-*), a few are enough: they are repeated. All contestants take turns in one process,
each alone while it is measured; a rate is images over the processor seconds of the whole process, so what else the
machine does weighs little. Ratios are medians over the rounds, quartiles beside them. Levels: how far JPEGs of shrunk
photos are from what they store. Memory: the resident size of the process after each tenth of --memory_images images of
the training pipeline. Prints a Markdown table and writes input_pipeline.json.
"""

import argparse
import io
import json
import os
import resource
import statistics
import tempfile
import time

import numpy as np
import tensorflow as tf
from official.vision.configs import common
from official.vision.dataloaders import classification_input
from PIL import Image

from conadv_tf import data, paths, terminal
from conadv_tf.data import shrink_records

SIZE, ROWS = 224, 16
PARSER, PARSER_AA = "tf-models parser", "tf-models parser, AutoAugment"
OURS, OURS_AA, EVALUATION = "train", "train, AutoAugment", "evaluation"
OURS_SHRUNK = {
    quality: f"train, photos shrunk to {shrink_records.MAX_SIDE} pixels, quality {quality}" for quality in (95, 90)
}
OURS_CACHED, EVALUATION_CACHED = "train, cached", "evaluation, cached"


def tf_models(records: list[bytes], policy: str | None) -> tf.data.Dataset:
    """Its decoder and parser in its own order, ready-made records in."""
    kind = policy and common.Augmentation(type="autoaug", autoaug=common.AutoAugment(augmentation_name=policy))
    parser = classification_input.Parser([SIZE, SIZE], 1001, aug_type=kind)
    decoder = classification_input.Decoder()
    source = tf.data.Dataset.from_tensor_slices(records).repeat()
    return source.map(decoder.decode).map(parser.parse_fn(True)).batch(ROWS)


def ours(data_dir: str, autoaugment: str, cache: str = "none") -> data.ImageData:
    return data.load(
        source="tfrecords",
        data_dir=data_dir,
        label_offset=1,
        num_classes=1000,
        image_size=SIZE,
        in_memory=False,
        augmentation="resized_crop_flip",
        autoaugment=autoaugment,
        shuffle_buffer=16,
        cache=cache,
        test_files="train-*",  # the same photos, so that both pipelines have the same work
    )


def contestants(data_dir: str, shrunk_dirs: dict[int, str]) -> dict[str, tf.data.Dataset]:
    files = paths.matching(data_dir, "train-*")
    records = list(tf.data.TFRecordDataset(files).as_numpy_iterator())
    plain, cached = ours(data_dir, "none"), ours(data_dir, "none", "memory")
    return {
        PARSER: tf_models(records, None),
        OURS: plain.train_batches(ROWS, 1),
        **{
            OURS_SHRUNK[quality]: ours(folder, "none").train_batches(ROWS, 1) for quality, folder in shrunk_dirs.items()
        },
        OURS_CACHED: cached.train_batches(ROWS, 1),
        EVALUATION: evaluation(plain),
        EVALUATION_CACHED: evaluation(cached),
        PARSER_AA: tf_models(records, "reduced_imagenet"),
        OURS_AA: ours(data_dir, "imagenet").train_batches(ROWS, 1),
    }


def photos(data_dir: str) -> list[Image.Image]:
    found = []
    for record in tf.data.TFRecordDataset(paths.matching(data_dir, "train-*")).as_numpy_iterator():
        encoded = tf.train.Example.FromString(record).features.feature["image/encoded"].bytes_list.value[0]
        found.append(Image.open(io.BytesIO(encoded)))
    return found


def levels(data_dir: str, shrunk_dir: str) -> float:
    """How far shrunk photos are from the same photos resized and not stored as JPEGs, in levels of 0..255."""
    differences = []
    for whole, stored in zip(photos(data_dir), photos(shrunk_dir), strict=True):
        exact = whole.resize(stored.size, Image.Resampling.BICUBIC)
        differences.append(np.abs(np.asarray(stored, float) - np.asarray(exact, float)).mean())
    return float(np.mean(differences))


def evaluation(loaded: data.ImageData) -> tf.data.Dataset:
    """Evaluations without end; of a few records padding would come too often, so whole batches alone are looked at."""
    whole = loaded.num_test // ROWS
    return (
        loaded.evaluation_batches("test", ROWS, 1)
        .repeat()
        .enumerate()
        .filter(lambda number, batch: number % loaded.evaluation_steps("test", ROWS, 1) < whole)
        .map(lambda number, batch: batch)
    )


def rate(batches: tf.data.Dataset, images: int) -> float:
    """Images per processor second, once the buffers are full."""
    iterator = iter(batches)
    for _ in range(8):
        next(iterator)
    start = time.process_time()
    for _ in range(images // ROWS):
        next(iterator)
    return images / (time.process_time() - start)


def table(rates: dict[str, list[float]]) -> list[dict]:
    rows = []
    for name, values in rates.items():
        base = rates[PARSER_AA if name == OURS_AA else PARSER]
        quotients = [value / other for value, other in zip(values, base, strict=True)]
        low, middle, high = statistics.quantiles(quotients, n=4)
        median = statistics.median(values)
        rows.append({"pipeline": name, "images_per_second": median, "ratio": middle, "quartiles": [low, high]})
    return rows


def resident_megabytes() -> float:
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def memory(batches: tf.data.Dataset, images: int) -> list[float]:
    """Resident megabytes after each tenth of the images."""
    iterator, sizes = iter(batches), []
    for _ in range(10):
        for _ in range(images // ROWS // 10):
            next(iterator)
        sizes.append(resident_megabytes())
    return sizes


def main() -> None:
    terminal.take_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=terminal.path, required=True)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory_images", type=int, default=10_240)
    arguments = parser.parse_args()
    folder = tempfile.TemporaryDirectory()
    shrunk = {quality: os.path.join(folder.name, str(quality)) for quality in OURS_SHRUNK}
    for quality, shrunk_dir in shrunk.items():
        shrink_records.shrink_records(arguments.data_dir, shrunk_dir, quality=quality)
    pipelines = contestants(arguments.data_dir, shrunk)
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(arguments.rounds):
        for name, batches in pipelines.items():
            rates[name].append(rate(batches, arguments.images))
    rows = table(rates)
    print("| | images/s a core | × tf-models (quartiles) |\n|---|---|---|")
    for row in rows:
        low, high = row["quartiles"]
        print(f"| {row['pipeline']} | {row['images_per_second']:.0f} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) |")
    for quality, shrunk_dir in shrunk.items():
        print(f"{OURS_SHRUNK[quality]}: {levels(arguments.data_dir, shrunk_dir):.2f} levels from what it stores")
    sizes = memory(pipelines[OURS_AA], arguments.memory_images)
    text = " ".join(f"{size:.0f}" for size in sizes)
    print(f"resident memory, MB, at each tenth of {arguments.memory_images:,} images: {text}")
    with open("input_pipeline.json", "w", encoding="utf-8") as file:
        json.dump({"rates": rows, "resident_megabytes": sizes}, file, indent=1)


if __name__ == "__main__":
    main()
