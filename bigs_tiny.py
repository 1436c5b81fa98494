"""BiGS ("Pretraining Without Attention"): masked language models of gated SSMs, and baselines.

Paper: Wang, Yan, Gu, Rush 2022, arXiv 2212.10544, the section on the model and its figure of the
two architectures. Official code: github.com/jxiw/BiGS, cited below as T:line, which is
BiGS/modeling_bigs.py (PyTorch), and F:line, BiGS/modeling_flax_bigs.py (JAX).
`python train.py --task mlm` trains one, `python generate.py --fill` fills in masks with it.

BiGS's layer, `GatedSSM`. Two SSMs, one forward in time and one backward, mix positions; their
outputs are multiplied, and a gate, computed from each position alone, multiplies the product:

  x (B,L,D) ─┬───────────────────────────────────────────────────────────────────────── + ─ (B,L,D)
             └ LayerNorm ─ h ─┬─ du_forward ── gelu ── fs4 ─ duc_forward ──┐              │
                              │                                            * ─ dol ─ gelu │
                              ├─ du_backward ─ gelu ─ bs4 ─ duc_backward ──┘           │  │
                              └─ dv ─ gelu ─── (B,L,I) ─────────────────────────────── * ─ do

  fs4(u)[t] = sum_{s<=t} K_f[t-s] u[s] + D u[t],   bs4(u)[t] = sum_{s>=t} K_b[s-t] u[s] + D u[t]
  No state is kept, as generation would need: the whole text is there at once.

Glossary. B batch, L length, V vocabulary, and then
  symbol      shape      paper, official name
  d_model, D  D          width of the model, hidden_size; an SSM's D is its skip weight, one number
  d_inner, I  I          width of the gate, intermediate_size (3D in the released models)
  A, C        (N,)       an SSM x' = A x + u, y = Re C x, complex, N = d_state. Unlike H3's one
                         for all channels, with B = 1, zero-order hold, all N modes and no factor 2
  dt          ()         its time step, one number, kept as log_step
  K           (1,L)      its filter, K[l] = Re sum_n C (exp(dt A) - 1)/A exp(dt A l)
  K_f, K_b    (1,L)      the filters of the forward SSM fs4 and the backward SSM bs4; in the code D
                         is added to their first tap, so that fs4(u) = K_f ∗ u
The paper's blocks, `BiGSConfig.block`, and their weights in a layer:
  "gated"            13 D^2  GatedSSM        BiGS
  "gated-attention"  13 D^2  GatedAttention  GatedSSM with self-attention in place of the SSMs
  "attention"        12 D^2  StackAttention  BERT's layer with the norms in front
  "stack"            12 D^2  StackSSM        StackAttention with two SSMs for attention: STACK/SSM
  "stack-serial"     12 D^2  SerialSSM       StackSSM with its two SSMs in series
One more, for the Long Range Arena, is "s4d", 2 D^2, S4DLayer: the layer of S4 models, with a
`DiagSSM` of h3tiny's for each channel and direction.

Not here: attention masks (the official encoder takes one and drops it: padding is text like any
other, so pad as in training), next-sentence prediction, norms behind the layers, the bilinear
discretisation.
"""
from __future__ import annotations
import dataclasses, functools, math
from types import SimpleNamespace
import numpy as np
from numpy.random import Generator
from tinygrad import Tensor
from flashconv import Vandermonde, cmul, fftconv, lookup, stored
from h3tiny import (Attention, Blank, DiagSSM, Embedding, LayerNorm, Linear, check_choice,
                    check_whole, filters_of, param, require)

BLOCKS = ("gated", "stack", "stack-serial", "gated-attention", "attention")
HEADS = ("mlm", "classify", "choose", "span", "tag")
BY_TOEPLITZ = 128        # up to this length a convolution is a matrix product, past it `fftconv`

# ---------------------------------------------------------------- configuration

