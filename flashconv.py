"""FlashConv: the causal FFT convolution of H3 as one fused kernel, forward and backward.

Paper: Fu, Dao et al. 2022, "Hungry Hungry Hippos", arXiv 2212.14052, section 4 (FlashConv: fusion
and block FFT). The official CUDA version is HazyResearch/H3 csrc/fftconv; this one is written in
tinygrad UOps and compiles for whatever device is there. The plain definition stands beside it.

Glossary. B batch, H channels, L length, K taps, N ≥ L + K - 1 length of the FFT, a power of two
  u, y    (B,H,L)  input, output          k   (H,K)  filter
  v, q    (B,H,L)  gates before, after    D   (H,)   skip term
  y = q * (k ∗ (u*v) + D*(u*v))           the long convolution of the H3 layer, section 3.1
  F                                       discrete Fourier transform of length N
  kf      F(k + D δ)/N                    the filter's spectrum, digit-reversed, kept in registers
  M       N/8                             length of the 8 transforms that go on side by side
Also here: `ssm_conv`, the same with an SSM's filter at any length, by state passing; where tinygrad's own are slow on a
CPU, `matmul`, `layernorm`, `causal_softmax`, `embedding`, with their gradients; for decoding `h3_step`, `attend_step`
and `write`, which overwrite states; `launch`, by which all of them run, with gradients that survive what is read before;
and, in the section on the device, what makes a CPU's cores work at once, for threads and forks too.
Run: `python flashconv.py` checks the kernels and times them against plain tinygrad and PyTorch;
`python flashconv.py --render metal` (cuda, opencl) prints their sources; FLASH=0 turns them off.

Not here: half precision; any filter but an SSM's past a length of 2^15 (plain ops do them); a fused
matrix product on GPUs, where tinygrad's own is good. The shift SSM is a launch of its own: one kernel
for both convolutions of an H3 layer (twice through the same block) took 1.59, 7.3, 16.9 and 39.7 ms
forward at L = 256, 1024, 2048 and 4096 where the two launches take 1.57, 8.1, 20.0 and 41.4 (B=8,
H=256, CPU), and its backward pass would do two transforms more, to compute anew what lies stored.
"""
from __future__ import annotations
import argparse, cmath, functools, itertools, operator, os, subprocess, sys, threading
from typing import Callable, NamedTuple, Sequence
import numpy as np
from tinygrad import Device, Tensor, TinyJit, UOp, dtypes, tensor
from tinygrad.codegen import to_program
from tinygrad.dtype import AddrSpace, strong_dtype
from tinygrad.engine.realize import capturing
from tinygrad.helpers import Context, ContextVar, Target, prod
from tinygrad.renderer import Renderer, cstyle
from tinygrad.uop.ops import (AxisType, KernelInfo, Ops, ParamArg, PatternMatcher, UPat,
                              graph_rewrite, shape_to_shape_arg)

FLASH = ContextVar("FLASH", 1)  # 0: plain tinygrad ops everywhere
HALF = ContextVar("HALF", 0)    # what products with weights take in. 1: float16, 2: bfloat16; their sums are float32

# ---------------------------------------------------------------- TinyJit
def capture(f:Callable, **options) -> TinyJit:
  """A TinyJit that captures at its first call, not its second: f is scheduled and compiled once, and the buffers
  of a run without memory planning never exist (1.4 GB at the peak of a training step where 0.5 do). Where f draws
  random numbers, draw one before: a counter made while capturing would start anew at every call."""
  jit = TinyJit(f, **options)
  jit.cnt = 1
  return jit

LOCK = threading.RLock()        # held by the thread that realises Tensors or calls a TinyJit

def constant(x:np.ndarray, device:str, dtype:type=np.float32) -> Tensor:
  "A Tensor realised at once, even while a TinyJit captures, so that replays do not make it again."
  with LOCK:
    held, capturing[:] = capturing[:], []
    try: return Tensor(np.asarray(x, dtype), device=device).realize()
    finally: capturing[:] = held

# ---------------------------------------------------------------- launching a kernel
# With Tensor.custom_kernel alone, all gradients are zero once the loss has been read. The cause: to
# realise anything, tinygrad replaces every AFTER and CONTIGUOUS of its graph by a buffer, in all
# Tensors, and the call of a kernel with its gradient stands behind an AFTER. What is inside a
# FUNCTION is not replaced. So `launch` puts the call of a kernel into one, and `stored` the
# CONTIGUOUS. `precompile` lets the kernel write straight into the buffer that the caller realises;
# without it there would be a copy.

@functools.cache
def bound(f:Callable, **options) -> Callable:
  """Returns functools.partial(f, **options), the same object each time it is asked for.

  For every kernel or gradient with options: tinygrad's cache of schedules compares these functions
  by identity, and a new one makes each step of a loop without TinyJit schedule anew. f: a function
  of a module, not a lambda or a nested one; options: hashable. Both are kept for ever.
  """
  return functools.partial(f, **options)

def no_second_gradient(name:str) -> str:
  "Returns what `launch` takes as the gradient of a kernel that is a gradient itself."
  return (f"{name} can be differentiated once: the kernel of its gradient has none of its own. "
          "For second derivatives use plain ops, Context(FLASH=0).")

@functools.cache
def _as_grad_fxn(gradient:Callable|str) -> Callable:
  "Turns gradient(dy, y, *inputs) over Tensors, see `launch`, into tinygrad's grad_fxn(dy, call) over UOps."
  def grad_fxn(dy:UOp, *rest:UOp, call:UOp|None=None) -> tuple[UOp|None, ...]:
    if call is None: call = rest[0]                  # by name, if several outputs have gradients
    if isinstance(gradient, str): raise RuntimeError(gradient)
    # the CONTIGUOUS that `contiguous_backward` puts here would be replaced, see above
    dy = Tensor(dy.src[0] if dy.op is Ops.CONTIGUOUS else dy)
    if dy.uop.axis is not None: dy = dy.to(dy.device[0]).shard(dy.device)    # a kernel takes it whole
    grads = gradient(dy, Tensor(call.gettuple(0)), *(Tensor(x) for x in call.src[1:]))
    return tuple(None if g is None else g.uop for g in grads)
  return grad_fxn

Shape = tuple[int, ...]

@functools.cache
def _call_of(kernel:Callable, shapes:tuple[Shape, ...], params:tuple[UOp, ...]) -> UOp:
  "The body of a FUNCTION: float32 buffers of these shapes, after the kernel has written them."
  device = params[0].device
  # tinygrad puts the buffers of a caller in their place; slots below 0 are those of no other
  buffers = [UOp(Ops.BUFFER, src=(shape_to_shape_arg(s),), arg=ParamArg(-1-i, dtypes.float, device=device))
             for i, s in enumerate(shapes)]
  written = UOp.custom_kernel(*buffers, *params, fxn=kernel)[:len(shapes)]
  if not isinstance(written[0].src[1].src[0].arg, KernelInfo):
    raise ValueError("launch: the sink of a kernel needs a KernelInfo, or nothing would run.")
  return UOp.maketuple(*written)

def launch(kernel:Callable, outputs:Sequence[Shape|Tensor], inputs:Sequence[Tensor],
           gradient:Callable|str) -> list[Tensor]:
  """Runs one kernel and returns its outputs, differentiable, whatever is read before the gradient.

  kernel(*outputs, *inputs) gets UOps to index, `x[i, j]`, and returns
  `stores.end(*ranges).sink(arg=KernelInfo(name=..., opts_to_apply=()))`; `_norm` is a short one.
  outputs: shapes, as tuples, of new float32 Tensors; or Tensors, which are overwritten.
  inputs: of any type; views and expressions are written to memory first, in each realisation.
  gradient(dy, y, *inputs) returns a Tensor, or None, for each input, usually by another `launch`;
  y is the output and dy its gradient. A str is the message of the RuntimeError that is raised
  instead: with `no_second_gradient`, and for several outputs, which can't have a gradient.
  kernel and gradient are the same objects at each call: functions of a module, or `bound` ones.
  """
  if callable(gradient) and len(outputs) > 1: raise ValueError("launch: with several outputs there is no gradient.")
  if any(isinstance(x, Tensor) for x in outputs):
    new = [x if isinstance(x, Tensor) else Tensor.empty(*x, dtype=dtypes.float, device=inputs[0].device)
           for x in outputs]
    # contiguous() of a part of a buffer is a view, without it there would be a copy
    inputs = [x.contiguous() if x.uop.base.op is Ops.BUFFER else x for x in inputs]
    return Tensor.custom_kernel(*new, *inputs, fxn=kernel, grad_fxn=_as_grad_fxn(gradient))[:len(new)]
  params = tuple(x.uop.param_like(i) for i, x in enumerate(inputs))
  call = _call_of(kernel, tuple(outputs), params).call(
    *(x.uop for x in inputs), grad_fxn=_as_grad_fxn(gradient), precompile=True)
  # tinygrad 0.14.0 replaces no GETTUPLE by the buffer it was realised in, and would compute it again
  # at each use. It replaces an op that stands on it, and contiguous_backward costs nothing.
  return [Tensor(call.gettuple(i)).contiguous_backward() for i in range(len(outputs))]

# tinygrad stores the inputs of such a FUNCTION, and would copy one that is stored but reshaped
tensor.pm_early_transform_tensor_graph = PatternMatcher([
  (UPat(Ops.CONTIGUOUS, src=(UPat(Ops.RESHAPE, name="x"),), name="c"),
   lambda c, x: x if c.tag is None and x.has_buffer_identity(after_ok=True) else None)
]) + tensor.pm_early_transform_tensor_graph

def stored(x:Tensor) -> Tensor:
  """Writes x to memory before it is used, as x.contiguous() does.

  After x.contiguous(), reading a Tensor that depends on it makes the gradients before it zero.
  """
  if x.uop.has_buffer_identity() or x.device is None: return x
  body = UOp.maketuple(x.uop.param_like(0).contiguous())
  return Tensor(body.call(x.uop, grad_fxn=_as_grad_fxn(_same_backward)).gettuple(0))

def stored_backward(x:Tensor) -> Tensor:
  "Returns x. The gradient that arrives is written to memory before it is used."
  body = UOp.maketuple(x.uop.param_like(0))
  return Tensor(body.call(x.uop, grad_fxn=_as_grad_fxn(_stored_backward)).gettuple(0))

def _same_backward(dy:Tensor, y:Tensor, x:Tensor) -> tuple[Tensor]: return dy,
def _stored_backward(dy:Tensor, y:Tensor, x:Tensor) -> tuple[Tensor]: return stored(dy),

@functools.cache
def _zero(device:str|tuple[str, ...]) -> Tensor: return constant(np.zeros(1), device).reshape(())

