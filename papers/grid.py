"""What the programs of this folder share: grids of models and tasks, and tasks with one class a row.

Each of them is one claim of a paper, with its data and its models:

  python papers/NAME.py --task TASK --out DIR     trains one model, by train.py's options and the task's own
  python papers/NAME.py --reproduce               trains the grid, prints its table beside the paper's, draws curves

A new task is one function under train.py's decorator `@task`, which returns a `Task`; papers/synthetic.py
is the shortest example. A grid trains each of its models with several seeds, on a CPU as many at once as
there are cores; what is finished is not trained again, and what was stopped goes on.

Not here: tests of significance; a table has the mean, the least and the most of its seeds.
"""
import sys
from pathlib import Path
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import argparse, csv, dataclasses, itertools, math, os, re, signal, subprocess, time
from typing import Callable, NamedTuple
import numpy as np
from tinygrad import Device, Tensor
import train
from bigs_tiny import BiGS
from support.checkpoints import CHECKPOINT, CheckpointError
from support.cpu import setup_device
from support.text import Tokenizer, UserError
from support.training import PREVIOUS, Interrupt, check_writable, read_newest
from train import Batch, Parser, Task, cross_entropy, duration, number, read_evals

COLORS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2")
RECIPE = 2                      # raised where other data or defaults make a finished run another one
UNVERIFIED = "the paper's figures come from notes on it, unverified"

# ---- a claim's models and tasks -------------------------------------------------------------------

class Column(NamedTuple):
  "A task's options; the metric that is shown, or \"loss\"; the paper's figures, by the model."
  options: str
  metric: str
  paper: dict[str, str]

@dataclasses.dataclass
class Grid:
  "The table of one claim: a row for each model, trained on the task of each column with several seeds."
  name: str
  title: str
  about: str
  rows: dict[str, str]          # a model's name: its options
  columns: dict[str, Column]
  percent: bool = True
  seeds: int = 3

@dataclasses.dataclass(eq=False)
class Run:
  "One model, trained in a folder and a process of its own, by default on one core of a CPU."
  title: str
  folder: Path
  options: list[str]
  env: dict[str, str] = dataclasses.field(default_factory=lambda: {"NUM_CPU_THREADS": "1"})
  meta: dict[str, str] = dataclasses.field(default_factory=dict)     # of its checkpoint, once it is finished

  def has_begun(self) -> bool:
    return any((self.folder/name).exists() for name in (CHECKPOINT, PREVIOUS))

  def finished(self) -> bool:
    "Whether the newest checkpoint is the run's last; reads its metadata."
    if self.has_begun(): self.meta = read_newest(self.folder)[2]
    return self.meta.get("done") == "true"

  def start(self, program:str) -> subprocess.Popen:
    "Trains it from where it stopped, if it did. A session of its own: a Ctrl-C reaches the grid alone."
    self.folder.mkdir(parents=True, exist_ok=True)
    options = ["--resume"] if self.has_begun() else self.options
    command = [sys.executable, str(ROOT/program), *options, "--sample", "0", "--out", str(self.folder)]
    with open(self.folder/"output.txt", "a") as output:
      return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                              env=os.environ | self.env)

  def minutes(self) -> float: return float(self.meta["seconds"]) / 60

  def curve(self, metric:str, scale:float) -> list[tuple[int, float]]:
    "Step and metric at each evaluation."
    evaluations = read_evals(self.meta)
    return [(step, scale*(loss if metric == "loss" else metrics[metric])) for step, loss, metrics in evaluations]

Cells = dict[tuple[str, str], list[Run]]          # (row, column): a run for each seed

def plan(grid:Grid, out:Path, seeds:int) -> tuple[list[Run], Cells]:
  "The runs in the order of their seeds, and those of each cell. Columns with the same options share a run."
  runs: dict[Path, Run] = {}
  cells: Cells = {}
  for seed, row, column in itertools.product(range(seeds), grid.rows, grid.columns):
    options = f"{grid.columns[column].options} {grid.rows[row]}"
    slug = re.sub("[^a-z0-9]+", "-", options.replace("--", "").lower())
    folder = out / f"{slug}-v{RECIPE}" / f"seed{seed}"
    run = Run(f"{row}, {column}, seed {seed}", folder, [*options.split(), "--seed", str(seed)])
    cells.setdefault((row, column), []).append(runs.setdefault(folder, run))
  return [*runs.values()], cells

