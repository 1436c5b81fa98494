"""Benchmarks, beside plain tinygrad (FLASH=0) and beside PyTorch where it is installed.

  python support/bench.py             all of them in turn, each in a process of its own
  python support/bench.py conv        the fused convolution, length by length; --random 24: at 24
                                      random sizes, with the mean ratio
  python support/bench.py states      the same by state passing, at great lengths
  python support/bench.py train       time and memory of a step of training, and of decoding; on a
                                      GPU other batches
  python support/bench.py generate    reading prompts and writing: H3, hybrid, Transformer
  python support/bench.py start       from a program's start to its first step, in seconds

Contestants take turns and the least of their times counts, so that ratios hold on a machine that
is busy now and then: compare figures of one run. `torch_fftconv` and `TorchLM` are the convolution
and the model as a user of PyTorch would write them; the tests use them too.

Not here: other widths and batches than the tables' in `train`; training on several devices; a
GPU's own memory.
"""
from __future__ import annotations
import argparse, dataclasses, json, math, os, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Mapping
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import numpy as np
from tinygrad import Device, GlobalCounters, Tensor, TinyJit
from tinygrad.helpers import Context, getenv
from tinygrad.nn.state import get_parameters, get_state_dict
import train
from flashconv import FLASH, MAX_N, fftconv, ssm_conv
from generate import Session
from h3tiny import DiagSSM, H3Config, H3LM, KVCache
from support.cpu import setup_device
from support.text import Parser, UserError, number, peak_memory
from support.training import AdamW
try:
  import torch
  from torch.fft import irfft, rfft
  from torch.nn import functional as F
  torch.set_num_threads(os.cpu_count())
except ImportError: torch = None

# ---- the same in PyTorch ------------------------------------------------------------------------
# Shapes as in h3tiny.py. w: the weights of a layer as attributes with the official names.

def torch_fftconv(u, k, D):
  "Returns k ∗ u + D u for u (B,H,L) by the real FFT, zeros appended so that nothing wraps around."
  L = u.shape[-1]
  y = irfft(rfft(u, 2*L) * rfft(k[:, :L], 2*L), 2*L)
  return y[..., :L] + D[:, None]*u

def linear(x, w): return F.linear(x, w.weight, w.bias)
def norm(x, w): return F.layer_norm(x, x.shape[-1:], w.weight, w.bias)

def attention(u, w, heads, cache, pos):
  """Causal attention: u (B,L,D) -> like it.

  cache: keys and values (2,B,heads,capacity,hd); then u is one token, (B,1,D), at `pos`."""
  qkv = linear(u, w.Wqkv).unflatten(-1, (3, heads, -1))                # (B,L,3,heads,hd)
  q, *kv = qkv.permute(2, 0, 3, 1, 4)
  if cache is not None:
    cache[:, :, :, pos:pos+1] = torch.stack(kv)
    kv = cache[:, :, :, :pos+1]
  y = F.scaled_dot_product_attention(q, *kv, is_causal=cache is None)
  return linear(y.transpose(1, 2).flatten(2), w.out_proj)

def discretize(ssm):
  "Returns the diagonal SSM's complex dA, dB, C (D,N/2), by the bilinear rule."
  A = torch.complex(-ssm.inv_A_real.exp(), ssm.A_imag)
  B, C = map(torch.view_as_complex, (ssm.B, ssm.C[0]))
  dt = ssm.log_dt.exp()[:, None]
  z = dt*A/2
  return (1+z)/(1-z), dt*B/(1-z), C

def convolutions(q, k, v, w):
  "q * diag( shift(k) * v ), (B,D,L), of a whole sequence."
  shift, (A, B, C) = w.ssm_k_kernel.kernel, discretize(w.kernel.kernel)
  N, L = shift.B.shape[1], q.shape[-1]
  S = irfft(rfft(shift.B, 2*N).conj() * rfft(shift.C[0], 2*N))[:, :N]            # (D,N)
  powers = (A.log()[..., None] * torch.arange(L, device=A.device)).exp()         # (D,N/2,L)
  K = 2*torch.einsum("hn,hnl->hl", C*B, powers).real                             # (D,L)
  return q*torch_fftconv(v*torch_fftconv(k, S, w.ssm_k_D), K, w.D)

