"""What the parts of the H3 layer are for: taken out, one at a time, and drawn at work.

Claim: H3 (arXiv 2212.14052), section 3.1: an SSM recalls only if it can remember single tokens,
which the shift SSM is for, and compare tokens across the sequence, which the gates are for. The paper
argues so from S4D's figures (papers/synthetic.py) and gives none for the parts.

  python papers/layer.py --reproduce                      H3 without its parts: 35 minutes on two cores
  python papers/layer.py --task recall --without gates    trains one of them
  python papers/layer.py --plot DIR                       draws a trained model at work on a row of its
                                                          task, into layers.png in its folder

The picture shows each layer as a matrix over output t and input s, as that of attention is: y_t =
Σ_s M[t,s] v_s. With k' the shift SSM's output and K the diagonal SSM's filter, its skip weight added
to K[0],

  a channel               M[t,s] = q_t K[t-s] k'_s
  a head of p channels    M[t,s] = K[t-s] q_t·k'_s        as attention's before the softmax, but for K

All heads together, and the layer's projection, send a vector from s to t. Its length is the second
matrix. Not here: S4D, which has no such matrix of its own for each row.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1]))
import itertools, math
from typing import NamedTuple
import numpy as np
from tinygrad import Tensor
from flashconv import fftconv
from h3tiny import Attention, H3LM, H3Mixer
from papers.grid import Column, Grid, look_at, panels, run_program, trained
from papers.synthetic import MAKERS, OFTEN, names_of
from support.text import UserError
from train import Parser, number

GRID = Grid(
  "parts",
  "H3 with parts of its layer taken out: accuracy of the last symbol, %",
  "the shift SSM taken out hands on k as it is; the gates taken out are 1",
  {"H3": "--model h3", "one head": "--model h3 --head-dim 32",
   "no shift": "--model h3 --without shift", "no gates": "--model h3 --without gates"},
  {"induction": Column(f"--task induction {OFTEN}", "accuracy", {}),
   "recall": Column(f"--task recall {OFTEN}", "accuracy", {}),
   "recall, twice as long": Column(f"--task recall {OFTEN}", "accuracy at 40", {})},
  shares="table2")

# ---- layers as matrices -------------------------------------------------------------------------

class AtWork(NamedTuple):
  "A layer on R rows of L tokens, as numpy arrays; H3's heads are its channels where head_dim is 1."
  M: np.ndarray                  # (R,heads,L,L): output t is Σ_s M[t,s] v_s
  sent: np.ndarray               # (R,L,L,D): what the layer adds at t because of s; the sum over s is y_t
  shift: np.ndarray|None         # (D,N): the shift SSM's filter, its skip weight at 0; None: attention
  diag: np.ndarray|None          # (heads,L): the diagonal SSM's filter K

def by_distance(K:np.ndarray) -> np.ndarray:
  "K[t-s], 0 where s > t: (H,L) -> (H,L,L)."
  t = np.arange(K.shape[1])
  distance = t[:, None] - t
  return np.where(distance >= 0, K[:, distance.clip(0)], 0)

def h3_at_work(mixer:H3Mixer, u:Tensor) -> AtWork:
  "u (R,L,D), what the layer reads."
  (R, L, D), shift, diag, p = u.shape, mixer.shift_ssm, mixer.diag_ssm, mixer.p
  q, k, v = (x.transpose(1, 2) for x in mixer.qkv(u))
  k = fftconv(k, shift.filter(), shift.D)
  q, k, v = (x.numpy().reshape(R, -1, p, L) for x in (q, k, v))         # (R,H,p,L)
  S, K = shift.filter().numpy(), diag.filter(L).numpy()
  S[:, 0] += shift.D.numpy()
  skip = np.eye(L) * diag.D.numpy()[:, None, None]                      # (H,L,L)
  M = np.einsum("rhdt,hts,rhds->rhts", q, by_distance(K) + skip, k, optimize=True)
  order = np.arange(D).reshape(-1, p)                                   # channel of head h, coordinate d
  if mixer.head_order == "d2h": order = np.arange(D).reshape(p, -1).T
  Wo = mixer.output_linear.weight.numpy()[:, order]                     # (D,H,p)
  return AtWork(M, sent(M, v.swapaxes(2, 3), Wo), S, K)

def attention_at_work(mixer:Attention, u:Tensor) -> AtWork:
  q, k, v = mixer.qkv(u, None)                                          # (R,heads,L,hd)
  L, hd = u.shape[1], mixer.head_size
  scores = q @ k.transpose(-1, -2) / math.sqrt(hd)
  M = (Tensor.ones(L, L).tril() > 0).where(scores, -math.inf).softmax(-1).numpy()
  Wo = mixer.out_proj.weight.numpy().reshape(u.shape[2], -1, hd)
  return AtWork(M, sent(M, v.numpy(), Wo), None, None)

def sent(M:np.ndarray, v:np.ndarray, Wo:np.ndarray) -> np.ndarray:
  "M (R,H,L,L), v (R,H,L,hd), projection Wo (D,H,hd) -> (R,L,L,D)."
  return np.einsum("rhts,rhso->rtso", M, np.einsum("ohd,rhsd->rhso", Wo, v), optimize=True)

def at_work(model:H3LM, rows:np.ndarray) -> list[AtWork]:
  "Each layer of a model on rows of tokens, (R,L)."
  x, layers = model.embed(Tensor(rows.astype(np.int32))), []
  for layer in model.backbone.layers:
    u = layer.norm1(x).realize()
    see = attention_at_work if isinstance(layer.mixer, Attention) else h3_at_work
    layers.append(see(layer.mixer, u))
    x = layer(x)[0]
  return layers

# ---- the picture --------------------------------------------------------------------------------

TAPS = 8                         # of the shift SSM's filter: its reach in tasks of pairs

def heat(ax, X:np.ndarray, title:str, shown:np.ndarray|None=None, **options) -> None:
  "An array in colours: red above 0, blue below, darkest at the largest of X, or of `shown`."
  limit = np.abs(X if shown is None else shown).max() or 1
  ax.imshow(X, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest", **options)
  ax.set_title(title, fontsize=7, loc="left")
  ax.tick_params(labelsize=6, length=2)

def draw_matrix(ax, M:np.ndarray, names:list[str], asked:np.ndarray, title:str) -> None:
  """M (L,L), with a frame round what the last output gets from the inputs `asked`. What a token gets
  from itself, often the most, is as dark as what it gets from others at most."""
  from matplotlib.patches import Rectangle
  heat(ax, M, title, np.tril(M, -1))
  L = len(M)
  ax.set_xticks(range(L), names, fontsize=5)
  ax.set_yticks(range(L), names, fontsize=5)
  for s in asked: ax.add_patch(Rectangle((s-0.5, L-1.5), 1, 1, fill=False, lw=0.8))

def draw_filters(shift_ax, diag_ax, layer:AtWork, name:str) -> None:
  "Both SSMs' filters, a line for each channel, the diagonal SSM's by how far they look back."
  heat(shift_ax, layer.shift[:, :TAPS], f"{name}: filter of the shift SSM", aspect="auto")
  energy = layer.diag**2
  reach = energy @ np.arange(energy.shape[1]) / energy.sum(1)            # mean distance, in tokens
  K = layer.diag / np.abs(layer.diag).max(1, keepdims=True)
  heat(diag_ax, K[reach.argsort()], f"{name}: K, {reach.min():.0f} to {reach.max():.0f} tokens back",
       aspect="auto")
  for ax in (shift_ax, diag_ax):
    ax.set_xlabel("distance, tokens", fontsize=7)
    ax.set_ylabel("channel", fontsize=7)
    ax.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)

def draw_layer(axes:np.ndarray, layer:AtWork|None, names:list[str], asked:np.ndarray, name:str) -> None:
  "Filters, if there are any, and both matrices into the last panels of a line; the others are hidden."
  for ax in axes[:-2] if layer and layer.shift is None else axes if layer is None else ():
    ax.set_visible(False)
  if layer is None: return
  if layer.shift is not None: draw_filters(*axes[:2], layer, name)
  strongest = np.abs(layer.M[0, :, -1, :-1]).max(1).argmax()
  draw_matrix(axes[-2], layer.M[0, strongest], names, asked, f"{name}: M of head {strongest}")
  length = np.sqrt((layer.sent[0]**2).sum(-1))
  draw_matrix(axes[-1], length, names, asked, f"{name}: what t gets from s")

def asked(task:str, row:np.ndarray) -> np.ndarray:
  """Inputs of a row, (L,), that the answer follows from: of recall the pairs with the key that is asked
  for, of induction the special symbol and what follows it."""
  if task == "recall":
    keys = 2*np.flatnonzero(row[:-2:2] == row[-1])
    return np.concatenate([keys, keys + 1])
  first = row.tolist().index(row[-1])
  return np.array([first, first + 1])

def plot(folders:list[str], which:int) -> Path:
  """Draws models on a held-out row, the first one's; returns the picture's path. UserError for models of
  other tasks than recall and induction, or of two."""
  models = []
  for folder in folders:
    args, task, model = trained(folder, "papers/layer.py", "recall")
    if args.task not in MAKERS or args.model == "s4d":
      raise UserError(f"{folder}: --plot draws H3 and attention with recall or induction, not --model "
                      f"{args.model} with {args.task}; S4D has no such matrix of its own for each row")
    models.append((args, task, model))
  args, task, _ = models[0]
  if any((a.task, a.symbols) != (args.task, args.symbols) for a, _, _ in models):
    raise UserError("the models have learned different tasks: give those of one")
  row = task.held_out[0][0][which]
  names = [names_of(args.symbols, args.symbols//2 - 1 if args.task == "recall" else 0)[s] for s in row]
  at = asked(args.task, row)
  drawn = [at_work(model, row[None]) for _, _, model in models]
  columns = [4 if any(layer.shift is not None for layer in layers) else 2 for layers in drawn]
  high, wide = max(map(len, drawn)), sum(columns)
  try: fig, axes = panels(high*wide, wide, 3.2, 3.2)
  except ImportError: raise UserError("the plot needs matplotlib: pip install matplotlib") from None
  axes = axes.reshape(high, wide)
  for (a, _, _), layers, end, n in zip(models, drawn, np.cumsum(columns), columns):
    for i, (layer, line) in enumerate(itertools.zip_longest(layers, axes[:, end-n:end])):
      draw_layer(line, layer, names, at, f"{a.model}, layer {i+1}")
  path = Path(folders[0])
  picture = (path.parent if path.is_file() else path)/"layers.png"
  fig.savefig(picture)
  return picture

def main(argv:list[str]|None=None) -> int:
  argv = sys.argv[1:] if argv is None else argv
  if argv[:1] != ["--plot"]: return run_program("papers/layer.py", __doc__, GRID, "recall", argv)
  parser = Parser(prog="papers/layer.py")
  parser.add_argument("--plot", metavar="DIR", nargs="+", required=True)
  parser.add_argument("--row", type=number(int, 0, 99), default=0)
  return look_at(parser, argv, lambda args: print(f"wrote {plot(args.plot, args.row)}"))

if __name__ == "__main__": sys.exit(main())
