"""Language modelling: H3 and its hybrid against the Transformer, in small.

Claim: H3 (arXiv 2212.14052), Table 3: test perplexity on OpenWebText at 125M parameters is 21.0
for H3, 19.6 for the hybrid, 20.6 for the Transformer (unverified, from notes on the paper). Here
the figure is bits per byte of Python's library, of models of about 0.95 million parameters after
600 steps in rows of 256 bytes; and of 1.9 million after 1,600 steps in rows of 1,024, where the
hybrid has attention in the 2nd and the 6th of 8 layers, by the paper's rule.

  python papers/language.py --reproduce                   50 minutes on two cores
  python papers/language.py --positions book longer       draws bits per byte by position into
                                                          positions.png: what long memory is worth

The task is train.py's own, text. Not here: OpenWebText, and models of 125M.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1]))
import itertools
import numpy as np
import generate
from papers.grid import COLORS, UNVERIFIED, Column, Grid, look_at, panels, run_program
from support.text import Parser, UserError
from support.training import check_writable
from train import PICTURES

GRID = Grid(
  "lm",
  "H3 paper, Table 3 in small: bits per byte of Python's library, held out", UNVERIFIED,
  # 0.99, 0.95 and 0.96 million parameters; with 8 layers 1.95, 1.87 and 1.88
  {"H3": "--model h3", "hybrid H3": "--model hybrid",
   "Transformer": "--model transformer --mlp-mult 5"},
  {"bits per byte [125M: perplexity]": Column(
    "--task text --eval-every 60", "loss",
    {"H3": "21.0", "hybrid H3": "19.6", "Transformer": "20.6"}),
   "bits per byte, 8 layers, rows of 1,024": Column(
    "--task text --n-layer 8 --length 1024 --batch 2 --steps 1600 --eval-every 100", "loss", {})},
  percent=False)

# ---- what long memory is worth ------------------------------------------------------------------

def end_of(text:str, most:int) -> str:
  "The last characters of a text that is too long: a path's end tells it from others."
  return text if len(text) <= most else "…" + text[1-most:]

def plot_positions(models:list[str], data:str|None, path:Path) -> None:
  """Draws bits per byte by position, a line for each model. Where its state carries all of a text,
  a dotted one has the same model in windows, as long as its rows in training."""
  if path.suffix not in PICTURES:
    raise UserError(f"--out {path}: the picture's name ends in {' or '.join(PICTURES)}")
  check_writable(path.parent)
  text = ["--perplexity", data] if data else []
  args = generate.parser().parse_args(["--compare", *models, *text])
  saved, about, texts = generate.models_to_compare(args)
  fig, (ax,) = panels(1, 1, 6.4, 4.2)
  for name, model, color in zip(models, saved, itertools.cycle(COLORS)):
    for asked, line in (generate.WHOLE, "o-"), (None, ":"):
      args.window = asked
      *_, window, found = generate.predict(args, model, texts)
      begins, _, (bits,) = generate.bits_by_position([found])
      middle = np.maximum(1.5*begins, generate.FIRST_RANGE/2)
      label = f"{end_of(name, 30)}, {f'windows of {window:,}' if window else 'whole'}"
      ax.plot(middle, bits, line, color=color, lw=1.3, ms=3, label=label)
      if window: break                            # no state carries all of a text
  ax.set_xscale("log", base=2)
  ax.xaxis.set_major_formatter("{x:,.0f}")
  ax.set(title=end_of(about, 55), xlabel="position in bytes", ylabel="bits per byte")
  ax.grid(alpha=0.25)
  ax.legend(frameon=False)
  fig.savefig(path)
  print(f"wrote {path}")

def look(argv:list[str]) -> int:
  "The command line of --positions."
  parser = Parser(prog="papers/language.py")
  add = parser.add_argument
  add("--positions", metavar="MODEL", nargs="+",
      help="draw bits per byte by position, a line for each model, named as in generate.py")
  add("--data", metavar="FILE", help="the text (default: what the first one's training held out)")
  add("--out", metavar="FILE", type=Path, default="positions.png", help="the picture")
  return look_at(parser, argv, lambda args: plot_positions(args.positions, args.data, args.out))

def main(argv:list[str]|None=None) -> int:
  argv = sys.argv[1:] if argv is None else argv
  if "--positions" in argv: return look(argv)
  return run_program("papers/language.py", __doc__, GRID, "text", argv)

if __name__ == "__main__": sys.exit(main())
