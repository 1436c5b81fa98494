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
from __future__ import annotations
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
from flashconv import FLASH, capture, machine
from generate import (MASK, OUT, RUN, Parser, Session, number, peak_memory, show_fill, surprisal,
                      write)
from h3tiny import H3Config, H3LM
from support.cpu import check_kernels, embedding, setup_device
from support.checkpoints import (CHECKPOINT, CheckpointError, Weights, bigs_model, find, h3_model,
                                 read_weights, save_checkpoint)
from support.training import (EPS, BETA1, BETA2, CPU_SLICES, PREVIOUS, AdamW, Feed, Interrupt, LossScale, MASKED,
                              alone, check_writable, clean, group_of, hand_on, on, put, read_newest, restore, set_aside)
from support.text import (TEXT_KEY, TOKENIZERS, Tokenizer, UserError, is_jsonl, make_tokenizer,
                          read_tokens, read_tsv, split)

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
# what a task's registration may leave out
DEFAULTS = dict(size="small", embed_dropout=0.0)

@dataclasses.dataclass
class Registered:
  "A task as it is registered: one phrase about it, which models it takes, its defaults, its options, what makes it."
  make: Callable[[argparse.Namespace], Task]
  about: str
  causal: bool|None
  options: Callable|None
  defaults: dict[str, object]

TASKS: dict[str, Registered] = {}
# where the papers' own tasks are
PAPERS = dict(induction="synthetic", recall="synthetic", listops="arena", pixels="arena", classify="finetune",
              agreement="bigs")

def task(name:str, about:str, causal:bool|None, options:Callable|None=None, **defaults) -> Callable:
  """Registers a task: decorates the function of the options that makes it. about: one phrase for --help. causal: the
  models that it is for read left to right, or see both sides; None: either, as --model has it. options: adds options
  of its own, `options(add)`, where `add` takes name, type, default, help, how the default is shown, `fixed` (what
  --resume can't change), and argparse's own keywords. defaults: of any option where the command line says nothing."""
  def register(make:Callable[[argparse.Namespace], Task]) -> Callable:
    TASKS[name] = Registered(make, about, causal, options, defaults)
    return make
  return register

def layer_list(text:str) -> list[int]:
  if text.strip() in ("", "none"): return []
  try: return [int(i) for i in text.split(",")]
  except ValueError: raise argparse.ArgumentTypeError(f"{text!r} is not layer numbers with commas, or none") from None

