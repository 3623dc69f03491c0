"""One fit of any law as numbers: letters, intervals, the largest run held out, the laws compared."""

import dataclasses

import numpy as np

from sora_jax.scaling import bootstrap, hyper, isoflop, laws
from sora_jax.scaling.hyper import HyperFit
from sora_jax.scaling.isoflop import Optima, Result
from sora_jax.scaling.laws import LAWS, Fit
from sora_jax.scaling.table import BUDGET_TOLERANCE, FLOPS_PER_PARAM_TOKEN, Table, budgets

FORMS = {law.name: law.form for law in LAWS.values()} | {
  "isoflop": "N_opt = k_N C^a, D_opt = k_D C^b, from the minima of parabolas at equal compute",
  "envelope": "N_opt = k_N C^a, D_opt = k_D C^b, from the envelope of training curves",
  "batch": "B_opt = k T^a N^b, T tokens, N parameters",
  "lr": "lr_opt = k T^a N^b, T tokens, N parameters",
}
NAMES = tuple(FORMS)
OPTIMUM_COLUMNS = ("params", "tokens", "compute")
COLUMNS = {law.name: law.columns for law in LAWS.values()} | dict.fromkeys(
  ("isoflop", "envelope"), OPTIMUM_COLUMNS
)
COLUMNS |= {law: ("params", "tokens", law) for law in hyper.LAWS}


