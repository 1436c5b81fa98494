"""Shared by the programs of this folder: grids of models and tasks, and tasks with a label a row.

Each program is one claim of a paper, with its data and its models:

  python papers/NAME.py --task TASK --out DIR   trains one model; --help has its other options
  python papers/NAME.py --show DIR              its answers to a few held-out rows, beside the right
  python papers/NAME.py --reproduce             trains the grid, prints its table beside the
                                                paper's, draws the curves; --seeds N, --out DIR

A new task is one function under train.py's decorator `@task`, which returns a `Task`;
synthetic.py is an example. A grid trains each of its models with several seeds, on a CPU as many
at once as there are cores; what is finished is not trained again, and what was stopped goes on.

Not here: tests of significance. A table has the mean, the least and the most of its seeds.
"""
import sys
from pathlib import Path
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import argparse, csv, dataclasses, functools, itertools, math, os, re, shlex, subprocess, time
from typing import Callable, Iterable, NamedTuple
import numpy as np
from tinygrad import Device
import train
from support.checkpoints import CHECKPOINT
from support.cpu import setup_device
from support.text import Interrupt, Tokenizer, UserError, counted, listed, print_table
from support.training import PREVIOUS, check_writable, read_newest
from train import Batch, Parser, Task, always, cross_entropy, duration, number, read_evals

CSV_COLUMNS = "model task seed steps figure best paper minutes".split()
COLORS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#f58518")
ONE_CORE = {"NUM_CPU_THREADS": "1"}
RECIPE = 3      # raised where other data or defaults make a finished run another one
UNVERIFIED = "the paper's figures come from notes on it, unverified"

# ---- a claim's models and tasks -----------------------------------------------------------------

class Column(NamedTuple):
  "A task's options; the metric that is shown, or \"loss\"; the paper's figures, by the model."
  options: str
  metric: str
  paper: dict[str, str]

@dataclasses.dataclass(eq=False)
class Run:
  "One model, trained in a folder and a process of its own."
  title: str
  seed: int
  folder: Path
  options: list[str]
  env: dict[str, str]
  meta: dict[str, str] = dataclasses.field(default_factory=dict)   # once it is finished

  def has_begun(self) -> bool:
    return any((self.folder/name).exists() for name in (CHECKPOINT, PREVIOUS))

  def finished(self) -> bool:
    "Whether the newest checkpoint is the last one; reads its metadata."
    if self.has_begun(): self.meta = read_newest(self.folder).meta
    return self.meta.get("done") == "true"

  def start(self, program:str) -> subprocess.Popen:
    "Trains from where it stopped, if it did. A session of its own: Ctrl-C is for the grid alone."
    self.folder.mkdir(parents=True, exist_ok=True)
    options = ["--resume"] if self.has_begun() else self.options
    options = [*options, "--sample", "0", "--out", str(self.folder)]
    with open(self.folder/"output.txt", "a") as output:
      return subprocess.Popen([sys.executable, str(ROOT/program), *options], stdout=output,
                              stderr=subprocess.STDOUT, start_new_session=True,
                              env=os.environ | self.env)

  def minutes(self) -> float: return float(self.meta["seconds"]) / 60

  def took(self) -> str:
    return f"{counted(int(self.meta['step']), 'step')} in {duration(60*self.minutes())}"

Cells = dict[tuple[str, str], list[Run]]          # (row, column): a run for each seed

@dataclasses.dataclass
class Grid:
  "The table of one claim: models by tasks, each trained with several seeds."
  name: str
  title: str
  about: str
  rows: dict[str, str]                            # a model's name: its options
  columns: dict[str, Column]
  percent: bool = True
  seeds: tuple[int, ...] = (0, 1, 2)
  shares: str = ""                                # another grid's name: what both train is in its folder

  def plan(self, out:Path, n:int) -> Cells:
    "The runs of each cell, one for each of n seeds. Columns with the same options share a run."
    runs, cells = {}, {}                          # runs by their folder
    more = (seed for seed in itertools.count() if seed not in self.seeds)
    seeds = [*itertools.islice(itertools.chain(self.seeds, more), n)]
    for seed, row, column in itertools.product(seeds, self.rows, self.columns):
      options = f"{self.columns[column].options} {self.rows[row]}"
      slug = re.sub("[^a-z0-9]+", "-", options.replace("--", "").lower())
      folder = out.with_name(self.shares or self.name) / f"{slug}-v{RECIPE}" / f"seed{seed}"
      title = f"{row}, {column}, seed {seed}"
      run = Run(title, seed, folder, f"{options} --seed {seed}".split(), ONE_CORE)
      cells.setdefault((row, column), []).append(runs.setdefault(folder, run))
    return cells

  def curve(self, run:Run, column:str) -> list[tuple[int, float]]:
    "Step and figure at each evaluation."
    metric, scale = self.columns[column].metric, 100 if self.percent else 1
    return [(step, scale*(loss if metric == "loss" else metrics[metric]))
            for step, loss, metrics in read_evals(run.meta)]

  def last_and_best(self, run:Run, column:str) -> tuple[float, float]:
    "Figures of the last evaluation, and of the best."
    figures = [figure for _, figure in self.curve(run, column)]
    return figures[-1], (min if self.columns[column].metric == "loss" else max)(figures)

