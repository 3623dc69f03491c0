"""All hosts must run the same thing: versions, code and config are compared before anything is computed."""

import hashlib
import json
import os
import platform
from collections import Counter
from importlib import metadata
from pathlib import Path

import jax

from sora_jax.parallel import cluster, exits

PACKAGES = (
  "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "av",
)  # fmt: skip
COMPILER = (
  "XLA_FLAGS",
  "LIBTPU_INIT_ARGS",
)  # with other flags hosts may wait for each other for ever
ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ("sora_jax", "data_pipelines", "configs")
WAIT_S = 300  # for the slowest host to start


class DisagreementError(ValueError):
  """Hosts that would not compute the same."""


def facts(config: dict, extra: dict | None = None) -> dict[str, object]:
  """What must be equal on all hosts; `config` is flat."""
  versions = {name: _version(name) for name in PACKAGES}
  return {
    "python": platform.python_version(),
    **versions,
    "commit": os.environ.get("SORA_JAX_COMMIT", ""),
    "code": source_hash(),
    **{name: os.environ.get(name, "") for name in COMPILER},
    **{f"config.{key}": value for key, value in config.items()},
    **(extra or {}),
  }


def _version(package: str) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return "not installed"


def source_hash(root: Path = ROOT) -> str:
  """Of every Python file of the project: a checkout with local changes differs, whatever its commit."""
  total = hashlib.blake2b(digest_size=6)
  for folder in SOURCES:
    for path in sorted((root / folder).rglob("*.py")):
      total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
  return total.hexdigest()


def differences(by_host: dict[int, dict[str, object]]) -> list[str]:
  """One clause for each fact that is not the same everywhere, naming the hosts in the minority."""
  found = []
  keys = {key: None for facts in by_host.values() for key in facts}  # in their order
  for key in keys:
    values = {host: json.dumps(facts.get(key)) for host, facts in sorted(by_host.items())}
    if len(set(values.values())) == 1:
      continue
    counts = Counter(values.values())
    # The first host breaks a tie.
    usual = max(counts, key=lambda v: (counts[v], v == next(iter(values.values()))))
    odd: dict[str, list[int]] = {}
    for host, value in values.items():
      if value != usual:
        odd.setdefault(value, []).append(host)
    for value, hosts in odd.items():
      names = f"host{'s' * (len(hosts) > 1)} {', '.join(map(str, hosts[:8]))}{', ...' * (len(hosts) > 8)}"
      found.append(f"{key} is {value} on {names}, {usual} on the others")
  return found


def check(mine: dict[str, object]) -> None:
  """Raises on every host where any of them differs; needs no device, which versions may break."""
  client, (index, count) = cluster.client(), cluster.size()
  if client is None or count == 1:
    return
  client.key_value_set(f"sora_jax_agree/facts/{index}", json.dumps(mine))
  if index == 0:
    by_host = {
      host: json.loads(_wait(client, f"sora_jax_agree/facts/{host}", f"host {host} did not start"))
      for host in range(count)
    }
    client.key_value_set("sora_jax_agree/verdict", json.dumps(differences(by_host)))
  verdict = json.loads(_wait(client, "sora_jax_agree/verdict", "host 0 did not start"))
  client.wait_at_barrier("sora_jax_agree", WAIT_S * 1000)  # all have read it: now host 0 may go
  if verdict:
    more = f" (and {len(verdict) - 5} more)" if len(verdict) > 5 else ""
    raise DisagreementError(f"the hosts differ: {'; '.join(verdict[:5])}{more}; start all from the same")


def _wait(client, key: str, otherwise: str) -> str:
  try:
    return client.blocking_key_value_get(key, WAIT_S * 1000)
  except jax.errors.JaxRuntimeError as error:
    text = f"{otherwise} within {WAIT_S} s ({str(error).splitlines()[0][:100]})"
    raise exits.PeerLostError(text) from None
