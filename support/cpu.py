"""What tinygrad's CPU device lacks: fast matrix products, norms, softmax, embeddings, decoding in place, all cores.

`setup_device()` is what a program calls before it touches a device.
"""
from __future__ import annotations
import ctypes, dataclasses, functools, hashlib, importlib.metadata, importlib.util, itertools
import math, mmap, multiprocessing, operator, os, pickle, queue, signal, sqlite3, subprocess, sys, threading
import time
from typing import Callable, Sequence
import numpy as np
from tinygrad import Device, Tensor, UOp, codegen, dtypes, helpers, nn, tensor
from tinygrad.codegen.opt import KernelOptError, Opt, OptOps
from tinygrad.codegen.opt.postrange import Scheduler
from tinygrad.dtype import AddrSpace, DType
from tinygrad.engine import jit as tinyjit, realize, worker
from tinygrad.engine.jit import _TinyJit
from tinygrad.helpers import (NOOPT, all_int, cache_dir, diskcache_get, diskcache_put, mv_address,
                              prod)
from tinygrad.renderer import Estimates, cstyle
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, graph_rewrite
import flashconv
from flashconv import (CHECKS, FAST, FLASH, HALF, LOCK, ONE_CORE, WIDE, Machine, Pair, _compiler_macros, _compiler_says,
                       _cores, _float_on_cpu, bound, constant, launch, machine, no_second_gradient,
                       on_one_device, selfcheck, stored, stored_backward, whole, widened)

