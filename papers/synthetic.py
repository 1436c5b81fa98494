"""The synthetic languages of the H3 paper, Table 2: induction head and associative recall.

  python papers/synthetic.py --task recall --out recall         trains one model
  python papers/synthetic.py --reproduce                        the table, three seeds each
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import math
import numpy as np
from tinygrad import Tensor
from h3tiny import H3LM
from papers.grid import Grid, UNVERIFIED, main, shuffled
from support.text import UserError
from train import SIZES, Batch, Task, argparse, cross_entropy, number, task

def induction(rng:np.random.Generator, n:int, length:int, symbols:int) -> np.ndarray:
  "Induction head (n, length+2): ordinary symbols, somewhere a special one, at the end it again; what followed it."
  rows = np.concatenate([rng.integers(0, symbols-2, (n, length)), np.full((n, 2), symbols-2)], 1)
  at, i = rng.integers(0, length-2, n), np.arange(n)
  rows[i, at] = symbols-2
  rows[:, -1] = rows[i, at+1]
  return rows

def recall(rng:np.random.Generator, n:int, length:int, symbols:int) -> np.ndarray:
  "Associative recall (n, length+3): pairs of key and value, by a map of the row's own; the special symbol, key, value."
  half = (symbols-2)//2
  keys, values = rng.integers(0, half, (n, length//2)), rng.integers(half, 2*half, (n, half))
  pairs = np.stack([keys, np.take_along_axis(values, keys, 1)], 2).reshape(n, -1)
  there = (keys[:, :, None] == np.arange(half)).any(1)                # a key that occurs, however often, is as likely
  asked = (rng.random((n, half)) * there).argmax(1)
  return np.concatenate([pairs, np.full((n, 1), symbols-2), asked[:, None], values[np.arange(n), asked][:, None]], 1)

EXAMPLES = 5000, 500                             # to train on, held out

def options(add) -> None:
  add("--symbols", number(int, 4), None, "symbols, of which two are special", "20 for induction, 10 for recall",
      metavar="N", fixed=True)

COMMON = dict(causal=True, options=options, model="h3", batch=32, weight_decay=0.1, size="table2",
              embed_dropout=0.1)
@task("induction", "the symbol that followed a special one", length=30, steps=157*400, symbols=20, **COMMON)
@task("recall", "the value of a key among pairs", length=20, steps=157*200, symbols=10, **COMMON)
def language_task(args:argparse.Namespace) -> Task:
  """Rows of a language, all of whose next symbols are learned, and the last one is asked for (arXiv 2212.14052, Table
  2). Recall is asked for in rows of twice the length, too."""
  make, V = {"induction": induction, "recall": recall}[args.task], args.symbols
  if args.warmup is None: args.warmup = args.steps//10
  # the official 0.02 is for wide models: with it attention of width 32 has no induction head after 62,800 steps
  attention = args.model in ("hybrid", "transformer") or args.attn_layers
  if args.init_std is None and attention: args.init_std = math.sqrt(2/5/(args.d_model or SIZES[args.size].d_model))
  if args.length < 4: raise UserError(f"--task {args.task} wants a --length of at least 4")
  def draw(split:int, n:int, length:int) -> np.ndarray:
    rng, rows = np.random.default_rng([args.seed, 5, split]), np.zeros((0, 0), np.int64)
    for _ in range(100):                                            # no row comes twice
      more = make(rng, 2*n, length, V)
      rows = more if not len(rows) else np.concatenate([rows, more])
      rows = rows[np.sort(np.unique(rows, axis=0, return_index=True)[1])]
      if len(rows) >= n: return rows[:n].astype(np.int32)
    raise UserError(f"--task {args.task}: there are not {n} different rows of --length {args.length} and --symbols {V}")
  train = draw(0, EXAMPLES[0], args.length)
  numbers = shuffled(args, len(train))
  def batch(step:int) -> Batch:
    w = train[numbers(step)]
    return w[:, :-1], w[:, 1:]
  def asked(rows:np.ndarray) -> list[Batch]:
    x, y = rows[:, :-1], np.where(np.arange(1, rows.shape[1]) == rows.shape[1]-1, rows[:, 1:], -1)
    return [(x[i:i+100], y[i:i+100].astype(np.int32)) for i in range(0, len(x), 100)]
  test = draw(1, EXAMPLES[1], args.length)
  held, longer = asked(test), asked(draw(2, EXAMPLES[1], 2*args.length)) if make is recall else []
  # the commonest value of a row's pairs: what one knows who knows no key
  common = np.mean([np.bincount(r[1:args.length:2]).argmax() == r[-1] for r in test]) if make is recall else 1/(V-2)
  def forward(model:H3LM, x:Tensor, y:Tensor) -> tuple[Tensor, ...]:
    logits = model(x)
    return cross_entropy(logits, y), ((logits.argmax(-1) == y) * (y >= 0)).sum()
  def metrics(outputs:list[Batch]) -> dict[str, float]:
    hits = np.array([float(o[1]) for o in outputs])
    of = lambda some, batches: float(some.sum() / sum(len(b[0]) for b in batches))
    return {"accuracy": of(hits[:len(held)], held)} | \
      ({f"accuracy at {2*args.length}": of(hits[len(held):], longer)} if longer else {})
  what = "the commonest value of a row" if make is recall else "any symbol"
  guess = f"answers at random ({what} is right at {common:.3f})"
  about = f"{args.task}: {EXAMPLES[0]:,} rows of {train.shape[1]} symbols of {V} to train on, {EXAMPLES[1]} held out"
  return Task(about, None, V, batch, held + longer, math.log2((V-2)//2 if make is recall else V-2), guess,
              unit="bits per symbol", forward=forward, metrics=metrics, metrics_only=len(longer), stop_at=("accuracy", 0.995),
              schedule="linear" if args.task == "recall" else "cosine")

GRID = Grid(
    "table2",
    "H3 paper, Table 2: accuracy of the last symbol, %, after 200 epochs at most",
    f"{UNVERIFIED}; attention has rotary positions and first weights of 0.112, the others 0.02",
    {"S4D": "--model s4d", "H3": "--model h3", "attention": "--model transformer"},
    {"induction": ("--task induction --steps 31400 --warmup 1000 --eval-every 785", "accuracy"),
     "recall": ("--task recall --eval-every 785", "accuracy"),
     "recall at 40": ("--task recall --eval-every 785", "accuracy at 40")},
    {("S4D", "induction"): "35.6", ("S4D", "recall"): "86.0", ("H3", "induction"): "100", ("H3", "recall"): "99.8",
     ("H3", "recall at 40"): "98.4", ("attention", "induction"): "100", ("attention", "recall"): "100"})

if __name__ == "__main__": sys.exit(main("papers/synthetic.py", GRID, default="recall"))
