"""Every benchmark: beside plain tinygrad (FLASH=0), and beside PyTorch where it is installed.

  python support/bench.py                all of them in turn, each in a process of its own
  python support/bench.py conv           the fused convolution, length by length
  python support/bench.py states         the same by state passing, at great lengths
  python support/bench.py train          steps of training and of decoding, their time and memory
  python support/bench.py generate       prompt and decoding throughput: H3, hybrid, Transformer
  python support/bench.py start          the time from a program's start to its first step

Contestants take turns and the least of their times counts, so that ratios hold on a machine that is
busy now and then: compare within one run. `torch_fftconv` and `TorchLM` are the same convolution and
the same model as a user of PyTorch would write them; the tests use them too.
"""
from __future__ import annotations
import argparse, dataclasses, json, os, subprocess, sys, tempfile, threading, time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Callable, Mapping, NamedTuple
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import numpy as np
from tinygrad import Device, GlobalCounters, Tensor, TinyJit
from tinygrad.helpers import Context
from tinygrad.nn.state import get_state_dict
import train
from flashconv import FLASH, MAX_N, fftconv, ssm_conv
from generate import Session
from h3tiny import H3Config, H3LM
from support import cpu, training
from support.text import Parser, UserError, number, peak_memory
try:
  import torch
  import torch.nn.functional as F
  from torch import Tensor as TorchTensor
  torch.set_num_threads(os.cpu_count())
except ImportError: torch = None

LONGEST = MAX_N // 2                     # rows that fftconv's kernels take on a CPU

# ---- the same in PyTorch --------------------------------------------------------------------------

def torch_fftconv(w:TorchTensor, k:TorchTensor, D:TorchTensor, q:TorchTensor) -> TorchTensor:
  "Returns q * (k ∗ w + D*w) by the real FFT, padded with zeros so that nothing wraps around."
  L, fft = w.shape[-1], torch.fft
  y = fft.irfft(fft.rfft(w, n=2*L) * fft.rfft(k[:, :L], n=2*L), n=2*L)[..., :L]
  return q*(y + D[:, None]*w)

def linear(x:TorchTensor, w:SimpleNamespace) -> TorchTensor:
  return F.linear(x, w.weight, w.bias)

def norm(x:TorchTensor, w:SimpleNamespace) -> TorchTensor:
  return F.layer_norm(x, x.shape[-1:], w.weight, w.bias)

def attention(u:TorchTensor, w:SimpleNamespace, heads:int) -> TorchTensor:
  "u (B,L,D) -> (B,L,D), causal"
  qkv = linear(u, w.Wqkv).unflatten(-1, (3, heads, -1))
  q, k, v = qkv.permute(2, 0, 3, 1, 4)                                   # (B,heads,L,hd)
  y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
  return linear(y.transpose(1, 2).flatten(2), w.out_proj)

def attention_step(u:TorchTensor, w:SimpleNamespace, heads:int, cache:TorchTensor, pos:int) -> TorchTensor:
  "u (B,D) -> (B,D), the token at `pos`. cache: keys and values (2,B,heads,capacity,hd), written to."
  q, *kv = linear(u, w.Wqkv).unflatten(-1, (3, heads, -1)).unbind(1)     # (B,heads,hd)
  cache[:, :, :, pos] = torch.stack(kv)
  keys, values = cache[:, :, :, :pos+1]
  y = F.scaled_dot_product_attention(q[:, :, None], keys, values)
  return linear(y.flatten(1), w.out_proj)

def discretize(ssm:SimpleNamespace) -> tuple[TorchTensor, ...]:
  "Returns the diagonal SSM's complex A, B, C (D,N/2), by the bilinear rule."
  A = torch.complex(-ssm.inv_A_real.exp(), ssm.A_imag)
  B, C = torch.view_as_complex(ssm.B), torch.view_as_complex(ssm.C[0])
  dt = ssm.log_dt.exp()[:, None]
  return (1 + dt*A/2)/(1 - dt*A/2), dt*B/(1 - dt*A/2), C

