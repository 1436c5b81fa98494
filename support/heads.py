"""Answers of BiGS's heads: labels of texts, the best of several choices, spans of a text, tags.

  for answers in ask(model, tokenizer, "classify", [["a text"], ["another"]], 128, labels):
    for [best, *others] in answers: print(best.text, best.p)

Texts become the rows that a head is trained on, [CLS] a [SEP] or [CLS] a [SEP] b [SEP], by
`text_row`. Only classifiers are trained here, by papers/finetune.py. The other heads come with
files of the authors' code, whose tokenizer is BERT's.
"""
from __future__ import annotations
import re, sys
from typing import Callable, Iterator, NamedTuple
import numpy as np
from tinygrad import Tensor
from bigs_tiny import BiGS
from flashconv import capture
from support.text import Tokenizer, UserError, pad, text_row, waiting

AT_ONCE = 16             # rows that go through a model together
LONGEST = 30             # tokens of a span, as in the usual evaluation of SQuAD

class Answer(NamedTuple):
  "An answer, its probability, None for a real value, and the text that it is about."
  text: str
  p: float|None
  about: str

class Asked(NamedTuple):
  "The texts of a line, the tokens of its rows, and what it takes to put an answer into words."
  texts: list[str]
  rows: list[list[int]]
  tokenizer: Tokenizer
  labels: list[str]

def softmax(x:np.ndarray) -> np.ndarray:
  e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True, initial=-np.inf))
  return e / e.sum(-1, keepdims=True)

def ranked(texts:list[str], p:np.ndarray, about:str) -> list[Answer]:
  return [Answer(texts[i], float(p[i]), about) for i in np.argsort(-p, kind="stable")]

def classify(asked:Asked, logits:np.ndarray) -> Iterator[list[Answer]]:
  "The labels of one or two texts, or a real value: logits (1,labels)."
  values, about = logits[0], "\t".join(asked.texts)
  if len(values) == 1: yield [Answer(f"{values[0]:.4g}", None, about)]
  else: yield ranked(asked.labels, softmax(values), about)

def choose(asked:Asked, logits:np.ndarray) -> Iterator[list[Answer]]:
  "The choices for a context: logits (choices,1)."
  context, *choices = asked.texts
  yield ranked(choices, softmax(logits[:, 0]), context)

def span(asked:Asked, first:np.ndarray, last:np.ndarray) -> Iterator[list[Answer]]:
  """The likeliest spans of the second text, by the probabilities of their first token times those
  of their last: logits (1,L) both."""
  question, text = asked.texts
  row = asked.rows[0]
  inside = slice(row.index(asked.tokenizer.sep) + 1, len(row) - 1)
  p = np.outer(softmax(first[0, inside]), softmax(last[0, inside]))
  p = np.triu(p) - np.triu(p, LONGEST)
  offsets, best = asked.tokenizer.offsets(text), np.argsort(-p, None, kind="stable")[:100]
  yield [Answer(text[offsets[i][0]:offsets[j][1]], float(p[i, j]), question)
         for i, j in zip(*np.unravel_index(best, p.shape))]

def tag(asked:Asked, logits:np.ndarray) -> Iterator[list[Answer]]:
  "The tags of each word between spaces, which are those of its first token: logits (1,L,tags)."
  text, = asked.texts
  begins = [begin for begin, _ in asked.tokenizer.offsets(text)][:len(asked.rows[0]) - 2]
  for word in re.finditer(r"\S+", text):
    at = np.searchsorted(begins, word.start())
    if at < len(begins): yield ranked(asked.labels, softmax(logits[0, 1 + at]), word[0])

class Head(NamedTuple):
  "A head: its answers and a line of its input, in words, and how many texts a line has."
  about: str
  line: str
  least: int
  most: int
  forward: Callable             # (model, tokens, mask, token types) -> logits, (B,…) each
  answers: Callable             # (asked, *logits of its rows) -> answers, the likeliest first

HEADS = {
  "classify": Head("the label, or the value, of a text", "a text, or two", 1, 2,
                   lambda model, *row: [model.classify(*row)], classify),
  "choose": Head("the likeliest choice", "a context and its choices", 3, 99,
                 lambda model, *row: [model.classify(*row)], choose),
  "span": Head("the part of a text that answers a question", "a question and a text", 2, 2,
               lambda model, tokens, mask, types: model.span(tokens, types), span),
  "tag": Head("the tag of each word", "a text", 1, 1,
              lambda model, tokens, mask, types: [model.tag(tokens, types)], tag)}

def ask(model:BiGS, tok:Tokenizer, name:str, lines:list[list[str]], length:int, labels:list[str],
        typed:bool=False) -> Iterator[Iterator[list[Answer]]]:
  """For each line of texts the answers of the head `name`: one list, or one a word, the likeliest
  answer first.

  length: of the rows, as in training; longer texts lose their end. typed: whether the second text
  of a row is of token type 1, as in the authors' code. UserError if logits are not finite."""
  head, asked = HEADS[name], []
  for texts in lines:
    parts = [[texts[0], choice] for choice in texts[1:]] if name == "choose" else [texts]
    asked.append(Asked(texts, [text_row(tok, part, length) for part in parts], tok, labels))
  rows = [pad(row, length, tok.pad) for one in asked for row in one.rows]
  tokens, mask = map(np.stack, zip(*rows))
  if full := int(mask.all(1).sum()):
    print(f"{full:,} of {len(rows):,} rows fill the {length} tokens that the model takes: the end of "
          "what is longer is not read", file=sys.stderr)
  # 1 from behind the first [SEP] to the last one
  ends = (tokens == tok.sep).cumsum(1) - (tokens == tok.sep)
  types = typed * mask * (ends == 1)
  batch, logits = min(AT_ONCE, len(rows)), []
  graph = capture(lambda *row: [x.realize() for x in head.forward(model, *row)])
  for i in range(0, len(rows), batch):
    which = np.minimum(np.arange(i, i + batch), len(rows) - 1)       # the last one fills a batch up
    some = (Tensor(x[which].astype(np.int32)).realize() for x in (tokens, mask, types))
    with waiting("the first answer", i == 0): made = graph(*some)
    logits.append([x.numpy().copy() for x in made])
  outputs = [np.concatenate(parts) for parts in zip(*logits)]
  if not all(np.isfinite(x).all() for x in outputs):
    raise UserError("the model's logits are not finite: its weights are damaged, or its training "
                    "diverged")
  end = 0
  for one in asked:
    begin, end = end, end + len(one.rows)
    yield head.answers(one, *(x[begin:end] for x in outputs))
