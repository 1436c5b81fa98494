"""BiGS: subject-verb agreement, the ablation in small, filters and arithmetic.

  python papers/bigs.py --task agreement --out agreement        trains one model
  python papers/bigs.py --reproduce                             the table, three seeds each
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import math
import numpy as np
from tinygrad import GlobalCounters, Tensor
from bigs_tiny import BiGS, BiGSConfig, filters
from support.cpu import check_kernels, embedding, setup_device
from support.checkpoints import CheckpointError
from papers.grid import Grid, UNVERIFIED, main
from support.text import UserError
from train import KINDS, Batch, Parser, Task, argparse, number, cross_entropy, task

# singular and plural; a relative clause about a thing, or about a person
NOUNS = [n.split("/") for n in "key/keys door/doors box/boxes book/books author/authors teacher/teachers dog/dogs "
         "child/children man/men woman/women house/houses farmer/farmers picture/pictures letter/letters "
         "engine/engines garden/gardens".split()]
VERBS = [v.split("/") for v in "is/are was/were has/have sees/see likes/like moves/move waits/wait knows/know "
         "holds/hold needs/need".split()]
PREPOSITIONS, ADJECTIVES = "near behind of beside with under".split(), "old small red quiet strange".split()
ENDS = [e.split() for e in "here|there|today|the sun|a lot|for a long time|once more".split("|")]
WORDS = sorted({"the", "that", "every", ".", *(w for p in NOUNS+VERBS for w in p), *PREPOSITIONS, *ADJECTIVES,
                *(w for e in ENDS for w in e)})
FEW = (0.45, 0.3, 0.15, 0.07, 0.03)              # of training sentences have so many nouns between subject and verb

def sentence(rng:np.random.Generator, between:int, attract:bool) -> tuple[list[str], int, str]:
  """Words, the place of the main verb, and its wrong form: a subject, `between` phrases with a noun each, the verb. The
  nouns between are of the other number with `attract`, else of any. A phrase is a preposition's, or a relative clause
  about the noun before ("that sees the N": its verb agrees with that noun) or of another ("that the N sees")."""
  pick = lambda xs: xs[rng.integers(len(xs))]
  plural = int(rng.integers(2))
  number, words = plural, ["the", *([pick(ADJECTIVES)] if rng.random() < 0.3 else []), pick(NOUNS)[plural]]
  for _ in range(between):
    before, number, kind = number, 1 - plural if attract else int(rng.integers(2)), rng.integers(4)
    noun = ["the", *([pick(ADJECTIVES)] if rng.random() < 0.1 else []), pick(NOUNS)[number]]
    words += [[pick(PREPOSITIONS), *noun], [pick(PREPOSITIONS), *noun], ["that", pick(VERBS)[before], *noun],
              ["that", *noun, pick(VERBS)[number]]][kind]
  verb = pick(VERBS)
  return words + [verb[plural], *pick(ENDS), "."], len(words), verb[1-plural]

@task("agreement", "the verb's number in sentences of a small grammar", causal=None, model="bigs", batch=64, length=32,
      weight_decay=0.05, steps=1000)
def agreement_task(args:argparse.Namespace) -> Task:
  "The verb's number: by masking it, or as the next word. Evaluated by how many nouns of the other number precede it."
  index, L = {w: i+4 for i, w in enumerate(WORDS)}, args.length
  pad, cls, mask, sep = range(4)
  if L < 31: raise UserError("--task agreement has sentences of up to 31 words: give a --length of at least 31")
  reads_on = args.model in KINDS
  def row(words:list[str]) -> np.ndarray:
    ids = [cls, *(index[w] for w in words), sep]
    return np.array(ids + [pad]*(L-len(ids)), np.int32)
  def following(rows:np.ndarray) -> np.ndarray:
    "The targets of a model that reads on."
    return np.where(rows[:, 1:] == pad, -1, rows[:, 1:])
  def masked(some:list[tuple]) -> Batch:
    "Sentences with their verb masked, its place, the verb, and its wrong form."
    rows, at = np.stack([row(s[0]) for s in some]), np.array([[s[1]+1] for s in some], np.int32)
    right, wrong = np.take_along_axis(rows, at, 1), np.array([[index[s[2]]] for s in some], np.int32)
    np.put_along_axis(rows, at, mask, 1)
    return rows, at, right, wrong
  def batch(step:int) -> Batch:
    rng = np.random.default_rng([args.seed, 0, step])
    some = [sentence(rng, rng.choice(len(FEW), p=FEW), False) for _ in range(args.batch)]
    if not reads_on: return masked(some)[:3]
    rows = np.stack([row(s[0]) for s in some])
    return rows[:, :-1], following(rows)
  def held(n:int) -> Batch:
    "128 sentences with n attractors: as in training, but of the verb alone, and both its forms."
    rng = np.random.default_rng([args.seed, 1, n])
    rows, at, right, wrong = masked(some := [sentence(rng, n, True) for _ in range(128)])
    if not reads_on: return rows, at, right, right, wrong
    rows = np.stack([row(s[0]) for s in some])
    return rows[:, :-1], np.where(np.arange(L-1) == at-1, rows[:, 1:], -1), at-1, right, wrong

  def prefers(logits:Tensor, right:Tensor, wrong:Tensor) -> Tensor:
    of = lambda word: (word.unsqueeze(-1) == Tensor.arange(logits.shape[-1])).where(logits, 0).sum(-1)
    return of(right) > of(wrong)                                      # (B,1)
  def forward(model, tokens:Tensor, a:Tensor, b:Tensor, *verbs:Tensor) -> tuple[Tensor, ...]:
    logits = model.mlm(tokens, at=a)
    return cross_entropy(logits, b), *([prefers(logits, *verbs)] if verbs else [])
  def forward_on(model, tokens:Tensor, targets:Tensor, *verbs:Tensor) -> tuple[Tensor, ...]:
    logits = model(tokens)
    loss = cross_entropy(logits, targets)
    if not verbs: return loss,
    B, T, V = logits.shape
    there = embedding(verbs[0] + Tensor.arange(B).unsqueeze(1)*T, logits.reshape(B*T, V))
    return loss, prefers(there, *verbs[1:])
  def metrics(outputs:list[Batch]) -> dict[str, float]:
    return {f"{n} attractor{'s'*(n != 1)}": float(o[1].mean()) for n, o in enumerate(outputs)}
  return Task(f"sentences of {len(WORDS)} words, up to {len(FEW)-1} nouns between subject and verb", None, len(index)+4,
              batch, [held(n) for n in range(len(FEW))], math.log2(2*len(VERBS)), "the verbs' forms at random (0.500)",
              unit="bits per word" if reads_on else "bits per verb",
              forward=forward_on if reads_on else forward, metrics=metrics, head="mlm")

# what stands behind [] for the paper's figures where they are of something else
MLM = "masked bytes [GLUE's mean]"
GRID = Grid(
    "bigs",
    "BiGS paper, the ablation in small: masked bytes of Python's library, and the verb's number, right, %", UNVERIFIED,
    {"BiGS": "--model bigs", "STACK/SSM": "--model stack", "gated attention": "--model gated-attention",
     "BERT": "--model bert"},
    {MLM: ("--task mlm --steps 600 --eval-every 60", "accuracy"),
     **{f"agreement, {n}": ("--task agreement --steps 500 --eval-every 50", f"{n} attractor{'s'*(n != 1)}")
        for n in range(5)}},
    {("BiGS", MLM): "83.3", ("BERT", MLM): "83.3", ("STACK/SSM", MLM): "77.2", ("gated attention", MLM): "81.8",
     **{("BiGS", f"agreement, {n}"): x for n, x in zip(range(1, 5), ("97.4", "97.4", "96.6", "96.5"))}})

LENGTHS = (128, 512, 1024, 4096)
# one forward pass, BiGS and BERT, as notes on the paper have it: unverified
PAPER = {128: (8.1e10, 7.9e10), 512: (3.2e11, 3.4e11), 1024: (6.5e11, 7.2e11), 4096: (2.6e12, 4.1e12)}

def flops() -> None:
  "Arithmetic of one forward pass of the large encoders, random weights, one sequence, as tinygrad counts it."
  print(f"operations of a forward pass, one sequence, width 1024; in brackets the paper's (unverified)\n{'length':>6}  "
        f"{'BiGS, 23 layers':>22}  {'BERT, 24 layers':>22}  ratio", flush=True)
  counts, shapes = {}, {block: BiGSConfig.large(block, LENGTHS[-1]) for block in ("gated", "attention")}
  for block, config in shapes.items():
    model = BiGS(config, heads=())
    for L in LENGTHS:
      tokens = Tensor(np.random.default_rng(0).integers(0, config.vocab_size, (1, L)).astype(np.int32)).realize()
      GlobalCounters.reset()
      x = model.embed(tokens).realize()
      # one by one, lest all layers' products are held at once
      filters = model.filters(L)
      Tensor.realize(*(K for pair in filters for K in pair if K is not None), x)
      for layer, pair in zip(model.bigs.encoder.layer, filters): x = layer(x, *pair).realize()
      counts[L, block] = GlobalCounters.global_ops
  for L in LENGTHS:
    (ours, bert), (a, b) = (counts[L, block] for block in shapes), PAPER.get(L, (0, 0))
    print(f"{L:6}  {ours:9.2e} ({a:9.2e})  {bert:9.2e} ({b:9.2e})  {ours/bert:4.2f}x", flush=True)

def plot(name:str, offsets:int=10) -> Path:
  "Draws |K| of each layer, scaled to 1: what lies before a position to the left, what follows to the right."
  from support.checkpoints import CheckpointError, bigs_model, find, read_weights
  path = find(name)
  model = bigs_model(*read_weights(path), str(path))
  layers = model.bigs.encoder.layer
  if not layers[0].ssm: raise CheckpointError(f"{path}: its layers are attention, which has no filters to draw.")
  if model.config.block == "s4d": raise CheckpointError(f"{path}: it has a filter for each channel, too many to draw.")
  try: import matplotlib
  except ImportError: raise CheckpointError("the plot needs matplotlib: pip install matplotlib.") from None
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  K = np.abs(filters([s for l in layers for s in (l.fs4, l.bs4)], offsets + 1).numpy())       # (2 layers,offsets+1)
  cols = min(6, len(layers))
  rows = -(-len(layers) // cols)
  fig, axes = plt.subplots(rows, cols, figsize=(2.3*cols, 1.5*rows + 0.5), sharex=True, sharey=True, squeeze=False,
                           dpi=150)
  x = np.arange(offsets + 1)
  for i, ax in enumerate(axes.flat):
    ax.axis("off" if i >= len(layers) else "on")
    if i >= len(layers): continue
    f, b = K[2*i], K[2*i+1]
    top = max(f.max(), b.max()) or 1
    ax.fill_between(-x, f/top, step="mid", color="#4c78a8", alpha=0.8, lw=0, label="forward")
    ax.fill_between(x, b/top, step="mid", color="#e45756", alpha=0.8, lw=0, label="backward")
    ax.axvline(0, color="#444444", lw=0.8)
    ax.set_title(f"layer {i+1}", fontsize=8, loc="left")
    ax.set(yticks=[], xlim=(-offsets-0.5, offsets+0.5), ylim=(0, 1.05))
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(labelsize=7)
  fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="upper right", ncols=2,
             frameon=False, fontsize=8)
  fig.suptitle(f"What each layer looks at: |K| by distance in tokens ({path.parent.name or path.name})", fontsize=9,
               x=0.01, ha="left")
  fig.tight_layout()
  fig.savefig(out := path.with_name("filters.png"))
  plt.close(fig)
  return out

def show(argv:list[str]) -> int:
  "--plot and --flops."
  p = Parser(prog="papers/bigs.py", allow_abbrev=False)
  p.add_argument("--plot", metavar="CHECKPOINT", help="draw the filters of each layer into filters.png beside it")
  p.add_argument("--offsets", metavar="N", type=number(int, 1), default=10, help="how far the plot looks (default: 10)")
  p.add_argument("--flops", action="store_true", help="arithmetic of a forward pass by length, BiGS and BERT (3 minutes)")
  args = p.parse_args(argv)
  setup_device()
  check_kernels()
  try:
    if args.plot: print(f"wrote {plot(args.plot, args.offsets)}")
    if args.flops: flops()
  except CheckpointError as e: p.error(str(e))
  except OSError as e: p.error(f"{e.filename}: {e.strerror}")
  return 0

if __name__ == "__main__":
  if {"--plot", "--flops"} & {*sys.argv}: sys.exit(show(sys.argv[1:]))
  sys.exit(main("papers/bigs.py", GRID, default="agreement"))
