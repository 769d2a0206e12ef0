"""What torch saves is read as torch reads it, and what a pickle could do besides is not done."""

import io
import os
import pickle
import re
import shlex
import struct
import subprocess
import sys
import time
import tracemalloc
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_weights import same_weights
from torch._utils import _rebuild_tensor_v2

import tiny_sd
from extras import cli, formats, pickles
from extras.pickles import read_pickle
from extras.tensors import read_tensors

pytestmark = pytest.mark.slow

EVENTS = None       # what Python's audit hook heard, while a list


@sys.addaudithook
def listen(event, _):
    if EVENTS is not None:
        EVENTS.append(event)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sd.ckpt"


@pytest.fixture(scope="module", autouse=True)
def modules_loaded(tmp_path_factory):
    """Python loads some of its own modules when the first zip is read, and the first text."""
    for protocol in range(6):
        program = pickle.dumps(["text", b"bytes", 0.5, 2 ** 70], protocol)
        read_pickle(write(tmp_path_factory.mktemp("first") / "a.ckpt", program))


@pytest.fixture(scope="module")
def plain(folder):
    return tiny_sd.load(folder)


def write(path, program, storages=(), method=zipfile.ZIP_STORED, **more):
    """Write a zip as torch does: a pickle, its storages and more members."""
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("archive/data.pkl", program)
        for key, numbers in dict(storages).items():
            file.writestr(f"archive/data/{key}", numbers)
        for name, text in more.items():
            file.writestr(f"archive/{name}", text)
    return path


def refusal(path, read=read_pickle):
    """Return the line that a file is refused with, and see that nothing else happened."""
    global EVENTS
    EVENTS = []
    try:
        with pytest.raises(tiny_sd.UserError) as error:
            read(path)
    finally:
        heard, EVENTS = EVENTS, None
    assert set(heard) <= {"open", "mmap.__new__", "os.stat", "object.__getattr__"}, heard
    line = str(error.value)
    assert str(path) in line and line.isprintable() and len(line) < 1000
    return line


# ── What torch saves ────────────────────────────────────────────────────────────────────────────


def same_tensors(ours, torchs):
    assert ours.keys() == torchs.keys()
    for name, tensor in torchs.items():
        assert ours[name].shape == tuple(tensor.shape)
        if tensor.dtype == torch.bfloat16:
            assert np.array_equal(tiny_sd.widen(ours[name]), tensor.detach().float())
        else:
            assert ours[name].dtype == tensor.detach().numpy().dtype
            assert np.array_equal(ours[name], tensor.detach())


@pytest.mark.parametrize("protocol", range(2, 6))
def test_every_type_of_number_and_every_view(protocol, path):
    base = torch.randn(6, 8, 2, 2)
    saved = {str(dtype): (9 * torch.randn(3, 5)).to(dtype) for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool)}
    saved |= {"transposed": base.mT, "cut": base[1:4, ::2], "channels last": base.contiguous(
        memory_format=torch.channels_last), "one": base[2, 3, 1, 1], "none": torch.zeros(0, 3),
        "positions": torch.arange(7).expand(1, -1), "parameter": torch.nn.Parameter(base[0])}
    torch.save(saved, path, pickle_protocol=protocol)
    same_tensors(read_pickle(path), torch.load(path, weights_only=False))


def test_arrays_are_mapped_and_cannot_be_written_to(path):
    torch.save({"a": torch.randn(100, 100)}, path)
    array = read_pickle(path)["a"]
    assert isinstance(array.base, np.memmap) and array.flags.aligned
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_structure(path):
    """Everything in Python's pickles except sets is read back unchanged."""
    shared = [1]
    saved = {"texts": ["", "é", b"bytes", "x" * 300], "none": None, "flags": [True, False],
             "numbers": (0, 255, -1, 2 ** 31, -2 ** 90, 0.5), "nested": [[], {}, ((1,),)],
             "pairs": (1, 2), "triples": (1, 2, 3), "shared": [shared, shared],
             "ordered": OrderedDict(a=1, b=[2])}
    for protocol in range(6):
        write(path, pickle.dumps(saved, protocol))
        if protocol > 2:        # before, bytes are the call of a function
            assert read_pickle(path) == saved
        found = read_pickle(path)
        found["texts"][2] = b"bytes"
        assert found == saved and found["shared"][0] is found["shared"][1]
    saved["cycle"] = saved
    found = read_pickle(write(path, pickle.dumps(saved)))
    assert found["cycle"] is found


