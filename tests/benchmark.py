"""How fast tiny_sd is beside diffusers, torch.compile and OpenVINO: the same weights, the same work, in turn.

    python tests/benchmark.py                                       every part beside diffusers, float32 on the CPU
    python tests/benchmark.py --peer all --part unet --part vae     beside every peer, two parts
    python tests/benchmark.py --width 32 --size 64 --rounds 2       all of it on a small model, in a minute or two
    python tests/benchmark.py --device cuda --dtype float16 --peer all --part unet --part loaded --batch 8

The parts: `unet`, a step of guided sampling, both halves; `vae`, decoding and encoding; `text`, two prompts; `loaded`, a
whole picture in a process that holds the model already; `picture`, the same from the start of the process to the file;
`bundled`, that with weights/emoji. A picture takes 20 steps of DPM++ 2M at guidance 7.5.

All parts but `bundled` read one folder of random float16 weights with Stable Diffusion 1.5's shapes (2.1 GB, written
once among the temporary files). Each side is a process of its own, and only one of them computes at a time: each is asked
once for a result that all must agree on, and then in turn for the times. All sides stay in memory meanwhile: compare
with one peer after the other where it is short. What a side prepares for a picture, such as the keys and values of
the words, is prepared in its first call. The file's pages that a process has mapped count as its memory.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent       # neither NumPy nor tiny_sd up here: they would choose threads for all
PARTS = {"unet": ["step"], "vae": ["decode", "encode"], "text": ["encode"], "loaded": ["picture"], "picture": ["file"],
         "bundled": ["file"]}
NEEDS = {"diffusers": ["torch", "diffusers", "transformers"], "compiled": ["torch", "diffusers", "transformers"],
         "openvino": ["torch", "diffusers", "transformers", "openvino"]}
DOES = {"diffusers": list(PARTS), "compiled": ["unet", "vae", "text", "loaded"], "openvino": ["unet", "vae", "text"]}
UNASKED = [("cuda", "openvino"), ("cpu", "compiled")]       # what `--peer all` leaves out
PROMPT = "a lighthouse in a storm"
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}    # of the largest value; a picture's: a grey level


class Failure(Exception):
    """What ends the program with one line."""


# ── The model: random weights with the shapes of Stable Diffusion 1.5 ──────────────────────────────────────────────

def configs(width=320):
    """The configs of Stable Diffusion 1.5, the channels as if the U-Net's first level had `width` of them."""
    def scaled(n, step=32):
        return max(step, round(n * width / 320 / step) * step)

    words, attn, vae = scaled(768, 64), "CrossAttn", [scaled(n) for n in (128, 256, 512, 512)]
    return {
        "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "quick_gelu",
                         "hidden_size": words, "intermediate_size": 4 * words, "num_attention_heads": words // 64,
                         "projection_dim": words, "num_hidden_layers": 12, "vocab_size": 49408,
                         "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407},
        "vae": {"_class_name": "AutoencoderKL", "block_out_channels": vae, "layers_per_block": 2, "latent_channels": 4,
                "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
                "in_channels": 3, "out_channels": 3, "sample_size": 512, "scaling_factor": 0.18215},
        "unet": {"_class_name": "UNet2DConditionModel", "block_out_channels": [scaled(n) for n in (320, 640, 1280, 1280)],
                 "layers_per_block": 2, "cross_attention_dim": words, "attention_head_dim": 8, "sample_size": 64,
                 "in_channels": 4, "out_channels": 4, "down_block_types": [f"{attn}DownBlock2D"] * 3 + ["DownBlock2D"],
                 "up_block_types": ["UpBlock2D"] + [f"{attn}UpBlock2D"] * 3},
        "scheduler": {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "skip_prk_steps": True,
                      "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False}}


def write_model(folder, width):
    """The model as a diffusers folder, in float16: matrices that keep the variance, scales of one, shifts of zero."""
    import numpy as np
    from safetensors.numpy import save_file
    sys.path.insert(0, str(ROOT))
    import tiny_sd as sd
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.part")

    def write(name, content):
        path = unfinished / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")

    rng, tokenizer, config = np.random.default_rng(0), sd.clip_tokenizer(), configs(width)

    def draw(name, shape):
        if len(shape) == 1:
            return np.full(shape, name.endswith("weight"), np.float16)
        z = rng.standard_normal(shape, np.float32)
        z *= z[0].size ** -0.5
        return z.astype(np.float16)

    for part, stem in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model"), ("unet", "diffusion_pytorch_model")):
        write(f"{part}/config.json", config[part])
        prefix = "text_model." if part == "text_encoder" else ""
        arrays = {prefix + name: draw(name, shape) for name, shape in sd.flatten(sd.SHAPES[part](config[part])).items()}
        save_file(arrays, unfinished / part / f"{stem}.safetensors", {"format": "pt"})
    write("scheduler/scheduler_config.json", config["scheduler"])
    write("tokenizer/tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77,
                                              "pad_token": tokenizer.EOS, "unk_token": tokenizer.EOS})
    write("tokenizer/vocab.json", tokenizer.vocab)
    write("tokenizer/merges.txt", "\n".join(["#version: 0.2", *map(" ".join, tokenizer.rank)]) + "\n")
    write("model_index.json", {
        "_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "PNDMScheduler"], "safety_checker": [None, None],
        "feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False})
    unfinished.rename(folder)


def inputs(args):
    """Noise of three shapes: latents, the context of both halves (negative, prompt), a picture; channels last."""
    import numpy as np
    rng, n = np.random.default_rng(1), args.size // 8
    words = configs(args.width)["unet"]["cross_attention_dim"]
    return [rng.standard_normal(shape, np.float32) for shape in
            ((args.batch, n, n, 4), (2, 77, words), (args.batch, args.size, args.size, 3))]


# ── The sides: each gives {operation: call() -> NumPy array, channels last} ────────────────────────────────────────

def tiny_sd(part, args, folder):
    import numpy as np
    sys.path.insert(0, str(ROOT))
    import tiny_sd as sd
    model, (x, context, image) = sd.load(folder, args.backend, args.device, args.dtype), inputs(args)

    def to(network, values):
        return sd.array_like(network["conv_in"]["bias"], values)

    def picture():
        *_, latents = sd.generate(model, PROMPT, seeds=range(args.batch), width=args.size, height=args.size)
        return sd.decode(model, latents) / np.float32(255)

    unet, vae = model.unet, model.vae
    denoise = sd.denoiser(model, to(unet, context), 0.5)    # the mean of the halves: a difference in either is seen as it is
    return {"unet": {"step": lambda: denoise(x, 500, 0.5)[1]},
            "vae": {"decode": lambda: sd.to_numpy(sd.vae_decode(to(vae["encoder"], x), vae, 32)),
                    "encode": lambda: np.concatenate([*map(sd.to_numpy, sd.vae_encode(to(vae["encoder"], image), vae, 32))], -1)},
            "text": {"encode": lambda: sd.to_numpy(sd.encode_prompts(model, ["", PROMPT]))},
            "loaded": {"picture": picture}}[part]


def networks(part, args, folder, dtype):
    """diffusers' and transformers' networks: {operation: (module, its inputs)}, each giving one tensor."""
    import torch
    torch.set_num_threads(cores())
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    class Network(torch.nn.Module):
        def __init__(self, network, forward):
            super().__init__()
            self.network, self.call = network.to(args.device).eval(), forward

        def forward(self, *tensors):
            return self.call(self.network, *tensors)

    def step(unet, x, t, words):
        uncond, cond = unet(torch.cat([x, x]), t, words).sample.chunk(2)
        return uncond + 0.5 * (cond - uncond)

    def moments(vae, image):
        q = vae.encode(image).latent_dist
        return torch.cat([q.mean, q.logvar], 1)

    x, context, image = (torch.from_numpy(a).to(args.device, dtype) for a in inputs(args))
    x, image = x.permute(0, 3, 1, 2).contiguous(), image.permute(0, 3, 1, 2).contiguous()
    if part == "unet":
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype)
        t = torch.tensor(500.0, device=args.device)
        return {"step": (Network(unet, step), (x, t, context.repeat_interleave(args.batch, 0)))}
    if part == "vae":
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype)
        return {"decode": (Network(vae, lambda vae, z: vae.decode(z).sample), (x,)),
                "encode": (Network(vae, moments), (image,))}
    tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")(["", PROMPT], padding="max_length", return_tensors="pt")
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype)
    return {"encode": (Network(encoder, lambda encoder, ids: encoder(ids)[0]), (tokens.input_ids.to(args.device),))}