def recurrences(q, k, v, w, state):
  "The same for one token, (B,D,1). state: s (B,D,N), x (B,D,N/2), replaced; the discretised SSM."
  shift, (A, B, C) = w.ssm_k_kernel.kernel, state.ssm
  state.s = F.pad(state.s, (1, 0))[..., :-1] + shift.B*k
  kv = v*((shift.C*state.s).sum(-1, keepdim=True) + w.ssm_k_D[:, None]*k)
  state.x = A*state.x + B*kv
  return q*(2*(C*state.x).sum(-1, keepdim=True).real + w.D[:, None]*kv)

def h3(u, w, state):
  "The H3 layer: u (B,L,D) -> like it. With a state u is one token, (B,1,D)."
  q, k, v = (linear(u, proj).transpose(1, 2) for proj in (w.q_proj, w.k_proj, w.v_proj))
  y = recurrences(q, k, v, w, state) if state else convolutions(q, k, v, w)
  return linear(y.transpose(1, 2), w.output_linear)

class TorchLM:
  """H3's language model in plain PyTorch, a fair competitor: torch.fft for the convolutions, the
  SSM's filter as one sum over the powers of its modes, fused attention; recurrence and cache.

  weights: arrays by their official names. Heads of one channel, no rotary positions, no dropout.
  """
  def __init__(self, config:H3Config, weights:Mapping[str, np.ndarray], device:str="cpu"):
    assert config.head_dim == 1 and not config.rotary_dim
    self.config, self.device, self.weights = config, device, {}
    root = SimpleNamespace()
    for name, array in weights.items():                                # "a.b.c": root.a.b.c
      self.weights[name] = torch.nn.Parameter(torch.tensor(array, device=device))
      *path, last = name.split(".")
      node = root
      for part in path: node = vars(node).setdefault(part, SimpleNamespace())
      setattr(node, last, self.weights[name])
    self.backbone, self.layers = root.backbone, [*vars(root.backbone.layers).values()]

  def __call__(self, tokens, state:list|None=None, pos:int=0):
    """tokens (B,L) -> logits (B,L,V).

    state: `init_state`'s, overwritten; then tokens are one for each text, (B,1), at `pos`."""
    words = self.backbone.embeddings.word_embeddings.weight
    x = F.embedding(tokens, words)
    for i, layer in enumerate(self.layers):
      u, w, before = norm(x, layer.norm1), layer.mixer, state and state[i]
      attends = i in self.config.attn_layers
      x = x + (attention(u, w, self.config.n_heads, before, pos) if attends else h3(u, w, before))
      hidden = F.gelu(linear(norm(x, layer.norm2), layer.mlp.fc1), approximate="tanh")
      x = x + linear(hidden, layer.mlp.fc2)
    return norm(x, self.backbone.ln_f) @ words.T

  def loss(self, tokens, targets):
    return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten().long())

  def init_state(self, batch:int, capacity:int) -> list:
    "Returns each layer's state before the first token. capacity: of the attention caches."
    c, state = self.config, []
    for i, layer in enumerate(self.layers):
      if i in c.attn_layers:
        cache = 2, batch, c.n_heads, capacity, c.d_model//c.n_heads
        state.append(torch.zeros(cache, device=self.device))
      else:
        s = torch.zeros_like(layer.mixer.ssm_k_kernel.kernel.B)
        state.append(SimpleNamespace(s=s, x=0, ssm=discretize(layer.mixer.kernel.kernel)))
    return state

