"""Trains H3, hybrid and Transformer language models, and BiGS, BERT and what is between them.

  python train.py                                    a small hybrid on Python's own source, in minutes on a CPU
  python train.py --data book.txt notes/ --steps 3000 --out book
  python train.py --resume --out book                goes on where a run stopped, to the bit as if it never had
  python train.py --task mlm --out masked            BiGS: fill in what is masked, see generate.py --fill
  python train.py --task classify --data train.tsv --dev dev.tsv --init masked/checkpoint.safetensors --out classes
  python train.py --reproduce table2                 a table of the papers, trained here with three seeds
  python train.py --help                             every option

From top to bottom: options, tasks, optimiser, checkpoints, the log, the loop. The models are in
h3tiny.py and bigs_tiny.py, sampling in generate.py, files of text and of models in support/. A run
leaves in --out: checkpoint.safetensors (weights under the official names, the optimiser's moments,
all settings), log.csv and, with matplotlib, loss.png.

Not here: several machines.
"""
import time
START = time.perf_counter()
import argparse, contextlib, csv, dataclasses, functools, importlib.util, itertools, json, math, os
import random, re, shutil, signal, subprocess, sys, tempfile, threading, warnings
from pathlib import Path
from typing import Callable, Iterable, Iterator
import numpy as np
from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.device import Buffer
from tinygrad.helpers import Context
from tinygrad.nn.state import get_state_dict
from tinygrad.uop.ops import AxisType, KernelInfo, Ops
from bigs_tiny import BLOCKS, BiGS, BiGSConfig
from flashconv import FLASH, capture, check_kernels, embedding, machine, setup_device
from generate import (MASK, MASK_RUN as RUN, OUT, Session, print_fill as show_fill, surprisal,
                      print_text as write)
from h3tiny import H3Config, H3LM
from support.checkpoints import (CHECKPOINT, CheckpointError, Weights, bigs_model, find, h3_model,
                                 read_weights, save_checkpoint)
from support.text import (TEXT_KEY, TOKENIZERS, Parser, Tokenizer, UserError, is_jsonl,
                          make_tokenizer, number, peak_memory, read_tokens, read_tsv, split)

# ---- options --------------------------------------------------------------------------------------

# The last four are shapes of the paper, with its learning rates
SIZES = {"table2": dict(d_model=32, n_layer=2, n_heads=1, lr=5e-4),
         "tiny": dict(d_model=64, n_layer=2, n_heads=2, lr=3e-3),
         "small": dict(d_model=128, n_layer=4, n_heads=2, lr=3e-3),
         "medium": dict(d_model=384, n_layer=8, n_heads=6, lr=1e-3),
         "125M": dict(d_model=768, n_layer=12, n_heads=12, lr=6e-4),
         "355M": dict(d_model=1024, n_layer=24, n_heads=16, lr=3e-4),
         "1.3B": dict(d_model=2048, n_layer=24, n_heads=16, lr=2e-4),
         "2.7B": dict(d_model=2560, n_layer=32, n_heads=20, lr=1.6e-4)}

KINDS = {"h3": "H3", "hybrid": "hybrid H3", "transformer": "Transformer", "s4d": "S4D"}
BOTH_WAYS = {"bigs": "gated", "stack": "stack", "gated-attention": "gated-attention", "bert": "attention"}     # blocks
LANGUAGES = ("induction", "recall")
READ_ON = ("text", *LANGUAGES)                   # tasks of models that read on; agreement is for both
# what a task sets where the command line does not
COMMON = dict(size="small", embed_dropout=0.0, symbols=None)
DEFAULTS = {"text": dict(model="hybrid", batch=8, length=256, weight_decay=0.1, steps=600),
            "mlm": dict(model="bigs", batch=16, length=128, weight_decay=0.05, steps=4000),
            "classify": dict(model="bigs", batch=16, length=128, weight_decay=0.01, steps=None),
            "agreement": dict(model="bigs", batch=64, length=32, weight_decay=0.05, steps=1000),
            "induction": dict(model="h3", batch=32, length=30, weight_decay=0.1, steps=157*400, size="table2",
                              embed_dropout=0.1, symbols=20),
            "recall": dict(model="h3", batch=32, length=20, weight_decay=0.1, steps=157*200, size="table2",
                           embed_dropout=0.1, symbols=10),
            "listops": dict(model="s4d", batch=32, length=200, weight_decay=0.05, steps=5000, size="tiny"),
            "pixels": dict(model="s4d", batch=32, length=None, weight_decay=0.05, steps=5000, size="tiny")}
LINE = ("classify", "recall")                    # the learning rate falls on a line to 0, else a cosine to a tenth
FINE_TUNING = dict(lr=2e-5, epochs=3)            # of classify with --init: GLUE's recipe

def layer_list(text:str) -> list[int]:
  if text.strip() in ("", "none"): return []
  try: return [int(i) for i in text.split(",")]
  except ValueError: raise argparse.ArgumentTypeError(f"{text!r} is not layer numbers with commas, or none") from None

def parser() -> Parser:
  p = Parser(prog="train.py", description="Train a model of the H3 or the BiGS family.", allow_abbrev=False,
             epilog="example: python train.py --data shakespeare.txt --steps 2000 --length 512 --out shakespeare")
  def add(group, name, kind, default, text, shown=None, **kw):
    group.add_argument(name, type=kind, default=default, help=f"{text} (default: {shown or default})", **kw)
  positive, fraction = number(int, 1), number(float, 0, 0.99)

  g = p.add_argument_group("what to train on")
  add(g, "--task", str, "text", "the next token of text; masked tokens of it (mlm); labels of a TSV (classify); the "
      "verb's number in sentences of a small grammar (agreement); the two languages of the H3 paper (induction, "
      "recall); nested lists of operations (listops) and images as sequences (pixels), of the Long Range Arena",
      choices=list(TASKS))
  add(g, "--data", str, None, "files or folders of text: UTF-8, or UTF-16 with its mark; .gz; "
      ".jsonl with a text in each line; for classify a TSV with a header like GLUE's, or lines of "
      "label, tab, text, or label, tab, text, tab, text; for pixels a CSV of label, pixels 0 to "
      "255, or an .npz of x_train, y_train, x_test, y_test", "Python's own source", nargs="+", metavar="PATH")
  add(g, "--text-key", str, TEXT_KEY, "of text and mlm: key of the text in each line of a .jsonl",
      metavar="KEY")
  add(g, "--columns", str, None, "of classify: columns of the label and of one or two texts, by "
      "the header's names or by number, from 1; 2,4 for CoLA's files", "what the header says",
      metavar="L,T,…")
  add(g, "--dev", str, None, "of classify: such lines to evaluate on", "--holdout's share of --data", metavar="FILE")
  add(g, "--vocab", str, None, "BERT's vocab.txt", "that beside --init's file", metavar="FILE")
  add(g, "--tokenizer", str, "bytes", "how text becomes tokens", choices=list(TOKENIZERS))
  add(g, "--holdout", number(float, 0.001, 0.5), 0.05, "share of the text, its end, kept for evaluation", metavar="X")

  add(g, "--mask-run", positive, None, "of mlm: tokens masked in one place, from 1 to N", "8 bytes, 1 of other tokens",
      metavar="N")

  add(g, "--symbols", number(int, 4), None, "of induction and recall: symbols, of which two are special", "20; 10",
      metavar="N")

  g = p.add_argument_group("model")
  add(g, "--model", str, None, "reads on: only H3 layers, most of them, or none, or an SSM that nothing gates; sees "
      "both sides: BiGS, SSMs stacked, attention gated, BERT; transformer and s4d do either, as the task asks",
      "hybrid for text, h3 for induction and recall, s4d for listops and pixels, else bigs",
      choices=[*KINDS, *BOTH_WAYS])
  add(g, "--size", str, None, "sets the next three and --lr", "small; table2 for induction and recall, tiny for "
      "listops and pixels", choices=list(SIZES))
  add(g, "--d-model", positive, None, "width", "by --size", metavar="N")
  add(g, "--n-layer", positive, None, "layers", "by --size", metavar="N")
  add(g, "--n-heads", positive, None, "attention heads", "by --size", metavar="N")
  add(g, "--attn-layers", layer_list, None, "layers that are attention, from 0", "by --model", metavar="I,J")
  add(g, "--rotary-dim", number(int, 0), None, "rotated dimensions of an attention head; 0: no positions",
      "all in a transformer, else 0", metavar="N")
  add(g, "--max-positions", number(int, 0), 0, "learned positions: so many tokens, and no more, can be read; 0: none",
      metavar="N")
  add(g, "--init-std", number(float, above=0), None, "standard deviation of the first weights",
      "0.02; where attention learns induction or recall 0.112, sqrt(2/(5 width))", metavar="X")
  add(g, "--d-state", positive, 64, "state size of the SSMs", metavar="N")
  add(g, "--head-dim", positive, 1, "size of an H3 head", metavar="N")
  add(g, "--mlp-mult", positive, None, "width of the MLP, or the gate, over --d-model", "4; gated 3, stack 5",
      metavar="N")
  add(g, "--embed-dropout", fraction, None, "dropout after the embedding", "0; 0.1 for induction and recall",
      metavar="X")
  add(g, "--resid-dropout", fraction, 0.0, "dropout in the blocks", metavar="X")

  g = p.add_argument_group("training")
  add(g, "--steps", positive, None, "steps in all", "600; mlm 4000, agreement 1000, listops and pixels "
      "5000, classify 3 epochs, induction 400 and recall 200 at most", metavar="N")
  add(g, "--batch", positive, None, "sequences a step", "by --task", metavar="N")
  add(g, "--length", positive, None, "tokens a sequence; of any length with --model h3", "by --task", metavar="N")
  add(g, "--truncate", positive, None, "take a sequence in pieces of N tokens, in the memory that one needs: the state "
      "goes on from each to the next, the gradient does not come back, so what a piece should have left in the state "
      "for a later one is not learned; with --model h3, and --length a multiple of N", "whole", metavar="N")
  add(g, "--lr", number(float, above=0), None, "highest learning rate", "by --size; 2e-5 of classify with --init",
      metavar="X")
  add(g, "--warmup", number(int, 0), None, "steps up to it; a cosine then falls to a tenth; of classify a line to 0",
      "a tenth of --steps, at most 1000 but for induction and recall", metavar="N")
  add(g, "--weight-decay", number(float, 0), None, "of matrices and of the SSMs' C and D; in models that see "
      "both sides of embeddings and all of an SSM, too", "by --task", metavar="X")
  add(g, "--accumulate", positive, 1, "go through a step's sequences in N parts, one after the other, in the memory "
      "that one needs, for the same gradient", metavar="N")
  g.add_argument("--checkpoint-activations", action="store_true",
                 help="keep only what goes into each layer, and compute the rest anew for the gradient: less memory, a "
                 "third more time; for h3, hybrid and transformer")
  add(g, "--dtype", str, "float32", "what the matrix products of weights take in, on devices that know it; sums, SSMs, "
      "filters, the FFT and the weights that are trained stay float32", choices=list(PRECISIONS))
  add(g, "--devices", positive, 1, "share a step's sequences among the first N devices of this kind", metavar="N")
  add(g, "--clip", number(float, above=0), 1.0, "largest norm of the whole gradient", metavar="X")
  add(g, "--seed", number(int, 0), 0, "of weights, batches and the sample", metavar="N")

  g = p.add_argument_group("runs")
  add(g, "--out", str, OUT, "folder for checkpoint, log and plot", metavar="DIR")
  g.add_argument("--resume", action="store_true",
                 help="go on with the run in --out, with its settings but for those given now")
  add(g, "--init", str, None, "start from a checkpoint's weights, and take its shape; or from an official BiGS model",
      "random", metavar="FILE")
  add(g, "--eval-every", positive, None, "steps between evaluations", "an eighth of --steps", metavar="N")
  add(g, "--save-every", positive, None, "steps between checkpoints", "as --eval-every", metavar="N")
  add(g, "--log-every", positive, None, "steps between lines, where stdout is no terminal",
      "a 20th of --steps", metavar="N")
  add(g, "--sample", number(int, 0), 300, "tokens to generate at the end", metavar="N")
  add(g, "--sample-every", positive, None, "steps between samples", "at the end only", metavar="N")
  add(g, "--log", str, None, "table of losses, written whenever a checkpoint is", "log.csv in --out", metavar="FILE")
  add(g, "--plot", str, None, "picture of them: .png, .svg or .pdf", "loss.png in --out", metavar="FILE")
  g.add_argument("--reproduce", choices=list(GRIDS), default=argparse.SUPPRESS,
                 help="train the models of a claim of the papers, with three seeds, print the table beside the "
                 "paper's, and stop; on two CPU cores table2 takes 25 minutes, lm 10, lra 30 and bigs 20")
  g.add_argument("--seeds", type=positive, default=argparse.SUPPRESS, metavar="N", help="of --reproduce: how many")
  g.add_argument("--bench", action="store_true", default=argparse.SUPPRESS,
                 help="time training and decoding on this machine, beside PyTorch if it is installed, and stop")
  return p

