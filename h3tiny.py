"""H3 ("Hungry Hungry Hippos") language models: pure H3, hybrid and Transformer in one class.

Paper: Fu, Dao et al. 2022, "Hungry Hungry Hippos: Towards Language Modeling with State Space
Models", arXiv 2212.14052, section 3 (the layer). Official code, cited below as file:line:
github.com/HazyResearch/H3. `python train.py` trains one of these, `python generate.py` writes.

The H3 layer. Linear attention computes q · Σ k v^T, summed over the past. H3 passes k through a
shift SSM, which remembers the last N tokens, and puts a diagonal SSM in the place of the sum:

  u (B,L,D) ─┬─ q_proj ───────────── q ────────────────────────┐
             ├─ k_proj ─ k ─ shift_ssm ─┐                      │
             │                          * ─ kv ─ diag_ssm ─ y ─ * ─ output_linear ─ (B,L,D)
             └─ v_proj ───────────── v ─┘
  H3State                    shift (B,D,N)         re, im (B,H,M): of one size at any length

  y = Wo( q * diag_ssm( shift_ssm(k) * v ) ),   ssm(x) = K ∗ x + D x     `h3_reference`, below

It runs in three ways, which agree to rounding:
  FFT            a whole sequence: each SSM is a convolution with its filter, `fftconv`
  state passing  a sequence longer than BY_FFT, or a piece that begins from a state: `ssm_conv`
  step           one token: x_t = dA x_{t-1} + dB u_t, `h3_step`
In the model it is a mixer: each block computes x = x + mixer(norm1 x), then x + mlp(norm2 x), with
H3, attention or an ungated SSM for its mixer. Logits are ln_f(x) times the word embeddings.

Glossary. B batch, L length, V vocabulary, and then
  symbol      shape         paper, official name
  d_model, D  D             width of the model; D is also an SSM's skip weight, as in the paper
  p           head_dim      channels of a head of the H3 layer: its k v^T has p*p entries
  H           D/p           number of diagonal SSMs
  N, M        d_state, N/2  state size; complex modes kept, one of each conjugate pair
  A, B, C     (H,M)         the diagonal SSM x' = A x + B u, y = 2 Re C x, in continuous time; its
                            input u is kv here, not the layer's u
  dt          (H,)          its time step, kept as log_dt
  dA, dB      (H,M)         A and B discretised (bilinear): x_t = dA x_{t-1} + dB u_t
  K           (H,L)         its filter, K[l] = 2 Re sum_n C dB dA^l
  S           (D,N)         filter of the shift SSM, S[i] = sum_m B[m] C[m+i]
With p > 1 the diagonal SSM runs on all p*p entries of k v^T, so re and im are (B p p,H,M).
A complex tensor is a pair (re, im): tinygrad has no complex dtype. A function marked @replaceable
is a definition in plain ops; on a CPU, and `h3_step` and `write_cache` on a GPU too, support/cpu.py
runs a faster version of it.

Not here: ZOH discretisation and HiPPO measures other than diag-lin: no released model uses them.
"""
from __future__ import annotations
import copy, dataclasses, functools, math
from types import SimpleNamespace
from typing import Iterator, NamedTuple
import numpy as np
from numpy.random import Generator
from tinygrad import Tensor, dtypes, nn
from tinygrad.engine.realize import capturing
from tinygrad.nn.state import get_parameters
from flashconv import (Pair, Vandermonde, cmul, fftconv, fftconv_ref, lookup, overwrite,
                       replaceable, ssm_conv, stored, to_device)

