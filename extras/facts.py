"""Record in a picture how it was made, and read that back (--like).

The format comes from AUTOMATIC1111's web UI: the prompt, the negative prompt, and a line of facts,
"Steps: 20, Sampler: Euler a, ...". Many programs write it, each with variations.
"""

import contextlib
import json
import re
from pathlib import Path

import tiny_sd
from extras.checks import first_five
from extras.comfy import read_graph
from extras.files import EXIF_IFD, USER_COMMENT, check_record, opened, printable
from extras.formats import VAES
from extras.named import file_hash, find_file, known_model, lora_hashes, vae_hash
from extras.prompts import MOST_TAGS
from extras.records import CHUNKS as RECORDS
from extras.records import read_record
from extras.samplers import SCHEDULED, TITLES, sampler_named
from extras.schedules import schedule_named
from extras.schedules import title as schedule_title
from tiny_sd import SAMPLERS, UserError, require, shorten

# ── What is recorded ────────────────────────────────────────────────────────────────────────────


def plain(text):
    """Return a text without commas and colons, so that it can be the value of a fact."""
    return re.sub("[,:]", " ", printable(str(text)))


def stem(file):
    """Return the name of a file without its folder and suffix."""
    return Path(file or "").stem


def hashes(files, hash_of):
    """Return '"name: hash, name: hash"' of some files, quoted because it has commas and colons."""
    pairs = [f"{plain(stem(file))}: {hash_of(file)}".replace('"', "'") for file in files]
    return json.dumps(", ".join(pairs), ensure_ascii=False) if pairs else ""


PROGRAMS = {"web-ui": "web UI", "comfyui": "ComfyUI"}      # of --as

FACTS = {       # {name: value(job, model)}, in the order recorded
    # model is None before it is loaded. A value of "" is not recorded; None: the model decides.
    "Steps": lambda job, _: job.steps,
    "Sampler": lambda job, _: job.sampler and (
        plain(f"{TITLES.get(job.sampler, job.sampler)} {schedule_title(job.schedule)}".strip())),
    "CFG scale": lambda job, _: job.cfg_scale,
    "CFG rescale": lambda job, _: job.cfg_rescale or "",
    "CFG interval": lambda job, _: (
        "{:g}-{:g}".format(*job.cfg_interval) if job.cfg_interval else ""),
    "Seed": lambda job, _: job.seed,
    "Size": lambda job, _: f"{job.width}x{job.height}" if job.width and job.height else None,
    "Model hash": lambda job, model: model and model.digest,
    "Model": lambda job, model: model and plain(model.name),
    "Denoising strength": lambda job, _: job.hires[1] if job.hires else (
        job.strength if job.init_img else ""),
    "Hires upscale": lambda job, _: job.hires[0] if job.hires else "",
    "Hires steps": lambda job, _: (job.hires[2] or "") if job.hires else "",
    "Hires upscaler": lambda job, _: "Lanczos" if job.hires else "",
    "Resize": lambda job, _: "" if job.resize == "crop" else job.resize,
    "Mask": lambda job, _: plain(Path(job.mask or "").name),
    "Masked area padding": lambda job, _: "" if job.only_masked is None else job.only_masked,
    "ControlNet": lambda job, _: plain(" ".join(
        f"{stem(file)} {weight} {Path(picture).name}" for file, weight, picture in job.control)),
    "Clip skip": lambda job, _: job.clip_skip or "",
    "Plain prompt": lambda job, _: job.plain_prompt or "",
    "Empty negative": lambda job, _: "encoded" if job.negative_prompt == "" else "",
    "VAE hash": lambda job, _: vae_hash(job.vae),
    "VAE": lambda job, _: plain(Path(job.vae or "").name),
    "Lora": lambda job, _: plain(" ".join(f"{stem(file)} {weight}" for file, weight in job.lora)),
    "Lora hashes": lambda job, model: model and hashes(
        [file for file, _ in job.lora], lambda file: lora_hashes(file)[0]),
    "TI hashes": lambda job, model: model and hashes(job.embedding, file_hash),
    "Prediction": lambda job, _: job.prediction or "",
    "Levels": lambda job, _: PROGRAMS.get(job.program, ""),
    "Tiling": lambda job, _: job.seamless or "",
    "Enlarged": lambda job, _: job.enlarge if job.enlarge > 1 else "",
    "RNG": lambda job, model: model and "CPU",
    "Version": lambda job, model: model and f"tiny_sd {tiny_sd.__version__}"}