SHAPE = ("d_model", "n_layer", "n_heads", "attn_layers", "rotary_dim", "max_positions", "d_state", "head_dim",
         "mlp_mult", "init_std", "embed_dropout", "resid_dropout")
# options that only some tasks look at
OF_TASKS = dict(data=("text", "mlm", "classify", "pixels"), text_key=("text", "mlm"),
                columns=("classify",), dev=("classify",), vocab=("text", "mlm", "classify"),
                tokenizer=("text", "mlm", "classify"), mask_run=("mlm",), symbols=LANGUAGES,
                holdout=("text", "mlm", "classify", "pixels"))
PRECISIONS = ("float32", "float16", "bfloat16")
FIXED = ("task", "symbols", "tokenizer", "model", "size", "seed", "holdout", *SHAPE)    # what --resume can't change

def given(argv:list[str]|None) -> dict:
  "Only the options that the command line names."
  p = parser()
  for action in p._actions: action.default = argparse.SUPPRESS
  return vars(p.parse_args(argv))

def block_of(args:argparse.Namespace) -> str|None:
  "Of a model that sees both sides, its block; None for one that reads on."
  if args.task not in (*READ_ON, "agreement") and args.model in ("transformer", "s4d"):
    return {"transformer": "attention", "s4d": "s4d"}[args.model]
  return BOTH_WAYS.get(args.model)

