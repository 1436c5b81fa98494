"""Two tasks of the Long Range Arena: ListOps, and images read pixel by pixel; and their speed.

Claim: on long sequences SSMs are better than a Transformer, and faster to train: H3 (arXiv
2212.14052), Abstract and the part on FlashConv's speed; S4 (arXiv 2111.00396) for ListOps. The
papers' figures, unverified, come from notes on them:

  ListOps, lists of 500 to 2,000 tokens     S4 59.6 %, Transformer 36.37 %
  training, over the Transformer            S4 2.9x, S4 with FlashConv 5.8x

  python papers/arena.py --reproduce                      30 minutes on two cores
  python papers/arena.py --task listops --length 2000     the Arena's own size; 200 is a laptop's
  python papers/arena.py --task pixels --data mnist.npz   labels of your images

The models are bidirectional, s4d and transformer too. Not here: the Arena's other tasks, and
images.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1]))
import argparse, functools, random, re, warnings
from typing import Callable
import numpy as np
from tinygrad import Device
from papers.grid import (UNVERIFIED, Column, Grid, Run, drawn_from, hold_out, label_task,
                         run_program, stack, to_float, train_all)
from support.text import UserError, pad, print_table
from train import Task, number, task

# ---- ListOps ------------------------------------------------------------------------------------

CLOSE, PAD = 14, 15                # after ten digits and the four operators, 10 to 13
NAMES = [*"0123456789", "MIN(", "MAX(", "MED(", "SM(", ")"]
OPERATORS = (min, max, lambda values: (values[(len(values)-1)//2] + values[len(values)//2])//2,
             lambda values: sum(values) % 10)     # MIN, MAX, MED, SM of sorted digits
DEPTH, ARGUMENTS = 10, 10

def listops(rng:random.Random, low:int, high:int) -> tuple[list[int], int]:
  """Nested operations on digits as low < n < high tokens, and their value. An operator's token has
  its opening bracket in it. Tay et al. 2020, arXiv 2011.04006; Nangia and Bowman 2018."""
  tokens = []
  def node(depth):
    "Appends a digit or an operation to the tokens; returns its value."
    if len(tokens) >= high: return 0                                # too long already
    if depth >= DEPTH or rng.random() >= 0.25:
      tokens.append(rng.randrange(10))
      return tokens[-1]
    at = len(tokens)
    tokens.append(PAD)                                              # the operator is drawn last
    values = sorted(node(depth+1) for _ in range(rng.randint(2, ARGUMENTS)))
    operator = rng.randrange(4)
    tokens[at] = 10 + operator
    tokens.append(CLOSE)
    return OPERATORS[operator](values)
  while True:
    tokens.clear()
    value = node(1)
    if low < len(tokens) < high: return tokens, value

TRAIN, TEST = 96000, 2000

def listops_options(add:Callable) -> None:
  add("--held-out N", number(int, 1), TEST, "lists to evaluate on", fixed=True)

@task("listops", "the value of nested lists of operations", causal=False, options=listops_options,
      model="s4d", size="tiny", batch=32, length=200, weight_decay=0.05, steps=5000)
def listops_task(args:argparse.Namespace) -> Task:
  "The value, a digit, of nested operations on digits."
  L = args.length
  if not 48 <= L <= 2000:                         # of shorter ones many would come twice
    raise UserError("--task listops wants a --length from 48 to 2000")
  low = 500 if L == 2000 else L//10
  @functools.lru_cache(4096)                      # to make one takes half a millisecond
  def row(split, i):
    tokens, value = listops(random.Random(f"{args.seed} {split} {i}"), low, L)
    return *pad(tokens, L, PAD), np.int32(value)
  def batch(step):
    first = step*args.batch
    return stack([row(0, i % TRAIN) for i in range(first, first + args.batch)])
  held_out = stack([row(1, i) for i in range(args.held_out)])
  trained = [row(0, i)[2] for i in range(2000)]
  about = (f"listops: {TRAIN:,} lists of {low+1} to {L-1} tokens to train on, "
           f"{args.held_out:,} held out")
  return label_task(args, about, None, 16, batch, held_out, trained, [*"0123456789"],
                    lambda row: " ".join(NAMES[token] for token in row))

# ---- images -------------------------------------------------------------------------------------

Images = tuple[np.ndarray, np.ndarray]            # pixels (n,L) and labels (n,)

def check_images(images:np.ndarray, labels:np.ndarray) -> Images:
  "Flat images of pixels from 0 to 255, and whole labels; ValueError for others."
  x, y = np.asarray(images).reshape(len(images), -1), np.asarray(labels).reshape(-1)
  for numbers in (x, y):
    if not np.isfinite(numbers).all() or (numbers != numbers.astype(int)).any(): raise ValueError
  if len(x) != len(y) or x.shape[1] < 2 or x.min() < 0 or x.max() > 255: raise ValueError
  return x.astype(np.int32), y.astype(np.int32)

def read_images(path:Path) -> tuple[Images, Images|None]:
  "Images to train on, and held out if the file has such."
  try:
    if path.suffix == ".npz":
      with np.load(path) as f: arrays = {name: f[name] for name in f.files}
      x, y = (arrays.get(f"{name}_train", arrays.get(name)) for name in "xy")
      has_test = not {"x_test", "y_test"}.isdisjoint(arrays)
      test = check_images(arrays["x_test"], arrays["y_test"]) if has_test else None
      return check_images(x, y), test
    with open(path, encoding="utf-8-sig") as f:
      header = to_float(f.readline().split(",")[0]) is None
    with warnings.catch_warnings(action="ignore"):
      table = np.loadtxt(path, delimiter=",", ndmin=2, skiprows=int(header), encoding="utf-8-sig")
    return check_images(table[:, 1:], table[:, 0]), None
  except OSError as e: raise UserError(f"can't read {path}: {e.strerror}") from None
  except Exception:                               # numpy raises anything
    raise UserError(f"{path} is no table of images: a CSV has lines of label, pixels from 0 to "
                    "255, an .npz x_train, y_train and, if it likes, x_test, y_test") from None

def pixels_options(add:Callable) -> None:
  add("--data PATH", str, None, "a CSV of label, pixels 0 to 255, or an .npz of x_train, y_train, "
      "x_test, y_test", nargs="+")
  add("--holdout X", number(float, 0.001, 0.5), 0.05, "share of the images", fixed=True)

@task("pixels", "labels of images, read pixel by pixel", causal=False, options=pixels_options,
      model="s4d", size="tiny", batch=32, length=None, weight_decay=0.05, steps=5000)
def pixels_task(args:argparse.Namespace) -> Task:
  "Labels of images that are sequences of pixels, row after row."
  if not args.data or len(args.data) != 1:
    raise UserError("--task pixels takes one file of images: --data FILE")
  path = args.data[0]
  images, test = read_images(Path(path))
  (x, y), test = (images, test) if test else hold_out(images, args)
  L, names = x.shape[1], np.unique(y)
  if args.length not in (None, L):
    raise UserError(f"--length is that of an image here, {L}: leave it out")
  args.length = L
  if len(names) < 2 or test[0].shape[1] != L or not np.isin(test[1], names).all():
    raise UserError(f"{path}: give images of one size, of two labels or more, all of which are "
                    "trained on")
  def to_rows(images, labels):
    mask = np.broadcast_to(np.int32(1), images.shape)
    return images, mask, np.searchsorted(names, labels).astype(np.int32)
  rows, held_out = to_rows(x, y), to_rows(*test)
  about = f"{path}: {len(x):,} images of {L} pixels to train on, {len(test[0]):,} held out"
  return label_task(args, about, None, 256, drawn_from(rows, args), held_out, rows[2],
                    [*map(str, names)], lambda row: f"an image of {L} pixels: {row[:12]} …")

# ---- the grid, and the speed --------------------------------------------------------------------

PROGRAM = "papers/arena.py"
LISTOPS = "--task listops --n-layer 4"
GRID = Grid(
  "lra",
  "Long Range Arena, ListOps of 21 to 199 tokens: accuracy, %; 3,000 steps of S4D take a CPU as "
  "long as 1,300 of the Transformer",
  f"{UNVERIFIED}, for lists of 500 to 2,000 tokens",
  {"S4D": "--model s4d --steps 3000", "BiGS": "--model bigs --steps 1000",
   "Transformer": "--model transformer --steps 1300"},
  {"ListOps": Column(f"{LISTOPS} --eval-every 250", "accuracy",
                     {"S4D": "59.6 (S4)", "Transformer": "36.37"})})

# sequences, tokens, FLASH, steps that are timed. Not 4 x 2,000 without kernels: the Transformer had
# not done 4 steps in 200 seconds
SPEEDS = {"32 x 200 tokens": (32, 200, "1", 6), "32 x 200 tokens, FLASH=0": (32, 200, "0", 6),
          "4 x 2,000 tokens": (4, 2000, "1", 4)}

def show_speed(out:Path) -> None:
  "Trains each model for a few steps on all cores, and prints its steps a second."
  table = []
  for title, (batch, length, flash, steps) in SPEEDS.items():
    rates = []
    for row in GRID.rows:
      model = GRID.rows[row].split(" --steps")[0]
      options = (f"{LISTOPS} {model} --batch {batch} --length {length} --steps {steps} "
                 f"--eval-every 1000 --held-out {batch}")
      folder = out / f"speed-{Device.DEFAULT.lower()}-{batch}x{length}-flash{flash}-{row.lower()}"
      run = Run(f"{row}, {title}", 0, folder, options.split(), {"FLASH": flash})
      train_all(PROGRAM, [run], 1)
      tokens = re.findall(r"([\d,]+) tokens/s", (folder/"output.txt").read_text())[-1]
      rates.append(int(tokens.replace(",", "")) / (batch*length))
    table.append([title, *(f"{rate:.2f} ({rate/rates[-1]:.1f}x)" for rate in rates)])
  print("\ntraining steps a second, on all cores (times the Transformer's)")
  print_table(["", *GRID.rows], table)
  print("the H3 paper, over a Transformer: S4 2.9x, with FlashConv 5.8x (unverified)")

main = functools.partial(run_program, PROGRAM, __doc__, GRID, "listops", then=show_speed)

if __name__ == "__main__": sys.exit(main())
