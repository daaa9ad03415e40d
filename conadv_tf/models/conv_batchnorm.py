"""What residual networks are made of: a convolution, split batch norm and perhaps a ReLU, in the forms that cost least.

Batch norm with moving statistics is folded into the kernel. Where XLA compiles, a convolution that widens has its
statistics from its inputs (expansion.py), and the pooling of an ImageNet stem comes ahead of its batch norm.
"""

import tensorflow as tf
import tf_keras

from conadv_tf.models import expansion, moved, xla
from conadv_tf.models.split_batchnorm import SplitBatchNormalization


class ConvBatchNorm(tf_keras.layers.Layer):
    """Convolution without bias, split BN and, unless `relu` is False, a ReLU; in the dtype of its inputs."""

    def __init__(
        self,
        filters: int,
        kernel_size: int,
        strides: int,
        seed: int,
        norm: dict,
        relu: bool = True,
        convolution: type[tf_keras.layers.Conv2D] = tf_keras.layers.Conv2D,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        self.conv = convolution(
            filters,
            kernel_size,
            strides,
            padding="same",
            data_format="channels_last",  # whatever ~/.keras/keras.json says
            use_bias=False,
            kernel_initializer=tf_keras.initializers.VarianceScaling(seed=seed),
            dtype=self.variable_dtype,  # under a mixed policy the kernel would read as already rounded
            name="conv",
        )
        self.norm = SplitBatchNormalization(**norm, dtype=kwargs.get("dtype"), autocast=False, name="norm")
        self.relu = relu

    def build(self, input_shape) -> None:
        with tf.name_scope(self.conv.name):
            self.conv.build(input_shape)
        with tf.name_scope(self.norm.name):
            self.norm.build((*input_shape[:-1], self.conv.filters))
        super().build(input_shape)

    def _expands(self, inputs: tf.Tensor) -> bool:
        """Tells whether the layer is a pointwise convolution to more channels, of inputs that expansion.py is for."""
        conv = self.conv
        widens = conv.kernel_size == conv.strides == (1, 1) and inputs.shape[-1] < conv.filters
        return widens and inputs.dtype in expansion.DTYPES

    def call(self, inputs: tf.Tensor, norm_call: dict) -> tf.Tensor:
        moving = self.norm.frozen or norm_call["mode"] == "moving"
        through = self._folded if moving else self._normalized
        outputs = through(inputs, norm_call)
        return tf.nn.relu(outputs) if self.relu else outputs

    def _normalized(self, inputs: tf.Tensor, norm_call: dict) -> tf.Tensor:
        kernel = tf.cast(moved.read(self.conv.kernel), inputs.dtype)
        if self._expands(inputs) and self.norm.is_local(norm_call) and xla.is_compiling():
            return self._expanded(inputs, kernel, norm_call)
        return self.norm(self.conv.convolution_op(inputs, kernel), **norm_call)

    def _expanded(self, inputs: tf.Tensor, kernel: tf.Tensor, norm_call: dict) -> tf.Tensor:
        """Convolution and batch norm in one, without the wide intermediate (expansion.py)."""
        branch, norm = norm_call["branch"], self.norm
        gamma, beta = norm.gamma_and_beta(branch)
        outputs, mean, variance = expansion.expand_and_normalize(inputs, kernel, gamma, beta, norm.epsilon)
        norm.learn(mean, variance, branch, norm_call["update_statistics"])
        return outputs

    def _folded(self, inputs: tf.Tensor, norm_call: dict) -> tf.Tensor:
        """Convolution and batch norm with moving statistics: a scaled kernel and a bias, one pass less."""
        scale, shift = self.norm.moving_affine(norm_call["branch"])
        kernel = tf.cast(tf.cast(moved.read(self.conv.kernel), tf.float32) * scale, inputs.dtype)
        return tf.nn.bias_add(self._biased(self.conv.convolution_op(inputs, kernel)), tf.cast(shift, inputs.dtype))

    def _biased(self, values: tf.Tensor) -> tf.Tensor:
        """What of a folded convolution the bias is added to."""
        return values


class PooledConvBatchNorm(ConvBatchNorm):
    """ConvBatchNorm and a max-pooling of 3×3 values, stride 2, which comes first wherever that is cheaper.

    Where γ ≥ 0, batch norm and ReLU keep the order of a channel's values, so that the largest of a window is the same
    before and after them, and a quarter as many values are left to normalise. A negative γ is turned: the column of
    the kernel changes its sign, and γ with it. The statistics are those of all of the convolution's values.
    """

    def _normalized(self, inputs: tf.Tensor, norm_call: dict) -> tf.Tensor:
        if not xla.is_compiling():
            return _pooled(super()._normalized(inputs, norm_call))  # one kernel of TensorFlow's normalises faster
        gamma, beta = self.norm.gamma_and_beta(norm_call["branch"])
        sign = tf.where(gamma < 0.0, -1.0, 1.0)
        kernel = tf.cast(moved.read(self.conv.kernel) * sign, inputs.dtype)
        values = self.conv.convolution_op(inputs, kernel)
        mean, variance = self.norm.measure(values, sign, norm_call)
        scale = sign * gamma * tf.math.rsqrt(variance + self.norm.epsilon)
        return tf.cast((tf.cast(_pooled(values), tf.float32) - mean) * scale + beta, inputs.dtype)

    def _biased(self, values: tf.Tensor) -> tf.Tensor:
        return _pooled(values)


def _pooled(values: tf.Tensor) -> tf.Tensor:
    return tf.nn.max_pool2d(values, 3, 2, "SAME")
