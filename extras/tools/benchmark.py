"""Time tiny_sd against diffusers, torch.compile, OpenVINO and its own formulas.

All compute the same with the same weights, in turn:

    python -m extras.tools.benchmark                                     all parts, diffusers
    python -m extras.tools.benchmark --peer all --part unet --part vae   two parts, every peer
    python -m extras.tools.benchmark --peer formulas --part unet --rounds 1   the gain of fast.py
    python -m extras.tools.benchmark --peer none --part unet --batch 4   only tiny_sd
    python -m extras.tools.benchmark --width 32 --size 64 --rounds 2     a quick test, small model
    python -m extras.tools.benchmark --peer all --part unet --part loaded --device cuda \\
                                     --dtype float16 --batch 8
    python -m extras.tools.benchmark --model sdxl --part picture --size 1024 --steps 1 --rounds 1

`unet`: a step with guidance, both halves. `vae`: decoding, encoding. `text`: two prompts. `loaded`:
a picture in a process that has loaded the model. `picture`: the same from the start of the process
to the file. `bundled`: that with weights/emoji. A picture is 20 steps of DPM++ 2M at guidance 7.5;
to measure its peak memory, --steps 1 is enough. `teach`, only if named: a step of teach.py and one
of peft, rank 8 on the same matrices, and the same with gradient checkpointing; on torch.

All except `bundled` read random float16 weights with Stable Diffusion 1.5's shapes, 2.1 GB, or
SDXL's, 6.9 GB, written once to the temporary folder. Each side is a process that waits while the
others compute. First each returns a result, and these must agree; then they are timed in turn. If a
part draws to a file, its program starts again each time, and the first run counts, too. All sides
stay in memory; if memory is short, time one peer at a time. Memory includes pages of mapped files.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

# Do not import tiny_sd or NumPy here: that would set up threads for all sides.
ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "unet": ["step"], "vae": ["decode", "encode"], "text": ["encode"], "loaded": ["picture"],
    "picture": ["file"], "bundled": ["file"], "teach": ["step", "lean step"],
}
PEERS = {
    "diffusers": list(PARTS), "compiled": ["unet", "vae", "text", "loaded"],
    "openvino": ["unet", "vae", "text"], "formulas": ["unet", "vae", "text", "loaded"],
}
PROMPT, BUNDLED_PROMPT = "a lighthouse in a storm", "red apple on a blue background"
COUNTED = ("unet", "vae", "text")       # the parts whose operations are counted
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}    # of the largest value


class Failure(Exception):
    """An error that ends the program with one line."""


# ── The model: random weights with the shapes of Stable Diffusion 1.5, or of SDXL ─────────────────

def configs(args):
    """Return the configs of the model to time."""
    from extras.tools import models
    return models.CONFIGS[args.model](args.width)


def random_model(args):
    """Return the folder of the random model in the temporary folder; write it if it is missing.

    A separate process writes it, so that its memory is freed.
    """
    version = zlib.crc32(json.dumps(configs(args)).encode())
    folder = Path(tempfile.gettempdir(), f"tiny_sd-{args.model}-{args.width}-{version:08x}")
    if not folder.exists():
        spawn = multiprocessing.get_context("spawn")
        writer = spawn.Process(target=write_model, args=(folder, args))
        writer.start()
        writer.join()
    # a model's folder may name code, which diffusers runs; so another's link counts, too
    there = os.path.lexists(folder)
    if there and hasattr(os, "getuid") and folder.lstat().st_uid != os.getuid():
        raise Failure(f"{folder} is another user's")
    return folder


def write_model(folder, args):
    import numpy as np

    from extras.tools import models
    save = functools.partial(models.save_random, dtype=np.float16)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name) as place:
        models.write_model(Path(place, "model"), configs(args), save=save).rename(folder)


def inputs(args):
    """Noise, channels last: latents, the context of both halves (negative, prompt), a picture."""
    import numpy as np

    rng, n, words = np.random.default_rng(1), args.size // 8, configs(args)["unet"][
        "cross_attention_dim"]
    shapes = (args.batch, n, n, 4), (2, 77, words), (args.batch, args.size, args.size, 3)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


# ── The sides: {operation: call()} for a part; each call gives a NumPy array, channels last ───────

def tiny_sd(part, args, folder):
    import extras.fast  # noqa: F401  (before NumPy)
    return teaching(args, folder) if part == "teach" else measured(part, args, folder)


def measured(part, args, folder):
    """Return the calls of tiny_sd, with the forms of its primitives that are loaded now."""
    import numpy as np

    import tiny_sd as sd
    from extras import like_diffusers

    model = sd.load(folder, args.backend, args.device, args.dtype)
    x, context, image = inputs(args)
    unet, vae = (functools.partial(sd.array_like, network["conv_in"]["bias"])
                 for network in (model.unet, model.vae["encoder"]))     # an array as its own
    # guidance 0.5 is the mean of both halves, which shows a difference in either
    denoise = sd.denoiser(model, unet(context), 0.5)

    def picture():
        *_, latents = like_diffusers.generate(
            model, PROMPT, sampler="dpm++2m", steps=args.steps, seeds=range(args.batch),
            guidance=args.guidance, width=args.size, height=args.size)
        return sd.decode(model, latents) / np.float32(255)

    def rate():
        """The speed of large matrix products in operations per second, the best of five."""
        n, seconds = 8192 if args.device == "cuda" else 2048, []
        a, b = (unet(np.random.default_rng(k).standard_normal((n, n), np.float32))
                for k in range(2))      # a aᵀ takes half the work
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(4):
                y = sd.linear(a, b)
            sd.to_numpy(y[:1])                          # wait for the GPU
            seconds.append(time.perf_counter() - start)
        return np.array(4 * 2 * n ** 3 / min(seconds))

    calls = {
        "unet": {"step": lambda: denoise(x, 500, 0.5)[1]},
        "vae": {"decode": lambda: sd.to_numpy(sd.vae_decode(vae(x), model.vae, 32)),
                "encode": lambda: np.concatenate(
                    [*map(sd.to_numpy, sd.vae_encode(vae(image), model.vae, 32))], -1)},
        "text": {"encode": lambda: sd.to_numpy(sd.embed_prompts(model, ["", PROMPT])[0])},
        "loaded": {"picture": picture},
    }[part]
    counts = {f"operations of {name}": functools.partial(operations, call)
              for name, call in calls.items()}
    return calls | counts | {"rate": rate}


def formulas(part, args, folder):
    """tiny_sd without extras/fast.py, using BLAS threads instead."""
    os.environ |= {f"{library}_NUM_THREADS": str(cores())
                   for library in ("OPENBLAS", "VECLIB_MAXIMUM")}
    return measured(part, args, folder)


def operations(call):
    """Count the multiplications and additions of a call, by the definitions.

    Only the side tiny_sd does this; it loads extras/fast.py.
    """
    import numpy as np

    from extras import show
    counts = []
    with show.counting(lambda count, *_: counts.append(count)):
        call()
    return np.array(sum(counts))


def networks(part, args, folder, dtype):
    """Return {operation: (module, its inputs)} of diffusers' and transformers' networks.

    Each module returns one tensor.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    torch.set_num_threads(cores())

    class Network(torch.nn.Module):
        def __init__(self, network, call):
            super().__init__()
            self.network, self.call = network.to(args.device).eval(), call

        def forward(self, *tensors):
            return self.call(self.network, *tensors)

    def step(unet, x, t, words):
        uncond, cond = unet(torch.cat([x, x]), t, words).sample.chunk(2)
        return uncond + 0.5 * (cond - uncond)

    def moments(vae, image):
        q = vae.encode(image).latent_dist
        return torch.cat([q.mean, q.logvar], 1)

    x, context, image = (torch.from_numpy(a).to(args.device, dtype) for a in inputs(args))
    x, image = (a.permute(0, 3, 1, 2).contiguous() for a in (x, image))
    if part == "unet":
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype)
        t = torch.tensor(500.0, device=args.device)
        return {"step": (Network(unet, step), (x, t, context.repeat_interleave(args.batch, 0)))}
    if part == "vae":
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype)
        return {"decode": (Network(vae, lambda vae, z: vae.decode(z).sample), (x,)),
                "encode": (Network(vae, moments), (image,))}
    ids = CLIPTokenizer.from_pretrained(folder / "tokenizer")(
        ["", PROMPT], padding="max_length", return_tensors="pt").input_ids.to(args.device)
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype)
    return {"encode": (Network(encoder, lambda encoder, ids: encoder(ids)[0]), (ids,))}


