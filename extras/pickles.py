"""Read torch's .ckpt, .pt, .pth and .bin files without torch, and without running anything in them.

Such a file is a zip of data.pkl, the structure, and data/N, the numbers. A pickle is a program
for a machine with a stack, some of whose instructions call functions. The machine below has no
such call: it makes dicts, lists, numbers and memory-mapped arrays, and whatever else a pickle
names stays a name.
"""

import math
import pickletools
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiny_sd import UserError, read_safetensors, require, shorten

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
LONGEST = 2 ** 22       # bytes of a data.pkl; that of Stable Diffusion 1.5 has some 200,000
STORAGES = {f"torch.{name}Storage": np.dtype(code) for name, code in {
    "Double": "<f8", "Float": "<f4", "Half": "<f2", "BFloat16": "<u2", "Long": "<i8", "Int": "<i4",
    "Short": "<i2", "Char": "i1", "Byte": "u1", "Bool": "?"}.items()}
SWALLOWED = re.compile(     # what checkpoints contain besides weights: becomes Nothing
    r"(pytorch_lightning|lightning|lightning_fabric)\..+|(__builtin__|builtins)\.set"
    r"|_codecs\.encode|numpy\.(dtype|ndarray)|numpy\._?core\.multiarray\.(scalar|_reconstruct)")
CONVERT = ("python -c 'import sys, torch, safetensors.torch as s; f = sys.argv[1]; "
           "a = torch.load(f, \"cpu\", weights_only=True); a = a.get(\"state_dict\", a); "
           "s.save_file({k: v.contiguous() for k, v in a.items() if hasattr(v, \"shape\")}, "
           "f.rsplit(\".\", 1)[0] + \".safetensors\")' FILE")


@dataclass(frozen=True)
class Name:
    """What a pickle imports: here its name alone."""
    text: str


class Nothing:
    """What stands for an object whose arguments, items and attributes were dropped."""


class ParameterDict(dict):
    """torch.nn.ParameterDict, as old textual inversions hold one."""


@dataclass
class Storage:
    """The numbers of one or more tensors, (n,), mapped from the file."""
    numbers: np.ndarray


def read_pickle(path):
    """Return what torch saved in a file: dicts, lists, tuples, texts, numbers and arrays.

    Arrays are mapped into memory, and cannot be written to; bfloat16 stays uint16, as in
    tiny_sd.read_safetensors. UserError if the file is not whole, or would call a function.
    """
    require(Path(path).is_file(), f"there is no file {path}")
    try:
        archive = Archive(path)
        return Machine(archive.storage).run(archive.member("data.pkl", LONGEST).tobytes())
    except UserError as error:
        raise UserError(f"{path} is refused: {error}") from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError,
            NotImplementedError, struct.error, zipfile.BadZipFile) as error:
        reason = shorten(str(error).replace("\n", " "))
        raise UserError(f"{path} is not a whole checkpoint: {reason or type(error).__name__}"
                        ) from None


def read_tensors(path):
    """Return {name: array} of a .safetensors file, or of one that torch wrote.

    There, the arrays may lie in a "state_dict" among other things.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        return read_safetensors(path)
    found = read_pickle(path)
    found = found if isinstance(found, dict) else {}
    inner = found.get("state_dict")
    arrays = {name: array for name, array in (inner if isinstance(inner, dict) else found).items()
              if isinstance(name, str) and isinstance(array, np.ndarray)}
    require(arrays, f"{path} holds no tensors with names")
    return arrays


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
                and type(n) is int and n >= 0, "it refers to something that is not a storage")
        require(kind.text in STORAGES, f"it holds a {shorten(repr(kind.text))}, which "
                                       "is not a storage of numbers known here")
        dtype, numbers = STORAGES[kind.text], self.member(f"data/{key}")
        require(n * dtype.itemsize <= len(numbers), f"its data/{key} is too short")
        return Storage(numbers[:n * dtype.itemsize].view(dtype))


def rebuild_tensor(storage, offset, size, stride, *_):
    """Return a view of a storage: what torch._utils._rebuild_tensor_v2 does, with bounds checked.

    offset and stride count numbers. No number may be in the array twice: an array of a few bytes
    could otherwise be as large as one likes.
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


def ordered_dict(pairs=()):
    """Return collections.OrderedDict(pairs) as a dict."""
    found = {}
    for key, value in pairs:
        set_item(found, key, value)
    return found


def set_item(target, key, value):
    """Set target[key], where target is a dict and the key is plain.

    A tuple is no key: it could hold itself a million times, and its hash take for ever.
    """
    require(isinstance(target, dict), "it puts an item into something that is not a dict")
    require(isinstance(key, (str, bytes, int, float, Name, type(None))),
            "a dict's key is neither a text nor a number")
    target[key] = value