def h3(u:TorchTensor, w:SimpleNamespace) -> TorchTensor:
  "u (B,L,D) -> (B,L,D): q * diagonal(shift(k) * v), both SSMs as convolutions"
  L, fft, shift = u.shape[1], torch.fft, w.ssm_k_kernel.kernel
  q, k, v = (linear(u, x).transpose(1, 2) for x in (w.q_proj, w.k_proj, w.v_proj))      # (B,D,L)
  N = shift.B.shape[1]
  shift_filter = fft.irfft(fft.rfft(shift.B, n=2*N).conj() * fft.rfft(shift.C[0], n=2*N))[:, :N]
  A, B, C = discretize(w.kernel.kernel)
  powers = (A.log()[..., None] * torch.arange(L, device=u.device)).exp()                # (D,N/2,L)
  diagonal_filter = 2*torch.einsum("hn,hnl->hl", C*B, powers).real
  kv = torch_fftconv(k, shift_filter, w.ssm_k_D, v)
  y = torch_fftconv(kv, diagonal_filter, w.D, q)
  return linear(y.transpose(1, 2), w.output_linear)

def h3_step(u:TorchTensor, w:SimpleNamespace, state:list) -> TorchTensor:
  "u (B,D) -> (B,D), both SSMs as recurrences. state: theirs, replaced, and the discretised A, B, C."
  shift, (A, B, C) = w.ssm_k_kernel.kernel, state[2]
  q, k, v = (linear(u, x) for x in (w.q_proj, w.k_proj, w.v_proj))
  state[0] = F.pad(state[0], (1, 0))[..., :-1] + shift.B*k[..., None]                   # (B,D,N)
  kv = v*((shift.C[0]*state[0]).sum(-1) + w.ssm_k_D*k)
  state[1] = A*state[1] + B*kv[..., None]                                               # (B,D,N/2)
  y = q*(2*(C*state[1]).sum(-1).real + w.D*kv)
  return linear(y, w.output_linear)

class TorchLM:
  """H3's language model in plain PyTorch, a fair competitor: torch.fft for the convolutions, the SSM's
  filter as one sum over the powers of its modes, fused attention; a recurrence and a cache in decoding.

  weights: arrays under the official names. Heads of one channel, no rotary positions, no dropout.
  """
  def __init__(self, config:H3Config, weights:Mapping[str, np.ndarray], device:str="cpu"):
    assert config.head_dim == 1 and not config.rotary_dim
    self.config, self.device, self.weights = config, device, {}
    root = SimpleNamespace()
    for name, array in weights.items():                # "a.b.c" becomes root.a.b.c
      self.weights[name] = torch.nn.Parameter(torch.tensor(array, device=device))
      *path, last = name.split(".")
      place = root
      for part in path: place = vars(place).setdefault(part, SimpleNamespace())
      setattr(place, last, self.weights[name])
    self.backbone, self.layers = root.backbone, [*vars(root.backbone.layers).values()]

  def __call__(self, tokens:TorchTensor, state:list|None=None, pos:int=0) -> TorchTensor:
    """tokens (B,L) -> logits (B,L,V); with a state, one token a row: (B,) -> (B,V).

    state: of `init_state`, overwritten. pos: the token's position.
    """
    heads, words = self.config.n_heads, self.backbone.embeddings.word_embeddings.weight
    x = F.embedding(tokens, words)
    for i, layer in enumerate(self.layers):
      u, w = norm(x, layer.norm1), layer.mixer
      attends = i in self.config.attn_layers
      if state is None: y = attention(u, w, heads) if attends else h3(u, w)
      else: y = attention_step(u, w, heads, state[i], pos) if attends else h3_step(u, w, state[i])
      x = x + y
      hidden = F.gelu(linear(norm(x, layer.norm2), layer.mlp.fc1), approximate="tanh")
      x = x + linear(hidden, layer.mlp.fc2)
    return norm(x, self.backbone.ln_f) @ words.T

  def loss(self, tokens:TorchTensor, targets:TorchTensor) -> TorchTensor:
    return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten().long())

  def init_state(self, batch:int, capacity:int) -> list:
    "Returns what each layer's step takes before the first token. capacity: of the attention caches."
    c = self.config
    cache = 2, batch, c.n_heads, capacity, c.d_model//c.n_heads
    return [torch.zeros(cache, device=self.device) if i in c.attn_layers else
            [torch.zeros_like(layer.mixer.ssm_k_kernel.kernel.B), 0, discretize(layer.mixer.kernel.kernel)]
            for i, layer in enumerate(self.layers)]

