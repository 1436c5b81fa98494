"""Two tasks of the Long Range Arena: nested lists of operations, and images as sequences of pixels.

  python papers/arena.py --task listops --out listops           trains one model
  python papers/arena.py --task pixels --data mnist.npz --out pixels
  python papers/arena.py --reproduce                            the table, three seeds each, and the speed
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import csv, functools, itertools, random, re, tempfile, warnings
import numpy as np
from tinygrad import Device
from papers.grid import Grid, UNVERIFIED, child, hold_out, labelled, main, real, show_table, shuffled
from support.text import UserError
from train import Batch, Task, argparse, number, task

OPERATORS = ("MIN", "MAX", "MED", "SM")
DEPTH, ARGUMENTS = 10, 10

def listops(rng:random.Random, low:int, high:int) -> tuple[list[int], int]:
  """Tokens, low < n < high, and the value of nested operations on digits (Tay et al. 2020, arXiv 2011.04006; Nangia and
  Bowman 2018, arXiv 1804.06028): 0-9 digits, 10-13 an operator with its bracket, 14 the closing bracket."""
  def node(depth:int, tokens:list[int]) -> int:
    if len(tokens) >= high: return 0                                # too long already
    if depth >= DEPTH or rng.random() >= 0.25:
      tokens.append(rng.randrange(10))
      return tokens[-1]
    tokens.append(0)
    at = len(tokens) - 1
    values = sorted(node(depth+1, tokens) for _ in range(rng.randint(2, ARGUMENTS)))
    op = rng.randrange(4)
    tokens[at] = 10 + op
    tokens.append(14)
    n = len(values)
    return (values[0], values[-1], (values[(n-1)//2] + values[n//2])//2, sum(values) % 10)[op]
  while True:
    value = node(1, tokens := [])
    if low < len(tokens) < high: return tokens, value

LISTOPS = 96000, 2000                            # to train on, held out

@task("listops", "the value of nested lists of operations", causal=False, model="s4d", batch=32, length=200,
      weight_decay=0.05, steps=5000, size="tiny")
def listops_task(args:argparse.Namespace) -> Task:
  "The value, a digit, of nested operations; --length 200 is a laptop's size, 2000 the Arena's own."
  L = args.length
  if not 48 <= L <= 2000:                        # of shorter ones many would come twice
    raise UserError("--task listops wants a --length from 48 to 2000")
  low, high = 500 if L == 2000 else L//10, L
  @functools.lru_cache(4096)                     # to make one takes half a millisecond, and more epochs may come
  def row(split:int, i:int) -> Batch:
    tokens, value = listops(random.Random(f"{args.seed} {split} {i}"), low, high)
    fill = L - len(tokens)
    return (np.array(tokens + [15]*fill, np.int32), np.array([1]*len(tokens) + [0]*fill, np.int32), np.int32(value))
  def batch(step:int) -> Batch:
    rows = [row(0, i % LISTOPS[0]) for i in range(step*args.batch, (step+1)*args.batch)]
    return tuple(np.stack(x) for x in zip(*rows))
  held = [row(1, i) for i in range(LISTOPS[1])]
  trained = np.array([row(0, i)[2] for i in range(2000)])
  about = f"listops: {LISTOPS[0]:,} lists of {low+1} to {high-1} tokens to train on, {len(held):,} held out"
  return labelled(args, about, None, 16, batch, held, trained, [str(i) for i in range(10)])

def read_images(path:Path) -> tuple[np.ndarray, ...]:
  "x (n,pixels), y (n,) to train on, and held out if the file says so, else None."
  try:
    if path.suffix == ".npz":
      with np.load(path) as f: parts = {k: f[k] for k in f.files}
      x, y = parts.get("x_train", parts.get("x")), parts.get("y_train", parts.get("y"))
      more = [parts.get("x_test"), parts.get("y_test")]
    else:
      with open(path, encoding="utf-8-sig") as f: head = real(f.readline().split(",")[0]) is None
      with warnings.catch_warnings(action="ignore"):
        table = np.loadtxt(path, delimiter=",", ndmin=2, skiprows=int(head), encoding="utf-8-sig")
      x, y, more = table[:, 1:], table[:, 0], [None, None]
    flat = lambda a: None if a is None else np.asarray(a).reshape(len(a), -1)
    images, labels = [flat(x), flat(more[0])], [None if a is None else np.asarray(a).reshape(-1) for a in (y, more[1])]
    whole = lambda a: a is None or (np.isfinite(a).all() and (a == a.astype(int)).all())
    if not all(map(whole, (*images, *labels))) or images[0].shape[1] < 2: raise ValueError
    if any(a is not None and (a.min() < 0 or a.max() > 255) for a in images): raise ValueError
    if any(a is not b and len(a) != len(b) for a, b in zip(images, labels)): raise ValueError  # neither, or as many
    found = images[0], labels[0], images[1], labels[1]
  except OSError as e: raise UserError(f"can't read {path}: {e.strerror}") from None
  except Exception:                              # numpy raises anything
    raise UserError(f"{path} is no table of images: a CSV has lines of label, pixels from 0 to 255, an .npz x_train, "
                    "y_train and, if it likes, x_test, y_test") from None
  return tuple(None if a is None else a.astype(np.int32) for a in found)

def image_options(add) -> None:
  add("--data", str, None, "a CSV of label, pixels 0 to 255, or an .npz of x_train, y_train, x_test, y_test", "none",
      nargs="+", metavar="PATH")
  add("--holdout", number(float, 0.001, 0.5), 0.05, "share of the images", metavar="X")

@task("pixels", "labels of images, read pixel by pixel", causal=False, options=image_options, model="s4d", batch=32,
      length=None, weight_decay=0.05, steps=5000, size="tiny")
def pixels_task(args:argparse.Namespace) -> Task:
  "Images as sequences of pixels, row after row, and their labels."
  if not args.data or len(args.data) != 1: raise UserError("--task pixels takes one file of images: --data FILE")
  x, y, tx, ty = read_images(Path(args.data[0]))
  if tx is None:
    learned, kept = hold_out(args, len(x))
    x, y, tx, ty = x[learned], y[learned], x[kept], y[kept]
  if args.length not in (None, x.shape[1]):
    raise UserError(f"--length is that of an image here, {x.shape[1]}: leave it out")
  if not len(x) or tx.shape[1] != x.shape[1] or len(names := np.unique(y)) < 2 or not np.isin(ty, names).all():
    raise UserError(f"{args.data[0]}: give images of one size, of two labels or more, all of which are trained on")
  args.length = x.shape[1]
  row = lambda x, y: (x, np.ones(args.length, np.int32), np.int32(np.searchsorted(names, y)))
  numbers = shuffled(args, len(x))
  def batch(step:int) -> Batch: return tuple(np.stack(a) for a in zip(*(row(x[i], y[i]) for i in numbers(step))))
  about = f"{args.data[0]}: {len(x):,} images of {args.length} pixels to train on, {len(tx):,} held out"
  held, trained = [row(*r) for r in zip(tx, ty)], np.searchsorted(names, y)
  return labelled(args, about, None, 256, batch, held, trained, [str(n) for n in names])

GRID = Grid(
    "lra",
    "Long Range Arena, ListOps of 21 to 199 tokens: accuracy, %; 3,000 steps of S4D take a CPU as long as 1,300 of the "
    "Transformer", f"{UNVERIFIED}, for lists of 500 to 2,000 tokens",
    {"S4D": "--model s4d --steps 3000", "BiGS": "--model bigs --steps 1000",
     "Transformer": "--model transformer --steps 1300"},
    {"ListOps": ("--task listops --n-layer 4 --eval-every 250", "accuracy")},
    {("S4D", "ListOps"): "59.6 (S4)", ("Transformer", "ListOps"): "36.37"})

# length, FLASH: sequences a step, steps that are timed. Not (2000, "0"): the Transformer had not done 4 in 200 seconds
ARENA = {(200, "1"): (32, 6), (200, "0"): (32, 6), (2000, "1"): (4, 4)}

def arena_speed(grid:Grid, path:Path) -> None:
  "How fast the Long Range Arena's models train, with and without the kernels; kept in a CSV, and not timed again."
  names = [*grid.rows]                                   # the Transformer is the last
  try:
    with open(path) as f: rates = {(r, int(L), flash): float(x) for r, L, flash, x in [*csv.reader(f)][1:]}
  except (OSError, ValueError): rates = {}
  if {*rates} != {(row, *cell) for row in names for cell in ARENA}:
    rates, task = {}, next(iter(grid.columns.values()))[0].split()
    for ((L, flash), (batch, steps)), row in itertools.product(ARENA.items(), names):
      with tempfile.TemporaryDirectory() as folder:
        few = ["--steps", str(steps), "--eval-every", "1000", "--length", str(L), "--batch", str(batch)]
        args = [*task, *grid.rows[row].split(), *few, "--sample", "0", "--out", folder]
        out = child(f"from papers import arena; arena.LISTOPS = 64, {batch}; train.main({args})", FLASH=flash)
      rates[row, L, flash] = int(re.findall(r"([\d,]+) tokens/s", out)[-1].replace(",", "")) / (batch*L)
    with open(path, "w", newline="") as f:
      csv.writer(f).writerows([["model", "length", "flash", "steps_per_second"],
                               *([*k, round(x, 4)] for k, x in rates.items())])
  print("\ntraining steps a second, on all cores (times the Transformer's)")
  show_table(["", *names], [[f"{batch} x {L:,} tokens" + ", FLASH=0"*(flash == "0"), *(
    f"{rates[n, L, flash]:.2f} ({rates[n, L, flash]/rates[names[-1], L, flash]:.1f}x)" for n in names)]
    for (L, flash), (batch, _) in ARENA.items()])
  print("the H3 paper, over a Transformer: S4 2.9x, with FlashConv 5.8x (unverified)")

if __name__ == "__main__":
  sys.exit(main("papers/arena.py", GRID, default="listops",
                after=lambda out: arena_speed(GRID, out/f"speed-{Device.DEFAULT.lower()}.csv")))
