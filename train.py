"""Trains H3, hybrid and Transformer language models.

  python train.py                                    a small hybrid on Python's own source, in minutes on a CPU
  python train.py --data book.txt notes/ --steps 3000 --out book
  python train.py --resume --out book                goes on where a run stopped, to the bit as if it never had
  python train.py --help                             every option

From top to bottom: options, data, optimiser, checkpoints, what is shown, the loop. The model is in h3tiny.py,
sampling in generate.py. A run leaves in --out: checkpoint.safetensors (weights under the official names, the
optimiser's moments, all settings), log.csv and, with matplotlib, loss.png.

Not here: mixed precision, gradient accumulation, several devices.
"""
import time
START = time.perf_counter()
import argparse, csv, dataclasses, importlib.util, itertools, json, math, os, re, shutil, signal
import subprocess, sys, sysconfig, tempfile, threading
from pathlib import Path
from typing import Callable, Iterable, Iterator
import numpy as np
from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.helpers import Context
from tinygrad.nn.state import get_state_dict
from tinygrad.uop.ops import AxisType, KernelInfo, Ops
from flashconv import FLASH, capture, check_kernels, setup_device
from generate import CHECKPOINT, OUT, TOKENIZERS, Parser, Session, UserError, number, write
from h3tiny import CheckpointError, H3Config, H3LM, read_checkpoint, save_checkpoint

# ---- options --------------------------------------------------------------------------------------

# The last four are shapes of the paper, with its learning rates
SIZES = {"tiny": dict(d_model=64, n_layer=2, n_heads=2, lr=3e-3),
         "small": dict(d_model=128, n_layer=4, n_heads=2, lr=3e-3),
         "medium": dict(d_model=384, n_layer=8, n_heads=6, lr=1e-3),
         "125M": dict(d_model=768, n_layer=12, n_heads=12, lr=6e-4),
         "355M": dict(d_model=1024, n_layer=24, n_heads=16, lr=3e-4),
         "1.3B": dict(d_model=2048, n_layer=24, n_heads=16, lr=2e-4),
         "2.7B": dict(d_model=2560, n_layer=32, n_heads=20, lr=1.6e-4)}

STEPS = 600                                     # of the default run
KINDS = {"h3": "H3", "hybrid": "hybrid H3", "transformer": "Transformer"}

def layer_list(text:str) -> list[int]:
  if text.strip() in ("", "none"): return []
  try: return [int(i) for i in text.split(",")]
  except ValueError: raise argparse.ArgumentTypeError(f"{text!r} is not layer numbers with commas, or none") from None

def parser() -> Parser:
  p = Parser(prog="train.py", description="Train an H3, hybrid or Transformer language model.", allow_abbrev=False,
             epilog="example: python train.py --data shakespeare.txt --steps 2000 --length 512 --out shakespeare")
  def add(group, name, kind, default, text, shown=None, **kw):
    group.add_argument(name, type=kind, default=default, help=f"{text} (default: {shown or default})", **kw)
  positive, fraction = number(int, 1), number(float, 0, 0.99)

  g = p.add_argument_group("what to train on")
  add(g, "--task", str, "text", "the next token of text", choices=list(TASKS))
  add(g, "--data", str, None, "files or folders of text", "Python's own source", nargs="+", metavar="PATH")
  add(g, "--tokenizer", str, "bytes", "how text becomes tokens", choices=list(TOKENIZERS))
  add(g, "--holdout", number(float, 0.001, 0.5), 0.05, "share of the text, its end, kept for evaluation", metavar="X")

  g = p.add_argument_group("model")
  add(g, "--model", str, "hybrid", "only H3 layers, most of them, or none", choices=list(KINDS))
  add(g, "--size", str, "small", "sets the next three and --lr", choices=list(SIZES))
  add(g, "--d-model", positive, None, "width", "by --size", metavar="N")
  add(g, "--n-layer", positive, None, "layers", "by --size", metavar="N")
  add(g, "--n-heads", positive, None, "attention heads", "by --size", metavar="N")
  add(g, "--attn-layers", layer_list, None, "layers that are attention, from 0", "by --model", metavar="I,J")
  add(g, "--rotary-dim", number(int, 0), None, "rotated dimensions of an attention head; 0: no positions",
      "all in a transformer, else 0", metavar="N")
  add(g, "--d-state", positive, 64, "state size of the SSMs", metavar="N")
  add(g, "--head-dim", positive, 1, "size of an H3 head", metavar="N")
  add(g, "--mlp-mult", positive, 4, "width of the MLP over --d-model", metavar="N")
  add(g, "--embed-dropout", fraction, 0.0, "dropout after the embedding", metavar="X")
  add(g, "--resid-dropout", fraction, 0.0, "dropout in the blocks", metavar="X")

  g = p.add_argument_group("training")
  add(g, "--steps", positive, STEPS, "steps in all", metavar="N")
  add(g, "--batch", positive, 8, "sequences a step", metavar="N")
  add(g, "--length", positive, 256, "tokens a sequence; of any length with --model h3", metavar="N")
  add(g, "--truncate", positive, None, "take a sequence in pieces of N tokens, in the memory that one needs: the state "
      "goes on from each to the next, the gradient does not come back, so what a piece should have left in the state "
      "for a later one is not learned; with --model h3, and --length a multiple of N", "whole", metavar="N")
  add(g, "--lr", number(float, above=0), None, "highest learning rate", "by --size", metavar="X")
  add(g, "--warmup", number(int, 0), None, "steps up to it; a cosine then falls to a tenth",
      "a tenth of --steps, at most 1000", metavar="N")
  add(g, "--weight-decay", number(float, 0), 0.1, "of matrices and of the SSMs' C and D", metavar="X")
  add(g, "--clip", number(float, above=0), 1.0, "largest norm of the whole gradient", metavar="X")
  add(g, "--seed", number(int, 0), 0, "of weights, batches and the sample", metavar="N")

  g = p.add_argument_group("runs")
  add(g, "--out", str, OUT, "folder for checkpoint, log and plot", metavar="DIR")
  g.add_argument("--resume", action="store_true",
                 help="go on with the run in --out, with its settings but for those given now")
  add(g, "--init", str, None, "start from a checkpoint's weights, and take its shape", "random", metavar="FILE")
  add(g, "--eval-every", positive, None, "steps between evaluations", "an eighth of --steps", metavar="N")
  add(g, "--save-every", positive, None, "steps between checkpoints", "as --eval-every", metavar="N")
  add(g, "--log-every", positive, None, "steps between lines, where stdout is no terminal",
      "a 20th of --steps", metavar="N")
  add(g, "--sample", number(int, 0), 300, "tokens to generate at the end", metavar="N")
  g.add_argument("--bench", action="store_true", default=argparse.SUPPRESS,
                 help="time training and decoding on this machine, beside PyTorch if it is installed, and stop")
  return p