def torch_device() -> str|None:
  "Returns PyTorch's name for tinygrad's device; None where PyTorch is not there or can't use it."
  names = {"CPU": "cpu", "CUDA": "cuda", "NV": "cuda", "METAL": "mps"}
  name = names.get(Device.DEFAULT) if torch else None
  return name if name and torch.get_device_module(name).device_count() else None

# ---- timing, tables, processes --------------------------------------------------------------------

def open_device():
  cpu.setup_device()

def seconds(run:Callable[[], object]) -> float:
  "Returns the time of one call until tinygrad's device is done; PyTorch's contestants wait for theirs."
  start = time.perf_counter()
  run()
  Device[Device.DEFAULT].synchronize()
  return time.perf_counter() - start

def ratio(slow:float|None, fast:float) -> str|None:
  return slow and f"{slow/fast:.2f}x"

def table(title:str, columns:dict[str, str]) -> Callable[..., None]:
  "Prints a title and the names of columns, each with its numbers' format; returns what prints a row."
  def row(label:str, *cells:float|str|None):
    shown = [f"{cell:{form}}" if isinstance(cell, (int, float)) else cell or "-"
             for cell, form in zip(cells, columns.values())]
    print(f"{label:34}" + "".join(f"{cell:>12}" for cell in shown), flush=True)
  print(f"{title}; {Device.DEFAULT}, {os.cpu_count()} cores, float32")
  row("", *columns)
  return row

def child(*arguments:str, **environment:str) -> str:
  "Returns what a Python of its own prints, run in the project's folder."
  done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=os.environ | environment,
                        capture_output=True, text=True)
  if done.returncode == 0: return done.stdout
  raise UserError(f"a benchmark failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")

# ---- the convolution ------------------------------------------------------------------------------

PASSES = "forward", "with gradients"
Arrays = dict[str, np.ndarray]

class Contestant(NamedTuple):
  "A convolution: its forward pass alone, and with all gradients. context: tinygrad's settings for it."
  passes: tuple[Callable, Callable]
  context: dict[str, int] = {}

class Timing(NamedTuple):
  "The least time, and what tinygrad counts: kernels launched, bytes moved."
  ms: float
  launches: int
  bytes: int

def in_tinygrad(f:Callable, x:Arrays, dy:np.ndarray, **context:int) -> Contestant:
  inputs = {name: Tensor(array).realize() for name, array in x.items()}
  upstream = Tensor(dy).realize()
  def forward(): f(**inputs).realize()
  def both():
    y = f(**inputs)
    Tensor.realize(y, *y.gradient(*inputs.values(), gradient=upstream))
  return Contestant((TinyJit(forward), TinyJit(both)), context)

def in_torch(x:Arrays, dy:np.ndarray) -> Contestant:
  device = torch_device()
  wait = torch.get_device_module(device).synchronize
  inputs = {name: torch.tensor(array, device=device, requires_grad=True) for name, array in x.items()}
  upstream = torch.tensor(dy, device=device)
  def f(u:TorchTensor, v:TorchTensor, **rest:TorchTensor) -> TorchTensor: return torch_fftconv(u*v, **rest)
  def forward():
    with torch.no_grad(): f(**inputs)
    wait()
  def both():
    torch.autograd.grad(f(**inputs), list(inputs.values()), upstream)
    wait()
  return Contestant((forward, both))

