"""The GPU backend without a GPU: what it asks of cuDNN, when it declines, what then runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.nn import attention_gpu
from sora_jax.nn.attention import attend
from sora_jax.nn.attention_chunked import attend_chunked
from sora_jax.nn.attention_dense import attend_dense
from tests.attention_test import SELF, inputs, packing, value_and_grads


def segments_from(lengths, firsts, row_tokens):
  """What the offsets say, written out: queries and keys of segment n get number n."""
  B, N = lengths.shape
  assert firsts.shape == (B, N + 1)
  out = np.zeros((B, row_tokens), np.int32)
  for b, n in np.ndindex(B, N):
    assert (lengths[b, n] == -1) == (firsts[b, n] == -1)
    if lengths[b, n] >= 0:
      out[b, firsts[b, n] : firsts[b, n] + lengths[b, n]] = n + 1
  assert (firsts[:, N] == -1).all()
  return out


def test_offsets_of_self_attention():
  for name, (segment, _) in SELF.items():
    num = max(int(segment.max()), 1)
    q_lengths, k_lengths, q_firsts, k_firsts = map(np.asarray, attention_gpu.offsets(segment, segment, num))
    assert q_lengths.shape[1] >= 2
    np.testing.assert_array_equal(segments_from(q_lengths, q_firsts, segment.shape[1]), segment, name)
    np.testing.assert_array_equal(q_lengths, k_lengths)
    np.testing.assert_array_equal(q_firsts, k_firsts)


def test_offsets_leave_out_segments_without_keys():
  q_segment, k_segment = packing([9, 11, 1, 12], [], total=33), packing([3, 0, 5], [4], total=12)
  q_lengths, k_lengths, q_firsts, k_firsts = map(np.asarray, attention_gpu.offsets(q_segment, k_segment, 5))
  np.testing.assert_array_equal(q_lengths, [[9, -1, 1, -1, -1], [-1] * 5])
  np.testing.assert_array_equal(q_firsts, [[0, -1, 20, -1, -1, -1], [-1] * 6])
  np.testing.assert_array_equal(k_lengths, [[3, -1, 5, -1, -1], [-1] * 5])
  np.testing.assert_array_equal(k_firsts, [[0, -1, 3, -1, -1, -1], [-1] * 6])


def test_declines_with_the_reason():
  assert "number of samples" in attention_gpu.refusal(jnp.bfloat16, 64, 0)
  assert "float32" in attention_gpu.refusal(jnp.float32, 64, 4)
  assert "heads of 36" in attention_gpu.refusal(jnp.bfloat16, 36, 4)
  assert "backend is cpu" in attention_gpu.refusal(jnp.bfloat16, 72, 4)


def test_without_the_private_module(monkeypatch):
  attention_gpu._refusal_of_device.cache_clear()
  monkeypatch.setattr(attention_gpu, "cudnn", None)
  assert "jax._src" in attention_gpu.refusal(jnp.bfloat16, 64, 4)
  attention_gpu._refusal_of_device.cache_clear()


def test_a_failing_device_is_a_reason_not_an_error(monkeypatch):
  """As on a machine that claims a GPU: whatever the private module raises, the answer is a refusal."""
  attention_gpu._refusal_of_device.cache_clear()
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert "trying it failed" in attention_gpu.refusal(jnp.bfloat16, 64, 4)
  monkeypatch.undo()
  attention_gpu._refusal_of_device.cache_clear()


def test_chunked_runs_where_cudnn_does_not():
  args = (*inputs(*SELF["uneven"]), *SELF["uneven"])
  run = functools.partial(attend, backend="gpu", num_segments=4)
  for got, want in zip(value_and_grads(run, *args), value_and_grads(attend_chunked, *args)):
    np.testing.assert_array_equal(got, want)


def test_trial_tells_right_from_wrong():
  def right(*args, num_segments):
    return attend_dense(*args)

  def leaks(q, k, v, q_segment, k_segment, *, num_segments):
    return attend_dense(q, k, v, np.minimum(q_segment, 2), np.minimum(k_segment, 2))

  assert attention_gpu.trial(right) is None
  assert "its o differs" in attention_gpu.trial(leaks)


@pytest.mark.skipif(attention_gpu.cudnn is None, reason="this jax has no cuDNN module")
def test_lowers_to_the_packed_custom_calls(monkeypatch):
  """StableHLO for CUDA with the checks for a device taken out: the calls and operands are cuDNN's."""
  monkeypatch.setattr(attention_gpu.cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(attention_gpu.cudnn, "check_compute_capability", lambda capability: True)
  monkeypatch.setattr(attention_gpu.cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
  x = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
  segment = jax.ShapeDtypeStruct((2, 256), jnp.int32)

  def total(q, k, v, s):
    return attention_gpu.attend_cudnn(q, k, v, s, s, num_segments=5).astype(jnp.float32).sum()

  grad = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
  text = grad.trace(x, x, x, segment).lower(lowering_platforms=("cuda",)).as_text()
  assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text
  assert "tensor<2x5xi32>" in text and "tensor<2x6xi32>" in text