def pipeline(folder, device, dtype):
    """Return diffusers' pipeline, and draw(prompt, size, batch, steps, guidance) -> PIL images."""
    import torch
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
    torch.set_num_threads(cores())
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt, size, batch, steps, guidance):
        streams = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        return pipe(prompt, width=size, height=size, num_inference_steps=steps,
                    guidance_scale=guidance, generator=streams, num_images_per_prompt=batch).images

    return pipe, draw


def diffusers(part, args, folder, compiled=False):
    import numpy as np
    import torch

    def faster(network):
        if not compiled:
            return network
        mode = "reduce-overhead" if args.device == "cuda" else None     # with CUDA graphs
        return torch.compile(network.to(memory_format=torch.channels_last), mode=mode)

    def operation(network, tensors):
        network = faster(network)

        @torch.inference_mode()
        def call():
            return channels_last(network(*tensors).float().cpu().numpy())   # waits for the GPU
        return call

    if part == "teach":
        return peft(args, folder)
    if part != "loaded":
        works = networks(part, args, folder, getattr(torch, args.dtype))
        return {name: operation(*work) for name, work in works.items()}
    pipe, draw = pipeline(folder, args.device, args.dtype)
    pipe.unet, pipe.vae.decoder = faster(pipe.unet), faster(pipe.vae.decoder)

    def picture():
        pictures = draw(PROMPT, args.size, args.batch, args.steps, args.guidance)
        return np.stack([np.float32(picture) / 255 for picture in pictures])
    return {"picture": picture}