@dataclasses.dataclass
class BiGSConfig:
  "Everything that fixes a model's shape. ValueError, one sentence, if the values can't be."
  vocab_size: int = 30522
  d_model: int = 768
  n_layer: int = 12
  block: str = "gated"
  d_inner: int = 0                   # 0: 3 times d_model if gated, 4 in "attention", 5 in stacks
  n_heads: int = 12                  # of attention blocks
  d_state: int = 64                  # N
  max_length: int = 512              # rows of the position table
  n_types: int = 2
  gelu: str = "tanh"                 # in layers: "tanh" as in JAX, which trained the releases; "erf", T:319
  pooler: str = "non_padding_mean"   # or "mean"
  pad_token: int = 0
  norm_eps: float = 1e-12
  embed_dropout: float = 0.0         # 0.1 in the official recipe
  n_labels: int = 2                  # outputs of a classifier

  def __post_init__(self):
    check_choice(self, block=(*BLOCKS, "s4d"), gelu=("tanh", "erf"),
                 pooler=("non_padding_mean", "mean"))
    mult = {"stack": 5, "stack-serial": 5, "attention": 4}.get(self.block, 3)
    self.d_inner = self.d_inner or mult * self.d_model
    check_whole(self, "vocab_size", "d_model", "n_layer", "d_inner", "n_heads", "d_state",
                "max_length", "n_types", "n_labels")
    require("attention" not in self.block or self.d_model % self.n_heads == 0,
            f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads}).")
    require(self.block != "s4d" or self.d_state % 2 == 0, f"d_state must be even, not {self.d_state}.")
    require(isinstance(self.norm_eps, float) and self.norm_eps > 0,
            f"norm_eps must be above 0, not {self.norm_eps!r}.")
    require(0 <= self.embed_dropout < 1,
            f"embed_dropout must be at least 0 and below 1, not {self.embed_dropout}.")

  @staticmethod
  def large(block:str="gated", max_length:int=128) -> BiGSConfig:
    "The released shape, 23 layers, or a baseline of about as many weights, 24 layers."
    n_layer = 23 if block.startswith("gated") else 24
    return BiGSConfig(30522, 1024, n_layer, block, n_heads=16, max_length=max_length)

# ---------------------------------------------------------------- the SSM

def hippo(N:int) -> np.ndarray:
  """Imaginary parts, ascending, of the eigenvalues of HiPPO-LegS's normal part (F:158-193).

  HiPPO-LegS is A_nk = -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it, and 0 above. With
  p_n = sqrt(n + 1/2), A + p p^T = S - I/2, where S is skew-symmetric: the real parts are -1/2.
  """
  p = np.sqrt(np.arange(N) + 0.5)
  S = np.outer(p, p)
  return np.linalg.eigvalsh(-1j * (np.triu(S, 1) - np.tril(S, -1)))

class SharedSSM:
  "An SSM that all channels share, fs4 or bs4: 4N + 2 parameters. T:221-288, F:227-326."
  def __init__(self, N:int, rng:Generator):
    self.D = param(np.ones(1))
    self.kernel = SimpleNamespace(
      C=param(rng.normal(0, 0.5**0.5, (N, 2))),
      A_re=param(np.full(N, -0.5)),
      A_im=param(hippo(N)),
      log_step=param(rng.uniform(math.log(0.01), 0, 1)))