def pipeline(folder, device, dtype):
    """diffusers' pipeline with the sampler of the comparison; draw(prompt, size, batch) -> pictures of PIL."""
    import torch
    torch.set_num_threads(cores())
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype), safety_checker=None).to(device)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt, size, batch):
        streams = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        return pipe(prompt, width=size, height=size, num_inference_steps=20, guidance_scale=7.5, generator=streams,
                    num_images_per_prompt=batch).images
    return pipe, draw


def diffusers(part, args, folder, compiled=False):
    import numpy as np
    import torch

    def faster(module):
        mode = "reduce-overhead" if args.device == "cuda" else None     # CUDA graphs
        return torch.compile(module.to(memory_format=torch.channels_last), mode=mode) if compiled else module

    if part == "loaded":
        pipe, draw = pipeline(folder, args.device, args.dtype)
        pipe.unet, pipe.vae.decoder = faster(pipe.unet), faster(pipe.vae.decoder)
        return {"picture": lambda: np.float32(draw(PROMPT, args.size, args.batch)) / 255}

    def operation(module, tensors):
        module, last = faster(module), lambda y: y.permute(0, 2, 3, 1) if y.ndim == 4 else y
        tensors = [t.to(memory_format=torch.channels_last) if compiled and t.ndim == 4 else t for t in tensors]

        @torch.inference_mode()
        def call():
            return last(module(*tensors)).float().cpu().numpy()      # waits for the GPU
        return call

    return {name: operation(*work) for name, work in networks(part, args, folder, getattr(torch, args.dtype)).items()}