def teaching(args, folder):
    """Return the calls of teach.py's steps; each returns the loss."""
    import numpy as np

    from extras import formats
    from extras.training import fitting, teach, lora  # isort: skip  (torch after BLAS is set up)
    import torch

    def call(*options):
        model = formats.load(folder, "torch", args.device, args.dtype)
        model.vae, rng = None, np.random.default_rng()
        how = teach.parse_arguments([
            str(folder), "-o", "none.safetensors", "--dtype", args.dtype, "--device", args.device,
            "--steps", "100", "--rate", "1e-4", "-b", str(args.batch), *options])
        adapted, pairs = lora.adapt(model, how.rank)
        optimizer = lora.optimizer_of(pairs, how)
        losses = lora.losses(adapted, optimizer, inputs(args)[0][:1], [PROMPT], how, rng)

        def step():
            fitting.begin_step(rng, how.seed, optimizer.taken, "teaching")
            with torch.autocast(args.device, getattr(torch, args.dtype),
                                enabled=args.dtype != "float32"):
                return np.array(next(losses))
        return step
    return {"step": call(), "lean step": call("--save-memory")}


def peft(args, folder):
    """The same with peft and diffusers, as in train_text_to_image_lora.py."""
    import numpy as np
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig
    from transformers import CLIPTextModel, CLIPTokenizer

    from extras.training import fitting
    torch.set_num_threads(cores())
    dtype = getattr(torch, args.dtype)
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=dtype)
    encoder.to(args.device).requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")

    def call(lean):
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
        unet.to(args.device).requires_grad_(False)
        unet.add_adapter(LoraConfig(
            r=8, lora_alpha=8, init_lora_weights="gaussian",
            target_modules=r".*\.attentions\..*(proj\w*|to_[qkv]|to_out\.0|net\.2)"))
        cast_training_params(unet, torch.float32)
        if lean:
            unet.enable_gradient_checkpointing()
            unet.train()
        matrices = [p for p in unet.parameters() if p.requires_grad]
        optimizer, steps = torch.optim.AdamW(matrices, 1e-4), itertools.count()
        rng, x_0 = np.random.default_rng(), np.repeat(inputs(args)[0][:1], args.batch, 0)

        def step():
            fitting.begin_step(rng, 0, next(steps), "teaching")
            rng.integers(1, size=args.batch)        # the pictures; the rest as in tiny_sd.train
            captions = ["" if rng.random() < 0.1 else PROMPT for _ in x_0]
            t = torch.from_numpy(rng.integers(1000, size=args.batch)).to(args.device)
            x, noise = (torch.from_numpy(a).movedim(-1, 1).to(args.device, dtype)
                        for a in (x_0, rng.standard_normal(x_0.shape)))
            ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
            with torch.autocast(args.device, dtype, enabled=dtype != torch.float32):
                context = encoder(ids.to(args.device))[0]
                predicted = unet(scheduler.add_noise(x, noise, t), t, context).sample
                loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(matrices, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return np.array(loss.item())
        return step
    return {"step": call(lean=False), "lean step": call(lean=True)}


def channels_last(y):
    """Convert torch's images (batch, channels, height, width) to tiny_sd's layout, if y is one."""
    return y.transpose(0, 2, 3, 1) if y.ndim == 4 else y


def openvino(part, args, folder):
    import openvino as ov
    import torch
    precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[args.dtype]
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": cores(),
                "PERFORMANCE_HINT": "LATENCY"}

    def operation(network, tensors):
        with torch.inference_mode():
            model = ov.convert_model(network, example_input=tensors)
        model.reshape({port: list(t.shape) for port, t in zip(model.inputs, tensors)})
        run, arrays = ov.compile_model(model, "CPU", settings), [t.numpy() for t in tensors]
        return lambda: channels_last(run(arrays)[0])

    works = networks(part, args, folder, torch.float32)
    return {name: operation(*work) for name, work in works.items()}


