"""FlashConv: the causal FFT convolution of H3 as one fused kernel, forward and backward.

Paper: Fu, Dao et al. 2022, "Hungry Hungry Hippos", arXiv 2212.14052, section 4 (FlashConv: fusion,
block FFT, state passing). The official CUDA version is HazyResearch/H3 csrc/fftconv; this one is
written in tinygrad UOps and compiles for whatever device is there. It reads from the top: the
definition in plain ops, `fftconv`, its kernels, then what these are made of.

Glossary. B batch, H channels, L length, K taps, N ≥ L + K - 1 length of the FFT, a power of two
  u, y    (B,H,L)  input, output            k   (H,K)  filter
  v, q    (B,H,L)  gates before and after   D   (H,)   skip term
  w       u v, what is convolved            c   k ∗ w + D w, what q gates
  y = q * (k ∗ (u*v) + D*(u*v))             the long convolution of the H3 layer, section 3.1
  F, F*                                     discrete Fourier transform of length N, N F⁻¹
  kf      F(k + D δ)/N                      the filter's spectrum: c = F* (kf · F w)
  M       N/8                               length of the 8 sub-transforms that go on side by side
Also here: `ssm_conv`, the same with the filter of an SSM at any length, by state passing; `launch`,
which runs a kernel with gradients that survive what is read before; `replaceable`, the seam through
which support/cpu.py brings faster versions of plain ops.

Run: `python flashconv.py` checks the kernels on your device; `python flashconv.py --render metal`
(or cuda, opencl) prints their sources; FLASH=0 turns them off. `python support/bench.py conv` and
`states` time them.

Not here: half precision; any filter but an SSM's past a length of 2^15 (plain ops do them). The
shift SSM of an H3 layer is a launch of its own: one kernel for both convolutions took 1.59, 7.3,
16.9 and 39.7 ms forward at L = 256, 1024, 2048 and 4096 where two launches take 1.57, 8.1, 20.0 and
41.4 (B=8, H=256, CPU), and its backward pass would need two transforms more.
"""
from __future__ import annotations
import argparse, cmath, functools, itertools, operator, sys, threading
from typing import Callable, NamedTuple, Sequence
import numpy as np
from tinygrad import Device, Tensor, TinyJit, UOp, dtypes, tensor
from tinygrad.codegen import to_program
from tinygrad.dtype import AddrSpace, strong_dtype
from tinygrad.engine.realize import capturing
from tinygrad.helpers import Context, ContextVar, Target, prod
from tinygrad.renderer import cstyle
from tinygrad.uop.ops import (AxisType, KernelInfo, Ops, ParamArg, PatternMatcher, UPat,
                              graph_rewrite, shape_to_shape_arg)

FLASH = ContextVar("FLASH", 1)  # 0: plain tinygrad ops everywhere

Shape = tuple[int, ...]
Stores = list[UOp]
Value = Callable[..., UOp]   # a number of a matrix, or a place in one, given its indices
Body = Callable[..., Stores]    # makes the stores of one place of a kernel, given its indices
Pair = tuple                 # a complex number (re, im) of Tensors, UOps or Reals; or two real rows

# What `selfcheck` runs: by name, a function of Tensors, its definition in plain ops (None: itself
# with FLASH=0), the shape of its output, and those of its inputs.
CHECKS: dict[str, tuple] = {}

def checked(output:Shape, *inputs:Shape, plain:Callable|None=None) -> Callable:
  "Registers a function that runs kernels for `selfcheck`, with the small shapes to check it at."
  def register(f:Callable) -> Callable:
    CHECKS[f.__name__] = f, plain, output, *inputs
    return f
  return register

# ---------------------------------------------------------------- the definition, in plain ops
def cmul(a:Pair, b:Pair) -> Pair: return a[0]*b[0] - a[1]*b[1], a[0]*b[1] + a[1]*b[0]
def conj(a:Pair) -> Pair: return a[0], -a[1]

@functools.cache
def dft_matrix(rows:int, cols:int, n:int, device:str, dtype:type) -> Pair:
  "exp(-2πi jk/n), j < rows, k < cols, computed in float64."
  w = np.exp(-2j*np.pi/n * (np.outer(np.arange(rows), np.arange(cols)) % n))
  return tuple(constant(p, device, dtype) for p in (w.real, w.imag))

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
  """What follows the convolution: y of c = k ∗ w + D w, number by number, and its gradients.

  One place for plain ops, the kernel and its gradient. An option, such as an activation, is a field
  here, which `fftconv` sets; no kernel has to know of it.
  """
  gated: bool                   # whether there is a q
  def y(self, c:Tensor|UOp, q:Tensor|UOp|None) -> Tensor|UOp: return c*q if self.gated else c
  needs_c = False               # whether dc depends on c: the backward kernel then makes c first
  def dc(self, dy:UOp, c:UOp|None, q:UOp|None) -> UOp: return dy*q if self.gated else dy
  def dq(self, dy:UOp, c:UOp, q:UOp) -> UOp: return c*dy

def fftconv_ref(u:Tensor, k:Tensor, D:Tensor|None=None, v:Tensor|None=None,
                q:Tensor|None=None) -> Tensor:
  "The definition of `fftconv`, same arguments, in plain tinygrad ops."
  return Finish(q is not None).y(conv_ref(u if v is None else u*v, k, D), q)

# ---------------------------------------------------------------- the public function
def direct(u:Tensor, k:Tensor, D:Tensor, v:Tensor, q:Tensor) -> Tensor:
  "`fftconv` as a sum over taps: fewer and smaller kernels than `fftconv_ref`, for `selfcheck`."
  L, w = u.shape[2], u*v
  taps = k.pad((None, (L-1, 0))).unfold(-1, L, 1).flip(-1)       # (H,L,L): k[t-s]
  return q*((taps*w.unsqueeze(2)).sum(-1) + D.reshape(-1, 1)*w)

SMALL = (3, 4, 40)
@checked(SMALL, SMALL, (4, 40), (4,), SMALL, SMALL, plain=direct)
def fftconv(u:Tensor, k:Tensor, D:Tensor|None=None, v:Tensor|None=None, q:Tensor|None=None,
            channels_last:bool=False) -> Tensor:
  """y = q * (k ∗ (u*v) + D*(u*v)): the causal convolution along the last axis, gated before, after.

  u, v, q, y (B,H,L) float32, or (B,L,H) with channels_last; k (H,K), or (1,K), one filter for all
  channels; taps past L do nothing; D (H,). Left out, v and q are 1 and D is 0. Any B, H, L, K ≥ 1.
  Differentiable in every argument, works in TinyJit; plain ops (`fftconv_ref`) where no kernel
  serves. Raises ValueError when shapes don't fit.
  Sources: paper section 4; HazyResearch/H3 src/ops/fftconv.py:53-103.
  """
  check_shapes(u, k, D, v, q, channels_last)
  if channels_last: u, v, q = (None if x is None else x.transpose(1, 2) for x in (u, v, q))
  u, k, D, v, q = on_one_device(u, k, D, v, q)
  L = u.shape[2]
  k = k[:, :L]
  N = fft_length(L, k.shape[1])
  N_short = max(SHORT, fft_length(8*k.shape[1], 1))
  serve, finish = kernels_serve(u, k, D, v, q), Finish(q is not None)
  R = levels(u.device, N) if serve else 0
  overlap_save = serve and N > 2*N_short and levels(u.device, N_short) == 1
  if R == 1 and not overlap_save:
    y = conv_one_launch(ConvArgs(k.unsqueeze(0), u, D, v, q), N, finish)
  else:
    w = u if v is None else u*v
    if overlap_save: c = conv_overlap_save(w, k, D, N_short)
    elif R: c = conv_two_levels(w, k, D, N, R)
    else: c = conv_ref(w, k, D)
    y = finish.y(c, q)
  return y.transpose(1, 2) if channels_last else y

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
  "Whether none is in parts on several devices: a kernel takes what one device holds."
  return all(t is None or isinstance(t.device, str) or (t.device is not None and t.uop.axis is None)
             for t in tensors)

def kernels_serve(*tensors:Tensor|None) -> bool:
  "Whether kernels are on, and all is float32, and whole."
  exact = all(t is None or t.dtype == dtypes.float for t in tensors)
  return bool(FLASH) and whole(*tensors) and exact

MAX_N = 1 << 16                 # FFT length on a CPU: 2 MB of stack in the backward pass
SHORT = 1 << 12                 # length of a short filter's transform on a long sequence
ONE_CORE = 1 << 20              # B H N up to which one core is as fast as two

def levels(device:str|tuple, N:int) -> int:
  """How a transform of length N runs: 1 in one launch, R > 1 in two levels, R of length N/R; 0 in
  plain ops. The device's limits decide, never its name."""
  m = machine(device)
  if not m.gpu: return int(N <= MAX_N)
  return next((R for R in (1, 2, 4, 8, 16) if 8*N <= R*m.shared), 0)  # a complex number is 8 bytes

# ---------------------------------------------------------------- the convolution in one launch
class ConvArgs(NamedTuple):
  """The arguments of a convolution: as Tensors, as a kernel's buffers, or as the buffers of their
  gradients. What was left out is None. k: (1,H,K), (1,1,K), or as `ComplexRows` are."""
  k: Tensor|UOp|None = None
  u: Tensor|UOp|None = None
  D: Tensor|UOp|None = None
  v: Tensor|UOp|None = None
  q: Tensor|UOp|None = None