def torch_device() -> str:
  "Returns PyTorch's name for tinygrad's device, 'cpu' where it can't use that; '': no PyTorch."
  if not torch: return ""
  name = {"CUDA": "cuda", "NV": "cuda", "METAL": "mps"}.get(Device.DEFAULT, "cpu")
  return name if torch.get_device_module(name).device_count() else "cpu"

worker = ThreadPoolExecutor(1)
def on_worker(f:Callable) -> Callable:
  """Returns f as run on PyTorch's own thread. tinygrad leaves a CUDA context of its own current on
  the thread it runs on, in which PyTorch's FFT fails on tensors of the primary context."""
  return lambda *args: worker.submit(f, *args).result()

# ---- what the benchmarks share ------------------------------------------------------------------

rng = np.random.default_rng(0)
def normal(*shape:int) -> np.ndarray: return rng.standard_normal(shape, np.float32)
def random_tokens(config:H3Config, *shape:int) -> np.ndarray:
  return rng.integers(0, config.vocab_size, shape, np.int32)

def seconds(run:Callable) -> float:
  "Returns a call's time until tinygrad's device is done; PyTorch's contestants wait for theirs."
  start = time.perf_counter()
  run()
  Device[Device.DEFAULT].synchronize()
  return time.perf_counter() - start

def table(title:str, *columns:str, width:int=34) -> Callable[..., None]:
  """Prints a title and the names of columns; returns the function that prints a row, nan as -.
  width: of the rows' labels."""
  def row(label, *cells):
    numbers = "".join(f"{x:8,.{0 if x >= 100 else 2}f}" for x in cells)
    print(f"{label:{width}}" + numbers.replace("nan", "  -"), flush=True)
  print(f"{title}; {Device.DEFAULT}, {os.cpu_count()} cores, float32")
  print(" "*width + "".join(f"{name:>8}" for name in columns))
  return row

def beside() -> str: return f"; PyTorch on {torch_device()}" if torch else ""

def child(*arguments:str, **environment:str) -> list[str]:
  "Returns the lines that a Python of its own prints, in the project's folder. UserError."
  done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=os.environ | environment,
                        capture_output=True, text=True)
  if done.returncode: raise UserError(f"a benchmark failed: {done.stderr.strip()[-200:]}")
  return done.stdout.splitlines()

# ---- the convolution ----------------------------------------------------------------------------

Arrays = list[np.ndarray]
Passes = tuple[Callable, Callable]       # forward; forward and backward, with all gradients
TURNS, TURN = 4, 0.2                     # seconds

def in_tinygrad(f:Callable, arrays:Arrays, dy:np.ndarray, **context:int) -> Passes:
  "Makes both passes of f. context: tinygrad's settings for them."
  inputs, upstream = [Tensor(x).realize() for x in arrays], Tensor(dy).realize()
  def forward(): f(*inputs).realize()
  def both():
    y = f(*inputs)
    Tensor.realize(y, *y.gradient(*inputs, gradient=upstream))
  within = Context(**context)
  return within(TinyJit(forward)), within(TinyJit(both))

@on_worker
def in_torch(arrays:Arrays, dy:np.ndarray) -> Passes:
  "Makes both passes of the fused convolution."
  device = torch_device()
  wait = torch.get_device_module(device).synchronize
  inputs = [torch.tensor(x, device=device, requires_grad=True) for x in arrays]
  upstream = torch.tensor(dy, device=device)
  def f(u, k, D, v, q): return q*torch_fftconv(u*v, k, D)
  def forward():
    with torch.no_grad(): f(*inputs)
    wait()
  def both():
    torch.autograd.grad(f(*inputs), inputs, upstream)
    wait()
  return on_worker(forward), on_worker(both)