def test_textual_inversion_of_the_original_program(path):
    """Its words are in a torch.nn.ParameterDict, an object."""
    words = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.randn(2, 8))})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": words}, path)
    found = read_pickle(path)
    assert found["string_to_token"]["*"] == 265
    same_tensors(found["string_to_param"], dict(words.items()))


@pytest.fixture
def lightning(monkeypatch):
    """A class of pytorch_lightning, which is not installed."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, module)
    return module.ModelCheckpoint


@pytest.mark.parametrize("wrap", [True, False])
def test_a_checkpoint_of_training_equals_the_folder(wrap, path, single_file, plain, lightning):
    """As sd-v1-4.ckpt and v1-5-pruned.ckpt: with a callback, and NumPy's scalars."""
    arrays = OrderedDict(load_file(single_file("F32")))
    callback = lightning()
    callback.best = np.float64(0.25)
    rest = {"epoch": 3, "global_step": 470000, "pytorch-lightning_version": "1.4.2",
            "callbacks": {lightning: {"monitor": "val/loss", "best_model_score": np.float32(0.5),
                                      "object": callback, "list": [np.int64(3), {1, 2}]}},
            "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.randn(4)}}}],
            "lr_schedulers": [{"base_lrs": [1e-4], "last_epoch": 5, "lr_lambdas": [None]}],
            "array": np.arange(5)}
    torch.save({"state_dict": arrays} | rest if wrap else arrays, path)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        del sys.modules[name]
    same_tensors(read_tensors(path), arrays)
    model = formats.load(path)
    same_weights(model, plain)
    assert model.name == "sd" and len(model.digest) == 10 and str(path) in model.files


def test_attributes_of_a_state_dict_are_ignored(path):
    layer = torch.nn.Linear(3, 4)
    torch.save(layer.state_dict(), path)        # whose _metadata is an attribute
    same_tensors(read_tensors(path), layer.state_dict())


# ── What is refused ─────────────────────────────────────────────────────────────────────────────


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


def innermost(bomb, depth):
    for _ in range(depth):
        bomb = [{"a": (bomb,)}]
    return bomb