def compiled(part, args, folder):
    return diffusers(part, args, folder, True)


def openvino(part, args, folder):
    import numpy as np
    import openvino as ov
    import torch
    settings = {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[args.dtype],
                "INFERENCE_NUM_THREADS": cores(), "PERFORMANCE_HINT": "LATENCY"}

    def operation(module, tensors):
        with torch.inference_mode():
            model = ov.convert_model(module, example_input=tensors)
        model.reshape({port: list(t.shape) for port, t in zip(model.inputs, tensors)})
        run, arrays = ov.compile_model(model, "CPU", settings), [t.numpy() for t in tensors]
        return lambda: (lambda y: np.moveaxis(y, 1, -1) if y.ndim == 4 else y)(run(arrays)[0])

    return {name: operation(*work) for name, work in networks(part, args, folder, torch.float32).items()}


# ── Processes: one that stays for each side, or one for each picture ───────────────────────────────────────────────

def cores():
    """How many cores this process may use: what every side gets."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def peak_memory(device):
    """The most memory in MB, the GPU's or resident, that this process held since the last call; None if unknown."""
    if device == "cuda":
        import torch
        peak = torch.cuda.max_memory_allocated() / 1e6
        torch.cuda.reset_peak_memory_stats()
        return peak
    try:
        peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        Path("/proc/self/clear_refs").write_text("5")
        return int(peak[1]) * 1024 / 1e6
    except OSError:
        return None


def serve(pipe, side, part, args, folder):
    """What a side's process does: answers the name of an operation with (seconds, its result, the peak of memory)."""
    try:
        operations = {"tiny_sd": tiny_sd, "diffusers": diffusers, "compiled": compiled, "openvino": openvino}[side](part, args, folder)
        while True:
            call = operations[pipe.recv()]
            start = time.perf_counter()
            result = call()
            pipe.send((time.perf_counter() - start, result, peak_memory(args.device)))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])


class Worker:
    """A side in a process that stays."""

    def __init__(self, side, part, args, folder):
        spawn = multiprocessing.get_context("spawn")
        self.name, (self.pipe, end) = side, spawn.Pipe()
        spawn.Process(target=serve, args=(end, side, part, args, folder), daemon=True).start()
        end.close()

    def call(self, operation):
        self.pipe.send(operation)
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise Failure(f"the process of {self.name} died; was there memory enough?") from None
        if isinstance(answer, str):
            raise Failure(f"{self.name}: {answer}")
        return answer

    def close(self):
        self.pipe.close()       # which ends the process


