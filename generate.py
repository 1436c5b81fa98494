"""Text from a trained model, token by token.

  python generate.py                                  goes on from a prompt with train.py's newest model
  python generate.py --prompt "class Stack:" --tokens 500 --temperature 0.7
  python generate.py --prompt "import os" "def main(" --batch 2          several side by side, of any lengths
  echo "import os" | python generate.py --model out/checkpoint.safetensors
  python generate.py --model 1.3B --dtype bfloat16    a released one, downloaded once, in half the memory
  python generate.py --perplexity book.txt            how well a model foresees a text
  python generate.py --score questions.jsonl          multiple choice by likelihood
  python generate.py --export h3/model.safetensors    the model as the authors' code reads it
  python generate.py --fill "for i in [MASK](10):"    what a masked model (train.py --task mlm) puts there
  python generate.py --bench                          how fast H3, hybrid and Transformer read and write

The prompt is read in pieces, convolutions that hand on the state (`ssm_conv`); every further token is one
step: constant time and memory in the H3 layers, a key-value cache in the attention layers. As a function:

  for tokens in generate(model, prompt_ids, n=200, temperature=0.8): ...      # (B,) at a time

Not here: beam search, repetition penalties.
"""
import argparse, codecs, collections, dataclasses, functools, json, math, os, re, stat, sys
import time
from pathlib import Path
from typing import Callable, Iterator
import numpy as np
from flashconv import WEIGHTS, capture
from support.cpu import check_kernels, setup_device
from bigs_tiny import BiGS
from h3tiny import H3Config, H3LM
from support.checkpoints import (CHECKPOINT, RELEASED, CheckpointError, bigs_model, find, h3_model,
                                 read_weights, save_official)
from support.text import (TEXT_KEY, TOKENIZERS, ByteTokenizer, Tokenizer, UserError, make_tokenizer,
                          read_text, read_texts)
from tinygrad import Device, Tensor, dtypes
from tinygrad.device import Buffer
from tinygrad.helpers import tqdm

OUT = "out"                                # train.py's default folder

class Parser(argparse.ArgumentParser):
  def error(self, message:str):
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", " ".join(message.split()))
    self.exit(2, f"{self.prog}: error: {line}\n")

def number(kind:type, low:float|None=None, high:float|None=None, above:float|None=None):
  "An argparse type: an int or a float, low <= x <= high, x > above."
  wanted = "a whole number" if kind is int else "a number"
  if low is not None: wanted += f" of at least {low}"
  if above is not None: wanted += f" above {above}"
  if high is not None: wanted += f" and at most {high}"
  def parse(text:str) -> int|float:
    try: x = kind(text)
    except ValueError: raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
    if x != x or abs(x) == float("inf") or (low is not None and x < low) \
       or (above is not None and x <= above) or (high is not None and x > high):
      raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return x
  return parse

def peak_memory() -> float:
  "Of this process so far, in bytes; nan where the system does not say."
  try: import resource
  except ImportError: return math.nan
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

# ---- sampling -------------------------------------------------------------------------------------

def finite(x:np.ndarray) -> np.ndarray:
  "Returns logits, or -log p, (…,n). Raises UserError where a row holds NaN or +inf, or nothing but -inf."
  if not np.isfinite(x.max(-1)).all():
    raise UserError("the model's logits are not finite: its weights are damaged, or its training diverged")
  return x

def sample(logits:np.ndarray, rng:np.random.Generator, temperature:float=1.0, top_k:int=0,
           top_p:float=1.0) -> np.ndarray:
  """One token a row: logits (B,V) -> (B,). Temperature 0 takes the likeliest. top_k keeps the k likeliest,
  top_p the fewest whose probabilities reach p (after top_k and the temperature). UserError as in `finite`."""
  if temperature == 0: return finite(logits).argmax(-1)
  x = finite(logits).astype(np.float64)
  if 0 < top_k < x.shape[-1]: x[x < np.partition(x, -top_k, -1)[:, -top_k, None]] = -np.inf
  p = np.exp((x - x.max(-1, keepdims=True)) / temperature)
  p /= p.sum(-1, keepdims=True)
  if top_p < 1:
    order = np.argsort(-p, -1, kind="stable")
    ranked = np.take_along_axis(p, order, -1)
    ranked[ranked.cumsum(-1) - ranked >= top_p] = 0     # what came before it was already enough
    np.put_along_axis(p, order, ranked, -1)
  c = p.cumsum(-1)
  return (c / c[:, -1:] > rng.random((len(x), 1))).argmax(-1)

