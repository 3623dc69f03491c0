"""Laws of batch and learning rate, the linear probe, and ability by compute."""

import csv

import numpy as np
import pytest

from sora_jax.evaluation import probe
from sora_jax.scaling import abilities, bootstrap, figures, hyper, report, table
from sora_jax.scaling.table import Table

# Yin et al. 2024, with T and N in billions
BATCH = {"k": 2.18e4, "a": 0.81, "b": 0.19}
RATE = {"k": 2e-4, "a": -0.045, "b": -0.162}
TRUTH = {"batch": BATCH, "lr": RATE}
T, N = (grid.ravel() for grid in np.meshgrid(np.geomspace(0.2, 60, 6), np.geomspace(0.1, 10, 5)))


def best(law: str) -> np.ndarray:
  c = TRUTH[law]
  return c["k"] * T ** c["a"] * N ** c["b"]


def table_of_best(law: str, seed: int = 0, noise: float = 0.01) -> Table:
  values = best(law) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(T)))
  return Table(loss=np.ones_like(T), params=N, tokens=T, **{law: values})


def sweep(law: str, seed: int = 0, noise: float = 0.0005) -> Table:
  """Seven values around the best of each cell, which is not one of them."""
  factors = 2.0 ** np.arange(-3, 4) * 1.3
  values = (best(law)[:, None] * factors).ravel()
  bend = np.tile(0.02 * np.log(factors) ** 2, len(T))
  floor = 2 + np.repeat(0.3 * T**-0.2 + 0.2 * N**-0.2, len(factors))
  loss = floor * np.exp(bend + noise * np.random.default_rng(seed).standard_normal(len(values)))
  repeated = {"params": np.repeat(N, len(factors)), "tokens": np.repeat(T, len(factors))}
  return Table(loss=loss, **repeated, **{law: values})


@pytest.mark.parametrize("law", hyper.LAWS)
@pytest.mark.parametrize("make", [table_of_best, sweep])
def test_recovers_the_law(law, make):
  for seed in range(3):
    letters = report.fit(law, make(law, seed)).letters()
    # An exponent as small as that of the rate on tokens is known to its size, not to a twentieth of itself.
    assert abs(letters["k"] / TRUTH[law]["k"] - 1) < 0.05
    for letter in "ab":
      assert abs(letters[letter] - TRUTH[law][letter]) < max(0.05 * abs(TRUTH[law][letter]), 0.006)


def test_intervals_cover():
  hits = dict.fromkeys(BATCH, 0)
  for seed in range(200):
    samples = report.fit("batch", table_of_best("batch", seed), num=200, seed=seed).sampled_letters()
    for letter, value in BATCH.items():
      low, high = bootstrap.interval(samples[letter])
      hits[letter] += low <= value <= high
  assert all(0.85 <= count / 200 <= 0.95 for count in hits.values()), hits


def test_largest_cell_is_held_out():
  runs = table_of_best("batch")
  missed = report.held_out("batch", runs)
  assert missed["tokens"] == pytest.approx(T.max()) and missed["relative_error"] < 0.05
  runs.batch[np.argmax(N * T)] *= 3
  assert report.held_out("batch", runs)["predicted"] == pytest.approx(missed["predicted"], rel=1e-9)


def test_too_little_is_refused():
  runs = sweep("batch")
  for index, says in (
    (slice(0, 21), "5 or more best values"),
    (slice(0, 42), "needs params that differ"),
    (np.arange(len(runs)) % 7 < 2, "2 values tried, 3 are the least"),
    (np.arange(len(runs)) % 7 < 3, "does not lie among those tried"),
  ):
    with pytest.raises(ValueError, match=says):
      report.fit("batch", runs.rows(np.arange(len(runs))[index]))
  diagonal = table_of_best("batch").rows(np.arange(5) * 7)
  diagonal = Table(
    loss=diagonal.loss, params=diagonal.tokens**0.5, tokens=diagonal.tokens, batch=diagonal.batch
  )
  with pytest.raises(ValueError, match="move together"):
    report.fit("batch", diagonal)


def test_reads_settings_only_where_asked_and_draws(tmp_path):
  runs, path = sweep("batch"), tmp_path / "runs.csv"
  names = ("params", "tokens", "batch", "loss")
  table.write(path, {name: [repr(float(v)) for v in getattr(runs, name)] for name in names})
  assert table.read(path).batch is None
  np.testing.assert_array_equal(table.read(path, ("batch",)).batch, runs.batch)
  fitted = report.fit("batch", runs, num=50)
  paths = figures.write("batch", runs, fitted, tmp_path, extrapolate=10)
  assert {p.stem for p in paths} == {"batch_sweep", "batch_law"} and all(
    p.stat().st_size > 500 for p in paths
  )
  result = report.summary("batch", runs, fitted, num=50, seed=0)
  assert set("kab") == set(result["intervals"]) and len(result["optima"]) == len(T)
  path.write_text("params,tokens,batch\n1,2,3\n")
  assert table.read(path, ("batch",)).batch.tolist() == [3]  # a table of best values needs no loss


def clusters(num: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(seed)
  labels = rng.integers(3, size=num)
  centres = np.random.default_rng(9).standard_normal((3, width)) * 3 / width**0.5
  return centres[labels] + rng.standard_normal((num, width)), np.array(["a", "b", "c"])[labels]


@pytest.mark.parametrize("width", [8, 600])  # fewer and more features than clips
def test_probe_learns_what_is_linear_and_nothing_of_noise(width):
  x, y = clusters(300, width, 0)
  other, truth = clusters(300, width, 1)
  space = probe.space(x)
  assert space.of(x).shape[1] <= 301
  fitted = probe.fit(space.of(x), y)
  assert fitted.accuracy(space.of(other), truth) > 0.8
  shuffled = np.random.default_rng(2).permutation(y)
  assert probe.fit(space.of(x), shuffled).accuracy(space.of(other), truth) < 0.5


def test_probe_in_the_span_is_the_probe_in_full():
  x, y = clusters(40, 90, 0)
  space = probe.space(x)
  standard = np.column_stack([(x - space.mean_F) / space.scale_F, np.ones(len(x))])
  small, full = probe.fit_at(space.of(x), y, 0.1), probe.fit_at(standard, y, 0.1)
  np.testing.assert_allclose(space.basis_FR @ small.weights_RK[:-1], full.weights_RK[:-1], atol=1e-3)


def test_ability_curves_show_every_run(tmp_path):
  rows = [
    {"compute": str(c), "loss": str(3 / c + s / 100), "accuracy_colour": str(min(1, c / 8 + s / 50)),
     "accuracy_mean": "0.5", "chance_colour": "0.17", "seed": str(s)}
    for c in (1, 4, 8) for s in range(3)
  ]  # fmt: skip
  abilities.write(rows, tmp_path, where="results.csv")
  with open(tmp_path / "abilities.csv") as file:
    shown = list(csv.DictReader(file))
  assert sum(row["series"] == "colour" for row in shown) == 9
  lowest = [float(row["y"]) for row in shown if row["series"] == "colour of the run of lowest loss"]
  assert lowest == [0.125, 0.5, 1.0]
  with pytest.raises(ValueError, match="results.csv: it has no columns"):
    abilities.write([{"loss": "1"}], tmp_path, where="results.csv")
