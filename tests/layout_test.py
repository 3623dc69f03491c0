"""The table of rooms, and what every file of them must keep to."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Room -> level. A file imports rooms of lower levels, and its own room; rooms of one level not each other.
LEVELS = {
  "sora_jax.types": -1,
  "sora_jax.packing": 0,
  "sora_jax.diffusion": 0,
  "sora_jax.parallel": 0,
  "sora_jax.nn": 1,
  "sora_jax.models": 2,
  "sora_jax.autoencoders": 2,
  "sora_jax.conditioning": 2,
  "sora_jax.captioner": 2,
  "sora_jax.training": 2,
  "sora_jax.weights": 2,
  "sora_jax.tasks": 3,
  "sora_jax.evaluation": 3,
  "sora_jax.scaling": 3,
  "sora_jax.safety": 3,
  "sora_jax.generate": 4,
  "sora_jax.rehearsal": 5,  # compiles what training and generate make
}
MAIN_LEVEL = 6  # any other file of sora_jax; only these may import data_pipelines
DATA_MAX_LEVEL = 1  # data_pipelines imports sora_jax up to here
BASES = {
  "nnx.Module", "NamedTuple", "Protocol", "enum.Enum", "enum.StrEnum", "Enum", "Exception", "ValueError",
  "ArithmeticError", "RuntimeError",
  "grain.transforms.Map", "grain.MapTransform", "grain.transforms.FlatMap", "grain.DatasetIterator",
  "grain.MapDataset", "grain.IterDataset", "grain.transforms.Filter", "grain.RandomAccessDataSource",
  "ast.NodeVisitor", "html.parser.HTMLParser", "tfds.core.GeneratorBasedBuilder",
}  # fmt: skip
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80
CODE = sorted(
  path
  for folder in ("sora_jax", "data_pipelines", "configs", "tests")
  for path in (ROOT / folder).rglob("*.py")
)
PACKAGES = [path for path in CODE if "tests" not in path.relative_to(ROOT).parts]
TEXT_SUFFIXES = {".py", ".md", ".sh", ".toml", ".cfg", ".txt", ".yml", ".yaml", ".json"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(work|home|root|tmp|Users|mnt)/[\w.]")


def name_of(path: Path) -> str:
  return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
  parts = list(path.relative_to(ROOT).with_suffix("").parts)
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
  return ".".join(module.split(".")[:2])


def level_of(room: str) -> int:
  return LEVELS.get(room, MAIN_LEVEL)


def imports(tree: ast.AST) -> list[tuple[str, int]]:
  """Every module imported, with its line; `from a import b` gives a.b as well, b may be a module."""
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found += [(alias.name, node.lineno) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"relative import at line {node.lineno}"
      found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
  return found


def forbidden(module: str, target: str) -> str | None:
  """Why `module` may not import `target`; None where it may."""
  top, room = target.split(".")[0], room_of(target)
  if module.startswith("configs"):
    ok = top == "ml_collections" or target.startswith("configs")
    return None if ok else "a config imports ml_collections and configs.common alone"
  if module.startswith("data_pipelines"):
    if top == "sora_jax" and level_of(room) > DATA_MAX_LEVEL:
      return f"data_pipelines may not import above level {DATA_MAX_LEVEL}"
    return "data_pipelines may not import configs" if top == "configs" else None
  own = room_of(module)
  if top == "data_pipelines":
    return None if level_of(own) == MAIN_LEVEL else "only mains touch data_pipelines"
  if top == "configs":
    return "configs are read through flags"
  if top != "sora_jax" or room == own or target == "sora_jax":
    return None
  if level_of(room) > level_of(own):
    return f"level {level_of(own)} imports level {level_of(room)}"
  if level_of(room) == level_of(own) != MAIN_LEVEL:
    return f"rooms of level {level_of(own)} do not import each other"
  return None


def parse(path: Path) -> ast.Module:
  return ast.parse(path.read_text(), name_of(path))


@pytest.mark.parametrize("path", PACKAGES, ids=name_of)
def test_import_direction(path):
  wrong = [
    f"{name_of(path)}:{line} imports {target}: {why}"
    for target, line in imports(parse(path))
    if (why := forbidden(module_of(path), target))
  ]
  assert not wrong, "\n".join(wrong)


def test_the_rule_itself():
  assert forbidden("sora_jax.nn.layers", "sora_jax.models.dit")
  assert forbidden("sora_jax.models.dit", "sora_jax.training.loop")
  assert forbidden("sora_jax.tasks.registry", "data_pipelines.pipeline")
  assert forbidden("data_pipelines.pipeline", "sora_jax.models.dit")
  assert forbidden("configs.synthetic", "jax")
  assert not forbidden("sora_jax.train", "data_pipelines.pipeline")
  assert not forbidden("sora_jax.models.dit", "sora_jax.nn.layers")
  assert not forbidden("sora_jax.models.dit", "sora_jax.types.Array")


def test_no_import_cycles():
  modules = {module_of(path): path for path in PACKAGES}
  edges = {}
  for module, path in modules.items():
    targets = {t if t in modules else t.rsplit(".", 1)[0] for t, _ in imports(parse(path))}
    edges[module] = (targets & set(modules)) - {module}
  done, open_ = set(), []

  def visit(module):
    assert module not in open_, f"import cycle: {' -> '.join([*open_[open_.index(module) :], module])}"
    if module not in done:
      open_.append(module)
      for target in edges[module]:
        visit(target)
      open_.pop()
      done.add(module)

  for module in edges:
    visit(module)


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_shape_of_a_file(path):
  tree, lines, wrong = parse(path), path.read_text().count("\n"), []
  if lines >= MAX_FILE_LINES:
    wrong.append(f"{lines} lines, {MAX_FILE_LINES} are too many")
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      length = node.end_lineno - node.lineno + 1
      if length >= MAX_FUNCTION_LINES:
        wrong.append(f"line {node.lineno}: {node.name} has {length} lines")
      for inner in ast.walk(node):
        if isinstance(inner, ast.Import | ast.ImportFrom):
          wrong.append(f"line {inner.lineno}: import inside {node.name}")
    if isinstance(node, ast.ClassDef):
      bases = [ast.unparse(base) for base in node.bases]
      wrong += [f"line {node.lineno}: {node.name} inherits from {b}" for b in bases if b not in BASES]
  assert not wrong, f"{name_of(path)}: " + "; ".join(wrong)


def test_no_machine_paths():
  wrong = []
  for path in ROOT.rglob("*"):
    parts = path.relative_to(ROOT).parts
    skip = any(part.startswith(".") or part in ("runs", "build", "__pycache__") for part in parts)
    if skip or path.suffix not in TEXT_SUFFIXES or path == Path(__file__).resolve() or not path.is_file():
      continue
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
      if MACHINE_PATH.search(line):
        wrong.append(f"{name_of(path)}:{number}: {line.strip()[:100]}")
  assert not wrong, "\n".join(wrong)
