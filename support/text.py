"""Text: files of it to strings and tokens, the tokenizers, and what command lines share: options,
what is told while there is nothing to show, and Ctrl-C.

  for document in documents("book.txt.gz"): ...      each text of a file, piece by piece
  tokens, ends = read_tokens(["book.txt", "notes/"], ByteTokenizer())

A file is UTF-8 with or without a byte-order mark, or UTF-16 with one; packed by gzip, bzip2, xz
or Zstandard; .jsonl holds a text in each line. What is none of that is refused with the place of
the first wrong byte.

Not here: guessing an encoding from the bytes, PDF and HTML.
"""
from __future__ import annotations
import argparse, bz2, codecs, collections, contextlib, functools, gzip, hashlib, importlib, io
import itertools, json, lzma, math, multiprocessing.util, os, re, shlex, shutil, signal, sys
import sysconfig, textwrap, threading, time, zlib
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Callable, Iterator, NamedTuple, Sequence
import numpy as np
from tinygrad import helpers
from tinygrad.device import Compiled, Program, TinyELF
from tinygrad.engine import realize
from tinygrad.helpers import cache_dir, tqdm

class UserError(Exception):
  "A mistake that the user can put right: shown as one line, exit status 2."

# ---- command lines ------------------------------------------------------------------------------

class Help(argparse.ArgumentDefaultsHelpFormatter):
  "Shows an option's default where it has one, and keeps the lines of a help text apart."
  def _get_help_string(self, action:argparse.Action) -> str|None:
    if action.default is None or action.nargs == 0: return action.help         # 0: a switch
    return super()._get_help_string(action)
  def _split_lines(self, text:str, width:int) -> list[str]:
    return [line for part in text.split("\n") for line in textwrap.wrap(part.strip(), width)]

class Parser(argparse.ArgumentParser):
  "Reports a mistake in one line, whatever the words on the command line hold."
  def __init__(self, **options):
    super().__init__(**dict(formatter_class=Help, allow_abbrev=False) | options)
  def error(self, message:str):
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", " ".join(message.split()))
    self.exit(2, f"{self.prog}: error: {line}\n")
  def moved(self, flag:str, *words:str) -> None:
    "Refuses an option that is another program's, in the line that runs that one: see `command`."
    self.add_argument(flag, nargs="?", action=Moved, const=words, default=argparse.SUPPRESS,
                      help=argparse.SUPPRESS)

class Moved(argparse.Action):
  "An option that is another program's, which `const` names."
  def __call__(self, parser:Parser, *_) -> None:
    parser.error(f"{self.option_strings[0]} is another program's: {command(*self.const)}")

def number(kind:type, low:float=-math.inf, high:float=math.inf, above:float=-math.inf) -> Callable:
  "An argparse type: a finite int or float x with low <= x <= high and x > above."
  wanted = "a whole number" if kind is int else "a number"
  if low > -math.inf: wanted += f" of at least {low}"
  if above > -math.inf: wanted += f" above {above}"
  if high < math.inf: wanted += f" and at most {high}"
  def parse(text:str) -> int|float:
    try: x = kind(text)
    except ValueError: x = math.nan
    if not low <= x <= high or not above < x or abs(x) == math.inf:    # a nan is nowhere
      raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return x
  return parse

def escaped(text:str) -> str:
  r"An argparse type: text in which \n is a new line, \t a tab, and \\ a backslash."
  return re.sub(r"\\([nt\\])", lambda m: {"n": "\n", "t": "\t"}.get(m[1], "\\"), text)

def counted(n:int, noun:str) -> str:
  "A number and a noun: 1 token, 1,000 tokens."
  return f"{n:,} {noun}{'s'*(n != 1)}"

def listed(names:list[str]) -> str:
  "Names with commas; of many, or long ones, the beginning."
  return ", ".join(name[:40] for name in names[:12]) + ", …"*(len(names) > 12)

ROOT = Path(__file__).parents[1]

def near(path:str|Path) -> str:
  "Returns a path from the current folder, if it lies in that, else absolute."
  full, here = Path(os.path.abspath(path)), Path.cwd()
  return str(full.relative_to(here) if full.is_relative_to(here) else full)

def shown(path:str|Path) -> str:
  "Returns a path to paste: absolute where stdout is no terminal, as a file may be read anywhere."
  return near(path) if sys.stdout and sys.stdout.isatty() else os.path.abspath(path)