SHAPE = ("d_model", "n_layer", "n_heads", "attn_layers", "rotary_dim", "d_state", "head_dim", "mlp_mult",
         "embed_dropout", "resid_dropout")
NEWER = {"truncate": None}                      # options that a checkpoint may lack
FIXED = ("task", "tokenizer", "model", "size", "seed", "holdout", *SHAPE)    # what --resume can't change

def given(argv:list[str]|None) -> dict:
  "Only the options that the command line names."
  p = parser()
  for action in p._actions: action.default = argparse.SUPPRESS
  return vars(p.parse_args(argv))

def make_config(args:argparse.Namespace, vocab_size:int) -> H3Config:
  size = SIZES[args.size]
  d_model, n_layer, n_heads = (getattr(args, k) or size[k] for k in ("d_model", "n_layer", "n_heads"))
  attn, rotary = args.attn_layers, args.rotary_dim
  # The paper's hybrid has two attention layers, the 2nd and the (2 + N/2)th; a shallow one does with one
  if attn is None: attn = {"h3": (), "transformer": range(n_layer),
                           "hybrid": (1, 1 + n_layer//2) if n_layer >= 8 else (n_layer//2,)}[args.model]
  if rotary is None: rotary = d_model // n_heads // 2 * 2 if args.model == "transformer" else 0
  try:
    return H3Config(vocab_size, d_model, n_layer, tuple(attn), n_heads, rotary, args.d_state, args.head_dim,
                    args.mlp_mult, embed_dropout=args.embed_dropout, resid_dropout=args.resid_dropout,
                    max_length=max(2048, 2*args.length))
  except ValueError as e: raise UserError(str(e)) from None

# ---- data -----------------------------------------------------------------------------------------

@dataclasses.dataclass
class Task:
  "What the loop needs of a task; each has a function of the options that makes one."
  about: str
  tokenizer: object
  batch: Callable[[int], tuple[np.ndarray, np.ndarray]]       # of a step: inputs, targets, (B,L) int32 each
  held_out: list[tuple[np.ndarray, np.ndarray]]               # batches to evaluate on, always the same
  bits: float                   # bits per byte for one nat per token, in training; likewise held out
  held_out_bits: float
  baseline: float               # bits per byte of a byte-bigram model on `held_out`

SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

def stdlib_files() -> list[Path]:
  root = Path(sysconfig.get_paths()["stdlib"])
  return sorted(f for f in root.rglob("*.py") if not SKIP & set(f.relative_to(root).parts))

def read_text(path:Path) -> str:
  try: data = path.read_bytes()
  except OSError as e: raise UserError(f"can't read {path}: {e.strerror}") from None
  if not data: raise UserError(f"{path} is empty: there is nothing to train on")
  try: text = data.decode("utf-8")
  except UnicodeDecodeError: text = "\0"
  if "\0" in text: raise UserError(f"{path} is a binary file: --data takes text in UTF-8")
  return text

def read_texts(paths:list[str]|None) -> list[str]:
  "A file named must be text; of a folder's, those that are."
  texts = []
  for path in map(Path, paths or []):
    if not path.exists(): raise UserError(f"no such file or folder: {path}")
    if not path.is_dir(): texts.append(read_text(path))
    else:
      before = len(texts)
      texts += readable(f for f in sorted(path.rglob("*"))
                        if f.is_file() and not any(n.startswith(".") for n in f.relative_to(path).parts))
      if len(texts) == before: raise UserError(f"no text in the folder {path}: --data takes text in UTF-8")
  return texts if paths else list(readable(stdlib_files()))

def readable(files:Iterator[Path]) -> Iterator[str]:
  for f in files:
    try: yield read_text(f)
    except UserError: pass

def split(texts:list[np.ndarray], share:float) -> tuple[np.ndarray, np.ndarray]:
  "Training and held-out tokens: the last files, or the end of the text where there are few files."
  cut, tokens = len(texts) - round(len(texts) * share), np.concatenate(texts)
  if len(texts) * share >= 1 and sum(map(len, texts[cut:])) >= len(tokens) * share / 2:
    return np.concatenate(texts[:cut]), np.concatenate(texts[cut:])
  cut = len(tokens) - round(len(tokens) * share)
  return tokens[:cut], tokens[cut:]

def bigram_bits(train:np.ndarray, x:np.ndarray, y:np.ndarray) -> float:
  "Bits to code every y after its x, given the pairs in `train` and one more of each. Bytes; 256 is <|endoftext|>."
  counts = 1 + np.bincount(train[:-1].astype(np.int64)*257 + train[1:], minlength=257*257).reshape(257, 257)
  return float(-np.log2(counts / counts.sum(1, keepdims=True))[x, y].sum())

def text_task(args:argparse.Namespace) -> Task:
  texts, tok, L = read_texts(args.data), TOKENIZERS[args.tokenizer](), args.length
  train, held = split([np.append(tok.encode(t), np.uint16(tok.eot)) for t in texts], args.holdout)
  for name, part in (("training", train), ("held-out", held)):
    if len(part) <= L:
      raise UserError(f"the text is too short: its {name} part has {len(part)} tokens and a window "
                      f"takes {L+1}: give more text or a smaller --length")
  # windows evenly over the held-out part, 128 at most, in batches
  n = min(128, (len(held)-1) // L)
  B = min(args.batch, n)
  n -= n % B
  at = np.linspace(0, len(held)-1-L, n).astype(int)
  windows = held[at[:, None] + np.arange(L+1)].astype(np.int32)                       # (n,L+1)
  if tok.name == "bytes": pairs = train, windows[:, :-1].ravel(), windows[:, 1:].ravel()
  else:
    parts = [np.frombuffer(tok.decode(w), np.uint8) for w in windows]
    pairs = (np.frombuffer(tok.decode(train), np.uint8), np.concatenate([p[:-1] for p in parts]),
             np.concatenate([p[1:] for p in parts]))
  targets = len(tok.decode(windows[:, 1:].ravel()))

  def batch(step:int) -> tuple[np.ndarray, np.ndarray]:
    at = np.random.default_rng([args.seed, step]).integers(0, len(train)-L, args.batch)
    w = train[at[:, None] + np.arange(L+1)].astype(np.int32)
    return w[:, :-1], w[:, 1:]
  name = ", ".join(args.data) if args.data else "Python's standard library"
  return Task(f"{name}: {len(texts):,} file{'s'*(len(texts) != 1)}, {len(train)/1e6:.2f} M tokens to train on, "
              f"{len(held)/1e6:.3f} M held out ({args.tokenizer})", tok, batch,
              [(w[:, :-1], w[:, 1:]) for w in windows.reshape(-1, B, L+1)],
              len(train) / len(tok.decode(train)) / math.log(2), n*L / targets / math.log(2),
              bigram_bits(*pairs) / (targets if tok.name == "bytes" else len(pairs[1])))

TASKS = {"text": text_task}

# ---- optimiser ------------------------------------------------------------------------------------

def learning_rate(step:int, steps:int, peak:float, warmup:int) -> float:
  "Linear up to the peak over `warmup` steps, then a cosine down to a tenth of it. Steps count from 0."
  if step < warmup: return peak * (step+1) / warmup
  return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step-warmup) / max(1, steps-warmup))))

