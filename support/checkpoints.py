"""Model files: our own checkpoints, the released models, and files of PyTorch and flax.

  tensors, meta = read_weights(find("out"))          any file, in a folder or by a released name
  model = h3_model(tensors, meta, "out")             H3, hybrid, Transformer; `bigs_model` for BiGS
  save_checkpoint(path, tensors, metadata)           safetensors with checksums, whole or not at all
  save_official(path, model)                         H3 as the authors' code reads it

A file is mapped, and a tensor's bytes are read when it is put into a model: loading takes the
memory of the model and of one tensor, whatever else the file holds. Nothing in a file is ever run:
a pickle is read by `unpickled`, which imports nothing and calls nothing.

Not here: files in several parts (pytorch_model-00001-of-…), compressed or encrypted ones.
"""
from __future__ import annotations
import dataclasses, functools, hashlib, io, json, logging, math, mmap, os, pickletools, re
import sys, zipfile, zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple
import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.device import Buffer
from tinygrad.dtype import DType
from tinygrad.helpers import cache_dir
from tinygrad.nn.state import get_state_dict
from bigs_tiny import BiGS, BiGSConfig, dense
from flashconv import WEIGHTS
from h3tiny import H3Config, H3LM

class CheckpointError(ValueError):
  "A checkpoint that can't be used. The message is one line and names the file."
  def __init__(self, message:str):         # it may quote a damaged file, whose names hold anything
    super().__init__(re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", message))

@dataclasses.dataclass
class Stored:
  "A tensor in a mapped file: its bytes are read when `numpy` is called."
  array: np.ndarray
  bfloat16: bool = False           # array: the upper halves of float32s
  file: mmap.mmap|None = None
  check: Callable[[], None] = lambda: None      # raises CheckpointError of bytes that have changed
  @property
  def shape(self) -> tuple[int, ...]: return self.array.shape
  def numpy(self) -> np.ndarray:
    self.check()
    return (self.array.astype(np.uint32) << 16).view(np.float32) if self.bfloat16 else self.array
  def let_go(self) -> None:
    "Frees the pages read so far, which count as the process's memory until then."
    if self.file is not None and hasattr(mmap, "MADV_DONTNEED"):
      self.file.madvise(mmap.MADV_DONTNEED)

Weights = dict[str, Stored]

def mapped(path:str) -> mmap.mmap:
  with open(path, "rb") as f: return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

# ---- safetensors: our own checkpoints, and others' ----------------------------------------------

DTYPES = {k: np.dtype(v) for k, v in dict(
  F64="f8", F32="f4", F16="f2", I64="i8", I32="i4", I16="i2", I8="i1", U64="u8", U32="u4",
  U16="u2", U8="u1", BOOL="?", BF16="u2").items()}

# the metadata of a checkpoint of ours; in a file of others it may be anything
OURS = {"model", "config", "args", "step", "tokenizer", "losses", "held_out", "baseline", "labels",
        "data", "scale", "crc32"}

def save_checkpoint(path:str, tensors:dict[str, Tensor|Stored], metadata:dict[str, str],
                    before:Callable[[], None]=lambda: None) -> None:
  """Writes a safetensors file, whole or not at all: beside `path` first, then renamed over it;
  `before` is called in between. Tensor by tensor: memory holds one more than the model.

  The metadata of a checkpoint of ours hold checksums, "crc32": of the header, with zeros in its own
  place, and of each tensor in turn, 8 hexadecimal digits each. Raises OSError if it can't be
  written; what was there is then untouched."""
  name, ends = {v: k for k, v in DTYPES.items() if k != "BF16"}, [0]
  kinds = {k: v.array.dtype if isinstance(v, Stored) else np.dtype(v.dtype.fmt)
           for k, v in tensors.items()}
  for k, v in tensors.items(): ends.append(ends[-1] + math.prod(v.shape)*kinds[k].itemsize)
  sums = ["0"*8]*(1 + len(tensors)) if "config" in metadata else []
  def head() -> bytes:
    header = {"__metadata__": ({"crc32": "".join(sums)} if sums else {}) | metadata} | {
      k: {"dtype": name[kinds[k]], "shape": list(v.shape), "data_offsets": ends[i:i+2]}
      for i, (k, v) in enumerate(tensors.items())}
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)
  tmp = f"{path}.{os.getpid()}.tmp"
  try:
    with open(tmp, "wb") as f:
      f.write(len(head()).to_bytes(8, "little") + head())
      for i, v in enumerate(tensors.values()):
        f.write(data := np.ascontiguousarray(v.numpy()).data.cast("B") if 0 not in v.shape else b"")
        if sums: sums[1+i] = f"{zlib.crc32(data):08x}"
      if sums:
        sums[0] = f"{zlib.crc32(head()):08x}"
        f.seek(8)
        f.write(head())
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
  def need(ok:bool, what:str):
    if not ok: raise CheckpointError(f"{path}: {what}.")
  need(os.path.isfile(path), "no such file")
  size = os.path.getsize(path)
  with open(path, "rb") as f:
    n = int.from_bytes(f.read(8), "little")
    need(size >= 8 and n >= 2 and (n + 8 <= size or n < 1 << 27), "not a safetensors file")
    need(n + 8 <= size, f"truncated inside its header ({size} bytes)")
    try: header = json.loads(raw := f.read(n))
    except (ValueError, RecursionError): header = None
  need(isinstance(header, dict), "not a safetensors file (its header is not JSON)")
  meta, end = header.pop("__metadata__", {}), 0
  need(isinstance(meta, dict) and all(isinstance(v, str) for v in meta.values()),
       "its metadata are malformed")
  sums = meta.pop("crc32", None)
  if sums is not None:
    need(len(sums) == 8 + 8*len(header) and sums.isascii() and raw.count(sums.encode()) == 1
         and f"{zlib.crc32(raw.replace(sums[:8].encode(), b'0'*8, 1)):08x}" == sums[:8],
         "its header is damaged")
  elif "config" in meta: need(meta.keys() <= OURS, "its metadata are damaged")
  try:
    entries = sorted((v["data_offsets"], k, v["dtype"], v["shape"]) for k, v in header.items())
    for (lo, hi), k, dt, shape in entries:
      if not all(type(n) is int for n in (lo, hi, *shape)): raise TypeError
      need(dt in DTYPES, f"tensor {k} has dtype {dt}, which is not supported")
      need(lo == end and hi - lo == math.prod(shape) * DTYPES[dt].itemsize
           and min(shape, default=0) >= 0, f"its header is damaged at tensor {k}")
      end = hi
  except (KeyError, TypeError, ValueError) as e:
    if isinstance(e, CheckpointError): raise
    raise CheckpointError(f"{path}: its header is malformed.") from None
  need(size >= n + 8 + end, f"truncated: {size} bytes where its header promises {n + 8 + end}")
  need(size == n + 8 + end, f"{size - n - 8 - end} bytes too long for its header")
  file, tensors = mapped(path), {}
  for i, ((lo, hi), k, dt, shape) in enumerate(entries):
    @functools.cache
    def check(k=k, lo=n+8+lo, hi=n+8+hi, want=sums and sums[8+8*i:16+8*i]) -> None:
      if want: need(f"{zlib.crc32(memoryview(file)[lo:hi]):08x}" == want, f"tensor {k} is damaged")
    try: array = np.frombuffer(file, DTYPES[dt], math.prod(shape), n + 8 + lo).reshape(shape)
    except ValueError:                     # more dimensions than NumPy has, or larger ones
      raise CheckpointError(f"{path}: its header is damaged at tensor {k}.") from None
    tensors[k] = Stored(array, dt == "BF16", file, check)
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