def filters(ssms:list[SharedSSM], L:int) -> Tensor:
  """K of S SSMs, with D added to the first tap, so that y = K ∗ u is all that an SSM does: (S,L).

  Zero-order hold, and the real part of the sum over all N modes, without a factor 2 (T:251-258).
  A_re is clamped to at most -1e-4 (T:247).
  """
  names = ("C", "A_re", "A_im", "log_step")
  C, A_re, A_im, log_step = (Tensor.stack(*[getattr(s.kernel, n) for s in ssms]) for n in names)
  dt, re, im = log_step.exp(), A_re.minimum(-1e-4), A_im            # (S,1), (S,N), (S,N)
  size, angle = (dt*re).exp(), dt*im
  dA = (size*angle.cos(), size*angle.sin())                         # exp(dt A)
  over_A = 1 / (re*re + im*im)
  dB = cmul((dA[0] - 1, dA[1]), (re*over_A, -im*over_A))            # (exp(dt A) - 1)/A
  w = cmul((C[..., 0], C[..., 1]), dB)
  K = Vandermonde(dA, L).sum((0.5*w[0], 0.5*w[1]))                  # `sum` is 2 Re, hence 0.5
  skips = Tensor.stack(*[s.D for s in ssms])                        # (S,1)
  return K + skips.pad((None, (0, L-1)))

def toeplitz(K:Tensor) -> Tensor:
  "T[t,s] = K[t-s], 0 above the diagonal: (S,L) -> (S,L,L)."
  S, L = K.shape
  c = K.flip(-1).pad((None, (0, L)))                                # c[L-1-l] = K[l], then L zeros
  # L copies of c, 2L numbers each, cut anew into rows of 2L-1: row t begins with t numbers of the
  # copy before, its last, which are zeros, so that rows[t,j] = c[j-t], and T[t,s] = rows[t,L-1+s]
  repeated = c.unsqueeze(1).expand(S, L, 2*L).reshape(S, -1)
  rows = repeated[:, :L*(2*L-1)].reshape(S, L, 2*L-1)
  return rows[..., L-1:]

def convolve(u:Tensor, K:Tensor, backward:bool=False) -> Tensor:
  """y[t] = sum_s K[t-s] u[s], s <= t; backward: K[s-t], s >= t. u (B,L,D).

  K is the SSM's Toeplitz matrix (L,L), or its filter (1,L) for `fftconv`: `BiGS.filters` chooses.
  """
  if K.shape[0] > 1: return (K.transpose(0, 1) if backward else K) @ u
  if backward: return convolve(u.flip(1), K).flip(1)
  return fftconv(u, K, channels_last=True)

# ---------------------------------------------------------------- the blocks, and S4's

def initial_std(n_in:int) -> float:
  """Standard deviation of a linear layer's initial weights: 1/sqrt(n_in), but at least 0.02.

  The official code has 0.02 throughout. In narrow models the product of the two directions is then
  too small to learn from: at width 64 BiGS learns subject-verb agreement in 600 steps with
  1/sqrt(n_in), and does not with 0.02."""
  return max(0.02, n_in**-0.5)

def dense(n_in:int, n_out:int, rng:Generator) -> Linear:
  return Linear(n_in, n_out, rng, initial_std(n_in))

def gelu(cfg:BiGSConfig) -> functools.partial:
  return functools.partial(Tensor.gelu, approximate="none" if cfg.gelu == "erf" else "tanh")

def attention(cfg:BiGSConfig, rng:Generator) -> Attention:
  "Bidirectional; its positions come from the embedding."
  std = initial_std(cfg.d_model)
  out_std = std / (2*cfg.n_layer)**0.5
  return Attention(cfg.d_model, cfg.n_heads, rng, std, out_std, causal=False)

class Gated:
  "The gate that both gated layers end in; its weights are drawn last."
  def __init__(self, cfg:BiGSConfig, rng:Generator):
    D, I = cfg.d_model, cfg.d_inner
    self.gelu = gelu(cfg)
    self.dv = dense(D, I, rng)
    self.dol = dense(D, I, rng)
    self.do = dense(I, D, rng)

  def gate(self, mixed:Tensor, h:Tensor) -> Tensor:
    "do( gelu(dol(mixed)) * gelu(dv(h)) ): (B,L,D) -> (B,L,D), through (B,L,I)."
    return self.do(self.gelu(self.dol(mixed)) * self.gelu(self.dv(h)))

