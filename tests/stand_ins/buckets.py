"""gcsfuse and mountpoint: a mounted bucket is a link to a folder that all workers share."""

import os
import sys
from pathlib import Path

from tests.stand_ins.state import STATE, fail, options, record, scenario


def main(argv: list[str]) -> None:
  record(os.environ["TOOL"], argv)
  plain = options(argv)[0]
  mount = Path(plain[-1])
  if os.environ["TOOL"] == "mountpoint":
    sys.exit(0 if mount.is_symlink() else 32)
  if plain[0] in scenario("forbidden_buckets", []):
    fail("googleapi: Error 403: no storage.objects.list access")
  bucket = STATE / "buckets" / plain[0]
  bucket.mkdir(parents=True, exist_ok=True)
  mount.rmdir()
  mount.symlink_to(bucket)


if __name__ == "__main__":
  main(sys.argv[1:])
