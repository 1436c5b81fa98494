"""Text from a trained model, token by token.

  python generate.py                                  continues a prompt with train.py's model
  python generate.py --prompt "class Stack:" --tokens 500 --temperature 0.7
  python generate.py --prompt "import os" "def main(" --batch 2          several texts at once
  echo "import os" | python generate.py --model out/checkpoint.safetensors
  python generate.py --model 1.3B --dtype bfloat16    a released model, downloaded once, in bfloat16
  python generate.py --perplexity book.txt            how well a model predicts a text
  python generate.py --perplexity book.txt --window whole     …each byte given all before it
  python generate.py --compare out book --perplexity book.txt          several models, in a table
  python generate.py --score questions.jsonl          multiple choice by likelihood
  python generate.py --export h3/model.safetensors    the model as the authors' code reads it
  python generate.py --fill "for i in [MASK](10):"    what a masked model puts there
  python generate.py --model classes --classify "a text" "another"       labels by a classifier

A prompt is read in pieces: in the H3 layers each piece is a convolution that begins from the state
the one before has left (`ssm_conv`). Every further token is one step (`h3_step`): constant time
and memory in the H3 layers, a key-value cache in the attention layers. As a function:

  for tokens in generate(model, prompt_ids, n=200, temperature=0.8): ...      # (B,) at a time

From top to bottom: generation, likelihood, masked models and their heads, printing, the command
line. How a head's answers are made is in support/heads.py, speed against a Transformer in
support/bench.py. Not here: beam search, repetition penalties.
"""
from __future__ import annotations
import argparse, codecs, collections, itertools, json, math, os, re, stat, sys, time
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple
import numpy as np
from tinygrad import Device, Tensor
from tinygrad.helpers import Context, round_up, tqdm
from tinygrad.nn.state import get_parameters, get_state_dict
from bigs_tiny import BiGS
from flashconv import WEIGHTS, capture, fill as fill_tensor, overwrite, surprisal, to_device
from h3tiny import H3LM, State, move_on, visible_rows
from support.checkpoints import (CHECKPOINT, RELEASED, CheckpointError, Weights, bigs_model, find,
                                 h3_model, read_weights, refusing, require_head, save_official,
                                 stated_labels)
from support.cpu import setup_device
from support.heads import HEADS, Answer, ask
from support.text import (TEXT_KEY, TOKENIZERS, Interrupt, Parser, Tokenizer, UserError, command,
                          counted, escaped, is_jsonl, make_tokenizer, number, paper_of,
                          peak_memory, print_table, read_text, read_texts, read_tokens, shown,
                          split, waiting)

OUT = "out"                                # train.py's default folder

# ---- generation ---------------------------------------------------------------------------------

def generate(model:H3LM, prompts:np.ndarray|list[np.ndarray], n:int, temperature:float=1.0,
             top_k:int=0, top_p:float=1.0, seed:int=0, max_length:int|None=None
             ) -> Iterator[np.ndarray]:
  """Continues prompts: (P,) or (B,P), or a list of B arrays of any lengths; P >= 1. Yields n
  arrays (B,) of tokens; errors are raised at the call, before the first is asked for.

  A row is drawn by the seed and the number of equal prompts before it, so that a prompt goes on as
  it does alone. max_length: the capacity of the attention layers' caches (default: the config's).
  Raises UserError where prompt and continuation do not fit in it; models without attention have no
  limit."""
  if not isinstance(prompts, list): prompts = [*np.atleast_2d(prompts)]
  lengths = [len(p) for p in prompts]
  if not prompts or 0 in lengths:
    raise UserError("a prompt is empty: generate needs at least one token to go on from")
  longest, batch = max(lengths), len(prompts)
  requested = f"{counted(longest, 'token')} of prompt and {n} to generate"
  capacity = max_length or model.config.max_length
  if model.config.attn_layers and longest + n > capacity:
    raise UserError(f"{requested} exceed the cache of {capacity}: ask for fewer tokens, or give "
                    f"--max-length {longest + n}")
  positions = model.config.max_positions
  if positions and longest + n - 1 > positions:            # the last token goes into no step
    raise UserError(f"{requested}, where the model has learned positions for {positions}: ask for "
                    "fewer tokens")
  piece = piece_size(longest, batch)
  if min(lengths) < longest: piece = max(32, piece)
  total = round_up(longest, piece)
  padding = [total - length for length in lengths]
  padded = np.stack([np.pad(p, (left, 0)) for p, left in zip(prompts, padding)])
  def steps() -> Iterator[np.ndarray]:
    # the caches are no larger than this text needs
    session = Session(model, batch, round_up(total + n, 256), padding if any(padding) else None)
    texts = [*map(tuple, prompts)]
    rngs = [np.random.default_rng([seed, texts[:i].count(text)]) for i, text in enumerate(texts)]
    logits = session.read(padded, piece)
    for i in range(n):
      yield (token := sample(logits, rngs, temperature, top_k, top_p))
      if i < n-1: logits = session(token)
  return steps()

def piece_size(longest:int, batch:int) -> int:
  """How many tokens of a prompt are read at once. All pieces have one size, as each size has to be
  compiled: the largest that fits into memory and pads the prompt by an eighth at most, else 32; 1,
  token by token, for a prompt so short that this is as fast."""
  if longest <= 8: return 1
  for size in (2048, 1024, 512, 256, 128, 64):
    padding = round_up(longest, size) - longest
    if size*batch <= 1 << 14 and padding <= longest/8: return size
  return 32