def command(program:str, *words:str) -> str:
  "Returns the line that runs a program of the project, to paste: by this Python, words quoted."
  first = shutil.which("python")                           # of those on the PATH
  this = first and os.path.dirname(os.path.abspath(first)) == os.path.dirname(sys.executable)
  return shlex.join(["python" if this else shown(sys.executable), shown(ROOT/program), *words])

def paper_of(task:str) -> str|None:
  "The program among papers/ that has a task."
  return next((f"papers/{file.name}" for file in sorted((ROOT/"papers").glob("*.py"))
               if f'@task("{task}",' in file.read_text("utf-8")), None)

def print_table(head:list[str], rows:list[list[str]]) -> None:
  "Prints columns as wide as they must be, the first to the left and the others to the right."
  widths = [max(map(len, column)) for column in zip(head, *rows)]
  for name, *cells in (head, *rows):
    print(name.ljust(widths[0]), *map(str.rjust, cells, widths[1:]), sep="   ")

def peak_memory() -> float:
  "Bytes of memory that this process has held at most; nan where the system does not say."
  try: import resource
  except ImportError: return math.nan
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

def free_memory() -> float:
  "Bytes of memory that this process can still have, swap as well; nan where the system hides it."
  try:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = sum(1024*int(fields[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):      # a container's
      with contextlib.suppress(OSError, ValueError):
        free = min(free, int(Path("/sys/fs/cgroup", limit).read_text()))
    return free
  except (OSError, KeyError, ValueError): pass
  try: return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  except (AttributeError, OSError, ValueError): return math.nan

# ---- waiting, and being interrupted -------------------------------------------------------------

MANY = 16                                  # kernels from which on their compilation takes seconds

class Kernels:
  "Takes the place of tinygrad's progress bar of the kernels that are compiled, see `waiting`."
  told = False                             # in a line that stays, of which there is one
  def __init__(self, what:str, show:Callable, total:int, **_):
    self.what, self.show, self.total, self.done = what, show, total, 0
    self.update(0)
    if not terminal() and total >= MANY and not Kernels.told:
      Kernels.told = True
      print(f"compiling {total} kernels for {what}; later starts are quicker", file=sys.stderr,
            flush=True)
  def __enter__(self) -> Kernels: return self
  def __exit__(self, *_) -> None: pass
  def set_description(self, _) -> None: pass
  def update(self, n:int) -> None:
    self.done += n
    now = min(self.done + 1, self.total)
    self.show(f"compiling kernel {now} of {self.total} for {self.what}")

def terminal() -> bool: return bool(sys.stderr and sys.stderr.isatty())

@contextlib.contextmanager
def waiting(what:str, new:bool=True) -> Iterator[None]:
  """Tells, on stderr, that a program is busy with what may compile kernels, unless it isn't new.

  On a terminal a line says so, and how many of them are done; it is wiped at the end. Elsewhere a
  line stays, if there are many, the first time. tinygrad compiles for all devices in one place,
  `lower_and_compile`, and only what is not on disk; OpenCL does it when a program is loaded."""
  def show(text:str) -> None:
    if not terminal(): return
    width = shutil.get_terminal_size().columns - 1
    print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)
  loaded = itertools.count(1)
  def runtime(device:Compiled, obj:TinyELF) -> Program:
    show(f"loading kernel {next(loaded)} for {what}")
    return load(device, obj)
  if not new or helpers.DEBUG:
    yield
    return
  bar, load = realize.tqdm, Compiled.runtime
  realize.tqdm, Compiled.runtime = functools.partial(Kernels, what, show), runtime
  show(f"preparing {what}")
  try: yield
  finally:
    realize.tqdm, Compiled.runtime = bar, load
    show("")

# by which a user ends a program; Windows has no SIGHUP
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
PATIENCE = 1.0                             # seconds from a signal, or from its end, to a program's

class Interrupt:
  """While active, Ctrl-C, SIGTERM and SIGHUP end the block, whatever it does, within two seconds.

  They raise KeyboardInterrupt, which ends here, in the main thread. While that is in native code,
  or a library keeps it, it does not come to this: then the process ends, but not if `patience` is
  None. While `waits`, the first signal is only noted in `seen`, and a line says so at once.
  last_words: makes a line for the user. SIGHUP is left alone where nohup ignores it."""
  def __init__(self, last_words:Callable[[], str]=lambda: "\nstopped, nothing saved",
               patience:float|None=PATIENCE):
    self.last_words, self.patience = last_words, patience
    self.seen, self.waits, self.left = 0, False, threading.Event()

  def __enter__(self) -> Interrupt:
    def nohup(s): return s.name == "SIGHUP" and signal.getsignal(s) == signal.SIG_IGN
    self.old = {s: signal.signal(s, self.note) for s in SIGNALS if not nohup(s)}
    reading, self.pipe = os.pipe()               # signals are written into it at once
    os.set_blocking(self.pipe, False)
    self.old_pipe = signal.set_wakeup_fd(self.pipe)
    threading.Thread(target=self.watch, args=(reading,), daemon=True).start()
    return self

  def __exit__(self, error:type|None, *_) -> bool:
    self.left.set()
    signal.set_wakeup_fd(self.old_pipe)
    os.close(self.pipe)
    for s, old in self.old.items(): signal.signal(s, old)
    if error is KeyboardInterrupt: print(self.last_words(), file=sys.stderr, flush=True)
    return error is KeyboardInterrupt

  @property
  def status(self) -> int: return 128 + (self.seen or signal.SIGINT)

  def note(self, signum:int, frame) -> None:
    noted, self.seen = self.seen, signum
    if (noted or not self.waits) and not self.left.is_set(): raise KeyboardInterrupt

  def watch(self, reading:int) -> None:
    "Runs in a thread of its own until the block has ended, and after a signal the process."
    noted = 0
    with open(reading, "rb", 0) as pipe:
      while signum := pipe.read(1):
        if self.waits and not noted:
          print("\nfinishing the step, then saving; again to stop at once", file=sys.stderr,
                flush=True)
        elif self.patience is not None and not self.left.wait(self.patience):
          print(self.last_words(), file=sys.stderr, flush=True)
          # ends compile workers; in a thread, as it may wait for one that the signal has ended
          threading.Thread(target=multiprocessing.util._exit_function, daemon=True).start()
          time.sleep(0.3)
          self.end_process(signum[0])
        noted = signum[0]
    if noted:
      time.sleep(PATIENCE)
      if not threading.main_thread().is_alive(): self.end_process(noted)   # waits for such a worker

  def end_process(self, signum:int) -> None:
    for worker in multiprocessing.active_children(): worker.kill()
    os._exit(128 + signum)

# ---- tokenizers: encode(str) -> ids, decode(ids) -> bytes, vocab_size, eot -----------------------

class Tokenizer:
  """Text to tokens and back. Masked models add four tokens behind a vocabulary that has none of
  them; `masked_size` counts them too."""
  cls, sep, mask, pad = (property(lambda self, i=i: self.vocab_size + i) for i in range(4))
  masked_size = property(lambda self: self.vocab_size + 4)

class ByteTokenizer(Tokenizer):
  "UTF-8 bytes, and one token more: <|endoftext|>."
  name, vocab_size, eot = "bytes", 257, 256
  def encode(self, text:str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.uint16)
  def decode(self, ids:np.ndarray) -> bytes:
    ids = np.asarray(ids)
    return ids[ids < 256].astype(np.uint8).tobytes()
  def offsets(self, text:str) -> list[tuple[int, int]]:
    "Where the character, or the part of a word, of each token begins and ends in the text."
    return [(i, i+1) for i, c in enumerate(text) for _ in c.encode("utf-8", "surrogateescape")]

class GPT2Tokenizer(Tokenizer):
  "GPT-2's byte pairs, from tiktoken, which downloads its vocabulary once."
  name, vocab_size, eot = "gpt2", 50257, 50256
  def __init__(self):
    try: import tiktoken
    except ImportError:
      raise UserError("--tokenizer gpt2 needs tiktoken: pip install tiktoken") from None
    try: self.bpe = tiktoken.get_encoding("gpt2")
    except Exception as e:        # whatever the network layer raises: requests, urllib3, OSError
      raise UserError(f"tiktoken could not get GPT-2's vocabulary ({type(e).__name__}): connect "
                      "once, or name a folder that holds it in TIKTOKEN_CACHE_DIR") from None
  def encode(self, text:str) -> np.ndarray:
    return np.array(self.bpe.encode_ordinary(text), np.uint16)
  def decode(self, ids:np.ndarray) -> bytes:
    return self.bpe.decode_bytes([int(i) for i in ids if i < self.eot])

class BertTokenizer(Tokenizer):
  "BERT's WordPiece, lower-cased, of a vocab.txt, by the library `tokenizers`."
  name = "bert"
  cls = sep = mask = pad = vocab_size = masked_size = 0             # the file says
  def __init__(self, vocab:Path|None):
    if vocab is None or not vocab.is_file():
      raise UserError(f"--tokenizer bert needs its vocabulary: no {vocab or 'vocab.txt'}; put that "
                      "of the model, or bert-large-uncased's, beside the checkpoint, or in "
                      "train.py name it with --vocab")
    try: from tokenizers import BertWordPieceTokenizer
    except ImportError:
      raise UserError("--tokenizer bert needs a package: pip install tokenizers") from None
    try: self.words, self.path = vocab.read_text("utf-8").split("\n"), vocab
    except UnicodeDecodeError:
      raise UserError(f"{vocab} is not a vocabulary: it is not text in UTF-8") from None
    while self.words and not self.words[-1]: self.words.pop()
    self.vocab_size = self.masked_size = len(self.words)
    special = ("[CLS]", "[SEP]", "[MASK]", "[PAD]")
    try: self.cls, self.sep, self.mask, self.pad = map(self.words.index, special)
    except ValueError:
      raise UserError(f"{vocab} is not BERT's vocabulary: it lacks {', '.join(special[:3])} or "
                      f"{special[3]}") from None
    self.eot, self.pieces = self.sep, BertWordPieceTokenizer(str(vocab), lowercase=True)
  def pieces_of(self, text:str):
    text = text.encode("utf-8", "replace").decode()                 # a terminal's stray bytes
    return self.pieces.encode(text, add_special_tokens=False)
  def encode(self, text:str) -> np.ndarray: return np.array(self.pieces_of(text).ids, np.int32)
  def offsets(self, text:str) -> list[tuple[int, int]]: return self.pieces_of(text).offsets
  def decode(self, ids:np.ndarray) -> bytes:
    words = (self.words[i] for i in ids if i not in (self.cls, self.sep, self.pad))
    return "".join(w[2:] if w.startswith("##") else " " + w for w in words).encode()

TOKENIZERS = {"bytes": ByteTokenizer, "gpt2": GPT2Tokenizer, "bert": BertTokenizer}

def make_tokenizer(name:str, vocab:Path|None=None) -> Tokenizer:
  "vocab: the vocab.txt of \"bert\"."
  return BertTokenizer(vocab) if name == "bert" else TOKENIZERS[name]()

def text_row(tok:Tokenizer, texts:list[str], length:int) -> list[int]:
  """[CLS] a [SEP] of one text, or [CLS] a [SEP] b [SEP] of two: at most `length` tokens. The longer
  text loses its end."""
  parts = [tok.encode(text)[:length].tolist() for text in texts]
  while sum(map(len, parts)) + len(parts) + 1 > length: max(parts, key=len).pop()
  return [tok.cls, *(token for part in parts for token in (*part, tok.sep))]

def pad(tokens:list[int], length:int, filler:int) -> tuple[np.ndarray, np.ndarray]:
  "Tokens and fillers (length,), and a mask that is 1 where the tokens are."
  x = np.full(length, filler, np.int32)
  x[:len(tokens)] = tokens
  return x, (np.arange(length) < len(tokens)).astype(np.int32)

# ---- files to strings ---------------------------------------------------------------------------

class NotText(UserError):
  "A file that is no text, or cannot be read as it."

PIECE = 1 << 22                            # bytes that are read at once
TEXT_KEY = "text"                          # in a .jsonl file, the key of a line's text
PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le",
         codecs.BOM_UTF16_BE: "utf-16-be"}
