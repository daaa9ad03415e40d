"""Sharpness of a minimum: the largest Hessian eigenvalue, and the loss along filter-normalised directions.

This module knows nothing of runs or networks: a loss is a function of batches that reads variables.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

# One array for each variable, of its shape.
Direction = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class MeanLoss:
    """The mean of a loss over all examples of some batches, as a function of variables.

    Attributes:
      losses: (*batch) → float32 [examples]; reads `variables`.
      variables: float32, in any shapes; together they have `dimension` numbers.
      batches: tuples of tensors whose first axis counts the examples; batches may have several sizes.
    """

    losses: Callable[..., tf.Tensor]
    variables: Sequence[tf.Variable]
    batches: Sequence[tuple[tf.Tensor, ...]]

    @property
    def dimension(self) -> int:
        return sum(self._sizes)

    def value(self) -> float:
        """The mean loss at the variables as they are."""
        return float(self._mean(self._summed_loss))

    def hessian_vector_product(self, vector: np.ndarray) -> np.ndarray:
        """The Hessian of the mean loss times `vector`, both float32 [dimension], in the order of the variables."""
        product = functools.partial(self._summed_product, tf.constant(vector, tf.float32))
        return self._mean(product).astype(np.float32)

    def along(self, directions: Sequence[Direction], coefficients: np.ndarray) -> np.ndarray:
        """The mean loss at variables + Σ coefficient · direction; the variables end as they began.

        Args:
          directions: k of them.
          coefficients: float [points, k].

        Returns:
          float64 [points].
        """
        origin = [variable.numpy() for variable in self.variables]
        values = []
        try:
            for point in coefficients:
                for variable, start, *steps in zip(self.variables, origin, *directions, strict=True):
                    variable.assign(start + sum(c * step for c, step in zip(point, steps, strict=True)))
                values.append(self.value())
        finally:
            for variable, start in zip(self.variables, origin, strict=True):
                variable.assign(start)
        return np.array(values)

    @functools.cached_property
    def _sizes(self) -> list[int]:
        return [int(np.prod(variable.shape)) for variable in self.variables]

    def _mean(self, summed: Callable[..., tf.Tensor]) -> np.ndarray:
        """The mean over the examples of all batches; float64, for float32 would lose digits of many small shares."""
        total = sum(summed(*batch).numpy().astype(np.float64) for batch in self.batches)
        return total / sum(int(batch[0].shape[0]) for batch in self.batches)

    @functools.cached_property
    def _summed_loss(self) -> Callable[..., tf.Tensor]:
        return _compiled(lambda *batch: tf.reduce_sum(self.losses(*batch)))

    @functools.cached_property
    def _summed_product(self) -> Callable[..., tf.Tensor]:
        """(vector, *batch) → float32 [dimension]: the gradient of (gradient · vector)."""
        return _compiled(self._product_of_batch)

    def _product_of_batch(self, vector: tf.Tensor, *batch: tf.Tensor) -> tf.Tensor:
        parts = [tf.reshape(p, v.shape) for p, v in zip(tf.split(vector, self._sizes), self.variables, strict=True)]
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                loss = tf.reduce_sum(self.losses(*batch))
            gradients = inner.gradient(loss, self.variables, unconnected_gradients="zero")
            slope = tf.add_n([tf.reduce_sum(g * part) for g, part in zip(gradients, parts, strict=True)])
        products = outer.gradient(slope, self.variables, unconnected_gradients="zero")
        return tf.concat([tf.reshape(product, [-1]) for product in products], 0)


def _compiled(function: Callable[..., tf.Tensor]) -> Any:
    return tf.function(function, autograph=False, reduce_retracing=True)


@dataclasses.dataclass(frozen=True)
class Eigenvalue:
    """An approximate eigenvalue of a symmetric matrix H.

    Attributes:
      value: λ = vᵀHv of the unit vector v that was found.
      residual: ‖Hv − λv‖: H has an eigenvalue at most this far from λ.
      products: how many products of H with a vector were made.
    """

    value: float
    residual: float
    products: int


def largest_eigenvalue(
    product: Callable[[np.ndarray], np.ndarray],
    dimension: int,
    max_products: int = 40,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Eigenvalue:
    """The largest eigenvalue (with its sign) of a symmetric matrix by Lanczos' method.

    Every new vector is made orthogonal to all before it, so that rounding makes no false copies of an eigenvalue. The
    vectors are kept: `max_products` times `dimension` numbers of 4 bytes.

    Args:
      product: a float32 vector [dimension] → the matrix times it.
      dimension: dimension of the matrix.
      max_products: products to make at most, not counting the last one, for the residual.
      tolerance: the search ends when the residual is below this share of the eigenvalue.
      seed: seed of the first vector.
    """
    limit = min(max_products, dimension)
    basis = np.empty((limit, dimension), np.float32)
    vector = np.random.default_rng(seed).standard_normal(dimension, np.float32)
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        made = len(diagonal) + 1
        basis[made - 1] = vector / np.linalg.norm(vector)
        image = product(basis[made - 1])
        diagonal.append(float(basis[made - 1] @ image))
        vector = _orthogonal(_orthogonal(image, basis[:made]), basis[:made])
        norm = float(np.linalg.norm(vector))
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
        if norm * abs(vectors[-1, -1]) <= tolerance * abs(values[-1]) or made == limit:
            return _with_residual(product, vectors[:, -1].astype(np.float32) @ basis[:made], made + 1)
        beside.append(norm)


def _orthogonal(vector: np.ndarray, basis: np.ndarray) -> np.ndarray:
    return vector - (basis @ vector) @ basis


def _with_residual(product: Callable[[np.ndarray], np.ndarray], vector: np.ndarray, products: int) -> Eigenvalue:
    vector = vector / np.linalg.norm(vector)
    image = product(vector)
    value = float(vector @ image)
    return Eigenvalue(value, float(np.linalg.norm(image - value * vector)), products)


def filter_normalised_direction(variables: Sequence[tf.Variable], seed: int) -> Direction:
    """A random direction in which each filter has the norm of that filter of the variables (Li et al. 2018).

    So equal steps mean equal relative changes, whatever the scale of the weights, which batch normalisation makes
    arbitrary. A filter is what the last axis counts; vectors (biases, γ, β) stay as they are. Variables of the same
    shapes and the same seed have the same directions but for that scale.
    """
    random = np.random.default_rng(seed)
    return [_scaled_like(variable.numpy(), random) for variable in variables]


def _scaled_like(weights: np.ndarray, random: np.random.Generator) -> np.ndarray:
    if weights.ndim < 2:
        return np.zeros_like(weights)
    drawn = random.standard_normal(weights.shape, np.float32)
    axes = tuple(range(weights.ndim - 1))
    return drawn * (np.linalg.norm(weights.reshape(-1, weights.shape[-1]), axis=0) / np.sqrt((drawn**2).sum(axes)))