class Program:
    """A side as a program that draws into a file and ends."""

    def __init__(self, side, part, args, folder):
        prompt = "red apple on a blue background" if part == "bundled" else PROMPT
        size = () if part == "bundled" and not args.chosen_size else (str(args.size),)
        self.name, self.environment = side, dict(os.environ)
        self.command = [sys.executable, __file__, "draw", folder, args.device, args.dtype, prompt, str(args.batch), *size]
        if side == "tiny_sd":
            options = {"-m": folder, "-o": "out.png", "-b": args.batch, "--backend": args.backend, "--device": args.device,
                       "--dtype": args.dtype, **dict.fromkeys(("-W", "-H") if size else (), args.size)}
            self.command = [sys.executable, ROOT / "tiny_sd.py", prompt, *(str(x) for pair in options.items() for x in pair)]

    def call(self, operation):
        import numpy as np
        from PIL import Image
        with tempfile.TemporaryDirectory() as here:
            with open(Path(here) / "stderr", "wb") as errors:
                start = time.perf_counter()
                child = subprocess.Popen(self.command, cwd=here, stdout=subprocess.DEVNULL, stderr=errors)
                _, status, usage = os.wait4(child.pid, 0)
                seconds = time.perf_counter() - start
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode:
                said = Path(here, "stderr").read_text(errors="replace").split("\n")
                raise Failure(f"{self.name} ended with {child.returncode}: {''.join(said[-2:])}")
            pictures = [np.asarray(Image.open(path), np.float32) / 255 for path in sorted(Path(here).glob("*.png"))]
        return seconds, np.stack(pictures), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6

    def close(self):
        pass


def draw(folder, device, dtype, prompt, batch, size=None):
    """The peer's program for `picture` and `bundled`, run by this file's name and the word draw."""
    _, pictures = pipeline(folder, device, dtype)
    for i, picture in enumerate(pictures(prompt, size and int(size), int(batch))):
        picture.save(f"out-{i:03d}.png")


# ── The comparison ─────────────────────────────────────────────────────────────────────────────────────────────────

def compare(part, sides, args):
    """Results of a part, one for each operation and side; Failure if the sides disagree, before anything is timed."""
    import numpy as np
    results = []
    for operation in PARTS[part]:
        first, whole = [side.call(operation) for side in sides], operation in ("picture", "file")
        allowed = TOLERANCE[args.dtype] if not whole else 1.01 / 255 if args.dtype == "float32" else 1
        rows = []
        for side, (_, result, peak) in zip(sides, first):
            ours = first[0][1]
            if result.shape != ours.shape or not np.isfinite(result).all() or not np.ptp(result):
                raise Failure(f"{part} {operation}: {side.name} gives no sound array of shape {ours.shape}")
            difference = float(np.abs(result - ours).max() / (1 if whole else np.abs(result).max()))
            if difference > allowed:
                raise Failure(f"{part} {operation}: {side.name} and tiny_sd differ by {difference:.1e}, more than {allowed:.1e}")
            rows.append({"part": part, "operation": operation, "side": side.name, "difference": difference, "loading_mb": peak,
                         "running_mb": peak and 0, "seconds": []})
        for k in range(args.rounds * len(sides)):
            i = (k + k // len(sides)) % len(sides)      # in turn, each round from another side on
            seconds, _, peak = sides[i].call(operation)
            rows[i]["seconds"].append(round(seconds, 6))
            rows[i]["running_mb"] = peak and max(peak, rows[i]["running_mb"])
        for row in rows:
            row["median"] = statistics.median(row["seconds"])
            row["ratio"] = statistics.median(rows[0]["seconds"]) / row["median"]
        results += rows
    return results


def table(results):
    """The results as Markdown; a difference is of the largest value, or of white in a picture."""
    def cells(row):
        ours, mb = row["side"] == "tiny_sd", lambda n: f"{n:,.0f}" if n else ""
        return [f"{row['part']} {row['operation']}", row["side"], f"{row['median']:.4g}",
                f"{min(row['seconds']):.4g}–{max(row['seconds']):.4g}", "" if ours else f"{row['ratio']:.2f}",
                mb(row["loading_mb"]), mb(row["running_mb"]), "" if ours else f"{row['difference']:.1e}"]

    head = ["", "side", "median s", "range s", "tiny_sd ÷ it", "peak MB, first call", "peak MB, later", "largest difference"]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * 2 + ["---:"] * 6, *map(cells, results)])