DAMAGED = (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)

@functools.cache
def zstd() -> ModuleType|None:
  "The module that reads Zstandard: Python 3.14's, or the package zstandard's; None without either."
  for module in ("compression.zstd", "zstandard"):
    try: return importlib.import_module(module)
    except ImportError: pass
  return None

class Frames(io.RawIOBase):
  "A Zstandard file, read by the package, whose own `open` takes a truncated one for whole."
  def __init__(self, path:Path): self.file, self.frame, self.rest = open(path, "rb"), None, b""
  def read(self, size:int=PIECE) -> bytes:
    "The next `size` unpacked bytes, or some more; none at the end. Raises EOFError if it is cut."
    unpacked, n = [], 0
    while n < size and (data := self.rest or self.file.read(4096)):    # a page may be 100 MB
      self.frame = self.frame or zstd().ZstdDecompressor().decompressobj()
      unpacked.append(self.frame.decompress(data))
      n += len(unpacked[-1])
      self.rest = self.frame.unused_data if self.frame.eof else b""
      if self.frame.eof: self.frame = None
    if n < size and self.frame: raise EOFError("it ends before its last frame does")
    return b"".join(unpacked)
  def close(self) -> None:
    self.file.close()
    super().close()

def is_packed(path:Path) -> bool: return path.suffix.lower() in (*PACKED, ".zst")