def make_config(args:argparse.Namespace, vocab_size:int) -> H3Config|BiGSConfig:
  size = SIZES[args.size]
  d_model, n_layer, n_heads = (getattr(args, k) or size[k] for k in ("d_model", "n_layer", "n_heads"))
  attn, rotary = args.attn_layers, args.rotary_dim
  if (block := block_of(args)) is not None:
    for k, default in (("attn_layers", None), ("rotary_dim", None), ("max_positions", 0), ("head_dim", 1),
                       ("init_std", None), ("resid_dropout", 0)):
      if getattr(args, k) != default:
        raise UserError(f"--{k.replace('_', '-')} is for models that read on, not for {args.model} here")
    if args.n_layer is None and block.startswith("gated"): n_layer -= n_layer // 24       # 13 D^2 to the others' 12
    try: return BiGSConfig(vocab_size, d_model, n_layer, block, (args.mlp_mult or 0)*d_model, n_heads, args.d_state,
                           args.length, embed_dropout=args.embed_dropout)
    except ValueError as e: raise UserError(str(e)) from None
  # The paper's hybrid has two attention layers, the 2nd and the (2 + N/2)th; a shallow one does with one
  if attn is None: attn = {"h3": (), "s4d": (), "transformer": range(n_layer),
                           "hybrid": (1, 1 + n_layer//2) if n_layer >= 8 else (n_layer//2,)}[args.model]
  if rotary is None:
    rotary = d_model // n_heads // 2 * 2 if args.model == "transformer" and not args.max_positions else 0
  # the official 0.02 is for wide models: with it attention of width 32 has no induction head after 62,800 steps
  std = args.init_std or (math.sqrt(2/5/d_model) if args.task in LANGUAGES and attn else 0.02)
  try:
    return H3Config(vocab_size, d_model, n_layer, tuple(attn), n_heads, rotary, args.d_state, args.head_dim,
                    args.mlp_mult or 4, ssm="s4d" if args.model == "s4d" else "h3",
                    embed_dropout=args.embed_dropout, resid_dropout=args.resid_dropout, init_std=std,
                    max_length=max(2048, 2*args.length), max_positions=args.max_positions)
  except ValueError as e: raise UserError(str(e)) from None

# ---- data -----------------------------------------------------------------------------------------

Batch = tuple[np.ndarray, ...]

@dataclasses.dataclass
class Task:
  "What the loop needs of a task; each has a function of the options that makes one."
  about: str
  tokenizer: Tokenizer|None
  vocab_size: int
  batch: Callable[[int], Batch]                 # of a step
  held_out: list[Batch]                         # to evaluate on, always the same
  baseline: float                               # what the loss has to beat, in `unit`, on `held_out`; and its name
  guess: str
  bits: float = 1 / math.log(2)                 # in `unit` for a loss of 1, in training; likewise held out
  held_out_bits: float = 1 / math.log(2)
  unit: str = "bits per byte"
  # (model, *batch) -> the mean loss, and whatever `metrics` makes figures of, given that for each batch held out
  forward: Callable[..., tuple[Tensor, ...]] = lambda model, x, y: (cross_entropy(model(x), y),)
  metrics: Callable[[list[Batch]], dict[str, float]] = lambda outputs: {}
  head: str|None = None                         # of a BiGS model, and its labels
  labels: list[str]|None = None
  epochs: float|None = None                     # steps of one
  sample: Callable|None = None                  # shows what the model does
  aside: int = 0                                # of the last batches held out only the metrics count
  enough: tuple[str, float]|None = None         # a metric that, three times in a row so high, ends the training
  # of a batch, how many targets its mean loss is the mean of
  count: Callable[[Batch], int] = lambda batch: int((batch[-1] >= 0).sum())

def shuffled(args:argparse.Namespace, n:int) -> Callable[[int], list[int]]:
  "Of a step, which of n rows are its batch: each epoch all of them, in an order of its own."
  @functools.lru_cache(2)
  def order(epoch:int) -> np.ndarray: return np.random.default_rng([args.seed, 3, epoch]).permutation(n)
  return lambda step: [order(i // n)[i % n] for i in range(step*args.batch, (step+1)*args.batch)]

def hold_out(args:argparse.Namespace, n:int) -> tuple[np.ndarray, np.ndarray]:
  "Which of n rows are to train on, and which are held out: --holdout of them, at least one."
  order, m = np.random.default_rng([args.seed, 2]).permutation(n), max(1, round(n*args.holdout))
  return order[m:], order[:m]

SAMPLED = 1 << 26                               # of the tokens to train on, so many serve for statistics

def chunks(tokens:np.ndarray, overlap:int=0) -> Iterator[np.ndarray]:
  "The first tokens, some at a time: of a mapped file only these are in memory."
  for i in range(0, min(len(tokens), SAMPLED), 1 << 20): yield tokens[i:min(i + (1 << 20) + overlap, SAMPLED)]

def bigram_bits(train:np.ndarray, x:np.ndarray, y:np.ndarray) -> float:
  "Bits to code every y after its x, given the pairs in `train` and one more of each. Bytes; 256 is <|endoftext|>."
  counts = np.ones((257, 257), np.int64)
  for some in chunks(train, 1):
    counts += np.bincount(some[:-1].astype(np.int64)*257 + some[1:], minlength=257*257).reshape(257, 257)
  return float(-np.log2(counts / counts.sum(1, keepdims=True))[x, y].sum())

@dataclasses.dataclass
class Windows:
  "Text as tokens, one part to train on and one held out, in windows of `size` tokens."
  args: argparse.Namespace
  size: int
  def __post_init__(self):
    args, self.tok = self.args, tokenizer(self.args)
    tokens, ends = read_tokens(args.data, self.tok, args.text_key)
    cut = split(ends, args.holdout)
    self.train, self.held = tokens[:cut], tokens[cut:]
    for name, part in (("training", self.train), ("held-out", self.held)):
      if len(part) < self.size:
        raise UserError(f"the text is too short: its {name} part has {len(part)} tokens and a window "
                        f"takes {self.size}: give more text or a smaller --length")
    name = ", ".join(args.data) if args.data else "Python's standard library"
    kind = "text" if any(is_jsonl(Path(p)) for p in args.data or ()) else "file"
    self.about = (f"{name}: {len(ends):,} {kind}{'s'*(len(ends) != 1)}, "
                  f"{len(self.train)/1e6:.2f} M tokens to train on, "
                  f"{len(self.held)/1e6:.3f} M held out ({args.tokenizer})")
  def evenly(self) -> np.ndarray:
    "Windows (n,B,size) evenly over the held-out part, 128 at most, in batches."
    n = min(128, (len(self.held)-1) // (self.size-1))
    B = min(self.args.batch, n)
    n -= n % B
    at = np.linspace(0, len(self.held)-self.size, n).astype(int)
    return self.held[at[:, None] + np.arange(self.size)].astype(np.int32).reshape(-1, B, self.size)
  def draw(self, rng:np.random.Generator) -> np.ndarray:
    "A batch of training windows, (B,size)."
    at = rng.integers(0, len(self.train)-self.size+1, self.args.batch)
    return self.train[at[:, None] + np.arange(self.size)].astype(np.int32)

def tokenizer(args:argparse.Namespace) -> Tokenizer:
  "BERT's needs a file: that of --vocab, or beside --init's; a run keeps a copy beside its checkpoint."
  beside = lambda p: (Path(p).parent if Path(p).is_file() else Path(p)) / "vocab.txt"
  places = [Path(p) for p in (args.vocab,) if p] or [beside(args.init or args.out)]
  if args.resume: places = [beside(args.out), *places]
  return make_tokenizer(args.tokenizer, next((p for p in places if p.is_file()), places[-1]))

def text_task(args:argparse.Namespace) -> Task:
  "The next token of text; with bits per byte, whatever the tokens."
  text, L = Windows(args, args.length + 1), args.length
  tok, train, windows = text.tok, text.train, text.evenly()
  batches = [(w[:, :-1], w[:, 1:]) for w in windows]
  windows = windows.reshape(-1, L+1)
  some = b"".join(tok.decode(c) for c in chunks(train))
  if tok.name == "bytes": pairs = train, windows[:, :-1].ravel(), windows[:, 1:].ravel()
  else:
    parts = [np.frombuffer(tok.decode(w), np.uint8) for w in windows]
    pairs = (np.frombuffer(some, np.uint8), np.concatenate([p[:-1] for p in parts]),
             np.concatenate([p[1:] for p in parts]))
  targets = len(tok.decode(windows[:, 1:].ravel()))

  def batch(step:int) -> Batch:
    w = text.draw(np.random.default_rng([args.seed, step]))
    return w[:, :-1], w[:, 1:]
  bigram = bigram_bits(*pairs) / (targets if tok.name == "bytes" else len(pairs[1]))
  def sample(model:H3LM) -> None:
    write(model, tok, ["def " if not args.data and tok.name == "bytes" else ""], args.sample, temperature=0.7,
          seed=args.seed, max_length=args.sample+8)
  return Task(text.about, tok, tok.vocab_size, batch, batches, bigram, "a byte-bigram model",
              min(len(train), SAMPLED) / len(some) / math.log(2), windows[:, 1:].size / targets / math.log(2),
              sample=sample)

# ---- masked tokens --------------------------------------------------------------------------------

SHARE, SHORT = 0.15, 0.1      # of the tokens that are masked; of the rows that are cut short and filled up, as in BERT

def mask_out(rng:np.random.Generator, rows:np.ndarray, lengths:np.ndarray, run:int, mask:int, vocab_size:int) -> Batch:
  """Rows (B,L) of [CLS] text [SEP] [PAD]…, the text of `lengths` tokens: inputs (B,L), the places (B,n) that are asked
  for, and what was there (B,n), -1 where a short row has fewer. Of the places 80 % become [MASK], 10 % any token of
  the vocabulary, 10 % stay (Devlin et al. 2018). run: they come in runs of 1 to so many, one length a row."""
  (B, L), n = rows.shape, max(1, round(SHARE * (rows.shape[1]-2)))
  size = rng.integers(1, run+1, (B, 1))
  group = (np.arange(L) + rng.integers(0, size)) // size
  order = np.take_along_axis(rng.random((B, L)), group, 1) + np.arange(L)*1e-9        # a group stays together
  order[(np.arange(L) < 1) | (np.arange(L) > lengths[:, None])] = np.inf              # text is from 1 to its length
  at = np.argsort(order, 1)[:, :n]
  asked = np.arange(n) < np.maximum(1, np.round(SHARE*lengths))[:, None]
  targets, how = np.where(asked, np.take_along_axis(rows, at, 1), -1), rng.random((B, n))
  new = np.where(how < 0.8, mask, np.where(how < 0.9, rng.integers(0, vocab_size, (B, n)), targets))
  inputs = rows.copy()
  np.put_along_axis(inputs, at, np.where(asked, new, np.take_along_axis(rows, at, 1)), 1)
  return tuple(x.astype(np.int32) for x in (inputs, at, targets))

def mlm_task(args:argparse.Namespace) -> Task:
  "Masked tokens of [CLS] text [SEP]; some rows are cut short and filled up with [PAD], so that it has been seen."
  if args.length < 4: raise UserError("--task mlm wants a --length of at least 4")
  text = Windows(args, args.length - 2)
  run = args.mask_run = args.mask_run or (RUN if args.tokenizer == "bytes" else 1)
  tok = text.tok
  def rows(w:np.ndarray, rng:np.random.Generator) -> Batch:
    lengths = np.where(rng.random(len(w)) < SHORT, rng.integers(1, w.shape[1]+1, len(w)), w.shape[1])
    x, place = np.pad(w, ((0, 0), (1, 1)), constant_values=tok.cls), np.arange(w.shape[1]+2)
    x[place == lengths[:, None] + 1], x[place > lengths[:, None] + 1] = tok.sep, tok.pad
    return mask_out(rng, x, lengths, run, tok.mask, tok.vocab_size)
  held = [rows(w, np.random.default_rng([args.seed, 1, i])) for i, w in enumerate(text.evenly())]
  counts = 1 + sum(np.bincount(c, minlength=tok.vocab_size) for c in chunks(text.train))
  asked = np.concatenate([t[t >= 0] for _, _, t in held])
  bits, right = float(-np.log2(counts/counts.sum())[asked].mean()), float((asked == counts.argmax()).mean())

  def forward(model:BiGS, tokens:Tensor, at:Tensor, targets:Tensor) -> tuple[Tensor, ...]:
    logits = model.mlm(tokens, at=at)
    return cross_entropy(logits, targets), (logits.argmax(-1) == targets).sum(), (targets >= 0).sum()
  def metrics(outputs:list[Batch]) -> dict[str, float]:
    _, hits, asked = np.sum([[float(x) for x in o] for o in outputs], axis=0)
    return {"accuracy": hits / asked}
  def sample(model:BiGS) -> None:
    of = lambda i, j: tok.decode(text.held[i:j]).decode("utf-8", "replace")
    n = min(24, (args.length - run)//2 - 1)
    line = f"    def __init__({MASK}, name):" if not args.data else f"{of(0, n)}{MASK}{of(n+3, 2*n)}"
    show_fill(model, tok, line, run)
  def batch(step:int) -> Batch:
    rng = np.random.default_rng([args.seed, 0, step])
    return rows(text.draw(rng), rng)
  if run > args.length - 2: raise UserError(f"--mask-run {run} is longer than a text of --length {args.length}")
  return Task(text.about, tok, tok.masked_size, batch, held, bits,
              f"tokens by their frequency (the commonest is right at {right:.3f})",
              unit=f"bits per masked {'byte' if tok.name == 'bytes' else 'token'}",
              forward=forward, metrics=metrics, head="mlm", sample=sample if args.length >= 32 + run else None)

# ---- fine-tuning ----------------------------------------------------------------------------------

def real(text:str) -> float|None:
  try: return x if math.isfinite(x := float(text)) else None
  except ValueError: return None

def agreement_of(truth:np.ndarray, said:np.ndarray, K:int) -> dict[str, float]:
  """Accuracy, F1 and Matthews' correlation (Gorodkin's for many) of labels 0 to K-1. F1 is that of the second label of
  two, else the mean over the labels that occur, in the truth or in what was said."""
  C = np.bincount(truth*K + said, minlength=K*K).reshape(K, K).astype(float)
  t, p, n, hits = C.sum(1), C.sum(0), C.sum(), np.trace(C)
  f1 = 2*np.diag(C) / np.maximum(1, t + p)
  mean = f1[1] if K == 2 else f1[t + p > 0].mean()
  spread = math.sqrt((n*n - p @ p) * (n*n - t @ t))
  return {"accuracy": hits/n, "F1": float(mean),
          "MCC": (hits*n - t @ p)/spread if spread else 0.0}

def correlation(truth:np.ndarray, said:np.ndarray) -> dict[str, float]:
  "Pearson's and Spearman's; ties share the mean of their ranks."
  def ranks(x:np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts-1)/2)[group]
  def pearson(a:np.ndarray, b:np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / math.sqrt((a @ a) * (b @ b) or 1))
  return {"Pearson": pearson(truth, said), "Spearman": pearson(ranks(truth), ranks(said))}

def classify_task(args:argparse.Namespace) -> Task:
  "Labels, or real values, of texts or pairs of texts: [CLS] a [SEP], or [CLS] a [SEP] b [SEP], filled up with [PAD]."
  if not args.data or len(args.data) != 1: raise UserError("--task classify takes one TSV file: --data FILE")
  tok, L = tokenizer(args), args.length
  labels, texts, lines = read_tsv(args.data[0], args.columns)
  values = [real(l) for l in labels]
  regression = any(v is not None and v != int(v) for v in values)
  if regression and None in values and values.count(None) < len(values)/2:
    i = values.index(None)
    raise UserError(f"{args.data[0]} line {lines[i]}: {labels[i]!r} is not a number, as other labels are")
  regression = regression and None not in values
  names = None if regression else sorted(set(labels), key=lambda l: (real(l) is None, real(l) or 0, l))
  if L < (need := 2 + 2*len(texts[0])): raise UserError(f"--length {L} is too short for texts: give at least {need}")
  if names and len(names) < 2:
    raise UserError(f"{args.data[0]}: every line has the label {names[0]!r}: nothing to learn")
  if names and len(names) > max(10, len(labels)/2):
    raise UserError(f"{args.data[0]} has {len(names):,} labels in {len(labels):,} lines, the first "
                    f"{labels[0][:40]!r}: is that a text? --columns says which columns are which")
  def table(labels:list[str], texts:list[list[str]], lines:list[int], path:str) -> list[Batch]:
    rows = []
    for label, text, line in zip(labels, texts, lines):
      if (real(label) is None) if regression else (label not in names):
        raise UserError(f"{path} line {line}: " + (f"{label!r} is not a number, as other labels are" if regression else
                        f"the label {label!r} does not occur in {args.data[0]} (its labels: "
                        f"{', '.join(names[:12])}{', …'*(len(names) > 12)})"))
      parts = [list(tok.encode(t)) for t in text]
      while sum(map(len, parts)) + len(parts) + 1 > L: max(parts, key=len).pop()      # of the longer text, from the end
      row = [tok.cls] + [t for p in parts for t in (*p, tok.sep)]
      fill = L - len(row)
      rows.append((np.array(row + [tok.pad]*fill, np.int32), np.array([1]*len(row) + [0]*fill, np.int32),
                   np.float32(label) if regression else np.int32(names.index(label))))
    return rows
  rows = table(labels, texts, lines, args.data[0])
  if args.dev: held = table(*read_tsv(args.dev, args.columns, len(texts[0])), args.dev)
  else:
    learned, kept = hold_out(args, len(rows))
    if not len(learned): raise UserError(f"{args.data[0]} has {len(rows)} line: some are held out, give more, or --dev")
    rows, held = [rows[i] for i in learned], [rows[i] for i in kept]
  stack = lambda rows: tuple(np.stack(x) for x in zip(*rows))
  numbers = shuffled(args, len(rows))
  def batch(step:int) -> Batch: return stack([rows[i] for i in numbers(step)])
  return labelled(args, f"{args.data[0]}: {len(rows):,} lines to train on, {len(held):,} held out, "
                  + ("real values" if regression else f"labels {', '.join(names)}") + f" ({args.tokenizer})", tok,
                  tok.masked_size, batch, held, np.array([r[2] for r in rows]), None if regression else names,
                  len(rows)/args.batch)

def labelled(args:argparse.Namespace, about:str, tok:Tokenizer|None, vocab_size:int, batch:Callable[[int], Batch],
             held:list[Batch], trained:np.ndarray, names:list[str]|None, epochs:float|None=None) -> Task:
  """A label for a row, or with no `names` a real value: rows are (tokens (L,), mask (L,), label). trained: the labels
  to train on, or many of them."""
  regression, truth = names is None, np.array([r[2] for r in held])
  stack = lambda rows: tuple(np.stack(x) for x in zip(*rows))
  def forward(model:BiGS, tokens:Tensor, mask:Tensor, labels:Tensor) -> tuple[Tensor, ...]:
    x = model.classify(tokens, mask)
    if regression: return ((x.squeeze(-1) - labels)**2).mean(), x.squeeze(-1)
    return cross_entropy(x.unsqueeze(1), labels.unsqueeze(1)), x.argmax(-1)
  def metrics(outputs:list[Batch]) -> dict[str, float]:
    said = np.concatenate([o[1] for o in outputs])
    return correlation(truth, said) if regression else agreement_of(truth, said.astype(int), len(names))
  if regression: guess, baseline = "the mean of all", float(((truth - trained.mean())**2).mean())
  else:
    counts = 1 + np.bincount(trained, minlength=len(names))
    guess = f"labels by their frequency (the commonest is right at {np.mean(truth == counts.argmax()):.3f})"
    baseline = float(-np.log2(counts/counts.sum())[truth].mean())
  return Task(about, tok, vocab_size, batch, [stack(held[i:i+args.batch]) for i in range(0, len(held), args.batch)],
              baseline, guess, *([1.0, 1.0, "squared error"] if regression else [1/math.log(2)]*2 + ["bits per label"]),
              forward, metrics, "classify", [""] if regression else names, epochs, count=lambda batch: len(batch[0]))

# ---- agreement ------------------------------------------------------------------------------------

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

# ---- the languages of the H3 paper, Table 2 -------------------------------------------------------

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

def language_task(args:argparse.Namespace) -> Task:
  """Rows of a language, all of whose next symbols are learned, and the last one is asked for (arXiv 2212.14052, Table
  2). Recall is asked for in rows of twice the length, too."""
  make, V = {"induction": induction, "recall": recall}[args.task], args.symbols
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
              unit="bits per symbol", forward=forward, metrics=metrics, aside=len(longer), enough=("accuracy", 0.995))

# ---- the Long Range Arena -------------------------------------------------------------------------

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

TASKS = {"text": text_task, "mlm": mlm_task, "classify": classify_task, "agreement": agreement_task,
         "induction": language_task, "recall": language_task, "listops": listops_task, "pixels": pixels_task}

# ---- optimiser ------------------------------------------------------------------------------------

def learning_rate(step:int, steps:int, peak:float, warmup:int, line:bool=False) -> float:
  "Linear up to the peak over `warmup` steps, then a cosine down to a tenth of it, or a line to 0. Steps count from 0."
  if step < warmup: return peak * (step+1) / warmup
  if line: return peak * (steps-step) / (steps-warmup)
  return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step-warmup) / max(1, steps-warmup))))

def group_of(name:str) -> int:
  """0: with weight decay; 1: without; 2: without, and its rate at most 1e-3: the SSMs' dynamics.
  H3's official grouping: safari/src/utils/optim_groups.py, configs/model/layer/h3.yaml. BiGS decays all but biases
  and norms: pretrain.py:384-404."""
  if re.search(r"\.kernel\.(log_dt|inv_A_real|A_imag|B)$", name): return 2
  if name.startswith(("bigs.", "cls.", "classifier.")): return int(name.endswith("bias") or "norm" in name.lower())
  return int(name.endswith(".bias") or "norm" in name or "ln_f" in name or "embeddings" in name)

BETA1, BETA2, EPS = 0.9, 0.95, 1e-8              # language models; masked ones (BiGS, pretrain.py):
MASKED = dict(beta2=0.98, eps=1e-6)

