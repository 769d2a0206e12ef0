"""What the tests share: a small Stable Diffusion 1.x with random weights.

It comes as diffusers writes it and as CompVis did.
"""

import functools
import json
import os
import random
import re
import shutil
import signal
import sys
from hashlib import sha256
from pathlib import Path

# What the tests rely on, whatever the environment says of whoever runs them.
UNSET = re.compile("(TQDM|HF|HUGGINGFACE)_.*|NO_COLOR|(FORCE|PYTHON)_COLORS?|PYTHONIOENCODING|"
                   "PYTHONWARNINGS|RANK|WORLD_SIZE|LOCAL_RANK|MASTER_(ADDR|PORT)|OMP_.*")
for name in filter(UNSET.fullmatch, [*os.environ]):
    del os.environ[name]
os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", "COLUMNS": "100", "NO_PROXY": "*",
               **{f"{library}_NUM_THREADS": "1"         # in small arrays, threads only wait
                  for library in ("OMP", "OPENBLAS", "MKL")}}
signal.signal(signal.SIGINT, signal.default_int_handler)    # a script's background jobs ignore it

import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import extras.fast  # noqa: E402,F401   (the tests compute as the command line does)
import tiny_sd  # noqa: E402
from extras import cli, formats  # noqa: E402
from extras.tools import models  # noqa: E402

LEVELS = 4      # of the U-Net and of the VAE, as in Stable Diffusion 1
CONFIGS = models.sd15(width=32)
TEXT = CONFIGS["text_encoder"] | {"hidden_size": 128, "intermediate_size": 256,
                                  "num_hidden_layers": 3, "num_attention_heads": 2}
VAE = CONFIGS["vae"] | {"sample_size": 64}
UNET = CONFIGS["unet"] | {"block_out_channels": (32, 64, 96, 128), "cross_attention_dim": 128,
                          "sample_size": 8}
SCHEDULER = {key: value for key, value in CONFIGS["scheduler"].items()
             if key not in ("_class_name", "skip_prk_steps")} | {"clip_sample": False}


def randomise(network, seed, **gains):
    """Return the network with noise on every bias and norm, so that leaving one out is noticed.

    gains: {word: factor} for matrices with the word in their names, so that prompt and time matter.
    """
    import torch
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.ndim == 1:
                p += 0.2 * torch.randn_like(p)
            for word, gain in gains.items():
                p *= gain if word in name and p.ndim > 1 else 1
    return network.eval()


def make_unet(**changes):
    import torch
    from diffusers import UNet2DConditionModel
    torch.manual_seed(1)
    unet = UNet2DConditionModel(**{**UNET, **changes})
    return randomise(unet, 2, attn2=3, time_emb_proj=2, conv_out=2)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The small model as a diffusers pipeline."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=randomise(AutoencoderKL(**VAE), 3),
        text_encoder=randomise(CLIPTextModel(CLIPTextConfig(**TEXT)), 4, weight=3),
        tokenizer=reference_tokenizer(tmp_path_factory.mktemp("tokenizer")), unet=make_unet(),
        scheduler=DDIMScheduler(**SCHEDULER), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference_tokenizer(folder):
    from transformers import CLIPTokenizer
    models.write_tokenizer(folder, formats.clip_tokenizer())
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


@pytest.fixture(scope="session")
def folder(reference, tmp_path_factory):
    """The small model as a folder, written by diffusers."""
    path = tmp_path_factory.mktemp("models") / "small"
    reference.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def xl(tmp_path_factory):
    """A small SDXL as a diffusers pipeline, and as a folder that it wrote."""
    from helpers_diffusers import make_pipeline
    pipe = make_pipeline(tmp_path_factory.mktemp("tokenizers"))
    path = tmp_path_factory.mktemp("models") / "small-xl"
    pipe.save_pretrained(path)
    return pipe, path


@pytest.fixture
def folder_with(folder, tmp_path):
    """folder_with(unet=network): a copy of the folder with that part in its place."""
    def write(**parts):     # the copy has hard links: never write into one of its files
        copy = shutil.copytree(folder, tmp_path / "small", copy_function=os.link)
        for part, network in parts.items():
            shutil.rmtree(copy / part)
            network.save_pretrained(copy / part)
        if "scheduler" in parts:
            name_scheduler(copy, type(parts["scheduler"]).__name__)
        return copy
    return write


