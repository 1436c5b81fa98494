"""BiGS ("Pretraining Without Attention"): masked language models of gated state space layers, and its baselines.

Paper: Wang, Yan, Gu, Rush 2022, arXiv 2212.10544, the section on the model and its figure of the two architectures.
Official code, cited below as file:line: github.com/jxiw/BiGS, T BiGS/modeling_bigs.py (PyTorch), F
BiGS/modeling_flax_bigs.py (JAX). `python train.py --task mlm` trains one, `python generate.py --fill` asks it;

  python bigs_tiny.py --plot out           draws what each layer's SSMs look at
  python bigs_tiny.py --flops              arithmetic of a forward pass by length, beside BERT's

Glossary. B batch, L length, V vocabulary, and then
  symbol      shape      paper, official name
  d_model, D  D          width of the model, hidden_size; an SSM's D is its skip weight, one number
  d_inner, I  I          width of the gate, intermediate_size (3D in the released models)
  A, C, dt    (N,)       an SSM x' = A x + u, y = Re C x, complex, N = d_state; one for all channels
  K           (1,L)      its filter, K[l] = Re sum_n C (exp(dt A) - 1)/A exp(dt A l); forward K_f, backward K_b
  H           (B,L,D)    a layer's input after the norm
  V           (B,L,I)    its gate
The four blocks, `BiGSConfig.block`, as routing (attention or two SSMs) x form (gated, or a Transformer's stack):
  "gated"            13 D^2  X + (s((SSM_f ⊙ SSM_b) W) ⊙ V) W', BiGS; s is GELU
  "gated-attention"  13 D^2  the same with self-attention for the SSMs
  "attention"        12 D^2  BERT's layer with the norms in front: X + attention, then + MLP
  "stack"            12 D^2  the same with two SSMs for attention, STACK/SSM
and, for the Long Range Arena, "s4d", 2 D^2: S4's layer, an SSM of its own for each channel and direction.

Not here: attention masks (the official encoder takes one and drops it: padding is text like any other, so pad as in
training), next-sentence prediction, norms behind the layers, the bilinear discretisation.
"""
from __future__ import annotations
import dataclasses, math, sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
import numpy as np
from tinygrad import GlobalCounters, Tensor
from flashconv import Vandermonde, check_kernels, cmul, embedding, fftconv, matmul, setup_device, stored
from h3tiny import Attention, Blank, DiagSSM, LayerNorm, Linear, joined, param

BLOCKS = ("gated", "stack", "gated-attention", "attention")
HEADS = ("mlm", "classify", "choose", "span", "tag")
BY_TOEPLITZ = 128        # up to this length a convolution is a matrix product, from there on `fftconv` (see convolve)

# ---------------------------------------------------------------- configuration