@dataclasses.dataclass(frozen=True)
class Optimum:
  """N_opt and D_opt as straight lines in log compute, with replicas of their letters."""

  letters: dict[str, float]
  samples: dict[str, np.ndarray]
  compute_range: tuple[float, float]

  def line(self, which: str, compute: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value and interval of N ("params") or D ("tokens")."""
    prefactor, exponent = {"params": ("k_N", "a"), "tokens": ("k_D", "b")}[which]
    value = self.letters[prefactor] * compute ** self.letters[exponent]
    if not self.samples:
      return value, value, value
    x = np.log(compute)
    drawn = np.log(self.samples[prefactor])[:, None] + self.samples[exponent][:, None] * x
    return value, *(np.exp(end) for end in bootstrap.interval(drawn))


def fit(law: str, table: Table, *, num: int = 0, seed: int = 0) -> Fit | Result | HyperFit:
  """The law fitted, with `num` replicas."""
  if law in hyper.LAWS:
    fitted = hyper.fit(law, table, num=num, seed=seed)
    _must_vary(law, table)
    return fitted
  if law in LAWS:
    fitted = laws.fit(LAWS[law], table)
    _must_vary(law, table)
    return bootstrap.of(fitted, num=num, seed=seed) if num else fitted
  _must_vary(law, table)
  by_name = {"isoflop": isoflop.parabolas, "envelope": isoflop.envelope}
  return by_name[law](table, num=num, seed=seed)


def _must_vary(law: str, table: Table) -> None:
  """Any law fits a constant."""
  column = law if law in hyper.LAWS else "loss"
  values = getattr(table, column)
  if len(table) > 1 and np.ptp(values) <= 1e-9 * values.max():
    raise ValueError(f"all {len(table)} runs have {column} {values[0]:g}: the law {law} needs it to vary")


def flops_per_param_token(table: Table) -> float:
  """k of C = k N D, measured where compute is known."""
  if table.compute is None:
    return FLOPS_PER_PARAM_TOKEN
  return float(np.median(table.compute / (table.params * table.tokens)))


def optimum(fitted: Fit | Result, table: Table) -> Optimum:
  sampled = fitted.samples_KP if isinstance(fitted, Fit) else fitted.samples
  samples = {} if sampled is None else fitted.sampled_letters()
  letters = fitted.letters()
  if isinstance(fitted, Result):
    span = (float(fitted.optima.compute.min()), float(fitted.optima.compute.max()))
    return Optimum(letters, samples, span)
  k = flops_per_param_token(table)
  span = (float(table.compute.min()), float(table.compute.max()))
  return Optimum(_lines(letters, k), _lines(samples, k) if samples else {}, span)


def best_loss(fit_: Fit, table: Table, compute: np.ndarray) -> np.ndarray:
  """Loss of the parametric law at its optimum for each compute."""
  lines = optimum(dataclasses.replace(fit_, samples_KP=None), table)
  n, d = (lines.line(which, compute)[0] for which in ("params", "tokens"))
  return fit_.predict(Table(loss=np.ones_like(n), params=n, tokens=d))


def _lines(letters: dict, k: float) -> dict:
  a, b, g = letters["a"], letters["b"], letters["G"]
  return {"k_N": g * k**-a, "a": a, "k_D": k**-b / g, "b": b}


def held_out(law: str, table: Table) -> dict:
  """The law fitted without the largest budget, and how far it misses the best run of it."""
  if law in hyper.LAWS:
    return hyper.held_out(law, table)
  if law in LAWS:
    top = table.compute > table.compute.max() / (1 + BUDGET_TOLERANCE)
    largest = table.rows(np.array([int(np.argmin(np.where(top, table.loss, np.inf)))]))
    # Runs of its own budget would give it away.
    rest = table.rows(table.compute < largest.compute[0] / (1 + BUDGET_TOLERANCE))
    try:
      predicted = float(laws.fit(LAWS[law], rest).predict(largest)[0])
    except ValueError as error:
      return {"refused": str(error)}
    return _missed("loss", float(largest.compute[0]), float(largest.loss[0]), predicted)
  if law == "envelope":
    return {"refused": "an envelope says nothing of one run"}
  try:
    optima = isoflop.parabolas(table).optima
    smaller = table.rows(np.concatenate(budgets(table.compute)[:-1]))
    rest = isoflop.parabolas(smaller).optima
  except ValueError as error:
    return {"refused": str(error)}
  compute = float(optima.compute[-1])
  letters = rest.letters()
  predicted = float(letters["k_N"] * compute ** letters["a"])
  return _missed("params", compute, float(optima.params[-1]), predicted)


def compare(table: Table) -> dict[str, float | str]:
  """Held-out relative error of the largest run by each law of the loss that the columns allow."""
  result = {}
  for name, law in LAWS.items():
    if not table.has((*law.columns, "compute")):
      continue
    missed = held_out(name, table)
    result[name] = missed.get("relative_error", missed.get("refused"))
  return result


def summary(law: str, table: Table, fitted: Fit | Result | HyperFit, *, num: int, seed: int) -> dict:
  """What `fit` writes: the letters at the top level, their intervals beside."""
  samples = fitted.sampled_letters() if num else {}
  ends = {letter: bootstrap.interval(values) for letter, values in samples.items()}
  notes = list(getattr(fitted, "notes", ()))
  notes += _doubts(law, table, fitted)
  result = {
    "law": law,
    "form": FORMS[law],
    **fitted.letters(),
    "intervals": {letter: [float(low), float(high)] for letter, (low, high) in ends.items()},
    "interval_level": bootstrap.LEVEL,
    "num_bootstrap": num,
    "seed": seed,
    "num_runs": len(table),
    "held_out": held_out(law, table) if table.compute is not None else {"refused": "no compute"},
  }
  if isinstance(fitted, Fit):
    result["rms_residual"] = float(np.sqrt(np.mean(fitted.residuals() ** 2)))
  if not isinstance(fitted, HyperFit):
    result["comparison"] = compare(table)
  if law == "chinchilla":
    result["huber_sum"], result["huber_delta"] = fitted.cost, fitted.law.delta
    result["flops_per_param_token"] = flops_per_param_token(table)
  if isinstance(fitted, Result):
    optima: Optima = fitted.optima
    result["optima"] = [
      dict(zip(("compute", "params", "tokens", "loss"), map(float, row)))
      for row in zip(optima.compute, optima.params, optima.tokens, optima.loss)
    ]
  if isinstance(fitted, HyperFit):
    result["optima"] = [{"params": c.params, "tokens": c.tokens, law: c.best} for c in fitted.cells]
  result["notes"] = notes
  return result


def _doubts(law: str, table: Table, fitted: Fit | Result | HyperFit) -> list[str]:
  """That it is no law, and letters that the data do not hold away from nothing."""
  notes, letters = [], fitted.letters()
  if law in hyper.LAWS:
    return notes
  if table.compute is not None and np.polyfit(np.log(table.compute), np.log(table.loss), 1)[0] >= 0:
    notes.append("the loss does not fall as compute grows: no law of scaling describes these runs")
  if law == "saturating":
    notes.append("d is known to its order of magnitude at best")
    if letters["c"] < 1e-3 * table.loss.min():
      notes.append("c is nothing beside the losses seen: the power law says the same")
    if letters["d"] < 2e-3 * table.compute.min():
      notes.append("d is nothing beside the compute seen: no run is small enough to show it")
  if law == "chinchilla":
    low, high = laws.EXPONENTS
    stuck = [name for name in ("alpha", "beta") if not 1.01 * low < letters[name] < 0.99 * high]
    notes += [f"{name} is at the end of what is searched: the runs do not determine it" for name in stuck]
  return notes


def _missed(what: str, compute: float, actual: float, predicted: float) -> dict:
  error = abs(predicted / actual - 1)
  return {"compute": compute, what: actual, "predicted": predicted, "relative_error": error}
