"""Model files: our own checkpoints, the released models, and files of PyTorch and flax.

  tensors, meta = read_weights(find("out"))          any file, in a folder or by a released name
  model = h3_model(tensors, meta, "out")             H3, hybrid, Transformer; `bigs_model` for BiGS
  save_checkpoint(path, tensors, metadata)           safetensors with checksums, whole or not at all
  save_official(path, model)                         H3 as the authors' code reads it

A file is mapped, and a tensor's bytes are read when it is put into a model: loading takes the
memory of the model and of one tensor, whatever else the file holds. (tinygrad's own safetensors
writes through a map, so that a full disk kills the process; the package's holds two models.)
Nothing in a file is ever run: a pickle is read by `unpickled`, which imports and calls nothing.

Not here: files in several parts (pytorch_model-00001-of-…), compressed or encrypted ones.
"""
from __future__ import annotations
import contextlib, dataclasses, functools, hashlib, io, json, logging, math, mmap, os, pickletools
import re, sys, zipfile, zlib
from pathlib import Path
from typing import BinaryIO, Callable, Iterable, Iterator, NamedTuple
import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.device import Buffer
from tinygrad.dtype import DType
from tinygrad.helpers import cache_dir
from tinygrad.nn.state import get_state_dict
from bigs_tiny import BiGS, BiGSConfig
from flashconv import WEIGHTS
from h3tiny import H3Config, H3LM
from support.cpu import answer_with_kernels
from support.text import UserError

class CheckpointError(UserError):
  "A checkpoint that can't be used. The message is one line and names the file."
  def __init__(self, message:str):         # it may quote a damaged file, whose names hold anything
    super().__init__(re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", message))

def require(ok:object, source:str|Path, problem:str) -> None:
  if not ok: raise CheckpointError(f"{source}: {problem}.")

# what data raise in code that expects others
ODD = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

@contextlib.contextmanager
def refusing(source:str|Path, problem:str, kinds:tuple[type, ...]=ODD) -> Iterator[None]:
  "Raises CheckpointError in place of errors of these kinds."
  try: yield
  except kinds as e:
    raise CheckpointError(f"{source}: {problem} ({type(e).__name__}: {e}).") from None

@dataclasses.dataclass
class Stored:
  "A tensor in a mapped file: its bytes are read when `numpy` is called."
  array: np.ndarray
  bfloat16: bool = False           # array: the upper halves of float32s
  file: mmap.mmap|None = None
  check: Callable[[], None] = lambda: None      # raises CheckpointError if the bytes have changed
  @property
  def shape(self) -> tuple[int, ...]: return self.array.shape
  def numpy(self) -> np.ndarray:
    self.check()
    return (self.array.astype(np.uint32) << 16).view(np.float32) if self.bfloat16 else self.array
  def free_pages(self) -> None:
    "Frees the pages read so far, which count as the process's memory until then."
    if self.file is not None and hasattr(mmap, "MADV_DONTNEED"):
      self.file.madvise(mmap.MADV_DONTNEED)

Weights = dict[str, Stored]

def rows(table:str) -> list[list[str]]:
  "The words of each line of a table in the source."
  return [line.split() for line in table.strip().splitlines()]

def map_file(path:str) -> mmap.mmap:
  with open(path, "rb") as f: return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

def checksum(file:mmap.mmap, begin:int, end:int, crc32:int, problem:str) -> Callable[[], None]:
  "A function that raises CheckpointError if these bytes have another checksum; it reads them once."
  @functools.cache
  def check() -> None:
    if zlib.crc32(memoryview(file)[begin:end]) != crc32: raise CheckpointError(problem)
  return check

# ---- where a model is: a file, a folder, the hub ------------------------------------------------

CHECKPOINT = "checkpoint.safetensors"      # what train.py writes into its folder
# the authors' names; of these the first that is in a folder is its model
PREFERRED = (CHECKPOINT, "model.safetensors", "pytorch_model.bin", "flax_model.msgpack", "model.pt")
TORCH = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", ".msgpack", *TORCH)

class Release(NamedTuple):
  """A released model: its repository and the file with its weights; bytes and sha256 of that as the
  repository's page has them, None where it was not at hand."""
  repo: str
  file: str
  size: int|None = None
  sha256: str|None = None

RELEASED = {
  "125M": Release("danfu09/H3-125M", "model.pt"),
  "355M": Release("danfu09/H3-355M", "model.pt", 4_333_323_919,
                  "e273ef09b6cb1984b5fc5f3e07a7acdeeab31641e277c60bf40e3ac86f247ea8"),
  "1.3B": Release("danfu09/H3-1.3B", "model.pt", 5_304_652_149,
                  "b74376b715de181c66795fb207c5b034b04ed3d58f4ac5d27954986230a9cf30"),
  "2.7B": Release("danfu09/H3-2.7B", "model-3attn.pt", 10_681_570_355,
                  "b45398f2ed84e77a5319f67124aa52024148898484558bb6ba2f815a0ac2c68e"),
  "2.7B-rotary": Release("danfu09/H3-2.7B", "model-2attn-rotary.pt", 10_684_883_901,
                         "1d5b655d0d7570bf4fd6313d362625096ad28b249c6a014d22fb317172b09c46"),
  **{name: Release(f"JunxiongWang/{name}", "pytorch_model.bin")
     for name in ("BiGS_128", "BiGS_512", "BiGS_1024", "BiGS_4096")}}

def read_weights(path:Path|str) -> tuple[Weights, dict[str, str]]:
  "The tensors of a file of any of the formats; the metadata of a checkpoint of ours, else none."
  suffix = Path(path).suffix
  if suffix in TORCH: return read_torch(str(path)), {}
  if suffix == ".msgpack": return read_flax(str(path)), {}
  tensors, meta = read_checkpoint(str(path))
  return tensors, meta if {"config", "model"} & meta.keys() else {}

def find(path_or_name:str) -> Path:
  """The file of a model: itself, the one in a folder, or a released one by its name, which is
  downloaded once.

  A folder of huggingface_hub's cache (models--danfu09--H3-355M, or one inside) is as good as any.
  Of several files one that is called as train.py or the authors call theirs comes first, else the
  newest .safetensors, and a line on stderr says which. Raises CheckpointError if there is none, or
  no telling which."""
  path = Path(path_or_name)
  if path_or_name in RELEASED and not path.exists(): return download(path_or_name)
  hint = "run train.py first, or name another"
  if not path.exists():
    raise CheckpointError(f"no model at {path}: {hint} (released are {', '.join(RELEASED)}).")
  if not path.is_dir(): return path
  folder = snapshot(path)
  if (folder/CHECKPOINT).is_file(): return folder/CHECKPOINT
  found = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES and f.is_file())
  if not found: raise CheckpointError(f"no model in the folder {path}: {hint}.")
  known = [folder/name for name in PREFERRED if folder/name in found]
  if known == found: return found[0]
  ours = [f for f in found if f.suffix == ".safetensors"]
  names = ", ".join(f.name for f in found)
  require(len(found) == 1 or known or ours, folder,
          f"it holds {len(found)} models: name one of {names}")
  taken = known[0] if known else max(ours or found, key=modified)
  which = "" if len(found) == 1 else f" of {names}" if known else f", the newest of {names}"
  print(f"no {CHECKPOINT} in {folder}: taking {taken.name}{which}", file=sys.stderr)
  return taken

