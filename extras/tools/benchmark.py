"""How fast tiny_sd is beside diffusers, torch.compile, OpenVINO and its own formulas.

The same weights and work, in turn:

    python -m extras.tools.benchmark                                     every part beside diffusers
    python -m extras.tools.benchmark --peer all --part unet --part vae   two parts, every peer
    python -m extras.tools.benchmark --peer formulas --part unet --rounds 1   what fast.py gains
    python -m extras.tools.benchmark --peer none --part unet --batch 4   itself alone
    python -m extras.tools.benchmark --width 32 --size 64 --rounds 2     a quick look, small model
    python -m extras.tools.benchmark --peer all --part unet --part loaded --device cuda \\
                                     --dtype float16 --batch 8
    python -m extras.tools.benchmark --model sdxl --part picture --size 1024 --steps 1 --rounds 1

`unet`: a step with guidance, both halves. `vae`: decoding, encoding. `text`: two prompts. `loaded`:
a picture in a process that holds the model already. `picture`: the same from the start of the
process to the file. `bundled`: that with weights/emoji. A picture is 20 steps of DPM++ 2M at
guidance 7.5; for its peak memory alone, --steps 1 is enough.

All but `bundled` read random float16 weights with Stable Diffusion 1.5's shapes, 2.1 GB, or SDXL's,
6.9 GB, written once among the temporary files. Each side is a process that waits while another
computes: first each gives a result, which must agree, then they are timed in turn; of programs that
draw into a file, which start again each time, the first run counts. All stay in memory: where that
is short, take one peer at a time. Memory counts the pages of mapped files.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import math
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

# Neither tiny_sd nor NumPy is imported here: that would choose threads for all sides.
ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "unet": ["step"], "vae": ["decode", "encode"], "text": ["encode"], "loaded": ["picture"],
    "picture": ["file"], "bundled": ["file"],
}
PEERS = {
    "diffusers": list(PARTS), "compiled": ["unet", "vae", "text", "loaded"],
    "openvino": ["unet", "vae", "text"], "formulas": ["unet", "vae", "text", "loaded"],
}
PROMPT, BUNDLED_PROMPT = "a lighthouse in a storm", "red apple on a blue background"
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}    # of the largest value


class Failure(Exception):
    """What ends the program with one line."""


# ── The model: random weights with the shapes of Stable Diffusion 1.5, or of SDXL ─────────────────

def configs(args):
    """Return the configs of the model that is timed."""
    from extras.tools import models
    return models.CONFIGS[args.model](args.width)


def random_model(args):
    """Return the folder of the random model, written among the temporary files if there is none.

    In a process of its own, to leave no memory behind.
    """
    version = zlib.crc32(json.dumps(configs(args)).encode())
    folder = Path(tempfile.gettempdir(), f"tiny_sd-{args.model}-{args.width}-{version:08x}")
    if not folder.exists():
        spawn = multiprocessing.get_context("spawn")
        writer = spawn.Process(target=write_model, args=(folder, args))
        writer.start()
        writer.join()
    return folder


def write_model(folder, args):
    import numpy as np

    from extras.tools import models
    unfinished = folder.with_name(f"{folder.name}-{os.getpid()}.part")
    save = functools.partial(models.save_random, dtype=np.float16)
    models.write_model(unfinished, configs(args), save=save).rename(folder)


def inputs(args):
    """Noise, channels last: latents, the context of both halves (negative, prompt), a picture."""
    import numpy as np

    rng, n, words = (
        np.random.default_rng(1), args.size // 8,
        configs(args)["unet"]["cross_attention_dim"],
    )
    return [
        rng.standard_normal(shape, np.float32)
        for shape in ((args.batch, n, n, 4), (2, 77, words), (args.batch, args.size, args.size, 3))
    ]


# ── The sides: {operation: call()} for a part; each call gives a NumPy array, channels last ───────

def tiny_sd(part, args, folder):
    import extras.fast  # noqa: F401  (before NumPy)
    return measured(part, args, folder)


def measured(part, args, folder):
    """Return the calls of tiny_sd, in whichever forms it computes by now."""
    import numpy as np

    import tiny_sd as sd
    from extras import like_diffusers

    model, (x, context, image) = (
        sd.load(folder, args.backend, args.device, args.dtype),
        inputs(args),
    )
    unet, vae = (
        (lambda values, like=network["conv_in"]["bias"]: sd.array_like(like, values))
        for network in (model.unet, model.vae["encoder"])
    )  # an array as the network's own
    denoise = sd.denoiser(
        model, unet(context), 0.5
    )  # the mean of the halves: a difference in either shows as it is

    def picture():
        *_, latents = like_diffusers.generate(
            model, PROMPT, sampler="dpm++2m", steps=args.steps, seeds=range(args.batch),
            guidance=args.guidance, width=args.size, height=args.size,
        )
        return sd.decode(model, latents) / np.float32(255)

    def rate():
        """What large matrix products reach, in operations a second: the best of five."""
        n = 8192 if args.device == "cuda" else 2048
        a, b = (
            unet(np.random.default_rng(k).standard_normal((n, n), np.float32)) for k in range(2)
        )  # a aᵀ takes half the work
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(4):
                y = sd.linear(a, b)
            sd.to_numpy(y[:1])                          # which waits for the GPU
            seconds.append(time.perf_counter() - start)
        return np.array(4 * 2 * n ** 3 / min(seconds))

    calls = {
        "unet": {"step": lambda: denoise(x, 500, 0.5)[1]},
        "vae": {
            "decode": lambda: sd.to_numpy(sd.vae_decode(vae(x), model.vae, 32)),
            "encode": lambda: np.concatenate(
                [*map(sd.to_numpy, sd.vae_encode(vae(image), model.vae, 32))], -1
            ),
        },
        "text": {"encode": lambda: sd.to_numpy(sd.embed_prompts(model, ["", PROMPT])[0])},
        "loaded": {"picture": picture},
    }[part]
    return (
        calls
        | {
            f"operations of {name}": functools.partial(operations, sd, call)
            for name, call in calls.items()
        }
        | {"rate": rate}
    )


def formulas(part, args, folder):
    """tiny_sd without extras/fast.py, and with the threads of BLAS instead."""
    os.environ |= {f"{library}_NUM_THREADS": str(cores())
                   for library in ("OPENBLAS", "VECLIB_MAXIMUM")}
    return measured(part, args, folder)


def operations(sd, call):
    """Count the multiplications and additions in the definitions of what a call computes.

    Those of its products, convolutions and attention.
    """
    import numpy as np
    counts = []

    def counted(function, count):
        def wrapped(*args, **kwargs):
            y = function(*args, **kwargs)
            counts.append(count(y, *args, **kwargs))
            return y
        return wrapped

    def product(y, x, weight, *_, **__):
        return 2 * math.prod(y.shape) * math.prod(weight.shape[1:])

    def attention(y, q, k, *_, **__):
        return 4 * math.prod(q.shape) * k.shape[-2]

    count = {"linear": product, "conv2d": product, "dot_product_attention": attention}
    originals = {name: getattr(sd, name) for name in count}
    for name, function in originals.items():
        setattr(sd, name, counted(function, count[name]))
    call()
    for name, function in originals.items():
        setattr(sd, name, function)
    return np.array(sum(counts))


def networks(part, args, folder, dtype):
    """Return {operation: (module, its inputs)} of diffusers' and transformers' networks.

    Each module gives one tensor.
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
    tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")(
        ["", PROMPT], padding="max_length", return_tensors="pt"
    )
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype)
    return {
        "encode": (
            Network(encoder, lambda encoder, ids: encoder(ids)[0]),
            (tokens.input_ids.to(args.device),),
        )
    }


