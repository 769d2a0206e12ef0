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
import multiprocessing
import resource
import statistics
import time

from extras.tools import benchmark

CAPTION = "a zorp on a red background"


def tiny_sd_steps(args, folder):
    """Yield after each step, as teach.py takes it."""
    from extras import formats
    from extras.training import teach, lora  # isort: skip  (BLAS is set up before torch is loaded)
    import numpy as np

    import tiny_sd
    model = formats.load(folder, "torch", "cpu", args.dtype)
    model.vae = None
    options = [str(folder), "-o", "none.safetensors", "--dtype", args.dtype, "--steps", "100",
               "--rate", "1e-4", "-b", "1", *["--save-memory"] * args.save_memory]
    latents = np.random.standard_normal((1, args.size // 8, args.size // 8, 4))
    teaching = lora.Teaching(model, latents, [CAPTION], teach.parse_arguments(options))
    while True:
        teaching.step()
        yield len(teaching.pairs), sum(p.numel() for p in teaching.matrices), tiny_sd


def diffusers_steps(args, folder):
    """Yield after each step, as train_text_to_image_lora.py takes it."""
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
    while True:
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
        yield len(matrices) // 2, sum(p.numel() for p in matrices), scheduler


SIDES = {"tiny_sd": tiny_sd_steps, "diffusers": diffusers_steps}


def measured(side, args, folder, pipe):
    """Send what a side needs: processor's and clock's seconds of each step, and memory in MB."""
    steps, seconds = SIDES[side](args, folder), []
    next(steps)
    for _ in range(args.steps):
        begun = time.process_time(), time.perf_counter()
        count, size, _ = next(steps)
        seconds.append([time.process_time() - begun[0], time.perf_counter() - begun[1]])
    pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, count, size))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--save-memory", action="store_true")
    args, processes = parser.parse_args(), multiprocessing.get_context("spawn")
    args.model = "sd15"
    folder = benchmark.random_model(args)
    for side in SIDES:
        ours, theirs = processes.Pipe()
        process = processes.Process(target=measured, args=(side, args, folder, theirs))
        process.start()
        theirs.close()
        seconds, megabytes, count, size = ours.recv()
        process.join()
        cpu, clock = (statistics.median(column) for column in zip(*seconds))
        print(f"{side}: {cpu:.2f} s of the processor a step, {clock:.2f} s by the clock; "
              f"{megabytes:,.0f} MB at most; {count} LoRAs, {size:,} numbers", flush=True)


if __name__ == "__main__":
    main()
