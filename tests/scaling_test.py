"""Scaling laws: known truths come back, intervals cover them, and data that say nothing are refused."""

import csv
import json
import os
import subprocess
import sys
import xml.dom.minidom
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import optimize

from sora_jax.scaling import bootstrap, figures, isoflop, laws, report, solver, table
from sora_jax.scaling.table import Table
from tests import forked

ROOT = Path(__file__).resolve().parent.parent
NOISE = 0.01
# Zhai et al.'s form, and Hoffmann et al.'s with the constants of Besiroglu et al.
ZHAI = {"a": 0.26, "b": 0.35, "c": 0.09, "d": 0.01}
POWER = {"a": 2.4, "b": 0.05}
CHINCHILLA = {"E": 1.8172, "A": 477.84, "B": 2143.9, "alpha": 0.347313, "beta": 0.367183}
A_OPT = CHINCHILLA["beta"] / (CHINCHILLA["alpha"] + CHINCHILLA["beta"])
COMPUTE = np.geomspace(1e-2, 1e4, 24)


def noisy(loss: np.ndarray, seed: int, noise: float = NOISE) -> np.ndarray:
  return loss * np.exp(noise * np.random.default_rng(seed).standard_normal(loss.shape))


def power_runs(seed: int = 0) -> Table:
  return Table(loss=noisy(POWER["a"] * COMPUTE ** -POWER["b"], seed), compute=COMPUTE)


def zhai_runs(seed: int = 0) -> Table:
  return Table(loss=noisy(ZHAI["a"] * (COMPUTE + ZHAI["d"]) ** -ZHAI["b"] + ZHAI["c"], seed), compute=COMPUTE)


def surface(n: np.ndarray, d: np.ndarray) -> np.ndarray:
  c = CHINCHILLA
  return c["E"] + c["A"] * n ** -c["alpha"] + c["B"] * d ** -c["beta"]


def chinchilla_runs(seed: int = 0, noise: float = NOISE, num: int = 16) -> Table:
  n, d = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e7, 1e11, num), np.geomspace(1e8, 1e12, num)))
  return table.complete(Table(loss=noisy(surface(n, d), seed, noise), params=n, tokens=d))


def isoflop_runs(seed: int = 0, noise: float = NOISE, reach: float = 6.0) -> Table:
  compute = np.repeat(np.geomspace(1e18, 1e21, 6), 8)
  best = 0.0776 * (compute / 6) ** A_OPT
  n = best * np.tile(np.geomspace(1 / reach, reach, 8), 6)
  d = compute / (6 * n)
  return Table(loss=noisy(surface(n, d), seed, noise), params=n, tokens=d, compute=compute)


def curve_runs(seed: int = 0, noise: float = NOISE) -> Table:
  n, d = (g.ravel() for g in np.meshgrid(np.geomspace(5e7, 5e9, 9), np.geomspace(2e8, 4e11, 30)))
  return table.complete(Table(loss=noisy(surface(n, d), seed, noise), params=n, tokens=d))


def off(letters: dict, truth: dict) -> dict:
  return {letter: abs(letters[letter] / value - 1) for letter, value in truth.items()}


def coverage(make, law: str, truth: dict, *, repetitions: int, num: int) -> dict:
  """Share of repetitions whose 90 % interval holds the truth."""
  hits = dict.fromkeys(truth, 0)
  for seed in range(repetitions):
    samples = report.fit(law, make(seed), num=num, seed=seed).sampled_letters()
    for letter, value in truth.items():
      low, high = bootstrap.interval(samples[letter])
      hits[letter] += low <= value <= high
  return {letter: count / repetitions for letter, count in hits.items()}


def test_solver_reaches_least_squares():
  x = np.linspace(-1, 2, 20)
  target = 3 - 2 * x + np.random.default_rng(0).standard_normal(20)

  def model(theta):
    jacobian = np.broadcast_to(np.stack([np.ones_like(x), x], -1), (len(theta), 20, 2))
    return np.einsum("snp,sp->sn", jacobian, theta), jacobian

  box = np.full(2, 100.0)
  theta, cost = solver.minimise(model, target, np.array([[50.0, -50.0], [0.0, 0.0]]), low_P=-box, high_P=box)
  best = np.polyfit(x, target, 1)[::-1]
  np.testing.assert_allclose(theta, [best, best], rtol=1e-6)
  np.testing.assert_allclose(cost, 0.5 * ((target - np.polyval(best[::-1], x)) ** 2).sum(), rtol=1e-9)