OPTIONS = {     # {fact: the option that takes its value unchanged}
    "Steps": "steps", "CFG scale": "cfg-scale", "CFG rescale": "cfg-rescale",
    "CFG interval": "cfg-interval", "Seed": "seed", "Denoising strength": "strength",
    "Resize": "resize", "Masked area padding": "only-masked", "Clip skip": "clip-skip",
    "Prediction": "prediction", "Enlarged": "enlarge"}


def parameters_text(job, model):
    """Return the text for a PNG's `parameters` chunk, which other programs read, too."""
    values = {name: text(job, model) for name, text in FACTS.items()}
    line = ", ".join(f"{name}: {value}" for name, value in values.items() if value != "")
    return words_text(job.prompt, job.negative_prompt) + line


def words_text(prompt, negative):
    """Return the lines with the prompts; only the last line starts with "Negative prompt:"."""
    negative = (negative or "").replace("\nNegative prompt:", " Negative prompt:")
    return f"{prompt}\nNegative prompt: {negative}\n"


def records(path, job):
    """Does a picture file record the settings of this job?

    Settings that the job leaves to the model may have any value, and so may a seed of None.
    """
    try:
        words, facts = split_text(recorded_text(path)[0])
    except UserError:
        return False
    wanted = {name: text(job, None) for name, text in FACTS.items()}
    return words == words_text(job.prompt, job.negative_prompt) and all(
        value is None or str(value) == facts.get(name, "") for name, value in wanted.items())


# ── What a picture's text says ──────────────────────────────────────────────────────────────────

CHUNKS = {"workflow": "ComfyUI", "prompt": "ComfyUI", "invokeai_metadata": "InvokeAI",
          "sd-metadata": "InvokeAI", "Dream": "InvokeAI", "fooocus_scheme": "Fooocus"}
VERSIONS = {"tiny_sd": "tiny_sd", "ComfyUI": "ComfyUI", "Fooocus": "Fooocus", r"f\d|neo": "Forge",
            r"v?\d+\.": "AUTOMATIC1111"}
WEB_UI = {"AUTOMATIC1111", "Forge", ""}      # "": old versions of AUTOMATIC1111
ON_THE_CPU = {"tiny_sd", "ComfyUI", "SwarmUI", "InvokeAI", "Fooocus"}     # draw noise on the CPU


def recorded_text(path):
    """Return the text recorded in a picture, and the name of the program if it tells, or ""."""
    with opened(path) as picture:
        info, exif = picture.info, picture.getexif()
        comments = [directory.get(USER_COMMENT) for directory in (exif.get_ifd(EXIF_IFD), exif)]
    texts = map(decoded, (info.get("parameters"), *comments, info.get("comment")))
    text = next(filter(None, texts), "")
    check_record(path, text)
    program = next((CHUNKS[key] for key in CHUNKS if key in info), "")
    program = "NovelAI" if info.get("Software") == "NovelAI" else program
    return text, "SwarmUI" if '"sui_image_params"' in text[:1000] else program


def decoded(text):
    """Decode a text; bytes are EXIF's UserComment: 8 bytes naming the encoding, then the text.

    UNICODE means UTF-16 in either byte order, but some programs write UTF-8.
    """
    if not isinstance(text, bytes):
        return text if isinstance(text, str) else ""
    code, letters = text[:8], text[8:]
    if code.rstrip(b"\0") not in (b"UNICODE", b"ASCII", b"JIS", b""):
        return text.decode(errors="replace").removeprefix("\ufeff")
    found = [letters.decode(codec, errors="replace") for codec in
             (["utf-16-be", "utf-16-le", "utf-8"] if code.startswith(b"UNICODE") else ["utf-8"])]
    found = [text.removeprefix("\ufeff") for text in found]
    return next((text for text in found if "Steps:" in text), found[0])