def name_scheduler(folder, kind):
    """Write a scheduler's class into a folder's index, where diffusers looks for it."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | {"scheduler": ["diffusers", kind]}
    path.unlink()       # it may be a hard link
    path.write_text(json.dumps(index))


@pytest.fixture(scope="session")
def single_file(folder, tmp_path_factory):
    """single_file("F16"): the path of the same weights in one file with CompVis' names.

    The kinds are F32, F16 and BF16.
    """
    import torch
    from safetensors.torch import save_file

    @functools.cache
    def write(kind):
        path = tmp_path_factory.mktemp("single") / f"small-{kind}.safetensors"
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        arrays = {name: array.to(dtype) for name, array in compvis(folder).items()}
        position_ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
        arrays[position_ids] = torch.arange(77)[None]
        rest = {"betas": torch.zeros(1000), "model_ema.decay": torch.tensor(0.9999)}
        save_file({**arrays, **rest}, path)
        return path
    return write


def read_once(read):
    """Return the reader of a folder's tokenizer, which reads only what it has not read yet.

    Most models of the tests have CLIP's vocabulary, which takes longer to read than they to draw.
    """
    known = {}

    def remembered(folder, first, whole):
        files = [path for place in (folder, first) for path in sorted(place.glob("*"))]
        if not all(path.is_file() for path in files) \
                or sum(path.stat().st_size for path in files) > 2 ** 24:
            return read(folder, first, whole)
        key = folder == first, *((path.name, sha256(path.read_bytes()).digest()) for path in files)
        if key not in known:
            known[key] = read(folder, first, whole)
        return known[key]
    return remembered


formats.read_tokenizer = read_once(formats.read_tokenizer)


def compvis(folder):
    """Return the weights in a diffusers folder under CompVis' names."""
    from safetensors.torch import load_file
    arrays = {}
    for part, stem in tiny_sd.WEIGHT_FILES.items():
        for name, array in load_file(folder / part / f"{stem}.safetensors").items():
            name = compvis_name(part, name)
            convolution = "attn_1" in name and array.ndim == 2      # there, 1x1 convolutions
            arrays[name] = array[:, :, None, None] if convolution else array
    return arrays


def compvis_name(part, name):
    """Return CompVis' name of an array that diffusers or transformers calls `name`."""
    if part == "text_encoder":
        return "cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")
    if part == "unet":
        return "model.diffusion_model." + compvis_unet_name(name)
    return "first_stage_model." + compvis_vae_name(name)


def compvis_unet_name(name, n=3, attends=False):
    """Return CompVis' name of an array of a U-Net.

    n: ResBlocks a level of the way up. attends: whether the smallest level attends to the text.
    """
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
              "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    outer = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
             "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    if match := re.match("|".join(map(re.escape, outer)), name):
        return outer[match[0]] + name[match.end():]
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.", name):
        prefix = f"middle_block.{1 if match[1] == 'attentions' else 2 * int(match[2])}."
    else:
        match = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(conv\.)?", name)
        side, level, kind, i = match[1], int(match[2]), match[3], int(match[4])
        index = n * level + (i + 1 if side == "down" else i)
        blocks = "input_blocks" if side == "down" else "output_blocks"
        last = 2 if level or attends else 1     # behind ResBlock and transformer
        prefix = {"resnets": f"{blocks}.{index}.0.", "attentions": f"{blocks}.{index}.1.",
                  "downsamplers": f"input_blocks.{n * level + n}.0.op.",
                  "upsamplers": f"output_blocks.{n * level + n - 1}.{last}.conv."}[kind]
    return prefix + re.sub(r"^\w+", lambda m: resnet.get(m[0], m[0]), name[match.end():])


