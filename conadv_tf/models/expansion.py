"""A 1×1 convolution that widens, followed by batch normalisation, without its wide intermediate.

The statistics of z = a W follow from the first two moments of the narrow a: mean(z) = mean(a) W and
var(z) = diag(Wᵀ Cov(a) W). Known before z is computed, they let a compiler fuse convolution, normalisation and what
follows into one pass, and the backward pass needs aᵀ dy, which is the kernel's gradient but for small terms, instead of
reading z again. The mathematics is that of batch normalisation; rounding differs.

The moments are float32, and var(z) is a small difference of them where a has a mean, or channels in common, that W
cancels: its relative error is up to 5e-7 times E[(|a| |W|)²] / var(z), a factor that is small behind a batch norm.
Networks expand what is of DTYPES and take the two steps apart for the rest.
"""

import tensorflow as tf

DTYPES: tuple[tf.DType, ...] = (tf.bfloat16,)


def expand_and_normalize(inputs: tf.Tensor, kernel: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float):
    """BN(inputs · kernel) with batch statistics.

    Args:
      inputs: [rows, height, width, K].
      kernel: [1, 1, K, F], of the inputs' dtype.
      gamma, beta: float32 [F].
      epsilon: added to the variance.

    Returns:
      [rows, height, width, F] of the inputs' dtype, and float32 [F] mean and Bessel-corrected variance, through
      which no gradient flows.
    """

    @tf.custom_gradient
    def expand(inputs, kernel, gamma, beta):
        count = tf.cast(tf.reduce_prod(tf.shape(inputs)[:3]), tf.float32)
        weights = tf.cast(kernel[0, 0], tf.float32)
        # A product with ones: a TPU sums faster by matrix products than by additions.
        mean_a = products(inputs, tf.ones_like(inputs[..., :8]))[:, 0] / count
        covariance = products(inputs, inputs) / count - mean_a[:, None] * mean_a
        spread = in_full_precision(covariance, weights)
        mean = tf.reduce_sum(mean_a[:, None] * weights, 0)
        variance = tf.maximum(tf.reduce_sum(weights * spread, 0), 0.0)
        deviation = tf.math.rsqrt(variance + epsilon)
        scale = gamma * deviation
        wide = tf.cast(tf.nn.conv2d(inputs, kernel, 1, "SAME"), tf.float32)
        outputs = tf.cast(wide * scale + (beta - mean * scale), inputs.dtype)

        def gradient(by_outputs, by_mean, by_variance):
            both = products(inputs, by_outputs)
            by_beta = tf.reduce_sum(tf.cast(by_outputs, tf.float32), [0, 1, 2])
            by_gamma = deviation * (tf.reduce_sum(weights * both, 0) - mean * by_beta)
            shift, slope = by_beta / count, by_gamma * deviation / count
            by_kernel = scale * (both - count * mean_a[:, None] * shift - count * spread * slope)
            narrow = tf.matmul(weights * (scale * slope), weights, transpose_b=True)
            constant = tf.reduce_sum(weights * (scale * (mean * slope - shift)), 1)
            by_inputs = pointwise(by_outputs, tf.transpose(weights * scale)) - pointwise(inputs, narrow)
            by_inputs += tf.cast(constant, inputs.dtype)
            return by_inputs, tf.cast(by_kernel, kernel.dtype)[None, None], by_gamma, by_beta

        return (outputs, mean, variance * (count / tf.maximum(count - 1.0, 1.0))), gradient

    return expand(inputs, kernel, gamma, beta)


def pointwise(inputs: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """The 1×1 convolution with `weights` [K, F], in the inputs' dtype."""
    return tf.nn.conv2d(inputs, tf.cast(weights, inputs.dtype)[None, None], 1, "SAME")


def in_full_precision(one: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    """Matrix product of float32 and of float32 that bfloat16 holds exactly, on hardware that rounds to bfloat16.

    The first factor's upper half of bits and the rest are multiplied apart; a cast to bfloat16 and back would not do,
    since XLA may leave it out.
    """
    upper = tf.bitcast(tf.bitwise.bitwise_and(tf.bitcast(one, tf.int32), tf.constant(-(2**16))), tf.float32)
    return tf.matmul(upper, other) + tf.matmul(one - upper, other)


def products(one: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    """Σ over rows and places of one ⊗ other, float32 [K, F]."""
    sizes = [1, 1, one.shape[-1], other.shape[-1]]
    result = tf.raw_ops.Conv2DBackpropFilter(
        input=tf.cast(one, tf.float32),
        filter_sizes=sizes,
        out_backprop=tf.cast(other, tf.float32),
        strides=[1, 1, 1, 1],
        padding="SAME",
    )
    return result[0, 0]
