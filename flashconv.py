"""FlashConv: the causal FFT convolution of H3 as one fused kernel, forward and backward.

Paper: Fu, Dao et al. 2022, "Hungry Hungry Hippos", arXiv 2212.14052, section 4 (FlashConv: fusion,
block FFT, state passing). The official CUDA version is HazyResearch/H3 csrc/fftconv; this one is
written in tinygrad UOps and compiles for whatever device is there. It reads from the top: the
definition in plain ops, `fftconv`, its kernels, then what these are made of.

Glossary. B batch, H channels, L length, K taps, N ≥ L + K - 1 length of the FFT: 2^m or 3·2^m
  u, y    (B,H,L)  input, output            k   (H,K)  filter
  v, q    (B,H,L)  gates before and after   D   (H,)   skip term
  w       u v, what is convolved            c   k ∗ w + D w, what q gates
  y = q * (k ∗ (u*v) + D*(u*v))             the long convolution of the H3 layer, section 3.1
  F, F*                                     discrete Fourier transform of length N, N F⁻¹
  kf      F(k + D δ)/N                      the filter's spectrum: c = F* (kf · F w)
  M       N/8                               length of the 8 sub-transforms that go on side by side
  T, F₈                                     twiddle factors, and a transform of length 8
In an H3 layer k is the diagonal SSM's filter, K in h3tiny.py, and u is shift_ssm of the key.
Also here: `ssm_conv`, the same with the filter of an SSM at any length, by state passing (its
glossary stands there); `launch`, which runs a kernel and keeps its gradients whatever was read
before; `replaceable`, by which support/cpu.py puts faster versions in functions' place.

Run: `python flashconv.py` checks the kernels on your device; `python flashconv.py --render metal`
(or cuda, opencl) prints their sources; FLASH=0 turns them off. `python support/bench.py conv` and
`states` time them.

Not here: a long filter on more than 2^15 steps, unless it is an SSM's (plain ops do it). The shift
SSM of an H3 layer is a launch of its own: one kernel for both convolutions took 1.59, 7.3, 16.9 and
39.7 ms forward at L = 256, 1024, 2048 and 4096 where two launches take 1.57, 8.1, 20.0 and
41.4 (B=8, H=256, CPU), and its backward pass would need two transforms more.
"""
from __future__ import annotations
import argparse, cmath, contextlib, functools, itertools, operator, os, sys, threading
from typing import Callable, NamedTuple, Sequence
import numpy as np
from tinygrad import Device, Tensor, TinyJit, UOp, dtypes, tensor
from tinygrad.codegen import to_program
from tinygrad.device import Buffer, Compiled
from tinygrad.dtype import AddrSpace, DType, strong_dtype
from tinygrad.helpers import MAX_KERNEL_BUFFERS, Context, ContextVar, Target, prod
from tinygrad.renderer import Renderer, cstyle
from tinygrad.schedule.rangeify import DEVICE_MAX_BUFS
from tinygrad.uop.ops import (AxisType, KernelInfo, Ops, ParamArg, PatternMatcher, UPat,
                              graph_rewrite, shape_to_shape_arg)

FLASH = ContextVar("FLASH", 1)  # 0: plain tinygrad ops everywhere
# 1: a row's result in `fftconv` is the same to the bit whatever the other rows hold. It takes about
# twice as long, as two rows share a transform otherwise
BATCH_INVARIANT = ContextVar("BATCH_INVARIANT", 0)

HALF = dtypes.half, dtypes.bfloat16   # half precision: read and written, never computed in
narrow: DType|None = None        # the type as which `fftconv` on a GPU takes float32: `--dtype`

Shape = tuple[int, ...]
Stores = list[UOp]
Value = Callable[..., UOp]   # (indices) -> an element of a matrix, to be read or stored to
Body = Callable[..., Stores]    # (indices) -> the stores that a kernel makes there
Pair = tuple                 # a complex number (re, im) of Tensors, UOps or Reals; or two real rows

# What `selfcheck` runs, by name: a function of Tensors, its definition in plain ops (None: the
# function itself with FLASH=0), the shape of its output, and the shapes of its inputs.
CHECKS: dict[str, tuple] = {}

def checked(output:Shape, *inputs:Shape, plain:Callable|None=None) -> Callable:
  "Registers a function that runs kernels for `selfcheck`, with the small shapes to check it at."
  def register(f:Callable) -> Callable:
    CHECKS[f.__name__] = f, plain, output, *inputs
    return f
  return register

FAST: dict[str, Callable] = {}  # faster versions by name, which support/cpu.py adds

def replaceable(f:Callable) -> Callable:
  """Marks a function that may have a faster version in FAST.

  That takes the same arguments and returns None where it does not serve. FLASH=0 turns all off.
  """
  @functools.wraps(f)
  def call(*args, **options):
    fast = FAST.get(f.__name__) if FLASH else None
    y = fast(*args, **options) if fast else None
    return f(*args, **options) if y is None else y
  return call

# ---------------------------------------------------------------- the definition, in plain ops
def cmul(a:Pair, b:Pair) -> Pair:
  (a_re, a_im), (b_re, b_im) = a, b
  return a_re*b_re - a_im*b_im, a_re*b_im + a_im*b_re
def conj(a:Pair) -> Pair: return a[0], -a[1]

@functools.cache
def dft_matrix(rows:int, cols:int, n:int, device:str, dtype:type) -> Pair:
  "exp(-2πi jk/n), j < rows, k < cols, as (re, im), computed in float64."
  w = np.exp(-2j*np.pi/n * (np.outer(np.arange(rows), np.arange(cols)) % n))
  return tuple(to_device(p, device, dtype) for p in (w.real, w.imag))

def fft(x:Pair, inverse:bool=False) -> Pair:
  """X[k] = Σ_n x[n] exp(∓2πi nk/N) over the last axis, N a power of two, by matrix products.

  The inverse comes without its 1/N.
  """
  N = x[0].shape[-1]
  dtype = np.float64 if x[0].dtype == dtypes.double else np.float32
  def matrix(rows:int, cols:int) -> Pair:
    w = dft_matrix(rows, cols, N, x[0].device, dtype)
    return conj(w) if inverse else w
  def swapped(x:Pair) -> Pair: return tuple(p.transpose(-1, -2) for p in x)
  if N <= 32:
    (re, im), (c, s) = x, matrix(N, N)
    return re@c - im@s, re@s + im@c
  N1 = 32 if N >= 1024 else 16 if N >= 256 else 8           # n = n1 N2 + n2, k = k1 + N1 k2
  N2 = N//N1
  a = swapped([p.reshape(*p.shape[:-1], N1, N2) for p in x])                        # (…, n2, n1)
  a = cmul(fft(a, inverse), matrix(N2, N1))                                         # (…, n2, k1)
  a = swapped(fft(swapped(a), inverse))                                             # (…, k2, k1)
  return tuple(p.reshape(x[0].shape) for p in a)

def fft_length(L:int, K:int) -> int:
  "The shortest power of two at which a convolution does not wrap around, from 64 on."
  return max(64, 1 << (L + K - 2).bit_length())

def conv_ref(w:Tensor, k:Tensor, D:Tensor|None) -> Tensor:
  "c = k ∗ w + D w"
  L = w.shape[-1]
  k = k[:, :L]
  N = fft_length(L, k.shape[-1])
  def spectrum(x:Tensor) -> Pair:
    x = x.pad((None,)*(x.ndim-1) + ((0, N-x.shape[-1]),))
    return fft((x, x.const_like(0)))
  c = fft(cmul(spectrum(w), spectrum(k)), inverse=True)[0][..., :L] / N             # F⁻¹(F w · F k)
  return c if D is None else c + D.reshape(-1, 1)*w

class Finish(NamedTuple):
  """The elementwise end of a convolution: y, given c = k ∗ w + D w, and its gradients.

  Plain ops, the kernel and its gradient all take it from here. An option, such as an activation,
  would be one more field, set by `fftconv` and `fftconv_ref`; no kernel would know of it.
  """
  gated: bool                   # whether there is a q
  # not fields: whether dc uses c, and dq uses q; if not, these may be None there
  needs_c = False
  needs_q = False
  def y(self, c:Tensor|UOp, q:Tensor|UOp|None) -> Tensor|UOp: return c*q if self.gated else c
  def dc(self, dy:UOp, c:UOp|None, q:UOp|None) -> UOp: return dy*q if self.gated else dy
  def dq(self, dy:UOp, c:UOp, q:UOp|None) -> UOp: return c*dy

def fftconv_ref(u:Tensor, k:Tensor, D:Tensor|None=None, v:Tensor|None=None,
                q:Tensor|None=None) -> Tensor:
  "The definition of `fftconv`, with its arguments but channels_last, in plain tinygrad ops."
  return with_gates(lambda w: conv_ref(w, wide(k), wide(D)), u, v, q, Finish(q is not None))

def with_gates(conv:Callable[[Tensor], Tensor], u:Tensor, v:Tensor|None, q:Tensor|None,
               finish:Finish) -> Tensor:
  "Returns y, of u's type, with c = conv(u v) from an ungated convolution in float32."
  w = wide(u) if v is None else wide(u)*wide(v)
  y = finish.y(conv(w), wide(q))
  return y.cast(u.dtype) if u.dtype in HALF else y

def wide(x:Tensor|None) -> Tensor|None:
  "Returns half precision as float32, all else as it is."
  return x if x is None or x.dtype not in HALF else x.float()

# ---------------------------------------------------------------- the definition without an FFT
def direct_conv(w:Tensor, k:Tensor, D:Tensor|None) -> Tensor:
  """`conv_ref` as a sum over taps: fewer and smaller kernels, and no rounding from one position to
  another."""
  L = w.shape[-1]
  k = k[:, :L]
  taps = k.pad((None, (L-1, L-k.shape[1]))).unfold(-1, L, 1).flip(-1)      # (H,L,L): k[t-s]
  c = (taps*w.unsqueeze(-2)).sum(-1)
  return c if D is None else c + D.reshape(-1, 1)*w

def direct(u:Tensor, k:Tensor, D:Tensor, v:Tensor, q:Tensor) -> Tensor:
  "`fftconv` by `direct_conv`, for `selfcheck`."
  return q*direct_conv(u*v, k, D)

# ---------------------------------------------------------------- the public function
SMALL = (3, 4, 24)
@checked(SMALL, SMALL, (4, 24), (4,), SMALL, SMALL, plain=direct)
def fftconv(u:Tensor, k:Tensor, D:Tensor|None=None, v:Tensor|None=None, q:Tensor|None=None,
            channels_last:bool=False) -> Tensor:
  """y = q * (k ∗ (u*v) + D*(u*v)): the causal convolution along the last axis, gated before, after.

  u, v, q, y (B,H,L), or (B,L,H) with channels_last; k (H,K), or (1,K), one filter for all channels;
  taps past L do nothing; D (H,). Left out, v and q are 1 and D is 0. Any B, H, L, K ≥ 1. float32,
  or float16 or bfloat16, which is rounded to where y and gradients are written, and nowhere else.
  Differentiable in every argument, works in TinyJit. Raises ValueError when shapes don't fit.
  It runs in one launch where the transform fits into shared memory; in two levels where it does
  not; by overlap-save where the filter is far shorter than the sequence; and in plain ops,
  `fftconv_ref`, where no kernel serves. On a CPU support/cpu.py adds up few taps without an FFT.
  Sources: paper section 4; HazyResearch/H3 src/ops/fftconv.py:53-103.
  """
  check_shapes(u, k, D, v, q, channels_last)
  if channels_last: u, v, q = (None if x is None else x.transpose(1, 2) for x in (u, v, q))
  u, k, D, v, q = on_one_device(u, k, D, v, q)
  original = u.dtype
  if narrow and original == dtypes.float and machine(u.device).gpu:
    u, v, q = (None if x is None else x.cast(narrow) for x in (u, v, q))
  y = gated_conv(u, k[:, :u.shape[2]], D, v, q).cast(original)
  return y.transpose(1, 2) if channels_last else y

@replaceable
def gated_conv(u:Tensor, k:Tensor, D:Tensor|None, v:Tensor|None, q:Tensor|None) -> Tensor:
  "`fftconv` of Tensors that fit together, on one device; k has at most as many taps as u steps."
  k, D = wide(k), wide(D)
  N = transform_length(u.device, u.shape[2] + k.shape[1] - 1)
  N_short = max(SHORT, fft_length(8*k.shape[1], 1))
  serve, finish = kernels_serve(u, k, D, v, q), Finish(q is not None)
  R = levels(u.device, N) if serve else 0
  overlap_save = serve and N > 2*N_short and levels(u.device, N_short) == 1
  if R == 1 and not overlap_save:
    return conv_one_launch(ConvArgs(k.unsqueeze(0), u, D, v, q), N, finish)
  if R and not overlap_save: return conv_two_levels(ConvArgs(k, u, D, v, q), N, R, finish)
  def conv(w:Tensor) -> Tensor:
    return conv_overlap_save(w, k, D, N_short) if overlap_save else conv_ref(w, k, D)
  return with_gates(conv, u, v, q, finish)

def check_shapes(u:Tensor, k:Tensor, D:Tensor|None, v:Tensor|None, q:Tensor|None,
                 channels_last:bool) -> None:
  H = u.shape[2 if channels_last else 1] if u.ndim == 3 else 0
  fits = u.ndim == 3 and k.ndim == 2 and k.shape[0] in (1, H)
  fits = fits and all(x is None or x.shape == u.shape for x in (v, q))
  if fits and (D is None or D.shape == (H,)): return
  got = (f"{n} {x.shape}" for n, x in zip("uvqkD", (u, v, q, k, D)) if x is not None)
  raise ValueError("fftconv: u, v, q are (B,H,L), or (B,L,H) with channels_last, k (H,K) or (1,K), "
                   f"D (H,); got {', '.join(got)}")

def whole(*tensors:Tensor|None) -> bool:
  "Whether no Tensor is sharded over several devices: a kernel takes what one device holds."
  return all(t is None or isinstance(t.device, str) or (t.device is not None and t.uop.axis is None)
             for t in tensors)

def kernels_serve(*tensors:Tensor|None) -> bool:
  "Whether the kernels can take these Tensors: FLASH is on, all are `whole` and float32 or HALF."
  known = all(t is None or t.dtype in (dtypes.float, *HALF) for t in tensors)
  return bool(FLASH) and whole(*tensors) and known

MAX_N = 1 << 16                 # FFT length on a CPU: 2 MB of stack in the backward pass
SHORT = 1 << 12                 # length of a short filter's transform on a long sequence
ONE_CORE = 1 << 20              # operations, roughly: up to so many one core is as fast as two

