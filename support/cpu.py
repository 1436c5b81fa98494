"""Supplies what tinygrad lacks: kernels for models; on a CPU all cores, programs kept on disk.

A program calls `setup_device()` before it touches a device. From then on, on a CPU,
  nn.Linear, `@`                       run the matrix product below, a bias in the same launch;
  nn.LayerNorm, nn.Embedding, softmax  take one launch forward and one backward;
  attend                               (`replaceable`, in h3tiny.py) stores no matrix of scores;
  fftconv                              (likewise, in flashconv.py) needs no FFT for few taps;
  write_cache, h3_step                 (likewise) overwrite states in place;
  every kernel                         is shared by the cores, and a TinyJit replays without Python;
  a second process                     finds its schedules and lowered kernels on disk;
  the first one                        compiles while graphs are still built (support/compiling.py).
On a GPU products (in tiles, where that is faster), nn.LayerNorm, nn.Embedding, write_cache and
h3_step run too, and `surprisal` of the logits, which is for GPUs alone.
FLASH=0 turns all of it off but what is kept on disk.

The file in order: what kernels share · the matrix product · layer norm · softmax · attention ·
embedding · the loss · short filters · decoding · tinygrad's own words · the cores · threads, forks
and Ctrl-C · schedules and programs on disk · the compile workers · setup.
How a kernel is written, what `after` and `end` order: flashconv.py, before `conv_kernel`.

Not here: second derivatives, but of the products; half precision, but for factors of products,
which NVIDIA's tensor cores multiply; elsewhere they are multiplied as float32s.
"""
from __future__ import annotations
import contextlib
import ctypes
import dataclasses
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import itertools
import math
import mmap
import multiprocessing
import operator
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import zlib
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Callable, Sequence
import numpy as np
import tinygrad
from tinygrad import Device, Tensor, UOp, codegen, dtypes, helpers, nn, schedule, tensor
from tinygrad.codegen.opt import KernelOptError, Opt, OptOps, tc
from tinygrad.codegen.opt.postrange import Scheduler
from tinygrad.device import Buffer, Compiled, TinyELF
from tinygrad.dtype import DType
from tinygrad.engine import jit as tinyjit, realize, worker
from tinygrad.helpers import (CCACHE, EMULATED_DTYPES, NOOPT, TRAINING, all_int, cache_dir, ceildiv,
                              diskcache_get, diskcache_put, prod, round_up)
from tinygrad.renderer import Estimates, cstyle
from tinygrad.runtime.ops_cpu import BufferSpec, CPUAllocator, CPUProgram, HCQBuffer
from tinygrad.uop.ops import AxisType, CallInfo, KernelInfo, Ops, graph_rewrite
import flashconv
from flashconv import (CHECKS, FAST, FLASH, LOCK, ONE_CORE, VECTORS, WEIGHTS, Machine, Stores,
                       Value, Workers, bound, cmul, divisor, launch, machine,
                       no_second_gradient, on_one_device, only_if, opened, selfcheck, stored,
                       stored_backward, whole, widened)
from support.compiling import Batches, batches
from support.text import SIGNALS, waiting

# ================================================================ what the kernels share

def serves(*tensors:Tensor, weights:Sequence[Tensor]=(), gpu:bool=False) -> bool:
  """Whether a kernel takes these: not empty, whole on a device, float32.

  weights: Tensors that may be of any type of WEIGHTS, or bfloat16. gpu: the device may be a GPU.
  """
  every = *tensors, *weights
  return bool(FLASH) and whole(*every) and (gpu or not machine(every[0].device).gpu) \
    and all(t.dtype == dtypes.float for t in tensors) \
    and all(t.dtype in (*WEIGHTS.values(), dtypes.bfloat16) for t in weights) \
    and all(all_int(t.shape) and 0 not in t.shape for t in every)

def few_or_all_cores(x:Tensor) -> Machine:
  "The machine of x's device, with one core where a norm of x takes less time than sharing it."
  m = machine(x.device)
  return m._replace(cores=1) if x.numel() < ONE_CORE//8 else m

