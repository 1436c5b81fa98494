"""The tests of the whole project: `python -m pytest -q test_all.py`.

On whatever device tinygrad finds, or DEV=CPU, DEV=CL, …; `-n auto` on all cores, with
pytest-xdist. From top to bottom: the kernels against float64, the model against the official code's
outputs (golden/) and against a float64 recurrence, its three ways of running against each other,
the trainer and the generator, and every command of the README. `-k kernel` runs the kernels'
alone, SLOW=1 all: without it what takes long is left out.
"""
import gc, time
gc.set_threshold(500_000, 50, 1000)     # tinygrad's graphs are many small objects: saves a quarter
import ast, bz2, collections, contextlib, csv, ctypes, dataclasses, functools, gzip, hashlib
import http.server, importlib, importlib.util
import io, itertools, json, lzma, math, os, pickle, pickletools, re, shlex, shutil, signal, socket
import struct, subprocess, sys, textwrap, threading, zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Callable, Iterable, NamedTuple
import numpy as np, pytest
IN_PARALLEL = "PYTEST_XDIST_WORKER" in os.environ and "PARALLEL" not in os.environ
if IN_PARALLEL: os.environ["PARALLEL"] = "0"   # each worker compiles for itself, in its own process
import flashconv
from support import cpu
check_kernels, cpu.check_kernels = cpu.check_kernels, lambda: None      # has its own test
cpu.setup_device()
from tinygrad import Device, GlobalCounters, Tensor, TinyJit, UOp, codegen, dtypes, helpers, nn
from tinygrad.device import Buffer
from tinygrad.dtype import DType
from tinygrad.engine import realize
from tinygrad.helpers import Context
from tinygrad.nn.optim import AdamW
from tinygrad.nn.state import get_parameters, get_state_dict
from tinygrad.runtime.ops_cpu import CPUProgram
from tinygrad.runtime.support.elf import jit_loader
from tinygrad.uop.ops import Ops
import bigs_tiny, generate as gen, h3tiny, train
from support import bench, checkpoints, compiling, text as texts, training
from papers import arena, bigs, finetune, grid, language, layer, synthetic
from bigs_tiny import BLOCKS, BiGS, BiGSConfig
from flashconv import capture, fftconv, ssm_conv
from h3tiny import H3Config, H3LM, H3Mixer
from support.checkpoints import (CheckpointError, Stored, load_weights, read_checkpoint,
                                 save_checkpoint, save_official)

HERE = Path(__file__).resolve().parent
# what takes long, or compiles kernels for little that other tests leave open
SLOW = bool(os.environ.get("SLOW"))
slow = pytest.mark.skipif(not SLOW, reason="takes long: SLOW=1 runs it too")
EPS = np.finfo(np.float32).eps
rng = np.random.default_rng(0)
FIRST_STATE = rng.bit_generator.state
@pytest.fixture(autouse=True)
def same_numbers_in_any_order() -> None: rng.bit_generator.state = FIRST_STATE
def normal(*shape:int) -> np.ndarray: return rng.standard_normal(shape).astype(np.float32)
def drawn(*shapes:tuple) -> list[Tensor]: return [Tensor(normal(*s)).realize() for s in shapes]
HAS_LOCAL = Device[Device.DEFAULT].renderer.has_local
on_cpu = pytest.mark.skipif(HAS_LOCAL, reason="the kernel is the CPU's")

def table(text:str) -> list[list]:
  "A row for each line, its cells apart by blanks: numbers, and what is no number as it is."
  return [[int(c) if c.isdigit() else c for c in line.split()] for line in text.strip().split("\n")]

def and_slow(quick:Iterable, more:Iterable) -> list:
  "The parameters of a test, of which `more` are run with SLOW=1 alone."
  rows = (x if isinstance(x, (list, tuple)) else [x] for x in more)
  return [*quick, *(pytest.param(*row, marks=slow) for row in rows)]

@pytest.fixture(params=[1, 0], ids=["kernel", "plain"])
def flash(request):
  with Context(FLASH=request.param): yield request.param

@pytest.fixture
def few_kernels(monkeypatch):
  "Convolutions in plain ops are sums over taps, which compile sooner; with SLOW=1 FFTs."
  if not SLOW: monkeypatch.setattr(flashconv, "conv_ref", flashconv.direct_conv)

def with_gradients(f:Callable, inputs:list[Tensor], dy:Tensor|None=None) -> list[np.ndarray]:
  "y = f(*inputs) and the gradients of the inputs, given that of y, or of the sum of its squares."
  y = f(*inputs)
  grads = y.square().sum().gradient(*inputs) if dy is None else y.gradient(*inputs, gradient=dy)
  Tensor.realize(y, *grads)
  return [t.numpy() for t in (y, *grads)]

def near(got:np.ndarray, want:np.ndarray, tolerance:float, name:object="") -> None:
  "The worst error is within the tolerance, which is relative to the largest number wanted."
  assert got.shape == want.shape, name
  assert np.abs(got - want).max() <= tolerance*np.abs(want).max(), name

def all_near(got:list, want:list, tolerance:float, name:object="") -> None:
  for a, b in zip(got, want, strict=True): near(a, b, tolerance, name)

# ================================================================ kernels: the convolution

def np_fftconv(u, k, D, v, q, dy) -> dict[str, np.ndarray]:
  """y and the gradients of (y * dy).sum(), float64, by an FFT of a length at which nothing wraps
  around."""
  u, k, D, v, q, dy = (np.asarray(x, np.float64) for x in (u, k, D, v, q, dy))
  L, w, e, D = u.shape[-1], u*v, q*dy, D[:, None]
  F = lambda x: np.fft.rfft(x, 2*L)
  conv = lambda a, b: np.fft.irfft(F(a)*F(b))[..., :L]
  correlate = lambda a, b: np.flip(conv(np.flip(a, -1), b), -1)
  c = conv(w, k[:, :L]) + D*w
  dw = correlate(e, k[:, :L]) + D*e
  dk = np.zeros((len(w[0]), k.shape[1]))
  dk[:, :L] = correlate(e, w).sum(0)[:, :k.shape[1]]
  if len(k) == 1: dk = dk.sum(0, keepdims=True)
  dD = (w*e).sum((0, 2))
  return {"y": q*c, "u": dw*v, "k": dk, "D": dD, "v": dw*u, "q": dy*c}

# How far a number is at most, of its own size, from the nearest one of a type
ROUNDING = {dtypes.float: 0.0, dtypes.half: 2**-11, dtypes.bfloat16: 2**-8}

def of_type(x:np.ndarray, dtype:DType) -> Tensor: return Tensor(x).cast(dtype).realize()

def check_fftconv(B:int, H:int, L:int, K:int, what:str, dtype:DType=dtypes.float) -> None:
  "dtype: of sequences, which are rounded where they are written, and nowhere else"
  shape, names = (B, H, L), [n for n in "ukDvq" if n in "uk" + what]
  shapes = {"u": shape, "k": (1 if "1" in what else H, K), "D": (H,), "v": shape, "q": shape}
  x = {n: normal(*s) if n in names else np.full(s, n != "D") for n, s in shapes.items()}
  dy, last = normal(*shape), "T" in what
  types = dict.fromkeys("uvqy", dtype) | dict.fromkeys("kD", dtypes.float)
  dy = of_type(dy, dtype).float().numpy()
  x = {n: of_type(a, types[n]).float().numpy() for n, a in x.items()}
  turned = lambda a: a.swapaxes(1, 2).copy() if last and a.ndim == 3 else a
  f = lambda *t: fftconv(**dict(zip(names, t)), channels_last=last)
  inputs = [of_type(turned(x[n]), types[n]) for n in names]
  got = with_gradients(f, inputs, of_type(turned(dy), dtype))
  want = np_fftconv(**x, dy=dy)
  for n, g in zip(["y", *names], got):
    near(turned(g), want[n], ROUNDING[types[n]] + (2e-6 if n == "y" else 1e-5), n)

# B, H, L, K, and what optional arguments are given; 1: one filter for all channels; T: channels
# last. With LONG_CASES every radix of the last pass (on a CPU 3, 6 and 12 as well), and no to four
# passes inside; K shorter and longer than L, odd batches, one channel; a short filter on a long
# sequence, which is cut; few taps without gates, which a CPU adds up. A GPU takes long ones in two
# levels.
CASES = table("""
  1  1     1     1  Dvq
  3  1     3     9  D
  1  5     7     5  vqT
  3  5    90   100  1Dq
  2  3   100    17  1D
  2 64    64    64  Dvq
  2  3  9000    64  Dvq""")
LONG_CASES = table("""
  2  3   180   180  Dq
  3  5   750   750  Dvq
  3  2   370   370  DvqT
  2 64  1024    64  -
  1  5  2047  2047  Dv
  3  1  4096  4096  Dvq
  2  5  8192  8192  q
  1  2 12300   700  Dq
  1  1 20000 20000  v
  1  1 20000 20000  1Dvq""")

@pytest.mark.parametrize("B,H,L,K,what", and_slow(table("3 2 40 40 Dvq"), table("""
  3  1  9000    64  Dq
  5  2  4096  4096  Dvq
  3  1 20000 20000  Dvq""")))
def test_kernel_fftconv_of_rows_apart(B, H, L, K, what):
  """With BATCH_INVARIANT=1 all is right, and a row's results and gradients are the same to the bit
  beside one of NaN and one of 1e10; without it they are not."""
  def beside(others:float) -> list[np.ndarray]:
    rng.bit_generator.state = FIRST_STATE
    inputs = [normal(B, H, L), normal(H, K), normal(H), *(normal(B, H, L) for n in "vq" if n in what)]
    inputs[0][0] *= others
    y, du, *_ = with_gradients(lambda u, k, D, *gates: fftconv(u, k, D, **dict(zip(what[1:], gates))),
                               [*map(Tensor, inputs)], Tensor(normal(B, H, L)))
    return y[1], du[1]
  with Context(BATCH_INVARIANT=1):
    check_fftconv(B, H, L, K, what)
    want = beside(1.0)
    for others in (np.nan, 1e10):
      for got, y in zip(beside(others), want): assert (got == y).all()
  assert np.abs(beside(1e10)[0] - want[0]).max() > 1

@pytest.mark.parametrize("B,H,L,K,what", and_slow(CASES, LONG_CASES))
def test_kernel_fftconv(B, H, L, K, what): check_fftconv(B, H, L, K, what)

def test_fftconv_ref():
  with Context(FLASH=0): check_fftconv(3, 5, 100, 130, "1Dvq")

@pytest.mark.parametrize("dtype,L,K,flash", and_slow(
  [(dtypes.half, 50, 50, 1)],
  [(dtypes.half, 9000, 64, 1), (dtypes.half, 50, 50, 0), *(
    (dtypes.bfloat16, *row) for row in ((50, 50, 1), (9000, 64, 1), (50, 50, 0)))]))
def test_kernel_fftconv_in_half_precision(dtype, L, K, flash):
  "in one launch, cut (a short filter on a long sequence), and in plain ops"
  with Context(FLASH=flash): check_fftconv(3, 2, L, K, "DvqT", dtype)

def test_kernel_fftconv_narrowed_on_a_gpu(monkeypatch):
  "float32 comes in and goes out, once rounded on the way; a CPU leaves it alone"
  x = drawn(*[(2, 64, 64)]*4, (64, 64), (64,))
  def results() -> list[Tensor]:
    u, v, q, dy, k, D = x
    y = fftconv(u, k, D, v, q)
    return [y, *y.gradient(u, v, q, k, gradient=dy)]
  want = results()
  with training.half_precision("float16"): got = results()
  assert all(g.dtype == dtypes.float for g in got)
  got, want = ([t.numpy() for t in ts] for ts in (got, want))
  all_near(got, want, 4*2**-11)                              # u, v and q are rounded, then y
  assert (got[0] != want[0]).any() == HAS_LOCAL

@on_cpu
def test_kernel_fftconv_on_all_cores(monkeypatch):
  """Convolution and state passing are right where cores share channels evenly and where they can't; 4
  threads take part, at the same time: each waits for the others"""
  monkeypatch.setattr(flashconv, "ONE_CORE", 0)
  four = flashconv.machine(Device.DEFAULT)._replace(cores=4)
  monkeypatch.setattr(flashconv, "machine", lambda device: four)
  for H in 12, 7:                        # of 7 channels the last core has one, which it does twice
    check_fftconv(3, H, 20, 20, "Dvq")
    if H == 7 or SLOW: check_ssm_conv(2, H, 8, 20, 15, "Dvqx")
  all_here, seen = threading.Barrier(4), []
  @ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint64)
  def share(a:int, i:int) -> None:
    all_here.wait(timeout=10)
    seen.append((a, i))
  address = ctypes.cast(share, ctypes.c_void_p).value
  program = SimpleNamespace(runtimevars={"core_id": 1}, lvp=False, addr=address)
  CPUProgram.__call__(program, SimpleNamespace(va_addr=7), global_size=(4, 1, 1), vals=(None,))
  assert sorted(seen) == [(7, i) for i in range(4)]

def test_kernel_fftconv_in_two_levels(monkeypatch):
  "at a length where one would do, so on every device"
  monkeypatch.setattr(flashconv, "levels", lambda device, N: 4)
  check_fftconv(3, 2, 100, 100, "Dvq")
  check_fftconv(3, 2, 100, 100, "Dvq", dtypes.half)
  if SLOW: check_fftconv(2, 3, 130, 100, "1")

def test_fftconv_of_float64_is_exact_to_float64():
  shape = 2, 3, 300
  shapes = dict(u=shape, k=(3, 300), D=(3,), v=shape, q=shape)
  x = {n: rng.standard_normal(s) for n, s in shapes.items()}
  y = fftconv(**{n: Tensor(a) for n, a in x.items()})
  assert y.dtype == dtypes.double
  near(y.numpy(), np_fftconv(**x, dy=x["u"])["y"], 1e-13)

def test_kernel_fftconv_launches():
  """One launch forward, one back (but dD, a column of dk); forward no bytes but the tensors', at a
  power of two."""
  u, v, q, dy = drawn(*[(2, 64, 64)]*4)
  k, D = drawn((64, 64), (64,))
  fftconv(u, k).realize()                                      # the table of roots is made once
  y, roots = fftconv(u, k, D, v, q), 4*2*128
  grads = y.gradient(u, k, v, q, gradient=dy)
  GlobalCounters.reset()
  y.realize()
  assert GlobalCounters.kernel_count == 1
  assert GlobalCounters.global_mem <= 4*u.nbytes() + k.nbytes() + D.nbytes() + roots
  Tensor.realize(*grads)
  assert GlobalCounters.kernel_count == 2

class Tanh(NamedTuple):
  "y = tanh(c) q: what else might follow the convolution"
  gated: bool
  activation: str = "tanh"
  needs_c, needs_q = True, False
  def y(self, c, q): return c.tanh()*q
  def dc(self, dy, c, q): return dy*q*(1 - c.tanh()*c.tanh())
  def dq(self, dy, c, q): return dy*c.tanh()

@pytest.mark.usefixtures("few_kernels")
def test_kernel_finish_may_be_any_function(monkeypatch):
  "Defined in one place, it is fused, with its gradient."
  shape = 3, 4, 40
  dy, *x = drawn(shape, shape, (4, 40), (4,), shape, shape)
  monkeypatch.setattr(flashconv, "Finish", Tanh)
  with Context(FLASH=0): want = with_gradients(fftconv, x, dy)
  all_near(with_gradients(fftconv, x, dy), want, 1e-5)

@pytest.mark.usefixtures("few_kernels")
def test_kernel_finish_in_two_levels(monkeypatch):
  monkeypatch.setattr(flashconv, "levels", lambda device, N: 2)
  test_kernel_finish_may_be_any_function(monkeypatch)

@pytest.mark.parametrize("R,sign", [(2, 1), (8, -1), (8, 1), (16, -1)])
def test_kernel_butterflies_keep_signs(R, sign):
  "Reals of either sign, and zeros, against numpy's transform"
  z = normal(R) + 1j*normal(R)
  z[R//2:] = 0
  def real(x:float, flip:int) -> flashconv.Real:
    return flashconv.Real(UOp.const(float(x)*flip, dtypes.float), flip) if x else flashconv.ZERO
  X = flashconv.dft([(real(a.real, 1), real(a.imag, -1)) for a in z], sign)
  got = [[x.uop.simplify().arg if x.sign else 0.0 for x in pair] for pair in X]
  want = np.fft.fft(z) if sign < 0 else np.fft.ifft(z)*R
  np.testing.assert_allclose(np.array(got) @ [1, 1j], want, atol=1e-5)
  with pytest.raises(AttributeError): X[0][0].x                # what lacks its sign can't be had

@pytest.mark.parametrize("bad", [
  {"k": (3, 8)}, {"D": (2,)}, {"v": (2, 4, 7)},
  {"k": (8,)}, {"u": (4, 8)}])
def test_fftconv_refuses_shapes(bad):
  shapes = {"u": (2, 4, 8), "k": (4, 8)} | bad
  with pytest.raises(ValueError, match="fftconv: u, v, q are"):
    fftconv(**{n: Tensor(normal(*shape)) for n, shape in shapes.items()})

def test_kernel_selfcheck(monkeypatch, capsys):
  """within rounding as things are; a kernel that computes something else is named, and then done
  without"""
  assert flashconv.selfcheck() <= 1e-5
  check_kernels()
  assert flashconv.FLASH and not capsys.readouterr().err
  roots = flashconv.roots_of_unity
  monkeypatch.setattr(flashconv, "roots_of_unity", lambda *a: roots(*a)*1.001)
  with pytest.raises(RuntimeError, match="kernel fftconv is wrong on"): flashconv.selfcheck()
  monkeypatch.setattr(cpu, "diskcache_get", lambda *a: None)
  with Context(FLASH=1, NOOPT=1):
    check_kernels()
    assert not flashconv.FLASH
    *_, said = capsys.readouterr().err.splitlines()          # before it, that it takes a while
    assert said.startswith("warning: kernel fftconv is wrong on")

def test_plain_ops_in_numpy():
  "what `selfcheck` takes as right: in float64, without a kernel; an op that it lacks is named"
  a = normal(3, 4)
  b, x, y = a.astype(float), Tensor(a), Tensor(normal(4, 3)).realize()
  want = {x.sin().exp(): np.exp(np.sin(b)), x.abs().log(): np.log(np.abs(b)),
          (x*x).sqrt().reciprocal(): 1/np.abs(b), (x < 0).where(x, 2): np.where(b < 0, b, 2),
          x.max(0): b.max(0), x.prod(1): b.prod(1), x.sum(): b.sum(), (x*x).sum(0): (b*b).sum(0),
          x @ y: b @ y.numpy().astype(float), x[:, 1:3].flip(1).T: b[:, 2:0:-1].T,
          x.pad((1, 2)).int(): np.pad(b.astype(int), ((0, 0), (1, 2)))}
  GlobalCounters.reset()
  for value, right in zip(flashconv.in_numpy(*want), want.values()):
    np.testing.assert_allclose(value, right, rtol=1e-12)
  assert not GlobalCounters.kernel_count
  with pytest.raises(LookupError, match="BITCAST"): flashconv.in_numpy(x.bitcast(dtypes.int))

# ---------------------------------------------------------------- the sources for other devices

BARRIER = {"opencl": "barrier(CLK_LOCAL_MEM_FENCE);", "cuda": "__syncthreads();",
           "metal": "threadgroup_barrier(mem_flags::mem_threadgroup);"}

@pytest.mark.parametrize("other", and_slow(["metal"], ["opencl"]))
def test_sources_have_the_same_barriers(other):
  "as many for Metal and OpenCL as for CUDA, see below; shared memory within 32 KB"
  def count(backend:str) -> dict[str, int]:
    sources = flashconv.render(backend, L=64)
    assert all(shared <= 32768 for _, shared in sources.values())
    return {name: source.count(BARRIER[backend]) for name, (source, _) in sources.items()}
  cuda = count("cuda")
  assert cuda == count(other)
  assert {"ssm_walk_4x64x64", "ssm_walk_grad_4x64x64"} < set(cuda)
  for name, n in cuda.items(): assert (n > 0) == ("split" not in name and "join" not in name)
  m = flashconv.machine_of(flashconv.renderer_of("metal"))
  roots = UOp.placeholder((2, 8, 512), dtypes.float, slot=9)
  assert flashconv.FFTBuffer(flashconv.Group(m, 1, 4096, 256), roots).mem.max_numel()*4 == 32768

@slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_cuda_sources_compile_without_spills(tmp_path):
  """at the longest that one launch takes, where registers are most needed; shared memory within 48
  KB"""
  check = ["nvcc", "-arch=sm_86", "-Xptxas", "-v", "-cubin", "-o", os.devnull, tmp_path/"k.cu"]
  for name, (source, shared) in flashconv.render("cuda", L=2048).items():
    (tmp_path/"k.cu").write_text(source)
    said = subprocess.run(check, check=True, capture_output=True, text=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said, (name, said)
    assert shared <= 49152 and (f"{shared} bytes smem" in said) == (shared > 0), (name, said)

@pytest.mark.parametrize("argv", [
  "--lengths 256", "--render cuda --lengths x", "--render glsl", "--batch 8", "--fast",
  "--render cuda --lengths 4096", "--render cuda --lengths 0"])
def test_flashconv_command_bad_input(argv, capsys):
  with pytest.raises(SystemExit) as stop: flashconv.main(argv.split())
  said = capsys.readouterr()
  assert stop.value.code == 2 and not said.out
  assert said.err.startswith("error: ") and said.err.count("\n") == 1

def test_render_ends_quietly_when_nobody_reads(monkeypatch):
  nobody, pipe = os.pipe()
  os.close(nobody)
  monkeypatch.setattr(flashconv, "render", lambda *_: {"kernel": ("source", 0)})
  with open(pipe, "w") as out:
    monkeypatch.setattr(sys, "stdout", out)
    assert flashconv.main(["--render", "metal"]) == 141

# ------------------------------------------------- the kernels' sources, executed without a GPU
# What a GPU would be given: each kernel of ours that a test launches is rendered for it, compiled
# with golden/gpu_on_cpu/run.cpp, which says how, and executed under ThreadSanitizer. tinygrad's own
# kernels stay on the CPU device.

EXECUTED = HERE/"golden"/"gpu_on_cpu"/"run.cpp"
TSAN = ["clang++", "-std=c++17", "-O1", "-g", "-w", "-fsanitize=thread", "-march=native",
        f"-I{EXECUTED.parent}"]

@functools.cache
def lacks_tsan() -> str:
  "Why no kernel can be executed here; empty if one can."
  if not shutil.which("clang++"): return "no clang++"
  probe = """#include <sanitizer/tsan_interface.h>
             #include <ucontext.h>
             int main() { return !__tsan_create_fiber(0); }"""
  tried = subprocess.run([*TSAN, "-x", "c++", "-o", os.devnull, "-"], input=probe, text=True,
                         capture_output=True)
  return "clang++ lacks ThreadSanitizer (Debian: libclang-rt-14-dev)"*(tried.returncode != 0)

class Executed(NamedTuple):
  "A launch of a kernel, and what its buffers held before and after."
  name: str
  program: Path
  barriers: int
  buffers: list[np.ndarray]
  sizes: list[int]                                         # of the grid and of a work group
  after: list[np.ndarray] = []

  def run(self, left_out:Iterable[int]=(), local_only:bool=False, symbolize:int=0
          ) -> tuple[list[np.ndarray], int, str]:
    """The buffers afterwards, the number of races, and what was said about them. left_out: barriers
    that do nothing; local_only: barriers order accesses to shared memory alone."""
    before, after = (self.program.with_suffix(s) for s in (".in", ".out"))
    packed = [struct.pack("I", b.nbytes) + b.tobytes() for b in self.buffers]
    before.write_bytes(b"".join(packed))
    command = [self.program, before, after, ",".join(map(str, left_out)), int(local_only)]
    options = f"exitcode=0 atexit_sleep_ms=0 symbolize={symbolize}"
    said = subprocess.run([str(x) for x in [*command, *self.sizes]], capture_output=True, text=True,
                          timeout=100, env={"TSAN_OPTIONS": options})
    assert said.returncode == 0, (self.name, said.stderr)
    ends = itertools.accumulate(b.nbytes for b in self.buffers)
    data = after.read_bytes()
    arrays = [np.frombuffer(data[end - b.nbytes:end], b.dtype) for end, b in zip(ends, self.buffers)]
    return arrays, int(said.stdout), said.stderr

class GPU:
  "Renders and executes what is launched; `launches` keeps it. A race fails."
  def __init__(self, backend:str, folder:Path, patch:pytest.MonkeyPatch):
    self.backend, self.folder, self.patch, self.launches = backend, folder, patch, []
    self.renderer, self.compile_others = flashconv.renderer_of(backend), realize.lower_and_compile
    patch.setattr(realize, "lower_and_compile", self.lower)
    patch.setattr(cpu, "begin", lambda kernel: None)       # it would compile them for the CPU
    machine = flashconv.machine_of(self.renderer)
    for module in (flashconv, cpu, training):
      patch.setattr(module, "machine", lambda device: machine)

  def lower(self, linear:UOp) -> UOp:
    "Takes the place of tinygrad's function, which compiles its own kernels alone."
    programs = {}
    for call in linear.toposort():
      if call.op is not Ops.CALL or call.src[0].op is not Ops.SINK: continue
      if call.src[0].arg.name == "test": continue          # tinygrad's own have no name yet
      with Context(NOOPT=0, EMULATED_DTYPES=""):
        program = codegen.do_to_program(call.src[0], self.renderer)
      self.patch.setitem(realize.runtime_cache, (program.key, "CPU"), self.runtime(program))
      # an argument that it does not use would end a graph of CUDA's with "invalid argument"
      assert len(program.arg.globals) == len(call.src) - 1, program.arg.name
      programs[call] = call.replace(src=(program, *call.src[1:]))
    return self.compile_others(linear.substitute(programs))

  def runtime(self, program:UOp) -> Callable:
    "Returns a function that executes the program, as tinygrad's CPUProgram does."
    info, linear, source = program.arg, program.src[1], program.src[2].arg
    params = sorted((u for u in linear.src if u.op is Ops.PARAM), key=lambda u: u.arg.slot)
    only_written = set(info.outs) - set(info.ins)
    compiled = self.compiled(source, info.function_name)
    def run(*memory, global_size, local_size, **_):
      views = [np.frombuffer(m.cpu_view().mv, p.dtype.fmt, p.max_numel())
               for m, p in zip(memory, params, strict=True)]
      before = [np.full(x.nbytes, 255, np.uint8).view(x.dtype) if slot in only_written else x.copy()
                for slot, x in zip(info.globals, views)]   # NaNs
      launch = Executed(info.name, *compiled, before, [*global_size, *(local_size or (1, 1, 1))])
      after, races, said = launch.run(symbolize=1)
      assert not races, said
      for slot, x, y in zip(info.globals, views, after):
        bits = y.view(f"u{y.itemsize}")                    # what nobody wrote stays as it was
        np.copyto(x, y, where=bits != np.iinfo(bits.dtype).max if slot in only_written else True)
      self.launches.append(launch._replace(after=after))
    return run

  def compiled(self, source:str, name:str) -> tuple[Path, int]:
    "The program that executes a kernel, and the number of its barriers."
    folder = self.folder/f"{len(list(self.folder.iterdir()))}-{name}"
    folder.mkdir()
    first, *others = source.split(BARRIER[self.backend])
    source = first + "".join(f"BARRIER({i});{code}" for i, code in enumerate(others))
    size = 0
    def shared(match:re.Match) -> str:                     # each work group has its own
      nonlocal size
      size += 4*int(match[3])
      return f"SHARED({match[1]}, {match[2]}, {match[3]}, {size - 4*int(match[3])});"
    declared = r"(?:__shared__|threadgroup) [^;]*?\b(float|uint) (\w+)\[(\d+)\];"
    source = re.sub(declared, shared, source)
    (folder/"kernel.inc").write_text(source)
    params = re.search(rf" {name}\(([^{{]*)\) {{", source)[1].split(",")
    args = [f"arg({i})" for i, p in enumerate(params) if "*" in p]
    args += ["group_at()", "thread_at()"]*("uint3 gid" in source)
    defined = {"KERNEL": f'"{folder/"kernel.inc"}"', "LAUNCH": f"{name}({', '.join(args)})",
               "SHARED_BYTES": max(size, 1)}
    subprocess.run([*TSAN, *(f"-D{k}={v}" for k, v in defined.items()), "-o", folder/"run",
                    EXECUTED], check=True)
    return folder/"run", len(others)

# What launches them, and the barriers that may go, all of them together. tinygrad puts one wherever
# it can't see that a thread reads only what it wrote itself, and one at the end of each loop.
LAST = {"fftconv": [7]}
WALK_GRAD = [0, 1, 2, 3, 4, 5, 8, 10, 11, 14, 15, 18, 19, 20, 21, 23]

def check_tiles(monkeypatch:pytest.MonkeyPatch, each:int) -> None:
  """Groups of 4 x 4 threads with each x each sums a thread, sizes that their tiles do not divide; of
  the large ones dw is a sum that is cut into two."""
  small = dict(SMALL=0, ENOUGH_TILES=0, SIDE=4, MANY_TILES=0 if each == 8 else 99)
  for limit, n in small.items(): monkeypatch.setattr(cpu, limit, n)
  monkeypatch.setattr(cpu, "tiles_serve", lambda device: True)
  check_product((1, 33 if each == 4 else 514, 7), (7, 18), each == 4)

@pytest.mark.skipif(not HAS_LOCAL, reason="the kernel is a GPU's")
@pytest.mark.parametrize("each", [4, 8])
def test_kernel_tiles_of_a_product(each, monkeypatch): check_tiles(monkeypatch, each)

def check_tensor_cores(monkeypatch:pytest.MonkeyPatch, size:int, dtype:DType) -> None:
  """Sizes that the tiles do not divide, with sums of several rounds; w stored both ways; a sum that
  is cut into two of odd length."""
  small = dict(SMALL=0, ENOUGH_TILES=0, MANY_TILES=0 if size == 128 else 99)
  for limit, n in small.items(): monkeypatch.setattr(cpu, limit, n)
  monkeypatch.setattr(cpu, "tiles_serve", lambda device: True)
  def half(*shape:int) -> tuple[Tensor, np.ndarray]:
    x = Tensor(normal(*shape)).cast(dtype).realize()
    return x, x.float().numpy()
  for M, K, N, transposed in ((size + 4, 70, 72, False), (40, 64, size + 2, True),
                              (514, 34, 36, False)):
    (X, x), (W, w), (G, g) = half(M, K), half(N, K) if transposed else half(K, N), half(M, N)
    y = cpu.multiply(X, W.transpose() if transposed else W, dtype=dtypes.float)
    dx, dw = y.gradient(X, W, gradient=G.float())
    close(y, x, w.T if transposed else w)
    close(dx, g, w if transposed else w.T)
    close(dw, *((g.T, x) if transposed else (x.T, g)))

def test_tensor_cores_take_no_part_of_a_buffer(monkeypatch):
  "It may begin within a word, and the kernel loads four at once."
  nvidia = flashconv.machine_of(flashconv.renderer_of("cuda"))
  monkeypatch.setattr(cpu, "machine", lambda device: nvidia)
  numbers = Tensor(normal(33)).cast(dtypes.half).realize()
  part, whole = numbers[1:].reshape(1, 4, 8), Tensor(normal(1, 8, 4)).cast(dtypes.half)
  assert cpu.tensor_cores_take(part.clone().realize(), whole)
  assert not cpu.tensor_cores_take(part, whole)

@pytest.mark.skipif(not flashconv.machine(Device.DEFAULT).mma, reason="no such tensor cores")
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [dtypes.half, dtypes.bfloat16])
def test_kernel_product_on_tensor_cores(size, dtype, monkeypatch):
  check_tensor_cores(monkeypatch, size, dtype)

def check_layernorm(monkeypatch:pytest.MonkeyPatch) -> None:
  "With its gradients, and rows of which one group of threads has more than another."
  monkeypatch.setattr(cpu, "NORM_GROUPS", 2)
  x, w, b, dy = drawn((3, 48), (48,), (48,), (3, 48))
  both = cpu.layernorm(x, w, b), x.layernorm()*w + b
  ours, plain = ((y, *y.gradient(x, w, b, gradient=dy)) for y in both)
  for got, want in zip(ours, flashconv.in_numpy(*plain)): assert_close(got, want, 1e-5)

def check_surprisal(_) -> None:
  "With its gradient; a target below 0 or from V on is none; rows that the threads do not divide."
  x, dy = drawn((2, 3, 70), (2, 3))
  targets = Tensor([[3, 69, -1], [70, 64, 63]], dtype=dtypes.int).realize()
  def results() -> tuple[Tensor, ...]:
    y = flashconv.surprisal(x, targets)
    return y, *y.gradient(x, gradient=dy)
  ours = results()
  with Context(FLASH=0): plain = results()
  for got, want in zip(ours, flashconv.in_numpy(*plain)): assert_close(got, want, 1e-5)

@pytest.mark.skipif(not HAS_LOCAL, reason="the kernel is a GPU's")
def test_kernel_surprisal(): check_surprisal(None)

def check_embedding(_) -> None:
  "A look-up of words of which some come twice, most not at all, and its gradient."
  words, ids = normal(70, 12), np.array([[3, 69, 3], [0, 32, 3]], np.int32)
  W, g = Tensor(words), normal(2, 3, 12)
  y = flashconv.lookup(W, Tensor(ids).realize())
  sums = np.zeros_like(words)
  np.add.at(sums, ids, g)
  assert (y.numpy() == words[ids]).all()
  assert_close(y.gradient(W, gradient=Tensor(g))[0], sums, 1e-6)

GPU_CASES = {
  "gates": (lambda _: check_fftconv(3, 2, 50, 50, "Dvq"), LAST),
  "shared rows": (lambda _: check_fftconv(7, 2, 50, 50, "Dvq"), LAST),
  "one filter": (lambda _: check_fftconv(2, 2, 50, 20, "1"), {}),
  "long rows": (lambda _: check_fftconv(2, 1, 500, 500, "Dvq"), {}),
  "half": (lambda _: check_fftconv(1, 2, 50, 50, "vq", dtypes.half), {}),
  "any finish": (test_kernel_finish_may_be_any_function, LAST),
  "overlap-save": (lambda _: check_fftconv(1, 2, 300, 5, "D"), {"fftconv": [4]}),
  "two levels": (lambda _: check_fftconv(3, 2, 100, 100, "Dvq"), {"fftconv_complex": [4]}),
  "states": (lambda _: check_ssm_conv(2, 2, 6, 50, 4, "Dvqx"),
             {"ssm_walk": [0, 1, 4, 6], "ssm_walk_grad": WALK_GRAD}),
  "states, half": (lambda _: check_ssm_conv(1, 2, 6, 50, 4, "Dvqx", dtypes.half),
                   {"ssm_walk": [0, 1, 4, 6], "ssm_walk_grad": WALK_GRAD}),
  "states, ungated": (lambda _: check_ssm_conv(1, 2, 8, 20, 3, ""),
                      {"ssm_walk": [0, 1, 4, 5, 6], "ssm_walk_grad": WALK_GRAD}),
  "long chunks": (lambda _: check_ssm_conv(1, 1, 64, 300, "None", "Dvqx"),
                  {"ssm_walk": [0, 1, 4, 6], "ssm_walk_grad": WALK_GRAD}),
  "segments": (lambda _: check_ssm_conv(1, 2, 6, 100, 2, "Dvqx"),
               {"ssm_segments": [0, 1, 4, 6], "ssm_segments_grad": [0, 1, 4, 6],
                "ssm_walk": [2, 5, 7],
                "ssm_walk_grad": [0, 1, 2, 4, 6, 7, 10, 12, 13, 16, 17, 20, 21, 22, 23, 25]}),
  "tiles": (lambda patch: check_tiles(patch, 4), {}),
  "large tiles": (lambda patch: check_tiles(patch, 8), {}),
  "tensor cores": (lambda patch: check_tensor_cores(patch, 64, dtypes.half), {}),
  "tensor cores, large": (lambda patch: check_tensor_cores(patch, 128, dtypes.bfloat16), {}),
  "layer norm": (check_layernorm, {"layernorm": [1], "layernorm_grad": [1, 3, 4, 6]}),
  "loss": (check_surprisal, {"surprisal": [1]}),
  "words": (check_embedding, {}),
  "adamw": (lambda _: check_adamw(lambda f: f, 2), {}),
  "token": (lambda _: check_h3_step(lambda f: f, 2, 2, 32), {"h3_step": [0, 2, 4, 5, 6, 7, 9, 10]}),
  "cache": (lambda _: test_kernel_attend_over_a_cache(5, 70, 16, (3, 0, 6), 1), {})}
GPU_QUICK = [("cuda", "shared rows"), ("metal", "tiles"), ("cuda", "cache"), ("cuda", "token"),
             ("metal", "states")]

@pytest.mark.parametrize("backend,case", and_slow(
  GPU_QUICK, sorted({*itertools.product(("cuda", "metal"), GPU_CASES)} - {*GPU_QUICK}
                    - {("metal", case) for case in GPU_CASES if "tensor" in case})))
def test_kernel_executed_as_on_a_gpu(backend, case, monkeypatch, tmp_path):
  """Right and without a race, also where barriers order shared memory alone. Each barrier taken
  out, but those that may go, gives another result or a race."""
  if lacks_tsan() or HAS_LOCAL: pytest.skip(lacks_tsan() or "this device is a GPU itself")
  gpu = GPU(backend, tmp_path, monkeypatch)
  monkeypatch.setattr(flashconv, "SHORT", 64)
  monkeypatch.setattr(flashconv, "SEGMENT", 2)
  monkeypatch.setattr(training, "GPU_SLICES", 100)
  monkeypatch.setattr(cpu, "STEP_THREADS", 8)
  if case != "long chunks": monkeypatch.setattr(flashconv, "WALK_THREADS", 32)
  if case == "two levels": monkeypatch.setattr(flashconv, "levels", lambda device, N: 4)
  # two work groups a channel, or one
  monkeypatch.setattr(flashconv, "ENOUGH_THREADS", 64 if case == "shared rows" else 1)
  check, may_go = GPU_CASES[case]
  check(monkeypatch)
  launches = {launch.program: launch for launch in gpu.launches}.values()
  assert launches
  gone = {}
  for launch in launches:
    assert not launch.run(local_only=True)[1], launch.name
    left_out = []
    for i in range(launch.barriers):
      after, races, _ = launch.run([*left_out, i])
      same = all(a.tobytes() == b.tobytes() for a, b in zip(after, launch.after))
      if same and not races: left_out.append(i)
    if left_out: gone[re.sub(r"_[\dx]+$", "", launch.name)] = left_out
  assert gone == may_go

@slow
@pytest.mark.parametrize("backend", ["cuda", "metal"])
def test_kernel_of_wide_groups_executed_as_on_a_gpu(backend, monkeypatch, tmp_path):
  "Right with 256 threads in a work group, which are more than ThreadSanitizer can tell apart."
  if lacks_tsan() or HAS_LOCAL: pytest.skip(lacks_tsan() or "this device is a GPU itself")
  monkeypatch.setattr(sys.modules[__name__], "TSAN", [x for x in TSAN if "sanitize" not in x])
  gpu = GPU(backend, tmp_path, monkeypatch)
  check_fftconv(3, 2, 2000, 2000, "Dvq")
  assert {math.prod(launch.sizes[3:]) for launch in gpu.launches} >= {256}

@slow
def test_kernels_of_more_buffers_than_a_device_binds_are_done_without(monkeypatch):
  """WebGPU's eight: the gates go out of the convolution, state passing and a token are done in plain
  ops."""
  few = flashconv.machine(Device.DEFAULT)._replace(buffers=8)
  for module in (flashconv, cpu): monkeypatch.setattr(module, "machine", lambda device: few)
  launched, launch = {}, flashconv.launch
  def count(kernel:Callable, outputs:list, inputs:list, *rest) -> list[Tensor]:
    launched[kernel.func.__name__] = len(outputs) + len(inputs)
    return launch(kernel, outputs, inputs, *rest)
  for module in (flashconv, cpu): monkeypatch.setattr(module, "launch", count)
  check_h3_step(lambda f: f, 2, 3, 6)
  check_fftconv(3, 5, 100, 130, "1Dq")
  check_ssm_conv(1, 2, 16, 40, 33, "Dvqx")
  assert launched == {"conv_kernel": 5, "conv_gradient_kernel": 7}
  limits = [flashconv.machine_of(flashconv.renderer_of(b)).buffers for b in ("metal", "cuda")]
  assert limits == [31, flashconv.NO_LIMIT]

# ================================================================ the CPU's kernels

def close(got:Tensor, a:np.ndarray, b:np.ndarray) -> None:
  """got is the product a @ b: each entry's error is at most about eps sqrt(K) |a_row| |b_column|,
  and in half precision half of its last digit's worth."""
  rounding = {dtypes.half: 2**-11, dtypes.bfloat16: 2**-8}.get(got.dtype, 0)
  a, b, got = a.astype(np.float64), b.astype(np.float64), got.float().numpy()
  rows, columns = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-2)
  bound = EPS*(2 + a.shape[-1]**.5)*rows[..., :, None]*columns[..., None, :]
  bound = bound*(1 + rounding) + rounding*np.abs(a @ b)
  assert got.shape == bound.shape and (np.abs(got - a @ b) <= bound + 1e-30).all()

def with_bias(x:np.ndarray, w:np.ndarray, bias:np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  "Factors whose product is x @ w + bias."
  one = np.broadcast_to(bias, (*w.shape[:-2], 1, len(bias)))
  ones = np.ones((*x.shape[:-1], 1))
  return np.concatenate([x, ones], -1), np.concatenate([w, one], -2)

def swap(x:np.ndarray) -> np.ndarray: return x.swapaxes(-1, -2)
def in_a_row(x:np.ndarray) -> np.ndarray: return np.concatenate(list(x), -1)

@pytest.fixture
def always(monkeypatch):                   # the kernel at every size
  for limit in ("SMALL", "ENOUGH_TILES"): monkeypatch.setattr(cpu, limit, 0)

def check_product(left:tuple, right:tuple, transposed:bool) -> None:
  "The product and both gradients. What has served all matrices gets the sum over them."
  x, w = normal(*left), normal(*right)
  X, W = Tensor(x), Tensor(swap(w).copy() if transposed else w)
  y = X @ (W.transpose(-2, -1) if transposed else W)
  g = normal(*y.shape)
  dx, dw = y.gradient(X, W, gradient=Tensor(g))
  close(y, x, w)
  if x.ndim > w.ndim: x, g = (z.reshape(-1, z.shape[-1]) for z in (x, g))
  close(dw.transpose(-2, -1) if transposed else dw, swap(x), g)
  if x.ndim < w.ndim: g, w = in_a_row(g), in_a_row(w)
  close(dx, g.reshape(*left[:-1], -1), swap(w))

# M, K, N; N: w is stored as (K,N), T: as (N,K). One row, a few, many of both factors; parts of
# tiles; K in one block and in several
PRODUCTS = table("""
    1   1   1  N
    1  32  32  T
    2 257   1  N
    3   5   2  N
    3   5   2  T
    6   1 257  N
  257  32  31  T
  257 257 257  N
    7 513  65  T
    7 513  65  N
  600  40  96  N""")
ONE_FOR_ALL = (40, 50), (3, 50, 24)
BATCHED = [(*ONE_FOR_ALL, "N"), (*ONE_FOR_ALL, "T"),
           ((2, 3, 25, 24), (24, 33), "N"),
           ((2, 3, 25, 24), (2, 3, 24, 33), "T")]

@pytest.mark.parametrize("left,right,stored", [
  *(((M, K), (K, N), stored) for M, K, N, stored in PRODUCTS), *BATCHED])
def test_kernel_matmul(left, right, stored, always): check_product(left, right, stored == "T")

SMALL_TYPES = [name for name, dtype in flashconv.WEIGHTS.items()
               if dtype in Device[Device.DEFAULT].renderer.supported_dtypes()]

@pytest.mark.parametrize("dtype", SMALL_TYPES)
@pytest.mark.parametrize("M,K,N,flash", table("""
    1  96  70  1
   17  70 200  1
  150 530  75  1
   17  70 200  0"""))
def test_kernel_linear_of_small_weights(M, K, N, dtype, flash, always):
  "as exact as with float32s of the same values, one row, a few, and many; and the look-up"
  x, w, bias, g = normal(M, K), normal(N, K), normal(N), normal(M, N)
  layer, words = nn.Linear(K, N), nn.Embedding(N, K)
  layer.bias = Tensor(bias)
  narrow = checkpoints.narrowed(w, dtype)
  layer.weight = words.weight = checkpoints.filled(narrow, flashconv.WEIGHTS[dtype])
  exact, X = flashconv.widened(layer.weight).numpy(), Tensor(x)
  with Context(FLASH=flash):
    y = layer(X)
    dbias, dx = y.gradient(layer.bias, X, gradient=Tensor(g))
    close(y, *with_bias(x, exact.T, bias))
    close(dx, g, exact)
    close(dbias.reshape(1, N), np.ones((1, M)), g)
    rows = checkpoints.filled(checkpoints.narrowed(x, dtype), flashconv.WEIGHTS[dtype])
    both = rows.linear(layer.weight.T, dtype=dtypes.float)
    close(both, flashconv.widened(rows).numpy(), exact.T)
    t = rng.integers(0, N, 5).astype(np.int32)
    assert (words(Tensor(t).realize()).numpy() == exact[t]).all()

def test_kernel_matmul_of_what_is_not_stored(flash):
  "Constants, views, expressions come in, a constant gradient comes back, all goes on lazily."
  x, w, v = normal(8, 64, 2, 48), normal(50, 96), normal(40, 50)
  X = Tensor(x).transpose(1, 2)[1:, :, 3:60]
  y = ((X*2 + 1) @ Tensor(w)[:, ::2].T).relu() + 1
  a, b = x.swapaxes(1, 2)[1:, :, 3:60]*2 + 1, w[:, ::2].T
  assert_close(y, np.maximum(a @ b, 0) + 1, 1e-4)
  V, g, numbers = Tensor(v), np.full((70, 50), 1/3500), np.arange(2800).reshape(70, 40)
  for c, exact in ((Tensor.ones(70, 40), np.ones((70, 40))),
                   (Tensor.arange(2800).reshape(70, 40).float(), numbers)):
    close(c @ V, exact, v)
    close(V.T @ c.T, v.T, exact.T)
    close((c @ V).mean().gradient(V)[0], exact.T, g)

def test_matmul_that_stays_plain():
  "other types, small sizes and broadcasting go to tinygrad's product; a wrong shape is its error"
  x, w = drawn((64, 64), (64, 64))
  assert (x.half() @ w.half()).dtype == dtypes.half
  assert (x @ w.reshape(1, 1, 64, 64).expand(2, 3, 64, 64)).shape == (2, 3, 64, 64)
  assert (x[0] @ w).shape == (64,)
  whole = Tensor(np.full((64, 64), 300, np.uint16))
  assert (whole @ whole.int()).numpy()[0, 0] == 64*300*300               # numbers, no bfloat16s
  with pytest.raises(RuntimeError): x @ w[:63]

# groups of A and of B, whether they are summed; whether A and B are stored transposed
GROUPS = table("""
  1 1 0  0 0
  1 1 0  0 1
  3 3 0  0 1
  3 3 0  1 0
  1 2 0  0 0
  1 2 0  0 1
  2 1 0  1 0
  2 1 0  1 1
  2 2 1  0 0
  2 2 1  0 1
  2 2 1  1 0""")

@on_cpu
@pytest.mark.parametrize("lanes,registers,M,K,N", and_slow(table("""
   4 16  150 530  75
   8 16    1  96  70
  16 32    3  40 128"""), table("""
   8 16   33 300 400
   4 16   17  70 200
  16 32  150 530  75""")))
def test_kernel_matmul_groups_cores_and_tiles(lanes, registers, M, K, N, monkeypatch):
  "one A or B for all groups, sums over groups, on three cores, on processors with other registers"
  m = flashconv.machine(Device.DEFAULT)._replace(lanes=lanes, registers=registers, cores=3)
  monkeypatch.setattr(cpu, "ONE_CORE", 0)
  monkeypatch.setattr(cpu, "machine", lambda device: m)
  for ga, gb, total, ta, tb in GROUPS:
    a, b, bias = normal(ga, M, K), normal(gb, K, N), normal(N)
    x, w = (Tensor(swap(z).copy() if s else z) for z, s in ((a, ta), (b, tb)))
    got = cpu.product(x, w, Tensor(bias), ta=bool(ta), tb=bool(tb), total=bool(total))
    if total: a, b = in_a_row(a)[None], swap(in_a_row(swap(b)))[None]
    close(got, *with_bias(a, b, bias))

@on_cpu
def test_kernel_matmul_is_one_kernel_and_keeps_infinities_apart():
  x, w, dy = drawn((64, 80), (96, 80), (64, 96))
  y = x @ w.transpose()
  grads = y.gradient(x, w, gradient=dy)
  n = GlobalCounters.kernel_count
  Tensor.realize(y, *grads)
  assert GlobalCounters.kernel_count - n == 3
  a, b = normal(10, 300), np.abs(normal(300, 40)) + 1
  a[4, 299] = np.inf
  finite = np.isfinite((Tensor(a) @ Tensor(b)).numpy())
  assert not finite[4].any() and np.delete(finite, 4, 0).all()

def test_kernel_matmul_of_long_rows_does_not_fill_the_stack():
  x, w = normal(32, 40000), normal(160, 40000)
  close(Tensor(x) @ Tensor(w).transpose(), x, w.T)

@pytest.mark.parametrize("shape", [(1, 1), (2, 9, 48)])
def test_kernel_layernorm(shape, flash):
  layer, x = nn.LayerNorm(shape[-1]), 3 + normal(*shape)
  layer.weight, layer.bias = drawn(shape[-1:], shape[-1:])
  w = {f"norm.{k}": v for k, v in float64(layer).items()}
  assert_close(layer(Tensor(x)), np_norm(w, x.astype(np.float64), "norm", 1e-5), 1e-5)

def np_softmax(s:np.ndarray) -> np.ndarray:
  e = np.exp(s - s.max(-1, keepdims=True))
  return e/e.sum(-1, keepdims=True)

def test_kernel_softmax(flash):
  "against float64; the lowest scores that float32 has share equally; a NaN spoils its row alone"
  s = 3*normal(3, 5, 70)
  assert_close(Tensor(s).softmax(), np_softmax(s.astype(np.float64)), 1e-6)
  s = np.full((5, 4), -1e31, np.float32)
  s[1], s[2, 0] = np.finfo(np.float32).min, 1
  s[3, 1], s[4, 2] = np.inf, np.nan
  p = Tensor(s).softmax().numpy()
  np.testing.assert_allclose(p[:3], [[0.25]*4, [0.25]*4, [1, 0, 0, 0]], atol=1e-6)
  assert np.isnan(p[3:]).any(1).all()

@on_cpu
def test_kernel_softmax_of_a_long_row():
  "does not fit on the stack, and is done by plain ops"
  p = Tensor(np.zeros((1, 3_000_000), np.float32)).softmax()
  np.testing.assert_allclose(p.numpy(), 1/3e6, rtol=1e-3)

def np_attend(q:np.ndarray, k:np.ndarray, v:np.ndarray, seen:np.ndarray) -> np.ndarray:
  q, k, v = (x.astype(np.float64) for x in (q, k, v))
  return np_softmax(np.where(seen, q @ swap(k)*q.shape[-1]**-0.5, -np.inf)) @ v

@pytest.mark.parametrize("L,T,hd", [(1, 1, 4), (5, 9, 6), (33, 33, 16)])
def test_kernel_attend(L, T, hd, flash):
  "causal, where query i sees rows up to T - L + i, and not"
  q, k, v = normal(2, 3, L, hd), normal(2, 3, T, hd), normal(2, 3, T, hd)
  for causal in (True, False):
    seen = np.arange(T) <= np.arange(T-L, T)[:, None] + (0 if causal else T)
    y = h3tiny.attend(*map(Tensor, (q, k, v)), causal=causal)
    assert_close(y, np_attend(q, k, v, seen), 1e-5)

@pytest.mark.parametrize("L,T,hd,heads", and_slow([(130, 150, 16, 3)], [(70, 70, 9, 2)]))
def test_kernel_attend_in_blocks(L, T, hd, heads):
  "several blocks of queries and keys, not whole, with the gradients of float64"
  q, k, v, dy = (2*normal(1, heads, n, hd) for n in (L, T, T, L))
  for causal in (True, False):
    seen = np.arange(T) <= np.arange(T-L, T)[:, None] + (0 if causal else T)
    attend = functools.partial(h3tiny.attend, causal=causal)
    _, *grads = with_gradients(attend, [Tensor(x) for x in (q, k, v)], Tensor(dy))
    p = np_softmax(np.where(seen, q.astype(np.float64) @ swap(k)*hd**-0.5, -np.inf))
    ds = p*(dy @ swap(v) - (dy*(p @ v)).sum(-1, keepdims=True))*hd**-0.5
    for got, want in zip(grads, (ds @ k, swap(ds) @ q, swap(p) @ dy)): near(got, want, 1e-5)

@pytest.mark.parametrize("L,T,hd,start", [(1, 70, 16, None), (1, 9, 6, (0, 3, 4)),
                                          (5, 70, 16, (3, 0, 6)), (3, 8, 2, None)])
def test_kernel_attend_over_a_cache(L, T, hd, start, flash):
  "keys and values written at pos, queries that see from start to themselves; no more is read"
  pos, end = 4, 4 + L
  q, k, v = (normal(3, 2, L, hd) for _ in range(3))
  caches, at = [normal(3, 2, T, hd) for _ in range(2)], Tensor([pos], dtype=dtypes.int).realize()
  written = []
  for cache, x, behind in zip(caches, (k, v), (1e30, np.nan)):
    cache[:, :, pos:] = behind
    new = h3tiny.write_cache(Tensor(cache).realize(), Tensor(x), at).numpy()
    cache[:, :, pos:end], cache[:, :, end:] = x, 0
    assert (new[:, :, :end] == cache[:, :, :end]).all()
    written.append(Tensor(np.nan_to_num(new, nan=0.0)).realize())    # in a model: zeros, or a text
  begin = start and Tensor(start, dtype=dtypes.int).realize()
  t, own = np.arange(T), pos + np.arange(L)[:, None]
  seen = (t <= own) & ((t >= np.reshape(start or 0, (-1, 1, 1, 1))) | (t == own))
  assert_close(h3tiny.attend(Tensor(q), *written, at, begin), np_attend(q, *caches, seen), 1e-5)

def test_kernel_attend_of_low_scores(flash):
  "The lowest products that float32 has get equal shares of what is seen."
  q, k = Tensor.full((1, 1, 1, 4), 1e18), Tensor.full((1, 1, 6, 4), -1e18)
  v = normal(1, 1, 6, 4)
  pos, start = (Tensor([i], dtype=dtypes.int) for i in (4, 2))
  y = h3tiny.attend(q.contiguous(), k.contiguous(), Tensor(v), pos, start)
  np.testing.assert_allclose(y.numpy()[0, 0, 0], v[0, 0, 2:5].mean(0), atol=1e-5)

def check_h3_step(jit:Callable, batch:int, D:int, N:int) -> None:
  "Three tokens against the recurrences in float64: outputs, and the state, which is overwritten."
  shift, diag = h3tiny.ShiftSSM(D, N, rng), h3tiny.DiagSSM(D, N, rng)
  shift.B, = drawn((D, N))
  modes = h3tiny.Modes(*((re.realize(), im.realize()) for re, im in diag.discretize()))
  state = h3tiny.H3State(*drawn((batch, D, N), *[(batch, D, N//2)]*2))
  weights = h3tiny.StepWeights(shift, diag, modes)
  @jit
  def step(q:Tensor, k:Tensor, v:Tensor) -> Tensor:
    y, new = h3tiny.h3_step(q, k, v, state, weights)
    Tensor.realize(y, *new)
    flashconv.overwrite(state, new)
    return y
  exact = lambda x: x.numpy().astype(np.float64)
  pair = lambda re, im: exact(re) + 1j*exact(im)
  B, C, skip, skip_kv = map(exact, (shift.B, shift.C[0], shift.D, diag.D))
  dA, dB, C_diag = itertools.starmap(pair, modes)
  s, x = exact(state.shift), pair(state.re, state.im)
  for _ in range(3):
    q, k, v = inputs = [normal(batch, D) for _ in range(3)]
    y = step(*(Tensor(i).realize() for i in inputs))
    s = np.pad(s, ((0, 0), (0, 0), (1, 0)))[..., :-1] + B*k[..., None]
    kv = ((s*C).sum(-1) + skip*k)*v
    x = dA*x + dB*kv[..., None]
    # no more roundings than a sum has terms, each of at most EPS of the terms' magnitudes
    kv_terms = (abs(s*C).sum(-1) + abs(skip*k))*abs(v)
    terms = abs(q)*(2*abs(C_diag*x).sum(-1) + abs(skip_kv)*kv_terms)
    assert_close(y, q*(2*(C_diag*x).sum(-1).real + skip_kv*kv), (N + 10)*EPS*terms.max())
  for got, want in zip(state, (s, x.real, x.imag)):
    assert_close(got, want, (N + 10)*EPS*max(1, abs(want).max()))

@pytest.mark.parametrize("sizes", [(1, 1, 2), (3, 5, 26), (2, 4, 128)])
def test_kernel_h3_step(sizes, flash): check_h3_step(capture, *sizes)

@on_cpu
def test_kernels_for_decoding_have_no_gradient():
  q, k = drawn((1, 2, 1, 4), (1, 2, 8, 4))
  pos = Tensor([3], dtype=dtypes.int)
  results = {"attend": cpu.attend(q, k, k, pos), "write_cache": cpu.write_cache(k, q, pos)}
  for name, y in results.items():
    with pytest.raises(RuntimeError, match=f"{name}.* has no gradient"): y.sum().gradient(q)

def test_kernel_embedding(flash):
  layer = nn.Embedding(11, 6)
  drawn_ids, weight = rng.integers(0, 11, (3, 7)), layer.weight.numpy()
  for ids, at in ((toks(drawn_ids).realize(), drawn_ids), (Tensor(3), 3), (Tensor.arange(4), range(4))):
    assert (layer(ids).numpy() == weight[np.array(at)]).all()

def test_rounding_to_bfloat16():
  "to the nearest; of two as near to the one that ends in 0; zeros, infinities, tiny numbers stay"
  x, special = normal(1 << 20), [0, -0.0, np.inf, -np.inf, 1e-45, 1 + 2**-8, 1 + 3*2**-8]
  bits = checkpoints.narrowed(x, "bfloat16").astype(np.uint32) << 16
  half_a_step = np.spacing(np.abs(x))*2**15
  assert (np.abs(bits.view(np.float32).astype(np.float64) - x) <= half_a_step).all()
  bits = checkpoints.narrowed(np.float32(special), "bfloat16")
  assert bits.tolist() == [0, 0x8000, 0x7f80, 0xff80, 0, 0x3f80, 0x3f82]

# ---------------------------------------------------------------- replay, and what is kept on disk

def test_replay_follows_parts_of_its_inputs():
  "A contiguous part of an input of a TinyJit is a view of another buffer at each call."
  W, = drawn((64, 64))
  jit = capture(lambda x: ((x[32:64] @ W).realize(), (x*0.5).contiguous().realize()))
  for _ in range(4):
    x, = drawn((96, 64))
    np.testing.assert_allclose(jit(x)[0].numpy(), x.numpy()[32:64] @ W.numpy(), atol=1e-4)

def test_capture_from_the_first_call():
  "A constant that a captured function makes is no part of what is replayed, and outlives it."
  made = []
  @flashconv.capture
  def f(x:Tensor) -> Tensor:
    made.append(flashconv.to_device(np.arange(4), x.device))
    return (x + made[-1]).realize()
  for i in range(3):
    x = Tensor(np.full(4, i, np.float32)).realize()
    assert (f(x).numpy() == np.arange(4) + i).all()
  assert len(made) == 1 and (made[0].numpy() == np.arange(4)).all()

@on_cpu
def test_kernel_replay_on_two_cores(monkeypatch):
  "Long chains of kernels, shared and not, each of which reads what other cores wrote: no race."
  monkeypatch.setattr(cpu, "TO_SHARE", 1 << 8)
  cpu.threaded.cache_clear()
  w = normal(64, 64)/8
  W = Tensor(w).realize()
  @flashconv.capture
  def f(x:Tensor) -> Tensor:
    for _ in range(12):
      means = x.contiguous().sum(0, keepdim=True)*0.01
      x = ((x @ W).flip(0)*0.5 + means).contiguous()
    return x.realize()
  for _ in range(50):
    x = normal(64, 64)
    got, want = f(Tensor(x).realize()).numpy(), x.astype(np.float64)
    for _ in range(12): want = (want @ w)[::-1]*0.5 + want.sum(0, keepdims=True)*0.01
    near(got, want, 1e-5)
  cpu.threaded.cache_clear()

LOWERS = """
from support import cpu
kept, lowered = cpu.Programs.__setitem__, []
cpu.Programs.__setitem__ = lambda *row: [lowered.append(row), kept(*row)]
schedule, scheduled = cpu.PLAIN_SCHEDULE, []
cpu.PLAIN_SCHEDULE = lambda graph: [scheduled.append(graph), schedule(graph)][1]
cpu.LARGE_GRAPH = 0
cpu.check_kernels = lambda: None
cpu.setup_device()
from tinygrad import Tensor
w = Tensor.ones(90, 20).contiguous()
y = (Tensor.ones(300, 90).contiguous() @ w).sum() + 1
print((y + y.gradient(w)[0].sum()).item(), len(lowered), len(scheduled))
"""

def own_process(program:str|Path, *args:str, **environment:object) -> subprocess.CompletedProcess:
  "Python on the CPU device, run to its end, with tinygrad's own number of compile workers."
  env = os.environ | {"PYTHONPATH": str(HERE), "DEV": "CPU"}
  env.update((k, str(v)) for k, v in environment.items())
  if IN_PARALLEL: env.pop("PARALLEL", None)
  command = [sys.executable, program, *args]
  return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

@on_cpu
def test_second_process_schedules_and_lowers_nothing(tmp_path):
  (tmp_path/"lowers.py").write_text(LOWERS)
  runs = (own_process(tmp_path/"lowers.py", CACHEDB=tmp_path/"cache.db") for _ in range(2))
  (sum1, *first), (sum2, *second) = (run.stdout.split() for run in runs)
  assert min(map(int, first)) > 0 and second == ["0", "0"] and sum1 == sum2 == "1080001.0"

@on_cpu
def test_programs_on_disk_are_right_or_missing(monkeypatch):
  "as after the start of another process: damaged, with another compiler, with other options"
  sink = (Tensor(normal(31)).realize() + 1).schedule_linear().src[0].src[0]
  renderer = Device["CPU"].renderer
  key, program = codegen.to_program_key(sink, renderer), codegen.to_program(sink, renderer)
  cpu.Programs()[key] = program
  assert key in cpu.Programs() and cpu.Programs().get(key) is program
  assert (*key[:-1], "other") not in cpu.Programs()
  monkeypatch.setattr(cpu, "compiler_macros", lambda: "another compiler")
  assert key not in cpu.Programs() and cpu.Programs().get(key) is None
  monkeypatch.undo()
  row, table = cpu.Programs().row(key), cpu.Programs.table
  checksum, data = whole = helpers.diskcache_get(table, row)
  for damaged in ((checksum, data[:-9]), (checksum, data[:-1] + b"x"), b"", None):
    helpers.diskcache_put(table, row, damaged)
    assert key not in cpu.Programs()
  helpers.diskcache_put(table, row, whole)
  assert key in cpu.Programs()

def test_schedules_on_disk_are_of_the_same_graph(monkeypatch):
  "with the same options and code; not of one whose ops hold something that has an address"
  x = Tensor.empty(3)
  graph = lambda n: (x + n).sum().uop.sink()
  row = cpu.graph_row(graph(1))
  assert row == cpu.graph_row(graph(1)) != cpu.graph_row(graph(2))
  with Context(DEBUG=helpers.DEBUG.value + 1): assert cpu.graph_row(graph(1)) != row
  monkeypatch.setattr(cpu, "own_code", lambda: "other code")
  assert cpu.graph_row(graph(1)) != row
  assert cpu.graph_row(graph(1).replace(tag=object())) is None

@on_cpu
def test_kernels_compiled_together():
  "As each of them alone, but for the names of files, which are not loaded"
  compiler = Device["CPU"].renderer.compiler
  source = ("void f{0}(float *x) {{ for (int i = 0; i < {0}; i++) "
            "x[i] = __builtin_sqrtf(x[i])*.{0}f; }}")
  sources = [source.format(n) for n in (3, 40, 500)]
  together = compiling.compile_sources(compiler, sources)
  assert [*map(jit_loader, together)] == [jit_loader(compiler.compile(s)) for s in sources]

class Worker:
  "Does at once what is given to a compile worker."
  def apply_async(self, f:Callable, args:tuple) -> SimpleNamespace:
    result = f(*args)
    return SimpleNamespace(get=lambda: result)

@on_cpu
def test_a_kernel_fails_alone(capfd):
  "Not those that are compiled with it, nor those of other options"
  renderer, workers = Device["CPU"].renderer, compiling.Batches(Worker())
  good, other = ((Tensor(normal(n)).realize() + 1).schedule_linear().src[0].src[0]
                 for n in (31, 37))
  program = codegen.do_to_program(good, renderer)
  bad = program.replace(src=(*program.src[:2], UOp(Ops.SOURCE, arg="This is not C.")))
  for kernel in (good, bad): workers.begin(kernel, renderer)
  with Context(NOOPT=1 - helpers.NOOPT.value): workers.begin(other, renderer)
  workers.begin(other, renderer)
  workers.send()
  assert len(workers.begun) == 4
  for kernel in (good, other):
    assert workers.program(kernel, renderer).key == codegen.do_to_program(kernel, renderer).key
  with pytest.raises(subprocess.CalledProcessError): workers.program(bad, renderer)
  capfd.readouterr()

@on_cpu
def test_kernels_are_begun_as_they_will_be_scheduled(monkeypatch):
  workers = compiling.Batches(Worker())
  monkeypatch.setattr(realize, "get_worker_pool", lambda: workers)
  monkeypatch.setattr(codegen, "to_program_cache", {})
  x, w, b = (Tensor(normal(*shape)).realize() for shape in ((3, 41), (41,), (41,)))
  y = cpu.layernorm(x, w, b, 1e-5)
  begun = {kernel.key for kernel in workers.batch.values()}
  assert begun == {call.src[0].key for call in y.schedule_linear().src}

# ---------------------------------------------------------------- state passing

def np_ssm_conv(u, v, q, A, B, C, D, x, dy, dx) -> dict[str, np.ndarray]:
  """y, the final state and the gradients, float64: the recurrence and its reverse; complex ones are
  d/dre + i d/dim."""
  w, xs, s, y = u*v, [x], x, np.zeros(u.shape)
  for t in range(u.shape[-1]):
    s = A*s + B*w[..., t, None]
    xs.append(s)
    y[..., t] = 2*(C*s).sum(-1).real + D*w[..., t]
  e, lam, dw, conj = dy*q, dx, np.zeros(u.shape), np.conj
  dA, dB, dC = np.zeros((3, *A.shape), complex)
  for t in range(u.shape[-1])[::-1]:
    now = e[..., t, None]
    lam = lam + 2*conj(C)*now
    dC += (2*conj(xs[t+1])*now).sum(0)
    dB += (lam*w[..., t, None]).sum(0)
    dA += (lam*conj(xs[t])).sum(0)
    dw[..., t] = (lam*conj(B)).sum(-1).real + D*e[..., t]
    lam = lam*conj(A)
  return {"y": y*q, "state": s, "A": dA, "B": dB, "C": dC, "x": lam,
          "u": dw*v, "v": dw*u, "q": dy*y, "D": (e*w).sum((0, 2))}

def complex_normal(*shape:int) -> np.ndarray: return normal(*shape) + 1j*normal(*shape)

def ssm(H:int, N:int) -> list[np.ndarray]:
  "A, B, C as h3tiny initialises them, bilinear, rounded to float32; complex128."
  dt = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), (H, 1)))
  z = dt*(-0.5 + 1j*np.pi*np.arange(N//2))/2
  ABC = (1 + z)/(1 - z), dt/(1 - z), complex_normal(H, N//2)
  return [x.astype(np.complex64).astype(complex) for x in ABC]

def tensors_of(a:np.ndarray) -> list[Tensor]:
  parts = (a.real, a.imag) if np.iscomplexobj(a) else (a,)
  return [Tensor(np.ascontiguousarray(p, np.float32)).realize() for p in parts]

def joined(parts:list) -> np.ndarray:
  "The array of one Tensor, or of real and imaginary part."
  re, *im = (p.numpy() for p in parts)
  return re + 1j*im[0] if im else re

# whole groups of chunks; parts of chunks and of groups; chunks given; state sizes; one step;
# without
# D, gates and a state. A^c by squaring errs by c eps, and the memory of the slowest mode is 2000
# steps
# long: 2e-5 at L=2048. In plain ops, two chunks.
SSM_CASES = table("""
  2 2  64 2048 None Dvqx  1
  2 2   4    1 None -     1
  1 2   4    7    5 Dvqx  0""")

@pytest.mark.parametrize("B,H,N,L,chunk,given,flash", and_slow(
  SSM_CASES, table("""
  3 2  64   90 None q     1
  1 2  16  100   33 v     1
  2 2  64   70 None Dvqx  1
  3 2 128  300 None Dvqx  1
  1 2   4   20   15 Dvqx  0""")))
def test_kernel_ssm_conv(B, H, N, L, chunk, given, flash, few_kernels):
  if HAS_LOCAL and not flash: pytest.skip("the same in plain ops takes long")
  with Context(FLASH=flash): check_ssm_conv(B, H, N, L, chunk, given)

@pytest.mark.parametrize("dtype,flash", and_slow(
  [(dtypes.half, 1)], [(dtypes.bfloat16, 1), (dtypes.half, 0), (dtypes.bfloat16, 0)]))
def test_kernel_ssm_conv_in_half_precision(dtype, flash):
  with Context(FLASH=flash): check_ssm_conv(2, 2, 8, 20, 15, "Dvqx", dtype)

def check_ssm_conv(B:int, H:int, N:int, L:int, chunk:int|str, given:str, dtype:DType=dtypes.float
                   ) -> None:
  "dtype: of sequences, which are rounded where they are written, and nowhere else"
  given, chunk = given.strip("-"), None if chunk == "None" else chunk
  seq, state = (B, H, L), (B, H, N//2)
  a = dict(zip("ABC", ssm(H, N))) | {"u": normal(*seq)}
  a |= {"dy": normal(*seq), "dx": complex_normal(*state)}
  a["v"], a["q"] = (normal(*seq) if n in given else np.ones(seq) for n in "vq")
  a["D"] = normal(H) if "D" in given else np.zeros(H)
  a["x"] = complex_normal(*state) if "x" in given else np.zeros(state, complex)
  types = dict.fromkeys(("u", "v", "q", "y", "dy"), dtype)
  a |= {k: of_type(a[k], dtype).float().numpy() for k in types if k in a}
  want = np_ssm_conv(**a)
  t = {k: tensors_of(a[k]) for k in "uABC" + given}
  t |= {k: [of_type(a[k], dtype)] for k in types if k in t}
  args = {k: tuple(z) if k in "ABCx" else z[0] for k, z in t.items()}
  y, last = ssm_conv(state=args.pop("x", None), chunk=chunk, **args)
  outputs, weights = (y, *last), tensors_of(a["dy"]) + tensors_of(a["dx"])
  loss = sum((p.float()*r).sum() for p, r in zip(outputs, weights))
  flat = [p for z in t.values() for p in z]
  grads = dict(zip(flat, loss.gradient(*flat)))
  Tensor.realize(*outputs, *grads.values())
  got = {"y": [y], "state": last} | {k: [grads[p] for p in z] for k, z in t.items()}
  for name, g in got.items():
    # u and v of the steps after the last whole chunk have two gradients, of y and of the state:
    # both are rounded, then their sum
    roundings = 3 if name in "uv" else 1
    near(joined(g), want[name], 1e-4 + roundings*ROUNDING[types.get(name, dtypes.float)], name)

@slow
def test_kernel_ssm_conv_on_a_million_steps(monkeypatch):
  """200 places of 2^20 steps against a sum in float64; the memory beyond inputs and outputs is
  that of 2^14 steps"""
  ABC, allocate, most, L = ssm(64, 64), Buffer.allocate, [0], 1 << 20
  def allocated(self, *args, **kw):
    out = allocate(self, *args, **kw)
    most[0] = max(most[0], GlobalCounters.mem_used)
    return out
  monkeypatch.setattr(Buffer, "allocate", allocated)
  modes, D = [tuple(tensors_of(z)) for z in ABC], normal(64)
  d = Tensor(D).realize()
  def run(u:np.ndarray) -> tuple:
    t, most[0] = Tensor(u).realize(), 0
    before = GlobalCounters.mem_used
    y, x = ssm_conv(t, *modes, d)
    Tensor.realize(y, *x)
    return y, x, most[0] - before - y.nbytes() - sum(z.nbytes() for z in x)
  u = rng.standard_normal((1, 64, L), dtype=np.float32)
  beyond = run(np.ascontiguousarray(u[..., :1 << 14]))[2]
  y, x, again = run(u)
  assert again == beyond
  # the slowest mode forgets: 40,000 steps are all that counts, to 1e-8
  n, y, largest = 40_000, y.numpy()[0], np.abs(y.numpy()).max()
  for h in rng.permutation(64)[:8]:
    A, Bc, C = (z[h, :, None] for z in ABC)
    powers = Bc*A**np.arange(n)
    for t in (*rng.integers(n, L, 24), L-1):
      s = powers @ u[0, h, t-n+1:t+1][::-1]
      assert abs(2*(C[:, 0]*s).sum().real + D[h]*u[0, h, t] - y[h, t]) <= 1e-4*largest
    near(joined(x)[0, h], s, 1e-4)

MODES, LESS = ((3, 4), (3, 4)), ((2, 4), (3, 4))
@pytest.mark.parametrize("bad", [
  {"u": (3, 10)}, {"state": ((2, 3, 4), (1, 3, 4))}, {"C": LESS},
  {"v": (1, 3, 10)}, {"D": (10,)}, {"chunk": 0}])
def test_ssm_conv_refuses_shapes(bad):
  def tensor(x):
    if x == 0: return x
    return Tensor(normal(*x)) if isinstance(x[0], int) else tuple(map(tensor, x))
  shapes = {"u": (2, 3, 10)} | dict.fromkeys("ABC", MODES) | bad
  inputs = {k: tensor(x) for k, x in shapes.items()}
  with pytest.raises(ValueError, match="ssm_conv"): ssm_conv(**inputs)

@pytest.mark.parametrize("S,serves", [(128, True), (160, False)])
def test_walk_serves_states_up_to_a_work_group(S, serves):
  "on a GPU, whose threads have one column each"
  gpu = flashconv.Machine(True, 1, 1 << 20, True)
  assert (flashconv.walk_spec(("u",), gpu, (1, 2, 30), S, 4) is not None) == serves

def test_walk_shares_segments_among_work_groups():
  """evenly, none of them empty, as many as are wanted where the batch and the rows allow it"""
  gpu = flashconv.Machine(True, 1, 1 << 20, True)
  for B, H, L in itertools.product((1, 2, 3, 8, 600), (1, 5, 64, 700), (1, 300, 4100, 1 << 17)):
    spec = flashconv.walk_spec(("u",), gpu, (B, H, L), 64, None)
    rows, wanted = B*spec.segments, -(-flashconv.WALKERS//H)
    assert rows % spec.walkers == 0 and spec.walkers >= min(wanted, rows)
    assert 0 < spec.row_groups - (spec.segments - 1)*spec.groups <= spec.groups
    assert spec.segments == 1 or (rows <= wanted and spec.groups >= flashconv.SEGMENT)
    assert spec.segments > 1 or wanted < 2*B or spec.row_groups < 2*flashconv.SEGMENT

# ================================================================ kernels: in a loop of one's own

def small_ssm_conv(u, dt, B, C) -> Tensor:
  A = dt.sin()*0.8, dt.cos()*0.5
  y, (re, im) = ssm_conv(u, A, (B, dt), (C, B))
  return Tensor.cat(y.flatten(), re.flatten(), im.flatten())

# Each kernel with all its inputs, floats drawn for each shape. `cut`: overlap-save; `levels`: two
# launches of short transforms; both at lengths where one launch would do, so on every device.
ROW, COLUMN = (2, 5, 12), (12,)
SEQ, KEYS = (2, 3, 20), (2, 3, 9, 4)
OWN = {
  "fftconv": (fftconv, SEQ, (3, 20), (3,), SEQ, SEQ),
  "fftconv, one filter": (fftconv, (1, 3, 20), (1, 9)),
  "fftconv, levels": (fftconv, (2, 2, 100), (2, 100), (2,)),
  "fftconv, cut": (fftconv, (1, 2, 300), (2, 5)),
  "ssm_conv": (small_ssm_conv, (2, 3, 16), (3, 4), (3, 4), (3, 4)),
  "matmul": (Tensor.linear, ROW, (12, 9), (9,)),
  "matmul, batched": (lambda x, w: x @ w.transpose(-2, -1), ROW, (2, 9, 12)),
  "layernorm": (cpu.layernorm, ROW, COLUMN, COLUMN),
  "softmax": (Tensor.softmax, (2, 3, 7)),
  "attend": (lambda *qkv: h3tiny.attend(*qkv), (2, 3, 7, 4), KEYS, KEYS),
  "embedding": (lambda w: flashconv.lookup(w, Tensor([1, 0, 3, 3, 3, 1])), (5, 8))}

@pytest.fixture
def own(request, few_kernels, monkeypatch):
  "A function of OWN and its inputs, realised."
  monkeypatch.setattr(cpu, "SMALL", 0)
  monkeypatch.setattr(flashconv, "CHUNK", 8)
  if "levels" in request.param: monkeypatch.setattr(flashconv, "levels", lambda device, N: 4)
  if "cut" in request.param: monkeypatch.setattr(flashconv, "SHORT", 64)
  f, *shapes = OWN[request.param]
  return f, drawn(*shapes)

OTHER_LAYOUTS = "fftconv, one filter", "fftconv, levels", "fftconv, cut"
every_kernel = pytest.mark.parametrize("own", and_slow([k for k in OWN if k not in OTHER_LAYOUTS],
                                                       OTHER_LAYOUTS), indirect=True)

# What may be done between the loss and its gradient, in this order, so that each still finds the
# kernels in its graph; "backward": twice, summed up in .grad
READS = ["", "loss intermediate output", "gradient loss output", "loss backward"]

def read_and_gradients(f:Callable, x:list[Tensor], w:Tensor, reads:str="") -> list[np.ndarray]:
  "The gradients of the loss Σ (w f(x))²."
  y, grads = f(*x), None
  loss = (y*w).square().sum()
  for t in x: t.grad = None
  for read in reads.split():
    if read == "gradient": grads = loss.gradient(*x)
    elif read == "backward":
      for _ in range(2):
        loss.item()
        loss.backward()
      grads = [t.grad/2 for t in x]
    else: {"loss": loss, "output": y, "intermediate": y*2 + 1}[read].numpy()
  return [g.numpy() for g in grads or loss.gradient(*x)]

@every_kernel
def test_kernel_gradients_survive_what_is_read(own):
  """in any order, to the bit; and they are those of plain ops. State passing, whose plain ops take
  long, is compared with SLOW=1 alone: above, its gradients are those of float64"""
  f, x = own
  w, = drawn(f(*x).shape)
  ours = {reads: read_and_gradients(f, x, w, reads) for reads in READS}
  for reads, grads in ours.items():
    for got, first in zip(grads, ours[""], strict=True):
      assert (got == first).all() and got.any(), reads
  if f is small_ssm_conv and not SLOW: return
  with Context(FLASH=0): all_near(ours[""], read_and_gradients(f, x, w), 1e-5)

@every_kernel
def test_kernel_output_realised_and_used_again(own):
  """A Tensor on which `realize` was called is a constant from then on, as after plain ops; another
  call is not."""
  f, x = own
  def gradients(y:Tensor) -> list[np.ndarray]:
    grads = (f(*x)*y + y).sum().gradient(*x)
    Tensor.realize(*grads)
    return [g.numpy() for g in grads]
  y = f(*x).realize()
  constant = Tensor(y.numpy()).realize()
  for a, b in zip(gradients(y), gradients(constant)): assert (a == b).all() and a.any()

@every_kernel
def test_kernel_gradients_in_the_jit(own):
  """with an intermediate realised on the way, replayed with other data: those without the jit, with
  SLOW=1 of plain ops"""
  f, x = own
  w, = drawn(f(*x).shape)
  def step(*x:Tensor) -> list[Tensor]:
    y = f(*x)
    (read := y*2).realize()
    (loss := (y*w).square().sum()).contiguous().realize()
    return [read, *(g.realize() for g in loss.gradient(*x))]
  jit = TinyJit(step)
  for _ in range(3):
    x = drawn(*(t.shape for t in x))
    read, *grads = (t.numpy() for t in jit(*x))
    with Context(FLASH=0) if SLOW else contextlib.nullcontext():
      want = [f(*x).numpy(), *read_and_gradients(f, x, w)]
    all_near([read/2, *grads], want, 1e-5)

@every_kernel
def test_kernel_second_derivative(own):
  "is that of plain ops, or one sentence that says how to get it; read or not"
  f, x = own
  def second() -> list[np.ndarray]:
    g = f(*x).square().sum().gradient(*x)
    g[-1].numpy()
    return [h.numpy() for h in sum(t.square().sum() for t in g).gradient(*x)]
  try: ours = second()
  except RuntimeError as e:
    assert f is not Tensor.linear                          # a product's gradients are products
    assert re.fullmatch(r"\w+ can be differentiated once: .*Context\(FLASH=0\)\.", str(e)), e
    return
  with Context(FLASH=0): plain = second()
  for a, b in zip(ours, plain): assert_close(a, b, 1e-4*max(np.abs(b).max(), 1e-3))

@on_cpu                                  # which can be as many devices as one likes
def test_kernel_gradient_that_arrives_in_parts():
  "from a Tensor that several devices share, to one that is whole on each"
  devices = tuple(f"{Device.DEFAULT}:{i}" for i in range(2))
  u, x, k = map(Tensor, (normal(4, 3, 20), normal(4, 3, 20), normal(3, 20)))
  def dk(u:Tensor, x:Tensor, k:Tensor) -> np.ndarray:
    return (fftconv(u, k) + x).square().sum().gradient(k)[0].numpy()
  got = dk(u.shard(devices), x.shard(devices, axis=0), k.shard(devices).realize())
  np.testing.assert_allclose(got, dk(u, x, k), rtol=1e-4, atol=1e-4)

@on_cpu
def test_a_failed_realisation_leaves_the_graphs(monkeypatch):
  "where memory runs out between two kernels: what was not computed is not read as if it had been"
  x, allocate, left = Tensor(normal(64, 64)/8).realize(), Buffer.allocate, [3]
  def scarce(self, *args, **kw):
    left[0] -= 1
    if left[0] == 0: raise MemoryError
    return allocate(self, *args, **kw)
  ys = [x]
  for _ in range(6): ys.append((ys[-1] @ x + 1).contiguous())
  monkeypatch.setattr(Buffer, "allocate", scarce)
  with pytest.raises(MemoryError): Tensor.realize(*ys)
  monkeypatch.undo()
  want = x.numpy()
  for y in ys[1:]:
    want = want @ x.numpy() + 1
    np.testing.assert_allclose(y.numpy(), want, rtol=1e-4, atol=1e-4)

def square_kernel(y:UOp, x:UOp) -> UOp:
  i = UOp.range(4, 0)
  return y[i].store(x[i]*x[i]).end(i).sink()

def test_kernel_launch_refuses_what_would_be_wrong():
  """a kernel that would not run, and a gradient of several outputs, of which tinygrad does not say
  which has one"""
  x, = drawn((4,))
  with pytest.raises(ValueError, match="needs a KernelInfo"):
    flashconv.launch(square_kernel, [(4,)], [x], "none")
  with pytest.raises(ValueError, match="several outputs"):
    flashconv.launch(square_kernel, [(4,), (4,)], [x], lambda dy, y, x: (dy,))
  for y in (x[1:], x.reshape(2, 2).transpose()):
    with pytest.raises(ValueError, match="view"): flashconv.launch(square_kernel, [y], [x], "none")

CONSTANTS = {"eye": (Tensor.eye(8)[:1], np.eye(8)[0]),
             "arange": (Tensor.arange(8).float(), np.arange(8)),
             "linspace": (Tensor.linspace(0, 1, 8), np.linspace(0, 1, 8)),
             "full": (Tensor.full((8,), 0.5, buffer=False), np.full(8, 0.5))}

@pytest.mark.parametrize("name", CONSTANTS)
def test_kernel_inputs_without_a_device(name):
  """Constants have no storage yet. Whatever they are given to, it is what their values give; with a
  gradient."""
  constant, values = CONSTANTS[name]
  impulse = constant.reshape(1, 1, 8)
  k, D = Tensor(normal(1, 8)), Tensor(normal(1))
  stored = Tensor(values.reshape(1, 1, 8).astype(np.float32)).realize()
  conv = lambda u: fftconv(u, k, D)
  filtered = lambda u: fftconv(k.unsqueeze(0), u[0], D)
  norm = lambda u: cpu.layernorm(u, Tensor.ones(8), Tensor.zeros(8))
  product = lambda u: u @ Tensor(k.numpy().T)
  passing = lambda u: small_ssm_conv(u, k[:, :4], k[:, :4], k[:, 4:])
  for f in (conv, filtered, norm, product, passing, Tensor.softmax):
    # + 0 of the device: what has none would be computed on the CPU
    np.testing.assert_allclose((f(impulse) + 0*D).numpy(), f(stored).numpy(), atol=1e-6)
  if impulse.dtype == dtypes.float:
    (_, got), (_, want) = (with_gradients(conv, [u]) for u in (impulse, stored))
    np.testing.assert_allclose(got, want, atol=1e-5)

OPENS = """
import sys
from tinygrad import Device
from support import cpu
if sys.argv[1:]: cpu.find_compiler = lambda: None
cpu.setup_device()
print(Device.DEFAULT)
"""

IS_CPU = """
import ctypes
from tinygrad import Device
from tinygrad.runtime.autogen import opencl
opened, kind = Device["CL"], ctypes.c_uint64()
opencl.clGetDeviceInfo(opened.cl_dev, opencl.CL_DEVICE_TYPE, 8, ctypes.byref(kind), None)
assert kind.value & opencl.CL_DEVICE_TYPE_CPU
"""

FILLS = """
import numpy as np
from support.checkpoints import filled
from tinygrad import dtypes
print(filled(np.frombuffer(bytes(range(8)), np.uint8), dtypes.uchar).numpy().tolist())
"""

def test_read_only_weights_on_opencl():
  "A checkpoint is mapped: its bytes can't be written, and OpenCL is sent a copy."
  if own_process("-c", IS_CPU, DEV="").returncode: pytest.skip("there is no OpenCL for this CPU")
  assert own_process("-c", FILLS, DEV="CL").stdout == "[0, 1, 2, 3, 4, 5, 6, 7]\n"

@on_cpu
def test_cpu_is_not_used_through_opencl(tmp_path):
  "DEV says which of the two; else it is the CPU device, if there is a compiler. As where PoCL is."
  (tmp_path/"opens.py").write_text(OPENS)
  if own_process("-c", IS_CPU, DEV="").returncode: pytest.skip("there is no OpenCL for this CPU")
  for args, DEV, device, said in (([], "", "CPU", ""), ([], "CL", "CL", ""),
                                  (["without a compiler"], "", "CL", "pip install ziglang")):
    done = own_process(tmp_path/"opens.py", *args, DEV=DEV, FLASH=0)
    assert done.stdout == f"{device}\n" and said in done.stderr and bool(said) == bool(done.stderr)

# ---------------------------------------------------------------- threads, forks, interrupts


# Programs of their own, with a limit of time: a process that hangs says where and fails
OWN_PROCESS = """
import faulthandler, sys
faulthandler.dump_traceback_later(240, exit=True)
from flashconv import capture, fftconv
from support import cpu
from support.cpu import setup_device
import flashconv, numpy as np
from tinygrad import Device, Tensor, TinyJit
def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
def near(got, want, where):
  assert np.abs(got - want).max() <= 1e-5*np.abs(want).max(), where
def matrices(n, jit=lambda f: f):
  "relu(a b) summed over rows, of size n, is right 20 times"
  b = normal(n, 64, n)
  B = Tensor(b).realize()
  f = jit(lambda x: (x @ B).relu().sum(0).realize())
  for i in range(20):
    a = normal(i, 512, 64)
    near(f(Tensor(a).realize()).numpy(), np.maximum(a.astype(np.float64) @ b, 0).sum(0), (n, i))
  return n
"""

THREADS = """
import threading
setup_device()
flashconv.ONE_CORE, cpu.ONE_CORE, failed = 1, 1, []
def convolutions(n):
  L = 8 + n//2                          # two compile the same kernels, two others
  k, w = (Tensor(normal(n, *s)).realize() for s in ((8, L), (L, 32)))
  def step(u):
    loss = (fftconv(u, k) @ w).square().mean()
    return [t.realize() for t in (loss, *loss.gradient(k, w, u))]
  jit = TinyJit(step)
  for i in range(20):
    u = Tensor(normal(i, 4, 8, L)).realize()
    got = [t.numpy() for t in jit(u)]
    if i in (9, 18):
      for a, b in zip(got, step(u)): near(a, b.numpy(), (n, i))
def attempt(work, n):
  try: work(n)
  except BaseException as e: failed.append(repr(e))
for work in (convolutions, lambda n: matrices(96 + 16*(n//2), TinyJit)):
  threads = [threading.Thread(target=attempt, args=(work, n)) for n in range(4)]
  for t in threads: t.start()
  for t in threads: t.join()
assert not failed, failed
"""

FORKS = """
import multiprocessing, os
def in_child(n):
  setup_device()
  return matrices(n)
if __name__ == "__main__":
  setup_device()
  matrices(128, TinyJit)
  W = Tensor(np.eye(64, dtype=np.float32)*2).realize()
  state = Tensor(np.zeros(1 << 18, np.float32)).realize()
  jit = TinyJit(lambda x: (x @ W + 1).relu().realize())
  def replays(seed):
    "of what the parent captured, in all processes at once, and a state that each has for itself"
    for i in range(20):
      x = normal(100*seed + i, 512, 64)
      state.assign(state + 1).realize()
      near(jit(Tensor(x).realize()).numpy(), np.maximum(2*x + 1, 0), (seed, i))
    assert (state.numpy() == 20*(1 + (seed > 0))).all()
  def child(seed):
    try:
      replays(seed)
      matrices(112 + 16*seed, capture)
    except BaseException: os._exit(1)
    os._exit(0)
  replays(0)
  children = []
  for seed in (1, 2):
    children.append(os.fork() or child(seed))
  replays(3)
  assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
  sizes = [80, 96, 128]
  for method in ("fork", "spawn"):
    with multiprocessing.get_context(method).Pool(2) as pool:
      assert pool.map(in_child, sizes) == sizes
  matrices(192, TinyJit)
"""

INTERRUPTS = """
import signal
setup_device()
# what a shell runs in the background ignores Ctrl-C until told otherwise
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.default_int_handler)
from tinygrad.runtime.ops_cpu import CPUProgram
from tinygrad.uop.ops import Ops
x = Tensor(np.zeros(1 << 18, np.float32)).realize()
def add(): return x.assign(x + 1).realize()
def thrice():
  for _ in range(3): add()
  return x
jit = capture(thrice)
jit(), jit()
watched = {f.__code__ for f in (cpu.Cores.run, CPUProgram.__call__, Device["CPU"].graph.__call__)}
def interrupted(work, place):
  "Whether work was, by a signal at the opcode with this number in the functions watched."
  seen = 0
  def opcode(frame, event, arg):
    nonlocal seen
    if event == "opcode":
      seen += 1
      if seen == place: signal.raise_signal((signal.SIGINT, signal.SIGTERM)[place % 2])
    return opcode
  def called(frame, event, arg):
    if frame.f_code not in watched: return None
    frame.f_trace_opcodes = True
    return opcode
  sys.settrace(called)
  try: work()
  except KeyboardInterrupt: return True
  finally: sys.settrace(None)
  return False
for work, most in ((jit, 3), (add, 1)):
  place = 1
  while interrupted(work, place):
    before, place = x.numpy()[0], place + 1
    work()
    now = x.numpy()
    # no core is left behind, none ran twice
    assert (now == before + most).all(), (place, np.unique(now))
  assert place > 100

# Ctrl-C at 24 lines of all that runs when Tensors are scheduled, compiled and realised, tinygrad's
# own among them
lost = []                                 # in a finaliser, out of which Python lets no exception
sys.unraisablehook = lambda raised: lost.append(raised.exc_type)
U, K, W = (Tensor(normal(i, *s)).realize() for i, s in enumerate(((2, 4, 30), (4, 30), (30, 20))))
def step():
  global made
  loss = (fftconv(U, K) @ W).square().mean()
  made = [loss, *loss.gradient(K, W)]
  Tensor.realize(*made, x.assign(x + 1))
@capture
def fails(x):
  made.realize()
  flashconv.to_device(np.zeros(4, np.float32))           # a table, say, that the kernels need
  raise KeyboardInterrupt
made = U[0, 0] + 1
try: fails(U)
except KeyboardInterrupt: assert (made.numpy() == U[0, 0].numpy() + 1).all()
def interrupted_at(place):
  "Whether `step` was, by a signal at the line with this number, and how many lines it took."
  seen = 0
  def line(frame, event, arg):
    nonlocal seen
    seen += event == "line"
    if event == "line" and seen == place:
      sys.settrace(None)
      signal.raise_signal(signal.SIGINT)
    return line
  sys.settrace(line)
  try: step()
  except KeyboardInterrupt: return True, seen
  finally: sys.settrace(None)
  return False, seen
step()
want, lines = [t.numpy() for t in made], interrupted_at(0)[1]
# not always the same number of lines
for place in np.random.default_rng(0).integers(1, 0.9*lines, 24):
  made, before = [], x.numpy()[0]
  lost.clear()
  came, seen = interrupted_at(place)
  assert came or lost == [KeyboardInterrupt], (place, seen, lost)
  for t, y in zip(made, want): assert np.abs(t.numpy() - y).max() <= 1e-6*np.abs(y).max(), place
  now = x.numpy()
  assert now[0] - before in (0, 1) and (now == now[0]).all(), (place, np.unique(now))
"""

SCRIPTS = {"threads": THREADS, "forks": FORKS, "interrupts": INTERRUPTS}

@on_cpu
@pytest.mark.parametrize("name,cores", and_slow(
  table("forks 2 \n interrupts 4"), table("threads 4 \n threads 2 \n forks 4 \n interrupts 2")))
def test_cores(name, cores, tmp_path):
  "threads with a TinyJit each, forks after use, an interrupt at every step: no hang, right results"
  if name == "forks" and not hasattr(os, "fork"): pytest.skip("this system has no fork")
  (tmp_path/"own.py").write_text(OWN_PROCESS + SCRIPTS[name])
  done = own_process(tmp_path/"own.py", NUM_CPU_THREADS=cores)
  assert done.returncode == 0, done.stderr[-3000:]

# ================================================================ the model

GOLDEN = HERE / "golden" / "h3"
def golden(name:str) -> np.ndarray: return np.load(f"{GOLDEN}/{name}")
def tensors(name:str) -> dict[str, np.ndarray]:
  return {k: v.numpy() for k, v in read_checkpoint(f"{GOLDEN}/{name}.safetensors")[0].items()}
def toks(x) -> Tensor: return Tensor(np.ascontiguousarray(x, dtype=np.int32))
def tokens_of(vocabulary:int, *shape:int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, vocabulary, shape).astype(np.int32)
def float64(model:object) -> dict[str, np.ndarray]:
  return {k: v.numpy().astype(np.float64) for k, v in get_state_dict(model).items()}

def assert_close(got, want, atol, name=""):
  got = got.numpy() if isinstance(got, Tensor) else got
  assert got.shape == want.shape, (name, got.shape, want.shape)
  worst = abs(got - want).max()
  assert worst <= atol, f"{name}: off by {worst:.2e}, allowed {atol:.0e}"

def assert_same_states(got, want, atol=2e-5):
  for a, b in zip(get_parameters(got), get_parameters(want), strict=True):
    assert_close(a, b.numpy(), atol*max(1, np.abs(b.numpy()).max()))

def assert_grads(got, want, size=np.linalg.norm):
  assert got.keys() == want.keys()
  for k, g in want.items(): assert_close(got[k], g, 1e-4 * size(g), k)

def gradients(loss:Tensor, params:dict[str, Tensor], *also:Tensor) -> dict[str, np.ndarray]:
  "By name; loss and `also` are realised with them."
  grads = loss.gradient(*params.values())
  Tensor.realize(loss, *also, *grads)
  return {k: g.numpy() for k, g in zip(params, grads)}

def shaken(config, seed=1):
  "A model in which no parameter is at a trivial value."
  model, rng = H3LM(config), np.random.default_rng(seed)
  for p in get_state_dict(model).values():
    p.replace(h3tiny.param(p.numpy() + rng.normal(0, 0.2, p.shape)))
  return model

HYBRIDS = [H3Config(19, 12, 2, (1,), n_heads=2, rotary_dim=4, d_state=10, head_dim=2,
                    head_order="hd2", max_length=12),
           H3Config(19, 12, 2, (), d_state=16, head_dim=3, mlp_mult=2),
           H3Config(19, 12, 2, (0, 1), n_heads=3, mlp_mult=2, max_length=12, max_positions=40)]
S4D = H3Config(19, 12, 2, (1,), n_heads=2, d_state=10, max_length=12, ssm="s4d")
TWIN = H3Config(20, 16, 2, (1,), n_heads=2, d_state=8)
RUN8 = H3Config(257, 16, 2, (1,), n_heads=2, d_state=4)          # what the trainer's tests train

def language_model(**kw) -> Callable:
  return lambda: H3LM(dataclasses.replace(RUN8, embed_dropout=0.2, resid_dropout=0.2, **kw))
def masked_model(block:str) -> Callable:
  return lambda: BiGS(BiGSConfig(20, 16, 1, block, n_heads=2, d_state=8, max_length=16))

MODELS = {"hybrid": language_model()}
MORE_MODELS = {"h3": language_model(attn_layers=(), head_dim=2), "s4d": language_model(ssm="s4d"),
               "transformer": language_model(attn_layers=(0, 1)), "BiGS": masked_model("gated"),
               "STACK/SSM": masked_model("stack"), "S4D both ways": masked_model("s4d"),
               "STACK/SSM in series": masked_model("stack-serial")}

@pytest.mark.parametrize("name", and_slow(MODELS, MORE_MODELS))
def test_gradients_of_models_survive_what_is_read(name):
  "every parameter's, to the bit, after reading the loss and then the logits; with dropout"
  model, x, y = (MODELS | MORE_MODELS)[name](), *map(toks, tokens_of(20, 2, 2, 16))
  params, forward = get_state_dict(model), getattr(model, "mlm", model)
  def after(read:bool) -> dict[str, np.ndarray]:
    Tensor.manual_seed(3)
    logits = forward(x)
    loss = logits.sparse_categorical_crossentropy(y)
    if read: loss.item(), logits.numpy()
    return gradients(loss, params)
  with Context(TRAINING=1): want, read = after(False), after(True)
  for name, got in read.items(): assert (got == want[name]).all() and got.any(), name

def own_loop(model:H3LM, batches:list, jit:bool) -> list[float]:
  "tinygrad's own optimizer; without TinyJit the loss is read before `backward`."
  losses = []
  def step(x:Tensor, y:Tensor) -> Tensor:
    loss = model(x).sparse_categorical_crossentropy(y)
    if not jit: losses.append(loss.item())
    optimizer.zero_grad()
    loss.backward()
    return loss.realize(*optimizer.schedule_step())    # later, it would be that of the new weights
  betas = training.BETA1, training.BETA2
  optimizer = AdamW(get_parameters(model), 1e-2, *betas, training.EPS, weight_decay=0.0)
  if jit: step = TinyJit(step)
  with Context(TRAINING=1): after = [step(*map(toks, batch)).item() for batch in batches]
  return losses or after

def test_attention_dropout():
  """In training an attention weight is 0, or over 1 - p: with p = 1/4, of 10,752 about a quarter is 0
  (six standard errors). Elsewhere the dropout does nothing."""
  q, k = drawn((4, 12, 14, 8), (4, 12, 16, 8))
  v = Tensor.eye(16).expand(4, 12, 16, 16).contiguous().realize()
  weights = (q*8**-0.5 @ k.transpose(-1, -2)).softmax(-1).numpy()      # (4,12,14,16)
  def attended(): return h3tiny.attend(q, k, v, causal=False, dropout=0.25).numpy()
  near(attended(), weights, 1e-5)
  with Context(TRAINING=1): got = attended()
  dropped = got == 0
  assert abs(dropped.mean() - 0.25) < 6*(0.25*0.75/dropped.size)**0.5
  near(got[~dropped], weights[~dropped]/0.75, 1e-5)

@slow
@pytest.mark.parametrize("jit", [True, False])
def test_own_loop_learns_what_the_trainer_does(jit):
  "the same loss at each of 5 steps, to 1e-5 of it, and the same weights after them"
  batches = [(z[:, :-1], z[:, 1:]) for z in tokens_of(257, 5, 2, 17)]
  own, trained = H3LM(RUN8), H3LM(RUN8)
  losses, params = own_loop(own, batches, jit), get_state_dict(trained)
  opt = training.AdamW(params)
  step = train.make_step(trained, opt)
  want = [step(batch, opt.hyper(i, 1e-2, 0.0, 1e9, 1.0))[0] for i, batch in enumerate(batches)]
  np.testing.assert_allclose(losses, want, rtol=1e-5)
  trained = float64(trained)
  for name, w in float64(own).items():                      # a step moves a weight by 1e-2 at most
    assert_close(w, trained[name], 1e-2*5*2e-2, name)

# ---------------------------------------------------------------- the official code's own outputs

@pytest.fixture(scope="module")
def tiny():
  c = json.load(open(f"{GOLDEN}/tiny_h3/config.json"))
  sizes = c["vocab_size"], c["d_model"], c["n_layer"]
  model = H3LM(H3Config(*sizes, d_state=c["ssm_cfg"]["d_state"]))
  load_weights(model, read_checkpoint(f"{GOLDEN}/tiny_h3/model.safetensors")[0])
  return model

@slow
def test_golden_logits(tiny):
  logits = tiny(toks(golden("tiny_h3/tokens_L513.npy")))
  assert_close(logits, golden("tiny_h3/logits_L513.npy"), 1e-3)

def test_golden_logits_loss_and_gradients(tiny):
  t, want = toks(golden("tiny_h3/tokens_L64.npy")), tensors("tiny_h3/grads_L64")
  logits = tiny(t)
  loss = logits[:, :-1].sparse_categorical_crossentropy(t[:, 1:])
  grads = gradients(loss, get_state_dict(tiny), logits)
  assert_close(logits, golden("tiny_h3/logits_L64.npy"), 5e-5)
  assert_close(loss.reshape(1), want.pop("loss"), 1e-5, "loss")
  assert_grads(grads, want)

def test_golden_states(tiny):
  z = golden("tiny_h3/states.npz")
  def check(state:h3tiny.LMState, tag:str) -> None:
    for i, s in enumerate(state.layers):
      assert_close(s.shift, z[f"{tag}.layers.{i}.state_k"], 2e-5, tag)
      assert_close(s.re.numpy() + 1j*s.im.numpy(), z[f"{tag}.layers.{i}.state"], 2e-5, tag)
  n = 40 if SLOW else 24                      # 24: the next test has these kernels, too
  logits, state = tiny.prefill(toks(z["tokens"][:, :n]))
  advance = capture(lambda t: tiny.advance(t, state))
  for i in range(n, 40): logits = advance(toks(z["tokens"][:, i]))
  check(state, "after40")
  assert_close(logits, z["logits_prompt"][:, -1], 5e-5)
  for i in (40, 41):
    logits, state = tiny.step(toks(z["tokens"][:, i]), state)
    assert_close(logits, z[f"logits_step{i}"][:, 0], 5e-5)
  check(state, "after42")
  assert state.positions.item() == 42

def test_golden_greedy_under_tinyjit(tiny):
  want = golden("tiny_h3/gen_logits.npy")
  logits, state = tiny.prefill(toks(golden("tiny_h3/gen_prompt.npy")))
  step, out = TinyJit(lambda t: tiny.advance(t, state)), []
  for i in range(32):
    assert_close(logits, want[:, i], 5e-5, f"token {i}")
    out.append(logits.numpy().argmax(-1))
    logits = step(toks(out[-1]))
  assert (np.stack(out, 1) == golden("tiny_h3/gen_tokens.npy")[:, -32:]).all()
  with pytest.raises(RuntimeError, match="use advance"):        # whose states TinyJit can't see
    step = TinyJit(lambda t: tiny.step(t, state)[0])
    for _ in range(2): step(toks(out[-1]))

@slow
@pytest.mark.parametrize("name", ["hd1_L_lt_N", "hd4", "hd1"])
def test_golden_layer(name):
  c = json.load(open(f"{GOLDEN}/layers/{name}/config.json"))
  config = H3Config(d_model=c["d_model"], d_state=c["d_state"], head_dim=c["head_dim"])
  layer = H3Mixer(config, np.random.default_rng(0))
  load_weights(layer, read_checkpoint(f"{GOLDEN}/layers/{name}/params.safetensors")[0])
  x, r, out, gx = (golden(f"layers/{name}/{part}.npy") for part in ("x", "r", "out", "grad_x"))
  y = layer(x := Tensor(x).realize())[0]
  grads = gradients((y * Tensor(r)).sum(), {"x": x} | get_state_dict(layer), y)
  assert_close(y, out, 5e-6)
  assert_grads(grads, {"x": gx} | tensors(f"layers/{name}/grads"))

# ---------------------------------------------------------------- the recurrences, in float64

def np_gelu(x): return 0.5*x*(1 + np.tanh((2/np.pi)**0.5*(x + 0.044715*x**3)))
def np_dense(w, x, name): return x @ w[name+".weight"].T + w[name+".bias"]
def np_norm(w, x, name, eps):
  centred = x - x.mean(-1, keepdims=True)
  return centred/np.sqrt(x.var(-1, keepdims=True) + eps)*w[name+".weight"] + w[name+".bias"]
def below(w, prefix):
  return {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}

def np_diag(w, u):
  "The diagonal SSM and its skip: u (B,L,…,H)."
  A = -np.exp(w["kernel.kernel.inv_A_real"]) + 1j*w["kernel.kernel.A_imag"]
  B, C = w["kernel.kernel.B"] @ [1, 1j], w["kernel.kernel.C"][0] @ [1, 1j]
  dt = np.exp(w["kernel.kernel.log_dt"])[:, None]
  dA, dB = (1 + dt*A/2)/(1 - dt*A/2), dt*B/(1 - dt*A/2)
  x, y = np.zeros(A.shape), []
  for t in range(u.shape[1]):
    x = dA*x + dB*u[:, t, ..., None]
    y.append(2*(C*x).sum(-1).real + w["D"]*u[:, t])
  return np.stack(y, 1)

def np_h3(w, u, p, order):
  (B, L, D), N = u.shape, w["ssm_k_kernel.kernel.B"].shape[1]
  q, k, v = (np_dense(w, u, f"{n}_proj") for n in "qkv")
  s, shifted = np.zeros((B, D, N)), np.zeros((B, L, D))
  for t in range(L):
    s[..., 1:], s[..., 0] = s[..., :-1].copy(), 0
    s += w["ssm_k_kernel.kernel.B"]*k[:, t, :, None]
    shifted[:, t] = (w["ssm_k_kernel.kernel.C"][0]*s).sum(-1) + w["ssm_k_D"]*k[:, t]
  q, k, v = (x.reshape(B, L, D//p, p) for x in (q, shifted, v))                # channel h*p + d
  y = np_diag(w, np.einsum("blhi,blhj->blijh", k, v))
  z = np.einsum("blhi,blijh->bljh" if order == "d2h" else "blhi,blijh->blhj", q, y)
  return np_dense(w, z.reshape(B, L, D), "output_linear")

def np_attention(w, u, heads, rotary=0, causal=True):
  B, L, D = u.shape
  qkv = np_dense(w, u, "Wqkv").reshape(B, L, 3, heads, -1)
  q, k, v = qkv.transpose(2, 0, 3, 1, 4)
  r = rotary//2
  turn = np.exp(1j*np.outer(np.arange(L), 10000**(-np.arange(r)/max(r, 1))))
  for x in (q, k):
    z = (x[..., :r] + 1j*x[..., r:2*r])*turn
    x[..., :r], x[..., r:2*r] = z.real, z.imag
  seen = np.tri(L, dtype=bool) if causal else True
  return np_dense(w, np_attend(q, k, v, seen).swapaxes(1, 2).reshape(B, L, D), "out_proj")

def np_lm(model, tokens):
  c, w = model.config, below(float64(model), "backbone.")
  x = w["embeddings.word_embeddings.weight"][tokens]
  if c.max_positions: x = x + w["embeddings.position_embeddings.weight"][:tokens.shape[1]]
  for i in range(c.n_layer):
    m, mixer = below(w, f"layers.{i}."), below(w, f"layers.{i}.mixer.")
    u = np_norm(m, x, "norm1", c.norm_eps)
    if i in c.attn_layers: x = x + np_attention(mixer, u, c.n_heads, c.rotary_dim)
    elif c.ssm == "s4d": x = x + np_dense(mixer, np_gelu(np_diag(mixer, u)), "output_linear")
    else: x = x + np_h3(mixer, u, c.head_dim, c.head_order)
    u = np_dense(m, np_norm(m, x, "norm2", c.norm_eps), "mlp.fc1")
    x = x + np_dense(m, np_gelu(u), "mlp.fc2")
  return np_norm(w, x, "ln_f", c.norm_eps) @ w["embeddings.word_embeddings.weight"].T

@pytest.mark.parametrize("config", [*HYBRIDS, S4D], ids=["hybrid", "h3", "transformer", "s4d"])
def test_against_float64_recurrence(config):
  model, t = shaken(config), tokens_of(19, 2, 11)
  assert_close(model(toks(t)), np_lm(model, t), 2e-5)

@pytest.mark.parametrize("p,order", and_slow([(2, "hd2")], [(1, "d2h"), (3, "d2h")]))
def test_h3_layer_is_its_reference(p, order, few_kernels):
  "The definition in plain ops against float64, and the layer against it."
  model = shaken(H3Config(19, 12, 1, d_state=10, head_dim=p, head_order=order))
  layer, u = model.backbone.layers[0].mixer, normal(2, 11, 12)
  want = h3tiny.h3_reference(layer, Tensor(u)).numpy()
  assert_close(want, np_h3(float64(layer), u.astype(np.float64), p, order), 2e-5)
  assert_close(layer(Tensor(u).realize())[0], want, 2e-6)

# ---------------------------------------------------------------- the benchmarks' competitor

needs_torch = pytest.mark.skipif(bench.torch is None, reason="needs PyTorch")
def torch_twin(model:H3LM) -> bench.TorchLM:
  return bench.TorchLM(model.config, {k: t.numpy() for k, t in get_state_dict(model).items()})

def check_loss(model:H3LM, t:np.ndarray, want:dict[str, np.ndarray]) -> None:
  "want: the loss, (1,), and its gradients by name."
  other, t = torch_twin(model), bench.torch.tensor(t)
  loss = other.loss(t[:, :-1], t[:, 1:])
  loss.backward()
  got = {k: w.grad for k, w in other.weights.items()} | {"loss": loss.detach().reshape(1)}
  assert_grads({k: t.numpy() for k, t in got.items()}, want)

@needs_torch
def test_torch_golden(tiny):
  "The official code's logits, loss, gradients; with attention, too, decoding is the forward pass."
  tokens, want = golden("tiny_h3/tokens_L64.npy"), golden("tiny_h3/logits_L64.npy")
  for model, t in ((tiny, tokens), (H3LM(TWIN), tokens_of(20, 4, 12))):
    other, t = torch_twin(model), bench.torch.tensor(t)
    with bench.torch.no_grad():
      logits, state = other(t).numpy(), other.init_state(*t.shape)
      steps = [other(t[:, i:i+1], state, i).numpy() for i in range(t.shape[1])]
    if model is tiny: assert_close(logits, want, 5e-5)
    assert_close(np.concatenate(steps, 1), logits, 5e-5)
  check_loss(tiny, tokens, tensors("tiny_h3/grads_L64"))

@slow
@needs_torch
def test_against_torch():
  "A hybrid's loss and every gradient."
  model, t = H3LM(TWIN), tokens_of(20, 4, 13)
  params, loss = get_state_dict(model), train.cross_entropy(model(toks(t[:, :-1])), toks(t[:, 1:]))
  ours = dict(zip(params, loss.gradient(*params.values()))) | {"loss": loss.reshape(1)}
  check_loss(model, t, {k: x.numpy() for k, x in ours.items()})

# ---------------------------------------------------------------- one model, three ways to run it

@pytest.mark.parametrize("config", and_slow(HYBRIDS[:1], [*HYBRIDS[1:], S4D]),
                         ids=["hybrid, hd2", "h3, d2h", "transformer", "s4d"])
def test_forward_equals_steps_equals_prefill_in_pieces(config):
  model, t = shaken(config), tokens_of(19, 2, 11)
  want, state = model(toks(t)).numpy(), model.init_state(2)
  for i in range(11):
    before = [s.numpy() for s in get_parameters(state)]
    logits, new = model.step(toks(t[:, i]), state)
    assert_close(logits, want[:, i], 2e-5, f"step {i}")
    assert all((a == b.numpy()).all() for a, b in zip(before, get_parameters(state)))    # as it was
    state = new
  def check(logits:Tensor, ours:h3tiny.LMState) -> None:
    assert_close(logits, want[:, -1], 2e-5)
    assert_same_states(ours, state)
  if SLOW: check(*model.prefill(toks(t)))
  logits, s = model.prefill(toks(t[:, :9]), chunk=3)
  for i in (9, 10): logits, s = model.step(toks(t[:, i]), s)
  check(logits, s)
  # weights made once are for tokens: with a piece of text they change nothing
  weights, s = model.step_weights(), model.init_state(2)
  for piece in (t[:, :3], *t.T[3:]): logits = model.advance(toks(piece), s, weights=weights)
  check(logits, s)
  with pytest.raises(ValueError, match="empty"): model.prefill(toks(t[:, :0]))
  with pytest.raises(ValueError, match="batch 1, but a state of batch 2"):
    model.prefill(toks(t[:1]), s)
  if not config.attn_layers: return
  with pytest.raises(ValueError, match="22 tokens do not fit the attention cache of 12"):
    model.prefill(toks(t), s)

LONG = [H3Config(19, 16, 2, (1,), n_heads=2, rotary_dim=8), H3Config(19, 16, 2, ())]

@slow
@pytest.mark.parametrize("config", LONG, ids=["hybrid", "h3"])
def test_pieces_of_any_size_on_5000_tokens(config):
  """1, 3, 100, 1000 at a time, or one call: logits on the way and the state at the end; a step is
  traced once"""
  model, t, traced = shaken(config), tokens_of(19, 1, 5000), []
  want = model(toks(t)).numpy()
  allowed = 1e-4*np.abs(want).max()
  logits, last = model.prefill(toks(t), model.init_state(1, 5000))
  assert_close(logits, want[:, -1], 1e-4)
  advance = model.advance
  model.advance = lambda tokens, *rest: [traced.append(tokens.shape), advance(tokens, *rest)][1]
  sizes = (3, 1000) if config.attn_layers else (1, 3, 100, 1000)
  for size in sizes:
    session = gen.Session(model, 1, 5000)
    for i in range(0, 5000, size):
      got = session(t[:, i] if size == 1 else t[:, i:i+size])
      if i % 373 == 0 or i + size >= 5000:
        assert_close(got, want[:, min(i+size, 5000)-1, :19], allowed, f"{size} at a time, at {i}")
    assert_same_states(session.state, last, 1e-4)
  # more only for the caches' doublings
  assert traced.count((1,)) == (1 in sizes) and len(traced) <= 14
  assert model.capacity(last) == (5000 if config.attn_layers else None)
  for one, other in zip(last.layers, model.init_state(1).layers):  # the SSMs' states do not grow
    assert isinstance(one, h3tiny.KVCache) or [s.shape for s in one] == [s.shape for s in other]

@slow
@pytest.mark.parametrize("kw", [dict(attn_layers=(1,), rotary_dim=8, max_positions=77),
                                dict(attn_layers=(), head_dim=4)], ids=["hybrid", "h3"])
def test_texts_of_different_length_side_by_side(kw):
  "each as if it were alone: the logits after the prompts, and what is written"
  model = shaken(H3Config(50, 32, 2, n_heads=2, max_length=400, **kw))
  prompts = [tokens_of(50, n) for n in (5, 70)]
  session = gen.Session(model, 2, 128, [96 - len(p) for p in prompts])
  logits = session.read(np.stack([np.pad(p, (96 - len(p), 0)) for p in prompts]), 32)
  want = np.stack([model(toks(p[None])).numpy()[0, -1, :50] for p in prompts])
  assert_close(logits, want, 2e-5*np.abs(want).max())
  for temperature in 0, 1:
    drawn = lambda some: np.stack([*gen.generate(model, some, 6, temperature)], 1)
    together = drawn([*prompts, prompts[0]])
    for row, p in zip(together, prompts): assert (row == drawn(p)[0]).all()
    assert (together[0] == together[2]).all() == (temperature == 0)
  if "max_positions" in kw:
    longer = toks(np.zeros((1, 78)))
    with pytest.raises(gen.UserError, match="learned positions for 77"):
      next(gen.generate(model, prompts[1], 9))
    for call in (model, model.prefill):
      with pytest.raises(ValueError, match="positions for 77"): call(longer)

@pytest.mark.parametrize("exact", and_slow([True], [False]), ids=["direct", "fftconv"])
def test_causality(monkeypatch, exact):
  """The model around the convolution lets nothing back in time: exactly 0. An FFT mixes all positions
  and takes them apart again, which leaves float32 rounding; a true leak would be of the order of
  the gradient itself."""
  if exact:
    monkeypatch.setattr(h3tiny, "fftconv", flashconv.fftconv_ref)
    monkeypatch.setattr(flashconv, "conv_ref", flashconv.direct_conv)
  model, t, rng = shaken(HYBRIDS[0]), 6, np.random.default_rng(0)
  x = y = Tensor(rng.normal(size=(2, 11, 12)).astype(np.float32)).realize()
  for block, filters in zip(model.backbone.layers, model.filters(11)):
    y, _ = block(y, weights=filters)
  seen = (model.head(y)[:, t] * Tensor(rng.normal(size=24).astype(np.float32))).sum()
  g = abs(seen.gradient(x)[0].numpy())
  assert (g[:, :t+1].max(-1) > 1e-3 * g.max()).all()           # every position up to t matters
  assert g[:, t+1:].max() <= (0 if exact else 1e-6 * g.max())

# ---------------------------------------------------------------- shapes, names, files

BAD_CONFIGS = [
  (dict(attn_layers=(4,)), "layers are 0 to 3"),
  (dict(n_heads=3), "multiple of n_heads"),
  (dict(d_state=7), "even"),
  (dict(head_dim=5), "multiple of head_dim"),
  (dict(ssm="s5"), "'s4d'"),
  (dict(rotary_dim=34), "rotary_dim"),
  (dict(n_layer=0), "n_layer"),
  (dict(max_positions=-1), "max_positions"),
  (dict(init_std=0), "init_std")]

def test_config():
  for bad, why in BAD_CONFIGS:
    with pytest.raises(ValueError, match=why): H3Config(**bad)
  c = H3Config.named("2.7B-rotary")
  assert (c.padded_vocab, c.d_model, c.rotary_dim) == (50264, 2560, 64)
  assert c.attn_layers == (10, 21)
  with pytest.raises(ValueError, match="125M"): H3Config.named("3B")

# -- model files: ours

def refused(path:Path, why:str, data:bytes|None=None, load:Callable=H3LM.from_pretrained) -> None:
  "In one line that names the file, and says why."
  if data is not None: path.write_bytes(data)
  with pytest.raises(CheckpointError, match=why) as e: load(str(path))
  assert path.name in str(e.value) and "\n" not in str(e.value)

def one_line(capsys, module:ModuleType, args:list[str], silent:bool=False) -> str:
  "Returns what a program says, in one line, where it stops with status 2; silent: with no output."
  capsys.readouterr()
  with pytest.raises(SystemExit) as stop: module.main(args)
  out, err = capsys.readouterr()
  err = re.sub("^compiling .*\n", "", err)                 # what is not on disk yet
  assert stop.value.code == 2 and err.count("\n") == 1, (args, err)
  assert not (silent and out), (args, out)
  return err

def python(code:str, *words:str, cwd:Path=HERE, **env:str) -> str:
  "Returns what a program prints that runs in a process of its own."
  done = subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, text=True,
                        capture_output=True, env=os.environ | {"DEV": "CPU"} | env)
  assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr[-2000:])
  return done.stdout

def loaded(path:Path, **options) -> dict[str, Tensor]:
  return get_state_dict(H3LM.from_pretrained(str(path), **options))

def saved(path:Path, tensors:dict, meta:dict={}) -> Path:
  save_checkpoint(str(path), tensors, meta)
  return path

def assert_same(got:dict, want:dict, what:object=None) -> None:
  for k in want:
    assert (got[k].numpy() == want[k].numpy()).all(), (what, k)

def test_checkpoint(tmp_path):
  "Every number comes back; what is cut or changed anywhere is refused, and so is another model's"
  model, path = shaken(HYBRIDS[0]), tmp_path/"m.safetensors"
  w, config = get_state_dict(model), json.dumps(dataclasses.asdict(model.config))
  meta = {"model": "h3", "config": config}
  saved(path, w | {"optim.step": Tensor([7])}, meta)
  assert os.listdir(tmp_path) == [path.name]
  again, whole = H3LM.from_pretrained(str(path)), path.read_bytes()
  assert again.config == model.config
  assert_same(get_state_dict(again), w)
  n = 8 + int.from_bytes(whole[:8], "little")
  for cut in (0, 5, 8): refused(path, "not a safetensors|truncated", whole[:cut])
  size = len(whole)
  for cut in (20, n-1, n, n+1, size//2, size-1):
    refused(path, "truncated", whole[:cut])
  refused(path, "too long", whole + b"\0")
  refused(path, "not a safetensors", b"PK\3\4" + bytes(range(256))*4)
  refused(path, "damaged", whole.replace(b'"shape":[24,12]', b'"shape":[24,13]', 1))
  name = "backbone.layers.0.mixer.kernel.kernel.log_dt"
  for why, tensors, changed in (
      (f"{name} is missing", {k: v for k, v in w.items() if k != name}, meta),
      (f"{name} has shape", w | {name: Tensor([1.0])}, meta),
      ("odd.one does not belong", w | {"odd.one": Tensor([1.0])}, meta),
      ("not a checkpoint of an H3 model", w, meta | {"model": "bigs"}),
      ("config", w, {"model": "h3"}),
      ("config", w, meta | {"config": '{"d_modle": 3}'})):
    refused(saved(path, tensors, changed), why)
  refused(tmp_path/"none", "no model at")

# -- model files: PyTorch's, written here without PyTorch

def word(s:str) -> bytes:
  return b"X" + struct.pack("<I", len(s.encode())) + s.encode()
def named_as(s:str) -> bytes:
  return b"c" + s.replace(" ", "\n").encode() + b"\n"
def pickled(x:object) -> bytes:
  return pickle.dumps(x, 2)[2:-1]     # without frame
def tuple_of(items) -> bytes: return b"(" + b"".join(items) + b"t"
def dictionary(items:dict[str, bytes]) -> bytes:
  return b"}(" + b"".join(word(k) + v for k, v in items.items()) + b"u"
def call(function:str, *words:str) -> bytes:
  "Instructions of a pickle: a name, called with strings."
  return named_as(function) + tuple_of(map(word, words)) + b"R"
def tensor(key:str, shape:tuple, kind:str="Float") -> bytes:
  "The instructions for a contiguous tensor of the storage of this key."
  strides = [math.prod(shape[i+1:]) for i in range(len(shape))]
  storage = [word("storage"), named_as(f"torch {kind}Storage"), word(key), word("cpu"),
             pickled(max(1, math.prod(shape)))]
  sizes = [tuple_of(map(pickled, x)) for x in (shape, strides)]
  code = [tuple_of(storage) + b"Q", pickled(0), *sizes]
  return named_as("torch._utils _rebuild_tensor_v2") + tuple_of([*code, b"\x89", b"}"]) + b"R"
def archive(path:Path, code:bytes, arrays:list=[]) -> Path:
  "A file of torch.save's: a pickle of these instructions, and storages."
  with zipfile.ZipFile(path, "w") as z:
    z.writestr("m/data.pkl", b"\x80\x02" + code + b".")
    for i, x in enumerate(arrays):
      z.writestr(f"m/data/{i}", np.ascontiguousarray(x, np.float32).tobytes())
  return path
def tensors_code(tensors:dict, first:int=0) -> bytes:
  return dictionary({k: tensor(str(i), v.shape) for i, (k, v) in enumerate(tensors.items(), first)})
def torch_file(path:Path, tensors:dict) -> Path:
  return archive(path, tensors_code(tensors), [v.numpy() for v in tensors.values()])

@pytest.fixture(scope="module")
def official() -> dict[str, Stored]:
  "The golden model's tensors."
  weights = read_checkpoint(f"{GOLDEN}/tiny_h3/model.safetensors")[0]
  return {k: v for k, v in weights.items() if k != "lm_head.weight"}

def old_names(tensors:dict) -> dict:
  "As the first releases named them: each LayerNorm belongs to the sublayer before it."
  n = 1 + max(int(k.split(".")[2]) for k in tensors if "layers." in k)
  out = {}
  for k, v in tensors.items():
    k = k.removeprefix("backbone.")
    if m := re.fullmatch(r"layers\.(\d+)\.norm([12])\.(\w+)", k):
      i, which, part = int(m[1]), m[2], m[3]
      k = f"layers.{i-1}.norm2.{part}" if i else f"norm.{part}"
      if which == "2": k = f"layers.{i}.norm1.{part}"
    k = k.replace("ln_f.", f"layers.{n-1}.norm2.")
    out["embedding.weight" if "word_embeddings" in k else f"s4seq.encoder.{k}"] = v
  return out

def test_official_weights(tiny, official, tmp_path):
  "From each container under each naming; heads from config.json or as told; what does not fit"
  old = old_names(official)
  some_heads = lambda path: H3LM.from_pretrained(str(path), n_heads=4)
  shutil.copy(f"{GOLDEN}/tiny_h3/config.json", tmp_path)
  assert "s4seq.encoder.norm.weight" in old and "s4seq.encoder.layers.2.norm2.weight" in old
  one = Stored(np.ones(1, np.float32))
  for weights in (official, old):
    lightning = {f"model.{k}": v for k, v in weights.items()} | {"loss.weight": one}
    wrapped = dictionary({"state_dict": tensors_code(lightning)})
    for path in (saved(tmp_path/"a.safetensors", weights, {"format": "pt"}),
                 torch_file(tmp_path/"b.pt", weights),
                 archive(tmp_path/"c.pt", wrapped, [v.numpy() for v in lightning.values()])):
      model = some_heads(path)
      assert model.config == tiny.config
      assert_same(get_state_dict(model), official, path)
  os.remove(tmp_path/"config.json")
  some, far = "backbone.layers.1.mixer.q_proj.weight", "backbone.layers.{}.norm1.weight"
  for why, name in (
      ("odd.one does not belong", "odd.one"), (f"{some} has shape", some),
      ("is missing", far.format(5)),
      ("not all there", far.format(10**8))):
    refused(torch_file(tmp_path/"d.pt", official | {name: one}), why, load=some_heads)
  fewer = {k: v for k, v in official.items() if k != some}
  refused(torch_file(tmp_path/"d.pt", fewer), f"{some} is missing", load=some_heads)
  hybrid = H3LM(H3Config(
    40, 16, 3, (1,), n_heads=2, d_state=8, rotary_dim=4, head_dim=2))
  inv_freq = {"backbone.layers.1.mixer.rotary_emb.inv_freq": Tensor([1.0, 0.01])}
  path = torch_file(tmp_path/"e.pt", get_state_dict(hybrid) | inv_freq)
  assert H3LM.from_pretrained(str(path), n_heads=2).config == hybrid.config
  refused(path, "give n_heads")
  heads = '{"attn_cfg": {"num_heads": 2}'
  for text, why in ((f'{heads}, "n_layer": 4}}', "n_layer 4"), ("[", "is not JSON"),
                    (f'{heads}, "vocab_size": 50}}', "vocab_size 50")):
    (tmp_path/"config.json").write_text(text)
    with pytest.raises(CheckpointError, match=why): H3LM.from_pretrained(str(path))
  (tmp_path/"config.json").write_text(heads + "}")
  assert H3LM.from_pretrained(str(path)).config == hybrid.config

def test_hybrid_and_rotary_from_official_files(tmp_path):
  "As `save_official` writes them, in the authors' channel order; A and B that channels share"
  t = np.random.default_rng(0).integers(0, 16, (2, 9))
  attn = dict(attn_layers=(1,), pad_vocab_multiple=1)
  for config in (HYBRIDS[0], dataclasses.replace(HYBRIDS[2], **attn)):
    model, path = shaken(config), str(tmp_path/"model.safetensors")
    save_official(path, model)
    again = H3LM.from_pretrained(path)
    assert again.config == dataclasses.replace(model.config, head_order="d2h", max_length=2048)
    assert_close(np_lm(again, t), np_lm(model, t), 1e-9)
    with pytest.raises(CheckpointError, match="config.json is there"):
      save_official(str(tmp_path/"other.safetensors"), H3LM(H3Config(19, 8, 1)))
    assert not (tmp_path/"other.safetensors").exists()
    os.remove(tmp_path/"config.json")
  model = shaken(H3Config(16, 12, 1, d_state=4))
  weights = {k: Stored(v.numpy()) for k, v in get_state_dict(model).items()}
  for part in ("B", "inv_A_real", "A_imag"):
    name = f"backbone.layers.0.mixer.kernel.kernel.{part}"
    few = weights[name].array[:4]
    weights[name] = Stored(few)
    # SSM h has row h mod 4
    get_state_dict(model)[name].replace(Tensor(np.concatenate([few]*3)))
  assert_same(loaded(torch_file(tmp_path/"shared.pt", weights)), get_state_dict(model))

def test_export_is_true_or_refused(tiny, tmp_path):
  """The table of official tensors is that of the authors' own files, and counts the released
  models' parameters and bytes (4 a parameter and 444 or 462 a tensor; of the 355M with Adam's two
  moments three times that). What was changed in a copy of h3tiny.py is not written."""
  shapes = {k: v.shape for k, v in tensors("tiny_h3/model").items()}
  assert checkpoints.official_shapes(tiny.config) == shapes
  for name, parameters, count, spare in (
      ("125M", 126_387_456, 291, None), ("355M", 361_058_304, None, None),
      ("1.3B", 1_326_096_384, None, 462),
      ("2.7B", 2_670_307_840, 765, 444), ("2.7B-rotary", 2_671_134_720, 780, 444)):
    shapes = checkpoints.official_shapes(H3Config.named(name))
    size = checkpoints.RELEASED[name].size
    trained = [math.prod(v) for k, v in shapes.items() if "inv_freq" not in k]
    assert sum(trained) == parameters
    assert count in (None, len(shapes) + 1)                # and lm_head.weight
    if spare:
      assert round((size - 4*parameters) / len(trained)) == spare
    elif size: assert size/(4*parameters) == pytest.approx(3.0004, abs=1e-4)
  def wider(layers):
    layers[0].mlp = h3tiny.MLP(H3Config(19, 16, 2, mlp_mult=2), rng)
  def gated(layers):
    layers[1].mlp.gate = h3tiny.LayerNorm(32, 1e-5)
  def unbiased(layers): del layers[1].mixer.q_proj.bias
  def longer(layers): layers.append(layers[0])
  path = str(tmp_path/"m.safetensors")
  for change, words in ((wider, "layers.0.mlp.fc1.bias has shape (32,) here and (64,)"),
                        (gated, "layers.1.mlp.gate.bias has shape (32,) here and none"),
                        (unbiased, "layers.1.mixer.q_proj.bias has shape none here and (16,)"),
                        (longer, "layers.2.mixer.D has shape (16,) here and none")):
    model = H3LM(H3Config(19, 16, 2))
    change(model.backbone.layers)
    refused(Path(path), re.escape(words), load=lambda path: save_official(path, model))
    assert not os.listdir(tmp_path)
  s4d = H3LM(H3Config(19, 16, 2, ssm="s4d"))
  refused(Path(path), "no model of s4d", load=lambda path: save_official(path, s4d))

def readme_python(word:str) -> str:
  "The block of Python in the README with this word in it."
  blocks = re.findall(r"```python\n(.*?)```", (HERE/"README.md").read_text(), re.S)
  return next(b for b in blocks if word in b)

def torch_python() -> str|None:
  "An interpreter that has PyTorch and safetensors: this one, or TORCH_PYTHON's."
  here = all(importlib.util.find_spec(m) for m in ("torch", "safetensors"))
  return os.environ.get("TORCH_PYTHON") or (sys.executable if here else None)

TORCH_CHECK = """
w = torch.load("official/model.pt", weights_only=True)
words = w["backbone.embeddings.word_embeddings.weight"]
assert (w["lm_head.weight"] == words).all()
half = {"model." + k: v.bfloat16() for k, v in w.items()}
torch.save({"state_dict": half}, "official/old.pt", _use_new_zipfile_serialization=False)
strided = {k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in w.items()}
torch.save(strided, "official/strided.ckpt")
print(len(w))
"""

@pytest.mark.skipif(not torch_python(), reason="PyTorch and safetensors, here or in TORCH_PYTHON")
def test_pytorch_makes_a_pt_of_an_export(tmp_path):
  """By the two lines of the README. PyTorch loads it, weights only, and so do we: the same numbers.
  And what PyTorch itself makes of them: strided tensors, bfloat16 in its form before 1.6."""
  model, folder = shaken(HYBRIDS[0]), tmp_path/"official"
  folder.mkdir()
  save_official(str(folder/"model.safetensors"), model)
  two_lines = readme_python("safetensors.torch")
  assert two_lines == gen.TO_PT.format("official/model") + "\n"
  done = subprocess.run([torch_python(), "-c", two_lines + TORCH_CHECK], cwd=tmp_path, check=True,
                        capture_output=True, text=True)
  assert int(done.stdout) == 1 + len(checkpoints.official_shapes(model.config))
  want = loaded(folder/"model.safetensors")
  for name in ("model.pt", "strided.ckpt"): assert_same(loaded(folder/name), want, name)
  for k, v in loaded(folder/"old.pt").items():
    got, w = v.numpy(), want[k].numpy()
    assert (got.view(np.uint32) & 0xffff == 0).all(), k
    assert (abs(got - w) <= 2**-8*abs(w)).all(), k

@pytest.mark.parametrize("shape", [(1,)*65, (0, 2**70), (0, 2**40, 2**40)])
def test_shapes_that_numpy_has_not(shape, tmp_path):
  "Refused in one line, in a pickle and in a header; so is a tensor of odd numbers or an odd name."
  for name, kind, why in (("w", "Float", "tensor w is damaged"),
                          ("a\nb\x1b", "Float", "tensor a.b. is damaged"),
                          ("w", "ComplexFloat", "tensor w has numbers of type ComplexFloat")):
    code = dictionary({name: tensor("0", shape, kind)})
    path = archive(tmp_path/"m.pt", code, [np.zeros(1)])
    refused(path, why, load=checkpoints.read_torch)
  size = 4*math.prod(shape)
  header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
  data = struct.pack("<Q", len(header)) + header + bytes(size)
  refused(tmp_path/"m.safetensors", "damaged at tensor w", data, read_checkpoint)

def test_damaged_official_files(official, tmp_path, monkeypatch):
  """Cut, replaced, or one bit of it flipped: refused, or every number is as it was. Neither a
  packed pickle nor many dictionaries of one list take memory out of proportion."""
  monkeypatch.chdir(tmp_path)
  path = torch_file(tmp_path/"bad.pt", official)
  whole = path.read_bytes()
  def load(path:str) -> dict[str, np.ndarray]:
    weights = checkpoints.official_names(checkpoints.read_torch(path))
    checkpoints.h3_config(weights, path, 4)
    return {k: v.numpy() for k, v in weights.items()}
  size = len(whole)
  for n in (0, 1, 100, size//3, size//2, size-1000, size-1):
    refused(path, "not a file of torch.save's|damaged", whole[:n])
  refused(path, "not a file of torch.save's", b"<!DOCTYPE html><html><body>404</body></html>")
  evil = call("posix system", "touch evil")
  evil_model = dictionary({"model.w": evil})
  for code in (evil, evil_model, dictionary({"state_dict": evil_model, "x": evil})):
    refused(archive(path, code), "no tensors in it")
  assert not Path("evil").exists()
  some, seen = np.random.default_rng(0), 0
  for at in [*some.integers(0, size, 80), *range(0, 60, 3)]:
    data = bytearray(whole)
    data[at] ^= 1 << int(some.integers(8))
    path.write_bytes(data)
    try: got = load(str(path))
    except CheckpointError: seen += 1
    else:                            # a name that has changed is refused with the model
      for k in got.keys() & official.keys():
        assert (got[k] == official[k].numpy()).all(), at
  assert seen >= 80                  # most of the bytes are tensors'; a zip's dates do not matter
  with zipfile.ZipFile("m.pt", "w", zipfile.ZIP_DEFLATED) as z:
    z.writestr("m/data.pkl", b"]"*(1 << 24))
  refused(Path("m.pt"), "damaged")
  pairs = b"]q\x01(" + b"".join(word(f"{i}") + b"N\x86" for i in range(1000)) + b"e0"
  ordered = named_as("collections OrderedDict") + b"h\x01\x85R"
  made = checkpoints.unpickled(io.BytesIO(pairs + b"](" + ordered*1000 + b"e."))
  assert sum(map(len, made)) == 1000

# the names in the pickles of two released files, as their pages list them
RELEASED_NAMES = """
  torch LongStorage, torch FloatStorage, torch._utils _rebuild_tensor_v2, collections OrderedDict,
  collections defaultdict, typing Any, __builtin__ dict, __builtin__ list, __builtin__ long,
  omegaconf.base Metadata, omegaconf.base ContainerMetadata, omegaconf.dictconfig DictConfig,
  omegaconf.listconfig ListConfig, omegaconf.nodes AnyNode"""
ALSO_OF_355M = ", torch Tensor, torch._tensor _rebuild_from_type_v2"

@pytest.mark.parametrize("name", ["like_355M", "like_2.7B", "lightning_namespace",
                                  "lightning_numpy", "before_torch_1.6"])
def test_files_in_the_released_forms(official, name):
  "Whole Lightning checkpoints as PyTorch and OmegaConf write them: each tensor, each name"
  path = GOLDEN/"files"/f"{name}.pt"
  got = loaded(path)
  assert got.keys() == official.keys()
  assert_same(got, official)
  if "like" not in name: return
  with zipfile.ZipFile(path) as z: instructions = pickletools.genops(z.read(f"{name}/data.pkl"))
  names = {arg for op, arg, _ in instructions if op.name == "GLOBAL"}
  want = RELEASED_NAMES + ALSO_OF_355M*(name == "like_355M")
  assert names == {*re.split(r",\s+", want.strip())}

DEEP = 10_000_000 if SLOW else 1_000_000
TOUCH = "__import__('os').system('touch ran')"
SYSTEM, RUN = named_as("os system"), call("os system", "touch ran")
THING, ARGS = named_as("hostile Thing"), tuple_of([word("touch ran")])
STORAGE = b"(" + word("storage") + SYSTEM + word("0") + word("cpu") + b"K\x01tQ"
REBUILD = named_as("torch._tensor _rebuild_from_type_v2")
# what each file has beside a model that is whole; all of it leaves one value
HOSTILE = {
  "os.system": RUN,
  "eval": call("builtins eval", TOUCH),
  "subprocess": named_as("subprocess check_call") + b"(](" + word("touch") + word("ran") + b"etR",
  "importlib": call("importlib import_module", "hostile"),
  "a module of its own": THING + b")\x81",
  "by protocol 4": word("os") + word("system") + b"\x93" + ARGS + b"R",
  "an old instance": b"(" + word("touch ran") + b"ios\nsystem\n",
  "an object": b"(" + SYSTEM + word("touch ran") + b"o",
  "an extension": b"\x82\x01" + ARGS + b"R",
  "a call of what a call gave": THING + b")R" + ARGS + b"R",
  "getattr": call("builtins getattr", "a", "b") + ARGS + b"R",
  "state": THING + b")\x81}" + word("__setstate__") + RUN + b"sb",
  "state of a dictionary":
    named_as("collections OrderedDict") + b")R}" + word("x") + SYSTEM + b"sb",
  "state of a name": THING + b"}" + word("x") + word("y") + b"sb",
  "a storage that is a function": STORAGE,
  "a storage of another kind":
    b"(" + word("module") + THING + word("hostile.py") + word("") + b"tQ" + word("a") + b"Q0",
  "a tensor of such a storage": named_as("torch._utils _rebuild_tensor_v2") + b"(" + STORAGE +
    b"K\x00))\x89}tR",
  "a tensor's function": REBUILD + b"(" + SYSTEM + THING + ARGS + b"}tR",
  "functions of functions": REBUILD + (b"(" + REBUILD + THING)*10_000 + ARGS + b"t"*10_000 + b"R",
  "a default factory":
    named_as("collections defaultdict") + b"(" + SYSTEM + b"tR" + word("a") + word("b") + b"s",
  "a subclass of dict": named_as("hostile Dict") + b")\x81(" + word("a") + RUN + b"u",
  "a key": b"}((" + RUN + b"K\x01(ltK\x02u",
  "a set": b"\x8f(" + RUN + b"\x90",
  "tuples in tuples": b")" + b"\x85"*DEEP,
  "a key of tuples in tuples": b"})" + b"\x85"*DEEP + b"K\x01s",
  "lists in lists": b"]"*(DEEP//10) + b"a"*(DEEP//10 - 1),
  "dictionaries in dictionaries": b"}" + (word("a") + b"}")*(DEEP//100) + b"s"*(DEEP//100),
}
WATCH = """
import sys, pathlib
from support.checkpoints import read_torch
load = lambda path: {k: v.numpy() for k, v in read_torch(path).items()}
want, seen, modules = load("whole.pt"), [], set(sys.modules)
watched = {"import", "exec", "compile", "os", "subprocess", "pickle", "marshal", "code"}
def watch(event, args):
  if event.split(".")[0] in watched and event not in ("os.listdir", "os.scandir"):
    seen.append((event, str(args)[:200]))
sys.addaudithook(watch)
for path in sorted(pathlib.Path("files").iterdir()):
  before = len(seen)
  right = all((v == want[k]).all() for k, v in load(str(path)).items())
  print(path.stem, "|", right, "|", seen[before:], "|", set(sys.modules) - modules, flush=True)
"""

def test_hostile_pickles(official, tmp_path):
  """Nothing in a pickle is run or imported, wherever it stands, and none brings the interpreter
  down: Python's own audit events are watched in another process. The model beside it is loaded,
  each number of it."""
  arrays, state = [v.numpy() for v in official.values()], tensors_code(official)
  archive(tmp_path/"whole.pt", dictionary({"state_dict": state}), arrays)
  a_dictionary = lambda code: dictionary({"a": code})
  places = {"callbacks": lambda code: code, "hyper_parameters": a_dictionary,
            "optimizer_states": lambda code: b"](" + a_dictionary(a_dictionary(code)) + b"e"}
  (tmp_path/"files").mkdir()
  ran = "import os\nos.system('touch ran')\nclass Thing: pass\nclass Dict(dict): pass\n"
  (tmp_path/"hostile.py").write_text(ran)
  for i, (what, code) in enumerate(HOSTILE.items()):
    for place in places if i < 4 else ["hyper_parameters"]:
      beside = {place: places[place](code), "state_dict": state}
      if len(code) < 1000: beside["after"] = code
      archive(tmp_path/"files"/f"{i:02} {what} in {place}.pt", dictionary(beside), arrays)
  said = python(WATCH, cwd=tmp_path, PYTHONPATH=f"{HERE}{os.pathsep}.")
  lines = said.splitlines()
  assert len(lines) == len(HOSTILE) + 8 and not (tmp_path/"ran").exists()
  for line in lines: assert line.endswith("| True | [] | set()"), line

# VmHWM is the peak of this program alone; getrusage's is also its parent's, from before it began
PEAK_NOW = """
import sys, re, pathlib
from h3tiny import H3Config, H3LM
def peak():
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024*int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
"""
PEAK = PEAK_NOW + """
import support.checkpoints
from support import cpu
cpu.setup_device()
H3LM(H3Config(8, 8, 1))
before = peak()
model = H3LM.from_pretrained(sys.argv[1], 4, sys.argv[2])
print(peak() - before)
"""

@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux tells a peak of memory")
def test_loading_takes_the_model_and_one_tensor(tmp_path):
  """The peak of a process's memory while it loads, float32 and bfloat16, from a Lightning file with
  Adam's moments: three times the model's float32s. The moments are not read: their bytes are
  not what their checksums say."""
  model = H3LM(H3Config(50257, 256, 4, (1,)), seed=None)
  weights = {f"model.{k}": normal(*p.shape) for k, p in get_state_dict(model).items()}
  groups = {name: tensors_code(weights, i*len(weights))
            for i, name in enumerate(("state_dict", "exp_avg", "exp_avg_sq"))}
  path = archive(tmp_path/"m.pt", dictionary(groups), [*weights.values()]*3)
  with zipfile.ZipFile(path) as z:
    last = max(i.header_offset for i in z.infolist())
  with open(path, "r+b") as f:
    f.seek(last + 60)
    f.write(b"\xff"*4)
  sizes = [w.size for w in weights.values()]
  for dtype, a_weight in (("float32", 4), ("bfloat16", 2)):
    grown = float(python(PEAK, str(path), dtype))
    # one tensor: as it lies in the file, and what it becomes
    allowed = a_weight*sum(sizes) + (4 + a_weight)*max(sizes) + 16e6
    assert grown <= allowed, (dtype, grown/1e6)

@pytest.mark.parametrize("dtype", and_slow(SMALL_TYPES[1:2], SMALL_TYPES[2:]))
def test_small_weights_in_every_mode(dtype, tmp_path):
  "convolution, prefill, step: what the same values give in float64; matrices alone are small"
  model, path = shaken(HYBRIDS[0]), tmp_path/"m.safetensors"
  t = tokens_of(19, 2, 11)                        # 11: other tests have these kernels, too
  save_official(str(path), model)
  small = H3LM.from_pretrained(str(path), dtype=dtype)
  kept = H3LM.from_pretrained(str(path))
  params = get_state_dict(small)
  assert {k for k, p in params.items() if p.dtype != dtypes.float} == {
    k for k, p in params.items() if k.endswith(".weight") and p.ndim == 2}
  for k, p in get_state_dict(kept).items():
    p.replace(flashconv.widened(params[k]).contiguous().realize())
  want = np_lm(kept, t)
  assert_close(small(toks(t)), want, 2e-5)
  logits, state = small.prefill(toks(t[:, :3]))
  for i in range(3, 11):
    logits, state = small.step(toks(t[:, i]), state)
  assert_close(logits, want[:, -1], 2e-5)
  # rounding moves a weight by at most half of its last bit, and the logits by little more
  allowed = {"float16": 2e-2, "bfloat16": 0.16}[dtype]
  moved = np.abs(want - np_lm(model, t)).max()
  assert moved <= allowed*np.abs(want).max()
  if dtype == "float16":
    large = {k: Stored(v.numpy()*np.float32(1e6)) for k, v in get_state_dict(model).items()}
    refused(torch_file(tmp_path/"n.pt", large), "weight has values past what float16 holds",
            load=lambda path: H3LM.from_pretrained(path, 2, dtype))

# ================================================================ BiGS

BIGS = HERE / "golden" / "bigs" / "tinyA"
def bigs_golden(name:str) -> np.ndarray: return np.load(f"{BIGS}/{name}.npy")
def ids(name:str) -> Tensor:
  return toks(np.load(f"{BIGS}/inputs.npz")[name])

@pytest.fixture(scope="module")
def tinyA(): return {kind: BiGS.from_pretrained(f"{BIGS}/{f}") for kind, f in
                     dict(bin="pytorch_model.bin", torch="model.safetensors", flax="flax").items()}

def test_bigs_three_formats_hold_the_same(tinyA):
  a, b, c = (get_state_dict(tinyA[kind]) for kind in ("torch", "bin", "flax"))
  pooler = {f"bigs.pooler.dense.{part}" for part in ("weight", "bias")}
  assert a.keys() == b.keys() and a.keys() - c.keys() == pooler
  assert_same(a, b)
  assert_same(a, c)
  assert (tinyA["torch"].config.gelu, tinyA["flax"].config.gelu) == ("erf", "tanh")

def test_bigs_golden_mlm(tinyA):
  "and at length 16 below, with the gradients"
  model, texts = tinyA["torch"], ids("ids100")
  some = np.array([[3, 0, 99], [7, 7, 50]], np.int32)
  want = bigs_golden("mlm_logits_100")
  for got, want in (
      (model.mlm(texts), want),
      (model.mlm(texts, ids("token_type100")), bigs_golden("mlm_logits_100_token_type")),
      (model.mlm(texts, at=toks(some)), np.take_along_axis(want, some[..., None], 1)),
      (model.mlm(ids("ids128")), bigs_golden("mlm_logits_128")),
      (model.mlm(ids("ids100pad128")), bigs_golden("mlm_logits_100pad128")),
      (tinyA["flax"].mlm(texts), bigs_golden("flax_mlm_logits_100"))):
    assert_close(got, want, 1e-4)

def test_bigs_golden_heads(tinyA, capsys):
  seqcls, mc, qa, tokcls = (
    BiGS.from_pretrained(f"{BIGS}/{name}") for name in ("seqcls", "mc", "qa", "tokcls"))
  padded, choices, plain = ids("ids100pad128"), ids("mc_ids16"), ids("ids100")
  mask = ids("mask100pad128")
  first, last = qa.span(plain)
  for got, name in ((seqcls.classify(padded, mask), "seqcls_logits_100pad128"),
                    (tinyA["torch"].pool(padded, mask), "pooled_100pad128"),
                    (mc.choose(choices), "mc_logits_16"), (tokcls.tag(plain), "tokcls_logits_100"),
                    (first, "qa_start_logits_100"), (last, "qa_end_logits_100")):
    assert_close(got, bigs_golden(name), 1e-5, name)
  assert capsys.readouterr().err == ""
  with pytest.raises(ValueError, match="the classifier has 3 outputs"): seqcls.choose(choices)
  # a pooler on which nothing was trained
  BiGS.from_pretrained(f"{BIGS}/model.safetensors", head="classify")
  err = capsys.readouterr().err
  assert err.count("\n") == 1
  assert "no trained bigs.pooler.dense and classifier in it" in err

def test_bigs_golden_gradients(tinyA):
  "The SSMs' filters; the whole masked model's gradients to 1e-4 of each one's largest."
  model, largest = tinyA["bin"], lambda g: np.abs(g).max()
  ssms = [ssm for layer in model.bigs.encoder.layer for ssm in (layer.fs4, layer.bs4)]
  taps = bigs_tiny.filters(ssms, 128).numpy()
  for ssm, got, name in zip(ssms, taps, ("fs4", "bs4")):
    got[0] -= ssm.D.item()
    assert_close(got, bigs_golden(f"kernel_layer0_{name}_L128_f64").ravel(), 2e-5)
  want, params = dict(np.load(f"{BIGS}/mlm_grads16.npz")), get_state_dict(model)
  logits = model.mlm(ids("ids16"))
  loss = train.cross_entropy(logits, ids("mlm_labels16"))
  assert_grads(gradients(loss, {k: params[k] for k in want}, logits), want, largest)
  assert_close(logits, bigs_golden("mlm_logits_16"), 1e-4)

def np_s4d(w, u, reverse=False):
  "BiGS's SSM, one step at a time: u (B,L,D)."
  if reverse:
    return np_s4d(w, u[:, ::-1])[:, ::-1]
  A = np.minimum(w["kernel.A_re"], -1e-4) + 1j*w["kernel.A_im"]
  C = w["kernel.C"] @ [1, 1j]
  dA = np.exp(np.exp(w["kernel.log_step"])*A)
  x, y = 0, []
  for t in range(u.shape[1]):
    x = dA*x + ((dA - 1)/A)*u[:, t, :, None]
    y.append((C*x).sum(-1).real + w["D"]*u[:, t])
  return np.stack(y, 1)

def np_mixed(w, x, h, act, c):
  "The part of a layer that lets positions see each other."
  if "attention" in c.block:
    return np_attention(below(w, "attention."), h, c.n_heads, causal=False)
  fs4, bs4 = below(w, "fs4."), below(w, "bs4.")
  if c.block == "stack":
    both = np.concatenate([np_s4d(fs4, h), np_s4d(bs4, h, True)], -1)
    return np_dense(w, both, "mix")
  if c.block == "stack-serial":
    forward = np_dense(w, np_s4d(fs4, h), "duc_forward")
    h = np_norm(w, x + forward, "norm_backward", c.norm_eps)
    return forward + np_dense(w, np_s4d(bs4, h, True), "duc_backward")
  forward, backward = (act(np_dense(w, h, f"du_{way}ward")) for way in ("for", "back"))
  forward = np_dense(w, np_s4d(fs4, forward), "duc_forward")
  return forward * np_dense(w, np_s4d(bs4, backward, True), "duc_backward")

def np_layer(w, x, act, c):
  h = np_norm(w, x, "LayerNorm", c.norm_eps)
  if c.block == "s4d":                          # H3's diagonal SSM in both directions, one skip
    fs4, bs4 = ({f"kernel.{k}": v for k, v in below(w, n).items()} for n in ("fs4.", "bs4."))
    y = np_diag(fs4 | {"D": w["D"]}, h)
    y = y + np_diag(bs4 | {"D": 0}, h[:, ::-1])[:, ::-1]
    value, gate = np.split(np_dense(w, np_gelu(y), "mix"), 2, -1)
    return x + value/(1 + np.exp(-gate))
  u = np_mixed(w, x, h, act, c)
  if c.block.startswith("gated"):
    gated = act(np_dense(w, u, "dol")) * act(np_dense(w, h, "dv"))
    return x + np_dense(w, gated, "do")
  x = x + u
  hidden = np_dense(w, np_norm(w, x, "norm2", c.norm_eps), "fc1")
  return x + np_dense(w, act(hidden), "fc2")

def np_bigs(model:BiGS, tokens:np.ndarray) -> np.ndarray:
  "The encoder of any block in float64."
  c, w = model.config, float64(model.bigs)
  erf = np.vectorize(math.erf)
  act = (lambda x: x*(1 + erf(x/2**0.5))/2) if c.gelu == "erf" else np_gelu
  e = below(w, "embeddings.")
  x = e["word_embeddings.weight"][tokens] + e["position_embeddings.weight"][:tokens.shape[1]]
  x = np_norm(e, x + e["token_type_embeddings.weight"][0], "LayerNorm", c.norm_eps)
  for i in range(c.n_layer): x = np_layer(below(w, f"encoder.layer.{i}."), x, act, c)
  return x

def small_bigs(block:str, **kw) -> BiGS:
  "With weights large enough for every part to show."
  model = BiGS(BiGSConfig(23, 16, 2, block, n_heads=2, d_state=8, max_length=150, **kw))
  r, kept = np.random.default_rng(5), ("A_re", "A_im", "inv_A_real", "A_imag", "log_step", "log_dt")
  for k, p in get_state_dict(model).items():
    if not k.endswith(kept):
      p.replace(Tensor(np.float32(p.numpy() + 0.3*r.standard_normal(p.shape))))
  return model

def exchange(layer:object, a:str, b:str) -> None:
  parts = vars(layer)
  if a in parts: parts[a], parts[b] = parts[b], parts[a]

@pytest.mark.parametrize("block", and_slow(
  ["gated", "stack", "attention", "s4d"], ["gated-attention", "stack-serial"]))
def test_bigs_blocks(block):
  """Each against float64, with SLOW=1 BiGS by FFT too; each output depends on each input, before
  and after; and with its two directions swapped a model gives, of flipped input, the flipped
  output, unless one direction reads what the other has written."""
  model = small_bigs(block, gelu="erf" if block == "stack" else "tanh")
  for L in (9, 140) if block == "gated" and SLOW else (9,):
    t = tokens_of(23, 9, L)
    want = np_bigs(model, t)
    assert_close(model.encode(toks(t)), want, 2e-5*max(1, np.abs(want).max()))
  layer, filters = model.bigs.encoder.layer[0], model.filters(9)[0]
  # nine times one text: from the t-th only output t counts
  text = np.random.default_rng(1).standard_normal((1, 9, 16)).astype(np.float32)
  counts = np.eye(9, dtype=np.float32)[..., None]*np.arange(1, 17, dtype=np.float32)
  x = Tensor(text.repeat(9, 0)).realize()
  y = layer(x, *filters)
  grad = (y*Tensor(counts)).sum().gradient(x)[0]
  Tensor.realize(y, grad)
  reach = np.abs(grad.numpy()).max(-1)                     # (output, input)
  assert (reach > 1e-6*reach.max(-1, keepdims=True)).all(), reach
  if block == "stack-serial": return
  for a, b in (("fs4", "bs4"), ("du_forward", "du_backward"), ("duc_forward", "duc_backward")):
    exchange(layer, a, b)
  if block == "stack":
    halves = layer.mix.weight.chunk(2, dim=1)
    layer.mix.weight = Tensor.cat(*halves[::-1], dim=1).contiguous()
  flipped = Tensor(text[:, ::-1].repeat(9, 0)).realize()
  got = layer(flipped, *model.filters(9)[0]).numpy()
  want = y.numpy()
  assert_close(got[:, ::-1], want, 1e-5*np.abs(want).max())

def bigs_size(block:str) -> int:
  "Parameters of the large model; every layer is as large as the second."
  large = BiGSConfig.large(block)
  one, two = (BiGS(dataclasses.replace(large, n_layer=n), seed=None) for n in (1, 2))
  one, two = (sum(math.prod(p.shape) for p in get_parameters(model)) for model in (one, two))
  return one + (large.n_layer - 1)*(two - one)

def test_bigs_config_and_size():
  "the released shape has 346,314,134 parameters; the baselines are as large"
  sizes = {block: bigs_size(block) for block in BLOCKS}
  assert sizes["gated"] == 346_314_134
  for block, size in sizes.items():
    assert abs(size/346_314_134 - 1) < 0.05, block
  for kw in (dict(block="gru"), dict(n_heads=5, block="attention"), dict(gelu="relu"),
             dict(d_model=0), dict(pooler="cls")):
    with pytest.raises(ValueError, match=next(iter(kw))): BiGSConfig(**kw)
  np.testing.assert_allclose(bigs_tiny.hippo(64)[-1], 1303, atol=1)  # the largest |A_im| of N = 64

def test_bigs_checkpoints(tmp_path):
  "Every block's numbers come back; what the config of an older file lacks has its default."
  for block in bigs_tiny.LAYERS:
    model = small_bigs(block)
    config = dataclasses.asdict(model.config)
    del config["n_labels"]
    meta = {"model": "bigs", "config": json.dumps(config)}
    again = BiGS.from_pretrained(str(saved(tmp_path/block, get_state_dict(model), meta)))
    assert again.config == model.config
    assert_same(get_state_dict(again), get_state_dict(model))

def test_bigs_more_positions():
  model = small_bigs("gated")
  before = model.bigs.embeddings.position_embeddings.weight.numpy()
  with pytest.raises(ValueError, match="151 tokens"):
    model.encode(toks(np.zeros((1, 151))))
  model.lengthen(400)
  after = model.bigs.embeddings.position_embeddings.weight.numpy()
  assert after.shape[0] == 400 and (after == before[np.arange(400) % 150]).all()

def test_bigs_files_that_are_not_whole(tmp_path):
  "One line that names the file."
  load, path = BiGS.from_pretrained, tmp_path/"f.msgpack"
  refused(tmp_path/"html.bin", "not a file of torch.save's", b"<html>Not found</html>", load)
  refused(archive(tmp_path/"none.bin", dictionary({"w": b"K\x01"})), "no tensors", load=load)
  whole = Path(f"{BIGS}/flax/flax_model.msgpack").read_bytes()
  size = len(whole)
  for n in (0, 1, 100, size//2, size-1):
    refused(path, "not a flax msgpack", whole[:n], load)
  refused(path, "not a flax msgpack", whole + b"\0", load)
  for odd in (b"\x81\xa6params\x03", b"\x81\x01\x02", b"\x03",
              b"\x81\xa1w\xc7\x06\x01\x93\x91\x01\xa2U1\xc4\x00"):
    refused(path, "not a", odd, load)
  weights, path = read_checkpoint(f"{BIGS}/model.safetensors")[0], tmp_path/"model.safetensors"
  name = "bigs.encoder.layer.1.bs4.kernel.C"
  fewer = {k: v for k, v in weights.items() if k != name}
  refused(saved(path, fewer), f"{name} is missing", load=load)
  saved(path, weights)
  (tmp_path/"config.json").write_text('{"hidden_size": 64}')
  with pytest.raises(CheckpointError, match="hidden_size 64"): load(str(path))

class Hub(http.server.BaseHTTPRequestHandler):
  "Answers the hub's client. What goes wrong is in a repository's name: breaks, short, other, none."
  protocol_version = "HTTP/1.1"
  files = {"model.pt": (GOLDEN/"files"/"like_355M.pt").read_bytes()}
  asked: list = []                                         # repository, first byte
  def do_HEAD(self): self.answer(False)
  def do_GET(self): self.answer(True)
  def answer(self, body:bool):
    repo, file = re.sub("^/danfu09/(.*)/resolve/main/", r"\1/", self.path).split("/", 1)
    data = self.files.get(file)
    if repo == "none" or data is None:
      self.send_response(404)
      self.send_header("X-Error-Code", "EntryNotFound" if data is None else "RepoNotFound")
      self.send_header("Content-Length", "0")
      return self.end_headers()
    if repo == "other": data = data[:-1] + b"?"
    if repo == "short": data = data[:1000]
    start = int(self.headers["Range"][6:].split("-")[0]) if "Range" in self.headers else 0
    self.send_response(206 if start else 200)
    if start: self.send_header("Content-Range", f"bytes {start}-{len(data)-1}/{len(data)}")
    self.send_header("X-Repo-Commit", "c0ffee"*6 + "c0ff")
    self.send_header("ETag", f'"{repo}{len(data)}"')
    self.send_header("Content-Length", str(len(data) - start))
    self.end_headers()
    if not body: return
    self.asked.append((repo, start))
    if repo == "breaks" and not start:
      self.wfile.write(data[:200_000])
      self.close_connection = True
    else: self.wfile.write(data[start:])
  def log_message(self, *args): pass

# huggingface_hub reads its settings when it is imported: each case in a fork that has not done so
HUB_CASES = """
import json, os, sys, time, generate
from support import checkpoints
time.sleep = lambda seconds: None                     # between its attempts
size, sha, cases = sys.argv[1:]
sys.stderr = sys.stdout
for endpoint, offline, repos in json.loads(cases):
  if os.fork():
    os.wait()
    continue
  os.environ.update(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE=offline)
  from huggingface_hub import constants
  constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
  for repo in repos:
    release = checkpoints.Release(f"danfu09/{repo}", "model.pt", int(size), sha)
    checkpoints.RELEASED["125M"] = release
    try: print(checkpoints.find("125M"), flush=True)
    except checkpoints.CheckpointError:
      try: generate.main(["--model", "125M", "--prompt", "x"])
      except SystemExit as stop: assert stop.code == 2
  sys.exit()
"""

@pytest.fixture
def hub(monkeypatch):
  "The address of a server on this machine."
  pytest.importorskip("huggingface_hub")
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setattr(Hub, "asked", [])
  yield f"http://127.0.0.1:{server.server_port}"
  server.shutdown()

def test_download_through_the_hub(hub, official, tmp_path):
  """By huggingface_hub in another process. Resumed where it broke off; refused, in one line which
  says what to do, where size or sha256 are not the released ones, or nothing is to be had. What is
  there is taken from the cache, without a network; a folder of the cache serves as a model's. Before
  the hub is asked a line says so: without a network it is silent for long."""
  data = Hub.files["model.pt"]
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    closed = f"http://127.0.0.1:{s.getsockname()[1]}"
  cases = [(hub, "0", ("breaks", "whole", "short", "other", "none")),
           (hub, "1", ("whole", "absent")), (closed, "0", ("whole", "absent",))]
  words = [str(len(data)), hashlib.sha256(data).hexdigest(), json.dumps(cases)]
  said = python(HUB_CASES, *words, HF_HUB_DISABLE_PROGRESS_BARS="1", XDG_CACHE_HOME=str(tmp_path),
                HF_HOME=str(tmp_path/"hub"), HF_HUB_CACHE=str(tmp_path/"hub"/"hub"))
  repos = re.findall(r"^looking for danfu09/(\w+)/model.pt at http://127", said, re.M)
  broken, whole, short, other, none, again, offline, kept, no_server = (
    line for line in said.splitlines() if not line.startswith("looking for "))
  assert repos == ["breaks", "whole", "short", "other", *["none"]*2, *["absent"]*4]
  path = Path(whole)
  assert path.read_bytes() == Path(broken).read_bytes() == data and again == kept == whole
  assert Hub.asked == [
    ("breaks", 0), ("breaks", 196_608), ("whole", 0), ("short", 0), ("other", 0)]
  assert "1,000 bytes where 334,301 are expected" in short and "has sha256" in other
  for line in (short, other, none, offline, no_server):
    assert line.startswith("generate.py: error: "), line
  for line in (short, other):
    assert "and it is downloaded again" in line and "name the file itself" in line
  for line in (none, offline, no_server):
    assert "can't download 125M (" in line and "/model.pt into a folder by hand" in line
  assert "RepositoryNotFound" in none and "/danfu09/none/resolve/main/model.pt" in none
  note = next((tmp_path/"tinygrad"/"verified").iterdir()).read_text()
  assert note.startswith(str(path.resolve()))              # the last that was found right
  root = path.parents[2]
  assert root.name == "models--danfu09--whole"
  for folder in (root, root/"snapshots", path.parent): assert_same(loaded(folder), official)

def test_packages_that_are_missing(monkeypatch, capsys):
  "Without huggingface_hub or msgpack: which package to install, and where a file goes by hand."
  for package in ("huggingface_hub", "msgpack"): monkeypatch.setitem(sys.modules, package, None)
  hub, flax = "pip install huggingface_hub", "pip install msgpack"
  for model, words in (("BiGS_128", (hub, "/BiGS_128/resolve/main/pytorch_model.bin")),
                       ("355M", (hub, "/H3-355M/resolve/main/model.pt into a folder by hand")),
                       (f"{BIGS}/flax", (flax,))):
    err = one_line(capsys, gen, ["--model", model, "--fill", "x [MASK]"])
    assert all(w in err for w in words), err

def test_which_file_of_a_folder(tmp_path, capsys):
  """A run's own checkpoint, whatever else is newer; the authors' names; of others the newest, which
  is said; none is guessed."""
  for name in ("a.pt", "b.pt"): (tmp_path/name).touch()
  with pytest.raises(CheckpointError, match="2 models: name one of a.pt, b.pt"):
    checkpoints.find(str(tmp_path))
  os.remove(tmp_path/"b.pt")
  none = f"no {gen.CHECKPOINT} in {tmp_path}: taking "
  for name, said in (
      ("a.pt", "a.pt\n"), ("z.safetensors", "z.safetensors, the newest of a.pt, z.safetensors"),
      ("c.safetensors", "c.safetensors, the newest of a.pt, c.safetensors, z"),
      ("pytorch_model.bin", "pytorch_model.bin of a.pt, c.safetensors, pytorch_model.bin, z"),
      ("model.safetensors", "model.safetensors of a"), ("checkpoint.safetensors", ""),
      ("checkpoint.7.safetensors", "")):
    (tmp_path/name).touch()
    own = tmp_path/(name if said else "checkpoint.safetensors")
    assert checkpoints.find(str(tmp_path)) == own
    assert capsys.readouterr().err.startswith(none + said if said else "")
  for name in ("model.safetensors", "pytorch_model.bin"):             # as they were released
    (alone := tmp_path/name[:5]).mkdir()
    (alone/name).touch()
    checkpoints.find(str(alone))
  assert capsys.readouterr().err == ""

def test_set_aside(done, tmp_path):
  "A name that says when, what and how far, sorts, and is free; of a damaged one, when."
  names = []
  for minute, data in ((0, at(done).read_bytes()),)*2 + ((1, at(done).read_bytes()), (2, b"")):
    at(tmp_path).write_bytes(data)
    os.utime(at(tmp_path), (1.6e9 + 60*minute,)*2)
    names.append(training.set_aside(at(tmp_path)).name)
    assert (tmp_path/names[-1]).read_bytes() == data
  assert names == sorted(names) and len({*names}) == 4
  words = ".hybrid-8-steps.s", ".hybrid-8-steps_2.s", ".hybrid-8-steps.s", ".safetensors"
  for name, what in zip(names, words):
    assert re.match(rf"checkpoint\.2020-09-1\d-\d{{4}}{re.escape(what)}", name), name

# ================================================================ the trainer and the generator

TINY = "--d-model 16 --n-layer 2 --n-heads 2 --d-state 4 --batch 2 --length 16 --sample 0".split()
TEXT = "".join(f"def f{i}(x): return x * {i} + {i*i}\n" for i in range(200))

@pytest.fixture(scope="module")
def run8(tmp_path_factory):
  "A run of 8 steps, used by several tests: its folder, and its text."
  folder = tmp_path_factory.mktemp("run8")
  (folder / "text.txt").write_text(TEXT)
  args = [*TINY, "--data", str(folder/"text.txt"), "--steps", "8", "--eval-every", "4"]
  assert train.main([*args, "--out", str(folder/"out")]) == 0
  return folder, args

def weights(path) -> dict[str, np.ndarray]:
  return {k: t.numpy() for k, t in read_checkpoint(str(path))[0].items()}
def metadata(path) -> dict[str, str]:
  return read_checkpoint(str(path))[1]
def same(a:dict, b:dict) -> bool:
  return all((a[k] == b[k]).all() for k in a)

# -- what a user gets wrong: one line, status 2, nothing written

# options of train.py, behind those of a tiny run on {tmp}/text.txt into {tmp}/out, and what its
# line must contain
BAD_TRAINING = """
  --data {tmp}/nope | no such file
  --data {tmp}/empty.txt | is empty
  --data {tmp}/x.bin | binary
  --data {tmp}/latin.txt | UTF-8
  --data {tmp}/folder | no text
  --data {tmp}/short.txt | too short
  --data {tmp}/short.txt --length 8 | 10 tokens to train on, 0 held out, and a window takes 9
  --length 400 | 6,493 tokens to train on, 342 held out, and a window takes 401
  --length 400 --seed 1 | give more text or --holdout 0.06 or a --length of at most 341
  --task mlm --length 400 | at most 344
  --data {tmp}/ran | but what runs have left there
  --data {long} | File name too long
  --length 3000 --holdout 0.4 | --holdout 0.44 or a --length of at most 2,733
  --task poetry | invalid choice: 'poetry'
  --task recall | papers/synthetic.py
  --reproduce lm | papers/NAME.py --reproduce
  --bench | support/bench.py train
  --model rnn | invalid choice: 'rnn'
  --colour red | --colour
  --steps 0 | at least 1
  --lr -1 | above 0
  --lr nan | is not a number
  --lr 1e38 | not finite
  --dtype int8 | invalid choice: 'int8'
  --n-heads 3 | n_heads
  --attn-layers 5 | layer 5
  --attn-layers a,b | a,b
  --max-positions 5 | positions for 5 tokens
  --model bigs | give h3 or hybrid
  --model transformer --head-dim 2 | --head-dim is for --model h3
  --mask-run 4 | --mask-run is for --task mlm
  --task mlm --model h3 | or bert or transformer or s4d
  --task mlm --attn-layers 1 | --attn-layers is for models
  --task mlm --max-positions 5 | --max-positions is for mod
  --task mlm --model s4d --d-state 3 | d_state must be
  --task mlm --mask-run 15 | --mask-run 15
  --task mlm --tokenizer bert | --vocab
  --task mlm --truncate 8 | --task text
  --truncate 8 | --model h3
  --model h3 --truncate 5 | does not divide
  --model h3 --truncate 8 --max-positions 99 | have none
  --accumulate 3 | no multiple of 3
  --accumulate 2 --devices 2 | no multiple of 4
  --checkpoint-activations --embed-dropout 0.1 | without dropout
  --checkpoint-activations --task mlm | --task text
  --plot {tmp}/out/x.gif | .png, .svg or .pdf
  --log {tmp}/text.txt/x.csv | can't write to the folder
  --out {tmp}/text.txt/sub | can't write
  --resume | no checkpoint
  --resume --init {run8}/out | give one of them
  --resume --out {tmp}/torn | truncated
  --resume --out {tmp}/meta | metadata are damaged
  --resume --out {tmp}/losses | metadata are damaged
  --resume --out {run8}/out | has done its 8 steps
  --resume --out {run8}/out --n-layer 3 | --n-layer 3 differs from the checkpoint's 2
  --resume --out {tmp}/recall | papers/synthetic.py
  --init {tmp}/nope | no model at
  --init {tmp}/torn/checkpoint.safetensors | truncated
  --init {tmp}/other.safetensors | not a checkpoint of train.py
  --init {tmp}/text.txt | not a safetensors
  --init {run8}/out --d-model 32 | differs
  --init {run8}/out --model h3 | differs
"""

# options of generate.py, behind --model {run8}/out, and what the line must contain
BAD_GENERATION = r"""
  --fill 'x [MASK]' | was trained on --task text, not for --fill: use it by
  --classify x | not for --classify: use it by
  --prompt def --model {tmp}/masked | not to continue text: use it by
  --prompt def --model {tmp}/masked | --fill 'what is [MASK] here?'
  --prompt def --model {tmp}/classes | --classify 'a text\tanother'
  --fill x --model {tmp}/classes | --classify 'a text\tanother'
  --classify x --model {tmp}/classes | line 1: 'x' is not 2 texts, with tabs between
  --classify 'x\ty' 'z\t ' --model {tmp}/classes | line 2: 'z
  --classify --model {tmp}/classes | wants lines to answer: one is 2 texts
  --classify --prompt-file {tmp}/empty.txt --model {tmp}/classes | wants lines to answer
  --classify x --model {golden_bigs}/model.safetensors | no head that was trained to classify
  --choose 'x\ty\tz' --model {golden_bigs}/seqcls | no head that was trained to choose
  --prompt x --model {golden_bigs}/seqcls | continues no text: see --fill, --classify
  --prompt def --model {tmp}/h3 --max-length 9 | no cache and no limit
  --prompt def --model {tmp}/meta | metadata are damaged
  --prompt def --model {tmp}/nope | run train.py first
  --prompt def --model {tmp}/folder | run train.py first
  --prompt def --model {tmp}/torn | truncated
  --prompt def --model {tmp}/other.safetensors | not a checkpoint of an H3 model
  --prompt def --model {tmp}/there.pt | there.pt: not a file of torch.save's
  --prompt def --model {tmp}/recall | papers/synthetic.py --show /
  --fill x --model {tmp}/listops | papers/arena.py --show /
  --prompt def --model {golden} --tokenizer bytes | vocabulary of 101, not the 257 of bytes: give another
  --prompt-file {tmp}/nope | can't read
  --prompt def --prompt-file {tmp}/text.txt | not both
  --prompt def --tokens 3000 | --max-length 3003
  --prompt def --top-p 2 | at most 1
  --prompt def --temperature -1 | at least 0
  --bench 125M | support/bench.py generate
  --perplexity {tmp}/empty.txt | is empty
  --perplexity {tmp}/x.bin | not UTF-8
  --perplexity {tmp}/text.txt --window 8 --stride 9 | left out
  --perplexity {tmp}/text.txt --window all | of at least 1, nor the word whole
  --perplexity {tmp}/text.txt --window whole --stride 9 | --stride is for windows
  --score {tmp}/text.txt --window whole | give --score a number
  --score a --perplexity b | give one of
  --score {tmp}/text.txt | line 1 is not JSON
  --score {tmp}/q1.jsonl | q1.jsonl line 2: a line is
  --score {tmp}/q2.jsonl --shots 1 | leaves none
  --score {tmp}/q2.jsonl --window 2 | choice 0 of question 1
  --dtype int4 | invalid choice: 'int4'
  --export {tmp}/out/m.onnx | written as .safetensors
  --export {tmp}/out/m.pt | PyTorch makes a .pt of it: import torch
  --export {tmp}/there.safetensors | is there already
"""

def files_to_go_wrong_with(tmp:Path, checkpoint:Path) -> None:
  whole, (tensors, meta) = checkpoint.read_bytes(), read_checkpoint(str(checkpoint))
  question = b'{"context": "a", "choices": ["bcd"], "answer": 0}\n'
  for folder in "folder torn meta losses recall listops ran masked classes h3".split():
    (tmp/folder).mkdir()
  for name, data in {
      "empty.txt": b"", "x.bin": b"\x7fELF\0\0\xff", "latin.txt": "déjà vu".encode("latin1")*99,
      "short.txt": b"too short", "text.txt": TEXT.encode(),
      "ran/log.csv": b"step", f"ran/{gen.CHECKPOINT}": whole,
      f"torn/{gen.CHECKPOINT}": whole[:len(whole)//2], "q2.jsonl": question,
      "q1.jsonl": question + b'{"context": "a", "choices": ["b"], "answer": 1}\n',
      "there.pt": b"<html>404</html>", "there.safetensors": b"<html>404</html>"}.items():
    (tmp/name).write_bytes(data)
  saved(tmp/"other.safetensors", {"w": Tensor([1.0])}, {"model": "bert"})
  for folder, changed in {
      "meta": {"args": "[1]"}, "losses": {"losses": "[1, 2]"},
      "recall": {"args": '{"task": "recall"}'}, "masked": {"args": '{"task": "mlm"}'},
      "classes": {"args": '{"task": "classify", "n_texts": 2}', "model": "bigs",
                  "labels": '["a", "b"]'},
      "listops": {"args": '{"task": "listops"}'}}.items():
    saved(tmp/folder/gen.CHECKPOINT, tensors, meta | changed)
  h3 = H3LM(config := H3Config(257, 8, 1, ()))
  ours = {"model": "h3", "config": json.dumps(dataclasses.asdict(config)), "tokenizer": "bytes"}
  saved(tmp/"h3"/gen.CHECKPOINT, get_state_dict(h3), ours)

def test_bad_input(tmp_path, run8, monkeypatch, capsys):
  # the tasks of train.py alone
  monkeypatch.setattr(train, "TASKS", {k: train.TASKS[k] for k in ("text", "mlm")})
  checkpoint, out = run8[0]/"out"/gen.CHECKPOINT, tmp_path/"out"
  before = weights(checkpoint)
  files_to_go_wrong_with(tmp_path, checkpoint)
  places = dict(tmp=tmp_path, run8=run8[0], long="x"*300,
                golden=f"{GOLDEN}/tiny_h3/model.safetensors", golden_bigs=BIGS)
  training = [*TINY, "--data", str(tmp_path/"text.txt"), "--out", str(out)]
  generation = ["--model", str(run8[0]/"out")]
  for module, first, table in ((train, training, BAD_TRAINING), (gen, generation, BAD_GENERATION)):
    for options, words in (line.split(" | ") for line in table.strip().splitlines()):
      args = [*first, *shlex.split(options.format(**places))]
      err = one_line(capsys, module, args, silent=module is gen)
      assert err.startswith(f"{module.__name__}.py: error: ") and words in err, (options, err)
      assert not [*out.glob("*")], options
  assert same(before, weights(checkpoint))

# -- helpers: a run's checkpoint, what a program prints

BYTES = texts.ByteTokenizer()
def at(folder:Path) -> Path: return folder/gen.CHECKPOINT

@pytest.fixture
def done(run8) -> Path: return run8[0]/"out"

@pytest.fixture
def again(run8) -> str:
  "The options of that run, but --out"
  return " ".join(run8[1])

@pytest.fixture
def printed(capsys):
  "A function that runs a command line, which ends well, and gives what it printed; err: to stderr"
  def run(module:ModuleType, command:str, err:str="") -> str:
    capsys.readouterr()
    assert module.main(shlex.split(command)) == 0
    said = capsys.readouterr()
    assert err in said.err, said.err
    return said.out
  return run

@pytest.fixture
def rejected(capsys):
  "A function that runs a command line, which ends in one line with all these words and status 2"
  def run(module:ModuleType, command:str, *words:str) -> str:
    err = one_line(capsys, module, shlex.split(command))
    assert all(w in err for w in words), (command, err)
    return err
  return run

# -- texts as people have them

SAMPLE = "Ein Hase saß im Klee.\r\nнет 日本 🙂\n" * 40
def jsonl(some:list, key:str="text") -> bytes:
  return "".join(json.dumps({"id": 1, key: t}) + "\n" for t in some).encode()
def read(*paths:Path, tok=BYTES, key:str="text") -> tuple[np.ndarray, np.ndarray]:
  return texts.read_tokens([*map(str, paths)], tok, key)

PLAIN, LITTLE = SAMPLE.encode(), b"\xff\xfe" + SAMPLE.encode("utf-16-le")
FORMS = {
  "plain.txt": PLAIN, "marked.txt": b"\xef\xbb\xbf" + PLAIN, "little.txt": LITTLE,
  "big.txt": b"\xfe\xff" + SAMPLE.encode("utf-16-be"), "book.gz": gzip.compress(PLAIN),
  "book.txt.bz2": bz2.compress(PLAIN), "book.txt.xz": lzma.compress(PLAIN),
  "one.jsonl": jsonl([SAMPLE]), "little.gz": gzip.compress(LITTLE)}

@pytest.mark.parametrize("piece", [1 << 22, 7])
def test_texts(piece, tmp_path, monkeypatch):
  "The same text of every form, in one piece or cut anywhere: as tokens, and as a prompt is read."
  monkeypatch.setattr(texts, "PIECE", piece)
  for name, data in FORMS.items():
    (file := tmp_path/name).write_bytes(data)
    tokens, ends = read(file)
    assert tokens.tolist() == [*PLAIN, 256] and ends.tolist() == [len(tokens)], name
    assert texts.read_texts(str(file)) == [SAMPLE], name

def test_zstandard_in_frames(tmp_path):
  "Frames one after the other and what is to be skipped between them; a cut file is rejected."
  zstandard = pytest.importorskip("zstandard")
  if texts.zstd() is not zstandard: pytest.skip("Python's own reader")
  some, skipped = zstandard.compress(PLAIN), struct.pack("<II", 0x184D2A50, 3) + b"abc"
  file = tmp_path/"book.txt.zst"
  file.write_bytes(some + skipped + some)
  assert "".join(texts.pieces(file)) == 2*SAMPLE
  for n in (1, 10, len(some)-1):
    file.write_bytes(some + some[:n])
    with pytest.raises(texts.NotText, match="is damaged"): list(texts.pieces(file))

def test_lines_of_jsonl_are_documents(done, tmp_path, monkeypatch):
  "<|endoftext|> behind each; each is a prompt of its own."
  some = ["first", "", "zweiter \u2028 Text", "half a pair: \ud83d", "last one"]
  file, want = tmp_path/"some.jsonl.gz", [t.encode("utf-8", "replace") for t in some]
  file.write_bytes(gzip.compress(jsonl(some, "content").replace(b"\n", b"\n\n")))
  tokens, ends = read(file, key="content")
  assert tokens.tolist() == [x for t in want for x in (*t, 256)]
  assert np.diff(ends, prepend=0).tolist() == [len(t) + 1 for t in want]
  prompts = []
  def print_text(model, tokenizer, some, *options, **more):
    prompts.extend(some)
    return 1, 1, 1
  monkeypatch.setattr(gen, "print_text", print_text)
  gen.main(f"--model {done} --prompt-file {file} --text-key content".split())
  assert prompts == [t.decode() for t in want]

DAMAGED = "is damaged, or not what its name says"
# a file, its bytes, what is said of it
UNREADABLE = [
  ("old book.txt", "Der Hase\nsaß".encode("latin1"), 
   "is not UTF-8: byte 11, in line 2, is 0xdf; if it is Latin-1, convert it: iconv -f latin1 "
   "-t utf-8 '{}/old book.txt' > '{}/old book.utf8.txt'"),
  ("long.txt", "ä\n".encode()*3_000_000 + b"\xff",
   "is not UTF-8: byte 9,000,000, in line 3,000,001, is 0xff"),
  ("half.txt", "aß".encode()[:-1], "is not UTF-8: byte 1, in line 1, is 0xc3"),
  ("old.gz", gzip.compress(b"a\n\xe9"),
   "byte 2, in line 2, is 0xe9 (unpacked); if it is Latin-1, unpack it"),
  ("16.txt", "Hase".encode("utf-16-le"), "is a binary file, not UTF-8 text: byte 1, in line 1"),
  ("cut.txt", b"\xff\xfea\0\n\0b", "begins as UTF-16-LE and does not go on so: byte 6, in line 2"),
  ("x.png", b"\x89PNG\0", "a binary file, not UTF-8 text: byte 0, in line 1, is 0x89"),
  ("torn.gz", gzip.compress(PLAIN)[:60], DAMAGED), ("no.gz", b"text", DAMAGED),
  ("no.bz2", b"text, no bz2", DAMAGED), ("no.xz", b"text", DAMAGED),
  ("book.txt.zst", b"\x28\xb5\x2f\xfd", "pip install zstandard"),
  ("a.jsonl", b'{"text": "a"}\n\nb\n', "a.jsonl line 3 is not JSON"),
  ("b.jsonl", b'["a"]\n', "b.jsonl line 1 is no object"),
  ("c.jsonl", b'{"text": "a"}\n{"id": 1, "content": "b"}\n', "c.jsonl line 2 has no text under the "
   "key 'text' (its keys: id, content): name another with --text-key"),
  ("mark.txt", b"\xef\xbb\xbf", "has no text in it")]

def test_unreadable_texts(tmp_path, done, monkeypatch, capsys):
  """One line, with the place, from each program that reads text; in a folder they are left out, and
  a line says so."""
  monkeypatch.setattr(texts, "zstd", lambda: None)
  (notes := tmp_path/"notes").mkdir()
  for file, data, words in UNREADABLE:
    for folder in (tmp_path, notes): (folder/file).write_bytes(data)
    words = words.replace("{}", str(tmp_path))
    with pytest.raises(texts.UserError, match=re.escape(words)): read(tmp_path/file)
  for module, args in ((train, [*TINY, "--out", str(tmp_path/"out"), "--data"]),
                       (gen, ["--model", str(done), "--perplexity"]),
                       (gen, ["--model", str(done), "--prompt-file"])):
    assert "byte 11, in line 2" in one_line(capsys, module, [*args, str(tmp_path/"old book.txt")])
  assert not (tmp_path/"out").exists()
  (notes/"a.txt").write_text(TEXT)
  assert read(notes)[0].tolist() == [*TEXT.encode(), 256]
  warning = f"left out {len(UNREADABLE)} of the files in {notes}; the first: "
  assert warning in capsys.readouterr().err

def test_what_runs_leave_is_no_text(tmp_path, unplotted, capsys):
  "A run into its folder of texts, or below that, its log anywhere: the next one reads the same."
  notes = tmp_path/"notes"
  (notes/"more").mkdir(parents=True)
  for name in ("a.txt", "more/log.csv"): (notes/name).write_text(TEXT)     # a log of other things
  options = [*TINY, "--steps", "1", "--data"]
  for out, log, left in ((notes, "", "checkpoint.safetensors, "),
                         (notes/"runs", f"--log {notes}/table.csv", "table.csv")):
    for again in range(2):
      assert train.main([*options, str(notes), "--out", str(out), *log.split()]) == 0
      assert metadata(at(out))["data"].startswith(f"{notes}: 2 files, ")
      err = capsys.readouterr().err
    assert "left out what runs have left: " in err and left in err
  os.remove(notes/"table.csv")
  named = [*map(str, notes.glob("*.*"))]                  # as a shell expands notes/*
  assert train.main([*options, *named, "--out", str(tmp_path/"out")]) == 0
  assert ": 1 file, " in metadata(at(tmp_path/"out"))["data"]

# the first lines of SST-2, MRPC, RTE, QNLI, QQP, MNLI, STS-B, CoLA as GLUE has them, and of others;
# --columns; label and texts of each row. → is a tab, ↵ the end of a line, ← a carriage return
GLUE = """
  sentence→label↵hide new→0↵ | - | 0→hide new
  Quality→#1 ID→#2 ID→#1 String→#2 String←↵1→7028→7029→He said .→No .←↵ | - | 1→He said .→No .
  index→sentence1→sentence2→label↵0→None.→Some.→not_entailment↵ | - | not_entailment→None.→Some.
  index→question→sentence→label↵0→When?→In 1803.→entailment↵ | - | entailment→When?→In 1803.
  id→qid1→qid2→question1→question2→is_duplicate↵1→2→3→How?→Why?→0↵ | - | 0→How?→Why?
  sentence1_parse→sentence1→sentence2→label1→gold_label↵(a)→a b→c d→neutral→yes↵ | - | yes→a b→c d
  index→genre→sentence1→sentence2→score↵0→news→A plane.→A jet.→4.6↵ | - | 4.6→A plane.→A jet.
  gj04→1→→Our friends won't.↵gj04→0→*→They drank.↵ | 2,4 | 1→Our friends won't.↵0→They drank.
  mood→note↵glad→hello↵ | mood, note | glad→hello
  label→id→sentence↵1→7→hello↵ | 1,3 | 1→hello
  "sentence"→"label"↵"hello"→1↵ | - | 1→"hello"
  a→one↵b→two↵ | - | a→one↵b→two
  a→one→two↵ | - | a→one→two
  a→text↵a→one↵ | - | a→text↵a→one
"""
def typed(text:str) -> str: return text.translate(dict(zip(map(ord, "→↵←"), "\t\n\r")))

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_glue(encoding, tmp_path):
  "Label and texts by the header's names, by --columns, or as they come; in UTF-8 and UTF-16."
  for line in GLUE.strip().splitlines():
    text, columns, want = map(typed, line.strip().split(" | "))
    (tmp_path/"train.tsv").write_bytes(text.encode(encoding))
    columns = None if columns == "-" else columns
    labels, some, lines = texts.read_tsv(str(tmp_path/"train.tsv"), columns)
    assert [[label, *row] for label, row in zip(labels, some)] == [
      row.split("\t") for row in want.split("\n")], text
    assert lines[0] == 1 + (text[:2] not in ("gj", "a\t")), text        # after the header

def test_gpt2_without_network(tmp_path, monkeypatch, rejected):
  tiktoken = pytest.importorskip("tiktoken")
  def no_network(name): raise OSError
  monkeypatch.setattr(tiktoken, "get_encoding", no_network)
  rejected(train, f"{' '.join(TINY)} --tokenizer gpt2 --out {tmp_path/'out'}", "TIKTOKEN_CACHE_DIR")

def test_programming_errors_keep_their_traceback(monkeypatch):
  monkeypatch.setattr(train, "train", lambda *a: 1/0)
  with pytest.raises(ZeroDivisionError): train.main([])

# -- runs

@pytest.fixture
def instant(monkeypatch):
  """Runs that compile nothing: a step moves all weights by what its batch holds, and is not finite
  at the steps `bad`; `seen` are the weights that each step began with; `figures` what evaluation
  gives."""
  # the mean loss, then what masked text counts
  said = SimpleNamespace(bad=(), seen=[], figures=[np.float32(1.5), np.int32(1), np.int32(2)])
  def training_step(model, opt, task, args, scale):
    def step(batch, hyper):
      said.seen.append({k: p.numpy() for k, p in opt.params.items()})
      failed = len(said.seen) in said.bad
      change = np.float32(np.nan if failed else 1e-6*batch[0].sum())
      for p in opt.params.values(): flashconv.fill(p, p.numpy() + change)
      return [np.nan if failed else 5.0, 1.0]
    return step
  monkeypatch.setattr(train, "training_step", training_step)
  monkeypatch.setattr(train, "evaluation", lambda *a: lambda batch: said.figures)
  return said

MATPLOTLIB = importlib.util.find_spec("matplotlib")

@pytest.fixture
def unplotted(instant, monkeypatch): monkeypatch.setattr(train.Log, "plot", lambda *_: None)

def test_run_leaves_what_it_promises(done, again, tmp_path, instant, printed):
  """Checkpoint, log, plot; a new run keeps the old checkpoint, and writes beside it once it has
  something to write."""
  meta, out = metadata(at(done)), tmp_path/"out"
  names = ("losses", "held_out", "args", "config")
  rows, held_out, args, config = (json.loads(meta[k]) for k in names)
  assert meta["step"] == "8" and args["batch"] == 2 and config["d_model"] == 16
  name = "backbone.layers.0.mixer.kernel.kernel.log_dt"
  assert {name, f"optim.m.{name}", f"optim.v.{name}"} <= weights(at(done)).keys()
  losses, norms = [row[1] for row in rows], [row[-1] for row in rows]
  assert len(rows) == 8 and losses[-1] < losses[0]
  assert 0 < min(norms) and max(norms) < 99
  assert [step for step, *_ in held_out] == [4, 8]
  table = list(csv.DictReader(open(done/"log.csv")))
  assert [bool(row["held_out_bits_per_byte"]) for row in table] == 2*[0, 0, 0, 1]
  assert [*table[0]][:5] == ["step", "loss_nats", "bits_per_byte", "learning_rate", "gradient_norm"]
  if MATPLOTLIB: assert (done/"loss.png").read_bytes().startswith(b"\x89PNG")
  out.mkdir()
  shutil.copy(at(done), out)
  log, picture = tmp_path/"a"/"table.csv", tmp_path/"picture.svg"
  said = printed(train, f"{again} --steps 2 --seed 1 --out {out} --log {log} --plot {picture} "
                        "--sample-every 1 --sample 5")
  assert said.count("--- a sample ---") == 2
  assert re.search(r"^step 2/2 .* \d\.\d\d GB$", said, re.M)
  assert len(log.read_text().splitlines()) == 3
  if MATPLOTLIB: assert "<svg" in picture.read_text()
  (kept,), whole = out.glob("checkpoint.*.hybrid-8-steps.safetensors"), at(done).read_bytes()
  assert kept.read_bytes() == whole != at(out).read_bytes()
  assert checkpoints.find(str(out)) == at(out)

def same_runs(a:Path, b:Path) -> None:
  "Weights, moments and log of two runs are the same to the bit."
  one, two = weights(at(a)), weights(at(b))
  assert one.keys() == two.keys() and same(one, two)
  for k in ("losses", "held_out"): assert metadata(at(a))[k] == metadata(at(b))[k]

def test_resume_is_exact(run8, tmp_path, monkeypatch, capsys):
  """Interrupted at a step, or during an evaluation, and resumed: the same bits as the run that
  was not. With dropout, too."""
  dropout = ["--embed-dropout", "0.2", "--n-layer", "1"]
  for extra, owner, method, call, signum, stop in (
      ([], train.Log, "step", 4, signal.SIGINT, 4),
      (dropout, train.Run, "evaluate", 1, signal.SIGTERM, 4)):
    whole, parts = tmp_path/"whole" if extra else run8[0]/"out", tmp_path/f"its {method}"
    if extra: assert train.main([*run8[1], *extra, "--out", str(whole)]) == 0
    calls, real = itertools.count(1), getattr(owner, method)
    def interrupted(*args, **kw):
      if next(calls) == call: os.kill(os.getpid(), signum)
      return real(*args, **kw)
    with monkeypatch.context() as m:
      m.setattr(owner, method, interrupted)
      assert train.main([*run8[1], *extra, "--out", str(parts)]) == 128 + signum
    said = capsys.readouterr().out
    assert f"stopped after step {stop} of 8, saved" in said
    assert f"go on with: {texts.command('train.py', '--resume', '--out', str(parts))}" in said
    assert metadata(parts/gen.CHECKPOINT)["step"] == str(stop)
    assert train.main(["--resume", "--out", str(parts)]) == 0
    same_runs(whole, parts)

def start(args:str, out:Path) -> subprocess.Popen:
  command = [sys.executable, HERE/"train.py", *args.split(), "--out", str(out)]
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  return subprocess.Popen(command, env=os.environ | {"DEV": Device.DEFAULT}, **pipes)

def test_from_outside(again, tmp_path, rejected):
  """A second run is told to go elsewhere; Ctrl-C, as a terminal sends it, saves, and frees the
  folder."""
  p = start(f"{again} --steps 100000 --log-every 5 --eval-every 100000", tmp_path)
  for line in p.stdout:
    if line.startswith("step"): break
  rejected(train, f"{again} --steps 1 --out {tmp_path}", f"another run trains into {tmp_path}")
  p.send_signal(signal.SIGINT)
  stdout, stderr = p.communicate(timeout=60)
  assert p.returncode == 130 and "Traceback" not in stderr, stderr
  assert f"go on with: {texts.command('train.py', '--resume', '--out', str(tmp_path))}" in stdout
  assert int(metadata(at(tmp_path))["step"]) >= 1
  assert {f.name for f in tmp_path.iterdir()} - {"loss.png"} == {gen.CHECKPOINT, "log.csv"}
  with training.lock_run_directory(tmp_path): pass

# -- before there is anything to show

def busy(program:str, args:list[str], tmp_path:Path) -> tuple[subprocess.Popen, str]:
  """Starts a program on an empty cache, in a session of its own, and waits until it compiles its
  kernels; returns it and what it said of that."""
  env = os.environ | {"DEV": Device.DEFAULT, "CACHEDB": str(tmp_path/"cache.db"), "FLASH": "0"}
  if IN_PARALLEL: env.pop("PARALLEL", None)
  p = subprocess.Popen([sys.executable, HERE/program, *args], env=env, start_new_session=True,
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  for line in p.stderr:
    if line.startswith("compiling"): return p, line
  raise AssertionError(p.communicate())

@pytest.mark.parametrize("program,args,signum,what,last", and_slow(
  [("train.py", "--resume --steps 16 --out {resumed}", signal.SIGTERM, "the first step",
    "(no step was done yet), the checkpoint is that of step 8\ngo on with: {go_on} --out {resumed}\n"),
   ("generate.py", "--model {resumed}", signal.SIGINT, "the first tokens", "\n")],
  [("train.py", "{again} --out {new}", signal.SIGINT, "the first step", "(no step was done yet), nothing saved\n")]))
def test_ctrl_c_while_compiling(program, args, signum, what, last, again, done, tmp_path):
  """Before the first step is done there is nothing to save, and before the first token nothing to
  say: it ends at once, without a step, a token, a traceback or a checkpoint that has changed."""
  shutil.copytree(done, resumed := tmp_path/"resumed")
  new, go_on = tmp_path/"new", texts.command("train.py", "--resume")
  before = at(resumed).read_bytes()
  p, line = busy(program, args.format(**locals()).split(), tmp_path)
  os.killpg(p.pid, signum)                              # as a terminal does
  stdout, stderr = p.communicate(timeout=60)
  assert p.returncode == 128 + signum and stderr.endswith(last.format(**locals())), stderr
  assert "Traceback" not in stderr and "KeyboardInterrupt" not in stderr
  assert re.fullmatch(rf"compiling \d+ kernels for {what}; later starts are quicker\n", line)
  assert "first step after" not in stdout and (program == "train.py" or not stdout)
  assert at(resumed).read_bytes() == before and not at(new).exists()

NATIVE = """
import sys, time
from hashlib import pbkdf2_hmac
from support.text import Interrupt
with Interrupt(lambda: "last words") as interrupt:
  interrupt.waits = sys.argv[1] == "waits"
  print("begun", flush=True)
  pbkdf2_hmac("sha256", b"", b"", 10**9)
sys.exit(interrupt.status)
"""

def test_ctrl_c_in_native_code():
  "It is heard in another thread: the process ends, or, where it waits, says so; a second ends it."
  for how in ("at once", "waits"):
    p = subprocess.Popen([sys.executable, "-c", NATIVE, how], cwd=HERE, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert p.stdout.readline() == "begun\n"
    time.sleep(0.5)                                       # into the native code
    p.send_signal(signal.SIGINT)
    if how == "waits":
      said = p.stderr.readline() + p.stderr.readline()
      assert said == "\nfinishing the step, then saving; again to stop at once\n" and p.poll() is None
      p.send_signal(signal.SIGTERM)
    assert p.communicate(timeout=60)[1] == "last words\n" and p.returncode in (130, 143)

@pytest.mark.parametrize("value,saved", ((1, True), (math.nan, False)))
def test_stop_compiles_no_evaluation(value, saved, again, tmp_path, monkeypatch):
  "Ctrl-C before the first evaluation: the weights are looked at, no loss; what blew up stays out."
  def interrupted(self, step):
    trained(self, step)
    if step == 1:
      flashconv.fill(self.params["backbone.ln_f.bias"], np.full(16, value, np.float32))
      os.kill(os.getpid(), signal.SIGINT)
  trained = train.Run.train
  monkeypatch.setattr(train.Run, "train", interrupted)
  monkeypatch.setattr(train, "make_eval", lambda *_: None)
  assert train.main([*again.split(), "--eval-every", "9", "--out", str(tmp_path)]) == 130
  assert at(tmp_path).exists() == saved

class Terminal(io.StringIO):
  def isatty(self) -> bool: return True

def test_waiting_tells_how_far(monkeypatch):
  """On a terminal a line that is written over and wiped at the end; else one that stays, if there
  are many kernels, the first time. Nothing if it is not new, or if nothing is compiled."""
  fresh = np.random.default_rng()
  def said(stream:io.StringIO, kernels:int, new:bool=True) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    # never seen before: each holds a number of its own
    with texts.waiting("the test", new), Context(DEBUG=0):
      xs = [Tensor(np.ones(3, np.float32)).realize() * fresh.random() for _ in range(kernels)]
      if xs: Tensor.realize(*xs)
    return stream.getvalue()
  monkeypatch.setattr(texts.Kernels, "told", False)
  monkeypatch.setattr(texts, "MANY", 2)
  lines = said(Terminal(), 2).split("\r\x1b[K")
  assert lines[:3] == ["", "preparing the test", "compiling kernel 1 of 2 for the test"]
  assert lines[-2:] == ["loading kernel 2 for the test", ""]
  assert said(Terminal(), 0) == "\r\x1b[Kpreparing the test\r\x1b[K"
  assert said(Terminal(), 2, new=False) == said(io.StringIO(), 1) == ""
  assert said(io.StringIO(), 2) == "compiling 2 kernels for the test; later starts are quicker\n"
  assert said(io.StringIO(), 2) == ""

KILLS = int(os.environ.get("KILLS", 3))

@slow
def test_killed_at_any_moment(again, tmp_path):
  """SIGKILL, at random moments, while it saves as well (it saves at every step): resumed, the
  weights, the optimizer's moments and the log are those of the run that was left alone. KILLS=20
  for more."""
  whole, out, seen = tmp_path/"whole", tmp_path/"parts", set()
  run = f"{again} --eval-every 500 --steps {60 + 20*KILLS} --save-every"
  assert train.main(f"{run} 500 --out {whole}".split()) == 0
  step = lambda: int(metadata(at(out))["step"]) if at(out).exists() else 0
  for i in range(KILLS):
    before = step()
    p = start("--resume" if i else f"{run} 1", out)
    while p.poll() is None and step() == before: time.sleep(0.01)
    time.sleep(np.random.default_rng().uniform(0, 0.2))
    p.kill()
    assert p.wait() == -signal.SIGKILL, p.stderr.read()
    seen.add(step())
  assert len(seen) > KILLS/2
  assert train.main(f"--resume --save-every 500 --out {out}".split()) == 0
  assert not [*out.glob("*.tmp")]
  same_runs(whole, out)

def test_damage_is_seen(done, tmp_path, capsys):
  """A flipped bit anywhere, a cut anywhere: never loaded. A run goes on from the checkpoint before,
  and says so."""
  whole, path, r = at(done).read_bytes(), at(tmp_path), np.random.default_rng(0)
  n, size = 8 + int.from_bytes(whole[:8], "little"), len(whole)
  def never_loaded(data:bytes, where:int) -> None:
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as e:
      for tensor in read_checkpoint(str(path))[0].values(): tensor.check()
    assert str(path) in str(e.value) and "\n" not in str(e.value), where
  anywhere = r.integers(0, size, 100)
  for where in (*anywhere, *r.integers(0, n, 150), *range(60)):
    data = bytearray(whole)
    data[where] ^= 1 << int(r.integers(8))
    never_loaded(data, where)
  for cut in (*anywhere, 0, 7, 8, n-1, n, size-1): never_loaded(whole[:cut], cut)
  before = tmp_path/training.PREVIOUS
  def resumed() -> str:
    assert training.read_newest(tmp_path).path == before
    return capsys.readouterr().err
  before.write_bytes(whole)
  said = resumed()
  assert "truncated" in said and "going on from the one before" in said
  assert (tmp_path/f"{gen.CHECKPOINT}.damaged").read_bytes() == whole[:-1]
  assert not path.exists()
  assert resumed() == ""                                  # as after a kill between two renames
  before.write_bytes(whole[:-9])
  path.write_bytes(whole[:99])
  with pytest.raises(CheckpointError, match=f"{gen.CHECKPOINT}: truncated"): resumed()

def test_full_disk(again, tmp_path, instant, monkeypatch, capsys):
  """A line that says so; the training goes on; the checkpoint before stays whole, and nothing
  half-written."""
  fsync, failing = os.fsync, [True, False, True, True]
  def full(fd:int) -> None:
    if os.path.isfile(f"/proc/self/fd/{fd}") and failing.pop(0):
      raise OSError(28, "No space left on device")
    fsync(fd)
  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(SystemExit): train.main(f"{again} --save-every 2 --out {tmp_path}".split())
  said, err = capsys.readouterr()
  stays = "the checkpoint of step 4 stays"
  for line in (f"6: can't write .*; {stays}",
               "2: can't write .*: No space left .*; there is no checkpoint yet"):
    assert re.search(f"step {line}, and the training goes on", said)
  assert err.count("\n") == 1 and f"No space left on device; {stays}" in err and not failing
  assert [f.name for f in tmp_path.glob("*safetensors*")] == [gen.CHECKPOINT]
  assert metadata(at(tmp_path))["step"] == "4" and weights(at(tmp_path))

def test_loss_that_is_not_finite(again, tmp_path, instant, monkeypatch, capsys):
  """Back to the last checkpoint, or to the beginning, without the batch; three times in a row: one
  line, status 2."""
  instant.bad, seen = (2, 6, 8), instant.seen
  options, why = f"{again} --out {tmp_path}/", "the loss or the gradient is not finite"
  with pytest.raises(SystemExit) as stop: train.main(f"{options}one --save-every 4".split())
  said, err = capsys.readouterr()
  for step, back in ((2, 0), (6, 4)):
    assert f"step {step}: {why}: back to the weights of step {back}" in said
  assert stop.value.code == 2 and err.count("\n") == 1
  assert "step 8, for the third time in a row" in err
  # step 3 starts where step 1 did, step 7 from what step 4 saved
  assert same(seen[2], seen[0])
  assert not same(seen[3], seen[0])
  saved = at(tmp_path/"one")
  assert same(seen[6], seen[4])
  assert same(seen[4], weights(saved))
  assert [row[0] for row in json.loads(metadata(saved)["losses"])] == [1, 3, 4]
  seen.clear()
  monkeypatch.setattr(train, "RECOVERED", 1)              # none is in a row with another
  assert train.main(f"{options}two".split()) == 0

# what version 0.1.0 saves as its options: some are other programs' now
OLD_ARGS = """{"task": "text", "data": ["DATA"], "text_key": "text", "columns": null, "dev": null,
"vocab": null, "tokenizer": "bytes", "holdout": 0.05, "mask_run": null, "symbols": null, "model":
"hybrid", "size": "small", "d_model": 16, "n_layer": 2, "n_heads": 2, "attn_layers": null,
"rotary_dim": null, "max_positions": 0, "init_std": null, "d_state": 4, "head_dim": 1, "mlp_mult":
null, "embed_dropout": 0.0, "resid_dropout": 0.0, "steps": 8, "batch": 2, "length": 16,
"truncate": null, "lr": 0.003, "warmup": 0, "weight_decay": 0.1, "accumulate": 1,
"checkpoint_activations": false, "dtype": "float32", "devices": 1, "clip": 1.0, "seed": 0, "out":
"elsewhere", "resume": false, "init": null, "eval_every": 4, "save_every": 4, "log_every": 1,
"sample": 0, "sample_every": null, "log": null, "plot": null}"""

def test_checkpoints_of_other_versions(run8, tmp_path, instant):
  """go on, with the options that they have: one that is newer has its default, a column of the log
  that they lack is empty, one too many is left out."""
  tensors, meta = read_checkpoint(str(run8[0]/"out"/gen.CHECKPOINT))
  args = json.loads(OLD_ARGS.replace("DATA", str(run8[0]/"text.txt")))
  rows = json.loads(meta["losses"])
  older = {k: v for k, v in args.items() if k not in ("truncate", "dtype")} | {"accumulate": 2}
  for i, (saved, columns) in enumerate(((args, 3), (older, 2), (args | {"new": 1}, 5))):
    (out := tmp_path/str(i)).mkdir()
    losses = [[*row, 0.5][:columns] for row in rows]
    changed = {"args": json.dumps(saved), "losses": json.dumps(losses)}
    save_checkpoint(str(out/gen.CHECKPOINT), tensors, meta | changed)
    assert train.main(["--resume", "--steps", "9", "--out", str(out)]) == 0
    now = metadata(out/gen.CHECKPOINT)
    kept, table = json.loads(now["losses"]), list(csv.DictReader(open(out/"log.csv")))
    assert len(kept) == 9 and kept[0] == losses[0][:4] and len(kept[8]) == 4
    assert [row["gradient_norm"] != "" for row in table] == [columns > 3]*8 + [True]
    resumed = json.loads(now["args"])
    for k in saved.keys() & resumed.keys() - {"steps", "out", "resume", *train.SHAPE}:
      assert resumed[k] == saved[k], k
    assert resumed["dtype"] == "float32" and len((out/"log.csv").read_text().splitlines()) == 10

def test_commands_can_be_pasted(tmp_path, monkeypatch):
  """Quoted; found from any folder; short on a terminal, absolute in a file, which may be read
  elsewhere."""
  (folder := tmp_path/"a b").mkdir()
  def paste(cwd:Path, terminal:bool) -> list[str]:
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: terminal))
    return shlex.split(texts.command("train.py", "--resume", "--out", texts.shown(folder)))[1:]
  script = str(HERE/"train.py")
  assert paste(HERE, True) == ["train.py", "--resume", "--out", str(folder)]
  assert paste(tmp_path, True) == [script, "--resume", "--out", "a b"]
  assert paste(tmp_path, False) == [script, "--resume", "--out", str(folder)]
  python = shlex.split(texts.command("train.py", "--help"))
  monkeypatch.setenv("PATH", str(folder))                 # no python there
  assert shlex.split(texts.command("train.py"))[0] == sys.executable
  assert subprocess.run(python, cwd=tmp_path, capture_output=True).returncode == 0

def another(done:Path, out:Path, options:dict, data:str|None=None) -> Path:
  "Writes the checkpoint of that run with other options, and data as it was counted, into a folder."
  tensors, meta = read_checkpoint(str(at(done)))
  args = {k: v for k, v in (json.loads(meta["args"]) | options).items() if v != "absent"}
  out.mkdir(parents=True)
  changed = {"args": json.dumps(args), "data": data or meta["data"]}
  save_checkpoint(str(at(out)), tensors, meta | changed)
  return out

# the options of the run so far, those it goes on with; what is said; its schedule, the last rate
RESUMED = [
  ({}, "--steps 12", "changed: --steps 8 -> 12", 8, 3e-4),
  ({}, "--steps 12", "learning rate: 4.0e-04 until now, 3.0e-04 from here, 3.0e-04 at the end; it "
   "fell, to a tenth of --lr, until step 8, with --schedule-steps 12 until the end", 8, 3e-4),
  ({"schedule_steps": "absent"}, "--steps 12", "from here, 3.0e-04 at the end; it", 8, 3e-4),
  ({}, "--steps 12 --schedule-steps 12", "changed: --steps 8 -> 12, --schedule-steps 8 -> 12",
   12, 3.458e-4),
  ({"steps": 16, "schedule_steps": 16}, "--steps 12",
   "it falls until step 16, with --schedule-steps 12 until the end", 16, 9e-4),
  ({"steps": 10, "schedule_steps": 10}, "--length 8 --batch 1 --checkpoint-activations",
   "changed: --batch 2 -> 1, --length 16 -> 8, --checkpoint-activations off -> on", 10, 3.661e-4),
  ({"steps": 10, "schedule_steps": 10, "data": ["more.txt"]}, "",
   "the data have changed: until now the run was on text.txt: 1 file, 6 tokens; from", 10, 3.661e-4)]

def test_resume_says_what_changes(done, tmp_path, monkeypatch, unplotted, printed):
  "Options, learning rate, data. The schedule stays as it was, for more steps or for fewer."
  monkeypatch.chdir(tmp_path)
  Path("more.txt").write_text(TEXT*2)
  for i, (before, options, words, schedule, last) in enumerate(RESUMED):
    counted = "text.txt: 1 file, 6 tokens" if "data" in before else None
    out = another(done, tmp_path/str(i), before, counted)
    said = printed(train, f"--resume --out {out} {options}")
    assert words in said, said
    assert ("\nchanged: " in said) == bool(options)
    now = metadata(at(out))
    assert json.loads(now["args"])["schedule_steps"] == schedule
    rates = [row[2] for row in json.loads(now["losses"])]
    assert rates[:8] == [row[2] for row in json.loads(metadata(at(done))["losses"])]
    assert rates[-1] == pytest.approx(last, rel=1e-3), (i, rates)

def test_init_takes_weights_and_shape(run8, done, tmp_path, instant):
  args, _ = train.resolve_args(f"--init {at(done)} --lr 1e-4".split())
  data = [str(run8[0]/"text.txt")]
  assert (args.d_model, args.lr, args.steps, args.data, args.resume) == (16, 1e-4, 600, data, False)
  options = f"--length 32 --batch 2 --sample 0 --steps 1 --data {run8[0]/'text.txt'}"
  assert train.main(f"--init {at(done)} {options} --out {tmp_path}".split()) == 0
  new, meta = weights(at(tmp_path)), metadata(at(tmp_path))
  assert same(instant.seen[0], weights(at(done)))
  assert not any(new[k].any() for k in new if k.startswith("optim.m"))
  assert json.loads(meta["config"])["d_model"] == 16
  assert json.loads(meta["held_out"])[0][0] == 0          # evaluated where it starts

# the options of a run, those of one that goes on from it; what is said; its highest rate
GOING_ON = [
  ({}, "", "on text.txt, as run/checkpoint.safetensors was; --data names other text", 3e-4),
  ({}, "", "learning rate 3.0e-04 at its highest, where run/checkpoint.safetensors had 3.0e-03",
   3e-4),
  ({"data": None}, "", "on Python's standard library, as run/check", 3e-4),
  ({"data": ["gone.txt"]}, "--data more.txt", "more.txt: 1 file", 3e-4),
  ({"data": ["text.jsonl"], "text_key": "content", "holdout": 0.2}, "", "5,394 tokens to", 3e-4),
  ({"lr": 3e-4, "init": "run"}, "", "where run/checkpoint.safetensors had 3.0e-04", 3e-4),
  ({}, "--lr 0.01", "learning rate 1.0e-02 at its highest, where", 0.01)]

def test_init_goes_on_with_the_same_data(done, tmp_path, monkeypatch, unplotted, printed,
                                         rejected):
  "Wherever it is started, at a tenth of the learning rate; where the data are gone, one line."
  for name in ("text.txt", "more.txt"): (tmp_path/name).write_text(TEXT)
  (tmp_path/"text.jsonl").write_bytes(jsonl(TEXT.splitlines(), "content"))
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(texts, "stdlib_files", lambda: [tmp_path/"more.txt"])
  files = {"data": ["text.txt"], "out": "run"}
  options = "--length 16 --batch 2 --sample 0 --steps 1"
  for before, more, words, rate in GOING_ON:
    shutil.rmtree("run", ignore_errors=True)
    another(done, Path("run"), files | before)
    said = printed(train, f"--init run {options} {more} --out new")
    assert words in said, said
    args = json.loads(metadata(at(Path("new")))["args"])
    assert args["lr"] == pytest.approx(rate)
    assert all(Path(p).is_absolute() for p in (args["out"], *(args["data"] or [])))
  monkeypatch.chdir(tmp_path/"run")                  # the data lie beside the folder, as before
  assert "text.txt, as" in printed(train, f"--init . {options} --out ../new")
  monkeypatch.chdir("/")
  printed(train, f"--resume --steps 2 --out {tmp_path}/new")
  shutil.move(tmp_path, elsewhere := tmp_path.with_name("elsewhere"))
  printed(train, f"--resume --steps 3 --out {elsewhere}/new")
  os.remove(elsewhere/"text.txt")
  for command in (f"--init {elsewhere}/run {options}", f"--resume --steps 4 --out {elsewhere}/new"):
    rejected(train, command, "text.txt, which is not there any more", "with --data")
  rejected(train, f"--task mlm --init {BIGS/'flax'}", "does not say what it was trained on: name with --data")
  rejected(train, f"--task mlm --init {elsewhere}/run", "was trained on --task text: name that, or")

# options of train.py, or of finetune.py, and what --estimate says
ESTIMATES = [
  (train, "--data text.txt --batch 4 --accumulate 2 --steps 9 --eval-every 2",
   "for 9 steps and 0:00:00 for 5 evaluations",
   "half the activations: --accumulate 4 or --checkpoint-activations$",
   "half the time: --batch 2 or --length 8; a smaller"),
  (train, "--data text.txt --batch 1 --embed-dropout 0.1", "$half the time: --length 8; a"),
  (train, "--task mlm --data text.txt --steps 3", "3 steps of 2 x 16", "$half the time: --batch 1"),
  (train, "--init run", "$on text.txt, as run", "s a step; "),
  (train, "--resume --out run --steps 10", "$changed: --steps 8 -> 10$", "for 2 steps and 0:00:00 for 1 "),
  (finetune, "--data t.tsv", "t.tsv: 14 lines to train on, 1 held out", "for 21 steps and")]

def test_estimate(done, tmp_path, monkeypatch, instant, printed, rejected):
  "Memory, time, and what takes less, for any program and run; nothing is written."
  monkeypatch.chdir(tmp_path)
  Path("text.txt").write_text(TEXT)
  tsv(Path("t.tsv"), [("ab"[i % 2], f"text {i}") for i in range(15)])
  another(done, Path("run"), {"data": ["text.txt"], "out": "run"})
  files = lambda: {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
  before = files()
  for program, options, *words in ESTIMATES:
    tiny = "" if "--init" in options or "--resume" in options else SMALL
    tiny += "" if "--resume" in options else " --length 16"
    said = printed(program, f"--batch 2 {tiny} {options} --estimate").replace("\n", "$")
    assert all(w in said for w in (*words, "memory: ", "$time: ")), said
  with training.lock_run_directory(Path("run")): printed(train, "--resume --out run --steps 9 --estimate")
  if Device.DEFAULT == "CPU":
    monkeypatch.setattr(training, "free_memory", lambda: 6e4)
    fits = f"--data text.txt {SMALL} --length 64"
    for options, smaller in ((fits, "--batch, --length or"), (f"{fits} --estimate", "--batch"),
                             ("--init run", "--size, --d-model or"), ("--size 2.7B", "--size")):
      rejected(train, options, f"of memory are free: take a smaller {smaller}")
  assert files() == before and not Path("out").exists()

def test_a_task_is_registered_in_one_place(tmp_path, instant, monkeypatch, printed, rejected,
                                           capsys):
  monkeypatch.setattr(train, "TASKS", {**train.TASKS})
  def options(add): add("--gap N", int, None, "length of the gap", fixed=True)
  @train.task("copying", "what stood before a gap", causal=True, gap=3, options=options)
  def copying_task(args) -> train.Task:
    def batch(step:int) -> train.Batch:
      r = np.random.default_rng([args.seed, step])
      x = r.integers(1, 9, (args.batch, args.length), np.int32)
      row = np.column_stack([x, *np.zeros((args.gap, args.batch), np.int32), x])
      return row[:, :-1], row[:, 1:]
    held_out = [batch(-1 % 2**32)]
    return train.Task("copying", None, 9, batch, held_out, 3.0, "symbols at random",
                      unit="bits per symbol")
  small = "--d-model 8 --n-layer 1 --d-state 2 --batch 4 --length 6 --steps 2"
  said = printed(train, f"--task copying {small} --out {tmp_path} --gap 2")
  assert "2 steps of 4 x 13 = 52 tokens" in said
  assert "held out: 2.164 bits per symbol; symbols at random: 3.000" in said
  args = json.loads(metadata(at(tmp_path))["args"])
  assert (args["gap"], args["model"], args["weight_decay"]) == (2, "h3", 0.1)
  rejected(train, "--gap 2", "--gap is for --task copying")
  rejected(train, "--task copying --model bert", "is not for --model bert")
  rejected(train, f"--resume --gap 1 --out {tmp_path}", "--gap 1 differs from the checkpoint's 2")
  with pytest.raises(SystemExit): train.main(["--help"])
  assert "copying: what stood before a gap" in capsys.readouterr().out

@slow
def test_the_example_of_a_task_learns(tmp_path, monkeypatch):
  "as its docstring has it, with its defaults"
  monkeypatch.setattr(train, "TASKS", {**train.TASKS})
  example = re.search(r"    @task.*?(?=\n  $)", train.task.__doc__, re.S)[0]
  exec(textwrap.dedent(example), {**vars(train)})
  assert train.main(["--task", "copying", "--out", str(tmp_path)]) == 0
  loss = json.loads(metadata(at(tmp_path))["held_out"])[-1][1]
  assert loss < 0.3                                       # of 3 bits per symbol

# -- the pieces of the trainer

TASK = SimpleNamespace(forward=train.Task.forward, count=train.Task.count)
def step_options(**kw) -> SimpleNamespace:
  plain = dict(accumulate=1, truncate=None, devices=1, checkpoint_activations=False,
               dtype="float32")
  return SimpleNamespace(**plain | kw)

@slow
def test_truncate():
  """The loss is that of the whole sequence; the gradient the mean of the pieces', each from the
  state before it, which is a constant; the state begins anew with each batch. Evaluation
  likewise."""
  model, options = H3LM(H3Config(19, 12, 1, (), d_state=8)), step_options(truncate=6)
  params = get_state_dict(model)
  opt = training.AdamW(params)
  step = train.training_step(model, opt, TASK, options, training.LossScale("float32"))
  evaluate = train.evaluation(model, opt, TASK, options)
  hyper = opt.hyper(0, 1e-12, 0.0, 1.0, 1.0)              # the weights stay where they are
  for seed in range(2):
    x, y = np.random.default_rng(seed).integers(0, 19, (2, 3, 12), np.int32)
    state, grads = model.init_carry(3), []
    for i in range(0, 12, 6):
      state = [type(s)(*map(h3tiny.copied, s)) for s in state]
      logits, state = model.forward(toks(x[:, i:i+6]), state)
      loss = train.cross_entropy(logits, toks(y[:, i:i+6]))
      some = loss.gradient(*params.values())
      Tensor.realize(*get_parameters(state), *some)
      grads.append(np.concatenate([g.numpy().ravel() for g in some]))
    whole = train.cross_entropy(model(toks(x)), toks(y)).item()
    want = [whole, np.linalg.norm(np.mean(grads, 0))]
    assert step((x, y), hyper) == pytest.approx(want, rel=1e-4)
    assert evaluate((x, y))[0] == pytest.approx(whole, rel=1e-5)

def run_steps(copies:int=1, **kw) -> tuple[list, dict[str, np.ndarray]]:
  """Two steps of a model as run8's on two rows, the second with few targets: losses, norms, a loss
  after them; the weights. copies: of each row, which share its targets, each with some of them."""
  r, batches = np.random.default_rng(0), []
  for _ in range(2):
    x, y = r.integers(0, 257, (2, 2, 16), np.int32)
    y[1, 4:] = -1
    shares = np.arange(16) % 3 % copies                    # 11 and 5 of the first row, 3 and 1
    y = np.concatenate([np.where(shares == i, y, -1) for i in range(copies)])
    batches.append((np.concatenate([x]*copies), y))
  model = H3LM(RUN8)
  options = step_options(**kw)
  params, scale = get_state_dict(model), training.LossScale(options.dtype)
  if names := training.open_devices(options.devices):
    for p in params.values(): p.shard_(names).realize()
  opt, figures = training.AdamW(params), []
  step = train.training_step(model, opt, TASK, options, scale)
  for i, batch in enumerate(batches):
    hyper = opt.hyper(i, 3e-3, 0.1, 1.0, 1.0, scale.value)
    figures += step(batch, hyper)
  figures.append(train.evaluation(model, opt, TASK, options)(batches[0])[0])
  return figures, {k: p.numpy() for k, p in params.items()}

@pytest.fixture(scope="module")
def two_steps():
  "In one go, on one device"
  return run_steps()

ALL_AT_ONCE = dict(devices=2, accumulate=2, checkpoint_activations=True)
@pytest.mark.parametrize("kw", [{"accumulate": 2}, *(
  pytest.param({k: ALL_AT_ONCE[k] for k in some}, marks=slow)
  for n in (1, 2, 3) for some in itertools.combinations(ALL_AT_ONCE, n))], ids=str)
def test_in_parts_on_devices_and_checkpointed(two_steps, kw):
  "The same loss, gradient and weights as in one go; parts with different numbers of targets"
  (want, weights), (figures, got) = two_steps, run_steps(2, **kw)
  np.testing.assert_allclose(figures, want, rtol=1e-5)
  # AdamW divides by the gradient's size: where that is rounding, so is the step
  for k, w in weights.items():
    near = np.abs(got[k] - w) <= 1e-5 + 1e-4*np.abs(w).max()
    assert near.mean() > 0.98, k

@slow
@pytest.mark.parametrize("dtype,tolerance", [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_precision(two_steps, dtype, tolerance):
  "The losses as in float32, to what rounding the factors can do"
  training.check_precision(dtype)
  figures, weights = run_steps(dtype=dtype)
  assert figures != two_steps[0]
  for kind, rtol in ((0, tolerance/4), (1, 2*tolerance)):  # losses, norms
    np.testing.assert_allclose(figures[kind::2], two_steps[0][kind::2], rtol=rtol)
  for x in weights.values():
    assert x.dtype == np.float32 and np.isfinite(x).all()

def compilers() -> dict[str, str]:
  "Every clang that is installed, once, by its name, and ziglang's."
  names = ["clang", *(f"clang-{version}" for version in range(14, 30))]
  found = {Path(path).resolve(): name for name in reversed(names) if (path := shutil.which(name))}
  clangs = {name: str(path) for path, name in reversed(found.items())}
  zig = importlib.util.find_spec("ziglang")
  return clangs | ({"ziglang": "no compiler of this name"} if zig else {})

# one always, the others with SLOW=1
SOME_COMPILERS = [pytest.param(name, marks=[slow]*(i > 0)) for i, name in enumerate(compilers())]

@pytest.fixture(scope="module")
def cache_of_all(tmp_path_factory):
  "tinygrad's cache, where one compiler finds what the others made"
  return str(tmp_path_factory.mktemp("compilers")/"cache.db")

# what a process begins with that has one compiler, of this name
ONE_COMPILER = """
import sys
from support import cpu
if sys.argv[1] == "ziglang": cpu.is_clang = lambda command: False
cpu.check_kernels = lambda: None
cpu.setup_device()
"""

EXACT = """
import numpy as np
from tinygrad import Tensor
from support import training
r = np.random.default_rng(0)
for dtype in ("bfloat16", "float16"):
  training.check_precision(dtype)
  for n in (8, 64):                        # in plain ops and by the kernel
    a, b = (r.integers(129, 256, (n, n)).astype(np.float32) for _ in "ab")
    x, w = Tensor(a).realize(), Tensor(b).realize()
    with training.half_precision(dtype): y, z = (t.linear(w.T).numpy() for t in (x, x + 1/3))
    assert (y == a @ b.T).all()
    if n == 64: assert not np.allclose(z, (a + 1/3) @ b.T, 1e-5)
    assert np.allclose(z, (a + 1/3) @ b.T, 1e-2)
"""

@on_cpu
@pytest.mark.parametrize("name", SOME_COMPILERS)
def test_half_precision_of_every_compiler(name, cache_of_all):
  "Factors are rounded where they are stored, products and sums are not"
  python(ONE_COMPILER + EXACT, name, CC=compilers()[name], CACHEDB=cache_of_all)

TRAINS = """
import generate, train
name, *args = sys.argv[1:]
for dtype in ("bfloat16", "float16"):
  assert train.main([*args, "--dtype", dtype, "--out", dtype]) == 0
  assert generate.main(["--model", dtype, "--dtype", dtype, "--tokens", "12"]) == 0
"""

@slow
@on_cpu
@pytest.mark.parametrize("name", compilers())
def test_programs_in_half_precision_of_every_compiler(tmp_path, name, cache_of_all):
  (tmp_path/"text.txt").write_text(TEXT)
  args = [*TINY, "--data", "text.txt", "--steps", "2", "--eval-every", "1"]
  python(ONE_COMPILER + TRAINS, name, *args, cwd=tmp_path, CC=compilers()[name],
         CACHEDB=cache_of_all, PYTHONPATH=str(HERE))

REFUSES = """#!/bin/sh
[ "$1" = -c ] || exec clang "$@"
source=$(cat)
case $source in *E_77*) echo "no 77 of anything" >&2; exit 1;; esac
echo "$source" | clang "$@"
"""

FAILS = """
from tinygrad import Tensor
from support import training
training.check_precision("float16")
x = [Tensor([1.0]*n).realize() for n in (77, 33)]
Tensor.realize(*(t + 1 for t in x))        # two kernels, for the compile workers
"""

@on_cpu
@pytest.mark.skipif(not shutil.which("clang"), reason="no clang")
def test_what_a_compiler_says_is_shown(tmp_path):
  "After the check of --dtype as well"
  (compiler := tmp_path/"clang").write_text(REFUSES)
  compiler.chmod(0o755)
  (tmp_path/"fails.py").write_text(ONE_COMPILER + FAILS)
  done = own_process(tmp_path/"fails.py", "clang", CC=compiler, CACHEDB=tmp_path/"cache.db")
  assert done.returncode == 1 and "no 77 of anything" in done.stderr

def test_arrays_on_a_device():
  "come back equal, in any size, order and type; none of another type goes into a Tensor"
  for x in np.float32(3), np.zeros((2, 0), np.float32), np.arange(6).reshape(2, 3).T, [True, False]:
    y = flashconv.to_device(x).numpy()
    assert y.dtype == np.asarray(x).dtype and np.array_equal(y, x)
  with pytest.raises(AssertionError, match="int32 does not go into"):
    flashconv.fill(Tensor.empty(3), np.zeros(3, np.int32))

def test_fill_on_several_devices():
  "As a resumed run does: in place, on each of them, where a TinyJit finds it"
  t = training.tensor_on(training.open_devices(2), np.zeros(4, np.float32))
  double = capture(lambda: (t*2).contiguous().realize())
  double()
  flashconv.fill(t, x := normal(4))
  for i in range(2):
    assert (Tensor(t.uop.mselect(i)).numpy() == x).all()
  assert (double().numpy() == 2*x).all()

def on_device(arrays:dict[str, np.ndarray]) -> dict[str, Tensor]:
  tensors = {k: Tensor(x.astype(np.float32)) for k, x in arrays.items()}
  Tensor.realize(*tensors.values())
  return tensors

def test_loss_scale():
  """Halved by a gradient that is not finite, which changes nothing; doubled after a thousand that
  are."""
  scale, plain = training.LossScale("float16"), training.LossScale("float32")
  assert scale.value == 65536
  assert scale.accepts(False) and scale.value == 32768
  for _ in range(1000): assert scale.accepts(True)
  assert scale.value == 65536
  scale.value = 1.0
  assert not scale.accepts(False) and not plain.accepts(False)
  opt = training.AdamW(on_device({"a.weight": (w := normal(24, 7))}))
  for bad in (np.inf, np.nan):
    g = w.copy()
    g[3, 3] = bad
    hyper = opt.hyper(0, 1.0, 0.1, 1.0, 1.0)
    opt.update([Tensor(g).realize()], hyper)
    assert (opt.params["a.weight"].numpy() == w).all()
    assert not opt.m["a.weight"].numpy().any()
  hyper = opt.hyper(0, 0.0, 0.0, 1e9, 1.0, 1024.0)
  norm = opt.update([Tensor(w*1024).realize()], hyper).item()
  assert norm == pytest.approx(np.linalg.norm(w), rel=1e-5)
  np.testing.assert_allclose(opt.m["a.weight"].numpy(), 0.1*w, rtol=1e-5)

@pytest.mark.parametrize("beta2,clip", [(0.95, 1.0), (0.999, math.inf)])
def test_adamw_matches_numpy(beta2, clip): check_adamw(TinyJit, 5, beta2, clip)

def check_adamw(jit:Callable, steps:int, beta2:float=0.95, clip:float=1.0) -> None:
  r, log_dt, C = np.random.default_rng(0), "x.kernel.kernel.log_dt", "x.ssm_k_kernel.kernel.C"
  shapes = {"a.weight": (24, 7), "a.bias": (5,),
            log_dt: (64,), C: (1, 16, 8)}
  p = {k: r.standard_normal(s) for k, s in shapes.items()}
  m = {k: np.zeros(s) for k, s in shapes.items()}
  v = {**m}
  opt = training.AdamW(on_device(p), beta2)
  update = jit(opt.update)
  for step in range(1, steps + 1):
    size = 0.01 if step % 2 else 3                                       # not clipped, clipped
    g = {k: size*r.standard_normal(s) for k, s in shapes.items()}
    lr = 3e-3/step
    norm = np.linalg.norm(np.concatenate([x.ravel() for x in g.values()]))
    hyper = opt.hyper(step-1, lr, 0.1, clip, 1/3)
    got = update([*on_device(g).values()], hyper)
    assert got.item() == pytest.approx(norm, rel=1e-5)
    for k in shapes:
      g[k] *= min(1, clip/(norm + 1e-6))
      m[k] = m[k] + 0.1*(g[k] - m[k])
      v[k] = v[k] + (1-beta2)*(g[k]**2 - v[k])
      root = np.sqrt(v[k]/(1 - beta2**step)) + 1e-8
      up = m[k]/(1 - 0.9**step)/root
      decay = 0.1*lr*p[k] if k in ("a.weight", C) else 0
      p[k] = p[k] - (lr/3 if k == log_dt else lr)*up - decay
  for k in shapes:
    np.testing.assert_allclose(opt.params[k].numpy(), p[k], atol=2e-6)
    np.testing.assert_allclose(opt.v[k].numpy(), v[k], rtol=1e-4, atol=1e-9)

PARAMETER_GROUPS = {  # some of each
  "DYNAMICS": """0.mixer.kernel.kernel.log_dt 0.mixer.kernel.kernel.B 0.mixer.ssm_k_kernel.kernel.B
                 0.mixer.kernel.kernel.inv_A_real 0.mixer.kernel.kernel.A_imag""",
  "DECAYED": """0.mixer.kernel.kernel.C 0.mixer.ssm_k_kernel.kernel.C 0.mixer.D 0.mixer.ssm_k_D
                1.mixer.Wqkv.weight""",
  "UNDECAYED": """0.norm1.weight 1.mlp.fc1.bias backbone.embeddings.word_embeddings.weight
                  backbone.ln_f.weight"""}

def test_parameter_groups():
  names = get_state_dict(H3LM(RUN8))
  groups = {group: {k.split("layers.")[-1] for k in names
                    if training.group_of(k) == getattr(training, group)}
            for group in PARAMETER_GROUPS}
  for group, some in PARAMETER_GROUPS.items(): assert {*some.split()} <= groups[group]
  assert len(groups["DYNAMICS"]) == 5
  assert all(k.endswith((".weight", ".C", ".D", "ssm_k_D")) for k in groups["DECAYED"])

def test_schedule():
  rates = [train.learning_rate(step, 100, 1.0, 10) for step in range(100)]
  assert [rates[i] for i in (0, 9, 10)] == [0.1, 1.0, 1.0]
  assert rates[55] == pytest.approx(0.55)
  assert rates[99] == pytest.approx(0.1, abs=1e-3)
  assert rates[10:] == sorted(rates[10:], reverse=True)
  assert train.learning_rate(0, 1, 1.0, 0) == 1.0
  assert train.learning_rate(99, 100, 1.0, 10, "linear") == pytest.approx(1/90)
  for steps in (100, 5):                             # past the end, and cut short in the warm-up
    assert train.learning_rate(100, steps, 1.0, 10) == 0.1
    last = train.learning_rate(steps-1, steps, 1.0, 10, "linear")
    assert train.learning_rate(100, steps, 1.0, 10, "linear") == last

def test_split_and_batches(again, tmp_path):
  "Held-out text is nowhere in the training part; the same seed and step give the same batch."
  forty = range(10, 401, 10)                              # the last two are held out
  for ends, share, want in ((forty, 0.05, 380), ([100], 0.05, 95), ([1, 1000], 0.4, 600)):
    assert texts.split(np.array(ends), share) == want
  args = train.resolve_args(f"{again} --out {tmp_path}".split())[0]
  one, two = train.text_task(args), train.text_task(args)
  for s in (0, 1, 77):
    x, y = batch = one.batch(s)
    assert x.shape == (2, 16)
    assert (np.array(batch) == two.batch(s)).all()
    assert (x[:, 1:] == y[:, :-1]).all()
    assert (x != one.batch(s+1)[0]).any()
  assert one.per_nat == pytest.approx(1/np.log(2), rel=1e-3)
  files = texts.stdlib_files()
  assert files == sorted(files) and len(files) > 100
  assert {"test", "site-packages"}.isdisjoint(part for f in files for part in f.parts)

class Words(texts.ByteTokenizer):
  "As GPT-2's: white space before a word is the word's, other is apart"
  name = "words"
  def encode(self, text:str) -> np.ndarray:
    words = re.findall(r" ?\w+|\s+(?!\S)|\s+|[^\w\s]+", text)
    return np.array([len(w)*7 + ord(w[0]) for w in words])

def test_tokens_in_a_file(tmp_path, monkeypatch, capsys):
  """Much text is mapped, built once for as long as the text is the same, cut where byte pairs are;
  no text, left out"""
  (notes := tmp_path/"notes").mkdir()
  lines = (f"line {i} of words,\n" for i in range(100))
  text = "".join(f"{a}  {b}    {c}\n" for a, b, c in zip(lines, lines, lines))
  (notes/"a.txt").write_text(text)
  (notes/"b.bin").write_bytes(b"text at first, and then\n"*60 + b"\xff")
  (other := tmp_path/"c.txt").write_text("é"*500)
  tokenizers = [BYTES, Words()]
  whole = [read(notes, other, tok=tok) for tok in tokenizers]
  for k, v in dict(LARGE=0, PIECE=97, cache_dir=str(tmp_path/"cache")).items():
    monkeypatch.setattr(texts, k, v)
  for tok, (ids, ends) in zip(tokenizers, whole):
    first = ends[0] - 1
    assert (ids[:first] == tok.encode(text)).all()
    assert ids[first] == ids[-1] == 256
    for built in (1, 0):
      got, where = read(notes, other, tok=tok)
      assert ("kept" in capsys.readouterr().out) == built
      assert isinstance(got, np.memmap)
      assert (got == ids).all() and [*where] == [*ends]
  other.write_text("f"*500)
  assert read(notes, other, tok=tok)[0][-2] != got[-2]
  assert not [*(tmp_path/"cache").rglob("*.part")]
  with pytest.raises(gen.UserError, match="byte 1,440, in line 61, is 0xff"):
    read(notes/"b.bin", tok=tok)

def test_bigram_bits():
  train_ids = np.array([0, 1, 0, 1, 2], np.uint16)        # pairs 01 10 01 12
  x, y = np.array([0, 2]), np.array([1, 5])
  want = -np.log2(3/259) - np.log2(1/257)
  assert train.bigram_bits(train_ids, x, y) == pytest.approx(want)

# -- the generator

def test_sampling():
  r, logits = np.random.default_rng(0), np.log([[0.5, 0.3, 0.15, 0.05]])
  def draw(**kw) -> list[int]:
    return [int(gen.sample(logits, [r], **kw)[0]) for _ in range(2000)]
  for option, allowed in (("temperature", {0: 1}), ("top_k", {1: 1, 2: 2, 0: 4}),
                          ("top_p", {1e-9: 1, 0.75: 2, 0.85: 3})):
    for value, most in allowed.items():
      assert set(draw(**{option: value})) == set(range(most)), option
  share = np.bincount(draw(temperature=0.5), minlength=4) / 2000
  want = np.array([.25, .09, .0225, .0025]) / .365        # p² in proportion
  np.testing.assert_allclose(share, want, atol=0.04)
  both = gen.sample(9*np.eye(2), [r, r], temperature=0.1)
  assert both.tolist() == [0, 1]

def test_logits_that_are_not_finite(done, tmp_path, rejected):
  "No token is drawn from them, and no likelihood or score is made of them: one line."
  r = np.random.default_rng(0)
  for bad in [np.nan, 1.0], [1.0, np.inf], [-np.inf, -np.inf]:
    for temperature in (0, 1.0):
      with pytest.raises(gen.UserError, match="not finite"):
        gen.sample(np.array([[0.0, 1.0], bad]), [r, r], temperature)
  assert gen.sample(np.array([[-np.inf, 1.0]]), [r]).tolist() == [1]
  tensors, meta = read_checkpoint(str(at(done)))
  norm, path, text = "backbone.ln_f.bias", tmp_path/"nan.safetensors", tmp_path/"text"
  damaged = tensors | {norm: Stored(tensors[norm].numpy() * np.float32(np.nan))}
  save_checkpoint(str(path), damaged, meta)
  text.write_text('{"context": "a", "choices": ["b"], "answer": 0}\n')
  for use in ("--prompt a", f"--window 64 --perplexity {text}", f"--window 64 --score {text}"):
    rejected(gen, f"--model {path} {use}", "not finite")

def test_stream_is_whole_characters_and_stops():
  def feed(stop:str|None, data:bytes) -> list[str]:
    stream = gen.TextStream(stop)
    return [stream.feed(bytes([b])) for b in data]
  pieces = feed(None, "naïve 🙂 日本語".encode())
  assert "".join(pieces) == "naïve 🙂 日本語" and all("\ufffd" not in p for p in pieces)
  assert gen.TextStream().feed(b"ok\xe6", final=True) == "ok\ufffd"
  assert feed("END", b"a E EN ENDz") == ["a", " ", "", "E ", "", "", "EN ", "", "", "", ""]
  stream = gen.TextStream("END")
  assert stream.feed(b"xEN") == "x"
  assert stream.feed(b"", final=True) == "EN" and not stream.done

def log_p(model:H3LM, ids:list[int]) -> np.ndarray:
  "log p (n,V) of what follows each of at most 64 tokens, in float64, by a forward pass of 64"
  row = np.pad(ids, (0, 64 - len(ids)))
  logits = model(toks(row[None])).numpy()[0, :len(ids)]
  return gen.log_softmax(logits.astype(np.float64))[:, :257]

def test_generation(done, monkeypatch, printed):
  "The same seed, the same text; each token as the forward pass gives it; --stop; a pipe"
  model = H3LM.from_pretrained(str(at(done)))
  one_of_two = [np.array([1]), np.array([])]
  for prompts in ([], [[]], one_of_two, np.zeros((2, 0))):
    with pytest.raises(gen.UserError, match="prompt is empty"): gen.generate(model, prompts, 1)
  prompt = np.frombuffer(b"def f", np.uint8)
  take = lambda **kw: [t[0] for t in gen.generate(model, prompt, 12, **kw)]
  greedy, one = take(temperature=0), take(seed=3, temperature=0.8)
  assert one != take(seed=4, temperature=0.8)
  assert log_p(model, [*prompt, *greedy])[4:-1].argmax(-1).tolist() == greedy
  shorter, both = prompt[:2], [*gen.generate(model, [prompt, prompt[:2]], 3, temperature=0)]
  for row, p in zip(np.transpose(both).tolist(), (prompt, shorter)):
    assert log_p(model, [*p, *row])[len(p)-1:-1].argmax(-1).tolist() == row
  with pytest.raises(gen.UserError, match="--max-length"): take(max_length=16)
  text = lambda ids: "def f" + BYTES.decode(np.array(ids)).decode("utf-8", "replace")
  command, predicted, (r, w) = f"--model {at(done)} --tokens 12", text(greedy), os.pipe()
  os.write(w, b"def f")
  os.close(w)
  monkeypatch.setattr(sys, "stdin", os.fdopen(r))
  said = printed(gen, f"{command} --seed 3", err="5 tokens of prompt, 12 generated")
  assert said == text(one) + "\n"
  assert gen.parser().parse_args(["--stop", r"a\n\t\\n"]).stop == "a\n\t\\n"
  stop = predicted[9:11]
  ended = predicted[:predicted.index(stop, 5)]
  command += f" --temperature 0 --prompt 'def f' --stop {shlex.quote(stop)}"
  assert printed(gen, command) == ended + "\n"

class CountingSession(gen.Session):
  """In place of a model: what follows is most likely a letter, by the sum of the text so far without
  its padding."""
  def __init__(self, model, batch:int, max_length:int, start:list[int]|None=None):
    self.texts, self.start = np.zeros((batch, 0), int), start or [0]*batch
  def __call__(self, tokens:np.ndarray) -> np.ndarray:
    self.texts = np.column_stack([self.texts, tokens])
    sums = [text[n:].sum() for text, n in zip(self.texts, self.start)]
    return np.eye(257)[[97 + n % 26 for n in sums]]*3

def test_generation_of_several(done, monkeypatch, printed):
  "Several prompts, each --batch times: each goes on as it does alone; read in pieces"
  monkeypatch.setattr(gen, "Session", CountingSession)
  def alone(text:str) -> str:
    for _ in range(5): text += chr(97 + sum(text.encode()) % 26)
    return text
  speaks = f"--model {done} --tokens 5"
  for prompt, tokens in ("", "0 tokens"), ("d", "1 token"), ("de", "2 tokens"):
    printed(gen, f"{speaks} --prompt '{prompt}'", err=f": {tokens} of prompt, 5 generated")
  # drawn, each goes on by the seed as it does alone: the second of two equal ones in another way
  def texts_of(*words:str) -> list[str]:
    said = printed(gen, f"{speaks} --seed 3 --prompt {shlex.join(words)}")
    return re.split(r"--- \d of \d ---\n", said)[len(words) > 1:]
  a, b, c = "def f", "another length", "x"*150
  together = texts_of(a, b, a, c)
  assert together[0] != together[2]
  assert together == [*texts_of(a), *texts_of(b), texts_of(a, a)[1], *texts_of(c)]
  prompts = ["def f", "another length", "x"*150]
  first, long = prompts[:1], prompts[2:]
  for some, batch in (prompts, 2), (prompts, 1), (long, 1), (first, 3):
    words = " ".join(map(shlex.quote, some))
    command = f"--model {done} --tokens 5 --temperature 0 --batch {batch}"
    said = printed(gen, f"{command} --prompt {words}")
    want = [alone(p) for p in some for _ in range(batch)]
    shown = "".join(f"--- {i} of {len(want)} ---\n{text}\n" for i, text in enumerate(want, 1))
    assert said == (shown if len(want) > 1 else want[0] + "\n")

def stub_nll(rows:np.ndarray) -> np.ndarray:
  "In place of a model's: it follows from all tokens of a row up to the one that it is of."
  rows = np.asarray(rows, np.int64)
  return (rows.cumsum(-1)*7 % 101)[:, 1:] / 16

def test_windows(monkeypatch):
  "A document's token has what is in its window, no more, no less; the bar counts windows."
  class Bar:
    def __init__(self, total:int, **_): self.left = total
    def update(self, n:int, close:bool=False): self.left -= n
    def __del__(self): left.append(self.left)
  left = []
  monkeypatch.setattr(gen, "tqdm", Bar)
  monkeypatch.setattr(gen, "TOKENS_AT_ONCE", 130)
  ids = np.array([256, *TEXT[:128].encode()])
  def check(window:int, stride:int, parts:dict[int, int]) -> None:
    "parts: where each window begins, and how many tokens it adds"
    want = [stub_nll(ids[None, i:i+window+1])[0, -new:] for i, new in parts.items()]
    nats, windows = gen.document_nll(stub_nll, ids, window, stride)
    assert windows == len(parts)
    assert not any(left)
    assert (nats == np.concatenate(want)).all()
  check(256, 128, {0: 128})
  check(128, 1, {0: 128})
  check(64, 32, {0: 64, 32: 32, 64: 32})
  check(64, 40, {0: 64, 40: 40, 64: 24})                  # the last one ends the text

def test_generation_keeps_rows_apart(monkeypatch):
  "All of a command line of generate.py: no text's figures depend on its neighbours."
  seen = []
  monkeypatch.setattr(gen, "run", lambda args: seen.append(flashconv.rows_layout()))
  assert gen.main([]) == 0 and seen == [flashconv.SingleRows]
  assert flashconv.rows_layout() is flashconv.RowPairs

def test_perplexity(done, tmp_path, printed):
  "A text's is what the forward pass gives; --perplexity begins anew with each of several"
  model = H3LM.from_pretrained(str(at(done)))
  docs = [TEXT[:60], TEXT[100:150]]
  def plain(text:str) -> np.ndarray:
    ids = [256, *text.encode()]
    return -log_p(model, ids[:-1])[range(len(text)), ids[1:]]
  whole = np.concatenate([plain(text) for text in docs])
  (file := tmp_path/"both.jsonl").write_bytes(jsonl(docs))
  ids = np.array([256, *docs[0].encode(), *[0]*4])
  nll = gen.likelihood_of(model)(ids[None])[0]
  assert_close(nll[:60], whole[:60], 1e-5)
  out = printed(gen, f"--model {done} --perplexity {file} --window 64")
  assert "2 texts, 110 tokens, 110 bytes; 2 windows of 64" in out
  numbers = [float(x) for pair in re.findall(r"perplexity ([\d.]+), ([\d.]+)", out) for x in pair]
  mean = whole.mean()
  perplexity = math.exp(mean)
  assert numbers == pytest.approx([perplexity, mean, perplexity, mean/math.log(2)], rel=1e-3)

@pytest.mark.parametrize("ssm", and_slow(["h3"], ["s4d"]))
def test_whole_document(ssm, monkeypatch):
  """A document in pieces, the state carried, is what the recurrence in float64 makes of it, also
  where pieces do not divide it; the next begins anew. Five pieces hold no more memory than two."""
  monkeypatch.setattr(gen, "TOKENS_AT_ONCE", 64)
  model, ids = shaken(H3Config(257, 12, 1, d_state=8, ssm=ssm)), tokens_of(257, 321)
  carry, held = model.init_carry(1), []
  pieces = gen.likelihood_of(model, carry)
  def nll(rows:np.ndarray) -> np.ndarray:
    nats = pieces(rows)
    held[-1].append(GlobalCounters.mem_used)
    return nats
  want = -gen.log_softmax(np_lm(model, ids[None, :-1])[0])[range(320), ids[1:]]
  for n in (20, 128, 320, 150):
    held.append([])
    nats, count = gen.carried_nll(nll, carry, ids[:n+1])
    near(nats, want[:n], 1e-5)
    assert count == len(held[-1]) == math.ceil(n/64)
  assert max(held[2]) <= max(held[1])
  # the state matters: without it the second piece is far from that
  assert abs(gen.carried_nll(pieces, carry, ids[64:129])[0] - want[64:128]).max() > 0.1

def test_bits_by_position(monkeypatch):
  "A token counts in the range of positions that its first byte lies in, in each text."
  monkeypatch.setattr(gen, "likelihood_of", lambda *_: stub_nll)
  # a text is the sizes of its tokens
  words = SimpleNamespace(eot=0, encode=np.array, decode=lambda ids: b"x"*sum(ids))
  some = [[*rng.integers(1, 9, n)] for n in (400, 90, 3)]
  want = collections.defaultdict(lambda: np.zeros(2))
  for sizes in some:
    nats, at = gen.document_nll(stub_nll, np.array([0, *sizes]), 64, 32)[0], 0
    for nat, size in zip(nats, sizes):
      begin = next(b for b in (1024, 512, 256, 0) if at >= b)
      want[begin] += nat, size
      at += size
  found = gen.likelihood(None, words, some, 64, 32)
  begins, sizes, bits = gen.bits_by_position([found, found])
  assert begins.tolist() == sorted(want) and len(want) == 4
  for begin, size, both in zip(begins, sizes, bits.T, strict=True):
    assert size == want[begin][1]
    assert both == pytest.approx([want[begin][0]/size/math.log(2)]*2)
  assert (found.nats, found.bytes) == pytest.approx(tuple(sum(want.values())))

def test_window_whole(done, tmp_path, printed, monkeypatch):
  "Models with a state for all of a text, and without one: the printed lines, and the picture."
  monkeypatch.setattr(gen, "TOKENS_AT_ONCE", 256)
  monkeypatch.setattr(gen, "likelihood_of", lambda *_: stub_nll)
  model = H3LM(H3Config(257, 12, 1))
  meta = {"model": "h3", "config": json.dumps(dataclasses.asdict(model.config)),
          "tokenizer": "bytes", "args": '{"length": 256}'}
  (tmp_path/"h3").mkdir()
  h3 = saved(at(tmp_path/"h3"), get_state_dict(model), meta)
  (file := tmp_path/"text.txt").write_text(TEXT[:600])
  whole = f"--perplexity {file} --window whole"
  out = printed(gen, f"--model {h3} {whole}")
  assert "600 bytes; whole, in 3 pieces\n" in out and "GB of memory at the peak" in out
  bits = float(re.search(r"per byte:.*, ([\d.]+) bits", out)[1])
  row = r"^{:<9}   +{}   +([\d.]+)$"
  ranges = [(0, 256), (256, 256), (512, 88)]
  each = [float(re.search(row.format(*x), out, re.M)[1]) for x in ranges]
  assert np.average(each, weights=[256, 256, 88]) == pytest.approx(bits, abs=1e-4)
  out = printed(gen, f"--compare {h3} {done} {whole}")
  assert re.findall(r"bytes +(whole|16) ", out) == ["whole", "16"]
  assert [line.split()[:3] for line in out.splitlines()[-3:]] == [
    [str(at), str(n), f"{x:.4f}"] for (at, n), x in zip(ranges, each)]
  assert "windows of 16 tokens, each 8 after the one before, as this model has no state" in printed(
    gen, f"--model {done} {whole}")
  if not MATPLOTLIB: return
  picture = tmp_path/"positions.png"
  printed(language, f"--positions {h3} {done} --data {file} --out {picture}")
  assert picture.read_bytes().startswith(b"\x89PNG")

LONG = """
import sys, numpy as np, generate as gen
from support.text import ByteTokenizer
gen.setup_device()
model = gen.H3LM(H3Config(257, 64, 2))
text = "".join(map(chr, np.random.default_rng(0).integers(32, 127, 200_000)))
for size in 20_000, 200_000:
  gen.likelihood(model, ByteTokenizer(), [text[:size]], None, 0)
  print(peak())
"""

@slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux tells a peak of memory")
def test_memory_of_a_long_document():
  "200,000 bytes add numbers of a token to what 20,000 take; logits alone are 264 a token."
  short, long = map(int, python(PEAK_NOW + LONG).split())
  assert long - short <= 180_000 * 16*8

def test_compare(done, tmp_path, printed, rejected, monkeypatch):
  "A row says of its model what --perplexity does, of a file or of what the first one held out."
  monkeypatch.setattr(gen, "likelihood_of", lambda *_: stub_nll)
  short = another(done, tmp_path/"short", {"length": 8})
  tokens = [*TEXT.encode(), BYTES.eot]
  held = tokens[texts.split(np.array([len(tokens)]), 0.05):-1]
  (tmp_path/"text.txt").write_text(TEXT[:99])
  (tmp_path/"held.txt").write_bytes(bytes(held))
  for command, text in ("--perplexity {tmp_path}/text.txt", "text"), ("", "held"):
    command = f"--compare {done} {short} {command.format(tmp_path=tmp_path)}"
    _, head, *rows = printed(gen, command).splitlines()
    assert re.split("  +", head)[-2:] == ["bits per byte", "perplexity per token"]
    for model, window, row in zip((done, short), ("16", "8"), rows, strict=True):
      alone = printed(gen, f"--model {model} --perplexity {tmp_path}/{text}.txt")
      perplexity, bits = (re.search(rf"per {what} ([\d.]+)", alone)[1]
                          for what in ("token: perplexity", r"byte:.*,"))
      assert row.split() == [str(model), "hybrid", "0.01", "M", "8", "bytes", window, bits, perplexity]
  monkeypatch.setattr(gen, "likelihood", None)            # refused before anything is computed
  rejected(gen, f"--compare {done} {BIGS}/flax", "is a masked model")
  save_official(str(tmp_path/"official.safetensors"), H3LM.from_pretrained(str(at(done))))
  rejected(gen, f"--compare {tmp_path}/official.safetensors {done}", "name a text with --perplexity")
  another(done, tmp_path/"gone", {"data": [f"{tmp_path}/no.txt"]})
  rejected(gen, f"--compare {tmp_path}/gone", "no.txt", "is not there any more")

def test_score(done, tmp_path, monkeypatch, printed):
  "Each choice's log p given the context; batched, cut from the left, with examples before."
  for context in ("a", "a "): assert gen.join_choice(context, "b") == ("a", " b")
  for context, choice in ("a", " b"), ("a\n", "b"), ("", "b"):
    assert gen.join_choice(context, choice) == (context, choice)
  monkeypatch.setattr(gen, "likelihood_of", lambda model: stub_nll)
  def check(questions:list[gen.Question], before:str="", window:int=999, **options) -> list[int]:
    "Against the stub's of each row alone; the likeliest choices."
    best, scores = [], gen.score_choices(None, BYTES, questions, window=window, **options)
    for (context, choices, _), got in zip(questions, scores):
      space = " " if context else ""
      for choice, (log_p, n) in zip(choices, got):
        ids = [256, *f"{before}{context}{space}{choice}".encode()]
        nll = stub_nll([ids[-window-1:]])[0]
        assert n == len(f"{space}{choice}".encode())
        assert log_p == -nll[-int(n):].sum()
      best.append(int(got[:, 0].argmax()))
    return best
  Q = gen.Question
  two, long = Q("def f1", ["(x): return", "zz"], 0), Q(TEXT[:90], ["+ 1"], 0)
  check([long], window=64)
  check([two], "x * longer one\n\n", shots=[Q("x * ", ["9", "longer one"], 1)])
  questions = [two, Q("", ["é"], 0), long]
  lines = [q._replace(answer=i)._asdict() for q, i in zip(questions, check(questions))]
  (file := tmp_path/"q.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
  out = printed(gen, f"--model {done} --score {file} --window 128")
  assert "3 questions" in out and "1.0000 by that of the whole choice; chance 0.8333" in out

# -- masked text, and what is measured

def test_masking():
  """15 % of the text's tokens, never [CLS], [SEP] or [PAD]; 80 % masked, 10 % drawn, 10 % kept; in
  runs where asked for"""
  r = np.random.default_rng(0)
  rows, lengths = r.integers(0, 50, (400, 102)), np.array([37, 100, 100, 100]*100)
  for row, n in zip(rows, lengths):
    row[0], row[n+1] = 60, 61
    row[n+2:] = 63
  # most rows without a run; shares of neighbours
  for run, most_alone, fewest_near, most_near in (1, 0.2, 0, 0.2), (6, 0.35, 0.5, 1):
    x, where, y = train.mask_out(r, rows.copy(), lengths, run, 62, 50)
    targets = y >= 0
    assert x.shape == rows.shape
    assert where.shape == y.shape == (400, 15)
    assert targets.sum(1).tolist() == [6, 15, 15, 15]*100
    assert y.max() < 50
    assert (np.take_along_axis(rows, where, 1)[targets] == y[targets]).all()
    hidden = np.zeros(rows.shape, bool)
    hidden[np.nonzero(targets)[0], where[targets]] = True
    assert (x == rows)[~hidden].all()
    assert hidden.sum() == targets.sum()            # no place twice
    now = np.take_along_axis(x, where, 1)[targets]
    share = np.mean([now == 62, now == y[targets]], 1)
    assert np.abs(share - [0.8, 0.1 + 0.1/50]).max() < 0.02                      # 5 sigma
    gaps = [np.diff(np.sort(a[k])) for a, k in zip(where, targets)]
    assert np.mean([g.min() > 1 for g in gaps]) < most_alone
    assert fewest_near <= np.mean([(g == 1).mean() for g in gaps]) < most_near

SUBJECTS = itertools.product(("old", "small", "red"), ("cat", "dog", "hen", "fox"))
PLACES = ("mat", "hat", "bed", "log", "box")
TALE = "".join(f"the {a} {b} sat on the {c}.\n" for a, b in SUBJECTS for c in PLACES) * 4

@slow
def test_mlm_learns_goes_on_longer_and_fills(tmp_path, printed, rejected):
  """Far above the baseline; at 4 times the length, with the position table copied, still so (of a
  text so simple the loss is nearly 0, so no ratio; README has that of a real one); a masked word of
  a line gets as many letters as the words that stand there, and such letters (be it a fog)."""
  (file := tmp_path/"tale.txt").write_text(TALE)
  tale, model, longer = f"--task mlm --mask-run 3 --data {file} --out", tmp_path/"m", tmp_path/"l"
  small = "--d-model 48 --n-layer 2 --d-state 8 --batch 24 --length 48"
  said = printed(train, f"{tale} {model} {small} --lr 6e-3 --eval-every 300 --steps 380")
  line = r"^held out: .* per masked byte, accuracy (\S+); tokens .* right (\S+) %\): (\S+)$"
  accuracy, baseline, bits = map(float, re.search(line, said, re.M).groups())
  assert accuracy > 0.8 > 2*baseline/100
  more = "--length 192 --batch 4 --steps 1 --sample 0"
  said = printed(train, f"{tale} {longer} --init {at(model)} {more}")
  assert float(re.search(r"^step 0: held out (\S+) bits", said, re.M)[1]) < 0.15*bits
  assert BiGS.from_pretrained(str(longer)).config.max_length == 192
  ask = f"--model {model} --fill"
  filled = printed(gen, f"{ask} 'the old [MASK] sat on the mat.'").splitlines()
  assert re.fullmatch(r"the old [cdhf][aoe][tgnx] sat on the mat\.", filled[0])
  assert filled[1].count("'") == 6
  printed(gen, f"{ask} мир[MASK][MASK]é")                 # bytes that are no characters
  rejected(gen, f"{ask} 'no mask'", "wants a text with [MASK]")
  rejected(gen, f"{ask} [MASK]{'x'*99}", "positions for 48")
  rejected(gen, f"--model {model} --prompt x", "use it by", "--fill")

def test_figures_count_what_a_batch_holds(tmp_path, instant, monkeypatch, printed):
  """Tokens a second are the batch's, not --length times --batch; the loss held out is the mean over
  all targets, as in training: rows of masked text that are cut short have fewer."""
  (file := tmp_path/"tale.txt").write_text(TALE)
  targets = lambda batch: int((batch[-1] >= 0).sum())
  # a batch's loss is the number of its targets; then hits and targets, for the accuracy
  figures = lambda batch: [np.float32(targets(batch)), 0, 1]
  monkeypatch.setattr(train, "evaluation", lambda *a: figures)
  command = (f"--task mlm --d-model 16 --n-layer 1 --d-state 4 --length 48 --batch 2 "
             f"--holdout 0.3 --steps 9 --sample 0 --data {file} --out {tmp_path}")
  task = paper_task(command)[1]
  *_, y = held = task.held_out[0]
  logits = normal(*y.shape, task.vocab_size)
  model = SimpleNamespace(mlm=lambda tokens, at: Tensor(logits))
  got = [x.item() for x in task.forward(model, *map(toks, held))]
  right = np.take_along_axis(logits, y[..., None], -1)[..., 0]
  nats = np.log(np.exp(logits).sum(-1)) - right
  hits = (logits.argmax(-1) == y).sum()
  want = [nats[y >= 0].mean(), hits, targets(held)]
  assert got == pytest.approx(want, rel=1e-4)
  short = [b[:, :24] for b in task.batch(0)]
  of_short = dataclasses.replace(task, batch=lambda step: short)
  monkeypatch.setattr(train.TASKS["mlm"], "make", lambda args: of_short)
  clock = itertools.count()
  a_second_a_call = SimpleNamespace(perf_counter=lambda: float(next(clock)))
  monkeypatch.setattr(train, "time", a_second_a_call)
  assert " 48 tokens/s " in printed(train, command)
  counts = np.array([targets(b) for b in task.held_out])
  held_out = json.loads(metadata(at(tmp_path))["held_out"])
  loss = held_out[-1][1]*np.log(2)
  assert loss == pytest.approx((counts**2).sum()/counts.sum(), rel=1e-4)
  assert abs(counts.mean()/loss - 1) > 1e-3                # the mean over batches is another

def test_bert_tokens(tmp_path, instant, monkeypatch, printed):
  """WordPiece of a vocab.txt, which goes along with the checkpoint; a line where the library or the
  file is missing"""
  words = "[PAD] [UNK] [CLS] [SEP] [MASK] hello world ##s the . a b c d e f g h i j".split()
  (vocab := tmp_path/"vocab.txt").write_text("\n".join(words) + "\n")
  def no_tokenizer(words:str) -> None:
    with pytest.raises(gen.UserError, match=words): gen.make_tokenizer("bert", vocab)
  with monkeypatch.context() as m:
    m.setitem(sys.modules, "tokenizers", None)
    no_tokenizer("pip install tokenizers")
  pytest.importorskip("tokenizers")
  tok = gen.make_tokenizer("bert", vocab)
  assert [tok.pad, tok.cls, tok.sep, tok.mask] == [0, 2, 3, 4]
  assert tok.masked_size == len(words)
  assert tok.encode("Hello worlds").tolist() == [5, 6, 7]
  assert tok.decode([2, 5, 6, 7, 3, 0]) == b" hello worlds"
  (data := tmp_path/"text.txt").write_text("hello the world . a b c d e f g h\n" * 99)
  out, shape = tmp_path/"out", "--d-model 16 --n-layer 1 --d-state 8 --batch 2 --length 12"
  printed(train, f"{shape} --sample 0 --task mlm --tokenizer bert --vocab {vocab} --data {data} "
                 f"--steps 1 --out {out}")
  assert (out/"vocab.txt").read_text() == vocab.read_text()
  world = Tensor(np.eye(len(words), dtype=np.float32)[6])
  monkeypatch.setattr(BiGS, "mlm", lambda self, tokens: tokens.unsqueeze(-1)*0 + world)
  assert printed(gen, f"--model {out} --fill 'hello [MASK] .'").startswith("hello world .\n")
  vocab.write_text("nothing")
  no_tokenizer("not BERT's vocabulary")
  os.remove(vocab)
  no_tokenizer("needs its vocabulary")

# ================================================================ the papers' tasks and grids

def tsv(path:Path, rows) -> str:
  path.write_text("".join("\t".join(map(str, r)) + "\n" for r in rows))
  return str(path)

def paper_task(command:str) -> tuple:
  "The options and the Task of a command line."
  args, _ = train.resolve_args(command.split())
  return args, train.TASKS[args.task].make(args)

SMALL = "--d-model 8 --n-layer 1 --n-heads 1 --d-state 4"

@slow
def test_classify_learns(tmp_path, printed):
  "Classes with their three metrics; real values of pairs with both correlations."
  options = "--d-model 32 --n-layer 1 --d-state 8 --length 40 --eval-every 1000 --lr 4e-3"
  animals, opinions = ("cat", "dog", "hen"), [("bad", "is rude"), ("good", "is kind")]
  rows = [(label, f"the {animals[i % 3]} {text}") for i in range(125) for label, text in opinions]
  data, dev = tsv(tmp_path/"a.tsv", rows[:200]), tsv(tmp_path/"dev.tsv", rows[200:])
  said = printed(finetune, f"{options} --steps 120 --data {data} --dev {dev} --out {tmp_path/'c'}")
  got = dict(re.findall(r"(accuracy|F1 of good|MCC) ([\d.]+)", said.strip().splitlines()[-3]))
  assert got.keys() == {"accuracy", "F1 of good", "MCC"}
  assert min(map(float, got.values())) > 0.9, said
  values = [(i / 2, f"word {i}", "x"*(i + 1)) for i in range(7)]*9
  pairs = tsv(tmp_path/"p.tsv", values)
  said = printed(finetune, f"{options} --steps 2 --data {pairs} --out {tmp_path/'e'}")
  assert re.search(r"held out: .* squared error, Pearson -?[\d.]+, Spearman", said)

def test_classify_by_the_recipe_of_glue(tmp_path, capsys):
  "From an official file, whose classifier of three labels is replaced by one of two."
  data = tsv(tmp_path/"a.tsv", [("ab"[i % 2], f"hello w{i}") for i in range(64)])
  args, start = train.resolve_args(f"--task classify --init {BIGS/'seqcls'} --data {data}".split())
  assert (args.model, args.tokenizer, args.batch) == ("bigs", "bert", 16)
  args.tokenizer = "bytes"                                 # the file has no vocabulary beside it
  task = finetune.classify_task(args)
  assert (args.steps, args.lr, task.schedule, task.labels) == (12, 2e-5, "linear", ["a", "b"])
  model = train.make_model(args, dataclasses.replace(task, vocab_size=119), start)
  assert model.classifier.weight.shape == (2, 32)
  assert "classifier" in capsys.readouterr().err

def test_rows_of_texts(tmp_path):
  "[CLS] a [SEP] b [SEP] and its mask; the longer text is cut; numbers are classes in order"
  data = tsv(tmp_path/"a.tsv", [("10", "abc", "d"*99), ("9", "e", "f")]*10)
  _, task = paper_task(f"--task classify --length 12 --batch 99 --data {data}")
  cls, sep, pad = task.tokenizer.cls, task.tokenizer.sep, task.tokenizer.pad
  short, long = [cls, *b"e", sep, *b"f", sep], [cls, *b"abc", sep, *b"dddddd", sep]
  assert task.labels == ["9", "10"] and "labels 9, 10 (bytes)" in task.about
  for row, mask, label in zip(*task.batch(0)):
    want = long if label else short
    assert row.tolist() == want + [pad]*(12 - len(want))
    assert mask.sum() == len(want)

# a program and its options, what its line must contain, and what stands in the file `train`: → is a
# tab, ↵ the end of a line
BAD_PAPERS = """
  finetune | one TSV file
  finetune --data nope | can't read nope: No such file
  finetune --data good --length 3 | give at least 4
  finetune --reproduce | --reproduce
  bigs --length 16 | at least 31
  bigs --data x | --data is for --task text or
  bigs --plot nope | no model at
  bigs --plot nope --offsets 0 | whole number
  arena --length 16 | from 48 to 2000
  arena --length 50 --d-state 3 | d_state must be
  arena --task pixels | one file of images
  arena --symbols 3 | --symbols
  synthetic --length 3 | at least 4
  synthetic --model s4d --without gates | of H3 layers
  synthetic --model hybrid --attn-layers 0,1 --without gates | which the model hasn't got
  synthetic --held-out 3 | --held-out
  synthetic --length 4 --symbols 4 | not 5000 different rows
  language --columns 1,2 | --columns
  language --seeds 3 | --seeds
  language --reproduce --steps 3 | arguments: --steps 3
  language --reproduce --seeds 0 | at least 1
  language --positions nope | no model at
  language --positions nope --out positions.txt | ends in .png
  finetune --data train | line 2 has 1 column | a→x↵b
  finetune --data train | line 2 has 3 columns | a→x↵b→y→z
  finetune --data train | line 3 has 4 columns | a→x↵b→y↵a→x→y→z
  finetune --data empty | is empty
  finetune --data train | no lines | ↵
  finetune --data train | line 2 has 2 columns and an empty text | a→x↵b→ ↵
  finetune --data train | line 3: 'neg' is not a number | 1.5→x↵2→y↵neg→z
  finetune --data train | 4 columns: a line is label, tab, text, tab, text; | x→1→*→y↵x→0→→z
  finetune --data train | line 1 looks like a header (label, review) | label→review↵a→x↵b→y
  finetune --data train | line 1 looks like a header (index, sentence) | index→sentence↵0→x↵1→y
  finetune --data train | has no lines but its header | label→sentence
  finetune --data train | line 3 has 3 columns: a line is 2 columns | label→text↵1→x↵0→y→2
  finetune --data train | every line has the label 'a' | a→x↵a→y
  finetune --data train | 1 line: some are held out | 1.5→x
  finetune --data train | name its columns, --columns mood,note | mood→note↵a→x↵b→y↵a→z↵b→x
  finetune --data train --columns 2,1 | label 'mood' is in no other | note→mood↵x y→1↵z→0↵x→1↵y→0
  finetune --data train | 2,1 for text, tab, label | note→mood↵t 0→0↵t 1→1↵t 2→0↵t 3→1↵t 4→0↵t 5→1
  finetune --data many | the first 'text 0': is that a text? --columns
  finetune --data good --dev train | the file to train on has 1 | label→sentence1→sentence2↵a→x→y
  finetune --data good --dev train | train line 2: the label 'c' does not occur | a→x↵c→y
  finetune --data good --dev train | train line 1 has 3 columns | a→x→y
  finetune --data values --dev train | train line 1: 'high' is not a number | high→x
  finetune --data train --columns mood,text | no column 'mood', only | label→text↵a→x↵b→y
  finetune --data train --columns 2 | of one or two texts | label→text↵a→x↵b→y
  finetune --data train --columns 1,7 | and --columns 1,7 names others | label→text↵a→x↵b→y
"""

def test_bad_input_of_the_papers_programs(tmp_path, monkeypatch, rejected):
  "One line that names the program, status 2, nothing written."
  monkeypatch.chdir(tmp_path)
  Path("values").write_text("1.5\tx\n2\ty")
  Path("empty").touch()
  tsv(Path("good"), [("ab"[i % 2], f"text {i}") for i in range(15)])
  tsv(Path("many"), [(f"text {i}", i % 2) for i in range(12)])
  for line in BAD_PAPERS.strip().splitlines():
    command, words, *text = line.split(" | ")
    for t in text: Path("train").write_text(typed(t))
    program, _, options = command.strip().partition(" ")
    before = {*tmp_path.rglob("*")}
    err = rejected(importlib.import_module(f"papers.{program}"), options, words)
    assert err.startswith(f"papers/{program}.py: error: ") and {*tmp_path.rglob("*")} == before, err

def test_classifier_is_asked(tmp_path, instant, monkeypatch, printed, rejected):
  """By the line that its training ends with; with the row that it is trained on, be the text in the
  line, a file, or a pipe. Many labels are cut in what is shown."""
  monkeypatch.setattr(train, "evaluation", lambda *a: lambda batch: [np.float32(1), 0*batch[2]])
  rows = [(f"label {i}", f"text {i}", "d"*99) for i in range(30)]*2
  data, out = tsv(tmp_path/"a.tsv", rows), tmp_path/"a model"
  said = printed(finetune, f"{SMALL} --length 24 --batch 30 --steps 1 --sample 0 --data {data} "
                           f"--out {shlex.quote(str(out))}")
  assert "label 19, …" in said and "label 2" not in said
  *_, program, _, model, flag, text = shlex.split(said.splitlines()[-1])
  assert program == str(HERE/"generate.py") and [model, flag] == [str(out), "--classify"]
  ask = f"--model '{out}' --classify"
  labels = r"label \d+\t0\.\d{4}\t"
  assert re.fullmatch(labels + "a text\tanother\n", printed(gen, f"{ask} '{text}'"))
  _, task = paper_task(f"--task classify --length 24 --batch 30 --data {data}")
  tokens, mask, _ = (x[:1] for x in task.batch(0))
  logits = BiGS.from_pretrained(str(out)).classify(toks(tokens), toks(mask)).numpy()[0]
  p = np.exp(gen.log_softmax(logits.astype(np.float64)))
  shown = re.match(rb"text (\d+)d", bytes(t for t in tokens[0].tolist() if t < 256))
  pair = "\t".join(rows[int(shown[1])][1:])
  want = "".join(f"{task.labels[i]}\t{p[i]:.4f}\t{pair}\n" for i in np.argsort(-p)[:3])
  assert printed(gen, f"{ask} '{pair}' --top-k 3") == want
  (file := tmp_path/"some texts").write_text(f"\n{pair}\r\n{pair}")
  once = want.splitlines(keepends=True)[0]
  assert printed(gen, f"{ask} --prompt-file '{file}'") == 2*once
  with open(file) as f:
    monkeypatch.setattr(sys, "stdin", f)
    assert printed(gen, ask) == 2*once
  # a narrow model goes on at a rate that it learns at, not at GLUE's
  args, _ = train.resolve_args(["--task", "classify", "--init", str(out), "--data", data])
  finetune.classify_task(args)
  assert args.lr == pytest.approx(1e-3)

# options for a model of the authors' with a head, and what is printed: see test_heads_are_asked
P = lambda *logits: f"{np.exp(logits[0]) / np.exp(logits).sum():.4f}"
HEADS_ASKED = [
  ("seqcls --classify 'x y y' 'z\\tx'",
   f"LABEL_1\t{P(2, 1, 0)}\tx y y\nLABEL_0\t{P(2, 0, 1)}\tz\tx\n"),
  ("mc --choose 'x?\\tx y\\tx x\\tz' --top-k 2",
   f"x x\t{P(5, 3, 1)}\tx?\nx y\t{P(3, 5, 1)}\tx?\n"),
  ("qa --span 'who > is <?\\tSir <Ann B.> is.'",
   f"<Ann B.>\t{(np.exp(9) / (np.exp(9) + 15))**2:.4f}\twho > is <?\n"),
  ("tokcls --tag 'x zoo  x yes' x", "".join(f"LABEL_{i}\t{P(9, 0, 0)}\t{word}\n{end}" for i, word, end in (
    (0, "x", ""), (2, "zoo", ""), (0, "x", ""), (1, "yes", "\n"), (0, "x", "\n"))))]

@pytest.mark.parametrize("command,want", HEADS_ASKED, ids=[c.split()[0] for c, _ in HEADS_ASKED])
def test_heads_are_asked(command, want, monkeypatch, printed):
  """Labels, choices, spans and tags in words, with their probabilities. The logits count letters,
  twice in a second text, or are 9 where the first token of a word or span is."""
  table = np.zeros((300, 5), np.float32)
  table[[*b"xyz<>"]] = np.eye(5)
  letters = Tensor(table).realize()
  def classify(self, tokens, mask, types):
    found = letters[tokens][..., :self.classifier.weight.shape[0]]
    return (found * (mask + types).unsqueeze(-1)).sum(1)
  def span(self, tokens, types): return [(9*letters)[tokens][..., i] for i in (3, 4)]
  def tag(self, tokens, types): return (9*letters)[tokens][..., :3]
  for f in classify, span, tag: monkeypatch.setattr(BiGS, f.__name__, f)
  monkeypatch.setattr(gen, "make_tokenizer", lambda *_: BYTES)
  assert printed(gen, f"--model {BIGS}/{command}") == want

# tasks, and whether what a row is shown with is right
VERB_PAIRS = [{*forms} for forms in bigs.VERBS]
def right_verb(row:list[str], answer:str, right:str) -> bool:
  return row.count("___") == 1 and any({answer, right} <= pair for pair in VERB_PAIRS)
SAMPLED = {
  "recall": lambda row, _, right: dict(zip(row[:20:2], row[1:20:2]))[row[-1]] == right,
  "induction": lambda row, _, right: row[row.index("*") + 1] == right,
  "listops --length 60 --held-out 40": lambda row, answer, right: answer == "0" <= right <= "9",
  "agreement": right_verb, "agreement --model h3": right_verb}

class Guessing:
  "In place of a model: random logits of tokens, and the first label."
  def __init__(self, vocab_size:int):
    self.weight, self.V = Tensor.zeros(1), vocab_size
    self.config = SimpleNamespace(max_length=64)
  def __call__(self, tokens:Tensor, at:Tensor|None=None) -> Tensor:
    return Tensor(normal(*(tokens if at is None else at).shape, self.V))
  mlm = __call__
  def classify(self, tokens:Tensor, mask:Tensor) -> Tensor: return -1.0*Tensor.arange(10)*mask[:, :1]

def test_samples_show_what_is_right(tmp_path, instant, monkeypatch, capsys, printed):
  """Rows with the model's answer and the right one; of masked text the text, and what stood there.
  --show prints them of a checkpoint, by the line that the training ended with."""
  for command, is_right in SAMPLED.items():
    _, task = paper_task(f"--task {command}")
    capsys.readouterr()
    task.sample(Guessing(task.vocab_size))
    question, *lines = capsys.readouterr().out.splitlines()
    assert question and len(lines) == 10
    for row, line in zip(lines[::2], lines[1::2]):
      answers = re.fullmatch(r"  the model: (\S+), right: (\S+)", line).groups()
      assert is_right(row.split(), *answers), (command, row, line)
  (file := tmp_path/"tale.txt").write_text(TALE)
  _, task = paper_task(f"--task mlm --mask-run 4 --length 48 --data {file}")
  task.sample(Guessing(task.vocab_size))
  masked = r"(.*?)\n--- .*\n--- there was: '(\w+)'\n"
  shown, old = re.fullmatch(masked, capsys.readouterr().out, re.S).groups()
  assert shown.count("[MASK]") == 1 and shown.replace("[MASK]", old) in TALE
  instant.figures = ROWS_RIGHT
  monkeypatch.setattr(train, "make_model", lambda args, task, start:
                      Guessing(task.vocab_size) if start else H3LM(H3Config(12, 8, 1, ())))
  said = printed(synthetic, f"{SMALL} --symbols 12 --steps 1 --sample 0 --out '{tmp_path}/a b'")
  *_, program, flag, folder = shlex.split(said.splitlines()[-1])
  assert [program, flag, folder] == [str(HERE/"papers/synthetic.py"), "--show", str(tmp_path/"a b")]
  monkeypatch.chdir("/")
  first = printed(synthetic, f"--show {shlex.quote(folder)}").splitlines()[1].split()
  assert {*first[:20:2]} <= {*"abcde"} and first[20] == "*"

def test_metrics():
  "Against the covariance of one-hot labels (Gorodkin's coefficient as published), and known ranks"
  names = "no", "yes", "who", "knows"
  metrics = lambda *labels, K: grid.classification_metrics(*map(np.array, labels), names[:K])
  for K in (2, 4):
    t, p = np.random.default_rng(K).integers(0, K, (2, 300))
    one, two = (np.eye(K)[x] - np.eye(K)[x].mean(0) for x in (t, p))
    hits = np.bincount(t[t == p], minlength=K)
    f1 = 2*hits / (np.bincount(t) + np.bincount(p))
    mcc = (one*two).sum() / np.linalg.norm(one) / np.linalg.norm(two)
    of = {"F1 of yes": f1[1]} if K == 2 else {"mean F1": f1.mean()}
    want = {"accuracy": (t == p).mean(), "MCC": mcc} | of
    assert metrics(t, p, K=K) == pytest.approx(want)
  never = [0, 0, 0]
  assert metrics([0, 0, 1], never, K=2)["MCC"] == metrics(never, never, K=2)["F1 of yes"] == 0
  assert metrics([0, 2], [0, 2], K=3)["mean F1"] == 1          # label 1 does not occur
  x, y = np.arange(5.0), np.array([5.0, 6, 7, 8, 7])
  want = {"Pearson": np.corrcoef(x, y)[0, 1], "Spearman": 0.8207826816681233}   # scipy's example
  assert grid.regression_metrics(x, y) == pytest.approx(want)
  assert grid.regression_metrics(x, 0*y) == {"Pearson": 0, "Spearman": 0}

def test_agreement_grammar():
  "The verb agrees with the subject; attractors are of the other number"
  number = {w: i for forms in bigs.NOUNS + bigs.VERBS for i, w in enumerate(forms)}
  nouns, r = {w for forms in bigs.NOUNS for w in forms}, np.random.default_rng(0)
  for n in (0, 1, 4)*40:
    words, verb, wrong = bigs.sentence(r, n, True)
    subject, *between = [number[w] for w in words[:verb] if w in nouns]
    assert between == [1 - subject]*n
    assert number[words[verb]] == subject == 1 - number[wrong]
    assert {*words, wrong} <= {*bigs.WORDS} and len(words) <= 29

@pytest.mark.parametrize("model", ["bigs", "h3"])
def test_agreement_task(model):
  "The masked or next token; the loss and what is preferred, against numpy's of random logits."
  _, task = paper_task(f"--task agreement --model {model} --batch 8")
  tokens, *_, targets, right, wrong = held = [a[:8] for a in task.held_out[2]]
  words, each = np.array(["PAD", "CLS", "MASK", "SEP", *bigs.WORDS]), range(8)
  for pair in words[np.column_stack([right, wrong])]:
    assert {*pair} in [{*forms} for forms in bigs.VERBS]
  assert ((targets >= 0).sum(1) == 1).all()
  assert (targets.max(1) == right[:, 0]).all()
  shape = *targets.shape, task.vocab_size
  logits = np.random.default_rng(0).standard_normal(shape, np.float32)
  stub = lambda _: Tensor(logits)
  if model == "bigs":
    assert (tokens[each, held[1][:, 0]] == bigs.MASK).all()
    assert (tokens == bigs.MASK).sum() == 8
    stub = SimpleNamespace(mlm=lambda _, at: Tensor(logits))
  else:
    inputs, *_, trained = task.batch(0)
    following = np.where(inputs[:, 1:] == bigs.PAD, -1, inputs[:, 1:])
    assert (trained[:, :-1] == following).all()
  loss, prefers = (x.numpy() for x in task.forward(stub, *map(toks, held)))
  logits = logits[each, (targets >= 0).argmax(1)]
  good, bad = logits[each, right[:, 0]], logits[each, wrong[:, 0]]
  nats = np.log(np.exp(logits).sum(1)) - good
  assert loss == pytest.approx(nats.mean(), rel=1e-4)
  assert (prefers == (good > bad)).all()
  assert 0 < prefers.sum() < 8
  halves = {bigs.attractors(n): 0.5 for n in range(5)}
  assert task.metrics([(0, np.array([True, False]))]*5) == halves

def test_synthetic_tasks():
  "Table 2's: the answer follows from the row; no row twice; the recipe's defaults"
  for r in synthetic.induction(np.random.default_rng(0), 300, 30, 20).tolist():
    where = r.index(18)
    assert len(r) == 32 and where < 28 and r.count(18) == 2
    assert r[30] == 18 and r[31] == r[where+1] < 18
  for r in synthetic.recall(np.random.default_rng(0), 300, 20, 10).tolist():
    keys, values = r[:20:2], r[1:20:2]
    pairs = dict(zip(keys, values))
    assert len(r) == 23 and r[20] == 8
    assert pairs[r[21]] == r[22]
    assert max(keys) < 4 <= min(values) <= max(values) < 8
    assert [pairs[k] for k in keys] == values
  args, task = paper_task("--task recall")
  assert (args.model, args.size, args.embed_dropout, args.warmup) == ("h3", "table2", 0.1, 3140)
  seen = {x.tobytes() for step in range(157) for x in np.concatenate(task.batch(step), 1)}
  assert len(seen) == 5000 and [task.count(b) for b in task.held_out] == [100]*5 + [0]*5
  x, y = task.held_out[0]
  assert len(x) == 100 and y[:, :-1].max() == -1
  assert y[:, -1].min() >= 4
  chance = float(re.search(r"a row: right ([\d.]+) %\)", task.baseline_name)[1])
  assert 43 < chance < 57                                 # 50.3 of many; 3 standard errors
  hits = [(0, np.float32(n)) for n in [100]*5 + [40]*5]
  assert task.metrics(hits) == {"accuracy": 1.0, "accuracy at 40": 0.4}
  train.fill_step_defaults(args)
  run = train.Run("", args, task, None)
  assert run.opt.beta2 == 0.999
  assert training.Hyper(*run.hyper(0)[0].numpy()).clip == np.inf
  args, task = paper_task("--task induction --model transformer")
  config = train.h3_config(args, task.vocab_size)
  assert (config.max_positions, config.rotary_dim, config.attn_dropout) == (63, 0, 0.1)
  assert task.baseline == math.log2(18)

def test_listops():
  "Values by another evaluator; lengths within bounds; the same row for the same seed"
  operators = [min, max, lambda *v: int(np.median(v)), lambda *v: sum(v) % 10]
  def value(tokens:list[int]) -> int:
    if (head := tokens.pop(0)) < 10: return head
    args = []
    while tokens[0] != arena.CLOSE: args.append(value(tokens))
    tokens.pop(0)
    assert 2 <= len(args) <= 10
    return operators[head-10](*args)
  (_, task), (_, again) = (paper_task("--task listops --length 120 --held-out 40") for _ in "12")
  assert len(task.held_out[1][0]) == 8
  for step in range(3):
    assert all((a == b).all() for a, b in zip(task.batch(step), again.batch(step)))
    for row, mask, label in zip(*task.batch(step)):
      tokens = row[mask == 1].tolist()
      assert 12 < len(tokens) < 120
      assert (row[mask == 0] == arena.PAD).all()
      assert value(tokens) == label and not tokens

def test_images(tmp_path, monkeypatch):
  "From both kinds of file; what is no image is rejected"
  monkeypatch.chdir(tmp_path)
  x, y = rng.integers(0, 256, (40, 9)), rng.integers(0, 3, 40) * 5
  table, test = np.column_stack([y, x]), dict(x_test=x[:5], y_test=y[:5])
  np.savez("a.npz", x_train=x.reshape(40, 3, 3), y_train=y, **test)
  np.savetxt("a.csv", table, "%d", ",", header="label,pixels", comments="")
  np.savetxt("b.csv", table, "%6.1f", ",")
  np.savez("b.npz", x=x, y=y[:, None])                    # labels as CIFAR has them
  known = {row.tobytes(): label for row, label in zip(x.astype(np.int32), y)}
  for file, held in (("a.npz", 5), ("a.csv", 2), ("b.csv", 2), ("b.npz", 2)):
    args, task = paper_task(f"--task pixels --data {file}")
    assert args.length == 9 and task.labels == ["0", "5", "10"]
    assert len(task.held_out[0][0]) == held
    for tokens, mask, labels in (task.batch(0), *task.held_out):
      assert mask.all()
      assert [known[t.tobytes()] for t in tokens] == [*5*labels]
  for i, text in enumerate(("a,b\n1,2", "1,2,300\n1,2,3", "", "1\n2")):
    (file := Path(f"{i}.csv")).write_text(text)
    with pytest.raises(texts.UserError, match=f"{file} is no table of images"):
      arena.read_images(file)
  def rejects(words:str, **change) -> None:
    np.savez("c.npz", **dict(x=x, y=y) | test | change)
    with pytest.raises(texts.UserError, match=words): paper_task("--task pixels --data c.npz")
  rejects("c.npz is no table of images", y_test=y[:4])
  rejects("c.npz is no table of images", x_test=x)
  rejects("of one size, of two labels", y_test=y[:5]+1)
  rejects("of one size, of two labels", x_test=x[:5, :4])
  rejects("of one size, of two labels", y=0*y)

ROWS_RIGHT = [np.float32(1.5), np.float32(80)]              # what evaluation gives of such tasks

def test_enough_ends_a_run(tmp_path, instant, monkeypatch, printed):
  "Three evaluations in a row that are good enough end it, as finished. Nothing is trained."
  recall = train.TASKS["recall"]
  easy = lambda args: dataclasses.replace(recall.make(args), stop_at=("accuracy", 0.0))
  monkeypatch.setitem(train.TASKS, "recall", dataclasses.replace(recall, make=easy))
  instant.figures = ROWS_RIGHT
  # --length 20, the special symbol, a key
  said = printed(synthetic, f"--steps 9 --eval-every 1 {SMALL} --sample 0 --out {tmp_path}")
  assert "9 steps of 32 x 22 = 704 tokens" in said
  run = grid.Run("", 0, tmp_path, [], {})
  assert run.finished() and run.meta["step"] == "3"
  assert not grid.Run("", 0, tmp_path/"none", [], {}).finished()

@pytest.mark.parametrize("part", ["shift", "gates"])
def test_layer_without_a_part(tmp_path, part, instant, printed):
  """After a step and another one by --resume the layer is y = Wo( q * diag(k v) ), or without gates
  y = Wo( diag(shift(k)) ); what is left was trained."""
  instant.figures = ROWS_RIGHT
  options = f"--task recall --without {part} {SMALL} --steps 1 --sample 0"
  printed(synthetic, f"{options} --out {tmp_path}")
  printed(synthetic, f"--resume --steps 2 --out {tmp_path} --sample 0")
  model = H3LM.from_pretrained(str(tmp_path))
  layer = model.backbone.layers[0].mixer
  u, = drawn((2, 9, 8))
  q, k, v = (swap(x.numpy()) for x in layer.qkv(u))
  def conv(x:np.ndarray, ssm:object, K:Tensor) -> np.ndarray:
    return np_fftconv(x, K.numpy(), ssm.D.numpy(), 1, 1, x)["y"]
  if part == "gates": k = conv(k, layer.shift_ssm, layer.shift_ssm.filter())
  y = conv(k*v if part == "shift" else k, layer.diag_ssm, layer.diag_ssm.filter(9))
  if part == "shift": y *= q
  near(layer(u)[0].numpy(), np_dense(float64(layer), swap(y), "output_linear"), 1e-5)
  initial = instant.seen[0]["backbone.layers.0.mixer.k_proj.weight"]
  assert (layer.k_proj.weight.numpy() != initial).all()

@pytest.fixture
def untrained(monkeypatch):
  "Runs whose figures are made up; `started` are the options of each, `code` is its exit status."
  seen = SimpleNamespace(started=[], code=0)
  metrics = ["accuracy", "accuracy at 40", "accuracy at 80", *map(bigs.attractors, range(5))]
  def start(run, program) -> SimpleNamespace:
    seen.started.append(run.options)
    run.folder.mkdir(parents=True)
    (run.folder/"output.txt").write_text("step 1/2  64,000 tokens/s\n")
    share = 0.5 if run.options[-1] == "1234" else 0.25       # by the seed
    figures = json.dumps([[1, 0.5, dict.fromkeys(metrics, share)]])
    run.meta = {} if seen.code else dict(step="1", seconds="6", held_out=figures)
    (run.folder/"meta").write_text(json.dumps(run.meta))
    return subprocess.Popen(["sh", "-c", f"exit {seen.code}"])
  def finished(run) -> bool:
    if (file := run.folder/"meta").exists(): run.meta = json.loads(file.read_text())
    return bool(run.meta)
  monkeypatch.setattr(grid.Run, "start", start)
  monkeypatch.setattr(grid.Run, "finished", finished)
  monkeypatch.setattr(grid, "time", SimpleNamespace(sleep=lambda _: time.sleep(0.01)))
  return seen

def test_reproduce(tmp_path, untrained, capsys):
  "Each model once for each seed, the table, the files; again, and nothing is trained; failures."
  columns = {"x": grid.Column("--task recall", "accuracy", {"A": "99"}),
             "y": grid.Column("--task recall", "loss", {})}
  rows = {"A": "--model h3", "B": "--model s4d"}
  own, ablation = (g.GRID.plan(tmp_path/g.GRID.name, 3) for g in (synthetic, layer))
  assert all(run.folder == same.folder for column in layer.GRID.columns
             for run, same in zip(ablation["H3", column], own["H3", column], strict=True))
  small = grid.Grid("small", "title", "about", rows, columns, seeds=(0, 1234))
  argv = ["--reproduce", "--out", str(tmp_path)]
  reproduce = lambda: grid.run_program("papers/x.py", "", small, "", argv)
  for told in ("A, x, seed 1234: begins", "A, x, seed 1234: 1 step in 0:00:06"), (
      "A, x, seed 1234: 1 step in 0:00:06, before",):
    assert reproduce() == 0
    out = capsys.readouterr().out
    assert {*told} <= {*out.splitlines()} and out.count(", seed 1234: ") == 2*len(told)
    for line in (r"^ +A +B$", r"^x +37\.5 \(25\.0-50\.0\) \[99\] +37\.5 \(",
                 r"^minutes a seed +0\.1 +0\.1$", r"^ +seed 0 +seed 1234$",
                 r"^A, x +25\.0 \(25\.0\) +50\.0 \(50\.0\)$"):
      assert re.search(line, out, re.M), out
    assert len(untrained.started) == 4
  table = (tmp_path/"small"/"table.csv").read_text().splitlines()
  assert len(table) == 9 and table[1:3] == ["A,x,0,1,25.0,25.0,99,0.1", "A,x,1234,1,50.0,50.0,99,0.1"]
  for _ in range(2): arena.show_speed(tmp_path)                     # timed once, kept, shown again
  out = capsys.readouterr().out
  assert len(untrained.started) == 13 and out.count("10.00 (1.0x)") == 12, out
  for untrained.code, status, words in (
      (3, 2, "a run failed, see the end of"),
      (143, 130, "the same command goes on")):            # it was stopped by somebody
    shutil.rmtree(tmp_path/"small")
    try: assert reproduce() == status
    except SystemExit as stop: assert stop.code == status
    assert words in capsys.readouterr().err

@slow
def test_reproduce_stops_and_goes_on(tmp_path):
  "SIGTERM while two models are trained: both save, nobody trains any more; the next start goes on."
  code = f"""from papers.grid import *
column = Column('--task recall --steps 60000 --save-every 50 {SMALL}', 'accuracy', {{}})
table = Grid('t', 't', 'a', {{'A': '--model h3', 'B': '--model s4d'}}, {{'x': column}}, seeds=(0,))
argv = ['--reproduce', '--out', {str(tmp_path)!r}]
sys.exit(run_program('papers/synthetic.py', '', table, '', argv))"""
  def steps() -> list[int]:
    files = sorted(tmp_path.rglob(gen.CHECKPOINT))
    return [int(metadata(f)["step"]) for f in files]
  before = [0, 0]
  for again in range(2):
    process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"NUM_CPU_THREADS": "2"})
    deadline = time.monotonic() + 240
    gone_on = lambda now: len(now) == 2 and all(a > b for a, b in zip(now, before))
    while time.monotonic() < deadline and not gone_on(steps()): time.sleep(0.2)
    process.terminate()
    out = process.communicate()[0]
    assert "the same command goes on" in out and process.returncode == 130, out
    now = steps()
    assert gone_on(now) and max(now) < 60000, (now, before)
    time.sleep(1)
    assert steps() == now
    before = now
  outputs = [f.read_text() for f in tmp_path.rglob("output.txt")]
  assert len(outputs) == 2 and all("going on after step" in text for text in outputs)

def test_filters_and_operations(tmp_path, monkeypatch, printed, capsys):
  "The picture beside a checkpoint; the table of operations, here of small models."
  shutil.copytree(BIGS/"flax", tmp_path/"tinyA")
  if MATPLOTLIB:
    printed(bigs, f"--plot {tmp_path}/tinyA")
    assert (tmp_path/"tinyA"/"filters.png").read_bytes().startswith(b"\x89PNG")
  small = lambda block, length: BiGSConfig(19, 16, 1, block, n_heads=2, max_length=length)
  monkeypatch.setattr(BiGSConfig, "large", staticmethod(small))
  monkeypatch.setattr(bigs, "PAPER_OPERATIONS", {16: (1, 2)})
  assert re.search(r"^ +16 .* \d\.\d\dx$", printed(bigs, "--flops"), re.M)
  with pytest.raises(SystemExit): bigs.main(["--help"])
  said = capsys.readouterr().out
  for option in ("--flops", "--plot masked", "--reproduce"): assert option in said

@pytest.mark.parametrize("config", and_slow([
  H3Config(19, 12, 2, (1,), n_heads=2, rotary_dim=4, d_state=10), HYBRIDS[0]],
  [dataclasses.replace(HYBRIDS[0], head_order="d2h")]))
def test_layers_as_matrices(config):
  "The parts that t gets from all s add up to the layer's output at t, without its bias; causal."
  model, tokens = shaken(config), tokens_of(19, 2, 11)
  x = model.embed(toks(tokens))
  for block, seen in zip(model.backbone.layers, layer.at_work(model, tokens), strict=True):
    y, projection = block.mixer(block.norm1(x))[0], block.mixer.__dict__
    bias = (projection.get("output_linear") or projection["out_proj"]).bias
    near(seen.sent.sum(2), (y - bias).numpy(), 1e-5)
    assert not np.triu(seen.M, 1).any()
    x = block(x)[0]

def test_layers_are_drawn(tmp_path, instant, printed, capsys):
  "An H3 and an attention model on one row; what the answer follows from; what is refused."
  instant.figures = ROWS_RIGHT
  assert layer.asked("induction", np.array([4, 18, 7, 3, 18])).tolist() == [1, 2]
  assert layer.asked("recall", np.array([2, 5, 0, 7, 2, 5, 8, 2])).tolist() == [0, 4, 1, 5]
  for model in ("h3", "transformer", "s4d"):
    printed(synthetic, f"{SMALL} --model {model} --steps 1 --sample 0 --out {tmp_path}/{model}")
  printed(synthetic, f"{SMALL} --task induction --steps 1 --sample 0 --out {tmp_path}/other")
  if MATPLOTLIB:
    printed(layer, f"--plot {tmp_path}/h3 {tmp_path}/transformer/checkpoint.safetensors --row 3")
    assert (tmp_path/"h3"/"layers.png").read_bytes().startswith(b"\x89PNG")
  printed(synthetic, f"{SMALL} --length 60 --steps 1 --sample 0 --out {tmp_path}/long")
  for models, words in (("h3 other", "give those of one"), ("long transformer", "--length"),
                        ("s4d", "S4D"), ("none", "no model in")):
    folders = [f"{tmp_path}/{name}" for name in models.split()]
    with pytest.raises(SystemExit): layer.main(["--row", "0", "--plot", *folders])
    assert words in capsys.readouterr().err

@slow
def test_matrix_is_bright_at_the_asked_key(tmp_path, printed):
  """In a trained H3 of one head the last output gets most, itself aside, from the value behind the
  key that is asked for, in at least 90 % of rows; by chance that were 12 %."""
  printed(synthetic, f"--task recall --head-dim 32 --eval-every 785 --sample 0 --out {tmp_path}")
  args, task, model = grid.trained(str(tmp_path), "papers/layer.py", "recall")
  rows = np.concatenate([x for x, _ in task.held_out[:5]])
  first = layer.at_work(model, rows)[0]
  length = np.linalg.norm(first.sent[:, -1, :-1], axis=-1)
  for values in np.abs(first.M[:, 0, -1, :-1]), length:
    brightest = values.argmax(1)
    hits = [s in layer.asked("recall", row) for s, row in zip(brightest, rows)]
    assert np.mean(hits) >= 0.9 and (brightest % 2 == 1).mean() >= 0.9

@slow
def test_readme_of_the_papers(tmp_path, untrained, monkeypatch):
  "Each command of papers/README.md: grids without training; of other models all but the training."
  monkeypatch.chdir(tmp_path)
  labels = [("ab"[i % 2], "ba"[i % 2], "a text") for i in range(9)]
  tsv(tmp_path/"cola.tsv", [(0, *row) for row in labels])
  for name in ("train.tsv", "dev.tsv"): tsv(tmp_path/name, [row[1:] for row in labels])
  np.savez("mnist.npz", x_train=rng.integers(0, 256, (9, 4, 4)), y_train=np.arange(9) % 3)
  model = BiGS(BiGSConfig(261, 8, 1, max_length=48))
  options = dict(task="mlm", model="bigs", size="small", tokenizer="bytes", length=48)
  config = dataclasses.asdict(model.config)
  meta = dict(model="bigs", step="1", config=json.dumps(config), args=json.dumps(options))
  Path("masked").mkdir()
  save_checkpoint(str(at(Path("masked"))), get_state_dict(model), meta)
  looked = []
  monkeypatch.setattr(arena, "listops", lambda *_: ([1]*20, 1))           # to make them takes long
  for module in bigs, language:
    monkeypatch.setattr(module, "look", lambda argv: looked.append(argv) or 0)
  monkeypatch.setattr(layer, "plot", lambda folders, row: looked.append(folders))
  for command in itertools.chain(*readme_commands("papers/README.md").values()):
    _, program, *options = shlex.split(command.split("  #")[0])
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    if "--reproduce" in options: assert module.main([*options, "--seeds", "1"]) == 0
    elif {"--plot", "--flops", "--positions"} & {*options}: assert module.main(options) == 0
    else:
      args, start = train.resolve_args(options, program, "classify")
      assert train.make_model(args, train.TASKS[args.task].make(args), start)
  assert len(looked) == 4
  assert len([*Path("reproduced").glob("*/table.csv")]) == 5

# ================================================================ benchmarks

def child_here(*arguments:str, **environment:str) -> list[str]:
  "In place of a process of its own."
  # the default run has its own test
  if arguments[0] == "train.py": return ["first step after 1.0 s"]
  with contextlib.redirect_stdout(out := io.StringIO()): exec(arguments[1])
  return out.getvalue().splitlines()

def figures(n:int) -> str: return rf"(?: +(?:[\d,.]+|-)){{{n}}}"
CONV = "conv --lengths 40 --batch 1 --channels 8"
JOBS = {"decode": (bench.DECODE, TWIN, 2, 64), "train": (bench.TRAIN, TWIN, 4, 12)}
BENCHES = [  # the command, a row, how many
  (f"{CONV} --plain 0", "1 x 8 x 40" + figures(12), 1),
  pytest.param("states", "1 x 8 x 40" + figures(12), 1, marks=slow),
  pytest.param(CONV, "1 x 8 x 40" + figures(12), 1, marks=slow),
  pytest.param("conv --random 2 --seed 4", r"\d x \d x \d+" + figures(12), 2, marks=slow),
  ("train decode", "decode, ours" + figures(3), 1),
  pytest.param("train train", "train, ours" + figures(3), 1, marks=slow),
  ("generate", r"batch 2, prompt \d+, (?:H3|hybrid|Transformer)" + figures(6), 6),
  ("start", r"\w+.*: first step after 1.0 s", 2)]

@pytest.mark.parametrize("command,row,rows", BENCHES)
def test_benchmarks(command, row, rows, monkeypatch, printed):
  "Each prints its rows, at small sizes."
  sizes = dict(STEPS=4, TURN=0, STATES=[(8, 40)], SIZES=((1, 3), (4, 8), (9, 40)),
               NUMBERS=(99, 400), PROMPTS=(16, 24), PIECES={2: 4}, TOKENS=3)
  command, job = re.fullmatch("(train )?(.*)", command).groups()
  for name, value in (sizes | dict(child=child_here, copying=float)).items():
    monkeypatch.setattr(bench, name, value)
  if command:
    for jobs in ("JOBS", "CPU_JOBS", "GPU_JOBS"): monkeypatch.setattr(bench, jobs, {job: JOBS[job]})
  monkeypatch.setattr(H3Config, "named", lambda size: TWIN)
  if job == "generate":              # sessions have a test of their own
    def captured(session, shape, capacity):
      inputs = Tensor(np.zeros(shape, np.int32)).realize()
      return lambda tokens: Tensor(np.zeros((2, 20))), inputs
    monkeypatch.setattr(gen.Session, "captured", captured)
  said = printed(bench, command or job)
  assert len(re.findall(f"^{row}$", said, re.M)) == rows, said

@pytest.mark.parametrize("device", ["CPU", "CUDA"])
def test_training_benchmark_of_a_device(device, monkeypatch, printed):
  "Its own jobs; on a GPU plain tinygrad is beside the first alone."
  begun = []
  def child(_, code:str, FLASH:str="1") -> list[str]:
    if "save" not in code: begun.append((re.search("'(.*?)'", code)[1], FLASH))
    return ["[1.0, 2.0]"]
  replaced = dict(child=child, copying=float, setup_device=lambda: None, torch_device=str)
  for name, value in replaced.items(): monkeypatch.setattr(bench, name, value)
  monkeypatch.setattr(bench, "Device", SimpleNamespace(DEFAULT=device))
  said = printed(bench, "train")
  jobs = bench.GPU_JOBS if device == "CUDA" else bench.CPU_JOBS
  plainly = [(next(iter(jobs)), "0")] * (device == "CUDA")
  assert {*begun} == {*((job, "1") for job in jobs), *plainly}
  assert all(f"{job}, ours" in said for job in jobs)

@pytest.mark.parametrize("command,words", [
  ("conv --lengths 0", "at least 1"), ("conv --lengths 99999", "at most 32768"),
  ("conv --batch x", "not a whole number"), ("states 0", "at least 1"),
  ("generate 9B", "no model is called '9B'"), ("fast", "invalid choice"),
  ("start", "failed: out of luck\n")])
def test_benchmarks_bad_input(command, words, monkeypatch, rejected):
  monkeypatch.setitem(bench.BENCHMARKS, "start", lambda: bench.child("-c", "exit('out of luck')"))
  rejected(bench, command, words)

def test_all_benchmarks_in_turn(monkeypatch, rejected):
  "Without a command; the first that fails ends it, with its status."
  commands = []
  def run(command:list[str]) -> SimpleNamespace:
    commands.append(command[-1])
    return SimpleNamespace(returncode=3*(command[-1] == "train"))
  with monkeypatch.context() as m:
    m.setattr(subprocess, "run", run)
    assert bench.main([]) == 3 and commands == ["conv", "states", "train"]
  with Context(FLASH=0): rejected(bench, "conv", "FLASH=0 turns off")

# ================================================================ which file imports which

# Each file's place; it may import what has a smaller one. support/cpu.py is called by the programs'
# first lines, and from_pretrained hands over to support/checkpoints.py inside the function.
ROOMS = {"flashconv": 0, "support.text": 0, "support.compiling": 0, "support.cpu": 1, "h3tiny": 1,
         "bigs_tiny": 2, "support.checkpoints": 3, "support.heads": 4, "generate": 5,
         "support.training": 6, "train": 7, "papers.grid": 8, "support.bench": 8,
         "papers.synthetic": 9, "papers": 10, "test_all": 11}
DOORS = {("flashconv", "support.cpu"), ("h3tiny", "support.checkpoints"),
         ("bigs_tiny", "support.checkpoints")}

def test_imports_go_downward():
  "No circle, and nobody imports a test."
  files = [f for pattern in ("*.py", "support/*.py", "papers/*.py") for f in HERE.glob(pattern)]
  names = {".".join(f.relative_to(HERE).with_suffix("").parts): f for f in files}
  room = lambda name: ROOMS.get(name, ROOMS.get(name.split(".")[0]))
  for name, file in names.items():
    tree = ast.parse(file.read_text())
    functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)]
    inside = {id(n) for f in functions for n in ast.walk(f)}
    for node in ast.walk(tree):
      if not isinstance(node, (ast.Import, ast.ImportFrom)): continue
      found = {a.name for a in node.names}
      if isinstance(node, ast.ImportFrom):
        found = {node.module, *(f"{node.module}.{name}" for name in found)}
      for other in names.keys() & found:
        through_a_door = (name, other) in DOORS and id(node) in inside
        assert through_a_door or room(other) < room(name), f"{name} imports {other}"

# ================================================================ the README

@slow
def test_readme_loop_of_ones_own(tmp_path, monkeypatch, capsys):
  "as written, and without TinyJit: it prints the same losses, and learns"
  monkeypatch.chdir(tmp_path)
  Path("book.txt").write_text(TEXT*20)
  loop = readme_python("setup_device()")
  exec(loop, {})
  exec(loop.replace("@TinyJit\n", ""), {})
  losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
  assert len(losses) == 40 and np.isfinite(losses).all()
  assert losses[19] < losses[0]/2
  near(np.array(losses[20:]), np.array(losses[:20]), 1e-5)

def readme_commands(file:str="README.md") -> dict[str, list[str]]:
  "A README's commands, by section."
  sections = (HERE/file).read_text().split("\n## ")
  blocks = {s.split("\n")[0]: "".join(re.findall(r"```sh\n(.*?)```", s, re.S)) for s in sections}
  return {title: block.splitlines() for title, block in blocks.items() if block}

# What makes a command short: of the patterns that match, all options, the last ones count.
SHORT = [
  (r"train\.py|--task", "--batch 2 --length 48 --sample 0 --steps 1"),
  (r"(train\.py|--task)(?!.*(--init|--resume))",
   "--d-model 16 --n-layer 1 --n-heads 2 --d-state 4"),
  (r"--accumulate", "--batch 4"), (r"--truncate", "--truncate 24"), (r"--resume", "--steps 2"),
  (r"generate\.py", "--tokens 2"), (r"generate\.py.*--perplexity", "--window 16"),
  (r"--model (125M|1\.3B)", "--tokenizer bytes"), (r"--render", "--lengths 64"),
  (r"bench\.py conv", "--lengths 40 --batch 1 --channels 8 --plain 0")]
PROGRAMS = {
  "train.py": train, "generate.py": gen, "flashconv.py": flashconv, "support/bench.py": bench,
  "papers/bigs.py": bigs, "papers/finetune.py": finetune, "papers/layer.py": layer,
  "papers/synthetic.py": synthetic}

@pytest.fixture
def readers_files(tmp_path, monkeypatch):
  "The files that the README's commands name, and a released model in place of a download."
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "stdin", None)
  for m in (flashconv, cpu): monkeypatch.setattr(m, "selfcheck", lambda *a: 0.0)
  for folder in ("notes", "released", "out"): Path(folder).mkdir()
  for name in ("book.txt", "other.txt", "notes/a.md"): Path(name).write_text(TEXT)
  for name in ("train.tsv", "dev.tsv"): tsv(Path(name), [("a", "text"), ("b", "other")]*5)
  Path("boolq.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 1}\n'*5)
  model, released = H3LM(H3Config(257, 12, 2, (1,), 2)), tmp_path/"released"/"model.safetensors"
  meta = {"model": "h3", "config": json.dumps(dataclasses.asdict(model.config))}
  save_official(str(released), model)
  save_checkpoint(str(at(Path("out"))), get_state_dict(model), meta)
  monkeypatch.setattr(checkpoints, "download", lambda name: released)

@slow
@pytest.mark.parametrize("section", readme_commands())
def test_readme_commands(section, readers_files):
  "Each command runs as written, made short; what installs and tests is looked up instead."
  extras = re.findall(r"^(\w+) = \[", (HERE/"pyproject.toml").read_text(), re.M)
  if section != "Released models": shutil.rmtree("out")                   # the default run makes it
  for command in readme_commands()[section]:
    for part in re.split(r" && | \| ", command):
      words = [w.removeprefix(".venv/bin/") for w in shlex.split(part)]
      switches = [*itertools.takewhile(lambda w: "=" in w, words)]
      first, *rest = words[len(switches):]
      if first == "pip": assert {*re.findall(r"\w+", rest[-1])} <= {*extras}, command
      elif first == "python" and rest[0] in PROGRAMS:
        if "--plot" in rest and not MATPLOTLIB: continue
        options = [o for pattern, more in SHORT if re.search(pattern, part) for o in more.split()]
        with Context(**{name: int(value) for name, value in (s.split("=") for s in switches)}):
          assert PROGRAMS[rest[0]].main([*rest[1:], *options]) == 0, command
      else: assert re.match(r"(python3? -m (venv|pytest))|source|echo", " ".join(words)), command