def opened(path:Path) -> BinaryIO:
  "A file's bytes, unpacked. Raises NotText where that takes a package that is missing, OSError."
  suffix = path.suffix.lower()
  if suffix in PACKED: return PACKED[suffix](path, "rb")
  if suffix != ".zst": return open(path, "rb")
  if not zstd():
    raise NotText(f"{path} is packed by Zstandard: pip install zstandard, or unpack it by unzstd")
  return Frames(path) if zstd().__name__ == "zstandard" else zstd().open(path, "rb")

def pieces(path:Path) -> Iterator[str]:
  "The text of a file, piece by piece. Raises NotText, with the place of a wrong byte."
  damaged = f"{path} is damaged, or not what its name says: it can't be unpacked"
  try:
    with opened(path) as f: yield from decoded(f, path)
  except (*DAMAGED, *([zstd().ZstdError] if zstd() else [])) as e:
    raise NotText(f"{damaged} ({e})") from None
  except OSError as e:
    why = f"can't read {path}: {e.strerror or e}"
    if is_packed(path) and not e.strerror: why = f"{damaged} ({e})"    # the system's own have one
    raise NotText(why) from None

def decoded(f:BinaryIO, path:Path) -> Iterator[str]:
  "Bytes to text, by the mark that they begin with, else as UTF-8. Raises NotText."
  data = f.read(PIECE)
  mark = next((mark for mark in MARKS if data.startswith(mark)), b"")
  encoding = MARKS.get(mark, "utf-8")
  decoder = codecs.getincrementaldecoder(encoding)()
  data = data[len(mark):]
  at, line = len(mark), 1                                # bytes before `data`; the line they end in
  while True:
    begin = at - len(decoder.getstate()[0])              # half a character may be left from before
    wrong, binary = None, False
    try: text = decoder.decode(data, final=not data)
    except UnicodeDecodeError as e:
      text, wrong = e.object[:e.start].decode(encoding), e.object[e.start]
      binary = encoding == "utf-8" and b"\0" in e.object   # UTF-16 is full of zeros
    before, zero, _ = text.partition("\0")
    if zero: wrong, binary = 0, True
    if wrong is not None:
      place = begin + len(before.encode(encoding)), line + before.count("\n")
      raise NotText(wrong_byte(path, encoding, *place, wrong, binary))
    if text: yield text
    if not data: return
    at += len(data)
    line += text.count("\n")
    data = f.read(PIECE)

