"""What the papers' claims share: grids of models and tasks, tables, curves, and what labelled tasks measure.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import csv, dataclasses, itertools, math, os, re, signal, subprocess, time
from typing import Callable
import numpy as np
from tinygrad import Device, Tensor
from bigs_tiny import BiGS
from support.cpu import setup_device
from generate import OUT, Parser, number
from support.checkpoints import CHECKPOINT, CheckpointError
from support.text import Tokenizer, UserError
from support.training import PREVIOUS, Interrupt, check_writable, read_newest
import train
from train import Batch, Task, argparse, cross_entropy, duration, read_evals

def real(text:str) -> float|None:
  try: return x if math.isfinite(x := float(text)) else None
  except ValueError: return None

def agreement_of(truth:np.ndarray, said:np.ndarray, K:int) -> dict[str, float]:
  """Accuracy, F1 and Matthews' correlation (Gorodkin's for many) of labels 0 to K-1. F1 is that of the second label of
  two, else the mean over the labels that occur, in the truth or in what was said."""
  C = np.bincount(truth*K + said, minlength=K*K).reshape(K, K).astype(float)
  t, p, n, hits = C.sum(1), C.sum(0), C.sum(), np.trace(C)
  f1 = 2*np.diag(C) / np.maximum(1, t + p)
  mean = f1[1] if K == 2 else f1[t + p > 0].mean()
  spread = math.sqrt((n*n - p @ p) * (n*n - t @ t))
  return {"accuracy": hits/n, "F1": float(mean),
          "MCC": (hits*n - t @ p)/spread if spread else 0.0}

def correlation(truth:np.ndarray, said:np.ndarray) -> dict[str, float]:
  "Pearson's and Spearman's; ties share the mean of their ranks."
  def ranks(x:np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts-1)/2)[group]
  def pearson(a:np.ndarray, b:np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / math.sqrt((a @ a) * (b @ b) or 1))
  return {"Pearson": pearson(truth, said), "Spearman": pearson(ranks(truth), ranks(said))}

def labelled(args:argparse.Namespace, about:str, tok:Tokenizer|None, vocab_size:int, batch:Callable[[int], Batch],
             held:list[Batch], trained:np.ndarray, names:list[str]|None, schedule:str="cosine") -> Task:
  """A label for a row, or with no `names` a real value: rows are (tokens (L,), mask (L,), label). trained: the labels
  to train on, or many of them."""
  regression, truth = names is None, np.array([r[2] for r in held])
  stack = lambda rows: tuple(np.stack(x) for x in zip(*rows))
  def forward(model:BiGS, tokens:Tensor, mask:Tensor, labels:Tensor) -> tuple[Tensor, ...]:
    x = model.classify(tokens, mask)
    if regression: return ((x.squeeze(-1) - labels)**2).mean(), x.squeeze(-1)
    return cross_entropy(x.unsqueeze(1), labels.unsqueeze(1)), x.argmax(-1)
  def metrics(outputs:list[Batch]) -> dict[str, float]:
    said = np.concatenate([o[1] for o in outputs])
    return correlation(truth, said) if regression else agreement_of(truth, said.astype(int), len(names))
  if regression: guess, baseline = "the mean of all", float(((truth - trained.mean())**2).mean())
  else:
    counts = 1 + np.bincount(trained, minlength=len(names))
    guess = f"labels by their frequency (the commonest is right at {np.mean(truth == counts.argmax()):.3f})"
    baseline = float(-np.log2(counts/counts.sum())[truth].mean())
  return Task(about, tok, vocab_size, batch, [stack(held[i:i+args.batch]) for i in range(0, len(held), args.batch)],
              baseline, guess, *([1.0, 1.0, "squared error"] if regression else [1/math.log(2)]*2 + ["bits per label"]),
              forward, metrics, "classify", [""] if regression else names, schedule=schedule, count=lambda batch: len(batch[0]))

@dataclasses.dataclass
class Grid:
  "Rows of models and columns of tasks, each trained with several seeds; and what the paper has."
  name: str
  title: str
  about: str
  rows: dict[str, str]                          # what is shown: options
  columns: dict[str, tuple[str, str]]           # what is shown: options, and the figure (a metric, or "loss")
  paper: dict[tuple[str, str], str]
  percent: bool = True
  seeds: int = 3
  def options(self, row:str, column:str) -> list[str]: return f"{self.columns[column][0]} {self.rows[row]}".split()

RECIPE = 2                                      # raised where other data or defaults make a finished run another one
UNVERIFIED = "the paper's figures come from notes on it, unverified"

def has_begun(folder:Path) -> bool: return any((folder/f).exists() for f in (CHECKPOINT, PREVIOUS))

def finished(folder:Path) -> dict[str, str]|None:
  "The metadata of a run's last checkpoint, if it is done."
  if not has_begun(folder): return None
  meta = read_newest(folder)[2]
  return meta if meta.get("done") == "true" else None

def start_run(program:str, folder:Path, options:list[str]) -> subprocess.Popen:
  "A run in a process of its own, on one core of a CPU, from where it stopped if it did."
  folder.mkdir(parents=True, exist_ok=True)
  again = ["--resume"] if has_begun(folder) else options
  command = [sys.executable, program, *again, "--sample", "0", "--out", str(folder)]
  with open(folder/"output.txt", "a") as f:
    # a session of its own: a Ctrl-C is for the grid, which passes it on once
    return subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, start_new_session=True,
                            env=os.environ | {"NUM_CPU_THREADS": "1"})

def run_all(program:str, runs:dict[Path, tuple[str, list[str]]], at_once:int) -> dict[Path, dict[str, str]]:
  "Trains what is not finished; the metadata of all. KeyboardInterrupt, once those that are going have saved."
  found = {f: finished(f) for f in runs}
  todo, going = [f for f in runs if not found[f]], {}
  with Interrupt(signal.default_int_handler):
    try:
      while todo or going:
        while todo and len(going) < at_once:
          f = todo.pop(0)
          going[f] = start_run(program, f, runs[f][1])
        for f in [f for f, p in going.items() if p.poll() is not None]:
          code, found[f] = going.pop(f).returncode, finished(f)
          if found[f] is None and code > 128: raise KeyboardInterrupt        # somebody has stopped it
          if found[f] is None: raise UserError(f"a run failed, see the end of {f/'output.txt'}")
          print(f"{runs[f][0]}: {int(found[f]['step']):,} steps in {duration(float(found[f]['seconds']))}", flush=True)
        time.sleep(0.2)
    finally:
      for p in going.values(): p.terminate()
      for p in going.values(): p.wait()
  return found

def show_table(head:list[str], rows:list[list[str]]) -> None:
  widths = [max(map(len, column)) for column in zip(head, *rows)]
  for first, *rest in (head, *rows):
    print(f"{first:<{widths[0]}}" + "".join(f"   {x:>{w}}" for x, w in zip(rest, widths[1:])))

def figure_of(row:list, metric:str) -> float: return row[1] if metric == "loss" else row[2][metric]

def reproduce(program:str, grid:Grid, out:Path, seeds:int|None) -> int:
  """Trains a grid's models, on a CPU as many at once as it has cores, and prints the table beside the paper's figures;
  writes table.csv and curves.png. What has been trained is not trained again."""
  setup_device()
  out = out / grid.name
  seeds = seeds or grid.seeds
  at_once = Device["CPU"].renderer.global_max[0] if Device.DEFAULT == "CPU" else 1
  print(f"{grid.title}\n{grid.about}\n{len(grid.rows)} models, {seeds} seed{'s'*(seeds > 1)}, {at_once} at a time, "
        f"into {out}; stopped, it goes on with the same command", flush=True)
  check_writable(out)
  runs, places = {}, {}                                  # a run is of several columns, if they have the same options
  for seed, row, column in itertools.product(range(seeds), grid.rows, grid.columns):
    options = grid.options(row, column)
    slug = re.sub(r"[^a-z0-9]+", "-", " ".join(options).replace("--", "").lower())
    folder = out / f"{slug}-v{RECIPE}" / f"seed{seed}"
    runs.setdefault(folder, (f"{row}, {column}, seed {seed}", [*options, "--seed", str(seed)]))
    places.setdefault((row, column), []).append(folder)
  try: metas = run_all(program, runs, at_once)
  except KeyboardInterrupt:
    print("\nstopped; the same command goes on", file=sys.stderr)
    return 130
  evals = {f: read_evals(metas[f]) for f in runs}
  minutes = {f: float(metas[f]["seconds"]) / 60 for f in runs}
  scale, digits, table, lines = (100, 1, [], []) if grid.percent else (1, 3, [], [])
  for column, (_, metric) in grid.columns.items():
    table.append([column])
    for row in grid.rows:
      x = [scale * figure_of(evals[f][-1], metric) for f in places[row, column]]
      paper = grid.paper.get((row, column), "")
      table[-1].append(f"{np.mean(x):.{digits}f} ({min(x):.{digits}f}-{max(x):.{digits}f})" + f" [{paper}]"*bool(paper))
      lines += [[row, column, seed, evals[f][-1][0], round(v, 4), paper, round(minutes[f], 2)]
                for seed, (v, f) in enumerate(zip(x, places[row, column]))]
  of_row = {row: {f for column in grid.columns for f in places[row, column]} for row in grid.rows}
  table.append(["minutes a seed", *(f"{sum(minutes[f] for f in fs)/seeds:.1f}" for fs in of_row.values())])
  print()
  show_table(["", *grid.rows], table)
  print(f"the mean of {seeds} seed{'s'*(seeds > 1)} (least-most) [the paper's]"
        + "; a run has one core"*(Device.DEFAULT == "CPU"), flush=True)
  with open(out/"table.csv", "w", newline="") as f:
    csv.writer(f).writerows([["model", "task", "seed", "steps", "figure", "paper", "minutes"], *lines])
  found = {k: [evals[f] for f in folders] for k, folders in places.items()}
  try: plot_curves(grid, found, out/"curves.png")
  except ImportError: print(f"wrote {out/'table.csv'} (pip install matplotlib, and the curves are drawn too)")
  else: print(f"wrote {out/'table.csv'}, {out/'curves.png'}")
  return 0

def child(code:str, **env:str) -> str:
  "What `code` prints in a Python of its own."
  done = subprocess.run([sys.executable, "-c", f"import train; {code}"], cwd=Path(__file__).parents[1],
                        env=os.environ | env, capture_output=True, text=True)
  if done.returncode: raise UserError(f"a benchmark failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
  return done.stdout

def plot_curves(grid:Grid, found:dict, path:Path) -> None:
  "A panel for each column, a line for each seed."
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  rows, wide = -(-len(grid.columns)//3), min(3, len(grid.columns))
  fig, axes = plt.subplots(rows, wide, figsize=(4.2*wide, 3.6*rows), dpi=150, layout="constrained", squeeze=False)
  for ax, (column, (_, metric)) in zip(axes.flat, grid.columns.items()):
    for color, row in zip(("#4c78a8", "#e45756", "#54a24b", "#b279a2"), grid.rows):
      for i, evals in enumerate(found[row, column]):
        y = [figure_of(e, metric)*(100 if grid.percent else 1) for e in evals]
        ax.plot([e[0] for e in evals], y, color=color, lw=1.3, label=row if i == 0 else None)
    what = column.split(" [")[0]
    ax.set(title=what, xlabel="step", ylabel="%" if grid.percent else what)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
  for ax in [*axes.flat][len(grid.columns):]: ax.set_visible(False)
  axes[0][0].legend(frameon=False)
  fig.savefig(path)
  plt.close(fig)

def main(program:str, grid:Grid|None=None, default:str="text", after:Callable[[Path], None]|None=None,
         argv:list[str]|None=None) -> int:
  """`--reproduce`: a grid; else one model, with train.py's options and those of the tasks of this file. default: the
  task where the command line names none. after: what comes behind the grid's table."""
  argv = sys.argv[1:] if argv is None else argv
  if "--reproduce" not in argv or grid is None: return train.main(argv, program, default)
  p = Parser(prog=program, allow_abbrev=False)
  p.add_argument("--reproduce", action="store_true")
  p.add_argument("--seeds", type=number(int, 1))
  p.add_argument("--out", default="reproduced")
  args = p.parse_args(argv)
  try:
    code = reproduce(str(Path(train.__file__).parent/program), grid, Path(args.out), args.seeds)
    if after and not code: after(Path(args.out) / grid.name)
    return code
  except (UserError, CheckpointError) as e: p.error(str(e))