@dataclasses.dataclass
class BiGSConfig:
  "Everything that fixes a model's shape. ValueError, one sentence, if the values can't be."
  vocab_size: int = 30522
  d_model: int = 768
  n_layer: int = 12
  block: str = "gated"
  d_inner: int = 0                   # 0: 3 d_model in gated blocks, 4 in BERT's, 5 in the stack of SSMs, see above
  n_heads: int = 12                  # of attention blocks
  d_state: int = 64                  # N
  max_length: int = 512              # rows of the position table
  n_types: int = 2
  gelu: str = "tanh"                 # in the layers: "tanh" as in JAX, where the releases were trained, or "erf", T:319
  pooler: str = "non_padding_mean"   # or "mean"
  pad_token: int = 0
  norm_eps: float = 1e-12
  embed_dropout: float = 0.0         # 0.1 in the official recipe
  n_labels: int = 2                  # of a classifier
  rotary_dim: ClassVar[int] = 0      # attention gets its positions from the embedding
  init_std: ClassVar[property] = property(lambda self: std(self.d_model))           # of attention's first weights

  def __post_init__(self):
    if self.block not in (*BLOCKS, "s4d"):
      raise ValueError(f"block must be one of {', '.join(BLOCKS)}, s4d, not {self.block!r}.")
    self.d_inner = self.d_inner or self.d_model * {"stack": 5, "attention": 4}.get(self.block, 3)
    for f in ("vocab_size", "d_model", "n_layer", "d_inner", "n_heads", "d_state", "max_length", "n_types", "n_labels"):
      if not isinstance(getattr(self, f), int) or getattr(self, f) < 1:
        raise ValueError(f"{f} must be a whole number of at least 1, not {getattr(self, f)!r}.")
    if "attention" in self.block and self.d_model % self.n_heads:
      raise ValueError(f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads}).")
    if self.block == "s4d" and self.d_state % 2: raise ValueError(f"d_state must be even, not {self.d_state}.")
    if self.gelu not in ("tanh", "erf"): raise ValueError(f"gelu must be 'tanh' or 'erf', not {self.gelu!r}.")
    if self.pooler not in ("non_padding_mean", "mean"):
      raise ValueError(f"pooler must be 'non_padding_mean' or 'mean', not {self.pooler!r}.")
    if not isinstance(self.norm_eps, float) or self.norm_eps <= 0:
      raise ValueError(f"norm_eps must be above 0, not {self.norm_eps!r}.")
    if not 0 <= self.embed_dropout < 1:
      raise ValueError(f"embed_dropout must be at least 0 and below 1, not {self.embed_dropout}.")

  @staticmethod
  def large(block:str="gated", max_length:int=128) -> BiGSConfig:
    "The released shape (23 layers), or a baseline of as many weights (24)."
    return BiGSConfig(30522, 1024, 23 if block.startswith("gated") else 24, block, n_heads=16, max_length=max_length)

# ---------------------------------------------------------------- the SSM

def hippo(N:int) -> np.ndarray:
  """Imaginary parts, ascending, of the eigenvalues of HiPPO-LegS's normal part (F:158-193); the real ones are -1/2.

  A + p p^T = S - 1/2, p_n = sqrt(n + 1/2), A_nk = -sqrt((2n+1)(2k+1)) below the diagonal and -(n+1) on it: S is
  skew-symmetric."""
  p = np.sqrt(np.arange(N) + 0.5)
  S = np.outer(p, p)
  return np.linalg.eigvalsh(-1j * (np.triu(S, 1) - np.tril(S, -1)))

class S4D:
  "One scalar SSM for all channels: 4N + 2 numbers. T:221-288, F:227-326."
  def __init__(self, N:int, rng:np.random.Generator):
    self.D = param(np.ones(1))
    self.kernel = SimpleNamespace(C=param(rng.normal(0, 0.5**0.5, (N, 2))), A_re=param(np.full(N, -0.5)),
                                  A_im=param(hippo(N)), log_step=param(rng.uniform(math.log(0.01), 0, 1)))

def filters(ssms:list[S4D], L:int) -> Tensor:
  """K of each SSM, D added to its first tap: y = K ∗ u is then all it does. (S,L)

  Zero-order hold, the real part taken of all N modes, no factor 2 (T:251-258). A_re is kept below -1e-4 (T:247)."""
  C, A_re, A_im, log_step = (Tensor.stack(*[getattr(s.kernel, k) for s in ssms])
                             for k in ("C", "A_re", "A_im", "log_step"))
  dt, re, im = log_step.exp(), A_re.minimum(-1e-4), A_im            # (S,1), (S,N), (S,N)
  size, angle = (dt*re).exp(), dt*im
  dA, inv = (size*angle.cos(), size*angle.sin()), 1 / (re*re + im*im)
  w = cmul((C[..., 0], C[..., 1]), cmul((dA[0] - 1, dA[1]), (re*inv, -im*inv)))
  K = Vandermonde(dA, L).sum((0.5*w[0], 0.5*w[1]))                  # its sum is 2 Re
  return K + Tensor.stack(*[s.D for s in ssms]).pad((None, (0, L-1)))