def group_of(name:str) -> int:
  """0: with weight decay; 1: without; 2: without, and its rate at most 1e-3: the SSMs' dynamics.
  The official grouping: safari/src/utils/optim_groups.py, configs/model/layer/h3.yaml."""
  if re.search(r"\.kernel\.(log_dt|inv_A_real|A_imag|B)$", name): return 2
  return int(name.endswith(".bias") or "norm" in name or "ln_f" in name or "embeddings" in name)

BETA1, BETA2, EPS = 0.9, 0.95, 1e-8

def sumsq_kernel(total:UOp, g:UOp) -> UOp:
  "total[i] += Σ_j g[i,j]²: g in as many slices as total is long, side by side on the CPU, interleaved on a GPU."
  n, T = g.numel(), total.numel()
  i, rows, total, g = UOp.range(T, 0), -(-n // T), total.flatten(), g.flatten()
  j = UOp.range(rows, 1, AxisType.REDUCE) if rows > 1 else UOp.const(0, dtypes.weakint)
  at = i*rows + j if T <= CPU_SLICES else j*T + i
  x = g[at] if n % T == 0 else g[at.valid(at < n)]
  s = (x*x).reduce(j, arg=Ops.ADD) if rows > 1 else x*x
  return total[i].store(total[i] + s).end(i).sink(arg=KernelInfo(name=f"sumsq_{n}"))

def adamw_kernel(p:UOp, m:UOp, v:UOp, g:UOp, hyper:UOp, sumsq:UOp) -> UOp:
  """One parameter's whole update, in place (Loshchilov & Hutter, arXiv 1711.05101).
  hyper: lr, lr * decay, 1/(1-β1^t), 1/(1-β2^t), clip."""
  n, p, m, v, g, sumsq = p.numel(), p.flatten(), m.flatten(), v.flatten(), g.flatten(), sumsq.flatten()
  i = UOp.range(n, 0)
  gi = g[i] * (hyper[4] / (sumsq[0].sqrt() + 1e-6)).minimum(1.0)       # the gradient, its global norm clipped
  mi, vi = BETA1*m[i] + (1-BETA1)*gi, BETA2*v[i] + (1-BETA2)*gi*gi
  pi = p[i] - hyper[0] * mi*hyper[2] / ((vi*hyper[3]).sqrt() + EPS) - hyper[1] * p[i]
  return UOp.group(p[i].store(pi), m[i].store(mi), v[i].store(vi)).end(i).sink(arg=KernelInfo(name=f"adamw_{n}"))

CPU_SLICES = 64

class AdamW:
  """AdamW with the gradient's global norm clipped, decay and learning rate by group.

  A kernel for the norm and one for the update a parameter, flattened, so that parameters of one size share
  them. tinygrad's own optimiser launches five times as many kernels, and the first two steps take the longer."""
  def __init__(self, params:dict[str, Tensor]):
    zeros = lambda p: Tensor(np.zeros(p.shape, np.float32), device=p.device).realize()
    self.params, self.m, self.v = params, *({k: zeros(p) for k, p in params.items()} for _ in "mv")

  def hyper(self, step:int, lr:float, weight_decay:float, clip:float, ssm_scale:float) -> list[Tensor]:
    "What changes with the step (from 0), (5,) for each group; ssm_scale: the third group's rate over lr."
    rest = [1 / (1 - BETA1**(step+1)), 1 / (1 - BETA2**(step+1)), clip]
    rows = [[lr, lr*weight_decay, *rest], [lr, 0, *rest], [lr*ssm_scale, 0, *rest]]
    return [Tensor(np.array(r, np.float32)).realize() for r in rows]

  def update(self, grads:dict[str, Tensor], hyper:list[Tensor]) -> Tensor:
    "One update from realised gradients; returns the gradient's norm before clipping. Can be part of a TinyJit."
    device = next(iter(grads.values())).device
    slices = Tensor.zeros(16384 if Device[device].renderer.has_local else CPU_SLICES).contiguous()
    for g in grads.values(): slices = slices.custom_kernel(g.flatten(), fxn=sumsq_kernel)[0]
    sumsq, state = slices.sum().reshape(1).contiguous(), []
    for k, p in self.params.items():
      old = [p, self.m[k], self.v[k]]
      new = Tensor.custom_kernel(*[t.flatten() for t in (*old, grads[k])], hyper[group_of(k)], sumsq, fxn=adamw_kernel)
      state += [t.replace(x.reshape(t.shape)) for t, x in zip(old, new)]
    norm = sumsq.sqrt()
    Tensor.realize(norm, *state)
    return norm

# ---- checkpoints ----------------------------------------------------------------------------------

def save(path:Path, model:H3LM, opt:AdamW, args:argparse.Namespace, step:int, log:"Log") -> None:
  tensors = get_state_dict(model) | {f"optim.{n}.{k}": t for n in "mv" for k, t in getattr(opt, n).items()}
  tensors |= {f"optim.rng.{d}": t for d, t in Tensor._device_rng_counters.items()}   # dropout's, if used
  meta = dict(model="h3", config=dataclasses.asdict(model.config), args=vars(args), step=step,
              tokenizer=args.tokenizer, losses=log.rows, held_out=log.evals, baseline=log.baseline)
  meta = {k: v if isinstance(v, str) else json.dumps(v) for k, v in meta.items()}
  try: save_checkpoint(str(path), tensors, meta)
  except OSError as e: raise UserError(f"can't write {path}: {e.strerror}") from None

def set_aside(path:Path) -> Path:
  "Moves a checkpoint to the first free number beside it; never over another, not even one that appears meanwhile."
  for i in itertools.count(1):
    aside = path.with_name(f"checkpoint.{i}.safetensors")
    try: os.close(os.open(aside, os.O_CREAT | os.O_EXCL))
    except FileExistsError: continue
    os.replace(path, aside)
    return aside

def restore(tensors:dict[str, Tensor], opt:AdamW, source:Path) -> None:
  for n in "mv":
    for k, t in getattr(opt, n).items():
      if (name := f"optim.{n}.{k}") not in tensors or tensors[name].shape != t.shape:
        raise CheckpointError(f"{source} lacks the optimiser's state ({name}): --init takes its weights alone")
      t.replace(tensors[name])
  for name, t in tensors.items():
    if (counter := Tensor._device_rng_counters.get(name.removeprefix("optim.rng."))) is not None:
      counter.assign(t.cast(counter.dtype)).realize()

def check_writable(out:Path) -> None:
  try:
    out.mkdir(parents=True, exist_ok=True)
    (probe := out / ".writable").touch()
    probe.unlink()
  except OSError as e:
    raise UserError(f"can't write to the folder {out}: {e.strerror}: name another with --out") from None

# ---- what is shown --------------------------------------------------------------------------------

def duration(seconds:float) -> str:
  s = round(seconds)
  return f"{s//3600}h{s//60%60:02d}m" if s >= 3600 else f"{s//60}m{s%60:02d}s" if s >= 60 else f"{s}s"

class Log:
  "The losses so far; the progress line; the CSV and the plot."
  def __init__(self, args:argparse.Namespace, task:Task):
    self.args, self.bits, self.baseline = args, task.bits, task.baseline
    self.rows: list[list[float]] = []             # step, loss in nats, lr
    self.evals: list[list[float]] = []            # step, held-out bits per byte
    self.live, self.begun, self.a_step = bool(sys.stdout and sys.stdout.isatty()), 0, 0.0
    self.restart_clock()

  def show(self, text:str, end:str="\n") -> None:
    try: print(text, end=end, flush=True)
    except BrokenPipeError: sys.stdout = open(os.devnull, "w")  # nobody reads any more: the training goes on
  def line(self, text:str) -> None:
    "A line that stays, over the progress line if there is one."
    self.show(("\r\x1b[K" if self.live else "") + text)

  def step(self, step:int, loss:float, lr:float) -> None:
    a = self.args
    self.rows.append([step, round(loss, 5), float(f"{lr:.4g}")])
    self.times = (self.times + [time.perf_counter()])[-21:]
    recent = [r[1] for r in self.rows[-10:]]                   # a step's loss alone jumps about
    mean = sum(recent) / len(recent)
    text = f"step {step:>{len(str(a.steps))}}/{a.steps}  loss {mean:.3f}  {mean*self.bits:.3f} bits/byte  lr {lr:.1e}"
    if len(self.rows) - self.begun > 2:                        # the first two compile and capture
      self.a_step = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
    if self.a_step:
      text += f"  {a.batch*a.length/self.a_step:,.0f} tokens/s  {duration((a.steps-step)*self.a_step)} left"
    if self.live:
      width = shutil.get_terminal_size().columns - 1
      bar = max(0, min(20, width - len(text) - 1))              # what the text leaves
      self.show("\r\x1b[K" + f"{'━'*(bar*step//a.steps):─<{bar}} {text}"[:width].strip(), end="")
    elif step % a.log_every == 0 or step in (1, a.steps): self.show(text)

  def restart_clock(self) -> None: self.times = [time.perf_counter()]

  def write(self, out:Path, title:str) -> str:
    "log.csv and loss.png; returns what to tell the user."
    try: return self.write_files(out, title)
    except OSError as e: return f"not the log ({e.filename}: {e.strerror})"

  def write_files(self, out:Path, title:str) -> str:
    held = dict(self.evals)
    with open(out / "log.csv", "w", newline="") as f:
      w = csv.writer(f)
      w.writerow(["step", "loss_nats", "bits_per_byte", "learning_rate", "held_out_bits_per_byte",
                  "bigram_bits_per_byte"])
      for step, loss, lr in self.rows:
        w.writerow([step, loss, round(loss*self.bits, 5), lr, held.get(step, ""), round(self.baseline, 5)])
    try: self.plot(out / "loss.png", title)
    except ImportError: return f"{out/'log.csv'} (pip install matplotlib, and the plot is drawn too)"
    return f"{out/'log.csv'}, {out/'loss.png'}"

  def plot(self, path:Path, title:str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    x, y = np.array([r[0] for r in self.rows]), np.array([r[1] for r in self.rows]) * self.bits
    near = np.ones(min(len(y), 1 + 2*(len(y)//80)))
    smooth = np.convolve(y, near, "same") / np.convolve(np.ones_like(y), near, "same")   # the neighbours' mean
    fig, ax = plt.subplots(figsize=(8, 4.8), dpi=150, layout="constrained")
    ax.plot(x, y, color="#4c78a8", alpha=0.25, lw=0.8)
    ax.plot(x, smooth, color="#4c78a8", lw=1.8, label="training")
    ax.axhline(self.baseline, color="#888888", ls="--", lw=1.2, label=f"byte bigrams, held out: {self.baseline:.2f}")
    if self.evals:
      ex, ey = zip(*self.evals)
      ax.plot(ex, ey, "o-", color="#e45756", ms=5, lw=1, label=f"held out: {ey[-1]:.2f} at the end")
    low = min([y.min(), self.baseline, *(e[1] for e in self.evals)])
    ax.set(xlabel="step", ylabel="bits per byte", xlim=(0, x[-1]*1.01), ylim=(low-0.2, max(y.max(), self.baseline)+0.2))
    ax.set_title(title, fontsize=10.5, loc="left")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    fig.savefig(path)
    plt.close(fig)

# ---- the loop -------------------------------------------------------------------------------------

def cross_entropy(logits:Tensor, targets:Tensor) -> Tensor:
  "Mean loss in nats: logits (B,L,V), targets (B,L)."
  picked = (targets.unsqueeze(-1) == Tensor.arange(logits.shape[-1])).where(logits, 0).sum(-1)
  return (logits.logsumexp(-1) - picked).mean()

class Interrupt:
  "While training, the first Ctrl-C, SIGTERM or SIGHUP waits for the step to end; a second one doesn't."
  signals = [getattr(signal, s) for s in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, s)]
  seen = 0
  def __enter__(self) -> "Interrupt":
    self.old = [signal.signal(s, self.note) for s in self.signals]
    return self
  def __exit__(self, *_) -> None:
    for s, old in zip(self.signals, self.old): signal.signal(s, old)
  def note(self, signum:int, frame) -> None:
    if self.seen: raise KeyboardInterrupt
    self.seen = signum
    print("\nfinishing the step, then saving; again to stop at once", file=sys.stderr, flush=True)

def describe(c:H3Config) -> str:
  kind = "h3" if not c.attn_layers else "transformer" if len(c.attn_layers) == c.n_layer else "hybrid"
  where = f", attention in {', '.join(map(str, c.attn_layers))}" if kind == "hybrid" else ""
  return f"{KINDS[kind]}, {c.n_layer} layers of width {c.d_model}{where}"

def to_tensors(*arrays:np.ndarray) -> list[Tensor]: return [Tensor(np.ascontiguousarray(a)).realize() for a in arrays]

def cut(batch:tuple[np.ndarray, np.ndarray], size:int) -> Iterator[list[Tensor]]:
  "Inputs and targets (B,L) in pieces of `size` tokens, one after the other."
  return (to_tensors(*(a[:, i:i+size] for a in batch)) for i in range(0, batch[0].shape[1], size))

def make_step(model:H3LM, params:dict[str, Tensor], opt:AdamW, truncate:int|None=None) -> Callable:
  """One step of training: a batch (inputs, targets) and `opt.hyper` to the loss and the gradient's norm.

  truncate: the batch goes through in pieces of so many tokens. The state is handed on, no gradient comes back
  through it (truncated backpropagation through time); the pieces' gradients are added up for one update."""
  @capture
  def whole(x:Tensor, y:Tensor, *hyper:Tensor) -> tuple[Tensor, Tensor]:
    with Context(TRAINING=1):
      loss = cross_entropy(model(x), y)
      grads = loss.gradient(*params.values())
      Tensor.realize(loss, *grads)                                     # all of them before any weight changes
      norm = opt.update(dict(zip(params, grads)), list(hyper))
    return loss, norm
  if truncate is None: return lambda batch, hyper: [t.item() for t in whole(*to_tensors(*batch), *hyper)]

  sums, state = [p.zeros_like().contiguous().realize() for p in params.values()], ()
  @capture
  def piece(x:Tensor, y:Tensor) -> Tensor:
    with Context(TRAINING=1):
      logits, after = model.forward(x, state)
      grads = (loss := cross_entropy(logits, y)).gradient(*params.values())
      Tensor.realize(loss, *grads, *after)
    hand_on((*state, *sums), (*after, *(s + g for s, g in zip(sums, grads))))
    return loss
  @capture
  def update(count:Tensor, *hyper:Tensor) -> Tensor:
    means = [(s / count).contiguous() for s in sums]
    norm = opt.update(dict(zip(params, means)), list(hyper))
    hand_on((*state, *sums), [t.zeros_like() for t in (*state, *sums)])
    return norm
  def train_step(batch:tuple[np.ndarray, np.ndarray], hyper:list[Tensor]) -> list[float]:
    nonlocal state
    state = state or model.init_state(len(batch[0]))[1:]
    losses = [piece(*xy).item() for xy in cut(batch, truncate)]
    return [float(np.mean(losses)), update(*to_tensors(np.float32([len(losses)])), *hyper).item()]
  return train_step

def make_eval(model:H3LM, truncate:int|None=None) -> Callable[[tuple[np.ndarray, np.ndarray]], float]:
  "A batch's mean loss in nats; truncate: read in pieces of so many tokens, as in training."
  @capture
  def whole(x:Tensor, y:Tensor) -> Tensor: return cross_entropy(model(x), y).realize()
  if truncate is None: return lambda batch: whole(*to_tensors(*batch)).item()

  state = ()
  @capture
  def piece(x:Tensor, y:Tensor) -> Tensor:
    logits, after = model.forward(x, state)
    Tensor.realize(loss := cross_entropy(logits, y), *after)
    hand_on(state, after)
    return loss
  def eval_step(batch:tuple[np.ndarray, np.ndarray]) -> float:
    nonlocal state
    state = state or model.init_state(len(batch[0]))[1:]
    hand_on(state, [t.zeros_like() for t in state])
    return float(np.mean([piece(*xy).item() for xy in cut(batch, truncate)]))
  return eval_step

def hand_on(old:Iterable[Tensor], new:Iterable[Tensor]) -> None:
  Tensor.realize(*[o.assign(n.detach()) for o, n in zip(old, new)])

def train(args:argparse.Namespace, tensors:dict[str, Tensor]|None=None, meta:dict[str, str]|None=None) -> int:
  "One run. tensors, meta: the checkpoint that --resume or --init names."
  out, path = Path(args.out), Path(args.out) / CHECKPOINT
  Tensor.manual_seed(args.seed)                        # dropout's; weights and batches are numpy's
  if args.embed_dropout or args.resid_dropout: Tensor.rand(1).realize()    # makes the counter that is saved
  task = TASKS[args.task](args)
  if tensors is None: model = H3LM(make_config(args, task.tokenizer.vocab_size), seed=args.seed)
  else:
    model = H3LM.from_checkpoint(tensors, meta, str(path) if args.resume else args.init)
    if model.config.vocab_size != task.tokenizer.vocab_size:
      raise UserError(f"the checkpoint's vocabulary is {model.config.vocab_size}, --tokenizer {args.tokenizer}'s "
                      f"{task.tokenizer.vocab_size}: give the tokenizer it was trained with")
    model.config.max_length = max(model.config.max_length, 2*args.length)
  params, log = get_state_dict(model), Log(args, task)
  opt, first = AdamW(params), 0
  if args.resume:
    restore(tensors, opt, path)
    first, log.rows, log.evals = int(meta["step"]), json.loads(meta["losses"]), json.loads(meta["held_out"])
    if first >= args.steps:
      raise UserError(f"the run in {out} has done its {first} steps: give more with --steps, "
                      "or another --out to start afresh")
  if args.truncate and model.config.attn_layers:
    raise UserError("--truncate hands on the state of H3 layers, attention has none: give --model h3 too")
  if args.truncate and args.length % args.truncate:
    raise UserError(f"--truncate {args.truncate} does not divide --length {args.length}: give one that does")
  check_writable(out)
  count = sum(p.numel() for p in params.values())
  title = f"{describe(model.config)}, {count/1e6:.2f} M parameters"
  print(f"{title}, on {Device.DEFAULT}{'' if FLASH else ' without custom kernels (FLASH=0)'}")
  print(task.about)
  print(f"{args.steps} steps of {args.batch} x {args.length} = {args.batch*args.length:,} tokens"
        + (f", the gradient within {args.truncate}" if args.truncate else "")
        + (f", going on after step {first}" if args.resume else ""), flush=True)

  train_step, eval_step = make_step(model, params, opt, args.truncate), make_eval(model, args.truncate)
  def finite(step:int, *values:float) -> None:
    if not all(map(math.isfinite, values)):
      raise UserError(f"the loss or the gradient is not finite at step {step}: take a smaller --lr "
                      "(checkpoints stay as they were)")
  def held_out(batches:list) -> float: return float(np.mean([*map(eval_step, batches)]))
  def evaluate(step:int) -> None:
    finite(step, nats := held_out(task.held_out))
    log.evals.append([step, round(nats*task.held_out_bits, 5)])
    log.line(f"step {step}: held out {log.evals[-1][1]:.3f} bits per byte")
    log.restart_clock()

  with Interrupt() as interrupt:
    log.begun, saved = len(log.rows), False
    for step in range(first, args.steps):
      lr = learning_rate(step, args.steps, args.lr, args.warmup)
      hyper = opt.hyper(step, lr, args.weight_decay, args.clip, min(1e-3, args.lr) / args.lr)
      loss, norm = train_step(task.batch(step), hyper)
      if step == first: log.line(f"first step after {time.perf_counter()-START:.1f} s")
      finite(step+1, loss, norm)
      log.step(step+1, loss, lr)
      if step - first < 2: log.restart_clock()
      last = step+1 == args.steps
      saving = interrupt.seen or (step+1) % args.save_every == 0 or last
      if last or (step+1) % args.eval_every == 0: evaluate(step+1)
      elif saving: finite(step+1, held_out(task.held_out[:1]))         # never weights that have blown up
      if saving:
        if not saved and not args.resume and path.exists():
          log.line(f"the checkpoint that was in {out} is now {set_aside(path).name}")
        save(path, model, opt, args, step+1, log)
        saved = True
      if interrupt.seen and not last:
        log.write(out, title)
        log.line(f"stopped after step {step+1} of {args.steps}, saved {path}")
        log.line(f"go on with: python train.py --resume --out {out}")
        return 128 + interrupt.seen

  files = log.write(out, title)
  if args.sample:
    prompt = "def " if not args.data and args.tokenizer == "bytes" else ""
    print("\n--- a sample ---")
    try: write(model, task.tokenizer, [prompt], args.sample, temperature=0.7, seed=args.seed, max_length=args.sample+8)
    except KeyboardInterrupt: print()
    print("---")
  print(f"\nheld out: {log.evals[-1][1]:.3f} bits per byte; a byte-bigram model: {task.baseline:.3f}")
  print(f"wrote {path}, {files}; {duration(time.perf_counter()-START)} in all")
  print("more text: python generate.py" + ("" if args.out == OUT else f" --model {out}"))
  return 0

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
  import resource
  unit = 1e6 if sys.platform == "darwin" else 1e3
  def peak() -> float: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
  args = parser().parse_args(BENCH[what].split())
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

def settle(argv:list[str]|None) -> tuple[argparse.Namespace, dict|None, dict|None]:
  "The options, completed by the checkpoint that --resume or --init names, and that checkpoint."
  args, now = parser().parse_args(argv), given(argv)
  setup_device()                                       # not before: --help and a wrong option need none
  check_kernels()
  tensors = meta = None
  if args.resume and args.init: raise UserError("--resume goes on with a run, --init starts one: give one of them")
  if args.resume or args.init:
    path = Path(args.out) / CHECKPOINT if args.resume else Path(args.init)
    if not path.is_file():
      raise UserError(f"no checkpoint at {path}: "
                      + ("leave --resume out to start a run" if args.resume else "--init takes a file"))
    tensors, meta = read_checkpoint(str(path))
    if meta.get("model") != "h3" or not {"config", "args", "step"} <= meta.keys():
      raise CheckpointError(f"{path} is not a checkpoint of train.py")
    try:
      config = json.loads(meta["config"])
      old = NEWER | json.loads(meta["args"]) | {k: config[k] for k in SHAPE}
      if args.resume:
        int(meta["step"])
        if not all(len(row) == n for name, n in (("losses", 3), ("held_out", 2)) for row in json.loads(meta[name])) \
           or not vars(args).keys() <= old.keys(): raise ValueError
    except (KeyError, TypeError, ValueError): raise CheckpointError(f"{path}: its metadata are damaged") from None
    keep = set(vars(args)) if args.resume else {*SHAPE, "model", "size", "tokenizer"}
    for k in keep:
      if k not in now: setattr(args, k, old[k])
      elif now[k] != old[k] and k in (FIXED if args.resume else (*SHAPE, "model", "size")):
        raise UserError(f"--{k.replace('_', '-')} {now[k]} differs from the checkpoint's {old[k]}: "
                        "leave it out, or start afresh")
    args.resume, args.out, args.init = "resume" in now, now.get("out", OUT), now.get("init")
  if args.lr is None: args.lr = SIZES[args.size]["lr"]
  if args.warmup is None: args.warmup = min(1000, args.steps//10)
  if args.eval_every is None: args.eval_every = -(-args.steps//8)
  if args.save_every is None: args.save_every = args.eval_every
  if args.log_every is None: args.log_every = max(1, args.steps//20)
  return args, tensors, meta

def main(argv:list[str]|None=None) -> int:
  if hasattr(sys.stdout, "reconfigure"): sys.stdout.reconfigure(errors="replace")
  try: return bench() if hasattr(parser().parse_args(argv), "bench") else train(*settle(argv))
  except (UserError, CheckpointError) as e: parser().error(str(e))
  except MemoryError: parser().error("not enough memory: take a smaller --batch, --length or model")
  except OSError as e:
    if e.filename is None: raise
    parser().error(f"{e.filename}: {e.strerror}")
  except KeyboardInterrupt:
    print("\nstopped at once: nothing was saved that was not before", file=sys.stderr)
    return 130

if __name__ == "__main__": sys.exit(main())