def pipeline(folder, device, dtype):
    """diffusers' pipeline, and draw(prompt, size, batch, steps, guidance) -> PIL's pictures."""
    import torch
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
    torch.set_num_threads(cores())
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt, size, batch, steps, guidance):
        streams = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        return pipe(
            prompt, width=size, height=size, num_inference_steps=steps, guidance_scale=guidance,
            generator=streams, num_images_per_prompt=batch,
        ).images

    return pipe, draw


def diffusers(part, args, folder, compiled=False):
    import numpy as np
    import torch

    def faster(network):
        mode = "reduce-overhead" if args.device == "cuda" else None  # with CUDA graphs
        return (
            torch.compile(network.to(memory_format=torch.channels_last), mode=mode)
            if compiled
            else network
        )

    def operation(network, tensors):
        network = faster(network)

        @torch.inference_mode()
        def call():
            y = network(*tensors).float().cpu()         # which waits for the GPU
            return (y.permute(0, 2, 3, 1) if y.ndim == 4 else y).numpy()
        return call

    if part != "loaded":
        return {
            name: operation(*work)
            for name, work in networks(part, args, folder, getattr(torch, args.dtype)).items()
        }
    pipe, draw = pipeline(folder, args.device, args.dtype)
    pipe.unet, pipe.vae.decoder = faster(pipe.unet), faster(pipe.vae.decoder)
    return {
        "picture": lambda: np.stack(
            [
                np.float32(picture) / 255
                for picture in draw(PROMPT, args.size, args.batch, args.steps, args.guidance)
            ]
        )
    }