class Session:
  """Texts side by side, read in pieces and written token by token; what they hold is one state of fixed size.

  A TinyJit for each size of piece (and of the part of the attention caches that it looks at), and one for a step:
  nothing is compiled anew as the texts grow. start: padding before each text, see H3LM.init_state.
  """
  def __init__(self, model:H3LM, batch:int, max_length:int, start:list[int]|None=None):
    self.model, self.state, self.length = model, model.init_state(batch, max_length, start), 0
    self.tables, self.graphs = model.tables(), {}
  def __call__(self, tokens:np.ndarray) -> np.ndarray:
    "tokens (B,), or a piece (B,L) -> logits (B,vocab_size) after the last"
    self.length += (L := tokens.shape[1] if tokens.ndim == 2 else 1)
    room = max(4096, 1 << (self.length-1).bit_length()) if L > 1 and self.model.config.attn_layers else None
    if (L, room) not in self.graphs:
      tables, given = self.tables if tokens.ndim == 1 else None, Tensor(np.zeros(tokens.shape, np.int32)).realize()
      self.graphs[L, room] = capture(lambda t: self.model.advance(t, self.state, room, tables)), given
    graph, given = self.graphs[L, room]
    # a new Tensor for each token would take 1.5 ms more
    given._buffer().copy_from(Buffer("NPY", tokens.size, dtypes.int, opaque=np.ascontiguousarray(tokens, np.int32)))
    return graph(given).numpy()[:, :self.model.config.vocab_size]
  def read(self, tokens:np.ndarray, piece:int) -> np.ndarray:
    "A prompt (B,P), P a multiple of `piece`."
    for at in range(0, tokens.shape[1], piece): logits = self(tokens[:, at:at+piece] if piece > 1 else tokens[:, at])
    return logits

def piece_size(longest:int, batch:int) -> int:
  """How many tokens of a prompt are read at once: pieces of one size, lest others are compiled, as large as memory
  and little padding allow (an eighth of the prompt); 1, token by token, where that is as fast."""
  if longest <= 8: return 1
  return next((c for c in (2048, 1024, 512, 256, 128, 64) if c*batch <= 1 << 14 and -longest % c <= longest/8), 32)

