"""Read torch's .ckpt, .pt, .pth and .bin files without torch, and without running anything in them.

Such a file is a zip of data.pkl, the structure, and data/N, the numbers. A pickle is a program for
a stack machine, and some of its instructions import and call functions. The machine below is
Python's own without these: it builds dicts, lists, numbers and memory-mapped arrays, and anything
else that a pickle imports remains a mere name.
"""

import io
import math
import pickle
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiny_sd import UserError, require, shorten

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
LONGEST = 2 ** 22       # bytes of a data.pkl; Stable Diffusion 1.5's has about 200,000
LONGEST_NAME = 300      # characters of a tensor's name: patterns take long to read longer ones
STORAGES = {f"torch.{name}Storage": np.dtype(code) for name, code in {
    "Double": "<f8", "Float": "<f4", "Half": "<f2", "BFloat16": "<u2", "Long": "<i8", "Int": "<i4",
    "Short": "<i2", "Char": "i1", "Byte": "u1", "Bool": "?"}.items()}
SWALLOWED = re.compile(     # other objects in checkpoints, which become Nothing
    r"(pytorch_lightning|lightning|lightning_fabric)\..+|(__builtin__|builtins)\.set"
    r"|_codecs\.encode|numpy\.(dtype|ndarray)|numpy\._?core\.multiarray\.(scalar|_reconstruct)")
CONVERT = ("python -c 'import sys, torch, safetensors.torch as s; f = sys.argv[1]; "
           "a = torch.load(f, \"cpu\", weights_only=True); a = a.get(\"state_dict\", a); "
           "s.save_file({k: v.contiguous() for k, v in a.items() if hasattr(v, \"shape\")}, "
           "f.rsplit(\".\", 1)[0] + \".safetensors\")' FILE")


class Nothing:
    """A placeholder for an object that is not needed; its contents are dropped."""

    def drop(self, *_):
        """Do nothing."""

    append = extend = add = update = drop


class ParameterDict(dict):
    """torch.nn.ParameterDict, found in old textual inversions."""


@dataclass
class Storage:
    """The numbers of one or more tensors, (n,), mapped from the file."""
    numbers: np.ndarray


def read_pickle(path):
    """Return what torch saved in a file: dicts, lists, tuples, texts, numbers and arrays.

    Arrays are mapped into memory, read-only; bfloat16 stays uint16, as in tiny_sd.read_safetensors.
    UserError if the file is damaged, or would call a function.
    """
    require(Path(path).is_file(), f"there is no file {path}")
    try:
        archive = Archive(path)
        return Machine(archive).load()
    except UserError as error:
        raise UserError(f"{path} is refused: {error}") from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError,
            NotImplementedError, MemoryError, struct.error, pickle.UnpicklingError,
            zipfile.BadZipFile) as error:
        reason = shorten(str(error).replace("\n", " "))
        raise UserError(f"{path} is not a whole checkpoint: {reason or type(error).__name__}"
                        ) from None


# ── The zip ─────────────────────────────────────────────────────────────────────────────────────