def wrong_byte(path:Path, encoding:str, at:int, line:int, byte:int, binary:bool) -> str:
  "The message about a byte, at an offset from 0 and in a line from 1, that is no part of a text."
  place = f"byte {at:,}, in line {line:,}, is 0x{byte:02x}"
  if is_packed(path): place += " (unpacked)"
  if binary: return f"{path} is a binary file, not UTF-8 text: {place}"
  if encoding != "utf-8":
    return f"{path} begins as {encoding.upper()} and does not go on so: {place}"
  convert = "iconv -f latin1 -t utf-8"
  if is_packed(path): how = f"unpack it and convert it by {convert}"
  else:
    to = path.with_name(f"{path.stem}.utf8{path.suffix}")
    how = f"convert it: {convert} {shlex.quote(str(path))} > {shlex.quote(str(to))}"
  return f"{path} is not UTF-8: {place}; if it is Latin-1, {how}"

def is_jsonl(path:Path) -> bool:
  return (path.with_suffix("") if is_packed(path) else path).suffix.lower() == ".jsonl"

def lines(path:Path) -> Iterator[str]:
  "The lines of a file, which need not fit into memory. Raises as `pieces`."
  parts = []                                               # of the line that is not at its end yet
  for text in pieces(path):
    end, *more = text.split("\n")
    parts.append(end)
    for begin in more:
      yield "".join(parts)
      parts = [begin]
  yield "".join(parts)

def documents(path:Path, key:str=TEXT_KEY) -> Iterator[Iterator[str]]:
  """The texts of a file, each piece by piece: of a .jsonl file what `key` names in each line, else
  the whole of it. Raises NotText, with a line's number, for what holds none."""
  if not is_jsonl(path): yield pieces(path)
  else:
    for i, line in enumerate(lines(path), 1):
      if line.strip(): yield cut(json_text(line, key, f"{path} line {i}"))