def openvino(part, args, folder):
    import numpy as np
    import openvino as ov
    import torch

    settings = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[
            args.dtype
        ],
        "INFERENCE_NUM_THREADS": cores(),
        "PERFORMANCE_HINT": "LATENCY",
    }

    def operation(network, tensors):
        with torch.inference_mode():
            model = ov.convert_model(network, example_input=tensors)
        model.reshape({port: list(t.shape) for port, t in zip(model.inputs, tensors)})
        run, arrays = ov.compile_model(model, "CPU", settings), [t.numpy() for t in tensors]
        return lambda: (lambda y: np.moveaxis(y, 1, -1) if y.ndim == 4 else y)(run(arrays)[0])

    return {
        name: operation(*work) for name, work in networks(part, args, folder, torch.float32).items()
    }


def program(side, part, args, folder):
    """The part's pictures by a program that draws them into files and ends."""
    import numpy as np
    from PIL import Image
    prompt, size = (BUNDLED_PROMPT, args.own_size) if part == "bundled" else (PROMPT, args.size)
    facts = [folder, args.device, args.dtype, args.batch, prompt, args.steps, size or ""]
    if side == "tiny_sd":
        names = ["-m", "--device", "--dtype", "-b", "-p", "--steps", "-W", "-H"]
        options = [word for pair in zip(names, facts + [size]) for word in pair][
            : None if size else 12
        ]
        command = [
            ROOT / "tiny_sd.py", *options, "--sampler", "dpm++2m", "--cfg-scale", args.guidance,
            "--backend", args.backend, "-o", "out.png",
        ]
    else:
        command = [__file__, "draw", *facts, args.guidance]

    def call():
        with tempfile.TemporaryDirectory() as here:
            done = subprocess.run(
                [sys.executable, *map(str, command)], cwd=here, capture_output=True, text=True
            )
            if done.returncode:
                raise Failure(" ".join(done.stderr.splitlines()[-1:]))
            return np.stack(
                [np.float32(Image.open(path)) / 255 for path in sorted(Path(here).glob("*.png"))]
            )

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
    """The largest memory in MB.

    Of the programs run; else since the last call, the GPU's or resident. None if unknown.
    """
    if PARTS[part] == ["file"]:
        import resource

        return (
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            * (1 if sys.platform == "darwin" else 1024)
            / 1e6
        )
    if device == "cuda":
        import torch
        peak = torch.cuda.max_memory_allocated() / 1e6
        torch.cuda.reset_peak_memory_stats()
        return peak
    with contextlib.suppress(OSError):
        peak = (
            int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
        )
        Path("/proc/self/clear_refs").write_text("5")       # the peak starts again
        return peak