def race(contestants:dict[str, Contestant], turns:int) -> dict[str, dict[str, Timing]]:
  """Times contestants in turns of 0.2 s: {pass: {contestant: timing}}. The pauses between them are for
  PyTorch, whose idle threads go on spinning for a while."""
  best = {what: {} for what in PASSES}
  for turn in range(turns):
    for who, contestant in contestants.items():
      for what, run in zip(PASSES, contestant.passes):
        taken = []
        with Context(**contestant.context):
          if turn == 0: run(), run()                   # compiles; TinyJit captures
          time.sleep(0.2)
          GlobalCounters.reset()
          run()
          launches, moved = GlobalCounters.kernel_count, GlobalCounters.global_mem
          while sum(taken) < 0.2: taken.append(seconds(run))
        least = 1e3*min(taken)
        if turn: least = min(least, best[what][who].ms)
        best[what][who] = Timing(least, launches, moved)
  return best

def show(row:Callable, label:str, timings:dict[str, Timing], names:tuple[str, ...], *figures:float):
  "Prints a row: the contestants' times, and how many times as fast as PyTorch ours is."
  ms = {who: timing.ms for who, timing in timings.items()}
  row(label, *map(ms.get, names), ratio(ms.get("torch"), ms["ours"]), *figures)

def require_kernels():
  open_device()
  if not FLASH: raise UserError("FLASH=0 turns off what is to be timed here")

rng = np.random.default_rng(0)
def normal(*shape:int) -> np.ndarray: return rng.standard_normal(shape).astype(np.float32)

def bench_conv(lengths:list[int], batch:int, channels:int, plain:int):
  """Times y = q * (k ∗ (u*v) + D*(u*v)) at each length, plain tinygrad up to a length of `plain`.

  Launches and bytes are tinygrad's count; the floor of bytes is each input and output once.
  """
  require_kernels()
  names = "plain", "ours", "torch"
  row = table(f"y = q * (k * (u v) + D u v), ms, B={batch} H={channels}",
              dict.fromkeys(names, ".2f") | {"ratio": "", "launches": "", "bytes/floor": ".2f"})
  for L in lengths:
    x = {name: normal(batch, channels, L) for name in "uvq"}
    x |= {"k": normal(channels, L), "D": normal(channels)}
    dy = normal(batch, channels, L)
    contestants = {"ours": in_tinygrad(fftconv, x, dy)}
    if L <= plain:                       # with tinygrad's optimiser, which setup_device turns off on CPUs
      noopt = int(os.environ.get("NOOPT", 0))
      contestants["plain"] = in_tinygrad(fftconv, x, dy, FLASH=0, NOOPT=noopt)
    if torch_device(): contestants["torch"] = in_torch(x, dy)
    # forward u, v, q, k, D, y; with gradients the inputs again, dy, and an output for each input
    inputs = sum(array.nbytes for array in x.values())
    for floor, (what, timings) in zip((inputs + dy.nbytes, 3*inputs + 2*dy.nbytes), race(contestants, 4).items()):
      show(row, f"L {L}, {what}", timings, names, timings["ours"].launches, timings["ours"].bytes/floor)

STATES = [(256, 1 << 14), (256, 1 << 16), (64, 1 << 14), (64, 1 << 20)]       # channels, length

