"""Tables and plans as people write them: read where they can be, refused in one line where not."""

import json

import numpy as np
import pytest

from sora_jax import scaling_laws
from sora_jax.scaling import canvas, ladder, report, table

HEAD = "params,tokens,loss"
NUMBERS = [(n, d, 1.8 + 400 / n**0.34 + 400 / d**0.28) for n in (1e6, 1e7, 1e8) for d in (1e8, 1e9, 1e10)]


def written(path, mark=",", rows=NUMBERS):
  path.write_text("\n".join([HEAD.replace(",", mark), *(mark.join(map(str, row)) for row in rows)]))
  return path


@pytest.mark.parametrize("mark", [";", "\t", ", "])
def test_other_marks_between_cells(tmp_path, mark):
  plain, other = table.read(written(tmp_path / "a.csv")), table.read(written(tmp_path / "b.csv", mark))
  np.testing.assert_array_equal(plain.loss, other.loss)
  np.testing.assert_array_equal(plain.compute, other.compute)


def test_a_row_of_too_many_cells_is_refused(tmp_path):
  path = written(tmp_path / "a.csv", rows=[(1, 2, 3, ""), ("1e9", 2, 3, 5)])
  with pytest.raises(ValueError, match="row 3: 4 cells, the header has 3"):
    table.read(path)


def test_what_does_not_vary_has_no_law(tmp_path):
  flat = table.read(written(tmp_path / "a.csv", rows=[(n, d, 2.0) for n, d, _ in NUMBERS]))
  with pytest.raises(ValueError, match="all 9 runs have loss 2: the law power needs it to vary"):
    report.fit("power", flat)
  rates = table.Table(loss=np.ones(9), params=flat.params, tokens=flat.tokens, lr=np.full(9, 1e-3))
  with pytest.raises(ValueError, match="all 9 runs have lr 0.001: the law lr needs it to vary"):
    report.fit("lr", rates)


def test_what_is_no_law_says_so(tmp_path):
  def notes(rows, law):
    runs = table.read(written(tmp_path / "a.csv", rows=rows))
    return "; ".join(report.summary(law, runs, report.fit(law, runs), num=0, seed=0)["notes"])

  rising = [(n, d, 2 + 0.1 * np.log(n * d)) for n, d, _ in NUMBERS]
  for law in ("power", "chinchilla"):
    assert "does not fall as compute grows" in notes(rising, law)
    assert not notes(NUMBERS, law)
  assert "alpha is at the end of what is searched" in notes(rising, "chinchilla")


RUN = {
  "name": "c1_w16", "budget": 1.0, "compute": 1.0, "params": 1, "tokens": 1, "steps": 7, "seconds": 1.0,
  "overrides": {"train.num_steps": 7},
}  # fmt: skip


@pytest.mark.parametrize(
  "change, says",
  [
    ({"name": "../x"}, "a run is named '../x': letters, digits"),
    ({"stepz": 3}, "run c1_w16: no key stepz; there are name, budget"),
    ({"steps": 8}, "run c1_w16: steps is 8, its override train.num_steps is 7"),
    (None, "run c1_w16: overrides is missing"),
  ],
)
def test_a_plan_edited_wrongly(tmp_path, change, says):
  run = {k: v for k, v in RUN.items() if k != "overrides"} if change is None else RUN | change
  head = {"kind": "isoflop", "config": "a.py", "config_flags": [], "hardware": ""}
  (tmp_path / "plan.json").write_text(json.dumps(head | {"runs": [RUN | {"name": "other"}]}))
  assert ladder.read(tmp_path / "plan.json").runs[0].steps == 7
  (tmp_path / "plan.json").write_text(json.dumps(head | {"runs": [run]}))
  with pytest.raises(ValueError, match=says) as error:
    ladder.read(tmp_path / "plan.json")
  assert "\n" not in str(error.value)


def test_a_wide_interval_does_not_flatten_the_runs():
  _, axes = canvas.figure()
  axes.set_yscale("log")
  axes.fill_between([1, 2], [1e-9] * 2, [1e9] * 2)
  canvas.hold_y(axes, np.array([1.0, 2.0]), np.array([1.5]))
  np.testing.assert_allclose(axes.get_ylim(), (0.5, 4.0))


def test_what_is_printed_are_the_letters_of_the_law(tmp_path):
  runs = table.read(written(tmp_path / "a.csv"))
  for num in (0, 20):
    fitted = report.fit("power", runs, num=num)
    text = scaling_laws.describe(report.summary("power", runs, fitted, num=num, seed=0))
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["a", "b", "largest"]
