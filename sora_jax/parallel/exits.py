"""Exit codes: what a launcher may read from how a run ended (docs/faults.md)."""

DONE = 0
FAULT = 1  # a fault of the program, or a last checkpoint that could not be written: do not restart
USER_ERROR = 2  # a mistake in what was asked, or hosts that differ: do not restart
PREEMPTED = 42  # told to stop; saved: restart
HANG = 43  # no progress, or no data to be had: restart
DIVERGED = 44  # not finite, retries spent: do not restart
PEER_LOST = 134  # another process died (as an abort of the runtime itself exits): restart


class PeerLostError(RuntimeError):
  """Another process is gone."""