def toeplitz(K:Tensor) -> Tensor:
  "T[t,s] = K[t-s], 0 above the diagonal: (S,L) -> (S,L,L)."
  S, L = K.shape
  c = K.flip(-1).pad((None, (0, L)))                                # c[L-1-l] = K[l], and then zeros
  rows = c.unsqueeze(1).expand(S, L, 2*L).reshape(S, -1)[:, :L*(2*L-1)].reshape(S, L, 2*L-1)   # [t,j] = c[j-t]
  return rows[..., L-1:]

def convolve(u:Tensor, K:Tensor, backward:bool=False) -> Tensor:
  """y[t] = sum_s K[t-s] u[s], s <= t; backward: K[s-t], s >= t, as if time ran the other way. u (B,L,D).

  One filter for all channels is one Toeplitz matrix: K as (L,L), or as (1,L) for `fftconv`."""
  if K.shape[0] == 1:
    y = fftconv(u.flip(1) if backward else u, K, channels_last=True)
    return y.flip(1) if backward else y
  return matmul(K.transpose(0, 1) if backward else K, u)

# ---------------------------------------------------------------- the four blocks

def std(n_in:int) -> float:
  """Of a Dense's initial weights: the official 0.02, and in models narrower than it was meant for 1/sqrt(n_in), without
  which the product of two directions starves: at width 64 BiGS then learns subject-verb agreement, and at 0.02 not in
  the same 600 steps."""
  return max(0.02, n_in**-0.5)

def dense(n_in:int, n_out:int, rng:np.random.Generator) -> Linear: return Linear(n_in, n_out, rng, std(n_in))

class Layer:
  "One layer of any block (T:291-330, F:329-410). The gated one's names are the official ones."
  def __init__(self, cfg:BiGSConfig, rng:np.random.Generator):
    D, I = cfg.d_model, cfg.d_inner
    self.gated, self.ssm, self.gelu = cfg.block.startswith("gated"), "attention" not in cfg.block, cfg.gelu
    self.LayerNorm = LayerNorm(D, cfg.norm_eps)
    if self.ssm: self.fs4, self.bs4 = S4D(cfg.d_state, rng), S4D(cfg.d_state, rng)
    else: self.attention = Attention(cfg, rng, causal=False)
    if self.gated and self.ssm:
      self.du_forward, self.du_backward, self.duc_forward, self.duc_backward = (dense(D, D, rng) for _ in range(4))
    elif self.ssm: self.mix = dense(2*D, D, rng)
    if self.gated: self.dv, self.dol, self.do = dense(D, I, rng), dense(D, I, rng), dense(I, D, rng)
    else: self.norm2, self.fc1, self.fc2 = LayerNorm(D, cfg.norm_eps), dense(D, I, rng), dense(I, D, rng)

  def activate(self, x:Tensor) -> Tensor: return x.gelu("none" if self.gelu == "erf" else "tanh")

  def route(self, h:Tensor, K_f:Tensor|None, K_b:Tensor|None) -> Tensor:
    """What lets positions see each other: h (B,L,D) -> (B,L,D).

    Of the stack's two SSMs the talk's figure shows a Concat of 2D channels that feeds the residual of D; the paper's
    prose was not at hand. Here the concatenation is followed by a Dense 2D -> D; the MLP is a quarter wider than
    BERT's, so that the layer has its 12 D^2 weights. A Dense before these SSMs would add nothing: a filter that all
    channels share changes places with it."""
    if not self.ssm: return self.attention(h)[0]
    if not self.gated: return self.mix(Tensor.cat(convolve(h, K_f), convolve(h, K_b, backward=True), dim=-1))
    u_f = self.duc_forward(convolve(self.activate(self.du_forward(h)), K_f))
    u_b = self.duc_backward(convolve(self.activate(self.du_backward(h)), K_b, backward=True))
    return u_f * u_b                                                # a product, not a sum: T:325

  def __call__(self, x:Tensor, K_f:Tensor|None=None, K_b:Tensor|None=None) -> Tensor:
    h = self.LayerNorm(x)
    u = self.route(h, K_f, K_b)
    if self.gated: return x + self.do(self.activate(self.dol(u)) * self.activate(self.dv(h)))
    x = x + u
    return x + self.fc2(self.activate(self.fc1(self.norm2(x))))