def bench_states(lengths:list[int], modes:int=32):
  """Times `ssm_conv` of one sequence beside fftconv and PyTorch's FFT, which are both given a filter.

  By default at two lengths, and with a quarter of the channels at a million.
  """
  require_kernels()
  names = "fftconv", "ours", "torch"
  row = table(f"the same by state passing, ms, B=1 N={2*modes}",
              dict.fromkeys(names, ".1f") | {"ratio": "", "ns/(H L)": ".2f"})
  def state_passing(u:Tensor, D:Tensor, v:Tensor, q:Tensor, **ssm:Tensor) -> Tensor:
    A, B, C = ((ssm[name + "r"], ssm[name + "i"]) for name in "ABC")
    return ssm_conv(u, A, B, C, D, v, q)[0]
  for H, L in [(256, L) for L in lengths] or STATES:
    x, dy = {name: normal(1, H, L) for name in "uvq"} | {"D": normal(H)}, normal(1, H, L)
    A = np.exp(rng.uniform(-0.05, 0, (H, modes)) + 1j*rng.uniform(0, np.pi, (H, modes)))
    ssm = {name: normal(H, modes) for name in ("Br", "Bi", "Cr", "Ci")}
    ssm |= {"Ar": np.float32(A.real), "Ai": np.float32(A.imag)}
    filtered = x | {"k": normal(H, L)}
    contestants = {"ours": in_tinygrad(state_passing, x | ssm, dy)}
    if L <= LONGEST: contestants["fftconv"] = in_tinygrad(fftconv, filtered, dy)
    if torch_device(): contestants["torch"] = in_torch(filtered, dy)
    for what, timings in race(contestants, 3).items():
      show(row, f"H {H}, L {L:,}, {what}", timings, names, 1e6*timings["ours"].ms/H/L)

# ---- training and decoding ------------------------------------------------------------------------
# Each contestant has a process of its own, twice in turns; its memory is the peak beyond what the process
# held once its libraries were imported.

class Step(NamedTuple):
  "A training step on (batch, length) tokens; without a length one token a row in decoding."
  config: H3Config
  batch: int
  length: int|None = None

SMALL = H3Config(257, 256, 4, attn_layers=(2,), n_heads=2)
LARGE = dataclasses.replace(H3Config.named("125M"), embed_dropout=0.0)
STEPS = {"train, d 256, batch 16, L 256": Step(SMALL, 16, 256),
         "train, d 256, batch 16, L 2048": Step(SMALL, 16, 2048),
         "train, 125M, batch 1, L 1024": Step(LARGE, 1, 1024),
         "decode, 125M, batch 1": Step(LARGE, 1),
         "decode, 125M, batch 64": Step(LARGE, 64)}
CAPACITY = 128                           # of the attention caches in decoding

def random_tokens(config:H3Config, *shape:int) -> np.ndarray:
  return rng.integers(0, config.vocab_size, shape, np.int32)

def our_step(step:Step) -> Callable[[int], object]:
  model = H3LM(step.config)
  if step.length is None:
    tokens, session = random_tokens(step.config, CAPACITY, step.batch), Session(model, step.batch, CAPACITY)
    return lambda i: session(tokens[i])
  tokens, params = random_tokens(step.config, step.batch, step.length + 1), get_state_dict(model)
  optimizer = training.AdamW(params)
  update = train.make_step(model, params, optimizer)
  hyper = optimizer.hyper(0, lr=1e-3, weight_decay=0.1, clip=1.0, ssm_scale=1.0)
  return lambda i: update((tokens[:, :-1], tokens[:, 1:]), hyper)

def torch_step(step:Step, weights:str) -> Callable[[int], object]:
  device = torch_device()
  with np.load(weights) as arrays: model = TorchLM(step.config, arrays, device)      # one array at a time
  if step.length is None:
    tokens = torch.tensor(random_tokens(step.config, CAPACITY, step.batch), device=device)
    state = model.init_state(step.batch, CAPACITY)
    @torch.no_grad()
    def decode(i:int) -> TorchTensor: return model(tokens[i], state, i).cpu()
    return decode
  tokens = torch.tensor(random_tokens(step.config, step.batch, step.length + 1), device=device)
  optimizer = torch.optim.AdamW(model.weights.values(), lr=1e-3, betas=(0.9, 0.95))
  def update(i:int) -> float:
    optimizer.zero_grad()
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.weights.values(), 1.0)
    optimizer.step()
    return loss.item()
  return update

