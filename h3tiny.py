"""H3 ("Hungry Hungry Hippos") language models: pure H3, hybrid and Transformer in one class.

Paper: Fu, Dao et al. 2022, "Hungry Hungry Hippos: Towards Language Modeling with State Space
Models", arXiv 2212.14052, section 3 (the layer). Official code, cited below as file:line:
github.com/HazyResearch/H3. `python train.py` trains one of these, `python generate.py` writes.

Glossary. B batch, L length, V vocabulary, and then
  symbol      shape         paper, official name
  d_model, D  D             width of the model; D is also an SSM's skip vector, as in the paper
  p           head_dim      size of a head of the H3 layer: its k v^T has p*p entries
  H           D/p           number of diagonal SSMs
  N, M        d_state, N/2  state size; complex modes kept, one of each conjugate pair
  A, B, C     (H,M)         the diagonal SSM x' = A x + B u, y = 2 Re C x, in continuous time
  dt          (H,)          its time step, kept as log_dt
  dA, dB      (H,M)         the same discretised (bilinear): x_t = dA x_{t-1} + dB u_t
  K           (H,L)         its filter, K[l] = 2 Re sum_n C dB dA^l
  S           (D,N)         filter of the shift SSM, S[i] = sum_m B[m] C[m+i]
A complex tensor is a pair (re, im): tinygrad has no complex dtype.

Not here: ZOH discretisation and HiPPO measures other than diag-lin: no released model uses them.
"""
from __future__ import annotations
import dataclasses, functools, math
from types import SimpleNamespace
from typing import Iterator, NamedTuple
import numpy as np
from tinygrad import Tensor
from flashconv import Pair, Vandermonde, cmul, constant, fftconv, ssm_conv, stored
from support.cpu import (attend_step, causal_softmax, embedding, h3_step, layernorm, matmul, softmax,
                         write)

BY_FFT = 2048     # sequences up to this length go through the FFT in training, longer ones by state passing (README)
State = tuple[Tensor, ...]  # of a mixer: () where there is none. Of the model: see H3LM.init_state

# ---------------------------------------------------------------- configuration