def train_all(program:str, runs:list[Run], at_once:int) -> None:
  """Trains the runs that are not finished, some at once, and tells of each. Where it is
  interrupted, all of them save. UserError if one fails."""
  missing, training = [], {}                      # the process of each run
  for run in runs:
    if run.finished(): print(f"{run.title}: {run.took()}, before", flush=True)
    else: missing.append(run)
  try:
    while missing or training:
      while missing and len(training) < at_once:
        run = missing.pop(0)
        print(f"{run.title}: {'goes on' if run.has_begun() else 'begins'}", flush=True)
        training[run] = run.start(program)
      for run, process in [*training.items()]:
        code = process.poll()
        if code is None: continue
        del training[run]
        if run.finished(): print(f"{run.title}: {run.took()}", flush=True)
        elif code > 128: raise KeyboardInterrupt          # somebody has stopped it
        else: raise UserError(f"a run failed, see the end of {run.folder/'output.txt'}")
      time.sleep(0.2)
  finally:
    for process in training.values(): process.terminate()
    for process in training.values(): process.wait()

# ---- its table and curves -----------------------------------------------------------------------

def report(grid:Grid, cells:Cells, out:Path) -> None:
  """Prints the table with the paper's figures, and the figures of each seed; writes table.csv, and
  with matplotlib curves.png."""
  digits = 1 if grid.percent else 3
  lines, table, by_seed = [], [], []
  runs = {row: set() for row in grid.rows}        # columns may share a run
  for name, column in grid.columns.items():
    shown = [name]
    for row in grid.rows:
      paper = column.paper.get(row, "")
      of_row = cells[row, name]
      figures, best = zip(*(grid.last_and_best(run, name) for run in of_row))
      for run, *pair in zip(of_row, figures, best):
        lines.append([row, name, run.seed, run.meta["step"], *(round(x, 4) for x in pair), paper,
                      round(run.minutes(), 2)])
      by_seed.append([f"{row}, {name}", *(f"{last:.{digits}f} ({top:.{digits}f})"
                                          for last, top in zip(figures, best))])
      runs[row].update(of_row)
      mean, least, most = (f"{f(figures):.{digits}f}" for f in (np.mean, min, max))
      shown.append(f"{mean} ({least}-{most})" + f" [{paper}]"*bool(paper))
    table.append(shown)
  seeds = len(figures)
  minutes = [f"{sum(run.minutes() for run in some) / seeds:.1f}" for some in runs.values()]
  print()
  print_table(["", *grid.rows], [*table, ["minutes a seed", *minutes]])
  one_core = "; a run has one core"*(Device.DEFAULT == "CPU")
  print(f"the mean of {counted(seeds, 'seed')} (least-most) [the paper's]{one_core}\n")
  print_table(["", *(f"seed {run.seed}" for run in of_row)], by_seed)
  print("at the end (the best evaluation)", flush=True)
  with open(out/"table.csv", "w", newline="") as f:
    csv.writer(f).writerows([CSV_COLUMNS, *lines])
  try: plot_curves(grid, cells, out/"curves.png")
  except ImportError:
    print(f"wrote {out/'table.csv'} (pip install matplotlib, and the curves are drawn too)")
  else: print(f"wrote {out/'table.csv'}, {out/'curves.png'}")

def panels(n:int, a_row:int, width:float, height:float, **options):
  "A figure of n panels, each of so many inches. ImportError where matplotlib is missing."
  from matplotlib.figure import Figure
  wide, high = min(a_row, n), math.ceil(n / a_row)
  fig = Figure((width*wide, height*high), dpi=150, layout="constrained")
  axes = fig.subplots(high, wide, squeeze=False, **options).ravel()
  for ax in axes: ax.spines[["top", "right"]].set_visible(False)
  for ax in axes[n:]: ax.set_visible(False)
  return fig, axes[:n]

def plot_curves(grid:Grid, cells:Cells, path:Path) -> None:
  "A panel for each column, a line for each seed."
  fig, axes = panels(len(grid.columns), 3, 4.2, 3.6)
  for ax, column in zip(axes, grid.columns):
    for row, color in zip(grid.rows, COLORS):
      for seed, run in enumerate(cells[row, column]):
        steps, figures = zip(*grid.curve(run, column))
        ax.plot(steps, figures, color=color, lw=1.3, label=None if seed else row)
    title = column.split(" [")[0]
    ax.set(title=title, xlabel="step", ylabel="%" if grid.percent else title)
    ax.grid(alpha=0.25)
  axes[0].legend(frameon=False)
  fig.savefig(path)