STEPS, SPACE, LONGEST_LINE = re.compile(r"Steps: *\d"), re.compile(r"\s*"), 50_000
KEY = re.compile(r'\s*([^:,"]{1,60}):\s*')
NAMES = {name.lower(): name for name in FACTS} | {"guidance scale": "CFG scale"}


def split_text(text):
    """Return the prompts in a picture's text, and {name: value} from the line of facts after them.

    That is the last line that starts with "Steps: " and has a seed and a size. Some sites join all
    lines into one. Without facts, the whole text is returned as prompts.
    """
    starts = [mark.start() for mark in STEPS.finditer(text)][-9:]
    starts.sort(key=lambda start: (start == 0 or text[start - 1] == "\n", start))
    for start in reversed(starts):
        facts = read_facts(text[start:start + LONGEST_LINE].partition("\n")[0])
        if {"Seed", "Size"} <= facts.keys():
            return text[:start], facts
    return text, {}


def read_facts(line):
    """Parse "Steps: 20, Sampler: ..." into {name: value}; a value may be JSON with commas."""
    facts, start, decoder = {}, 0, json.JSONDecoder()
    while start < len(line):
        key = KEY.match(line, start)
        start = key.end() if key else start
        end = line.find(",", start) % (len(line) + 1)
        value = line[start:end]
        if value[:1] in ('"', "{", "["):
            with contextlib.suppress(ValueError, RecursionError):
                said, after = decoder.raw_decode(line, start)
                after = SPACE.match(line, after).end()
                if line[after:after + 1] in ("", ","):
                    value, end = (said if value[0] == '"' else line[start:after]), after
        if key:
            facts[NAMES.get(key[1].strip().lower(), key[1].strip())] = value.strip()
        start = end + 1
    return facts


def named_hashes(facts, fact):
    """Return {name: hash} of a fact like "Lora hashes"."""
    pairs = [pair.rpartition(":") for pair in facts.get(fact, "").split(",")]
    return {name.strip(): digest.strip() for name, colon, digest in pairs if colon}


def named_weights(text):
    """Parse the fact "Lora" into [(name, weight), ...]; names may contain spaces."""
    pairs, words = [], []
    for word in text.split(" "):
        if words and re.fullmatch(r"-?\d+(\.\d+)?", word):
            pairs.append((" ".join(words), word))
            words = []
        else:
            words.append(word)
    return pairs


# ── A picture drawn again ───────────────────────────────────────────────────────────────────────

HINTS = {   # {start of a fact's name: what to tell the user}, the most important first
    "the model is": "the bundled model draws; choose another with --model",
    "Lora": "give it with --lora",
    "Embedding": "give it with --embedding", "VAE|Module": "give it with --vae",
    "Denoising strength": "give its start picture with --init-img",
    "Mask$": "give it with --mask",
    "Mask|Inpaint|Soft inp": "part of it was inpainted: give --init-img and --mask",
    "Hires upscaler": "here Lanczos enlarges the picture",
    "Hires|First pass": "it was enlarged and drawn over: use --hires SCALE",
    "Ultimate SD|SD upscale|Tiled|MultiDiffusion": "it was enlarged and drawn over in tiles",
    "Refiner": "a second model drew the last steps",
    "ControlNet$": "give it with --control",
    "Nodes": "these nodes have no effect here",
    "LoRA clip": "the U-Net's weight is used for both networks",
    "one of a batch": "only the first is drawn",
    "this version of": "it takes other steps there",
    "ControlNet|T2I|IP.?Adapter": "another picture guided it",
    "RNG": "its noise came from a GPU and is different here",
    "ADetailer|FaceDetailer": "details such as faces were detected and redrawn",
    "Face restoration": "another network restored the faces",
    "Schedule|Sigma|Noise Schedule|SGM|Discard|Downcast|Zero": "it used other noise levels",
    "Variation seed|Seed resize": "the noise was mixed from two seeds",
    "the noise of": "it came from a Brownian tree or a GPU and is different here",
    "ENSD": "the sampler's own noise came from another seed",
    "Hypernet": "a hypernetwork changed the model",
    "Regional|RP |Latent Couple|Cutoff": "words applied to parts of the picture only",
    "Dynamic thres|DynThres|CFG Rescale|FreeU|SAG|PAG|NGMS|Skip Early": "guidance was modified",
    "Emphasis": "weights work differently there", "Pad conds": "the shorter prompt was padded",
    "Token merging|ToMe|HyperTile": "tokens were merged for speed",
}
NO_MATTER = re.compile(     # facts that do not change the picture, or are handled elsewhere
    "Version|App$|User$|Hashes|Batch|Created Date|Civitai|.*Template|Wildcard|Init image hash|"
    "Mask blur|Image CFG|Source|Schedule type")


