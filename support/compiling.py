"""Compiles kernels in tinygrad's compile workers: on a CPU several at once, and early.

Several at once: clang takes 30 ms to start, half of its time for a small kernel.
Early: tinygrad begins when all of a graph has been scheduled, and for seconds until then one core
works. But a kernel that is launched by hand is known when the graph is built, and is begun then.

A module of its own, because each worker imports it, and support/cpu.py takes 0.3 s.
"""
from __future__ import annotations
import copy
import functools
import gc
import tempfile
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from typing import Callable, Iterable, Iterator, Sequence
from tinygrad import codegen
from tinygrad.device import Compiler
from tinygrad.helpers import Context
from tinygrad.renderer import Renderer
from tinygrad.runtime.support.compiler_cpu import ClangCompiler
from tinygrad.uop.ops import Ops, UOp

BATCH = 500           # most UOps of the small kernels that a worker gets at once: half a second

# ---- in a worker

def compile_sources(compiler:ClangCompiler, sources:Sequence[str]) -> list[bytes]:
  """What compiler.compile returns for each of the sources, from one process.

  clang -c starts anew for each file, and so names each object. Asked for the syntax alone it names
  none; then, told to write objects after all, it writes one beside each file.
  """
  with tempfile.TemporaryDirectory() as folder:
    files = [Path(folder)/f"{i}.c" for i in range(1, len(sources))]
    for file, source in zip(files, sources[1:]): file.write_text(source)
    together = copy.copy(compiler)
    together.args = [*compiler.args, "-Qunused-arguments", "-fsyntax-only"]
    for word in ("-emit-obj", *map(str, files)): together.args += ["-Xclang", word]
    first = together.compile(sources[0])                # from the standard input to the output
    return [first, *(file.with_suffix(".o").read_bytes() for file in files)]

def compile_together(kernels:Sequence[UOp], renderer:Renderer) -> list[UOp]:
  "The programs of the kernels, with a single start of clang."
  returns_source = copy.copy(renderer)
  returns_source.compiler = Compiler()
  programs = [codegen.do_to_program(kernel, returns_source) for kernel in kernels]
  sources = [program.src[-1].arg.decode() for program in programs]
  objects = compile_sources(renderer.compiler, sources)
  return [program.replace(src=(*program.src[:-1], UOp(Ops.BINARY, arg=binary)))
          for program, binary in zip(programs, objects)]

def compile_batch(kernels:Sequence[UOp], renderer:Renderer, switches:dict) -> list[UOp|None]:
  "The programs of the kernels; None for one that fails: its caller compiles it again to see why."
  def compile_one(kernel:UOp) -> UOp|None:
    try: return codegen.do_to_program(kernel, renderer)
    except Exception: return None
  gc.disable()          # a tenth of the time went into searches for cycles, of which there are few
  try:
    with Context(**switches):
      if len(kernels) > 1:
        try: return compile_together(kernels, renderer)
        except Exception: pass
      return [*map(compile_one, kernels)]
  finally: gc.enable()

# ---- in the process that has the workers

class Batches:
  """Stands before the pool of tinygrad's compile workers: gives it kernels early, in batches.

  For one thread at a time. Programs stay in `begun` until they are asked for; for ever, where the
  graph is never computed, as all others do in tinygrad's table.
  """
  def __init__(self, pool:Pool):
    self.pool = pool
    self.begun: dict[tuple, tuple[AsyncResult, int]] = {}   # by key: a batch's programs, and which
    self.batch: dict[tuple, UOp] = {}                       # by key: kernels not yet given to it
    self.options: tuple[Renderer, dict]|None = None         # the batch's, see `compile_batch`
    self.space = 0                                          # UOps that still fit into the batch

  def begin(self, kernel:UOp, renderer:Renderer):
    "Adds the kernel to the batch, which goes to a worker when the next does not fit, or at `send`."
    key = codegen.to_program_key(kernel, renderer)
    if key in self.begun or key in self.batch: return
    options = renderer, {v.key: v.value for v in codegen.to_program_context}
    size = len(kernel.toposort())
    if size > self.space or options != self.options:
      self.send()
      self.options, together = options, isinstance(renderer.compiler, ClangCompiler)
      self.space = BATCH if together else 0
    self.batch[key] = kernel
    self.space -= size

  def send(self):
    "Gives the batch to a worker."
    if not self.batch: return
    programs = self.pool.apply_async(compile_batch, ([*self.batch.values()], *self.options))
    for i, key in enumerate(self.batch): self.begun[key] = programs, i
    self.batch, self.space = {}, 0

  def program(self, kernel:UOp, renderer:Renderer) -> UOp:
    "The kernel's program, which this process compiles if no worker has begun."
    key = codegen.to_program_key(kernel, renderer)
    self.batch.pop(key, None)
    if key in self.begun:
      programs, i = self.begun.pop(key)
      if (program := programs.get()[i]) is not None: return program
    return codegen.to_program(kernel, renderer)

  def imap_unordered(self, _:Callable, tasks:Iterable[tuple]) -> Iterator[tuple[int, UOp]]:
    "What tinygrad asks of its workers: the programs, each with the number of its task."
    tasks = [*tasks]                    # number, (kernel, renderer), options
    for _, args, _ in tasks: self.begin(*args)
    self.send()
    for number, args, _ in tasks: yield number, self.program(*args)

batches = functools.cache(Batches)      # one for each pool: after a fork or Ctrl-C there is another