def sumsq_kernel(total:UOp, g:UOp) -> UOp:
  "total[i] += Σ_j g[i,j]²: g in as many slices as total is long, side by side on the CPU, interleaved on a GPU."
  n, T = g.numel(), total.numel()
  i, rows, total, g = UOp.range(T, 0), -(-n // T), total.flatten(), g.flatten()
  j = UOp.range(rows, 1, AxisType.REDUCE) if rows > 1 else UOp.const(0, dtypes.weakint)
  at = i*rows + j if T <= CPU_SLICES else j*T + i
  x = g[at] if n % T == 0 else g[at.valid(at < n)]
  s = (x*x).reduce(j, arg=Ops.ADD) if rows > 1 else x*x
  return total[i].store(total[i] + s).end(i).sink(arg=KernelInfo(name=f"sumsq_{n}"))

def adamw_kernel(p:UOp, m:UOp, v:UOp, g:UOp, hyper:UOp, sumsq:UOp, beta2:float, eps:float) -> UOp:
  """One parameter's whole update, in place (Loshchilov & Hutter, arXiv 1711.05101); none by a gradient that is not
  finite. hyper: lr, lr * decay, 1/(1-β1^t), 1/(1-β2^t), clip, 1/(what the loss was multiplied by)."""
  n, p, m, v, g, sumsq = p.numel(), p.flatten(), m.flatten(), v.flatten(), g.flatten(), sumsq.flatten()
  i = UOp.range(n, 0)
  clip = (hyper[4] / (sumsq[0].sqrt()*hyper[5] + 1e-6)).minimum(1.0)   # the gradient's global norm
  gi = g[i] * (clip*hyper[5])
  mi, vi = BETA1*m[i] + (1-BETA1)*gi, beta2*v[i] + (1-beta2)*gi*gi
  pi = p[i] - hyper[0] * mi*hyper[2] / ((vi*hyper[3]).sqrt() + eps) - hyper[1] * p[i]
  finite = sumsq[0].load() < math.inf
  new = [old[i].store(finite.where(x, old[i].load())) for old, x in ((p, pi), (m, mi), (v, vi))]
  return UOp.group(*new).end(i).sink(arg=KernelInfo(name=f"adamw_{n}"))

CPU_SLICES = 64

class AdamW:
  """AdamW with the gradient's global norm clipped, decay and learning rate by group.

  A kernel for the norm and one for the update a parameter, flattened, so that parameters of one size share
  them. tinygrad's own optimiser launches five times as many kernels, and the first two steps take the longer."""
  def __init__(self, params:dict[str, Tensor], beta2:float=BETA2, eps:float=EPS):
    self.beta2, self.eps = beta2, eps
    zeros = lambda p: Tensor(np.zeros(p.shape, np.float32), device=p.device).realize()
    self.feed = Feed(next(iter(params.values())).device)
    self.params, self.m, self.v = params, *({k: zeros(p) for k, p in params.items()} for _ in "mv")

  def hyper(self, step:int, lr:float, weight_decay:float, clip:float, ssm_scale:float, scale:float=1.0
            ) -> list[Tensor]:
    "What changes with the step (from 0), (6,) for each group. ssm_scale: the third's rate over lr; scale: the loss's."
    rest = [1 / (1 - BETA1**(step+1)), 1 / (1 - self.beta2**(step+1)), clip, 1 / scale]
    rows = [[lr, lr*weight_decay, *rest], [lr, 0, *rest], [lr*ssm_scale, 0, *rest]]
    return [self.feed(i, np.array(r, np.float32)) for i, r in enumerate(rows)]

  device = property(lambda self: self.feed.device)

  def update(self, grads:dict[str, Tensor], hyper:list[Tensor]) -> Tensor:
    "One update from realised gradients; returns the gradient's norm before clipping. Can be part of a TinyJit."
    slices = Tensor.zeros(16384 if machine(self.device).gpu else CPU_SLICES, device=self.device).contiguous()
    for g in grads.values(): slices = slices.custom_kernel(g.flatten(), fxn=sumsq_kernel)[0]
    sumsq, state = slices.sum().reshape(1).contiguous(), []
    kernel = functools.partial(adamw_kernel, beta2=self.beta2, eps=self.eps)
    for k, p in self.params.items():
      old = [p, self.m[k], self.v[k]]
      new = Tensor.custom_kernel(*[t.flatten() for t in (*old, grads[k])], hyper[group_of(k)], sumsq, fxn=kernel)
      state += [t.replace(x.reshape(t.shape)) for t, x in zip(old, new)]
    norm = sumsq.sqrt() * hyper[0][5]
    Tensor.realize(norm, *state)
    return norm

def on(device:str|tuple[str, ...], x:np.ndarray, shared:bool=False) -> Tensor:
  "An array on a device, or whole on each of several; shared: in equal parts, of its first axis, among them."
  t = Tensor(np.ascontiguousarray(x)).realize()
  return t if isinstance(device, str) else t.shard(device, 0 if shared else None).realize()

def put(t:Tensor, x:np.ndarray) -> None:
  "Overwrites a Tensor in place, on each device, where a TinyJit that uses it will find it."
  data = np.ascontiguousarray(x).reshape(t.shape)
  for b in [t._buffer()] if isinstance(t.device, str) else t.uop.buffer.bufs:
    b.ensure_allocated().copy_from(Buffer("NPY", data.size, t.dtype, opaque=data))

class Feed:
  """Arrays as Tensors, each made once for its place and shape, and then overwritten: to make one takes a millisecond,
  as long as a small model's whole step."""
  def __init__(self, device:str|tuple[str, ...]): self.device, self.kept = device, {}
  def __call__(self, place:int, x:np.ndarray, shared:bool=False) -> Tensor:
    if not isinstance(self.device, str): return on(self.device, x, shared)
    if (key := (place, x.shape, x.dtype)) in self.kept: put(self.kept[key], x)
    else: self.kept[key] = on(self.device, x)
    return self.kept[key]

class LossScale:
  """What the loss is multiplied by lest small gradients vanish in float16, and the gradient is divided by: half as much
  after a gradient that is not finite, twice as much after 1,000 that were (Micikevicius et al., arXiv 1710.03740)."""
  def __init__(self, dtype:str):
    self.on, self.good = dtype == "float16", 0
    self.value = 65536.0 if self.on else 1.0
  def saw(self, finite:bool) -> bool:
    "Whether a gradient that is not finite is this scale's fault, as far as can be known."
    if not self.on: return False
    self.good = self.good + 1 if finite else 0
    if self.good == 1000: self.value, self.good = min(2.0**24, self.value*2), 0
    if finite or self.value <= 1: return False
    self.value /= 2
    return True

# ---- checkpoints ----------------------------------------------------------------------------------

PREVIOUS = "checkpoint.previous.safetensors"       # the one before the newest
RECOVERED = 100                                    # steps after which a loss that was not finite is past

def everything(model:H3LM|BiGS, opt:AdamW) -> dict[str, Tensor]:
  "All that training changes, by the names in a checkpoint; dropout's counters are there once it was used."
  return get_state_dict(model) | {f"optim.{n}.{k}": t for n in "mv" for k, t in getattr(opt, n).items()} \
    | {f"optim.rng.{d}": t for d, t in Tensor._device_rng_counters.items()}

def save(path:Path, model:H3LM|BiGS, opt:AdamW, args:argparse.Namespace, step:int, log:"Log", scale:LossScale,
         done:bool=False) -> None:
  "Writes a checkpoint; the one that was there stays beside it as PREVIOUS. OSError, and both are as they were."
  meta = dict(model="bigs" if isinstance(model, BiGS) else "h3", config=dataclasses.asdict(model.config),
              args=vars(args), step=step, tokenizer=args.tokenizer, losses=log.rows, held_out=log.evals,
              baseline=log.task.baseline, labels=log.task.labels, data=log.task.about, scale=[scale.value, scale.good],
              seconds=round(log.seconds(), 1), done=done)
  meta = {k: v if isinstance(v, str) else json.dumps(v) for k, v in meta.items()}
  def keep() -> None:
    if not path.exists(): return
    linked = path.with_name(f"{PREVIOUS}.{os.getpid()}.tmp")
    try: os.link(path, linked)                     # a second name: there is a checkpoint at every moment
    except OSError: os.replace(path, path.with_name(PREVIOUS))            # a file system without such
    else: os.replace(linked, path.with_name(PREVIOUS))
  save_checkpoint(str(path), everything(model, opt), meta, keep)

def clean(out:Path) -> None:
  "Removes what a run that was killed while it wrote has left, and it alone knows of."
  for f in out.glob("checkpoint*.safetensors.*.tmp"):
    try: os.kill(int(f.suffixes[-2][1:]), 0)
    except (ValueError, ProcessLookupError): f.unlink(missing_ok=True)
    except OSError: pass                           # it lives, and is somebody else's

def set_aside(path:Path) -> Path:
  "Moves a checkpoint to the first free number beside it; never over another, not even one that appears meanwhile."
  for i in itertools.count(1):
    aside = path.with_name(f"checkpoint.{i}.safetensors")
    try: os.close(os.open(aside, os.O_CREAT | os.O_EXCL))
    except FileExistsError: continue
    os.replace(path, aside)
    return aside

def read_newest(out:Path) -> tuple[Path, Weights, dict[str, str]]:
  "The newest checkpoint of a run whose bytes are all as they were written. CheckpointError if none is."
  found, worse = [p for p in (out/CHECKPOINT, out/PREVIOUS) if p.is_file()], None
  for path in found:
    try:
      tensors, meta = read_weights(path)
      for t in tensors.values(): t.check()
    except CheckpointError as e:
      worse = worse or e
      continue
    if worse:
      (damaged := out/f"{CHECKPOINT}.damaged").unlink(missing_ok=True)
      os.replace(found[0], damaged)
      print(f"{worse} It is now {damaged.name}; going on from the one before it", file=sys.stderr)
    return path, tensors, meta
  raise worse or UserError(f"no checkpoint at {out/CHECKPOINT}: leave --resume out to start a run")

def read_losses(meta:dict[str, str]) -> list[list[float]]:
  "The losses in a checkpoint's metadata, as in `Log.rows`: the columns that this version knows."
  return [[*row, *[math.nan]*len(LOSSES)][:len(LOSSES)] for row in json.loads(meta["losses"])]

def read_evals(meta:dict[str, str]) -> list[list]:
  "The evaluations in a checkpoint's metadata, as in `Log.evals`; old ones have no metrics."
  return [[step, loss, *metrics, {}][:3] for step, loss, *metrics in json.loads(meta["held_out"])]

def restore(tensors:Weights, state:dict[str, Tensor], source:Path) -> None:
  for k, t in state.items():
    if k not in tensors and k.startswith("optim.rng."): continue
    if k not in tensors or math.prod(tensors[k].shape) != t.numel():
      raise CheckpointError(f"{source} lacks the optimiser's state ({k}): --init takes its weights alone")
  for k, t in state.items():
    if k in tensors: put(t, tensors[k].numpy().astype(t.numpy().dtype, copy=False))

def check_writable(*folders:Path) -> None:
  for out in folders:
    try:
      out.mkdir(parents=True, exist_ok=True)
      (probe := out / ".writable").touch()
      probe.unlink()
    except OSError as e:
      raise UserError(f"can't write to the folder {out}: {e.strerror}: name another") from None

# ---- what is shown --------------------------------------------------------------------------------

@contextlib.contextmanager
def alone(out:Path) -> Iterator[None]:
  "Keeps other runs out of a folder; the system lets go of it when the process dies."
  try: import fcntl
  except ImportError:                              # Windows has no such lock
    yield
    return
  folder = os.open(out, os.O_RDONLY)
  try:
    try: fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f"another run trains into {out}: wait for it, or give another --out") from None
    except OSError: pass                           # nor has every file system
    yield
  finally: os.close(folder)

def duration(seconds:float) -> str:
  s = round(seconds)
  return f"{s//3600}h{s//60%60:02d}m" if s >= 3600 else f"{s//60}m{s%60:02d}s" if s >= 60 else f"{s}s"

LOSSES = ("step", "loss_nats", "learning_rate")     # the columns of Log.rows