class S4DLayer:
  """x + GLU( gelu( K_f ∗ h + K_b ∗ h, time reversed, + D h )), h = norm x: what S4 runs on the Long Range Arena, with
  H3's diagonal SSM, one for each channel and direction (Gu, Goel, Gupta, Ré 2022, arXiv 2206.11893)."""
  ssm = True
  def __init__(self, cfg:BiGSConfig, rng:np.random.Generator):
    D = cfg.d_model
    self.LayerNorm, self.D, self.mix = LayerNorm(D, cfg.norm_eps), param(rng.normal(0, 1, D)), dense(D, 2*D, rng)
    self.fs4, self.bs4 = (SimpleNamespace(kernel=DiagSSM(D, cfg.d_state, rng)) for _ in range(2))
  def __call__(self, x:Tensor, K_f:Tensor, K_b:Tensor) -> Tensor:
    h = self.LayerNorm(x)
    y = fftconv(h, K_f, self.D, channels_last=True) + fftconv(h.flip(1), K_b, channels_last=True).flip(1)
    a, gate = self.mix(y.gelu()).chunk(2, dim=-1)
    return x + a*gate.sigmoid()

# ---------------------------------------------------------------- the model

class BiGS:
  """The encoder and its heads. All parameters are float32 and drawn by numpy from `seed` (None: as in H3LM);
  `get_state_dict(model)` gives the official PyTorch names, where there are any.
  tokens (B,L) int; token_type like them, 0 where left out.

  heads: which to make, of "mlm", "classify", "choose", "span", "tag"; others are made, untrained, when first used.
  """
  def __init__(self, config:BiGSConfig, seed:int|None=0, heads:tuple[str, ...]=("mlm",)):
    self.config, d = config, config.d_model
    self.rng = Blank() if seed is None else np.random.default_rng(seed)
    table = lambda rows: SimpleNamespace(weight=param(self.rng.normal(0, 0.02, (rows, d))))
    self.bigs = SimpleNamespace(
      embeddings=SimpleNamespace(word_embeddings=table(config.vocab_size), LayerNorm=LayerNorm(d, config.norm_eps),
                                 position_embeddings=table(config.max_length),
                                 token_type_embeddings=table(config.n_types)),
      encoder=SimpleNamespace(layer=[(S4DLayer if config.block == "s4d" else Layer)(config, self.rng)
                                     for _ in range(config.n_layer)]))
    for head in heads: self.add(head)

  def add(self, head:str) -> None:
    "Makes a head's parameters where they are missing. ValueError for another name."
    if head not in HEADS: raise ValueError(f"no head is called {head!r}, only {', '.join(HEADS)}.")
    d = self.config.d_model
    lecun = lambda n: Linear(d, n, self.rng, d**-0.5)               # F:610, 966, 1076
    if head == "mlm" and not hasattr(self, "cls"):
      transform = SimpleNamespace(dense=lecun(d), LayerNorm=LayerNorm(d, self.config.norm_eps))
      self.cls = SimpleNamespace(predictions=SimpleNamespace(transform=transform,
                                                             bias=param(np.zeros(self.config.vocab_size))))
    if head in ("classify", "choose") and not hasattr(self.bigs, "pooler"):
      self.bigs.pooler = SimpleNamespace(dense=dense(d, d, self.rng))
    if head in ("classify", "choose", "tag") and not hasattr(self, "classifier"):
      self.classifier = lecun(1 if head == "choose" else self.config.n_labels)
    if head == "span" and not hasattr(self, "qa_outputs"): self.qa_outputs = lecun(2)

  def embed(self, tokens:Tensor, token_type:Tensor|None=None) -> Tensor:
    "Words, token types and positions, added and normalised (T:210-217). (B,L,D)"
    e, L = self.bigs.embeddings, tokens.shape[-1]
    if not 1 <= L <= self.config.max_length:
      raise ValueError(f"{L} tokens where the model has positions for 1 to {self.config.max_length}.")
    types = e.token_type_embeddings.weight
    types = types[0] if token_type is None else embedding(token_type, types)
    x = embedding(tokens, e.word_embeddings.weight) + types + e.position_embeddings.weight[:L]
    return e.LayerNorm(x).dropout(self.config.embed_dropout)

  def filters(self, L:int) -> list[tuple[Tensor|None, Tensor|None]]:
    "K_f, K_b of each layer, all made at once, as `convolve` takes them; None for attention."
    layers = self.bigs.encoder.layer
    if not layers[0].ssm: return [(None, None)] * len(layers)
    if self.config.block == "s4d":
      K = stored(joined([s.kernel for l in layers for s in (l.fs4, l.bs4)]).filter(L)).chunk(2*len(layers))
      return [*zip(K[::2], K[1::2])]
    K = stored(filters([s for l in layers for s in (l.fs4, l.bs4)], L))
    parts = (stored(toeplitz(K)) if L <= BY_TOEPLITZ else K.unsqueeze(1)).chunk(K.shape[0])
    return [(f.squeeze(0), b.squeeze(0)) for f, b in zip(parts[::2], parts[1::2])]

  def encode(self, tokens:Tensor, token_type:Tensor|None=None) -> Tensor:
    "(B,L,D), without a norm after the last layer. ValueError for more than max_length tokens."
    x = self.embed(tokens, token_type)
    for layer, K in zip(self.bigs.encoder.layer, self.filters(tokens.shape[-1])): x = layer(x, *K)
    return x

  def mlm(self, tokens:Tensor, token_type:Tensor|None=None, at:Tensor|None=None) -> Tensor:
    "Logits (B,L,V), or (B,n,V) at the places `at` (B,n) alone. Erf GELU here, in both official versions (T:405-439)."
    self.add("mlm")
    head, x = self.cls.predictions, self.encode(tokens, token_type)
    if at is not None:
      B, L, D = x.shape
      x = embedding(at + Tensor.arange(B).unsqueeze(1)*L, x.reshape(B*L, D))
    x = head.transform.LayerNorm(head.transform.dense(x).gelu("none"))
    return matmul(x, self.bigs.embeddings.word_embeddings.weight, transposed=True, bias=head.bias)

  def pool(self, tokens:Tensor, mask:Tensor|None=None, token_type:Tensor|None=None) -> Tensor:
    "tanh(Dense(mean over the positions whose mask is 1)): (B,D). Without a mask, over all that are not padding."
    x = self.encode(tokens, token_type)                             # (B,L,D)
    if self.config.pooler == "mean": mean = x.mean(1)
    else:
      m = (tokens != self.config.pad_token if mask is None else mask).float().unsqueeze(-1)
      mean = (x*m).sum(1) / m.sum(1).maximum(1)
    return self.bigs.pooler.dense(mean).tanh()

  def outputs(self, n:int|None=None) -> Linear:
    have = self.classifier.weight.shape[0]
    if n is not None and have != n: raise ValueError(f"the classifier has {have} outputs, multiple choice takes {n}.")
    return self.classifier

  def classify(self, tokens:Tensor, mask:Tensor|None=None, token_type:Tensor|None=None) -> Tensor:
    "(B,n_labels): logits, or with one label a real value (T:713-766). mask as of `pool`."
    self.add("classify")
    return self.outputs()(self.pool(tokens, mask, token_type).dropout(self.config.embed_dropout))

  def choose(self, tokens:Tensor, mask:Tensor|None=None, token_type:Tensor|None=None) -> Tensor:
    "Multiple choice: tokens (B,C,L), mask and token_type like them -> logits (B,C) (T:806-861)."
    self.add("choose")
    B, C, L = tokens.shape
    one = lambda x: None if x is None else x.reshape(B*C, L)
    x = self.pool(*map(one, (tokens, mask, token_type))).dropout(self.config.embed_dropout)
    return self.outputs(1)(x).reshape(B, C)

  def span(self, tokens:Tensor, token_type:Tensor|None=None) -> tuple[Tensor, Tensor]:
    "Logits (B,L) of an answer's first and last token (T:955-1012). Question and padding are not left out."
    self.add("span")
    x = self.qa_outputs(self.encode(tokens, token_type))
    return x[..., 0], x[..., 1]

  def tag(self, tokens:Tensor, token_type:Tensor|None=None) -> Tensor:
    "Logits (B,L,n_labels) for each token (T:884-932)."
    self.add("tag")
    return self.outputs()(self.encode(tokens, token_type).dropout(self.config.embed_dropout))

  def lengthen(self, max_length:int) -> None:
    "More positions: copies of the table's rows, one after the other, as Longformer does. The SSMs need nothing."
    if max_length <= self.config.max_length: return
    table = self.bigs.embeddings.position_embeddings
    table.weight = param(np.resize(table.weight.numpy(), (max_length, self.config.d_model)))
    self.config.max_length = max_length

  @staticmethod
  def from_pretrained(path_or_name:str, head:str|None=None, gelu:str|None=None, n_labels:int|None=None) -> BiGS:
    """The model in a file or folder, or a released one by its name (BiGS_128, …), downloaded once.

    A file is pytorch_model.bin, model.safetensors or flax_model.msgpack with the config.json beside
    it, or a checkpoint of train.py. Its shape is that of the tensors. head: keep this one only;
    what of it the file lacks starts untrained, and a line on stderr says so; by default all that
    are there. n_labels: of a new classifier. gelu: by default "erf" for PyTorch's files and "tanh"
    for flax's, to get the logits that each of them gives.
    Raises CheckpointError, one line, for anything else."""
    from support.checkpoints import bigs_model, find, read_weights
    path = find(path_or_name)
    return bigs_model(*read_weights(path), str(path), head, gelu, n_labels)

