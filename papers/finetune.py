"""Fine-tuning as on GLUE: classes, or real values, of texts or pairs of texts in a TSV.

BiGS (arXiv 2212.10544, its table of GLUE): after 11 billion tokens of pretraining, the mean of the dev sets is 83.3
for BERT, 77.2 for STACK/SSM, 81.8 for gated attention, 83.3 for BiGS (unverified: from notes on the
paper). GLUE is not at hand: its files, or yours, go through this:

  python papers/finetune.py --data train.tsv --dev dev.tsv --init masked/checkpoint.safetensors --out classes

With --init the recipe is GLUE's: rate 2e-5, 3 epochs, batches of 16, a linear decay after a tenth of warm-up.
It takes seconds for a small model and file. Not here: a grid; an ensemble; a search for the best rate.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1]))
import argparse, math
from typing import Callable
import numpy as np
from tinygrad import Tensor
from bigs_tiny import BiGS
from papers.grid import batches, classification, pad, run_program, stack, to_float
from support.text import Tokenizer, UserError, read_tsv
from train import Batch, Task, hold_out, shuffled, task, text_options, tokenizer

RATE, EPOCHS = 2e-5, 3                            # with --init: GLUE's recipe

def correlation(targets:np.ndarray, predictions:np.ndarray) -> dict[str, float]:
  "Pearson's and Spearman's; ties share the mean of their ranks."
  def ranks(x:np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts-1)/2)[group]
  def pearson(a:np.ndarray, b:np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / math.sqrt((a @ a) * (b @ b) or 1))
  return {"Pearson": pearson(targets, predictions),
          "Spearman": pearson(ranks(targets), ranks(predictions))}

def regression(args:argparse.Namespace, about:str, tok:Tokenizer, batch:Callable[[int], Batch],
               held_out:list[tuple], trained:np.ndarray) -> Task:
  "A real value for each row (tokens (L,), mask (L,), value), by an encoder with one output on top."
  targets = np.array([value for _, _, value in held_out])
  def forward(model:BiGS, tokens:Tensor, mask:Tensor, values:Tensor) -> tuple[Tensor, Tensor]:
    predictions = model.classify(tokens, mask).squeeze(-1)
    return ((predictions - values)**2).mean(), predictions
  def metrics(outputs:list[Batch]) -> dict[str, float]:
    return correlation(targets, np.concatenate([predicted for _, predicted in outputs]))
  baseline = float(((targets - trained.mean())**2).mean())
  return Task(about, tok, tok.masked_size, batch, batches(held_out, args.batch), baseline,
              "the mean of all", 1.0, 1.0, "squared error", forward, metrics, "classify", [""],
              schedule="linear", count=lambda batch: len(batch[0]))

def find_classes(labels:list[str], lines:list[int], path:str) -> list[str]|None:
  """The classes that labels name, in order; None where they are real values. UserError where they are a mixture,
  all the same, or look like texts."""
  values = [to_float(label) for label in labels]
  if any(value not in (None, int(value or 0)) for value in values):
    if None not in values: return None
    if values.count(None) < len(values)/2:
      i = values.index(None)
      raise UserError(f"{path} line {lines[i]}: {labels[i]!r} is not a number, as other labels are")
  by_value = lambda label: (to_float(label) is None, to_float(label) or 0, label)
  classes = sorted(set(labels), key=by_value)
  if len(classes) < 2:
    raise UserError(f"{path}: every line has the label {classes[0]!r}: nothing to learn")
  if len(classes) > max(10, len(labels)/2):
    raise UserError(f"{path} has {len(classes):,} labels in {len(labels):,} lines, the first "
                    f"{labels[0][:40]!r}: is that a text? --columns says which columns are which")
  return classes

def options(add:Callable) -> None:
  text_options(add)
  add("--columns", str, None, "columns of the label and of one or two texts, by the header's names or "
      "by number, from 1; 2,4 for CoLA's files", "what the header says", metavar="L,T,…")
  add("--dev", str, None, "such lines to evaluate on", "--holdout's share of --data", metavar="FILE")

@task("classify", "labels of a TSV", causal=False, options=options, model="bigs", batch=16,
      length=128, weight_decay=0.01, steps=None)
def classify_task(args:argparse.Namespace) -> Task:
  "Rows [CLS] a [SEP], or [CLS] a [SEP] b [SEP], filled up with [PAD]."
  if not args.data or len(args.data) != 1:
    raise UserError("--task classify takes one TSV file: --data FILE")
  if args.lr is None and args.init: args.lr = RATE
  (path,), tok, L = args.data, tokenizer(args), args.length
  table = read_tsv(path, args.columns)
  n_texts = len(table.texts[0])
  classes = find_classes(table.labels, table.lines, path)
  if L < (least := 2 + 2*n_texts):
    raise UserError(f"--length {L} is too short for texts: give at least {least}")

  def to_label(text:str, where:str) -> np.number:
    if classes is None:
      if to_float(text) is not None: return np.float32(text)
      raise UserError(f"{where}: {text!r} is not a number, as other labels are")
    if text in classes: return np.int32(classes.index(text))
    known = ", ".join(classes[:12]) + ", …"*(len(classes) > 12)
    raise UserError(f"{where}: the label {text!r} does not occur in {path} (its labels: {known})")
  def to_row(texts:list[str]) -> tuple[np.ndarray, np.ndarray]:
    parts = [list(tok.encode(text)) for text in texts]
    while sum(map(len, parts)) + len(parts) + 1 > L: max(parts, key=len).pop()
    return pad([tok.cls, *(t for part in parts for t in (*part, tok.sep))], L, tok.pad)
  def to_rows(table, path:str) -> list[tuple]:
    return [(*to_row(texts), to_label(label, f"{path} line {line}")) for label, texts, line in zip(*table)]

  rows = to_rows(table, path)
  if args.dev: held_out = to_rows(read_tsv(args.dev, args.columns, n_texts), args.dev)
  else:
    learned, kept = hold_out(args, len(rows))
    if not len(learned):
      raise UserError(f"{path} has {len(rows)} line: some are held out, give more, or --dev")
    rows, held_out = [rows[i] for i in learned], [rows[i] for i in kept]
  if args.steps is None: args.steps = math.ceil(EPOCHS * len(rows)/args.batch)
  order, trained = shuffled(args, len(rows)), np.array([label for _, _, label in rows])
  def batch(step:int) -> Batch: return stack([rows[i] for i in order(step)])
  kind = f"labels {', '.join(classes)}" if classes else "real values"
  about = (f"{path}: {len(rows):,} lines to train on, {len(held_out):,} held out, {kind} "
           f"({args.tokenizer})")
  if classes is None: return regression(args, about, tok, batch, held_out, trained)
  return classification(args, about, tok, tok.masked_size, batch, held_out, trained, classes, "linear")

def main(argv:list[str]|None=None) -> int:
  return run_program("papers/finetune.py", None, "classify", argv)

if __name__ == "__main__": sys.exit(main())