PLAIN_DOT, PLAIN_LINEAR, PLAIN_SOFTMAX = Tensor.dot, Tensor.linear, Tensor.softmax     # tinygrad's own
PLAIN_NORM = nn.LayerNorm.__call__
SHARED = 1 << 17                     # size of the loops of tinygrad's own kernels from which cores share them

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
  if G == 1: return stored_backward(PLAIN_DOT(stored(x), w, dtype=sums))
  y = PLAIN_DOT(stored(x).reshape(G, M//G, -1), stored_backward(w.expand(G, *w.shape)), dtype=sums)
  return stored_backward(y).reshape(*x.shape[:-1], -1)

def multiply(x:Tensor, w:Tensor, transposed:bool=False, bias:Tensor|None=None, sums:DType|None=None) -> Tensor:
  """x @ w + bias -> (…,M,N): x (…,M,K); w (K,N), or (…,K,N) with x's leading dimensions, or any
  if x is (M,K); bias (N,).

  transposed=True is x @ w^T, for w stored as (…,N,K), the way checkpoints keep it. Differentiable
  in all three. w may be in half precision (WEIGHTS), which is widened as it is read; so may x where `sums` is float32.
  A kernel of our own on the CPU, from SMALL multiplications on; else tinygrad's.
  """
  x, w, bias = on_one_device(x, w, bias)
  K, N = w.shape[-2:][::-1 if transposed else 1] if w.ndim > 1 else (0, 0)
  fits = sums == dtypes.float or (sums is None and x.dtype == dtypes.float)
  fits = fits and _float_on_cpu(bias, small=(x, w)) and all_int(x.shape + w.shape) and x.ndim > 0 and x.shape[-1] == K
  fits = fits and (w.ndim == 2 or (x.shape[:-2] in ((), w.shape[:-2]) and bias is None))
  # a small product costs less where tinygrad can fuse it with what stands around it
  large = all_int(x.shape + w.shape) and prod(x.shape)*N*(prod(w.shape[:-2]) if x.ndim == 2 else 1) >= SMALL
  if not fits or not large:
    w = w.transpose(-1, -2) if transposed else w
    if x.dtype == dtypes.float and w.dtype == dtypes.ushort: w = widened(w)
    gpu = FLASH and large and whole(x) and machine(x.device).gpu
    y = _plain_product(x, w, sums) if gpu else PLAIN_DOT(x, w, dtype=sums)
    return y if bias is None else y + bias
  a = x.reshape(1, -1, K) if w.ndim == 2 else x.reshape(-1, *x.shape[-2:])
  y = product(a, w.reshape(-1, *w.shape[-2:]), *([] if bias is None else [bias]), tb=transposed)
  return y.reshape(*(x.shape[:-2] or w.shape[:-2]), x.shape[-2], N) if x.ndim > 1 else y.reshape(N)

def matmul(x:Tensor, w:Tensor, transposed:bool=False, bias:Tensor|None=None) -> Tensor:
  "`multiply`, in half precision where HALF asks for it and w is a matrix of weights."
  if not HALF or w.ndim != 2 or not x.dtype == w.dtype == dtypes.float: return multiply(x, w, transposed, bias)
  x, w = (t.cast((dtypes.half, dtypes.bfloat16)[HALF.value-1]) for t in (x, w))
  return multiply(x, w, transposed, bias, dtypes.float)

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
    return PLAIN_SOFTMAX(seen.where(s, -math.inf))
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

# ---------------------------------------------------------------- tinygrad's own words, answered by the kernels
# Models are written with nn.Linear, nn.LayerNorm, nn.Embedding, `@` and softmax, and with the `replaceable` definitions.
# After `answer_with_kernels` these run the kernels above wherever they serve, and else what they ran before.

def _stored_transpose(w:Tensor) -> Tensor|None:
  "The Tensor whose last two dimensions were swapped to make w, which is read as it is stored; None if w is no such view."
  cast = w.uop.op is Ops.CAST
  view = w.uop.src[0] if cast else w.uop
  if w.ndim < 2 or view.op is not Ops.PERMUTE or view.arg != (*range(w.ndim - 2), w.ndim - 1, w.ndim - 2): return None
  return Tensor(view.src[0]).cast(w.dtype) if cast else Tensor(view.src[0])

def _dot(self:Tensor, w:Tensor, dtype:DType|None=None) -> Tensor:
  if dtypes.ushort in (self.dtype, w.dtype) or dtype not in (None, dtypes.float): return PLAIN_DOT(self, w, dtype)
  stored_w = _stored_transpose(w)
  return multiply(self, w, sums=dtype) if stored_w is None else multiply(self, stored_w, True, sums=dtype)

def _linear(self:Tensor, weight:Tensor, bias:Tensor|None=None, dtype:DType|None=None) -> Tensor:
  "x weight + bias. A weight of uint16 holds bfloat16 (WEIGHTS)."
  if dtype is not None or weight.ndim != 2: return PLAIN_LINEAR(self, weight, bias, dtype)
  stored_w = _stored_transpose(weight)
  return matmul(self, weight, False, bias) if stored_w is None else matmul(self, stored_w, True, bias)

def _layernorm(self:nn.LayerNorm, x:Tensor) -> Tensor:
  if self.weight is None or self.bias is None or self.axis != (-1,): return PLAIN_NORM(self, x)
  return layernorm(x, self.weight, self.bias, self.eps)

def _softmax_method(self:Tensor, axis:int=-1, dtype:DType|None=None) -> Tensor:
  if dtype is not None or self.ndim == 0 or axis not in (-1, self.ndim - 1): return PLAIN_SOFTMAX(self, axis, dtype)
  return softmax(self) if _float_on_cpu(self) and self.shape[-1] <= MAX_ROW else PLAIN_SOFTMAX(self, axis)

def _embedding_call(self:nn.Embedding, ids:Tensor) -> Tensor: return embedding(ids, self.weight)

def _lookup(table:Tensor, ids:Tensor) -> Tensor: return embedding(ids, table)

def _attention(q:Tensor, k:Tensor, v:Tensor, pos:Tensor|None=None, start:Tensor|None=None, causal:bool=True
               ) -> Tensor|None:
  """softmax(q k^T / sqrt(hd)) v: q (B,heads,L,hd), k, v (B,heads,T,hd). Causal: row i sees columns up to pos + i and none
  before start, but its own."""
  if not _float_on_cpu(q, k, v) or k.shape[2] > MAX_ROW: return None
  if causal and pos is not None and q.shape[2] == 1: return attend_step(q.squeeze(2), k, v, pos, start).unsqueeze(2)
  s = matmul(q * q.shape[-1]**-0.5, k, transposed=True)
  return matmul(causal_softmax(s, pos, start) if causal else softmax(s), v)

def _overwriting_step(q:Tensor, k:Tensor, v:Tensor, state:tuple[Tensor, ...], weights:tuple[Tensor|Pair, ...]
                      ) -> tuple[Tensor, tuple[Tensor, ...]]|None:
  "h3_step with states (B,D,N) and twice (B,D,M), and named tuples."
  flat = [t for w in weights for t in (w if isinstance(w, tuple) else (w,))]
  if state[1].shape[:2] != q.shape or (done := h3_step(q, k, v, tuple(state), tuple(flat))) is None: return None
  return done[0], type(state)(*done[1])

def _written_cache(cache:Tensor, x:Tensor, pos:Tensor) -> Tensor|None: return write(cache, x, pos) if whole(x) else None

def answer_with_kernels():
  "Lets tinygrad's own words be answered by the kernels above."
  Tensor.dot, Tensor.linear, Tensor.softmax = _dot, _linear, _softmax_method
  nn.LayerNorm.__call__, nn.Embedding.__call__ = _layernorm, _embedding_call
  FAST.update(lookup=_lookup, h3_step=_overwriting_step, attend=_attention, write_cache=_written_cache)

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

class Programs(dict):
  """tinygrad's lowered programs, kept on disk too, where it keeps compiled sources alone.

  The key on disk holds what a program depends on: the kernel, the renderer and its options (tinygrad's own key), the
  versions of tinygrad and of the compiler, and for the CPU what the compiler knows of the processor. A row that is not
  what was written counts as missing. SQLite keeps processes that write at the same time apart.
  """
  table = "h3tiny_programs"
  @functools.cached_property
  def versions(self) -> str: return f"{importlib.metadata.version('tinygrad')} {_compiler_macros()}"
  def place(self, key:tuple) -> str:
    kernel, renderer, target, *options = key
    which = self.versions if target.device == "CPU" else importlib.metadata.version("tinygrad")
    return hashlib.sha256(repr((kernel, renderer.__qualname__, target, options, which)).encode()).hexdigest()
  def __missing__(self, key:tuple) -> UOp:
    found = self.read(key)
    if found is None: raise KeyError(key)
    super().__setitem__(key, found)
    return found
  def read(self, key:tuple) -> UOp|None:
    try:
      checksum, program = diskcache_get(self.table, self.place(key))
      return pickle.loads(program) if hashlib.sha256(program).digest() == checksum else None
    except Exception: return None                       # none, or a damaged one
  def get(self, key:tuple, default:UOp|None=None) -> UOp|None:
    try: return self[key]
    except KeyError: return default
  def __contains__(self, key:tuple) -> bool: return self.get(key) is not None
  def __setitem__(self, key:tuple, program:UOp):
    super().__setitem__(key, program)
    data = pickle.dumps(program)
    try: diskcache_put(self.table, self.place(key), (hashlib.sha256(data).digest(), data))
    except sqlite3.Error: pass                          # no room, or nobody may write there

def keep_programs():
  "Lets tinygrad find its lowered programs on disk."
  if not isinstance(codegen.to_program_cache, Programs):
    codegen.to_program_cache = realize.to_program_cache = Programs(codegen.to_program_cache)

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
    if _compiler_says("__AVX512F__") and WIDE not in device.arch: device.arch += f",{WIDE}"
    use_all_cores()
  answer_with_kernels()
  guard_tinygrad()
  keep_programs()
  # tinygrad's compile workers live on instead of starting anew: the first step 9.6 s, not 12.3
  os.environ.setdefault("BEAM_MAX_TASKS_PER_CHILD", "100000")


def check_kernels():
  """selfcheck once for a device, tinygrad version and state of this file; where it fails, one line on
  stderr, and plain ops from here on."""
  if not FLASH: return
  code = hashlib.sha256()
  for path in (__file__, flashconv.__file__):
    with open(path, "rb") as f: code.update(f.read())
  version = importlib.metadata.version("tinygrad")
  key = f"{Device[Device.DEFAULT].renderer.target} {os.environ.get('CC')} {version} {code.hexdigest()}"
  if diskcache_get("h3tiny_selfcheck", key): return
  try: selfcheck()
  except RuntimeError as e:
    FLASH.value = 0
    if "NOOPT" not in os.environ: NOOPT.value = 0
    print(f"warning: {e}; going on without custom kernels (FLASH=0), slower", file=sys.stderr)
  else: diskcache_put("h3tiny_selfcheck", key, True)


CHECKS["matmul"] = lambda x, w, b: matmul(x, w, bias=b), None, (50, 35), (50, 40), (40, 35), (35,)
CHECKS["layernorm"] = layernorm, None, (5, 24), (5, 24), (24,), (24,)
