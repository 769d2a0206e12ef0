"""Textual inversion: learnt words in every file format, compared with transformers with the same
vectors in its table.
"""

import copy
import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import tiny_sd
from conftest import same, with_torch_too
from extras import formats, named, prompts
from helpers import own_lines
from tiny_sd import UserError

pytestmark = pytest.mark.slow

WIDTH = 128     # of the small model's text encoder


def vectors(n, width=WIDTH, seed=0):
    """Return n vectors, larger than the small model's own, so that they tell."""
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


FORMATS = {     # how they lie in a file: suffix, what is saved, the word inside
    "the web UI's": (".pt", lambda v: {
        "string_to_token": {"*": 265}, "string_to_param": {"*": v}, "name": "inside", "step": 9,
        "sd_checkpoint": None, "sd_checkpoint_name": None}, None),
    "the web UI's, of a parameter": (".pt", lambda v: {
        "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(v)}), "name": "inside"},
        None),
    "diffusers'": (".bin", lambda v: {"<inside>": v}, "<inside>"),
    "diffusers', safetensors": (".safetensors", lambda v: {"<inside>": v}, "<inside>"),
    "emb_params": (".safetensors", lambda v: {"emb_params": v}, None),
    "emb_params, half": (".safetensors", lambda v: {"emb_params": v.half()}, None),
    "emb_params, bfloat16": (".safetensors", lambda v: {"emb_params": v.bfloat16()}, None)}


def save(arrays, path):
    (save_file if path.suffix == ".safetensors" else torch.save)(arrays, path)
    return path


def expected_context(encoder, ids, vectors):
    """Return the context of ids (77,); ids from 49408 on are rows of vectors."""
    encoder = copy.deepcopy(encoder)
    table = encoder.get_input_embeddings().weight.data
    encoder.resize_token_embeddings(len(table) + len(vectors))
    encoder.get_input_embeddings().weight.data[len(table):] = vectors
    with torch.no_grad():
        return encoder(torch.tensor([ids]), output_hidden_states=True)


def framed(tokenizer, *pieces):
    """Return the 77 ids of pieces, texts and lists of ids."""
    ids = [tokenizer.bos_token_id]
    for piece in pieces:
        ids += piece if isinstance(piece, list) else tokenizer(
            piece, add_special_tokens=False).input_ids
    return ids + [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (76 - len(ids))


# ── What they do ──────────────────────────────────────────────────────────────────────────────────

@with_torch_too("kind", FORMATS, ["emb_params, bfloat16"])
def test_formats(model, backend, reference, tmp_path, kind):
    suffix, saved, inside = FORMATS[kind]
    three = saved(vectors(3))
    path = save(three, tmp_path / f"some-thing 2{suffix}")
    ids = framed(reference.tokenizer, "a photo of ", [49408, 49409, 49410], ", red")
    used = next(iter(three.values())) if suffix == ".safetensors" else vectors(3)
    expected = expected_context(reference.text_encoder, ids, used.float())[0]
    learnt = prompts.with_embeddings(model, [path])
    for word in filter(None, ("some-thing 2", "SOME-thing 2", "embedding:some-thing 2", inside)):
        for embed in tiny_sd.embed_prompts, prompts.embed_prompts:
            context, _ = embed(learnt, [f"a photo of {word}, red"])
            same("learnt words", tiny_sd.to_numpy(context), expected, 1e-5)
    for text in ["a photo of some thing", *["a photo from inside"] * (inside is None)]:
        plain = tiny_sd.embed_prompts(learnt, [text])[0]
        assert (plain == tiny_sd.embed_prompts(model, [text])[0]).all()


def test_one_vector_without_an_axis_for_it(model, reference, tmp_path):
    path = save({"<cat>": vectors(1)[0]}, tmp_path / "cat.bin")
    expected = expected_context(
        reference.text_encoder, framed(reference.tokenizer, "a ", [49408]), vectors(1))[0]
    context = tiny_sd.embed_prompts(prompts.with_embeddings(model, [path]), ["a <cat>"])[0]
    same("learnt words", tiny_sd.to_numpy(context), expected, 1e-5)


def test_as_diffusers_loads_them(folder, tmp_path):
    """Its own loader, from the same file: a vector each for the tokens <cat>, <cat>_1."""
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    path = save({"<cat>": vectors(2)}, tmp_path / "cat.safetensors")
    pipe.load_textual_inversion(path)
    expected, _ = pipe.encode_prompt("a <cat> on a mat", "cpu", 1, False)
    model = prompts.with_embeddings(formats.load(folder), [path])
    same("learnt words, by diffusers", tiny_sd.embed_prompts(model, ["a <cat> on a mat"])[0],
         expected.detach(), 1e-5)


def test_two_encoders(xl, tmp_path, backend):
    """SDXL's files hold a word's vectors for each."""
    pipe, folder = xl
    both = {"clip_l": vectors(2, 64), "clip_g": vectors(2, 128, 1)}
    path = save(both, tmp_path / "thing.safetensors")
    model = prompts.with_embeddings(formats.load(folder, backend), [path])
    context, pooled = prompts.embed_prompts(model, ["a thing"])
    parts = [expected_context(encoder, framed(tokenizer, "a ", [49408, 49409]), both[name])
             for encoder, tokenizer, name in ((pipe.text_encoder, pipe.tokenizer, "clip_l"),
                                              (pipe.text_encoder_2, pipe.tokenizer_2, "clip_g"))]
    expected = torch.cat([part.hidden_states[-2] for part in parts], -1)
    same("learnt words of SDXL", tiny_sd.to_numpy(context), expected, 1e-5)
    same("learnt words of SDXL, pooled", tiny_sd.to_numpy(pooled), parts[1].text_embeds, 1e-5)
    with pytest.raises(UserError, match="vectors have 128 numbers, the model's 64 and 128"):
        prompts.with_embeddings(model, [save({"a": vectors(1)}, tmp_path / "a.safetensors")])


def test_with_weights_left_in_their_file(folder, tmp_path):
    path = save({"emb_params": vectors(2)}, tmp_path / "thing.safetensors")
    contexts = [tiny_sd.embed_prompts(prompts.with_embeddings(
        formats.load(folder, low_memory=low), [path]), ["a thing"])[0] for low in (False, True)]
    np.testing.assert_allclose(*contexts, atol=1e-5)


def test_words_that_begin_alike(folder, tmp_path):
    files = [save({"emb_params": vectors(n)}, tmp_path / f"{name}.safetensors")
             for name, n in (("bad", 1), ("bad-hands", 2))]
    tokenizer = prompts.with_embeddings(formats.load(folder), files).encoders[0].tokenizer
    plain = formats.clip_tokenizer().tokens
    assert tokenizer.tokens("bad hands") == [49408, *plain("hands")]
    assert tokenizer.tokens("a bad-hands-bad badly") == [
        *plain("a"), 49409, 49410, *plain("-"), 49408, *plain("badly")]
    assert tokenizer.decode(tokenizer.tokens("a bad-hands-bad")) == "a bad-hands - bad"


def test_a_word_stays_whole_and_has_a_weight(folder, tmp_path):
    path = save({"emb_params": vectors(10)}, tmp_path / "thing.safetensors")
    tokenizer = prompts.with_embeddings(formats.load(folder), [path]).encoders[0].tokenizer
    first, second = prompts.chunks_of(tokenizer, " ".join("x" * 70) + " (thing:1.2) x")
    assert len(first) == 70 and second[:10] == [(i, 1.2) for i in range(49408, 49418)]


def test_the_model_given_stays_what_it_was(folder, tmp_path):
    model = formats.load(folder)
    path = save({"emb_params": vectors(1)}, tmp_path / "thing.safetensors")
    prompts.with_embeddings(model, [path])
    assert len(model.encoders[0].weights["embeddings"]["token_embedding"]["weight"]) == 49408
    assert model.encoders[0].tokenizer.tokens("thing") == formats.clip_tokenizer().tokens("thing")


# ── What is refused ───────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("arrays, said", [
    ({"emb_params": vectors(2, 64)}, "is for another model: its vectors have 64 numbers, the "
                                     "model's 128"),
    ({"clip_l": vectors(2), "clip_g": vectors(2)},
     "is for another model: its vectors have 128 and 128 numbers, the model's 128"),
    ({"a": vectors(1), "b": vectors(1)}, "is not an embedding: it holds 2 tensors instead of one"),
    ({"emb_params": torch.zeros(2, 2, WIDTH)}, "is for another model"),
    ({"emb_params": torch.zeros(0, WIDTH)}, "is for another model"),
    ({"emb_params": torch.tensor(1.0)}, "is for another model"),
    ({"emb_params": vectors(76)}, "has 76 vectors, too many for a prompt"),
    ({"emb_params": vectors(1) * torch.inf}, "has numbers that are not finite")])