def cut(text:str) -> Iterator[str]:
  for at in range(0, len(text), PIECE): yield text[at:at+PIECE]

def json_text(line:str, key:str, where:str) -> str:
  "The text in a line of a .jsonl file."
  try: fields = json.loads(line)
  except (ValueError, RecursionError): raise NotText(f"{where} is not JSON") from None
  if type(fields) is not dict: raise NotText(f'{where} is no object: a line is {{"{key}": "…"}}')
  if type(fields.get(key)) is not str:
    keys = ", ".join(k[:40] for k in list(fields)[:8]) or "none"
    raise NotText(f"{where} has no text under the key {key!r} (its keys: {keys}): "
                  "name another with --text-key")
  return fields[key].encode("utf-8", "replace").decode()   # half of a surrogate pair is no text

def read_texts(path:str, key:str=TEXT_KEY) -> list[str]:
  "The texts of a file, as in `documents`. Raises UserError."
  return ["".join(text) for text in documents(Path(path), key)]

def read_text(path:str) -> str:
  "The whole of a file, whatever its name. Raises UserError."
  return "".join(pieces(Path(path)))

# ---- files to tokens ----------------------------------------------------------------------------

SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

LIBRARY = "Python's library"               # what is read where no file is named

def stdlib_files() -> list[Path]:
  root = Path(sysconfig.get_paths()["stdlib"])
  files = []
  for folder, inside, names in os.walk(root):           # Path.rglob would go through SKIP, too
    inside[:] = {*inside} - SKIP
    files += [Path(folder, name) for name in names if name.endswith(".py")]
  return sorted(files)

# what train.py, papers/bigs.py and papers/layer.py leave in a run's folder
RUN_FILES = ("checkpoint*", "log.csv", "loss.png", "vocab.txt", "filters.png", "layers.png")

def left_by_run(path:Path) -> bool:
  "Whether a run has left the file: by its name, and because there is a checkpoint beside it."
  return any(map(path.match, RUN_FILES)) and any(path.parent.glob("checkpoint*.safetensors"))

def text_files(paths:list[str]|None, own:Sequence[Path]=()) -> list[tuple[Path, str|None]]:
  """Files, in order, and the folder that each was found in; None for a file that was named itself.
  What a run has left is no text, nor is `own`: a line on stderr says what was left out."""
  own = {path.resolve() for path in own}
  files = []
  for path in map(Path, paths or []):
    if not path.exists(): raise UserError(f"no such file or folder: {path}")
    if not path.is_dir():
      files.append((path, None))
      continue
    hidden = lambda f: any(n.startswith(".") for n in f.relative_to(path).parts)
    found = [f for f in sorted(path.rglob("*")) if f.is_file() and not hidden(f)]
    if not found: raise UserError(f"no text in the folder {path}: --data takes text in UTF-8")
    files += [(f, str(path)) for f in found]
  if not paths: return [(f, LIBRARY) for f in stdlib_files()]
  of_runs = [str(f) for f, _ in files if left_by_run(f) or f.resolve() in own]
  if not of_runs: return files
  files = [(f, folder) for f, folder in files if str(f) not in of_runs]
  if not files: raise UserError(f"no text in {', '.join(paths)} but what runs have left there")
  print(f"left out what runs have left: {', '.join(of_runs[:8])}{', …'*(len(of_runs) > 8)}",
        file=sys.stderr)
  return files

LARGE = 1 << 26                            # bytes of text from which on tokens lie in a file
UNPACKED = 5                               # about how many times its size a packed text is

def token_pieces(text:Iterator[str], tok:Tokenizer) -> Iterator[np.ndarray]:
  """The tokens of a text in pieces. It is cut where a line ends and the next begins with no space:
  byte pairs do not cross that."""
  rest = ""
  for more in text:
    rest += more
    ends = [m.end() for m in re.finditer(r"\S\n(?=\S)", rest[-65536:])]
    cut = len(rest) if tok.name == "bytes" else max(0, len(rest)-65536) + ends[-1] if ends else 0
    if cut:
      yield tok.encode(rest[:cut])
      rest = rest[cut:]
  if rest: yield tok.encode(rest)