class Nested(tuple):
  "A tuple that knows how deep it is: 1 where no element is a tuple."
  depth = 1

DEEPEST = 8                # a tensor's arguments are tuples in tuples, at most three deep
IGNORED = object()         # anything that is no part of a tensor; swallows what is done to it
DICTIONARIES = {"collections OrderedDict", "collections defaultdict", "builtins dict",
                "__builtin__ dict"}
PARAMETERS = {"torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state"}

def as_tuple(items:list) -> object:
  depth = 1 + max([x.depth for x in items if type(x) is Nested], default=0)
  if depth > DEEPEST: return IGNORED
  made = Nested(items)
  made.depth = depth
  return made

def as_dictionary(pairs:list) -> dict[str, object]:
  "The pairs whose key is a string: hashing another could recur as deep as that is nested."
  return {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and type(pair[0]) is str}

def rebuilt(function:object, args:object) -> object:
  "The dictionary or the tensor's layout that a call would make, else IGNORED. Nothing is called."
  if type(function) is not Name or type(args) is not Nested: return IGNORED
  if function in DICTIONARIES:
    pairs = args[0] if args and type(args[0]) is list else []
    made = as_dictionary([pair for pair in pairs if type(pair) in (list, Nested)])
    pairs.clear()          # else a small file could make gigabytes: many dictionaries of one list
    return made
  if function == "torch._utils _rebuild_tensor_v2" and len(args) >= 4 and type(args[0]) is Storage:
    return Layout(*args[:4])
  if function in PARAMETERS and args and type(args[0]) is Layout: return args[0]
  # a tensor with attributes: function, type, arguments, attributes (torch/_tensor.py)
  if function == "torch._tensor _rebuild_from_type_v2" and len(args) >= 3:
    return rebuilt(args[0], args[2])
  return IGNORED

def referred(pid:object) -> object:
  """The Storage that a persistent id means, else IGNORED: ('storage', type, key, device, length),
  and for a view of one (key, start, length)."""
  if type(pid) is not Nested or len(pid) < 5 or type(pid[1]) is not Name: return IGNORED
  tag, kind, key, _, length = pid[:5]
  named = re.fullmatch(r"torch (\w+)Storage", kind)
  if tag != "storage" or not named: return IGNORED
  if type(key) is not str or type(length) is not int: return IGNORED
  view = pid[5] if len(pid) > 5 else None
  start = view[1] if type(view) is Nested and len(view) == 3 and type(view[1]) is int else 0
  return Storage(named[1], key, length, start)