def measure(name:str, who:str, weights:str):
  "Prints the least milliseconds of a step and the memory in MB. who: ours, plain (with FLASH=0), torch."
  step, taken = STEPS[name], []
  if who != "torch": open_device()
  base = peak_memory()
  run = torch_step(step, weights) if who == "torch" else our_step(step)
  most = 24 if step.length else 64
  while len(taken) < 3 or sum(taken[2:]) < 8 and len(taken) < most:
    taken.append(seconds(lambda: run(len(taken))))
  print(json.dumps([1e3*min(taken[2:]), (peak_memory() - base)/1e6]))

def copying(size:int) -> float:
  "Returns the milliseconds in which all cores together copy so many bytes, half of them read."
  source, target = (np.ones((os.cpu_count(), 1 << 25), np.float32) for _ in range(2))
  def copy():
    threads = [threading.Thread(target=np.copyto, args=pair) for pair in zip(target, source)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
  return 1e3*size/source.nbytes/2 * min(seconds(copy) for _ in range(5))

def bench_train():
  "Times the steps of STEPS beside PyTorch on a CPU; elsewhere the first alone, beside FLASH=0 too."
  open_device()
  on_cpu = Device.DEFAULT == "CPU"
  others = ["plain"]*(not on_cpu) + ["torch"]*(torch_device() is not None)
  columns = {"ours": ".1f", "MB": ".0f"}
  for who in others: columns |= {who: ".1f", f"{who}, MB": ".0f", f"to {who}": ""}
  row = table("ms a step, MB beyond the libraries", columns)
  for name in list(STEPS)[:len(STEPS) if on_cpu else 1]:
    params = get_state_dict(H3LM(STEPS[name].config))
    runs = {who: [] for who in ("ours", *others)}
    with tempfile.TemporaryDirectory() as folder:
      weights = f"{folder}/weights.npz"
      if "torch" in others: np.savez(weights, **{key: param.numpy() for key, param in params.items()})
      for who in [*runs] * (2 if on_cpu else 1):
        code = f"from support import bench; bench.measure({name!r}, {who!r}, {weights!r})"
        printed = child("-c", code, **({"FLASH": "0"} if who == "plain" else {}))
        runs[who].append(json.loads(printed.splitlines()[-1]))
    ours = min(runs["ours"])
    row(name, *ours, *(cell for who in others for cell in (*min(runs[who]), ratio(min(runs[who])[0], ours[0]))))
  if on_cpu:
    size = sum(param.nbytes() for param in params.values())
    row(f"copying at {size/1e6:.0f} MB of weights", copying(size))

# ---- generation -----------------------------------------------------------------------------------

PROMPTS, BATCHES, TURNS, PIECE = (512, 1024, 1536), (1, 64), 12, 256
# hybrid over Transformer by (batch, prompt), for 1.3B on an A100, as notes on the paper have it: unverified
PAPER = {(64, 512): "1.48x", (64, 1024): "2.05x", (64, 1536): "2.38x"}

def state_size(session:Session, capacity:int) -> float:
  "Returns the state's MB, of the attention caches only what the texts so far fill."
  tensors = get_state_dict(session.state).values()
  filled = session.length / capacity
  return sum(t.nbytes() * (filled if capacity in t.shape else 1) for t in tensors) / 1e6

def bench_generate(shape:H3Config):
  """Times reading prompts and writing, H3, hybrid and Transformer of one shape with random weights, the
  comparison that the paper makes. The models take turns, step by step."""
  open_device()
  kinds = {"H3": (), "hybrid": shape.attn_layers, "Transformer": tuple(range(shape.n_layer))}
  models = {kind: H3LM(dataclasses.replace(shape, attn_layers=layers)) for kind, layers in kinds.items()}
  row = table(f"tokens/s read and written, {shape.n_layer} layers of width {shape.d_model}; ratio to the "
              "Transformer, the paper's for 1.3B on an A100 (unverified)",
              {"read": ",.0f", "written": ",.0f", "ratio": "", "paper": "", "ms a step": ".1f", "state, MB": ",.1f"})
  for batch in BATCHES:
    piece = max(1, min(PIECE, 32*PIECE//batch))
    capacity = PROMPTS[-1] + (TURNS + 2)*len(PROMPTS) + piece
    sessions = {kind: Session(model, batch, capacity) for kind, model in models.items()}
    def read(session:Session, *size:int) -> float:
      tokens = random_tokens(shape, batch, *size)
      return seconds(lambda: session(tokens))
    for session in sessions.values(): read(session, piece), read(session)              # compiles
    for prompt in PROMPTS:
      reading = {kind: median(read(session, piece) for _ in range(session.length, prompt, piece))
                 for kind, session in sessions.items()}
      turns = [[read(session) for session in sessions.values()] for _ in range(TURNS + 1)]
      step = dict(zip(kinds, map(median, zip(*turns[1:]))))
      for kind, session in sessions.items():
        row(f"batch {batch}, prompt {prompt}, {kind}", batch*piece/reading[kind], batch/step[kind],
            ratio(step["Transformer"], step[kind]), PAPER.get((batch, prompt)) if kind == "hybrid" else None,
            1e3*step[kind], state_size(session, capacity))

# ---- start, command line --------------------------------------------------------------------------

def bench_start():
  "Prints the time to the default run's first step, with nothing cached and again."
  with tempfile.TemporaryDirectory() as folder:
    for what in ("nothing cached", "again"):
      run = child("train.py", "--steps", "1", "--sample", "0", "--out", folder, CACHEDB=f"{folder}/cache.db")
      first_step = next(line for line in run.splitlines() if line.startswith("first step"))
      print(f"{what}: {first_step}", flush=True)

BENCHMARKS = {"conv": (bench_conv, "the fused convolution, length by length"),
              "states": (bench_states, "the same by state passing, at great lengths"),
              "train": (bench_train, "steps of training and of decoding, their time and memory"),
              "generate": (bench_generate, "prompt and decoding throughput: H3, hybrid, Transformer"),
              "start": (bench_start, "the time from a program's start to its first step")}

def named(size:str) -> H3Config:
  try: return H3Config.named(size)
  except ValueError as e: raise argparse.ArgumentTypeError(str(e)) from None

def parser() -> Parser:
  p = Parser(prog="support/bench.py", description="Time this project; without a command all of it in turn.")
  commands, default = p.add_subparsers(dest="command", metavar="COMMAND"), "default: %(default)s"
  conv, states, _, generate, _ = (commands.add_parser(name, help=about) for name, (_, about) in BENCHMARKS.items())
  conv.add_argument("--lengths", type=number(int, 1, LONGEST), nargs="+", metavar="L", help=default,
                    default=[256, 512, 1024, 2048, 4096, 8192])
  conv.add_argument("--batch", type=number(int, 1), default=8, help=default)
  conv.add_argument("--channels", type=number(int, 1), default=256, help=default)
  conv.add_argument("--plain", type=number(int, 0), default=1024, metavar="L",
                    help=f"time plain tinygrad, which is slow, up to this length; {default}")
  states.add_argument("lengths", type=number(int, 1), nargs="*", metavar="L",
                      help="default: 16384 and 65536, and with fewer channels 16384 and 1048576")
  generate.add_argument("shape", type=named, nargs="?", metavar="SIZE", default="125M", help=f"a released model's; {default}")
  return p

def main(argv:list[str]|None=None) -> int:
  p = parser()
  options = vars(p.parse_args(argv))
  command = options.pop("command")
  try:
    if command: BENCHMARKS[command][0](**options)
    for name in BENCHMARKS if command is None else ():
      if code := subprocess.run([sys.executable, __file__, name]).returncode: return code
  except UserError as e: p.error(str(e))
  except KeyboardInterrupt: return 130
  return 0

if __name__ == "__main__": sys.exit(main())