@pytest.mark.parametrize("law", laws.LAWS.values(), ids=lambda law: law.name)
def test_derivatives(law):
  rng = np.random.default_rng(1)
  variables = rng.normal(size=(len(law.columns), 7))
  theta = law.starts(variables, rng.normal(size=7))[:1] + 0.1
  _, jacobian = law.evaluate(theta, variables)
  for i in range(theta.shape[1]):
    nudge = np.zeros_like(theta)
    nudge[0, i] = 1e-6
    slope = (law.evaluate(theta + nudge, variables)[0] - law.evaluate(theta - nudge, variables)[0]) / 2e-6
    np.testing.assert_allclose(jacobian[..., i], slope, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_recovers_power_and_saturating(seed):
  assert max(off(laws.fit(laws.POWER, power_runs(seed)).letters(), POWER).values()) < 0.05
  letters = laws.fit(laws.SATURATING, zhai_runs(seed)).letters()
  missed = off(letters, ZHAI)
  assert max(missed[letter] for letter in "abc") < 0.05, missed
  assert 0.1 < letters["d"] / ZHAI["d"] < 10  # the shift: order of magnitude


@pytest.mark.parametrize("seed", range(2))
def test_recovers_chinchilla(seed):
  fitted = laws.fit(laws.CHINCHILLA, chinchilla_runs(seed))
  missed = off(fitted.letters(), {k: CHINCHILLA[k] for k in ("E", "alpha", "beta")} | {"a": A_OPT})
  assert max(missed.values()) < 0.05, missed
  # The prefactors stand 20 e-foldings from the data: they are known only together with the exponents.
  clean = chinchilla_runs(noise=0.0)
  np.testing.assert_allclose(fitted.predict(clean), clean.loss, rtol=0.01)


def test_chinchilla_without_noise_is_exact():
  missed = off(laws.fit(laws.CHINCHILLA, chinchilla_runs(noise=0.0, num=8)).letters(), CHINCHILLA)
  assert max(missed.values()) < 1e-3, missed


def test_chinchilla_reaches_the_optimum():
  """As good as from the truth, also from bad starts, where a search of another kind gets stuck."""
  runs = chinchilla_runs(7, num=8)
  fitted = laws.fit(laws.CHINCHILLA, runs)
  variables = laws.log_variables(fitted.law, runs) - fitted.shift_V[:, None]
  true = [CHINCHILLA[k] for k in ("E", "A", "B", "alpha", "beta")]
  log_e, log_a, log_b = np.log(true[:3])
  start = [log_e, log_a - true[3] * fitted.shift_V[0], log_b - true[4] * fitted.shift_V[1], *true[3:]]
  target = np.log(runs.loss)
  _, from_truth = laws.solve(fitted.law, variables, target, np.array([start]), num_steps=300, finish=1)
  assert fitted.cost <= from_truth[0] * (1 + 1e-6)
  low, high = (np.array(side) for side in fitted.law.box(variables, target))
  bad = low + (high - low) * np.random.default_rng(0).uniform(size=(20, 5))
  _, costs = laws.solve(fitted.law, variables, target, bad, num_steps=60)
  assert (fitted.cost <= costs * (1 + 1e-6)).all()
  np.testing.assert_allclose(costs, fitted.cost, rtol=1e-3)

  def objective(x):
    return solver.huber(target - fitted.law.evaluate(x[None], variables)[0][0], laws.HUBER_DELTA).sum()

  alone = [optimize.minimize(objective, x, method="Nelder-Mead").fun for x in (start, *bad[:3])]
  assert fitted.cost <= min(alone) * (1 + 1e-6)
  assert max(alone) > 1.5 * fitted.cost  # a search from one start does get stuck


def test_isoflop_and_envelope():
  for seed in range(5):
    letters = isoflop.parabolas(isoflop_runs(seed)).letters()
    assert abs(letters["a"] / A_OPT - 1) < 0.05 and abs(letters["a"] + letters["b"] - 1) < 1e-6
  assert abs(isoflop.envelope(curve_runs(noise=0)).letters()["a"] / A_OPT - 1) < 0.05


def test_minima_of_true_parabolas():
  compute = np.repeat([1.0, 10.0, 100.0], 5)
  best = 100 * compute**0.5
  params = best * np.tile(np.geomspace(0.5, 8, 5), 3)  # the best one is not in the middle
  loss = 2 * np.exp(0.1 * np.log(params / best) ** 2)
  optima = isoflop.parabolas(table.complete(Table(loss=loss, params=params, compute=compute))).optima
  np.testing.assert_allclose(optima.params, best[::5])
  np.testing.assert_allclose(optima.tokens, compute[::5] / (6 * best[::5]))
  np.testing.assert_allclose(optima.loss, 2)


def test_intervals_quick():
  share = coverage(power_runs, "power", POWER, repetitions=60, num=150)
  assert all(0.8 <= s <= 0.98 for s in share.values()), share


@pytest.mark.slow
@pytest.mark.parametrize(
  "law, make, truth",
  [
    ("power", power_runs, POWER),
    ("saturating", zhai_runs, ZHAI),
    ("isoflop", isoflop_runs, {"a": A_OPT, "b": 1 - A_OPT}),
    ("envelope", curve_runs, {"a": A_OPT, "b": 1 - A_OPT}),
    ("chinchilla", lambda seed: chinchilla_runs(seed, num=8), CHINCHILLA | {"a": A_OPT}),
  ],
)
def test_intervals(law, make, truth):
  share = coverage(make, law, truth, repetitions=200, num=200)
  assert all(0.85 <= s <= 0.95 for s in share.values()), share


def test_largest_run_held_out_and_laws_compared():
  compared = report.compare(zhai_runs())
  assert compared["saturating"] < 0.05 < compared["power"]
  missed = report.held_out("saturating", zhai_runs())
  assert missed["compute"] == COMPUTE[-1]
  spoiled = zhai_runs()
  spoiled.loss[-1] *= 2  # the fit may not see it
  assert report.held_out("saturating", spoiled)["predicted"] == pytest.approx(missed["predicted"], rel=1e-9)
  assert report.held_out("isoflop", isoflop_runs(noise=0.001))["relative_error"] < 0.1


def test_a_chain_of_computes_is_no_budget():
  runs = isoflop_runs()
  chain = runs.compute[0] * 1.09 ** np.arange(1, 9)
  more = table.complete(Table(loss=runs.loss[:8], params=runs.params[:8], compute=chain))
  join = lambda key: np.concatenate([getattr(runs, key), getattr(more, key)])  # noqa: E731
  found = isoflop.parabolas(Table(**{key: join(key) for key in table.COLUMNS}))
  assert len(found.optima.compute) == 5 and "16 runs whose computes run into each other" in found.notes[0]


def test_frontier_is_the_best_of_each_budget():
  # Runs of a budget differ a little in compute: none of them is a step of the frontier by itself.
  compute = np.array([0.98, 1.0, 1.02, 3.95, 4.0, 4.05, 16.0])
  loss = np.array([3.2, 3.1, 3.0, 2.1, 2.0, 2.2, 2.5])
  found = table.frontier(Table(loss=loss, compute=compute))
  assert found.loss.tolist() == [3.0, 2.0, 2.5]  # a budget that does no better than a smaller one shows
  assert found.compute.tolist() == [1.02, 4.0, 16.0]
  curve = np.geomspace(1, 10, 100)
  found = table.frontier(Table(loss=curve**-0.1, compute=curve))
  assert 20 < len(found) < 30 and (np.diff(found.loss) < 0).all()
  assert found.compute[-1] == 10


def test_short_runs_are_left_out(tmp_path):
  path = tmp_path / "runs.csv"
  path.write_text("compute,loss,steps\n1,3,10\n2,2,200\n")
  read = table.read(path, ("steps",))
  assert table.of_length(read, 100, path=path).loss.tolist() == [2]
  with pytest.raises(ValueError, match="no run has 300 steps; the longest has 200"):
    table.of_length(read, 300, path=path)
  with pytest.raises(ValueError, match="no column steps"):
    table.of_length(table.read(path), 100, path=path)


@pytest.mark.parametrize(
  "law, runs, says",
  [
    ("power", power_runs().rows(np.arange(4)), "at least 5 runs, there are 4"),
    ("saturating", zhai_runs().rows(np.arange(5)), "at least 6 runs, there are 5"),
    ("chinchilla", chinchilla_runs().rows(np.arange(6)), "at least 7 runs, there are 6"),
    ("chinchilla", chinchilla_runs().rows(np.arange(16) * 17), "move together"),
    ("isoflop", isoflop_runs().rows(np.arange(16)), "3 or more compute budgets"),
    ("isoflop", isoflop_runs(noise=0).rows(np.arange(48) % 8 < 4), "best size lies among"),
    ("envelope", chinchilla_runs().rows(np.arange(16)), "5 or more sizes"),
    ("power", power_runs().rows(np.array([0, 0, 0, 0, 0])), "differ by a factor"),
  ],
)
def test_too_little_is_refused(law, runs, says):
  with pytest.raises(ValueError, match=says):
    report.fit(law, runs)


def save(path: Path, runs: Table) -> Path:
  names = [c for c in table.COLUMNS if getattr(runs, c) is not None]
  table.write(path, {name: [repr(float(v)) for v in getattr(runs, name)] for name in names})
  return path


@pytest.mark.parametrize(
  "text, says",
  [
    ("", "empty file"),
    ("compute,loss\n", "a header and no rows"),
    ("compute,error\n1,2\n", "no column loss"),
    ("compute,loss\n1,2\n2,two\n", "row 3: column loss: 'two' is not a number"),
    ("compute,loss\n1,2\n-2,1\n", "row 3: column compute: -2 is not a positive"),
    ("compute,loss\n1,nan\n", "row 2: column loss: nan is not a positive"),
    ("compute,loss\n1,2\n3\n", "row 3: column loss: empty cell"),
    ("compute,loss\n1,2\n2,1\n1,2\n", "row 4 is a duplicate of row 2"),
    ("loss,loss\n1,2\n", "appears twice"),
  ],
)
def test_bad_tables(tmp_path, text, says):
  path = tmp_path / "runs.csv"
  path.write_text(text)
  with pytest.raises(ValueError, match=says) as caught:
    table.read(path)
  assert str(path) in str(caught.value)


def test_reads_what_is_written(tmp_path):
  runs = isoflop_runs()
  read = table.read(save(tmp_path / "runs.csv", runs))
  for column in table.COLUMNS:
    np.testing.assert_array_equal(getattr(read, column), getattr(runs, column))
  without = table.read(
    save(tmp_path / "two.csv", Table(loss=runs.loss, params=runs.params, tokens=runs.tokens))
  )
  np.testing.assert_allclose(without.compute, runs.compute)
  with pytest.raises(ValueError, match="no column params, tokens; the law chinchilla needs"):
    table.require(power_runs(), ("params", "tokens"), law="chinchilla", path="runs.csv")


@pytest.mark.parametrize("law, make", [("saturating", zhai_runs), ("isoflop", isoflop_runs)])
def test_figures(tmp_path, law, make):
  runs = make()
  paths = figures.write(law, runs, report.fit(law, runs, num=50), tmp_path, extrapolate=10)
  names = {path.stem for path in paths}
  assert names == {"loss_compute", "residuals"} | ({"isoflop", "optimal"} if law == "isoflop" else set())
  for name in names:
    assert np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).std() > 5
    assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert xml.dom.minidom.parse(str(tmp_path / f"{name}.svg")).documentElement.tagName == "svg"
  with open(tmp_path / "loss_compute.csv") as file:
    rows = list(csv.DictReader(file))
  shown = [float(row["y"]) for row in rows if row["series"] == "runs"]
  np.testing.assert_array_equal(shown, runs.loss)
  if law == "isoflop":
    with open(tmp_path / "optimal.csv") as file:
      beyond = [r for r in csv.DictReader(file) if r["series"] == "optimal parameters"][-1]
    assert float(beyond["x"]) > 9 * runs.compute.max()
    assert float(beyond["low"]) < float(beyond["y"]) < float(beyond["high"])


def test_the_main(tmp_path):
  path = save(tmp_path / "runs.csv", power_runs())
  fit = ("fit", f"--csv={path}", "--law=power", f"--json={tmp_path / 'fit.json'}", "--bootstrap=50")
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  line = [sys.executable, "-m", "sora_jax.scaling_laws", *fit]
  done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "fit.json").read_text())
  assert result["intervals"]["b"][0] < result["b"] < result["intervals"]["b"][1]
  assert max(off(result, POWER).values()) < 0.05
  (done,) = forked.run([("sora_jax.scaling_laws", "prune")], env)
  commands = "plan, run, measure, fit, plot, compare, probe"
  assert done.returncode == 2 and done.stderr == f"error: no such command 'prune'; there are: {commands}\n"
