"""Fine-tuning as on GLUE: classes, or real values, of texts or of pairs of texts in a TSV.

Claim: BiGS (arXiv 2212.10544), its table of GLUE: the mean of the dev sets after pretraining on
11 billion tokens is 83.3 for BiGS as for BERT (unverified, from notes on the paper). Neither GLUE
nor the released weights are here; both are read:

  python papers/finetune.py --data train.tsv --dev dev.tsv --init masked/checkpoint.safetensors

A thousand short texts take a model of the default size half a minute on two cores. With --init the
recipe is GLUE's: learning rate 2e-5 (a third of --size's for narrow models), 3 epochs of batches
of 16, linear decay after a tenth of warm-up. Then it labels other texts:

  python generate.py --model classes --classify "a text" "another"

Not here: a grid, the search for the best rate, the mean over GLUE's tasks.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1]))
import argparse, functools, math
from typing import Callable
import numpy as np
from papers.grid import drawn_from, hold_out, label_task, run_program, stack, to_float
from support.text import Table, UserError, listed, pad, read_tsv, text_row
from train import SIZES, Task, task, text_options, tokenizer

RATE, EPOCHS = 2e-5, 3                            # with --init: GLUE's recipe
# A narrower model learns too little at that rate: it takes this share of --size's. Of 400 lines, code
# or prose, after 3 epochs of 1,000, masked models of bytes of width 64 got 63 % right at 2e-5, 91 at
# 3e-4, 95 at 1e-3 and 3e-3; of width 128 84 at 2e-5, 90 at 2e-4, 94 at 7e-4, 95 at 2e-3
NARROW, SHARE = 512, 1/3

def find_classes(table:Table, path:str) -> list[str]|None:
  """The classes that labels name, in order; None where they are real values. UserError where they
  are a mixture, all the same, or look like texts."""
  labels, texts, _ = table
  values = [*map(to_float, labels)]
  if any(value is not None and value != int(value) for value in values):
    if None not in values: return None
    if values.count(None) < len(values)/2:
      i = values.index(None)
      raise UserError(f"{path} line {table.lines[i]}: {labels[i]!r} is not a number, as other "
                      "labels are")
  by_value = lambda label: (to_float(label) is None, to_float(label) or 0, label)
  classes = sorted(set(labels), key=by_value)
  if len(classes) < 2:
    raise UserError(f"{path}: every line has the label {classes[0]!r}: nothing to learn")
  different = len({first for first, *_ in texts})
  if len(classes) > max(10, len(labels)/2) or len(classes) > max(2, different):
    raise UserError(f"{path} has {len(classes):,} labels in {len(labels):,} lines, the first "
                    f"{labels[0][:40]!r}: is that a text? --columns says which columns are which, "
                    "2,1 for text, tab, label")
  return classes

def options(add:Callable) -> None:
  text_options(add)
  add("--columns L,T,…", str, None, "columns of the label and of one or two texts, by the "
      "header's names or by number, from 1; 2,4 for CoLA's files (default: what the header says)")
  add("--dev FILE", str, None, "such lines to evaluate on (default: --holdout's share of --data)")

@task("classify", "labels of a TSV", causal=False, options=options, model="bigs", batch=16,
      length=128, weight_decay=0.01, steps=None)
def classify_task(args:argparse.Namespace) -> Task:
  "Rows [CLS] a [SEP], or [CLS] a [SEP] b [SEP], filled up with [PAD]."
  if not args.data or len(args.data) != 1:
    raise UserError("--task classify takes one TSV file: --data FILE")
  if args.lr is None and args.init:
    # an official model's width is not among the options
    narrow = args.d_model and args.d_model < NARROW
    args.lr = SIZES[args.size].lr * SHARE if narrow else RATE
  path, tok, L = args.data[0], tokenizer(args), args.length
  table = read_tsv(path, args.columns)
  n_texts = args.n_texts = len(table.texts[0])             # for those who ask the model
  classes = find_classes(table, path)
  least = 2 + 2*n_texts
  if L < least: raise UserError(f"--length {L} is too short for texts: give at least {least}")

  def to_label(text, where):
    if classes is None:
      if to_float(text) is not None: return np.float32(text)
      raise UserError(f"{where}: {text!r} is not a number, as other labels are")
    if text in classes: return np.int32(classes.index(text))
    raise UserError(f"{where}: the label {text[:40]!r} does not occur in {path} (its labels: "
                    f"{listed(classes)})")
  def to_rows(table, path):
    return stack([(*pad(text_row(tok, texts, L), L, tok.pad),
                   to_label(label, f"{path} line {line}")) for label, texts, line in zip(*table)])
  def describe(row):
    parts = np.split(row, np.flatnonzero(row == tok.sep))
    return " | ".join(tok.decode(part).decode("utf-8", "replace") for part in parts[:-1])

  rows = to_rows(table, path)
  if args.dev: held_out = to_rows(read_tsv(args.dev, args.columns, n_texts), args.dev)
  else: rows, held_out = hold_out(rows, args)
  n, full = len(rows[0]), int(rows[1].all(1).sum())
  if not n: raise UserError(f"{path} has 1 line: some are held out, give more, or --dev")
  if args.steps is None: args.steps = math.ceil(EPOCHS * n/args.batch)
  kind = f"labels {listed(classes)}" if classes else "real values"
  about = (f"{path}: {n:,} lines to train on, {len(held_out[0]):,} held out, {kind} "
           f"({args.tokenizer})")
  if full: about += f"; {full:,} fill --length {L}, the end of what is longer is left out"
  return label_task(args, about, tok, tok.masked_size, drawn_from(rows, args), held_out, rows[2],
                    classes, describe, "linear")

main = functools.partial(run_program, "papers/finetune.py", __doc__, None, "classify")

if __name__ == "__main__": sys.exit(main())