@dataclasses.dataclass
class H3Config:
  """Everything that fixes a model's shape. ValueError, one sentence, if the values can't be.

  `H3Config.named("125M")` and the like give the released shapes (examples/README.md:10-77).
  """
  vocab_size: int = 257
  d_model: int = 128
  n_layer: int = 4
  attn_layers: tuple[int, ...] = ()  # which layers are attention; all: a Transformer
  n_heads: int = 4                   # attention heads
  rotary_dim: int = 0                # leading dimensions of a head that are rotated
  d_state: int = 64                  # N
  head_dim: int = 1                  # p of the H3 layers
  mlp_mult: int = 4
  norm_eps: float = 1e-5
  embed_dropout: float = 0.0
  resid_dropout: float = 0.0
  init_std: float = 0.02             # of the first weights of matrices and embeddings
  pad_vocab_multiple: int = 8
  head_order: str = "d2h"            # output channel if p > 1: "d2h" d2*H+h, "hd2" h*p+d2
  max_length: int = 2048             # positions of the KV cache; training may be longer
  max_positions: int = 0             # rows of a table of learned positions, past which a text can't go; 0: none
  ssm: str = "h3"                    # what is no attention: "h3", or "s4d", a diagonal SSM that nothing gates

  def __post_init__(self):
    self.attn_layers = tuple(sorted(set(self.attn_layers)))
    for f in ("vocab_size", "d_model", "n_layer", "n_heads", "d_state", "head_dim", "mlp_mult",
              "pad_vocab_multiple", "max_length"):
      if not isinstance(getattr(self, f), int) or getattr(self, f) < 1:
        raise ValueError(f"{f} must be a whole number of at least 1, not {getattr(self, f)!r}.")
    for i in self.attn_layers:
      if not 0 <= i < self.n_layer:
        raise ValueError(f"attn_layers names layer {i}, but the layers are 0 to {self.n_layer-1}.")
    for f in ("n_heads", "head_dim"):
      if self.d_model % (n := getattr(self, f)):
        raise ValueError(f"d_model ({self.d_model}) must be a multiple of {f} ({n}).")
    if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.d_model // self.n_heads:
      raise ValueError(f"rotary_dim must be even and at most the attention head's size "
                       f"({self.d_model // self.n_heads}), not {self.rotary_dim}.")
    if not isinstance(self.max_positions, int) or self.max_positions < 0:
      raise ValueError(f"max_positions must be a whole number of at least 0, not {self.max_positions!r}.")
    if self.d_state % 2: raise ValueError(f"d_state must be even, not {self.d_state}.")
    for f in ("norm_eps", "init_std"):
      if not getattr(self, f) > 0: raise ValueError(f"{f} must be above 0, not {getattr(self, f)}.")
    for f in ("embed_dropout", "resid_dropout"):
      if not 0 <= (rate := getattr(self, f)) < 1:
        raise ValueError(f"{f} must be at least 0 and below 1, not {rate}.")
    if self.ssm not in ("h3", "s4d"): raise ValueError(f"ssm must be 'h3' or 's4d', not {self.ssm!r}.")
    if self.head_order not in ("d2h", "hd2"):
      raise ValueError(f"head_order must be 'd2h' or 'hd2', not {self.head_order!r}.")

  @property
  def padded_vocab(self) -> int:
    "Rows of the embedding and columns of the logits."
    return -(-self.vocab_size // self.pad_vocab_multiple) * self.pad_vocab_multiple

  @staticmethod
  def named(name:str) -> H3Config:
    "The released shapes: 125M, 355M, 1.3B, 2.7B, 2.7B-rotary. ValueError for another name."
    shapes = {  # d_model, n_layer, n_heads, attn_layers, rotary_dim
      "125M": (768, 12, 12, (6,), 0), "355M": (1024, 24, 16, (8, 16), 0),
      "1.3B": (2048, 24, 16, (8, 16), 0), "2.7B": (2560, 32, 20, (8, 16, 24), 0),
      "2.7B-rotary": (2560, 32, 20, (10, 21), 64)}
    if name not in shapes:
      raise ValueError(f"no model is called {name!r}, only {', '.join(shapes)}.")
    d, n, heads, attn, rot = shapes[name]
    return H3Config(50257, d, n, attn, heads, rot, embed_dropout=0.1)

# ---------------------------------------------------------------- pieces

def param(x:np.ndarray) -> Tensor:
  "A parameter of these values; of none, without memory, if they are a Blank's."
  x = np.asarray(x, dtype=np.float32)
  return Tensor.empty(*x.shape) if x.size > 1 and not any(x.strides) else Tensor(x).realize()

class Blank:
  "In place of a random generator: for parameters whose values are in a file."
  def normal(self, _, __, size) -> np.ndarray: return np.broadcast_to(np.float32(0), size)
  uniform = normal

class Linear:
  "x (…,in) -> (…,out). weight (out,in), bias (out,)."
  def __init__(self, n_in:int, n_out:int, rng:np.random.Generator, std:float):
    self.weight, self.bias = param(rng.normal(0, std, (n_out, n_in))), param(np.zeros(n_out))
  def __call__(self, x:Tensor) -> Tensor:
    return matmul(x, self.weight, transposed=True, bias=self.bias)

class LayerNorm:
  def __init__(self, d:int, eps:float):
    self.weight, self.bias, self.eps = param(np.ones(d)), param(np.zeros(d)), eps
  def __call__(self, x:Tensor) -> Tensor: return layernorm(x, self.weight, self.bias, self.eps)

# ---------------------------------------------------------------- the two SSMs

def correlate(b:Tensor, c:Tensor) -> Tensor:
  "y[i] = sum_m b[m] c[m+i], i < N, for each row of b and c (D,N): (D,N). A convolution with b reversed."
  N = c.shape[-1]
  return fftconv(c.pad((None, (0, N-1))).unsqueeze(0), b.flip(-1))[0, :, N-1:]

def fit(x:Tensor, L:int) -> Tensor:
  "The last axis cut, or filled with zeros, to length L."
  return x[..., :L].pad((None,)*(x.ndim-1) + ((0, max(0, L - x.shape[-1])),))

class ShiftSSM:
  """s_t = shift(s_{t-1}) + B k_t, y_t = C s_t: a causal FIR filter of N taps.

  B (D,N) starts as e_1 and is trained, C (1,D,N). The state s is (B,D,N).
  src/models/ssm/ss_kernel_shift.py:33-83.
  """
  def __init__(self, D:int, N:int, rng:np.random.Generator):
    self.B = param(np.eye(1, N).repeat(D, axis=0))
    self.C = param(rng.uniform(-1, 1, (1, D, N)) / N**0.5)

  def filter(self) -> Tensor: return correlate(self.B, self.C[0])

  def answer(self, s:Tensor, L:int) -> Tensor:
    "What the next L outputs owe to the state s: sum_j C[j+l+1] s[j].  (B,D,L)"
    N = s.shape[-1]                                                 # s as inputs, the oldest first, and then zeros
    return fit(fftconv(s.flip(-1).pad((None, None, (0, N-1))), self.C[0])[..., N:], L)

  def after(self, s:Tensor, k:Tensor) -> Tensor:
    "State after inputs k (B,D,L): s[j] = s_old[j-L] + sum_{i<=j} B[j-i] k[L-1-i]."
    N, L = s.shape[-1], k.shape[-1]
    new = fftconv(fit(k[..., max(0, L-N):].flip(-1), N), self.B)    # along j: the newest input first
    return new if L >= N else new + s.pad((None, None, (L, 0)))[..., :N]

  def step(self, s:Tensor, k:Tensor) -> tuple[Tensor, Tensor]:
    "One input k (B,D): output (B,D) and the new state."
    s = s.pad((None, None, (1, 0)))[..., :-1] + self.B * k.unsqueeze(-1)
    return (s * self.C[0]).sum(-1), s

class DiagSSM:
  """x_t = dA x_{t-1} + dB u_t, y_t = 2 Re C x_t. The state x is a pair of (…,H,M).

  C (1,H,M,2) and B (H,M,2) hold (re, im) on the last axis; A = -exp(inv_A_real) + i A_imag, (H,M);
  log_dt (H,). src/models/ssm/ss_kernel_diag.py:107-246.
  """
  def __init__(self, H:int, N:int, rng:np.random.Generator):
    M = N // 2
    self.C = param(rng.normal(0, 0.5**0.5, (1, H, M, 2)))           # E|C|^2 = 1
    self.log_dt = param(rng.uniform(math.log(0.001), math.log(0.1), H))
    self.B = param(np.broadcast_to([1.0, 0.0], (H, M, 2)))
    # diag-lin, A = -1/2 + i pi n: src/models/ssm/dplr.py:21,34
    self.inv_A_real = param(np.full((H, M), math.log(0.5)))
    self.A_imag = param(np.broadcast_to(np.pi * np.arange(M), (H, M)))

  def discretize(self) -> tuple[Pair, Pair, Pair]:
    "dA, dB, C, pairs of (H,M). Bilinear: z = dt A/2, dA = (1+z)/(1-z), dB = dt B/(1-z)."
    dt = self.log_dt.exp().unsqueeze(-1)
    zr, zi = -0.5 * dt * self.inv_A_real.exp(), 0.5 * dt * self.A_imag
    inv = 1 / ((1-zr)*(1-zr) + zi*zi)                               # 1/|1-z|^2 < 1, as zr < 0
    dA = ((1 - zr*zr - zi*zi) * inv, 2 * zi * inv)
    dB = cmul((self.B[..., 0], self.B[..., 1]), (dt * (1-zr) * inv, dt * zi * inv))
    return dA, dB, (self.C[0, ..., 0], self.C[0, ..., 1])

  def filter(self, L:int) -> Tensor:
    "K (H,L)."
    dA, dB, C = self.discretize()
    return Vandermonde(dA, L).sum(cmul(C, dB))

def diag_step(x:Pair, u:Tensor, tables:tuple[Tensor, ...]) -> tuple[Tensor, Pair]:
  "One input u (…,H): output (…,H) and the new state, a pair of (…,H,M). tables: dA, dB, C, re and im."
  dA, dB, C = tables[:2], tables[2:4], tables[4:]
  re, im = cmul(dA, x)
  re, im = re + dB[0]*u.unsqueeze(-1), im + dB[1]*u.unsqueeze(-1)
  return 2 * (C[0]*re - C[1]*im).sum(-1), (re, im)

def long_conv(ssm:DiagSSM, w:Tensor, K:Tensor|None, D:Tensor, state:State=(), **gates:Tensor) -> tuple[Tensor, State]:
  """The convolution of w (B,H,L) with a diagonal SSM's filter: by FFT, if K, the filter, is given, or by state passing.
  state: two of B H M numbers, in any shape, before and after; () for none."""
  if K is not None and not state: return fftconv(w, K, D, **gates), ()
  x = tuple(t.reshape(w.shape[0], *t.shape[-2:]) for t in state) or None
  y, x = ssm_conv(w, *ssm.discretize(), D, **gates, state=x)
  return y, tuple(new.reshape(old.shape) for new, old in zip(x, state))

def joined(ssms:list) -> ShiftSSM|DiagSSM:
  "One SSM with the channels of all: the filters of all layers then cost one layer's launches."
  one = object.__new__(type(ssms[0]))
  for name in vars(ssms[0]):
    setattr(one, name, Tensor.cat(*[getattr(s, name) for s in ssms], dim=1 if name == "C" else 0))
  return one

# ---------------------------------------------------------------- mixers: H3 and attention
# mixer(u, state, place, filters, tables) -> (y, state): a sequence u (B,L,D), or one token u (B,D),
# the state before and after. With () for the state none comes out and nothing is spent on it.
# What depends on the weights alone may be made once for many calls: filters, for a sequence, by
# H3LM.filters; tables, for a token, by H3LM.tables. Each is left alone where the other is needed.

Filters = tuple[Tensor, Tensor|None]|None        # S and K; K None: state passing takes its place
Tables = tuple[Tensor, ...]|None                 # dA, dB, C, re and im

class Place(NamedTuple):
  "Where in its text a piece stands."
  pos: Tensor              # (1,) int: positions before it
  start: Tensor|None       # (B,) int: the position where the text begins, after padding; None: 0
  room: int                # at least pos + L: how much of the attention caches is looked at
  def positions(self, L:int) -> Tensor:
    "Of the next L tokens, (L,) int, or (B,L); in the padding before a text 0."
    t = Tensor.arange(L) + self.pos
    return t if self.start is None else (t - self.start.unsqueeze(-1)).maximum(0)

class H3Mixer:
  """y = Wo( q * DiagSSM( ShiftSSM(k) * v ) ), per channel; with p > 1, k v^T q per head.

  State: (shift (B,D,N), re (B,p,p,H,M), im (B,p,p,H,M)), constant in length.
  src/models/ssm/h3.py:73-206.
  """
  def __init__(self, cfg:H3Config, rng:np.random.Generator):
    D, self.p, self.head_order = cfg.d_model, cfg.head_dim, cfg.head_order
    self.q_proj, self.k_proj, self.v_proj = (Linear(D, D, rng, cfg.init_std) for _ in range(3))
    self.ssm_k_kernel = SimpleNamespace(kernel=ShiftSSM(D, cfg.d_state, rng))
    self.ssm_k_D = param(rng.normal(0, 1, D))
    self.kernel = SimpleNamespace(kernel=DiagSSM(D // self.p, cfg.d_state, rng))
    self.D = param(rng.normal(0, 1, D // self.p))
    self.output_linear = Linear(D, D, rng, cfg.init_std)

  def state_shapes(self, cfg:H3Config, batch:int, capacity:int) -> list[tuple[int, ...]]:
    x = (batch, self.p, self.p, cfg.d_model // self.p, cfg.d_state // 2)
    return [(batch, cfg.d_model, cfg.d_state), x, x]

  def split(self, x:Tensor, row:bool) -> Tensor:
    "Channel h*p + d to (B,p,1,H,…), the row index d1 of k v^T, or (B,1,p,H,…), its column d2."
    x = x.reshape(x.shape[0], -1, self.p, *x.shape[2:]).transpose(1, 2)
    return x.unsqueeze(2 if row else 1)

  def join(self, x:Tensor) -> Tensor:
    "(B,p,H,…) to channels, d2*H + h or h*p + d2 (h3.py:153; src/ops/fftconv.py:48)."
    if self.head_order == "hd2": x = x.transpose(1, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])

  def __call__(self, u:Tensor, state:State=(), place:Place|None=None, filters:Filters=None,
               tables:Tables=None) -> tuple[Tensor, State]:
    if u.ndim == 2: return self.step(u, state, tables)
    (B, L, _), shift, diag, p = u.shape, self.ssm_k_kernel.kernel, self.kernel.kernel, self.p
    q, k, v = (f(u) for f in (self.q_proj, self.k_proj, self.v_proj))                    # (B,L,D)
    # with k = 0 both states stay 0: padding before a text changes nothing
    if place and place.start is not None:
      k = k * (place.pos + Tensor.arange(L) >= place.start.unsqueeze(-1)).unsqueeze(-1)
    S, K = filters or (shift.filter(), None)
    kp = fftconv(k, S, self.ssm_k_D, channels_last=True)
    q, k, v, kp = (x.transpose(1, 2) for x in (q, k, v, kp))        # (B,D,L)
    if state: kp = kp + shift.answer(state[0], L)
    if p == 1: y, x = long_conv(diag, kp, K, self.D, state[1:], v=v, q=q)
    else:
      kv = self.split(kp, True) * self.split(v, False)              # (B,p,p,H,L)
      y, x = long_conv(diag, kv.reshape(B*p*p, *kv.shape[-2:]), K, self.D, state[1:])
      y = self.join((self.split(q, True) * y.reshape(kv.shape)).sum(1))               # (B,D,L)
    return self.output_linear(y.transpose(1, 2)), (shift.after(state[0], k), *x) if state else ()

  def tables(self) -> tuple[Tensor, ...]:
    "dA, dB, C of the diagonal SSM, re and im, (H,M) each."
    return tuple(stored(x) for pair in self.kernel.kernel.discretize() for x in pair)

  def step(self, u:Tensor, state:State, tables:Tables) -> tuple[Tensor, State]:
    q, k, v = self.q_proj(u), self.k_proj(u), self.v_proj(u)        # (B,D)
    shift, tables = self.ssm_k_kernel.kernel, tables or self.tables()
    if self.p == 1:                # one kernel that overwrites the state, where there is one
      x = [t.reshape(t.shape[0], *t.shape[-2:]) for t in state]
      if fused := h3_step(q, k, v, x, (shift.B, shift.C[0], self.ssm_k_D, *tables, self.D)):
        return self.output_linear(fused[0]), tuple(t.reshape(s.shape) for t, s in zip(fused[1], state))
    kp, s = shift.step(state[0], k)
    kv = self.split(kp + self.ssm_k_D * k, True) * self.split(v, False)  # (B,p,p,H)
    y, x = diag_step(state[1:], kv, tables)
    y = self.join((self.split(q, True) * (y + self.D * kv)).sum(1))
    return self.output_linear(y), (s, *x)

class S4DMixer:
  """y = Wo gelu( DiagSSM(u) ), a diagonal SSM for each channel that nothing gates: what H3 is compared with.

  State: re and im (B,D,M). Gu, Goel, Gupta, Ré 2022, "On the Parameterization and Initialization of Diagonal State
  Space Models", arXiv 2206.11893, with H3's discretisation."""
  def __init__(self, cfg:H3Config, rng:np.random.Generator):
    D = cfg.d_model
    self.kernel = SimpleNamespace(kernel=DiagSSM(D, cfg.d_state, rng))
    self.D, self.output_linear = param(rng.normal(0, 1, D)), Linear(D, D, rng, cfg.init_std)
  tables = H3Mixer.tables
  def state_shapes(self, cfg:H3Config, batch:int, capacity:int) -> list[tuple[int, ...]]:
    return [(batch, cfg.d_model, cfg.d_state // 2)] * 2
  def __call__(self, u:Tensor, state:State=(), place:Place|None=None, filters:Filters=None,
               tables:Tables=None) -> tuple[Tensor, State]:
    if u.ndim == 2:
      y, state = diag_step(state, u, tables or self.tables())
      return self.output_linear((y + self.D*u).gelu()), state
    if place and place.start is not None:
      u = u * (place.pos + Tensor.arange(u.shape[1]) >= place.start.unsqueeze(-1)).unsqueeze(-1)
    y, state = long_conv(self.kernel.kernel, u.transpose(1, 2), filters and filters[1], self.D, state)
    return self.output_linear(y.transpose(1, 2).gelu()), state

@functools.cache
def rotary_tables(n:int, dim:int, device:str) -> tuple[Tensor, Tensor]:
  "cos and sin of t * 10000^(-2j/dim), (n, dim/2) each, for t < n."
  angle = np.outer(np.arange(n), 10000.0 ** (-np.arange(0, dim, 2) / dim))
  return tuple(constant(f(angle), device) for f in (np.cos, np.sin))

class Attention:
  """Softmax attention, causal unless told, with rotary positions (half-split) where rotary_dim > 0.

  State: keys and values so far, (B,heads,T,hd) each, T the capacity; keys are kept rotated.
  flash-attention 33e0860c, flash_attn/modules/mha.py:346-522 and layers/rotary.py:125-202.
  """
  def __init__(self, cfg:H3Config, rng:np.random.Generator, causal:bool=True):
    D, self.n_heads, self.rotary_dim, self.causal = cfg.d_model, cfg.n_heads, cfg.rotary_dim, causal
    self.Wqkv = Linear(D, 3*D, rng, cfg.init_std)
    self.out_proj = Linear(D, D, rng, cfg.init_std / (2*cfg.n_layer)**0.5)

  def state_shapes(self, cfg:H3Config, batch:int, capacity:int) -> list[tuple[int, ...]]:
    return [(batch, cfg.n_heads, capacity, cfg.d_model // cfg.n_heads)] * 2

  def qkv(self, u:Tensor, place:Place|None) -> list[Tensor]:
    "u (B,L,D) to q, k, v (B,heads,L,hd), q and k rotated as their positions ask for."
    B, L, D = u.shape
    x = self.Wqkv(u).reshape(B, L, 3, self.n_heads, D // self.n_heads).permute(2, 0, 3, 1, 4)
    q, k, v = x[0], x[1], x[2]
    if (r := self.rotary_dim // 2) == 0: return [q, k, v]
    angles = rotary_tables(place.room if place else L, 2*r, u.device)
    if place:
      t = place.positions(L)
      if t.ndim == 2: t = t.unsqueeze(1)                            # (B,1,L)
      angles = (embedding(t, w) for w in angles)
    cos, sin = angles                                               # (L,r) or (B,1,L,r)
    def rotate(x:Tensor) -> Tensor:                                 # dims j and r+j are a pair
      a, b, rest = x[..., :r], x[..., r:2*r], x[..., 2*r:]
      return Tensor.cat(a*cos - b*sin, a*sin + b*cos, *[rest] * (x.shape[-1] > 2*r), dim=-1)
    return [rotate(q), rotate(k), v]

  def __call__(self, u:Tensor, state:State=(), place:Place|None=None, filters:Filters=None,
               tables:Tables=None) -> tuple[Tensor, State]:
    q, k, v = self.qkv(u.unsqueeze(1) if u.ndim == 2 else u, place)
    if state:
      state = tuple(write(cache, x, place.pos) for cache, x in zip(state, (k, v)))
      if u.ndim == 2:
        return self.out_proj(attend_step(q.squeeze(2), *state, place.pos, place.start).flatten(1)), state
      k, v = (cache[:, :, :place.room] for cache in state)
    s = matmul(q * q.shape[-1]**-0.5, k, transposed=True)           # (B,heads,L,T)
    p = causal_softmax(s, place.pos, place.start) if state else causal_softmax(s) if self.causal else softmax(s)
    return self.out_proj(matmul(p, v).transpose(1, 2).flatten(2)), state

# ---------------------------------------------------------------- the language model

class MLP:
  "D -> mlp_mult D -> D with the tanh approximation of GELU (src/models/ssm_seq.py:44-45)."
  def __init__(self, cfg:H3Config, rng:np.random.Generator):
    self.fc1 = Linear(cfg.d_model, cfg.mlp_mult * cfg.d_model, rng, cfg.init_std)
    self.fc2 = Linear(cfg.mlp_mult * cfg.d_model, cfg.d_model, rng, cfg.init_std / (2*cfg.n_layer)**0.5)
  def __call__(self, x:Tensor) -> Tensor: return self.fc2(self.fc1(x).gelu())

class Block:
  "x + mixer(norm1 x), then + mlp(norm2 x): pre-norm (flash_attn/modules/block.py:102-150)."
  def __init__(self, cfg:H3Config, i:int, rng:np.random.Generator):
    self.dropout = cfg.resid_dropout
    self.norm1, self.norm2 = (LayerNorm(cfg.d_model, cfg.norm_eps) for _ in range(2))
    self.mixer = (Attention if i in cfg.attn_layers else {"h3": H3Mixer, "s4d": S4DMixer}[cfg.ssm])(cfg, rng)
    self.mlp = MLP(cfg, rng)

  def __call__(self, x:Tensor, state:State=(), place:Place|None=None, filters:Filters=None,
               tables:Tables=None) -> tuple[Tensor, State]:
    y, state = self.mixer(self.norm1(x), state, place, filters, tables)
    x = x + y.dropout(self.dropout)
    return x + self.mlp(self.norm2(x)).dropout(self.dropout), state

def copied(state:State) -> State: return tuple(t.clone().realize() for t in state)

class H3LM:
  """Language model of H3 and attention layers (src/models/ssm_seq.py:104-190).

  V below is `config.padded_vocab`. `nn.state.get_state_dict(model)` gives the official names and
  shapes without lm_head.weight, which is the word embedding itself, and the constant
  rotary_emb.inv_freq. Parameters are float32, drawn by numpy from `seed`; None: the matrices are without values, for
  `load_weights`.
  """
  def __init__(self, config:H3Config, seed:int|None=0):
    self.config, d = config, config.d_model
    rng = Blank() if seed is None else np.random.default_rng(seed)
    table = lambda rows: SimpleNamespace(weight=param(rng.normal(0, config.init_std, (rows, d))))
    embeddings = {"word_embeddings": table(config.padded_vocab)}
    if config.max_positions: embeddings["position_embeddings"] = table(config.max_positions)
    self.backbone = SimpleNamespace(
      embeddings=SimpleNamespace(**embeddings),
      layers=[Block(config, i, rng) for i in range(config.n_layer)],
      ln_f=LayerNorm(d, config.norm_eps))

  def embed(self, tokens:Tensor, place:Place|None=None) -> Tensor:
    """Words, and learned positions if there are any: tokens (B,L), or (B,), -> (B,L,D), or (B,D). ValueError for more
    tokens than positions."""
    e, L = self.backbone.embeddings, 1 if tokens.ndim == 1 else tokens.shape[1]
    x = embedding(tokens, e.word_embeddings.weight)
    if n := self.config.max_positions:
      if place is None and L > n: raise ValueError(f"{L} tokens where the model has positions for {n}.")
      table = e.position_embeddings.weight
      rows = table[:L] if place is None else embedding(place.positions(L), table)     # (L,D) or (B,L,D)
      x = x + (rows if tokens.ndim > 1 else rows.squeeze(-2))
    return x.dropout(self.config.embed_dropout)

  def head(self, x:Tensor) -> Tensor:
    words = self.backbone.embeddings.word_embeddings.weight
    return matmul(self.backbone.ln_f(x), words, transposed=True)

  def __call__(self, tokens:Tensor) -> Tensor:
    "tokens (B,L) int -> logits (B,L,V); logits[:, t] are for token t+1."
    return self.forward(tokens)[0]

  def forward(self, tokens:Tensor, state:State=()) -> tuple[Tensor, State]:
    """Logits as above, for training, and the state after, if one is given: the H3 layers', `init_state(B)[1:]`.
    Differentiable in both. ValueError for a state where there is attention: `prefill` knows its caches."""
    if 0 in tokens.shape: raise ValueError(f"tokens of shape {tokens.shape} hold no token.")
    if state and self.config.attn_layers: raise ValueError("attention layers have no state to train with.")
    if state and self.config.max_positions: raise ValueError("learned positions begin anew with each piece of a text.")
    x, filters, after = self.embed(tokens), self.filters(math.inf if state else tokens.shape[1]), []
    for i, layer in enumerate(self.backbone.layers):
      n = len(layer.mixer.state_shapes(self.config, 1, 1))
      of_layer = None if isinstance(layer.mixer, Attention) else next(filters)
      x, s = layer(x, state[n*i:n*i+n], filters=of_layer)
      after += s
    return self.head(x), tuple(after)

  def filters(self, L:float) -> Iterator[tuple[Tensor, Tensor|None]]:
    "S (D,N) and K (H,L) of each H3 layer in turn, all made at once. No K where state passing takes its place."
    mixers = [l.mixer for l in self.backbone.layers if not isinstance(l.mixer, Attention)]
    if not mixers: return iter(())
    S = [None]*len(mixers) if self.config.ssm == "s4d" else \
      stored(joined([m.ssm_k_kernel.kernel for m in mixers]).filter()).chunk(len(mixers))
    if L > BY_FFT: return zip(S, [None]*len(mixers))
    K = stored(joined([m.kernel.kernel for m in mixers]).filter(L))
    return zip(S, K.chunk(len(mixers)))

  def init_state(self, batch:int, max_length:int|None=None, start:list[int]|None=None) -> State:
    """The state before the first token, one flat tuple of realised Tensors (so TinyJit sees each):
    pos (1,) int32, the number of tokens so far, with `start` behind where each row's text begins, (B+1,);
    then for each H3 layer shift (B,D,N), re and im (B,p,p,H,M); for each attention layer keys and values
    (B,heads,max_length,hd). max_length is by default the config's. start: rows of different length are fed
    with as many tokens of padding before them, which change nothing."""
    T, state = max_length or self.config.max_length, [np.array([*(start or []), 0], np.int32)]
    for layer in self.backbone.layers:
      state += [np.zeros(s, np.float32) for s in layer.mixer.state_shapes(self.config, batch, T)]
    return tuple(Tensor(z).realize() for z in state)

  def tables(self) -> list[Tables]:
    "Of each layer, what a step needs that depends on the weights alone."
    made = [None if isinstance(l.mixer, Attention) else l.mixer.tables() for l in self.backbone.layers]
    if flat := [t for tables in made for t in tables or ()]: Tensor.realize(*flat)
    return made

  def advance(self, tokens:Tensor, state:State, room:int|None=None, tables:list[Tables]|None=None) -> Tensor:
    """One token, (B,) int, or a piece of text, (B,L): logits (B,V) after the last. Overwrites `state`.

    Never waits for the device, so TinyJit can capture it, with the state in its closure. It can't see a full
    attention cache for the same reason: the caller counts tokens against `capacity(state)`. room: how much of
    the caches a piece of text looks at, at least the tokens so far and its own; all by default.
    tables: what `tables()` gives; they serve a token, a piece of text makes filters of its own."""
    pos = state[0] if state[0].shape[0] == 1 else state[0][-1:].contiguous()
    start = None if pos is state[0] else state[0][:-1].contiguous()
    cap = self.capacity(state) or 1
    place, new, i = Place(pos, start, cap if tokens.ndim == 1 else min(room or cap, cap)), [], 1
    x = self.embed(tokens, place)
    for j, layer in enumerate(self.backbone.layers):
      n = len(layer.mixer.state_shapes(self.config, 1, 1))
      x, s = layer(x, state[i:i+n], place, tables=tables[j] if tables else None)
      new, i = new + list(s), i + n
    Tensor.realize(logits := self.head(x if x.ndim == 2 else x[:, -1].contiguous()), *new)
    # what a kernel has written in place is there already
    moved = [old.assign(s) for old, s in zip(state[1:], new) if s.uop.base is not old.uop.base]
    L, last = 1 if tokens.ndim == 1 else tokens.shape[1], Tensor.arange(n := state[0].shape[0]) == n - 1
    Tensor.realize(*moved, state[0].assign(last.where(state[0] + L, state[0])))
    return logits

  def prefill(self, tokens:Tensor, state:State|None=None, chunk:int|None=None
              ) -> tuple[Tensor, State]:
    """A prompt, or a piece of one: tokens (B,L) int -> logits (B,V) after the last, and the state.

    With `chunk` it is taken that many tokens at a time, which bounds the memory; the result is the
    same. ValueError if L is 0, or if an attention layer's cache, or the learned positions, would not hold it."""
    B, L = tokens.shape
    if L == 0: raise ValueError("the prompt is empty: prefill needs at least one token.")
    if chunk is not None and chunk < 1: raise ValueError(f"chunk must be at least 1, not {chunk}.")
    pos, state = (0, self.init_state(B)) if state is None else (int(state[0].numpy()[-1]), copied(state))
    if state[1].shape[0] != B:
      raise ValueError(f"tokens of batch {B}, but a state of batch {state[1].shape[0]}.")
    if self.config.attn_layers and pos + L > (T := self.capacity(state)):
      raise ValueError(f"{pos + L} tokens do not fit the attention cache of {T}: "
                       "make the state with a larger max_length.")
    padding = min(state[0].numpy()[:-1], default=0)
    if (n := self.config.max_positions) and pos + L - padding > n:
      raise ValueError(f"{pos + L - padding} tokens where the model has positions for {n}.")
    for i in range(0, L, step := chunk or L):
      piece = tokens[:, i:i+step]
      logits = self.advance(piece.contiguous(), state, 1 << (pos + i + piece.shape[1] - 1).bit_length())
    return logits, state

  def step(self, tokens:Tensor, state:State) -> tuple[Tensor, State]:
    "One token: tokens (B,) int -> logits (B,V), new state; like `advance`, but the state given stays as it is."
    return self.advance(tokens, state := copied(state)), state

  def capacity(self, state:State) -> int|None:
    "Tokens that the state's attention caches hold; None, no limit, without attention layers."
    return next((s.shape[2] for s in state if s.ndim == 4), None)   # keys and values alone have four dimensions

  @staticmethod
  def from_pretrained(path_or_name:str, n_heads:int|None=None, dtype:str="float32") -> H3LM:
    """The model in a file or folder, or a released one by its name ("125M", …), downloaded once.

    A file is a checkpoint of train.py, or holds official weights: .safetensors, or of torch.save's,
    plain or from PyTorch Lightning, under the names of today or the old ones. The shape of official
    weights is read off the tensors. n_heads: attention heads; by default they go by the width, or
    are what a config.json beside the file says. dtype: what the matrices are kept in, see
    `flashconv.WEIGHTS`; in anything but float32 a model can't be trained.
    Raises CheckpointError, one line, for anything else."""
    from support.checkpoints import find, h3_model, read_weights
    path = find(path_or_name)
    return h3_model(*read_weights(path), str(path), n_heads, dtype)