def serve(pipe, side, part, args, folder):
    """What a side's process does.

    Answers the name of an operation with (seconds, result, MB), or tells its error.
    """
    try:
        sides = {
            "tiny_sd": tiny_sd, "diffusers": diffusers, "openvino": openvino, "formulas": formulas,
            "compiled": functools.partial(diffusers, compiled=True),
        }
        calls = (
            program(side, part, args, folder)
            if PARTS[part] == ["file"]
            else sides[side](part, args, folder)
        )
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
    """Starts a side's process; returns ask(operation) -> (seconds, result, MB)."""
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
        raise Failure(f"the process of {side} died: was there memory enough?")
    return ask


# ── The comparison ────────────────────────────────────────────────────────────────────────────────

def compare(part, args, folder):
    """The part's results, one for each operation and side.

    Failure, before anything is timed, if the sides disagree.
    """
    import numpy as np
    from tqdm import tqdm
    names = ["tiny_sd", *(peer for peer in args.peer if part in PEERS[peer])]
    sides, results = {name: start(name, part, args, folder) for name in names}, []
    for operation in PARTS[part]:
        rows, picture, ours = {}, operation in ("picture", "file"), None
        allowed = (
            TOLERANCE[args.dtype] if not picture else 1.01 / 255 if args.dtype == "float32" else 1
        )
        for name in names:
            seconds, result, mb = sides[name](operation)
            ours = result if ours is None else ours
            if result.shape != ours.shape or not np.isfinite(result).all() or not np.ptp(result):
                raise Failure(
                    f"{part} {operation}: {name} gives {result.shape} instead of {ours.shape}, "
                    "or not numbers"
                )
            difference = float(
                np.abs(result - ours).max() / (1 if picture else np.abs(result).max())
            )
            if difference > allowed:
                raise Failure(
                    f"{part} {operation}: {name} and tiny_sd differ by {difference:.1e}, "
                    f"more than {allowed:.1e}"
                )
            rows[name] = {
                "part": part, "operation": operation, "side": name, "difference": difference,
                "first_mb": mb, "later_mb": mb and 0, "seconds": [seconds] * (operation == "file"),
            }
        for k in tqdm(
            range(operation == "file", args.rounds), f"{part} {operation}", unit="round",
            leave=False, disable=False,
        ):
            for name in names[k % len(names):] + names[:k % len(names)]:
                seconds, _, mb = sides[name](operation)
                rows[name]["seconds"].append(seconds)
                rows[name]["later_mb"] = mb and max(mb, rows[name]["later_mb"])
        if not picture:
            counted, rate = (
                float(sides["tiny_sd"](name)[1]) for name in (f"operations of {operation}", "rate")
            )
        for row in rows.values():
            row |= {} if picture else {"operations": counted, "matrix_rate": rate}
            row["median"] = statistics.median(row["seconds"])
            row["ratio"] = statistics.median(rows["tiny_sd"]["seconds"]) / row["median"]
        results += rows.values()
    return results


