"""Peak rates of known accelerators."""

import jax

# Start of device_kind -> dense bf16 FLOP/s of one JAX device by the vendor's data sheet; first match counts.
PEAK_BF16 = (
  ("TPU v6 lite", 918e12),
  ("TPU v5 lite", 197e12),
  ("TPU v5", 459e12),
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
