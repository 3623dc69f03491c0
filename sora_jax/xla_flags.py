"""python -m sora_jax.xla_flags --generation=v5p

Prints one line, the value of LIBTPU_INIT_ARGS for that chip generation. Does not import jax.
"""

import sys

from absl import app, flags

from sora_jax.parallel.flags import FLAGS as SETS
from sora_jax.parallel.flags import init_args

_GENERATION = flags.DEFINE_string("generation", None, f"Chip generation: {', '.join(SETS)}.")


def main(argv: list[str]) -> int:
  if len(argv) > 1 or not _GENERATION.value:
    print(f"error: --generation=NAME is needed, one of {', '.join(SETS)}", file=sys.stderr)
    return 2
  try:
    print(init_args(_GENERATION.value))
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  app.run(main)