def read_tokens(paths:list[str]|None, tok:Tokenizer, key:str=TEXT_KEY, own:Sequence[Path]=()
                ) -> tuple[np.ndarray, np.ndarray]:
  """All texts as tokens, uint16, <|endoftext|> behind each, and where each text ends.

  key: names a text in a line of a .jsonl file. Tokens of much text are put into a file in
  tinygrad's cache, once for as long as the texts stay as they are, and mapped: memory need not hold
  them. Raises UserError: a file that is named must be text; what a folder holds besides is left
  out, and a line on stderr says so. own: files that are not read, see `text_files`."""
  files = text_files(paths, own)
  try: stats = [f.stat() for f, _ in files]
  except OSError as e: raise UserError(f"can't read {e.filename}: {e.strerror}") from None
  size = sum(s.st_size*(UNPACKED if is_packed(f) else 1) for (f, _), s in zip(files, stats))
  if size < LARGE:
    sink = io.BytesIO()
    ends = write_files(files, tok, key, sink)
    return np.frombuffer(sink.getvalue(), np.uint16), ends
  names = [(str(f.absolute()), s.st_size, s.st_mtime_ns) for (f, _), s in zip(files, stats)]
  inputs = repr((2, tok.name, getattr(tok, "words", None), key, names)).encode()
  kept = Path(cache_dir) / "tokens" / f"{hashlib.sha256(inputs).hexdigest()[:24]}.bin"
  index, part = kept.with_suffix(".npy"), kept.with_name(f"{kept.stem}.{os.getpid()}.part")
  if not kept.is_file() or not index.is_file():
    try:
      kept.parent.mkdir(parents=True, exist_ok=True)
      with open(part, "w+b") as sink: ends = write_files(files, tok, key, sink)
      np.save(index, ends)
      os.replace(part, kept)
    except OSError as e:
      raise UserError(f"can't keep the tokens of {size/1e9:.1f} GB of text in {kept.parent}: "
                      f"{e.strerror or e}") from None
    finally:
      with contextlib.suppress(OSError): part.unlink()     # it is there if it is not whole
    print(f"kept {ends[-1]:,} tokens in {kept}", flush=True)
  return np.memmap(kept, np.uint16, "r"), np.load(index)

def write_files(files:list[tuple[Path, str|None]], tok:Tokenizer, key:str, sink:BinaryIO
                ) -> np.ndarray:
  "Writes the tokens of files, see `text_files`, and returns where each text ends."
  ends, found, left_out = [], set(), collections.defaultdict(list)
  sizes = [path.stat().st_size for path, _ in files]
  bar = tqdm(total=sum(sizes), desc="tokens", unit="B", unit_scale=True, disable=sum(sizes) < LARGE)
  for (path, folder), size in zip(files, sizes):
    begin, before = sink.tell(), len(ends)
    try:
      write_tokens(path, tok, key, sink, ends)
      found.add(folder)
    except NotText as e:
      if folder is None: raise
      if size: left_out[folder].append(e)
      sink.seek(begin)
      sink.truncate()
      del ends[before:]
    bar.update(size)
  bar.update(0, close=True)
  for folder in {folder for _, folder in files} - found:
    raise UserError(f"no text in the folder {folder}: --data takes text in UTF-8")
  for folder, why in left_out.items():
    if folder != LIBRARY:
      first = " ".join(str(why[0]).split())                # a key of .jsonl may hold anything
      print(f"left out {len(why)} of the files in {folder}; the first: {first}", file=sys.stderr)
  return np.array(ends)

