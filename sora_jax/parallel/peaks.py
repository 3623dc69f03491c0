"""Peak rates of known accelerators."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Rates of one JAX device, in bytes and FLOPs per second, as the vendor states them, per chip:

  v5e    197 TFLOP/s, HBM 819 GB/s, links 400 GB/s both ways over 4, network 6.4 Tb/s over a pod of 256
  v5p    459 TFLOP/s, HBM 2,765 GB/s, links 1,200 GB/s both ways over 6, network 50 Gb/s
  v6e    918 TFLOP/s, HBM 1,638 GB/s, links 800 GB/s both ways over 4, network 100 Gb/s
  tpu7x  2,307 TFLOP/s, HBM 7,380 GB/s, links 1,200 GB/s both ways over 6, network 100 Gb/s; two devices

  Sources: docs.cloud.google.com/tpu/docs/v5e, .../v5p, .../v6e, .../tpu7x (network of v6e: the last). Not on
  those pages: that the links of a 3D torus are 6, and that a dim closes from 16 (v5e, v6e) or 4 chips on.
  `hbm_bytes` is what the compiler may use, as its own message on running out states it.
  """

  generation: str  # as in a topology name
  flops: float  # dense bf16
  hbm_bytes: int
  hbm_rate: float
  link_rate: float  # one torus link, one way
  torus_dims: int
  wrap_from: int  # sizes of a torus dim that close to a ring: multiples of this
  network_rate: float  # between slices, per device


CHIPS = {
  chip.generation: chip
  for chip in (
    Chip(
      generation="v5e", flops=197e12, hbm_bytes=int(15.75 * 2**30), hbm_rate=8.19e11, link_rate=5e10,
      torus_dims=2, wrap_from=16, network_rate=3.125e9,
    ),
    Chip(
      generation="v5p", flops=459e12, hbm_bytes=int(95.74 * 2**30), hbm_rate=2.765e12, link_rate=1e11,
      torus_dims=3, wrap_from=4, network_rate=6.25e9,
    ),
    Chip(
      generation="v6e", flops=918e12, hbm_bytes=int(31.25 * 2**30), hbm_rate=1.638e12, link_rate=1e11,
      torus_dims=2, wrap_from=16, network_rate=12.5e9,
    ),
    Chip(
      generation="tpu7x", flops=2307e12 / 2, hbm_bytes=int(94.75 * 2**30), hbm_rate=7.38e12 / 2,
      link_rate=5e10, torus_dims=3, wrap_from=4, network_rate=6.25e9,
    ),
  )
}  # fmt: skip


# Start of device_kind -> dense bf16 FLOP/s of one JAX device by the vendor's data sheet; first match counts.
PEAK_BF16 = (
  ("TPU v6 lite", CHIPS["v6e"].flops),
  ("TPU v5 lite", CHIPS["v5e"].flops),
  ("TPU v5", CHIPS["v5p"].flops),
  ("TPU v4", 275e12),
  ("NVIDIA H200", 989e12),
  ("NVIDIA H100 PCIe", 756e12),
  ("NVIDIA H100", 989e12),
  ("NVIDIA A100", 312e12),
  ("NVIDIA L4", 121e12),
)


def peak_flops(devices: list[jax.Device]) -> float | None:
  """Sum of the devices' peaks; None where one is not known."""
  rates = [next((rate for kind, rate in PEAK_BF16 if d.device_kind.startswith(kind)), None) for d in devices]
  return None if None in rates or not rates else sum(rates)
