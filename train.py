"""Trains H3, hybrid and Transformer language models, and BiGS, BERT and what lies between them.

  python train.py                          a small hybrid on Python's own source, in minutes
  python train.py --data book.txt notes/ --steps 3000 --out book
  python train.py --resume --out book      goes on where a run stopped, as if it never had
  python train.py --init book --length 512 --out longer        goes on with its weights and its data
  python train.py --size medium --estimate what that takes in memory and time, before it starts
  python train.py --task mlm --out masked  BiGS: fill in what is masked, see generate.py --fill
  python train.py --help                   every option; with --task, that task's defaults

From top to bottom: tasks, text, masked text, the options, the model, the plain step of training,
the log, the run. What wraps the plain step (parts, devices, half precision, ...) and what keeps a
run's folder whole is in support/training.py; the models are in h3tiny.py and bigs_tiny.py, sampling
in generate.py. The papers' own tasks are in papers/, whose programs take this one's options.

A run leaves in --out: checkpoint.safetensors (weights under the official names, the optimizer's
moments, all settings), log.csv and, with matplotlib, loss.png.

Not here: several machines.
"""
from __future__ import annotations
import time
START = time.perf_counter()
import argparse, collections, contextlib, csv, dataclasses, functools, json, math, os, re, shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Callable, Iterator, NamedTuple
import numpy as np
from tinygrad import Device, Tensor
from tinygrad.helpers import Context
from tinygrad.nn.state import get_state_dict
from bigs_tiny import BiGS, BiGSConfig
from flashconv import FLASH, capture, fill, surprisal
from support.cpu import setup_device
from generate import MASK, MASK_RUN, OUT, USES, print_fill, print_text, use_of
from h3tiny import H3Config, H3LM
from support.checkpoints import (CHECKPOINT, CheckpointError, bigs_model, find, h3_model,
                                 read_weights)
from support.text import (TEXT_KEY, TOKENIZERS, Interrupt, Parser, Tokenizer, UserError, command,
                          counted, is_jsonl, make_tokenizer, near, number, paper_of, peak_memory,
                          read_tokens, shown, split, waiting)
from support.training import (BETA2, MASKED, PRECISIONS, PREVIOUS, AdamW, Batch, CarriedState, Feed,
                              Gradients, LossScale, Model, Saved, Step, accumulated,
                              check_memory, check_precision, check_writable, duration, estimate,
                              gradient_checkpointing, half_precision, has_dropout,
                              lock_run_directory, on_devices, open_devices, pieces, read_newest,
                              restore, save_beside_previous, set_aside, tensor_on, training_state,
                              truncated, truncated_eval, weigh, weighted)

# ---- tasks --------------------------------------------------------------------------------------

def cross_entropy(logits:Tensor, targets:Tensor) -> Tensor:
  "Mean loss in nats over the targets that are not negative: logits (B,L,V), targets (B,L)."
  counted = (targets >= 0).float()
  return (surprisal(logits, targets) * counted).sum() / counted.sum()

@dataclasses.dataclass
class Task:
  "A task, as the loop sees it."
  about: str                                    # a line for the user: the data, how much of it
  tokenizer: Tokenizer|None
  vocab_size: int
  batch: Callable[[int], Batch]                 # step -> batch; depends on step and seed alone
  held_out: list[Batch]                         # to evaluate on, always the same
  baseline: float                               # what the loss has to beat on `held_out`, in `unit`
  baseline_name: str
  per_nat: float = 1 / math.log(2)              # training loss in `unit` = per_nat * loss in nats
  held_out_per_nat: float = 1 / math.log(2)     # the same for the loss on `held_out`
  unit: str = "bits per byte"
  # (model, *batch) -> the mean loss in nats, and whatever else `metrics` wants of a held-out batch
  forward: Callable[..., tuple[Tensor, ...]] = lambda model, x, y: (cross_entropy(model(x), y),)
  # what `forward` returned for each held-out batch -> metrics by name
  metrics: Callable[[list[Batch]], dict[str, float]] = lambda outputs: {}
  head: str|None = None                         # the head that a BiGS model needs
  labels: list[str]|None = None                 # the labels of its classifier
  schedule: str = "cosine"                      # see `learning_rate`
  sample: Callable|None = None                  # (model) prints what the model does
  # (metric, value): the run ends once the metric is at least that in three evaluations in a row
  stop_at: tuple[str, float]|None = None
  # weights that training leaves alone, by the end of their names in a checkpoint, and the number
  # they all are
  fixed: dict[str, float] = dataclasses.field(default_factory=dict)
  # how many targets a batch has: its mean loss is the mean over these; 0: for `metrics` alone
  count: Callable[[Batch], int] = lambda batch: int((batch[-1] >= 0).sum())

@dataclasses.dataclass
class Registered:
  "A task as `task` registers it."
  make: Callable[[Namespace], Task]
  about: str
  causal: bool|None
  options: Callable|None
  defaults: dict[str, object]

TASKS: dict[str, Registered] = {}

def task(name:str, about:str, causal:bool|None, options:Callable|None=None, **defaults) -> Callable:
  """Registers a task; decorates the function that makes it from the options, `args -> Task`.

  about: one phrase for --help. causal: whether its models are causal (True), bidirectional (False)
  or, as --model says, either (None). defaults: of any option, over the parser's. options: adds
  options of its own with the function it is given, see `option_adder`; with fixed=True --resume
  can't change them.

  The function may set args' steps, warmup, lr, init_std and length, where they are None still.

  A task in a file of its own, which begins and ends like papers/language.py:

    @task("copying", "a row once more, after a gap", causal=True, model="h3", batch=32, length=10,
          weight_decay=0.1, steps=120)
    def copying_task(args:Namespace) -> Task:
      def batch(step:int) -> Batch:
        rng = np.random.default_rng([args.seed, step])
        row = rng.integers(1, 9, (args.batch, args.length), np.int32)
        rows = np.concatenate([row, 0*row[:, :3], row], 1)
        targets = rows[:, 1:].copy()
        targets[:, :args.length+2] = -1                   # below 0: nothing to predict
        return rows[:, :-1], targets
      held_out = [batch(10**9)]
      return Task("rows of 8 symbols", None, 9, batch, held_out, 3.0, "symbols at random",
                  unit="bits per symbol")
  """
  def register(make):
    TASKS[name] = Registered(make, about, causal, options, defaults)
    return make
  return register

def always(noun:str, right:float) -> str:
  "A phrase for a baseline that always answers the same, and the share that it gets right."
  return f"always the most frequent {noun}: right {100*right:.1f} %"

# ---- text ---------------------------------------------------------------------------------------

SAMPLED = 1 << 26                    # at most so many training tokens go into statistics

def text_options(add:Callable) -> None:
  add("--data PATH", str, None, "files or folders of text: UTF-8, or UTF-16 with its mark; .gz; "
      ".jsonl with a text in each line (default: Python's own source)", nargs="+")
  add("--text-key KEY", str, TEXT_KEY, "key of the text in each line of a .jsonl")
  add("--tokenizer", str, "bytes", "how text becomes tokens", choices=TOKENIZERS)
  add("--vocab FILE", str, None, "vocab.txt of the tokenizer bert (default: that beside --init's "
      "file)")
  add("--holdout X", number(float, 0.001, 0.5), 0.05,
      "share of the data kept for evaluation; of text, its end", fixed=True)

def tokenizer(args:Namespace) -> Tokenizer:
  "Makes the tokenizer. BERT's needs the file --vocab, or one beside --init's or a resumed run's."
  def beside(path): return (Path(path).parent if Path(path).is_file() else Path(path)) / "vocab.txt"
  places = [Path(args.vocab) if args.vocab else beside(args.init or args.out)]
  if args.resume: places.insert(0, beside(args.out))
  return make_tokenizer(args.tokenizer, next((p for p in places if p.is_file()), places[-1]))