def unpickled(file:io.BytesIO|mmap.mmap, storages:dict[str, Storage]|None=None) -> object:
  """The value of the pickle that `file` is at: strings, numbers, lists, dictionaries, and the
  Layout of tensors. `file` is left where the pickle ends.

  Everything else is IGNORED, whatever it names: pickletools decodes the instructions, and none of
  them imports or calls anything here. There is no recursion either, however deep a value is nested.
  storages: each one that is referred to is put there by its key.
  Raises ValueError, IndexError or KeyError for what is no pickle."""
  stack, marks, memo = [], [], {}
  def take(n:int) -> list:
    if n > len(stack): raise ValueError("more is taken from the stack than there is")
    taken = stack[len(stack)-n:]
    del stack[len(stack)-n:]
    return taken
  def take_to_mark() -> list: return take(len(stack) - marks.pop())
  for op, arg, _ in pickletools.genops(file):
    match op.name:
      case "TUPLE1" | "TUPLE2" | "TUPLE3": stack.append(as_tuple(take(len(op.stack_before))))
      case "STOP": return stack.pop()
      case "PROTO" | "FRAME" | "READONLY_BUFFER": pass
      case "MARK": marks.append(len(stack))
      case "POP" if marks and marks[-1] == len(stack): marks.pop()
      case "POP": stack.pop()
      case "POP_MARK": take_to_mark()
      case "DUP": stack.append(stack[-1])
      case "PUT" | "BINPUT" | "LONG_BINPUT": memo[arg] = stack[-1]
      case "MEMOIZE": memo[len(memo)] = stack[-1]
      case "GET" | "BINGET" | "LONG_BINGET": stack.append(memo[arg])
      case "BUILD": take(1)                              # attributes of the object below
      case "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS" | "ADDITEMS":
        items = take_to_mark() if op.name.endswith("S") else take(len(op.stack_before) - 1)
        into = stack[-1]
        if type(into) is list and op.name.startswith("APPEND"): into.extend(items)
        if type(into) is dict and op.name.startswith("SET"):
          into.update(as_dictionary([*zip(items[::2], items[1::2])]))
      case _:
        # the rest take what pickletools' table says, and leave one value
        if pickletools.markobject in op.stack_before: args = take_to_mark()
        else: args = take(len(op.stack_before))
        value = IGNORED
        match op.name:
          case "TUPLE" | "EMPTY_TUPLE": value = as_tuple(args)
          case "LIST" | "EMPTY_LIST": value = args
          case "DICT" | "EMPTY_DICT": value = as_dictionary([*zip(args[::2], args[1::2])])
          case "GLOBAL": value = Name(arg)
          case "STACK_GLOBAL" if type(args[0]) is type(args[1]) is str:
            value = Name(f"{args[0]} {args[1]}")
          case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX": value = rebuilt(args[0], args[1])
          case "BINPERSID":
            value = referred(args[0])
            if storages is not None and type(value) is Storage: storages[value.key] = value
          case "NONE": value = None
          case "NEWTRUE" | "NEWFALSE": value = op.name == "NEWTRUE"
          case "PERSID" | "INST" | "EXT1" | "EXT2" | "EXT4": pass
          case _ if type(arg) in (str, int, bool): value = arg
        stack.append(value)
  raise ValueError("a pickle without an end")

# ---- PyTorch's files ----------------------------------------------------------------------------

NUMBERS = {"Float": "f4", "Double": "f8", "Half": "f2", "BFloat16": "u2", "Long": "i8",
           "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1", "Bool": "?"}
TORCH = (".pt", ".pth", ".bin", ".ckpt")
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."      # a file's first bytes before PyTorch 1.6
LARGEST_PICKLE = 1 << 28           # bytes; one of 5,000 tensors has less than 1 MB

def read_torch(path:str) -> Weights:
  """All tensors of a file of torch.save's, flat or under "state_dict", as PyTorch Lightning has
  them.

  Both forms are read: the zip file, and what PyTorch wrote before 1.6. Names in its pickle are
  never imported (see `unpickled`), and of tensors elsewhere in it, an optimizer's moments say, no
  byte is read.
  Raises CheckpointError if it is damaged, or no such file."""
  def fail(what:str): raise CheckpointError(f"{path}: {what}.")
  if not os.path.isfile(path): fail("no such file")
  zipped = zipfile.is_zipfile(path)
  with open(path, "rb") as f: old = f.read(len(MAGIC)) == MAGIC
  if not zipped and not old: fail("not a file of torch.save's, or a truncated one")
  try: tree, storage = (read_zip if zipped else read_before_zip)(path)
  except CheckpointError: raise
  except Exception as e:           # zipfile and pickletools raise anything
    fail(f"damaged, or not of torch.save's ({type(e).__name__})")
  if type(tree) is dict and type(tree.get("state_dict")) is dict: tree = tree["state_dict"]
  layouts = {k: v for k, v in tree.items() if type(v) is Layout} if type(tree) is dict else {}
  if not layouts: fail("no tensors in it")
  return {k: view(v, storage, f"{path}: tensor {k}") for k, v in layouts.items()}

def view(tensor:Layout, storage:Callable[[Storage], Stored], what:str) -> Stored:
  "A tensor of a storage. Raises CheckpointError, about `what`, if it does not fit into that."
  kind = tensor.storage.kind
  if kind not in NUMBERS:
    raise CheckpointError(f"{what} has numbers of type {kind}, which is not supported.")
  try:
    whole = storage(tensor.storage)
    offset, shape = tensor.storage.start + tensor.offset, tensor.shape
    stride = [s if n > 1 else 0 for n, s in zip(shape, tensor.stride, strict=True)]
    if not all(type(n) is int and n >= 0 for n in (offset, *shape, *stride)): raise ValueError
    last = offset + sum((n-1)*s for n, s in zip(shape, stride))        # Python's do not overflow
    there = 0 in shape or last < len(whole.array)
    if math.prod(shape) > len(whole.array) or not there: raise ValueError
    strides = [s*whole.array.itemsize for s in stride]
    array = np.lib.stride_tricks.as_strided(whole.array[offset:], shape, strides, writeable=False)
  except CheckpointError: raise
  except (KeyError, OverflowError, TypeError, ValueError) as e:
    raise CheckpointError(f"{what} is damaged ({type(e).__name__}).") from None
  return dataclasses.replace(whole, array=array)

BIG_ENDIAN = "written on a big-endian machine: save it again on one like this"