def table(results):
    """As Markdown. A difference is of the largest value; in a picture, of white.

    TFLOP/s counts the operations of the definitions, whatever a side saves of them, and the share
    is of what large matrix products reach in tiny_sd's process.
    """
    lines = [
        [
            "", "side", "median s", "range s", "tiny_sd ÷ it", "TFLOP/s", "share",
            "peak MB at first", "peak MB later", "difference",
        ],
        ["---"] * 2 + ["---:"] * 8,
    ]
    for row in results:
        ratio, difference = (
            ("", "")
            if row["side"] == "tiny_sd"
            else (f"{row['ratio']:.2f}", f"{row['difference']:.1e}")
        )
        lines.append(
            [
                f"{row['part']} {row['operation']}", row["side"], f"{row['median']:.4g}",
                f"{min(row['seconds']):.4g}–{max(row['seconds']):.4g}", ratio,
                *(
                    (f"{speed / 1e12:.3g}", f"{speed / row['matrix_rate']:.0%}")
                    if (speed := row.get("operations", 0) / row["median"])
                    else ("", "")
                ),
                *(f"{mb:,.0f}" if mb else "" for mb in (row["first_mb"], row["later_mb"])),
                difference,
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(device):
    facts = {
        "processor": platform.processor() or platform.machine(), "cores": cores(),
        "python": platform.python_version(),
    }
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

    parser = Parser(description="Time tiny_sd beside other programs.", allow_abbrev=False)
    add = parser.add_argument
    add(
        "--peer", action="append", choices=[*PEERS, "all", "none"],
        help="may be repeated (diffusers)",
    )
    add("--part", action="append", choices=[*PARTS, "all"], help="may be repeated (all)")
    add("--backend", choices=("numpy", "torch"), help="tiny_sd's: numpy, unless only torch can")
    add("--dtype", choices=TOLERANCE, default="float32", help="(%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    add("--rounds", type=int, default=5, help="(%(default)s)")
    add("--threads", type=int, default=cores(), help="cores that each side may use (%(default)s)")
    add("--steps", type=int, default=20, help="of a picture (%(default)s)")
    add("--guidance", type=float, default=7.5, help="of a picture (%(default)s)")
    add("--model", choices=("sd15", "sdxl"), default="sd15", help="shapes of the random weights")
    add(
        "--size", type=int, dest="own_size", metavar="PIXELS",
        help="height and width (512; the bundled model's own)",
    )
    add("--batch", type=int, default=1, help="pictures at once (%(default)s)")
    add(
        "--width", type=int, default=320,
        help="channels of the random U-Net's first level; 32 is quick (%(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="also write the results there")
    args = parser.parse_args()
    plain, args.size = (args.device, args.dtype) == ("cpu", "float32"), args.own_size or 512
    args.backend = args.backend or ("numpy" if plain else "torch")
    every = ["diffusers", "openvino" if args.device == "cpu" else "compiled"]
    several = {"all": every, "none": []}
    args.peer = list(
        dict.fromkeys(p for peer in args.peer or ["diffusers"] for p in several.get(peer, [peer]))
    )
    args.part = list(
        dict.fromkeys(
            p for part in args.part or ["all"] for p in (PARTS if part == "all" else [part])
        )
    )
    for right, message in [
        (args.backend == "torch" or plain, "--backend numpy computes in float32 on the CPU"),
        (
            args.device == "cpu" or "openvino" not in args.peer,
            "--peer openvino computes on the CPU",
        ),
        (
            args.backend == "numpy" or "formulas" not in args.peer,
            "--peer formulas computes with NumPy",
        ),
        (
            min(args.rounds, args.batch, args.steps) >= 1,
            "--rounds, --batch and --steps are at least 1",
        ),
        (
            64 <= args.size <= 4096 and args.size % 64 == 0,
            f"--size {args.size} is not a multiple of 64 up to 4096",
        ),
        (
            32 <= args.width <= 320 and args.width % 32 == 0,
            f"--width {args.width} is not a multiple of 32 up to 320",
        ),
        (
            hasattr(os, "sched_setaffinity") or args.threads == cores(),
            "--threads: this system cannot restrict a process",
        ),
        (
            args.model == "sd15" or not {"unet", "vae", "text"} & {*args.part},
            "--model sdxl draws whole pictures: --part picture or loaded",
        ),
        (1 <= args.threads <= cores(), f"--threads {args.threads} is not from 1 to {cores()}"),
        (
            not args.json or args.json.parent.is_dir(),
            f"there is no folder {args.json and args.json.parent} for --json",
        ),
    ]:
        if not right:
            parser.error(message)
    return args


def run(args):
    """Prints, and writes to --json, each part's results as soon as they are known."""
    facts, results = machine(args.device), []
    print("; ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    for peer in list(args.peer):
        needed = [
            "torch", "diffusers", "transformers", *(["openvino"] if peer == "openvino" else []),
        ] * (peer != "formulas")
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
        print(f"\n{table([row for row in results if row['part'] == part])}\n", flush=True)
        if args.json:
            args.json.write_text(
                json.dumps(
                    {"machine": facts, "command": sys.argv[1:], "results": results}, indent=1
                )
            )


def main():
    args = parse_arguments()
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore",
        "DIFFUSERS_VERBOSITY": "error",
    }
    if args.threads < cores():      # every process started from here on inherits it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.threads])
    try:
        run(args)
    except (Failure, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(draw(*sys.argv[2:]) if sys.argv[1:2] == ["draw"] else main())