CALLS = {   # what stands here for the functions and classes that torch's files call
    "collections.OrderedDict": ordered_dict, "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
    "torch.nn.modules.container.ParameterDict": lambda *arguments: ParameterDict()}


def call(function, arguments):
    """Return what a pickle's call of a name stands for; UserError unless weights may need it."""
    require(isinstance(function, Name), "it calls something that it made itself")
    if function.text in CALLS:
        return CALLS[function.text](*arguments)
    require(SWALLOWED.fullmatch(function.text),
            f"its pickle calls {shorten(repr(function.text))}, which no weights need; nothing was "
            "run")
    return Nothing()


# How instructions are told apart: those that push their argument, those that push something new,
# those that read or write the memo.
VALUES = {"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT",
          "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
          "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
NEW = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
       "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": Nothing}
PUT, GET = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")


class Machine:
    """The pickle machine: a stack, the stacks below its marks, and a memo.

    load: a function that returns what a persistent id stands for.
    """

    def __init__(self, load):
        self.stack, self.below, self.memo, self.load = [], [], {}, load

    def run(self, program):
        """Return what a pickle, as bytes, makes."""
        for opcode, argument, _ in pickletools.genops(program):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in VALUES:
                self.push(argument)
            elif name in NEW:
                self.push(NEW[name]())
            elif name in PUT:
                self.memo[argument] = self.stack[-1]
            elif name in GET:
                require(argument in self.memo, "its pickle recalls what it did not keep")
                self.push(self.memo[argument])
            elif name not in ("PROTO", "FRAME"):
                self.step(name, argument)
        raise ValueError("it has no end")

    def step(self, name, argument):
        """Do what an instruction asks for, of those that need the stack."""
        match name:
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "POP":
                self.stack.pop()
            case "POP_MARK":
                self.pop_mark()
            case "DUP":
                self.push(self.stack[-1])
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINPERSID":
                self.push(self.load(self.stack.pop()))
            case "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS" | "ADDITEMS" | "BUILD":
                self.fill(name)
            case "GLOBAL" | "STACK_GLOBAL" | "INST" | "OBJ" | "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
                self.push(self.named(name, argument))
            case _:
                self.push(self.gathered(name))

    def push(self, value):
        """Put a value on the stack."""
        self.stack.append(value)

    def pop(self, n):
        """Take the last n values off the stack, and return them."""
        require(len(self.stack) >= n, "its pickle takes more from the stack than is there")
        taken = self.stack[len(self.stack) - n:]
        del self.stack[len(self.stack) - n:]
        return taken

    def pop_mark(self):
        """Return all values above the last mark, and go back to those below it."""
        values, self.stack = self.stack, self.below.pop()
        return values

    def gathered(self, name):
        """Return the container that an instruction makes of values on the stack."""
        match name:
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                return tuple(self.pop(int(name[-1])))
            case "TUPLE":
                return tuple(self.pop_mark())
            case "LIST":
                return self.pop_mark()
            case "DICT":
                values = self.pop_mark()
                return ordered_dict(zip(values[::2], values[1::2], strict=True))
            case "FROZENSET":
                self.pop_mark()
                return Nothing()
        raise UserError(f"its pickle has the instruction {name}, which no weights need")

    def fill(self, name):
        """Put items or attributes into what lies below them on the stack."""
        if name in ("APPEND", "SETITEM", "BUILD"):
            values = self.pop(2 if name == "SETITEM" else 1)
        else:
            values = self.pop_mark()
        target = self.stack[-1]
        if isinstance(target, Nothing):
            return
        if name.startswith("SETITEM"):
            for key, value in zip(values[::2], values[1::2], strict=True):
                set_item(target, key, value)
        elif name.startswith("APPEND"):
            require(type(target) is list, "its pickle appends to something that is not a list")
            target += values
        elif isinstance(target, ParameterDict):
            target.update(ordered_dict(values[0]["_parameters"].items()))
        else:       # a state_dict has attributes, which say nothing of its weights
            require(isinstance(target, dict), "its pickle changes something that is not a dict")

    def named(self, name, argument):
        """Return the name that an instruction imports, or what its call stands for."""
        match name:
            case "GLOBAL":
                return Name(argument.replace(" ", ".", 1))
            case "STACK_GLOBAL":
                module, word = self.pop(2)
                require(isinstance(module, str) and isinstance(word, str), "it imports no name")
                return Name(f"{module}.{word}")
            case "INST":
                return call(Name(argument.replace(" ", ".", 1)), self.pop_mark())
            case "OBJ":
                function, *arguments = self.pop_mark()
                return call(function, arguments)
            case "NEWOBJ_EX":
                function, arguments, _ = self.pop(3)
                return call(function, arguments)
        return call(*self.pop(2))
