"""Surrounds the plain training step of train.py, so that it can stay plain.

From top to bottom: the optimizer and its two kernels; what wraps the plain step or takes the place
of one of its stages (half precision, several devices, parts, truncation, gradient checkpointing);
what a run will take in memory and time; and what keeps a run alone in its folder and its
checkpoints whole.
"""
from __future__ import annotations
import contextlib, functools, itertools, json, math, os, re, sys, time
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence
import numpy as np
from tinygrad import Device, GlobalCounters, Tensor, UOp, dtypes
from tinygrad.dtype import DType
from tinygrad.helpers import Context
from tinygrad.nn.state import get_parameters, get_state_dict
from tinygrad.uop.ops import AxisType, KernelInfo, Ops
from bigs_tiny import BiGS
import flashconv
from flashconv import capture, fill, machine, overwrite, to_device
from h3tiny import H3LM, move_on
from support.checkpoints import (CHECKPOINT, CheckpointError, Weights, read_weights,
                                 save_checkpoint)
from support.text import UserError, free_memory, peak_memory, waiting

Model = H3LM | BiGS
Batch = tuple[np.ndarray, ...]
Devices = str | tuple[str, ...]
Gradients = Callable[..., tuple[Tensor, list[Tensor]]]     # (*batch) -> loss, its gradients
Step = Callable[[Batch, list[Tensor]], list[float]]        # (batch, hyper) -> loss, gradient norm

# ---- arrays on devices --------------------------------------------------------------------------

def tensor_on(device:Devices, x:np.ndarray, split:bool=False) -> Tensor:
  "Makes a Tensor on a device, or whole on each of several; split: its rows shared among them."
  if isinstance(device, str): return to_device(x, device)
  return to_device(x).shard(device, 0 if split else None).realize()

def zeros_like(params:Iterable[Tensor]) -> list[Tensor]:
  return [tensor_on(p.device, np.zeros(p.shape, np.float32)) for p in params]

class Feed:
  """Arrays as Tensors, each made once for its position and shape and then overwritten: making one
  takes a millisecond, as long as a small model's whole step."""
  def __init__(self, device:Devices):
    self.device, self.kept = device, {}

  def __call__(self, position:int, x:np.ndarray, split:bool=False) -> Tensor:
    if not isinstance(self.device, str): return tensor_on(self.device, x, split)
    key = position, x.shape, x.dtype
    if key in self.kept: fill(self.kept[key], x)
    else: self.kept[key] = tensor_on(self.device, x)
    return self.kept[key]

  def batch(self, arrays:Batch) -> list[Tensor]:
    return [self(i, x, split=True) for i, x in enumerate(arrays)]

# ---- the optimizer ------------------------------------------------------------------------------

BETA1, BETA2, EPS = 0.9, 0.95, 1e-8
MASKED = dict(beta2=0.98, eps=1e-6)              # of masked language models (BiGS, pretrain.py)
DECAYED, UNDECAYED, DYNAMICS = range(3)          # groups of parameters
CPU_SLICES, GPU_SLICES = 64, 16384

def group_of(name:str) -> int:
  """Returns a parameter's group: with weight decay, without, or without and at a rate of at most
  1e-3, which is for what governs an SSM's dynamics.

  H3's official grouping: safari/src/utils/optim_groups.py, configs/model/layer/h3.yaml. BiGS
  decays all but biases and norms: pretrain.py:384-404."""
  if re.search(r"\.kernel\.(log_dt|inv_A_real|A_imag|B)$", name): return DYNAMICS
  if name.startswith(("bigs.", "cls.", "classifier.")):
    plain = name.endswith("bias") or "norm" in name.lower()
  else:
    plain = name.endswith(".bias") or any(k in name for k in ("norm", "ln_f", "embeddings"))
  return UNDECAYED if plain else DECAYED

class Hyper(NamedTuple):
  "The numbers that change with the step, for one group of parameters; as a Tensor, (6,)."
  lr: float
  decay: float                                   # lr times the weight decay
  unbias_m: float                                # 1/(1-β1^t)
  unbias_v: float                                # 1/(1-β2^t)
  clip: float                                    # largest norm of the whole gradient
  unscale: float                                 # 1/(what the loss was multiplied by)

UNSCALE = Hyper._fields.index("unscale")