def transform_length(device:str|tuple, least:int) -> int:
  """The length of the kernels' transform, at least so long: a power of two, or on a CPU three
  quarters of one.

  At L = 65 to 96 and at 9,000 to 12,288 three quarters save a quarter of the time. But 96 = 8*12
  takes three times as long as 128. Five eighths of a power of two, with a last pass of radix 5 or
  10, are slower than the next of these lengths. On GPUs three quarters are not measured.
  """
  N = fft_length(least, 1)
  return N*3//4 if N*3//4 >= max(least, 192) and not machine(device).gpu else N

def levels(device:str|tuple, N:int) -> int:
  """How a transform of length N runs: 1: in one launch; R > 1: in two levels, as R transforms of
  length N/R; 0: in plain ops. The device's limits decide, never its name."""
  m = machine(device)
  if not m.gpu: return int(N <= MAX_N)
  return next((R for R in (1, 2, 4, 8, 16) if 8*N <= R*m.shared), 0)  # a complex number is 8 bytes

# ---------------------------------------------------------------- the convolution in one launch
class ConvArgs(NamedTuple):
  """The arguments of a convolution, or their gradients, as Tensors or as a kernel's buffers; those
  left out are None. k is (1,H,K) or (1,1,K), or (1,H,2,N) where the layout is `ComplexRows`; its
  gradient has a row for each of the work groups that share a channel."""
  k: Tensor|UOp|None = None
  u: Tensor|UOp|None = None
  D: Tensor|UOp|None = None
  v: Tensor|UOp|None = None
  q: Tensor|UOp|None = None

# Work groups share the sequences of a channel where one a channel would have fewer threads in all.
# Each computes the filter's spectrum anew. Microseconds on an H200, forward / with gradients, B=8,
# H=256, in 1, 2 and 4 work groups a channel:
#   L=256    16,384 threads with one    5.6/8.6   4.8/7.3   4.7/8.0
#   L=1024   32,768                     15.4/39   17.5/43   19.9/49
ENOUGH_THREADS = 1 << 15