def race(runs:dict[str, Callable]) -> dict[str, float]:
  """Returns the least milliseconds of each, which take turns. The pauses are for PyTorch, whose
  idle threads go on spinning for a while."""
  ms = {who: [] for who in runs}
  for run in runs.values(): run(), run()                               # compiles; TinyJit captures
  for who, run in [*runs.items()] * TURNS:
    time.sleep(TURN)
    run()                                # wakes its threads up
    end = time.perf_counter() + TURN
    ms[who].append(seconds(run))
    while time.perf_counter() < end: ms[who].append(seconds(run))
  return {who: 1e3*min(times) for who, times in ms.items()}

def contest(title:str, *names:str) -> Callable[..., None]:
  """Returns a function that holds a contest and prints its row, for a forward pass, and for one
  with all gradients: milliseconds; PyTorch's over ours; the kernels that ours launches; and the
  bytes it moves, as tinygrad counts them, over the least that would do. The function returns both
  ratios. UserError with FLASH=0."""
  setup_device()
  if not FLASH: raise UserError("FLASH=0 turns off what is to be timed here")
  columns = [*names, "ratio", "kernels", "bytes"]
  row = table(f"{title}: ms forward, and with all gradients{beside()}", *columns, *columns, width=18)
  def compete(label, arrays, dy, contestants):
    cells, ratios, size = [], [], sum(x.nbytes for x in arrays)
    # forward: inputs, y; with gradients the inputs once more, dy, and a gradient for each input
    for i, least in enumerate((size + dy.nbytes, 3*size + 2*dy.nbytes)):
      ms = dict.fromkeys(names, np.nan) | race({who: run[i] for who, run in contestants.items()})
      GlobalCounters.reset()
      contestants["ours"][i]()
      counted = [GlobalCounters.kernel_count, GlobalCounters.global_mem/least]
      ratios.append(ms["torch"]/ms["ours"])
      cells += [*ms.values(), ratios[i], *counted]
    row(label, *cells)
    return ratios
  return compete

def convolution(*shape:int) -> tuple[Arrays, np.ndarray]:
  "Returns inputs u, k, D, v, q and a gradient of the output, of (B,H,L)."
  u, v, q, dy = normal(4, *shape)
  return [u, normal(*shape[1:]), normal(shape[1]), v, q], dy

LONGEST = MAX_N // 2                     # rows that fftconv's kernels take on a CPU
SIZES = (1, 32), (16, 768), (64, LONGEST)      # least and most of random B, H and L
NUMBERS = 1 << 19, 1 << 25                     # least and most of B*H*L

def random_shapes(n:int, seed:int) -> list[tuple[int, ...]]:
  "n shapes (B,H,L): within SIZES and NUMBERS, each integer's logarithm uniform."
  rng, shapes = np.random.default_rng(seed), []
  low, high = np.log(SIZES).T
  while len(shapes) < n:
    shape = tuple(round(math.exp(x)) for x in rng.uniform(low, high))
    if NUMBERS[0] <= math.prod(shape) <= NUMBERS[1]: shapes.append(shape)
  return shapes

def bench_conv(lengths:list[int], batch:int, channels:int, plain:int, random:int, seed:int) -> None:
  """Times `fftconv` at each length, and at lengths up to `plain` plain tinygrad, which is slow; or,
  where `random` is not 0, at so many `random_shapes`."""
  compete = contest("fftconv, B x H x L", "plain", "ours", "torch")
  shapes = random_shapes(random, seed) or [(batch, channels, L) for L in lengths]
  ratios = []
  for shape in shapes:
    inputs, dy = convolution(*shape)
    contestants = {"ours": in_tinygrad(fftconv, inputs, dy)}
    if shape[-1] <= plain and not random:
      # with tinygrad's optimiser, which setup_device turns off
      context = dict(FLASH=0, NOOPT=getenv("NOOPT"))
      contestants["plain"] = in_tinygrad(fftconv, inputs, dy, **context)
    if torch_device(): contestants["torch"] = in_torch(inputs, dy)
    ratios.append(compete(" x ".join(f"{n:,}" for n in shape), inputs, dy, contestants))
  if not torch_device(): return
  means, least = np.exp(np.log(ratios).mean(0)), np.min(ratios, axis=0)
  print("ratio forward, and with all gradients: geometric mean {:.2f} and {:.2f}, least {:.2f} and "
        "{:.2f}".format(*means, *least))