def program(side, part, args, folder):
    """Return the call that runs a program to draw the part's pictures to files."""
    import numpy as np
    from PIL import Image
    prompt, size = (BUNDLED_PROMPT, args.own_size) if part == "bundled" else (PROMPT, args.size)
    if side == "tiny_sd":
        command = [ROOT / "tiny_sd.py", prompt, "-m", folder, "-b", args.batch, "-o", "out.png",
                   "--steps", args.steps, "--sampler", "dpm++2m", "--cfg-scale", args.guidance,
                   "--backend", args.backend, "--device", args.device, "--dtype", args.dtype]
        command += ["-W", size, "-H", size] if size else []
    else:
        command = [__file__, "draw", folder, args.device, args.dtype, args.batch, prompt,
                   args.steps, size or "", args.guidance]

    def call():
        with tempfile.TemporaryDirectory() as here:
            done = subprocess.run([sys.executable, *map(str, command)], cwd=here,
                                  capture_output=True, text=True)
            if done.returncode:
                raise Failure(" ".join(done.stderr.splitlines()[-1:]))
            return np.stack([np.float32(Image.open(path)) / 255
                             for path in sorted(Path(here).glob("*.png"))])

    return {"file": call}


def draw(folder, device, dtype, batch, prompt, steps, size, guidance):
    """The peer's program: python benchmark.py draw ..."""
    _, draw = pipeline(folder, device, dtype)
    size, batch, steps = int(size or 0) or None, int(batch), int(steps)
    for i, picture in enumerate(draw(prompt, size, batch, steps, float(guidance))):
        picture.save(f"out-{i:03d}.png")


# ── A process for each side ───────────────────────────────────────────────────────────────────────

def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def peak_memory(part, device):
    """Return the peak memory in MB, or None if unknown.

    It is that of the programs run, or else since the last call the GPU's or the resident memory.
    """
    if PARTS[part] == ["file"]:
        import resource
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e6
    if device == "cuda":
        import torch
        peak = torch.cuda.max_memory_allocated() / 1e6
        torch.cuda.reset_peak_memory_stats()
        return peak
    with contextlib.suppress(OSError):
        peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
        Path("/proc/self/clear_refs").write_text("5")       # the peak starts again
        return int(peak) * 1024 / 1e6


def serve(pipe, side, part, args, folder):
    """The main function of a side's process.

    Answer the name of an operation with (seconds, result, MB), or with an error message.
    """
    try:
        sides = {"tiny_sd": tiny_sd, "diffusers": diffusers, "openvino": openvino,
                 "formulas": formulas, "compiled": functools.partial(diffusers, compiled=True)}
        if PARTS[part] == ["file"]:
            calls = program(side, part, args, folder)
        else:
            calls = sides[side](part, args, folder)
        while True:
            call = calls[pipe.recv()]
            start = time.perf_counter()
            result = call()
            pipe.send((time.perf_counter() - start, result, peak_memory(part, args.device)))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception as error:
        pipe.send(" ".join([type(error).__name__, *str(error).split()])[:500])


def start(side, *work):
    """Start a side's process; return ask(operation) -> (seconds, result, MB)."""
    spawn = multiprocessing.get_context("spawn")
    pipe, end = spawn.Pipe()
    spawn.Process(target=serve, args=(end, side, *work), daemon=True).start()
    end.close()

    def ask(operation):
        with contextlib.suppress(EOFError, OSError):
            pipe.send(operation)
            answer = pipe.recv()
            if not isinstance(answer, str):
                return answer
            raise Failure(f"{side}: {answer}")
        raise Failure(f"the process of {side} died: did it run out of memory?")
    return ask


# ── The comparison ────────────────────────────────────────────────────────────────────────────────