class Windows:
  "Text as tokens, a part to train on and a part held out, in windows of `size` tokens."
  def __init__(self, args:Namespace, size:int):
    self.size, self.batch = size, args.batch
    self.tok = tokenizer(args)
    tokens, ends = read_tokens(args.data, self.tok, args.text_key,
                               [*log_files(args), Path(args.out)/"vocab.txt"])
    border = split(ends, args.holdout)
    self.train, self.held = tokens[:border], tokens[border:]
    parts = f"{len(self.train):,} tokens to train on, {len(self.held):,} held out"
    if min(len(self.train), len(self.held)) < size:
      cures = ["more text", *self.enough(ends, args)]
      raise UserError(f"the text is too short: {parts}, and a window takes {size:,}: give "
                      f"{' or '.join(cures)}")
    name = ", ".join(args.data) if args.data else "Python's standard library"
    kind = "text" if any(is_jsonl(Path(p)) for p in args.data or ()) else "file"
    self.about = f"{name}: {counted(len(ends), kind)}, {parts} at its end ({args.tokenizer})"

  def enough(self, ends:np.ndarray, args:Namespace) -> Iterator[str]:
    "Yields the options with which a window would fit into both parts."
    for percent in range(1, 51):
      border = split(ends, percent/100)
      if min(border, ends[-1] - border) >= self.size:
        yield f"--holdout {percent/100:g}"
        break
    # a window has a token more than --length, or the two less that masked text begins and ends with
    length = min(len(self.train), len(self.held)) - self.size + args.length
    if length >= 16: yield f"a --length of at most {length:,}"

  def windows(self, tokens:np.ndarray, starts:np.ndarray) -> np.ndarray:
    return tokens[starts[:, None] + np.arange(self.size)].astype(np.int32)

  def evenly(self) -> np.ndarray:
    "Returns windows (n,B,size) evenly over the held-out part, 128 at most, in batches."
    n = min(128, (len(self.held)-1) // (self.size-1))
    B = min(self.batch, n)
    starts = np.linspace(0, len(self.held)-self.size, n - n % B).astype(int)
    return self.windows(self.held, starts).reshape(-1, B, self.size)

  def draw(self, rng:np.random.Generator) -> np.ndarray:
    "Draws a batch of training windows, (B,size)."
    starts = rng.integers(0, len(self.train)-self.size+1, self.batch)
    return self.windows(self.train, starts)

def chunks(tokens:np.ndarray) -> list[np.ndarray]:
  "Returns the first tokens in parts: of a mapped file only one of them is in memory."
  some = tokens[:SAMPLED]
  return np.array_split(some, math.ceil(len(some) / (1 << 20)))

def bigram_bits(train:np.ndarray, x:np.ndarray, y:np.ndarray) -> float:
  """Returns the bits that code every y after its x, from the counts of pairs in `train` plus one.
  Tokens are bytes; 256 is <|endoftext|>."""
  counts = np.ones(257*257, np.int64)
  for some in chunks(train):
    counts += np.bincount(some[:-1].astype(np.int64)*257 + some[1:], minlength=257*257)
  counts = counts.reshape(257, 257)
  return float(-np.log2(counts / counts.sum(1, keepdims=True))[x, y].sum())

@task("text", "the next token of text", causal=True, options=text_options,
      model="hybrid", batch=8, length=256, weight_decay=0.1, steps=600)
def text_task(args:Namespace) -> Task:
  "The next token of text, measured in bits per byte whatever the tokens are."
  text = Windows(args, args.length + 1)
  tok, held = text.tok, text.evenly()
  def shifted(windows): return windows[..., :-1], windows[..., 1:]
  x, y = (part.ravel() for part in shifted(held))
  sampled = b"".join(tok.decode(c) for c in chunks(text.train))
  held_out_bytes = len(tok.decode(y))
  per_nat = min(len(text.train), SAMPLED) / len(sampled) / math.log(2)
  held_out_per_nat = len(y) / held_out_bytes / math.log(2)

  # the baseline counts pairs of bytes: with another tokenizer, in the decoded text
  if tok.name == "bytes": bigram = bigram_bits(text.train, x, y) / held_out_bytes
  else:
    rows = [np.frombuffer(tok.decode(w), np.uint8) for w in held.reshape(-1, text.size)]
    x, y = (np.concatenate(part) for part in zip(*map(shifted, rows)))
    bigram = bigram_bits(np.frombuffer(sampled, np.uint8), x, y) / len(y)

  def batch(step): return shifted(text.draw(np.random.default_rng([args.seed, step])))
  def sample(model):
    prompt = "def " if not args.data and tok.name == "bytes" else ""
    print_text(model, tok, [prompt], args.sample, temperature=0.7, seed=args.seed,
               max_length=args.sample+8)
  return Task(text.about, tok, tok.vocab_size, batch, [*map(shifted, held)], bigram,
              "a byte-bigram model", per_nat, held_out_per_nat, sample=sample)

# ---- masked text --------------------------------------------------------------------------------

SHARE = 0.15      # share of the tokens that are masked, as in BERT
SHORT = 0.1       # share of the rows that are cut short and padded, as in BERT

def mlm_options(add:Callable) -> None:
  text_options(add)
  add("--mask-run N", number(int, 1), None, "tokens masked next to each other, from 1 to N "
      "(default: 8 bytes, 1 of other tokens)")

def mask_out(rng:np.random.Generator, rows:np.ndarray, lengths:np.ndarray, run:int, mask:int,
             vocab_size:int) -> Batch:
  """Masks tokens of rows (B,L), [CLS] text [SEP] [PAD]…, with texts of `lengths` tokens.

  Returns inputs (B,L), the positions (B,n) to predict, and the targets (B,n), -1 where a short row
  has fewer. Of these positions 80 % become [MASK], 10 % any token of the vocabulary, and 10 % stay
  (Devlin et al. 2018). Masked tokens come in runs of 1 to `run` tokens, of one length in a row."""
  B, L = rows.shape
  n = max(1, round(SHARE * (L-2)))
  # a row is cut into groups of `size` tokens, a random number each; the lowest are masked first
  size = rng.integers(1, run+1, (B, 1))
  group = (np.arange(L) + rng.integers(0, size)) // size
  order = np.take_along_axis(rng.random((B, L)), group, 1)
  order += np.arange(L)*1e-9                            # keeps a group together
  outside = (np.arange(L) < 1) | (np.arange(L) > lengths[:, None])
  order[outside] = np.inf
  at = np.argsort(order, 1)[:, :n]
  old = np.take_along_axis(rows, at, 1)
  chosen = np.arange(n) < np.maximum(1, np.round(SHARE*lengths))[:, None]
  targets = np.where(chosen, old, -1)
  how = rng.random((B, n))
  drawn = rng.integers(0, vocab_size, (B, n))
  new = np.where(how < 0.8, mask, np.where(how < 0.9, drawn, targets))
  inputs = rows.copy()
  np.put_along_axis(inputs, at, np.where(chosen, new, old), 1)
  return tuple(x.astype(np.int32) for x in (inputs, at, targets))

@task("mlm", "masked tokens of text", causal=False, options=mlm_options,
      model="bigs", batch=16, length=128, weight_decay=0.05, steps=4000)
def mlm_task(args:Namespace) -> Task:
  "Masked tokens of [CLS] text [SEP]. Some rows are cut short, so that the model has seen [PAD]."
  if args.length < 4: raise UserError("--task mlm wants a --length of at least 4")
  text = Windows(args, args.length - 2)
  tok = text.tok
  run = args.mask_run = args.mask_run or (MASK_RUN if args.tokenizer == "bytes" else 1)
  if run > args.length - 2:
    raise UserError(f"--mask-run {run} is longer than a text of --length {args.length}")
  def masked(windows, rng):
    B, L = windows.shape
    lengths = np.where(rng.random(B) < SHORT, rng.integers(1, L+1, B), L)
    rows = np.pad(windows, ((0, 0), (1, 1)), constant_values=tok.cls)
    position, end = np.arange(L+2), lengths[:, None] + 1
    rows[position == end] = tok.sep
    rows[position > end] = tok.pad
    return mask_out(rng, rows, lengths, run, tok.mask, tok.vocab_size)
  def batch(step):
    rng = np.random.default_rng([args.seed, 0, step])
    return masked(text.draw(rng), rng)
  held = [masked(w, np.random.default_rng([args.seed, 1, i])) for i, w in enumerate(text.evenly())]

  # the baseline knows how often each token occurs
  counts = 1 + sum(np.bincount(c, minlength=tok.vocab_size) for c in chunks(text.train))
  targets = np.concatenate([t[t >= 0] for _, _, t in held])
  bits = float(-np.log2(counts/counts.sum())[targets].mean())
  right = float((targets == counts.argmax()).mean())

  def forward(model, tokens, at, targets):
    logits = model.mlm(tokens, at=at)
    hits = (logits.argmax(-1) == targets).sum()
    return cross_entropy(logits, targets), hits, (targets >= 0).sum()
  def metrics(outputs):
    _, hits, total = np.sum([[float(x) for x in o] for o in outputs], axis=0)
    return {"accuracy": hits / total}
  def sample(model):
    if args.data:
      # the first word in the middle of the text that is held out
      n = min(24, (args.length - run)//2 - 1)
      own = tok.decode(text.held[:2*n]).decode("utf-8", "replace")
      word = re.compile(rf"\w{{1,{run if tok.name == 'bytes' else 20}}}").search(own, len(own)//2)
      begin, end = word.span() if word else (n, n + 1)
      before, old, after = own[:begin], own[begin:end], own[end:]
    else: before, old, after = "    def __init__(", "self", ", name):"
    print(f"{before}{MASK}{after}\n--- the model has, and what else it would have")
    print_fill(model, tok, before + MASK + after, run)
    print(f"--- there was: {old!r}")
  return Task(text.about, tok, tok.masked_size, batch, held, bits,
              f"tokens by their frequency ({always('token', right)})",
              unit="bits per masked byte" if tok.name == "bytes" else "bits per masked token",
              forward=forward, metrics=metrics, head="mlm",
              sample=sample if args.length >= 32 + run else None)

# ---- options ------------------------------------------------------------------------------------

class Size(NamedTuple):
  d_model: int
  n_layer: int
  n_heads: int
  lr: float

SIZES = {"table2": Size(32, 2, 1, 5e-4), "tiny": Size(64, 2, 2, 3e-3),
         "small": Size(128, 4, 2, 3e-3), "medium": Size(384, 8, 6, 1e-3),
         # the H3 paper's
         "125M": Size(768, 12, 12, 6e-4), "355M": Size(1024, 24, 16, 3e-4),
         "1.3B": Size(2048, 24, 16, 2e-4), "2.7B": Size(2560, 32, 20, 1.6e-4)}
CAUSAL = {"h3": "H3 in all layers",
          "hybrid": "H3, and attention in one or two layers",
          "transformer": "attention in all layers",
          "s4d": "S4D, an ungated SSM, in all layers"}
BIDIRECTIONAL = {"bigs": "BiGS, gated SSMs in both directions",
                 "stack": "ungated SSMs in both directions",
                 "stack-serial": "ungated SSMs, the backward one after the forward one",
                 "gated-attention": "BiGS with attention in place of its SSMs",
                 "bert": "attention in all layers"}
# options that make a model's shape, and those that are taken from a checkpoint and can't be changed
SHAPE = ("d_model", "n_layer", "n_heads", "attn_layers", "rotary_dim", "max_positions", "d_state",
         "head_dim", "mlp_mult", "init_std", "embed_dropout", "resid_dropout", "attn_dropout")
INHERITED = ("model", "size", "tokenizer", *SHAPE)      # with --init
PICTURES = (".png", ".svg", ".pdf")
PATHS = ("data", "dev", "vocab", "init", "log", "plot", "out")      # absolute in a checkpoint
FIXED = ("task", "seed", *INHERITED)                    # with --resume
# options that are other programs'
MOVED = {"--reproduce": "papers/NAME.py --reproduce", "--seeds": "papers/NAME.py --reproduce",
         "--bench": "support/bench.py train"}

def key_of(flag:str) -> str: return flag.split()[0].removeprefix("--").replace("-", "_")
def flag_of(key:str) -> str: return "--" + key.replace("_", "-")

def option_adder(p:Parser, title:str) -> Callable:
  """Returns `add(flag, type, default, help, **argparse's keywords)` for a group of options. A flag
  is "--name METAVAR"; the type bool makes a switch."""
  group = p.add_argument_group(title)
  def add(flag, kind, default, text, **kw):
    name, _, metavar = flag.partition(" ")
    if kind is bool: group.add_argument(name, action="store_true", help=text)
    else:
      group.add_argument(name, type=kind, default=default, help=text, metavar=metavar or None, **kw)
  return add

def layer_list(text:str) -> list[int]:
  if text.strip() in ("", "none"): return []
  try: return [int(i) for i in text.split(",")]
  except ValueError:
    error = argparse.ArgumentTypeError(f"{text!r} is not layer numbers with commas, or none")
    raise error from None

def parser(program:str, task:str) -> Parser:
  """Returns the parser of a program's options, with the defaults of a task.

  Its `owners` are the tasks that have an option of their own, by the option's name, and `fixed` the
  options that --resume can't change."""
  check_task(task)
  p = Parser(prog=program, description="Train a model of the H3 or the BiGS family. Defaults are "
             f"those of --task {task}; with another --task, --help shows its.",
             epilog="example: python train.py --data book.txt --steps 2000 --length 512 --out book")
  positive, whole, fraction = number(int, 1), number(int, 0), number(float, 0, 0.99)
  above_0 = number(float, above=0)
  def lines(phrases): return "".join(f"{name}: {phrase}\n" for name, phrase in phrases.items())

  add = option_adder(p, "what to train on")
  add("--task NAME", str, task, lines({name: t.about for name, t in TASKS.items()}))
  add_task_options(p, add, task)

  add = option_adder(p, "model")
  add("--model NAME", str, None,
      f"causal; transformer and s4d also bidirectional, as the task wants:\n{lines(CAUSAL)}"
      f"bidirectional:\n{lines(BIDIRECTIONAL)}", choices=[*CAUSAL, *BIDIRECTIONAL])
  def size(s): return f"width {s.d_model}, layers {s.n_layer}, heads {s.n_heads}, rate {s.lr:g}"
  sizes = lines({name: size(s) for name, s in SIZES.items()})
  add("--size NAME", str, "small", f"sets --d-model, --n-layer, --n-heads and --lr:\n{sizes}",
      choices=SIZES)
  add("--d-model N", positive, None, "width (default: by --size)")
  add("--n-layer N", positive, None, "layers (default: by --size)")
  add("--n-heads N", positive, None, "attention heads (default: by --size)")
  add("--attn-layers I,J", layer_list, None, "layers that are attention, from 0, or none (default: "
      "of a hybrid the middle one, of 8 layers or more two)")
  add("--rotary-dim N", whole, None, "rotated dimensions of an attention head; 0: no positions "
      "(default: all in a transformer, else 0)")
  add("--max-positions N", whole, 0, "learned positions, the longest text then; 0: none")
  add("--init-std X", above_0, None, "standard deviation of the initial weights (default: 0.02)")
  add("--d-state N", positive, 64, "state size of the SSMs")
  add("--head-dim N", positive, 1, "size of an H3 head")
  add("--mlp-mult N", positive, None, "width of the MLP, or the gate, over --d-model (default: 4; "
      "bigs 3, stack and stack-serial 5)")
  add("--embed-dropout X", fraction, 0.0, "dropout after the embedding")
  add("--resid-dropout X", fraction, 0.0, "dropout in the blocks of a causal model")
  add("--attn-dropout X", fraction, 0.0, "dropout of attention's weights in a causal model")

  add = option_adder(p, "training")
  add("--steps N", positive, 1000, "updates of the weights in all")
  add("--batch N", positive, 16, "sequences a step")
  add("--length N", positive, 128, "tokens a sequence")
  add("--lr X", above_0, None, "highest learning rate (default: by --size; with --init on the "
      "same task a tenth of what that run had)")
  add("--schedule-steps N", positive, None, "steps in which the learning rate rises and falls; a "
      "tenth of it is left after them (default: the --steps that the run began with)")
  add("--warmup N", whole, None, "steps in which the learning rate rises, before it falls "
      "(default: a tenth of --schedule-steps, at most 1000)")
  add("--weight-decay X", number(float, 0), 0.1,
      "of all weights but biases, norms, and in causal models embeddings and the SSMs' dynamics")
  add("--clip X", number(float, 0), 1.0, "largest norm of the whole gradient; 0: no clipping")
  add("--beta2 X", number(float, 0.5, 0.9999), None, "AdamW's β2, the decay of its mean of squared "
      f"gradients (default: {BETA2}, of masked models {MASKED['beta2']})")
  add("--seed N", whole, 0, "of weights, batches and the sample")
  add("--dtype", str, "float32", "of the factors in products with weights, on a GPU of what is "
      "convolved, too; all else stays float32",
      choices=PRECISIONS)
  add("--accumulate N", positive, 1, "parts that a step's sequences take turns in, for less memory")
  add("--truncate N", positive, None, "tokens after which the gradient is cut, for less memory: "
      "the state goes on, what it should have held is not learned; --model h3 only (default: none)")
  add("--checkpoint-activations", bool, False, "keep only what goes into each layer and compute "
      "the rest once more: less memory, a third more time; --task text only")
  add("--devices N", positive, 1, "devices that share a step's sequences")

  add = option_adder(p, "run")
  add("--out DIR", str, OUT, "folder for checkpoint, log and plot")
  add("--resume", bool, False, "go on with the run in --out, with its options but for those given: "
      "all but model, task, seed and held-out data may change")
  add("--estimate", bool, False, "try a few steps, print what the run will take in memory and "
      "time, and write nothing")
  add("--init FILE", str, None, "checkpoint, or official BiGS model, to take weights and shape "
      "from, and on the same task the data (default: random weights)")
  add("--eval-every N", positive, None, "steps between evaluations (default: an eighth of --steps)")
  add("--save-every N", positive, None, "steps between checkpoints (default: as --eval-every)")
  add("--log-every N", positive, None, "steps between lines where stdout is no terminal (default: "
      "a 20th of --steps)")
  add("--sample N", whole, 300, "tokens to generate at the end; 0: no sample, of any task")
  add("--sample-every N", positive, None, "steps between samples (default: at the end only)")
  add("--log FILE", str, None, "table of losses (default: log.csv in --out)")
  add("--plot FILE", str, None, "picture of them: .png, .svg or .pdf (default: loss.png in --out)")
  for flag, where in MOVED.items(): p.moved(flag, *where.split())
  model = "bigs" if TASKS[task].causal is False else "h3"
  p.set_defaults(**{"model": model} | TASKS[task].defaults)
  return p

def add_task_options(p:Parser, add:Callable, task:str) -> None:
  "Adds the tasks' own options. One of several tasks is described by this task, or the first."
  p.owners, p.fixed = {}, {*FIXED}
  def add_for(name, flag, *words, fixed=False, **kw):
    key = key_of(flag)
    if key not in p.owners: add(flag, *words, **kw)
    p.owners.setdefault(key, []).append(name)
    if fixed: p.fixed.add(key)
  for name in sorted(TASKS, key=task.__ne__):
    if TASKS[name].options: TASKS[name].options(functools.partial(add_for, name))

def chosen_task(argv:list[str]|None, program:str, default:str) -> str:
  p = Parser(prog=program, add_help=False)
  p.add_argument("--task", default=default)
  return p.parse_known_args(argv)[0].task

def resolve_args(argv:list[str]|None, program:str="train.py", default:str="text"
                 ) -> tuple[Namespace, Saved|None]:
  """Returns the options, and the checkpoint that --resume or --init names.

  The command line stands over the checkpoint's options, these over the task's defaults, and these
  over the parser's. What follows from the task's data is None still."""
  p = parser(program, chosen_task(argv, program, default))
  args, start = p.parse_args(argv), None
  if args.resume and args.init:
    raise UserError("--resume goes on with a run, --init starts one: give one of them")
  setup_device()                                        # not before: --help needs no device
  if args.resume: start = read_newest(Path(args.out), not args.estimate)
  elif args.init:
    path = find(args.init)
    start = Saved(path, *read_weights(path))
  if start:
    saved = saved_args(start, args.resume)
    kept = fixed = INHERITED
    if args.resume:
      p = parser(program, saved["task"])
      kept, fixed = vars(args).keys() - {"resume", "estimate", "out"}, p.fixed
    elif not args.data:
      own = {key for key, tasks in p.owners.items() if args.task in tasks}
      if saved.get("task") == args.task: kept = own - {"vocab"} | {*INHERITED}
      elif "data" in own:
        known = "does not say what it was trained on: name"
        if "task" in saved: known = f"was trained on --task {saved['task']}: name that, or"
        raise UserError(f"{start.path} {known} with --data what to train --task {args.task} on")
    p.set_defaults(**{k: v for k, v in saved.items() if k in kept})
    args = p.parse_args(argv)
    if args.data and args.data == p.get_default("data"):
      gone = [path for path in args.data if not Path(path).exists()]
      if gone:
        raise UserError(f"{start.path} was trained on {gone[0]}, which is not there any more: name "
                        "what to train on with --data")
    for key in fixed:
      value, old = getattr(args, key), p.get_default(key)
      if value != old:
        has = "" if old is None else f" {old}"
        raise UserError(f"{flag_of(key)} {value} differs from the checkpoint's{has}: leave it out, "
                        "or start afresh")
    if not args.resume: args.init = str(start.path)
  else: fill_shape(args)
  for key, tasks in p.owners.items():
    if getattr(args, key) != p.get_default(key) and args.task not in tasks:
      raise UserError(f"{flag_of(key)} is for --task {' or '.join(tasks)}, not for {args.task}")
  check_options(args)
  return args, start

def saved_args(start:Saved, resume:bool) -> dict[str, object]:
  "Returns the options in a checkpoint. CheckpointError where it is none of ours, or damaged."
  path, tensors, meta = start
  if not meta and "bigs.embeddings.word_embeddings.weight" in tensors:     # an official model
    return dict(model="bigs", tokenizer="bert")
  if meta.get("model") not in ("h3", "bigs") or not {"config", "args", "step"} <= meta.keys():
    raise CheckpointError(f"{path} is not a checkpoint of train.py")
  try:
    saved, config = json.loads(meta["args"]), json.loads(meta["config"])
    saved = {"task": saved["task"]} | saved
    if resume:
      read_losses(meta), read_evals(meta), int(meta["step"])
      older = dict(schedule_steps=saved.get("steps"), beta2=None)   # older ones had no other
      saved = older | saved
    out = saved.get("out", ".")
    moved = {k: v and of_paths(v, lambda p: located(p, out, path.parent))
             for k, v in saved.items() if k in PATHS}
    return saved | moved | {k: config[k] for k in SHAPE if k in config}
  except (KeyError, TypeError, ValueError):
    raise CheckpointError(f"{path}: its metadata are damaged") from None

def of_paths(value:str|list[str], f:Callable[[str], str]) -> str|list[str]:
  "Applies f to an option that is a path, or several."
  return f(value) if isinstance(value, str) else [*map(f, value)]

def in_words(value:object) -> str:
  "Returns an option's value as the command line has it."
  if isinstance(value, list): return " ".join(map(str, value))
  if isinstance(value, bool): return "on" if value else "off"
  return "none" if value is None else str(value)

def absolute(options:dict[str, object]) -> dict[str, object]:
  return {k: of_paths(v, os.path.abspath) if k in PATHS and v else v for k, v in options.items()}

def located(path:str, out:str, folder:Path) -> str:
  """Returns where a path in a checkpoint is now: as far from the checkpoint's folder as it was from
  --out, if there is such a file, else as it is written."""
  try: beside = folder/os.path.relpath(path, out)
  except ValueError: return path                        # on another drive of Windows
  return near(beside if beside.exists() else path)

def trained_before(args:Namespace, start:Saved|None) -> dict[str, object]:
  "Returns the options of the run that --init's checkpoint is from; none if its task was another."
  saved = saved_args(start, False) if start and not args.resume else {}
  return saved if saved.get("task") == args.task and "lr" in saved else {}

def check_task(name:str) -> None:
  if name in TASKS: return
  program = paper_of(name)
  elsewhere = f"; type {command(program)} --task {name}" if program else ""
  raise UserError(f"--task: invalid choice: {name!r} is none of {', '.join(TASKS)}{elsewhere}")

def is_causal(args:Namespace) -> bool:
  causal = TASKS[args.task].causal
  either = args.model in ("transformer", "s4d")
  return causal if either and causal is not None else args.model in CAUSAL

def attention_layers(args:Namespace) -> list[int]:
  "Returns the layers of a causal model that are attention, from 0."
  if args.attn_layers is not None: return args.attn_layers
  n = args.n_layer
  # the paper's hybrid has two, the 2nd and the (2 + N/2)th; a shallow one has one
  if args.model == "hybrid": return [1, 1 + n//2] if n >= 8 else [n//2]
  return [*range(n)] if args.model == "transformer" else []

def check_options(args:Namespace) -> None:
  "Raises UserError where options do not fit each other, before anything is read or built."
  causal, model = TASKS[args.task].causal, args.model
  if causal not in (None, is_causal(args)):
    fitting = CAUSAL if causal else (*BIDIRECTIONAL, "transformer", "s4d")
    raise UserError(f"--task {args.task} is not for --model {model}: give {' or '.join(fitting)}")
  if not is_causal(args):
    unset = dict(attn_layers=None, rotary_dim=None, max_positions=0, head_dim=1, init_std=None,
                 resid_dropout=0, attn_dropout=0)
    for key, value in unset.items():
      if getattr(args, key) != value:
        raise UserError(f"{flag_of(key)} is for models that are causal, not for {model} here")
  parts, cut = args.accumulate*args.devices, args.truncate
  dropout = has_dropout(args)
  checks = [
    (args.head_dim != 1 and model in ("transformer", "s4d"),
     f"--head-dim is for --model h3 or hybrid, not for {model}"),
    (cut and (args.task != "text" or attention_layers(args) or args.max_positions),
     "--truncate carries the state of H3 layers, attention and learned positions have none: it is "
     "for --task text --model h3"),
    (cut and (args.length or 0) % cut,
     f"--truncate {cut} does not divide --length {args.length}: give one that does"),
    (args.batch % parts,
     f"--batch {args.batch} is no multiple of {parts}, the parts of --accumulate times --devices"),
    (args.checkpoint_activations and (args.task != "text" or cut or dropout),
     "--checkpoint-activations is for --task text, without --truncate and without dropout, whose "
     "masks would be drawn anew"),
    (args.plot and Path(args.plot).suffix not in PICTURES,
     f"--plot {args.plot}: it draws .png, .svg or .pdf: name such a file")]
  for wrong, message in checks:
    if wrong: raise UserError(message)
  check_precision(args.dtype)

def fill_shape(args:Namespace) -> None:
  "Sets width, layers and heads by --size where they are not given."
  size, layers = SIZES[args.size], SIZES[args.size].n_layer
  # a gated layer has 13 D² weights to the others' 12
  if args.model in ("bigs", "gated-attention"): layers -= layers // 24
  args.d_model = args.d_model or size.d_model
  args.n_layer = args.n_layer or layers
  args.n_heads = args.n_heads or size.n_heads

# The share of the run's highest learning rate that --init goes on with: the run has ended there. Of
# 1, 0.3 and 0.1 only this did not raise the loss at first (a model of 2.20 bits, trained for long:
# after 50 steps 2.28, 2.21, 2.19, after 600 2.18, 2.17, 2.18)
GOING_ON = 0.1

def fill_step_defaults(args:Namespace, start:Saved|None=None) -> None:
  "Sets the options that follow from the number of steps, and the learning rate."
  steps, before, usual = args.steps, trained_before(args, start), SIZES[args.size].lr
  # a run that went on itself has taken its tenth already
  went_on = before.get("init") and before["lr"] < usual
  args.lr = args.lr or (before["lr"] * (1 if went_on else GOING_ON) if before else usual)
  args.schedule_steps = args.schedule_steps or steps
  if args.warmup is None: args.warmup = min(1000, args.schedule_steps//10)
  args.eval_every = args.eval_every or -(-steps//8)
  args.save_every = args.save_every or args.eval_every
  args.log_every = args.log_every or max(1, steps//20)

# ---- the model ----------------------------------------------------------------------------------

def h3_config(args:Namespace, vocab_size:int) -> H3Config:
  rotary_dim = args.rotary_dim or 0
  if args.rotary_dim is None and args.model == "transformer" and not args.max_positions:
    rotary_dim = args.d_model // args.n_heads // 2 * 2
  return H3Config(vocab_size=vocab_size, d_model=args.d_model, n_layer=args.n_layer,
                  attn_layers=tuple(attention_layers(args)), n_heads=args.n_heads,
                  rotary_dim=rotary_dim, d_state=args.d_state, head_dim=args.head_dim,
                  mlp_mult=args.mlp_mult or 4, ssm="s4d" if args.model == "s4d" else "h3",
                  embed_dropout=args.embed_dropout, resid_dropout=args.resid_dropout,
                  attn_dropout=args.attn_dropout,
                  init_std=args.init_std or 0.02, max_length=max(2048, 2*args.length),
                  max_positions=args.max_positions)

def bigs_config(args:Namespace, vocab_size:int) -> BiGSConfig:
  block = dict(bigs="gated", bert="attention", transformer="attention").get(args.model, args.model)
  return BiGSConfig(vocab_size=vocab_size, d_model=args.d_model, n_layer=args.n_layer, block=block,
                    d_inner=(args.mlp_mult or 0)*args.d_model, n_heads=args.n_heads,
                    d_state=args.d_state, max_length=args.length,
                    embed_dropout=args.embed_dropout)

def make_model(args:Namespace, task:Task, start:Saved|None=None) -> Model:
  "Makes a new model, or the checkpoint's, and fits it to the task."
  if start is None:
    try: config = (h3_config if is_causal(args) else bigs_config)(args, task.vocab_size)
    except ValueError as e: raise UserError(str(e)) from None
    if isinstance(config, H3Config): return H3LM(config, seed=args.seed)
    if task.labels: config.n_labels = len(task.labels)
    return BiGS(config, args.seed, (task.head,))
  path, tensors, meta = start
  if is_causal(args): model = h3_model(tensors, meta, str(path))
  else:
    labels = task.labels and len(task.labels)
    old = tensors.get("classifier.weight")
    # as MRPC and RTE start from MNLI
    if not args.resume and labels and old is not None and old.shape[0] != labels:
      tensors = {k: v for k, v in tensors.items() if not k.startswith("classifier.")}
    model = bigs_model(tensors, meta, str(path), task.head, "tanh", labels)
  if model.config.vocab_size != task.vocab_size:
    raise UserError(f"the checkpoint's vocabulary is {model.config.vocab_size}, --tokenizer "
                    f"{args.tokenizer}'s {task.vocab_size}: give the tokenizer it was trained with")
  if isinstance(model, BiGS): model.lengthen(args.length)
  else: model.config.max_length = max(model.config.max_length, 2*args.length)
  return model

def fixed_weights(model:Model, task:Task) -> dict[str, float]:
  """Names of the weights that training leaves alone, and the number that each is filled with.
  UserError where a part of `fixed` is no weight of the model."""
  found = {}
  for end, value in task.fixed.items():
    names = [name for name in get_state_dict(model) if name.endswith(end)]
    if not names: raise UserError(f"the task sets {end} to {value:g}, which the model hasn't got")
    found |= dict.fromkeys(names, value)
  return found

def with_fixed_weights(model:Model, task:Task) -> Model:
  "Fills these weights of a model, and returns it."
  params = get_state_dict(model)
  for name, value in fixed_weights(model, task).items():
    fill(params[name], np.full(params[name].shape, value, np.float32))
  return model

def check_positions(model:Model, task:Task) -> None:
  most = getattr(model.config, "max_positions", 0)
  longest = max(b[0].shape[1] for b in task.held_out)
  if most and longest > most:
    raise UserError(f"the model has learned positions for {most} tokens, and the task has rows of "
                    f"{longest}: give a larger --max-positions, or a smaller --length")

def describe(name:str, config:H3Config|BiGSConfig) -> str:
  text = f"{name}: {config.n_layer} layers of width {config.d_model}"
  attention = getattr(config, "attn_layers", ())
  if not 0 < len(attention) < config.n_layer: return text
  several = "s" if len(attention) > 1 else ""
  return f"{text}, attention in layer{several} {', '.join(map(str, attention))} (from 0)"

# ---- a step -------------------------------------------------------------------------------------

def learning_rate(step:int, steps:int, peak:float, warmup:int, schedule:str="cosine") -> float:
  """Rises linearly to the peak, then falls: on a cosine to a tenth, or linearly to 0. From step 0;
  after all `steps` of the schedule it is a tenth, or as in the last of them."""
  if step >= steps and schedule == "cosine": return peak * 0.1
  step = min(step, steps-1)
  if step < warmup: return peak * (step+1) / warmup
  if schedule == "linear": return peak * (steps-step) / (steps-warmup)
  return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step-warmup) / max(1, steps-warmup))))

def forward_backward(model:Model, params:dict[str, Tensor], forward:Callable) -> Gradients:
  "Returns the function from a batch to its mean loss in nats and the gradients of the parameters."
  def gradients(*batch):
    loss = forward(model, *batch)[0]
    return loss, loss.gradient(*params.values())
  return gradients

def make_step(model:Model, opt:AdamW, forward:Callable=Task.forward,
              gradients:Gradients|None=None, update:Callable|None=None) -> Step:
  """Makes the plain step of training: forward, backward, clip, update.

  Returns `step(batch, hyper) -> [loss, gradient norm]`, with `opt.hyper` for hyper. gradients takes
  the place of forward and backward, update that of the optimizer's."""
  gradients = gradients or forward_backward(model, opt.params, forward)
  update = update or opt.update
  feed = Feed(opt.device)

  @capture
  def compiled(hyper, *batch):
    with Context(TRAINING=1):
      loss, grads = gradients(*batch)
      Tensor.realize(loss, *grads)                      # all of them, before any weight changes
      norm = update(grads, hyper)                       # by AdamW, the gradient's norm clipped
    return loss, norm

  def step(batch, hyper):
    loss, norm = compiled(hyper, *feed.batch(batch))
    return [loss.item(), norm.item()]
  return step

def make_eval(model:Model, forward:Callable=Task.forward) -> Callable[[Batch], list[np.ndarray]]:
  """Makes the plain evaluation: batch -> what `forward` returns for it, the mean loss first. Each
  shape of batch is compiled once. Of several devices each evaluates all."""
  device = next(iter(get_state_dict(model).values())).device
  def outputs(*batch): return [t.realize() for t in forward(model, *batch)]
  compiled = functools.cache(lambda shapes: capture(outputs))
  def evaluate(batch):
    made = compiled(tuple(x.shape for x in batch))(*(tensor_on(device, x) for x in batch))
    return [t.numpy() for t in made]
  return evaluate

def training_step(model:Model, opt:AdamW, task:Task, args:Namespace, scale:LossScale) -> Step:
  "Makes the plain step, or what the options make of it."
  params, half = [*opt.params.values()], half_precision(args.dtype)
  in_parts = args.accumulate > 1 or args.truncate
  if not (in_parts or args.devices > 1 or args.checkpoint_activations or scale.on):
    return half(make_step(model, opt, task.forward))

  carried, update = CarriedState(model, opt.device, cross_entropy), opt.update
  if args.truncate: gradients = truncated(carried, params)
  elif args.checkpoint_activations: gradients = gradient_checkpointing(model, params, cross_entropy)
  else: gradients = forward_backward(model, opt.params, weighted(task.forward))
  if args.devices > 1: gradients, update = on_devices(opt.device, gradients, update)

  def parts(batch):
    total = task.count(batch)
    for part in zip(*(np.split(a, args.accumulate) for a in batch)):
      if args.truncate: carried.reset(len(part[0]) // args.devices)
      for piece in pieces(part, args.truncate) if args.truncate else [part]:
        yield weigh(piece, total, task.count, args.devices, scale.value)

  if in_parts: run = accumulated(gradients, update, params, parts)
  else:
    whole = make_step(model, opt, gradients=gradients, update=update)
    run = lambda batch, hyper: whole(next(parts(batch)), hyper)
  def step(batch, hyper):
    loss, norm = run(batch, hyper)
    return [loss / scale.value, norm]
  return half(step)

def evaluation(model:Model, opt:AdamW, task:Task, args:Namespace) -> Callable:
  "Makes the plain evaluation, or with --truncate one in pieces."
  evaluate = make_eval(model, task.forward)
  if args.truncate:
    carried = CarriedState(model, opt.device, cross_entropy)
    evaluate = truncated_eval(carried, make_eval, args.truncate)
  return half_precision(args.dtype)(evaluate)

# ---- the log ------------------------------------------------------------------------------------

def four_digits(x:float) -> float: return float(f"{x:.4g}")

# The log's columns, and how they are rounded. A new one stands here, and Run.train gives its value.
COLUMNS = {"step": int, "loss_nats": lambda x: round(x, 5), "learning_rate": four_digits,
           "gradient_norm": four_digits}

def read_losses(meta:dict[str, str]) -> list[dict[str, float]]:
  "Reads the log's rows in a checkpoint: it may have columns less, or more, which are left out."
  return [dict(zip(COLUMNS, row)) for row in json.loads(meta["losses"])]

def read_evals(meta:dict[str, str]) -> list[list]:
  "Reads the evaluations in a checkpoint, as in `Log.evals`; old ones have no metrics."
  return [[step, loss, *metrics, {}][:3] for step, loss, *metrics in json.loads(meta["held_out"])]

def log_files(args:Namespace) -> tuple[Path, Path]:
  "Returns where the table of losses and its picture go."
  out = Path(args.out)
  return Path(args.log or out/"log.csv"), Path(args.plot or out/"loss.png")

class Log:
  "The losses so far, the progress line, the CSV and the plot."
  def __init__(self, args:Namespace, task:Task):
    self.args, self.task = args, task
    self.rows: list[dict[str, float]] = []              # COLUMNS of each step
    self.evals: list[list] = []                         # step, held-out loss in `unit`, metrics
    self.resumed = 0                                    # rows that are from before this process
    self.seconds_before = 0.0                           # of training, likewise
    self.times = collections.deque(maxlen=20)           # seconds of the last steps
    self.live = bool(sys.stdout and sys.stdout.isatty())
    self.table, self.picture = log_files(args)

  def seconds(self) -> float:
    "Returns the whole run's seconds, without those between a stop and --resume."
    return self.seconds_before + time.perf_counter() - START

  def show(self, text:str, end:str="\n") -> None:
    try: print(text, end=end, flush=True)
    except BrokenPipeError: sys.stdout = open(os.devnull, "w")      # nobody reads any more

  def line(self, text:str) -> None:
    "Shows a line that stays, over the progress line if there is one."
    self.show(("\r\x1b[K" if self.live else "") + text)

  def step(self, tokens:int, seconds:float, **values:float) -> None:
    """Takes note of a step: how many tokens its batch had, the time it took, and a value for each
    of COLUMNS."""
    self.rows.append({k: rounded(values[k]) for k, rounded in COLUMNS.items()})
    # the first two compile and capture
    if len(self.rows) - self.resumed > 2: self.times.append(seconds)
    step, steps = values["step"], self.args.steps
    fields = self.progress(step, tokens)
    text = "  ".join(fields.values())
    if self.live:
      width = shutil.get_terminal_size().columns - 1
      for name in ("memory", "rate", "nats", "speed"):  # what a narrow terminal can do without
        if len(text) <= width: break
        fields.pop(name, None)
        text = "  ".join(fields.values())
      room = max(0, min(20, width - len(text) - 1))     # what the text leaves
      bar = "━"*(room*step//steps)
      self.show("\r\x1b[K" + f"{bar:─<{room}} {text}"[:width].strip(), end="")
    elif step % self.args.log_every == 0 or step in (1, steps): self.show(text)

  def progress(self, step:int, tokens:int) -> dict[str, str]:
    "Returns the fields of the progress line, by name."
    steps, unit = self.args.steps, self.task.unit.replace(" per ", "/")
    recent = [r["loss_nats"] for r in self.rows[-10:]]  # a step's loss alone jumps about
    loss = sum(recent) / len(recent)
    fields = {"step": f"step {step:>{len(str(steps))}}/{steps}", "nats": f"loss {loss:.3f}",
              "loss": f"{loss*self.task.per_nat:.3f} {unit}",
              "rate": f"lr {self.rows[-1]['learning_rate']:.1e}"}
    if self.times:
      a_step = sum(self.times) / len(self.times)
      fields["speed"] = f"{tokens/a_step:,.0f} tokens/s"
      fields["left"] = f"{duration((steps-step)*a_step)} left"
    peak = peak_memory()
    if not math.isnan(peak): fields["memory"] = f"{peak/1e9:.2f} GB"
    return fields

  def held_out(self) -> str:
    _, loss, metrics = self.evals[-1]
    return f"{loss:.3f} {self.task.unit}" + "".join(f", {k} {v:.3f}" for k, v in metrics.items())

  def write(self, title:str) -> str:
    "Writes the table and the picture; returns what to tell the user."
    try:
      self.write_table()
      try: self.plot(title)
      except ImportError: return f"{self.table} (pip install matplotlib, and the plot is drawn too)"
    except OSError as e: return f"not the log ({e.filename}: {e.strerror})"
    return f"{self.table}, {self.picture}"

  def write_table(self) -> None:
    unit, baseline = self.task.unit, round(self.task.baseline, 5)
    evals = {step: {unit: loss} | metrics for step, loss, metrics in self.evals}
    rows = []
    for r in self.rows:
      step, nats = r["step"], r["loss_nats"]
      row = {"step": step, "loss_nats": nats, unit: round(nats*self.task.per_nat, 5)} | r
      held_out = {f"held_out_{k}": x for k, x in evals.get(step, {}).items()}
      rows.append(row | {f"baseline_{unit}": baseline} | held_out)
    names = dict.fromkeys(k for row in rows for k in row)
    with open(self.table, "w", newline="") as f:
      table = csv.DictWriter(f, names, restval="")      # a checkpoint's rows may lack a column
      table.writerow({k: k.replace(" ", "_") for k in names})
      table.writerows(rows)

  def plot(self, title:str) -> None:
    "ImportError where matplotlib is missing."
    from matplotlib.figure import Figure
    x, y = np.array([(r["step"], r["loss_nats"]*self.task.per_nat) for r in self.rows]).T
    window = np.ones(min(len(y), 1 + 2*(len(y)//80)))
    smooth, weights = (np.convolve(z, window, "same") for z in (y, np.ones_like(y)))
    name = self.task.baseline_name.split(" (")[0]
    fig = Figure((8, 4.8), dpi=150, layout="constrained")
    ax = fig.subplots()
    ax.plot(x, y, color="tab:blue", alpha=0.25, lw=0.8)
    ax.plot(x, smooth / weights, color="tab:blue", lw=1.8, label="training")
    ax.axhline(self.task.baseline, color="gray", ls="--", label=f"{name}: {self.task.baseline:.2f}")
    if self.evals:
      steps, losses, _ = zip(*self.evals)
      label = f"held out: {losses[-1]:.2f} at the end"
      ax.plot(steps, losses, "o-", color="tab:red", ms=5, lw=1, label=label)
    ax.set(xlabel="step", ylabel=self.task.unit)
    ax.set_title(title, fontsize=10.5, loc="left")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    fig.savefig(self.picture)

# ---- the run ------------------------------------------------------------------------------------

RECOVERED = 100               # steps after which a loss that was not finite is past

class Run:
  "One run: the model and all that its training changes, and what is done at a step."
  def __init__(self, program:str, args:Namespace, task:Task, start:Saved|None):
    self.program, self.args, self.task = program, args, task
    self.out, self.path = Path(args.out), Path(args.out)/CHECKPOINT
    self.new_model = lambda: with_fixed_weights(make_model(args, task, start), task)
    self.devices = open_devices(args.devices)
    self.model = self.new_model()
    check_positions(self.model, task)
    if self.devices:
      for p in get_state_dict(self.model).values(): p.shard_(self.devices).realize()
    self.params = get_state_dict(self.model)
    fixed = fixed_weights(self.model, task)
    trained = {name: p for name, p in self.params.items() if name not in fixed}
    betas = MASKED if isinstance(self.model, BiGS) else {}
    if args.beta2: betas = betas | {"beta2": args.beta2}
    self.opt = AdamW(trained, **betas)
    self.state = training_state(self.model, self.opt)
    self.scale, self.log = LossScale(args.dtype), Log(args, task)
    bert = task.tokenizer and args.tokenizer == "bert"  # its file goes beside the checkpoint
    self.vocab = task.tokenizer.path.read_bytes() if bert else None
    self.first = 0                                      # steps done before this process
    self.notes: list[str] = []                          # lines on what is not as it was
    self.saved: int|None = None                         # steps done at the newest checkpoint
    self.evaluated = False                              # whether the evaluation is compiled
    self.failures = self.failed_at = 0                  # failures in a row; the last one's step
    if args.resume: self.resume(start)
    elif args.init: self.go_on_from(start)
    self.step = training_step(self.model, self.opt, task, args, self.scale)
    self.outputs = evaluation(self.model, self.opt, task, args)
    millions = sum(p.numel() for p in self.params.values()) / 1e6
    self.title = f"{describe(args.model, self.model.config)}; {millions:.2f} M parameters"

  def resume(self, start:Saved) -> None:
    meta = start.meta
    self.first = self.saved = int(meta["step"])
    if self.first >= self.args.steps:
      raise UserError(f"the run in {self.out} has done its {self.first} steps: give more with "
                      "--steps, or another --out to start afresh")
    restore(start, self.state)
    self.log.rows, self.log.evals = read_losses(meta), read_evals(meta)
    self.log.resumed = len(self.log.rows)
    self.log.seconds_before = float(meta.get("seconds", 0))
    if "scale" in meta: self.scale.value, self.scale.good = json.loads(meta["scale"])
    self.notes = self.changes(saved_args(start, True), meta.get("data", ""))

  def hyper(self, step:int) -> list[Tensor]:
    args = self.args
    ssm_scale = min(1e-3, args.lr) / args.lr            # the SSMs' dynamics learn at 1e-3 at most
    return self.opt.hyper(step, self.rate(step), args.weight_decay, args.clip or math.inf,
                          ssm_scale, self.scale.value)

  def rate(self, step:int) -> float:
    args = self.args
    return learning_rate(step, args.schedule_steps, args.lr, args.warmup, self.task.schedule)

  def changes(self, saved:dict[str, object], data:str) -> list[str]:
    "Returns lines on what goes on in another way than before. data: on what the run was until now."
    args, notes = self.args, []
    old, new = absolute(saved), absolute(vars(args))
    own = ("out", "resume", "estimate")
    changed = [k for k in new if k in old and old[k] != new[k] and k not in own]
    if changed:
      notes.append("changed: " + ", ".join(
        f"{flag_of(k)} {in_words(saved[k])} -> {in_words(getattr(args, k))}" for k in changed))
    if {"steps", "schedule_steps", "lr", "warmup"} & {*changed}:
      was = learning_rate(self.first-1, *(saved[k] for k in ("schedule_steps", "lr", "warmup")),
                          self.task.schedule)
      text = (f"learning rate: {was:.1e} until now, {self.rate(self.first):.1e} from here, "
              f"{self.rate(args.steps-1):.1e} at the end")
      if args.schedule_steps != args.steps:
        over = self.first >= args.schedule_steps
        tenth = ", to a tenth of --lr,"*(self.task.schedule == "cosine")
        falls = f"fell{tenth}" if over else "falls"
        text += (f"; it {falls} until step {args.schedule_steps}, with --schedule-steps {args.steps} "
                 "until the end")
      notes.append(text)
    # what is counted of the data, without its name; older checkpoints count it in millions
    def without_name(about): return about.split(": ", 1)[-1]
    if data and " M tokens" not in data and without_name(data) != without_name(self.task.about):
      notes.append(f"the data have changed: until now the run was on {data}; from here it goes on "
                   "with what is there now, and its held-out losses are no longer those of before")
    return notes

  def go_on_from(self, start:Saved) -> None:
    "Notes what a new run takes from a checkpoint, and its learning rate."
    args, saved, path = self.args, saved_args(start, False), near(start.path)
    before = trained_before(args, start)
    same = before and absolute(before).get("data") == absolute(vars(args))["data"]
    if same and (args.data or self.task.tokenizer):     # else the task has no data of the user's
      name = self.task.about.split(": ")[0]
      self.notes.append(f"on {name}, as {path} was; --data names other text")
    if "lr" in saved:
      self.notes.append(f"learning rate {args.lr:.1e} at its highest, where {path} had "
                        f"{saved['lr']:.1e}; --lr sets another")

  def announce(self) -> None:
    args = self.args
    where = " and ".join(self.devices) if self.devices else Device.DEFAULT
    print(f"{self.title}, on {where}{'' if FLASH else ' without custom kernels (FLASH=0)'}")
    print(self.task.about)
    rows, length = self.task.batch(self.first)[0].shape
    text = f"{counted(args.steps, 'step')} of {rows} x {length} = {rows*length:,} tokens"
    if args.accumulate > 1: text += f" in {args.accumulate} parts"
    if args.truncate: text += f", the gradient within {args.truncate}"
    if args.dtype != "float32": text += f", in {args.dtype}"
    if args.resume: text += f", going on after step {self.first}"
    print(text, *self.notes, sep="\n", flush=True)

  def train(self, step:int) -> None:
    "Does one step, from 0; goes back where its loss or gradient is not finite."
    start = time.perf_counter()
    lr, hyper = self.rate(step), self.hyper(step)
    batch = self.task.batch(step)
    with waiting("the first step", step == self.first): loss, norm = self.step(batch, hyper)
    if step == self.first: self.log.line(f"first step after {time.perf_counter()-START:.1f} s")
    if math.isfinite(loss) and self.scale.accepts(math.isfinite(norm)):
      self.log.step(batch[0].size, time.perf_counter() - start, step=step+1, loss_nats=loss,
                    learning_rate=lr, gradient_norm=norm)
    else: self.recover(step+1)

  def recover(self, step:int) -> None:
    """Restores the last checkpoint's weights and moments in place, or those of the beginning; data
    and schedule go on. UserError for the third time in a row."""
    # weights that blow up do so after a few good steps: fewer than RECOVERED between are "in a row"
    if step - self.failed_at > RECOVERED: self.failures = 0
    self.failures, self.failed_at = self.failures + 1, step
    if self.failures == 3:
      raise UserError(f"the loss or the gradient is not finite at step {step}, for the third time "
                      "in a row: take a smaller --lr (checkpoints stay as they were)")
    if self.saved is not None: restore(read_newest(self.out), self.state)
    else:
      for k, p in get_state_dict(self.new_model()).items(): fill(self.params[k], p.numpy())
      moments = [*self.opt.m.values(), *self.opt.v.values()]
      for t in moments: fill(t, np.zeros(t.shape, np.float32))
    self.log.line(f"step {step}: the loss or the gradient is not finite: back to the weights of "
                  f"step {self.saved or 0}, without this batch")

  def evaluate(self, step:int) -> bool:
    "Evaluates on the held-out data; shows the loss if it is finite, and returns whether it is."
    task = self.task
    with waiting("the evaluation", not self.evaluated):
      outputs = [self.outputs(b) for b in task.held_out]
    self.evaluated = True
    counts = [task.count(b) for b in task.held_out]     # weights of the batches, as in training
    loss = float(np.average([o[0] for o in outputs], weights=counts))
    if math.isfinite(loss):
      metrics = {k: round(v, 5) for k, v in task.metrics(outputs).items()}
      self.log.evals.append([step, round(loss*task.held_out_per_nat, 5), metrics])
      self.log.line(f"step {step}: held out {self.log.held_out()}")
    return math.isfinite(loss)

  def is_sound(self, hurry:bool) -> bool:
    "Whether the loss is finite. In a hurry the weights, if the evaluation is to be compiled still."
    if self.evaluated or not hurry:
      return math.isfinite(self.outputs(self.task.held_out[0])[0])
    return all(np.isfinite(p.numpy()).all() for p in self.params.values())

  def good_enough(self) -> bool:
    if not self.task.stop_at or len(self.log.evals) < 3: return False
    metric, value = self.task.stop_at
    if any(metrics[metric] < value for _, _, metrics in self.log.evals[-3:]): return False
    self.log.line(f"{metric} at least {value} three times in a row: that is enough")
    return True

  def write(self, step:int, must:bool, done:bool) -> None:
    """Writes a checkpoint and the log. Where there is no room for them a line says so, or UserError
    if it must."""
    if self.saved is None:
      for old in (self.path, self.out/PREVIOUS):
        if old.exists():
          self.log.line(f"the checkpoint that was in {self.out} is now {set_aside(old).name}")
    try:
      tensors = training_state(self.model, self.opt)
      save_beside_previous(self.path, tensors, self.metadata(step, done))
      if self.vocab: (self.out/"vocab.txt").write_bytes(self.vocab)
      self.saved = step
      self.log.write_table()
    except OSError as e:
      left = "there is no checkpoint yet"
      if self.saved is not None: left = f"the checkpoint of step {self.saved} stays"
      failed = f"can't write {e.filename or self.path}: {e.strerror}; {left}"
      if must: raise UserError(failed) from None
      self.log.line(f"step {step}: {failed}, and the training goes on")

  def metadata(self, step:int, done:bool) -> dict[str, str]:
    task, log = self.task, self.log
    meta = dict(model="bigs" if isinstance(self.model, BiGS) else "h3", step=step,
                config=dataclasses.asdict(self.model.config), args=absolute(vars(self.args)),
                tokenizer=self.args.tokenizer, losses=[[*row.values()] for row in log.rows],
                held_out=log.evals, baseline=task.baseline, labels=task.labels, data=task.about,
                scale=[self.scale.value, self.scale.good], seconds=round(log.seconds(), 1),
                done=done)
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in meta.items()}

  def sample(self) -> None:
    self.log.line("--- a sample ---")
    try: self.task.sample(self.model)
    finally: self.log.line("---")

  def loop(self, interrupt:Interrupt) -> int:
    "Trains to the last step, or until interrupted; returns the exit status."
    args = self.args
    def due(every): return every and done % every == 0
    if args.init and not args.resume: self.evaluate(0)  # where it starts from
    for step in range(self.first, args.steps):
      self.train(step)
      interrupt.waits = True                            # before, there was nothing to save
      done = step + 1
      last = done == args.steps
      sound = None
      if last or due(args.eval_every):
        sound = self.evaluate(done)
        last = last or self.good_enough()
      stop = interrupt.seen                             # a later signal waits for the next step
      save = stop or last or due(args.save_every)
      if sound is None: sound = not save or self.is_sound(stop)
      if not sound:                                     # weights that blew up are never saved
        self.recover(done)
        if last: self.evaluate(done)
      if save and (sound or last): self.write(done, last or bool(stop), last)
      if last: break
      if stop:
        self.stopped(done)
        return 128 + stop
      if due(args.sample_every) and self.task.sample and not self.devices: self.sample()
    return 0

  def stopped(self, done:int) -> None:
    self.log.write(self.title)
    self.log.line(f"stopped after step {done} of {self.args.steps}, {self.what_is_saved(done)}")

  def what_is_saved(self, done:int|None=None) -> str:
    "Says it, and how to go on, once `done` steps are done."
    if self.saved is None: return "nothing saved"
    saved = f"the checkpoint is that of step {self.saved}"
    if self.saved == done: saved = f"saved {self.path}"
    again = command(self.program, "--resume", "--out", shown(self.args.out))
    return f"{saved}\ngo on with: {again}"

  def stopped_at_once(self) -> str:
    nothing_lost = " (no step was done yet)"*(len(self.log.rows) == self.log.resumed)
    return f"\nstopped at once{nothing_lost}, {self.what_is_saved()}"

  def finish(self) -> None:
    "Writes and shows what a finished run leaves."
    args, task = self.args, self.task
    files = self.log.write(self.title)
    if args.sample and task.sample:
      for p in self.params.values() if self.devices else ():
        p.replace(p.to(self.devices[0]).realize())
      print()
      try: self.sample()
      except KeyboardInterrupt: pass
    print(f"\nheld out: {self.log.held_out()}; {task.baseline_name}: {task.baseline:.3f}")
    print(f"wrote {self.path}, {files}; {duration(time.perf_counter()-START)} in all")
    if task.sample or args.task in USES:
      print(f"use it by: {use_of(vars(args), args.out, self.program)}")

def train(program:str, interrupt:Interrupt, args:Namespace, start:Saved|None=None) -> int:
  "Does one run. start: the checkpoint that --resume or --init names."
  Tensor.manual_seed(args.seed)                         # dropout's; weights and batches are numpy's
  if has_dropout(args):
    Tensor.rand(1).realize()                            # makes the counter that is saved
  task = TASKS[args.task].make(args)
  fill_step_defaults(args, start)
  check_memory(args, task.batch(0)[0].shape, task.vocab_size, start)
  before = peak_memory()
  run = Run(program, args, task, start)
  if args.estimate: return estimate(run, before)
  check_writable(run.out, run.log.table.parent, run.log.picture.parent)
  run.announce()
  # a run that goes on holds the lock already
  lock = contextlib.nullcontext() if args.resume else lock_run_directory(run.out)
  interrupt.last_words = run.stopped_at_once
  with lock:
    for left in run.out.glob("checkpoint*.tmp"): left.unlink()      # by one that was killed
    status = run.loop(interrupt)
  interrupt.waits = False
  if status == 0: run.finish()
  return status

def main(argv:list[str]|None=None, program:str="train.py", default:str="text") -> int:
  """Trains a model; returns the exit status. program: the file's name, for messages; default: the
  task where the command line names none."""
  if hasattr(sys.stdout, "reconfigure"): sys.stdout.reconfigure(errors="replace")
  p = Parser(prog=program)
  with Interrupt() as interrupt:
    try:
      args = parser(program, chosen_task(argv, program, default)).parse_args(argv)
      # a run that goes on keeps others out before its checkpoint is read
      held = args.resume and not args.estimate and Path(args.out).is_dir()
      with lock_run_directory(Path(args.out)) if held else contextlib.nullcontext():
        return train(program, interrupt, *resolve_args(argv, program, default))
    except UserError as e: p.error(str(e))
    except MemoryError: p.error("not enough memory: take a smaller --batch, --length or model")
    except OSError as e:
      if e.filename is None: raise
      p.error(f"{e.filename}: {e.strerror}")
  return interrupt.status

if __name__ == "__main__": sys.exit(main())