def read_zip(path:str) -> tuple[object, Callable[[Storage], Stored]]:
  """The value of the pickle in a zip file, and a function that finds a storage: each is a file in
  it, not compressed, with a checksum."""
  with zipfile.ZipFile(path) as file:
    pickled = next(i for i in file.infolist() if i.filename.endswith("/data.pkl"))
    root = pickled.filename.removesuffix("/data.pkl")
    if pickled.compress_type or pickled.file_size > LARGEST_PICKLE: raise ValueError
    if f"{root}/byteorder" in file.namelist():
      with file.open(f"{root}/byteorder") as f: order = f.read(6)
      if order != b"little": raise CheckpointError(f"{path}: {BIG_ENDIAN}.")
    tree = unpickled(io.BytesIO(file.read(pickled)))
  whole = mapped(path)
  @functools.cache
  def storage(s:Storage) -> Stored:
    entry, dtype = file.getinfo(f"{root}/data/{s.key}"), np.dtype(NUMBERS[s.kind])
    if entry.compress_type or entry.file_size != s.length*dtype.itemsize: raise ValueError
    # before the bytes: 30 of a header, the name, and a field of no use
    lengths = whole[entry.header_offset+26:entry.header_offset+30]
    start = entry.header_offset + 30 + sum(int.from_bytes(lengths[i:i+2], "little") for i in (0, 2))
    @functools.cache
    def check() -> None:
      if zlib.crc32(memoryview(whole)[start:start+entry.file_size]) != entry.CRC:
        raise CheckpointError(f"{path}: damaged in its part {entry.filename}.")
    return Stored(np.frombuffer(whole, dtype, s.length, start), s.kind == "BFloat16", whole, check)
  return tree, storage

def read_before_zip(path:str) -> tuple[object, Callable[[Storage], Stored]]:
  """The same of a file before PyTorch 1.6: pickles of a magic number, a version, the machine, the
  value, and the keys of its storages; then for each storage 8 bytes, its length, and its numbers
  (torch/serialization.py, _legacy_load)."""
  whole, storages, starts = mapped(path), {}, {}
  _, _, machine = (unpickled(whole) for _ in range(3))
  if not machine.get("little_endian", True):
    raise CheckpointError(f"{path}: {BIG_ENDIAN}.")
  tree, keys = unpickled(whole, storages), unpickled(whole)
  at = whole.tell()
  for key in keys:
    length = int.from_bytes(whole[at:at+8], "little")
    starts[key] = at + 8, length
    at += 8 + length*np.dtype(NUMBERS[storages[key].kind]).itemsize
  if at > len(whole):
    raise CheckpointError(f"{path}: truncated: {len(whole)} bytes where {at} are promised.")
  def storage(s:Storage) -> Stored:
    start, length = starts[s.key]
    return Stored(np.frombuffer(whole, NUMBERS[s.kind], length, start), s.kind == "BFloat16", whole)
  return tree, storage

# ---- flax's files -------------------------------------------------------------------------------