def compare(part, args, folder):
    """Return the part's results, one for each operation and side.

    Failure, before timing, if the sides disagree.
    """
    from tqdm import tqdm
    names = ["tiny_sd", *(peer for peer in args.peer if part in PEERS[peer])]
    sides, results = {name: start(name, part, args, folder) for name in names}, []
    for operation in PARTS[part]:
        firsts = {name: sides[name](operation) for name in names}
        rows = {name: {"part": part, "operation": operation, "side": name,
                       "difference": difference(f"{part} {operation}", name, firsts, args),
                       "first_mb": mb, "later_mb": mb and 0,
                       "seconds": [seconds] * (operation == "file")}
                for name, (seconds, _, mb) in firsts.items()}
        for k in tqdm(range(operation == "file", args.rounds), f"{part} {operation}", unit="round",
                      leave=False, disable=False):
            for name in names[k % len(names):] + names[:k % len(names)]:
                seconds, _, mb = sides[name](operation)
                rows[name]["seconds"].append(seconds)
                rows[name]["later_mb"] = mb and max(mb, rows[name]["later_mb"])
        counted = {}
        if part in COUNTED:
            counted = {"operations": float(sides["tiny_sd"](f"operations of {operation}")[1]),
                       "matrix_rate": float(sides["tiny_sd"]("rate")[1])}
        for row in rows.values():
            row |= counted | {"median": statistics.median(row["seconds"])}
            row["ratio"] = rows["tiny_sd"]["median"] / row["median"]
        results += rows.values()
    return results


def difference(what, name, firsts, args):
    """Return the largest difference between a side's first result and tiny_sd's.

    As a fraction of white in a picture, otherwise of the largest value. Failure if it is too large.
    """
    import numpy as np
    (_, ours, _), (_, result, _) = firsts["tiny_sd"], firsts[name]
    alike = result.size > 1 and not np.ptp(result)      # a loss is one number
    if result.shape != ours.shape or not np.isfinite(result).all() or alike:
        raise Failure(f"{what}: {name} returns {result.shape} instead of {ours.shape}, or no "
                      "finite numbers")
    allowed, white = TOLERANCE[args.dtype], np.abs(result).max()
    if what.endswith(("picture", "file")):
        allowed, white = 1.01 / 255 if args.dtype == "float32" else 1, 1
    found = float(np.abs(result - ours).max() / white)
    if found > allowed:
        raise Failure(f"{what}: {name} and tiny_sd differ by {found:.1e}, more than {allowed:.1e}")
    return found


