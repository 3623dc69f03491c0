"""A byte-level BPE vocabulary trained on the captions at hand, so that nothing has to be downloaded."""

import dataclasses
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from sora_jax.types import START_ID

SPECIAL = ["[PAD]", "[NULL]", "[START]"]  # types.PAD_ID, NULL_ID, START_ID
SMALLEST = 256 + len(SPECIAL)  # every byte, so that any text can be encoded
_WORD = re.compile(r"\w+(?:['’]\w+)*")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """text -> token ids, [START] first; picklable, so that worker processes can hold it."""

  json: str
  max_tokens: int

  def __post_init__(self):
    object.__setattr__(self, "_tokenizer", tokenizers.Tokenizer.from_str(self.json))

  def __reduce__(self):
    return (Tokenizer, (self.json, self.max_tokens))

  @property
  def vocab_size(self) -> int:
    return self._tokenizer.get_vocab_size()

  def __call__(self, text: str) -> list[int]:
    return [START_ID, *self._tokenizer.encode(text).ids][: self.max_tokens]

  def decode(self, ids: Iterable[int]) -> str:
    return self._tokenizer.decode([i for i in ids if i > START_ID])

  def save(self, path: Path) -> None:
    path.write_text(self.json, encoding="utf-8")


def train(captions: Iterable[str], *, vocab_size: int, max_tokens: int) -> Tokenizer:
  """Learns at most `vocab_size` pieces; every byte is one of them, so any text can be encoded."""
  if vocab_size < SMALLEST:
    raise ValueError(f"text.vocab_size={vocab_size} is below {SMALLEST}, the bytes and special tokens")
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()]
  )
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=SPECIAL,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(captions, trainer)
  return Tokenizer(tokenizer.to_str(), max_tokens)


def words(text: str) -> list[str]:
  """As the vocabulary takes them: in lower case, composed."""
  return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def load(path: Path, *, max_tokens: int) -> Tokenizer:
  return Tokenizer(path.read_text(encoding="utf-8"), max_tokens)
