"""BiGS: what gates are good for, agreement, what its filters look at, what a pass costs.

Claim: BiGS (arXiv 2212.10544) matches BERT without attention, because its SSMs are gated; its
tables of GLUE, of the ablation, of agreement and of operations. Figures, unverified, from notes
on the paper:

  GLUE, mean of the dev sets             BiGS 83.3, STACK/SSM 77.2, gated attention 81.8, BERT 83.3
  agreement with 1 to 4 attractors, %    BiGS 97.4, 97.4, 96.6, 96.5
  operations of a forward pass           PAPER_OPERATIONS, below

  python papers/bigs.py --reproduce                       40 minutes on two cores
  python papers/bigs.py --task agreement --model bert     trains one model, in two minutes
  python papers/bigs.py --plot masked                     draws the filters of a checkpoint
  python papers/bigs.py --flops                           counts operations, in three minutes

In place of GLUE and of English, models are trained from scratch on masked bytes of Python's
library and on sentences of a small grammar. Not here: GLUE (papers/finetune.py trains on its
files), SQuAD.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1]))
import argparse, math
from typing import NamedTuple
import numpy as np
from tinygrad import GlobalCounters, Tensor
from bigs_tiny import BiGS, BiGSConfig, filters
from papers.grid import (COLORS, UNVERIFIED, Column, Grid, look_at, panels, run_program,
                         show_rows)
from support.checkpoints import CheckpointError, find
from support.text import UserError, counted, pad
from train import Parser, Task, cross_entropy, is_causal, make_eval, number, task

# ---- subject-verb agreement ---------------------------------------------------------------------

forms = lambda text: [pair.split("/") for pair in text.split()]         # singular and plural
NOUNS = forms("key/keys door/doors box/boxes book/books author/authors teacher/teachers dog/dogs "
              "child/children man/men woman/women house/houses farmer/farmers picture/pictures "
              "letter/letters engine/engines garden/gardens")
VERBS = forms("is/are was/were has/have sees/see likes/like moves/move waits/wait knows/know "
              "holds/hold needs/need")
PREPOSITIONS = "near behind of beside with under".split()
ADJECTIVES = "old small red quiet strange".split()
ENDS = "here|there|today|the sun|a lot|for a long time|once more"
ENDS = [end.split() for end in ENDS.split("|")]
WORDS = sorted({"the", "that", "every", ".", *PREPOSITIONS, *ADJECTIVES,
                *sum(NOUNS + VERBS + ENDS, [])})
PAD, CLS, MASK, SEP = range(4)
IDS = {word: i for i, word in enumerate(WORDS, 4)}
BETWEEN = (0.45, 0.3, 0.15, 0.07, 0.03)   # share of training sentences with 0, 1, … nouns between
LONGEST = 31                                  # tokens of a sentence

class Sentence(NamedTuple):
  words: list[str]
  verb: int                                   # position of the main verb
  wrong: str                                  # its form of the other number

def sentence(rng:np.random.Generator, between:int, attract:bool) -> Sentence:
  """A subject, `between` phrases with a noun each, the verb, an end.

  attract: the nouns between are of the other number, else of any. A phrase is a preposition's, or a
  relative clause, "that sees the N" with a verb for the noun before, or "that the N sees"."""
  pick = lambda options: options[rng.integers(len(options))]
  adjective = lambda share: [pick(ADJECTIVES)] if rng.random() < share else []
  plural = number = int(rng.integers(2))
  words = ["the", *adjective(0.3), pick(NOUNS)[plural]]
  for _ in range(between):
    before, number = number, 1 - plural if attract else int(rng.integers(2))
    kind = rng.integers(4)
    noun = ["the", *adjective(0.1), pick(NOUNS)[number]]
    phrases = ([pick(PREPOSITIONS), *noun], [pick(PREPOSITIONS), *noun],
               ["that", pick(VERBS)[before], *noun], ["that", *noun, pick(VERBS)[number]])
    words += phrases[kind]
  verb = pick(VERBS)
  return Sentence([*words, verb[plural], *pick(ENDS), "."], len(words), verb[1-plural])

@task("agreement", "the verb's number in sentences of a small grammar", causal=None, model="bigs",
      batch=64, length=32, weight_decay=0.05, steps=1000)
def agreement_task(args:argparse.Namespace) -> Task:
  """The verb's number: a causal model learns every next word, a bidirectional one the masked verb.
  Both are evaluated by which form of the verb they prefer, for each number of attractors."""
  causal, L = is_causal(args), args.length
  if L < LONGEST:
    raise UserError("--task agreement has sentences of up to 31 words: give a --length of at least "
                    f"{LONGEST}")

  def encode(sentences, verb_only=False):
    "Inputs and targets of the model, and both forms of the verb, (B,1) each."
    ids = [[CLS, *(IDS[word] for word in s.words), SEP] for s in sentences]
    rows = np.stack([pad(row, L, PAD)[0] for row in ids])                                 # (B,L)
    at = np.array([[s.verb + 1] for s in sentences], np.int32)
    right = np.take_along_axis(rows, at, 1)
    wrong = np.array([[IDS[s.wrong]] for s in sentences], np.int32)
    if not causal:
      np.put_along_axis(rows, at, MASK, 1)
      return rows, at, right, right, wrong
    following = rows[:, 1:]
    asked = np.arange(1, L) == at if verb_only else following != PAD
    return rows[:, :-1], np.where(asked, following, -1), right, wrong

  def batch(step):
    rng = np.random.default_rng([args.seed, 0, step])
    some = [sentence(rng, rng.choice(len(BETWEEN), p=BETWEEN), False) for _ in range(args.batch)]
    return encode(some)[:-2]
  def held_out(n):
    rng = np.random.default_rng([args.seed, 1, n])
    return encode([sentence(rng, n, True) for _ in range(128)], verb_only=True)

  def evaluate(logits, targets, *verbs):
    "The loss; with both forms of the verb (B,1), whether the right one is preferred, (B,)."
    loss = cross_entropy(logits, targets)
    if not verbs: return loss,
    one_hot = lambda word: word.unsqueeze(-1) == Tensor.arange(logits.shape[-1])          # (B,1,V)
    right, wrong = (one_hot(word).where(logits, 0).sum(-1) for word in verbs)             # (B,T)
    return loss, ((right > wrong) * (targets >= 0)).sum(1)
  def forward(model, tokens, where, *rest):
    if causal: return evaluate(model(tokens), where, *rest)             # where: the targets
    return evaluate(model.mlm(tokens, at=where), *rest)
  def metrics(outputs):
    return {attractors(n): float(right.mean()) for n, (_, right) in enumerate(outputs)}

  held = [held_out(n) for n in range(len(BETWEEN))]
  def answers(model):
    "Yields sentence, answer and right form: the first sentence with each number of attractors."
    evaluated = make_eval(model, forward)
    for batch in held:
      tokens, where, *_, right, wrong = (array[0] for array in batch)
      words = [("", "", "", "", *WORDS)[token] for token in tokens]
      words[int((where >= 0).argmax()) + 1 if causal else where[0]] = "___"
      right, wrong = WORDS[right[0] - 4], WORDS[wrong[0] - 4]
      yield " ".join(words), right if evaluated(batch)[1][0] else wrong, right
  def sample(model): show_rows("which form of the verb is at ___?", answers(model))

  about = f"sentences of {len(WORDS)} words, up to {len(BETWEEN)-1} nouns between subject and verb"
  return Task(about, None, len(IDS) + 4, batch, held, math.log2(2*len(VERBS)),
              "the verbs' forms at random (right 50.0 %)",
              unit=f"bits per {'word' if causal else 'verb'}", forward=forward, metrics=metrics,
              head="mlm", sample=sample)

def attractors(n:int) -> str: return counted(n, "attractor")

# ---- the ablation -------------------------------------------------------------------------------

# the paper has one STACK/SSM, and does not say clearly which of the two
MLM = Column("--task mlm --steps 2000 --eval-every 200", "accuracy",
             {"BiGS": "83.3", "STACK/SSM": "77.2", "STACK/SSM in series": "77.2",
              "gated attention": "81.8", "BERT": "83.3"})
AGREEMENT = "--task agreement --steps 500 --eval-every 50"
PAPER_AGREEMENT = ("", "97.4", "97.4", "96.6", "96.5")     # of BiGS, by the number of attractors
GRID = Grid(
  "bigs",
  "BiGS paper, the ablation in small: masked bytes of Python's library, and the verb's number, "
  "right, %",
  UNVERIFIED,
  {"BiGS": "--model bigs", "STACK/SSM": "--model stack",
   "STACK/SSM in series": "--model stack-serial",
   "gated attention": "--model gated-attention", "BERT": "--model bert"},
  # what stands behind [] is what the paper's figures are of
  {"masked bytes [GLUE's mean]": MLM,
   **{f"agreement, {n}": Column(AGREEMENT, attractors(n), {"BiGS": paper})
      for n, paper in enumerate(PAPER_AGREEMENT)}})

# ---- what a pass costs --------------------------------------------------------------------------

# operations of a forward pass, BiGS and BERT: unverified
PAPER_OPERATIONS = {128: (8.1e10, 7.9e10), 512: (3.2e11, 3.4e11), 1024: (6.5e11, 7.2e11),
                    4096: (2.6e12, 4.1e12)}

def count_operations(model:BiGS, length:int) -> int:
  "Counts the operations of one forward pass of one sequence, as tinygrad does for its kernels."
  tokens = Tensor([[0]*length]).realize()
  GlobalCounters.reset()
  x = model.embed(tokens).realize()
  pairs = model.filters(length)
  Tensor.realize(x, *(K for pair in pairs for K in pair if K is not None))
  # one by one, lest all layers' products are held at once
  for layer, pair in zip(model.bigs.encoder.layer, pairs): x = layer(x, *pair).realize()
  return GlobalCounters.global_ops

def print_operations() -> None:
  "Operations of the large encoders by length, with random weights."
  print("operations of a forward pass, one sequence, width 1024; in brackets the paper's "
        "(unverified)\n"
        f"{'length':>6}  {'BiGS, 23 layers':>22}  {'BERT, 24 layers':>22}  ratio", flush=True)
  configs = [BiGSConfig.large(block, max(PAPER_OPERATIONS)) for block in ("gated", "attention")]
  models = [BiGS(config, heads=()) for config in configs]
  for length, paper in PAPER_OPERATIONS.items():
    counts = [count_operations(model, length) for model in models]
    cells = "".join(f"  {count:9.2e} ({x:9.2e})" for count, x in zip(counts, paper))
    print(f"{length:6}{cells}  {counts[0]/counts[1]:4.2f}x", flush=True)

# ---- what the filters look at -------------------------------------------------------------------

def plot_filters(name:str, offsets:int) -> Path:
  """Draws |K| of each layer, scaled to 1, into filters.png beside a checkpoint: what lies before a
  position to the left, what follows to the right. CheckpointError where it has no such filters."""
  path = find(name)
  model = BiGS.from_pretrained(str(path))
  if "attention" in model.config.block:
    raise CheckpointError(f"{path}: its layers are attention, which has no filters to draw.")
  if model.config.block == "s4d":
    raise CheckpointError(f"{path}: it has a filter for each channel, too many to draw.")
  layers = model.bigs.encoder.layer
  ssms = [ssm for layer in layers for ssm in (layer.fs4, layer.bs4)]
  K = np.abs(filters(ssms, offsets + 1).numpy()).reshape(len(layers), 2, offsets + 1)
  fig, axes = panels(len(layers), 6, 2.3, 1.7, sharex=True, sharey=True)
  distance = np.arange(offsets + 1)
  for i, (ax, pair) in enumerate(zip(axes, K), 1):
    forward, backward = pair / (pair.max() or 1)
    ax.fill_between(-distance, forward, step="mid", color=COLORS[0], lw=0, label="forward")
    ax.fill_between(distance, backward, step="mid", color=COLORS[1], lw=0, label="backward")
    ax.axvline(0, color="#444444", lw=0.8)
    ax.set_title(f"layer {i}", fontsize=8, loc="left")
    ax.set(yticks=[], ylim=(0, 1.05))
  axes[0].legend(frameon=False, fontsize=7)
  model_name = path.parent.name or path.name
  fig.suptitle(f"What each layer looks at: |K| by distance in tokens ({model_name})", fontsize=9)
  picture = path.with_name("filters.png")
  fig.savefig(picture)
  return picture

def look(argv:list[str]) -> int:
  "The command line of --plot and --flops."
  parser = Parser(prog="papers/bigs.py")
  add = parser.add_argument
  add("--plot", metavar="CHECKPOINT", help="draw each layer's filters into filters.png beside it")
  add("--offsets", metavar="N", type=number(int, 1), default=10,
      help="how far the plot looks")
  add("--flops", action="store_true", help="count operations by length, BiGS and BERT (3 minutes)")
  def both(args:argparse.Namespace) -> None:
    if args.plot: print(f"wrote {plot_filters(args.plot, args.offsets)}")
    if args.flops: print_operations()
  return look_at(parser, argv, both)

def main(argv:list[str]|None=None) -> int:
  argv = sys.argv[1:] if argv is None else argv
  # in front; elsewhere --plot is train.py's, the picture of the losses
  if argv[:1] in (["--plot"], ["--flops"]): return look(argv)
  return run_program("papers/bigs.py", __doc__, GRID, "agreement", argv)

if __name__ == "__main__": sys.exit(main())
