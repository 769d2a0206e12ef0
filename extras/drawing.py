"""Turn a job of the command line into calls of the library.

A job is the record of a command's options (cli.Job). Once the model is loaded, filled() replaces
missing options by the model's own.
"""

from functools import partial

import tiny_sd
from extras import (
    comfy,
    control,
    facts,
    files,
    formats,
    guidance,
    in_time,
    larger,
    like_diffusers,
    prompts,
    samplers,
    things,
)
from extras.checks import check_memory, free_memory
from tiny_sd import SAMPLERS, require


def load_model(job):
    """Load a job's model, with its LoRAs, VAE and embeddings."""
    vae = None if job.vae is None else formats.read_vae(job.vae)
    model = formats.load(job.model, job.backend, job.device, job.dtype, job.lora, job.low_memory,
                         vae)
    if job.embedding:
        model = prompts.with_embeddings(model, job.embedding)
    if job.prediction:
        kind = {"v": "v_prediction"}.get(job.prediction, job.prediction)
        model.config.scheduler.prediction_type = kind
    if job.tiles or job.seamless:
        larger.change_vae(model, larger.SEAMLESS if job.seamless else larger.IN_BANDS)
    model.name = files.printable(model.name, control=False)
    return model


def filled(model, job):
    """Return the job with a missing size, sampler, steps or guidance set to the model's own."""
    width, height = like_diffusers.picture_size(model, job.width, job.height)
    sampler, steps, scale = like_diffusers.defaults(model, job.sampler)
    return job._replace(
        width=width, height=height, sampler=sampler, steps=job.steps or steps,
        cfg_scale=scale if job.cfg_scale is None else job.cfg_scale)


def ready(model, jobs):
    """Return the jobs, filled; UserError if a file of one cannot be used, before any is drawn."""
    jobs = [filled(model, job) for job in jobs]
    for job in jobs[1:]:        # the first is next
        start_walk(model, job, like_diffusers.denoiser, [])
    return jobs


def passes_of(jobs):
    """Return {part of the model: how many times these jobs read its weights}."""
    return {"unet": sum(map(steps_of, jobs)), "vae": sum(job.batch_size for job in jobs),
            "text": len(jobs)}


def seeds_of(job):
    """Return the seed of each picture."""
    return [job.seed + k for k in range(job.batch_size)]


def steps_of(job):
    """Return how many steps a job takes: fewer from a picture, more with --hires."""
    if job.init_img:
        return len(tiny_sd.last_steps(range(job.steps), job.strength))
    return job.steps + ((job.hires[2] or job.steps) if job.hires else 0)


def words_of(job):
    """Return the prompt without <lora:...>."""
    return job.prompt if job.plain_prompt else prompts.without_tags(job.prompt)


def weighted(model, job):
    """Do brackets in a job's prompts mean weights?"""
    return prompts.reads_weights(model) and not job.plain_prompt


def as_in_comfyui(model, job):
    """Does a job read its prompts as ComfyUI does?"""
    return job.program == "comfyui" and prompts.reads_weights(model)


def chunks_of(model, job):
    """Return the chunks in which the model reads a job's prompt."""
    tokenizer = model.encoders[0].tokenizer
    if as_in_comfyui(model, job):
        return comfy.chunks_of(tokenizer, words_of(job))
    return prompts.chunks_of(tokenizer, words_of(job), weighted(model, job))


def remarks(model, job, known):
    """Yield warnings about parts of a job that will not work as expected.

    known: see things.known_things.
    """
    if known and not (job.lora or job.embedding):       # which teach new words
        words = words_of(job)
        yield from things.remarks(known, words if job.plain_prompt else in_time.all_words(words))
    own = like_diffusers.picture_size(model)
    if known and larger.drawn_size(model, job) != own:
        yield ("the model was trained on pictures of {} x {} and draws other sizes badly "
               "(--enlarge N enlarges a picture)".format(*own))
    for name in facts.other_files(job.facts, job, model):
        yield f"--like {job.like}: the {name} is not the file that the picture was made with"
    yield from prompts.remarks(model, [words_of(job), job.negative_prompt or ""],
                               job.plain_prompt)