def compvis_vae_name(name, levels=LEVELS):
    def level(match):       # CompVis counts the decoder's levels from below
        return f"decoder.up.{levels - 1 - int(match[1])}"

    for new, old in [
            (r"encoder\.down_blocks\.(\d)", r"encoder.down.\1"), (r"\.resnets\.(\d)", r".block.\1"),
            (r"decoder\.up_blocks\.(\d)", level), (r"(down|up)samplers\.0", r"\1sample"),
            (r"mid_block\.block\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
            (r"mid_block\.attentions\.0", "mid.attn_1"), (r"attn_1\.group_norm", "attn_1.norm"),
            (r"attn_1\.to_out\.0", "attn_1.proj_out"), (r"attn_1\.to_", "attn_1."),
            ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out")]:
        name = re.sub(new, old, name)
    return name


def open_clip_names(arrays):
    """Return the tensors of a text encoder of transformers under OpenCLIP's names."""
    import torch
    renamed = {}
    for name, array in arrays.items():
        name = name.removeprefix("text_model.")
        for old, new in [("embeddings.token_embedding", "token_embedding"),
                         ("embeddings.position_embedding.weight", "positional_embedding"),
                         ("encoder.layers", "transformer.resblocks"),
                         ("final_layer_norm", "ln_final"), ("layer_norm", "ln_"),
                         ("self_attn.out_proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"),
                         ("mlp.fc2", "mlp.c_proj")]:
            name = name.replace(old, new)
        renamed[name] = array
    for kind in ("weight", "bias"):
        for name in [name for name in renamed if name.endswith(f"q_proj.{kind}")]:
            parts = [renamed.pop(name.replace("q_proj", f"{which}_proj")) for which in "qkv"]
            renamed[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    return renamed


@pytest.fixture
def command(capsys):
    """command(argument, ...) -> (status, lines on stdout, lines on stderr) of the command line."""
    def command(*argv):
        capsys.readouterr()
        status = cli.main(list(map(str, argv)))
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()
    return command


@pytest.fixture(scope="session", params=["numpy", "torch"])
def backend(request):
    return request.param


def with_torch_too(names, cases, few):
    """Parametrize a test over all these cases with NumPy, and over a few of them with torch.

    Use it for code that both backends share, such as samplers; the networks are tested on both.
    """
    pairs = [*((case, "numpy") for case in cases), *((case, "torch") for case in few)]
    return pytest.mark.parametrize(f"{names}, backend", [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), backend,
                     id=f"{name_of(case)}-{backend}") for case, backend in pairs],
        indirect=["backend"])


def name_of(case):
    """Return a case's id in the name of its test."""
    if isinstance(case, dict):
        return " ".join(f"{key} {str(value)[:20]}" for key, value in case.items())
    if isinstance(case, tuple):
        return "-".join(map(name_of, case))
    return getattr(case, "__name__", str(case))


@pytest.fixture(scope="session")
def model(folder, backend):
    """The small model as tiny_sd loads it from the folder."""
    return tiny_sd.load(folder, backend)


# ── Libraries to compare with that are not installed ────────────────────────────────────────────

REFERENCES = {"torch", "diffusers", "transformers", "peft", "emoji", "resvg_py", "nbformat",
              "nbclient", "huggingface_hub", "accelerate", "playwright", "matplotlib", "lycoris"}


def skip_if_missing(error):
    """Turn a failure into a skip if a library that only the tests need is missing."""
    if isinstance(error, ModuleNotFoundError) and error.name.partition(".")[0] in REFERENCES:
        pytest.skip(f"{error.name} is not installed")


class Module(pytest.Module):
    """A module of tests that is skipped if such a library is missing at import."""

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            skip_if_missing(error.__cause__)
            raise


def pytest_pycollect_makemodule(module_path, parent):
    return Module.from_parent(parent, path=module_path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from skipping())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from skipping())


def skipping():
    try:
        return (yield)
    except ModuleNotFoundError as error:
        skip_if_missing(error)
        raise


# ── The largest differences, printed under the results ──────────────────────────────────────────

LARGEST = {}


def record(part, difference):
    LARGEST[part] = max(float(difference), LARGEST.get(part, 0))


def same(part, ours, reference, tolerance):
    """Fail if ours differs from the reference by more than tolerance times its largest value."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    assert np.isfinite(reference).all() and np.ptp(reference) > 0, \
        "a constant reference tests nothing"
    difference = np.abs(ours - reference).max() / np.abs(reference).max()
    record(part, difference)
    assert difference <= tolerance, \
        f"{part}: {difference:.1e} from the reference, of its largest value"


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):         # one of pytest-xdist's processes
        session.config.workeroutput["largest"] = LARGEST


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for part, difference in getattr(node, "workeroutput", {}).get("largest", {}).items():
        record(part, difference)


# ── The order ───────────────────────────────────────────────────────────────────────────────────

LONGEST = ["train", "stopped", "play", "teach", "figures", "fuzz", "sdxl", "families", "parity",
           "fast", "notebook", "diffusion", "hub"]


def pytest_collection_modifyitems(items):
    """Begin with the modules that take longest, so that all of pytest-xdist's processes have work
    until near the end.
    """
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


# ── Options ─────────────────────────────────────────────────────────────────────────────────────


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=150, metavar="N",
                     help="how many inputs test_fuzz.py spoils (150)")
    parser.addoption("--fuzz-seed", type=int, metavar="N", help="how (otherwise each time)")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:diffusers")
    if config.option.fuzz_seed is None:         # which pytest-xdist hands on to its processes
        config.option.fuzz_seed = random.randrange(10 ** 6)
    config.option.loadscopereorder = False      # else pytest-xdist puts the most tests first


def pytest_terminal_summary(terminalreporter, config):
    ran = [report.nodeid for reports in terminalreporter.stats.values()
           for report in reports if hasattr(report, "nodeid")]
    if any("test_spoilt_inputs" in name for name in ran):
        terminalreporter.section("what test_fuzz.py spoilt")
        terminalreporter.write_line(f"--fuzz {config.option.fuzz} "
                                    f"--fuzz-seed {config.option.fuzz_seed}")
    if LARGEST:
        terminalreporter.section("largest differences from the reference")
        for part, difference in LARGEST.items():
            terminalreporter.write_line(f"{difference:8.2g}  {part}")