STATES = [(256, 1 << 14), (256, 1 << 16), (64, 1 << 14), (64, 1 << 20)]          # H, L

def bench_states(lengths:list[int]) -> None:
  """Times `ssm_conv` of one sequence, by default at STATES, else with 256 channels, beside fftconv
  and PyTorch's FFT, which are both given a filter."""
  compete = contest("ssm_conv, N=64, B x H x L", "fftconv", "ours", "torch")
  def state_passing(u, D, v, q, *ssm):                                 # ssm: re and im of A, B, C
    return ssm_conv(u, *zip(ssm[::2], ssm[1::2]), D, v, q)[0]
  for H, L in [(256, L) for L in lengths] or STATES:
    inputs, dy = convolution(1, H, L)
    u, _, *gates = inputs
    ours = [u, *gates, *(t.numpy() for t in get_parameters(DiagSSM(H, 64, rng).discretize()))]
    contestants = {"ours": in_tinygrad(state_passing, ours, dy)}
    if L <= LONGEST: contestants["fftconv"] = in_tinygrad(fftconv, inputs, dy)
    if torch_device(): contestants["torch"] = in_torch(inputs, dy)
    compete(f"1 x {H} x {L:,}", ours, dy, contestants)

# ---- training and decoding ----------------------------------------------------------------------
# Functions of a model and tokens (B,L) that make a step: a function of the number of steps before.
# The targets don't matter to a time: they are the tokens themselves.

def our_training(model:H3LM, tokens:np.ndarray) -> Callable:
  params = get_state_dict(model)
  optimizer = AdamW(params)
  hyper = optimizer.hyper(0, lr=1e-3, weight_decay=0.1, clip=1.0, ssm_scale=1.0)
  step = train.make_step(model, optimizer)
  return lambda i: step((tokens, tokens), hyper)

def our_decoding(model:H3LM, tokens:np.ndarray) -> Callable:
  session = Session(model, *tokens.shape)
  return lambda i: session(tokens[:, i])

@on_worker
def torch_training(model:TorchLM, tokens:np.ndarray) -> Callable:
  tokens, params = torch.tensor(tokens, device=model.device), model.weights.values()
  optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
  def step(i):
    optimizer.zero_grad()
    loss = model.loss(tokens, tokens)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    return loss.item()
  return on_worker(step)

@on_worker
def torch_decoding(model:TorchLM, tokens:np.ndarray) -> Callable:
  tokens, state = torch.tensor(tokens, device=model.device), model.init_state(*tokens.shape)
  return on_worker(torch.no_grad()(lambda i: model(tokens[:, i:i+1], state, i).cpu()))

STEPS = 64                               # at most
TRAIN, DECODE = (our_training, torch_training), (our_decoding, torch_decoding)
SMALL = H3Config(257, 256, 4, attn_layers=(2,), n_heads=2)
LARGE = dataclasses.replace(H3Config.named("125M"), embed_dropout=0.0)
# makers, the model, batch, length of a sequence; in decoding the capacity of the attention caches
JOBS = {"train, d 256, 16 x 256": (TRAIN, SMALL, 16, 256),
        "train, d 256, 16 x 2048": (TRAIN, SMALL, 16, 2048),
        "train, 125M, 1 x 1024": (TRAIN, LARGE, 1, 1024),
        "decode, 125M, batch 1": (DECODE, LARGE, 1, 2*STEPS),
        "decode, 125M, batch 64": (DECODE, LARGE, 64, 2*STEPS),
        "train, 125M, 8 x 1024": (TRAIN, LARGE, 8, 1024)}
