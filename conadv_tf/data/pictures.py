"""Encoded images: decoded, and told apart by their first bytes."""

import tensorflow as tf

_FORMATS = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*"),
}
DECODED = ("JPEG", "PNG", "BMP", "WebP", "GIF")


def decode_image(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes a JPEG, PNG, BMP, WebP or the first picture of a GIF to uint8 [H, W, 3]; fails at run time for others."""
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])


def format_of(encoded: bytes) -> str | None:
    """The name of an image's format, by its first bytes; None for what is not known to be an image."""
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        animated = encoded[12:16] == b"VP8X" and bool(encoded[20:21]) and encoded[20] & 2  # a flag of its header
        return "animated WebP" if animated else "WebP"
    return next((name for name, magics in _FORMATS.items() if encoded.startswith(magics)), None)


def fault(encoded: bytes) -> str:
    """What is wrong with an image that does not decode, for a line about its record."""
    found = format_of(encoded)
    if found in DECODED:
        return f"corrupt {found}"
    *others, last = DECODED
    what = f"{'an' if found[0] == 'a' else 'a'} {found}" if found else "no image" if encoded else "an empty image"
    return f"{what}, where {', '.join(others)} or {last} is decoded"