def generate(model:H3LM, prompts:np.ndarray|list[np.ndarray], n:int, temperature:float=1.0, top_k:int=0,
             top_p:float=1.0, seed:int=0, max_length:int|None=None) -> Iterator[np.ndarray]:
  """Continues prompts: (P,) or (B,P), or a list of B arrays of any lengths; P >= 1. Yields n arrays (B,) of tokens,
  one at a time. max_length: the room in the attention layers' caches (default: the config's). Raises UserError where
  prompt and continuation do not fit in it; models without attention have no limit."""
  prompts = [np.asarray(p, np.int32) for p in (prompts if isinstance(prompts, list) else np.atleast_2d(prompts))]
  if not prompts or not all(map(len, prompts)):
    raise UserError("a prompt is empty: generate needs at least one token to go on from")
  B, longest, shortest = len(prompts), max(map(len, prompts)), min(map(len, prompts))
  room = max_length or model.config.max_length
  if model.config.attn_layers and longest + n > room:
    raise UserError(f"{longest} tokens of prompt and {n} to generate exceed the cache of {room}: "
                    f"ask for fewer tokens, or give --max-length {longest + n}")
  if (most := model.config.max_positions) and longest + n - 1 > most:          # the last one is not read
    raise UserError(f"{longest} tokens of prompt and {n} to generate, where the model has learned positions for "
                    f"{most}: ask for fewer tokens")
  piece = piece_size(longest, B) if longest == shortest else max(32, piece_size(longest, B))
  P = -(-longest//piece)*piece
  start = [P - len(p) for p in prompts] if shortest < P else None
  # the caches are no larger than this text needs
  session, rng = Session(model, B, -(-(P+n)//256)*256, start), np.random.default_rng(seed)
  logits = session.read(np.stack([np.pad(p, (P - len(p), 0)) for p in prompts]), piece)
  for i in range(n):
    yield (token := sample(logits, rng, temperature, top_k, top_p))
    if i < n-1: logits = session(token)

# ---- likelihood -----------------------------------------------------------------------------------

def surprisal(logits:Tensor, targets:Tensor) -> Tensor:
  "-log p in nats of the targets (…), given logits (…,V); the log of the sum of all alone for a negative target."
  picked = (targets.unsqueeze(-1) == Tensor.arange(logits.shape[-1])).where(logits, 0).sum(-1)
  return logits.logsumexp(-1) - picked

def surprisals(model:H3LM) -> Callable[[np.ndarray], np.ndarray]:
  "A function of rows of tokens (B,L+1) to -log p, in nats, of each but the first, given those before it: (B,L)."
  graph = functools.cache(lambda shape: capture(lambda x, y: surprisal(model(x), y).realize()))
  def ask(rows:np.ndarray) -> np.ndarray:
    x, y = (Tensor(np.ascontiguousarray(r, np.int32)).realize() for r in (rows[:, :-1], rows[:, 1:]))
    return finite(graph(x.shape)(x, y).numpy())
  return ask

AT_ONCE = 4096                             # tokens that go through a model side by side

def document(model:H3LM, ids:np.ndarray, window:int, stride:int, ask:Callable|None=None
             ) -> tuple[np.ndarray, int]:
  """-log p in nats of each token of a document but the first, (len(ids)-1,), and how many windows that took.

  A window sees `window` tokens before its last one; each begins `stride` after the one before and adds what that did
  not reach, so that from the second window on a token is given at least window - stride others. ask: a `surprisals` of
  the model, whose graphs then serve several documents."""
  n, ask = len(ids) - 1, ask or surprisals(model)
  if n <= window:                          # rows of lengths that others may have too
    row = np.zeros((1, 1 + min(window, -(-n//64)*64)), np.int32)
    row[0, :n+1] = ids
    return ask(row)[0, :n], 1
  at, out = np.minimum(np.arange(0, n - window + stride, stride), n - window), np.empty(n)
  fresh, B = np.diff(at, prepend=at[0] - window), min(len(at), max(1, AT_ONCE // window))
  for i in tqdm(range(0, len(at), B), desc="windows", disable=len(at) <= B):
    some = np.minimum(np.arange(i, i + B), len(at) - 1)             # what fills the last batch up is the last window
    for k, row in zip(some, ask(ids[at[some][:, None] + np.arange(window+1)])):
      out[at[k] + window - fresh[k]:at[k] + window] = row[window - fresh[k]:]
  return out, len(at)

def perplexity(model:H3LM, tokenizer:Tokenizer, path:str, window:int, stride:int,
               key:str=TEXT_KEY) -> None:
  """Prints the perplexity of a file, per token and per byte. Each text of it (of a .jsonl, what
  `key` names in a line) is a document, read from <|endoftext|> on."""
  texts = [text for text in read_texts(path, key) if text]
  if not texts: raise UserError(f"{path} is empty: there is nothing to foresee")
  size, ask = sum(len(text.encode()) for text in texts), surprisals(model)
  tokens, windows, total = 0, 0, 0.0
  for text in tqdm(texts, desc="texts", disable=len(texts) < 20):
    ids = tokenizer.encode(text)
    nats, n = document(model, np.concatenate([[tokenizer.eot], ids]), window, stride, ask)
    tokens += len(ids)
    windows += n
    total += float(nats.sum())
  several = f"{len(texts):,} texts, " if len(texts) > 1 else ""
  each = f", each {stride:,} after the one before" if windows > len(texts) else ""
  print(f"{path}: {several}{tokens:,} tokens, {size:,} bytes; "
        f"{windows:,} window{'s'*(windows > 1)} of {window:,} tokens{each}\n"
        f"per token: perplexity {math.exp(total/tokens):.4g}, {total/tokens:.4f} nats\n"
        f"per byte:  perplexity {math.exp(total/size):.4g}, {total/size/math.log(2):.4f} bits", flush=True)

@dataclasses.dataclass
class Question:
  "A line of --score's file; answer: the place of the right choice, from 0."
  context: str
  choices: list[str]
  answer: int

def read_questions(path:str) -> list[Question]:
  "The lines of a JSONL file. UserError, with the line's number, for anything but questions."
  questions = []
  for i, line in enumerate(read_text(path).splitlines(), 1):
    if not line.strip(): continue
    try: q = json.loads(line)
    except (ValueError, RecursionError): raise UserError(f"{path} line {i} is not JSON") from None
    fields = isinstance(q, dict) and [q.get(k) for k in ("context", "choices", "answer")]
    if not fields or not isinstance(fields[0], str) or not isinstance(fields[1], list) or not fields[1] or \
       not all(isinstance(c, str) and c for c in fields[1]) or type(fields[2]) is not int or \
       not 0 <= fields[2] < len(fields[1]):
      raise UserError(f'{path} line {i}: a line is {{"context": "…", "choices": ["…", …], "answer": the number of the '
                      "right one, from 0}")
    questions.append(Question(*fields))
  if not questions: raise UserError(f"{path} has no lines")
  return questions

def joined(context:str, choice:str) -> tuple[str, str]:
  "Both as they are read: a space goes between them if there is none, and belongs to the choice, as in byte pairs."
  bare = context.rstrip(" ")
  gap = context[len(bare):] or ("" if not context or context[-1].isspace() or choice[0].isspace() else " ")
  return bare, gap + choice

def choose(model:H3LM, tokenizer:Tokenizer, questions:list[Question], shots:list[Question]=[], window:int=2048
           ) -> list[np.ndarray]:
  """Of each question, for each choice, log p of its tokens after the context, in nats, and their number: (choices,2).

  shots: answered questions that every context begins with. What does not fit the window is cut from the left. Rows of
  many lengths are filled up to powers of two, and go side by side."""
  shown = "".join("".join(joined(q.context, q.choices[q.answer])) + "\n\n" for q in shots)
  rows, ask = collections.defaultdict(list), surprisals(model)
  for i, q in enumerate(questions):
    for j, (context, choice) in enumerate(joined(shown + q.context, c) for c in q.choices):
      before, ids = (tokenizer.encode(t).astype(np.int32) if t else np.array([], np.int32) for t in (context, choice))
      if len(ids) > window: raise UserError(f"choice {j} of question {i+1} has {len(ids)} tokens, the window {window}")
      row = np.concatenate([[tokenizer.eot], before, ids])[-window-1:]
      rows[min(window, max(64, 1 << (len(row)-2).bit_length()))].append((i, j, row, len(ids)))
  out = [np.zeros((len(q.choices), 2)) for q in questions]
  for L, some in tqdm(rows.items(), desc="lengths", disable=len(rows) < 2):
    B = min(len(some), max(1, AT_ONCE // L))
    for at in range(0, len(some), B):
      batch = (some[at:at+B] * B)[:B]
      nats = ask(np.stack([np.pad(row, (0, L + 1 - len(row))) for _, _, row, _ in batch]))
      for (i, j, row, n), x in zip(batch, nats): out[i][j] = -x[len(row)-1-n:len(row)-1].sum(dtype=np.float64), n
  return out

def score(model:H3LM, tokenizer:Tokenizer, path:str, shots:int, window:int) -> None:
  "Prints how often the right choice of a question is the likeliest; the first `shots` questions are shown, not asked."
  questions = read_questions(path)
  if shots >= len(questions): raise UserError(f"--shots {shots} leaves none of {path}'s {len(questions)} lines to ask")
  shown, asked = questions[:shots], questions[shots:]
  found = choose(model, tokenizer, asked, shown, window)
  right = lambda best: np.mean([best(x) == q.answer for x, q in zip(found, asked)])
  chance = np.mean([1/len(q.choices) for q in asked])
  print(f"{path}: {len(asked):,} questions, {shots} answered before each\n"
        f"accuracy {right(lambda x: (x[:, 0]/x[:, 1]).argmax()):.4f} by log-likelihood per token, "
        f"{right(lambda x: x[:, 0].argmax()):.4f} by that of the whole choice; chance {chance:.4f}", flush=True)

# ---- masked models --------------------------------------------------------------------------------

MASK, RUN, AROUND = "[MASK]", 8, 8         # RUN: bytes that a model of bytes learns to fill in one place, by default

def masked_row(tokenizer:Tokenizer, parts:list[list[int]], run:int, length:int) -> np.ndarray:
  "[CLS], the parts of a text with `run` mask tokens between each two, [SEP], padded to `length`."
  row = [tokenizer.cls, *parts[0], *(t for p in parts[1:] for t in (*[tokenizer.mask]*run, *p)), tokenizer.sep]
  return np.array(row + [tokenizer.pad]*(length - len(row)), np.int32)

def fill(model:BiGS, tokenizer:Tokenizer, text:str, run:int=RUN, pad:int=0) -> list[list[tuple[list[int], float]]]:
  """For each [MASK] of a text, from left to right, tokens that could stand there, the best first, and a probability.

  A mask is one token, given those to its left filled in. For a model of bytes it is a word without white space: of each
  length up to `run`, what it was trained with, the likeliest bytes are settled one by one, the surest first. Words are
  then compared by the pseudo-likelihood of where they stand: the mean probability, given all others, of their own bytes
  and those up to AROUND from them. (By that of the first pass alone "the old _ sat" gets "og" before "dog".)
  pad: the row's length, filled up with [PAD] (default: the next multiple of 64). UserError for a text too long."""
  parts = [list(map(int, tokenizer.encode(p))) if p else [] for p in text.split(MASK)]
  if len(parts) == 1: raise UserError("--fill wants a text with [MASK] where something is to be found")
  runs, found, most = (range(1, run+1) if tokenizer.name == "bytes" else [1]), [], model.config.max_length
  need = len(masked_row(tokenizer, parts, runs[-1], 0))
  if need > most: raise UserError(f"the text takes {need} tokens, the model has positions for {most}: give less of it")
  length = pad or min(most, -(-need//64)*64)
  logits = capture(lambda t: model.mlm(t).realize())
  def ask(rows:list[np.ndarray], what:str="word") -> np.ndarray:
    "Log-probabilities (rows,L,V), without the tokens that only masked models have; in a word, without white space."
    x = finite(logits(Tensor(np.stack(rows).astype(np.int32)).realize()).numpy().astype(np.float64))
    x[..., [tokenizer.cls, tokenizer.sep, tokenizer.mask, tokenizer.pad]] = -np.inf
    if tokenizer.name == "bytes" and what == "word": x[..., [*b" \t\n\r\f\v", tokenizer.eot]] = -np.inf
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
  while len(parts) > 1:
    rows = [masked_row(tokenizer, parts, run, length) for run in runs]
    first = 1 + len(parts[0])
    if tokenizer.name != "bytes":
      p = ask(rows)[0, first]
      best = [([int(i)], float(np.exp(p[i]))) for i in np.argsort(-p)]
    else:
      places, scores = [first + np.arange(run) for run in runs], [[] for _ in runs]
      for _ in runs:
        for row, at, p in zip(rows, places, ask(rows)):
          if not len(at := at[row[at] == tokenizer.mask]): continue
          surest = at[p[at].max(-1).argmax()]
          row[surest] = p[surest].argmax()
      for at in range(max(1, first - AROUND), min(length, first + runs[-1] + AROUND)):
        one = [np.where(np.arange(length) == at, tokenizer.mask, row) for row in rows]
        for row, score, run, p in zip(rows, scores, runs, ask(one, "any")):
          if at < first + run + AROUND and row[at] < tokenizer.vocab_size: score.append(p[at, row[at]])
      words = [(row[at].tolist(), float(np.exp(np.mean(score)))) for row, at, score in zip(rows, places, scores)]
      best = sorted(words, key=lambda w: -w[1])
    found.append(best[:5])
    parts[:2] = [parts[0] + best[0][0] + parts[1]]
  return found

def show_fill(model:BiGS, tokenizer:Tokenizer, text:str, run:int=RUN, pad:int=0) -> None:
  "Prints the text filled in, and for each [MASK] what else came to mind."
  found = [[(tokenizer.decode(ids).decode("utf-8", "replace"), p) for ids, p in best]
           for best in fill(model, tokenizer, text, run, pad)]
  for best in found: text = text.replace(MASK, best[0][0].strip() if tokenizer.name == "bert" else best[0][0], 1)
  print(text)
  for best in found: print("  " + "   ".join(f"{word.strip()!r} {p:.3g}" for word, p in best), flush=True)

# ---- printing -------------------------------------------------------------------------------------

class TextStream:
  """Bytes in pieces -> text in pieces: characters come out whole, and nothing from `stop` on comes out at
  all, so what may be the beginning of it is held back. `done` once it was met."""
  def __init__(self, stop:str|None=None):
    self.decoder, self.stop, self.held, self.done = codecs.getincrementaldecoder("utf-8")("replace"), stop, "", False
  def feed(self, data:bytes, final:bool=False) -> str:
    if self.done: return ""
    self.held += self.decoder.decode(data, final)
    keep = 0
    if self.stop:
      if (at := self.held.find(self.stop)) >= 0: self.held, self.done = self.held[:at], True
      elif not final:
        keep = next((k for k in range(len(self.stop)-1, 0, -1) if self.held.endswith(self.stop[:k])), 0)
    out, self.held = self.held[:len(self.held)-keep], self.held[len(self.held)-keep:]
    return out

def write(model:H3LM, tokenizer, prompts:list[str], n:int, stop:str|None=None, **kw) -> tuple[int, int, float]:
  """Prints a prompt and its continuation as it comes, up to <|endoftext|> or `stop`; of several prompts, all of them
  at the end, or to the model's last position. Returns tokens of the prompts, tokens generated, tokens per second; kw as
  of `generate`."""
  # an empty prompt is the beginning of a text
  ids, batch = [tokenizer.encode(p) if p else np.array([tokenizer.eot]) for p in prompts], len(prompts)
  show = (lambda text: print(text, end="", flush=True)) if batch == 1 else (lambda text: None)
  if most := model.config.max_positions: n = max(1, min(n, most + 1 - max(map(len, ids))))
  show(prompts[0])
  streams, texts, times = [TextStream(stop) for _ in prompts], list(prompts), []
  for tokens in generate(model, ids, n, **kw):
    times.append(time.perf_counter())
    for b, (stream, token) in enumerate(zip(streams, tokens)):
      if stream.done: continue
      piece = stream.feed(tokenizer.decode(token[None]), final=bool(token == tokenizer.eot))
      stream.done |= bool(token == tokenizer.eot)
      texts[b] += piece
      show(piece)
    if all(s.done for s in streams): break
  tails = [s.feed(b"", final=True) for s in streams]
  if batch == 1: print(tails[0], flush=True)
  else: print(*(f"--- {b+1} of {batch} ---\n{t}{tail}" for b, (t, tail) in enumerate(zip(texts, tails))), sep="\n")
  # the first two steps compile and capture: no measure of the others
  count, timed = len(times), times[2:] if len(times) > 3 else times
  return sum(map(len, ids)), count, batch*(len(timed)-1) / max(1e-9, timed[-1]-timed[0])

# ---- benchmark ------------------------------------------------------------------------------------

PROMPTS, BATCHES, STEPS, PIECE = (512, 1024, 1536), (1, 64), 12, 256
# hybrid over Transformer by (batch, prompt), as notes on the paper have it: unverified
PAPER = {(64, 512): 1.48, (64, 1024): 2.05, (64, 1536): 2.38}

def timed(session:Session, tokens:np.ndarray, piece:int) -> list[float]:
  "Seconds of each piece, or step, but for those that first had to be compiled."
  times = []
  for at in range(0, tokens.shape[1], piece):
    known, start = len(session.graphs), time.perf_counter()
    session.read(tokens[:, at:at+piece], piece)
    if len(session.graphs) == known: times.append(time.perf_counter() - start)
  return times

def bench(size:str) -> None:
  """Prompt and decoding throughput of H3, hybrid and Transformer with random weights in one shape, the comparison that
  the paper makes (1.3B on an A100, 128 tokens). They take turns, step by step, so that their ratios hold on a machine
  that is busy now and then. The state: what the texts so far take up in it."""
  shape, rng = H3Config.named(size), np.random.default_rng(0)
  kinds = {"H3": (), "hybrid": shape.attn_layers, "Transformer": tuple(range(shape.n_layer))}
  models = {kind: H3LM(dataclasses.replace(shape, attn_layers=layers)) for kind, layers in kinds.items()}
  print(f"{size}: {shape.n_layer} layers of width {shape.d_model}, random weights, float32, on {Device.DEFAULT}, "
        f"{os.cpu_count()} cores; ratio to the Transformer, in brackets the paper's for 1.3B on an A100 (unverified)\n"
        f"{'batch':>5} {'prompt':>6}  {'model':11} {'read':>11} {'written':>11} {'ratio':>5} {'':7} {'a step':>8} "
        f"{'state':>11}",
        flush=True)
  for batch in BATCHES:
    piece = max(1, min(PIECE, 32*PIECE//batch))
    room = PROMPTS[-1] + (STEPS + 2)*len(PROMPTS) + piece
    sessions = {kind: Session(model, batch, room) for kind, model in models.items()}
    some = lambda n: rng.integers(0, shape.vocab_size, (batch, n))
    for prompt in PROMPTS:
      reading, step = {}, {kind: [] for kind in kinds}
      for kind, session in sessions.items():
        reading[kind] = timed(session, some(-(-(prompt - session.length)//piece)*piece), piece)
      for _ in range(STEPS + 2):
        for kind, session in sessions.items(): step[kind] += timed(session, some(1), 1)
      speed = {kind: batch/float(np.median(times[1:])) for kind, times in step.items()}
      for kind, session in sessions.items():
        full = session.length / (session.model.capacity(session.state) or 1)       # of an attention layer's cache
        held = sum(t.nbytes()*(full if t.ndim == 4 else 1) for t in session.state)
        read = f"{batch*piece/np.median(reading[kind]):,.0f} tok/s" if reading[kind] else "-"
        paper = f"({PAPER[batch, prompt]}x)" if kind == "hybrid" and (batch, prompt) in PAPER else ""
        print(f"{batch:5} {prompt:6}  {kind:11} {read:>11} {speed[kind]:5,.0f} tok/s "
              f"{speed[kind]/speed['Transformer']:4.2f}x {paper:7} {1e3*batch/speed[kind]:5,.1f} ms "
              f"{held/1e6:8,.1f} MB", flush=True)

# ---- command line ---------------------------------------------------------------------------------

def parser() -> Parser:
  p = Parser(prog="generate.py", description="Continue a prompt with a trained model.",
             epilog='example: python generate.py --prompt "def main():" --tokens 400 --temperature 0.7',
             formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
  p.add_argument("--model", metavar="PATH", default=OUT,
                 help=f"a model's file, a folder with one (its {CHECKPOINT}, if there), or a "
                 f"released model, which is downloaded once: {', '.join(RELEASED)}")
  p.add_argument("--prompt", metavar="TEXT", nargs="+", default=argparse.SUPPRESS,
                 help="the text to go on from, or several, side by side; without it --prompt-file, or what is "
                 "piped in, or a short one")
  p.add_argument("--prompt-file", metavar="FILE", default=argparse.SUPPRESS,
                 help="read the prompt from a file; of a .jsonl, several, one a line")
  p.add_argument("--text-key", metavar="KEY", default=TEXT_KEY,
                 help="key of the text in each line of a .jsonl file")
  p.add_argument("--tokens", metavar="N", type=number(int, 1), default=400, help="how many tokens to generate")
  p.add_argument("--temperature", metavar="T", type=number(float, 0), default=0.8,
                 help="below 1 safer, above 1 wilder, 0 always the likeliest token")
  p.add_argument("--top-k", metavar="K", type=number(int, 0), default=0, help="choose among the K likeliest; 0: all")
  p.add_argument("--top-p", metavar="P", type=number(float, above=0, high=1), default=1.0,
                 help="choose among the likeliest that hold this share of the probability")
  p.add_argument("--seed", metavar="N", type=number(int, 0), default=0, help="the same seed gives the same text")
  p.add_argument("--batch", metavar="N", type=number(int, 1), default=1,
                 help="so many continuations of each prompt, side by side; several texts are printed at the end")
  p.add_argument("--stop", metavar="TEXT", default=argparse.SUPPRESS, help="end where this text would come")
  p.add_argument("--max-length", metavar="N", type=number(int, 1), default=argparse.SUPPRESS,
                 help="room for prompt and continuation in the attention layers' caches; default: the model's")
  p.add_argument("--dtype", choices=list(WEIGHTS), default="float32",
                 help="what the matrices of weights are kept in; the SSMs, states and sums stay float32")
  p.add_argument("--tokenizer", choices=["bytes", "gpt2"], default=argparse.SUPPRESS,
                 help="default: what the model was trained with, gpt2 for official weights")
  p.add_argument("--perplexity", metavar="FILE", default=argparse.SUPPRESS,
                 help="print that of a text, per token and per byte, and stop")
  p.add_argument("--score", metavar="FILE", default=argparse.SUPPRESS,
                 help='print how often the right choice is the likeliest one, and stop; a line of the file is '
                 '{"context": "…", "choices": ["…", …], "answer": the number of the right one, from 0}')
  p.add_argument("--shots", metavar="K", type=number(int, 0), default=0,
                 help="of --score: begin every context with the first K questions and their answers")
  p.add_argument("--window", metavar="N", type=number(int, 1), default=argparse.SUPPRESS,
                 help="of --perplexity and --score: the tokens that are seen at once; default: as in training")
  p.add_argument("--stride", metavar="N", type=number(int, 1), default=argparse.SUPPRESS,
                 help="of --perplexity: how far a window is from the next; default: half of --window")
  p.add_argument("--export", metavar="FILE", default=argparse.SUPPRESS,
                 help="write the model as the authors' code reads it, into a .safetensors file, "
                 "with a config.json beside it, and stop; the README has the two lines of PyTorch that "
                 "make a .pt of it")
  p.add_argument("--fill", metavar="TEXT", default=argparse.SUPPRESS,
                 help="of a masked model: what could stand at each [MASK] of a text, a word where it reads bytes")
  p.add_argument("--bench", metavar="SIZE", nargs="?", const="125M", default=argparse.SUPPRESS,
                 help="time reading and writing with H3, hybrid and Transformer of a released shape "
                 "(125M if no other is named; 15 minutes on two cores), and stop")
  return p

def read_prompts(args:argparse.Namespace, default:str) -> list[str]:
  if hasattr(args, "prompt") and hasattr(args, "prompt_file"):
    raise UserError("give --prompt or --prompt-file, not both")
  if hasattr(args, "prompt"): return args.prompt
  if hasattr(args, "prompt_file"):
    return read_texts(args.prompt_file, args.text_key) or [""]
  if sys.stdin is not None and not sys.stdin.closed:
    try: mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError): mode = 0
    # a pipe or a file; not a terminal, not /dev/null
    if stat.S_ISFIFO(mode) or stat.S_ISREG(mode): return [sys.stdin.buffer.read().decode("utf-8", "replace") or default]
  return [default]

ACTIONS = ("fill", "perplexity", "score", "export")    # in place of writing text

def run(args:argparse.Namespace) -> None:
  if hasattr(args, "bench"):
    try: return bench(args.bench)
    except ValueError as e: raise UserError(f"--bench: {e}") from None
  if len(actions := [a for a in ACTIONS if hasattr(args, a)]) > 1:
    raise UserError(f"give one of --{', --'.join(actions)}")
  if WEIGHTS[args.dtype] not in Device[Device.DEFAULT].renderer.supported_dtypes():
    raise UserError(f"--dtype {args.dtype}: the device {Device.DEFAULT} knows no such numbers: take bfloat16")
  fills = hasattr(args, "fill")
  path = find(args.model)
  tensors, meta = read_weights(path)
  try: trained_on = (options := json.loads(meta.get("args", "{}"))).get("data")
  except (ValueError, AttributeError): raise CheckpointError(f"{path}: its metadata are damaged") from None
  if (task := options.get("task", "text")) not in ("text", "mlm", "classify"):
    raise UserError(f"{path} knows the symbols of --task {task} only, which are no text: train.py "
                    "shows how well it does")
  name = meta.get("tokenizer", "bytes" if meta else "bert" if fills else "gpt2")
  if (name := getattr(args, "tokenizer", name)) not in TOKENIZERS:
    raise CheckpointError(f"{path}: its tokenizer, {name!r}, is none of {', '.join(TOKENIZERS)}")
  if fills != (meta.get("model", "bigs" if fills else "h3") == "bigs"):
    raise UserError(f"{path} is no masked model: train.py --task mlm makes one" if fills else
                    f"{path} is a masked model: ask it with --fill")
  if fills:
    if args.dtype != "float32": raise UserError("--dtype is for models that read on, not for --fill")
    if not any(k.startswith("cls.") for k in tensors):
      raise UserError(f"{path} has no head for masked tokens: --task mlm trains one, other tasks do not")
    tokenizer = make_tokenizer(name, path.with_name("vocab.txt"))
    model = bigs_model(tensors, meta, str(path), "mlm")
    # the official ones have been trained, and are run, on rows of one length
    length = 0 if meta else model.config.max_length
    return show_fill(model, tokenizer, args.fill, options.get("mask_run") or RUN, length)
  model = h3_model(tensors, meta, str(path), dtype=args.dtype)
  if hasattr(args, "export"): return export(model, args.export)
  tokenizer = make_tokenizer(name)
  if model.config.vocab_size != tokenizer.vocab_size:
    raise UserError(f"{path} has a vocabulary of {model.config.vocab_size}, not the {tokenizer.vocab_size} of {name}"
                    + ("" if meta else ": give another --tokenizer"))
  most = model.config.max_positions or math.inf
  window = getattr(args, "window", min(most, options.get("length") or model.config.max_length))
  if window > most: raise UserError(f"--window {window}: the model has learned positions for {most} tokens")
  if hasattr(args, "perplexity"):
    if (stride := getattr(args, "stride", -(-window//2))) > window:
      raise UserError(f"--stride {stride} is longer than a window of {window}: tokens would be left out")
    return perplexity(model, tokenizer, args.perplexity, window, stride, args.text_key)
  if hasattr(args, "score"): return score(model, tokenizer, args.score, args.shots, window)
  on_python = not trained_on and isinstance(tokenizer, ByteTokenizer)
  prompts = read_prompts(args, "def " if on_python else "")
  prompts = [p for p in prompts for _ in range(args.batch)]
  asked, count, speed = write(model, tokenizer, prompts, args.tokens, getattr(args, "stop", None), seed=args.seed,
    temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, max_length=getattr(args, "max_length", None))
  print(f"[{path}: {asked} tokens of prompt, {count} generated, {speed:.0f} tokens/s, {peak_memory()/1e9:.2f} GB of "
        "memory at the peak]", file=sys.stderr)

# a .safetensors file as the .pt that the authors' scripts load
TO_PT = """import torch, safetensors.torch
torch.save(safetensors.torch.load_file("{0}.safetensors"), "{0}.pt")"""

def export(model:H3LM, path:str) -> None:
  "Writes the model in the official format, and says so; nothing is written over."
  if Path(path).suffix != ".safetensors":
    two_lines = "; ".join(TO_PT.format(Path(path).with_suffix("")).splitlines())
    raise UserError(f"--export {path}: official weights are written as .safetensors: name such a "
                    f"file; PyTorch makes a .pt of it: {two_lines}")
  if Path(path).exists(): raise UserError(f"{path} is there already: name another file with --export")
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  save_official(path, model)
  print(f"wrote {path} and {Path(path).with_name('config.json')}, the arguments of the authors' SSMLMHeadModel")

def main(argv:list[str]|None=None) -> int:
  p = parser()
  args = p.parse_args(argv)
  if hasattr(sys.stdout, "reconfigure"): sys.stdout.reconfigure(errors="replace")
  setup_device()
  check_kernels()
  try: run(args)
  except (UserError, CheckpointError) as e: p.error(str(e))
  except KeyboardInterrupt:
    print(file=sys.stderr)
    return 130
  except BrokenPipeError:                              # the reader of our pipe, `head` say, has had enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
  except MemoryError: p.error("not enough memory: take a smaller --batch or --max-length")
  except OSError as e:
    if e.filename is None: raise
    p.error(f"{e.filename}: {e.strerror}")
  return 0

if __name__ == "__main__": sys.exit(main())