GPU_JOBS = "train, d 256, 16 x 256", "train, 125M, 8 x 1024", "decode, 125M, batch 1"
CPU_JOBS = [name for name in JOBS if name != "train, 125M, 8 x 1024"]

def save_weights(name:str, path:str) -> None:
  "Writes a job's weights. In a process of its own, whose memory the contestants' do not start from."
  params = get_state_dict(H3LM(JOBS[name][1]))
  np.savez(path, **{key: param.numpy() for key, param in params.items()})

def measure(name:str, weights:str, who:str) -> None:
  """Prints the least milliseconds of a step, and the peak of the host's memory in MB beyond what
  the process held once its libraries were imported. who: ours, plain (ours with FLASH=0), torch."""
  makers, config, batch, length = JOBS[name]
  by_torch, taken = who == "torch", []
  if not by_torch: setup_device()
  base = peak_memory()
  model = (on_worker(TorchLM)(config, np.load(weights), torch_device()) if by_torch
           else H3LM(config))
  step = makers[by_torch](model, random_tokens(config, batch, length))
  for i in range(STEPS):
    taken.append(seconds(lambda: step(i)))
    if sum(taken[2:]) > 8: break         # the first two compile
  print(json.dumps([1e3*min(taken[2:]), (peak_memory() - base)/1e6]))

def copying() -> float:
  "Returns the GB/s, read and written, at which all cores together copy memory."
  source, target = np.ones((2, os.cpu_count(), 1 << 25), np.float32)
  with ThreadPoolExecutor() as pool:
    least = min(seconds(lambda: [*pool.map(np.copyto, target, source)]) for _ in range(5))
  return 2*source.nbytes/least/1e9

def bench_train() -> None:
  """Times the device's jobs beside PyTorch, on a GPU the first beside plain tinygrad
  too. Each contestant has a process of its own, twice in turns."""
  setup_device()
  on_cpu = Device.DEFAULT == "CPU"
  title = f"a step, and the host's memory beyond the libraries{beside()}"
  row = table(title, "ms", "MB", "to ours")
  for i, name in enumerate(CPU_JOBS if on_cpu else GPU_JOBS):
    plain = i == 0 and not on_cpu
    contestants = ["ours", *["plain"]*plain, *["torch"]*bool(torch_device())]
    results = {who: [] for who in contestants}
    with tempfile.TemporaryDirectory() as folder:
      where = f"{name!r}, '{folder}/weights.npz'"
      child("-c", f"from support import bench; bench.save_weights({where})")
      for who in contestants * 2:
        code = f"from support import bench; bench.measure({where}, {who!r})"
        results[who].append(json.loads(child("-c", code, FLASH=str(int(who != "plain")))[-1]))
    for who in contestants:
      ms, memory = min(results[who])
      row(f"{name}, {who}", ms, memory, ms/min(results["ours"])[0])
  if on_cpu: print(f"copying memory: {copying():.1f} GB/s, read and written")

# ---- generation ---------------------------------------------------------------------------------

PROMPTS = 512, 1024, 1536
PIECES = {1: 512, 64: 128}               # tokens of a prompt that are read at once, by batch
TOKENS = 12                              # written after each prompt
# over the Transformer, 1.3B on an A100, as notes on the paper have it: unverified
PAPER = {("hybrid", 64, 512): 1.48, ("hybrid", 64, 1024): 2.05, ("hybrid", 64, 1536): 2.38}

def state_size(session:Session) -> float:
  "Returns the state's MB, of attention caches what the texts so far fill."
  size = 0.0
  for layer in session.state.layers:
    filled = session.length/layer.keys.shape[2] if isinstance(layer, KVCache) else 1
    size += filled*sum(t.nbytes() for t in layer)
  return size/1e6