def train_all(program:str, runs:list[Run], at_once:int) -> None:
  """Trains the runs that are not finished, some at once. A signal stops them all: they save, and KeyboardInterrupt is
  raised. UserError if one fails."""
  waiting = [run for run in runs if not run.finished()]
  training: dict[Run, subprocess.Popen] = {}
  with Interrupt(signal.default_int_handler):
    try:
      while waiting or training:
        while waiting and len(training) < at_once:
          run = waiting.pop(0)
          training[run] = run.start(program)
        for run, process in [*training.items()]:
          if process.poll() is None: continue
          del training[run]
          if run.finished(): print(f"{run.title}: {int(run.meta['step']):,} steps in {duration(60*run.minutes())}",
                                   flush=True)
          elif process.returncode > 128: raise KeyboardInterrupt          # somebody has stopped it
          else: raise UserError(f"a run failed, see the end of {run.folder/'output.txt'}")
        time.sleep(0.2)
    finally:
      for process in training.values(): process.terminate()
      for process in training.values(): process.wait()

# ---- its table and curves -------------------------------------------------------------------------

def print_table(head:list[str], rows:list[list[str]]) -> None:
  widths = [max(map(len, column)) for column in zip(head, *rows)]
  for name, *cells in (head, *rows):
    print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:])), sep="   ")

def report(grid:Grid, runs:list[Run], cells:Cells, out:Path) -> None:
  "Prints the table with the paper's figures; writes table.csv, and with matplotlib curves.png."
  scale, digits = (100, 1) if grid.percent else (1, 3)
  curves = {(row, column): [run.curve(grid.columns[column].metric, scale) for run in some]
            for (row, column), some in cells.items()}
  table, lines = [], []
  for column in grid.columns:
    table.append([column])
    for row in grid.rows:
      paper = grid.columns[column].paper.get(row, "")
      finals = [curve[-1] for curve in curves[row, column]]
      values = [value for _, value in finals]
      mean, least, most = (f"{x:.{digits}f}" for x in (np.mean(values), min(values), max(values)))
      table[-1].append(f"{mean} ({least}-{most})" + f" [{paper}]"*bool(paper))
      for seed, ((step, value), run) in enumerate(zip(finals, cells[row, column])):
        lines.append([row, column, seed, step, round(value, 4), paper, round(run.minutes(), 2)])
  seeds = len(values)
  a_seed = {row: sum(run.minutes() for run in {run for column in grid.columns for run in cells[row, column]}) / seeds
            for row in grid.rows}
  table.append(["minutes a seed", *(f"{minutes:.1f}" for minutes in a_seed.values())])
  print()
  print_table(["", *grid.rows], table)
  one_core = "; a run has one core"*(Device.DEFAULT == "CPU")
  print(f"the mean of {seeds} seed{'s'*(seeds > 1)} (least-most) [the paper's]{one_core}", flush=True)
  with open(out/"table.csv", "w", newline="") as f:
    csv.writer(f).writerows([["model", "task", "seed", "steps", "figure", "paper", "minutes"], *lines])
  try: plot_curves(grid, curves, out/"curves.png")
  except ImportError: print(f"wrote {out/'table.csv'} (pip install matplotlib, and the curves are drawn too)")
  else: print(f"wrote {out/'table.csv'}, {out/'curves.png'}")

def plot_curves(grid:Grid, curves:dict[tuple[str, str], list], path:Path) -> None:
  "A panel for each column, a line for each seed."
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  wide = min(3, len(grid.columns))
  high = math.ceil(len(grid.columns) / 3)
  fig, axes = plt.subplots(high, wide, figsize=(4.2*wide, 3.6*high), dpi=150, layout="constrained", squeeze=False)
  for ax in axes.flat[len(grid.columns):]: ax.set_visible(False)
  for ax, column in zip(axes.flat, grid.columns):
    for color, row in zip(COLORS, grid.rows):
      for seed, curve in enumerate(curves[row, column]):
        ax.plot(*zip(*curve), color=color, lw=1.3, label=None if seed else row)
    title = column.split(" [")[0]
    ax.set(title=title, xlabel="step", ylabel="%" if grid.percent else title)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
  axes[0, 0].legend(frameon=False)
  fig.savefig(path)
  plt.close(fig)

# ---- the command line of a program ----------------------------------------------------------------