def on_one_device(*tensors:Tensor|None) -> list[Tensor|None]:
  """Returns the Tensors, those without a device on that of the others.

  tinygrad gives constants (`Tensor.eye`, `arange`, `linspace`, `Tensor(3)`) no device and no
  storage; a kernel needs both. Adding a zero that has them keeps the value and the gradient.
  """
  device = next((t.device for t in tensors if t is not None and t.device is not None),
                Device.DEFAULT)
  return [t if t is None or t.device is not None else t + _zero(device).cast(strong_dtype(t.dtype))
          for t in tensors]

# ---------------------------------------------------------------- the seam for faster versions
FAST: dict[str, Callable] = {}   # by name, faster versions of `replaceable` definitions: support/cpu.py fills it

def replaceable(f:Callable) -> Callable:
  """Marks a definition in plain ops that may have a faster version in FAST, which takes the same arguments.

  A faster version returns None where it does not serve. FLASH=0 turns all of them off.
  """
  @functools.wraps(f)
  def call(*args, **options):
    y = FAST[f.__name__](*args, **options) if FLASH and f.__name__ in FAST else None
    return f(*args, **options) if y is None else y
  return call

@replaceable
def matmul(x:Tensor, w:Tensor) -> Tensor:
  "Returns x @ w, for x (…,M,K) and w (K,N) or (…,K,N). Differentiable in both."
  return x @ w

@replaceable
def lookup(table:Tensor, ids:Tensor) -> Tensor:
  """Returns table[ids] as float32: table (V,D), of any type of WEIGHTS, ids (…) int from 0 to V-1 -> (…,D).

  Differentiable in the table.
  """
  ids, table = on_one_device(ids, table)
  onehot = ids.unsqueeze(-1) == Tensor.arange(table.shape[0])
  if table.shape[0] <= 1024: return matmul(onehot.float(), widened(table))         # for the sake of its gradient
  return widened(onehot.unsqueeze(-1).where(table, 0).sum(-2, dtype=table.dtype))  # tinygrad makes this a look-up

def overwrite(old:Sequence[Tensor], new:Sequence[Tensor]) -> None:
  "Writes each new Tensor, which has been realised, into the old one; nothing where a kernel has done so already."
  moved = [o.assign(n.detach()) for o, n in zip(old, new) if n.uop.base is not o.uop.base]
  if moved: Tensor.realize(*moved)

# ---------------------------------------------------------------- complex numbers: pairs (re, im) of Tensors or of UOps
Pair = tuple

def cmul(a:Pair, b:Pair) -> Pair: return a[0]*b[0] - a[1]*b[1], a[0]*b[1] + a[1]*b[0]
def conj(a:Pair) -> Pair: return a[0], -a[1]

# ---------------------------------------------------------------- the definition, in plain ops
@functools.cache
def _roots(rows:int, cols:int, n:int, device:str, dtype:type) -> Pair:
  "exp(-2πi jk/n), j < rows, k < cols, computed in float64."
  w = np.exp(-2j*np.pi/n * (np.outer(np.arange(rows), np.arange(cols)) % n))
  return tuple(constant(p, device, dtype) for p in (w.real, w.imag))