def read_again(path, args):
    """Return ({option: its values}, {fact: value}, lines about facts not repeated) of a picture.

    args: the options that the user gave, which supply what the picture does not record.
    """
    text, program = recorded_text(path)
    words, facts = split_text(text)
    prompt, negative = split_words(words)
    if not facts and (graph := read_graph(path)).nodes:
        (prompt, negative, facts), program = graph.record(), "ComfyUI"
    if not facts and program in RECORDS:
        prompt, negative, facts = read_record(path, program)
        if re.search(r"[({[]|\w[+-]+(\s|$)", prompt):
            facts["Emphasis"] = f"{program}'s"
    theirs = f", nor as {program} may do" if program else ""
    require(facts, f"{path} does not record its steps, seed and size as AUTOMATIC1111 does{theirs}")
    program = program or program_of(facts)
    left = {name: value for name, value in facts.items()
            if name not in FACTS and not NO_MATTER.match(name)}

    options = {"prompt": [prompt]} | {option: [facts[name]] for name, option in OPTIONS.items()
                                      if name in facts}
    if negative or "Empty negative" in facts:       # otherwise there was no negative prompt
        options["negative-prompt"] = [negative]
    options |= zip(("width", "height"), ([side.strip()] for side in facts["Size"].split("x", 1)))
    if not args.mask:
        options.pop("only-masked", None)
    if facts.get("Tiling") == "True":
        options["seamless"] = [None]
    if facts.get("Plain prompt"):
        options["plain-prompt"] = [None]
    drawn_by = "web UI" if program in WEB_UI else facts.get("Levels", program)
    options["as"] = [option for option, name in PROGRAMS.items() if name == drawn_by]
    options |= sampler_again(path, facts, args, left, program)
    options |= files_again(path, facts, args, left)

    if "Hires upscale" in facts:
        options["hires"] = [":".join((facts["Hires upscale"], options.pop("strength", ["0.7"])[0],
                                      facts.get("Hires steps", "0")))]
        if facts.get("Hires upscaler") != "Lanczos":
            left["Hires upscaler"] = facts.get("Hires upscaler", "")
    if any(re.match("Hires|First pass", name) for name in left):
        options.pop("strength", None)       # it belongs to the second pass
    elif "strength" in options:
        left["Denoising strength"] = facts["Denoising strength"]
    left |= {name: facts[name] for name in ("Mask", "ControlNet") if name in facts}
    if (noise := facts.get("RNG", "CPU" if program in ON_THE_CPU else "GPU")) != "CPU":
        left["RNG"] = noise
    return options, facts, not_repeated(path, args, left)


def program_of(facts):
    """Return the name of the program that wrote these facts, or ""."""
    version = facts.get("Version", "")
    if not version and re.fullmatch("[a-z0-9_]+( [a-z_]+)?", facts.get("Sampler", "")):
        return "ComfyUI"        # its samplers have such names
    return next((name for start, name in VERSIONS.items() if re.match(start, version)), "")


def split_words(words):
    """Return the prompt and the negative prompt of the text before the facts."""
    if not words.endswith("\n"):        # all is in one line
        prompt, mark, negative = words.rpartition("Negative prompt:")
        return (prompt if mark else negative).strip(), negative.strip() if mark else ""
    prompt, mark, negative = f"\n{words}".rpartition("\nNegative prompt:")
    if not mark:
        return words.removesuffix("\n"), ""
    return prompt[1:], negative.removeprefix(" ").removesuffix("\n")