class Body(Workers):
  """The body of a kernel while it is written, in the order in which it runs.

  threads: of a GPU's work group; a loop that they `share` has a multiple of as many turns.
  """
  def __init__(self, m:Machine, n:int, threads:int=1):
    super().__init__(m, n)
    self.threads = threads if m.gpu else 1
    self.t = UOp.special(threads, "lidx0") if m.gpu else 0

  @contextlib.contextmanager
  def share(self, n:int):
    "A loop over i < n, shared by the threads of a group; i is the same thread's each time."
    assert n % self.threads == 0
    with self.over(n//self.threads, barrier=False) as turn: yield turn*self.threads + self.t

  def put(self, place:UOp, x:UOp|float, ok:UOp|None=None):
    "place = x, where ok; then place is in memory of one axis."
    self.done = *self.done, only_if(ok, place.store(x))

  def put_once(self, place:UOp, x:UOp|float):
    "place = x, by one thread of a group; place is in memory of one axis."
    self.put(place, x, self.t.eq(0) if self.m.gpu else None)

  def add(self, place:UOp, x:UOp):
    "place += x"
    self.put(place, place + x)

  def ordered(self, memory:UOp) -> Value:
    "Its elements by index, each as it is when all that has been written so far is done."
    return lambda *i: memory.after(*self.done)[i]

  def array(self, *shape:int, dtype:DType=dtypes.float) -> Value:
    "A core's own numbers, in registers or on the stack; shared by a GPU's group."
    return self.ordered(self.memory(*shape, shared=True, dtype=dtype))

  def own(self, *shape:int) -> Value:
    """Numbers by index, of which each thread of a group has in registers those of its turns of a
    loop that they `share`; the last index is the loop's."""
    numbers = self.ordered(self.memory(*shape[:-1], shape[-1]//self.threads))
    return lambda *i: numbers(*i[:-1], i[-1]//self.threads)

  def totals(self, n:int, *terms:Callable[[UOp], UOp], both:Callable=operator.add,
             start:float=0.0, vectors:int=1) -> list[UOp]:
    """The sum over i < n of each of the terms(i); with UOp.maximum and -inf the largest.

    As many sums side by side as fill so many vectors, then halves are added to halves: a compiler
    may not reorder the additions of a single sum to fill its vector registers. On a GPU one a
    thread, in a register, and each thread adds up all of them.
    """
    width = self.threads if self.m.gpu else math.gcd(n, vectors*self.m.lanes)
    each = range(len(terms))
    sums = self.own(len(terms), width)
    with self.share(width) as i:
      for t in each: self.put(sums(t, i), start)
    with self.over(n//width, barrier=False) as turn, self.share(width) as i:
      for t in each:
        x = terms[t](turn*width + i)
        self.put(sums(t, i), both(sums(t, i), x))
    if self.m.gpu:
      shared = self.array(len(terms), width)
      for t in each: self.put(shared(t, self.t), sums(t, self.t))
      return [functools.reduce(both, [shared(t, i) for i in range(width)]) for t in each]
    while width := width//2:
      with self.over(width) as i:
        for t in each:
          half = sums(t, i + width)
          self.put(sums(t, i), both(sums(t, i), half))
    return [sums(t, 0) for t in each]

def run(kernel:Callable, gradient:Callable|str, output:tuple, inputs:Sequence[Tensor],
        **options:object) -> Tensor:
  "The one output of a kernel; its gradient takes the same options."
  if callable(gradient): gradient = bound(gradient, **options)
  return launch(bound(kernel, **options), [output], inputs, gradient)[0]

# ================================================================ the matrix product
# Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (TOMS 2008):
#
#              ┌────┬────┬────┐
#            K │    │ pb │    │ B    a panel of B, nt columns wide, and a tile of A, mt rows high,
#              └────┴────┴────┘      are packed in the order in which they will be read, as many as
#        K                           the L2 cache holds: nb panels, mb tiles, kb of the K products;
#     ┌─────┐   ┌────┬────┬────┐
#  mt │ pa  │   │    │sums│    │ C    where a panel meets a tile, mt x nt sums stay in registers
#     ├─────┤   ├────┼────┼────┤      until all kb products have been added.
#     │     │ A │    │    │    │
#     └─────┘   └────┴────┴────┘      The cores share groups, else tiles, else panels.
#                 nt
# GFLOPS, two cores of a Xeon with AVX-512, clang 14, best of 12 (dx = dy w^T, dw = x^T dy):
#   M x K x N              this kernel        PyTorch, 2 threads
#                         y   dx   dw          y   dx   dw
#   4096 x 256 x 1024   266  265  234        235  229  253
#   4096 x 1024 x 256   253  271  252        265  259  224
#   4096 x 256 x 264    271  256  245
KB, MB, NB = 256, 96, 1024       # most rows of K, rows of A and panels of B that are packed at once
SMALL = 1 << 16                  # multiplications below which tinygrad's own product is as fast
LONG = 1 << 14                   # entries of a row that is packed whole: packs are on the stack

def tile_shape(m:Machine, M:int, N:int) -> tuple[int, int]:
  """Rows and columns of a tile of sums: three quarters of the registers.

  The others hold a row of B and entries of A. The columns are those that overlap least.
  """
  widths = [4*m.lanes, 3*m.lanes, 2*m.lanes]
  columns = min(widths, key=lambda n: (ceildiv(N, n)*n, -n))
  rows = m.registers*3//4//(columns//m.lanes)
  return min(M, rows), min(columns, N)

def even_blocks(n:int, most:int) -> tuple[int, int]:
  "Cuts n into equal blocks of at most `most`, or nearly so: how many, and their size."
  most = max(1, min(n, most))
  sizes = range((most + 1)//2, most + 1)
  size = min(sizes, key=lambda size: (ceildiv(n, size)*size, -size))
  return ceildiv(n, size), size

def gemm(C:UOp, A:UOp, B:UOp, *bias:UOp, ta:bool, tb:bool, m:Machine) -> UOp:
  """C (G,M,N) = A (G,M,K) B (G,K,N) + bias (N,) for each g.

  ta: A is stored (G,K,M), tb: B is stored (G,N,K). An A or B of one group serves all; a C of one
  group is the sum over groups.
  """
  G, M, N = C.shape
  K, groups = A.shape[1 if ta else 2], max(A.shape[0], B.shape[0])
  name = f"gemm_{'nt'[ta]}{'nt'[tb]}_{groups}x{M}x{K}x{N}"
  # few rows of A and many of B, stored alike, as in decoding: C^T = B A^T, and only A is packed
  swapped = tb and not ta and 4*M <= N and M <= 4*m.lanes and K <= LONG
  if swapped: A, B, M, N = B, A, N, M

  # The plan. A round adds kb products to all sums; rounds go through the blocks of K, and through
  # the groups where their sum is wanted.
  mt, nt = tile_shape(m, M, N)
  tiles, panels = ceildiv(M, mt), ceildiv(N, nt)
  packed = tiles > 1
  blocks = ceildiv(K, KB) if packed and not swapped else 1
  kb = ceildiv(K, blocks)
  rounds = blocks*(groups if G == 1 else 1)
  cores = m.cores if 2*groups*M*N*K > ONE_CORE else 1
  of_groups = divisor(G, cores) if G >= cores else 1
  of_tiles = cores if of_groups == 1 and tiles >= 4*cores else 1
  of_panels = min(cores, panels) if of_groups == of_tiles == rounds == 1 else 1
  tile_blocks, mb = even_blocks(ceildiv(tiles, of_tiles), MB//mt)
  panel_blocks, nb = even_blocks(ceildiv(panels, of_panels), NB//nt if packed else 1)

  # Sizes that the tile does not divide: the last panel starts early enough to end at column N, the
  # last block of K at row K, and the last row is repeated. What was counted before must not be
  # added again: such rows and columns of B are packed as zeros, such tiles are not stored. So cores
  # share panels, of which two may overlap, in a single round only.
  more_tiles = of_tiles*tile_blocks*mb > tiles
  def left(j:UOp) -> UOp: return ((panel + j)*nt).minimum(N - nt)
  def rows(i:UOp) -> list[UOp]:
    every = [(tile + i)*mt + n for n in range(mt)]
    return [r.minimum(M - 1) for r in every] if more_tiles or M % mt else every
  def factor(x:UOp, transposed:bool, i:UOp, j:UOp) -> UOp:
    own = 0 if x.shape[0] == 1 else turn//blocks if G == 1 else g
    place = x[own, j, i] if transposed else x[own, i, j]
    return widened(place.load())
  def result(r:UOp, v:UOp) -> UOp:
    column = left(j) + v
    return C_so_far(g, column, r) if swapped else C_so_far(g, r, column)

  body = Body(m, of_groups*of_tiles*of_panels)
  first = lambda cores, n: body.h*n if cores > 1 else 0
  C_so_far, sums = body.ordered(C), body.array(mt, nt)
  pa, pb = body.array(mb, kb, mt), body.array(nb, kb, nt)
  with body.over(G//of_groups) as g, body.over(panel_blocks) as panel, body.over(rounds) as turn:
    g = first(of_groups, G//of_groups) + g
    panel = (first(of_panels, panel_blocks) + panel)*nb
    counted = (turn % blocks)*kb
    k0 = counted.minimum(K - kb)
    if packed:                                            # pb[j] = B[k0:k0+kb, panel j]
      outer, inner = (nt, kb) if tb else (kb, nt)         # B in the order in which it is stored
      with body.over(nb) as j, body.over(outer) as x, body.over(inner) as y:
        p, v = (y, x) if tb else (x, y)
        column = left(j) + v
        entry = factor(B, tb, k0 + p, column)
        if K % kb: entry = (k0 + p < counted).where(0.0, entry)
        if rounds > 1 and (N % nt or panels % nb):
          again = (turn > 0) & (j > 0) & (column < (panel + j)*nt)
          entry = again.where(0.0, entry)
        body.put(pb(j, p, v), entry)
    with body.over(tile_blocks) as tile:
      tile = (first(of_tiles, tile_blocks) + tile)*mb
      if ta:                                              # pa[i] = A[tile i, k0:k0+kb]^T
        with body.over(kb) as p, body.over(mb) as i:
          for n, r in enumerate(rows(i)):
            body.put(pa(i, p, n), factor(A, ta, r, k0 + p))
      with body.over(nb) as j, body.over(mb) as i:
        with body.over(nt) as v:                          # sums = bias, or what C holds by then
          for n, r in enumerate(rows(i)):
            start = UOp.const(0.0, dtypes.float)
            if bias: start = bias[0][r if swapped else left(j) + v]
            if rounds > 1: start = (turn > 0).where(result(r, v).load(), start)
            body.put(sums(n, v), start)
        with body.over(kb) as k:                          # sums += A[rows, k] B[k, panel j]
          if ta: x = [pa(i, k, n) for n in range(mt)]
          else: x = [factor(A, ta, r, k0 + k) for r in rows(i)]
          with body.over(nt) as v:
            y = pb(j, k, v) if packed else factor(B, tb, k0 + k, left(j) + v)
            for n in range(mt): body.add(sums(n, v), x[n]*y)
        # C = sums, a loop for each row: the compiler can't tell that the rows do not overlap
        for n, r in enumerate(rows(i)):
          if rounds > 1 and more_tiles: r = r.valid((tile + i)*mt < M)
          with body.over(nt) as v:
            body.put(result(r, v), sums(n, v))
  return body.finish(name)

# ---- on a GPU
# A group of SIDE x SIDE threads makes a tile of C, whose sums stay in registers, 8 x 8 or 4 x 4 a
# thread. SIDE columns of A and SIDE rows of B lie in shared memory, and the next ones are on their
# way to registers while these are multiplied. TFLOPS on an H200, whose float32 units do 67:
#   M x K x N             this kernel     tinygrad
#                         y   dx   dw     y   dw
#   8192 x 768 x 3072    37   35   27    5.6   2
#   8192 x 768 x 768     35   33   26    5.1   4
#   8192 x 768 x 50264   38   38   39    7.3
SIDE = 16
MANY_TILES = 96                  # large tiles from which a thread has 8 x 8 sums
ENOUGH_TILES = 32                # small ones from which this kernel takes a product
def tile_count(M:int, N:int, each:int) -> int:
  "Tiles of M x N sums, with each x each of them a thread."
  return ceildiv(M, each*SIDE)*ceildiv(N, each*SIDE)

def large_tiles(G:int, M:int, N:int) -> bool:
  "Whether there are enough tiles of 8*SIDE rows and columns to keep a GPU busy."
  return G*tile_count(M, N, 8) >= MANY_TILES and min(M, N) > 4*SIDE

class Tile(Body):
  """The tile of C (G M N,), a product of A (G,M,K) and B (G,K,N), that one group of a GPU's threads
  computes: of matrix g the rows and columns from `row` and `column`, `size` of each.

  ta, tb: A, B are stored transposed. parts: with ta alone and G = 1, where K comes first in A and
  B, both are cut along K into so many, whose products are the matrices of C.
  Rows and columns past the end may be computed, and are not stored.
  """
  def __init__(self, C:UOp, A:UOp, B:UOp, *bias:UOp, ta:bool, tb:bool, parts:int, threads:int,
               m:Machine):
    if parts > 1:
      assert ta and not tb and A.shape[0] == B.shape[0] == 1
      A, B = (viewed(x, parts, x.shape[1]//parts, x.shape[2]) for x in (A, B))
    self.C, self.bias, self.ta, self.tb = C, bias, ta, tb
    self.G, self.K = max(A.shape[0], B.shape[0]), A.shape[1 if ta else 2]
    self.M, self.N = A.shape[2 if ta else 1], B.shape[1 if tb else 2]
    self.size = 8*SIDE if large_tiles(self.G, self.M, self.N) else 4*SIDE
    across, tiles = ceildiv(self.N, self.size), tile_count(self.M, self.N, self.size//SIDE)
    super().__init__(m, self.G*tiles, threads)
    nth = self.h % tiles
    self.g, self.row, self.column = self.h//tiles, nth//across*self.size, nth % across*self.size
    # what a kernel's `Factor` is made of: rows of A, and columns of B
    self.factors = (A, self.M, self.row, not ta), (B, self.N, self.column, tb)

  def do(self, *stores:Stores):
    "A stage: stores that may be made in any order."
    self.done = UOp.group(*itertools.chain(*stores)),

  def result(self, r:UOp, c:UOp, value:UOp) -> UOp:
    "C[g, r, c] = value + bias[c], unless that is past the end"
    if self.bias: value = value + self.bias[0][c.minimum(self.N - 1)]
    place = (self.g*self.M + r)*self.N + c
    if self.M % self.size or self.N % self.size:
      place = place.valid((r < self.M) & (c < self.N))
    return self.C[place].store(value)

  def named(self, kernel:str) -> UOp:
    "The finished kernel."
    sizes = f"{self.G}x{self.M}x{self.K}x{self.N}"
    return self.finish(f"{kernel}_{'nt'[self.ta]}{'nt'[self.tb]}_{sizes}")

def viewed(x:UOp, *shape:int, dtype:DType|None=None) -> UOp:
  "An input of a kernel, all of it, in another shape, or read as numbers of another type."
  return UOp.placeholder(shape, dtype or x.dtype, x.base.arg.slot)

def tiled_gemm(C:UOp, A:UOp, B:UOp, *bias:UOp, ta:bool, tb:bool, m:Machine, parts:int=1) -> UOp:
  "`gemm`, without sums over groups, on a GPU. C, and parts: see `Tile`."
  body = Tile(C, A, B, *bias, ta=ta, tb=tb, parts=parts, threads=SIDE*SIDE, m=m)
  K, size, do = body.K, body.size, body.do
  each, rounds = size//SIDE, ceildiv(K, SIDE)              # rows, and columns, of a thread
  down, right = body.t//SIDE, body.t % SIDE                # where in the tile the thread is
  # a thread's own rows, or columns: four side by side, which are read at once, and four more
  def own(place:UOp) -> list[UOp]: return [place*4 + i % 4 + i//4*4*SIDE for i in range(each)]

  class Factor:
    """The tile's rows of A, or columns of B, from the `first` of n; as it is stored (G,n,K), if
    `straight`, or (G,K,n). SIDE numbers of each are in shared memory, the thread's share of the
    next ones in registers."""
    def __init__(self, x:UOp, n:int, first:UOp, straight:bool):
      self.x, self.n, self.first, self.straight = x, n, first, straight
      # 4 floats are left free behind a row, else half a warp would store to one bank
      self.block, self.next = body.array(SIDE, size + 4), body.ordered(body.memory(each))
      # neighbouring threads load what lies side by side
      width = SIDE if straight else size
      nth = [body.t + SIDE*SIDE*i for i in range(each)]
      places = [(i//width, i % width) for i in nth]
      self.places = [(r, k) if straight else (k, r) for r, k in places]
    def load(self, turn:UOp|int) -> Stores:
      "next = the thread's share of x's `turn`th block, with zeros past K"
      stores = []
      for i, (r, k) in enumerate(self.places):
        r, k = (self.first + r).minimum(self.n - 1), turn*SIDE + k
        ok = k < K if K % SIDE else None
        at = k if ok is None else k.valid(ok)
        place = (r, at) if self.straight else (at, r)
        x = widened(self.x[0 if self.x.shape[0] == 1 else body.g, *place].load())
        stores.append(self.next(i).store(x if ok is None else ok.where(x, 0.0)))
      return stores
    def pack(self) -> Stores:
      "block = every thread's `next`"
      return [self.block(k, r).store(self.next(i)) for i, (r, k) in enumerate(self.places)]

  a, b = itertools.starmap(Factor, body.factors)
  sums, pairs = body.ordered(body.memory(each, each)), [*itertools.product(range(each), repeat=2)]
  do(a.load(0), b.load(0), [sums(*ij).store(0.0) for ij in pairs])
  with body.over(rounds) as turn:
    do(a.pack(), b.pack())
    body.done = body.all_done().barrier(),           # of both blocks, before the next loads begin
    following = (turn + 1).minimum(rounds - 1)       # the last round loads its own block again
    do(a.load(following), b.load(following))
    with body.over(SIDE, barrier=False) as k:
      x, y = ([f.block(k, r) for r in own(place)] for f, place in ((a, down), (b, right)))
      do([sums(i, j).store(sums(i, j) + x[i]*y[j]) for i, j in pairs])
  rows, columns = [body.row + r for r in own(down)], [body.column + c for c in own(right)]
  do([body.result(rows[i], columns[j], sums(i, j)) for i, j in pairs])
  return body.named("tiled")

# In half precision a group of WARPS makes a tile on tensor cores, by NVIDIA's mma.m16n8k16: a warp,
# 32 threads, adds the product of 16 x 16 and 16 x 8 numbers to 16 x 8 sums in float32, of all three
# of which each thread has a part (PTX ISA, "Matrix Fragments for mma.m16n8k16"). Two neighbours in
# k go as one word of 32 bits. TFLOPS on an H200, bfloat16:
#   M x K x N             this kernel      tinygrad
#                         y   dx    dw     y
#   8192 x 768 x 3072   166  195    78    45
#   8192 x 768 x 768    116  133    75    33
#   8192 x 768 x 50264  171  199   165    14
WARPS = 2, 2                     # down and across a tile
DEPTH = 32                       # numbers in k of a block; two blocks lie in shared memory

def tensor_cores_take(a:Tensor, b:Tensor) -> bool:
  """Whether `mma_gemm` multiplies these: of a type that the tensor cores know, and of even sizes. A
  part of a buffer may begin anywhere, where loads of four words fail."""
  return a.dtype == b.dtype and a.dtype in machine(a.device).mma \
    and all(n % 2 == 0 for x in (a, b) for n in x.shape[1:]) \
    and all(prod(x.uop.base.shape) <= x.numel() for x in (a, b))

def mma_gemm(C:UOp, A:UOp, B:UOp, *bias:UOp, ta:bool, tb:bool, m:Machine, parts:int=1) -> UOp:
  "`tiled_gemm` for factors of half precision, on tensor cores."
  threads, words = 32*WARPS[0]*WARPS[1], DEPTH//2
  body = Tile(C, A, B, *bias, ta=ta, tb=tb, parts=parts, threads=threads, m=m)
  K, size, do, rounds = body.K, body.size, body.do, ceildiv(body.K, DEPTH)
  high, wide = (size//n for n in WARPS)                    # a warp's part of the tile, and where
  down, right = body.t//32//WARPS[1]*high, body.t//32 % WARPS[1]*wide
  lane = body.t % 32

  class Factor:
    """The tile's rows of A, or columns of B, from the `first` of n; as it is stored (G,n,K), if
    `straight`, or (G,K,n). DEPTH numbers of each are in one of two blocks of shared memory, the
    thread's share of the next ones in registers, on its way to the other block."""
    def __init__(self, x:UOp, n:int, first:UOp, straight:bool):
      # as words of two numbers
      self.x = viewed(x, *x.shape[:-1], x.shape[-1]//2, dtype=dtypes.uint)
      self.n, self.first, self.straight = n, first, straight
      self.block, self.share = body.array(2, size, words, dtype=dtypes.uint), size*words//threads
      self.next = body.ordered(body.memory(self.share, dtype=dtypes.uint))
    def load(self, turn:UOp|int) -> Stores:
      "next = the thread's share of x's `turn`th block, with zeros past the ends"
      return [self.next(i).store(self.word(turn, i)) for i in range(self.share)]
    def word(self, turn:UOp|int, i:int) -> UOp:
      "The i-th of the words of x that the thread loads."
      ok, half = None, self.share//2
      if self.straight:                                    # four threads a row, four words each
        r, i = self.first + body.t//4 + i//4*(threads//4), i % 4
        r, start = r.minimum(self.n - 1), turn*words + body.t % 4*4
        length, block = K//2, words
      else:                                                # words of rows k and k + 1
        r, i = turn*DEPTH + body.t % words*2 + i//half, i % half
        start = self.first//2 + body.t//words*half
        length, block = self.n//2, size//2
        if K % DEPTH: ok = r < K
      if length % block:
        run = math.gcd(length, 4)                          # all words of a run are there, or none
        there = start + i//run*run < length
        ok = there if ok is None else ok & there
      at = start + i
      g = 0 if self.x.shape[0] == 1 else body.g
      if ok is None: return self.x[g, r, at].load()
      return ok.where(self.x[g, r, at.valid(ok)].load(), 0)
    def pack(self, block:UOp|int) -> Stores:
      "The block = every thread's `next`, in words of two neighbours in k."
      stores, half = [], self.share//2
      for i in range(self.share):
        if self.straight:
          word, r, k = self.next(i), body.t//4 + i//4*(threads//4), body.t % 4*4 + i % 4
        else:                                              # the same column of rows k and k + 1
          a, b = self.next(i//2), self.next(half + i//2)
          word = (a >> 16) | (b & 0xffff0000) if i % 2 else (a & 0xffff) | (b << 16)
          r, k = body.t//words*self.share + i, body.t % words
        stores.append(self.block(block, r, k).store(word))
      return stores
    def fragments(self, block:UOp, first:UOp, n:int, rows:int) -> list[list[UOp]]:
      """The thread's parts of n times `rows` rows, for each half of a block. Which numbers in k a
      half has is free, if it is the same for A and B: here a thread's four words are neighbours."""
      def numbers(r:UOp, i:int) -> list[UOp]:
        word = self.block(block, r, lane % 4*4 + i).load()
        return [(word >> shift).cast(dtypes.ushort).bitcast(A.dtype) for shift in (0, 16)]
      def part(first:UOp, half:int) -> UOp:
        places = itertools.product((2*half, 2*half + 1), range(0, rows, 8))
        return UOp.stack(*itertools.chain(*(numbers(first + lane//4 + r, i) for i, r in places)))
      return [[part(first + rows*j, half) for j in range(n)] for half in range(2)]

  a, b = itertools.starmap(Factor, body.factors)
  pairs = [*itertools.product(range(high//16), range(wide//8))]
  sums = body.ordered(body.memory(high//16, wide//8, 4))
  do(a.load(0), b.load(0), [sums(*ij, n).store(0.0) for ij in pairs for n in range(4)])
  do(a.pack(0), b.pack(0))
  body.done = body.all_done().barrier(),
  with body.over(rounds) as turn:
    following = (turn + 1).minimum(rounds - 1)       # the last round loads its own block again
    do(a.load(following), b.load(following))
    for x, y in zip(a.fragments(turn % 2, down, high//16, 16),
                    b.fragments(turn % 2, right, wide//8, 8)):
      stores = []
      for i, j in pairs:
        before = UOp.stack(*(sums(i, j, n).load() for n in range(4)))
        after = UOp.wmma(x[i], y[j], before, (8, 16, 16), "CUDA", 32)
        stores += [sums(i, j, n).store(after.index(UOp.const(n))) for n in range(4)]
      do(stores)
    do(a.pack((turn + 1) % 2), b.pack((turn + 1) % 2))
  rows = [body.row + down + 16*i + lane//4 for i in range(high//16)]
  columns = [body.column + right + 8*j + lane % 4*2 for j in range(wide//8)]
  do([body.result(rows[i] + n//2*8, columns[j] + n % 2, sums(i, j, n))
      for i, j in pairs for n in range(4)])
  return body.named("mma")

def dots(C:UOp, A:UOp, B:UOp, *bias:UOp, m:Machine) -> UOp:
  """C (G,M,N) = A (G,M,K) B^T + bias (N,), B (G,N,K), for up to four rows of A.

  The time is that of reading B.
  """
  (G, M, N), K = C.shape, A.shape[2]
  rows = math.gcd(N, 4//M)
  cores = min(m.cores, N//rows) if G*M*N*K > ONE_CORE//8 else 1
  body, mine = Body(m, cores), ceildiv(N//rows, cores)
  with body.over(G) as g, body.over(mine) as j:
    ga, gb = (0 if x.shape[0] == 1 else g for x in (A, B))
    first = (body.h*mine + j).minimum(N//rows - 1)
    # rows of B a distance of N//rows apart: over j each is one long stream, which the processor
    # fetches ahead; a tenth faster than rows side by side, which are short streams
    each = [(i, first + r*(N//rows)) for i in range(M) for r in range(rows)]
    def term(i:int, r:UOp) -> Callable:
      return lambda k: widened(A[ga, i, k].load())*widened(B[gb, r, k].load())
    totals = body.totals(K, *itertools.starmap(term, each), vectors=2)
    for (i, r), total in zip(each, totals):
      if bias: total = total + bias[0][r]
      body.put(C[g, i, r], total)
  return body.finish(f"dots_{G}x{M}x{K}x{N}")

@functools.cache
def tiles_serve(device:str|tuple[str, ...]) -> bool:
  """Whether `tiled_gemm` is faster than tinygrad's own product of float32.

  Not where that uses matrix units, as on Metal (NVIDIA's would round to TF32, so tinygrad leaves
  them idle), nor in OpenCL on a CPU (PoCL), where it is 160 times slower.
  """
  device = opened(device)
  units = [u for u in device.renderer.tensor_cores if u.dtype_in == dtypes.float]
  return all(u in tc.cuda_8168_tf32 for u in units) and not is_opencl_on_cpu(device)

def product(a:Tensor, b:Tensor, *bias:Tensor, ta:bool=False, tb:bool=False, total:bool=False
            ) -> Tensor:
  """(G,M,K) (G,K,N) + bias (N,) -> (G,M,N), or (1,M,N), the sum over groups, with `total`.

  ta, tb: a, b are transposed first. One of them may have a single group, for all. Differentiable,
  any number of times.
  """
  G, m = max(a.shape[0], b.shape[0]), machine(a.device)
  M, K = a.shape[1:][::-1] if ta else a.shape[1:]
  N = b.shape[1 if tb else 2]
  # on a GPU long sums of few tiles, as in dw: in parts of 256 or more, for up to 512 groups of
  # threads
  long = m.gpu and ta and not tb and G == 1 and not bias
  parts = divisor(K, max(1, min(K//256, 512//tile_count(M, N, 8)))) if long else 1
  backward = bound(product_backward, ta=ta, tb=tb, parts=parts)
  if m.gpu:
    kernel = mma_gemm if tensor_cores_take(a, b) else tiled_gemm
    kernel = bound(kernel, ta=ta, tb=tb, parts=parts, m=m)
    y, = launch(kernel, [(parts*G*M*N,)], [a, b, *bias], backward)
    y = y.reshape(-1, M, N)
    return y.sum(0, keepdim=True) if total or parts > 1 else y
  few = M <= 4 and tb and not ta and not total
  kernel = bound(dots, m=m) if few else bound(gemm, ta=ta, tb=tb, m=m)
  return launch(kernel, [(1 if total else G, M, N)], [a, b, *bias], backward)[0]

def product_backward(dy:Tensor, y:Tensor, a:Tensor, b:Tensor, *bias:Tensor, ta:bool, tb:bool,
                     parts:int=1) -> tuple[Tensor, ...]:
  """dA = dY B^T, dB = A^T dY, or their transposes B dY^T, dY^T A.

  They are summed where one A or B has served all groups.
  """
  if parts > 1:
    cut = [x.reshape(parts, -1, x.shape[2]) for x in (a, b)]
    return tuple(d.reshape(x.shape) for d, x in
                 zip(product_backward(dy, y, *cut, ta=ta, tb=tb), (a, b)))
  G = max(a.shape[0], b.shape[0])
  one_a, one_b = (x.shape[0] < G for x in (a, b))
  dy = dy.reshape(-1, a.shape[2 if ta else 1], b.shape[1 if tb else 2])
  rows = dy.reshape(1, -1, dy.shape[2])    # before the cast: a bias's gradient sums float32s
  if tensor_cores_take(a, b): dy = dy.cast(a.dtype)
  if ta: da = product(b, dy, ta=tb, tb=True, total=one_a)
  else: da = product(dy, b, tb=not tb, total=one_a)
  if tb: db = product(dy, a, ta=True, tb=ta, total=one_b)
  else: db = product(a, dy, ta=not ta, total=one_b)
  # tinygrad's own sum over rows: 8 ms where this takes 0.2, (4096,128) on a CPU
  ones = Tensor.ones(1, rows.shape[1], 1, device=dy.device)
  return da, db, *(product(ones, rows, ta=True).reshape(x.shape) for x in bias)

def plain_product(x:Tensor, w:Tensor, dtype:DType|None) -> Tensor:
  """x (…,M,K) @ w by tinygrad's own product, on GPUs that `tiled_gemm` does not serve, or for few
  tiles.

  x and the gradient are stored, lest what makes them is computed anew for each column. The rows for
  w (K,N) come in groups, so that its gradient is a sum of short products. PoCL, two cores,
  (4096,1024) x (1024,256): 42 ms, dw 48 ms and not 270; after GELU 42 ms and not 700.
  """
  rows = prod(x.shape[:-1])
  groups = divisor(rows, max(1, rows//256)) if w.ndim == 2 else 1
  if groups == 1: return stored_backward(PLAIN_DOT(stored(x), w, dtype))
  grouped = stored(x).reshape(groups, rows//groups, -1)
  y = PLAIN_DOT(grouped, stored_backward(w.expand(groups, *w.shape)), dtype)
  return stored_backward(y).reshape(*x.shape[:-1], -1)

def stored_transpose(w:Tensor) -> Tensor|None:
  "The Tensor whose last two dimensions were swapped to make w; None if w is no such view."
  cast = w.uop.op is Ops.CAST
  view = w.uop.src[0] if cast else w.uop
  swap = *range(w.ndim - 2), w.ndim - 1, w.ndim - 2
  if view.op is not Ops.PERMUTE or view.arg != swap: return None
  straight = Tensor(view.src[0])
  return straight.cast(w.dtype) if cast else straight

def multiply(x:Tensor, w:Tensor, bias:Tensor|None=None, dtype:DType|None=None) -> Tensor:
  """x @ w + bias, by a kernel where one serves.

  x (…,M,K); w (K,N), or (…,K,N) with x's leading dimensions, or with any if x is (M,K); bias (N,).
  x and w are float32 or, if `dtype`, that of the sums, is float32, any of WEIGHTS or bfloat16, as w
  may be with an x of float32. The transpose of what is stored is read as it is stored.
  """
  x, w, *biases = on_one_device(*(t for t in (x, w, bias) if t is not None))
  matrix = w.ndim == 2
  fits = x.ndim > 1 and w.ndim > 1 and all_int(x.shape + w.shape)
  fits = fits and x.shape[-1] == w.shape[-2]
  # a small product costs less where tinygrad can fuse it with what stands around it
  large = fits and max(x.numel()*w.shape[-1], w.numel()*x.shape[-2]) >= SMALL
  matched = matrix or (not biases and x.shape[:-2] in ((), w.shape[:-2]))
  sums_float = (dtype or x.dtype) == dtypes.float
  served = large and matched and sums_float and serves(*biases, weights=[x, w], gpu=True)
  if served and machine(x.device).gpu:
    rows = prod(x.shape[:-1]) if matrix else x.shape[-2]
    few = prod(w.shape[:-2])*tile_count(rows, w.shape[-1], 4) < ENOUGH_TILES
    served = not few and tiles_serve(x.device)
  if served:
    straight = stored_transpose(w)
    b = w if straight is None else straight
    groups = (1,) if matrix else x.shape[:-2]
    a = x.reshape(prod(groups), -1, x.shape[-1])
    y = product(a, b.reshape(-1, *b.shape[-2:]), *biases, tb=straight is not None)
    lead = x.shape[:-2] or w.shape[:-2]
    return y.reshape(*lead, x.shape[-2], w.shape[-1])
  on_gpu = FLASH and large and whole(x, w, *biases) and machine(x.device).gpu
  # without tensor cores tinygrad would round each product to the factors' type
  if not on_gpu and dtype == dtypes.float: x, w = widened(x), widened(w)
  if dtype == dtypes.float and x.dtype == dtypes.ushort: x = widened(x)
  if w.dtype == dtypes.ushort: w = widened(w)
  y = plain_product(x, w, dtype) if on_gpu else PLAIN_DOT(x, w, dtype)
  return y + biases[0] if biases else y

# ================================================================ layer norm
# One launch forward, one back. (4096,128) with its gradients, one core: 0.9 ms; tinygrad takes 9
# launches and 11.0 ms. Its sums over 8,192 rows read a column a thread: 0.18 ms each on an H200,
# 15 times what the bytes take.

NORM_GROUPS = 1024               # of a GPU's threads, for the gradient

def warp(D:int) -> int:
  "The threads of a group that do a row of D numbers together: as many as run in step, or fewer."
  return math.gcd(D, 32)

def normalised(body:Body, x:UOp, row:UOp, eps:float) -> tuple[Callable, UOp]:
  "i -> hat[i] = (x[row, i] - mean)/deviation, and 1/deviation"
  D = x.shape[1]
  [total] = body.totals(D, lambda i: x[row, i])
  apart = lambda i: x[row, i] - total*(1/D)
  [squares] = body.totals(D, lambda i: apart(i)*apart(i))
  scale = 1 / (squares*(1/D) + eps).sqrt()
  return lambda i: apart(i)*scale, scale

def norm_kernel(y:UOp, x:UOp, w:UOp, b:UOp, eps:float, m:Machine) -> UOp:
  "y = hat w + b"
  M, D = x.shape
  body = Body(m, M, warp(D))
  hat, _ = normalised(body, x, body.h, eps)
  with body.share(D) as i: body.put(y[body.h, i], hat(i)*w[i] + b[i])
  return body.finish(f"layernorm_{M}x{D}")

def norm_grad_kernel(dx:UOp, dw:UOp, db:UOp, x:UOp, w:UOp, dy:UOp, eps:float, m:Machine) -> UOp:
  """dx = (g - mean g - hat·mean(g hat))/deviation, g = w dy;  dw = Σ hat dy, db = Σ dy over rows.

  dw and db are (n,D): each of n cores, or groups of threads, adds up its own rows.
  """
  (M, D), n = x.shape, dw.shape[0]
  body = Body(m, n, warp(D))
  sw, sb = body.own(D), body.own(D)
  with body.share(D) as i:
    for s in (sw, sb): body.put(s(i), 0.0)
  turns = (M - 1 - body.h)//n + 1 if M % n else M//n
  with body.over(turns, barrier=M > n) as turn:
    row = body.h + turn*n if m.gpu else body.h*(M//n) + turn
    hat, scale = normalised(body, x, row, eps)
    g = lambda i: dy[row, i]*w[i]
    sum_g, sum_gh = body.totals(D, g, lambda i: g(i)*hat(i))
    with body.share(D) as i:
      means = (sum_g + hat(i)*sum_gh)*(1/D)
      body.put(dx[row, i], scale*(g(i) - means))
      body.add(sw(i), dy[row, i]*hat(i))
      body.add(sb(i), dy[row, i])
  with body.share(D) as i:
    body.put(dw[body.h, i], sw(i))
    body.put(db[body.h, i], sb(i))
  return body.finish(f"layernorm_grad_{M}x{D}")

def norm_backward(dy:Tensor, y:Tensor, x:Tensor, w:Tensor, b:Tensor, eps:float, m:Machine
                  ) -> tuple[Tensor, ...]:
  "dx, dw, db, the last two summed over the cores, or the groups of threads."
  n = min(x.shape[0], NORM_GROUPS) if m.gpu else divisor(x.shape[0], m.cores)
  kernel = bound(norm_grad_kernel, eps=eps, m=m)
  outputs = x.shape, (n, *w.shape), (n, *w.shape)
  dx, *sums = launch(kernel, outputs, [x, w, dy], no_second_gradient("layernorm"))
  return dx, *(s[0] if n == 1 else s.sum(0) for s in sums)

def layernorm(x:Tensor, w:Tensor, b:Tensor, eps:float=1e-5) -> Tensor:
  """(x - mean)/sqrt(variance + eps) · w + b over the last axis: x (…,D), w, b (D,).

  Differentiable once in all three.
  """
  x, w, b = on_one_device(x, w, b)
  if not serves(x, w, b, gpu=warp(x.shape[-1]) >= 8): return x.layernorm(eps=eps)*w + b
  rows, m = x.reshape(-1, x.shape[-1]), few_or_all_cores(x)
  y = run(norm_kernel, norm_backward, rows.shape, [rows, w, b], eps=eps, m=m)
  return y.reshape(x.shape)

# ================================================================ softmax
# One launch forward, one back. tinygrad takes 5 launches and 1.7 s for (32,2048,2048) with its
# gradient on two cores.
LOWEST = float(np.finfo(np.float32).min)
MAX_ROW = 1 << 18                    # scores of a row: 1 MB of the calling thread's stack

def softmax_kernel(p:UOp, s:UOp, m:Machine) -> UOp:
  "p = softmax of the rows of s"
  M, T = s.shape
  body = Body(m, M)
  row, e = body.h, body.array(T)
  [largest] = body.totals(T, lambda i: s[row, i], both=UOp.maximum, start=LOWEST)
  with body.over(T) as i: body.put(e(i), (s[row, i] - largest).exp())
  [total] = body.totals(T, e)
  scale = 1/total
  with body.over(T) as i: body.put(p[row, i], e(i)*scale)
  return body.finish(f"softmax_{M}x{T}")

def softmax_grad_kernel(ds:UOp, p:UOp, dp:UOp, m:Machine) -> UOp:
  "ds = p (dp - Σ p dp)"
  M, T = p.shape
  body = Body(m, M)
  row = body.h
  [total] = body.totals(T, lambda i: p[row, i]*dp[row, i])
  with body.over(T) as i:
    body.put(ds[row, i], p[row, i]*(dp[row, i] - total))
  return body.finish(f"softmax_grad_{M}x{T}")

def softmax_backward(dp:Tensor, p:Tensor, s:Tensor, m:Machine) -> tuple[Tensor]:
  "ds from p, the softmax itself."
  return run(softmax_grad_kernel, no_second_gradient("softmax"), p.shape, [p, dp], m=m),

def softmax(s:Tensor) -> Tensor:
  "Over all of the last axis. Differentiable once."
  rows = s.reshape(-1, s.shape[-1])
  y = run(softmax_kernel, softmax_backward, rows.shape, [rows], m=few_or_all_cores(s))
  return y.reshape(s.shape)

# ================================================================ attention
# FlashAttention (Dao et al. 2022, arXiv 2205.14135): a block of queries passes over blocks of keys,
# and no more than a block of scores is ever stored. All is kept transposed, a query for each entry
# of a vector register, so that sums and maxima over keys are sums and maxima of vectors, and keys
# and values are read as they lie. With the scores s = k q / sqrt D, largest and total so far:
#   p = exp(s - largest),  total = Σ p,  y = Σ p v / total
# and what has been summed is scaled by exp(old - new) when a larger score comes. Each row of the
# output has behind y its log Σ exp s, by which the backward pass finds p / total, its p:
#   dv = p dy,  ds = p (dy v - dy y),  dq = ds k / sqrt D,  dk = ds q / sqrt D
BLOCK = 64                           # keys in a block, and most queries

def first_seen(g:UOp, groups:int, start:UOp|None=None) -> UOp|None:
  "The first key that group g sees; start: one for each of as many groups as there are heads."
  return None if start is None else start[g//(groups//start.shape[0])].load()

class Queries(Body):
  """The body of an attention kernel, which takes a block of queries (G,L,D) at a time.

  place: pos and start of `attend`, or less. The loops go over `items`.
  """
  def __init__(self, items:int, q:UOp, lengths:tuple[int, int], place:Sequence[UOp], causal:bool,
               m:Machine):
    super().__init__(m, items)
    (self.G, _, self.D), (self.L, self.T) = q.shape, lengths
    self.place, self.causal, self.n = place, causal, query_block(self.L, m)

  def begin(self, g:UOp, block:UOp):
    self.first, self.start = block*self.n, first_seen(g, self.G, *self.place[1:])

  def seen(self, t:UOp, i:UOp) -> UOp:
    "Whether query i of the block sees key t. Past the last row are zeros, which nobody reads."
    if not self.causal: return t < self.T
    own = self.first + i + (self.place[0][0].load() if self.place else self.T - self.L)
    seen = t <= own
    return seen if self.start is None else seen & ((t >= self.start) | t.eq(own))

  def product(self, to:Value, shape:tuple[int, int, int], a:Value, b:Value, more:bool=False):
    """to (M,N) = a (M,K) b (K,N), or += with `more`, in tiles of sums in registers; shape is
    M, K, N."""
    M, K, N = shape
    nt = divisor(N, 4*self.m.lanes)
    mt = divisor(M, max(1, self.m.registers//2//ceildiv(nt, self.m.lanes)))
    sums = self.array(mt, nt)
    with self.over(M//mt) as i, self.over(N//nt) as j:
      for n in range(mt):
        with self.over(nt) as v:
          self.put(sums(n, v), to(i*mt + n, j*nt + v).load() if more else 0.0)
      with self.over(K) as k:
        x = [a(i*mt + n, k) for n in range(mt)]
        with self.over(nt) as v:
          y = b(k, j*nt + v)
          for n in range(mt): self.add(sums(n, v), x[n]*y)
      for n in range(mt):
        with self.over(nt) as v: self.put(to(i*mt + n, j*nt + v), sums(n, v))

  def end(self, name:str) -> UOp:
    kind = f"{'causal' if self.causal else 'all'}{len(self.place)}"
    return self.finish(f"{name}_{self.G}x{self.L}x{self.T}x{self.D}_{kind}")

def query_block(L:int, m:Machine) -> int:
  "Queries in a block: a power of two of vector registers."
  return min(BLOCK, m.lanes << (ceildiv(L, m.lanes) - 1).bit_length())

def attention_kernel(y:UOp, q:UOp, k:UOp, v:UOp, *place:UOp, lengths:tuple[int, int],
                     causal:bool, m:Machine) -> UOp:
  "y (G,L,D+1): softmax(q k^T / sqrt D) v, and log Σ exp behind it."
  (G, L, D), n = q.shape, query_block(lengths[0], m)
  body = Queries(G*(L//n), q, lengths, place, causal, m)
  qt, s, acc = body.array(D, n), body.array(BLOCK, n), body.array(D, n)
  largest, new, total, shrink = (body.array(n) for _ in range(4))
  g, block = body.h//(L//n), body.h % (L//n)
  body.begin(g, block)
  with body.over(n) as i:
    for x, at_first in ((largest, LOWEST), (new, LOWEST), (total, 0.0)): body.put(x(i), at_first)
  with body.over(D) as d, body.over(n) as i:
    body.put(qt(d, i), q[g, body.first + i, d]*D**-0.5)
    body.put(acc(d, i), 0.0)
  with body.over(k.shape[1]//BLOCK) as keys:
    t0 = keys*BLOCK
    body.product(s, (BLOCK, D, n), lambda t, d: k[g, t0 + t, d], qt)         # s = k q / sqrt D
    with body.over(BLOCK) as t, body.over(n) as i:
      score = body.seen(t0 + t, i).where(s(t, i), LOWEST)
      body.put(new(i), new(i).maximum(score))
    with body.over(n) as i:
      body.put(shrink(i), (largest(i) - new(i)).exp())
      body.put(largest(i), new(i))
      body.put(total(i), total(i)*shrink(i))
    with body.over(BLOCK) as t, body.over(n) as i:                           # p, total
      power = (s(t, i) - largest(i)).exp()
      body.put(s(t, i), body.seen(t0 + t, i).where(power, 0.0))
      body.add(total(i), s(t, i))
    with body.over(D) as d, body.over(n) as i: body.put(acc(d, i), acc(d, i)*shrink(i))
    body.product(acc, (D, BLOCK, n), lambda d, t: v[g, t0 + t, d], s, more=True)   # acc += v p
  with body.over(n) as i:
    with body.over(D) as d: body.put(y[g, body.first + i, d], acc(d, i)/total(i))
    body.put(y[g, body.first + i, D], largest(i) + total(i).log())
  return body.end("attention")

def attention_grad_kernel(dq:UOp, dk:UOp, dv:UOp, y:UOp, dy:UOp, q:UOp, k:UOp, v:UOp, *place:UOp,
                          lengths:tuple[int, int], causal:bool, m:Machine) -> UOp:
  "dq, dk, dv. A core has groups of its own: all queries add to dk and dv."
  (G, L, D), n = q.shape, query_block(lengths[0], m)
  body = Queries(G, q, lengths, place, causal, m)
  qt, dyt, dqt = (body.array(D, n) for _ in range(3))
  p, ds, dot = body.array(BLOCK, n), body.array(BLOCK, n), body.array(n)
  g, dk_so_far, dv_so_far = body.h, body.ordered(dk), body.ordered(dv)
  with body.over(dk.shape[1]) as t, body.over(D) as d:
    for x in (dk_so_far, dv_so_far): body.put(x(g, t, d), 0.0)
  with body.over(L//n) as block:
    body.begin(g, block)
    row = lambda i: body.first + i
    with body.over(n) as i: body.put(dot(i), 0.0)
    with body.over(D) as d, body.over(n) as i:
      body.put(qt(d, i), q[g, row(i), d]*D**-0.5)
      body.put(dyt(d, i), dy[g, row(i), d])
      body.put(dqt(d, i), 0.0)
      body.add(dot(i), dyt(d, i)*y[g, row(i), d])                            # dy y
    with body.over(k.shape[1]//BLOCK) as keys:
      t0 = keys*BLOCK
      so_far_dk = lambda t, d: dk_so_far(g, t0 + t, d)
      so_far_dv = lambda t, d: dv_so_far(g, t0 + t, d)
      body.product(p, (BLOCK, D, n), lambda t, d: k[g, t0 + t, d], qt)       # s = k q / sqrt D
      body.product(ds, (BLOCK, D, n), lambda t, d: v[g, t0 + t, d], dyt)     # v dy
      with body.over(BLOCK) as t, body.over(n) as i:                         # p, ds / sqrt D
        power = (p(t, i) - y[g, row(i), D]).exp()
        body.put(p(t, i), body.seen(t0 + t, i).where(power, 0.0))
        body.put(ds(t, i), p(t, i)*(ds(t, i) - dot(i))*D**-0.5)
      body.product(dqt, (D, BLOCK, n), lambda d, t: k[g, t0 + t, d], ds, more=True)
      body.product(so_far_dk, (BLOCK, n, D), ds, lambda i, d: q[g, row(i), d], more=True)
      body.product(so_far_dv, (BLOCK, n, D), p, lambda i, d: dy[g, row(i), d], more=True)
    with body.over(n) as i, body.over(D) as d: body.put(dq[g, row(i), d], dqt(d, i))
  return body.end("attention_grad")

def attention_backward(dy:Tensor, y:Tensor, q:Tensor, k:Tensor, v:Tensor, *place:Tensor,
                       **options:object) -> tuple[Tensor|None, ...]:
  "dq, dk, dv; positions get no gradient."
  kernel = bound(attention_grad_kernel, **options)
  grads = launch(kernel, [q.shape, k.shape, v.shape], [y, dy, q, k, v, *place],
                 no_second_gradient("attend"))
  return *grads, *(None for _ in place)

# ================================================================ embedding
# tinygrad's own gradient compares every token with every word: 22 s for 1024 tokens of 50264 words,
# (768,) each. The table comes as one long row: of two indices, tinygrad would make sure by a
# division that they are within bounds.

def embedding_kernel(y:UOp, table:UOp, ids:UOp, m:Machine) -> UOp:
  "y[row] = table[ids[row]]"
  n, D = y.shape
  body = Body(m, n, divisor(D, 256))
  with body.share(D) as c:
    entry = table[ids[body.h].load()*D + c].load()
    body.put(y[body.h, c], widened(entry))
  return body.finish(f"embed_{n}x{D}")

def embedding_grad_kernel(dtable:UOp, dy:UOp, ids:UOp, m:Machine) -> UOp:
  """dtable = 0; dtable[ids[row]] += dy[row], row by row.

  Each core has columns of its own, so that no two add to the same place. On a GPU each thread has
  one, and a group the words h, h + 32, h + 64, … alone: it passes over the ids of others.
  """
  n, D = dy.shape
  threads = divisor(D, 32)
  columns, every = (threads, 32) if m.gpu else (D//divisor(D, m.cores), 1)
  body = Body(m, D//columns*every, threads)
  sums, first = body.ordered(dtable), body.h//every*columns
  words, mine = dtable.shape[0]//D, body.h % every
  with body.over(ceildiv(words, every), barrier=False) as i, body.share(columns) as c:
    word = i*every + mine
    body.put(sums(word*D + first + c), 0.0, word < words if words % every else None)
  with body.over(n, barrier=False) as t, body.share(columns) as c:
    word = ids[t].load()
    place = sums(word*D + first + c)
    body.put(place, place + dy[t, first + c], (word % every).eq(mine) if every > 1 else None)
  return body.finish(f"embed_grad_{n}x{D}")

def embedding_backward(dy:Tensor, y:Tensor, table:Tensor, ids:Tensor, m:Machine
                       ) -> tuple[Tensor, None]:
  "dtable; ids get no gradient."
  none = no_second_gradient("embedding")
  return run(embedding_grad_kernel, none, table.shape, [dy, ids], m=m), None

def lookup(table:Tensor, ids:Tensor) -> Tensor|None:
  """table[ids]: ids (…) int from 0 to V-1, table (V,D) of any of WEIGHTS -> (…,D) float32.

  Differentiable once in the table.
  """
  table, ids = on_one_device(table, ids)
  if not serves(weights=[table], gpu=True) or 0 in ids.shape: return None
  m, (V, D) = machine(table.device), table.shape
  inputs = table.reshape(-1), ids.reshape(-1).clip(0, V-1)
  y = run(embedding_kernel, embedding_backward, (prod(ids.shape), D), inputs, m=m)
  return y.reshape(*ids.shape, D)

# ================================================================ the loss
# On a GPU alone. For (8192,50264) and its gradient tinygrad's kernels take 8 ms on an H200, with a
# gradient in bfloat16 13, of which 2.5 are a sum by 16 threads: reading the logits takes 0.4.

class Row(Body):
  """A row of V logits and its target, by a group of a GPU's threads.

  The loops go on to a multiple of the threads, n; `inside` says whether there is a logit i < n.
  """
  def __init__(self, logits:UOp, targets:UOp, m:Machine):
    (rows, self.V), self.logits = logits.shape, logits
    super().__init__(m, rows, 64)
    self.n = round_up(self.V, self.threads)
    self.target = targets[self.h].load()
  def inside(self, i:UOp) -> UOp: return i < self.V
  def logit(self, i:UOp, ok:UOp, other:float) -> UOp:
    return ok.where(self.logits[self.h, i.valid(ok)].load(), other)
  def picked(self) -> UOp:
    "The target's logit; 0 where there is none, as nothing past the row's end may be read."
    there = (self.target >= 0) & self.inside(self.target)
    return self.logit(self.target, there, 0.0)

def surprisal_kernel(y:UOp, logits:UOp, targets:UOp, m:Machine) -> UOp:
  "y[row] = log Σ exp logits[row] - logits[row, target], that last only of a target that exists"
  body = Row(logits, targets, m)
  x = lambda i: body.logit(i, body.inside(i), LOWEST)
  [largest] = body.totals(body.n, x, both=UOp.maximum, start=LOWEST)
  [total] = body.totals(body.n, lambda i: (x(i) - largest).exp())
  body.put_once(y[body.h], total.log() + largest - body.picked())
  return body.finish(f"surprisal_{y.shape[0]}x{body.V}")

def surprisal_grad_kernel(dx:UOp, dy:UOp, y:UOp, logits:UOp, targets:UOp, m:Machine) -> UOp:
  "dx[row, i] = dy[row] (p[i] - (i = target)), log p[i] = logits[row, i] - y[row] - picked"
  body = Row(logits, targets, m)
  total = y[body.h] + body.picked()                        # log Σ exp
  with body.share(body.n) as i:
    ok = body.inside(i)
    p = (body.logit(i, ok, 0.0) - total).exp()
    slope = dy[body.h]*(p - i.eq(body.target).where(1.0, 0.0))
    body.put(dx[body.h*body.V + i], slope, ok)
  return body.finish(f"surprisal_grad_{y.shape[0]}x{body.V}")

def surprisal_backward(dy:Tensor, y:Tensor, logits:Tensor, targets:Tensor, m:Machine
                       ) -> tuple[Tensor, None]:
  "dlogits; targets get no gradient."
  none, size = no_second_gradient("surprisal"), (logits.numel(),)
  dx = run(surprisal_grad_kernel, none, size, [dy, y, logits, targets], m=m)
  return dx.reshape(logits.shape), None

def surprisal(logits:Tensor, targets:Tensor) -> Tensor|None:
  "`flashconv.surprisal` on a GPU, differentiable once."
  logits, targets = on_one_device(logits, targets)
  if not serves(logits, gpu=True) or not machine(logits.device).gpu or 0 in targets.shape:
    return None
  inputs = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).cast(dtypes.int)
  size = targets.numel(),
  y = run(surprisal_kernel, surprisal_backward, size, inputs, m=machine(logits.device))
  return y.reshape(targets.shape)

# ================================================================ short filters
# The shift SSM has 64 taps. Their sum takes about as long as an FFT, and its kernels compile in
# half a second of one core, an FFT's in four. Milliseconds forward, and with all gradients, of
# 64 taps on two cores with AVX2:
#   B x H x L           by taps       by FFT
#   8 x 128 x 256       0.48  1.0     0.52  0.95
#   16 x 256 x 2048     12.9  38      13.0  34
#   1 x 768 x 1024      1.4   3.3     3.0   11
FEW_TAPS = 64

class Taps(Body):
  "The body of a kernel on the rows (B,L) of a channel, and its filter, to whose k[0] D is added."
  def __init__(self, w:UOp, k:UOp, D:Sequence[UOp], m:Machine, flipped:bool=False):
    (_, H, self.L), self.K = w.shape, k.shape[1]
    super().__init__(m, H)
    self.vectors = min(8, ceildiv(self.L, m.lanes))    # of sums: their additions overlap
    self.taps = self.array(self.K)
    first = self.K - 1 if flipped else 0
    with self.over(self.K) as j: self.put(self.taps(j), k[self.h, first - j if flipped else j])
    if D: self.add(self.taps(first), D[0][self.h])

  def zeros(self) -> Value:
    "Zeros in front of a row and behind it."
    n = self.K - 1 + max(self.L, self.vectors*self.m.lanes)
    x = self.array(n)
    with self.over(n) as i: self.put(x(i), 0.0)
    return x

  def slide(self, to:Value, x:Value):
    "to(t) = Σ_j taps[j] x(t + j), for t < L"
    L, n = self.L, self.m.lanes
    each, sums = range(self.vectors), self.array(self.vectors, n)
    with self.over(ceildiv(L, len(each)*n)) as block:
      # the last block ends where the row does
      first = (block*len(each)*n).minimum(max(0, L - len(each)*n))
      with self.over(n) as i:
        for v in each: self.put(sums(v, i), 0.0)
      with self.over(self.K) as j:
        tap = self.taps(j)
        with self.over(n) as i:
          for v in each: self.add(sums(v, i), tap*x(first + v*n + i + j))
      for v in each:
        with self.over(min(n, L - v*n)) as i: self.put(to(first + v*n + i), sums(v, i))

def taps_kernel(c:UOp, w:UOp, k:UOp, *D:UOp, m:Machine) -> UOp:
  "c = k ∗ w + D w"
  B, H, L = w.shape
  body = Taps(w, k, D, m, flipped=True)
  x, before = body.zeros(), body.K - 1
  with body.over(B) as b:
    with body.over(L) as t: body.put(x(before + t), w[b, body.h, t])
    body.slide(lambda t: c[b, body.h, t], x)
  return body.finish(f"taps_{B}x{H}x{L}x{body.K}")

def taps_grad_kernel(dw:UOp, dk:UOp, dc:UOp, w:UOp, k:UOp, *D:UOp, m:Machine) -> UOp:
  "dw[t] = Σ_j k[j] dc[t + j] + D dc[t], dk[j] = Σ_t dc[t] w[t - j] over all rows; dD is dk[0]."
  B, H, L = w.shape
  body = Taps(w, k, D, m)
  x, dx, before = body.zeros(), body.zeros(), body.K - 1
  sums = body.array(body.K)                            # dk, its last tap first
  with body.over(body.K) as j: body.put(sums(j), 0.0)
  with body.over(B) as b:
    with body.over(L) as t:
      body.put(x(before + t), w[b, body.h, t])
      body.put(dx(t), dc[b, body.h, t])
    body.slide(lambda t: dw[b, body.h, t], dx)
    with body.over(L) as t, body.over(body.K) as j: body.add(sums(j), dx(t)*x(t + j))
  with body.over(body.K) as j: body.put(dk[body.h, j], sums(before - j))
  return body.finish(f"taps_grad_{B}x{H}x{L}x{body.K}")

def taps_backward(dc:Tensor, c:Tensor, w:Tensor, k:Tensor, *D:Tensor, m:Machine
                  ) -> tuple[Tensor, ...]:
  dw, dk = launch(bound(taps_grad_kernel, m=m), [w.shape, k.shape], [dc, w, k, *D],
                  no_second_gradient("fftconv"))
  return dw, dk, *(dk[:, 0] for _ in D)

def gated_conv(u:Tensor, k:Tensor, D:Tensor|None, v:Tensor|None, q:Tensor|None) -> Tensor|None:
  """y = k ∗ u + D u: u (B,H,L), k (H,K) or (1,K), D (H,). Without gates, for few taps.

  Differentiable once.
  """
  skip = [] if D is None else [D]
  if v is not None or q is not None or not serves(u, k, *skip): return None
  if k.shape[1] > FEW_TAPS or u.shape[2] > LONG: return None
  m = machine(u.device)
  k = k.expand(u.shape[1], -1)
  if 2*u.numel()*k.shape[1] < ONE_CORE: m = m._replace(cores=1)
  return run(taps_kernel, taps_backward, u.shape, [u, k, *skip], m=m)

# ================================================================ decoding: states are overwritten

def write_kernel(cache:UOp, x:UOp, pos:UOp) -> UOp:
  G, L, D = x.shape
  T = cache.numel()//G//D
  g, l, d = (UOp.range(n, i) for i, n in enumerate(x.shape))
  at = (pos[0].load() + l).minimum(T - 1)             # past the end: nobody else's memory
  done = cache[(g*T + at)*D + d].store(x[g, l, d]).end(g, l, d)
  return done.sink(arg=KernelInfo(name=f"write_{G}x{L}x{D}"))       # GPUs may rearrange it

def write_cache(cache:Tensor, x:Tensor, pos:Tensor) -> Tensor|None:
  """Overwrites rows pos, pos+1, … of cache (B,heads,T,hd) with x (B,heads,L,hd), on any device.

  pos (1,) int. Not differentiable.
  """
  if not whole(cache, x): return None
  made, = launch(write_kernel, [cache.reshape(-1)], [x.reshape(-1, *x.shape[2:]), pos],
                 "write_cache overwrites a cache: it has no gradient.")
  return made.reshape(cache.shape)

def attend_kernel(y:UOp, q:UOp, k:UOp, v:UOp, pos:UOp, *start:UOp, m:Machine) -> UOp:
  "y = softmax(q k^T / sqrt D) v, one query a group, over rows start to pos of k and v (G T D,)."
  G, D = q.shape
  T, body = k.numel()//q.numel(), Body(m, G)
  g, rows = body.h, (pos[0].load() + 1).cast(dtypes.weakint)
  begin = first_seen(g, G, *start)
  seen = lambda t, x, otherwise: x if begin is None else (t >= begin).where(x, otherwise)
  at = lambda t, d: (g*T + t)*D + d
  s, acc, largest, total = (body.array(n) for n in (T, D, 1, 1))

  body.put(largest(0), LOWEST)
  body.put(total(0), 0.0)
  with body.over(D) as d: body.put(acc(d), 0.0)
  with body.over(rows) as t:                          # s = q k / sqrt D, and the largest of them
    [dot] = body.totals(D, lambda d: q[g, d]*k[at(t, d)])
    score = dot*D**-0.5
    body.put(s(t), score)
    body.put(largest(0), largest(0).maximum(seen(t, score, LOWEST)))
  with body.over(rows) as t:                          # s = exp(s - largest)
    power = (s(t) - largest(0)).exp()
    body.put(s(t), seen(t, power, 0.0))
  with body.over(rows) as t:                          # y = s v / Σ s
    body.add(total(0), s(t))
    with body.over(D) as d:
      body.add(acc(d), s(t)*v[at(t, d)])
  with body.over(D) as d:
    body.put(y[g*D + d], acc(d)/total(0))
  # loops whose length is known only to the device: tinygrad can't count what they do
  work = Estimates(4*G*T*D, 8*G*T*D, 8*G*T*D)
  return body.finish(f"attend_{G}x{T}x{D}", estimates=work)

def attend(q:Tensor, k:Tensor, v:Tensor, pos:Tensor|None=None, start:Tensor|None=None,
           causal:bool=True, dropout:float=0.0) -> Tensor|None:
  """softmax(q k^T / sqrt hd) v: q (B,heads,L,hd), k, v (B,heads,T,hd) -> like q.

  pos, start: see h3tiny.attend. Differentiable once. A single query with `pos` is decoding: the
  time is that of reading the rows that it sees, whatever T, and there is no gradient.
  """
  (B, heads, L, hd), T = q.shape, k.shape[2]
  if not serves(q, k, v) or (dropout and TRAINING): return None
  place = [x for x in (pos, start) if x is not None]
  if causal and pos is not None and L == 1:
    if T > MAX_ROW: return None
    inputs = q.reshape(-1, hd), k.reshape(-1), v.reshape(-1), *place
    y, = launch(bound(attend_kernel, m=machine(q.device)), [(B*heads*hd,)], inputs,
                "attend, for one query at `pos`, is for decoding and has no gradient.")
    return y.reshape(q.shape)
  m = machine(q.device)
  if B*heads*L*T*hd < ONE_CORE//4: m = m._replace(cores=1)
  G = B*heads
  more = 0 if place else -G % m.cores        # groups, so that the cores have as many each
  def padded(x:Tensor, block:int) -> Tensor:
    "(G,L,hd) in whole blocks: zeros behind, as many groups for each core."
    return x.reshape(G, -1, hd).pad(((0, more), (0, -x.shape[2] % block), None))
  inputs = padded(q, query_block(L, m)), padded(k, BLOCK), padded(v, BLOCK), *place
  shape = *inputs[0].shape[:2], hd + 1
  y = run(attention_kernel, attention_backward, shape, inputs, lengths=(L, T), causal=causal, m=m)
  return y[:G, :L, :hd].reshape(q.shape)

def h3_step_kernel(y:UOp, shift:UOp, re:UOp, im:UOp,
                   q:UOp, k:UOp, v:UOp,
                   B:UOp, C:UOp, skip:UOp, D:UOp, *modes:UOp, m:Machine) -> UOp:
  """y = q (2 Re C x' + D kv), kv = (C s' + skip k) v, s' = shift s + B k, x' = dA x + dB kv.

  y (batch channels,); modes: the real and the imaginary part of dA, dB, and C. On a GPU a work
  group takes a channel of a row. Its threads share the state, 2 M = N numbers of the shift SSM and
  M modes: what divides M divides both, and each number in memory is touched by one thread only.
  """
  batch, channels, N = shift.shape
  M = re.shape[2]
  body = Body(m, channels*batch, divisor(M, STEP_THREADS))
  h, r = body.h//batch, body.h % batch
  pair = lambda n, i: tuple(x[h, i] for x in modes[2*n:2*n + 2])      # of dA, dB, C
  key = k[r, h]
  # the state goes through memory of its own: on a CPU the compiler can't tell that the new one does
  # not overwrite what is read next, on a GPU a thread needs its neighbour's number
  s, *x = (body.array(n) for n in (N + 1, M, M))
  new_shift = body.ordered(shift)
  body.put_once(s(0), 0.0)
  with body.share(N) as j: body.put(s(j+1), shift[r, h, j])
  with body.share(N) as j:                                            # s' = shift s + B k
    body.put(new_shift(r, h, j), s(j) + B[h, j]*key)
  [shifted] = body.totals(N, lambda j: new_shift(r, h, j)*C[h, j])
  kv = (shifted + skip[h]*key)*v[r, h]
  with body.share(M) as i:                                            # x' = dA x + dB kv
    turned = cmul(pair(0, i), (re[r, h, i], im[r, h, i]))
    for new, a, b in zip(x, turned, pair(1, i)):
      body.put(new(i), a + b*kv)
  def output(i:UOp) -> UOp:
    re, _ = cmul(pair(2, i), [new(i) for new in x])
    return re
  [half] = body.totals(M, output)
  body.put_once(y[r*channels + h], q[r, h]*(half*2 + D[h]*kv))
  for old, new in zip((re, im), x):
    with body.share(M) as i: body.put(old[r, h, i], new(i))
  return body.finish(f"h3_step_{batch}x{channels}x{N}")

STEP_THREADS = 32        # at most: of a GPU's work group

def h3_step(q:Tensor, k:Tensor, v:Tensor, state:tuple, weights:tuple) -> tuple[Tensor, tuple]|None:
  """y (B,D) of an H3 layer with heads of one channel, and its state, which is overwritten.

  q, k, v (B,D); state: shift (B,D,N), re and im (B,D,M); weights: the shift SSM, the diagonal SSM,
  and the latter's dA, dB, C, pairs of (D,M). On any device. Not differentiable.
  """
  shift, diag, (dA, dB, C) = weights
  inputs = [q, k, v, shift.B, shift.C[0], shift.D, diag.D, *dA, *dB, *C]
  if state[1].shape[:2] != q.shape or not serves(*inputs, *state, gpu=True): return None
  m = machine(q.device)
  if 1 + len(state) + len(inputs) > m.buffers: return None
  y, *new = launch(bound(h3_step_kernel, m=m), [(q.numel(),), *state], inputs,
                   "h3_step, which overwrites a state, has no gradient.")
  return y.reshape(q.shape), type(state)(*new)

# ================================================================ tinygrad's own words
# Each of these answers a method of tinygrad's: by a kernel where one serves, else as before.
PLAIN_DOT, PLAIN_LINEAR, PLAIN_SOFTMAX = Tensor.dot, Tensor.linear, Tensor.softmax
PLAIN_NORM = nn.LayerNorm.__call__

def dot(self:Tensor, w:Tensor, dtype:DType|None=None) -> Tensor:
  "self @ w, with sums of type dtype."
  plain = dtypes.ushort in (self.dtype, w.dtype)           # numbers, no bfloat16s
  return PLAIN_DOT(self, w, dtype) if plain else multiply(self, w, dtype=dtype)

def linear(self:Tensor, weight:Tensor, bias:Tensor|None=None, dtype:DType|None=None) -> Tensor:
  """self weight + bias, with sums of type dtype. A weight of uint16 holds bfloat16, see WEIGHTS.

  With a dtype of float32, factors of float16 or bfloat16 stay so: their products are exact.
  """
  if weight.ndim != 2 or dtype not in (None, dtypes.float):
    return PLAIN_LINEAR(self, weight, bias, dtype)
  return multiply(self, weight, bias, dtype)

def softmax_method(self:Tensor, axis:int=-1, dtype:DType|None=None) -> Tensor:
  x, = on_one_device(self)
  last = dtype is None and x.ndim > 0 and axis in (-1, x.ndim - 1)
  fast = last and serves(x) and x.shape[-1] <= MAX_ROW
  return softmax(x) if fast else PLAIN_SOFTMAX(self, axis, dtype)

def layernorm_call(self:nn.LayerNorm, x:Tensor) -> Tensor:
  if self.weight is None or self.axis != (-1,): return PLAIN_NORM(self, x)
  return layernorm(x, self.weight, self.bias, self.eps)

def embedding_call(self:nn.Embedding, ids:Tensor) -> Tensor:
  return flashconv.lookup(self.weight, ids)

ANSWERS = ((Tensor, "dot", dot),
           (Tensor, "linear", linear),
           (Tensor, "softmax", softmax_method),
           (nn.LayerNorm, "__call__", layernorm_call),
           (nn.Embedding, "__call__", embedding_call))

def answer_with_kernels():
  "Lets tinygrad's own words and the `replaceable` definitions be answered by the kernels above."
  for owner, name, fast in ANSWERS: setattr(owner, name, fast)
  for fast in (lookup, surprisal, attend, gated_conv, write_cache, h3_step):
    FAST[fast.__name__] = fast

def four_words(table:Tensor) -> Tensor:
  "A look-up, for `selfcheck`: one word comes twice, some do not come."
  return flashconv.lookup(table, Tensor([1, 0, 3, 3], device=table.device))

def four_targets(logits:Tensor) -> Tensor:
  "The loss, for `selfcheck`: one target is no token."
  return flashconv.surprisal(logits, Tensor([1, 0, -1, 3], device=logits.device))

def attend_all(q:Tensor, k:Tensor, v:Tensor) -> Tensor:
  "Attention that is not causal, for `selfcheck`."
  y = attend(q, k, v, causal=False)
  return attend_plainly(q, k, v) if y is None else y

def attend_plainly(q:Tensor, k:Tensor, v:Tensor) -> Tensor:
  return (q*q.shape[-1]**-0.5 @ k.transpose(-1, -2)).softmax(-1) @ v

# large enough for `tiled_gemm`, with 8 x 8 sums a thread forward, 4 x 4 backward, and dw in parts
CHECKS["matmul"] = linear, None, (1150, 1400), (1150, 40), (40, 1400), (1400,)
CHECKS["layernorm"] = layernorm, None, (5, 24), (5, 24), (24,), (24,)
CHECKS["softmax"] = softmax_method, None, (5, 24), (5, 24)
CHECKS["attend"] = attend_all, attend_plainly, *[(1, 2, 40, 32)]*4
CHECKS["taps"] = flashconv.fftconv, None, (3, 4, 24), (3, 4, 24), (4, 8), (4,)
CHECKS["embedding"] = four_words, None, (4, 8), (5, 8)

# ================================================================ the cores
# tinygrad 0.14.0 runs the threads of a CPU kernel one after the other, and each kernel of a TinyJit
# from Python, 0.1 ms each. Here a pool of threads runs them at once, and a TinyJit is a list of
# kernels that each core goes through in native code, waiting for the others after each of them.

WORDS = 64             # of an entry in a list of kernels: a function, or 0, and its arguments
TO_SHARE = 1 << 17     # size of the loops of tinygrad's own kernels from which cores share them
ABI = getattr(cstyle.ClangRenderer, "abi", "")        # Windows calls functions in its own way

# Core `me` runs n entries. done[8 c], a cache line each, is how many of them core c is through
# with: nobody starts on a kernel before all are through with the one before. Who waits lets others
# have the core, as there may be more threads than cores. Behind the last kernel nobody waits here:
# to spin takes a tenth of the others' time.
REPLAY = f"""
typedef unsigned long long word;
typedef void ({ABI} *kernel)({", ".join(["word"]*(WORDS - 1))});
{ABI} void replay(word (*entries)[{WORDS}], volatile word *done, void (*give_way)(void),
                  word n, word cores, word me) {{
  for (word i = 0; i < n; i++) {{
    word *e = entries[i];
    if (e[0]) ((kernel) e[0])({", ".join(f"e[{w}]" for w in range(1, WORDS))});
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    done[8*me] = i + 1;
    for (word core = 0; core < cores && i + 1 < n; core++)
      while (done[8*core] <= i) if (give_way) give_way();
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
  }}
}}"""
GIVE_WAY = 0
if os.name == "posix": GIVE_WAY = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value

@functools.cache
def replay_program() -> CPUProgram:
  device = Device["CPU"]
  target = dataclasses.replace(device.renderer.target, renderer="CLANG")
  compiled = cstyle.ClangRenderer(target).compiler.compile_cached(REPLAY)
  return CPUProgram(device, TinyELF(compiled, "replay", target, ()))

class Cores:
  """A thread for each core but the first, whose share falls to the thread that asks.

  Native code runs without Python's lock. Nothing interrupts who waits for it: see `run_whole`.
  """
  def __init__(self):
    self.shares, self.ended, self.threads = queue.SimpleQueue(), queue.SimpleQueue(), 0

  def run(self, entries:np.ndarray):
    "Core c runs the kernels of entries[c], (cores,n,WORDS), in turn."
    cores, n, _ = entries.shape
    done, shares = np.zeros(8*cores, np.uint64), []
    for core in range(cores):
      args = entries[core].ctypes.data, done.ctypes.data, GIVE_WAY, n, cores, core
      shares.append([ctypes.c_uint64(a) for a in args])
    with LOCK:
      while self.threads < cores - 1: self.start()
      for share in shares[1:]: self.shares.put(share)
      replay_program().fxn(*shares[0])
      for _ in shares[1:]: self.ended.get()

  def start(self):
    usual = threading.stack_size(16 << 20)            # a kernel's private arrays are on the stack
    threading.Thread(target=self.serve, args=(self.shares, self.ended), daemon=True).start()
    threading.stack_size(usual)
    self.threads += 1

  def serve(self, shares:queue.SimpleQueue, ended:queue.SimpleQueue):
    while True:
      replay_program().fxn(*shares.get())
      ended.put(None)

CORES = Cores()

def write_entry(entries:np.ndarray, program:CPUProgram, args:Sequence[int]):
  "Makes `entries` (cores,WORDS) a call of the program for each core, which is given its number."
  entries[:, 0], entries[:, 1:1+len(args)] = program.addr, args
  place = program.runtimevars.get("core_id")
  if place is not None: entries[:, 1 + place] = np.arange(len(entries))

PLAIN_CALL = CPUProgram.__call__

def call_on_all_cores(self, *buffers:HCQBuffer, global_size:tuple=(1, 1, 1), vals:tuple=(),
                      wait:bool=False, **options) -> float|None:
  "CPUProgram.__call__, which is for a single kernel: its threads at once."
  if global_size[0] == 1 or "core_id" not in self.runtimevars:
    return PLAIN_CALL(self, *buffers, global_size=global_size, vals=vals, wait=wait, **options)
  began = time.perf_counter()
  entries = np.zeros((global_size[0], 1, WORDS), np.uint64)
  write_entry(entries[:, 0], self, [*(b.va_addr for b in buffers), *(v or 0 for v in vals)])
  CORES.run(entries)
  return time.perf_counter() - began if wait else None

class Replay(tinyjit.GraphRunner):
  "The kernels of a TinyJit, run at once."
  def __init__(self, linear:UOp, input_uops:tuple[UOp, ...]=()):
    super().__init__(linear, input_uops)
    infos = [program.arg for _, program, _, _ in self.calls]
    shares = [int(info.global_size[0]) for info in infos]
    self.entries = np.zeros((max(shares), len(infos), WORDS), np.uint64)
    self.inputs = []     # kernel, word and UOp of each input of the TinyJit, or of a part of one
    for i, (info, (_, _, buffers, _)) in enumerate(zip(infos, self.calls)):
      addresses = [buffers[b]._buf.va_addr for b in info.globals]
      write_entry(self.entries[:shares[i], i], self.runtimes[i], addresses)
      args = tinyjit.get_call_arg_uops(self.linear.src[i])
      for word, b in enumerate(info.globals, 1):
        changes = any(u.op is Ops.PARAM for u in args[b].toposort())
        if changes: self.inputs.append((i, word, args[b]))
    self.calls = []      # lets go of the first call's inputs

  def __call__(self, input_uops:tuple[UOp, ...], var_vals:dict[str, int], wait:bool=False
               ) -> float|None:
    began, memory = time.perf_counter(), []           # which lives until the kernels have run
    for i, word, arg in self.inputs:
      memory.append(realize._resolve(arg, input_uops).buffer.ensure_allocated()._buf)
      self.entries[:, i, word] = memory[-1].va_addr
    CORES.run(self.entries)
    return time.perf_counter() - began if wait else None

  @staticmethod
  def supports_uop(devices:list, call:UOp) -> bool:
    if not tinyjit.GraphRunner.supports_uop(devices, call): return False
    info = call.src[0].arg
    known = all(v.expr == "core_id" for v in info.vars)
    return known and len(info.globals) + len(info.vars) < WORDS

@functools.cache
def threaded(kernel:UOp) -> UOp:
  "A kernel of tinygrad's own, its outermost loop for all cores if they divide it and it is long."
  renderer = Device["CPU"].renderer
  cores = renderer.global_max[0]
  work = prod(r.vmax + 1 for r in kernel.toposort() if r.op is Ops.RANGE)
  if cores == 1 or work < TO_SHARE: return kernel
  # what tinygrad does before it optimises a kernel (codegen.full_rewrite_to_sink)
  flatten = codegen.pm_flatten_range
  for rules, options in ((codegen.multi_pm, {}),
                         (codegen.pm_mops, {"bottom_up": True}),
                         (codegen.pm_load_collapse, {}),
                         (codegen.pm_split_ranges + flatten, {"ctx": {}}),
                         (codegen.sym + flatten, {}),
                         (flatten + codegen.pm_simplify_ranges, {"ctx": {}})):
    kernel = graph_rewrite(kernel, rules, **options)
  scheduler = Scheduler(kernel, renderer)
  scheduler.convert_loop_to_global()
  loops = (i for i in scheduler.axes_of(AxisType.WEAK) if scheduler.full_shape[i] % cores == 0)
  if (axis := next(loops, None)) is not None:
    try: scheduler.apply_opt(Opt(OptOps.THREAD, axis, cores))
    except KernelOptError: pass                       # an inner loop, say
  return scheduler.get_optimized_ast()

def shared_by_cores(call:UOp) -> UOp:
  "A call of a kernel of tinygrad's own, which is `threaded` where NOOPT leaves its loops alone."
  if not NOOPT or call.op is not Ops.CALL: return call
  kernel = call.src[0]
  if kernel.op is not Ops.SINK or kernel.arg.opts_to_apply is not None: return call
  if call.src[1].device != "CPU": return call
  return call.replace(src=(threaded(kernel), *call.src[1:]))

def lowered(call:UOp) -> UOp:
  """The call of the kernel's program, if there is one. tinygrad puts it in by a search through each
  kernel: a third of a second for a training step."""
  kernel = call.op is Ops.CALL and realize._get_call_to_compile(call)
  if not kernel or kernel[0] is not call.src[0]: return call
  program = realize.to_program_cache.get(codegen.to_program_key(*kernel))
  return call if program is None else call.replace(src=(program, *call.src[1:]))

def size_of_kernel(call:UOp) -> int: return len(call.src[0].toposort())

PLAIN_ALLOC = CPUAllocator._alloc

def private_memory(self, size:int, options:BufferSpec) -> HCQBuffer:
  """CPUAllocator._alloc, with memory that a process has for itself.

  tinygrad's is shared with a child after a fork: what one computes would overwrite the other's.
  """
  if os.name != "posix" or options.external_ptr is not None: return PLAIN_ALLOC(self, size, options)
  memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  options = dataclasses.replace(options, external_ptr=helpers.mv_address(memory))
  buffer = PLAIN_ALLOC(self, size, options)
  buffer.meta = memory                                # freed with the buffer
  return buffer

@functools.cache
def use_all_cores():
  "Lets kernels run on all cores, once in a process."
  CPUProgram.__call__, CPUAllocator._alloc = call_on_all_cores, private_memory
  compile_all = realize.lower_and_compile
  def compile_shared(linear:UOp) -> UOp:
    calls = [*map(shared_by_cores, linear.src)]
    # first what takes long, lest a worker begins it when the others have ended
    missing = sorted((c for c in calls if lowered(c) is c), key=size_of_kernel, reverse=True)
    compile_all(linear.replace(src=tuple(missing)))
    return compile_all(linear.replace(src=tuple(map(lowered, calls))))
  realize.lower_and_compile = compile_shared
  replay_program()                                    # compiled before the first job
  Device["CPU"].graph = Replay

# ================================================================ threads, forks and Ctrl-C

@contextlib.contextmanager
def uninterrupted(number:int):
  "Holds back what a signal does, which may raise in the main thread, until the block has ended."
  handler, came = signal.getsignal(number), []
  held = callable(handler) and threading.current_thread() is threading.main_thread()
  try:
    if held: signal.signal(number, lambda *signal: came.append(signal))
    yield
  finally:
    if held: signal.signal(number, handler)
    for signal_and_frame in came[:1]: handler(*signal_and_frame)

def overwrites(graph:UOp) -> bool:
  "Whether the graph stores into memory that was there: kernels inside a FUNCTION have their own."
  seen, todo = set(), [graph]
  while todo:
    u = todo.pop()
    if u.op is Ops.STORE: return True
    if u not in seen: todo += u.src[1:] if u.op is Ops.FUNCTION else u.src
    seen.add(u)
  return False

# tinygrad gives a Tensor its buffer before the kernels that fill it have run. If a call of realize
# or of a TinyJit fails between the two, by Ctrl-C say, the Tensor looks computed and holds zeros.
# So each call that is going on, inside the one before, has the Tensors and their graphs before. A
# copy into a Buffer counts as a call: that it has run does not mean that the kernels have for which
# the call around it notes Tensors.
NOTED: list[list[tuple[Tensor, UOp]]] = []

@contextlib.contextmanager
def realisation():
  "A call of realize, copy_from or a TinyJit: gives Tensors their graphs back if it fails."
  NOTED.append(noted := [])
  try: yield
  except BaseException:
    for t, graph in reversed(noted): t.uop = graph
    noted.clear()
    raise
  finally:
    NOTED.pop()
    if NOTED: NOTED[-1] += noted             # captured: the TinyJit around it runs the kernels

OWN = threading.local()     # OWN.cache: a thread's connection to tinygrad's cache on disk

def one_at_a_time(method:Callable) -> Callable:
  "The method as a realisation, one thread at a time, each with its own connection to the cache."
  @functools.wraps(method)
  def call(*args, **options):
    with LOCK:
      others, helpers._db_connection = helpers._db_connection, getattr(OWN, "cache", None)
      try:
        with realisation(): return method(*args, **options)
      finally: OWN.cache, helpers._db_connection = helpers._db_connection, others
  return call

PLAIN_MAP, PLAIN_RUN = tensor._apply_map_to_tensors, realize.run_linear

def replace_and_note(new:dict[UOp, UOp], name:str):
  "Replaces graphs of Tensors, and notes them in the realisation that is going on."
  before = [(t, t.uop) for t in (ref() for ref in list(tensor.all_tensors)) if t is not None]
  try: PLAIN_MAP(new, name)
  finally:
    if NOTED: NOTED[-1] += [(t, graph) for t, graph in before if t.uop is not graph]

def run_whole(linear:UOp, var_vals:dict[str, int]|None=None, input_uops:Sequence[UOp]=(),
              update_stats:bool=True, jit:bool=False, wait:bool=False):
  """Compiles the kernels, which Ctrl-C may interrupt, and then runs all of them, which it may not.

  If they fail, a graph that overwrites something is not given back: it may have done so.
  """
  if not jit:
    validate = helpers.VALIDATE_WITH_CPU
    compiled = realize.compile_linear(linear, validate=validate, input_uops=list(input_uops))
    linear = realize.link_linear(compiled)
  if not linear.src: return
  noted = NOTED[-1] if NOTED else []
  with contextlib.ExitStack() as held:
    for number in SIGNALS: held.enter_context(uninterrupted(number))
    try: PLAIN_RUN(linear, var_vals, input_uops, update_stats, True, wait)
    except BaseException:
      noted[:] = [(t, graph) for t, graph in noted if not overwrites(graph)]
      raise
    noted.clear()

PLAIN_POOL = worker.get_worker_pool

def pool_without_interrupts():
  """tinygrad's compile workers, who never see Ctrl-C: they ignore it themselves, but a terminal may
  send it while they begin, and each of them would write a traceback."""
  if worker.worker_pool or not hasattr(signal, "pthread_sigmask"): return PLAIN_POOL()
  resource_tracker.ensure_running()                   # it lets signals through once it has begun
  before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])    # which they inherit
  try: return PLAIN_POOL()
  finally: signal.pthread_sigmask(signal.SIG_SETMASK, before)

def begin_child():
  "Forgets, in a process that was forked, the threads, processes and connections that it has not."
  CORES.__init__()
  if pool := worker.worker_pool: multiprocessing.process._children.difference_update(pool._pool)
  worker.worker_pool = OWN.cache = helpers._db_connection = None
  LOCK.release()

@functools.cache
def guard_tinygrad():
  """Patches tinygrad 0.14.0, once in a process, for threads, forks and Ctrl-C.

  Threads: what is being captured and compiled stands in tables that all threads share, and the
  cache on disk is open in one thread only, so one at a time realises Tensors, copies a Buffer or
  calls a TinyJit.
  Forks: the child begins without what it does not have.
  Ctrl-C: before the first kernel, Tensors get their graphs back; while kernels run, Ctrl-C waits
  until the last has run.
  """
  for owner, name in ((Tensor, "realize"), (Tensor, "_buffer"), (Buffer, "copy_from"),
                      (tinyjit._TinyJit, "__call__")):
    setattr(owner, name, one_at_a_time(getattr(owner, name)))
  tensor._apply_map_to_tensors = replace_and_note
  realize.run_linear = tensor.run_linear = tinyjit.run_linear = run_whole
  realize.get_worker_pool = pool_without_interrupts
  if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release,
                        after_in_child=begin_child)

# ================================================================ schedules and programs on disk
# tinygrad keeps compiled sources on disk, but schedules each graph and lowers each kernel anew in
# each process: that was three quarters of the time to a first training step.
#
# A row on disk that is not what was written counts as missing. SQLite writes it whole or not at
# all, and keeps processes apart that do so at the same time.

def sha256(data:bytes) -> str: return hashlib.sha256(data).hexdigest()

def from_disk(table:str, row:str) -> object|None:
  "Returns what was kept in that row; None if there is no such row, or a damaged one."
  try:
    checksum, data = diskcache_get(table, row)
    return pickle.loads(zlib.decompress(data)) if sha256(data) == checksum else None
  except Exception: return None

def to_disk(table:str, row:str, x:object):
  "Keeps x, unless there is no room, or nobody may write there."
  with contextlib.suppress(Exception):
    data = zlib.compress(pickle.dumps(x), 1)         # a quarter of the size, in 0.2 ms
    diskcache_put(table, row, (sha256(data), data))

# what tinygrad's scheduling, lowering and rendering read of the environment, but for its
# ContextVars
SWITCHES = ("ALIGNED", "ALLOW_HALF8", "DMC", "EXPAND_SSA", "LATE_ALLREDUCE", "MV", "MV_BLOCKSIZE",
            "MV_ROWS_PER_THREAD", "MV_THREADS_PER_ROW", "OCCUPANCY_FLOOR", "REDUCEOP_SPLIT_SIZE",
            "REDUCEOP_SPLIT_THRESHOLD", "RING_ALLREDUCE_THRESHOLD", "THREADS")

@functools.cache
def what_runs() -> str:
  "Describes tinygrad's sources and the switches."
  sources = sorted(Path(tinygrad.__file__).parent.rglob("*.py"))
  stats = [(str(path), s.st_size, s.st_mtime_ns) for path in sources for s in [path.stat()]]
  return sha256(repr(([os.environ.get(name) for name in SWITCHES], stats)).encode())

@functools.cache
def own_code() -> str:
  "Describes the kernels' files, which change parts of tinygrad too."
  return sha256(b"".join(Path(f).read_bytes() for f in (__file__, flashconv.__file__)))

class Programs(dict):
  "tinygrad's table of lowered programs, of which the CPU's are kept on disk too."
  table = "h3tiny_programs"

  def row(self, key:tuple) -> str|None:
    kernel, renderer, target, *options = key
    if target.device != "CPU": return None
    # compiler and processor
    options += compiler_macros(), what_runs()
    return sha256(repr((kernel, renderer.__qualname__, target, options)).encode())

  def __contains__(self, key:tuple) -> bool:
    if not super().__contains__(key) and (row := self.row(key)):
      program = from_disk(self.table, row)
      if program is not None: super().__setitem__(key, program)
    return super().__contains__(key)

  def get(self, key:tuple, default:UOp|None=None) -> UOp|None:
    return self[key] if key in self else default

  def __setitem__(self, key:tuple, program:UOp):
    super().__setitem__(key, program)
    if row := self.row(key): to_disk(self.table, row, program)

SCHEDULES = "h3tiny_schedules"         # the table on disk
LARGE_GRAPH = 1000                     # ops from which a graph's schedule is kept: 0.1 s and more
PLAIN_GRAPH, PLAIN_SCHEDULE = schedule.get_kernel_graph, schedule.create_schedule

def graph_row(graph:UOp) -> str|None:
  """The row of a graph's schedule on disk; None if an argument in the graph shows an address, which
  is another in each process.

  Like UOp.key, but of a call it leaves out the gradient function, shown by its address: schedules
  do not depend on it. The options and files say what else the schedule depends on.
  """
  keys = {}
  for x in graph.toposort():
    arg = x.arg
    if isinstance(arg, CallInfo): arg = arg.name, arg.precompile, arg.precompile_backward, arg.aux
    text = str((x.op, x.dtype, arg, x.tag))
    if " at 0x" in text: return None
    keys[x] = hashlib.sha256(text.encode() + b"".join(keys[y] for y in x.src)).digest()
  options = {name: variable.value for name, variable in helpers.ContextVar._cache.items()}
  return sha256(repr((keys[graph], options, what_runs(), own_code())).encode())

def kept_schedule(graph:UOp) -> UOp:
  "The kernels of a graph in their order, from disk if they were kept."
  large = len(graph.toposort()) >= LARGE_GRAPH
  row = graph_row(graph) if large else None
  kept = from_disk(SCHEDULES, row) if row else None
  if kept is not None: return kept
  made = PLAIN_SCHEDULE(PLAIN_GRAPH(graph))
  if row: to_disk(SCHEDULES, row, made)
  return made

def keep_on_disk():
  "Lets tinygrad find its schedules and lowered programs on disk."
  schedule.get_kernel_graph, schedule.create_schedule = (lambda graph: graph), kept_schedule
  if not isinstance(codegen.to_program_cache, Programs):
    codegen.to_program_cache = realize.to_program_cache = Programs(codegen.to_program_cache)

# ================================================================ the compile workers
# support/compiling.py says why they get kernels in batches, and those that are launched here before
# their graph is scheduled; here that is put in the place of what tinygrad does.

def batches_for_workers() -> Batches|None:
  "realize.get_worker_pool, of workers that take several kernels at once."
  pool = pool_without_interrupts()
  return pool and batches(pool)

def compile_begun(task:tuple) -> tuple[int, UOp]:
  "realize._compile_kernel, called without workers, for a kernel alone; one may have begun it."
  number, args, _ = task                              # args: kernel and renderer
  pool = worker.worker_pool
  return number, batches(pool).program(*args) if pool else codegen.to_program(*args)

@one_at_a_time
def begin(kernel:UOp):
  "Lets a worker have the kernel, if it has no program yet."
  renderer = Device["CPU"].renderer
  if codegen.to_program_key(kernel, renderer) in codegen.to_program_cache: return
  if workers := realize.get_worker_pool(): workers.begin(kernel, renderer)

PLAIN_KERNEL = UOp.custom_kernel

def custom_kernel_begun(*buffers:UOp, fxn:Callable, grad_fxn:Callable|None=None) -> list[UOp]:
  "UOp.custom_kernel, whose kernel a worker gets now, unless tinygrad is to optimise it first."
  written = PLAIN_KERNEL(*buffers, fxn=fxn, grad_fxn=grad_fxn)
  kernel = written[0].src[1].src[0]
  final = isinstance(kernel.arg, KernelInfo) and kernel.arg.opts_to_apply is not None
  if final and written[0].device == "CPU": begin(kernel)
  return written

def compile_in_batches():
  "Lets tinygrad's workers compile several kernels at once, and those that are launched early."
  realize.get_worker_pool, realize._compile_kernel = batches_for_workers, compile_begun
  UOp.custom_kernel = staticmethod(custom_kernel_begun)

# ================================================================ setup

def is_clang(command:str) -> bool:
  """Whether the command runs clang: gcc does not know tinygrad's options.

  A Mac without its developer tools has a clang that only says so.
  """
  try: said = subprocess.run([command, "--version"], capture_output=True, text=True)
  except OSError: return False
  return "clang" in said.stdout

def find_compiler() -> str|None:
  "CC or clang where they are a clang, else a script that runs PyPI's ziglang, if installed."
  found = next((c for c in (os.environ.get("CC"), "clang") if c and is_clang(c)), None)
  package = importlib.util.find_spec("ziglang")
  if found or not package: return found
  # not `python -m ziglang`: a Python for each kernel, and the first step came after 33 s, not 20
  zig = Path(package.origin).with_name("zig")
  script = Path(cache_dir)/"tinygrad"/"zig-clang"
  script.parent.mkdir(parents=True, exist_ok=True)
  new = script.with_name(f"zig-clang.{os.getpid()}")
  new.write_text(f'#!/bin/sh\nexec "{zig}" clang "$@"\n')
  new.chmod(0o755)
  new.replace(script)
  return str(script)

WIDE = "prefer-vector-width=512"     # clang leaves half of an AVX-512 register empty unless told so

@functools.cache
def compiler_macros() -> str:
  "The macros of the CPU's compiler: its version, and what it knows of the processor."
  command = [os.environ.get("CC", "clang"), *Device["CPU"].renderer.compiler.args]
  command += ["-dM", "-E", "-x", "c", os.devnull]
  try: return subprocess.run(command, capture_output=True, text=True).stdout
  except OSError: return ""

def has(*macros:str) -> bool:
  "Whether the compiler defines one of these macros."
  return any(f"#define {macro} " in compiler_macros() for macro in macros)

def use_any_compiler(device:Compiled):
  """Keeps from the compiler the types that it may not know, and from the cache what another made.

  A bfloat16 becomes its bits: clang has no __bf16 on a PC before version 15. So does a float16
  where the processor can't convert it; below 6e-5 it is 0 then. tinygrad's cache of objects does
  not tell compilers apart; `Programs` does.
  """
  if "EMULATED_DTYPES" not in os.environ:
    halves = has("__F16C__", "__ARM_FP16_FORMAT_IEEE")
    EMULATED_DTYPES.value = "bfloat16" if halves else "bfloat16,half"
  os.environ["CCACHE"] = "0"                           # in tinygrad's compile workers
  CCACHE.value = 0
  device.cached_renderer.clear()                       # they have opened the cache

def use_vectors(device:Compiled):
  "Lets clang, and the kernels, fill the vector registers of this processor."
  if has("__AVX512F__") and WIDE not in device.arch: device.arch += f",{WIDE}"
  VECTORS.update(lanes=16 if WIDE in device.arch else 8 if has("__AVX__") else 4,
                 registers=32 if has("__AVX512VL__", "__ARM_NEON") else 16)
  machine.cache_clear()

def check_kernels():
  """Runs `selfcheck` once for a device, tinygrad version and state of the kernels' files.

  Where it fails: one line on stderr, and plain ops from here on.
  """
  target, version = Device[Device.DEFAULT].renderer.target, importlib.metadata.version("tinygrad")
  key = f"{target} {os.environ.get('CC')} {version} {own_code()}"
  if diskcache_get("h3tiny_selfcheck", key): return
  if machine(Device.DEFAULT).gpu: CHECKS["surprisal"] = four_targets, None, (4,), (4, 40)
  else: realize.get_worker_pool()          # it begins meanwhile
  try:
    with waiting("the check of the kernels"): selfcheck()
  except RuntimeError as e:
    FLASH.value = 0
    if "NOOPT" not in os.environ: NOOPT.value = 0
    print(f"warning: {e}; going on without custom kernels (FLASH=0), slower", file=sys.stderr)
  else: diskcache_put("h3tiny_selfcheck", key, True)

NO_COMPILER = ("error: no GPU that tinygrad can use, and its CPU device needs a C compiler: "
               "`pip install ziglang` (no root needed), or install clang (`apt install clang`; "
               "on a Mac `xcode-select --install`)")

def is_opencl_on_cpu(device:Compiled) -> bool:
  if not device.device.startswith("CL"): return False
  from tinygrad.runtime.autogen import opencl
  kind = ctypes.c_uint64()
  opencl.clGetDeviceInfo(device.cl_dev, opencl.CL_DEVICE_TYPE, 8, ctypes.byref(kind), None)
  return bool(kind.value & opencl.CL_DEVICE_TYPE_CPU)

def open_device(compiler:str|None) -> Compiled:
  """Opens the device that DEV names, else the one that tinygrad finds. Where that is OpenCL on a
  CPU (PoCL, say), on which a model takes six times as long, and there is a compiler: the CPU."""
  device = Device[Device.DEFAULT]
  if helpers.DEV.device or not is_opencl_on_cpu(device): return device
  if compiler:
    os.environ["DEV"] = helpers.DEV.value = "CPU"     # here, and in processes that are started
    return Device["CPU"]
  print("note: without a C compiler this CPU is used through OpenCL, several times slower: "
        "pip install ziglang", file=sys.stderr)
  return device

def setup_device():
  """Prepares the device; what a program calls before it touches one.

  Finds the C compiler that tinygrad's CPU device needs: CC, clang, or PyPI's ziglang, whose
  `zig clang` is a whole clang; where no device opens without one: one line that says how to get it,
  exit status 2. On the CPU it leaves the loops to that compiler (NOOPT), which fills its vector
  registers, where tinygrad would unroll into vectors of 4: a training step took 0.83 s instead of
  0.94. Checks the kernels the first time.
  """
  gc.freeze()     # what imports have made stays: garbage is looked for in the rest, a tenth sooner
  compiler = find_compiler()
  if compiler: os.environ["CC"] = compiler
  try: device = open_device(compiler)
  except Exception as e:
    why = f"{type(e).__name__}: {e}".split("\n")[0]
    failure = f"error: tinygrad can't open a device ({why})" if compiler else NO_COMPILER
    print(failure, file=sys.stderr)
    sys.exit(2)
  on_cpu = not device.renderer.has_local
  if on_cpu: use_any_compiler(device)
  if FLASH and on_cpu:
    if "NOOPT" not in os.environ: NOOPT.value = 1
    use_vectors(device)
    use_all_cores()
  answer_with_kernels()
  guard_tinygrad()
  keep_on_disk()
  if FLASH and on_cpu: compile_in_batches()
  # tinygrad's compile workers live on instead of starting anew
  os.environ.setdefault("BEAM_MAX_TASKS_PER_CHILD", "100000")
  if FLASH: check_kernels()
