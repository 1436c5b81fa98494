"""Language modelling: H3 and its hybrid against the Transformer, in small.

Claim: H3 (arXiv 2212.14052), Table 3: test perplexity on OpenWebText at 125M parameters is 21.0
for H3, 19.6 for the hybrid, 20.6 for the Transformer (unverified, from notes on the paper). Here
the figure is bits per byte of Python's library after 600 steps, of models of about 0.95 million
parameters.

  python papers/language.py --reproduce                   10 minutes on two cores

The task is train.py's own, text. Not here: OpenWebText, and models of 125M.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1]))
import functools
from papers.grid import UNVERIFIED, Column, Grid, run_program

GRID = Grid(
  "lm",
  "H3 paper, Table 3 in small: bits per byte of Python's library, held out", UNVERIFIED,
  # 0.99, 0.95 and 0.96 million parameters
  {"H3": "--model h3", "hybrid H3": "--model hybrid",
   "Transformer": "--model transformer --mlp-mult 5"},
  {"bits per byte [125M: perplexity]": Column(
    "--task text --eval-every 60", "loss",
    {"H3": "21.0", "hybrid H3": "19.6", "Transformer": "20.6"})},
  percent=False)

main = functools.partial(run_program, "papers/language.py", __doc__, GRID, "text")

if __name__ == "__main__": sys.exit(main())