class Stack:
  "The MLP that all stacked layers end in; its weights are drawn last."
  def __init__(self, cfg:BiGSConfig, rng:Generator):
    D, I = cfg.d_model, cfg.d_inner
    self.gelu = gelu(cfg)
    self.norm2 = LayerNorm(D, cfg.norm_eps)
    self.fc1 = dense(D, I, rng)
    self.fc2 = dense(I, D, rng)

  def mlp(self, x:Tensor) -> Tensor:
    "fc2( gelu( fc1( norm2(x)))): (B,L,D) -> (B,L,D)."
    return self.fc2(self.gelu(self.fc1(self.norm2(x))))

class GatedSSM(Gated):
  """BiGS (T:291-330, F:329-410):
    h = LayerNorm(x)
    forward  = duc_forward( fs4( gelu(du_forward(h)) ) )
    backward = duc_backward( bs4( gelu(du_backward(h)) ) )
    x + do( gelu(dol(forward * backward)) * gelu(dv(h)) )
  """
  def __init__(self, cfg:BiGSConfig, rng:Generator):
    D = cfg.d_model
    self.LayerNorm = LayerNorm(D, cfg.norm_eps)
    self.fs4 = SharedSSM(cfg.d_state, rng)
    self.bs4 = SharedSSM(cfg.d_state, rng)
    self.du_forward, self.du_backward = dense(D, D, rng), dense(D, D, rng)
    self.duc_forward, self.duc_backward = dense(D, D, rng), dense(D, D, rng)
    super().__init__(cfg, rng)

  def __call__(self, x:Tensor, K_f:Tensor, K_b:Tensor) -> Tensor:
    h = self.LayerNorm(x)
    forward = self.duc_forward(convolve(self.gelu(self.du_forward(h)), K_f))
    backward = self.duc_backward(convolve(self.gelu(self.du_backward(h)), K_b, backward=True))
    return x + self.gate(forward * backward, h)                     # not a sum: T:325

class GatedAttention(Gated):
  "x + do( gelu(dol(attention(h))) * gelu(dv(h)) ), h = LayerNorm(x)."
  def __init__(self, cfg:BiGSConfig, rng:Generator):
    D = cfg.d_model
    self.LayerNorm = LayerNorm(D, cfg.norm_eps)
    self.attention = attention(cfg, rng)
    super().__init__(cfg, rng)

  def __call__(self, x:Tensor) -> Tensor:
    h = self.LayerNorm(x)
    return x + self.gate(self.attention(h)[0], h)

class StackAttention(Stack):
  "BERT's layer with the norms in front: x + attention(LayerNorm x), then + MLP(norm2 x)."
  def __init__(self, cfg:BiGSConfig, rng:Generator):
    D = cfg.d_model
    self.LayerNorm = LayerNorm(D, cfg.norm_eps)
    self.attention = attention(cfg, rng)
    super().__init__(cfg, rng)

  def __call__(self, x:Tensor) -> Tensor:
    x = x + self.attention(self.LayerNorm(x))[0]
    return x + self.mlp(x)

class StackSSM(Stack):
  """x + mix([ fs4(h), bs4(h) ]), h = LayerNorm(x), then + MLP(norm2 x).

  In the talk's figure the two SSMs' outputs are concatenated, 2D channels, and added to the D of
  the residual; the paper's prose was not at hand. Here `mix`, 2D -> D, follows the concatenation,
  and the MLP is a quarter wider than BERT's, so that the layer has BERT's 12 D^2 weights. A linear
  layer before these SSMs would add nothing: it commutes with a filter that all channels share.
  """
  def __init__(self, cfg:BiGSConfig, rng:Generator):
    D = cfg.d_model
    self.LayerNorm = LayerNorm(D, cfg.norm_eps)
    self.fs4 = SharedSSM(cfg.d_state, rng)
    self.bs4 = SharedSSM(cfg.d_state, rng)
    self.mix = dense(2*D, D, rng)
    super().__init__(cfg, rng)

  def __call__(self, x:Tensor, K_f:Tensor, K_b:Tensor) -> Tensor:
    h = self.LayerNorm(x)
    both = Tensor.cat(convolve(h, K_f), convolve(h, K_b, backward=True), dim=-1)
    x = x + self.mix(both)
    return x + self.mlp(x)

