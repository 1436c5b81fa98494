"""H3 paper, Table 3 in small: H3, hybrid and Transformer on Python's own source.

  python papers/language.py --reproduce
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from papers.grid import Grid, UNVERIFIED, main

LM = "bits per byte [125M: perplexity]"
GRID = Grid(
    "lm",
    "H3 paper, Table 3 in small: bits per byte of Python's library, held out", UNVERIFIED,
    # 0.99, 0.95 and 0.96 million parameters
    {"H3": "--model h3", "hybrid H3": "--model hybrid", "Transformer": "--model transformer --mlp-mult 5"},
    {LM: ("--task text --eval-every 60", "loss")},
    {("H3", LM): "21.0", ("hybrid H3", LM): "19.6", ("Transformer", LM): "20.6"}, percent=False)

if __name__ == "__main__": sys.exit(main("papers/language.py", GRID))