class Session:
  """Texts of one batch, read in pieces and continued token by token, in one state of fixed size.

  A TinyJit is captured once for a step, and once for each size of piece and of the part of the
  attention caches that a piece reads, so that nothing is compiled anew as the texts grow. start:
  left padding of each text, see H3LM.init_state.
  """
  def __init__(self, model:H3LM, batch:int, max_length:int, start:list[int]|None=None):
    self.model, self.length = model, 0
    self.state = model.init_state(batch, max_length, start)
    self.weights = model.step_weights()
    self.graphs = {}
  def __call__(self, tokens:np.ndarray) -> np.ndarray:
    "tokens (B,), or a piece (B,L) -> logits (B,vocab_size) after the last"
    self.length += (L := tokens[0].size)
    # a token reads all rows of the caches
    visible = visible_rows(self.length) if L > 1 and self.model.config.attn_layers else None
    key = tokens.shape, visible
    if key not in self.graphs: self.graphs[key] = self.captured(*key)
    graph, inputs = self.graphs[key]
    # a new Tensor for each token would take 1.5 ms more
    fill_tensor(inputs, tokens.astype(np.int32, copy=False))
    return graph(inputs).numpy()[:, :self.model.config.vocab_size]
  def captured(self, shape:tuple[int, ...], visible:int|None) -> tuple[Callable, Tensor]:
    "A graph that advances the state by tokens of this shape, and the Tensor it takes them from."
    advance = lambda tokens: self.model.advance(tokens, self.state, visible, self.weights)
    return capture(advance), to_device(np.zeros(shape, np.int32))
  def read(self, tokens:np.ndarray, piece:int) -> np.ndarray:
    "A prompt (B,P), P a multiple of `piece` -> logits (B,vocab_size) after the last token"
    for at in range(0, tokens.shape[1], piece):
      logits = self(tokens[:, at:at+piece] if piece > 1 else tokens[:, at])
    return logits

def sample(logits:np.ndarray, rngs:list[np.random.Generator], temperature:float=1.0, top_k:int=0,
           top_p:float=1.0) -> np.ndarray:
  """Draws one token a row, each by its own generator: logits (B,V) -> (B,). Temperature 0 takes the
  likeliest. top_k keeps the k likeliest, top_p (after temperature and top_k) the fewest whose
  probabilities sum to p. Raises UserError as `check_finite` does."""
  check_finite(logits)
  if temperature == 0: return logits.argmax(-1)
  x = logits.astype(np.float64) / temperature
  if 0 < top_k < x.shape[-1]:
    kth = np.partition(x, -top_k, -1)[:, -top_k, None]
    x[x < kth] = -np.inf
  p = np.exp(log_softmax(x))
  if top_p < 1:
    order = np.argsort(-p, -1, kind="stable")
    ranked = np.take_along_axis(p, order, -1)
    before = ranked.cumsum(-1) - ranked
    ranked[before >= top_p] = 0                            # the likelier ones are already enough
    np.put_along_axis(p, order, ranked, -1)
  cumulative = p.cumsum(-1)
  drawn = np.array([[rng.random()] for rng in rngs])
  return (cumulative / cumulative[:, -1:] > drawn).argmax(-1)

def check_finite(x:np.ndarray) -> np.ndarray:
  """Returns logits, or -log p, (…,n). Raises UserError where a row holds NaN or +inf, or nothing
  but -inf."""
  if not np.isfinite(x.max(-1)).all():
    raise UserError("the model's logits are not finite: its weights are damaged, or its training "
                    "diverged")
  return x

def log_softmax(x:np.ndarray) -> np.ndarray:
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))

# ---- likelihood ---------------------------------------------------------------------------------

TOKENS_AT_ONCE = 4096                      # that go through a model in one batch

NLL = Callable[[np.ndarray], np.ndarray]

def likelihood_of(model:H3LM, carry:list[State]|None=None) -> NLL:
  """A function of rows of tokens (B,L+1) to -log p in nats of each but the first, (B,L).

  carry: the layers' states before the rows, as in H3LM.forward; those after them overwrite it."""
  graphs = {}                                              # by the rows' shape
  def forward(inputs:Tensor, targets:Tensor) -> Tensor:
    logits, after = model.forward(inputs, carry)
    nats = surprisal(logits, targets)
    move_on(carry, after, nats)
    return nats
  def nll(rows:np.ndarray) -> np.ndarray:
    inputs, targets = (to_device(x, dtype=np.int32) for x in (rows[:, :-1], rows[:, 1:]))
    new = inputs.shape not in graphs
    if new: graphs[inputs.shape] = capture(forward)
    with waiting("the first window", new): nats = graphs[inputs.shape](inputs, targets).numpy()
    return check_finite(nats)
  return nll