class SerialSSM(Stack):
  """y = x + duc_forward(fs4(LayerNorm x)), then y + duc_backward(bs4(norm_backward y)), then MLP.

  Another reading of STACK/SSM: notes on the paper's prose have "sequential forward + backward SSM
  layers", its figure has them side by side, as in `StackSSM`. What stands between the two is not
  said. Here each has a norm, a projection and a residual of its own: without them two SSMs in
  series would be one two-sided filter that all channels share.
  """
  def __init__(self, cfg:BiGSConfig, rng:Generator):
    D = cfg.d_model
    self.LayerNorm, self.norm_backward = (LayerNorm(D, cfg.norm_eps) for _ in range(2))
    self.fs4 = SharedSSM(cfg.d_state, rng)
    self.bs4 = SharedSSM(cfg.d_state, rng)
    self.duc_forward, self.duc_backward = dense(D, D, rng), dense(D, D, rng)
    super().__init__(cfg, rng)

  def __call__(self, x:Tensor, K_f:Tensor, K_b:Tensor) -> Tensor:
    x = x + self.duc_forward(convolve(self.LayerNorm(x), K_f))
    x = x + self.duc_backward(convolve(self.norm_backward(x), K_b, backward=True))
    return x + self.mlp(x)

class S4DLayer:
  """x + GLU( mix( gelu( K_f ∗ h + K_b ∗ h in reversed time + D h ))), h = LayerNorm(x), where
  GLU([value, gate]) = value * sigmoid(gate): the layer that S4D runs on the Long Range Arena (Gu,
  Goel, Gupta, Ré 2022, arXiv 2206.11893), with H3's diagonal SSM, one a channel and direction."""
  def __init__(self, cfg:BiGSConfig, rng:Generator):
    D = cfg.d_model
    self.LayerNorm = LayerNorm(D, cfg.norm_eps)
    self.D = param(rng.normal(0, 1, D))
    self.mix = dense(D, 2*D, rng)
    self.fs4, self.bs4 = (SimpleNamespace(kernel=DiagSSM(D, cfg.d_state, rng, skip=False))
                          for _ in range(2))

  def __call__(self, x:Tensor, K_f:Tensor, K_b:Tensor) -> Tensor:
    h = self.LayerNorm(x)
    forward = fftconv(h, K_f, self.D, channels_last=True)
    backward = fftconv(h.flip(1), K_b, channels_last=True).flip(1)
    value, gate = self.mix((forward + backward).gelu()).chunk(2, dim=-1)
    return x + value * gate.sigmoid()

LAYERS = {"gated": GatedSSM, "stack": StackSSM, "stack-serial": SerialSSM,
          "gated-attention": GatedAttention, "attention": StackAttention, "s4d": S4DLayer}

# ---------------------------------------------------------------- the model