class Log:
  "The losses so far; the progress line; the CSV and the plot."
  def __init__(self, args:argparse.Namespace, task:Task):
    self.args, self.task = args, task
    self.rows: list[list[float]] = []             # of a step each, see LOSSES
    self.evals: list[list] = []                   # step, held-out loss in the task's unit, its metrics
    self.live, self.begun, self.a_step, self.before = bool(sys.stdout and sys.stdout.isatty()), 0, 0.0, 0.0
    self.restart_clock()

  def show(self, text:str, end:str="\n") -> None:
    try: print(text, end=end, flush=True)
    except BrokenPipeError: sys.stdout = open(os.devnull, "w")  # nobody reads any more: the training goes on
  def line(self, text:str) -> None:
    "A line that stays, over the progress line if there is one."
    self.show(("\r\x1b[K" if self.live else "") + text)

  def step(self, step:int, loss:float, lr:float, tokens:int) -> None:
    "A step's loss in nats, its learning rate, and how many tokens its batch had."
    a = self.args
    self.rows.append([step, round(loss, 5), float(f"{lr:.4g}")])
    self.times = (self.times + [time.perf_counter()])[-21:]
    recent = [r[1] for r in self.rows[-10:]]                   # a step's loss alone jumps about
    mean = sum(recent) / len(recent)
    text = (f"step {step:>{len(str(a.steps))}}/{a.steps}  loss {mean:.3f}  {mean*self.task.bits:.3f} "
            f"{self.task.unit.replace(' per ', '/')}  lr {lr:.1e}")
    if len(self.rows) - self.begun > 2:                        # the first two compile and capture
      self.a_step = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
    if self.a_step:
      text += f"  {tokens/self.a_step:,.0f} tokens/s  {duration((a.steps-step)*self.a_step)} left"
    if not math.isnan(peak := peak_memory()): text += f"  {peak/1e9:.2f} GB"
    if self.live:
      width = shutil.get_terminal_size().columns - 1
      bar = max(0, min(20, width - len(text) - 1))              # what the text leaves
      self.show("\r\x1b[K" + f"{'━'*(bar*step//a.steps):─<{bar}} {text}"[:width].strip(), end="")
    elif step % a.log_every == 0 or step in (1, a.steps): self.show(text)

  def held_out(self) -> str:
    "The last evaluation."
    _, loss, metrics = self.evals[-1]
    return f"{loss:.3f} {self.task.unit}" + "".join(f", {k} {v:.3f}" for k, v in metrics.items())

  def restart_clock(self) -> None: self.times = [time.perf_counter()]
  def seconds(self) -> float:
    "Of the whole run, without the time between a stop and --resume."
    return self.before + time.perf_counter() - START

  def files(self) -> tuple[Path, Path]:
    "Where the table and the picture go."
    out = Path(self.args.out)
    return Path(self.args.log or out / "log.csv"), Path(self.args.plot or out / "loss.png")

  def write(self, title:str) -> str:
    "The table and the picture; returns what to tell the user."
    table, picture = self.files()
    try:
      self.write_table(table)
      try: self.plot(picture, title)
      except ImportError: return f"{table} (pip install matplotlib, and the plot is drawn too)"
    except OSError as e: return f"not the log ({e.filename}: {e.strerror})"
    return f"{table}, {picture}"

  def write_table(self, path:Path) -> None:
    held = {step: [loss, *metrics.values()] for step, loss, metrics in self.evals}
    unit = self.task.unit.replace(" ", "_")
    with open(path, "w", newline="") as f:
      w = csv.writer(f)
      w.writerow(["step", "loss_nats", unit, "learning_rate", f"baseline_{unit}", f"held_out_{unit}",
                  *(f"held_out_{k.replace(' ', '_')}" for k in (self.evals[-1][2] if self.evals else ()))])
      for step, loss, lr in self.rows:
        w.writerow([step, loss, round(loss*self.task.bits, 5), lr, round(self.task.baseline, 5), *held.get(step, ())])

  def plot(self, path:Path, title:str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    x, y = np.array([r[0] for r in self.rows]), np.array([r[1] for r in self.rows]) * self.task.bits
    near = np.ones(min(len(y), 1 + 2*(len(y)//80)))
    smooth = np.convolve(y, near, "same") / np.convolve(np.ones_like(y), near, "same")   # the neighbours' mean
    fig, ax = plt.subplots(figsize=(8, 4.8), dpi=150, layout="constrained")
    ax.plot(x, y, color="#4c78a8", alpha=0.25, lw=0.8)
    ax.plot(x, smooth, color="#4c78a8", lw=1.8, label="training")
    base, unit = self.task.baseline, self.task.unit
    ax.axhline(base, color="#888888", ls="--", lw=1.2, label=f"{self.task.guess.split(' (')[0]}: {base:.2f}")
    if self.evals:
      ex, ey, _ = zip(*self.evals)
      ax.plot(ex, ey, "o-", color="#e45756", ms=5, lw=1, label=f"held out: {ey[-1]:.2f} at the end")
    low = min([y.min(), base, *(e[1] for e in self.evals)])
    ax.set(xlabel="step", ylabel=unit, xlim=(0, x[-1]*1.01), ylim=(low-0.2, max(y.max(), base)+0.2))
    ax.set_title(title, fontsize=10.5, loc="left")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    fig.savefig(path)
    plt.close(fig)

# ---- the loop -------------------------------------------------------------------------------------

def cross_entropy(logits:Tensor, targets:Tensor) -> Tensor:
  "Mean loss in nats over the targets that are not negative: logits (B,L,V), targets (B,L)."
  asked = (targets >= 0).float()
  return (surprisal(logits, targets) * asked).sum() / asked.sum()

class Interrupt:
  "While training, the first Ctrl-C, SIGTERM or SIGHUP waits for the step to end; a second one doesn't. Not nohup's."
  signals = [getattr(signal, s) for s in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, s) and
             not (s == "SIGHUP" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)]
  seen = 0
  def __init__(self, handler:Callable|None=None): self.handler = handler or self.note
  def __enter__(self) -> "Interrupt":
    self.old = [signal.signal(s, self.handler) for s in self.signals]
    return self
  def __exit__(self, *_) -> None:
    for s, old in zip(self.signals, self.old): signal.signal(s, old)
  def note(self, signum:int, frame) -> None:
    if self.seen: raise KeyboardInterrupt
    self.seen = signum
    print("\nfinishing the step, then saving; again to stop at once", file=sys.stderr, flush=True)

def describe(c:H3Config|BiGSConfig) -> str:
  if isinstance(c, BiGSConfig):
    name = dict(zip((*BLOCKS, "s4d"), ("BiGS", "STACK/SSM", "gated attention", "BERT", "S4D both ways")))[c.block]
    return f"{name}, {c.n_layer} layers of width {c.d_model}"
  kind = c.ssm if not c.attn_layers else "transformer" if len(c.attn_layers) == c.n_layer else "hybrid"
  where = f", attention in {', '.join(map(str, c.attn_layers))}" if kind == "hybrid" else ""
  return f"{KINDS[kind]}, {c.n_layer} layers of width {c.d_model}{where}"

def cut(batch:Batch, size:int|None) -> Iterator[Batch]:
  "Inputs and targets (B,L) in pieces of `size` tokens, one after the other; None: whole."
  for i in range(0, batch[0].shape[1], size or batch[0].shape[1]):
    yield tuple(a[:, i:i+size] for a in batch) if size else batch

def by_layer(model:H3LM, params:dict[str, Tensor], x:Tensor, y:Tensor, weigh:Callable) -> tuple[Tensor, list[Tensor]]:
  """The loss, and the gradients of weigh(loss), of which only what goes into each layer is kept on the way; the rest is
  computed once more on the way back, layer by layer (Chen et al., arXiv 1604.06174)."""
  keep, words = lambda t: t.contiguous().realize(), model.backbone.embeddings.word_embeddings.weight
  grads, inputs = {}, [keep(model.embed(x))]
  for layer in model.backbone.layers: inputs.append(keep(layer(inputs[-1])[0]))
  def back(out:Tensor, part:object, leaf:Tensor|None, dy:Tensor|None=None, *also:Tensor) -> Tensor|None:
    mine = [*get_state_dict(part).values(), *also]
    found = out.gradient(*mine, *([] if leaf is None else [leaf]), gradient=dy)
    Tensor.realize(*found, *([loss] if leaf is not None and dy is None else []))
    for p, g in zip(mine, found): grads[id(p)] = keep(grads[id(p)] + g) if id(p) in grads else g
    return None if leaf is None else found[-1]
  loss = cross_entropy(model.head(leaf := inputs.pop().detach()), y)
  dy = back(weigh(loss), model.backbone.ln_f, leaf, None, words)
  for layer in reversed(model.backbone.layers):
    dy = back(layer(leaf := inputs.pop().detach())[0], layer, leaf, dy)
  back(model.embed(x), model.backbone.embeddings, None, dy)
  return loss, [grads[id(p)] for p in params.values()]

def make_step(model:H3LM|BiGS, params:dict[str, Tensor], opt:AdamW, forward:Callable=Task.forward,
              truncate:int|None=None, accumulate:int=1, recompute:bool=False, dtype:str="float32",
              count:Callable[[Batch], int]=Task.count) -> Callable:
  """One step of training: a batch, as `Task.forward` takes it, and `opt.hyper` to the loss and the gradient's norm.

  truncate: the batch goes through in pieces of so many tokens. The state is handed on, no gradient comes back
  through it (truncated backpropagation through time). accumulate: it goes through in so many parts. The gradients of
  pieces and parts are added up for one update, by their share of the targets. Where the parameters are on several
  devices, whole on each, each takes its share of the sequences: what is written here for one device runs on every one,
  on sequences of its own, until the gradients are summed."""
  device, precision = opt.device, dict(TRAINING=1, HALF=PRECISIONS.index(dtype))
  several = 1 if isinstance(device, str) else len(device)
  own = lambda t: t if several == 1 else Tensor(t.uop.src[0])       # on each device, its part of t
  total = lambda t: t if several == 1 else Tensor(t.uop.allreduce(Ops.ADD, device))
  def gradients(batch:tuple[Tensor, ...], share:Tensor, hyper:tuple[Tensor, ...], state:tuple[Tensor, ...]=()
                ) -> tuple[Tensor, list[Tensor], tuple[Tensor, ...]]:
    "The loss and the gradients of this device's sequences, times their share, and the state after them."
    after, alone = (), several == accumulate == 1 and truncate is None
    weigh = lambda loss: (loss if alone else loss*own(share).reshape(())) / (hyper[0][5] if dtype == "float16" else 1)
    batch = tuple(map(own, batch))
    if recompute: loss, grads = by_layer(model, params, *batch, weigh)
    else:
      if truncate:
        logits, after = model.forward(batch[0], state)
        loss = cross_entropy(logits, batch[1])
      else: loss = forward(model, *batch)[0]
      grads = weigh(loss).gradient(*params.values())
    return loss if alone else total(loss*own(share).reshape(())), grads, after
  @capture
  def whole(share:Tensor, hyper:list[Tensor], *batch:Tensor) -> tuple[Tensor, Tensor]:
    with Context(**precision):
      loss, grads, _ = gradients(batch, share, hyper)
      Tensor.realize(loss, *(grads := [*map(total, grads)]))           # all of them before any weight changes
      norm = opt.update(dict(zip(params, grads)), hyper)
    return loss, norm

  sums, state, feed = [], (), Feed(device)
  @capture
  def piece(share:Tensor, hyper:list[Tensor], *batch:Tensor) -> Tensor:
    with Context(**precision):
      loss, grads, after = gradients(batch, share, hyper, state)
      Tensor.realize(loss, *grads, *after)
    hand_on((*state, *sums), (*after, *(s + g for s, g in zip(sums, grads))))
    return loss
  @capture
  def update(*hyper:Tensor) -> Tensor:
    norm = opt.update({k: total(s).contiguous() for k, s in zip(params, sums)}, list(hyper))
    hand_on(sums, [t.zeros_like() for t in sums])
    return norm
  def train_step(batch:Batch, hyper:list[Tensor]) -> list[float]:
    nonlocal state
    parts = [*zip(*(np.split(a, accumulate) for a in batch))]
    pieces, targets, loss = [[*cut(part, truncate)] for part in parts], count(batch), 0.0
    def args(piece:Batch) -> list:
      share = [count(some) / targets for some in zip(*(np.split(a, several) for a in piece))]
      return [feed(-1, np.array(share, np.float32), True), hyper, *(feed(i, a, True) for i, a in enumerate(piece))]
    if len(pieces) == len(pieces[0]) == 1: return [t.item() for t in whole(*args(batch))]
    if not sums: sums.extend(on(device, np.zeros(p.shape, np.float32)) for p in params.values())
    if truncate and not state:
      state = tuple(on(device, np.zeros(t.shape, np.float32))
                    for t in model.init_state(len(batch[0])//several//accumulate)[1:])
    for part in pieces:
      hand_on(state, [t.zeros_like() for t in state])
      loss += sum(piece(*args(some)).item() for some in part)
    return [loss, update(*hyper).item()]
  return train_step

def make_eval(model:H3LM|BiGS, forward:Callable=Task.forward, truncate:int|None=None, dtype:str="float32"
              ) -> Callable[[Batch], list[np.ndarray]]:
  """What `forward` makes of a batch, the mean loss first; truncate: read in pieces of so many tokens, as in training.
  Batches may be of several sizes, each of which is compiled. Of several devices each does it all."""
  device, precision = next(iter(get_state_dict(model).values())).device, dict(HALF=PRECISIONS.index(dtype))
  def made(*batch:Tensor) -> list[Tensor]:
    with Context(**precision): return [t.realize() for t in forward(model, *batch)]
  whole = functools.cache(lambda shape: capture(made))
  if truncate is None:
    return lambda batch: [t.numpy() for t in whole(tuple(x.shape for x in batch))(*(on(device, a) for a in batch))]

  state = ()
  @capture
  def piece(x:Tensor, y:Tensor) -> Tensor:
    with Context(**precision): logits, after = model.forward(x, state)
    Tensor.realize(loss := cross_entropy(logits, y), *after)
    hand_on(state, after)
    return loss
  def eval_step(batch:Batch) -> list[np.ndarray]:
    nonlocal state
    state = state or tuple(on(device, t.numpy()) for t in model.init_state(len(batch[0]))[1:])
    hand_on(state, [t.zeros_like() for t in state])
    return [np.mean([piece(*(on(device, a) for a in some)).item() for some in cut(batch, truncate)])]
  return eval_step

def hand_on(old:Iterable[Tensor], new:Iterable[Tensor]) -> None:
  if pairs := [*zip(old, new)]: Tensor.realize(*[o.assign(n.detach()) for o, n in pairs])

def make_model(args:argparse.Namespace, task:Task, tensors:Weights|None, meta:dict[str, str]|None,
               source:str) -> H3LM|BiGS:
  "A new one, or that of a checkpoint, fit for the task."
  if tensors is None:
    config = make_config(args, task.vocab_size)
    if isinstance(config, H3Config): return H3LM(config, seed=args.seed)
    if task.labels: config.n_labels = len(task.labels)
    return BiGS(config, args.seed, (task.head,))
  if block_of(args) is None: model = h3_model(tensors, meta, source)
  else:
    labels = task.labels and len(task.labels)
    old = tensors.get("classifier.weight")
    if not args.resume and labels and old is not None and old.shape[0] != labels:      # as MRPC and RTE start from MNLI
      tensors = {k: v for k, v in tensors.items() if not k.startswith("classifier.")}
    model = bigs_model(tensors, meta, source, task.head, "tanh", labels)
  if model.config.vocab_size != task.vocab_size:
    raise UserError(f"the checkpoint's vocabulary is {model.config.vocab_size}, --tokenizer {args.tokenizer}'s "
                    f"{task.vocab_size}: give the tokenizer it was trained with")
  if isinstance(model, BiGS): model.lengthen(args.length)
  else: model.config.max_length = max(model.config.max_length, 2*args.length)
  return model

def complete(args:argparse.Namespace) -> None:
  "Options that follow from the number of steps."
  if args.warmup is None: args.warmup = args.steps//10 if args.task in LANGUAGES else min(1000, args.steps//10)
  if args.eval_every is None: args.eval_every = -(-args.steps//8)
  if args.save_every is None: args.save_every = args.eval_every
  if args.log_every is None: args.log_every = max(1, args.steps//20)

def train(args:argparse.Namespace, tensors:Weights|None=None, meta:dict[str, str]|None=None) -> int:
  "One run. tensors, meta: the checkpoint that --resume or --init names."
  out, path = Path(args.out), Path(args.out) / CHECKPOINT
  Tensor.manual_seed(args.seed)                        # dropout's; weights and batches are numpy's
  if args.embed_dropout or args.resid_dropout: Tensor.rand(1).realize()    # makes the counter that is saved
  if args.task != "agreement" and (block_of(args) is None) != (args.task in READ_ON):
    raise UserError(f"--task {args.task} is not for --model {args.model}: give "
                    + " or ".join(KINDS if args.task in READ_ON else (*BOTH_WAYS, "transformer", "s4d")))
  task = TASKS[args.task](args)
  if args.steps is None: args.steps = math.ceil(FINE_TUNING["epochs"] * task.epochs)
  complete(args)
  def new_model() -> H3LM|BiGS: return make_model(args, task, tensors, meta, source if args.resume else args.init)
  source, devices = str(path), open_devices(args)
  model = new_model()
  longest = max(b[0].shape[1] for b in task.held_out)
  if isinstance(model, H3LM) and longest > (model.config.max_positions or longest):
    raise UserError(f"the model has learned positions for {model.config.max_positions} tokens, and the task has rows "
                    f"of {longest}: give a larger --max-positions, or a smaller --length")
  vocab = task.tokenizer.path.read_bytes() if task.tokenizer and args.tokenizer == "bert" else None
  if devices:
    for p in get_state_dict(model).values(): p.shard_(devices).realize()
  params, log, scale = get_state_dict(model), Log(args, task), LossScale(args.dtype)
  opt, first = AdamW(params, **(MASKED if isinstance(model, BiGS) else {})), 0
  state = everything(model, opt)
  if args.resume:
    restore(tensors, state, Path(source))
    first, log.rows = int(meta["step"]), read_losses(meta)
    log.evals = read_evals(meta)
    log.before = float(meta.get("seconds", 0))
    if "scale" in meta: scale.value, scale.good = json.loads(meta["scale"])
    if meta.get("data", task.about) != task.about:
      print(f"note: the run so far was on {meta['data']}: this is not what it would have been", file=sys.stderr)
    if first >= args.steps:
      raise UserError(f"the run in {out} has done its {first} steps: give more with --steps, "
                      "or another --out to start afresh")
  if args.truncate and (args.task != "text" or model.config.attn_layers or model.config.max_positions):
    raise UserError("--truncate hands on the state of H3 layers, attention and learned positions have none: it is for "
                    "--task text --model h3")
  if args.truncate and args.length % args.truncate:
    raise UserError(f"--truncate {args.truncate} does not divide --length {args.length}: give one that does")
  if args.batch % (args.accumulate*args.devices):
    raise UserError(f"--batch {args.batch} is no multiple of {args.accumulate*args.devices}, the parts of "
                    "--accumulate times --devices")
  if args.checkpoint_activations and (args.task != "text" or args.truncate or args.embed_dropout or args.resid_dropout):
    raise UserError("--checkpoint-activations is for --task text, without --truncate and without dropout, whose masks "
                    "would be drawn anew")
  check_precision(args.dtype)
  check_writable(out, *(p.parent for p in log.files()))
  clean(out)
  total = sum(p.numel() for p in params.values())
  title = f"{describe(model.config)}, {total/1e6:.2f} M parameters"
  where = " and ".join(devices) if devices else Device.DEFAULT
  print(f"{title}, on {where}{'' if FLASH else ' without custom kernels (FLASH=0)'}")
  print(task.about)
  rows, length = task.batch(first)[0].shape
  print(f"{args.steps} steps of {rows} x {length} = {rows*length:,} tokens"
        + (f" in {args.accumulate} parts" if args.accumulate > 1 else "")
        + (f", the gradient within {args.truncate}" if args.truncate else "")
        + (f", in {args.dtype}" if args.dtype != "float32" else "")
        + (f", going on after step {first}" if args.resume else ""), flush=True)

  train_step = make_step(model, params, opt, task.forward, args.truncate, args.accumulate, args.checkpoint_activations,
                         args.dtype, task.count)
  eval_step = make_eval(model, task.forward, args.truncate, args.dtype)
  failures, failed, saved = 0, 0, first if args.resume else None      # in a row; at steps; what the checkpoint has done
  def recover(step:int) -> None:
    "Back to the last checkpoint, or to the beginning, in place; the data and the schedule go on."
    nonlocal failures, failed
    # weights that blow up do so after a few good steps: "in a row" is with fewer than RECOVERED between
    failures, failed = 1 + failures*(step - failed <= RECOVERED), step
    if failures == 3:
      raise UserError(f"the loss or the gradient is not finite at step {step}, for the third time in a row: take a "
                      "smaller --lr (checkpoints stay as they were)")
    if saved is not None:
      at, weights, _ = read_newest(out)
      restore(weights, state, at)
    else:
      for k, p in get_state_dict(new_model()).items(): put(params[k], p.numpy())
      for t in (*opt.m.values(), *opt.v.values()): put(t, np.zeros(t.shape, np.float32))
    log.line(f"step {step}: the loss or the gradient is not finite: back to the weights of step {saved or 0}, without "
             "this batch")
    log.restart_clock()
  def evaluate(step:int) -> bool:
    "Whether the loss is finite; if so it is shown."
    outputs = [*map(eval_step, task.held_out)]
    counts = [task.count(b) for b in task.held_out]      # as in training, by targets
    counts[len(counts)-task.aside:] = [0]*task.aside
    mean = float(np.average([o[0] for o in outputs], weights=counts))
    if math.isfinite(mean):
      metrics = {k: round(v, 5) for k, v in task.metrics(outputs).items()}
      log.evals.append([step, round(mean*task.held_out_bits, 5), metrics])
      log.line(f"step {step}: held out {log.held_out()}")
    log.restart_clock()
    return math.isfinite(mean)
  def write(step:int, must:bool, done:bool) -> None:
    "A checkpoint and the log; where there is no room for it, a line says so, unless it must be."
    nonlocal saved
    if saved is None:
      for old in (path, out / PREVIOUS):
        if old.exists(): log.line(f"the checkpoint that was in {out} is now {set_aside(old).name}")
    try:
      save(path, model, opt, args, step, log, scale, done)
      if vocab: (out / "vocab.txt").write_bytes(vocab)
      saved = step
      log.write_table(log.files()[0])
    except OSError as e:
      stays = f"the checkpoint of step {saved} stays" if saved is not None else "there is no checkpoint yet"
      if must: raise UserError(f"can't write {e.filename or path}: {e.strerror}; {stays}") from None
      log.line(f"step {step}: can't write {e.filename or path}: {e.strerror}; {stays}, and the training goes on")
    log.restart_clock()

  with contextlib.nullcontext() if args.resume else alone(out), Interrupt() as interrupt:
    log.begun = len(log.rows)
    if args.init and not args.resume: evaluate(0)      # where it starts from
    for step in range(first, args.steps):
      lr = learning_rate(step, args.steps, args.lr, args.warmup, args.task in LINE)
      hyper = opt.hyper(step, lr, args.weight_decay, args.clip, min(1e-3, args.lr) / args.lr, scale.value)
      batch = task.batch(step)
      loss, norm = train_step(batch, hyper)
      if step == first: log.line(f"first step after {time.perf_counter()-START:.1f} s")
      finite = math.isfinite(norm)
      if not math.isfinite(loss) or (not finite and not scale.saw(False)): recover(step+1)
      else:
        if finite: scale.saw(True)
        log.step(step+1, loss, lr, batch[0].size)
      if step - first < 2: log.restart_clock()
      last, stop = step+1 == args.steps, interrupt.seen   # a signal from here on waits for the next step
      saving = stop or (step+1) % args.save_every == 0 or last
      if last or (step+1) % args.eval_every == 0:
        good = evaluate(step+1)
        if task.enough and not last and len(log.evals) >= 3 and \
           all(e[2][task.enough[0]] >= task.enough[1] for e in log.evals[-3:]):
          log.line(f"{task.enough[0]} at least {task.enough[1]} three times in a row: that is enough")
          saving = last = True
      else: good = not saving or math.isfinite(float(eval_step(task.held_out[0])[0]))
      if not good:                                     # weights that have blown up are never saved
        recover(step+1)
        if last: evaluate(step+1)
      if saving and (good or last): write(step+1, last or bool(stop), last)
      if args.sample_every and task.sample and (step+1) % args.sample_every == 0 and not last and not devices:
        log.line("--- a sample ---")
        task.sample(model)
        log.line("---")
        log.restart_clock()
      if stop and not last:
        log.write(title)
        log.line(f"stopped after step {step+1} of {args.steps}, " + (f"saved {path}" if saved == step+1 else
                 "nothing saved" if saved is None else f"the checkpoint is that of step {saved}"))
        if saved is not None: log.line(f"go on with: python train.py --resume --out {out}")
        return 128 + stop
      if last: break

  files = log.write(title)
  if args.sample and task.sample:
    for p in get_state_dict(model).values() if devices else (): p.replace(p.to(devices[0]).realize())
    print("\n--- a sample ---")
    try: task.sample(model)
    except KeyboardInterrupt: print()
    print("---")
  print(f"\nheld out: {log.held_out()}; {task.guess}: {task.baseline:.3f}")
  print(f"wrote {path}, {files}; {duration(time.perf_counter()-START)} in all")
  where = "" if args.out == OUT else f" --model {out}"
  if args.task == "text": print(f"more text: python generate.py{where}")
  if args.task == "mlm": print(f'more of it: python generate.py{where} --fill "what is {MASK} here?"')
  return 0

def open_devices(args:argparse.Namespace) -> tuple[str, ...]|None:
  "The first --devices of the kind that tinygrad has found; None if it is one."
  if args.devices == 1: return None
  names = tuple(Device.canonicalize(f"{Device.DEFAULT}:{i}") for i in range(args.devices))
  for name in names:
    try: Device[name]
    except Exception as e:
      why = f"{type(e).__name__}: {e}".split("\n")[0]
      raise UserError(f"--devices {args.devices}: there is no device {name} ({why})") from None
  return names

def check_precision(dtype:str) -> None:
  "UserError where the device, or its compiler, does not know such numbers."
  if dtype == "float32": return
  kind, renderer = (dtypes.half, dtypes.bfloat16)[PRECISIONS.index(dtype)-1], Device[Device.DEFAULT].renderer
  stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 2)                                  # a compiler has much to say
  try:
    if kind not in renderer.supported_dtypes(): raise ValueError
    if (Tensor([1.0, 2.0]).realize().cast(kind).contiguous() * 2).float().tolist() != [2, 4]: raise ValueError
  except Exception:
    raise UserError(f"--dtype {dtype}: the device {Device.DEFAULT}, or its compiler, does not know such numbers: "
                    "leave it out") from None
  finally:
    os.dup2(stderr, 2)
    for f in (stderr, nowhere): os.close(f)

# ---- benchmark ------------------------------------------------------------------------------------
# Each contestant runs in a process of its own, twice in turns; of its times the least counts. Its memory is the
# peak beyond what the process held once its libraries were imported.

BENCH = {"train, d 256, batch 16, L 256": "--d-model 256 --batch 16 --length 256",
         "train, d 256, batch 16, L 2048": "--d-model 256 --batch 16 --length 2048",
         "train, 125M, batch 1, L 1024": "--size 125M --attn-layers 6 --batch 1 --length 1024 --tokenizer gpt2",
         "decode, 125M, batch 1": "--size 125M --attn-layers 6 --batch 1 --tokenizer gpt2",
         "decode, 125M, batch 64": "--size 125M --attn-layers 6 --batch 64 --tokenizer gpt2"}
ROOM = 128                                       # of the KV cache in decoding

def bench_one(what:str, who:str) -> None:
  "Prints the seconds of a step, of the first one, and MB, as JSON. who: ours, plain (FLASH=0), torch."
  def peak() -> float: return peak_memory() / 1e6
  args = parser().parse_args(BENCH[what].split())
  for k, v in (COMMON | DEFAULTS["text"]).items():
    if getattr(args, k) is None: setattr(args, k, v)
  config = make_config(args, TOKENIZERS[args.tokenizer].vocab_size)
  rng, decode = np.random.default_rng(0), what.startswith("decode")
  tokens = rng.integers(0, config.vocab_size, (args.batch, args.length + 1)).astype(np.int32)
  if who == "torch":
    import torch, h3tiny
    from test_all import TorchLM
    torch.set_num_threads(os.cpu_count())
    base, h3tiny.param = peak(), lambda x: np.ascontiguousarray(x, np.float32)   # no Tensors beside PyTorch's
    model = TorchLM(config, get_state_dict(H3LM(config), tensor_type=np.ndarray))
    opt, t = torch.optim.AdamW(model.weights.values(), lr=1e-3, betas=(BETA1, BETA2)), torch.tensor(tokens)
    state = model.start(args.batch, ROOM) if decode else None
    def step(i:int) -> None:
      if decode:
        with torch.no_grad(): return model.step(t[:, i % args.length], state, i)
      opt.zero_grad()
      loss = model.loss(t[:, :-1], t[:, 1:])
      loss.backward()
      torch.nn.utils.clip_grad_norm_(model.weights.values(), args.clip)
      opt.step()
      loss.item()
  else:
    setup_device()
    check_kernels()
    base, model = peak(), H3LM(config)
    params = get_state_dict(model)
    if decode:
      session = Session(model, args.batch, ROOM)
      def step(i:int) -> None: session(tokens[:, i % args.length])
    else:
      opt = AdamW(params)
      train_step, hyper = make_step(model, params, opt), opt.hyper(0, 1e-3, 0.1, args.clip, 1.0)
      def step(i:int) -> None: train_step((tokens[:, :-1], tokens[:, 1:]), hyper)
  times = []
  while len(times) < 3 or (sum(times[2:]) < 8 and len(times) < (64 if decode else 24)):
    start = time.perf_counter()
    step(len(times))
    times.append(time.perf_counter() - start)
  weights = sum(4*math.prod(p.shape) for p in (model.weights if who == "torch" else params).values())
  print(json.dumps(dict(seconds=min(times[2:]), first=times[0], MB=peak() - base, weights=weights)))

def child(code:str, **env:str) -> str:
  "What `code` prints in a Python of its own."
  done = subprocess.run([sys.executable, "-c", f"import train; {code}"], cwd=Path(__file__).parent,
                        env=os.environ | env, capture_output=True, text=True)
  if done.returncode: raise UserError(f"a benchmark failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
  return done.stdout

def copy_rate() -> float:
  "Bytes a second that all cores together copy, counted once for the reading and once for the writing."
  a, b = (np.ones(1 << 27, np.float32) for _ in "ab")
  parts, best = np.array_split(np.arange(len(a)), os.cpu_count()), math.inf
  for _ in range(5):
    start = time.perf_counter()
    threads = [threading.Thread(target=np.copyto, args=(a[p[0]:p[-1]+1], b[p[0]:p[-1]+1])) for p in parts]
    for t in threads: t.start()
    for t in threads: t.join()
    best = min(best, time.perf_counter() - start)
  return 2*a.nbytes / best

def bench() -> int:
  "The table of the README's section on speed, for this machine; on a CPU against PyTorch, else against FLASH=0."
  setup_device()
  cpu, cores = Device.DEFAULT == "CPU", os.cpu_count()
  others = ["torch"] if cpu and importlib.util.find_spec("torch") else [] if cpu else ["plain"]
  print(f"{Device.DEFAULT}, {cores} cores; milliseconds a step, MB beyond the libraries"
        + ("" if others or not cpu else "; no column for PyTorch: it is not installed"))
  print(f"{'':32} {'ours':>9} {'MB':>7}" + "".join(f" {o:>9} {'MB':>7} {'ratio':>7}" for o in others), flush=True)
  best = {}
  for what in BENCH if cpu else list(BENCH)[:1]:
    for who in ("ours", *others) * (2 if cpu else 1):
      plain = {"FLASH": "0"} if who == "plain" else {}
      out = json.loads(child(f"train.bench_one({what!r}, {who!r})", **plain).splitlines()[-1])
      if (what, who) not in best or out["seconds"] < best[what, who]["seconds"]: best[what, who] = out
    ours, rest = best[what, "ours"], [best[what, o] for o in others]
    figures = lambda o: f" {1e3*o['seconds']:9.1f} {o['MB']:7.0f}"
    print(f"{what:32}{figures(ours)}" + "".join(f"{figures(o)} {o['seconds']/ours['seconds']:6.2f}x" for o in rest),
          flush=True)
  if cpu:
    one, rate = best["decode, 125M, batch 1", "ours"], copy_rate()
    print(f"decode, batch 1: {one['weights']/1e6:.0f} MB of weights a token; all cores copy {rate/1e9:.1f} GB/s (read "
          f"and written), {1e3*one['weights']/rate:.1f} ms: {one['weights']/rate/one['seconds']:.0%} of that limit")
  with tempfile.TemporaryDirectory() as folder:
    for start in ("cold", "second"):
      run = ["--steps", "1", "--sample", "0", "--out", folder]
      out = child(f"train.main({run})", CACHEDB=f"{folder}/cache.db").splitlines()
      print(f"{start} start of the default run: {next(l for l in out if l.startswith('first step'))}", flush=True)
  return 0

# ---- the papers' claims ---------------------------------------------------------------------------

@dataclasses.dataclass
class Grid:
  "Rows of models and columns of tasks, each trained with several seeds; and what the paper has."
  title: str
  about: str
  rows: dict[str, str]                          # what is shown: options
  columns: dict[str, tuple[str, str]]           # what is shown: options, and the figure (a metric, or "loss")
  paper: dict[tuple[str, str], str]
  percent: bool = True
  seeds: int = 3
  def options(self, row:str, column:str) -> list[str]: return f"{self.columns[column][0]} {self.rows[row]}".split()

RECIPE = 2                                      # raised where other data or defaults make a finished run another one
UNVERIFIED = "the paper's figures come from notes on it, unverified"
# what stands behind [] for the paper's figures where they are of something else
LM, MLM = "bits per byte [125M: perplexity]", "masked bytes [GLUE's mean]"
GRIDS = {
  "table2": Grid(
    "H3 paper, Table 2: accuracy of the last symbol, %, after 200 epochs at most",
    f"{UNVERIFIED}; attention has rotary positions and first weights of 0.112, the others 0.02",
    {"S4D": "--model s4d", "H3": "--model h3", "attention": "--model transformer"},
    {"induction": ("--task induction --steps 31400 --warmup 1000 --eval-every 785", "accuracy"),
     "recall": ("--task recall --eval-every 785", "accuracy"),
     "recall at 40": ("--task recall --eval-every 785", "accuracy at 40")},
    {("S4D", "induction"): "35.6", ("S4D", "recall"): "86.0", ("H3", "induction"): "100", ("H3", "recall"): "99.8",
     ("H3", "recall at 40"): "98.4", ("attention", "induction"): "100", ("attention", "recall"): "100"}),
  "lm": Grid(
    "H3 paper, Table 3 in small: bits per byte of Python's library, held out", UNVERIFIED,
    # 0.99, 0.95 and 0.96 million parameters
    {"H3": "--model h3", "hybrid H3": "--model hybrid", "Transformer": "--model transformer --mlp-mult 5"},
    {LM: ("--task text --eval-every 60", "loss")},
    {("H3", LM): "21.0", ("hybrid H3", LM): "19.6", ("Transformer", LM): "20.6"}, percent=False),
  "bigs": Grid(
    "BiGS paper, the ablation in small: masked bytes of Python's library, and the verb's number, right, %", UNVERIFIED,
    {"BiGS": "--model bigs", "STACK/SSM": "--model stack", "gated attention": "--model gated-attention",
     "BERT": "--model bert"},
    {MLM: ("--task mlm --steps 600 --eval-every 60", "accuracy"),
     **{f"agreement, {n}": ("--task agreement --steps 500 --eval-every 50", f"{n} attractor{'s'*(n != 1)}")
        for n in range(5)}},
    {("BiGS", MLM): "83.3", ("BERT", MLM): "83.3", ("STACK/SSM", MLM): "77.2", ("gated attention", MLM): "81.8",
     **{("BiGS", f"agreement, {n}"): x for n, x in zip(range(1, 5), ("97.4", "97.4", "96.6", "96.5"))}}),
  "lra": Grid(
    "Long Range Arena, ListOps of 21 to 199 tokens: accuracy, %; 3,000 steps of S4D take a CPU as long as 1,300 of the "
    "Transformer", f"{UNVERIFIED}, for lists of 500 to 2,000 tokens",
    {"S4D": "--model s4d --steps 3000", "BiGS": "--model bigs --steps 1000",
     "Transformer": "--model transformer --steps 1300"},
    {"ListOps": ("--task listops --n-layer 4 --eval-every 250", "accuracy")},
    {("S4D", "ListOps"): "59.6 (S4)", ("Transformer", "ListOps"): "36.37"})}

def has_begun(folder:Path) -> bool: return any((folder/f).exists() for f in (CHECKPOINT, PREVIOUS))

def finished(folder:Path) -> dict[str, str]|None:
  "The metadata of a run's last checkpoint, if it is done."
  if not has_begun(folder): return None
  meta = read_newest(folder)[2]
  return meta if meta.get("done") == "true" else None

def start_run(folder:Path, options:list[str]) -> subprocess.Popen:
  "A run in a process of its own, on one core of a CPU, from where it stopped if it did."
  folder.mkdir(parents=True, exist_ok=True)
  again = ["--resume"] if has_begun(folder) else options
  command = [sys.executable, __file__, *again, "--sample", "0", "--out", str(folder)]
  with open(folder/"output.txt", "a") as f:
    # a session of its own: a Ctrl-C is for the grid, which passes it on once
    return subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, start_new_session=True,
                            env=os.environ | {"NUM_CPU_THREADS": "1"})

def run_all(runs:dict[Path, tuple[str, list[str]]], at_once:int) -> dict[Path, dict[str, str]]:
  "Trains what is not finished; the metadata of all. KeyboardInterrupt, once those that are going have saved."
  found = {f: finished(f) for f in runs}
  todo, going = [f for f in runs if not found[f]], {}
  with Interrupt(signal.default_int_handler):
    try:
      while todo or going:
        while todo and len(going) < at_once:
          f = todo.pop(0)
          going[f] = start_run(f, runs[f][1])
        for f in [f for f, p in going.items() if p.poll() is not None]:
          code, found[f] = going.pop(f).returncode, finished(f)
          if found[f] is None and code > 128: raise KeyboardInterrupt        # somebody has stopped it
          if found[f] is None: raise UserError(f"a run failed, see the end of {f/'output.txt'}")
          print(f"{runs[f][0]}: {int(found[f]['step']):,} steps in {duration(float(found[f]['seconds']))}", flush=True)
        time.sleep(0.2)
    finally:
      for p in going.values(): p.terminate()
      for p in going.values(): p.wait()
  return found

def show_table(head:list[str], rows:list[list[str]]) -> None:
  widths = [max(map(len, column)) for column in zip(head, *rows)]
  for first, *rest in (head, *rows):
    print(f"{first:<{widths[0]}}" + "".join(f"   {x:>{w}}" for x, w in zip(rest, widths[1:])))

def figure_of(row:list, metric:str) -> float: return row[1] if metric == "loss" else row[2][metric]

def reproduce(name:str, out:Path, seeds:int|None) -> int:
  """Trains a grid's models, on a CPU as many at once as it has cores, and prints the table beside the paper's figures;
  writes table.csv and curves.png. What has been trained is not trained again."""
  setup_device()
  grid, out = GRIDS[name], out / name
  seeds = seeds or grid.seeds
  at_once = Device["CPU"].renderer.global_max[0] if Device.DEFAULT == "CPU" else 1
  print(f"{grid.title}\n{grid.about}\n{len(grid.rows)} models, {seeds} seed{'s'*(seeds > 1)}, {at_once} at a time, "
        f"into {out}; stopped, it goes on with the same command", flush=True)
  check_writable(out)
  runs, places = {}, {}                                  # a run is of several columns, if they have the same options
  for seed, row, column in itertools.product(range(seeds), grid.rows, grid.columns):
    options = grid.options(row, column)
    slug = re.sub(r"[^a-z0-9]+", "-", " ".join(options).replace("--", "").lower())
    folder = out / f"{slug}-v{RECIPE}" / f"seed{seed}"
    runs.setdefault(folder, (f"{row}, {column}, seed {seed}", [*options, "--seed", str(seed)]))
    places.setdefault((row, column), []).append(folder)
  try: metas = run_all(runs, at_once)
  except KeyboardInterrupt:
    print("\nstopped; the same command goes on", file=sys.stderr)
    return 130
  evals = {f: read_evals(metas[f]) for f in runs}
  minutes = {f: float(metas[f]["seconds"]) / 60 for f in runs}
  scale, digits, table, lines = (100, 1, [], []) if grid.percent else (1, 3, [], [])
  for column, (_, metric) in grid.columns.items():
    table.append([column])
    for row in grid.rows:
      x = [scale * figure_of(evals[f][-1], metric) for f in places[row, column]]
      paper = grid.paper.get((row, column), "")
      table[-1].append(f"{np.mean(x):.{digits}f} ({min(x):.{digits}f}-{max(x):.{digits}f})" + f" [{paper}]"*bool(paper))
      lines += [[row, column, seed, evals[f][-1][0], round(v, 4), paper, round(minutes[f], 2)]
                for seed, (v, f) in enumerate(zip(x, places[row, column]))]
  of_row = {row: {f for column in grid.columns for f in places[row, column]} for row in grid.rows}
  table.append(["minutes a seed", *(f"{sum(minutes[f] for f in fs)/seeds:.1f}" for fs in of_row.values())])
  print()
  show_table(["", *grid.rows], table)
  print(f"the mean of {seeds} seed{'s'*(seeds > 1)} (least-most) [the paper's]"
        + "; a run has one core"*(Device.DEFAULT == "CPU"), flush=True)
  with open(out/"table.csv", "w", newline="") as f:
    csv.writer(f).writerows([["model", "task", "seed", "steps", "figure", "paper", "minutes"], *lines])
  found = {k: [evals[f] for f in folders] for k, folders in places.items()}
  try: plot_curves(grid, found, out/"curves.png")
  except ImportError: print(f"wrote {out/'table.csv'} (pip install matplotlib, and the curves are drawn too)")
  else: print(f"wrote {out/'table.csv'}, {out/'curves.png'}")
  if name == "lra": arena_speed(grid, out/f"speed-{Device.DEFAULT.lower()}.csv")
  return 0

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
        out = child(f"train.LISTOPS = 64, {batch}; train.main({args})", FLASH=flash)
      rates[row, L, flash] = int(re.findall(r"([\d,]+) tokens/s", out)[-1].replace(",", "")) / (batch*L)
    with open(path, "w", newline="") as f:
      csv.writer(f).writerows([["model", "length", "flash", "steps_per_second"],
                               *([*k, round(x, 4)] for k, x in rates.items())])
  print("\ntraining steps a second, on all cores (times the Transformer's)")
  show_table(["", *names], [[f"{batch} x {L:,} tokens" + ", FLASH=0"*(flash == "0"), *(
    f"{rates[n, L, flash]:.2f} ({rates[n, L, flash]/rates[names[-1], L, flash]:.1f}x)" for n in names)]
    for (L, flash), (batch, _) in ARENA.items()])
  print("the H3 paper, over a Transformer: S4 2.9x, with FlashConv 5.8x (unverified)")

def plot_curves(grid:Grid, found:dict, path:Path) -> None:
  "A panel for each column, a line for each seed."
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  rows, wide = -(-len(grid.columns)//3), min(3, len(grid.columns))
  fig, axes = plt.subplots(rows, wide, figsize=(4.2*wide, 3.6*rows), dpi=150, layout="constrained", squeeze=False)
  for ax, (column, (_, metric)) in zip(axes.flat, grid.columns.items()):
    for color, row in zip(("#4c78a8", "#e45756", "#54a24b", "#b279a2"), grid.rows):
      for i, evals in enumerate(found[row, column]):
        y = [figure_of(e, metric)*(100 if grid.percent else 1) for e in evals]
        ax.plot([e[0] for e in evals], y, color=color, lw=1.3, label=row if i == 0 else None)
    what = column.split(" [")[0]
    ax.set(title=what, xlabel="step", ylabel="%" if grid.percent else what)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
  for ax in [*axes.flat][len(grid.columns):]: ax.set_visible(False)
  axes[0][0].legend(frameon=False)
  fig.savefig(path)
  plt.close(fig)

def settle(argv:list[str]|None) -> tuple[argparse.Namespace, dict|None, dict|None]:
  "The options, completed by the checkpoint that --resume or --init names, and that checkpoint."
  args, now = parser().parse_args(argv), given(argv)
  setup_device()                                       # not before: --help and a wrong option need none
  check_kernels()
  tensors = meta = None
  if args.resume and args.init: raise UserError("--resume goes on with a run, --init starts one: give one of them")
  if args.resume or args.init:
    path = Path(args.out) / CHECKPOINT if args.resume else Path(args.init)
    if args.resume: path, tensors, meta = read_newest(path.parent)
    else: tensors, meta = read_weights(path := find(args.init))
    official = not meta and "bigs.embeddings.word_embeddings.weight" in tensors
    if not official and (meta.get("model") not in ("h3", "bigs") or not {"config", "args", "step"} <= meta.keys()):
      raise CheckpointError(f"{path} is not a checkpoint of train.py")
    try:
      if official: old = dict.fromkeys(SHAPE) | dict(head_dim=1, embed_dropout=0.0, resid_dropout=0.0, d_state=64,
                                                     model="bigs", size="small", tokenizer="bert")
      else:
        config = json.loads(meta["config"])
        # an option that is newer than the checkpoint has its default
        saved = json.loads(meta["args"])
        old = {a.dest: a.default for a in parser()._actions} | saved
        old |= {k: config[k] for k in SHAPE if k in config}
        if "task" not in saved: raise ValueError
      if args.resume:
        for read in (read_losses, read_evals): read(meta)
        int(meta["step"])
      keep = set(vars(args)) if args.resume else {*SHAPE, "model", "size", "tokenizer"}
      for k in keep:
        if k not in now: setattr(args, k, old[k])
        elif now[k] != old[k] and k in (FIXED if args.resume else (*SHAPE, "model", "size")):
          raise UserError(f"--{k.replace('_', '-')} {now[k]} differs from the checkpoint's"
                          f"{'' if old[k] is None else f' {old[k]}'}: leave it out, or start afresh")
    except (KeyError, TypeError, ValueError): raise CheckpointError(f"{path}: its metadata are damaged") from None
    args.resume, args.out, args.init = "resume" in now, now.get("out", OUT), args.init if args.resume else str(path)
  if args.plot and Path(args.plot).suffix not in (".png", ".svg", ".pdf"):
    raise UserError(f"--plot {args.plot}: it draws .png, .svg or .pdf: name such a file")
  for k, tasks in OF_TASKS.items():
    if k in now and args.task not in tasks:
      raise UserError(f"--{k.replace('_', '-')} is for --task {' or '.join(tasks)}, not for "
                      f"{args.task}")
  for k, v in (COMMON | DEFAULTS[args.task]).items():
    if getattr(args, k) is None: setattr(args, k, v)
  if "head_dim" in now and args.model in ("transformer", "s4d"):
    raise UserError(f"--head-dim is for --model h3 or hybrid, not for {args.model}")
  if args.lr is None: args.lr = FINE_TUNING["lr"] if args.task == "classify" and args.init else SIZES[args.size]["lr"]
  if args.steps: complete(args)
  return args, tensors, meta

def main(argv:list[str]|None=None) -> int:
  if hasattr(sys.stdout, "reconfigure"): sys.stdout.reconfigure(errors="replace")
  try:
    args = parser().parse_args(argv)
    if hasattr(args, "reproduce"):
      if more := given(argv).keys() - {"reproduce", "seeds", "out"}:
        raise UserError(f"--reproduce takes --seeds and --out alone, not --{sorted(more)[0].replace('_', '-')}")
      out = Path("reproduced" if args.out == OUT else args.out)
      return reproduce(args.reproduce, out, getattr(args, "seeds", None))
    if hasattr(args, "seeds"): raise UserError("--seeds is for --reproduce")
    if hasattr(args, "bench"): return bench()
    # a run that goes on keeps others out before its checkpoint is read, a new one where it makes its folder
    with alone(out) if args.resume and (out := Path(args.out)).is_dir() else contextlib.nullcontext():
      return train(*settle(argv))
  except (UserError, CheckpointError) as e: parser().error(str(e))
  except MemoryError: parser().error("not enough memory: take a smaller --batch, --length or model")
  except OSError as e:
    if e.filename is None: raise
    parser().error(f"{e.filename}: {e.strerror}")
  except KeyboardInterrupt:
    print("\nstopped at once: nothing was saved that was not before", file=sys.stderr)
    return 130

if __name__ == "__main__": sys.exit(main())
