"""Fine-tuning: labels, or real values, of texts and pairs of texts in a TSV, as GLUE has them.

  python papers/finetune.py --data train.tsv --dev dev.tsv --init masked/checkpoint.safetensors --out classes
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import math
import numpy as np
from papers.grid import hold_out, labelled, main, real, shuffled
from support.text import UserError, read_tsv
from train import Batch, Task, argparse, task, text_options, tokenizer

FINE_TUNING = dict(lr=2e-5, epochs=3)            # with --init: GLUE's recipe

def options(add) -> None:
  text_options(add)
  add("--columns", str, None, "columns of the label and of one or two texts, by the header's names or by number, from "
      "1; 2,4 for CoLA's files", "what the header says", metavar="L,T,…")
  add("--dev", str, None, "such lines to evaluate on", "--holdout's share of --data", metavar="FILE")

@task("classify", "labels of a TSV", causal=False, options=options, model="bigs", batch=16, length=128,
      weight_decay=0.01, steps=None)
def classify_task(args:argparse.Namespace) -> Task:
  "Labels, or real values, of texts or pairs of texts: [CLS] a [SEP], or [CLS] a [SEP] b [SEP], filled up with [PAD]."
  if not args.data or len(args.data) != 1: raise UserError("--task classify takes one TSV file: --data FILE")
  if args.lr is None and args.init: args.lr = FINE_TUNING["lr"]
  tok, L = tokenizer(args), args.length
  labels, texts, lines = read_tsv(args.data[0], args.columns)
  values = [real(l) for l in labels]
  regression = any(v is not None and v != int(v) for v in values)
  if regression and None in values and values.count(None) < len(values)/2:
    i = values.index(None)
    raise UserError(f"{args.data[0]} line {lines[i]}: {labels[i]!r} is not a number, as other labels are")
  regression = regression and None not in values
  names = None if regression else sorted(set(labels), key=lambda l: (real(l) is None, real(l) or 0, l))
  if L < (need := 2 + 2*len(texts[0])): raise UserError(f"--length {L} is too short for texts: give at least {need}")
  if names and len(names) < 2:
    raise UserError(f"{args.data[0]}: every line has the label {names[0]!r}: nothing to learn")
  if names and len(names) > max(10, len(labels)/2):
    raise UserError(f"{args.data[0]} has {len(names):,} labels in {len(labels):,} lines, the first "
                    f"{labels[0][:40]!r}: is that a text? --columns says which columns are which")
  def table(labels:list[str], texts:list[list[str]], lines:list[int], path:str) -> list[Batch]:
    rows = []
    for label, text, line in zip(labels, texts, lines):
      if (real(label) is None) if regression else (label not in names):
        raise UserError(f"{path} line {line}: " + (f"{label!r} is not a number, as other labels are" if regression else
                        f"the label {label!r} does not occur in {args.data[0]} (its labels: "
                        f"{', '.join(names[:12])}{', …'*(len(names) > 12)})"))
      parts = [list(tok.encode(t)) for t in text]
      while sum(map(len, parts)) + len(parts) + 1 > L: max(parts, key=len).pop()      # of the longer text, from the end
      row = [tok.cls] + [t for p in parts for t in (*p, tok.sep)]
      fill = L - len(row)
      rows.append((np.array(row + [tok.pad]*fill, np.int32), np.array([1]*len(row) + [0]*fill, np.int32),
                   np.float32(label) if regression else np.int32(names.index(label))))
    return rows
  rows = table(labels, texts, lines, args.data[0])
  if args.dev: held = table(*read_tsv(args.dev, args.columns, len(texts[0])), args.dev)
  else:
    learned, kept = hold_out(args, len(rows))
    if not len(learned): raise UserError(f"{args.data[0]} has {len(rows)} line: some are held out, give more, or --dev")
    rows, held = [rows[i] for i in learned], [rows[i] for i in kept]
  if args.steps is None: args.steps = math.ceil(FINE_TUNING["epochs"] * len(rows)/args.batch)
  stack = lambda rows: tuple(np.stack(x) for x in zip(*rows))
  numbers = shuffled(args, len(rows))
  def batch(step:int) -> Batch: return stack([rows[i] for i in numbers(step)])
  return labelled(args, f"{args.data[0]}: {len(rows):,} lines to train on, {len(held):,} held out, "
                  + ("real values" if regression else f"labels {', '.join(names)}") + f" ({args.tokenizer})", tok,
                  tok.masked_size, batch, held, np.array([r[2] for r in rows]), None if regression else names,
                  schedule="linear")

if __name__ == "__main__": sys.exit(main("papers/finetune.py", default="classify"))