def trained(name:str, program:str, default:str, options:Iterable[str]=()
            ) -> tuple[argparse.Namespace, Task, train.Model]:
  """The options, task and model of a run's folder, or of the checkpoint in it; UserError where
  there is none. options: stand over the run's own."""
  folder = Path(name)
  if folder.name == CHECKPOINT: folder = folder.parent
  if not any((folder/name).exists() for name in (CHECKPOINT, PREVIOUS)):
    raise UserError(f"no model in {folder}: train one first, with --out {shlex.quote(str(folder))}")
  args, start = train.resolve_args(["--resume", "--out", str(folder), *options], program, default)
  task = train.TASKS[args.task].make(args)
  return args, task, train.make_model(args, task, start)

# ---- a program's command line -------------------------------------------------------------------

def show(program:str, default:str, argv:list[str]) -> int:
  """The command line of --show: held-out rows with the answers of the model in a run's folder.
  Other options stand over those that it was trained with, --data where the file has moved."""
  parser = Parser(prog=program)
  parser.add_argument("--show", metavar="DIR", required=True)
  known, others = parser.parse_known_args(argv)
  try:
    args, task, model = trained(known.show, program, default, others)
    if not task.sample: raise UserError(f"--task {args.task} has nothing to show")
    task.sample(model)
  except UserError as e: parser.error(str(e))
  return 0

def run_program(program:str, about:str, grid:Grid|None, default:str, argv:list[str]|None=None,
                then:Callable|None=None) -> int:
  """With --reproduce trains the grid, with --show shows what a model does, else trains one model by
  train.py's options and the tasks' own.

  about: what --help begins with. default: the task where the command line names none. then: what
  follows the table, given the grid's folder."""
  argv = sys.argv[1:] if argv is None else argv
  if {"-h", "--help"} & {*argv}:
    print(f"{about}\nAlso: --show DIR, held-out rows with the answers of the model in a folder\n")
  if argv[:1] == ["--show"]: return show(program, default, argv)
  if "--reproduce" not in argv or grid is None: return train.main(argv, program, default)
  parser = Parser(prog=program)
  parser.add_argument("--reproduce", action="store_true")
  parser.add_argument("--seeds", type=number(int, 1), default=len(grid.seeds))
  parser.add_argument("--out", default="reproduced")
  args = parser.parse_args(argv)
  # its own processes may take longer to save than a second
  with Interrupt(lambda: "\nstopped; the same command goes on", patience=None):
    setup_device()
    at_once = Device["CPU"].renderer.global_max[0] if Device.DEFAULT == "CPU" else 1
    out = Path(args.out) / grid.name
    print(f"{grid.title}\n{grid.about}\n"
          f"{len(grid.rows)} models, {counted(args.seeds, 'seed')}, {at_once} at a time, "
          f"into {out}; stopped, it goes on with the same command", flush=True)
    try:
      check_writable(out)
      cells = grid.plan(out, args.seeds)
      by_seed = dict.fromkeys(run for seed in zip(*cells.values()) for run in seed)
      train_all(program, [*by_seed], at_once)
      report(grid, cells, out)
      if then: then(out)
      return 0
    except UserError as e: parser.error(str(e))
  return 130

def look_at(parser:Parser, argv:list[str], look:Callable[[argparse.Namespace], None]) -> int:
  "The command line of a program that looks at trained models: runs `look` and reports its errors."
  args = parser.parse_args(argv)
  with Interrupt(lambda: "") as interrupt:
    setup_device()
    try:
      look(args)
      return 0
    except UserError as e: parser.error(str(e))
    except OSError as e: parser.error(f"{e.filename}: {e.strerror}")
    except ImportError: parser.error("the plot needs matplotlib: pip install matplotlib")
  return interrupt.status

# ---- tasks with a label a row -------------------------------------------------------------------
# Their rows are arrays, which batches are parts of: tokens (n,L), masks (n,L) and labels (n,).

def to_float(text:str) -> float|None:
  "The finite number that a text is, or None."
  try: x = float(text)
  except ValueError: return None
  return x if math.isfinite(x) else None

def stack(rows:list[tuple]) -> Batch: return tuple(map(np.stack, zip(*rows)))

def take(rows:Batch, index) -> Batch: return tuple(array[index] for array in rows)