def document_nll(nll:NLL, ids:np.ndarray, window:int, stride:int) -> tuple[np.ndarray, int]:
  """-log p in nats of each token of a document but the first, (len(ids)-1,), and the number of
  windows that took.

  A window has `window` inputs and predicts the token after each. It begins `stride` tokens after
  the one before it, and only its predictions that are new count, so that from the second window on
  each of them has seen at least window - stride tokens."""
  n = len(ids) - 1
  if n <= window:                          # a row of a length that others may have too
    row = np.zeros((1, 1 + min(window, round_up(n, 64))), np.int32)
    row[0, :n+1] = ids
    return nll(row)[0, :n], 1
  starts = np.minimum(np.arange(0, n - window + stride, stride), n - window)
  fresh = np.diff(starts, prepend=starts[0] - window)      # each window's predictions that are new
  batch = min(len(starts), max(1, TOKENS_AT_ONCE // window))
  out = np.empty(n)
  bar = tqdm(total=len(starts), desc="windows", disable=batch == len(starts))
  for i in range(0, len(starts), batch):
    which = np.minimum(np.arange(i, i + batch), len(starts) - 1)     # the last one fills a batch up
    rows = ids[starts[which][:, None] + np.arange(window + 1)]
    for k, row in zip(which, nll(rows)):
      end = starts[k] + window
      out[end - fresh[k]:end] = row[window - fresh[k]:]
    bar.update(min(batch, len(starts) - i))
  bar.update(0, close=True)
  return out, len(starts)

def carried_nll(nll:NLL, carry:list[State], ids:np.ndarray) -> tuple[np.ndarray, int]:
  """Takes the place of `document_nll` without windows: each token is predicted from all before it.

  The document goes through the model in pieces, and the layers' states from each to the next: exact
  at any length, in memory that grows by no more than the numbers returned. nll:
  `likelihood_of(model, carry)`."""
  states, n = get_parameters(carry), len(ids) - 1
  overwrite(states, [state.zeros_like() for state in states])
  size = min(TOKENS_AT_ONCE, round_up(n, 64))
  padded = np.pad(ids, (0, round_up(n, size) - n))         # nothing comes after the padding
  starts = tqdm(range(0, n, size), desc="pieces", disable=n <= size)
  each = [nll(padded[None, i:i+size+1])[0] for i in starts]
  return np.concatenate(each)[:n], len(each)

class Likelihood(NamedTuple):
  """-log p in nats of texts in all, their tokens, bytes, and windows or pieces.

  by_position (RANGES,2): nats and bytes of the tokens that begin below byte FIRST_RANGE of their
  text, from there to below twice that, and so on."""
  nats: float
  tokens: int
  bytes: int
  windows: int
  by_position: np.ndarray

FIRST_RANGE, RANGES = 256, 40

def likelihood(model:H3LM, tokenizer:Tokenizer, texts:list[str], window:int|None, stride:int
               ) -> Likelihood:
  """Reads documents, each after an <|endoftext|>, in windows, see `document_nll`; window None:
  whole, see `carried_nll`."""
  carry = None if window else model.init_carry(1)
  nll, tokens, windows, ranges = likelihood_of(model, carry), 0, 0, np.zeros((RANGES, 2))
  for text in tqdm(texts, desc="texts", disable=len(texts) < 20):
    ids = tokenizer.encode(text)
    row = np.concatenate([[tokenizer.eot], ids])
    nats, n = document_nll(nll, row, window, stride) if window else carried_nll(nll, carry, row)
    tokens += len(ids)
    windows += n
    sizes = [len(tokenizer.decode([i])) for i in ids]
    which = np.frexp((np.cumsum(sizes) - sizes) // FIRST_RANGE)[1]   # exponents: 0, 1, 2, 2, 3, …
    ranges += np.stack([np.bincount(which, x, RANGES) for x in (nats, sizes)], -1)
  nats, size = ranges.sum(0)
  return Likelihood(float(nats), tokens, int(size), windows, ranges)

def texts_of(path:str, key:str) -> list[str]:
  "The texts of a file: in a .jsonl, the value of `key` in each line. UserError if there are none."
  texts = [text for text in read_texts(path, key) if text]
  if not texts: raise UserError(f"{path} is empty: there is nothing to predict")
  return texts

def print_perplexity(model:H3LM, tokenizer:Tokenizer, path:str, window:int|None, stride:int,
                     key:str=TEXT_KEY, positions:bool=False) -> None:
  "Prints the perplexity of a file, per token and per byte; positions: by position, too."
  texts = texts_of(path, key)
  found = likelihood(model, tokenizer, texts, window, stride)
  total, tokens, size, windows, _ = found
  several = f"{counted(len(texts), 'text')}, " if len(texts) > 1 else ""
  how = f"whole, in {counted(windows, 'piece')}"
  if window:
    how = f"{counted(windows, 'window')} of {counted(window, 'token')}"
    if windows > len(texts): how += f", each {stride:,} after the one before"
    if positions: how += ", as this model has no state that could carry all of a text"
  print(f"{path}: {several}{counted(tokens, 'token')}, {counted(size, 'byte')}; {how}\n"
        f"per token: perplexity {math.exp(total/tokens):.4g}, {total/tokens:.4f} nats\n"
        f"per byte:  perplexity {math.exp(total/size):.4g}, {total/size/math.log(2):.4f} bits",
        flush=True)
  if positions:
    print_positions({"bits per byte": found})
    print(f"{peak_memory()/1e9:.2f} GB of memory at the peak", flush=True)

def bits_by_position(found:list[Likelihood]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns where each range of positions begins, how many bytes it has in found[0], and the bits
  per byte, (found,ranges); nan where no token begins. Ranges: those that found[0] reaches."""
  ranges = np.stack([each.by_position for each in found])
  some = np.flatnonzero(ranges[0, :, 1])
  nats, sizes = ranges[:, some].transpose(2, 0, 1)
  with np.errstate(invalid="ignore"): bits = nats / sizes / math.log(2)
  return (FIRST_RANGE << some >> 1) * (some > 0), sizes[0], bits

def print_positions(found:dict[str, Likelihood]) -> None:
  "Prints bits per byte by position, a column for each model by its name."
  begins, sizes, bits = bits_by_position([*found.values()])
  print_table(["from byte", "bytes", *found],
              [[f"{at:,}", f"{n:,.0f}", *map("{:.4f}".format, row)]
               for at, n, row in zip(begins, sizes, bits.T)])

# a line of --score's file
QUESTION = '{"context": "…", "choices": ["…", …], "answer": the number of the right one, from 0}'

class Question(NamedTuple):
  "A line of --score's file; answer: the index of the right choice, from 0."
  context: str
  choices: list[str]
  answer: int

def read_questions(path:str) -> list[Question]:
  "The lines of a JSONL file. Raises UserError, with the line's number, for anything but questions."
  questions = []
  for i, line in enumerate(read_text(path).splitlines(), 1):
    if not line.strip(): continue
    try: fields = json.loads(line)
    except (ValueError, RecursionError): raise UserError(f"{path} line {i} is not JSON") from None
    match fields:
      case {"context": str(context), "choices": [*choices], "answer": int(answer)} \
          if all(isinstance(c, str) and c for c in choices) \
          and type(answer) is int and 0 <= answer < len(choices):
        questions.append(Question(context, choices, answer))
      case _:
        raise UserError(f"{path} line {i}: a line is {QUESTION}")
  if not questions: raise UserError(f"{path} has no lines")
  return questions

def join_choice(context:str, choice:str) -> tuple[str, str]:
  """Returns context and choice as the model reads them: a space goes between them if there is
  none, and belongs to the choice, as GPT-2's tokenizer wants it."""
  bare = context.rstrip(" ")
  gap = context[len(bare):]
  if context and not context[-1].isspace() and not choice[0].isspace(): gap = " "
  return bare, gap + choice

def score_choices(model:H3LM, tokenizer:Tokenizer, questions:list[Question],
                  shots:list[Question]=[], window:int=2048) -> list[np.ndarray]:
  """Returns an array (choices,2) for each question: log p in nats of a choice's tokens, summed,
  given the context; and how many tokens these are.

  shots: answered questions that every context begins with. Rows too long for the window lose their
  left end. Rows are padded to powers of two and run in batches of one length."""
  shown = ["".join(join_choice(q.context, q.choices[q.answer])) + "\n\n" for q in shots]
  rows = collections.defaultdict(list)                     # by the length they are filled up to
  for i, q in enumerate(questions):
    for j, c in enumerate(q.choices):
      context, choice = map(tokenizer.encode, join_choice("".join(shown) + q.context, c))
      n = len(choice)
      if n > window:
        raise UserError(f"choice {j} of question {i+1} has {n} tokens, the window {window}")
      row = np.concatenate([[tokenizer.eot], context, choice])[-window-1:]
      L = min(window, max(64, 1 << (len(row)-2).bit_length()))
      rows[L].append((i, j, n, row))
  out, nll = [np.zeros((len(q.choices), 2)) for q in questions], likelihood_of(model)
  for L, some in tqdm(rows.items(), desc="lengths", disable=len(rows) < 2):
    B = min(len(some), max(1, TOKENS_AT_ONCE // L))
    for at in range(0, len(some), B):
      batch = (some[at:at+B] * B)[:B]                      # the last one is filled up with its own
      nats = nll(np.stack([np.pad(row, (0, L + 1 - len(row))) for *_, row in batch]))
      for (i, j, n, row), x in zip(batch, nats):
        end = len(row) - 1
        out[i][j] = -x[end-n:end].sum(dtype=np.float64), n
  return out

def print_score(model:H3LM, tokenizer:Tokenizer, path:str, shots:int, window:int) -> None:
  """Prints how often the right choice of a question is the likeliest. The first `shots` questions
  are put before all others with their answers, and are not counted."""
  questions = read_questions(path)
  shown, questions = questions[:shots], questions[shots:]
  if not questions:
    raise UserError(f"--shots {shots} leaves none of {path}'s {len(shown)} lines to ask")
  scores = score_choices(model, tokenizer, questions, shown, window)
  accuracy = lambda choose: np.mean([choose(x) == q.answer for x, q in zip(scores, questions)])
  chance = np.mean([1/len(q.choices) for q in questions])
  print(f"{path}: {counted(len(questions), 'question')}, {shots} answered before each\n"
        f"accuracy {accuracy(lambda x: (x[:, 0]/x[:, 1]).argmax()):.4f} by log-likelihood per "
        f"token, {accuracy(lambda x: x[:, 0].argmax()):.4f} by that of the whole choice; chance "
        f"{chance:.4f}", flush=True)

# ---- masked models ------------------------------------------------------------------------------

MASK = "[MASK]"
MASK_RUN = 8                               # longest run of masks, in bytes, in training by default
NEIGHBOURS = 8                             # bytes on both sides of a word that help to judge it

Candidates = list[tuple[list[int], float]]         # tokens and their probability, the best first

def fill(model:BiGS, tokenizer:Tokenizer, text:str, run:int=MASK_RUN, pad:int=0
         ) -> list[Candidates]:
  """Returns the candidates for each [MASK] of a text. Masks are filled from left to right, each
  given the best candidates of those before it.

  A mask stands for one token; in a model of bytes, for a word of up to `run` bytes: `fill_word`.
  pad: length to which the row is padded with [PAD] (default: the next multiple of 64). Raises
  UserError for a text that is too long."""
  parts = [tokenizer.encode(part).tolist() for part in text.split(MASK)]
  if len(parts) == 1:
    raise UserError(f"--fill wants a text with {MASK} where something is to be found")
  bytewise, most = tokenizer.name == "bytes", model.config.max_length
  lengths = range(1, run+1) if bytewise else [1]
  needed = len(masked_row(tokenizer, parts, lengths[-1], 0))
  if needed > most:
    raise UserError(f"the text takes {needed} tokens, the model has positions for {most}: give "
                    "less of it")
  length = pad or min(most, round_up(needed, 64))
  special = [tokenizer.cls, tokenizer.sep, tokenizer.mask, tokenizer.pad]
  graph = capture(lambda tokens: model.mlm(tokens).realize())
  def log_probs(rows:list[np.ndarray], excluded:list[int]=[]) -> np.ndarray:
    "Log-probabilities (rows,L,V), without special tokens and those excluded."
    logits = graph(Tensor(np.stack(rows).astype(np.int32)).realize()).numpy().astype(np.float64)
    check_finite(logits)[..., special + excluded] = -np.inf
    return log_softmax(logits)
  found = []
  while len(parts) > 1:
    rows = [masked_row(tokenizer, parts, n, length) for n in lengths]
    first = 1 + len(parts[0])                              # the place of the mask: after [CLS]
    if bytewise: best = fill_word(log_probs, tokenizer, rows, first)
    else:
      p = np.exp(log_probs(rows)[0, first])
      best = [([int(i)], float(p[i])) for i in np.argsort(-p)]
    found.append(best[:5])
    parts[:2] = [parts[0] + best[0][0] + parts[1]]
  return found

def fill_word(log_probs:Callable, tokenizer:Tokenizer, rows:list[np.ndarray], first:int
              ) -> Candidates:
  """Returns words without white space for the masks at `first`: row i holds a run of i+1 masks.

  In each row the masks become bytes one by one, the likeliest of all first. The words are then
  ranked by pseudo-likelihood: the geometric mean of the probabilities, each given all other bytes,
  of their own bytes and of those up to NEIGHBOURS from them. (Ranked by the probabilities at which
  their bytes were filled in, "the old _ sat" gets "og" before "dog".)"""
  spans = [np.arange(first, first + n) for n in range(1, len(rows) + 1)]
  white_space = [*b" \t\n\r\f\v", tokenizer.eot]
  for _ in rows:
    for row, span, p in zip(rows, spans, log_probs(rows, white_space)):
      masked = span[row[span] == tokenizer.mask]
      if not masked.size: continue
      surest = masked[p[masked].max(-1).argmax()]
      row[surest] = p[surest].argmax()
  scores = [[] for _ in rows]
  last = first + len(rows) + NEIGHBOURS
  for at in range(max(1, first - NEIGHBOURS), min(len(rows[0]), last)):
    hidden = [np.where(np.arange(len(row)) == at, tokenizer.mask, row) for row in rows]
    for row, span, score, p in zip(rows, spans, scores, log_probs(hidden)):
      near = at <= span[-1] + NEIGHBOURS
      if near and row[at] < tokenizer.vocab_size: score.append(p[at, row[at]])
  words = [(row[span].tolist(), float(np.exp(np.mean(score))))
           for row, span, score in zip(rows, spans, scores)]
  return sorted(words, key=lambda word: -word[1])

def masked_row(tokenizer:Tokenizer, parts:list[list[int]], run:int, length:int) -> np.ndarray:
  "[CLS], the parts of a text with `run` masks between each two, [SEP], padded to `length`."
  row = [tokenizer.cls, *parts[0]]
  for part in parts[1:]: row += [tokenizer.mask]*run + part
  row.append(tokenizer.sep)
  return np.array(row + [tokenizer.pad]*(length - len(row)), np.int32)

def print_fill(model:BiGS, tokenizer:Tokenizer, text:str, run:int=MASK_RUN, pad:int=0) -> None:
  "Prints the text filled in, and for each [MASK] the other candidates."
  lines = []
  with waiting("the first word"): found = fill(model, tokenizer, text, run, pad)
  for best in found:
    words = [tokenizer.decode(ids).decode("utf-8", "replace") for ids, _ in best]
    text = text.replace(MASK, words[0].strip() if tokenizer.name == "bert" else words[0], 1)
    lines.append("   ".join(f"{word.strip()!r} {p:.3g}" for word, (_, p) in zip(words, best)))
  print(text, *lines, sep="\n  ", flush=True)

# ---- the heads of masked models -----------------------------------------------------------------

NEW_LINE = r"\r\n|\n|\r"

def read_lines(args:argparse.Namespace, head:str, n_texts:int|None) -> list[list[str]]:
  """The texts of each line for a head: of the command line, a .jsonl, or the lines of a file or a
  pipe. n_texts: how many the model was trained on, if known. Raises UserError."""
  lines = getattr(args, head) or read_prompts(args, "")
  if getattr(args, head) or args.prompt or is_jsonl(Path(args.prompt_file or "")):
    lines = [re.sub(NEW_LINE, " ", text) for text in lines]
  else: lines = re.split(NEW_LINE, lines[0])
  lines = [line.split("\t") for line in lines if line.strip()]
  wanted, least, most = HEADS[head].line, HEADS[head].least, HEADS[head].most
  if n_texts: wanted, least, most = counted(n_texts, "text"), n_texts, n_texts
  if not lines: raise UserError(f"--{head} wants lines to answer: one is {wanted}")
  for i, texts in enumerate(lines, 1):
    if not least <= len(texts) <= most or not all(text.strip() for text in texts):
      raise UserError(f"--{head}, line {i}: {' | '.join(texts)[:40]!r} is not {wanted}, with tabs "
                      "between several")
  return lines

def print_answers(answers:Iterable[Iterable[list[Answer]]], n:int, end:str) -> None:
  """Prints the n likeliest answers, one a line: answer, tab, probability, tab, text. After those to
  each text comes `end`."""
  for each in answers:
    for best in each:
      for text, p, about in best[:n]:
        print(text, *([] if p is None else [f"{p:.4f}"]), about, sep="\t")
    print(end=end, flush=True)

# ---- printing -----------------------------------------------------------------------------------

class TextStream:
  """Turns bytes in pieces into text in pieces. Characters come out whole. Nothing from `stop` on
  comes out, so what may be its beginning is held back; `done` is True once it was met."""
  def __init__(self, stop:str|None=None):
    self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
    self.stop, self.held, self.done = stop, "", False
  def feed(self, data:bytes, final:bool=False) -> str:
    if self.done: return ""
    text, keep = self.held + self.decoder.decode(data, final), 0
    if self.stop:
      text, met, _ = text.partition(self.stop)
      self.done = bool(met)
      if not met and not final:
        keep = next((k for k in range(len(self.stop)-1, 0, -1) if text.endswith(self.stop[:k])), 0)
    self.held = text[len(text)-keep:]
    return text[:len(text)-keep]

def print_text(model:H3LM, tokenizer:Tokenizer, prompts:list[str], n:int, stop:str|None=None,
               **options) -> tuple[int, int, float]:
  """Prints a prompt and its continuation as it comes, up to <|endoftext|>, `stop`, or the model's
  last position; several prompts are printed together at the end. options: those of `generate`.
  Returns the tokens of the prompts, those generated for each, and tokens per second in all."""
  # an empty prompt is the beginning of a text
  ids = [tokenizer.encode(p) if p else np.array([tokenizer.eot]) for p in prompts]
  if most := model.config.max_positions: n = max(1, min(n, most + 1 - max(map(len, ids))))
  times = []
  def timed(steps:Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for tokens in steps:
      times.append(time.perf_counter())
      yield tokens
  steps = timed(generate(model, ids, n, **options))
  alone = len(prompts) == 1
  def show(text:str) -> None:
    if alone: print(text, end="", flush=True)
  # while these are computed kernels are compiled: the line that says so would wipe text away
  with waiting("the first tokens"): begin = [*itertools.islice(steps, 3)]
  show(prompts[0])
  streams, texts = [TextStream(stop) for _ in prompts], list(prompts)
  for tokens in itertools.chain(begin, steps):
    for b, (stream, token) in enumerate(zip(streams, tokens)):
      if stream.done: continue
      ends = bool(token == tokenizer.eot)
      piece = stream.feed(tokenizer.decode(token[None]), final=ends)
      stream.done |= ends
      texts[b] += piece
      show(piece)
    if all(s.done for s in streams): break
  for b, stream in enumerate(streams):
    tail = stream.feed(b"", final=True)
    print(tail if alone else f"--- {b+1} of {len(prompts)} ---\n{texts[b]}{tail}", flush=True)
  # the first two steps compile and capture: no measure of the others
  some = times[2:] if len(times) > 3 else times
  speed = len(prompts) * (len(some)-1) / max(1e-9, some[-1]-some[0])
  return sum(len(x) for x, p in zip(ids, prompts) if p), len(times), speed

# ---- command line -------------------------------------------------------------------------------

WHOLE = "whole"

def window_size(text:str) -> int|str:
  "An argparse type: a number of tokens, or WHOLE."
  if text == WHOLE: return text
  try: return number(int, 1)(text)
  except argparse.ArgumentTypeError as e:
    raise argparse.ArgumentTypeError(f"{e}, nor the word {WHOLE}") from None

def parser() -> Parser:
  p = Parser(prog="generate.py", description="Continue a prompt with a trained model.",
             epilog='example: python generate.py --prompt "def main():" --temperature 0.7')
  p.add_argument("--model", metavar="PATH", default=OUT,
                 help=f"a model's file, a folder with one (its {CHECKPOINT}, if there), or a "
                 f"released model, which is downloaded once: {', '.join(RELEASED)}")
  p.add_argument("--dtype", choices=list(WEIGHTS), default="float32",
                 help="type of the weight matrices; the SSMs, states and sums stay float32")
  p.add_argument("--tokenizer", choices=["bytes", "gpt2"],
                 help="default: what the model was trained with, gpt2 for official weights")
  p.add_argument("--text-key", metavar="KEY", default=TEXT_KEY,
                 help="key of the text in each line of a .jsonl file")
  text = p.add_argument_group("continuing a prompt")
  text.add_argument("--prompt", metavar="TEXT", nargs="+",
                    help="the text to continue, or several at once; default: --prompt-file, "
                    'else what is piped in, else "def " for a model of Python, else nothing')
  text.add_argument("--prompt-file", metavar="FILE",
                    help="read the prompt from a file; of a .jsonl, several, one a line")
  text.add_argument("--tokens", metavar="N", type=number(int, 1), default=400,
                    help="how many tokens to generate")
  text.add_argument("--temperature", metavar="T", type=number(float, 0), default=0.8,
                    help="below 1 safer, above 1 wilder, 0 always the likeliest token")
  text.add_argument("--top-k", metavar="K", type=number(int, 0), default=0,
                    help="sample from the K likeliest tokens; 0: from all. Of --classify and the "
                    "like: print the K likeliest answers; 0: the first")
  text.add_argument("--top-p", metavar="P", type=number(float, above=0, high=1), default=1.0,
                    help="sample from the likeliest tokens that together reach this probability")
  text.add_argument("--seed", metavar="N", type=number(int, 0), default=0,
                    help="the same seed gives the same text")
  text.add_argument("--batch", metavar="N", type=number(int, 1), default=1,
                    help="continuations of each prompt; several texts are printed at the end")
  text.add_argument("--stop", metavar="TEXT", type=escaped,
                    help="end before this text, which is not printed; \\n in it is a new line, \\t "
                    "a tab, \\\\ a backslash")
  text.add_argument("--max-length", metavar="N", type=number(int, 1),
                    help="capacity of the attention layers' caches in tokens, prompt and "
                    "continuation (default: the model's, 2048 if it was given none)")
  scores = p.add_argument_group("likelihood, in place of text")
  scores.add_argument("--perplexity", metavar="FILE",
                      help="print the perplexity of a text, per token and per byte")
  scores.add_argument("--compare", metavar="PATH", nargs="+",
                      help="print a table of how well several models, named as in --model, predict "
                      "the same text: that of --perplexity, else what the first one's training held "
                      "out")
  scores.add_argument("--score", metavar="FILE",
                      help="print how often the right choice is the likeliest one; a line of the "
                      f"file is {QUESTION}")
  scores.add_argument("--shots", metavar="K", type=number(int, 0), default=0,
                      help="begin every context of --score with the first K questions and answers")
  scores.add_argument("--window", metavar="N", type=window_size,
                      help="tokens that the model sees at once (default: as in training); whole: "
                      "all before each, by the state that a model without attention carries "
                      "(others keep windows), and bits per byte by position")
  scores.add_argument("--stride", metavar="N", type=number(int, 1),
                      help="tokens from one window of --perplexity to the next (default: half)")
  other = p.add_argument_group("other uses, in place of text")
  other.add_argument("--fill", metavar="TEXT",
                     help="print what a masked model puts at each [MASK] of a text, a word where "
                     "it reads bytes")
  other.add_argument("--export", metavar="FILE",
                     help="write the model as the authors' code reads it, into a .safetensors file "
                     "with a config.json beside it; the README has the two lines of PyTorch that "
                     "make a .pt of it")
  heads = p.add_argument_group(
    "heads of BiGS models, in place of text",
    "For each TEXT, or else each line of --prompt-file or of what is piped in: the answer, its "
    "probability and the text, with tabs between. A tab, in TEXT \\t, parts the texts of a line. Only "
    "classifiers are trained here, by papers/finetune.py; the others are for models of the authors' "
    "code.")
  for name, head in HEADS.items():
    heads.add_argument(f"--{name}", metavar="TEXT", nargs="*", type=escaped,
                       help=f"print {head.about}; a line is {head.line}")
  p.moved("--bench", "support/bench.py", "generate")
  return p

def read_prompts(args:argparse.Namespace, default:str) -> list[str]:
  "The prompts that are given, else what is piped in, else the default."
  from_file = args.prompt_file is not None
  if args.prompt and from_file: raise UserError("give --prompt or --prompt-file, not both")
  if args.prompt: return args.prompt
  if from_file: return read_texts(args.prompt_file, args.text_key) or [""]
  if sys.stdin is None or sys.stdin.closed: return [default]
  try: mode = os.fstat(sys.stdin.fileno()).st_mode
  except (OSError, ValueError): return [default]
  piped = stat.S_ISFIFO(mode) or stat.S_ISREG(mode)        # not a terminal, not /dev/null
  text = sys.stdin.buffer.read().decode("utf-8", "replace") if piped else ""
  return [text or default]

# what a model of a task is used by: options of this program, and the words of an example
USES = {"text": (("text", "perplexity", "score", "export"), []),
        "mlm": (("fill",), ["--fill", f"what is {MASK} here?"]),
        "classify": (("classify",), ["--classify", "a text"])}

def use_of(trained:dict[str, object], model:str|Path, program:str|None=None) -> str:
  """Returns the command, to paste, that uses a model of the task among the options it was trained
  with. program: of a task that is not the project's."""
  task = trained.get("task", "text")
  if task not in USES:
    return command(paper_of(task) or program or "papers/NAME.py", "--show", shown(model))
  words = USES[task][1]
  if trained.get("n_texts") == 2: words = [*words[:1], r"a text\tanother"]
  return command("generate.py", "--model", shown(model), *words)

class SavedModel(NamedTuple):
  path: Path
  tensors: Weights
  meta: dict[str, str]
  trained: dict[str, object]               # the options of train.py; of official weights none

def read_model(name:str) -> SavedModel:
  path = find(name)
  tensors, meta = read_weights(path)
  with refusing(path, "its metadata are damaged"):
    return SavedModel(path, tensors, meta, dict(json.loads(meta.get("args", "{}"))))

def fitting_tokenizer(saved:SavedModel, model:H3LM, name:str) -> Tokenizer:
  "Makes a model's tokenizer. UserError if its vocabulary is another."
  tokenizer = make_tokenizer(name)
  if model.config.vocab_size != tokenizer.vocab_size:
    cure = "" if saved.meta else ": give another --tokenizer"
    raise UserError(f"{saved.path} has a vocabulary of {model.config.vocab_size}, not the "
                    f"{tokenizer.vocab_size} of {name}{cure}")
  return tokenizer

def run(args:argparse.Namespace) -> None:
  actions = [name for name in ("fill", *HEADS, "compare", "perplexity", "score", "export")
             if getattr(args, name) is not None]
  if actions == ["compare", "perplexity"]: actions.pop()   # which names the text
  if len(actions) > 1: raise UserError(f"give one of --{', --'.join(actions)}")
  saved = None if actions == ["compare"] else read_model(args.model)
  setup_device()                           # checks the kernels the first time, which takes a while
  if WEIGHTS[args.dtype] not in Device[Device.DEFAULT].renderer.supported_dtypes():
    raise UserError(f"--dtype {args.dtype}: the device {Device.DEFAULT} knows no such numbers: "
                    "take bfloat16")
  if actions == ["compare"]: return print_comparison(args)
  path, tensors, meta, trained = saved
  task, length = trained.get("task", "text"), trained.get("length")
  action = actions[0] if actions else "text"
  if trained and action not in USES.get(task, [()])[0]:
    use = "to continue text" if action == "text" else f"for --{action}"
    raise UserError(f"{path} was trained on --task {task}, not {use}: use it by "
                    f"{use_of(trained, args.model)}")
  masked = action in ("fill", *HEADS)
  default = "bytes" if meta else "bert" if masked else "gpt2"
  name = args.tokenizer or meta.get("tokenizer", default)
  if name not in TOKENIZERS:
    raise CheckpointError(f"{path}: its tokenizer, {name!r}, is none of {', '.join(TOKENIZERS)}")
  if masked:
    if args.dtype != "float32": raise UserError(f"--dtype is for causal models, not for --{action}")
    head = "mlm" if action == "fill" else action
    lines = read_lines(args, action, trained.get("n_texts")) if action in HEADS else []
    require_head(tensors, str(path), head)
    tokenizer = make_tokenizer(name, path.with_name("vocab.txt"))
    model = bigs_model(tensors, meta, str(path), head)
    # the official ones have been trained, and are run, on rows of one length
    length = length or model.config.max_length
    if action == "fill":
      run = trained.get("mask_run") or MASK_RUN
      return print_fill(model, tokenizer, args.fill, run, 0 if meta else length)
    labels = json.loads(meta["labels"]) if meta else stated_labels(str(path), model.config.n_labels)
    answers = ask(model, tokenizer, action, lines, length, labels, typed=not meta)
    return print_answers(answers, args.top_k or 1, "\n"*(action == "tag"))
  if any(k.startswith("bigs.") for k in tensors):
    raise UserError(f"{path} is a BiGS model, which continues no text: see --fill, --classify, "
                    "--choose, --span and --tag")
  model = h3_model(tensors, meta, str(path), dtype=args.dtype)
  if action == "export": return export(model, args.export)
  tokenizer = fitting_tokenizer(saved, model, name)
  if action in ("perplexity", "score"): return print_likelihood(args, model, tokenizer, length)
  if args.max_length and not model.config.attn_layers:
    raise UserError(f"--max-length is for models with attention: {path} has no cache and no limit")
  of_python = name == "bytes" and not trained.get("data")
  prompts = [p for p in read_prompts(args, "def " if of_python else "") for _ in range(args.batch)]
  read, generated, speed = print_text(
    model, tokenizer, prompts, args.tokens, args.stop, seed=args.seed, max_length=args.max_length,
    temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
  print(f"[{path}: {counted(read, 'token')} of prompt, {generated} generated, "
        f"{speed:.0f} tokens/s, {peak_memory()/1e9:.2f} GB of memory at the peak]", file=sys.stderr)

def print_likelihood(args:argparse.Namespace, model:H3LM, tokenizer:Tokenizer, length:int|None
                     ) -> None:
  "--score or --perplexity."
  whole = args.window == WHOLE
  if args.score is not None and whole:
    raise UserError(f"--window {WHOLE} is for --perplexity and --compare: give --score a number")
  window, stride = windows(args, model, length)
  if args.score is not None: return print_score(model, tokenizer, args.score, args.shots, window)
  print_perplexity(model, tokenizer, args.perplexity, window, stride, args.text_key, whole)

def windows(args:argparse.Namespace, model:H3LM, length:int|None) -> tuple[int|None, int]:
  """Size of the windows, by default the length that the model was trained on, and how far apart.
  None, no windows: with --window whole, where the states of all layers carry on."""
  most, asked = model.config.max_positions or math.inf, args.window
  if asked == WHOLE:
    if args.stride: raise UserError(f"--stride is for windows: leave it out, or --window {WHOLE}")
    if not model.config.attn_layers and most == math.inf: return None, 0
    asked = None
  window = asked or min(most, length or model.config.max_length)
  if window > most:
    raise UserError(f"--window {window}: the model has learned positions for {most} tokens")
  stride = args.stride or -(-window//2)
  if stride > window:
    raise UserError(f"--stride {stride} is longer than a window of {window}: tokens would be left "
                    "out")
  return window, stride

def models_to_compare(args:argparse.Namespace) -> tuple[list[SavedModel], str, list[str]]:
  "The models of --compare, the texts that they are to predict, and a name for these."
  models = [read_model(name) for name in args.compare]
  for path, tensors, meta, trained in models:
    if meta.get("model") == "bigs" or any(k.startswith("bigs.") for k in tensors):
      raise UserError(f"--compare: {path} is a masked model, which predicts no next token: leave "
                      "it out")
    if trained.get("task", "text") != "text":
      raise UserError(f"--compare: {path} was trained on --task {trained['task']}: leave it out")
  if args.perplexity is None: return models, *held_out_texts(models[0])
  return models, args.perplexity, texts_of(args.perplexity, args.text_key)

def predict(args:argparse.Namespace, saved:SavedModel, texts:list[str]
            ) -> tuple[H3LM, Tokenizer, int|None, Likelihood]:
  "Loads a model and reads texts with it, in windows of the size returned, or whole: None."
  path, tensors, meta, trained = saved
  model = h3_model(tensors, meta, str(path), dtype=args.dtype)
  tokenizer = fitting_tokenizer(saved, model, meta.get("tokenizer") or args.tokenizer or "gpt2")
  window, stride = windows(args, model, trained.get("length"))
  return model, tokenizer, window, likelihood(model, tokenizer, texts, window, stride)

def print_comparison(args:argparse.Namespace) -> None:
  "Prints how well several models predict the same text."
  models, about, texts = models_to_compare(args)
  rows, founds = [], {}
  for name, saved in zip(args.compare, models):
    model, tokenizer, window, founds[name] = predict(args, saved, texts)
    nats, tokens, size, *_ = founds[name]
    millions = sum(p.numel() for p in get_state_dict(model).values()) / 1e6
    rows.append([name, saved.trained.get("model", "official"), f"{millions:.2f} M",
                 saved.meta.get("step", "-"), tokenizer.name, f"{window:,}" if window else WHOLE,
                 f"{nats/size/math.log(2):.4f}", f"{math.exp(nats/tokens):.4g}"])
  print(f"{about}: {size:,} bytes")
  print_table(["", "model", "parameters", "steps", "tokens", "window", "bits per byte",
               "perplexity per token"], rows)
  if args.window == WHOLE: print_positions(founds)

HELD_OUT = 1 << 18                         # tokens of held-out text that --compare reads at most

def held_out_texts(saved:SavedModel) -> tuple[str, list[str]]:
  "The texts, or as much of them, that were held out when a model was trained, and a name for them."
  path, _, meta, trained = saved
  if "holdout" not in trained:
    raise UserError(f"{path} does not say what text was held out: name a text with --perplexity")
  data, tokenizer = trained.get("data"), make_tokenizer(meta["tokenizer"])
  missing = [p for p in data or [] if not Path(p).exists()]
  if missing: raise UserError(f"{missing[0]}, which {path} was trained on, is not there any more: "
                              "name a text with --perplexity")
  own = [path.with_name(name) for name in ("log.csv", "vocab.txt")]
  tokens, ends = read_tokens(data, tokenizer, trained.get("text_key", TEXT_KEY), own)
  begin = split(ends, trained["holdout"])
  cuts = ends[ends > begin] - begin
  held = np.split(tokens[begin:begin+HELD_OUT], cuts[cuts < HELD_OUT])
  texts = [tokenizer.decode(ids).decode("utf-8", "ignore") for ids in held]
  return f"what {path} held out", [text for text in texts if text]

# a .safetensors file as the .pt that the authors' scripts load
TO_PT = """import torch, safetensors.torch
torch.save(safetensors.torch.load_file("{0}.safetensors"), "{0}.pt")"""

def export(model:H3LM, name:str) -> None:
  "Writes the model in the official format, and says so; nothing is written over."
  path = Path(name)
  if path.suffix != ".safetensors":
    two_lines = "; ".join(TO_PT.format(path.with_suffix("")).splitlines())
    raise UserError(f"--export {path}: official weights are written as .safetensors: name such a "
                    f"file; PyTorch makes a .pt of it: {two_lines}")
  if path.exists(): raise UserError(f"{path} is there already: name another file with --export")
  path.parent.mkdir(parents=True, exist_ok=True)
  save_official(name, model)
  print(f"wrote {path} and {path.with_name('config.json')}, the arguments of the authors' "
        "SSMLMHeadModel")

def main(argv:list[str]|None=None) -> int:
  p = parser()
  args = p.parse_args(argv)
  if hasattr(sys.stdout, "reconfigure"): sys.stdout.reconfigure(errors="replace")
  # a text's figures are then the same to the bit whatever else is in its batch; a forward pass of
  # rows of 256 tokens takes 5 % longer, of 1,024 up to 10 %
  with Interrupt(last_words=lambda: "") as interrupt, Context(BATCH_INVARIANT=1):
    try:
      run(args)
      return 0
    except UserError as e: p.error(str(e))
    except BrokenPipeError:                # the reader of our pipe, `head` say, has had enough
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      return 141
    except MemoryError: p.error("not enough memory: take a smaller --batch or --max-length")
    except OSError as e:
      if e.filename is None: raise
      p.error(f"{e.filename}: {e.strerror}")
  return interrupt.status

if __name__ == "__main__": sys.exit(main())
