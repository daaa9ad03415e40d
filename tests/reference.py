"""One update of each method in float64, written from the formulas of docs/method.md alone.

Shares no code with the product. TensorFlow serves only as a calculator here: float64 convolution, and
GradientTape for the derivative of the network. The attack, the mixture of losses, moving averages, LARS and
the ring of stale weights are NumPy.

Weights are a dict of float64 arrays: "<conv>/kernel", "<conv>/<branch>/gamma" and ".../beta" for every
convolution ("stem", "block1/conv1", "block1/conv2", "block2/shortcut", ...), "classifier/kernel" and
"classifier/bias". Moving statistics are a dict with "<conv>/<branch>/mean" and ".../variance".
"""

import dataclasses

import numpy as np
import tensorflow as tf

CLASSES = 10
BN_EPSILON, BN_MOMENTUM, LARS_EPSILON = 1e-5, 0.9, 1e-9
IMAGENET_MEAN, IMAGENET_STDDEV = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

# Strides of the blocks (a stride of 2 comes with a projection), channel means and deviations on 0..1.
NETWORKS = {
    "digits_resnet": ((1, 2), np.array([0.3]), np.array([0.38])),
    "cifar_resnet8": ((1, 2, 2), np.array([0.4914, 0.4822, 0.4465]), np.array([0.247, 0.2435, 0.2616])),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What an update does; the defaults are the paper's."""

    adversarial: bool = True
    tau: int = 0
    network: str = "digits_resnet"
    epsilon: float = 3.0
    step_size: float | None = None
    steps: int = 1
    norm: str = "linf"
    predicted: bool = False  # about the network's own first prediction rather than the attack's labels
    descend: bool = False  # towards the attack's labels rather than away from them
    smoothed: bool = False
    batch_norm: str = "main"
    release_units: bool = False
    weight: float = 0.5
    fraction: float = 1.0
    smoothing: float = 0.1
    momentum: float = 0.9
    decay: float = 5e-4
    eta: float | None = 0.001


@dataclasses.dataclass
class State:
    """θ, moving averages and momentum after an update."""

    weights: dict
    moving: dict
    velocity: dict


@dataclasses.dataclass
class Rows:
    """A micro-batch: images, labels, the random start in units of ε, and the labels the attack aims at."""

    images: np.ndarray
    labels: np.ndarray
    start: np.ndarray
    attack_labels: np.ndarray
    augmented: np.ndarray | None = None  # like images: trained on through a branch of its own, never attacked


def forward(network: str, weights: dict, images, branch: str, moving: dict | None = None):
    """Logits of float64 tensors, and the batch statistics of every normalisation."""
    strides, mean, stddev = NETWORKS[network]
    statistics = {}

    def conv_norm(x, name, stride):
        x = tf.nn.conv2d(x, weights[f"{name}/kernel"], stride, "SAME")
        key = f"{name}/{branch}"
        if moving is None:
            mu = tf.reduce_mean(x, [0, 1, 2])
            var = tf.reduce_mean((x - mu) ** 2, [0, 1, 2])
            count = np.prod(x.shape[:3])
            statistics[f"{key}/mean"] = mu.numpy()
            statistics[f"{key}/variance"] = var.numpy() * count / (count - 1)
        else:
            mu, var = moving[f"{key}/mean"], moving[f"{key}/variance"]
        return weights[f"{key}/gamma"] * (x - mu) / tf.sqrt(var + BN_EPSILON) + weights[f"{key}/beta"]

    x = tf.nn.relu(conv_norm((images / 255.0 - mean) / stddev, "stem", 1))
    for number, stride in enumerate(strides, 1):
        block = f"block{number}"
        shortcut = conv_norm(x, f"{block}/shortcut", stride) if stride == 2 else x
        x = tf.nn.relu(conv_norm(x, f"{block}/conv1", stride))
        x = tf.nn.relu(conv_norm(x, f"{block}/conv2", 1) + shortcut)
    logits = tf.reduce_mean(x, [1, 2]) @ weights["classifier/kernel"] + weights["classifier/bias"]
    return logits, statistics


def cross_entropy(logits, labels, smoothing: float):
    """Of each row, against (1 − s) one-hot + s / classes."""
    target = (1 - smoothing) * np.eye(CLASSES)[labels] + smoothing / CLASSES
    return -tf.reduce_sum(target * tf.nn.log_softmax(logits), 1)


def attack(recipe: Recipe, stale: State, rows: Rows):
    """x̂, and how far the input gradient stays from zero: smallest over largest magnitude, any step.

    `release_units` is written in the space of normalised images, where the release has it.
    """
    pixels, labels = rows.images.astype(np.float64), rows.attack_labels
    if recipe.release_units:
        mean, unit = 255 * IMAGENET_MEAN, 255 * IMAGENET_STDDEV
        scale, low, high = 2 / 255, -1.0, 1.0
    else:
        mean, unit, scale, low, high = 0.0, 1.0, 1.0, 0.0, 255.0
    clean = (pixels - mean) / unit
    epsilon = scale * recipe.epsilon
    alpha = scale * (recipe.epsilon if recipe.step_size is None else recipe.step_size)
    branch = "adversarial" if recipe.batch_norm == "aux" else "main"
    moving = stale.moving if recipe.batch_norm == "moving" else None
    delta, margin = epsilon * rows.start.astype(np.float64), 1.0
    for step in range(recipe.steps):
        x = tf.constant(clean + delta)
        with tf.GradientTape() as tape:
            tape.watch(x)
            logits, _ = forward(recipe.network, stale.weights, x * unit + mean, branch, moving)
            if recipe.predicted and step == 0:
                labels = np.argmax(logits, 1)
            loss = tf.reduce_sum(cross_entropy(logits, labels, recipe.smoothing if recipe.smoothed else 0.0))
        gradient = tape.gradient(loss, x).numpy() * (-1 if recipe.descend else 1)
        margin = min(margin, np.abs(gradient).min() / np.abs(gradient).max())
        if recipe.norm == "linf":
            delta = np.clip(delta + alpha * np.sign(gradient), -epsilon, epsilon)
        else:
            delta = delta + alpha * gradient / rms(gradient)
            delta = delta * np.minimum(1.0, epsilon / rms(delta))
        delta = np.clip(clean + delta, low, high) - clean  # the next step, too, begins at an image
    return (clean + delta) * unit + mean, margin


def rms(values: np.ndarray) -> np.ndarray:
    """Of every image, broadcastable."""
    return np.sqrt(np.mean(values**2, axis=(1, 2, 3), keepdims=True))


def training_pass(recipe: Recipe, weights: dict, images, labels, branch: str):
    """The mean loss, its gradient by name, batch statistics and top-1."""
    variables = {name: tf.constant(value) for name, value in weights.items()}
    with tf.GradientTape() as tape:
        tape.watch(variables)
        logits, statistics = forward(recipe.network, variables, tf.constant(images, tf.float64), branch)
        loss = tf.reduce_mean(cross_entropy(logits, labels, recipe.smoothing))
    gradient = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    top1 = np.mean(np.argmax(logits, 1) == labels)
    return loss.numpy(), {name: value.numpy() for name, value in gradient.items()}, statistics, top1


def contribution(recipe: Recipe, state: State, stale: State, rows: Rows) -> tuple[dict, dict, dict, float]:
    """Gradient, statistics and logs of one micro-batch, and the margin of its attack."""
    loss, gradient, statistics, top1 = training_pass(recipe, state.weights, rows.images, rows.labels, "main")
    logs = {"loss": loss, "clean_loss": loss, "clean_top1": top1}
    if not recipe.adversarial:
        return gradient, statistics, logs, 1.0
    first = round(recipe.fraction * len(rows.images))
    attacked = Rows(*(part[:first] for part in (rows.images, rows.labels, rows.start, rows.attack_labels)))
    adversarial_images, margin = attack(recipe, stale, attacked)
    other_loss, other, other_statistics, other_top1 = training_pass(
        recipe, state.weights, adversarial_images, attacked.labels, "adversarial"
    )
    statistics |= other_statistics
    w = recipe.weight
    logs |= {"adversarial_loss": other_loss, "adversarial_top1": other_top1}
    if rows.augmented is not None:
        third_loss, third, third_statistics, third_top1 = training_pass(
            recipe, state.weights, rows.augmented, rows.labels, "augmented"
        )
        logs |= {"augmented_loss": third_loss, "augmented_top1": third_top1}
        statistics |= third_statistics
        loss = (loss + third_loss) / 2
        gradient = {name: (gradient[name] + third[name]) / 2 for name in gradient}
    logs |= {"loss": (1 - w) * loss + w * other_loss}
    mixed = {name: (1 - w) * gradient[name] + w * other[name] for name in gradient}
    return mixed, statistics, logs, margin


def lars(recipe: Recipe, weights: dict, gradient: dict, velocity: dict, rate: float) -> tuple[dict, dict]:
    """New weights and momentum; kernels alone are decayed and adapted."""
    new_weights, new_velocity = {}, {}
    for name, w in weights.items():
        g = gradient[name]
        ratio, decay = 1.0, 0.0
        if name.endswith("kernel"):
            decay = recipe.decay
            norm_w, norm_g = np.sqrt(np.sum(w * w)), np.sqrt(np.sum(g * g))
            if recipe.eta is not None and norm_w > 0 and norm_g > 0:
                ratio = recipe.eta * norm_w / (norm_g + decay * norm_w + LARS_EPSILON)
        new_velocity[name] = recipe.momentum * velocity[name] + rate * ratio * (g + decay * w)
        new_weights[name] = w - new_velocity[name]
    return new_weights, new_velocity


def update(recipe: Recipe, state: State, stale: State, micro_batches: list[Rows], rate: float):
    """θ_{t+1} from θ_t and θ_{t−τ}: the new state, logs, and the smallest margin of the attacks."""
    parts = [contribution(recipe, state, stale, rows) for rows in micro_batches]
    gradient, statistics, logs = (
        {name: np.mean([part[kind][name] for part in parts], axis=0) for name in parts[0][kind]} for kind in range(3)
    )
    weights, velocity = lars(recipe, state.weights, gradient, state.velocity, rate)
    moving = dict(state.moving)
    for name, value in statistics.items():
        moving[name] = BN_MOMENTUM * moving[name] + (1 - BN_MOMENTUM) * value
    return State(weights, moving, velocity), logs, min(part[3] for part in parts)
