"""A step of teach.py beside one of peft and diffusers, as diffusers' own script takes it.

    python -m extras.tools.teach_benchmark                         Stable Diffusion 1.5's shapes
    python -m extras.tools.teach_benchmark --width 32 --size 128   a quick look, small model
    python -m extras.tools.teach_benchmark --save-memory           both recompute their layers

The same work: rank 8 on the same matrices, one picture, latents encoded before, its caption encoded
in each step, AdamW. Each side is a process of its own, one after the other, since both together
need much memory. Weights are those of benchmark.py. Seconds are those of the processor, which
other programs do not change much, and those of the clock; the first step is not counted.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

from extras.tools import benchmark

CAPTION = "a zorp on a red background"


def tiny_sd_side(args, folder):
    """Return a step as teach.py takes it, and the matrices that it trains."""
    from extras import formats
    from extras.training import teach, lora  # isort: skip  (BLAS is set up before torch is loaded)
    import numpy as np
    model = formats.load(folder, "torch", "cpu", args.dtype)
    model.vae = None
    options = [str(folder), "-o", "none.safetensors", "--dtype", args.dtype, "--steps", "100",
               "--rate", "1e-4", "-b", "1", *["--save-memory"] * args.save_memory]
    latents = np.random.standard_normal((1, args.size // 8, args.size // 8, 4))
    teaching = lora.Teaching(model, latents, [CAPTION], teach.parse_arguments(options))
    return teaching.step, teaching.matrices


def diffusers_side(args, folder):
    """Return a step as train_text_to_image_lora.py takes it, and the matrices that it trains."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig
    from transformers import CLIPTextModel, CLIPTokenizer
    dtype = getattr(torch, args.dtype)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=dtype)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    unet.requires_grad_(False)
    text_encoder.requires_grad_(False)
    names = [f"{name}.{inner}" for name, module in unet.named_modules()
             if type(module).__name__ == "Transformer2DModel"
             for inner, layer in module.named_modules()
             if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))]
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian",
                                target_modules=names))
    cast_training_params(unet, torch.float32)
    if args.save_memory:
        unet.enable_gradient_checkpointing()
        unet.train()
    matrices = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(matrices, 1e-4)
    latents = torch.randn(1, 4, args.size // 8, args.size // 8).to(dtype)

    def step():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            noise, t = torch.randn_like(latents), torch.randint(0, 1000, (1,))
            ids = tokenizer(CAPTION, padding="max_length", return_tensors="pt").input_ids
            context = text_encoder(ids)[0]
            predicted = unet(scheduler.add_noise(latents, noise, t), t, context).sample
            loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(matrices, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step, matrices


SIDES = {"tiny_sd": tiny_sd_side, "diffusers": diffusers_side}


def measure(args):
    """Print what a side needs for a step, and how much it trains."""
    step, matrices = SIDES[args.side](args, benchmark.random_model(args))
    step()
    cpu, clock = [], []
    for _ in range(args.steps):
        begun = time.process_time(), time.perf_counter()
        step()
        cpu.append(time.process_time() - begun[0])
        clock.append(time.perf_counter() - begun[1])
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{args.side}: {statistics.median(cpu):.2f} s of the processor a step, "
          f"{statistics.median(clock):.2f} s by the clock; {megabytes:,.0f} MB at most; "
          f"{len(matrices) // 2} LoRAs, {sum(p.numel() for p in matrices):,} numbers", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("side", nargs="?", choices=SIDES, help="only this one, in this process")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--save-memory", action="store_true")
    parser.set_defaults(model="sd15")
    args = parser.parse_args()
    if args.side:
        measure(args)
    else:
        for side in SIDES:
            subprocess.run([sys.executable, "-m", __spec__.name, side, *sys.argv[1:]], check=True)