def parser(program:str="train.py", default:str="text") -> Parser:
  p = Parser(prog=program, description="Train a model of the H3 or the BiGS family.", allow_abbrev=False,
             epilog="example: python train.py --data shakespeare.txt --steps 2000 --length 512 --out shakespeare")
  def add(group, name, kind, default, text, shown=None, **kw):
    group.add_argument(name, type=kind, default=default, help=f"{text} (default: {shown or default})", **kw)
  positive, fraction = number(int, 1), number(float, 0, 0.99)

  p.owners, p.fixed = {}, {"task", "model", "size", "seed", *SHAPE}
  g = p.add_argument_group("what to train on")
  add(g, "--task", str, default, "; ".join(f"{k}: {t.about}" for k, t in TASKS.items()))
  def of_task(name:str, flag:str, kind:Callable, default:object, text:str, shown:str|None=None, fixed:bool=False, **kw):
    key = flag[2:].replace("-", "_")
    if key in p.owners: p._option_string_actions[flag].help += f"; {name}: {text}"*(text not in p._option_string_actions[flag].help)
    else: add(g, flag, kind, default, text, shown, **kw)
    p.owners.setdefault(key, []).append(name)
    if fixed: p.fixed.add(key)
  for name, t in TASKS.items():
    if t.options: t.options(functools.partial(of_task, name))

  g = p.add_argument_group("model")
  add(g, "--model", str, None, "reads on: only H3 layers, most of them, or none, or an SSM that nothing gates; sees "
      "both sides: BiGS, SSMs stacked, attention gated, BERT; transformer and s4d do either, as the task asks",
      by_task("model"),
      choices=[*KINDS, *BOTH_WAYS])
  add(g, "--size", str, None, "sets the next three and --lr", by_task("size"), choices=list(SIZES))
  add(g, "--d-model", positive, None, "width", "by --size", metavar="N")
  add(g, "--n-layer", positive, None, "layers", "by --size", metavar="N")
  add(g, "--n-heads", positive, None, "attention heads", "by --size", metavar="N")
  add(g, "--attn-layers", layer_list, None, "layers that are attention, from 0", "by --model", metavar="I,J")
  add(g, "--rotary-dim", number(int, 0), None, "rotated dimensions of an attention head; 0: no positions",
      "all in a transformer, else 0", metavar="N")
  add(g, "--max-positions", number(int, 0), 0, "learned positions: so many tokens, and no more, can be read; 0: none",
      metavar="N")
  add(g, "--init-std", number(float, above=0), None, "standard deviation of the first weights",
      "0.02", metavar="X")
  add(g, "--d-state", positive, 64, "state size of the SSMs", metavar="N")
  add(g, "--head-dim", positive, 1, "size of an H3 head", metavar="N")
  add(g, "--mlp-mult", positive, None, "width of the MLP, or the gate, over --d-model", "4; gated 3, stack 5",
      metavar="N")
  add(g, "--embed-dropout", fraction, None, "dropout after the embedding", by_task("embed_dropout"), metavar="X")
  add(g, "--resid-dropout", fraction, 0.0, "dropout in the blocks", metavar="X")

  g = p.add_argument_group("training")
  add(g, "--steps", positive, None, "steps in all", by_task("steps"), metavar="N")
  add(g, "--batch", positive, None, "sequences a step", by_task("batch"), metavar="N")
  add(g, "--length", positive, None, "tokens a sequence; of any length with --model h3", by_task("length"), metavar="N")
  add(g, "--truncate", positive, None, "take a sequence in pieces of N tokens, in the memory that one needs: the state "
      "goes on from each to the next, the gradient does not come back, so what a piece should have left in the state "
      "for a later one is not learned; with --model h3, and --length a multiple of N", "whole", metavar="N")
  add(g, "--lr", number(float, above=0), None, "highest learning rate", "by --size", metavar="X")
  add(g, "--warmup", number(int, 0), None, "steps up to it; a cosine then falls to a tenth, or a line to 0",
      "a tenth of --steps, at most 1000", metavar="N")
  add(g, "--weight-decay", number(float, 0), None, "of matrices and of the SSMs' C and D; in models that see "
      "both sides of embeddings and all of an SSM, too", by_task("weight_decay"), metavar="X")
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
  # where they are now
  for flag in ("--reproduce", "--seeds", "--bench"):
    g.add_argument(flag, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
  return p

def by_task(option:str) -> str:
  "The defaults of an option, as --help shows them."
  shown = {k: (DEFAULTS | t.defaults).get(option) for k, t in TASKS.items()}
  return ", ".join(f"{v} for {k}" for k, v in shown.items() if v is not None)

SHAPE = ("d_model", "n_layer", "n_heads", "attn_layers", "rotary_dim", "max_positions", "d_state", "head_dim",
         "mlp_mult", "init_std", "embed_dropout", "resid_dropout")
PRECISIONS = ("float32", "float16", "bfloat16")

def given(argv:list[str]|None, program:str="train.py", default:str="text") -> dict:
  "Only the options that the command line names."
  p = parser(program, default)
  for action in p._actions: action.default = argparse.SUPPRESS
  return vars(p.parse_args(argv))

def block_of(args:argparse.Namespace) -> str|None:
  "Of a model that sees both sides, its block; None for one that reads on."
  if TASKS[args.task].causal is False and args.model in ("transformer", "s4d"):
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
  try:
    return H3Config(vocab_size, d_model, n_layer, tuple(attn), n_heads, rotary, args.d_state, args.head_dim,
                    args.mlp_mult or 4, ssm="s4d" if args.model == "s4d" else "h3",
                    embed_dropout=args.embed_dropout, resid_dropout=args.resid_dropout, init_std=args.init_std or 0.02,
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
  schedule: str = "cosine"                      # after the warm-up, down to a tenth; or "linear", to 0
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

def text_options(add:Callable) -> None:
  add("--data", str, None, "files or folders of text: UTF-8, or UTF-16 with its mark; .gz; "
      ".jsonl with a text in each line", "Python's own source", nargs="+", metavar="PATH")
  add("--text-key", str, TEXT_KEY, "key of the text in each line of a .jsonl", metavar="KEY")
  add("--vocab", str, None, "BERT's vocab.txt", "that beside --init's file", metavar="FILE")
  add("--tokenizer", str, "bytes", "how text becomes tokens", choices=list(TOKENIZERS), fixed=True)
  add("--holdout", number(float, 0.001, 0.5), 0.05, "share of the text, its end, kept for evaluation", metavar="X",
      fixed=True)

@task("text", "the next token of text", causal=True, options=text_options, model="hybrid", batch=8, length=256,
      weight_decay=0.1, steps=600)
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

def mlm_options(add:Callable) -> None:
  text_options(add)
  add("--mask-run", number(int, 1), None, "tokens masked in one place, from 1 to N", "8 bytes, 1 of other tokens",
      metavar="N")

@task("mlm", "masked tokens of text", causal=False, options=mlm_options, model="bigs", batch=16, length=128,
      weight_decay=0.05, steps=4000)
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

# ---- optimiser

def learning_rate(step:int, steps:int, peak:float, warmup:int, line:bool=False) -> float:
  "Linear up to the peak over `warmup` steps, then a cosine down to a tenth of it, or a line to 0. Steps count from 0."
  if step < warmup: return peak * (step+1) / warmup
  if line: return peak * (steps-step) / (steps-warmup)
  return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step-warmup) / max(1, steps-warmup))))

