"""The 7×7 stride-2 convolution of the ImageNet stem, with a cheap gradient with respect to the images.

An attack needs that gradient; as a transposed convolution onto 3 channels it alone costs a quarter of a whole
training step on a TPU (docs/method.md). Here it is a plain convolution onto 4 × 4 pixels side by side, 48 channels.
"""

import tensorflow as tf
import tf_keras

from conadv_tf.models import xla

TAPS, STRIDE, BLOCK = 7, 2, 4
_BEFORE = 2  # SAME padding ahead of the first pixel


class StemConvolution(tf_keras.layers.Conv2D):
    """Conv2D with 7×7 taps, stride 2 and SAME padding, on images whose sides are multiples of 4."""

    def convolution_op(self, inputs, kernel):
        @tf.custom_gradient
        def convolution(images, kernel):
            def gradient(by_outputs):
                by_kernel = tf.raw_ops.Conv2DBackpropFilter(
                    input=images,
                    filter_sizes=kernel.shape,
                    out_backprop=by_outputs,
                    strides=[1, STRIDE, STRIDE, 1],
                    padding="SAME",
                )
                return image_gradient(by_outputs, kernel), by_kernel

            return tf.nn.conv2d(images, kernel, STRIDE, "SAME"), gradient

        return convolution(inputs, tf.convert_to_tensor(kernel))  # a variable would be the function's own


def image_gradient(by_outputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """[rows, H/2, W/2, F] and the kernel [7, 7, C, F] → the gradient with respect to images, [rows, H, W, C].

    Pixel 4I + r of a block I hears of the outputs 2I − 2 … 2I + 2, of the output 2I − 2 + t through tap r + 6 − 2t.
    """
    _, _, channels, filters = kernel.shape
    taps_heard = TAPS // STRIDE + 2
    # [t, r]: the kernel reversed, beginning 2t − 6 taps on; zeros where there is no such tap.
    reach = TAPS + BLOCK
    padded = tf.pad(kernel, [[reach, reach], [reach, reach], [0, 0], [0, 0]])
    taps = [[reach + r + TAPS - 1 - STRIDE * t for r in range(BLOCK)] for t in range(taps_heard)]
    placed = tf.gather(tf.gather(padded, taps, axis=0), taps, axis=2)  # [t, r, t', r', C, F]
    placed = tf.transpose(placed, [0, 2, 5, 1, 3, 4])
    placed = tf.reshape(placed, [taps_heard, taps_heard, filters, BLOCK * BLOCK * channels])
    padding = [[0, 0], [_BEFORE, 1], [_BEFORE, 1], [0, 0]]
    blocks = tf.nn.conv2d(by_outputs, placed, STRIDE, padding)
    height, width = (BLOCK * side for side in blocks.shape[1:3])
    blocks = tf.reshape(blocks, [-1, height // BLOCK, width // BLOCK, BLOCK, BLOCK, channels])
    pixels = tf.reshape(tf.transpose(blocks, [0, 1, 3, 2, 4, 5]), [-1, height, width, channels])
    # Whoever takes the gradient widens it to float32; without a barrier that would come before the change of order.
    return xla.barrier([pixels], [])[0][0]
