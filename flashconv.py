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
import argparse, cmath, ctypes, dataclasses, functools, hashlib, importlib.metadata, importlib.util, itertools
import math, mmap, multiprocessing, operator, os, queue, signal, subprocess, sys, threading, time
from typing import Callable, NamedTuple, Sequence
import numpy as np
from tinygrad import Device, Tensor, TinyJit, UOp, codegen, dtypes, helpers, tensor
from tinygrad.codegen import to_program
from tinygrad.codegen.opt import KernelOptError, Opt, OptOps
from tinygrad.codegen.opt.postrange import Scheduler
from tinygrad.dtype import AddrSpace, DType, strong_dtype
from tinygrad.engine import jit as tinyjit, realize, worker
from tinygrad.engine.jit import _TinyJit
from tinygrad.engine.realize import capturing
from tinygrad.helpers import (NOOPT, Context, ContextVar, GlobalCounters, Target, all_int, cache_dir,
                              diskcache_get, diskcache_put, mv_address, prod)
from tinygrad.renderer import Estimates, Renderer, cstyle
from tinygrad.uop.ops import (AxisType, KernelInfo, Ops, ParamArg, PatternMatcher, UPat, graph_rewrite,
                               shape_to_shape_arg)

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
SHARED = 1 << 17                     # size of the loops of tinygrad's own kernels from which cores share them
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

def _compiler_says(r:Renderer, macro:str) -> bool:
  "Whether the compiler of tinygrad's CPU device defines a macro for the processor that it compiles for."
  try: out = subprocess.run([os.environ.get("CC", "clang"), *r.compiler.args, "-dM", "-E", "-x", "c", os.devnull],
                            capture_output=True, text=True).stdout
  except (OSError, AttributeError): return False
  return f"#define {macro} " in out

def _vectors(r:Renderer) -> tuple[int, int]:
  "Lanes and number of a CPU's vector registers."
  return (16 if WIDE in r.target.arch else 8 if _compiler_says(r, "__AVX__") else 4,
          32 if _compiler_says(r, "__AVX512VL__") or _compiler_says(r, "__ARM_NEON") else 16)

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

# ---------------------------------------------------------------- the matrix product, where tinygrad's own is slow
# Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (TOMS 2008): panels of B, NT columns
# wide, and tiles of A, MT rows high, are copied in the order in which they will be read, as many as the L2 cache
# holds; a panel meets a tile in MT x NT sums, which stay in registers. The cores share groups, else rows, else columns.
# GFLOPS, two cores of a Xeon with AVX-512, clang 14, best of 12 (dx = dy w^T, dw = x^T dy):
#   M x K x N              this kernel        PyTorch, 2 threads
#                         y   dx   dw          y   dx   dw
#   4096 x 256 x 1024   266  265  234        235  229  253
#   4096 x 1024 x 256   253  271  252        265  259  224
#   4096 x 256 x 264    271  256  245
# Below SMALL multiplications tinygrad's own product is as fast.
KB, MB, NB, SMALL = 256, 96, 1024, 1 << 16