def group_shape(m:Machine, H:int, N:int, count:int) -> tuple[int, int]:
  """The threads of a GPU's work group, and how many groups share the `count` sequences of each of H
  channels: a divisor of count."""
  threads = min(N//RADIX, 256)
  if not m.gpu: return threads, 1
  divisors = [n for n in range(1, count + 1) if count % n == 0]
  shares = next((n for n in divisors if n*H*threads >= ENOUGH_THREADS), count)
  # two butterflies a thread: the kernels of forward and backward take 154 and 311 µs, with one 168
  # and 379 (H200, B=32, H=768, L=1024); shorter transforms were not measured, N = 4096 has two
  if N == 2048 and shares*H*threads//2 >= ENOUGH_THREADS: threads //= 2
  return threads, shares

class ConvSpec(NamedTuple):
  "Constants that a kernel of the convolution is compiled for, beside the shapes of its buffers."
  names: tuple[str, ...]        # the fields of ConvArgs that are not None, in order
  machine: Machine
  finish: Finish
  layout: type                  # how sequences lie in memory: RowPairs, SingleRows or ComplexRows
  threads: int                  # of a GPU's work group
  shares: int                   # work groups that share the sequences of a channel
  @property
  def gradients(self) -> tuple[str, ...]:
    "The arguments whose gradients the backward kernel writes: dD is dk at lag 0."
    return tuple(n for n in self.names if n != "D")
  def buffer_shape(self, shape:Shape, M:int) -> Shape:
    "The shape of a buffer to store to. A CPU's columns end where the rows end: `Group.borders`."
    return self.layout.buffer_shape(shape, M if self.machine.gpu else 1)
  def sequences(self, group:Group, shape:Shape) -> tuple[UOp, RowPairs|ComplexRows]:
    "A loop over the sequences that are this work group's, and where the one of a turn lies."
    turns = self.layout.count(shape)//self.shares
    n = group.loop(turns, AxisType.REDUCE)
    return n, self.layout(group, shape, group.share*turns + n)
  @property
  def buffers(self) -> int:
    "The number of buffers of the backward kernel, which has the most."
    return len(self.gradients) + 2 + len(self.names)

def named(names:Sequence[str], buffers:Sequence[Tensor|UOp]) -> ConvArgs:
  return ConvArgs(**dict(zip(names, buffers)))

def conv_one_launch(args:ConvArgs, N:int, finish:Finish=Finish(False), layout:type|None=None
                    ) -> Tensor:
  "y, for sequences that lie in memory as `layout` says, by default as rows (B,H,L)."
  names = tuple(n for n, x in args._asdict().items() if x is not None)
  shape, m = args.u.shape, machine(args.k.device)
  if shape[0]*shape[1]*N*4 < ONE_CORE: m = m._replace(cores=1)
  layout = layout or rows_layout()
  spec = ConvSpec(names, m, finish, layout, *group_shape(m, shape[1], N, layout.count(shape)))
  gates = args.v, args.q
  if any(x is not None for x in gates) and spec.buffers > m.buffers:       # with plain products
    def conv(w:Tensor) -> Tensor: return conv_one_launch(ConvArgs(args.k, w, args.D), N)
    return with_gates(conv, args.u, *gates, finish)
  roots = roots_of_unity(RADIX, N//RADIX, args.k.device)
  y, = launch(bound(conv_kernel, spec=spec), [spec.buffer_shape(shape, N//RADIX)],
              [roots, *(x for x in args if x is not None)], bound(conv_backward, spec=spec),
              [args.u.dtype])
  return spec.layout.trimmed(y, shape)

def conv_backward(dy:Tensor, y:Tensor, roots:Tensor, *args:Tensor, spec:ConvSpec
                  ) -> tuple[Tensor|None, ...]:
  "The gradients of `conv_one_launch`'s inputs: None for the roots, which are constants."
  x, layout, M = named(spec.names, args), spec.layout, roots.shape[2]
  # dk has a row for each channel and work group: they are summed below
  sums = spec.shares, x.u.shape[1], *x.k.shape[2:]
  shapes = [sums if n == "k" else x.u.shape for n in spec.gradients]
  buffers = [spec.buffer_shape(s, M) for s in shapes]
  outputs = launch(bound(conv_gradient_kernel, spec=spec), buffers,
                   [roots, layout.trimmed(dy, x.u.shape), *args], no_second_gradient("fftconv"),
                   [getattr(x, n).dtype for n in spec.gradients])
  d = named(spec.gradients, map(layout.trimmed, outputs, shapes))
  dk = d.k.sum(0, keepdim=True)
  d = d._replace(k=dk.sum(1, keepdim=True) if x.k.shape[1] == 1 else dk, D=dk[0, :, 0])
  return None, *(getattr(d, n) for n in spec.names)

# How a kernel is written. It is a function from UOps, its buffers, to one UOp, the sink, that holds
# all its stores. UOps are values without an order; what must come first is said in the graph:
#   mem[i], mem[i].store(x)  a load and a store
#   mem.after(done, i)       mem, to be used when the stores `done` have been made, in the loop i.
#                            A GPU's threads wait for each other here, if mem is shared memory that
#                            they have written since: tinygrad puts the barrier
#   i = UOp.range(n, id)     a loop: all that depends on i, by value or by `after`, is inside it
#   stores.end(i)            the loop ends behind these stores: after(stores.end(i)) is outside
#   UOp.group(*stores)       all of these stores
#   group.barrier()          an explicit barrier, needed where threads write what others may still
#                            be *reading*: tinygrad puts one only where they read what was written,
#                            and at the end of a loop
#   UOp.special(n, "lidx0")  the number of a GPU's thread; "gidx0" that of its work group
# So each stage below uses `mem.after(*done)`, and leaves in `done` what the next has to wait for.
# A loop that holds stages is an AxisType.REDUCE: of a LOOP that ends in stores to global memory
# tinygrad would make a grid axis.

@functools.cache
def conv_kernel(y:UOp, roots:UOp, *args:UOp, spec:ConvSpec) -> UOp:
  "y = finish.y(c, q) with c = F* (kf · F w), for one channel: its filter, then its sequences."
  x = named(spec.names, args)
  buf, kf = filter_spectrum(x, roots, spec)
  n, rows = spec.sequences(buf.group, x.u.shape)
  buf.forward(lambda j, off: rows.load(j, off, x.u, x.v), n)                       # W = F w
  buf.spectrum(lambda at, W: (times(W, kf.get(at)), []))                           # C = kf · W
  def store(j:UOp, off:int, c:Pair) -> Stores:                                  # c = F* C
    return rows.store(j, off, y, each_row(spec.finish.y, c, rows.load(j, off, x.q)))
  buf.inverse(store)
  return buf.group.finish(buf.done[0].end(n), spec.layout.name)        # here the loop over n ends

@functools.cache
def conv_gradient_kernel(*buffers:UOp, spec:ConvSpec) -> UOp:
  """dk, du, dv, dq of `conv_kernel`, from its inputs alone: kf, W = F w and c are computed anew.

  With e = dy ∂y/∂c (e = q dy), E = F e, and kf* the conjugate of kf, over the sequences n:
    dw = F* (kf* · E)          the correlation of e with the filter;  du = v dw, dv = u dw
    dk = Re F⁻¹ Σ_n W* · E     the correlation of w with e, at the lags of the taps
  Why Re: a sequence is two packed rows, w = w₀ + i w₁ and e = e₀ + i e₁. F⁻¹ (W* · E) correlates
  w₀ - i w₁ with e₀ + i e₁, whose real part is w₀ ⋆ e₀ + w₁ ⋆ e₁, the sum over both rows. So one
  inverse transform, after the last sequence, gives dk. dD is its tap at lag 0.
  """
  count = len(spec.gradients)
  d, (roots, dy) = named(spec.gradients, buffers), buffers[count:count+2]
  x = named(spec.names, buffers[count+2:])
  buf, kf = filter_spectrum(x, roots, spec)
  g = buf.group
  W, dkf = Spectrum(g, 2), Spectrum(g, 3)
  dkf.clear()
  n, rows = spec.sequences(g, x.u.shape)

  def apply(f:Callable, j:UOp, off:int, c:Pair=(None, None)) -> Pair:
    return each_row(f, rows.load(j, off, dy), c, rows.load(j, off, x.q))
  def store_dq(j:UOp, off:int, c:Pair) -> Stores:
    return [] if x.q is None else rows.store(j, off, d.q, apply(spec.finish.dq, j, off, c))
  def e_and_dq(j:UOp, off:int, c:Pair) -> tuple[Pair, Stores]:
    return apply(spec.finish.dc, j, off, c), store_dq(j, off, c)
  buf.forward(lambda j, off: rows.load(j, off, x.u, x.v), n)                       # W = F w
  if spec.finish.needs_c:
    buf.spectrum(lambda at, X: (times(kf.get(at), X), W.put(at, X, n)))            # C = kf · W
    W.done = buf.done
    buf.inverse_and_forward(e_and_dq)                                  # c = F* C, E = F e
  else:
    buf.spectrum(lambda at, X: (None, W.put(at, X, n)))
    W.done = buf.done
    buf.free()
    buf.forward(lambda j, off: apply(spec.finish.dc, j, off))                      # E = F e

  def add(at:tuple, E:list[Pair]) -> tuple[list[Pair], list[UOp]]:
    terms = times(map(conj, W.get(at)), E)
    sums = [tuple(map(operator.add, s, t)) for s, t in zip(dkf.get(at, n), terms)]
    return times(map(conj, kf.get(at)), E), dkf.put(at, sums, n)       # kf* · E;  Σ_n W* · E
  buf.spectrum(add)
  def store(j:UOp, off:int, dw:Pair) -> Stores:
    if x.v is None: return rows.store(j, off, d.u, dw)
    du, dv = (tuple(map(operator.mul, dw, rows.load(j, off, factor))) for factor in (x.v, x.u))
    return rows.store(j, off, d.u, du) + rows.store(j, off, d.v, dv)
  buf.inverse(store)                                                             # dw = F* (kf* · E)
  if x.q is not None and not spec.finish.needs_c:
    buf.free()
    buf.spectrum(lambda at, _: (times(kf.get(at), W.get(at)), []), back_only=True) # C = kf · W
    buf.inverse(store_dq)                                                          # c = F* C
  buf.free()
  buf.done = dkf.done = buf.done[0].end(n),                            # here the loop over n ends
  filters = spec.layout(g, x.k.shape, g.share)             # a single row of RowPairs: re is stored
  buf.spectrum(lambda at, _: ([scaled(a, 1/g.N) for a in dkf.get(at)], []), back_only=True)
  buf.inverse(lambda j, off, dk: filters.store(j, off, d.k, dk))                   # dk = F* (dkf/N)
  return g.finish(buf.done[0], f"{spec.layout.name}_grad")

def filter_spectrum(x:ConvArgs, roots:UOp, spec:ConvSpec) -> tuple[FFTBuffer, Spectrum]:
  "The FFT buffer, free for use, and kf = F(k + D δ)/N, which stays in private memory."
  N, lengths = RADIX*roots.shape[2], (x.u.shape[-1], x.k.shape[-1])
  g = Group(spec.machine, x.u.shape[1], N, spec.threads, lengths, spec.shares)
  buf, kf, filters = FFTBuffer(g, roots), Spectrum(g, 1), spec.layout(g, x.k.shape, 0)
  def load(j:UOp, off:int) -> Pair:
    re, im = filters.load(j, off, x.k)
    if x.D is None or off > 0: return re, im
    return re + Real(j.eq(0).where(x.D[g.h], 0.0)), im                 # D adds to the tap at lag 0
  buf.forward(load)
  buf.spectrum(lambda at, X: (None, kf.put(at, [scaled(a, 1/g.N) for a in X])))
  kf.done = buf.done
  buf.free()
  return buf, kf

def times(a:Sequence[Pair], b:Sequence[Pair]) -> list[Pair]: return list(map(cmul, a, b))
def scaled(z:Pair, c:float) -> Pair: return z[0]*c, z[1]*c

def each_row(f:Callable, *pairs:Pair) -> Pair:
  "f, a function of UOps (or None), of each of two packed rows; ZERO where the first argument is."
  def row(x:Real, *others:Real|None) -> Real:
    if not x.sign: return ZERO
    return Real(f(x.uop, *(None if o is None else o.uop for o in others)))
  return tuple(map(row, *pairs))

# ---------------------------------------------------------------- how sequences lie in memory
class RowPairs:
  """Rows 2n and 2n+1 of a batch as one complex sequence, `shape` being (B,H,L).

  The filter is real, so the two results come out as re and im. Both are rounded as coarsely as the
  larger one, and an infinity in one reaches the other: see `SingleRows`. Reads past the end of a
  row, and of the row that an odd batch lacks, give 0.
  """
  name = "fftconv"
  def __init__(self, group:Group, shape:Shape, n:UOp|int):
    (B, _, self.L), self.group = shape, group
    self.rows = [2*n, 2*n + 1] if B > self.count(shape) else [n]
    self.loaded = [(b, None) for b in self.rows]             # a row, and what it is multiplied by
    # An odd batch lacks its last row: the one before it is loaded, times 0. To load nothing, under
    # a condition, would keep clang from making vectors: 1.5 to 2.5 times as slow
    if B % 2 and len(self.rows) > 1:
      b = self.rows[1]
      self.loaded[1] = b.minimum(B - 1), (b < B).cast(dtypes.float)
  @staticmethod
  def count(shape:Shape) -> int: return -(-shape[0]//2)
  @staticmethod
  def buffer_shape(shape:Shape, M:int) -> Shape:
    """The shape of a buffer to store to: whole pairs of rows, and whole columns of the first pass,
    so that no store has a condition. tinygrad 0.14.0 can lose one that leaves a single place."""
    B, H, L = shape
    return B + (B % 2 if B > 1 else 0), H, -(-L//M)*M
  @staticmethod
  def trimmed(y:Tensor, shape:Shape) -> Tensor: return y[:shape[0], :, :shape[2]]
  def load(self, j:UOp, off:int, *factors:UOp|None) -> Pair:
    """The product of the factors at j + off, j < M, in both rows; without factors (None, None).

    off, and the least and the most of j, are known when the kernel is made: past the end of a row
    nothing is loaded, and the butterflies leave out the arithmetic on these zeros.
    """
    factors = [f for f in factors if f is not None]
    if not factors: return None, None
    at = j + off
    if at.vmin >= self.L: return ZERO, ZERO
    inside = at < self.L if at.vmax >= self.L else None
    if inside is not None: at = at.valid(inside)
    channels = [0 if f.shape[1] == 1 else self.group.h for f in factors]
    pair = []
    for b, there in self.loaded:
      x = product(*(f[b, h, at].cast(dtypes.float) for f, h in zip(factors, channels)))
      if there is not None: x = x * there
      pair.append(Real(x if inside is None else inside.where(x, 0.0)))
    return *pair, *[ZERO]*(2 - len(pair))
  def store(self, j:UOp, off:int, out:UOp, z:Pair) -> Stores:
    at = j + off
    if at.vmin >= self.L: return []
    places = [out[b, self.group.h, at] for b in self.rows]
    return [place.store(x.uop.cast(place.dtype)) for place, x in zip(places, z)]

class SingleRows(RowPairs):
  "Row n of a batch as a complex sequence, its imaginary part 0, for BATCH_INVARIANT."
  name = "fftconv_single"
  @staticmethod
  def count(shape:Shape) -> int: return shape[0]

def rows_layout() -> type[RowPairs]: return SingleRows if BATCH_INVARIANT else RowPairs

class ComplexRows:
  "Complex sequences, (P,H,2,N), between the launches of a two-level transform."
  name = "fftconv_complex"
  def __init__(self, group:Group, shape:Shape, n:UOp|int): self.group, self.n = group, n
  @staticmethod
  def count(shape:Shape) -> int: return shape[0]
  @staticmethod
  def buffer_shape(shape:Shape, M:int) -> Shape: return shape
  @staticmethod
  def trimmed(y:Tensor, shape:Shape) -> Tensor: return y
  def load(self, j:UOp, off:int, x:UOp|None, gate:None=None) -> Pair:
    if x is None: return None, None
    return tuple(Real(x[self.n, self.group.h, c, j + off]) for c in range(2))
  def store(self, j:UOp, off:int, out:UOp, z:Pair) -> Stores:
    return [out[self.n, self.group.h, c, j + off].store(z[c].uop) for c in range(2)]

def product(*factors:UOp) -> UOp: return functools.reduce(operator.mul, factors)

# ---------------------------------------------------------------- the block FFT
class FFTBuffer:
  """N complex numbers in a GPU's shared memory or on a core's stack, and the FFT's passes in place.

  Forward passes decimate in frequency (natural order in, digit-reversed out), inverse passes in
  time (digit-reversed in, natural out). Spectra stay digit-reversed: nothing is ever reordered. A
  butterfly writes where it has read and nowhere else, so that one barrier a pass is enough. `done`
  holds the stores that must be made before the next pass reads.
  """
  def __init__(self, group:Group, roots:UOp):
    self.group, self.roots, self.done = group, roots, group.outer
    gpu, M = group.m.gpu, group.M
    # LOCAL on a CPU puts a fence at every loop's end, and nothing is vectorised: 6x slower
    space = AddrSpace.LOCAL if gpu else AddrSpace.REG
    # a row left free on a CPU, so that the stores to 8 sub-transforms come out in order: clang
    # makes one shuffled store of them, not 8 scattered ones; a twentieth faster
    self.first = 0 if gpu else 1
    # on a GPU a float is left free behind every four rows of 8, where it fits: without it a warp's
    # stores of a column, 8 floats apart, meet on 4 of the 32 banks of shared memory
    self.pad = int(8*(group.N + M//4) <= group.m.shared)
    shape = (2, group.N + self.pad*(M//4)) if gpu else (2, M + self.first, RADIX)
    self.mem = UOp.placeholder(shape, dtypes.float, slot=0, addrspace=space)
  def places(self, mem:UOp, i:UOp, step:int, sub:UOp|int) -> list[UOp]:
    "Where re and im of number i + step of a sub-transform stand."
    if not self.group.m.gpu: return [mem[c, i + step + self.first, sub] for c in range(2)]
    row = i + step
    at = RADIX*row + (row//4)*self.pad + sub
    return [mem[c, at] for c in range(2)]
  def get(self, *place) -> Pair: return tuple(map(Real, self.places(*place)))
  def put(self, *place, z:Pair) -> Stores:
    return [place.store(x.uop) for place, x in zip(self.places(*place), z)]
  def free(self):
    "Waits until all have read, so that the buffer can be overwritten: a barrier on a GPU."
    if self.group.m.gpu: self.done = UOp.group(*self.done).barrier(),

  def forward(self, load:Callable[[UOp, int], Pair], *after:UOp):
    "All passes but the last of X = F x, with x at j + off from load(j, off)."
    g, mem = self.group, self.mem.after(*self.done, *after)
    def first(j:UOp) -> Stores: return self.split(mem, j, [load(j, r*g.M) for r in range(RADIX)])
    self.done = g.columns(first),
    self.inner_forward()
  def inverse(self, store:Body):
    "All passes but the first of y = F* Y; y at j + off goes to store(j, off, y)."
    self.inner_inverse()
    g, mem = self.group, self.mem.after(*self.done)
    def last(j:UOp) -> Stores:
      return [s for r, y in enumerate(self.join(mem, j)) for s in store(j, r*g.M, y)]
    self.done = g.columns(last),
  def inverse_and_forward(self, body:Callable):
    "`inverse`, then `forward` of what body(j, off, y) -> (x, stores) makes of the inverse's y."
    self.inner_inverse()
    g, mem = self.group, self.mem.after(*self.done)
    def last_and_first(j:UOp) -> Stores:
      x, stores = zip(*(body(j, r*g.M, y) for r, y in enumerate(self.join(mem, j))))
      return [*itertools.chain(*stores), *self.split(mem, j, x)]
    self.done = g.columns(last_and_first),
    self.inner_forward()
  def spectrum(self, body:Callable, back_only:bool=False):
    """The last pass of X = F x, body(at, X) -> (Y, stores), and the first pass of y = F* Y.

    `at` is where a `Spectrum` keeps this butterfly's numbers. If Y is None, nothing is written
    back; with back_only nothing is read, and X is None.
    """
    g, R, mem = self.group, self.group.R, self.mem.after(*self.done)
    def last(slot:int|UOp, t:UOp, sub:UOp) -> Stores:
      X = None if back_only else dft([self.get(mem, t*R, r, sub) for r in range(R)], -1)
      Y, stores = body((slot, sub), X)
      y = dft(Y, +1) if Y else []
      return stores + [s for r in range(len(y)) for s in self.put(mem, t*R, r, sub, z=y[r])]
    # 32 rows with their `pad` end 8 banks further: a warp, four butterflies of each of 8
    # sub-transforms, meets on no bank
    apart = max(1, min(32, g.M//4)//R)
    self.done = g.subtransforms(g.M//R, last, apart),

  def split(self, mem:UOp, j:UOp, x:Sequence[Pair]) -> Stores:
    "The first pass forward, which makes 8 sub-transforms of one transform."
    x = twiddle(self.roots, dft(x, -1), j, -1)                                     # x = T · (F₈ x)
    return [s for r in range(RADIX) for s in self.put(mem, j, 0, r, z=x[r])]
  def join(self, mem:UOp, j:UOp) -> list[Pair]:
    "The last pass back."
    x = [self.get(mem, j, 0, r) for r in range(RADIX)]
    return dft(twiddle(self.roots, x, j, +1), +1)                                 # x = F₈* (T* · x)
  def inner_forward(self):
    for n in self.group.passes:
      self.inner(n, lambda x, j: twiddle(self.roots, dft(x, -1), j, -1))          # x = T · (F₈ x)
  def inner_inverse(self):
    for n in reversed(self.group.passes):
      self.inner(n, lambda x, j: dft(twiddle(self.roots, x, j, +1), +1))         # x = F₈* (T* · x)
  def inner(self, n:int, butterfly:Callable):
    """A radix-8 pass over pieces of length n in each sub-transform.

    Its roots exp(-2πi rj/n) are those of the first pass, exp(-2πi rj'/N), at j' = j N/n: one
    table, strided, serves all passes.
    """
    g, S, mem = self.group, n//RADIX, self.mem.after(*self.done)
    def body(slot:int|UOp, t:UOp, sub:UOp) -> Stores:
      j, first = t % S, t//S*n + t % S
      x = butterfly([self.get(mem, first, r*S, sub) for r in range(RADIX)], j*(g.M//n*RADIX))
      return [s for r in range(RADIX) for s in self.put(mem, first, r*S, sub, z=x[r])]
    self.done = g.subtransforms(g.M//RADIX, body),

class Spectrum:
  """A spectrum in private memory: each worker keeps the results of its own last butterflies.

  `at`: (slot, sub), the butterfly's number among the worker's own, and its sub-transform.
  """
  def __init__(self, group:Group, slot:int):
    self.group, self.done = group, group.outer
    shape = (2, group.N//group.threads, 1) if group.m.gpu else (2, group.M, RADIX)
    self.mem = UOp.placeholder(shape, dtypes.float, slot=slot, addrspace=AddrSpace.REG)
  def places(self, at:tuple, *after:UOp) -> list[tuple[UOp, UOp]]:
    (slot, sub), R, mem = at, self.group.R, self.mem.after(*self.done, *after)
    if self.group.m.gpu: sub = 0
    return [(mem[0, slot*R + r, sub], mem[1, slot*R + r, sub]) for r in range(R)]
  def get(self, at:tuple, *after:UOp) -> list[Pair]:
    return [(Real(re), Real(im)) for re, im in self.places(at, *after)]
  def put(self, at:tuple, X:list[Pair], *after:UOp) -> Stores:
    return [place.store(x.uop) for z, places in zip(X, self.places(at, *after))
            for place, x in zip(places, z)]
  def clear(self):
    g, zeros = self.group, [(ZERO, ZERO)]*self.group.R
    self.done = g.subtransforms(g.M//g.R, lambda slot, t, sub: self.put((slot, sub), zeros)),

class Workers:
  """The workers on one channel, h: the threads of a work group (GPU), or one iteration of the
  outermost loop (CPU), whose iterations the cores share. `done` holds what must be finished before
  the next stage."""
  def __init__(self, m:Machine, H:int, twice:bool=False):
    "twice: whether a channel may be done again, as the kernel overwrites nothing that it reads."
    self.m, self.ids, self.outer = m, itertools.count(), ()
    if m.gpu: self.h = UOp.special(H, "gidx0")
    else:
      most = min(H, m.cores) if twice else divisor(H, m.cores)
      each = -(-H // most)                           # channels of a core; the last one may have fewer,
      cores = -(-H // each)                          # and does its last one again, to the same result
      core = self.loop(cores, AxisType.THREAD if cores > 1 else AxisType.LOOP)
      # the mask tells clang the range: without it indices may wrap, and loops were left scalar
      me = core & ((1 << (cores-1).bit_length()) - 1)
      i = self.loop(each)
      self.h, self.outer = me*each + i, (i, core)
      if each*cores > H: self.h = self.h.minimum(H - 1)
    self.done = self.outer
  def loop(self, n:int|UOp, axis:AxisType=AxisType.LOOP) -> UOp:
    return UOp.range(n, next(self.ids), axis)
  @contextlib.contextmanager
  def over(self, n:int|UOp, barrier:bool=True):
    """A loop around the stages of a `with` block. What one turn has read the next one may
    overwrite: that takes a barrier of its own on a GPU, unless each worker has places of its
    own."""
    i = self.loop(n, AxisType.REDUCE)
    self.done = *self.done, i
    yield i
    done = self.all_done()
    if self.m.gpu and barrier: done = done.barrier()
    self.done = done.end(i),
  def all_done(self) -> UOp:
    return UOp.group(*(x for x in self.done if x.op is not Ops.RANGE))
  def memory(self, *shape:int, shared:bool=False, dtype:DType=dtypes.float) -> UOp:
    "Numbers: a worker's own, in registers or on its stack, or in a GPU's shared memory."
    space = AddrSpace.LOCAL if self.m.gpu and shared else AddrSpace.REG
    return UOp.placeholder(shape, dtype, slot=next(self.ids), addrspace=space)
  def finish(self, name:str, **info) -> UOp:
    "The sink: here the loops over channels and cores end."
    info = KernelInfo(name=name, opts_to_apply=(), **info)
    sink = self.all_done().end(*self.outer).sink(arg=info)
    if not self.m.has_sub: sink = graph_rewrite(sink, without_sub)
    # A tag keeps a kernel from tinygrad's optimiser. On a CPU that would change nothing and take a
    # sixth of the time until it is compiled; on a GPU it splits loops of `mma_gemm`, for the better
    return sink if self.m.gpu else sink.replace(tag=1)

def divisor(n:int, most:int) -> int:
  "The largest divisor of n that is at most `most`."
  return next(d for d in range(most, 0, -1) if n % d == 0)

without_sub = PatternMatcher([
  (UPat(Ops.SUB, src=(UPat.var("a"), UPat.var("b"))), lambda a, b: a + b*-1)])

class Group(Workers):
  """The workers on the transforms of one channel.

  N = 8 M: the first pass splits a transform into 8 sub-transforms of length M, which go on side by
  side, as the entries of a vector register (CPU) or in neighbouring threads (GPU).
  """
  def __init__(self, m:Machine, H:int, N:int, threads:int, lengths:Sequence[int]=(), shares:int=1):
    super().__init__(m, H, twice=True)
    self.share = UOp.special(shares, "gidx1") if shares > 1 else 0
    self.N, self.M = N, N//RADIX
    # where rows of these lengths end within a block of M
    self.borders = sorted({0, self.M, *(L % self.M for L in lengths)})
    self.threads = threads
    self.passes, n = [], self.M      # lengths of the pieces in the radix-8 passes
    while n > 12:
      self.passes.append(n)
      n //= RADIX
    self.R = n                       # radix of the last pass: 2, 3, 4, 6, 8 or 12
    if m.gpu:
      # two dimensions: neighbours in the first one read neighbours, and no division hides it
      self.sub, self.row = UOp.special(RADIX, "lidx0"), UOp.special(self.threads//RADIX, "lidx1")
      self.thread = self.row*RADIX + self.sub
  def columns(self, body:Body) -> UOp:
    """body(j) for j < M: column j has a number of each sub-transform; clang makes vectors along j.

    On a CPU one loop for each part of the columns between two `borders`: there every j + off is
    inside a row, or every one is past its end, and no load and no store needs a condition.
    """
    if not self.m.gpu:
      loops = []
      for first, end in itertools.pairwise(self.borders):
        i = self.loop(end - first)
        loops.append(UOp.group(*body(i + first)).end(i))
      return UOp.group(*loops)
    return UOp.group(*[s for t in range(0, self.M, self.threads) for s in body(self.thread + t)])
  def subtransforms(self, n:int, body:Body, apart:int=1) -> UOp:
    """body(slot, t, sub) for t < n in each sub-transform; slot counts a worker's own.

    apart: on a GPU, the distance between the four numbers t that a warp of 32 threads works on.
    """
    if not self.m.gpu:
      t, sub = self.loop(n), self.loop(RADIX)
      return UOp.group(*body(t, t, sub)).end(sub, t)
    stores, rows = [], self.threads//RADIX
    for slot, first in enumerate(range(0, n, rows)):
      t = self.row + first
      t = t % 4*apart + t//4 % apart + t//(4*apart)*(4*apart)
      stores += body(slot, t, self.sub)
    return UOp.group(*stores)
  def everywhere(self, P:int, body:Body) -> UOp:
    "body(n, j) for n < P, j < M: columns that don't meet in shared memory."
    if not self.m.gpu:
      n, j = self.loop(P), self.loop(self.M)
      return UOp.group(*body(n, j)).end(j, n)
    n, t = UOp.special(P, "gidx1"), UOp.special(self.M//self.threads, "gidx2")
    return UOp.group(*body(n, t*self.threads + self.thread))
  def finish(self, done:UOp, name:str) -> UOp:
    self.done = done,
    return super().finish(f"{name}_{self.N}")

class Real:
  """±x or 0, a float in a register; `uop` is its value.

  Signs and zeros are handled here because tinygrad writes a - b as a + (-1)·b and multiplies sums
  out, which made the butterflies a third longer. x itself is hidden, as it lacks its sign.
  """
  def __init__(self, x:UOp|None, sign:int=1): self.__x, self.sign = x, sign
  def __neg__(a) -> Real: return Real(a.__x, -a.sign)
  def __add__(a, b:Real) -> Real:
    if not a.sign or not b.sign: return a if a.sign else b
    if a.sign == b.sign: return Real(a.__x + b.__x, a.sign)
    plus, minus = (a, b) if a.sign > 0 else (b, a)
    return Real(plus.__x.alu(Ops.SUB, minus.__x))
  def __sub__(a, b:Real) -> Real: return a + -b
  def __mul__(a, b:Real|float) -> Real:
    if not isinstance(b, Real): b = Real(abs(b), 1 if b > 0 else -1)
    sign = a.sign*b.sign
    return Real(a.__x*b.__x, sign) if sign else ZERO
  @property
  def uop(a) -> UOp:
    return a.__x if a.sign > 0 else a.__x*-1 if a.sign < 0 else UOp.const(0.0, dtypes.float)

ZERO = Real(None, 0)

def rotate(x:Pair, w:complex) -> Pair:
  "x·w for a constant w of modulus 1, with the fewest products."
  (a, b), c, s = x, round(w.real, 15), round(w.imag, 15)
  if s == 0: return x if c == 1 else (-a, -b)
  if c == 0: return (-b, a) if s > 0 else (b, -a)
  if c == s: return (a-b)*c, (a+b)*c
  if c == -s: return (a+b)*c, (b-a)*c
  return cmul(x, (c, s))

def dft(x:Sequence[Pair], sign:int) -> list[Pair]:
  "X[k] = Σ_n x[n] exp(sign 2πi nk/R) of R = 2^m or 3·2^m values in registers, written out."
  if (R := len(x)) == 1: return list(x)
  if R == 3: return dft_of_three(x, sign)
  even, odd = dft(x[0::2], sign), dft(x[1::2], sign)
  odd = [rotate(o, cmath.exp(sign*2j*cmath.pi*i/R)) for i, o in enumerate(odd)]
  return [tuple(f(a, b) for a, b in zip(e, o))
          for f in (operator.add, operator.sub) for e, o in zip(even, odd)]

def dft_of_three(x:Sequence[Pair], sign:int) -> list[Pair]:
  "X[0] = x[0] + s, and X[1], X[2] = x[0] - s/2 ± sign i sin(2π/3) d, s and d being x[1] ± x[2]."
  def add(a:Pair, b:Pair) -> Pair: return tuple(map(operator.add, a, b))
  def subtract(a:Pair, b:Pair) -> Pair: return tuple(map(operator.sub, a, b))
  s, d = add(x[1], x[2]), subtract(x[1], x[2])
  middle = add(x[0], scaled(s, -0.5))
  turned = rotate(scaled(d, 0.75**0.5), sign*1j)
  return [add(x[0], s), add(middle, turned), subtract(middle, turned)]

def twiddle(roots:UOp, x:list[Pair], j:UOp, sign:int) -> list[Pair]:
  "T · x, or T* · x for sign +1: x[r] exp(sign 2πi jr/N), with `roots_of_unity` (2,R,N/R)."
  def root(r:int) -> Pair: return Real(roots[0, r, j]), Real(roots[1, r, j], -sign)
  return [z if r == 0 else cmul(z, root(r)) for r, z in enumerate(x)]

@functools.cache
def roots_of_unity(R:int, S:int, device:str) -> Tensor:
  "exp(-2πi rj/(R S)), r < R, j < S: (2,R,S)"
  w = np.exp(-2j*np.pi/(R*S) * np.outer(np.arange(R), np.arange(S)))
  return to_device(np.stack([w.real, w.imag]), device, np.float32)

# The radix, measured: forward / with gradients, ms, and seconds until both are compiled and
# captured, the three in turns on a busy machine (only ratios count); B=8, H=256 (CPU: two cores
# of a Xeon, clang 14), H=64 (PoCL, the same machine):
#   radix   CPU L=256        L=1024          L=4096          OpenCL L=256     L=1024
#     4     1.1 /  3.9  5s   6.5 / 33   5s   31 / 131   8s   1.3 / 4.4   6s   8.5 / 21  14s
#     8     0.8 /  2.3  4s   5.2 / 23   5s   29 / 132   7s   0.9 / 2.8   8s   5.3 / 18  12s
#    16     1.1 /  3.4  8s   6.5 / 26   9s   38 / 149  15s   1.0 / 3.7  17s   5.9 / 22  22s
# What goes into a CPU's vectors, one core, forward, L=1024 and 8192: 16 channels of tensors (B,L,H)
# 15 and 449 ms, the 8 sub-transforms of one channel 12 and 113 ms: their memory stays in the L1
# cache. Then `Real` took a third off the arithmetic: 8 ms at L=1024.
RADIX = 8

NO_LIMIT = sys.maxsize

class Machine(NamedTuple):
  "Properties of a device's renderer that the kernels depend on; its name is never asked."
  gpu: bool                          # threads, shared memory and barriers; else loops
  cores: int                         # threads of a CPU that share the outermost loop
  shared: int                        # bytes of shared memory
  has_sub: bool                      # renders a - b
  buffers: int = NO_LIMIT            # that a kernel may have; WebGPU's few are why this is here
  lanes: int = 4                     # floats in a CPU's vector register,
  registers: int = 16                # and how many of those it has
  mma: tuple[DType, ...] = ()        # what tensor cores take that have the instruction mma.m16n8k16

VECTORS: dict[str, int] = {}         # lanes and registers, if support/cpu.py has asked the compiler

@functools.cache
def machine(device:str|tuple[str, ...]) -> Machine:
  return machine_of(opened(device).renderer)

def opened(device:str|tuple[str, ...]) -> Compiled:
  "The device, or of several, which are alike, the first."
  return Device[device if isinstance(device, str) else device[0]]

def machine_of(r:Renderer) -> Machine:
  cores = r.global_max[0] if r.has_threads else 1
  # tinygrad keeps this limit in a table; the device itself is not asked
  buffers = MAX_KERNEL_BUFFERS.value or DEVICE_MAX_BUFS.get(r.target.device, NO_LIMIT)
  mma = tuple(t.dtype_in for t in r.tensor_cores
              if (t.dims, t.threads, t.dtype_out) == ((8, 16, 16), 32, dtypes.float))
  return Machine(r.has_local, cores, r.shared_max, Ops.SUB in r.code_for_op, buffers, mma=mma,
                 **VECTORS)

# -------------------------------------------------------- longer sequences: two levels, and pieces
# A transform of length N = R M that does not fit into shared memory; here M is N/R, not N/8.
# An outer pass of radix R, a launch of its own, splits it into R transforms of length M. Each of
# these convolves as a complex sequence (`ComplexRows`) in a channel of its own, and an inverse
# outer pass joins them. The two passes are each other's adjoint, hence each other's gradient. The
# gates are applied on the way: the product u v is never stored, nor is c.
def conv_two_levels(args:ConvArgs, N:int, R:int, finish:Finish) -> Tensor:
  "y, by R transforms of length N/R; k is (H,K) or (1,K)."
  M, (_, H, _), taps = N//R, args.u.shape, args.k.shape[1]
  k = args.k.expand(H, taps)
  if args.D is not None: k = k + args.D.unsqueeze(-1).pad((0, taps-1))
  layout = rows_layout()
  K = split((k/R).unsqueeze(0), None, R, M, layout)   # one row (1,H,K); the launch divides by M
  W = split(args.u, args.v, R, M, layout)
  C = conv_one_launch(ConvArgs(K, W), M, layout=ComplexRows)
  rows = [] if args.q is None else [args.q]
  backward = bound(join_backward, shape=args.u.shape, finish=finish, layout=layout)
  return outer_pass(C, args.u.shape, R, M, layout, rows, bound(y_of, finish=finish), True,
                    backward, args.u.dtype)

def split(x:Tensor, gate:Tensor|None, R:int, M:int, layout:type[RowPairs]) -> Tensor:
  "Rows (B,H,L), times a gate -> R sub-transforms of them (P,H R,2,M), P = layout.count((B,H,L))."
  rows = [] if gate is None else [gate]
  backward = bound(split_backward, layout=layout)
  return outer_pass(x, x.shape, R, M, layout, rows, product, False, backward)

def split_backward(dX:Tensor, X:Tensor, roots:Tensor, x:Tensor, *gate:Tensor,
                   layout:type[RowPairs]) -> list[Tensor|None]:
  _, R, M = roots.shape
  return [None, *(outer_pass(dX, x.shape, R, M, layout, rows, product, True, dtype=t.dtype)
                  for t, rows in zip((x, *gate), (gate, [x])))]

def join_backward(dy:Tensor, y:Tensor, roots:Tensor, C:Tensor, *q:Tensor, shape:Shape,
                  finish:Finish, layout:type[RowPairs]) -> list[Tensor|None]:
  _, R, M = roots.shape
  dy = layout.trimmed(dy, shape)
  def join(rows:Sequence[Tensor], f:Callable, dtype:DType) -> Tensor:
    return outer_pass(C, shape, R, M, layout, rows, f, True, dtype=dtype)
  c = [join([], product, dtypes.float)] if finish.needs_c else []
  dC = outer_pass(dy, shape, R, M, layout, [*c, *q], bound(dc_of, finish=finish), False)
  used = q if finish.needs_q else ()             # no argument without use: see `walk_backward`
  return [None, dC, *(join([dy, *used], bound(dq_of, finish=finish), x.dtype) for x in q)]

# Functions for `outer_pass`, beside `product`: of a number and those at its step in other rows.
# `dc_of` gets c only where it is used.
def y_of(c:UOp, *q:UOp, finish:Finish) -> UOp: return finish.y(c, *(q or [None]))
def dq_of(c:UOp, dy:UOp, *q:UOp, finish:Finish) -> UOp: return finish.dq(dy, c, *(q or [None]))
def dc_of(dy:UOp, *rows:UOp, finish:Finish) -> UOp:
  rows = iter(rows)
  c = next(rows) if finish.needs_c else None
  return finish.dc(dy, c, next(rows, None))

def outer_pass(x:Tensor, shape:Shape, R:int, M:int, layout:type[RowPairs], rows:Sequence[Tensor],
               f:Callable, inverse:bool, gradient:Callable|str="",
               dtype:DType=dtypes.float) -> Tensor:
  """The R sub-transforms (P,H R,2,M) of f(x, *rows), x and rows being (B,H,L), `shape`.

  inverse: x holds sub-transforms, of rows x'. The result is f(R x', *rows), (B,H,L) of type dtype.
  """
  subtransforms = layout.count(shape), shape[1]*R, 2, M
  output = layout.buffer_shape(shape, M) if inverse else subtransforms
  kernel = bound(outer_kernel, m=machine(x.device), shape=shape, layout=layout, inverse=inverse,
                 of=f)
  gradient = gradient or no_second_gradient("fftconv")
  y, = launch(kernel, [output], [roots_of_unity(R, M, x.device), x, *rows], gradient, [dtype])
  return layout.trimmed(y, shape) if inverse else y

@functools.cache
def outer_kernel(out:UOp, roots:UOp, x:UOp, *others:UOp, m:Machine, shape:Shape,
                 layout:type[RowPairs], inverse:bool, of:Callable) -> UOp:
  _, R, M = roots.shape
  g = Group(m, shape[1], RADIX*M, min(M, 256))
  def column(X:UOp, n:UOp, r:int, j:UOp) -> list[UOp]:
    "Number j of sub-transform r: re, im."
    return [X[n, g.h*R + r, c, j] for c in range(2)]
  def split(n:UOp, j:UOp) -> Stores:
    rows = layout(g, shape, n)
    z = [each_row(of, *(rows.load(j, r*M, a) for a in (x, *others))) for r in range(R)]
    z = twiddle(roots, dft(z, -1), j, -1)                                            # T · (F_R x)
    stores = []
    for r in range(R):
      stores += [place.store(part.uop) for place, part in zip(column(out, n, r, j), z[r])]
    return stores
  def join(n:UOp, j:UOp) -> Stores:
    rows = layout(g, shape, n)
    z = [tuple(map(Real, column(x, n, r, j))) for r in range(R)]
    z = twiddle(roots, z, j, +1)
    z = dft(z, +1)                                                                # F_R* (T* · x)
    stores = []
    for r in range(R):
      y = each_row(of, z[r], *(rows.load(j, r*M, a) for a in others))
      stores += rows.store(j, r*M, out, y)
    return stores
  name, body = ("fft_join", join) if inverse else ("fft_split", split)
  return g.finish(g.everywhere(layout.count(shape), body), name)

def conv_overlap_save(w:Tensor, k:Tensor, D:Tensor|None, N:int) -> Tensor:
  """c = k ∗ w + D w of a short filter and a long sequence, by transforms of length N.

  The sequence is cut into P pieces of n = N - K + 1 steps, and the K-1 steps before each are put in
  front of it. What wraps around in the transform falls into those, whose outputs are dropped.
  """
  B, H, L = w.shape
  overlap = k.shape[1] - 1
  n = N - overlap
  P = -(-L//n)
  w = w.pad((0, P*n-L)).reshape(B, H, P, n)
  ends = w[..., n-overlap:]                                                       # (B,H,P,K-1)
  before = ends.pad((0, 0, 1, 0))[:, :, :P]
  w = before.cat(w, dim=-1).transpose(1, 2).reshape(B*P, H, N)
  c = conv_one_launch(ConvArgs(k.unsqueeze(0), w, D), N)
  c = c[..., overlap:].reshape(B, P, H, n).transpose(1, 2)                        # (B,H,P,n)
  return c.reshape(B, H, P*n)[..., :L]

# ----------------------------------------------- state passing: an SSM's convolution at any length
# A "walk" goes along a sequence in chunks of c steps, R chunks (a group) at a time. Here A, B, C
# are discretised (dA, dB, C in h3tiny.py), M counts modes, and the filter is k[l] = 2 Re C A^l B.
# w_n = u v is chunk n, and x_n the state before it, M complex numbers as S = 2M reals:
#   y_n = P x_n + T w_n        P: 2 Re C A^(l+1), the zero-input response;  T: k[l-j], Toeplitz
#   x_(n+1) = a x_n + Q w_n    a: A^c;  Q: A^(c-1-j) B, the chunk's share of the state
# and backward, with e = q dy:
#   dx_n = a* dx_(n+1) + Pᵀ e_n     dw_n = Tᵀ e_n + Qᵀ dx_(n+1)
#   dPᵀ, dTᵀ = Σ_n x_n e_nᵀ, w_n e_nᵀ   dQᵀ = Σ_n w_n dx_(n+1)ᵀ   da = Σ_n x_n* dx_(n+1)
# The code has x_n, w_n and y_n as rows, hence all matrices transposed: y = x P + w T, and so on.
# All but the products with a are products of small matrices, done for R chunks at once.
# On a GPU that a work group for each row would leave idle, a row has segments, which go on side by
# side: a first launch walks each from a zero state, to its share z_p of the state after it, and the
# second one starts segment p from x0 and the shares before it: x ← a^n x + z_i, i < p, n chunks in
# a segment. The gradients walk back from dx of the final state and the shares behind, likewise.
def ssm_conv_ref(u:Tensor, A:Pair, B:Pair, C:Pair, D:Tensor|None=None, v:Tensor|None=None,
                 q:Tensor|None=None, state:Pair|None=None, chunk:int|None=None
                 ) -> tuple[Tensor, Pair]:
  "The definition of `ssm_conv`, same arguments: a convolution for each chunk (of 4096 steps)."
  w = wide(u) if v is None else wide(u)*wide(v)
  c, ys = chunk or 4096, []
  zeros = Tensor.zeros(u.shape[0], *A[0].shape, device=u.device)
  x = state or (zeros, zeros)
  for i in range(0, u.shape[2], c):
    piece = w[..., i:i+c]
    n = piece.shape[2]
    van = Vandermonde(A, n)
    zero_input = van.sum(cmul(cmul(C, A), x))                                     # 2 Re C A^(l+1) x
    k = van.sum(cmul(C, B))                                                         # 2 Re C A^l B
    ys.append(conv_ref(piece, k, D) + zero_input)
    zero_state = cmul(B, van.final_state(piece))                               # Σ_j A^(n-1-j) B w_j
    A_n = power(A, n)
    x = tuple(map(operator.add, cmul(A_n, x), zero_state))                          # A^n x + …
  y = Tensor.cat(*ys, dim=-1)
  if q is not None: y = y*wide(q)
  return y.cast(u.dtype) if u.dtype in HALF else y, x

def ssm_conv(u:Tensor, A:Pair, B:Pair, C:Pair, D:Tensor|None=None, v:Tensor|None=None,
             q:Tensor|None=None, state:Pair|None=None, chunk:int|None=None) -> tuple[Tensor, Pair]:
  """`fftconv` with the filter k[l] = 2 Re Σ C B A^l of a diagonal SSM, and the SSM's final state.

  u, v, q, y (B,H,L), float32 or of half precision as in `fftconv`, all else float32; A, B, C
  discretised modes, pairs (re, im) of (H,M); D (H,); state a pair of (B,H,M), None: zeros. Exact
  for any L, in memory that does not grow with L beyond inputs and outputs, one launch forward and
  one back, or two and two (`walkers`). Pieces of a sequence, with the state carried from one to
  the next, give what one call gives. chunk: steps of a chunk, to measure with. Differentiable once
  in every argument. Raises ValueError when shapes don't fit.
  Source: paper section 4 (state passing); not in the official code.
  """
  tensors = on_one_device(u, D, v, q, *A, *B, *C, *(state or ()))
  check_ssm_shapes(tensors, chunk)
  u, D, v, q, *parts = tensors
  D, *parts = map(wide, (D, *parts))
  A, B, C, *states = zip(parts[0::2], parts[1::2])
  state = states[0] if states else None
  rows = {name: x for name, x in zip("uvq", (u, v, q)) if x is not None}
  M = A[0].shape[1]
  spec = None
  if kernels_serve(*tensors): spec = walk_spec(tuple(rows), machine(u.device), u.shape, 2*M, chunk)
  if spec is None: return ssm_conv_ref(u, A, B, C, D, v, q, state, chunk)

  shape = spec.B, spec.H, spec.S
  if state is None: x0 = Tensor.zeros(*shape, device=u.device).contiguous()
  else: x0 = Tensor.cat(*state, dim=-1)
  Q, P, a = walk_tables(A, B, C, D, spec.c)
  rows = {name: x.flatten() for name, x in rows.items()}
  inputs = [x0.flatten(), Q, P, a, *rows.values()]
  if spec.segments > 1:
    w = [x for name, x in rows.items() if name != "q"]
    inputs += [segment_shares(segment_kernel, spec, Q, a, *w),
               Tensor.cat(*power((a[:, :M], a[:, M:]), spec.R*spec.groups), dim=1)]
  size = spec.state_at + prod(shape)
  kernel, backward = bound(walk_kernel, spec=spec), bound(walk_backward, spec=spec)
  out, = launch(kernel, [(size,)], inputs, backward)
  y = out[:u.numel()].reshape(u.shape).cast(u.dtype)
  x = out[spec.state_at:].reshape(shape)
  x = x[..., :M], x[..., M:]
  if rest := spec.L % spec.c:        # after the last whole chunk: A^rest x + Σ_j A^(rest-1-j) B w_j
    w = product(*(wide(t[..., -rest:]) for t in (u, v) if t is not None))
    zero_state = (w.unsqueeze(-1)*Q[:, spec.c-rest:]).sum(2)                        # (B,H,S)
    re, im = cmul(power(A, rest), x)
    x = re + zero_state[..., :M], im + zero_state[..., M:]
  return y, x

def check_ssm_shapes(tensors:list[Tensor|None], chunk:int|None) -> None:
  "Raises ValueError unless u, D, v, q, A, B, C and the state, in this order, fit together."
  u = tensors[0].shape
  batch, skip = u[:1], u[1:2]
  modes = skip + tensors[4].shape[-1:]
  wanted = [u, skip, u, u, *[modes]*6, *[batch + modes]*2]
  fits = all(x is None or x.shape == shape for x, shape in zip(tensors, wanted))
  if fits and len(u) == 3 and 0 not in u and (chunk is None or chunk >= 1): return
  names = "u D v q A A B B C C state state".split()
  got = [f"{name} {x.shape}" for name, x in zip(names, tensors) if x is not None]
  raise ValueError("ssm_conv: u, v, q are (B,H,L), A, B, C pairs of (H,M), D (H,), state a pair of "
                   f"(B,H,M), chunk at least 1; got {', '.join(got)}, chunk {chunk}")

class WalkSpec(NamedTuple):
  "Constants that a kernel of the walk is compiled for."
  names: tuple[str, ...]             # those of u, v, q that are not None
  machine: Machine
  B: int
  H: int
  L: int
  S: int                             # real numbers of a state: re, then im
  c: int                             # steps of a chunk
  R: int                             # chunks of a group, which are worked on at once
  segments: int                      # of a row, walked along at the same time
  walkers: int                       # work groups of a channel, which share B * segments
  @property
  def row_groups(self) -> int: return -(-self.L//(self.R*self.c))
  @property
  def groups(self) -> int:
    "Groups of a segment; the last one may have fewer."
    return -(-self.row_groups//self.segments)
  @property
  def last(self) -> int:
    "The row, 0 to R, of the last group's states that holds the state after the last whole chunk."
    return self.L//self.c - (self.row_groups - 1)*self.R
  @property
  def state_at(self) -> int:
    "Where the final states stand in the output, behind y: at a multiple of 64, for vector loads."
    return -(-self.B*self.H*self.L//64)*64

def walk_spec(names:tuple[str, ...], m:Machine, shape:Shape, S:int, chunk:int|None
              ) -> WalkSpec|None:
  "Chunks as large as shared memory allows; None where no kernel serves."
  B, H, L = shape
  c = min(chunk or CHUNK, 128, L)
  R = 8 if m.gpu else 32
  def fits(c:int) -> bool:
    rows = (R+1)*(S+c)
    sums = (S+c)*c + c*S + S
    return not m.gpu or 4*(2*rows + sums) <= m.shared
  while c > 1 and not fits(c): c //= 2
  if not fits(c) or (m.gpu and S > WALK_THREADS): return None     # a thread has a single column
  if 15 + 2*len(names) > m.buffers: return None                   # those of the backward kernel
  if B*H*L*4 < ONE_CORE: m = m._replace(cores=1)
  R = min(R, -(-L//c))
  return WalkSpec(names, m, B, H, L, S, c, R, *walkers(m, B, H, -(-L//(R*c))))

def walkers(m:Machine, B:int, H:int, groups:int) -> tuple[int, int]:
  "Segments of a row that has so many groups, and the work groups of a channel."
  if not m.gpu: return 1, 1                                       # a CPU's cores share channels
  wanted = -(-WALKERS//H)
  segments = max(1, min(wanted//B, groups//SEGMENT))
  segments = -(-groups//-(-groups//segments))                     # none is empty
  rows = B*segments
  return segments, next(n for n in range(min(wanted, rows), rows + 1) if rows % n == 0)

def walk_tables(A:Pair, B:Pair, C:Pair, D:Tensor|None, c:int) -> list[Tensor]:
  "Q (H,c,S), P above T (H,S+c,c), with D on T's diagonal, and a (H,S)."
  A_powers = [stored(p) for p in powers(A, c + 1)]                                  # (H,M,c+1)
  def times_powers(z:Pair, first:int) -> Pair:
    "z A^l, first ≤ l < first + c: (H,M,c)."
    A_l = [p[..., first:first+c] for p in A_powers]
    return cmul([p.unsqueeze(-1) for p in z], A_l)
  re, _ = times_powers(cmul(C, B), 0)
  k = 2*re.sum(1)                                                                   # (H,c)
  if D is not None: k = k + D.unsqueeze(-1).pad((0, c-1))
  T = k.pad((c-1, 0)).unfold(-1, c, 1).flip(1)                                     # T[j,l] = k[l-j]
  re, im = times_powers(C, 1)
  P = Tensor.cat(2*re, -2*im, T, dim=1)
  Q = Tensor.cat(*times_powers(B, 0), dim=1)
  Q = Q.flip(-1).transpose(1, 2)
  a = Tensor.cat(*(p[..., c] for p in A_powers), dim=1)
  return [stored(Q), stored(P), stored(a)]

def walk_backward(dout:Tensor, out:Tensor, *inputs:Tensor, spec:WalkSpec) -> list[Tensor]:
  "The gradients of the walk's inputs, in their order."
  x0, Q, P, a, *rows = inputs                                         # P above T: (H,S+c,c)
  carried = []                                                        # what segments need besides
  if spec.segments > 1: *rows, z, leap = rows
  PT = P[:, :spec.S].transpose(1, 2)
  T = P[:, spec.S:]
  TQ = Tensor.cat(T.transpose(1, 2), Q.transpose(1, 2), dim=1)
  # an argument that a kernel does not use is counted wrongly by tinygrad, on OpenCL and in CUDA's
  # graphs: only dq needs P
  last = [P] if "q" in spec.names else []
  if spec.segments > 1:
    q = rows[-1:] if last else []
    carried = [z, leap, segment_shares(segment_gradient_kernel, spec, dout, PT, a, *q)]
  tables = [(spec.walkers*x.numel(),) for x in (Q, P, a)]         # a sum from each work group
  kept = (spec.walkers*spec.H*spec.groups*spec.S,)    # states before each group, of one segment
  kernel = bound(walk_gradient_kernel, spec=spec)
  dx0, dQ, dP, da, _, *drows = launch(
    kernel, [x0.shape, *tables, kept, *(x.shape for x in rows)],
    [dout, x0, Q, a, PT, TQ, *rows, *last, *carried], no_second_gradient("ssm_conv"),
    [dtypes.float]*5 + [x.dtype for x in rows])
  sums = [d.reshape(spec.walkers, *x.shape).sum(0) for d, x in zip((dQ, dP, da), (Q, P, a))]
  return [dx0, *sums, *drows, *[None]*(len(inputs) - 4 - len(rows))]

def segment_shares(kernel:Callable, spec:WalkSpec, *inputs:Tensor) -> Tensor:
  "The shares of each segment, (B,segments,H,S), by `segment_kernel` or `segment_gradient_kernel`."
  size = spec.B*spec.segments*spec.H*spec.S
  z, = launch(bound(kernel, spec=spec), [(size,)], inputs, no_second_gradient("ssm_conv"))
  return z

@functools.cache
def segment_kernel(z:UOp, Q:UOp, a:UOp, *rows:UOp, spec:WalkSpec) -> UOp:
  "The state after each segment that begins with a zero state."
  w, x = Walk(spec), named([n for n in spec.names if n != "q"], rows)
  X = Matrix(w, spec.R+1, spec.S+spec.c)
  with w.over_segments():
    w.fill(X.part(spec.R, 0), 1, spec.S, zero)
    with w.over(w.groups()) as w.g: w.advance(X, Q, a, x)
    w.copy(w.share(z, w.p), X.row(spec.R))
  return w.finish("ssm_segments")

@functools.cache
def segment_gradient_kernel(dz:UOp, dout:UOp, PT:UOp, a:UOp, *q:UOp, spec:WalkSpec) -> UOp:
  "The gradient of the state before each segment, from its outputs and the final state alone."
  w = Walk(spec)
  E = Matrix(w, spec.R+1, spec.S+spec.c)
  dx = E.part(0, spec.c)
  with w.over_segments():
    w.fill(dx, 1, spec.S, zero)
    with w.over_back() as back: w.retreat(E, back, PT, a, dout, *q)
    w.copy(w.share(dz, w.p), dx.row(0))
  return w.finish("ssm_segments_grad")

@functools.cache
def walk_kernel(out:UOp, x0:UOp, Q:UOp, P:UOp, a:UOp, *rows:UOp, spec:WalkSpec) -> UOp:
  "y and, behind it, the state after the last whole chunk."
  S, c, R, n = spec.S, spec.c, spec.R, len(spec.names)
  w, x, carried = Walk(spec), named(spec.names, rows), rows[n:]        # z, leap
  X = Matrix(w, R+1, S+c)                                              # rows [x_n | w_n]
  def put_y(r:UOp, l:UOp, y:UOp) -> Stores:
    if x.q is not None: y = y*w.load(r, l, x.q)
    return w.store(r, l, out, y)
  with w.over_segments():
    w.copy(X.row(R), w.state(x0))
    w.add_shares(X.part(R, 0), *carried)
    with w.over(w.groups()) as w.g:
      w.advance(X, Q, a, x)
      w.product(R, c, S+c, X, w.table(P), put_y)                               # y_n = P x_n + T w_n
    w.copy(w.state(out, spec.state_at), X.row(spec.last), w.p.eq(spec.segments - 1))
  return w.finish("ssm_walk")

@functools.cache
def walk_gradient_kernel(dx0:UOp, dQ:UOp, dP:UOp, da:UOp, kept:UOp, *buffers:UOp, spec:WalkSpec
                         ) -> UOp:
  """The gradients of `walk_kernel`'s inputs. States are computed anew: by a walk forward, which
  keeps the one before each group in `kept`, then within each group on the way back.

  buffers: the gradients of u, v, q, as far as given; dout, x0, Q, a, PT, TQ; u, v, q; with q, P;
  and with segments z, leap, dz.
  """
  S, c, R, n = spec.S, spec.c, spec.R, len(spec.names)
  d, x = named(spec.names, buffers), named(spec.names, buffers[n+6:])
  dout, x0, Q, a, PT, TQ = buffers[n:n+6]
  P, carried = buffers[2*n+6:2*n+7], buffers[2*n+6+("q" in spec.names):]
  w = Walk(spec)
  X = Matrix(w, R+1, S+c)                                          # rows [x_n | w_n]
  E = Matrix(w, R+1, S+c)                                          # rows [e_(n-1) | dx_n]
  e, dx, next_dx = E.part(1, 0), E.part(0, c), E.part(1, c)        # row n: e_n, dx_n, dx_(n+1)
  sP = Matrix(w, S+c, c)                                           # sums over all chunks
  sQ = Matrix(w, c, S)
  sa = Matrix(w, 1, S)

  def kept_state(mem:UOp) -> Value:
    first = (w.walker*spec.H + w.h)*spec.groups
    return lambda i: mem[(first + w.g)*S + i]
  def put_dq(r:UOp, l:UOp, y:UOp) -> Stores:
    return w.store(r, l, d.q, y*w.load(r, l, dout))
  def put_dw(r:UOp, j:UOp, dw:UOp) -> Stores:
    if x.v is None: return w.store(r, j, d.u, dw)
    du = dw*w.load(r, j, x.v)
    dv = dw*w.load(r, j, x.u)
    return w.store(r, j, d.u, du) + w.store(r, j, d.v, dv)

  for total in (sP, sQ, sa): w.fill(total, total.rows, total.cols, zero)
  with w.over_segments():
    w.copy(X.row(R), w.state(x0))
    w.add_shares(X.part(R, 0), *carried[:2])
    w.fill(dx, 1, S, zero)
    w.add_shares(dx, *reversed(carried[1:]), back=True)                             # dz, leap
    with w.over(w.groups()) as w.g:
      w.copy(kept_state(kept), X.row(R))
      w.advance(X, Q, a, x)
    with w.over_back() as back:
      w.copy(X.row(R), kept_state(kept.after(*w.done)))
      w.advance(X, Q, a, x)
      w.retreat(E, back, PT, a, dout, x.q)
      if x.q is not None: w.product(R, c, S+c, X, w.table(*P), put_dq)             # dq = y dy
      w.product(R, c, S+c, e, w.table(TQ), put_dw)                            # Tᵀ e_n + Qᵀ dx_(n+1)
      w.product(S+c, c, R, X.transposed, e, sP.put, sP)                            # dP, dT
      w.product(c, S, R, X.part(0, S).transposed, next_dx, sQ.put, sQ)             # dQ
      with w.over(R, barrier=False) as r:
        def add_da(_:UOp, i:UOp) -> Stores:
          da = cmul(conj(X.pair(r, i)), next_dx.pair(r, i))                        # x_n* dx_(n+1)
          return sa.add(0, i, da)
        w.each(1, S//2, add_da)
    w.copy(w.state(dx0), dx.row(0), w.p.eq(0))

  for total, out in ((sP, dP), (sQ, dQ), (sa, da)):
    def place(r:UOp, j:UOp) -> UOp:
      row = (w.walker*spec.H + w.h)*total.rows + r
      return out[row*total.cols + j]
    w.fill(place, total.rows, total.cols, total)
  return w.finish("ssm_walk_grad")

def zero(r:UOp, j:UOp) -> UOp:
  return ZERO.uop

class Matrix:
  """A matrix, or a part of one, in shared memory (GPU) or on a core's stack, used after all that is
  `done`. Its memory has one axis: with two, tinygrad would lose the condition of a store."""
  def __init__(self, walk:Walk, rows:int, cols:int, mem:UOp|None=None, first:int=0):
    self.walk, self.first = walk, first
    self.rows, self.cols = rows, cols
    self.mem = walk.memory(rows*cols, shared=True) if mem is None else mem
  def __call__(self, r:UOp|int, j:UOp) -> UOp:
    i = r*self.cols + self.first + j
    return self.mem.after(*self.walk.done)[i]
  def part(self, r:int, j:int) -> Matrix:
    "The part of the matrix that begins at row r and column j."
    first = self.first + r*self.cols + j
    return Matrix(self.walk, self.rows, self.cols, self.mem, first)
  def row(self, r:int) -> Value:
    return lambda i: self(r, i)
  def transposed(self, r:UOp, j:UOp) -> UOp:
    return self(j, r)
  def put(self, r:UOp, j:UOp, x:UOp) -> Stores:
    return [self(r, j).store(x)]
  def pair(self, r:UOp, i:UOp) -> Pair:
    "Complex number i of the state in row r."
    return self(r, i), self(r, self.walk.M + i)
  def add(self, r:UOp, i:UOp, z:Pair) -> Stores:
    places = self.pair(r, i)
    return [place.store(place + x) for place, x in zip(places, z)]

class Walk(Workers):
  """The workers on one channel, walking along its sequences: row b of the batch, segment p of the
  row, group g of the segment's chunks."""
  b: UOp
  p: UOp
  g: UOp
  def __init__(self, spec:WalkSpec):
    super().__init__(spec.machine, spec.H)
    self.spec = spec
    self.M = spec.S//2                 # complex numbers of a state
    self.walker = UOp.special(spec.walkers, "gidx1") if spec.walkers > 1 else 0
    if self.m.gpu: self.t = UOp.special(WALK_THREADS, "lidx0")
  def finish(self, name:str) -> UOp:
    s = self.spec
    return super().finish(f"{name}_{s.B}x{s.H}x{s.L}")

  @contextlib.contextmanager
  def over_segments(self):
    "A loop over the segments that are this work group's."
    s = self.spec
    n = s.B*s.segments//s.walkers
    with self.over(n) as i:
      i = i + self.walker*n
      self.b, self.p = i//s.segments, i % s.segments
      yield
  def groups(self) -> UOp|int:
    "The number of groups in this segment."
    s = self.spec
    if s.row_groups % s.groups == 0: return s.groups
    return (s.row_groups - self.p*s.groups).minimum(s.groups)
  @contextlib.contextmanager
  def over_back(self):
    "A loop over the groups of this segment, from the last one to the first."
    n = self.groups()
    with self.over(n) as back:
      self.g = n - 1 - back
      yield back

  def state(self, x:UOp, first:int=0) -> Value:
    "This row's and channel's numbers of x, which from `first` on is a flat (B,H,S)."
    s = self.spec
    return lambda i: x[first + (self.b*s.H + self.h)*s.S + i]
  def share(self, z:UOp, p:UOp) -> Value:
    "The numbers of segment p of this row in a flat (B,segments,H,S)."
    s = self.spec
    return lambda i: z[((self.b*s.segments + p)*s.H + self.h)*s.S + i]
  def table(self, x:UOp) -> Value:
    return lambda r, j: x[self.h, r, j]
  def place(self, r:UOp, j:UOp) -> tuple[UOp, UOp|None]:
    "The index of step j of chunk r in a flat (B,H,L), and whether it is before the end."
    s = self.spec
    sequence = self.b*s.H + self.h
    step = ((self.p*s.groups + self.g)*s.R + r)*s.c + j
    ok = step < s.L if s.L % (s.R*s.c) else None
    return sequence*s.L + step, ok
  def load(self, r:UOp, j:UOp, *factors:UOp|None) -> UOp:
    "The product of the factors at step j of chunk r, 0 past the end."
    i, ok = self.place(r, j)
    if ok is not None: i = i.valid(ok)
    factors = [f[i].cast(dtypes.float) for f in factors if f is not None]
    return product(*(factors if ok is None else [ok.where(x, 0.0) for x in factors]))
  def store(self, r:UOp, j:UOp, out:UOp, x:UOp) -> Stores:
    i, ok = self.place(r, j)
    place = out[i]
    return [only_if(ok, place.store(x.cast(place.dtype)))]

  def fill(self, to:Callable, rows:int, cols:int, value:Value):
    "to(row, col) = value(row, col), for all."
    self.each(rows, cols, lambda r, j: [to(r, j).store(value(r, j))])
  def copy(self, to:Value, source:Value, ok:UOp|None=None):
    "to(i) = source(i), for all numbers of a state, where ok."
    self.each(1, self.spec.S, lambda _, i: [only_if(ok, to(i).store(source(i)))])
  def each(self, rows:int, cols:int, body:Body):
    "The stores of body(row, col), for all rows and cols."
    if not self.m.gpu:
      r, j = self.loop(rows), self.loop(cols)
      self.done = UOp.group(*body(r, j)).end(j, r),
      return
    stores, n = [], rows*cols
    for first in range(0, n, WALK_THREADS):
      i = self.t + first
      ok = i < n if first + WALK_THREADS > n else None
      stores += [only_if(ok, s) for s in body(i//cols, i % cols)]
    self.done = UOp.group(*stores),

  def product(self, rows:int, cols:int, K:int, a:Callable, b:Callable, put:Body,
              start:Value=zero):
    """The stores put(row, col, sum) of a matrix product: sum = start(row, col) + Σ_k a(row, k)
    b(k, col). A tile of sums stays in private memory."""
    tile = self.gpu_tile(rows, cols) if self.m.gpu else self.cpu_tile(rows, cols)
    rows, width = list(enumerate(tile.rows)), tile.width
    sums = self.memory(len(rows)*width)
    def each(mem:UOp, value:Callable) -> UOp:
      "The sums in mem become value(row, column, sum)."
      def column(j:UOp, z:UOp|int) -> Stores:
        places = [(r, mem[i*width + z]) for i, (r, _) in rows]
        return [s.store(value(r, j, s)) for r, s in places]
      return tile.columns(column)
    new = sums.after(*self.done, *tile.loops)
    sums = sums.after(each(new, lambda r, j, _: start(r, j)))
    k = self.loop(K, AxisType.REDUCE)
    added = each(sums.after(k), lambda r, j, s: s + a(r, k)*b(k, j))
    sums = sums.after(added.end(k))
    stores = []
    for i, (r, ok) in rows:
      def finished(j:UOp, z:UOp|int) -> Stores:
        return [only_if(ok, s) for s in put(r, j, sums[i*width + z])]
      stores.append(tile.columns(finished))
    self.done = UOp.group(*stores).end(*reversed(tile.loops)),
  def gpu_tile(self, rows:int, cols:int) -> Tile:
    "Some rows of one column for each thread."
    workers = max(1, WALK_THREADS//cols)                               # threads that share a column
    uneven = WALK_THREADS % cols > 0
    def row(first:int) -> tuple[UOp, UOp|None]:
      r, ok = self.t//cols + first, None
      if uneven or first + workers > rows:
        ok = (r < rows) & (self.t < workers*cols)
        # what stands in the row of another thread is not even read: it may be writing it
        r = r.valid(ok)
      return r, ok
    def columns(body:Callable) -> UOp:
      return UOp.group(*body(self.t % cols, 0))
    return Tile([row(first) for first in range(0, rows, workers)], 1, (), columns)
  def cpu_tile(self, rows:int, cols:int) -> Tile:
    "A tile in three quarters of the registers, which divides the product, with the fewest loads."
    def vectors(n:int) -> int:
      return -(-n//self.m.lanes)
    def divisors(n:int) -> list[int]:
      return [d for d in range(1, n+1) if n % d == 0]
    def loads(size:tuple[int, int]) -> tuple[float, int]:
      n, width = size
      return (n + vectors(width))/(n*width), -width
    sizes = itertools.product(divisors(rows), divisors(cols))
    most = self.m.registers*3//4
    n, width = min(((n, c) for n, c in sizes if n*vectors(c) <= most), key=loads)
    down, across = loops = self.loop(rows//n), self.loop(cols//width)
    def columns(body:Callable) -> UOp:
      z = self.loop(width)
      return UOp.group(*body(across*width + z, z)).end(z)
    return Tile([(down*n + i, None) for i in range(n)], width, loops, columns)

  def advance(self, X:Matrix, Q:UOp, a:UOp, x:ConvArgs):
    "Rows [x_n | w_n] of group g, the state after the group before being in row R."
    S, c, R = self.spec.S, self.spec.c, self.spec.R
    w, next_x = X.part(0, S), X.part(1, 0)
    self.copy(X.row(0), X.row(R))
    def load_w(r:UOp, j:UOp) -> UOp:
      return self.load(r, j, x.u, x.v)
    self.fill(w, R, c, load_w)
    self.product(R, S, c, w, self.table(Q), next_x.put)                            # Q w_n
    self.scan(X, a, back=False)                                                    # += a x_n
  def retreat(self, E:Matrix, back:UOp, PT:UOp, a:UOp, dout:UOp, q:UOp|None=None):
    """Rows [e_(n-1) | dx_n] of group g, the one after it having dx_0 in its row 0. back: the number
    of those after it in the segment."""
    s, e, dx = self.spec, E.part(1, 0), E.part(0, self.spec.c)
    final, ends = self.state(dout, s.state_at), back.eq(0) & self.p.eq(s.segments - 1)
    def own(r:UOp, i:UOp) -> UOp:
      "The gradient of the final state, which enters where that state is read."
      return (ends & r.eq(s.last)).where(final(i), 0.0)
    self.copy(dx.row(s.R), lambda i: dx(0, i) + own(UOp.const(s.R, dtypes.weakint), i))
    self.fill(e, s.R, s.c, lambda r, j: self.load(r, j, dout, q))                  # e = q dy
    self.product(s.R, s.S, s.c, e, self.table(PT), dx.put, own)                    # Pᵀ e_n
    self.scan(dx, a, back=True)                                                    # += a* dx_(n+1)
  def add_shares(self, x:Matrix, z:UOp|None=None, leap:UOp|None=None, back:bool=False):
    """Turns row 0 of x, the state before the first segment, into the one before segment p.

    back: turns a gradient of the state after the last segment into that of the one after p. z: the
    segments' shares; leap: a^n, n chunks in a segment. Without them there is one segment.
    """
    if z is None: return
    last = self.spec.segments - 1
    # all of them, under a condition: around a loop of p turns tinygrad misplaces what is before it
    with self.over(last, barrier=False) as i:
      segment, between = (last - i, self.p < last - i) if back else (i, i < self.p)
      share = self.share(z, segment)
      def body(_:UOp, m:UOp) -> Stores:
        m = m.valid(self.t < self.M)                 # what others may be writing is not even read
        factor = leap[self.h, m], leap[self.h, self.M + m]
        moved = cmul(conj(factor) if back else factor, x.pair(0, m))
        return [only_if(between, x(0, at).store(y + share(at)))
                for at, y in zip((m, self.M + m), moved)]
      self.each(1, self.M, body)
  def scan(self, X:Matrix, a:UOp, back:bool):
    "x_(r+1) += a x_r from r = 0 on, or back: x_r += a* x_(r+1), with the states x the rows of X."
    R = self.spec.R
    with self.over(R, barrier=False) as r:
      before, now = (R - r, R - 1 - r) if back else (r, r + 1)
      def body(_:UOp, m:UOp) -> Stores:
        factor = a[self.h, m], a[self.h, self.M + m]
        if back: factor = conj(factor)
        return X.add(now, m, cmul(factor, X.pair(before, m)))
      self.each(1, self.M, body)

class Tile(NamedTuple):
  "The part of a matrix product that one worker does at a time: rows, and `width` columns."
  rows: list[tuple]                  # each with the condition under which it is the worker's
  width: int
  loops: tuple[UOp, ...]             # over tiles
  columns: Callable                  # the stores of body(column, its number in the tile)

def only_if(ok:UOp|None, store:UOp) -> UOp:
  "The store, made where ok."
  if ok is None: return store
  place, x = store.src
  mem, i = place.src
  return mem[i.valid(ok)].store(x)

# So short a chunk needs no FFT: at 32 steps T is a quarter of the work, and an FFT of 2,048 steps
# alone takes 1.8 ns a step and channel where all of this takes 1.4 to 2.1 (README). H=256,
# L=16384, chunks of 8, 16, 32, 64, 128, two cores: 9.0, 7.2, 6.3, 9.3, 15.3 ms forward, with
# gradients 39, 32, 39, 51, 76.
CHUNK = 32
WALK_THREADS = 128                   # of a GPU's work group
# Work groups wanted in all. Milliseconds on an H200 (132 multiprocessors), forward / with
# gradients, with one a channel, 512, 1,024 and 2,048 in all:
#   B=1  H=64   L=262,144   2.32/10.5   0.93/2.93   0.69/2.63   0.76/2.60
#   B=1  H=256  L=65,536    0.74/3.27   0.93/2.92   0.69/2.66   0.80/2.62
#   B=8  H=256  L=4,096     0.42/1.75   0.41/1.31   0.27/1.23   0.24/1.14
WALKERS = 1024
SEGMENT = 8                          # least groups of chunks in a segment: a walk of some 20 µs

# --------------------------------------------------- powers of complex numbers, and sums over them
def power(a:Pair, n:int) -> Pair:
  return tuple(p[..., 1] for p in powers(a, 2, n))

def powers(a:Pair, n:int, step:int=1) -> Pair:
  """a^l for l = 0, step, …, (n-1)*step on a new last axis: a (…) -> (…,n).

  The bits of l choose among a, a^2, a^4, …: no exp, sin or cos, and in float32 more exact than
  exp(l log a). Many powers are products of few: a^(iJ + j) = (a^J)^i a^j.
  """
  if n > 16:
    J = 1 << n.bit_length() // 2
    I = -(-n//J)
    lo = [stored(p).unsqueeze(-2) for p in powers(a, J, step)]                      # (…,1,J)
    hi = [stored(p).unsqueeze(-1) for p in powers(a, I, J*step)]                    # (…,I,1)
    return tuple(p.flatten(-2)[..., :n] for p in cmul(hi, lo))
  const = tuple(p.detach().unsqueeze(-1) for p in a)
  def by_bits(l:Tensor) -> Pair:
    out, square = (const[0].const_like(1), const[0].const_like(0)), const
    for b in range(((n-1)*step).bit_length()):
      bit = (l // 2**b) % 2 == 1
      out = tuple(bit.where(p, o) for p, o in zip(cmul(out, square), out))
      square = cmul(square, square)
    return out
  # Adding 0 = l a^(l-1) (a - const) changes no value and has the whole gradient,
  # d a^l = l a^(l-1) da: one sum over l in the backward pass instead of one for each bit.
  l = Tensor.arange(n) * step
  slope = tuple(l*p for p in by_bits((l - 1).maximum(0)))
  da = tuple(p.unsqueeze(-1) - c for p, c in zip(a, const))
  return tuple(map(operator.add, by_bits(l), cmul(slope, da)))

class Vandermonde:
  """Sums over powers A^l, l < L, in two levels: l = i*J + j, J ~ sqrt(L), A^l = (A^J)^i A^j.

  The (H,M,L) table never exists: what remains are matrix products over tables of about sqrt(L)
  columns. The official sum has one level, src/ops/vandermonde.py:47-58.
  """
  def __init__(self, A:Pair, L:int):
    self.L = L
    self.J = 1 << ((L-1).bit_length() + 1) // 2
    self.I = -(-L // self.J)
    self.hi = powers(A, self.I, self.J)                             # (H,M,I) each
    self.lo = stored(Tensor.cat(*powers(A, self.J), dim=-2))        # (H,2M,J), re above im

  def sum(self, c:Pair) -> Tensor:
    "2 Re Σ_n c[n] A[n]^l, l < L: c (…,H,M) -> (…,H,L)."
    c = [p.unsqueeze(-1) for p in c]
    re, im = cmul(c, self.hi)
    left = Tensor.cat(2*re, -2*im, dim=-2)
    left = left.transpose(-1, -2)                                   # (…,H,I,2M)
    right = self.lo.expand(*left.shape[:-2], -1, -1)
    y = matmul(left, right)                                         # (…,H,I,J)
    return y.flatten(-2)[..., :self.L]

  def final_state(self, w:Tensor) -> Pair:
    "The transpose: Σ_j A^(L-1-j) w[j], w (…,H,L) -> (…,H,M)."
    missing = self.I*self.J - self.L
    x = w.flip(-1).pad((0, missing))
    x = x.reshape(*w.shape[:-1], self.I, self.J)
    x = x @ self.lo.transpose(-1, -2)
    x = x.transpose(-1, -2)                                         # (…,H,2M,I)
    re, im = cmul(x.chunk(2, dim=-2), self.hi)
    return re.sum(-1), im.sum(-1)

# ---------------------------------------------------------------- launching a kernel
# With Tensor.custom_kernel alone, all gradients are zero once the loss has been read. The cause: to
# realise anything, tinygrad replaces every AFTER and CONTIGUOUS of its graph by a buffer, in all
# Tensors, and the call of a kernel with its gradient stands behind an AFTER. What is inside a
# FUNCTION is not replaced. So `launch` puts the call of a kernel into one, and `stored` the
# CONTIGUOUS. `precompile` lets the kernel write straight into the buffer that the caller realises;
# without it there would be a copy.
def launch(kernel:Callable, outputs:Sequence[Shape|Tensor], inputs:Sequence[Tensor],
           gradient:Callable|str, types:Sequence[DType]=()) -> list[Tensor]:
  """Runs one kernel and returns its outputs, differentiable, whatever is read before the gradient.

  kernel(*outputs, *inputs) gets UOps to index, `x[i, j]`, and returns
  `stores.end(*ranges).sink(arg=KernelInfo(name=..., opts_to_apply=()))`.
  outputs: shapes, as tuples, of new Tensors of these types, float32 without; or Tensors, which are
  overwritten.
  inputs: of any type; views and expressions are written to memory first, in each realisation.
  gradient(dy, y, *inputs) returns a Tensor for each input, usually by another `launch`, or None
  where there is no gradient; y is the output and dy its gradient. A str is the message of the
  RuntimeError that is raised instead: with `no_second_gradient`, and for several outputs, which
  can't have one. kernel and gradient are the same objects at each call: functions of a module, or
  `bound` ones. """
  if callable(gradient) and len(outputs) > 1:
    raise ValueError("launch: with several outputs there is no gradient.")
  gradient = tinygrad_gradient(gradient)
  if any(isinstance(x, Tensor) for x in outputs):
    def new(shape:Shape) -> Tensor:
      return Tensor.empty(*shape, dtype=dtypes.float, device=inputs[0].device)
    old = [x.uop for x in outputs if isinstance(x, Tensor)]
    if any(not stored_whole(u) and stored_whole(u.base) for u in old):
      raise ValueError("launch: a view can't be overwritten, only the whole of a Tensor.")
    outputs = [x if isinstance(x, Tensor) else new(x) for x in outputs]
    # contiguous() of a part of a buffer is a view, without it there would be a copy
    inputs = [x.contiguous() if x.uop.base.op is Ops.BUFFER else x for x in inputs]
    written = Tensor.custom_kernel(*outputs, *inputs, fxn=kernel, grad_fxn=gradient)
    return written[:len(outputs)]
  params = tuple(x.uop.param_like(i) for i, x in enumerate(inputs))
  body = function_body(kernel, tuple(outputs), tuple(types) or (dtypes.float,)*len(outputs), params)
  call = body.call(*(x.uop for x in inputs), grad_fxn=gradient, precompile=True)
  # tinygrad 0.14.0 replaces no GETTUPLE by the buffer it was realised in, and would compute it
  # again at each use. It replaces an op that stands on it, and contiguous_backward costs nothing.
  return [Tensor(call.gettuple(i)).contiguous_backward() for i in range(len(outputs))]

def stored_whole(x:UOp) -> bool: return x.has_buffer_identity(after_ok=True)

@functools.cache
def function_body(kernel:Callable, shapes:tuple[Shape, ...], types:tuple[DType, ...],
                  params:tuple[UOp, ...]) -> UOp:
  "The body of a FUNCTION: buffers of these shapes and types, after the kernel has written them."
  def buffer(i:int, shape:Shape, dtype:DType) -> UOp:
    # tinygrad puts the buffers of a caller in their place; slots below 0 are those of no other
    arg = ParamArg(-1-i, dtype, device=params[0].device)
    return UOp(Ops.BUFFER, src=(shape_to_shape_arg(shape),), arg=arg)
  buffers = map(buffer, itertools.count(), shapes, types)
  written = UOp.custom_kernel(*buffers, *params, fxn=kernel)[:len(shapes)]
  _, call = written[0].src
  if not isinstance(call.src[0].arg, KernelInfo):
    raise ValueError("launch: the sink of a kernel needs a KernelInfo, or nothing would run.")
  return UOp.maketuple(*written)

@functools.cache
def tinygrad_gradient(gradient:Callable|str) -> Callable:
  "Turns gradient(dy, y, *inputs), of `launch`, into tinygrad's grad_fxn(dy, call) over UOps."
  def grad_fxn(dy:UOp, *rest:UOp, call:UOp|None=None) -> tuple[UOp|None, ...]:
    if call is None: call = rest[0]                  # by name, if several outputs have gradients
    if isinstance(gradient, str): raise RuntimeError(gradient)
    # the CONTIGUOUS that `contiguous_backward` puts here would be replaced, see above
    dy = Tensor(dy.src[0] if dy.op is Ops.CONTIGUOUS else dy)
    # a kernel takes whole what several devices have in parts
    if dy.uop.axis is not None: dy = dy.to(dy.device[0]).shard(dy.device)
    y, *inputs = map(Tensor, (call.gettuple(0), *call.src[1:]))
    grads = gradient(dy, y, *inputs)
    return tuple(None if g is None else g.uop for g in grads)
  return grad_fxn

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

# tinygrad stores the inputs of such a FUNCTION, and would copy one that is stored but reshaped
tensor.pm_early_transform_tensor_graph = PatternMatcher([
  (UPat(Ops.CONTIGUOUS, src=(UPat(Ops.RESHAPE, name="x"),), name="c"),
   lambda c, x: x if c.tag is None and x.has_buffer_identity(after_ok=True) else None)
]) + tensor.pm_early_transform_tensor_graph

def in_function(f:Callable, x:Tensor, gradient:Callable) -> Tensor:
  "f(x), of UOps, inside a FUNCTION."
  body = UOp.maketuple(f(x.uop.param_like(0)))
  call = body.call(x.uop, grad_fxn=tinygrad_gradient(gradient))
  return Tensor(call.gettuple(0))

def stored(x:Tensor) -> Tensor:
  """Writes x to memory before it is used, as x.contiguous() does.

  After x.contiguous(), reading a Tensor that depends on it makes the gradients before it zero.
  """
  if x.uop.has_buffer_identity() or x.device is None: return x
  return in_function(UOp.contiguous, x, same_gradient)

def stored_backward(x:Tensor) -> Tensor:
  "Returns x. The gradient that arrives is written to memory before it is used."
  return in_function(lambda param: param, x, stored_gradient)

def same_gradient(dy:Tensor, y:Tensor, x:Tensor) -> tuple[Tensor]:
  return dy,
def stored_gradient(dy:Tensor, y:Tensor, x:Tensor) -> tuple[Tensor]:
  return stored(dy),

def on_one_device(*tensors:Tensor|None) -> list[Tensor|None]:
  """Returns the Tensors, those without a device on that of the others.

  tinygrad gives constants (`Tensor.eye`, `arange`, `linspace`, `Tensor(3)`) no device and no
  storage; a kernel needs both. Adding a zero that has them keeps the value and the gradient.
  """
  devices = [t.device for t in tensors if t is not None]
  zero = device_zero(next(filter(None, devices), Device.DEFAULT))
  def placed(t:Tensor|None) -> Tensor|None:
    if t is None or t.device is not None: return t
    return t + zero.cast(strong_dtype(t.dtype))
  return list(map(placed, tensors))

@functools.cache
def device_zero(device:str|tuple[str, ...]) -> Tensor:
  zero = to_device(np.zeros(1), device, np.float32)
  return zero.reshape(())

def to_device(x:np.ndarray, device:str|None=None, dtype:type|None=None) -> Tensor:
  """Copies an array to a device, the default one if none is named: at once, also while a TinyJit
  captures, so that replays do not do it again; in a quarter of the time of Tensor(x).realize(),
  which plans a graph."""
  x = np.asarray(x, dtype)
  t = Tensor.empty(*x.shape, dtype=getattr(dtypes, x.dtype.name), device=device)
  fill(t, x)
  return t

def fill(t:Tensor, x:np.ndarray) -> None:
  """Overwrites a Tensor in place, on each device, where a TinyJit that uses it will find it.

  The Tensor is whole, no view, and the array of its shape and type: bytes are copied.
  """
  data = np.ascontiguousarray(x).reshape(t.shape)
  assert t.dtype == getattr(dtypes, data.dtype.name), f"{data.dtype} does not go into {t.dtype}"
  if data.size == 0: return
  held = t.realize().uop.base.buffer
  for buffer in [held] if isinstance(held, Buffer) else held.bufs:
    buffer.ensure_allocated().copy_from(Buffer("NPY", data.size, t.dtype, opaque=data))

LOCK = threading.RLock()        # held by the thread that realises Tensors or calls a TinyJit

def capture(f:Callable, **options) -> TinyJit:
  """A TinyJit that captures at its first call, not its second: f is scheduled and compiled once,
  and the buffers of a run without memory planning never exist (1.4 GB at the peak of a training
  step where 0.5 do). Where f draws random numbers, draw one before: a counter made while
  capturing would start anew at every call."""
  jit = TinyJit(f, **options)
  jit.cnt = 1
  return jit

# ---------------------------------------------------------------- products, look-ups, loss, types
@replaceable
def matmul(x:Tensor, w:Tensor) -> Tensor:
  "Returns x @ w, for x (…,M,K) and w (K,N) or (…,K,N). Differentiable in both."
  return x @ w

@replaceable
def lookup(table:Tensor, ids:Tensor) -> Tensor:
  """Returns table[ids] as float32: table (V,D) of any of WEIGHTS, ids (…) int below V -> (…,D).

  Differentiable in the table.
  """
  ids, table = on_one_device(ids, table)
  onehot = ids.unsqueeze(-1) == Tensor.arange(table.shape[0])                       # (…,V)
  if table.shape[0] <= 1024: return matmul(onehot.float(), widened(table))   # for its gradient
  # a look-up: tinygrad makes one load of this sum
  rows = onehot.unsqueeze(-1).where(table, 0)
  return widened(rows.sum(-2, dtype=table.dtype))

@replaceable
def surprisal(logits:Tensor, targets:Tensor) -> Tensor:
  """Returns -log p in nats of the targets (…) int, given logits (…,V) -> (…). Differentiable in
  the logits.

  For a target outside 0 … V-1, which is no token, the result is logsumexp(logits): callers
  multiply it by 0.
  """
  picked = (targets.unsqueeze(-1) == Tensor.arange(logits.shape[-1])).where(logits, 0).sum(-1)
  return logits.logsumexp(-1) - picked

def overwrite(old:Sequence[Tensor], new:Sequence[Tensor]) -> None:
  "Writes new, realised Tensors into old ones; nothing where a kernel has done so already."
  moved = []
  for o, n in zip(old, new):
    if n.uop.base is not o.uop.base: moved.append(o.assign(n.detach()))
  if moved: Tensor.realize(*moved)

# What a matrix of weights may be kept in; all else is float32. A bfloat16 is the upper half of a
# float32 and kept as a uint16, as clang 14, for one, knows no such type on a PC.
WEIGHTS = {"float32": dtypes.float, "float16": dtypes.half, "bfloat16": dtypes.ushort}

def widened(x:Tensor|UOp) -> Tensor|UOp:
  "Returns weights as float32."
  if x.dtype in HALF: return x.cast(dtypes.float)
  if x.dtype != dtypes.ushort: return x
  return (x.cast(dtypes.uint) << 16).bitcast(dtypes.float)

# ------------------------------------------------------------- selfcheck, and the kernels' sources
ELEMENTWISE = {Ops.ADD: np.add, Ops.MUL: np.multiply, Ops.MAX: np.maximum, Ops.SQRT: np.sqrt,
               Ops.EXP2: np.exp2, Ops.LOG2: np.log2, Ops.SIN: np.sin, Ops.WHERE: np.where,
               Ops.CMPLT: np.less, Ops.CMPNE: np.not_equal, Ops.RECIPROCAL: lambda x: 1/x}

def in_numpy(*tensors:Tensor) -> list[np.ndarray]:
  """Returns the values of Tensors made by plain ops, as numpy computes them in float64.

  Nothing is compiled for it: the device and its compiler can't make the same mistake in them.
  LookupError names an op that has no counterpart here.
  """
  def converted(x:np.ndarray, dtype:DType) -> np.ndarray:
    return x.astype(np.float64 if dtypes.is_float(dtype) else dtype.fmt)

  def reduced(u:UOp) -> np.ndarray:
    "The sum, product or maximum over the first n axes."
    (x,), (op, n) = u.src, u.arg
    if op is not Ops.ADD: return ELEMENTWISE[op].reduce(value(x), tuple(range(n)))
    axes = range(x.ndim)
    if x.op is Ops.PERMUTE: (x,), axes = x.src, x.arg
    # a product is summed as it is made: that of two large matrices would take half a gigabyte
    factors = x.src if x.op is Ops.MUL else [x]
    terms = []
    for factor in np.broadcast_arrays(*map(value, factors)): terms += factor, range(x.ndim)
    return np.einsum(*terms, axes[n:])

  @functools.cache
  def value(u:UOp) -> np.ndarray:
    if u.op in ELEMENTWISE: return ELEMENTWISE[u.op](*map(value, u.src))
    if u.op is Ops.REDUCE: return reduced(u)
    x = value(u.src[0]) if u.src else None
    match u.op:
      case Ops.CONST: return np.array(u.val)
      case Ops.BUFFER: return converted(Tensor(u).numpy(), u.dtype)
      case Ops.CAST: return converted(x, u.dtype)
      case Ops.COPY | Ops.DETACH: return x
      case Ops.RESHAPE: return x.reshape(u.shape)
      case Ops.EXPAND: return np.broadcast_to(x, u.shape)
      case Ops.PERMUTE: return x.transpose(u.arg)
      case Ops.FLIP: return np.flip(x, [axis for axis, flipped in enumerate(u.arg) if flipped])
      case Ops.SHRINK: return x[tuple(slice(first, first + n) for first, n in u.marg)]
      case Ops.PAD:
        around = [(first, size - first - n) for (first, size), n in zip(u.marg, x.shape)]
        return np.pad(x, around)
    raise LookupError(f"in_numpy: {u.op} has no counterpart here")

  return [value(t.uop) for t in tensors]

def selfcheck(device:str|None=None) -> float:
  """Runs what is in CHECKS on the device, forward and backward, at small sizes, and compares with
  plain ops in numpy.

  Returns the worst relative error; RuntimeError, which names the kernel, past 1e-4.
  """
  device, worst = device or Device.DEFAULT, 0.0
  rng = np.random.default_rng(0)
  def draw(shape:Shape) -> Tensor:
    return to_device(rng.standard_normal(shape), device, np.float32)
  def failure(name:str, e:Exception) -> RuntimeError:
    return RuntimeError(f"kernel {name} fails on {device}: {type(e).__name__}")
  def results(f:Callable, x:list[Tensor], dy:Tensor) -> list[Tensor]:
    y = f(*x)
    return [y, *y.gradient(*x, gradient=dy)]
  checks = {}
  for name, (f, plain, output, *shapes) in CHECKS.items():
    x, dy = [draw(s) for s in shapes], draw(output)
    with Context(FLASH=0): want = in_numpy(*results(plain or f, x, dy))
    try: got = results(f, x, dy)
    except Exception as e: raise failure(name, e) from e
    checks[name] = got, want
  # at once: the compiler's workers share them; where it fails, the loop finds which one does
  with contextlib.suppress(Exception):
    Tensor.realize(*itertools.chain(*(got for got, _ in checks.values())))
  for name, (got, want) in checks.items():
    try:
      Tensor.realize(*got)
      # not Tensor.numpy(), which would compile a kernel for each that lies transposed
      pairs = [*zip(in_numpy(*got), want)]
    except Exception as e: raise failure(name, e) from e
    error = max(float(np.abs(a - b).max()/np.abs(b).max()) for a, b in pairs)
    if not error <= 1e-4:
      raise RuntimeError(f"kernel {name} is wrong on {device}, relative error {error:.1e}")
    worst = max(worst, error)
  return worst

BACKENDS = {"cuda": (cstyle.CUDARenderer, "sm_86"), "metal": (cstyle.MetalRenderer, ""),
            "opencl": (cstyle.OpenCLRenderer, "")}

def renderer_of(backend:str) -> Renderer:
  "A renderer without its compiler, which another machine may have."
  language, arch = BACKENDS[backend]
  r = object.__new__(language)
  cstyle.CStyleLanguage.__init__(r, Target(backend.upper(), arch=arch))
  r.tensor_cores = cstyle.tc.get_cuda(arch) if backend == "cuda" else []
  return r

def render(backend:str, L:int=2048, B:int=4, H:int=64) -> dict[str, tuple[str, int]]:
  """Returns {name: (source, bytes of shared memory)} of all kernels here, on any machine.

  backend: "cuda", "metal" or "opencl". Rows of length L in one launch, a two-level transform of
  four times that, and state passing over L steps with 32 modes, and over 64 L in segments.
  """
  r = renderer_of(backend)
  m, N = machine_of(r), fft_length(L, L)
  every, pairs = ConvArgs._fields, B//2
  gated = ConvSpec(every, m, Finish(True), RowPairs, *group_shape(m, H, N, pairs))
  parts = ConvSpec(("k", "u"), m, Finish(False), ComplexRows, *group_shape(m, 4*H, N, pairs))
  roots = 2, RADIX, N//RADIX
  k, u, D = (1, H, L), (B, H, L), (H,)
  outer_roots, far = (2, 4, N), (B, H, 2*N)
  outer = dict(m=m, shape=far, layout=RowPairs, of=product)
  X = pairs, 4*H, 2, N                               # far rows, in sub-transforms
  K = 1, 4*H, 2, N                                   # and their filter
  walk = walk_spec(("u", "v", "q"), m, u, 64, None)
  S, c = walk.S, walk.c
  x0, Q, P, a = (B*H*S,), (H, c, S), (H, S+c, c), (H, S)
  rows, out = [(B*H*L,)]*3, (walk.state_at + B*H*S,)
  sums = [(walk.walkers*prod(s),) for s in (Q, P, a)]
  flat, kept = [x0, *sums], (walk.walkers*H*walk.groups*S,)
  cut = walk_spec(("u", "v", "q"), m, (1, H, 64*L), 64, None)
  z, line = (cut.segments*H*S,), (64*H*L,)
  kernels = [  # and the shapes of its buffers, outputs first
    (bound(conv_kernel, spec=gated), u, roots, k, u, D, u, u),
    (bound(conv_gradient_kernel, spec=gated), (gated.shares, *k[1:]), u, u, u, roots,
     u, k, u, D, u, u),
    (bound(outer_kernel, **outer, inverse=False), X, outer_roots, far, far),
    (bound(outer_kernel, **outer, inverse=True), far, outer_roots, X, far),
    (bound(conv_kernel, spec=parts), X, roots, K, X),
    (bound(conv_gradient_kernel, spec=parts), (parts.shares, *K[1:]), X, roots, X, K, X),
    (bound(walk_kernel, spec=walk), out, x0, Q, P, a, *rows),
    (bound(walk_gradient_kernel, spec=walk), *flat, kept, *rows,
     out, x0, Q, a, (H, c, S), P, *rows, P),
    (bound(segment_kernel, spec=cut), z, (H, cut.c, S), a, line, line),
    (bound(segment_gradient_kernel, spec=cut), z, (cut.state_at + H*S,), (H, S, cut.c), a, line)]
  sources = {}
  for kernel, *shapes in kernels:
    buffers = [UOp.placeholder(s, dtypes.float, slot=i) for i, s in enumerate(shapes)]
    program = to_program(kernel(*buffers), r)
    _, linear, source, *_ = program.src
    memory = [u for u in linear.src if u.op is Ops.BUFFER and u.addrspace is AddrSpace.LOCAL]
    shared = sum(4*u.max_numel() for u in memory)
    sources[program.arg.name] = source.arg, shared
  return sources

def main(argv:list[str]|None=None) -> int:
  ap = argparse.ArgumentParser(
    prog="flashconv.py", description="Checks the kernels on this device against plain ops. "
                                     "`python support/bench.py conv` times them.")
  def fail(message:str):
    print(f"error: {message} (--help; timings: python support/bench.py conv)", file=sys.stderr)
    sys.exit(2)
  ap.error = fail
  ap.add_argument("--render", choices=BACKENDS,
                  help="print the kernels' source for it, on any machine, and stop")
  ap.add_argument("--lengths", type=int, nargs="+", metavar="L", help="of --render, default 2048")
  a = ap.parse_args(argv)
  if a.lengths and not a.render: ap.error("--lengths goes with --render")
  if a.render:
    lengths = a.lengths or [2048]
    if max(lengths) > 2048 or min(lengths) < 64:
      ap.error("--render takes lengths from 64 to 2048, what one launch takes at 32 KB")
    try:
      for L in lengths:
        for source, shared in render(a.render, L).values():
          print(f"// {shared} bytes of shared memory\n{source}\n", flush=True)
    except BrokenPipeError:                  # the reader of our pipe, `head` say, has had enough
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      return 141
    return 0
  sys.modules.setdefault("flashconv", sys.modules[__name__])  # support.cpu imports this very module
  from support.cpu import setup_device
  setup_device()
  try: print(f"selfcheck on {Device.DEFAULT}: worst relative error {selfcheck():.1e}")
  except RuntimeError as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  return 0

if __name__ == "__main__": sys.exit(main())