def read_flax(path:str) -> Weights:
  """The tensors of a flax .msgpack under PyTorch's names and in its layout, read by the package
  `msgpack`. Raises CheckpointError if it is anything else, or the package is missing."""
  try: import msgpack
  except ImportError:
    raise CheckpointError(f"{path}: a flax file needs a package: pip install msgpack.") from None
  found = {}
  def array(code:int, data:bytes) -> Stored:
    "An array, which flax keeps as extension 1: shape, dtype and bytes, in msgpack again."
    if code != 1: raise ValueError
    shape, dtype, raw = msgpack.unpackb(data)
    kinds = ("float32", "float16", "float64", "bfloat16", "int32", "int64")
    if dtype not in kinds: raise ValueError
    small = dtype == "bfloat16"
    return Stored(np.frombuffer(raw, np.uint16 if small else dtype).reshape(shape), small)
  def walk(node:dict, at:tuple[str, ...]) -> None:
    for k, v in node.items():
      if isinstance(v, dict): walk(v, (*at, k))
      elif not isinstance(v, Stored):
        raise CheckpointError(f"{path}: {'/'.join((*at, str(k)))} is not a tensor.")
      else:
        where = ("bigs", *at[1:]) if at[:1] in (("s4_bert",), ("bigs",)) else at
        ssm = ("kernel",) if where[-1:] in (("fs4",), ("bs4",)) and k != "D" else ()
        name = {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(k, k)
        if k == "kernel": v = dataclasses.replace(v, array=v.array.T)
        found[".".join((*where, *ssm, name))] = v
  try:
    tree = msgpack.unpackb(Path(path).read_bytes(), ext_hook=array, strict_map_key=False)
    walk(tree.get("params", tree), ())
  except CheckpointError: raise
  except (AttributeError, IndexError, KeyError, ValueError, TypeError, RecursionError,
          msgpack.UnpackException):
    raise CheckpointError(f"{path}: not a flax msgpack file, or a damaged one.") from None
  return found

# ---- where a model is: a file, a folder, the hub ------------------------------------------------

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
    get = huggingface_hub.hf_hub_download  # a lazy module: this sets the level of its log
  except ImportError:
    raise CheckpointError(f"to download {name} takes a package: pip install huggingface_hub; "
                          f"{by_hand}.") from None
  def fetch(file:str) -> Path: return Path(get(release.repo, file))
  log = logging.getLogger("huggingface_hub")
  level = log.level
  log.setLevel(logging.ERROR)              # not a line for each of its attempts
  try:
    path = fetch(release.file)
    if bigs:
      fetch("config.json")
      try: fetch("vocab.txt")
      except (OSError, huggingface_hub.errors.EntryNotFoundError): pass      # only text needs it
  except Exception as e:           # the hub's own and its network layer's differ between releases
    why = str(e).strip().partition("\n")[0].rstrip(".:")
    why = f"{type(e).__name__}: {why}"
    raise CheckpointError(f"can't download {name} ({why}): try again, {by_hand}.") from None
  finally: log.setLevel(level)
  verify(path, name, release)
  return path

def verify(path:Path, name:str, release:Release) -> None:
  """Raises CheckpointError if a file is not the released one. Its sha256 is taken once for as long
  as the file stays as it is: a note of that lies in tinygrad's cache."""
  real = path.resolve()
  stat = real.stat()
  def other(what:str) -> CheckpointError:
    return CheckpointError(f"{path} has {what}, so it is not the file that was released as {name}: "
                           f"remove {real}, and it is downloaded again, or name the file itself to "
                           "use it as it is.")
  if release.size is not None and stat.st_size != release.size:
    raise other(f"{stat.st_size:,} bytes where {release.size:,} are expected")
  if release.sha256 is None: return
  note = Path(cache_dir) / "verified" / release.sha256
  now = f"{real} {stat.st_size} {stat.st_mtime_ns}"
  if note.is_file() and note.read_text() == now: return
  with open(real, "rb") as f: found = hashlib.file_digest(f, "sha256").hexdigest()
  if found != release.sha256: raise other(f"sha256 {found} where {release.sha256} is expected")
  try:
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(now)
  except OSError: pass                                     # then it is taken again

CHECKPOINT = "checkpoint.safetensors"      # what train.py writes into its folder
PREFERRED = (CHECKPOINT, "model.safetensors", "pytorch_model.bin", "flax_model.msgpack",
             "model.pt")

def find(path_or_name:str) -> Path:
  """The file of a model: itself, the one in a folder, or a released one by its name, which is
  downloaded once.

  A folder of huggingface_hub's cache (models--danfu09--H3-355M, or one inside) is as good as any.
  Of several files one that is called as train.py or the authors call theirs comes first, else the
  newest .safetensors. Raises CheckpointError if there is none, or no telling which."""
  path = Path(path_or_name)
  if path_or_name in RELEASED and not path.exists(): return download(path_or_name)
  hint = "run train.py first, or name another"
  if not path.exists():
    raise CheckpointError(f"no model at {path}: {hint} (released are {', '.join(RELEASED)}).")
  if not path.is_dir(): return path
  folder = snapshot(path)
  for name in PREFERRED:
    if (folder/name).is_file(): return folder/name
  suffixes = (".safetensors", ".msgpack", *TORCH)
  found = sorted(f for f in folder.iterdir() if f.suffix in suffixes and f.is_file())
  if not found: raise CheckpointError(f"no model in the folder {path}: {hint}.")
  ours = [f for f in found if f.suffix == ".safetensors"]
  if ours: return max(ours, key=lambda f: f.stat().st_mtime)
  if len(found) > 1:
    names = ", ".join(f.name for f in found)
    raise CheckpointError(f"{folder} holds {len(found)} models: name one of {names}.")
  return found[0]

def snapshot(path:Path) -> Path:
  "The folder with the files of a model in huggingface_hub's cache; any other folder as it is."
  folder = path/"snapshots" if (path/"snapshots").is_dir() else path
  if folder.name != "snapshots": return folder
  main = folder.parent/"refs"/"main"
  name = main.read_text(errors="replace").strip() if main.is_file() else ""
  if name and (folder/name).is_dir(): return folder/name
  revisions = [f for f in folder.iterdir() if f.is_dir()]
  return max(revisions, key=lambda f: f.stat().st_mtime) if revisions else folder

def read_weights(path:Path|str) -> tuple[Weights, dict[str, str]]:
  "The tensors of a file of any of the formats; the metadata of a checkpoint of ours, else none."
  suffix = Path(path).suffix
  if suffix in TORCH: return read_torch(str(path)), {}
  if suffix == ".msgpack": return read_flax(str(path)), {}
  tensors, meta = read_checkpoint(str(path))
  return tensors, meta if {"config", "model"} & meta.keys() else {}

def config_beside(source:str) -> tuple[Path, dict[str, object]]:
  "The config.json in the folder of official weights, and what it says: nothing if there is none."
  file = Path(source).with_name("config.json")
  try: return file, dict(json.loads(file.read_text("utf-8"))) if file.is_file() else {}
  except (TypeError, ValueError, OSError, RecursionError):
    raise CheckpointError(f"{file} is not JSON of a configuration.") from None

# ---- official weights of H3 ---------------------------------------------------------------------

def layers_of(tensors:Weights) -> int:
  "One more than the largest number of a layer."
  found = (re.match(r"backbone\.layers\.(\d{1,9})\.", k) for k in tensors)
  return 1 + max((int(m[1]) for m in found if m), default=-1)

def official_names(tensors:Weights) -> Weights:
  """The tensors under the names of today: Lightning's prefix is taken off (what has none is not the
  model's), and old names are replaced. Those count a LayerNorm with the sublayer before it, so all
  are shifted by one: src/models/ssm_seq.py:193-224."""
  if any(k.startswith(("model.backbone.", "model.s4seq.")) for k in tensors):
    tensors = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
  def today(name:str) -> str:
    for old, new in (("s4seq.encoder.", "backbone."), ("backbone.norm.", "backbone.ln_0."),
                     ("embedding.", "backbone.embeddings.word_embeddings.")):
      if name.startswith(old): name = new + name.removeprefix(old)
    return name
  tensors = {today(k): v for k, v in tensors.items()}
  if "backbone.ln_0.weight" not in tensors: return tensors
  n = min(layers_of(tensors), len(tensors))
  shifted = {k: v for k, v in tensors.items() if ".norm" not in k and "ln_" not in k}
  def move(old:str, new:str) -> None:
    for part in ("weight", "bias"):
      if (v := tensors.get(f"backbone.{old}.{part}")) is not None:
        shifted[f"backbone.{new}.{part}"] = v
  move("ln_0", "layers.0.norm1")
  for i in range(n):
    move(f"layers.{i}.norm1", f"layers.{i}.norm2")
    move(f"layers.{i}.norm2", f"layers.{i+1}.norm1" if i < n-1 else "ln_f")
  return shifted

HEADS = {768: 12, 1024: 16, 2048: 16, 2560: 20}  # of the released models, by width

def h3_config(tensors:Weights, source:str, n_heads:int|None=None) -> H3Config:
  """The shape of official weights. The number of attention heads and a norm's eps only a
  config.json beside the file can say, with the arguments of the authors' SSMLMHeadModel; it must
  not contradict the tensors. Raises CheckpointError."""
  def shape(name:str, ndim:int) -> tuple[int, ...]:
    name = f"backbone.{name}"
    if name not in tensors: raise CheckpointError(f"{source}: tensor {name} is missing.")
    if len(found := tensors[name].shape) != ndim or 0 in found:
      raise CheckpointError(f"{source}: tensor {name} has shape {found}, where {ndim} dimensions "
                            "are wanted.")
    return found
  rows, D = shape("embeddings.word_embeddings.weight", 2)
  if (n := layers_of(tensors)) > len(tensors):
    raise CheckpointError(f"{source}: its layers are not all there: the last has number {n-1}.")
  attn = tuple(i for i in range(n) for k in ("Wqkv", "out_proj")
               if f"backbone.layers.{i}.mixer.{k}.weight" in tensors)
  h3 = next((i for i in range(n) if i not in attn), None)
  config = dict(vocab_size=50257 if rows == 50264 else rows, d_model=D, n_layer=n, attn_layers=attn,
                mlp_mult=shape("layers.0.mlp.fc1.weight", 2)[0] // D)
  if "backbone.embeddings.position_embeddings.weight" in tensors:
    config["max_positions"] = shape("embeddings.position_embeddings.weight", 2)[0]
  if h3 is not None:
    config |= dict(d_state=shape(f"layers.{h3}.mixer.ssm_k_kernel.kernel.B", 2)[1],
                   head_dim=D // shape(f"layers.{h3}.mixer.D", 1)[0])
  file, given = config_beside(source)
  stated = given.get("attn_cfg") or {}
  if type(stated) is not dict: raise CheckpointError(f"{file}: its attn_cfg is no object.")
  config["n_heads"] = n_heads or stated.get("num_heads") or HEADS.get(D) or (None if attn else 1)
  if config["n_heads"] is None:
    raise CheckpointError(f"{source}: of width {D}, the number of attention heads can't be told: "
                          "give n_heads, or a config.json beside it with "
                          '{"attn_cfg": {"num_heads": …}}.')
  inv_freq = f"backbone.layers.{attn[0]}.mixer.rotary_emb.inv_freq" if attn else ""
  if inv_freq in tensors:
    shape_of = tensors[inv_freq].shape
    config["rotary_dim"] = 2*shape_of[0] if len(shape_of) == 1 else -1
  for ours, theirs in (("vocab_size", "vocab_size"), ("norm_eps", "layer_norm_epsilon"),
                       ("embed_dropout", "embed_dropout"), ("resid_dropout", "resid_dropout")):
    if theirs in given: config[ours] = given[theirs]
  config["pad_vocab_multiple"] = math.gcd(8, rows)
  try:
    made = H3Config(**config)
    wrong = [k for k, v in (("d_model", D), ("n_layer", n)) if given.get(k, v) != v]
  except (TypeError, ValueError) as e: raise CheckpointError(f"{source}: {e}") from None
  if wrong:
    raise CheckpointError(f"{file} says {wrong[0]} {given[wrong[0]]}, the tensors of {source} say "
                          "otherwise.")
  if made.padded_vocab != rows:
    raise CheckpointError(f"{file} says vocab_size {made.vocab_size}, the embedding of {source} "
                          f"has {rows} rows.")
  return made

def tiled(tensors:Weights, config:H3Config) -> Weights:
  """Where channels share S < H rows of A and B (n_ssm), each gets its own: h has row h mod S
  (ss_kernel_diag.py:134,146)."""
  H, out = config.d_model // config.head_dim, dict(tensors)
  for k, v in tensors.items():
    if not re.search(r"\.mixer\.kernel\.kernel\.(B|inv_A_real|A_imag)$", k) or not v.shape: continue
    if 0 < v.shape[0] < H and H % v.shape[0] == 0:
      x = v.numpy()
      out[k] = Stored(np.tile(x, (H // len(x), *[1]*(x.ndim-1))))
  return out

def official_shapes(c:H3Config) -> dict[str, tuple[int, ...]]:
  """Names and shapes of the tensors of the authors' SSMLMHeadModel, with the arguments that
  `save_official` writes. Written out here, not asked of `H3LM`: that may have been changed."""
  D, V, H, N = c.d_model, c.padded_vocab, c.d_model // c.head_dim, c.d_state
  shapes = {"backbone.embeddings.word_embeddings.weight": (V, D)}
  if c.max_positions:
    shapes["backbone.embeddings.position_embeddings.weight"] = (c.max_positions, D)
  def linear(name:str, n_in:int, n_out:int) -> None:
    shapes.update({f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)})
  def norm(name:str) -> None: shapes.update({f"{name}.weight": (D,), f"{name}.bias": (D,)})
  for i in range(c.n_layer):
    layer, mixer = f"backbone.layers.{i}", f"backbone.layers.{i}.mixer"
    if i in c.attn_layers:
      linear(f"{mixer}.Wqkv", D, 3*D)
      linear(f"{mixer}.out_proj", D, D)
      if c.rotary_dim: shapes[f"{mixer}.rotary_emb.inv_freq"] = (c.rotary_dim // 2,)
    else:
      for name in ("q_proj", "k_proj", "v_proj", "output_linear"): linear(f"{mixer}.{name}", D, D)
      shift, diag = f"{mixer}.ssm_k_kernel.kernel", f"{mixer}.kernel.kernel"
      shapes |= {f"{mixer}.ssm_k_D": (D,), f"{shift}.B": (D, N), f"{shift}.C": (1, D, N)}
      shapes |= {f"{mixer}.D": (H,), f"{diag}.log_dt": (H,), f"{diag}.C": (1, H, N//2, 2),
                 f"{diag}.B": (H, N//2, 2), f"{diag}.inv_A_real": (H, N//2),
                 f"{diag}.A_imag": (H, N//2)}
    linear(f"{layer}.mlp.fc1", D, c.mlp_mult*D)
    linear(f"{layer}.mlp.fc2", c.mlp_mult*D, D)
    norm(f"{layer}.norm1")
    norm(f"{layer}.norm2")
  norm("backbone.ln_f")
  return shapes

def save_official(path:str, model:H3LM) -> None:
  """Writes a model of H3 and attention as the authors' code reads it: a .safetensors file, the tied
  lm_head.weight in it, and beside it a config.json with the arguments of their SSMLMHeadModel. The
  channels of a head are put in the order of their slow path.

  Raises CheckpointError if these arguments would not be true of the tensors, those of a changed
  layer say, or if another config.json is there; OSError."""
  c, weights = model.config, {k: v.numpy() for k, v in get_state_dict(model).items()}
  if c.ssm != "h3": raise CheckpointError(f"{path}: the authors' code has no model of {c.ssm}.")
  for i, layer in enumerate(model.backbone.layers):
    if i in c.attn_layers and c.rotary_dim:
      inv_freq = 10000.0 ** (-np.arange(0, c.rotary_dim, 2) / c.rotary_dim)
      weights[f"backbone.layers.{i}.mixer.rotary_emb.inv_freq"] = inv_freq.astype(np.float32)
    if i not in c.attn_layers and c.head_order == "hd2":   # column h*p + d2 becomes d2*H + h
      name = f"backbone.layers.{i}.mixer.output_linear.weight"
      by_head = weights[name].reshape(c.d_model, -1, c.head_dim)
      weights[name] = by_head.swapaxes(1, 2).reshape(c.d_model, -1)
  wanted = official_shapes(c)
  for name in sorted(wanted.keys() | weights.keys()):
    ours = weights[name].shape if name in weights else "none"
    theirs = wanted.get(name, "none")
    if ours != theirs:
      raise CheckpointError(f"{path}: not written: the tensor {name} has shape {ours} here and "
                            f"{theirs} in the authors' code, which can't run a changed model.")
  config = dict(
    d_model=c.d_model, n_layer=c.n_layer, d_inner=c.mlp_mult*c.d_model, vocab_size=c.vocab_size,
    ssm_cfg=dict(mode="diag", measure="diag-lin", d_state=c.d_state, head_dim=c.head_dim),
    attn_layer_idx=list(c.attn_layers),
    attn_cfg=dict(num_heads=c.n_heads, rotary_emb_dim=c.rotary_dim),
    resid_dropout=c.resid_dropout, embed_dropout=c.embed_dropout, layer_norm_epsilon=c.norm_eps,
    pad_vocab_size_multiple=c.pad_vocab_multiple, max_position_embeddings=c.max_positions)
  text, beside = json.dumps(config, indent=1) + "\n", Path(path).with_name("config.json")
  if beside.exists() and beside.read_text("utf-8", "replace") != text:
    raise CheckpointError(f"{beside} is there and says something else: name a file in a folder of "
                          "its own")
  stored = {k: Stored(v) for k, v in weights.items()}
  tied = {"lm_head.weight": stored["backbone.embeddings.word_embeddings.weight"]}
  save_checkpoint(str(path), stored | tied, {"format": "pt"})
  beside.write_text(text, "utf-8")

# ---- official weights of BiGS -------------------------------------------------------------------

def bigs_config(weights:Weights, source:str, head:str|None, gelu:str|None
                ) -> tuple[BiGSConfig, str|None]:
  "The shape of the tensors, the rest from config.json, which must not contradict them; the head."
  def shape(name:str) -> tuple[int, ...]:
    if name not in weights:
      raise CheckpointError(f"{source}: tensor {name} is missing: not a BiGS model.")
    return weights[name].shape
  V, D = shape("bigs.embeddings.word_embeddings.weight")
  layers = {int(k.split(".")[3]) for k in weights if k.startswith("bigs.encoder.layer.")}
  config = dict(vocab_size=V, d_model=D, n_layer=len(layers),
                d_inner=shape("bigs.encoder.layer.0.dv.weight")[0],
                d_state=shape("bigs.encoder.layer.0.fs4.kernel.A_re")[0], n_heads=1,
                max_length=shape("bigs.embeddings.position_embeddings.weight")[0],
                n_types=shape("bigs.embeddings.token_type_embeddings.weight")[0],
                n_labels=shape("classifier.weight")[0] if "classifier.weight" in weights else 2,
                gelu=gelu or ("tanh" if source.endswith(".msgpack") else "erf"))
  file, given = config_beside(source)
  names = dict(vocab_size="vocab_size", d_model="hidden_size", n_layer="num_hidden_layers",
               d_inner="intermediate_size", d_state="num_ssm",
               max_length="max_position_embeddings", n_types="type_vocab_size")
  for ours, theirs in names.items():
    if given.get(theirs, config[ours]) != config[ours]:
      raise CheckpointError(f"{file} says {theirs} {given[theirs]}, the tensors of {source} "
                            f"{config[ours]}.")
  if given.get("pre_norm", True) is not True:
    raise CheckpointError(f"{file}: pre_norm false is not supported.")
  config |= dict(pooler=given.get("pooler_type", "non_padding_mean"),
                 pad_token=given.get("pad_token_id", 0),
                 norm_eps=given.get("layer_norm_eps", 1e-12))
  kinds = {"SequenceClassification": "classify", "MultipleChoice": "choose",
           "QuestionAnswering": "span", "TokenClassification": "tag"}
  architectures = given.get("architectures") or []
  stated = [h for a in architectures for k, h in kinds.items() if a.endswith(k)]
  return BiGSConfig(**config), head or (stated[0] if stated else None)

# ---- from tensors to a model --------------------------------------------------------------------

def narrowed(x:np.ndarray, dtype:str) -> np.ndarray:
  "float32 as one of WEIGHTS: to the nearest, and of two as near to the even one."
  if dtype == "float16": return np.ascontiguousarray(x, np.float16)
  x = np.ascontiguousarray(x, np.float32)
  if dtype != "bfloat16": return x
  bits, out = x.reshape(-1).view(np.uint32), np.empty(x.shape, np.uint16)
  for at in range(0, len(bits), 1 << 20):
    piece = bits[at:at + (1 << 20)]
    out.reshape(-1)[at:at + (1 << 20)] = (piece + (0x7fff + (piece >> 16 & 1))) >> 16
  return out

def filled(x:np.ndarray, dtype:DType=dtypes.float, device:str|None=None) -> Tensor:
  "A Tensor of an array of this type, in one copy: Tensor(x) would hold two for a while."
  new = Tensor.empty(*x.shape, dtype=dtype, device=device)
  source = Buffer("NPY", x.size, dtype, opaque=np.ascontiguousarray(x))
  new._buffer().ensure_allocated().copy_from(source)
  return new

def load_weights(model:H3LM|BiGS, weights:dict[str, Tensor|Stored], source:str="weights",
                 dtype:str="float32") -> None:
  """Puts weights, by official name, into the model, tensor by tensor; matrices as `dtype`, of
  flashconv.WEIGHTS. Raises CheckpointError unless names and shapes match, and what is checked about
  the file's bytes is right."""
  have = get_state_dict(model)
  for name in have:
    if name not in weights: raise CheckpointError(f"{source}: tensor {name} is missing.")
    if (shape := weights[name].shape) != have[name].shape:
      raise CheckpointError(f"{source}: tensor {name} has shape {shape}, not {have[name].shape}.")
  for name in weights:
    known = name in have or name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq")
    if not known: raise CheckpointError(f"{source}: tensor {name} does not belong to this model.")
  for name, p in have.items():
    kind, w = dtype if p.ndim == 2 and name.endswith(".weight") else "float32", weights[name]
    with np.errstate(over="ignore"): x = narrowed(w.numpy(), kind)
    if kind == "float16" and np.isinf(x).any():
      raise CheckpointError(f"{source}: tensor {name} has values past what float16 holds: take "
                            "bfloat16.")
    p.replace(filled(x, WEIGHTS[kind], p.device))
    if isinstance(w, Stored): w.let_go()

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
    if (kind := meta.get("model")) != "h3":
      raise CheckpointError(f"{source}: not a checkpoint of an H3 model (its metadata: {kind!r}).")
    heads = {} if n_heads is None else {"n_heads": n_heads}
    try: config = H3Config(**json.loads(meta["config"]) | heads)
    except (KeyError, TypeError, ValueError) as e:
      raise CheckpointError(f"{source}: its config is unusable: {e}") from None
    weights = {k: v for k, v in tensors.items() if not k.startswith("optim.")}
  model = H3LM(config, seed=None)
  load_weights(model, weights, source, dtype)
  return model

def bigs_model(tensors:Weights, meta:dict[str, str], source:str, head:str|None=None,
               gelu:str|None=None, n_labels:int|None=None) -> BiGS:
  """The model of what `read_weights` gives: a checkpoint of ours, or official weights. Tensors
  named optim.… are passed over. head, gelu, n_labels: see `BiGS.from_pretrained`. Raises
  CheckpointError, naming `source`, for the rest."""
  parts = {"mlm": ("cls.",), "classify": ("bigs.pooler.", "classifier."),
           "choose": ("bigs.pooler.", "classifier."), "span": ("qa_outputs.",),
           "tag": ("classifier.",)}
  others = [p for ps in parts.values() for p in ps if head and p not in parts[head]]
  # the decoder is tied, in both its parts
  passed_over = ("optim.", "cls.predictions.decoder.", *others)
  weights = {k: v for k, v in tensors.items()
             if not k.startswith(passed_over) and not k.endswith(".position_ids")}
  try:
    if meta:
      if (kind := meta.get("model")) != "bigs":
        raise CheckpointError(f"{source}: it holds a model of kind {kind!r}, not BiGS.")
      config = BiGSConfig(**json.loads(meta["config"]))
    else: config, head = bigs_config(weights, source, head, gelu)
  except CheckpointError: raise
  except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
    raise CheckpointError(f"{source}: its config is unusable: {e}") from None
  if "classifier.weight" not in weights: config.n_labels = n_labels or config.n_labels
  elif n_labels not in (None, config.n_labels):
    raise CheckpointError(f"{source}: its classifier has {config.n_labels} labels, not {n_labels}.")
  have = lambda part: any(k.startswith(part) for k in weights)
  model = BiGS(config, None, tuple(h for h in ("mlm", "span", "tag") if have(parts[h][0])))
  if have("bigs.pooler."):
    model.bigs.pooler = SimpleNamespace(dense=dense(config.d_model, config.d_model, model.rng))
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