def _tile(m:Machine, M:int, N:int) -> tuple[int, int]:
  "Rows and columns of a tile of sums: three quarters of the registers, the others hold a row of B and entries of A."
  nt = min((c*m.lanes for c in (4, 3, 2)), key=lambda n: (-(-N//n)*n, -n))               # the least overlap
  return min(M, m.registers*3//4//(nt//m.lanes)), min(nt, N)

def _even(n:int, most:int) -> int:
  "A block size, at most `most`, that cuts n into equal blocks or nearly so."
  most = max(1, min(n, most))
  return min(range((most + 1)//2, most + 1), key=lambda c: (-(-n//c)*c, -c))

def gemm(C:UOp, A:UOp, B:UOp, *bias:UOp, ta:bool, tb:bool, m:Machine) -> UOp:
  """C (G,M,N) = A (G,M,K) B (G,K,N) + bias (N,) for each g.

  ta: A is stored (G,K,M), tb: B is stored (G,N,K). An A or B of one group serves all; a C of one
  group is the sum over groups.
  """
  (G, M, N), K, groups = C.shape, A.shape[1 if ta else 2], max(A.shape[0], B.shape[0])
  name = f"gemm_{'nt'[ta]}{'nt'[tb]}_{groups}x{M}x{K}x{N}"
  # few rows of A and many of B, stored alike, as in decoding: C^T = B A^T, so that only A has to be reordered
  swapped = tb and not ta and 4*M <= N and M <= 4*m.lanes and K <= 1 << 14   # its panels are on the stack
  if swapped: A, B, M, N = B, A, N, M
  mt, nt = _tile(m, M, N)
  tiles, panels, packed = -(-M//mt), -(-N//nt), M > mt
  blocks = -(-K//KB) if packed and not swapped else 1
  kb, turns = -(-K//blocks), blocks*(groups if G == 1 else 1)
  # cores for groups, rows and columns: one of the three
  cores = m.cores if 2*G*M*N*K*turns//blocks > ONE_CORE else 1
  gc = next(c for c in range(cores, 0, -1) if G % c == 0) if G >= cores else 1
  rc = cores if gc == 1 and tiles >= 4*cores else 1
  cc = min(cores, panels) if gc == rc == 1 and turns == 1 else 1
  ids = itertools.count()
  loop = lambda n, axis=AxisType.LOOP: UOp.range(n, next(ids), axis)
  reg = lambda slot, *shape: UOp.placeholder(shape, dtypes.float, slot=slot, addrspace=AddrSpace.REG)
  core, me = _cores(gc*rc*cc, next(ids))
  share = lambda n, c: (-(-n//c), me*-(-n//c) if c > 1 else 0)        # how many each core has, and its first
  (gs, g0), (ts, t0), (ps, p0) = share(G, gc), share(tiles, rc), share(panels, cc)
  mb, nb = _even(ts, MB//mt), _even(ps, NB//nt if packed else 1)
  assert not packed or turns == 1 or N % nt == 0 or ps == 1 or (ps-1) % nb, \
    "NB parts the last panel from the one that it overlaps"
  go, no, ko, mo = loop(gs), loop(-(-ps//nb)), loop(turns), loop(-(-ts//mb))
  g, summed = g0 + go, turns > 1
  ga, gb = (0 if x.shape[0] == 1 else ko//blocks if G == 1 else g for x in (A, B))
  a = lambda r, k: widened((A[ga, k, r] if ta else A[ga, r, k]).load())
  b = lambda k, c: widened((B[gb, c, k] if tb else B[gb, k, c]).load())
  # Sizes that the tile does not divide: the last panel starts early enough to end at column N, the last tile repeats
  # the last row. What was counted before must not be added again: such columns of B are zero, such tiles not
  # stored. The last block of K starts early too, and the rows of B that were counted before are zero.
  block = ko % blocks
  k0, panel, tile = (block*kb).minimum(K - kb), p0 + no*nb, t0 + mo*mb
  left = lambda j: ((panel + j)*nt).minimum(N - nt)
  last = (t0*mt + (ts*mt - 1)).minimum(M - 1) if rc > 1 else M - 1
  row = lambda r: r if M % mt == 0 and ts % mb == 0 and tiles % rc == 0 else r.minimum(last)

  need = ()
  if packed:
    jp, p, v = loop(nb), loop(kb), loop(nt)
    x, seen = b(k0 + p, left(jp) + v), []
    if K % kb: seen.append(k0 + p < block*kb)
    if summed and (N % nt or ps % nb): seen.append((ko > 0) & (left(jp) + v < (panel + jp)*nt))
    if seen: x = functools.reduce(operator.or_, seen).where(0.0, x)
    pb = reg(0, nb, kb, nt)
    pb = pb.after(pb.after(ko, no, go, core)[jp, p, v].store(x).end(*((p, v) if tb else (v, p))).end(jp))
    need = pb,
  if packed and ta:                  # else a row of A is read in order anyway
    ip, p, i = loop(mb), loop(kb), loop(mt)
    pa = reg(1, mb, kb, mt)
    pa = pa.after(pa.after(mo, *need)[ip, p, i].store(a(row((tile + ip)*mt + i), k0 + p)).end(i, ip, p))
    need = pb, pa

  # sums = bias at first, what the turns before have summed up later
  jo, io = loop(nb), loop(mb)
  j0, at, first = left(jo), [row((tile + io)*mt + i) for i in range(mt)], (tile + io)*mt
  z, acc = loop(nt), reg(2, mt, nt)
  c = lambda C, r, col: C[g, col, r] if swapped else C[g, r, col]
  start = [bias[0][r if swapped else j0 + z] if bias else UOp.const(0.0, dtypes.float) for r in at]
  if summed: start = [(ko > 0).where(c(C.after(ko), r, j0 + z).load(), s) for r, s in zip(at, start)]
  acc = acc.after(UOp.group(*[acc.after(io, jo, mo, ko, no, go, core, *need)[i, z].store(s)
                              for i, s in enumerate(start)]).end(z))
  # sums += A[row, k] B[k, :]; the loop over j is unrolled and vectorised by the compiler
  k, j = loop(kb, AxisType.REDUCE), loop(nt)
  s = acc.after(k)
  y = pb[jo, k, j] if packed else b(k0 + k, j0 + j)
  fma = [s[i, j].store(s[i, j] + (pa[io, k, i] if len(need) == 2 else a(r, k0 + k))*y) for i, r in enumerate(at)]
  acc = acc.after(UOp.group(*fma).end(j).end(k))
  # C = sums, a loop for each row: the compiler can't tell that the rows do not overlap
  if summed and (ts % mb or tiles % rc): at = [r.valid(first <= last) for r in at]
  out = [c(C, r, j0 + (o := loop(nt))).store(acc[i, o]).end(o) for i, r in enumerate(at)]
  done = UOp.group(*out).end(io, jo, mo, ko, no, go, core)
  return done.sink(arg=KernelInfo(name=name, opts_to_apply=()))

def dots(C:UOp, A:UOp, B:UOp, *bias:UOp, m:Machine) -> UOp:
  "C (G,M,N) = A (G,M,K) B^T + bias (N,), B (G,N,K), for one row of A or a few: the time is that of reading B."
  (G, M, N), K = C.shape, A.shape[2]
  V, R = next(v for v in (m.lanes, 8, 4, 2, 1) if K % v == 0), next(r for r in (4, 2, 1) if N % r == 0 and M*r <= 4)
  U = 2 - K//V % 2                                             # sums side by side: additions take a while
  cores = min(m.cores, N//R) if G*M*N*K > ONE_CORE//8 else 1
  (core, me), n = _cores(cores, 0), -(-N//R//cores)
  g, j, v, z = (UOp.range(s, 1 + i) for i, s in enumerate((G, n, V, V)))
  k = UOp.range(K//V//U, 5, AxisType.REDUCE)
  ga, gb = (0 if x.shape[0] == 1 else g for x in (A, B))
  first = (me*n + j).minimum(N//R - 1)*R
  acc = UOp.placeholder((M, R, U, V), dtypes.float, slot=0, addrspace=AddrSpace.REG)
  each = list(itertools.product(range(M), range(R)))
  acc = acc.after(UOp.group(*[acc.after(j, g, core)[i, r, u, z].store(0.0) for i, r in each for u in range(U)]).end(z))
  s, at = acc.after(k), lambda u: (k*U + u)*V + v
  b = lambda r, u: widened(B[gb, first + r, at(u)].load())
  acc = acc.after(UOp.group(*[s[i, r, u, v].store(s[i, r, u, v] + A[ga, i, at(u)]*b(r, u))
                              for i, r in each for u in range(U)]).end(v).end(k))
  # halves are added to halves, as vectors: a sum written out is one long chain of additions to the compiler
  halves = [(V, 1, 0)] * (U > 1) + [(n, 0, n) for n in (V >> i for i in range(1, V.bit_length()))]
  for axis, (n, u, shift) in enumerate(halves, 6):
    o = UOp.range(n, axis)
    new = [acc[i, r, 0, o].store(acc[i, r, 0, o] + acc[i, r, u, o + shift]) for i, r in each]
    acc = acc.after(UOp.group(*new).end(o))
  sums = {(i, r): acc[i, r, 0, 0] for i, r in each}
  out = [C[g, i, first + r].store(s + bias[0][first + r] if bias else s) for (i, r), s in sums.items()]
  return UOp.group(*out).end(j, g, core).sink(arg=KernelInfo(name=f"dots_{G}x{M}x{K}x{N}", opts_to_apply=()))

@functools.cache
def _ones(n:int, device:str) -> Tensor: return constant(np.ones((1, 1, n)), device)

def product(a:Tensor, b:Tensor, *bias:Tensor, ta:bool=False, tb:bool=False, total:bool=False) -> Tensor:
  """(G,M,K) (G,K,N) + bias (N,) -> (G,M,N), or (1,M,N), the sum over groups, with `total`.

  ta, tb: a, b are transposed first. One of them may have a single group, for all. Differentiable, any number of times.
  """
  G, m = max(a.shape[0], b.shape[0]), machine(a.device)
  M, N = a.shape[2 if ta else 1], b.shape[1 if tb else 2]
  kernel = bound(dots, m=m) if M <= 4 and tb and not ta and not total else bound(gemm, ta=ta, tb=tb, m=m)
  return launch(kernel, [(1 if total else G, M, N)], [a, b, *bias], bound(_product_backward, ta=ta, tb=tb))[0]

def _product_backward(dy:Tensor, y:Tensor, a:Tensor, b:Tensor, *bias:Tensor, ta:bool, tb:bool) -> tuple[Tensor, ...]:
  "dA = dY B^T, dB = A^T dY, or their transposes B dY^T, dY^T A; summed where one A or B has served all groups."
  one = [x.shape[0] < max(a.shape[0], b.shape[0]) for x in (a, b)]
  da = product(b, dy, ta=tb, tb=True, total=one[0]) if ta else product(dy, b, tb=not tb, total=one[0])
  db = product(dy, a, ta=True, tb=ta, total=one[1]) if tb else product(a, dy, ta=not ta, total=one[1])
  # tinygrad's own sum over rows takes 8 ms where this takes 0.2 ms, (4096,128) on a CPU
  ones = _ones(dy.shape[1], dy.device)
  dbias = [product(ones, dy, total=dy.shape[0] > 1).reshape(x.shape) for x in bias]
  return da, db, *dbias

def _plain_product(x:Tensor, w:Tensor, sums:DType|None) -> Tensor:
  """x (…,M,K) @ w by tinygrad's own product, as a GPU does it best: x and the gradient are stored, lest what makes
  them is computed anew for each column. The rows for w (K,N) come in groups, so that its gradient is a sum of short
  products. PoCL, two cores, (4096,1024) x (1024,256): 42 ms, dw 48 ms and not 270; after GELU 42 ms and not 700."""
  M = prod(x.shape[:-1])
  G = next(g for g in range(max(1, M//256), 0, -1) if M % g == 0) if w.ndim == 2 else 1
  if G == 1: return stored_backward(stored(x).dot(w, dtype=sums))
  y = stored(x).reshape(G, M//G, -1).dot(stored_backward(w.expand(G, *w.shape)), dtype=sums)
  return stored_backward(y).reshape(*x.shape[:-1], -1)

def matmul(x:Tensor, w:Tensor, transposed:bool=False, bias:Tensor|None=None) -> Tensor:
  """x @ w + bias -> (…,M,N): x (…,M,K); w (K,N), or (…,K,N) with x's leading dimensions, or any
  if x is (M,K); bias (N,).

  transposed=True is x @ w^T, for w stored as (…,N,K), the way checkpoints keep it. Differentiable
  in all three. w may be in half precision (WEIGHTS), which is widened as it is read: all sums are float32.
  A kernel of our own on the CPU, from SMALL multiplications on; else tinygrad's.
  """
  x, w, bias = on_one_device(x, w, bias)
  K, N = w.shape[-2:][::-1 if transposed else 1] if w.ndim > 1 else (0, 0)
  sums = dtypes.float if HALF and w.ndim == 2 and x.dtype == w.dtype == dtypes.float else None
  if sums: x, w = (t.cast((dtypes.half, dtypes.bfloat16)[HALF.value-1]) for t in (x, w))
  fits = (sums or x.dtype == dtypes.float) and _float_on_cpu(bias, small=(x, w))
  fits = fits and all_int(x.shape + w.shape) and x.shape[-1] == K
  fits = fits and (w.ndim == 2 or (x.shape[:-2] in ((), w.shape[:-2]) and bias is None))
  # a small product costs less where tinygrad can fuse it with what stands around it
  if not fits or prod(x.shape)*N*(prod(w.shape[:-2]) if x.ndim == 2 else 1) < SMALL:
    w = w.transpose(-1, -2) if transposed else w
    if x.dtype == dtypes.float: w = widened(w)
    gpu = FLASH and whole(x) and machine(x.device).gpu and all_int(x.shape)
    y = _plain_product(x, w, sums) if gpu else x.dot(w, dtype=sums)
    return y if bias is None else y + bias
  a = x.reshape(1, -1, K) if w.ndim == 2 else x.reshape(-1, *x.shape[-2:])
  y = product(a, w.reshape(-1, *w.shape[-2:]), *([] if bias is None else [bias]), tb=transposed)
  return y.reshape(*(x.shape[:-2] or w.shape[:-2]), x.shape[-2], N) if x.ndim > 1 else y.reshape(N)

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

# ---------------------------------------------------------------- layer norm: one launch forward, one back
# (4096,128) with its gradients, one core: tinygrad 9 launches and 11.0 ms, these two 0.9 ms.

def _row_sums(m:UOp, D:int, ids:itertools.count) -> Callable:
  """total(f): Σ_i f(i), i < D, in the loop m over rows; total(f, maximum, -inf): the largest. In V sums side by side:
  a compiler may not reorder the additions of a single sum to fill its vector registers."""
  V = next(V for V in (16, 8, 4, 2, 1) if D % V == 0)
  def total(f:Callable[[UOp], UOp], both:Callable=operator.add, start:float=0.0) -> UOp:
    z, c, v = UOp.range(V, next(ids)), UOp.range(D//V, next(ids), AxisType.REDUCE), UOp.range(V, next(ids))
    acc = UOp.placeholder((V,), dtypes.float, slot=next(ids), addrspace=AddrSpace.REG)
    acc = acc.after(acc.after(m)[z].store(start).end(z))
    s = acc.after(c)
    acc = acc.after(s[v].store(both(s[v], f(c*V + v))).end(v).end(c))
    return functools.reduce(both, [acc[i] for i in range(V)])
  return total

def _normalised(x:UOp, m:UOp, total:Callable, eps:float) -> tuple[Callable, UOp]:
  "i → (x - mean)/deviation, and 1/deviation, of row m"
  D = x.shape[1]
  mean = total(lambda i: x[m, i]) * (1/D)
  r = 1 / (total(lambda i: (x[m, i] - mean)*(x[m, i] - mean)) * (1/D) + eps).sqrt()
  return lambda i: (x[m, i] - mean)*r, r

def _share(M:int, m:Machine, ids:itertools.count) -> tuple[UOp, UOp, UOp, UOp]:
  "Rows 0 to M-1 for all cores: a row, the loop over a core's rows, the core's number and the loop over cores."
  cores = next(c for c in range(m.cores, 0, -1) if M % c == 0)
  (core, me), i = _cores(cores, next(ids)), UOp.range(M//cores, next(ids))
  return me*(M//cores) + i, i, me, core

def _norm(y:UOp, x:UOp, w:UOp, b:UOp, eps:float, m:Machine) -> UOp:
  (M, D), ids = x.shape, itertools.count()
  m, turn, _, core = _share(M, m, ids)
  hat, _ = _normalised(x, m, _row_sums(turn, D, ids), eps)
  i = UOp.range(D, next(ids))
  done = y[m, i].store(hat(i)*w[i] + b[i]).end(i, turn, core)
  return done.sink(arg=KernelInfo(name=f"layernorm_{M}x{D}", opts_to_apply=()))

def _norm_grad(dx:UOp, dw:UOp, db:UOp, x:UOp, w:UOp, dy:UOp, eps:float, m:Machine) -> UOp:
  """dx = (g - mean g - hat·mean(g hat))/deviation with g = w dy;  dw = Σ_m hat dy, db = Σ_m dy, (cores,D):
  a row of sums for each core."""
  (M, D), ids = x.shape, itertools.count()
  m, turn, me, core = _share(M, m, ids)
  z, i, o = (UOp.range(D, next(ids)) for _ in range(3))
  sums = [UOp.placeholder((D,), dtypes.float, slot=next(ids), addrspace=AddrSpace.REG) for _ in range(2)]
  zero = UOp.group(*[s.after(core)[z].store(0.0) for s in sums]).end(z)
  total = _row_sums(turn, D, ids)
  hat, r = _normalised(x, m, total, eps)
  g, gh = (total(f) * (1/D) for f in (lambda i: dy[m, i]*w[i], lambda i: dy[m, i]*w[i]*hat(i)))
  sw, sb = (s.after(zero, turn) for s in sums)
  row = UOp.group(dx[m, i].store(r*(dy[m, i]*w[i] - g - hat(i)*gh)),
                  sw[i].store(sw[i] + dy[m, i]*hat(i)), sb[i].store(sb[i] + dy[m, i])).end(i, turn)
  done = UOp.group(*[d[me, o].store(s.after(row)[o]) for d, s in zip((dw, db), sums)]).end(o, core)
  return done.sink(arg=KernelInfo(name=f"layernorm_grad_{M}x{D}", opts_to_apply=()))

def layernorm(x:Tensor, w:Tensor, b:Tensor, eps:float=1e-5) -> Tensor:
  "(x - mean)/sqrt(variance + eps) · w + b over the last axis: x (…,D), w, b (D,). Differentiable once in all three."
  x, w, b = on_one_device(x, w, b)
  if not _float_on_cpu(x, w, b): return x.layernorm(eps=eps)*w + b
  rows, m = x.reshape(-1, x.shape[-1]), machine(x.device)
  if rows.numel() < ONE_CORE//8: m = m._replace(cores=1)
  y, = launch(bound(_norm, eps=eps, m=m), [rows.shape], [rows, w, b], bound(_norm_backward, eps=eps, m=m))
  return y.reshape(x.shape)

def _norm_backward(dy:Tensor, y:Tensor, x:Tensor, w:Tensor, b:Tensor, eps:float, m:Machine) -> tuple[Tensor, ...]:
  "dx, dw, db, the last two summed over the cores."
  cores = next(c for c in range(m.cores, 0, -1) if x.shape[0] % c == 0)
  dx, *sums = launch(bound(_norm_grad, eps=eps, m=m), [x.shape, (cores, *w.shape), (cores, *w.shape)], [x, w, dy],
                     no_second_gradient("layernorm"))
  return dx, *(s[0] if cores == 1 else s.sum(0) for s in sums)

# ---------------------------------------------------------------- attention's softmax: one launch forward, one back
# (32,2048,2048) with its gradient, two cores: tinygrad 5 launches and 1.7 s.
LOWEST = float(np.finfo(np.float32).min)
MAX_ROW = 1 << 18                    # scores of a row: 1 MB of the calling thread's stack

def _softmax(p:UOp, s:UOp, *place:UOp, m:Machine) -> UOp:
  (G, L, T), ids = s.shape, itertools.count()
  row, turn, _, core = _share(G*L, m, ids)
  g, l, i, o = row//L, row % L, UOp.range(T, next(ids)), UOp.range(T, next(ids))
  own = l + (place[0][0].load() if place else T - L)
  first = place[1][g//(G//place[1].shape[0])].load() if len(place) > 1 else None
  seen = lambda i: i <= own if first is None else (i <= own) & ((i >= first) | i.eq(own))
  total = _row_sums(turn, T, ids)
  largest = total(lambda i: seen(i).where(s[g, l, i], LOWEST), UOp.maximum, LOWEST)
  e = UOp.placeholder((T,), dtypes.float, slot=next(ids), addrspace=AddrSpace.REG)
  e = e.after(e.after(turn)[i].store(seen(i).where((s[g, l, i] - largest).exp(), 0.0)).end(i))
  scale = 1/total(lambda i: e[i])
  done = p[g, l, o].store(e[o]*scale).end(o, turn, core)
  return done.sink(arg=KernelInfo(name=f"softmax_{G}x{L}x{T}", opts_to_apply=()))

def _softmax_grad(ds:UOp, p:UOp, dp:UOp, m:Machine) -> UOp:
  "ds = p (dp - Σ p dp)"
  (M, T), ids = p.shape, itertools.count()
  row, turn, _, core = _share(M, m, ids)
  i, sum = UOp.range(T, next(ids)), _row_sums(turn, T, ids)(lambda i: p[row, i]*dp[row, i])
  done = ds[row, i].store(p[row, i]*(dp[row, i] - sum)).end(i, turn, core)
  return done.sink(arg=KernelInfo(name=f"softmax_grad_{M}x{T}", opts_to_apply=()))

def causal_softmax(s:Tensor, pos:Tensor|None=None, start:Tensor|None=None) -> Tensor:
  """Over the last axis of s (B,…,L,T), where row i sees columns up to pos + i, pos (1,) int, by default T - L; and
  none before start (B,) int, except its own. Differentiable once, in s."""
  s, pos, start = on_one_device(s, pos, start)
  *lead, L, T = s.shape
  place = [x for x in (pos, start) if x is not None]
  if not _float_on_cpu(s) or T > MAX_ROW:
    own = Tensor.arange(L).unsqueeze(-1) + (T - L if pos is None else pos)
    seen, t = Tensor.arange(T) <= own, Tensor.arange(T)
    if start is not None: seen = seen & ((t >= start.reshape(-1, *[1]*(s.ndim-1))) | (t == own))
    return seen.where(s, -math.inf).softmax(-1)
  m = machine(s.device)
  if s.numel() < ONE_CORE//8: m = m._replace(cores=1)
  p, = launch(bound(_softmax, m=m), [(prod(lead), L, T)], [s.reshape(-1, L, T), *place],
              bound(_softmax_backward, m=m))
  return p.reshape(s.shape)

def _softmax_backward(dp:Tensor, p:Tensor, s:Tensor, *place:Tensor, m:Machine) -> tuple[Tensor|None, ...]:
  "ds from p, the softmax itself; positions get no gradient."
  rows = [x.reshape(-1, x.shape[-1]) for x in (p, dp)]
  ds, = launch(bound(_softmax_grad, m=m), [rows[0].shape], rows, no_second_gradient("softmax"))
  return ds.reshape(s.shape), *(None for _ in place)

def softmax(s:Tensor) -> Tensor:
  "Over all of the last axis. Differentiable once."
  return causal_softmax(s.unsqueeze(-2)).squeeze(-2)    # a single row, the last one, sees every column

# ---------------------------------------------------------------- embedding: a look-up, whose gradient adds up rows
# tinygrad's own gradient compares every token with every word: 22 s for 1024 tokens of 50264 words, (768,) each.
# w comes as one long row: of two indices, tinygrad would make sure by a division that they are within bounds.
def _embed(y:UOp, w:UOp, tokens:UOp, m:Machine) -> UOp:
  (T, D), (core, me), n = y.shape, _cores(m.cores, 0), -(-y.shape[0]//m.cores)
  i, c = UOp.range(n, 1), UOp.range(D, 2)
  t = (me*n + i).minimum(T - 1)
  done = y[t, c].store(widened(w[tokens[t].load()*D + c].load())).end(c, i, core)
  return done.sink(arg=KernelInfo(name=f"embed_{T}x{D}", opts_to_apply=()))

def _embed_grad(dw:UOp, dy:UOp, tokens:UOp, m:Machine) -> UOp:
  "Each core has columns of its own, so that no two add to the same place."
  (T, D), cores = dy.shape, next(c for c in range(m.cores, 0, -1) if dy.shape[1] % c == 0)
  n, (core, me) = D//cores, _cores(cores, 0)
  row, t, z, c = (UOp.range(s, 1 + i) for i, s in enumerate((dw.shape[0]//D, T, n, n)))
  zero = dw.after(core)[row*D + me*n + z].store(0.0).end(z, row)
  sums = dw.after(zero, t)[tokens[t].load()*D + me*n + c]
  done = sums.store(sums + dy[t, me*n + c]).end(c, t, core)
  return done.sink(arg=KernelInfo(name=f"embed_grad_{T}x{D}", opts_to_apply=()))

def embedding(tokens:Tensor, w:Tensor) -> Tensor:
  "w[tokens]: tokens (…) int from 0 to V-1, w (V,D) of any of WEIGHTS -> (…,D) float32. Differentiable once in w."
  tokens, w = on_one_device(tokens, w)
  if not _float_on_cpu(small=(w,)) or 0 in tokens.shape:
    onehot = tokens.unsqueeze(-1) == Tensor.arange(w.shape[0])
    if w.shape[0] <= 1024: return matmul(onehot.float(), w)        # for the sake of its gradient
    return widened(onehot.unsqueeze(-1).where(w, 0).sum(-2, dtype=w.dtype))      # tinygrad makes this a look-up
  m = machine(w.device)
  y, = launch(bound(_embed, m=m), [(prod(tokens.shape), w.shape[1])],
              [w.reshape(-1), tokens.reshape(-1).clip(0, w.shape[0]-1)], bound(_embed_backward, m=m))
  return y.reshape(*tokens.shape, -1)

def _embed_backward(dy:Tensor, y:Tensor, w:Tensor, tokens:Tensor, m:Machine) -> tuple[Tensor|None, ...]:
  "dw; tokens get no gradient."
  return launch(bound(_embed_grad, m=m), [w.shape], [dy, tokens], no_second_gradient("embedding"))[0], None

# ---------------------------------------------------------------- decoding: states are overwritten
def _write(cache:UOp, x:UOp, pos:UOp) -> UOp:
  (G, L, D), T = x.shape, cache.numel()//x.shape[0]//x.shape[2]
  g, l, d = (UOp.range(n, i) for i, n in enumerate(x.shape))
  at = (pos[0].load() + l).minimum(T - 1)             # past the end: nobody else's memory
  return cache[(g*T + at)*D + d].store(x[g, l, d]).end(g, l, d).sink(arg=KernelInfo(name=f"write_{G}x{L}x{D}"))

def write(cache:Tensor, x:Tensor, pos:Tensor) -> Tensor:
  "cache (B,heads,T,hd) with rows pos, pos+1, … made x (B,heads,L,hd), in place where kernels are on; pos (1,) int."
  B, H, L, D = x.shape
  if FLASH and whole(x):
    made, = launch(_write, [cache.reshape(-1)], [x.reshape(B*H, L, D), pos],
                   "write overwrites a cache: it has no gradient.")
    return made.reshape(cache.shape)
  T = cache.shape[2]
  at = Tensor.arange(T).reshape(1, 1, T, 1) - pos.reshape(1, 1, 1, 1)
  if L > 1: x = (at.squeeze(-1).unsqueeze(2) == Tensor.arange(L).reshape(L, 1)).float().transpose(-1, -2) @ x
  return ((at >= 0) & (at < L)).where(x, cache)

def _attend(y:UOp, q:UOp, k:UOp, v:UOp, pos:UOp, *start:UOp, m:Machine) -> UOp:
  (G, D), T, ids = q.shape, k.numel()//q.numel(), itertools.count()
  g, turn, _, core = _share(G, m, ids)
  n, W = (pos[0].load() + 1).cast(dtypes.weakint), next(w for w in (m.lanes, 8, 4, 2, 1) if D % w == 0)
  reg = lambda n: UOp.placeholder((n,), dtypes.float, slot=next(ids), addrspace=AddrSpace.REG)
  loop = lambda n, axis=AxisType.LOOP: UOp.range(n, next(ids), axis)
  s, largest, sums, acc, total, at = reg(T), reg(1), reg(W), reg(D), reg(1), lambda t, d: (g*T + t)*D + d
  largest = largest.after(largest.after(turn)[0].store(LOWEST))
  t, z, c, w = loop(n, AxisType.REDUCE), loop(W), loop(D//W, AxisType.REDUCE), loop(W)
  sums = sums.after(sums.after(t)[z].store(0.0).end(z))
  p = sums.after(c)
  sums = sums.after(p[w].store(p[w] + q[g, c*W + w]*k[at(t, c*W + w)]).end(w).end(c))
  def tree(x:list[UOp]) -> UOp: return x[0] if len(x) == 1 else tree([a + b for a, b in zip(x[::2], x[1::2])])
  dot = tree([sums[i] for i in range(W)])*D**-0.5                                                # s = q k / sqrt D
  first = start[0][g//(G//start[0].shape[0])].load() if start else None
  seen = lambda t, x, otherwise: x if first is None else (t >= first).where(x, otherwise)
  now = largest.after(t)
  scores = UOp.group(s.after(turn, t)[t].store(dot), now[0].store(now[0].maximum(seen(t, dot, LOWEST)))).end(t)
  s, largest, t = s.after(scores), largest.after(scores), loop(n)
  s = s.after(s[t].store(seen(t, (s[t] - largest[0]).exp(), 0.0)).end(t))                        # s = exp(s - max)
  z, t, d, o = loop(D), loop(n, AxisType.REDUCE), loop(D), loop(D)
  zero = UOp.group(acc.after(turn, s)[z].store(0.0).end(z), total.after(turn, s)[0].store(0.0))
  a, all = acc.after(zero, t), total.after(zero, t)
  sums = UOp.group(a[d].store(a[d] + s[t]*v[at(t, d)]).end(d), all[0].store(all[0] + s[t])).end(t)
  done = y[g*D + o].store(acc.after(sums)[o]/total.after(sums)[0]).end(o).end(turn).end(core)    # y = s v / Σ s
  # loops whose length is known only to the device: tinygrad can't count what they do, nor rearrange them
  work = Estimates(4*G*T*D, 8*G*T*D, 8*G*T*D)
  return done.sink(arg=KernelInfo(name=f"attend_{G}x{T}x{D}", opts_to_apply=(), estimates=work), tag=1)

def attend_step(q:Tensor, k:Tensor, v:Tensor, pos:Tensor, start:Tensor|None=None) -> Tensor:
  """Attention of one query: q (B,heads,hd) over rows start (B,), or 0, to pos (1,) of k, v (B,heads,T,hd) -> like q.
  On a CPU the time is that of reading these rows, whatever T; elsewhere all are read. Not differentiable."""
  B, H, D = q.shape
  if _float_on_cpu(q, k, v) and k.shape[2] <= MAX_ROW:
    inputs = [q.reshape(B*H, D), *(x.reshape(-1) for x in (k, v)), *(x for x in (pos, start) if x is not None)]
    y, = launch(bound(_attend, m=machine(q.device)), [(B*H*D,)], inputs,
                "attend_step, which is for decoding, has no gradient.")
    return y.reshape(B, H, D)
  s = matmul(q.unsqueeze(2) * D**-0.5, k, transposed=True)                                       # (B,heads,1,T)
  return matmul(causal_softmax(s, pos, start), v).squeeze(2)

def _step(y:UOp, s:UOp, re:UOp, im:UOp, q:UOp, k:UOp, v:UOp, b:UOp, c:UOp, dk:UOp,
          ar:UOp, ai:UOp, br:UOp, bi:UOp, cr:UOp, ci:UOp, d:UOp, m:Machine) -> UOp:
  (B, D, N), M, ids = s.shape, re.shape[2], itertools.count()
  cores = next(c for c in range(m.cores, 0, -1) if D % c == 0)
  (core, me), r, turn = _cores(cores, next(ids)), UOp.range(B, next(ids)), UOp.range(D//cores, next(ids))
  h, x = me*(D//cores) + turn, k[r, me*(D//cores) + turn]
  # the new state goes through registers: the compiler can't tell that it does not overwrite what is read next
  kept = [UOp.placeholder((n,), dtypes.float, slot=next(ids), addrspace=AddrSpace.REG) for n in (N, M, M)]
  j, i, o, p = (UOp.range(n, next(ids)) for n in (N-1, M, N, M))
  new, nre, nim = (x.after(turn) for x in kept)
  shift = UOp.group(new[0].store(b[h, 0]*x), new[j+1].store(s[r, h, j] + b[h, j+1]*x).end(j)) if N > 1 \
    else new[0].store(b[h, 0]*x)
  now = kept[0].after(shift)                                                           # s' = shift s + B k
  kv = (_row_sums(turn, N, ids)(lambda i: now[i]*c[h, i]) + dk[h]*x)*v[r, h]
  scan = UOp.group(nre[i].store(ar[h, i]*re[r, h, i] - ai[h, i]*im[r, h, i] + br[h, i]*kv),
                   nim[i].store(ar[h, i]*im[r, h, i] + ai[h, i]*re[r, h, i] + bi[h, i]*kv)).end(i)
  nre, nim = (x.after(scan) for x in kept[1:])                                         # x' = dA x + dB kv
  out = _row_sums(turn, M, ids)(lambda i: cr[h, i]*nre[i] - ci[h, i]*nim[i])
  done = UOp.group(y[r, h].store(q[r, h]*(out*2 + d[h]*kv)), s[r, h, o].store(now[o]).end(o),
                   UOp.group(re[r, h, p].store(nre[p]), im[r, h, p].store(nim[p])).end(p)).end(turn, r, core)
  return done.sink(arg=KernelInfo(name=f"h3_step_{B}x{D}x{N}", opts_to_apply=()))

def h3_step(q:Tensor, k:Tensor, v:Tensor, state:tuple[Tensor, Tensor, Tensor], weights:tuple[Tensor, ...]
            ) -> tuple[Tensor, tuple[Tensor, ...]]|None:
  """y (B,D) of an H3 layer with heads of one channel, whose state is overwritten; None where plain ops have to do it.

  q, k, v (B,D); state: shift (B,D,N), re and im (B,D,M); weights: B, C (D,N) and D (D,) of the shift SSM, re and im
  of dA, dB and C (D,M), and D (D,), of the diagonal SSM. Not differentiable.
  """
  if not _float_on_cpu(q, k, v, *state, *weights): return None
  y, *new = launch(bound(_step, m=machine(q.device)), [q.shape, *state], [q, k, v, *weights],
                   "h3_step, which overwrites a state, has no gradient.")
  return y, tuple(new)

# ---------------------------------------------------------------- the device
def _is_clang(command:str) -> bool:
  "gcc does not know tinygrad's options; a Mac without its developer tools has a clang that only says so."
  try: return "clang" in subprocess.run([command, "--version"], capture_output=True, text=True).stdout
  except OSError: return False

WORDS = 64                             # of an entry in a list of kernels: a function and its arguments

class Job:
  """Work for all cores: core c runs the n kernels of entries[c], (cores,n,WORDS), one after the other.

  `_replay` is the loop that does it. done[8 c] is how many core c has finished, a cache line each.
  taken: whoever gets it runs the job, or cancels it. ended: the cores that have returned. memory: what
  the kernels read and write, kept alive until they have. `wait` returns when all have finished.
  """
  def __init__(self, function:Callable, entries:np.ndarray, pause:np.ndarray, memory:object):
    cores, self.n, _ = entries.shape
    self.function, self.memory = function, (entries, pause, memory)
    self.done, self.taken, self.ended = np.zeros(8*cores, np.uint64), threading.Lock(), queue.SimpleQueue()
    at = entries.ctypes.data, self.done.ctypes.data, pause.ctypes.data
    self.shares = [tuple(map(ctypes.c_uint64, (at[0] + c*entries.strides[0], *at[1:], self.n, c)))
                   for c in range(cores)]

  def run(self, core:int):
    self.function(*self.shares[core])
    if core > 0: self.ended.put(core)

  def wait(self):
    while (self.done[::8] < self.n).any(): self.ended.get()

class Cores:
  """A pool of threads. The thread that asks runs share 0 of a job, the leader share 1, workers the rest.

  The leader takes the jobs from a queue, one after the other: two threads that ask at the same time
  can't hold half of the cores each and wait for ever. Native code runs without Python's lock.
  """
  def __init__(self):
    self.jobs, self.workers, self.leading = queue.SimpleQueue(), [], threading.Lock()

  def run(self, job:Job):
    "Runs a job, whose first share falls to the thread that asks for it."
    if len(job.shares) == 1: return job.run(0)
    if not self.leading.locked(): self.start(self.lead)
    try:
      self.jobs.put(job)
      job.run(0)
      job.wait()
    except BaseException:
      # An interrupt. If neither this thread nor the leader has begun, the leader never will. Else the
      # others run, and so does this thread's share, unless it has run already.
      if job.done[0] or not job.taken.acquire(blocking=False):
        if not job.done[0]: job.run(0)
        job.wait()
      raise

  def start(self, loop:Callable, *args:object):
    usual = threading.stack_size(16 << 20)            # a kernel's private arrays are on the stack
    threading.Thread(target=loop, args=args, daemon=True).start()
    threading.stack_size(usual)

  def lead(self):
    if not self.leading.acquire(blocking=False): return
    while True:
      job = self.jobs.get()
      if not job.taken.acquire(blocking=False): continue
      for core in range(2, len(job.shares)):
        if len(self.workers) < core - 1:
          self.workers.append(queue.SimpleQueue())
          self.start(self.serve, self.workers[-1])
        self.workers[core-2].put((job, core))
      job.run(1)
      del job                                         # and the memory that it keeps alive

  def serve(self, shares:queue.SimpleQueue):
    while True:
      job, core = shares.get()
      job.run(core)
      del job

CORES = Cores()

class Uninterrupted:
  "Holds back Ctrl-C, which Python raises in the main thread, until the block has ended."
  def __enter__(self):
    self.came, handler = None, signal.getsignal(signal.SIGINT)
    held = callable(handler) and threading.current_thread() is threading.main_thread()
    self.handler = handler if held else None
    if held: signal.signal(signal.SIGINT, self.note)
  def note(self, *came): self.came = came
  def __exit__(self, *_):
    if self.handler: signal.signal(signal.SIGINT, self.handler)
    if self.came: self.handler(*self.came)

class Realisation:
  """A call of realize or of a TinyJit that is going on.

  tinygrad gives a Tensor its buffer before the kernels that fill it have run. If the call fails
  between the two, by Ctrl-C say, the Tensor looks computed and holds zeros. So `graphs` has each of
  them with its graph before, which is given back. Not given back, once kernels have begun: a graph
  that overwrites something, as it is not known whether it has.
  """
  going_on: list[Realisation] = []                    # each inside the one before
  def __init__(self): self.graphs, self.begun = [], False
  def __enter__(self): self.going_on.append(self)
  def __exit__(self, error:type|None, *_):
    self.going_on.pop()
    if error:
      for t, graph in reversed(self.graphs):
        if not self.begun or not graph.op_in_backward_slice_with_self(Ops.STORE): t.uop = graph
    elif self.going_on and not self.begun:            # captured: the TinyJit around it runs the kernels
      self.going_on[-1].graphs += self.graphs

@functools.cache
def guard_tinygrad():
  """Patches tinygrad 0.14.0, once in a process, for threads, forks and Ctrl-C.

  Threads: what is being captured and compiled stands in tables that all threads share, and the
  cache on disk is open in one thread only, so one at a time realises Tensors or calls a TinyJit.
  Forks: the child begins without the threads, processes and connections that it does not have.
  Ctrl-C: before the first kernel, Tensors get their graphs back; while kernels run, Ctrl-C waits
  until the last has run. `setup_device` calls this.
  """
  own = threading.local()
  def one_at_a_time(method:Callable) -> Callable:
    @functools.wraps(method)
    def call(*args, **options):
      with LOCK:
        others, helpers._db_connection = helpers._db_connection, getattr(own, "cache", None)
        try:
          with Realisation(): return method(*args, **options)
        finally: own.cache, helpers._db_connection = helpers._db_connection, others
    return call
  for owner, name in ((Tensor, "realize"), (Tensor, "_buffer"), (_TinyJit, "__call__")):
    setattr(owner, name, one_at_a_time(getattr(owner, name)))

  replace = tensor._apply_map_to_tensors
  def replace_and_note(new:dict[UOp, UOp], name:str):
    before = [(t, t.uop) for t in (ref() for ref in list(tensor.all_tensors)) if t is not None]
    try: replace(new, name)
    finally:
      if Realisation.going_on:
        Realisation.going_on[-1].graphs += [(t, graph) for t, graph in before if t.uop is not graph]
  tensor._apply_map_to_tensors = replace_and_note

  run = realize.run_linear
  def run_whole(linear:UOp, var_vals:dict[str, int]|None=None, input_uops:Sequence[UOp]=(), update_stats:bool=True,
                jit:bool=False, wait:bool=False):
    if not jit:
      linear = realize.compile_linear(linear, validate=helpers.VALIDATE_WITH_CPU, input_uops=list(input_uops))
      linear = realize.link_linear(linear)
    if not linear.src: return
    with Uninterrupted():
      if Realisation.going_on: Realisation.going_on[-1].begun = True
      run(linear, var_vals, input_uops, update_stats, True, wait)
      if Realisation.going_on: Realisation.going_on[-1].graphs = []
  realize.run_linear = tensor.run_linear = tinyjit.run_linear = run_whole

  def in_child():
    CORES.__init__()
    if worker.worker_pool: multiprocessing.process._children.difference_update(worker.worker_pool._pool)
    worker.worker_pool = own.cache = helpers._db_connection = None
    LOCK.release()
  if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=in_child)

def _replay(cores:int, wait:bool=True) -> UOp:
  """A core's part of a list of kernels: n entries of WORDS words. done[8 c]: how many of them core c is through
  with; nobody starts on a kernel before all are through with the one before, if `wait`. pause: a function that
  does nothing, and the one to call while waiting."""
  u64 = dtypes.uint64
  entries, pause = UOp.param(0, u64, (1 << 30,)), UOp.param(2, u64, (2,))
  done = UOp.param(1, u64, (8*cores,), volatile=True)
  n, me = (UOp.param(3 + i, dtypes.int, (), vmin_vmax=(0, 1 << 20), name=name, addrspace=AddrSpace.ALU)
           for i, name in enumerate(("n", "me")))
  i = UOp.range(n, 0, dtype=dtypes.int)
  f, *args = (entries.index(i*WORDS + w).load() for w in range(WORDS))
  ran = done.after(f.call(*args, ret_dtype=dtypes.void).barrier()).index(me*8).store((i + 1).cast(u64))
  # a parameter that is not used would not be one of the function's
  if not wait: ran = pause.after(ran).index(0).load().call(ret_dtype=dtypes.void)
  for c in range(cores) if wait else ():
    again = UOp.loop(1 + c)
    waits = done.after(again, ran).index(8*c).load() < (i + 1).cast(u64)
    ran = pause.after(again, ran).index(waits.where(1, 0)).load().call(ret_dtype=dtypes.void).end(again, waits)
  return ran.barrier().end(i)

@functools.cache
def _threaded(kernel:UOp) -> UOp:
  "A kernel of tinygrad's own with its outermost loop for all cores, where they divide it and it is worth their while."
  cores = (renderer := Device["CPU"].renderer).global_max[0]
  if cores == 1 or prod(r.vmax + 1 for r in kernel.toposort() if r.op is Ops.RANGE) < SHARED: return kernel
  # what tinygrad does before it optimises a kernel (codegen.full_rewrite_to_sink)
  for rules, options in ((codegen.multi_pm, {}), (codegen.pm_mops, {"bottom_up": True}), (codegen.pm_load_collapse, {}),
                         (codegen.pm_split_ranges + codegen.pm_flatten_range, {"ctx": {}}),
                         (codegen.sym + codegen.pm_flatten_range, {}),
                         (codegen.pm_flatten_range + codegen.pm_simplify_ranges, {"ctx": {}})):
    kernel = graph_rewrite(kernel, rules, **options)
  k = Scheduler(kernel, renderer)
  k.convert_loop_to_global()
  axis = next((i for i in k.axes_of(AxisType.WEAK) if k.full_shape[i] % cores == 0), None)
  if axis is not None:
    try: k.apply_opt(Opt(OptOps.THREAD, axis, cores))
    except KernelOptError: pass                       # an inner loop, say
  return k.get_optimized_ast()

def _shared(call:UOp) -> UOp:
  if not NOOPT or call.op is not Ops.CALL or (k := call.src[0]).op is not Ops.SINK \
     or k.arg.opts_to_apply is not None or call.src[1].device != "CPU": return call
  return call.replace(src=(_threaded(k), *call.src[1:]))

@functools.cache
def use_all_cores():
  """tinygrad 0.14.0 runs the threads of a CPU kernel one after the other, and each kernel of a TinyJit from Python,
  0.1 ms each. From here on threads run at once, and a TinyJit's kernels run without Python between them."""
  from tinygrad.runtime.ops_cpu import BufferSpec, CPUAllocator, CPUProgram, HCQBuffer
  from tinygrad.codegen import do_to_program
  from tinygrad.engine.jit import GraphRunner, get_call_arg_uops
  one_by_one = CPUProgram.__call__
  @functools.wraps(one_by_one)
  def call(self, *bufs, global_size:tuple=(1, 1, 1), local_size:tuple=(1, 1, 1), vals:tuple=(), wait:bool=False,
           timeout:int|None=None) -> float|None:
    place, start = self.runtimevars.get("core_id"), time.perf_counter()
    if global_size[0] == 1 or place is None or self.lvp:
      return one_by_one(self, *bufs, global_size=global_size, local_size=local_size, vals=vals, wait=wait,
                        timeout=timeout)
    args = [self.addr, *(b.va_addr for b in bufs), *(x or 0 for x in vals)]
    entries = np.zeros((global_size[0], 1, WORDS), np.uint64)
    entries[:, 0, :len(args)] = args
    entries[:, 0, 1 + place] = np.arange(global_size[0])
    # a core that is through with a single kernel sleeps: to spin takes a tenth of the others' time
    CORES.run(Job(replay(global_size[0], wait=False).fxn, entries, pause, bufs))
    return time.perf_counter() - start if wait else None
  CPUProgram.__call__ = call

  # tinygrad's memory is shared with a child after a fork: what one of them computes would overwrite the other's
  shared = CPUAllocator._alloc
  def private(self, size:int, options:BufferSpec) -> HCQBuffer:
    if os.name != "posix" or options.external_ptr is not None: return shared(self, size, options)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer = shared(self, size, dataclasses.replace(options, external_ptr=mv_address(memory)))
    buffer.meta = memory                              # freed with the buffer
    return buffer
  CPUAllocator._alloc = private

  def program(name:str, body:UOp) -> CPUProgram:
    device = Device["CPU"]
    clang = cstyle.ClangRenderer(dataclasses.replace(device.renderer.target, renderer="CLANG"))
    return CPUProgram(device, do_to_program(body.sink(arg=KernelInfo(name), tag=1), clang).to_elf())
  @functools.cache
  def replay(cores:int, wait:bool=True) -> CPUProgram:
    return program(f"replay_{cores}_{int(wait)}", _replay(cores, wait))
  class Replay(GraphRunner):
    def __init__(self, linear:UOp, input_uops:tuple[UOp, ...]=()):
      super().__init__(linear, input_uops)
      infos, args = [ast.arg for _, ast, _, _ in self.calls], [get_call_arg_uops(call) for call in self.linear.src]
      self.cores, n = max(int(p.global_size[0]) for p in infos), len(infos)
      self.entries = np.zeros((self.cores, n, WORDS), np.uint64)
      self.entries[1:, :, 0] = nothing.addr
      for i, (p, program, (_, _, bufs, _)) in enumerate(zip(infos, self.runtimes, self.calls)):
        mine = self.entries[:int(p.global_size[0]), i]
        mine[:, 0] = program.addr
        for j, b in enumerate(p.globals): mine[:, 1 + j] = bufs[b]._buf.va_addr
        if (place := program.runtimevars.get("core_id")) is not None: mine[:, 1 + place] = np.arange(len(mine))
      # where the buffers of the inputs, and contiguous parts of them, go
      self.places = [(i, 1 + j, args[i][p]) for i, info in enumerate(infos) for j, p in enumerate(info.globals)
                     if any(u.op is Ops.PARAM for u in args[i][p].toposort())]
      self.calls = []                                 # lets go of the first call's inputs
    def __call__(self, input_uops:tuple[UOp, ...], var_vals:dict[str, int], wait:bool=False) -> float|None:
      start, inputs = time.perf_counter(), []
      for i, j, arg in self.places:
        inputs.append(realize._resolve(arg, input_uops).buffer.ensure_allocated()._buf)
        self.entries[:, i, j] = inputs[-1].va_addr
      CORES.run(Job(replay(self.cores).fxn, self.entries, pause, inputs))
      return time.perf_counter() - start if wait else None
    @staticmethod
    def supports_uop(devices:list, call:UOp) -> bool:
      p = call.src[0].arg
      return GraphRunner.supports_uop(devices, call) and all(v.expr == "core_id" for v in p.vars) \
        and len(p.globals) + len(p.vars) < WORDS
  compile_all = realize.lower_and_compile
  realize.lower_and_compile = lambda linear: compile_all(linear.replace(src=tuple(map(_shared, linear.src))))

  # a core that waits lets others have it: there may be more threads than cores
  give_way = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value if os.name == "posix" else None
  nothing = program("nothing", UOp.param(0, dtypes.uint64, (1,)).index(0).load())
  pause = np.array([nothing.addr, give_way or nothing.addr], np.uint64)
  Device["CPU"].graph = Replay

def setup_device():
  """What a program calls before it touches a device.

  Finds the C compiler that tinygrad's CPU device needs: CC, clang, or PyPI's ziglang, whose
  `zig clang` is a whole clang; where no device opens without one: one line that says how to get it,
  exit status 2. On the CPU it leaves the loops to that compiler (NOOPT), which fills its vector
  registers, where tinygrad would unroll into vectors of 4: a training step took 0.83 s instead of
  0.94, the first one 20 s instead of 27.
  """
  how = ("`pip install ziglang` (no root needed), or install clang (`apt install clang`; on a Mac "
         "`xcode-select --install`)")
  compiler = next((c for c in (os.environ.get("CC"), "clang") if c and _is_clang(c)), None)
  if compiler is None and importlib.util.find_spec("ziglang"):
    compiler = os.path.join(cache_dir, "tinygrad", "zig-clang")
    os.makedirs(os.path.dirname(compiler), exist_ok=True)
    with open(f"{compiler}.{os.getpid()}", "w") as f:
      f.write(f'#!/bin/sh\nexec "{sys.executable}" -m ziglang clang "$@"\n')
    os.chmod(f.name, 0o755)
    os.replace(f.name, compiler)
  if compiler: os.environ["CC"] = compiler
  try: Device[Device.DEFAULT]
  except Exception as e:
    why = f"{type(e).__name__}: {e}".split("\n")[0]
    print(f"error: tinygrad can't open a device ({why})" if compiler else "error: no GPU that tinygrad can use, "
          f"and its CPU device needs a C compiler: {how}", file=sys.stderr)
    sys.exit(2)
  if FLASH and not Device[Device.DEFAULT].renderer.has_local:
    if "NOOPT" not in os.environ: NOOPT.value = 1
    device = Device[Device.DEFAULT]
    if _compiler_says(device.renderer, "__AVX512F__") and WIDE not in device.arch: device.arch += f",{WIDE}"
    use_all_cores()
  guard_tinygrad()
  # tinygrad's compile workers live on instead of starting anew: the first step 9.6 s, not 12.3
  os.environ.setdefault("BEAM_MAX_TASKS_PER_CHILD", "100000")

# ---------------------------------------------------------------- selfcheck, sources, benchmark
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
  # length 40 in a transform of 128: all kinds of passes, rows that end inside a column, one without a partner
  cases = {"fftconv": (fftconv, direct, (3, 4, 40), (4, 40), (4,), (3, 4, 40), (3, 4, 40)),
           "matmul": (lambda x, w, b: matmul(x, w, bias=b), None, (50, 40), (40, 35), (35,)),
           "layernorm": (layernorm, None, (5, 24), (24,), (24,))}
  for name, (f, plain, *shapes) in cases.items():
    x = [Tensor(rng.standard_normal(s).astype(np.float32), device=device).realize() for s in shapes]
    out = (50, 35) if name == "matmul" else shapes[0]
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

def check_kernels():
  """selfcheck once for a device, tinygrad version and state of this file; where it fails, one line on
  stderr, and plain ops from here on."""
  if not FLASH: return
  with open(__file__, "rb") as f: code = hashlib.sha256(f.read()).hexdigest()
  version = importlib.metadata.version("tinygrad")
  key = f"{Device[Device.DEFAULT].renderer.target} {os.environ.get('CC')} {version} {code}"
  if diskcache_get("h3tiny_selfcheck", key): return
  try: selfcheck()
  except RuntimeError as e:
    FLASH.value = 0
    if "NOOPT" not in os.environ: NOOPT.value = 0
    print(f"warning: {e}; going on without custom kernels (FLASH=0), slower", file=sys.stderr)
  else: diskcache_put("h3tiny_selfcheck", key, True)

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

def torch_fftconv(L:int, x:dict[str, np.ndarray], dy:np.ndarray) -> dict[str, Callable]:
  "The same in PyTorch, on the CPU, on all cores: its own real FFT, autograd."
  import torch
  torch.set_num_threads(os.cpu_count())
  t, dy = {n: torch.tensor(a, requires_grad=True) for n, a in x.items()}, torch.tensor(dy)
  def f(u, k, D, v, q):
    w = u*v
    return q*(torch.fft.irfft(torch.fft.rfft(w, n=2*L)*torch.fft.rfft(k, n=2*L), n=2*L)[..., :L] + D[:, None]*w)
  def forward():
    with torch.no_grad(): f(**t)
  return {"forward": forward, "both": lambda: torch.autograd.grad(f(**t), list(t.values()), dy)}

def both(f:Callable, x:dict[str, Tensor], dy:Tensor) -> Callable:
  "f(**x) and its gradients, realised."
  def run() -> None: Tensor.realize(y := f(**x), *y.gradient(*x.values(), gradient=dy))
  return run

def race(runs:dict[tuple, tuple[Callable, dict]], rounds:int=4) -> tuple[dict, dict]:
  """The least seconds of each of `runs`, a function and its Context, and its launches and bytes as tinygrad counts.

  `rounds` turns of 0.2 s, with pauses between the contestants, as PyTorch's idle threads go on spinning for a while."""
  best, count = {}, {}
  for turn in range(rounds):
    for key, (f, context) in runs.items():
      with Context(**context):
        if turn == 0: f(), f()     # TinyJit captures
        time.sleep(0.2)
        GlobalCounters.reset()
        f()
        count[key] = GlobalCounters.kernel_count, GlobalCounters.global_mem
        Device[Device.DEFAULT].synchronize()
        until = time.perf_counter() + 0.2
        while (start := time.perf_counter()) < until:
          f()
          Device[Device.DEFAULT].synchronize()
          best[key] = min(best.get(key, 1e9), time.perf_counter() - start)
  return best, count

def bench(lengths:list[int], B:int, H:int, plain:int):
  """Prints a line for each length: y = q * (k ∗ (u*v) + D*(u*v)), forward and with all gradients.

  Milliseconds; launches and bytes are tinygrad's count, the floor is each tensor once. Plain ops up to
  length `plain`; PyTorch where it is installed.
  """
  rng, torch = np.random.default_rng(0), importlib.util.find_spec("torch") is not None
  print(f"y = q * (k * (u v) + D u v), B={B} H={H}, float32, {Device.DEFAULT}, {os.cpu_count()} cores; "
        "torch: on the CPU\n"
        f"{'':6} {'forward, ms':^35}  {'with gradients, ms':^35}  {'launches':^9} {'bytes/floor':^11}\n"
        f"{'L':>6}" + 2*(f" {'plain':>9} {'ours':>8} {'torch':>8} {'ratio':>7} ")
        + f" {'fwd':>4} {'both':>4} {'fwd':>5} {'both':>5}")
  for L in lengths:
    shape = {"u": (B, H, L), "k": (H, L), "D": (H,), "v": (B, H, L), "q": (B, H, L)}
    normal = lambda s: rng.standard_normal(s).astype(np.float32)
    x, dy = {n: normal(s) for n, s in shape.items()}, normal((B, H, L))
    t, g, floor = {n: Tensor(a).realize() for n, a in x.items()}, Tensor(dy).realize(), 4*B*H*L
    def ours() -> dict[str, Callable]:
      return {"forward": TinyJit(lambda: fftconv(**t).realize()), "both": TinyJit(both(fftconv, t, g))}
    runs = {("ours", n): (f, {}) for n, f in ours().items()}
    usual = {"FLASH": 0, "NOOPT": int(os.environ.get("NOOPT", 0))}     # plain tinygrad has its optimiser
    if L <= plain: runs |= {("plain", n): (f, usual) for n, f in ours().items()}
    if torch: runs |= {("torch", n): (f, {}) for n, f in torch_fftconv(L, x, dy).items()}
    best, count = race(runs)
    ms = lambda who, what: f"{1e3*best[who, what]:.2f}" if (who, what) in best else "-"
    line = f"{L:6}"
    for what in ("forward", "both"):
      ratio = f"{best['torch', what]/best['ours', what]:.1f}x" if torch else "-"
      line += f" {ms('plain', what):>9} {ms('ours', what):>8} {ms('torch', what):>8} {ratio:>7} "
    floors = {"forward": 4*floor + 4*H*(L+1), "both": 11*floor + 12*H*(L+1)}
    print(line + "".join(f" {count['ours', n][0]:4}" for n in floors)
          + "".join(f" {count['ours', n][1]/f:5.2f}" for n, f in floors.items()), flush=True)

def bench_states(sizes:list[tuple[int, int]], N:int=64):
  """Prints a line for each (H, L): `ssm_conv` of one sequence, state size N, beside `fftconv` and PyTorch's FFT, which
  both are given the finished filter."""
  rng, torch = np.random.default_rng(0), importlib.util.find_spec("torch") is not None
  print(f"\nthe same by state passing, B=1, N={N}\n{'':14} {'forward, ms':^35}  {'with gradients, ms':^35}\n"
        f"{'H':>4} {'L':>9}" + 2*(f" {'fftconv':>9} {'ours':>8} {'torch':>8} {'ratio':>7} ") + " ns a step and channel")
  for H, L in sizes:
    normal = lambda *s: rng.standard_normal(s).astype(np.float32)
    dt, z = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), (H, 1))), -0.5 + 1j*np.pi*np.arange(N//2)
    A, Bc, C = (1 + dt*z/2)/(1 - dt*z/2), dt/(1 - dt*z/2), normal(H, N//2) + 1j*normal(H, N//2)
    pairs = [tuple(Tensor(np.float32(p)).realize() for p in (x.real, x.imag)) for x in (A, Bc, C)]
    w = dict(zip((n + part for n in "ABC" for part in "ri"), (p for pair in pairs for p in pair)))
    k = Vandermonde(pairs[0], L).sum(cmul(pairs[2], pairs[1])).realize()
    x, dy = {n: normal(*((H,) if n == "D" else (1, H, L))) for n in "uDvq"}, normal(1, H, L)
    t, g = {n: Tensor(a).realize() for n, a in x.items()}, Tensor(dy).realize()
    def state_passing(u, D, v, q, **w) -> Tensor:
      return ssm_conv(u, *((w[f"{n}r"], w[f"{n}i"]) for n in "ABC"), D, v, q)[0]
    runs = {}
    for who, f, args in (("ours", state_passing, t | w), ("fft", fftconv, t | {"k": k})):
      if who == "fft" and _length(L, L) > MAX_N: continue
      runs[who, "forward"] = TinyJit(functools.partial(lambda f, a: f(**a).realize(), f, args)), {}
      runs[who, "both"] = TinyJit(both(f, args, g)), {}
    if torch: runs |= {("torch", n): (f, {}) for n, f in torch_fftconv(L, x | {"k": k.numpy()}, dy).items()}
    best, _ = race(runs, 3)
    ms, line = lambda who, what: f"{1e3*best[who, what]:.1f}" if (who, what) in best else "-", f"{H:4} {L:9,}"
    for what in ("forward", "both"):
      ratio = f"{best['torch', what]/best['ours', what]:.1f}x" if torch else "-"
      line += f" {ms('fft', what):>9} {ms('ours', what):>8} {ms('torch', what):>8} {ratio:>7} "
    print(line + f" {1e9*best['ours', 'forward']/H/L:.2f} {1e9*best['ours', 'both']/H/L:.2f}", flush=True)

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
  long = [(a.channels, L) for L in a.long] if a.long else [] if a.lengths and a.long is None else \
    [(a.channels, 1 << 14), (a.channels, 1 << 16), (quarter, 1 << 14), (quarter, 1 << 20)]
  if min(*lengths, *(a.long or ()), a.batch, a.channels) < 1:
    ap.error("--lengths, --long, --batch and --channels must be at least 1")
  if a.render:
    if max(lengths) > 2048 or min(lengths) < 64:
      ap.error("--render takes lengths from 64 to 2048, what one launch takes at 32 KB")
    for L in lengths:
      for source, scratch in render(a.render, L).values(): print(f"// {scratch} bytes of local memory\n{source}\n")
    return 0
  if not FLASH: ap.error("FLASH=0 turns off what is to be timed here")
  if max(lengths, default=1) > MAX_N//2: ap.error(f"--lengths: kernels take up to {MAX_N//2:,}")
  setup_device()
  try: print(f"selfcheck on {Device.DEFAULT}: worst relative error {selfcheck():.1e}")
  except RuntimeError as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  if lengths: bench(lengths, a.batch, a.channels, a.plain)
  if long: bench_states(long)
  return 0

if __name__ == "__main__": sys.exit(main())
