"""Draws docs/pictures/attack_panel.png: the attack on a real photograph, clean | perturbation | adversarial.

    python docs/pictures/attack_panel.py

Trains a ResNet-8, without adversarial examples, to tell whether a crop of a photograph stands upright or upside down.
The photograph is one of the two that scikit-learn ships (BSD licence, nothing to download). Crops of its left are
trained on, crops of its right are tested. The whole photograph is then attacked: the network is convolutional and takes
images of any size. One to two minutes of a core.
"""

import argparse
import os

import matplotlib
import numpy as np
from sklearn.datasets import load_sample_image

matplotlib.use("Agg")
from matplotlib import pyplot

PICTURE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "attack_panel.png")
CLASSES = "upright", "upside down"
EPSILON_PIXELS = 8
SHRINK, CROP = 4, 40  # the photograph at a quarter of its size, 106 × 160 pixels, and crops of 40 × 40
LEFT = 0.6  # the share of the photograph's width that is trained on
BATCH, UPDATES = 32, 600
ENLARGED, GAP, TITLE = 2, 10, 48  # pixels of the picture: per pixel, between images, above them


def photograph() -> np.ndarray:
    """A temple, uint8 [106, 160, 3]."""
    image = load_sample_image("china.jpg")
    height, width = (side // SHRINK for side in image.shape[:2])
    tiles = image[: height * SHRINK, : width * SHRINK].reshape(height, SHRINK, width, SHRINK, 3)
    return np.round(tiles.mean(axis=(1, 3))).astype(np.uint8)


def crops(image: np.ndarray, count: int, left: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [count, CROP, CROP, 3] and labels int32 [count], from the left or the right; label 1 is turned by 180°."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(CLASSES), count).astype(np.int32)
    height, width, _ = image.shape
    border = int(LEFT * width)
    first, last = (0, border - CROP) if left else (border, width - CROP)
    corners = zip(random.integers(0, height - CROP + 1, count), random.integers(first, last + 1, count), strict=True)
    taken = [image[y : y + CROP, x : x + CROP] for y, x in corners]
    return np.stack([np.rot90(crop, 2 * label) for crop, label in zip(taken, labels, strict=True)]), labels


def attacked(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[float], float]:
    """The photograph, its adversarial example, how sure the network is of "upright" for each, top-1 on tested crops."""
    import tensorflow as tf

    from conadv_tf import Attack, ConAdvModel, ResNet, make_lars, methods, warmup_poly_decay

    # One image is no batch to take statistics of: the attack looks through the moving ones, as evaluation does.
    conadv = methods.conadv(Attack(epsilon_pixels=EPSILON_PIXELS, batch_norm="moving"))
    network = ResNet("cifar_resnet8", len(CLASSES), (CROP, CROP, 3), conadv.branches)
    plain = ConAdvModel(network, methods.vanilla())
    plain.compile(make_lars(warmup_poly_decay(UPDATES, UPDATES, warmup_epochs=0.2, peak_learning_rate=4.0)))
    images, labels = crops(image, BATCH * UPDATES, left=True, seed=0)
    plain.fit(images, labels, batch_size=BATCH, verbose=0)
    top1 = plain.evaluate(*crops(image, 500, left=False, seed=1), verbose=0, return_dict=True)["top1"]
    whole = network.twin(image_shape=image.shape)
    attacker = ConAdvModel(whole, conadv)
    attacker.compile()
    clean = image[None].astype(np.float32)
    adversarial = attacker.adversarial_examples(clean, np.zeros(1, np.int32)).numpy()
    sure = [float(tf.nn.softmax(whole(images))[0, 0]) for images in (clean, adversarial)]
    return clean[0], adversarial[0], sure, top1


def draw(clean: np.ndarray, adversarial: np.ndarray, sure: list[float], path: str) -> None:
    """Clean | perturbation | adversarial, images [H, W, 3] in [0, 255]; `sure`: the probability of “upright”."""
    magnification = 127.0 / max(float(np.abs(adversarial - clean).max()), 1.0)
    titles = [
        f"clean: “{CLASSES[0]}”, {sure[0]:.0%}",
        f"perturbation × {magnification:.0f}, ε = {EPSILON_PIXELS} of 255",
        f"adversarial: “{CLASSES[0]}”, {sure[1]:.0%}",
    ]
    shown = clean, 127.5 + magnification * (adversarial - clean), adversarial
    height, width = (ENLARGED * side for side in clean.shape[:2])
    size = 3 * width + 4 * GAP, height + TITLE + GAP
    figure = pyplot.figure(figsize=(size[0] / 100, size[1] / 100), dpi=100)
    for number, (image, title) in enumerate(zip(shown, titles, strict=True)):
        left = GAP + number * (width + GAP)
        pixels = np.clip(np.round(image), 0, 255).astype(np.uint8).repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)
        figure.figimage(pixels, left, GAP)  # pixel by pixel, so that the file stays small
        figure.text((left + width / 2) / size[0], 1 - TITLE / 2 / size[1], title, ha="center", va="center", fontsize=14)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=PICTURE, help="the picture")
    out = parser.parse_args().out
    clean, adversarial, sure, top1 = attacked(photograph())
    draw(clean, adversarial, sure, out)
    print(f"top-1 on crops of the right of the photograph: {top1:.1%}")
    print(f"probability of {CLASSES[0]}: clean {sure[0]:.3f}, adversarial {sure[1]:.3f}")


if __name__ == "__main__":
    main()