class ConvSpec(NamedTuple):
  "What a kernel of the convolution is made for, beside the shapes of its buffers."
  names: tuple[str, ...]        # which of ConvArgs there are
  machine: Machine
  finish: Finish
  layout: type                  # how sequences lie in memory: RowPairs or ComplexRows
  @property
  def gradients(self) -> tuple[str, ...]:
    "The arguments whose gradients the backward kernel writes: dD is dk at lag 0."
    return tuple(n for n in self.names if n != "D")

def named(names:Sequence[str], buffers:Sequence[Tensor|UOp]) -> ConvArgs:
  return ConvArgs(**dict(zip(names, buffers)))

def conv_one_launch(args:ConvArgs, N:int, finish:Finish=Finish(False), layout:type|None=None
                    ) -> Tensor:
  "y, for sequences laid out as `layout` says, by default rows (B,H,L)."
  names = tuple(n for n, x in args._asdict().items() if x is not None)
  shape, m = args.u.shape, machine(args.k.device)
  if shape[0]*shape[1]*N < ONE_CORE: m = m._replace(cores=1)
  spec = ConvSpec(names, m, finish, layout or RowPairs)
  roots = roots_of_unity(RADIX, N//RADIX, args.k.device)
  y, = launch(bound(conv_kernel, spec=spec), [spec.layout.buffer_shape(shape, N//RADIX)],
              [roots, *(x for x in args if x is not None)], bound(conv_backward, spec=spec))
  return spec.layout.trimmed(y, shape)

def conv_backward(dy:Tensor, y:Tensor, roots:Tensor, *args:Tensor, spec:ConvSpec
                  ) -> tuple[Tensor|None, ...]:
  "The gradients of `conv_one_launch`'s inputs: None for the roots, which are constants."
  x, layout, M = named(spec.names, args), spec.layout, roots.shape[2]
  shapes = [x.k.shape if n == "k" else x.u.shape for n in spec.gradients]
  buffers = [layout.buffer_shape((s[0], x.u.shape[1], *s[2:]), M) for s in shapes]
  outputs = launch(bound(conv_gradient_kernel, spec=spec), buffers,
                   [roots, layout.trimmed(dy, x.u.shape), *args], no_second_gradient("fftconv"))
  d = named(spec.gradients, map(layout.trimmed, outputs, shapes))
  dk = d.k.sum(1, keepdim=True) if x.k.shape[1] == 1 else d.k
  d = d._replace(k=dk, D=d.k[0, :, 0])
  return None, *(getattr(d, n) for n in spec.names)

# How a kernel is written. It is a function from UOps, its buffers, to one UOp, the sink, that holds
# all its stores. UOps are values without an order; what must come first is said in the graph:
#   mem[i], mem[i].store(x)  a load and a store
#   mem.after(done, i)       mem, to be used when the stores `done` have been made, in the loop i.
#                            A GPU's threads wait for each other here, if mem is shared memory that
#                            they have written since: tinygrad puts the barrier
#   i = UOp.range(n, id)     a loop: all that depends on i, by value or by `after`, is inside it
#   stores.end(i)            the loop ends behind these stores: after(stores.end(i)) is outside
#   UOp.group(*stores)       all of them
#   group.barrier()          a barrier in so many words, needed where threads write what others may
#                            still be *reading*: tinygrad sees only the reverse
#   UOp.special(n, "lidx0")  the number of a GPU's thread; "gidx0" that of its work group
# So each stage below uses `mem.after(*done)`, and leaves in `done` what the next has to wait for.
# A loop that holds stages is an AxisType.REDUCE: of a LOOP that ends in stores to global memory
# tinygrad would make a grid axis.

@functools.cache
def conv_kernel(y:UOp, roots:UOp, *args:UOp, spec:ConvSpec) -> UOp:
  "y = finish.y(c, q) with c = F* (kf · F w), for one channel: its filter, then its sequences."
  x = named(spec.names, args)
  buf, kf = filter_spectrum(x, roots, spec)
  n = buf.group.loop(spec.layout.count(x.u.shape), AxisType.REDUCE)    # over sequences
  rows = spec.layout(buf.group, x.u.shape, n)
  buf.forward(lambda j, off: rows.load(j, off, x.u, x.v), n)                       # W = F w
  buf.spectrum(lambda at, W: (times(W, kf.get(at)), []))                           # C = kf · W
  def store(j:UOp, off:int, c:Pair) -> Stores:                                  # c = F* C
    return rows.store(j, off, y, each_row(spec.finish.y, c, rows.load(j, off, x.q)))
  buf.inverse(store)
  return buf.group.finish(buf.done[0].end(n), spec.layout.name)        # here the loop over n ends

@functools.cache
def conv_gradient_kernel(*buffers:UOp, spec:ConvSpec) -> UOp:
  """dk, du, dv, dq of `conv_kernel`. All comes from its inputs: kf, W = F w and c are made anew.

  With e = dy ∂y/∂c (e = q dy) and E = F e, kf* the conjugate of kf, over the sequences n:
    dw = F* (kf* · E)      the correlation of e with the filter;  du = v dw, dv = u dw
    dk = F⁻¹ Σ_n W* · E    of two packed rows w₀ + i w₁, e₀ + i e₁ the real part: the correlation of
                           w₀ - i w₁ with e₀ + i e₁ is (w₀ ⋆ e₀ + w₁ ⋆ e₁) + i (…), so that one
                           inverse transform after the last sequence gives the sum over all rows
  """
  count = len(spec.gradients)
  d, (roots, dy) = named(spec.gradients, buffers), buffers[count:count+2]
  x = named(spec.names, buffers[count+2:])
  buf, kf = filter_spectrum(x, roots, spec)
  g = buf.group
  W, dkf = Spectrum(g, 2), Spectrum(g, 3)
  dkf.clear()
  n = g.loop(spec.layout.count(x.u.shape), AxisType.REDUCE)            # over sequences
  rows = spec.layout(g, x.u.shape, n)

  def load(f:Callable, j:UOp, off:int, c:Pair=(None, None)) -> Pair:
    return each_row(f, rows.load(j, off, dy), c, rows.load(j, off, x.q))
  def store_dq(j:UOp, off:int, c:Pair) -> Stores:
    return [] if x.q is None else rows.store(j, off, d.q, load(spec.finish.dq, j, off, c))
  def e_and_dq(j:UOp, off:int, c:Pair) -> tuple[Pair, Stores]:
    return load(spec.finish.dc, j, off, c), store_dq(j, off, c)
  buf.forward(lambda j, off: rows.load(j, off, x.u, x.v), n)                       # W = F w
  if spec.finish.needs_c:
    buf.spectrum(lambda at, X: (times(kf.get(at), X), W.put(at, X, n)))            # C = kf · W
    W.done = buf.done
    buf.inverse_and_forward(e_and_dq)                                  # c = F* C, E = F e
  else:
    buf.spectrum(lambda at, X: (None, W.put(at, X, n)))
    W.done = buf.done
    buf.free()
    buf.forward(lambda j, off: load(spec.finish.dc, j, off))                       # E = F e

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
  filters = spec.layout(g, x.k.shape, 0)                          # a single row: re alone is stored
  buf.spectrum(lambda at, _: ([scaled(a, 1/g.N) for a in dkf.get(at)], []), back_only=True)
  buf.inverse(lambda j, off, dk: filters.store(j, off, d.k, dk))                   # dk = F* (dkf/N)
  return g.finish(buf.done[0], f"{spec.layout.name}_grad")

def filter_spectrum(x:ConvArgs, roots:UOp, spec:ConvSpec) -> tuple[FFTBuffer, Spectrum]:
  "kf = F(k + D δ)/N, which stays in private memory, and the buffer that has made it, free again."
  g = Group(spec.machine, x.u.shape[1], RADIX*roots.shape[2])
  buf, kf, filters = FFTBuffer(g, roots), Spectrum(g, 1), spec.layout(g, x.k.shape, 0)
  def load(j:UOp, off:int) -> Pair:
    re, im = filters.load(j, off, x.k)
    if x.D is None or off > 0: return re, im
    return re + Real(j.eq(0).where(x.D[g.h], 0.0)), im                 # D is a tap more at lag 0
  buf.forward(load)
  buf.spectrum(lambda at, X: (None, kf.put(at, [scaled(a, 1/g.N) for a in X])))
  kf.done = buf.done
  buf.free()
  return buf, kf

def times(a:Sequence[Pair], b:Sequence[Pair]) -> list[Pair]: return list(map(cmul, a, b))
def scaled(z:Pair, c:float) -> Pair: return z[0]*c, z[1]*c

def each_row(f:Callable, *pairs:Pair) -> Pair:
  "f, of UOps or None, for each of two packed rows; where the first is ZERO, so is the result."
  def row(x:Real, *others:Real|None) -> Real:
    if not x.sign: return ZERO
    return Real(f(x.uop, *(None if o is None else o.uop for o in others)))
  return tuple(map(row, *pairs))

# ---------------------------------------------------------------- how sequences lie in memory
class RowPairs:
  """Rows 2n and 2n+1 of a batch as one complex sequence, `shape` being (B,H,L).

  The filter is real, so that the two results come out as re and im. So the rounding of the two is
  that of the larger, and an infinity in one reaches the other. Past the end of a row, and for the
  row that an odd batch lacks, reads give 0.
  """
  name = "fftconv"
  def __init__(self, group:Group, shape:Shape, n:UOp|int):
    (B, _, self.L), self.group = shape, group
    second = 2*n + 1
    there = second < B if B % 2 else None
    self.rows = [(2*n, None), (second, there)][:B]           # a row, and whether it is there
  @staticmethod
  def count(shape:Shape) -> int: return -(-shape[0]//2)
  @staticmethod
  def buffer_shape(shape:Shape, M:int) -> Shape:
    """What is written to: whole pairs of rows, and whole columns of the first pass. tinygrad 0.14.0
    can lose the condition of a store, where it leaves a single place."""
    B, H, L = shape
    return B + (B % 2 if B > 1 else 0), H, -(-L//M)*M
  @staticmethod
  def trimmed(y:Tensor, shape:Shape) -> Tensor: return y[:shape[0], :, :shape[2]]
  def load(self, j:UOp, off:int, *factors:UOp|None) -> Pair:
    """The product of the factors at j + off, j < M, in both rows; of no factor (None, None).

    off is known when the kernel is made: blocks past the end are no loads at all, and the
    butterflies drop what they would have to do with such zeros.
    """
    factors = [f for f in factors if f is not None]
    if not factors: return None, None
    if off >= self.L: return ZERO, ZERO
    inside = j + off < self.L if off + self.group.M > self.L else None
    pair = [self.load_row(b, j + off, [c for c in (inside, there) if c is not None], factors)
            for b, there in self.rows]
    return *pair, *[ZERO]*(2 - len(pair))
  def load_row(self, b:UOp, at:UOp, conditions:list[UOp], factors:list[UOp]) -> Real:
    channels = [0 if f.shape[1] == 1 else self.group.h for f in factors]
    if not conditions: return Real(product([f[b, h, at] for f, h in zip(factors, channels)]))
    ok = functools.reduce(operator.and_, conditions)
    at = at.valid(ok)
    return Real(product([ok.where(f[b, h, at], 0.0) for f, h in zip(factors, channels)]))
  def store(self, j:UOp, off:int, out:UOp, z:Pair) -> Stores:
    if off >= self.L: return []
    places = [out[b, self.group.h, j + off] for b, _ in self.rows]
    return [place.store(x.uop) for place, x in zip(places, z)]

class ComplexRows:
  "Sequence n of complex numbers, (P,H,2,N), between the launches of a two-level transform."
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

def product(factors:Sequence[UOp]) -> UOp: return functools.reduce(operator.mul, factors)

# ---------------------------------------------------------------- the block FFT
class FFTBuffer:
  """N complex numbers in a GPU's shared memory, or a core's stack, and the passes over them, in
  place.

  Forward by decimation in frequency (natural order in, digit-reversed out), back by decimation in
  time (the reverse): with spectra kept digit-reversed nothing is ever reordered. A butterfly writes
  where it has read and nowhere else, so that one barrier a pass is enough. `done` is what has to be
  finished before the next reader.
  """
  def __init__(self, group:Group, roots:UOp):
    self.group, self.roots, self.done = group, roots, group.outer
    gpu, M = group.m.gpu, group.M
    # LOCAL on a CPU puts a fence at every loop's end, and nothing is vectorised: 6x slower
    space = AddrSpace.LOCAL if gpu else AddrSpace.REG
    # a row left free on a CPU, so that the stores to 8 sub-transforms come out in order: clang
    # makes one shuffled store of them, not 8 scattered ones; a twentieth faster
    self.first = 0 if gpu else 1
    # on a GPU a ninth column, where it fits: with 8, a column's stores meet on 4 of 32 banks
    fits = 2*4*M*(RADIX+1) <= group.m.shared
    columns = RADIX + 1 if gpu and fits else RADIX
    self.mem = UOp.placeholder((2, M + self.first, columns), dtypes.float, slot=0, addrspace=space)
  def get(self, mem:UOp, i:UOp, sub:UOp|int) -> Pair:
    return tuple(Real(mem[c, i + self.first, sub]) for c in range(2))
  def put(self, mem:UOp, i:UOp, sub:UOp|int, z:Pair) -> Stores:
    return [mem[c, i + self.first, sub].store(z[c].uop) for c in range(2)]
  def free(self):
    "Lets others write where somebody may still read: a barrier of its own on a GPU."
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
    "`inverse`, then `forward`: of the y that one gives, body(j, off, y) -> (the next x, stores)."
    self.inner_inverse()
    g, mem = self.group, self.mem.after(*self.done)
    def turn(j:UOp) -> Stores:
      x, stores = zip(*(body(j, r*g.M, y) for r, y in enumerate(self.join(mem, j))))
      return [*itertools.chain(*stores), *self.split(mem, j, x)]
    self.done = g.columns(turn),
    self.inner_forward()
  def spectrum(self, body:Callable, back_only:bool=False):
    """The last pass of X = F x, body(at, X) -> (Y, stores), and the first pass of y = F* Y.

    `at` is where a `Spectrum` keeps this butterfly. Without a Y nothing goes back; with back_only
    there is no X.
    """
    g, R, mem = self.group, self.group.R, self.mem.after(*self.done)
    def last(slot:int|UOp, t:UOp, sub:UOp) -> Stores:
      X = None if back_only else dft([self.get(mem, t*R + r, sub) for r in range(R)], -1)
      Y, stores = body((slot, sub), X)
      y = dft(Y, +1) if Y else []
      return stores + [s for r in range(len(y)) for s in self.put(mem, t*R + r, sub, y[r])]
    self.done = g.subtransforms(g.M//R, last),

  def split(self, mem:UOp, j:UOp, x:Sequence[Pair]) -> Stores:
    "The first pass forward, which makes 8 sub-transforms of one transform."
    x = twiddle(self.roots, dft(x, -1), j, -1)                                     # x = T · (F₈ x)
    return [s for r in range(RADIX) for s in self.put(mem, j, r, x[r])]
  def join(self, mem:UOp, j:UOp) -> list[Pair]:
    "The last pass back."
    x = [self.get(mem, j, r) for r in range(RADIX)]
    return dft(twiddle(self.roots, x, j, +1), +1)                                 # x = F₈* (T* · x)
  def inner_forward(self):
    for M in self.group.passes:
      self.inner(M, lambda x, j: twiddle(self.roots, dft(x, -1), j, -1))           # x = T · (F₈ x)
  def inner_inverse(self):
    for M in reversed(self.group.passes):
      self.inner(M, lambda x, j: dft(twiddle(self.roots, x, j, +1), +1))          # x = F₈* (T* · x)
  def inner(self, M:int, butterfly:Callable):
    """A radix-8 pass over pieces of length M in each sub-transform.

    Its roots exp(-2πi rj/M) are those of the first pass, exp(-2πi rj'/N), at j' = j N/M: one table,
    strided, serves all passes.
    """
    g, S, mem = self.group, M//RADIX, self.mem.after(*self.done)
    def body(slot:int|UOp, t:UOp, sub:UOp) -> Stores:
      j, first = t % S, t//S*M + t % S
      x = butterfly([self.get(mem, first + r*S, sub) for r in range(RADIX)], j*(g.M//M*RADIX))
      return [s for r in range(RADIX) for s in self.put(mem, first + r*S, sub, x[r])]
    self.done = g.subtransforms(g.M//RADIX, body),

class Spectrum:
  """A spectrum in private memory: each worker keeps the butterflies of the last pass that it does.

  `at`: (slot, sub), the number of the butterfly among the worker's own, and its sub-transform.
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
  """One channel and who works on it: the threads of a work group (GPU), or one turn of the
  outermost loop (CPU), which the cores share. h is the channel."""
  def __init__(self, m:Machine, H:int):
    self.m, self.ids, self.outer = m, itertools.count(), ()
    if m.gpu: self.h = UOp.special(H, "gidx0")
    else:
      cores = next(c for c in range(m.cores, 0, -1) if H % c == 0)
      core, me = _cores(cores, next(self.ids))
      i = self.loop(H//cores)
      self.h, self.outer = me*(H//cores) + i, (i, core)
  def loop(self, n:int, axis:AxisType=AxisType.LOOP) -> UOp:
    return UOp.range(n, next(self.ids), axis)
  def finish(self, done:UOp, name:str) -> UOp:
    "The sink: here the loops over channels and cores end."
    sink = done.end(*self.outer).sink(arg=KernelInfo(name=name, opts_to_apply=()))
    return sink if self.m.has_sub else graph_rewrite(sink, without_sub)

without_sub = PatternMatcher([
  (UPat(Ops.SUB, src=(UPat.var("a"), UPat.var("b"))), lambda a, b: a + b*-1)])

class Group(Workers):
  """The workers on the transforms of one channel.

  N = 8 M: the first pass splits a transform into 8 sub-transforms of length M, which go on side by
  side, as the entries of a vector register (CPU) or in neighbouring threads (GPU).
  """
  def __init__(self, m:Machine, H:int, N:int):
    super().__init__(m, H)
    self.N, self.M = N, N//RADIX
    self.threads = min(self.M, 256)
    self.passes, R = [], self.M    # lengths of the pieces in the radix-8 passes over sub-transforms
    while R > RADIX:
      self.passes.append(R)
      R //= RADIX
    self.R = R                       # radix of the last pass
    if m.gpu:
      # two dimensions: neighbours in the first one read neighbours, with no division to hide it
      self.sub, self.row = UOp.special(RADIX, "lidx0"), UOp.special(self.threads//RADIX, "lidx1")
      self.thread = self.row*RADIX + self.sub
  def columns(self, body:Body) -> UOp:
    "body(j) for j < M: column j has a number of each sub-transform; clang makes vectors along j."
    if not self.m.gpu:
      j = self.loop(self.M)
      return UOp.group(*body(j)).end(j)
    return UOp.group(*[s for t in range(0, self.M, self.threads) for s in body(self.thread + t)])
  def subtransforms(self, n:int, body:Body) -> UOp:
    "body(slot, t, sub) for t < n in each sub-transform; slot counts a worker's own."
    if not self.m.gpu:
      t, sub = self.loop(n), self.loop(RADIX)
      return UOp.group(*body(t, t, sub)).end(sub, t)
    turns = enumerate(range(0, n, self.threads//RADIX))
    return UOp.group(*[s for slot, t in turns for s in body(slot, self.row + t, self.sub)])
  def everywhere(self, P:int, body:Body) -> UOp:
    "body(n, j) for n < P, j < M: columns that don't meet in shared memory."
    if not self.m.gpu:
      n, j = self.loop(P), self.loop(self.M)
      return UOp.group(*body(n, j)).end(j, n)
    n, t = UOp.special(P, "gidx1"), UOp.special(self.M//self.threads, "gidx2")
    return UOp.group(*body(n, t*self.threads + self.thread))
  def finish(self, done:UOp, name:str) -> UOp: return super().finish(done, f"{name}_{self.N}")

class Real:
  """±x or 0, a float in a register; `uop` is its value.

  The sign is carried here and zeros are dropped here: tinygrad writes a - b as a + (-1)·b and
  multiplies sums out, which made the butterflies a third longer. What is carried is hidden, as it
  lacks its sign.
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
  "X[k] = Σ_n x[n] exp(sign 2πi nk/R) of R = 2^m values in registers: a radix-2 tree, written out."
  if (R := len(x)) == 1: return list(x)
  even, odd = dft(x[0::2], sign), dft(x[1::2], sign)
  odd = [rotate(o, cmath.exp(sign*2j*cmath.pi*i/R)) for i, o in enumerate(odd)]
  return [tuple(f(a, b) for a, b in zip(e, o))
          for f in (operator.add, operator.sub) for e, o in zip(even, odd)]

def twiddle(roots:UOp, x:list[Pair], j:UOp, sign:int) -> list[Pair]:
  "T · x: x[r] exp(sign 2πi jr/N), for the roots (2,R,N/R) of `roots_of_unity`."
  def root(r:int) -> Pair: return Real(roots[0, r, j]), Real(roots[1, r, j], -sign)
  return [z if r == 0 else cmul(z, root(r)) for r, z in enumerate(x)]

@functools.cache
def roots_of_unity(R:int, S:int, device:str) -> Tensor:
  "exp(-2πi rj/(R S)), r < R, j < S: (2,R,S)"
  w = np.exp(-2j*np.pi/(R*S) * np.outer(np.arange(R), np.arange(S)))
  return constant(np.stack([w.real, w.imag]), device)

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

class Machine(NamedTuple):
  "What the kernels ask of a device's renderer; its name is never asked."
  gpu: bool                          # threads, shared memory and barriers; else loops
  cores: int                         # threads of a CPU that share the outermost loop
  shared: int                        # bytes of shared memory
  has_sub: bool                      # renders a - b
  lanes: int = 4                     # floats in a CPU's vector register,
  registers: int = 16                # and how many of those it has

VECTORS: dict[str, int] = {}         # lanes and registers, where support/cpu.py has asked the compiler

@functools.cache
def machine(device:str|tuple[str, ...]) -> Machine:
  r = Device[device if isinstance(device, str) else device[0]].renderer
  cores = r.global_max[0] if r.has_threads else 1
  return Machine(r.has_local, cores, r.shared_max, Ops.SUB in r.code_for_op, **VECTORS)

def _cores(n:int, axis:int) -> tuple[UOp, UOp]:
  """A range that the cores of a CPU share, and its index; axis: the range's number.

  The mask tells clang the index's range: without it indices may wrap, and loops were left scalar.
  """
  core = UOp.range(n, axis, AxisType.THREAD if n > 1 else AxisType.LOOP)
  return core, core & ((1 << (n-1).bit_length()) - 1)

# -------------------------------------------------------- longer sequences: two levels, and pieces
# A transform of length N = R M that does not fit into shared memory: a first pass of radix R, a
# launch of its own, leaves R transforms of length M, of which each convolves as a sequence by
# itself (`ComplexRows`), as a channel of its own; a last pass joins them. The two passes are each
# other's adjoint, hence each other's gradient.
def conv_two_levels(w:Tensor, k:Tensor, D:Tensor|None, N:int, R:int) -> Tensor:
  "c = k ∗ w + D w, by R transforms of length N/R."
  k = k.expand(w.shape[1], k.shape[1])
  if D is not None: k = k + D.unsqueeze(-1).pad((None, (0, k.shape[1]-1)))
  W, K = (to_subtransforms(x, R, N//R) for x in (w, k.unsqueeze(0)))
  C = conv_one_launch(ConvArgs(K, W), N//R, layout=ComplexRows)
  return from_subtransforms(C, w.shape, R, N//R)/R

def to_subtransforms(x:Tensor, R:int, M:int) -> Tensor:
  "The first pass: rows (B,H,L) -> R sub-transforms (⌈B/2⌉,H R,2,M)."
  shape = RowPairs.count(x.shape), x.shape[1]*R, 2, M
  return launch(bound(split_kernel, m=machine(x.device)), [shape],
                [roots_of_unity(R, M, x.device), x], split_backward)[0]

def from_subtransforms(X:Tensor, shape:Shape, R:int, M:int) -> Tensor:
  "The last pass, without its 1/R, to rows (B,H,L) of this shape."
  kernel = bound(join_kernel, m=machine(X.device), shape=shape)
  y, = launch(kernel, [RowPairs.buffer_shape(shape, M)], [roots_of_unity(R, M, X.device), X],
              bound(join_backward, shape=shape))
  return RowPairs.trimmed(y, shape)

def split_backward(dX:Tensor, X:Tensor, roots:Tensor, x:Tensor) -> tuple[Tensor|None, ...]:
  return None, from_subtransforms(dX, x.shape, *roots.shape[1:])

def join_backward(dy:Tensor, y:Tensor, roots:Tensor, X:Tensor, shape:Shape
                  ) -> tuple[Tensor|None, ...]:
  return None, to_subtransforms(RowPairs.trimmed(dy, shape), *roots.shape[1:])

@functools.cache
def split_kernel(X:UOp, roots:UOp, x:UOp, m:Machine) -> UOp:
  _, R, M = roots.shape
  g = Group(m, x.shape[1], RADIX*M)
  def body(n:UOp, j:UOp) -> Stores:
    rows = RowPairs(g, x.shape, n)
    z = twiddle(roots, dft([rows.load(j, r*M, x) for r in range(R)], -1), j, -1)    # T · (F_R x)
    places = [X[n, g.h*R + r, c, j] for r in range(R) for c in range(2)]
    return [place.store(x.uop) for place, x in zip(places, itertools.chain(*z))]
  return g.finish(g.everywhere(X.shape[0], body), "fft_split")

@functools.cache
def join_kernel(y:UOp, roots:UOp, X:UOp, m:Machine, shape:Shape) -> UOp:
  _, R, M = roots.shape
  g = Group(m, y.shape[1], RADIX*M)
  def body(n:UOp, j:UOp) -> Stores:
    rows = RowPairs(g, shape, n)
    z = [tuple(Real(X[n, g.h*R + r, c, j]) for c in range(2)) for r in range(R)]
    z = dft(twiddle(roots, z, j, +1), +1)                                           # F_R* (T* · x)
    return [s for r in range(R) for s in rows.store(j, r*M, y, z[r])]
  return g.finish(g.everywhere(X.shape[0], body), "fft_join")

def conv_overlap_save(w:Tensor, k:Tensor, D:Tensor|None, N:int) -> Tensor:
  """c = k ∗ w + D w of a short filter and a long sequence, by transforms of length N.

  Pieces of N - K + 1 steps each have the K-1 steps before them in front: what wraps around in the
  transform falls into those, which are dropped.
  """
  B, H, L = w.shape
  n = N - k.shape[1] + 1
  P = -(-L//n)
  w = w.pad((None, None, (0, P*n-L))).reshape(B, H, P, n)
  before = w[..., 2*n-N:].pad((None, None, (1, 0), None))[:, :, :P]                 # (B,H,P,N-n)
  w = before.cat(w, dim=-1).transpose(1, 2).reshape(B*P, H, N)
  c = conv_one_launch(ConvArgs(k.unsqueeze(0), w, D), N)[..., N-n:]                 # (B P,H,n)
  return c.reshape(B, P, H, n).transpose(1, 2).reshape(B, H, P*n)[..., :L]

# ----------------------------------------------- state passing: an SSM's convolution at any length
# A sequence is walked in chunks of c steps, R of them at a time. With w = u v and the state x, of
# S = 2M reals, of a chunk n, and k[l] = 2 Re C A^l B:
#   y_n = P x_n + T w_n        P: 2 Re C A^(l+1), the zero-input response;  T: k[l-j], Toeplitz
#   x_(n+1) = a x_n + Q w_n    a: A^c;  Q: A^(c-1-j) B, the chunk's share of the state
# and backward, with e = q dy:
#   dx_n = a* dx_(n+1) + Pᵀ e_n     dw_n = Tᵀ e_n + Qᵀ dx_(n+1)
#   dP, dT = Σ_n x_n e_nᵀ, w_n e_nᵀ   dQ = Σ_n w_n dx_(n+1)ᵀ   da = Σ_n x_n* dx_(n+1)
# All but what `a` does are products of small matrices, done for R chunks at once.
def ssm_conv_ref(u:Tensor, A:Pair, B:Pair, C:Pair, D:Tensor|None=None, v:Tensor|None=None,
                 q:Tensor|None=None, state:Pair|None=None, chunk:int|None=None
                 ) -> tuple[Tensor, Pair]:
  "The definition of `ssm_conv`, same arguments: a convolution for each chunk (of 4096 steps)."
  w = u if v is None else u*v
  L, c, ys = u.shape[2], chunk or 4096, []
  x = state or tuple(Tensor.zeros(u.shape[0], *A[0].shape, device=u.device) for _ in range(2))
  for i in range(0, L, c):
    piece = w[..., i:i+c]
    n = piece.shape[2]
    van = Vandermonde(A, n)
    zero_input = van.sum(cmul(cmul(C, A), x))                                     # 2 Re C A^(l+1) x
    ys.append(conv_ref(piece, van.sum(cmul(C, B)), D) + zero_input)                 # k ∗ w + …
    zero_state = cmul(B, van.final_state(piece))                               # Σ_j A^(n-1-j) B w_j
    x = tuple(map(operator.add, cmul(power(A, n), x), zero_state))                  # A^n x + …
  y = Tensor.cat(*ys, dim=-1)
  return y if q is None else q*y, x

def ssm_conv(u:Tensor, A:Pair, B:Pair, C:Pair, D:Tensor|None=None, v:Tensor|None=None,
             q:Tensor|None=None, state:Pair|None=None, chunk:int|None=None) -> tuple[Tensor, Pair]:
  """`fftconv` with the filter k[l] = 2 Re Σ C B A^l of a diagonal SSM, and its final state.

  u, v, q, y (B,H,L); A, B, C discretised modes, pairs (re, im) of (H,M); D (H,); state a pair of
  (B,H,M), None: zeros. Exact for any L, in memory that does not grow with L beyond inputs and
  outputs, one launch forward and one back. Pieces of a sequence, with the state carried from one to
  the next, give what one call gives. chunk: steps of a chunk, for measurements. Differentiable once
  in every argument. Raises ValueError when shapes don't fit.
  Source: paper section 4 (state passing); not in the official code.
  """
  u, D, v, q, *pairs = on_one_device(u, D, v, q, *A, *B, *C, *(state or ()))
  A, B, C, *states = zip(pairs[0::2], pairs[1::2])
  state = states[0] if states else None
  check_ssm_shapes(u, A, B, C, D, v, q, state, chunk)
  names = tuple(k for k, x in zip("uvq", (u, v, q)) if x is not None)
  M = A[0].shape[-1]
  spec = walk_spec(names, u, 2*M, chunk)
  if spec is None or not kernels_serve(u, v, q, D, *pairs):
    return ssm_conv_ref(u, A, B, C, D, v, q, state, chunk)
  states = spec.B, spec.H, spec.S
  if state is None: x0 = Tensor.zeros(*states, device=u.device).contiguous()
  else: x0 = Tensor.cat(*state, dim=-1)
  Q, P, a = walk_tables(A, B, C, D, spec.c)
  inputs = [x.flatten() for x in (u, v, q) if x is not None]
  out, = launch(bound(walk_kernel, spec=spec), [(spec.state_at + prod(states),)],
                [x0.flatten(), Q, P, a, *inputs], bound(walk_backward, spec=spec))
  y, x = out[:u.numel()].reshape(u.shape), out[spec.state_at:].reshape(states)
  x = x[..., :M], x[..., M:]
  if rest := spec.L % spec.c:        # after the last whole chunk: A^rest x + Σ_j A^(rest-1-j) B w_j
    w = u[..., -rest:] if v is None else u[..., -rest:]*v[..., -rest:]
    new = (w.unsqueeze(-1)*Q[:, spec.c-rest:]).sum(2)                               # (B,H,S)
    re, im = cmul(power(A, rest), x)
    x = re + new[..., :M], im + new[..., M:]
  return y, x

def check_ssm_shapes(u:Tensor, A:Pair, B:Pair, C:Pair, D:Tensor|None, v:Tensor|None, q:Tensor|None,
                     state:Pair|None, chunk:int|None) -> None:
  n, H, L = u.shape if u.ndim == 3 else (0, 0, 0)
  modes, states, M = (*A, *B, *C), state or (), A[0].shape[-1]
  wanted = [(x, u.shape) for x in (v, q)] + [(D, (H,))]
  wanted += [(x, (H, M)) for x in modes] + [(x, (n, H, M)) for x in states]
  fits = all(x is None or x.shape == shape for x, shape in wanted)
  if fits and 0 not in (n, H, L) and (chunk is None or chunk >= 1): return
  got = [f"{k} {x.shape}" for k, x in zip("uvqD", (u, v, q, D)) if x is not None]
  raise ValueError("ssm_conv: u, v, q are (B,H,L), A, B, C pairs of (H,M), D (H,), state a pair of "
                   f"(B,H,M), chunk at least 1; got {', '.join(got)}, "
                   f"A, B, C {[x.shape for x in modes]}, state {[x.shape for x in states]}, "
                   f"chunk {chunk}")

class WalkSpec(NamedTuple):
  "What a kernel of the walk is made for."
  names: tuple[str, ...]             # which of u, v, q there are
  machine: Machine
  B: int
  H: int
  L: int
  S: int                             # real numbers of a state: re, then im
  c: int                             # steps of a chunk
  R: int                             # chunks of a group, which are worked on at once
  @property
  def groups(self) -> int: return -(-self.L//(self.R*self.c))
  @property
  def last(self) -> int:
    "The chunk of the last group, or R, that would begin with the state after the last whole chunk."
    return self.L//self.c - (self.groups - 1)*self.R
  @property
  def state_at(self) -> int:
    "Where the final states stand in the output, behind y: at a place fit for vector loads."
    return -(-self.B*self.H*self.L//64)*64

def walk_spec(names:tuple[str, ...], u:Tensor, S:int, chunk:int|None) -> WalkSpec|None:
  "Chunks as large as shared memory allows; None where no kernel serves."
  if not FLASH: return None
  (B, H, L), m = u.shape, machine(u.device)
  c, R = min(chunk or CHUNK, 128, L), 8 if m.gpu else 32
  def fits(c:int) -> bool:
    rows, sums = (R+1)*(S+c), (S+c)*c + c*S + S
    return not m.gpu or 4*(2*rows + sums) <= m.shared
  while c > 1 and not fits(c): c //= 2
  if B*H*L*4 < ONE_CORE: m = m._replace(cores=1)
  return WalkSpec(names, m, B, H, L, S, c, min(R, -(-L//c))) if fits(c) else None

def walk_tables(A:Pair, B:Pair, C:Pair, D:Tensor|None, c:int) -> tuple[Tensor, Tensor, Tensor]:
  "Q (H,c,S), P above T (H,S+c,c), with D on T's diagonal, and a (H,S)."
  pw = [stored(p) for p in powers(A, c + 1)]                                        # (H,M,c+1)
  from0, from1 = (tuple(p[..., i:i+c] for p in pw) for i in range(2))
  def column(z:Pair) -> Pair: return z[0].unsqueeze(-1), z[1].unsqueeze(-1)
  k = 2*cmul(column(cmul(C, B)), from0)[0].sum(-2)                                  # (H,c)
  if D is not None: k = k + D.unsqueeze(-1).pad((None, (0, c-1)))
  T = k.pad((None, (c-1, 0))).unfold(-1, c, 1).flip(1)                             # T[j,l] = k[l-j]
  P, Q = cmul(column(C), from1), cmul(column(B), from0)
  Q = Tensor.cat(*Q, dim=1).flip(-1).transpose(1, 2)
  P = Tensor.cat(2*P[0], -2*P[1], T, dim=1)
  return stored(Q), stored(P), stored(Tensor.cat(*(p[..., c] for p in pw), dim=1))

def walk_backward(dout:Tensor, out:Tensor, *inputs:Tensor, spec:WalkSpec) -> list[Tensor]:
  "The gradients of the walk's inputs, in their order."
  (x0, Q, P, a, *args), S = inputs, spec.S
  PT = P[:, :S].transpose(1, 2)
  TQ = Tensor.cat(P[:, S:].transpose(1, 2), Q.transpose(1, 2), dim=1)
  sizes = [(x.numel(),) for x in inputs]
  kept = (spec.H*spec.groups*S,)               # states at the beginning of each group, of one row
  # tinygrad's OpenCL counts an argument that a kernel does not use wrongly: only dq needs P
  last = [P] if "q" in spec.names else []
  dx0, dQ, dP, da, _, *d = launch(
    bound(walk_gradient_kernel, spec=spec), [*sizes[:4], kept, *sizes[4:]],
    [dout, x0, Q, a, PT, TQ, *args, *last], no_second_gradient("ssm_conv"))
  return [d.reshape(x.shape) for d, x in zip((dx0, dQ, dP, da, *d), inputs)]

@functools.cache
def walk_kernel(out:UOp, x0:UOp, Q:UOp, P:UOp, a:UOp, *args:UOp, spec:WalkSpec) -> UOp:
  "y and, behind it, the state after the last whole chunk."
  w, x, S, c, R = Walk(spec), named(spec.names, args), spec.S, spec.c, spec.R
  X = Matrix(w, R+1, S+c)                                              # rows [x_n | w_n]
  w.b = w.begin(spec.B)
  w.copy(X.row(R), w.state(x0))
  w.g = w.begin(spec.groups)
  w.advance(X, Q, a, x)
  def put(r:UOp, l:UOp, y:UOp) -> Stores:
    return w.store(r, l, out, y if x.q is None else y*w.load(r, l, x.q))
  w.product(R, c, S+c, X, w.table(P), put)                                     # y_n = P x_n + T w_n
  w.end(w.g)
  w.copy(w.state(out, spec.state_at), X.row(spec.last))
  w.end(w.b)
  return w.finish("ssm_walk")

@functools.cache
def walk_gradient_kernel(dx0:UOp, dQ:UOp, dP:UOp, da:UOp, kept:UOp, *buffers:UOp, spec:WalkSpec
                         ) -> UOp:
  """The gradients of `walk_kernel`'s inputs. States are made anew: on a walk forward, which keeps
  those at the beginning of each group, then group by group on the way back."""
  n = len(spec.names)
  d, x = named(spec.names, buffers), named(spec.names, buffers[n+6:])
  dout, x0, Q, a, PT, TQ = buffers[n:n+6]
  w, S, c, R = Walk(spec), spec.S, spec.c, spec.R
  X, E = Matrix(w, R+1, S+c), Matrix(w, R+1, S+c)               # rows [x_n | w_n], [e_(n-1) | dx_n]
  e, dx, next_dx = E.part(1, 0), E.part(0, c), E.part(1, c)        # row n: e_n, dx_n, dx_(n+1)
  sP, sQ, sa = Matrix(w, S+c, c), Matrix(w, c, S), Matrix(w, 1, S) # sums over all chunks
  for total in (sP, sQ, sa): w.fill(total, total.rows, total.cols, lambda r, j: ZERO.uop)
  w.b = w.begin(spec.B)

  w.copy(X.row(R), w.state(x0))
  def kept_state(mem:UOp) -> Value:
    return lambda i: mem[(w.h*spec.groups + w.g)*S + i]
  w.g = w.begin(spec.groups)
  w.copy(kept_state(kept), X.row(R))
  w.advance(X, Q, a, x)
  w.end(w.g)

  back = w.begin(spec.groups)                                     # from the last group to the first
  w.g = spec.groups - 1 - back
  w.copy(X.row(R), kept_state(kept.after(*w.done)))
  w.advance(X, Q, a, x)
  final = w.state(dout, spec.state_at)
  def own(r:UOp, i:UOp) -> UOp:
    "The gradient of the final state, which enters where that state is read."
    return (back.eq(0) & r.eq(spec.last)).where(final(i), 0.0)
  def from_next(i:UOp) -> UOp:
    "dx_R, which is dx_0 of the group after this one."
    return back.eq(0).where(own(UOp.const(R, dtypes.weakint), i), dx(0, i))
  w.copy(dx.row(R), from_next)
  w.fill(e, R, c, lambda r, j: w.load(r, j, dout, x.q))                            # e = q dy
  w.product(R, S, c, e, w.table(PT), dx.put, own)                                  # Pᵀ e_n
  w.scan(dx, a, back=True)                                                         # += a* dx_(n+1)
  def put_dq(r:UOp, l:UOp, y:UOp) -> Stores:
    return w.store(r, l, d.q, y*w.load(r, l, dout))
  if x.q is not None: w.product(R, c, S+c, X, w.table(buffers[-1]), put_dq)        # dq = y dy
  def put_dw(r:UOp, j:UOp, dw:UOp) -> Stores:
    if x.v is None: return w.store(r, j, d.u, dw)
    du, dv = dw*w.load(r, j, x.v), dw*w.load(r, j, x.u)
    return [*w.store(r, j, d.u, du), *w.store(r, j, d.v, dv)]
  w.product(R, c, S+c, e, w.table(TQ), put_dw)                                # Tᵀ e_n + Qᵀ dx_(n+1)
  w.product(S+c, c, R, X.transposed, e, sP.put, sP)                                # dP, dT
  w.product(c, S, R, X.part(0, S).transposed, next_dx, sQ.put, sQ)                 # dQ
  r = w.begin(R)
  def add_da(_:UOp, i:UOp) -> Stores:
    return sa.add(0, i, cmul(conj(X.pair(r, i)), next_dx.pair(r, i)))
  w.each(1, S//2, add_da)
  w.end(r, barrier=False)
  w.end(back)

  w.copy(w.state(dx0), dx.row(0))
  w.end(w.b)
  for total, out in ((sP, dP), (sQ, dQ), (sa, da)):
    def place(r:UOp, j:UOp) -> UOp: return out[(w.h*total.rows + r)*total.cols + j]
    w.fill(place, total.rows, total.cols, total)
  return w.finish("ssm_walk_grad")

class Matrix:
  """A matrix, or a part of one, in shared memory (GPU) or on a core's stack, that workers use
  after all that is done. It is flat: of two indices tinygrad would lose the condition of a
  store."""
  def __init__(self, walk:Walk, rows:int, cols:int, mem:UOp|None=None, first:int=0):
    self.walk, self.rows, self.cols, self.first = walk, rows, cols, first
    self.mem = walk.memory(rows*cols) if mem is None else mem
  def __call__(self, r:UOp|int, j:UOp) -> UOp:
    return self.mem.after(*self.walk.done)[r*self.cols + self.first + j]
  def row(self, r:int) -> Value: return lambda i: self(r, i)
  def transposed(self, r:UOp, j:UOp) -> UOp: return self(j, r)
  def put(self, r:UOp, j:UOp, x:UOp) -> Stores: return [self(r, j).store(x)]
  def pair(self, r:UOp, i:UOp) -> Pair:
    "Complex number i of the state in row r."
    return self(r, i), self(r, self.walk.spec.S//2 + i)
  def add(self, r:UOp, i:UOp, z:Pair) -> Stores:
    return [place.store(place + x) for place, x in zip(self.pair(r, i), z)]
  def part(self, r:int, j:int) -> Matrix:
    "What begins at row r and column j."
    return Matrix(self.walk, self.rows, self.cols, self.mem, self.first + r*self.cols + j)

class Walk(Workers):
  """The workers on one channel, walking along its sequences: b is the row of the batch, g the
  group of R chunks. `done` is what has to be finished before the next stage."""
  b: UOp
  g: UOp
  def __init__(self, spec:WalkSpec):
    super().__init__(spec.machine, spec.H)
    self.spec, self.done, self.slots = spec, self.outer, itertools.count()
    if self.m.gpu: self.t = UOp.special(WALK_THREADS, "lidx0")
  def memory(self, size:int, shared:bool=True) -> UOp:
    space = AddrSpace.LOCAL if self.m.gpu and shared else AddrSpace.REG
    return UOp.placeholder((size,), dtypes.float, slot=next(self.slots), addrspace=space)
  def begin(self, n:int) -> UOp:
    "A loop in which everything up to its `end` takes place."
    i = self.loop(n, AxisType.REDUCE)
    self.done = *self.done, i
    return i
  def end(self, i:UOp, barrier:bool=True):
    """The loop over i ends here. What one turn has read the next one may overwrite: that takes a
    barrier of its own on a GPU, unless each worker has places of its own."""
    done = UOp.group(*self.done)
    self.done = (done.barrier() if self.m.gpu and barrier else done).end(i),
  def finish(self, name:str) -> UOp:
    s = self.spec
    return super().finish(UOp.group(*self.done), f"{name}_{s.B}x{s.H}x{s.L}")

  def state(self, x:UOp, first:int=0) -> Value:
    "This row's and channel's numbers of x, which from `first` on is a flat (B,H,S)."
    return lambda i: x[first + (self.b*self.spec.H + self.h)*self.spec.S + i]
  def table(self, x:UOp) -> Value: return lambda r, j: x[self.h, r, j]
  def place(self, r:UOp, j:UOp) -> tuple[UOp, UOp|None]:
    "Index into a flat (B,H,L) of step j of chunk r, and whether it is there."
    s = self.spec
    i = (self.g*s.R + r)*s.c + j
    ok = None if s.L % (s.R*s.c) == 0 else i < s.L
    return (self.b*s.H + self.h)*s.L + i, ok
  def load(self, r:UOp, j:UOp, *factors:UOp|None) -> UOp|None:
    "The product of the factors at step j of chunk r, 0 past the end; of no factor None."
    (i, ok), factors = self.place(r, j), [f for f in factors if f is not None]
    if not factors: return None
    return product([f[i] if ok is None else ok.where(f[i.valid(ok)], 0.0) for f in factors])
  def store(self, r:UOp, j:UOp, out:UOp, x:UOp) -> Stores:
    i, ok = self.place(r, j)
    return [only_if(ok, out[i].store(x))]

  def fill(self, to:Callable, rows:int, cols:int, value:Value):
    self.each(rows, cols, lambda r, j: [to(r, j).store(value(r, j))])
  def copy(self, to:Value, source:Value):
    self.each(1, self.spec.S, lambda _, i: [to(i).store(source(i))])
  def each(self, rows:int, cols:int, body:Body):
    "The stores of body(row, col), for all."
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
              start:Value=lambda r, j: ZERO.uop):
    """The stores put(row, col, sum) of a matrix product: sum = start(row, col) + Σ_k a(row, k)
    b(k, col). A tile of sums stays in private memory."""
    tile = self.gpu_tile(rows, cols) if self.m.gpu else self.cpu_tile(rows, cols)
    rows, width = list(enumerate(tile.rows)), tile.width
    sums = self.memory(len(rows)*width, shared=False)
    new = sums.after(*self.done, *tile.loops)
    def begin(j:UOp, z:UOp|int) -> Stores:
      return [new[i*width + z].store(start(r, j)) for i, r in rows]
    sums = sums.after(tile.columns(begin))
    k = self.loop(K, AxisType.REDUCE)
    s = sums.after(k)
    def add(j:UOp, z:UOp|int) -> Stores:
      y = b(k, j)
      return [s[i*width + z].store(s[i*width + z] + a(r, k)*y) for i, r in rows]
    sums = sums.after(tile.columns(add).end(k))
    stores = []
    for (i, r), ok in zip(rows, tile.conditions):
      def finished(j:UOp, z:UOp|int) -> Stores:
        return [only_if(ok, s) for s in put(r, j, sums[i*width + z])]
      stores.append(tile.columns(finished))
    self.done = UOp.group(*stores).end(*reversed(tile.loops)),
  def gpu_tile(self, rows:int, cols:int) -> Tile:
    "Some rows of one column for each thread."
    workers = max(1, WALK_THREADS//cols)                               # threads that share a column
    places = [self.t//cols + i*workers for i in range(-(-rows//workers))]
    uneven = WALK_THREADS % cols > 0
    conditions = [(r < rows) & (self.t < workers*cols) if uneven or (i+1)*workers > rows else None
                  for i, r in enumerate(places)]
    def columns(body:Callable) -> UOp: return UOp.group(*body(self.t % cols, 0))
    return Tile([r.minimum(rows-1) for r in places], conditions, 1, (), columns)
  def cpu_tile(self, rows:int, cols:int) -> Tile:
    "A tile in three quarters of the registers, which divides the product, with the fewest loads."
    def vectors(n:int) -> int: return -(-n//self.m.lanes)
    def divisors(n:int) -> list[int]: return [d for d in range(1, n+1) if n % d == 0]
    n, width = min(((r, c) for r in divisors(rows) for c in divisors(cols)
                    if r*vectors(c) <= self.m.registers*3//4),
                   key=lambda t: ((t[0] + vectors(t[1]))/(t[0]*t[1]), -t[1]))
    loops = self.loop(rows//n), self.loop(cols//width)
    def columns(body:Callable) -> UOp:
      z = self.loop(width)
      return UOp.group(*body(loops[1]*width + z, z)).end(z)
    return Tile([loops[0]*n + i for i in range(n)], [None]*n, width, loops, columns)

  def advance(self, X:Matrix, Q:UOp, a:UOp, x:ConvArgs):
    "Rows [x_n | w_n] of group g, the state after the group before being in row R."
    s = self.spec
    S, c, R = s.S, s.c, s.R
    self.copy(X.row(0), X.row(R))
    w = X.part(0, S)
    self.fill(w, R, c, lambda r, j: self.load(r, j, x.u, x.v))
    self.product(R, S, c, w, self.table(Q), X.part(1, 0).put)                      # Q w_n
    self.scan(X, a, back=False)                                                    # += a x_n
  def scan(self, X:Matrix, a:UOp, back:bool):
    "x_(r+1) += a x_r from r = 0 on, or back: x_r += a* x_(r+1), with the states x the rows of X."
    M, r = self.spec.S//2, self.begin(self.spec.R)
    before, now = (self.spec.R - r, self.spec.R - 1 - r) if back else (r, r + 1)
    def body(_:UOp, m:UOp) -> Stores:
      factor = a[self.h, m], a[self.h, M+m]
      return X.add(now, m, cmul(conj(factor) if back else factor, X.pair(before, m)))
    self.each(1, M, body)
    self.end(r, barrier=False)

class Tile(NamedTuple):
  "What one worker does of a matrix product at a time: rows, and `width` columns."
  rows: list[UOp]
  conditions: list[UOp|None]         # whether a row is the worker's
  width: int
  loops: tuple[UOp, ...]             # over tiles
  columns: Callable                  # the stores of body(column, its number in the tile)

def only_if(ok:UOp|None, store:UOp) -> UOp:
  "The store, made where ok."
  if ok is None: return store
  (mem, i), x = store.src[0].src, store.src[1]
  return mem[i.valid(ok)].store(x)

# So short a chunk needs no FFT: at 32 steps T is a quarter of the work, and an FFT of 2,048 steps
# alone takes 1.8 ns a step and channel where all of this takes 1.4 to 2.1 (README). H=256,
# L=16384, chunks of 8, 16, 32, 64, 128, two cores: 9.0, 7.2, 6.3, 9.3, 15.3 ms forward, with
# gradients 39, 32, 39, 51, 76.
CHUNK = 32
WALK_THREADS = 128                   # of a GPU's work group

# --------------------------------------------------- powers of complex numbers, and sums over them
def power(a:Pair, n:int) -> Pair: return tuple(p[..., 1] for p in powers(a, 2, n))

def powers(a:Pair, n:int, step:int=1) -> Pair:
  """a^l for l = 0, step, …, (n-1)*step on a new last axis: a (…) -> (…,n).

  The bits of l choose among a, a^2, a^4, …: no exp, sin or cos, and in float32 more exact than
  exp(l log a). Many powers are products of few: a^(iJ + j) = (a^J)^i a^j.
  """
  if n > 16:
    J = 1 << n.bit_length() // 2
    I = -(-n//J)
    lo, hi = (map(stored, powers(a, *sizes)) for sizes in ((J, step), (I, J*step)))
    both = cmul([t.unsqueeze(-1) for t in hi], [t.unsqueeze(-2) for t in lo])       # (…,I,J)
    return tuple(t.flatten(-2)[..., :n] for t in both)
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
    self.L, self.J = L, 1 << ((L-1).bit_length() + 1) // 2
    self.I, self.M = -(-L // self.J), A[0].shape[-1]
    self.hi = powers(A, self.I, self.J)                             # (H,M,I) each
    self.lo = stored(Tensor.cat(*powers(A, self.J), dim=-2))        # (H,2M,J), re above im

  def sum(self, c:Pair) -> Tensor:
    "2 Re Σ_n c[n] A[n]^l, l < L: c (…,H,M) -> (…,H,L)."
    re, im = cmul([p.unsqueeze(-1) for p in c], self.hi)
    left = Tensor.cat(2*re, -2*im, dim=-2).transpose(-1, -2)        # (…,H,I,2M)
    y = matmul(left, self.lo.expand(*left.shape[:-2], -1, -1))      # (…,H,I,J)
    return y.flatten(-2)[..., :self.L]

  def final_state(self, w:Tensor) -> Pair:
    "The transpose: Σ_j A^(L-1-j) w[j], w (…,H,L) -> (…,H,M)."
    missing = self.I*self.J - self.L
    x = w.flip(-1).pad((None,)*(w.ndim-1) + ((0, missing),))
    x = x.reshape(*w.shape[:-1], self.I, self.J)
    x = (x @ self.lo.transpose(-1, -2)).transpose(-1, -2)           # (…,H,2M,I)
    re, im = cmul((x[..., :self.M, :], x[..., self.M:, :]), self.hi)
    return re.sum(-1), im.sum(-1)

# ---------------------------------------------------------------- launching a kernel
# With Tensor.custom_kernel alone, all gradients are zero once the loss has been read. The cause: to
# realise anything, tinygrad replaces every AFTER and CONTIGUOUS of its graph by a buffer, in all
# Tensors, and the call of a kernel with its gradient stands behind an AFTER. What is inside a
# FUNCTION is not replaced. So `launch` puts the call of a kernel into one, and `stored` the
# CONTIGUOUS. `precompile` lets the kernel write straight into the buffer that the caller realises;
# without it there would be a copy.
def launch(kernel:Callable, outputs:Sequence[Shape|Tensor], inputs:Sequence[Tensor],
           gradient:Callable|str) -> list[Tensor]:
  """Runs one kernel and returns its outputs, differentiable, whatever is read before the gradient.

  kernel(*outputs, *inputs) gets UOps to index, `x[i, j]`, and returns
  `stores.end(*ranges).sink(arg=KernelInfo(name=..., opts_to_apply=()))`.
  outputs: shapes, as tuples, of new float32 Tensors; or Tensors, which are overwritten.
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
    return Tensor.custom_kernel(*outputs, *inputs, fxn=kernel, grad_fxn=gradient)[:len(outputs)]
  params = tuple(x.uop.param_like(i) for i, x in enumerate(inputs))
  body = function_body(kernel, tuple(outputs), params)
  call = body.call(*(x.uop for x in inputs), grad_fxn=gradient, precompile=True)
  # tinygrad 0.14.0 replaces no GETTUPLE by the buffer it was realised in, and would compute it
  # again at each use. It replaces an op that stands on it, and contiguous_backward costs nothing.
  return [Tensor(call.gettuple(i)).contiguous_backward() for i in range(len(outputs))]

def stored_whole(x:UOp) -> bool: return x.has_buffer_identity(after_ok=True)

@functools.cache
def function_body(kernel:Callable, shapes:tuple[Shape, ...], params:tuple[UOp, ...]) -> UOp:
  "The body of a FUNCTION: float32 buffers of these shapes, after the kernel has written them."
  device = params[0].device
  # tinygrad puts the buffers of a caller in their place; slots below 0 are those of no other
  args = [ParamArg(-1-i, dtypes.float, device=device) for i in range(len(shapes))]
  buffers = [UOp(Ops.BUFFER, src=(shape_to_shape_arg(s),), arg=a) for s, a in zip(shapes, args)]
  written = UOp.custom_kernel(*buffers, *params, fxn=kernel)[:len(shapes)]
  if not isinstance(written[0].src[1].src[0].arg, KernelInfo):
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
    grads = gradient(dy, Tensor(call.gettuple(0)), *(Tensor(x) for x in call.src[1:]))
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

def stored(x:Tensor) -> Tensor:
  """Writes x to memory before it is used, as x.contiguous() does.

  After x.contiguous(), reading a Tensor that depends on it makes the gradients before it zero.
  """
  if x.uop.has_buffer_identity() or x.device is None: return x
  body = UOp.maketuple(x.uop.param_like(0).contiguous())
  return Tensor(body.call(x.uop, grad_fxn=tinygrad_gradient(same_gradient)).gettuple(0))

def stored_backward(x:Tensor) -> Tensor:
  "Returns x. The gradient that arrives is written to memory before it is used."
  body = UOp.maketuple(x.uop.param_like(0))
  return Tensor(body.call(x.uop, grad_fxn=tinygrad_gradient(stored_gradient)).gettuple(0))

def same_gradient(dy:Tensor, y:Tensor, x:Tensor) -> tuple[Tensor]: return dy,
def stored_gradient(dy:Tensor, y:Tensor, x:Tensor) -> tuple[Tensor]: return stored(dy),

def on_one_device(*tensors:Tensor|None) -> list[Tensor|None]:
  """Returns the Tensors, those without a device on that of the others.

  tinygrad gives constants (`Tensor.eye`, `arange`, `linspace`, `Tensor(3)`) no device and no
  storage; a kernel needs both. Adding a zero that has them keeps the value and the gradient.
  """
  given = [t.device for t in tensors if t is not None and t.device is not None]
  zero = device_zero(given[0] if given else Device.DEFAULT)
  def placed(t:Tensor) -> Tensor: return t + zero.cast(strong_dtype(t.dtype))
  return [t if t is None or t.device is not None else placed(t) for t in tensors]

@functools.cache
def device_zero(device:str|tuple[str, ...]) -> Tensor:
  return constant(np.zeros(1), device).reshape(())

def constant(x:np.ndarray, device:str, dtype:type=np.float32) -> Tensor:
  "A Tensor realised at once, even while a TinyJit captures, so that replays do not make it again."
  with LOCK:
    held, capturing[:] = capturing[:], []
    try: return Tensor(np.asarray(x, dtype), device=device).realize()
    finally: capturing[:] = held

LOCK = threading.RLock()        # held by the thread that realises Tensors or calls a TinyJit

def capture(f:Callable, **options) -> TinyJit:
  """A TinyJit that captures at its first call, not its second: f is scheduled and compiled once,
  and the buffers of a run without memory planning never exist (1.4 GB at the peak of a training
  step where 0.5 do). Where f draws random numbers, draw one before: a counter made while
  capturing would start anew at every call."""
  jit = TinyJit(f, **options)
  jit.cnt = 1
  return jit

# ---------------------------------------------------------------- the seam for faster versions
FAST: dict[str, Callable] = {}  # by name, faster versions, which support/cpu.py brings

def replaceable(f:Callable) -> Callable:
  """Marks a definition in plain ops that may have a faster version in FAST.

  That takes the same arguments and returns None where it does not serve. FLASH=0 turns all off.
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
  """Returns table[ids] as float32: table (V,D) of any of WEIGHTS, ids (…) int below V -> (…,D).

  Differentiable in the table.
  """
  ids, table = on_one_device(ids, table)
  onehot = ids.unsqueeze(-1) == Tensor.arange(table.shape[0])
  if table.shape[0] <= 1024: return matmul(onehot.float(), widened(table))   # for its gradient
  rows = onehot.unsqueeze(-1).where(table, 0).sum(-2, dtype=table.dtype)     # a look-up
  return widened(rows)

def overwrite(old:Sequence[Tensor], new:Sequence[Tensor]) -> None:
  "Writes new, realised Tensors into old ones; nothing where a kernel has done so already."
  moved = [o.assign(n.detach()) for o, n in zip(old, new) if n.uop.base is not o.uop.base]
  if moved: Tensor.realize(*moved)

# What a matrix of weights may be kept in; all else is float32. A bfloat16 is the upper half of a
# float32 and kept as a uint16, as clang 14, for one, knows no such type on a PC.
WEIGHTS = {"float32": dtypes.float, "float16": dtypes.half, "bfloat16": dtypes.ushort}

def widened(x:Tensor|UOp) -> Tensor|UOp:
  "Returns weights as float32."
  if x.dtype == dtypes.ushort: return (x.cast(dtypes.uint) << 16).bitcast(dtypes.float)
  return x.cast(dtypes.float) if x.dtype == dtypes.half else x

# ------------------------------------------------------------- selfcheck, and the kernels' sources
def selfcheck(device:str|None=None) -> float:
  """Runs what is in CHECKS, forward and backward, against plain ops on the device, at small sizes.

  Returns the worst relative error; RuntimeError, which names the kernel, past 1e-4.
  """
  device, rng, worst = device or Device.DEFAULT, np.random.default_rng(0), 0.0
  def draw(shape:Shape) -> Tensor:
    return Tensor(rng.standard_normal(shape).astype(np.float32), device=device).realize()
  for name, (f, plain, output, *shapes) in CHECKS.items():
    x, dy = [draw(s) for s in shapes], draw(output)
    def results(f:Callable) -> list[Tensor]:
      y = f(*x)
      return [y, *y.gradient(*x, gradient=dy)]
    with Context(FLASH=0): want = results(plain or f)
    try:
      got = results(f)
      Tensor.realize(*got, *want)                     # at once: the compiler's workers share them
      pairs = [(a.numpy(), b.numpy()) for a, b in zip(got, want)]
    except Exception as e:
      raise RuntimeError(f"kernel {name} fails on {device}: {type(e).__name__}") from e
    error = max(float(np.abs(a - b).max()/np.abs(b).max()) for a, b in pairs)
    if not error <= 1e-4:
      raise RuntimeError(f"kernel {name} is wrong on {device}, relative error {error:.1e}")
    worst = max(worst, error)
  return worst

def render(backend:str, L:int=2048, B:int=4, H:int=64) -> dict[str, tuple[str, int]]:
  """Returns {name: (source, bytes of shared memory)} of the convolution's kernels, on any machine.

  backend: "cuda", "metal" or "opencl". Rows of length L in one launch, and a two-level transform of
  four times that.
  """
  language = {"cuda": cstyle.CUDARenderer, "metal": cstyle.MetalRenderer,
              "opencl": cstyle.OpenCLRenderer}[backend]
  arch = "sm_86" if backend == "cuda" else ""
  r = object.__new__(language)       # without its compiler, which another machine may have
  cstyle.CStyleLanguage.__init__(r, Target(backend.upper(), arch=arch))
  r.tensor_cores = []
  m, N = Machine(True, 1, r.shared_max, True), fft_length(L, L)
  def source(kernel:Callable, *shapes:Shape, **options) -> tuple[str, tuple[str, int]]:
    buffers = [UOp.placeholder(s, dtypes.float, slot=i) for i, s in enumerate(shapes)]
    program = to_program(kernel(*buffers, **options), r)
    shared = sum(4*u.max_numel() for u in program.src[1].src
                 if u.op is Ops.BUFFER and u.addrspace is AddrSpace.LOCAL)
    return program.arg.name, (program.src[2].arg, shared)
  rows, D, filters, roots = (B, H, L), (H,), (1, H, L), (2, RADIX, N//RADIX)
  args = filters, rows, D, rows, rows
  X, K = (B//2, 4*H, 2, N), (1, 4*H, 2, N)
  far, long = (2, 4, N), (B, H, 2*N)
  gated = ConvSpec(("k", "u", "D", "v", "q"), m, Finish(True), RowPairs)
  parts = ConvSpec(("k", "u"), m, Finish(False), ComplexRows)
  return dict([source(conv_kernel, rows, roots, *args, spec=gated),
               source(conv_gradient_kernel, filters, rows, rows, rows, roots, rows, *args,
               spec=gated), source(split_kernel, X, far, long, m=m),
               source(join_kernel, long, far, X, m=m, shape=long),
               source(conv_kernel, X, roots, K, X, spec=parts),
               source(conv_gradient_kernel, K, X, roots, X, K, X, spec=parts)])

def main(argv:list[str]|None=None) -> int:
  ap = argparse.ArgumentParser(
    prog="flashconv.py", description="Checks the kernels against plain ops on this device. "
                                     "`python support/bench.py conv` times them.")
  def fail(message:str):
    print(f"error: {message} (--help; timings: python support/bench.py conv)", file=sys.stderr)
    sys.exit(2)
  ap.error = fail
  ap.add_argument("--render", choices=["cuda", "metal", "opencl"],
                  help="print the kernels' source for it, on any machine, and stop")
  ap.add_argument("--lengths", type=int, nargs="+", metavar="L", help="of --render, default 2048")
  a = ap.parse_args(argv)
  if a.lengths and not a.render: ap.error("--lengths goes with --render")
  if a.render:
    lengths = a.lengths or [2048]
    if max(lengths) > 2048 or min(lengths) < 64:
      ap.error("--render takes lengths from 64 to 2048, what one launch takes at 32 KB")
    for L in lengths:
      for source, shared in render(a.render, L).values():
        print(f"// {shared} bytes of shared memory\n{source}\n")
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