# ---- checkpoints ----------------------------------------------------------------------------------

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

def read_losses(meta:dict[str, str]) -> list[list[float]]:
  "The losses in a checkpoint's metadata, as in `Log.rows`: the columns that this version knows."
  return [[*row, *[math.nan]*len(LOSSES)][:len(LOSSES)] for row in json.loads(meta["losses"])]

def read_evals(meta:dict[str, str]) -> list[list]:
  "The evaluations in a checkpoint's metadata, as in `Log.evals`; old ones have no metrics."
  return [[step, loss, *metrics, {}][:3] for step, loss, *metrics in json.loads(meta["held_out"])]

# ---- what is shown --------------------------------------------------------------------------------

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
  if args.lr is None: args.lr = SIZES[args.size]["lr"]
  if args.warmup is None: args.warmup = min(1000, args.steps//10)
  if args.eval_every is None: args.eval_every = -(-args.steps//8)
  if args.save_every is None: args.save_every = args.eval_every
  if args.log_every is None: args.log_every = max(1, args.steps//20)

def train(program:str, args:argparse.Namespace, tensors:Weights|None=None, meta:dict[str, str]|None=None) -> int:
  "One run. tensors, meta: the checkpoint that --resume or --init names."
  out, path = Path(args.out), Path(args.out) / CHECKPOINT
  Tensor.manual_seed(args.seed)                        # dropout's; weights and batches are numpy's
  if args.embed_dropout or args.resid_dropout: Tensor.rand(1).realize()    # makes the counter that is saved
  causal = TASKS[args.task].causal
  if causal is not None and (block_of(args) is None) != causal:
    raise UserError(f"--task {args.task} is not for --model {args.model}: give "
                    + " or ".join(KINDS if causal else (*BOTH_WAYS, "transformer", "s4d")))
  task = TASKS[args.task].make(args)
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
      lr = learning_rate(step, args.steps, args.lr, args.warmup, task.schedule == "linear")
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
        if saved is not None: log.line(f"go on with: python {program} --resume --out {out}")
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

# ---- the command line

def settle(argv:list[str]|None, program:str="train.py", default:str="text"
           ) -> tuple[argparse.Namespace, dict|None, dict|None]:
  "The options, completed by the checkpoint that --resume or --init names, and that checkpoint."
  p = parser(program, default)
  args, now = p.parse_args(argv), given(argv, program, default)
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
        old = {a.dest: a.default for a in p._actions} | saved
        old |= {k: config[k] for k in SHAPE if k in config}
        if "task" not in saved: raise ValueError
      if args.resume:
        for read in (read_losses, read_evals): read(meta)
        int(meta["step"])
      if args.resume and "task" not in now: check_task(old["task"])
      keep = set(vars(args)) if args.resume else {*SHAPE, "model", "size", "tokenizer"}
      for k in keep:
        if k not in now: setattr(args, k, old[k])
        elif now[k] != old[k] and k in (p.fixed if args.resume else (*SHAPE, "model", "size")):
          raise UserError(f"--{k.replace('_', '-')} {now[k]} differs from the checkpoint's"
                          f"{'' if old[k] is None else f' {old[k]}'}: leave it out, or start afresh")
    except (KeyError, TypeError, ValueError): raise CheckpointError(f"{path}: its metadata are damaged") from None
    args.resume, args.out, args.init = "resume" in now, now.get("out", OUT), args.init if args.resume else str(path)
  if args.plot and Path(args.plot).suffix not in (".png", ".svg", ".pdf"):
    raise UserError(f"--plot {args.plot}: it draws .png, .svg or .pdf: name such a file")
  for k, tasks in p.owners.items():
    if k in now and args.task not in tasks:
      raise UserError(f"--{k.replace('_', '-')} is for --task {' or '.join(tasks)}, not for "
                      f"{args.task}")
  for k, v in (DEFAULTS | TASKS[args.task].defaults).items():
    if getattr(args, k, None) is None: setattr(args, k, v)
  if "head_dim" in now and args.model in ("transformer", "s4d"):
    raise UserError(f"--head-dim is for --model h3 or hybrid, not for {args.model}")
  return args, tensors, meta

def check_task(name:str) -> None:
  "UserError where a task is not one of this program's."
  if name in TASKS: return
  elsewhere = f": python papers/{PAPERS[name]}.py --task {name} trains it" if name in PAPERS else ""
  raise UserError(f"--task {name} is none of {', '.join(TASKS)}{elsewhere}")

def main(argv:list[str]|None=None, program:str="train.py", default:str="text") -> int:
  "Trains a model. program: the file whose tasks these are, and default: that where the command line names none."
  if hasattr(sys.stdout, "reconfigure"): sys.stdout.reconfigure(errors="replace")
  p = parser(program, default)
  try:
    args = p.parse_args(argv)
    check_task(args.task)
    for flag, now in dict(reproduce="python papers/NAME.py --reproduce", seeds="python papers/NAME.py --reproduce",
                          bench="python support/bench.py train").items():
      if hasattr(args, flag): raise UserError(f"--{flag} is another program's now: {now}")
    # a run that goes on keeps others out before its checkpoint is read, a new one where it makes its folder
    with alone(out) if args.resume and (out := Path(args.out)).is_dir() else contextlib.nullcontext():
      return train(program, *settle(argv, program, default))
  except (UserError, CheckpointError) as e: p.error(str(e))
  except MemoryError: p.error("not enough memory: take a smaller --batch, --length or model")
  except OSError as e:
    if e.filename is None: raise
    p.error(f"{e.filename}: {e.strerror}")
  except KeyboardInterrupt:
    print("\nstopped at once: nothing was saved that was not before", file=sys.stderr)
    return 130

if __name__ == "__main__": sys.exit(main())