@functools.cache                                 # built once for all parameters of a size
def sumsq_kernel(total:UOp, g:UOp) -> UOp:
  """Adds Σ_j g[i,j]² to total[i].

  g is cut into as many slices as total is long: side by side on the CPU, interleaved on a GPU."""
  n, T = g.numel(), total.numel()
  rows = -(-n // T)
  total, g = total.flatten(), g.flatten()
  i = UOp.range(T, 0)
  # a sum over one row is none to tinygrad
  j = UOp.range(rows, 1, AxisType.REDUCE) if rows > 1 else UOp.const(0, dtypes.weakint)
  at = i*rows + j if T <= CPU_SLICES else j*T + i
  x = g[at] if n % T == 0 else g[at.valid(at < n)]
  s = (x*x).reduce(j, arg=Ops.ADD) if rows > 1 else x*x
  return total[i].store(total[i] + s).end(i).sink(arg=KernelInfo(name=f"sumsq_{n}"))

@functools.cache
def adamw_kernel(p:UOp, m:UOp, v:UOp, g:UOp, hyper:UOp, sumsq:UOp, beta2:float, eps:float) -> UOp:
  """Updates one parameter and its moments in place (Loshchilov & Hutter, arXiv 1711.05101). A
  gradient that is not finite changes nothing."""
  n = p.numel()
  i = UOp.range(n, 0)
  p, m, v, g = (t.flatten()[i] for t in (p, m, v, g))               # one weight and what is its
  h = Hyper(*(hyper[k] for k in range(len(Hyper._fields))))
  norm = sumsq[0].sqrt()*h.unscale                                  # of the whole gradient
  clip = (h.clip / (norm + 1e-6)).minimum(1.0)
  g = g * (clip*h.unscale)
  new_m = BETA1*m + (1-BETA1)*g
  new_v = beta2*v + (1-beta2)*g*g
  step = new_m*h.unbias_m / ((new_v*h.unbias_v).sqrt() + eps)
  new_p = p - h.lr*step - h.decay*p
  finite = sumsq[0].load() < math.inf
  def update(old, new): return old.store(finite.where(new, old.load()))
  stores = map(update, (p, m, v), (new_p, new_m, new_v))
  return UOp.group(*stores).end(i).sink(arg=KernelInfo(name=f"adamw_{n}"))

class AdamW:
  """AdamW with the gradient's global norm clipped, decay and learning rate by group.

  One kernel for the norm and one for the update of a parameter, flattened, so that parameters of
  one size share them: tinygrad's own optimizer launches five times as many."""
  def __init__(self, params:dict[str, Tensor], beta2:float=BETA2, eps:float=EPS):
    self.params, self.beta2, self.eps = params, beta2, eps
    self.device = next(iter(params.values())).device
    self.m, self.v = (dict(zip(params, zeros_like(params.values()))) for _ in "mv")
    self.feed = Feed(self.device)

  def hyper(self, step:int, lr:float, weight_decay:float, clip:float, ssm_scale:float,
            scale:float=1.0) -> list[Tensor]:
    """Returns `Hyper` for each group. step: from 0; ssm_scale: the rate of the SSMs' dynamics over
    lr; scale: what the loss is multiplied by."""
    unbias_m, unbias_v = (1 / (1 - beta**(step+1)) for beta in (BETA1, self.beta2))
    plain = Hyper(lr, 0, unbias_m, unbias_v, clip, 1 / scale)
    groups = [plain._replace(decay=lr*weight_decay), plain, plain._replace(lr=lr*ssm_scale)]
    return [self.feed(i, np.array(h, np.float32)) for i, h in enumerate(groups)]

  def update(self, grads:list[Tensor], hyper:list[Tensor]) -> Tensor:
    """Updates the parameters from realised gradients in their order; returns the gradient's norm
    before clipping. Can be part of a TinyJit."""
    n_slices = GPU_SLICES if machine(self.device).gpu else CPU_SLICES
    slices = Tensor.zeros(n_slices, device=self.device).contiguous()
    for g in grads: slices = slices.custom_kernel(g.flatten(), fxn=sumsq_kernel)[0]
    sumsq = slices.sum().reshape(1).contiguous()
    kernel = functools.partial(adamw_kernel, beta2=self.beta2, eps=self.eps)
    updated = []
    for (name, p), g in zip(self.params.items(), grads):
      old = [p, self.m[name], self.v[name]]
      inputs = [t.flatten() for t in (*old, g)]
      new = Tensor.custom_kernel(*inputs, hyper[group_of(name)], sumsq, fxn=kernel)
      updated += [t.replace(x.reshape(t.shape)) for t, x in zip(old, new)]
    norm = sumsq.sqrt() * hyper[0][UNSCALE]
    Tensor.realize(norm, *updated)
    return norm

# ---- half precision -----------------------------------------------------------------------------

PRECISIONS = ("float32", "float16", "bfloat16")

@contextlib.contextmanager
def half_precision(dtype:str) -> Iterator[None]:
  """While active, products with weights take in numbers of this type, and on a GPU the convolutions
  do, half the bytes, and on tensor cores the products' gradients; all sums stay float32."""
  linear, low = Tensor.linear, {"float16": dtypes.half, "bfloat16": dtypes.bfloat16}.get(dtype)
  def low_linear(x:Tensor, weight:Tensor, bias:Tensor|None=None, dtype:DType|None=None) -> Tensor:
    if dtype is None and x.dtype == weight.dtype == dtypes.float:
      x, weight, dtype = x.cast(low), weight.cast(low), dtypes.float
    return linear(x, weight, bias, dtype)
  narrow = flashconv.narrow
  if low: Tensor.linear, flashconv.narrow = low_linear, low
  try: yield
  finally: Tensor.linear, flashconv.narrow = linear, narrow

class LossScale:
  """The factor of the loss that keeps small gradients from vanishing in float16: half as much after a
  gradient that is not finite, twice as much after 1,000 that were (Micikevicius et al., arXiv
  1710.03740). 1 for other types."""
  def __init__(self, dtype:str):
    self.on = dtype == "float16"
    self.value, self.good = 65536.0 if self.on else 1.0, 0

  def accepts(self, finite:bool) -> bool:
    """Takes note of a gradient. Returns False where it is not finite and a smaller scale, as far as
    can be known, would not have helped."""
    if not self.on: return finite
    self.good = self.good + 1 if finite else 0
    if self.good == 1000: self.value, self.good = min(2.0**24, self.value*2), 0
    if finite: return True
    if self.value <= 1: return False
    self.value /= 2
    return True

def check_precision(dtype:str) -> None:
  "Raises UserError where the device, or its compiler, can't multiply such numbers."
  if dtype == "float32": return
  x = Tensor.full((64, 64), 0.5).contiguous().realize()    # as large as the products of a model
  try:
    with half_precision(dtype): y = x.linear(x)
    dx, = y.sum().gradient(x)
    Tensor.realize(y, dx)
    if (y != 16).any().item() or (dx != 64).any().item(): raise ValueError
  except Exception:                              # a compiler raises anything
    raise UserError(f"--dtype {dtype}: the device {Device.DEFAULT}, or its compiler, does not know "
                    "such numbers: leave it out") from None

# ---- parts and devices --------------------------------------------------------------------------
# A step that goes through its batch in parts, or on several devices, adds up gradients of parts. So
# that the sum is the gradient of the whole batch's mean loss, each part's loss is multiplied by its
# share of the targets, an array that goes before the batch's own.

def weigh(batch:Batch, total:int, count:Callable[[Batch], int], devices:int, scale:float) -> Batch:
  """Puts before a batch the weight of its loss on each device, (devices,): the share of its rows
  there of the `total` targets, times the loss scale."""
  of_devices = zip(*(np.split(a, devices) for a in batch))
  shares = np.array([count(rows) / total for rows in of_devices], np.float32)
  return np.float32(scale)*shares, *batch

def weighted(forward:Callable) -> Callable:
  "Wraps a task's `forward`: takes the batch with the weight in front, returns the loss times it."
  return lambda model, weight, *batch: (forward(model, *batch)[0] * weight.reshape(()),)

def open_devices(n:int) -> tuple[str, ...]|None:
  "Opens the first n devices of the kind that tinygrad has found; None if it is one. UserError."
  if n == 1: return None
  names = tuple(Device.canonicalize(f"{Device.DEFAULT}:{i}") for i in range(n))
  for name in names:
    try: Device[name]
    except Exception as e:                       # a driver raises anything
      why = f"{type(e).__name__}: {e}".split("\n")[0]
      raise UserError(f"--devices {n}: there is no device {name} ({why})") from None
  return names

def on_devices(devices:tuple[str, ...], gradients:Gradients, update:Callable
               ) -> tuple[Gradients, Callable]:
  """Wraps both stages of a step for parameters that are whole on each of several devices: each goes
  through rows of its own, and the gradients are summed before the update."""
  own = lambda t: Tensor(t.uop.src[0])                              # on each device, its part of t
  summed = lambda t: Tensor(t.uop.allreduce(Ops.ADD, devices))
  def own_gradients(*batch):
    loss, grads = gradients(*map(own, batch))
    return summed(loss), grads
  def common_update(grads, hyper):
    return update([summed(g).contiguous() for g in grads], hyper)
  return own_gradients, common_update

def accumulated(gradients:Gradients, update:Callable, params:list[Tensor],
                parts:Callable[[Batch], Iterable[Batch]]) -> Step:
  """Takes the place of the plain step: goes through `parts` of the batch one after the other, in
  the memory that one needs, and adds up their gradients for one update."""
  feed, sums = Feed(params[0].device), zeros_like(params)
  @capture
  def add(*part):
    with Context(TRAINING=1):
      loss, grads = gradients(*part)
      Tensor.realize(loss, *grads)
    overwrite(sums, [s + g for s, g in zip(sums, grads)])
    return loss
  @capture
  def finish(*hyper):
    norm = update(sums, list(hyper))
    overwrite(sums, [s.zeros_like() for s in sums])
    return norm
  def step(batch, hyper):
    loss = sum(add(*feed.batch(part)).item() for part in parts(batch))
    return [loss, finish(*hyper).item()]
  return step

# ---- truncated backpropagation ------------------------------------------------------------------

def pieces(batch:Batch, size:int) -> Iterator[Batch]:
  "Cuts inputs and targets (B,L) into pieces of `size` tokens, one after the other."
  for i in range(0, batch[0].shape[1], size): yield tuple(a[:, i:i+size] for a in batch)

class CarriedState:
  """The state of a model's H3 layers, carried as a constant from one piece of a sequence to the
  next."""
  def __init__(self, model:H3LM, device:Devices, loss_of:Callable):
    self.model, self.device, self.loss_of, self.state = model, device, loss_of, None

  def reset(self, rows:int) -> None:
    "Starts new sequences."
    if self.state is None:
      self.state = self.model.init_carry(rows)
      if not isinstance(self.device, str):
        for t in get_parameters(self.state): t.shard_(self.device).realize()
    tensors = get_parameters(self.state)
    overwrite(tensors, [t.zeros_like() for t in tensors])

  def loss(self, tokens:Tensor, targets:Tensor) -> tuple[Tensor, Sequence]:
    "Returns a piece's mean loss and the state after it."
    logits, after = self.model.forward(tokens, self.state)
    return self.loss_of(logits, targets), after

def truncated(carried:CarriedState, params:list[Tensor]) -> Gradients:
  """Takes the place of forward and backward: the state goes on from each piece to the next, no
  gradient comes back through it (truncated backpropagation through time)."""
  def gradients(weight, tokens, targets):
    loss, after = carried.loss(tokens, targets)
    loss = loss * weight.reshape(())
    grads = loss.gradient(*params)
    move_on(carried.state, after, loss, *grads)
    return loss, grads
  return gradients

def truncated_eval(carried:CarriedState, make_eval:Callable, size:int) -> Callable:
  "Wraps the plain evaluation: reads a batch in pieces, as in training."
  def forward(model, tokens, targets):
    loss, after = carried.loss(tokens, targets)
    move_on(carried.state, after, loss)
    return (loss,)
  of_piece = make_eval(carried.model, forward)
  def evaluate(batch):
    carried.reset(len(batch[0]))
    return [np.mean([of_piece(p)[0] for p in pieces(batch, size)])]
  return evaluate

# ---- gradient checkpointing ---------------------------------------------------------------------

def gradient_checkpointing(model:H3LM, params:list[Tensor], loss_of:Callable) -> Gradients:
  """Takes the place of forward and backward: keeps only what goes into each layer, and computes the
  rest once more on the way back, layer by layer (Chen et al., arXiv 1604.06174)."""
  backbone = model.backbone
  words = backbone.embeddings.word_embeddings.weight                # the head's weights as well
  weights_of = lambda part: [*get_state_dict(part).values()]
  keep = lambda t: t.contiguous().realize()
  def gradients(weight, tokens, targets):
    found: dict[int, Tensor] = {}                                   # by the parameter's id
    def backward(out, weights, dy, *inputs):
      "From the gradient of `out`: keeps those of `weights`, returns that of the last input."
      grads = out.gradient(*weights, *inputs, gradient=dy)
      Tensor.realize(loss, *grads)
      for p, g in zip(weights, grads):
        found[id(p)] = keep(found[id(p)] + g) if id(p) in found else g
      return grads[-1]
    inputs = [keep(model.embed(tokens))]
    for layer in backbone.layers: inputs.append(keep(layer(inputs[-1])[0]))
    x = inputs.pop().detach()
    loss = loss_of(model.head(x), targets) * weight.reshape(())
    dy = backward(loss, [*weights_of(backbone.ln_f), words], None, x)
    for layer in reversed(backbone.layers):
      x = inputs.pop().detach()
      dy = backward(layer(x)[0], weights_of(layer), dy, x)
    backward(model.embed(tokens), weights_of(backbone.embeddings), dy)
    return loss, [found[id(p)] for p in params]
  return gradients

# ---- what a run will take -----------------------------------------------------------------------

STATE = 16            # bytes a parameter: itself, its gradient, two moments, in float32
KEPT = 16             # float32 that a step keeps a token, layer and channel, at least; seen: 23-55

def duration(seconds:float) -> str: return str(timedelta(seconds=round(seconds)))

def size(n:float) -> str: return f"{n/1e9:,.2f} GB" if n >= 1e8 else f"{n/1e6:,.1f} MB"

def check_memory(args:Namespace, shape:tuple[int, int], vocab_size:int, start:Saved|None) -> None:
  """UserError where the CPU's memory is too small for a step, by a low count of what that takes.
  shape: of a batch. start: the checkpoint that has the weights."""
  if Device.DEFAULT != "CPU": return
  if start: n = sum(math.prod(t.shape) for k, t in start.tensors.items() if k[:6] != "optim.")
  else: n = args.d_model * (12*args.d_model*args.n_layer + vocab_size)            # about
  rows, length = shape
  tokens = rows * min(length, args.truncate or length) // args.accumulate
  layers = 1 if args.checkpoint_activations else args.n_layer or 0
  state, kept = STATE*n, 4*tokens*(KEPT*(args.d_model or 0)*layers + vocab_size)
  free = free_memory()
  if state + kept <= free or math.isnan(free): return
  smaller = "--size, --d-model or --n-layer"
  if state < free: smaller = "--batch, --length or --size, or a larger --accumulate"
  raise UserError(f"a step takes more than {size(state + kept)}, {size(state)} of it for about "
                  f"{n/1e6:,.0f} M parameters with their gradients and moments, and {size(free)} "
                  f"of memory are free: take a smaller {smaller}")

def has_dropout(args:Namespace) -> bool:
  return bool(args.embed_dropout or args.resid_dropout or args.attn_dropout)

def estimate(run, before:float) -> int:
  """Tries four steps and an evaluation of train.py's Run; prints what the whole of it will take.
  before: bytes of memory at the peak until the model was made."""
  args, task = run.args, run.task
  def timed(f, *inputs):
    begin = time.perf_counter()
    f(*inputs)
    return time.perf_counter() - begin
  def step(i): run.step(task.batch(i), run.hyper(i))
  run.announce()
  # the first two compile and capture
  with waiting("the first step"):
    *compiling, one, two = (timed(step, i) for i in range(run.first, run.first + 4))
  first_evaluation, evaluation = (timed(run.outputs, task.held_out[0]) for _ in range(2))
  a_step, steps = (one + two)/2, args.steps - run.first
  evaluations = -(-steps // args.eval_every)
  state = STATE*sum(p.numel() for p in run.params.values())
  memory = f"{size(GlobalCounters.mem_used)} on the device, {size(state)} of it"
  others = ""
  if Device.DEFAULT == "CPU":
    peak = peak_memory()
    memory = f"{size(peak)} at the peak, {size(free_memory())} more are free; {size(state)} of it"
    others = (f", {size(before)} the program and its data, {size(max(0, peak-before-state))} the "
              "activations and what else a step takes")
  print(f"memory: {memory} the weights, gradients and moments{others}\n"
        f"time: {a_step:.3g} s a step; {duration(steps*a_step)} for {steps:,} steps and "
        f"{duration(evaluations*len(task.held_out)*evaluation)} for {evaluations} evaluations, "
        f"after {duration(sum(compiling) + first_evaluation)} of compiling")
  less = []
  if args.batch % (2*args.accumulate*args.devices) == 0:
    less.append(f"--accumulate {2*args.accumulate}")
  dropout = has_dropout(args)
  if args.task == "text" and not (args.checkpoint_activations or args.truncate or dropout):
    less.append("--checkpoint-activations")
  if less: print(f"half the activations: {' or '.join(less)}")
  faster = [f"--batch {args.batch//2}"]*(args.batch > 1) + [f"--length {args.length//2}"]
  print(f"half the time: {' or '.join(faster)}; a smaller --size takes less of both")
  return 0

# ---- a run's folder and checkpoints -------------------------------------------------------------

PREVIOUS = "checkpoint.previous.safetensors"     # the one before the newest

@contextlib.contextmanager
def lock_run_directory(out:Path) -> Iterator[None]:
  "Keeps other runs out of a folder; the system lets go of it when the process dies. UserError."
  try: import fcntl
  except ImportError:                            # Windows has no such lock
    yield
    return
  folder = os.open(out, os.O_RDONLY)
  try:
    try: fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      error = UserError(f"another run trains into {out}: wait for it, or give another --out")
      raise error from None
    except OSError: pass                         # nor has every file system
    yield
  finally: os.close(folder)

def check_writable(*folders:Path) -> None:
  "Makes folders; UserError where nothing can be written into them."
  for folder in folders:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      probe = folder / ".writable"
      probe.touch()
      probe.unlink()
    except OSError as e:
      raise UserError(f"can't write to the folder {folder}: {e.strerror}: name another") from None

def training_state(model:Model, opt:AdamW) -> dict[str, Tensor]:
  "All that training changes, by its names in a checkpoint; dropout's counters once it was used."
  moments = {f"optim.{n}.{k}": t for n in "mv" for k, t in getattr(opt, n).items()}
  counters = {f"optim.rng.{d}": t for d, t in Tensor._device_rng_counters.items()}
  return get_state_dict(model) | moments | counters

def save_beside_previous(path:Path, tensors:dict[str, Tensor], meta:dict[str, str]) -> None:
  """Writes a checkpoint whole or not at all; the one that was there stays beside it as PREVIOUS.
  OSError, and both are as they were."""
  previous = path.with_name(PREVIOUS)
  def keep_old():
    if not path.exists(): return
    linked = path.with_name(f"{PREVIOUS}.{os.getpid()}.tmp")
    try: os.link(path, linked)                   # a second name: there is a checkpoint at any time
    except OSError: os.replace(path, previous)   # a file system without such
    else: os.replace(linked, previous)
  save_checkpoint(str(path), tensors, meta, keep_old)

def set_aside(path:Path) -> Path:
  """Moves a checkpoint to a name beside it that says when it was written, its model and its steps,
  never over another, be it a new one: numbered then."""
  what = time.strftime("%Y-%m-%d-%H%M", time.localtime(path.stat().st_mtime))
  with contextlib.suppress(CheckpointError, KeyError, TypeError, ValueError):    # it may be damaged
    meta = read_weights(path)[1]
    name = re.sub(r"[^\w-]", "", json.loads(meta["args"])["model"])
    what += f".{name}-{int(meta['step'])}-steps"
  for i in itertools.count(1):
    aside = path.with_name(f"checkpoint.{what}{f'_{i}'*(i > 1)}.safetensors")
    try: os.close(os.open(aside, os.O_CREAT | os.O_EXCL))
    except FileExistsError: continue
    os.replace(path, aside)
    return aside

class Saved(NamedTuple):
  "A checkpoint as it was read."
  path: Path
  tensors: Weights
  meta: dict[str, str]

def read_newest(out:Path, rename:bool=True) -> Saved:
  """Reads the newest checkpoint of a run whose bytes are all as they were written. CheckpointError
  if none is. rename: give a damaged one another name."""
  found = [p for p in (out/CHECKPOINT, out/PREVIOUS) if p.is_file()]
  error = None
  for path in found:
    try:
      tensors, meta = read_weights(path)
      for t in tensors.values(): t.check()
    except CheckpointError as e:
      error = error or e
      continue
    if error and rename:
      damaged = out/f"{CHECKPOINT}.damaged"
      os.replace(found[0], damaged)
      print(f"{error} It is now {damaged.name}; going on from the one before it", file=sys.stderr)
    return Saved(path, tensors, meta)
  raise error or UserError(f"no checkpoint at {out/CHECKPOINT}: leave --resume out to start a run")

def restore(start:Saved, state:dict[str, Tensor]) -> None:
  "Fills a training state in place. CheckpointError where something is missing."
  tensors = start.tensors
  for k, t in state.items():
    if k not in tensors and k.startswith("optim.rng."): continue
    if k not in tensors or math.prod(tensors[k].shape) != t.numel():
      raise CheckpointError(f"{start.path} lacks the optimizer's state ({k}): --init takes its "
                            "weights alone")
  for k, t in state.items():
    if k in tensors: fill(t, tensors[k].numpy().astype(t.numpy().dtype, copy=False))