BOMBS = {       # name: what to pickle, given a function that leaves a mark; and what to name
    "os.system": (lambda touch: Call(os.system, f"touch {touch}"), r"\w+\.system"),
    "eval": (lambda touch: Call(eval, f"open({touch!r}, 'w')"), r"_*builtins?_*\.eval"),
    "exec": (lambda touch: Call(exec, f"open({touch!r}, 'w')"), r"_*builtins?_*\.exec"),
    "open": (lambda touch: Call(open, touch, "w"), r"io\.open"),
    "the inner of two calls": (
        lambda touch: Call(print, Call(os.system, f"touch {touch}")), r"\w+\.system"),
    "a call deep inside": (
        lambda touch: innermost(Call(os.system, f"touch {touch}"), 50), r"\w+\.system"),
    "a call among what OrderedDict takes": (
        lambda touch: Call(OrderedDict, [("a", Call(os.system, f"touch {touch}"))]),
        r"\w+\.system"),
    "an attribute of what is allowed": (
        lambda touch: Call(getattr, OrderedDict, "fromkeys"), r"_*builtins?_*\.getattr"),
    "a function of torch": (lambda touch: Call(torch.load, touch), r"torch\.serialization\.load"),
    "this program": (lambda touch: Call(cli.main, ["a", "-o", touch]), r"extras\.cli\.main"),
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", BOMBS)
def test_a_call_is_refused_by_name(name, protocol, path, tmp_path):
    make, named = BOMBS[name]
    touch = tmp_path / "touched"
    bomb = make(str(touch))
    for saved in (bomb, {"state_dict": {"a": bomb}}):
        program = pickle.dumps(saved, protocol)
        assert re.search(rf"calls '({named})'.*nothing was run", refusal(write(path, program)))
        assert not touch.exists()


PROGRAMS = {    # by hand, in the letters of pickle's instructions; {} is what a shell would run
    "INST": (b"(S'{}'\nios\nsystem\n.", r"calls 'os\.system'"),
    "OBJ": (b"(cos\nsystem\nS'{}'\no.", r"calls 'os\.system'"),
    "REDUCE": (b"cos\nsystem\n(S'{}'\ntR.", r"calls 'os\.system'"),
    "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n(]S'{}'\natp0\n\x81.", r"calls 'subprocess\.Popen'"),
    "NEWOBJ_EX": (b"\x80\x04csubprocess\nPopen\n(]S'{}'\nat}\x92.", r"calls 'subprocess\.Popen'"),
    "the result of a call": (b"c__builtin__\neval\n(S'{}'\ntR)R.", r"calls '__builtin__\.eval'"),
    "STACK_GLOBAL": (b"\x80\x04\x8c\x02os\x8c\x06system\x93(S'{}'\ntR.", r"calls 'os\.system'"),
    "STACK_GLOBAL, a path": (b"\x80\x04\x8c\x0bcollections\x8c\x1bOrderedDict.__init__.system\x93"
                             b"(S'{}'\ntR.", r"calls 'collections\.OrderedDict\.__init__\.system'"),
    "STACK_GLOBAL, lines": (b"\x80\x04\x8c\x03o\ns\x8c\x07s\x1b[1m\rm\x93(S'{}'\ntR.",
                            r"calls 'o\\ns\.s"),
    "STACK_GLOBAL of numbers": (b"\x80\x04K\x01K\x02\x93(S'{}'\ntR.", "not a whole"),
    "STACK_GLOBAL from the memo": (b"\x80\x04\x8c\x02osp0\n\x8c\x06system\x94g0\n\x8c\x04exec0"
                                   b"\x8c\x06system\x93(S'{}'\ntR.", r"calls 'os\.system'"),
    "a name put in the memo under another": (
        b"ccollections\nOrderedDict\np0\n0cos\nsystem\np0\n0g0\n(S'{}'\ntR.",
        r"calls 'os\.system'"),
    "a made object called": (b"c_codecs\nencode\n(tRp0\n(S'{}'\ntR.", "calls something"),
    "a text called": (b"S'os.system'\n(S'{}'\ntR.", "calls something"),
    "BUILD of a name": (b"ccollections\nOrderedDict\n}S'__init__'\ncos\nsystem\nsb.", "changes"),
    "BUILD of this reader's": (b"cextras.pickles\nread_pickle\n}S'x'\nK\x01sb.", "changes"),
    "BUILD of a list": (b"]}S'__class__'\ncos\nsystem\nsb.", "changes"),
    "APPEND to a name": (b"cos\nenviron\nS'a'\na.", "not a whole"),
    "APPEND to a dict": (b"}S'a'\na.", "not a whole"),
    "SETITEM of a name": (b"cos\nenviron\nS'A'\nS'b'\ns.", "puts an item"),
    "SETITEM of a list": (b"](K\x01eK\x00K\x02s.", "puts an item"),
    "a list as key": (b"}]K\x01s.", "key"),
    "a call as key": (b"}cos\nsystem\n(tRK\x01s.", "system"),
    "EXT1": (b"\x80\x02\x82\x01.", "no weights need"),
    "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00.", "no weights need"),
    "NEXT_BUFFER": (b"\x80\x05\x97.", "no weights need"),
    "PERSID": (b"Pstorage\n.", "no weights need"),
    "a bytearray of 2^62 bytes": (b"\x96" + b"\0" * 7 + b"\x40a.", "no weights need"),
    "no such instruction": (b"K\x01\xff.", "not a whole"), "no end": (b"]", "not a whole"),
    "nothing": (b"", "not a whole"), "an end alone": (b".", "not a whole"),
    "memo, never put": (b"g7\n.", "not a whole"), "memo of nothing": (b"p0\n.", "not a whole"),
    "memo, a negative place": (b"K\x01p-1\ng-2\n.", "not a whole"),
    "memo, a number skipped": (b"K\x01p1\n.", "skips"),
    "no mark": (b"K\x01t.", "not a whole"), "POP of nothing": (b"0.", "not a whole"),
    "DUP": (b"]2.", "no weights need"), "half an item": (b"}(K\x01u.", "not a whole"),
    "TUPLE3 of two": (b"K\x01K\x02\x87.", "not a whole"),
    "REDUCE of one": (b"cos\nsystem\nR.", "not a whole"),
    "an int of 100,000 digits": (b"I" + b"9" * 10 ** 5 + b"\n.", "not a whole"),
    "a long of 2 GB": (b"\x8b\xff\xff\xff\x7f\x01.", "not a whole"),
    "a long of negative length": (b"\x8b\xff\xff\xff\xff\x01.", "not a whole"),
    "a text of 2^63 bytes": (b"\x8d" + b"\xff" * 7 + b"\x7fabc.", "not a whole"),
    "bytes of 4 GB": (b"B\xff\xff\xff\xffabc.", "not a whole"),
    "a frame of 2^64 bytes": (b"\x80\x04\x95" + b"\xff" * 8 + b"cos\nsystem\n)R.", "not a whole"),
    "text that is no UTF-8": (b"X\x02\x00\x00\x00\xff\xff.", "not a whole"),
    "OrderedDict of a tuple that holds itself": (
        b"ccollections\nOrderedDict\n((tp0\n(g0\ng0\ntp0\nK\x01t\x85\x85R.", "not a whole|key"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_pickle_by_hand_is_refused(name, path, tmp_path):
    program, named = PROGRAMS[name]
    touch = tmp_path / "touched"
    before, environ = set(sys.modules), dict(os.environ)
    program = program.replace(b"{}", f"touch {touch}".encode())
    assert re.search(named, refusal(write(path, program)))
    assert not touch.exists() and set(sys.modules) == before and dict(os.environ) == environ
    assert not hasattr(read_pickle, "x")


def test_these_pickles_would_work(tmp_path):
    """The bombs above are no duds: Python's own reader runs them."""
    touch = tmp_path / "touched"
    for make, _ in [BOMBS["os.system"], BOMBS["eval"], BOMBS["the inner of two calls"]]:
        pickle.loads(pickle.dumps(make(str(touch))))
        touch.unlink()
    for name in ("INST", "OBJ", "REDUCE", "STACK_GLOBAL", "STACK_GLOBAL from the memo"):
        pickle.loads(PROGRAMS[name][0].replace(b"{}", f"touch {touch}".encode()))
        touch.unlink()


def test_a_name_alone_is_not_imported(path):
    before = set(sys.modules)
    assert "antigravity" not in before
    found = read_pickle(write(path, b"](cantigravity\nfly\ncno.such\nthing\ne."))
    assert [name.text for name in found] == ["antigravity.fly", "no.such.thing"]
    assert set(sys.modules) == before


def test_what_is_swallowed_is_not_imported_nor_called(path, tmp_path):
    program = b"cpytorch_lightning.os\nsystem\n(S'touch %s'\ntR."
    found = read_pickle(write(path, program % str(tmp_path / "touched").encode()))
    assert isinstance(found, pickles.Nothing) and not (tmp_path / "touched").exists()


@pytest.mark.parametrize("program", [
    b"}(t" + b"2\x86" * 200 + b"K\x01s.",           # a tuple of two of a tuple of two of ...
    b"ccollections\nOrderedDict\n((t" + b"2\x86" * 200 + b"K\x01\x86\x85\x85R.",
    b"c__builtin__\nset\n((t" + b"2\x86" * 200 + b"\x85\x85R.",
    b"(" + b"(t" + b"2\x86" * 200 + b"\x91.",       # FROZENSET
    b"]" * 200_000 + b".", b"(" * 200_000 + b".", b"K\x01r\xff\xff\xff\xff."])
def test_little_takes_little_time_and_memory(program, path):
    """Tuples whose hash would take forever, many levels, a memo of four thousand million."""
    write(path, program)
    tracemalloc.start()
    start = time.process_time()
    try:
        read_pickle(path)
    except tiny_sd.UserError as error:
        assert str(error).isprintable()
    assert time.process_time() - start < 20
    assert tracemalloc.get_traced_memory()[1] < 2 ** 28
    tracemalloc.stop()


def named(text):
    return b"X" + struct.pack("<I", len(text)) + text       # BINUNICODE


PAIRS = b"(" + b"".join(named(b"%06x" % i) + b"N\x86" for i in range(20_000)) + b"t\x85q\1"
ORDERED = b"\x80\2ccollections\nOrderedDict\nq\0"
TENSOR = (b"\x80\2ctorch._utils\n_rebuild_tensor_v2\nq\0((" + named(b"storage")
          + b"ctorch\nByteStorage\n" + named(b"0") + named(b"cpu") + b"J\0\0\x10\0tQq\1"
          + b"K\0J\0\0\x10\0\x85K\1\x85\x89Ntq\2h\0h\2R")      # of a million bytes
AGAIN = {       # a few bytes each time, which use again something large
    "names": b"\x80\4" + named(b"m" * 200_000) + b"q\0" + b"h\0h\0\x93" * 50_000 + b".",
    "calls of a name": b"\x80\2clightning\n" + b"a" * 200_000 + b"\nq\0" + b"h\0)R0" * 50_000
                       + b"}.",
    "dicts": ORDERED + PAIRS + b"h\0h\1R" * 50_000 + b".",
    "dicts, dropped": ORDERED + PAIRS + b"h\0h\1R0" * 50_000 + b"}.",
    "dicts by OBJ": ORDERED + PAIRS.replace(b"\x85q", b"q") + b"0" + b"(h\0h\1o0" * 50_000 + b"}.",
    "a state": ORDERED + PAIRS + b"Rq\2}" + named(b"_parameters") + b"h\2sq\3"
               + b"ctorch.nn.modules.container\nParameterDict\n)R" + b"h\3b" * 50_000 + b".",
    "a tensor": TENSOR + b"q\3}(" + b"".join(named(b"%d" % i) + b"h\3" for i in range(20_000))
                + b"u.",
    "views of a storage": TENSOR + b"0}(" + b"".join(named(b"%d" % i) + b"h\0h\2R"
                                                      for i in range(20_000)) + b"u.",
    "a storage of an endless name": b"\x80\2(" + named(b"storage") + b"ctorch\nByteStorage\n"
                                    + named(b"0" * 60_000) + named(b"cpu") + b"K\0tq\0"
                                    + b"h\0Q0" * 100_000 + b"}."}


@pytest.mark.parametrize("name", AGAIN)
def test_what_is_used_again_and_again_is_refused(name, path):
    """It would take minutes, or tens of gigabytes."""
    write(path, AGAIN[name], {"0": bytes(2 ** 20)})
    start = time.process_time()
    assert re.search("again and again|endless name|not a storage", refusal(path))
    assert time.process_time() - start < 10


def test_tied_weights_are_read(path):
    """A tensor that a file names several times, as torch saves it."""
    p = torch.randn(100, 3)
    torch.save({"a": p, "b": p, "c": p.T, "d": p[1:]}, path)
    found = read_pickle(path)
    assert np.array_equal(found["a"], p) and np.array_equal(found["b"], p)
    assert np.array_equal(found["c"], p.T) and np.array_equal(found["d"], p[1:])


@pytest.mark.parametrize("program", [
    b"}(" + b"".join(b"I%d\nN" % (n * (2 ** 61 - 1)) for n in range(50_000)) + b"u.",
    b"N" + b"".join(b"p%d\n" % (n * (2 ** 61 - 1)) for n in range(50_000)) + b"."],
    ids=["keys", "numbers of the memo"])
def test_numbers_that_collide_take_no_time(program, path):
    """A dict of numbers chosen for it takes a time that grows with their square."""
    write(path, program)
    start = time.process_time()
    try:
        assert read_pickle(path) == {}
    except tiny_sd.UserError as error:
        assert "skips" in str(error)
    assert time.process_time() - start < 5


# ── Tensors that are none ───────────────────────────────────────────────────────────────────────


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.id if isinstance(value, Reference) else None


class Reference:
    def __init__(self, *persistent_id):
        self.id = persistent_id


def dumps(value):
    file = io.BytesIO()
    Pickler(file, 2).dump(value)
    return file.getvalue()


FLOATS = ("storage", torch.FloatStorage, "0", "cpu", 12)


def tensor(offset=0, size=(3, 4), stride=(4, 1), reference=FLOATS):
    return Call(_rebuild_tensor_v2, Reference(*reference), offset, size, stride, False,
                OrderedDict())


def test_the_tensor_of_these_tests_is_one(path):
    numbers = np.arange(12, dtype="<f4")
    write(path, dumps(tensor()), {"0": numbers.tobytes()})
    assert np.array_equal(read_pickle(path), numbers.reshape(3, 4))


TENSORS = {
    "a row too many": (tensor(size=(4, 4)), "beyond"), "an offset": (tensor(offset=1), "beyond"),
    "a stride": (tensor(stride=(5, 1)), "beyond"), "far away": (tensor(offset=2 ** 62), "beyond"),
    "farther": (tensor(offset=2 ** 64 - 8), "beyond"),
    "one place behind": (tensor(12, (1,), (1,)), "beyond"),
    "no axes, behind": (tensor(12, (), ()), "beyond"),
    "a size that overflows": (tensor(size=(2 ** 62, 4)), "beyond|overlap"),
    "a stride that overflows": (tensor(stride=(2 ** 62, 1)), "beyond"),
    "strides that overflow to 0": (tensor(size=(2, 2), stride=(2 ** 64, 2 ** 63)), "beyond"),
    "sizes whose product is 0": (tensor(size=(2 ** 32, 2 ** 32), stride=(0, 0)), "overlap"),
    "the same row again": (tensor(size=(3, 4), stride=(0, 1)), "overlap"),
    "strides that overlap": (tensor(size=(3, 4), stride=(1, 1)), "overlap"),
    "strides that overlap a little": (tensor(size=(2, 4), stride=(3, 1)), "overlap"),
    "a number a million times": (tensor(size=(10 ** 6,), stride=(0,)), "overlap"),
    "a negative offset": (tensor(offset=-1), "negative"),
    "a negative size": (tensor(size=(-3, -4)), "negative"),
    "a negative stride": (tensor(offset=11, stride=(-4, -1)), "negative"),
    "a size of fractions": (tensor(size=(3.0, 4)), "whole number"),
    "a size of texts": (tensor(size=("3", 4)), "whole number"),
    "a size of flags": (tensor(size=(True, 4)), "whole number"),
    "a list as size": (tensor(size=[3, 4]), "size or stride"),
    "no stride": (tensor(stride=None), "size or stride"),
    "more strides": (tensor(stride=(4, 1, 1)), "size or stride"),
    "100 axes": (tensor(size=(1,) * 100, stride=(1,) * 100), "size or stride"),
    "none of very many": (tensor(size=(0, 2 ** 70), stride=(1, 1)), "not a whole"),
    "a storage too long": (tensor(reference=(*FLOATS[:4], 13)), "too short"),
    "a storage much too long": (tensor(reference=(*FLOATS[:4], 2 ** 62)), "too short"),
    "numbers too wide": (tensor(reference=("storage", torch.DoubleStorage, *FLOATS[2:])), "short"),
    "a negative length": (tensor(reference=(*FLOATS[:4], -1)), "not a storage"),
    "a length of fractions": (tensor(reference=(*FLOATS[:4], 12.0)), "not a storage"),
    "no such storage": (tensor(reference=("storage", torch.FloatStorage, "7", "cpu", 12)), "7"),
    "a way out": (tensor(reference=(*FLOATS[:2], "../../../etc/passwd", "cpu", 12)), "passwd"),
    "a key that is a number": (tensor(reference=(*FLOATS[:2], 0, "cpu", 12)), "not a storage"),
    "no type": (tensor(reference=("storage", None, *FLOATS[2:])), "not a storage"),
    "a type as text": (tensor(reference=("storage", "torch.FloatStorage", *FLOATS[2:])),
                       "not a storage"),
    "a type that is none": (tensor(reference=("storage", OrderedDict, *FLOATS[2:])), "OrderedDict"),
    "complex": (tensor(reference=("storage", torch.ComplexFloatStorage, *FLOATS[2:])), "Complex"),
    "no storage": (tensor(reference=("module", *FLOATS[1:])), "not a storage"),
    "a short reference": (tensor(reference=FLOATS[:4]), "not a whole"),
    "a long reference": (tensor(reference=(*FLOATS, None, None)), "not a whole"),
    "a tensor as storage": (Call(_rebuild_tensor_v2, tensor(), 0, (1,), (1,), False, None), "size"),
    "a text as storage": (Call(_rebuild_tensor_v2, "0", 0, (1,), (1,), False, None), "size"),
    "too few arguments": (Call(_rebuild_tensor_v2, Reference(*FLOATS)), "not a whole"),
    "another kind of tensor": (Call(torch._utils._rebuild_sparse_tensor, 1, 2), "calls 'torch"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_out_of_bounds_is_refused(name, path):
    bad, named = TENSORS[name]
    write(path, dumps({"state_dict": {"a": bad}}), {"0": bytes(48)})
    assert re.search(named, refusal(path))


@pytest.mark.parametrize("reference", [5, "storage", b"abcde", None, [], ("storage",)])
def test_a_reference_of_the_wrong_type_is_refused(reference, path):
    program = pickle.dumps(reference, 2)[:-1] + b"Q."
    assert "unpack" in refusal(write(path, program))


# ── Zips that are none ──────────────────────────────────────────────────────────────────────────


def honest(path):
    torch.save({"a": torch.randn(40, 40)}, path)
    return path.read_bytes()


@pytest.mark.parametrize("keep", [0, 1, 4, 30, 100, 3000, -100, -22, -1])
def test_a_file_cut_short_is_refused(keep, path):
    path.write_bytes(honest(path)[:keep])
    refusal(path)


def test_a_file_cut_in_its_middle_is_refused(path):
    data = honest(path)
    path.write_bytes(data[:2000] + data[5000:])
    refusal(path)


def test_every_byte_may_be_wrong(path):
    """A file with any one byte changed is read, or refused with one line."""
    data, rng = bytearray(honest(path)), np.random.default_rng(0)
    spots = [*range(0, 400), *range(len(data) - 600, len(data))]
    for spot in rng.permutation(spots)[:300]:
        changed = bytearray(data)
        changed[spot] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            read_pickle(path)
        except tiny_sd.UserError as error:
            assert "\n" not in str(error)


def test_what_is_compressed_is_refused(path):
    program = dumps({"a": tensor()})
    write(path, program, {"0": bytes(48)}, zipfile.ZIP_DEFLATED)
    assert "'data.pkl' is compressed" in refusal(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/data/0", bytes(48), zipfile.ZIP_DEFLATED)
    assert "'data/0' is compressed" in refusal(path)


def test_a_zip_bomb_is_refused_before_it_grows(path):
    write(path, b"]" * 2 ** 26, method=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2 ** 20
    tracemalloc.start()
    assert "compressed" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 2 ** 22
    tracemalloc.stop()


def test_a_pickle_too_long_is_refused(path):
    assert "more than" in refusal(write(path, b"]" * (pickles.LONGEST + 1)))


def test_sizes_that_the_zip_does_not_have_are_refused(path):
    """The directory says both sizes; a length beyond the file's end, and a start beyond it."""
    data = bytearray(write(path, dumps({"a": tensor()}), {"0": bytes(48)}).read_bytes())
    entry = data.rindex(b"PK\1\2")
    for place, value in [(20, 2 ** 31), (24, 2 ** 31), (42, 2 ** 31), (42, 5)]:
        changed = bytearray(data)
        for at in (20, 24) if place < 42 else (place,):
            changed[entry + at:entry + at + 4] = value.to_bytes(4, "little")
        path.write_bytes(changed)
        assert re.search("cut short|not whole|not a whole", refusal(path))


@pytest.mark.parametrize("names, named", [
    ([], "0 data.pkl"), (["data.pkl"], "0 data.pkl"), (["a/b/data.pkl"], "0 data.pkl"),
    (["a/data.pkl", "b/data.pkl"], "2 data.pkl"), (["a/data.pkl/x"], "0 data.pkl")])
def test_one_pickle_is_needed(names, named, path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("README", "hello")
        for name in names:
            file.writestr(name, b"N.")
    assert named in refusal(path)


def test_big_endian_numbers_are_refused(path):
    program = dumps({"a": tensor()})
    assert "endian" in refusal(write(path, program, {"0": bytes(48)}, byteorder=b"big"))
    assert read_pickle(write(path, program, {"0": bytes(48)}, byteorder=b"little"))["a"].size == 12


def test_no_tensors(path):
    for saved in ([], 5, {"state_dict": []}, {3: torch.zeros(2)}, {"a": 1}, {"state_dict": {}}):
        torch.save(saved, path)
        assert "no named tensors" in refusal(path, read_tensors)


def test_a_state_dict_within_itself(path):
    saved = {"a": 1}
    saved["state_dict"] = saved
    write(path, pickle.dumps(saved))
    assert "no named tensors" in refusal(path, read_tensors)


def test_no_file(path):
    assert "there is no file" in refusal(path)
    path.mkdir()
    assert "there is no file" in refusal(path)


@pytest.mark.parametrize("name", ["sd.ckpt", "sd.pt", "sd.pth", "pytorch_model.bin", "SD.CKPT"])
def test_every_ending(name, tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / name)
    assert read_tensors(tmp_path / name)["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["sd.ckpt", "sd.pt"])
def test_how_to_convert_an_old_file(name, tmp_path, single_file, plain):
    """What torch wrote before version 1.6, by the command that the refusal names."""
    torch.save({"state_dict": load_file(single_file("F32")), "epoch": 3}, tmp_path / name,
               _use_new_zipfile_serialization=False)
    with pytest.raises(tiny_sd.UserError, match="no zip|not a zip") as error:
        formats.load(tmp_path / name)
    command = str(error.value).partition("convert it: python ")[2].replace("FILE", name)
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=tmp_path)
    assert done.returncode == 0
    same_weights(formats.load((tmp_path / name).with_suffix(".safetensors")), plain)


def test_the_program_refuses_a_bomb(path, tmp_path, capsys):
    touch = tmp_path / "touched"
    torch.save({"state_dict": {"a": torch.zeros(3)}, "b": Call(os.system, f"touch {touch}")}, path)
    assert cli.main(["a", "-m", str(path), "-o", str(tmp_path / "out.png")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "system" in said and not touch.exists()
    assert not (tmp_path / "out.png").exists()
