"""Ablation of the H3 layer, and pictures of it: its filters, and the layer as a matrix.

Claim: H3 (arXiv 2212.14052), section 3.1: an SSM recalls only if it can remember single tokens,
which the shift SSM is for, and compare tokens across the sequence, which the gates are for. The
paper argues so from S4D's figures (papers/synthetic.py) and gives none for the parts.

  python papers/layer.py --reproduce                     the ablation: 40 minutes on two cores
  python papers/layer.py --task recall --without gates   trains one model of it
  python papers/layer.py --plot DIR                      draws what a trained model does on a row of
                                                         its task, into layers.png in its folder
  python papers/layer.py --plot DIR DIR --row 3          two models beside each other, another row

The picture shows each layer as a matrix over output t and input s, as that of attention is:
y_t = Σ_s M[t,s] v_s. With k' the shift SSM's output and K the diagonal SSM's filter, its skip
weight added to K[0],

  a channel               M[t,s] = q_t K[t-s] k'_s
  a head of p channels    M[t,s] = K[t-s] q_t·k'_s       attention's before the softmax, but for K

All heads together, and the layer's projection, add a vector at t because of s. Its length is the
second matrix. Not here: S4D, whose matrix is the same for every row.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1]))
import math
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
  "Ablation of the H3 layer: accuracy of the last symbol, %",
  "no shift: k in place of shift(k); no gates: q = v = 1",
  {"H3": "--model h3", "one head": "--model h3 --head-dim 32",
   "no shift": "--model h3 --without shift", "no gates": "--model h3 --without gates"},
  {"induction": Column(f"--task induction {OFTEN}", "accuracy", {}),
   "recall": Column(f"--task recall {OFTEN}", "accuracy", {}),
   "recall, twice as long": Column(f"--task recall {OFTEN}", "accuracy at 40", {})},
  shares="table2")

# ---- layers as matrices -------------------------------------------------------------------------

class AtWork(NamedTuple):
  "A layer on R rows of L tokens; H3's heads are its channels where head_dim is 1."
  M: np.ndarray                  # (R,heads,L,L): output t is Σ_s M[t,s] v_s
  sent: np.ndarray               # (R,L,L,D): what the layer adds at t because of s
  shift: np.ndarray|None         # (D,N): the shift SSM's filter, D added to tap 0; None: attention
  diag: np.ndarray|None          # (heads,L): the diagonal SSM's filter K

def by_distance(K:np.ndarray) -> np.ndarray:
  "K[t-s], 0 where s > t: (H,L) -> (H,L,L)."
  t = np.arange(K.shape[1])
  distance = t[:, None] - t
  return np.where(distance >= 0, K[:, distance.clip(0)], 0)

def h3_at_work(mixer:H3Mixer, u:Tensor) -> AtWork:
  "u (R,L,D): the layer's input, after the norm."
  (R, L, D), shift, diag, p = u.shape, mixer.shift_ssm, mixer.diag_ssm, mixer.p
  q, k, v = (x.transpose(1, 2) for x in mixer.qkv(u))
  k = fftconv(k, shift.filter(), shift.D)
  q, k, v = (x.numpy().reshape(R, -1, p, L) for x in (q, k, v))         # (R,H,p,L)
  S, K = shift.filter().numpy(), diag.filter(L).numpy()
  S[:, 0] += shift.D.numpy()
  skip = np.eye(L) * diag.D.numpy()[:, None, None]                      # (H,L,L)
  M = np.einsum("rhdt,hts,rhds->rhts", q, by_distance(K) + skip, k, optimize=True)
  order = np.arange(D).reshape(-1, p)                     # the channel of head h, coordinate d
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
  """M (L,L), with a frame round what the last output gets from the inputs `asked`. What a token
  gets from itself, often the most, is drawn no darker than the most that it gets from others."""
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
  tokens = f"{reach.min():.0f} to {reach.max():.0f} tokens back"
  heat(diag_ax, K[reach.argsort()], f"{name}: K, {tokens}", aspect="auto")
  for ax in (shift_ax, diag_ax):
    ax.set_xlabel("distance, tokens", fontsize=7)
    ax.set_ylabel("channel", fontsize=7)
    for axis in ax.xaxis, ax.yaxis: axis.get_major_locator().set_params(integer=True, min_n_ticks=1)

def draw_layer(axes:np.ndarray, layer:AtWork, names:list[str], asked:np.ndarray,
               name:str) -> None:
  "Both matrices into the last two of a row of panels, H3's filters into the two before them."
  if layer.shift is not None: draw_filters(*axes[:2], layer, name)
  strongest = np.abs(layer.M[0, :, -1, :-1]).max(1).argmax()
  draw_matrix(axes[-2], layer.M[0, strongest], names, asked, f"{name}: M of head {strongest}")
  length = np.linalg.norm(layer.sent[0], axis=-1)
  draw_matrix(axes[-1], length, names, asked, f"{name}: what t gets from s")

def asked(task:str, row:np.ndarray) -> np.ndarray:
  """Inputs of a row, (L,), that the answer follows from: of recall the pairs with the key that is
  asked for, of induction the special symbol and what follows it."""
  if task == "recall":
    keys = 2*np.flatnonzero(row[:-2:2] == row[-1])
    return np.concatenate([keys, keys + 1])
  first = row.tolist().index(row[-1])
  return np.array([first, first + 1])

def plot(folders:list[str], which:int) -> Path:
  """Draws models on a held-out row, the first one's; returns the picture's path. UserError for
  models of other tasks than recall and induction, or of two."""
  models = [trained(folder, "papers/layer.py", "recall") for folder in folders]
  for folder, (args, *_) in zip(folders, models):
    if args.task not in MAKERS:
      raise UserError(f"{folder}: --plot is for recall and induction, not for --task {args.task}")
    if args.model == "s4d":
      raise UserError(f"{folder}: --plot draws H3 and attention; S4D's matrix is the same for "
                      "every row")
  tasks = {(args.task, args.symbols, args.length) for args, *_ in models}
  if len(tasks) > 1:
    raise UserError("the models were trained on different tasks, or with another --symbols or "
                    "--length: give those of one")
  args, task, _ = models[0]
  row = task.held_out[0][0][which]
  all_names = names_of(args.task, args.symbols)
  names, at = [all_names[s] for s in row], asked(args.task, row)
  drawn = [at_work(model, row[None]) for *_, model in models]
  widths = [4 if any(layer.shift is not None for layer in layers) else 2 for layers in drawn]
  high, wide = max(map(len, drawn)), sum(widths)
  fig, axes = panels(high*wide, wide, 3.2, 3.2)
  of_models = np.split(axes.reshape(high, wide), np.cumsum(widths)[:-1], axis=1)
  for (args, *_), layers, grid in zip(models, drawn, of_models):
    for i, (layer, line) in enumerate(zip(layers, grid), 1):
      draw_layer(line, layer, names, at, f"{args.model}, layer {i}")
  for ax in axes:                # attention has no filters, and a model may have fewer layers
    if not ax.images: ax.set_visible(False)
  path = Path(folders[0])
  picture = (path.parent if path.is_file() else path)/"layers.png"
  fig.savefig(picture)
  return picture

def look(argv:list[str]) -> int:
  "The command line of --plot."
  parser = Parser(prog="papers/layer.py")
  add = parser.add_argument
  add("--plot", metavar="DIR", nargs="+", required=True,
      help="draw the layers of models, on a held-out row, into layers.png in the first folder")
  add("--row", metavar="N", type=number(int, 0, 99), default=0, help="which row")
  return look_at(parser, argv, lambda args: print(f"wrote {plot(args.plot, args.row)}"))

def main(argv:list[str]|None=None) -> int:
  argv = sys.argv[1:] if argv is None else argv
  # in front; elsewhere --plot is train.py's, the picture of the losses
  if argv[:1] in (["--plot"], ["--row"]): return look(argv)
  return run_program("papers/layer.py", __doc__, GRID, "recall", argv)

if __name__ == "__main__": sys.exit(main())