# ---------------------------------------------------------------- what the models cost, and what they look at

LENGTHS = (128, 512, 1024, 4096)
# one forward pass, BiGS and BERT, as notes on the paper have it: unverified
PAPER = {128: (8.1e10, 7.9e10), 512: (3.2e11, 3.4e11), 1024: (6.5e11, 7.2e11), 4096: (2.6e12, 4.1e12)}

def flops() -> None:
  "Arithmetic of one forward pass of the large encoders, random weights, one sequence, as tinygrad counts it."
  print(f"operations of a forward pass, one sequence, width 1024; in brackets the paper's (unverified)\n{'length':>6}  "
        f"{'BiGS, 23 layers':>22}  {'BERT, 24 layers':>22}  ratio", flush=True)
  counts, shapes = {}, {block: BiGSConfig.large(block, LENGTHS[-1]) for block in ("gated", "attention")}
  for block, config in shapes.items():
    model = BiGS(config, heads=())
    for L in LENGTHS:
      tokens = Tensor(np.random.default_rng(0).integers(0, config.vocab_size, (1, L)).astype(np.int32)).realize()
      GlobalCounters.reset()
      x = model.embed(tokens).realize()
      # one by one, lest all layers' products are held at once
      filters = model.filters(L)
      Tensor.realize(*(K for pair in filters for K in pair if K is not None), x)
      for layer, pair in zip(model.bigs.encoder.layer, filters): x = layer(x, *pair).realize()
      counts[L, block] = GlobalCounters.global_ops
  for L in LENGTHS:
    (ours, bert), (a, b) = (counts[L, block] for block in shapes), PAPER.get(L, (0, 0))
    print(f"{L:6}  {ours:9.2e} ({a:9.2e})  {bert:9.2e} ({b:9.2e})  {ours/bert:4.2f}x", flush=True)