def run_program(program:str, grid:Grid|None, default:str, argv:list[str]|None=None,
                then:Callable[[Path], None]|None=None) -> int:
  """With --reproduce trains the grid; else one model, by train.py's options and those of the program's tasks.

  default: the task where the command line names none. then: what follows the grid's table, given the grid's folder."""
  argv = sys.argv[1:] if argv is None else argv
  if "--reproduce" not in argv or grid is None: return train.main(argv, program, default)
  parser = Parser(prog=program, allow_abbrev=False)
  parser.add_argument("--reproduce", action="store_true")
  parser.add_argument("--seeds", type=number(int, 1), default=grid.seeds)
  parser.add_argument("--out", default="reproduced")
  args = parser.parse_args(argv)
  out = Path(args.out) / grid.name
  setup_device()
  at_once = Device["CPU"].renderer.global_max[0] if Device.DEFAULT == "CPU" else 1
  print(f"{grid.title}\n{grid.about}\n{len(grid.rows)} models, {args.seeds} seed{'s'*(args.seeds > 1)}, {at_once} at a "
        f"time, into {out}; stopped, it goes on with the same command", flush=True)
  runs, cells = plan(grid, out, args.seeds)
  try:
    check_writable(out)
    train_all(program, runs, at_once)
    report(grid, runs, cells, out)
    if then: then(out)
  except KeyboardInterrupt:
    print("\nstopped; the same command goes on", file=sys.stderr)
    return 130
  except (UserError, CheckpointError) as e: parser.error(str(e))
  return 0

# ---- tasks with one class a row -------------------------------------------------------------------

def to_float(text:str) -> float|None:
  "The finite number that a text is, or None."
  try: x = float(text)
  except ValueError: return None
  return x if math.isfinite(x) else None

def pad(tokens:list[int], length:int, filler:int) -> tuple[np.ndarray, np.ndarray]:
  "A row of `length` tokens, and a mask that is 1 where they are not the filler."
  row, mask = np.full(length, filler, np.int32), np.zeros(length, np.int32)
  row[:len(tokens)] = tokens
  mask[:len(tokens)] = 1
  return row, mask

def stack(rows:list[tuple]) -> Batch:
  "Rows (tokens (L,), mask (L,), label) as one batch."
  return tuple(map(np.stack, zip(*rows)))

def batches(rows:list[tuple], size:int) -> list[Batch]:
  return [stack(rows[i:i+size]) for i in range(0, len(rows), size)]

def classification_metrics(targets:np.ndarray, predictions:np.ndarray, n_classes:int) -> dict[str, float]:
  """Accuracy, F1 and Matthews' correlation (Gorodkin's for more than two classes). F1 is that of class 1 of two, else
  the mean over the classes that occur among targets or predictions."""
  confusion = np.bincount(targets*n_classes + predictions, minlength=n_classes**2).reshape(n_classes, -1).astype(float)
  t, p, n, hits = confusion.sum(1), confusion.sum(0), confusion.sum(), np.trace(confusion)
  f1 = 2*np.diag(confusion) / np.maximum(1, t + p)
  spread = math.sqrt((n*n - p @ p) * (n*n - t @ t))
  return {"accuracy": hits/n, "F1": float(f1[1] if n_classes == 2 else f1[t + p > 0].mean()),
          "MCC": (hits*n - t @ p)/spread if spread else 0.0}

def classification(args:argparse.Namespace, about:str, tokenizer:Tokenizer|None, vocab_size:int,
                   batch:Callable[[int], Batch], held_out:list[tuple], trained:np.ndarray, classes:list[str],
                   schedule:str="cosine") -> Task:
  """A class for each row (tokens (L,), mask (L,), label), by an encoder with a classifier on top.

  trained: labels of the training rows, many or all, whose frequencies are the baseline."""
  targets = np.array([label for _, _, label in held_out])
  counts = 1 + np.bincount(trained, minlength=len(classes))
  def forward(model:BiGS, tokens:Tensor, mask:Tensor, labels:Tensor) -> tuple[Tensor, Tensor]:
    logits = model.classify(tokens, mask)
    return cross_entropy(logits.unsqueeze(1), labels.unsqueeze(1)), logits.argmax(-1)
  def metrics(outputs:list[Batch]) -> dict[str, float]:
    predictions = np.concatenate([predicted for _, predicted in outputs]).astype(int)
    return classification_metrics(targets, predictions, len(classes))
  baseline = f"labels by their frequency (the commonest is right at {np.mean(targets == counts.argmax()):.3f})"
  return Task(about, tokenizer, vocab_size, batch, batches(held_out, args.batch),
              float(-np.log2(counts/counts.sum())[targets].mean()), baseline, unit="bits per label", forward=forward,
              metrics=metrics, head="classify", labels=classes, schedule=schedule, count=lambda batch: len(batch[0]))