def sampler_again(path, facts, args, left, program):
    """Return the options for a picture's sampler, and add to `left` what they cannot repeat."""
    title, asked = facts.get("Sampler", ""), facts.get("Schedule type", "Automatic")
    sampler, schedule = sampler_named(title) or args.sampler or (None, None)
    require(sampler, f"{path} was drawn with {title or 'no sampler'}, which does not exist here: "
                     "add --sampler NAME")
    asks_for_noise = SAMPLERS[sampler].__defaults__ is None
    if program == "ComfyUI" and asks_for_noise or program != "tiny_sd" and sampler.endswith("sde"):
        left["the noise of its steps"] = None
    schedule = schedule or schedule_named(asked)
    if not schedule and asked != "Automatic":
        left["Schedule type"] = asked
    if program == "ComfyUI" and asked == "Automatic":
        schedule = schedule or "normal"     # its default, which it does not record
    takes = (args.sampler or [sampler])[0] in SCHEDULED
    options = {"sampler": [sampler]} | ({"scheduler": [schedule]} if schedule and takes else {})
    if sampler == "ddim_cfg++" and program in WEB_UI:
        with contextlib.suppress(KeyError, ValueError):     # the web UI's scale goes to 12.5, not 1
            options["cfg-scale"] = [str(float(facts["CFG scale"]) / 12.5)]
    return options


def files_again(path, facts, args, left):
    """Return the options for the files that a picture names; add missing ones to `left`."""
    model = args.model or known_model(facts.get("Model", ""), args.models_dir)
    name = facts.get("Model") or facts.get("Model hash")
    require(model or not name, f"{path} was drawn by the model {shorten(str(name), 60)}, which was "
                               "not found: give it, or another one, with --model")
    if not model:
        left["the model is not recorded"] = None
    wanted = [("lora", "Lora", *pair) for pair in named_weights(facts.get("Lora", ""))]
    wanted += [("embedding", "Embedding", name, "") for name in named_hashes(facts, "TI hashes")]
    wanted += [("vae", "VAE", facts["VAE"], "")] if "VAE" in facts else []
    require(len(wanted) <= MOST_TAGS, f"{path} names {len(wanted)} files: at most {MOST_TAGS}")
    given = {*map(stem, [*(file for file, _ in args.lora), *args.embedding, args.vae])}

    options = {"model": [model]} if model else {}
    for option, fact, name, weight in wanted:
        file = name if option == "vae" and name in VAES else find_file(
            option, name, model, args.models_dir)
        if not file:
            left[fact] = " ".join(filter(None, (left.get(fact), name, weight)))
        elif stem(file) not in given:
            options.setdefault(option, []).append(file + f":{weight}" * bool(weight))
    return options


def not_repeated(path, args, left):
    """Return lines about recorded facts that neither --like nor another flag repeats.

    One line for each hint, the most important first, and one for all facts without a hint.
    """
    lines, rest = {}, []
    for name, value in left.items():
        said = name if value is None else shorten(f"{name} {value}", 100) + " is not repeated"
        key = next((key for key in HINTS if re.match(key, name)), None)
        options = re.findall("--([a-z-]+)", HINTS.get(key, ""))
        if key is None:
            rest.append(shorten(f"{name} {value}", 60))
        elif not options or not all(getattr(args, o.replace("-", "_")) for o in options):
            lines.setdefault(key, f"{said}: {HINTS[key]}")
    lines = [lines[key] for key in HINTS if key in lines]
    if rest:
        lines.append(f"{first_five(rest)} {'are' if len(rest) > 1 else 'is'} not repeated")
    return [f"--like {path}: {line}" for line in lines]


def other_files(facts, job, model):
    """Yield the names of files whose hashes differ from those recorded in a picture."""
    model_hash, ours = facts.get("Model hash", ""), vae_hash(job.vae)
    if model.digest and len(model_hash) >= 10 and model_hash[:10] != model.digest:
        yield f"model {model.name}"     # a shorter hash is an old one, not SHA-256
    if ours and facts.get("VAE hash", ours)[:10] != ours:
        yield f"VAE {stem(job.vae)}"
    for kind, files, hashes_of in (("Lora", [file for file, _ in job.lora], lora_hashes),
                                   ("TI", job.embedding, lambda file: [file_hash(file)])):
        known = named_hashes(facts, f"{kind} hashes")
        for file in files:
            name = stem(file)
            if known.get(name) and known[name] not in hashes_of(file):
                yield f"{'LoRA' if kind == 'Lora' else 'embedding'} {name}"