BY_FFT = 2048     # up to this length a sequence in training goes by FFT, past it by state passing

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
  attn_dropout: float = 0.0          # of the attention's weights, after the softmax
  init_std: float = 0.02             # standard deviation of initial matrices and embeddings
  pad_vocab_multiple: int = 8
  # output channel of coordinate d2 of head h, if p > 1: "d2h" d2*H + h, "hd2" h*p + d2
  head_order: str = "d2h"
  max_length: int = 2048             # capacity of the KV caches; training may be longer
  max_positions: int = 0             # learned positions, which limit a text's length; 0: none
  ssm: str = "h3"                    # layers without attention: "h3", or "s4d", an ungated SSM

  def __post_init__(self):
    self.attn_layers = tuple(sorted(set(self.attn_layers)))
    check_whole(self, "vocab_size", "d_model", "n_layer", "n_heads", "d_state", "head_dim",
                "mlp_mult", "pad_vocab_multiple", "max_length")
    check_whole(self, "max_positions", least=0)
    for i in self.attn_layers:
      require(0 <= i < self.n_layer,
              f"attn_layers names layer {i}, but the layers are 0 to {self.n_layer-1}.")
    for name in ("n_heads", "head_dim"):
      n = getattr(self, name)
      require(self.d_model % n == 0, f"d_model ({self.d_model}) must be a multiple of {name} ({n}).")
    size = self.d_model // self.n_heads
    require(self.rotary_dim % 2 == 0 and 0 <= self.rotary_dim <= size,
            "rotary_dim must be even and at most the attention head's size "
            f"({size}), not {self.rotary_dim}.")
    require(self.d_state % 2 == 0, f"d_state must be even, not {self.d_state}.")
    for name in ("norm_eps", "init_std"):
      value = getattr(self, name)
      require(value > 0, f"{name} must be above 0, not {value}.")
    for name in ("embed_dropout", "resid_dropout", "attn_dropout"):
      rate = getattr(self, name)
      require(0 <= rate < 1, f"{name} must be at least 0 and below 1, not {rate}.")
    check_choice(self, ssm=("h3", "s4d"), head_order=("d2h", "hd2"))

  @property
  def out_std(self) -> float:
    "Initial std of the matrices that write to the residual stream."
    return self.init_std / (2*self.n_layer)**0.5

  @property
  def padded_vocab(self) -> int:
    "Rows of the embedding and columns of the logits."
    return -(-self.vocab_size // self.pad_vocab_multiple) * self.pad_vocab_multiple

  @staticmethod
  def named(name:str) -> H3Config:
    "The released shapes: 125M, 355M, 1.3B, 2.7B, 2.7B-rotary. ValueError for another name."
    shapes = {  # d_model, n_layer, attn_layers, n_heads, rotary_dim if any
      "125M": (768, 12, (6,), 12),
      "355M": (1024, 24, (8, 16), 16),
      "1.3B": (2048, 24, (8, 16), 16),
      "2.7B": (2560, 32, (8, 16, 24), 20),
      "2.7B-rotary": (2560, 32, (10, 21), 20, 64)}
    require(name in shapes, f"no model is called {name!r}, only {', '.join(shapes)}.")
    return H3Config(50257, *shapes[name], embed_dropout=0.1)

def require(condition:bool, message:str) -> None:
  "Raises ValueError with this message unless the condition holds."
  if not condition: raise ValueError(message)

def check_whole(config:object, *names:str, least:int=1) -> None:
  "ValueError unless these fields are whole numbers of at least `least`."
  for name in names:
    n = getattr(config, name)
    require(isinstance(n, int) and n >= least,
            f"{name} must be a whole number of at least {least}, not {n!r}.")

def check_choice(config:object, **choices:tuple[str, ...]) -> None:
  "ValueError unless each field has one of the values allowed."
  for name, allowed in choices.items():
    value = getattr(config, name)
    require(value in allowed, f"{name} must be {' or '.join(map(repr, allowed))}, not {value!r}.")

# ---------------------------------------------------------------- parameters

def param(x:np.ndarray) -> Tensor:
  "Makes a parameter of these values; if they come from a Blank, one without values or memory."
  x = np.asarray(x, dtype=np.float32)
  blank = x.size > 1 and not any(x.strides)
  return Tensor.empty(*x.shape) if blank else to_device(x)

class Blank:
  "Takes the place of a random generator for parameters whose values are in a file."
  def normal(self, _, __, size) -> np.ndarray: return np.broadcast_to(np.float32(0), size)
  uniform = normal

# tinygrad's own layers; only their initial weights are numpy's, the same on every device
class Linear(nn.Linear):
  "x (…,in) -> (…,out). weight (out,in) ~ N(0, std), bias (out,) = 0."
  def __init__(self, n_in:int, n_out:int, rng:Generator, std:float):
    self.weight = param(rng.normal(0, std, (n_out, n_in)))
    self.bias = param(np.zeros(n_out))

class Embedding(nn.Embedding):
  "ids (…) -> (…,D). weight (rows,D) ~ N(0, std)."
  def __init__(self, rows:int, d_model:int, rng:Generator, std:float):
    self.weight = param(rng.normal(0, std, (rows, d_model)))

class LayerNorm(nn.LayerNorm):
  "x (…,D) -> (…,D). weight (D,) = 1, bias (D,) = 0."
  def __init__(self, d_model:int, eps:float):
    super().__init__(d_model, eps)
    self.weight, self.bias = param(np.ones(d_model)), param(np.zeros(d_model))

# ---------------------------------------------------------------- states of generation

class H3State(NamedTuple):
  shift: Tensor            # (B,D,N): shift SSM, the last N inputs filtered by its B, newest first
  re: Tensor               # (B p p,H,M): diagonal SSM
  im: Tensor

class S4DState(NamedTuple):
  re: Tensor               # (B,D,M)
  im: Tensor

class KVCache(NamedTuple):
  keys: Tensor             # (B,heads,capacity,hd), rotated
  values: Tensor

State = H3State | S4DState | KVCache | None      # a layer's
Mixed = tuple[Tensor, State]                     # what a mixer returns: its output, its new state

class LMState(NamedTuple):
  "A language model's state. `get_parameters(state)` lists its Tensors."
  positions: Tensor        # (1,) int: tokens so far, padding included
  start: Tensor|None       # (B,) int: left padding before each text; None: none
  layers: list[State]

  def copy(self) -> LMState:
    layers = [type(state)(*map(copied, state)) for state in self.layers]
    return LMState(copied(self.positions), self.start, layers)

class Positions(NamedTuple):
  "Where the tokens of one call stand in their texts, in generation."
  first: Tensor            # (1,) int: tokens before them
  start: Tensor|None       # (B,) int: left padding, as in LMState
  visible: int             # rows of the KV caches that are read, at least first + L

  def of(self, L:int) -> Tensor:
    "Positions of the next L tokens, (L,) int, or (B,L); below 0 in the padding."
    t = Tensor.arange(L) + self.first
    return t if self.start is None else t - self.start.unsqueeze(-1)

  def without_padding(self, x:Tensor) -> Tensor:
    "Sets x (B,L,D) to 0 in the padding, which then leaves an SSM's state at 0."
    return x if self.start is None else x * (self.of(x.shape[1]) >= 0).unsqueeze(-1)

def move_on(states:list[State]|None, after:list[State], *computed:Tensor) -> None:
  "Realises what was computed from `states`, and the states `after`; these overwrite `states`."
  old, new = get_parameters(states), get_parameters(after)
  Tensor.realize(*computed, *new)
  overwrite(old, new)

def zeros(*shape:int) -> Tensor: return to_device(np.zeros(shape, np.float32))
def copied(x:Tensor) -> Tensor: return x.clone().realize()

# ---------------------------------------------------------------- the two SSMs

def pad_or_trim(x:Tensor, L:int) -> Tensor:
  "Cuts the last axis to length L, or fills it with zeros."
  missing = max(0, L - x.shape[-1])
  return x[..., :L].pad((None,)*(x.ndim-1) + ((0, missing),))

class ShiftSSM:
  """y_t = C s_t + D k_t,  s_t = shift(s_{t-1}) + B k_t:  a causal FIR filter of N taps and a skip.

  B (D,N) starts as e_1 and is trained, C (1,D,N), skip D (D,). The state s is (B,D,N).
  src/models/ssm/ss_kernel_shift.py:33-83.
  """
  kernel_name, skip_name = "ssm_k_kernel", "ssm_k_D"           # official, see `official_names`

  def __init__(self, D:int, N:int, rng:Generator):
    self.B = param(np.eye(1, N).repeat(D, axis=0))
    self.C = param(rng.uniform(-1, 1, (1, D, N)) / N**0.5)
    self.D = param(rng.normal(0, 1, D))

  def filter(self) -> Tensor:
    "S[i] = sum_m B[m] C[m+i], i < N: (D,N). A convolution of C with B reversed."
    N = self.B.shape[-1]
    return fftconv(pad_or_trim(self.C, 2*N), self.B.flip(-1))[0, :, N-1:2*N-1]

  def response(self, s:Tensor, L:int) -> Tensor:
    """Zero-input response (B,D,L): the part of the next L outputs that comes from the state s,
    sum_j C[j+l+1] s[j] for l < L."""
    N = s.shape[-1]
    # s[0], the newest, is at N-1, zeros follow: the convolution's output N + l is the response l
    inputs = pad_or_trim(s.flip(-1), 2*N-1)
    return pad_or_trim(fftconv(inputs, self.C[0])[..., N:], L)

  def final_state(self, s:Tensor, k:Tensor) -> Tensor:
    "The state after inputs k (B,D,L): s[j] = s_old[j-L] + sum_{i<=j} B[j-i] k[L-1-i]."
    N, L = s.shape[-1], k.shape[-1]
    newest_first = pad_or_trim(k.flip(-1), N)                  # fftconv runs along j
    older = s.pad((None, None, (L, 0)))[..., :N]
    return fftconv(newest_first, self.B) + older

  def step(self, s:Tensor, k:Tensor) -> tuple[Tensor, Tensor]:
    "One input k (B,D): output (B,D) and the new state."
    shifted = s.pad((None, None, (1, 0)))[..., :-1]
    s = shifted + self.B * k.unsqueeze(-1)
    return (s * self.C[0]).sum(-1) + self.D * k, s

class Modes(NamedTuple):
  "A discretised diagonal SSM, pairs of (H,M): x_t = dA x_{t-1} + dB u_t, y_t = 2 Re C x_t."
  dA: Pair
  dB: Pair
  C: Pair

class DiagSSM:
  """y_t = 2 Re C x_t + D u_t,  x_t = dA x_{t-1} + dB u_t. The state x is a pair of (B,H,M).

  C (1,H,M,2) and B (H,M,2) hold (re, im) on the last axis; A = -exp(inv_A_real) + i A_imag, (H,M);
  log_dt (H,); skip D (H,). src/models/ssm/ss_kernel_diag.py:107-246.
  """
  kernel_name, skip_name = "kernel", "D"

  def __init__(self, H:int, N:int, rng:Generator, skip:bool=True):
    M = N // 2
    self.C = param(rng.normal(0, 0.5**0.5, (1, H, M, 2)))      # E|C|^2 = 1
    self.log_dt = param(rng.uniform(math.log(0.001), math.log(0.1), H))
    self.B = param(np.broadcast_to([1.0, 0.0], (H, M, 2)))
    # diag-lin, A = -1/2 + i pi n: src/models/ssm/dplr.py:21,34
    self.inv_A_real = param(np.full((H, M), math.log(0.5)))
    self.A_imag = param(np.broadcast_to(np.pi * np.arange(M), (H, M)))
    if skip: self.D = param(rng.normal(0, 1, H))

  def zero_state(self, batch:int) -> Pair:
    shape = (batch, *self.A_imag.shape)
    return zeros(*shape), zeros(*shape)

  def discretize(self) -> Modes:
    "Bilinear: z = dt A/2, dA = (1+z)/(1-z), dB = dt B/(1-z)."
    dt = self.log_dt.exp().unsqueeze(-1)
    zr, zi = -0.5 * dt * self.inv_A_real.exp(), 0.5 * dt * self.A_imag
    inv = 1 / ((1-zr)*(1-zr) + zi*zi)                          # 1/|1-z|^2 < 1, as zr < 0
    dA = ((1 - zr*zr - zi*zi) * inv, 2 * zi * inv)
    B = (self.B[..., 0], self.B[..., 1])
    dB = cmul(B, (dt * (1-zr) * inv, dt * zi * inv))
    return Modes(dA, dB, (self.C[0, ..., 0], self.C[0, ..., 1]))

  def filter(self, L:int) -> Tensor:
    "K[l] = 2 Re sum_n C dB dA^l, l < L: (H,L)."
    dA, dB, C = self.discretize()
    return Vandermonde(dA, L).sum(cmul(C, dB))

  def conv(self, u:Tensor, K:Tensor|None, state:Pair|None=None, **gates:Tensor
           ) -> tuple[Tensor, Pair|None]:
    """y = q * (K ∗ (u v) + D u v) for u (B,H,L) and gates v, q like it, as in `fftconv`.

    With a filter K (H,L): by FFT, without states. K None: by state passing, from `state` or
    zeros, and the state after the last step comes out.
    """
    if K is not None: return fftconv(u, K, self.D, **gates), None
    return ssm_conv(u, *self.discretize(), self.D, **gates, state=state)

  def step(self, x:Pair, u:Tensor, modes:Modes) -> tuple[Tensor, Pair]:
    "One input u (B,H): output (B,H) and the new state."
    (re, im), dB, each = cmul(modes.dA, x), modes.dB, u.unsqueeze(-1)
    x = (re + dB[0]*each, im + dB[1]*each)
    y = 2 * cmul(modes.C, x)[0].sum(-1)
    return y + self.D*u, x

class Filters(NamedTuple):
  "A layer's filters for a sequence; `H3LM.filters` makes those of all layers at once."
  shift: Tensor|None       # S (D,N); None: the layer has no shift SSM
  diag: Tensor|None        # K (H,L); None: state passing takes its place

class StepWeights(NamedTuple):
  "A layer's SSMs for one-token steps; `H3LM.step_weights` discretises them once for many tokens."
  shift: ShiftSSM|None     # None: the layer has no shift SSM
  diag: DiagSSM
  modes: Modes             # diag, discretised

Weights = Filters | StepWeights | None

def step_weights(mixer:H3Mixer|S4DMixer) -> StepWeights:
  modes = mixer.diag_ssm.discretize()
  stored_modes = Modes(*((stored(re), stored(im)) for re, im in modes))
  return StepWeights(getattr(mixer, "shift_ssm", None), mixer.diag_ssm, stored_modes)

def stacked(ssms:list) -> ShiftSSM|DiagSSM:
  "Makes one SSM that has the channels of all."
  one = copy.copy(ssms[0])
  for name in vars(one):
    weights = [getattr(ssm, name) for ssm in ssms]
    setattr(one, name, Tensor.cat(*weights, dim=1 if name == "C" else 0))    # C has a leading 1
  return one

def filters_of(ssms:list, *length:int) -> Iterator[Tensor]:
  "Yields the filter of each SSM; all are made together, in as many launches as one takes."
  return iter(stored(stacked(ssms).filter(*length)).chunk(len(ssms)) if ssms else ())

def official_names(mixer:H3Mixer|S4DMixer) -> dict:
  """Returns a mixer's parts by their official names; get_state_dict asks `_asdict` for them.

  Officially an SSM's weights are {kernel_name}.kernel.*, and its skip weight stands beside them as
  {skip_name}."""
  named = {}
  for attribute, part in vars(mixer).items():
    if isinstance(part, (ShiftSSM, DiagSSM)):
      weights = dict(vars(part))
      named |= {part.kernel_name: {"kernel": weights}, part.skip_name: weights.pop("D")}
    else: named[attribute] = part
  return named

# ---------------------------------------------------------------- the H3 layer
# Every mixer is called as mixer(u, state, positions, weights) -> (y, new state), u and y (B,L,D):
#                                           state   positions   weights
#   training, a whole sequence              None    None        Filters
#   training, a piece of a long sequence    given   None        Filters, diag is None
#   generation, a piece of a text           given   given       None
#   generation, one token (L = 1)           given   given       StepWeights, or None
# Where no state is given, none is returned. Weights that are None are computed in the call. A step
# may overwrite the state that it is given: realise y and the new state together.

def heads(x:Tensor, p:int) -> Tensor:
  "(B,D,…) -> (B,p,H,…): channel h*p + d is coordinate d of head h."
  return x.reshape(x.shape[0], -1, p, *x.shape[2:]).transpose(1, 2)

def outer(k:Tensor, v:Tensor, p:int) -> Tensor:
  "k v^T of each head, kv[d1,d2] = k[d1] v[d2]: (B,D,…) -> (B,p,p,H,…)."
  return heads(k, p).unsqueeze(2) * heads(v, p).unsqueeze(1)

def contract(q:Tensor, y:Tensor) -> Tensor:
  "z[d2] = sum_d1 q[d1] y[d1,d2] in each head: q (B,D,…), y (B,p,p,H,…) -> (B,D,…)."
  z = (heads(q, y.shape[1]).unsqueeze(2) * y).sum(1)           # (B,p,H,…)
  return z.transpose(1, 2).flatten(1, 2)

def h3_reference(layer:H3Mixer, u:Tensor) -> Tensor:
  """The H3 layer by its definition, in plain ops: u (B,L,D) -> (B,L,D). Paper section 3.2.

  Heads of one channel (p = 1):   y = Wo( q * diag( shift(k) * v ) )
  Heads of p channels:            y = Wo( q^T diag( shift(k) v^T ) ), the SSM on all p*p entries
  with ssm(x) = K ∗ x + D x, causal.
  """
  shift, diag, L = layer.shift_ssm, layer.diag_ssm, u.shape[1]
  q, k, v = (x.transpose(1, 2) for x in layer.qkv(u))          # (B,D,L)
  k = fftconv_ref(k, shift.filter(), shift.D)
  kv = outer(k, v, layer.p)                                    # (B,p,p,H,L)
  y = fftconv_ref(kv.flatten(0, 2), diag.filter(L), diag.D)
  z = contract(q, y.reshape(kv.shape))                         # (B,D,L)
  return layer.output_linear(layer.ordered(z).transpose(1, 2))

@replaceable
def h3_step(q:Tensor, k:Tensor, v:Tensor, state:H3State, weights:StepWeights) -> Mixed:
  "`h3_reference` for one token, without projections: q, k, v (B,D) -> z (B,D) and the new state."
  k, s = weights.shift.step(state.shift, k)
  kv = outer(k, v, q.shape[1] // state.re.shape[1])            # (B,p,p,H)
  y, x = weights.diag.step((state.re, state.im), kv.flatten(0, 2), weights.modes)
  return contract(q, y.reshape(kv.shape)), H3State(s, *x)

class H3Mixer:
  """The H3 layer, `h3_reference`, made fast: the filters of all layers are computed at once, and
  the gates v and q multiply inside the convolution's kernel. src/models/ssm/h3.py:73-206.
  """
  def __init__(self, cfg:H3Config, rng:Generator):
    D, self.p, self.head_order = cfg.d_model, cfg.head_dim, cfg.head_order
    self.q_proj, self.k_proj, self.v_proj = (Linear(D, D, rng, cfg.init_std) for _ in range(3))
    self.shift_ssm = ShiftSSM(D, cfg.d_state, rng)
    self.diag_ssm = DiagSSM(D // self.p, cfg.d_state, rng)
    self.output_linear = Linear(D, D, rng, cfg.init_std)

  _asdict = official_names

  def init_state(self, batch:int, capacity:int=0) -> H3State:
    shift = zeros(batch, *self.shift_ssm.B.shape)
    return H3State(shift, *self.diag_ssm.zero_state(batch * self.p**2))

  def qkv(self, u:Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return self.q_proj(u), self.k_proj(u), self.v_proj(u)

  def ordered(self, z:Tensor) -> Tensor:
    "Reorders channels h*p + d2 by `head_order` (h3.py:153; src/ops/fftconv.py:48)."
    return z if self.p == 1 or self.head_order == "hd2" else heads(z, self.p).flatten(1, 2)

  def convolve(self, q:Tensor, k:Tensor, v:Tensor, state:State, filters:Filters) -> Mixed:
    "z (B,D,L) from q, k, v (B,D,L): by FFT, or by state passing."
    shift, diag = self.shift_ssm, self.diag_ssm
    shifted = fftconv(k, filters.shift, shift.D)                       # S ∗ k + D k
    if state: shifted = shifted + shift.response(state.shift, k.shape[2])
    x = state and (state.re, state.im)
    if self.p == 1:
      z, x = diag.conv(shifted, filters.diag, x, v=v, q=q)             # q * diag( shift(k) * v )
    else:
      kv = outer(shifted, v, self.p)                                   # (B,p,p,H,L)
      y, x = diag.conv(kv.flatten(0, 2), filters.diag, x)
      z = contract(q, y.reshape(kv.shape))                             # q^T diag( shift(k) v^T )
    return z, state and H3State(shift.final_state(state.shift, k), *x)

  def __call__(self, u:Tensor, state:State=None, positions:Positions|None=None,
               weights:Weights=None) -> Mixed:
    q, k, v = self.qkv(u)                                              # (B,L,D)
    if positions: k = positions.without_padding(k)
    if positions and u.shape[1] == 1:
      token = (x.squeeze(1) for x in (q, k, v))
      z, new = h3_step(*token, state, weights or step_weights(self))
      return self.output_linear(self.ordered(z).unsqueeze(1)), new
    sequence = (x.transpose(1, 2) for x in (q, k, v))
    z, new = self.convolve(*sequence, state, weights or Filters(self.shift_ssm.filter(), None))
    return self.output_linear(self.ordered(z).transpose(1, 2)), new

class S4DMixer:
  """y = Wo gelu( diag_ssm(u) ), an ungated SSM for each channel, as a baseline for H3.

  Gu, Goel, Gupta, Ré 2022, "On the Parameterization and Initialization of Diagonal State Space
  Models", arXiv 2206.11893, with H3's discretisation.
  """
  def __init__(self, cfg:H3Config, rng:Generator):
    self.diag_ssm = DiagSSM(cfg.d_model, cfg.d_state, rng)
    self.output_linear = Linear(cfg.d_model, cfg.d_model, rng, cfg.init_std)

  _asdict = official_names

  def init_state(self, batch:int, capacity:int=0) -> S4DState:
    return S4DState(*self.diag_ssm.zero_state(batch))

  def __call__(self, u:Tensor, state:State=None, positions:Positions|None=None,
               weights:Weights=None) -> Mixed:
    if positions: u = positions.without_padding(u)
    if positions and u.shape[1] == 1:
      modes = (weights or step_weights(self)).modes
      y, x = self.diag_ssm.step(state, u.squeeze(1), modes)
      y = y.unsqueeze(1)
    else:
      y, x = self.diag_ssm.conv(u.transpose(1, 2), weights and weights.diag, state)
      y = y.transpose(1, 2)
    return self.output_linear(y.gelu()), state and S4DState(*x)

# ---------------------------------------------------------------- attention

@replaceable
def attend(q:Tensor, k:Tensor, v:Tensor, pos:Tensor|None=None, start:Tensor|None=None,
           causal:bool=True, dropout:float=0.0) -> Tensor:
  """Softmax attention of q (B,heads,L,hd) over k, v (B,heads,T,hd) -> like q.

  Causal: query i sees keys up to pos + i; pos (1,) int, by default T - L. With left padding, start
  (B,) int, it sees no key before start but its own, so that a row of padding stays finite.
  """
  L, T = q.shape[2], k.shape[2]
  scores = (q * q.shape[-1]**-0.5) @ k.transpose(-1, -2)               # (B,heads,L,T)
  if causal:
    row = Tensor.arange(T)
    own = Tensor.arange(L).unsqueeze(-1) + (T - L if pos is None else pos)
    seen = row <= own
    if start is not None: seen = seen & ((row >= start.reshape(-1, 1, 1, 1)) | (row == own))
    scores = seen.where(scores, -math.inf)
  return scores.softmax(-1).dropout(dropout) @ v

@replaceable
def write_cache(cache:Tensor, x:Tensor, pos:Tensor) -> Tensor:
  "cache (B,heads,T,hd) with x (B,heads,L,hd) in its rows from pos on; pos (1,) int."
  row_of_x = Tensor.arange(cache.shape[2]).unsqueeze(-1) - pos         # (T,1)
  onto = (row_of_x == Tensor.arange(x.shape[2])).float()               # (T,L)
  return (onto.sum(-1, keepdim=True) > 0).where(onto @ x, cache)

def visible_rows(n:int) -> int:
  "How many rows of a KV cache a piece of text reads to see n tokens: few sizes, as all are compiled."
  return max(4096, 1 << (n-1).bit_length())

@functools.cache
def rotary_table(n:int, dim:int, device:str) -> Tensor:
  "cos and, beside it, sin of t * 10000^(-2j/dim), j < dim/2, for t < n: (n,dim)."
  angle = np.outer(np.arange(n), 10000.0 ** (-np.arange(0, dim, 2) / dim))
  return to_device(np.concatenate([np.cos(angle), np.sin(angle)], -1), device, np.float32)

def rotated(x:Tensor, table:Tensor) -> Tensor:
  "Rotates dims j and r+j of x (…,hd) as a pair; table (…,2r) holds cos and sin, later dims stay."
  cos, sin = table.chunk(2, dim=-1)
  r = cos.shape[-1]
  a, b, rest = x[..., :r], x[..., r:2*r], x[..., 2*r:]
  return Tensor.cat(a*cos - b*sin, a*sin + b*cos, rest, dim=-1)

class Attention:
  """Softmax attention, causal or bidirectional, with rotary positions where rotary_dim > 0.

  flash-attention 33e0860c, flash_attn/modules/mha.py:346-522 and layers/rotary.py:125-202.
  """
  def __init__(self, d_model:int, n_heads:int, rng:Generator, std:float, out_std:float,
               rotary_dim:int=0, causal:bool=True, dropout:float=0.0):
    self.n_heads, self.head_size = n_heads, d_model // n_heads
    self.rotary_dim, self.causal, self.dropout = rotary_dim, causal, dropout
    self.Wqkv = Linear(d_model, 3*d_model, rng, std)
    self.out_proj = Linear(d_model, d_model, rng, out_std)

  def init_state(self, batch:int, capacity:int) -> KVCache:
    shape = (batch, self.n_heads, capacity, self.head_size)
    return KVCache(zeros(*shape), zeros(*shape))

  def rotary(self, L:int, positions:Positions|None, device:str) -> Tensor:
    "cos and sin at the positions of L tokens: (L,2r), or (B,1,L,2r) with left padding."
    table = rotary_table(positions.visible if positions else L, self.rotary_dim, device)
    if positions is None: return table
    t = positions.of(L).maximum(0)
    return lookup(table, t.unsqueeze(1) if t.ndim == 2 else t)

  def qkv(self, u:Tensor, positions:Positions|None) -> tuple[Tensor, Tensor, Tensor]:
    "u (B,L,D) -> q, k, v (B,heads,L,hd), q and k rotated by their positions."
    B, L, _ = u.shape
    q, k, v = (x.reshape(B, L, self.n_heads, -1).transpose(1, 2)
               for x in self.Wqkv(u).chunk(3, dim=-1))
    if self.rotary_dim == 0: return q, k, v
    table = self.rotary(L, positions, u.device)
    return rotated(q, table), rotated(k, table), v

  def __call__(self, u:Tensor, cache:State=None, positions:Positions|None=None,
               weights:Weights=None) -> Mixed:
    q, k, v = self.qkv(u, positions)
    if cache is None: y = attend(q, k, v, causal=self.causal, dropout=self.dropout)
    else:
      first, start, visible = positions
      cache = KVCache(write_cache(cache.keys, k, first), write_cache(cache.values, v, first))
      keys, values = (x[:, :, :visible] for x in cache)
      y = attend(q, keys, values, first, start)
    return self.out_proj(y.transpose(1, 2).flatten(2)), cache

# ---------------------------------------------------------------- the language model

class MLP:
  "D -> mlp_mult D -> D with the tanh approximation of GELU (src/models/ssm_seq.py:44-45)."
  def __init__(self, cfg:H3Config, rng:Generator):
    D, inner = cfg.d_model, cfg.mlp_mult * cfg.d_model
    self.fc1 = Linear(D, inner, rng, cfg.init_std)
    self.fc2 = Linear(inner, D, rng, cfg.out_std)

  def __call__(self, x:Tensor) -> Tensor: return self.fc2(self.fc1(x).gelu())

class Block:
  "x + mixer(norm1 x), then + mlp(norm2 x): pre-norm (flash_attn/modules/block.py:102-150)."
  def __init__(self, cfg:H3Config, i:int, rng:Generator):
    self.dropout = cfg.resid_dropout
    self.norm1, self.norm2 = (LayerNorm(cfg.d_model, cfg.norm_eps) for _ in range(2))
    if i in cfg.attn_layers:
      self.mixer = Attention(cfg.d_model, cfg.n_heads, rng, cfg.init_std, cfg.out_std,
                             cfg.rotary_dim, dropout=cfg.attn_dropout)
    else: self.mixer = {"h3": H3Mixer, "s4d": S4DMixer}[cfg.ssm](cfg, rng)
    self.mlp = MLP(cfg, rng)

  def __call__(self, x:Tensor, state:State=None, positions:Positions|None=None,
               weights:Weights=None) -> Mixed:
    y, state = self.mixer(self.norm1(x), state, positions, weights)
    x = x + y.dropout(self.dropout)
    return x + self.mlp(self.norm2(x)).dropout(self.dropout), state

class H3LM:
  """Language model of H3 and attention layers (src/models/ssm_seq.py:104-190).

  V below is `config.padded_vocab`. `nn.state.get_state_dict(model)` gives the official names and
  shapes without lm_head.weight, which is the word embedding itself, and the constant
  rotary_emb.inv_freq. Parameters are float32, drawn by numpy from `seed`; None: the matrices are
  without values, for `load_weights`.
  """
  def __init__(self, config:H3Config, seed:int|None=0):
    self.config, D, std = config, config.d_model, config.init_std
    rng = Blank() if seed is None else np.random.default_rng(seed)
    embeddings = SimpleNamespace(word_embeddings=Embedding(config.padded_vocab, D, rng, std))
    if config.max_positions:
      embeddings.position_embeddings = Embedding(config.max_positions, D, rng, std)
    layers = [Block(config, i, rng) for i in range(config.n_layer)]
    ln_f = LayerNorm(D, config.norm_eps)
    self.backbone = SimpleNamespace(embeddings=embeddings, layers=layers, ln_f=ln_f)

  def embed(self, tokens:Tensor, positions:Positions|None=None) -> Tensor:
    """Word embeddings, plus learned positions if there are any: tokens (B,L) -> (B,L,D).
    ValueError for more tokens than positions."""
    embeddings, most, L = self.backbone.embeddings, self.config.max_positions, tokens.shape[1]
    x = embeddings.word_embeddings(tokens)
    if most:
      require(positions or L <= most, f"{L} tokens where the model has positions for {most}.")
      at = positions.of(L).maximum(0) if positions else Tensor.arange(L)    # (L,) or (B,L)
      x = x + embeddings.position_embeddings(at)
    return x.dropout(self.config.embed_dropout)

  def head(self, x:Tensor) -> Tensor:
    "Logits (…,V) of x (…,D), by the word embeddings."
    words = self.backbone.embeddings.word_embeddings.weight
    return self.backbone.ln_f(x).linear(words.transpose())

  def __call__(self, tokens:Tensor) -> Tensor:
    "tokens (B,L) int -> logits (B,L,V); logits[:, t] are for token t+1."
    return self.forward(tokens)[0]

  def forward(self, tokens:Tensor, carry:list|None=None) -> tuple[Tensor, list]:
    """Logits as above, for training, and the states of all layers after the last token.

    carry: their states before the first token, from `init_carry` or the piece of text before
    this one; differentiable in it. None: zeros, and no states come out. ValueError for a carry
    in a model with attention or learned positions.
    """
    c = self.config
    require(0 not in tokens.shape, f"tokens of shape {tokens.shape} hold no token.")
    require(not (carry and c.attn_layers), "attention layers have no state to train with.")
    require(not (carry and c.max_positions), "learned positions begin anew with each piece of a text.")
    layers = self.backbone.layers
    x, after = self.embed(tokens), []
    # from a carried state the diagonal SSM goes by state passing, as a very long sequence does
    filters = self.filters(math.inf if carry else tokens.shape[1])
    for layer, before, layer_filters in zip(layers, carry or [None]*len(layers), filters):
      x, state = layer(x, before, weights=layer_filters)
      after.append(state)
    return self.head(x), after

  def filters(self, L:float) -> list[Filters|None]:
    "The Filters of each layer for sequences of L tokens, all made at once; None for attention."
    mixers = [layer.mixer for layer in self.backbone.layers]
    S = filters_of([m.shift_ssm for m in mixers if hasattr(m, "shift_ssm")])
    K = filters_of([m.diag_ssm for m in mixers if hasattr(m, "diag_ssm") and L <= BY_FFT], L)
    # S and K yield in the order of the layers
    return [Filters(next(S, None), next(K, None)) if hasattr(m, "diag_ssm") else None
            for m in mixers]

  def step_weights(self) -> list[StepWeights|None]:
    "The StepWeights of each layer, for many calls of `advance`; None for attention."
    mixers = [layer.mixer for layer in self.backbone.layers]
    weights = [step_weights(m) if hasattr(m, "diag_ssm") else None for m in mixers]
    if made := get_parameters(weights): Tensor.realize(*made)
    return weights

  def init_state(self, batch:int, max_length:int|None=None, start:list[int]|None=None) -> LMState:
    """The state before the first token, in realised Tensors. max_length: capacity of the KV caches,
    by default the config's. start: left padding, the number of tokens before each text that change
    nothing, so that texts of different lengths can be fed side by side."""
    capacity = max_length or self.config.max_length
    layers = [layer.mixer.init_state(batch, capacity) for layer in self.backbone.layers]
    padding = Tensor(start, dtype=dtypes.int).realize() if start else None
    return LMState(Tensor([0], dtype=dtypes.int).realize(), padding, layers)

  def init_carry(self, batch:int) -> list[H3State|S4DState]:
    "Zero states for `forward`, one for each layer of a model without attention."
    return [layer.mixer.init_state(batch) for layer in self.backbone.layers]

  def capacity(self, state:LMState) -> int|None:
    "Tokens that the state's KV caches hold; None, no limit, without attention layers."
    return next((s.keys.shape[2] for s in state.layers if isinstance(s, KVCache)), None)

  def advance(self, tokens:Tensor, state:LMState, visible:int|None=None,
              weights:list[StepWeights|None]|None=None) -> Tensor:
    """One token, (B,) int, or a piece of text, (B,L): logits (B,V) after the last. Overwrites `state`.

    Never waits for the device, so TinyJit can capture it, with the state in its closure. It can't
    see a full KV cache for the same reason: the caller counts tokens against `capacity(state)`.
    visible: how many rows of the caches a piece of text reads, at least the tokens so far and its
    own; by default all, as a single token does. weights: `step_weights()`, for single tokens only.
    """
    tokens, capacity = tokens.reshape(tokens.shape[0], -1), self.capacity(state) or 1
    one_token = tokens.shape[1] == 1
    if one_token or visible is None: visible = capacity
    if not one_token or weights is None: weights = [None] * len(state.layers)
    positions = Positions(state.positions, state.start, min(visible, capacity))
    x, after = self.embed(tokens, positions), []
    for layer, before, layer_weights in zip(self.backbone.layers, state.layers, weights):
      x, new = layer(x, before, positions, layer_weights)
      after.append(new)
    logits = self.head(x[:, -1].contiguous())
    move_on(state.layers, after, logits)
    state.positions.assign(state.positions + tokens.shape[1]).realize()
    return logits

  def prefill(self, tokens:Tensor, state:LMState|None=None, chunk:int|None=None
              ) -> tuple[Tensor, LMState]:
    """A prompt, or a piece of one: tokens (B,L) int -> logits (B,V) after the last, and the state.

    With `chunk` it is taken that many tokens at a time, which bounds the memory; the result is the
    same. ValueError if L is 0, or if the KV caches, or the learned positions, would not hold it."""
    B, L = tokens.shape
    require(L > 0, "the prompt is empty: prefill needs at least one token.")
    require(chunk is None or chunk > 0, f"chunk must be at least 1, not {chunk}.")
    state = self.init_state(B) if state is None else state.copy()
    batch, before = state.layers[0][0].shape[0], state.positions.item()
    require(batch == B, f"tokens of batch {B}, but a state of batch {batch}.")
    end, capacity, most = before + L, self.capacity(state), self.config.max_positions
    require(not capacity or end <= capacity,
            f"{end} tokens do not fit the attention cache of {capacity}: "
            "make the state with a larger max_length.")
    longest = end - (0 if state.start is None else state.start.min().item())
    require(not most or longest <= most,
            f"{longest} tokens where the model has positions for {most}.")
    for i in range(0, L, chunk or L):
      piece = tokens[:, i:i + (chunk or L)]
      so_far = before + i + piece.shape[1]
      logits = self.advance(piece.contiguous(), state, visible_rows(so_far))
    return logits, state

  def step(self, tokens:Tensor, state:LMState) -> tuple[Tensor, LMState]:
    """One token: tokens (B,) int -> logits (B,V), new state; the state given stays as it is.

    RuntimeError where a TinyJit captures it, which sees no Tensors of nested states.
    """
    if capturing: raise RuntimeError("step makes a new state: in a TinyJit, use advance.")
    state = state.copy()
    return self.advance(tokens, state), state

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