def make_room(model, job):
    """UserError if three of the largest arrays (VAE float32, U-Net float16) do not fit in memory.

    The same for what is written at the end, when all work would be lost. If twice as much does not
    fit, switch the VAE to bands.
    """
    width, height = larger.drawn_size(model, job)
    pixels = width * height
    check_memory(4 * pixels * job.enlarge ** 2, f"--enlarge {job.enlarge}", "enlarge it less")
    if job.film or job.show:
        kept = f"--film {job.film}" if job.film else f"--show {job.show}"
        check_memory(bytes_of_a_step(model, job) * steps_of(job), kept, "take fewer steps")
    if job.device == "cpu":
        vae, unet = model.config.vae.block_out_channels, model.config.unet.block_out_channels
        bytes_per_pixel = max(4 * vae[:2][-1], 2 * unet[0] * job.batch_size // model.factor ** 2)
        need = 3 * bytes_per_pixel * pixels
        check_memory(need, f"--width {width} --height {height}")
        if 2 * need > free_memory() and not job.seamless:
            larger.change_vae(model, larger.IN_BANDS)


def bytes_of_a_step(model, job):
    """Return about how many bytes --film or --show keeps for each step.

    A picture, and for --show how much each latent attends to each token.
    """
    tokens = model.encoders[0].tokenizer.length * len(chunks_of(model, job)) if job.show else 0
    return job.batch_size * job.width * job.height * (3 + 4 * tokens / model.factor ** 2)


def embedder(model, job):
    """Return the function that embeds a job's prompts."""
    embed = prompts.embed_prompts if weighted(model, job) else tiny_sd.embed_prompts
    embed = comfy.embed_prompts if as_in_comfyui(model, job) else embed
    return prompts.skipping(embed, job.clip_skip) if job.clip_skip else embed


def controls_of(model, job, notes):
    """Return the control networks of --control with their pictures."""
    n, controls = 1 + len(model.unet["down_blocks"][0]["resnets"]), []
    for file, weight, path in job.control:
        weights = control.read_control(file, n, job.backend, job.device, job.dtype)
        control.check_control(file, weights, model)
        picture = files.read_picture(path, job.width, job.height, notes)
        controls.append(control.Control(model, weights, picture, weight, job.control_from,
                                        job.control_until))
    return controls


def timeline_of(job, embed):
    """Return the Timeline of prompts that change during sampling, or None."""
    texts = words_of(job), job.negative_prompt
    if job.plain_prompt or not in_time.changes(*texts):
        return None
    require(not job.show, "--show needs a prompt that does not change")
    more = steps_of(job) - job.steps if job.hires else 0
    return in_time.Timeline(*texts, job.steps, embed, more)


def start_walk(model, job, denoiser, notes):
    """Return the generator of a job's latents, and the notes plus those about its pictures."""
    init, mask, notes = None, None, [*notes]
    if job.only_masked is not None:
        init, mask = larger.part_of(*larger.whole(job, notes), job)
    elif job.init_img is not None:
        init = files.read_picture(job.init_img, job.width, job.height, notes, job.resize)
        if job.mask is not None:
            mask = files.read_mask(job.mask, job.init_img, job.width, job.height, notes, job.resize)

    make, embed, combine = denoiser, embedder(model, job), tiny_sd.guide
    controls, timeline = controls_of(model, job, notes), timeline_of(job, embed)
    counts = [net.count for net in controls]
    if getattr(SAMPLERS[job.sampler], "plain_noise", False):
        make = guidance.with_plain_noise(make)
    if controls:
        make = partial(make, predict=partial(control.predict, controls))
    if timeline:
        embed, combine = timeline.embed, timeline.combine
        counts.append(timeline.count)
    if job.cfg_rescale:
        combine = guidance.rescaled(job.cfg_rescale, combine)
    if combine is not tiny_sd.guide:
        make = guidance.combining(make, combine)
    if job.cfg_interval:
        make = guidance.within(make, *job.cfg_interval)
    if timeline:
        make = timeline.denoiser(make)
    if job.seamless:
        make = larger.seamless(make)

    sampler = SAMPLERS[job.sampler]
    as_program = {"web-ui": samplers.as_web_ui, "comfyui": samplers.as_comfyui}.get(job.program)
    later = sampler = as_program(sampler) if as_program else sampler
    if timeline:        # the second pass of --hires continues it
        later = samplers.counting(sampler, lambda step, n: timeline.count(job.steps + step, n))
    sampler = samplers.counting(sampler, *counts) if counts else sampler
    generate = like_diffusers.generate
    if job.hires:
        size = larger.drawn_size(model, job)
        generate = larger.drawn_over(generate, size, *job.hires[1:], later)
    return generate(
        model, words_of(job), job.negative_prompt, seeds_of(job), job.steps, job.cfg_scale,
        sampler, job.schedule, job.width, job.height, init, job.strength, mask, make, embed), notes