def table(results):
    """Return the results as a Markdown table; differences as in difference().

    TFLOP/s counts the operations of the definitions, even if a side needs fewer. The share is
    relative to the speed of large matrix products in tiny_sd's process.
    """
    lines = [["", "side", "median s", "range s", "tiny_sd ÷ it", "TFLOP/s", "share",
              "peak MB at first", "peak MB later", "difference"], ["---"] * 2 + ["---:"] * 8]
    for row in results:
        peer, speed = row["side"] != "tiny_sd", row.get("operations", 0) / row["median"]
        lines.append([
            f"{row['part']} {row['operation']}", row["side"], f"{row['median']:.4g}",
            f"{min(row['seconds']):.4g}–{max(row['seconds']):.4g}",
            f"{row['ratio']:.2f}" if peer else "",
            f"{speed / 1e12:.3g}" if speed else "",
            f"{speed / row['matrix_rate']:.0%}" if speed else "",
            *(f"{mb:,.0f}" if mb else "" for mb in (row["first_mb"], row["later_mb"])),
            f"{row['difference']:.1e}" if peer else ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(device):
    facts = {"processor": platform.processor() or platform.machine(), "cores": cores(),
             "python": platform.python_version()}
    with contextlib.suppress(OSError, TypeError):
        facts["processor"] = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    if device == "cuda":
        import torch
        facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    for library in ("numpy", "torch", "diffusers", "transformers", "openvino"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[library] = importlib.metadata.version(library)
    return facts


def parse_arguments():
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"benchmark: {message} (--help lists the options)\n")

    parser = Parser(description="Time tiny_sd against other programs.", allow_abbrev=False)
    add = parser.add_argument
    add("--peer", action="append", choices=[*PEERS, "all", "none"],
        help="may be repeated (diffusers)")
    add("--part", action="append", choices=[*PARTS, "all"], help="may be repeated (all)")
    add("--backend", choices=("numpy", "torch"), help="tiny_sd's (numpy, if possible)")
    add("--dtype", choices=TOLERANCE, default="float32", help="(%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    add("--rounds", type=int, default=5, help="(%(default)s)")
    add("--threads", type=int, default=cores(), help="cores that each side may use (%(default)s)")
    add("--steps", type=int, default=20, help="of a picture (%(default)s)")
    add("--guidance", type=float, default=7.5, help="of a picture (%(default)s)")
    add("--model", choices=("sd15", "sdxl"), default="sd15", help="shapes of the random weights")
    add("--size", type=int, dest="own_size", metavar="PIXELS",
        help="height and width (512; the bundled model's own)")
    add("--batch", type=int, default=1, help="pictures at once (%(default)s)")
    add("--width", type=int, default=320,
        help="channels of the random U-Net's first level; 32 is quick (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the results there")
    args = parser.parse_args()
    plain, args.size = (args.device, args.dtype) == ("cpu", "float32"), args.own_size or 512
    args.backend = args.backend or ("numpy" if plain else "torch")
    several = {"all": ["diffusers", "openvino" if args.device == "cpu" else "compiled"], "none": []}
    args.peer = list(dict.fromkeys(p for peer in args.peer or ["diffusers"]
                                   for p in several.get(peer, [peer])))
    args.part = list(dict.fromkeys(p for part in args.part or ["all"]
                                   for p in ([*PARTS][:-1] if part == "all" else [part])))
    for right, message in [
            (args.backend == "torch" or plain, "--backend numpy computes in float32 on the CPU"),
            (args.device == "cpu" or "openvino" not in args.peer,
             "--peer openvino computes on the CPU"),
            (args.backend == "numpy" or "formulas" not in args.peer,
             "--peer formulas computes with NumPy"),
            (min(args.rounds, args.batch, args.steps) >= 1,
             "--rounds, --batch and --steps must be at least 1"),
            (64 <= args.size <= 4096 and args.size % 64 == 0,
             f"--size {args.size} is not a multiple of 64 up to 4096"),
            (32 <= args.width <= 320 and args.width % 32 == 0,
             f"--width {args.width} is not a multiple of 32 up to 320"),
            (hasattr(os, "sched_setaffinity") or args.threads == cores(),
             "--threads: this system cannot restrict a process"),
            (args.model == "sd15" or not {*COUNTED, "teach"} & {*args.part},
             "--model sdxl draws whole pictures: --part picture or loaded"),
            (1 <= args.threads <= cores(), f"--threads {args.threads} is not from 1 to {cores()}"),
            (not args.json or args.json.parent.is_dir(),
             f"there is no folder {args.json and args.json.parent} for --json"),
            (not args.json or not args.json.exists(), f"--json {args.json} exists already")]:
        if not right:
            parser.error(message)
    return args


@contextlib.contextmanager
def reserved(path):
    """Open a new file at once, so that nothing else takes its name; remove it if it stays empty."""
    with open(path, "x") if path else contextlib.nullcontext() as file:
        try:
            yield file
        finally:
            if file and not os.fstat(file.fileno()).st_size:
                path.unlink()


def run(args, report):
    """Print each part's results as soon as they are known, and write them to --json."""
    facts, results = machine(args.device), []
    print("; ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    for peer in list(args.peer):
        needed = ["torch", "diffusers", "transformers"] * (peer != "formulas")
        needed += ["openvino"] * (peer == "openvino")
        if missing := [library for library in needed if not importlib.util.find_spec(library)]:
            print(f"without {peer}: pip install {' '.join(missing)}")
            args.peer.remove(peer)
    for part in args.part:
        folder = ROOT / "weights/emoji" if part == "bundled" else random_model(args)
        if not folder.exists():
            print(f"without {part}: there is no {folder}")
            continue
        for peer in args.peer:
            if part not in PEERS[peer]:
                print(f"without {peer}: it has no part {part}")
        results += compare(part, args, folder)
        if args.json:
            found = {"machine": facts, "command": sys.argv[1:], "results": results}
            report.seek(0)
            report.truncate()
            report.write(json.dumps(found, indent=1))
            report.flush()
        print(f"\n{table([row for row in results if row['part'] == part])}\n", flush=True)


def main():
    args = parse_arguments()
    sys.stdout.reconfigure(errors="backslashreplace")       # for terminals without ×
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore",
                   "DIFFUSERS_VERBOSITY": "error"}
    if args.threads < cores():      # every process started from here on inherits it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.threads])
    try:
        with reserved(args.json) as report:
            run(args, report)
    except (Failure, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(draw(*sys.argv[2:]) if sys.argv[1:2] == ["draw"] else main())