def bench_generate(size:str) -> None:
  """Times reading prompts and writing, H3, hybrid and Transformer of one size with random weights,
  the comparison that the paper makes. The models take turns, step by step."""
  try: shape = H3Config.named(size)
  except ValueError as e: raise UserError(str(e)) from None
  setup_device()
  kinds = {"H3": (), "hybrid": shape.attn_layers, "Transformer": range(shape.n_layer)}
  models = {kind: H3LM(dataclasses.replace(shape, attn_layers=at)) for kind, at in kinds.items()}
  row = table(f"{size}: tokens/s, ratio to the Transformer's (paper's: unverified), the state's MB",
              "read", "written", "ratio", "paper", "ms", "MB")
  for batch, piece in PIECES.items():
    capacity = PROMPTS[-1] + piece + TOKENS*len(PROMPTS)
    sessions = {kind: Session(model, batch, capacity) for kind, model in models.items()}
    def advance(session, *length):
      tokens = random_tokens(shape, batch, *length)
      return seconds(lambda: session(tokens))
    for session in sessions.values():
      for length in ((piece,), ()) * 2: advance(session, *length)      # compiles, and is captured
      session.length = 0
      session.state.positions.assign(0).realize()
    for prompt in PROMPTS:
      reading = {kind: min(advance(session, piece) for _ in range(session.length, prompt, piece))
                 for kind, session in sessions.items()}
      turns = [[advance(session) for session in sessions.values()] for _ in range(TOKENS)]
      writing = dict(zip(kinds, map(min, zip(*turns))))
      for kind, session in sessions.items():
        step, paper = writing[kind], PAPER.get((kind, batch, prompt), np.nan)
        row(f"batch {batch}, prompt {prompt}, {kind}", batch*piece/reading[kind], batch/step,
            writing["Transformer"]/step, paper, 1e3*step, state_size(session))

# ---- start, command line ------------------------------------------------------------------------

def bench_start() -> None:
  "Prints the time to the default run's first step, with nothing cached and again."
  with tempfile.TemporaryDirectory() as folder:
    for what in ("nothing cached", "again"):
      printed = child("train.py", "--steps", "1", "--sample", "0", "--out", folder,
                      CACHEDB=f"{folder}/cache.db")
      first, = (line for line in printed if line.startswith("first step"))
      print(f"{what}: {first}", flush=True)

BENCHMARKS = dict(conv=bench_conv, states=bench_states, train=bench_train, generate=bench_generate,
                  start=bench_start)

def parser() -> Parser:
  p = Parser(prog="support/bench.py", description=__doc__,
             formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = p.add_subparsers(dest="command", metavar="COMMAND")
  conv, states, _, generate, _ = map(commands.add_parser, BENCHMARKS)
  conv.add_argument("--lengths", type=number(int, 1, LONGEST), nargs="+", metavar="L",
                    default=[256, 512, 1024, 2048, 4096, 8192], help="lengths")
  conv.add_argument("--batch", type=number(int, 1), default=8, help="rows")
  conv.add_argument("--channels", type=number(int, 1), default=256, help="channels")
  conv.add_argument("--plain", type=number(int), default=1024, metavar="L",
                    help="longest row for plain tinygrad, which is slow")
  conv.add_argument("--random", type=number(int), default=0, metavar="N",
                    help="time N random sizes instead of --lengths")
  conv.add_argument("--seed", type=number(int), default=0, help="of the random sizes")
  states.add_argument("lengths", type=number(int, 1), nargs="*", metavar="L",
                      help="lengths, at 256 channels (default: 16384 to 1048576)")
  generate.add_argument("size", nargs="?", default="125M", help="a released model's name")
  return p

def main(argv:list[str]|None=None) -> int:
  p = parser()
  options = vars(p.parse_args(argv))
  command = options.pop("command")
  try:
    if command: BENCHMARKS[command](**options)
    for name in () if command else BENCHMARKS:
      if code := subprocess.run([sys.executable, __file__, name]).returncode: return code
  except UserError as e: p.error(str(e))
  except KeyboardInterrupt: return 130
  return 0

if __name__ == "__main__": sys.exit(main())