def machine(args):
    """Processor, cores and versions, as {name: value}."""
    facts = {"processor": platform.processor() or platform.machine(), "cores": cores(), "python": platform.python_version()}
    with contextlib.suppress(OSError, TypeError):
        facts["processor"] = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    if args.device == "cuda":
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

    parser = Parser(description="Time tiny_sd beside other programs.", allow_abbrev=False)
    add = parser.add_argument
    add("--peer", action="append", choices=[*DOES, "all"], help="may be repeated (diffusers)")
    add("--part", action="append", choices=[*PARTS, "all"], help="may be repeated (all)")
    add("--backend", choices=("numpy", "torch"), help="tiny_sd's: numpy, unless the type or a GPU needs torch")
    add("--dtype", choices=TOLERANCE, default="float32", help="(%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    add("--rounds", type=int, default=5, help="(%(default)s)")
    add("--threads", type=int, help="cores that each side may use (all)")
    add("--size", type=int, help="height and width in pixels (512; `bundled`: the model's own)")
    add("--batch", type=int, default=1, help="pictures at once (%(default)s)")
    add("--width", type=int, default=320, help="channels of the random U-Net's first level: 32 for a quick look (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the results there")
    args = parser.parse_args()
    plain, args.chosen_size, args.size = (args.device, args.dtype) == ("cpu", "float32"), args.size, args.size or 512
    args.backend = args.backend or ("numpy" if plain else "torch")
    peers = args.peer or ["diffusers"]
    args.peer = [peer for peer in DOES if peer in peers or "all" in peers and not (args.device, peer) in UNASKED]
    args.part = [part for part in PARTS if part in (args.part or ["all"]) or "all" in (args.part or ["all"])]
    for right, message in [
            (args.backend == "torch" or plain, "--backend numpy computes in float32 on the CPU"),
            (args.rounds >= 1 and args.batch >= 1, "--rounds and --batch are at least 1"),
            (64 <= args.size <= 4096 and args.size % 64 == 0, f"--size {args.size} is not a multiple of 64 up to 4096"),
            (32 <= args.width <= 320 and args.width % 32 == 0, f"--width {args.width} is not a multiple of 32 up to 320"),
            (args.threads is None or 1 <= args.threads <= cores(), f"--threads {args.threads} is not from 1 to {cores()}"),
            (args.threads is None or hasattr(os, "sched_setaffinity"), "--threads: this system cannot restrict a process"),
            (args.device == "cpu" or "openvino" not in args.peer, "--peer openvino computes on the CPU here"),
            (not args.json or args.json.parent.is_dir(), f"there is no folder for --json {args.json}")]:
        if not right:
            parser.error(message)
    return args


def run(args):
    """Prints a table for each part as soon as it is measured; returns the results of all."""
    facts, results = machine(args), []
    print("; ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    for peer in list(args.peer):
        if missing := [library for library in NEEDS[peer] if not importlib.util.find_spec(library)]:
            print(f"without {peer}: pip install {' '.join(missing)}")
            args.peer.remove(peer)
    folder = Path(tempfile.gettempdir()) / f"tiny_sd-benchmark-{args.width}"
    if not folder.exists() and args.part != ["bundled"]:
        print(f"writing random weights to {folder}", flush=True)
        writer = multiprocessing.get_context("spawn").Process(target=write_model, args=(folder, args.width))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise Failure(f"could not write {folder}")
    for part in args.part:
        path = ROOT / "weights" / "emoji" if part == "bundled" else folder
        if not path.exists():
            print(f"without {part}: there is no {path}")
            continue
        for peer in args.peer:
            if part not in DOES[peer]:
                print(f"without {peer}: it has no part {part}")
        names = ["tiny_sd", *(peer for peer in args.peer if part in DOES[peer])]
        sides = [(Program if PARTS[part] == ["file"] else Worker)(name, part, args, path) for name in names]
        try:
            measured = compare(part, sides, args)
        finally:
            for side in sides:
                side.close()
        print(f"\n{table(measured)}\n", flush=True)
        results += measured
        if args.json:
            args.json.write_text(json.dumps({"machine": facts, "command": sys.argv[1:], "results": results}, indent=1))


def main():
    os.environ["HF_HUB_OFFLINE"] = "1"
    args = parse_arguments()
    if args.threads:        # every process that starts from here inherits it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.threads])
    try:
        run(args)
    except Failure as failure:
        print(f"benchmark: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(draw(*sys.argv[2:]) if sys.argv[1:2] == ["draw"] else main())