def modified(path:Path) -> float: return path.stat().st_mtime

def snapshot(path:Path) -> Path:
  "The folder with the files of a model in huggingface_hub's cache; any other folder as it is."
  folder = path/"snapshots" if (path/"snapshots").is_dir() else path
  if folder.name != "snapshots": return folder
  main = folder.parent/"refs"/"main"
  name = main.read_text(errors="replace").strip() if main.is_file() else ""
  if name and (folder/name).is_dir(): return folder/name
  return max((f for f in folder.iterdir() if f.is_dir()), key=modified, default=folder)

def download(name:str) -> Path:
  """The file of a released model in the cache of huggingface_hub, downloaded if it is not there.

  Mirrors (HF_ENDPOINT), offline mode (HF_HUB_OFFLINE) and the cache's place (HF_HOME) are those of
  huggingface_hub. Raises CheckpointError, one line that says how to get the file by hand, if it
  can't be had or is another."""
  release, bigs = RELEASED[name], name.startswith("BiGS")
  endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
  files = f"{endpoint}/{release.repo}/resolve/main/{release.file}"
  if bigs: files += ", its config.json and vocab.txt"
  by_hand = f"or put {files} into a folder by hand, and name that in place of {name}"
  try:
    import huggingface_hub
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
  except ImportError:
    raise CheckpointError(f"to download {name} takes a package: pip install huggingface_hub; "
                          f"{by_hand}.") from None
  def get(file:str) -> str:
    "Its place in the cache: what was released does not change, the hub need not be asked."
    kept = try_to_load_from_cache(release.repo, file)
    if isinstance(kept, str): return kept
    print(f"looking for {release.repo}/{file} at {endpoint}", file=sys.stderr, flush=True)
    return hf_hub_download(release.repo, file)
  log = logging.getLogger("huggingface_hub")
  level = log.level
  log.setLevel(logging.ERROR)              # not a line for each of its attempts
  try:
    path = Path(get(release.file))
    if bigs:
      get("config.json")
      # only text needs the vocabulary
      with contextlib.suppress(OSError, huggingface_hub.errors.EntryNotFoundError):
        get("vocab.txt")
  except Exception as e:           # the hub's own and its network layer's differ between releases
    why = str(e).strip().partition("\n")[0].rstrip(".:")
    raise CheckpointError(f"can't download {name} ({type(e).__name__}: {why}): try again, "
                          f"{by_hand}.") from None
  finally: log.setLevel(level)
  verify(path, name, release)
  return path

def verify(path:Path, name:str, release:Release) -> None:
  """Raises CheckpointError if a file is not the released one. Its sha256 is taken once for as long
  as the file stays as it is: a note of that lies in tinygrad's cache."""
  real = path.resolve()
  stat = real.stat()
  note = Path(cache_dir) / "verified" / (release.sha256 or "")
  now = f"{real} {stat.st_size} {stat.st_mtime_ns}"
  problem = ""
  if release.size not in (None, stat.st_size):
    problem = f"{stat.st_size:,} bytes where {release.size:,} are expected"
  elif release.sha256:
    if note.is_file() and note.read_text() == now: return
    with open(real, "rb") as f: found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != release.sha256:
      problem = f"sha256 {found} where {release.sha256} is expected"
  require(not problem, path, f"it has {problem}, so it is not the file that was released as "
          f"{name}: remove {real}, and it is downloaded again, or name the file itself to use it as "
          "it is")
  if not release.sha256: return
  with contextlib.suppress(OSError):                       # without a note it is taken again
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(now)

# ---- safetensors: our own checkpoints, and others' ----------------------------------------------

# types of numbers, in safetensors and in NumPy; a BF16 is the upper half of an F32
DTYPES = dict(rows("""
  F64   f8
  F32   f4
  F16   f2
  BF16  u2
  I64   i8
  I32   i4
  I16   i2
  I8    i1
  U64   u8
  U32   u4
  U16   u2
  U8    u1
  BOOL  ?"""))
DTYPE_NAMES = {np.dtype(v): k for k, v in DTYPES.items() if k != "BF16"}

# the metadata of a checkpoint of ours; in a file of others it may be anything
OURS = set("model config args step tokenizer losses held_out baseline labels data scale crc32"
           .split())