class Archive:
    """The members of torch's zip, mapped into memory."""

    def __init__(self, path):
        with open(path, "rb") as file:
            start = file.read(4)
        require(start == b"PK\3\4", "it is not a zip, as torch writes since version 1.6: get it as "
                f".safetensors instead, or convert it: {CONVERT}")
        with zipfile.ZipFile(path) as file:
            self.members = {member.filename: member for member in file.infolist()}
        pickles = [name for name in self.members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        require(len(pickles) == 1, f"it holds {len(pickles)} data.pkl instead of one")
        self.folder = pickles[0].removesuffix("data.pkl")
        self.bytes = np.memmap(path, np.uint8, "r")
        if f"{self.folder}byteorder" in self.members:
            order = self.member("byteorder", 16).tobytes()
            require(order == b"little", "its numbers are not little endian")

    def member(self, name, longest=math.inf):
        """Return the bytes of a member, (n,) uint8."""
        require(self.folder + name in self.members, f"its {shorten(repr(name))} is missing")
        member = self.members[self.folder + name]
        start, size = member.header_offset, member.file_size
        name = repr(name)
        require(member.compress_type == zipfile.ZIP_STORED and member.compress_size == size
                and not member.flag_bits & 1, f"its {name} is compressed or encrypted")
        require(size <= longest, f"its {name} has {size} bytes, more than {longest}")

        header = self.bytes[start:start + 30]       # ends with the lengths of a name and of extras
        require(header[:4].tobytes() == b"PK\3\4" and len(header) == 30, f"its {name} is not whole")
        start += 30 + int(header[26:].view("<u2").sum())
        require(start + size <= len(self.bytes), f"its {name} is cut short")
        return self.bytes[start:start + size]

    def storage(self, reference):
        """Return the Storage that a pickle refers to as ("storage", type, key, device, n)."""
        what, kind, key, _, n = reference
        require(what == "storage" and isinstance(kind, Name) and isinstance(key, str)
                and len(key) < LONGEST_NAME and type(n) is int and n >= 0,
                "it refers to something that is not a storage")
        require(kind.text in STORAGES, f"it holds a {shorten(repr(kind.text))}, which "
                                       "is not a storage of numbers known here")
        dtype, numbers = STORAGES[kind.text], self.member(f"data/{key}")
        require(n * dtype.itemsize <= len(numbers), f"its data/{key} is too short")
        return Storage(numbers[:n * dtype.itemsize].view(dtype))


def rebuild_tensor(storage, offset, size, stride, *_):
    """Return a view of a storage: what torch._utils._rebuild_tensor_v2 does, with bounds checked.

    offset and stride count numbers. Strides must not overlap, or a few bytes could make an array of
    any size.
    """
    require(isinstance(storage, Storage) and isinstance(size, tuple) and isinstance(stride, tuple)
            and len(size) == len(stride) <= 8, "a tensor's size or stride is not a list of numbers")
    require(all(type(n) is int and n >= 0 for n in (offset, *size, *stride)),
            "a tensor's offset, size or stride is negative or not a whole number")
    numbers = storage.numbers
    if 0 in size:
        return np.zeros(size, numbers.dtype)

    last = 0
    for step, n in sorted(zip(stride, size)):
        require(n == 1 or step > last, "a tensor's strides overlap")
        last += (n - 1) * step
    require(offset + last < len(numbers), "a tensor reaches beyond its storage")
    steps = [step * numbers.itemsize if n > 1 else 0 for step, n in zip(stride, size)]
    return np.ndarray(size, numbers.dtype, numbers, offset * numbers.itemsize, steps)


# ── The machine ─────────────────────────────────────────────────────────────────────────────────


def set_item(target, key, value):
    """Set target[key] of a dict; leave out keys that are not texts, or longer than weights have.

    Otherwise hashing could take forever: a tuple may contain itself a million times, and numbers
    can be chosen to collide.
    """
    require(isinstance(target, dict), "it puts an item into something that is not a dict")
    require(isinstance(key, (str, bytes, int, float, Name, type(None))),
            "a dict's key is neither a text nor a number")
    if isinstance(key, str) and len(key) <= LONGEST_NAME:
        target[key] = value


def text_dict(pairs=()):
    """Return dict(pairs), as set_item makes it."""
    found = {}
    for key, value in pairs:
        set_item(found, key, value)
    return found


CALLS = {   # {function or class that torch's files call: ours}
    "collections.OrderedDict": text_dict, "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
    "torch.nn.modules.container.ParameterDict": lambda *arguments: ParameterDict()}


@dataclass(frozen=True)
class Name:
    """A name that a pickle imports; calling it works only for those in CALLS."""
    text: str

    def __call__(self, *arguments):
        if self.text in CALLS:
            return CALLS[self.text](*arguments)
        require(SWALLOWED.fullmatch(self.text), f"its pickle calls {shorten(repr(self.text))}, "
                "which no weights need; nothing was run")
        return Nothing()


class Memo(dict):
    """A pickle's memo; its numbers must be consecutive, so that none can be chosen to collide.

    spend: called with each value that is taken from it.
    """

    def __init__(self, spend):
        super().__init__()
        self.spend = spend

    def __getitem__(self, number):
        value = super().__getitem__(number)
        self.spend(value)
        return value

    def __setitem__(self, number, value):
        require(number <= len(self), "its pickle skips numbers of its memo")
        super().__setitem__(number, value)


class Machine(pickle._Unpickler):
    """Python's pickle machine without the instructions that could run code or fill the memory.

    The C class looks up names itself, so this is the one written in Python.
    """

    def __init__(self, archive):
        super().__init__(io.BytesIO(archive.member("data.pkl", LONGEST).tobytes()),
                         encoding="latin1")
        self.memo, self.persistent_load = Memo(self.spend), archive.storage
        # A few bytes can name again what the memo holds; weights hardly ever do that.
        self.items, self.bytes = LONGEST, 8 * len(archive.bytes)

    def spend(self, *values):
        """Count the items in values, and the bytes of arrays; UserError if there were too many."""
        self.items -= sum(len(v) for v in values if isinstance(v, (tuple, list, dict)))
        self.bytes -= sum(v.nbytes for v in values if isinstance(v, np.ndarray))
        require(min(self.items, self.bytes) >= 0, "it uses the same things again and again")

    def find_class(self, module, name):
        require(len(module) + len(name) < LONGEST_NAME, "it imports an endless name")
        return Name(f"{module}.{name}")

    def push_call(self):        # call a name with a tuple
        arguments, function = self.stack.pop(), self.stack.pop()
        require(isinstance(function, Name), "it calls something that it made itself")
        require(isinstance(arguments, tuple), "it calls something without a tuple")
        self.spend(arguments, *arguments)
        self.append(function(*arguments))
        self.spend(self.stack[-1])

    def _instantiate(self, function, arguments):    # the same by instructions of old pickles
        self.stack += [function, tuple(arguments)]
        self.push_call()

    def push_call_with_options(self):       # ignore the options; weights do not need them
        self.stack.pop()
        self.push_call()

    def push_dict(self):
        values = self.pop_mark()
        self.append(text_dict(zip(values[::2], values[1::2], strict=True)))

    def push_nothing(self):
        self.append(Nothing())

    def push_nothing_for_items(self):
        self.pop_mark()
        self.push_nothing()

    def set_items(self, values=None):
        values = self.pop_mark() if values is None else values
        if not isinstance(self.stack[-1], Nothing):
            for key, value in zip(values[::2], values[1::2], strict=True):
                set_item(self.stack[-1], key, value)

    def set_one(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def set_attributes(self):
        state = self.stack.pop()
        if isinstance(self.stack[-1], ParameterDict):
            self.spend(state["_parameters"])
            self.stack[-1].update(text_dict(state["_parameters"].items()))
        else:       # a state_dict's attributes do not matter
            require(isinstance(self.stack[-1], (dict, Nothing)),
                    "its pickle changes something that is not a dict")

    def refuse(self):
        raise UserError("its pickle has an instruction that no weights need")

    dispatch = pickle._Unpickler.dispatch | {
        code[0]: step for code, step in {
            pickle.REDUCE: push_call, pickle.NEWOBJ: push_call,
            pickle.NEWOBJ_EX: push_call_with_options, pickle.BUILD: set_attributes,
            pickle.SETITEM: set_one, pickle.SETITEMS: set_items, pickle.DICT: push_dict,
            pickle.EMPTY_SET: push_nothing, pickle.FROZENSET: push_nothing_for_items,
            **dict.fromkeys((pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID, pickle.DUP,
                             pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER), refuse)
        }.items()}