def plot(name:str, offsets:int=10) -> Path:
  "Draws |K| of each layer, scaled to 1: what lies before a position to the left, what follows to the right."
  from support.checkpoints import CheckpointError, bigs_model, find, read_weights
  path = find(name)
  model = bigs_model(*read_weights(path), str(path))
  layers = model.bigs.encoder.layer
  if not layers[0].ssm: raise CheckpointError(f"{path}: its layers are attention, which has no filters to draw.")
  if model.config.block == "s4d": raise CheckpointError(f"{path}: it has a filter for each channel, too many to draw.")
  try: import matplotlib
  except ImportError: raise CheckpointError("the plot needs matplotlib: pip install matplotlib.") from None
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  K = np.abs(filters([s for l in layers for s in (l.fs4, l.bs4)], offsets + 1).numpy())       # (2 layers,offsets+1)
  cols = min(6, len(layers))
  rows = -(-len(layers) // cols)
  fig, axes = plt.subplots(rows, cols, figsize=(2.3*cols, 1.5*rows + 0.5), sharex=True, sharey=True, squeeze=False,
                           dpi=150)
  x = np.arange(offsets + 1)
  for i, ax in enumerate(axes.flat):
    ax.axis("off" if i >= len(layers) else "on")
    if i >= len(layers): continue
    f, b = K[2*i], K[2*i+1]
    top = max(f.max(), b.max()) or 1
    ax.fill_between(-x, f/top, step="mid", color="#4c78a8", alpha=0.8, lw=0, label="forward")
    ax.fill_between(x, b/top, step="mid", color="#e45756", alpha=0.8, lw=0, label="backward")
    ax.axvline(0, color="#444444", lw=0.8)
    ax.set_title(f"layer {i+1}", fontsize=8, loc="left")
    ax.set(yticks=[], xlim=(-offsets-0.5, offsets+0.5), ylim=(0, 1.05))
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(labelsize=7)
  fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="upper right", ncols=2,
             frameon=False, fontsize=8)
  fig.suptitle(f"What each layer looks at: |K| by distance in tokens ({path.parent.name or path.name})", fontsize=9,
               x=0.01, ha="left")
  fig.tight_layout()
  fig.savefig(out := path.with_name("filters.png"))
  plt.close(fig)
  return out

def main(argv:list[str]|None=None) -> int:
  from support.text import Parser, number
  from support.checkpoints import CheckpointError
  p = Parser(prog="bigs_tiny.py", description="Looks into a BiGS model, or counts what one costs.", allow_abbrev=False)
  p.add_argument("--plot", metavar="CHECKPOINT", help="draw the filters of each layer into filters.png beside it")
  p.add_argument("--offsets", metavar="N", type=number(int, 1), default=10, help="how far the plot looks (default: 10)")
  p.add_argument("--flops", action="store_true",
                 help="arithmetic of a forward pass by length, BiGS and BERT (3 minutes)")
  args = p.parse_args(argv)
  if not args.plot and not args.flops: p.error("nothing to do: give --plot CHECKPOINT or --flops")
  setup_device()
  check_kernels()
  try:
    if args.plot: print(f"wrote {plot(args.plot, args.offsets)}")
    if args.flops: flops()
  except CheckpointError as e: p.error(str(e))
  except OSError as e: p.error(f"{e.filename}: {e.strerror}")
  return 0

if __name__ == "__main__": sys.exit(main())
