"""The 7×7 stride-2 convolution of the ImageNet stem, with a cheap gradient with respect to the images.

An attack needs that gradient; as a transposed convolution onto 3 channels it alone costs a quarter of a whole
training step on a TPU (docs/tpu.md). Here it is a plain convolution onto blocks of 4 × 8 pixels side by side, 96
channels: of fewer the matrix unit of a TPU would be the emptier. Where no 8 divides the width, blocks are of 4 × 4.
"""

import tensorflow as tf
import tf_keras

from conadv_tf.models import xla

TAPS, STRIDE, BLOCK = 7, 2, 4
_BEFORE = 2  # SAME padding ahead of the first pixel
_REACH = TAPS  # zeros on each side of a kernel, as far as the taps of a block reach


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

    It is computed for blocks of pixels, a channel for each pixel of a block and each of C.
    """
    *_, channels, filters = kernel.shape
    height, width = (STRIDE * side for side in by_outputs.shape[1:3])
    tall, wide = BLOCK, 2 * BLOCK if width % (2 * BLOCK) == 0 else BLOCK
    down, across = _taps(tall), _taps(wide)
    padded = tf.pad(kernel, [[_REACH, _REACH], [_REACH, _REACH], [0, 0], [0, 0]])
    placed = tf.gather(tf.gather(padded, down, axis=0), across, axis=2)  # [t, r, t', r', C, F]
    placed = tf.transpose(placed, [0, 2, 5, 1, 3, 4])
    placed = tf.reshape(placed, [len(down), len(across), filters, tall * wide * channels])
    padding = [[0, 0], [_BEFORE, 1], [_BEFORE, 1], [0, 0]]
    blocks = tf.nn.conv2d(by_outputs, placed, [tall // STRIDE, wide // STRIDE], padding)
    blocks = tf.reshape(blocks, [-1, height // tall, width // wide, tall, wide, channels])
    pixels = tf.reshape(tf.transpose(blocks, [0, 1, 3, 2, 4, 5]), [-1, height, width, channels])
    # Whoever takes the gradient widens it to float32; without a barrier that would come before the change of order.
    return xla.barrier([pixels], [])[0][0]


def _taps(block: int) -> list[list[int]]:
    """[t][r]: the row of the padded kernel through which pixel r of a block hears of the t-th output it hears of.

    Pixel block · I + r hears of the outputs block / 2 · I − 2 + t, through tap r + 6 − 2t; beside the kernel's own
    taps there are zeros.
    """
    heard = (block + TAPS - 1) // STRIDE
    return [[_REACH + r + TAPS - 1 - STRIDE * t for r in range(block)] for t in range(heard)]
