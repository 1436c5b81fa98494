"""FlashConv: the causal FFT convolution of H3 as one fused kernel, forward and backward.

Paper: Fu, Dao et al. 2022, "Hungry Hungry Hippos", arXiv 2212.14052, section 4 (FlashConv: fusion
and block FFT). The official CUDA version is HazyResearch/H3 csrc/fftconv; this one is written in
tinygrad UOps and compiles for whatever device is there. The plain definition stands beside it.

Glossary. B batch, H channels, L length, K taps, N ≥ L + K - 1 length of the FFT, a power of two
  u, y    (B,H,L)  input, output          k   (H,K)  filter
  v, q    (B,H,L)  gates before, after    D   (H,)   skip term
  y = q * (k ∗ (u*v) + D*(u*v))           the long convolution of the H3 layer, section 3.1
  F                                       discrete Fourier transform of length N
  kf      (2,N,H)  F(k + D δ)/N           the filter's spectrum, re and im, digit-reversed
Also here, where tinygrad's own are slow on a CPU: `matmul` and `layernorm`, with their gradients.
Compare: `python train.py` runs on the kernels, `FLASH=0 python train.py` on plain ops.

Not here: half precision; FFT lengths past 2^16 on a CPU, past what local memory holds on a GPU
(plain ops do those); a fused matrix product on GPUs, where tinygrad's own is good.
"""
from __future__ import annotations
import cmath, functools, importlib.util, itertools, operator, os, subprocess, sys
from typing import Callable
import numpy as np
from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.dtype import AddrSpace
from tinygrad.helpers import NOOPT, ContextVar, all_int, cache_dir, prod
from tinygrad.uop.ops import AxisType, KernelInfo

FLASH = ContextVar("FLASH", 1)  # 0: plain tinygrad ops everywhere

# ---------------------------------------------------------------- complex numbers: pairs (re, im) of Tensors or of UOps
Pair = tuple

def cmul(a:Pair, b:Pair) -> Pair: return a[0]*b[0] - a[1]*b[1], a[0]*b[1] + a[1]*b[0]
def conj(a:Pair) -> Pair: return a[0], -a[1]

# ---------------------------------------------------------------- the definition, in plain ops
@functools.cache
def _roots(rows:int, cols:int, n:int, device:str) -> Pair:
  "exp(-2πi jk/n), j < rows, k < cols, rounded once from float64."
  w = np.exp(-2j*np.pi/n * (np.outer(np.arange(rows), np.arange(cols)) % n))
  return tuple(Tensor(p.astype(np.float32), device=device).realize() for p in (w.real, w.imag))