def drawn_from(rows:Batch, args:argparse.Namespace) -> Callable[[int], Batch]:
  "A function from the step to its batch: each epoch has all rows, in an order of its own."
  n = len(rows[0])
  @functools.lru_cache(2)
  def order(epoch): return np.random.default_rng([args.seed, 3, epoch]).permutation(n)
  def batch(step):
    first = step*args.batch
    return take(rows, [order(i // n)[i % n] for i in range(first, first + args.batch)])
  return batch

def hold_out(rows:Batch, args:argparse.Namespace) -> tuple[Batch, Batch]:
  "Rows to train on, and --holdout of them, at least one, to evaluate on."
  n = len(rows[0])
  order = np.random.default_rng([args.seed, 2]).permutation(n)
  held = max(1, round(n*args.holdout))
  return take(rows, order[held:]), take(rows, order[:held])

def classification_metrics(targets:np.ndarray, predictions:np.ndarray, classes:list[str]
                           ) -> dict[str, float]:
  """Accuracy, F1 and Matthews' correlation (Gorodkin's for more than two) of numbers of classes. F1
  is that of the second of two, else the mean over the classes that occur in either."""
  K = len(classes)
  confusion = np.bincount(targets*K + predictions, minlength=K*K).reshape(K, K).astype(float)
  t, p, n, hits = confusion.sum(1), confusion.sum(0), confusion.sum(), np.trace(confusion)
  f1 = 2*np.diag(confusion) / np.maximum(1, t + p)
  spread = math.sqrt((n*n - p @ p) * (n*n - t @ t))
  if K == 2: name, mean = f"F1 of {listed(classes[1:])}", f1[1]
  else: name, mean = "mean F1", f1[t + p > 0].mean()
  return {"accuracy": hits/n, name: float(mean),
          "MCC": (hits*n - t @ p)/spread if spread else 0.0}

def show_rows(question:str, rows:Iterable[tuple[str, str, str]], n:int=5) -> None:
  "Prints the first rows of a task with the model's answer beside the right one."
  print(question)
  for row, answer, right in itertools.islice(rows, n):
    row = " ".join(row.split())
    if len(row) > 200: row = f"{row[:120]} … {row[-79:]}"
    print(f"{row}\n  the model: {answer}, right: {right}")

def regression_metrics(targets:np.ndarray, predictions:np.ndarray) -> dict[str, float]:
  "Pearson's and Spearman's correlation; ties share the mean of their ranks."
  def ranks(x):
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts-1)/2)[group]
  def pearson(a, b):
    varies = np.ptp(a) and np.ptp(b)
    return float(np.corrcoef(a, b)[0, 1]) if varies else 0.0
  return {"Pearson": pearson(targets, predictions),
          "Spearman": pearson(ranks(targets), ranks(predictions))}

def label_task(args:argparse.Namespace, about:str, tokenizer:Tokenizer|None, vocab_size:int,
               batch:Callable[[int], Batch], held_out:Batch, trained:np.ndarray,
               classes:list[str]|None, describe:Callable[[np.ndarray], str],
               schedule:str="cosine") -> Task:
  """A label for each row, by an encoder with a head on top: the number of a class, or without
  `classes` a real value. trained: labels of training rows, from which the baseline guesses.
  describe: the tokens of a row as the sample shows them."""
  targets = held_out[2]
  def forward(model, tokens, mask, labels):
    logits = model.classify(tokens, mask)
    if classes: return cross_entropy(logits.unsqueeze(1), labels.unsqueeze(1)), logits.argmax(-1)
    values = logits.squeeze(-1)
    return ((values - labels)**2).mean(), values
  def metrics(outputs):
    predictions = np.concatenate([predicted for _, predicted in outputs])
    if classes: return classification_metrics(targets, predictions.astype(int), classes)
    return regression_metrics(targets, predictions)
  if classes:
    counts = 1 + np.bincount(trained, minlength=len(classes))
    bits = -np.log2(counts / counts.sum())
    baseline, scale, unit = bits[targets].mean(), 1/math.log(2), "bits per label"
    share = np.mean(targets == counts.argmax())
    guess = f"labels by their frequency ({always('label', share)})"
  else:
    baseline, scale, unit = ((targets - trained.mean())**2).mean(), 1.0, "squared error"
    guess = "the mean of all"
  batches = [take(held_out, slice(i, i+args.batch)) for i in range(0, len(targets), args.batch)]
  def sample(model):
    tokens, mask, labels = rows = batches[0]
    predicted = train.make_eval(model, forward)(rows)[1]
    name = (lambda y: classes[int(y)]) if classes else "{:.4g}".format
    show_rows("which label?" if classes else "which value?",
              ((describe(row[seen == 1]), name(p), name(y))
               for row, seen, p, y in zip(tokens, mask, predicted, labels)))
  return Task(about, tokenizer, vocab_size, batch, batches, float(baseline), guess, scale, scale,
              unit, forward, metrics, "classify", classes or [""], schedule,
              sample, count=lambda batch: len(batch[0]))
