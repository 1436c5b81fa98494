"""Training's machinery: the optimiser's kernels, and what keeps a run alone in its folder and whole.
"""
from __future__ import annotations
import argparse, contextlib, functools, itertools, math, os, re, signal, sys
from pathlib import Path
from typing import Callable, Iterable, Iterator
import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.device import Buffer
from tinygrad.uop.ops import AxisType, KernelInfo, Ops
from flashconv import machine
from support.checkpoints import CHECKPOINT, CheckpointError, Weights, read_weights
from support.text import UserError

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

PREVIOUS = "checkpoint.previous.safetensors"       # the one before the newest

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

def hand_on(old:Iterable[Tensor], new:Iterable[Tensor]) -> None:
  if pairs := [*zip(old, new)]: Tensor.realize(*[o.assign(n.detach()) for o, n in pairs])