def write_tokens(path:Path, tok:Tokenizer, key:str, sink:BinaryIO, ends:list[int]) -> None:
  "Appends the tokens of a file's texts to `sink`, and where each ends to `ends`. Raises NotText."
  begin, before = sink.tell(), len(ends)
  for text in documents(path, key):
    for some in token_pieces(text, tok): sink.write(some.astype(np.uint16).tobytes())
    sink.write(np.uint16(tok.eot).tobytes())
    ends.append(sink.tell()//2)
  texts = len(ends) - before
  if sink.tell() == begin + 2*texts:                       # an <|endoftext|> each, and nothing else
    what = "has no text in it" if path.stat().st_size else "is empty"
    raise NotText(f"{path} {what}: there is nothing to train on")

def split(ends:np.ndarray, share:float) -> int:
  "The number of tokens for training: all but the last texts, or of few texts all but the end."
  n, total = len(ends), int(ends[-1])
  cut = n - round(n * share)
  if n * share >= 1 and total - ends[cut-1] >= total * share / 2: return int(ends[cut-1])
  return total - round(total * share)

# ---- tables of labels and texts -----------------------------------------------------------------

# How GLUE's files name their columns, in lower case
LABELS = ("label", "gold_label", "quality", "is_duplicate", "score", "similarity")
TEXTS = ("sentence", "sentence1", "sentence2", "question", "question1", "question2", "#1 string",
         "#2 string", "text", "text1", "text2", "premise", "hypothesis")

class Table(NamedTuple):
  "The rows of a TSV file."
  labels: list[str]
  texts: list[list[str]]           # one or two each
  lines: list[int]                 # where they stand, from 1

def read_tsv(path:str, columns:str|None=None, n_texts:int|None=None) -> Table:
  """Labels and texts of a TSV file.

  columns: which they are in, by the header's names or by number; by default those that a header
  like GLUE's names, or without one label, text, or label, text, text. n_texts: how many texts there
  must be. Raises UserError, with a line's number."""
  split_lines = enumerate(re.split(r"\r\n|\n|\r", read_text(path)), 1)
  rows = [(i, line.split("\t")) for i, line in split_lines if line.strip()]
  if not rows: raise UserError(f"{path} is empty, it has no lines: each is label, tab, text")
  first, names = rows[0]
  where = f"{path} line {first}"
  at, header = find_columns([cells for _, cells in rows], columns, n_texts, where)
  if n_texts and len(at) != 1 + n_texts:
    raise UserError(f"{where} names {len(at)-1} texts, where the file to train on has {n_texts}: "
                    "see --columns")
  rows = rows[header:]
  if not rows: raise UserError(f"{path} has no lines but its header")
  width, a_line = len(names), f"{len(names)} columns"
  if not header and not columns:
    width, a_line = len(at), "label" + ", tab, text"*(len(at) - 1)
  for i, cells in rows:
    fits = len(cells) == width
    if not fits or not all(cells[j].strip() for j in at[1:]):
      has = f"{counted(len(cells), 'column')}{' and an empty text'*fits}"
      raise UserError(f"{path} line {i} has {has}: a line is {a_line}; --columns names others, "
                      "in CoLA's files 2,4")
  labels = [cells[at[0]].strip() for _, cells in rows]
  if not (header or n_texts): check_first_label(labels, [names[j] for j in at], where)
  return Table(labels, [[cells[j] for j in at[1:]] for _, cells in rows], [i for i, _ in rows])

def check_first_label(labels:list[str], names:list[str], where:str) -> None:
  "Raises UserError where a table's first label looks like the name of its column."
  first, *others = labels
  if others and first not in others and len(others) >= 2*len({*others}):
    raise UserError(f"{where}: the label {first[:40]!r} is in no other line. If that is a header, "
                    f"name its columns, --columns {','.join(names)}; else leave the line out")

def find_columns(rows:list[list[str]], columns:str|None, n_texts:int|None, where:str
                 ) -> tuple[list[int], bool]:
  """The columns of the label and of the texts, from 0, and whether the first row is a header. See
  `read_tsv`; where: what an error calls the first row."""
  names = [cell.strip().strip('"') for cell in rows[0]]
  lower = [name.lower() for name in names]
  labels, texts = ([lower.index(n) for n in known if n in lower] for known in (LABELS, TEXTS))
  header = bool(labels and texts)
  if columns:
    at = [column_at(c.strip(), columns, names, where) for c in columns.split(",")]
    if len(at) in (2, 3): return at, header or not re.fullmatch(r"[\d\s,]+", columns)
    raise UserError(f"--columns {columns}: give the column of the label and those of one or two "
                    "texts, as in 2,4")
  if header: return [labels[0], *sorted(texts)[:2]], True
  again = any(cells[0] == rows[0][0] for cells in rows[1:])          # then it is no column's name
  if not again and labels + texts:
    raise UserError(f"{where} looks like a header ({listed(names)}) and does not name both "
                    "a label and a text as GLUE's do: name their columns with --columns")
  width = 1 + n_texts if n_texts else min(3, max(2, len(names)))
  return [*range(width)], False

def column_at(column:str, columns:str, names:list[str], where:str) -> int:
  "One of --columns, by number from 1 or by the header's name, as a number from 0."
  if re.fullmatch("[0-9]{1,9}", column):
    if 1 <= int(column) <= len(names): return int(column) - 1
    raise UserError(f"{where} has {len(names)} columns, and --columns {columns} names others")
  if column in names: return names.index(column)
  raise UserError(f"{where} names no column {column!r}, only {listed(names)}")