class BiGS:
  """The encoder and its heads. Parameters are float32, drawn by numpy from `seed`; None: the
  matrices are without values, as in H3LM. `get_state_dict(model)` gives the official PyTorch
  names, where there are any. tokens (B,L) int; token_type (B,L) int, by default all 0.

  heads: those of HEADS to make now; others are made, untrained, when first used.
  """
  def __init__(self, config:BiGSConfig, seed:int|None=0, heads:tuple[str, ...]=("mlm",)):
    self.config, D = config, config.d_model
    self.rng = Blank() if seed is None else np.random.default_rng(seed)
    table = lambda rows: Embedding(rows, D, self.rng, 0.02)
    embeddings = SimpleNamespace(
      word_embeddings=table(config.vocab_size), LayerNorm=LayerNorm(D, config.norm_eps),
      position_embeddings=table(config.max_length), token_type_embeddings=table(config.n_types))
    layers = [LAYERS[config.block](config, self.rng) for _ in range(config.n_layer)]
    self.bigs = SimpleNamespace(embeddings=embeddings, encoder=SimpleNamespace(layer=layers))
    for head in heads: self.add(head)

  def add(self, head:str) -> None:
    "Makes a head's parameters where they are missing. ValueError for another name."
    require(head in HEADS, f"no head is called {head!r}, only {', '.join(HEADS)}.")
    c, D = self.config, self.config.d_model
    lecun = lambda n_out: Linear(D, n_out, self.rng, D**-0.5)       # F:610, 966, 1076
    if head == "mlm" and not hasattr(self, "cls"):
      transform = SimpleNamespace(dense=lecun(D), LayerNorm=LayerNorm(D, c.norm_eps))
      predictions = SimpleNamespace(transform=transform, bias=param(np.zeros(c.vocab_size)))
      self.cls = SimpleNamespace(predictions=predictions)
    if head in ("classify", "choose") and not hasattr(self.bigs, "pooler"):
      self.bigs.pooler = SimpleNamespace(dense=dense(D, D, self.rng))
    if head in ("classify", "choose", "tag") and not hasattr(self, "classifier"):
      self.classifier = lecun(1 if head == "choose" else c.n_labels)
    if head == "span" and not hasattr(self, "qa_outputs"): self.qa_outputs = lecun(2)

  def embed(self, tokens:Tensor, token_type:Tensor|None=None) -> Tensor:
    "Words, token types and positions, added and normalised (T:210-217). (B,L,D)"
    e, L, most = self.bigs.embeddings, tokens.shape[-1], self.config.max_length
    require(1 <= L <= most, f"{L} tokens where the model has positions for 1 to {most}.")
    types = e.token_type_embeddings
    typed = types.weight[0] if token_type is None else types(token_type)
    x = e.word_embeddings(tokens) + typed + e.position_embeddings.weight[:L]
    return e.LayerNorm(x).dropout(self.config.embed_dropout)

  def filters(self, L:int) -> list[tuple[Tensor, ...]]:
    """K_f and K_b of each layer, all made at once; () for attention. Filters (1,L), or, up to
    BY_TOEPLITZ, their Toeplitz matrices (L,L); in "s4d" filters (D,L)."""
    layers = self.bigs.encoder.layer
    if "attention" in self.config.block: return [()] * len(layers)
    ssms = [ssm for layer in layers for ssm in (layer.fs4, layer.bs4)]
    if self.config.block == "s4d":
      K = [*filters_of([ssm.kernel for ssm in ssms], L)]
    else:
      K = stored(filters(ssms, L))                                  # (S,L)
      K = stored(toeplitz(K)) if L <= BY_TOEPLITZ else K.unsqueeze(1)
      K = [k.squeeze(0) for k in K.chunk(len(ssms))]
    return [*zip(K[::2], K[1::2])]

  def encode(self, tokens:Tensor, token_type:Tensor|None=None) -> Tensor:
    "(B,L,D), without a norm after the last layer. ValueError for more than max_length tokens."
    x = self.embed(tokens, token_type)
    layers = self.bigs.encoder.layer
    for layer, K in zip(layers, self.filters(tokens.shape[-1])): x = layer(x, *K)
    return x

  def mlm(self, tokens:Tensor, token_type:Tensor|None=None, at:Tensor|None=None) -> Tensor:
    """Logits (B,L,V), or only those at positions `at` (B,n): (B,n,V). The head's GELU is the erf
    one, in both official versions (T:405-439)."""
    self.add("mlm")
    head, x = self.cls.predictions, self.encode(tokens, token_type)
    if at is not None:
      B, L, D = x.shape
      rows = at + Tensor.arange(B).unsqueeze(1)*L
      x = lookup(x.reshape(B*L, D), rows)
    x = head.transform.LayerNorm(head.transform.dense(x).gelu("none"))
    return x.linear(self.bigs.embeddings.word_embeddings.weight.transpose(), head.bias)

  def pool(self, tokens:Tensor, mask:Tensor|None=None, token_type:Tensor|None=None) -> Tensor:
    "tanh(Dense(mean over positions whose mask is 1)): (B,D). Without a mask: all but padding."
    x = self.encode(tokens, token_type)                             # (B,L,D)
    if self.config.pooler == "mean": mean = x.mean(1)
    else:
      seen = tokens != self.config.pad_token if mask is None else mask
      seen = seen.float().unsqueeze(-1)
      mean = (x*seen).sum(1) / seen.sum(1).maximum(1)
    return self.bigs.pooler.dense(mean).tanh()

  def classify(self, tokens:Tensor, mask:Tensor|None=None, token_type:Tensor|None=None) -> Tensor:
    "(B,n_labels): logits, or with one label a real value (T:713-766). mask as in `pool`."
    self.add("classify")
    x = self.pool(tokens, mask, token_type)
    return self.classifier(x.dropout(self.config.embed_dropout))

  def choose(self, tokens:Tensor, mask:Tensor|None=None, token_type:Tensor|None=None) -> Tensor:
    """Multiple choice: tokens (B,C,L), mask and token_type like them -> logits (B,C) (T:806-861).
    ValueError where the classifier has more than one output."""
    self.add("choose")
    n = self.classifier.weight.shape[0]
    require(n == 1, f"the classifier has {n} outputs, multiple choice takes 1.")
    B, C, L = tokens.shape
    texts = (x if x is None else x.reshape(B*C, L) for x in (tokens, mask, token_type))
    return self.classify(*texts).reshape(B, C)

  def span(self, tokens:Tensor, token_type:Tensor|None=None) -> tuple[Tensor, Tensor]:
    """Logits (B,L) of an answer's first and last token (T:955-1012). Question and padding are not
    left out."""
    self.add("span")
    x = self.qa_outputs(self.encode(tokens, token_type))
    return x[..., 0], x[..., 1]

  def tag(self, tokens:Tensor, token_type:Tensor|None=None) -> Tensor:
    "Logits (B,L,n_labels) for each token (T:884-932)."
    self.add("tag")
    x = self.encode(tokens, token_type)
    return self.classifier(x.dropout(self.config.embed_dropout))

  def lengthen(self, max_length:int) -> None:
    """Extends the position table to max_length by repeating its rows, as Longformer does. The SSMs
    take any length as they are."""
    if max_length <= self.config.max_length: return
    table = self.bigs.embeddings.position_embeddings
    rows = np.resize(table.weight.numpy(), (max_length, self.config.d_model))
    table.weight, self.config.max_length = param(rows), max_length

  @staticmethod
  def from_pretrained(path_or_name:str, head:str|None=None, gelu:str|None=None,
                      n_labels:int|None=None) -> BiGS:
    """The model in a file or folder, or a released one by its name (BiGS_128, …), downloaded once.

    A file is pytorch_model.bin, model.safetensors or flax_model.msgpack with the config.json beside
    it, or a checkpoint of train.py. Its shape is that of the tensors. head: the only one to keep,
    by default all in the file; what the file lacks of it starts untrained, and a line on stderr
    says so. n_labels: outputs of a new classifier. gelu: by default "erf" for PyTorch's files and
    "tanh" for flax's, which gives each file's own logits.
    Raises CheckpointError, one line, for anything else."""
    from support.checkpoints import bigs_model, find, read_weights
    path = find(path_or_name)
    return bigs_model(*read_weights(path), str(path), head, gelu, n_labels)
