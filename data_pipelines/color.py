"""Pixel formats to 8-bit RGB on white."""

import numpy as np
from PIL import Image

_PQ, _HLG = 16, 18  # transfer characteristics as numbered in ITU-T H.273
HDR_TRANSFERS = (_PQ, _HLG)
_WHITE_NITS = 203.0  # diffuse white of HDR video, ITU-R BT.2408
_HLG_NITS = 1000.0  # of a display, where the signal does not say
_PEAK_NITS = 4000.0  # becomes white; brighter is cut off
_BT2020_TO_BT709 = np.array(
  [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)


def tone_map(rgb48: np.ndarray, transfer: int) -> np.ndarray:
  """16-bit PQ or HLG in BT.2020 primaries to 8-bit sRGB.

  Highlights are rolled off by extended Reinhard on the largest channel, so that none is cut off and hues
  stay; colours beyond BT.709 are mixed with grey of their own light.
  """
  x = rgb48.astype(np.float32) / 65535.0
  weights = np.array([0.2627, 0.678, 0.0593], np.float32)
  if transfer == _PQ:  # SMPTE ST 2084
    p = x ** np.float32(32 / 2523)
    nits = 10000.0 * (np.maximum(p - 0.8359375, 0) / (18.8515625 - 18.6875 * p)) ** np.float32(16384 / 2610)
  else:  # ITU-R BT.2100, a display of 1000 nits
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(x <= 0.5, x * x / 3, (np.exp((x - c) / a) + b) / 12)
    nits = _HLG_NITS * scene * np.maximum(scene @ weights, 1e-6)[..., None] ** 0.2
  light = nits / _WHITE_NITS
  top = np.maximum(light.max(-1, keepdims=True), 1e-6)
  light = np.clip(light * (1 + top / (_PEAK_NITS / _WHITE_NITS) ** 2) / (1 + top), 0, 1)
  grey = (light @ weights)[..., None]
  light = light @ _BT2020_TO_BT709.T
  low, high = light.min(-1, keepdims=True), light.max(-1, keepdims=True)
  kept = np.minimum(grey / np.maximum(grey - low, 1e-6), (1 - grey) / np.maximum(high - grey, 1e-6))
  light = np.clip(grey + np.clip(kept, 0, 1) * (light - grey), 0, 1)
  srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
  return np.round(255 * srgb).astype(np.uint8)


def on_white(rgba: np.ndarray) -> np.ndarray:
  alpha = rgba[..., 3:].astype(np.float32) / 255
  return np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def to_rgb_image(image: Image.Image) -> Image.Image:
  """Any Pillow mode to RGB: 16 bits scaled down, transparency on white."""
  if image.mode.startswith("I") or image.mode == "F":
    values = np.asarray(image, np.float32)
    top = 65535.0 if image.mode != "F" and values.max(initial=0) > 255 or "16" in image.mode else 255.0
    if image.mode == "F" and values.max(initial=0) <= 1:
      top = 1.0
    return Image.fromarray(np.clip(values * (255 / top), 0, 255).astype(np.uint8)).convert("RGB")
  if "A" in image.mode.upper() or "transparency" in image.info:
    return Image.fromarray(on_white(np.asarray(image.convert("RGBA"))))
  return image.convert("RGB")