def fft(x:Pair, inverse:bool=False) -> Pair:
  """X[k] = Σ_n x[n] exp(∓2πi nk/N) over the last axis, N a power of two, by matrix products.
  The inverse comes without its 1/N."""
  N, dev, sign = x[0].shape[-1], x[0].device, conj if inverse else lambda w: w
  if N <= 32:
    (re, im), (c, s) = x, sign(_roots(N, N, N, dev))
    return re@c - im@s, re@s + im@c
  N1 = 32 if N >= 1024 else 16 if N >= 256 else 8         # n = n1 N2 + n2, k = k1 + N1 k2
  a = tuple(p.reshape(*p.shape[:-1], N1, N//N1).transpose(-1, -2) for p in x)  # (…, n2, n1)
  a = cmul(fft(a, inverse), sign(_roots(N//N1, N1, N, dev)))                   # (…, n2, k1)
  a = fft(tuple(p.transpose(-1, -2) for p in a), inverse)                      # (…, k1, k2)
  return tuple(p.transpose(-1, -2).reshape(x[0].shape) for p in a)

def _length(L:int, K:int) -> int: return max(16, 1 << (L + K - 2).bit_length())

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
RADIX = 8
MAX_N = 1 << 16

def _rotate(x:Pair, w:complex) -> Pair:
  "x·w for a constant w of modulus 1, without the products by 0 and ±1."
  c, s = round(w.real, 15), round(w.imag, 15)
  if s == 0: return x if c == 1 else (-x[0], -x[1])
  if c == 0: return (-x[1], x[0]) if s > 0 else (x[1], -x[0])
  return x[0]*c - x[1]*s, x[0]*s + x[1]*c

def dft(x:list[Pair], sign:int) -> list[Pair]:
  "X[k] = Σ_n x[n] exp(sign 2πi nk/R) of R = 2^m values in registers: a radix-2 tree, written out."
  if (R := len(x)) == 1: return x
  even, odd = dft(x[0::2], sign), dft(x[1::2], sign)
  odd = [_rotate(o, cmath.exp(sign*2j*cmath.pi*i/R)) for i, o in enumerate(odd)]
  return [tuple(f(a, b) for a, b in zip(e, o))
          for f in (operator.add, operator.sub) for e, o in zip(even, odd)]

ZERO = UOp.const(0.0, dtypes.float)

class Group:
  """A work group (GPU), or one turn of the outermost loop (CPU): some channels, hands to work on them.

  On a GPU a group has one channel and a thread a butterfly; tensors are (B,H,L), so that threads
  read neighbours. On a CPU it has as many channels as fill the vector registers, in the innermost
  loop, which clang vectorises; tensors are (B,L,H).
  """
  def __init__(self, H:int, N:int, gpu:bool):
    self.gpu, self.N, self.ids = gpu, N, itertools.count()
    self.lanes = 1 if gpu else self.most_lanes(H, N)
    self.threads = min(N//RADIX, 256)
    self.g = UOp.special(H, "gidx0") if gpu else self.loop(H//self.lanes)
    self.thread = UOp.special(self.threads, "lidx0") if gpu else None
    self.passes, M = [], N           # (M, R): sub-length before the pass, radix; the last has M = R
    while M > RADIX: self.passes.append((M, RADIX)); M //= RADIX
    self.passes.append((M, M))
    self.R = M
  @staticmethod
  def most_lanes(H:int, N:int) -> int:
    "One or two vector registers of channels, and scratch that stays in the cache, on the stack."
    most = {16: 1 << 13, 8: 1 << 16, 4: 1 << 16}
    return next(V for V in (16, 8, 4, 2, 1) if H % V == 0 and V*N <= most.get(V, V*N))
  def loop(self, n:int) -> UOp: return UOp.range(n, next(self.ids))
  def sweep(self, n:int, body:Callable[[UOp, UOp], list[UOp]]) -> UOp:
    "body(t, lane) for t < n, over the threads or in a loop."
    if self.gpu: return UOp.group(*[s for t in range(0, n, self.threads) for s in body(self.thread + t, 0)])
    t, lane = self.loop(n), self.loop(self.lanes)
    return UOp.group(*body(t, lane)).end(lane, t)
  def channel(self, lane:UOp) -> UOp: return self.g*self.lanes + lane
  def cell(self, x:UOp, b:UOp|int, i:UOp, lane:UOp) -> UOp:
    "Place i of this lane's channel in row b of x; of the only channel, if x has one."
    h = 0 if x.shape[1 if self.gpu else 2] == 1 else self.channel(lane)
    return x[b, h, i] if self.gpu else x[b, i, h]
  def pair(self, x:UOp, i:UOp, lane:UOp) -> Pair: return self.cell(x, 0, i, lane), self.cell(x, 1, i, lane)
  def finish(self, done:UOp, name:str) -> UOp:
    return (done if self.gpu else done.end(self.g)).sink(arg=KernelInfo(name=name, opts_to_apply=()))

class Block:
  """N complex numbers a channel in scratch memory, and the passes of their transform, in place.

  Forward by decimation in frequency (natural order in, digit-reversed out), back by decimation in
  time (the reverse): with the spectrum kept digit-reversed nothing is ever reordered. A butterfly
  writes the places it has read and no others, so one barrier a pass is enough. `done` is what has
  to be finished before the next reader.
  """
  def __init__(self, group:Group, tw:UOp, slot:int):
    self.group, self.tw, self.done = group, tw, ()
    # LOCAL on a CPU puts a fence at every loop's end, nothing is vectorised: 6x slower
    space = AddrSpace.LOCAL if group.gpu else AddrSpace.REG
    self.mem = UOp.placeholder((2, group.N, group.lanes), dtypes.float, slot=slot, addrspace=space)
  def sweep(self, n:int, body:Callable, after:tuple=()):
    mem = self.mem.after(*self.done, *after)
    self.done = (self.group.sweep(n, lambda t, lane: body(mem, t, lane)),)
  def get(self, mem:UOp, i:UOp, lane:UOp) -> Pair: return mem[0, i, lane], mem[1, i, lane]
  def put(self, mem:UOp, i:UOp, lane:UOp, z:Pair) -> list[UOp]:
    return [mem[c, i, lane].store(z[c]) for c in range(2)]
  def twiddle(self, x:list[Pair], j:UOp, M:int, sign:int) -> list[Pair]:
    "x[r] · exp(sign 2πi jr/M)"
    w = [tuple(self.tw[c, j*(r*(self.group.N//M))] for c in range(2)) for r in range(len(x))]
    return [z if r == 0 else cmul(z, w[r] if sign < 0 else conj(w[r])) for r, z in enumerate(x)]
  def forward(self, load:Callable[[UOp, int, UOp], Pair]):
    "All passes but the last of X = F x; the first takes x at j + off from load(j, off, lane)."
    N = self.group.N
    for M, R in self.group.passes[:-1]:
      def butterfly(mem:UOp, t:UOp, lane:UOp, M=M, R=R, S=M//R) -> list[UOp]:
        j, i = t%S, t//S*M + t%S
        x = [load(j, r*S, lane) if M == N else self.get(mem, i + r*S, lane) for r in range(R)]
        x = self.twiddle(dft(x, -1), j, M, -1)                                 # x = T · (F_R x)
        return [s for r in range(R) for s in self.put(mem, i + r*S, lane, x[r])]
      self.sweep(N//R, butterfly)
  def inverse(self, store:Callable[[UOp, int, UOp, Pair], list[UOp]]):
    "All passes but the first of x = N F⁻¹ X. The last hands x at j + off to store(j, off, lane, x)."
    N = self.group.N
    for M, R in self.group.passes[-2::-1]:
      def butterfly(mem:UOp, t:UOp, lane:UOp, M=M, R=R, S=M//R) -> list[UOp]:
        j, i = t%S, t//S*M + t%S
        x = [self.get(mem, i + r*S, lane) for r in range(R)]
        x = dft(self.twiddle(x, j, M, +1), +1)                                 # x = F_R* (T* · x)
        put = lambda r: store(j, r*S, lane, x[r]) if M == N else self.put(mem, i + r*S, lane, x[r])
        return [s for r in range(R) for s in put(r)]
      self.sweep(N//R, butterfly)

class Rows:
  """Rows 2p and 2p+1 of a batch as one complex sequence: the filter is real, so the two results come
  out as re and im.

  Past the end of a row, and for the row that an odd batch lacks, reads give 0. Writes go to buffers
  of whole pairs and whole strides (`_padded`), of which views cut the rest off.
  """
  def __init__(self, group:Group, B:int, L:int, p:UOp):
    self.group, self.L, self.S = group, L, group.N//RADIX
    self.rows = ((2*p, None), (2*p + 1, 2*p + 1 < B if B % 2 else None))
  def load(self, j:UOp, off:int, lane:UOp, *factors:UOp) -> Pair:
    "Π factors at j + off"
    if off >= self.L: return ZERO, ZERO
    def read(b:UOp, *inside:UOp|None) -> UOp:
      gate = functools.reduce(lambda a, c: c if a is None else a if c is None else a & c, inside)
      at = b if gate is None else b.valid(gate)
      x = [self.group.cell(x, at, j + off, lane) for x in factors]
      return functools.reduce(operator.mul, x if gate is None else [gate.where(c, 0.0) for c in x])
    inside = j + off < self.L if off + self.S > self.L else None
    return tuple(read(b, inside, there) for b, there in self.rows)
  def store(self, j:UOp, off:int, lane:UOp, out:UOp, z:Pair) -> list[UOp]:
    if off >= self.L: return []
    return [self.group.cell(out, b, j + off, lane).store(c) for (b, _), c in zip(self.rows, z)]

def _padded(B:int, L:int, N:int) -> tuple[int, int]:
  """Whole pairs of rows, and whole strides of the first pass: tinygrad 0.14.0 can lose the condition
  of a store, where it leaves a single place."""
  S = N//RADIX
  return B + B%2, -(-L//S)*S

# ---------------------------------------------------------------- the kernels
@functools.cache
def _spectrum(gpu:bool) -> Callable:
  "kf = F(k + D δ)/N, digit-reversed: k (H,K), D (H,), kf (2,N,H)"
  @functools.cache
  def kernel(kf:UOp, tw:UOp, k:UOp, *D:UOp) -> UOp:
    (H, K), N = k.shape, tw.shape[1]
    g = Group(H, N, gpu)
    z = Block(g, tw, 0)
    def load(j:UOp, off:int, lane:UOp) -> Pair:
      if off >= K: return ZERO, ZERO
      h, inside = g.channel(lane), None if off + N//RADIX <= K else j + off < K
      x = k[h, j + off] if inside is None else inside.where(k[h, (j + off).valid(inside)], 0.0)
      return x + j.eq(0).where(D[0][h], 0.0) if D and off == 0 else x, ZERO
    z.forward(load)
    def last(mem:UOp, t:UOp, lane:UOp) -> list[UOp]:
      X = dft([z.get(mem, t*g.R + r, lane) for r in range(g.R)], -1)
      return [g.cell(kf, c, t*g.R + r, lane).store(X[r][c]*(1/N)) for r in range(g.R) for c in range(2)]
    z.sweep(N//g.R, last)
    return g.finish(z.done[0], f"spectrum_{N}")
  return kernel

@functools.cache
def _spectrum_grad(gpu:bool) -> Callable:
  "dk = Re F⁻¹ dkf, the adjoint of `_spectrum`"
  @functools.cache
  def kernel(dk:UOp, tw:UOp, dkf:UOp) -> UOp:
    (H, K), N = dk.shape, tw.shape[1]
    g = Group(H, N, gpu)
    z = Block(g, tw, 0)
    def first(mem:UOp, t:UOp, lane:UOp) -> list[UOp]:
      X = [_times(g.pair(dkf, t*g.R + r, lane), (1/N, 1/N)) for r in range(g.R)]
      return [s for r, x in enumerate(dft(X, +1)) for s in z.put(mem, t*g.R + r, lane, x)]
    z.sweep(N//g.R, first, after=(g.g,))
    z.inverse(lambda j, off, lane, x:
              [dk[g.channel(lane), j + off].store(x[0])] if off < K else [])
    return g.finish(z.done[0], f"spectrum_grad_{N}")
  return kernel

@functools.cache
def _conv(names:tuple[str, ...], gpu:bool) -> Callable:
  "y = q · F⁻¹(kf · F(u v))"
  @functools.cache
  def kernel(y:UOp, kf:UOp, tw:UOp, *inputs:UOp) -> UOp:
    x, N = dict(zip(names, inputs)), tw.shape[1]
    B, H, L = _turned(x["u"].shape, gpu)
    g = Group(H, N, gpu)
    p = UOp.special(-(-B//2), "gidx1") if gpu else g.loop(-(-B//2))
    rows, z = Rows(g, B, L, p), Block(g, tw, 0)
    w = [x[n] for n in "uv" if n in x]
    z.forward(lambda j, off, lane: rows.load(j, off, lane, *w))                # Z = F (u v)
    def product(mem:UOp, t:UOp, lane:UOp) -> list[UOp]:
      places = [t*g.R + r for r in range(g.R)]
      Z = dft([z.get(mem, i, lane) for i in places], -1)
      Y = [cmul(a, g.pair(kf, i, lane)) for i, a in zip(places, Z)]            # Y = kf · Z
      return [s for i, a in zip(places, dft(Y, +1)) for s in z.put(mem, i, lane, a)]
    z.sweep(N//g.R, product)
    def out(j:UOp, off:int, lane:UOp, c:Pair) -> list[UOp]:                    # y = q · F⁻¹ Y
      if "q" in x: c = _times(c, rows.load(j, off, lane, x["q"]))
      return rows.store(j, off, lane, y, c)
    z.inverse(out)
    return g.finish(z.done[0] if gpu else z.done[0].end(p), f"fftconv_{N}")
  return kernel

@functools.cache
def _conv_grad(names:tuple[str, ...], gpu:bool) -> Callable:
  """The gradients of `_conv`: dkf, and du, dv, dq for those of u, v, q that are there. Nothing is
  kept from the forward pass but its inputs: w = u v and c = k ∗ w are computed anew."""
  @functools.cache
  def kernel(dkf:UOp, *bufs:UOp) -> UOp:
    n = len(names)
    d, (kf, tw, dy), x = dict(zip(names, bufs[:n])), bufs[n:n+3], dict(zip(names, bufs[n+3:]))
    (B, H, L), N = _turned(x["u"].shape, gpu), tw.shape[1]
    g = Group(H, N, gpu)
    z, e, acc = (Block(g, tw, slot) for slot in range(3))
    zero = lambda mem, t, lane: acc.put(mem, t, lane, (ZERO, ZERO))
    acc.sweep(N, zero, after=() if gpu else (g.g,))
    p = g.loop(-(-B//2))             # the pairs of rows in turn, each adds to the spectrum's gradient
    rows, w, gy = Rows(g, B, L, p), [x[n] for n in "uv" if n in x], [dy, *(x[n] for n in "q" if n in x)]
    z.forward(lambda j, off, lane: rows.load(j, off, lane, *w))                # Z = F w
    e.forward(lambda j, off, lane: rows.load(j, off, lane, *gy))               # E = F (q dy)
    def product(zmem:UOp, t:UOp, lane:UOp) -> list[UOp]:
      places = [t*g.R + r for r in range(g.R)]
      emem, total = e.mem.after(*e.done), acc.mem.after(*acc.done, p)
      K = [g.pair(kf, i, lane) for i in places]
      Z, E = (dft([b.get(mem, i, lane) for i in places], -1) for b, mem in ((z, zmem), (e, emem)))
      stores = []
      for i, a, b in zip(places, Z, E):                                        # dkf = Σ_p Z* · E
        s, d = acc.get(total, i, lane), cmul(conj(a), b)
        stores += acc.put(total, i, lane, (s[0] + d[0], s[1] + d[1]))
      W = dft([cmul(conj(k), b) for k, b in zip(K, E)], +1)                    # F dw = kf* · E
      stores += [s for i, a in zip(places, W) for s in e.put(emem, i, lane, a)]
      if "q" in x:
        C = dft([cmul(k, a) for k, a in zip(K, Z)], +1)                        # F c = kf · Z
        stores += [s for i, a in zip(places, C) for s in z.put(zmem, i, lane, a)]
      return stores
    z.sweep(N//g.R, product)
    if "q" in x:                                                               # dq = dy · c
      z.inverse(lambda j, off, lane, c:
                rows.store(j, off, lane, d["q"], _times(c, rows.load(j, off, lane, dy))))
    e.done = z.done
    def out(j:UOp, off:int, lane:UOp, dw:Pair) -> list[UOp]:                   # du = v dw, dv = u dw
      stores = []
      for n, other in (("u", "v"), ("v", "u")) if "v" in x else (("u", None),):
        dn = _times(dw, rows.load(j, off, lane, x[other])) if other else dw
        stores += rows.store(j, off, lane, d[n], dn)
      return stores
    e.inverse(out)
    acc.done = (e.done[0].end(p),)
    acc.sweep(N, lambda mem, t, lane: [g.cell(dkf, c, t, lane).store(s)
                                       for c, s in enumerate(acc.get(mem, t, lane))])
    return g.finish(acc.done[0], f"fftconv_grad_{N}")
  return kernel

def _times(a:Pair, b:Pair) -> Pair: return a[0]*b[0], a[1]*b[1]  # two real rows, two real gates
def _turned(shape:tuple[int, ...], gpu:bool) -> tuple[int, int, int]:
  "(B,H,L) to the layout of the device's kernels, or back: the CPU's have the channels last."
  a, b, c = shape
  return (a, b, c) if gpu else (a, c, b)

# ---------------------------------------------------------------- the public function
@functools.cache
def _twiddles(N:int, device:str) -> Tensor:
  w = np.exp(-2j*np.pi/N * np.arange(N))
  return Tensor(np.stack([w.real, w.imag]).astype(np.float32), device=device).realize()

def _gpu(device:str) -> bool: return Device[device].renderer.has_local

def _float_on_cpu(*tensors:Tensor|None) -> bool:
  "Whether the CPU's matrix product and layer norm serve: float32, on one device without local memory."
  device = tensors[0].device
  return bool(FLASH) and all(t is None or t.dtype == dtypes.float for t in tensors) \
    and isinstance(device, str) and not _gpu(device)

def _stored(x:Tensor) -> Tensor:
  "x in storage of its own, copied only if it is a view or an expression: the kernels take no views."
  return x if x.uop.has_buffer_identity(after_ok=True) else x.contiguous()

def _launch(fxn:Callable, outs:list[Tensor], ins:list[Tensor], grad_fxn:Callable|None=None) -> list[Tensor]:
  return outs[0].custom_kernel(*outs[1:], *(_stored(x) for x in ins), fxn=fxn, grad_fxn=grad_fxn)[:len(outs)]

def _spectrum_of(k:Tensor, D:Tensor|None, N:int, gpu:bool) -> Tensor:
  "kf of a filter; differentiable in k and D."
  tw, (H, K), D = _twiddles(N, k.device), k.shape, [] if D is None else [D]
  empty = functools.partial(Tensor.empty, device=k.device)
  def grad(dkf:UOp, call:UOp) -> tuple:
    dk = _launch(_spectrum_grad(gpu), [empty(H, _padded(1, K, N)[1])], [tw, Tensor(dkf)])[0]
    return None, None, dk[:, :K].uop, *(dk[:, 0].uop for _ in D)               # dD = dk at lag 0
  kf = empty(*_turned((2, H, N), gpu))
  return _launch(_spectrum(gpu), [kf], [tw, k, *D], grad)[0]

def fftconv(u:Tensor, k:Tensor, D:Tensor|None=None, v:Tensor|None=None, q:Tensor|None=None,
            channels_last:bool=False) -> Tensor:
  """y = q * (k ∗ (u*v) + D*(u*v)): the causal convolution along the last axis, gated before, after.

  u, v, q, y (B,H,L) float32, or (B,L,H) with channels_last, which is what the CPU's kernel reads;
  k (H,K), or (1,K), one filter for all channels; taps past L do nothing; D (H,). Left out, v and q
  are 1 and D is 0. Any B, H, L, K ≥ 1. Differentiable in every argument, works in TinyJit; plain
  ops (`fftconv_ref`) where no kernel serves. Raises ValueError when shapes don't fit.
  Sources: paper section 4; HazyResearch/H3 src/ops/fftconv.py:53-103.
  """
  inputs = {n: x for n, x in (("u", u), ("v", v), ("q", q)) if x is not None}
  H = u.shape[2 if channels_last else 1] if u.ndim == 3 else 0
  if u.ndim != 3 or k.ndim != 2 or k.shape[0] not in (1, H) or any(x.shape != u.shape for x in inputs.values()) \
     or (D is not None and D.shape != (H,)):
    got = (f"{n} {x.shape}" for n, x in {**inputs, "k": k, "D": D}.items() if x is not None)
    raise ValueError("fftconv: u, v, q are (B,H,L), or (B,L,H) with channels_last, k (H,K) or (1,K), "
                     f"D (H,); got {', '.join(got)}")
  L = u.shape[1 if channels_last else 2]
  k, turned = k[:, :L], lambda x: None if x is None else x.transpose(1, 2)
  N = _length(L, k.shape[1])
  if not serves(u.device, N) or any(x.dtype != dtypes.float for x in (k, *inputs.values(), *([] if D is None else [D]))):
    if not channels_last: return fftconv_ref(u, k, D, v, q)
    return turned(fftconv_ref(turned(u), k, D, turned(v), turned(q)))
  gpu, tw, names = _gpu(u.device), _twiddles(N, u.device), tuple(inputs)
  if D is not None: k = k.expand(H, k.shape[1])           # D makes every channel's filter its own
  kf = _spectrum_of(k, D, N, gpu)
  turn = turned if gpu == channels_last else lambda x: x  # to the kernel's layout and back
  B, (Bp, Lp) = u.shape[0], _padded(u.shape[0], L, N)
  cut = lambda x: x[:B, :, :L] if gpu else x[:B, :L]
  empty = lambda *shape: Tensor.empty(*_turned(shape, gpu), device=u.device)
  def grad(dy:UOp, call:UOp) -> tuple:
    kf, tw, *x = (Tensor(s) for s in call.src[2:])
    outs, ins = [empty(2, H, N), *(empty(Bp, H, Lp) for _ in names)], [kf, tw, cut(Tensor(dy)), *x]
    dkf, *d = _launch(_conv_grad(names, gpu), outs, ins)
    if k.shape[0] == 1: dkf = dkf.sum(1 if gpu else 2, keepdim=True)
    return None, dkf.uop, None, *(cut(x).uop for x in d)
  ins = [kf, tw, *(turn(x) for x in inputs.values())]
  return turn(cut(_launch(_conv(names, gpu), [empty(Bp, H, Lp)], ins, grad)[0]))

def serves(device:str|tuple, N:int) -> bool:
  "Whether a kernel for FFT length N runs on the device: asked of its renderer, never of its name."
  if not FLASH or not isinstance(device, str): return False
  return 3*8*N <= Device[device].renderer.shared_max if _gpu(device) else N <= MAX_N

# ---------------------------------------------------------------- the matrix product, where tinygrad's own is slow
# Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (TOMS 2008), with one
# level of blocking: a (KB, NT) panel of B, which stays in the L1 cache, meets MT rows of A at a time
# in a tile of MT x NT sums, which stays in registers.
# GFLOPS on one core of a Xeon with AVX-512, clang 14, best of 25 (dx = dy w^T, dw = x^T dy):
#   M x K x N                tinygrad        this kernel     PyTorch, 1 thread
#                          y   dx   dw      y   dx   dw       y   dx   dw
#   2048 x 128 x 512      18   15    2    102   88   95     182  173  165
#   2048 x 256 x 257       4    6    2     85   89   74     168  178  153
#   32 x 256 x 32 x 256   29   23   20     83   87   64     166  158  147
#   16 x 768 x 768        10   12          39   35          140   99          (launching: 0.17 ms of 0.5)
#   1 x 768 x 768          1    1           4    3           25   22          (0.17 ms of 0.3)
# 3x32 floats are 12 AVX registers; with a vector of B and 3 broadcast entries of A that is all 16 of AVX2.
# One more row spills, and a spilled sum's store and reload halve the speed: 45 GFLOPS against 99 (-march=haswell).
# Below SMALL multiplications tinygrad's own product is as fast.
MT, NT, KB, SMALL = 3, 32, 256, 1 << 16

def gemm(C:UOp, A:UOp, B:UOp, *bias:UOp, ta:bool, tb:bool) -> UOp:
  "C (G,M,N) = A (G,M,K) B (G,K,N) + bias (N,) for each g; ta: A is stored (G,K,M), tb: B is stored (G,N,K)."
  (G, M, N), K = C.shape, A.shape[1 if ta else 2]
  blocks = -(-K//KB)
  mt, nt, kb = min(MT, M), min(NT, N), -(-K//blocks)
  a = lambda r, k: A[g, k, r] if ta else A[g, r, k]
  b = lambda k, c: B[g, c, k] if tb else B[g, k, c]
  reg = lambda slot, *shape: UOp.placeholder(shape, dtypes.float, slot=slot, addrspace=AddrSpace.REG)
  # A stored by columns is read in scattered lines; all panels of one block of K in turn find them in the L2 cache
  # (up to a fifth faster). Not where the last panel overlaps, see below: its sums would count a block twice.
  k_outside = ta and N % nt == 0
  g, io = UOp.range(G, 0), UOp.range(-(-M//mt), 3)
  jo, ko = UOp.range(-(-N//nt), 1 + k_outside), UOp.range(blocks, 2 - k_outside)
  # Sizes that the tile does not divide: the last panel starts early enough to end at column N, the last tile of rows
  # repeats row M-1; both store the same values again. The last block of K starts early too, and the rows of its
  # panel that were counted before are zero.
  j0, k0 = (jo*nt).minimum(N-nt), (ko*kb).minimum(K-kb)
  rows = [(io*mt + i).minimum(M-1) for i in range(mt)]

  # panel = B[k0:k0+kb, j0:j0+nt], in the order in which it will be read
  p, v = UOp.range(kb, 4), UOp.range(nt, 5)
  entry = b(k0+p, j0+v) if K % kb == 0 else (k0+p < ko*kb).where(0.0, b(k0+p, j0+v).load())
  panel = reg(0, kb, nt)
  panel = panel.after(panel.after(ko, jo, g)[p, v].store(entry).end(*((p, v) if tb else (v, p))))

  # acc = bias in the first block of K, what the blocks before have summed up in the others
  z, acc = UOp.range(nt, 6), reg(1, mt, nt)
  start = bias[0][j0+z] if bias else UOp.const(0.0, dtypes.float)
  first = [start if blocks == 1 else (ko > 0).where(C.after(ko)[g, r, j0+z].load(), start) for r in rows]
  acc = acc.after(UOp.group(*[acc.after(io, panel)[i, z].store(f) for i, f in enumerate(first)]).end(z))

  # acc += A[rows, k] panel[k, :]; the loop over j is unrolled and vectorised by the compiler
  k, j = UOp.range(kb, 7, AxisType.REDUCE), UOp.range(nt, 8)
  s = acc.after(k)
  fma = [s[i, j].store(s[i, j] + a(r, k0+k)*panel[k, j]) for i, r in enumerate(rows)]
  acc = acc.after(UOp.group(*fma).end(j).end(k))

  # C = acc, a loop for each row: the compiler can't tell that the rows do not overlap
  out = [C[g, r, j0+(o:=UOp.range(nt, 9+i))].store(acc[i, o]).end(o) for i, r in enumerate(rows)]
  name = f"gemm_{'nt'[ta]}{'nt'[tb]}_{G}x{M}x{K}x{N}"
  inner, outer = (jo, ko) if k_outside else (ko, jo)
  done = UOp.group(*out).end(io).end(inner).end(outer).end(g)
  return done.sink(arg=KernelInfo(name=name, opts_to_apply=()))

@functools.cache
def _ones(n:int, device:str) -> Tensor: return Tensor(np.ones((1, 1, n), np.float32), device=device).realize()

def product(a:Tensor, b:Tensor, *bias:Tensor, ta:bool=False, tb:bool=False) -> Tensor:
  """(G,M,K) (G,K,N) + bias (N,) -> (G,M,N), a or b transposed first where ta or tb say so.
  Differentiable, any number of times."""
  def grad(dy:UOp, call:UOp) -> tuple[UOp|None, ...]:
    g, a, b = Tensor(dy), *(Tensor(s) for s in call.src[2:4])
    # dA = dY B^T, dB = A^T dY, or their transposes B dY^T, dY^T A
    da = product(b, g, ta=tb, tb=True) if ta else product(g, b, tb=not tb)
    db = product(g, a, ta=True, tb=ta) if tb else product(a, g, ta=not ta)
    # tinygrad's own sum over rows takes 8 ms where this takes 0.2 ms, (4096,128) on a CPU
    dbias = [product(_ones(g.shape[1], g.device), g).reshape(x.shape).uop for x in bias]
    return None, da.uop, db.uop, *dbias
  shape = a.shape[0], a.shape[2 if ta else 1], b.shape[1 if tb else 2]
  y = Tensor.empty(*shape, dtype=dtypes.float, device=a.device)
  return _launch(functools.partial(gemm, ta=ta, tb=tb), [y], [a, b, *bias], grad)[0]

def matmul(x:Tensor, w:Tensor, transposed:bool=False, bias:Tensor|None=None) -> Tensor:
  """x @ w + bias -> (…,M,N): x (…,M,K); w (K,N), or (…,K,N) with x's leading dimensions; bias (N,).

  transposed=True is x @ w^T, for w stored as (…,N,K), the way checkpoints keep it. Differentiable
  in all three. A kernel of our own on the CPU, from SMALL multiplications on; else tinygrad's.
  """
  K, N = w.shape[-2:][::-1 if transposed else 1] if w.ndim > 1 else (0, 0)
  fits = _float_on_cpu(x, w, bias) and all_int(x.shape + w.shape) and x.shape[-1] == K
  fits = fits and (w.ndim == 2 or (x.shape[:-2] == w.shape[:-2] and bias is None))
  # a small product costs less where tinygrad can fuse it with what stands around it
  if not fits or prod(x.shape)*N < SMALL:
    y = x @ (w.transpose(-1, -2) if transposed else w)
    return y if bias is None else y + bias
  a = x.reshape(1, -1, K) if w.ndim == 2 else x.reshape(-1, *x.shape[-2:])
  y = product(a, w.reshape(-1, *w.shape[-2:]), *([] if bias is None else [bias]), tb=transposed)
  return y.reshape(*x.shape[:-1], N)

# ---------------------------------------------------------------- layer norm: one launch forward, one back
# (4096,128) with its gradients, one core: tinygrad 9 launches and 11.0 ms, these two 0.9 ms.

def _row_sums(m:UOp, D:int, ids:itertools.count) -> Callable:
  """total(f): Σ_i f(i) over row m, in V sums side by side: a compiler may not reorder the additions
  of a single sum to fill its vector registers."""
  V = next(V for V in (16, 8, 4, 2, 1) if D % V == 0)
  def total(f:Callable[[UOp], UOp]) -> UOp:
    z, c, v = UOp.range(V, next(ids)), UOp.range(D//V, next(ids), AxisType.REDUCE), UOp.range(V, next(ids))
    acc = UOp.placeholder((V,), dtypes.float, slot=next(ids), addrspace=AddrSpace.REG)
    acc = acc.after(acc.after(m)[z].store(0.0).end(z))
    s = acc.after(c)
    acc = acc.after(s[v].store(s[v] + f(c*V + v)).end(v).end(c))
    return functools.reduce(lambda a, b: a + b, [acc[i] for i in range(V)])
  return total

def _normalised(x:UOp, m:UOp, total:Callable, eps:float) -> tuple[Callable, UOp]:
  "i → (x - mean)/deviation, and 1/deviation, of row m"
  D = x.shape[1]
  mean = total(lambda i: x[m, i]) * (1/D)
  r = 1 / (total(lambda i: (x[m, i] - mean)*(x[m, i] - mean)) * (1/D) + eps).sqrt()
  return lambda i: (x[m, i] - mean)*r, r

def _norm(y:UOp, x:UOp, w:UOp, b:UOp, eps:float) -> UOp:
  (M, D), ids, m = x.shape, itertools.count(1), UOp.range(x.shape[0], 0)
  hat, _ = _normalised(x, m, _row_sums(m, D, ids), eps)
  i = UOp.range(D, next(ids))
  return y[m, i].store(hat(i)*w[i] + b[i]).end(i, m).sink(arg=KernelInfo(name=f"layernorm_{M}x{D}", opts_to_apply=()))

def _norm_grad(dx:UOp, dw:UOp, db:UOp, x:UOp, w:UOp, dy:UOp, eps:float) -> UOp:
  "dx = (g - mean g - hat·mean(g hat))/deviation with g = w dy;  dw = Σ_m hat dy, db = Σ_m dy"
  (M, D), ids, m = x.shape, itertools.count(1), UOp.range(x.shape[0], 0)
  z, i, o = (UOp.range(D, next(ids)) for _ in range(3))
  sums = [UOp.placeholder((D,), dtypes.float, slot=next(ids), addrspace=AddrSpace.REG) for _ in range(2)]
  zero = UOp.group(*[s[z].store(0.0) for s in sums]).end(z)
  total = _row_sums(m, D, ids)
  hat, r = _normalised(x, m, total, eps)
  g, gh = (total(f) * (1/D) for f in (lambda i: dy[m, i]*w[i], lambda i: dy[m, i]*w[i]*hat(i)))
  sw, sb = (s.after(zero, m) for s in sums)
  row = UOp.group(dx[m, i].store(r*(dy[m, i]*w[i] - g - hat(i)*gh)),
                  sw[i].store(sw[i] + dy[m, i]*hat(i)), sb[i].store(sb[i] + dy[m, i])).end(i, m)
  done = UOp.group(*[d[o].store(s.after(row)[o]) for d, s in zip((dw, db), sums)]).end(o)
  return done.sink(arg=KernelInfo(name=f"layernorm_grad_{M}x{D}", opts_to_apply=()))

def layernorm(x:Tensor, w:Tensor, b:Tensor, eps:float=1e-5) -> Tensor:
  "(x - mean)/sqrt(variance + eps) · w + b over the last axis: x (…,D), w, b (D,). Differentiable once in all three."
  if not _float_on_cpu(x, w, b): return x.layernorm(eps=eps)*w + b
  rows, empty = x.reshape(-1, x.shape[-1]), functools.partial(Tensor.empty, device=x.device)
  def grad(dy:UOp, call:UOp) -> tuple:
    x, w = (Tensor(s) for s in call.src[2:4])
    outs = [empty(*x.shape), empty(*w.shape), empty(*w.shape)]
    return None, *(o.uop for o in _launch(functools.partial(_norm_grad, eps=eps), outs, [x, w, Tensor(dy)]))
  return _launch(functools.partial(_norm, eps=eps), [empty(*rows.shape)], [rows, w, b], grad)[0].reshape(x.shape)

# ---------------------------------------------------------------- the device
def _is_clang(command:str) -> bool:
  "gcc does not know tinygrad's options; a Mac without its developer tools has a clang that only says so."
  try: return "clang" in subprocess.run([command, "--version"], capture_output=True, text=True).stdout
  except OSError: return False

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
  if FLASH and not _gpu(Device.DEFAULT) and "NOOPT" not in os.environ: NOOPT.value = 1
  # tinygrad's compile workers live on instead of starting anew: the first step 9.6 s, not 12.3
  os.environ.setdefault("BEAM_MAX_TASKS_PER_CHILD", "100000")