def test_a_file_that_does_not_fit(folder, tmp_path, arrays, said):
    path = save(arrays, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=re.escape(f"{path} {said}")):
        prompts.with_embeddings(formats.load(folder), [path])


@pytest.mark.parametrize("saved, said", [
    ({"string_to_param": {}}, "is not an embedding: it holds 0 tensors"),
    ([1, 2], "holds 0 tensors"),
    ({"string_to_param": {"*": 3}}, "holds 0 tensors"), (print, "holds 0 tensors")])
def test_a_pickle_that_is_none(folder, tmp_path, saved, said):
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(UserError, match=said):
        prompts.with_embeddings(formats.load(folder), [tmp_path / "x.pt"])


# ── On the command line ───────────────────────────────────────────────────────────────────────────

@pytest.fixture
def run(folder, tmp_path, monkeypatch, command):
    """run(argument, ...) -> (status, the picture's name or None, the program's messages)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, model=folder):
        status, out, err = command(*argv, "-m", model, "--steps", "1", "-W", "32", "-H", "32")
        return status, (out or [None])[0], own_lines(err)
    return run


def text_of(path):
    return Image.open(path).text["parameters"]


def test_a_learnt_word_draws_another_picture(run):
    save({"emb_params": vectors(4)}, Path("thing.safetensors"))
    status, plain, _ = run("a thing")
    assert run("a thing", "--embedding", "thing.safetensors") == (0, "out-1.png", [])
    one, other = (np.asarray(Image.open(name)) for name in (plain, "out-1.png"))
    assert status == 0 and (one != other).any()
    digest = hashlib.sha256(Path("thing.safetensors").read_bytes()).hexdigest()[:12]
    assert f', TI hashes: "thing: {digest}",' in text_of("out-1.png")


def test_a_word_that_no_prompt_says_gets_a_line(run):
    save({"<inside>": vectors(1)}, Path("thing.safetensors"))
    argv = ["--embedding", "thing.safetensors"]
    assert run("a cat", *argv)[2] == ["no prompt uses thing or <inside>, given with --embedding"]
    for prompt in ["a (thing:1.2)"], ["a", "-n", "(<inside>)"], ["a thing", "--plain-prompt"]:
        assert run(*prompt, *argv)[::2] == (0, [])
    save({"emb_params": vectors(1)}, Path("other.safetensors"))
    assert run("a cat", *argv, "--embedding", "other.safetensors")[2] == [
        "no prompt uses other; thing or <inside>, given with --embedding"]


@pytest.mark.parametrize("argv, said", [
    (["none.pt"], "there is no embedding none.pt"), (["."], "there is no embedding ."),
    (["in.png"], "in.png is a picture"), (["empty.pt"], "empty.pt is empty"),
    ([""], "there is no embedding")])
def test_one_line_for_what_is_no_embedding(run, argv, said):
    Image.new("RGB", (8, 8)).save("in.png")
    Path("empty.pt").touch()
    status, out, err = run("a", "--embedding", *argv)
    assert (status, out, len(err)) == (2, None, 1) and err[0].startswith(said)


@pytest.mark.parametrize("place", ["models", "models/embeddings", "embeddings", "."])
def test_like_finds_learnt_words_beside_the_model(run, folder, tmp_path, place):
    small = shutil.copytree(folder, tmp_path / "models" / "small", symlinks=True)
    (tmp_path / place).mkdir(exist_ok=True)
    file = save({"emb_params": vectors(4)}, tmp_path / place / "some thing.safetensors")
    _, first, _ = run("a some thing", "--embedding", file, model=small)
    status, again, err = run("--like", first, model=small)
    if place == "models":       # which is above, not beside
        assert status == 0 and err == [f"--like {first}: Embedding some thing is not repeated: "
                                       "give it with --embedding"]
        status, again, err = run("--like", first, "--embedding", file, model=small)
    assert (status, err) == (0, []) and Path(first).read_bytes() == Path(again).read_bytes()


def test_like_says_where_a_file_is_another(run):
    save({"emb_params": vectors(4)}, Path("thing.safetensors"))
    _, first, _ = run("a thing", "--embedding", "thing.safetensors")
    save({"emb_params": vectors(4, seed=1)}, Path("thing.safetensors"))
    named.file_hash.cache_clear()     # which in a process of its own is empty
    assert run("--like", first)[::2] == (0, [
        f"--like {first}: the embedding thing is not the file that the picture was made with"])
