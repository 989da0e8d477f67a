"""Decoding of one image file into a square array."""

from gridcap.common.errors import InvalidImageError
from gridcap.common.image.decode import decoder_name, load_rgb
from gridcap.common.image.formats import MAX_PIXELS, open_image
from gridcap.common.image.path import image_path
from gridcap.common.image.reader import START_OF_SCAN, ImageReader
from gridcap.common.image.resize import (
    LETTERBOX_GRAY,
    load_image,
    load_view,
    load_views,
    make_square,
    make_views,
    min_decoded_side,
)

__all__ = [
    "LETTERBOX_GRAY",
    "MAX_PIXELS",
    "START_OF_SCAN",
    "ImageReader",
    "InvalidImageError",
    "decoder_name",
    "image_path",
    "load_image",
    "load_rgb",
    "load_view",
    "load_views",
    "make_square",
    "make_views",
    "min_decoded_side",
    "open_image",
]