def save_checkpoint(path:str, tensors:dict[str, Tensor|Stored], metadata:dict[str, str],
                    before:Callable[[], None]=lambda: None) -> None:
  """Writes a safetensors file, whole or not at all: beside `path` first, then renamed over it;
  `before` is called in between. Tensor by tensor: memory holds one more than the model.

  The metadata of a checkpoint of ours hold checksums, "crc32": of the header, with zeros in its own
  place, and of each tensor in turn, 8 hexadecimal digits each. Raises OSError if it can't be
  written; what was there is then untouched."""
  layout, end = {}, 0
  for name, t in tensors.items():
    dtype = t.array.dtype if isinstance(t, Stored) else np.dtype(t.dtype.fmt)
    begin, end = end, end + math.prod(t.shape)*dtype.itemsize
    layout[name] = dict(dtype=DTYPE_NAMES[dtype], shape=list(t.shape), data_offsets=[begin, end])
  sums = ["0"*8] * (1 + len(tensors))
  checked = "config" in metadata
  def header() -> bytes:
    meta = {"crc32": "".join(sums)} | metadata if checked else metadata
    text = json.dumps({"__metadata__": meta} | layout, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
  with replacing(path, before) as f:
    f.write(header())
    for i, t in enumerate(tensors.values(), 1):
      data = np.ascontiguousarray(t.numpy()).data.cast("B") if 0 not in t.shape else b""
      f.write(data)
      sums[i] = f"{zlib.crc32(data):08x}"
    sums[0] = f"{zlib.crc32(header()[8:]):08x}"
    f.seek(0)
    f.write(header())

@contextlib.contextmanager
def replacing(path:str, before:Callable[[], None]) -> Iterator[BinaryIO]:
  "A file that takes the place of the one at `path` once it is whole and has reached the disk."
  tmp = f"{path}.{os.getpid()}.tmp"
  try:
    with open(tmp, "wb") as f:
      yield f
      f.flush()
      os.fsync(f.fileno())
    before()
    os.replace(tmp, path)
    if os.name == "posix":                                 # the new name too has to reach the disk
      folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
      try: os.fsync(folder)
      finally: os.close(folder)
  finally:
    if os.path.exists(tmp): os.remove(tmp)

def read_checkpoint(path:str) -> tuple[Weights, dict[str, str]]:
  """All tensors of a safetensors file, and its metadata.

  The whole layout is checked before anything is loaded, and the checksums of a checkpoint of ours:
  the header's, then each tensor's when it is read. Raises CheckpointError if something is off."""
  def need(ok:object, problem:str) -> None: require(ok, path, problem)
  need(os.path.isfile(path), "no such file")
  size = os.path.getsize(path)
  need(size >= 8, "not a safetensors file")
  file = map_file(path)
  n = int.from_bytes(file[:8], "little")
  begin = 8 + n                                            # of the tensors
  need(n >= 2 and (begin <= size or n < 1 << 27), "not a safetensors file")
  need(begin <= size, f"truncated inside its header ({size} bytes)")
  raw = file[8:begin]
  with refusing(path, "not a safetensors file: its header is not JSON"):
    header = dict(json.loads(raw))
  with refusing(path, "its metadata are malformed"):
    meta = dict(header.pop("__metadata__", {}))
    need(all(type(v) is str for v in meta.values()), "its metadata are malformed")
  sums = meta.pop("crc32", None)
  if sums is not None:
    need(len(sums) == 8 + 8*len(header) and sums.isascii() and raw.count(sums.encode()) == 1
         and f"{zlib.crc32(raw.replace(sums[:8].encode(), b'0'*8, 1)):08x}" == sums[:8],
         "its header is damaged")
  elif "config" in meta: need(meta.keys() <= OURS, "its metadata are damaged")
  with refusing(path, "its header is malformed"):
    entries = sorted((*v["data_offsets"], k, v["dtype"], v["shape"]) for k, v in header.items())
  tensors, end = {}, 0
  for i, (lo, hi, name, kind, shape) in enumerate(entries, 1):
    damaged = f"its header is damaged at tensor {name}"
    with refusing(path, damaged):
      need(kind in DTYPES, f"tensor {name} has dtype {kind}, which is not supported")
      dtype, count = np.dtype(DTYPES[kind]), math.prod(shape)
      need(lo == end and hi - lo == count*dtype.itemsize, damaged)
      need(all(type(n) is int and n >= 0 for n in (lo, hi, *shape)), damaged)
      end = hi
      promised = begin + end
      need(size >= promised, f"truncated: {size} bytes where its header promises {promised}")
      tensors[name] = Stored(np.frombuffer(file, dtype, count, begin + lo).reshape(shape),
                             kind == "BF16", file)
      if sums:
        tensors[name].check = checksum(file, begin + lo, promised, int(sums[8*i:8*i+8], 16),
                                       f"{path}: tensor {name} is damaged.")
  need(size == begin + end, f"{size - begin - end} bytes too long for its header")
  return tensors, meta

# ---- pickles, read without running them ---------------------------------------------------------

class Name(str):
  "A class or function that a pickle names, 'module name'. It is never looked up."

class Storage(NamedTuple):
  "The storage of a tensor as a pickle refers to it."
  kind: str                # of its numbers: "Float", "Half", …
  key: str
  length: int              # in numbers
  start: int = 0           # of a view: its first number

class Layout(NamedTuple):
  "A tensor as a pickle describes it."
  storage: Storage
  offset: int
  shape: tuple[int, ...]
  stride: tuple[int, ...]

IGNORED = object()         # anything that is no part of a tensor; swallows what is done to it
DICTIONARIES = {"collections OrderedDict", "collections defaultdict", "builtins dict",
                "__builtin__ dict"}
# instructions that differ in size alone: BINPUT and LONG_BINPUT are PUT, TUPLE1 and EMPTY_TUPLE are
# TUPLE, APPENDS is APPEND
KINDS = {op.name: re.fullmatch("(?:LONG_)?(?:BIN|EMPTY_)?(.*?)[1-4S]?", op.name)[1]
         for op in pickletools.opcodes}
PARAMETERS = {"torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state"}

def make_dictionary(pairs:Iterable) -> dict[str, object]:
  "Those whose key is a string: hashing another could recur as deep as that is nested."
  return {k: v for k, v in pairs if type(k) is str}

def call(function:object, args:object) -> object:
  "The dictionary or the tensor's layout that a call would make, else IGNORED. Nothing is called."
  # a tensor with attributes: function, type, arguments, attributes (torch/_tensor.py)
  while function == "torch._tensor _rebuild_from_type_v2" and type(args) is tuple and len(args) > 2:
    function, _, args, *_ = args
  if type(function) is not Name or type(args) is not tuple: return IGNORED
  if function in DICTIONARIES:
    pairs = args[0] if args and type(args[0]) is list else []
    made = make_dictionary(p for p in pairs if type(p) in (list, tuple) and len(p) == 2)
    pairs.clear()          # else a small file could make gigabytes: many dictionaries of one list
    return made
  if function == "torch._utils _rebuild_tensor_v2" and len(args) >= 4 and type(args[0]) is Storage:
    return Layout(*args[:4])
  if function in PARAMETERS and args and type(args[0]) is Layout: return args[0]
  return IGNORED

def storage_of(pid:object) -> object:
  """The Storage that a persistent id means, else IGNORED: ('storage', type, key, device, length),
  and for a view of one (key, start, length)."""
  if type(pid) is not tuple or len(pid) < 5: return IGNORED
  tag, kind, key, _, length, *views = pid
  named = type(kind) is Name and re.fullmatch(r"torch (\w+)Storage", kind)
  if not named or (type(tag), type(key), type(length)) != (str, str, int): return IGNORED
  view = views[0] if views else None
  start = view[1] if type(view) is tuple and len(view) == 3 and type(view[1]) is int else 0
  return Storage(named[1], key, length, start) if tag == "storage" else IGNORED

def unpickled(file:io.BytesIO|mmap.mmap, storages:dict[str, Storage]|None=None) -> object:
  """The value of the pickle that `file` is at: strings, numbers, lists, dictionaries, and the
  Layout of tensors. `file` is left where the pickle ends.

  Everything else is IGNORED, whatever it names: pickletools decodes the instructions and says what
  each takes from the stack, and none of them imports or calls anything here. There is no recursion
  either, however deep a value is nested. storages: takes each that is referred to, by its key.
  Raises ValueError, IndexError or KeyError for what is no pickle."""
  stack, marks, memo = [], [], {}
  def by_two(items:list) -> Iterable: return zip(items[::2], items[1::2])
  def take(n:int) -> list:
    if n > len(stack): raise ValueError("more is taken from the stack than there is")
    taken = stack[len(stack)-n:]
    del stack[len(stack)-n:]
    return taken
  for op, arg, _ in pickletools.genops(file):
    if op.name == "MARK":
      marks.append(len(stack))
      continue
    if op.name == "POP" and marks and marks[-1] == len(stack):
      marks.pop()
      continue
    if pickletools.markobject in op.stack_before:          # all above the mark, and some below
      above = take(len(stack) - marks.pop())
      args = take(op.stack_before.index(pickletools.markobject)) + above
    else: args = take(len(op.stack_before))
    value = IGNORED
    match KINDS[op.name]:
      case "STOP": return args[0]
      case "PUT": memo[arg] = stack[-1]
      case "MEMOIZE": value = memo[len(memo)] = args[0]
      case "GET": value = memo[arg]
      case "DUP":
        stack.append(args[0])
        value = args[0]
      case "BUILD" | "READONLY_BUFFER": value = args[0]    # not the attributes
      case "APPEND" | "SETITEM" | "ADDITEM":
        value, *items = args
        if type(value) is list: value.extend(items)
        if type(value) is dict: value.update(make_dictionary(by_two(items)))
      case "TUPLE": value = tuple(args)
      case "LIST": value = args
      case "DICT": value = make_dictionary(by_two(args))
      case "GLOBAL": value = Name(arg)
      case "STACK_GLOBAL" if type(args[0]) is type(args[1]) is str: value = Name(" ".join(args))
      case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX": value = call(args[0], args[1])
      case "PERSID" if args:
        value = storage_of(args[0])
        if storages is not None and type(value) is Storage: storages[value.key] = value
      case "NONE": value = None
      case "NEWTRUE" | "NEWFALSE": value = op.name == "NEWTRUE"
      case "PERSID" | "INST" | "EXT": pass
      case _ if type(arg) in (str, int, bool): value = arg
    if op.stack_after: stack.append(value)
  raise ValueError("a pickle without an end")

# ---- PyTorch's files ----------------------------------------------------------------------------

# kinds of torch's storages, and NumPy's types
NUMBERS = dict(rows("""
  Double    f8
  Float     f4
  Half      f2
  BFloat16  u2
  Long      i8
  Int       i4
  Short     i2
  Char      i1
  Byte      u1
  Bool      ?"""))
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."      # a file's first bytes before PyTorch 1.6
LARGEST_PICKLE = 1 << 28           # bytes; one of 5,000 tensors has less than 1 MB
BIG_ENDIAN = "written on a big-endian machine: save it again on one like this"

Reader = Callable[[Storage], Stored]       # finds a storage in the file

def read_torch(path:str) -> Weights:
  """All tensors of a file of torch.save's, flat or under "state_dict", as PyTorch Lightning has
  them.

  Both forms are read: the zip file, and what PyTorch wrote before 1.6. Names in its pickle are
  never imported (see `unpickled`), and of tensors elsewhere in it, an optimizer's moments say, no
  byte is read.
  Raises CheckpointError if it is damaged, or no such file."""
  require(os.path.isfile(path), path, "no such file")
  zipped = zipfile.is_zipfile(path)
  with open(path, "rb") as f: old = f.read(len(MAGIC)) == MAGIC
  require(zipped or old, path, "not a file of torch.save's, or a truncated one")
  # zipfile and pickletools raise anything
  with refusing(path, "damaged, or not of torch.save's", (Exception,)):
    tree, read = (read_zip if zipped else read_before_zip)(path)
  if type(tree) is dict and type(tree.get("state_dict")) is dict: tree = tree["state_dict"]
  layouts = {k: v for k, v in tree.items() if type(v) is Layout} if type(tree) is dict else {}
  require(len(layouts) > 0, path, "no tensors in it")
  return {k: view(v, read, path, f"tensor {k}") for k, v in layouts.items()}

def view(tensor:Layout, read:Reader, path:str, name:str) -> Stored:
  "A tensor of a storage. Raises CheckpointError if it does not fit into that."
  kind = tensor.storage.kind
  require(kind in NUMBERS, path, f"{name} has numbers of type {kind}, which is not supported")
  with refusing(path, f"{name} is damaged"):
    whole = read(tensor.storage)
    offset, shape = tensor.storage.start + tensor.offset, tensor.shape
    stride = [s if n > 1 else 0 for n, s in zip(shape, tensor.stride, strict=True)]
    whole_numbers = all(type(n) is int and n >= 0 for n in (offset, *shape, *stride))
    last = offset + sum((n-1)*s for n, s in zip(shape, stride))        # Python's do not overflow
    there = 0 in shape or last < len(whole.array)
    require(whole_numbers and there and math.prod(shape) <= len(whole.array), path,
            f"{name} is damaged")
    strides = [s*whole.array.itemsize for s in stride]
    array = np.lib.stride_tricks.as_strided(whole.array[offset:], shape, strides, writeable=False)
  return dataclasses.replace(whole, array=array)

def read_zip(path:str) -> tuple[object, Reader]:
  """The value of the pickle in a zip file. Each storage is a file in it, not compressed, with a
  checksum."""
  with zipfile.ZipFile(path) as file:
    pickled = next(i for i in file.infolist() if i.filename.endswith("/data.pkl"))
    root = pickled.filename.removesuffix("/data.pkl")
    if pickled.compress_type or pickled.file_size > LARGEST_PICKLE: raise ValueError
    if f"{root}/byteorder" in file.namelist():
      with file.open(f"{root}/byteorder") as f: require(f.read(6) == b"little", path, BIG_ENDIAN)
    tree = unpickled(io.BytesIO(file.read(pickled)))
  whole = map_file(path)
  @functools.cache
  def read(s:Storage) -> Stored:
    entry, dtype = file.getinfo(f"{root}/data/{s.key}"), np.dtype(NUMBERS[s.kind])
    if entry.compress_type or entry.file_size != s.length*dtype.itemsize: raise ValueError
    # before the bytes: 30 of a header, which ends in two lengths, a name and a field of no use
    header = whole[entry.header_offset:entry.header_offset+30]
    begin = entry.header_offset + 30 + sum(np.frombuffer(header, "<u2", 2, 26).tolist())
    check = checksum(whole, begin, begin + entry.file_size, entry.CRC,
                     f"{path}: damaged in its part {entry.filename}.")
    return Stored(np.frombuffer(whole, dtype, s.length, begin), s.kind == "BFloat16", whole, check)
  return tree, read

def read_before_zip(path:str) -> tuple[object, Reader]:
  """The same of a file before PyTorch 1.6: pickles of a magic number, a version, the machine, the
  value, and the keys of its storages; then for each storage 8 bytes, its length, and its numbers
  (torch/serialization.py, _legacy_load)."""
  whole, storages, places = map_file(path), {}, {}
  _, _, machine = (unpickled(whole) for _ in range(3))
  require(machine.get("little_endian", True), path, BIG_ENDIAN)
  tree, keys = unpickled(whole, storages), unpickled(whole)
  at = whole.tell()
  for key in keys:
    length = int.from_bytes(whole[at:at+8], "little")
    places[key] = at + 8, length
    at += 8 + length*np.dtype(NUMBERS[storages[key].kind]).itemsize
  require(at <= len(whole), path, f"truncated: {len(whole)} bytes where {at} are promised")
  def read(s:Storage) -> Stored:
    begin, length = places[s.key]
    return Stored(np.frombuffer(whole, NUMBERS[s.kind], length, begin), s.kind == "BFloat16", whole)
  return tree, read

# ---- flax's files -------------------------------------------------------------------------------

# flax's names to PyTorch's; an SSM's tensors but D are its kernel's
FLAX_NAMES = ((r"\.(kernel|embedding|scale)$", ".weight"), (r"^s4_bert\.", "bigs."),
              (r"\.([fb]s4)\.(?!D$)", r".\1.kernel."))

def read_flax(path:str) -> Weights:
  """The tensors of a flax .msgpack under PyTorch's names and in its layout, read by the package
  `msgpack`. Raises CheckpointError if it is anything else, or the package is missing."""
  try: import msgpack
  except ImportError:
    raise CheckpointError(f"{path}: a flax file needs a package: pip install msgpack.") from None
  def array(code:int, data:bytes) -> Stored:
    "An array, which flax keeps as extension 1: shape, dtype and bytes, in msgpack again."
    shape, dtype, raw = msgpack.unpackb(data)
    kinds = ("float32", "float16", "float64", "bfloat16", "int32", "int64")
    if code != 1 or dtype not in kinds: raise ValueError
    small = dtype == "bfloat16"
    return Stored(np.frombuffer(raw, np.uint16 if small else dtype).reshape(shape), small)
  def leaves(node:dict, at:str) -> Iterator[tuple[str, object]]:
    for k, v in node.items():
      if isinstance(v, dict): yield from leaves(v, f"{at}{k}.")
      else: yield f"{at}{k}", v
  found = {}
  with refusing(path, "not a flax msgpack file, or a damaged one", (*ODD, msgpack.UnpackException)):
    tree = msgpack.unpackb(Path(path).read_bytes(), ext_hook=array, strict_map_key=False)
    for name, tensor in leaves(tree.get("params", tree), ""):
      require(isinstance(tensor, Stored), path, f"{name.replace('.', '/')} is not a tensor")
      if name.endswith(".kernel"): tensor.array = tensor.array.T
      for flax, torch in FLAX_NAMES: name = re.sub(flax, torch, name)
      found[name] = tensor
  return found

# ---- configurations of official weights ---------------------------------------------------------

# fields of H3Config, and the authors' names for them in a config.json
H3_FIELDS = """
  d_model        d_model
  n_layer        n_layer
  vocab_size     vocab_size
  norm_eps       layer_norm_epsilon
  embed_dropout  embed_dropout
  resid_dropout  resid_dropout"""
# the same of BiGSConfig, and the tensor that has so many rows
BIGS_FIELDS = """
  vocab_size  vocab_size               bigs.embeddings.word_embeddings.weight
  d_model     hidden_size              bigs.embeddings.LayerNorm.weight
  d_inner     intermediate_size        bigs.encoder.layer.0.dv.weight
  d_state     num_ssm                  bigs.encoder.layer.0.fs4.kernel.A_re
  max_length  max_position_embeddings  bigs.embeddings.position_embeddings.weight
  n_types     type_vocab_size          bigs.embeddings.token_type_embeddings.weight
  n_layer     num_hidden_layers
  pooler      pooler_type
  pad_token   pad_token_id
  norm_eps    layer_norm_eps"""

def config_beside(source:str) -> tuple[Path, dict[str, object]]:
  "The config.json in the folder of official weights, and what it says: nothing if there is none."
  file = Path(source).with_name("config.json")
  with refusing(file, "it is not JSON of a configuration", (*ODD, OSError)):
    return file, dict(json.loads(file.read_text("utf-8"))) if file.is_file() else {}

def with_stated(measured:dict[str, object], fields:str, source:str) -> dict[str, object]:
  """Infers a configuration from the tensors, and from config.json beside them. Raises
  CheckpointError where they contradict each other."""
  file, given = config_beside(source)
  stated = {}
  for ours, theirs, *_ in rows(fields):
    if theirs not in given: continue
    stated[ours] = given[theirs]
    there = measured.get(ours, given[theirs])
    require(given[theirs] == there, file, f"it says {theirs} {given[theirs]}, the tensors of "
            f"{source} say {there}")
  return stated | measured

def config_in(meta:dict[str, str], kind:type, source:str) -> H3Config|BiGSConfig:
  "The configuration in the metadata of a checkpoint of ours."
  with refusing(source, "its config is unusable"): return kind(**json.loads(meta["config"]))

# ---- official weights of H3 ---------------------------------------------------------------------

# The tensors of the authors' SSMLMHeadModel and their shapes. As in h3tiny.py D is the width, H the
# number of diagonal SSMs, N and M = N/2 their state; V rows of the embedding, F the width of the
# MLP, P learned positions, R pairs of rotated dimensions. What has no elements is not there.
# Written out here, not asked of `H3LM`: that may have been changed.
H3_MODEL = """
  embeddings.word_embeddings.weight      V D
  embeddings.position_embeddings.weight  P D
  ln_f.weight                            D
  ln_f.bias                              D"""
H3_LAYER = """
  norm1.weight    D
  norm1.bias      D
  norm2.weight    D
  norm2.bias      D
  mlp.fc1.weight  F D
  mlp.fc1.bias    F
  mlp.fc2.weight  D F
  mlp.fc2.bias    D"""
H3_ATTENTION = """
  mixer.Wqkv.weight          3D D
  mixer.Wqkv.bias            3D
  mixer.out_proj.weight      D D
  mixer.out_proj.bias        D
  mixer.rotary_emb.inv_freq  R"""
H3_SSM = """
  mixer.q_proj.weight            D D
  mixer.q_proj.bias              D
  mixer.k_proj.weight            D D
  mixer.k_proj.bias              D
  mixer.v_proj.weight            D D
  mixer.v_proj.bias              D
  mixer.ssm_k_kernel.kernel.B    D N
  mixer.ssm_k_kernel.kernel.C    1 D N
  mixer.ssm_k_D                  D
  mixer.kernel.kernel.log_dt     H
  mixer.kernel.kernel.inv_A_real H M
  mixer.kernel.kernel.A_imag     H M
  mixer.kernel.kernel.B          H M 2
  mixer.kernel.kernel.C          1 H M 2
  mixer.D                        H
  mixer.output_linear.weight     D D
  mixer.output_linear.bias       D"""

def official_tensors(n_layer:int, attn_layers:Iterable[int]) -> Iterator[tuple[str, list[str]]]:
  "Names of the tensors of the authors' model, and the letters of their shapes."
  tables = {"backbone.": H3_MODEL}
  for i in range(n_layer):
    tables[f"backbone.layers.{i}."] = H3_LAYER + (H3_ATTENTION if i in attn_layers else H3_SSM)
  for prefix, table in tables.items():
    for name, *letters in rows(table): yield prefix + name, letters

def official_shapes(c:H3Config) -> dict[str, tuple[int, ...]]:
  "The tensors of the authors' model with the arguments that `save_official` writes."
  D, N = c.d_model, c.d_state
  sizes = {"1": 1, "2": 2, "D": D, "3D": 3*D, "F": c.mlp_mult*D, "H": D // c.head_dim, "N": N,
           "M": N // 2, "V": c.padded_vocab, "P": c.max_positions, "R": c.rotary_dim // 2}
  shapes = {name: tuple(sizes[letter] for letter in letters)
            for name, letters in official_tensors(c.n_layer, c.attn_layers)}
  return {name: shape for name, shape in shapes.items() if 0 not in shape}

def layer_count(tensors:Weights) -> int:
  "One more than the largest number of a layer."
  found = (re.match(r"backbone\.layers\.(\d{1,9})\.", k) for k in tensors)
  return 1 + max((int(m[1]) for m in found if m), default=-1)

def official_names(tensors:Weights) -> Weights:
  """The tensors under the names of today: Lightning's prefix is taken off (what has none is not the
  model's), and old names are replaced. Those count a LayerNorm with the sublayer before it, so all
  are shifted by one: src/models/ssm_seq.py:193-224."""
  if any(k.startswith(("model.backbone.", "model.s4seq.")) for k in tensors):
    tensors = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
  for old, new in ((r"^s4seq\.encoder\.", "backbone."), (r"^backbone\.norm\.", "backbone.ln_0."),
                   (r"^embedding\.", "backbone.embeddings.word_embeddings.")):
    tensors = {re.sub(old, new, k): v for k, v in tensors.items()}
  if "backbone.ln_0.weight" not in tensors: return tensors
  n = min(layer_count(tensors), len(tensors))
  norms = [f"backbone.layers.{i}.norm{j}" for i in range(n) for j in (1, 2)]
  today = dict(zip(["backbone.ln_0", *norms], [*norms, "backbone.ln_f"]))
  split = {k: k.rpartition(".") for k in tensors}
  return {f"{today.get(at, at)}.{part}": tensors[k] for k, (at, _, part) in split.items()}

HEADS = {768: 12, 1024: 16, 2048: 16, 2560: 20}  # of the released models, by width

def h3_config(tensors:Weights, source:str, n_heads:int|None=None) -> H3Config:
  """The shape of official weights. The number of attention heads and a norm's eps only a
  config.json beside the file can say, with the arguments of the authors' SSMLMHeadModel; it must
  not contradict the tensors. Raises CheckpointError."""
  n, sizes = layer_count(tensors), {}
  require(n <= len(tensors), source, f"its layers are not all there: the last has number {n-1}")
  attn = tuple(i for i in range(n) for part in ("Wqkv", "out_proj")
               if f"backbone.layers.{i}.mixer.{part}.weight" in tensors)
  for name, letters in official_tensors(n, attn):
    if name in tensors:
      for letter, size in zip(letters, tensors[name].shape): sizes.setdefault(letter, size)
    else: require(letters[0] in "PR", source, f"tensor {name} is missing")
  file, given = config_beside(source)
  attention = given.get("attn_cfg") or {}
  require(type(attention) is dict, file, "its attn_cfg is no object")
  with refusing(source, "its config is unusable"):
    D, words = sizes["D"], sizes["V"]
    measured = dict(d_model=D, n_layer=n, attn_layers=attn, mlp_mult=sizes["F"] // D,
                    max_positions=sizes.get("P", 0), rotary_dim=2*sizes.get("R", 0),
                    pad_vocab_multiple=math.gcd(8, words))
    if "H" in sizes: measured |= dict(d_state=sizes["N"], head_dim=D // sizes["H"])
    heads = n_heads or attention.get("num_heads") or HEADS.get(D) or (None if attn else 1)
    require(heads, source, f"of width {D}, the number of attention heads can't be told: give "
            'n_heads, or a config.json beside it with {"attn_cfg": {"num_heads": …}}')
    named = dict(vocab_size=50257 if words == 50264 else words, n_heads=heads)
    config = H3Config(**named | with_stated(measured, H3_FIELDS, source))
  require(config.padded_vocab == words, file, f"it says vocab_size {config.vocab_size}, the "
          f"embedding of {source} has {words} rows")
  return config

def tiled(tensors:Weights, config:H3Config) -> Weights:
  """Where channels share S < H rows of A and B (n_ssm), each gets its own: h has row h mod S
  (ss_kernel_diag.py:134,146)."""
  H, out = config.d_model // config.head_dim, dict(tensors)
  for k, v in tensors.items():
    if not re.search(r"\.mixer\.kernel\.kernel\.(B|inv_A_real|A_imag)$", k) or not v.shape: continue
    if 0 < v.shape[0] < H and H % v.shape[0] == 0:
      out[k] = Stored(np.concatenate([v.numpy()] * (H // v.shape[0])))
  return out

def save_official(path:str, model:H3LM) -> None:
  """Writes a model of H3 and attention as the authors' code reads it: a .safetensors file, the tied
  lm_head.weight in it, and beside it a config.json with the arguments of their SSMLMHeadModel. The
  channels of a head are put in the order of their slow path.

  Raises CheckpointError if these arguments would not be true of the tensors, those of a changed
  layer say, or if another config.json is there; OSError."""
  c, weights = model.config, {k: v.numpy() for k, v in get_state_dict(model).items()}
  require(c.ssm == "h3", path, f"the authors' code has no model of {c.ssm}")
  wanted = official_shapes(c)
  for name in wanted:
    if name.endswith(".rotary_emb.inv_freq"):
      inv_freq = 10000.0 ** (-np.arange(0, c.rotary_dim, 2) / c.rotary_dim)
      weights[name] = inv_freq.astype(np.float32)
  ours = {name: w.shape for name, w in weights.items()}
  for name, _ in sorted(ours.items() ^ wanted.items()):
    raise CheckpointError(f"{path}: not written: the tensor {name} has shape "
                          f"{ours.get(name, 'none')} here and {wanted.get(name, 'none')} in the "
                          "authors' code, which can't run a changed model.")
  for name, w in weights.items():
    if name.endswith(".output_linear.weight") and c.head_order == "hd2":
      by_head = w.reshape(c.d_model, -1, c.head_dim)       # column h*p + d2 becomes d2*H + h
      weights[name] = by_head.swapaxes(1, 2).reshape(c.d_model, -1)
  config = {theirs: getattr(c, ours) for ours, theirs in rows(H3_FIELDS)} | dict(
    d_inner=c.mlp_mult*c.d_model, max_position_embeddings=c.max_positions,
    pad_vocab_size_multiple=c.pad_vocab_multiple, attn_layer_idx=list(c.attn_layers),
    attn_cfg=dict(num_heads=c.n_heads, rotary_emb_dim=c.rotary_dim),
    ssm_cfg=dict(mode="diag", measure="diag-lin", d_state=c.d_state, head_dim=c.head_dim))
  file, there = config_beside(path)
  if there not in ({}, config):
    raise CheckpointError(f"{file} is there and says something else: name a file in a folder of "
                          "its own")
  stored = {k: Stored(v) for k, v in weights.items()}
  tied = {"lm_head.weight": stored["backbone.embeddings.word_embeddings.weight"]}
  save_checkpoint(str(path), stored | tied, {"format": "pt"})
  file.write_text(json.dumps(config, indent=1) + "\n", "utf-8")

# ---- official weights of BiGS -------------------------------------------------------------------

# the heads that use a part of the model, by the beginning of its tensors' names
HEAD_PARTS = {"cls.": ("mlm",), "qa_outputs.": ("span",), "bigs.pooler.": ("classify", "choose"),
              "classifier.": ("tag", "classify", "choose")}
HEAD_USES = {"mlm": "fill masks", "classify": "classify", "choose": "choose", "span": "find spans",
             "tag": "tag words"}
HEAD_CLASSES = {"SequenceClassification": "classify", "MultipleChoice": "choose",
                "QuestionAnswering": "span", "TokenClassification": "tag"}

def require_head(weights:Weights, source:str, head:str) -> None:
  "Raises CheckpointError where a head was not trained: another one, or none."
  parts = [part for part, heads in HEAD_PARTS.items() if head in heads]
  trained = all(any(k.startswith(part) for k in weights) for part in parts)
  if trained and head == "choose": trained = weights["classifier.weight"].shape[0] == 1
  require(trained, source, f"it has no head that was trained to {HEAD_USES[head]}; train.py --task "
          "mlm and papers/finetune.py train such to fill masks and to classify")

def stated_labels(source:str, n:int) -> list[str]:
  "The labels that the config.json beside official weights names, else their numbers."
  file, given = config_beside(source)
  with refusing(file, "its id2label is no object"): names = dict(given.get("id2label") or {})
  return [str(names.get(str(i), i)) for i in range(n)]

def bigs_config(weights:Weights, source:str, head:str|None, gelu:str|None
                ) -> tuple[BiGSConfig, str|None]:
  "The shape of the tensors, the rest from config.json, which must not contradict them; the head."
  file, given = config_beside(source)
  require(given.get("pre_norm", True) is True, file, "pre_norm false is not supported")
  layers = {k.split(".")[3] for k in weights if k.startswith("bigs.encoder.layer.")}
  measured = dict(n_layer=len(layers), n_heads=1,
                  gelu=gelu or ("tanh" if source.endswith(".msgpack") else "erf"))
  with refusing(source, "its config is unusable"):
    for field, _, *tensor in rows(BIGS_FIELDS):
      for name in tensor:                                  # one or none
        require(name in weights, source, f"tensor {name} is missing: not a BiGS model")
        measured[field] = weights[name].shape[0]
    if "classifier.weight" in weights: measured["n_labels"] = weights["classifier.weight"].shape[0]
    config = BiGSConfig(**with_stated(measured, BIGS_FIELDS, source))
    architectures = given.get("architectures") or []
    stated = [h for a in architectures for end, h in HEAD_CLASSES.items() if a.endswith(end)]
  return config, head or (stated[0] if stated else None)

# ---- from tensors to a model --------------------------------------------------------------------

def narrowed(x:np.ndarray, dtype:str) -> np.ndarray:
  "float32 as one of WEIGHTS: to the nearest, and of two as near to the even one."
  if dtype == "float16": return np.ascontiguousarray(x, np.float16)
  x = np.ascontiguousarray(x, np.float32)
  if dtype != "bfloat16": return x
  bits, out = x.reshape(-1).view(np.uint32), np.empty(x.size, np.uint16)
  for at in range(0, len(bits), 1 << 20):                  # in pieces: no second float32 of it all
    piece = bits[at:at + (1 << 20)]
    out[at:at + (1 << 20)] = (piece + (0x7fff + (piece >> 16 & 1))) >> 16
  return out.reshape(x.shape)

def filled(x:np.ndarray, dtype:DType=dtypes.float, device:str|None=None) -> Tensor:
  "A Tensor of an array of this type, in one copy: Tensor(x) would hold two for a while."
  new = Tensor.empty(*x.shape, dtype=dtype, device=device)
  x = np.ascontiguousarray(x)
  # a mapped file; tinygrad sends a GPU only what might be written
  if not x.flags.writeable and not new.device.startswith("CPU"): x = x.copy()
  source = Buffer("NPY", x.size, dtype, opaque=x)
  new._buffer().ensure_allocated().copy_from(source)
  return new

def load_weights(model:H3LM|BiGS, weights:dict[str, Tensor|Stored], source:str="weights",
                 dtype:str="float32") -> None:
  """Puts weights, by official name, into the model, tensor by tensor; matrices as `dtype`, of
  flashconv.WEIGHTS. Raises CheckpointError unless names and shapes match, and what is checked about
  the file's bytes is right."""
  if dtype != "float32": answer_with_kernels()      # tinygrad's own products misread narrow weights
  parameters = get_state_dict(model)
  for name, p in parameters.items():
    require(name in weights, source, f"tensor {name} is missing")
    shape = weights[name].shape
    require(shape == p.shape, source, f"tensor {name} has shape {shape}, not {p.shape}")
  for name in weights:
    known = name in parameters or name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq")
    require(known, source, f"tensor {name} does not belong to this model")
  for name, p in parameters.items():
    kind, w = dtype if p.ndim == 2 and name.endswith(".weight") else "float32", weights[name]
    with np.errstate(over="ignore"): x = narrowed(w.numpy(), kind)
    require(kind != "float16" or not np.isinf(x).any(), source,
            f"tensor {name} has values past what float16 holds: take bfloat16")
    p.replace(filled(x, WEIGHTS[kind], p.device))
    if isinstance(w, Stored): w.free_pages()

def h3_model(tensors:Weights, meta:dict[str, str], source:str, n_heads:int|None=None,
             dtype:str="float32") -> H3LM:
  """The model of what `read_weights` gives: a checkpoint of ours (metadata model = "h3" and config
  = H3Config as JSON; tensors named optim.… are passed over), or official weights. n_heads, dtype:
  see `H3LM.from_pretrained`. Raises CheckpointError, naming `source`, for the rest."""
  weights = {} if "model" in meta else official_names(tensors)
  if any(k.startswith("backbone.") for k in weights):
    config = h3_config(weights, source, n_heads)
    weights = tiled(weights, config)
  else:
    kind = meta.get("model")
    require(kind == "h3", source, f"not a checkpoint of an H3 model (its metadata: {kind!r})")
    config = config_in(meta, H3Config, source)
    weights = {k: v for k, v in tensors.items() if not k.startswith("optim.")}
  model = H3LM(config, seed=None)
  load_weights(model, weights, source, dtype)
  return model

def bigs_model(tensors:Weights, meta:dict[str, str], source:str, head:str|None=None,
               gelu:str|None=None, n_labels:int|None=None) -> BiGS:
  """The model of what `read_weights` gives: a checkpoint of ours, or official weights. Tensors
  named optim.… are passed over. head, gelu, n_labels: see `BiGS.from_pretrained`. Raises
  CheckpointError, naming `source`, for the rest."""
  of_others = [part for part, heads in HEAD_PARTS.items() if head not in (None, *heads)]
  # the decoder is tied, in both its parts
  passed_over = ("optim.", "cls.predictions.decoder.", *of_others)
  weights = {k: v for k, v in tensors.items()
             if not k.startswith(passed_over) and not k.endswith(".position_ids")}
  have = [part for part in HEAD_PARTS if any(k.startswith(part) for k in weights)]
  kind = meta.get("model", "bigs")
  require(kind == "bigs", source, f"it holds a model of kind {kind!r}, not BiGS")
  if meta: config = config_in(meta, BiGSConfig, source)
  else: config, head = bigs_config(weights, source, head, gelu)
  if "classifier." not in have: config.n_labels = n_labels or config.n_labels
  require(n_labels in (None, config.n_labels), source,
          f"its classifier has {config.n_labels} labels, not {n_labels}")
  model = BiGS(config, None, tuple(HEAD_PARTS[part][0] for part in have))
  if "classifier." not in have and hasattr(model, "classifier"): del model.classifier
  load_weights(model, weights, source)
  model.rng = np.random.default_rng(0)
  if head:
    before = get_state_dict(model).keys()
    model.add(head)
    new = {k.rsplit(".", 1)[0] for k in get_state_dict(model).keys() - before}
    # the released masked models come with a pooler that nothing was trained on top of
    if head in ("classify", "choose") and "classifier" in new: new.add("bigs.pooler.dense")
    if new:
      print(f"{source}: no trained {' and '.join(sorted(new))} in it, so {head} starts from random "
            "ones", file=sys.stderr)
  return model