def fft(x:Pair, inverse:bool=False) -> Pair:
  """X[k] = Σ_n x[n] exp(∓2πi nk/N) over the last axis, N a power of two, by matrix products.
  The inverse comes without its 1/N."""
  N, sign = x[0].shape[-1], conj if inverse else lambda w: w
  where = x[0].device, np.float64 if x[0].dtype == dtypes.double else np.float32
  if N <= 32:
    (re, im), (c, s) = x, sign(_roots(N, N, N, *where))
    return re@c - im@s, re@s + im@c
  N1 = 32 if N >= 1024 else 16 if N >= 256 else 8         # n = n1 N2 + n2, k = k1 + N1 k2
  a = tuple(p.reshape(*p.shape[:-1], N1, N//N1).transpose(-1, -2) for p in x)  # (…, n2, n1)
  a = cmul(fft(a, inverse), sign(_roots(N//N1, N1, N, *where)))                 # (…, n2, k1)
  a = fft(tuple(p.transpose(-1, -2) for p in a), inverse)                      # (…, k1, k2)
  return tuple(p.transpose(-1, -2).reshape(x[0].shape) for p in a)

def _length(L:int, K:int) -> int: return max(64, 1 << (L + K - 2).bit_length())

def fftconv_ref(u:Tensor, k:Tensor, D:Tensor|None=None, v:Tensor|None=None,
                q:Tensor|None=None) -> Tensor:
  "The definition of `fftconv`, same arguments, in plain tinygrad ops."
  w, L, k = u if v is None else u*v, u.shape[-1], k[:, :u.shape[-1]]
  N = _length(L, k.shape[-1])
  pad = lambda x: (p := x.pad((None,)*(x.ndim-1) + ((0, N-x.shape[-1]),)), p.const_like(0))
  y = fft(cmul(fft(pad(w)), fft(pad(k))), inverse=True)[0][..., :L] / N        # F⁻¹(F w · F k)
  if D is not None: y = y + D.reshape(-1, 1)*w
  return y if q is None else q*y

# ---------------------------------------------------------------- the block FFT, as a kernel's author sees it
# Forward / with gradients, ms, and seconds until both are compiled and captured, the three in turns on a busy
# machine (only ratios count); B=8, H=256 (CPU: two cores of a Xeon, clang 14), H=64 (PoCL, the same machine):
#   radix      CPU L=256        L=1024           L=4096            OpenCL L=256     L=1024
#     4        1.1 /  3.9  5s   6.5 / 33   5s    31 / 131   8s     1.3 / 4.4   6s   8.5 / 21  14s
#     8        0.8 /  2.3  4s   5.2 / 23   5s    29 / 132   7s     0.9 / 2.8   8s   5.3 / 18  12s
#    16        1.1 /  3.4  8s   6.5 / 26   9s    38 / 149  15s     1.0 / 3.7  17s   5.9 / 22  22s
# What goes into the lanes of a CPU's vectors, one core, forward, L=1024 and 8192: 16 channels of tensors
# (B,L,H) 15 and 449 ms, the 8 sub-transforms of one channel 12 and 113 ms: their scratch stays in the L1
# cache. Then `Real` took a third off the arithmetic: 8 ms at L=1024.
RADIX = 8
MAX_N = 1 << 16                      # FFT length on a CPU: 2 MB of stack in the backward pass
SHORT = 1 << 12                      # length of a short filter's transform on a long sequence
ONE_CORE = 1 << 20                   # B H N up to which one core is as fast as two

class Machine(NamedTuple):
  "What the kernels ask of a device's renderer; its name is never asked."
  gpu: bool                          # threads, local memory and barriers; else loops
  cores: int                         # threads of a CPU that share the outermost loop
  scratch: int                       # bytes of local memory
  has_sub: bool                      # renders a - b
  lanes: int = 1                     # floats in a CPU's vector register,
  registers: int = 16                # and how many of those it has

@functools.cache
def machine(device:str|tuple[str, ...]) -> Machine:
  r = Device[device if isinstance(device, str) else device[0]].renderer
  cores, vectors = r.global_max[0] if r.has_threads else 1, () if r.has_local else _vectors(r)
  return Machine(r.has_local, cores, r.shared_max, Ops.SUB in r.code_for_op, *vectors)

WIDE = "prefer-vector-width=512"       # clang leaves half of an AVX-512 register empty unless told so

@functools.cache
def _compiler_macros() -> str:
  "The macros of the CPU's compiler: its version, and what it knows of the processor that it compiles for."
  options = Device["CPU"].renderer.compiler.args
  try: return subprocess.run([os.environ.get("CC", "clang"), *options, "-dM", "-E", "-x", "c", os.devnull],
                             capture_output=True, text=True).stdout
  except OSError: return ""

def _compiler_says(macro:str) -> bool: return f"#define {macro} " in _compiler_macros()

def _vectors(r:Renderer) -> tuple[int, int]:
  "Lanes and number of a CPU's vector registers."
  return (16 if WIDE in r.target.arch else 8 if _compiler_says("__AVX__") else 4,
          32 if _compiler_says("__AVX512VL__") or _compiler_says("__ARM_NEON") else 16)

def _cores(n:int, axis:int) -> tuple[UOp, UOp]:
  """A range that the cores of a CPU share, and its index; axis: the range's number. The mask tells clang the
  index's range: without it indices may wrap, and loops were left scalar."""
  core = UOp.range(n, axis, AxisType.THREAD if n > 1 else AxisType.LOOP)
  return core, core & ((1 << (n-1).bit_length()) - 1)

class Real:
  """±x or 0, a float in a register.

  The sign is carried here and zeros are dropped here: tinygrad writes a - b as a + (-1)·b and
  multiplies sums out, which made the butterflies a third longer.
  """
  def __init__(self, x:UOp|None, sign:int=1): self.x, self.sign = x, sign
  def __neg__(a) -> Real: return Real(a.x, -a.sign)
  def __add__(a, b:Real) -> Real:
    if not a.sign or not b.sign: return a if a.sign else b
    if a.sign == b.sign: return Real(a.x + b.x, a.sign)
    return Real(a.x.alu(Ops.SUB, b.x)) if a.sign > 0 else Real(b.x.alu(Ops.SUB, a.x))
  def __sub__(a, b:Real) -> Real: return a + -b
  def __mul__(a, b:Real|float) -> Real:
    sign = a.sign*(b.sign if isinstance(b, Real) else 1 if b > 0 else -1)
    return Real(a.x*(b.x if isinstance(b, Real) else abs(b)), sign) if sign else ZERO
  @property
  def uop(a) -> UOp: return a.x if a.sign > 0 else a.x*-1 if a.sign < 0 else UOp.const(0.0, dtypes.float)

ZERO = Real(None, 0)

def rotate(x:Pair, w:complex) -> Pair:
  "x·w for a constant w of modulus 1, with the fewest products"
  (a, b), c, s = x, round(w.real, 15), round(w.imag, 15)
  if s == 0: return x if c == 1 else (-a, -b)
  if c == 0: return (-b, a) if s > 0 else (b, -a)
  if abs(c) == abs(s): return ((a-b)*c, (a+b)*c) if c == s else ((a+b)*c, (b-a)*c)
  return cmul(x, (c, s))

def dft(x:list[Pair], sign:int) -> list[Pair]:
  "X[k] = Σ_n x[n] exp(sign 2πi nk/R) of R = 2^m values in registers: a radix-2 tree, written out."
  if (R := len(x)) == 1: return x
  even, odd = dft(x[0::2], sign), dft(x[1::2], sign)
  odd = [rotate(o, cmath.exp(sign*2j*cmath.pi*i/R)) for i, o in enumerate(odd)]
  return [tuple(f(a, b) for a, b in zip(e, o))
          for f in (operator.add, operator.sub) for e, o in zip(even, odd)]

def reals(re:UOp, im:UOp) -> Pair: return Real(re), Real(im)
def scaled(z:Pair, c:float) -> Pair: return z[0]*c, z[1]*c

def twiddle(tw:UOp, x:list[Pair], j:UOp, sign:int) -> list[Pair]:
  "x[r] · exp(sign 2πi jr/N), for the roots tw (2,R,N/R) of `_twiddles`"
  return [z if r == 0 else cmul(z, (Real(tw[0, r, j]), Real(tw[1, r, j], -sign))) for r, z in enumerate(x)]

class Group:
  """One channel and the hands that work on it: the threads of a work group (GPU), or one turn of the
  outermost loop (CPU), which the cores share.

  N = 8 M: the first pass of the transform splits it into 8 transforms of length M, which go on side
  by side, as the lanes of a vector register (CPU) or in neighbouring threads (GPU).
  """
  def __init__(self, m:Machine, H:int, N:int):
    self.m, self.N, self.M, self.ids = m, N, N//RADIX, itertools.count()
    self.threads = min(self.M, 256)
    self.passes, M = [], self.M      # sub-lengths of the passes over the lanes; the last has radix R
    while M > RADIX: self.passes.append(M); M //= RADIX
    self.R = M
    if m.gpu:
      self.h, self.outer = UOp.special(H, "gidx0"), ()
      # two dimensions: neighbours in the first one read neighbours, with no division to hide it
      self.lane, self.row = UOp.special(RADIX, "lidx0"), UOp.special(self.threads//RADIX, "lidx1")
      self.thread = self.row*RADIX + self.lane
    else:
      cores = next(c for c in range(m.cores, 0, -1) if H % c == 0)
      core, me = _cores(cores, next(self.ids))
      i = self.loop(H//cores)
      self.h, self.outer = me*(H//cores) + i, (i, core)
  def loop(self, n:int, axis:AxisType=AxisType.LOOP) -> UOp: return UOp.range(n, next(self.ids), axis)
  def columns(self, body:Callable[[UOp], list[UOp]]) -> UOp:
    "body(j) for j < M; clang makes vectors of the loop over j."
    if self.m.gpu: return UOp.group(*[s for t in range(0, self.M, self.threads) for s in body(self.thread + t)])
    return UOp.group(*body(j := self.loop(self.M))).end(j)
  def everywhere(self, P:int, body:Callable[[UOp, UOp], list[UOp]]) -> UOp:
    "body(p, j) for p < P, j < M: columns that don't meet in scratch memory."
    if not self.m.gpu: return UOp.group(*body(p := self.loop(P), j := self.loop(self.M))).end(j, p)
    p, t = UOp.special(P, "gidx1"), UOp.special(self.M//self.threads, "gidx2")
    return UOp.group(*body(p, t*self.threads + self.thread))
  def lanes(self, n:int, body:Callable[[int|UOp, UOp, UOp], list[UOp]]) -> UOp:
    "body(turn, t, lane) for t < n in each lane; turn counts a thread's own."
    if self.m.gpu:
      places = [self.row + t for t in range(0, n, self.threads//RADIX)]
      return UOp.group(*[s for turn, t in enumerate(places) for s in body(turn, t, self.lane)])
    t, lane = self.loop(n), self.loop(RADIX)
    return UOp.group(*body(t, t, lane)).end(lane, t)
  def finish(self, done:UOp, name:str) -> UOp:
    sink = done.end(*self.outer).sink(arg=KernelInfo(name=f"{name}_{self.N}", opts_to_apply=()))
    return sink if self.m.has_sub else graph_rewrite(sink, without_sub)

without_sub = PatternMatcher([(UPat(Ops.SUB, src=(UPat.var("a"), UPat.var("b"))), lambda a, b: a + b*-1)])

class Kept:
  "A spectrum in registers: of each butterfly of the last pass, with the hands that work on it."
  def __init__(self, group:Group, slot:int):
    self.group, self.done = group, group.outer
    shape = (2, group.N//group.threads, 1) if group.m.gpu else (2, group.M, RADIX)
    self.mem = UOp.placeholder(shape, dtypes.float, slot=slot, addrspace=AddrSpace.REG)
  def at(self, turn:int|UOp, lane:UOp, *after:UOp) -> Callable[[int], tuple[UOp, UOp]]:
    mem, lane = self.mem.after(*self.done, *after), 0 if self.group.m.gpu else lane
    return lambda r: tuple(mem[c, turn*self.group.R + r, lane] for c in range(2))
  def get(self, turn:int|UOp, lane:UOp, *after:UOp) -> list[Pair]:
    place = self.at(turn, lane, *after)
    return [reals(*place(r)) for r in range(self.group.R)]
  def put(self, turn:int|UOp, lane:UOp, X:list[Pair], *after:UOp) -> list[UOp]:
    place = self.at(turn, lane, *after)
    return [x.store(v.uop) for r, z in enumerate(X) for x, v in zip(place(r), z)]

class Block:
  """N complex numbers in scratch memory, and the passes of their transform, in place.

  Forward by decimation in frequency (natural order in, digit-reversed out), back by decimation in
  time (the reverse): with spectra kept digit-reversed nothing is ever reordered. A butterfly writes
  the places it has read and no others, so one barrier a pass is enough. `done` is what has to be
  finished before the next reader.
  """
  def __init__(self, group:Group, tw:UOp):
    self.group, self.tw, self.done = group, tw, group.outer
    # LOCAL on a CPU puts a fence at every loop's end, nothing is vectorised: 6x slower
    space = AddrSpace.LOCAL if group.m.gpu else AddrSpace.REG
    # a row left free on a CPU, so that the stores to 8 lanes come out in order: clang makes one shuffled
    # store of them, not 8 scattered ones; a twentieth faster
    self.first = int(not group.m.gpu)
    # on a GPU a ninth, where it fits: with 8, a column's stores meet on 4 of 32 banks
    wide = RADIX + int(group.m.gpu and 2*4*group.M*(RADIX+1) <= group.m.scratch)
    self.mem = UOp.placeholder((2, group.M + self.first, wide), dtypes.float, slot=0, addrspace=space)
  def get(self, mem:UOp, i:UOp, lane:UOp|int) -> Pair:
    return reals(*(mem[c, i + self.first, lane] for c in range(2)))
  def put(self, mem:UOp, i:UOp, lane:UOp|int, z:Pair) -> list[UOp]:
    return [mem[c, i + self.first, lane].store(z[c].uop) for c in range(2)]
  def free(self):
    "Others may write next where somebody still reads: that takes a barrier of its own on a GPU."
    if self.group.m.gpu: self.done = (UOp.group(*self.done).barrier(),)
  def forward(self, load:Callable[[UOp, int], Pair], *after:UOp):
    "All passes but the last of X = F x, with x at j + off from load(j, off)."
    g, mem = self.group, self.mem.after(*self.done, *after)
    def split(j:UOp) -> list[UOp]:
      x = twiddle(self.tw, dft([load(j, r*g.M) for r in range(RADIX)], -1), j, -1)          # x = T · (F₈ x)
      return [s for r in range(RADIX) for s in self.put(mem, j, r, x[r])]
    self.done = (g.columns(split),)
    for M in g.passes: self.inner(M, lambda x, j: twiddle(self.tw, dft(x, -1), j, -1))      # x = T · (F₈ x)
  def inner(self, M:int, butterfly:Callable[[list[Pair], UOp], list[Pair]]):
    "A radix-8 pass over sub-transforms of length M, in each lane."
    g, S, mem = self.group, M//RADIX, self.mem.after(*self.done)
    def body(_:int|UOp, t:UOp, lane:UOp) -> list[UOp]:
      j, i = t%S, t//S*M + t%S
      x = butterfly([self.get(mem, i + r*S, lane) for r in range(RADIX)], j*(g.M//M*RADIX))
      return [s for r in range(RADIX) for s in self.put(mem, i + r*S, lane, x[r])]
    self.done = (g.lanes(g.M//RADIX, body),)
  def spectrum(self, body:Callable[[int|UOp, UOp, list[Pair]|None], tuple[list[Pair]|None, list[UOp]]],
               back_only:bool=False):
    """The last pass of X = F x, body(turn, lane, X) -> (Y, stores), and the first pass of y = N F⁻¹ Y.
    Without a Y nothing goes back; with back_only there is no X."""
    g, R, mem = self.group, self.group.R, self.mem.after(*self.done)
    def last(turn:int|UOp, t:UOp, lane:UOp) -> list[UOp]:
      X = None if back_only else dft([self.get(mem, t*R + r, lane) for r in range(R)], -1)
      Y, stores = body(turn, lane, X)
      return stores + ([s for r, y in enumerate(dft(Y, +1)) for s in self.put(mem, t*R + r, lane, y)] if Y else [])
    self.done = (g.lanes(g.M//R, last),)
  def inverse(self, store:Callable[[UOp, int, Pair], list[UOp]]):
    "All passes but the first of y = N F⁻¹ Y; y at j + off goes to store(j, off, y)."
    g = self.group
    for M in g.passes[::-1]: self.inner(M, lambda x, j: dft(twiddle(self.tw, x, j, +1), +1))  # x = F₈* (T* · x)
    mem = self.mem.after(*self.done)
    def join(j:UOp) -> list[UOp]:
      x = dft(twiddle(self.tw, [self.get(mem, j, r) for r in range(RADIX)], j, +1), +1)
      return [s for r in range(RADIX) for s in store(j, r*g.M, x[r])]
    self.done = (g.columns(join),)

class Rows:
  """Rows 2p and 2p+1 of a batch as one complex sequence: the filter is real, so the two results come
  out as re and im. So the rounding of the two is that of the larger, and an infinity in one reaches the other.
  Past the end of a row, and for the row that an odd batch lacks, reads give 0. Writes go to buffers
  of whole pairs and whole columns (`_padded`), of which views cut the rest off.
  """
  name = "fftconv"
  def __init__(self, group:Group, shape:tuple[int, ...], p:UOp|int):
    (B, _, self.L), self.group, b = shape, group, 2*p + 1
    self.rows = [(2*p, None)] if B == 1 else [(2*p, None), (b, b < B if B % 2 else None)]
  @staticmethod
  def count(shape:tuple[int, ...]) -> int: return -(-shape[0]//2)
  def load(self, j:UOp, off:int, *factors:UOp) -> Pair:
    "Π factors at j + off"
    if off >= self.L: return ZERO, ZERO
    inside = j + off < self.L if off + self.group.M > self.L else None
    def read(b:UOp, there:UOp|None) -> Real:
      gates = [c for c in (inside, there) if c is not None]
      at = (j + off).valid(gate := functools.reduce(operator.and_, gates)) if gates else j + off
      x = [f[b, 0 if f.shape[1] == 1 else self.group.h, at] for f in factors]
      return Real(functools.reduce(operator.mul, [gate.where(c, 0.0) for c in x] if gates else x))
    return *(read(*row) for row in self.rows), *[ZERO]*(2 - len(self.rows))
  def store(self, j:UOp, off:int, out:UOp, z:Pair) -> list[UOp]:
    if off >= self.L: return []
    return [out[b, self.group.h, j + off].store(c.uop) for (b, _), c in zip(self.rows, z)]

def _padded(B:int, L:int, M:int) -> tuple[int, int]:
  """Whole pairs of rows, and whole columns of the first pass: tinygrad 0.14.0 can lose the condition
  of a store, where it leaves a single place."""
  return B + (B % 2 if B > 1 else 0), -(-L//M)*M

class Parts:
  "Sub-transform h of sequence p, complex numbers between the launches of a two-level transform: (P,H,2,N)."
  name = "fftconv_parts"
  def __init__(self, group:Group, shape:tuple[int, ...], p:UOp|int): self.group, self.p = group, p
  @staticmethod
  def count(shape:tuple[int, ...]) -> int: return shape[0]
  def load(self, j:UOp, off:int, x:UOp) -> Pair:
    return reals(*(x[self.p, self.group.h, c, j + off] for c in range(2)))
  def store(self, j:UOp, off:int, out:UOp, z:Pair) -> list[UOp]:
    return [out[self.p, self.group.h, c, j + off].store(z[c].uop) for c in range(2)]

# ---------------------------------------------------------------- the kernels
def _times(a:Pair, b:Pair) -> Pair: return a[0]*b[0], a[1]*b[1]  # two real rows, two real gates

def _start(m:Machine, kind:type, x:dict[str, UOp], tw:UOp, k:UOp) -> tuple[Group, Block, Kept]:
  "kf = F(k + D δ)/N, which stays in registers"
  g = Group(m, x["u"].shape[1], RADIX*tw.shape[2])
  z, kf, rows = Block(g, tw), Kept(g, 1), kind(g, k.shape, 0)
  def load(j:UOp, off:int) -> Pair:
    re, im = rows.load(j, off, k)
    return re + Real(j.eq(0).where(x["D"][g.h], 0.0)) if "D" in x and off == 0 else re, im
  z.forward(load)
  z.spectrum(lambda turn, lane, X: (None, kf.put(turn, lane, [scaled(a, 1/g.N) for a in X])))
  kf.done = z.done
  z.free()
  return g, z, kf

@functools.cache
def _conv(names:tuple[str, ...], m:Machine, kind:type) -> Callable:
  "y = q · F⁻¹(kf · F(u v))"
  @functools.cache
  def kernel(y:UOp, tw:UOp, k:UOp, *inputs:UOp) -> UOp:
    x = dict(zip(names, inputs))
    g, z, kf = _start(m, kind, x, tw, k)
    p = g.loop(kind.count(x["u"].shape), AxisType.REDUCE)
    rows, w = kind(g, x["u"].shape, p), [x[n] for n in "uv" if n in x]
    z.forward(lambda j, off: rows.load(j, off, *w), p)                                    # Z = F (u v)
    z.spectrum(lambda turn, lane, Z: (list(map(cmul, Z, kf.get(turn, lane))), []))        # Y = kf · Z
    gate = (lambda j, off, c: _times(c, rows.load(j, off, x["q"]))) if "q" in x else lambda j, off, c: c
    z.inverse(lambda j, off, c: rows.store(j, off, y, gate(j, off, c)))                   # y = q · F⁻¹ Y
    return g.finish(z.done[0].end(p), kind.name)
  return kernel

@functools.cache
def _conv_grad(names:tuple[str, ...], m:Machine, kind:type) -> Callable:
  """The gradients of `_conv`: dk, and du, dv, dq for those of u, v, q that are there. Nothing is
  kept from the forward pass but its inputs: kf, w = u v and c = k ∗ w are computed anew."""
  outs = [n for n in names if n != "D"]
  @functools.cache
  def kernel(dk:UOp, *bufs:UOp) -> UOp:
    d, (tw, k, dy), x = dict(zip(outs, bufs)), bufs[len(outs):len(outs)+3], dict(zip(names, bufs[len(outs)+3:]))
    g, z, kf = _start(m, kind, x, tw, k)
    Z, dkf = Kept(g, 2), Kept(g, 3)
    dkf.done = (g.lanes(g.M//g.R, lambda turn, t, lane: dkf.put(turn, lane, [(ZERO, ZERO)]*g.R)),)
    p = g.loop(kind.count(x["u"].shape), AxisType.REDUCE)     # pairs of rows in turn, each adds to dkf
    rows, w, e = kind(g, x["u"].shape, p), [x[n] for n in "uv" if n in x], [dy, *(x[n] for n in "q" if n in x)]
    z.forward(lambda j, off: rows.load(j, off, *w), p)
    z.spectrum(lambda turn, lane, X: (None, Z.put(turn, lane, X, p)))                     # Z = F w
    Z.done = z.done
    z.free()
    z.forward(lambda j, off: rows.load(j, off, *e))                                       # E = F (q dy)
    def meet(turn:int|UOp, lane:UOp, E:list[Pair]) -> tuple[list[Pair], list[UOp]]:
      terms = [cmul(conj(a), b) for a, b in zip(Z.get(turn, lane), E)]
      sums = [(s[0] + t[0], s[1] + t[1]) for s, t in zip(dkf.get(turn, lane, p), terms)]  # dkf = Σ_p Z* · E
      return [cmul(conj(a), b) for a, b in zip(kf.get(turn, lane), E)], dkf.put(turn, lane, sums, p)
    z.spectrum(meet)                                                                      # F dw = kf* · E
    def out(j:UOp, off:int, dw:Pair) -> list[UOp]:                                        # du = v dw, dv = u dw
      if "v" not in x: return rows.store(j, off, d["u"], dw)
      return [s for a, b in ("uv", "vu") for s in rows.store(j, off, d[a], _times(dw, rows.load(j, off, x[b])))]
    z.inverse(out)
    if "q" in x:
      z.free()
      z.spectrum(lambda turn, lane, _: (list(map(cmul, kf.get(turn, lane), Z.get(turn, lane))), []), back_only=True)
      # dq = dy · F⁻¹(kf · Z)
      z.inverse(lambda j, off, c: rows.store(j, off, d["q"], _times(c, rows.load(j, off, dy))))
    z.free()
    z.done = dkf.done = (z.done[0].end(p),)
    z.spectrum(lambda turn, lane, _: ([scaled(a, 1/g.N) for a in dkf.get(turn, lane)], []), back_only=True)
    z.inverse(lambda j, off, c: kind(g, k.shape, 0).store(j, off, dk, c))                       # dk = F⁻¹ dkf
    return g.finish(z.done[0], f"{kind.name}_grad")
  return kernel

@functools.cache
def _split(m:Machine) -> Callable:
  "The first pass, of radix R, of a transform of length R S: rows x (B,H,L) -> parts X (P,H R,2,S)."
  @functools.cache
  def kernel(X:UOp, tw:UOp, x:UOp) -> UOp:
    P, R, S = X.shape[0], tw.shape[1], tw.shape[2]
    g = Group(m, x.shape[1], RADIX*S)
    def body(p:UOp, j:UOp) -> list[UOp]:
      rows = Rows(g, x.shape, p)
      z = twiddle(tw, dft([rows.load(j, r*S, x) for r in range(R)], -1), j, -1)
      return [X[p, g.h*R + r, c, j].store(v.uop) for r in range(R) for c, v in enumerate(z[r])]
    return g.finish(g.everywhere(P, body), "fft_split")
  return kernel

@functools.cache
def _join(m:Machine, B:int, L:int) -> Callable:
  "The last pass back, and the adjoint of `_split`: parts X (P,H R,2,S) -> rows y (B,H,L)."
  @functools.cache
  def kernel(y:UOp, tw:UOp, X:UOp) -> UOp:
    P, R, S = X.shape[0], tw.shape[1], tw.shape[2]
    g = Group(m, y.shape[1], RADIX*S)
    def body(p:UOp, j:UOp) -> list[UOp]:
      rows, z = Rows(g, (B, y.shape[1], L), p), [reals(*(X[p, g.h*R + r, c, j] for c in range(2))) for r in range(R)]
      z = dft(twiddle(tw, z, j, +1), +1)
      return [s for r in range(R) for s in rows.store(j, r*S, y, z[r])]
    return g.finish(g.everywhere(P, body), "fft_join")
  return kernel

# ---------------------------------------------------------------- the public function
@functools.cache
def _twiddles(R:int, S:int, device:str) -> Tensor:
  "exp(-2πi rj/(R S)), r < R, j < S: (2,R,S)"
  w = np.exp(-2j*np.pi/(R*S) * np.outer(np.arange(R), np.arange(S)))
  return constant(np.stack([w.real, w.imag]), device)

# What a matrix of weights may be kept in; all else is float32. A bfloat16 is the upper half of a float32 and kept as a
# uint16, as clang 14, for one, knows no such type on a PC.
WEIGHTS = {"float32": dtypes.float, "float16": dtypes.half, "bfloat16": dtypes.ushort}

def widened(x:Tensor|UOp) -> Tensor|UOp:
  "Weights as float32."
  return x if x.dtype == dtypes.float else x.cast(dtypes.float) if x.dtype == dtypes.half else \
    (x.cast(dtypes.uint) << 16).bitcast(dtypes.float)

def whole(*tensors:Tensor|None) -> bool:
  "Whether none is in parts on several devices: a kernel takes what one device holds. (Whole on each is fine.)"
  return all(t is None or isinstance(t.device, str) or (t.device is not None and t.uop.axis is None) for t in tensors)

def _float_on_cpu(*tensors:Tensor|None, small:tuple[Tensor, ...]=()) -> bool:
  """Whether the CPU's matrix product and layer norm serve: float32, or what WEIGHTS has, not empty, on a device without
  local memory."""
  return bool(FLASH) and all(t is None or t.dtype == dtypes.float for t in tensors) \
    and all(t.dtype in WEIGHTS.values() for t in small) \
    and all(t is None or 0 not in t.shape for t in tensors + small) \
    and whole(*tensors, *small) and not machine((small + tensors)[0].device).gpu

def levels(device:str|tuple, N:int) -> int:
  """How a transform of length N runs: 1 in one launch, R > 1 in two levels, R of them of length N/R;
  0 where plain ops have to do it. Asked of the device's limits, never of its name."""
  if not FLASH: return 0
  m = machine(device)
  if not m.gpu: return int(N <= MAX_N)
  return next((R for R in (1, 2, 4, 8, 16) if 8*N <= R*m.scratch), 0)   # a complex number is 8 bytes

def _written(shape:tuple[int, ...], H:int, S:int, kind:type) -> tuple[int, ...]:
  "The shape of the buffer into which a kernel writes rows, or parts, of this shape."
  if kind is not Rows: return shape
  rows, columns = _padded(shape[0], shape[2], S)
  return rows, H, columns

def _trimmed(y:Tensor, shape:tuple[int, ...], kind:type) -> Tensor:
  "The part of such a buffer that is of this shape."
  return y[:shape[0], :, :shape[2]] if kind is Rows else y

def _one(x:dict[str, Tensor], k:Tensor, N:int, kind:type) -> Tensor:
  "The convolution in one launch, of rows (B,H,L) or of parts (P,H,2,N); k (1,H,K), (1,1,K) or (1,H,2,N)."
  u, m, names, S = x["u"], machine(k.device), tuple(x), N//RADIX
  if u.shape[0]*u.shape[1]*N < ONE_CORE: m = m._replace(cores=1)
  y, = launch(_conv(names, m, kind), [_written(u.shape, u.shape[1], S, kind)],
              [_twiddles(RADIX, S, k.device), k, *x.values()],
              bound(_one_backward, names=names, m=m, kind=kind))
  return _trimmed(y, u.shape, kind)

def _one_backward(dy:Tensor, y:Tensor, tw:Tensor, k:Tensor, *inputs:Tensor, names:tuple[str, ...],
                  m:Machine, kind:type) -> tuple[Tensor|None, ...]:
  "The gradient of `_one`: None for the roots, dk, and one for each of `names`."
  shape = inputs[names.index("u")].shape
  shapes = {"k": k.shape} | {n: shape for n in names if n != "D"}
  outputs = launch(_conv_grad(names, m, kind),
                   [_written(s, shape[1], tw.shape[2], kind) for s in shapes.values()],
                   [tw, k, _trimmed(dy, shape, kind), *inputs], no_second_gradient("fftconv"))
  d = {n: _trimmed(o, s, kind) for o, (n, s) in zip(outputs, shapes.items())}
  dk = d["k"]
  d["D"] = dk[0, :, 0]                                                                     # dD = dk at lag 0
  if k.shape[1] == 1: dk = dk.sum(1, keepdim=True)
  return None, dk, *(d[n] for n in names)

def _parts(x:Tensor, R:int, S:int) -> Tensor:
  "Rows (B,H,L) -> the R sub-transforms of a transform of length R S: (⌈B/2⌉,H R,2,S)."
  return launch(_split(machine(x.device)), [(Rows.count(x.shape), x.shape[1]*R, 2, S)],
                [_twiddles(R, S, x.device), x], _parts_backward)[0]

def _parts_backward(dX:Tensor, X:Tensor, tw:Tensor, x:Tensor) -> tuple[Tensor|None, ...]:
  "`_rows` is the adjoint of `_parts`; the roots get no gradient."
  return None, _rows(dX, x.shape, *tw.shape[1:])

def _rows(X:Tensor, shape:tuple[int, ...], R:int, S:int) -> Tensor:
  "The way back, without its 1/R, and the adjoint of `_parts`."
  B, H, L = shape
  y, = launch(_join(machine(X.device), B, L), [_written(shape, H, S, Rows)],
              [_twiddles(R, S, X.device), X], bound(_rows_backward, shape=shape))
  return _trimmed(y, shape, Rows)

def _rows_backward(dy:Tensor, y:Tensor, tw:Tensor, X:Tensor, shape:Shape) -> tuple[Tensor|None, ...]:
  "`_parts` is the adjoint of `_rows`; the roots get no gradient."
  return None, _parts(_trimmed(dy, shape, Rows), *tw.shape[1:])

def _overlapped(w:Tensor, k:Tensor, D:Tensor|None, N:int) -> Tensor:
  """A short filter along a long sequence, in pieces of N - K + 1 steps, each with the K-1 before it (overlap-save):
  what wraps around in a transform of length N falls into those, which are dropped."""
  (B, H, L), n = w.shape, N - k.shape[1] + 1
  P = -(-L//n)
  w = w.pad((None, None, (0, P*n-L))).reshape(B, H, P, n)
  before = w[..., 2*n-N:].pad((None, None, (1, 0), None))[:, :, :P]                               # (B,H,P,N-n)
  w = before.cat(w, dim=-1).transpose(1, 2).reshape(B*P, H, N)                                    # (B P,H,N)
  y = _one({n: x for n, x in zip("uD", (w, D)) if x is not None}, k.unsqueeze(0), N, Rows)[..., N-n:]
  return y.reshape(B, P, H, n).transpose(1, 2).reshape(B, H, P*n)[..., :L]

def fftconv(u:Tensor, k:Tensor, D:Tensor|None=None, v:Tensor|None=None, q:Tensor|None=None,
            channels_last:bool=False) -> Tensor:
  """y = q * (k ∗ (u*v) + D*(u*v)): the causal convolution along the last axis, gated before, after.

  u, v, q, y (B,H,L) float32, or (B,L,H) with channels_last; k (H,K), or (1,K), one filter for all
  channels; taps past L do nothing; D (H,). Left out, v and q are 1 and D is 0. Any B, H, L, K ≥ 1.
  Differentiable in every argument, works in TinyJit; plain ops (`fftconv_ref`) where no kernel
  serves. Raises ValueError when shapes don't fit.
  Sources: paper section 4; HazyResearch/H3 src/ops/fftconv.py:53-103.
  """
  gates = [x for x in (v, q) if x is not None]
  H = u.shape[2 if channels_last else 1] if u.ndim == 3 else 0
  if u.ndim != 3 or k.ndim != 2 or k.shape[0] not in (1, H) or any(x.shape != u.shape for x in gates) \
     or (D is not None and D.shape != (H,)):
    got = (f"{n} {x.shape}" for n, x in zip("uvqkD", (u, v, q, k, D)) if x is not None)
    raise ValueError("fftconv: u, v, q are (B,H,L), or (B,L,H) with channels_last, k (H,K) or (1,K), "
                     f"D (H,); got {', '.join(got)}")
  if channels_last:
    u, v, q = (None if x is None else x.transpose(1, 2) for x in (u, v, q))
    return fftconv(u, k, D, v, q).transpose(1, 2)
  u, k, D, v, q = on_one_device(u, k, D, v, q)
  L = u.shape[2]
  k = k[:, :L]
  N, short = _length(L, k.shape[1]), max(SHORT, _length(8*k.shape[1], 1))
  R, cut = levels(u.device, N), N > 2*short and levels(u.device, short) == 1
  inputs = [x for x in (u, k, D, v, q) if x is not None]
  if not (R or cut) or not whole(*inputs) or any(x.dtype != dtypes.float for x in inputs):
    return fftconv_ref(u, k, D, v, q)
  if cut:
    y = _overlapped(u if v is None else u*v, k, D, short)
    return y if q is None else q*y
  if R == 1: return _one({n: x for n, x in zip("uDvq", (u, D, v, q)) if x is not None}, k.unsqueeze(0), N, Rows)
  w = u if v is None else u*v
  X, K = (_parts(x, R, N//R) for x in (w, k.expand(H, k.shape[1]).unsqueeze(0)))
  y = _rows(_one({"u": X}, K, N//R, Parts), u.shape, R, N//R) * (1/R)
  if D is not None: y = y + D.reshape(-1, 1)*w
  return y if q is None else q*y

# ---------------------------------------------------------------- state passing: an SSM's convolution at any length
# A sequence is walked in chunks of c steps, R of them at a time. With w = u v and the state x, 2 Re C A^l B = k[l]:
#   y_n = P x_n + T w_n        P: 2 Re C A^(l+1), the state's answer;   T: k[l-j], a Toeplitz matrix, D on its diagonal
#   x_(n+1) = a x_n + Q w_n    a: A^c;   Q: A^(c-1-j) B, the chunk's share of the state
# All but `a x_n` are products of small matrices, done for R chunks at once. So short a chunk needs no FFT: at 32 steps
# T is a quarter of the work, and an FFT of 2,048 steps alone takes 1.8 ns a step and channel where all of this takes
# 1.4 to 2.1 (README). H=256, L=16384, chunks of 8, 16, 32, 64, 128, two cores: 9.0, 7.2, 6.3, 9.3, 15.3 ms forward,
# with gradients 39, 32, 39, 51, 76.
WALK_THREADS = 128                   # of a GPU's work group

def powers(a:Pair, n:int, step:int=1) -> Pair:
  """a^l for l = 0, step, …, (n-1)*step on a new last axis: a (…) -> (…,n).

  The bits of l choose among a, a^2, a^4, …: no exp, sin or cos, and in float32 more exact than
  exp(l log a). Many powers are products of few: a^(iJ + j) = (a^J)^i a^j.
  """
  if n > 16:
    I = -(-n // (J := 1 << n.bit_length() // 2))
    lo, hi = ([stored(t) for t in powers(a, m, s)] for m, s in ((J, step), (I, J*step)))
    both = cmul([t.unsqueeze(-1) for t in hi], [t.unsqueeze(-2) for t in lo])                    # (…,I,J)
    return tuple(t.flatten(-2)[..., :n] for t in both)
  const = (a[0].detach().unsqueeze(-1), a[1].detach().unsqueeze(-1))
  def power(l:Tensor) -> Pair:
    out, sq = (const[0].const_like(1), const[0].const_like(0)), const
    for b in range(((n-1)*step).bit_length()):
      bit, prod = (l // 2**b) % 2 == 1, cmul(out, sq)
      out, sq = (bit.where(prod[0], out[0]), bit.where(prod[1], out[1])), cmul(sq, sq)
    return out
  # Adding 0 = l a^(l-1) (a - const) changes no value and has the whole gradient,
  # d a^l = l a^(l-1) da: one sum over l in the backward pass instead of one for each bit.
  l = Tensor.arange(n) * step
  prev = power((l - 1).maximum(0))
  da = (a[0].unsqueeze(-1) - const[0], a[1].unsqueeze(-1) - const[1])
  slope = cmul((l*prev[0], l*prev[1]), da)
  return tuple(x + y for x, y in zip(power(l), slope))

class Vandermonde:
  """Sums over powers A^l, l < L, in two levels: l = i*J + j, J ~ sqrt(L), A^l = (A^J)^i A^j.

  The (H,M,L) table never exists: what remains are matrix products over tables of about sqrt(L)
  columns. The official sum has one level, src/ops/vandermonde.py:47-58.
  """
  def __init__(self, A:Pair, L:int):
    self.L, self.J = L, 1 << ((L-1).bit_length() + 1) // 2
    self.I, self.M = -(-L // self.J), A[0].shape[-1]
    self.hi = powers(A, self.I, self.J)                             # (H,M,I) each
    self.lo = stored(Tensor.cat(*powers(A, self.J), dim=-2))        # (H,2M,J), re above im

  def sum(self, c:Pair) -> Tensor:
    "2 Re sum_n c[n] A[n]^l, l < L: c (…,H,M) -> (…,H,L)."
    re, im = cmul((c[0].unsqueeze(-1), c[1].unsqueeze(-1)), self.hi)
    left = Tensor.cat(2*re, -2*im, dim=-2).transpose(-1, -2)        # (…,H,I,2M)
    y = matmul(left, self.lo.expand(*left.shape[:-2], -1, -1))      # (…,H,I,J)
    return y.reshape(*y.shape[:-2], self.I*self.J)[..., :self.L]

  def after(self, w:Tensor) -> Pair:
    "The transpose: sum_j A^(L-1-j) w[j], w (…,H,L) -> (…,H,M)."
    x = w.flip(-1).pad((None,)*(w.ndim-1) + ((0, self.I*self.J - self.L),))
    x = x.reshape(*w.shape[:-1], self.I, self.J)
    x = (x @ self.lo.transpose(-1, -2)).transpose(-1, -2)           # (…,H,2M,I)
    re, im = cmul((x[..., :self.M, :], x[..., self.M:, :]), self.hi)
    return re.sum(-1), im.sum(-1)

class Walk:
  """One channel and the hands that walk along its sequences: the threads of a work group (GPU), or one turn
  of the outermost loop (CPU), which the cores share. `done` is what has to be finished before the next reader.

  Scratch memory is flat, R+1 rows of S + c numbers: of two indices tinygrad would lose the gate of a store.
  """
  def __init__(self, m:Machine, shape:tuple[int, int, int], S:int, c:int, R:int):
    (self.B, self.H, self.L), self.m, self.S, self.c, self.R, self.W = shape, m, S, c, R, S + c
    self.groups, self.ids, self.slots = -(-self.L//(R*c)), itertools.count(), itertools.count()
    self.last = self.L//c - (self.groups - 1)*R       # row of the last group where the last whole chunk has ended
    if m.gpu: self.h, self.t, self.outer = UOp.special(self.H, "gidx0"), UOp.special(WALK_THREADS, "lidx0"), ()
    else:
      cores = next(n for n in range(m.cores, 0, -1) if self.H % n == 0)
      core, me = _cores(cores, next(self.ids))
      i = self.loop(self.H//cores, AxisType.LOOP)
      self.h, self.outer = me*(self.H//cores) + i, (i, core)
    self.done = self.outer
  def loop(self, n:int, axis:AxisType=AxisType.REDUCE) -> UOp: return UOp.range(n, next(self.ids), axis)
  def memory(self, size:int, shared:bool=True) -> UOp:
    space = AddrSpace.LOCAL if self.m.gpu and shared else AddrSpace.REG
    return UOp.placeholder((size,), dtypes.float, slot=next(self.slots), addrspace=space)
  def begin(self, n:int) -> UOp:
    "A loop in which everything up to its `end` takes place."
    self.done = (*self.done, i := self.loop(n))
    return i
  def end(self, i:UOp):
    "What this turn has read the next one may overwrite: that takes a barrier of its own on a GPU."
    done = UOp.group(*self.done)
    self.done = ((done.barrier() if self.m.gpu else done).end(i),)
  def finish(self, name:str) -> UOp:
    done = UOp.group(*self.done).end(self.outer[0]).end(self.outer[1]) if self.outer else self.done[0]
    return done.sink(arg=KernelInfo(name=f"{name}_{self.B}x{self.H}x{self.L}", opts_to_apply=()))

  def each(self, rows:int, cols:int, body:Callable[[UOp, UOp], list[tuple[UOp, UOp, UOp]]]):
    "Stores (memory, place, value) of body(row, col), for all."
    def store(gate:Callable[[UOp], UOp], r:UOp, j:UOp) -> list[UOp]:
      return [mem[gate(at)].store(x) for mem, at, x in body(r, j)]
    if not self.m.gpu:
      r, j = self.loop(rows, AxisType.LOOP), self.loop(cols, AxisType.LOOP)
      self.done = UOp.group(*store(lambda at: at, r, j)).end(j).end(r),
      return
    turns = [self.t + s for s in range(0, rows*cols, WALK_THREADS)]
    self.done = UOp.group(*[s for i in turns for s in
      store((lambda at, i=i: at.valid(i < rows*cols)) if i.vmax >= rows*cols else lambda at: at, i//cols, i % cols)]),

  def product(self, rows:int, cols:int, K:int, a:Callable[[UOp, UOp], UOp], b:Callable[[UOp, UOp], UOp],
              put:Callable[[UOp, UOp, UOp], list[tuple[UOp, UOp, UOp]]], start:Callable[[UOp, UOp], UOp]|None=None):
    "put(row, col, start(row, col) + Σ_k a(row, k) b(k, col)), stores as in `each`. A tile of sums stays in registers."
    start = start or (lambda r, j: UOp.const(0.0, dtypes.float))
    if self.m.gpu:
      hands = max(1, WALK_THREADS//cols)              # threads that share a column
      n, nt, outer = -(-rows//hands), 1, ()
      places = [self.t//cols + i*hands for i in range(n)]
      inside = [(r < rows) & (self.t < hands*cols) if (i+1)*hands > rows or WALK_THREADS % cols else None
                for i, r in enumerate(places)]
      at = [r.minimum(rows-1) for r in places]
      def lanes(body:Callable[[UOp, UOp|int], list[UOp]]) -> UOp: return UOp.group(*body(self.t % cols, 0))
    else:
      n, nt = _walk_tile(self.m, rows, cols)
      outer = self.loop(rows//n, AxisType.LOOP), self.loop(cols//nt, AxisType.LOOP)
      at, inside = [outer[0]*n + i for i in range(n)], [None]*n
      def lanes(body:Callable[[UOp, UOp|int], list[UOp]]) -> UOp:
        z = self.loop(nt, AxisType.LOOP)
        return UOp.group(*body(outer[1]*nt + z, z)).end(z)
    acc = self.memory(n*nt, shared=False)
    first = acc.after(*self.done, *outer)
    acc = acc.after(lanes(lambda j, z: [first[i*nt + z].store(start(r, j)) for i, r in enumerate(at)]))
    k = self.loop(K)
    s = acc.after(k)
    def add(j:UOp, z:UOp|int) -> list[UOp]:
      y = b(k, j)
      return [s[i*nt + z].store(s[i*nt + z] + a(r, k)*y) for i, r in enumerate(at)]
    acc = acc.after(lanes(add).end(k))
    done = UOp.group(*[lanes(lambda j, z: [mem[place if ok is None else place.valid(ok)].store(x)
                                           for mem, place, x in put(r, j, acc[i*nt + z])])
                       for i, (r, ok) in enumerate(zip(at, inside))])
    for o in outer[::-1]: done = done.end(o)
    self.done = done,

  # the walk's own steps; b: the row of the batch, g: the group of R chunks
  def place(self, b:UOp, g:UOp, r:UOp, j:UOp) -> tuple[UOp, UOp|None]:
    "Index into a flat (B,H,L) of step j of chunk r, and whether it is there."
    i = (g*self.R + r)*self.c + j
    return (b*self.H + self.h)*self.L + i, None if self.L % (self.R*self.c) == 0 else i < self.L
  def read(self, at:tuple[UOp, UOp|None], *factors:UOp) -> UOp:
    "Π factors there, 0 past the end"
    i, ok = at
    if ok is None: return functools.reduce(operator.mul, [f[i] for f in factors])
    return functools.reduce(operator.mul, [ok.where(f[i.valid(ok)], 0.0) for f in factors])
  def write(self, at:tuple[UOp, UOp|None], out:UOp, x:UOp) -> tuple[UOp, UOp, UOp]:
    return out, at[0] if at[1] is None else at[0].valid(at[1]), x
  def state(self, b:UOp, i:UOp) -> UOp: return (b*self.H + self.h)*self.S + i     # index into a flat (B,H,S)

  def scan(self, mem:UOp, offset:int, a:UOp, back:bool):
    "x_(r+1) += a x_r for r = 0 to R-1, or back: x_r += a* x_(r+1). Row r of x is at r W + offset, re and then im."
    M, r = self.S//2, self.loop(self.R)
    row = (self.R - 1 - r if back else r + 1)*self.W + offset
    prev, now = row + (self.W if back else -self.W), mem.after(*self.done, r)
    def body(_:UOp, m:UOp) -> list[tuple[UOp, UOp, UOp]]:
      x, (re, im) = (a[self.h, m], a[self.h, M + m]), (now[prev + m], now[prev + M + m])
      re, im = cmul(conj(x) if back else x, (re, im))
      return [(now, row + m, now[row + m] + re), (now, row + M + m, now[row + M + m] + im)]
    self.each(1, M, body)
    self.done = self.done[0].end(r),

  def forward(self, X:UOp, b:UOp, g:UOp, Q:UOp, a:UOp, factors:list[UOp]):
    "Rows [x_n | w_n] of group g, the state after the group before being in row R."
    S, W, R, now = self.S, self.W, self.R, lambda: X.after(*self.done)
    self.each(1, S, lambda _, i: [(now(), i, now()[R*W + i])])
    self.each(R, self.c, lambda r, j: [(now(), r*W + S + j, self.read(self.place(b, g, r, j), *factors))])
    w = now()
    self.product(R, S, self.c, lambda r, k: w[r*W + S + k], lambda k, i: Q[self.h, k, i],          # Q w_n
                 lambda r, i, s: [(w, (r+1)*W + i, s)])
    self.scan(X, 0, a, back=False)                                                               # x_(n+1) += a x_n

def _state_at(shape:tuple[int, ...]) -> int:
  "Where in its output `_walk` puts the state, behind y: at a place fit for vector loads."
  return -(-prod(shape)//64)*64

@functools.cache
def _walk_tile(m:Machine, rows:int, cols:int) -> tuple[int, int]:
  "Rows and columns of a tile of sums in three quarters of the registers: divisors, with the fewest loads."
  sizes = [(r, c) for r in range(1, rows+1) for c in range(1, cols+1) if rows % r == 0 and cols % c == 0
           and r*-(-c//m.lanes) <= m.registers*3//4]
  return min(sizes, key=lambda t: ((t[0] - (-t[1]//m.lanes))/(t[0]*t[1]), -t[1]))

@functools.cache
def _walk(names:tuple[str, ...], m:Machine, shape:tuple[int, int, int], S:int, c:int, R:int) -> Callable:
  "y and, behind it, the state after the last whole chunk"
  @functools.cache
  def kernel(out:UOp, x0:UOp, Q:UOp, P:UOp, a:UOp, *inputs:UOp) -> UOp:
    x, w = dict(zip(names, inputs)), Walk(m, shape, S, c, R)
    X, W, h = w.memory((R+1)*(S+c)), S + c, w.h
    b = w.begin(w.B)
    w.each(1, S, lambda _, i: [(X.after(*w.done), R*W + i, x0[w.state(b, i)])])
    g = w.begin(w.groups)
    w.forward(X, b, g, Q, a, [x[n] for n in "uv" if n in x])
    now = X.after(*w.done)
    def put(r:UOp, l:UOp, y:UOp) -> list[tuple[UOp, UOp, UOp]]:
      at = w.place(b, g, r, l)
      return [w.write(at, out, y*w.read(at, x["q"]) if "q" in x else y)]
    w.product(R, c, W, lambda r, k: now[r*W + k], lambda k, l: P[h, k, l], put)                  # y_n = P x_n + T w_n
    w.end(g)
    w.each(1, S, lambda _, i: [(out, _state_at(shape) + w.state(b, i), X.after(*w.done)[w.last*W + i])])
    w.end(b)
    return w.finish("ssm_walk")
  return kernel

@functools.cache
def _walk_grad(names:tuple[str, ...], m:Machine, shape:tuple[int, int, int], S:int, c:int, R:int) -> Callable:
  """The gradients of `_walk`: of the initial state, of Q, P and a, and of u, v, q. States are computed anew: on a walk
  forward that keeps one in R, then group by group on the way back."""
  @functools.cache
  def kernel(dx0:UOp, dQ:UOp, dP:UOp, da:UOp, *bufs:UOp) -> UOp:
    d, (kept, dout, x0, Q, a, PT, TQ) = dict(zip(names, bufs)), bufs[len(names):][:7]
    x, w = dict(zip((*names, "P"), bufs[len(names)+7:])), Walk(m, shape, S, c, R)
    W, M, h, us = S + c, S//2, w.h, [x[n] for n in "uv" if n in x]
    X, E = w.memory((R+1)*W), w.memory((R+1)*W)               # rows [x_n | w_n] and [e_(n-1) | dx_n], e = q dy
    sums = [(w.memory(W*c), W, c, dP), (w.memory(c*S), c, S, dQ), (w.memory(S), 1, S, da)]
    for mem, rows, cols, _ in sums:
      w.each(rows, cols, lambda r, j: [(mem.after(*w.done), r*cols + j, UOp.const(0.0, dtypes.float))])
    sP, sQ, sa = (s[0] for s in sums)
    b = w.begin(w.B)
    w.each(1, S, lambda _, i: [(X.after(*w.done), R*W + i, x0[w.state(b, i)])])
    g = w.begin(w.groups)
    w.each(1, S, lambda _, i: [(kept, (h*w.groups + g)*S + i, X.after(*w.done)[R*W + i])])
    w.forward(X, b, g, Q, a, us)
    w.end(g)
    n = w.begin(w.groups)
    g = w.groups - 1 - n
    w.each(1, S, lambda _, i: [(X.after(*w.done), R*W + i, kept.after(*w.done)[(h*w.groups + g)*S + i])])
    w.forward(X, b, g, Q, a, us)
    # dx_R of this group is dx_0 of the one after; the last state's own gradient enters where that state is read
    own = lambda r, i: (n.eq(0) & r.eq(w.last)).where(dout[_state_at(shape) + w.state(b, i)], 0.0)
    row = UOp.const(R, dtypes.weakint)
    w.each(1, S, lambda _, i: [(E.after(*w.done), R*W + c + i, n.eq(0).where(own(row, i), E.after(*w.done)[c + i]))])
    w.each(R, c, lambda r, j: [(E.after(*w.done), (r+1)*W + j,
                                w.read(w.place(b, g, r, j), dout, *(x[k] for k in "q" if k in x)))])
    e = E.after(*w.done)
    w.product(R, S, c, lambda r, k: e[(r+1)*W + k], lambda k, i: PT[h, k, i],                     # P^T e_n
              lambda r, i, s: [(e, r*W + c + i, s)], own)
    w.scan(E, c, a, back=True)                                                                  # dx_n += a* dx_(n+1)
    now, e = X.after(*w.done), E.after(*w.done)
    if "q" in x:
      def put(r:UOp, l:UOp, y:UOp) -> list[tuple[UOp, UOp, UOp]]:
        return [w.write(at := w.place(b, g, r, l), d["q"], y*w.read(at, dout))]
      w.product(R, c, W, lambda r, k: now[r*W + k], lambda k, l: x["P"][h, k, l], put)           # dq = y dy
    def put(r:UOp, j:UOp, dw:UOp) -> list[tuple[UOp, UOp, UOp]]:
      at = w.place(b, g, r, j)
      if "v" not in x: return [w.write(at, d["u"], dw)]
      return [w.write(at, d[k], dw*w.read(at, x[o])) for k, o in ("uv", "vu")]
    w.product(R, c, W, lambda r, k: e[(r+1)*W + k], lambda k, j: TQ[h, k, j], put)                # dw = T^T e + Q^T dx
    for mem, rows, cols, first, other in ((sP, W, c, 0, 0), (sQ, c, S, S, c)):                    # dP += [x|w]^T e, …
      mem = mem.after(*w.done)
      w.product(rows, cols, R, lambda i, k: now[k*W + first + i], lambda k, j: e[(k+1)*W + other + j],
                lambda i, j, s: [(mem, i*cols + j, s)], lambda i, j: mem[i*cols + j])
    r = w.loop(R)
    def turn(_:UOp, i:UOp) -> list[tuple[UOp, UOp, UOp]]:                                        # da += x_n* dx_(n+1)
      at, s = r*W + i, sa.after(*w.done, r)
      re, im = cmul((now[at], -now[at + M]), (e[at + W + c], e[at + W + c + M]))
      return [(s, i, s[i] + re), (s, M + i, s[M + i] + im)]
    w.each(1, M, turn)
    w.done = w.done[0].end(r),
    w.end(n)
    w.each(1, S, lambda _, i: [(dx0, w.state(b, i), E.after(*w.done)[c + i])])
    w.end(b)
    for mem, rows, cols, out in sums:
      w.each(rows, cols, lambda i, j: [(out, (h*rows + i)*cols + j, mem.after(*w.done)[i*cols + j])])
    return w.finish("ssm_walk_grad")
  return kernel

def _walk_sizes(device:str|tuple, S:int, L:int, chunk:int|None) -> tuple[Machine, int, int]|None:
  "Steps of a chunk and chunks at a time, as scratch memory allows; None where plain ops have to do it."
  if not FLASH: return None
  m = machine(device)
  fits = lambda c, R: not m.gpu or 4*(2*(R+1)*(S+c) + (S+c)*c + c*S + S) <= m.scratch
  c, R = min(chunk or 32, 128, L), 8 if m.gpu else 32
  while c > 1 and not fits(c, R): c //= 2
  return (m, c, min(R, -(-L//c))) if fits(c, R) else None

def _walk_tables(A:Pair, B:Pair, C:Pair, D:Tensor|None, c:int) -> tuple[Tensor, Tensor, Tensor]:
  "Q (H,c,S), P above T (H,S+c,c), and a (H,S): see above. S = 2M, re and then im."
  pw = [stored(p) for p in powers(A, c + 1)]                                                     # (H,M,c+1)
  upto, after = (tuple(p[..., i:i+c] for p in pw) for i in (0, 1))
  wide = lambda z: (z[0].unsqueeze(-1), z[1].unsqueeze(-1))
  k = 2*cmul(wide(cmul(C, B)), upto)[0].sum(-2)                                                  # (H,c)
  if D is not None: k = k + D.unsqueeze(-1).pad((None, (0, c-1)))
  T = k.pad((None, (c-1, 0))).unfold(-1, c, 1).flip(1)                                           # T[j,l] = k[l-j]
  P, Q = cmul(wide(C), after), cmul(wide(B), upto)
  tables = Tensor.cat(*Q, dim=1).flip(-1).transpose(1, 2), Tensor.cat(2*P[0], -2*P[1], T, dim=1)
  return *(stored(t) for t in tables), stored(Tensor.cat(*(p[..., c] for p in pw), dim=1))

def _walk_backward(dout:Tensor, out:Tensor, x0:Tensor, Q:Tensor, P:Tensor, a:Tensor, *inputs:Tensor,
                   names:tuple[str, ...], m:Machine, shape:tuple[int, int, int], S:int, c:int, R:int
                   ) -> list[Tensor]:
  "The gradients of `_walk`'s inputs, in their order."
  PT, TQ = P[:, :S].transpose(1, 2), Tensor.cat(P[:, S:].transpose(1, 2), Q.transpose(1, 2), dim=1)
  forward = (x0, Q, P, a, *inputs)
  scratch = shape[1] * -(-shape[2]//(R*c)) * S                       # states kept on the walk forward
  # tinygrad's OpenCL counts an argument that a kernel does not use wrongly: only dq needs P
  outputs = launch(_walk_grad(names, m, shape, S, c, R), [*((x.numel(),) for x in forward), (scratch,)],
                   [dout, x0, Q, a, PT, TQ, *inputs, *([P] if "q" in names else [])], no_second_gradient("ssm_conv"))
  return [d.reshape(x.shape) for d, x in zip(outputs, forward)]

def ssm_conv_ref(u:Tensor, A:Pair, B:Pair, C:Pair, D:Tensor|None=None, v:Tensor|None=None, q:Tensor|None=None,
                 state:Pair|None=None, chunk:int|None=None) -> tuple[Tensor, Pair]:
  "The definition of `ssm_conv`, same arguments: a convolution for each chunk (default: 4096 steps)."
  w, L, c, ys = u if v is None else u*v, u.shape[2], chunk or 4096, []
  x = state or tuple(Tensor.zeros(u.shape[0], *A[0].shape, device=u.device) for _ in range(2))
  for i in range(0, L, c):
    wi = w[..., i:i+c]
    van, CA, last = Vandermonde(A, n := wi.shape[2]), cmul(C, A), tuple(p[..., 1] for p in powers(A, 2, n))
    ys.append(fftconv_ref(wi, van.sum(cmul(C, B)), D) + van.sum(cmul(CA, x)))           # k ∗ w + 2 Re C A^(l+1) x
    x = tuple(map(operator.add, cmul(last, x), cmul(B, van.after(wi))))                 # A^n x + Σ_j A^(n-1-j) B w_j
  y = Tensor.cat(*ys, dim=-1)
  return y if q is None else q*y, x

def ssm_conv(u:Tensor, A:Pair, B:Pair, C:Pair, D:Tensor|None=None, v:Tensor|None=None, q:Tensor|None=None,
             state:Pair|None=None, chunk:int|None=None) -> tuple[Tensor, Pair]:
  """`fftconv` with the filter of a diagonal SSM, k[l] = 2 Re Σ C B A^l, and the state after the last step.

  u, v, q, y (B,H,L); A, B, C discretised modes, pairs (re, im) of (H,M); D (H,); state a pair of (B,H,M), None: zeros.
  Exact for any L, in memory that does not grow with L beyond inputs and outputs, one launch forward and one back.
  Pieces of a sequence, with the state handed on, give what one call gives. chunk: steps of a chunk, for
  measurements. Differentiable once in every argument. Raises ValueError when shapes don't fit.
  Source: paper section 4 (state passing); not in the official code.
  """
  u, D, v, q, *rest = on_one_device(u, D, v, q, *A, *B, *C, *(state or ()))
  A, B, C = (tuple(rest[i:i+2]) for i in (0, 2, 4))
  state = tuple(rest[6:]) or None
  gates, xs, (n, H, L) = [x for x in (v, q) if x is not None], rest[6:], u.shape if u.ndim == 3 else (0, 0, 0)
  pairs, M = [*A, *B, *C], A[0].shape[-1]
  if 0 in (n, H, L, chunk) or any(x.shape != u.shape for x in gates) or any(x.shape != (H, M) for x in pairs) \
     or any(x.shape != (n, H, M) for x in xs) or (D is not None and D.shape != (H,)) or (chunk or 1) < 1:
    got = [f"{k} {x.shape}" for k, x in (("u", u), ("v", v), ("q", q), ("D", D)) if x is not None]
    raise ValueError("ssm_conv: u, v, q are (B,H,L), A, B, C pairs of (H,M), D (H,), state a pair of (B,H,M), chunk "
                     f"at least 1; got {', '.join(got)}, A, B, C {[x.shape for x in pairs]}, "
                     f"state {[x.shape for x in xs]}, chunk {chunk}")
  sizes = _walk_sizes(u.device, 2*M, L, chunk)
  if not sizes or any(x.dtype != dtypes.float for x in (u, *gates, *pairs, *xs, *([] if D is None else [D]))):
    return ssm_conv_ref(u, A, B, C, D, v, q, state, chunk)
  (m, c, R), S, shape, names = sizes, 2*M, (n, H, L), tuple(k for k, x in zip("uvq", (u, v, q)) if x is not None)
  if prod(shape)*4 < ONE_CORE: m = m._replace(cores=1)
  Q, P, a = _walk_tables(A, B, C, D, c)
  x0 = Tensor.zeros(n, H, S, device=u.device).contiguous() if state is None else Tensor.cat(*state, dim=-1)
  inputs = [x0.flatten(), Q, P, a, *(x.flatten() for x in (u, *gates))]
  out, = launch(_walk(names, m, shape, S, c, R), [(_state_at(shape) + n*H*S,)], inputs,
                bound(_walk_backward, names=names, m=m, shape=shape, S=S, c=c, R=R))
  y, x = out[:prod(shape)].reshape(shape), out[_state_at(shape):].reshape(n, H, S)
  re, im = x[..., :M], x[..., M:]
  if rest := L % c:                                  # after the last whole chunk: A^rest x + Σ_j A^(rest-1-j) B w_j
    w = u[..., L-rest:] if v is None else u[..., L-rest:]*v[..., L-rest:]
    new = (w.unsqueeze(-1)*Q[:, c-rest:]).sum(2)                                                 # (B,H,S)
    re, im = cmul(tuple(p[..., 1] for p in powers(A, 2, rest)), (re, im))
    re, im = re + new[..., :M], im + new[..., M:]
  return y, (re, im)

# ---------------------------------------------------------------- selfcheck, sources, benchmark
# more kernels to check: a function of Tensors, its plain version (None: itself with FLASH=0), the shapes of its output and
# of its inputs
CHECKS: dict[str, tuple] = {}

def selfcheck(device:str|None=None) -> float:
  """The convolution in one launch, the matrix product and the layer norm, forward and backward, against
  plain ops on the device, at small sizes, on one core.

  Returns the worst relative error; RuntimeError, which names the kernel, past 1e-4.
  """
  device, rng, worst = device or Device.DEFAULT, np.random.default_rng(0), 0.0
  def direct(u:Tensor, k:Tensor, D:Tensor, v:Tensor, q:Tensor) -> Tensor:
    "fftconv as a sum over taps: fewer and smaller kernels than fftconv_ref, on a program's way to its start"
    L, w = u.shape[2], u*v
    taps = k.pad((None, (L-1, 0))).unfold(-1, L, 1).flip(-1)       # (H,L,L): k[t-s]
    return q*((taps*w.unsqueeze(2)).sum(-1) + D.reshape(-1, 1)*w)
  cases = {"fftconv": (fftconv, direct, (3, 4, 40), (3, 4, 40), (4, 40), (4,), (3, 4, 40), (3, 4, 40))} | CHECKS
  for name, (f, plain, out, *shapes) in cases.items():
    x = [Tensor(rng.standard_normal(s).astype(np.float32), device=device).realize() for s in shapes]
    g = Tensor(rng.standard_normal(out).astype(np.float32), device=device).realize()
    def results(f:Callable) -> list[Tensor]: return [y := f(*x), *y.gradient(*x, gradient=g)]
    with Context(FLASH=0): want = results(plain or f)
    try:
      got = results(f)
      Tensor.realize(*got, *want)                     # at once: the compiler's workers share them
      pairs = [(a.numpy(), b.numpy()) for a, b in zip(got, want)]
    except Exception as e: raise RuntimeError(f"kernel {name} fails on {device}: {type(e).__name__}") from e
    error = max(float(np.abs(a - b).max()/np.abs(b).max()) for a, b in pairs)
    if not error <= 1e-4: raise RuntimeError(f"kernel {name} is wrong on {device}, relative error {error:.1e}")
    worst = max(worst, error)
  return worst

def render(backend:str, L:int=2048, B:int=4, H:int=64) -> dict[str, tuple[str, int]]:
  """{name: (source, bytes of local memory)} of the convolution's kernels for "cuda", "metal" or
  "opencl", on any machine: rows of length L in one launch, and a two-level transform of four times that."""
  language = {"cuda": cstyle.CUDARenderer, "metal": cstyle.MetalRenderer, "opencl": cstyle.OpenCLRenderer}[backend]
  r = object.__new__(language)       # without its compiler, which another machine may have
  cstyle.CStyleLanguage.__init__(r, Target(backend.upper(), arch="sm_86" if backend == "cuda" else ""))
  r.tensor_cores = []
  m, names, N = Machine(True, 1, r.shared_max, True), ("u", "D", "v", "q"), _length(L, L)
  def source(fxn:Callable, *shapes:tuple[int, ...]) -> tuple[str, tuple[str, int]]:
    program = to_program(fxn(*(UOp.placeholder(s, dtypes.float, slot=i) for i, s in enumerate(shapes))), r)
    scratch = sum(4*u.max_numel() for u in program.src[1].src if u.op is Ops.BUFFER and u.addrspace is AddrSpace.LOCAL)
    return program.arg.name, (program.src[2].arg, scratch)
  x, X, tw, far = (B, H, L), (B//2, 4*H, 2, N), (2, RADIX, N//RADIX), (2, 4, N)
  return dict([source(_conv(names, m, Rows), x, tw, (1, H, L), x, (H,), x, x),
               source(_conv_grad(names, m, Rows), (1, H, L), x, x, x, tw, (1, H, L), x, x, (H,), x, x),
               source(_split(m), X, far, (B, H, 2*N)), source(_join(m, B, 2*N), (B, H, 2*N), far, X),
               source(_conv(("u",), m, Parts), X, tw, (1, 4*H, 2, N), X),
               source(_conv_grad(("u",), m, Parts), (1, 4*H, 2, N), X, tw, (1, 4*H, 2, N), X, X)])

def main(argv:list[str]|None=None) -> int:
  ap = argparse.ArgumentParser(prog="flashconv.py", description="Checks the kernels against plain ops, then times "
                               "the convolution against plain tinygrad and, where it is installed, PyTorch.")
  def fail(message:str): sys.exit(print(f"error: {message} (--help)", file=sys.stderr) or 2)
  ap.error = fail
  ap.add_argument("--render", choices=["cuda", "metal", "opencl"],
                  help="print the kernels' source for it, on any machine, and stop")
  ap.add_argument("--lengths", type=int, nargs="+", metavar="L",
                  help="default 256 512 1024 2048 4096 8192; of --render 2048")
  ap.add_argument("--long", type=int, nargs="*", metavar="L",
                  help="time state passing alone, at these lengths; default 16384 65536; at a quarter of the channels "
                  "16384 1048576")
  ap.add_argument("--batch", type=int, default=8)
  ap.add_argument("--channels", type=int, default=256)
  ap.add_argument("--plain", type=int, default=1024, metavar="L",
                  help="time plain tinygrad up to this length, default 1024 (it is slow)")
  a = ap.parse_args(argv)
  lengths = a.lengths or ([2048] if a.render else [256, 512, 1024, 2048, 4096, 8192] if a.long is None else [])
  quarter = max(1, a.channels//4)
  if min(*lengths, *(a.long or ()), a.batch, a.channels) < 1:
    ap.error("--lengths, --long, --batch and --channels must be at least 1")
  if a.render:
    if max(lengths) > 2048 or min(lengths) < 64:
      ap.error("--render takes lengths from 64 to 2048, what one launch takes at 32 KB")
    for L in lengths:
      for source, scratch in render(a.render, L).values(): print(f"// {scratch} bytes of local memory\n{source}\n")
    return 0
  sys.modules.setdefault("flashconv", sys.modules[__name__])
  from support.cpu import setup_device
  setup_device()
  try: print(f"selfcheck on {Device.DEFAULT}: worst relative error {selfcheck():.1e}")
  except RuntimeError as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  return 0

if __name__ == "__main__": sys.exit(main())
